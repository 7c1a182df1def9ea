"""The fetcher against servers that are slow, endless, elsewhere, or not who they should be."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.unit.test_update_rig import SECONDS, Repository
from vmm import wire
from vmm.errors import Unavailable, UserError
from vmm.update import fetch, trust
from vmm.update.clock import Moment
from vmm.update.errors import Cancelled, Missing, Refused
from vmm.update.job import Job
from vmm.update.protocol import FetchRequest, FetchResult
from vmm.update.source import HttpSource

CONTENT = bytes(range(256)) * 1000
Handler = Callable[[web.Request], Coroutine[Any, Any, web.StreamResponse]]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A server's key with its certificate in one file, and the certificate."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "repository")])
    now = datetime.datetime.now(datetime.UTC)
    usage = {"digital_signature": True, "key_cert_sign": True, "crl_sign": True}
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(
            x509.KeyUsage(**usage, **dict.fromkeys(others, False), encipher_only=False, decipher_only=False), True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .sign(key, hashes.SHA256())
    )
    pem = made.public_bytes(serialization.Encoding.PEM)
    form = serialization.PrivateFormat.PKCS8
    secret = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(secret + pem)
    return path, pem.decode()


@asynccontextmanager
async def serving(certificate: tuple[Path, str], handler: Handler) -> AsyncIterator[str]:
    """A web server that answers everything with the handler; yields its address."""
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate[0])
    listening = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listening, ssl_context=context).start()
    try:
        yield f"https://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        await runner.cleanup()


async def once(request: FetchRequest, pace: fetch.Pace) -> tuple[bytes, FetchResult]:
    """One download; returns what came."""
    received = bytearray()

    async def send(piece: bytes) -> None:
        received.extend(piece)

    downloads = fetch.Downloads(pace)
    try:
        result = await downloads.fetch(request, send)
    finally:
        await downloads.close()
    return bytes(received), result


def attempt(
    certificate: tuple[Path, str],
    handler: Handler,
    *,
    path: str = "/x",
    pace: fetch.Pace | None = None,
    ca: str | None = None,
    **fields: Any,
) -> tuple[bytes, FetchResult]:
    """Fetch once; returns what came."""

    async def run() -> tuple[bytes, FetchResult]:
        async with serving(certificate, handler) as address:
            known = certificate[1] if ca is None else ca
            request = FetchRequest(address + path, ca=known, **{"limit": 1 << 20, "timeout": 5.0, **fields})
            return await once(request, pace or fetch.Pace())

    return asyncio.run(run())


async def whole(request: web.Request) -> web.StreamResponse:
    """A server that knows ranges."""
    part = request.http_range
    if part.start is None:
        return web.Response(body=CONTENT)
    if part.start >= len(CONTENT):
        return web.Response(status=416)
    where = f"bytes {part.start}-{len(CONTENT) - 1}/{len(CONTENT)}"
    return web.Response(status=206, body=CONTENT[part.start :], headers={"Content-Range": where})


async def without_ranges(request: web.Request) -> web.StreamResponse:
    return web.Response(body=CONTENT)


def test_all_of_it_and_the_rest_of_it(certificate: tuple[Path, str]) -> None:
    assert attempt(certificate, whole) == (CONTENT, FetchResult(200, len(CONTENT)))
    assert attempt(certificate, whole, offset=1000) == (CONTENT[1000:], FetchResult(206, len(CONTENT)))
    assert attempt(certificate, without_ranges, offset=1000) == (CONTENT[1000:], FetchResult(200, len(CONTENT)))
    assert attempt(certificate, whole, offset=len(CONTENT))[1].status == 416


@pytest.mark.parametrize("status", [404, 403, 500, 204])
def test_other_answers_bring_no_data(certificate: tuple[Path, str], status: int) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=b"" if status == 204 else b"a long page about it")

    assert attempt(certificate, answer) == (b"", FetchResult(status))


def test_no_more_than_expected(certificate: tuple[Path, str]) -> None:
    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with pytest.raises((ConnectionError, asyncio.CancelledError)):
            while True:
                await response.write(bytes(65536))
        return response

    with pytest.raises(Refused, match=r"length: the server announces 256000 bytes where at most 1000"):
        attempt(certificate, whole, limit=1000)
    with pytest.raises(Refused, match="length: the server sends more than the 100000"):
        attempt(certificate, endless, limit=100_000)


@pytest.mark.parametrize("where", ["bytes 0-99/256000", "bytes 1001-255999/256000", "bytes x", ""])
def test_another_range_than_asked_for(certificate: tuple[Path, str], where: str) -> None:
    async def wrong(request: web.Request) -> web.StreamResponse:
        return web.Response(status=206, body=b"x" * 100, headers={"Content-Range": where})

    for offset in (1000, 0):
        with pytest.raises(Refused, match="another range"):
            attempt(certificate, wrong, offset=offset)


def test_redirects_stay_on_the_host(certificate: tuple[Path, str]) -> None:
    async def redirect(request: web.Request) -> web.StreamResponse:
        match request.path:
            case "/near":
                raise web.HTTPFound("/there")
            case "/there":
                return web.Response(body=b"here")
            case "/loop":
                raise web.HTTPFound("/loop")
            case "/down":
                raise web.HTTPFound(f"http://{request.host}/there")
            case "/nowhere":
                return web.Response(status=302)
        raise web.HTTPFound("https://127.0.0.2:1/there")

    assert attempt(certificate, redirect, path="/near")[0] == b"here"
    with pytest.raises(Refused, match="more than 5 times"):
        attempt(certificate, redirect, path="/loop")
    for path in ("/far", "/down", "/nowhere"):
        with pytest.raises(Refused, match="transport: 127.0.0.1 redirects to another host"):
            attempt(certificate, redirect, path=path)


def test_slow_servers(certificate: tuple[Path, str]) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x")
            await asyncio.sleep(0.02)

    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(10)
        return web.Response()

    with pytest.raises(Refused, match="transport: the server sent .* which is too slow"):
        attempt(certificate, drip, pace=fetch.Pace(rate=1000, window=0.3))
    with pytest.raises(Unavailable, match="did not answer within 0.2 s"):
        attempt(certificate, silent, timeout=0.2)


def test_a_server_that_hangs_up(certificate: tuple[Path, str]) -> None:
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 100)
        assert request.transport
        request.transport.abort()
        return response

    with pytest.raises(Unavailable, match="cannot be read"):
        attempt(certificate, cut)


def test_who_the_server_is(certificate: tuple[Path, str]) -> None:
    with pytest.raises(Refused, match="TLS: 127.0.0.1"):
        attempt(certificate, whole, ca="")
    with pytest.raises(UserError, match="update.ca cannot be used"):
        attempt(certificate, whole, ca="-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x", "file:///etc/passwd", "https://", "x", "https://u:p@host/x", "ftp://h/x"]
)
def test_https_only(url: str) -> None:
    with pytest.raises(Refused, match="transport: "):
        asyncio.run(once(FetchRequest(url, limit=1), fetch.Pace()))
    with pytest.raises(Refused, match="the proxy must be"):
        asyncio.run(once(FetchRequest("https://127.0.0.1/", limit=1, proxy="socks5://h:1"), fetch.Pace()))


def test_nobody_there() -> None:
    with pytest.raises(Unavailable, match="the repository at 127.0.0.1 cannot be read"):
        asyncio.run(once(FetchRequest("https://127.0.0.1:9/x", limit=1, timeout=2), fetch.Pace()))


class Fetcher:
    """What systemd does: a fetcher for each connection, here in a thread of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = 0
        self._connections: list[socket.socket] = []
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._fetch, args=(connection,), daemon=True).start()

    def _fetch(self, connection: socket.socket) -> None:
        self.started += 1
        self._connections.append(connection.dup())
        asyncio.run(fetch.serve(connection))

    def end_all(self) -> None:
        """What a limit of the unit does."""
        for connection in self._connections:
            connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join(5)


