"""Whether a saved state may be used, what else its machine may be asked for, and what goes on record."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.unit.test_core_rig import FakeAudit, Rig
from tests.unit.test_guests import boot
from tests.unit.test_states_rig import SPEC, file, left, make, saved, starts_cold, told
from vmm import wire
from vmm.audit.client import AuditClient
from vmm.core.guests import Guests, recorder
from vmm.errors import Conflict, Unavailable
from vmm.machines.types import Hardware
from vmm.volumes.types import MIB


async def disk_written(rig: Rig, id: UUID) -> None:
    path = rig.volumes.path((await rig.volumes.show("v")).uuid)
    with path.open("r+b") as disk:
        disk.write(b"new")


async def disk_replaced(rig: Rig, id: UUID) -> None:
    path = rig.volumes.path((await rig.volumes.show("v")).uuid)
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


async def variables_gone(rig: Rig, id: UUID) -> None:
    rig.nvram.path(id).unlink()


async def other_confinement(rig: Rig, id: UUID) -> None:
    await rig.database.run(lambda connection: connection.execute("UPDATE saved SET domain = 'of another release'"))


async def file_gone(rig: Rig, id: UUID) -> None:
    file(rig, id).unlink()


async def file_of_another(rig: Rig, id: UUID) -> None:
    file(rig, id).write_text(f"{UUID(int=7)} other {'0' * 64} 70007")


async def libvirt_refuses(rig: Rig, id: UUID) -> None:
    rig.hypervisor.mishaps["restore"] = Conflict("libvirt cannot restore it: Unknown savevm section")


async def another_specification(rig: Rig, id: UUID) -> None:
    file(rig, id).write_text(f"{id} web {'0' * 64} 70000")


async def cannot_run(rig: Rig, id: UUID) -> None:
    rig.hypervisor.mishaps["resume"] = Unavailable("libvirt did not answer within 30 s")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (disk_written, "its disks were changed since"),
        (disk_replaced, "its disks were changed since"),
        (variables_gone, "its disks were changed since"),
        (other_confinement, "this release would start the machine with other hardware or confinement"),
        (file_gone, "its file is gone"),
        (file_of_another, "it is the state of another machine"),
        (libvirt_refuses, "libvirt cannot restore it: Unknown savevm section"),
        (another_specification, "libvirt made something else of it"),
        (cannot_run, "it could not be let run: libvirt did not answer within 30 s"),
    ],
)
def test_a_state_that_cannot_be_used(
    rig: Rig, tmp_path: Path, change: Callable[[Rig, UUID], Awaitable[None]], reason: str
) -> None:
    async def life() -> None:
        id = await saved(rig, tmp_path)
        await change(rig, id)
        view = await rig.machines.start("web")
        assert (view.state, told(view)) == ("running", ("lost", reason))
        assert rig.recorded[-1] == ("machine.resume", "web", f"it starts cold: {reason}")
        assert left(rig) == [] and len(rig.hypervisor.documents) == 2
        assert list(rig.hypervisor.domains) == [id] and await rig.machines.unknown() == []

    asyncio.run(life())


def test_a_boot_of_a_release_that_knows_no_states_ends_them(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig)
        await rig.machines.stop_all()
        # It notes its boot, and may have started the machine.
        await rig.database.run(lambda connection: connection.execute("UPDATE host SET boot = 'of an older release'"))
        await boot(rig, tmp_path, "third")
        await starts_cold(rig, "a release that cannot resume it ran in between")

    asyncio.run(life())


def test_boots_that_come_to_nothing_leave_a_state_alone(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        id = await saved(rig, tmp_path)
        for number in range(3):
            await boot(rig, tmp_path, f"no end {number}")
            (rig.directory / "saved" / f"{UUID(int=3)}.new").write_bytes(b"a leftover")
        await boot(rig, tmp_path, "the last")
        assert left(rig) == [file(rig, id).name]
        assert told(await rig.machines.start("web")) == ("resumed", "")

    asyncio.run(life())


# -- trouble that passes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["restore", "restored"])
def test_libvirt_away_keeps_the_state(rig: Rig, tmp_path: Path, step: str) -> None:
    async def life() -> None:
        await saved(rig, tmp_path)
        assert await rig.machines.count_try("web") == 1
        rig.hypervisor.mishaps[step] = Unavailable("libvirt does not answer")
        with pytest.raises(Unavailable):
            await rig.machines.start("web")
        await rig.machines.close()
        # The end of what was restored is no reason to leave the machine off.
        assert rig.hypervisor.domains == {} and await rig.machines.count_try("web") == 2
        assert told(await rig.machines.start("web")) == ("resumed", "")

    asyncio.run(life())


def test_nothing_is_resumed_without_a_record(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(*_: Any) -> None:
        raise Unavailable("the audit store is full")

    async def life() -> None:
        id = await saved(rig, tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(rig.machines._states, "_record", refuse)
            with pytest.raises(Unavailable, match="audit store"):
                await rig.machines.start("web")
            assert rig.hypervisor.domains == {} and file(rig, id).exists()
            file(rig, id).unlink()
            with pytest.raises(Unavailable, match="audit store"):
                await rig.machines.start("web")
            assert rig.hypervisor.domains == {} and len(rig.hypervisor.documents) == 1
        await starts_cold(rig, "its file is gone")

    asyncio.run(life())


def test_the_host_stays_after_all(rig: Rig) -> None:
    async def life() -> None:
        await make(rig)
        await rig.machines.stop_all()
        await rig.machines.host_stays()
        assert told(await rig.machines.start("web")) == ("resumed", "")

    asyncio.run(life())


# -- while a state is there ----------------------------------------------------------------------------------------


def test_what_a_saved_machine_can_be_asked_for(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        id = await saved(rig, tmp_path)
        with pytest.raises(Conflict, match="is saved") as refused:
            await rig.machines.delete("web")
        assert "force-off" in refused.value.hint
        with pytest.raises(Conflict, match="belongs to the machine 'web'"):
            await rig.volumes.delete("v")
        with pytest.raises(Conflict, match="does not run"):
            await rig.machines.stop("web", 1)
        size = file(rig, id).stat().st_blocks * 512
        capacity = rig.volumes._capacity() // MIB * MIB
        with pytest.raises(Unavailable, match=f"volumes and uploads have {MIB + size}"):
            await rig.volumes.create("w", capacity)
        view = await rig.machines.force_off("web")
        assert (view.state, view.saved) == ("stopped", None) and left(rig) == []
        assert await rig.machines.to_resume() == []
        with pytest.raises(Conflict, match="does not run"):
            await rig.machines.force_off("web")
        await rig.machines.delete("web")

    asyncio.run(life())


@asynccontextmanager
async def recording(rig: Rig, tmp_path: Path) -> AsyncIterator[tuple[FakeAudit, Guests]]:
    """Guests whose states are recorded with an audit daemon, and that daemon."""
    audit, socket = FakeAudit(), tmp_path / "audit.sock"
    server = await wire.serve(socket, audit.handle)
    client = AuditClient(socket)
    rig.machines._states._record = recorder(client)
    yield audit, Guests(rig.machines, rig.hypervisor, client)
    server.close()


def test_a_second_stop_does_not_disturb_the_first(rig: Rig, tmp_path: Path) -> None:
    """A guest that is being saved is paused; whoever stops the host meanwhile must not switch it off."""

    async def life() -> None:
        id = await make(rig)
        rig.hypervisor.delay = 0.1
        async with recording(rig, tmp_path) as (audit, guests):
            first, second = await asyncio.gather(guests.stop(), guests.stop())
        assert [one.how for one in first] == ["saved"] and second == [] and file(rig, id).exists()
        (entry,) = audit.entries
        assert (entry.type, entry.phase, entry.outcome) == ("machine.save", "event", "success")
        assert (entry.actor.id, entry.object.kind, entry.object.id, entry.object.name) == (
            *("holdfast", "machine"),
            *(str(id), "web"),
        )

    asyncio.run(life())


def test_a_fallback_is_on_record_with_its_reason(rig: Rig, tmp_path: Path) -> None:
    async def life() -> None:
        await make(rig)
        rig.hypervisor.mishaps["save"] = Unavailable("no space")
        async with recording(rig, tmp_path) as (audit, guests):
            await guests.stop()
        assert [(entry.type, entry.outcome, entry.reason) for entry in audit.entries] == [
            ("machine.save", "failure", "no space"),
            ("machine.stop", "success", "the host stops: shut-down; not saved: no space"),
        ]

    asyncio.run(life())


def test_what_a_guest_does_not_see_does_not_change_its_hardware() -> None:
    """Nor does a field that has its default: a release with a new one still recognises what an older one saved."""
    id = UUID(int=1)
    bare = SPEC.hardware
    assert msgspec.structs.replace(SPEC, name="db", host_stop="shut-down", tags=("a",)).hardware == bare
    assert bare.sha256(id) != bare.sha256(UUID(int=2))
    assert Hardware(1, 64 * MIB).sha256(id) == Hardware(1, 64 * MIB, (), ()).sha256(id)
    said = msgspec.json.encode({"cpus": 1, "memory": 64 * MIB}, order="deterministic")
    assert Hardware(1, 64 * MIB).sha256(id) == hashlib.sha256(id.bytes + said).hexdigest()
