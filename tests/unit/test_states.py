"""Guests that are saved when the host stops, and go on from there once at most, wherever the power fails."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.unit.test_core_rig import Rig
from tests.unit.test_guests import boot, powers
from tests.unit.test_states_rig import SPEC, file, left, make, saved, starts_cold, told
from vmm import atomic
from vmm.errors import Unavailable
from vmm.hypervisor.types import Domain, State
from vmm.machines import savedrows, states, store
from vmm.machines.types import MachineSpec
from vmm.volumes import files
from vmm.volumes.types import MIB


class Killed(BaseException):
    """The power fails here."""


def killed(*_: Any, **__: Any) -> Any:
    raise Killed


def test_a_guest_goes_on_where_it_was(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        id = await make(rig)
        (stopped,) = await rig.machines.stop_all()
        assert (stopped.how, stopped.reason) == ("saved", "") and rig.hypervisor.domains == {}
        assert rig.recorded == [("machine.save", "web", "")]
        assert file(rig, id).stat().st_mode & 0o777 == 0o600
        assert (rig.directory / "saved").stat().st_mode & 0o777 == 0o700
        await boot(rig, tmp_path, "second")
        assert await rig.machines.to_resume() == ["web"]
        view = await rig.machines.show("web")
        assert (view.state, told(view)) == ("saved", ("saved", ""))
        assert view.saved is not None and view.saved.size == file(rig, id).stat().st_blocks * 512 > 0

        # When its processors run, the file is gone and the database says so: both for good.
        resume, seen = rig.hypervisor.resume, []

        async def watched(uuid: UUID) -> None:
            (row,) = await rig.database.run(store.rows)
            seen.append((left(rig), row.saved and row.saved.phase, list(rig.recorded[1:])))
            await resume(uuid)

        monkeypatch.setattr(rig.hypervisor, "resume", watched)
        view = await rig.machines.start("web")
        assert seen == [([], "resuming", [("machine.resume", "web", "")])]
        assert (view.state, told(view)) == ("running", ("resumed", ""))
        assert rig.hypervisor.restored == ["web"] and len(rig.hypervisor.documents) == 1
        assert await powers(rig) == {"web": "on"} and await rig.machines.unknown() == []

        # It has run on: after a power cut it starts from its disks, and that is nothing to tell.
        await boot(rig, tmp_path, "third")
        assert (await rig.machines.start("web")).state == "running"
        assert len(rig.hypervisor.documents) == 2 and len(rig.recorded) == 2

    asyncio.run(life())


def test_only_guests_that_run_and_are_to_be_kept_are_saved(rig: Rig) -> None:
    async def life() -> None:
        id = await make(rig)
        await rig.machines.create(MachineSpec("other", 1, 256 * MIB))
        await rig.machines.start("other")
        rig.hypervisor.domains[id] = Domain(id, "web", State.PAUSED, None, None)
        assert {one.name: one.how for one in await rig.machines.stop_all()} == {
            "other": "shut-down",
            "web": "switched-off",
        }
        assert left(rig) == [] and rig.recorded == []

    asyncio.run(life())


def test_one_that_was_to_stop_is_not_saved(rig: Rig) -> None:
    async def life() -> None:
        rig.hypervisor.polite = False
        await make(rig)
        stopping = asyncio.create_task(rig.machines.stop("web", 60))
        await rig.hypervisor.pressed.wait()
        assert [one.how for one in await rig.machines.stop_all()] == ["switched-off"]
        assert (await stopping).saved is None

    asyncio.run(life())


# -- what cannot be saved ------------------------------------------------------------------------------------------


async def no_room(rig: Rig, patch: pytest.MonkeyPatch) -> None:
    # Of 10 GiB 1 GiB is kept; 300 MiB more are free, and 320 are wanted.
    status = type("", (), {"f_blocks": 10240, "f_bavail": 1024 + 300, "f_frsize": MIB})
    patch.setattr(os, "statvfs", lambda _: status)


async def full_meanwhile(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    rig.hypervisor.mishaps["save"] = Unavailable("libvirt failed: No space left on device")


async def too_slow(rig: Rig, _patch: pytest.MonkeyPatch) -> None:
    rig.hypervisor.delay = 30


async def full_database(_rig: Rig, patch: pytest.MonkeyPatch) -> None:
    def begin(*_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    patch.setattr(savedrows, "begin", begin)


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (no_room, f"its state may need {320 * MIB} bytes of disk space, {300 * MIB} are free"),
        (full_meanwhile, "libvirt failed: No space left on device"),
        (too_slow, "it was not saved in time"),
        (full_database, "database or disk is full"),
    ],
)
@pytest.mark.parametrize("polite", [True, False])
def test_what_cannot_be_saved_is_shut_down(
    rig: Rig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: Callable[[Rig, pytest.MonkeyPatch], Awaitable[None]],
    reason: str,
    polite: bool,
) -> None:
    async def life() -> None:
        await make(rig)
        rig.hypervisor.polite = polite
        with monkeypatch.context() as patch:
            await trouble(rig, patch)
            (stopped,) = await rig.machines.stop_all()
        rig.hypervisor.delay = 0
        how = "shut-down" if polite else "switched-off"
        assert (stopped.how, stopped.reason) == (how, f"not saved: {reason}")
        assert rig.hypervisor.domains == {} and left(rig) == []
        assert rig.recorded == [("machine.save", "web", reason)]
        await boot(rig, tmp_path, "second")
        assert await rig.machines.to_resume() == ["web"]
        view = await rig.machines.show("web")
        assert view.state == "stopped"
        assert trouble is full_database or told(view) == ("lost", f"not saved: {reason}")
        assert (await rig.machines.start("web")).state == "running"
        assert rig.hypervisor.restored == [] and len(rig.recorded) == 1

    asyncio.run(life())


def test_a_state_that_does_not_reach_the_disk_is_not_used(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def life() -> None:
        await make(rig)

        def fsync(_descriptor: int) -> None:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            (stopped,) = await rig.machines.stop_all()
        assert stopped.how == "switched-off" and "Input/output error" in stopped.reason
        await boot(rig, tmp_path, "second")
        assert left(rig) == [] and (await rig.machines.start("web")).state == "running"
        assert rig.hypervisor.restored == []

    asyncio.run(life())


def test_room_is_promised_once(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two guests are saved together where there is room for one."""

    async def life() -> None:
        for name in ("a", "b"):
            await rig.machines.create(msgspec.structs.replace(SPEC, name=name, disks=()))
            await rig.machines.start(name)
        status = type("", (), {"f_blocks": 10240, "f_bavail": 1024 + 500, "f_frsize": MIB})
        monkeypatch.setattr(os, "statvfs", lambda _: status)
        rig.hypervisor.delay = 0.05
        found = {one.name: one.how for one in await rig.machines.stop_all()}
        assert sorted(found.values()) == ["saved", "shut-down"]

    asyncio.run(life())


