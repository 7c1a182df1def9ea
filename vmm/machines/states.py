"""Saved states: what guests have in memory, in files, from a stop of the host to its next start.

A guest goes on from its state once at most, on disks that nobody changed in between, and only if this release would
start it as the domain that it was. The database says which file may be used; a crash at any point leaves a guest with a
state that is whole, or with none.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal
from uuid import UUID

from vmm import atomic
from vmm.clock import rfc3339
from vmm.errors import Conflict, Unavailable, UserError
from vmm.hypervisor.types import Hypervisor, State
from vmm.machines import savedrows
from vmm.machines.host import MIB
from vmm.machines.nvram import Nvram
from vmm.machines.store import Row
from vmm.volumes import files
from vmm.volumes.store import Database

Recorded = Literal["machine.save", "machine.resume"]
Record = Callable[[Recorded, str, str, str], Awaitable[None]]
"""Puts an event on record: its type, the machine's id and name, and why it failed or "". Raises: Unavailable."""

# Devices, firmware and libvirt's header, beside the guest's memory.
_BESIDE_MEMORY = 64 * MIB
# They share one disk, and libvirt has to answer other calls meanwhile.
_AT_A_TIME = 2
# For QEMU to start; reading the state may take as long as it might have taken to write it.
_RESTORE_S = 120.0
_UNFINISHED = {"saving": "it was not saved to the end", "resuming": "it was not resumed to the end"}


