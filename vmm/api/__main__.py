"""The API daemon: ``python3 -m vmm.api``."""

from __future__ import annotations

from vmm.api.daemon import run
from vmm.errors import main

main(run)
