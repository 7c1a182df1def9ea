"""`holdfast vm console`, in a pipe and on a terminal."""

from __future__ import annotations

import os
import pty
import select
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.unit.test_cli_rig import UUID, FakeApi, holdfast
from vmm import process
from vmm.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "vmm.cli", "vm", "console", "web"]


def test_in_a_pipe_input_goes_in_until_the_guest_ends_it(api: FakeApi) -> None:
    result = process.run([*COMMAND, "--timeout", "20"], input="poweroff\x1d\n", cwd=REPOSITORY, timeout=30)
    assert result.stdout == "login: you typed poweroff\x1d\n"
    assert f"Connected to web ({UUID})" in result.stderr
    assert "Authorised" in result.stderr
    assert api.typed == b"poweroff\x1d\n"
    assert api.paths() == ["GET /v1/banner", "GET /v1/machines/web/console"]


def test_the_end_of_the_input_ends_it_without_a_timeout(api: FakeApi) -> None:
    process.run(COMMAND, input="ls\n", cwd=REPOSITORY, timeout=30)
    assert api.typed == b"ls\n"


def test_log_only_sends_nothing(api: FakeApi) -> None:
    result = process.run([*COMMAND, "--log-only", "--timeout", "1"], input="ls\n", cwd=REPOSITORY, timeout=30)
    assert result.stdout == "login: " and api.typed == b""


def test_on_a_terminal_the_escape_key_ends_it_and_the_mode_is_restored(api: FakeApi) -> None:
    terminal, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    child = os.posix_spawn(
        sys.executable,
        COMMAND,
        {**os.environ, "PYTHONPATH": str(REPOSITORY)},
        file_actions=[(os.POSIX_SPAWN_DUP2, theirs, descriptor) for descriptor in range(3)],
        setsid=True,
    )
    shown = _read_until(terminal, b"login: ")
    assert f"Connected to web ({UUID}), Ctrl-] ends it".encode() in shown
    os.write(terminal, b"\x03ls\r")
    # Raw mode: neither an echo nor a signal.
    assert _read_until(terminal, b"you typed \x03ls\r").count(b"ls") == 1
    os.write(terminal, b"rest\x1dlost")
    _read_until(terminal, b"Disconnected from web")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert api.typed == b"\x03ls\rrest"
    assert termios.tcgetattr(theirs) == before


def test_a_refused_console_says_why(api: FakeApi) -> None:
    api.answers["/v1/machines/web/console"] = (409, "web is not running")
    with pytest.raises(UserError, match="web is not running"):
        holdfast("vm", "console", "web")


def _read_until(terminal: int, wanted: bytes, seconds: float = 20) -> bytes:
    shown = b""
    end = time.monotonic() + seconds
    while wanted not in shown:
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], shown
        shown += os.read(terminal, 4096)
    return shown
