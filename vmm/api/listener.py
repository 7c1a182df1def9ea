"""Accepts connections: limits, the TLS handshake and its failures, and the session around each connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
from collections import Counter
from collections.abc import Callable

from aiohttp import web

from vmm.api.connection import Connection, Identity, begin_quietly
from vmm.api.tls import Pins
from vmm.audit.client import Actor, AuditClient, Entry
from vmm.audit.throttle import Throttle
from vmm.errors import Unavailable
from vmm.origin import names

HANDSHAKE = 10.0
"""Seconds that a TLS handshake may take."""
MAX_CONNECTIONS = 64
MAX_PER_SOURCE = 16
MAX_HANDSHAKES = 32
"""Handshakes under way at once; above MAX_PER_SOURCE, so that one source alone cannot keep others out."""
_BACKLOG = 128
_REFUSED = "certificate refused"
"""A rule of the guard's knows these by their beginning (vmm/guard/rules.json)."""


class Listener:
    """Owns the listening socket and every accepted one.

    ``port`` is known once started.
    """

    def __init__(self, server: web.Server, audit: AuditClient, throttle: Callable[[], Throttle], pins: Pins) -> None:
        self._pins = pins
        # Noise must not keep refused certificates, which are counted, from being on record.
        self.failures, self.refusals = throttle(), throttle()
        self.port = 0
        self.connections: set[Connection] = set()
        self._server = server
        self._audit = audit
        self._sources: Counter[str] = Counter()
        self._handshakes = asyncio.Semaphore(MAX_HANDSHAKES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    def pin(self, pins: Pins) -> None:
        """Let in who is known from now on; whoever no longer is loses its connections."""
        self._pins = pins
        for connection in list(self.connections):
            if connection.identity is not None and not self._is_known(connection.identity):
                connection.force_close()

    def _is_known(self, identity: Identity) -> bool:
        return identity.fingerprint in self._pins.fingerprints

    def start(self, port: int) -> None:
        """Listen on every address (the host's packet filter lets only the management interface through).

        Arguments: ``port`` 0 takes any free one. Raises: OSError.
        """
        if socket.has_dualstack_ipv6():
            listening = socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
            )
        else:
            listening = socket.create_server(("", port), backlog=_BACKLOG)
        listening.setblocking(False)
        self.port = listening.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(listening))

    async def stop(self) -> None:
        """Accept nothing more."""
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting

    async def drain(self, timeout: float) -> None:
        """Wait up to so many seconds until the connections are closed and their sessions' ends recorded."""
        for connection in list(self.connections):
            connection.force_close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout)
            for task in late:
                task.cancel()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listening:
            while True:
                try:
                    accepted, address = await loop.sock_accept(listening)
                except OSError as error:
                    # Out of descriptors, or the peer was quicker: never a reason to stop listening.
                    print(f"api: cannot accept a connection: {error}", file=sys.stderr, flush=True)
                    await asyncio.sleep(0.1)
                    continue
                task = loop.create_task(self._serve(accepted, *address[:2]))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _serve(self, accepted: socket.socket, host: str, port: int) -> None:
        source, origin = names(host, port)
        with accepted:
            if self._sources.total() >= MAX_CONNECTIONS or self._sources[source] >= MAX_PER_SOURCE:
                self._failed(origin, "too many connections")
                return
            self._sources[source] += 1
            try:
                connection = await self._handshake(accepted, origin)
                if connection is not None:
                    await self._connected(connection)
            finally:
                self._sources[source] -= 1
                # Zero counts would pile up, one for every source there ever was.
                if not self._sources[source]:
                    del self._sources[source]

    async def _handshake(self, accepted: socket.socket, origin: str) -> Connection | None:
        connection = Connection(self._server, self._audit, origin, self._is_known)
        factory: Callable[[], Connection] = lambda: connection  # noqa: E731
        async with self._handshakes:
            try:
                await asyncio.get_running_loop().connect_accepted_socket(
                    factory, accepted, ssl=self._pins.context, ssl_handshake_timeout=HANDSHAKE, ssl_shutdown_timeout=5.0
                )
            except OSError as error:
                self._failed(origin, _reason(error))
                return None
        return connection

    async def _connected(self, connection: Connection) -> None:
        if connection.foreign:
            self._failed(connection.origin, f"{_REFUSED}: not a known one")
        self.connections.add(connection)
        try:
            if connection.session is not None:
                await begin_quietly(connection.session)
            await connection.closed
        finally:
            self.connections.discard(connection)
        if connection.session is not None:
            try:
                await connection.session.end()
            except Unavailable as error:
                print(f"api: end of session not recorded: {error.message}", file=sys.stderr, flush=True)

    def _failed(self, origin: str, reason: str) -> None:
        throttle = self.refusals if reason.startswith(_REFUSED) else self.failures
        throttle.report(Entry(type="tls.handshake", actor=Actor(origin=origin), outcome="failure", reason=reason))


def _reason(error: OSError) -> str:
    match error:
        case ssl.SSLCertVerificationError():
            return f"{_REFUSED}: {error.verify_message}"
        case ssl.SSLError():
            return error.reason or "TLS error"
        case ConnectionAbortedError():
            return f"no handshake within {HANDSHAKE:g} s"
        case ConnectionError():
            return "connection closed during the handshake"
    return error.strerror or type(error).__name__
