"""A stick with a bundle: found by its partition's name, taken whole or not at all, and on record."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.unit.test_cli_rig import holdfast
from tests.unit.test_config_rig import HostTree
from tests.unit.test_update_bundle import GOOD, header, tar
from tests.unit.test_update_machine import ALICE, Killed, Power, World, apply, check, download, names
from tests.unit.test_update_rig import flip
from tests.unit.test_update_service import CALLER, Client, bundle, serve
from vmm.config import devices, gpt
from vmm.config.devices import Device
from vmm.errors import Conflict, Unavailable, UserError
from vmm.update import files
from vmm.update.bundle import Unpacker, recover
from vmm.update.errors import Cancelled, NoRoom, Refused
from vmm.update.job import Job
from vmm.update.source import DirectorySource, read_all
from vmm.update.system import HostSystem

MIB = 1 << 20


def plug(world: World, name: str, content: bytes) -> Path:
    """Put in a stick with these bytes in its partition; returns the partition's device."""
    node = world.folder / name
    node.write_bytes(content)
    world.machine.sticks_.append(Device(name, node, name[:-1], devices.UPDATE_PARTITION, True, True))
    return node


def newer(world: World) -> bytes:
    """A bundle that offers 1.2.0; what was imported before offers 1.1.0."""
    world.repository.add("1.2.0")
    world.repository.publish()
    return bundle(world.repository.folder)


def check_stick(world: World, job: Job | None = None) -> None:
    world.work.check(job or Job(), ALICE, lambda phase: None, source="stick", override_expiry=False)


def former_is_usable(world: World) -> bool:
    check(world)
    return world.env.store.state.available == "1.1.0"


def test_a_release_is_taken_from_a_stick(world: World) -> None:
    plug(world, "sdb1", newer(world) + bytes(3 * MIB))
    check_stick(world)
    assert world.trail() == [
        (f"update.{job}", phase, outcome)
        for job in ("import", "check")
        for phase, outcome in (("intent", "pending"), ("outcome", "success"))
    ]
    for record in world.records[:2]:
        assert record.actor == ALICE.actor and record.extra["device"] == "sdb1"
        assert record.extra["caller_request"] == "core-1"
    assert world.records[1].extra["bytes"] > 0 and world.records[3].extra["source"] == "bundle"
    assert world.env.store.state.available == "1.2.0"
    # It is the host's own now.
    world.machine.sticks_.clear()
    download(world)
    apply(world)
    assert names(world) == ["holdfast_1.0.0.efi", "holdfast_1.2.0+3-0.efi"]


@pytest.mark.parametrize("rest", [b"", b"x", b"\xff" * 512, tar(GOOD), os.urandom(2 * MIB), header(b"../x", b"7")])
def test_what_lies_behind_the_end_of_the_tar_does_not_matter(world: World, rest: bytes) -> None:
    content = newer(world)
    # tar programs add zeros up to a whole record; all that ends a tar is two blocks of them.
    plug(world, "sdb1", content.rstrip(b"\0") + bytes(-len(content.rstrip(b"\0")) % 512 + 1024) + rest)
    check_stick(world)
    assert world.env.store.state.available == "1.2.0"


def test_which_stick_must_be_clear(world: World) -> None:
    with pytest.raises(Conflict, match="no stick with a partition named HOLDFAST-UPDATE was found"):
        check_stick(world)
    plug(world, "sdb1", newer(world))
    plug(world, "sdc1", newer(world))
    with pytest.raises(Conflict, match="several partitions are named HOLDFAST-UPDATE: sdb1, sdc1"):
        check_stick(world)
    assert world.records == []
    assert former_is_usable(world)


