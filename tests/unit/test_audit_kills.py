"""The audit daemon and its anchor as processes that are killed at any moment, and started anew."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.waiting import poll
from tests.unit.test_audit_daemon import EVENT, stored
from vmm.audit import verify
from vmm.audit.checkpoint import Checkpoint
from vmm.audit.client import AuditClient, Entry
from vmm.errors import Unavailable
from vmm.process import spawn

KILLS = 8
_DAEMON = """
import os, pwd, vmm.audit.anchoring as a, vmm.audit.server as s
a.Checkpoints.__init__.__kwdefaults__.update(first=0, interval=0.001)
s.PRODUCERS = {pwd.getpwuid(os.geteuid()).pw_name: "holdfast-core"}
s.run()
"""
# As systemd hands over a socket: descriptor 3, meant for this very process.
_ANCHOR = """
import os, sys
os.dup2(int(sys.argv[1]), 3, inheritable=False)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
from vmm.audit.anchor import run
run()
"""


@contextlib.contextmanager
def program(root: Path, code: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[int]:
    """A process that is killed in the end; yields its id."""
    command = [sys.executable, "-c", code, *arguments]
    process = spawn(command, env={"HOLDFAST_ROOT": str(root)}, pass_fds=pass_fds)
    try:
        yield process.pid
    finally:
        process.kill()
        process.wait()


@pytest.mark.sfr("FAU_STG.1")
@pytest.mark.parametrize("victim", ["daemon", "anchor"])
def test_a_trail_verifies_whatever_was_killed(victim: str, tmp_path: Path) -> None:
    run, store = tmp_path / "run/holdfast", tmp_path / "var/lib/holdfast-audit"
    for folder in (run / "audit", store):
        folder.mkdir(parents=True)
    acknowledged: set[int] = set()

    def made() -> int:
        """How many checkpoints there are; the store is read as it stands, a line that is being written left out."""
        content = b"".join(file.read_bytes() for file in verify.segments(store))
        return content.count(b'"signature"')

    async def load(kill: int) -> None:
        client = AuditClient(run / "audit/audit.sock")
        # The daemon may still be starting, or gone.
        while made() < enough:
            with contextlib.suppress(Unavailable):
                acknowledged.add(await client.append(Entry(type=EVENT)))
            await asyncio.sleep(0)
        await asyncio.sleep(0.0007 * kill)

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(run / "anchor.sock"))
        listening.listen()
        descriptor = listening.fileno()
        for kill in range(KILLS):
            enough = made() + 3
            with (
                program(tmp_path, _ANCHOR, str(descriptor), pass_fds=(descriptor,)) as anchor,
                program(tmp_path, _DAEMON) as daemon,
            ):
                asyncio.run(asyncio.wait_for(load(kill), 30))
                os.kill(daemon if victim == "daemon" else anchor, signal.SIGKILL)
                if victim == "anchor":
                    # What it was doing then is made up for by the next one.
                    with program(tmp_path, _ANCHOR, str(descriptor), pass_fds=(descriptor,)):
                        before = made()
                        asyncio.run(AuditClient(run / "audit/audit.sock").append(Entry(type=EVENT)))
                        poll(lambda: made() > before, 30, "it is anchored again")  # noqa: B023
    for file in verify.segments(store):
        whole = file.read_bytes()
        file.write_bytes(whole[: whole.rfind(b"\n") + 1])
    report = verify.verify_directory(store)
    assert report.problem is None and report.records >= max(acknowledged)
    found = [r for r in stored(store) if r.type == "audit.checkpoint" and r.outcome == "success"]
    assert len(found) >= 3 * KILLS
    assert [Checkpoint.of(r).proof.counter for r in found] == list(range(1, len(found) + 1))
