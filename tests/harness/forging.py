"""Repositories as an attacker would like them: metadata of our own changed at will, signed by any development keys."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zstandard
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from image.builder.layout import Layout
from signing import delta, root
from signing.repository import Repository
from signing.roles import KeyRing
from vmm.update.types import Part, Parts, Release

CHANNEL, OTHER_CHANNEL = "stable", "testing"
"""What hosts follow, and what they take nothing from unless it is named."""
_PARTS = ("root", "verity", "signature", "uki")

T = TypeVar("T", Timestamp, Snapshot, Targets)


class Forgery:
    """A copy of a repository. Whatever is changed in its files changes here alone; targets count once published."""

    def __init__(self, origin: Path, folder: Path, keys: Path | None = None) -> None:
        """Arguments: ``folder`` is begun anew, on the same file system; ``keys`` are in place of the build's."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(origin, folder, copy_function=os.link, ignore=shutil.ignore_patterns(".scratch"))
        self.folder = folder
        self._ring = KeyRing(keys or Layout.from_environment().keys)
        self._state = Repository(folder).load()
        self._targets, self._snapshot, self._timestamp = (
            self._state.targets,
            self._state.snapshot,
            self._state.timestamp,
        )
        self._added: dict[str, TargetFile] = dict(self._targets.signed.targets)

    # -- metadata ------------------------------------------------------------------------------------------------------

    def publish(
        self, *, by: Mapping[str, str] | None = None, expires: Mapping[str, datetime.datetime] | None = None
    ) -> None:
        """Sign the next version of every role. ``by`` names keys other than a role's own, ``expires`` other times."""
        keys, times = by or {}, expires or {}

        def sign(following: Metadata[T]) -> bytes:
            role = following.signed.type
            following.signed.expires = times.get(role, following.signed.expires)
            following.sign(self._ring.signer(keys.get(role, role)))
            return following.to_bytes()

        time = root.now()
        self._targets = root.successor(self._targets, time)
        self._targets.signed.targets = dict(self._added)
        content = sign(self._targets)
        self._write(f"{self._targets.signed.version}.targets.json", content)
        self._snapshot = root.successor(self._snapshot, time)
        self._snapshot.signed.meta["targets.json"] = _meta(self._targets.signed.version, content)
        content = sign(self._snapshot)
        self._write(f"{self._snapshot.signed.version}.snapshot.json", content)
        self._timestamp = root.successor(self._timestamp, time)
        self._timestamp.signed.snapshot_meta = _meta(self._snapshot.signed.version, content)
        self._write("timestamp.json", sign(self._timestamp))

    def new_root(self, *names: str, timestamp: SSlibKey | None = None) -> None:
        """The next root.json, signed by these keys; ``timestamp`` is a further key of that role."""
        following = root.successor(self._state.root, root.now())
        if timestamp is not None:
            following.signed.add_key(timestamp, "timestamp")
        for name in names:
            following.sign(self._ring.signer(name), append=True)
        self._write(f"{following.signed.version}.root.json", following.to_bytes())

    def metadata(self, role: str, *, age: int = 0) -> Path:
        """The file of a role that the timestamp leads to, or of so many versions before."""
        if role == "timestamp":
            return self.folder / "metadata/timestamp.json"
        signed = self._snapshot.signed if role == "snapshot" else self._targets.signed
        return self.folder / f"metadata/{signed.version - age}.{role}.json"

    def _write(self, name: str, content: bytes) -> None:
        replace(self.folder / "metadata" / name, content)

    # -- releases ------------------------------------------------------------------------------------------------------

    def release(
        self,
        version: str,
        *,
        epoch: int = 1,
        channel: str = CHANNEL,
        root_size: int = 20_000,
        stated: Mapping[str, int] | None = None,
    ) -> None:
        """Add a small release of which nothing would start; ``stated`` are sizes of parts that are not true."""
        sizes = dict.fromkeys(_PARTS, 2000) | {"root": root_size}
        described = {}
        for name in _PARTS:
            plain = hashlib.shake_256(f"{version} {name}".encode()).digest(sizes[name])
            target = f"holdfast_{version}/{name}.zst"
            self.put(target, zstandard.compress(plain))
            described[name] = Part((stated or {}).get(name, len(plain)), hashlib.sha384(plain).hexdigest(), target)
        digest = hashlib.sha256(version.encode()).hexdigest()
        made = Release(
            format=1,
            version=version,
            epoch=epoch,
            minimum_source="0.0.1",
            root_hash=digest,
            root_uuid=_uuid(digest[:32]),
            verity_uuid=_uuid(digest[32:]),
            signature_uuid=_uuid(hashlib.sha256(digest.encode()).hexdigest()[:32]),
            pcr11="0" * 64,
            parts=Parts(**described),
        )
        self._describe(made, {"channel": channel, "waves": []})

    def other_root(self, version: str, plain: Path, base: Path, base_version: str) -> None:
        """Have a release's root be another, with a delta from the ``base``; all else in it stays, its root hash too."""
        path = f"holdfast_{version}/release.json"
        known = self._added[path]
        release = msgspec.json.decode(self.stored(path).read_bytes(), type=Release)
        target, difference = f"holdfast_{version}/root.other.zst", f"holdfast_{version}/root.other.from.zst"
        scratch = self.folder / "delta"
        assert delta.make_delta(base, plain, scratch)
        self.put(difference, scratch.read_bytes())
        scratch.unlink()
        content = plain.read_bytes()
        self.put(target, zstandard.ZstdCompressor(level=1, threads=-1).compress(content))
        part = Part(len(content), hashlib.sha384(content).hexdigest(), target, {base_version: difference})
        parts = msgspec.structs.replace(release.parts, root=part)
        self._describe(msgspec.structs.replace(release, parts=parts), known.unrecognized_fields["custom"])

    def put(self, path: str, content: bytes, custom: Any = None) -> None:
        """Add a target; it takes the place of one with the same path."""
        file = TargetFile.from_data(path, content, ["sha384"])
        if custom is not None:
            file.unrecognized_fields["custom"] = custom
        self._added[path] = file
        self.stored(path).parent.mkdir(exist_ok=True)
        replace(self.stored(path), content)

    def stored(self, path: str) -> Path:
        """Where a target lies."""
        return Repository(self.folder).target(self._added[path])

    def _describe(self, release: Release, custom: Any) -> None:
        self.put(f"holdfast_{release.version}/release.json", msgspec.json.encode(release), custom)


def replace(path: Path, content: bytes) -> None:
    """Write a file anew, so that other copies that share its content keep theirs."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def flip(path: Path) -> None:
    """Turn around one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    replace(path, bytes(content))


def _meta(version: int, content: bytes) -> MetaFile:
    return MetaFile.from_data(version, content, ["sha384"])


def _uuid(digits: str) -> str:
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
