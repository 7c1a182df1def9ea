"""What of the trail is kept: the oldest goes on record, auditors alone purge, nobody changes what is sealed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.harness.agent import agent_credentials
from tests.harness.api import Api
from tests.harness.checkpoint import fresh
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.machine import Hardware
from tests.harness.seed import Identity, configuration, seed_credential
from tests.harness.waiting import poll
from tests.host.test_api import records
from tests.host.test_audit_store import anchored, verified
from vmm.audit.verify import read_known

pytestmark = pytest.mark.sfr("FAU_STG.1", "FAU_STG_EXT.1")

_STORE = "/var/lib/holdfast-audit"
_MIB = 1 << 20
_FILL = """
import asyncio, json, os, pwd, sys
user = pwd.getpwnam("holdfast-core")
os.initgroups(user.pw_name, user.pw_gid); os.setgid(user.pw_gid); os.setuid(user.pw_uid)
from vmm.audit.client import AuditClient, Entry
from vmm.errors import Unavailable
client = AuditClient(timeout=300)
entry = Entry(type="machine.stop", extra={"args": {"fill": "x" * 30000}})
taken, refused = [], []
async def work(count):
    for _ in range(count):
        try:
            taken.append(await client.append(entry))
        except Unavailable as error:
            refused.append(error.message)
