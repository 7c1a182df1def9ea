"""Checks an audit trail anywhere: the store's directory, a copy of it, or an export.

    python3 -m vmm.audit.verify DIRECTORY|EXPORT.jsonl [--prev HASH] [--head HASH] [--known CHECKPOINT.json]

A chain proves every record but its own last one and how far it went on. Its checkpoints prove that, up to the last of
them, to whoever knows the anchor's key: that of a checkpoint which he had from the host himself.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import CHECKPOINT, GENESIS, MAX_LINE, REMOVED, VERSION, Record, digest, parse
from vmm.audit.retention import Removed
from vmm.errors import UserError, die, main

if TYPE_CHECKING:
    import argparse

SEGMENT_NAME = "{:020d}.log"
_SEGMENT_GLOB = "[0-9]" * 20 + ".log"
_WINDOW = 1 << 17
"""Records that may stand between a checkpoint and what it covers; far more than can come in while it is made."""
_MOST_NOTES = 10
_MOST_KNOWN = 16 << 10

Kind = Literal["edit", "deletion", "reordering", "truncation", "substitution", "replay", "unreadable"]
"""What was done to a trail, as far as the trail shows it. An older copy looks like one that was cut short."""


class Wrong(ValueError):
    """Something in a trail that does not belong there."""

    def __init__(self, kind: Kind, why: str) -> None:
        super().__init__(why)
        self.kind: Kind = kind


class Problem(msgspec.Struct, frozen=True):
    """The first thing wrong with a trail: the number of the record that should stand there, what was done, and why."""

    seq: int
    kind: Kind
    why: str


class Report(msgspec.Struct, frozen=True):
    """What a verification found.

    ``records`` counts those before the first problem; those up to ``covered`` are anchored, by ``newest`` (0 and None
    where nothing is); ``notes`` are what is odd and may be honest; ``compared`` says whether the key is known to be the
    host's. If not, somebody may have made trail, anchor and key. ``vouched`` is the record that says that those before
    the first one were removed, 0 where none does.
    """

    records: int
    first: int
    last: int
    head: str
    problem: Problem | None = None
    covered: int = 0
    newest: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    compared: bool = False
    vouched: int = 0

    def text(self) -> str:
        """A trail without problem, for people."""
        said = [f"{self.records} records, {self.first} to {self.last}, unbroken; head {self.head}"]
        if self.vouched:
            proven = "" if self.vouched <= self.covered else ", which is NOT anchored"
            said.append(f"those before record {self.first} were removed: record {self.vouched} says so{proven}")
        if self.newest:
            proof = self.newest.proof
            by = "the TPM" if proof.anchor == "tpm" else "a SOFTWARE anchor, which whoever had the host had as well"
            said.append(f"checkpoint {proof.counter} by {by}; key {proof.fingerprint}")
            if not self.compared:
                said.append("NOT compared: nothing was given (--known) that shows whose key this is")
        if self.covered < self.last:
            first = max(self.covered + 1, self.first)
            what = f"record {self.last}" if first == self.last else f"records {first} to {self.last}"
            said.append(f"NOT anchored: {what}, which may have been changed, or have gone on")
        return "\n".join([*said, *(f"note: {note}" for note in self.notes)])


class Chain:
    """Follows a trail record by record and refuses the first one that does not belong there."""

    def __init__(self, *, seq: int | None = None, prev: str | None = None) -> None:
        """Arguments: number expected next and hash of the record before it; None accepts what comes first."""
        self.seq = seq
        self.head = prev

    def follow(self, line: bytes) -> Record:
        """Take the next line. Raises: ValueError saying what is wrong with it; the state stays as it was."""
        record = parse(line)
        if self.seq is not None and record.seq != self.seq:
            kind: Kind = "deletion" if record.seq > self.seq else "reordering"
            raise Wrong(kind, f"record {record.seq} stands where {self.seq} was expected")
        expected = GENESIS if record.seq == 1 else self.head
        if expected is not None and record.prev != expected:
            raise Wrong("edit", "its link does not fit the record before it: one of the two was changed")
        self.seq = record.seq + 1
        self.head = digest(line)
        return record


class Anchors:
    """Follows the checkpoints of a trail, given each record and its hash once the chain has taken it."""

    def __init__(self, known: Checkpoint | None) -> None:
        """Arguments: ``known`` is a checkpoint that the host made. Raises: ValueError if it is not genuine."""
        # The daemon imports this module too and needs no cryptography.
        from vmm.audit.proof import check  # noqa: PLC0415

        self._check = check
        self._known = known
        self._heads: deque[bytes] = deque(maxlen=_WINDOW)
        self._first = self._last = 0
        self.newest: Checkpoint | None = None
        self.covered = 0
        if known:
            check(known)

    def follow(self, record: Record, head: str) -> None:
        """Take the next record. Raises: Wrong."""
        if not self._heads:
            # What stood before the first one is known by its link.
            self._first = record.seq - 1
            self._see(record.seq - 1, record.prev)
        self._see(record.seq, head)
        if record.type == CHECKPOINT and record.outcome == "success":
            if record.v > VERSION:
                raise Wrong("unreadable", "a checkpoint of a later release: verify with that one")
            try:
                self._take(Checkpoint.of(record), record.seq)
            except msgspec.ValidationError as error:
                raise Wrong("edit", f"a checkpoint that is none: {error}") from None

    def _see(self, seq: int, head: str) -> None:
        self._heads.append(bytes.fromhex(head))
        self._last = seq
        if self._known and seq == self._known.covers and head != self._known.head:
            raise Wrong("substitution", f"record {seq} is not the one that is known: another trail, or one made anew")

    def _take(self, checkpoint: Checkpoint, seq: int) -> None:
        before, proof = self.newest, checkpoint.proof
        key = before or self._known
        if key and (proof.key, proof.anchor) != (key.proof.key, key.proof.anchor):
            raise Wrong("substitution", f"anchored by another key, {proof.anchor} {proof.fingerprint}")
        try:
            self._check(checkpoint)
        except ValueError as error:
            raise Wrong("edit", f"a checkpoint that is not genuine: {error}") from None
        if before and proof.counter > before.proof.counter + 1:
            gone = f"there were checkpoints between {before.proof.counter} and {proof.counter}"
            raise Wrong("replay", f"{gone}: the trail was cut back, or an older store put in its place, and continued")
        if before and proof.counter <= before.proof.counter:
            raise Wrong("replay", f"its counter, {proof.counter}, had been used before")
        if self._first <= checkpoint.covers:
            head = self._head(checkpoint.covers) if checkpoint.covers < seq else None
            if head is None:
                raise Wrong("edit", f"it covers record {checkpoint.covers}, which does not stand shortly before it")
            if head != checkpoint.head:
                raise Wrong("edit", f"record {checkpoint.covers} or one before it is not what was anchored")
        self.newest = checkpoint
        self.covered = max(self.covered, checkpoint.covers)

    def end(self) -> None:
        """Take the end of the trail. Raises: Wrong."""
        if not self._known:
            return
        covers, counter = self._known.covers, self._known.proof.counter
        if self._last < covers:
            raise Wrong("truncation", f"record {covers} is known to have been there: cut short, or an older copy")
        if covers < self._first and self.newest and self.newest.proof.counter < counter:
            raise Wrong("replay", f"its newest checkpoint is {self.newest.proof.counter}, and {counter} is known")
        self.covered = max(self.covered, covers)

    def _head(self, seq: int) -> str | None:
        """The hash of a record that was seen, None if that is too long ago."""
        index = len(self._heads) - 1 - (self._last - seq)
        return self._heads[index].hex() if index >= 0 else None


class Beginning:
    """Looks for the record that says why a trail does not begin with record 1."""

    def __init__(self, *, vouched: bool) -> None:
        """Arguments: whether somebody has to vouch for a later beginning."""
        self._needed = vouched
        self._first = 0
        self._prev = ""
        self._later = False
        self.vouched = 0

    def follow(self, record: Record) -> None:
        """Take the next record. Raises: Wrong."""
        if not self._first:
            self._first, self._prev = record.seq, record.prev
        self._later = self._later or (record.type == REMOVED and record.v > VERSION)
        removed = Removed.of(record)
        # A removal that a power cut stopped halfway left some of what it names.
        if self._first == 1 or removed is None or not removed.first <= self._first <= removed.last + 1:
            return
        if self._first == removed.last + 1 and self._prev != removed.head:
            raise Wrong("edit", f"it names another record {removed.last} than the trail begins behind")
        self.vouched = record.seq

    def end(self) -> None:
        """Take the end of the trail. Raises: Wrong."""
        if not self._needed or self._first <= 1 or self.vouched:
            return
        if self._later:
            raise Wrong("unreadable", "a later release removed what was before: verify with that one")
        raise Wrong("truncation", f"it begins with record {self._first}, and none says that those before were removed")


class Clock:
    """Notes where a record's time lies before that of the one before it."""

    def __init__(self) -> None:
        self._last = ""
        self._notes: list[str] = []
        self._more = 0

    def follow(self, record: Record) -> None:
        """Take the next record."""
        if record.time < self._last:
            if len(self._notes) < _MOST_NOTES:
                self._notes.append(f"record {record.seq}: the clock was set back from {self._last} to {record.time}")
            else:
                self._more += 1
        self._last = record.time

    @property
    def notes(self) -> tuple[str, ...]:
        """What there was, cut where it gets long."""
        return (*self._notes, *([f"the clock was set back {self._more} times more"] if self._more else []))


