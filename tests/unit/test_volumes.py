"""Volumes with a real database, real files and the real converter (as a plain process instead of a confined one)."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from vmm.core.db import VERSION, Database
from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.process import run
from vmm.volumes import store
from vmm.volumes.importer import ConfinedImporter
from vmm.volumes.qcow2 import ImageRefused
from vmm.volumes.service import Volumes
from vmm.volumes.types import MIB

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "core.db")
    yield database
    database.close()


@pytest.fixture
def converter(tmp_path: Path) -> Iterator[Path]:
    """What systemd does for holdfast-import.socket: one process a connection, its standard input the connection."""
    path = tmp_path / "import.sock"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                command = [sys.executable, "-m", "vmm.volumes.convert"]
                subprocess.run(command, stdin=connection.fileno(), cwd=REPOSITORY, check=False)

    thread = threading.Thread(target=serve)
    thread.start()
    yield path
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.fixture
def volumes(tmp_path: Path, database: Database, converter: Path) -> Volumes:
    volumes = Volumes(database, tmp_path, ConfinedImporter(converter))
    asyncio.run(volumes.recover())
    return volumes


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(content), 64 * 1024):
        yield content[start : start + 64 * 1024]


def upload(volumes: Volumes, content: bytes, format: Any = "qcow2", size: int | None = None) -> bytes:
    """Upload an image as the volume "v" and return the volume's bytes."""
    volume = asyncio.run(volumes.upload("v", format, len(content), size, pieces(content)))
    return volumes.path(volume.uuid).read_bytes()


def image(tmp_path: Path, *options: str, size: str = "3M", marker: bytes = b"") -> Path:
    path = tmp_path / "made.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path, size])
    if marker:
        run(["qemu-io", "-f", "qcow2", "-c", f"write -q -P {marker[0]} 1M 64k", path])
    return path


def patched(path: Path, offset: int, value: bytes) -> bytes:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    return bytes(content)


def leftovers(tmp_path: Path) -> list[Path]:
    return [*(tmp_path / "volumes").iterdir(), *(tmp_path / "staging").iterdir()]


def test_a_new_volume_is_private_sparse_and_zero(volumes: Volumes) -> None:
    volume = asyncio.run(volumes.create("v", 8 * MIB))
    path = volumes.path(volume.uuid)
    status = path.stat()
    assert (volume.name, volume.size, volume.state, volume.machine) == ("v", 8 * MIB, "ready", None)
    assert status.st_mode & 0o777 == 0o600 and status.st_size == 8 * MIB and status.st_blocks * 512 < MIB
    assert path.read_bytes() == bytes(8 * MIB)
    assert path.parent.stat().st_mode & 0o777 == 0o711


def test_names_are_taken_once_and_deletion_frees_them(volumes: Volumes) -> None:
    async def life() -> None:
        await volumes.create("v", MIB)
        with pytest.raises(Conflict, match="already a volume 'v'"):
            await volumes.create("v", MIB)
        await volumes.delete("v")
        assert await volumes.list_all() == []
        with pytest.raises(NotFound):
            await volumes.delete("v")
        await volumes.create("v", MIB)

    asyncio.run(life())


def test_no_more_is_promised_than_there_is(volumes: Volumes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = list(os.statvfs(tmp_path))
    status[1], status[2] = 1 << 20, 100  # a file system of 100 MiB
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result(status))

    async def fill() -> None:
        await volumes.create("a", 60 * MIB)
        with pytest.raises(Unavailable, match=f"{40 * MIB} bytes are wanted, {30 * MIB} are left of {90 * MIB}"):
            await volumes.create("b", 40 * MIB)
        with pytest.raises(Unavailable, match="not enough disk space"):
            await volumes.upload("b", "raw", 31 * MIB, None, pieces(b""))
        await volumes.create("b", 30 * MIB)

    asyncio.run(fill())


