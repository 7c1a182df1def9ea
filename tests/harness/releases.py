"""Further releases of the image for tests of updates."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from image.builder.assemble import build_image, make_uki, write_manifest
from image.builder.initrd import kernel_version, make_initrd, policy_key_id
from image.builder.layout import Layout
from image.builder.slot import make_slot
from signing.keys import KeySet

_SOURCES = ("mkosi.conf", "image", "vmm", "signing", "tests/harness/cmdline")
FOLDER = Path("build/test/releases")

Change = Callable[[Path], None]
"""Changes a copy of the sources, given its folder, before it is built."""


@dataclass(frozen=True)
class Built:
    """A release: its version, the folder that `holdfast-release publish` takes, and all that the build left."""

    version: str
    folder: Path
    build: Path


def build(
    name: str,
    version: str,
    *,
    change: Change | None = None,
    epoch: int = 1,
    keys: Path | None = None,
    release: bool = False,
) -> Built:
    """Build a release out of a copy of the sources, unless that was done before.

    Arguments: ``name`` is that of the folder in build/test/releases; ``keys`` are in place of the development
    keys, and must not be such for a ``release``. Raises: what build_image raises.
    """
    layout = Layout.from_environment()
    there = replace(layout, repository=_copy_sources(layout, name, change), version=version, epoch=epoch)
    if keys is not None:
        there = replace(there, keys=keys.absolute(), release=release)
    there.build.mkdir(exist_ok=True)
    for shared in ("mkosi.cache", "mkosi.packages", "tools"):
        link = there.build / shared
        if not link.is_symlink():
            link.symlink_to(layout.build / shared)
    build_image(there)
    return Built(version, there.release_folder, there.build)


def build_hollow(name: str, version: str, *, change: Change | None = None, keys: Path | None = None) -> Built:
    """Make a properly signed release with next to nothing in its root, out of parts of the built image; in seconds.

    Arguments: as for build(). Raises: what the steps of build_image raise.
    """
    layout = Layout.from_environment()
    there = replace(layout, repository=_copy_sources(layout, name, change), version=version)
    key_set = KeySet(keys or layout.keys)
    shutil.rmtree(there.build, ignore_errors=True)
    there.mkosi_output.mkdir(parents=True)
    there.root.symlink_to(layout.root)
    (there.mkosi_output / "vmlinuz").symlink_to(layout.mkosi_output / "vmlinuz")
    (there.build / "microcode.cpio").symlink_to(layout.build / "microcode.cpio")
    if change is None:
        (there.build / "initrd.zst").symlink_to(layout.build / "initrd.zst")
    else:
        make_initrd(there, there.build / "initrd.zst", policy_key_id(key_set.public("pcr")))
    there.root.unlink()
    (there.root / "usr/lib/modules" / kernel_version(layout.root)).mkdir(parents=True)
    stated = (layout.root / "usr/lib/os-release").read_text()
    # By this the boot loader sorts.
    renamed = re.sub(r"^IMAGE_VERSION=.*$", f'IMAGE_VERSION="{version}"', stated, flags=re.MULTILINE)
    (there.root / "usr/lib/os-release").write_text(renamed)
    slot = make_slot(there, key_set)
    make_uki(there, key_set, slot.root_hash, there.uki)
    (there.release_folder / "uki.efi").hardlink_to(there.uki)
    write_manifest(there, slot, key_set)
    return Built(version, there.release_folder, there.build)


def _copy_sources(layout: Layout, name: str, change: Change | None) -> Path:
    copy = FOLDER.absolute() / name / "sources"
    for source in _SOURCES:
        shutil.rmtree(copy / source, ignore_errors=True)
        target = copy / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (layout.repository / source).is_dir():
            shutil.copytree(
                layout.repository / source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy2(layout.repository / source, target)
    if change is not None:
        change(copy)
    return copy
