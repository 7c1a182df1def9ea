"""The domain template against golden documents, and the isolation decisions that they must show."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree

import pytest

from vmm.hypervisor import domain
from vmm.hypervisor.domain import Disk, DomainParameters

GOLDEN = Path(__file__).parent / "golden"
ID = UUID("6a7f3c1e-52b0-4d3e-9c1a-0f1e2d3c4b5a")
SMALL = DomainParameters(
    name="small",
    uuid=ID,
    uid=70000,
    spec_sha256="0" * 64,
    cpus=1,
    memory=64 << 20,
    nvram=Path(f"/var/lib/holdfast/core/nvram/{ID}.fd"),
    disks=(),
    bridges=(),
)
FULL = dataclasses.replace(
    SMALL,
    name="full",
    uid=79999,
    cpus=4,
    memory=8 << 30,
    disks=tuple(Disk(Path(f"/var/lib/holdfast/core/volumes/{n}.raw"), f"serial{n}") for n in range(2)),
    bridges=("op-lan", "op-dmz"),
)


@pytest.mark.parametrize("parameters", [SMALL, FULL], ids=lambda p: p.name)
def test_golden(parameters: DomainParameters) -> None:
    assert domain.render(parameters) == (GOLDEN / f"{parameters.name}.xml").read_text(encoding="utf-8")


def test_what_a_guest_must_not_have() -> None:
    root = ElementTree.fromstring(domain.render(FULL))
    assert root.get("type") == "kvm"
    devices = root.find("devices")
    assert devices is not None
    assert {device.tag for device in devices} == {
        *(
            "emulator",
            "disk",
            "interface",
            "serial",
            "console",
            "rng",
            "controller",
            "memballoon",
            "audio",
            "video",
            "panic",
        )
    }
    for path in ("controller[@type='usb'][@model='none']", "memballoon[@model='none']", "audio[@type='none']"):
        assert devices.find(path) is not None
    assert all(d.get("type") == "raw" for d in devices.iterfind("disk/driver"))
    assert all(p.get("isolated") == "yes" for p in devices.iterfind("interface/port"))
    assert len(devices.findall("interface/port")) == 2
    assert root.find("features/kvm/hidden[@state='on']") is not None
    for name in ("svm", "vmx"):
        assert root.find(f"cpu/feature[@policy='disable'][@name='{name}']") is not None
    assert root.find("memoryBacking/nosharepages") is not None
    assert root.findtext("seclabel[@type='static'][@model='dac']/label") == "+79999:kvm"
    assert root.find("seclabel[@type='dynamic'][@model='apparmor']") is not None
    assert "qemu:" not in domain.render(FULL)


def test_limits_leave_room_for_qemu_and_no_more() -> None:
    root = ElementTree.fromstring(domain.render(FULL))
    limit = int(root.findtext("memtune/hard_limit") or 0) * 1024
    assert limit == FULL.memory + domain.overhead(4) == (8 << 30) + (306 + 32) * (1 << 20)
    assert root.findtext("cputune/global_quota") == "400000"


def test_text_is_escaped() -> None:
    hostile = dataclasses.replace(SMALL, name="a</name><devices>'\"&", bridges=("x'/><y z='",))
    root = ElementTree.fromstring(domain.render(hostile))
    assert root.findtext("name") == hostile.name
    source = root.find("devices/interface/source")
    assert source is not None and source.get("bridge") == hostile.bridges[0]


def test_mac_addresses_are_stable_local_and_different() -> None:
    addresses = [domain.mac_address(ID, index) for index in range(8)]
    assert addresses == [domain.mac_address(ID, index) for index in range(8)]
    assert len(set(addresses)) == 8 and all(a.startswith("52:54:00:") for a in addresses)
    assert domain.mac_address(UUID(int=1), 0) not in addresses
