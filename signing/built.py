"""What the build leaves for publishing (build/image/release), checked to fit together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pefile

from signing.pcr import predict_pcr11
from vmm.errors import die
from vmm.process import CommandFailed, run
from vmm.update import addition
from vmm.update.types import DbAppend, Hex256, Uuid, VersionText

FILES = {"root": "root.raw", "verity": "verity.raw", "signature": "signature.raw", "uki": "uki.efi"}
"""The parts of a release, by the names that release.json has for them."""


class Manifest(msgspec.Struct, frozen=True):
    """What the build says in manifest.json; it may say more."""

    version: VersionText
    epoch: int
    minimum_source: VersionText
    root_hash: Hex256
    root_uuid: Uuid
    verity_uuid: Uuid
    signature_uuid: Uuid
    pcr11: Hex256
    uki_sha256: str = ""
    db_append: DbAppend = b""


@dataclass(frozen=True)
class Built:
    """A release folder."""

    folder: Path
    manifest: Manifest

    def part(self, name: str) -> Path:
        """The plain file of a part."""
        return self.folder / FILES[name]


def open_built(folder: Path) -> Built:
    """Open a release folder.

    Raises: UserError naming the file that is missing, or that is of another build than the manifest; Refused when hosts
    would refuse the certificate that it announces.
    """
    try:
        manifest = msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest)
    except FileNotFoundError:
        die(f"{folder} holds no manifest.json", hint="a build leaves its release folder in build/image/release")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        die(f"{folder / 'manifest.json'}: {error}")
    if manifest.db_append:
        addition.parse(manifest.db_append)
    built = Built(folder, manifest)
    for name in FILES:
        path = built.part(name)
        if not path.is_file() or not path.stat().st_size:
            die(f"the release folder lacks {path}, or it is empty", hint="build the image again")
    _check_root(built)
    _check_signature(built)
    _check_uki(built)
    return built


def _check_root(built: Built) -> None:
    digest = built.manifest.root_hash
    # The host finds root and hash tree by these UUIDs (systemd-veritysetup-generator).
    uuids = (built.manifest.root_uuid.replace("-", ""), built.manifest.verity_uuid.replace("-", ""))
    if uuids != (digest[:32], digest[32:]):
        die(
            "manifest.json: root_uuid and verity_uuid are not the two halves of root_hash", hint="build the image again"
        )
    try:
        run(["veritysetup", "verify", built.part("root"), built.part("verity"), digest])
    except CommandFailed as error:
        die(
            f"{built.part('root')} and {built.part('verity')} do not have manifest.json's root_hash {digest}: "
            f"{error.output.strip()}",
            hint="the folder mixes two builds; build the image again",
        )


def _check_signature(built: Built) -> None:
    path = built.part("signature")
    try:
        signed = json.loads(path.read_bytes().rstrip(b"\0"))["rootHash"]
    except (ValueError, KeyError, TypeError):
        die(f"{path} is no verity signature (JSON with rootHash)")
    if signed != built.manifest.root_hash:
        die(f"{path} signs root hash {signed}, not that of manifest.json", hint="build the image again")


def _check_uki(built: Built) -> None:
    path = built.part("uki")
    try:
        sections = {
            section.Name.rstrip(b"\0"): section.get_data()[: section.Misc_VirtualSize]
            for section in pefile.PE(str(path), fast_load=True).sections
        }
    except pefile.PEFormatError as error:
        die(f"{path} is no unified kernel image: {error}")
    if f"roothash={built.manifest.root_hash}" not in sections.get(b".cmdline", b"").decode(errors="replace").split():
        die(
            f"{path} does not boot manifest.json's root_hash", hint="the folder mixes two builds; build the image again"
        )
    if predict_pcr11(path) != built.manifest.pcr11:
        die(f"{path} does not have manifest.json's pcr11", hint="build the image again")
    expected = built.manifest.uki_sha256
    if expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        die(f"{path} does not have manifest.json's uki_sha256", hint="build the image again")
