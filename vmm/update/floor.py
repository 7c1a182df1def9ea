"""The highest epoch this host has blessed; nothing below it is taken or rolled back to.

It is kept outside of what TUF remembers, because who empties that memory could offer an old repository: in the TPM,
where it can only rise, and in a file, which counts when it is higher and stands alone on hosts without a TPM.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from vmm import atomic
from vmm.errors import Unavailable
from vmm.paths import ROOT
from vmm.tpm import ABSENT, DEVICE, UNWRITTEN, Tpm
from vmm.update.errors import Refused

LAYER = "epoch floor"
INDEX = "0x01800f10"
"""In the range that the TCG leaves to owners (Registry of Reserved TPM 2.0 Handles)."""
_MOST = 64
_ATTRIBUTES = "nt=bits|ownerread|ownerwrite|authread|authwrite|no_da"
_MOST_FILE = 32


class Floor(Protocol):
    """Where the epoch is kept. ``source`` is what status calls it."""

    @property
    def source(self) -> Literal["tpm", "file"]: ...

    def read(self) -> int:
        """The floor, 0 if there is none yet. Raises: Refused when it cannot be known."""
        ...

    def raise_to(self, epoch: int) -> None:
        """Raise it durably; never lowers it. Raises: Refused."""
        ...


class FileFloor:
    """In a file on the encrypted data volume."""

    source: Literal["tpm", "file"] = "file"

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> int:
        """See Floor."""
        try:
            with self._path.open("rb") as file:
                text = file.read(_MOST_FILE)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise Refused(LAYER, f"{self._path} cannot be read: {error.strerror}") from None
        if not text.strip().isdigit():
            raise Refused(LAYER, f"{self._path} holds no number")
        return int(text)

    def raise_to(self, epoch: int) -> None:
        """See Floor."""
        if epoch > self.read():
            atomic.write(self._path, b"%d\n" % epoch, mode=0o600)


class TpmFloor:
    """In 64 bits of the TPM's memory that can be set and never be cleared: epoch n sets the bits 0 to n-1.

    An ordinary counter would not do: it starts at whatever value the TPM likes, and has to be kept in step.
    """

    source: Literal["tpm", "file"] = "tpm"

    def __init__(self, tcti: str = f"device:/{DEVICE}") -> None:
        self._device = Tpm(tcti)

    def read(self) -> int:
        """See Floor."""
        with tempfile.TemporaryDirectory(prefix="holdfast-floor-") as folder:
            value = Path(folder) / "bits"
            if self._tpm("tpm2_nvread", "-C", "o", "-o", str(value), INDEX, missing=(*ABSENT, *UNWRITTEN)):
                return 0
            content = value.read_bytes()
        if len(content) != _MOST // 8:
            raise Refused(LAYER, f"the TPM's index {INDEX} holds {len(content)} bytes; it is not ours")
        return int.from_bytes(content).bit_length()

    def raise_to(self, epoch: int) -> None:
        """See Floor."""
        # Beyond the last bit the file alone counts on.
        epoch = min(epoch, _MOST)
        if epoch <= self.read():
            return
        if self._tpm("tpm2_nvreadpublic", INDEX, missing=ABSENT):
            self._tpm("tpm2_nvdefine", "-C", "o", "-s", str(_MOST // 8), "-a", _ATTRIBUTES, INDEX)
        self._tpm("tpm2_nvsetbits", "-C", "o", "-i", hex((1 << epoch) - 1), INDEX)

    def _tpm(self, *command: str, missing: Sequence[str] = ()) -> bool:
        """See Tpm.call. Raises: Refused."""
        try:
            return self._device.call(*command, missing=missing)
        except Unavailable as error:
            raise Refused(LAYER, error.message) from None


class Both:
    """The higher of two, raised together."""

    def __init__(self, first: Floor, second: Floor) -> None:
        """Arguments: ``first`` gives its name to the pair."""
        self._floors = (first, second)
        self.source: Literal["tpm", "file"] = first.source

    def read(self) -> int:
        """See Floor."""
        return max(floor.read() for floor in self._floors)

    def raise_to(self, epoch: int) -> None:
        """See Floor."""
        for floor in self._floors:
            floor.raise_to(epoch)


def open_floor(folder: Path, device: Path = ROOT / DEVICE) -> Floor:
    """The floor of this host. Arguments: ``folder`` is the updater's state, ``device`` the TPM's, if there is one."""
    file = FileFloor(folder / "floor")
    return Both(TpmFloor(f"device:{device}"), file) if device.exists() else file
