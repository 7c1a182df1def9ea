"""The two forms of answer: a JSON value, or a problem as RFC 9457 describes it."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from vmm.errors import UserError

_HEADERS = {
    # aiohttp would name itself and Python with their versions.
    "Server": "holdfast",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Strict-Transport-Security": "max-age=31536000",
    "X-Content-Type-Options": "nosniff",
}


class HttpError(UserError):
    """A request that HTTP itself has a status for."""

    def __init__(self, status: int, message: str, *, hint: str = "") -> None:
        """Arguments: ``status`` is the HTTP status; its name becomes the problem's code."""
        super().__init__(message, hint=hint)
        self.status = status
        self.code = HTTPStatus(status).phrase.lower().replace(" ", "-")


def headers(request_id: str = "") -> dict[str, str]:
    """The headers of every answer; ``request_id`` joins it with the audit records of the request."""
    return _HEADERS | ({"X-Request-Id": request_id} if request_id else {})


def value(content: Any, status: int, request_id: str) -> web.Response:
    """A successful answer; a 204 has no body, whatever the content is."""
    if status == HTTPStatus.NO_CONTENT:
        return web.Response(status=status, headers=headers(request_id))
    body = msgspec.json.encode(content)
    return web.Response(body=body, status=status, headers=headers(request_id), content_type="application/json")


def problem(error: UserError, request_id: str = "") -> web.Response:
    """An error as ``application/problem+json``; its type is ``urn:holdfast:problem:`` and the error's code."""
    content = {
        "type": f"urn:holdfast:problem:{error.code}",
        "title": _phrase(error.status),
        "status": error.status,
        "detail": error.message,
        "hint": error.hint,
    }
    body = msgspec.json.encode(content)
    return web.Response(
        body=body, status=error.status, headers=headers(request_id), content_type="application/problem+json"
    )


def internal_error() -> UserError:
    """What a caller hears of a fault of ours."""
    return HttpError(500, "an internal error; the journal has its trace")


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"
