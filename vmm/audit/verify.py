"""Checks an audit trail anywhere: the store's directory, a copy of it, or an export.

    python3 -m vmm.audit.verify DIRECTORY|EXPORT.jsonl [--prev HASH] [--head HASH]

A chain proves every record but its own last one and how far it went on: give ``--head`` (the hash
of the last record as known elsewhere) to detect a trail that was cut short or changed at its end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from vmm.audit.records import GENESIS, MAX_LINE, Record, digest, parse
from vmm.errors import UserError, die, main

SEGMENT_NAME = "{:020d}.log"
_SEGMENT_GLOB = "[0-9]" * 20 + ".log"


class Problem(msgspec.Struct, frozen=True):
    """The first thing wrong with a trail: the number of the record that should stand there, and why."""

    seq: int
    why: str


class Report(msgspec.Struct, frozen=True):
    """What a verification found; ``records`` counts those before the first problem."""

    records: int
    first: int
    last: int
    head: str
    problem: Problem | None = None


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
            raise ValueError(f"record {record.seq} stands where {self.seq} was expected")
        expected = GENESIS if record.seq == 1 else self.head
        if expected is not None and record.prev != expected:
            raise ValueError("its link does not fit the record before it")
        self.seq = record.seq + 1
        self.head = digest(line)
        return record


def segments(directory: Path) -> list[Path]:
    """The store's files, oldest first."""
    return sorted(directory.glob(_SEGMENT_GLOB))


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, newline included; a longer one than any record is cut, not held in memory."""
    with path.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            yield line


def verify_directory(path: Path, *, prev: str | None = None, head: str | None = None) -> Report:
    """Verify a store, or a copy of one.

    Arguments: ``prev`` is the hash of the record before the first one, for a trail whose oldest
    segments were archived; without it the trail must begin at record 1. ``head`` is the expected
    hash of the last record.
    Raises: UserError when there is nothing to read.
    """
    files = segments(path)
    if not files:
        die(f"{path} holds no audit segments")
    chain = Chain(seq=None if prev else 1, prev=prev)

    def stream() -> Iterator[bytes]:
        for file in files:
            if chain.seq is not None and file.name != SEGMENT_NAME.format(chain.seq):
                raise ValueError(f"the file {file.name} stands where {SEGMENT_NAME.format(chain.seq)} was expected")
            yield from lines(file)

    return _verify(stream(), chain, head)


def verify_file(path: Path, *, prev: str | None = None, head: str | None = None) -> Report:
    """Verify an export: one record a line, from any sequence number on.

    Arguments: as for verify_directory. Raises: UserError when the file cannot be read.
    """
    return _verify(lines(path), Chain(prev=prev), head)


def _verify(stream: Iterator[bytes], chain: Chain, head: str | None) -> Report:
    first = count = 0
    problem = None
    try:
        for line in stream:
            record = chain.follow(line)
            first = first or record.seq
            count += 1
        if head is not None and chain.head != head:
            raise ValueError("the trail does not end with the expected hash: cut short, or its last record changed")
    except ValueError as error:
        problem = Problem(chain.seq or 1, str(error))
    except OSError as error:
        die(f"{error.filename}: {error.strerror}")
    return Report(count, first, first + count - 1 if count else 0, chain.head or GENESIS, problem)


def command(arguments: list[str]) -> None:
    """The program. Raises: UserError naming the first problem."""
    import argparse  # noqa: PLC0415 - the daemon imports this module too and needs no parser

    parser = argparse.ArgumentParser(prog="python3 -m vmm.audit.verify", description="Verify an audit trail.")
    parser.add_argument("path", type=Path, help="directory of the store, or an export (JSON lines)")
    parser.add_argument("--prev", help="hash of the record before the first one")
    parser.add_argument("--head", help="expected hash of the last record")
    options = parser.parse_args(arguments)
    verify = verify_directory if options.path.is_dir() else verify_file
    report = verify(options.path, prev=options.prev, head=options.head)
    if report.problem:
        raise UserError(f"record {report.problem.seq}: {report.problem.why}")
    print(f"{report.records} records, {report.first} to {report.last}, unbroken; head {report.head}")


if __name__ == "__main__":
    main(lambda: command(sys.argv[1:]))