def segments(directory: Path) -> list[Path]:
    """The store's files, oldest first."""
    return sorted(directory.glob(_SEGMENT_GLOB))


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, newline included; a longer one than any record is cut, not held in memory.

    Raises: OSError naming the file, also where fs-verity finds it changed.
    """
    with path.open("rb") as file:
        while True:
            try:
                line = file.readline(MAX_LINE + 1)
            except OSError as error:
                error.filename = str(path)
                raise
            if not line:
                return
            yield line


def verify_directory(
    path: Path, *, prev: str | None = None, head: str | None = None, known: Checkpoint | None = None
) -> Report:
    """Verify a store, or a copy of one.

    Arguments: ``prev`` is the hash of the record before the first one, for a part of a trail; without it the trail
    must begin at record 1, or say itself that what was before was removed. ``head`` is the expected
    hash of the last record. ``known`` is a checkpoint that the host is known to have made.
    Raises: UserError when there is nothing to read, or ``known`` is not genuine.
    """
    files = segments(path)
    if not files:
        die(f"{path} holds no audit segments")
    chain = Chain(seq=int(files[0].stem), prev=prev)

    def stream() -> Iterator[bytes]:
        for file in files:
            if file.name != SEGMENT_NAME.format(chain.seq):
                kind: Kind = "deletion" if int(file.stem) > (chain.seq or 0) else "reordering"
                raise Wrong(kind, f"the file {file.name} stands where {SEGMENT_NAME.format(chain.seq)} was expected")
            yield from lines(file)

    return _verify(stream(), chain, head, known, Beginning(vouched=prev is None))


def verify_file(
    path: Path, *, prev: str | None = None, head: str | None = None, known: Checkpoint | None = None
) -> Report:
    """Verify an export: one record a line, from any sequence number on.

    Arguments: as for verify_directory. Raises: UserError when the file cannot be read, or ``known`` is not genuine.
    """
    return _verify(lines(path), Chain(prev=prev), head, known, Beginning(vouched=False))


def _verify(
    stream: Iterator[bytes], chain: Chain, head: str | None, known: Checkpoint | None, beginning: Beginning
) -> Report:
    try:
        anchors = Anchors(known)
    except ValueError as error:
        die(f"the checkpoint that is known is not genuine: {error}")
    clock = Clock()
    first = count = 0
    at, end = chain.seq or 1, chain.head or GENESIS
    problem = None
    try:
        for line in stream:
            record = chain.follow(line)
            at = record.seq
            anchors.follow(record, chain.head or GENESIS)
            beginning.follow(record)
            clock.follow(record)
            first = first or record.seq
            count += 1
            at, end = record.seq + 1, chain.head or GENESIS
        if head is not None and chain.head != head:
            why = "the trail does not end with the expected hash: cut short, or its last record changed"
            raise Wrong("truncation", why)
        anchors.end()
        at = 1
        beginning.end()
    except ValueError as error:
        kind: Kind = error.kind if isinstance(error, Wrong) else "edit"
        if kind == "deletion" and _comes_later(at, stream):
            kind = "reordering"
        problem = Problem(at, kind, str(error))
    except OSError as error:
        die(f"{error.filename}: {error.strerror}")
    last = first + count - 1 if count else 0
    compared, vouched = known is not None, beginning.vouched
    return Report(count, first, last, end, problem, anchors.covered, anchors.newest, clock.notes, compared, vouched)


def _comes_later(seq: int, stream: Iterator[bytes]) -> bool:
    """Whether a record stands further on, as far as what is left can be read."""
    try:
        return any(_number(line) == seq for line in stream)
    except ValueError:
        return False


def _number(line: bytes) -> int | None:
    try:
        return parse(line).seq
    except ValueError:
        return None


def read_known(path: Path) -> Checkpoint:
    """A checkpoint as ``holdfast audit anchor`` prints it. Raises: UserError."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MOST_KNOWN), type=Checkpoint)
    except OSError as error:
        die(f"{path}: {error.strerror}")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        die(f"{path} holds no checkpoint: {error}")


