"""The guard: ``python3 -m vmm.guard``."""

from __future__ import annotations

from vmm.errors import main
from vmm.guard.daemon import run

main(run)
