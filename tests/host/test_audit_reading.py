"""Reading the trail of a booted host: what can be chosen, following it, who may, and a part that proves itself."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.waiting import poll
from tests.harness.workstation import Workstation
from tests.host.test_api import records
from vmm.audit.records import canonical
from vmm.audit.verify import verify_file
from vmm.cli.client import server_fingerprint
from vmm.core.follow import MOST_EACH

Record = dict[str, Any]


class Follower:
    """A call to follow the trail, line by line."""

    def __init__(self, host: Host, identity: Identity, **query: str) -> None:
        api = host.api(identity)
        self.connection = http.client.HTTPSConnection(
            "127.0.0.1", host.port, timeout=30 * host.acceleration.scale, context=api.tls
        )
        self.connection.request("GET", f"/v1/audit/follow?{urlencode(query)}")
        self.answer = self.connection.getresponse()

    def next(self) -> Record:
        """The next record; empty lines are passed over."""
        while not (line := self.answer.readline()).strip():
            assert line, "the host ended it"
        found: Record = json.loads(line)
        assert canonical(found) == line
        return found

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


@contextmanager
def following(host: Host, identity: Identity, **query: str) -> Iterator[Follower]:
    follower = Follower(host, identity, **query)
    try:
        assert follower.answer.status == 200, follower.answer.read()
        yield follower
    finally:
        follower.close()


def chosen(api: Api, **query: Any) -> list[Record]:
    """All pages of what is chosen, as their order has them; some are empty."""
    place = "before" if query.get("order") == "newest" else "after"
    found: list[Record] = []
    while True:
        page = api.call("GET", f"/v1/audit?{urlencode(query)}")
        found += page["records"]
        if page["next"] is None:
            return found
        query[place] = page["next"]


def provoke(host: Host, admin: Api, clients: dict[str, Identity]) -> str:
    """Changes that are done, that fail and that are refused, by several persons; a machine's UUID."""
    admin.call("POST", "/v1/volumes", {"name": "v1", "size": 1 << 20})
    spec = {"name": "web", "cpus": 1, "memory": 64 << 20, "disks": [{"volume": "v1"}], "networks": []}
    uuid = str(admin.call("POST", "/v1/machines", spec)["uuid"])
    admin.call("GET", "/v1/machines/web")
    admin.call("DELETE", "/v1/volumes/v1", expect=409)
    admin.call("POST", "/v1/machines/absent/start", expect=404)
    host.api(clients["operator"]).call("DELETE", "/v1/machines/web", expect=403)
    host.api(clients["auditor"]).call("GET", "/v1/machines")
    return uuid


@pytest.mark.sfr("FAU_SAR.1")
def test_every_choice_finds_what_a_look_at_everything_finds(
    host: Host, admin: Api, clients: dict[str, Identity]
) -> None:
    """Each filter once, both orders, small pages; the reads themselves, which are records, change nothing."""
    uuid = provoke(host, admin, clients)
    trail = records(admin)
    last = trail[-1]["seq"]
    some = next(r for r in trail if r["type"] == "machine.create" and r["phase"] == "intent")
    start, end, digest = trail[3]["time"], some["time"], some["actor"]["certificate"]
    cases: list[tuple[dict[str, Any], Callable[[Record], bool]]] = [
        ({}, lambda r: True),
        ({"from": start}, lambda r: r["time"] >= start),
        ({"until": end}, lambda r: r["time"] < end),
        ({"from": start, "until": end}, lambda r: start <= r["time"] < end),
        ({"type": "machine.create"}, lambda r: r["type"] == "machine.create"),
        ({"type": "machine."}, lambda r: r["type"].startswith("machine.")),
        ({"actor": "operator"}, lambda r: r["actor"]["id"] == "operator"),
        ({"actor": digest}, lambda r: r["actor"].get("certificate") == digest),
        ({"machine": "web"}, lambda r: (r["object"]["kind"], r["object"]["name"]) == ("machine", "web")),
        ({"machine": uuid}, lambda r: r["object"]["id"] == uuid),
        ({"outcome": "failure"}, lambda r: r["outcome"] == "failure"),
        ({"phase": "intent"}, lambda r: r["phase"] == "intent"),
        ({"request": some["request"]}, lambda r: r["request"] == some["request"]),
        ({"request": some["request"][:8]}, lambda r: r["request"].startswith(some["request"][:8])),
        ({"type": "machine.", "outcome": "failure", "actor": "operator"}, lambda r: r["type"] == "machine.delete"),
    ]
    for query, holds in cases:
        expected = [r for r in trail if holds(r)]
        assert expected, query
        assert chosen(admin, **query, before=last + 1, limit=3 if len(expected) < 20 else 1000) == expected, query
        assert chosen(admin, **query, before=last + 1, limit=1000, order="newest") == expected[::-1], query
    for wrong in ({"from": "yesterday"}, {"type": "*"}, {"outcome": "odd"}, {"order": "random"}, {"colour": "red"}):
        answer = admin.request("GET", f"/v1/audit?{urlencode(wrong)}")
        assert answer.status == 400 and next(iter(wrong)) in answer.json()["detail"], answer


