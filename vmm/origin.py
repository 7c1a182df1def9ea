"""Where a peer is: how that is written in records, and what of it counts as one source."""

from __future__ import annotations

import ipaddress

_PREFIX = 64  # what one customer of IPv6 is given at least


def names(host: str, port: int) -> tuple[str, str]:
    """What counts as one source, and how a peer is written in records. Raises: ValueError for no address."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is None:
            return str(ipaddress.ip_network((address, _PREFIX), strict=False)), f"[{address}]:{port}"
        address = address.ipv4_mapped
    return str(address), f"{address}:{port}"


def source(origin: str) -> str:
    """The source of a peer that is written as in records; "" for what is no peer of the network."""
    try:
        return names(origin.rpartition(":")[0].strip("[]"), 0)[0]
    except ValueError:
        return ""
