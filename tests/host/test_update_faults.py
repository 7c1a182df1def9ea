"""What goes wrong without anybody's ill will: no room, no server, a slow one, a proxy. Nothing is lost by it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness import esp
from tests.harness.agent import Agent
from tests.harness.forging import OTHER_CHANNEL, Forgery
from tests.harness.host import Host
from tests.harness.proxy import Proxy
from tests.harness.publishing import Publisher
from tests.harness.repository import RepositoryServer
from tests.harness.seed import REPOSITORY
from tests.harness.updates import Updates, slot
from tests.harness.waiting import poll

MIB = 1 << 20
OFFERED, LARGE = "0.1.9", "0.9.9"
_APPLIED = "/run/holdfast/config.json"
_FILLER = "/var/lib/holdfast/filler"
# Its process id, or 0. The run that writes, and not the one before, which makes room.
_STOP_THE_WRITER = """
import os, pathlib, signal, time
deadline = time.monotonic() + argument
result = 0
while not result and time.monotonic() < deadline:
    for file in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\\0")
        except OSError:
            continue  # it has ended
        if words[0].endswith(b"/systemd-sysupdate") and b"update" in words:
            result = int(file.parent.name)
            os.kill(result, signal.SIGSTOP)
            break
    time.sleep(0.01)
"""
_GO_ON = "import os, signal; os.kill(argument, signal.SIGCONT)"
_FIGURES = "([0-9]+) bytes are needed, ([0-9]+) are free, ([0-9]+) are missing"


@contextmanager
def full(agent: Agent, left: int) -> Iterator[None]:
    """Have about ``left`` bytes free on the data volume."""
    source = """
