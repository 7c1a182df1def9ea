"""Why an update does not go on; every refusal names the layer that refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vmm.errors import NotFound, Unavailable, UserError


class Refused(UserError):
    """A check said no. ``layer`` is the one that did ("TUF timestamp", "epoch floor", "read-back")."""

    code = "update-refused"
    status = 409

    def __init__(self, layer: str, message: str, *, hint: str = "") -> None:
        super().__init__(f"{layer}: {message}", hint=hint)
        self.layer = layer


class Missing(NotFound):
    """The repository has no such file."""


class NoRoom(Unavailable):
    """Something does not fit; found out before anything was overwritten."""

    code = "no-room"


class Cancelled(UserError):
    """The job was ended by an administrator."""

    code = "cancelled"
    status = 409

    def __init__(self) -> None:
        super().__init__("the update was cancelled")


@contextmanager
def named_errors() -> Iterator[None]:
    """An error of the operating system becomes one that names the file. Raises: Unavailable."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{error.filename or 'the disk'}: {error.strerror or error}") from error
