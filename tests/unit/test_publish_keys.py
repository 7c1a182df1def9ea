"""Keys of the update repository: rotation, keys without a network, keys in tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root

from signing.pkcs11 import TokenKey
from signing.repository import Repository
from signing.roles import KeyRing
from signing.root import now
from signing.rotation import rotate
from tests.unit.test_publish_rig import Rig, make_key, noise, rig, rig_template
from vmm.errors import Conflict, NotFound, UserError
from vmm.process import run

__all__ = ["rig", "rig_template"]


def set_of(rig: Rig, name: str, *private: str) -> Path:
    """A key set on another machine: all public keys, and only these private ones."""
    folder = rig.folder / name
    folder.mkdir()
    for path in (*rig.keys.glob("*.pub"), rig.keys / "root.json", *(rig.keys / f"{key}.key" for key in private)):
        shutil.copy2(path, folder)
    return folder


# -- rotation --------------------------------------------------------------------------------------------------------


def test_a_client_of_the_first_root_follows_all_rotations(rig: Rig) -> None:
    """Every key is replaced, root keys one after another; the old private keys are gone."""
    rig.publish("1.0.0")
    for number, (role, old) in enumerate(
        [("root", "root1"), ("timestamp", "timestamp"), ("root", "root2"), ("snapshot", "snapshot")]
        + [("targets", "targets"), ("root", "root3")]
    ):
        make_key(rig.keys, f"new{number}")
        rig.release("rotate", role, old, f"new{number}")
        (rig.keys / f"{old}.key").unlink()
        assert rig.versions() == ["1.0.0"]
    rig.publish("1.1.0", root=noise(1))
    assert rig.versions() == ["1.0.0", "1.1.0"]
    root = Repository(rig.repository).load().root.signed
    assert (root.version, len(root.keys)) == (7, 6)
    rig.release("verify")


def test_a_root_that_one_key_signed_is_refused(rig: Rig) -> None:
    """By us and, should it get into the repository, by clients."""
    make_key(rig.keys, "fresh")
    one = set_of(rig, "one", "root1", "snapshot", "timestamp")
    with pytest.raises(UserError, match="private keys of the role root: it takes 2 of"):
        rig.release("rotate", "root", "root3", "fresh", keys=one)
    state = Repository(rig.repository).load()
    ring = KeyRing(rig.keys)
    following: Metadata[Root] = rotate(state, ring, "root", "root3", "fresh", now())
    signer = ring.signer("root1")
    following.signatures[signer.public_key.keyid] = signer.sign(following.signed_bytes)
    (rig.repository / "metadata/2.root.json").write_bytes(following.to_bytes())
    with pytest.raises(RepositoryError, match="root was signed by 1/2 keys"):
        rig.seen()
    with pytest.raises(UserError, match="not signed as"):
        rig.release("refresh")


def test_new_root_keys_alone_are_not_enough(rig: Rig) -> None:
    """A root is signed by the old threshold as well as the new."""
    for name in ("new1", "new2"):
        make_key(rig.keys, name)
    rig.release("rotate", "root", "root1", "new1")
    keys = set_of(rig, "late", "new1", "new2", "root1", "timestamp", "snapshot")
    with pytest.raises(UserError, match="private keys of the role root"):
        rig.release("rotate", "root", "root2", "new2", keys=keys)


def test_a_lost_key_is_replaced_in_two_steps(rig: Rig) -> None:
    """Its successor is added, signs, and only then the lost key is removed: clients can follow at any time."""
    rig.publish("1.0.0")
    make_key(rig.keys, "timestamp2")
    (rig.keys / "timestamp.key").unlink()
    with pytest.raises(UserError, match=r"timestamp\.json version 3 has 0 of the 1 signatures") as refused:
        rig.release("rotate", "timestamp", "timestamp", "timestamp2")
    assert "add-key" in refused.value.hint
    rig.release("add-key", "timestamp", "timestamp2")
    assert rig.versions() == ["1.0.0"]
    rig.release("refresh")
    rig.release("remove-key", "timestamp", "timestamp")
    assert rig.versions() == ["1.0.0"]


def test_wrong_changes_of_keys_are_refused(rig: Rig) -> None:
    """Each with the key's name."""
    with pytest.raises(UserError, match="fewer keys than its threshold"):
        rig.release("remove-key", "targets", "targets")
    with pytest.raises(UserError, match="snapshot is a key of snapshot already"):
        rig.release("rotate", "targets", "targets", "snapshot")
    with pytest.raises(NotFound, match="targets has no key snapshot; it has: targets"):
        rig.release("remove-key", "targets", "snapshot")
    with pytest.raises(UserError, match=r"lacks .*nothing\.pub"):
        rig.release("add-key", "targets", "nothing")
    assert Repository(rig.repository).load().root.signed.version == 1