def test_a_repository_through_the_fetcher(certificate: tuple[Path, str], tmp_path: Path) -> None:
    """TUF over HTTPS over the fetcher's socket; what is missing is told from what cannot be reached."""
    repository = Repository(tmp_path / "repository")
    repository.add("1.1.0")
    repository.publish()

    async def files(request: web.Request) -> web.StreamResponse:
        path = repository.folder / request.path.removeprefix("/holdfast/")
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    fetcher = Fetcher(tmp_path / "fetch.sock")

    def use(address: str) -> trust.Trusted:
        source = HttpSource(f"{address}/holdfast/", ca=certificate[1], fetcher=fetcher.path)
        with pytest.raises(Missing, match=r"no file metadata/9.root.json \(status 404\)"):
            list(source.read("metadata/9.root.json", limit=100))
        stored = "metadata/1.root.json"
        assert b"".join(source.read(stored, limit=1 << 20, offset=10)) == repository.root_json[10:]
        assert fetcher.started == 1, "one fetcher serves reads that follow each other"
        fetcher.end_all()
        assert b"".join(source.read(stored, limit=1 << 20)) == repository.root_json, "another takes its place"
        assert fetcher.started == 2
        with pytest.raises(Refused, match="length"):
            list(source.read(stored, limit=100))
        return trust.refresh(source, repository.root_json, tmp_path / "memory", Moment(SECONDS, "clock"))

    async def run() -> trust.Trusted:
        async with serving(certificate, files) as address:
            return await asyncio.to_thread(use, address)

    try:
        assert "holdfast_1.1.0/release.json" in asyncio.run(run()).targets
    finally:
        fetcher.close()