@pytest.mark.parametrize("state", ["creating", "deleting"])
def test_what_a_crash_interrupted_is_undone(volumes: Volumes, database: Database, tmp_path: Path, state: str) -> None:
    async def crash_and_start_again() -> None:
        await volumes.create("whole", MIB)
        half = await volumes.create("half", MIB)
        await database.run(lambda connection: store.set_state(connection, half.uuid, state))
        (tmp_path / "staging/upload").write_bytes(b"x")
        (tmp_path / "volumes/0e0d6c3a-1111-4222-8333-444455556666.raw").write_bytes(b"x")
        await volumes.recover()
        assert [volume.name for volume in await volumes.list_all()] == ["whole"]

    asyncio.run(crash_and_start_again())
    assert len(leftovers(tmp_path)) == 1


def test_a_file_that_cannot_be_made_leaves_no_row(volumes: Volumes, tmp_path: Path) -> None:
    (tmp_path / "volumes").rmdir()
    (tmp_path / "volumes").write_bytes(b"")

    async def fail() -> None:
        with pytest.raises((Unavailable, OSError)):
            await volumes.create("v", MIB)

    asyncio.run(fail())


def test_qcow2_becomes_raw(volumes: Volumes, tmp_path: Path) -> None:
    source = image(tmp_path, marker=b"\x5a")
    content = upload(volumes, source.read_bytes())
    assert content == bytes(MIB) + b"\x5a" * 65536 + bytes(2 * MIB - 65536)
    status = next((tmp_path / "volumes").iterdir()).stat()
    assert status.st_mode & 0o777 == 0o600 and status.st_gid == os.getegid() and status.st_blocks * 512 < MIB
    assert list((tmp_path / "staging").iterdir()) == []


def test_compressed_and_old_images_are_taken(volumes: Volumes, tmp_path: Path) -> None:
    source, packed = image(tmp_path, "-o", "compat=0.10", marker=b"\x77"), tmp_path / "packed.qcow2"
    run(["qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", source, packed])
    assert upload(volumes, packed.read_bytes())[MIB : MIB + 65536] == b"\x77" * 65536


def test_a_volume_may_be_larger_than_its_image(volumes: Volumes, tmp_path: Path) -> None:
    content = upload(volumes, image(tmp_path, marker=b"\x5a").read_bytes(), size=5 * MIB)
    assert len(content) == 5 * MIB and content[3 * MIB :] == bytes(2 * MIB)


def test_a_volume_may_not_be_smaller_than_its_image(volumes: Volumes, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="size: 1048576 bytes do not hold the image's disk of 3145728"):
        upload(volumes, image(tmp_path).read_bytes(), size=MIB)


def test_raw_images_are_never_probed(volumes: Volumes, tmp_path: Path) -> None:
    """A guest could write this header into its disk; read as qcow2 it would hand out /etc/passwd."""
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", tmp_path / "evil", "3M"])
    evil = (tmp_path / "evil").read_bytes()
    content = upload(volumes, evil, format="raw")
    assert content.rstrip(b"\0") == evil.rstrip(b"\0") and len(content) == MIB


def _backed(tmp_path: Path) -> bytes:
    return image(tmp_path, "-u", "-b", "/etc/passwd", "-F", "raw").read_bytes()


def _json_backed(tmp_path: Path) -> bytes:
    backing = json.dumps({"driver": "raw", "file": {"driver": "file", "filename": "/etc/passwd"}})
    return image(tmp_path, "-u", "-b", "json:" + backing, "-F", "raw").read_bytes()


def _data_file(tmp_path: Path) -> bytes:
    return image(tmp_path, "-o", f"data_file={tmp_path / 'data'}").read_bytes()


def _data_file_without_its_bit(tmp_path: Path) -> bytes:
    """The name is there, but the header does not say that it counts."""
    path = image(tmp_path, "-o", f"data_file={tmp_path / 'data'},data_file_raw=on")
    return patched(path, 72, bytes(8))


def _snapshot(tmp_path: Path) -> bytes:
    path = image(tmp_path)
    run(["qemu-img", "snapshot", "-c", "s", path])
    return path.read_bytes()


