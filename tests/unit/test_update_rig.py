"""A small world for the updater's tests: a TUF repository, releases, a machine made of files, audit records."""

from __future__ import annotations

import hashlib
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import zstandard
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from securesystemslib.signer import Signature, Signer, SSlibKey
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from vmm.update import slots
from vmm.update.types import Part, Parts, Release, Wave

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)
SECONDS = int(NOW.timestamp())
MIB = 1 << 20


class P384(Signer):
    """A key of the kind that the repository uses; securesystemslib verifies with it, but signs with P-256 only."""

    def __init__(self) -> None:
        self._private = ec.generate_private_key(ec.SECP384R1())
        self._public = SSlibKey.from_crypto(self._private.public_key())

    @property
    def public_key(self) -> SSlibKey:
        return self._public

    @classmethod
    def from_priv_key_uri(cls, priv_key_uri: str, public_key: Any, secrets_handler: Any = None) -> Signer:
        raise NotImplementedError

    def sign(self, payload: bytes) -> Signature:
        return Signature(self._public.keyid, self._private.sign(payload, ec.ECDSA(SHA384())).hex())


@cache
def signer(name: str) -> P384:
    """A key, the same for a name as long as the tests run."""
    return P384()


def make_pe(sections: Iterable[tuple[str, bytes]]) -> bytes:
    """A PE32+ file with these sections and no code."""
    listed = list(sections)
    headers = 1024
    head = bytearray(headers)
    struct.pack_into("<2s58xI", head, 0, b"MZ", 64)
    struct.pack_into("<4sHHIIIHH", head, 64, b"PE\0\0", 0x8664, len(listed), 0, 0, 0, 240, 0x22)
    struct.pack_into("<H", head, 88, 0x20B)
    struct.pack_into("<I", head, 88 + 60, headers)
    struct.pack_into("<I", head, 88 + 108, 16)
    body = b""
    for number, (name, content) in enumerate(listed):
        stored = content + bytes(-len(content) % 512)
        entry = (name.encode(), len(content), 0x1000 * (number + 1), len(stored), headers + len(body))
        struct.pack_into("<8sIIII", head, 88 + 240 + 40 * number, *entry)
        body += stored
    return bytes(head) + body


def make_uki(version: str, epoch: int, root_hash: str) -> bytes:
    """What a release's UKI is to the updater."""
    release = f'ID=debian\nIMAGE_ID="holdfast"\nIMAGE_VERSION="{version}"\nHOLDFAST_EPOCH={epoch}\n'
    line = f"roothash={root_hash} root=/dev/mapper/root ro"
    payload = hashlib.shake_256(version.encode()).digest(20_000)
    return make_pe(((".osrel", release.encode()), (".cmdline", line.encode()), (".linux", payload)))


@dataclass(frozen=True)
class Plain:
    """A release's parts, unpacked."""

    root: bytes
    verity: bytes
    signature: bytes
    uki: bytes
    root_hash: str

    def parts(self) -> dict[str, bytes]:
        return {"root": self.root, "verity": self.verity, "signature": self.signature, "uki": self.uki}


@cache
def plain(version: str, epoch: int = 1) -> Plain:
    """Parts of a version; roots of all versions have most in common."""
    common = hashlib.shake_256(b"root").digest(300_000)
    root = common[:100_000] + version.encode() * 100 + common[100_000:] + bytes(-100 * len(version) % 4096)
    root_hash = hashlib.sha256(root).hexdigest()
    verity = b"verity\0\0" + struct.pack("<Q", len(root)) + hashlib.shake_256(root).digest(5000)
    return Plain(root, verity, version.encode() * 200, make_uki(version, epoch, root_hash), root_hash)


