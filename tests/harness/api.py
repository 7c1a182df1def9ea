"""A client of the host's HTTPS API that does no more than a test tells it to."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.harness.seed import Identity
from tests.harness.stream import Console
from tests.harness.websocket import connect

_CONNECT_SECONDS = 5


@dataclass(frozen=True)
class Response:
    """An HTTP response: status, headers (names in lower case), and the body as it came."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as a JSON value. Raises: ValueError."""
        return json.loads(self.body)


class ApiError(AssertionError):
    """The API answered with a status other than the expected one."""


class Api:
    """Requests as one identity, each on a connection of its own. ``scale`` multiplies deadlines."""

    def __init__(self, address: str, port: int, identity: Identity | None = None, *, scale: float = 1.0) -> None:
        self._address = address
        self._port = port
        self._scale = scale
        self.tls = tls_context(identity)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
        seconds: float = 30,
    ) -> Response:
        """Make a request. A body of bytes goes as it is, a path's content is streamed, any other value as JSON.

        Raises: OSError, ssl.SSLError, http.client.HTTPException when there is no answer.
        """
        sent = dict(headers or {})
        if body is not None and not isinstance(body, bytes) and not hasattr(body, "read"):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPSConnection(
            self._address, self._port, timeout=seconds * self._scale, context=self.tls
        )
        try:
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            lowered = {name.lower(): value for name, value in answer.getheaders()}
            return Response(answer.status, lowered, answer.read())
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None, *, expect: int | None = None, seconds: float = 30) -> Any:
        """Make a request and return its JSON answer (None when empty).

        Raises: ApiError when the status is not ``expect`` (default: any 2xx); and as request().
        """
        response = self.request(method, path, body, seconds=seconds)
        fits = response.status == expect if expect is not None else response.status // 100 == 2
        if not fits:
            raise ApiError(f"{method} {path}: {response.status}: {response.body.decode(errors='replace')}")
        return response.json() if response.body else None

    def reachable(self, seconds: float = _CONNECT_SECONDS) -> bool:
        """Whether the API answers its banner right now.

        QEMU accepts the connection even for a machine that is not there to take it, so a "no" costs ``seconds``.
        """
        try:
            return self.request("GET", "/v1/banner", seconds=seconds).status == 200
        except (OSError, http.client.HTTPException):
            return False

    def ready(self) -> bool:
        """Whether core answers an administrator, and libvirt answers core."""
        try:
            answer = self.request("GET", "/v1/health")
        except (OSError, http.client.HTTPException):
            return False
        checks = answer.json()["checks"] if answer.status == 200 else ()
        return any(check["name"] == "libvirt" and check["ok"] for check in checks)

    def console(self, machine: str) -> Console:
        """Open a machine's serial console; the caller closes it.

        Raises: ApiError when the API refuses, or names another machine.
        """
        url = f"wss://{self._address}:{self._port}/v1/machines/{machine}/console"
        opened, stream = connect(url, self.tls, _CONNECT_SECONDS * self._scale)
        if opened.get("machine") != machine:
            stream.close()
            raise ApiError(f"the console of {machine}: {opened}")
        return Console(stream, name=f"console of {machine}", scale=self._scale)


def tls_context(identity: Identity | None) -> ssl.SSLContext:
    """TLS 1.3 with the identity's certificate; the host's own is not verified (tests of it look for themselves)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if identity:
        context.load_cert_chain(identity.certificate, identity.key)
    return context
