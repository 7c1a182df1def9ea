"""How Holdfast's daemons talk to each other: one connection a call, over Unix sockets.

A connection carries one request frame, then any number of data frames in either direction,
then exactly one result or problem frame from the server. A server may finish a call whose caller has gone.
The server learns who is calling from the kernel (SO_PEERCRED), never from the caller.

A frame is one byte of kind, four bytes of big-endian length, and the payload.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from vmm.errors import Conflict, Forbidden, NotFound, Unavailable, UserError

MAX_FRAME = 1 << 20
_LINGER_S = 10.0
_BACKLOG = 512
"""Callers that may wait to be accepted. One too many is told at once that the service went away, however well it is."""
HEADER = struct.Struct(">cI")

T = TypeVar("T")


class Kind(enum.Enum):
    """What a frame means."""

    REQUEST = b"Q"
    DATA = b"D"
    END = b"E"
    RESULT = b"R"
    PROBLEM = b"P"


class Problem(msgspec.Struct, frozen=True):
    """A UserError on its way between processes; the field names are those of RFC 9457."""

    code: str
    status: int
    detail: str
    hint: str = ""


class Request(msgspec.Struct, frozen=True):
    """One call: a method's name and its parameters as JSON values."""

    method: str
    params: dict[str, Any] = {}


