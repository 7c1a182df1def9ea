"""A release from the repository to the boot loader and back: what is refused, and what is recorded."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_update_machine import ALICE, World, apply, bless, boot, check, download, install, names
from tests.unit.test_update_rig import flip, plain
from vmm.audit.client import Entry
from vmm.errors import Conflict, Unavailable, UserError
from vmm.update import esp, files, slots
from vmm.update.errors import NoRoom, Refused
from vmm.update.job import Job
from vmm.update.types import Part, Release


def test_the_whole_way(world: World) -> None:
    check(world)
    assert world.env.store.state.available == "1.1.0"
    download(world)
    phases: list[str] = []
    apply(world, phases)
    assert phases == ["staged", "writing", "verifying", "finishing"]
    assert names(world) == ["holdfast_1.0.0.efi", "holdfast_1.1.0+3-0.efi"]
    written = slots.find(world.machine.table_, "1.1.0")
    assert written is not None and slots.belongs(written, plain("1.1.0").root_hash)
    assert world.machine.device(written.root).read_bytes()[: len(plain("1.1.0").root)] == plain("1.1.0").root
    assert not list((world.env.folder / "staging").iterdir())
    with pytest.raises(Conflict, match=r"1\.1\.0 is installed and waits"):
        apply(world)
    with pytest.raises(Conflict, match=r"1\.1\.0 is installed and waits"):
        download(world)
    assert world.trail() == [
        (f"update.{job}", phase, outcome)
        for job in ("check", "download", "apply")
        for phase, outcome in (("intent", "pending"), ("outcome", "success"))
    ]
    done = world.records[-1]
    assert done.actor == ALICE.actor and done.object.id == "1.1.0"
    assert done.extra["root_hash"] == plain("1.1.0").root_hash and done.extra["slot"] == "b"
    assert done.extra["signer"] == "CN=db in db" and done.extra["caller_request"] == "core-1"
    got = world.records[3].extra
    assert got["metadata"]["timestamp"] == {"version": 1, "expires": "2026-12-08T12:00:00Z"}
    assert {part["part"]: part["base"] for part in got["parts"]}["root"] == "1.0.0"

    boot(world, "1.1.0")
    assert world.work.settle().kind == "trial"
    assert world.env.store.state.installed is not None
    bless(world)
    assert world.work.settle().kind == "blessed"
    assert world.env.floor.read() == 1 and world.env.store.state.installed is None
    assert world.work.settle().kind == "nothing"
    assert world.trail()[-1] == ("update.bless", "event", "success")
    assert [slot.state for slot in status(world)] == ["good", "running"]
    with pytest.raises(Conflict, match="no newer release"):
        download(world)


def status(world: World) -> tuple[Any, ...]:
    return slots.status(world.machine.table(), world.machine.entries(), world.env.running.root_hash)


def test_a_third_version_takes_the_place_of_the_first(world: World) -> None:
    install(world)
    boot(world, "1.1.0")
    bless(world)
    world.work.settle()
    world.repository.add("1.2.0", base="1.1.0")
    world.offer()
    install(world)
    assert names(world) == ["holdfast_1.1.0.efi", "holdfast_1.2.0+3-0.efi"]
    assert [(slot.version, slot.state, slot.tries) for slot in status(world)] == [
        ("1.2.0", "trying", 3),
        ("1.1.0", "running", None),
    ]


def test_back_on_the_old_version(world: World) -> None:
    install(world)
    (world.machine.linux / "holdfast_1.1.0+3-0.efi").rename(world.machine.linux / "holdfast_1.1.0+0-3.efi")
    boot(world, "1.0.0")
    assert world.work.settle().kind == "failed"
    (failed,) = world.env.store.state.failed
    assert (failed.version, failed.reason) == (
        "1.1.0",
        "it did not reach its health gate in 3 tries after boot boot-1; 1.0.0 was started again",
    )
    assert world.records[-1].type == "update.failed" and world.records[-1].outcome == "failure"
    assert (world.records[-1].reason, world.records[-1].extra["boots"]) == (failed.reason, [])
    assert world.work.settle().kind == "blessed"
    # Not again by itself, not even by name, unless told.
    with pytest.raises(Conflict, match="failed here before"):
        download(world)
    with pytest.raises(Refused, match="failed versions: 1.1.0 failed here before"):
        download(world, "1.1.0")
    download(world, "1.1.0", retry=True)
    apply(world)
    assert names(world) == ["holdfast_1.0.0.efi", "holdfast_1.1.0+3-0.efi"]
    boot(world, "1.1.0")
    bless(world)
    assert world.work.settle().kind == "blessed" and world.env.store.state.failed == ()


def test_the_epoch_floor_outlives_the_metadata(world: World, tmp_path: Path) -> None:
    """The client's memory is emptied and an older, unexpired repository offers a release below the floor."""
    older = world.repository.copy(tmp_path / "older")
    world.offer()
    check(world)
    world.env.floor.raise_to(2)
    shutil.rmtree(world.env.folder / "metadata")
    shutil.rmtree(world.env.bundle)
    older.rename(world.env.bundle)
    for attempt in (check, download, lambda w: download(w, "1.1.0")):
        with pytest.raises(Refused, match="epoch floor: 1.1.0 has epoch 1, below the floor of 2"):
            attempt(world)
    assert world.records[-1].extra["layer"] == "epoch floor" and world.records[-1].outcome == "failure"


