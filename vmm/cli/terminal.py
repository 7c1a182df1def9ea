"""A machine's serial console on the user's terminal, or in a pipe."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import threading
import tty
from collections.abc import AsyncIterator, Iterator

import aiohttp
import msgspec

from vmm.cli.output import clean
from vmm.errors import UserError

ESCAPE = b"\x1d"
_CHUNK = 4096


class _Greeting(msgspec.Struct, frozen=True):
    machine: str
    uuid: str


async def attach(socket: aiohttp.ClientWebSocketResponse, *, log_only: bool, timeout: float | None) -> int:
    """Join the console with standard input and output until one ends.

    On a terminal Ctrl-] ends it. In a pipe the end of the input ends it, unless a ``timeout`` (in
    seconds) says how long to keep reading the machine's answers.

    Raises: UserError when the host does not say first which machine it is.
    """
    try:
        name = await _greeting(socket)
        interactive = sys.stdin.isatty() and not log_only
        print(f"Connected to {name}" + (", Ctrl-] ends it" if interactive else ""), file=sys.stderr)
        with _raw_terminal() if interactive else contextlib.nullcontext():
            tasks = [asyncio.create_task(_show(socket))]
            if not log_only:
                tasks.append(asyncio.create_task(_type(socket, interactive=interactive, stay=timeout is not None)))
            done, pending = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        print(f"\nDisconnected from {name}", file=sys.stderr)
        for task in done:
            task.result()
    finally:
        await socket.close()
    return 0


async def _greeting(socket: aiohttp.ClientWebSocketResponse) -> str:
    message = await socket.receive()
    if message.type is not aiohttp.WSMsgType.TEXT:
        raise UserError(clean(str(message.extra or "")) or "the host closed the console at once")
    try:
        greeting = msgspec.json.decode(message.data, type=_Greeting)
    except msgspec.DecodeError:
        raise UserError("the host does not say which machine this console belongs to") from None
    return clean(f"{greeting.machine} ({greeting.uuid})")


async def _show(socket: aiohttp.ClientWebSocketResponse) -> None:
    """Print what the machine writes until the host ends the console."""
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
            sys.stdout.buffer.write(message.data)
            sys.stdout.buffer.flush()
    if socket.close_code not in {None, aiohttp.WSCloseCode.OK}:
        raise UserError("the host ended the console", hint="see `holdfast vm show` and `holdfast health`")


async def _type(socket: aiohttp.ClientWebSocketResponse, *, interactive: bool, stay: bool) -> None:
    """Send the input to the machine until it ends, or Ctrl-] on a terminal."""
    async for data in _input():
        before, escape, _ = data.partition(ESCAPE) if interactive else (data, b"", b"")
        if before:
            await socket.send_bytes(before)
        if escape:
            return
    if stay:
        await asyncio.Event().wait()


async def _input() -> AsyncIterator[bytes]:
    """Standard input as it comes. A thread reads it: epoll takes neither files nor /dev/null."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    # As many chunks as may wait; a file must not be read into memory whole.
    room = threading.Semaphore(16)

    def read() -> None:
        while room.acquire():
            try:
                data = os.read(sys.stdin.fileno(), _CHUNK)
            except OSError:
                data = b""
            try:
                loop.call_soon_threadsafe(queue.put_nowait, data)
            except RuntimeError:
                return  # the loop has ended
            if not data:
                return

    threading.Thread(target=read, daemon=True).start()
    while data := await queue.get():
        room.release()
        yield data


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
