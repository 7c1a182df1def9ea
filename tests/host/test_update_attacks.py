"""The attack table: whoever has the server, some of the keys or the disk, no update comes of it; all is on record."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.harness import esp, releases
from tests.harness.attacks import ATTACKS, OFFERED, SAMPLE, Attack, honest
from tests.harness.forging import Forgery
from tests.harness.host import Host
from tests.harness.publishing import Publisher
from tests.harness.revoking import Revocations
from tests.harness.updates import Updates, slot
from tests.host.conftest import RUNNING

_EMPTY = """
import os, shutil
for entry in os.scandir("/var/lib/holdfast/update"):
    shutil.rmtree(entry) if entry.is_dir() else os.unlink(entry)
result = os.listdir("/var/lib/holdfast/update")
"""
_RAISE = "from vmm.update.floor import TpmFloor; TpmFloor().raise_to(argument)"
# The root's name is the last thing that is written of a slot. The byte is the root's last, which is read last.
_ALTER = """
import os, time
from pathlib import Path
from vmm.config import gpt
own = Path("/sys/class/block", os.path.basename(os.path.realpath("/dev/disk/by-partlabel/esp")))
disk = "/dev/" + own.resolve().parent.name
deadline = time.monotonic() + argument["seconds"]
result = ""
while not result and time.monotonic() < deadline:
    try:
        with open(disk, "rb") as file:
            table = gpt.read(file)
    except Exception:
        continue  # it is being written
    for partition in table.partitions:
        if partition.name == argument["name"]:
            result = disk + str(partition.number)
            descriptor = os.open(result, os.O_RDWR)
            last = os.pread(descriptor, 1, argument["size"] - 1)
            os.pwrite(descriptor, bytes([last[0] ^ 1]), argument["size"] - 1)
            os.fsync(descriptor)
            os.close(descriptor)
    time.sleep(0.005)
