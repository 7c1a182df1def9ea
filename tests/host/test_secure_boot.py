"""What is not signed, not as it was built, or not where it was sealed does not run and does not get the keys."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pefile
import pytest

from image.builder.assemble import make_uki
from image.builder.layout import Layout
from signing.keys import KeySet, make_development_keys
from tests.harness import firmware, releases
from tests.harness.agent import agent_credentials
from tests.harness.ceremony import make_release_keys
from tests.harness.checkpoint import Checkpoint, fresh, ready_with_agent, switched_off
from tests.harness.host import Host
from tests.harness.image import Files, Image, open_disk
from tests.harness.machine import Hardware
from tests.harness.seed import Identity
from tests.harness.waiting import Expired
from vmm.config import gpt
from vmm.process import run

STARTED = "EFI stub: UEFI Secure Boot is enabled"
ENROLLED = "Custom Secure Boot keys successfully enrolled"
_EROFS_SUPERBLOCK = 1024
_LUKS_HEADER = 16 << 20
_SECRETS = """
import pathlib
files = [pathlib.Path("/var/lib", place, "pair") for place in ("holdfast", "holdfast-audit")]
result = [[file.read_text(), file.stat().st_mode & 0o777, file.stat().st_uid] for file in files]
"""
_FORGET = """
import os
for path in argument:
    os.unlink(path)
os.sync()
"""


def _serial(files: Files) -> str:
    return (files.directory / "serial.log").read_text(errors="replace")


def _flip(file: Path, offset: int) -> None:
    """Invert the bits of one byte."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        byte = opened.read(1)
        opened.seek(offset)
        opened.write(bytes([byte[0] ^ 0xFF]))


def _unsigned(uki: Path) -> None:
    run(["sbattach", "--remove", uki])


