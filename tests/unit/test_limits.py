"""What fails a build: sizes above the limits, and keys that no release may be signed with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from image.builder.assemble import write_manifest
from image.builder.layout import Layout
from image.builder.slot import Slot
from signing.keys import CERTIFIED, KeySet, make_development_keys, open_keys
from tests.harness.seed import make_identity
from vmm.errors import UserError


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"payload_bytes": 3000}, "the payload has [0-9]+ bytes, over the limit of 3000"),
        ({"root_slot_bytes": 2000}, "the root has 2000 bytes, over the 1200"),
    ],
)
def test_what_would_not_fit_is_not_built(tmp_path: Path, limits: dict[str, int], says: str) -> None:
    allowed = {"uki_bytes": 9000, "payload_bytes": 9000, "root_slot_bytes": 9000, "root_slot_fill_percent": 60}
    (tmp_path / "image").mkdir()
    (tmp_path / "image/limits.json").write_text(json.dumps(allowed | limits))
    layout = Layout(repository=tmp_path)
    layout.release_folder.mkdir(parents=True)
    layout.uki.write_bytes(bytes(3000))
    for part in ("root", "verity", "signature"):
        (layout.release_folder / f"{part}.raw").write_bytes(bytes(2000))
    with pytest.raises(UserError, match=says):
        write_manifest(layout, Slot("0" * 64, {"root": "", "verity": "", "signature": ""}), KeySet(tmp_path))
    assert not layout.manifest.exists()


def test_a_release_is_not_signed_with_development_keys(tmp_path: Path) -> None:
    """Not with the set as it was made, and not with any of its certificates when it is passed off as another."""
    folder = tmp_path / "keys"
    make_development_keys(folder)
    open_keys(folder, release=False)
    with pytest.raises(UserError, match="is a development key set"):
        open_keys(folder, release=True)
    (folder / "development").unlink()
    other = make_identity(tmp_path, "other").certificate.read_bytes()
    for name in (name for name in CERTIFIED if name != "test"):
        with pytest.raises(UserError, match=f"{name}.crt is a development certificate"):
            open_keys(folder, release=True)
        (folder / f"{name}.crt").write_bytes(other)
