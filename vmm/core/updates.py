"""Core's way to the updater, which is another process: it alone writes systems, and restarts the host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from vmm import wire
from vmm.core.dispatch import Call
from vmm.errors import Unavailable, UserError
from vmm.paths import UPDATE_SOCKET
from vmm.update.types import Phase, Status

How = Literal["reboot", "poweroff"]
Job = Literal["check", "download", "apply", "rollback"]

_BEGINS: Mapping[Job, Phase] = {
    "check": "checking",
    "download": "downloading",
    "apply": "writing",
    "rollback": "verifying",
}
BUSY: frozenset[Phase] = frozenset({"checking", "downloading", "writing", "verifying", "finishing"})
# A bundle is checked whole before it is taken.
_IMPORT_TIMEOUT_S = 900.0


class UpdateClient:
    """One connection a call. Each method raises Unavailable when the updater does not answer."""

    def __init__(self, socket: Path = UPDATE_SOCKET, *, timeout: float = 60.0, prompt: float = 1.0) -> None:
        """Arguments: in seconds, ``timeout`` is for one call (the updater may have to be started for it), ``prompt``
        how long a job may take to end as part of the call that begins it."""
        self._socket = socket
        self._timeout = timeout
        self._prompt = prompt
        self._job: tuple[asyncio.Task[Any], Phase] | None = None

    async def status(self) -> Status:
        """What the updater does, and what is installed."""
        status = _status(await self._call("status"))
        if self._job is not None and not self._job[0].done() and status.phase not in BUSY:
            # It has the job, and is still, or again, between two phases.
            return msgspec.structs.replace(status, phase=self._job[1])
        return status

    async def history(self) -> list[Any]:
        """What was installed here, and what became of it."""
        events: list[Any] = await self._call("history")
        return events

    async def begin(self, job: Job, caller: Call, **params: Any) -> Status:
        """Begin a job; returns once it runs, or has ended at once. Raises: UserError as the updater refuses it."""
        sent = {"caller": _caller(caller), "wait": True} | params
        task = asyncio.create_task(self._run(job, sent))
        # Nobody may be left to hear how it ended; the updater's status tells.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        await asyncio.wait({task}, timeout=self._prompt)
        if task.done():
            return task.result()
        self._job = task, _BEGINS[job]
        return await self.status()

    async def cancel(self) -> Status:
        """End the job that runs. Raises: UserError as the updater answers."""
        return _status(await self._call("cancel"))

    async def reboot(self, how: How) -> None:
        """Restart the host or switch it off; returns before that happens. Raises: UserError."""
        await self._call("reboot", {"how": how})

    async def import_bundle(self, caller: Call, length: int) -> Status:
        """Hand over the bundle of ``length`` bytes that the caller sends. Raises: UserError as the updater answers."""
        async with await wire.open_call(self._socket, "import", {"caller": _caller(caller)}) as channel:
            answer = asyncio.create_task(channel.result())
            try:
                await _send(channel, caller.content(), length, answer)
                return _status(await asyncio.wait_for(answer, _IMPORT_TIMEOUT_S))
            except TimeoutError:
                raise Unavailable(f"the updater did not answer within {_IMPORT_TIMEOUT_S:g} s") from None
            except (wire.ProtocolError, ConnectionError) as error:
                raise Unavailable(f"the updater: {error}") from None
            finally:
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)

    async def _run(self, job: Job, params: dict[str, Any]) -> Status:
        """A call that lasts as long as its job. Should it end early, the job does not."""
        try:
            return _status(await wire.call(self._socket, job, params))
        except ConnectionError:
            raise Unavailable("the updater went away") from None

    async def _call(self, method: str, params: dict[str, Any] | None = None) -> Any:
        try:
            async with asyncio.timeout(self._timeout):
                return await wire.call(self._socket, method, params)
        except TimeoutError:
            raise Unavailable(f"the updater did not answer within {self._timeout:g} s") from None
        except ConnectionError:
            raise Unavailable("the updater went away") from None


async def _send(channel: wire.Channel, content: AsyncIterator[bytes], length: int, answer: asyncio.Task[Any]) -> None:
    """Send everything, or until the updater answers: then it wants no more. Raises: UserError for another length."""
    try:
        async for chunk in content:
            if answer.done():
                return
            length -= len(chunk)
            if length < 0:
                break
            await channel.send_data(chunk)
        if length:
            raise UserError("length: the bundle is longer or shorter than was said")
        await channel.send(wire.Kind.END)
    except ConnectionError:
        pass  # it may have said why before it closed


def _caller(call: Call) -> dict[str, Any]:
    """Who asked, for the updater's own records."""
    return {"actor": msgspec.to_builtins(call.actor), "request": call.request}


def _status(value: Any) -> Status:
    try:
        return msgspec.convert(value, Status)
    except msgspec.ValidationError as error:
        raise Unavailable(f"the updater's answer is not understood: {error}") from None
