"""The attack table: whoever has the server, some of the keys or the disk, no update comes of it; all is on record."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from signing.root import now
from tests.harness import esp, releases
from tests.harness.altering import alter
from tests.harness.attacks import ATTACKS, OFFERED, SAMPLE, Attack, honest
from tests.harness.forging import Forgery
from tests.harness.host import Host
from tests.harness.publishing import Publisher
from tests.harness.revoking import Revocations
from tests.harness.updates import Updates, slot
from tests.host.conftest import RUNNING
from vmm.paths import FETCH_SOCKET, UPDATE_SOCKET

_EMPTY = """
import os, shutil
for entry in os.scandir("/var/lib/holdfast/update"):
    shutil.rmtree(entry) if entry.is_dir() else os.unlink(entry)
result = os.listdir("/var/lib/holdfast/update")
"""
_RAISE = "from vmm.update.floor import TpmFloor; TpmFloor().raise_to(argument)"
# One call as a user, by name or number, without capabilities: what is answered, or why nothing is.
_CALL_AS = """
import asyncio, os, pwd
from pathlib import Path
from vmm import wire
from vmm.errors import UserError
user, socket, method = argument
read, write = os.pipe()
child = os.fork()
if child == 0:
    try:
        if isinstance(user, str):
            known = pwd.getpwnam(user)
            os.initgroups(user, known.pw_gid)
            uid, gid = known.pw_uid, known.pw_gid
        else:
            os.setgroups([])
            uid = gid = user
        os.setgid(gid)
        os.setuid(uid)
        try:
            said = repr(asyncio.run(wire.call(Path(socket), method)))
        except UserError as error:
            said = error.message
        os.write(write, said.encode())
    finally:
        os._exit(0)
os.close(write)
with os.fdopen(read) as pipe:
    result = pipe.read()
