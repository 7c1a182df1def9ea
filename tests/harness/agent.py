"""Command execution on the host under test, over the virtio serial port that guest_agent.py serves."""

from __future__ import annotations

import base64
import json
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.qmp import Unless
from tests.harness.seed import credential
from tests.harness.waiting import Deadline

PORT_NAME = "holdfast.test"
SOURCE = Path(__file__).with_name("guest_agent.py")
_UNIT = f"""\
[Unit]
Description=Test agent
DefaultDependencies=no
Wants=dev-virtio\\x2dports-{PORT_NAME}.device
After=dev-virtio\\x2dports-{PORT_NAME}.device

[Service]
Type=exec
ExecStart=/usr/bin/python3 -B -I %d/agent.py
LoadCredential=agent.py:holdfast-test-agent.py
Restart=on-failure
OOMScoreAdjust=-1000
"""


def agent_credentials() -> list[str]:
    """SMBIOS strings that define the agent; the test extension's command line imports and starts it."""
    return [
        credential("systemd.extra-unit.test-agent.service", _UNIT.encode()),
        credential("holdfast-test-agent.py", SOURCE.read_bytes()),
    ]


class AgentError(Exception):
    """A command on the host under test failed; the text holds its output."""


@dataclass(frozen=True)
class Done:
    """A command that has ended: exit code (-1: its time was up), standard output, standard error."""

    rc: int
    out: str
    err: str


class Agent:
    """A connection to the agent; requests run one after another. ``scale`` multiplies deadlines."""

    def __init__(self, path: Path, *, scale: float = 1.0) -> None:
        self._scale = scale
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        # An earlier connection may have died in the middle of a line.
        self._socket.sendall(b"\n")
        self._pending = b""

    def _call(
        self, operation: str, seconds: float, unless: Unless | None = None, **parameters: Any
    ) -> tuple[int, bytes, bytes]:
        identifier = uuid.uuid4().hex
        request = {"id": identifier, "op": operation, **parameters}
        deadline = Deadline(seconds * self._scale, f"the agent's answer to {operation}")
        self._socket.settimeout(deadline.left())
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            while b"\n" not in self._pending:
                if unless is not None:
                    unless.wait(self._socket, deadline.left())
                self._socket.settimeout(deadline.left())
                try:
                    chunk = self._socket.recv(1 << 16)
                except TimeoutError:
                    raise deadline.expired() from None
                except ConnectionError:
                    chunk = b""
                if not chunk:
                    raise AgentError("the machine is gone")
                self._pending += chunk
            line, _, self._pending = self._pending.partition(b"\n")
            try:
                answer = json.loads(line)
            except ValueError:
                continue  # The end of an answer to an earlier connection.
            if answer["id"] == identifier:
                return answer["rc"], base64.b64decode(answer["out"]), base64.b64decode(answer["err"])

    def _checked(self, operation: str, seconds: float, **parameters: Any) -> bytes:
        code, out, err = self._call(operation, seconds, **parameters)
        if code != 0:
            raise AgentError(err.decode(errors="replace"))
        return out

    def wait(self, seconds: float = 60) -> None:
        """Wait until the agent answers. Raises: Expired."""
        self._checked("python", seconds, source="result = True", argument=None)

    def exec(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        seconds: float = 30,
        input: bytes = b"",
        unless: Unless | None = None,
    ) -> Done:
        """Run a program as root and wait for its end; ``seconds`` is scaled.

        Raises: AgentError on a non-zero exit code if ``check``; Expired when the agent does not answer; what
        ``unless`` raises.
        """
        # The agent's own limit comes first, so that a stuck program does not cost the connection.
        limit = seconds * self._scale
        encoded = base64.b64encode(input).decode()
        code, out, err = self._call("exec", seconds + 10, unless, argv=list(argv), input=encoded, timeout=limit)
        done = Done(code, out.decode(errors="replace"), err.decode(errors="replace"))
        if check and code != 0:
            raise AgentError(f"{' '.join(argv)} ended with {code}:\n{done.out}{done.err}")
        return done

    def read(self, path: str) -> bytes:
        """A file's content. Raises: AgentError; Expired."""
        return self._checked("read", 30, path=path)

    def write(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Create or replace a file. Raises: AgentError; Expired."""
        self._checked("write", 30, path=path, data=base64.b64encode(data).decode(), mode=mode)

    def python(self, source: str, argument: Any = None, *, seconds: float = 30) -> Any:
        """Run Python there with ``argument`` set, and return what it assigned to ``result``.

        Both are JSON values. Raises: AgentError with the traceback; Expired.
        """
        return json.loads(self._checked("python", seconds, source=source, argument=argument))

    def set_clock(self) -> None:
        """Give the host under test our time; a restored machine's clock stands where it was saved."""
        self.python("import time; time.clock_settime(time.CLOCK_REALTIME, argument)", time.time())

    def close(self) -> None:
        """Close the connection; the agent waits for the next one."""
        self._socket.close()
