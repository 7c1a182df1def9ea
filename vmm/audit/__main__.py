"""The audit daemon: ``python3 -m vmm.audit``."""

from __future__ import annotations

from vmm.audit.server import run
from vmm.errors import main

main(run)
