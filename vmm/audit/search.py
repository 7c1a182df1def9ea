"""Reading the trail: which records are wanted, and finding them with bounded work for each page.

A page may be empty and name where to go on: what lies in between was looked at and is not wanted.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from vmm.audit.records import MAX_LINE, Outcome, Phase
from vmm.audit.verify import lines
from vmm.errors import Unavailable

MAX_PAGE_BYTES = 512 << 10
"""Bytes of one page of records; a page has to fit into a frame of vmm.wire on its way to the API."""
MAX_SCAN_BYTES = 8 << 20
"""Bytes after which a page begins no further segment. It ends the one it is in, whose times may have to be found
first: three times that is the most.
"""
_PLACES = 64
"""Ends of pages that are remembered, for whoever goes on from there."""

Moment = Annotated[
    str,
    msgspec.Meta(
        pattern=r"\A\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])T([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?Z\Z"
    ),
]
"""A time in UTC, as 2026-11-23T04:05:06Z."""
_WantedType = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9-]*(\.[a-z0-9-]+)*\.?\Z", max_length=64)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
_Start = Annotated[str, msgspec.Meta(min_length=8, max_length=64)]
Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Filter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, rename={"since": "from"}):
    """What a record must be to be wanted; an empty field asks nothing.

    ``since`` is the first moment and ``until`` the one that no longer counts; ``type`` is a type or, with a dot at its
    end, how types begin; ``actor`` is the id of an actor or a certificate's fingerprint; ``machine`` is the name or
    uuid of the machine that a record is about; ``request`` is how the request begins.
    """

    since: Moment = ""
    until: Moment = ""
    type: _WantedType = ""
    actor: _Name = ""
    machine: _Name = ""
    outcome: Outcome | Literal[""] = ""
    phase: Phase | Literal[""] = ""
    request: _Start = ""


class Query(Filter, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Up to ``limit`` of the wanted records with numbers above ``after`` and below ``before`` (0: no bound)."""

    after: Number = 0
    before: Number = 0
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    order: Literal["oldest", "newest"] = "oldest"


class Page(NamedTuple):
    """Some records as stored (without newline), the oldest or the newest first as asked.

    ``next`` is where the next page begins, to be given as ``after`` (``before`` with the newest first), None if there
    is none; ``reached`` is up to where records were looked at, so that who waits for new ones need not look again.
    """

    records: list[bytes]
    next: int | None
    reached: int = 0


class Finder:
    """Finds pages in the segments of a trail. From one thread at a time."""

    def __init__(self) -> None:
        self._spans: dict[int, tuple[str, str] | None] = {}
        self._places: dict[int, tuple[int, int]] = {}

    def page(self, query: Query, files: Sequence[tuple[int, Path]], last: int) -> Page:
        """The next page.

        Arguments: the segments as first number and file, oldest first; the last record that may be shown.
        Raises: Unavailable naming a record that cannot be read; OSError naming the file.
        """
        low, high = query.after + 1, min(last, query.before - 1) if query.before else last
        newest = query.order == "newest"
        search = _Search(query, newest)
        ends = [*(first - 1 for first, _ in files[1:]), last]
        pieces = [
            (first, path, max(low, first), min(high, end), end < last)
            for (first, path), end in zip(files, ends, strict=True)
            if first <= high and end >= low
        ]
        for first, path, lowest, highest, ended in reversed(pieces) if newest else pieces:
            if search.scanned >= MAX_SCAN_BYTES:
                break
            if not (ended and search.timed and self._is_outside(first, path, search)):
                self._look(search, first, path, lowest, highest)
            if search.full:
                break
            search.reached = lowest if newest else highest
        else:
            return Page(search.page, None, max(query.after, high))
        more = search.reached > pieces[0][2] if newest else search.reached < high
        return Page(search.page, search.reached if more else None, search.reached)

    def _look(self, search: _Search, first: int, path: Path, low: int, high: int) -> None:
        """Look through a segment's records from one number to another."""
        if search.newest and not search.marks and not search.timed:
            low = max(low, high + 1 - search.left)
        number, offset = first, 0
        if low - 1 in self._places and self._places[low - 1][0] == first:
            number, offset = low, self._places[low - 1][1]
        for line in lines(path, offset):
            if number > high:
                break
            search.scanned += len(line)
            if number >= low and not search.take(number, line):
                break
            offset += len(line)
            number += 1
            if search.full:
                break
        search.end_of_segment()
        if not search.newest:
            self._places[number - 1] = (first, offset)
            if len(self._places) > _PLACES:
                del self._places[next(iter(self._places))]

    def _is_outside(self, first: int, path: Path, search: _Search) -> bool:
        """Whether no time in a segment that has ended is wanted.

        What times it holds is found by reading it all, once: a clock that was set back may have put any time anywhere.
        """
        if first not in self._spans:
            self._spans[first] = _span(path)
            search.scanned += path.stat().st_size
        span = self._spans[first]
        return span is not None and not (span[0] < search.until and search.since <= span[1])


