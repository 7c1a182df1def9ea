"""What the screen shows, gathered from a few files; a file that is missing only leaves a gap."""

from __future__ import annotations

import hashlib
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

import vmm
from vmm import paths
from vmm.config.addresses import management_addresses
from vmm.config.types import Configuration, Failure
from vmm.core import version

T = TypeVar("T", bound=msgspec.Struct)

_MAX_FILE = 1 << 20


class Check(msgspec.Struct, frozen=True):
    """One line of the health file that core keeps."""

    name: str
    ok: bool
    detail: str = ""


class Health(msgspec.Struct, frozen=True):
    """The health file."""

    status: str
    checks: tuple[Check, ...] = ()


class Notice(msgspec.Struct, frozen=True):
    """A version that was tried and given up (vmm/update/gate.py)."""

    version: str
    reason: str


@dataclass(frozen=True)
class Facts:
    """All that the screen shows; two equal ones need no redrawing."""

    version: str
    slot: str
    configuration: Configuration | None
    failure: Failure | None
    addresses: tuple[str, ...]
    fingerprint: str
    health: Health | None
    update: Notice | None = None


def gather() -> Facts:
    """Read everything anew. Never raises for what is missing or damaged."""
    configuration = _decode(paths.APPLIED_CONFIG, Configuration)
    release = _version()
    return Facts(
        version=release.version,
        slot=release.slot,
        configuration=configuration,
        failure=_decode(paths.CONFIG_ERROR, Failure),
        addresses=management_addresses(configuration) if configuration else (),
        fingerprint=_fingerprint(paths.API_STATE / "server.crt"),
        # Core owns its folder below /run/holdfast only.
        health=_decode(paths.CORE_SOCKET.with_name("health.json"), Health),
        update=_decode(paths.UPDATE_NOTICE, Notice),
    )


def _version() -> version.Version:
    try:
        return version.read(paths.ROOT)
    except (OSError, UnicodeDecodeError):
        return version.Version(version.PRODUCT, vmm.VERSION, "", "")


def _decode(path: Path, kind: type[T]) -> T | None:
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_FILE), type=kind)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _fingerprint(path: Path) -> str:
    try:
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(path.read_text(encoding="ascii").strip())).hexdigest()
    except (OSError, ValueError):
        return ""
