"""What TUF refuses, and whether it says so: the attack table, row by row."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from tests.unit.test_update_rig import NOW, SECONDS, Repository, flip, signer
from vmm.errors import Unavailable, UserError
from vmm.update import clock, trust
from vmm.update.clock import Moment
from vmm.update.errors import Refused
from vmm.update.source import DirectorySource

HERE = Moment(SECONDS, "clock")


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    made = Repository(tmp_path / "repository")
    made.add("1.1.0")
    made.publish()
    return made


def look(
    repository: Repository, folder: Path | None = None, *, moment: Moment = HERE, override: bool = False
) -> trust.Trusted:
    memory = repository.folder.parent / "memory"
    source = DirectorySource(folder or repository.folder)
    return trust.refresh(source, repository.root_json, memory, moment, override_expiry=override)


def test_a_good_repository(repository: Repository) -> None:
    trusted = look(repository)
    assert {role.name: role.version for role in trusted.roles} == dict.fromkeys(trust.ROLES, 1)
    assert trusted.targets["holdfast_1.1.0/release.json"].custom == {"channel": "stable", "waves": []}
    assert trusted.record["time_source"] == "clock" and trusted.record["expired"] == []
    assert look(repository) == trusted


def test_older_repository(repository: Repository, tmp_path: Path) -> None:
    older = repository.copy(tmp_path / "older")
    repository.publish()
    look(repository)
    with pytest.raises(Refused, match="TUF timestamp: rolled back"):
        look(repository, older)
    # Not even after the part that says so most directly is lost.
    (tmp_path / "memory/timestamp.json").write_bytes(b"")
    with pytest.raises(Refused, match="TUF snapshot: rolled back"):
        look(repository, older)


def test_frozen_repository(repository: Repository) -> None:
    late = Moment(SECONDS + 8 * 86400, "seen")
    with pytest.raises(Refused, match=r"TUF timestamp: expired.*2026-12-09.*the last time seen"):
        look(repository, moment=late)
    with pytest.raises(Refused, match="TUF timestamp: expired"):
        look(repository)
        look(repository, moment=late)
    trusted = look(repository, moment=late, override=True)
    assert [role.name for role in trusted.roles if role.expired] == ["timestamp"]
    assert trusted.record["expired"] == ["timestamp"]


@pytest.mark.parametrize("role", ["root", "snapshot", "targets"])
def test_each_role_expires(repository: Repository, role: str) -> None:
    repository.expires = dict.fromkeys(repository.expires, 1000)
    repository.root.expires = NOW + timedelta(days=1000)
    repository.expires[role] = 1
    if role == "root":
        repository.root.expires = NOW + timedelta(days=1)
    repository.root.version = 2
    repository.write_root(("root1", "root2"))
    repository.publish()
    with pytest.raises(Refused, match=f"TUF {role}: expired"):
        look(repository, moment=Moment(SECONDS + 2 * 86400, "clock"))


def test_override_is_of_expiry_only(repository: Repository, tmp_path: Path) -> None:
    older = repository.copy(tmp_path / "older")
    repository.publish()
    look(repository)
    with pytest.raises(Refused, match="rolled back"):
        look(repository, older, override=True)
    flip(repository.folder / "metadata/timestamp.json")
    with pytest.raises(Refused, match="TUF timestamp"):
        look(repository, override=True)


def test_mixed_and_matched(repository: Repository, tmp_path: Path) -> None:
    older = repository.copy(tmp_path / "older")
    repository.add("1.2.0")
    repository.publish()
    metadata = repository.folder / "metadata"
    for role in ("targets", "snapshot"):
        kept = (metadata / f"2.{role}.json").read_bytes()
        shutil.copyfile(older / f"metadata/1.{role}.json", metadata / f"2.{role}.json")
        with pytest.raises(Refused, match=f"TUF {role}: (mixed and matched|longer)"):
            look(repository)
        (metadata / f"2.{role}.json").write_bytes(kept)
    look(repository)


def test_endless_data(repository: Repository) -> None:
    for name in ("timestamp.json", "1.snapshot.json", "1.targets.json", "2.root.json"):
        path = repository.folder / "metadata" / name
        kept = path.read_bytes() if path.exists() else None
        with path.open("ab") as file:
            file.truncate(5 << 20)
        with pytest.raises(Refused, match="length: |longer than any"):
            look(repository)
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(kept)
    # A little longer than allowed, but not so much that the source itself refuses.
    with (repository.folder / "metadata/timestamp.json").open("ab") as file:
        file.write(b" " * (20 << 10))
    with pytest.raises(Refused, match="TUF timestamp: longer than any"):
        look(repository)


@pytest.mark.parametrize("keys", [("root1",), ("root1", "stranger"), ("root3",), ()])
def test_new_root_without_enough_signatures(repository: Repository, keys: tuple[str, ...]) -> None:
    repository.root.version = 2
    repository.write_root(keys)
    with pytest.raises(Refused, match="TUF root: not signed by enough"):
        look(repository)


def test_new_root_skips_no_version(repository: Repository) -> None:
    repository.root.version = 3
    content = repository.write_root(("root1", "root2"))
    look(repository)
    (repository.folder / "metadata/2.root.json").write_bytes(content)
    with pytest.raises(Refused, match="TUF root: rolled back"):
        look(repository)


@pytest.mark.parametrize(
    ("role", "key"),
    [("timestamp", "snapshot"), ("snapshot", "timestamp"), ("targets", "snapshot"), ("targets", "stranger")],
)
def test_a_role_signed_by_the_key_of_another(repository: Repository, role: str, key: str) -> None:
    repository.publish(**{role: key})
    with pytest.raises(Refused, match=f"TUF {role}: not signed"):
        look(repository)


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json"])
def test_every_bit_of_metadata_counts(repository: Repository, name: str) -> None:
    path = repository.folder / "metadata" / name
    content = path.read_bytes()
    role = name.removesuffix(".json").removeprefix("1.")
    for position in range(0, len(content), max(len(content) // 40, 1)):
        flip(path, position)
        with pytest.raises(Refused, match=f"TUF {role}"):
            look(repository)
        path.write_bytes(content)
    look(repository)


def test_rotation_is_followed_and_not_forgotten(repository: Repository) -> None:
    """A repository that hides a newer root, to go on with a key that was replaced, is found out."""
    before = repository.copy(repository.folder.parent / "before")
    repository.root.revoke_key(signer("timestamp").public_key.keyid, "timestamp")
    repository.root.add_key(signer("timestamp2").public_key, "timestamp")
    repository.root.version = 2
    repository.write_root(("root1", "root2"))
    repository.publish(timestamp="timestamp2")
    assert look(repository).roles[0].version == 2
    with pytest.raises(Refused, match="TUF timestamp: not signed"):
        look(repository, before)


def test_emptied_memory_is_no_obstacle(repository: Repository, tmp_path: Path) -> None:
    """It does forget: an older repository passes, which is what the epoch floor is for (test_update_work)."""
    older = repository.copy(tmp_path / "older")
    repository.publish()
    look(repository)
    for path in (tmp_path / "memory").iterdir():
        path.write_bytes(b"")
    look(repository, older)
    look(repository)


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 10_000, b'{"signed": 1}', b"\xff" * 100, b"null"])
def test_nonsense(repository: Repository, content: bytes) -> None:
    for name in ("timestamp.json", "1.snapshot.json", "1.targets.json", "2.root.json"):
        path = repository.folder / "metadata" / name
        kept = path.read_bytes() if path.exists() else None
        path.write_bytes(content)
        with pytest.raises(UserError, match="TUF"):
            look(repository)
        if kept is None:
            path.unlink()
        else:
            path.write_bytes(kept)


def test_missing_files(repository: Repository) -> None:
    for name in ("timestamp.json", "1.snapshot.json", "1.targets.json"):
        path = repository.folder / "metadata" / name
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(Unavailable, match=name):
            look(repository)
        path.write_bytes(content)


def test_another_repository(repository: Repository, tmp_path: Path) -> None:
    other = Repository(tmp_path / "other", prefix="other-")
    other.publish()
    with pytest.raises(Refused, match="TUF timestamp: not signed"):
        look(repository, other.folder)


def test_links_and_pipes_in_a_folder(repository: Repository, tmp_path: Path) -> None:
    path = repository.folder / "metadata/timestamp.json"
    path.rename(tmp_path / "elsewhere.json")
    make: list[Callable[[], object]] = [lambda: path.symlink_to(tmp_path / "elsewhere.json"), path.mkdir]
    for each in make:
        each()
        with pytest.raises(Refused, match="no plain file"):
            look(repository)
        path.unlink() if path.is_symlink() else path.rmdir()


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "metadata/../../x", "a//b", ".hidden", "a/.b", "x" * 300, "a b"]
)
def test_paths_stay_inside(tmp_path: Path, path: str) -> None:
    with pytest.raises(Refused, match="not a path inside"):
        list(DirectorySource(tmp_path).read(path, limit=1))


def test_the_best_known_time() -> None:
    assert clock.best(100, 50, 70) == Moment(100, "clock")
    assert clock.best(0, 50, 40) == Moment(50, "image")
    assert clock.best(10, 50, 60).text == "1970-01-01T00:01:00Z (the last time seen)"
