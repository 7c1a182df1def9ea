"""`holdfast audit`: what it prints, and files that prove themselves."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_audit_checkpoints import checkpoints, trail
from tests.unit.test_audit_daemon import LocalAnchor
from tests.unit.test_cli_rig import FakeApi, holdfast
from vmm.audit.records import GENESIS, canonical, digest
from vmm.errors import UserError

Capture = pytest.CaptureFixture[str]


def records(count: int) -> list[bytes]:
    """A chain of canonical audit records (without newlines)."""
    result: list[bytes] = []
    prev = GENESIS
    for seq in range(1, count + 1):
        line = canonical(
            {
                "v": 1,
                "seq": seq,
                "prev": prev,
                "boot": "b",
                "time": "2026-11-23T04:05:06.123456Z",
                "type": "machine.start",
                "phase": "event",
                "producer": {"uid": 902, "unit": "holdfast-core"},
                "actor": {"id": "alice", "role": "admin", "origin": "10.0.2.2:4711"},
                "object": {"kind": "machine", "id": "", "name": "web"},
                "outcome": "success",
                "reason": "ümläut \x1b[2J",
                "request": "",
                "extra": {"z": 1, "a": {"y": 2, "b": 3}},
            }
        )
        result.append(line.rstrip(b"\n"))
        prev = digest(line)
    return result


def test_an_audit_export_can_be_verified(api: FakeApi, capsys: Capture, tmp_path: Path) -> None:
    api.records = records(5)
    capsys.readouterr()
    holdfast("audit", "list", "--json")
    export = capsys.readouterr().out
    assert export.encode() == b"".join(record + b"\n" for record in api.records)
    assert len(api.seen) == 3
    path = tmp_path / "export"
    path.write_text(export)
    holdfast("audit", "verify", str(path))
    assert capsys.readouterr().out.startswith("5 records, 1 to 5, unbroken")
    path.write_text(export.replace("alice", "mallo", 1))
    with pytest.raises(UserError, match="record 2: edit: its link does not fit"):
        holdfast("audit", "verify", str(path))


def test_an_export_proves_itself_and_fits_what_the_host_says(api: FakeApi, capsys: Capture, tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    api.records = [line.rstrip(b"\n") for line in lines]
    newest = msgspec.to_builtins(checkpoints(tmp_path / "store")[-1])
    api.answers["/v1/audit/anchor"] = (200, newest)
    capsys.readouterr()
    holdfast("audit", "anchor")
    known, file = tmp_path / "known.json", tmp_path / "export"
    known.write_text(capsys.readouterr().out)
    assert json.loads(known.read_text()) == newest
    holdfast("audit", "export", str(file))
    assert file.read_bytes() == b"".join(lines[:10])
    holdfast("audit", "verify", str(file), "--known", str(known))
    assert "NOT anchored: record 10," in capsys.readouterr().out
    holdfast("audit", "verify", str(file), "--json")
    assert json.loads(capsys.readouterr().out)["covered"] == 9
    # A part ends with the checkpoint that covers it.
    holdfast("audit", "export", str(tmp_path / "part"), "--after", "1", "--to", "5")
    assert (tmp_path / "part").read_bytes() == b"".join(lines[1:7])
    with pytest.raises(UserError, match="File exists"):
        holdfast("audit", "export", str(file))
    for wrong in (("--to", "10"), ("--after", "9"), ("--to", "0")):
        with pytest.raises(UserError, match="there are no records"):
            holdfast("audit", "export", str(tmp_path / "none"), *wrong)
    file.write_bytes(b"".join(lines[:7]))
    with pytest.raises(UserError, match="record 8: truncation: record 9 is known to have been there"):
        holdfast("audit", "verify", str(file), "--known", str(known))
    api.records = api.records[:5]
    with pytest.raises(UserError, match="the trail ends with record 5"):
        holdfast("audit", "export", str(tmp_path / "short"))
    assert not (tmp_path / "short").exists()


def test_audit_lines_for_people(api: FakeApi, capsys: Capture) -> None:
    api.records = records(3)
    capsys.readouterr()
    holdfast("audit", "list", "--after", "2")
    assert capsys.readouterr().out == (
        '3 2026-11-23T04:05:06.123456Z alice@10.0.2.2:4711 note start machine web: ümläut ?[2J [a={"b":3,"y":2} z=1]\n'
    )
