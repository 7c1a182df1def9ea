"""What the updater remembers between runs and boots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from vmm import atomic
from vmm.update.types import DbAppend, Failed, Hex256, VersionText

_MOST_HISTORY = 500
_MOST_LINE = 8 << 10
_MOST_FAILED, _MOST_BLESSED, _MOST_BOOTS = 32, 64, 8
_MOST_FILE = 8 << 20

SourceName = Literal["repository", "bundle"]
AskedSource = Literal[SourceName, "stick"]
"""Where to look for a release. A stick is no source that lasts: its bundle is imported, and is the source then."""


class Waiting(msgspec.Struct, frozen=True):
    """A version whose UKI is, or is about to be, on the ESP. ``boot`` is the boot in which that happened.

    ``certain`` is False while it is only about to be. ``boots`` are the latest of its own that reached the updater.
    """

    version: VersionText
    epoch: int
    root_hash: str
    boot: str
    certain: bool = False
    boots: tuple[str, ...] = ()


class KeyChange(msgspec.Struct, frozen=True):
    """A key that releases will be signed with, on its way into the firmware's db (rotation.py).

    ``version`` is the release that asked for it, ``subject`` the certificate's; ``addition`` goes to the firmware, or
    is empty where db holds the certificate already. ``pcr7`` are the values that volumes are to be sealed to before,
    ``db`` is the SHA-256 of db afterwards. ``boot`` is the one in which all that was foreseen, or in which it failed;
    ``reason`` says why the change is not done.
    """

    version: VersionText
    subject: str
    addition: DbAppend
    pcr7: tuple[Hex256, Hex256]
    db: Hex256
    boot: str
    stage: Literal["pending", "done", "failed"] = "pending"
    reason: str = ""


class State(msgspec.Struct, frozen=True):
    """``seen`` is the latest time known to be true, in seconds; ``source`` where the last import or check went,
    and where the next download goes.

    ``overridden`` is whether that check was told to accept expired metadata; so is the download that follows it.
    ``seals_kept`` is why seals to older policy keys are still there, though their epoch was left; empty if none are.
    """

    source: SourceName | None = None
    overridden: bool = False
    checked: str = ""
    available: str = ""
    seen: int = 0
    installed: Waiting | None = None
    failed: tuple[Failed, ...] = ()
    blessed: tuple[str, ...] = ()
    seals_kept: str = ""
    keys: KeyChange | None = None


class GateFailure(msgspec.Struct, frozen=True):
    """Why a boot's health gate was not passed, and which boot's, as it is left in gate.json."""

    version: str
    boot: str
    reason: str
    time: str


class Event(msgspec.Struct, frozen=True):
    """One line of the history."""

    time: str
    type: str
    outcome: str
    version: str = ""
    reason: str = ""
    extra: dict[str, Any] = {}


class Store:
    """state.json and history.jsonl in the updater's folder."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "state.json"
        self._history = folder / "history.jsonl"
        self._gate = folder / "gate.json"
        self.damaged = ""
        self.state = self._load()

    def _load(self) -> State:
        """What is stored. A file that cannot be read is put aside: the floor, not this, is what protects the host."""
        try:
            return msgspec.json.decode(_read(self._path), type=State)
        except FileNotFoundError:
            return State()
        except (msgspec.MsgspecError, OSError, UnicodeDecodeError) as error:
            self.damaged = f"state.json could not be read and was put aside: {error}"
            os.replace(self._path, self._path.with_name("state.json.damaged"))
            return State()

    def change(self, **fields: Any) -> State:
        """Replace fields, durably. Raises: OSError."""
        changed = msgspec.structs.replace(self.state, **fields)
        atomic.write(self._path, msgspec.json.encode(changed), mode=0o600)
        self.state = changed
        return changed

    def fail(self, failed: Failed, **fields: Any) -> None:
        """Remember a version that did not work, and wait no longer for the key it was to bring. Raises: OSError."""
        others = [known for known in self.state.failed if known.version != failed.version]
        keys = self.state.keys
        if keys and keys.stage == "pending" and keys.version == failed.version:
            keys = None
        self.change(failed=(*others, failed)[-_MOST_FAILED:], keys=keys, **fields)

    def bless(self, version: str, **fields: Any) -> None:
        """Remember a version that did. Raises: OSError."""
        others = [known for known in self.state.blessed if known != version]
        failed = tuple(known for known in self.state.failed if known.version != version)
        self.change(blessed=(*others, version)[-_MOST_BLESSED:], failed=failed, **fields)

    def note_trial(self, boot: str) -> None:
        """Remember a boot of the version that waits. Raises: OSError."""
        waiting = self.state.installed
        if waiting is not None and boot not in waiting.boots:
            self.change(installed=msgspec.structs.replace(waiting, boots=(*waiting.boots, boot)[-_MOST_BOOTS:]))

    def gate_failure(self) -> GateFailure | None:
        """What the health gate said when it refused the version that waits; None if it said nothing.

        What it said of an earlier attempt with the same version is left out: that was in another boot.
        """
        waiting = self.state.installed
        try:
            failure = msgspec.json.decode(_read(self._gate), type=GateFailure)
        except (msgspec.MsgspecError, OSError, UnicodeDecodeError):
            return None
        if waiting is None or failure.version != waiting.version or failure.boot not in waiting.boots:
            return None
        return failure

    def note_gate_failure(self, failure: GateFailure) -> None:
        """Leave word of why a version is about to be given up, for the boot after this one. Raises: OSError."""
        atomic.write(self._gate, msgspec.json.encode(failure), mode=0o600)

    def history(self) -> list[Event]:
        """What happened, oldest first; lines that cannot be read are left out."""
        try:
            lines = _read(self._history).splitlines()
        except (FileNotFoundError, OSError):
            return []
        events = []
        for line in lines:
            try:
                events.append(msgspec.json.decode(line, type=Event))
            except (msgspec.MsgspecError, UnicodeDecodeError):
                continue
        return events

    def remember(self, event: Event) -> None:
        """Add to the history. Raises: OSError."""
        if len(msgspec.json.encode(event)) > _MOST_LINE:
            event = msgspec.structs.replace(event, extra={}, reason=event.reason[:1000])
        events = [*self.history(), event][-_MOST_HISTORY:]
        atomic.write(self._history, b"".join(msgspec.json.encode(e) + b"\n" for e in events), mode=0o600)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_FILE)
