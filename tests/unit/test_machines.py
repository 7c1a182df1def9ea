"""The life of machines over a pretended hypervisor, with a real database."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest

from tests.unit.test_core_rig import Rig, make_host
from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor.domain import overhead
from vmm.hypervisor.types import Domain, State
from vmm.machines import store
from vmm.machines.host import Host
from vmm.machines.types import Disk, Interface, MachineSpec
from vmm.volumes.types import MIB

SPEC = MachineSpec("web", 1, 256 * MIB)


def named(name: str, **changes: object) -> MachineSpec:
    return msgspec.structs.replace(SPEC, name=name, **changes)


def test_from_create_to_delete(rig: Rig) -> None:
    async def life() -> None:
        await rig.volumes.create("v1", MIB)
        await rig.volumes.create("v2", MIB)
        spec = named("web", disks=(Disk("v2"), Disk("v1")), networks=(Interface("lan"),), description="a <b>")
        created = await rig.machines.create(spec)
        assert (created.state, created.uid, created.disks) == ("stopped", 70000, spec.disks)
        assert (await rig.volumes.show("v1")).machine == "web"
        assert (await rig.machines.start("web")).state == "running"
        (xml,) = rig.hypervisor.documents
        v1, v2 = (await rig.volumes.show("v1")).uuid, (await rig.volumes.show("v2")).uuid
        assert xml.index(f"{v2}.raw") < xml.index(f"{v1}.raw") and "bridge='op-lan'" in xml
        assert rig.nvram.path(UUID(created.uuid)).read_bytes() == b"variables"
        assert [machine.state for machine in await rig.machines.list_all()] == ["running"]
        with pytest.raises(Conflict, match="'web' is running"):
            await rig.machines.start("web")
        with pytest.raises(Conflict, match="'web' is running"):
            await rig.machines.delete("web")
        with pytest.raises(Conflict, match="belongs to the machine 'web'"):
            await rig.volumes.delete("v1")
        assert (await rig.machines.stop("web", 5)).state == "stopped"
        await rig.machines.delete("web")
        assert not rig.nvram.path(UUID(created.uuid)).exists()
        with pytest.raises(NotFound, match="no machine 'web'"):
            await rig.machines.show("web")
        await rig.volumes.delete("v1")

    asyncio.run(life())


REFUSED = [
    (named("m", cpus=200), UserError, "cpus: 200 are wanted"),
    (named("m", networks=(Interface("lan"), Interface("wan"))), UserError, r"networks\[1\].network: .* 'wan'"),
    (named("m", disks=(Disk("v"), Disk("v"))), UserError, r"disks\[1\].volume: 'v' is listed twice"),
    (named("m", disks=(Disk("v"), Disk("w"))), UserError, r"disks\[1\].volume: there is no volume 'w'"),
    (named("m", disks=(Disk("taken"),)), Conflict, r"disks\[0\].volume: .* belongs to the machine 'other'"),
    (named("other"), Conflict, "already a machine 'other'"),
    (named("m", memory=8192 * MIB), Unavailable, f"not enough memory: .* {3584 * MIB} are left of {3584 * MIB}"),
]


@pytest.mark.parametrize(("spec", "error", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_what_cannot_be_made(rig: Rig, spec: MachineSpec, error: type[UserError], text: str) -> None:
    async def create() -> None:
        await rig.volumes.create("v", MIB)
        await rig.volumes.create("taken", MIB)
        await rig.machines.create(named("other", disks=(Disk("taken"),)))
        with pytest.raises(error, match=text):
            await rig.machines.create(spec)
        assert [machine.name for machine in await rig.machines.list_all()] == ["other"]
        assert (await rig.volumes.show("v")).machine is None

    asyncio.run(create())


def test_memory_is_never_promised_twice(rig: Rig) -> None:
    """Of 3584 MiB three machines of 1024 MiB and their overhead do not fit, even when they start together."""

    async def start() -> None:
        for name in ("a", "b", "c"):
            await rig.machines.create(named(name, memory=1024 * MIB))
        rig.hypervisor.delay = 0.02
        results = await asyncio.gather(*(rig.machines.start(name) for name in "abc"), return_exceptions=True)
        (refused,) = [result for result in results if isinstance(result, Unavailable)]
        need = 1024 * MIB + overhead(1)
        assert f"need {need} bytes, {3584 * MIB - 2 * need} are left of {3584 * MIB}" in refused.message
        assert len(rig.hypervisor.domains) == 2 and rig.hypervisor.most_at_once == 2

    asyncio.run(start())


def test_calls_on_one_machine_wait_for_each_other(rig: Rig) -> None:
    async def race() -> None:
        await rig.machines.create(SPEC)
        rig.hypervisor.delay = 0.02
        results = await asyncio.gather(*(rig.machines.start("web") for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(result, Conflict) for result in results) == 4
        assert rig.hypervisor.most_at_once == 1

    asyncio.run(race())


def test_a_guest_that_ignores_the_power_button(rig: Rig) -> None:
    async def stop() -> None:
        await rig.machines.create(SPEC)
        with pytest.raises(Conflict, match="does not run"):
            await rig.machines.stop("web", 1)
        rig.hypervisor.polite = False
        await rig.machines.start("web")
        with pytest.raises(Conflict, match="did not stop within 0 s") as refused:
            await rig.machines.stop("web", 0)
        assert "force-off" in refused.value.hint
        # force-off does not wait for a stop that waits, and ends it.
        rig.hypervisor.pressed.clear()
        stopping = asyncio.create_task(rig.machines.stop("web", 60))
        await rig.hypervisor.pressed.wait()
        assert (await rig.machines.force_off("web")).state == "stopped"
        assert (await asyncio.wait_for(stopping, 1)).state == "stopped"
        with pytest.raises(Conflict, match="does not run"):
            await rig.machines.force_off("web")

    asyncio.run(stop())


def test_an_end_missed_while_libvirt_was_away_is_found(rig: Rig) -> None:
    async def stop() -> None:
        rig.hypervisor.polite = False
        machine = await rig.machines.create(SPEC)
        await rig.machines.start("web")
        stopping = asyncio.create_task(rig.machines.stop("web", 60))
        await rig.hypervisor.pressed.wait()
        rig.hypervisor.ends(UUID(machine.uuid), heard=False)
        assert not stopping.done()
        rig.hypervisor.reconnect()
        await asyncio.wait_for(stopping, 1)

    asyncio.run(stop())


def test_running_machines_are_adopted_and_others_noticed(rig: Rig, tmp_path: Path) -> None:
    async def restart() -> None:
        ours = UUID((await rig.machines.create(SPEC)).uuid)
        await rig.machines.start("web")
        (tmp_path / "nvram" / f"{uuid4()}.fd").write_bytes(b"")
        machines = rig.new_machines()
        await machines.recover()
        assert [path.stem for path in (tmp_path / "nvram").iterdir()] == [str(ours)]
        assert (await machines.show("web")).state == "running" and await machines.unknown() == []
        stranger = Domain(uuid4(), "stranger", State.RUNNING, None, None)
        rig.hypervisor.domains[stranger.uuid] = stranger
        altered = rig.hypervisor.domains[ours] = Domain(ours, "web", State.RUNNING, "0" * 64, 70000)
        assert {domain.uuid for domain in await machines.unknown()} == {stranger.uuid, altered.uuid}

    asyncio.run(restart())


def test_no_start_without_hardware_virtualisation(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "root/dev/kvm").unlink()

    async def start() -> None:
        await rig.machines.create(SPEC)
        with pytest.raises(Unavailable, match="no hardware virtualisation: /dev/kvm"):
            await rig.machines.start("web")

    asyncio.run(start())


@pytest.mark.parametrize(("module", "text"), [("kvm_amd/parameters/npt", "npt"), ("kvm_intel/parameters/ept", "ept")])
def test_nested_paging_is_needed(tmp_path: Path, module: str, text: str) -> None:
    make_host(tmp_path)
    (tmp_path / "sys/module/kvm_amd/parameters/npt").unlink()
    with pytest.raises(Unavailable, match="neither kvm_amd nor kvm_intel"):
        Host(tmp_path).virtualisation()
    path = tmp_path / "sys/module" / module
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("N\n")
    with pytest.raises(Unavailable, match=rf"nested paging \({text}\)"):
        Host(tmp_path).virtualisation()
    path.write_text("Y\n")
    assert text in Host(tmp_path).virtualisation()


@pytest.mark.parametrize("spoil", ["volume", "network", "libvirt"])
def test_a_start_that_fails_can_be_tried_again(rig: Rig, spoil: str) -> None:
    async def start() -> None:
        volume = await rig.volumes.create("v", MIB)
        await rig.machines.create(named("web", disks=(Disk("v"),), networks=(Interface("lan"),)))
        path = rig.volumes.path(volume.uuid)
        if spoil == "volume":
            path.rename(path.with_suffix(".away"))
        elif spoil == "network":
            rig.networks = {}
        else:
            rig.hypervisor.connected = False
        with pytest.raises(UserError, match="file of the volume 'v'|no operational network 'lan'|libvirt"):
            await rig.machines.start("web")
        if spoil == "volume":
            path.with_suffix(".away").rename(path)
        rig.networks, rig.hypervisor.connected = {"lan": "op-lan"}, True
        assert (await rig.machines.start("web")).state == "running"

    asyncio.run(start())


def test_a_uid_is_used_again_as_late_as_possible(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LAST_UID", 70002)

    def insert(name: str) -> Callable[[sqlite3.Connection], store.Row]:
        return partial(store.insert, id=uuid4(), spec=named(name), created="now")

    async def allocate() -> None:
        rows = [await rig.database.run(insert(name)) for name in "ab"]
        await rig.database.run(lambda connection: store.delete(connection, rows[0].id))
        uids = [row.uid for row in rows] + [(await rig.database.run(insert(name))).uid for name in "cd"]
        assert uids == [70000, 70001, 70002, 70000]
        with pytest.raises(Unavailable, match="all 3 user ids"):
            await rig.database.run(insert("e"))

    asyncio.run(allocate())


def test_the_hash_of_hardware_covers_everything() -> None:
    id = uuid4()
    changes: list[dict[str, Any]] = [{}, {"cpus": 2}, {"memory": MIB}, {"disks": (Disk("v"),)}]
    specs = [named("web", **change) for change in [*changes, {"networks": (Interface("lan"),)}]]
    assert len({spec.hardware.sha256(id) for spec in specs} | {SPEC.hardware.sha256(uuid4())}) == 6
    decoded = msgspec.json.decode(msgspec.json.encode(SPEC), type=MachineSpec)
    assert decoded.hardware.sha256(id) == SPEC.hardware.sha256(id)


def test_a_console_needs_a_running_machine(rig: Rig) -> None:
    async def attach() -> None:
        await rig.machines.create(SPEC)
        action: Callable[[str], Awaitable[object]] = rig.machines.open_console
        with pytest.raises(Conflict, match="does not run"):
            await action("web")
        with pytest.raises(NotFound):
            await action("nobody")

    asyncio.run(attach())
