"""A host under test: switch it on, talk to it, and do to it what happens to servers."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.harness.accel import Acceleration, acceleration
from tests.harness.agent import Agent
from tests.harness.api import Api
from tests.harness.diskserver import DiskServer
from tests.harness.guarded import Guarded
from tests.harness.image import Files, flatten
from tests.harness.link import Link
from tests.harness.machine import Hardware, Sockets, qemu_command, stick_node
from tests.harness.qmp import Qmp, QmpError, Unless
from tests.harness.repository import RepositoryServer
from tests.harness.seed import REPOSITORY, Identity
from tests.harness.stream import Console, connect_console
from tests.harness.tpm import Tpm
from tests.harness.waiting import poll


class Host:
    """One emulated server. As a context manager it is on inside and off afterwards; files and logs stay.

    Arguments: ``files`` is its state (see checkpoint.fresh and checkpoint.derive); with ``files.memory``
    the first power_on continues from there. ``smbios`` are type 11 strings. With ``faulty_disk`` the disk
    has a volatile cache, and power_cut and fail_disk work (but not snapshot). All deadlines given to its
    methods are seconds on a machine with KVM; without it they are multiplied.
    """

    def __init__(
        self,
        files: Files,
        *,
        smbios: Sequence[str] = (),
        hardware: Hardware | None = None,
        faulty_disk: bool = False,
        accelerated: Acceleration | None = None,
    ) -> None:
        self.files = files
        self.hardware = hardware or Hardware()
        self.acceleration = accelerated or acceleration()
        self._smbios = tuple(smbios)
        self._memory = files.memory
        self._faulty_disk = faulty_disk
        self._sockets = Sockets(Path(tempfile.mkdtemp(prefix="hf-")))
        self._agent: Agent | None = None
        self._link: Link | None = None
        self._disk: DiskServer | None = None
        self._tpm: Tpm | None = None
        self._qemu: Guarded | None = None
        self.serial: Console
        self.qmp: Qmp
        self.port = 0
        """The local TCP port that leads to the host's API."""

    # -- power ---------------------------------------------------------------------------------------------------

    def power_on(self) -> None:
        """Start the machine, or continue it from saved memory the first time.

        Raises: ProcessEnded when a program does not start; QmpError; Expired.
        """
        directory, sockets = self.files.directory, self._sockets
        for stale in sockets.directory.iterdir():
            stale.unlink()
        if self._faulty_disk:
            if not self.files.flat_disk.exists():
                flatten(self.files.disk, self.files.flat_disk)
            self._disk = DiskServer(self.files.flat_disk, sockets.disk, directory / "nbdkit.log")
        self._tpm = Tpm(self.files.tpm, sockets.tpm, directory / "swtpm.log")
        strings = [sockets.directory / f"smbios-{number}" for number, _ in enumerate(self._smbios)]
        for path, text in zip(strings, self._smbios, strict=True):
            path.write_text(text)
        command = qemu_command(
            self.files, sockets, self.hardware, self.acceleration, strings, served_disk=self._faulty_disk
        )
        if self._memory:
            command += ["-incoming", "defer"]
        self._qemu = Guarded(command, directory / "qemu.log")
        self._qemu.wait_ready(sockets.qmp.exists)
        self.qmp = Qmp(sockets.qmp)
        self.serial = connect_console(sockets.serial, name="serial", scale=self.acceleration.scale)
        forwarded = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", self.qmp.human("info usernet"))
        assert forwarded, "QEMU does not forward the API's port"
        self.port = int(forwarded[1])
        if self._memory:
            self._migrate("migrate-incoming", self._memory)
            self._memory = None
        self.qmp.execute("cont")

    def _migrate(self, command: str, memory: Path) -> None:
        # Every page has its place in the file, which leaves holes for pages of zeros and loads at disk speed.
        self._set_capabilities(**{"events": True, "mapped-ram": True})
        self.qmp.execute(command, {"uri": f"file:{memory.resolve()}"})
        ended = ("completed", "failed")
        event = self.qmp.wait_event("MIGRATION", 120, matches=lambda e: e["data"]["status"] in ended)
        assert event["data"]["status"] == "completed", self.qmp.execute("query-migrate")
        # It would stay on for snapshots, which cannot be written that way.
        self._set_capabilities(**{"mapped-ram": False})

    def _set_capabilities(self, **states: bool) -> None:
        capabilities = [{"capability": name, "state": state} for name, state in states.items()]
        self.qmp.execute("migrate-set-capabilities", {"capabilities": capabilities})

    def suspend(self, memory: Path) -> None:
        """Save memory and devices to a file and switch off; files plus that file continue later."""
        self.qmp.execute("stop")
        self.qmp.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        self._migrate("migrate", memory)
        self._close()
        self.kill()

    def kill(self) -> None:
        """End QEMU at once. Not a power cut: what the guest wrote, flushed or not, is kept."""
        if self._qemu:
            self._qemu.kill()
        self._after_qemu()

    def power_cut(self) -> None:
        """Cut the power: memory and every write that was not flushed are lost.

        Raises: ValueError without ``faulty_disk``.
        """
        if not self._disk:
            raise ValueError("power_cut needs a host with faulty_disk=True")
        # The disk first: QEMU must not get a chance to flush.
        self._disk.kill()
        self.kill()

    def _after_qemu(self) -> None:
        self._close()
        for helper in (self._tpm, self._disk):
            if helper:
                helper.stop()
        self._qemu = self._tpm = self._disk = None

    def _close(self) -> None:
        for connection in (self._agent, self._link):
            if connection:
                connection.close()
        self._agent = self._link = None

    @property
    def running(self) -> bool:
        """Whether QEMU runs (a paused machine included)."""
        return self._qemu is not None and self._qemu.running

    def press_power_button(self) -> None:
        """Ask the host to shut down, as its power button does."""
        self.qmp.execute("system_powerdown")

    def wait_off(self, seconds: float = 60) -> None:
        """Wait until the host has switched itself off. Raises: Expired."""
        assert self._qemu
        self._qemu.wait(seconds * self.acceleration.scale)
        self._after_qemu()

    def reset(self) -> None:
        """Press the reset button."""
        self.qmp.execute("system_reset")

    def wait_reset(self, seconds: float = 60) -> None:
        """Wait until the host restarts itself (or did so since the last call). Raises: Expired."""
        self.qmp.wait_event("RESET", seconds * self.acceleration.scale)

    @property
    def repository_socket(self) -> Path:
        """Where a RepositoryServer must listen for the host to find it."""
        return self._sockets.repository

    def serve(self, repository: Path) -> RepositoryServer:
        """The web server that the host's configuration names, for a folder; use it as a context manager."""
        return RepositoryServer(repository, self.repository_socket, REPOSITORY)

    # -- faults --------------------------------------------------------------------------------------------------

    def plug_stick(self, content: Path) -> None:
        """Put a stick with this raw content into the USB port; the host sees it some time later. Raises: QmpError."""
        self.qmp.execute("blockdev-add", stick_node(content))
        stick = {"driver": "usb-storage", "id": "stick", "bus": "usb.0", "drive": "stick", "removable": True}
        self.qmp.execute("device_add", stick)

    def unplug_stick(self) -> None:
        """Pull the stick out, in use or not. Raises: QmpError when there is none; Expired."""
        self.qmp.execute("device_del", {"id": "stick"})
        self.qmp.wait_event("DEVICE_DELETED", 30, matches=lambda event: event["data"].get("device") == "stick")
        poll(self._forget_stick, 30, "QEMU lets go of the stick")

    def _forget_stick(self) -> bool:
        try:
            self.qmp.execute("blockdev-del", {"node-name": "stick"})
        except QmpError:
            return False
        return True

    # -- conversation --------------------------------------------------------------------------------------------

    @property
    def agent(self) -> Agent:
        """The test agent; requests wait until it runs. Only on a disk with the test extension."""
        if not self._agent:
            self._agent = Agent(self._sockets.agent, scale=self.acceleration.scale)
        return self._agent

    def wait_started(self) -> None:
        """Wait until all that a start starts is there or has failed; which, is for tests to find out.

        Raises: Happened when the host restarts meanwhile: nobody would answer; the test's own wait_reset is left its
        event. Expired.
        """
        restarts = Unless(self.qmp, "RESET", "the host restarted by itself before all of it had started")
        self.agent.exec(["systemctl", "is-system-running", "--wait"], check=False, seconds=120, unless=restarts)

    @property
    def link(self) -> Link:
        """The other end of the operational network's cable."""
        if not self._link:
            self._link = Link(self._sockets.link)
        return self._link

    def api(self, identity: Identity | None = None) -> Api:
        """A client of the host's API, as that administrator or without a certificate."""
        return Api("127.0.0.1", self.port, identity, scale=self.acceleration.scale)

    def wait_api(self, seconds: float = 60) -> None:
        """Wait until the API answers its banner. Raises: Expired with the end of the serial log."""
        poll(lambda: self.api().reachable(0.5), seconds * self.acceleration.scale, "the API answers", interval=0.5)

    def wait_ready(self, identity: Identity, seconds: float = 60) -> None:
        """Wait until an administrator's questions are answered, those to libvirt too. Raises: Expired."""
        self.wait_api(seconds)
        api = self.api(identity)
        poll(api.ready, seconds * self.acceleration.scale, "core and libvirt answer", interval=0.5)

    def __enter__(self) -> Self:
        try:
            self.power_on()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        shutil.rmtree(self._sockets.directory, ignore_errors=True)
