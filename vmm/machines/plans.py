"""Whether a machine can be, and what it is started as."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

from vmm.errors import Conflict, Unavailable, UserError
from vmm.hypervisor import domain
from vmm.machines.host import Host
from vmm.machines.nvram import Nvram
from vmm.machines.store import Row
from vmm.machines.types import Hardware
from vmm.machines.view import need

Networks = Callable[[], dict[str, str]]
"""The operational networks of the configuration in force: name → bridge."""


class Plans:
    """Checks hardware against the host, and makes domains of it."""

    def __init__(self, host: Host, nvram: Nvram, volume_path: Callable[[str], Path], networks: Networks) -> None:
        self._host = host
        self._nvram = nvram
        self._volume_path = volume_path
        self._networks = networks

    def check(self, hardware: Hardware) -> None:
        """What the types cannot say. Raises: UserError naming the field; Unavailable, with figures."""
        if hardware.cpus > self._host.cpus():
            raise UserError(f"cpus: {hardware.cpus} are wanted, the host has {self._host.cpus()}")
        bridges = self._networks()
        for index, interface in enumerate(hardware.networks):
            if interface.network not in bridges:
                known = ", ".join(sorted(bridges)) or "none"
                raise UserError(
                    f"networks[{index}].network: there is no operational network {interface.network!r}",
                    hint=f"The configuration has: {known}.",
                )
        volumes = [disk.volume for disk in hardware.disks]
        for index, volume in enumerate(volumes):
            if volume in volumes[:index]:
                raise UserError(f"disks[{index}].volume: {volume!r} is listed twice")
        self.admit(need(hardware), 0)

    def admit(self, wanted: int, running: int) -> None:
        """Whether there is memory for a start; both are in bytes. Raises: Unavailable, with figures."""
        total = self._host.memory()
        if running + wanted > total:
            raise Unavailable(
                f"not enough memory: the machine and its overhead need {wanted} bytes, "
                f"{max(total - running, 0)} are left of {total} (running machines have {running})",
                hint="Stop other machines, or give this one less memory.",
            )

    async def xml(self, row: Row, hardware: Hardware) -> str:
        """The domain of a machine with this hardware. Raises: Conflict; Unavailable."""
        bridges = self._networks()
        for index, interface in enumerate(hardware.networks):
            if interface.network not in bridges:
                raise Conflict(
                    f"networks[{index}].network: the configuration has no operational network {interface.network!r}"
                )
        paths = [self._volume_path(volume) for volume in row.volumes]
        for disk, path in zip(hardware.disks, paths, strict=True):
            if not path.exists():
                raise Unavailable(f"the file of the volume {disk.volume!r} is missing")
        try:
            nvram = await asyncio.to_thread(self._nvram.prepare, row.id)
        except OSError as error:
            raise Unavailable(f"the machine's store of UEFI variables cannot be made: {error.strerror}") from None
        return domain.render(
            domain.DomainParameters(
                name=domain.domain_name(row.spec.name, row.id),
                uuid=row.id,
                uid=row.uid,
                spec_sha256=hardware.sha256(row.id),
                cpus=hardware.cpus,
                memory=hardware.memory,
                nvram=nvram,
                disks=tuple(domain.Disk(path, UUID(id).hex[:20]) for path, id in zip(paths, row.volumes, strict=True)),
                bridges=tuple(bridges[interface.network] for interface in hardware.networks),
            )
        )
