"""``python3 -m tests.guest OUTDIR``: write linux.raw into OUTDIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.guest.linux import GuestSources, build_linux_disk
from vmm.errors import main


def entry() -> int:
    """Build the guest as the command line asks. Raises: UserError."""
    defaults = GuestSources()
    parser = argparse.ArgumentParser(prog="python3 -m tests.guest", description="Build the test guest's disk image.")
    parser.add_argument("directory", type=Path, help="where linux.raw goes")
    parser.add_argument("--kernel", type=Path, default=defaults.kernel, help="kernel image (default: %(default)s)")
    parser.add_argument("--root", type=Path, default=defaults.root, help="tree with its modules (default: %(default)s)")
    parser.add_argument("--busybox", type=Path, default=defaults.busybox, help="static busybox (default: %(default)s)")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    sources = GuestSources(kernel=options.kernel, root=options.root, busybox=options.busybox)
    build_linux_disk(options.directory / "linux.raw", sources)
    return 0


if __name__ == "__main__":
    main(entry)
