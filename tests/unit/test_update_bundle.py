"""Bundles: what tar programs write is taken, what nobody honest writes is not."""

from __future__ import annotations

import io
import itertools
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.test_update_machine import Killed, Power
from tests.unit.test_update_rig import Repository
from vmm.update import files
from vmm.update.bundle import Unpacker, recover
from vmm.update.errors import NoRoom, Refused
from vmm.update.source import DirectorySource, read_all

LONG = f"targets/holdfast_1.2.0/{'0' * 96}.root.from-1.1.0.zst"


def tar(entries: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


GOOD = [("metadata/timestamp.json", b"{}"), ("metadata/1.root.json", b"x" * 512), (LONG, b"y" * 1000)]


def unpack(folder: Path, content: bytes, *, step: int = 700, free: Callable[[Path], int] = files.free) -> None:
    unpacker = Unpacker(folder, free)
    try:
        for start in range(0, len(content), step):
            unpacker.feed(content[start : start + step])
        unpacker.finish()
    finally:
        unpacker.abort()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("step", [1, 511, 512, 1 << 20])
def test_both_forms_in_any_pieces(tmp_path: Path, form: int, step: int) -> None:
    unpack(tmp_path / "bundle", tar(GOOD, form), step=step)
    for name, content in GOOD:
        assert (tmp_path / "bundle" / name).read_bytes() == content
    assert not (tmp_path / "bundle.new").exists()


def test_a_repository_with_folders(tmp_path: Path) -> None:
    repository = Repository(tmp_path / "repository")
    repository.add("1.1.0", base="1.0.0")
    repository.publish()
    for name in (".", "./metadata"):
        assert (repository.folder / name).is_dir()
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(repository.folder, ".")
    unpack(tmp_path / "bundle", out.getvalue(), step=1 << 20)
    source = DirectorySource(tmp_path / "bundle")
    assert read_all(source, "metadata/1.root.json", limit=10_000) == repository.root_json
    # The next takes its place as a whole.
    unpack(tmp_path / "bundle", tar(GOOD))
    assert sorted(p.name for p in (tmp_path / "bundle/metadata").iterdir()) == ["1.root.json", "timestamp.json"]


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.json",
        "metadata/../../x.json",
        "metadata/.json",
        "metadata/a/b.json",
        "metadata/x.txt",
        "targets/x",
        "targets/holdfast_1.2.0/root.zst",
        f"targets/../holdfast_1.2.0/{'0' * 96}.root.zst",
        "metadata/\u00e9.json",
        f"metadata/{'a' * 200}.json",
        "",
    ],
)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_names(tmp_path: Path, name: str, form: int) -> None:
    with pytest.raises(Refused, match="bundle: "):
        unpack(tmp_path / "bundle", tar([*GOOD, (name, b"x")], form))
    assert sorted(os.listdir(tmp_path)) == []


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE]
)
def test_only_regular_files(tmp_path: Path, kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("metadata/timestamp.json")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(Refused, match="no regular file"):
        unpack(tmp_path / "bundle", out.getvalue())


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """A tar header as somebody wants it, with a right checksum."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108], block[124 : 124 + len(size)], block[156:157] = b"0000600\0", size, kind
    block[257 : 257 + len(magic)] = magic
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"x" * 512,
        b"\x1f\x8b" + bytes(510),
        bytes(1024),
        tar(GOOD)[:1000],
        tar(GOOD)[:2100],
        tar([("metadata/1.root.json", b"{}")]),
        tar([*GOOD, GOOD[1]]),
        tar(GOOD) + tar(GOOD),
        header(b"metadata/timestamp.json", b"77777777777\0"),
        header(b"metadata/timestamp.json", b"\x80" + bytes(10) + b"\x01"),
        header(b"metadata/timestamp.json", b"-0000000001\0"),
        header(b"x", b"77777777777\0", b"L"),
        header(b"x", b"77777777777\0", b"x"),
        header(b"x", b"00000000000\0", b"x"),
        header(b"x", b"00000000100\0", b"g") + bytes(512),
        header(b"x", b"00000000024\0", b"x") + b"20 size=99999999999\n".ljust(512, b"\0"),
        header(b"x", b"00000000024\0", b"x") + b"99 path=metadata/x.json\n".ljust(512, b"\0"),
        header(b"x", b"00000000024\0", b"x") + bytes(512),
        header(b"metadata", b"00000001000\0", b"5"),
    ],
    ids=itertools.count(),
)
def test_hostile_tars(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(Refused, match="^bundle: "):
        unpack(tmp_path / "bundle", content)
    assert os.listdir(tmp_path) == []


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    good, chance = tar(GOOD), random.Random(1)
    for _ in range(300):
        content = bytearray(good)
        for _ in range(chance.randrange(1, 6)):
            content[chance.randrange(len(content))] = chance.randrange(256)
        try:
            unpack(tmp_path / "bundle", bytes(content), step=4096)
        except Refused:
            pass
        assert set(os.listdir(tmp_path)) <= {"bundle"}


def test_full_disk(tmp_path: Path) -> None:
    with pytest.raises(NoRoom, match="1000 bytes; 999 are free"):
        unpack(tmp_path / "bundle", tar(GOOD), free=lambda folder: files.RESERVE + 999)
    assert os.listdir(tmp_path) == []


def test_killed_at_any_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tar([("metadata/timestamp.json", b"old")])
    for after in range(100):
        unpack(tmp_path / "bundle", old)
        with monkeypatch.context() as patch:
            power = Power(after, patch, ("fsync", "replace"))
            try:
                unpacker = Unpacker(tmp_path / "bundle")
                unpacker.feed(tar(GOOD))
                unpacker.finish()
            except Killed:
                power.left = 1000
            else:
                break
        # The old one or the new one, never a part of one.
        recover(tmp_path / "bundle")
        found = [name for name, _ in GOOD if (tmp_path / "bundle" / name).exists()]
        assert len(found) in (1, 3)
        unpack(tmp_path / "bundle", tar(GOOD))
    assert after > 5
