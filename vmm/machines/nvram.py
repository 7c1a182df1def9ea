"""Each machine's own store of UEFI variables, kept beside its volumes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from uuid import UUID

from vmm import atomic
from vmm.hypervisor.domain import FIRMWARE_VARIABLES
from vmm.volumes import files


class Nvram:
    """The files of all machines, in ``directory``."""

    def __init__(self, directory: Path, template: Path = FIRMWARE_VARIABLES) -> None:
        self._directory = directory
        self._template = template

    def path(self, id: UUID) -> Path:
        """The file of one machine, whether it is there or not."""
        return self._directory / f"{id}.fd"

    def prepare(self, id: UUID) -> Path:
        """The file of one machine, made from the firmware's template at its first start. Raises: OSError."""
        path = self.path(id)
        if not path.exists():
            new = path.with_suffix(".new")
            with open(new, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
                file.write(self._template.read_bytes())
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
            atomic.sync_folder(self._directory)
        return path

    def remove(self, id: UUID) -> None:
        """Remove the file of one machine, if it has one."""
        files.remove(self.path(id))

    def keep_only(self, ids: Iterable[UUID]) -> None:
        """Remove what machines that are gone, or a crash, left behind. Makes the directory if needed."""
        files.make_directory(self._directory)
        kept = {self.path(id) for id in ids}
        for path in self._directory.iterdir():
            if path not in kept:
                files.remove(path)
