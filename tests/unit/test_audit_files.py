"""What the file system does for segments: the room that they are promised, and fs-verity when they end."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_audit_retention import firsts, open_store, put, small
from vmm.audit import files, verify
from vmm.audit import store as store_module

__all__ = ["small"]

pytestmark = pytest.mark.sfr("FAU_STG.1")


def test_a_segment_has_its_room_from_the_start_and_gives_back_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 1 << 20)
    store = open_store(tmp_path)
    put(store, 3)
    (file,) = verify.segments(tmp_path)
    if file.stat().st_blocks * 512 < 1 << 20:
        pytest.skip("the file system promises nothing")
    store.close()
    store = open_store(tmp_path)
    assert file.stat().st_size < 10_000 and file.stat().st_blocks * 512 >= 1 << 20
    store._start_segment()
    assert file.stat().st_blocks * 512 < 100_000 and file.stat().st_mode & 0o777 == 0o400


class Kernel:
    """Stands in for ioctl: files that were put under fs-verity, and what it says to the next."""

    def __init__(self) -> None:
        self.protected: list[int] = []
        self.error = 0

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> bytes:
        inode = os.fstat(descriptor).st_ino
        if request == files._GETFLAGS:
            return (files._VERITY_FLAG * (inode in self.protected)).to_bytes(8, "little")
        if request != files._ENABLE_VERITY:
            return argument
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        # linux/fsverity.h: version, algorithm, block size.
        assert argument[:12] == b"\1\0\0\0\1\0\0\0\0\x10\0\0" and len(argument) == 128 and not any(argument[12:])
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert os.fstat(descriptor).st_mode & 0o777 == 0o600
        self.protected.append(inode)
        return argument


def test_sealed_segments_are_put_under_fs_verity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    store = open_store(tmp_path)
    put(store, 30)
    *sealed, active = verify.segments(tmp_path)
    assert store.segments.protected == 0
    store.segments.protect()
    assert kernel.protected == [file.stat().st_ino for file in sealed] and store.segments.unprotected == ""
    assert {file.stat().st_mode & 0o777 for file in sealed} == {0o400} and active.stat().st_mode & 0o777 == 0o600
    # Those that a kill left out, or an older release, are made up for; none is done twice.
    store.close()
    del kernel.protected[1]
    store = open_store(tmp_path)
    store.segments.protect()
    assert len(kernel.protected) == len(set(kernel.protected)) == len(sealed) == store.segments.protected
    assert store.purge(firsts(tmp_path)[2], "") and store.segments.protected == len(sealed) - 2


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.EOPNOTSUPP, "the file system has no fs-verity"),
        (errno.ENOTTY, "the file system has no fs-verity"),
        (errno.ETXTBSY, "Text file busy"),
        (errno.EACCES, "Permission denied"),
    ],
)
def test_without_fs_verity_all_else_works(
    number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel()
    kernel.error = number
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    store = open_store(tmp_path)
    put(store, 20)
    store.segments.protect()
    assert says in store.segments.unprotected and store.segments.protected == 0
    assert {file.stat().st_mode & 0o777 for file in verify.segments(tmp_path)[:-1]} == {0o400}
    put(store, 20)
    kernel.error = 0
    store.segments.protect()
    assert store.segments.unprotected == "" and store.segments.protected == len(firsts(tmp_path)) - 1


def test_the_file_system_at_hand_does_what_it_can(tmp_path: Path) -> None:
    """Whatever the kernel that runs this says, nothing fails."""
    store = open_store(tmp_path)
    put(store, 20)
    store.segments.protect()
    assert bool(store.segments.unprotected) != (store.segments.protected == len(store.segments) - 1)
    if store.segments.protected:
        for change in (lambda p: p.open("ab"), lambda p: p.open("r+b"), lambda p: os.truncate(p, 0)):
            with pytest.raises(PermissionError):
                _as_root(change, verify.segments(tmp_path)[0])


def _as_root(change: Callable[[Path], Any], path: Path) -> None:
    path.chmod(0o600)
    change(path)
