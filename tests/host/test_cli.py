"""The command line tool, from a workstation, takes a guest on the booted host through its whole life."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.harness.host import Host
from tests.harness.seed import Identity, make_identity
from tests.harness.workstation import Workstation
from vmm.audit.events import EVENTS


def workstation(workdir: Path, identity: Identity) -> Workstation:
    """That of a person."""
    folder = workdir / identity.name
    folder.mkdir()
    shutil.copy2(identity.key, folder / "client.key")
    shutil.copy2(identity.certificate, folder / "client.crt")
    return Workstation(folder)


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_a_guest_is_made_used_and_removed_by_the_command_line_tool(
    host: Host, clients: dict[str, Identity], workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `make run` shows: upload, create, start, list, a command on the console, stop, delete, and the records."""
    workstation(workdir, clients["admin"]).demonstrate(host)
    printed = capfd.readouterr().out
    assert "guest# uname -a\nLinux " in printed
    records = printed.partition("$ holdfast audit list")[2]
    for action in ("volume.upload", "machine.create", "machine.start", "machine.stop", "machine.delete"):
        known = EVENTS.get(action)
        assert known
        assert f" done {known.title} " in records, records


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_somebody_is_let_in_and_kept_out_by_the_command_line_tool(
    host: Host, clients: dict[str, Identity], workdir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As the operator's guide says; the tool of whoever was revoked cannot reach the host."""
    olga = make_identity(workdir, "olga", "operator")
    admin, operator = workstation(workdir, clients["admin"]), workstation(workdir, olga)
    admin.meet(host)
    admin.holdfast(f"identity enroll olga {olga.certificate} --role operator")
    operator.meet(host)
    operator.holdfast("vm list")
    admin.holdfast("identity change olga --role user")
    capfd.readouterr()
    operator.holdfast("identity whoami")
    printed = capfd.readouterr().out
    assert "Role:     user" in printed and "Source:   enrolled" in printed and "machine.list" in printed, printed
    admin.holdfast("identity revoke olga")
    operator.holdfast("vm list", accepted=(3,))
    for words in ("identity list", "identity access", "identity show admin"):
        admin.holdfast(words)
    printed = capfd.readouterr().out
    assert "olga" not in printed.partition("revoked olga")[2] and "configuration" in printed, printed
