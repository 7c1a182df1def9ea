"""`holdfast audit`: what it prints, and files that prove themselves."""

from __future__ import annotations

import datetime
import hashlib
import json
import ssl
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_audit_checkpoints import checkpoints, trail
from tests.unit.test_audit_daemon import LocalAnchor
from tests.unit.test_audit_search import Clock
from tests.unit.test_cli_rig import FakeApi, holdfast
from tests.unit.test_config_rig import certificate
from vmm.audit.records import GENESIS, canonical, digest
from vmm.cli.main import UNREACHABLE_EXIT_CODE
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
        "3 2026-11-23T04:05:06.123456Z alice@10.0.2.2:4711 note start machine web: ümläut "
        '\\u001b[2J [a={"b":3,"y":2} z=1]\n'
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


def test_the_servers_of_the_trail_are_shown(api: FakeApi, capsys: Capture) -> None:
    server = {"server": "192.0.2.9:6514", "name": "logs", "state": "waiting", "since": 1795406706, "lag": 7}
    pem = certificate("hf1")
    answer = {"last": 9, "certificate": pem, "problem": "", "servers": [server | {"problem": "refused\x1b"}]}
    api.answers["/v1/audit/export"] = (200, answer)
    capsys.readouterr()
    holdfast("audit", "servers")
    shown = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest().upper()
    assert capsys.readouterr().out.splitlines() == [
        "SERVER          NAME  STATE    SINCE                 LACKS  PROBLEM",
        "192.0.2.9:6514  logs  waiting  2026-11-23T04:05:06Z  7      refused?",
        "They know the host by SHA256:" + ":".join(shown[i : i + 2] for i in range(0, 64, 2)),
    ]
    holdfast("audit", "servers", "--pem")
    assert capsys.readouterr().out == pem
    holdfast("audit", "servers", "--json")
    assert json.loads(capsys.readouterr().out) == answer
    for problem, said in (("", "names no server"), ("the export does not run", "does not run")):
        api.answers["/v1/audit/export"] = (200, {"certificate": "", "problem": problem, "servers": []})
        holdfast("audit", "servers")
        assert said in capsys.readouterr().out
        with pytest.raises(UserError, match="has no certificate for servers yet") as error:
            holdfast("audit", "servers", "--pem")
        assert said in error.value.hint