class Repository:
    """A TUF repository in a folder, as docs/updates.md has it; ``add``, then ``publish``."""

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        self.folder = folder
        self.prefix = prefix
        self.targets: dict[str, TargetFile] = {}
        self.versions = {"targets": 0, "snapshot": 0, "timestamp": 0}
        self.expires = {"root": 365, "targets": 14, "snapshot": 14, "timestamp": 7}
        (folder / "metadata").mkdir(parents=True)
        self.root = Root(version=1, expires=NOW + timedelta(days=365), consistent_snapshot=True)
        for name in ("root1", "root2", "root3"):
            self.root.add_key(self.key(name).public_key, "root")
        self.root.roles["root"].threshold = 2
        for name in ("targets", "snapshot", "timestamp"):
            self.root.add_key(self.key(name).public_key, name)
        self.root_json = self.write_root(("root1", "root2"))

    def key(self, name: str) -> P384:
        return signer(self.prefix + name)

    def write_root(self, keys: Iterable[str]) -> bytes:
        content = self.signed(self.root, keys)
        (self.folder / f"metadata/{self.root.version}.root.json").write_bytes(content)
        return content

    def signed(self, what: Any, keys: Iterable[str]) -> bytes:
        metadata = Metadata(what)
        for key in keys:
            metadata.sign(self.key(key), append=True)
        return metadata.to_bytes()

    def put(self, path: str, content: bytes, custom: Any = None) -> None:
        file = TargetFile.from_data(path, content, ["sha384"])
        if custom is not None:
            file.unrecognized_fields["custom"] = custom
        self.targets[path] = file
        stored = self.stored(path)
        stored.parent.mkdir(parents=True, exist_ok=True)
        stored.write_bytes(content)

    def stored(self, path: str) -> Path:
        """Where a target lies in the folder."""
        folder, _, name = path.rpartition("/")
        return self.folder / f"targets/{folder}/{self.targets[path].hashes['sha384']}.{name}"

    def add(
        self,
        version: str,
        *,
        epoch: int = 1,
        minimum: str = "0.0.1",
        channel: str = "stable",
        waves: tuple[Wave, ...] = (),
        base: str = "",
        change: Callable[[Release], Release] = lambda release: release,
    ) -> Release:
        """Add a release, with deltas from ``base``."""
        content = plain(version, epoch)
        described = {}
        for name, part in content.parts().items():
            target = f"holdfast_{version}/{name}.zst"
            self.put(target, zstandard.compress(part))
            deltas = {}
            if base and name != "signature":
                deltas[base] = f"holdfast_{version}/{name}.from-{base}.zst"
                self.put(deltas[base], delta(plain(base).parts()[name], part))
            described[name] = Part(len(part), hashlib.sha384(part).hexdigest(), target, deltas)
        halves = slots.uuids(content.root_hash)
        release = Release(
            format=1,
            version=version,
            epoch=epoch,
            minimum_source=minimum,
            root_hash=content.root_hash,
            root_uuid=str(halves[0]),
            verity_uuid=str(halves[1]),
            signature_uuid=str(uuid.uuid5(uuid.NAMESPACE_OID, version)),
            pcr11="0" * 64,
            parts=Parts(**described),
        )
        release = change(release)
        custom = {"channel": channel, "waves": [msgspec.to_builtins(wave) for wave in waves]}
        self.put(f"holdfast_{version}/release.json", msgspec.json.encode(release), custom)
        return release

    def withdraw(self, version: str) -> None:
        self.targets = {p: f for p, f in self.targets.items() if not p.startswith(f"holdfast_{version}/")}

    def publish(self, **keys: str) -> None:
        """Write new metadata; ``keys`` replaces the key that signs a role."""
        until = {role: NOW + timedelta(days=days) for role, days in self.expires.items()}
        for role in self.versions:
            self.versions[role] += 1
        targets = Targets(self.versions["targets"], expires=until["targets"], targets=dict(self.targets))
        content = self.signed(targets, [keys.get("targets", "targets")])
        (self.folder / f"metadata/{targets.version}.targets.json").write_bytes(content)
        snapshot = Snapshot(
            self.versions["snapshot"], expires=until["snapshot"], meta={"targets.json": meta(targets.version, content)}
        )
        content = self.signed(snapshot, [keys.get("snapshot", "snapshot")])
        (self.folder / f"metadata/{snapshot.version}.snapshot.json").write_bytes(content)
        timestamp = Timestamp(
            self.versions["timestamp"], expires=until["timestamp"], snapshot_meta=meta(snapshot.version, content)
        )
        content = self.signed(timestamp, [keys.get("timestamp", "timestamp")])
        (self.folder / "metadata/timestamp.json").write_bytes(content)

    def copy(self, folder: Path) -> Path:
        """The repository as it is now, elsewhere."""
        shutil.copytree(self.folder, folder)
        return folder


def meta(version: int, content: bytes) -> MetaFile:
    return MetaFile(version, len(content), {"sha384": hashlib.sha384(content).hexdigest()})


@cache
def delta(old: bytes, new: bytes) -> bytes:
    """A difference as `zstd --patch-from` writes it."""
    dictionary = zstandard.ZstdCompressionDict(old, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    return zstandard.ZstdCompressor(dict_data=dictionary, level=19).compress(new)


def flip(path: Path, offset: int = -1) -> None:
    """Turn one bit around (in the middle, unless told where)."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset < 0 else offset] ^= 1
    path.write_bytes(content)


def tools(*names: str) -> bool:
    """Whether programs of the tools tree are here."""
    return all(shutil.which(name) for name in names)
