"""The configuration document's types; what they must hold beyond their types is checked in load.py."""

from __future__ import annotations

import hashlib
import ipaddress
import ssl
from typing import Literal

import msgspec

from vmm.audit.rule import Kept, Rule

Role = Literal["admin", "auditor", "operator", "user"]


class Management(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The one interface that the host itself answers on.

    ``interface`` is a kernel name or a MAC address; ``address`` is "dhcp" or an address with its
    prefix length ("10.0.2.15/24"); ``gateway`` and ``dns`` are addresses.
    """

    interface: str
    address: str
    gateway: str | None = None
    dns: tuple[str, ...] = ()


class Operational(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network for guests: a physical interface (kernel name or MAC address) behind a bridge."""

    name: str
    interface: str

    @property
    def bridge(self) -> str:
        """The bridge's interface name (at most 11 bytes of the kernel's 15)."""
        return f"op-{self.name}"


class Administrator(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Someone who may call the API: a name, a role and the client certificate (PEM) that proves it."""

    name: str
    role: Role
    certificate: str

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate's DER form, 64 lower-case hexadecimal digits."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate.strip())).hexdigest()


class Update(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where releases come from, and whether the host takes them by itself.

    ``repository`` is the https URL of a TUF repository; ``ca`` holds the authorities (PEM) that its server must be
    certified by, instead of the image's; ``proxy`` is an http URL. Every ``interval_hours`` an ``automatic`` host
    looks for a release; it writes and restarts only within ``window``, "HH:MM-HH:MM" in UTC, and never restarts
    without one.
    """

    repository: str
    channel: str = "stable"
    ca: str | None = None
    proxy: str | None = None
    automatic: bool = False
    interval_hours: int = 6
    window: str | None = None

    @property
    def minutes(self) -> tuple[int, int] | None:
        """The window's begin and end in minutes of the day; an end before its begin is on the next day."""
        if self.window is None:
            return None
        begin, end = (int(text[:2]) * 60 + int(text[3:]) for text in self.window.split("-"))
        return begin, end


class AuditServer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A server that the audit trail is sent to, as syslog over TLS.

    ``address`` is an IPv4 or IPv6 address, as the host resolves no names; ``ca`` holds the authorities (PEM) that its
    certificate must come from, and ``name`` is whom that must name: a host name, or an address; ``address`` unless
    given.
    """

    address: str
    ca: str
    port: int = 6514
    name: str | None = None

    @property
    def identity(self) -> str:
        """Whom its certificate must name."""
        return self.name or self.address

    @property
    def endpoint(self) -> str:
        """Address and port, written together."""
        return f"[{self.address}]:{self.port}" if self.version == 6 else f"{self.address}:{self.port}"

    @property
    def version(self) -> int:
        """The version of IP that it is reached by."""
        return ipaddress.ip_address(self.address).version


class Audit(Kept, frozen=True, forbid_unknown_fields=True):
    """What is kept of the audit trail (vmm.audit.rule), and whom it is sent to."""

    export: tuple[AuditServer, ...] = ()

    @property
    def rule(self) -> Rule:
        """What the audit daemon goes by."""
        return Rule(self.when_full, self.keep_days, self.keep_mib, until_exported=bool(self.export))


class Configuration(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole document. Only load.decode() makes one that may be trusted to hold its rules."""

    version: int
    hostname: str
    banner: str
    management: Management
    operational: tuple[Operational, ...] = ()
    administrators: tuple[Administrator, ...]
    time_servers: tuple[str, ...] = ()
    update: Update | None = None
    audit: Audit = Audit()


class Export(msgspec.Struct, frozen=True):
    """What the export goes by (/run/holdfast/export.json): whom it speaks for, at which address, and to whom."""

    hostname: str
    address: str
    servers: tuple[AuditServer, ...]


class Failure(msgspec.Struct, frozen=True):
    """Why the configuration is not, or not wholly, in force (/run/holdfast/config-error.json)."""

    message: str
    source: str
    hint: str = ""