async def main():
    await asyncio.gather(*(work(int(sys.argv[1]) // 16) for _ in range(16)))
asyncio.run(main())
print(json.dumps({"last": max(taken, default=0), "taken": len(taken), "refused": refused[:1]}))
"""
"""As core's user, so that the kernel says it is core."""
_RULE = """
import asyncio
from vmm import wire
from vmm.paths import AUDIT_SOCKET
result = asyncio.run(wire.call(AUDIT_SOCKET, "rule", argument))
"""
_CHANGE = """
import errno, os
def tried(do):
    try:
        do()
    except OSError as error:
        return errno.errorcode[error.errno]
    return "changed"
os.chmod(argument, 0o600)
with open(argument, "rb") as file:
    before = file.read()
result = [
    tried(lambda: os.close(os.open(argument, os.O_WRONLY))),
    tried(lambda: os.close(os.open(argument, os.O_RDWR | os.O_APPEND))),
    tried(lambda: os.truncate(argument, 0)),
]
with open(argument, "rb") as file:
    result.append(file.read() == before)
"""


def fill(host: Host, mebibytes: int) -> Any:
    """Have core's user hand in records of 30 kB, so many MiB together; what became of them."""
    count = mebibytes * _MIB // 30_000 + 16
    return json.loads(host.agent.exec(["/usr/bin/python3", "-I", "-c", _FILL, str(count)], seconds=300).out)


def status(api: Api) -> Any:
    return api.call("GET", "/v1/audit/status")


def verify_store(host: Host, folder: str) -> tuple[int, str]:
    """What the host's own verifier makes of a copy of the store."""
    done = host.agent.exec(["/usr/bin/python3", "-I", "-m", "vmm.audit.verify", folder], check=False, seconds=120)
    return done.rc, done.out + done.err


def test_past_the_quota_the_oldest_records_go_and_the_loss_is_told(host: Host, admin: Api, workdir: Path) -> None:
    """The rule holds, the trail says what went, and what is left verifies elsewhere; a further theft does not."""
    known = read_known(anchored(admin, workdir))
    # What the configure step does with the configuration's word (see below for the whole way).
    host.agent.python(_RULE, {"keep_mib": 32})
    rules = [record["extra"] for record in records(admin) if record["type"] == "audit.rule"]
    assert rules == [{"when_full": "overwrite", "keep_mib": 32}]
    done = fill(host, 38)
    assert not done["refused"]
    anchored(admin, workdir)

    def steady() -> Any:
        """How it stands, and the records; None when some went in between: others write, too."""
        state, found = status(admin), records(admin)
        return (state, found) if found[0]["seq"] == state["first"] == status(admin)["first"] else None

    read: Any = poll(steady, 60 * host.acceleration.scale, "nothing goes while it is read")
    now, trail = read
    assert 1 < now["first"] < done["last"] <= now["last"] and now["bytes"] <= now["quota"] == 32 * _MIB
    assert not now["full"] and now["rule"]["keep_mib"] == 32
    gone = [record for record in trail if record["type"] == "audit.removed"]
    assert gone[-1]["extra"]["last"] == now["first"] - 1 and gone[-1]["extra"]["head"] == trail[0]["prev"]
    assert (gone[-1]["outcome"], gone[-1]["extra"]["cause"]) == ("failure", "full") and gone[-1]["extra"]["lost"]
    assert {r["extra"]["percent"] for r in trail if r["type"] == "audit.filling"} >= {75, 90}
    report = verified(admin, workdir, known)
    assert report.problem is None and report.vouched == gone[-1]["seq"] <= report.covered
    host.agent.exec(["cp", "-a", _STORE, "/var/tmp/copy"], seconds=60)
    code, said = verify_store(host, "/var/tmp/copy")
    assert code == 0 and f"those before record {now['first']} were removed" in said, said
    host.agent.exec(["rm", f"/var/tmp/copy/{now['first']:020d}.log"])
    code, said = verify_store(host, "/var/tmp/copy")
    assert code == 1 and "record 1: truncation: it begins with record" in said, said


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_only_an_auditor_purges(host: Host, admin: Api, clients: dict[str, Identity], workdir: Path) -> None:
    """Nobody else gets anything deleted; he gets whole sealed segments, on record with what went."""
    fill(host, 20)
    before = status(admin)
    assert before["first"] == 1
    for role in ("admin", "operator", "user"):
        host.api(clients[role]).call("POST", "/v1/audit/purge", {"before": before["last"]}, expect=403)
    host.api().call("POST", "/v1/audit/purge", {"before": before["last"]}, expect=401)
    host.api(clients["operator"]).call("GET", "/v1/audit/status", expect=403)
    assert status(admin)["first"] == 1
    auditor = host.api(clients["auditor"])
    auditor.call("POST", "/v1/audit/purge", {"before": "soon"}, expect=400)
    assert auditor.call("POST", "/v1/audit/purge", {"before": 2}) == {"first": 0, "last": 0, "lost": 0}
    gone = auditor.call("POST", "/v1/audit/purge", {"before": before["last"]})
    assert gone["first"] == 1 and gone["last"] == gone["lost"] == status(auditor)["first"] - 1 > 0
    trail = records(auditor)
    assert trail[0]["seq"] == gone["last"] + 1
    purge = [record for record in trail if record["type"] == "audit.purge"]
    refused = [record["actor"]["role"] for record in purge if record["outcome"] == "failure"]
    assert sorted(refused) == ["admin", "auditor", "operator", "user"]
    intent, outcome = purge[-2:]
    assert (intent["phase"], intent["extra"]["args"]) == ("intent", {"before": before["last"]})
    assert (outcome["phase"], outcome["outcome"], outcome["extra"]) == ("outcome", "success", gone)
    (removed,) = (record for record in trail if record["type"] == "audit.removed")
    assert removed["request"] == intent["request"] and intent["seq"] < removed["seq"] < outcome["seq"]
    anchored(auditor, workdir)
    assert verified(auditor, workdir).problem is None


def test_not_even_root_changes_a_sealed_segment(host: Host, admin: Api) -> None:
    """It is under fs-verity soon after it ended; the one that is written to is not."""
    fill(host, 9)
    poll(lambda: status(admin)["protected"] >= 1, 60 * host.acceleration.scale, "the segment is protected", interval=1)
    now = status(admin)
    assert (now["protected"], now["unprotected"]) == (now["segments"] - 1, "")
    assert host.agent.python(_CHANGE, f"{_STORE}/{1:020d}.log") == ["EPERM", "EPERM", "EPERM", True]
    checks = {check["name"]: check for check in admin.call("GET", "/v1/health")["checks"]}
    assert checks["audit"]["ok"] and "fs-verity" not in checks["audit"]["detail"]
    # It is read as before, also by the daemon when it starts anew.
    host.agent.exec(["systemctl", "restart", "holdfast-audit.service"], seconds=90)
    poll(lambda: status(admin)["protected"] >= 1, 60 * host.acceleration.scale, "it is known as such", interval=1)
    assert records(admin)[0]["seq"] == 1


@pytest.mark.long
def test_a_host_that_refuses_when_its_store_is_full(
    built_image: Image, clients: dict[str, Identity], workdir: Path
) -> None:
    """By its seed: what would have to be recorded is refused, reading included, until an auditor purges."""
    document = configuration(list(clients.values()), audit={"when_full": "refuse", "keep_mib": 32})
    disk = workdir / "test.raw"
    built_image.write_test_disk(disk)
    files = fresh(workdir, disk, Hardware().disk)
    with Host(files, smbios=[*agent_credentials(), seed_credential(document)]) as host:
        host.wait_ready(clients["admin"], 180)
        admin, auditor = host.api(clients["admin"]), host.api(clients["auditor"])
        assert status(admin)["rule"] == {
            "when_full": "refuse", "keep_days": None, "keep_mib": 32, "until_exported": False,
        }
        done = fill(host, 38)
        assert done["refused"] == ["the audit store is full"]
        # A change is refused with that reason, and so is reading, which is recorded, too.
        for call in (("POST", "/v1/volumes", {"name": "v1", "size": _MIB}), ("GET", "/v1/volumes")):
            answer = admin.call(*call, expect=503)
            assert "the audit store is full" in answer["detail"]
        admin.call("POST", "/v1/audit/purge", {"before": done["last"]}, expect=403)
        # An auditor sees what there is to purge. It stays so over a restart of the daemon, which takes its rule along.
        host.agent.exec(["systemctl", "restart", "holdfast-audit.service"], seconds=90)
        assert fill(host, 1)["refused"] == ["the audit store is full"]
        assert status(auditor)["full"] and status(auditor)["first"] == 1
        gone = auditor.call("POST", "/v1/audit/purge", {"before": done["last"]}, seconds=60)
        assert gone["first"] == 1 and gone["last"] > 1
        admin.call("POST", "/v1/volumes", {"name": "v1", "size": _MIB})
        trail = records(admin)
        assert [r for r in trail if r["type"] == "audit.full"]
        assert status(admin)["rule"]["when_full"] == "refuse" and not status(admin)["full"]
    files.discard()
    disk.unlink()
