"""The guard: what it does about attacks on the booted host, to whom, and to whom not."""

from __future__ import annotations

import hashlib
import http.client
import ssl
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.guest.linux import GUEST_PROMPT
from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.seed import Identity, make_identity
from tests.harness.waiting import poll
from tests.host.conftest import Guests
from tests.host.test_api import records
from tests.host.test_audit_sources import Trail, act, check, trail

__all__ = ["trail"]

COUNT = 5
"""Of the rule guest-denied, as shipped."""
WITHIN_S = 10
"""Of the requirement; processors that are emulated take longer."""


def opens(host: Host, view: Any, path: str, times: int) -> None:
    """A process with a guest's user and profile tries to open a file so often."""
    code = f"""
for _ in range({times}):
    try:
        os.open({path!r}, os.O_RDONLY)
        raise SystemExit("it worked")
    except PermissionError:
        pass
"""
    assert act(host, code, view["uid"], f"libvirt-{view['uuid']}") == "worked"


def caught_up(host: Host, admin: Api) -> None:
    """Wait until the guard has dealt with all that is on record now."""
    end = max(record["seq"] for record in records(admin))

    def is_there() -> bool:
        said = check(admin, "guard")
        return bool(said["ok"]) and int(said["detail"].rpartition(" ")[2]) >= end

    poll(is_there, 30 * host.acceleration.scale, f"the guard is at record {end}")


def recorded(host: Host, admin: Api, trail: Trail, view: Any, tries: int) -> None:
    """Wait until so many tries of a guest's are on record, and the guard has dealt with them."""
    trail.until(lambda: len(trail.of("kernel.open", about=view["uuid"])) == tries or None, "the tries are on record")
    caught_up(host, admin)


def moment(record: Any) -> float:
    """When a record was written, in seconds since 1970."""
    return datetime.fromisoformat(record["time"]).timestamp()


@pytest.mark.sfr("FAU_SAA.1", "FAU_ARP.1", "FMT_MOF_EXT.1")
def test_a_guest_that_tries_too_much_stands_still(
    host: Host, admin: Api, clients: dict[str, Identity], guests: Guests, trail: Trail
) -> None:
    """One try less than the rule counts does nothing; one more holds that guest, once, and not whom it names."""
    view, other = guests.run("vm1"), guests.run("vm2")
    operator = host.api(clients["operator"])
    foreign = f"/var/lib/holdfast/core/nvram/{other['uuid']}.fd"
    opens(host, view, foreign, COUNT - 1)
    recorded(host, admin, trail, view, COUNT - 1)
    assert trail.of("guard.violation", "machine.hold") == []
    assert admin.call("GET", "/v1/machines/vm1")["state"] == "running"

    opens(host, view, foreign, 1)
    violation = trail.newest("guard.violation")
    held = trail.newest("machine.hold", fits=lambda r: bool(r["phase"] == "outcome"))
    assert violation["producer"] == {"uid": 910, "unit": "holdfast-guard"}, violation
    assert violation["object"] == {"kind": "machine", "id": view["uuid"], "name": ""}, violation
    last = trail.of("kernel.open", about=view["uuid"])[-1]
    assert violation["extra"]["rule"] == "guest-denied" and violation["extra"]["key"] == view["uuid"], violation
    assert (violation["extra"]["count"], violation["extra"]["last"]) == (COUNT, last["seq"]), violation
    assert (held["actor"]["id"], held["actor"]["role"], held["outcome"]) == ("holdfast-guard", "guard", "success"), held
    assert held["object"]["id"] == view["uuid"], held
    assert moment(held) - moment(last) < WITHIN_S * host.acceleration.scale

    shown = admin.call("GET", "/v1/machines/vm1")
    assert shown["state"] == "paused" and "guest-denied" in shown["held"]["reason"], shown
    caught_up(host, admin)
    assert len(trail.of("guard.violation")) == 1, "it is signalled once"
    bystander = admin.call("GET", "/v1/machines/vm2")
    assert (bystander["state"], bystander["held"]) == ("running", None)
    console = guests.shell("vm2")
    assert "still-here" in console.run("echo still-here", GUEST_PROMPT)
    console.close()

    operator.call("POST", "/v1/machines/vm1/resume", expect=409)
    operator.call("POST", "/v1/machines/vm1/reset", expect=409)
    operator.call("POST", "/v1/machines/vm1/release", expect=403)
    host.agent.exec(["systemctl", "restart", "holdfast-core.service"], seconds=120)
    poll(admin.ready, 60 * host.acceleration.scale, "core is back")
    operator.call("POST", "/v1/machines/vm1/resume", expect=409)
    assert admin.call("POST", "/v1/machines/vm1/release")["held"] is None
    operator.call("POST", "/v1/machines/vm1/resume")
    console = guests.shell("vm1")
    assert "goes-on" in console.run("echo goes-on", GUEST_PROMPT)
    console.close()
    assert trail.of("libvirt.unasked") == []


