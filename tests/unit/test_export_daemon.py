"""The export beside a real audit store and a real rsyslogd: what arrives, who is refused, what outlasts a kill."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from tests.harness.collector import Authority, Collector
from tests.unit.test_api_tls import CONF
from tests.unit.test_audit_daemon import ME, OWN, LocalAnchor, stored
from vmm import status, wire
from vmm.audit.client import AuditClient
from vmm.audit.journal import Journal
from vmm.audit.records import Entry, Producer, digest
from vmm.audit.server import Service
from vmm.audit.store import Store
from vmm.audit.verify import verify_file
from vmm.config.types import AuditServer, Export
from vmm.errors import Forbidden, UserError
from vmm.export import link
from vmm.export.channel import Channel, Failure, _names, client_context
from vmm.export.daemon import Daemon, Positions, Settings
from vmm.export.status import Status
from vmm.paths import EXPORT_STATUS
from vmm.process import spawn
from vmm.tls import check_policy, make_pair

pytestmark = pytest.mark.sfr("FAU_STG_EXT.1", "FTP_ITC_EXT.1")

AUTHORITY = Authority.make("authority")
NAME = "logs.example.org"


def said_by(root: Path) -> Status | None:
    """What an export that lives says of itself."""
    return status.read(EXPORT_STATUS, Status, root)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "SETTLE_S", 0.5)
    monkeypatch.setattr(link, "_TICK_S", 0.05)
    monkeypatch.setattr(link, "FIRST_S", 0.05)
    monkeypatch.setattr(link, "MOST_S", 0.2)


@asynccontextmanager
async def auditing(folder: Path, path: Path | None = None) -> AsyncIterator[Journal]:
    """An audit daemon that takes us for the exporter, and for nothing else."""
    store = folder / "store"
    store.mkdir(exist_ok=True)
    journal = Journal(Store(store, producer=Producer(OWN.uid, OWN.unit), boot="boot"))
    anchor = LocalAnchor(folder / "anchor")
    service = Service(journal, OWN, {ME: "holdfast-export"}, frozenset(), anchor=anchor, exporters=frozenset({ME}))
    committing = asyncio.create_task(journal.run())
    try:
        await service.open()
        async with await wire.serve(path or folder / "audit.sock", service.handle):
            yield journal
    finally:
        committing.cancel()
        journal.store.close()


def settings(folder: Path) -> Settings:
    (folder / "state").mkdir(exist_ok=True)
    return Settings(
        folder / "export.json", folder / "state", folder / "status.json", folder / "audit.sock", lambda _context: None
    )


@asynccontextmanager
async def exporting(folder: Path, *servers: AuditServer) -> AsyncIterator[Daemon]:
    made = Daemon(settings(folder), Export("hf1", "192.0.2.7/24", servers), AuditClient(folder / "audit.sock"))
    stop = asyncio.Event()
    running = asyncio.create_task(made.run(stop))
    try:
        yield made
    finally:
        stop.set()
        await running


async def until(condition: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(20):
        while not condition():
            assert what
            await asyncio.sleep(0.02)


def fingerprint(folder: Path) -> str:
    """How servers know us; the key is made if need be."""
    context = client_context(settings(folder).state, "hf1", "192.0.2.7/24", AUTHORITY.pem, lambda _context: None)
    assert context.verify_mode == ssl.CERT_REQUIRED and context.check_hostname
    pem = (folder / "state/client.crt").read_text()
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def server(collector: Collector, ca: str = AUTHORITY.pem, name: str = NAME) -> AuditServer:
    return AuditServer("127.0.0.1", ca, collector.port, name)


async def fill(journal: Journal, count: int) -> None:
    for number in range(count):
        await journal.append(Entry(type="machine.stop", request=f"r{number}"), Producer(902, "holdfast-core"))


def test_all_records_arrive_and_after_an_outage_the_rest(tmp_path: Path) -> None:
    AUTHORITY.issue(tmp_path / "collector", NAME)

    async def run() -> None:
        with Collector(tmp_path / "collector") as collector:
            collector.start(fingerprint(tmp_path))
            async with auditing(tmp_path) as journal:
                await fill(journal, 1500)
                async with exporting(tmp_path, server(collector)) as daemon:
                    await until(lambda: len(collector.received()) >= 1502, "all")
                    (one,) = daemon._links.values()
                    await until(lambda: one.settled == 1502 == journal.store.memory.exported, "settled")
                    collector.stop()
                    await until(lambda: one.status().state in ("waiting", "connecting"), "the outage is noticed")
                    assert one.status().problem
                    await fill(journal, 3)
                    before = [got.seq for got in collector.received()]
                    assert sorted(set(before)) == list(range(1, max(before) + 1))
                    settled = one.settled
                    collector.start(fingerprint(tmp_path))
                    await until(lambda: one.settled == journal.store.end[0], "the rest")
                    after = [got.seq for got in collector.received()]
                    assert after == list(range(settled + 1, journal.store.end[0] + 1))
                # Told that it ends, it asked the server whether it has all, which outlasts the process.
                assert Positions(tmp_path / "state").of(server(collector)) == one.settled
                for got in collector.received():
                    assert got.data["hash"] == digest(got.text + b"\n") and got.hostname == "hf1"

    asyncio.run(run())
    said = [record for record in stored(tmp_path / "store") if record.type.startswith("export.")]
    # rsyslog ends without a word of TLS; while it is away, attempts may fail.
    assert [(r.type, r.outcome, r.reason) for r in said if r.reason != "Connection refused"] == [
        ("export.connect", "success", ""),
        ("export.disconnect", "failure", "the server closed the connection"),
        ("export.connect", "success", ""),
        ("export.disconnect", "success", "the export ends"),
    ]
    assert all(r.extra["remote_endpoint"].startswith("127.0.0.1:") for r in said)


@pytest.mark.parametrize(
    ("issuer", "name", "days", "kind", "reason", "presented"),
    [
        ("other", NAME, (-2, 2), "certificate", "unable to get local issuer certificate", ""),
        ("authority", "evil.example.org", (-2, 2), "identity", "Hostname mismatch", "DNS:evil.example.org"),
        ("authority", "127.0.0.1", (-2, 2), "identity", "Hostname mismatch", "IP:127.0.0.1"),
        ("authority", NAME, (-4, -2), "certificate", "certificate has expired", ""),
        ("authority", NAME, (2, 4), "certificate", "certificate is not yet valid", ""),
    ],
)
@pytest.mark.sfr("FIA_X509_EXT.1")
def test_a_server_that_is_not_who_it_must_be_gets_nothing(
    tmp_path: Path, issuer: str, name: str, days: tuple[int, int], kind: str, reason: str, presented: str
) -> None:
    (AUTHORITY if issuer == "authority" else Authority.make("other")).issue(tmp_path / "collector", name, days=days)

    async def run() -> None:
        with Collector(tmp_path / "collector") as collector:
            collector.start(fingerprint(tmp_path))
            context = client_context(tmp_path / "state", "hf1", "dhcp", AUTHORITY.pem, lambda _context: None)
            with pytest.raises(Failure) as caught:
                await Channel.open(server(collector), context)
            assert (caught.value.kind, caught.value.presented) == (kind, presented)
            assert reason in caught.value.reason and not collector.received()

    asyncio.run(run())


def test_a_server_that_stops_reading_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much waits in buffers on the way; what it has not taken is sent again."""
    monkeypatch.setattr(link, "STALL_S", 1.0)
    AUTHORITY.issue(tmp_path / "collector", NAME)
    fingerprint(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "collector/server.crt", tmp_path / "collector/server.key")
    context.load_verify_locations(tmp_path / "state/client.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)
        writer.close()

    async def run() -> None:
        async with auditing(tmp_path) as journal:
            for _ in range(600):
                entry = Entry(type="machine.stop", extra={"args": {"text": "x" * 30000}})
                await journal.append(entry, Producer(902, "holdfast-core"))
            listening = await asyncio.start_server(silent, "127.0.0.1", 0, ssl=context)
            port = listening.sockets[0].getsockname()[1]
            one = AuditServer("127.0.0.1", AUTHORITY.pem, port, NAME)
            async with exporting(tmp_path, one) as daemon:
                (only,) = daemon._links.values()
                await until(lambda: "took nothing" in only.status().problem, "it is left")
                assert only.status().sent < 601
            listening.close()

    asyncio.run(run())


def test_the_guide_s_rsyslog_keeps_what_verifies(tmp_path: Path) -> None:
    """The configuration that operators are given, with this test's paths in it."""
    AUTHORITY.issue(folder := tmp_path / "collector", NAME)
    (folder / "ca.pem").write_text(AUTHORITY.pem)
    page = (Path(__file__).parents[2] / "docs/operators-guide.md").read_text()
    (text,) = (block for block in page.split("```") if "imtcp" in block)
    kept = folder / "kept.jsonl"

    async def run() -> None:
        with Collector(folder) as collector:
            shown = fingerprint(tmp_path)
            pairs = ":".join(shown[i : i + 2] for i in range(0, 64, 2)).upper()
            made = text.strip()
            for theirs, ours in (
                ("/etc/ssl/logs-ca.pem", str(folder / "ca.pem")),
                ("/etc/ssl/logs.pem", str(folder / "server.crt")),
                ("/etc/ssl/private/logs.key", str(folder / "server.key")),
                ("12:34:…", pairs),
                ('"6514"', f'"{collector.port}"'),
                ("/var/log/holdfast.jsonl", str(kept)),
            ):
                assert theirs in made, theirs
                made = made.replace(theirs, ours)
            collector.start(shown, made + "\n")
            async with auditing(tmp_path) as journal, exporting(tmp_path, server(collector)) as daemon:
                args = {"args": {"text": "ü\x7f\x9b\u2028" * 2000}}
                await journal.append(Entry(type="machine.stop", extra=args), Producer(902, "holdfast-core"))
                (one,) = daemon._links.values()
                await until(lambda: one.settled == journal.store.end[0] == 3, "all of it settles")
                await until(lambda: kept.exists() and kept.read_bytes().count(b"\n") == 3, "all of it is kept")

    asyncio.run(run())
    assert verify_file(kept).problem is None


@pytest.mark.parametrize("strong", ["EC", "RSA"])
def test_the_process_as_its_unit_starts_it(tmp_path: Path, strong: Literal["EC", "RSA"]) -> None:
    """With the image's TLS settings; it sends until it is told to end, and keeps what the server has."""
    authority = Authority.make("authority", strong)
    authority.issue(folder := tmp_path / "collector", NAME, strong=strong)
    for path in ("run/holdfast/audit", "run/holdfast/export", "var/lib/holdfast/export"):
        (tmp_path / path).mkdir(parents=True)
    state = tmp_path / "var/lib/holdfast/export"
    # As another start of it left it.
    make_pair(state, "client", "hf1", "dhcp")
    shown = hashlib.sha256(ssl.PEM_cert_to_DER_cert((state / "client.crt").read_text())).hexdigest()

    async def run() -> None:
        with Collector(folder) as collector:
            collector.start(shown)
            export = Export("hf1", "dhcp", (server(collector, authority.pem),))
            (tmp_path / "run/holdfast/export.json").write_bytes(msgspec.json.encode(export))
            async with auditing(tmp_path, tmp_path / "run/holdfast/audit/audit.sock") as journal:
                environment = {"HOLDFAST_ROOT": str(tmp_path), "OPENSSL_CONF": str(CONF)}
                process = spawn([sys.executable, "-m", "vmm.export"], env=environment)
                try:
                    await until(lambda: len(collector.received()) == 2, "the start, and the session")
                    (tmp_path / "proc" / str(process.pid)).mkdir(parents=True)
                    await until(lambda: (said := said_by(tmp_path)) and said.servers[0].sent == 2, "it is said")
                    process.terminate()
                    assert await asyncio.to_thread(process.wait, 10) == 0
                finally:
                    process.kill()
                    process.wait()
                assert len(collector.received()) == 2 and journal.store.end[0] == 3

    asyncio.run(run())
    (position,) = msgspec.json.decode((state / "positions.json").read_bytes()).values()
    # That rsyslog answered the end of the session; else it would get both again.
    assert position == 2
    assert stored(tmp_path / "store")[-1].reason == "the export ends"


def test_a_server_that_does_not_know_the_host_ends_the_connection(tmp_path: Path) -> None:
    AUTHORITY.issue(tmp_path / "collector", NAME)

    async def run() -> None:
        with Collector(tmp_path / "collector") as collector:
            collector.start("00" * 32)
            async with auditing(tmp_path) as journal, exporting(tmp_path, server(collector)) as daemon:
                await fill(journal, 3)
                (one,) = daemon._links.values()
                await until(lambda: one.status().problem, "it is told")
                assert one.settled == journal.store.memory.exported == 0 and not collector.received()

    asyncio.run(run())


def test_who_is_no_server_of_ours_is_told_from_who_does_not_answer(tmp_path: Path) -> None:
    fingerprint(tmp_path)

    async def run() -> None:
        async def talk(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"220 hello\r\n")
            await writer.drain()
            writer.close()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        context = client_context(tmp_path / "state", "hf1", "dhcp", AUTHORITY.pem, lambda _context: None)
        for handler, kind, reason in (
            (talk, "tls", "WRONG_VERSION_NUMBER"),
            (silent, "network", "no connection within"),
        ):
            async with await asyncio.start_server(handler, "127.0.0.1", 0) as listening:
                port = listening.sockets[0].getsockname()[1]
                with pytest.raises(Failure, match=reason) as caught:
                    await Channel.open(AuditServer("127.0.0.1", "", port, NAME), context, 0.5)
                assert caught.value.kind == kind
        with pytest.raises(Failure, match="Connection refused"):
            await Channel.open(AuditServer("127.0.0.1", "", port, NAME), context)

    asyncio.run(run())


def test_the_exporter_reads_and_may_nothing_else(tmp_path: Path) -> None:
    async def run() -> None:
        async with auditing(tmp_path):
            audit = AuditClient(tmp_path / "audit.sock")
            assert (await audit.read(0, 10))["records"]
            for method in ("status", "checkpoint", "purge", "rule", "operation"):
                with pytest.raises(Forbidden):
                    await audit._call(method, {})
            with pytest.raises(UserError, match="does not write machine.stop"):
                await audit.append(Entry(type="machine.stop"))

    asyncio.run(run())


def test_positions_outlast_the_process_and_a_damaged_file_costs_doubles_only(tmp_path: Path) -> None:
    one, other = AuditServer("192.0.2.9", ""), AuditServer("192.0.2.9", "", name="logs")
    assert Positions(tmp_path).of(one) == 0
    assert Positions(tmp_path).save({"192.0.2.9:6514 192.0.2.9": 7})
    assert (Positions(tmp_path).of(one), Positions(tmp_path).of(other)) == (7, 0)
    assert (tmp_path / "positions.json").stat().st_mode & 0o777 == 0o600
    for content in (b"", b"[1]", b'{"192.0.2.9:6514 192.0.2.9": -7}'):
        (tmp_path / "positions.json").write_bytes(content)
        assert Positions(tmp_path).of(one) == 0


def test_the_status_counts_while_its_writer_lives(tmp_path: Path) -> None:
    path = tmp_path / "run/holdfast/export/status.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "proc/77").mkdir(parents=True)
    good = Status(int(time.monotonic()), 77, "pem", ())
    assert said_by(tmp_path) is None
    for said, counts in (
        (good, True),
        (msgspec.structs.replace(good, pid=78), False),
        (msgspec.structs.replace(good, at=good.at - 61), False),
    ):
        path.write_bytes(msgspec.json.encode(said))
        assert (said_by(tmp_path) == said) is counts
    path.write_bytes(b"{")
    assert said_by(tmp_path) is None


def test_it_does_not_begin_with_foreign_tls_settings(tmp_path: Path) -> None:
    """OpenSSL's own are not ours; the unit names the file that makes them so."""
    assert "OPENSSL_CONF" not in os.environ
    with pytest.raises(UserError, match="OpenSSL offers"):
        client_context(tmp_path, "hf1", "dhcp", AUTHORITY.pem, check_policy)


def test_whom_a_certificate_names_is_told_of_any(tmp_path: Path) -> None:
    assert _names(b"no certificate") == "a certificate that cannot be read"
    assert _names(ssl.PEM_cert_to_DER_cert(AUTHORITY.pem)) == "CN=authority"
    AUTHORITY.issue(tmp_path, "x" * 40 + ".example.org")
    assert _names(ssl.PEM_cert_to_DER_cert((tmp_path / "server.crt").read_text())) == f"DNS:{'x' * 40}.example.org"