# -- keys without a network ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machines:
    """The repository's machine has snapshot and timestamp; two others have one key or two each."""

    rig: Rig
    online: Path
    release: Path
    alice: Path
    bob: Path
    change: Path

    def sign(self, name: str, keys: Path) -> None:
        """Sign the change where there is no repository."""
        with_none = Rig(self.rig.folder / "nowhere")
        with_none.release("sign", self.change, "--key", name, keys=keys)


@pytest.fixture
def machines(rig: Rig) -> Machines:
    """Key sets as docs/key-ceremony.md spreads them."""
    make_key(rig.keys, "root4")
    return Machines(
        rig=rig,
        online=set_of(rig, "online", "snapshot", "timestamp"),
        release=set_of(rig, "release", "targets"),
        alice=set_of(rig, "alice", "root1", "root4"),
        bob=set_of(rig, "bob", "root2"),
        change=rig.folder / "change.json",
    )


def test_publish_with_the_key_elsewhere(machines: Machines, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepared, signed, adopted; nobody sees anything before."""
    rig, change = machines.rig, machines.change
    folder = rig.built("1.0.0")
    rig.release("prepare", change, "publish", folder, "--wave", "5@now", keys=machines.online)
    assert rig.seen() == {}
    with pytest.raises(UserError, match="0 of the 1 signatures"):
        rig.release("adopt", change, keys=machines.online)
    capsys.readouterr()
    machines.sign("targets", machines.release)
    shown = capsys.readouterr().out
    assert "targets.json version 2" in shown
    assert "holdfast_1.0.0/release.json" in shown
    assert "signed by targets" in shown
    rig.release("adopt", change, keys=machines.online)
    assert rig.versions() == ["1.0.0"]
    with pytest.raises(Conflict, match="version 2, and the repository is at version 2"):
        rig.release("adopt", change, keys=machines.online)


def test_what_is_adopted_is_what_was_signed(machines: Machines) -> None:
    """Neither the metadata nor the files can be changed on the way."""
    rig, change = machines.rig, machines.change
    rig.release("prepare", change, "publish", rig.built("1.0.0"), keys=machines.online)
    machines.sign("targets", machines.release)
    good = change.read_text()
    prepared = json.loads(good)
    prepared["metadata"]["signed"]["targets"]["holdfast_1.0.0/release.json"]["custom"]["channel"] = "evil"
    change.write_text(json.dumps(prepared))
    with pytest.raises(UserError, match="0 of the 1 signatures"):
        rig.release("adopt", change, keys=machines.online)
    change.write_text("nonsense")
    with pytest.raises(UserError, match="is not what holdfast-release prepare writes"):
        rig.release("adopt", change, keys=machines.online)
    change.write_text(good)
    path = next((rig.repository / "targets/holdfast_1.0.0").glob("*.uki.zst"))
    path.write_bytes(b"x")
    with pytest.raises(UserError, match=r"uki\.zst is not what"):
        rig.release("adopt", change, keys=machines.online)
    assert rig.seen() == {}


def test_only_keys_of_the_role_sign(machines: Machines) -> None:
    """And prepare never writes over a file."""
    rig, change = machines.rig, machines.change
    rig.release("prepare", change, "refresh", keys=machines.online)
    with pytest.raises(UserError, match="root2 is not a key of the role targets"):
        machines.sign("root2", machines.bob)
    with pytest.raises(UserError, match="no private key targets"):
        machines.sign("targets", machines.bob)
    with pytest.raises(UserError, match="exists"):
        rig.release("prepare", change, "refresh", keys=machines.online)


def test_other_changes_with_the_key_elsewhere(machines: Machines) -> None:
    """Waves, withdrawal and new expiries go the same way."""
    rig, change = machines.rig, machines.change
    rig.publish("1.0.0")
    for words in (["waves", "1.0.0", "--channel", "beta"], ["refresh"], ["withdraw", "1.0.0"]):
        change.unlink(missing_ok=True)
        rig.release("prepare", change, *words, keys=machines.online)
        machines.sign("targets", machines.release)
        rig.release("adopt", change, keys=machines.online)
    assert rig.seen() == {}
    assert Repository(rig.repository).load().targets.signed.version == 5


def test_root_keys_elsewhere(machines: Machines) -> None:
    """Two people sign a new root one after the other; one is not enough."""
    rig, change = machines.rig, machines.change
    rig.publish("1.0.0")
    rig.release("prepare", change, "rotate", "root", "root3", "root4", keys=machines.online)
    machines.sign("root1", machines.alice)
    machines.sign("root4", machines.alice)
    with pytest.raises(UserError, match="1 of the 2 signatures that root.json version 1 wants"):
        rig.release("adopt", change, keys=machines.online)
    machines.sign("root2", machines.bob)
    rig.release("adopt", change, keys=machines.online)
    assert Repository(rig.repository).load().root.signed.version == 2
    assert rig.versions() == ["1.0.0"]


def test_online_keys_rotate_with_root_keys_elsewhere(machines: Machines) -> None:
    """What the change of keys makes necessary is signed when it is adopted."""
    rig, change = machines.rig, machines.change
    make_key(machines.online, "timestamp2")
    rig.release("prepare", change, "rotate", "timestamp", "timestamp", "timestamp2", keys=machines.online)
    machines.sign("root1", machines.alice)
    machines.sign("root2", machines.bob)
    rig.release("adopt", change, keys=machines.online)
    (machines.online / "timestamp.key").unlink()
    rig.release("refresh", keys=machines.online)
    assert rig.seen() == {}


# -- keys in tokens --------------------------------------------------------------------------------------------------

_PIN = "12345678"


@pytest.fixture
def token(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A software token that holds the private keys root1 and targets in place of the files; yields its module."""
    module = next(Path("/usr/lib").glob("**/libsofthsm2.so"), None)
    if module is None:
        pytest.skip("softhsm2 is not installed")
    folder = rig.folder / "tokens"
    folder.mkdir()
    (rig.folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder}\nobjectstore.backend = file\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(rig.folder / "softhsm2.conf"))
    util = "softhsm2-util"
    run([util, "--init-token", "--free", "--label", "release", "--pin", _PIN, "--so-pin", _PIN])
    for number, name in enumerate(("root1", "targets"), 1):
        key = rig.keys / f"{name}.key"
        run(
            [
                *(util, "--import", key, "--token", "release"),
                *("--label", name, "--id", f"0{number}", "--pin", _PIN),
            ]
        )
        key.unlink()
        (rig.keys / f"{name}.pkcs11").write_text(f"pkcs11:token=release;object={name}?module-path={module}\n")
    monkeypatch.setenv("HOLDFAST_PIN", _PIN)
    yield str(module)