@pytest.mark.sfr("FAU_SAR.1")
def test_only_admin_and_auditor_read_and_they_read_every_field(
    host: Host, admin: Api, clients: dict[str, Identity]
) -> None:
    """The same records with all fields for both; operator, user and strangers are refused, also to follow."""
    provoke(host, admin, clients)
    last = records(admin)[-1]["seq"]
    both = [chosen(host.api(clients[role]), before=last + 1, limit=1000) for role in ("admin", "auditor")]
    assert both[0] == both[1] and len(both[0]) == last
    for path in ("/v1/audit", "/v1/audit?order=newest&limit=1", "/v1/audit/follow"):
        for role in ("operator", "user"):
            answer = host.api(clients[role]).request("GET", path)
            assert answer.status == 403 and "seq" not in answer.body.decode(), answer
        assert host.api().request("GET", path).status == 401
    with following(host, clients["auditor"], after="0") as follower:
        assert [follower.next() for _ in range(last)] == both[0]
    refused = chosen(admin, type="audit.follow", outcome="failure")
    assert [r["actor"]["id"] for r in refused] == ["operator", "user"]


@pytest.mark.sfr("FAU_SAR.1")
def test_a_follower_sees_what_happens_and_ends_with_his_connection(
    host: Host, admin: Api, clients: dict[str, Identity]
) -> None:
    """Within seconds and on record; a person has four places, which come free, and others theirs."""
    auditor = clients["auditor"]
    with following(host, auditor) as everything, following(host, auditor, type="volume.", phase="outcome") as some:
        began = time.monotonic()
        admin.call("POST", "/v1/volumes", {"name": "v1", "size": 1 << 20})
        seen = some.next()
        assert time.monotonic() - began < 10 * host.acceleration.scale
        assert (seen["type"], seen["outcome"], seen["object"]["name"]) == ("volume.create", "success", "v1")
        met: list[Record] = []
        while not met or met[-1]["seq"] < seen["seq"]:
            met.append(everything.next())
        assert met[-1] == seen
        assert [r["seq"] for r in met] == list(range(met[0]["seq"], seen["seq"] + 1))
        more = [Follower(host, auditor) for _ in range(MOST_EACH - 2)]
        assert all(follower.answer.status == 200 for follower in more)
        refused = Follower(host, auditor)
        assert refused.answer.status == 429 and "too many followers" in refused.answer.read().decode()
        refused.close()
        with following(host, clients["admin"], type="volume."):
            pass
        assert host.api(auditor).request("GET", "/v1/audit?limit=1").status == 200
        for follower in more:
            follower.close()

    def ended() -> bool:
        begun = chosen(admin, type="audit.follow", phase="intent")
        done = chosen(admin, type="audit.follow", phase="outcome", outcome="success")
        return len(done) == len(begun) - 1 == MOST_EACH + 1

    poll(ended, 15 * host.acceleration.scale, "all that were let in have ended, on record", interval=0.5)
    with following(host, auditor):
        pass


@pytest.mark.sfr("FAU_STG.1", "FAU_SAR.1")
def test_a_time_is_exported_and_proves_itself_elsewhere(
    host: Host, admin: Api, clients: dict[str, Identity], workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By the command line tool; whole, as what was asked for, and not when a record of it is gone."""
    uuid = provoke(host, admin, clients)
    created = [r for r in records(admin) if r["object"]["id"] == uuid and r["type"] == "machine.create"]
    start, end = created[0]["time"], records(admin)[-1]["time"]
    folder = workdir / "workstation"
    folder.mkdir()
    shutil.copy2(clients["auditor"].key, folder / "client.key")
    shutil.copy2(clients["auditor"].certificate, folder / "client.crt")
    auditor, part, known = Workstation(folder), workdir / "part.jsonl", workdir / "known.json"
    url = f"https://127.0.0.1:{host.port}"
    auditor.holdfast(f"remote add hf1 {url} --fingerprint {asyncio.run(server_fingerprint(url))} --default")
    known.write_text(json.dumps(host.api(clients["auditor"]).call("POST", "/v1/audit/anchor", seconds=90)))
    auditor.holdfast(f"audit export {part} --from {start} --until {end}")
    capfd.readouterr()
    auditor.holdfast(f"audit verify {part} --known {known} --from {start} --until {end}")
    said = capfd.readouterr().out
    assert f"all records from {start} and before {end} are in here" in said and "by the TPM" in said, said
    assert "NOT compared" not in said, said
    lines = part.read_bytes().splitlines(keepends=True)
    for gone in range(len(lines)):
        part.write_bytes(b"".join(lines[:gone] + lines[gone + 1 :]))
        auditor.holdfast(f"audit verify {part} --known {known} --from {start} --until {end}", accepted=(1,))
    part.write_bytes(b"".join(lines))
    assert verify_file(part).problem is None
    capfd.readouterr()
    auditor.holdfast(f"audit list --machine {uuid} --full")
    said = capfd.readouterr().out
    assert f"object.id            {uuid}" in said and "producer.unit        holdfast-core" in said, said
    auditor.holdfast("audit list --last 3")
    assert len(capfd.readouterr().out.splitlines()) >= 3
