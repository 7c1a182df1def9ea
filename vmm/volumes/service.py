"""The life of volumes. After a crash at any point, recover() leaves each of them made or gone, never between."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Literal, cast

from vmm.clock import rfc3339
from vmm.errors import Unavailable, UserError
from vmm.volumes import files, qcow2, store
from vmm.volumes.importer import Importer
from vmm.volumes.types import MAX_SIZE, Format, Volume, round_up


class Volumes:
    """All volumes of this host. Files lie in ``directory``/volumes, uploads for the time being in staging."""

    def __init__(self, database: store.Database, directory: Path, importer: Importer) -> None:
        self._database = database
        self._importer = importer
        self._files = directory / "volumes"
        self._staging = directory / "staging"
        self._staged = 0

    def path(self, id: str) -> Path:
        """The file of the volume with this id."""
        return self._files / f"{id}.raw"

    async def recover(self) -> None:
        """Undo what a crash interrupted; call once, before anything else."""
        await asyncio.to_thread(self._make_directories)
        rows = await self._database.run(store.rows)
        for row in rows:
            if row.state != "ready":
                await self._discard(row.id)
        kept = {self.path(row.id) for row in rows if row.state == "ready"}
        await asyncio.to_thread(self._remove_leftovers, kept)

    async def list_all(self) -> list[Volume]:
        """Every volume, by name."""
        rows = await self._database.run(store.rows)
        return await asyncio.to_thread(lambda: [self._view(row) for row in rows])

    async def show(self, name: str) -> Volume:
        """One volume. Raises: NotFound."""
        return self._view(await self._database.run(partial(store.row, name=name)))

    async def uuid(self, name: str) -> str:
        """The id of a volume. Raises: NotFound."""
        return (await self._database.run(partial(store.row, name=name))).id

    async def create(self, name: str, size: int) -> Volume:
        """Make a volume of ``size`` zero bytes. Raises: Conflict; Unavailable, with figures, when it does not fit."""
        row = await self._begin(name, size)
        try:
            await asyncio.to_thread(files.create, self.path(row.id), size)
            await self._finish(row)
        except BaseException:
            await asyncio.shield(self._discard(row.id))
            raise
        return await self.show(name)

    async def upload(
        self, name: str, format: Format, length: int, size: int | None, content: AsyncIterator[bytes]
    ) -> Volume:
        """Make a volume from an image of ``length`` bytes; ``size`` (bytes) makes it larger than the image's disk.

        Raises: UserError when the image is refused; Conflict; Unavailable, with figures, when it does not fit.
        """
        staged, others = self._staging / str(uuid.uuid4()), self._staged
        # Counted at once, so that uploads that begin together are not promised the same room.
        self._staged += length
        try:
            await self._database.run(
                partial(store.admit, name=name, wanted=length, capacity=self._capacity(), staged=others)
            )
            await _receive(staged, length, content)
            return await self._import(name, format, size, staged)
        finally:
            await asyncio.shield(asyncio.to_thread(files.remove, staged))
            self._staged -= length

    async def delete(self, name: str) -> None:
        """Delete a volume that no machine has. Raises: NotFound, Conflict."""
        row = await self._database.run(partial(store.mark_deleting, name=name))
        await self._discard(row.id)

    async def _import(self, name: str, format: Format, size: int | None, staged: Path) -> Volume:
        with staged.open("rb") as source:
            declared = qcow2.virtual_size(source.fileno()) if format == "qcow2" else os.fstat(source.fileno()).st_size
            if size is not None and size < declared:
                raise UserError(f"size: {size} bytes do not hold the image's disk of {declared} bytes")
            if declared > MAX_SIZE:
                raise UserError(f"the image has {declared} bytes; a volume holds {MAX_SIZE} at most")
            row = await self._begin(name, size or round_up(declared))
            try:
                await self._fill(row, source.fileno(), staged, format)
                await self._finish(row)
            except BaseException:
                await asyncio.shield(self._discard(row.id))
                raise
        return await self.show(name)

    async def _fill(self, row: store.Row, source: int, staged: Path, format: Format) -> None:
        path = self.path(row.id)
        await asyncio.to_thread(files.create, path, row.size)
        files.share_with_converter(staged)
        files.share_with_converter(path)
        with path.open("r+b") as target:
            await self._importer(source, target.fileno(), format, row.size)
        await asyncio.to_thread(files.take_back, path)
        if path.stat().st_size != row.size:
            raise Unavailable("the image converter left a file of the wrong size")

    async def _begin(self, name: str, size: int) -> store.Row:
        created = rfc3339(time.time())
        row = store.Row(str(uuid.uuid4()), name, size, "creating", created, None)
        await self._database.run(partial(store.insert, new=row, capacity=self._capacity(), staged=self._staged))
        return row

    async def _finish(self, row: store.Row) -> None:
        await self._database.run(partial(store.set_state, id=row.id, state="ready"))

    async def _discard(self, id: str) -> None:
        """The file goes first: a row without a file is undone at the next start, a file without a row found too."""
        await asyncio.to_thread(files.remove, self.path(id))
        await self._database.run(partial(store.delete, id=id))

    def _capacity(self) -> int:
        """Bytes that may be promised."""
        status = os.statvfs(self._files)
        total = status.f_blocks * status.f_frsize
        return total - files.reserve(total)

    def _view(self, row: store.Row) -> Volume:
        try:
            allocated = self.path(row.id).stat().st_blocks * 512
        except FileNotFoundError:
            allocated = 0
        state = cast(Literal["creating", "ready", "deleting"], row.state)
        return Volume(row.name, row.id, row.size, allocated, state, row.machine, row.created)

    def _make_directories(self) -> None:
        files.make_directory(self._files)
        self._staging.mkdir(exist_ok=True)
        self._staging.chmod(0o700)

    def _remove_leftovers(self, kept: set[Path]) -> None:
        for path in [*self._staging.iterdir(), *(p for p in self._files.iterdir() if p not in kept)]:
            files.remove(path)


async def _receive(path: Path, length: int, content: AsyncIterator[bytes]) -> None:
    """Write an upload to a new file. Raises: UserError when it is not ``length`` bytes long; Unavailable."""
    received = 0
    try:
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            async for piece in content:
                received += len(piece)
                if received > length:
                    raise UserError(f"the upload is longer than the {length} bytes announced")
                await asyncio.to_thread(file.write, piece)
    except OSError as error:
        raise Unavailable(f"the upload cannot be stored: {error.strerror}") from None
    if received != length:
        raise UserError(f"the upload ended after {received} of {length} bytes")
