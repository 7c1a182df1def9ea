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
NetworkName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9]{0,7}\Z")]


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A volume that the machine has; the first one is what it boots from."""

    volume: Name


class Interface(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network card in an operational network of the host's configuration."""

    network: NetworkName


class MachineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that an operator decides about a machine.

    ``memory`` is in bytes. ``stop_timeout`` is how many seconds its system gets to shut down when the host stops.
    """

    name: Name
    cpus: Cpus
    memory: Memory
    disks: Annotated[tuple[Disk, ...], msgspec.Meta(max_length=MAX_DISKS)] = ()
    networks: Annotated[tuple[Interface, ...], msgspec.Meta(max_length=MAX_INTERFACES)] = ()
    description: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    stop_timeout: StopTimeout = 120

    def sha256(self, uuid: UUID) -> str:
        """The hash by which a running domain shows that it was made from this machine and specification."""
        return hashlib.sha256(uuid.bytes + msgspec.json.encode(self, order="deterministic")).hexdigest()


class Machine(msgspec.Struct, frozen=True):
    """A machine as callers see it: its specification, identity and what it does now."""

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


class Stopped(msgspec.Struct, frozen=True):
    """What became of a running machine when the host was about to stop; ``reason`` says why it failed."""

    name: str
    uuid: str
    how: Literal["shut-down", "switched-off", "failed"]
    reason: str = ""