def test_a_purge_says_what_went(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/audit/purge"] = (200, {"first": 1, "last": 500, "lost": 20})
    for given, sent in (
        ("501", 501),
        ("2026-11-23", "2026-11-23T00:00:00.000000Z"),
        ("2026-11-23T04:05:06+01:00", "2026-11-23T03:05:06.000000Z"),
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


def printed(capsys: Capture, *arguments: str) -> list[int]:
    """The numbers of the records that a command prints."""
    capsys.readouterr()
    holdfast("audit", *arguments, "--json")
    return [json.loads(line)["seq"] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.sfr("FAU_SAR.1")
def test_the_last_ones_and_the_newest_first(api: FakeApi, capsys: Capture) -> None:
    api.records = records(5)
    assert printed(capsys, "list", "--last", "3") == [3, 4, 5]
    assert printed(capsys, "list", "--last", "3", "--reverse") == [5, 4, 3]
    assert printed(capsys, "list", "--last", "9", "--after", "3") == [4, 5]
    assert printed(capsys, "list", "--reverse") == [5, 4, 3, 2, 1]
    assert printed(capsys, "list", "--last", "0") == []


@pytest.mark.sfr("FAU_SAR.1")
def test_what_is_chosen_is_asked_of_the_host(api: FakeApi, capsys: Capture) -> None:
    api.records = records(3)
    chosen = ["--type", "machine.", "--actor", "alice", "--machine", "web", "--outcome", "success", "--phase", "event"]
    assert printed(capsys, "list", *chosen) == [1, 2, 3]
    assert printed(capsys, "list", *chosen[:4], "--machine", "db") == []
    assert printed(capsys, "list", "--from", "2026-11-23 04:05:06", "--until", "2026-11-23T05:05:07+01:00") == [1, 2, 3]
    assert printed(capsys, "list", "--until", "2026-11-23") == []
    assert "from=2026-11-23T04:05:06.000000Z&until=2026-11-23T04:05:07.000000Z&after=2" in api.paths()[-2]
    for wrong in ("yesterday", "2026-13-01", "5w", "2026-11-23T04:05:06Q"):
        with pytest.raises(UserError, match="not a time"):
            holdfast("audit", "list", "--from", wrong)
    with pytest.raises(UserError, match="there is no time from"):
        holdfast("audit", "list", "--from", "1h", "--until", "2h")


@pytest.mark.sfr("FAU_SAR.1")
def test_following_prints_what_comes_and_says_how_to_go_on(api: FakeApi, capsys: Capture) -> None:
    api.records = records(4)
    capsys.readouterr()
    assert holdfast("audit", "follow", "--json", "--after", "1", "--type", "machine.") == UNREACHABLE_EXIT_CODE
    said = capsys.readouterr()
    assert [json.loads(line)["seq"] for line in said.out.splitlines()] == [2, 3, 4]
    assert "hint: `--after 4` goes on from here" in said.err
    assert api.paths()[-1] == "GET /v1/audit/follow?type=machine.&after=1"
    holdfast("vm", "events", "web")
    assert api.paths()[-1] == "GET /v1/audit/follow?machine=web"
    api.answers["/v1/audit/follow"] = (429, "too many followers")
    with pytest.raises(UserError, match="too many followers"):
        holdfast("audit", "follow")


@pytest.mark.sfr("FAU_SAR.1")
def test_every_field_is_shown_and_none_steers_the_terminal(
    api: FakeApi, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = "\x1b]0;title\x07\x9b31m\u202eok\r\nforged line\x7f\u2028 \N{GRINNING FACE}\U000e0041"
    record = json.loads(records(1)[0]) | {"reason": hostile, "request": "r" * 40, "later": [hostile]}
    record["actor"]["id"] = record["extra"][hostile] = hostile
    api.records = [canonical(record).rstrip(b"\n")]
    for arguments in ((), ("--full",)):
        capsys.readouterr()
        holdfast("audit", "list", *arguments)
        shown = capsys.readouterr().out
        assert all(c.isprintable() or c == "\n" for c in shown)
        assert len(shown.splitlines()) == (1 + 23 if arguments else 1)
        assert r"\u001b]0;title\u0007\u009b31m\u202eok" in shown and r"\udb40\udc41" in shown
    for name in ("actor.id", "actor.origin", "actor.role", "boot", "extra.a.b", "object.kind", "prev", "producer.uid"):
        assert f"    {name} " in shown, name
    assert f"  {record['prev']}\n" in shown and f"  {record['request']}\n" in shown
    # JSON is exact for programs, and equal but escaped on a terminal.
    for terminal in (False, True):
        monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)  # noqa: B023
        holdfast("audit", "list", "--json")
        said = capsys.readouterr().out
        assert json.loads(said) == record
        assert (said.encode() == canonical(record)) != terminal
        assert "\x9b" not in said or not terminal


def timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The lines of a trail of three rounds, a second apart from midnight on."""
    monkeypatch.setattr(datetime, "datetime", Clock)
    Clock.at = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC)
    lines = trail(folder / "store", LocalAnchor(folder / "anchor"))
    monkeypatch.undo()
    return lines


@pytest.mark.sfr("FAU_STG.1")
def test_a_time_is_exported_with_its_proof(api: FakeApi, capsys: Capture, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        lines = timed(tmp_path, patch)
    api.records = [line.rstrip(b"\n") for line in lines]
    api.answers["/v1/audit/anchor"] = (200, msgspec.to_builtins(checkpoints(tmp_path / "store")[-1]))
    known, file = tmp_path / "known.json", tmp_path / "part"
    known.write_bytes(msgspec.json.encode(checkpoints(tmp_path / "store")[-1]))
    times = [json.loads(line)["time"] for line in lines]
    bounds = ["--from", times[3], "--until", times[5]]
    holdfast("audit", "export", str(file), *bounds)
    # One before, records 4 and 5, one behind, and on to the checkpoint that covers it.
    assert file.read_bytes() == b"".join(lines[2:7])
    capsys.readouterr()
    holdfast("audit", "verify", str(file), "--known", str(known), *bounds)
    said = capsys.readouterr().out
    assert "5 records, 3 to 7, unbroken" in said
    assert f"all records from {times[3]} and before {times[5]} are in here" in said
    assert f"what came before record 3 is not in here; hash of the last of it: {digest(lines[1])}" in said
    # Without its bounds it is a trail that was cut short, to who knows of more.
    with pytest.raises(UserError, match="truncation"):
        holdfast("audit", "verify", str(file), "--known", str(known))
    for wrong in ((times[2], times[5]), (times[3], times[6]), (times[0], times[1])):
        with pytest.raises(UserError, match="truncation: not all records from"):
            holdfast("audit", "verify", str(file), "--known", str(known), "--from", wrong[0], "--until", wrong[1])
    for arguments, says in (
        (("--from", "2027-01-01"), "there are no records from 2027"),
        (("--until", "2027-01-01"), "the trail does not reach until 2027"),
        (("--until", "2026-11-24", "--after", "3"), "do not go with"),
    ):
        with pytest.raises(UserError, match=says):
            holdfast("audit", "export", str(tmp_path / "none"), *arguments)
    assert not (tmp_path / "none").exists()
    holdfast("audit", "export", str(tmp_path / "rest"), "--from", times[4])
    holdfast("audit", "verify", str(tmp_path / "rest"), "--known", str(known), "--from", times[4])
    holdfast("audit", "export", str(tmp_path / "start"), "--until", times[2])
    assert (tmp_path / "start").read_bytes() == b"".join(lines[:4])
