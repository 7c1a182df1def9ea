"""What of the trail is kept: what its store remembers of that over restarts, and the records that say what went.

A removal is recorded first, durably, and then carried out; a start makes up for what a power cut left of it. So the
trail never begins later than its records say, and whoever verifies it can tell a removal from a theft.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from vmm import atomic
from vmm.audit.records import FILLING, REMOVED, Digest, Entry, Record
from vmm.audit.rule import Rule
from vmm.errors import Unavailable

STATE = "state.json"
WARNINGS = (75, 90)
"""Percent of the quota at which the trail says how full its store is."""

Cause = Literal["full", "age", "purge"]
Count = Annotated[int, msgspec.Meta(ge=0)]


class _State(msgspec.Struct, frozen=True):
    rule: Rule = Rule()
    exported: Count = 0


class Removed(msgspec.Struct, frozen=True):
    """Records that were removed, ``first`` to ``last``, and the hash of the last; ``lost`` were not yet exported."""

    first: Annotated[int, msgspec.Meta(ge=1)]
    last: Annotated[int, msgspec.Meta(ge=1)]
    head: Digest
    exported: Count
    lost: Count

    @classmethod
    def of(cls, record: Record) -> Removed | None:
        """What a record says was removed; None if it is about something else."""
        if record.type != REMOVED:
            return None
        try:
            return msgspec.convert(record.extra, cls)
        except msgspec.ValidationError:
            # One of a later release.
            return None

    def entry(self, cause: Cause, why: str, request: str) -> Entry:
        """Its record: a failure where something was lost that nobody has and nobody ordered to go."""
        failed = cause == "full" and self.lost > 0
        return Entry(
            type=REMOVED,
            outcome="failure" if failed else "success",
            reason=why,
            request=request,
            extra={"cause": cause, **msgspec.to_builtins(self)},
        )


def removed(first: int, last: int, head: str, exported: int) -> Removed:
    """What goes, when records up to ``exported`` are known elsewhere."""
    return Removed(first, last, head, exported, max(last - max(exported, first - 1), 0))


def level(used: int, quota: int) -> int:
    """The highest of WARNINGS that so many bytes reach; 0 if they reach none."""
    return max((percent for percent in WARNINGS if used * 100 >= percent * quota), default=0)


def filling_entry(percent: int, used: int, quota: int) -> Entry:
    """The record of a store that got so full; sizes are in bytes."""
    return Entry(type=FILLING, extra={"percent": percent, "used": used, "quota": quota})


class Memory:
    """What a store remembers over restarts, in a file beside its segments."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._state = _load(directory)

    @property
    def rule(self) -> Rule:
        """What is kept, and what happens when there is no room."""
        return self._state.rule

    @property
    def exported(self) -> int:
        """The last record that is known elsewhere, and with it all before; 0 if none is."""
        return self._state.exported

    def set_rule(self, rule: Rule) -> None:
        """Go by another rule from now on. Raises: Unavailable."""
        self._save(msgspec.structs.replace(self._state, rule=rule))

    def set_exported(self, seq: int) -> None:
        """Note that records up to a number are known elsewhere; it never goes back. Raises: Unavailable."""
        if seq > self.exported:
            self._save(msgspec.structs.replace(self._state, exported=seq))

    def _save(self, state: _State) -> None:
        try:
            atomic.write(self._directory / STATE, msgspec.json.encode(state) + b"\n", mode=0o600)
        except OSError as error:
            raise Unavailable(f"the audit store failed: {STATE}: {error.strerror}") from None
        self._state = state


def _load(directory: Path) -> _State:
    try:
        return msgspec.json.decode((directory / STATE).read_bytes(), type=_State)
    except FileNotFoundError:
        return _State()
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        # The next start of the host sets the rule, the next export the number.
        print(f"audit: {STATE} cannot be read and counts for nothing: {error}", file=sys.stderr, flush=True)
        return _State()