@pytest.mark.sfr("FAU_SAA.1", "FMT_MOF_EXT.1")
def test_a_rule_that_is_disabled_signals_nothing_and_a_test_does_nothing(
    host: Host, admin: Api, clients: dict[str, Identity], guests: Guests, trail: Trail
) -> None:
    """Switching a rule is an administrator's, and on record."""
    view = guests.run("vm1")
    rule = "/v1/guard/rules/guest-denied"
    host.api(clients["operator"]).call("POST", rule, {"enabled": False}, expect=403)
    assert admin.call("POST", rule, {"enabled": False})["enabled"] is False
    opens(host, view, "/etc/shadow", COUNT)
    recorded(host, admin, trail, view, COUNT)
    assert trail.of("guard.violation") == []
    assert admin.call("POST", rule, {"enabled": True, "count": 1, "action": "alert"})["count"] == 1
    switched = [r for r in trail.of("guard.set") if r["outcome"] == "success"]
    assert [r["object"]["name"] for r in switched] == ["guest-denied"] * 2
    admin.call("POST", f"{rule}/test")
    violation = trail.newest("guard.violation")
    assert violation["extra"] == {"rule": "guest-denied", "action": "alert", "test": True}, violation
    # What was tried before it was enabled does not count; what is tried from then on does.
    opens(host, view, "/etc/shadow", 1)
    violation = trail.newest("guard.violation", fits=lambda r: "test" not in r["extra"])
    assert (violation["extra"]["count"], violation["extra"]["action"]) == (1, "alert"), violation
    caught_up(host, admin)
    assert admin.call("GET", "/v1/machines/vm1")["state"] == "running" and trail.of("machine.hold") == []


@pytest.mark.sfr("FAU_SAA.1", "FAU_ARP.1")
def test_a_killed_guard_goes_on_where_it_was(host: Host, admin: Api, guests: Guests, trail: Trail) -> None:
    """What it had counted still counts, what happens while it is away counts, too; that it is away is seen."""
    view = guests.run("vm1")
    opens(host, view, "/etc/shadow", 2)
    recorded(host, admin, trail, view, 2)
    host.agent.exec(["systemctl", "stop", "holdfast-guard.service"], seconds=60)
    assert trail.newest("guard.stop")["extra"]["done"] > 0
    assert check(admin, "guard") == {"name": "guard", "ok": False, "detail": "the guard does not run"}
    opens(host, view, "/etc/shadow", 2)
    trail.until(lambda: len(trail.of("kernel.open", about=view["uuid"])) == 4 or None, "the tries are on record")
    host.agent.exec(["systemctl", "start", "holdfast-guard.service"], seconds=60)
    caught_up(host, admin)
    assert trail.of("guard.violation") == []
    host.agent.exec(["systemctl", "kill", "--signal=KILL", "holdfast-guard.service"])
    opens(host, view, "/etc/shadow", 1)
    violation = trail.newest("guard.violation")
    assert violation["extra"]["count"] == COUNT, violation
    trail.until(lambda: admin.call("GET", "/v1/machines/vm1")["held"], "the machine is held")
    assert len(trail.of("guard.start")) >= 3


