"""What the rest of the host sees of the hypervisor; tests put a pretended one in its place."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import UUID


class State(enum.Enum):
    """What a machine is doing; STOPPED is also every machine that the hypervisor does not know."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    CRASHED = "crashed"
    STOPPED = "stopped"


@dataclass(frozen=True)
class Domain:
    """A domain as the hypervisor has it; ``spec_sha256`` and ``uid`` are None unless we made it."""

    uuid: UUID
    name: str
    state: State
    spec_sha256: str | None
    uid: int | None


@dataclass(frozen=True)
class Traffic:
    """What went through one disk or network card since the domain's start, in bytes and requests or packets.

    ``read`` is what the guest read or received.
    """

    name: str
    read_bytes: int
    read_count: int
    written_bytes: int
    written_count: int


@dataclass(frozen=True)
class Usage:
    """What a domain uses: ``cpu_ns`` nanoseconds of processors since its start, ``resident`` bytes of memory now."""

    cpu_ns: int
    resident: int
    disks: tuple[Traffic, ...]
    networks: tuple[Traffic, ...]


Listener = Callable[[UUID | None, State, bool], None]
"""Called in the event loop with a domain that changed, and whether that was its crash; with None when events may have
been missed."""


class Console(Protocol):
    """One attachment to a machine's serial console."""

    async def read(self) -> bytes:
        """Wait for output; empty once the machine stopped or the console was closed."""

    async def write(self, data: bytes) -> None:
        """Type into the console; returns once the guest's serial port took everything.

        Raises: ConnectionError when the console ended.
        """

    async def close(self) -> None:
        """Let go of the console; may be called again."""


class Hypervisor(Protocol):
    """Every method raises Unavailable when libvirt does not answer in time, Conflict when it refuses."""

    @property
    def connected(self) -> bool:
        """Whether libvirt answered last."""

    def subscribe(self, listener: Listener) -> None:
        """Have ``listener`` called at every change of a domain's state."""

    async def start(self, xml: str, *, paused: bool = False) -> None:
        """Start a transient domain and return once it runs or, ``paused``, waits for resume()."""

    async def resume(self, uuid: UUID) -> None:
        """Let a paused domain run. Raises: NotFound."""

    async def pause(self, uuid: UUID) -> None:
        """Let a domain's processors stand still until resume(). Raises: NotFound."""

    async def reset(self, uuid: UUID) -> None:
        """Press the reset button: the guest starts anew in the same domain. Raises: NotFound."""

    async def usage(self, uuid: UUID) -> Usage:
        """What a domain uses. Raises: NotFound."""

    async def shutdown(self, uuid: UUID) -> None:
        """Press the guest's power button; its end arrives as an event. Raises: NotFound."""

    async def destroy(self, uuid: UUID) -> None:
        """End a domain at once and return when its QEMU is gone. Raises: NotFound."""

    async def save(self, uuid: UUID, path: Path, limit: float) -> None:
        """Write a domain's memory and devices to ``path``, an empty file, and end it.

        When it fails or takes more than ``limit`` seconds, the domain runs on. Raises: NotFound.
        """

    async def restore(self, uuid: UUID, path: Path, limit: float) -> None:
        """Start a domain from what save() wrote; it waits for resume(). ``limit`` is in seconds.

        Raises: Conflict when nothing can be made of the file; Unavailable when that is not known.
        """

    async def state(self, uuid: UUID) -> State:
        """What a domain does now."""

    async def list(self) -> dict[UUID, Domain]:
        """Every domain that runs, ours or not."""

    async def open_console(self, uuid: UUID) -> Console:
        """Attach to the serial console; someone already attached is a Conflict. Raises: NotFound."""
