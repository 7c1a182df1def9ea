"""``python3 -m tests.faults`` (`make faults`): many power cuts on the way to a new release; prints what they left.

The disk of a cut that left a host broken is kept as it was then, as build/test/faults/broken-NUMBER.img, with what the
host wrote on its console in broken-NUMBER.log; the next run deletes both.
"""

from __future__ import annotations

import argparse
import collections
import random
import shutil
import time
from pathlib import Path

from image.builder.host import say
from tests.faults.cuts import KINDS, complete, cut, spread
from tests.faults.stages import Update
from tests.harness import releases
from tests.harness.checkpoint import host_checkpoint
from tests.harness.image import Image
from tests.harness.seed import configuration, identities, seed_credential
from vmm.errors import main
from vmm.process import run

_FOLDER = Path("build/test/faults")


def entry() -> int:
    """Cut as often as the command line says; the exit code tells whether anything was broken. Raises: UserError."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.faults", description=__doc__)
    parser.add_argument("--cuts", type=int, default=200, help="power cuts (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=20, help="of them followed by a start (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of the moments")
    parser.add_argument(
        "--kind", action="append", choices=[kind.name for kind in KINDS], help="only cuts of this kind; may be repeated"
    )
    options = parser.parse_args()
    kinds = [kind for kind in KINDS if not options.kind or kind.name in options.kind]
    moments = random.Random(options.seed)  # noqa: S311 - moments of cuts, not secrets
    release = releases.build("next", "0.1.1")
    clients = identities(Path("build/test/identities"))
    booted = host_checkpoint(Image.built(), seed_credential(configuration(list(clients.values()))))
    update = Update(booted, clients["admin"], release)
    shutil.rmtree(_FOLDER, ignore_errors=True)
    stages: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    writes = 0
    for kind in kinds:
        update.at(kind.stage)
    say(f"{options.cuts} cuts, moments from seed {options.seed}")
    begun = time.monotonic()
    for number, one in enumerate(spread(options.cuts, moments, kinds), 1):
        started = number * options.starts // options.cuts != (number - 1) * options.starts // options.cuts
        with cut(update, one, _FOLDER / "host", writing=started) as (host, found):
            problem, stage, disk = found.broken, f"{one.kind.name}: {found.stage}", host.files.flat_disk
            if started and not problem:
                # The start changes it.
                disk = _FOLDER / "before.img"
                run(["cp", "--sparse=always", host.files.flat_disk, disk])
                problem = complete(update, host, found)
                stage += ", started and completed"
            if problem:
                problem += f"; see {_keep(disk, host.files.directory / 'serial.log', number)}"
        stages["" if problem else stage] += 1
        if problem:
            broken.append(f"cut {number} ({one}): {problem}")
        elif started:
            writes += found.acknowledged
        kept = f"; started and completed, {found.acknowledged} writes of its guest are there" if started else ""
        say(f"{number}: {one}: {problem or found.stage + kept}")
    minutes = (time.monotonic() - begun) / 60
    for stage, count in sorted(stages.items()):
        print(f"{count:5}  {stage or 'BROKEN'}")
    print(f"{options.cuts} cuts in {minutes:.0f} minutes, {options.cuts / minutes:.1f} a minute")
    print(f"{writes} writes that guests had acknowledged were on their disks after the cuts with a start")
    print(f"{len(broken)} of {options.cuts} cuts left a host broken", *broken, sep="\n")
    return 1 if broken else 0


def _keep(disk: Path, console: Path, number: int) -> Path:
    """Keep a disk and what its host said, and return the disk's new place."""
    kept = _FOLDER / f"broken-{number}.img"
    disk.rename(kept)
    shutil.copy2(console, kept.with_suffix(".log"))
    return kept


if __name__ == "__main__":
    main(entry)
