"""From records to events: the kernel tells one event in several records of one serial number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vmm.kernel.parse import Fields, Line

_END = 1320
"""The record behind the last one of a system call's event."""
WAIT_S = 2.0
"""Seconds for which an event without such an end waits for more."""
_MOST_OPEN = 512
_MOST_RECORDS = 32


@dataclass
class Event:
    """What happened: records by type, in the order in which they came."""

    serial: int
    time: int
    since: float
    records: list[tuple[int, Line]] = field(default_factory=list)

    def all(self, type_: int) -> list[Fields]:
        """What the records of a type say."""
        return [line.fields for kind, line in self.records if kind == type_]

    def first(self, type_: int) -> Fields | None:
        """What the first record of a type says, if there is one."""
        return next((line.fields for kind, line in self.records if kind == type_), None)


class Joiner:
    """Collects records until their event is whole."""

    def __init__(self) -> None:
        self._open: dict[int, Event] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, type_: int, line: Line, now: float) -> Iterator[Event]:
        """Take a record, which came at ``now`` (monotonic seconds); yields what is whole with it."""
        if type_ == _END:
            if line.serial in self._open:
                yield self._open.pop(line.serial)
            return
        event = self._open.get(line.serial)
        if event is None:
            if len(self._open) >= _MOST_OPEN:
                yield self._open.pop(next(iter(self._open)))
            event = self._open[line.serial] = Event(line.serial, line.time, now)
        if len(event.records) < _MOST_RECORDS:
            event.records.append((type_, line))

    def ripe(self, now: float, wait: float = WAIT_S) -> Iterator[Event]:
        """What has waited for its end long enough; they stand in the order in which they began."""
        while self._open and now - (event := next(iter(self._open.values()))).since >= wait:
            del self._open[event.serial]
            yield event
