"""`holdfast audit`: read, follow, anchor, export and purge the audit trail, and verify a copy of it anywhere."""

from __future__ import annotations

import argparse
import hashlib
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import msgspec

from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import CHECKPOINT, Outcome, Phase, canonical
from vmm.audit.rule import Rule
from vmm.audit.span import Span, add_span, add_times, asked, moment
from vmm.audit.text import line, whole
from vmm.audit.verify import add_arguments, verified
from vmm.cli.client import Api, decoded
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import clean, confirm, fingerprint_text, human_size, print_fields, print_json, print_table
from vmm.clock import rfc3339
from vmm.errors import UserError

_PAGE = 1000
_AUDIT = "/v1/audit"
_NO_SERVERS = "the configuration names no server that the trail is sent to"
_CHOICES = ("type", "actor", "machine", "outcome", "phase", "request")

Record = dict[str, Any]
Query = Mapping[str, str | int]


class _Page(msgspec.Struct, frozen=True):
    records: tuple[Record, ...]
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


class _Server(msgspec.Struct, frozen=True):
    server: str
    name: str
    state: str
    since: int
    lag: int
    problem: str


class _Servers(msgspec.Struct, frozen=True):
    certificate: str
    problem: str
    servers: tuple[_Server, ...]


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
    parser.add_argument("--last", type=int, metavar="COUNT", help="only the last so many")
    parser.add_argument("--reverse", action="store_true", help="the newest first")
    add_times(parser)
    _add_choices(parser)
    parser.set_defaults(to=None)
    parser = add(verbs, "follow", "print audit records as they come, until interrupted", remotely(follow))
    parser.add_argument("--after", type=int, metavar="N", help="begin behind record N, not with the next that comes")
    _add_choices(parser)
    parser.set_defaults(since="", until="")
    add(verbs, "status", "show how much the trail holds, and what is kept", remotely(_status))
    parser = add(verbs, "servers", "show how far the trail was sent to its servers", remotely(_servers))
    parser.add_argument("--pem", action="store_true", help="print the certificate that they are to know the host by")
    parser = add(verbs, "purge", "delete the oldest records, for auditors only", remotely(_purge))
    parser.add_argument(
        "before", help="number, or time (UTC), as 2026-11-23 or 90d for 90 days ago; segments with later records stay"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    add(verbs, "anchor", "have the trail anchored and print the checkpoint, for `verify --known`", remotely(_anchor))
    parser = add(verbs, "export", "write records to a file that can be verified by itself", remotely(_export))
    parser.add_argument("file", type=Path, help="made, and not there yet")
    add_span(parser)
    parser = add(verbs, "verify", "check an export or a copy of the store, and say how far it is anchored", _verify)
    add_arguments(parser)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--type", help="of this type, or with a dot at its end, as machine., of all that begin so")
    parser.add_argument("--actor", help="by this name, or the SHA-256 of this certificate")
    parser.add_argument("--machine", help="about the machine of this name or UUID")
    parser.add_argument("--outcome", choices=get_args(Outcome))
    parser.add_argument("--phase", choices=get_args(Phase))
    parser.add_argument("--request", help="of the request whose identifier begins so; a line of the list ends with it")
    parser.add_argument("--full", action="store_true", help="print every field of each record")


def _query(args: argparse.Namespace, span: Span) -> dict[str, str | int]:
    chosen = {"from": span.since, "until": span.until} | {name: getattr(args, name) for name in _CHOICES}
    return {name: value for name, value in chosen.items() if value}


async def _list(api: Api, args: argparse.Namespace) -> None:
    query = _query(args, asked(args))
    if args.last is None:
        async for record in read_records(api, query, args.after, "newest" if args.reverse else "oldest"):
            _print(record, args)
        return
    last = []
    async for record in read_records(api, query, args.after, "newest", most=args.last):
        last.append(record)
    for record in last if args.reverse else reversed(last):
        _print(record, args)


async def read_records(
    api: Api, query: Query, after: int, order: Literal["oldest", "newest"], most: int | None = None
) -> AsyncIterator[Record]:
    """The wanted records page by page, which may be empty ones; at most so many."""
    place = "after" if order == "oldest" else "before"
    asked: dict[str, str | int] = {**query, "after": after, "limit": _PAGE}
    if order != "oldest":
        asked["order"] = order
    while most is None or most > 0:
        if most is not None:
            asked["limit"] = min(most, _PAGE)
        _, page = await api.get(_AUDIT, _Page, query=asked)
        for record in page.records:
            yield record
        if page.next is None:
            return
        asked[place] = page.next
        most = None if most is None else most - len(page.records)


def add_machine_follow(parser: argparse.ArgumentParser) -> None:
    """Make the parser of a command that has a machine's name one for follow()."""
    parser.add_argument("--after", type=int, metavar="N", help="begin behind record N, not with the next that comes")
    parser.add_argument("--full", action="store_true", help="print every field of each record")
    others = {name: None for name in _CHOICES if name != "machine"}
    parser.set_defaults(since="", until="", **others)


async def follow(api: Api, args: argparse.Namespace) -> None:
    """Print records as they come. Raises: UserError when that ends, with how to go on."""
    query = _query(args, Span())
    if args.after is not None:
        query["after"] = args.after
    seen = args.after
    try:
        async for raw in api.lines(f"{_AUDIT}/follow", query):
            record = decoded(raw, Record)
            _print(record, args)
            seen = record["seq"]
    except UserError as error:
        hint = f"`--after {seen}` goes on from here" if seen is not None else error.hint
        raise type(error)(error.message, hint=hint) from None


def _print(record: Record, args: argparse.Namespace) -> None:
    if args.json:
        # The canonical form, byte for byte: keys sorted, no blanks.
        print_json(canonical(record))
    else:
        print(whole(record) if args.full else line(record), flush=True)


async def _status(api: Api, args: argparse.Namespace) -> None:
    raw, status = await api.get(f"{_AUDIT}/status", _Status)
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


async def _servers(api: Api, args: argparse.Namespace) -> None:
    raw, answer = await api.get(f"{_AUDIT}/export", _Servers)
    if args.json:
        print_json(raw)
    elif args.pem:
        if not answer.certificate:
            raise UserError(f"{api.name} has no certificate for servers yet", hint=answer.problem or _NO_SERVERS)
        sys.stdout.write(clean(answer.certificate))
    elif not answer.servers:
        print(answer.problem or _NO_SERVERS)
    else:
        rows = [(s.server, s.name, s.state, rfc3339(s.since), str(s.lag), s.problem) for s in answer.servers]
        print_table(("SERVER", "NAME", "STATE", "SINCE", "LACKS", "PROBLEM"), rows)
        shown = hashlib.sha256(ssl.PEM_cert_to_DER_cert(answer.certificate.strip())).hexdigest()
        print(f"They know the host by SHA256:{fingerprint_text(shown)}")


async def _purge(api: Api, args: argparse.Namespace) -> None:
    before = int(args.before) if args.before.isdecimal() else moment(args.before)
    question = f"{api.name} deletes its audit records from before {before}, for good. Go on?"
    if not args.yes and sys.stdin.isatty() and not confirm(question):
        raise UserError("nothing was done")
    raw = await api.request("POST", f"{_AUDIT}/purge", body={"before": before})
    gone = decoded(raw, _Purged)
    if args.json:
        print_json(raw)
    elif gone.last:
        print(f"records {gone.first} to {gone.last} are deleted, {gone.lost} of them had not been exported")
    else:
        print("nothing is deleted: no sealed segment but the newest holds older records only")


async def _anchor(api: Api, args: argparse.Namespace) -> None:
    print_json(await api.request("POST", f"{_AUDIT}/anchor"))


async def _export(api: Api, args: argparse.Namespace) -> None:
    span = asked(args)
    checkpoint = decoded(await api.request("POST", f"{_AUDIT}/anchor"), Checkpoint)
    after, to = await _numbers(api, span, checkpoint.covers)
    if not after < to <= checkpoint.covers:
        raise UserError(f"there are no records {after + 1} to {to}", hint=f"the last one is {checkpoint.covers}")
    try:
        with args.file.open("xb") as file:
            try:
                first, last = await _write(api, file, after, to)
            except BaseException:
                # A part would verify as far as it goes, and look like the whole.
                args.file.unlink()
                raise
    except OSError as error:
        raise UserError(f"{args.file}: {error.strerror}") from None
    print(f"records {first} to {last}, anchored up to record {to} at least")


async def _numbers(api: Api, span: Span, covered: int) -> tuple[int, int]:
    """The records to export: above the first number, up to the second.

    Of a span of time they are one more on either side, which show that no other is of that time.
    """
    if not (span.since or span.until):
        return span.after or 0, covered if span.to is None else span.to
    if span.after is not None or span.to is not None:
        raise UserError("--from and --until do not go with --after and --to")
    query = {name: value for name, value in (("from", span.since), ("until", span.until)) if value}
    first = [record["seq"] async for record in read_records(api, query, 0, "oldest", most=1)]
    if not first:
        raise UserError(f"there are no records {span.text()}")
    after = max(first[0] - 2, 0) if span.since else 0
    if not span.until:
        return after, covered
    (last,) = [record["seq"] async for record in read_records(api, query, 0, "newest", most=1)]
    if last >= covered:
        raise UserError(f"the trail does not reach until {span.until} yet", hint="leave out --until")
    return after, last + 1


async def _write(api: Api, file: BinaryIO, after: int, to: int) -> tuple[int, int]:
    """Write the records behind ``after`` up to the first checkpoint that covers ``to``; returns the first, the last.

    The first is later than wanted where those before it were deleted.
    """
    first = 0
    async for record in read_records(api, {}, after, "oldest"):
        number = int(record["seq"])
        if first and number != after + 1:
            raise UserError(f"records {after + 1} to {number - 1} were deleted meanwhile", hint="Export once more.")
        file.write(canonical(record))
        first, after = first or number, number
        if _covers(record) >= to:
            return first, after
    raise UserError(f"the trail ends with record {after}, before the checkpoint that covers record {to}")


def _covers(record: Record) -> int:
    if record.get("type") != CHECKPOINT or record.get("outcome") != "success":
        return 0
    return msgspec.convert(record.get("extra"), Checkpoint).covers


def _verify(args: argparse.Namespace) -> None:
    report = verified(args)
    if args.json:
        print_json(msgspec.json.encode(report))
    else:
        print(clean(report.text()))
