"""The configuration in force, as far as core needs it. The configure service has checked it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from vmm.config.types import Administrator, Configuration
from vmm.errors import Unavailable
from vmm.paths import APPLIED_CONFIG

_Stamp = tuple[int, int, int]


class AppliedConfiguration:
    """Reads the document anew whenever the file was replaced."""

    def __init__(self, path: Path = APPLIED_CONFIG) -> None:
        self._path = path
        self._stamp: _Stamp | None = None
        self._document: Configuration | None = None
        self._administrators: dict[str, Administrator] = {}

    def document(self) -> Configuration:
        """The whole document. Raises: Unavailable when there is none that can be read."""
        try:
            status = self._path.stat()
            stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
            if self._document is None or stamp != self._stamp:
                document = msgspec.json.decode(self._path.read_bytes(), type=Configuration)
                self._administrators = {person.fingerprint: person for person in document.administrators}
                self._document, self._stamp = document, stamp
        except FileNotFoundError:
            raise Unavailable("the host has no configuration in force", hint="Its console says why.") from None
        # Text that is no UTF-8 has an error of its own.
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self._path} cannot be read: {error}", hint="Its console says why.") from None
        return self._document

    def administrators(self) -> Mapping[str, Administrator]:
        """Fingerprint of the certificate → whose it is. Raises: Unavailable."""
        self.document()
        return self._administrators

    def networks(self) -> dict[str, str]:
        """The operational networks: name → bridge. Raises: Unavailable."""
        return {network.name: network.bridge for network in self.document().operational}
