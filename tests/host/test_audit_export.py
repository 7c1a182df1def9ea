"""The trail on its way to a server that is Debian's rsyslog: whole, unread, to nobody else, also after outages."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.harness.api import Api
from tests.harness.collector import Authority, Collector, Received
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.waiting import poll
from tests.host.test_api import records
from tests.host.test_audit_retention import fill
from vmm.audit.records import canonical, digest
from vmm.audit.verify import verify_file

pytestmark = pytest.mark.sfr("FAU_STG_EXT.1", "FTP_ITC_EXT.1", "FAU_GEN.1")

OUTSIDE = "10.0.2.2"
"""How the host reaches what listens on this machine."""
NAME = "logs.example.org"
_STORED = "/var/lib/holdfast/config/current.json"
_UNIT = "holdfast-export.service"
_CONNECT = """
import errno, os, socket, sys
user, address, port = sys.argv[1:]
os.setgroups([]); os.setgid(int(user)); os.setuid(int(user))
connection = socket.socket(); connection.settimeout(60)
code = connection.connect_ex((address, int(port)))
print(errno.errorcode.get(code, "connected"))
"""


@pytest.fixture
def authority() -> Authority:
    return Authority.make("authority")


@pytest.fixture
def collector(authority: Authority, workdir: Path) -> Iterator[Collector]:
    """A server that is who it should be, not yet started: nobody told it whom to receive from."""
    authority.issue(workdir / "collector", NAME)
    with Collector(workdir / "collector") as made:
        yield made


def entry(collector: Collector, authority: Authority, name: str = NAME) -> dict[str, Any]:
    """The server in a host's configuration."""
    return {"address": OUTSIDE, "port": collector.port, "ca": authority.pem, "name": name}


def export_to(host: Host, *servers: dict[str, Any], **kept: Any) -> None:
    """What a seed with servers has in force from the first start on, for a host that has its configuration."""
    document = json.loads(host.agent.read(_STORED))
    document["audit"] = {"export": servers, **kept}
    host.agent.write(_STORED, json.dumps(document).encode())
    host.agent.exec(["systemctl", "restart", "holdfast-configure.service"], seconds=60)
    assert host.agent.exec(["systemctl", "show", "--property=Result", "holdfast-configure.service"]).out.strip() == (
        "Result=success"
    )
    host.agent.exec(["systemctl", "start", _UNIT], seconds=60)


def shown(api: Api) -> Any:
    return api.call("GET", "/v1/audit/export")


def known_by(api: Api, host: Host) -> str:
    """The SHA-256 by which servers know the host, as an operator gets it."""
    pem: str = poll(lambda: shown(api)["certificate"], 60 * host.acceleration.scale, "the export has made its key")
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def verdict(api: Api) -> tuple[bool, str]:
    check = next(c for c in api.call("GET", "/v1/health")["checks"] if c["name"] == "audit-export")
    return check["ok"], check["detail"]


def arrived(host: Host, collector: Collector, last: int) -> list[Received]:
    """What came since the collector's start, once a record is among it."""
    seconds = 120 * host.acceleration.scale
    poll(lambda: any(got.seq >= last for got in collector.received()), seconds, f"record {last} arrives", interval=1)
    return collector.received()


def end(api: Api) -> int:
    """The number of the last record."""
    return int(api.call("GET", "/v1/audit?order=newest&limit=1")["records"][0]["seq"])


