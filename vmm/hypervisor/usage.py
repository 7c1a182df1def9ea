"""What libvirt's table of statistics says of one domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vmm.hypervisor.types import Traffic, Usage

KIB = 1 << 10


def usage_of(said: Mapping[str, Any]) -> Usage:
    """What a domain uses, from libvirt's names and values; what it does not say is 0."""
    return Usage(
        cpu_ns=int(said.get("cpu.time", 0)),
        resident=int(said.get("balloon.rss", 0)) * KIB,
        disks=_traffic(said, "block", ("rd.bytes", "rd.reqs", "wr.bytes", "wr.reqs")),
        networks=_traffic(said, "net", ("rx.bytes", "rx.pkts", "tx.bytes", "tx.pkts")),
    )


def _traffic(said: Mapping[str, Any], kind: str, names: tuple[str, str, str, str]) -> tuple[Traffic, ...]:
    found = []
    for index in range(int(said.get(f"{kind}.count", 0))):
        read_bytes, read_count, written_bytes, written_count = (
            int(said.get(f"{kind}.{index}.{name}", 0)) for name in names
        )
        name = str(said.get(f"{kind}.{index}.name", index))
        found.append(Traffic(name, read_bytes, read_count, written_bytes, written_count))
    return tuple(found)
