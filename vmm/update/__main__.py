"""The update daemon: ``python3 -m vmm.update``."""

from __future__ import annotations

from vmm.errors import main
from vmm.update.daemon import run

main(run)
