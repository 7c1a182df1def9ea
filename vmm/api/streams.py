"""The calls that carry more than a request and a result: uploads, a machine's console, following the audit trail."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from socket import IPPROTO_TCP, TCP_USER_TIMEOUT
from typing import Any, cast

import msgspec
from aiohttp import WSCloseCode, WSMsgType, web

from vmm.api.answers import HttpError, headers
from vmm.api.connection import Connection
from vmm.errors import Unavailable
from vmm.wire import Channel, Kind, Problem, ProtocolError, error_of

STALL = 60.0
"""Seconds that an upload may stand still."""
_CHUNK = 256 << 10
_HEARTBEAT = 30.0
_GRACE = 2.0
_VANISHED = 30.0
"""Seconds for which what was sent to a follower may stay unconfirmed."""


async def upload(request: web.Request, channel: Channel) -> Any:
    """Send a request's body to core and return core's result.

    Core may answer before the body's end, and the rest is not read then. A body that ends early is never followed
    by END, so core discards it.

    Raises: UserError as core answered; HttpError 408 when the body stalls; ConnectionError when the client is gone.
    """
    answer = asyncio.create_task(channel.result())
    sending = asyncio.create_task(_send_body(request, channel))
    try:
        await asyncio.wait({answer, sending}, return_when=asyncio.FIRST_COMPLETED)
        if sending.done() and not answer.done():
            error = sending.exception()
            if isinstance(error, _CoreGone):
                # Core may have said why before it closed.
                await asyncio.wait({answer}, timeout=_GRACE)
            elif error is not None:
                raise error
        try:
            return await answer
        except ProtocolError as broken:
            raise Unavailable(f"the core service: {broken}") from None
    finally:
        for task in (answer, sending):
            task.cancel()
        await asyncio.gather(answer, sending, return_exceptions=True)


class _CoreGone(Exception):
    """Core closed the channel while it was being written to."""


async def _send_body(request: web.Request, channel: Channel) -> None:
    while True:
        try:
            async with asyncio.timeout(STALL):
                chunk = await request.content.read(_CHUNK)
        except TimeoutError:
            raise HttpError(408, f"the body stood still for {STALL:g} s") from None
        except (web.RequestPayloadError, OSError):
            raise ConnectionError("the client went away") from None
        try:
            if not chunk:
                await channel.send(Kind.END)
                return
            await channel.send_data(chunk)
        except ConnectionError:
            raise _CoreGone from None


async def console(
    request: web.Request, channel: Channel, request_id: str, open_sockets: set[web.WebSocketResponse]
) -> web.WebSocketResponse:
    """Join a WebSocket with a machine's console until either side ends it.

    Arguments: ``open_sockets`` holds the socket meanwhile, so that it can be closed from outside.
    Raises: UserError as core answered instead of opening the console, before the upgrade.
    """
    payload = await _begun(channel)
    socket = web.WebSocketResponse(heartbeat=_HEARTBEAT, max_msg_size=1 << 20, compress=False)
    socket.headers.update(headers(request_id))
    await socket.prepare(request)
    open_sockets.add(socket)
    try:
        # From here on the connection is no longer HTTP: nothing may be raised that would be answered as such.
        with contextlib.suppress(ConnectionError):
            await socket.send_str(payload.decode())
            await _first_of(_to_client(channel, socket), _to_guest(channel, socket))
        with contextlib.suppress(ConnectionError):
            await socket.close()
    finally:
        open_sockets.discard(socket)
    return socket


async def _first_of(*directions: Coroutine[Any, Any, None]) -> None:
    """Run both until one ends, then stop the other. Raises: what the first one raised."""
    tasks = [asyncio.create_task(direction) for direction in directions]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _to_client(channel: Channel, socket: web.WebSocketResponse) -> None:
    while True:
        try:
            kind, payload = await channel.receive()
        except ProtocolError:
            await socket.close(code=WSCloseCode.INTERNAL_ERROR, message=b"the core service went away")
            return
        if kind is not Kind.DATA:
            if kind is Kind.PROBLEM:
                detail = msgspec.json.decode(payload, type=Problem).detail
                await socket.close(code=WSCloseCode.INTERNAL_ERROR, message=detail.encode()[:120])
            return
        await socket.send_bytes(payload)


async def _to_guest(channel: Channel, socket: web.WebSocketResponse) -> None:
    with contextlib.suppress(ConnectionError):
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                await socket.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"only binary messages reach a guest")
                break
            await channel.send_data(message.data)
        await channel.send(Kind.END)


async def follow(
    request: web.Request, channel: Channel, request_id: str, open_connections: set[Connection]
) -> web.StreamResponse:
    """Answer with what core sends, as it comes, until either side ends it.

    An end that is not the client's own breaks the answer off, so that it looks like no whole one.

    Arguments: ``open_connections`` holds the connection meanwhile, so that it can be closed from outside.
    Raises: UserError as core answered instead, before the answer begins.
    """
    payload: bytes | None = await _begun(channel)
    connection = cast(Connection, request.protocol)
    response = web.StreamResponse(headers=headers(request_id))
    response.content_type = "application/jsonl"
    await response.prepare(request)
    if request.transport is not None:
        # Of a client that vanished nothing would be heard for a quarter of an hour.
        connected = request.transport.get_extra_info("socket")
        connected.setsockopt(IPPROTO_TCP, TCP_USER_TIMEOUT, int(1000 * _VANISHED))
    open_connections.add(connection)
    try:
        while payload is not None:
            async with asyncio.timeout(STALL):
                await response.write(payload)
            payload = await _next(channel, connection.closed)
    except (ConnectionError, TimeoutError):
        pass
    finally:
        open_connections.discard(connection)
        if request.transport is not None:
            request.transport.abort()
    return response


async def _next(channel: Channel, closed: asyncio.Future[None]) -> bytes | None:
    """The next of what core sends; None when there is no more, or the client has gone."""
    receiving = asyncio.create_task(channel.receive())
    try:
        await asyncio.wait((receiving, closed), return_when=asyncio.FIRST_COMPLETED)
        if not receiving.done():
            return None
        kind, payload = receiving.result()
        return payload if kind is Kind.DATA else None
    except ProtocolError:
        return None
    finally:
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)


async def _begun(channel: Channel) -> bytes:
    """Core's first data frame. Raises: UserError as core answered instead."""
    try:
        kind, payload = await channel.receive()
    except ProtocolError as broken:
        raise Unavailable(f"the core service: {broken}") from None
    if kind is Kind.PROBLEM:
        raise error_of(msgspec.json.decode(payload, type=Problem))
    if kind is not Kind.DATA:
        raise Unavailable(f"the core service answered with {kind.name}")
    return payload
