"""A small client of QEMU's machine protocol: one command at a time, and waiting for events."""

from __future__ import annotations

import json
import select
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness.waiting import Deadline

Event = dict[str, Any]


class QmpError(Exception):
    """QEMU refused a command, or went away."""


class Happened(Exception):
    """An event came that must not have come; the text says what it means."""


class Qmp:
    """A connection to one QEMU.

    Raises: QmpError when the socket does not speak the protocol.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._pending = b""
        self._events: list[Event] = []
        self._came: Counter[str] = Counter()
        greeting = self._receive(Deadline(30, "the greeting of QEMU"))
        if "QMP" not in greeting:
            raise QmpError(f"not a QMP greeting: {greeting}")
        self.execute("qmp_capabilities")

    def _receive(self, deadline: Deadline) -> dict[str, Any]:
        while b"\n" not in self._pending:
            self._socket.settimeout(deadline.left())
            try:
                chunk = self._socket.recv(65536)
            except TimeoutError:
                raise deadline.expired() from None
            except ConnectionError:
                chunk = b""
            if not chunk:
                raise QmpError("QEMU closed the connection")
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message)
            self._came[message["event"]] += 1
        return message

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, seconds: float = 60) -> Any:
        """Run a command and return its result; events that come meanwhile are kept for wait_event.

        Raises: QmpError when QEMU refuses it; Expired.
        """
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        deadline = Deadline(seconds, f"the answer to {command}")
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise QmpError(f"QEMU is gone: {error.strerror}") from None
        while True:
            answer = self._receive(deadline)
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def human(self, line: str) -> str:
        """Run a command of the human monitor. Raises: QmpError; Expired."""
        return str(self.execute("human-monitor-command", {"command-line": line}))

    def wait_event(self, name: str, seconds: float, *, matches: Callable[[Event], bool] = lambda _: True) -> Event:
        """Take the next event of that name for which ``matches`` holds, kept or still to come.

        Other events stay kept. Raises: Expired; QmpError when QEMU goes away first.
        """
        deadline = Deadline(seconds, f"QEMU's event {name}")
        checked = 0
        while True:
            while checked < len(self._events):
                event = self._events[checked]
                if event["event"] == name and matches(event):
                    return self._events.pop(checked)
                checked += 1
            self._receive(deadline)

    def fileno(self) -> int:
        """The connection, for select(2): readable when something came."""
        return self._socket.fileno()

    def came(self, name: str) -> int:
        """How many events of that name came so far; they stay for wait_event. Raises: QmpError when QEMU went away."""
        while self._pending or select.select([self], [], [], 0)[0]:
            self._receive(Deadline(30, "the rest of what QEMU says"))
        return self._came[name]

    def close(self) -> None:
        """Close the connection; QEMU runs on."""
        self._socket.close()


class Unless:
    """Watches, beside another wait, for an event that would make that wait pointless.

    Arguments: ``name`` of the event, of which only those count that come from now on; ``meaning`` is for the error.
    """

    def __init__(self, qmp: Qmp, name: str, meaning: str) -> None:
        self._qmp = qmp
        self._name = name
        self._meaning = meaning
        self._before = qmp.came(name)

    def wait(self, connection: socket.socket, seconds: float) -> None:
        """Wait until the connection is readable, or ``seconds`` are over. Raises: Happened; QmpError."""
        deadline = time.monotonic() + seconds
        readable: list[Any] = []
        while connection not in readable and (left := deadline - time.monotonic()) > 0:
            readable = select.select([connection, self._qmp], [], [], left)[0]
            if self._qmp in readable and self._qmp.came(self._name) > self._before:
                raise Happened(self._meaning)
