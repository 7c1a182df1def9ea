"""Which release this host takes: pure decisions over what TUF vouches for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from vmm.update.errors import Refused
from vmm.update.targets import Target, Targets, release_of
from vmm.update.types import Offer, Part, Release, Wave, version_key


class Host(msgspec.Struct, frozen=True):
    """What the choice depends on here. ``failed`` maps versions to why; ``floor`` is the highest blessed epoch."""

    version: str
    epoch: int
    floor: int
    machine_id: str
    channel: str
    failed: Mapping[str, str] = {}


class Candidate(msgspec.Struct, frozen=True):
    """A release that is offered; not more is known yet than what targets.json says."""

    version: str
    target: Target
    offer: Offer


class Choice(msgspec.Struct, frozen=True):
    """The release to take, or None; and what was passed over, newest first, with the reasons."""

    release: Release | None
    passed_over: tuple[tuple[str, Refused], ...] = ()


def place(machine_id: str, version: str) -> int:
    """Where in a rollout this host stands, 0–99: stable for a version, different for each."""
    return int.from_bytes(hashlib.sha256(f"{machine_id}:{version}".encode()).digest()) % 100


def is_open(waves: Sequence[Wave], where: int, now: datetime) -> bool:
    """Whether a wave that includes the place has begun; a release without waves is for all at once."""
    begun = (wave for wave in waves if datetime.fromisoformat(wave.after) <= now)
    return not waves or where < max((wave.share for wave in begun), default=0)


def candidates(targets: Targets) -> list[Candidate]:
    """All releases that are offered in a form we understand, newest first."""
    found = []
    for path, target in targets.items():
        if not (version := release_of(path)):
            continue
        try:
            key = version_key(version)
            offer = msgspec.convert(target.custom, Offer)
            for wave in offer.waves:
                datetime.fromisoformat(wave.after)
        except (ValueError, msgspec.ValidationError):
            continue
        found.append((key, Candidate(version, target, offer)))
    return [candidate for _, candidate in sorted(found, key=lambda pair: pair[0], reverse=True)]


def choose(targets: Targets, load: Callable[[Target], bytes], host: Host, now: datetime) -> Choice:
    """The newest release that this host may take by itself.

    Arguments: ``load`` reads a release.json, verified. Raises: what ``load`` raises: a file that is not the one signed
    is no reason to make do with an older release, which is what somebody may want who spoilt it.
    """
    passed: list[tuple[str, Refused]] = []
    for candidate in candidates(targets):
        if version_key(candidate.version) <= version_key(host.version):
            break
        refused = _offered(candidate, host, now)
        if refused is None:
            content = load(candidate.target)
            try:
                release = read_release(content, candidate.version)
                check_release(release, host)
            except Refused as error:
                refused = error
            else:
                return Choice(release, tuple(passed))
        passed.append((candidate.version, refused))
    return Choice(None, tuple(passed))


def choose_version(
    targets: Targets, load: Callable[[Target], bytes], host: Host, version: str, *, retry_failed: bool = False
) -> Release:
    """The release that an administrator names: neither channel nor waves hold it back, all else does.

    Raises: Refused saying why not; what ``load`` raises.
    """
    found = next((candidate for candidate in candidates(targets) if candidate.version == version), None)
    if found is None:
        raise Refused("TUF targets", f"the repository offers no release {version}")
    if version_key(version) <= version_key(host.version):
        raise Refused(
            "version",
            f"{version} is not newer than the running {host.version}",
            hint="The boot loader starts the newest version; the previous one comes back by a rollback.",
        )
    if version in host.failed and not retry_failed:
        raise _failed(version, host)
    release = read_release(load(found.target), version)
    check_release(release, host)
    return release


def _offered(candidate: Candidate, host: Host, now: datetime) -> Refused | None:
    if candidate.offer.channel != host.channel:
        return Refused("channel", f"{candidate.version} is for the channel {candidate.offer.channel}")
    if candidate.version in host.failed:
        return _failed(candidate.version, host)
    if not is_open(candidate.offer.waves, place(host.machine_id, candidate.version), now.astimezone(UTC)):
        return Refused("wave", f"{candidate.version} is not yet rolled out to this host")
    return None


def _failed(version: str, host: Host) -> Refused:
    return Refused(
        "failed versions",
        f"{version} failed here before: {host.failed[version]}",
        hint="An administrator may ask for it again by name.",
    )


def read_release(content: bytes, version: str) -> Release:
    """A release.json, checked as far as it can be by itself. Raises: Refused."""
    try:
        release = msgspec.json.decode(content, type=Release)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Refused("release.json", f"{version}: {error}") from None
    if release.version != version:
        raise Refused("release.json", f"it describes {release.version} where {version} is expected")
    halves = release.root_hash[:32], release.root_hash[32:]
    if halves != (release.root_uuid.replace("-", ""), release.verity_uuid.replace("-", "")):
        raise Refused("release.json", f"{version}: root_uuid and verity_uuid are not the halves of root_hash")
    for name, part in parts(release):
        wrong = [p for p in (part.target, *part.deltas.values()) if not p.startswith(f"holdfast_{version}/")]
        if wrong:
            raise Refused("release.json", f"{version}: the part {name} lies in another release: {wrong[0]}")
    return release


def check_release(release: Release, host: Host) -> None:
    """Whether this host may go from what it runs to the release. Raises: Refused."""
    if release.epoch < host.floor:
        raise Refused("epoch floor", f"{release.version} has epoch {release.epoch}, below the floor of {host.floor}")
    if release.epoch < host.epoch:
        raise Refused("epoch", f"{release.version} has epoch {release.epoch}, below the running system's {host.epoch}")
    if version_key(host.version) < version_key(release.minimum_source):
        raise Refused(
            "minimum source",
            f"{release.version} can be taken from {release.minimum_source} on, this host runs {host.version}",
        )


def parts(release: Release) -> tuple[tuple[str, Part], ...]:
    """A release's parts by name, in the order in which they are written."""
    held = release.parts
    return ("signature", held.signature), ("verity", held.verity), ("root", held.root), ("uki", held.uki)
