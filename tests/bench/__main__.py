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
from tests.bench import audit, builds, guests, starts, updates
from tests.bench.figures import MB, MIB, Figure, document, machine_state, table
from tests.bench.holdfast import Server, service_memory
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
    "audit": "records a second, what auditing adds to a call, verifying and searching",
    "build": "build times, cold and warm",
    "sizes": "sizes of the UKI, the payload and the root",
    "boot": "starts of the host image and of the stock reference, which is built when needed",
    "update": "a release on the wire, whole and as a patch of the one before and of N-2",
    "memory": "memory of the idle services",
    "guests": "create-to-running of a guest",
}
_RESULT = Path("build/bench.json")
_FOLDER = Path("build/bench/run")
_MEMORY_GOAL = 90.0
"""MB, all daemons of ours together."""


@dataclass(frozen=True)
class _Options:
    parts: frozenset[str]
    starts: int
    guests: int


def _options() -> _Options:
    parser = argparse.ArgumentParser(
        prog="python3 -m tests.bench",
        description="Measure audit, build, sizes, start, memory and guests; print a table and write build/bench.json.",
        epilog="parts: " + "; ".join(f"{name}: {what}" for name, what in _PARTS.items()),
    )
    parser.add_argument("--only", action="append", choices=list(_PARTS), help="measure this part; may be repeated")
    parser.add_argument("--quick", action="store_true", help="no builds unless by --only, and all else just once")
    given = parser.parse_args()
    parts = frozenset(given.only or (name for name in _PARTS if not (given.quick and name == "build")))
    return _Options(parts, starts=1, guests=1) if given.quick else _Options(parts, starts=3, guests=5)


def _sizes(layout: Layout) -> list[Figure]:
    sizes, limits = json.loads(layout.manifest.read_text())["sizes"], layout.limits
    return [
        Figure("sizes", "UKI", sizes["uki"] / MIB, "MiB", limits.uki_bytes / MIB),
        Figure("sizes", "payload (UKI and compressed slot)", sizes["payload"] / MIB, "MiB", limits.payload_bytes / MIB),
        Figure("sizes", "root", sizes["root"] / MIB, "MiB"),
    ]


def _memory(services: Mapping[str, int]) -> list[Figure]:
    group = "memory of idle services (PSS)"
    ours = sum(size for name, size in services.items() if name.startswith("holdfast-"))
    return [
        *(Figure(group, name, size / MB, "MB") for name, size in sorted(services.items())),
        Figure(group, "holdfast-* together", ours / MB, "MB", _MEMORY_GOAL),
    ]


def _fresh(name: str) -> Path:
    folder = _FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _measure(options: _Options, figures: list[Figure]) -> None:
    """Measure the parts in turn, adding to ``figures``; one machine runs at a time."""
    if "audit" in options.parts:
        say("measuring the audit trail")
        figures += audit.measure(_fresh("audit"))
    if options.parts == {"audit"}:
        return
    layout, image = Layout.from_environment(), Image.built()
    if "sizes" in options.parts:
        figures += _sizes(layout)
    if "build" in options.parts:
        say("building in a copy: cold, then warm")
        figures += builds.measure(layout)
    if "update" in options.parts:
        say("building and publishing two patch releases")
        figures += updates.measure(layout.release_folder, layout.version)
    if options.parts <= {"audit", "sizes", "build", "update"}:
        return
    server = Server(image, identities(Path("build/test/identities")), _fresh("host"))
    if "boot" in options.parts:
        figures += starts.measure(layout, server, _fresh("stock"), options.starts)
    if options.parts & {"memory", "guests"}:
        say("starting the host image to measure in it")
        with server.started() as (host, _):
            if "memory" in options.parts:
                figures += _memory(service_memory(host))
            if "guests" in options.parts:
                say(f"starting a guest in each of three ways, {options.guests} times")
                disk = _FOLDER / "guest.raw"
                build_linux_disk(disk, GuestSources())
                figures += guests.measure(host, server.admin, disk, options.guests)
    server.files.discard()


def entry() -> int:
    """Measure what the command line asks for. Raises: UserError when something fails, after showing what there is."""
    options = _options()
    machine = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **machine_state(acceleration())}
    figures: list[Figure] = []
    try:
        _measure(options, figures)
    except (AgentError, ApiError, Closed, Expired, ProcessEnded, QmpError) as error:
        die(str(error), hint=f"the logs of the machines are in {_FOLDER}")
    finally:
        machine["load at the end"] = [round(value, 2) for value in os.getloadavg()]
        _RESULT.write_text(json.dumps(document(machine, figures), indent=2) + "\n")
        print("\n".join(f"{name}: {value}" for name, value in machine.items()))
        print(f"\n{table(figures)}\n\nwritten to {_RESULT}", flush=True)
    return 0


if __name__ == "__main__":
    main(entry)
