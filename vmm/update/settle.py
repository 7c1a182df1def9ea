"""After a reboot: did the new version prove itself, or did the boot loader come back to the old one?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from vmm.update.esp import BootEntry, started_by
from vmm.update.state import GateFailure, State, Waiting
from vmm.update.types import version_key

Kind = Literal["nothing", "trial", "blessed", "failed", "withdrawn"]


class Verdict(msgspec.Struct, frozen=True):
    """What became of the waiting version.

    ``trial``: it runs and is not judged yet. ``withdrawn``: it never got as far as the boot loader.
    ``mark_bad`` is a boot entry that still has tries and must not use them.
    """

    kind: Kind
    version: str = ""
    reason: str = ""
    tries: int = 0


def judge(
    state: State, entries: Sequence[BootEntry], version: str, root_hash: str, boot: str, gate: GateFailure | None
) -> Verdict:
    """Compare what runs with what was installed.

    Arguments: ``version``, ``root_hash`` and ``boot`` of the running system; ``gate`` is what its health gate said
    of the waiting version, if anything.
    """
    waiting = state.installed
    own = started_by(entries, root_hash)
    if waiting is None:
        # A first installation has no counter; it counts as blessed as soon as it runs.
        new = own is not None and own.blessed and version not in state.blessed
        return Verdict("blessed", version) if new else Verdict("nothing")
    if waiting.root_hash == root_hash:
        if own is not None and own.blessed:
            return Verdict("blessed", version)
        return Verdict("trial", version, tries=own.left or 0 if own else 0)
    entry = next((e for e in entries if e.version == waiting.version), None)
    if waiting.boot == boot:
        return Verdict("withdrawn", waiting.version) if entry is None and not waiting.certain else Verdict("nothing")
    if entry is None and not waiting.certain:
        return Verdict("withdrawn", waiting.version)
    return Verdict("failed", waiting.version, _reason(waiting, entry, version, gate))


def _reason(waiting: Waiting, entry: BootEntry | None, version: str, gate: GateFailure | None) -> str:
    """Which check failed and in which boot. A boot that did not reach the updater is known by the one before it."""
    if gate is not None:
        return f"{gate.reason} (boot {gate.boot})"
    if entry is None:
        return f"its boot entry was gone after boot {waiting.boot}; {version} was started instead"
    if not entry.bad:
        return f"{version} was started after boot {waiting.boot} although {waiting.version} had {entry.left} tries left"
    tried = f"in {entry.done} tries" if entry.done else "in its tries"
    if waiting.boots:
        known = ", ".join(waiting.boots)
        return f"its health gate did not decide {tried} (known boots: {known}); {version} was started again"
    return f"it did not reach its health gate {tried} after boot {waiting.boot}; {version} was started again"


def newest_usable(entries: Sequence[BootEntry]) -> list[BootEntry]:
    """The entries that systemd-boot would start, in its order."""
    usable = [entry for entry in entries if not entry.bad]
    return sorted(usable, key=lambda entry: version_key(entry.version), reverse=True)
