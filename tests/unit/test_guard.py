"""The guard: what its rules count, whom they never hit, and that nothing is passed over or done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmm.audit.client import Entry
from vmm.audit.events import EVENTS
from vmm.audit.records import check
from vmm.audit.search import Query
from vmm.errors import NotFound, Unavailable, UserError
from vmm.guard import rules
from vmm.guard.daemon import Guard
from vmm.guard.engine import GUARD, Engine, Violation, seen
from vmm.guard.rules import Match, Rule, Settings
from vmm.guard.status import Status

A, B = "0a5f7a39-7a1e-4c8e-9f2a-7d8c5b0f1a11", "1b5f7a39-7a1e-4c8e-9f2a-7d8c5b0f1a22"
DENIED = Rule("denied", "m", "w", (Match("kernel.denied"),), "machine", 3, 60, "hold")
LOGINS = Rule("logins", "m", "w", (Match("tls.handshake", "failure", "certificate"),), "source", 2, 60, "lock", 30)


def record(seq: int, type: str = "kernel.denied", *, at: int | None = None, machine: str = "", **more: Any) -> Any:
    """A record as the audit daemon hands it out; ``at`` is in seconds."""
    when = seq if at is None else at
    thing = {"kind": "machine", "id": machine, "name": ""} if machine else {"kind": "", "id": "", "name": ""}
    time = f"2026-11-24T10:{when // 60:02}:{when % 60:02}.000000Z"
    return {"seq": seq, "time": time, "type": type, "outcome": "failure", "object": thing, "v": 2, **more}


def fed(engine: Engine, *given: Any) -> list[Violation]:
    return [violation for one in given for violation in engine.take(seen(one))]


def test_shipped_rules_are_sound() -> None:
    shipped = rules.shipped()
    assert len(shipped) > 5 and all(rule.meaning and rule.why and rule.matches for rule in shipped.values())
    for rule in shipped.values():
        for match in rule.matches:
            assert not match.type or EVENTS.get(match.type) is not None, (rule.name, match)
            # Without a type or an outcome, whatever happens would count.
            assert match.type or match.reason, rule.name
            event = EVENTS.get(match.type)
            # An intent and its outcome are not two events.
            assert event is None or "intent" not in event.phases or match.outcome, (rule.name, match)
            assert event is None or rule.key != "machine" or event.object == "machine", (rule.name, match)


def test_the_count_is_of_one_machine_within_the_window() -> None:
    engine = Engine([DENIED])
    assert fed(engine, record(1, machine=A), record(2, machine=A), record(3, machine=B), record(4)) == []
    (violation,) = fed(engine, record(5, machine=A))
    assert (violation.key, violation.count, violation.first, violation.last) == (A, 3, 1, 5)
    assert violation.object.id == A
    # It begins anew.
    assert fed(engine, record(6, machine=A), record(7, machine=A)) == []
    assert len(fed(engine, record(8, machine=A))) == 1
    # Two of them are old by then; and of a clock that is set back, they are not.
    assert fed(engine, *(record(9 + n, machine=B, at=at) for n, at in enumerate((100, 200, 300)))) == []
    assert len(fed(engine, *(record(20 + n, machine=B, at=at) for n, at in enumerate((400, 390, 380))))) == 1


def test_nobody_is_counted_for_what_another_one_says() -> None:
    """Names, paths and reasons are a guest's to choose; whose record it is the kernel says."""
    engine = Engine([DENIED, LOGINS])
    said: Any = {"reason": f"certificate {B}", "extra": {"path": f"/var/lib/{B}", "profile": f"libvirt-{B}"}}
    found = fed(engine, *(record(n, machine=A, **said) for n in range(1, 10)))
    assert {violation.key for violation in found} == {A}
    one, other = {"id": "x", "role": "", "origin": "192.0.2.1:1"}, {"id": "x", "role": "", "origin": "192.0.2.2:1"}
    bad: Any = {"type": "tls.handshake", "reason": "certificate refused: x", "extra": {"suppressed": 9}}
    assert fed(engine, record(20, actor=one, **bad), record(21, actor=other, **bad)) == []
    assert [violation.key for violation in fed(engine, record(22, actor=one, **bad))] == ["192.0.2.1"]


def test_addresses_of_one_customer_are_one_source() -> None:
    engine = Engine([LOGINS])
    actors = [{"id": "x", "role": "", "origin": f"[2001:db8:0:1::{n}]:77"} for n in (1, 2)]
    said = [record(n, "tls.handshake", reason="certificate refused", actor=a) for n, a in enumerate(actors, 1)]
    assert [violation.key for violation in fed(engine, *said)] == ["2001:db8:0:1::/64"]


