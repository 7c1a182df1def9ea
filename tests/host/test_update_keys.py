"""The key that signs releases is changed on a host that is installed, under Secure Boot and with volumes sealed by the
TPM; nobody has to help."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from image.builder.layout import Layout
from signing.keys import KeySet, make_development_keys
from tests.harness import releases
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.publishing import Publisher
from tests.harness.updates import Updates, slot
from tests.host.conftest import RUNNING

_LOOK = """
import json, pathlib, subprocess
def seals(volume):
    device = f"/dev/disk/by-partlabel/holdfast-{volume}"
    dump = subprocess.run(["cryptsetup", "luksDump", "--dump-json-metadata", device], capture_output=True, check=True)
    return sum(token["type"] == "systemd-tpm2" for token in json.loads(dump.stdout)["tokens"].values())
efivars, state = pathlib.Path("/sys/firmware/efi/efivars"), pathlib.Path("/var/lib/holdfast/update/state.json")
result = {
    "db": (efivars / "db-d719b2cb-3d3a-4596-a3bc-dad00e67656f").read_bytes()[4:].hex(),
    "pcr7": pathlib.Path("/sys/class/tpm/tpm0/pcr-sha256/7").read_text().strip().lower(),
    "keys": json.loads(state.read_bytes()).get("keys"),
    "ahead": pathlib.Path("/var/lib/holdfast/sealed/ahead").exists(),
    "seals": [seals("data"), seals("audit")],
}
"""


@pytest.fixture(scope="session")
def key_sets(built_image: Image) -> Path:
    """Two key sets after the build's own: "announcing" names another db key, which signs in "changed"."""
    folder = releases.FOLDER / "db-keys"
    if not folder.exists():
        fresh = folder.with_suffix(".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        make_development_keys(fresh / "made")
        for name in ("announcing", "changed"):
            shutil.copytree(Layout.from_environment().keys, fresh / name)
        shutil.copy2(fresh / "made/db.crt", fresh / "announcing/db-next.crt")
        for end in ("key", "pub", "crt"):
            shutil.copy2(fresh / f"made/db.{end}", fresh / f"changed/db.{end}")
        fresh.rename(folder)
    return folder


@pytest.fixture(scope="session")
def announcing(key_sets: Path) -> releases.Built:
    """A release by the present key that announces the next one."""
    return releases.build("announcing", "0.1.1", keys=key_sets / "announcing")


@pytest.fixture(scope="session")
def changed(key_sets: Path) -> releases.Built:
    """A release by the next key alone."""
    return releases.build("changed", "0.2.0", keys=key_sets / "changed")


def _look(host: Host) -> Any:
    return host.agent.python(_LOOK)


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FPT_ML_EXT.1")
def test_releases_of_another_db_key_are_taken_once_it_was_announced(
    updates: Updates, host: Host, key_sets: Path, announcing: releases.Built, changed: releases.Built
) -> None:
    """Refused at first; after the release between, the firmware knows the key, and the TPM opens the volumes in every
    start: of the one that announces, of the one by the new key, and back."""
    before = _look(host)
    assert (before["keys"], before["ahead"]) == (None, False)
    made = Publisher(releases.FOLDER / "key-change")
    for folder in (RUNNING, announcing.folder, changed.folder):
        made.publish(folder)
    with host.serve(made.folder):
        updates.do("download", version="0.2.0")
        updates.refused("apply", "UKI signer: no certificate of the firmware's db")
        assert _look(host) == before

        updates.do("download", version="0.1.1")
        assert ": pending" in updates.do("apply")["keys"]
        assert _look(host)["ahead"]
        updates.reboot()
        status = updates.settled()
        assert (status["running"], slot(status, "b")["tries"]) == ("0.1.1", None)
        assert status["keys"].endswith("(0.1.1): done"), status["keys"]
        after = _look(host)
        certificate = x509.load_pem_x509_certificate(KeySet(key_sets / "changed").certificate("db").read_bytes())
        assert after["db"].startswith(before["db"]), "what the firmware trusted before, it trusts still"
        assert after["db"].endswith(certificate.public_bytes(Encoding.DER).hex())
        assert (after["pcr7"], after["ahead"]) == (before["pcr7"], False)
        assert after["seals"] == [count + 2 for count in before["seals"]]
        records = updates.records("update.keys")
        assert [(r["phase"], r["outcome"]) for r in records] == [("intent", "pending"), ("outcome", "success")]
        now, following = after["keys"]["pcr7"]
        assert len({before["pcr7"], now, following}) == 3

        updates.take()
        status = updates.settled()
        assert (status["running"], slot(status, "a")["tries"]) == ("0.2.0", None)
        assert _look(host)["pcr7"] == following, "PCR 7 is not what was foreseen"

        updates.do("rollback")
        updates.reboot()
        assert updates.settled()["running"] == "0.1.1"
        back = _look(host)
        assert (back["pcr7"], back["seals"]) == (now, after["seals"])
    assert not [r for r in updates.records("update.failed") if r["object"]["id"] != "0.2.0"]