"""


def written(updates: Updates) -> Any:
    """All that an update changes on the disk: both slots, and the boot entries."""
    return updates.status()["slots"], esp.entries(updates.host.agent)


@pytest.mark.sfr("FPT_TUD_EXT.1", "FCS_COP.1/Sig", "FAU_GEN.1")
@pytest.mark.parametrize(
    "attacks", [pytest.param(SAMPLE, id="sample"), pytest.param(ATTACKS, id="all", marks=pytest.mark.long)]
)
def test_a_hostile_repository_is_refused_by_a_named_layer(
    updates: Updates, host: Host, repositories: Path, attacks: Sequence[Attack]
) -> None:
    """Rollback, freeze, mix-and-match, endless data, too few and wrong keys, a bit in each file: none leaves a trace.

    The honest repository is then taken at the same versions as before: nothing forged was remembered.
    """
    older, good = honest(repositories / "origin", repositories)
    before = written(updates)
    with host.serve(good.folder):
        assert updates.do("check")["available"] == OFFERED
    with host.serve(older):
        updates.refused("check", "TUF timestamp: rolled back")
    for attack in attacks:
        print(f"attack: {attack.name}")
        forged = Forgery(good.folder, repositories / "forged")
        attack.change(forged)
        with host.serve(forged.folder) as server:
            server.endless = attack.endless
            updates.refused(attack.job, f"{attack.layer}: .*({attack.says})", **attack.arguments)
    status = updates.status()
    assert (status["staged"], status["installed"]) == ("", "") and slot(status, "b")["state"] == "empty"
    assert written(updates) == before
    refusals = updates.refusals()
    assert [(kind, layer) for kind, layer, _ in refusals] == [
        ("update.check", "TUF timestamp"),
        *((f"update.{attack.job}", attack.layer) for attack in attacks),
    ]
    assert all(reason.startswith(f"{layer}: ") for _, layer, reason in refusals)
    with host.serve(good.folder):
        assert updates.do("check")["available"] == OFFERED
        assert updates.do("download")["staged"] == OFFERED


@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_no_epoch_below_the_floor_is_taken(updates: Updates, host: Host, repositories: Path) -> None:
    """The floor in the TPM holds when everything that the updater remembers is gone, and for a UKI put on the ESP.

    That such a UKI, were it started, would not get at the volumes is shown in test_update.py, where the floor is
    raised by a release; here it is raised as blessing that release does.
    """
    old = Forgery(repositories / "origin", repositories / "old")
    old.release("0.1.9")
    old.publish()
    new = Forgery(old.folder, repositories / "new")
    new.release("0.2.0", epoch=2)
    new.publish()
    with host.serve(new.folder):
        assert updates.do("check")["available"] == "0.2.0"
        host.agent.python(_RAISE, 2)
        assert (updates.status()["floor"], updates.status()["floor_source"]) == (2, "tpm")
        updates.refused("download", "epoch floor: 0.1.9 has epoch 1, below the floor of 2", version="0.1.9")

    before = written(updates)
    with host.serve(old.folder):
        updates.refused("check", "TUF timestamp: rolled back")
        host.agent.exec(["systemctl", "stop", "holdfast-update.service"])
        assert host.agent.python(_EMPTY) == []
        updates.refused("check", "epoch floor: 0.1.9 has epoch 1, below the floor of 2")
        updates.refused("download", "epoch floor: 0.1.9 has epoch 1, below the floor of 2", version="0.1.9")

    esp.copy(host.agent, "holdfast_0.1.0.efi", "holdfast_0.0.9.efi")
    updates.refused("rollback", "epoch floor: 0.0.9 has epoch 1, below the floor of 2")
    esp.remove(host.agent, "holdfast_0.0.9.efi")
    assert written(updates) == before

    assert [(kind, layer) for kind, layer, _ in updates.refusals()] == [
        ("update.download", "epoch floor"),
        ("update.check", "TUF timestamp"),
        ("update.check", "epoch floor"),
        ("update.download", "epoch floor"),
        ("update.rollback", "epoch floor"),
    ]
    with host.serve(new.folder):
        assert updates.do("check")["available"] == "0.2.0"
        assert updates.do("download")["staged"] == "0.2.0"


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FPT_TUD_EXT.2", "FCS_COP.1/Sig", "FAU_GEN.1")
def test_what_is_not_what_was_signed_gets_no_boot_entry(
    updates: Updates, host: Host, offered: Publisher, next_release: releases.Built, repositories: Path
) -> None:
    """A root that its UKI's hash does not fit, a UKI of a revoked key, and a slot that is altered once it is written.

    The last one is altered between the writing and the end of the read-back. What is altered after that is found by
    dm-verity at the start (test_secure_boot.py), and by a rollback that would lead there (test_update_work.py).
    """
    before = written(updates)
    altered = repositories / "root.raw"
    content = bytearray((next_release.folder / "root.raw").read_bytes())
    content[len(content) // 2] ^= 1
    altered.write_bytes(content)
    forged = Forgery(offered.folder, repositories / "forged")
    forged.other_root("0.1.1", altered, RUNNING / "root.raw", "0.1.0")
    forged.publish()
    with host.serve(forged.folder):
        assert updates.do("check")["available"] == "0.1.1"
        assert updates.do("download")["staged"] == "0.1.1"
    updates.refused("apply", "read-back: .* is not what root hash")
    assert written(updates) == before
    shutil.rmtree(forged.folder)

    good = Forgery(offered.folder, repositories / "good")
    for _ in range(2):
        good.publish()
    with host.serve(good.folder):
        assert updates.do("download")["staged"] == "0.1.1"
    revocations = Revocations(host.agent)
    revocations.certificate("db")
    updates.refused("apply", "UKI signer: the firmware's dbx revokes .*Secure Boot signature key")
    revocations.file(next_release.folder / "uki.efi")
    updates.refused("apply", "UKI signer: the firmware's dbx revokes this very file")
    assert written(updates) == before
    revocations.file(RUNNING / "uki.efi")

    wanted = {"name": "holdfast_0.1.1", "size": len(content), "seconds": 60 * host.acceleration.scale}
    with ThreadPoolExecutor(1) as beside:
        alteration = beside.submit(host.agent.python, _ALTER, wanted, seconds=70)
        updates.refused("apply", "read-back: .* is not what root hash")
        assert alteration.result(), "nothing was altered"
    assert written(updates) == before

    assert [(kind, layer) for kind, layer, _ in updates.refusals()] == [
        ("update.apply", layer) for layer in ("read-back", "UKI signer", "UKI signer", "read-back")
    ]
    assert slot(updates.do("apply"), "b")["state"] == "trying"
    assert [name for name, _ in esp.entries(host.agent) if "0.1.1" in name] == ["holdfast_0.1.1+3-0.efi"]