import os
descriptor = os.open(argument[0], os.O_WRONLY | os.O_CREAT)
found = os.fstatvfs(descriptor)
os.posix_fallocate(descriptor, 0, found.f_bavail * found.f_frsize - argument[1])
os.close(descriptor)
"""
    agent.python(source, [_FILLER, left])
    yield
    agent.exec(["rm", _FILLER])


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_no_room_is_said_with_figures_before_anything_is_fetched(
    updates: Updates, host: Host, repositories: Path
) -> None:
    """A full data volume, a full ESP and a part larger than the slot; with room, the same host takes the release."""
    good = Forgery(repositories / "origin", repositories / "good")
    good.release(OFFERED)
    good.release(LARGE, channel=OTHER_CHANNEL, stated={"root": 2 << 30})
    good.publish()
    with host.serve(good.folder) as server:
        assert updates.do("check")["available"] == OFFERED
        updates.refused("download", f"the partition root of the other slot: {_FIGURES}", version=LARGE)
        with full(host.agent, 32 * MIB):
            updates.refused("download", f"staging on the data volume: {_FIGURES}")
        with esp.full(host.agent, MIB // 2):
            updates.refused("download", f"the EFI system partition: {_FIGURES}")
        assert not [path for path in server.asked if path.endswith(".zst")]
        status = updates.status()
        assert (status["staged"], status["installed"]) == ("", "")
        reasons = [reason for _, _, reason in updates.refusals()]
        assert len(reasons) == 3
        for reason, most in zip(reasons, (1024 * MIB, 40 * MIB, MIB), strict=True):
            found = re.search(_FIGURES, reason)
            assert found, reason
            needed, free, missing = (int(figure) for figure in found.groups())
            assert free <= most and needed - free == missing > 0, reason
        assert updates.do("download")["staged"] == OFFERED


@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_a_download_outlives_its_server(updates: Updates, host: Host, repositories: Path) -> None:
    """The server goes away, then stalls until an administrator cancels: each time only the rest is fetched.

    A server that says nothing at all is given up after half a minute (slow retrieval).
    """
    good = Forgery(repositories / "origin", repositories / "good")
    good.release(OFFERED, root_size=8 * MIB)
    good.publish()
    whole = good.stored(f"holdfast_{OFFERED}/root.zst").stat().st_size
    quarter = whole // 4
    before = updates.written()
    with host.serve(good.folder) as server:
        assert updates.do("check")["available"] == OFFERED
        server.break_after = quarter
        updates.refused("download", "the repository at 10.0.2.100 cannot be read")
    updates.refused("download", "the repository at 10.0.2.100 (cannot be read|did not answer)")

    with host.serve(good.folder) as server:
        server.stall_after = quarter
        updates.api.call("POST", "/v1/update/download", {}, seconds=120)
        seconds = 60 * host.acceleration.scale
        assert server.stalled.wait(seconds), "the download does not come to where the server stalls"
        poll(lambda: updates.status()["done"] >= 1.5 * quarter, seconds, "what was sent has arrived")
        status = updates.api.call("POST", "/v1/update/cancel", seconds=10)
        assert (status["phase"], status["staged"], status["error"]) == ("idle", "", "the update was cancelled")
        assert updates.written() == before
        server.stall_after = None
        sent = server.sent
        assert updates.do("download")["staged"] == OFFERED
        assert server.sent - sent < 2.75 * quarter

        server.stall_after = 0
        updates.refused("check", "transport: the server sent 0 bytes in 3[0-9] s, which is too slow")
        server.stall_after = None
        status = updates.do("check")
        assert (status["available"], status["staged"]) == (OFFERED, OFFERED)
    refusals = updates.refusals()
    assert [(kind, layer) for kind, layer, _ in refusals] == [
        ("update.download", ""),
        ("update.download", ""),
        ("update.download", ""),
        ("update.check", "transport"),
    ]
    assert refusals[2][2] == "the update was cancelled"


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_writing_that_is_cancelled_leaves_the_running_system_and_is_repeated(
    updates: Updates, host: Host, offered: Publisher
) -> None:
    """The writer is held until the updater has been told: how long writing takes is the machine's affair."""
    with host.serve(offered.folder):
        updates.do("check")
        updates.do("download")
    slots, entries = updates.written()
    seconds = 60 * host.acceleration.scale
    with ThreadPoolExecutor(2) as beside:
        stopping = beside.submit(host.agent.python, _STOP_THE_WRITER, seconds, seconds=70)
        updates.begin("apply")
        writer = stopping.result()
        assert writer, "nothing was written"
        assert updates.status()["phase"] == "writing"
        # It answers when the job has ended, which a step that runs already delays.
        beside.submit(updates.api.call, "POST", "/v1/update/cancel", seconds=120)
        poll(lambda: updates.records("update.cancel"), seconds, "the wish to cancel is on record")
        host.agent.python(_GO_ON, writer)
    status = updates.ended("apply")
    assert (status["phase"], status["installed"], status["error"]) == ("staged", "", "the update was cancelled")
    assert (slot(status, "a"), slot(status, "b")["state"]) == (slots[0], "incomplete")
    assert updates.written()[1] == entries
    assert updates.refusals() == [("update.apply", "", "the update was cancelled")]
    again = updates.do("apply")
    assert (again["installed"], slot(again, "b")["state"], slot(again, "b")["tries"]) == ("0.1.1", "trying", 3)


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_updates_by_way_of_a_proxy(updates: Updates, host: Host, repositories: Path) -> None:
    """With update.proxy a release comes through its tunnel, to a server that is to be reached no other way.

    The configuration changes at a start only, so the test changes the one in force, which the updater reads each time.
    """
    good = Forgery(repositories / "origin", repositories / "good")
    good.release(OFFERED)
    good.publish()
    behind = host.repository_socket.with_name("behind-proxy")
    with Proxy(behind) as proxy, RepositoryServer(good.folder, behind, REPOSITORY):
        applied = json.loads(host.agent.read(_APPLIED))
        applied["update"]["proxy"] = f"http://10.0.2.2:{proxy.port}"
        host.agent.write(_APPLIED, json.dumps(applied).encode())
        assert updates.do("check")["available"] == OFFERED
        assert updates.do("download")["staged"] == OFFERED
        assert set(proxy.asked) == {"CONNECT 10.0.2.100:443 HTTP/1.1"}
        proxy.open = False
        updates.refused("check", "the repository at 10.0.2.100 cannot be read: 403")
        proxy.open = True
        assert updates.do("check")["available"] == OFFERED
