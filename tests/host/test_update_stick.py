"""A host without a way to its repository takes a release from a stick or an upload; what else these may be does no
harm.
"""

from __future__ import annotations

import sys
import tarfile
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.harness.api import ApiError
from tests.harness.forging import Forgery
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.publishing import Publisher
from tests.harness.updates import Updates, slot
from tests.harness.waiting import poll
from vmm.config import devices, gpt
from vmm.process import run

_SEEN = """
import pathlib
result = sorted(p.name for p in pathlib.Path("/sys/class/block").glob("sd*") if (p / "partition").exists())
"""


def plug(host: Host, stick: Path, partitions: int = 1) -> list[str]:
    """Put a stick in and wait until the host knows so many partitions of it; their names there."""
    host.plug_stick(stick)

    def seen() -> list[str] | None:
        names: list[str] = host.agent.python(_SEEN)
        return names if len(names) >= partitions else None

    return poll(seen, 60 * host.acceleration.scale, "the host sees the stick's partitions")


def unplug(host: Host) -> None:
    """Pull the stick out and wait until the host has noticed."""
    host.unplug_stick()
    poll(lambda: not host.agent.python(_SEEN), 60 * host.acceleration.scale, "the host sees that the stick is gone")


def make_bundle(repository: Path, bundle: Path, *parts: str) -> Path:
    """A tar of these parts of a repository, as docs/updates.md has it made."""
    with tarfile.open(bundle, "w") as archive:
        for part in parts:
            archive.add(repository / part, part)
    return bundle


@pytest.fixture
def stick(offered: Publisher, workdir: Path) -> Path:
    """A stick with the next release, made by our own command. The running one's files are left out, as nobody asks."""
    bundle = make_bundle(offered.folder, workdir / "release.bundle", "metadata", "targets/holdfast_0.1.1")
    image = workdir / "stick.img"
    run([sys.executable, "-m", "vmm.cli", "update", "stick", bundle, image])
    bundle.unlink()
    return image


def imports(updates: Updates) -> list[Any]:
    """What is on record of imports."""
    return updates.records("update.import")


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_a_release_is_taken_from_a_stick(updates: Updates, host: Host, stick: Path) -> None:
    """Plugged into a running host, imported, pulled out again; then as any other release. No server is there."""
    with pytest.raises(ApiError, match="no stick with a partition named HOLDFAST-UPDATE"):
        updates.do("check", source="stick")
    (name,) = plug(host, stick)
    assert updates.do("check", source="stick")["available"] == "0.1.1"
    unplug(host)
    records = imports(updates)
    assert [(r["phase"], r["outcome"]) for r in records] == [("intent", "pending"), ("outcome", "success")]
    assert {(r["actor"]["id"], r["extra"]["device"]) for r in records} == {("admin", name)}
    assert updates.do("download")["staged"] == "0.1.1"
    updates.do("apply")
    updates.reboot()
    after = updates.settled()
    assert (after["running"], slot(after, "b")["state"]) == ("0.1.1", "running")


@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_sticks_that_are_refused(updates: Updates, host: Host, stick: Path) -> None:
    """Cut off, no tar, twice the name: each is named with its partition, and nothing is offered."""
    with stick.open("rb") as disk:
        partition = gpt.read(disk).find(devices.UPDATE_PARTITION)
    assert partition is not None
    short = stick.with_name("short.img")
    cut_off = gpt.create(short, 8 << 20, partition.type, devices.UPDATE_PARTITION)
    gpt.write_partition(short, cut_off, gpt.read_partition(stick, partition, cut_off.size))
    (name,) = plug(host, short)
    with pytest.raises(ApiError, match=f"the partition {name}: it is incomplete, or no tar"):
        updates.do("check", source="stick")
    unplug(host)

    gpt.write_partition(short, cut_off, b"no tar" * 10_000)
    (name,) = plug(host, short)
    with pytest.raises(ApiError, match=f"the partition {name}: it is no tar"):
        updates.do("check", source="stick")
    unplug(host)
    assert [r["outcome"] for r in imports(updates)] == ["pending", "failure"] * 2

    gpt.append(short, 1 << 20, uuid.UUID(devices.UPDATE_PARTITION_TYPE), devices.UPDATE_PARTITION)
    both = plug(host, short, partitions=2)
    with pytest.raises(ApiError, match=f"several partitions are named HOLDFAST-UPDATE: {', '.join(both)}"):
        updates.do("check", source="stick")
    short.unlink()
    status = updates.status()
    assert not status["available"] and slot(status, "b")["state"] == "empty"


