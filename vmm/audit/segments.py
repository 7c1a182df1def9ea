"""The segments of a trail: reading them, seeing which are old, and taking the oldest away."""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from vmm.audit import files
from vmm.audit.records import Record, parse
from vmm.audit.search import Finder, Page, Query
from vmm.audit.verify import SEGMENT_NAME, lines
from vmm.errors import Unavailable

KEPT = 2
"""The newest ones, which always stay: a start verifies them, and the newest checkpoint stands in one of them."""


class Segments:
    """The files of a store. One thread adds and removes; others may read beside it.

    ``ended`` is how many bytes all but the newest have; ``unprotected`` says why some that ended are not under
    fs-verity (empty: they are, or will soon be).
    """

    def __init__(self, directory: Path, found: Sequence[Path]) -> None:
        """Arguments: ``found`` are the files that are there, oldest first."""
        self._directory = directory
        self._firsts = [int(file.stem) for file in found]
        self._protected: set[int] = set()
        self._finder = Finder()
        self.ended = sum(file.stat().st_size for file in found[:-1])
        self.unprotected = ""

    def __len__(self) -> int:
        return len(self._firsts)

    def path(self, first: int) -> Path:
        """The file that begins with a record."""
        return self._directory / SEGMENT_NAME.format(first)

    @property
    def first(self) -> int:
        """The number of the oldest record."""
        return self._firsts[0]

    @property
    def newest(self) -> int:
        """The number of the first record in the segment that is written to."""
        return self._firsts[-1]

    @property
    def protected(self) -> int:
        """How many are under fs-verity."""
        return len(self._protected.intersection(self._firsts))

    def of(self, seq: int) -> int:
        """The number of the first record in the segment that holds a record."""
        return self._firsts[max(bisect_right(self._firsts, seq) - 1, 0)]

    def begun(self, first: int, before: int) -> None:
        """Take note of a new one; the one before ended with so many bytes."""
        # Replaced, not changed: others may be reading it.
        self._firsts = [*self._firsts, first]
        self.ended += before

    def lines_from(self, seq: int) -> Iterator[bytes]:
        """The lines from a number on; every line is one record, so counting finds it."""
        firsts = self._firsts
        for first in firsts[max(bisect_right(firsts, seq) - 1, 0) :]:
            yield from islice(lines(self.path(first)), max(seq - first, 0), None)

    def search(self, query: Query, last: int) -> Page:
        """A page of the wanted records that are there, up to ``last``; not from two threads. Raises: Unavailable."""
        while True:
            firsts = self._firsts
            try:
                return self._finder.page(query, [(first, self.path(first)) for first in firsts], last)
            except FileNotFoundError as error:
                # One that was removed meanwhile, or else stolen.
                if self.first == firsts[0]:
                    raise Unavailable(f"the audit store is damaged: {error.filename} is missing") from None
            except OSError as error:
                raise Unavailable(f"the audit store failed: {error.filename}: {error.strerror}") from None

    def newest_record(self, wanted: Callable[[Record], bool], type_: str, most: int) -> Record | None:
        """The newest record of a type that is wanted, among those of the newest segments, ``most`` of them."""
        mark = f'"type":"{type_}"'.encode()
        for first in self._firsts[: -most - 1 : -1]:
            newest = None
            # One may be removed meanwhile.
            with contextlib.suppress(FileNotFoundError):
                for line in lines(self.path(first)):
                    # Searching bytes is far cheaper than decoding; the text may also stand in a record's extra.
                    if mark in line and wanted(record := parse(line)):
                        newest = record
            if newest:
                return newest
        return None

    def first_of(self, index: int) -> Record | None:
        """The first record of a segment, None if it has none yet. Raises: Unavailable where it cannot be read."""
        first = self._firsts[index]
        with self._damage(first):
            line = next(lines(self.path(first)), b"")
            return parse(line) if line else None

    def older(self, before: str | int) -> int:
        """How many of the oldest may go and have nothing but records from before a time or number.

        Raises: Unavailable naming one that cannot be read.
        """
        ended = self._firsts[:-KEPT]
        for index, first in enumerate(ended):
            if isinstance(before, int):
                older = self._firsts[index + 1] <= before
            else:
                with self._damage(first):
                    older = all(parse(line).time < before for line in files.ends(self.path(first)))
            if not older:
                return index
        return len(ended)

    def oldest(self, bytes: int) -> int:
        """How many of the oldest have so many bytes together: at least one, none if none may go."""
        ended = self._firsts[:-KEPT]
        for count, first in enumerate(ended):
            if count and bytes <= 0:
                return count
            # One that somebody took away is missed by the verifier, not here.
            with contextlib.suppress(FileNotFoundError):
                bytes -= self.path(first).stat().st_size
        return len(ended)

    def up_to(self, last: int) -> int:
        """How many of the oldest may go and begin with a record up to ``last``."""
        return bisect_right(self._firsts[:-KEPT], last)

    def unlink(self, count: int) -> None:
        """Take the oldest away; durable only once the folder is. Raises: OSError."""
        # Whoever reads begins behind them from now on.
        gone, self._firsts = self._firsts[:count], self._firsts[count:]
        for first in gone:
            path = self.path(first)
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                _unlink(path)
                self.ended -= size

    def protect(self) -> None:
        """Put all that ended under fs-verity, where there is that. It may run beside all else."""
        self.unprotected = ""
        for first in self._firsts[:-1]:
            if first in self._protected:
                continue
            try:
                files.protect(self.path(first))
            except FileNotFoundError:
                continue  # removed meanwhile
            except files.Unprotected as error:
                self.unprotected = str(error)
                if error.absent:
                    return
            else:
                self._protected.add(first)

    @contextlib.contextmanager
    def _damage(self, first: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise Unavailable(f"the audit store is damaged: {SEGMENT_NAME.format(first)}: {error}") from None


_unlink = os.unlink
"""Where the tests put a power cut."""
