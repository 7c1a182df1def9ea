"""Checks an audit trail anywhere: the store's directory, a copy of it, or an export.

    python3 -m vmm.audit.verify DIRECTORY|EXPORT.jsonl [--prev HASH] [--head HASH] [--known CHECKPOINT.json]
        [--after N] [--to N] [--from TIME] [--until TIME]

A chain proves every record but its own last one and how far it went on. Its checkpoints prove that, up to the last of
them, to whoever knows the anchor's key: that of a checkpoint which he had from the host himself. A part of a trail
proves that nothing is missing in it; what it was to be a part of (--after and so on) says whoever asked for it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import CHECKPOINT, GENESIS, MAX_LINE, VERSION, Record, digest, parse
from vmm.audit.span import Span, Whole, add_span, asked
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
    host's. If not, somebody may have made trail, anchor and key. ``met`` says whether what the known checkpoint covers
    is one of these records, or the one before them. ``prev`` is the hash of the record before the first one, ``times``
    are those of the first and the last; all of ``span``, if it is given, is among those covered.
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
    met: bool = False
    prev: str = GENESIS
    times: tuple[str, str] = ("", "")
    span: Span | None = None

    def text(self) -> str:
        """A trail without problem, for people."""
        said = [f"{self.records} records, {self.first} to {self.last}, unbroken; head {self.head}"]
        if self.records:
            said.append(f"from {self.times[0]} to {self.times[1]}, nothing left out in between")
        if self.first > 1:
            said.append(f"what came before record {self.first} is not in here; hash of the last of it: {self.prev}")
        if self.span:
            said.append(f"all records {self.span.text()} are in here")
        if self.newest:
            proof = self.newest.proof
            by = "the TPM" if proof.anchor == "tpm" else "a SOFTWARE anchor, which whoever had the host had as well"
            said.append(f"checkpoint {proof.counter} by {by}; key {proof.fingerprint}")
            if not self.compared:
                said.append("NOT compared: nothing was given (--known) that shows whose key this is")
            elif not self.met:
                said.append("the record that is known is not in here: that shows whose key this is, and no more")
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

    def end(self, *, part: bool = False) -> None:
        """Take the end of the trail, or of a part of it that may end before what is known. Raises: Wrong."""
        if not self._known:
            return
        covers, counter = self._known.covers, self._known.proof.counter
        if self._last < covers and part:
            if self.newest and self.newest.proof.counter >= counter:
                why = f"its newest checkpoint is {self.newest.proof.counter}, and {counter} is known to cover more"
                raise Wrong("replay", why)
            return
        if self._last < covers:
            raise Wrong("truncation", f"record {covers} is known to have been there: cut short, or an older copy")
        if covers < self._first and self.newest and self.newest.proof.counter < counter:
            raise Wrong("replay", f"its newest checkpoint is {self.newest.proof.counter}, and {counter} is known")
        self.covered = max(self.covered, covers)

    def _head(self, seq: int) -> str | None:
        """The hash of a record that was seen, None if that is too long ago."""
        index = len(self._heads) - 1 - (self._last - seq)
        return self._heads[index].hex() if index >= 0 else None


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
    """The lines of a file, newline included; a longer one than any record is cut, not held in memory."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            yield line


def verify_directory(
    path: Path,
    *,
    prev: str | None = None,
    head: str | None = None,
    known: Checkpoint | None = None,
    span: Span | None = None,
) -> Report:
    """Verify a store, or a copy of one.

    Arguments: ``prev`` is the hash of the record before the first one, for a trail whose oldest
    segments were archived; without it the trail must begin at record 1. ``head`` is the expected
    hash of the last record. ``known`` is a checkpoint that the host is known to have made. ``span`` is what has to be
    there, anchored; one that ends may end before what is known.
    Raises: UserError when there is nothing to read, or ``known`` is not genuine.
    """
    files = segments(path)
    if not files:
        die(f"{path} holds no audit segments")
    chain = Chain(seq=None if prev else 1, prev=prev)

    def stream() -> Iterator[bytes]:
        for file in files:
            if chain.seq is not None and file.name != SEGMENT_NAME.format(chain.seq):
                kind: Kind = "deletion" if int(file.stem) > chain.seq else "reordering"
                raise Wrong(kind, f"the file {file.name} stands where {SEGMENT_NAME.format(chain.seq)} was expected")
            yield from lines(file)

    return _verify(stream(), chain, head, known, span)


