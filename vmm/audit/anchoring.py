"""When checkpoints are made: at most one a minute while there is news, at the end of a segment, at the end of the
daemon, and when somebody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Any, Protocol

import msgspec

from vmm import wire
from vmm.audit.checkpoint import Checkpoint, Proof, Statement
from vmm.audit.journal import Journal
from vmm.audit.records import CHECKPOINT, Entry, Producer
from vmm.errors import Unavailable, UserError
from vmm.paths import ANCHOR_SOCKET

INTERVAL_S = 60.0
FIRST_S = 15.0
"""Until the first one: the host has better things to do while it starts."""
_ANSWER_S = 25.0
"""For which the anchor is waited; a TPM may take seconds, and a stopping service has 90."""


class Anchor(Protocol):
    """The anchor as it is seen from here; see vmm.audit.anchor."""

    async def certify(self, digest: str, past: int) -> Proof:
        """Raises: UserError."""
        ...

    async def advance(self, past: int) -> None:
        """Raises: UserError."""
        ...


class AnchorClient:
    """The anchor's service."""

    def __init__(self, path: Path = ANCHOR_SOCKET) -> None:
        self._path = path

    async def certify(self, digest: str, past: int) -> Proof:
        """See vmm.audit.anchor. Raises: UserError."""
        try:
            return msgspec.convert(await self._call("certify", {"digest": digest, "past": past}), Proof)
        except msgspec.ValidationError as error:
            raise Unavailable(f"the anchor answers with something else: {error}") from None

    async def advance(self, past: int) -> None:
        """See vmm.audit.anchor. Raises: UserError."""
        await self._call("advance", {"past": past})

    async def _call(self, method: str, params: dict[str, Any]) -> Any:
        try:
            async with asyncio.timeout(_ANSWER_S):
                return await wire.call(self._path, method, params)
        except (TimeoutError, ConnectionError):
            raise Unavailable("the anchor does not answer") from None


class Checkpoints:
    """Makes checkpoints of a trail. ``failure`` says why there was none when one was due, "" if there was."""

    def __init__(
        self, journal: Journal, own: Producer, anchor: Anchor, *, first: float = FIRST_S, interval: float = INTERVAL_S
    ) -> None:
        """Arguments: ``first`` and ``interval`` are in seconds."""
        self._journal = journal
        self._own = own
        self._anchor = anchor
        self._first = first
        self._interval = interval
        self._one = asyncio.Lock()
        self._looked = False
        self._quiet = 0
        self.newest: Checkpoint | None = None
        self.failure = ""

    async def keep(self) -> None:
        """Make them for ever."""
        await asyncio.sleep(self._first)
        while True:
            self._journal.sealed.clear()
            with contextlib.suppress(Unavailable):
                await self.make()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._journal.sealed.wait()

    async def make(self) -> Checkpoint | None:
        """Make one, unless there is nothing new but the last one itself; returns the newest.

        Raises: Unavailable when there could be none; that is recorded the first time.
        """
        # Whoever waits may be cancelled; a checkpoint that is stored and not taken note of would be counted twice.
        return await asyncio.shield(self._make())

    async def _make(self) -> Checkpoint | None:
        async with self._one:
            store = self._journal.store
            covers, head = store.end
            if covers == self._quiet:
                return self.newest
            try:
                statement = Statement(covers, head, store.segments.of(covers))
                proof = await self._anchor.certify(statement.digest(), await self._past())
            except UserError as error:
                await self._failed(error.message)
                raise Unavailable(f"the audit trail is not anchored: {error.message}") from None
            made = Checkpoint(covers, head, statement.segment, proof)
            seq = await self._journal.append(Entry(type=CHECKPOINT, extra=msgspec.to_builtins(made)), self._own)
            # What came in meanwhile is news.
            self._quiet = seq if seq == covers + 1 else covers
            self.newest, self.failure = made, ""
            # From here on its number is taken. If this fails, or never comes, the next call makes up for it.
            with contextlib.suppress(UserError):
                await self._anchor.advance(proof.counter)
            return made

    async def _past(self) -> int:
        """The counter of the newest checkpoint that is stored, of earlier runs too; 0 if there is none."""
        if not self._looked:
            record = await asyncio.to_thread(self._journal.store.newest_checkpoint)
            # One that only a later release can read: the anchor counted on behind it, as behind any other.
            with contextlib.suppress(msgspec.ValidationError):
                self.newest = Checkpoint.of(record) if record else None
            self._looked = True
        return self.newest.proof.counter if self.newest else 0

    async def _failed(self, reason: str) -> None:
        if not self.failure:
            self.failure = reason
            print(f"audit: not anchored: {reason}", file=sys.stderr, flush=True)
            with contextlib.suppress(Unavailable):
                await self._journal.append(Entry(type=CHECKPOINT, outcome="failure", reason=reason[:1000]), self._own)
