"""A new key for releases on its way into the firmware: pending, sealed, done, and cut off at every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_update_keys_rig import certificate, payload, signature_list
from tests.unit.test_update_machine import (
    ALICE,
    Killed,
    Power,
    World,
    apply,
    boot,
    digest,
    download,
    install,
    make_world,
)
from tests.unit.test_update_seals import shortcut
from vmm import paths
from vmm.errors import Unavailable
from vmm.update import gate, rotation
from vmm.update.errors import Refused
from vmm.update.job import Job
from vmm.update.types import Release

NEW = certificate("db-next")
LIST = signature_list(NEW)
PAYLOAD = payload(LIST)


@pytest.fixture
def announced(world: World) -> World:
    """A host that is offered 1.2.0, which announces a key."""
    world.work.settle()
    world.repository.add("1.2.0", change=announcing)
    world.offer()
    return world


def announcing(release: Release) -> Release:
    return msgspec.structs.replace(release, db_append=PAYLOAD)


def start(world: World, version: str) -> None:
    """Restart: the initrd seals what was left for it, and the system runs."""
    boot(world, version)
    world.machine.initrd(world.env.ahead)


def said(world: World) -> list[tuple[str, str, str]]:
    return [(e.phase, e.outcome, e.reason) for e in world.records if e.type == "update.keys"]


def stage(world: World) -> str:
    keys = world.env.store.state.keys
    return keys.stage if keys else ""


def grown(world: World) -> bool:
    return world.machine.db_.endswith(LIST)


def test_the_whole_way(announced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world, after = announced, announced.machine.db_ + LIST
    install(world)
    keys = world.env.store.state.keys
    assert keys is not None and (keys.version, keys.subject, keys.addition) == ("1.2.0", "CN=db-next", PAYLOAD)
    now, following = digest(after).hex(), digest(after + b"next").hex()
    assert world.env.ahead.read_text() == f"HOLDFAST_PCR7_NOW={now}\nHOLDFAST_PCR7_NEXT={following}\n"
    assert world.env.ahead.stat().st_mode & 0o777 == 0o600
    assert world.records[-1].extra["key"] == "CN=db-next"
    assert rotation.status(keys) == "CN=db-next (1.2.0): pending"
    world.work.settle()
    assert not grown(world), "not before it was sealed"
    start(world, "1.2.0")
    assert world.work.settle().kind == "trial" and not grown(world), "not before it is kept"
    assert world.work.bless().kind == "blessed"
    assert world.machine.db_ == after and stage(world) == "done" and not world.env.ahead.exists()
    assert said(world) == [("intent", "pending", ""), ("outcome", "success", "")]
    assert world.records[-1].extra["certificate"] == "CN=db-next" and world.records[-1].object.id == "1.2.0"
    assert world.env.store.history()[-1].type == "update.keys"
    assert shortcut(world, monkeypatch)
    world.work.settle()
    assert len(said(world)) == 2


def test_a_release_for_hosts_that_have_the_key(announced: World) -> None:
    """Of a new installation that enrolled both: only the seals are missing, and once they are there, nothing is."""
    world = announced
    world.machine.db_ += LIST
    install(world)
    keys = world.env.store.state.keys
    assert keys is not None and keys.addition == b""
    start(world, "1.2.0")
    world.work.bless()
    assert stage(world) == "done" and said(world) == [("event", "success", "")]
    world.repository.add("1.3.0", change=announcing)
    world.offer()
    install(world)
    assert stage(world) == "done" and not world.env.ahead.exists()


def test_room_is_made_of_what_the_change_before_left(announced: World) -> None:
    """What volumes were sealed to before that can hold no more."""
    world = announced
    install(world)
    start(world, "1.2.0")
    world.work.bless()
    first = world.machine.rooms[0]
    assert first[1] == () and len(world.machine.rooms) == 1
    world.machine.other_signer = certificate("theirs")
    world.repository.add("1.3.0")
    world.offer()
    download(world)
    with pytest.raises(Refused, match="would not open"):
        apply(world)
    assert world.machine.rooms[1] == ((digest(certificate("theirs")),) * 2, first[0])


def test_a_signer_that_the_volumes_do_not_know(world: World) -> None:
    """Nothing is written; the next start seals, and then the release is taken."""
    world.work.settle()
    world.machine.other_signer = NEW
    download(world)
    with pytest.raises(Refused, match=r"Secure Boot keys: the volumes \(data, audit\) would not open .* CN=db-next"):
        apply(world)
    assert world.env.store.state.installed is None and world.env.ahead.exists() and stage(world) == "pending"
    world.work.settle()
    assert said(world) == [], "not in the same start"
    start(world, "1.0.0")
    world.work.settle()
    assert stage(world) == "done" and said(world) == [("event", "success", "")]
    apply(world)
    assert world.env.store.state.installed is not None


def test_one_change_at_a_time(announced: World) -> None:
    world = announced
    install(world)
    boot(world, "1.2.0")
    world.work.bless()
    world.machine.other_signer = certificate("theirs")
    world.repository.add("1.3.0")
    world.offer()
    download(world)
    with pytest.raises(Refused, match=r"the change that 1\.2\.0 began has to end first"):
        apply(world)
    keys = world.env.store.state.keys
    assert keys is not None and keys.version == "1.2.0"


def test_a_host_that_cannot_foresee_refuses_before_anything_is_written(
    announced: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foresee(*_: object) -> Any:
        raise Refused("PCR 7", "this firmware's log does not explain what PCR 7 holds")

    monkeypatch.setattr(announced.machine, "foresee", foresee)
    steps: list[str] = []
    announced.machine.steps = steps.append
    with pytest.raises(Refused, match="does not explain"):
        install(announced)
    assert steps == ["signer"] and announced.env.store.state.keys is None
    assert announced.records[-1].extra["layer"] == "PCR 7"


def test_what_the_initrd_did_not_seal_is_waited_for(announced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = announced
    install(world)
    boot(world, "1.2.0")
    assert world.work.bless().kind == "blessed", "the release is none the worse for it"
    reason = "Secure Boot keys: the volumes (data, audit) are not sealed for CN=db-next yet"
    assert said(world) == [("event", "failure", reason)] and not grown(world)
    assert rotation.status(world.env.store.state.keys).endswith(reason)
    boot(world, "1.2.0")
    assert not shortcut(world, monkeypatch)
    world.work.settle()
    assert len(said(world)) == 1, "once is enough"
    start(world, "1.2.0")
    world.work.settle()
    assert grown(world) and stage(world) == "done"


def test_a_firmware_in_another_state_is_left_alone(announced: World) -> None:
    world = announced
    install(world)
    start(world, "1.2.0")
    world.machine.db_ += b"somebody else's"
    world.work.bless()
    assert not grown(world) and stage(world) == "pending"
    assert "no longer what the volumes were sealed to" in said(world)[0][2]


def test_a_firmware_that_refuses(announced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world = announced

    def refuse(_: object) -> None:
        raise OSError(28, "No space left on device", "db")

    install(world)
    start(world, "1.2.0")
    with monkeypatch.context() as patch:
        patch.setattr(world.machine, "extend_db", refuse)
        world.work.bless()
    reason = "the firmware refused it: db: No space left on device"
    assert said(world)[-1] == ("outcome", "failure", reason) and stage(world) == "pending"
    start(world, "1.2.0")
    world.work.settle()
    assert grown(world) and stage(world) == "done"


def test_a_firmware_that_ignores_it(announced: World) -> None:
    announced.machine.firmware_appends = lambda content: b""
    install(announced)
    start(announced, "1.2.0")
    announced.work.bless()
    assert said(announced)[-1] == ("outcome", "failure", "the firmware changed nothing")
    assert stage(announced) == "pending"


def test_a_firmware_that_does_as_it_likes(announced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loud: on record, in the status, on the console, until a start shows that the volumes do open."""
    world = announced
    world.machine.firmware_appends = lambda content: content[:-1]
    install(world)
    start(world, "1.2.0")
    world.work.bless()
    assert said(world)[-1] == ("outcome", "failure", rotation.UNFORESEEN) and stage(world) == "failed"
    assert rotation.status(world.env.store.state.keys) == f"CN=db-next (1.2.0): failed: {rotation.UNFORESEEN}"
    assert not shortcut(world, monkeypatch)
    notice = world.folder / "notice.json"
    monkeypatch.setattr(paths, "UPDATE_NOTICE", notice)
    gate.leave_notice()
    assert msgspec.json.decode(notice.read_bytes())["reason"] == rotation.UNFORESEEN
    boot(world, "1.2.0")
    world.work.settle()
    assert stage(world) == "" and shortcut(world, monkeypatch)
    gate.leave_notice()
    assert not notice.exists()


