"""From the installed tree to a disk: verity-protected root, signed UKI, ESP, sizes checked, all that in build/image.

This is the only step of the build that sees private keys; mkosi is done by then.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from image.builder.host import say
from image.builder.initrd import contents, kernel_version, make_initrd, make_microcode, policy_key_id
from image.builder.layout import SOURCE_DATE_EPOCH, Layout, digest
from image.builder.slot import Slot, make_disk, make_slot
from image.builder.tree import make_tree
from signing import secureboot
from signing.keys import KeySet, open_keys
from signing.pcr import predict_pcr11
from vmm.errors import die
from vmm.process import run

_EFI = Path("/usr/lib/systemd/boot/efi")


def build_image(layout: Layout) -> None:
    """Build the image if anything it is made from changed.

    Raises: UserError above a limit of image/limits.json, with the figure; CommandFailed when a tool fails.
    """
    keys = open_keys(layout.keys, release=layout.release)
    inputs = _inputs(layout, keys)
    stamp = layout.image / "inputs"
    if stamp.exists() and stamp.read_text() == inputs:
        say(f"{layout.disk.relative_to(layout.repository)} is up to date")
        return
    stamp.unlink(missing_ok=True)
    layout.image.mkdir(parents=True, exist_ok=True)
    make_tree(layout, keys)
    _initrd_if_changed(layout, keys)
    say("making the root file system, its hash tree and signature")
    slot = make_slot(layout, keys)
    say("making and signing the unified kernel image")
    make_uki(layout, keys, slot.root_hash, layout.uki)
    make_disk(layout, slot, _fill_esp(layout, keys))
    (layout.release_folder / "uki.efi").unlink(missing_ok=True)
    (layout.release_folder / "uki.efi").hardlink_to(layout.uki)
    write_manifest(layout, slot, keys)
    shutil.copy2(layout.mkosi_output / "vmlinuz", layout.image / "vmlinuz")
    make_test_extension(layout, keys)
    stamp.write_text(inputs)
    say(f"{layout.disk.relative_to(layout.repository)} is ready")


def _inputs(layout: Layout, keys: KeySet) -> str:
    sources = ["mkosi.conf", "image", "vmm", "signing", "tests/harness/cmdline"]
    return digest(
        [
            *(layout.repository / name for name in sources),
            *sorted(keys.folder.glob("*.crt")),
            *sorted(keys.folder.glob("*.pub")),
            keys.root,
        ],
        layout.version,
        str(layout.epoch),
        str(layout.built),
        (layout.tools / "etc/holdfast-tools").read_text(),
    )


def _initrd_if_changed(layout: Layout, keys: KeySet) -> None:
    key = policy_key_id(keys.public("pcr"))
    wanted = digest(
        [layout.repository / "image/initrd", layout.repository / "image/builder/initrd.py"], contents(layout), key
    )
    stamp, initrd = layout.build / "initrd.inputs", layout.build / "initrd.zst"
    if stamp.exists() and initrd.exists() and stamp.read_text() == wanted:
        return
    say("making the initrd")
    stamp.unlink(missing_ok=True)
    make_initrd(layout, initrd, key)
    make_microcode(layout.root, layout.build / "microcode.cpio")
    stamp.write_text(wanted)


def command_line(layout: Layout, root_hash: str) -> str:
    """The signed kernel command line: image/cmdline with the root's hash in front."""
    lines = (line.partition("#")[0].strip() for line in (layout.repository / "image/cmdline").read_text().splitlines())
    return " ".join([f"roothash={root_hash}", *(line for line in lines if line)])


def make_uki(layout: Layout, keys: KeySet, root_hash: str, target: Path) -> None:
    """Join kernel, initrd, command line and microcode, sign the PCR 11 policy, sign the whole for Secure Boot.

    The policy holds in the initrd phase only: what runs later, or a root forged offline, cannot unseal the volumes.
    """
    kernel = layout.mkosi_output / "vmlinuz"
    run(
        [
            *("ukify", "build", f"--output={target}", f"--stub={_EFI / 'linuxx64.efi.stub'}"),
            *(
                f"--linux={kernel}",
                f"--initrd={layout.build / 'initrd.zst'}",
                f"--microcode={layout.build / 'microcode.cpio'}",
            ),
            *(f"--cmdline={command_line(layout, root_hash)}", f"--os-release=@{layout.root / 'usr/lib/os-release'}"),
            *(
                f"--uname={kernel_version(layout.root)}",
                "--efi-arch=x64",
                "--pcr-banks=sha256",
            ),
            *_policies(keys),
            *("--signtool=sbsign", f"--secureboot-private-key={keys.key('db')}"),
            f"--secureboot-certificate={keys.certificate('db')}",
        ],
        env={"SOURCE_DATE_EPOCH": str(SOURCE_DATE_EPOCH)},
    )
    if (size := target.stat().st_size) > layout.limits.uki_bytes:
        die(f"the UKI has {size} bytes, over the limit of {layout.limits.uki_bytes} in image/limits.json")