def verify_file(
    path: Path,
    *,
    prev: str | None = None,
    head: str | None = None,
    known: Checkpoint | None = None,
    span: Span | None = None,
) -> Report:
    """Verify an export: one record a line, from any sequence number on.

    Arguments: as for verify_directory. Raises: UserError when the file cannot be read, or ``known`` is not genuine.
    """
    return _verify(lines(path), Chain(prev=prev), head, known, span)


def _verify(
    stream: Iterator[bytes], chain: Chain, head: str | None, known: Checkpoint | None, span: Span | None
) -> Report:
    try:
        anchors = Anchors(known)
    except ValueError as error:
        die(f"the checkpoint that is known is not genuine: {error}")
    clock, whole = Clock(), Whole(span or Span())
    first = count = 0
    at, end = chain.seq or 1, chain.head or GENESIS
    before, times = end, ("", "")
    problem = None
    try:
        for line in stream:
            record = chain.follow(line)
            at = record.seq
            anchors.follow(record, chain.head or GENESIS)
            clock.follow(record)
            whole.follow(record)
            if not first:
                first, before = record.seq, record.prev
            times = times[0] or record.time, record.time
            count += 1
            at, end = record.seq + 1, chain.head or GENESIS
        if head is not None and chain.head != head:
            why = "the trail does not end with the expected hash: cut short, or its last record changed"
            raise Wrong("truncation", why)
        anchors.end(part=span is not None and span.ends)
        if span and (missing := whole.missing(anchors.covered)):
            raise Wrong("truncation", f"not all records {span.text()} are in here and anchored: {missing}")
    except ValueError as error:
        kind: Kind = error.kind if isinstance(error, Wrong) else "edit"
        if kind == "deletion" and any(_number(line) == at for line in stream):
            kind = "reordering"
        problem = Problem(at, kind, str(error))
    except OSError as error:
        die(f"{error.filename}: {error.strerror}")
    last = first + count - 1 if count else 0
    return Report(
        *(count, first, last, end, problem, anchors.covered, anchors.newest, clock.notes),
        compared=known is not None,
        met=known is not None and first - 1 <= known.covers <= last,
        prev=before,
        times=times,
        span=None if problem else span,
    )


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


def verified(args: argparse.Namespace) -> Report:
    """Verify what the arguments ask for; see verify_directory. Raises: UserError naming the first problem."""
    path: Path = args.path
    verify = verify_directory if path.is_dir() else verify_file
    span = asked(args)
    known = read_known(args.known) if args.known else None
    report = verify(path, prev=args.prev, head=args.head, known=known, span=span if span != Span() else None)
    if found := report.problem:
        hint = f"{report.records} records before it are whole"
        raise UserError(f"record {found.seq}: {found.kind}: {found.why}", hint=hint)
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what verified() takes."""
    parser.add_argument("path", type=Path, help="export (one JSON record a line) or folder with segments")
    parser.add_argument("--prev", metavar="SHA384", help="hash of the record before the first one")
    parser.add_argument("--head", metavar="SHA384", help="expected hash of the last record")
    parser.add_argument("--known", type=Path, metavar="FILE", help="checkpoint that `holdfast audit anchor` printed")
    group = parser.add_argument_group("what has to be in it, as it was given to `holdfast audit export`")
    add_span(group)


def command(arguments: list[str]) -> None:
    """The program. Raises: UserError naming the first problem."""
    import argparse  # noqa: PLC0415 - the daemon imports this module too and needs no parser

    parser = argparse.ArgumentParser(prog="python3 -m vmm.audit.verify", description="Verify an audit trail.")
    add_arguments(parser)
    print(verified(parser.parse_args(arguments)).text())


if __name__ == "__main__":
    main(lambda: command(sys.argv[1:]))
