"""`holdfast audit`: read the audit trail, and verify a copy of it anywhere."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

import msgspec

from vmm.audit.text import line
from vmm.audit.verify import verify_directory, verify_file
from vmm.cli.client import Api
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import clean, print_json
from vmm.errors import UserError

_PAGE = 1000
_POLL_S = 2.0


class _Page(msgspec.Struct, frozen=True):
    records: tuple[dict[str, Any], ...]
    next: int | None = None


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "audit", "read and verify the audit trail")
    parser = add(
        verbs, "list", "print audit records; with --json one record a line, fit for `audit verify`", remotely(_list)
    )
    parser.add_argument("--after", type=int, default=0, metavar="N", help="only records with a number above N")
    parser.add_argument("--follow", action="store_true", help="wait for more until interrupted")
    parser = add(verbs, "verify", "check the chain of an export or of a copy of the store", _verify)
    parser.add_argument("file", type=Path, help="export (one JSON record a line) or folder with segments")
    parser.add_argument("--prev", metavar="SHA384", help="hash of the record before the first one")
    parser.add_argument("--head", metavar="SHA384", help="expected hash of the last record")


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
    verify = verify_directory if args.file.is_dir() else verify_file
    report = verify(args.file, prev=args.prev, head=args.head)
    if report.problem is not None:
        raise UserError(
            f"record {report.problem.seq}: {report.problem.why}", hint=f"{report.records} records before it are whole"
        )
    if args.json:
        print_json(msgspec.json.encode(report))
    else:
        print(f"{report.records} records, {report.first} to {report.last}, unbroken; head {report.head}")
