"""Decode and check a configuration document; it is accepted or refused as a whole."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import msgspec

from vmm import paths
from vmm.config.certificates import check_anchors, check_authorities, check_certificate
from vmm.config.interfaces import interface_key, is_interface_name, is_mac
from vmm.config.types import AuditServer, Configuration, Management, Update
from vmm.errors import UserError

VERSION = 1
MAX_DOCUMENT = 64 * 1024
MAX_BANNER = 4096
MAX_OPERATIONAL = 32
MAX_ADMINISTRATORS = 256
MAX_SERVERS = 8
MAX_AUDIT_SERVERS = 4
MAX_MESSAGE = 500
MAX_URL = 1024
MAX_INTERVAL_HOURS = 168
# The kernel's limit (HOST_NAME_MAX), shorter than RFC 1123's 253.
MAX_HOSTNAME = 64

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_OPERATIONAL_NAME = re.compile(r"[a-z][a-z0-9]{0,7}")
_CHANNEL = re.compile(r"[a-z][a-z0-9-]{0,31}")
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_WINDOW = re.compile(rf"{_TIME}-{_TIME}")
# What a URL may be written with (RFC 3986), less the quotes and brackets that other formats take for their own.
_URL = re.compile(r"[A-Za-z0-9._~:/\[\]@!$&()*+,;=%?#-]+")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class ConfigurationError(UserError):
    """The document breaks a rule; the message starts with the path of the field at fault."""

    code = "configuration-invalid"

    def __init__(self, field: str, message: str, *, hint: str = "") -> None:
        # A wrong value may be as long as the document; the message goes to a console and an audit record.
        text = f"{field}: {message}" if field else message
        super().__init__(text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…", hint=hint)
        self.field = field


def decode(document: bytes) -> Configuration:
    """Decode a document and check all of its rules.

    Raises: ConfigurationError naming the field, for example
    "management.address: not an IPv4 or IPv6 interface address: '10.0.0'".
    """
    if len(document) > MAX_DOCUMENT:
        raise ConfigurationError("", f"the document is longer than {MAX_DOCUMENT} bytes")
    try:
        config = msgspec.json.decode(document, type=Configuration)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigurationError("", f"not a JSON document: {error}") from None
    check(config)
    return config


def load(path: Path) -> Configuration:
    """Read a document from a file and check it.

    Raises: ConfigurationError; UserError when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return decode(file.read(MAX_DOCUMENT + 1))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def applied() -> Configuration:
    """The configuration this host runs with. Raises: UserError when there is none."""
    return load(paths.APPLIED_CONFIG)


def encode(config: Configuration) -> bytes:
    """The document as it is stored: indented JSON with a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n"


def check(config: Configuration) -> None:
    """Check the rules that types cannot express. Raises: ConfigurationError."""
    if config.version != VERSION:
        raise ConfigurationError(
            "version", f"{config.version} is not known here", hint=f"this release reads version {VERSION}"
        )
    if len(config.hostname) > MAX_HOSTNAME or not _DOMAIN.fullmatch(config.hostname):
        raise ConfigurationError(
            "hostname", f"not a host name of at most {MAX_HOSTNAME} characters: {config.hostname!r}"
        )
    _check_banner(config.banner)
    _check_management(config.management)
    _check_operational(config)
    _check_administrators(config)
    _limit("time_servers", config.time_servers, MAX_SERVERS)
    for index, server in enumerate(config.time_servers):
        if not _is(address, server) and (len(server) > 253 or not _DOMAIN.fullmatch(server)):
            raise ConfigurationError(f"time_servers[{index}]", f"not an address or host name: {server!r}")
    if config.update is not None:
        _check_update(config.update)
    _limit("audit.export", config.audit.export, MAX_AUDIT_SERVERS)
    for index, audit_server in enumerate(config.audit.export):
        _check_audit_server(f"audit.export[{index}]", audit_server)
    _unique((f"audit.export[{index}]", one.endpoint) for index, one in enumerate(config.audit.export))


def address(text: str) -> Address:
    """Parse an address without a scope. Raises: ValueError."""
    # Python takes anything at all, newlines too, behind the % of a scope.
    if "%" in text:
        raise ValueError(text)
    return ipaddress.ip_address(text)


def interface_address(text: str) -> Interface:
    """Parse an address with its prefix length. Raises: ValueError."""
    if "%" in text or "/" not in text:
        raise ValueError(text)
    return ipaddress.ip_interface(text)


def _type_error(message: str) -> ConfigurationError:
    """Turn msgspec's wording ("... - at `$.a[1].b`") round, so that the field comes first."""
    reason, _, path = message.partition(" - at ")
    field = path.strip("`").removeprefix("$").removeprefix(".")
    if named := re.fullmatch(r"Object (missing required|contains unknown) field `(.*)`", reason, re.DOTALL):
        field = f"{field}.{named[2]}" if field else named[2]
        reason = "is missing" if named[1].startswith("missing") else "is not a known field"
    return ConfigurationError(field, reason[:1].lower() + reason[1:].replace("`", ""))