def test_what_the_guard_causes_is_not_counted() -> None:
    anything = Rule("any", "m", "w", (Match("", "failure"),), "host", 1, 60, "alert")
    engine = Engine([anything])
    guard = {"id": GUARD.id, "role": GUARD.role, "origin": "local"}
    assert fed(engine, record(1, "machine.hold", actor=guard), record(2, "guard.violation")) == []
    assert len(fed(engine, record(3))) == 1


def test_memory_is_bounded() -> None:
    engine = Engine([DENIED])
    for n in range(1, 5000):
        engine.take(seen(record(n, machine=f"m{n}", at=1)))
    assert len(engine._counts["denied"]) <= 1024
    assert engine.oldest(seen(record(1, at=1)).at) == 5000 - 1024
    assert engine.oldest(seen(record(1, at=100)).at) is None


def test_settings_change_a_rule_and_nothing_that_it_cannot_do() -> None:
    changed = rules.adapted(DENIED, Settings(count=9, action="alert", enabled=False))
    assert (changed.count, changed.action, changed.enabled, changed.window_s) == (9, "alert", False, 60)
    with pytest.raises(UserError, match="^action: .*'denied' is about a machine, and can alert or hold, not lock"):
        rules.adapted(DENIED, Settings(action="lock"))
    with pytest.raises(NotFound, match="there is no rule 'x'"):
        rules.find({"denied": DENIED}, "x")
    assert fed(Engine([changed]), *(record(n, machine=A) for n in range(1, 20))) == []


class FakeTrail:
    """The trail, and what the guard adds; ``gone`` is how often the daemon does not answer."""

    def __init__(self) -> None:
        self.records: list[Any] = []
        self.gone = 0

    def add(self, *records: Any) -> None:
        self.records += records

    async def append(self, entry: Entry) -> int:
        self._answer()
        check(entry)
        EVENTS.check(entry, "holdfast-guard")
        made = msgspec.to_builtins(entry)
        self.records.append(record(len(self.records) + 1) | made)
        return len(self.records)

    async def search(self, query: Query, wait: float = 0.0) -> dict[str, Any]:
        self._answer()
        page = [one for one in self.records if one["seq"] > query.after][: query.limit]
        reached = page[-1]["seq"] if page else query.after
        if not page:
            await asyncio.sleep(min(wait, 0.001))
        return {"records": page, "next": None, "reached": reached}

    async def health(self) -> dict[str, Any]:
        return {"seq": self.records[-1]["seq"] if self.records else 0}

    def of(self, type: str) -> list[Any]:
        return [one for one in self.records if one["type"] == type]

    def _answer(self) -> None:
        if self.gone:
            self.gone -= 1
            raise Unavailable("the audit daemon went away")


class FakeCore:
    """Core: its rules, and what it was asked for; ``answers`` are errors to be had first."""

    def __init__(self, *rules_: Rule) -> None:
        self.rules = rules_
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.errors: list[UserError] = []

    async def __call__(self, method: str, args: dict[str, Any]) -> Any:
        if method == "guard.rules":
            return {"rules": [msgspec.to_builtins(rule) for rule in self.rules]}
        if self.errors:
            raise self.errors.pop(0)
        self.calls.append((method, args))
        return {}


class Rig:
    """A guard over both, and its files."""

    def __init__(self, directory: Path, *rules_: Rule) -> None:
        self.trail = FakeTrail()
        self.core = FakeCore(*rules_)
        self.place, self.status = directory / "place.json", directory / "status.json"

    async def until(self, condition: Callable[[], bool], guard: Guard | None = None) -> None:
        """Run a guard until something is so, and end it in order."""
        guard = guard or Guard(self.trail, self.core, self.place, self.status, retry=0.001)
        stop = asyncio.Event()
        running = asyncio.create_task(guard.run(stop))
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)
                if running.done():
                    break
        stop.set()
        await running

    def said(self) -> Status:
        return msgspec.json.decode(self.status.read_bytes(), type=Status)


def test_a_violation_is_on_record_and_its_machine_held(tmp_path: Path) -> None:
    rig = Rig(tmp_path, DENIED, LOGINS)

    async def run() -> None:
        def work() -> bool:
            if rig.trail.of("guard.start") and not rig.trail.of("kernel.denied"):
                seq = len(rig.trail.records)
                rig.trail.add(*(record(seq + n, machine=A) for n in (1, 2, 3)))
            return bool(rig.core.calls)

        await rig.until(work)

    asyncio.run(run())
    (violation,) = rig.trail.of("guard.violation")
    assert violation["object"]["id"] == A and violation["reason"] == "denied: m"
    assert violation["extra"] == {
        "rule": "denied", "key": A, "count": 3, "window_s": 60, "action": "hold", "first": 2, "last": 4,
    }
    ((method, args),) = rig.core.calls
    assert (method, args["id"]) == ("machine.hold", A) and "records 2 to 4" in args["reason"]
    assert rig.trail.of("guard.start")[0]["extra"]["rules"] == 2 and len(rig.trail.of("guard.stop")) == 1


