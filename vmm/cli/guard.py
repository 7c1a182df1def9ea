"""`holdfast guard` and `holdfast access`: rules over the audit trail, and who is locked out."""

from __future__ import annotations

import argparse
from typing import Any

import msgspec

from vmm.audit.span import add_times, asked
from vmm.cli.audit import read_records
from vmm.cli.client import Api, decoded, segment
from vmm.cli.command import Commands, add, group, remotely
from vmm.cli.output import print_fields, print_json, print_table
from vmm.guard.engine import Engine, seen
from vmm.guard.rules import ACTIONS, Rule, Settings, adapted, find

_RULES = "/v1/guard/rules"
_LOCKS = "/v1/access/locks"
_LOCK_S = 300


class _Rules(msgspec.Struct, frozen=True):
    rules: tuple[Rule, ...]


class _Lock(msgspec.Struct, frozen=True):
    kind: str
    value: str
    until: str
    by: str
    reason: str


class _Locks(msgspec.Struct, frozen=True):
    locks: tuple[_Lock, ...]


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "guard", "see and set the rules by which the host acts on its audit trail")
    add(verbs, "rules", "list the rules", remotely(_list))
    add(verbs, "show", "show a rule, with its reason", remotely(_show)).add_argument("rule")
    parser = add(verbs, "set", "change a rule, from the next record on", remotely(_set))
    parser.add_argument("rule")
    switch = parser.add_mutually_exclusive_group()
    switch.add_argument("--enable", action="store_const", const=True, dest="enabled")
    switch.add_argument("--disable", action="store_const", const=False, dest="enabled")
    _add_numbers(parser)
    parser.add_argument("--action", choices=sorted({action for actions in ACTIONS.values() for action in actions}))
    parser.add_argument("--lock", type=int, dest="lock_s", metavar="SECONDS", help="how long it locks out")
    parser.add_argument("--reset", action="store_true", help="as shipped, but for what else is given")
    parser = add(verbs, "test", "have the guard report a violation that is none; nothing is done", remotely(_test))
    parser.add_argument("rule")
    parser = add(verbs, "try", "say what a rule would have pointed out in the trail; nothing is done", remotely(_try))
    parser.add_argument("rule")
    _add_numbers(parser)
    add_times(parser)
    parser.set_defaults(after=0, to=None)
    verbs = group(commands, "access", "see and change who is locked out")
    add(verbs, "locks", "list who is locked out now", remotely(_locks))
    parser = add(verbs, "lock", "lock an address or a certificate out for a while", remotely(_lock))
    _add_who(parser)
    parser.add_argument("--seconds", type=int, default=_LOCK_S, metavar="N", help=f"for how long (default: {_LOCK_S})")
    parser.add_argument("--reason", required=True, metavar="TEXT")
    _add_who(add(verbs, "unlock", "end a lockout", remotely(_unlock)))


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, metavar="N", help="how many records make a violation")
    parser.add_argument("--window", type=int, dest="window_s", metavar="SECONDS", help="within how many seconds")


def _add_who(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("source", "certificate"))
    parser.add_argument("value", help="an address, of IPv6 a network of 64 bits; or the SHA-256 of a certificate")


async def _all(api: Api) -> tuple[bytes, dict[str, Rule]]:
    raw, answer = await api.get(_RULES, _Rules)
    return raw, {rule.name: rule for rule in answer.rules}


async def _list(api: Api, args: argparse.Namespace) -> None:
    raw, rules = await _all(api)
    if args.json:
        print_json(raw)
        return
    print_table(
        ("RULE", "ENABLED", "COUNTS", "RECORDS", "ACTION", "MEANING"),
        [
            (rule.name, "yes" if rule.enabled else "NO", rule.key, _often(rule), rule.action, rule.meaning)
            for rule in rules.values()
        ],
    )


async def _show(api: Api, args: argparse.Namespace) -> None:
    _, rules = await _all(api)
    _print(find(rules, args.rule), args)


async def _set(api: Api, args: argparse.Namespace) -> None:
    body = {name: getattr(args, name) for name in Settings.__struct_fields__ if getattr(args, name) is not None}
    if args.reset:
        body["reset"] = True
    raw = await api.request("POST", f"{_RULES}/{segment(args.rule)}", body=body)
    _print(decoded(raw, Rule), args)


async def _test(api: Api, args: argparse.Namespace) -> None:
    raw = await api.request("POST", f"{_RULES}/{segment(args.rule)}/test")
    if args.json:
        print_json(raw)
    else:
        print(f"the guard reports a test of {args.rule}: see `holdfast audit list --type guard.violation --last 1`")


async def _try(api: Api, args: argparse.Namespace) -> None:
    _, rules = await _all(api)
    settings = Settings(enabled=True, count=args.count, window_s=args.window_s)
    engine = Engine([adapted(find(rules, args.rule), settings)])
    span = asked(args)
    query: dict[str, str | int] = {k: v for k, v in (("from", span.since), ("until", span.until)) if v}
    found: list[dict[str, Any]] = []
    async for record in read_records(api, query, 0, "oldest"):
        for violation in engine.take(seen(record)):
            found.append(
                {
                    "key": violation.key,
                    "count": violation.count,
                    "first": violation.first,
                    "last": violation.last,
                    "time": record["time"],
                }
            )
    if args.json:
        print_json(msgspec.json.encode(found))
        return
    print_table(
        ("TIME", "WHO", "RECORDS"),
        [(one["time"], one["key"], f"{one['count']}: {one['first']} to {one['last']}") for one in found],
    )


async def _locks(api: Api, args: argparse.Namespace) -> None:
    raw, answer = await api.get(_LOCKS, _Locks)
    if args.json:
        print_json(raw)
        return
    print_table(
        ("KIND", "WHO", "UNTIL", "BY", "REASON"),
        [(lock.kind, lock.value, lock.until, lock.by, lock.reason) for lock in answer.locks],
    )


async def _lock(api: Api, args: argparse.Namespace) -> None:
    body = {name: getattr(args, name) for name in ("kind", "value", "seconds", "reason")}
    raw = await api.request("POST", _LOCKS, body=body)
    if args.json:
        print_json(raw)
    else:
        print(f"{args.value} is locked out until {decoded(raw, _Lock).until}")


async def _unlock(api: Api, args: argparse.Namespace) -> None:
    raw = await api.request("POST", "/v1/access/unlock", body={"kind": args.kind, "value": args.value})
    if args.json:
        print_json(raw)
    else:
        print(f"{args.value} is not locked out any more")


def _often(rule: Rule) -> str:
    return f"{rule.count} in {rule.window_s} s"


def _print(rule: Rule, args: argparse.Namespace) -> None:
    if args.json:
        print_json(msgspec.json.encode(rule))
        return
    action = f"lock out for {rule.lock_s} s" if rule.action == "lock" else rule.action
    print_fields(
        [
            ("Rule", rule.name),
            ("Enabled", "yes" if rule.enabled else "no"),
            ("Points out", rule.meaning),
            ("Because", rule.why),
            ("Records", "; ".join(_match(match.type, match.outcome, match.reason) for match in rule.matches)),
            ("Count", f"{_often(rule)}, of one {rule.key}"),
            ("Action", action),
        ]
    )


def _match(type: str, outcome: str, reason: str) -> str:
    parts = (type or "any", outcome and f"outcome {outcome}", reason and f"reason {reason.strip()}…")
    return ", ".join(filter(None, parts))
