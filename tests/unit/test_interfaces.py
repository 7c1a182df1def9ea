"""When an interface has the name that it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm import paths
from vmm.config.interfaces import is_named


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        (None, False),
        ("I:33972865\nE:ID_NET_NAME=enp0s3\nE:ID_RENAMING=1\n", False),
        ("I:33972865\nE:ID_NET_NAME=enp0s3\n", True),
        ("", True),
    ],
)
def test_udev_is_done_when_its_entry_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str | None, named: bool
) -> None:
    """The entry is written before the interface is renamed, too, and then says that this is to come."""
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert not is_named("eth0")
    (tmp_path / "sys/class/net/eth0").mkdir(parents=True)
    (tmp_path / "sys/class/net/eth0/ifindex").write_text("2\n")
    (tmp_path / "run/udev/data").mkdir(parents=True)
    if entry is not None:
        (tmp_path / "run/udev/data/n2").write_text(entry)
    assert is_named("eth0") is named
