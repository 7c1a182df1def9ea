"""Runs the TPM's command line tools, the one way by which our services use it."""

from __future__ import annotations

from collections.abc import Sequence

from vmm.errors import Unavailable
from vmm.process import CommandFailed, run

DEVICE = "dev/tpmrm0"
"""Below the root: the kernel's resource manager, which keeps its users apart."""
# The answers of a TPM that has no such index, and of one that has it but nothing was written yet (TPM 2.0 part 2, 6.6).
ABSENT, UNWRITTEN = ("0x18b",), ("0x14a",)
_TIMEOUT_S = 30.0


class Tpm:
    """A TPM 2.0."""

    def __init__(self, tcti: str) -> None:
        """Arguments: ``tcti`` says where it is, as tpm2-tools have it: ``device:/dev/tpmrm0``."""
        self._environment = {"TPM2TOOLS_TCTI": tcti}

    def call(self, *command: str, missing: Sequence[str] = ()) -> bool:
        """Run a tool; whether it failed with one of the answers in ``missing``.

        Raises: Unavailable for all others; UserError if the tool is not there.
        """
        try:
            run(command, env=self._environment, timeout=_TIMEOUT_S)
        except CommandFailed as error:
            if any(code in error.output.lower() for code in missing):
                return True
            raise Unavailable(f"the TPM does not answer: {error.message}") from None
        return False
