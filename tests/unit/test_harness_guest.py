"""The builder of test guests: archives, disks, the probe. Booting them is left to tests of the host."""

from __future__ import annotations

import stat
from pathlib import Path

import pefile
import pytest

from image.builder.efidisk import find_esp, make_efi_disk
from image.builder.probe import PROBE_READY, build_probe_application, build_probe_disk
from tests.faults.guest import _COUNT
from tests.guest.initrd import Entry, build_initrd, cpio
from tests.guest.linux import GuestSources, build_linux_disk
from vmm.errors import UserError
from vmm.process import run


def test_the_archive_is_what_cpio_reads(tmp_path: Path) -> None:
    entries = {
        "bin": Entry(stat.S_IFDIR | 0o755),
        "bin/program": Entry(stat.S_IFREG | 0o755, b"#!/bin/sh\n"),
        "init": Entry(stat.S_IFREG | 0o644, b"abc"),
    }
    (tmp_path / "archive").write_bytes(cpio(entries))
    run(["cpio", "--extract", "--quiet", "--make-directories", "--file", tmp_path / "archive"], cwd=tmp_path)
    assert (tmp_path / "bin/program").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "bin/program").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "init").read_bytes() == b"abc"


def test_a_disk_holds_its_files_and_is_the_same_each_time(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"small")
    (tmp_path / "big").write_bytes(bytes(range(256)) * 40_000)
    files = {"EFI/BOOT/BOOTX64.EFI": tmp_path / "big", "a/b/c/d": tmp_path / "small"}
    make_efi_disk(tmp_path / "disk", files)
    esp = find_esp(tmp_path / "disk")
    assert "EFI/BOOT/BOOTX64.EFI" in esp.names()
    esp.get("EFI/BOOT/BOOTX64.EFI", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "big").read_bytes()
    esp.put(tmp_path / "small", "EFI/BOOT/BOOTX64.EFI")
    esp.get("EFI/BOOT/BOOTX64.EFI", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"small"


def test_a_missing_file_and_a_missing_partition_are_named(tmp_path: Path) -> None:
    build_probe_disk(tmp_path / "disk")
    with pytest.raises(UserError, match="nothing"):
        find_esp(tmp_path / "disk").get("nothing", tmp_path / "out")
    run(["sfdisk", "--quiet", tmp_path / "disk"], input="label: gpt\nsize=1MiB\n")
    with pytest.raises(UserError, match="has no EFI system partition"):
        find_esp(tmp_path / "disk")


def test_the_probe_is_a_uefi_application(tmp_path: Path) -> None:
    build_probe_application(tmp_path / "probe.efi")
    image = pefile.PE(str(tmp_path / "probe.efi"))
    assert image.OPTIONAL_HEADER.Subsystem == pefile.SUBSYSTEM_TYPE["IMAGE_SUBSYSTEM_EFI_APPLICATION"]
    assert image.FILE_HEADER.Machine == pefile.MACHINE_TYPE["IMAGE_FILE_MACHINE_AMD64"]
    # Position-independent code needs no relocations, but stripped ones would forbid loading it elsewhere.
    assert not image.FILE_HEADER.IMAGE_FILE_RELOCS_STRIPPED
    assert PROBE_READY.encode() in (tmp_path / "probe.efi").read_bytes()


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vmlinuz is missing"):
        build_linux_disk(tmp_path / "disk", GuestSources(kernel=tmp_path / "vmlinuz"))
    with pytest.raises(UserError, match="holds 0 kernels' modules instead of one"):
        build_initrd(tmp_path / "initrd", tmp_path, tmp_path / "busybox")
    (tmp_path / "usr/lib/modules/6.12").mkdir(parents=True)
    (tmp_path / "usr/lib/modules/6.12/modules.dep").touch()
    with pytest.raises(UserError, match="busybox is missing") as caught:
        build_initrd(tmp_path / "initrd", tmp_path, tmp_path / "busybox")
    assert caught.value.hint == "install busybox-static"


def test_the_guest_numbers_its_disk_and_goes_on_where_it_was(tmp_path: Path) -> None:
    """As busybox has it, which is all that the guest has."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    script = Path("tests/guest/number.sh")
    for count, after in ((3, 3), (2, 5)):
        said = run(["busybox", "sh", script, disk, str(count)]).stdout
        assert said == "".join(f"HOLDFAST-GUEST WROTE {n}\n" for n in range(after - count + 1, after + 1))
    content = disk.read_bytes()
    assert len(content) == 1 << 20
    for number in range(1, 6):
        assert content[(number - 1) * 4096 :][:4096] == f"{number}\n".encode().ljust(4096, b"\0")
    assert not content[5 * 4096 :].strip(b"\0")


def test_what_cannot_be_written_is_not_said_to_be(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    done = run(["prlimit", "--fsize=8192", "busybox", "sh", "tests/guest/number.sh", disk, "3"], check=False)
    assert done.returncode != 0
    assert done.stdout == "HOLDFAST-GUEST WROTE 1\nHOLDFAST-GUEST WROTE 2\n"


def test_what_the_host_counts_is_what_the_guest_wrote(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"".join(f"{n}\n".encode().ljust(4096, b"\0") for n in (1, 2, 3, 5)))
    names: dict[str, object] = {"argument": str(disk)}
    exec(_COUNT, names)  # noqa: S102 - as the agent does
    assert names["result"] == 3
