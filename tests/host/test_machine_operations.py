"""What is done to machines beside starting and stopping them: on the booted host, with real guests."""

from __future__ import annotations

from typing import Any

import pytest

from tests.guest.linux import GUEST_PROMPT, GUEST_READY
from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.updates import Updates
from tests.harness.waiting import Expired, poll
from tests.host.conftest import MEMORY, Guests
from tests.host.test_api import records

BOOT = "cat /proc/sys/kernel/random/boot_id"
MOST_RESTARTS = 3


def of(api: Api, *types: str) -> list[dict[str, Any]]:
    """The trail's records of some types."""
    return [record for record in records(api) if record["type"] in types]


@pytest.mark.sfr("FMT_MOF_EXT.1", "FDP_VMS_EXT.1", "FAU_GEN.1")
def test_a_running_guest_is_paused_resumed_renamed_and_reset(
    host: Host, admin: Api, clients: dict[str, Identity], guests: Guests
) -> None:
    """Paused, it says nothing; resumed, it goes on; it keeps running under another name; reset, it boots anew."""
    uuid = guests.run("vm1")["uuid"]
    operator, auditor = host.api(clients["operator"]), host.api(clients["auditor"])
    process = guests.process(uuid)
    console = guests.shell("vm1")
    boot = console.run(BOOT, GUEST_PROMPT).strip()
    before = admin.call("GET", "/v1/machines/vm1/stats")
    assert before["cpu_seconds"] > 0 and before["memory"] > 0 and before["disks"][0]["read_bytes"] > 0, before

    auditor.call("POST", "/v1/machines/vm1/pause", expect=403)
    assert admin.call("GET", "/v1/machines/vm1")["state"] == "running"
    assert operator.call("POST", "/v1/machines/vm1/pause")["state"] == "paused"
    operator.call("POST", "/v1/machines/vm1/pause", expect=409)
    operator.call("POST", "/v1/machines/vm1/reset", expect=409)
    console.send("echo $((40 + 2))-answers\n")
    with pytest.raises(Expired):
        console.expect("42-answers", 5)
    auditor.call("POST", "/v1/machines/vm1/resume", expect=403)
    assert operator.call("POST", "/v1/machines/vm1/resume")["state"] == "running"
    console.expect("42-answers", 30)
    operator.call("POST", "/v1/machines/vm1/resume", expect=409)

    operator.call("POST", "/v1/machines/vm1/rename", {"to": "vm2"}, expect=403)
    renamed = admin.call("POST", "/v1/machines/vm1/rename", {"to": "vm2"})
    assert (renamed["uuid"], renamed["state"]) == (uuid, "running")
    admin.call("GET", "/v1/machines/vm1", expect=404)
    described = admin.call("POST", "/v1/machines/vm2/describe", {"description": "of ours", "tags": ["web", "blue"]})
    assert (described["description"], described["tags"]) == ("of ours", ["web", "blue"])
    changed = admin.call("POST", "/v1/machines/vm2/change", {"memory": 2 * MEMORY, "on_crash": "restart"})
    assert (changed["memory"], changed["pending"]) == (MEMORY, {"memory": 2 * MEMORY})
    # Another one may have the name that it gave up, and run beside it.
    admin.call("POST", "/v1/machines", {"name": "vm1", "cpus": 1, "memory": 64 << 20})
    admin.call("POST", "/v1/machines/vm1/start", seconds=60)
    admin.call("POST", "/v1/machines/vm1/force-off", seconds=60)

    after = admin.call("GET", "/v1/machines/vm2/stats")
    assert after["cpu_seconds"] > before["cpu_seconds"], (before, after)
    auditor.call("POST", "/v1/machines/vm2/reset", expect=403)
    assert operator.call("POST", "/v1/machines/vm2/reset")["state"] == "running"
    console.expect(GUEST_READY, 60)
    console.close()
    console = guests.shell("vm2")
    assert console.run(BOOT, GUEST_PROMPT).strip() != boot
    console.close()
    assert guests.process(uuid) == process, "it is the same QEMU all along"
    checks = {check["name"]: check for check in admin.call("GET", "/v1/health", seconds=60)["checks"]}
    assert checks["unknown-domains"]["ok"], checks["unknown-domains"]
    done = [
        (record["type"], record["actor"]["id"], record["object"]["name"])
        for record in of(admin, "machine.pause", "machine.resume", "machine.reset", "machine.rename")
        if (record["phase"], record["outcome"]) == ("outcome", "success")
    ]
    assert [(type, name) for type, _, name in done] == [
        ("machine.pause", "vm1"),
        ("machine.resume", "vm1"),
        ("machine.rename", "vm1"),
        ("machine.reset", "vm2"),
    ]
    assert of(admin, "libvirt.unasked", "machine.crash") == []


