"""What the updater does to the machine, in one place: partition table, ESP, and the programs that write and verify."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from mmap import mmap
from pathlib import Path
from typing import Literal, Protocol
from uuid import UUID

from vmm.config import devices, gpt
from vmm.config.devices import Device
from vmm.paths import ROOT
from vmm.process import CommandFailed, run
from vmm.update import base, esp, files, firmware, seals, signer, slots, trusted
from vmm.update.addition import Addition
from vmm.update.errors import Refused
from vmm.update.esp import BootEntry
from vmm.update.trusted import Foreseen

DEFINITIONS = ROOT / "usr/share/holdfast/sysupdate"
_SYSUPDATE = "/usr/lib/systemd/systemd-sysupdate"
_BLKFLSBUF = 0x1261
_UNFINISHED = ".#sysupdate"
_WRITE_TIMEOUT_S, _VERIFY_TIMEOUT_S = 1800.0, 1800.0

_ESP_TYPE = UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")

Definitions = Literal["slot", "uki"]


class System(Protocol):
    """The machine; tests have one made of files."""

    def table(self) -> gpt.Table:
        """The partition table of the disk that the running system is on. Raises: Refused; OSError."""
        ...

    def device(self, partition: gpt.Partition) -> Path:
        """The device of one of its partitions."""
        ...

    def entries(self) -> list[BootEntry]:
        """The UKIs on the ESP, newest first. Raises: OSError."""
        ...

    def esp_free(self) -> int:
        """Bytes free on the ESP. Raises: OSError."""
        ...

    def write(self, definitions: Definitions, version: str) -> None:
        """Have systemd-sysupdate put a version in place. Raises: CommandFailed."""
        ...

    def clear(self, definitions: Definitions) -> None:
        """Have systemd-sysupdate remove every version but the running one. Raises: CommandFailed."""
        ...

    def verify(self, data: Path, tree: Path, root_hash: str) -> None:
        """Check every block of a partition against a root hash. Raises: Refused."""
        ...

    def drop_caches(self, paths: Iterable[Path]) -> None:
        """Make the next reads come from the disk. Raises: OSError."""
        ...

    def check_signer(self, uki: Path) -> str:
        """Who vouches for a UKI to the firmware (signer.py). Raises: Refused."""
        ...

    def renew_seals(self) -> list[str]:
        """Take away what older policy keys could open (seals.py). Raises: Refused; CommandFailed."""
        ...

    def unsealed(self, pcr7: Iterable[bytes]) -> list[str]:
        """The volumes that would stay closed under one of these values of PCR 7 (seals.py). Raises: as renew_seals."""
        ...

    def make_room(self, coming: Sequence[bytes], former: Sequence[bytes]) -> None:
        """See that the volumes can be sealed to these values of PCR 7, too (seals.py).

        Arguments: ``former`` are all that a former change left possible; the others' seals go if PCR 7 is one of them.
        Raises: as renew_seals.
        """
        ...

    def foresee(self, uki: Path, addition: Addition | None) -> Foreseen | None:
        """What changes with a UKI, and a certificate added to db (trusted.py). Raises: Refused; CommandFailed."""
        ...

    def db(self) -> bytes:
        """What the firmware trusts, as it stores it. Raises: Refused."""
        ...

    def extend_db(self, addition: Addition) -> None:
        """Have the firmware trust a certificate more. Raises: OSError as the firmware refuses."""
        ...

    def base(self, part: str, size: int | None) -> AbstractContextManager[mmap]:
        """Opens a part of the running version (base.py)."""
        ...

    def sticks(self) -> list[Device]:
        """Partitions that may bring a bundle, on any disk but the system's, by name. Raises: Refused; OSError."""
        ...


