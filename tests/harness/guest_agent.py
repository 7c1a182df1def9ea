"""Runs as root on the host under test: takes commands from the harness over a virtio serial port.

It is passed as a credential, so it is one file and uses the standard library only. Requests and
answers are lines of JSON; bytes travel as base64. See tests.harness.agent for the other end.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import select
import subprocess
import sys
import traceback
from typing import Any

PORT = "/dev/virtio-ports/holdfast.test"
_WRITE_SECONDS = 10


def _decode(text: str) -> bytes:
    return base64.b64decode(text)


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _exec(request: dict[str, Any]) -> dict[str, Any]:
    try:
        # On the host under test vmm.process may be what is broken.
        done = subprocess.run(
            request["argv"], input=_decode(request["input"]), capture_output=True, check=False,
            timeout=request["timeout"],
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        return {"rc": -1, "out": _encode(expired.stdout or b""), "err": _encode(b"the time is up")}
    return {"rc": done.returncode, "out": _encode(done.stdout), "err": _encode(done.stderr)}


def _read(request: dict[str, Any]) -> dict[str, Any]:
    return {"rc": 0, "out": _encode(pathlib.Path(request["path"]).read_bytes()), "err": ""}


def _write(request: dict[str, Any]) -> dict[str, Any]:
    path = pathlib.Path(request["path"])
    path.write_bytes(_decode(request["data"]))
    path.chmod(request["mode"])
    return {"rc": 0, "out": "", "err": ""}


def _python(request: dict[str, Any]) -> dict[str, Any]:
    names: dict[str, Any] = {"argument": request["argument"], "result": None}
    exec(compile(request["source"], "<test>", "exec"), names)  # noqa: S102 - what this program is for
    return {"rc": 0, "out": _encode(json.dumps(names["result"]).encode()), "err": ""}


OPERATIONS = {"exec": _exec, "read": _read, "write": _write, "python": _python}


def answer(line: bytes) -> bytes:
    """Carry out one request line and return the answer line; every failure becomes an answer."""
    identifier = None
    try:
        request = json.loads(line)
        identifier = request["id"]
        result = OPERATIONS[request["op"]](request)
    except Exception:  # noqa: BLE001 - the harness shows it to the test's author
        result = {"rc": -2, "out": "", "err": _encode(traceback.format_exc().encode())}
    return json.dumps({"id": identifier, **result}).encode() + b"\n"


def send(port: int, data: bytes) -> None:
    """Write everything, or give up when the harness went away."""
    poll = select.poll()
    poll.register(port, select.POLLOUT)
    while data:
        ready = poll.poll(_WRITE_SECONDS * 1000)
        if not ready or ready[0][1] & select.POLLHUP:
            return
        try:
            data = data[os.write(port, data) :]
        except BlockingIOError:
            continue


def serve(port: int) -> None:
    """Answer requests until the machine stops; the harness may come and go, a restored machine included."""
    epoll = select.epoll()
    # Edge-triggered: while nobody is connected the port is always readable (end of file).
    epoll.register(port, select.EPOLLIN | select.EPOLLET)
    pending = b""
    while True:
        epoll.poll()
        while True:
            try:
                chunk = os.read(port, 1 << 16)
            except BlockingIOError:
                break
            if not chunk:
                pending = b""
                break
            pending += chunk
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                # An empty line ends whatever an earlier connection left unfinished.
                if line:
                    send(port, answer(line))


if __name__ == "__main__":
    serve(os.open(sys.argv[1] if len(sys.argv) > 1 else PORT, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
