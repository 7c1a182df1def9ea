"""Publishing: from a release folder to what clients are offered."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import msgspec
import pytest
from tuf.api.exceptions import ExpiredMetadataError
from tuf.api.metadata import Metadata, Root

from signing import cli
from signing.releases import offered
from signing.repository import Repository
from signing.root import LIFETIMES, now
from tests.unit.test_publish_rig import Rig, fake_uki, noise, rig, rig_template
from vmm.errors import Conflict, NotFound, UserError
from vmm.update.types import Offer, Release, Wave

__all__ = ["rig", "rig_template"]


def changed(root: bytes, seed: int = 1) -> bytes:
    """A root of which a few blocks differ."""
    blocks = noise(seed, 8192)
    return root[:65536] + blocks + root[65536 + len(blocks) :]


def release_of(rig: Rig, version: str) -> tuple[Release, Offer]:
    """release.json as it lies in the repository, and who is offered it."""
    repository = Repository(rig.repository)
    found = {item.release.version: item for item in offered(repository, repository.load().targets.signed)}
    return found[version].release, found[version].offer


# -- the repository --------------------------------------------------------------------------------------------------


def test_a_new_repository_is_as_documented(rig: Rig) -> None:
    """Roles, keys, thresholds and expiries of docs/updates.md; the key set's root.json is the repository's first."""
    assert rig.seen() == {}
    data = (rig.keys / "root.json").read_bytes()
    assert (rig.repository / "metadata/1.root.json").read_bytes() == data
    root = Metadata[Root].from_bytes(data)
    assert {name: (len(role.keyids), role.threshold) for name, role in root.signed.roles.items()} == {
        "root": (3, 2),
        "targets": (1, 1),
        "snapshot": (1, 1),
        "timestamp": (1, 1),
    }
    assert {key.scheme for key in root.signed.keys.values()} == {"ecdsa-sha2-nistp384"}
    assert root.signed.consistent_snapshot
    for part in Repository(rig.repository).load().roles:
        assert abs(part.expires - now() - LIFETIMES[part.type]) < datetime.timedelta(minutes=10)


def test_init_does_not_replace(rig: Rig) -> None:
    """Neither a repository nor a key set's root.json is ever made twice."""
    before = (rig.keys / "root.json").read_bytes()
    with pytest.raises(UserError, match="already"):
        rig.release("init")
    rig.release("root")
    assert (rig.keys / "root.json").read_bytes() == before


def test_commands_without_a_repository_say_so(rig: Rig, tmp_path: Path) -> None:
    """The message names the folder."""
    with pytest.raises(UserError, match="no repository in"):
        cli.run(["list", "--repository", str(tmp_path / "none"), "--keys", str(rig.keys)])
    with pytest.raises(UserError, match="no key set in"):
        cli.run(["refresh", "--repository", str(rig.repository), "--keys", str(tmp_path / "none")])


def test_only_one_changes_it(rig: Rig) -> None:
    """A second command is refused while one is at it."""
    with Repository(rig.repository).changing(), pytest.raises(Conflict, match="another command"):
        rig.release("refresh")


def test_a_changed_repository_is_not_signed_over(rig: Rig) -> None:
    """Metadata that somebody altered is found before anything is signed on top of it."""
    path = rig.repository / "metadata/1.targets.json"
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"1\.targets\.json"):
        rig.release("refresh")


# -- publish ---------------------------------------------------------------------------------------------------------


def test_publish(rig: Rig) -> None:
    """A client finds release.json and all parts; the plain parts come out as they were."""
    rig.publish("1.0.0")
    release, offer = release_of(rig, "1.0.0")
    assert offer == Offer("stable", ())
    manifest = json.loads((rig.folder / "built-1.0.0/manifest.json").read_text())
    for field in ("version", "epoch", "minimum_source", "root_hash", "root_uuid", "verity_uuid", "pcr11"):
        assert getattr(release, field) == manifest[field]
    assert release.parts.root.size == len(noise(0))
    targets = rig.seen()
    assert set(targets) == {f"holdfast_1.0.0/{name}" for name in ("release.json", *(f"{n}.zst" for n in PARTS))}
    for name, target in targets.items():
        assert list(target.hashes) == ["sha384"]
        assert (rig.repository / "targets" / name).with_name(f"{target.hashes['sha384']}.{name.split('/')[1]}").exists()
    rig.release("verify")


PARTS = ("root", "verity", "signature", "uki")


