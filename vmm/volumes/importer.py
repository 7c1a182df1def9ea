"""Core's side of an import: hand two open files to the confined converter and wait for its word."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec

from vmm.errors import Unavailable, UserError
from vmm.paths import IMPORT_SOCKET
from vmm.volumes.types import Format, ImportRequest, ImportResult
from vmm.wire import Problem, error_of

# Beyond the converter's own limit (RuntimeMaxSec=30min), so that the reason is found there.
_DEADLINE_S = 31 * 60.0
_MAX_REPLY = 64 * 1024


class Importer(Protocol):
    """Writes the disk of the image behind ``source`` into ``target``; returns its size in bytes.

    Raises: UserError saying why the image was refused; Unavailable when it could not be looked at.
    """

    async def __call__(self, source: int, target: int, format: Format, size: int) -> int: ...


class ConfinedImporter:
    """Importer by way of the socket-activated unit, one process an import."""

    def __init__(self, path: Path = IMPORT_SOCKET) -> None:
        self._path = path

    async def __call__(self, source: int, target: int, format: Format, size: int) -> int:
        """See Importer."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    await loop.sock_connect(connection, str(self._path))
                    line = msgspec.json.encode(ImportRequest(format, size)) + b"\n"
                    socket.send_fds(connection, [line], [source, target])
                    reply = await _read_all(loop, connection)
            except (OSError, TimeoutError) as error:
                raise Unavailable(f"the image converter does not answer: {error or 'no end in sight'}") from None
        return _size_in(reply)


async def _read_all(loop: asyncio.AbstractEventLoop, connection: socket.socket) -> bytes:
    reply = b""
    with suppress(ConnectionError):  # the converter's end; what it said before counts
        while len(reply) < _MAX_REPLY and (piece := await loop.sock_recv(connection, 4096)):
            reply += piece
    return reply


def _size_in(reply: bytes) -> int:
    if not reply.endswith(b"\n"):
        raise UserError(
            "the conversion was ended because it took too much memory, time or space",
            hint="An image made anew by `qemu-img convert` may be accepted.",
        )
    try:
        result = msgspec.json.decode(reply, type=ImportResult)
        problem = msgspec.convert(result.refused, Problem) if result.refused is not None else None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Unavailable("the image converter's answer cannot be read") from None
    if problem is not None:
        raise error_of(problem)
    return result.virtual_size
