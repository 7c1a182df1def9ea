"""The stock reference: the host image's Debian packages as mkosi makes a system of them by itself (stock/)."""

from __future__ import annotations

import json
import time
from pathlib import Path

from image.builder.host import say
from image.builder.initrd import contents
from image.builder.layout import Layout, digest
from image.builder.tree import run_mkosi
from signing.keys import open_keys
from tests.bench.timeline import MARKERS, Boot, Watch, processor_time, startup
from tests.harness.host import Host
from tests.harness.image import Files
from vmm.process import run

_DEFINITION = Path(__file__).with_name("stock")


def packages(layout: Layout) -> list[str]:
    """The packages of the host image, read by mkosi itself so that the two never differ."""
    summary = run(
        [
            *("mkosi", f"--directory={layout.repository}", f"--cache-directory={layout.build / 'mkosi.cache'}"),
            *("--json", "summary"),
        ]
    )
    return [str(name) for name in json.loads(summary.stdout)["Images"][-1]["Packages"]]


def build_reference(layout: Layout) -> tuple[Path, Path]:
    """The stock image's disk and its unified kernel image, built if anything they are made from changed.

    They are signed with keys of their own, so that no product key ever signs them.
    Raises: CommandFailed when mkosi fails.
    """
    folder = layout.build / "bench/stock"
    disk, uki, stamp = folder / "stock.raw", folder / "stock.efi", folder / "inputs"
    keys = open_keys(layout.build / "bench/keys", release=False)
    names = packages(layout)
    # New versions of the host image's packages are new versions here too.
    wanted = digest([_DEFINITION, keys.certificate("db")], *names, contents(layout))
    if stamp.exists() and stamp.read_text() == wanted:
        return disk, uki
    say("making the stock reference image (mkosi; a few minutes)")
    stamp.unlink(missing_ok=True)
    run_mkosi(
        layout,
        _DEFINITION,
        folder,
        *(f"--package={name}" for name in names),
        f"--secure-boot-key={keys.key('db')}",
        f"--secure-boot-certificate={keys.certificate('db')}",
    )
    stamp.write_text(wanted)
    return disk, uki


def start_reference(files: Files) -> tuple[Boot, int]:
    """Start the stock image, and shut it down; the timeline and libvirtd's memory (PSS) in bytes.

    Raises: Expired; Closed; ProcessEnded.
    """
    with Watch(files.directory / "serial.log", MARKERS) as watch, Host(files) as host:
        start = time.monotonic()
        # Written by stock/extra/usr/lib/bench/report.
        host.serial.expect("BENCH ready", 120)
        ready, processor = time.monotonic() - start, processor_time(host)
        memory = int(host.serial.expect(r"BENCH memory libvirtd\.service (\d+)[\r\n]", 60)[1])
        phases = startup(host.serial.expect(r"BENCH time ([^\r\n]+)[\r\n]", 30)[1])
        host.press_power_button()
        host.wait_off()
        return Boot(watch.since(start), ready, processor, phases), memory * 1024