@pytest.mark.parametrize("way", ["failed", "rolled back"])
def test_a_release_that_is_not_kept_changes_no_key(announced: World, way: str) -> None:
    world = announced
    install(world)
    if way == "rolled back":
        world.work.rollback(Job(), ALICE, lambda phase: None)
    else:
        start(world, "1.2.0")
        boot(world, "1.0.0")
        assert world.work.settle().kind == "failed"
    assert stage(world) == "" and not world.env.ahead.exists()
    start(world, "1.0.0")
    world.work.settle()
    assert not grown(world) and said(world) == []


def test_the_way_back_is_no_matter(announced: World) -> None:
    """The older release, started again after the change, has nothing to do."""
    install(announced)
    start(announced, "1.2.0")
    announced.work.bless()
    boot(announced, "1.0.0")
    announced.work.settle()
    assert grown(announced) and stage(announced) == "done" and len(said(announced)) == 2


def test_without_audit_the_firmware_is_not_touched(announced: World) -> None:
    world = announced
    install(world)
    start(world, "1.2.0")
    real = world.append

    def append(entry: Any) -> int:
        if entry.type == "update.keys":
            raise Unavailable("audit is away")
        return real(entry)

    world.env.recorder._append = append
    assert world.work.bless().kind == "blessed"
    assert not grown(world)
    boot(world, "1.2.0")
    world.work.settle()
    assert grown(world) and stage(world) == "done"