class States:
    """The saved states of all machines. Only one call at a time may concern one machine."""

    def __init__(
        self,
        database: Database,
        hypervisor: Hypervisor,
        directory: Path,
        volume_path: Callable[[str], Path],
        nvram: Nvram,
        record: Record,
    ) -> None:
        """Arguments: ``directory`` is core's alone; ``volume_path`` finds a volume's file by its id."""
        self._database = database
        self._hypervisor = hypervisor
        self._directory = directory
        self._volume_path = volume_path
        self._nvram = nvram
        self._record = record
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._claimed = 0

    def path(self, id: UUID) -> Path:
        """The file of one machine's state, whether it is there or not."""
        return self._directory / f"{id}.state"

    async def recover(self, rows: Iterable[Row]) -> None:
        """Remove the files of states that are not to be resumed; call once, when the boot is noted. Raises: OSError."""
        kept = {self.path(row.id) for row in rows if row.saved is not None and row.saved.phase == "saved"}
        await asyncio.to_thread(self._keep_only, kept)

    async def save(self, row: Row, xml: str, limit: float) -> None:
        """Save what a running guest has in memory, and end it. ``xml`` is what this release starts it with.

        Takes ``limit`` seconds at most, waiting for others included. Raises: UserError saying why it was not saved; the
        guest then runs on, or has ended. Both are on record.
        """
        end = time.monotonic() + limit
        need = row.running.memory + _BESIDE_MEMORY
        new = self.path(row.id).with_suffix(".new")
        try:
            since = rfc3339(time.time())
            await self._database.run(partial(savedrows.begin, id=row.id, since=since, domain=_hash(xml)))
            self._admit(need)
            # Counted at once, so that guests that are saved together are not promised the same room.
            self._claimed += need
            try:
                size, disks = await self._write(row, new, end)
                await self._database.run(partial(savedrows.complete, id=row.id, size=size, disks=disks))
            finally:
                self._claimed -= need
        except (UserError, OSError, sqlite3.Error) as error:
            reason = _words(error)
            with suppress(sqlite3.Error):  # 'saving' is not resumed either
                await self._database.run(partial(savedrows.lose, id=row.id, reason=f"not saved: {reason}", told=True))
            with suppress(OSError):
                await asyncio.to_thread(self._remove, row.id)
            await self._say("machine.save", row, reason)
            raise Unavailable(f"not saved: {reason}") from error
        await self._say("machine.save", row, "")

    async def resume(self, row: Row, xml: str) -> bool:
        """Have a machine that does not run go on from its saved state; ``xml`` is what this release starts it with.

        Returns: whether it runs. If not, there is no state (any more), why is on record, and it may start cold.
        Raises: Unavailable, when libvirt, audit or the database cannot be reached; then the state is kept.
        """
        saved = row.saved
        if saved is None or saved.phase == "resumed" or (saved.phase == "lost" and saved.told):
            return False
        if saved.phase != "saved":
            return await self._start_cold(row, saved.reason or _UNFINISHED[saved.phase])
        try:
            await asyncio.to_thread(self._check, row, saved, xml)
            await self._hypervisor.restore(row.id, self.path(row.id), _RESTORE_S + row.spec.stop_timeout)
            found = (await self._hypervisor.list()).get(row.id)
            if found is None or (found.state, found.spec_sha256) != (State.PAUSED, row.running.sha256(row.id)):
                raise Conflict("libvirt made something else of it")
            await self._record("machine.resume", str(row.id), row.spec.name, "")
            # Durable, before its processors run: whatever happens now, it is not resumed from this file again.
            await self._database.run(partial(savedrows.use, id=row.id))
        except BaseException as error:
            await self._end(row.id)
            if isinstance(error, Conflict):
                return await self._start_cold(row, error.message)
            if isinstance(error, sqlite3.Error):
                raise Unavailable(f"the database takes no changes: {error}") from error
            raise
        try:
            await asyncio.to_thread(files.remove, self.path(row.id))
            await self._hypervisor.resume(row.id)
        except (UserError, OSError) as error:
            await self._end(row.id)
            return await self._start_cold(row, f"it could not be let run: {_words(error)}")
        await self._database.run(partial(savedrows.settle, id=row.id))
        return True

    async def discard(self, row: Row) -> bool:
        """Throw away a state that somebody decided not to use; whether there was one. Raises: OSError."""
        if row.saved is None or row.saved.phase not in ("saved", "resuming"):
            return False
        await self._database.run(partial(savedrows.forget, id=row.id))
        await asyncio.to_thread(self._remove, row.id)
        return True

    async def _write(self, row: Row, new: Path, end: float) -> tuple[int, str]:
        """Save a state, once it is its turn, and make it durable; its size in bytes and what its disks are.

        Raises: UserError; OSError.
        """
        try:
            async with asyncio.timeout(end - time.monotonic()):
                await self._turns.acquire()
        except TimeoutError:
            raise Unavailable("it was not saved in time: others were still being saved") from None
        try:
            descriptor = await asyncio.to_thread(_make, new)
            try:
                await self._hypervisor.save(row.id, new, max(end - time.monotonic(), 0))
                return await asyncio.to_thread(self._complete, row, new, descriptor)
            finally:
                os.close(descriptor)
        finally:
            self._turns.release()

    async def _start_cold(self, row: Row, reason: str) -> bool:
        """Give a state up before the machine starts from its disks. Raises: Unavailable when that is not recorded."""
        await self._database.run(partial(savedrows.lose, id=row.id, reason=reason, told=False))
        with suppress(OSError):  # recover() removes it
            await asyncio.to_thread(self._remove, row.id)
        await self._record("machine.resume", str(row.id), row.spec.name, f"it starts cold: {reason}")
        await self._database.run(partial(savedrows.lose, id=row.id, reason=reason, told=True))
        return False

    async def _end(self, id: UUID) -> None:
        """End what was restored and did not run. Should that fail, the next start does it."""
        with suppress(UserError):
            await self._hypervisor.destroy(id)

    async def _say(self, type: Recorded, row: Row, reason: str) -> None:
        """Record what cannot be undone any more, or else tell the journal."""
        try:
            await self._record(type, str(row.id), row.spec.name, reason)
        except Unavailable as error:
            print(f"core: {row.spec.name}: {type}: {reason or 'done'}; not recorded: {error.message}", file=sys.stderr)

    def _disks(self, row: Row) -> list[Path]:
        """All files that a machine's guest writes to."""
        return [*map(self._volume_path, row.volumes), self._nvram.path(row.id)]

    def _admit(self, need: int) -> None:
        status = os.statvfs(self._directory)
        free = status.f_bavail * status.f_frsize - files.reserve(status.f_blocks * status.f_frsize) - self._claimed
        if need > free:
            raise Unavailable(f"its state may need {need} bytes of disk space, {max(free, 0)} are free")

    def _check(self, row: Row, saved: savedrows.Saved, xml: str) -> None:
        """Whether a state may still be used. Raises: Conflict."""
        if not self.path(row.id).exists():
            raise Conflict("its file is gone")
        if saved.domain != _hash(xml):
            raise Conflict("this release would start the machine with other hardware or confinement")
        try:
            disks = _fingerprint(self._disks(row))
        except OSError as error:
            raise Conflict(f"its disks cannot be looked at: {error.strerror}") from None
        if saved.disks != disks:
            raise Conflict("its disks were changed since")

    def _complete(self, row: Row, new: Path, descriptor: int) -> tuple[int, str]:
        """Make a state and the disks that it belongs to durable, and give it its name. Raises: OSError."""
        os.fsync(descriptor)
        disks = self._disks(row)
        for path in disks:
            atomic.sync_file(path)
        new.rename(self.path(row.id))
        atomic.sync_folder(self._directory)
        return os.fstat(descriptor).st_blocks * 512, _fingerprint(disks)

    def _remove(self, id: UUID) -> None:
        path = self.path(id)
        path.with_suffix(".new").unlink(missing_ok=True)
        files.remove(path)

    def _keep_only(self, kept: set[Path]) -> None:
        self._directory.mkdir(exist_ok=True)
        self._directory.chmod(0o700)
        for path in self._directory.iterdir():
            if path not in kept:
                files.remove(path)


def _make(new: Path) -> int:
    """An empty file to save into, open so that it can be synced. libvirt leaves its owner as it is. Raises: OSError."""
    new.unlink(missing_ok=True)
    return os.open(new, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _words(error: Exception) -> str:
    return error.message if isinstance(error, UserError) else str(error)


def _hash(xml: str) -> str:
    return hashlib.sha256(xml.encode()).hexdigest()


def _fingerprint(disks: list[Path]) -> str:
    """What changes whenever somebody writes to a disk, or puts another file in its place. Raises: OSError."""
    found = [(path.name, path.stat()) for path in disks]
    facts = [(name, status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found]
    return hashlib.sha256(repr(facts).encode()).hexdigest()
