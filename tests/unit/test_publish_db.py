"""A key set that announces another db key: what is published, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from signing import secureboot
from signing.keys import KeySet, make_development_keys, open_keys
from tests.unit.test_publish_rig import Rig, rig, rig_template
from tests.unit.test_update_rig import tools
from vmm.errors import UserError
from vmm.update import addition, firmware
from vmm.update.errors import Refused
from vmm.update.types import Release

__all__ = ["rig", "rig_template"]

pytestmark = pytest.mark.skipif(not tools("sign-efi-sig-list", "veritysetup"), reason="needs the tools tree")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two development key sets."""
    folder = tmp_path_factory.mktemp("sets")
    for name in ("present", "future"):
        make_development_keys(folder / name)
    return folder


@pytest.fixture
def announcing(made: Path, tmp_path: Path) -> KeySet:
    """A key set that announces the db key of the other one."""
    shutil.copytree(made / "present", tmp_path / "announcing")
    shutil.copy(made / "future/db.crt", tmp_path / "announcing/db-next.crt")
    return KeySet(tmp_path / "announcing")


def der(certificate: Path) -> bytes:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)


def test_what_hosts_get_to_add(announcing: KeySet, made: Path) -> None:
    """Made by efitools, taken apart as hosts do, and signed for nothing else."""
    found = addition.parse(secureboot.db_append(announcing))
    assert found.certificate == der(made / "future/db.crt")
    addition.check_signed(found, [der(announcing.certificate("KEK"))])
    with pytest.raises(Refused, match="no key exchange key"):
        addition.check_signed(found, [der(made / "future/KEK.crt"), der(announcing.certificate("PK"))])
    assert secureboot.db_append(KeySet(made / "present")) == b""


def test_new_installations_enrol_both(announcing: KeySet, made: Path, tmp_path: Path) -> None:
    for keys, names in ((announcing, ("db", "db-next")), (KeySet(made / "present"), ("db",))):
        assert keys.enrolled == names
        secureboot.write_variables(keys, tmp_path / "auto", db=keys.enrolled)
        signed = (tmp_path / "auto/db.auth").read_bytes()
        content = signed[16 + int.from_bytes(signed[16:20], "little") :]
        assert firmware.parse("db", content).certificates == {der(keys.certificate(name)) for name in names}


def test_key_sets_that_change_both_keys_are_refused(announcing: KeySet) -> None:
    assert open_keys(announcing.folder, release=False) == announcing
    for end in ("key", "pub"):
        shutil.copy(announcing.folder / f"pcr.{end}", announcing.folder / f"pcr-previous.{end}")
    with pytest.raises(UserError, match=r"changes the policy key .* and announces another db key .* at once"):
        open_keys(announcing.folder, release=False)


def test_a_release_announces_no_development_key(announcing: KeySet, monkeypatch: pytest.MonkeyPatch) -> None:
    (announcing.folder / "development").unlink()
    monkeypatch.setattr("signing.keys.CERTIFIED", {})
    with pytest.raises(UserError, match=r"db-next\.crt is a development certificate"):
        open_keys(announcing.folder, release=True)


def test_the_manifest_carries_it(rig: Rig, announcing: KeySet) -> None:
    rig.publish("1.0.0")
    folder = rig.built("1.1.0")
    manifest = json.loads((folder / "manifest.json").read_text())
    payload = secureboot.db_append(announcing)
    encoded = msgspec.json.encode(payload).decode().strip('"')
    (folder / "manifest.json").write_text(json.dumps({**manifest, "db_append": encoded[:-40]}))
    with pytest.raises(UserError, match="addition"):
        rig.release("publish", folder)
    (folder / "manifest.json").write_text(json.dumps({**manifest, "db_append": encoded}))
    rig.release("publish", folder)
    texts = {
        name.split("/")[0]: (
            rig.repository / "targets" / name.replace("/", f"/{target.hashes['sha384']}.")
        ).read_bytes()
        for name, target in rig.seen().items()
        if name.endswith("release.json")
    }
    assert msgspec.json.decode(texts["holdfast_1.1.0"], type=Release).db_append == payload
    assert b"db_append" not in texts["holdfast_1.0.0"], "hosts from before take releases that announce nothing"
