"""The reader of the kernel's audit events: ``python3 -m vmm.kernel``."""

from __future__ import annotations

from vmm.errors import main
from vmm.kernel.daemon import run

main(run)
