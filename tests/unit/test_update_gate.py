"""The health gate: what keeps a version on trial, what sends it back, and what is left for the boot after that."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_update_machine import World, apply, boot, download, install, names
from vmm import paths
from vmm.errors import Conflict, Unavailable
from vmm.update import gate
from vmm.update.types import Failed


def fails(times: int, message: str = "not yet") -> Callable[[], None]:
    left = [times]

    def check() -> None:
        if left[0]:
            left[0] -= 1
            raise Unavailable(message)

    return check


def on_trial(world: World) -> str:
    """Start the version that waits; the id of that boot."""
    boot(world, "1.1.0")
    # The gate may ask again in the same boot.
    assert [world.work.settle().kind for _ in range(2)] == ["trial", "trial"]
    return world.env.running.boot


def test_checks_are_waited_for_in_order() -> None:
    seen: list[str] = []
    checks = {"a": fails(2), "b": lambda: seen.append("b"), "c": fails(1)}
    assert gate.first_failure(checks, 60, look=0) == ""
    assert seen == ["b"]


def test_the_first_that_does_not_come_true_in_time_is_named() -> None:
    checks = {"a": fails(0), "guest": fails(1 << 30, "the probe guest was not ready"), "c": fails(0)}
    assert gate.first_failure(checks, 0.02, look=0.01) == "guest: the probe guest was not ready"


def test_a_version_that_passed_is_kept(world: World) -> None:
    install(world)
    boot(world, "1.1.0")
    assert world.work.bless().kind == "blessed"
    assert [entry.path.name for entry in world.machine.entries()] == ["holdfast_1.1.0.efi", "holdfast_1.0.0.efi"]
    assert world.env.floor.read() == 1
    assert world.work.bless().kind == "nothing"


def test_a_version_that_failed_gets_no_further_try_and_its_reason_is_known_afterwards(world: World) -> None:
    install(world)
    tried = on_trial(world)
    world.work.condemn("guest: the probe guest was not ready")
    assert world.machine.entries()[0].bad
    boot(world, "1.0.0")
    verdict = world.work.settle()
    assert (verdict.kind, verdict.version) == ("failed", "1.1.0")
    assert verdict.reason == f"guest: the probe guest was not ready (boot {tried})"
    assert world.env.store.state.failed[0].reason == verdict.reason


def test_what_the_gate_said_is_the_reason(world: World) -> None:
    install(world)
    tried = on_trial(world)
    gate = {"version": "1.1.0", "boot": tried, "reason": "guest: it did not start", "time": "2026-12-01T12:00:00Z"}
    (world.env.folder / "gate.json").write_bytes(msgspec.json.encode(gate))
    boot(world, "1.0.0")
    world.work.settle()
    assert world.env.store.state.failed[0].reason == f"guest: it did not start (boot {tried})"
    assert world.records[-1].extra["boots"] == [tried]
    # It had tries left, and is not given them.
    assert "holdfast_1.1.0+0-0.efi" in names(world)


def test_boots_whose_gate_did_not_decide_are_the_reason(world: World) -> None:
    install(world)
    tried = [on_trial(world), on_trial(world)]
    (world.machine.linux / "holdfast_1.1.0+3-0.efi").rename(world.machine.linux / "holdfast_1.1.0+0-3.efi")
    boot(world, "1.0.0")
    assert world.work.settle().reason == (
        f"its health gate did not decide in 3 tries (known boots: {', '.join(tried)}); 1.0.0 was started again"
    )
    assert world.records[-1].extra["boots"] == tried


def test_what_the_gate_said_of_an_earlier_attempt_is_not_the_reason(world: World) -> None:
    install(world)
    on_trial(world)
    world.work.condemn("guest: it did not start")
    boot(world, "1.0.0")
    world.work.settle()
    download(world, "1.1.0", retry=True)
    apply(world)
    before = world.env.running.boot
    (world.machine.linux / "holdfast_1.1.0+3-0.efi").rename(world.machine.linux / "holdfast_1.1.0+0-3.efi")
    boot(world, "1.0.0")
    verdict = world.work.settle()
    assert verdict.reason == f"it did not reach its health gate in 3 tries after boot {before}; 1.0.0 was started again"


def test_a_version_that_was_kept_cannot_be_condemned(world: World) -> None:
    with pytest.raises(Conflict, match="not on trial"):
        world.work.condemn("because")
    assert not world.machine.entries()[0].bad


def test_a_newer_version_that_failed_is_left_for_the_console(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    notice, release = world.folder / "notice.json", world.folder / "etc/os-release"
    release.parent.mkdir(exist_ok=True)
    monkeypatch.setattr("vmm.paths.UPDATE_NOTICE", notice)
    monkeypatch.setattr("vmm.paths.ROOT", world.folder)
    monkeypatch.setattr("vmm.paths.UPDATE_STATE", world.env.folder)
    release.write_text("IMAGE_VERSION=1.0.0\n")
    gate.leave_notice()
    assert not notice.exists()
    world.env.store.fail(Failed("1.1.0", "guest: the probe guest was not ready", ""))
    gate.leave_notice()
    assert msgspec.json.decode(notice.read_bytes(), type=Failed).version == "1.1.0"
    release.write_text('IMAGE_VERSION="1.2.0"\n')
    gate.leave_notice()
    assert not notice.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'{"hostname":"\xff"}'])
def test_a_configuration_that_cannot_be_read_fails_the_gate(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paths, "APPLIED_CONFIG", tmp_path / "config.json")
    with pytest.raises(Unavailable, match="no configuration is applied"):
        gate.check_network()
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(Unavailable, match=r"config\.json cannot be read: "):
        gate.check_network()
