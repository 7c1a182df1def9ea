"""``python3 -m tests.run`` (`make run`): boot the release image, use it by the command line tool, show it all.

The host stays installed in build/run: the next run boots it again, unless the environment says FRESH=1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pexpect

from tests.guest.linux import GUEST_PROMPT, GUEST_READY
from tests.harness.checkpoint import fresh
from tests.harness.guarded import ProcessEnded
from tests.harness.host import Host
from tests.harness.image import Files, Image
from tests.harness.machine import Hardware
from tests.harness.qmp import QmpError
from tests.harness.seed import MANAGEMENT_MAC, OPERATIONAL_MAC, seed_credential
from tests.harness.stream import Closed
from tests.harness.waiting import Deadline, Expired
from vmm.cli.client import server_fingerprint
from vmm.errors import UserError, die, main
from vmm.process import run

_FOLDER = Path("build/run")
_IDENTITY = _FOLDER / "cli"
_SEED = _FOLDER / "seed.json"
_STAMP = _FOLDER / "image"
_SERIAL_LOG = _FOLDER / "serial.log"
_GUEST = Path("build/test/guests/linux.raw")
_ENVIRONMENT = {**os.environ, "HOLDFAST_CONFIG_DIR": str(_IDENTITY)}
_STAGES = {"firmware": "BdsDxe: starting", "kernel, Secure Boot on": "EFI stub: UEFI Secure Boot is enabled"}
# The status screen breaks the fingerprint into two lines.
FINGERPRINT = r"Certificate: ([0-9A-F:]{48})\s+\(SHA-256\)\s+([0-9A-F:]{47})"
_USAGE = f"""
The host runs. Use it from another terminal, in this folder:
  alias holdfast='python3 -m image.builder tools env HOLDFAST_CONFIG_DIR={_IDENTITY} python3 -m vmm.cli'
  holdfast volume upload {_GUEST} demo
  holdfast vm create demo --disk demo --network lan
  holdfast vm start demo
  holdfast vm console demo
Its serial console: tail -f {_SERIAL_LOG}. Ctrl-C here shuts it down.
"""


def say(text: str) -> None:
    """Tell the person who waits what happens."""
    print(f"» {text}", flush=True)


def command(words: str) -> list[str]:
    """Say a command of ours as its user types it, and return what runs it."""
    print(f"\n$ holdfast {words}", flush=True)
    return [sys.executable, "-m", "vmm.cli", *words.split()]


def holdfast(words: str, *, accepted: tuple[int, ...] = (0,)) -> None:
    """Run the command line tool, its output on the terminal. Raises: UserError when it fails."""
    code = run(command(words), check=False, capture=False, env=_ENVIRONMENT).returncode
    if code not in accepted:
        die(f"`holdfast {words}` ended with exit code {code}")


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
    holdfast("identity create --name admin")
    networks = f"--management {MANAGEMENT_MAC}=10.0.2.15/24,10.0.2.2 --operational lan={OPERATIONAL_MAC}"
    holdfast(f"seed create --hostname hf1 {networks} --admin admin={_IDENTITY}/client.crt --out {_SEED}")
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


def fingerprint(host: Host) -> str:
    """What the host's console shows as its certificate's fingerprint; without a status screen, what TLS shows."""
    try:
        match = host.serial.expect(FINGERPRINT, 5)
    except Expired:
        say("the serial console shows no fingerprint; taking the one that TLS shows")
        return asyncio.run(server_fingerprint(f"https://127.0.0.1:{host.port}"))
    say("the fingerprint is what the serial console shows")
    return match[1] + match[2]


def converse(machine: str, scale: float) -> None:
    """Run a command in the guest through `holdfast vm console`, as at a terminal. Raises: UserError; Expired."""
    program, *arguments = command(f"vm console {machine}")
    terminal = pexpect.spawn(program, arguments, env=_ENVIRONMENT, encoding="utf-8", codec_errors="replace")
    deadline = Deadline(180 * scale, "the guest's prompt")
    try:
        while terminal.expect([GUEST_PROMPT, pexpect.TIMEOUT], timeout=5) == 1:
            deadline.left()
            # The guest may have been ready before we looked; Enter brings another prompt.
            terminal.send("\n")
        if GUEST_READY in terminal.before:
            print(GUEST_READY)
        terminal.send("uname -a\n")
        terminal.expect(r"(Linux [^\r\n]+)\r", timeout=30 * scale)
        print(f"guest# uname -a\n{terminal.match[1]}\nCtrl-]")
        terminal.sendcontrol("]")
        terminal.expect(pexpect.EOF, timeout=30 * scale)
    except pexpect.ExceptionPexpect as error:
        die(f"`holdfast vm console {machine}`: {type(error).__name__} after {terminal.before[-600:]!r}")
    finally:
        terminal.close()
    if terminal.exitstatus != 0:
        die(f"`holdfast vm console {machine}` ended with exit code {terminal.exitstatus}")


def demonstrate(host: Host) -> None:
    """Take a machine through its life. Raises: UserError by the first command that fails."""
    # A name of its own, whatever an interrupted run left behind.
    name = time.strftime("demo-%H%M%S")
    holdfast(f"remote add hf1 https://127.0.0.1:{host.port} --fingerprint {fingerprint(host)} --default")
    deadline = Deadline(60 * host.acceleration.scale, "core and libvirt answer")
    while run([sys.executable, "-m", "vmm.cli", "vm", "list"], check=False, env=_ENVIRONMENT).returncode != 0:
        time.sleep(min(1, deadline.left()))
    # 1: not all is well, as with an emulated processor, which has no microcode.
    holdfast("health", accepted=(0, 1))
    holdfast(f"volume upload {_GUEST} {name}")
    holdfast(f"vm create {name} --disk {name} --network lan")
    holdfast(f"vm start {name}")
    holdfast("vm list")
    holdfast(f"vm show {name}")
    converse(name, host.acceleration.scale)
    holdfast(f"vm stop {name} --timeout 300")
    holdfast(f"vm delete {name}")
    holdfast(f"volume delete {name}")
    holdfast("audit list")


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
    if not _GUEST.exists():
        die(f"{_GUEST} is missing", hint="run make guests")
    files = install(image, anew=os.environ.get("FRESH") == "1")
    host = Host(files, smbios=[seed_credential(json.loads(_SEED.read_text()))])
    try:
        with host:
            boot(host)
            demonstrate(host)
            finish(host)
    except (Closed, Expired, ProcessEnded, QmpError, UserError) as error:
        raise UserError(str(error), hint=f"serial log: {_SERIAL_LOG}") from None
    return 0


if __name__ == "__main__":
    main(entry)
