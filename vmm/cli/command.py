"""What every command needs: the options that all share, and a way to run against the chosen host."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from vmm.cli import settings
from vmm.cli.client import Api

# What add_subparsers() returns has no public name, and is generic for type checkers only.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Action = Callable[[Api, argparse.Namespace], Awaitable[int | None]]


def add(
    commands: Commands, name: str, help_text: str, run: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """Add a command that runs ``run`` with the parsed arguments."""
    parser = commands.add_parser(name, help=help_text, description=help_text[:1].upper() + help_text[1:] + ".")
    parser.set_defaults(run=run)
    # Taken behind the command too; suppressed defaults leave what stood before it.
    add_shared(parser, default=argparse.SUPPRESS)
    return parser


def add_shared(parser: argparse.ArgumentParser, *, default: object = None) -> None:
    """Add the options that may stand before the command as well as behind it."""
    parser.add_argument(
        "--remote", metavar="HOST", default=default, help="the host to talk to (see `holdfast remote list`)"
    )
    parser.add_argument("--json", action="store_true", default=default, help="print the API's JSON as it came")


def group(commands: Commands, name: str, help_text: str) -> Commands:
    """Add a noun, whose verbs are commands."""
    parser = commands.add_parser(name, help=help_text, description=help_text[:1].upper() + help_text[1:] + ".")
    return parser.add_subparsers(metavar="COMMAND", required=True)


def remotely(action: Action, *, banner: bool = False) -> Callable[[argparse.Namespace], int | None]:
    """Make a command of an action on the chosen host.

    The banner comes before the first authenticated request: once a day, or always with ``banner``.
    """

    async def connected(args: argparse.Namespace) -> int | None:
        name, remote = settings.find(settings.load(), args.remote)
        async with Api(name, remote) as api:
            if banner or args.banner or api.banner_is_due:
                await api.show_banner()
            return await action(api, args)

    return lambda args: asyncio.run(connected(args))