def test_a_token_signs(rig: Rig, token: str) -> None:
    """For root and targets, as a file would; clients see no difference."""
    rig.publish("1.0.0")
    (rig.keys / "root3.key").unlink()
    rig.release("renew-root")
    (rig.keys / "root.json").unlink()
    rig.release("root")
    rig.release("verify", "--root", rig.repository / "metadata/1.root.json")
    assert rig.seen(root=(rig.repository / "metadata/1.root.json").read_bytes())


def test_a_token_signs_by_id(rig: Rig, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module may also come from the environment."""
    monkeypatch.setenv("PYKCS11LIB", token)
    (rig.keys / "targets.pkcs11").write_text("pkcs11:token=release;id=%02")
    rig.release("refresh", "--all")
    assert rig.seen() == {}
    (rig.keys / "targets.pkcs11").write_text("pkcs11:token=release;id=%01")
    with pytest.raises(UserError, match=r"targets does not belong to targets\.pub"):
        rig.release("refresh", "--all")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pkcs11:token=other;object=targets", "0 tokens match"),
        ("pkcs11:token=release;object=nothing", "0 EC keys on the token match nothing"),
    ],
)
def test_a_token_or_key_that_is_not_there(rig: Rig, token: str, uri: str, message: str) -> None:
    """The message says which of the two."""
    (rig.keys / "targets.pkcs11").write_text(f"{uri}?module-path={token}")
    with pytest.raises(UserError, match=message):
        rig.release("refresh", "--all")


def test_a_wrong_pin(rig: Rig, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or none at all."""
    monkeypatch.setenv("HOLDFAST_PIN", "00000000")
    with pytest.raises(UserError, match="the token of targets refuses"):
        rig.release("refresh", "--all")
    monkeypatch.delenv("HOLDFAST_PIN")
    with pytest.raises(UserError, match="no PIN for the token of targets"):
        rig.release("refresh", "--all")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:key", "is not a PKCS #11 URI"),
        ("pkcs11:object=a?module-path=m&pin-value=1234", "must not hold a PIN"),
        ("pkcs11:object=a;slot=1?module-path=m", "unknown attribute slot"),
        ("pkcs11:object=a", "no module"),
        ("pkcs11:token=a?module-path=m", "neither object nor id"),
    ],
)
def test_wrong_uris_are_explained(uri: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by what is wrong with it."""
    monkeypatch.delenv("PYKCS11LIB", raising=False)
    with pytest.raises(UserError, match=message):
        TokenKey.parse(uri)


def test_uris_are_decoded() -> None:
    """As RFC 7512 has them."""
    assert TokenKey.parse("pkcs11:token=my%20token;id=%01%ff;object=k?module-path=/lib/m.so") == TokenKey(
        {"label": "my token"}, "k", b"\x01\xff", "/lib/m.so"
    )
