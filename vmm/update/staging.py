"""Bringing a release's parts into the staging folder: fetched, unpacked, and bit for bit what was signed.

Only root can enter the folder. A part under its final name is whole; what is on its way is called otherwise and is
either continued or begun anew. systemd-sysupdate finds the parts by the names that they get here.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vmm import atomic
from vmm.errors import Unavailable, UserError
from vmm.update import files, targets
from vmm.update.base import Bases
from vmm.update.choice import parts, read_release
from vmm.update.errors import Cancelled, NoRoom, Refused
from vmm.update.job import Job
from vmm.update.source import Source
from vmm.update.targets import Target, Targets
from vmm.update.types import Part, Release
from vmm.update.unpack import unpack

_RELEASE = "release.json"
_WHERE = "staging on the data volume"
_ATTEMPTS = 5
_PAUSE_S = 2.0


@dataclass(frozen=True)
class Brought:
    """How a part came here, for the audit record: packed ``bytes`` fetched, and the base's version if by a delta."""

    part: str
    sha384: str
    bytes: int
    base: str


@dataclass(frozen=True)
class Origin:
    """Where parts come from: a source, what TUF vouches for in it, and the ``running`` version with its parts."""

    source: Source
    vouched: Targets
    running: str
    bases: Bases


@dataclass(frozen=True)
class _Order:
    """One part that is to be brought, and where it shall lie."""

    name: str
    part: Part
    final: Path


Ways = list[tuple[str, Target]]
"""How a part may come: (base version or "", target), the one to try first in front."""


def names(release: Release) -> dict[str, str]:
    """A part's file name in staging, by part."""
    version = release.version
    return {
        "signature": f"holdfast_{version}_{release.signature_uuid}.signature.raw",
        "verity": f"holdfast_{version}_{release.verity_uuid}.verity.raw",
        "root": f"holdfast_{version}_{release.root_uuid}.root.raw",
        "uki": f"holdfast_{version}.efi",
    }


class Staging:
    """The staging folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, release: Release, part: str) -> Path:
        """Where a part lies once it is whole."""
        return self.folder / names(release)[part]

    def prepare(self) -> None:
        """Make the folder. Raises: Refused if others could enter it; OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise Refused("staging", f"{self.folder} must be a folder that only the updater can enter")

    def staged(self) -> Release | None:
        """The release that is here as a whole, or None."""
        try:
            content = (self.folder / _RELEASE).read_bytes()
            version = str(msgspec.json.decode(content)["version"])
            return read_release(content, version)
        except (OSError, UserError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError, TypeError):
            return None

    def clear(self, keep: Iterable[str] = ()) -> None:
        """Remove all files but those named; the mark of completeness first. Raises: OSError."""
        kept = set(keep)
        (self.folder / _RELEASE).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if path.name not in kept:
                path.unlink()
        atomic.sync_folder(self.folder)

    def verify(self, release: Release, job: Job) -> None:
        """Hash all parts once more, before they are used. Raises: Refused; Cancelled; OSError."""
        job.expect(sum(part.size for _, part in parts(release)))
        for name, part in parts(release):
            path = self.path(release, name)
            if path.stat().st_size != part.size or files.sha384(path, tick=job.advance) != part.sha384:
                self.clear()
                raise Refused("staging", f"{path.name} is no longer what was downloaded", hint="Download it again.")

    def bring(self, release: Release, origin: Origin, job: Job) -> list[Brought]:
        """Bring every part that is not here yet, as a difference to the running version where one is offered.

        Raises: NoRoom with figures, before anything is fetched; Refused; Unavailable; Cancelled; OSError.
        """
        self.prepare()
        final = names(release)
        wanted = [(name, part, _ways(part, origin)) for name, part in parts(release)]
        partial = {_partial(target) for _, _, ways in wanted for _, target in ways}
        self.clear(keep={*final.values(), *partial})
        missing = [item for item in wanted if not _is_whole(self.folder / final[item[0]], item[1])]
        self._check_room(missing)
        job.expect(sum(ways[0][1].length for _, _, ways in missing))
        brought = [
            self._bring(_Order(name, part, self.folder / final[name]), ways, origin, job)
            for name, part, ways in missing
        ]
        self.clear(keep=final.values())
        atomic.write(self.folder / _RELEASE, msgspec.json.encode(release), mode=0o600)
        return brought

    def _check_room(self, missing: list[tuple[str, Part, Ways]]) -> None:
        needed = files.RESERVE if missing else 0
        for _, part, ways in missing:
            target = ways[0][1]
            have = self.folder / _partial(target)
            needed += part.size + max(target.length - (have.stat().st_size if have.exists() else 0), 0)
        files.need(_WHERE, needed, files.free(self.folder))

    def _bring(self, order: _Order, ways: Ways, origin: Origin, job: Job) -> Brought:
        for base, target in ways:
            try:
                self._make(order, base, target, origin, job)
            except (Cancelled, NoRoom):
                raise
            except (UserError, OSError, MemoryError) as error:
                # Whatever is wrong with a difference, the whole part is still to be had.
                if target is ways[-1][1]:
                    raise
                # When only the server is away, the next run goes on with what has come.
                if not isinstance(error, Unavailable):
                    (self.folder / _partial(target)).unlink(missing_ok=True)
                files.need(_WHERE, ways[-1][1].length + order.part.size, files.free(self.folder))
            else:
                return Brought(order.name, order.part.sha384, target.length, base)
        raise AssertionError("the last way returns or raises")

    def _make(self, order: _Order, base: str, target: Target, origin: Origin, job: Job) -> None:
        packed = self.folder / _partial(target)
        temporary = order.final.with_name(f".{order.final.name}.new")

        def tick(_: int) -> None:
            job.check()

        if base:
            with origin.bases(order.name, _size_of(origin, base, order.name)) as content:
                fetch(origin.source, target, packed, job)
                digest = unpack(packed, temporary, order.part.size, base=content, tick=tick)
        else:
            fetch(origin.source, target, packed, job)
            digest = unpack(packed, temporary, order.part.size, tick=tick)
        if digest != order.part.sha384:
            temporary.unlink()
            packed.unlink()
            raise Refused("unpacking", f"{target.path} unpacks to something else than the release says")
        files.publish(temporary, order.final)
        packed.unlink()


