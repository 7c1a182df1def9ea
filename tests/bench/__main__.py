"""``python3 -m tests.bench`` (`make bench`): measure, print a table, write build/bench.json.

A goal that is missed is shown and is no failure; the exit code tells of errors only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from image.builder.host import say
from image.builder.layout import Layout
from tests.bench import builds, guests
from tests.bench.figures import MB, MIB, Figure, document, machine_state, median, ratio, table
from tests.bench.holdfast import Started, service_memory, started_twice
from tests.bench.reference import Report, boot_reference, build_reference
from tests.guest.linux import GuestSources, build_linux_disk
from tests.harness.accel import acceleration
from tests.harness.agent import AgentError
from tests.harness.api import ApiError
from tests.harness.guarded import ProcessEnded
from tests.harness.image import Image
from tests.harness.qmp import QmpError
from tests.harness.seed import identities
from tests.harness.stream import Closed
from tests.harness.waiting import Expired
from vmm.errors import die, main

_PARTS = {
    "build": "build times, cold and warm",
    "sizes": "sizes of the UKI, the payload and the root",
    "stock": "the start of the stock reference image, which is built when needed",
    "boot": "the start of the host image",
    "memory": "memory of the idle services",
    "guests": "create-to-running of a guest",
}
_RESULT = Path("build/bench.json")
_FOLDER = Path("build/bench/run")
_REPETITIONS, _QUICK_REPETITIONS = 5, 1

_BOOT_GOAL, _GUEST_GOAL = 0.6, 1.1
_MEMORY_GOAL = 90.0  # MB, all daemons of ours together

_LIBRARY = (
    "libvirt's createXML of the XML that core makes. The image has no virsh: `virsh create` would take longer, by its "
    "own start and connection."
)
_PLAIN = (
    "QEMU with libvirt's command line, as root: no uid of its own, AppArmor profile, cgroup or mount namespace; its "
    "tap is on no bridge."
)
_SECOND = "Power-on to ready of each image's second start; keys are enrolled and volumes made at the first."


@dataclass(frozen=True)
class _Options:
    parts: frozenset[str]
    repetitions: int


def _arguments() -> _Options:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.bench",
        description="Measure build, sizes, start, memory and guests; print a table and write build/bench.json.",
        epilog="parts: " + "; ".join(f"{name}: {what}" for name, what in _PARTS.items()),
    )
    parser.add_argument("--only", action="append", choices=list(_PARTS), help="measure this part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="no builds, and each way of starting a guest once")
    options = parser.parse_args()
    parts = frozenset(options.only or (name for name in _PARTS if not (options.quick and name == "build")))
    return _Options(parts, _QUICK_REPETITIONS if options.quick else _REPETITIONS)


def _sizes(layout: Layout) -> list[Figure]:
    sizes = json.loads(layout.manifest.read_text())["sizes"]
    limits = layout.limits
    return [
        Figure("sizes", "UKI", sizes["uki"] / MIB, "MiB", limits.uki_bytes / MIB),
        Figure("sizes", "payload (UKI and compressed slot)", sizes["payload"] / MIB, "MiB", limits.payload_bytes / MIB),
        Figure("sizes", "root", sizes["root"] / MIB, "MiB"),
    ]


def _memory(services: Mapping[str, int]) -> list[Figure]:
    ours = {name: size for name, size in services.items() if name.startswith("holdfast-")}
    group = "memory of idle services (PSS)"
    return [
        *(Figure(group, name, size / MB, "MB") for name, size in sorted(services.items())),
        Figure(group, "holdfast-* together", sum(ours.values()) / MB, "MB", _MEMORY_GOAL),
    ]


def _stock(first: Boot, later: Sequence[Boot], memory: int, uki: Path) -> list[Figure]:
    group = "start of the stock image"
    return [
        Figure(group, "first start: at libvirtd ready", first.ready, "s"),
        *boot_figures(group, "libvirtd ready", later),
        Figure(group, "UKI", uki.stat().st_size / MIB, "MiB"),
        Figure(group, "libvirtd.service (PSS)", memory / MB, "MB"),
    ]


def _host(first: Started, later: Sequence[Started], stock: Sequence[Boot]) -> list[Figure]:
    group = "start of the host image"
    boots = [started.boot for started in later]
    figures = [
        Figure(group, "first start: at API ready", first.boot.ready, "s"),
        *boot_figures(group, "API ready", boots),
        median(group, "at first answer to an administrator", [started.managed for started in later], note=_MANAGED),
    ]
    if stock:
        ours, theirs = ([boot.ready for boot in some] for some in (boots, stock))
        share = ratio(group, "", median(group, "", ours), median(group, "", theirs), goal=_BOOT_GOAL)
        figures.append(replace(share, name="API ready : libvirtd ready of the stock image", note=_LATER))
        ours, theirs = ([boot.processor for boot in some] for some in (boots, stock))
        figures.append(ratio(group, "processor time until then, likewise", median(group, "", ours), median(group, "", theirs)))
    return figures


def _guests(samples: guests.Samples) -> list[Figure]:
    group = "guest, create to running"
    api = median(group, "API: create and start", samples.api)
    libvirt = median(group, "libvirt, the same XML", samples.libvirt, note=_LIBRARY)
    qemu = median(group, "QEMU, the same devices", samples.qemu, note=_PLAIN)
    return [
        api,
        libvirt,
        qemu,
        ratio(group, "API : libvirt", api, libvirt, goal=_GUEST_GOAL),
        ratio(group, "API : QEMU", api, qemu),
    ]


def _fresh(name: str) -> Path:
    folder = _FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _measure(options: _Options, figures: list[Figure]) -> None:
    """Measure the parts in turn, adding to ``figures``; one machine runs at a time."""
    layout = Layout.from_environment()
    image = Image.built()
    if "sizes" in options.parts:
        figures += _sizes(layout)
    if "build" in options.parts:
        say("building in a copy: cold, then warm")
        figures += builds.measure(layout)
    if options.parts & {"stock", "boot", "memory", "guests"}:
        _run_machines(options, layout, image, figures)


def _run_machines(options: _Options, layout: Layout, image: Image, figures: list[Figure]) -> None:
    """Start both images in turn, as often as asked for after a first time; the rest runs in the last host."""
    stock, host = "stock" in options.parts, bool(options.parts - {"build", "sizes", "stock"})
    starts = options.starts if "boot" in options.parts else 0
    stock_boots: list[tuple[Boot, int]] = []
    host_boots: list[Started] = []
    disk, uki = build_reference(layout) if stock else (Path(), Path())
def entry() -> int:
    """Measure what the command line asks for. Raises: UserError when something fails, after showing what there is."""
    options = _arguments()
    machine = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **machine_state(acceleration())}
    figures: list[Figure] = []
    try:
        _measure(options, figures)
    except (AgentError, ApiError, Closed, Expired, ProcessEnded, QmpError) as error:
        die(str(error), hint=f"the logs of the machines are in {_FOLDER}")
    finally:
        machine["load at the end"] = round(os.getloadavg()[0], 2)
        _RESULT.write_text(json.dumps(document(machine, figures), indent=2) + "\n")
        print("\n".join(f"{name}: {value}" for name, value in machine.items()))
        print(f"\n{table(figures)}\n\nwritten to {_RESULT}", flush=True)
    return 0


if __name__ == "__main__":
    main(entry)
