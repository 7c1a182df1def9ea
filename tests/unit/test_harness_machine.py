"""The emulated machine's command line, checkpoints' names, acceleration, seeds and images' files."""

from __future__ import annotations

import base64
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from image.builder.efidisk import find_esp, make_efi_disk
from tests.harness import accel
from tests.harness.checkpoint import key
from tests.harness.diskserver import DiskServer
from tests.harness.guarded import Guarded
from tests.harness.image import Files, Image, flatten, overlay
from tests.harness.machine import GIB, Hardware, Sockets, qemu_command
from tests.harness.seed import configuration, identities, seed_credential
from tests.harness.waiting import poll
from vmm.errors import UserError

HARDWARE = Hardware()
SEED = "io.systemd.credential.binary:holdfast.seed=e30="


def command(tmp_path: Path, *, served: bool = False) -> list[str]:
    files, sockets = Files(tmp_path), Sockets(Path("/tmp/hf-x"))  # noqa: S108 - nothing is made there
    smbios = [Path("/tmp/hf-x/smbios-0")]  # noqa: S108
    return [str(a) for a in qemu_command(files, sockets, HARDWARE, accel.TCG, smbios, served_disk=served)]


def test_the_machine_has_secure_boot_tpm_and_both_networks(tmp_path: Path) -> None:
    line = " ".join(command(tmp_path))
    assert "q35,smm=on,pflash0=code,pflash1=variables" in line
    assert "driver=cfi.pflash01,property=secure,value=on" in line
    assert "tpm-crb" in line
    assert "mac=52:54:00:00:00:01" in line
    assert "mac=52:54:00:00:00:02" in line
    assert line.count("filter-dump") == 2
    assert "-smbios type=11,path=/tmp/hf-x/smbios-0" in line
    assert "-m 4096" in line
    # systemd-boot resets the machine after enrolling keys.
    assert "-no-reboot" not in line


def test_a_stick_can_be_in_the_usb_port_or_come_later(tmp_path: Path) -> None:
    assert command(tmp_path)[-4:] == ["-device", "qemu-xhci,id=usb", "-smbios", "type=11,path=/tmp/hf-x/smbios-0"]
    nowhere = Path("/tmp/hf-x")  # noqa: S108 - nothing is made there
    with_stick = replace(HARDWARE, stick=tmp_path / "stick.img")
    line = qemu_command(Files(tmp_path), Sockets(nowhere), with_stick, accel.TCG, (), served_disk=False)
    assert line[-2:] == ["-device", "usb-storage,id=stick,bus=usb.0,drive=stick,removable=on"]
    assert json.loads(str(line[-3]))["file"]["filename"] == str(tmp_path / "stick.img")


def test_a_served_disk_keeps_its_flushes(tmp_path: Path) -> None:
    def node(served: bool) -> dict[str, object]:
        arguments = command(tmp_path, served=served)
        found: dict[str, object] = next(json.loads(a) for a in arguments if a.startswith("{"))
        return found

    assert node(served=False)["cache"] == {"no-flush": True}
    assert "cache" not in node(served=True)
    assert node(served=True)["driver"] == "raw"


def test_a_checkpoint_s_name_follows_every_input() -> None:
    bigger = Hardware(memory=8 * GIB)
    names = {
        key("image", [SEED], HARDWARE, accel.TCG),
        key("other", [SEED], HARDWARE, accel.TCG),
        key("image", [], HARDWARE, accel.TCG),
        key("image", [SEED], bigger, accel.TCG),
        key("image", [SEED], HARDWARE, accel.KVM),
    }
    assert len(names) == 5
    assert key("image", [SEED], HARDWARE, accel.TCG) in names


def test_nested_is_read_from_either_module(tmp_path: Path) -> None:
    assert not accel.nested_enabled(tmp_path)
    switch = tmp_path / "kvm_intel/parameters/nested"
    switch.parent.mkdir(parents=True)
    switch.write_text("N\n")
    assert not accel.nested_enabled(tmp_path)
    switch.write_text("Y\n")
    assert accel.nested_enabled(tmp_path)


