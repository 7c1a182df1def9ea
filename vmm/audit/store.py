"""The audit trail on disk: append-only segments of chained records; one process writes them."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import msgspec

from vmm.audit.clock import clock
from vmm.audit.records import (
    CHECKPOINT,
    FULL,
    GENESIS,
    RECOVERED,
    START,
    STOP,
    Clock,
    Entry,
    Producer,
    Record,
    canonical,
    digest,
    parse,
)
from vmm.audit.verify import SEGMENT_NAME, Chain, lines, segments
from vmm.errors import Unavailable

SEGMENT_BYTES = 8 << 20
RESERVE_BYTES = 256 << 10
MAX_BATCH = 128
"""Entries of one append; at 32 KiB each they always fit into an empty segment."""
MAX_PAGE_BYTES = 512 << 10
"""Bytes of one page of records; a page has to fit into a frame of vmm.wire on its way to the API."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Draft(NamedTuple):
    """An entry and the process it came from."""

    entry: Entry
    producer: Producer


class Page(NamedTuple):
    """Some records as stored (without newline), and the number after which the next page starts."""

    records: list[bytes]
    next: int | None


class _Full(Exception):
    """The disk has no room for what was to be written; nothing of it remains in the trail."""


class Store:
    """The trail in a directory of its own.

    Appends must not run side by side; reads may run beside them from other threads, and only
    ever see records that are on stable storage. ``end`` is the number and hash of the last record,
    ``full`` whether appends are refused for want of room, ``recovered`` how many bytes of a line
    that was never acknowledged were cut off at opening, None if the last run ended in order, ``broken`` says why
    the store takes nothing any more until it is opened anew (empty: it does).
    """

    def __init__(
        self, directory: Path, *, producer: Producer, boot: str, clock: Callable[[], Clock] = clock
    ) -> None:
        """Open the trail: cut a torn last line, verify the newest segment as a whole.

        Arguments: ``producer`` stands in the store's own records, ``boot`` in all of them; ``clock`` says what the
        time is worth.
        Raises: Unavailable when another process writes it, or when the trail is damaged.
        """
        self._directory = directory
        self._producer = producer
        self.boot = boot
        self._clock = clock
        self.broken = ""
        self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._file = -1
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"another process writes the audit store {self._directory}") from None
        files = segments(self._directory)
        self._firsts = [int(file.stem) for file in files]
        cut = _cut_torn_line(files[-1]) if files else 0
        self.end, last = _verified_end(files)
        self.recovered = cut if cut or last not in ("", STOP) else None
        if files:
            self._file = os.open(files[-1], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._size = os.fstat(self._file).st_size
        else:
            self._start_segment()
        self.full = not self._take_reserve()

    def close(self) -> None:
        """Give up the files and the lock."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def append(self, drafts: Sequence[Draft]) -> range:
        """Store up to MAX_BATCH entries together; returns their numbers once they are durable.

        Raises: Unavailable when there is no room or the disk fails; then none of them is stored.
        The first time there is no room, an ``audit.full`` record is written from the reserve.
        """
        if self.broken:
            raise Unavailable(f"the audit store failed: {self.broken}")
        if self.full and not self._take_reserve():
            raise _no_room()
        self.full = False
        try:
            return self._write(drafts)
        except _Full:
            self.full = True
            self._release_reserve()
            entry = Entry(type=FULL, outcome="failure", reason="no space left", extra={"refused": len(drafts)})
            with contextlib.suppress(_Full):
                self._write([Draft(entry, self._producer)])
            raise _no_room() from None

    def read(self, after: int, limit: int) -> Page:
        """The stored records with numbers above ``after``, at most ``limit`` and about half a megabyte."""
        last = self.end[0]
        found: list[bytes] = []
        size = 0
        for line in self._lines_from(max(after, 0) + 1):
            if len(found) >= limit or size + len(line) > MAX_PAGE_BYTES or after + len(found) >= last:
                break
            found.append(line[:-1])
            size += len(line)
        reached = after + len(found)
        return Page(found, reached if found and reached < last else None)

    def open_intents(self) -> Iterator[Record]:
        """The intents without an outcome.

        A daemon closes what it finds and writes ``audit.start`` after that, so nothing before the
        newest ``audit.start`` can be open: only the records since then are read.
        """
        pending: dict[tuple[str, str], Record] = {}
        start = self._newest(lambda record: record.type == START, START, len(self._firsts))
        for line in self._lines_from(start.seq if start else 1):
            record = parse(line)
            if record.phase == "intent":
                pending[record.request, record.type] = record
            elif record.phase == "outcome":
                pending.pop((record.request, record.type), None)
        yield from pending.values()

    @property
    def segment(self) -> int:
        """The number of the first record in the segment that is written to."""
        return self._firsts[-1]

    def segment_of(self, seq: int) -> int:
        """The number of the first record in the segment that holds a record."""
        return self._firsts[max(bisect_right(self._firsts, seq) - 1, 0)]

    def newest_checkpoint(self) -> Record | None:
        """The newest checkpoint that has its proof. One is written soon after a segment was begun, so no more than
        two are looked at.
        """
        return self._newest(lambda r: r.type == CHECKPOINT and r.outcome == "success", CHECKPOINT, 2)

    def _newest(self, wanted: Callable[[Record], bool], type_: str, most: int) -> Record | None:
        """The newest record of a type that is wanted, among those of the newest segments, ``most`` of them."""
        mark = f'"type":"{type_}"'.encode()
        for first in self._firsts[: -most - 1 : -1]:
            newest = None
            for line in lines(self._path(first)):
                # Searching bytes is far cheaper than decoding; the text may also stand in a record's extra.
                if mark in line and wanted(record := parse(line)):
                    newest = record
            if newest:
                return newest
        return None

    def _path(self, first: int) -> Path:
        return self._directory / SEGMENT_NAME.format(first)

    def _lines_from(self, seq: int) -> Iterator[bytes]:
        """The lines from a number on; every line is one record, so counting finds it."""
        start = max(bisect_right(self._firsts, seq) - 1, 0)
        for first in self._firsts[start:]:
            yield from islice(lines(self._path(first)), max(seq - first, 0), None)

    def _write(self, drafts: Sequence[Draft]) -> range:
        time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        clock = self._clock()
        seq, head = self.end
        written = []
        for entry, producer in drafts:
            seq += 1
            line = canonical(
                Record(
                    **msgspec.structs.asdict(entry),
                    seq=seq,
                    prev=head,
                    boot=self.boot,
                    time=time,
                    clock=clock,
                    producer=producer,
                )
            )
            written.append(line)
            head = digest(line)
        data = b"".join(written)
        try:
            if self._size and self._size + len(data) > SEGMENT_BYTES:
                self._start_segment()
            self._write_out(data)
        except OSError as error:
            if error.errno in _NO_SPACE and not self.broken:
                raise _Full from None
            self.broken = self.broken or error.strerror or str(error)
            raise Unavailable(f"the audit store failed: {self.broken}") from None
        self._size += len(data)
        self.end = seq, head
        return range(seq - len(drafts) + 1, seq + 1)

    def _write_out(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[_write(self._file, rest) :]
        except OSError:
            with self._fatal():
                os.ftruncate(self._file, self._size)
            raise
        with self._fatal():
            os.fdatasync(self._file)

    def _start_segment(self) -> None:
        first = self.end[0] + 1
        new = os.open(self._path(first), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with self._fatal():
            os.fsync(self._lock)
        if self._file >= 0:
            os.fchmod(self._file, 0o400)
            os.close(self._file)
        self._file, self._size = new, 0
        self._firsts.append(first)

    @contextlib.contextmanager
    def _fatal(self) -> Iterator[None]:
        """After a failure in here nobody knows what the disk holds: only opening the store anew tells."""
        try:
            yield
        except OSError as error:
            self.broken = error.strerror or str(error)
            raise

    def _take_reserve(self) -> bool:
        """Hold back the space in which a full store can still be reported; False if there is none."""
        try:
            descriptor = os.open(self._directory / "reserve", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, RESERVE_BYTES)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise Unavailable(f"the audit store failed: {error.strerror}") from None
            self._release_reserve()
            return False
        return True

    def _release_reserve(self) -> None:
        (self._directory / "reserve").unlink(missing_ok=True)


_write = os.write
"""Where the tests put a disk that fails."""


def recovered_entry(count: int) -> Entry:
    """The record of a run that did not end in order, and how many bytes of a never acknowledged line it left."""
    reason = "incomplete last line removed" if count else "the last run did not end in order"
    return Entry(type=RECOVERED, reason=reason, extra={"bytes": count})


def interrupted_entry(intent: Record) -> Entry:
    """The outcome of an intent that nobody can finish any more."""
    return Entry(
        type=intent.type,
        phase="outcome",
        actor=intent.actor,
        object=intent.object,
        outcome="failure",
        reason="interrupted",
        request=intent.request,
        extra={"intent": intent.seq},
    )


def _no_room() -> Unavailable:
    return Unavailable("the audit store is full", hint="archive the trail and enlarge or empty the audit volume")


def _cut_torn_line(path: Path) -> int:
    """Remove what stands after the last newline; returns the number of bytes removed."""
    data = path.read_bytes()
    keep = data.rfind(b"\n") + 1
    if keep < len(data):
        with path.open("r+b") as file:
            file.truncate(keep)
            os.fsync(file.fileno())
    return len(data) - keep


def _verified_end(files: Sequence[Path]) -> tuple[tuple[int, str], str]:
    """Number, hash and type of the last record, after verifying the newest segment and its link to the one before.

    Raises: Unavailable naming the record at fault.
    """
    if not files:
        return (0, GENESIS), ""
    newest = files[-1]
    seq, prev, last = int(newest.stem), GENESIS, ""
    if seq > 1:
        before = deque(lines(files[-2]) if len(files) > 1 else (), maxlen=1)
        prev = digest(before[0]) if before else ""
    chain = Chain(seq=seq, prev=prev)
    try:
        if seq > 1:
            ended = parse(before[0]) if before else None
            if ended is None or ended.seq != seq - 1:
                raise ValueError("the segment before it is missing or ends with another number")
            last = ended.type
        for line in lines(newest):
            type_ = chain.follow(line).type
            # The last one comes behind the end of a run.
            last = last if type_ == CHECKPOINT else type_
    except ValueError as error:
        raise Unavailable(
            f"the audit store is damaged: record {chain.seq} in {newest.name}: {error}",
            hint="copy the audit volume for inspection, then replace it",
        ) from None
    return ((chain.seq or seq) - 1, chain.head or prev), last
