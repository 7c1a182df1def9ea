"""A host takes releases, keeps good ones, comes back from bad ones, and lets nobody on the way do harm."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from image.builder.efidisk import find_esp
from tests.faults.cuts import KINDS, WRITING, Cut, Kind, complete, cut
from tests.faults.stages import Update
from tests.harness import releases
from tests.harness.api import ApiError
from tests.harness.checkpoint import Checkpoint
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.publishing import Publisher
from tests.harness.repository import RepositoryServer
from tests.harness.seed import Identity
from tests.harness.updates import Updates, slot
from tests.harness.waiting import poll
from tests.host.conftest import RUNNING, Guests
from vmm.process import run
from vmm.update import choice

PAYLOAD_SHARE = 0.15
"""A patch release costs at most this share of the whole payload on the wire."""


@pytest.fixture
def server(host: Host, offered: Publisher) -> Iterator[RepositoryServer]:
    """The web server that the host's configuration names, offering the next release."""
    with host.serve(offered.folder) as running:
        yield running


@pytest.mark.sfr("FPT_TUD_EXT.1", "FMT_MOF_EXT.1", "FAU_GEN.1")
def test_a_release_is_taken_kept_and_left_again(
    updates: Updates, server: RepositoryServer, offered: Publisher, guests: Guests
) -> None:
    """From the check to the next version and back, with a guest that runs on meanwhile and again afterwards."""
    view = guests.run("steady")
    process = guests.process(view["uuid"])
    before = updates.status()
    assert (before["running"], before["floor"], before["floor_source"]) == ("0.1.0", 1, "tpm")
    assert slot(before, "b")["state"] == "empty"

    assert updates.do("check")["available"] == "0.1.1"
    asked = server.sent
    assert updates.do("download")["staged"] == "0.1.1"
    assert server.sent - asked <= PAYLOAD_SHARE * offered.whole_size("0.1.1")
    installed = updates.do("apply")
    assert (installed["installed"], slot(installed, "b")["state"], slot(installed, "b")["tries"]) == (
        "0.1.1",
        "trying",
        3,
    )
    with pytest.raises(ApiError, match="waits for its reboot"):
        updates.do("download")
    assert guests.process(view["uuid"]) == process, "the guest was not left alone"

    updates.reboot()
    after = updates.settled()
    assert after["running"] == "0.1.1"
    assert (slot(after, "b")["state"], slot(after, "b")["tries"], slot(after, "a")["state"]) == (
        "running",
        None,
        "good",
    )
    assert updates.api.call("GET", "/v1/version")["slot"] == "b"
    poll(lambda: updates.api.call("GET", "/v1/machines/steady")["state"] == "running", 240, "the guest runs again")
    guests.wait("steady")
    for kind in ("update.check", "update.download", "update.apply"):
        ours = [r for r in updates.records(kind) if r["actor"]["id"] == "admin"]
        assert {(r["phase"], r["outcome"]) for r in ours} >= {("intent", "pending"), ("outcome", "success")}, kind
    assert updates.records("update.bless")[-1]["object"]["id"] == "0.1.1"
    history = updates.api.call("GET", "/v1/update/history")
    assert [event["type"] for event in history if event["outcome"] != "pending"][-4:] == [
        "update.check",
        "update.download",
        "update.apply",
        "update.bless",
    ]
    assert history[-1]["version"] == "0.1.1"

    updates.do("rollback")
    updates.reboot()
    back = updates.settled()
    assert (back["running"], slot(back, "b")["state"]) == ("0.1.0", "bad")
    assert updates.api.call("GET", "/v1/volumes/steady-disk")["name"] == "steady-disk"


