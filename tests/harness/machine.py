"""The emulated server that a host runs on: QEMU's command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.harness import firmware, repository
from tests.harness.accel import Acceleration
from tests.harness.agent import PORT_NAME
from tests.harness.emulator import emulator
from tests.harness.image import Files
from tests.harness.seed import MANAGEMENT_MAC, OPERATIONAL_MAC
from vmm.process import Argument

GIB = 1 << 30
_API_PORT = 8443
# A host takes its machine id from the firmware; without this QEMU gives none.
_UUID = "484f4c44-4641-4354-8000-000000000001"


@dataclass(frozen=True)
class Hardware:
    """The machine: processors, bytes of memory, bytes of disk; the raw content of a stick in its USB port."""

    cpus: int = 2
    memory: int = 4 * GIB
    disk: int = 8 * GIB
    stick: Path | None = None


@dataclass(frozen=True)
class Sockets:
    """Unix sockets of a running machine, in a folder with a short name (108 bytes is their limit)."""

    directory: Path

    @property
    def qmp(self) -> Path:
        """QEMU's machine protocol."""
        return self.directory / "qmp"

    @property
    def serial(self) -> Path:
        """The first serial port."""
        return self.directory / "serial"

    @property
    def agent(self) -> Path:
        """The test agent's virtio port."""
        return self.directory / "agent"

    @property
    def link(self) -> Path:
        """The operational network card's cable."""
        return self.directory / "link"

    @property
    def tpm(self) -> Path:
        """swtpm's control channel."""
        return self.directory / "tpm"

    @property
    def repository(self) -> Path:
        """Where the host's connections to the update repository arrive (repository.py)."""
        return self.directory / "repository"

    @property
    def disk(self) -> Path:
        """The NBD disk server, when there is one."""
        return self.directory / "disk"


def _disk_node(files: Files, sockets: Sockets, *, served: bool) -> str:
    node: dict[str, Any] = {"node-name": "disk", "discard": "unmap"}
    if served:
        file = {"driver": "nbd", "server": {"type": "unix", "path": str(sockets.disk)}}
        return json.dumps({**node, "driver": "raw", "file": file})
    file = {"driver": "file", "filename": str(files.disk.resolve())}
    # What survives a crash of the machine that runs the tests is nobody's concern, and flushes are slow.
    return json.dumps({**node, "driver": "qcow2", "cache": {"no-flush": True}, "file": file})


def stick_node(content: Path) -> dict[str, Any]:
    """The block device behind a stick with this content."""
    return {"node-name": "stick", "driver": "raw", "file": {"driver": "file", "filename": str(content.resolve())}}


def _socket(name: str, path: Path, log: Path | None = None) -> list[Argument]:
    logging = f",logfile={log},logappend=on" if log else ""
    return ["-chardev", f"socket,id={name},path={path},server=on,wait=off{logging}"]


def qemu_command(
    files: Files,
    sockets: Sockets,
    hardware: Hardware,
    acceleration: Acceleration,
    smbios: Sequence[Path],
    *,
    served_disk: bool,
) -> list[Argument]:
    """The command for a machine that waits (-S) for its test to connect; ``smbios`` are files of type 11 strings."""
    answering = f"{sys.executable} -m tests.harness.pipe {sockets.repository}"
    releases = f"tcp:{repository.ADDRESS}:{repository.PORT}-cmd:{answering}"
    command: list[Argument] = [
        emulator(acceleration.name), "-nodefaults", "-no-user-config", "-display", "none", "-S",
        "-machine", "q35,smm=on,pflash0=code,pflash1=variables",
        *acceleration.arguments,
        "-smp", str(hardware.cpus), "-m", str(hardware.memory >> 20), "-rtc", "base=utc",
        "-uuid", _UUID,
        *firmware.arguments(files.variables.resolve()),
        "-blockdev", _disk_node(files, sockets, served=served_disk),
        "-device", "virtio-blk-pci,drive=disk,serial=system,bootindex=1",
        "-object", "rng-random,id=entropy,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=entropy",
        "-chardev", f"socket,id=tpm,path={sockets.tpm}",
        "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm0",
        # Port 0: the kernel picks a free one, so that two runs never fight for it.
        "-netdev", f"user,id=management,hostfwd=tcp:127.0.0.1:0-10.0.2.15:{_API_PORT},guestfwd={releases}",
        "-device", f"virtio-net-pci,netdev=management,mac={MANAGEMENT_MAC},romfile=",
        "-netdev", f"stream,id=operational,server=on,addr.type=unix,addr.path={sockets.link}",
        "-device", f"virtio-net-pci,netdev=operational,mac={OPERATIONAL_MAC},romfile=",
        *_socket("serial", sockets.serial, files.directory / "serial.log"), "-serial", "chardev:serial",
        "-device", "virtio-serial-pci",
        *_socket("agent", sockets.agent), "-device", f"virtserialport,chardev=agent,name={PORT_NAME}",
        *_socket("qmp", sockets.qmp), "-mon", "chardev=qmp,mode=control",
    ]  # fmt: skip
    for network in ("management", "operational"):
        capture = files.directory / f"{network}.pcap"
        command += ["-object", f"filter-dump,id=dump-{network},netdev={network},file={capture}"]
    # Last, so that the other devices keep their places; always, so that a stick can be plugged in (Host.plug_stick).
    command += ["-device", "qemu-xhci,id=usb"]
    if hardware.stick:
        command += ["-blockdev", json.dumps(stick_node(hardware.stick))]
        command += ["-device", "usb-storage,id=stick,bus=usb.0,drive=stick,removable=on"]
    for path in smbios:
        command += ["-smbios", f"type=11,path={path}"]
    return command
