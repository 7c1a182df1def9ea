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

    def withdraw(self, version: str) -> None:
        """Offer a release no more."""
        self._do("withdraw", version)

    def copy(self, folder: Path) -> Path:
        """The repository as it is now, to be tampered with."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return folder

    def _do(self, *words: str) -> None:
        keys = Layout.from_environment().keys
        run([sys.executable, "-m", "signing", "--repository", self.folder, "--keys", keys, *words])