def test_waiting_for_others_counts(rig: Rig) -> None:
    async def life() -> None:
        for name in ("a", "b", "c"):
            await rig.machines.create(msgspec.structs.replace(SPEC, name=name, disks=()))
            await rig.machines.start(name)
        rig.hypervisor.delay = 0.8
        found = await rig.machines.stop_all()
        assert sorted(one.how for one in found) == ["saved", "saved", "shut-down"]
        assert [one.reason for one in found if one.how == "shut-down"] == ["not saved: it was not saved in time"]

    asyncio.run(life())


# -- the power fails -----------------------------------------------------------------------------------------------

Arrange = Callable[[Rig, pytest.MonkeyPatch], None]
SAVING: dict[str, Arrange] = {
    "libvirt writes": lambda rig, patch: rig.hypervisor.mishaps.update(save=Killed()),
    "before it has its name": lambda rig, patch: patch.setattr(states.States, "_complete", killed),
    "before its name is durable": lambda rig, patch: patch.setattr(atomic, "sync_folder", killed),
    "before the database knows": lambda rig, patch: patch.setattr(savedrows, "complete", killed),
}


@pytest.mark.parametrize("moment", SAVING)
def test_power_cut_while_saving(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    async def life() -> None:
        await make(rig)
        with monkeypatch.context() as patch:
            SAVING[moment](rig, patch)
            with pytest.raises(Killed):
                await rig.machines.stop_all()
        await boot(rig, tmp_path, "second")
        assert left(rig) == [] and await rig.machines.to_resume() == ["web"]
        await starts_cold(rig, "the host stopped while it was being saved")

    asyncio.run(life())


RESUMING: dict[str, tuple[bool, Arrange]] = {
    "libvirt reads": (True, lambda rig, patch: rig.hypervisor.mishaps.update(restore=Killed())),
    "it is restored": (True, lambda rig, patch: rig.hypervisor.mishaps.update(restored=Killed())),
    "it is recorded": (True, lambda rig, patch: patch.setattr(rig.machines._states, "_record", killed)),
    "the file is there": (False, lambda rig, patch: patch.setattr(files, "remove", killed)),
    "the file is gone": (False, lambda rig, patch: rig.hypervisor.mishaps.update(resume=Killed())),
    "it runs": (False, lambda rig, patch: patch.setattr(savedrows, "settle", killed)),
}


@pytest.mark.parametrize("moment", RESUMING)
def test_power_cut_while_resuming(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Before the point of no return it is resumed by the next start, after it never."""
    again, arrange = RESUMING[moment]

    async def life() -> None:
        await saved(rig, tmp_path)
        with monkeypatch.context() as patch:
            arrange(rig, patch)
            with pytest.raises(Killed):
                await rig.machines.start("web")
        await boot(rig, tmp_path, "third")
        assert await rig.machines.to_resume() == ["web"]
        rig.hypervisor.restored.clear()
        if again:
            view = await rig.machines.start("web")
            assert told(view) == ("resumed", "") and rig.hypervisor.restored == ["web"] and left(rig) == []
        else:
            await starts_cold(rig, "the host stopped while it was being resumed")

    asyncio.run(life())


@pytest.mark.parametrize("phase", ["saved", "resuming"])
def test_core_ends_while_resuming(rig: Rig, tmp_path: Path, phase: str) -> None:
    """What libvirt restored meanwhile has not run: it is ended, and begun again from what is left."""

    async def life() -> None:
        id = await saved(rig, tmp_path)
        (row,) = await rig.database.run(store.rows)
        if phase == "resuming":
            await rig.database.run(lambda connection: savedrows.use(connection, id))
        rig.hypervisor.domains[id] = Domain(id, "web", State.PAUSED, row.running.sha256(id), row.uid)
        await boot(rig, tmp_path, "second", ends=False)
        await rig.machines.look_anew()
        assert await rig.machines.to_resume() == ["web"]
        if phase == "saved":
            assert told(await rig.machines.start("web")) == ("resumed", "")
        else:
            await starts_cold(rig, "it was not resumed to the end")

    asyncio.run(life())


def test_core_ends_while_saving(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def life() -> None:
        await make(rig)
        with monkeypatch.context() as patch:
            patch.setattr(savedrows, "complete", killed)
            with pytest.raises(Killed):
                await rig.machines.stop_all()
        await boot(rig, tmp_path, "first")
        await starts_cold(rig, "the service ended while it was being saved")

    asyncio.run(life())
