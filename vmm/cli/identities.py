"""The part of `holdfast identity` that is about those whom a host knows."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec

from vmm.cli.client import Api, decoded, segment
from vmm.cli.command import Commands, add, remotely
from vmm.cli.output import fingerprint_text, print_fields, print_json, print_table
from vmm.config.certificates import check_certificate
from vmm.errors import UserError

_ROLES = ("admin", "auditor", "operator", "user")


class _Machine(msgspec.Struct, frozen=True):
    name: str
    uuid: str


class Known(msgspec.Struct, frozen=True):
    """What the tables show of an identity; newer hosts may send more."""

    name: str
    role: str
    source: str
    fingerprint: str
    subject: str = ""
    valid_from: str = ""
    valid_until: str = ""
    machines: tuple[_Machine, ...] | None = None
    enrolled: str = ""
    enrolled_by: str = ""
    methods: tuple[str, ...] = ()


class _Access(msgspec.Struct, frozen=True):
    roles: dict[str, tuple[str, ...]]


def register(verbs: Commands) -> None:
    """Add the commands to those of `holdfast identity`."""
    add(verbs, "list", "list those whom the host knows", remotely(_list))
    add(verbs, "whoami", "show whom the host takes you for, and what you may do", remotely(_whoami))
    parser = add(verbs, "enroll", "let in whoever has the key of a certificate", remotely(_enroll))
    parser.add_argument("name")
    parser.add_argument("certificate", type=Path, help="the certificate's file (PEM), never the key's")
    parser.add_argument("--role", choices=_ROLES, required=True)
    _add_machines(parser)
    parser = add(verbs, "change", "give an enrolled identity another role, or other machines", remotely(_change))
    parser.add_argument("name")
    parser.add_argument("--role", choices=_ROLES)
    _add_machines(parser).add_argument("--no-machines", action="store_true")
    parser = add(verbs, "revoke", "let an enrolled identity in no longer; what it has open ends", remotely(_revoke))
    parser.add_argument("name")
    add(verbs, "access", "show which role may call what", remotely(_access))


async def show(api: Api, args: argparse.Namespace) -> None:
    """Show one identity that the host knows."""
    _print(await api.request("GET", _path(args.name)), args)


def _add_machines(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--machine",
        action="append",
        metavar="NAME",
        help="a machine that a user is to have, instead of those that it has; may be repeated",
    )
    return group


async def _list(api: Api, args: argparse.Namespace) -> None:
    raw, known = await api.get("/v1/identities", tuple[Known, ...])
    if args.json:
        print_json(raw)
        return
    print_table(
        ("NAME", "ROLE", "SOURCE", "VALID UNTIL", "MACHINES"),
        [(one.name, one.role, one.source, one.valid_until, _machines(one)) for one in known],
    )


async def _whoami(api: Api, args: argparse.Namespace) -> None:
    _print(await api.request("GET", "/v1/whoami"), args)


async def _enroll(api: Api, args: argparse.Namespace) -> None:
    pem = args.certificate.read_bytes().decode("ascii", "replace").strip()
    try:
        # Here as well, so that a key which was named by mistake never leaves this computer.
        check_certificate(pem)
    except UserError as error:
        raise UserError(f"{args.certificate}: {error.message}", hint=error.hint) from None
    body = {"name": args.name, "role": args.role, "certificate": pem, "machines": args.machine or []}
    _print(await api.request("POST", "/v1/identities", body=body), args)


async def _change(api: Api, args: argparse.Namespace) -> None:
    body: dict[str, Any] = {} if args.role is None else {"role": args.role}
    if args.machine or args.no_machines:
        body["machines"] = args.machine or []
    _print(await api.request("POST", f"{_path(args.name)}/change", body=body), args)


async def _revoke(api: Api, args: argparse.Namespace) -> None:
    await api.request("DELETE", _path(args.name))
    if not args.json:
        print(f"revoked {args.name}")


async def _access(api: Api, args: argparse.Namespace) -> None:
    raw, access = await api.get("/v1/access", _Access)
    if args.json:
        print_json(raw)
        return
    methods = sorted({method for may in access.roles.values() for method in may})
    print_table(
        ("METHOD", *(role.upper() for role in access.roles)),
        [(method, *("yes" if method in may else "-" for may in access.roles.values())) for method in methods],
    )


def _path(name: str) -> str:
    return f"/v1/identities/{segment(name)}"


def _machines(one: Known) -> str:
    return "all" if one.machines is None else ", ".join(machine.name for machine in one.machines) or "none"


def _print(raw: bytes, args: argparse.Namespace) -> None:
    if args.json:
        print_json(raw)
        return
    one = decoded(raw, Known)
    print_fields(
        [
            ("Name", one.name),
            ("Role", one.role),
            ("Source", one.source + (f", {one.enrolled} by {one.enrolled_by}" if one.enrolled else "")),
            ("Subject", one.subject),
            ("Valid", f"{one.valid_from} to {one.valid_until}"),
            ("SHA-256", fingerprint_text(one.fingerprint)),
            ("Machines", _machines(one)),
            ("May call", ", ".join(one.methods) or "nothing"),
        ]
    )
