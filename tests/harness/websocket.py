"""Turns a machine's console WebSocket into an ordinary socket, for tests that do not use asyncio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import ssl
import threading
from typing import Any

import aiohttp

_Opened = concurrent.futures.Future[dict[str, Any]]


async def _carry(url: str, tls: ssl.SSLContext, local: socket.socket, opened: _Opened, seconds: float) -> None:
    timeout = aiohttp.ClientTimeout(total=None, connect=seconds)
    async with aiohttp.ClientSession(timeout=timeout) as session, session.ws_connect(url, ssl=tls) as remote:
        first = await remote.receive_json(timeout=seconds)
        reader, writer = await asyncio.open_connection(sock=local)
        opened.set_result(first)

        async def outward() -> None:
            while chunk := await reader.read(1 << 16):
                await remote.send_bytes(chunk)
            await remote.close()

        async def inward() -> None:
            async for message in remote:
                if message.type is aiohttp.WSMsgType.BINARY:
                    writer.write(message.data)
                    await writer.drain()

        sending = asyncio.create_task(outward())
        try:
            await inward()
        finally:
            sending.cancel()
            writer.close()


def connect(url: str, tls: ssl.SSLContext, seconds: float) -> tuple[dict[str, Any], socket.socket]:
    """Open the WebSocket; return its first message and a socket that carries the binary ones both ways.

    Closing the socket closes the WebSocket, and the other way round.
    Raises: aiohttp.ClientError when the server refuses; TimeoutError.
    """
    ours, theirs = socket.socketpair()
    opened: _Opened = concurrent.futures.Future()

    def carry() -> None:
        try:
            asyncio.run(_carry(url, tls, theirs, opened, seconds))
        except Exception as error:  # noqa: BLE001 - handed to the test, or the stream's end says it
            if not opened.done():
                opened.set_exception(error)
        finally:
            theirs.close()

    threading.Thread(target=carry, name=f"carry {url}", daemon=True).start()
    try:
        return opened.result(seconds * 2), ours
    except BaseException:
        ours.close()
        raise
