"""Checks an audit trail anywhere: the store's directory, a copy of it, or an export.

    python3 -m vmm.audit.verify DIRECTORY|EXPORT.jsonl [--prev HASH] [--head HASH] [--known CHECKPOINT.json]
        [--after N] [--to N] [--from TIME] [--until TIME]

A chain proves every record but its own last one and how far it went on. Its checkpoints prove that, up to the last of
them, to whoever knows the anchor's key: that of a checkpoint which he had from the host himself. A part of a trail
proves that nothing is missing in it; what it was to be a part of (--after and so on) says whoever asked for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from vmm.audit.anchored import Anchors
from vmm.audit.beginning import Beginning
from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import GENESIS, MAX_LINE, Record, digest, parse
from vmm.audit.span import Span, Whole, add_span, asked
from vmm.audit.wrong import Kind, Wrong
from vmm.errors import UserError, die, main

if TYPE_CHECKING:
    import argparse

SEGMENT_NAME = "{:020d}.log"
_SEGMENT_GLOB = "[0-9]" * 20 + ".log"
_MOST_NOTES = 10
_MOST_KNOWN = 16 << 10


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
    are those of the first and the last; all of ``span`` that was not removed, if it is given, is among those covered.
    ``vouched`` is the record that says that those before the first one were removed, 0 where none does.
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
    vouched: int = 0

    def text(self) -> str:
        """A trail without problem, for people."""
        said = [f"{self.records} records, {self.first} to {self.last}, unbroken; head {self.head}"]
        if self.records:
            said.append(f"from {self.times[0]} to {self.times[1]}, nothing left out in between")
        if self.vouched:
            proven = "" if self.vouched <= self.covered else ", which is NOT anchored"
            said.append(f"those before record {self.first} were removed: record {self.vouched} says so{proven}")
        elif self.first > 1:
            said.append(f"what came before record {self.first} is not in here; hash of the last of it: {self.prev}")
        if self.span:
            left = " that were not removed" if self.vouched else ""
            said.append(f"all records {self.span.text()}{left} are in here")
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


def lines(path: Path, offset: int = 0) -> Iterator[bytes]:
    """The lines of a file from an offset on, newline included; one longer than any record is cut, not held in memory.

    Raises: OSError naming the file, also where fs-verity finds it changed.
    """
    with path.open("rb") as file:
        file.seek(offset)
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
    path: Path,
    *,
    prev: str | None = None,
    head: str | None = None,
    known: Checkpoint | None = None,
    span: Span | None = None,
) -> Report:
    """Verify a store, or a copy of one.

    Arguments: ``prev`` is the hash of the record before the first one, for a part of a trail; without it the trail
    must begin at record 1, or where ``span`` does, or say itself that what was before was removed. ``head`` is the
    expected hash of the last record. ``known`` is a checkpoint that the host is known to have made. ``span`` is what
    has to be there, anchored; one that ends may end before what is known.
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

    needed = prev is None and not (span and span.begins)
    return _verify(stream(), chain, head, known, span, Beginning(vouched=needed))


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
    return _verify(lines(path), Chain(prev=prev), head, known, span, Beginning(vouched=False))


def _verify(
    stream: Iterator[bytes],
    chain: Chain,
    head: str | None,
    known: Checkpoint | None,
    span: Span | None,
    beginning: Beginning,
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
            beginning.follow(record)
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
        if span and (missing := whole.missing(anchors.covered, removed=0 < beginning.vouched <= anchors.covered)):
            raise Wrong("truncation", f"not all records {span.text()} are in here and anchored: {missing}")
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
    return Report(
        *(count, first, last, end, problem, anchors.covered, anchors.newest, clock.notes),
        compared=known is not None,
        met=known is not None and first - 1 <= known.covers <= last,
        prev=before,
        times=times,
        span=None if problem else span,
        vouched=beginning.vouched,
    )


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


def verified(args: argparse.Namespace) -> Report:
    """Verify what the arguments ask for; see verify_directory. Raises: UserError naming the first problem."""
    path: Path = args.path
    verify = verify_directory if path.is_dir() else verify_file
    span = asked(args)
    known = read_known(args.known) if args.known else None
    report = verify(path, prev=args.prev, head=args.head, known=known, span=span if span != Span() else None)
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
