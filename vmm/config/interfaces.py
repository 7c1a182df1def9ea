"""How interfaces are named, and which ones this host really has, as /sys shows them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from vmm import paths

_INTERFACE = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,14}")
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")


def interface_key(text: str) -> str:
    """One spelling for an interface: MAC addresses in lower case, kernel names as they are."""
    return text.lower() if is_mac(text) else text


def is_mac(text: str) -> bool:
    """Whether an interface is given by its MAC address."""
    return _MAC.fullmatch(text.lower()) is not None


def is_interface_name(text: str) -> bool:
    """Whether the text is safe as a kernel interface name, in files as well as in paths."""
    return _INTERFACE.fullmatch(text) is not None


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


def is_named(name: str) -> bool:
    """Whether udev is done with an interface, which it may rename until then.

    Its entry, named by the interface's index, is there just before that already, and says so: a name that was taken
    for the last one then belongs to nobody later, and the host would be without a network.
    """
    try:
        index = (paths.ROOT / "sys/class/net" / name / "ifindex").read_text().strip()
        entry = (paths.ROOT / "run/udev/data" / f"n{index}").read_text()
    except (OSError, UnicodeDecodeError):
        return False
    return "E:ID_RENAMING=1" not in entry.splitlines()


def resolve(interface: str, interfaces: Mapping[str, str]) -> str | None:
    """The kernel name of a configured interface (name or MAC address), or None if it is not there."""
    if not is_mac(interface):
        return interface if interface in interfaces else None
    key = interface_key(interface)
    return next((name for name, mac in interfaces.items() if mac == key), None)


def describe(interfaces: Mapping[str, str]) -> str:
    """The interfaces as one line for people."""
    return ", ".join(f"{name} ({mac})" for name, mac in interfaces.items()) or "none"
