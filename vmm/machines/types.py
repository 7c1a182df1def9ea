"""What callers say and see of machines."""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal
from uuid import UUID

import msgspec

from vmm.hypervisor.domain import MAX_DISKS, MAX_INTERFACES
from vmm.hypervisor.types import Traffic
from vmm.volumes.types import MIB, Name

MAX_MEMORY = 1 << 44
MAX_STOP_TIMEOUT = 600
Memory = Annotated[int, msgspec.Meta(ge=64 * MIB, le=MAX_MEMORY, multiple_of=MIB)]
StopTimeout = Annotated[int, msgspec.Meta(ge=1, le=MAX_STOP_TIMEOUT)]
Cpus = Annotated[int, msgspec.Meta(ge=1, le=255)]
HostStop = Literal["shut-down", "save"]
OnCrash = Literal["stop", "restart"]
MAX_DESCRIPTION, MAX_TAGS = 1024, 16
Description = Annotated[str, msgspec.Meta(max_length=MAX_DESCRIPTION)]
Tag = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9._-]{0,31}\Z")]
Tags = Annotated[tuple[Tag, ...], msgspec.Meta(max_length=MAX_TAGS)]
Autostart = Annotated[int, msgspec.Meta(ge=0, le=999)]
NetworkName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9]{0,7}\Z")]


class Disk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A volume that the machine has; the first one is what it boots from."""

    volume: Name


class Interface(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A network card in an operational network of the host's configuration."""

    network: NetworkName


Networks = Annotated[tuple[Interface, ...], msgspec.Meta(max_length=MAX_INTERFACES)]


class Hardware(msgspec.Struct, frozen=True):
    """What the guest of a machine sees of it; ``memory`` is in bytes."""

    cpus: int
    memory: int
    disks: tuple[Disk, ...] = ()
    networks: tuple[Interface, ...] = ()

    def sha256(self, uuid: UUID) -> str:
        """The hash by which a running domain shows that it is this machine, made of this hardware.

        What has its default does not count, so that a release with new fields still knows what an older one saved.
        """
        defaults = {field.name: field.default for field in msgspec.structs.fields(Hardware)}
        said = {name: value for name, value in msgspec.structs.asdict(self).items() if value != defaults[name]}
        return hashlib.sha256(uuid.bytes + msgspec.json.encode(said, order="deterministic")).hexdigest()


class MachineSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that an operator decides about a machine.

    ``memory`` is in bytes. ``host_stop`` is what becomes of it when the host stops: "shut-down" presses its power
    button, "save" keeps its memory in a file, from which it goes on when the host is back. ``stop_timeout`` is how many
    seconds each of the two may take: what cannot be saved is shut down, what does not shut down is switched off.
    With ``autostart`` it is started whenever the host starts, lower numbers first. ``on_crash`` is what becomes of it
    when its QEMU dies or its system panics: "stop" leaves it off, "restart" starts it again, not too often.
    """

    name: Name
    cpus: Cpus
    memory: Memory
    disks: Annotated[tuple[Disk, ...], msgspec.Meta(max_length=MAX_DISKS)] = ()
    networks: Networks = ()
    description: Description = ""
    stop_timeout: StopTimeout = 120
    host_stop: HostStop = "shut-down"
    tags: Tags = ()
    autostart: Autostart | None = None
    on_crash: OnCrash = "stop"

    @property
    def hardware(self) -> Hardware:
        """What the guest sees of it, and a change of which takes a start."""
        return Hardware(self.cpus, self.memory, self.disks, self.networks)


class SavedState(msgspec.Struct, frozen=True):
    """What became of the state that a machine was to keep over the last stop of the host.

    ``state`` is "saving", "saved", "resumed", or "lost": then it starts, or did start, from its disks alone, and
    ``reason`` says why. ``since`` is when that stop was, ``size`` in bytes what it takes on the disk now.
    """

    state: Literal["saving", "saved", "resumed", "lost"]
    since: str
    size: int
    reason: str


class Held(msgspec.Struct, frozen=True):
    """That a machine may not run: since when (UTC), by whom it was held, and why."""

    since: str
    by: str
    reason: str


class Pending(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a machine that runs has been changed to, and gets with its next start; what does not change is not named."""

    cpus: int | None = None
    memory: int | None = None
    networks: tuple[Interface, ...] | None = None


class Machine(msgspec.Struct, frozen=True):
    """A machine as callers see it: its specification, identity and what it does now.

    ``state`` is the hypervisor's word, or "saved" for one that does not run and goes on from its saved state. While it
    runs, its hardware is what it runs with; ``pending`` says what comes with its next start.
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
    tags: tuple[str, ...]
    autostart: int | None
    on_crash: OnCrash
    saved: SavedState | None
    pending: Pending | None
    held: Held | None


class Stats(msgspec.Struct, frozen=True):
    """What a machine has used since its start; ``memory`` is what its QEMU has of the host's now, in bytes.

    ``cpu_seconds`` are of all its processors together.
    """

    name: str
    uuid: str
    state: str
    cpu_seconds: float
    memory: int
    disks: tuple[Traffic, ...]
    networks: tuple[Traffic, ...]


class Stopped(msgspec.Struct, frozen=True):
    """What became of a running machine when the host was about to stop.

    ``reason`` says why it failed, or why one that was to be saved was shut down or switched off instead.
    """

    name: str
    uuid: str
    how: Literal["saved", "shut-down", "switched-off", "failed"]
    reason: str = ""
