"""A software TPM 2.0 (swtpm) for one machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.harness.guarded import Guarded
from vmm.process import run

_STATE_FILE = "tpm2-00.permall"


def create_state(directory: Path) -> None:
    """Manufacture a TPM in a new directory. Raises: UserError when swtpm_setup fails.

    Only the SHA-256 bank is on: every active bank makes the firmware hash the whole kernel image once more.
    """
    directory.mkdir(parents=True)
    run(["swtpm_setup", "--tpm2", "--tpmstate", directory.resolve(), "--pcr-banks", "sha256", "--overwrite"])


def copy_state(source: Path, target: Path) -> None:
    """Copy a stopped TPM's state (what it keeps without power) to a new directory."""
    target.mkdir(parents=True)
    shutil.copyfile(source / _STATE_FILE, target / _STATE_FILE)


class Tpm:
    """A running swtpm; it ends by itself when QEMU closes the connection."""

    def __init__(self, state: Path, control: Path, log: Path) -> None:
        # Absolute paths: swtpm changes its working directory.
        self._process = Guarded(
            ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state.resolve()}",
             "--ctrl", f"type=unixio,path={control.resolve()}", "--terminate"],
            log,
        )  # fmt: skip
        self._process.wait_ready(control.exists)

    def stop(self) -> None:
        """End it and release the lock on its state."""
        self._process.stop()
