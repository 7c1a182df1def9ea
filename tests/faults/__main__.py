"""``python3 -m tests.faults`` (`make faults`): many power cuts on the way to a new release; prints what they left."""

from __future__ import annotations

import argparse
import collections
import random
import shutil
from pathlib import Path

from image.builder.host import say
from tests.faults.cuts import complete, cut, spread
from tests.faults.stages import Update
from tests.harness import releases
from tests.harness.checkpoint import host_checkpoint
from tests.harness.image import Image
from tests.harness.seed import configuration, identities, seed_credential
from vmm.errors import main

_FOLDER = Path("build/test/faults")


def entry() -> int:
    """Cut as often as the command line says; the exit code tells whether anything was broken. Raises: UserError."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.faults", description=__doc__)
    parser.add_argument("--cuts", type=int, default=200, help="power cuts (default: %(default)s)")
    parser.add_argument("--starts", type=int, default=20, help="of them followed by a start (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32), help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)  # noqa: S311 - moments of cuts, not secrets
    release = releases.build("next", "0.1.1")
    clients = identities(Path("build/test/identities"))
    booted = host_checkpoint(Image.built(), seed_credential(configuration(list(clients.values()))))
    update = Update(booted, clients["admin"], release)
    shutil.rmtree(_FOLDER, ignore_errors=True)
    stages: collections.Counter[str] = collections.Counter()
    broken: list[str] = []
    say(f"{options.cuts} cuts, moments from seed {options.seed}")
    for number, one in enumerate(spread(options.cuts, moments), 1):
        with cut(update, one, _FOLDER / "host") as (host, found):
            problem, stage = found.broken, f"{one.kind.name}: {found.stage}"
            if not problem and number * options.starts // options.cuts != (number - 1) * options.starts // options.cuts:
                problem = complete(update, host)
                stage += ", started and completed"
        stages[stage] += 1
        if problem:
            broken.append(f"cut {number} ({one}): {problem}")
        say(f"{number}: {one}: {problem or found.stage}")
    for stage, count in sorted(stages.items()):
        print(f"{count:5}  {stage or 'BROKEN'}")
    print(f"{len(broken)} of {options.cuts} cuts left a host broken", *broken, sep="\n")
    return 1 if broken else 0


if __name__ == "__main__":
    main(entry)