HOSTILE = {
    "no bytes": b"",
    "zeros": bytes(MIB),
    "text": b"x" * MIB,
    "gzip": b"\x1f\x8b\x08" + bytes(MIB),
    "no repository": tar([("metadata/1.root.json", b"{}")]),
    "a file longer than the partition": header(b"metadata/timestamp.json", b"00004000000\0") + bytes(4096),
    "a file longer than allowed": header(b"metadata/timestamp.json", b"77777777777\0") + bytes(4096),
    "an endless name": header(b"x", b"77777777777\0", b"L") + b"a" * MIB,
    "an endless extension": header(b"x", b"77777777777\0", b"x") + b"a" * MIB,
    "a way out": tar([*GOOD, ("../../etc/passwd", b"x")]),
    "half of a header": tar(GOOD)[:700],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_what_is_no_bundle_is_refused_and_the_former_one_stays(world: World, content: bytes) -> None:
    plug(world, "sdb1", content)
    with pytest.raises(Refused, match="^bundle: the partition sdb1: "):
        check_stick(world)
    assert world.trail() == [("update.import", "intent", "pending"), ("update.import", "outcome", "failure")]
    assert world.records[1].extra["layer"] == "bundle" and world.records[1].extra["device"] == "sdb1"
    assert sorted(path.name for path in world.env.folder.glob("bundle*")) == ["bundle"]
    assert former_is_usable(world)


def test_a_partition_smaller_than_its_tar(world: World) -> None:
    content = newer(world)
    node = plug(world, "sdb1", content)
    for size in (512, 1000, len(content) // 2, len(content.rstrip(b"\0"))):
        node.write_bytes(content[:size])
        with pytest.raises(Refused, match="the partition sdb1: it is incomplete, or no tar"):
            check_stick(world)
    assert former_is_usable(world)


def test_what_is_signed_by_nobody_is_imported_and_then_refused(world: World) -> None:
    newer(world)
    flip(world.repository.folder / "metadata/timestamp.json")
    plug(world, "sdb1", bundle(world.repository.folder))
    with pytest.raises(Refused, match="^TUF timestamp: "):
        check_stick(world)
    assert world.trail()[1] == ("update.import", "outcome", "success")


def test_no_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plug(world, "sdb1", newer(world))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda folder: SimpleNamespace(f_bavail=files.RESERVE + 9, f_frsize=1))
        with pytest.raises(NoRoom, match="9 are free on the data volume"):
            check_stick(world)
    assert former_is_usable(world)


@pytest.mark.parametrize("node", [Path("/nonexistent"), Path("/proc/self/mem")])
def test_a_stick_that_cannot_be_read(world: World, node: Path) -> None:
    world.machine.sticks_.append(Device("sdb1", node, "sdb", devices.UPDATE_PARTITION, True, True))
    with pytest.raises(Unavailable, match="the partition sdb1 cannot be read: "):
        check_stick(world)
    assert world.trail()[-1] == ("update.import", "outcome", "failure")
    assert former_is_usable(world)


def test_cancelling(world: World) -> None:
    plug(world, "sdb1", tar([*GOOD, (f"targets/holdfast_1.2.0/{'1' * 96}.root.zst", bytes(8 * MIB))]))
    seen: list[tuple[int, int]] = []

    def report(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 3 * MIB:
            job.cancel()

    job = Job(report)
    with pytest.raises(Cancelled):
        check_stick(world, job)
    size = (world.folder / "sdb1").stat().st_size
    assert seen == [(0, size), (MIB, size), (2 * MIB, size), (3 * MIB, size)]
    assert world.records[-1].reason == "the update was cancelled"
    assert former_is_usable(world)


def test_killed_at_any_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was imported before, or what the stick brings: after the next start one of them is there, whole."""
    plug(world, "sdb1", newer(world))
    found = set()
    for after in range(200):
        with monkeypatch.context() as patch:
            power = Power(after, patch, ("fsync", "replace"))
            try:
                check_stick(world)
            except Killed:
                power.left = 100_000
            else:
                break
        world.restarted()
        recover(world.env.bundle)
        check(world)
        found.add(world.env.store.state.available)
    assert found == {"1.1.0", "1.2.0"} and after > 10


def test_over_the_socket(world: World) -> None:
    plug(world, "sdb1", newer(world))

    async def body(client: Client) -> None:
        await client("check", source="stick", **CALLER)
        status = await client.status()
        assert (status.available, status.phase, status.total) == ("1.2.0", "idle", 0)
        (world.folder / "sdb1").write_bytes(b"no tar" * 1000)
        with pytest.raises(UserError, match="the partition sdb1: it is no tar"):
            await client("check", source="stick")
        assert "the partition sdb1: it is no tar" in (await client.status()).error

    serve(world, body)


def test_cancelling_over_the_socket(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    plug(world, "sdb1", newer(world))
    reached, go_on = threading.Event(), threading.Event()
    feed = Unpacker.feed

    def slowly(unpacker: Unpacker, content: bytes) -> None:
        reached.set()
        assert go_on.wait(10)
        feed(unpacker, content)

    monkeypatch.setattr(Unpacker, "feed", slowly)

    async def body(client: Client) -> None:
        await client("check", source="stick", wait=False)
        assert await asyncio.to_thread(reached.wait, 10)
        assert (await client.status()).phase == "checking"
        assert (await client.cancel(go_on))["error"] == "the update was cancelled"
        with pytest.raises(Conflict, match="nothing that could be cancelled"):
            await client("cancel")

    serve(world, body)
    assert world.trail()[-1] == ("update.import", "outcome", "failure")
    assert former_is_usable(world)


def test_sticks_of_a_host(tmp_path: Path) -> None:
    """Partitions of that name on any disk but the one under the running root."""
    tree, wanted = HostTree(tmp_path), (devices.UPDATE_PARTITION, b"")
    tree.disk("nvme0n1", nvme0n1p1=("holdfast_1.0.0", b""), nvme0n1p9=wanted)
    tree.write("sys/class/block/dm-0/dm/name", b"root\n")
    slaves = tmp_path / "sys/class/block/dm-0/slaves"
    slaves.mkdir()
    (slaves / "nvme0n1p1").symlink_to(tmp_path / "sys/devices/block/nvme0n1/nvme0n1p1")
    system = HostSystem("1.0.0", tmp_path)
    assert system.sticks() == []
    tree.disk("loop0", loop0p1=wanted)
    tree.disk("sda", sda1=("HOLDFAST-UPDATE2", b""), sda2=("HOLDFAST-SEED", b""))
    tree.disk("sdc", removable=True, sdc1=wanted)
    tree.disk("nvme1n1", nvme1n1p2=wanted)
    assert [stick.node for stick in system.sticks()] == [tmp_path / "dev/nvme1n1p2", tmp_path / "dev/sdc1"]


def content_of(image: Path) -> bytes:
    """What the host sees in the partition of a stick."""
    with image.open("rb") as disk:
        partition = gpt.read(disk).find(devices.UPDATE_PARTITION)
    assert partition is not None and str(partition.type) == devices.UPDATE_PARTITION_TYPE
    return gpt.read_partition(image, partition, partition.size)


def test_the_command_writes_what_the_host_takes(world: World, tmp_path: Path) -> None:
    tar_file, image = tmp_path / "release.bundle", tmp_path / "stick.img"
    tar_file.write_bytes(newer(world))
    holdfast("update", "stick", str(tar_file), str(image))
    content = content_of(image)
    assert content.startswith(tar_file.read_bytes()) and len(content) % MIB == 0
    plug(world, "sdb1", content)
    check_stick(world)
    source = DirectorySource(world.env.bundle)
    for path in sorted(path for path in world.repository.folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(world.repository.folder))
        assert read_all(source, name, limit=MIB) == path.read_bytes()
    with pytest.raises(UserError, match="stick.img exists already"):
        holdfast("update", "stick", str(tar_file), str(image))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a whole, uncompressed tar"),
        (b"\x1f\x8b" + bytes(2000), "not a whole, uncompressed tar"),
        (tar(GOOD)[:2600], "not a whole, uncompressed tar"),
        (tar([("repository/metadata/timestamp.json", b"{}")]), "it holds no metadata/timestamp.json"),
    ],
)
def test_the_command_refuses_what_is_no_bundle(tmp_path: Path, content: bytes, says: str) -> None:
    tar_file, image = tmp_path / "release.bundle", tmp_path / "stick.img"
    tar_file.write_bytes(content)
    with pytest.raises(UserError, match=f"release.bundle: {says}") as told:
        holdfast("update", "stick", str(tar_file), str(image))
    assert "tar -C" in told.value.hint
    assert not image.exists()
