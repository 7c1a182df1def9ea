"""The image's own transfer files with the real systemd-sysupdate, and read-back with the real veritysetup."""

from __future__ import annotations

import re
import shutil
import uuid
from pathlib import Path

import pytest

from tests.unit.test_update_rig import flip
from vmm.config import gpt
from vmm.process import run
from vmm.update import slots
from vmm.update.errors import Refused
from vmm.update.system import HostSystem

SYSUPDATE = Path("/usr/lib/systemd/systemd-sysupdate")
SHIPPED = Path(__file__).resolve().parents[2] / "image/rootfs/usr/share/holdfast/sysupdate"
needs_tools = pytest.mark.skipif(not SYSUPDATE.exists(), reason="needs the tools tree")
HALF = 1 << 20


class Disk:
    """A disk image whose slot A runs 1.0.0, an ESP, and the shipped transfer files with the paths of these."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.image = folder, folder / "disk.raw"
        self.staging, self.linux = folder / "staging", folder / "esp/EFI/Linux"
        self.staging.mkdir()
        self.linux.mkdir(parents=True)
        first = True
        for version in ("1.0.0", ""):
            for part, size in (("root", 4 * HALF), ("verity", HALF), ("signature", HALF)):
                name = slots.label(version, part) if version else slots.EMPTY
                make = gpt.create if first else gpt.append
                make(self.image, size, slots.TYPES[part], name)
                first = False
        (self.linux / "holdfast_1.0.0.efi").write_bytes(b"uki 1.0.0")
        for path in SHIPPED.glob("*/*.transfer"):
            text = (
                path.read_text().replace("%A", "1.0.0").replace("/var/lib/holdfast/update/staging", str(self.staging))
            )
            text = text.replace("Path=auto", f"Path={self.image}").replace("Path=/EFI/Linux", f"Path={self.linux}")
            target = folder / "definitions" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(re.sub("^PathRelativeTo=.*\n", "", text, flags=re.MULTILINE))

    def stage(self, version: str) -> dict[str, uuid.UUID]:
        ids = {}
        for part, size in (("root", 3 * HALF), ("verity", HALF // 2), ("signature", 16384)):
            ids[part] = uuid.uuid5(uuid.NAMESPACE_OID, version + part)
            content = f"{part} {version} ".encode() * (size // 8)
            (self.staging / f"holdfast_{version}_{ids[part]}.{part}.raw").write_bytes(content[:size])
        (self.staging / f"holdfast_{version}.efi").write_bytes(f"uki {version}".encode())
        return ids

    def run(self, definitions: str, *words: str) -> None:
        run([SYSUPDATE, f"--definitions={self.folder / 'definitions' / definitions}", "--no-pager", *words], timeout=30)

    def table(self) -> gpt.Table:
        with self.image.open("rb") as disk:
            return gpt.read(disk)

    def names(self) -> list[str]:
        return [partition.name for partition in self.table().partitions]

    def ukis(self) -> list[str]:
        return sorted(path.name for path in self.linux.iterdir())


A = ["holdfast_1.0.0", "holdfast_1.0.0_verity", "holdfast_1.0.0_signature"]


def of(version: str) -> list[str]:
    return [name.replace("1.0.0", version) for name in A]


@needs_tools
def test_the_transfer_files(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    ids = disk.stage("1.1.0")
    disk.run("slot", "update", "1.1.0")
    assert disk.names() == A + of("1.1.0") and disk.ukis() == ["holdfast_1.0.0.efi"]
    system = slots.find(disk.table(), "1.1.0")
    assert system is not None
    for part in ("root", "verity", "signature"):
        partition = getattr(system, part)
        (staged,) = disk.staging.glob(f"*.{part}.raw")
        assert partition.id == ids[part]
        assert gpt.read_partition(disk.image, partition, staged.stat().st_size) == staged.read_bytes()
    disk.run("uki", "update", "1.1.0")
    assert disk.ukis() == ["holdfast_1.0.0.efi", "holdfast_1.1.0+3-0.efi"]

    # The next one replaces this, never the running version; the boot entry can go first.
    shutil.rmtree(disk.staging)
    disk.staging.mkdir()
    disk.stage("1.2.0")
    (disk.linux / "holdfast_1.1.0+3-0.efi").rename(disk.linux / "holdfast_1.1.0+0-3.efi")
    disk.run("uki", "--instances-max=1", "vacuum")
    assert disk.ukis() == ["holdfast_1.0.0.efi"]
    disk.run("slot", "update", "1.2.0")
    disk.run("uki", "update", "1.2.0")
    assert disk.names() == A + of("1.2.0") and disk.ukis() == ["holdfast_1.0.0.efi", "holdfast_1.2.0+3-0.efi"]

    # A slot that was found wrong is emptied, and the same version can be written again.
    disk.run("slot", "--instances-max=1", "vacuum")
    assert disk.names() == [*A, "_empty", "_empty", "_empty"]
    disk.run("slot", "update", "1.2.0")
    assert disk.names() == A + of("1.2.0")


@needs_tools
def test_slot_b_running(tmp_path: Path) -> None:
    """Once the second slot runs, the first is written."""
    disk = Disk(tmp_path)
    disk.stage("1.1.0")
    disk.run("slot", "update", "1.1.0")
    for path in (tmp_path / "definitions").glob("*/*"):
        path.write_text(path.read_text().replace("ProtectVersion=1.0.0", "ProtectVersion=1.1.0"))
    disk.stage("1.2.0")
    disk.run("slot", "update", "1.2.0")
    assert disk.names() == of("1.2.0") + of("1.1.0")


@needs_tools
def test_read_back_by_veritysetup(tmp_path: Path) -> None:
    data, tree = tmp_path / "data", tmp_path / "tree"
    data.write_bytes(b"x" * (1 << 20))
    said = run(["/usr/sbin/veritysetup", "format", data, tree]).stdout
    found = re.search(r"Root hash:\s+([0-9a-f]{64})", said)
    assert found
    system = HostSystem("1.0.0")
    with data.open("ab") as file:
        file.write(b"what was in the partition before")
    system.drop_caches((data, tree))
    system.verify(data, tree, found[1])
    for wrong in (data, tree):
        flip(wrong, 5000 if wrong is tree else -1)
        with pytest.raises(Refused, match="read-back: "):
            system.verify(data, tree, found[1])
        flip(wrong, 5000 if wrong is tree else -1)
    with pytest.raises(Refused, match="read-back: "):
        system.verify(data, tree, "0" * 64)


def test_the_disk_is_found_by_the_running_root(tmp_path: Path) -> None:
    """The disk is the one with the running root on it, not another with partitions of the same names."""
    disk = Disk(tmp_path)
    table = disk.table()
    root_hash = (table.partitions[0].id.hex + table.partitions[1].id.hex).lower()
    root = tmp_path / "root"
    for folder in ("dev", "sys/class/block/dm-0/dm", "sys/class/block/dm-0/slaves", "sys/devices/vda"):
        (root / folder).mkdir(parents=True)
    (root / "dev/vda").symlink_to(disk.image)
    (root / "sys/class/block/dm-0/dm/name").write_text("root\n")
    for name in ("vda1", "vda2"):
        (root / "sys/class/block/dm-0/slaves" / name).symlink_to(f"../../../../devices/vda/{name}")
    # A stick with the same image, which udev found later.
    (root / "dev/disk/by-partuuid").mkdir(parents=True)
    (root / "dev/disk/by-partuuid" / str(table.partitions[0].id)).symlink_to("../../sdb1")
    (root / "sys/class/block/vda").symlink_to("../../devices/vda")
    for partition in table.partitions:
        name = f"vda{partition.number}"
        (root / "sys/devices/vda" / name).mkdir()
        (root / "sys/devices/vda" / name / "partition").write_text(f"{partition.number}\n")
        (root / "sys/class/block" / name).symlink_to(f"../../devices/vda/{name}")
    system = HostSystem("1.0.0", root)
    assert system.table() == table
    assert system.device(table.partitions[4]) == root / "dev/vda5"
    assert {part: p.number for part, p in slots.inactive(table, root_hash).items()} == {
        "root": 4,
        "verity": 5,
        "signature": 6,
    }
    with pytest.raises(Refused, match="slots: the running system's partition"):
        HostSystem("1.0.0", tmp_path).table()
