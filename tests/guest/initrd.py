"""The Linux test guest's initial RAM disk: busybox, the kernel modules it needs, and an init script."""

from __future__ import annotations

import gzip
import lzma
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import UserError
from vmm.process import run

_MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "button", "evdev", "pvpanic-mmio")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One file of a cpio archive; a folder has a folder's mode and no content."""

    mode: int
    content: bytes = b""


def cpio(entries: Mapping[str, Entry]) -> bytes:
    """A "newc" archive as the kernel unpacks it, owned by root, with no time stamps."""
    archive = bytearray()
    for number, (name, entry) in enumerate([*sorted(entries.items()), ("TRAILER!!!", Entry(0))], start=1):
        raw_name = name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, 0, 0, len(raw_name), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + raw_name
        archive += b"\0" * (-len(archive) % 4)
        archive += entry.content
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def module_files(root: Path, version: str) -> list[Path]:
    """Files of the guest's kernel modules in the order in which they load; built-in ones have none.

    ``root`` is a tree that holds usr/lib/modules/VERSION with depmod's index.
    Raises: UserError when a module is unknown there.
    """
    files: list[Path] = []
    for module in _MODULES:
        # No configuration: a host's blacklist must not shape the guest.
        shown = run(
            ["modprobe", "--config", "/dev/null", "--dirname", root, "--set-version", version, "--show-depends", module]
        )
        for line in shown.stdout.splitlines():
            action, _, path = line.strip().partition(" ")
            if action == "insmod" and Path(path) not in files:
                files.append(Path(path.strip()))
    return files


def build_initrd(target: Path, root: Path, busybox: Path) -> str:
    """Write the compressed archive and return the version of the kernel that its modules fit.

    Raises: UserError when ``root`` does not hold exactly one kernel's modules, or busybox is missing.
    """
    versions = sorted(p.name for p in (root / "usr/lib/modules").glob("*") if (p / "modules.dep").exists())
    if len(versions) != 1:
        raise UserError(f"{root}/usr/lib/modules holds {len(versions)} kernels' modules instead of one")
    if not busybox.exists():
        raise UserError(f"{busybox} is missing", hint="install busybox-static")
    entries = {
        **{folder: Entry(stat.S_IFDIR | 0o755) for folder in ("bin", "modules")},
        "init": Entry(stat.S_IFREG | 0o755, (_HERE / "init.sh").read_bytes()),
        "bin/shell": Entry(stat.S_IFREG | 0o755, (_HERE / "shell.sh").read_bytes()),
        "bin/net": Entry(stat.S_IFREG | 0o755, (_HERE / "net.sh").read_bytes()),
        "bin/number": Entry(stat.S_IFREG | 0o755, (_HERE / "number.sh").read_bytes()),
        "bin/busybox": Entry(stat.S_IFREG | 0o755, busybox.read_bytes()),
    }
    order: list[str] = []
    for file in module_files(root, versions[0]):
        # busybox' insmod takes plain modules only.
        packed = file.suffix == ".xz"
        name = file.stem if packed else file.name
        content = lzma.decompress(file.read_bytes()) if packed else file.read_bytes()
        entries[f"modules/{name}"] = Entry(stat.S_IFREG | 0o644, content)
        order.append(name)
    entries["modules/order"] = Entry(stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode())
    target.write_bytes(gzip.compress(cpio(entries), compresslevel=6, mtime=0))
    return versions[0]
