"""What the tests of publishing share: role keys, small releases that fit together, a client, faults."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tuf.api.metadata import TargetFile
from tuf.ngclient import Updater

from signing import cli, store
from signing.client import FolderFetcher
from signing.pcr import predict_pcr11
from signing.root import KEYS_OF_ROLE
from vmm.process import run

NAMES = tuple(name for names in KEYS_OF_ROLE.values() for name in names)


def make_key(folder: Path, name: str) -> None:
    """Put a new role key into a folder."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = folder / f"{name}.key"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    private.chmod(0o600)
    (folder / f"{name}.pub").write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def fake_uki(command_line: str) -> bytes:
    """The least that pefile takes: one section, .cmdline."""
    text = command_line.encode()
    dos = b"MZ".ljust(60, b"\0") + struct.pack("<I", 64)
    header = struct.pack("<4sHHIIIHH", b"PE\0\0", 0x8664, 1, 0, 0, 0, 112, 0x22)
    optional = struct.pack("<H", 0x20B).ljust(32, b"\0") + struct.pack("<II", 4096, 512)
    section = struct.pack("<8sIIIIIIHHI", b".cmdline", len(text), 4096, 512, 512, 0, 0, 0, 0, 0x40000040)
    return (dos + header + optional.ljust(112, b"\0") + section).ljust(512, b"\0") + text.ljust(512, b"\0")


@functools.cache
def noise(seed: int, size: int = 1 << 18) -> bytes:
    """Bytes that do not compress; as a root they are the same for each test."""
    return random.Random(seed).randbytes(size)


def make_built(folder: Path, version: str, *, epoch: int = 1, root: bytes = b"") -> Path:
    """A release folder as the build leaves it, with a real hash tree."""
    folder.mkdir()
    (folder / "root.raw").write_bytes(root or noise(0))
    made = run(["veritysetup", "format", folder / "root.raw", folder / "verity.raw"])
    found = re.search(r"Root hash:\s+([0-9a-f]{64})", made.stdout)
    assert found
    root_hash = found[1]
    (folder / "signature.raw").write_bytes(json.dumps({"rootHash": root_hash}).encode().ljust(4096, b"\0"))
    (folder / "uki.efi").write_bytes(fake_uki(f"roothash={root_hash} ro"))
    facts = {
        "version": version,
        "epoch": epoch,
        "minimum_source": "0.1.0",
        "root_hash": root_hash,
        "root_uuid": uuid_of(root_hash[:32]),
        "verity_uuid": uuid_of(root_hash[32:]),
        "signature_uuid": uuid_of("5" * 32),
        "pcr11": predict_pcr11(folder / "uki.efi"),
        "sizes": {},
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    return folder


def uuid_of(digits: str) -> str:
    """32 hex digits as people write a UUID."""
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


@dataclass(frozen=True)
class Rig:
    """A key set, a repository, and release folders, in one place."""

    folder: Path

    @property
    def keys(self) -> Path:
        """The key set."""
        return self.folder / "keys"

    @property
    def repository(self) -> Path:
        """The repository."""
        return self.folder / "repository"

    def release(self, *words: str | Path, keys: Path | None = None) -> None:
        """Run holdfast-release. Raises: UserError as it does."""
        places = ("--repository", str(self.repository), "--keys", str(keys or self.keys))
        cli.run([*map(str, words), *places])

    def built(self, version: str, *, epoch: int = 1, root: bytes = b"") -> Path:
        """A new release folder."""
        return make_built(self.folder / f"built-{version}", version, epoch=epoch, root=root)

    def publish(self, version: str, *options: str, epoch: int = 1, root: bytes = b"") -> None:
        """Build and publish a version."""
        self.release("publish", self.built(version, epoch=epoch, root=root), *options)

    def seen(self, *, root: bytes | None = None) -> dict[str, TargetFile]:
        """All targets, each downloaded, of a new client that knows a root.json. Raises: what the client raises."""
        with tempfile.TemporaryDirectory() as local:
            Path(local, "root.json").write_bytes(root or (self.keys / "root.json").read_bytes())
            client = Updater(
                local,
                (self.repository / "metadata").as_uri(),
                target_dir=local,
                target_base_url=(self.repository / "targets").as_uri(),
                fetcher=FolderFetcher(),
            )
            client.refresh()
            targets = json.loads(Path(local, "targets.json").read_bytes())["signed"]["targets"]
            found = {name: client.get_targetinfo(name) for name in targets}
            for target in found.values():
                assert target
                client.download_target(target)
            return {name: target for name, target in found.items() if target}

    def versions(self) -> list[str]:
        """The versions that a new client is offered."""
        return sorted(name.split("/")[0].removeprefix("holdfast_") for name in self.seen() if "release.json" in name)


@pytest.fixture(scope="session")
def rig_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key set and an empty repository, made once."""
    rig = Rig(tmp_path_factory.mktemp("publish") / "rig")
    rig.keys.mkdir(parents=True)
    for name in NAMES:
        make_key(rig.keys, name)
    rig.release("init")
    return rig.folder


@pytest.fixture
def rig(rig_template: Path, tmp_path: Path) -> Rig:
    """A key set and an empty repository."""
    shutil.copytree(rig_template, tmp_path / "rig")
    return Rig(tmp_path / "rig")


class Killed(BaseException):
    """Stands for the power going: nobody catches it."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[list[str]]:
    """Make the ``step``th sync, rename or link from now raise Killed, and all after it; yields those that were done."""
    done: list[str] = []
    real: dict[str, Callable[..., object]] = {"fsync": os.fsync, "replace": os.replace, "link": os.link}

    class Faulty:
        def __getattr__(self, name: str) -> object:
            if name not in real:
                return getattr(os, name)

            def call(*arguments: object) -> object:
                if len(done) >= step:
                    raise Killed
                done.append(f"{name} {arguments[-1]}")
                return real[name](*arguments)

            return call

    with monkeypatch.context() as patch:
        patch.setattr(store, "os", Faulty())
        yield done
