"""Guests that are saved when the host stops, and go on from there when it is back."""

from __future__ import annotations

from typing import Any

import pytest

from tests.guest.linux import GUEST_PROMPT
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.updates import Updates
from tests.harness.waiting import poll
from tests.host.conftest import Guests

SAVED = "import os; result = sorted(os.listdir('/var/lib/holdfast/core/saved'))"
FACTS = """
import pathlib
folder = pathlib.Path("/proc", str(argument))
status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
result = {
    "uid": status["Uid"].split(), "caps": status["CapEff"].strip(),
    "label": (folder / "attr/current").read_text().strip(),
    "restored": b"-incoming" in (folder / "cmdline").read_bytes(),
}
"""
# As holdfast-guests.service does.
STOP_GUESTS = """
import asyncio
from vmm import paths, wire
result = asyncio.run(wire.call(paths.CORE_SOCKET, "host.stop-guests"))
"""
FILES = """
import pathlib
core = pathlib.Path("/var/lib/holdfast/core")
disks = [core / "volumes" / (argument["volume"] + ".raw"), core / "nvram" / (argument["uuid"] + ".fd")]
found = [*core.glob("saved/*"), *disks]
result = [[path.suffix, path.owner(), path.stat().st_mode & 0o777] for path in found]
"""


@pytest.fixture
def operator(host: Host, clients: dict[str, Identity]) -> Updates:
    """An administrator who restarts the host, which is done with judging its own start."""
    made = Updates(host, clients["admin"])
    made.settled()
    return made


def runs(operator: Updates, guests: Guests, name: str) -> tuple[Any, Any]:
    """A machine once it runs (again): the API's view of it, and what its QEMU is."""

    def look() -> Any:
        view = operator.api.call("GET", f"/v1/machines/{name}", seconds=60)
        return view if view["state"] == "running" else None

    view: Any = poll(look, 240 * operator.host.acceleration.scale, f"{name} runs")
    return view, operator.host.agent.python(FACTS, guests.process(view["uuid"]))


@pytest.mark.long
@pytest.mark.sfr("FMT_MOF_EXT.1", "FDP_VMS_EXT.1", "FAU_GEN.1")
def test_a_guest_goes_on_after_a_restart_of_the_host(host: Host, operator: Updates, guests: Guests) -> None:
    """It is the same boot of the guest with the same memory, as confined as before; but only once: when the power
    fails after that, it starts from its disk."""
    made = guests.run("keeper", host_stop="save", stop_timeout=600)
    console = guests.shell("keeper")
    console.run("echo in memory only >/tmp/marker", GUEST_PROMPT)
    boot = console.run("cat /proc/sys/kernel/random/boot_id", GUEST_PROMPT).strip()
    assert len(boot) == 36, boot
    console.close()

    leaving = operator.api.call("POST", "/v1/host/reboot", seconds=300)
    assert [(one["name"], one["how"], one["reason"]) for one in leaving["machines"]] == [("keeper", "saved", "")]
    host.wait_reset(120)
    host.wait_ready(operator.admin, 120)

    view, facts = runs(operator, guests, "keeper")
    assert view["saved"]["state"] == "resumed", view
    assert facts == {
        "uid": [str(made["uid"])] * 4,
        "caps": "0" * 16,
        "label": f"libvirt-{made['uuid']} (enforce)",
        "restored": True,
    }
    assert host.agent.python(SAVED) == []
    console = guests.shell("keeper")
    assert "in memory only" in console.run("cat /tmp/marker", GUEST_PROMPT)
    assert console.run("cat /proc/sys/kernel/random/boot_id", GUEST_PROMPT).strip() == boot
    # Its timers go on, too.
    console.run("sleep 1", GUEST_PROMPT)
    console.close()
    for kind in ("machine.save", "machine.resume"):
        (record,) = operator.records(kind)
        assert (record["outcome"], record["object"]["name"], record["actor"]["id"]) == ("success", "keeper", "holdfast")
    checks = {check["name"]: check for check in operator.api.call("GET", "/v1/health", seconds=60)["checks"]}
    assert checks["unknown-domains"]["ok"], checks["unknown-domains"]

    host.reset()
    host.wait_reset()
    host.wait_ready(operator.admin, 120)
    _, facts = runs(operator, guests, "keeper")
    assert not facts["restored"]
    assert len(operator.records("machine.resume")) == 1


@pytest.mark.sfr("FDP_VMS_EXT.1", "FAU_GEN.1")
def test_a_saved_guest_whose_disk_was_changed_starts_cold(host: Host, operator: Updates, guests: Guests) -> None:
    """What it had in memory lies in a file of core's alone until then, and the reason is on record and in its view."""
    made = guests.run("keeper", host_stop="save", stop_timeout=600)
    volume = operator.api.call("GET", "/v1/volumes/keeper-disk")["uuid"]
    (stopped,) = host.agent.python(STOP_GUESTS, seconds=300)
    assert (stopped["how"], stopped["reason"]) == ("saved", "")
    files = host.agent.python(FILES, {"uuid": made["uuid"], "volume": volume})
    assert files == [[kind, "holdfast-core", 0o600] for kind in (".state", ".raw", ".fd")]
    view = operator.api.call("GET", "/v1/machines/keeper", seconds=60)
    assert (view["state"], view["saved"]["state"]) == ("saved", "saved") and view["saved"]["size"] > 0
    operator.api.call("DELETE", "/v1/machines/keeper", expect=409)

    host.agent.python("import os; os.utime(argument)", f"/var/lib/holdfast/core/volumes/{volume}.raw")
    host.agent.exec(["systemctl", "restart", "holdfast-core.service"], seconds=90)
    host.wait_ready(operator.admin, 60)
    view, facts = runs(operator, guests, "keeper")
    assert (view["saved"]["state"], view["saved"]["reason"]) == ("lost", "its disks were changed since")
    assert not facts["restored"] and host.agent.python(SAVED) == []
    (record,) = operator.records("machine.resume")
    assert (record["outcome"], record["reason"]) == ("failure", "it starts cold: its disks were changed since")
