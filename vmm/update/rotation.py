"""Another key for the releases to come: into the firmware's db, without a moment in which the volumes would not open.

    apply    a release brings the certificate; what PCR 7 will hold is foreseen and left for the next initrd
    start    the initrd seals the volumes to those values, too (holdfast-ahead@.service): only there the TPM opens them
    settle   once the version is kept and the volumes' headers show the new seals, the firmware's db is extended

Before the last step the old seals open the volumes and after it the new ones do, so that a power cut at any time costs
nothing; every step is tried again at the next start. What opens the volumes is read from their headers, not remembered.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from vmm import atomic
from vmm.errors import Unavailable, UserError
from vmm.update import addition, signer
from vmm.update.environment import Environment
from vmm.update.errors import Refused, named_errors
from vmm.update.esp import started_by
from vmm.update.records import Caller
from vmm.update.state import KeyChange
from vmm.update.trusted import LAYER, Foreseen
from vmm.update.types import Release

UNFORESEEN = "the firmware's db is not what was foreseen: the volumes will not open at the next start"
_AHEAD = "HOLDFAST_PCR7_NOW={}\nHOLDFAST_PCR7_NEXT={}\n"
"""The variables of holdfast-ahead@.service: PCR 7 with the UKIs of now, and with those of the new key."""


class Rotation:
    """The change of keys of this host, if there is one."""

    def __init__(self, environment: Environment) -> None:
        self._env = environment

    def prepare(self, release: Release, uki: Path) -> KeyChange | None:
        """What a release changes, or None; nothing is written yet, but where a start has to come first.

        Arguments: ``uki`` is the release's. Raises: Refused when its systems would not get at the volumes.
        """
        brought = addition.parse(release.db_append) if release.db_append else None
        foreseen = self._env.system.foresee(uki, brought)
        if foreseen is None:
            return None
        lacking = self._env.system.unsealed(foreseen.pcr7)
        grows = _digest(foreseen.db) != _digest(self._env.system.db())
        if not lacking and not grows:
            return None
        change, known = self._change(release.version, foreseen, release.db_append if grows else b""), self.pending
        if brought is None and known is not None and known.addition:
            raise Refused(LAYER, f"the change that {known.version} began has to end first", hint=known.reason)
        self._make_room(foreseen)
        if brought is not None:
            return change
        # The key is in db already, since the installation or by another's hand: only the seals are missing.
        self.leave(change)
        self._env.store.change(keys=change)
        raise Refused(
            LAYER,
            f"the volumes ({', '.join(lacking)}) would not open for a system that {change.subject} vouches for",
            hint="Restart the host, which seals them for such systems, too; then apply again.",
        )

    def _make_room(self, foreseen: Foreseen) -> None:
        last = self._env.store.state.keys
        former = [bytes.fromhex(value) for value in last.pcr7] if last is not None and last.stage == "done" else []
        self._env.system.make_room(foreseen.pcr7, former)

    def _change(self, version: str, foreseen: Foreseen, payload: bytes) -> KeyChange:
        subject = signer.subject(foreseen.certificate)
        return KeyChange(version, subject, payload, _hex(foreseen), _digest(foreseen.db), self._env.running.boot)

    def leave(self, change: KeyChange) -> None:
        """Leave the values for the next initrd. Raises: OSError."""
        atomic.write(self._env.ahead, _AHEAD.format(*change.pcr7).encode(), mode=0o600)

    @property
    def pending(self) -> KeyChange | None:
        """The change that is under way, or None."""
        change = self._env.store.state.keys
        return change if change is not None and change.stage == "pending" else None

    def go_on(self) -> None:
        """Do what this start allows; what hinders it is on record once. Raises: UserError; OSError."""
        env, change = self._env, self.pending
        if change is None:
            self.tidy()
            return
        kept = env.store.state.installed is None and env.running.version in env.store.state.blessed
        if kept and change.boot != env.running.boot:
            self._go_on(change)

    def tidy(self) -> None:
        """Where no change is under way (any more), take away what was left for one. Raises: OSError."""
        env, change = self._env, self._env.store.state.keys
        if self.pending is not None:
            return
        if change is not None and change.stage == "failed" and change.boot != env.running.boot:
            # The volumes did open.
            env.store.change(keys=None)
        env.ahead.unlink(missing_ok=True)

    def _go_on(self, change: KeyChange) -> None:
        try:
            with named_errors():
                done = self._check(change)
        except UserError as error:
            if error.message != change.reason:
                self._event(change, error.message)
                self._env.store.change(keys=msgspec.structs.replace(change, reason=error.message))
            return
        if not done:
            change = self._extend(change)
        else:
            self._event(change, "")
            change = msgspec.structs.replace(change, stage="done", reason="")
        self._env.store.change(keys=change)
        self.tidy()

    def _check(self, change: KeyChange) -> bool:
        """Whether db is as wanted already; if not, it may be extended now. Raises: UserError; OSError."""
        env = self._env
        lacking = env.system.unsealed(bytes.fromhex(value) for value in change.pcr7)
        if lacking:
            raise Refused(LAYER, f"the volumes ({', '.join(lacking)}) are not sealed for {change.subject} yet")
        if _digest(env.system.db()) == change.db:
            return True
        own = started_by(env.system.entries(), env.running.root_hash)
        brought = addition.parse(change.addition) if change.addition else None
        foreseen = own and env.system.foresee(own.path, brought)
        if not foreseen or (_hex(foreseen), _digest(foreseen.db)) != (change.pcr7, change.db):
            raise Refused(LAYER, "what PCR 7 will hold is no longer what the volumes were sealed to")
        return False

    def _extend(self, change: KeyChange) -> KeyChange:
        """Extend db, with records before and after. Returns: how the change stands now. Raises: UserError."""
        env = self._env
        before = _digest(env.system.db())
        extra = {"certificate": change.subject, "pcr7": list(change.pcr7), "db": before}
        request = env.recorder.intent("update.keys", Caller(), extra)
        reason = "the firmware changed nothing"
        try:
            with named_errors():
                env.system.extend_db(addition.parse(change.addition))
        except UserError as error:
            reason = f"the firmware refused it: {error.message}"
        after = _digest(env.system.db())
        if after == change.db:
            change = msgspec.structs.replace(change, stage="done", reason="")
        elif after == before:
            change = msgspec.structs.replace(change, reason=reason)
        else:
            change = msgspec.structs.replace(change, stage="failed", reason=UNFORESEEN, boot=env.running.boot)
        failure = Unavailable(change.reason) if change.reason else None
        env.recorder.outcome("update.keys", request, Caller(), change.version, failure, {**extra, "db": after})
        return change

    def _event(self, change: KeyChange, reason: str) -> None:
        extra = {"certificate": change.subject, "pcr7": list(change.pcr7)}
        self._env.recorder.event("update.keys", change.version, failed=bool(reason), reason=reason, extra=extra)


def status(change: KeyChange | None) -> str:
    """How a change of keys stands, in words; empty if there never was one."""
    if change is None:
        return ""
    words = f"{change.subject} ({change.version}): {change.stage}"
    return f"{words}: {change.reason}" if change.reason else words


def _hex(foreseen: Foreseen) -> tuple[str, str]:
    now, following = foreseen.pcr7
    return now.hex(), following.hex()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
