"""From the parameters of one start of a machine to libvirt's domain XML."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import jinja2

NAMESPACE = "https://holdfast.invalid/1"
FIRMWARE_CODE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARIABLES = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
MAX_DISKS = 16
MAX_INTERFACES = 8

MIB = 1 << 20
# What QEMU itself may take beside the guest's memory. 50 MiB and 8 MiB a CPU are KubeVirt's constants; 256 MiB more
# leave room for its code, firmware, buffers of disk requests in flight and page tables under load.
_OVERHEAD = (50 + 256) * MIB
_OVERHEAD_PER_CPU = 8 * MIB
_CPU_PERIOD_US = 100_000


@dataclass(frozen=True)
class Disk:
    """A raw file given to the guest; ``serial`` is what the guest sees (20 characters at most)."""

    path: Path
    serial: str


@dataclass(frozen=True)
class DomainParameters:
    """All that varies between two domains. ``memory`` is in bytes, a multiple of 1 KiB."""

    name: str
    uuid: UUID
    uid: int
    spec_sha256: str
    cpus: int
    memory: int
    nvram: Path
    disks: tuple[Disk, ...]
    bridges: tuple[str, ...]


def overhead(cpus: int) -> int:
    """The most memory, in bytes, that QEMU may take beside the guest's own."""
    return _OVERHEAD + _OVERHEAD_PER_CPU * cpus


def mac_address(uuid: UUID, index: int) -> str:
    """The address of a machine's network interface: the same at every start, in QEMU's 52:54:00 range."""
    digest = hashlib.sha256(uuid.bytes + index.to_bytes(2, "big")).digest()
    return "52:54:00:" + digest[:3].hex(":")


def domain_name(name: str, uuid: UUID) -> str:
    """What libvirt calls a machine's domain: unique, even if one was renamed and another has its old name."""
    return f"{name}_{uuid}"


def render(parameters: DomainParameters) -> str:
    """The domain XML for one start of a machine.

    Raises: jinja2.UndefinedError should template and parameters disagree, which the golden tests rule out.
    """
    return _TEMPLATE.render(
        namespace=NAMESPACE,
        name=parameters.name,
        uuid=str(parameters.uuid),
        uid=parameters.uid,
        spec_sha256=parameters.spec_sha256,
        cpus=parameters.cpus,
        memory_kib=parameters.memory // 1024,
        memory_limit_kib=(parameters.memory + overhead(parameters.cpus)) // 1024,
        cpu_period_us=_CPU_PERIOD_US,
        firmware_code=str(FIRMWARE_CODE),
        nvram=str(parameters.nvram),
        disks=[
            {"path": str(disk.path), "target": f"vd{chr(ord('a') + index)}", "serial": disk.serial}
            for index, disk in enumerate(parameters.disks)
        ],
        interfaces=[
            {"bridge": bridge, "mac": mac_address(parameters.uuid, index)}
            for index, bridge in enumerate(parameters.bridges)
        ],
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(Path(__file__).with_name("domain.xml.j2").read_text(encoding="utf-8"))


_TEMPLATE = _template()
