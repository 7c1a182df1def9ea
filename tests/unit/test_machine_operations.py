"""What is done to machines beside starting and stopping them, over a pretended hypervisor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID

import pytest

from tests.unit.test_core_rig import Rig
from tests.unit.test_guests import SPEC, boot, make, powers
from tests.unit.test_machines import named
from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor.types import State
from vmm.machines import store
from vmm.machines.changes import Changes, Changing, Describing, Renaming
from vmm.machines.power import Power
from vmm.machines.types import Interface
from vmm.volumes.types import MIB


def power(rig: Rig) -> Power:
    return Power(rig.machines, rig.hypervisor)


def changes(rig: Rig) -> Changes:
    return Changes(rig.machines, rig.database)


async def id_of(rig: Rig, name: str) -> UUID:
    return UUID(await rig.machines.uuid(name))


def test_pause_resume_reset_need_the_right_state(rig: Rig) -> None:
    async def life() -> None:
        await rig.machines.create(SPEC)
        for action in (power(rig).pause, power(rig).resume, power(rig).reset):
            with pytest.raises(Conflict, match="'web' is stopped"):
                await action("web")
            with pytest.raises(NotFound):
                await action("nobody")
        await rig.machines.start("web")
        with pytest.raises(Conflict, match="'web' is running"):
            await power(rig).resume("web")
        assert (await power(rig).pause("web")).state == "paused"
        for action in (power(rig).pause, power(rig).reset, rig.machines.start, rig.machines.suspend):
            with pytest.raises(Conflict, match="'web' is paused"):
                await action("web")
        assert (await power(rig).resume("web")).state == "running"
        assert (await power(rig).reset("web")).state == "running" and rig.hypervisor.resets == 1

    asyncio.run(life())


def test_of_two_clients_one_wins(rig: Rig) -> None:
    async def race() -> None:
        await make(rig, "web")
        rig.hypervisor.delay = 0.01
        results = await asyncio.gather(*(power(rig).pause("web") for _ in range(5)), return_exceptions=True)
        assert sum(isinstance(result, Conflict) for result in results) == 4

    asyncio.run(race())


def test_nothing_goes_on_while_the_host_stops(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        rig.machines._host_stops = True
        for action in (power(rig).resume, power(rig).reset):
            with pytest.raises(Unavailable, match="^the host is about to restart$"):
                await action("web")
        assert rig.hypervisor.resets == 0

    asyncio.run(life())


def test_what_a_machine_uses(rig: Rig) -> None:
    async def look() -> None:
        await rig.machines.create(SPEC)
        with pytest.raises(Conflict, match="does not run"):
            await power(rig).stats("web")
        await rig.machines.start("web")
        stats = await power(rig).stats("web")
        assert (stats.cpu_seconds, stats.memory, stats.state) == (1.5, 256 * MIB, "running")
        assert (stats.disks[0].written_bytes, stats.networks[0].read_bytes) == (3, 5)

    asyncio.run(look())


def test_a_suspended_machine_goes_on_from_its_state(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        view = await rig.machines.suspend("web")
        assert (view.state, await powers(rig)) == ("saved", {"web": "off"})
        with pytest.raises(Conflict, match="is stopped"):
            await rig.machines.suspend("web")
        for change in (Changing("web", cpus=2), Renaming("web", "db")):
            with pytest.raises(Conflict, match="'web' is saved"):
                await (changes(rig).rename(change) if isinstance(change, Renaming) else changes(rig).change(change))
        view = await rig.machines.start("web")
        assert view.saved is not None
        assert (view.state, view.saved.state, rig.hypervisor.restored) == ("running", "resumed", ["web"])

    asyncio.run(life())


def test_while_it_is_suspended_only_force_off_gets_through(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        rig.hypervisor.delay = 0.05
        suspending = asyncio.create_task(rig.machines.suspend("web"))
        while not rig.machines._suspending:
            await asyncio.sleep(0.001)
        for action in (power(rig).pause, power(rig).resume, power(rig).reset, rig.machines.suspend, rig.machines.start):
            with pytest.raises(Conflict, match="is being suspended"):
                await action("web")
        with pytest.raises(Conflict, match="is being suspended"):
            await rig.machines.stop("web", 1)
        # A stop of the host waits for it instead of ending the guest half-way.
        assert await rig.machines.stop_all() == []
        assert (await suspending).state == "saved"

    asyncio.run(life())


def test_a_suspend_that_fails_leaves_it_running(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        rig.hypervisor.mishaps["save"] = Unavailable("no space")
        with pytest.raises(Unavailable, match="not saved: no space"):
            await rig.machines.suspend("web")
        assert (await rig.machines.show("web")).state == "running"
        assert (await power(rig).pause("web")).state == "paused"

    asyncio.run(life())


def test_a_rename_while_it_runs(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        await rig.machines.create(named("other"))
        id = await id_of(rig, "web")
        with pytest.raises(Conflict, match="already a machine 'other'"):
            await changes(rig).rename(Renaming("web", "other"))
        view = await changes(rig).rename(Renaming("web", "db"))
        assert (view.name, view.uuid, view.state) == ("db", str(id), "running")
        assert await rig.machines.unknown() == []
        # The name is free, for a machine that runs beside it.
        await make(rig, "web")
        names = [f"<name>{name}_{await id_of(rig, now)}</name>" for name, now in (("web", "db"), ("web", "web"))]
        assert [name in xml for name, xml in zip(names, rig.hypervisor.documents, strict=True)] == [True, True]
        await boot(rig, rig.directory, "first", ends=False)
        assert [(m.name, m.state) for m in await rig.machines.list_all()] == [
            *(("db", "running"), ("other", "stopped"), ("web", "running"))
        ]

    asyncio.run(life())


def test_a_call_that_waited_does_its_work_on_the_machine_it_was_meant_for(rig: Rig) -> None:
    async def race() -> None:
        await make(rig, "web")
        await rig.machines.create(named("other"))
        id = await id_of(rig, "web")
        async with rig.machines.turns.take("web"):
            pausing = asyncio.create_task(power(rig).pause("web"))
            await asyncio.sleep(0.01)
            await rig.database.run(lambda c: store.rename(c, id, "db"))
        assert (await pausing).name == "db" and rig.hypervisor.domains[id].state is State.PAUSED

    asyncio.run(race())


def test_what_is_said_of_a_machine(rig: Rig) -> None:
    async def life() -> None:
        await rig.machines.create(named("web", description="old", tags=("a",)))
        view = await changes(rig).describe(Describing("web", tags=("b", "c")))
        assert (view.description, view.tags) == ("old", ("b", "c"))
        view = await changes(rig).describe(Describing("web", description="", tags=()))
        assert (view.description, view.tags) == ("", ())
        with pytest.raises(UserError, match="nothing is to be changed"):
            await changes(rig).describe(Describing("web"))

    asyncio.run(life())


def test_hardware_of_a_running_machine_changes_with_its_next_start(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        view = await changes(rig).change(Changing("web", cpus=2, memory=512 * MIB, autostart=5))
        assert (view.cpus, view.memory, view.autostart) == (1, 256 * MIB, 5)
        assert view.pending is not None and (view.pending.cpus, view.pending.memory) == (2, 512 * MIB)
        assert await rig.machines.unknown() == []
        await rig.machines.force_off("web")
        view = await rig.machines.show("web")
        assert (view.cpus, view.memory, view.pending) == (2, 512 * MIB, None)
        view = await rig.machines.start("web")
        assert (view.cpus, view.pending) == (2, None) and "<vcpu placement='static'>2<" in rig.hypervisor.documents[-1]
        for wrong, text in ((Changing("web", cpus=255), "cpus: 255"), (Changing("web", memory=1 << 40), "not enough")):
            with pytest.raises(UserError, match=text):
                await changes(rig).change(wrong)
        assert (await changes(rig).change(Changing("web", autostart=None))).autostart is None

    asyncio.run(life())


def test_memory_is_promised_by_what_runs_not_by_what_is_wanted(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web", memory=2048 * MIB)
        await changes(rig).change(Changing("web", memory=64 * MIB))
        await rig.machines.create(named("big", memory=2048 * MIB))
        with pytest.raises(Unavailable, match="not enough memory"):
            await rig.machines.start("big")

    asyncio.run(life())


def test_what_a_newer_release_stored_survives_a_change(rig: Rig) -> None:
    async def life() -> None:
        await rig.machines.create(SPEC)
        await rig.database.run(lambda c: c.execute("UPDATE machines SET spec = json_set(spec, '$.colour', 'red')"))
        await changes(rig).describe(Describing("web", tags=("a",)))
        (found,) = await rig.database.run(lambda c: c.execute("SELECT spec ->> '$.colour' FROM machines").fetchone())
        assert found == "red"

    asyncio.run(life())


def test_machines_that_start_with_the_host(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        for name, order in {"a": 9, "b": 2, "c": None, "z": None, "y": 1}.items():
            await rig.machines.create(named(name, autostart=order))
        for name in ("z", "y"):
            await rig.machines.start(name)
        await boot(rig, tmp_path, "second")
        # First what ran, then what is to start; each by its order.
        assert await rig.machines.to_resume() == ["y", "z", "b", "a"]
        await boot(rig, tmp_path, "second")
        assert await rig.machines.to_resume() == ["y", "z", "b", "a"]

    asyncio.run(life())


def test_a_machine_that_ends_the_host_does_not_start_with_it_for_ever(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await rig.machines.create(named("a", autostart=1))
        for number in range(store.MOST_TRIES):
            await boot(rig, tmp_path, f"boot {number}")
            assert await rig.machines.count_try("a") == number + 1
        for last in ("the last", "another"):
            await boot(rig, tmp_path, last)
            assert await rig.machines.to_resume() == []
        # Who starts it by hand takes it for mended.
        await rig.machines.start("a")
        await rig.machines.force_off("a")
        await boot(rig, tmp_path, "mended")
        assert await rig.machines.to_resume() == ["a"]

    asyncio.run(life())


def test_networks_change_with_the_next_start(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        view = await changes(rig).change(Changing("web", networks=(Interface("lan"),)))
        assert view.networks == () and view.pending is not None and view.pending.networks == (Interface("lan"),)
        with pytest.raises(UserError, match=r"networks\[0\].network: .* 'wan'"):
            await changes(rig).change(Changing("web", networks=(Interface("wan"),)))
        await rig.machines.force_off("web")
        view = await rig.machines.start("web")
        assert view.networks == (Interface("lan"),) and "bridge='op-lan'" in rig.hypervisor.documents[-1]

    asyncio.run(life())
