"""What the tests of the command share: a small API over real TLS, and a way to run commands against it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import WSMsgType, web

from tests.unit.test_config_rig import document, key_and_certificate
from vmm.audit.search import Finder, Query
from vmm.cli import identity, main
from vmm.cli.settings import directory

UUID = "6a5f7a39-7a1e-4c8e-9f2a-7d8c5b0f1a11"
MACHINE = {
    "name": "web",
    "uuid": UUID,
    "state": "running",
    "uid": 70000,
    "created": "2026-11-23T04:05:06Z",
    "cpus": 2,
    "memory": 1536 << 20,
    "disks": [{"volume": "v1"}],
    "networks": [{"network": "lan"}],
    "description": "",
}
STATS = {
    "name": "web",
    "uuid": UUID,
    "state": "running",
    "cpu_seconds": 12.345,
    "memory": 300 << 20,
    "disks": [{"name": "vda", "read_bytes": 1 << 20, "read_count": 9, "written_bytes": 2 << 20, "written_count": 8}],
    "networks": [{"name": "vnet0", "read_bytes": 1024, "read_count": 7, "written_bytes": 0, "written_count": 0}],
}
VOLUME = {
    "name": "v1",
    "uuid": UUID,
    "size": 1 << 30,
    "allocated": 1 << 20,
    "state": "ready",
    "machine": None,
    "created": "x",
}


@dataclass
class Seen:
    """One request: verb, path with query, fingerprint of the client's certificate, and body."""

    verb: str
    path: str
    identified: bool
    body: bytes


@dataclass
class FakeApi:
    """A server that answers as the API does, and remembers every request in order."""

    url: str = ""
    fingerprint: str = ""
    seen: list[Seen] = field(default_factory=list)
    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    # Answers to be had one after the other, by "GET /v1/version".
    turns: dict[str, list[Any]] = field(default_factory=dict)
    early: set[str] = field(default_factory=set)
    records: list[bytes] = field(default_factory=list)
    trail: Path = Path()
    typed: bytes = b""

    def paths(self) -> list[str]:
        """The requests so far, as "GET /v1/version"."""
        return [f"{request.verb} {request.path}" for request in self.seen]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request."""
        path = request.path
        identified = request.transport is not None and bool(
            request.transport.get_extra_info("ssl_object").getpeercert(binary_form=True)
        )
        # A server may refuse an upload before it has read it.
        body = b"" if path in self.early else await request.read()
        self.seen.append(Seen(request.method, str(request.rel_url), identified, body))
        if path == "/v1/banner":
            return web.json_response({"banner": "Authorised\x1b[2J use only."})
        if not identified:
            return self._problem(401, "no client certificate was shown")
        if path.endswith("/console") and path not in self.answers:
            return await self._console(request)
        if path == "/v1/audit":
            return self._audit(request)
        if path == "/v1/audit/follow" and path not in self.answers:
            return await self._follow(request)
        if turns := self.turns.get(f"{request.method} {path}"):
            return web.json_response(turns.pop(0))
        status, content = self.answers.get(path, (404, "no such thing"))
        if status >= 400:
            return self._problem(status, content)
        return web.Response(status=204) if status == 204 else web.json_response(content, status=status)

    def _audit(self, request: web.Request) -> web.Response:
        """As the audit daemon answers, two records a page."""
        self.trail.write_bytes(b"".join(record + b"\n" for record in self.records))
        query = msgspec.convert(dict(request.query), Query, strict=False)
        numbers = [json.loads(record)["seq"] for record in self.records] or [1]
        limited = msgspec.structs.replace(query, limit=min(query.limit, 2))
        page = Finder().page(limited, [(numbers[0], self.trail)], numbers[-1] if self.records else 0)
        text = b'{"records":[%s],"next":%s}' % (b",".join(page.records), json.dumps(page.next).encode())
        return web.Response(body=text, content_type="application/json")

    async def _follow(self, request: web.Request) -> web.StreamResponse:
        """All records behind what is asked for, in pieces that fit nothing, and no end."""
        response = web.StreamResponse()
        await response.prepare(request)
        lines = [record for record in self.records if json.loads(record)["seq"] > int(request.query.get("after", 0))]
        content = b"\n".join([b"", *lines, b""])
        for start in range(0, len(content), 100):
            await response.write(content[start : start + 100])
        assert request.transport is not None
        request.transport.close()
        return response

    def _problem(self, status: int, detail: str) -> web.Response:
        content = {
            "type": "urn:holdfast:problem:some-code",
            "title": "T",
            "status": status,
            "detail": detail,
            "hint": "try something else",
        }
        return web.json_response(content, status=status, content_type="application/problem+json")

    async def _console(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        await socket.send_str(json.dumps({"machine": "web", "uuid": UUID}))
        await socket.send_bytes(b"login: ")
        async for message in socket:
            if message.type is WSMsgType.BINARY:
                self.typed += message.data
                await socket.send_bytes(b"you typed " + message.data)
                if b"poweroff" in message.data:
                    break
        await socket.close()
        return socket


@contextmanager
def fake_api(folder: Path, *, maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> Iterator[FakeApi]:
    """Serve a FakeApi on a free port from a thread of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    key, certificate = key_and_certificate("server", "p384", None)
    (folder / "server.pem").write_text(key + certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = maximum
    context.load_cert_chain(folder / "server.pem")
    client = directory() / "client.crt"
    if client.exists():
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(client)
    api = FakeApi(fingerprint=hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate)).hexdigest(), trail=folder / "trail")
    loop = asyncio.new_event_loop()
    application = web.Application(client_max_size=64 << 20)
    application.router.add_route("*", "/{path:.*}", api.handle)
    runner = web.AppRunner(application, shutdown_timeout=1)

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        api.url = f"https://127.0.0.1:{runner.addresses[0][1]}"

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield api
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def enrolled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's folder with an identity in it."""
    monkeypatch.setenv("HOLDFAST_CONFIG_DIR", str(folder))
    folder.mkdir(exist_ok=True)
    key, certificate = identity.make("alice")
    (folder / "client.key").write_bytes(key)
    (folder / "client.crt").write_bytes(certificate)


def holdfast(*arguments: str) -> int:
    """Run the command in this process. Raises: UserError as the command would print it."""
    return main.run(arguments)


CONFIGURATION = document()
