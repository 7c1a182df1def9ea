"""Which addresses the management interface really has, as the kernel tells."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

from vmm import paths
from vmm.config.interfaces import present, resolve
from vmm.config.types import Configuration

_SIOCGIFADDR = 0x8915
_LINK_SCOPE = "20"


def management_addresses(configuration: Configuration) -> tuple[str, ...]:
    """The addresses others can reach it by: none while the interface is missing or not configured."""
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
