"""Turn a checked configuration into the files that systemd-networkd, nftables and timesyncd read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from vmm.config.interfaces import interface_key, is_mac, resolve
from vmm.config.load import interface_address
from vmm.config.types import AuditServer, Configuration, Export, Management

NETWORK_DIRECTORY = "run/systemd/network"
MANAGEMENT_RULES = "run/holdfast/management.nft"
EXPORT = "run/holdfast/export.json"
NAME_SERVERS = "run/holdfast/resolv.conf"
TIME_SERVERS = "run/systemd/timesyncd.conf.d/holdfast.conf"
# Stands for a management interface that is not there; the rules that admit its traffic match nothing.
NO_INTERFACE = "hf-absent"

# One transaction on the sets that /etc/nftables.conf declares.
_MANAGEMENT_RULES = """\
define management = "%s"
flush set inet holdfast management
add element inet holdfast management { $management }
"""
_SERVERS = """\
flush set inet holdfast audit_servers%s
"""
_SERVER = """\
add element inet holdfast audit_servers%s { %s . %d }
"""

Section = tuple[str, Sequence[tuple[str, str]]]
# Nothing that listens or speaks by itself.
_QUIET = (("IPv6AcceptRA", "no"), ("LLDP", "no"), ("EmitLLDP", "no"), ("LLMNR", "no"), ("MulticastDNS", "no"))


def files(config: Configuration, interfaces: Mapping[str, str]) -> dict[str, str]:
    """Every file to write, as path below the root → text.

    ``interfaces`` are the host's own (kernel name → MAC address); one that is missing is matched by
    what the configuration says, so that it works when it appears.

    Raises: ValueError if a value could break out of its line, which load.check() rules out.
    """
    found = resolve(config.management.interface, interfaces)
    result = {
        f"{NETWORK_DIRECTORY}/10-management.network": _management(config.management, interfaces),
        MANAGEMENT_RULES: _MANAGEMENT_RULES % _plain(found or NO_INTERFACE) + _servers(config.audit.export),
    }
    for network in config.operational:
        directory = f"{NETWORK_DIRECTORY}/%s-{network.bridge}%s"
        result[directory % (20, ".netdev")] = _unit(
            ("NetDev", [("Name", network.bridge), ("Kind", "bridge")]),
            # The host takes no part in what guests say: no spanning tree, no reading of their IGMP.
            ("Bridge", [("STP", "no"), ("MulticastSnooping", "no")]),
        )
        result[directory % (21, ".network")] = _unit(
            ("Match", [("Name", network.bridge)]),
            # Without ARP=no the kernel answers guests' ARP requests for the management address.
            ("Link", [("ActivationPolicy", "up"), ("ARP", "no"), ("RequiredForOnline", "no")]),
            ("Network", [("LinkLocalAddressing", "no"), ("ConfigureWithoutCarrier", "yes"), *_QUIET]),
        )
        result[directory % (22, "-port.network")] = _unit(
            ("Match", [_match(network.interface, interfaces)]),
            ("Link", [("RequiredForOnline", "no")]),
            ("Network", [("Bridge", network.bridge), ("LinkLocalAddressing", "no"), *_QUIET]),
        )
    # /etc/resolv.conf leads here; there is no resolver daemon.
    result[NAME_SERVERS] = "".join(f"nameserver {_plain(server)}\n" for server in config.management.dns)
    if config.time_servers:
        result[TIME_SERVERS] = _unit(("Time", [("NTP", " ".join(config.time_servers))]))
    if config.audit.export:
        export = Export(config.hostname, config.management.address, config.audit.export)
        result[EXPORT] = msgspec.json.format(msgspec.json.encode(export), indent=2).decode() + "\n"
    return result


def _servers(servers: Iterable[AuditServer]) -> str:
    """Whom the export may talk to."""
    rules = "".join(_SERVERS % version for version in ("4", "6"))
    return rules + "".join(_SERVER % (one.version, _plain(one.address), one.port) for one in servers)


def _management(management: Management, interfaces: Mapping[str, str]) -> str:
    dns = [("DNS", server) for server in management.dns]
    match: Section = ("Match", [_match(management.interface, interfaces)])
    if management.address == "dhcp":
        # Name and time come from the configuration, never from whoever answers DHCP first.
        lease = [("UseHostname", "no"), ("UseNTP", "no"), *([("UseDNS", "no")] if dns else [])]
        return _unit(match, ("Network", [("DHCP", "yes"), *dns, *_QUIET]), ("DHCPv4", lease))
    own = interface_address(management.address)
    network = [("Address", own.with_prefixlen)]
    if management.gateway is not None:
        network.append(("Gateway", management.gateway))
    # IPv6 cannot do without a link-local address.
    network.append(("LinkLocalAddressing", "no" if own.version == 4 else "ipv6"))
    return _unit(match, ("Network", [*network, *dns, *_QUIET]))


def _match(interface: str, interfaces: Mapping[str, str]) -> tuple[str, str]:
    # By name where possible: a bridge takes on its port's MAC address, and would match too.
    if found := resolve(interface, interfaces):
        return "Name", found
    return ("PermanentMACAddress" if is_mac(interface) else "Name"), interface_key(interface)


def _unit(*sections: Section) -> str:
    return "\n".join(
        f"[{name}]\n" + "".join(f"{key}={_plain(value)}\n" for key, value in settings) for name, settings in sections
    )


def _plain(value: str) -> str:
    """Refuse what could end a line, a quoted string or start a specifier."""
    if not value.isprintable() or any(character in '"\\%$' for character in value):
        raise ValueError(f"unsafe in a configuration file: {value!r}")
    return value