def _is(parse: Callable[[str], object], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def _limit(field: str, values: tuple[object, ...], most: int) -> None:
    if len(values) > most:
        raise ConfigurationError(field, f"{len(values)} entries are more than the {most} allowed")


def _unique(values: Iterable[tuple[str, str]]) -> None:
    """Check (field, value) pairs. Raises: ConfigurationError naming both fields of a repeated value."""
    seen: dict[str, str] = {}
    for field, value in values:
        if value in seen:
            raise ConfigurationError(field, f"{value!r} is already used by {seen[value]}")
        seen[value] = field


def _check_banner(banner: str) -> None:
    if len(banner) > MAX_BANNER:
        raise ConfigurationError("banner", f"longer than {MAX_BANNER} characters")
    for index, character in enumerate(banner):
        if not character.isprintable() and character != "\n":
            raise ConfigurationError("banner", f"character {index + 1} is not printable: {character!r}")


def _check_interface(field: str, text: str) -> None:
    if is_mac(text):
        first = int(text[:2], 16)
        if first & 1 or text == "00:00:00:00:00:00":
            raise ConfigurationError(field, f"not the MAC address of one interface: {text!r}")
    elif not is_interface_name(text) or text == "lo" or text.startswith("op-"):
        raise ConfigurationError(field, f"not an interface name or MAC address: {text!r}")


def _check_management(management: Management) -> None:
    _check_interface("management.interface", management.interface)
    _limit("management.dns", management.dns, MAX_SERVERS)
    for index, server in enumerate(management.dns):
        if not _is(address, server):
            raise ConfigurationError(f"management.dns[{index}]", f"not an IPv4 or IPv6 address: {server!r}")
    if management.address == "dhcp":
        if management.gateway is not None:
            raise ConfigurationError("management.gateway", "must be null when the address comes from DHCP")
        return
    try:
        own = interface_address(management.address)
    except ValueError:
        raise ConfigurationError(
            "management.address",
            f"not an IPv4 or IPv6 interface address: {management.address!r}",
            hint='write it with its prefix length, as in "192.0.2.10/24", or "dhcp"',
        ) from None
    if own.ip.is_loopback or own.ip.is_multicast or own.ip.is_unspecified or own.ip.is_link_local:
        raise ConfigurationError("management.address", f"not an address a host can have: {management.address!r}")
    network = own.network
    ends = (network.network_address, network.broadcast_address) if own.version == 4 else (network.network_address,)
    if network.num_addresses > 2 and own.ip in ends:
        raise ConfigurationError(
            "management.address", f"the address of a network, not of a host: {management.address!r}"
        )
    if management.gateway is not None:
        _check_gateway(management.gateway, own)


def _check_gateway(text: str, own: Interface) -> None:
    field = "management.gateway"
    if not _is(address, text):
        raise ConfigurationError(field, f"not an IPv4 or IPv6 address: {text!r}")
    gateway = address(text)
    if gateway == own.ip:
        raise ConfigurationError(field, f"{text} is the host's own address")
    # An IPv6 router is usually known by its link-local address.
    if gateway not in own.network and not (gateway.version == own.version == 6 and gateway.is_link_local):
        raise ConfigurationError(field, f"{text} is not in the network {own.network} of management.address")


def _check_operational(config: Configuration) -> None:
    _limit("operational", config.operational, MAX_OPERATIONAL)
    for index, network in enumerate(config.operational):
        if not _OPERATIONAL_NAME.fullmatch(network.name):
            raise ConfigurationError(
                f"operational[{index}].name", f"not a letter and up to 7 letters or digits (a-z, 0-9): {network.name!r}"
            )
        _check_interface(f"operational[{index}].interface", network.interface)
    _unique((f"operational[{index}].name", network.name) for index, network in enumerate(config.operational))
    _unique(
        [("management.interface", interface_key(config.management.interface))]
        + [(f"operational[{i}].interface", interface_key(n.interface)) for i, n in enumerate(config.operational)]
    )


def _check_administrators(config: Configuration) -> None:
    _limit("administrators", config.administrators, MAX_ADMINISTRATORS)
    for index, person in enumerate(config.administrators):
        if not _NAME.fullmatch(person.name):
            raise ConfigurationError(
                f"administrators[{index}].name", f"not a letter and up to 62 of a-z, 0-9 and '-': {person.name!r}"
            )
        try:
            check_certificate(person.certificate)
        except UserError as error:
            raise ConfigurationError(f"administrators[{index}].certificate", error.message, hint=error.hint) from None
    _unique((f"administrators[{index}].name", person.name) for index, person in enumerate(config.administrators))
    prints: dict[str, int] = {}
    for index, person in enumerate(config.administrators):
        if person.fingerprint in prints:
            raise ConfigurationError(
                f"administrators[{index}].certificate",
                f"the same certificate as administrators[{prints[person.fingerprint]}].certificate",
            )
        prints[person.fingerprint] = index
    if not any(person.role == "admin" for person in config.administrators):
        raise ConfigurationError("administrators", "none of them has the role admin")


def _check_audit_server(field: str, server: AuditServer) -> None:
    try:
        parsed = address(server.address)
    except ValueError:
        raise ConfigurationError(
            f"{field}.address", f"not an IPv4 or IPv6 address: {server.address!r}", hint="hosts resolve no names"
        ) from None
    # One of IPv4 in the form of IPv6 would pass the packet filter as neither.
    mapped = parsed.version == 6 and parsed.ipv4_mapped is not None
    if parsed.is_loopback or parsed.is_multicast or parsed.is_unspecified or parsed.is_link_local or mapped:
        raise ConfigurationError(f"{field}.address", f"not an address that servers can have: {server.address!r}")
    if not 1 <= server.port <= 65535:
        raise ConfigurationError(f"{field}.port", f"{server.port} is not between 1 and 65535")
    if not _is(address, server.identity) and (len(server.identity) > 253 or not _DOMAIN.fullmatch(server.identity)):
        raise ConfigurationError(f"{field}.name", f"not an address or host name: {server.name!r}")
    try:
        check_anchors(server.ca)
    except UserError as error:
        raise ConfigurationError(f"{field}.ca", error.message, hint=error.hint) from None


def _check_update(update: Update) -> None:
    repository = _url("update.repository", update.repository, "https")
    if repository.query or repository.fragment:
        raise ConfigurationError("update.repository", f"ends in a query or fragment: {update.repository!r}")
    if not _CHANNEL.fullmatch(update.channel):
        raise ConfigurationError("update.channel", f"not a letter and up to 31 of a-z, 0-9 and '-': {update.channel!r}")
    if update.ca is not None:
        try:
            check_authorities(update.ca)
        except UserError as error:
            raise ConfigurationError("update.ca", error.message, hint=error.hint) from None
    if update.proxy is not None:
        proxy = _url("update.proxy", update.proxy, "http")
        if proxy.path not in {"", "/"} or proxy.query or proxy.fragment:
            raise ConfigurationError("update.proxy", f"more than scheme, host and port: {update.proxy!r}")
    if not 1 <= update.interval_hours <= MAX_INTERVAL_HOURS:
        raise ConfigurationError(
            "update.interval_hours", f"{update.interval_hours} is not between 1 and {MAX_INTERVAL_HOURS}"
        )
    if update.window is not None:
        _check_window(update.window)


def _check_window(window: str) -> None:
    if not _WINDOW.fullmatch(window):
        raise ConfigurationError(
            "update.window", f"not two times of a day: {window!r}", hint='write it in UTC, as in "01:30-04:00"'
        )
    begin, end = window.split("-")
    if begin == end:
        raise ConfigurationError("update.window", f"begins and ends at {begin}")


def _url(field: str, text: str, scheme: str) -> SplitResult:
    """The parts of a URL. Raises: ConfigurationError unless it is one of this scheme with a host and no password."""
    problem = ConfigurationError(field, f"not an {scheme} URL: {text!r}", hint=f"write it as {scheme}://HOST[:PORT]/…")
    if len(text) > MAX_URL or not _URL.fullmatch(text):
        raise problem
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise problem from None
    if parts.scheme != scheme or port == 0 or not (_is(address, host) or _DOMAIN.fullmatch(host)):
        raise problem
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError(field, "holds a user or password; the configuration is no place for secrets")
    return parts
