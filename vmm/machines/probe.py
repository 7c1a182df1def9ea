"""The probe: a guest of a few kilobytes that shows that guests can run here, from the firmware to the console."""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from uuid import UUID, uuid4

import msgspec

from vmm.errors import Unavailable, UserError
from vmm.hypervisor import domain
from vmm.hypervisor.types import Console, Hypervisor
from vmm.machines import store
from vmm.machines.host import MIB, Host
from vmm.machines.nvram import Nvram
from vmm.machines.service import Machines
from vmm.paths import ROOT
from vmm.volumes import files
from vmm.volumes.store import Database

IMAGE = ROOT / "usr/share/holdfast/probe.raw"
READY = b"HOLDFAST-PROBE READY"
MEMORY = 128 * MIB
# No machine can have this name: libvirt keeps no two domains of one name.
_NAME = "holdfast_probe"
_MOST_OUTPUT = 64 << 10
_TOLD = 200


class Probed(msgspec.Struct, frozen=True):
    """The probe ran, and was ready after so many seconds."""

    ok: bool
    seconds: float


class Probe:
    """Runs the probe with all that confines a machine, and without being one.

    It is not counted against the memory that machines are promised: it fits into what the host keeps for itself, and
    a host must not fail its trial because its machines use all they may.
    """

    def __init__(
        self,
        database: Database,
        hypervisor: Hypervisor,
        host: Host,
        nvram: Nvram,
        machines: Machines,
        directory: Path,
        image: Path = IMAGE,
    ) -> None:
        """Arguments: ``directory`` is where its disk lies while it runs."""
        self._database = database
        self._hypervisor = hypervisor
        self._host = host
        self._nvram = nvram
        self._machines = machines
        self._directory = directory
        self._image = image
        self._one_at_a_time = asyncio.Lock()

    async def run(self, timeout: int) -> Probed:
        """Start it, wait up to ``timeout`` seconds until it says that it is ready, end it. Raises: Unavailable."""
        async with self._one_at_a_time:
            self._host.virtualisation()
            id, uid = uuid4(), await self._database.run(store.take_uid)
            disk = self._directory / f"{id}.raw"
            begun = time.monotonic()
            try:
                xml = await asyncio.to_thread(self._prepare, id, uid, disk)
                self._machines.own_domains.add(id)
                # Paused until the console is attached: what a guest says before that is lost.
                await self._hypervisor.start(xml, paused=True)
                await self._watch(id, timeout)
            except OSError as error:
                raise Unavailable(f"the probe's disk cannot be made: {error.strerror}") from None
            finally:
                # It switches itself off, so there may be nothing left to end.
                with suppress(UserError):
                    await self._hypervisor.destroy(id)
                self._machines.own_domains.discard(id)
                await asyncio.to_thread(self._clean, id)
            return Probed(True, round(time.monotonic() - begun, 3))

    async def _watch(self, id: UUID, timeout: int) -> None:
        console = await self._hypervisor.open_console(id)
        said = bytearray()
        try:
            await self._hypervisor.resume(id)
            async with asyncio.timeout(timeout):
                while READY not in said:
                    await self._listen(console, said)
        except TimeoutError:
            raise Unavailable(f"the probe guest was not ready within {timeout} s", hint=_last(said)) from None
        finally:
            await console.close()

    @staticmethod
    async def _listen(console: Console, said: bytearray) -> None:
        data = await console.read()
        if not data:
            raise Unavailable("the probe guest ended before it was ready", hint=_last(said))
        said += data
        del said[:-_MOST_OUTPUT]

    def _prepare(self, id: UUID, uid: int, disk: Path) -> str:
        """Make its files; returns its XML. Raises: OSError.

        It runs from a copy: QEMU reads past the page cache, which the root file system cannot do, and its disk lies
        where those of machines lie, under the same rules.
        """
        files.make_directory(self._directory)
        for left in self._directory.iterdir():
            left.unlink()
        with open(disk, "xb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
            file.write(self._image.read_bytes())
        return domain.render(
            domain.DomainParameters(
                name=_NAME,
                uuid=id,
                uid=uid,
                spec_sha256=hashlib.sha256(id.bytes + _NAME.encode()).hexdigest(),
                cpus=1,
                memory=MEMORY,
                nvram=self._nvram.prepare(id),
                disks=(domain.Disk(disk, id.hex[:20]),),
                bridges=(),
            )
        )

    def _clean(self, id: UUID) -> None:
        with suppress(OSError):
            self._nvram.remove(id)
            (self._directory / f"{id}.raw").unlink(missing_ok=True)


def _last(said: bytearray) -> str:
    """The end of what it said, for the journal and the trail."""
    text = "".join(character if character.isprintable() else " " for character in said.decode("ascii", "replace"))
    return f"Its console ended with: {' '.join(text.split())[-_TOLD:]}" if text.strip() else "Its console said nothing."
