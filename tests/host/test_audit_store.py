"""The audit trail as the TPM anchors it: proven to whoever is elsewhere, also over stops and older copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.host.test_api import records
from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import canonical
from vmm.audit.verify import Report, read_known, verify_file

pytestmark = pytest.mark.sfr("FAU_STG.1")

_STORE = "/var/lib/holdfast-audit"
_COPY = """
import os, pathlib, shutil
source, target = map(pathlib.Path, argument)
for file in target.glob("*.log"):
    file.unlink()
target.mkdir(exist_ok=True)
for file in source.glob("*.log"):
    shutil.copy2(file, target)
    os.chown(target / file.name, 903, 903)
result = sorted(os.listdir(target))
"""


def anchored(api: Api, folder: Path) -> Path:
    """Have the trail anchored; a file with the checkpoint."""
    known = folder / "known.json"
    known.write_text(json.dumps(api.call("POST", "/v1/audit/anchor", seconds=90)))
    return known


def verified(api: Api, folder: Path, known: Checkpoint | None = None) -> Report:
    """What the verifier makes of the whole trail, away from the host."""
    export = folder / "trail.jsonl"
    export.write_bytes(b"".join(canonical(record) for record in records(api)))
    return verify_file(export, known=known)


def test_a_trail_is_anchored_in_the_tpm_on_demand(
    host: Host, admin: Api, clients: dict[str, Identity], workdir: Path
) -> None:
    """The auditor has it anchored; elsewhere it verifies against that, and a trail that ends before does not."""
    admin.call("POST", "/v1/volumes", {"name": "v1", "size": 1 << 20})
    known = read_known(anchored(host.api(clients["auditor"]), workdir))
    assert known.proof.anchor == "tpm"
    report = verified(admin, workdir, known)
    assert report.problem is None and report.covered >= known.covers, report
    export = workdir / "trail.jsonl"
    lines = export.read_bytes().splitlines(keepends=True)
    export.write_bytes(b"".join(lines[: known.covers - 1]))
    problem = verify_file(export, known=known).problem
    assert problem is not None and problem.kind == "truncation"
    host.api(clients["operator"]).call("POST", "/v1/audit/anchor", expect=403)
    checks = {check["name"]: check for check in admin.call("GET", "/v1/health")["checks"]}
    assert checks["audit-anchor"]["ok"] and "tpm" in checks["audit-anchor"]["detail"], checks


def test_the_end_of_a_run_is_anchored_and_the_next_one_goes_on(
    host: Host, admin: Api, clients: dict[str, Identity], workdir: Path
) -> None:
    """Behind audit.stop comes a checkpoint, while the whole host stops; the same key anchors what follows."""
    known = read_known(anchored(admin, workdir))
    host.press_power_button()
    host.wait_off(120)
    host.power_on()
    host.wait_ready(clients["admin"], 120)
    again = host.api(clients["admin"])
    trail = records(again)
    stop = next(record["seq"] for record in trail if record["type"] == "audit.stop")
    last = trail[stop]
    assert (last["type"], last["outcome"]) == ("audit.checkpoint", "success"), last
    assert last["extra"]["covers"] == stop
    assert not [record for record in trail if record["type"] == "audit.recovered"]
    anchored(again, workdir)
    report = verified(again, workdir, known)
    assert report.problem is None and report.covered > stop, report


def test_an_older_store_put_back_by_root_is_told(host: Host, admin: Api, workdir: Path) -> None:
    """Not even root on the host gets the TPM's counter back."""
    # The older one has to have a number of its own: the first one that a trail shows may be any.
    anchored(admin, workdir)
    host.agent.exec(["systemctl", "stop", "holdfast-audit.service"], seconds=90)
    host.agent.python(_COPY, [_STORE, "/run/older"])
    host.agent.exec(["systemctl", "start", "holdfast-audit.service"], seconds=60)
    anchored(admin, workdir)
    host.agent.exec(["systemctl", "stop", "holdfast-audit.service"], seconds=90)
    host.agent.python(_COPY, ["/run/older", _STORE])
    host.agent.exec(["systemctl", "start", "holdfast-audit.service"], seconds=60)
    anchored(admin, workdir)
    problem = verified(admin, workdir).problem
    assert problem is not None and problem.kind == "replay", problem


def test_the_audit_daemon_has_no_tpm_and_the_anchor_no_store(host: Host) -> None:
    """Each is kept from what is the other's, by its unit and by its user."""
    for unit, path in (("holdfast-audit", "/dev/tpmrm0"), ("holdfast-anchor", _STORE)):
        done = host.agent.python(
            """
import os, pwd
user, path = argument
child = os.fork()
if child == 0:
    found = pwd.getpwnam(user)
    os.initgroups(user, found.pw_gid); os.setgid(found.pw_gid); os.setuid(found.pw_uid)
    try:
        os.open(path, os.O_RDONLY)
    except PermissionError:
        os._exit(13)
    os._exit(0)
result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
""",
            [unit, path],
        )
        assert done == 13, unit
    shown = host.agent.exec(["systemctl", "show", "--property=PrivateDevices", "holdfast-audit.service"]).out
    assert shown.strip() == "PrivateDevices=yes"
