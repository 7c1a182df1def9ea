"""How long `make image` takes, in a copy of the sources so that the build in use stays as it is."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace

from image.builder.assemble import build_image
from image.builder.layout import Layout
from tests.bench.figures import Figure
from vmm.process import run

_SOURCES = ("mkosi.conf", "image", "vmm", "signing", "tests/harness")
_COLD = "Without making the tools tree and without downloads: both depend on the mirror."


def measure(layout: Layout) -> list[Figure]:
    """Build from nothing, after a change of one file of the host software, and after none.

    Raises: what build_image raises.
    """
    copy = layout.build / "bench/build"
    shutil.rmtree(copy, ignore_errors=True)
    for name in _SOURCES:
        source, target = layout.repository / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, target)
    there = replace(layout, repository=copy)
    there.build.mkdir()
    there.tools.symlink_to(layout.tools)
    run(["cp", "-al", layout.build / "mkosi.packages", there.build / "mkosi.packages"])
    figures = [Figure("build", "cold", _timed(there), "s", note=_COLD)]
    with (copy / "vmm/__init__.py").open("a") as file:
        file.write("# A change.\n")
    figures.append(Figure("build", "warm, one file of vmm/ changed", _timed(there), "s"))
    figures.append(Figure("build", "warm, nothing changed", _timed(there), "s"))
    shutil.rmtree(copy)
    return figures


def _timed(layout: Layout) -> float:
    start = time.monotonic()
    build_image(layout)
    return time.monotonic() - start
