"""Updates without an administrator, as the configuration allows them."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Literal

from vmm.config.types import Update
from vmm.core.configuration import AppliedConfiguration
from vmm.core.guests import Perform
from vmm.core.updates import BUSY, UpdateClient
from vmm.errors import Unavailable, UserError
from vmm.update.types import Status, version_key

Step = Literal["check", "download", "apply", "reboot"]

_METHODS: Mapping[Step, str] = {
    "check": "update.check",
    "download": "update.download",
    "apply": "update.apply",
    "reboot": "host.reboot",
}
_TICK_S = 60.0
# After a power cut a whole site starts at once; its hosts need not ask at once.
_FIRST_S, _FIRST_SPREAD_S = 300.0, 1500.0
_SPREAD = 0.2


def next_step(
    now: datetime, last: Mapping[Step, datetime], update: Update, interval: timedelta, status: Status
) -> Step | None:
    """What is to be done now, if anything.

    Looking and downloading disturb nobody and are done at any time; writing waits for the window if there is one,
    and a restart, which stops the guests, is never made without one. What was tried is not tried again for an
    interval. Arguments: ``last`` says when each step was last begun.
    """

    def is_due(step: Step) -> bool:
        # A clock that ran ahead and was set back must not put everything off until it is there again.
        return step not in last or abs(now - last[step]) >= interval

    if not update.automatic or status.phase in BUSY:
        return None
    inside = is_inside(now, update)
    step: Step | None = None
    if status.installed:
        step = "reboot" if inside and update.window is not None else None
    elif _is_wanted(status.available, status) and status.available != status.staged and is_due("download"):
        step = "download"
    elif _is_wanted(status.staged, status) and inside:
        step = "apply"
    if step is not None and is_due(step):
        return step
    return "check" if is_due("check") else None


def is_inside(now: datetime, update: Update) -> bool:
    """Whether it is time to write: always, unless there is a window."""
    if update.minutes is None:
        return True
    begin, end = update.minutes
    minute = now.hour * 60 + now.minute
    return begin <= minute < end if begin < end else minute >= begin or minute < end


def _is_wanted(version: str, status: Status) -> bool:
    """Whether a version is newer than what runs and did not fail here; going back is for administrators."""
    if not version or any(failed.version == version for failed in status.failed):
        return False
    try:
        return version_key(version) > version_key(status.running)
    except ValueError:
        return False


class AutoUpdate:
    """Takes one step after the other, each as a call with its records."""

    def __init__(
        self,
        configuration: AppliedConfiguration,
        updater: UpdateClient,
        perform: Perform,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._configuration = configuration
        self._updater = updater
        self._perform = perform
        self._clock = clock
        self._chance = chance
        self._spread = chance()
        self._last: dict[Step, datetime] = {}
        self._status: Status | None = None
        self._said = ""

    async def keep(self) -> None:
        """Take turns for ever."""
        await asyncio.sleep(_FIRST_S + self._chance() * _FIRST_SPREAD_S)
        while True:
            await self.turn()
            await asyncio.sleep(_TICK_S)

    async def turn(self) -> None:
        """Do what is to be done now. Never raises for what fails: it is on record, and tried again later."""
        try:
            update = self._configuration.document().update
        except Unavailable:
            return
        if update is None or not update.automatic:
            self._status = None
            return
        try:
            await self._turn(update)
            self._said = ""
        except UserError as error:
            if error.message != self._said:
                print(f"core: automatic update: {error.message}", file=sys.stderr, flush=True)
            self._said = error.message

    async def _turn(self, update: Update) -> None:
        now = self._clock()
        # The updater ends when it is idle, so it is asked only when there may be something to do.
        old = self._status
        if old is not None and old.phase not in BUSY and self._next(now, update, old) is None:
            return
        self._status = await self._updater.status()
        step = self._next(now, update, self._status)
        if step is None:
            return
        self._last[step] = now
        self._status = None
        if step == "check":
            self._spread = self._chance()
        await self._perform(_METHODS[step])

    def _next(self, now: datetime, update: Update, status: Status) -> Step | None:
        interval = timedelta(hours=update.interval_hours * (1 + _SPREAD * self._spread))
        return next_step(now, self._last, update, interval, status)
