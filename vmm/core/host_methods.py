"""Methods that concern the whole host: its updates, its restart, and what only root may ask for."""

from __future__ import annotations

from typing import Any

import msgspec

from vmm.core import arguments
from vmm.core.dispatch import Call, Method
from vmm.core.guests import Guests
from vmm.core.updates import How, UpdateClient
from vmm.errors import Conflict, UserError
from vmm.machines.probe import Probe
from vmm.machines.types import Stopped

_WRITING = ("writing", "verifying", "finishing")


class Leaving(msgspec.Struct, frozen=True):
    """The host is about to go, and what became of the machines that ran."""

    how: How
    machines: list[Stopped]


class HostHandlers:
    """One method a row of the table; see vmm.core.methods."""

    def __init__(self, updater: UpdateClient, guests: Guests, probe: Probe) -> None:
        self._updater = updater
        self._guests = guests
        self._probe = probe

    def table(self) -> dict[str, Method]:
        """Name → method. A name that permissions.json does not have can be called by nobody."""
        a = arguments
        return {
            "update.status": Method(a.Nothing, self._status, "read", ""),
            "update.history": Method(a.Nothing, self._history, "read", ""),
            "update.check": Method(a.CheckUpdate, self._check, "change", ""),
            "update.download": Method(a.DownloadUpdate, self._download, "change", ""),
            "update.apply": Method(a.Nothing, self._apply, "change", ""),
            "update.cancel": Method(a.Nothing, self._cancel, "change", ""),
            "update.rollback": Method(a.Nothing, self._rollback, "change", ""),
            "update.import": Method(a.ImportUpdate, self._import, "change", ""),
            "host.reboot": Method(a.Nothing, self._reboot, "change", ""),
            "host.shutdown": Method(a.Nothing, self._shutdown, "change", ""),
            "host.stop-guests": Method(a.Nothing, self._stop_guests, "change", ""),
            "gate.probe": Method(a.RunProbe, self._run_probe, "change", ""),
        }

    async def _status(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._updater.status()

    async def _history(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._updater.history()

    async def _check(self, args: arguments.CheckUpdate, call: Call) -> Any:
        return await self._updater.begin("check", call, source=args.source, override_expiry=args.override_expiry)

    async def _download(self, args: arguments.DownloadUpdate, call: Call) -> Any:
        return await self._updater.begin("download", call, version=args.version, retry_failed=args.retry_failed)

    async def _apply(self, _args: arguments.Nothing, call: Call) -> Any:
        return await self._updater.begin("apply", call)

    async def _cancel(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._updater.cancel()

    async def _rollback(self, _args: arguments.Nothing, call: Call) -> Any:
        return await self._updater.begin("rollback", call)

    async def _import(self, args: arguments.ImportUpdate, call: Call) -> Any:
        return await self._updater.import_bundle(call, args.length)

    async def _reboot(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._leave("reboot")

    async def _shutdown(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._leave("poweroff")

    async def _leave(self, how: How) -> Leaving:
        # Asked before any guest is stopped: without the updater the host cannot go.
        status = await self._updater.status()
        if status.phase in _WRITING:
            raise Conflict(
                f"the updater is writing release {status.version}",
                hint="Wait for it, or end it with `holdfast update cancel`.",
            )
        machines = await self._guests.stop()
        try:
            await self._updater.reboot(how)
        except UserError:
            await self._guests.stay()
            raise
        return Leaving(how, machines)

    async def _stop_guests(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._guests.stop()

    async def _run_probe(self, args: arguments.RunProbe, _call: Call) -> Any:
        return await self._probe.run(args.timeout)
