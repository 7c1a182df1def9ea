"""The harness' API client, against a TLS server in this process."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from tests.harness.api import Api, ApiError
from tests.harness.seed import Identity, make_identity


@dataclass(frozen=True)
class Served:
    """Where the server listens, and a client that it knows."""

    port: int
    client: Identity


async def banner(request: web.Request) -> web.Response:
    transport = request.transport
    assert transport
    return web.json_response({"certificate": bool(transport.get_extra_info("peercert"))})


async def echo(request: web.Request) -> web.Response:
    return web.json_response({"type": request.content_type, "body": (await request.read()).decode()}, status=201)


async def refuse(_: web.Request) -> web.Response:
    return web.json_response({"title": "no"}, status=403)


async def console(request: web.Request) -> web.WebSocketResponse:
    stream = web.WebSocketResponse()
    await stream.prepare(request)
    await stream.send_json({"machine": "vm1", "uuid": "u"})
    await stream.send_bytes(b"login: ")
    async for message in stream:
        if message.type is aiohttp.WSMsgType.BINARY:
            await stream.send_bytes(b"hello " + message.data)
            break
    await stream.close()
    return stream


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("keys")
    server, client = make_identity(folder, "server"), make_identity(folder, "client")
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(server.certificate, server.key)
    tls.verify_mode = ssl.CERT_OPTIONAL
    tls.load_verify_locations(client.certificate)
    application = web.Application()
    application.add_routes(
        [web.get("/v1/banner", banner), web.post("/v1/echo", echo), web.get("/v1/no", refuse),
         web.get("/v1/machines/vm1/console", console), web.get("/v1/machines/vm2/console", console)]
    )  # fmt: skip
    loop, runner, started = (
        asyncio.new_event_loop(),
        web.AppRunner(application, shutdown_timeout=0.1),
        threading.Event(),
    )
    port: list[int] = []

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        port.append(runner.addresses[0][1])
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    yield Served(port[0], client)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_the_certificate_is_sent_only_by_an_identity(served: Served) -> None:
    assert Api("127.0.0.1", served.port, served.client).call("GET", "/v1/banner") == {"certificate": True}
    assert Api("127.0.0.1", served.port).call("GET", "/v1/banner") == {"certificate": False}


def test_bodies_go_as_json_or_as_they_are(served: Served) -> None:
    api = Api("127.0.0.1", served.port)
    assert api.call("POST", "/v1/echo", {"a": 1}) == {"type": "application/json", "body": '{"a": 1}'}
    assert api.call("POST", "/v1/echo", b"raw", expect=201)["body"] == "raw"


def test_an_unexpected_status_is_an_error_with_the_answer(served: Served) -> None:
    api = Api("127.0.0.1", served.port)
    with pytest.raises(ApiError, match='GET /v1/no: 403: {"title": "no"}'):
        api.call("GET", "/v1/no")
    assert api.call("GET", "/v1/no", expect=403) == {"title": "no"}
    with pytest.raises(ApiError):
        api.call("GET", "/v1/banner", expect=204)


def test_reachable_tells_a_dead_port_from_a_live_one(served: Served) -> None:
    assert Api("127.0.0.1", served.port).reachable()
    assert not Api("127.0.0.1", 1).reachable()


def test_a_console_converses_both_ways(served: Served) -> None:
    api = Api("127.0.0.1", served.port)
    stream = api.console("vm1")
    stream.expect("login: ", 10)
    stream.send("root")
    stream.expect("hello root", 10)
    stream.close()


def test_another_machine_s_console_is_refused(served: Served) -> None:
    with pytest.raises(ApiError, match="the console of vm2"):
        Api("127.0.0.1", served.port).console("vm2")
    with pytest.raises(aiohttp.ClientError):
        Api("127.0.0.1", served.port).console("vm3")