os.waitpid(child, 0)
"""
# Of a guest, see docs/architecture.md.
_GUEST_UID = 70_000


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
    before = updates.written()
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
    assert updates.written() == before
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

    before = updates.written()
    with host.serve(old.folder):
        updates.refused("check", "TUF timestamp: rolled back")
        host.agent.exec(["systemctl", "stop", "holdfast-update.service"])
        assert host.agent.python(_EMPTY) == []
        updates.refused("check", "epoch floor: 0.1.9 has epoch 1, below the floor of 2")
        updates.refused("download", "epoch floor: 0.1.9 has epoch 1, below the floor of 2", version="0.1.9")

    esp.copy(host.agent, "holdfast_0.1.0.efi", "holdfast_0.0.9.efi")
    updates.refused("rollback", "epoch floor: 0.0.9 has epoch 1, below the floor of 2")
    esp.remove(host.agent, "holdfast_0.0.9.efi")
    assert updates.written() == before

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


@pytest.mark.sfr("FPT_TUD_EXT.1", "FMT_MOF_EXT.1", "FAU_GEN.1")
def test_an_administrator_overrides_expiry_and_nothing_else(updates: Updates, host: Host, repositories: Path) -> None:
    """What nobody has renewed is taken when that is said, on record; signatures and the floor hold as ever."""
    past = dict.fromkeys(("timestamp", "snapshot", "targets"), now() - datetime.timedelta(hours=1))
    expired = Forgery(repositories / "origin", repositories / "expired")
    expired.release(OFFERED)
    expired.publish(expires=past)
    forged = Forgery(expired.folder, repositories / "forged")
    forged.publish(by={"timestamp": "snapshot"}, expires=past)

    with host.serve(expired.folder):
        updates.refused("check", "TUF timestamp: expired")
        assert updates.do("check", override_expiry=True)["available"] == OFFERED
        assert updates.do("download")["staged"] == OFFERED
    for kind in ("update.check", "update.download"):
        record = updates.outcomes(kind)[-1]
        told = {name: record["extra"][name] for name in ("override_expiry", "expired", "time_source")}
        assert told == {"override_expiry": True, "expired": list(past), "time_source": "clock"}, kind
        assert (record["outcome"], record["actor"]["id"]) == ("success", "admin"), kind

    with host.serve(forged.folder):
        unsigned = "TUF timestamp: not signed by enough of the right keys"
        updates.refused("check", unsigned, override_expiry=True)
        updates.refused("download", unsigned)
    host.agent.python(_RAISE, 2)
    with host.serve(expired.folder):
        below = f"epoch floor: {OFFERED} has epoch 1, below the floor of 2"
        updates.refused("check", below, override_expiry=True)
        updates.refused("download", below, version=OFFERED)
        updates.refused("apply", below)
    assert [(kind, layer) for kind, layer, _ in updates.refusals()] == [
        ("update.check", "TUF timestamp"),
        ("update.check", "TUF timestamp"),
        ("update.download", "TUF timestamp"),
        ("update.check", "epoch floor"),
        ("update.download", "epoch floor"),
        ("update.apply", "epoch floor"),
    ]


@pytest.mark.sfr("FPT_TUD_EXT.1", "FMT_MOF_EXT.1")
def test_nobody_else_on_the_host_uses_the_updater_or_its_fetcher(host: Host) -> None:
    """A guest's user and services that have no business there do not get as far as the sockets; the API's does, and is
    refused by its uid; core may ask, but not judge a trial; the fetcher is for root alone.
    """
    update, fetch, denied = str(UPDATE_SOCKET), str(FETCH_SOCKET), "does not answer: Permission denied"
    for user, socket, method, answer in (
        ("root", update, "status", "'running': '0.1.0'"),
        ("root", fetch, "nothing", "the fetcher has no method 'nothing'"),
        ("holdfast-core", update, "status", "'running': '0.1.0'"),
        ("holdfast-core", update, "bless", "bless is for the host itself"),
        ("holdfast-core", update, "condemn", "condemn is for the host itself"),
        ("holdfast-core", update, "settle", "settle is for the host itself"),
        ("holdfast-api", update, "status", "uid 901 may not use the updater"),
        ("holdfast-api", update, "rollback", "uid 901 may not use the updater"),
        ("holdfast-fetch", update, "status", denied),
        (_GUEST_UID, update, "status", denied),
        ("holdfast-core", fetch, "nothing", denied),
        ("holdfast-api", fetch, "nothing", denied),
        ("holdfast-fetch", fetch, "nothing", denied),
        (_GUEST_UID, fetch, "nothing", denied),
    ):
        said = host.agent.python(_CALL_AS, [user, socket, method], seconds=60)
        assert answer in said, (user, socket, method, said)


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FPT_TUD_EXT.2", "FCS_COP.1/Sig", "FAU_GEN.1")
def test_what_is_not_what_was_signed_gets_no_boot_entry(
    updates: Updates, host: Host, offered: Publisher, next_release: releases.Built, repositories: Path
) -> None:
    """A root that its UKI's hash does not fit, a UKI of a revoked key, and a slot that is altered once it is written.

    The last one is altered between the writing and the end of the read-back. What is altered after that is found by
    dm-verity at the start (test_trials.py), and by a rollback that would lead there (test_update_work.py).
    """
    before = updates.written()
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
    assert updates.written() == before
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
    assert updates.written() == before
    revocations.file(RUNNING / "uki.efi")

    with ThreadPoolExecutor(1) as beside:
        # The root's name is the last thing that is written of a slot; its last byte is read last.
        alteration = beside.submit(alter, host, "holdfast_0.1.1", len(content) - 1)
        updates.refused("apply", "read-back: .* is not what root hash")
        alteration.result()
    assert updates.written() == before

    assert [(kind, layer) for kind, layer, _ in updates.refusals()] == [
        ("update.apply", layer) for layer in ("read-back", "UKI signer", "UKI signer", "read-back")
    ]
    assert slot(updates.do("apply"), "b")["state"] == "trying"
    assert [name for name, _ in esp.entries(host.agent) if "0.1.1" in name] == ["holdfast_0.1.1+3-0.efi"]