def answering(path: Path, *frames: bytes) -> threading.Thread:
    """A fetcher that was taken over: answers with these bytes."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()

    def serve() -> None:
        connection, _ = listening.accept()
        with connection, listening:
            connection.recv(65536)
            for frame in frames:
                try:
                    connection.sendall(frame)
                except OSError:
                    return

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return thread


def frame(kind: bytes, payload: bytes) -> bytes:
    return wire.HEADER.pack(kind, len(payload)) + payload


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        ((), Unavailable),
        ((frame(b"D", b"x" * 50), frame(b"D", b"x" * 51)), Refused),
        ((wire.HEADER.pack(b"D", 1 << 31),), Unavailable),
        ((wire.HEADER.pack(b"?", 1) + b"x",), Unavailable),
        ((frame(b"R", b"nonsense"),), Unavailable),
        ((frame(b"P", b"{}"),), Unavailable),
        ((frame(b"R", b'{"status": 302}'),), Unavailable),
        ((frame(b"D", b"x" * 10),), Unavailable),
        ((frame(b"P", b'{"code": "not-found", "status": 404, "detail": "x"}'),), UserError),
    ],
)
def test_a_fetcher_that_was_taken_over(tmp_path: Path, frames: tuple[bytes, ...], error: type[Exception]) -> None:
    thread = answering(tmp_path / "fetch.sock", *frames)
    source = HttpSource("https://example.test", fetcher=tmp_path / "fetch.sock")
    with pytest.raises(error):
        list(source.read("metadata/timestamp.json", limit=100))
    thread.join(5)


def test_a_fetcher_that_says_nothing_can_be_cancelled(tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(tmp_path / "fetch.sock"))
    listening.listen()
    job = Job()
    source = HttpSource("https://example.test", fetcher=tmp_path / "fetch.sock", check=job.check)
    threading.Timer(0.1, job.cancel).start()
    with listening, pytest.raises(Cancelled):
        list(source.read("metadata/timestamp.json", limit=100))
    with pytest.raises(Unavailable, match="the fetcher does not answer"):
        list(HttpSource("https://example.test", fetcher=tmp_path / "none").read("x", limit=1))


def test_the_fetcher_knows_one_method(tmp_path: Path) -> None:
    fetcher = Fetcher(tmp_path / "fetch.sock")
    try:
        with pytest.raises(UserError, match="no method 'upload'"):
            asyncio.run(wire.call(fetcher.path, "upload", {}))
        with pytest.raises(UserError, match="fetch: "):
            asyncio.run(wire.call(fetcher.path, "fetch", {"url": 7}))
    finally:
        fetcher.close()
