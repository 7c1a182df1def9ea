"""The life of machines. Nothing here stops a guest because this service stops: guests are adopted at the next start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4
from weakref import WeakValueDictionary

from vmm.clock import rfc3339
from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor import domain
from vmm.hypervisor.types import Console, Domain, Hypervisor, State
from vmm.machines import store
from vmm.machines.ends import Ends
from vmm.machines.host import Host
from vmm.machines.nvram import Nvram
from vmm.machines.states import States
from vmm.machines.types import Machine, MachineSpec, Stopped
from vmm.machines.view import is_ours, left_behind, need, view
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
        states: States,
    ) -> None:
        self._database = database
        self._hypervisor = hypervisor
        self._host = host
        self._nvram = nvram
        self._volume_path = volume_path
        self._networks = networks
        self._states = states
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._starting: dict[UUID, int] = {}
        self._ends = Ends()
        # Machines whose stop was asked for and is waited for.
        self._unwanted: set[UUID] = set()
        self._host_stops = False
        self._tasks: set[asyncio.Task[None]] = set()
        # Domains that run for the host itself, for a moment, and are no machines.
        self.own_domains: set[UUID] = set()
        hypervisor.subscribe(self._on_change)

    async def recover(self) -> None:
        """Remove files of machines that are gone, note what the last stop of the host ended; call once, first."""
        await self._database.run(partial(store.begin_boot, boot=self._host.boot()))
        rows = await self._database.run(store.rows)
        await asyncio.to_thread(self._nvram.keep_only, [row.id for row in rows])
        await self._states.recover(rows)

    async def close(self) -> None:
        """Finish what is to be noted; call before the database is closed."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def unknown(self) -> list[Domain]:
        """Domains that run without being, or no longer being, a machine as stored. Raises: Unavailable."""
        own = set(self.own_domains)
        rows = {row.id: row for row in await self._database.run(store.rows)}
        domains = (await self._hypervisor.list()).values()
        own |= self.own_domains
        return [found for found in domains if found.uuid not in own and not is_ours(rows.get(found.uuid), found)]

    async def list_all(self) -> list[Machine]:
        """Every machine, by name, with what it does now. Raises: Unavailable."""
        rows = await self._database.run(store.rows)
        domains = await self._hypervisor.list()
        return [view(row, domains[row.id].state if row.id in domains else State.STOPPED) for row in rows]

    async def show(self, name: str) -> Machine:
        """One machine with what it does now. Raises: NotFound, Unavailable."""
        row = await self._row(name)
        return view(row, await self._hypervisor.state(row.id))

    async def uuid(self, name: str) -> str:
        """The id of a machine. Raises: NotFound."""
        return str((await self._row(name)).id)

    async def create(self, spec: MachineSpec) -> Machine:
        """Add a machine, which does not run yet. Raises: UserError naming the field; Conflict; Unavailable."""
        self._check(spec)
        created = rfc3339(time.time())
        async with self._lock(spec.name):
            row = await self._database.run(partial(store.insert, id=uuid4(), spec=spec, created=created))
        return view(row, State.STOPPED)

    async def start(self, name: str) -> Machine:
        """Start a machine, from its saved state if there is one that can be used, and return once it runs.

        Raises: NotFound; Conflict; Unavailable, with figures.
        """
        async with self._lock(name):
            row = await self._row(name)
            if self._host_stops:
                raise Unavailable("the host is about to restart")
            self._host.virtualisation()
            running = dict(self._starting)
            domains = await self._hypervisor.list()
            if row.id in domains:
                if not left_behind(row, domains[row.id].state):
                    raise Conflict(f"the machine {name!r} is {domains[row.id].state.value}")
                await self._hypervisor.destroy(row.id)
                del domains[row.id]
            rows = {other.id: other for other in await self._database.run(store.rows)}
            # Starts under way may be in neither or in both lists, and end while we look: count each machine once.
            running.update({id: need(rows[id].spec) for id in domains if id in rows})
            running.update(self._starting)
            self._admit(need(row.spec), sum(running.values()))
            self._starting[row.id] = need(row.spec)
            try:
                xml = await self._xml(row)
                if not await self._states.resume(row, xml):
                    await self._hypervisor.start(xml)
            finally:
                del self._starting[row.id]
            await self._note(row.id, "on")
            return view(await self._row(name), await self._hypervisor.state(row.id))

    async def stop(self, name: str, timeout: int) -> Machine:
        """Press the power button and wait up to ``timeout`` seconds for the guest to go.

        Raises: NotFound; Conflict when it does not run, or still runs then.
        """
        async with self._lock(name):
            row = await self._row(name)
            try:
                stopped = await self._press(row.id)
            except NotFound:
                raise Conflict(f"the machine {name!r} does not run") from None
        # Waiting happens outside the lock, so that force-off need not wait too.
        self._unwanted.add(row.id)
        try:
            if not await self._ends.wait(row.id, stopped, timeout):
                raise Conflict(
                    f"the machine {name!r} did not stop within {timeout} s",
                    hint="Its system may ignore the power button; force-off switches it off.",
                )
        finally:
            self._unwanted.discard(row.id)
        await self._note(row.id, "off")
        return view(row, State.STOPPED)

    async def force_off(self, name: str) -> Machine:
        """Switch a machine off at once; one that is saved loses its state.

        Raises: NotFound; Conflict when it does not run and is not saved.
        """
        async with self._lock(name):
            row = await self._row(name)
            try:
                await self._hypervisor.destroy(row.id)
                await self._states.discard(row)
            except NotFound:
                if not await self._states.discard(row):
                    raise Conflict(f"the machine {name!r} does not run") from None
            await self._note(row.id, "off")
            return view(await self._row(name), State.STOPPED)

    async def delete(self, name: str) -> None:
        """Delete a machine that does not run and is not saved; its volumes stay. Raises: NotFound, Conflict."""
        async with self._lock(name):
            row = await self._row(name)
            state = await self._hypervisor.state(row.id)
            if state is not State.STOPPED:
                raise Conflict(f"the machine {name!r} is {state.value}", hint="Stop it first.")
            if row.saved is not None and row.saved.phase == "saved":
                raise Conflict(
                    f"the machine {name!r} is saved", hint="Start it and shut it down, or discard its state: force-off."
                )
            await self._database.run(partial(store.delete, id=row.id))
            await asyncio.to_thread(self._nvram.remove, row.id)

    async def open_console(self, name: str) -> tuple[Machine, Console]:
        """Attach to a running machine's serial console. Raises: NotFound; Conflict when it does not run."""
        row = await self._row(name)
        try:
            console = await self._hypervisor.open_console(row.id)
        except NotFound:
            raise Conflict(f"the machine {name!r} does not run") from None
        return view(row, State.RUNNING), console

    async def stop_all(self) -> list[Stopped]:
        """Stop every machine because the host stops, side by side, each with its own limit; those that ran resume.

        From here on nothing starts, until host_stays() is called.
        """
        self._host_stops = True
        rows = await self._database.run(store.rows)
        found = await asyncio.gather(*(self._stop_with_host(row) for row in rows))
        return [one for one in found if one is not None]

    async def host_stays(self) -> None:
        """The host does not stop after all: machines may start, and those that were stopped are to be resumed."""
        self._host_stops = False
        await self.look_anew()

    async def to_resume(self) -> list[str]:
        """Names of the machines that ran when the host stopped and were not started since."""
        return [row.spec.name for row in await self._database.run(store.rows) if row.power == "resume"]

    async def count_try(self, name: str) -> int:
        """Count a try to start a machine again, before it is made; 0 when it is no longer to be started."""
        return await self._database.run(partial(store.count_try, name=name))

    async def give_up(self, name: str) -> None:
        """Leave a machine that ran when the host stopped as it is. Raises: NotFound."""
        await self._note((await self._row(name)).id, "off")

    async def _stop_with_host(self, row: store.Row) -> Stopped | None:
        """Stop one machine; what became of it, or None when it did not run."""
        name, id = row.spec.name, row.id
        stopped: asyncio.Event | None = None
        unsaved = ""
        try:
            async with self._lock(name):
                state = await self._hypervisor.state(id)
                if state is State.STOPPED:
                    return None
                await self._database.run(
                    partial(store.set_power, id=id, power="off" if id in self._unwanted else "resume")
                )
            if row.spec.host_stop == "save" and state is State.RUNNING and id not in self._unwanted:
                try:
                    # Outside the lock, so that force-off need not wait.
                    await self._states.save(row, await self._xml(row), row.spec.stop_timeout)
                    return Stopped(name, str(id), "saved")
                except UserError as error:
                    unsaved = error.message
            # A guest that is paused (its disk failed) or has crashed hears no button.
            if state in (State.RUNNING, State.STOPPING):
                with suppress(NotFound):
                    stopped = await self._press(id)
            if stopped is not None and await self._ends.wait(id, stopped, row.spec.stop_timeout):
                return Stopped(name, str(id), "shut-down", unsaved)
            with suppress(NotFound):
                await self._hypervisor.destroy(id)
        except UserError as error:
            return Stopped(name, str(id), "failed", "; ".join(filter(None, (unsaved, error.message))))
        return Stopped(name, str(id), "switched-off", unsaved)

    async def _press(self, id: UUID) -> asyncio.Event:
        """Press the power button; what is returned must be handed to Ends.wait(). Raises: NotFound; Unavailable."""
        stopped = self._ends.expect(id)
        try:
            await self._hypervisor.shutdown(id)
        except BaseException:
            self._ends.forget(id, stopped)
            raise
        return stopped

    async def _note_end(self, id: UUID) -> None:
        if not self._host_stops:
            await self._database.run(partial(store.note_end, id=id))

    async def _note(self, id: UUID, power: store.Power) -> None:
        # What ends while the host stops is to run again; that was noted before it was stopped.
        if not self._host_stops:
            await self._database.run(partial(store.set_power, id=id, power=power))

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
        self._admit(need(spec), 0)

    def _admit(self, wanted: int, running: int) -> None:
        total = self._host.memory()
        if running + wanted > total:
            raise Unavailable(
                f"not enough memory: the machine and its overhead need {wanted} bytes, "
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
            self._later(self.look_anew())
        elif state is State.STOPPED:
            self._ends.came(id)
            self._later(self._note_end(id))

    def _later(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def look_anew(self) -> None:
        """Find out about ends, and starts, that we did not hear of."""
        with suppress(Unavailable):  # broken again: there will be another look
            for id in self._ends.awaited:
                if await self._hypervisor.state(id) is State.STOPPED:
                    self._ends.came(id)
            domains = await self._hypervisor.list()
            for row in await self._database.run(store.rows):
                if (row.id in domains) == (row.power == "on"):
                    continue
                async with self._lock(row.spec.name):
                    state = await self._hypervisor.state(row.id)
                    if left_behind(await self._row(row.spec.name), state):
                        continue  # its next start ends it
                    if state is not State.STOPPED or row.power == "on":
                        await self._note(row.id, "off" if state is State.STOPPED else "on")
