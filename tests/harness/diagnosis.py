"""What a host under test looks like at the moment a test fails; afterwards it is switched off."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial

from tests.harness.host import Host

_MOST_LINES = 80
_COMMANDS = (
    ["journalctl", "--boot", "--no-pager", "--output=short-monotonic", "--lines=400"],
    ["systemctl", "list-jobs", "--no-pager"],
    ["systemctl", "list-units", "--failed", "--no-legend", "--no-pager"],
)
_PROCESSES = """
import pathlib
result = []
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        command = (folder / "cmdline").read_bytes().replace(bytes(1), b" ").decode(errors="replace")
        for task in (folder / "task").iterdir() if command else ():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks = int(fields[11]) + int(fields[12])
            waits = (task / "wchan").read_text()
            result.append((ticks, f"{task.name:>6} {fields[0]} {waits:24} {ticks:6} {command[:120]}"))
    except OSError:
        pass  # it has ended
result = [line for _, line in sorted(result, reverse=True)]
"""


def describe(host: Host) -> str:
    """Processors, the end of the serial console and, if the agent answers, the journal and processes.

    Never raises: what cannot be found out is said instead.
    """
    parts = {"processors": _processors, "serial console": _serial, "by the agent": _system}
    return "\n".join(f"-- {title}\n{_told(partial(part, host))}" for title, part in parts.items())


def _told(part: Callable[[], str]) -> str:
    try:
        return part().rstrip()
    except Exception as error:  # noqa: BLE001 - the test's own failure is what must be seen
        return f"not to be had: {type(error).__name__}: {error}"[:400]


def _processors(host: Host) -> str:
    """Where each one is, twice: one that makes no progress is stuck."""
    seen = [str(host.qmp.execute("query-status", seconds=5))]
    for _ in range(2):
        registers = host.qmp.human("info registers -a")
        seen.append(" ".join(re.findall(r"RIP=[0-9a-f]+|HLT=\d", registers)))
        time.sleep(0.5)
    return "\n".join(seen)


def _serial(host: Host) -> str:
    log = (host.files.directory / "serial.log").read_text(errors="replace")
    return _last(log)


def _system(host: Host) -> str:
    told = []
    for command in _COMMANDS:
        done = host.agent.exec(command, check=False, seconds=10)
        told.append(f"$ {' '.join(command)}\n{_last(done.out)}{done.err}")
    told.append("thread, state, where it waits, processor time in 1/100 s:")
    return "\n".join(told + host.agent.python(_PROCESSES))


def _last(log: str) -> str:
    """The end of a log without the kernel's audit trail, which would be most of it."""
    return "\n".join([line for line in log.splitlines() if "audit: type=" not in line][-_MOST_LINES:])
