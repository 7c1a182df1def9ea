"""What TUF says may be installed: metadata fetched, verified against the image's root of trust, and remembered.

python-tuf's client does the verifying. Every run starts in a fresh folder from the root metadata in the (verified)
image; what earlier runs saw is laid beside it, so that older metadata is recognised. A damaged or emptied memory thus
never locks the host out; that it forgets is why the epoch floor exists (floor.py).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Key, Metadata, Root, Signed, TargetFile
from tuf.api.metadata import Targets as TufTargets
from tuf.api.serialization import DeserializationError
from tuf.ngclient import FetcherInterface, Updater, UpdaterConfig

from vmm import atomic
from vmm.errors import Unavailable
from vmm.update.clock import Moment
from vmm.update.errors import Missing, Refused
from vmm.update.source import Source
from vmm.update.targets import Target

ROLES = ("root", "timestamp", "snapshot", "targets")
_LIMITS = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=0,
    root_max_length=64 << 10,
    timestamp_max_length=16 << 10,
    snapshot_max_length=256 << 10,
    targets_max_length=4 << 20,
    app_user_agent=None,
)
"""More than any repository of ours has; an answer that is longer is an attempt to fill the disk."""
_MOST_METADATA = 4 << 20
_MOST_TARGETS = 10_000
_KEY = ("ecdsa", "ecdsa-sha2-nistp384")
"""Type and scheme of every key (FCS_COP.1/Sig); python-tuf knows others."""
_BASE = "metadata/"
_NAME = re.compile(r"metadata/(?:([0-9]{1,9})\.)?(root|timestamp|snapshot|targets)\.json")
_LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)


class RoleSeen(msgspec.Struct, frozen=True):
    """One role's metadata as it was accepted."""

    name: str
    version: int
    expires: str
    expired: bool


class Trusted(msgspec.Struct, frozen=True):
    """What a verified repository says, and how it was found to be fresh."""

    roles: tuple[RoleSeen, ...]
    moment: Moment
    targets: dict[str, Target]

    @property
    def record(self) -> dict[str, Any]:
        """For the audit record."""
        return {
            "metadata": {role.name: {"version": role.version, "expires": role.expires} for role in self.roles},
            "expired": [role.name for role in self.roles if role.expired],
            "time": self.moment.text,
            "time_source": self.moment.origin,
        }


def refresh(source: Source, root: bytes, memory: Path, moment: Moment, *, override_expiry: bool = False) -> Trusted:
    """Fetch and verify the repository's metadata.

    Arguments: ``root`` is the image's root metadata; ``memory`` the folder that keeps what was seen;
    ``override_expiry`` accepts expired metadata, and nothing else that is wrong.
    Raises: Refused naming role and reason; Unavailable.
    """
    memory.mkdir(mode=0o700, parents=True, exist_ok=True)
    work = memory / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700)
    for role in ROLES[1:]:
        if (remembered := memory / f"{role}.json").is_file():
            shutil.copyfile(remembered, work / f"{role}.json")
    fetcher = _Fetcher(source, memory)
    try:
        updater = _updater(work, root, fetcher)
        _set_time(updater, _LONG_AGO if override_expiry else moment.time)
        updater.refresh()
        trusted = _read(work, moment)
    except (tuf_errors.RepositoryError, tuf_errors.DownloadError) as error:
        raise _refusal(error, fetcher.role, moment) from None
    except Missing as error:
        raise Unavailable(error.message) from None
    for version, content in fetcher.roots.items():
        atomic.write(memory / f"{version}.root.json", content, mode=0o600)
    for role in ROLES[1:]:
        atomic.write(memory / f"{role}.json", (work / f"{role}.json").read_bytes(), mode=0o600)
    shutil.rmtree(work)
    return trusted


def _updater(work: Path, root: bytes, fetcher: FetcherInterface) -> Updater:
    # python-tuf 6 takes the root as bootstrap=; 5.1 (trixie) takes whatever lies in the folder.
    (work / "root.json").write_bytes(root)
    return Updater(str(work), _BASE, fetcher=fetcher, config=_LIMITS)


def _set_time(updater: Updater, time: datetime) -> None:
    # The one thing that python-tuf has no parameter for; it would take the system clock, whatever that says.
    updater._trusted_set.reference_time = time


