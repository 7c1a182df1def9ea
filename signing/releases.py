"""Releases in the repository: what is on offer, and the next targets.json (not signed yet) that changes it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tuf.api.metadata import Metadata, TargetFile, Targets

from signing import delta
from signing.built import FILES, Built
from signing.repository import Repository, State
from signing.root import successor
from vmm.errors import NotFound, UserError, die
from vmm.update.types import Offer, Part, Parts, Release, Wave, version_key

DELTA_SOURCES = 2
"""Deltas are made from so many releases before."""

_WORTH = 0.75
"""A delta is left out unless it is smaller than this share of the packed part: it costs a host memory."""

_HIGHEST = "holdfast"
"""The field of targets.json that remembers what was ever published, withdrawn releases included."""


class Highest(msgspec.Struct, frozen=True):
    """The highest version and epoch ever published."""

    version: str = "0.0.0"
    epoch: int = 0


@dataclass(frozen=True)
class Offered:
    """A release in the repository."""

    release: Release
    offer: Offer
    targets: dict[str, TargetFile]
    """All its targets, by name."""

    @property
    def full_size(self) -> int:
        """Bytes to download for the whole release, packed."""
        return sum(self.targets[part.target].length for part in parts_of(self.release).values())

    def delta_size(self, source: str) -> int:
        """Bytes to download from version ``source`` on; parts without a delta count whole."""
        return sum(
            self.targets[part.deltas.get(source, part.target)].length for part in parts_of(self.release).values()
        )

    @property
    def sources(self) -> list[str]:
        """The versions that there are deltas from, oldest first."""
        found = {version for part in parts_of(self.release).values() for version in part.deltas}
        return sorted(found, key=version_key)


def parts_of(release: Release) -> dict[str, Part]:
    """A release's parts by name."""
    return {name: getattr(release.parts, name) for name in FILES}


def highest(targets: Targets) -> Highest:
    """The highest version and epoch ever published. Raises: UserError when the field cannot be read."""
    try:
        return msgspec.convert(targets.unrecognized_fields.get(_HIGHEST, {}), Highest)
    except msgspec.ValidationError as error:
        raise UserError(f"targets.json: {_HIGHEST}: {error}") from None


def offered(repository: Repository, targets: Targets) -> list[Offered]:
    """All releases on offer, oldest first; their release.json is read and checked, their parts are not.

    Raises: UserError naming the release.json that is missing, damaged or incomplete.
    """
    found = []
    for name, target in targets.targets.items():
        folder, _, file = name.partition("/")
        if file != "release.json":
            continue
        path = repository.check_target(target)
        try:
            release = msgspec.json.decode(path.read_bytes(), type=Release)
            offer = msgspec.convert(target.custom, Offer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}") from None
        own = {other: targets.targets[other] for other in targets.targets if other.startswith(f"{folder}/")}
        for part in parts_of(release).values():
            for wanted in (part.target, *part.deltas.values()):
                if wanted not in own:
                    die(f"{path} names the target {wanted}, which targets.json does not have")
        if folder != f"holdfast_{release.version}":
            die(f"{path} is release.json of version {release.version}, in the folder of another")
        found.append(Offered(release, offer, own))
    return sorted(found, key=lambda item: version_key(item.release.version))


def published(repository: Repository, targets: Targets, version: str) -> Offered:
    """The release of a version. Raises: NotFound when it is not on offer."""
    for item in offered(repository, targets):
        if item.release.version == version:
            return item
    raise NotFound(f"version {version} is not in the repository", hint="holdfast-release list shows what is")


def publish(
    repository: Repository, state: State, built: Built, offer: Offer, time: datetime.datetime
) -> Metadata[Targets]:
    """Pack a release, make deltas from the releases before, and put the files into the repository, unseen yet.

    Returns: the next targets.json, not signed, that offers the release.
    Raises: UserError when the version is not newer than every one before, or the epoch lower.
    """
    manifest, ever = built.manifest, highest(state.targets.signed)
    if version_key(manifest.version) <= version_key(ever.version):
        die(
            f"version {manifest.version} is not newer than {ever.version}, which was published before",
            hint="a version number is used once, also after the release was withdrawn; build with a higher VERSION",
        )
    if manifest.epoch < ever.epoch:
        die(
            f"epoch {manifest.epoch} is below {ever.epoch}, which was published before",
            hint="build with a higher EPOCH",
        )
    if version_key(manifest.minimum_source) > version_key(manifest.version):
        die(f"minimum_source {manifest.minimum_source} is newer than the release itself, {manifest.version}")
    sources = offered(repository, state.targets.signed)[-DELTA_SOURCES:]
    added: list[TargetFile] = []
    parts = {name: _add_part(repository, built, name, sources, added) for name in FILES}
    release = Release(
        format=1,
        version=manifest.version,
        epoch=manifest.epoch,
        minimum_source=manifest.minimum_source,
        root_hash=manifest.root_hash,
        root_uuid=manifest.root_uuid,
        verity_uuid=manifest.verity_uuid,
        signature_uuid=manifest.signature_uuid,
        pcr11=manifest.pcr11,
        parts=Parts(**parts),
        db_append=manifest.db_append,
    )
    encoded = msgspec.json.encode(release)
    try:
        msgspec.json.decode(encoded, type=Release)
    except msgspec.ValidationError as error:
        die(f"hosts would not take this release.json: {error}")
    made = repository.scratch / "release.json"
    made.write_bytes(encoded)
    description = repository.add_target(made, f"holdfast_{manifest.version}/release.json")
    description.unrecognized_fields["custom"] = msgspec.to_builtins(offer)
    following = successor(state.targets, time)
    following.signed.targets |= {target.path: target for target in (*added, description)}
    following.signed.unrecognized_fields[_HIGHEST] = msgspec.to_builtins(
        Highest(manifest.version, max(manifest.epoch, ever.epoch))
    )
    return following


