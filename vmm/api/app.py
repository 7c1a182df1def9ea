"""The HTTP application: checks the form of a request, hands it to core, and gives core's answer its HTTP form."""

from __future__ import annotations

import asyncio
import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import msgspec
from aiohttp import hdrs, web

from vmm import wire
from vmm.api import answers
from vmm.api.answers import HttpError
from vmm.api.connection import Connection
from vmm.api.routes import BANNER, IDENTITY_CHANGES, ROUTES, Route
from vmm.api.streams import console, follow, upload
from vmm.audit.client import Actor, Entry
from vmm.audit.throttle import Throttle
from vmm.errors import UserError

MAX_BODY = wire.MAX_FRAME - (16 << 10)
"""Bytes of a JSON body; with the caller's identity around it, it has to fit into a frame to core."""
_BODY_TIME = 30.0
_ID = "request_id"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The application and what its handlers share. ``banner`` may be replaced at any time.

    ``on_identities`` is called when identities may have changed, before whoever asked for that is answered.
    """

    def __init__(self, core: Path, strangers: Throttle, banner: str) -> None:
        """Arguments: core's socket; where requests without certificate are reported; the text before any login."""
        self.banner = banner
        self.on_identities: Callable[[], None] = lambda: None
        self.consoles: set[web.WebSocketResponse] = set()
        self.followers: set[Connection] = set()
        self._core = core
        self.strangers = strangers
        self.application = web.Application(middlewares=[self._guard], client_max_size=MAX_BODY)
        self.application.router.add_route("GET", BANNER, self._banner)
        for route in ROUTES:
            self.application.router.add_route(route.verb, route.path, self._handler(route))

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Stands before every handler, known path or not, and turns every error into a problem."""
        connection = cast(Connection, request.protocol)
        connection.requests += 1
        request_id = request[_ID] = str(uuid.uuid4())
        try:
            if (request.method, request.path) != ("GET", BANNER):
                await self._admit(request, connection)
            return await handler(request)
        except UserError as error:
            response = answers.problem(error, request_id)
        except web.HTTPException as error:
            # From aiohttp itself: no such path or verb, or a body over the limit.
            response = answers.problem(HttpError(error.status, _detail(error, request)), request_id)
            if hdrs.ALLOW in error.headers:
                response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001 - a fault of ours must not tell a caller how we are made
            traceback.print_exception(error, file=sys.stderr)
            response = answers.problem(answers.internal_error(), request_id)
        if connection.identity is None:
            response.force_close()
        return response

    async def _admit(self, request: web.Request, connection: Connection) -> None:
        if connection.session is None:
            self.strangers.report(
                Entry(
                    type="api.unauthenticated",
                    actor=Actor(origin=connection.origin),
                    outcome="failure",
                    reason="no client certificate",
                    request=request[_ID],
                    extra={"verb": request.method[:16], "path": request.path[:200]},
                )
            )
            raise HttpError(401, "a client certificate is required")
        # A browser adds the certificate to requests that any page makes it send; no page has business here.
        if hdrs.ORIGIN in request.headers:
            raise HttpError(403, "this service is not for web pages: the request has an Origin header")
        await connection.session.begin()

    async def _banner(self, request: web.Request) -> web.Response:
        return answers.value({"banner": self.banner}, 200, request[_ID])

    def _handler(self, route: Route) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            arguments = dict(request.match_info) | _query(request, route) | await _body(request, route)
            params = {"caller": _caller(request), "args": arguments}
            if route.kind == "console":
                if not web.WebSocketResponse().can_prepare(request).ok:
                    raise HttpError(426, "a console is a WebSocket", hint="use `holdfast vm console`")
                async with await wire.open_call(self._core, route.method, params) as channel:
                    return await console(request, channel, request[_ID], self.consoles)
            if route.kind == "follow":
                async with await wire.open_call(self._core, route.method, params) as channel:
                    return await follow(request, channel, request[_ID], self.followers)
            if route.kind == "upload":
                async with await wire.open_call(self._core, route.method, params) as channel:
                    result = await upload(request, channel)
            else:
                try:
                    result = await wire.call(self._core, route.method, params)
                finally:
                    if route.method in IDENTITY_CHANGES:
                        self.on_identities()
            return answers.value(result, route.status, request[_ID])

        return handle


def _caller(request: web.Request) -> dict[str, str]:
    connection = cast(Connection, request.protocol)
    if connection.identity is None:
        # _admit let it through, so this is a fault of ours; core must never see such a call.
        raise RuntimeError("a request without certificate reached a handler")
    identity = connection.identity
    return {
        "fingerprint": identity.fingerprint,
        "subject": identity.subject,
        "origin": connection.origin,
        "request_id": request[_ID],
    }


def _query(request: web.Request, route: Route) -> dict[str, int | str]:
    """The query parameters, typed. Raises: UserError naming the one at fault."""
    found: dict[str, int | str] = {}
    for name, text in request.query.items():
        type_ = route.query.get(name)
        if type_ is None:
            known = ", ".join(route.query) or "none"
            raise UserError(f"unknown query parameter {name!r}", hint=f"this call takes: {known}")
        if name in found:
            raise UserError(f"the query parameter {name!r} is given twice")
        if type_ is int:
            if not (text.isascii() and text.isdigit() and len(text) < 19):  # noqa: PLR2004 - fits into 63 bits
                raise UserError(f"the query parameter {name!r} is not a whole number: {text[:40]!r}")
            found[name] = int(text)
        else:
            found[name] = text
    return found


async def _body(request: web.Request, route: Route) -> dict[str, Any]:
    """The arguments that the body brings. Raises: UserError; aiohttp's 413."""
    if hdrs.CONTENT_ENCODING in request.headers:
        raise HttpError(415, "compressed bodies are not accepted")
    if route.kind == "upload":
        if request.content_length is None:
            raise HttpError(411, "an upload needs a Content-Length")
        return {"length": request.content_length}
    if not route.body:
        if request.body_exists:
            raise UserError("this call takes no body")
        return {}
    if request.content_type != "application/json":
        raise HttpError(415, "the body must be application/json")
    try:
        async with asyncio.timeout(_BODY_TIME):
            content = msgspec.json.decode(await request.read(), type=dict[str, Any])
    except TimeoutError:
        raise HttpError(408, f"the body did not arrive within {_BODY_TIME:g} s") from None
    except web.RequestPayloadError:
        raise ConnectionError("the client went away") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"the body is not a JSON object: {error}") from None
    except RecursionError:
        raise UserError("the body is nested too deeply") from None
    return content


def _detail(error: web.HTTPException, request: web.Request) -> str:
    match error.status:
        case HTTPStatus.NOT_FOUND:
            return f"there is no {request.path[:200]}"
        case HTTPStatus.METHOD_NOT_ALLOWED:
            return f"{request.path[:200]} does not answer to {request.method[:16]}"
        case HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            return f"the body is longer than {MAX_BODY} bytes"
    return error.reason
