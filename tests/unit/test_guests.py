"""What becomes of guests when the host stops, by restart, power button or power cut."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.unit.test_core_rig import FakeAudit, Rig
from tests.unit.test_hypervisor_rig import FakeHypervisor
from vmm import wire
from vmm.audit.client import AuditClient
from vmm.core import stop
from vmm.core.guests import Guests
from vmm.errors import Conflict, Unavailable
from vmm.hypervisor.types import Domain, State
from vmm.machines import store
from vmm.machines.types import MAX_STOP_TIMEOUT, MachineSpec, Stopped
from vmm.volumes.types import MIB

SPEC = MachineSpec("web", 1, 256 * MIB)


async def make(rig: Rig, *names: str, **more: Any) -> None:
    for name in names:
        await rig.machines.create(msgspec.structs.replace(SPEC, name=name, **more))
        await rig.machines.start(name)


async def settled(rig: Rig) -> None:
    await asyncio.sleep(0)
    await rig.machines.close()


async def powers(rig: Rig) -> dict[str, str]:
    return {row.spec.name: row.power for row in await rig.database.run(store.rows)}


async def boot(rig: Rig, tmp_path: Path, id: str, *, ends: bool = True) -> None:
    """Core begins anew, after a stop of the host when ``id`` is another boot."""
    await settled(rig)
    if ends:
        rig.hypervisor.domains.clear()
    rig.hypervisor._listeners.clear()
    (tmp_path / "root/proc/sys/kernel/random/boot_id").write_text(id + "\n")
    rig.machines = rig.new_machines()
    await rig.machines.recover()


def test_what_ran_is_to_be_started_again(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "runs", "stopped", "forced", "ended")
        await rig.machines.create(msgspec.structs.replace(SPEC, name="never"))
        await rig.machines.stop("stopped", 5)
        await rig.machines.force_off("forced")
        rig.hypervisor.ends(UUID((await rig.machines.show("ended")).uuid))
        await settled(rig)
        off = dict.fromkeys(("ended", "forced", "never", "stopped"), "off")
        assert await powers(rig) == {**off, "runs": "on"}
        # The power fails: nobody was told.
        await boot(rig, tmp_path, "second")
        assert await rig.machines.to_resume() == ["runs"]
        await rig.machines.start("runs")
        assert await rig.machines.to_resume() == []

    asyncio.run(life())


def test_a_restart_of_core_alone_starts_nothing(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "a", "b")
        ended = UUID((await rig.machines.show("b")).uuid)
        await boot(rig, tmp_path, "first", ends=False)
        rig.hypervisor.ends(ended, heard=False)
        assert await rig.machines.to_resume() == []
        rig.hypervisor.reconnect()
        await settled(rig)
        assert await powers(rig) == {"a": "on", "b": "off"}
        # A start that was not noted is found, too.
        await rig.database.run(lambda connection: connection.execute("UPDATE machines SET power = 'off'"))
        await rig.machines.look_anew()
        assert await powers(rig) == {"a": "on", "b": "off"}

    asyncio.run(life())


def test_stopping_all(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "polite")
        await make(rig, "stubborn", "paused", stop_timeout=1)
        paused = UUID((await rig.machines.show("paused")).uuid)
        rig.hypervisor.domains[paused] = Domain(paused, "paused", State.PAUSED, None, None)
        pressed = rig.hypervisor.shutdown

        async def shutdown(uuid: UUID) -> None:
            if rig.hypervisor.domains[uuid].name == "stubborn":
                return
            await pressed(uuid)

        rig.hypervisor.shutdown = shutdown  # type: ignore[method-assign]
        starting = asyncio.create_task(rig.machines.start("polite"))
        stopped = {one.name: one.how for one in await rig.machines.stop_all()}
        assert stopped == {"polite": "shut-down", "stubborn": "switched-off", "paused": "switched-off"}
        with pytest.raises((Conflict, Unavailable)):
            await starting
        assert rig.hypervisor.domains == {}
        assert await rig.machines.stop_all() == []
        with pytest.raises(Unavailable, match="^the host is about to restart$"):
            await rig.machines.start("polite")
        await boot(rig, tmp_path, "second")
        assert await rig.machines.to_resume() == ["paused", "polite", "stubborn"]

    asyncio.run(life())


def test_a_start_under_way_is_stopped_as_well(rig: Rig) -> None:
    async def life() -> None:
        await rig.machines.create(SPEC)
        rig.hypervisor.delay = 0.05
        starting = asyncio.create_task(rig.machines.start("web"))
        while not rig.hypervisor.most_at_once:
            await asyncio.sleep(0.001)
        (stopped,) = await rig.machines.stop_all()
        await starting
        assert stopped.how == "shut-down" and rig.hypervisor.domains == {}
        assert await rig.machines.to_resume() == ["web"]

    asyncio.run(life())


def test_a_machine_that_was_to_stop_stays_off(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        rig.hypervisor.polite = False
        await make(rig, "web", stop_timeout=1)
        stopping = asyncio.create_task(rig.machines.stop("web", 60))
        await rig.hypervisor.pressed.wait()
        (stopped,) = await rig.machines.stop_all()
        assert stopped.how == "switched-off" and (await stopping).state == "stopped"
        await boot(rig, tmp_path, "second")
        assert await rig.machines.to_resume() == []

    asyncio.run(life())


def test_libvirt_away_while_stopping(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "web")
        rig.hypervisor.connected = False
        (stopped,) = await rig.machines.stop_all()
        assert (stopped.how, stopped.reason) == ("failed", "libvirt does not answer")
        rig.hypervisor.connected = True
        await boot(rig, tmp_path, "second")
        assert await rig.machines.to_resume() == ["web"]

    asyncio.run(life())


class Resumer:
    """Guests with an audit daemon; starts fail for the names in ``failing``."""

    def __init__(self, rig: Rig, tmp_path: Path) -> None:
        self.rig = rig
        self.audit = FakeAudit()
        self.socket = tmp_path / "audit.sock"
        self.guests = Guests(
            rig.machines, rig.hypervisor, AuditClient(self.socket), waits=(0, 0.01, 0.01, 0.01), look=0.01
        )
        self.failing: set[str] = set()
        self.tried: list[str] = []

    async def perform(self, method: str, name: str) -> None:
        assert method == "machine.start"
        self.tried.append(name)
        if name in self.failing:
            raise Unavailable("no memory")
        await self.rig.machines.start(name)


def test_each_machine_has_three_tries(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "a", "b", "c")
        await boot(rig, tmp_path, "second")
        resumer = Resumer(rig, tmp_path)
        server = await wire.serve(resumer.socket, resumer.audit.handle)
        resumer.failing = {"b"}
        resumer.guests._perform = resumer.perform
        await resumer.guests.resume()
        assert resumer.tried == ["a", "b", "c", "b", "b"]
        await settled(rig)
        assert await powers(rig) == {"a": "on", "b": "off", "c": "on"}
        server.close()

    asyncio.run(life())


def test_a_start_that_ends_the_host_is_not_tried_for_ever(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "a")
        for number in range(store.MOST_TRIES):
            await boot(rig, tmp_path, f"boot {number}")
            assert await rig.machines.count_try("a") == number + 1
        await boot(rig, tmp_path, "the last")
        assert await rig.machines.to_resume() == [] and await rig.machines.count_try("a") == 0

    asyncio.run(life())


def test_resuming_waits_for_libvirt_and_audit(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig, "a")
        await boot(rig, tmp_path, "second")
        rig.hypervisor.connected = False
        resumer = Resumer(rig, tmp_path)
        resumer.guests.begin(resumer.perform)
        await asyncio.sleep(0.03)
        rig.hypervisor.connected = True
        await asyncio.sleep(0.03)
        assert resumer.tried == []
        server = await wire.serve(resumer.socket, resumer.audit.handle)
        async with asyncio.timeout(5):
            while await powers(rig) != {"a": "on"}:
                await asyncio.sleep(0.01)
        # The host stops: nothing is resumed any more, and what was stopped is on record.
        stopped = await resumer.guests.stop()
        assert [type(one) for one in stopped] == [Stopped]
        (entry,) = resumer.audit.entries
        assert (entry.type, entry.phase, entry.reason) == ("machine.stop", "event", "the host stops: shut-down")
        server.close()

    asyncio.run(life())


def test_what_was_added_by_a_newer_release_does_not_hide_a_machine(rig: Rig) -> None:
    async def life() -> None:
        await rig.machines.create(SPEC)
        await rig.database.run(
            lambda connection: connection.execute("UPDATE machines SET spec = json_set(spec, '$.colour', 'red')")
        )
        assert (await rig.machines.show("web")).memory == SPEC.memory
        await rig.machines.start("web")
        assert await rig.machines.unknown() == []

    asyncio.run(life())


def test_the_stop_program_asks_core(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def ask() -> None:
        socket = tmp_path / "core.sock"
        assert not await stop.ask_core(socket, 5)
        calls = []

        async def core(request: wire.Request, _channel: wire.Channel) -> Any:
            calls.append((request.method, request.params))
            if len(calls) == 2:
                raise Unavailable("the audit store is full")
            if len(calls) == 3:
                await asyncio.sleep(60)
            return []

        server = await wire.serve(socket, core)
        assert await stop.ask_core(socket, 5)
        assert not await stop.ask_core(socket, 5)
        assert not await stop.ask_core(socket, 0.05)
        assert calls == [("host.stop-guests", {})] * 3
        server.close()

    asyncio.run(ask())
    assert capsys.readouterr().err.splitlines() == [
        "guests: core: the service behind core.sock does not answer: No such file or directory",
        "guests: core: the audit store is full",
        "guests: core does not answer",
    ]


@pytest.mark.parametrize("polite", [True, False])
def test_guests_are_stopped_without_core(polite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def end() -> None:
        monkeypatch.setattr(stop, "_LOOK_S", 0.01)
        hypervisor = FakeHypervisor()
        hypervisor.polite = polite
        for number in range(2):
            id = UUID(int=number)
            hypervisor.domains[id] = Domain(id, f"m{number}", State.RUNNING, None, None)
        await stop.stop_without_core(hypervisor, 0.1)
        assert hypervisor.domains == {}

    asyncio.run(end())


def test_systemd_waits_for_longer_than_the_stop_program_takes() -> None:
    unit = Path(__file__).parents[2] / "image/rootfs/usr/lib/systemd/system/holdfast-guests.service"
    minutes = re.search(r"^TimeoutStopSec=(\d+)min$", unit.read_text(), re.MULTILINE)
    assert minutes is not None
    assert stop.CORE_DEADLINE_S > MAX_STOP_TIMEOUT
    # Each of libvirt's calls has a deadline of its own; leave room for two.
    needed = stop.CORE_DEADLINE_S + stop.CONNECT_DEADLINE_S + stop.GUESTS_DEADLINE_S + 60
    assert int(minutes[1]) * 60 > needed