def test_a_spoilt_release_json_is_refused_on_record(world: World) -> None:
    world.offer()
    (spoilt,) = (world.env.bundle / "targets/holdfast_1.1.0").glob("*.release.json")
    flip(spoilt)
    for attempt in (check, download):
        with pytest.raises(Refused, match="TUF target: holdfast_1.1.0/release.json is not the file that was signed"):
            attempt(world)
        assert (world.records[-1].outcome, world.records[-1].extra["layer"]) == ("failure", "TUF target")


def test_an_epoch_is_never_given_up(world: World) -> None:
    world.restarted(epoch=2)
    with pytest.raises(Refused, match="epoch: 1.1.0 has epoch 1, below the running system's 2"):
        download(world)


def test_the_floor_is_asked_again_before_writing(world: World) -> None:
    download(world)
    world.env.floor.raise_to(2)
    with pytest.raises(Refused, match="epoch floor"):
        apply(world)
    assert names(world) == ["holdfast_1.0.0.efi"]


@pytest.mark.parametrize("part", ["root", "verity", "signature"])
def test_a_slot_that_changed_after_it_was_written(world: World, part: str) -> None:
    download(world)

    def tamper(step: str) -> None:
        if step == "drop caches":
            written = slots.find(world.machine.table_, "1.1.0")
            assert written is not None
            flip(world.machine.device(getattr(written, part)), 12)

    world.machine.steps = tamper
    with pytest.raises(Refused, match="read-back"):
        apply(world)
    assert names(world) == ["holdfast_1.0.0.efi"]
    assert [slot.state for slot in status(world)] == ["running", "empty"]
    assert world.env.store.state.installed is None
    world.machine.steps = lambda step: None
    apply(world)
    assert names(world) == ["holdfast_1.0.0.efi", "holdfast_1.1.0+3-0.efi"]


def test_a_uki_that_changed_on_the_esp(world: World) -> None:
    download(world)
    count = [0]

    def tamper(step: str) -> None:
        count[0] += step == "drop caches"
        if count[0] == 2:
            flip(world.machine.linux / "holdfast_1.1.0+3-0.efi", 5000)

    world.machine.steps = tamper
    with pytest.raises(Refused, match="read-back: the UKI on the ESP"):
        apply(world)
    assert names(world) == ["holdfast_1.0.0.efi"] and world.env.store.state.installed is None


@pytest.mark.parametrize("part", ["root", "verity", "signature", "uki"])
def test_a_staged_part_that_changed(world: World, part: str) -> None:
    download(world)
    release = world.env.staging.staged()
    assert release is not None
    flip(world.env.staging.path(release, part))
    with pytest.raises(Refused, match="staging: holdfast_1.1.0.*no longer what was downloaded"):
        apply(world)
    assert names(world) == ["holdfast_1.0.0.efi"]
    with pytest.raises(Conflict, match="nothing is staged"):
        apply(world)
    install(world)


def lying(world: World, **parts: bytes) -> Callable[[Release], Release]:
    """Changes a release: its parts are others, and it says so truly; only the parts do not fit each other."""

    def change(release: Release) -> Release:
        import zstandard  # noqa: PLC0415

        described = {name: getattr(release.parts, name) for name in ("root", "verity", "signature", "uki")}
        for name, content in parts.items():
            target = f"holdfast_{release.version}/{name}.other.zst"
            world.repository.put(target, zstandard.compress(content))
            described[name] = Part(len(content), hashlib.sha384(content).hexdigest(), target)
        return msgspec.structs.replace(release, parts=type(release.parts)(**described))

    return change


@pytest.mark.parametrize(
    ("parts", "layer"),
    [
        ({"uki": plain("1.1.0").uki}, "UKI: it says root hash"),
        ({"uki": plain("1.2.0", 2).uki}, "UKI: it says epoch 2, the release says 1"),
        ({"uki": b"MZ" + bytes(3000)}, "UKI: it is no PE"),
        ({"root": plain("1.1.0").root}, "read-back"),
    ],
)
def test_releases_whose_parts_do_not_belong_together(world: World, parts: dict[str, bytes], layer: str) -> None:
    """Mixed and matched by whoever holds the targets key: the machine itself still finds out."""
    world.repository.add("1.2.0", change=lying(world, **parts))
    world.offer()
    download(world)
    with pytest.raises(Refused, match=layer):
        apply(world)
    assert names(world) == ["holdfast_1.0.0.efi"]


def test_a_uki_that_the_firmware_would_not_start(world: World) -> None:
    download(world)
    world.machine.signer = ""
    with pytest.raises(Refused, match="UKI signer"):
        apply(world)
    assert [slot.state for slot in status(world)] == ["running", "empty"]