class HostSystem:
    """The real machine."""

    def __init__(self, version: str, root: Path = ROOT) -> None:
        """Arguments: ``version`` of the running system; ``root`` is where /dev, /sys, /efi lie."""
        self._version = version
        self._root = root

    def table(self) -> gpt.Table:
        """See System."""
        with (self._root / "dev" / self._disk()).open("rb") as disk:
            return gpt.read(disk)

    def device(self, partition: gpt.Partition) -> Path:
        """See System."""
        for entry in (self._root / "sys/class/block" / self._disk()).resolve().iterdir():
            number = entry / "partition"
            if number.is_file() and int(number.read_text()) == partition.number:
                return self._root / "dev" / entry.name
        raise Refused("slots", f"the kernel does not know partition {partition.number}")

    def _disk(self) -> str:
        """The disk's name: that of what lies under the running root.

        Not by the partition's UUID, which a stick may have, too: udev lets the last that was plugged in win.
        """
        partitions = devices.below(self._root, "root")
        if not partitions:
            raise Refused("slots", "the running system's partition is not found: nothing lies under /dev/mapper/root")
        return (self._root / "sys/class/block" / partitions[0]).resolve().parent.name

    def mount_esp(self) -> None:
        """Mount the EFI system partition of the running system's disk, for this process and its children alone.

        Not by its label or UUID: a stick with an installation image has the same ones. Raises: Refused; CommandFailed.
        """
        if os.path.ismount(self._root / "efi"):
            return
        partition = next((p for p in self.table().partitions if p.type == _ESP_TYPE), None)
        if partition is None:
            raise Refused("slots", "the system disk has no EFI system partition")
        options = "umask=0077,nodev,nosuid,noexec"
        run(["mount", "-t", "vfat", "-o", options, self.device(partition), self._root / "efi"], timeout=60)

    def entries(self) -> list[BootEntry]:
        """See System."""
        return esp.entries(self._linux)

    @property
    def _linux(self) -> Path:
        return self._root / "efi/EFI/Linux"

    def esp_free(self) -> int:
        """See System."""
        return files.free(self._linux)

    def write(self, definitions: Definitions, version: str) -> None:
        """See System."""
        self._sysupdate(definitions, "update", version)

    def clear(self, definitions: Definitions) -> None:
        """See System."""
        if definitions == "uki":
            # What an interrupted run of systemd-sysupdate left is found by nobody else, and would fill the ESP.
            for path in self._linux.iterdir():
                if path.name.startswith(_UNFINISHED):
                    path.unlink()
        self._sysupdate(definitions, "--instances-max=1", "vacuum")

    def _sysupdate(self, definitions: Definitions, *words: str) -> None:
        # It checks nothing about local files (docs/updates.md): what it is given was verified, what it wrote will be.
        run([_SYSUPDATE, f"--definitions={DEFINITIONS / definitions}", "--no-pager", *words], timeout=_WRITE_TIMEOUT_S)

    def verify(self, data: Path, tree: Path, root_hash: str) -> None:
        """See System."""
        try:
            run(["veritysetup", "verify", data, tree, root_hash], timeout=_VERIFY_TIMEOUT_S)
        except CommandFailed as error:
            raise Refused(
                "read-back", f"{data} is not what root hash {root_hash[:16]}… says: {error.message}"
            ) from None

    def drop_caches(self, paths: Iterable[Path]) -> None:
        """See System."""
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if path.is_block_device():
                    fcntl.ioctl(descriptor, _BLKFLSBUF)
                else:
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)

    def check_signer(self, uki: Path) -> str:
        """See System."""
        return signer.check(uki, firmware.read(self._root / firmware.EFIVARS))

    def renew_seals(self) -> list[str]:
        """See System."""
        return seals.renew(trusted.pcr7(self._root), self._root)

    def unsealed(self, pcr7: Iterable[bytes]) -> list[str]:
        """See System."""
        return seals.unsealed(pcr7, self._root)

    def make_room(self, coming: Sequence[bytes], former: Sequence[bytes]) -> None:
        """See System."""
        proven = bool(former) and trusted.pcr7(self._root) in former
        seals.make_room(coming, (*coming, *former) if proven else (), self._root)

    def foresee(self, uki: Path, addition: Addition | None) -> Foreseen | None:
        """See System."""
        return trusted.foresee(self._root, self._base("uki")[0], uki, addition)

    def db(self) -> bytes:
        """See System."""
        return firmware.variable(self._root / firmware.EFIVARS / firmware.DB)

    def extend_db(self, addition: Addition) -> None:
        """See System."""
        trusted.extend(self._root / firmware.EFIVARS / firmware.DB, addition)

    @contextmanager
    def base(self, part: str, size: int | None) -> Iterator[mmap]:
        """See System."""
        path, known = self._base(part)
        with base.mapped(path, size if size is not None else known) as content:
            yield content

    def sticks(self) -> list[Device]:
        """See System."""
        system = self._disk()
        found = (
            device
            for device in devices.block_devices(self._root)
            if device.is_partition and device.partition_name == devices.UPDATE_PARTITION and device.disk != system
        )
        return sorted(found, key=lambda device: device.name)

    def _base(self, part: str) -> tuple[Path, int | None]:
        """Where a part of the running version lies, and its size as it says itself."""
        if part == "root":
            path = self._root / "dev/mapper/root"
            return path, base.erofs_size(path)
        if part == "uki":
            return next((e.path for e in self.entries() if e.version == self._version), Path("/nonexistent")), None
        system = slots.find(self.table(), self._version)
        if system is None or part != "verity":
            raise Refused("base", f"the running version has no part {part}")
        path = self.device(system.verity)
        return path, base.verity_size(path)
