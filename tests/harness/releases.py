"""Further releases of the image for tests of updates, and the repository that offers them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from image.builder.assemble import build_image
from image.builder.layout import Layout

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
    there = replace(layout, repository=copy, version=version, epoch=epoch)
    if keys is not None:
        there = replace(there, keys=keys.absolute(), release=release)
    there.build.mkdir(exist_ok=True)
    for shared in ("mkosi.cache", "mkosi.packages", "tools"):
        link = there.build / shared
        if not link.is_symlink():
            link.symlink_to(layout.build / shared)
    build_image(there)
    return Built(version, there.release_folder, there.build)