def _tampered(uki: Path) -> None:
    linux = next(s for s in pefile.PE(str(uki), fast_load=True).sections if s.Name.rstrip(b"\0") == b".linux")
    _flip(uki, linux.PointerToRawData + linux.Misc_VirtualSize // 2)


@pytest.fixture
def installed(booted: Checkpoint, workdir: Path) -> Iterator[Files]:
    """The disk, variables and TPM of a host that has run, after a loss of power."""
    files = switched_off(workdir, booted.files)
    yield files
    files.discard()


@pytest.mark.parametrize("change", [_unsigned, _tampered], ids=["unsigned", "tampered"])
def test_firmware_refuses_another_kernel(
    change: Callable[[Path], None], fresh_disk: Files, built_image: Image, seed: str, workdir: Path
) -> None:
    """With the keys enrolled, an image without signature, or with one byte changed, is refused and never runs."""
    uki = workdir / "changed.efi"
    shutil.copyfile(built_image.build / "image/holdfast.efi", uki)
    change(uki)
    open_disk(fresh_disk).put(uki, f"EFI/Linux/holdfast_{built_image.version}.efi")
    with Host(fresh_disk, smbios=[seed], faulty_disk=True) as host:
        host.serial.expect(ENROLLED, 10)
        host.serial.expect(r"Error loading \\EFI\\Linux\\\S+\.efi: Access denied", 10)
        # The firmware has tried all there is and waits for somebody; nothing starts by itself any more.
        host.serial.expect("No bootable option or device was found", 10)
        assert not host.api().reachable(0.5)
    assert "EFI stub" not in _serial(fresh_disk)


def test_a_changed_root_is_detected(fresh_disk: Files, seed: str) -> None:
    """One byte of the root's superblock changed: dm-verity stops the kernel, which restarts the machine."""
    open_disk(fresh_disk)
    with fresh_disk.flat_disk.open("rb") as disk:
        root = next(p for p in gpt.read(disk).partitions if p.name.startswith("holdfast_"))
    _flip(fresh_disk.flat_disk, root.offset + _EROFS_SUPERBLOCK + 36)
    with Host(fresh_disk, smbios=[seed], faulty_disk=True) as host:
        host.wait_reset(5)  # The firmware's own, after the keys are enrolled.
        host.serial.expect(STARTED, 6)
        host.wait_reset(8)
        assert not host.api().reachable(0.5)
    assert "corrupt" in _serial(fresh_disk)


def test_an_installed_host_opens_its_volumes_after_a_loss_of_power(booted: Checkpoint, installed: Files) -> None:
    """The control of the next two: the same disk, variables and TPM, unchanged, boot without anybody's help."""
    open_disk(installed)
    with Host(installed, smbios=booted.smbios, faulty_disk=True) as host:
        host.wait_api()


def test_volumes_stay_closed_without_secure_boot(booted: Checkpoint, installed: Files) -> None:
    """Secure Boot off: the kernel starts, but the TPM does not give the volumes' keys and the machine restarts."""
    open_disk(installed).remove("loader/keys")
    installed.variables.unlink()
    firmware.create_variables(installed.variables)
    with Host(installed, smbios=booted.smbios, faulty_disk=True) as host:
        host.serial.expect("EFI stub", 6)
        host.serial.expect("Failed to unseal", 12)
        host.wait_reset(8)
        assert not host.api().reachable(0.5)
    assert STARTED not in _serial(installed)


def test_volumes_stay_closed_to_an_image_without_the_policy_key(
    booted: Checkpoint, installed: Files, built_image: Image, workdir: Path
) -> None:
    """An image that the firmware accepts, but whose PCR policy another key signed, does not get the volumes' keys."""
    layout = Layout()
    other, uki = workdir / "keys", workdir / "other.efi"
    shutil.rmtree(other, ignore_errors=True)
    make_development_keys(other)
    for name in ("db.key", "db.crt"):
        shutil.copy2(layout.keys / name, other / name)
    make_uki(layout, KeySet(other), built_image.root_hash, uki)
    open_disk(installed).put(uki, f"EFI/Linux/holdfast_{built_image.version}.efi")
    with Host(installed, smbios=booted.smbios, faulty_disk=True) as host:
        host.serial.expect(STARTED, 6)
        host.serial.expect("Failed to unseal", 12)
        host.wait_reset(8)
        assert not host.api().reachable(0.5)


def _volume(disk: Path, name: str) -> gpt.Partition:
    with disk.open("rb") as file:
        found = gpt.read(file).find(f"holdfast-{name}")
    assert found, f"no volume {name}"
    return found


def _headers(disk: Path) -> set[str]:
    """What the volumes' key slots and tokens are, whatever the partitions are called."""
    volumes = [_volume(disk, name) for name in ("data", "audit")]
    return {hashlib.sha256(gpt.read_partition(disk, volume, _LUKS_HEADER)).hexdigest() for volume in volumes}


def _refused(host: Host, unit: str) -> None:
    host.serial.expect(f"(Failed to start|Assertion failed for) {unit}", 25)
    host.wait_reset(8)
    assert not host.api().reachable(0.5)


def test_a_volume_in_the_other_s_place_is_refused(booted: Checkpoint, installed: Files) -> None:
    """The labels of data and audit partition exchanged: the console names the volume, and no key slot is changed."""
    open_disk(installed)
    disk = installed.flat_disk
    before = _headers(disk)
    numbers = {name: _volume(disk, name).number for name in ("data", "audit")}
    for name, other in (("data", "audit"), ("audit", "data")):
        run(["sfdisk", "--quiet", "--part-label", disk, str(numbers[name]), f"holdfast-{other}"])
    with Host(installed, smbios=booted.smbios, faulty_disk=True) as host:
        _refused(host, "holdfast-label@(data|audit).service")
    assert _headers(disk) == before


@pytest.mark.long
def test_volumes_of_two_installations_are_refused(
    booted: Checkpoint, installed: Files, built_image: Image, workdir: Path
) -> None:
    """One installation's audit volume beside the next one's data volume, both sealed by the same TPM: the console says
    that they do not belong together. No recovery key is enrolled, though the data volume asks for one."""
    first, disk = workdir / "first.raw", installed.flat_disk
    open_disk(installed)
    disk.rename(first)
    built_image.write_test_disk(disk)
    os.truncate(disk, first.stat().st_size)
    with Host(installed, smbios=booted.smbios, faulty_disk=True) as host:
        ready_with_agent(host)
        host.agent.python(_FORGET, ["/var/lib/holdfast/recovery/audit.key"])
        host.power_cut()
        old, new = _volume(first, "audit"), _volume(disk, "audit")
        assert (old.offset, old.size) == (new.offset, new.size)
        place = [f"--offset={new.offset}", f"--length={new.size}"]
        run(["fallocate", "--punch-hole", *place, disk])
        flags = ["iflag=skip_bytes,count_bytes", "oflag=seek_bytes", "conv=notrunc,sparse", "bs=1M"]
        place = [f"skip={old.offset}", f"seek={new.offset}", f"count={old.size}"]
        run(["dd", f"if={first}", f"of={disk}", *flags, *place])
        before = _headers(disk)
        host.power_on()
        _refused(host, "holdfast-pair.service")
    assert _headers(disk) == before
    first.unlink()


def test_a_volume_without_the_secret_is_refused(faulty_host: Host) -> None:
    """Both hold one since they were made, a file of root's; a data volume that somebody made has none."""
    host = faulty_host
    data, audit = host.agent.python(_SECRETS)
    assert data == audit
    assert data[1:] == [0o600, 0]
    host.agent.python(_FORGET, ["/var/lib/holdfast/pair"])
    host.power_cut()
    host.power_on()
    _refused(host, "holdfast-pair.service")


def test_a_release_under_release_keys_ignores_the_test_extension(
    built_image: Image, workdir: Path, seed: str, clients: dict[str, Identity]
) -> None:
    """An image built and signed by the key ceremony's keys starts and works; no command gets in by the extension."""
    keys = make_release_keys(releases.FOLDER / "ceremony")
    release = releases.build("ceremony", "0.1.0", keys=keys, release=True)
    files = fresh(workdir, Image.built(release.build).disk, Hardware().disk)
    open_disk(files).put(built_image.test_addon, "loader/addons/test.addon.efi")
    with Host(files, smbios=[*agent_credentials(), seed], faulty_disk=True) as host:
        host.wait_ready(clients["admin"])
        assert host.api(clients["admin"]).call("GET", "/v1/configuration")["hostname"] == "hf1"
        with pytest.raises(Expired):
            host.agent.wait(3)
    files.discard()
