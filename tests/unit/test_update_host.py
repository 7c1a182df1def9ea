"""What the updater reads about its host, and what it makes of damaged files."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmm.config.types import Update
from vmm.errors import UserError
from vmm.update import host


def test_the_host_as_its_files_say(tmp_path: Path) -> None:
    for folder in ("etc", "proc/sys/kernel/random"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "etc/os-release").write_text('IMAGE_VERSION="1.2.3"\nHOLDFAST_EPOCH=2\nHOLDFAST_BUILT=1000\n')
    (tmp_path / "proc/cmdline").write_text(f"initrd=x roothash={'ab' * 32} ro\n")
    (tmp_path / "etc/machine-id").write_text("c" * 32 + "\n")
    (tmp_path / "proc/sys/kernel/random/boot_id").write_text("boot\n")
    assert host.running(tmp_path) == host.Running("1.2.3", 2, "ab" * 32, 1000, "c" * 32, "boot")
    (tmp_path / "proc/cmdline").write_text("ro\n")
    with pytest.raises(UserError, match="no image with a root hash"):
        host.running(tmp_path)


def test_configuration(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert host.configuration(path) is None
    path.write_text('{"hostname": "hf1", "anything": [1]}')
    assert host.configuration(path) is None
    path.write_text('{"update": {"repository": "https://updates.example/holdfast", "channel": "testing"}}')
    assert host.configuration(path) == Update("https://updates.example/holdfast", "testing")
    path.write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        host.configuration(path)
