"""`python3 -m vmm.config`: the configure unit."""

from __future__ import annotations

import os
import socket

from vmm import errors
from vmm.audit.client import AuditClient
from vmm.config import apply


def main() -> None:
    """Apply the configuration. A wrong one is no failure of the unit: the host must come up to say so."""
    moved = "HOLDFAST_ROOT" in os.environ
    failure = apply.run(AuditClient().append_sync, (lambda name: None) if moved else socket.sethostname)
    if failure is not None:
        print(f"configuration: {failure.message} (from {failure.source or 'nowhere'})")


if __name__ == "__main__":
    errors.main(main)
