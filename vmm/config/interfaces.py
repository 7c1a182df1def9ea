"""The network interfaces this host really has, as /sys shows them."""

from __future__ import annotations

from collections.abc import Mapping

from vmm import paths
from vmm.config.load import interface_key, is_interface_name, is_mac


def present() -> dict[str, str]:
    """Kernel name → MAC address of every interface with a device behind it (no bridges, no loopback)."""
    found = {}
    for entry in sorted((paths.ROOT / "sys/class/net").glob("*")):
        if is_interface_name(entry.name) and (entry / "device").exists():
            try:
                found[entry.name] = (entry / "address").read_text().strip().lower()
            except OSError:
                continue
    return found


def resolve(interface: str, interfaces: Mapping[str, str]) -> str | None:
    """The kernel name of a configured interface (name or MAC address), or None if it is not there."""
    if not is_mac(interface):
        return interface if interface in interfaces else None
    key = interface_key(interface)
    return next((name for name, mac in interfaces.items() if mac == key), None)


def describe(interfaces: Mapping[str, str]) -> str:
    """The interfaces as one line for people."""
    return ", ".join(f"{name} ({mac})" for name, mac in interfaces.items()) or "none"
