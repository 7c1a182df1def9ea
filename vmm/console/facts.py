"""What the screen shows, gathered from a few files; a file that is missing only leaves a gap."""

from __future__ import annotations

import fcntl
import hashlib
import ipaddress
import socket
import ssl
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

import vmm
from vmm import paths
from vmm.config.interfaces import present, resolve
from vmm.config.types import Configuration, Failure
from vmm.core import version

T = TypeVar("T", bound=msgspec.Struct)

_SIOCGIFADDR = 0x8915
_LINK_SCOPE = "20"
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


def gather() -> Facts:
    """Read everything anew. Never raises for what is missing or damaged."""
    configuration = _decode(paths.APPLIED_CONFIG, Configuration)
    release = _version()
    return Facts(
        version=release.version,
        slot=release.slot,
        configuration=configuration,
        failure=_decode(paths.CONFIG_ERROR, Failure),
        addresses=_addresses(configuration),
        fingerprint=_fingerprint(paths.API_STATE / "server.crt"),
        # Core owns its folder below /run/holdfast only.
        health=_decode(paths.CORE_SOCKET.with_name("health.json"), Health),
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


def _addresses(configuration: Configuration | None) -> tuple[str, ...]:
    if configuration is None:
        return ()
    name = resolve(configuration.management.interface, present())
    return (*_ipv4(name), *_ipv6(name)) if name else ()


def _ipv4(interface: str) -> list[str]:
    # netdevice(7): the kernel answers into the struct ifreq that asked.
    request = struct.pack("16s24x", interface.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, _SIOCGIFADDR, request)
        except OSError:
            return []
    return [socket.inet_ntoa(answer[20:24])]


def _ipv6(interface: str) -> list[str]:
    """Addresses other than link-local ones, which nobody can type into a browser or a command."""
    try:
        lines = (paths.ROOT / "proc/net/if_inet6").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = [line.split() for line in lines]
    return [
        str(ipaddress.IPv6Address(bytes.fromhex(fields[0])))
        for fields in found
        if len(fields) == 6 and fields[5] == interface and fields[3] != _LINK_SCOPE
    ]
