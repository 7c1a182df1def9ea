"""What daemons and systemd tell each other: their state (sd_notify(3)), open descriptors (sd_listen_fds(3))."""

from __future__ import annotations

import os
import socket

_FIRST_DESCRIPTOR = 3


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


def passed_descriptors() -> list[int]:
    """The sockets and files that the service manager opened for this process, in the order of its unit."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = int(os.environ.get("LISTEN_FDS", "0"))
    return list(range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + count))