def test_deltas_come_from_the_two_releases_before(rig: Rig) -> None:
    """They are made from the repository's own parts, and left out where they would save little."""
    roots = [noise(0), changed(noise(0), 1), changed(noise(0), 2), changed(noise(0), 3)]
    for number, root in enumerate(roots):
        rig.publish(f"1.{number}.0", root=root)
    assert set(release_of(rig, "1.0.0")[0].parts.root.deltas) == set()
    assert set(release_of(rig, "1.1.0")[0].parts.root.deltas) == {"1.0.0"}
    release = release_of(rig, "1.3.0")[0]
    assert release.parts.root.deltas == {
        "1.1.0": "holdfast_1.3.0/root.from-1.1.0.zst",
        "1.2.0": "holdfast_1.3.0/root.from-1.2.0.zst",
    }
    targets = rig.seen()
    assert targets["holdfast_1.3.0/root.from-1.2.0.zst"].length < targets["holdfast_1.3.0/root.zst"].length / 10
    rig.publish("1.4.0", root=noise(9))
    assert release_of(rig, "1.4.0")[0].parts.root.deltas == {}


def test_list(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """The table says who is offered what, and what it weighs."""
    rig.publish("1.0.0")
    rig.publish("1.1.0", "--channel", "beta", "--wave", "10@2026-12-01T00:00:00Z", root=changed(noise(0)))
    capsys.readouterr()
    rig.release("list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["VERSION", "EPOCH", "CHANNEL", "WAVES", "FULL", "DELTAS"]
    assert lines[1].split()[:4] == ["1.0.0", "1", "stable", "all"]
    assert lines[2].split()[:4] == ["1.1.0", "1", "beta", "10%@2026-12-01T00:00:00Z"]
    assert lines[2].endswith("from 1.0.0")
    assert any(line.startswith("root.json version 1, expires") for line in lines)


def test_old_versions_and_epochs_are_refused(rig: Rig) -> None:
    """Also those of a release that was withdrawn; nothing changes."""
    rig.publish("1.1.0", epoch=2)
    rig.release("withdraw", "1.1.0")
    before = (rig.repository / "metadata/timestamp.json").read_bytes()
    with pytest.raises(UserError, match="1.1.0 is not newer than 1.1.0"):
        rig.release("publish", rig.folder / "built-1.1.0")
    with pytest.raises(UserError, match="1.0.9 is not newer than 1.1.0"):
        rig.publish("1.0.9", epoch=2)
    with pytest.raises(UserError, match="epoch 1 is below 2"):
        rig.publish("1.2.0", epoch=1)
    assert (rig.repository / "metadata/timestamp.json").read_bytes() == before


@pytest.mark.parametrize("name", ["root.raw", "verity.raw", "signature.raw", "uki.efi", "manifest.json"])
def test_missing_parts_are_named(rig: Rig, name: str) -> None:
    """A release folder is complete or refused."""
    folder = rig.built("1.0.0")
    (folder / name).unlink()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        rig.release("publish", folder)


@pytest.mark.parametrize("name", ["root.raw", "verity.raw", "signature.raw", "uki.efi", "manifest.json"])
def test_parts_of_two_builds_are_refused(rig: Rig, name: str) -> None:
    """Each part is checked against the root hash before it is published."""
    one, other = rig.built("1.0.0"), rig.built("1.0.1", root=noise(5))
    shutil.copy(other / name, one / name)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        rig.release("publish", one)
    assert rig.seen() == {}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", "1.0", "version"),
        ("root_hash", "f" * 64, "root_uuid"),
        ("root_uuid", "0" * 8, "root_uuid"),
        ("pcr11", "0" * 64, "pcr11"),
        ("epoch", 0, "epoch"),
        ("minimum_source", "2.0.0", "minimum_source"),
        ("uki_sha256", "0" * 64, "uki_sha256"),
    ],
)
def test_wrong_manifests_are_refused(rig: Rig, field: str, value: object, message: str) -> None:
    """The message names the field."""
    folder = rig.built("1.0.0")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, field: value}))
    with pytest.raises(UserError, match=message):
        rig.release("publish", folder)
    assert rig.seen() == {}


def test_a_file_that_is_no_uki_is_refused(rig: Rig) -> None:
    """And so is one that boots without a root hash."""
    folder = rig.built("1.0.0")
    (folder / "uki.efi").write_bytes(b"no PE file")
    with pytest.raises(UserError, match=r"uki\.efi is no unified kernel image"):
        rig.release("publish", folder)
    (folder / "uki.efi").write_bytes(fake_uki("ro quiet"))
    with pytest.raises(UserError, match=r"uki\.efi does not boot"):
        rig.release("publish", folder)


@pytest.mark.parametrize("name", ["targets", "snapshot", "timestamp"])
def test_missing_keys_are_named(rig: Rig, name: str) -> None:
    """Before a release is packed."""
    folder = rig.built("1.0.0")
    (rig.keys / f"{name}.key").unlink()
    with pytest.raises(UserError, match=f"private keys of the role {name}"):
        rig.release("publish", folder)
    assert rig.seen() == {}


def test_a_key_of_another_role_is_refused(rig: Rig) -> None:
    """root.json says which key has which role; the file's name does not."""
    folder = rig.built("1.0.0")
    for kind in ("key", "pub"):
        shutil.copy(rig.keys / f"snapshot.{kind}", rig.keys / f"targets.{kind}")
    with pytest.raises(UserError, match="private keys of the role targets"):
        rig.release("publish", folder)


