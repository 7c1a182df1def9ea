"""The recovery keys of the encrypted volumes: handed out once, then forgotten by the host."""

from __future__ import annotations

from pathlib import Path

from vmm import atomic
from vmm.errors import Conflict, NotFound, Unavailable
from vmm.paths import RECOVERY_KEYS

_NAMES = ("data", "audit")


class Recovery:
    """Keys lie in ``directory`` as NAME.key until they are fetched; the file ``fetched`` then says so."""

    def __init__(self, directory: Path = RECOVERY_KEYS) -> None:
        self._directory = directory

    def fetch(self) -> dict[str, str]:
        """Take the keys: name of the volume → key.

        Raises: Conflict when they were fetched before; NotFound when there never were any; Unavailable.
        """
        mark = self._directory / "fetched"
        files = {name: self._directory / f"{name}.key" for name in _NAMES}
        try:
            # A crash after the mark and before the removal left keys that nobody got: then they are still to be had.
            keys = {name: path.read_text(encoding="ascii").strip() for name, path in files.items() if path.exists()}
            empty = [name for name, key in keys.items() if not key]
            if empty:
                raise Unavailable(f"the recovery key of {' and '.join(empty)} is empty; it was not handed out")
            if not keys:
                if mark.exists():
                    raise Conflict(
                        "the recovery keys were already fetched",
                        hint="The host does not keep them; whoever fetched them is in the audit trail.",
                    )
                raise NotFound("this host has no recovery keys")
            atomic.write(mark, b"", mode=0o640)
            for path in files.values():
                path.unlink(missing_ok=True)
            atomic.sync_folder(self._directory)
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"the recovery keys cannot be read or removed: {error}") from None
        return keys
