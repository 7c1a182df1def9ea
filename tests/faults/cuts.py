"""One cut: begin to write the staged release, take the power away after some time, look, and perhaps start again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.inspect import Found, inspect, version
from tests.faults.staged import RUNNING
from tests.harness import releases
from tests.harness.checkpoint import Checkpoint
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.updates import Updates

LONGEST_S = 14.0
"""A little longer than writing, reading back and finishing take on the slowest machine that this runs on."""


@contextmanager
def cut(
    origin: Checkpoint, admin: Identity, release: releases.Built, seconds: float, workdir: Path
) -> Iterator[tuple[Host, Found]]:
    """Cut the power ``seconds`` after the order to write. Inside, the host is off and what is on its disk is known."""
    host = origin.host(workdir, faulty_disk=True)
    try:
        with host:
            host.agent.set_clock()
            Updates(host, admin).api.call("POST", "/v1/update/apply", seconds=60)
            time.sleep(seconds)
            host.power_cut()
            yield host, inspect(host.files.flat_disk, RUNNING, release.folder, workdir)
    finally:
        host.files.discard()


def complete(host: Host, admin: Identity, release: releases.Built) -> str:
    """Start a host after a cut, complete what was begun, and restart into it; "" or what went wrong."""
    host.power_on()
    updates = Updates(host, admin)
    host.wait_ready(admin, 120)
    status = updates.settled()
    if status["running"] == version(RUNNING):
        if not status["installed"]:
            updates.do("apply")
        updates.reboot()
        status = updates.settled()
    return "" if status["running"] == release.version else f"it runs {status['running']}: {status}"