@pytest.mark.parametrize("where", ["staging", "slot", "esp"])
def test_no_room_is_found_out_before_anything_is_written(
    world: World, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "staging":
        monkeypatch.setattr(files, "free", lambda folder: files.RESERVE + 1000)
    elif where == "esp":
        world.machine.free = 10_000
    else:
        big = plain("1.1.0").signature * 100
        world.repository.add("1.2.0", change=lying(world, signature=big))
        world.offer()
    before = [path.read_bytes() for path in sorted(world.machine.folder.glob("p?"))]
    with pytest.raises(NoRoom, match=r"[0-9]+ bytes are needed, [0-9]+ are free, [0-9]+ are missing"):
        download(world)
    assert not list((world.env.folder / "staging").glob("*"))
    assert before == [path.read_bytes() for path in sorted(world.machine.folder.glob("p?"))]
    assert names(world) == ["holdfast_1.0.0.efi"]


def test_the_esp_fills_up_between_download_and_writing(world: World) -> None:
    download(world)
    world.machine.free = 0
    with pytest.raises(NoRoom, match="EFI system partition"):
        apply(world)
    world.machine.free = 1 << 30
    apply(world)


def test_nothing_is_done_that_cannot_be_recorded(world: World) -> None:
    def refuse(entry: Entry) -> int:
        raise Unavailable("the audit trail takes no records")

    recorder = world.env.recorder
    monkey = replace(world.env, recorder=type(recorder)(refuse, world.env.store, lambda: 0.0))
    world.env = monkey
    for attempt in (check, download):
        with pytest.raises(Unavailable, match="no records"):
            attempt(world)
    assert not (world.env.folder / "metadata").exists()


def test_rollback(world: World) -> None:
    with pytest.raises(Refused, match="no other good version"):
        world.work.rollback(Job(), ALICE, lambda phase: None)
    install(world)
    boot(world, "1.1.0")
    bless(world)
    world.work.settle()
    world.work.rollback(Job(), ALICE, lambda phase: None)
    assert names(world) == ["holdfast_1.0.0.efi", "holdfast_1.1.0+0.efi"]
    assert world.env.store.state.failed[0].reason == "rolled back to 1.0.0 by alice"
    boot(world, "1.0.0")
    assert world.work.settle().kind == "nothing" or world.env.floor.read() == 1
    with pytest.raises(Refused, match="no other good version"):
        world.work.rollback(Job(), ALICE, lambda phase: None)
    with pytest.raises(Conflict, match="failed here before"):
        download(world)


def test_taking_back_what_waits_for_its_reboot(world: World) -> None:
    install(world)
    world.work.rollback(Job(), ALICE, lambda phase: None)
    assert names(world) == ["holdfast_1.0.0.efi", "holdfast_1.1.0+0-0.efi"]
    assert world.env.store.state.installed is None


@pytest.mark.parametrize("reason", ["floor", "damaged", "empty", "signer"])
def test_rollbacks_that_are_refused(world: World, reason: str) -> None:
    install(world)
    boot(world, "1.1.0")
    bless(world)
    world.work.settle()
    before = names(world)
    if reason == "floor":
        world.env.floor.raise_to(2)
    elif reason == "damaged":
        flip(world.machine.folder / "p1", 100)
    elif reason == "empty":
        world.machine.clear("slot")
        world.machine._set(1, slots.EMPTY, world.machine.table_.partitions[0].id)
    else:
        world.machine.signer = ""
    with pytest.raises(Refused):
        world.work.rollback(Job(), ALICE, lambda phase: None)
    assert names(world) == before and world.env.store.state.failed == ()


def test_damaged_state_is_put_aside(world: World) -> None:
    check(world)
    (world.env.folder / "state.json").write_bytes(b'{"failed": 7')
    world.restarted()
    assert "put aside" in world.env.store.damaged
    check(world)


def test_history_is_bounded(world: World) -> None:
    for _ in range(3):
        check(world)
    history = world.env.store.history()
    assert [event.type for event in history] == ["update.check"] * 3
    line = (world.env.folder / "history.jsonl").read_bytes().splitlines()[0] + b"\n"
    (world.env.folder / "history.jsonl").write_bytes(line * 600 + b"nonsense\n")
    check(world)
    assert len(world.env.store.history()) == 500


def test_boot_entries_of_strange_names_are_left_alone(world: World) -> None:
    for name in ("holdfast_1.0.efi", "holdfast_1.1.0+x.efi", "debian.efi", "holdfast_01.0.0.efi", "holdfast_1.2.0.efi"):
        (world.machine.linux / name).write_bytes(b"MZ")
    found = esp.entries(world.machine.linux)
    assert [(entry.version, entry.uki is None) for entry in found] == [("1.2.0", True), ("1.0.0", False)]


def test_errors_of_the_disk_are_errors_for_people(world: World) -> None:
    (world.env.folder / "metadata").write_bytes(b"")
    with pytest.raises(UserError, match="metadata"):
        check(world)
    assert world.trail() == [("update.check", "intent", "pending"), ("update.check", "outcome", "failure")]
