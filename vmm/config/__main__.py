"""`python3 -m vmm.config`: the configure unit."""

from __future__ import annotations

import os
import socket

from vmm import errors
from vmm.audit.client import AuditClient
from vmm.config import apply
from vmm.process import run


def _settle() -> None:
    run(["udevadm", "settle", "--timeout=60"], check=False)


def main() -> None:
    """Apply the configuration. A wrong one is no failure of the unit: the host must come up to say so."""
    audit = AuditClient()
    if "HOLDFAST_ROOT" in os.environ:
        failure = apply.run(audit.append_sync, lambda _name: None, audit.set_rule_sync)
    else:
        # The unit starts early, so that loading this program takes no time of its own; now it needs the others.
        audit.wait_sync(60)
        failure = apply.run(audit.append_sync, socket.sethostname, audit.set_rule_sync, _settle)
    if failure is not None:
        print(f"configuration: {failure.message} (from {failure.source or 'nowhere'})")


if __name__ == "__main__":
    errors.main(main)