@pytest.mark.sfr("FMT_MOF_EXT.1", "FAU_GEN.1")
def test_a_suspended_guest_goes_on_where_it_was(host: Host, admin: Api, guests: Guests) -> None:
    """With its memory, in the same boot, and with the hardware that it had; what it was changed to is still pending."""
    guests.run("keeper", stop_timeout=600)
    console = guests.shell("keeper")
    console.run("echo in memory only >/tmp/marker", GUEST_PROMPT)
    boot = console.run(BOOT, GUEST_PROMPT).strip()
    console.close()
    admin.call("POST", "/v1/machines/keeper/change", {"memory": 2 * MEMORY})
    view = admin.call("POST", "/v1/machines/keeper/suspend", seconds=300)
    assert (view["state"], view["saved"]["state"]) == ("saved", "saved")
    admin.call("POST", "/v1/machines/keeper/suspend", expect=409)
    admin.call("POST", "/v1/machines/keeper/rename", {"to": "other"}, expect=409)
    admin.call("POST", "/v1/machines/keeper/change", {"memory": MEMORY}, expect=409)

    view = admin.call("POST", "/v1/machines/keeper/start", seconds=120)
    assert (view["state"], view["saved"]["state"], view["saved"]["reason"]) == ("running", "resumed", "")
    assert (view["memory"], view["pending"]) == (MEMORY, {"memory": 2 * MEMORY})
    console = guests.shell("keeper")
    assert "in memory only" in console.run("cat /tmp/marker", GUEST_PROMPT)
    assert console.run(BOOT, GUEST_PROMPT).strip() == boot
    console.close()
    lan = [{"network": "lan"}]
    view = admin.call("POST", "/v1/machines/keeper/change", {"networks": lan})
    assert (view["networks"], view["pending"]) == ([], {"memory": 2 * MEMORY, "networks": lan})
    admin.call("POST", "/v1/machines/keeper/force-off", seconds=60)
    view = admin.call("POST", "/v1/machines/keeper/start", seconds=60)
    assert (view["memory"], view["networks"], view["pending"]) == (2 * MEMORY, lan, None)
    guests.wait("keeper")
    console = guests.shell("keeper")
    assert "eth0" in console.run("ls /sys/class/net", GUEST_PROMPT)
    console.close()
    assert of(admin, "libvirt.unasked") == []


@pytest.mark.sfr("FMT_MOF_EXT.1", "FAU_GEN.1")
def test_a_guest_whose_qemu_dies_is_started_again_some_times(host: Host, admin: Api, guests: Guests) -> None:
    """Each crash is on record, each restart a call of the host's; the fourth leaves it off. A stop is no crash."""
    guests.create("vm1", on_crash="restart")
    uuid = admin.call("POST", "/v1/machines/vm1/start", seconds=60)["uuid"]

    def state() -> str:
        return str(admin.call("GET", "/v1/machines/vm1", seconds=60)["state"])

    for crash in range(1, MOST_RESTARTS + 2):
        host.agent.python("import os, signal; os.kill(argument, signal.SIGKILL)", guests.process(uuid))

        def known(number: int = crash) -> Any:
            found = of(admin, "machine.crash")
            return found[-1] if len(found) == number else None

        record: Any = poll(known, 60 * host.acceleration.scale, f"crash {crash} is on record")
        assert (record["object"]["id"], record["outcome"], record["actor"]["id"]) == (uuid, "failure", "holdfast")
        assert record["extra"] == {"crashes": crash, "restarts": crash <= MOST_RESTARTS}, record
        if crash <= MOST_RESTARTS:
            poll(lambda: state() == "running", 60 * host.acceleration.scale, f"it runs after crash {crash}")
    assert state() == "stopped" and "stays off" in record["reason"]
    starts = [r for r in of(admin, "machine.start") if (r["phase"], r["outcome"]) == ("outcome", "success")]
    assert [r["actor"]["id"] for r in starts[1:]] == ["holdfast"] * MOST_RESTARTS

    admin.call("POST", "/v1/machines/vm1/start", seconds=60)
    admin.call("POST", "/v1/machines/vm1/force-off", seconds=60)
    assert state() == "stopped" and len(of(admin, "machine.crash")) == MOST_RESTARTS + 1
    assert of(admin, "libvirt.unasked") == []


@pytest.mark.sfr("FMT_MOF_EXT.1", "FAU_GEN.1")
def test_a_guest_that_panics_is_started_again(host: Host, admin: Api, guests: Guests) -> None:
    """Its system says so by the panic device; the host ends what is left of it and starts it, each on record."""
    uuid = guests.run("vm1", on_crash="restart")["uuid"]
    console = guests.shell("vm1")
    console.send("echo c >/proc/sysrq-trigger\n")

    def known() -> Any:
        return next(iter(of(admin, "machine.crash")), None)

    record: Any = poll(known, 60 * host.acceleration.scale, "the crash is on record")
    console.close()
    assert record["reason"] == "its system panicked; it is started again", record
    assert (record["object"]["id"], record["extra"]) == (uuid, {"crashes": 1, "restarts": True})

    def runs() -> bool:
        return bool(admin.call("GET", "/v1/machines/vm1", seconds=60)["state"] == "running")

    poll(runs, 60 * host.acceleration.scale, "it runs again")
    guests.wait("vm1", 120)
    starts = [r for r in of(admin, "machine.start") if (r["phase"], r["outcome"]) == ("outcome", "success")]
    assert [r["actor"]["id"] for r in starts[1:]] == ["holdfast"]
    assert of(admin, "libvirt.unasked") == []


@pytest.mark.long
@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_machines_start_with_the_host_in_their_order(host: Host, clients: dict[str, Identity], guests: Guests) -> None:
    """First what ran before, then what is to start with the host, lower numbers first; nothing else."""
    operator = Updates(host, clients["admin"])
    operator.settled()
    for name, order in {"a-last": 7, "b-first": 3, "c-ran": None, "d-never": None}.items():
        guests.create(name, autostart=order)
    operator.api.call("POST", "/v1/machines/c-ran/start", seconds=60)
    operator.api.call("POST", "/v1/machines/c-ran/change", {"stop_timeout": 1})
    before = len(operator.records("machine.start"))
    operator.reboot()

    def started() -> Any:
        found = [record for record in operator.records("machine.start")[before:] if record["phase"] == "outcome"]
        return found if len(found) >= 3 else None

    found: Any = poll(started, 240 * host.acceleration.scale, "three machines are started")
    assert [(r["object"]["name"], r["actor"]["id"], r["outcome"]) for r in found] == [
        (name, "holdfast", "success") for name in ("c-ran", "b-first", "a-last")
    ]
    assert operator.api.call("GET", "/v1/machines/d-never")["state"] == "stopped"
