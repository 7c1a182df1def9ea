"""`holdfast audit`: read, anchor, export and purge the audit trail, and verify a copy of it anywhere."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import CHECKPOINT, canonical
from vmm.audit.rule import Rule
from vmm.audit.text import line
from vmm.audit.verify import add_arguments, verified
from vmm.cli.client import Api, decoded
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import clean, confirm, human_size, print_fields, print_json
from vmm.errors import UserError

_PAGE = 1000
_POLL_S = 2.0


class _Page(msgspec.Struct, frozen=True):
    records: tuple[dict[str, Any], ...]
    next: int | None = None


class _Status(msgspec.Struct, frozen=True):
    """What is shown of the store; newer hosts may send more."""

    records: int
    first: int
    last: int
    bytes: int
    quota: int
    full: bool
    exported: int
    rule: Rule
    segments: int
    protected: int
    unprotected: str = ""


class _Purged(msgspec.Struct, frozen=True):
    first: int
    last: int
    lost: int


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "audit", "read and verify the audit trail")
    parser = add(
        verbs, "list", "print audit records; with --json one record a line, fit for `audit verify`", remotely(_list)
    )
    parser.add_argument("--after", type=int, default=0, metavar="N", help="only records with a number above N")
    parser.add_argument("--follow", action="store_true", help="wait for more until interrupted")
    add(verbs, "status", "show how much the trail holds, and what is kept", remotely(_status))
    parser = add(verbs, "purge", "delete the oldest records, for auditors only", remotely(_purge))
    parser.add_argument(
        "before", help="time (2026-11-23 or 2026-11-23T04:05:06Z) or number; segments with later records stay whole"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add(verbs, "anchor", "have the trail anchored and print the checkpoint, for `verify --known`", remotely(_anchor))
    parser = add(verbs, "export", "write records to a file that can be verified by itself", remotely(_export))
    parser.add_argument("file", type=Path, help="made, and not there yet")
    parser.add_argument("--after", type=int, default=0, metavar="N", help="only records with a number above N")
    parser.add_argument("--to", type=int, metavar="N", help="up to record N, and on to the checkpoint that covers it")
    parser = add(verbs, "verify", "check an export or a copy of the store, and say how far it is anchored", _verify)
    add_arguments(parser)


async def _status(api: Api, args: argparse.Namespace) -> None:
    raw, status = await api.get("/v1/audit/status", _Status)
    if args.json:
        print_json(raw)
        return
    rule = status.rule
    percent = 100 * status.bytes // max(status.quota, 1)
    full = "oldest records go" if rule.when_full == "overwrite" else "calls are refused"
    protected = f"{status.protected} of {status.segments - 1} sealed segments"
    print_fields(
        [
            ("Records", f"{status.records}, {status.first} to {status.last}" if status.records else "none"),
            ("Size", f"{human_size(status.bytes)} of {human_size(status.quota)} ({percent} %)"),
            ("When full", full + (" (now)" if status.full else "")),
            ("Kept for", f"{rule.keep_days} days" if rule.keep_days else "as long as there is room"),
            ("Exported", f"up to record {status.exported}" if status.exported else "nothing"),
            ("fs-verity", protected + (f": {status.unprotected}" if status.unprotected else "")),
        ]
    )


async def _purge(api: Api, args: argparse.Namespace) -> None:
    before: str | int = args.before
    if args.before.isdecimal():
        before = int(args.before)
    elif "T" not in args.before:
        before = f"{args.before}T00:00:00Z"
    question = f"{api.name} deletes its audit records from before {before}, for good. Go on?"
    if not args.yes and sys.stdin.isatty() and not confirm(question):
        raise UserError("nothing was done")
    raw = await api.request("POST", "/v1/audit/purge", body={"before": before})
    gone = decoded(raw, _Purged)
    if args.json:
        print_json(raw)
    elif gone.last:
        print(f"records {gone.first} to {gone.last} are deleted, {gone.lost} of them had not been exported")
    else:
        print("nothing is deleted: no sealed segment but the newest holds older records only")


async def _anchor(api: Api, args: argparse.Namespace) -> None:
    print_json(await api.request("POST", "/v1/audit/anchor"))


async def _export(api: Api, args: argparse.Namespace) -> None:
    checkpoint = decoded(await api.request("POST", "/v1/audit/anchor"), Checkpoint)
    to = checkpoint.covers if args.to is None else args.to
    if not args.after < to <= checkpoint.covers:
        raise UserError(f"there are no records {args.after + 1} to {to}", hint=f"the last one is {checkpoint.covers}")
    try:
        with args.file.open("xb") as file:
            try:
                first, last = await _write(api, file, args.after, to)
            except BaseException:
                # A part would verify as far as it goes, and look like the whole.
                args.file.unlink()
                raise
    except OSError as error:
        raise UserError(f"{args.file}: {error.strerror}") from None
    print(f"records {first} to {last}, anchored up to record {to} at least")


async def _write(api: Api, file: BinaryIO, after: int, to: int) -> tuple[int, int]:
    """Write the records behind ``after`` up to the first checkpoint that covers ``to``; returns the first, the last.

    The first is later than wanted where those before it were deleted.
    """
    first = 0
    while True:
        _, page = await api.get("/v1/audit", _Page, query={"after": after, "limit": _PAGE})
        for record in page.records:
            file.write(canonical(record))
            after = int(record["seq"])
            first = first or after
            if _covers(record) >= to:
                return first, after
        if not page.records:
            raise UserError(f"the trail ends with record {after}, before the checkpoint that covers record {to}")


def _covers(record: dict[str, Any]) -> int:
    if record.get("type") != CHECKPOINT or record.get("outcome") != "success":
        return 0
    return msgspec.convert(record.get("extra"), Checkpoint).covers


async def _list(api: Api, args: argparse.Namespace) -> None:
    after: int = args.after
    while True:
        _, page = await api.get("/v1/audit", _Page, query={"after": after, "limit": _PAGE})
        for record in page.records:
            if args.json:
                # The canonical form, byte for byte: keys sorted, no blanks.
                print_json(msgspec.json.encode(record, order="sorted"))
            else:
                print(clean(line(record)).replace("\n", " "), flush=True)
            after = int(record["seq"])
        if page.next is not None:
            after = page.next
        else:
            if not args.follow:
                return
            await asyncio.sleep(_POLL_S)


def _verify(args: argparse.Namespace) -> None:
    report = verified(args.path, prev=args.prev, head=args.head, known=args.known)
    if args.json:
        print_json(msgspec.json.encode(report))
    else:
        print(clean(report.text()))
