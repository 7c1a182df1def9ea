"""What callers say and see of machines."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal
from uuid import UUID

import msgspec

from vmm.hypervisor.domain import MAX_DISKS, MAX_INTERFACES
from vmm.volumes.types import MIB, Name

MAX_MEMORY = 1 << 44
MAX_STOP_TIMEOUT = 600
Memory = Annotated[int, msgspec.Meta(ge=64 * MIB, le=MAX_MEMORY, multiple_of=MIB)]
StopTimeout = Annotated[int, msgspec.Meta(ge=1, le=MAX_STOP_TIMEOUT)]
Cpus = Annotated[int, msgspec.Meta(ge=1, le=255)]
HostStop = Literal["shut-down", "save"]
NetworkName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9]{0,7}\Z")]


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A volume that the machine has; the first one is what it boots from."""

    volume: Name


class Interface(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network card in an operational network of the host's configuration."""

    network: NetworkName


class MachineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that an operator decides about a machine.

    ``memory`` is in bytes. ``host_stop`` is what becomes of it when the host stops: "shut-down" presses its power
    button, "save" keeps its memory in a file, from which it goes on when the host is back. ``stop_timeout`` is how many
    seconds each of the two may take: what cannot be saved is shut down, what does not shut down is switched off.
    """

    name: Name
    cpus: Cpus
    memory: Memory
    disks: Annotated[tuple[Disk, ...], msgspec.Meta(max_length=MAX_DISKS)] = ()
    networks: Annotated[tuple[Interface, ...], msgspec.Meta(max_length=MAX_INTERFACES)] = ()
    description: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    stop_timeout: StopTimeout = 120
    host_stop: HostStop = "shut-down"

    def sha256(self, uuid: UUID) -> str:
        """The hash by which a running domain shows that it was made from this machine and specification.

        What has its default does not count, so that a release with new fields still knows what an older one saved.
        """
        defaults = {field.name: field.default for field in msgspec.structs.fields(MachineSpec)}
        said = {name: value for name, value in msgspec.structs.asdict(self).items() if value != defaults[name]}
        return hashlib.sha256(uuid.bytes + msgspec.json.encode(said, order="deterministic")).hexdigest()


class SavedState(msgspec.Struct, frozen=True):
    """What became of the state that a machine was to keep over the last stop of the host.

    ``state`` is "saving", "saved", "resumed", or "lost": then it starts, or did start, from its disks alone, and
    ``reason`` says why. ``since`` is when that stop was, ``size`` in bytes what it takes on the disk now.
    """

    state: Literal["saving", "saved", "resumed", "lost"]
    since: str
    size: int
    reason: str


class Machine(msgspec.Struct, frozen=True):
    """A machine as callers see it: its specification, identity and what it does now.

    ``state`` is the hypervisor's word, or "saved" for one that does not run and goes on from its saved state.
    """

    name: str
    uuid: str
    state: str
    uid: int
    created: str
    cpus: int
    memory: int
    disks: tuple[Disk, ...]
    networks: tuple[Interface, ...]
    description: str
    stop_timeout: int
    host_stop: HostStop
    saved: SavedState | None


class Stopped(msgspec.Struct, frozen=True):
    """What became of a running machine when the host was about to stop.

    ``reason`` says why it failed, or why one that was to be saved was shut down or switched off instead.
    """

    name: str
    uuid: str
    how: Literal["saved", "shut-down", "switched-off", "failed"]
    reason: str = ""
