"""An operator's workstation: our command line tool as people type it, against a host under test."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import pexpect

from image.builder.host import say
from tests.guest.linux import GUEST_PROMPT, GUEST_READY
from tests.harness.host import Host
from tests.harness.waiting import Deadline, Expired
from vmm.cli.client import server_fingerprint
from vmm.errors import die
from vmm.process import run

GUEST = Path("build/test/guests/linux.raw")
# The status screen breaks the fingerprint into two lines.
FINGERPRINT = r"Certificate: ([0-9A-F:]{48})\s+\(SHA-256\)\s+([0-9A-F:]{47})"


class Workstation:
    """Where the command line tool keeps its identity and the hosts it knows: a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {**os.environ, "HOLDFAST_CONFIG_DIR": str(folder)}

    def holdfast(self, words: str, *, accepted: tuple[int, ...] = (0,)) -> None:
        """Run the command line tool, its output on the terminal. Raises: UserError when it fails."""
        code = run(_command(words), check=False, capture=False, env=self._environment).returncode
        if code not in accepted:
            die(f"`holdfast {words}` ended with exit code {code}")

    def meet(self, host: Host) -> None:
        """Pin the host's certificate, as its console shows it. Raises: UserError; Expired."""
        self.holdfast(f"remote add hf1 https://127.0.0.1:{host.port} --fingerprint {_fingerprint(host)} --default")

    def demonstrate(self, host: Host) -> None:
        """Take a machine of the host through its life. Raises: UserError by the first command that fails."""
        # A name of its own, whatever an interrupted run left behind.
        name = time.strftime("demo-%H%M%S")
        self.meet(host)
        deadline = Deadline(60 * host.acceleration.scale, "core and libvirt answer")
        listing = [sys.executable, "-m", "vmm.cli", "vm", "list"]
        while run(listing, check=False, env=self._environment).returncode != 0:
            time.sleep(min(1, deadline.left()))
        # 1: not all is well, as with an emulated processor, which has no microcode.
        self.holdfast("health", accepted=(0, 1))
        self.holdfast(f"volume upload {GUEST} {name}")
        self.holdfast(f"vm create {name} --disk {name} --network lan")
        self.holdfast(f"vm start {name}")
        self.holdfast("vm list")
        self.holdfast(f"vm show {name}")
        self._converse(name, host.acceleration.scale)
        self.holdfast(f"vm stop {name} --timeout 300")
        self.holdfast(f"vm delete {name}")
        self.holdfast(f"volume delete {name}")
        self.holdfast("audit list")

    def _converse(self, machine: str, scale: float) -> None:
        """Run a command in the guest through `holdfast vm console`, as at a terminal. Raises: UserError; Expired."""
        program, *arguments = _command(f"vm console {machine}")
        terminal = pexpect.spawn(program, arguments, env=self._environment, encoding="utf-8", codec_errors="replace")
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


def _command(words: str) -> list[str]:
    """Say a command of ours as its user types it, and return what runs it."""
    print(f"\n$ holdfast {words}", flush=True)
    return [sys.executable, "-m", "vmm.cli", *words.split()]


def _fingerprint(host: Host) -> str:
    """What the host's console shows as its certificate's fingerprint; without a status screen, what TLS shows."""
    try:
        match = host.serial.expect(FINGERPRINT, 5)
    except Expired:
        say("the serial console shows no fingerprint; taking the one that TLS shows")
        return asyncio.run(server_fingerprint(f"https://127.0.0.1:{host.port}"))
    say("the fingerprint is what the serial console shows")
    return match[1] + match[2]
