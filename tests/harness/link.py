"""The other end of the host's operational network card: a bare Ethernet cable in the test's hands."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from pathlib import Path

from tests.harness.waiting import Deadline

_LENGTH = struct.Struct(">I")


class Link:
    """Sends and receives Ethernet frames (without checksum) over QEMU's stream network socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._pending = b""

    def send(self, frame: bytes) -> None:
        """Put a frame on the wire. Raises: OSError when the machine is gone."""
        self._socket.sendall(_LENGTH.pack(len(frame)) + frame)

    def receive(self, seconds: float, *, matches: Callable[[bytes], bool] = lambda _: True) -> bytes:
        """The next frame from the host for which ``matches`` holds; others are dropped.

        Raises: Expired; ConnectionError when the machine is gone.
        """
        deadline = Deadline(seconds, "a frame on the operational network")
        while True:
            frame = self._next()
            if frame is None:
                self._socket.settimeout(deadline.left())
                try:
                    chunk = self._socket.recv(1 << 16)
                except TimeoutError:
                    raise deadline.expired() from None
                if not chunk:
                    raise ConnectionError("the machine is gone")
                self._pending += chunk
            elif matches(frame):
                return frame

    def _next(self) -> bytes | None:
        if len(self._pending) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._pending)
        end = _LENGTH.size + length
        if len(self._pending) < end:
            return None
        frame, self._pending = self._pending[_LENGTH.size : end], self._pending[end:]
        return frame

    def close(self) -> None:
        """Pull the cable."""
        self._socket.close()