class _Search:
    """A page in the making. ``full`` says that it takes no more; ``scanned`` counts bytes."""

    def __init__(self, query: Query, newest: bool) -> None:
        self.newest = newest
        self.page: list[bytes] = []
        self.scanned = 0
        self.full = False
        self.reached = query.before if newest else query.after
        self.timed = bool(query.since or query.until)
        self.since = _padded(query.since)
        self.until = _padded(query.until) or "~"
        self.marks = _marks(query)
        self._query = query
        self._size = 0
        # Of one segment, when the newest come first: they are met in the other order.
        self._held: deque[tuple[int, bytes]] = deque()
        self._held_size = 0

    @property
    def left(self) -> int:
        """How many records still fit."""
        return self._query.limit - len(self.page)

    def take(self, number: int, line: bytes) -> bool:
        """Look at a record; whether it was, and need not be looked at again for the next page."""
        if self._is_wanted(number, line):
            if self.newest:
                self._hold(number, line)
            else:
                return self._add(number, line)
        return True

    def end_of_segment(self) -> None:
        """Take over what was held back."""
        while self._held and not self.full:
            self._add(*self._held.pop())
        self._held.clear()
        self._held_size = 0

    def _hold(self, number: int, line: bytes) -> None:
        self._held.append((number, line))
        self._held_size += len(line)
        # What fits into a page and a line more, so that the page shows to be full.
        while len(self._held) > self.left or self._held_size > MAX_PAGE_BYTES + MAX_LINE:
            self._held_size -= len(self._held.popleft()[1])

    def _add(self, number: int, line: bytes) -> bool:
        if self._size + len(line) > MAX_PAGE_BYTES:
            self.full = True
            return False
        self.page.append(line[:-1])
        self._size += len(line)
        self.reached = number
        self.full = not self.left
        return True

    def _is_wanted(self, number: int, line: bytes) -> bool:
        # Searching bytes is far cheaper than decoding, and leaves little to decode.
        if not all(mark in line for mark in self.marks):
            return False
        found = _TIME.search(line, max(len(line) - _TIME_WITHIN, 0)) if self.timed else None
        if found and not self.since <= found[1].decode() < self.until:
            return False
        try:
            record = msgspec.json.decode(line, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Unavailable(
                f"record {number} of the audit trail is damaged",
                hint=f"verify a copy of it; before={number} and after={number} read what is around it",
            ) from None
        return _fits(self._query, record) and (not self.timed or self.since <= str(record.get("time", "")) < self.until)


def _fits(query: Query, record: dict[str, Any]) -> bool:
    """Whether a record has what the marks are about where it counts: the same text may stand elsewhere in it."""
    type_, actor, thing = str(record.get("type", "")), _map(record, "actor"), _map(record, "object")
    machine = (thing.get("id"), thing.get("name")) if thing.get("kind") == "machine" else ()
    return (
        (type_.startswith(query.type) if query.type.endswith(".") else query.type in ("", type_))
        and (not query.actor or query.actor in (actor.get("id"), actor.get("certificate")))
        and (not query.machine or query.machine in machine)
        and query.outcome in ("", record.get("outcome"))
        and query.phase in ("", record.get("phase"))
        and str(record.get("request", "")).startswith(query.request)
    )


def _marks(query: Query) -> tuple[bytes, ...]:
    """What stands in the line of each record that is wanted, lines being canonical."""
    names = [msgspec.json.encode(name) for name in (query.actor, query.machine) if name]
    open_ended = query.type.endswith(".")
    texts = [
        msgspec.json.encode(text)[: -1 if is_start else None]
        for text, is_start in (
            (query.type, open_ended),
            (query.outcome, False),
            (query.phase, False),
            (query.request, True),
        )
        if text
    ]
    return (*names, *texts)


def _map(record: dict[str, Any], name: str) -> dict[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


_TIME = re.compile(rb'"time":"([0-9TZ:.-]{27})","type":"[a-z0-9.-]{1,64}","v":[0-9]{1,3}\}\n\Z')
"""The end of every line there is; a version that has more behind its time is decoded instead."""
_TIME_WITHIN = 160


def _span(path: Path) -> tuple[str, str] | None:
    """The earliest and the latest time in a segment, None if it cannot be told."""
    earliest, latest = b"~", b""
    for line in lines(path):
        found = _TIME.search(line, max(len(line) - _TIME_WITHIN, 0))
        if found is None:
            return None
        earliest, latest = min(earliest, found[1]), max(latest, found[1])
    return earliest.decode(), latest.decode()


def _padded(moment: str) -> str:
    """A moment as records have it, so that texts compare as times do."""
    if not moment:
        return ""
    whole, _, fraction = moment.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<6}Z"
