"""The life of machines. Nothing here stops a guest because this service stops: guests are adopted at the next start."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

from vmm.clock import rfc3339
from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor.types import Console, Domain, Hypervisor, State
from vmm.machines import crashrows, store
from vmm.machines.crashrows import Crash
from vmm.machines.ends import Ends
from vmm.machines.host import Host
from vmm.machines.nvram import Nvram
from vmm.machines.plans import Networks, Plans
from vmm.machines.scope import is_within
from vmm.machines.states import States
from vmm.machines.turns import Turns
from vmm.machines.types import Machine, MachineSpec, Stopped
from vmm.machines.view import is_ours, left_behind, need, view
from vmm.volumes.store import Database


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
        self.plans = Plans(host, nvram, volume_path, networks)
        self._states = states
        self.turns = Turns(database)
        self._starting: dict[UUID, int] = {}
        self._ends = Ends()
        # Machines whose stop was asked for and is waited for.
        self._unwanted: set[UUID] = set()
        # Machines that are being suspended, and what is set when that has ended.
        self._suspending: dict[UUID, asyncio.Event] = {}
        self._host_stops = False
        self._tasks: set[asyncio.Task[None]] = set()
        # Domains that run for the host itself, for a moment, and are no machines.
        self.own_domains: set[UUID] = set()
        # Told of each crash, once it is noted.
        self.on_crash: Callable[[Crash], Awaitable[None]] | None = None
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
        before = {row.id: row for row in await self._database.run(store.rows)}
        domains = (await self._hypervisor.list()).values()
        own |= self.own_domains
        # Meanwhile a machine may have been deleted, or started with other hardware than before.
        after = {row.id: row for row in await self._database.run(store.rows)}
        own |= {one.uuid for one in domains if is_ours(before.get(one.uuid), one) or is_ours(after.get(one.uuid), one)}
        return [found for found in domains if found.uuid not in own]

    async def list_all(self) -> list[Machine]:
        """Every machine that the caller may know of, by name, with what it does now. Raises: Unavailable."""
        # In this order: what runs from a saved state has that in its row before it does.
        domains = await self._hypervisor.list()
        rows = [row for row in await self._database.run(store.rows) if is_within(row.id)]
        return [view(row, domains[row.id].state if row.id in domains else State.STOPPED) for row in rows]

    async def show(self, name: str) -> Machine:
        """One machine with what it does now. Raises: NotFound, Unavailable."""
        return await self.view((await self.turns.stored(name)).id)

    async def uuid(self, name: str) -> str:
        """The id of a machine. Raises: NotFound."""
        return str((await self.turns.stored(name)).id)

    async def create(self, spec: MachineSpec) -> Machine:
        """Add a machine, which does not run yet. Raises: UserError naming the field; Conflict; Unavailable."""
        self.plans.check(spec.hardware)
        created = rfc3339(time.time())
        row = await self._database.run(partial(store.insert, id=uuid4(), spec=spec, created=created))
        return view(row, State.STOPPED)

    async def start(self, name: str) -> Machine:
        """Start a machine, from its saved state if there is one that can be used, and return once it runs.

        Raises: NotFound; Conflict; Unavailable, with figures.
        """
        async with self.turns.take(name) as row:
            self.permit(row)
            self._host.virtualisation()
            running = dict(self._starting)
            domains = await self._hypervisor.list()
            if row.id in domains:
                # One whose system panicked stands still until it is ended.
                if domains[row.id].state is not State.CRASHED and not left_behind(row, domains[row.id].state):
                    raise Conflict(f"the machine {name!r} is {domains[row.id].state.value}")
                await self._hypervisor.destroy(row.id)
                del domains[row.id]
            rows = {other.id: other for other in await self._database.run(store.rows)}
            # Starts under way may be in neither or in both lists, and end while we look: count each machine once.
            running.update({id: need(rows[id].running) for id in domains if id in rows})
            running.update(self._starting)
            # What goes on from a saved state has the hardware that it had, whatever it was changed to.
            wanted = row.spec.hardware
            hardware = row.running if row.saved is not None and row.saved.phase == "saved" else wanted
            most = max(need(hardware), need(wanted))
            self.plans.admit(most, sum(running.values()))
            self._starting[row.id] = most
            try:
                xml = await self.plans.xml(row, hardware)
                if not await self._states.resume(row, xml):
                    await self._start_cold(row, xml if hardware == wanted else await self.plans.xml(row, wanted))
            finally:
                del self._starting[row.id]
            await self._note(row.id, "on")
            return await self.view(row.id)

    async def _start_cold(self, row: store.Row, xml: str) -> None:
        # Before it runs: what its domain has must be known, also to who comes after us.
        if row.started != row.spec.hardware:
            await self._database.run(partial(store.note_started, id=row.id, hardware=row.spec.hardware))
        await self._hypervisor.start(xml)

    async def stop(self, name: str, timeout: int) -> Machine:
        """Press the power button and wait up to ``timeout`` seconds for the guest to go.

        Raises: NotFound; Conflict when it does not run, or still runs then.
        """
        async with self.turns.take(name) as row:
            self.permit_change(row)
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
        async with self.turns.take(name) as row:
            try:
                await self._hypervisor.destroy(row.id)
                await self._states.discard(row)
            except NotFound:
                if not await self._states.discard(row):
                    raise Conflict(f"the machine {name!r} does not run") from None
            await self._note(row.id, "off")
            return view(await self.turns.now(row.id), State.STOPPED)

    async def suspend(self, name: str) -> Machine:
        """Save what a running machine has in memory, and end it; its next start goes on from there.

        Takes up to its ``stop_timeout``. Raises: NotFound; Conflict when it does not run; Unavailable when it was not
        saved, and runs on.
        """
        async with self.turns.take(name) as row:
            self.permit_change(row)
            state = await self._hypervisor.state(row.id)
            if state is not State.RUNNING:
                raise Conflict(f"the machine {name!r} is {state.value}")
            xml = await self.plans.xml(row, row.running)
            ended = self._suspending[row.id] = asyncio.Event()
        # Outside the lock, so that force-off need not wait.
        try:
            await self._states.save(row, xml, row.spec.stop_timeout)
            await self._note(row.id, "off")
        finally:
            del self._suspending[row.id]
            ended.set()
        return await self.view(row.id)

    async def delete(self, name: str) -> None:
        """Delete a machine that does not run and is not saved; its volumes stay. Raises: NotFound, Conflict."""
        async with self.turns.take(name) as row:
            state = await self._hypervisor.state(row.id)
            if state is not State.STOPPED:
                raise Conflict(f"the machine {name!r} is {state.value}", hint="Stop it first.")
            if row.held is not None:
                raise Conflict(f"the machine {name!r} is held", hint="What may be evidence is released first.")
            if row.saved is not None and row.saved.phase == "saved":
                raise Conflict(
                    f"the machine {name!r} is saved", hint="Start it and shut it down, or discard its state: force-off."
                )
            await self._database.run(partial(store.delete, id=row.id))
            await asyncio.to_thread(self._nvram.remove, row.id)

    async def open_console(self, name: str) -> tuple[Machine, Console]:
        """Attach to a running machine's serial console. Raises: NotFound; Conflict when it does not run."""
        row = await self.turns.stored(name)
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
        """Names of the machines that are to be started, in this order: those that ran, then those with autostart."""
        return await self._database.run(store.to_resume)

    async def count_try(self, name: str) -> int:
        """Count a try to start a machine again, before it is made; 0 when it is no longer to be started."""
        return await self._database.run(partial(store.count_try, name=name))

    async def give_up(self, name: str) -> None:
        """Leave a machine that ran when the host stopped as it is. Raises: NotFound."""
        await self._note((await self.turns.stored(name)).id, "off")

    async def _stop_with_host(self, row: store.Row) -> Stopped | None:
        """Stop one machine; what became of it, or None when it did not run."""
        name, id = row.spec.name, row.id
        stopped: asyncio.Event | None = None
        unsaved = ""
        try:
            if (suspend := self._suspending.get(id)) is not None:
                await suspend.wait()
            async with self.turns.lock(id):
                state = await self._hypervisor.state(id)
                if state is State.STOPPED:
                    return None
                row = await self.turns.now(id)
                if state is not State.CRASHED or row.power == "on":
                    power: store.Power = "off" if id in self._unwanted else "resume"
                    await self._database.run(partial(store.set_power, id=id, power=power))
            if row.spec.host_stop == "save" and state is State.RUNNING and id not in self._unwanted:
                try:
                    # Outside the lock, so that force-off need not wait.
                    await self._states.save(row, await self.plans.xml(row, row.running), row.spec.stop_timeout)
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

    async def _crashed(self, id: UUID) -> None:
        """A machine's QEMU died, or its system panicked. A stop that is under way takes care of it itself."""
        crash = None
        async with self.turns.lock(id):
            with suppress(Unavailable):  # look_anew() finds its end
                if id in self._unwanted or self._host_stops:
                    await self._note_end(id)
                else:
                    state = await self._hypervisor.state(id)
                    crash = await self._database.run(partial(crashrows.note, id=id, now=time.time(), state=state))
        if crash is not None and self.on_crash is not None:
            await self.on_crash(crash)

    async def _note_end(self, id: UUID) -> None:
        if not self._host_stops:
            await self._database.run(partial(store.note_end, id=id))

    async def _note(self, id: UUID, power: store.Power) -> None:
        # What ends while the host stops is to run again; that was noted before it was stopped.
        if not self._host_stops:
            await self._database.run(partial(store.set_power, id=id, power=power))

    def permit(self, row: store.Row) -> None:
        """Every call asks here before a machine's processors run, or run on. Raises: UserError saying why not."""
        self.permit_change(row)
        if row.held is not None:
            raise Conflict(
                f"the machine {row.spec.name!r} is held since {row.held.since} by {row.held.by}: {row.held.why}",
                hint="An administrator may release it.",
            )
        if self._host_stops:
            raise Unavailable("the host is about to restart")

    def permit_change(self, row: store.Row) -> None:
        """Raises: Conflict while the machine is being suspended."""
        if row.id in self._suspending:
            raise Conflict(f"the machine {row.spec.name!r} is being suspended")

    async def view(self, id: UUID) -> Machine:
        """One machine, by its id, with what it does now. Raises: NotFound, Unavailable."""
        state = await self._hypervisor.state(id)
        return view(await self.turns.now(id), state)

    def _on_change(self, id: UUID | None, state: State, crashed: bool) -> None:
        if id is None:
            self._later(self.look_anew())
        elif state is State.STOPPED:
            self._ends.came(id)
            self._later(self._crashed(id) if crashed else self._note_end(id))
        elif state is State.CRASHED:
            self._later(self._crashed(id))

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
            for old in await self._database.run(store.rows):
                panicked = old.id in domains and domains[old.id].state is State.CRASHED
                if panicked and old.power == "on":
                    self._later(self._crashed(old.id))
                if panicked or (old.id in domains) == (old.power == "on"):
                    continue
                async with self.turns.lock(old.id):
                    state = await self._hypervisor.state(old.id)
                    try:
                        row = await self.turns.now(old.id)
                    except NotFound:
                        continue
                    if state is State.CRASHED or left_behind(row, state):
                        continue  # its next start ends it
                    if state is not State.STOPPED or row.power == "on":
                        await self._note(row.id, "off" if state is State.STOPPED else "on")
