"""Power cuts under load: whatever a disk may have kept at any moment holds every acknowledged record, and verifies.

The disk is as bad as POSIX lets it be. What was written and not synced is there up to any point, torn within a write;
a name that was made, changed or removed is so once its folder was synced, or before; files and folders are
independent. The audit daemon's parts and the software anchor run on it; a moment is behind each of their calls.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_audit_checkpoints import run
from tests.unit.test_audit_daemon import EVENT, OWN, LocalAnchor, stored
from vmm.audit import store as store_module
from vmm.audit import verify
from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import Entry
from vmm.audit.server import Service
from vmm.audit.store import Store
from vmm.errors import Unavailable

pytestmark = pytest.mark.sfr("FAU_STG.1")

Files = Mapping[str, bytes]
"""What a disk holds: content by path below its root."""


@dataclass
class _File:
    """A file's content: what is durable, and what it was since."""

    durable: bytes = b""
    since: list[bytes] = field(default_factory=list)

    def may_be(self) -> Iterator[bytes]:
        """What a power cut may leave of it."""
        yield from dict.fromkeys(itertools.chain([self.durable], *map(_torn, [self.durable, *self.since], self.since)))


def _torn(before: bytes, after: bytes) -> Iterator[bytes]:
    """A write cut behind its first byte, before its last one and around each line, and the whole of it."""
    if after.startswith(before):
        ends = [len(before) + n for n, byte in enumerate(after[len(before) :], 1) if byte == ord("\n")]
        cuts = {len(before) + 1, len(after) - 1, *ends, *(end - 1 for end in ends)}
        yield from (after[:cut] for cut in sorted(cuts) if len(before) < cut < len(after))
    yield after


@dataclass
class _Folder:
    """A folder's names: what is durable, and the changes since."""

    durable: dict[str, int] = field(default_factory=dict)
    since: list[tuple[str, str, int]] = field(default_factory=list)

    def may_be(self) -> Iterator[dict[str, int]]:
        """What a power cut may leave of it: the changes up to any one of them."""
        names = dict(self.durable)
        yield dict(names)
        for kind, name, file in self.since:
            if kind == "put":
                # A file has one name at a time: the one before is gone with the renaming.
                names = {other: held for other, held in names.items() if held != file} | {name: file}
            else:
                names.pop(name, None)
            yield dict(names)


