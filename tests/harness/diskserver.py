"""A disk that loses unflushed writes when the power goes (nbdkit)."""

from __future__ import annotations

from pathlib import Path

from tests.harness.guarded import Guarded


class DiskServer:
    """Serves a raw image file over NBD with a volatile write cache.

    kill() throws away what the guest has not flushed, as a power cut does; killing QEMU alone
    does not, because the kernel keeps its writes.
    """

    def __init__(self, image: Path, socket: Path, log: Path) -> None:
        self._process = Guarded(
            ["nbdkit", "--foreground", "--unix", socket, "--filter=cache", "file", image.resolve(), "cache=writeback"],
            log,
            # The cache is a deleted file here, next to the image: /tmp may be memory.
            env={"TMPDIR": str(image.resolve().parent)},
        )
        self._process.wait_ready(socket.exists)

    def kill(self) -> None:
        """Lose everything that was not flushed."""
        self._process.kill()

    def stop(self) -> None:
        """Write everything back and end."""
        self._process.stop(60)