_APPLIED = "/run/holdfast/config.json"
_DROP_IN = "/run/systemd/system/holdfast-core.service.d"
_PROGRAM = "/run/hasty.py"
_HASTY = b"""\
from vmm.core import autoupdate
autoupdate._FIRST_S = autoupdate._FIRST_SPREAD_S = 0
autoupdate._TICK_S = 1
import vmm.core.__main__
"""
"""Core that takes its first turn at once, and one each second; else the first comes within half an hour."""


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FMT_MOF_EXT.1", "FAU_GEN.1")
def test_an_automatic_host_takes_a_release_in_its_wave_and_window(
    updates: Updates, host: Host, offered: Publisher, workdir: Path
) -> None:
    """By itself, hour by hour: not before its wave; then it is brought, but written and started in the window only.

    Nobody waits for nothing to happen: that it looks for releases again shows that it had no other thing to do.
    """
    start = int(time.time())

    def at(hours: float, form: str) -> str:
        return time.strftime(form, time.gmtime(start + hours * 3600))

    def set_clock(hours: float) -> None:
        host.agent.python("import time; time.clock_settime(time.CLOCK_REALTIME, argument)", start + hours * 3600)

    def looked() -> list[Any]:
        return [r for r in updates.outcomes("update.check") if r["actor"]["id"] == "holdfast"]

    def look(begin: Callable[[], object]) -> Any:
        """Have something happen upon which it looks for releases; the record of that."""
        seen = len(looked())
        begin()
        return poll(lambda: looked()[seen:], 60 * host.acceleration.scale, "it looks for releases", interval=2)[0]

    place = choice.place(host.agent.read("/etc/machine-id").decode().strip(), "0.1.1")
    form = "%Y-%m-%dT%H:%M:%SZ"
    waves = f"{place}@{at(-1, form)}", f"100@{at(3, form)}"
    repository = offered.in_waves(workdir / "repository", "0.1.1", *waves)
    applied = json.loads(host.agent.read(_APPLIED))
    window = f"{at(6, '%H:%M')}-{at(8, '%H:%M')}"
    applied["update"] |= {"automatic": True, "interval_hours": 1, "window": window}
    host.agent.write(_APPLIED, json.dumps(applied).encode())
    host.agent.exec(["mkdir", "-p", _DROP_IN])
    host.agent.write(_PROGRAM, _HASTY)
    hasty = f"[Service]\nExecStart=\nExecStart=/usr/bin/python3 -I {_PROGRAM}\n"
    host.agent.write(f"{_DROP_IN}/test.conf", hasty.encode())
    host.agent.exec(["systemctl", "daemon-reload"])
    with host.serve(repository):
        set_clock(0)
        first = look(lambda: host.agent.exec(["systemctl", "restart", "holdfast-core.service"], seconds=60))
        assert (first["outcome"], first["extra"]["version"]) == ("success", ""), first
        assert "0.1.1 is not yet rolled out to this host" in str(first["extra"]["passed_over"])

        assert look(lambda: set_clock(3.5))["extra"]["version"] == "0.1.1"
        poll(lambda: updates.status()["staged"], 240 * host.acceleration.scale, "it is brought", interval=2)
        look(lambda: set_clock(5))
        status = updates.ended("check")
        assert (status["phase"], status["staged"], slot(status, "b")["state"]) == ("staged", "0.1.1", "empty")
        assert updates.records("update.apply") == []

        set_clock(6.5)
        # It writes and goes.
        host.wait_reset(300)
    shutil.rmtree(repository)
    host.wait_ready(updates.admin, 120)
    after = updates.settled()
    assert (after["running"], slot(after, "b")["state"]) == ("0.1.1", "running")
    for kind in ("update.download", "update.apply", "host.reboot"):
        assert {r["actor"]["id"] for r in updates.records(kind)} == {"holdfast"}, kind


