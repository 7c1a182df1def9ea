"""What `make image` left behind, and the copy of it that carries the test extension."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from image.builder.efidisk import FatPartition, find_esp
from vmm.errors import UserError
from vmm.process import run


@dataclass(frozen=True)
class Image:
    """The built image under a build folder. Only the checked constructor ``built`` makes one."""

    build: Path
    version: str
    root_hash: str

    @classmethod
    def built(cls, build: Path = Path("build")) -> Image:
        """Read the manifest. Raises: UserError when the image was not built."""
        raw, manifest = build / "image/holdfast.raw", build / "image/manifest.json"
        for needed in (raw, manifest):
            if not needed.exists():
                raise UserError(f"{needed} is missing", hint="run make image")
        facts = json.loads(manifest.read_text())
        return cls(build, facts["version"], facts["root_hash"])

    @property
    def disk(self) -> Path:
        """The release disk image, raw."""
        return self.build / "image/holdfast.raw"

    @property
    def test_addon(self) -> Path:
        """The signed addon that lets credentials in and so enables command execution."""
        return self.build / "test/test.addon.efi"

    @property
    def test_db(self) -> Path:
        """Secure Boot's db with the test extension's key added, signed by KEK."""
        return self.build / "test/db.auth"

    def identity(self) -> str:
        """A hash that changes whenever the image or the test extension was built anew."""
        digest = hashlib.sha256()
        for path in (self.disk, self.test_addon, self.test_db):
            if not path.exists():
                raise UserError(f"{path} is missing", hint="run make image")
            # Reading gigabytes each time would take longer than restoring a checkpoint.
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode())
        return digest.hexdigest()

    def write_test_disk(self, target: Path) -> None:
        """Copy the image and add the test extension to its ESP; the system itself stays the release.

        Raises: UserError when a file is missing.
        """
        self.identity()
        # The copy keeps holes; shutil's would fill them.
        run(["cp", "--sparse=always", "--reflink=auto", self.disk, target])
        try:
            esp = find_esp(target)
            # For every version, as hosts under test are updated too (systemd-stub(7), global addons).
            esp.put(self.test_addon, "loader/addons/test.addon.efi")
            esp.put(self.test_db, "loader/keys/auto/db.auth")
        except UserError:
            target.unlink()
            raise


@dataclass(frozen=True)
class Files:
    """One machine's state on disk: disk, UEFI variables and TPM, and the memory it continues from, if any."""

    directory: Path
    memory: Path | None = None

    @property
    def disk(self) -> Path:
        """The system disk, qcow2."""
        return self.directory / "disk.qcow2"

    @property
    def flat_disk(self) -> Path:
        """The system disk of a host with a faulty disk: raw, taking the place of ``disk``."""
        return self.directory / "disk.raw"

    @property
    def variables(self) -> Path:
        """The UEFI variable store, qcow2."""
        return self.directory / "variables.qcow2"

    @property
    def tpm(self) -> Path:
        """The folder with the TPM's state."""
        return self.directory / "tpm"

    def discard(self) -> None:
        """Delete the state; logs in the same folder stay."""
        for path in (self.disk, self.flat_disk, self.variables):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.tpm, ignore_errors=True)


def overlay(target: Path, backing: Path, backing_format: str, size: int | None = None) -> None:
    """Make a qcow2 image that takes the writes and leaves ``backing`` alone; ``size`` is in bytes."""
    sizes = [str(size)] if size is not None else []
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", backing.resolve(), "-F", backing_format, target, *sizes])


def flatten(source: Path, target: Path) -> None:
    """Copy a qcow2 image with all it stands on into one raw file, holes kept.

    Only then does every block a guest reads or writes pass through the server of that one file.
    """
    run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", source, target])


def open_disk(files: Files) -> FatPartition:
    """Make a machine's disk raw, so that tests can change it from outside, and return its ESP.

    The machine then needs a Host with ``faulty_disk``.
    """
    flatten(files.disk, files.flat_disk)
    return find_esp(files.flat_disk)
