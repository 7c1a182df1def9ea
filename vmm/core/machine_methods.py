"""Methods that concern machines."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from vmm import wire
from vmm.core import arguments
from vmm.core.dispatch import Call, Method
from vmm.hypervisor.types import Console
from vmm.machines.changes import Changes, Changing, Describing, Renaming
from vmm.machines.power import Power
from vmm.machines.service import Machines
from vmm.machines.types import MachineSpec


class MachineHandlers:
    """One method a row of the table; see vmm.core.methods."""

    def __init__(self, machines: Machines, power: Power, changes: Changes) -> None:
        self._machines = machines
        self._power = power
        self._changes = changes

    def table(self) -> dict[str, Method]:
        """Name → method. A name that permissions.json does not have can be called by nobody."""
        a = arguments
        return {
            "machine.list": Method(a.Nothing, self._list, "read", ""),
            "machine.show": Method(a.Named, self._show, "read", "machine"),
            "machine.create": Method(MachineSpec, self._create, "change", "machine"),
            "machine.delete": Method(a.Named, self._delete, "change", "machine"),
            "machine.start": Method(a.Named, self._start, "change", "machine"),
            "machine.stop": Method(a.Stop, self._stop, "change", "machine"),
            "machine.force-off": Method(a.Named, self._force_off, "change", "machine"),
            "machine.console": Method(a.Named, self._console, "change", "machine", lasts=True),
            "machine.pause": Method(a.Named, self._pause, "change", "machine"),
            "machine.resume": Method(a.Named, self._resume, "change", "machine"),
            "machine.reset": Method(a.Named, self._reset, "change", "machine"),
            "machine.suspend": Method(a.Named, self._suspend, "change", "machine"),
            "machine.rename": Method(Renaming, self._rename, "change", "machine"),
            "machine.describe": Method(Describing, self._describe, "change", "machine"),
            "machine.change": Method(Changing, self._change, "change", "machine"),
            "machine.stats": Method(a.Named, self._stats, "read", "machine"),
        }

    async def _list(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._machines.list_all()

    async def _show(self, args: arguments.Named, _call: Call) -> Any:
        return await self._machines.show(args.name)

    async def _create(self, spec: MachineSpec, call: Call) -> Any:
        machine = await self._machines.create(spec)
        call.object_id = machine.uuid
        return machine

    async def _delete(self, args: arguments.Named, _call: Call) -> Any:
        await self._machines.delete(args.name)
        return {}

    async def _start(self, args: arguments.Named, _call: Call) -> Any:
        return await self._machines.start(args.name)

    async def _stop(self, args: arguments.Stop, _call: Call) -> Any:
        return await self._machines.stop(args.name, args.timeout)

    async def _force_off(self, args: arguments.Named, _call: Call) -> Any:
        return await self._machines.force_off(args.name)

    async def _console(self, args: arguments.Named, call: Call) -> Any:
        """The first data frame says which machine it is, as JSON; then come the console's bytes, both ways."""
        machine, console = await self._machines.open_console(args.name)
        try:
            greeting = {"machine": machine.name, "uuid": machine.uuid}
            await call.channel.send_data(msgspec.json.encode(greeting))
            directions = [
                asyncio.create_task(_from_console(console, call.channel)),
                asyncio.create_task(_to_console(console, call.channel)),
            ]
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for direction in directions:
                    direction.cancel()
                await asyncio.gather(*directions, return_exceptions=True)
        except ConnectionError:
            pass  # whoever watched has gone: the end of every console
        finally:
            await console.close()
        return {}

    async def _pause(self, args: arguments.Named, _call: Call) -> Any:
        return await self._power.pause(args.name)

    async def _resume(self, args: arguments.Named, _call: Call) -> Any:
        return await self._power.resume(args.name)

    async def _reset(self, args: arguments.Named, _call: Call) -> Any:
        return await self._power.reset(args.name)

    async def _suspend(self, args: arguments.Named, _call: Call) -> Any:
        return await self._machines.suspend(args.name)

    async def _rename(self, args: Renaming, _call: Call) -> Any:
        return await self._changes.rename(args)

    async def _describe(self, args: Describing, _call: Call) -> Any:
        return await self._changes.describe(args)

    async def _change(self, args: Changing, _call: Call) -> Any:
        return await self._changes.change(args)

    async def _stats(self, args: arguments.Named, _call: Call) -> Any:
        return await self._power.stats(args.name)


async def _from_console(console: Console, channel: wire.Channel) -> None:
    while data := await console.read():
        await channel.send_data(data)


async def _to_console(console: Console, channel: wire.Channel) -> None:
    try:
        async for data in channel.data():
            await console.write(data)
    except (wire.ProtocolError, ConnectionError):
        pass  # either end has gone
