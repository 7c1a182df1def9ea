"""The update repository: a folder of TUF metadata and targets that any web server can hand out (docs/updates.md).

Clients see a change by its timestamp.json, which is written last; a root.json that changes keys comes when everything
else is signed for the old root and for the new one. So wherever a command is killed, clients find the state before it
or the one after.
"""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tuf.api.exceptions import LengthOrHashMismatchError
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization import DeserializationError

from signing import store
from signing.delta import measure
from signing.roles import KeyRing
from signing.root import ELSEWHERE, LIFETIMES, T, demand, is_signed, sign, successor
from vmm.errors import UserError, die

_LOST = "a key that is rotated must still sign; if it is lost or elsewhere: add-key, let the new key sign, remove-key"


@dataclass(frozen=True)
class State:
    """What the repository says now; every signature, version and hash was checked, expiry was not."""

    root: Metadata[Root]
    timestamp: Metadata[Timestamp]
    snapshot: Metadata[Snapshot]
    targets: Metadata[Targets]

    @property
    def roles(self) -> list[Signed]:
        """What is signed for each role."""
        return [self.root.signed, self.timestamp.signed, self.snapshot.signed, self.targets.signed]


@dataclass(frozen=True)
class Repository:
    """A repository's folder, and how its state changes. Only one holder of ``changing`` at a time may."""

    folder: Path

    @property
    def metadata(self) -> Path:
        """The folder of the roles' metadata."""
        return self.folder / "metadata"

    @property
    def scratch(self) -> Path:
        """For what is not finished; emptied before each change."""
        return self.folder / ".scratch"

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Keep others from changing it. Raises: Conflict; UserError when there is no repository."""
        if not self.metadata.is_dir():
            die(
                f"there is no repository in {self.folder}",
                hint="--repository names one, holdfast-release init makes one",
            )
        with store.locked(self.metadata):
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            try:
                yield
            finally:
                shutil.rmtree(self.scratch, ignore_errors=True)

    def load(self) -> State:
        """Read and check the present state. Raises: UserError naming the file that is missing or wrong."""
        if not (self.metadata / "timestamp.json").exists():
            die(
                f"there is no repository in {self.folder}",
                hint="--repository names one, holdfast-release init makes one",
            )
        root: Metadata[Root] = self._read("1.root.json", "root")
        trusted = [root.signed]
        while True:
            self._demand(root, trusted, root.signed.version)
            name = f"{root.signed.version + 1}.root.json"
            if not (self.metadata / name).exists():
                break
            following: Metadata[Root] = self._read(name, "root")
            if following.signed.version != root.signed.version + 1:
                die(f"{self.metadata / name} has version {following.signed.version}")
            trusted = [root.signed, following.signed]
            root = following
        roots = [root.signed]
        timestamp: Metadata[Timestamp] = self._read("timestamp.json", "timestamp")
        self._demand(timestamp, roots, None)
        reference = timestamp.signed.snapshot_meta
        snapshot: Metadata[Snapshot] = self._read(f"{reference.version}.snapshot.json", "snapshot", reference)
        self._demand(snapshot, roots, reference.version)
        reference = snapshot.signed.meta["targets.json"]
        targets: Metadata[Targets] = self._read(f"{reference.version}.targets.json", "targets", reference)
        self._demand(targets, roots, reference.version)
        return State(root, timestamp, snapshot, targets)

    def _read(self, name: str, kind: str, reference: MetaFile | None = None) -> Metadata[T]:
        path = self.metadata / name
        try:
            data = path.read_bytes()
            if reference:
                reference.verify_length_and_hashes(data)
            metadata = Metadata[T].from_bytes(data)
        except FileNotFoundError:
            die(f"the repository lacks {path}")
        except (DeserializationError, LengthOrHashMismatchError) as error:
            die(f"{path}: {error}")
        if metadata.signed.type != kind:
            die(f"{path} is {metadata.signed.type} metadata")
        return metadata

    def _demand(self, metadata: Metadata[T], roots: Sequence[Root], version: int | None) -> None:
        if version is not None and metadata.signed.version != version:
            die(f"{metadata.signed.type}.json has version {metadata.signed.version}, not {version}")
        if not is_signed(metadata, roots):
            die(
                f"{metadata.signed.type}.json version {metadata.signed.version} in {self.metadata} is not signed as "
                "root.json wants it",
                hint="somebody changed the repository; restore it from a copy that verifies",
            )

    def init(self, root: bytes, ring: KeyRing, time: datetime.datetime) -> State:
        """Make an empty repository whose first root is ``root``, signed by the keys in ``ring``.

        Raises: UserError when there is a repository already, or a role's private key is missing.
        """
        if (self.metadata / "timestamp.json").exists():
            die(f"there is a repository in {self.folder} already")
        for part in (self.metadata, self.folder / "targets"):
            store.make_folder(part)
        first = Metadata[Root].from_bytes(root)
        roots = [first.signed]
        targets = sign(Metadata(Targets(expires=time + LIFETIMES["targets"])), roots, ring)
        data = targets.to_bytes()
        snapshot = Metadata(Snapshot(expires=time + LIFETIMES["snapshot"]))
        snapshot.signed.meta["targets.json"] = _reference(1, data)
        packed = sign(snapshot, roots, ring).to_bytes()
        timestamp = Metadata(Timestamp(expires=time + LIFETIMES["timestamp"], snapshot_meta=_reference(1, packed)))
        sign(timestamp, roots, ring)
        self._put({"1.root.json": root, "1.targets.json": data, "1.snapshot.json": packed})
        self._put({"timestamp.json": timestamp.to_bytes()})
        return self.load()

    def commit(
        self,
        state: State,
        ring: KeyRing,
        time: datetime.datetime,
        *,
        targets: Metadata[Targets] | None = None,
        root: Metadata[Root] | None = None,
        refresh: Collection[str] = (),
    ) -> State:
        """Put new, signed metadata in place, and sign anew what depends on it.

        ``targets`` and ``root`` are the versions after ``state``'s; ``refresh`` names roles (targets, snapshot,
        timestamp) that get a new expiry. Everything is checked against the present root, and against ``root`` if it
        changes, before the first file is written.

        Raises: UserError when a signature is missing or a key for one, or the present root has expired.
        """
        roots = [state.root.signed]
        if root:
            if root.signed.version != roots[0].version + 1:
                die(f"root.json version {root.signed.version} does not follow version {roots[0].version}")
            roots.append(root.signed)
            demand(root, roots, ring)
        elif roots[0].is_expired(time):
            die(
                f"root.json version {roots[0].version} expired on {roots[0].expires}",
                hint="holdfast-release renew-root",
            )
        hint = _LOST if root else ELSEWHERE
        files: dict[str, bytes] = {}
        if targets is None and ("targets" in refresh or not is_signed(state.targets, roots)):
            targets = sign(successor(state.targets, time), roots, ring, hint=hint)
        snapshot = state.snapshot
        if targets or "snapshot" in refresh or not is_signed(snapshot, roots):
            snapshot = successor(snapshot, time)
            if targets:
                demand(targets, roots, ring)
                version = targets.signed.version
                files[f"{version}.targets.json"] = targets.to_bytes()
                snapshot.signed.meta["targets.json"] = _reference(version, files[f"{version}.targets.json"])
            files[f"{snapshot.signed.version}.snapshot.json"] = sign(snapshot, roots, ring, hint=hint).to_bytes()
        last: dict[str, bytes] = {}
        if files or "timestamp" in refresh or not is_signed(state.timestamp, roots):
            timestamp = successor(state.timestamp, time)
            if files:
                version = snapshot.signed.version
                timestamp.signed.snapshot_meta = _reference(version, files[f"{version}.snapshot.json"])
            last["timestamp.json"] = sign(timestamp, roots, ring, hint=hint).to_bytes()
        self._put(files)
        self._put(last)
        if root:
            self._put({f"{root.signed.version}.root.json": root.to_bytes()})
        return self.load()

    def _put(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            store.write(self.metadata / name, data)
        for name, data in files.items():
            if (self.metadata / name).read_bytes() != data:
                die(f"{self.metadata / name} does not read back as it was written", hint="check the disk")

    # -- targets -----------------------------------------------------------------------------------------------------

    def target(self, target: TargetFile) -> Path:
        """Where a target's content lies."""
        return self.folder / "targets" / target.get_prefixed_paths()[0]

    def add_target(self, made: Path, name: str) -> TargetFile:
        """Move a finished file from ``scratch`` to where the target ``name`` will have it. Nobody sees it yet."""
        content = measure(made)
        target = TargetFile(content.size, {"sha384": content.sha384}, name)
        path = self.target(target)
        store.make_folder(path.parent)
        store.settle(made, path)
        return target

    def check_target(self, target: TargetFile) -> Path:
        """Where a target's content lies, once it was read and fits. Raises: UserError naming the file."""
        path = self.target(target)
        try:
            with path.open("rb") as file:
                target.verify_length_and_hashes(file)
        except FileNotFoundError:
            die(f"the repository lacks {path}")
        except LengthOrHashMismatchError:
            die(f"{path} is not what targets.json says", hint="restore it from a copy, or withdraw the release")
        return path

    def prune(self, state: State, time: datetime.datetime, age: datetime.timedelta) -> list[Path]:
        """Delete metadata and targets that nothing refers to and that are older than ``age``; tell which.

        The age leaves clients that are at it with an older state the files they still ask for.
        """
        used = {self.target(target) for target in state.targets.signed.targets.values()}
        used |= {
            self.metadata / f"{part.signed.version}.{part.signed.type}.json" for part in (state.targets, state.snapshot)
        }
        found = [*self.metadata.glob("[0-9]*.targets.json"), *self.metadata.glob("[0-9]*.snapshot.json")]
        found += (self.folder / "targets").glob("*/*")
        gone = [path for path in found if path not in used and path.stat().st_mtime < (time - age).timestamp()]
        for path in gone:
            path.unlink()
        for folder in (self.folder / "targets").iterdir():
            if not any(folder.iterdir()):
                folder.rmdir()
        return sorted(gone)


def _reference(version: int, data: bytes) -> MetaFile:
    return MetaFile.from_data(version, data, ["sha384"])


def parse_root(data: bytes, name: Path) -> Metadata[Root]:
    """A first root.json, checked against itself. Raises: UserError."""
    try:
        root = Metadata[Root].from_bytes(data)
    except DeserializationError as error:
        raise UserError(f"{name}: {error}") from None
    if root.signed.type != "root" or root.signed.version != 1 or not is_signed(root, [root.signed]):
        die(f"{name} is not a root.json of version 1 that two of its root keys signed", hint="restore it from a copy")
    return root
