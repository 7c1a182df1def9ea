"""The command line tool, from a workstation, takes a guest on the booted host through its whole life."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.workstation import Workstation
from vmm.audit.events import EVENTS


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_a_guest_is_made_used_and_removed_by_the_command_line_tool(
    host: Host, clients: dict[str, Identity], workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `make run` shows: upload, create, start, list, a command on the console, stop, delete, and the records."""
    admin = clients["admin"]
    folder = workdir / "workstation"
    folder.mkdir()
    shutil.copy2(admin.key, folder / "client.key")
    shutil.copy2(admin.certificate, folder / "client.crt")
    Workstation(folder).demonstrate(host)
    printed = capfd.readouterr().out
    assert "guest# uname -a\nLinux " in printed
    records = printed.partition("$ holdfast audit list")[2]
    for action in ("volume.upload", "machine.create", "machine.start", "machine.stop", "machine.delete"):
        known = EVENTS.get(action)
        assert known
        assert f" done {known.title} " in records, records
