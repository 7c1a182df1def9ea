"""The build: one that is killed poisons nothing, and equal sources build equal bits."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from pathlib import Path

import vmm
from tests.harness import releases
from tests.harness.image import Image
from vmm.process import run

_NAME = "interrupted"
_BUILD = f"from tests.harness import releases; releases.build({_NAME!r}, {vmm.VERSION!r})"
_LONGEST_S = 20.0
"""A little longer than a build takes whose packages are there already."""


def test_a_killed_build_leaves_nothing_that_changes_the_next(built_image: Image) -> None:
    """Killed at random moments and run again, in another folder, it makes what `make image` made, bit for bit."""
    shutil.rmtree(releases.FOLDER / _NAME, ignore_errors=True)
    for _ in range(2):
        seconds = random.SystemRandom().uniform(1, _LONGEST_S)
        # Given KILL, timeout(1) kills its whole group, itself included.
        command = ["timeout", "--signal=KILL", f"{seconds:.2f}", sys.executable, "-c", _BUILD]
        print(f"killed after {seconds:.2f} s: exit code {run(command, check=False).returncode}")
    again = releases.build(_NAME, vmm.VERSION)
    assert _bits(again.folder) == _bits(built_image.build / "image/release")


def _bits(release: Path) -> dict[str, str]:
    """What a release holds. Of the UKI, whose signature tells the time, it is the PCR 11 that all its parts give."""
    manifest: dict[str, str] = json.loads((release / "manifest.json").read_text())
    del manifest["uki_sha256"]
    files = {path.name: path for path in release.glob("*.raw")}
    assert {"root.raw", "verity.raw", "signature.raw"} == set(files) and manifest["pcr11"]
    return manifest | {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
