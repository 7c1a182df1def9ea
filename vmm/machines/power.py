"""What is done to a machine that runs, without ending it."""

from __future__ import annotations

from vmm.errors import Conflict, NotFound
from vmm.hypervisor.types import Hypervisor, State
from vmm.machines.service import Machines
from vmm.machines.types import Machine, Stats
from vmm.machines.view import left_behind, view


class Power:
    """Pause, resume, reset; and what machines use. Calls on one machine are done one after another."""

    def __init__(self, machines: Machines, hypervisor: Hypervisor) -> None:
        self._machines = machines
        self._hypervisor = hypervisor

    async def pause(self, name: str) -> Machine:
        """Let a machine's processors stand still. Raises: NotFound; Conflict unless it runs; Unavailable."""
        async with self._machines.turns.take(name) as row:
            self._machines.permit_change(row)
            self._expect(name, await self._hypervisor.state(row.id), State.RUNNING)
            await self._hypervisor.pause(row.id)
            return view(row, await self._hypervisor.state(row.id))

    async def resume(self, name: str) -> Machine:
        """Let a paused machine go on. Raises: NotFound; Conflict unless it is paused; Unavailable."""
        async with self._machines.turns.take(name) as row:
            self._machines.permit(row)
            state = await self._hypervisor.state(row.id)
            self._expect(name, state, State.PAUSED)
            if left_behind(row, state):
                raise Conflict(f"the machine {name!r} did not go on from its saved state", hint="Start it.")
            await self._hypervisor.resume(row.id)
            return view(row, await self._hypervisor.state(row.id))

    async def reset(self, name: str) -> Machine:
        """Press the reset button: its system starts anew, unprepared. Raises: NotFound; Conflict; Unavailable."""
        async with self._machines.turns.take(name) as row:
            self._machines.permit(row)
            self._expect(name, await self._hypervisor.state(row.id), State.RUNNING)
            await self._hypervisor.reset(row.id)
            return view(row, await self._hypervisor.state(row.id))

    async def stats(self, name: str) -> Stats:
        """What a machine has used since its start. Raises: NotFound; Conflict when it does not run; Unavailable."""
        machine = await self._machines.show(name)
        row = await self._machines.turns.stored(name)
        try:
            usage = await self._hypervisor.usage(row.id)
        except NotFound:
            raise Conflict(f"the machine {name!r} does not run") from None
        # libvirt counts disks and cards in the order in which they were given.
        return Stats(
            name,
            machine.uuid,
            machine.state,
            round(usage.cpu_ns / 1e9, 3),
            usage.resident,
            usage.disks,
            usage.networks,
        )

    @staticmethod
    def _expect(name: str, state: State, expected: State) -> None:
        if state is not expected:
            raise Conflict(f"the machine {name!r} is {state.value}")
