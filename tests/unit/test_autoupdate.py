"""Updates without an administrator: what is done when, and what is never done."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_core_rig import FakeUpdater, configuration
from vmm import wire
from vmm.config.types import Update
from vmm.core.autoupdate import AutoUpdate, Step, is_inside, next_step
from vmm.core.configuration import AppliedConfiguration
from vmm.core.updates import UpdateClient
from vmm.errors import Conflict
from vmm.update.types import Failed, Status

UPDATE = Update("https://updates.example.org", automatic=True, window="01:00-05:00")
IDLE = Status("1.0.0", 1, 1, "tpm", "idle")
NIGHT, DAY = datetime(2026, 12, 1, 2, 0, tzinfo=UTC), datetime(2026, 12, 1, 12, 0, tzinfo=UTC)
HOURS = timedelta(hours=6)


def status(**changes: Any) -> Status:
    return msgspec.structs.replace(IDLE, **changes)


def update(**changes: Any) -> Update:
    return msgspec.structs.replace(UPDATE, **changes)


FOUND = status(available="1.1.0")
STAGED = status(available="1.1.0", staged="1.1.0", phase="staged")
INSTALLED = status(available="1.1.0", installed="1.1.0", phase="installed")
CHECKED: dict[Step, datetime] = {"check": NIGHT, "download": NIGHT - HOURS}
ANYTIME = update(window=None)


@pytest.mark.parametrize(
    ("now", "last", "config", "state", "step"),
    [
        (NIGHT, {}, UPDATE, IDLE, "check"),
        (DAY, {}, UPDATE, IDLE, "check"),
        (NIGHT, {}, update(automatic=False), IDLE, None),
        (NIGHT, {"check": NIGHT - HOURS}, UPDATE, IDLE, "check"),
        (NIGHT, {"check": NIGHT - HOURS + timedelta(seconds=1)}, UPDATE, IDLE, None),
        # The clock was set back: by a little, by a lot.
        (NIGHT, {"check": NIGHT + timedelta(minutes=5)}, UPDATE, IDLE, None),
        (NIGHT, {"check": NIGHT + timedelta(days=900)}, UPDATE, IDLE, "check"),
        # Downloads disturb nobody.
        (NIGHT, CHECKED, UPDATE, FOUND, "download"),
        (DAY, {"check": DAY}, UPDATE, FOUND, "download"),
        (NIGHT, {"check": NIGHT, "download": NIGHT}, UPDATE, FOUND, None),
        (NIGHT, {"check": NIGHT}, UPDATE, status(available="1.0.0"), None),
        (NIGHT, {"check": NIGHT}, UPDATE, status(available="0.9.0"), None),
        (NIGHT, {"check": NIGHT}, UPDATE, status(available="1.1.0", running="unknown"), None),
        (NIGHT, {"check": NIGHT}, UPDATE, status(available="1.1.0", failed=(Failed("1.1.0", "", ""),)), None),
        (NIGHT, {"check": NIGHT}, UPDATE, status(available="1.2.0", failed=(Failed("1.1.0", "", ""),)), "download"),
        (NIGHT, {"check": NIGHT}, UPDATE, status(available="1.2.0", staged="1.1.0", phase="staged"), "download"),
        (NIGHT, {"check": NIGHT}, UPDATE, status(staged="1.1.0", failed=(Failed("1.1.0", "", ""),)), None),
        # Writing waits for the window, if there is one.
        (NIGHT, {"check": NIGHT}, UPDATE, STAGED, "apply"),
        (DAY, {"check": DAY}, UPDATE, STAGED, None),
        (DAY, {"check": DAY}, ANYTIME, STAGED, "apply"),
        (NIGHT, {"check": NIGHT, "apply": NIGHT}, UPDATE, STAGED, None),
        # A restart stops guests: never outside of a window.
        (NIGHT, {"check": NIGHT}, UPDATE, INSTALLED, "reboot"),
        (DAY, {"check": DAY}, UPDATE, INSTALLED, None),
        (NIGHT, {"check": NIGHT}, ANYTIME, INSTALLED, None),
        (NIGHT, {"check": NIGHT, "reboot": NIGHT}, UPDATE, INSTALLED, None),
        # What runs is not disturbed.
        *(
            (NIGHT, {}, UPDATE, status(available="1.1.0", phase=phase), None)
            for phase in ("checking", "downloading", "writing", "verifying", "finishing")
        ),
    ],
)
def test_what_is_next(
    now: datetime, last: dict[Step, datetime], config: Update, state: Status, step: str | None
) -> None:
    assert next_step(now, last, config, HOURS, state) == step


@pytest.mark.parametrize(
    ("window", "inside", "outside"),
    [
        ("01:00-05:00", ("01:00", "04:59"), ("00:59", "05:00", "12:00")),
        ("22:30-04:00", ("22:30", "23:59", "00:00", "03:59"), ("22:29", "04:00")),
        (None, ("00:00", "12:00"), ()),
    ],
)
def test_the_window(window: str | None, inside: tuple[str, ...], outside: tuple[str, ...]) -> None:
    for times, expected in ((inside, True), (outside, False)):
        for text in times:
            now = datetime.fromisoformat(f"2026-12-01T{text}:30+00:00")
            assert is_inside(now, update(window=window)) is expected, text


class Rig:
    """The task with a clock of its own, over a pretended updater."""

    def __init__(self, tmp_path: Path, config: Update | None) -> None:
        self.updater = FakeUpdater()
        self.socket = tmp_path / "update.sock"
        self.now = NIGHT
        self.calls: list[str] = []
        self.refused = False
        self.document = tmp_path / "config.json"
        self.document.write_bytes(msgspec.json.encode(msgspec.structs.replace(configuration(), update=config)))
        self.automatic = AutoUpdate(
            AppliedConfiguration(self.document),
            UpdateClient(self.socket),
            self.perform,
            clock=lambda: self.now,
            chance=lambda: 0.5,
        )

    async def perform(self, method: str) -> None:
        self.calls.append(method)
        if self.refused:
            raise Conflict("not now")
        state = {"update.check": FOUND, "update.download": STAGED, "update.apply": INSTALLED}
        self.updater.status = state.get(method, IDLE)

    async def turns(self, number: int) -> list[str]:
        """What some turns, a minute apart, did."""
        self.calls.clear()
        for _ in range(number):
            await self.automatic.turn()
            self.now += timedelta(minutes=1)
        return list(self.calls)


def test_from_a_look_to_the_restart(tmp_path: Path) -> None:
    async def life() -> None:
        rig = Rig(tmp_path, UPDATE)
        server = await wire.serve(rig.socket, rig.updater.handle)
        assert await rig.turns(5) == ["update.check", "update.download", "update.apply", "host.reboot"]
        # It ends when idle, and nobody wakes it before the next look is due: 6 h and half of a fifth of that.
        asked = len(rig.updater.calls)
        rig.updater.status = IDLE
        await rig.turns(60)
        rig.now = NIGHT + timedelta(hours=6.6) - timedelta(minutes=1)
        assert await rig.turns(1) == []
        assert len(rig.updater.calls) - asked <= 1
        assert await rig.turns(1) == ["update.check"]
        server.close()

    asyncio.run(life())


def test_by_day_it_stops_before_writing(tmp_path: Path) -> None:
    async def life() -> None:
        rig = Rig(tmp_path, UPDATE)
        rig.now = DAY
        server = await wire.serve(rig.socket, rig.updater.handle)
        assert await rig.turns(10) == ["update.check", "update.download"]
        asked = len(rig.updater.calls)
        await rig.turns(10)
        assert len(rig.updater.calls) == asked
        rig.now = NIGHT + timedelta(days=1)
        assert (await rig.turns(3))[:2] == ["update.apply", "host.reboot"]
        server.close()

    asyncio.run(life())


@pytest.mark.parametrize("config", [None, update(automatic=False)])
def test_nothing_is_done_unasked(tmp_path: Path, config: Update | None) -> None:
    async def life() -> None:
        rig = Rig(tmp_path, config)
        server = await wire.serve(rig.socket, rig.updater.handle)
        assert await rig.turns(5) == [] and rig.updater.calls == []
        rig.document.unlink()
        assert await rig.turns(1) == []
        server.close()

    asyncio.run(life())


def test_failures_are_told_once_and_tried_again_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def life() -> None:
        rig = Rig(tmp_path, UPDATE)
        assert await rig.turns(3) == []
        server = await wire.serve(rig.socket, rig.updater.handle)
        rig.refused = True
        assert await rig.turns(60) == ["update.check"]
        rig.now += timedelta(hours=7)
        assert await rig.turns(60) == ["update.check"]
        server.close()

    asyncio.run(life())
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and errors[0].startswith("core: automatic update: the service behind update.sock")
    assert errors[1:] == ["core: automatic update: not now"] * 2
