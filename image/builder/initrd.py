"""Makes the initrd: a handful of the root's own programs, the libraries they name, storage and TPM drivers.

What goes in stands in image/initrd/files and image/initrd/modules; our units lie in
image/initrd/rootfs. There is no shell; a failure ends in a reboot (emergency.target there).
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from image.builder.layout import SOURCE_DATE_EPOCH, Layout
from vmm.errors import die
from vmm.process import run

_NULL_CIPHER = "crypto_null."
"""The module of ciphers that encrypt nothing. The header of a volume is not authenticated: one that was changed on the
disk to name such a cipher would have the TPM open a genuine volume over content that anybody can write and read.
"""

_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/systemd", "usr/lib/systemd", "usr/lib")


def kernel_version(root: Path) -> str:
    """The version of the one kernel in the tree. Raises: UserError when there is not exactly one."""
    versions = [path.name for path in (root / "usr/lib/modules").iterdir()]
    if len(versions) != 1:
        die(f"the tree has {len(versions)} kernels ({' '.join(versions)}), not one")
    return versions[0]


def policy_key_id(public: Path) -> str:
    """The name by which hosts remember that their volumes are sealed to a policy key."""
    return hashlib.sha256(public.read_bytes()).hexdigest()[:32]


def make_initrd(layout: Layout, target: Path, policy_key: str) -> None:
    """Write the compressed initrd for a policy key. Raises: UserError naming a listed file that the root lacks."""
    tree = layout.build / "initrd"
    shutil.rmtree(tree, ignore_errors=True)
    source = layout.repository / "image/initrd"
    for link, place in (("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")):
        (tree / place).mkdir(parents=True)
        (tree / link).symlink_to(place)
    for folder in ("dev", "proc", "sys", "run", "tmp", "sysroot", "var", "etc"):
        (tree / folder).mkdir()
    for pattern in _listed(source / "files"):
        matches = sorted(layout.root.glob(pattern))
        if not matches:
            die(f"image/initrd/files: the root has no {pattern}")
        for match in matches:
            _copy_program(layout.root, match.relative_to(layout.root), tree)
    _copy_modules(layout.root, _listed(source / "modules"), tree)
    shutil.copytree(source / "rootfs", tree, symlinks=True, dirs_exist_ok=True)
    reseal = tree / "etc/systemd/system/holdfast-reseal@.service.d/key.conf"
    reseal.parent.mkdir(parents=True)
    sealed = f"/sysroot/var/lib/holdfast/sealed/{policy_key}.%i"
    reseal.write_text(f"[Unit]\nConditionPathExists=!{sealed}\n[Service]\nExecStart=/usr/bin/touch {sealed}\n")
    (tree / "init").symlink_to("usr/lib/systemd/systemd")
    archive = target.with_suffix(".cpio")
    write_cpio(tree, archive)
    run(["zstd", "--quiet", "--force", "-T0", "-19", archive, "-o", target])
    archive.unlink()


def _listed(file: Path) -> list[str]:
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    return [word for line in lines for word in line.split()]


def _copy_program(root: Path, path: Path, tree: Path) -> None:
    """Copy a file with the links it goes through and, of a program, all libraries."""
    target = tree / path
    if target.exists() or target.is_symlink():
        return
    source = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        points = Path(os.readlink(source))
        target.symlink_to(points)
        onward = points.relative_to("/") if points.is_absolute() else Path(os.path.normpath(path.parent / points))
        if (root / onward).exists():
            _copy_program(root, onward, tree)
        return
    if source.is_dir():
        for child in sorted(source.iterdir()):
            _copy_program(root, child.relative_to(root), tree)
        return
    shutil.copy2(source, target)
    for library in _needed(source):
        _copy_program(root, _find_library(root, library, path), tree)


def _needed(file: Path) -> Iterator[str]:
    with file.open("rb") as stream:
        if stream.read(4) != b"\x7fELF":
            return
        try:
            elf = ELFFile(stream)
            dynamic = elf.get_section_by_name(".dynamic")
            if dynamic:
                yield from (tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED")
        except ELFError as error:
            die(f"{file} is not a program: {error}")


def _find_library(root: Path, name: str, wanted_by: Path) -> Path:
    for folder in (*_LIBRARIES, "usr/lib64"):
        if (root / folder / name).exists():
            return Path(folder, name)
    return die(f"{wanted_by} needs {name}, which the root does not have")


def _copy_modules(root: Path, patterns: Iterable[str], tree: Path) -> None:
    """Copy modules with those they depend on, uncompressed: the archive as a whole packs them better."""
    base = Path("usr/lib/modules", kernel_version(root))
    depends = {}
    for line in (root / base / "modules.dep").read_text().splitlines():
        name, _, others = line.partition(":")
        depends[name] = others.split()
    wanted: set[str] = set()
    for pattern in patterns:
        found = [str(path.relative_to(root / base)) for path in (root / base / "kernel").glob(pattern)]
        files = [name for name in found if name in depends]
        if not files:
            die(f"image/initrd/modules: the kernel has no module {pattern}")
        for name in files:
            wanted |= {name, *depends[name]}
    known = [*wanted, *(root / base / "modules.builtin").read_text().split()]
    if any(Path(name).name.startswith(_NULL_CIPHER) for name in known):
        die("the initrd would have the null cipher, with which volumes can be forged")
    for name in sorted(wanted):
        target = tree / base / name.removesuffix(".xz")
        target.parent.mkdir(parents=True, exist_ok=True)
        data = (root / base / name).read_bytes()
        target.write_bytes(lzma.decompress(data) if name.endswith(".xz") else data)
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy2(root / base / name, tree / base / name)
    run(["depmod", "--basedir", tree, base.name])


def write_cpio(tree: Path, target: Path) -> None:
    """Write a tree as a "newc" archive (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

    Own code, 30 lines, because cpio(1) takes owners and times from the file system.
    """

    def entry(name: str, mode: int, data: bytes, number: int) -> bytes:
        raw = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, SOURCE_DATE_EPOCH, len(data), 0, 0, 0, 0, len(raw), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        return header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4)

    with target.open("wb") as archive:
        number = 0
        for path in sorted(tree.rglob("*")):
            number += 1
            status = path.lstat()
            if path.is_symlink():
                data = os.readlink(path).encode()
            else:
                data = path.read_bytes() if path.is_file() else b""
            archive.write(entry(str(path.relative_to(tree)), status.st_mode, data, number))
        archive.write(entry("TRAILER!!!", 0, b"", 0))


def make_microcode(root: Path, target: Path) -> None:
    """Write the early archive from which the kernel updates processors (must not be compressed).

    Intel's files repeat the same update under several names; each is taken once.
    """
    tree = target.with_suffix(".tree")
    shutil.rmtree(tree, ignore_errors=True)
    folder = tree / "kernel/x86/microcode"
    folder.mkdir(parents=True)
    updates: dict[bytes, None] = {}
    for file in sorted((root / "usr/lib/firmware/intel-ucode").iterdir()):
        data, start = file.read_bytes(), 0
        while start < len(data):
            # Intel SDM volume 3, "Microcode Update Facilities": total size at offset 32, zero means 2048.
            (size,) = struct.unpack_from("<I", data, start + 32)
            updates[data[start : start + (size or 2048)]] = None
            start += size or 2048
    (folder / "GenuineIntel.bin").write_bytes(b"".join(updates))
    amd = sorted((root / "usr/lib/firmware/amd-ucode").glob("*.bin"))
    (folder / "AuthenticAMD.bin").write_bytes(b"".join(file.read_bytes() for file in amd))
    write_cpio(tree, target)
    shutil.rmtree(tree)


def contents(layout: Layout) -> str:
    """What decides the initrd, as text to be hashed: the packages installed, and the files that it takes by name, of
    which the build makes some itself (etc/passwd has a line for each service).
    """
    packages = json.loads((layout.mkosi_output / "root.manifest").read_text())["packages"]
    text = sorted(f"{package['name']} {package['version']}" for package in packages)
    for pattern in _listed(layout.repository / "image/initrd/files"):
        for match in sorted(layout.root.glob(pattern)):
            for path in sorted(match.rglob("*")) if match.is_dir() and not match.is_symlink() else [match]:
                if path.is_symlink():
                    text.append(f"{path.relative_to(layout.root)} -> {os.readlink(path)}")
                elif path.is_file():
                    text.append(f"{path.relative_to(layout.root)} {hashlib.sha256(path.read_bytes()).hexdigest()}")
    return "\n".join(text)
