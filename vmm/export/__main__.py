"""The export of the audit trail: ``python3 -m vmm.export``."""

from __future__ import annotations

from vmm.errors import main
from vmm.export.daemon import run

main(run)
