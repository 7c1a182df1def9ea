"""The parser of the `holdfast` command and its entry point."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import NoReturn

import vmm
from vmm import errors
from vmm.cli import audit, completion, guard, host, identity, machines, remotes, seeds, updates, volumes
from vmm.cli.client import Unreachable
from vmm.cli.command import add_shared
from vmm.errors import UserError

UNREACHABLE_EXIT_CODE = 3

_EPILOG = """\
first steps:
  holdfast identity create                           make the certificate that hosts know you by
  holdfast seed create --hostname hf1 --management enp1s0=dhcp --admin me=~/.config/holdfast/client.crt \\
    --out hf1.json
  holdfast seed inject hf1.json holdfast.raw         put it into the installation image
  holdfast remote add hf1 https://192.0.2.10:8443    compare the fingerprint with the host's console
  holdfast vm list

exit codes: 0 success, 1 error, 2 wrong usage, 3 the host cannot be reached
"""


@functools.cache
def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="holdfast",
        description="Manage Holdfast virtualization hosts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"holdfast {vmm.VERSION}")
    add_shared(parser)
    parser.add_argument("--banner", action="store_true", help="show the host's banner even if it was shown today")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (machines, volumes, host, updates, audit, guard, remotes, identity, seeds):
        module.register(commands)
    completion.register(commands, parser)
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Raises: UserError."""
    args = build_parser().parse_args(arguments)
    try:
        return args.run(args) or 0
    except Unreachable as error:
        print(f"error: {errors.printable(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return UNREACHABLE_EXIT_CODE
    except (BrokenPipeError, UserError):
        raise
    except OSError as error:
        raise UserError(f"{error.filename or 'the system'}: {error.strerror or error}") from None


def main() -> NoReturn:
    """The entry point."""
    errors.main(run)
