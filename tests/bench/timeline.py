"""When a machine reaches the stages of its start, seen from outside, and what its systemd says of them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench.figures import Figure, median
from tests.harness.host import Host

FIRMWARE_DONE, LOADER_DONE = "boot loader starts", "kernel starts"
MARKERS = {
    FIRMWARE_DONE: b"BdsDxe: starting Boot",
    # The kernel's own first words; it still runs as a UEFI program then.
    LOADER_DONE: b"EFI stub: Loaded initrd",
}
"""What stages write on the serial console. The last boot counts, as the enrolment of keys resets the machine."""

PHASES = ("firmware", "loader", "kernel", "initrd", "userspace")
_UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
_SPAN = r"(?:[\d.]+(?:h|min|ms|us|s) ?)+"
_LOOK_SECONDS = 0.02


def seconds(span: str) -> float:
    """Seconds of a time span as systemd writes it: "1min 2.345s". Raises: ValueError."""
    parts = [re.fullmatch(r"([\d.]+)(h|min|ms|us|s)", word) for word in span.split()]
    if not parts or not all(parts):
        raise ValueError(f"not a time span: {span!r}")
    return sum(float(part[1]) * _UNITS[part[2]] for part in parts if part)


def startup(text: str) -> dict[str, float]:
    """Seconds a phase, from `systemd-analyze time`. Raises: ValueError when it holds no phases."""
    found = {phase: seconds(span) for span, phase in re.findall(rf"({_SPAN})\((\w+)\)", text)}
    if not found:
        raise ValueError(f"no phases of a start in {text!r}")
    return found


@dataclass(frozen=True)
class Boot:
    """One start: seconds from power-on to each marker and to ready, and systemd's own seconds a phase.

    ``processor`` is the processor time, in seconds, that the emulated machine took until it was ready: it says
    how much a start does even while other programs slow it down.
    """

    markers: Mapping[str, float]
    ready: float
    processor: float
    phases: Mapping[str, float]


def boot_figures(group: str, ready: str, boots: Sequence[Boot]) -> list[Figure]:
    """The timeline of some starts of one machine as medians; ``ready`` says what "ready" is."""
    samples = {
        **{f"at {name}": [boot.markers[name] for boot in boots if name in boot.markers] for name in MARKERS},
        f"at {ready}": [boot.ready for boot in boots],
        f"processor time until {ready}": [boot.processor for boot in boots],
        **{f"{phase} (systemd)": [boot.phases[phase] for boot in boots if phase in boot.phases] for phase in PHASES},
    }
    return [median(group, name, values) for name, values in samples.items() if values]


def processor_time(host: Host) -> float:
    """Seconds of processor time that a running machine's QEMU has taken so far."""
    # Of a thread, too, this file tells of the whole process; fields 14 and 15, counted after the name (proc(5)).
    thread = host.qmp.execute("query-cpus-fast")[0]["thread-id"]
    fields = Path(f"/proc/{thread}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Watch:
    """Notes when markers appear in a growing file. As a context manager it looks while inside.

    Arguments: ``file`` may not exist yet; what it holds already does not count. ``markers`` are name → text.
    """

    def __init__(self, file: Path, markers: Mapping[str, bytes]) -> None:
        self._file = file
        self._markers = markers
        self._offset = file.stat().st_size if file.exists() else 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self.seen: dict[str, float] = {}
        """Marker → time.monotonic() of its last appearance."""

    def _look(self) -> None:
        counts = dict.fromkeys(self._markers, 0)
        content = b""
        while not self._stopped.wait(_LOOK_SECONDS):
            if not self._file.exists():
                continue
            with self._file.open("rb") as file:
                file.seek(self._offset + len(content))
                fresh = file.read()
            if not fresh:
                continue
            content += fresh
            for name, text in self._markers.items():
                if (count := content.count(text)) > counts[name]:
                    counts[name], self.seen[name] = count, time.monotonic()

    def since(self, start: float) -> dict[str, float]:
        """Marker → seconds from ``start`` (time.monotonic()) to its last appearance."""
        return {name: moment - start for name, moment in self.seen.items()}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
