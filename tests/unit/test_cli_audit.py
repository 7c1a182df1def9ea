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


STATUS = {
    "records": 900,
    "first": 101,
    "last": 1000,
    "bytes": 24 << 20,
    "quota": 32 << 20,
    "full": False,
    "exported": 700,
    "rule": {"when_full": "overwrite", "keep_days": 90, "keep_mib": 32},
    "segments": 4,
    "protected": 3,
    "unprotected": "",
    "later": "more",
}


def test_the_state_of_the_store_is_shown(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/audit/status"] = (200, STATUS)
    capsys.readouterr()
    holdfast("audit", "status")
    assert capsys.readouterr().out.splitlines() == [
        "Records:   900, 101 to 1000",
        "Size:      24 MiB of 32 MiB (75 %)",
        "When full: oldest records go",
        "Kept for:  90 days",
        "Exported:  up to record 700",
        "fs-verity: 3 of 3 sealed segments",
    ]
    holdfast("audit", "status", "--json")
    assert json.loads(capsys.readouterr().out) == STATUS
    rule = {"when_full": "refuse", "keep_days": None, "keep_mib": None}
    other = {"rule": rule, "full": True, "exported": 0, "protected": 0, "unprotected": "the file system has none\x1b"}
    api.answers["/v1/audit/status"] = (200, STATUS | other)
    holdfast("audit", "status")
    assert capsys.readouterr().out.splitlines()[2:] == [
        "When full: calls are refused (now)",
        "Kept for:  as long as there is room",
        "Exported:  nothing",
        "fs-verity: 0 of 3 sealed segments: the file system has none?",
    ]


def test_a_purge_says_what_went(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/audit/purge"] = (200, {"first": 1, "last": 500, "lost": 20})
    for given, sent in (
        ("501", 501),
        ("2026-11-23", "2026-11-23T00:00:00Z"),
        ("2026-11-23T04:05:06+01:00", "2026-11-23T04:05:06+01:00"),
    ):
        capsys.readouterr()
        holdfast("audit", "purge", given, "--yes")
        assert json.loads(api.seen[-1].body) == {"before": sent}
        assert capsys.readouterr().out == "records 1 to 500 are deleted, 20 of them had not been exported\n"
    api.answers["/v1/audit/purge"] = (200, {"first": 0, "last": 0, "lost": 0})
    holdfast("audit", "purge", "1", "--yes")
    assert "nothing is deleted" in capsys.readouterr().out
    api.answers["/v1/audit/purge"] = (403, "the role 'admin' may not call audit.purge")
    with pytest.raises(UserError, match=r"may not call audit\.purge"):
        holdfast("audit", "purge", "1", "--yes")


def test_an_export_says_where_it_begins(api: FakeApi, capsys: Capture, tmp_path: Path) -> None:
    """What was deleted is not in it, and it does not claim so."""
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    api.records = [line.rstrip(b"\n") for line in lines[4:]]
    api.answers["/v1/audit/anchor"] = (200, msgspec.to_builtins(checkpoints(tmp_path / "store")[-1]))
    capsys.readouterr()
    holdfast("audit", "export", str(tmp_path / "export"))
    assert capsys.readouterr().out.startswith("records 5 to 10, anchored")
