"""Who gets through the API's TLS, what is recorded of those who do not, and the listener's limits."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.unit.test_api_rig import ALICE, Identity, Rig, configuration, identity, rig
from vmm.api import connection, listener, tls
from vmm.audit.client import AuditClient, Entry
from vmm.audit.throttle import Throttle
from vmm.errors import UserError
from vmm.process import run, spawn
from vmm.tls import make_pair

CONF = Path(__file__).parents[2] / "image/rootfs/etc/ssl/holdfast.cnf"
AUTHORITY = identity("authority", use=None)


async def refusal(api: Rig, who: Identity | None) -> str:
    """Fail to get through, and return the reason as recorded."""
    before = len(api.recorded("tls.handshake"))
    async with api.client(who) as client:
        with pytest.raises((aiohttp.ClientError, OSError)):
            await client.get("/v1/banner")
    await api.until(lambda: len(api.recorded("tls.handshake")) > before)
    record = api.recorded("tls.handshake")[-1]
    assert record["outcome"] == "failure" and record["actor"]["origin"].startswith("127.0.0.1:")
    return str(record["reason"])


def test_good_certificates(tmp_path: Path) -> None:
    issued = identity("issued", issuer=AUTHORITY)
    strong = identity("strong", bits=3072)

    async def check() -> None:
        async with rig(tmp_path, ALICE, issued, strong) as api:
            for who in (ALICE, issued, strong):
                async with api.client(who) as client, client.get("/v1/version") as answer:
                    assert answer.status == 200
                    assert answer.connection is None or answer.connection.transport is not None
                caller = api.calls[-1].params["caller"]
                assert caller["fingerprint"] == who.fingerprint
                assert caller["subject"] == who.certificate.subject.rfc4514_string()
                assert caller["request_id"] == answer.headers["X-Request-Id"]

    asyncio.run(check())


def test_bad_certificates_and_protocols_are_refused_and_recorded(tmp_path: Path) -> None:
    issued, sibling = identity("issued", issuer=AUTHORITY), identity("sibling", issuer=AUTHORITY)
    expired, early = identity("expired", days=(-2, -1)), identity("early", days=(1, 2))
    wrong = identity("wrong", use=ExtendedKeyUsageOID.SERVER_AUTH)
    pinned = (ALICE, issued, expired, early, wrong)

    async def check(cases: list[tuple[Identity, str]]) -> None:
        async with rig(tmp_path, *pinned) as api:
            for who, reason in cases:
                assert reason in await refusal(api, who)
            assert not api.calls and not api.recorded("session.start")

    asyncio.run(check([(identity("mallory"), "self-signed certificate"), (sibling, "unable to get local issuer")]))
    asyncio.run(check([(identity("alice", bits=2048), "self-signed"), (expired, "has expired")]))
    asyncio.run(check([(early, "not yet valid"), (wrong, "purpose")]))


def test_other_protocols_get_no_answer(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.write(b"GET /v1/banner HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"HTTP" not in await reader.read()
            writer.close()
            old = api.tls(ALICE)
            old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises(OSError):
                await asyncio.open_connection("127.0.0.1", api.port, ssl=old)
            _, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.close()
            await api.until(lambda: len(api.recorded("tls.handshake")) == 3)
            reasons = [entry["reason"] for entry in api.recorded("tls.handshake")]
            assert reasons == ["HTTP_REQUEST", "UNSUPPORTED_PROTOCOL", "connection closed during the handshake"]

    asyncio.run(check())


def test_silence_instead_of_a_handshake_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE", 0.1)

    async def check() -> None:
        async with rig(tmp_path) as api:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            async with asyncio.timeout(2):
                assert await reader.read() == b""
            writer.close()
            await api.until(lambda: bool(api.recorded("tls.handshake")))
            assert api.recorded("tls.handshake")[0]["reason"] == "no handshake within 0.1 s"

    asyncio.run(check())


def test_connection_tells_neither_tickets_nor_administrators(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api:
            command = ["openssl", "s_client", "-connect", f"127.0.0.1:{api.port}"]
            shown = (await asyncio.to_thread(run, command, input="", check=False)).stdout
            assert "No client certificate CA names sent" in shown and "TLSv1.3" in shown
            reader, writer = await api.raw()
            writer.write(b"GET /v1/banner HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            session = writer.get_extra_info("ssl_object").session
            assert session is None or not session.has_ticket
            writer.close()

    asyncio.run(check())


def test_refusals_are_recorded_at_a_bounded_rate(tmp_path: Path) -> None:
    async def check() -> Rig:
        async with rig(tmp_path) as api:
            for _ in range(12):
                _, writer = await asyncio.open_connection("127.0.0.1", api.port)
                writer.close()
                await writer.wait_closed()
            await api.until(lambda: len(api.recorded("tls.handshake")) == 5)
            await asyncio.sleep(0.05)
            assert len(api.recorded("tls.handshake")) == 5
        return api

    records = asyncio.run(check()).recorded("tls.handshake")
    assert [record["extra"] for record in records] == [{}] * 5 + [{"suppressed": 6}]


def test_noise_keeps_no_refused_certificate_from_being_on_record(tmp_path: Path) -> None:
    """Who tries certificates is counted, however many connect beside and say nothing."""

    async def check() -> None:
        async with rig(tmp_path) as api:
            for _ in range(12):
                _, writer = await asyncio.open_connection("127.0.0.1", api.port)
                writer.close()
                await writer.wait_closed()
            await api.until(lambda: len(api.recorded("tls.handshake")) == 5)
            assert (await refusal(api, identity("mallory"))).startswith("certificate refused")

    asyncio.run(check())


def test_throttle_lets_records_through_again_with_time() -> None:
    class Audit(AuditClient):
        seen: list[Any] = []

        async def append(self, entry: Entry) -> int:
            self.seen.append((entry.reason, entry.extra.get("suppressed", 0)))
            return 1

    async def check() -> None:
        throttle = Throttle(Audit().append, "test", burst=2, interval=0.1)
        for number in range(5):
            throttle.report(Entry(type="test.x", reason=str(number)))
        async with asyncio.timeout(5):
            while len(Audit.seen) < 3:
                await asyncio.sleep(0.01)
        assert Audit.seen == [("0", 0), ("1", 0), ("4", 2)]
        await asyncio.sleep(0.2)
        throttle.report(Entry(type="test.x", reason="5"))
        await throttle.close()
        assert Audit.seen[3:] == [("5", 0)]

    asyncio.run(check())


def test_connections_of_one_source_are_limited(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api:
            held = [await api.raw() for _ in range(listener.MAX_PER_SOURCE)]
            with pytest.raises(OSError):
                await api.raw()
            await api.until(lambda: bool(api.recorded("tls.handshake")))
            assert api.recorded("tls.handshake")[0]["reason"] == "too many connections"
            held.pop()[1].close()
            await api.until(lambda: len(api.daemon.listener.connections) < listener.MAX_PER_SOURCE)
            held.append(await api.raw())
            for _, writer in held:
                writer.close()

    asyncio.run(check())


def test_idle_and_flooding_connections_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "FIRST_REQUEST", 0.1)

    async def check() -> None:
        async with rig(tmp_path) as api:
            reader, writer = await api.raw(None)
            writer.write(b"GET /v1/banner HTTP/1.1\r\n")
            async with asyncio.timeout(2):
                assert await reader.read() == b""
            writer.close()

            release = asyncio.Event()
            api.core = lambda *_: release.wait()
            reader, writer = await api.raw()
            with pytest.raises(OSError):
                for _ in range(100):
                    writer.write(b"GET /v1/version HTTP/1.1\r\nHost: x\r\n\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.001)
                raise AssertionError("a hundred requests were queued")
            release.set()
            writer.close()

    asyncio.run(check())


def test_sessions_are_recorded(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api:
            async with api.client() as client:
                for _ in range(3):
                    await (await client.get("/v1/version")).read()
            await api.until(lambda: bool(api.recorded("session.end")))
            assert [entry["type"] for entry in api.entries] == ["session.start", "session.end"]
            start, end = api.entries
            assert start["object"] == end["object"] and start["object"]["kind"] == "session"
            assert start["actor"] == end["actor"] and start["actor"]["id"] == ALICE.fingerprint
            assert start["actor"]["origin"] == api.calls[0].params["caller"]["origin"]
            assert end["extra"]["subject"] == "CN=alice"
            assert end["extra"]["start_time"] == start["extra"]["start_time"] <= end["extra"]["end_time"]

    asyncio.run(check())


def test_reload_follows_the_configuration(tmp_path: Path) -> None:
    bob = identity("bob")

    async def check() -> None:
        async with rig(tmp_path, ALICE, bob) as api:
            async with api.client(ALICE) as alice, api.client(bob) as bobs:
                for client in (alice, bobs):
                    await (await client.get("/v1/version")).read()
                (tmp_path / "config.json").write_bytes(b"{}")
                api.daemon.reload()
                assert (await alice.get("/v1/version")).status == 200
                (tmp_path / "config.json").write_bytes(configuration(ALICE, banner="New."))
                api.daemon.reload()
                await api.until(lambda: len(api.daemon.listener.connections) == 1)
                answer = await alice.get("/v1/banner")
                assert await answer.json() == {"banner": "New."}
            assert "self-signed" in await refusal(api, bob)

    asyncio.run(check())


def test_server_files_are_kept_and_remade_when_unusable(tmp_path: Path) -> None:
    key, certificate = tmp_path / "server.key", tmp_path / "server.crt"

    def start() -> bytes:
        tls.server_context(tmp_path, "hf1", "fd00::1/64", [ALICE.pem])
        return certificate.read_bytes()

    first = start()
    assert (key.stat().st_mode & 0o777, certificate.stat().st_mode & 0o777) == (0o600, 0o644)
    assert start() == first
    for path in (key, certificate):
        for content in (b"", path.read_bytes()[:100]):
            kept = certificate.read_bytes()
            path.write_bytes(content)
            assert start() != kept
    kept = certificate.read_bytes()
    make_pair(tmp_path, "server", "x" * 63 + ".example", "dhcp")
    certificate.write_bytes(kept)
    assert start() != kept


def test_unreadable_pinned_certificate_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pinned certificate"):
        tls.server_context(tmp_path, "hf1", "dhcp", ["-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])


POLICY = """
import ssl, sys
from pathlib import Path
from vmm.api import tls
from vmm.tls import check_policy, make_pair
directory = Path(sys.argv[1])
make_pair(directory, "server", "hf1", "dhcp")
server = tls.server_context(directory, "hf1", "dhcp", [(directory / "server.crt").read_text()])
check_policy(server)
for group in sys.argv[2:]:
    client = ssl.create_default_context(cafile=directory / "server.crt")
    client.set_ecdh_curve(group)
    pipes = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(pipes[0], pipes[1], server_hostname="hf1"), server.wrap_bio(pipes[1], pipes[0], True)]
    done = set()
    try:
        while len(done) < 2:
            for end in ends:
                try:
                    end.do_handshake()
                    done.add(end)
                except ssl.SSLWantReadError:
                    pass
        print(group, ends[0].cipher()[0])
    except ssl.SSLError as error:
        print(group, "refused")
