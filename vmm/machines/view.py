"""What is said of a machine from its row in the database and what its domain does."""

from __future__ import annotations

from vmm.hypervisor import domain
from vmm.hypervisor.types import Domain, State
from vmm.machines.store import Row
from vmm.machines.types import Hardware, Held, Machine, Pending, SavedState


def need(hardware: Hardware) -> int:
    """The most memory, in bytes, that a machine takes while it runs."""
    return hardware.memory + domain.overhead(hardware.cpus)


def is_ours(row: Row | None, found: Domain) -> bool:
    """Whether a domain is the machine of that row, as it is stored."""
    return row is not None and found.spec_sha256 == row.running.sha256(row.id) and found.uid == row.uid


def left_behind(row: Row, state: State) -> bool:
    """Whether a domain was restored and then, because core ended, never let run."""
    return state is State.PAUSED and row.saved is not None and row.saved.unused


def view(row: Row, state: State) -> Machine:
    """The machine as callers see it."""
    spec, saved, word = row.spec, None, state.value
    if row.saved is not None:
        phase = row.saved.phase
        if phase == "resuming":
            phase = "resumed" if state is State.RUNNING else "saved"
        saved = SavedState(phase, row.saved.since, row.saved.size, row.saved.reason)
        if state is State.STOPPED and phase == "saved":
            word = "saved"
    has = spec.hardware if state is State.STOPPED and word != "saved" else row.running
    return Machine(
        spec.name,
        str(row.id),
        word,
        row.uid,
        row.created,
        has.cpus,
        has.memory,
        has.disks,
        has.networks,
        spec.description,
        spec.stop_timeout,
        spec.host_stop,
        spec.tags,
        spec.autostart,
        spec.on_crash,
        saved,
        _pending(has, spec.hardware),
        None if row.held is None else Held(row.held.since, row.held.by, row.held.why),
    )


def _pending(has: Hardware, wanted: Hardware) -> Pending | None:
    if has == wanted:
        return None
    return Pending(
        wanted.cpus if wanted.cpus != has.cpus else None,
        wanted.memory if wanted.memory != has.memory else None,
        wanted.networks if wanted.networks != has.networks else None,
    )
