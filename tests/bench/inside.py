"""Runs on the host under test, through the test agent: one function a measurement. libvirt and vmm are the host's."""

from __future__ import annotations

import json
import pathlib
import socket
import subprocess
import tempfile
import time
import uuid
from typing import Any
from xml.etree import ElementTree

import libvirt

from vmm.hypervisor import domain

_CGROUPS = pathlib.Path("/sys/fs/cgroup/system.slice")
_URI = "qemu:///system"


def memory(patterns: list[str]) -> dict[str, int]:
    """Proportional set size in bytes of each running service that fits one of the patterns."""
    found = {}
    for pattern in patterns:
        for group in _CGROUPS.rglob(pattern):
            total = 0
            for pid in (group / "cgroup.procs").read_text().split():
                for line in pathlib.Path("/proc", pid, "smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1]) * 1024
            if total:
                found[group.name] = total
    return found


def definition(name: str) -> str:
    """The very XML that core started a running machine from: rendered anew with what libvirt says of it."""
    connection = libvirt.open(_URI)
    live = ElementTree.fromstring(connection.lookupByName(name).XMLDesc(0))
    connection.close()
    ours = live.find(f"metadata/{{{domain.NAMESPACE}}}machine")
    sources = live.findall("devices/disk/source")
    assert ours is not None
    return domain.render(
        domain.DomainParameters(
            name=name,
            uuid=uuid.UUID(live.findtext("uuid")),
            uid=int(ours.attrib["uid"]),
            spec_sha256=ours.attrib["spec-sha256"],
            cpus=int(live.findtext("vcpu", "")),
            memory=int(live.findtext("memory", "")) * 1024,
            nvram=pathlib.Path(live.findtext("os/nvram", "")),
            disks=tuple(
                domain.Disk(pathlib.Path(source.attrib["file"]), live.findtext("devices/disk/serial", ""))
                for source in sources
            ),
            bridges=tuple(source.attrib["bridge"] for source in live.findall("devices/interface/source")),
        )
    )


def create(xml: str) -> dict[str, Any]:
    """What `virsh create` does, timed without the program's own start and connection; ends the domain again.

    Returns its seconds, and the command line of its QEMU.
    """
    connection = libvirt.open(_URI)
    start = time.monotonic()
    started = connection.createXML(xml, 0)
    taken = time.monotonic() - start
    pid = pathlib.Path("/run/libvirt/qemu", f"{started.name()}.pid").read_text().strip()
    arguments = pathlib.Path("/proc", pid, "cmdline").read_text().rstrip("\0").split("\0")
    started.destroy()
    connection.close()
    return {"seconds": taken, "arguments": arguments}


def plain(arguments: list[str]) -> float:
    """Seconds from starting QEMU to its guest running; "{monitor}" in the arguments becomes the monitor's socket."""
    with tempfile.TemporaryDirectory(dir="/run") as folder:
        monitor = pathlib.Path(folder, "monitor")
        start = time.monotonic()
        with subprocess.Popen(
            [argument.replace("{monitor}", str(monitor)) for argument in arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        ) as qemu:
            try:
                while not monitor.exists():
                    if qemu.poll() is not None:
                        assert qemu.stderr
                        raise RuntimeError(qemu.stderr.read().decode(errors="replace"))
                    time.sleep(0.005)
                _command_running(monitor)
                return time.monotonic() - start
            finally:
                qemu.kill()


def _command_running(monitor: pathlib.Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        while True:
            try:
                connection.connect(str(monitor))
                break
            except ConnectionRefusedError:
                time.sleep(0.005)  # bound, but not listening yet
        lines = connection.makefile("rw")
        for command in ("qmp_capabilities", "cont", "query-status"):
            lines.write(json.dumps({"execute": command}) + "\n")
            lines.flush()
            while "return" not in (answer := json.loads(lines.readline())):
                if "error" in answer:
                    raise RuntimeError(f"{command}: {answer['error']['desc']}")
        assert answer["return"]["running"], answer