def test_the_trail_arrives_whole_and_after_an_outage_the_rest(
    host: Host, admin: Api, clients: dict[str, Identity], collector: Collector, authority: Authority, workdir: Path
) -> None:
    """Byte for byte, by numbers without a gap; on the wire nobody reads it; API and health say how it stands."""
    assert verdict(admin) == (True, "no server is configured")
    assert shown(admin)["servers"] == []
    inactive = host.agent.exec(["systemctl", "is-active", _UNIT], check=False).out.strip()
    assert inactive == "inactive"
    export_to(host, entry(collector, authority))
    peer = known_by(admin, host)
    poll(
        lambda: shown(admin)["servers"][0]["problem"] == "Connection refused", 60 * host.acceleration.scale, "an outage"
    )
    assert verdict(admin) == (False, f"{OUTSIDE}:{collector.port}: Connection refused")
    collector.start(peer)
    admin.call("POST", "/v1/volumes", {"name": "unmistakable", "size": 1 << 20})
    first = arrived(host, collector, end(admin))
    assert [got.seq for got in first] == list(range(1, first[-1].seq + 1))
    for got in first:
        assert got.text + b"\n" == canonical(got.record) and got.data["hash"] == digest(got.text + b"\n")
        assert (got.data["seq"], got.data["type"], got.data["outcome"], got.data["boot"]) == (
            *(str(got.record["seq"]), got.record["type"], got.record["outcome"], got.record["boot"]),
        )
        assert got.priority == (108 if got.record["outcome"] == "failure" else 110)
        assert (got.hostname, got.app, got.time) == ("hf1", got.record["producer"]["unit"], got.record["time"])
    mirror = workdir / "mirror.jsonl"
    mirror.write_bytes(b"".join(got.text + b"\n" for got in first))
    assert verify_file(mirror).problem is None
    assert [got.record for got in first] == records(admin)[: len(first)]
    poll(lambda: verdict(admin)[0], 60 * host.acceleration.scale, "the health is well again")
    poll(lambda: shown(admin)["servers"][0]["lag"] <= 5, 60 * host.acceleration.scale, "there is no lag")
    # Administrators and auditors may see that, others not.
    assert host.api(clients["auditor"]).call("GET", "/v1/audit/export")["servers"][0]["name"] == NAME
    host.api(clients["operator"]).call("GET", "/v1/audit/export", expect=403)

    collector.stop()
    waiting: dict[str, Any] = poll(
        lambda: next((s for s in shown(admin)["servers"] if s["problem"]), None),
        120 * host.acceleration.scale,
        "an outage",
    )
    admin.call("POST", "/v1/volumes", {"name": "meanwhile", "size": 1 << 20})
    assert not verdict(admin)[0]
    settled = shown(admin)["servers"][0]["settled"]
    assert waiting["settled"] <= settled and settled >= first[0].seq and shown(admin)["servers"][0]["lag"] > 0
    collector.start(peer)
    rest = [got.seq for got in arrived(host, collector, end(admin))]
    assert rest == list(range(settled + 1, rest[-1] + 1))
    # That is told every few seconds.
    poll(
        lambda: admin.call("GET", "/v1/audit/status")["exported"] >= settled,
        30 * host.acceleration.scale,
        "audit knows what the server has",
    )

    capture = (workdir / "management.pcap").read_bytes()
    for word in (b"unmistakable", b"meanwhile", b"holdfast@32473", b"volume.create"):
        assert word not in capture, word
    # And it is the capture of that: the host's client hello, and the name that it asks for, are in it.
    assert NAME.encode() in capture
    told = [record for record in records(admin) if record["type"].startswith("export.")]
    assert {record["extra"]["remote_endpoint"] for record in told} == {f"{OUTSIDE}:{collector.port}"}
    assert (told[0]["type"], told[0]["outcome"], told[0]["reason"]) == (
        "export.connect",
        "failure",
        "Connection refused",
    )
    assert {(r["type"], r["outcome"]) for r in told} >= {
        ("export.connect", "success"),
        ("export.disconnect", "failure"),
    }
    assert all(
        re.fullmatch(r"[0-9a-f]{64}", r["extra"]["server_certificate"]) for r in told if r["outcome"] == "success"
    )
    assert {(r["producer"]["uid"], r["producer"]["unit"]) for r in told} == {(908, "holdfast-export")}


@pytest.mark.sfr("FAU_STG.1")
def test_what_went_for_want_of_room_is_told_to_the_server(
    host: Host, admin: Api, collector: Collector, authority: Authority
) -> None:
    """With the server away and the quota used up, the oldest go; back again, it sees the gap, and reads how it came."""
    export_to(host, entry(collector, authority), keep_mib=32)
    collector.start(known_by(admin, host))
    before = arrived(host, collector, end(admin))
    seconds = 60 * host.acceleration.scale
    poll(lambda: shown(admin)["servers"][0]["settled"] >= before[-1].seq, seconds, "that settles", interval=1)
    collector.kill()
    assert not fill(host, 38)["refused"]
    first, known = (admin.call("GET", "/v1/audit/status")[name] for name in ("first", "exported"))
    assert before[-1].seq <= known < first - 1
    collector.start(known_by(admin, host))
    got = arrived(host, collector, end(admin))
    assert [one.seq for one in got] == list(range(first, got[-1].seq + 1))
    told = [one.record for one in got if one.data["type"] == "audit.removed"]
    assert told and told[-1]["outcome"] == "failure" and told[-1]["extra"]["last"] == first - 1
    assert sum(record["extra"]["lost"] for record in told) == first - 1 - known
    assert [record["extra"]["exported"] for record in told] == [known] * len(told)


