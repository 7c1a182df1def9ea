"""Packed parts and deltas are what a host can unpack with little memory, and small."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import zstandard

from signing import delta
from tests.unit.test_publish_rig import noise
from vmm.errors import UserError
from vmm.update.types import MAX_WINDOW

_SIZE = 20 << 20


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An old part of 20 MB and a new one, of which 1 % changed, in ten places, and a block was put in."""
    folder = tmp_path_factory.mktemp("delta")
    old = noise(7, _SIZE)
    new = bytearray(old)
    for place in range(10):
        start = place * (_SIZE // 10) + 12345
        new[start : start + _SIZE // 1000] = noise(place + 100, _SIZE // 1000)
    new[_SIZE // 2 : _SIZE // 2] = noise(200, 4096)
    (folder / "old").write_bytes(old)
    (folder / "new").write_bytes(new)
    return folder / "old", folder / "new"


def test_a_delta_is_small(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """1 % of change costs less than 2 % of the part; whole it would not compress at all."""
    old, new = parts
    assert delta.make_delta(old, new, tmp_path / "delta")
    assert (tmp_path / "delta").stat().st_size < _SIZE * 0.02


def test_a_host_unpacks_a_delta_as_a_stream(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """With python-zstandard, block by block, within the window; only the old part is in memory."""
    old, new = parts
    delta.make_delta(old, new, tmp_path / "delta")
    frame = zstandard.get_frame_parameters((tmp_path / "delta").read_bytes()[:18])
    assert frame.content_size == new.stat().st_size
    assert frame.window_size <= MAX_WINDOW
    assert frame.has_checksum
    dictionary = zstandard.ZstdCompressionDict(old.read_bytes(), dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    decompressor = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=MAX_WINDOW)
    state = hashlib.sha384()
    with (tmp_path / "delta").open("rb") as file, decompressor.stream_reader(file, read_size=4096) as reader:
        while block := reader.read(65536):
            state.update(block)
    assert state.digest() == hashlib.sha384(new.read_bytes()).digest()
    assert delta.unpack(tmp_path / "delta", tmp_path / "plain", old=old) == delta.measure(new)
    assert (tmp_path / "plain").read_bytes() == new.read_bytes()


def test_a_delta_from_another_part_is_found_out(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """By the checksum in the frame, before any hash."""
    old, new = parts
    delta.make_delta(old, new, tmp_path / "delta")
    with pytest.raises(UserError, match="cannot be unpacked"):
        delta.unpack(tmp_path / "delta", old=new)


def test_packing(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """Whole parts need a small window, whatever their size."""
    new = parts[1]
    delta.pack(new, tmp_path / "packed")
    assert delta.unpack(tmp_path / "packed") == delta.measure(new)
    assert zstandard.get_frame_parameters((tmp_path / "packed").read_bytes()[:18]).window_size <= 8 << 20


def test_damage_is_named(tmp_path: Path) -> None:
    """A flipped bit is a UserError with the file's name."""
    (tmp_path / "plain").write_bytes(noise(1))
    delta.pack(tmp_path / "plain", tmp_path / "packed")
    data = bytearray((tmp_path / "packed").read_bytes())
    data[1000] ^= 1
    (tmp_path / "packed").write_bytes(data)
    with pytest.raises(UserError, match="packed cannot be unpacked"):
        delta.unpack(tmp_path / "packed")


def test_parts_over_the_window_get_no_delta(tmp_path: Path) -> None:
    """A host could not unpack it."""
    for name, size in (("old", 1), ("new", MAX_WINDOW + 1)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert not delta.make_delta(tmp_path / "old", tmp_path / "new", tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_frames_over_the_window_are_refused(tmp_path: Path) -> None:
    """A header that asks for twice the window, and one byte of content (RFC 8878, 3.1.1)."""
    exponent = MAX_WINDOW.bit_length() - 10
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, exponent << 3]) + b"\x09\0\0x"
    (tmp_path / "packed").write_bytes(frame)
    assert zstandard.get_frame_parameters(frame).window_size == 2 * MAX_WINDOW
    with pytest.raises(UserError, match="too much memory"):
        delta.unpack(tmp_path / "packed")
