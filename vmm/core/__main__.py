"""`python3 -m vmm.core`"""

from __future__ import annotations

import asyncio
import os

from vmm.core.daemon import serve
from vmm.errors import main


def run() -> None:
    """Serve until told to stop."""
    os.umask(0o077)
    asyncio.run(serve())


main(run)