def _huge(tmp_path: Path) -> bytes:
    return patched(image(tmp_path), 24, struct.pack(">Q", 8 << 60))


def _truncated(tmp_path: Path) -> bytes:
    path = image(tmp_path, marker=b"\x5a")
    return path.read_bytes()[:70000]


REFUSED: list[tuple[Callable[[Path], bytes], str]] = [
    (_backed, "backing file"),
    (_json_backed, "backing file"),
    (_data_file, "another file"),
    (_data_file_without_its_bit, "cannot be read|external data file"),
    (lambda path: patched(image(path), 32, b"\0\0\0\x02"), "encrypted"),
    (_snapshot, "snapshots"),
    (_huge, "bytes; 1 to"),
    (_truncated, "damaged or incomplete"),
    (lambda _: bytes(MIB), "not in the format qcow2"),
    (lambda path: image(path).read_bytes()[:50], "within its header"),
    (lambda path: patched(image(path), 4, b"\0\0\0\x04"), "version 4"),
    (lambda path: patched(image(path), 20, b"\0\0\0\x30"), "clusters of"),
    (lambda path: patched(image(path), 72, b"\0\0\0\0\0\0\0\x02"), "corrupt"),
    (lambda path: patched(image(path), 72, b"\x80\0\0\0\0\0\0\0"), "unknown features"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_hostile_images_are_refused(
    volumes: Volumes, tmp_path: Path, make: Callable[[Path], bytes], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        upload(volumes, make(tmp_path))
    assert refused.value.code == ImageRefused.code
    assert asyncio.run(volumes.list_all()) == [] and leftovers(tmp_path) == []


def test_an_upload_that_breaks_off_leaves_nothing(volumes: Volumes, tmp_path: Path) -> None:
    for announced, sent, reason in ((10, b"x" * 9, "ended after 9 of 10"), (10, b"x" * 11, "longer than the 10")):
        with pytest.raises(UserError, match=reason):
            asyncio.run(volumes.upload("v", "raw", announced, None, pieces(sent)))
    assert leftovers(tmp_path) == []


def test_without_a_converter_nothing_is_imported(tmp_path: Path, database: Database) -> None:
    volumes = Volumes(database, tmp_path, ConfinedImporter(tmp_path / "nobody.sock"))
    asyncio.run(volumes.recover())
    with pytest.raises(Unavailable, match="converter does not answer"):
        upload(volumes, bytes(MIB), format="raw")
    assert leftovers(tmp_path) == []


def test_a_converter_that_dies_is_reported(tmp_path: Path, database: Database) -> None:
    path = tmp_path / "import.sock"
    volumes = Volumes(database, tmp_path, ConfinedImporter(path))

    async def convert() -> None:
        server = await asyncio.start_unix_server(lambda _, writer: writer.close(), path)
        await volumes.recover()
        with pytest.raises(UserError, match="too much memory, time or space"):
            await volumes.upload("v", "raw", MIB, None, pieces(bytes(MIB)))
        server.close()

    asyncio.run(convert())


def _execute(connection: sqlite3.Connection, statement: str) -> None:
    connection.execute(statement)


def test_the_database_keeps_its_rules(database: Database) -> None:
    async def check() -> None:
        for statement in (
            "INSERT INTO volumes VALUES ('1', 'v', 'big', 'ready', 'now')",
            "INSERT INTO volumes VALUES ('1', 'v', 1, 'lost', 'now')",
            "INSERT INTO disks VALUES ('no machine', 0, 'no volume')",
        ):
            with pytest.raises(sqlite3.IntegrityError):
                await database.run(partial(_execute, statement=statement))
        pragmas = await database.run(
            lambda c: [c.execute(f"PRAGMA {p}").fetchone()[0] for p in ("journal_mode", "synchronous", "foreign_keys")]
        )
        assert pragmas == ["wal", 2, 1]

    asyncio.run(check())


def test_a_newer_database_is_not_touched(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "core.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match=f"version 99, this release knows {VERSION}"):
        Database(tmp_path / "core.db")
