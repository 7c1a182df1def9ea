"""The update daemon: one job at a time, what it is doing told to whoever asks, gone when nobody needs it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import msgspec

from vmm import wire
from vmm.audit.client import Actor, Entry
from vmm.audit.throttle import Throttle
from vmm.errors import Conflict, Forbidden, NotFound, Unavailable, UserError
from vmm.update import rotation, slots
from vmm.update.bundle import Unpacker
from vmm.update.calls import Check, Condemn, Download, History, Import, Leave, Nothing, Parameters, convert
from vmm.update.environment import Environment, How
from vmm.update.job import Job
from vmm.update.settle import Verdict
from vmm.update.types import Phase, Slot, Status
from vmm.update.work import Work

IDLE_S = 60.0
_NEXT: Mapping[Phase, frozenset[Phase]] = {
    "idle": frozenset({"checking", "downloading", "staged", "verifying"}),
    "checking": frozenset({"downloading"}),
    "downloading": frozenset(),
    "staged": frozenset({"checking", "downloading", "staged", "writing", "verifying"}),
    "writing": frozenset({"verifying"}),
    "verifying": frozenset({"finishing"}),
    "finishing": frozenset(),
    "installed": frozenset({"checking", "downloading", "verifying"}),
}
"""What may follow a phase; every job ends in "idle", "staged" or "installed", by what is then there."""
_FINAL: frozenset[Phase] = frozenset({"finishing"})
_SHOWN = ("time", "type", "version", "outcome", "reason")


class Service:
    """Answers the calls on the update socket."""

    def __init__(self, environment: Environment, work: Work, allowed: frozenset[int], strangers: Throttle) -> None:
        """Arguments: ``allowed`` are the uids that may call, root aside; ``strangers`` records calls of all others."""
        self._env = environment
        self._work = work
        self._allowed = allowed
        self._strangers = strangers
        self._lock = threading.Lock()
        self._phase: Phase | None = None
        self._job: Job | None = None
        self._task: asyncio.Task[None] | None = None
        self._progress = (0, 0)
        self._error = ""
        self._calls = 0
        self.served = 0
        self.quiet = asyncio.Event()
        self.quiet.set()

    async def handle(self, request: wire.Request, channel: wire.Channel) -> Any:
        """One call. Raises: UserError."""
        uid = channel.peer.uid
        if uid not in self._allowed and uid not in (0, os.geteuid()):
            raise self._foreign(uid, request.method, f"uid {uid} may not use the updater")
        self._calls += 1
        self.served += 1
        self.quiet.clear()
        try:
            return await self._answer(request, channel, uid)
        finally:
            self._calls -= 1
            self._rest()

    def _foreign(self, uid: int, method: str, reason: str) -> Forbidden:
        """The error to raise; it is on record soon after."""
        self._strangers.report(
            Entry(
                type="update.foreign-peer",
                phase="outcome",
                actor=Actor(id=f"uid {uid}"),
                outcome="failure",
                reason=reason,
                extra={"method": method[:64]},
            )
        )
        return Forbidden(reason)

    async def _answer(self, request: wire.Request, channel: wire.Channel, uid: int) -> Any:
        match request.method:
            case "status":
                convert(request.params, Nothing)
                return await self._status()
            case "history":
                limit = convert(request.params, History).limit
                events = (await asyncio.to_thread(self._env.store.history))[-limit:]
                # What was seen in detail stands in the audit trail.
                return [{field: getattr(e, field) for field in _SHOWN} for e in events]
            case "cancel":
                return await self._cancel()
            case "check":
                wanted = convert(request.params, Check)
                body = partial(self._work.check, source=wanted.source or None, override_expiry=wanted.override_expiry)
                return await self._start(wanted, body)
            case "download":
                get = convert(request.params, Download)
                body = partial(
                    self._work.download,
                    version=get.version or "",
                    retry_failed=get.retry_failed,
                    override_expiry=get.override_expiry,
                )
                return await self._start(get, body)
            case "apply":
                return await self._start(convert(request.params, Parameters), self._work.apply)
            case "rollback":
                asked = msgspec.structs.replace(convert(request.params, Parameters), wait=True)
                return await self._start(asked, self._work.rollback)
            case "import":
                return await self._import(convert(request.params, Import), channel)
            case "reboot":
                return await self._leave(convert(request.params, Leave).how)
            case "settle" | "bless" | "condemn":
                if uid not in (0, os.geteuid()):
                    raise self._foreign(uid, request.method, f"{request.method} is for the host itself")
                match request.method:
                    case "settle":
                        return await self._judge(self._work.settle)
                    case "bless":
                        return await self._judge(self._work.bless)
                reason = convert(request.params, Condemn).reason
                await self._judge(partial(self._work.condemn, reason))
                return await self._leave("reboot")
        raise NotFound(f"the updater has no method {request.method!r}")

    async def _start(self, wanted: Parameters, body: Callable[..., None]) -> Status:
        begun = asyncio.Event()
        job = self._begin(partial(asyncio.get_running_loop().call_soon_threadsafe, begun.set))

        async def run() -> None:
            await asyncio.to_thread(body, job, wanted.caller, self._enter)

        task = self._task = asyncio.create_task(self._ending(run()))
        # Whoever asks for the status later hears of an error, too.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        recorded = asyncio.create_task(begun.wait())
        awaited: set[asyncio.Task[Any]] = {task} if wanted.wait else {task, recorded}
        # The job outlives a caller that goes away; ending it is a call of its own.
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        recorded.cancel()
        if task.done():
            task.result()
        return await self._status()

    async def _leave(self, how: How) -> dict[str, Any]:
        with self._lock:
            if self._job is not None and self._phase not in ("checking", "downloading"):
                raise Conflict(f"the updater is busy: {self._phase or 'settling'}")
            if self._job is not None:
                self._job.cancel()
        await asyncio.to_thread(self._env.leave, how)
        return {}

    async def _import(self, wanted: Import, channel: wire.Channel) -> Status:
        job = self._begin()

        async def run() -> None:
            self._enter("downloading")
            job.expect(wanted.length or 0)
            recorder = self._env.recorder
            request = await asyncio.to_thread(recorder.intent, "update.import", wanted.caller, {})
            received = 0
            unpacker = None
            failure: UserError | None = Unavailable("interrupted")
            try:
                unpacker = await asyncio.to_thread(Unpacker, self._env.bundle)
                async for piece in channel.data():
                    await asyncio.to_thread(unpacker.feed, piece)
                    received += len(piece)
                    job.advance(len(piece))
                if wanted.length not in (None, received):
                    raise UserError(f"the bundle has {received} bytes where {wanted.length} were announced")
                await asyncio.to_thread(unpacker.finish)
                self._env.store.change(source="bundle", overridden=False)
                failure = None
            except UserError as error:
                failure = error
                raise
            except (OSError, wire.ProtocolError) as error:
                failure = Unavailable(f"the bundle could not be stored: {error}")
                raise failure from None
            finally:
                if unpacker is not None:
                    await asyncio.to_thread(unpacker.abort)
                extra = {"bytes": received}
                await asyncio.to_thread(recorder.outcome, "update.import", request, wanted.caller, "", failure, extra)

        await self._ending(run())
        return await self._status()

    async def _judge(self, judgement: Callable[[], Verdict]) -> dict[str, Any]:
        self._begin()
        found: list[Verdict] = []

        async def run() -> None:
            found.append(await asyncio.to_thread(judgement))

        await self._ending(run())
        return {"verdict": msgspec.to_builtins(found[0])}

    async def _cancel(self) -> Status:
        with self._lock:
            if self._job is None or self._task is None:
                raise Conflict("the updater does nothing that could be cancelled")
            if self._phase in _FINAL:
                raise Conflict("the new version is being made known to the boot loader; that cannot be cancelled")
            self._job.cancel()
        await asyncio.wait({self._task})
        return await self._status()

    def stop(self) -> None:
        """The daemon shall end: whatever may be cancelled is, and what may not comes to its end (see quiet)."""
        with self._lock:
            if self._job is not None and self._phase not in _FINAL:
                self._job.cancel()

    def _begin(self, begun: Callable[[], object] = lambda: None) -> Job:
        with self._lock:
            if self._job is not None:
                raise Conflict(f"the updater is busy: {self._phase or 'settling'}")
            self._job = Job(self._report, begun)
            self._progress, self._error = (0, 0), ""
            return self._job

    async def _ending(self, run: Awaitable[None]) -> None:
        try:
            await run
        except UserError as error:
            self._error = error.message
            raise
        except Exception as error:
            self._error = "an internal error; the journal has its trace"
            asyncio.get_running_loop().call_exception_handler({"message": "a job failed", "exception": error})
            raise
        finally:
            with self._lock:
                self._job, self._phase = None, None
            self._rest()

    def _report(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _enter(self, phase: Phase) -> None:
        """The job is in another phase; called from its thread. Raises: Cancelled at the last moment it may be."""
        with self._lock:
            before = self._phase or self._resting()
            if phase != before and phase not in _NEXT[before]:
                raise AssertionError(f"no way from {before} to {phase}")
            if self._job is not None:
                self._job.check()
            self._phase = phase

    def _resting(self) -> Phase:
        waiting = self._env.store.state.installed
        if waiting is not None and waiting.certain:
            return "installed"
        return "staged" if self._env.staging.staged() else "idle"

    def _rest(self) -> None:
        if self._calls == 0 and self._job is None:
            self.quiet.set()

    async def _status(self) -> Status:
        return await asyncio.to_thread(self._compose)

    def _compose(self) -> Status:
        env, state = self._env, self._env.store.state
        staged, waiting = env.staging.staged(), state.installed
        phase = self._phase or self._resting()
        error, places, floor = self._error, (), 0
        found: tuple[Slot, ...] = places
        try:
            floor = env.floor.read()
            found = slots.status(env.system.table(), env.system.entries(), env.running.root_hash)
        except (UserError, OSError) as problem:
            error = error or str(problem)
        return Status(
            running=env.running.version,
            epoch=env.running.epoch,
            floor=floor,
            floor_source=env.floor.source,
            phase=phase,
            version=(waiting.version if waiting and phase == "installed" else staged.version if staged else ""),
            done=self._progress[0],
            total=self._progress[1],
            error=error,
            available=state.available,
            staged=staged.version if staged else "",
            installed=waiting.version if waiting and waiting.certain else "",
            checked=state.checked,
            slots=found,
            failed=state.failed,
            keys=rotation.status(state.keys),
        )
