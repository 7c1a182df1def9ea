"""A conversation with a serial port or another byte stream: wait for text, send text."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path
from queue import Empty, SimpleQueue

import pexpect

from tests.harness.waiting import Deadline

_CHUNK = 1 << 16
_KEEP_IN_MESSAGES = 600


class Closed(Exception):
    """The stream ended before the expected text came."""


class Console(pexpect.spawnbase.SpawnBase):  # type: ignore[misc]
    """A pexpect conversation over a connected socket.

    A thread reads the socket all the time, so that its writer never waits for a test.
    ``scale`` multiplies every deadline (see accel.Acceleration).
    """

    def __init__(self, connection: socket.socket, *, name: str, scale: float = 1.0) -> None:
        super().__init__(maxread=_CHUNK, encoding="utf-8", codec_errors="replace")
        self.name = name
        self._scale = scale
        self._connection = connection
        self._chunks: SimpleQueue[bytes] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"read {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                chunk = self._connection.recv(_CHUNK)
            except OSError:
                chunk = b""
            self._chunks.put(chunk)
            if not chunk:
                return

    def read_nonblocking(self, size: int = 1, timeout: float | None = None) -> str:
        """What came, ``size`` bytes or a little more, waiting for the first of it; pexpect calls this.

        Raises: pexpect.TIMEOUT; pexpect.EOF.
        """
        try:
            data = chunk = self._chunks.get(timeout=timeout)
        except Empty:
            raise pexpect.TIMEOUT("nothing came") from None
        # A serial port delivers byte by byte, and pexpect searches everything anew after each call.
        while chunk and len(data) < size and not self._chunks.empty():
            chunk = self._chunks.get()
            data += chunk
        if not chunk:
            self._chunks.put(b"")  # The end is there for the next call too.
            if not data:
                raise pexpect.EOF("the stream has ended")
        return str(self._decoder.decode(data))

    def expect(self, pattern: str, seconds: float = 30) -> re.Match[str]:
        """Wait for text that matches and consume everything up to its end.

        Raises: Expired after ``seconds`` (scaled); Closed when the stream ended first.
        """
        deadline = Deadline(seconds * self._scale, f"{self.name}: {pattern!r}")
        # Compiled here, as pexpect would let a dot match line ends.
        found = self.expect_list([re.compile(pattern), pexpect.EOF, pexpect.TIMEOUT], timeout=deadline.seconds)
        if found == 0:
            match: re.Match[str] = self.match
            return match
        seen = f"the last text was {self.before[-_KEEP_IN_MESSAGES:]!r}"
        if found == 1:
            raise Closed(f"{self.name} ended before {pattern!r}; {seen}")
        raise deadline.expired(seen)

    def send(self, text: str) -> None:
        """Send text as it stands. Raises: OSError when the other end is gone."""
        self._connection.sendall(text.encode())

    def run(self, command: str, prompt: str, seconds: float = 30) -> str:
        """Send a line to a shell and return what came before its next prompt (see tests.guest.linux).

        Raises: Expired, Closed; AssertionError when the prompt's exit code is not 0.
        """
        self.send(command + "\n")
        code = self.expect(prompt, seconds)[1]
        output = str(self.before)
        assert code == "0", f"{self.name}: {command!r} ended with {code}: {output}"
        return output

    def close(self) -> None:
        """End the conversation."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other end closed it already.
        self._reader.join(5)
        self._connection.close()


def connect_console(path: Path, *, name: str, scale: float = 1.0) -> Console:
    """Connect to a Unix socket and converse there. Raises: OSError when nobody serves it."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    return Console(connection, name=name, scale=scale)
