"""What the time of a record is worth: whether time servers set the clock, and how long ago.

systemd-timesyncd touches a file at each synchronisation. A look at that needs no system call that could set a clock:
adjtimex(2) would tell the same (timesyncd leaves the kernel's error bound at what it drifts since then), and the
daemon's filter refuses it.
"""

from __future__ import annotations

import time
from pathlib import Path

from vmm.audit.records import Clock
from vmm.paths import ROOT

_SYNCHRONISED = ROOT / "run/systemd/timesync/synchronized"
_FRESH_S = 2 * 3600
"""timesyncd asks at least every 34 minutes: by then it has missed three times, and a poor clock a quarter second."""


def clock(mark: Path = _SYNCHRONISED) -> Clock:
    """How the system's clock stands now; ``mark`` is the file that timesyncd touches."""
    try:
        age = time.time() - mark.stat().st_mtime
    except OSError:
        return Clock("host", "unsynchronised")
    # A clock that lies before its last synchronisation was set by somebody else since.
    return Clock("ntp", "synchronised" if 0 <= age <= _FRESH_S else "holding")
