"""A conversation with a serial port or another byte stream: wait for text, send text."""

from __future__ import annotations

import codecs
import re
import socket
import threading
from pathlib import Path

from tests.harness.waiting import Deadline, Expired

_KEEP_IN_MESSAGES = 600


class Closed(Exception):
    """The stream ended before the expected text came."""


class Console:
    """Reads a connected socket all the time, so that its writer never waits for a test.

    ``scale`` multiplies every deadline (see accel.Acceleration).
    """

    def __init__(self, connection: socket.socket, *, name: str, scale: float = 1.0) -> None:
        self._connection = connection
        self._name = name
        self._scale = scale
        self._buffer = ""
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name=f"read {name}", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                chunk = self._connection.recv(65536)
            except OSError:
                chunk = b""
            with self._changed:
                self._buffer += decoder.decode(chunk, final=not chunk)
                self._ended = not chunk
                self._changed.notify_all()
            if not chunk:
                return

    def expect(self, pattern: str, seconds: float = 30) -> re.Match[str]:
        """Wait for text that matches and consume everything up to its end.

        Raises: Expired after ``seconds`` (scaled); Closed when the stream ended first.
        """
        expression = re.compile(pattern)
        deadline = Deadline(seconds * self._scale, f"{self._name}: {pattern!r}")
        with self._changed:
            while True:
                if match := expression.search(self._buffer):
                    self._buffer = self._buffer[match.end() :]
                    return match
                seen = f"the last text was {self._buffer[-_KEEP_IN_MESSAGES:]!r}"
                if self._ended:
                    raise Closed(f"{self._name} ended before {pattern!r}; {seen}")
                try:
                    self._changed.wait(deadline.left())
                except Expired:
                    raise deadline.expired(seen) from None

    def pending(self) -> str:
        """Everything that came and was not consumed yet; it stays."""
        with self._changed:
            return self._buffer

    def send(self, text: str) -> None:
        """Send text as it stands. Raises: OSError when the other end is gone."""
        self._connection.sendall(text.encode())

    def run(self, command: str, prompt: str, seconds: float = 30) -> str:
        """Send a line to a shell and return what came before its next prompt (see tests.guest.linux).

        Raises: Expired, Closed; AssertionError when the prompt's exit code is not 0.
        """
        self.send(command + "\n")
        match = self.expect(rf"(?s)(.*?){prompt}", seconds)
        assert match[2] == "0", f"{self._name}: {command!r} ended with {match[2]}: {match[1]}"
        return match[1]

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