def _ways(part: Part, origin: Origin) -> Ways:
    whole = "", targets.find(origin.vouched, part.target)
    delta = origin.vouched.get(part.deltas.get(origin.running, ""))
    return [(origin.running, delta), whole] if delta and delta.length < whole[1].length else [whole]


def _is_whole(path: Path, part: Part) -> bool:
    try:
        return path.stat().st_size == part.size and files.sha384(path) == part.sha384
    except OSError:
        return False


def _partial(target: Target) -> str:
    """What a packed part is called while it comes; the hash in it says what it will be."""
    return f"{target.path.rpartition('/')[2]}.{target.sha384}.part"


def _size_of(origin: Origin, version: str, part: str) -> int | None:
    """A part's plain size in an older release, if the repository still holds that release."""
    target = origin.vouched.get(f"holdfast_{version}/release.json")
    if target is None:
        return None
    try:
        release = read_release(targets.read(origin.source, target, limit=targets.MOST_RELEASE_JSON), version)
    except UserError:
        return None
    return dict(parts(release))[part].size


def fetch(source: Source, target: Target, path: Path, job: Job) -> None:
    """Download a target into a file, continuing what is there, and check it as a whole.

    Raises: Refused when it is not what was signed (the file is gone then); Unavailable; Cancelled; OSError.
    """
    kept = 0
    for attempt in range(_ATTEMPTS):
        have = _usable(path, target)
        try:
            length, digest = _append(source, target, path, have, job)
            try:
                targets.check(target, length, digest)
            except Refused:
                path.unlink()
                # What an interrupted run left may not be what it once wrote; only a fresh copy is judged.
                if have == 0:
                    raise
                continue
            return
        except Unavailable:
            # Worth another attempt only while the file grows.
            now = _usable(path, target)
            if attempt + 1 == _ATTEMPTS or now <= max(have, kept):
                raise
            kept = now
            job.wait(_PAUSE_S)
    raise Unavailable(f"{target.path} could not be downloaded in {_ATTEMPTS} attempts")


def _usable(path: Path, target: Target) -> int:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return 0
    if not stat.S_ISREG(found.st_mode) or found.st_size > target.length:
        path.unlink()
        return 0
    return found.st_size


def _append(source: Source, target: Target, path: Path, have: int, job: Job) -> tuple[int, str]:
    digest = hashlib.sha384()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "r+b", buffering=0) as file:
        while piece := file.read(files.CHUNK):
            digest.update(piece)
        job.advance(have)
        length = have
        if have < target.length:
            for piece in source.read(target.stored, offset=have, limit=target.length - have):
                file.write(piece)
                digest.update(piece)
                length += len(piece)
                job.advance(len(piece))
        os.fsync(descriptor)
    return length, digest.hexdigest()