def test_a_power_cut_at_every_step(announced: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it comes, db has only grown after both seals were there, and the next starts end what was begun."""
    world = announced
    install(world)
    start(world, "1.2.0")
    for after in range(60):
        with monkeypatch.context() as patch:
            power = Power(after, patch, ("fsync", "replace", "rename", "unlink"))
            world.machine.steps = power.step
            try:
                world.work.bless()
            except Killed:
                pass
            else:
                break
        assert not grown(world) or len(world.machine.sealed) == 2
        boot(world, "1.2.0")
    world.machine.steps = lambda step: None
    assert after > 8
    boot(world, "1.2.0")
    world.work.settle()
    assert world.machine.db_.count(LIST) == 1 and stage(world) == "done" and not world.env.ahead.exists()
    assert said(world)[-1][1] == "success"


def test_a_power_cut_while_it_is_applied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values may be left that nobody waits for, but not the other way round; what starts then is as good as ever."""
    started = set()
    for after in range(80):
        world = make_world(tmp_path / str(after))
        world.work.settle()
        world.repository.add("1.2.0", change=announcing)
        world.offer()
        download(world)
        with monkeypatch.context() as patch:
            power = Power(after, patch, ("fsync", "replace", "unlink"))
            world.machine.steps = power.step
            try:
                apply(world)
            except Killed:
                pass
            else:
                break
        world.machine.steps = lambda step: None
        world.restarted()
        assert stage(world) == "" or world.env.ahead.exists()
        there = any(entry.version == "1.2.0" for entry in world.machine.entries())
        start(world, "1.2.0" if there else "1.0.0")
        world.work.bless()
        assert (grown(world), stage(world)) == ((True, "done") if there else (False, ""))
        assert not world.env.ahead.exists()
        started.add(there)
    assert after > 8 and started == {True, False}
