"""The arguments of every method, and how a wrong one is named to the caller."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from vmm.errors import UserError
from vmm.update.types import VersionText
from vmm.volumes.types import MAX_SIZE, Format, Name, Size

T = TypeVar("T")

MAX_BUNDLE = 4 << 30
"""Bytes of an imported bundle; a release takes some 200 MB."""


class Caller(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who the API says is calling; ``fingerprint`` is of the certificate that TLS verified."""

    fingerprint: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    subject: Annotated[str, msgspec.Meta(max_length=4096)]
    origin: Annotated[str, msgspec.Meta(max_length=128)]
    request_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of every call."""

    caller: Caller
    args: dict[str, Any] = {}


class HostEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The parameters of a call that the host itself makes, as root or in core."""

    args: dict[str, Any] = {}


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments."""


class Named(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name of a machine or volume."""

    name: Name


class CreateVolume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new, empty volume; ``size`` is in bytes."""

    name: Name
    size: Size


class UploadVolume(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new volume out of an image of ``length`` bytes, which follows as data frames.

    ``size`` in bytes, when given, is that of the volume; the image's disk may be smaller.
    """

    name: Name
    format: Format
    length: Annotated[int, msgspec.Meta(ge=1, le=MAX_SIZE)]
    size: Size | None = None


class Stop(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which machine to stop, and how many seconds to give its system for it."""

    name: Name
    timeout: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 60


class CheckUpdate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where to look for a release: the configured repository; "bundle", what was imported; "stick", what is plugged in.

    ``override_expiry`` takes metadata that has expired, for hosts that have neither network nor clock.
    """

    override_expiry: bool = False
    source: Literal["", "bundle", "stick"] = ""


class DownloadUpdate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which release to download (the newest that is offered), and whether one that failed here may be it."""

    version: VersionText | None = None
    retry_failed: bool = False


class ImportUpdate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A bundle of ``length`` bytes, which follows as data frames."""

    length: Annotated[int, msgspec.Meta(ge=1, le=MAX_BUNDLE)]


class RunProbe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many seconds the probe guest gets."""

    timeout: Annotated[int, msgspec.Meta(ge=1, le=1800)] = 300


class PurgeAudit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The time (ISO 8601, with its zone) or the number before which records are to go."""

    before: Annotated[str, msgspec.Meta(max_length=40)] | Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]


def decode(value: Any, type: type[T]) -> T:
    """Make typed arguments of JSON values. Raises: UserError beginning with the path of the wrong field."""
    try:
        return msgspec.convert(value, type)
    except msgspec.ValidationError as error:
        raise UserError(_reworded(str(error))) from None


def _reworded(message: str) -> str:
    """Turn msgspec's "Expected `int`, got `str` - at `$.a[0].b`" round, so that the field comes first."""
    reason, _, path = message.partition(" - at ")
    field = path.strip("`").removeprefix("$").removeprefix(".")
    named = re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", reason, re.DOTALL)
    if named:
        field = f"{field}.{named[2]}" if field else named[2]
        reason = "is missing" if named[1].startswith("missing") else "is not a known field"
    return f"{field}: {reason}" if field else reason