"""


def test_the_image_s_policy_limits_suites_and_groups(tmp_path: Path) -> None:
    command = [sys.executable, "-c", POLICY, str(tmp_path), "secp384r1", "prime256v1", "X25519", "secp521r1"]
    shown = run(command, env={"OPENSSL_CONF": str(CONF)}).stdout.splitlines()
    suite = "TLS_AES_256_GCM_SHA384"
    assert shown == [f"secp384r1 {suite}", f"prime256v1 {suite}", "X25519 refused", "secp521r1 refused"]
    plain = run(command, check=False, env={"OPENSSL_CONF": "/dev/null"})
    assert "CHACHA20" in plain.stderr and plain.returncode == 1


def test_daemon_process_ready_reload_stop(tmp_path: Path) -> None:
    (tmp_path / "run/holdfast").mkdir(parents=True)
    (tmp_path / "var/lib/holdfast/api").mkdir(parents=True)
    config = tmp_path / "run/holdfast/config.json"
    config.write_bytes(configuration(ALICE))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"import asyncio, vmm.api.daemon as d; asyncio.run(d.serve(d.Settings(port={port})))"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        env = {"HOLDFAST_ROOT": str(tmp_path), "OPENSSL_CONF": str(CONF), "NOTIFY_SOCKET": str(tmp_path / "notify")}
        process = spawn([sys.executable, "-c", code], env=env)
        try:
            assert manager.recv(100) == b"READY=1"

            async def banner() -> Any:
                context = ssl.create_default_context(cafile=tmp_path / "var/lib/holdfast/api/server.crt")
                async with aiohttp.ClientSession() as client:
                    return await (await client.get(f"https://127.0.0.1:{port}/v1/banner", ssl=context)).json()

            assert asyncio.run(banner()) == {"banner": "Authorised use only."}
            config.write_bytes(configuration(ALICE, banner="New."))
            os.kill(process.pid, signal.SIGHUP)
            while asyncio.run(banner()) != {"banner": "New."}:
                pass
            process.terminate()
            assert process.wait(5) == 0
        finally:
            process.kill()
            process.wait()
