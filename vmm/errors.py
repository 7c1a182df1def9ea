"""The one path by which anything in Holdfast tells a person what went wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Something the user can put right; its text names the field, file or figure at fault.

    ``hint`` says what to do about it; ``code`` is the stable, machine-readable name that the
    API hands out as the ``type`` of an RFC 9457 problem, ``status`` its HTTP status.
    """

    code = "invalid"
    status = 400

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Forbidden(UserError):
    """The caller is known but the permission matrix does not allow the call."""

    code = "forbidden"
    status = 403


class NotFound(UserError):
    """The named object does not exist."""

    code = "not-found"
    status = 404


class Conflict(UserError):
    """The object exists but is in a state that does not allow the call."""

    code = "conflict"
    status = 409


class Unavailable(UserError):
    """A part of the host that the call needs (audit, KVM, space) is not there."""

    code = "unavailable"
    status = 503


def die(message: str, *, hint: str = "") -> NoReturn:
    """Stop with a message for the user.

    Raises: UserError, always; main() turns it into two lines on standard error and exit code 1.
    """
    raise UserError(message, hint=hint)


def printable(text: str) -> str:
    """Text from elsewhere for a terminal, which it then cannot steer: what does not print is escaped as in JSON.

    Line ends stay. JSON stays the same JSON.
    """
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def main(entry: Callable[[], int | None]) -> NoReturn:
    """Run a program's entry point, printing a UserError as text instead of a traceback."""
    try:
        sys.exit(entry() or 0)
    except UserError as error:
        print(f"error: {printable(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"hint: {printable(error.hint)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) went away; what it asked for was delivered.
        sys.stderr.close()
        sys.exit(0)