def test_acceleration_is_probed_once_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, probes = tmp_path / "accel.json", []
    monkeypatch.setattr(accel, "nested_enabled", lambda: probes.append("probe"))
    accel.acceleration.cache_clear()
    assert accel.acceleration(cache) == accel.TCG
    accel.acceleration.cache_clear()
    assert accel.acceleration(cache) == accel.TCG
    before = len(probes)
    cache.write_text(json.dumps({**json.loads(cache.read_text()), "boot_id": "another"}))
    accel.acceleration.cache_clear()
    assert accel.acceleration(cache) == accel.TCG
    assert len(probes) in (0, before + 1)  # 0: this machine has no /dev/kvm at all
    accel.acceleration.cache_clear()


def test_identities_are_made_once(tmp_path: Path) -> None:
    first, again = identities(tmp_path), identities(tmp_path)
    assert set(first) == {"admin", "auditor", "operator", "user"}
    assert first == again
    assert first["admin"].key.stat().st_mode & 0o077 == 0
    certificate = x509.load_pem_x509_certificate(first["admin"].certificate.read_bytes())
    public = certificate.public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey)
    assert public.curve.name == "secp384r1"


def test_a_seed_carries_the_configuration(tmp_path: Path) -> None:
    document = configuration(list(identities(tmp_path).values()), hostname="other")
    name, _, value = seed_credential(document).partition("=")
    assert name == "io.systemd.credential.binary:holdfast.seed"
    decoded = json.loads(base64.b64decode(value))
    assert decoded == document
    assert decoded["hostname"] == "other"
    assert [a["role"] for a in decoded["administrators"]] == ["admin", "auditor", "operator", "user"]


@pytest.fixture
def image(tmp_path: Path) -> Image:
    """A build folder with an image of nothing but an ESP."""
    for folder in ("image", "test"):
        (tmp_path / folder).mkdir()
    (tmp_path / "image/manifest.json").write_text('{"version": "1.2.3", "root_hash": "abc"}')
    (tmp_path / "test/test.addon.efi").write_bytes(b"addon")
    (tmp_path / "test/db.auth").write_bytes(b"new db")
    (tmp_path / "old.auth").write_bytes(b"old db")
    make_efi_disk(tmp_path / "image/holdfast.raw", {"loader/keys/auto/db.auth": tmp_path / "old.auth"})
    return Image.built(tmp_path)


def test_an_unbuilt_image_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holdfast.raw is missing") as caught:
        Image.built(tmp_path)
    assert caught.value.hint == "run make image"


def test_the_test_disk_adds_the_extension_and_leaves_the_release_alone(image: Image, tmp_path: Path) -> None:
    before = image.disk.read_bytes()
    image.write_test_disk(tmp_path / "copy.raw")
    esp = find_esp(tmp_path / "copy.raw")
    esp.get("loader/addons/test.addon.efi", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"addon"
    esp.get("loader/keys/auto/db.auth", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"new db"
    assert image.disk.read_bytes() == before


def test_an_image_s_identity_follows_the_addon(image: Image) -> None:
    before = image.identity()
    assert image.identity() == before
    image.test_addon.write_bytes(b"another")
    assert image.identity() != before
    image.test_addon.unlink()
    with pytest.raises(UserError, match="test.addon.efi is missing"):
        image.identity()


def test_overlays_flatten_to_what_they_stand_on(tmp_path: Path) -> None:
    base, files = tmp_path / "base.raw", Files(tmp_path)
    base.write_bytes(b"A" * 65536)
    overlay(files.disk, base, "raw", 1 << 20)
    flatten(files.disk, files.flat_disk)
    assert files.flat_disk.stat().st_size == 1 << 20
    assert files.flat_disk.read_bytes()[:65536] == b"A" * 65536
    files.discard()
    assert not files.disk.exists()
    assert not files.flat_disk.exists()
    assert replace(files, memory=base).disk == files.disk


def test_a_disk_server_serves_and_stops(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    server = DiskServer(tmp_path / "disk.raw", tmp_path / "nbd", tmp_path / "nbdkit.log")
    assert (tmp_path / "nbd").is_socket()
    server.stop()
    server.kill()


def test_ctrl_c_on_our_terminal_does_not_reach_a_guarded_program(tmp_path: Path) -> None:
    program = Guarded(["sleep", "60"], tmp_path / "log")
    poll(lambda: os.getsid(program.pid) == program.pid, 10, "a session of its own")
    program.stop()
    assert not program.running