class Recorder:
    """Stands around the calls by which files below ``root`` are changed, and writes down what they do.

    ``steps`` is what was done, in order; ``acknowledged`` are records by number, with their requests.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.steps: list[tuple[Any, ...]] = []
        self.acknowledged: dict[int, str] = {}
        self._ids: dict[tuple[int, int], int] = {}
        self._lock = threading.RLock()
        self._real = {
            name: getattr(os, name)
            for name in ("open", "write", "ftruncate", "fsync", "fdatasync", "replace", "unlink")
        }
        for name in self._real:
            patch.setattr(os, name, getattr(self, f"_{name}"))
        patch.setattr(store_module, "_write", self._write)

    def acknowledge(self, seq: int, request: str) -> None:
        """A record was."""
        with self._lock:
            self.acknowledged[seq] = request
            self.steps.append(("acknowledged", seq))

    def _place(self, path: Any) -> tuple[str, str] | None:
        """Folder and name below the root."""
        parent, name = os.path.split(os.fspath(path))
        return (parent, name) if parent.startswith(str(self.root)) else None

    def _file(self, descriptor: int) -> int | None:
        """The number of an open file of ours."""
        status = os.fstat(descriptor)
        return self._ids.get((status.st_dev, status.st_ino))

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        with self._lock:
            place = self._place(path)
            new = place is not None and bool(flags & os.O_CREAT) and not os.path.lexists(path)
            descriptor: int = self._real["open"](path, flags, mode, **more)
            if new and place:
                status = os.fstat(descriptor)
                # Numbers of inodes come again.
                self._ids[status.st_dev, status.st_ino] = len(self.steps)
                self.steps.append(("put", *place, len(self.steps)))
            return descriptor

    def _write(self, descriptor: int, data: Any) -> int:
        return int(self._changed("write", descriptor, data))

    def _ftruncate(self, descriptor: int, size: int) -> None:
        self._changed("ftruncate", descriptor, size)

    def _changed(self, name: str, descriptor: int, *arguments: Any) -> Any:
        with self._lock:
            result = self._real[name](descriptor, *arguments)
            if (file := self._file(descriptor)) is not None:
                self.steps.append(("content", file, Path(f"/proc/self/fd/{descriptor}").read_bytes()))
            return result

    def _fsync(self, descriptor: int) -> None:
        self._synced("fsync", descriptor)

    def _fdatasync(self, descriptor: int) -> None:
        self._synced("fdatasync", descriptor)

    def _synced(self, name: str, descriptor: int) -> None:
        # Whoever else is at work goes on meanwhile; what he does is not durable by this one.
        with self._lock:
            path = Path(f"/proc/self/fd/{descriptor}")
            step: tuple[Any, ...] | None = None
            if path.is_dir():
                step = ("folder", os.readlink(path))
            elif (file := self._file(descriptor)) is not None:
                content = path.read_bytes()
                self.steps.append(("content", file, content))
                step = ("file", file, content)
            if step:
                self.steps.append(step)
            self._real[name](descriptor)

    def _replace(self, source: Any, target: Any) -> None:
        with self._lock:
            place = self._place(target)
            status = os.stat(source)
            self._real["replace"](source, target)
            if place and (file := self._ids.get((status.st_dev, status.st_ino))) is not None:
                self.steps.append(("put", *place, file))

    def _unlink(self, path: Any, **more: Any) -> None:
        with self._lock:
            self._real["unlink"](path, **more)
            if place := self._place(path):
                self.steps.append(("remove", *place))

    def cuts(self) -> Iterator[tuple[Files, int]]:
        """All that the disk may hold if the power fails at any moment, and how many were acknowledged by then."""
        files: dict[int, _File] = {}
        folders: dict[str, _Folder] = {}
        acknowledged = 0
        for step in self.steps:
            match step:
                case ("acknowledged", _):
                    acknowledged += 1
                    continue
                case ("put", folder, name, file):
                    folders.setdefault(folder, _Folder()).since.append(("put", name, file))
                    files.setdefault(file, _File())
                case ("remove", folder, name):
                    folders.setdefault(folder, _Folder()).since.append(("remove", name, 0))
                case ("content", file, content):
                    files[file].since.append(content)
                case ("file", file, content):
                    files[file] = _File(content)
                case ("folder", folder):
                    if folder in folders:
                        *_, last = folders[folder].may_be()
                        folders[folder] = _Folder(last)
            for disk in self._may_be(files, folders):
                yield disk, acknowledged

    def _may_be(self, files: Mapping[int, _File], folders: Mapping[str, _Folder]) -> Iterator[Files]:
        for names in itertools.product(*(folder.may_be() for folder in folders.values())):
            found = {
                os.path.join(os.path.relpath(folder, self.root), name): file
                for folder, held in zip(folders, names, strict=True)
                for name, file in held.items()
            }
            for contents in itertools.product(*(files[file].may_be() for file in found.values())):
                yield dict(zip(found, contents, strict=True))


async def load(recorder: Recorder, callers: int, each: int) -> None:
    """Callers that append side by side, and checkpoints in between; the last one does not end in order."""
    root = recorder.root

    async def caller(service: Service, name: int, start: int) -> None:
        for number in range(start, start + each):
            request = f"r{name}.{number}"
            seq = await service._journal.append(Entry(type=EVENT, request=request), OWN)
            recorder.acknowledge(seq, request)
            if number % 4 == name:
                await service.checkpoints.make()

    for start in (0, each):
        async with run(root / "store", LocalAnchor(root / "anchor")) as service:
            await asyncio.gather(*(caller(service, name, start) for name in range(callers)))
            if not start:
                await service.close()


def restored(disk: Files, root: Path) -> None:
    for folder in ("store", "anchor"):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for file in (root / folder).iterdir():
            file.unlink()
    for path, content in disk.items():
        (root / path).write_bytes(content)


def test_no_power_cut_loses_an_acknowledged_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 6000)
    root, copy = tmp_path / "disk", tmp_path / "copy"
    for folder in ("store", "anchor"):
        (root / folder).mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(root, patch)
        asyncio.run(load(recorder, callers=6, each=12))
    order = [step[1] for step in recorder.steps if step[0] == "acknowledged"]
    assert len(order) == 144 and len(verify.segments(root / "store")) > 4
    seen: dict[int, int] = {}
    chosen = random.Random(1)
    went_on = 0
    for disk, acknowledged in recorder.cuts():
        key = hash(tuple(sorted(disk.items())))
        # The same again is no other case unless more was acknowledged.
        if seen.get(key, -1) >= acknowledged:
            continue
        seen[key] = acknowledged
        restored(disk, copy)
        store = Store(copy / "store", producer=OWN, boot="after")
        end = store.end[0]
        store.close()
        report = verify.verify_directory(copy / "store") if end else None
        assert report is None or (report.problem is None and report.last == end), report
        found = {record.seq: record.request for record in stored(copy / "store")}
        lost = {seq for seq in order[:acknowledged] if found.get(seq) != recorder.acknowledged[seq]}
        assert not lost, (acknowledged, lost)
        # Sometimes the host goes on from there: with a checkpoint that follows the last one.
        if chosen.random() < 0.1:
            went_on += 1
            asyncio.run(goes_on(copy))
    assert len(seen) > 500 and went_on > 50, (len(seen), went_on)


async def goes_on(root: Path) -> None:
    async with run(root / "store", LocalAnchor(root / "anchor")) as service:
        await service._journal.append(Entry(type=EVENT), OWN)
        await service.checkpoints.make()
    report = verify.verify_directory(root / "store")
    assert report.problem is None and report.covered == report.last - 1
    made = [Checkpoint.of(r).proof.counter for r in stored(root / "store") if r.type == "audit.checkpoint"]
    assert made == list(range(1, len(made) + 1))


def test_the_disk_of_this_test_does_lose_what_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its sync, and without that of a new segment's name, the store loses records on it."""
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 2000)
    for number, missing in enumerate(("fdatasync", "fsync")):
        root, copy = tmp_path / f"disk{number}", tmp_path / f"copy{number}"
        for folder in ("store", "anchor"):
            (root / folder).mkdir(parents=True)
        with pytest.MonkeyPatch.context() as patch:
            recorder = Recorder(root, patch)
            patch.setattr(os, missing, lambda _: None)
            store = Store(root / "store", producer=OWN, boot="boot")
            for seq in range(1, 9):
                store.append([store_module.Draft(Entry(type=EVENT, request="r"), OWN)])
                recorder.acknowledge(seq, "r")
            store.close()
        lost = 0
        for disk, acknowledged in recorder.cuts():
            restored(disk, copy)
            try:
                store = Store(copy / "store", producer=OWN, boot="after")
            except Unavailable:
                lost += 1
                continue
            lost += store.end[0] < acknowledged
            store.close()
        assert lost > 3, missing
