"""What is said of a machine from its row in the database and what its domain does."""

from __future__ import annotations

from vmm.hypervisor import domain
from vmm.hypervisor.types import Domain, State
from vmm.machines.store import Row
from vmm.machines.types import Machine, MachineSpec, SavedState


def need(spec: MachineSpec) -> int:
    """The most memory, in bytes, that a machine takes while it runs."""
    return spec.memory + domain.overhead(spec.cpus)


def is_ours(row: Row | None, found: Domain) -> bool:
    """Whether a domain is the machine of that row, as it is stored."""
    return row is not None and found.spec_sha256 == row.spec_sha256 and found.uid == row.uid


def left_behind(row: Row, state: State) -> bool:
    """Whether a domain was restored and then, because core ended, never let run."""
    return state is State.PAUSED and row.saved is not None and row.saved.unused


def view(row: Row, state: State) -> Machine:
    """The machine as callers see it."""
    spec, saved, word = row.spec, None, state.value
    if row.saved is not None:
        phase = "saved" if row.saved.phase == "resuming" else row.saved.phase
        saved = SavedState(phase, row.saved.since, row.saved.size, row.saved.reason)
        if state is State.STOPPED and phase == "saved":
            word = "saved"
    return Machine(
        spec.name,
        str(row.id),
        word,
        row.uid,
        row.created,
        spec.cpus,
        spec.memory,
        spec.disks,
        spec.networks,
        spec.description,
        spec.stop_timeout,
        spec.host_stop,
        saved,
    )
