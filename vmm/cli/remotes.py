"""`holdfast remote`: which hosts there are, and the certificate that each must show."""

from __future__ import annotations

import argparse
import asyncio
import sys

from vmm.cli import settings
from vmm.cli.client import Api, normal_fingerprint, normal_url, server_fingerprint
from vmm.cli.command import Commands, add, group
from vmm.cli.output import confirm, fingerprint_text, print_table
from vmm.errors import UserError


def register(commands: Commands) -> None:
    """Add the commands to the parser."""
    verbs = group(commands, "remote", "manage the hosts this command talks to")
    parser = add(verbs, "add", "remember a host and pin the certificate of its API", _add)
    parser.add_argument("name", help="what to call it here")
    parser.add_argument("url", help="https://ADDRESS[:8443]")
    parser.add_argument(
        "--fingerprint", metavar="SHA256", help="of the server's certificate, as the host's console shows it"
    )
    parser.add_argument("--default", action="store_true", help="use it when no --remote is given")
    add(verbs, "list", "list the hosts", _list)
    parser = add(verbs, "remove", "forget a host", _remove)
    parser.add_argument("name")
    parser = add(verbs, "default", "choose the host to use when no --remote is given", _default)
    parser.add_argument("name")


def _add(args: argparse.Namespace) -> None:
    url = normal_url(args.url)
    expected = normal_fingerprint(args.fingerprint) if args.fingerprint else None
    asyncio.run(_pin(args.name, url, expected, args.default))


async def _pin(name: str, url: str, expected: str | None, default: bool) -> None:
    shown = await server_fingerprint(url)
    if expected is None:
        print(f"{url} shows a certificate with the SHA-256 fingerprint\n  {fingerprint_text(shown)}", file=sys.stderr)
        if not sys.stdin.isatty():
            raise UserError(
                "there is no terminal to ask on", hint="give the fingerprint from the host's console with --fingerprint"
            )
        if not confirm("Does the host's console show the same?"):
            raise UserError("the host was not added")
    elif shown != expected:
        raise UserError(
            f"{url} shows a certificate with another fingerprint: {fingerprint_text(shown)}",
            hint="look at the host's console; if it shows what you gave, somebody stands between you and the host",
        )
    remote = settings.Remote(url, shown)
    settings.save(settings.with_remote(settings.load(), name, remote, default=default))
    async with Api(name, remote) as api:
        await api.show_banner()
    print(f"added {name}")


def _list(_: argparse.Namespace) -> None:
    remotes = settings.load()
    print_table(
        ("NAME", "URL", "DEFAULT", "FINGERPRINT"),
        [
            (name, remote.url, "yes" if name == remotes.default else "", remote.fingerprint)
            for name, remote in sorted(remotes.remotes.items())
        ],
    )


def _remove(args: argparse.Namespace) -> None:
    settings.save(settings.without_remote(settings.load(), args.name))


def _default(args: argparse.Namespace) -> None:
    remotes = settings.load()
    name, remote = settings.find(remotes, args.name)
    settings.save(settings.with_remote(remotes, name, remote, default=True))
