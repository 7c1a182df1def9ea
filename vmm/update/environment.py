"""What the updater's jobs work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vmm.config.types import Update
from vmm.update.floor import Floor
from vmm.update.host import Running
from vmm.update.records import Recorder
from vmm.update.staging import Staging
from vmm.update.state import Store
from vmm.update.system import System
from vmm.update.types import Phase

How = Literal["reboot", "poweroff"]
Enter = Callable[[Phase], None]


@dataclass(frozen=True)
class Environment:
    """Everything the jobs work with; tests replace what they like.

    ``folder`` is the updater's own; ``root_metadata`` the image's TUF root; ``now`` the system clock in seconds;
    ``leave`` restarts the host or switches it off.
    """

    folder: Path
    running: Running
    system: System
    floor: Floor
    store: Store
    recorder: Recorder
    configuration: Callable[[], Update | None]
    root_metadata: Callable[[], bytes]
    now: Callable[[], float]
    leave: Callable[[How], None]

    @property
    def bundle(self) -> Path:
        """Where an imported repository lies."""
        return self.folder / "bundle"

    @property
    def ahead(self) -> Path:
        """Where the next initrd finds what else to seal the volumes to (holdfast-ahead@.service)."""
        return self.folder.parent / "sealed/ahead"

    @property
    def staging(self) -> Staging:
        """Where a release's parts wait to be written."""
        return Staging(self.folder / "staging")