@pytest.fixture(scope="session")
def without_core(built_image: Image) -> releases.Built:
    """A release whose core does not start; its gate is also less patient, so that the test need not be."""

    def change(sources: Path) -> None:
        main = sources / "vmm/core/__main__.py"
        main.write_text("raise SystemExit('this release is broken')\n")
        gate = sources / "vmm/update/gate.py"
        text = gate.read_text()
        assert "DEADLINE_S = 600.0" in text
        gate.write_text(text.replace("DEADLINE_S = 600.0", "DEADLINE_S = 30.0"))

    return releases.build("without-core", "0.1.2", change=change)


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_a_release_whose_service_does_not_start_goes_back_with_the_reason(
    updates: Updates, host: Host, without_core: releases.Built
) -> None:
    """One trial, then the version before by itself; the reason is on record, and it is not taken again unless told."""
    bad = Publisher(releases.FOLDER / "bad")
    bad.publish(without_core.folder)
    with host.serve(bad.folder):
        updates.do("check")
        updates.do("download")
        updates.do("apply")
        updates.api.call("POST", "/v1/host/reboot", seconds=120)
        host.wait_reset()
        # The second restart is the gate's own decision.
        host.wait_reset(180)
        host.wait_ready(updates.admin, 120)
        status = updates.settled()
        assert status["running"] == "0.1.0"
        (failed,) = status["failed"]
        assert failed["version"] == "0.1.2"
        # The gate's own record of that boot, before it asked for anything else, says which it was.
        tried = updates.records("update.trial")[-1]["boot"]
        assert failed["reason"].startswith("health: ") and failed["reason"].endswith(f" (boot {tried})"), failed
        assert slot(status, "b")["state"] == "bad"
        record = updates.records("update.failed")[-1]
        assert (record["outcome"], record["reason"], record["object"]["id"]) == ("failure", failed["reason"], "0.1.2")
        assert record["extra"]["boots"] == [tried] and record["boot"] != tried
        host.serial.expect(re.escape(f"UPDATE FAILED: 0.1.2: {failed['reason']}"))
        with pytest.raises(ApiError, match="failed here before"):
            updates.do("download")


@pytest.mark.sfr("FPT_TUD_EXT.1")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, id=kind.name, marks=() if kind is WRITING else pytest.mark.long) for kind in KINDS]
)
def test_a_power_cut_leaves_whole_systems(
    booted: Checkpoint, clients: dict[str, Identity], next_release: releases.Built, workdir: Path, kind: Kind
) -> None:
    """A sample of `make faults`: a cut at a random moment, read from outside; then the host completes the update.

    A guest writes meanwhile (but on a trial), and all that it was told to be on its disk is there.
    """
    update = Update(booted, clients["admin"], next_release)
    one = Cut.any(kind, random.SystemRandom())
    with cut(update, one, workdir / "cut", writing=True) as (host, found):
        print(f"{one}: {found}")
        assert not found.broken
        assert complete(update, host, found) == ""


@pytest.fixture(scope="session")
def next_epoch(built_image: Image) -> releases.Built:
    """A release of the next security epoch, with a new policy key; the old key signs it as well, for the change."""
    keys = releases.FOLDER / "next-epoch-keys"
    if not keys.exists():
        fresh = keys.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree("build/keys", fresh)
        for end in ("key", "pub"):
            (fresh / f"pcr.{end}").rename(fresh / f"pcr-previous.{end}")
        run(["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", fresh / "pcr.key"])
        run(["openssl", "pkey", "-in", fresh / "pcr.key", "-pubout", "-out", fresh / "pcr.pub"])
        (fresh / "pcr.key").chmod(0o600)
        fresh.rename(keys)
    return releases.build("next-epoch", "0.2.0", epoch=2, keys=keys)


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FPT_ML_EXT.1")
def test_after_a_higher_epoch_an_older_signed_system_does_not_get_at_the_volumes(
    faulty_host: Host, clients: dict[str, Identity], next_epoch: releases.Built
) -> None:
    """The policy key changes under way and the volumes stay; the old system, put back by hand, is then locked out."""
    host, updates = faulty_host, Updates(faulty_host, clients["admin"])
    updates.settled()
    made = Publisher(releases.FOLDER / "epochs")
    made.publish(RUNNING)
    made.publish(next_epoch.folder)
    with host.serve(made.folder):
        updates.take()
    status = updates.settled()
    assert (status["running"], status["epoch"], status["floor"]) == ("0.2.0", 2, 2)
    (bless,) = [r for r in updates.records("update.bless") if r["object"]["id"] == "0.2.0"]
    assert len(bless["extra"]["seals_removed"]) == 2, bless
    with pytest.raises(ApiError, match="epoch"):
        updates.do("rollback")

    host.agent.exec(["sync"])
    host.power_cut()
    esp = find_esp(host.files.flat_disk)
    for name in esp.names("EFI/Linux"):
        if name.startswith("EFI/Linux/holdfast_0.2.0"):
            esp.remove(name)
    esp.put(RUNNING / "uki.efi", "EFI/Linux/holdfast_0.1.0.efi")
    host.power_on()
    host.serial.expect("EFI stub: UEFI Secure Boot is enabled", 6)
    host.serial.expect("Failed to unseal", 12)
    host.wait_reset(8)
    assert not host.api().reachable(0.5)