def _policies(keys: KeySet) -> Iterator[str]:
    """Policies for the initrd phase: by the present key, and by the one before it while hosts change over."""
    pairs = [(keys.key("pcr"), keys.public("pcr"))]
    if keys.previous_pcr is not None:
        pairs.append((keys.previous_pcr, keys.public("pcr-previous")))
    for private, public in pairs:
        yield from (f"--pcr-private-key={private}", f"--pcr-public-key={public}", "--phases=enter-initrd")
    yield f"--pcrpkey={keys.public('pcr')}"


def _fill_esp(layout: Layout, keys: KeySet) -> Path:
    esp = layout.build / "esp"
    shutil.rmtree(esp, ignore_errors=True)
    for folder in ("EFI/BOOT", "EFI/systemd", "EFI/Linux", "loader"):
        (esp / folder).mkdir(parents=True)
    secureboot.sign(keys, _EFI / "systemd-bootx64.efi", esp / "EFI/BOOT/BOOTX64.EFI")
    shutil.copy2(layout.repository / "image/loader.conf", esp / "loader/loader.conf")
    shutil.copy2(layout.uki, esp / f"EFI/Linux/holdfast_{layout.version}.efi")
    secureboot.write_variables(keys, esp / "loader/keys/auto", db=keys.enrolled)
    for path in esp.rglob("*"):
        os.utime(path, (SOURCE_DATE_EPOCH, SOURCE_DATE_EPOCH))
    return esp


def write_manifest(layout: Layout, slot: Slot, keys: KeySet) -> None:
    """State what was built, beside the image and in the release folder. Raises: UserError above a limit."""
    release = layout.release_folder
    sizes = {"uki": layout.uki.stat().st_size, "root": (release / "root.raw").stat().st_size}
    sizes["payload"] = sizes["uki"] + sum(_packed_bytes(release / f"{name}.raw") for name in slot.uuids)
    if sizes["payload"] > layout.limits.payload_bytes:
        die(
            f"the payload has {sizes['payload']} bytes, "
            f"over the limit of {layout.limits.payload_bytes} in image/limits.json"
        )
    room = layout.limits.root_slot_bytes * layout.limits.root_slot_fill_percent // 100
    if sizes["root"] > room:
        die(f"the root has {sizes['root']} bytes, over the {room} that image/limits.json allows in a slot")
    facts = {
        "version": layout.version,
        "epoch": layout.epoch,
        "built": layout.built,
        "minimum_source": layout.minimum_source,
        "root_hash": slot.root_hash,
        **{f"{name}_uuid": uuid for name, uuid in slot.uuids.items()},
        "command_line": command_line(layout, slot.root_hash),
        "pcr11": predict_pcr11(layout.uki),
        "uki_sha256": hashlib.sha256(layout.uki.read_bytes()).hexdigest(),
        "db_append": base64.b64encode(secureboot.db_append(keys)).decode(),
        "sizes": sizes,
    }
    for manifest in (release / "manifest.json", layout.manifest):
        manifest.write_text(json.dumps(facts, indent=2) + "\n")


def _packed_bytes(part: Path) -> int:
    """About what a part weighs on the wire; a release is packed harder."""
    packed = part.with_suffix(".zst")
    run(["zstd", "--quiet", "--force", "-T0", "-1", part, "-o", packed])
    size = packed.stat().st_size
    packed.unlink()
    return size


def make_test_extension(layout: Layout, keys: KeySet) -> None:
    """What lets tests run commands on the host: a signed addon to the command line, honoured only by a firmware
    whose db has the test certificate, and that db.

    Raises: nothing for a release, which simply gets none.
    """
    folder = layout.build / "test"
    if not keys.key("test").exists():
        for made in ("test.addon.efi", "db.auth"):
            (folder / made).unlink(missing_ok=True)
        return
    folder.mkdir(exist_ok=True)
    line = " ".join((layout.repository / "tests/harness/cmdline").read_text().split())
    run(
        [
            *("ukify", "build", f"--output={folder / 'test.addon.efi'}", f"--stub={_EFI / 'addonx64.efi.stub'}"),
            *(f"--cmdline={line}", "--signtool=sbsign", f"--secureboot-private-key={keys.key('test')}"),
            f"--secureboot-certificate={keys.certificate('test')}",
        ]
    )
    secureboot.write_variables(keys, folder / "keys", db=(*keys.enrolled, "test"))
    shutil.copy2(folder / "keys/db.auth", folder / "db.auth")
