"""A guest's serial console as an asynchronous byte stream, over a non-blocking libvirt stream.

libvirt calls back in its own thread, which moves the bytes; the event loop is only told that something changed. A slow
reader makes us stop taking output, so it slows the guest's serial port instead of filling our memory.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from typing import Any

import libvirt

_PIECE = 16 * 1024
# Output that may wait for its reader before we stop taking more.
_MOST_WAITING = 256 * 1024

_READABLE: int = libvirt.VIR_STREAM_EVENT_READABLE
_WRITABLE: int = libvirt.VIR_STREAM_EVENT_WRITABLE
_ENDED: int = libvirt.VIR_STREAM_EVENT_ERROR | libvirt.VIR_STREAM_EVENT_HANGUP


class StreamConsole:
    """See vmm.hypervisor.types.Console. One reader and one writer at a time."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._closing = False
        # Guards what follows, which both threads use. libvirt calls back without holding locks of its own.
        self._lock = threading.Lock()
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._ended = False
        self._wanted = _READABLE | _ENDED
        stream.eventAddCallback(self._wanted, self._on_event, None)

    async def read(self) -> bytes:
        """Wait for output; empty once the machine stopped or the console was closed."""
        while True:
            self._changed.clear()
            with self._lock:
                if self._incoming:
                    data = bytes(self._incoming)
                    self._incoming.clear()
                    self._want()
                    return data
                if self._ended:
                    return b""
            await self._changed.wait()

    async def write(self, data: bytes) -> None:
        """Type into the console; returns once libvirt took everything. Raises: ConnectionError at its end."""
        with self._lock:
            self._outgoing += data
            self._want()
        while True:
            self._changed.clear()
            with self._lock:
                if self._ended:
                    raise ConnectionError("the console ended")
                if not self._outgoing:
                    return
            await self._changed.wait()

    async def close(self) -> None:
        """Let go of the console; may be called again."""
        if self._closing:
            return
        self._closing = True
        self.end()
        # Ending the stream asks libvirtd, so it may take a moment; nobody has to wait for it after a failure.
        with suppress(libvirt.libvirtError):
            await self._loop.run_in_executor(None, self._stream.abort)

    def end(self) -> None:
        """Have readers and writers see the end, without a word to libvirtd (it may be gone)."""
        with self._lock:
            self._end()
        self._changed.set()

    def _on_event(self, _stream: Any, events: int, _opaque: Any) -> None:
        """Called in libvirt's thread."""
        with self._lock:
            if self._ended:
                return
            try:
                if events & _READABLE:
                    self._receive()
                if events & _WRITABLE:
                    self._send()
                if events & _ENDED:
                    self._end()
                self._want()
            except libvirt.libvirtError:
                self._end()
        with suppress(RuntimeError):  # the loop is closing: nobody waits any more
            self._loop.call_soon_threadsafe(self._changed.set)

    def _receive(self) -> None:
        data = self._stream.recv(_PIECE)
        if data == b"":
            self._end()
        elif isinstance(data, bytes):  # else: -2, nothing to read after all
            self._incoming += data

    def _send(self) -> None:
        if self._outgoing:
            sent = self._stream.send(bytes(self._outgoing[:_PIECE]))
            del self._outgoing[: max(sent, 0)]  # -2: not now after all

    def _want(self) -> None:
        """Ask libvirt for the events that we can use now."""
        if self._ended:
            return
        wanted = _ENDED
        if len(self._incoming) < _MOST_WAITING:
            wanted |= _READABLE
        if self._outgoing:
            wanted |= _WRITABLE
        if wanted != self._wanted:
            self._wanted = wanted
            self._stream.eventUpdateCallback(wanted)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            with suppress(libvirt.libvirtError):
                self._stream.eventRemoveCallback()
