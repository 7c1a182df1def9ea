"""One TLS connection: who is at the other end, its session in the audit trail, and its limits."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import sys
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from ssl import SSLObject
from typing import Literal, cast

from aiohttp import web

from vmm.api import answers
from vmm.audit.client import Actor, AuditClient, Entry, Object
from vmm.errors import Unavailable

FIRST_REQUEST = 15.0
"""Seconds within which a connection must bring its first whole request head."""
KEEPALIVE = 30.0
"""Seconds that a connection may idle between requests."""
LINGER = 2.0
"""Seconds for which the rest of a body that nobody wants is read, so that the client sees the answer."""
_PIPELINE = 16
_LONGEST_SUBJECT = 1024


@dataclass(frozen=True)
class Identity:
    """The certificate that TLS verified: SHA-256 of its DER form in hex, and its subject for people."""

    fingerprint: str
    subject: str


def identity_of(tls: SSLObject) -> Identity | None:
    """The client's verified certificate, or None if it showed none."""
    der = tls.getpeercert(binary_form=True)
    if der is None:
        return None
    subject = cast("tuple[tuple[tuple[str, str], ...], ...]", (tls.getpeercert() or {}).get("subject", ()))
    names = [f"{_SHORT.get(key, key)}={value}" for part in subject for key, value in part]
    return Identity(hashlib.sha256(der).hexdigest(), ",".join(names)[:_LONGEST_SUBJECT])


_SHORT = {"commonName": "CN", "organizationName": "O", "organizationalUnitName": "OU", "countryName": "C"}


class Session:
    """The time between the first and the last byte of a connection with a certificate, as the trail shows it."""

    def __init__(self, audit: AuditClient, identity: Identity, origin: str) -> None:
        self._audit = audit
        self._subject = identity.subject
        self._actor = Actor(id=identity.fingerprint, origin=origin, certificate=identity.fingerprint)
        self._object = Object(kind="session", id=str(uuid.uuid4()))
        self._started = ""
        self._lock = asyncio.Lock()

    async def begin(self) -> None:
        """Record the start unless that is done. Raises: Unavailable."""
        async with self._lock:
            if not self._started:
                started = _now()
                await self._append("session.start", {"subject": self._subject, "start_time": started})
                self._started = started

    async def end(self) -> None:
        """Record the end if the start was. Raises: Unavailable."""
        async with self._lock:
            if self._started:
                times = {"start_time": self._started, "end_time": _now()}
                await self._append("session.end", {"subject": self._subject} | times)

    async def _append(self, type_: Literal["session.start", "session.end"], extra: dict[str, str]) -> None:
        await self._audit.append(Entry(type=type_, actor=self._actor, object=self._object, extra=extra))


class Connection(web.RequestHandler):
    """aiohttp's side of a connection, with what it lacks: an identity, an end to wait for, and limits.

    ``session`` is None without a certificate. ``closed`` is done when the connection is gone. ``foreign`` is one whose
    certificate TLS took and which is nobody's all the same: it was issued by a known one, or revoked in that moment.
    """

    __slots__ = ("_audit", "_first", "_is_known", "closed", "foreign", "identity", "origin", "requests", "session")

    def __init__(
        self, server: web.Server, audit: AuditClient, origin: str, is_known: Callable[[Identity], bool]
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEPALIVE,
            access_log=None,  # type: ignore[arg-type] # its documented way to have no access log
            lingering_time=LINGER,
            # A compressed body is refused, so it must not be unpacked first.
            auto_decompress=False,
        )
        self._audit = audit
        self._is_known = is_known
        self._first: asyncio.TimerHandle | None = None
        self.origin = origin
        self.identity: Identity | None = None
        self.session: Session | None = None
        self.requests = 0
        self.foreign = False
        self.closed: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Before aiohttp hears of it: the first request may lie in the packet that ends the handshake.
        self.identity = identity_of(transport.get_extra_info("ssl_object"))
        if self.identity is not None and not self._is_known(self.identity):
            self.foreign = True
            cast(asyncio.Transport, transport).abort()
        elif self.identity is not None:
            self.session = Session(self._audit, self.identity, self.origin)
        # aiohttp limits the time between requests, but not the time before the first one.
        self._first = self._loop.call_later(FIRST_REQUEST, self._expire)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # aiohttp queues pipelined requests without end while one is being answered.
        if len(self._messages) > _PIPELINE:
            self.force_close()

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._first is not None:
            self._first.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """Answer what is not HTTP, or broke on our side, without telling how we are made."""
        if isinstance(exc, ConnectionError):
            # The client is gone: nothing to answer, nothing to report.
            raise exc
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR and exc is not None:
            traceback.print_exception(exc, file=sys.stderr)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        known = status < HTTPStatus.INTERNAL_SERVER_ERROR
        error = answers.HttpError(status, "not a valid HTTP request") if known else answers.internal_error()
        response = answers.problem(error)
        response.force_close()
        return response

    def _expire(self) -> None:
        if not self.requests:
            self.force_close()


async def begin_quietly(session: Session) -> None:
    """Record a session's start; if that fails now, its first request tries again and is refused if it must."""
    try:
        await session.begin()
    except Unavailable as error:
        print(f"api: session not recorded: {error.message}", file=sys.stderr, flush=True)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
