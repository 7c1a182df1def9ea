"""What hosts accept of a repository, and where its first root.json comes from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tuf.api.exceptions import RepositoryError

from signing.keys import KeySet, open_keys
from tests.unit.test_publish_rig import NAMES, Rig, make_key, rig, rig_template
from vmm.errors import UserError
from vmm.process import run

__all__ = ["rig", "rig_template"]


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_finds_damage(rig: Rig) -> None:
    """Of any file, by its name."""
    rig.publish("1.0.0")
    path = next((rig.repository / "targets/holdfast_1.0.0").glob("*.root.zst"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="root.zst is not what targets.json says"):
        rig.release("verify")
    path.unlink()
    with pytest.raises(UserError, match="lacks"):
        rig.release("verify")


def test_clients_with_another_root_refuse(rig: Rig, tmp_path: Path) -> None:
    """A repository of other keys is nobody's."""
    other = Rig(tmp_path / "other")
    other.keys.mkdir(parents=True)
    for name in NAMES:
        make_key(other.keys, name)
    other.release("root")
    with pytest.raises(RepositoryError):
        rig.seen(root=(other.keys / "root.json").read_bytes())
    with pytest.raises(UserError, match="hosts refuse"):
        rig.release("verify", "--root", other.keys / "root.json")


# -- the key set -----------------------------------------------------------------------------------------------------


def test_development_keys_get_a_root(rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is missing, once; a release set must bring its own."""
    folder = tmp_path / "keys"
    shutil.copytree(rig.keys, folder)
    (folder / "root.json").unlink()
    monkeypatch.setattr("signing.keys.CERTIFIED", {})
    monkeypatch.setattr("signing.keys.PLAIN", {})
    (folder / "owner.guid").touch()
    with pytest.raises(UserError, match=r"lacks .*root\.json"):
        open_keys(folder, release=True)
    assert open_keys(folder, release=False) == KeySet(folder)
    made = (folder / "root.json").read_bytes()
    open_keys(folder, release=False)
    assert (folder / "root.json").read_bytes() == made
    open_keys(folder, release=True)


def test_two_root_keys_make_a_root_and_one_does_not(rig: Rig) -> None:
    """The third may be elsewhere."""
    (rig.keys / "root.json").unlink()
    (rig.keys / "root3.key").unlink()
    (rig.keys / "root2.key").rename(rig.folder / "root2.key")
    with pytest.raises(UserError, match=r"root\.json version 1 has 1 of the 2 signatures"):
        rig.release("root")
    assert not (rig.keys / "root.json").exists()
    (rig.folder / "root2.key").rename(rig.keys / "root2.key")
    rig.release("root")
    assert (rig.keys / "root.json").exists()


def test_the_module_is_the_command() -> None:
    """python3 -m signing runs it."""
    assert "holdfast-release" in run(["python3", "-m", "signing", "--help"]).stdout