@pytest.mark.sfr("FIA_X509_EXT.1", "FAU_SAA.1")
def test_false_servers_get_nothing_and_that_is_told(
    host: Host, admin: Api, collector: Collector, authority: Authority, workdir: Path
) -> None:
    """Of another authority, for another name, expired; beside them, the right one gets all."""
    Authority.make("authority").issue(workdir / "foreign", NAME)
    authority.issue(workdir / "misnamed", "evil.example.org")
    authority.issue(workdir / "expired", NAME, days=(-30, -1))
    with ExitStack() as stack:
        foreign, misnamed, expired = (
            stack.enter_context(Collector(workdir / folder)) for folder in ("foreign", "misnamed", "expired")
        )
        export_to(host, *(entry(one, authority) for one in (collector, foreign, misnamed, expired)))
        peer = known_by(admin, host)
        for one in (collector, foreign, misnamed, expired):
            one.start(peer)
        ports = {one.port: name for one, name in ((foreign, "foreign"), (misnamed, "misnamed"), (expired, "expired"))}

        def refused() -> dict[str, Any]:
            """The last record of each refusal by the false server."""
            told = [
                r for r in records(admin) if r["type"].startswith("export.") and "certificate refused" in r["reason"]
            ]
            return {ports[int(r["object"]["id"].rpartition(":")[2])]: r for r in told}

        poll(lambda: len(refused()) == 3, 180 * host.acceleration.scale, "all three are refused", interval=2)
        told = refused()
        for one, name in ((foreign, "foreign"), (misnamed, "misnamed"), (expired, "expired")):
            record = told[name]
            endpoint = f"{OUTSIDE}:{one.port}"
            assert (record["outcome"], record["phase"]) == ("failure", "event")
            assert record["object"] == {"kind": "server", "id": endpoint, "name": NAME}
            assert record["extra"]["remote_endpoint"] == endpoint
            assert record["actor"]["id"] == "holdfast" and record["producer"]["unit"] == "holdfast-export"
        assert told["misnamed"]["type"] == "export.identity"
        assert told["misnamed"]["extra"]["presented_identifier"] == "DNS:evil.example.org"
        assert told["misnamed"]["extra"]["reference_identifier"] == NAME
        assert "Hostname mismatch" in told["misnamed"]["reason"]
        assert told["foreign"]["type"] == told["expired"]["type"] == "export.connect"
        assert "certificate has expired" in told["expired"]["reason"]
        assert re.search("certificate signature failure|issuer certificate|self-signed", told["foreign"]["reason"])
        arrived(host, collector, told["misnamed"]["seq"])
        assert not (foreign.received() or misnamed.received() or expired.received())
        # Three servers have nothing, so nothing counts as known elsewhere.
        assert admin.call("GET", "/v1/audit/status")["exported"] == 0
        ok, detail = verdict(admin)
        assert not ok and all(str(one.port) in detail for one in (foreign, misnamed, expired))
        # And the guard raises its alarm.
        poll(
            lambda: "false-server" in {r["extra"]["rule"] for r in records(admin) if r["type"] == "guard.violation"},
            60 * host.acceleration.scale,
            "that is a violation",
        )


def test_the_export_reaches_its_servers_and_nobody_else(host: Host, collector: Collector, authority: Authority) -> None:
    """The packet filter stops its user, whatever it tries; others are free to."""
    export_to(host, entry(collector, authority))
    listeners = [socket.create_server(("127.0.0.1", port)) for port in (collector.port, 0)]
    for listener in listeners:
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    other = int(listeners[1].getsockname()[1])

    def tried(user: int, port: int) -> str:
        command = ["/usr/bin/python3", "-I", "-c", _CONNECT, str(user), OUTSIDE, str(port)]
        return host.agent.exec(command, seconds=60).out.strip()

    assert tried(908, collector.port) == tried(0, other) == "connected"
    assert tried(908, other) == "ECONNREFUSED"
    for listener in listeners:
        listener.close()


def _accept(listener: socket.socket) -> None:
    kept = []
    try:
        while True:
            kept.append(listener.accept())
    except OSError:
        return


def test_a_power_cut_costs_no_record(
    faulty_host: Host, clients: dict[str, Identity], collector: Collector, authority: Authority
) -> None:
    """What was recorded while the server was away, before the cut and after it, arrives once both are back."""
    admin = faulty_host.api(clients["admin"])
    export_to(faulty_host, entry(collector, authority))
    faulty_host.agent.exec(["sync"], seconds=60)
    peer = known_by(admin, faulty_host)
    collector.start(peer)
    first = arrived(faulty_host, collector, end(admin))
    seconds = 120 * faulty_host.acceleration.scale
    poll(lambda: shown(admin)["servers"][0]["settled"] >= first[-1].seq, seconds, "that settles", interval=1)
    collector.kill()
    for name in ("v1", "v2", "v3"):
        admin.call("POST", "/v1/volumes", {"name": name, "size": 1 << 20})
    last = end(admin)
    faulty_host.power_cut()
    faulty_host.power_on()
    faulty_host.wait_ready(clients["admin"], 180)
    assert known_by(admin := faulty_host.api(clients["admin"]), faulty_host) == peer
    collector.start(peer)
    got = arrived(faulty_host, collector, end(admin))
    numbers = [one.seq for one in got]
    assert numbers[0] <= first[-1].seq + 1 and last in numbers
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    boots = {one.data["boot"] for one in got}
    assert len(boots) == 2
    both = {one.seq: one.text for one in (*first, *got)}
    assert [json.loads(both[seq]) for seq in sorted(both)] == records(admin)[: len(both)]
