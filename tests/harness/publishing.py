"""A repository of releases for a host under test, published by our own command as an operator would."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from image.builder.layout import Layout
from vmm.process import run


class Publisher:
    """A repository in ``folder``, begun anew, signed by the development keys."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._do("init")

    def publish(self, release: Path, *options: str) -> None:
        """Offer a built release. Raises: CommandFailed as `holdfast-release publish` refuses."""
        self._do("publish", str(release), *options)

    def whole_size(self, version: str) -> int:
        """Bytes that a host fetches of a release of which it has nothing."""
        return sum(self._sizes(version, "").values())

    def delta_size(self, version: str, base: str) -> int:
        """Bytes that a host on the release ``base`` fetches: deltas where there are such, other parts whole."""
        return sum((self._sizes(version, "") | self._sizes(version, f".from-{base}")).values())

    def _sizes(self, version: str, kind: str) -> dict[str, int]:
        """Part → bytes, of the files HASH.PART.zst (``kind`` is empty) or HASH.PART.from-BASE.zst."""
        files = (self.folder / "targets" / f"holdfast_{version}").iterdir()
        names = [(file, file.name.split(".", 2)) for file in files]
        return {part: file.stat().st_size for file, (_, part, end) in names if f".{end}" in (f"{kind}.zst", ".json")}

    def copy(self, folder: Path) -> Path:
        """The repository as it is now, to be tampered with."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return folder

    def in_waves(self, folder: Path, version: str, *waves: str) -> Path:
        """A copy of the repository in which a release is for some hosts first: each wave is SHARE@TIME."""
        _release(self.copy(folder), "waves", version, *(word for wave in waves for word in ("--wave", wave)))
        return folder

    def _do(self, *words: str) -> None:
        _release(self.folder, *words)


def _release(folder: Path, *words: str) -> None:
    keys = Layout.from_environment().keys
    run([sys.executable, "-m", "signing", "--repository", folder, "--keys", keys, *words])
