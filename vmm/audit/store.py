"""The audit trail on disk: append-only segments of chained records; one process writes them."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from vmm.audit import files, retention
from vmm.audit.clock import clock
from vmm.audit.opening import cut_torn_line, verified_end
from vmm.audit.records import CHECKPOINT, FULL, START, STOP, Clock, Entry, Producer, Record, canonical, digest, parse
from vmm.audit.retention import Cause, Removed
from vmm.audit.search import Page, Query
from vmm.audit.segments import Segments
from vmm.audit.verify import segments
from vmm.errors import Unavailable

SEGMENT_BYTES = 8 << 20
_TAIL_BYTES = 64 << 10
"""Promised to a segment beyond that, for what has to be said before the next one begins."""
_SPARE_SEGMENTS = 2
"""Above the quota, for vital records only."""
_LONGEST = datetime.timedelta(days=1)
"""What a segment covers at most where there is an age at which records go."""
RESERVE_BYTES = 256 << 10
MAX_BATCH = 128
"""Entries of one append; at 32 KiB each they always fit into an empty segment."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Draft(NamedTuple):
    """An entry and the process it came from."""

    entry: Entry
    producer: Producer


class _Full(Unavailable):
    """The disk, or the quota, has no room for what was to be written; nothing of it remains in the trail."""

    def __init__(self) -> None:
        super().__init__("the audit store is full", hint="An auditor exports the trail and purges what is old.")


