"""What an update costs on the wire: a whole release, and patches from the one before and the one before that."""

from __future__ import annotations

from pathlib import Path

from tests.bench.figures import MIB, Figure
from tests.harness import releases
from tests.harness.publishing import Publisher

_GOAL = 0.15
_PATCH = "Every file of vmm/core changed. Metadata and the release's description are counted in, here and below."
_PACKAGE = "All machine code of libssl3t64, which the initrd has too; no two versions of a package need be at hand."
_TWO = "Both changes, for a host that left out a release."

ALTER = """
import struct

LIBRARIES = ("libcrypto.so.3", "libssl.so.3")
for path in (ROOT / "usr/lib/x86_64-linux-gnu" / library for library in LIBRARIES):
    content = bytearray(path.read_bytes())
    # The ELF header's e_shoff, e_shentsize and e_shnum; of a section's header sh_type, sh_flags, sh_offset, sh_size.
    (table,) = struct.unpack_from("<Q", content, 0x28)
    width, count = struct.unpack_from("<HH", content, 0x3A)
    for start in range(table, table + width * count, width):
        kind, flags = struct.unpack_from("<IQ", content, start + 4)
        begin, size = struct.unpack_from("<QQ", content, start + 24)
        if kind == 1 and flags & 4:
            content[begin : begin + size] = bytes(byte ^ 0x55 for byte in content[begin : begin + size])
    path.write_bytes(content)
"""
"""For image/finalize: all machine code of one package becomes bytes that pack as well and that no host has."""


def measure(running: Path, version: str) -> list[Figure]:
    """Publish the release in the folder ``running`` and two after it. Raises: what building and publishing raise."""
    publisher = Publisher(releases.FOLDER / "measured")
    publisher.publish(running)
    patch = releases.build("patch", "0.1.1", change=_patch)
    publisher.publish(patch.folder)
    package = releases.build("package", "0.1.2", change=_package)
    publisher.publish(package.folder)
    whole = publisher.whole_size(package.version)
    return [
        Figure("update on the wire", "whole release", whole / MIB, "MiB"),
        *_delta("patch release", publisher.delta_size(patch.version, version), whole, _PATCH),
        *_delta("a package changed", publisher.delta_size(package.version, patch.version), whole, _PACKAGE),
        *_delta("both, from N-2", publisher.delta_size(package.version, version), whole, _TWO),
    ]


def _delta(name: str, size: int, whole: int, note: str) -> list[Figure]:
    return [
        Figure("update on the wire", name, size / MIB, "MiB", note=note),
        Figure("update on the wire", f"{name} : whole", size / whole, "×", _GOAL),
    ]


def _patch(sources: Path) -> None:
    for file in sorted((sources / "vmm/core").glob("*.py")):
        file.write_text(f'{file.read_text()}\n_PATCHED = "{file.name}"\n')


def _package(sources: Path) -> None:
    _patch(sources)
    with (sources / "image/finalize").open("a") as script:
        script.write(ALTER)