class _Fetcher(FetcherInterface):
    """Reads metadata through a Source; remembers which role was read last, and every root that came by."""

    def __init__(self, source: Source, memory: Path) -> None:
        self._source = source
        self._memory = memory
        self.role = "root"
        self.roots: dict[int, bytes] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        found = _NAME.fullmatch(url)
        if not found:
            raise Refused("TUF", f"the client asks for {url[:200]!r}")
        self.role = found[2]
        try:
            if self.role == "root":
                yield self._root(url, int(found[1]))
            else:
                yield from self._source.read(url, limit=_MOST_METADATA)
        except Missing as error:
            if self.role != "root":
                raise
            raise tuf_errors.DownloadHTTPError(error.message, 404) from None

    def _root(self, path: str, version: int) -> bytes:
        """The root of this version; one seen before counts even if the repository now hides it."""
        try:
            content = b"".join(self._source.read(path, limit=_LIMITS.root_max_length))
        except Missing:
            remembered = self._memory / f"{version}.root.json"
            if not remembered.is_file():
                raise
            content = remembered.read_bytes()
        else:
            self.roots[version] = content
        _check_keys(content)
        return content


def _check_keys(content: bytes) -> None:
    """Refuse a root that names any other kind of key than ours; whether it is a root at all is for TUF to say."""
    try:
        keys = Metadata[Root].from_bytes(content).signed.keys.values()
    except DeserializationError:
        return
    for key in keys:
        if not _is_p384(key):
            raise Refused("TUF root", f"key {key.keyid[:16]} ({key.scheme}) is not ECDSA with P-384 and SHA-384")


def _is_p384(key: Key) -> bool:
    try:
        public = load_pem_public_key(str(key.keyval.get("public", "")).encode())
    except (ValueError, UnsupportedAlgorithm):
        return False
    curve = public.curve if isinstance(public, ec.EllipticCurvePublicKey) else None
    return (key.keytype, key.scheme) == _KEY and isinstance(curve, ec.SECP384R1)


def _read(work: Path, moment: Moment) -> Trusted:
    roles = []
    for name in ROLES:
        signed = cast("Signed", Metadata.from_file(str(work / f"{name}.json")).signed)
        expires = signed.expires.strftime("%Y-%m-%dT%H:%M:%SZ")
        roles.append(RoleSeen(name, signed.version, expires, signed.is_expired(moment.time)))
    targets = cast("TufTargets", Metadata.from_file(str(work / "targets.json")).signed)
    if len(targets.targets) > _MOST_TARGETS:
        raise Refused("TUF targets", f"{len(targets.targets)} targets, more than {_MOST_TARGETS}")
    found = (_target(path, file) for path, file in targets.targets.items())
    return Trusted(tuple(roles), moment, {target.path: target for target in found if target})


def _target(path: str, file: TargetFile) -> Target | None:
    """Our view of a target; None for those that are not written as ours are, which nothing refers to then."""
    custom = file.unrecognized_fields.get("custom")
    known = {"path": path, "length": file.length, "sha384": file.hashes.get("sha384"), "custom": custom}
    try:
        return msgspec.convert(known, Target)
    except msgspec.ValidationError:
        return None


def _refusal(error: Exception, role: str, moment: Moment) -> Exception:
    """What a person is told: which role, and which attack (or neglect) it looks like."""
    text = str(error) or type(error).__name__
    if isinstance(error, tuf_errors.ExpiredMetadataError):
        named = re.search(r"(root|timestamp|snapshot|targets)", text)
        return Refused(
            f"TUF {named[1] if named else role}",
            f"expired: frozen or abandoned repository, or a wrong clock; the time here is {moment.text}",
            hint="If the repository is known to be good, an administrator may override expiry, and only that.",
        )
    if isinstance(error, tuf_errors.DownloadHTTPError):
        return Unavailable(f"TUF {role}: {text}")
    if isinstance(error, tuf_errors.DownloadLengthMismatchError):
        kind = "longer than any such file may be"
    elif isinstance(error, tuf_errors.UnsignedMetadataError):
        kind = "not signed by enough of the right keys"
    elif isinstance(error, tuf_errors.LengthOrHashMismatchError):
        kind = "mixed and matched: not the file that the role above it names"
    elif isinstance(error, tuf_errors.BadVersionNumberError):
        mixed = role == "targets" or text.startswith("Expected snapshot")
        kind = "mixed and matched: not the version that the role above it names" if mixed else "rolled back"
    else:
        kind = "not valid metadata"
    return Refused(f"TUF {role}", f"{kind} ({text[:300]})")