class Store:
    """The trail in a directory of its own.

    Appends must not run side by side; reads may run beside them from other threads, and only
    ever see records that are on stable storage. ``end`` is the number and hash of the last record,
    ``full`` whether appends are refused for want of room, ``recovered`` how many bytes of a line
    that was never acknowledged were cut off at opening, None if the last run ended in order, ``broken`` says why
    the store takes nothing any more until it is opened anew (empty: it does). ``memory`` holds the rule for what is
    kept and how far the trail was exported.
    """

    segments: Segments

    def __init__(self, directory: Path, *, producer: Producer, boot: str, clock: Callable[[], Clock] = clock) -> None:
        """Open the trail: cut a torn last line, verify the newest segment as a whole.

        Arguments: ``producer`` stands in the store's own records, ``boot`` in all of them; ``clock`` says what the
        time is worth.
        Raises: Unavailable when another process writes it, or when the trail is damaged.
        """
        self._directory = directory
        self.producer = producer
        self.boot = boot
        self._clock = clock
        self.broken = ""
        self.memory = retention.Memory(directory)
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
        found = segments(self._directory)
        self.segments = Segments(self._directory, found)
        cut = cut_torn_line(found[-1]) if found else 0
        end = verified_end(found)
        self.end = end.seq, end.head
        self.recovered = cut if cut or end.type not in ("", STOP) else None
        self._size = 0
        if found:
            self._file = os.open(found[-1], os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._size = os.fstat(self._file).st_size
            # What is not promised may still be there when it is needed.
            with contextlib.suppress(OSError):
                files.promise(self._file, SEGMENT_BYTES + _TAIL_BYTES)
        else:
            self._start_segment()
        if end.removal:
            # A power cut may have come between the record and what it says.
            self._unlink(self.segments.up_to(end.removal.last))
        self._level = retention.level(self.used, self.quota)
        self.full = not self._take_reserve()

    def close(self) -> None:
        """Give up the files and the lock."""
        for descriptor in (self._file, self._lock):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._lock = -1

    def append(self, drafts: Sequence[Draft], *, vital: bool = False) -> range:
        """Store up to MAX_BATCH entries together; returns their numbers once they are durable.

        Where the rule says so, the oldest segments make room. ``vital`` ones also get what is spared above the quota.
        Raises: Unavailable when there is no room or the disk fails; then none of them is stored.
        The first time there is no room, an ``audit.full`` record is written.
        """
        self._check()
        if not vital:
            if self.full and not self._has_room():
                raise _Full
            self.full = False
        while True:
            try:
                return self._write(drafts, vital=vital)
            except _Full:
                if not self._make_room():
                    break
        if not self.full:
            self.full = True
            entry = Entry(type=FULL, outcome="failure", reason="no space left", extra={"refused": len(drafts)})
            with contextlib.suppress(_Full):
                self._write_own(entry)
        raise _Full

    def read(self, after: int, limit: int) -> Page:
        """The stored records with numbers above ``after``, at most ``limit``; see search()."""
        return self.search(Query(after=after, limit=limit))

    def search(self, query: Query) -> Page:
        """A page of the stored records that are wanted; not from two threads at once.

        Those that were removed are none: it begins with the oldest that is left. Raises: Unavailable.
        """
        return self.segments.search(query, self.end[0])

    def open_intents(self) -> Iterator[Record]:
        """The intents without an outcome.

        A daemon closes what it finds and writes ``audit.start`` after that, so nothing before the
        newest ``audit.start`` can be open: only the records since then are read.
        """
        pending: dict[tuple[str, str], Record] = {}
        start = self.segments.newest_record(lambda record: record.type == START, START, len(self.segments))
        for line in self.segments.lines_from(start.seq if start else 1):
            record = parse(line)
            if record.phase == "intent":
                pending[record.request, record.type] = record
            elif record.phase == "outcome":
                pending.pop((record.request, record.type), None)
        yield from pending.values()

    @property
    def used(self) -> int:
        """Bytes of all records."""
        return self.segments.ended + self._size

    @property
    def quota(self) -> int:
        """Bytes that records may take: less than their volume has, as the file system and vital records need some."""
        volume = os.statvfs(self._lock)
        room = volume.f_blocks * volume.f_frsize * 97 // 100 - _SPARE_SEGMENTS * SEGMENT_BYTES
        return self.memory.rule.quota(max(room, 4 * SEGMENT_BYTES))

    def trim(self) -> None:
        """Let go what the rule does not keep any more. Raises: Unavailable.

        Age counts only while a time server sets the clock: one that is wrong would empty the trail.
        """
        self._check()
        if (days := self.memory.rule.keep_days) and self._clock().quality == "synchronised":
            now = datetime.datetime.now(datetime.UTC)
            self._end_segment(_text(now - _LONGEST))
            count = self.segments.older(_text(now - datetime.timedelta(days=days)))
            if self.memory.rule.until_exported:
                count = min(count, self.segments.older(self.memory.exported + 1))
            if count:
                self._remove(count, "age", f"older than {days} days")
        while self.memory.rule.when_full == "overwrite" and (over := self.used - self.quota) > 0:
            if not (count := self.segments.oldest(over)):
                return
            self._remove(count, "full", "more than the store may hold")

    def purge(self, before: str | int, request: str) -> Removed | None:
        """Remove the segments all of whose records are from before a time or number; what went, None if none did.

        Arguments: ``before`` is a number, or a time as records have it; ``request`` is that of the call.
        Raises: Unavailable.
        """
        self._check()
        count = self.segments.older(before)
        return self._remove(count, "purge", "ordered by an auditor", request) if count else None

    def newest_checkpoint(self) -> Record | None:
        """The newest checkpoint that has its proof. One is written soon after a segment was begun, so no more than
        two are looked at.
        """
        return self.segments.newest_record(lambda r: r.type == CHECKPOINT and r.outcome == "success", CHECKPOINT, 2)

    def _check(self) -> None:
        """Raises: Unavailable when the store has failed."""
        if self.broken:
            raise Unavailable(f"the audit store failed: {self.broken}")

    def _make_room(self) -> bool:
        """Let the oldest segments go, if the rule says so; whether any went."""
        count = self.segments.oldest(self.used + SEGMENT_BYTES - self.quota)
        if self.memory.rule.when_full == "refuse" or not count:
            return False
        try:
            self._remove(count, "full", "the store is full")
        except _Full:
            return False
        return True

    def _remove(self, count: int, cause: Cause, why: str, request: str = "") -> Removed:
        """Remove the oldest segments, which is on record before. Raises: Unavailable."""
        behind = self.segments.first_of(count)
        assert behind is not None  # only the newest may be empty
        gone = retention.removed(self.segments.first, behind.seq - 1, behind.prev, self.memory.exported)
        self._write_own(gone.entry(cause, why, request))
        self._unlink(count)
        self._take_reserve()
        return gone

    def _unlink(self, count: int) -> None:
        try:
            with self._fatal():
                self.segments.unlink(count)
                os.fsync(self._lock)
        except OSError:
            raise Unavailable(f"the audit store failed: {self.broken}") from None

    def _end_segment(self, before: str) -> None:
        """Begin another segment if the present one began before a time, and there is room. Raises: Unavailable."""
        begun = self.segments.first_of(-1)
        if begun and begun.time < before and self._may_begin():
            try:
                self._start_segment()
            except OSError as error:
                raise Unavailable(f"the audit store failed: {error.strerror}") from None

    def _write(self, drafts: Sequence[Draft], *, vital: bool = False, here: bool = False) -> range:
        """Arguments: ``here`` keeps to the present segment, however full. Raises: Unavailable."""
        written, end = self._lines(drafts, self.end)
        quota = self.quota
        used = self.used + sum(map(len, written))
        level = retention.level(used, quota)
        if level > self._level:
            more, end = self._lines([Draft(retention.filling_entry(level, used, quota), self.producer)], end)
            written += more
        data = b"".join(written)
        try:
            if not here and self._size and self._size + len(data) > SEGMENT_BYTES:
                if not self._fits(quota + (_SPARE_SEGMENTS * SEGMENT_BYTES if vital else 0)):
                    raise _Full
                self._start_segment()
            self._write_out(data)
        except OSError as error:
            if error.errno in _NO_SPACE and not self.broken:
                raise _Full from None
            self.broken = self.broken or error.strerror or str(error)
            raise Unavailable(f"the audit store failed: {self.broken}") from None
        first = self.end[0] + 1
        self._size += len(data)
        self.end, self._level = end, level
        return range(first, first + len(drafts))

    def _write_own(self, entry: Entry) -> None:
        """Write one of the store's own records where it is, from the reserve if need be. Raises: Unavailable."""
        draft = [Draft(entry, self.producer)]
        try:
            self._write(draft, here=True)
        except _Full:
            self._release_reserve()
            self._write(draft, here=True)

    def _lines(self, drafts: Sequence[Draft], end: tuple[int, str]) -> tuple[list[bytes], tuple[int, str]]:
        """The lines of some entries behind an end of the trail, and its end then."""
        time = _text(datetime.datetime.now(datetime.UTC))
        clock = self._clock()
        seq, head = end
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
        return written, (seq, head)

    def _fits(self, most: int) -> bool:
        """Whether another segment keeps to so many bytes."""
        return self.used + SEGMENT_BYTES <= most

    def _may_begin(self) -> bool:
        """Whether another segment has room within the quota and on the disk."""
        volume = os.statvfs(self._lock)
        return self._fits(self.quota) and volume.f_bavail * volume.f_frsize > SEGMENT_BYTES + _TAIL_BYTES

    def _has_room(self) -> bool:
        """Whether a store that was full is so no more: a whole segment fits, lest it is full again at once."""
        makes_room = self.memory.rule.when_full == "overwrite" and self.segments.oldest(0) > 0
        return self._take_reserve() and (makes_room or self._may_begin())

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
        path = self.segments.path(first)
        new = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            files.promise(new, SEGMENT_BYTES + _TAIL_BYTES)
        except OSError:
            # The very first one has to be there, if only to say that there is no room.
            if self._file >= 0:
                os.close(new)
                path.unlink()
                raise
        with self._fatal():
            os.fsync(self._lock)
            if self._file >= 0:
                # What was promised and not used is given back.
                os.ftruncate(self._file, self._size)
                os.fchmod(self._file, 0o400)
                os.close(self._file)
        self.segments.begun(first, self._size)
        self._file, self._size = new, 0

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
            files.reserve(self._directory / "reserve", RESERVE_BYTES)
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


def _text(time: datetime.datetime) -> str:
    """A time (UTC) as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
