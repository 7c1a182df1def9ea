"""Guests over a stop of the host: saved or shut down before it, started again after it; and after their crashes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

from vmm.audit.client import AuditClient, Entry, Object
from vmm.core.dispatch import HOST, MOST_REASON, OPERATION
from vmm.errors import NotFound, Unavailable, UserError
from vmm.hypervisor.types import Hypervisor
from vmm.machines.crashrows import Crash
from vmm.machines.service import Machines
from vmm.machines.states import Record, Recorded
from vmm.machines.store import MOST_TRIES
from vmm.machines.types import Stopped

Perform = Callable[..., Awaitable[Any]]
"""Makes a call in the host's own name, with its records: see vmm.core.dispatch.Dispatcher.perform."""

# Before each round of tries. What failed for want of something that is still coming up gets its time.
_WAITS_S = (0.0, 10.0, 60.0)
_LOOK_S = 1.0


class Guests:
    """Stops and resumes them, with records."""

    def __init__(
        self,
        machines: Machines,
        hypervisor: Hypervisor,
        audit: AuditClient,
        *,
        waits: Sequence[float] = _WAITS_S,
        look: float = _LOOK_S,
    ) -> None:
        """Arguments: ``waits`` and ``look`` are in seconds: before each round, and between looks at libvirt."""
        self._machines = machines
        self._hypervisor = hypervisor
        self._audit = audit
        self._waits = waits
        self._look = look
        self._perform: Perform | None = None
        self._resuming: asyncio.Task[None] | None = None
        # Who asks a second time, as the host's own stop does behind a restart, must not take guests for stuck that are
        # being saved.
        self._stopping = asyncio.Lock()

    def begin(self, perform: Perform) -> None:
        """Start, in the background, what ran when the host stopped; and what crashes, from here on."""
        self._perform = perform
        self._machines.on_crash = self.crashed
        self._resume_soon()

    async def stop(self) -> list[Stopped]:
        """Stop all guests because the host stops. Nothing starts from here on, unless stay() is called."""
        await self.close()
        async with self._stopping:
            stopped = await self._machines.stop_all()
            for one in stopped:
                await self._record_stop(one)
        return stopped

    async def _record_stop(self, one: Stopped) -> None:
        if one.how == "saved":
            return  # recorded when it was done
        why = one.reason if one.how == "failed" else "; ".join(filter(None, (one.how, one.reason)))
        entry = Entry(
            type="machine.stop",
            actor=HOST,
            object=Object(kind="machine", id=one.uuid, name=one.name),
            outcome="failure" if one.how == "failed" else "success",
            reason=f"the host stops: {why}",
            request=OPERATION.get(),
        )
        try:
            await self._audit.append(entry)
        except Unavailable as error:
            _say(f"{one.name}: {entry.reason}; not recorded: {error.message}")

    async def crashed(self, crash: Crash) -> None:
        """Put a crash on record and start the machine again, if it is to be."""
        entry = Entry(
            type="machine.crash",
            actor=HOST,
            object=Object(kind="machine", id=str(crash.id), name=crash.name),
            outcome="failure",
            reason=crash.reason,
            extra={"crashes": crash.count, "restarts": crash.restarts},
        )
        try:
            await self._audit.append(entry)
        except Unavailable as error:
            _say(f"{crash.name}: {entry.reason}; not recorded: {error.message}")
        if crash.restarts:
            await self._try(crash.name)
            # It has further tries if that failed.
            self._resume_soon()

    async def stay(self) -> None:
        """The host does not stop after all: start again what was stopped."""
        with suppress(Unavailable):
            await self._machines.host_stays()
        self._resume_soon()

    async def close(self) -> None:
        """Try no more."""
        if self._resuming is not None:
            self._resuming.cancel()
            await asyncio.gather(self._resuming, return_exceptions=True)

    def _resume_soon(self) -> None:
        if self._resuming is None or self._resuming.done():
            self._resuming = asyncio.get_running_loop().create_task(self.resume())

    async def resume(self) -> None:
        """Start again what is to be, in rounds; each machine has few tries, also over restarts of the host."""
        if not await self._machines.to_resume():
            return
        # Neither is a reason to give a machine up.
        while not (self._hypervisor.connected and await self._is_audited()):
            await asyncio.sleep(self._look)
        with suppress(Unavailable):
            await self._machines.look_anew()
        for wait in self._waits:
            await asyncio.sleep(wait)
            for name in await self._machines.to_resume():
                await self._try(name)

    async def _is_audited(self) -> bool:
        try:
            return bool((await self._audit.health())["ok"])
        except Unavailable:
            return False

    async def _try(self, name: str) -> None:
        assert self._perform is not None
        tries = await self._machines.count_try(name)
        if not tries:
            return
        try:
            await self._perform("machine.start", name=name)
            return
        except UserError as error:
            _say(f"the machine {name} could not be started again (try {tries} of {MOST_TRIES}): {error.message}")
        if tries >= MOST_TRIES:
            with suppress(NotFound):
                await self._machines.give_up(name)


def recorder(audit: AuditClient) -> Record:
    """What saved states are recorded with, in the host's name."""

    async def record(type: Recorded, id: str, name: str, reason: str) -> None:
        entry = Entry(
            type=type,
            actor=HOST,
            object=Object(kind="machine", id=id, name=name),
            outcome="failure" if reason else "success",
            reason=reason[:MOST_REASON],
            request=OPERATION.get(),
        )
        await audit.append(entry)

    return record


def _say(text: str) -> None:
    print(f"core: {text}", file=sys.stderr, flush=True)