@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_a_release_is_taken_from_an_upload(updates: Updates, repositories: Path, workdir: Path) -> None:
    """Through the API, as `holdfast update import` does it. Half a bundle is refused, and the one before it stays.

    No server is there.
    """
    good = Forgery(repositories / "origin", repositories / "good")
    good.release("0.1.9")
    good.publish()
    bundle = make_bundle(good.folder, workdir / "release.bundle", "metadata", "targets")
    content = bundle.read_bytes()
    bundle.unlink()
    with pytest.raises(ApiError, match="no bundle was imported"):
        updates.do("check", source="bundle")
    updates.api.call("PUT", "/v1/update/bundle", content, seconds=60)
    with pytest.raises(ApiError, match="bundle: it is incomplete, or no tar"):
        updates.api.call("PUT", "/v1/update/bundle", content[: len(content) // 2], seconds=60)
    done = updates.outcomes("update.import")
    assert [(r["outcome"], r["actor"]["id"], r["extra"]["bytes"]) for r in done] == [
        ("success", "admin", len(content)),
        ("failure", "admin", len(content) // 2),
    ]
    assert updates.do("check", source="bundle")["available"] == "0.1.9"
    assert updates.do("download")["staged"] == "0.1.9"
    assert updates.outcomes("update.download")[-1]["extra"]["source"] == "bundle"


@pytest.mark.long
@pytest.mark.sfr("FPT_TUD_EXT.1", "FAU_GEN.1")
def test_an_uploaded_release_is_written_and_kept(updates: Updates, offered: Publisher, workdir: Path) -> None:
    """From the upload to the next version, of which only what this host needs was brought: the root as a delta."""
    folder = offered.folder / "targets/holdfast_0.1.1"
    needed = [f"targets/{folder.name}/{f.name}" for f in sorted(folder.iterdir()) if not f.name.endswith(".root.zst")]
    assert len(needed) < len(list(folder.iterdir()))
    bundle = make_bundle(offered.folder, workdir / "release.bundle", "metadata", *needed)
    updates.api.call("PUT", "/v1/update/bundle", bundle.read_bytes(), seconds=120)
    bundle.unlink()
    assert updates.do("check", source="bundle")["available"] == "0.1.1"
    assert updates.do("download")["staged"] == "0.1.1"
    (record,) = updates.outcomes("update.download")
    assert {part["part"]: part["base"] for part in record["extra"]["parts"]}["root"] == "0.1.0", record
    updates.do("apply")
    updates.reboot()
    after = updates.settled()
    assert (after["running"], slot(after, "b")["state"], slot(after, "a")["state"]) == ("0.1.1", "running", "good")
    assert updates.records("update.bless")[-1]["object"]["id"] == "0.1.1"


def test_a_stick_with_the_running_image_is_not_taken_for_the_system_disk(
    updates: Updates, host: Host, built_image: Image, workdir: Path
) -> None:
    """Its partitions have the UUIDs of the running system; whatever udev makes of that, the updater is not misled."""
    image = workdir / "installer.img"
    run(["cp", "--sparse=always", built_image.disk, image])
    before = updates.status()["slots"]
    plug(host, image)
    host.agent.exec(["udevadm", "settle"], check=False)
    assert updates.status()["slots"] == before
    with pytest.raises(ApiError, match="no stick"):
        updates.do("check", source="stick")
    image.unlink()
