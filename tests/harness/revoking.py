"""Revocation by a running host's firmware: its dbx, signed with the development KEK, set through the test agent."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

from image.builder.layout import Layout
from signing.keys import KeySet
from tests.harness.agent import Agent
from vmm.process import run

_DBX = "/sys/firmware/efi/efivars/dbx-d719b2cb-3d3a-4596-a3bc-dad00e67656f"
_WRITE = """
import base64, fcntl, os, struct
path, content = argument[0], base64.b64decode(argument[1])
if os.path.exists(path):
    # Linux protects variables from slips of the hand (chattr +i).
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.ioctl(descriptor, 0x40086602, struct.pack("l", 0))
    os.close(descriptor)
descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
try:
    # Non-volatile, for boot and run time, and only with a signature that is newer than the last.
    os.write(descriptor, struct.pack("<I", 0x27) + content)
finally:
    os.close(descriptor)
"""


class Revocations:
    """The dbx of one host."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._keys = KeySet(Layout.from_environment().keys)
        self._day = 1

    def certificate(self, name: str) -> None:
        """Revoke everything that a key of the development set signs, and nothing else. Raises: AgentError."""
        self._set("cert-to-efi-sig-list", "-g", self._keys.owner, str(self._keys.certificate(name)))

    def file(self, program: Path) -> None:
        """Revoke one program by its hash, and nothing else. Raises: AgentError."""
        self._set("hash-to-efi-sig-list", str(program))

    def _set(self, *made_by: str) -> None:
        # Firmware wants the time to rise with each change.
        self._day += 1
        with tempfile.TemporaryDirectory() as folder:
            plain, signed = Path(folder, "dbx"), Path(folder, "dbx.auth")
            run([*made_by, plain])
            run(
                [
                    *("sign-efi-sig-list", "-t", f"2026-01-{self._day:02} 00:00:00", "-g", self._keys.owner),
                    *("-k", self._keys.key("KEK"), "-c", self._keys.certificate("KEK"), "dbx", plain, signed),
                ]
            )
            self._agent.python(_WRITE, [_DBX, base64.b64encode(signed.read_bytes()).decode()])