def test_a_private_key_of_another_pair_is_refused(rig: Rig) -> None:
    """A signature that nobody could verify is never written."""
    shutil.copy(rig.keys / "snapshot.key", rig.keys / "timestamp.key")
    with pytest.raises(UserError, match=r"timestamp does not belong to timestamp\.pub"):
        rig.release("refresh")


def test_a_key_that_others_can_read_is_refused(rig: Rig) -> None:
    """As for all private keys."""
    (rig.keys / "timestamp.key").chmod(0o644)
    with pytest.raises(UserError, match="can be read by others"):
        rig.release("refresh")


# -- withdraw, waves, refresh, prune ---------------------------------------------------------------------------------


def test_withdraw(rig: Rig) -> None:
    """Clients are offered the release no longer, the other remains whole."""
    rig.publish("1.0.0")
    rig.publish("1.1.0", root=changed(noise(0)))
    rig.release("withdraw", "1.0.0")
    assert rig.versions() == ["1.1.0"]
    rig.release("verify")
    with pytest.raises(NotFound, match=r"1\.0\.0"):
        rig.release("withdraw", "1.0.0")


def test_waves(rig: Rig) -> None:
    """They change without the release; the channel stays unless it is named."""
    rig.publish("1.0.0", "--channel", "beta", "--wave", "10@2026-12-01T00:00:00Z", "--wave", "100@2026-12-08T00:00:00Z")
    first, offer = release_of(rig, "1.0.0")
    assert offer == Offer("beta", (Wave(10, "2026-12-01T00:00:00Z"), Wave(100, "2026-12-08T00:00:00Z")))
    rig.release("waves", "1.0.0", "--wave", "50@now")
    release, offer = release_of(rig, "1.0.0")
    assert release == first
    assert (offer.channel, offer.waves[0].share) == ("beta", 50)
    assert msgspec.convert(rig.seen()["holdfast_1.0.0/release.json"].custom, Offer) == offer
    rig.release("waves", "1.0.0", "--channel", "stable")
    assert release_of(rig, "1.0.0")[1] == Offer("stable", ())


@pytest.mark.parametrize(
    "waves",
    [
        ["10"],
        ["x@now"],
        ["101@now"],
        ["10@tomorrow"],
        ["10@2026-13-01T00:00:00Z"],
        ["50@now", "20@2099-01-01T00:00:00Z"],
    ],
)
def test_wrong_waves_are_named(rig: Rig, waves: list[str]) -> None:
    """A typing error must not reach hosts."""
    rig.publish("1.0.0")
    with pytest.raises(UserError, match=f"wave '{waves[-1]}'"):
        rig.release("waves", "1.0.0", *(word for wave in waves for word in ("--wave", wave)))


def test_refresh(rig: Rig) -> None:
    """Only the timestamp while the rest is fresh; all of it when asked."""

    def versions() -> list[int]:
        return [part.version for part in Repository(rig.repository).load().roles]

    rig.release("refresh")
    assert versions() == [1, 2, 1, 1]
    rig.release("refresh", "--all")
    assert versions() == [1, 3, 2, 2]
    assert rig.seen() == {}


def test_an_expired_repository(rig: Rig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Clients refuse it; without the targets key a refresh says what is missing, with it all is well again."""
    shutil.rmtree(rig.repository)
    with monkeypatch.context() as patch:
        patch.setattr(cli, "now", lambda: now() - datetime.timedelta(days=20))
        rig.release("init")
    with pytest.raises(ExpiredMetadataError):
        rig.seen()
    with pytest.raises(UserError, match=r"hosts refuse"):
        rig.release("verify")
    (rig.keys / "targets.key").rename(rig.folder / "targets.key")
    with pytest.raises(UserError, match=r"targets\.json has expired"):
        rig.release("refresh")
    assert "prepare FILE refresh" in capsys.readouterr().err
    (rig.folder / "targets.key").rename(rig.keys / "targets.key")
    rig.release("refresh")
    assert rig.seen() == {}


def test_an_expired_root_is_renewed_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is published under a root that clients refuse."""
    monkeypatch.setattr(cli, "now", lambda: now() + datetime.timedelta(days=366))
    with pytest.raises(UserError, match=r"root\.json version 1 expired"):
        rig.release("refresh", "--all")
    rig.release("renew-root")
    rig.release("refresh", "--all")
    assert Repository(rig.repository).load().root.signed.version == 2


def test_prune(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that nothing refers to go when they are old; the rest stays."""
    rig.publish("1.0.0")
    rig.publish("1.1.0", root=changed(noise(0)))
    rig.release("withdraw", "1.0.0")
    capsys.readouterr()
    rig.release("prune")
    assert not capsys.readouterr().out
    rig.release("prune", "--days", "-1")
    assert not (rig.repository / "targets/holdfast_1.0.0").exists()
    assert len(list((rig.repository / "metadata").iterdir())) == 4
    assert rig.versions() == ["1.1.0"]