@pytest.mark.sfr("FIA_AFL_EXT.1", "FAU_SAA.1", "FAU_ARP.1")
def test_who_shows_foreign_certificates_is_locked_out_for_a_while(
    host: Host, admin: Api, clients: dict[str, Identity], workdir: Path
) -> None:
    """Two refused logins, then a good one: accepted. Three: refused from there until the time is over."""
    forged = host.api(make_identity(workdir, "admin"))
    seconds = 15 * host.acceleration.scale
    rule = {"count": 3, "window_s": 600, "lock_s": int(seconds)}
    admin.call("POST", "/v1/guard/rules/login-failures", rule)

    def is_refused(times: int) -> bool:
        failed = [r["reason"] for r in records(admin) if r["type"] == "tls.handshake"]
        return len([reason for reason in failed if reason.startswith("certificate refused")]) == times

    def fail() -> None:
        with suppress(OSError, http.client.HTTPException):
            forged.request("GET", "/v1/health")

    for tries in (1, 2):
        fail()
        # One by one: records that strangers cause are throttled, and what comes too fast counts once.
        poll(partial(is_refused, tries), 30 * host.acceleration.scale, f"try {tries} is on record")
    caught_up(host, admin)
    assert admin.call("GET", "/v1/access/locks") == {"locks": []}

    fail()
    status: Any = poll(lambda: _locked(admin), 30 * host.acceleration.scale, "the address is locked out")
    assert "this source is locked out until" in status["detail"], status
    admin.call("POST", "/v1/access/unlock", {"kind": "source", "value": "10.0.2.2"}, expect=403)
    host.agent.exec(["systemctl", "restart", "holdfast-core.service"], seconds=120)
    poll(lambda: _locked(admin), seconds, "it is locked out still")
    poll(lambda: _locked(admin) is None, 2 * seconds + 60, "the time is over")

    done = [r for r in records(admin) if r["type"] == "access.lock" and r["phase"] == "outcome"]
    assert [(r["actor"]["id"], r["outcome"], r["extra"]["origin"]) for r in done] == [
        ("holdfast-guard", "success", "10.0.2.2")
    ]
    until = datetime.fromisoformat(done[0]["extra"]["until"]).timestamp()
    assert abs(until - moment(done[0]) - seconds) <= 5
    mine = [r for r in records(admin) if r["actor"]["id"] == "admin" and moment(r) > moment(done[0])]
    early = [r for r in mine if r["phase"] == "outcome" and r["outcome"] == "success" and moment(r) < until]
    assert early == [] and any("locked out" in r["reason"] for r in mine)


def _locked(api: Api) -> Any:
    """The problem with which somebody is refused who is locked out; None for one who is not."""
    with suppress(OSError, http.client.HTTPException):
        response = api.request("GET", "/v1/version")
        if response.status == 200:
            return None
        said = response.json()
        if said["type"].endswith(":locked-out"):
            return said
    return {}


@pytest.mark.sfr("FIA_AFL_EXT.1", "FMT_MOF_EXT.1")
def test_an_administrator_locks_out_and_unlocks(host: Host, admin: Api, clients: dict[str, Identity]) -> None:
    """A certificate by its fingerprint: its calls are refused, on record, and nobody else's; then it works again."""
    operator = host.api(clients["operator"])
    fingerprint = hashlib.sha256(ssl.PEM_cert_to_DER_cert(clients["operator"].certificate.read_text())).hexdigest()
    who = {"kind": "certificate", "value": fingerprint}
    admin.call("POST", "/v1/access/locks", {**who, "seconds": 3600, "reason": "lost laptop"}, expect=201)
    operator.call("GET", "/v1/machines", expect=403)
    operator.call("POST", "/v1/access/unlock", who, expect=403)
    admin.call("GET", "/v1/machines")
    (lock,) = admin.call("GET", "/v1/access/locks")["locks"]
    assert (lock["value"], lock["by"], lock["reason"]) == (who["value"], "admin", "lost laptop")
    refused = [r for r in records(admin) if r["type"] == "machine.list" and r["outcome"] == "failure"]
    assert [r["actor"]["id"] for r in refused] == ["operator"]
    admin.call("POST", "/v1/access/unlock", who)
    operator.call("GET", "/v1/machines")


@pytest.mark.long
@pytest.mark.sfr("FAU_ARP.1")
def test_a_hold_outlasts_a_power_cut(faulty_host: Host, clients: dict[str, Identity]) -> None:
    """What is held when the power fails is not started again; what ran beside it is."""
    host, guests = faulty_host, Guests(faulty_host, faulty_host.api(clients["admin"]))
    guests.run("vm1")
    guests.run("vm2")
    guests.api.call("POST", "/v1/machines/vm1/hold", {"reason": "looked at"})
    host.power_cut()
    host.power_on()
    admin = host.api(clients["admin"])
    poll(admin.ready, 240 * host.acceleration.scale, "the host is back")
    poll(
        lambda: admin.call("GET", "/v1/machines/vm2", seconds=60)["state"] == "running",
        240 * host.acceleration.scale,
        "the other one runs",
    )
    shown = admin.call("GET", "/v1/machines/vm1", seconds=60)
    assert shown["state"] == "stopped" and shown["held"]["reason"] == "looked at", shown
    admin.call("POST", "/v1/machines/vm1/start", expect=409)
    admin.call("POST", "/v1/machines/vm1/release")
    admin.call("POST", "/v1/machines/vm1/start", seconds=60)
