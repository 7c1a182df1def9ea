"""A pretended hypervisor."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree

from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor.domain import NAMESPACE
from vmm.hypervisor.types import Domain, Listener, State, Traffic, Usage
from vmm.volumes.types import MIB


class FakeConsole:
    """Echoes what is typed, in capitals, until it is closed or its machine ends."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.closed = False

    async def read(self) -> bytes:
        return await self._queue.get()

    async def write(self, data: bytes) -> None:
        self._queue.put_nowait(data.upper())

    async def close(self) -> None:
        self.closed = True

    def say(self, data: bytes) -> None:
        self._queue.put_nowait(data)

    def end(self) -> None:
        self.say(b"")


class FakeHypervisor:
    """Keeps domains in memory; ``polite`` guests obey the power button. ``output`` is what paused ones say, resumed."""

    def __init__(self) -> None:
        self.domains: dict[UUID, Domain] = {}
        self.documents: list[str] = []
        self.consoles: list[FakeConsole] = []
        self.connected = True
        self.polite = True
        self.resets = 0
        self.output: list[bytes] = []
        self.delay = 0.0
        self.restored: list[str] = []
        self.mishaps: dict[str, BaseException] = {}
        self.pressed = asyncio.Event()
        self.most_at_once = self._at_once = 0
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> None:
        self._listeners.append(listener)

    def reconnect(self) -> None:
        """Events were missed."""
        for listener in self._listeners:
            listener(None, State.RUNNING, False)

    async def start(self, xml: str, *, paused: bool = False) -> None:
        self._check()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        await asyncio.sleep(self.delay)
        self._at_once -= 1
        root = ElementTree.fromstring(xml)
        element = root.find(f"metadata/{{{NAMESPACE}}}machine")
        assert element is not None
        id = UUID(root.findtext("uuid"))
        if id in self.domains:
            raise Conflict("libvirt refuses: it runs")
        self.documents.append(xml)
        state = State.PAUSED if paused else State.RUNNING
        self.domains[id] = Domain(
            id,
            _machine(root.findtext("name") or "", id),
            state,
            element.get("spec-sha256"),
            int(element.get("uid") or 0),
        )

    async def resume(self, uuid: UUID) -> None:
        self._get(uuid)
        await self._mishap("resume")
        self.domains[uuid] = replace(self._get(uuid), state=State.RUNNING)
        for data in self.output:
            self.consoles[-1].say(data)

    async def pause(self, uuid: UUID) -> None:
        self._get(uuid)
        await self._mishap("pause")
        await asyncio.sleep(self.delay)
        self.domains[uuid] = replace(self._get(uuid), state=State.PAUSED)

    async def reset(self, uuid: UUID) -> None:
        self._get(uuid)
        self.resets += 1

    async def usage(self, uuid: UUID) -> Usage:
        self._get(uuid)
        return Usage(1_500_000_000, 256 * MIB, (Traffic("vda", 1, 2, 3, 4),), (Traffic("vnet0", 5, 6, 7, 8),))

    async def shutdown(self, uuid: UUID) -> None:
        self._get(uuid)
        self.pressed.set()
        if self.polite:
            asyncio.get_running_loop().call_later(0.01, self.ends, uuid)

    async def destroy(self, uuid: UUID) -> None:
        self._get(uuid)
        self.ends(uuid)

    async def save(self, uuid: UUID, path: Path, limit: float) -> None:
        """What is written is the domain, which is what restore() looks for; ``mishaps`` come in between."""
        domain = self._get(uuid)
        assert path.read_bytes() == b"" and domain.state is State.RUNNING
        self.domains[uuid] = replace(domain, state=State.PAUSED)
        path.chmod(0o600)
        path.write_text(f"{uuid} {domain.name} {domain.spec_sha256} {domain.uid}")
        try:
            async with asyncio.timeout(limit):
                await asyncio.sleep(self.delay)
            await self._mishap("save")
        except TimeoutError:
            self.domains[uuid] = domain
            raise Unavailable("it was not saved in time") from None
        except UserError:
            self.domains[uuid] = domain
            raise
        self.ends(uuid)

    async def restore(self, uuid: UUID, path: Path, limit: float) -> None:
        self._check()
        await self._mishap("restore")
        id, name, spec_sha256, uid = path.read_text().split()
        if id != str(uuid):
            raise Conflict("it is the state of another machine")
        self.domains[uuid] = Domain(uuid, name, State.PAUSED, spec_sha256, int(uid))
        self.restored.append(name)
        await self._mishap("restored")

    async def _mishap(self, step: str) -> None:
        if (mishap := self.mishaps.pop(step, None)) is not None:
            raise mishap

    async def state(self, uuid: UUID) -> State:
        self._check()
        return self.domains[uuid].state if uuid in self.domains else State.STOPPED

    async def list(self) -> dict[UUID, Domain]:
        self._check()
        return dict(self.domains)

    async def open_console(self, uuid: UUID) -> FakeConsole:
        self._get(uuid)
        self.consoles.append(FakeConsole())
        return self.consoles[-1]

    def ends(self, uuid: UUID, *, heard: bool = True, crashed: bool = False) -> None:
        """A domain ends; whether its event is heard."""
        if self.domains.pop(uuid, None) and heard:
            for listener in self._listeners:
                listener(uuid, State.STOPPED, crashed)
        for console in self.consoles:
            console.end()

    def panics(self, uuid: UUID, *, heard: bool = True) -> None:
        """A guest's system gives up; its domain stays, and does nothing any more."""
        self.domains[uuid] = replace(self.domains[uuid], state=State.CRASHED)
        if heard:
            for listener in self._listeners:
                listener(uuid, State.CRASHED, True)

    def _check(self) -> None:
        if not self.connected:
            raise Unavailable("libvirt does not answer")

    def _get(self, uuid: UUID) -> Domain:
        self._check()
        if uuid not in self.domains:
            raise NotFound("the machine does not run")
        return self.domains[uuid]


def _machine(name: str, id: UUID) -> str:
    return name.removesuffix(f"_{id}")
