"""Machines that crash, over a pretended hypervisor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_core_rig import Rig
from tests.unit.test_guests import Resumer, boot, make, powers, settled
from tests.unit.test_machine_operations import id_of
from vmm import wire
from vmm.hypervisor.types import State
from vmm.machines import crashrows, store
from vmm.machines.crashrows import MOST_RESTARTS, WINDOW_S


async def crash(rig: Rig, resumer: Resumer, name: str) -> dict[str, Any]:
    """A machine's QEMU dies; what is on record of it once everything is done."""
    rig.hypervisor.ends(await id_of(rig, name), crashed=True)
    await settled(rig)
    await resumer.guests.resume()
    entry = resumer.audit.entries[-1]
    assert (entry.type, entry.outcome, entry.actor.id) == ("machine.crash", "failure", "holdfast")
    return entry.extra


@pytest.mark.parametrize("policy", ["stop", "restart"])
def test_crashes(rig: Rig, tmp_path: Path, policy: str) -> None:
    async def life() -> None:
        await make(rig, "web", on_crash=policy)
        resumer = Resumer(rig, tmp_path)
        server = await wire.serve(resumer.socket, resumer.audit.handle)
        resumer.guests.begin(resumer.perform)
        if policy == "stop":
            assert await crash(rig, resumer, "web") == {"crashes": 1, "restarts": False}
            assert (await powers(rig), resumer.tried) == ({"web": "off"}, [])
        else:
            for number in range(1, MOST_RESTARTS + 1):
                assert await crash(rig, resumer, "web") == {"crashes": number, "restarts": True}
                assert await powers(rig) == {"web": "on"} and resumer.tried == ["web"] * number
            assert await crash(rig, resumer, "web") == {"crashes": MOST_RESTARTS + 1, "restarts": False}
            assert await powers(rig) == {"web": "off"} and len(resumer.tried) == MOST_RESTARTS
        await resumer.guests.close()
        server.close()

    asyncio.run(life())


@pytest.mark.parametrize("policy", ["stop", "restart"])
def test_a_panic_leaves_the_domain_until_it_is_started_or_ended(rig: Rig, tmp_path: Path, policy: str) -> None:
    async def life() -> None:
        await make(rig, "web", on_crash=policy)
        resumer = Resumer(rig, tmp_path)
        server = await wire.serve(resumer.socket, resumer.audit.handle)
        resumer.guests.begin(resumer.perform)
        id = await id_of(rig, "web")
        rig.hypervisor.panics(id)
        await settled(rig)
        (entry,) = resumer.audit.entries
        assert entry.reason.startswith("its system panicked; ")
        if policy == "restart":
            assert (await powers(rig), resumer.tried) == ({"web": "on"}, ["web"])
        else:
            assert ((await rig.machines.show("web")).state, await powers(rig)) == ("crashed", {"web": "off"})
            # What is found so is no start that was missed.
            await rig.machines.look_anew()
            assert await powers(rig) == {"web": "off"}
            assert (await rig.machines.start("web")).state == "running"
            # One that nobody heard of is found.
            rig.hypervisor.panics(id, heard=False)
            rig.hypervisor.reconnect()
            await settled(rig)
            await settled(rig)
            assert len(resumer.audit.entries) == 2 and await powers(rig) == {"web": "off"}
            assert (await rig.machines.force_off("web")).state == "stopped"
        await resumer.guests.close()
        server.close()

    asyncio.run(life())


def test_old_crashes_do_not_count(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web", on_crash="restart")
        id = await id_of(rig, "web")

        async def noted(now: float) -> int:
            await rig.database.run(lambda c: store.set_power(c, id, "on"))
            found = await rig.database.run(lambda c: crashrows.note(c, id, now, State.STOPPED))
            assert found is not None
            return found.count

        assert [await noted(now) for now in (1000.0, 1001.0, 1001.0 + WINDOW_S)] == [1, 2, 2]
        assert await noted(5.0) == 1, "the clock was set back"

    asyncio.run(life())


def test_a_crash_that_somebody_mended_first_is_only_told(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "web", on_crash="restart")
        resumer = Resumer(rig, tmp_path)
        server = await wire.serve(resumer.socket, resumer.audit.handle)
        resumer.guests.begin(resumer.perform)
        id = await id_of(rig, "web")
        async with rig.machines.turns.lock(id):
            document = rig.hypervisor.documents[-1]
            rig.hypervisor.ends(id, crashed=True)
            await rig.hypervisor.start(document)
        await settled(rig)
        (entry,) = resumer.audit.entries
        assert entry.extra == {"crashes": 1, "restarts": False} and "started again since" in entry.reason
        assert (await powers(rig), resumer.tried) == ({"web": "on"}, [])
        await resumer.guests.close()
        server.close()

    asyncio.run(life())


def test_what_we_end_ourselves_is_no_crash(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "a", "b", "c", on_crash="restart")
        resumer = Resumer(rig, tmp_path)
        resumer.guests.begin(resumer.perform)
        await rig.machines.force_off("a")
        rig.hypervisor.ends(await id_of(rig, "b"))
        # QEMU dies of our stop.
        rig.hypervisor.polite = False
        stopping = asyncio.create_task(rig.machines.stop("c", 5))
        await rig.hypervisor.pressed.wait()
        rig.hypervisor.ends(await id_of(rig, "c"), crashed=True)
        await stopping
        await settled(rig)
        assert await powers(rig) == {"a": "off", "b": "off", "c": "off"}
        assert resumer.tried == [] and resumer.audit.entries == []
        await resumer.guests.close()

    asyncio.run(life())


def test_a_restart_that_core_did_not_live_to_see_is_made_by_the_next_one(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "web", on_crash="restart")
        rig.hypervisor.ends(await id_of(rig, "web"), crashed=True)
        await settled(rig)
        await boot(rig, tmp_path, "first", ends=False)
        assert await rig.machines.to_resume() == ["web"]

    asyncio.run(life())
