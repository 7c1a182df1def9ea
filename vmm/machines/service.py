"""The life of machines. Nothing here stops a guest because this service stops: guests are adopted at the next start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4
from weakref import WeakValueDictionary

from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor import domain
from vmm.hypervisor.types import Console, Domain, Hypervisor, State
from vmm.machines import store
from vmm.machines.host import Host
from vmm.machines.nvram import Nvram
from vmm.machines.types import Machine, MachineSpec
from vmm.volumes.store import Database

Networks = Callable[[], dict[str, str]]
"""The operational networks of the configuration in force: name → bridge."""


class Machines:
    """All machines of this host. Calls that concern one machine are done one after another, in their order."""

    def __init__(
        self,
        database: Database,
        hypervisor: Hypervisor,
        host: Host,
        nvram: Nvram,
        volume_path: Callable[[str], Path],
        networks: Networks,
    ) -> None:
        self._database = database
        self._hypervisor = hypervisor
        self._host = host
        self._nvram = nvram
        self._volume_path = volume_path
        self._networks = networks
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._starting: dict[UUID, int] = {}
        self._waiting: dict[UUID, list[asyncio.Event]] = {}
        self._checks: set[asyncio.Task[None]] = set()
        hypervisor.subscribe(self._on_change)

    async def recover(self) -> None:
        """Remove files of machines that are gone; call once, before anything else."""
        rows = await self._database.run(store.rows)
        await asyncio.to_thread(self._nvram.keep_only, [row.id for row in rows])

    async def unknown(self) -> list[Domain]:
        """Domains that run without being, or no longer being, a machine as stored. Raises: Unavailable."""
        rows = {row.id: row for row in await self._database.run(store.rows)}
        domains = (await self._hypervisor.list()).values()
        return [found for found in domains if not _is_ours(rows.get(found.uuid), found)]

    async def list_all(self) -> list[Machine]:
        """Every machine, by name, with what it does now. Raises: Unavailable."""
        rows = await self._database.run(store.rows)
        domains = await self._hypervisor.list()
        return [_view(row, domains[row.id].state if row.id in domains else State.STOPPED) for row in rows]

    async def show(self, name: str) -> Machine:
        """One machine with what it does now. Raises: NotFound, Unavailable."""
        row = await self._row(name)
        return _view(row, await self._hypervisor.state(row.id))

    async def uuid(self, name: str) -> str:
        """The id of a machine. Raises: NotFound."""
        return str((await self._row(name)).id)

    async def create(self, spec: MachineSpec) -> Machine:
        """Add a machine, which does not run yet. Raises: UserError naming the field; Conflict; Unavailable."""
        self._check(spec)
        created = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        async with self._lock(spec.name):
            row = await self._database.run(partial(store.insert, id=uuid4(), spec=spec, created=created))
        return _view(row, State.STOPPED)

    async def start(self, name: str) -> Machine:
        """Start a machine and return once it runs. Raises: NotFound; Conflict; Unavailable, with figures."""
        async with self._lock(name):
            row = await self._row(name)
            self._host.virtualisation()
            running = dict(self._starting)
            domains = await self._hypervisor.list()
            if row.id in domains:
                raise Conflict(f"the machine {name!r} is {domains[row.id].state.value}")
            rows = {other.id: other for other in await self._database.run(store.rows)}
            # Starts under way may be in neither or in both lists, and end while we look: count each machine once.
            running.update({id: _need(rows[id].spec) for id in domains if id in rows})
            running.update(self._starting)
            self._admit(_need(row.spec), sum(running.values()))
            self._starting[row.id] = _need(row.spec)
            try:
                await self._hypervisor.start(await self._xml(row))
            finally:
                del self._starting[row.id]
            return _view(row, await self._hypervisor.state(row.id))

    async def stop(self, name: str, timeout: int) -> Machine:
        """Press the power button and wait up to ``timeout`` seconds for the guest to go.

        Raises: NotFound; Conflict when it does not run, or still runs then.
        """
        async with self._lock(name):
            row = await self._row(name)
            stopped = asyncio.Event()
            self._waiting.setdefault(row.id, []).append(stopped)
            try:
                await self._hypervisor.shutdown(row.id)
            except BaseException as error:
                self._forget(row.id, stopped)
                if isinstance(error, NotFound):
                    raise Conflict(f"the machine {name!r} does not run") from None
                raise
        # Waiting happens outside the lock, so that force-off need not wait too.
        try:
            await asyncio.wait_for(stopped.wait(), timeout)
        except TimeoutError:
            raise Conflict(
                f"the machine {name!r} did not stop within {timeout} s",
                hint="Its system may ignore the power button; force-off switches it off.",
            ) from None
        finally:
            self._forget(row.id, stopped)
        return _view(row, State.STOPPED)

    async def force_off(self, name: str) -> Machine:
        """Switch a machine off at once. Raises: NotFound; Conflict when it does not run."""
        async with self._lock(name):
            row = await self._row(name)
            try:
                await self._hypervisor.destroy(row.id)
            except NotFound:
                raise Conflict(f"the machine {name!r} does not run") from None
            return _view(row, State.STOPPED)

    async def delete(self, name: str) -> None:
        """Delete a machine that does not run; its volumes stay. Raises: NotFound, Conflict."""
        async with self._lock(name):
            row = await self._row(name)
            state = await self._hypervisor.state(row.id)
            if state is not State.STOPPED:
                raise Conflict(f"the machine {name!r} is {state.value}", hint="Stop it first.")
            await self._database.run(partial(store.delete, id=row.id))
            await asyncio.to_thread(self._nvram.remove, row.id)

    async def open_console(self, name: str) -> tuple[Machine, Console]:
        """Attach to a running machine's serial console. Raises: NotFound; Conflict when it does not run."""
        row = await self._row(name)
        try:
            console = await self._hypervisor.open_console(row.id)
        except NotFound:
            raise Conflict(f"the machine {name!r} does not run") from None
        return _view(row, State.RUNNING), console

    async def _row(self, name: str) -> store.Row:
        return await self._database.run(partial(store.row, name=name))

    async def _xml(self, row: store.Row) -> str:
        bridges = self._networks()
        for index, interface in enumerate(row.spec.networks):
            if interface.network not in bridges:
                raise Conflict(
                    f"networks[{index}].network: the configuration has no operational network {interface.network!r}"
                )
        paths = [self._volume_path(volume) for volume in row.volumes]
        for disk, path in zip(row.spec.disks, paths, strict=True):
            if not path.exists():
                raise Unavailable(f"the file of the volume {disk.volume!r} is missing")
        try:
            nvram = await asyncio.to_thread(self._nvram.prepare, row.id)
        except OSError as error:
            raise Unavailable(f"the machine's store of UEFI variables cannot be made: {error.strerror}") from None
        return domain.render(
            domain.DomainParameters(
                name=row.spec.name,
                uuid=row.id,
                uid=row.uid,
                spec_sha256=row.spec_sha256,
                cpus=row.spec.cpus,
                memory=row.spec.memory,
                nvram=nvram,
                disks=tuple(domain.Disk(path, UUID(id).hex[:20]) for path, id in zip(paths, row.volumes, strict=True)),
                bridges=tuple(bridges[interface.network] for interface in row.spec.networks),
            )
        )

    def _check(self, spec: MachineSpec) -> None:
        """What the types cannot say. Raises: UserError naming the field."""
        if spec.cpus > self._host.cpus():
            raise UserError(f"cpus: {spec.cpus} are wanted, the host has {self._host.cpus()}")
        bridges = self._networks()
        for index, interface in enumerate(spec.networks):
            if interface.network not in bridges:
                known = ", ".join(sorted(bridges)) or "none"
                raise UserError(
                    f"networks[{index}].network: there is no operational network {interface.network!r}",
                    hint=f"The configuration has: {known}.",
                )
        volumes = [disk.volume for disk in spec.disks]
        for index, volume in enumerate(volumes):
            if volume in volumes[:index]:
                raise UserError(f"disks[{index}].volume: {volume!r} is listed twice")
        self._admit(_need(spec), 0)

    def _admit(self, need: int, running: int) -> None:
        total = self._host.memory()
        if running + need > total:
            raise Unavailable(
                f"not enough memory: the machine and its overhead need {need} bytes, "
                f"{max(total - running, 0)} are left of {total} (running machines have {running})",
                hint="Stop other machines, or give this one less memory.",
            )

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _on_change(self, id: UUID | None, state: State) -> None:
        if id is None:
            task = asyncio.get_running_loop().create_task(self._check_waiting())
            self._checks.add(task)
            task.add_done_callback(self._checks.discard)
        elif state is State.STOPPED:
            self._wake(id)

    async def _check_waiting(self) -> None:
        """After a break in the connection: find out about ends that we did not hear of."""
        for id in list(self._waiting):
            if await self._hypervisor.state(id) is State.STOPPED:
                self._wake(id)

    def _wake(self, id: UUID) -> None:
        for stopped in self._waiting.get(id, ()):
            stopped.set()

    def _forget(self, id: UUID, stopped: asyncio.Event) -> None:
        waiting = self._waiting.get(id, [])
        if stopped in waiting:
            waiting.remove(stopped)
        if not waiting:
            self._waiting.pop(id, None)


def _need(spec: MachineSpec) -> int:
    return spec.memory + domain.overhead(spec.cpus)


def _is_ours(row: store.Row | None, found: Domain) -> bool:
    return row is not None and found.spec_sha256 == row.spec_sha256 and found.uid == row.uid


def _view(row: store.Row, state: State) -> Machine:
    spec = row.spec
    return Machine(
        spec.name,
        str(row.id),
        state.value,
        row.uid,
        row.created,
        spec.cpus,
        spec.memory,
        spec.disks,
        spec.networks,
        spec.description,
    )
