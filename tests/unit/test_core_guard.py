"""Core's side of the guard: machines that are held, who is locked out, rules that are set, and what the guard may."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.unit.test_core_rig import Rig, fingerprint, running
from tests.unit.test_guests import SPEC, make
from tests.unit.test_scopes import ended
from vmm import wire
from vmm.core.locks import LockedOut, Locking, Locks, Unlocking
from vmm.errors import Conflict, Forbidden, NotFound, UserError
from vmm.guard.engine import GUARD
from vmm.machines.holds import Holding, Holds
from vmm.machines.power import Power

SOURCE = "192.0.2.9"
"""Where the calls of tests come from."""


def holds(rig: Rig) -> Holds:
    return Holds(rig.machines, rig.hypervisor, rig.database)


async def state(rig: Rig, name: str) -> tuple[str, bool]:
    shown = await rig.machines.show(name)
    return shown.state, shown.held is not None


def test_what_is_held_does_not_run_by_any_call(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        power = Power(rig.machines, rig.hypervisor)
        held = await holds(rig).hold(Holding("tried things", id=(await rig.machines.turns.stored("web")).id), "guard")
        assert held.state == "paused" and held.held is not None and held.held.reason == "tried things"
        for call in (power.resume("web"), power.reset("web")):
            with pytest.raises(Conflict, match="'web' is held since .* by guard: tried things|'web' is paused"):
                await call
        # The first reason stays.
        again = await holds(rig).hold(Holding("another", name="web"), "admin-1")
        assert again.held is not None and again.held.reason == "tried things"
        assert (await rig.machines.force_off("web")).held is not None
        with pytest.raises(Conflict, match="is held since"):
            await rig.machines.start("web")
        with pytest.raises(Conflict, match="'web' is held"):
            await rig.machines.delete("web")
        assert (await holds(rig).release("web")).held is None
        with pytest.raises(Conflict, match="'web' is not held"):
            await holds(rig).release("web")
        assert (await rig.machines.start("web")).state == "running"

    asyncio.run(life())


def test_a_released_machine_goes_on_where_it_was(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        await holds(rig).hold(Holding("r", name="web"), "guard")
        assert (await holds(rig).release("web")).state == "paused"
        assert (await Power(rig.machines, rig.hypervisor).resume("web")).state == "running"

    asyncio.run(life())


def test_a_stopped_machine_can_be_held_and_nobody_of_no_name(rig: Rig) -> None:
    async def life() -> None:
        await rig.machines.create(SPEC)
        assert (await holds(rig).hold(Holding("r", name="web"), "guard")).state == "stopped"
        with pytest.raises(NotFound):
            await holds(rig).hold(Holding("r", id=uuid4()), "guard")
        for both in (Holding("r"), Holding("r", name="web", id=uuid4())):
            with pytest.raises(UserError, match="^name: "):
                await holds(rig).hold(both, "guard")

    asyncio.run(life())


def test_a_hold_lasts_over_a_restart_and_is_made_good_after_it(rig: Rig) -> None:
    """Core dies between its note and the pause; or the host restarts: what was to be started again is not."""

    async def life() -> None:
        await make(rig, "web")
        id = (await rig.machines.turns.stored("web")).id
        await holds(rig).hold(Holding("r", name="web"), "guard")
        await rig.hypervisor.resume(id)
        assert await state(rig, "web") == ("running", True)
        rig.machines = rig.new_machines()
        await rig.recover()
        await holds(rig).enforce()
        assert await state(rig, "web") == ("paused", True)
        await rig.machines.stop_all()
        (rig.directory / "root/proc/sys/kernel/random/boot_id").write_text("second\n")
        rig.machines = rig.new_machines()
        await rig.recover()
        assert await rig.machines.to_resume() == []
        await holds(rig).release("web")
        assert await rig.machines.to_resume() == ["web"]

    asyncio.run(life())


def test_libvirt_comes_back_and_what_is_held_is_paused(rig: Rig) -> None:
    async def life() -> None:
        await make(rig, "web")
        one = holds(rig)
        await one.hold(Holding("r", name="web"), "guard")
        await rig.hypervisor.resume((await rig.machines.turns.stored("web")).id)
        rig.hypervisor.reconnect()
        async with asyncio.timeout(5):
            while (await state(rig, "web"))[0] != "paused":
                await asyncio.sleep(0.001)
        await rig.machines.close()

    asyncio.run(life())


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def locking(kind: Any = "source", value: str = SOURCE, seconds: int = 60) -> Locking:
    return Locking(kind, value, seconds, "r")


def test_a_lock_ends_by_itself_and_lasts_over_restarts(rig: Rig) -> None:
    clock = Clock()

    async def life() -> None:
        locks = Locks(rig.database, clock)
        await locks.lock(locking(), "guard")
        locks = Locks(rig.database, clock)
        locks.check(f"{SOURCE}:1", "f")
        await locks.load()
        clock.now += 59.9
        with pytest.raises(LockedOut, match="this source is locked out until 1970-01-12T13:47:40Z"):
            locks.check(f"{SOURCE}:1", "f")
        locks.check("192.0.2.10:1", "f")
        locks.check("local", "f")
        clock.now += 0.2
        locks.check(f"{SOURCE}:1", "f")
        assert await locks.list_all() == []
        with pytest.raises(NotFound, match=f"the source {SOURCE} is not locked out"):
            await locks.unlock(Unlocking("source", SOURCE))

    asyncio.run(life())


def test_a_lock_is_never_made_shorter_and_can_be_ended(rig: Rig) -> None:
    clock = Clock()

    async def life() -> None:
        locks = Locks(rig.database, clock)
        await locks.lock(locking(seconds=600), "guard")
        lock = await locks.lock(locking(seconds=1), "guard")
        assert lock.until == "1970-01-12T13:56:40Z"
        await locks.lock(locking("certificate", "a" * 64), "admin-1")
        assert [one.kind for one in await locks.list_all()] == ["certificate", "source"]
        with pytest.raises(LockedOut, match="certificate"):
            locks.check("192.0.2.10:1", "a" * 64)
        await locks.unlock(Unlocking("source", SOURCE))
        locks.check(f"{SOURCE}:1", "f")

    asyncio.run(life())


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("source", "example.org", "value: not an address"),
        ("source", "192.0.2.0/24", "value: not an address"),
        ("source", "2001:db8::/32", "value: of IPv6, networks of 64 bits"),
        ("certificate", "A" * 64, "value: not the SHA-256"),
    ],
)
def test_only_what_can_be_found_is_locked(rig: Rig, kind: str, value: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^{says}"):
        asyncio.run(Locks(rig.database).lock(locking(kind, value), "a"))


def test_an_address_of_ipv6_locks_its_network(rig: Rig) -> None:
    async def life() -> None:
        locks = Locks(rig.database)
        assert (await locks.lock(locking(value="2001:db8::5"), "a")).value == "2001:db8::/64"
        with pytest.raises(LockedOut):
            locks.check("[2001:db8::77]:99", "f")

    asyncio.run(life())


def test_who_is_locked_out_is_refused_on_record_and_others_are_not(tmp_path: Path) -> None:
    async def life() -> None:
        async with running(tmp_path) as core:
            who = {"kind": "certificate", "value": fingerprint("operator")}
            lock = await core.call("access.lock", **who, seconds=9, reason="r")
            assert lock["by"] == "admin-1"
            with pytest.raises(UserError, match="this certificate is locked out until"):
                await core.call("machine.list", "operator")
            last = core.audit.entries[-1]
            assert (last.type, last.outcome, last.actor.id) == ("machine.list", "failure", "operator-1")
            await core.call("machine.list")
            assert [one["value"] for one in (await core.call("access.locks"))["locks"]] == [fingerprint("operator")]
            await core.call("access.unlock", **who)
            await core.call("machine.list", "operator")
            await core.call("access.lock", kind="source", value=SOURCE, seconds=9, reason="r")
            with pytest.raises(UserError, match="this source is locked out"):
                await core.call("access.unlock", kind="source", value=SOURCE)
            core.now += 9
            await core.call("access.locks")

    asyncio.run(life())


def test_what_is_open_ends_with_the_lock(tmp_path: Path) -> None:
    """By the certificate that opened it, or the address that it was opened from; those of others go on."""

    async def life() -> None:
        async with running(tmp_path) as core:
            await make(core.rig, "web", "db")
            first = await core.open("machine.console", "operator", name="web")
            second = await core.open("machine.console", "admin", name="db")
            for channel in (first, second):
                assert (await channel.receive())[0] is wire.Kind.DATA
            who = {"kind": "certificate", "value": fingerprint("operator")}
            await core.call("access.lock", **who, seconds=9, reason="r")
            assert "this certificate is locked out" in (await ended(first)).message
            assert [console.closed for console in core.rig.hypervisor.consoles] == [True, False]
            await core.locks.lock(locking(), GUARD.id)
            assert "this source is locked out" in (await ended(second)).message

    asyncio.run(life())


def test_rules_are_set_shown_and_reset(tmp_path: Path) -> None:
    async def life() -> None:
        async with running(tmp_path) as core:
            shipped = {rule["name"]: rule for rule in (await core.call("guard.rules", "auditor"))["rules"]}
            rule = shipped["guest-denied"]
            assert rule["enabled"] and (rule["count"], rule["action"]) == (5, "hold")
            changed = await core.call("guard.set", name="guest-denied", enabled=False, count=2)
            assert changed == {**rule, "enabled": False, "count": 2}
            await core.call("guard.set", name="guest-denied", enabled=True)
            changed = next(r for r in (await core.call("guard.rules"))["rules"] if r["name"] == "guest-denied")
            assert changed == {**rule, "count": 2}
            assert await core.call("guard.set", name="guest-denied", reset=True) == rule
            for args, says in (
                ({"name": "guest-denied"}, "nothing is to be changed"),
                ({"name": "none", "count": 1}, "there is no rule 'none'"),
                ({"name": "guest-denied", "action": "lock"}, "^action: "),
                ({"name": "guest-denied", "count": 0}, "^count: "),
                ({"name": "guest-denied", "key": "host"}, "^key: is not a known field"),
            ):
                with pytest.raises(UserError, match=says):
                    await core.call("guard.set", **args)
            await core.call("guard.test", name="guest-denied")
            tested = core.audit.entries[-1]
            assert (tested.object.kind, tested.object.name, tested.outcome) == ("rule", "guest-denied", "success")

    asyncio.run(life())


def test_the_guard_acts_in_its_own_name_and_may_do_little(tmp_path: Path) -> None:
    """Who has its uid can hold and lock, and neither release nor speak for an administrator."""

    async def life() -> None:
        async with running(tmp_path) as core:
            await make(core.rig, "web")
            id = await core.rig.machines.uuid("web")
            core.dispatcher._services = {os.geteuid(): GUARD}

            async def call(method: str, **args: Any) -> Any:
                return await wire.call(core.socket, method, {"args": args})

            held = await call("machine.hold", id=id, reason="r")
            assert held["state"] == "paused" and held["held"]["by"] == GUARD.id
            intent, outcome = core.audit.entries[-2:]
            for entry, phase in ((intent, "intent"), (outcome, "outcome")):
                assert (entry.type, entry.phase, entry.actor) == ("machine.hold", phase, GUARD)
                assert (entry.object.kind, entry.object.id) == ("machine", id)
            await call("access.lock", kind="source", value=SOURCE, seconds=5, reason="r")
            for method in ("machine.release", "machine.resume", "machine.start", "access.unlock", "guard.set"):
                with pytest.raises(Forbidden, match="the role 'guard' may not call"):
                    await call(method, name="web")
            with pytest.raises(UserError, match="^caller: is not a known field"):
                await core.call("machine.release", name="web")
            assert await state(core.rig, "web") == ("paused", True)

    asyncio.run(life())


def test_operators_release_nothing(tmp_path: Path) -> None:
    async def life() -> None:
        async with running(tmp_path) as core:
            await make(core.rig, "web")
            with pytest.raises(Forbidden):
                await core.call("machine.hold", "operator", name="web", reason="r")
            await core.call("machine.hold", name="web", reason="r")
            with pytest.raises(Conflict, match="is held"):
                await core.call("machine.resume", "operator", name="web")
            with pytest.raises(Forbidden):
                await core.call("machine.release", "operator", name="web")
            await core.call("machine.release", name="web")
            await core.call("machine.resume", "operator", name="web")

    asyncio.run(life())