@dataclass(frozen=True)
class Peer:
    """The process at the other end, as the kernel identifies it (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int


class ProtocolError(Exception):
    """The other end broke the framing rules or went away in the middle of a call."""


class Channel:
    """One call's connection, used by both ends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @property
    def peer(self) -> Peer:
        """Who is at the other end."""
        raw = self._writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return Peer(*struct.unpack("3i", raw))

    async def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a frame; returns once the other end keeps up. Raises: ConnectionError; ValueError over MAX_FRAME."""
        if len(payload) > MAX_FRAME:
            # The other end would break the call off without a reason.
            raise ValueError(f"a frame of {len(payload)} bytes is over the limit of {MAX_FRAME}")
        self._writer.write(HEADER.pack(kind.value, len(payload)) + payload)
        await self._writer.drain()

    async def receive(self) -> tuple[Kind, bytes]:
        """Wait for the next frame. Raises: ProtocolError at a broken or ended stream."""
        try:
            raw_kind, length = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {MAX_FRAME}")
            return Kind(raw_kind), await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ProtocolError("the other end closed the connection") from None
        except ValueError as error:
            raise ProtocolError(str(error)) from None

    async def send_data(self, payload: bytes) -> None:
        """Send bytes of any length as data frames."""
        for start in range(0, len(payload), MAX_FRAME):
            await self.send(Kind.DATA, payload[start : start + MAX_FRAME])

    async def data(self) -> AsyncIterator[bytes]:
        """Yield the data frames' payloads up to the END frame. Raises: ProtocolError."""
        while True:
            kind, payload = await self.receive()
            if kind is Kind.END:
                return
            if kind is not Kind.DATA:
                raise ProtocolError(f"expected data, got {kind.name}")
            yield payload

    async def result(self) -> Any:
        """Wait for the result frame, skipping nothing.

        Raises: UserError (the matching subclass) when the server answered with a problem;
        ProtocolError when it went away.
        """
        kind, payload = await self.receive()
        if kind is Kind.RESULT:
            return msgspec.json.decode(payload)
        if kind is Kind.PROBLEM:
            raise error_of(msgspec.json.decode(payload, type=Problem))
        raise ProtocolError(f"expected a result, got {kind.name}")

    async def linger(self) -> None:
        """Take in what the other end still sends, until it has the answer and closes, for ten seconds at most.

        Were the connection closed under its hands, its next write would fail and lose it the answer.
        """
        try:
            async with asyncio.timeout(_LINGER_S):
                while await self._reader.read(MAX_FRAME):
                    pass
        except (TimeoutError, ConnectionError):
            pass

    async def gone(self) -> None:
        """Return once the other end, which has nothing more to send, is there no longer (or does send something)."""
        with contextlib.suppress(ConnectionError):
            await self._reader.read(1)

    async def close(self) -> None:
        """Close the connection; never raises for a peer that is already gone."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except (ConnectionError, OSError):
            pass

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


_ERRORS: dict[str, type[UserError]] = {e.code: e for e in (UserError, Forbidden, NotFound, Conflict, Unavailable)}


def problem_of(error: UserError) -> Problem:
    """The form in which an error travels."""
    return Problem(code=error.code, status=error.status, detail=error.message, hint=error.hint)


def error_of(problem: Problem) -> UserError:
    """The error that a problem stood for (unknown codes become a plain UserError)."""
    error = _ERRORS.get(problem.code, UserError)(problem.detail, hint=problem.hint)
    error.code, error.status = problem.code, problem.status
    return error


async def open_call(path: Path, method: str, params: dict[str, Any] | None = None) -> Channel:
    """Start a call and hand out its channel for streaming.

    Raises: Unavailable when nobody serves the socket.
    """
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=MAX_FRAME)
    except OSError as error:
        raise Unavailable(f"the service behind {path.name} does not answer: {error.strerror}") from None
    channel = Channel(reader, writer)
    try:
        await channel.send(Kind.REQUEST, msgspec.json.encode(Request(method, params or {})))
    except ConnectionError:
        await channel.close()
        raise Unavailable(f"the service behind {path.name} went away") from None
    return channel


async def call(path: Path, method: str, params: dict[str, Any] | None = None) -> Any:
    """Make a call that needs no streaming and return its result.

    Raises: UserError as the server answered it; Unavailable when the server went away.
    """
    async with await open_call(path, method, params) as channel:
        try:
            return await channel.result()
        except ProtocolError as error:
            raise Unavailable(f"the service behind {path.name}: {error}") from None


async def while_there(channel: Channel, work: Coroutine[Any, Any, T]) -> T:
    """Do something for the other end, which has nothing more to send, for as long as it is there.

    Raises: what the work raises; ConnectionError when the other end goes away, the work being cancelled.
    """
    tasks = asyncio.create_task(work), asyncio.create_task(channel.gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ConnectionError("the other end went away")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


Handler = Callable[[Request, Channel], Awaitable[Any]]


async def answer(channel: Channel, handler: Handler) -> None:
    """Serve the one call on a connection, and close it.

    ``handler`` returns the result (any JSON value or msgspec Struct) or raises UserError, which
    travels to the caller; any other exception is printed and becomes an internal problem.
    """
    async with channel:
        if await _answer(channel, handler):
            await channel.linger()


async def answer_all(channel: Channel, handler: Handler) -> None:
    """Serve calls that follow one another on a connection until the other end closes it; see answer()."""
    async with channel:
        while await _answer(channel, handler):
            pass


async def _answer(channel: Channel, handler: Handler) -> bool:
    """Serve a call; whether the other end was there to the end of it."""
    try:
        kind, payload = await channel.receive()
        if kind is not Kind.REQUEST:
            raise ProtocolError(f"expected a request, got {kind.name}")
        request = msgspec.json.decode(payload, type=Request)
    except (ProtocolError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    try:
        result = await handler(request, channel)
        await channel.send(Kind.RESULT, msgspec.json.encode(result))
    except UserError as error:
        await _send_problem(channel, problem_of(error))
    except (ProtocolError, ConnectionError):
        return False
    except Exception as error:  # noqa: BLE001 - one broken call must not end the daemon
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"the call {request.method} failed", "exception": error}
        )
        await _send_problem(channel, Problem("internal", 500, "an internal error; the journal has its trace"))
    return True


async def serve(path: Path, handler: Handler, *, mode: int = 0o660) -> asyncio.Server:
    """Serve calls on a Unix socket until the server is closed; for ``handler`` see answer()."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(Channel(reader, writer), handler)

    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(connected, path, limit=MAX_FRAME, backlog=_BACKLOG)
    path.chmod(mode)
    return server


async def serve_on(listening: socket.socket, handler: Handler) -> asyncio.Server:
    """The same on a socket that systemd has made and listens on already (sd_listen_fds(3))."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await answer(Channel(reader, writer), handler)

    # The socket's file is systemd's, too: without it nobody would ever reach, and so start, this service again.
    return await asyncio.start_unix_server(connected, sock=listening, limit=MAX_FRAME, cleanup_socket=False)


async def _send_problem(channel: Channel, problem: Problem) -> None:
    try:
        await channel.send(Kind.PROBLEM, msgspec.json.encode(problem))
    except ConnectionError:
        pass
