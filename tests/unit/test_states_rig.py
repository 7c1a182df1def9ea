"""What the tests of saved states share: a machine that was saved, and what is to be seen of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from tests.unit.test_core_rig import Rig
from tests.unit.test_guests import boot
from vmm.machines.types import Disk, Machine, MachineSpec
from vmm.volumes.types import MIB

SPEC = MachineSpec("web", 1, 256 * MIB, (Disk("v"),), stop_timeout=1, host_stop="save")


async def make(rig: Rig, **changes: Any) -> UUID:
    """A machine that runs; its id."""
    await rig.volumes.create("v", MIB)
    await rig.machines.create(msgspec.structs.replace(SPEC, **changes))
    return UUID((await rig.machines.start("web")).uuid)


async def saved(rig: Rig, tmp_path: Path) -> UUID:
    """A machine that was saved before the host started again; its id."""
    id = await make(rig)
    assert [one.how for one in await rig.machines.stop_all()] == ["saved"]
    await boot(rig, tmp_path, "second")
    rig.recorded.clear()
    return id


def file(rig: Rig, id: UUID) -> Path:
    return rig.directory / "saved" / f"{id}.state"


def left(rig: Rig) -> list[str]:
    return [path.name for path in (rig.directory / "saved").iterdir()]


def told(view: Machine) -> tuple[str, str]:
    assert view.saved is not None
    return view.saved.state, view.saved.reason


async def starts_cold(rig: Rig, reason: str) -> None:
    """The machine starts from its disks, says why, once, and nothing is left of its state."""
    documents, restored = len(rig.hypervisor.documents), list(rig.hypervisor.restored)
    view = await rig.machines.start("web")
    assert (view.state, told(view)) == ("running", ("lost", reason))
    assert len(rig.hypervisor.documents) == documents + 1 and rig.hypervisor.restored == restored
    assert rig.recorded[-1] == ("machine.resume", "web", f"it starts cold: {reason}")
    assert left(rig) == []
    records = len(rig.recorded)
    await rig.machines.force_off("web")
    await rig.machines.start("web")
    assert len(rig.recorded) == records and rig.hypervisor.restored == restored
