"""What was measured: figures with their goals, as a table for people and JSON for programs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness.accel import Acceleration
from vmm.process import run

MB = 1_000_000
MIB = 1 << 20
_HEADINGS = ("", "measured", "goal", "")


@dataclass(frozen=True)
class Figure:
    """One measured quantity.

    ``goal``, where it has one, is the most that it may be (with ``least``, the least); ``note`` says how to read it.
    """

    group: str
    name: str
    value: float
    unit: str
    goal: float | None = None
    samples: tuple[float, ...] = ()
    note: str = ""
    least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.least else self.value <= self.goal


def median(group: str, name: str, samples: Sequence[float], *, note: str = "") -> Figure:
    """The median of times in seconds, which are kept with it. Raises: statistics.StatisticsError without any."""
    return Figure(group, name, statistics.median(samples), "s", samples=tuple(samples), note=note)


def ratio(group: str, name: str, ours: Figure, theirs: Figure, *, goal: float | None = None, note: str = "") -> Figure:
    """How many times theirs ours is."""
    return Figure(group, name, ours.value / theirs.value, "×", goal, note=note)


def _amount(value: float, unit: str) -> str:
    return f"{value:.2f} {unit}" if unit == "×" or value < 10 else f"{value:.1f} {unit}"


def table(figures: Sequence[Figure]) -> str:
    """Lines for a terminal: figures in groups, goals beside them, notes below."""
    rows: list[tuple[str, ...]] = []
    notes: dict[str, int] = {}
    for index, figure in enumerate(figures):
        if index == 0 or figures[index - 1].group != figure.group:
            rows.append((figure.group.upper(), "", "", ""))
        mark = f" [{notes.setdefault(figure.note, len(notes) + 1)}]" if figure.note else ""
        goal = "" if figure.goal is None else f"{'≥' if figure.least else '≤'} {figure.goal:g} {figure.unit}"
        verdict = {None: "", True: "met", False: "MISSED"}[figure.met]
        rows.append((f"  {figure.name}{mark}", _amount(figure.value, figure.unit), goal, verdict))
    widths = [max(len(row[column]) for row in (_HEADINGS, *rows)) for column in range(len(_HEADINGS))]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
        for row in (_HEADINGS, *rows)
    ]
    return "\n".join([*lines, "", *(f"[{number}] {note}" for note, number in notes.items())]).rstrip()


def document(machine: dict[str, Any], figures: Sequence[Figure]) -> dict[str, Any]:
    """The same for programs: a JSON object."""
    return {
        "machine": machine,
        "figures": [
            {
                "group": figure.group,
                "name": figure.name,
                "value": round(figure.value, 4),
                "unit": figure.unit,
                **({"goal": figure.goal, "met": figure.met} if figure.goal is not None else {}),
                **({"samples": [round(sample, 4) for sample in figure.samples]} if figure.samples else {}),
                **({"note": figure.note} if figure.note else {}),
            }
            for figure in figures
        ],
    }


def machine_state(accelerated: Acceleration) -> dict[str, Any]:
    """What the figures were measured on, and what else it was doing then."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "qemu": run(["qemu-system-x86_64", "--version"]).stdout.partition("\n")[0],
        "acceleration": accelerated.name,
        "load": [round(value, 2) for value in os.getloadavg()],
    }