def verified(path: Path, *, prev: str | None, head: str | None, known: Path | None) -> Report:
    """Verify what a path leads to; see verify_directory. Raises: UserError naming the first problem."""
    verify = verify_directory if path.is_dir() else verify_file
    report = verify(path, prev=prev, head=head, known=read_known(known) if known else None)
    if found := report.problem:
        hint = f"{report.records} records {'before' if found.seq > report.first else 'behind'} it are whole"
        raise UserError(f"record {found.seq}: {found.kind}: {found.why}", hint=hint)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what verified() takes."""
    parser.add_argument("path", type=Path, help="export (one JSON record a line) or folder with segments")
    parser.add_argument("--prev", metavar="SHA384", help="hash of the record before the first one")
    parser.add_argument("--head", metavar="SHA384", help="expected hash of the last record")
    parser.add_argument("--known", type=Path, metavar="FILE", help="checkpoint that `holdfast audit anchor` printed")


def command(arguments: list[str]) -> None:
    """The program. Raises: UserError naming the first problem."""
    import argparse  # noqa: PLC0415 - the daemon imports this module too and needs no parser

    parser = argparse.ArgumentParser(prog="python3 -m vmm.audit.verify", description="Verify an audit trail.")
    add_arguments(parser)
    options = parser.parse_args(arguments)
    print(verified(options.path, prev=options.prev, head=options.head, known=options.known).text())


if __name__ == "__main__":
    main(lambda: command(sys.argv[1:]))
