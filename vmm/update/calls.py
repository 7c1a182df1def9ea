"""What may be asked of the update daemon: each method's parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from vmm.errors import UserError
from vmm.update.environment import How
from vmm.update.records import Caller
from vmm.update.state import AskedSource
from vmm.update.types import VersionText

_T = TypeVar("_T")


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of methods that take none."""


class Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What every job takes: who asked, and whether the call lasts until its end, not only until it is on record."""

    caller: Caller = Caller()
    wait: bool = False


class Check(Parameters, frozen=True):
    """Parameters of ``check``. Without a source it is the repository, or the bundle if none is configured.

    With "stick" the bundle on the stick that is plugged in is imported first.
    """

    source: Literal["", AskedSource] = ""
    override_expiry: bool = False


class Download(Parameters, frozen=True):
    """Parameters of ``download``. Without a version it is the newest for this host."""

    version: VersionText | None = None
    retry_failed: bool = False
    override_expiry: bool = False


class Import(Parameters, frozen=True):
    """Parameters of ``import``: the bundle follows as data frames, ``length`` bytes if that is known."""

    length: Annotated[int, msgspec.Meta(ge=1)] | None = None


class Leave(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``reboot``."""

    how: How = "reboot"


class Condemn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why the health gate refuses the running version."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class History(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Parameters of ``history``: the newest ``limit`` events."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=500)] = 100


def convert(params: dict[str, Any], type_: type[_T]) -> _T:
    """Check a call's parameters. Raises: UserError naming the field."""
    try:
        return msgspec.convert(params, type_)
    except msgspec.ValidationError as error:
        raise UserError(f"update: {error}") from None
