"""A set of release keys, made by the very commands of docs/key-ceremony.md."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vmm.process import run

_PAGE = Path(__file__).resolve().parents[2] / "docs/key-ceremony.md"


def make_release_keys(folder: Path) -> Path:
    """Run the ceremony in ``folder``, unless that was done; returns the key set. Raises: CommandFailed."""
    keys = folder / "release-keys"
    if not keys.exists():
        folder.mkdir(parents=True, exist_ok=True)
        blocks: list[str] = re.findall(r"^```sh\n(.*?)^```$", _PAGE.read_text(), re.MULTILINE | re.DOTALL)
        script = next(block for block in blocks if "openssl req" in block)
        run(["bash", "-eu", "-c", script], cwd=folder)
    if not (keys / "root.json").exists():
        run([sys.executable, "-m", "signing", "--keys", keys, "root"])
    return keys
