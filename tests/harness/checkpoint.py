"""Boot a host once, keep it, and let every test continue from there with changes of its own.

A checkpoint is a folder: the machine's files (see image.Files), its memory as a migration stream,
and nothing that a test writes to. A test gets overlays on the disk and the variables, a copy of the
TPM's few kilobytes, and reads the memory in place.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.harness import firmware, tpm
from tests.harness.accel import Acceleration, acceleration
from tests.harness.agent import agent_credentials
from tests.harness.host import Host
from tests.harness.image import Files, Image, overlay
from tests.harness.machine import Hardware, Sockets, qemu_command
from vmm.process import run


def fresh(directory: Path, base: Path, size: int) -> Files:
    """A machine as it comes from the factory: empty TPM, no Secure Boot keys, ``base`` (raw) on its disk.

    Arguments: ``directory`` is made if missing and must hold no machine; ``size`` is the disk's, in bytes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = Files(directory)
    files.discard()
    overlay(files.disk, base, "raw", size)
    firmware.create_variables(files.variables)
    tpm.create_state(files.tpm)
    return files


def derive(directory: Path, origin: Files) -> Files:
    """A machine that continues from a suspended one without changing it; the origin must stay in place."""
    directory.mkdir(parents=True, exist_ok=True)
    files = Files(directory, memory=origin.memory)
    files.discard()
    overlay(files.disk, origin.disk, "qcow2")
    overlay(files.variables, origin.variables, "qcow2")
    tpm.copy_state(origin.tpm, files.tpm)
    return files


def switched_off(directory: Path, origin: Files) -> Files:
    """A machine like a suspended one after a loss of power: the same disk, variables and TPM, no memory."""
    return replace(derive(directory, origin), memory=None)


@dataclass(frozen=True)
class Checkpoint:
    """A suspended machine and what is needed to make it continue."""

    files: Files
    smbios: tuple[str, ...]
    hardware: Hardware
    acceleration: Acceleration

    def host(self, directory: Path, *, faulty_disk: bool = False) -> Host:
        """A host that continues from here, with its files and logs in ``directory``; not yet started."""
        return Host(
            derive(directory, self.files),
            smbios=self.smbios,
            hardware=self.hardware,
            faulty_disk=faulty_disk,
            accelerated=self.acceleration,
        )


def key(identity: str, smbios: Sequence[str], hardware: Hardware, accelerated: Acceleration) -> str:
    """The name of the checkpoint that these inputs make; any change of them or of the machine gives another."""
    nowhere = Path("/")
    machine = qemu_command(Files(nowhere), Sockets(nowhere), hardware, accelerated, (), served_disk=False)
    inputs = {
        "image": identity,
        "smbios": list(smbios),
        "hardware": asdict(hardware),
        "machine": [str(argument) for argument in machine],
        "qemu": run(["qemu-system-x86_64", "--version"]).stdout,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def checkpoint(
    store: Path,
    identity: str,
    write_disk: Callable[[Path], None],
    ready: Callable[[Host], None],
    *,
    smbios: Sequence[str],
    hardware: Hardware | None = None,
) -> Checkpoint:
    """The checkpoint of a machine, from ``store`` or made now by booting it.

    Arguments: ``identity`` names the disk's content, ``write_disk`` writes it (raw), ``ready`` waits until
    the booted host can be kept. Others in the store are deleted once a new one is made: the disk image
    they stand on has been replaced. Raises: what ``ready`` raises; the boot's logs then stay in the store.
    """
    hardware, accelerated = hardware or Hardware(), acceleration()
    directory = store / key(identity, smbios, hardware, accelerated)
    files = Files(directory, memory=directory / "memory")
    if not directory.exists():
        unfinished = directory.with_suffix(".unfinished")
        shutil.rmtree(store, ignore_errors=True)
        unfinished.mkdir(parents=True)
        base = unfinished / "base.raw"
        write_disk(base)
        machine = fresh(unfinished, base, hardware.disk)
        with Host(machine, smbios=smbios, hardware=hardware, accelerated=accelerated) as host:
            ready(host)
            host.suspend(unfinished / "memory")
        # The disk's backing file will move with the folder.
        base = directory.absolute() / "base.raw"
        run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", base, machine.disk])
        unfinished.rename(directory)
    return Checkpoint(files, tuple(smbios), hardware, accelerated)


def ready_with_agent(host: Host) -> None:
    """Wait until a booted host has started everything and answers on its API and to the test agent. Raises: Expired."""
    host.wait_api()
    host.agent.wait()
    host.wait_started()


def host_checkpoint(image: Image, seed: str, store: Path = Path("build/test/checkpoints")) -> Checkpoint:
    """The usual checkpoint: the image with the test extension, seeded, its API up.

    ``seed`` is the SMBIOS string of its configuration (seed.seed_credential).
    """
    smbios = [*agent_credentials(), seed]
    return checkpoint(store, image.identity(), image.write_test_disk, ready_with_agent, smbios=smbios)
