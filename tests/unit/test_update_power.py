"""Power cuts and second thoughts at every step: what is left is whole, and the next run completes."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from tests.unit.test_update_machine import (
    Killed,
    Power,
    World,
    apply,
    bless,
    boot,
    download,
    names,
)
from vmm.update import slots
from vmm.update.errors import Cancelled
from vmm.update.job import Job
from vmm.update.state import Store


def test_cancelled_at_any_step(world: World) -> None:
    """Up to the moment when the boot loader is told; what begins after that is completed."""
    seen: list[str] = []

    def begin(cancel_at: int) -> Job:
        job = Job()
        left = [cancel_at]

        def step(name: str) -> None:
            seen.append(name)
            left[0] -= 1
            if left[0] == 0:
                job.cancel()

        world.machine.steps = step
        return job

    for step in range(1, 30):
        seen.clear()
        download(world)
        job = begin(step)
        try:
            apply(world, job=job)
        except Cancelled:
            assert "write uki" not in seen
            assert names(world) == ["holdfast_1.0.0.efi"] and world.env.store.state.installed is None
        else:
            break
    assert step > 5 and seen[step - 1] == "write uki"
    assert names(world) == ["holdfast_1.0.0.efi", "holdfast_1.1.0+3-0.efi"]


def test_killed_at_every_step_of_a_download(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    after = 0
    while True:
        with monkeypatch.context() as patch:
            power = Power(after, patch)
            try:
                download(world)
            except Killed:
                pass
            else:
                break
            finally:
                power.left = 1 << 30
        after += 1
        world.env = replace(world.env, store=Store(world.env.folder))
        # Whatever is there is either complete or not offered.
        if release := world.env.staging.staged():
            world.env.staging.verify(release, Job())
        if after % 5 == 0:
            shutil.rmtree(world.env.folder / "staging", ignore_errors=True)
    assert after > 20
    apply(world)


def test_killed_at_every_step_of_writing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    after = 0
    kills = 0
    while True:
        if not world.env.staging.staged():
            download(world)
        with monkeypatch.context() as patch:
            power = Power(after, patch)
            world.machine.steps = power.step
            done = False
            try:
                apply(world)
                done = True
            except Killed:
                kills += 1
            power.left = 1 << 30
        world.machine.steps = lambda step: None
        after += 1
        world.env = replace(world.env, store=Store(world.env.folder))
        assert (world.machine.linux / "holdfast_1.0.0.efi").exists()
        usable = [e for e in world.machine.entries() if e.version == "1.1.0"]
        if usable:
            # Whatever the boot loader could start is whole.
            written = slots.find(world.machine.table_, "1.1.0")
            assert written is not None and usable[0].uki is not None
            device = world.machine.device
            world.machine.verify(device(written.root), device(written.verity), usable[0].uki.root_hash)
            assert world.env.store.state.installed is not None
        if done:
            break
        if world.env.store.state.installed is not None and world.env.store.state.installed.certain:
            # Killed while tidying up: the next boot is into the new version.
            break
    assert kills > 15
    boot(world, "1.1.0")
    bless(world)
    assert world.work.settle().kind == "blessed"


def test_interrupted_before_the_boot_entry(world: World) -> None:
    """Killed between the promise and the UKI: nothing waits, and nothing is blamed."""
    download(world)
    dead: list[str] = []

    def kill(step: str) -> None:
        # Nothing tidies up after a kill.
        if dead or step == "write uki":
            dead.append(step)
            raise Killed

    world.machine.steps = kill
    with pytest.raises(Killed):
        apply(world)
    boot(world, "1.0.0")
    assert world.env.store.state.installed is not None
    assert world.work.settle().kind == "withdrawn"
    assert world.env.store.state.installed is None and world.env.store.state.failed == ()
    assert world.records[-1].reason == "interrupted before it could start"