def test_what_came_while_it_was_away_is_dealt_with_once(tmp_path: Path) -> None:
    """Two before it is killed, one after: counted together. What was dealt with is not dealt with again."""
    rig = Rig(tmp_path, DENIED)
    rig.trail.add(record(1, "audit.start"))

    async def run() -> None:
        def some() -> bool:
            if rig.trail.of("guard.start") and not rig.trail.of("kernel.denied"):
                seq = len(rig.trail.records)
                rig.trail.add(record(seq + 1, machine=A), record(seq + 2, machine=A))
            return rig.place.exists()

        await rig.until(some)
        seq = len(rig.trail.records)
        rig.trail.add(record(seq + 1, machine=A))
        await rig.until(lambda: bool(rig.core.calls))
        assert len(rig.trail.of("guard.violation")) == 1
        starts = len(rig.trail.of("guard.start"))
        await rig.until(lambda: len(rig.trail.of("guard.start")) > starts)
        assert len(rig.trail.of("guard.violation")) == len(rig.core.calls) == 1

    asyncio.run(run())


def test_it_waits_for_audit_and_core_and_says_so(tmp_path: Path) -> None:
    rig = Rig(tmp_path, LOGINS)
    rig.core.errors = [Unavailable("core went away")] * 200
    actor = {"id": "x", "role": "", "origin": "192.0.2.1:1"}
    problems = set()

    async def run() -> None:
        def work() -> bool:
            if rig.trail.of("guard.start") and not rig.trail.of("tls.handshake"):
                rig.trail.gone = 3
                seq = len(rig.trail.records)
                bad: Any = {"reason": "certificate refused", "actor": actor}
                rig.trail.add(*(record(seq + n, "tls.handshake", **bad) for n in (1, 2)))
            if rig.status.exists():
                problems.add(rig.said().problem)
            return bool(rig.core.calls)

        await rig.until(work)

    asyncio.run(run())
    assert "core went away" in problems
    ((method, args),) = rig.core.calls
    assert method == "access.lock"
    assert {**args, "reason": ""} == {"kind": "source", "value": "192.0.2.1", "seconds": 30, "reason": ""}


def test_a_machine_that_is_gone_holds_nothing_up(tmp_path: Path) -> None:
    rig = Rig(tmp_path, msgspec.structs.replace(DENIED, count=1))
    rig.core.errors = [NotFound("the machine was deleted")]

    async def run() -> None:
        def work() -> bool:
            if rig.trail.of("guard.start") and not rig.trail.of("kernel.denied"):
                seq = len(rig.trail.records)
                rig.trail.add(record(seq + 1, machine=A), record(seq + 2, machine=B))
            return bool(rig.core.calls)

        await rig.until(work)

    asyncio.run(run())
    assert [args["id"] for _, args in rig.core.calls] == [B]


def test_rules_count_from_the_record_on_that_sets_them(tmp_path: Path) -> None:
    rig = Rig(tmp_path, DENIED)

    async def run() -> None:
        def work() -> bool:
            if rig.trail.of("guard.start") and not rig.trail.of("kernel.denied"):
                rig.core.rules = (msgspec.structs.replace(DENIED, enabled=False),)
                seq = len(rig.trail.records)
                done: Any = {"outcome": "success"}
                rig.trail.add(record(seq + 1, "guard.set", **done), *(record(seq + n, machine=A) for n in range(2, 9)))
                test: Any = {"outcome": "success", "object": {"kind": "rule", "id": "", "name": "denied"}}
                rig.trail.add(record(seq + 9, "guard.test", **test))
            return bool(rig.trail.of("guard.violation"))

        await rig.until(work)

    asyncio.run(run())
    (violation,) = rig.trail.of("guard.violation")
    assert violation["extra"] == {"rule": "denied", "action": "hold", "test": True}
    assert rig.core.calls == []


@pytest.mark.parametrize("content", [b"{", b"\xff", b'{"seq": 999, "after": 7}'])
def test_a_damaged_or_foreign_place_is_no_obstacle(tmp_path: Path, content: bytes) -> None:
    """One beyond the trail's end is of another trail: all of this one counts."""
    rig = Rig(tmp_path, DENIED)
    rig.place.write_bytes(content)
    rig.trail.add(*(record(n, machine=A) for n in (1, 2, 3)))
    asyncio.run(rig.until(lambda: bool(rig.trail.of("guard.start"))))
    after = rig.trail.of("guard.start")[0]["extra"]["after"]
    assert after == (0 if b"999" in content else 3)
