"""What an update costs on the wire: a whole release, and the patch from the one before."""

from __future__ import annotations

from pathlib import Path

from tests.bench.figures import MIB, Figure
from tests.harness import releases
from tests.harness.publishing import Publisher

_GOAL = 0.15
_PATCH = "One package changed: every file of vmm/core. Metadata and the release's description are counted in."


def measure(running: Path, version: str) -> list[Figure]:
    """Publish the release in the folder ``running`` and a patch of it. Raises: what building and publishing raise."""

    def change(sources: Path) -> None:
        for file in sorted((sources / "vmm/core").glob("*.py")):
            file.write_text(f'{file.read_text()}\n_PATCHED = "{file.name}"\n')

    patch = releases.build("patch", "0.1.1", change=change)
    publisher = Publisher(releases.FOLDER / "measured")
    publisher.publish(running)
    publisher.publish(patch.folder)
    whole, delta = publisher.whole_size(patch.version), publisher.delta_size(patch.version, version)
    return [
        Figure("update on the wire", "whole release", whole / MIB, "MiB"),
        Figure("update on the wire", "patch release", delta / MIB, "MiB", note=_PATCH),
        Figure("update on the wire", "patch : whole", delta / whole, "×", _GOAL),
    ]
