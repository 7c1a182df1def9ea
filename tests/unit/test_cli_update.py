"""`holdfast update` and `holdfast host` against a server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli_rig import CONFIGURATION, MACHINE, FakeApi, holdfast
from vmm import process
from vmm.cli import updates
from vmm.errors import UserError

Capture = pytest.CaptureFixture[str]
STATUS: dict[str, Any] = {
    "running": "1.0.0",
    "epoch": 2,
    "floor": 1,
    "floor_source": "tpm",
    "phase": "idle",
    "version": "",
    "done": 0,
    "total": 0,
    "error": "",
    "available": "",
    "staged": "",
    "installed": "",
    "checked": "2026-12-01T02:00:00Z",
    "slots": [
        {"name": "a", "version": "1.0.0", "root_hash": "0" * 64, "state": "running", "tries": None},
        {"name": "b", "version": "1.1.0", "root_hash": "1" * 64, "state": "trying", "tries": 2},
    ],
    "failed": [{"version": "1.0.9", "reason": "the gate: no\x1b probe", "time": "2026-11-30T02:00:00Z"}],
}


EVENT = {"time": "t", "type": "update.apply", "outcome": "failure", "version": "1.1.0", "reason": "r", "extra": {}}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_POLL_S", 0.02)


def later(api: FakeApi, *states: dict[str, Any]) -> None:
    """Let each look at the updater see the next of these."""
    api.turns["GET /v1/update"] = [STATUS | state for state in states]


@pytest.mark.parametrize(
    ("arguments", "request_line", "body", "begins", "ends", "says"),
    [
        (
            ("check",),
            "POST /v1/update/check",
            {"override_expiry": False, "source": ""},
            {"phase": "checking"},
            {"available": "1.1.0"},
            "release 1.1.0 is available; this host runs 1.0.0",
        ),
        (
            ("check", "--bundle", "--override-expiry"),
            "POST /v1/update/check",
            {"override_expiry": True, "source": "bundle"},
            {"phase": "checking"},
            {},
            "nothing newer than 1.0.0",
        ),
        (
            ("check", "--source", "stick"),
            "POST /v1/update/check",
            {"override_expiry": False, "source": "stick"},
            {"phase": "checking", "total": 1 << 30, "done": 1 << 20},
            {"available": "1.1.0"},
            "release 1.1.0 is available",
        ),
        (
            ("download",),
            "POST /v1/update/download",
            {"version": None, "retry_failed": False},
            {"phase": "downloading", "version": "1.1.0", "total": 100, "done": 10},
            {"phase": "staged", "staged": "1.1.0"},
            "release 1.1.0 is downloaded",
        ),
        (
            ("download", "1.1.0", "--retry-failed"),
            "POST /v1/update/download",
            {"version": "1.1.0", "retry_failed": True},
            {"phase": "downloading"},
            {"phase": "staged", "staged": "1.1.0"},
            "release 1.1.0 is downloaded",
        ),
        (
            ("apply",),
            "POST /v1/update/apply",
            None,
            {"phase": "writing", "version": "1.1.0"},
            {"phase": "installed", "installed": "1.1.0"},
            "release 1.1.0 is written and starts when the host restarts",
        ),
    ],
)
def test_jobs_are_waited_for(
    api: FakeApi,
    capsys: Capture,
    arguments: tuple[str, ...],
    request_line: str,
    body: Any,
    begins: dict[str, Any],
    ends: dict[str, Any],
    says: str,
) -> None:
    api.answers[request_line.split()[1]] = (202, STATUS | begins)
    capsys.readouterr()
    later(api, begins, ends)
    assert holdfast("update", *arguments) == 0
    assert api.paths() == [request_line, "GET /v1/update", "GET /v1/update"]
    assert json.loads(api.seen[0].body or b"null") == body
    captured = capsys.readouterr()
    assert says in captured.out
    assert ("a restart is needed: `holdfast host reboot`" in captured.err) == (arguments == ("apply",))
    api.seen.clear()
    assert holdfast("update", *arguments, "--no-wait") == 0
    assert api.paths() == [request_line]
    assert "tells how far it is" in capsys.readouterr().err
    later(api, ends)
    assert holdfast("--json", "update", *arguments) == 0
    assert json.loads(capsys.readouterr().out) == STATUS | ends


def test_a_job_that_fails(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/update/apply"] = (202, STATUS | {"phase": "writing"})
    failed = {"phase": "staged", "error": "the slot reads back\x1b wrong"}
    later(api, failed, failed)
    with pytest.raises(UserError, match=r"apply: the slot reads back\? wrong"):
        holdfast("update", "apply")
    capsys.readouterr()
    with pytest.raises(UserError):
        holdfast("update", "apply", "--json")
    assert json.loads(capsys.readouterr().out)["error"]
    api.answers["/v1/update/apply"] = (409, "nothing is downloaded")
    with pytest.raises(UserError, match="nothing is downloaded"):
        holdfast("update", "apply")


def test_ctrl_c_ends_the_waiting_only(api: FakeApi, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(updates, "_POLL_S", 30)
    api.answers["/v1/update/download"] = (202, STATUS | {"phase": "downloading"})
    sleep = asyncio.sleep

    async def interrupted(seconds: float) -> None:
        if seconds == updates._POLL_S:
            os.kill(os.getpid(), signal.SIGINT)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", interrupted)
    # Shells start what runs in their background with it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            holdfast("update", "download")
    finally:
        signal.signal(signal.SIGINT, before)
    assert "the job goes on" in capsys.readouterr().err
    assert api.paths() == ["POST /v1/update/download"]


def test_status_for_people(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/update"] = (
        200,
        STATUS
        | {"phase": "downloading", "version": "1.1.0", "done": 1 << 20, "total": 4 << 20, "new": 1}
        | {"keys": "CN=db (1.1.0): pending"},
    )
    capsys.readouterr()
    holdfast("update", "status")
    out = capsys.readouterr().out
    for line in (
        "Running:    1.0.0",
        "Updater:    downloading 1.1.0, 1 MiB of 4 MiB",
        "Epoch:      2; lowest allowed 1 (tpm)",
        "Key change: CN=db (1.1.0): pending",
        "b     1.1.0    trying   2",
        "1.0.9           2026-11-30T02:00:00Z  the gate: no? probe",
    ):
        assert line in out, out
    api.answers["/v1/update"] = (200, {"running": "1.0.0", "phase": "idle"})
    holdfast("update", "status")
    out = capsys.readouterr().out
    assert "SLOT" not in out and "Key change" not in out


@pytest.mark.parametrize(
    ("arguments", "request_line", "answer"),
    [
        (("update", "cancel"), "POST /v1/update/cancel", STATUS),
        (("update", "rollback", "--no-wait"), "POST /v1/update/rollback", STATUS | {"installed": "0.9.0"}),
        (("update", "status"), "GET /v1/update", STATUS),
        (("update", "history"), "GET /v1/update/history", [EVENT, EVENT | {"new": 1}]),
        (("update", "history"), "GET /v1/update/history", []),
        (("host", "reboot", "--yes"), "POST /v1/host/reboot", {"how": "reboot", "machines": []}),
        (("host", "shutdown"), "POST /v1/host/shutdown", {"machines": [{"name": "web", "how": "shut-down"}]}),
    ],
)
def test_every_verb_makes_its_request(
    api: FakeApi, capsys: Capture, arguments: tuple[str, ...], request_line: str, answer: Any
) -> None:
    api.answers[request_line.split()[1]] = (200, answer)
    capsys.readouterr()
    assert holdfast(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.out + captured.err
    assert holdfast("--json", *arguments) == 0
    assert json.loads(capsys.readouterr().out) == answer
    assert api.paths() == [request_line] * 2


def test_a_bundle_is_uploaded(api: FakeApi, capsys: Capture, tmp_path: Path) -> None:
    api.answers["/v1/update/bundle"] = (200, STATUS)
    bundle = tmp_path / "release.bundle"
    bundle.write_bytes(os.urandom(1 << 20))
    holdfast("update", "import", str(bundle))
    assert api.paths() == ["PUT /v1/update/bundle"] and api.seen[0].body == bundle.read_bytes()
    assert "holdfast update check --bundle" in capsys.readouterr().err


@pytest.mark.parametrize(("answer", "goes"), [("y", True), ("n", False)])
def test_a_restart_is_asked_about_on_a_terminal(
    api: FakeApi, monkeypatch: pytest.MonkeyPatch, capsys: Capture, answer: str, goes: bool
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer + "\n"

    monkeypatch.setattr("sys.stdin", Terminal())
    api.answers["/v1/host/reboot"] = (202, {"how": "reboot", "machines": []})
    if goes:
        holdfast("host", "reboot")
    else:
        with pytest.raises(UserError, match="nothing was done"):
            holdfast("host", "reboot")
    assert bool(api.seen) is goes
    assert "hf1 restarts, and all of its machines stop" in capsys.readouterr().err


def test_completion_knows_them(capsys: Capture) -> None:
    holdfast("completion", "bash")
    script = capsys.readouterr().out
    for words, expected in (("holdfast update roll", "rollback"), ("holdfast host reboot --y", "--yes")):
        line = words.split()
        check = f"COMP_WORDS=({' '.join(line)}); COMP_CWORD={len(line) - 1}; _holdfast; echo ${{COMPREPLY[*]}}"
        assert process.run(["bash", "-c", f"{script}\n{check}"]).stdout.split() == [expected]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (None, "Updates:        none"),
        (
            {"repository": "https://u.example.org/"},
            "Updates:        https://u.example.org/, channel stable, on request",
        ),
        (
            {
                "repository": "https://u.example.org/",
                "channel": "early",
                "proxy": "http://192.0.2.5:3128",
                "ca": "PEM",
                "automatic": True,
                "window": "01:00-05:00",
            },
            (
                "Updates:        https://u.example.org/, channel early, through http://192.0.2.5:3128, "
                "own authorities, automatic every 6 h, window 01:00-05:00 UTC"
            ),
        ),
    ],
)
def test_the_configuration_says_where_updates_come_from(
    api: FakeApi, capsys: Capture, section: dict[str, Any] | None, line: str
) -> None:
    api.answers["/v1/configuration"] = (200, CONFIGURATION | {"update": section})
    capsys.readouterr()
    holdfast("config", "show")
    assert line in capsys.readouterr().out.splitlines()


def test_a_machine_is_given_its_time_to_shut_down(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/machines"] = (201, MACHINE | {"stop_timeout": 300})
    holdfast("vm", "create", "web", "--stop-timeout", "300")
    assert json.loads(api.seen[0].body)["stop_timeout"] == 300
    assert "300 s to shut down" in capsys.readouterr().out


def test_a_machine_that_is_saved_when_the_host_stops(api: FakeApi, capsys: Capture) -> None:
    lost = {"state": "lost", "since": "2026-11-23T04:05:06Z", "size": 0, "reason": "its disks were changed since"}
    api.answers["/v1/machines"] = (201, MACHINE | {"host_stop": "save", "saved": None})
    holdfast("vm", "create", "web", "--host-stop", "save")
    assert json.loads(api.seen[0].body)["host_stop"] == "save"
    out = capsys.readouterr().out
    assert "Host stops:  saved within 120 s, or shut down; resumed after" in out and "Saved state: none" in out
    api.answers["/v1/machines/web"] = (200, MACHINE | {"host_stop": "save", "saved": lost})
    holdfast("vm", "show", "web")
    out = capsys.readouterr().out
    assert "Saved state: lost, of 2026-11-23T04:05:06Z: its disks were changed since" in out
    kept = lost | {"state": "saved", "size": 300 << 20, "reason": ""}
    api.answers["/v1/machines/web"] = (200, MACHINE | {"state": "saved", "host_stop": "save", "saved": kept})
    holdfast("vm", "show", "web")
    assert "Saved state: saved, 300 MiB, of 2026-11-23T04:05:06Z\n" in capsys.readouterr().out
