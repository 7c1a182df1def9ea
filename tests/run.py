"""``python3 -m tests.run`` (`make run`): boot the release image, use it by the command line tool, show it all.

The host stays installed in build/run: the next run boots it again, unless the environment says FRESH=1.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from image.builder.host import say
from tests.harness.checkpoint import fresh
from tests.harness.guarded import ProcessEnded
from tests.harness.host import Host
from tests.harness.image import Files, Image
from tests.harness.machine import Hardware
from tests.harness.qmp import QmpError
from tests.harness.seed import MANAGEMENT_MAC, OPERATIONAL_MAC, seed_credential
from tests.harness.stream import Closed
from tests.harness.waiting import Expired
from tests.harness.workstation import GUEST, Workstation
from vmm.errors import UserError, die, main
from vmm.process import run

_FOLDER = Path("build/run")
_WORKSTATION = Workstation(_FOLDER / "cli")
_SEED = _FOLDER / "seed.json"
_STAMP = _FOLDER / "image"
_SERIAL_LOG = _FOLDER / "serial.log"
_STAGES = {"firmware": "BdsDxe: starting", "kernel, Secure Boot on": "EFI stub: UEFI Secure Boot is enabled"}
_USAGE = f"""
The host runs. Use it from another terminal, in this folder:
  alias holdfast='python3 -m image.builder tools env HOLDFAST_CONFIG_DIR={_WORKSTATION.folder} python3 -m vmm.cli'
  holdfast volume upload {GUEST} demo
  holdfast vm create demo --disk demo --network lan
  holdfast vm start demo
  holdfast vm console demo
Its serial console: tail -f {_SERIAL_LOG}. Ctrl-C here shuts it down.
"""


def install(image: Image, *, anew: bool) -> Files:
    """The machine in build/run; if there is none or ``anew``, a new one, with an identity and a seed for it."""
    identity = image.identity()
    if _STAMP.exists() and not anew:
        if _STAMP.read_text() != identity:
            say("the image was built anew since this host was installed; make run FRESH=1 installs that")
        _SERIAL_LOG.unlink(missing_ok=True)
        return Files(_FOLDER)
    say(f"a new machine with Holdfast {image.version} on its disk, in {_FOLDER}")
    shutil.rmtree(_FOLDER, ignore_errors=True)
    _FOLDER.mkdir(parents=True)
    base = _FOLDER / "base.raw"
    # A copy, so that the next `make image` does not pull the disk out from under the host.
    run(["cp", "--sparse=always", "--reflink=auto", image.disk, base])
    files = fresh(_FOLDER, base, Hardware().disk)
    _WORKSTATION.holdfast("identity create --name admin")
    networks = f"--management {MANAGEMENT_MAC}=10.0.2.15/24,10.0.2.2 --operational lan={OPERATIONAL_MAC}"
    create = f"seed create --hostname hf1 {networks} --admin admin={_WORKSTATION.folder}/client.crt"
    _WORKSTATION.holdfast(f"{create} --out {_SEED}")
    _STAMP.write_text(identity)
    return files


def boot(host: Host) -> None:
    """Follow a host from power-on to its API, telling the stages. Raises: Expired; Closed."""
    started = time.monotonic()
    say(f"power on ({host.acceleration.name}); seconds since then:")
    for stage, text in _STAGES.items():
        host.serial.expect(text, 120)
        say(f"{time.monotonic() - started:4.0f}  {stage}")
    host.wait_api(120)
    say(f"{time.monotonic() - started:4.0f}  API on https://127.0.0.1:{host.port}")


def finish(host: Host) -> None:
    """Leave the host to the terminal's user until Ctrl-C, if there is one; then shut down. Raises: UserError."""
    if sys.stdin.isatty():
        print(_USAGE, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while host.running:
                time.sleep(0.5)
    try:
        if host.running:
            say("pressing the power button")
            host.press_power_button()
        host.wait_off(60)
    except Expired as error:
        host.kill()
        die(f"the host did not shut down: {error}")
    say("the host is off")


def entry() -> int:
    """Do all of it. Raises: UserError naming what failed."""
    # Ctrl-C is for us alone: `make run` lets the programs around us ignore it, which we inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    image = Image.built()
    if not GUEST.exists():
        die(f"{GUEST} is missing", hint="make run builds it")
    files = install(image, anew=os.environ.get("FRESH") == "1")
    host = Host(files, smbios=[seed_credential(json.loads(_SEED.read_text()))])
    try:
        with host:
            boot(host)
            _WORKSTATION.demonstrate(host)
            finish(host)
    except (Closed, Expired, ProcessEnded, QmpError, UserError) as error:
        raise UserError(str(error), hint=f"serial log: {_SERIAL_LOG}") from None
    return 0


if __name__ == "__main__":
    main(entry)
