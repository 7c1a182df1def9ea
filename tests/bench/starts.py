"""From power-on to ready: the host image and the stock image, started in turn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from image.builder.host import say
from image.builder.layout import Layout
from tests.bench.figures import MB, MIB, Figure, median, ratio
from tests.bench.holdfast import Server, Started
from tests.bench.reference import build_reference, start_reference
from tests.bench.timeline import Boot, boot_figures
from tests.harness.checkpoint import fresh
from tests.harness.machine import Hardware

_GOAL = 0.6
_STOCK, _HOST = "start of the stock image", "start of the host image"
_LATER = "Medians of later starts: at its first start an image enrols keys, makes volumes and files."
_PROCESSOR = "What the emulated machine computed until then; unlike time it does not depend on what else runs."
_MANAGED = "A list of machines, for which core asks libvirt: what `virsh version` shows of the stock image."


def measure(layout: Layout, server: Server, folder: Path, starts: int) -> list[Figure]:
    """Start each image once, then ``starts`` times in turn. The stock machine's files are in ``folder``.

    Raises: what the starts raise; CommandFailed when the stock image cannot be built.
    """
    disk, uki = build_reference(layout)
    files = fresh(folder, disk, Hardware().disk)
    stock: list[Boot] = []
    host: list[Started] = []
    memory = 0
    for number in range(starts + 1):
        say(f"starting the stock image and the host image ({number + 1} of {starts + 1})")
        boot, memory = start_reference(files)
        stock.append(boot)
        with server.started() as (_, started):
            host.append(started)
    files.discard()
    return [
        *_stock_figures(stock),
        Figure(_STOCK, "UKI", uki.stat().st_size / MIB, "MiB"),
        Figure(_STOCK, "libvirtd.service (PSS)", memory / MB, "MB"),
        *_host_figures(host),
        *_shares([started.boot for started in host[1:]], stock[1:]),
    ]


def _stock_figures(boots: Sequence[Boot]) -> list[Figure]:
    return [
        Figure(_STOCK, "first start: at libvirtd ready", boots[0].ready, "s"),
        *boot_figures(_STOCK, "libvirtd ready", boots[1:]),
    ]


def _host_figures(starts: Sequence[Started]) -> list[Figure]:
    later = starts[1:]
    return [
        Figure(_HOST, "first start: at API ready", starts[0].boot.ready, "s"),
        *boot_figures(_HOST, "API ready", [started.boot for started in later]),
        median(_HOST, "at first answer from libvirt through the API", [s.managed for s in later], note=_MANAGED),
    ]


def _shares(ours: Sequence[Boot], theirs: Sequence[Boot]) -> list[Figure]:
    group = "host image : stock image"
    ready = [median("", "", [boot.ready for boot in boots]) for boots in (ours, theirs)]
    processor = [median("", "", [boot.processor for boot in boots]) for boots in (ours, theirs)]
    return [
        ratio(group, "power-on to ready", *ready, goal=_GOAL, note=_LATER),
        ratio(group, "processor time until ready", *processor, note=_PROCESSOR),
    ]
