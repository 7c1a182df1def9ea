"""Telling systemd what state a daemon is in (sd_notify(3))."""

from __future__ import annotations

import os
import socket


def notify(state: str = "READY=1") -> None:
    """Send a state to the service manager; does nothing when not started by one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        manager.connect(address)
        manager.sendall(state.encode())