def _add_part(
    repository: Repository, built: Built, name: str, sources: Sequence[Offered], added: list[TargetFile]
) -> Part:
    plain, folder = built.part(name), f"holdfast_{built.manifest.version}"
    content = delta.measure(plain)
    packed = repository.scratch / f"{name}.zst"
    delta.pack(plain, packed)
    _check_unpacked(delta.unpack(packed), content, packed)
    full = repository.add_target(packed, f"{folder}/{name}.zst")
    added.append(full)
    deltas = {}
    for source in sources:
        old, difference = repository.scratch / f"{name}.old", repository.scratch / f"{name}.delta"
        recover_part(repository, source, name, old)
        if delta.make_delta(old, plain, difference) and difference.stat().st_size < full.length * _WORTH:
            _check_unpacked(delta.unpack(difference, old=old), content, difference)
            version = source.release.version
            added.append(repository.add_target(difference, f"{folder}/{name}.from-{version}.zst"))
            deltas[version] = added[-1].path
    return Part(size=content.size, sha384=content.sha384, target=full.path, deltas=deltas)


def recover_part(repository: Repository, item: Offered, name: str, plain: Path) -> None:
    """Unpack a part of a published release into ``plain``. Raises: UserError when it is damaged or missing."""
    part = parts_of(item.release)[name]
    packed = repository.check_target(item.targets[part.target])
    _check_unpacked(delta.unpack(packed, plain), delta.Content(part.size, part.sha384), packed)


def _check_unpacked(found: delta.Content, wanted: delta.Content, packed: Path) -> None:
    if found != wanted:
        die(f"{packed} unpacks to other bytes than those that were packed", hint="check memory and disk")


def check_release(repository: Repository, item: Offered) -> None:
    """Read every file of a release as hosts do: hashes packed and unpacked. Raises: UserError naming the file."""
    for target in item.targets.values():
        repository.check_target(target)
    for part in parts_of(item.release).values():
        packed = repository.target(item.targets[part.target])
        _check_unpacked(delta.unpack(packed), delta.Content(part.size, part.sha384), packed)


def withdraw(repository: Repository, state: State, version: str, time: datetime.datetime) -> Metadata[Targets]:
    """The next targets.json, not signed, without a release. Raises: NotFound when it is not on offer."""
    gone = published(repository, state.targets.signed, version).targets
    following = successor(state.targets, time)
    for name in gone:
        del following.signed.targets[name]
    return following


def set_offer(
    repository: Repository,
    state: State,
    version: str,
    waves: tuple[Wave, ...],
    channel: str | None,
    time: datetime.datetime,
) -> Metadata[Targets]:
    """The next targets.json, not signed, that offers a release in these waves; without a channel it keeps its own.

    Raises: NotFound when the release is not on offer.
    """
    item = published(repository, state.targets.signed, version)
    following = successor(state.targets, time)
    target = following.signed.targets[f"holdfast_{version}/release.json"]
    target.unrecognized_fields["custom"] = msgspec.to_builtins(Offer(channel or item.offer.channel, waves))
    return following


def parse_waves(texts: Sequence[str], time: datetime.datetime) -> tuple[Wave, ...]:
    """Waves as people write them: SHARE@TIME, a percentage and RFC 3339 in UTC, or ``now``.

    Raises: UserError naming the wave that is wrong, or that does not reach more hosts later than the one before.
    """
    waves: list[Wave] = []
    for text in texts:
        share, _, after = text.partition("@")
        if after == "now":
            after = time.strftime("%Y-%m-%dT%H:%M:%SZ")
        try:
            wave = msgspec.convert({"share": int(share), "after": after}, Wave)
            datetime.datetime.fromisoformat(after)
        except (ValueError, msgspec.ValidationError):
            die(f"wave {text!r} is not SHARE@TIME", hint="for example 10@2026-12-01T00:00:00Z, or 10@now")
        if waves and (wave.share <= waves[-1].share or wave.after <= waves[-1].after):
            die(f"wave {text!r} does not reach more hosts, later, than the one before it")
        waves.append(wave)
    return tuple(waves)
