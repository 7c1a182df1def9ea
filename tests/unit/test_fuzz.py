"""Random walks over every method of core, with arguments that fit, nearly fit, or do not fit at all.

Whatever they are, a call is done or refused, is on record, and is never a fault of ours.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from msgspec import inspect

from tests.unit.test_core_rig import Core, running
from vmm import wire
from vmm.core.dispatch import Method
from vmm.errors import UserError

CALLS = 4000
"""Of one walk."""
WALKERS = 8
"""At once."""
ENDS = {"host.reboot", "host.shutdown", "host.stop-guests"}
"""What ends the host, and with it the walk."""
REACHED = {
    *("machine.create", "machine.start", "machine.force-off", "machine.delete", "machine.change", "machine.hold"),
    *("machine.rename", "machine.pause", "machine.resume", "volume.create", "volume.delete", "access.lock"),
    *("guard.set", "machine.release", "machine.console", "audit.read", "update.check"),
}
"""What some call of every walk must have done, or it proves nothing."""

NAMES = ("web", "db", "v1", "v2")
FITTING: dict[str, tuple[Any, ...]] = {
    "name": NAMES,
    "to": NAMES,
    "volume": NAMES,
    "network": ("lan",),
    "cpus": (1, 2),
    "value": ("192.0.2.1", "2001:db8::1", "0" * 64),
    "machines": ([], ["web"]),
}
"""What a field of that name often holds, so that walks get somewhere."""
ENDED = ("outcome", "success")
RULES = ("guest-denied", "login-failures")
TEXTS = (
    *("", "x", "\x00", "\u2028", "a" * 5000, "running", "192.0.2.1", "::1", "fe80::1%lo", "7d", "lan", "stable"),
    *("2026-11-24T01:02:03Z", "machine.", "machine.start", "0.1.0", "guest-denied", "login-failures"),
    *("0" * 64, str(UUID(int=7)), "-----BEGIN CERTIFICATE-----\n", "../x", *NAMES),
)
NONSENSE: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 63, -(1 << 63), 0.5, 1e308, [], {}, [[]], [None], {"a": {"b": []}}),
    *TEXTS,
)


class Walk:
    """Makes arguments; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - the same calls each time

    def arguments(self, method: Method) -> dict[str, Any]:
        """What a method takes, seldom with a field too many, too few, or of another kind."""
        made = self._value(inspect.type_info(method.args))
        if method.object_kind == "rule":
            made["name"] = self.chance.choice(RULES)
        assert isinstance(made, dict)
        if self.chance.random() < 0.1:
            made[self.chance.choice((*made, "id", "name", "nonsense"))] = self.chance.choice(NONSENSE)
        if made and self.chance.random() < 0.05:
            del made[self.chance.choice(tuple(made))]
        return made

    def _value(self, kind: inspect.Type) -> Any:
        chance = self.chance
        match kind:
            case inspect.StructType():
                wanted = [field for field in kind.fields if field.required or chance.random() < 0.4]
                return {field.encode_name: self._field(field) for field in wanted}
            case inspect.UnionType():
                return self._value(chance.choice(kind.types))
            case inspect.LiteralType():
                return chance.choice(kind.values)
            case inspect.IntType():
                return self._number(kind)
            case inspect.StrType():
                fit = [text for text in TEXTS if kind.pattern is None or re.search(kind.pattern, text)]
                return chance.choice(fit or TEXTS)
            case inspect.VarTupleType() | inspect.ListType():
                return [self._value(kind.item_type) for _ in range(chance.choice((0, 1, 1, 2)))]
            case inspect.BoolType():
                return chance.random() < 0.5
            case inspect.UUIDType():
                return str(UUID(int=chance.randrange(9)))
            case inspect.NoneType():
                return None
        return chance.choice(NONSENSE)

    def _field(self, field: inspect.Field) -> Any:
        if field.encode_name in FITTING and self.chance.random() < 0.8:
            return self.chance.choice(FITTING[field.encode_name])
        return self._value(field.type)

    def _number(self, kind: inspect.IntType) -> int:
        step = kind.multiple_of or 1
        least = -(1 << 63) if kind.ge is None else kind.ge
        most = (1 << 63) - 1 if kind.le is None else kind.le
        near = (least, least + int(step), most, least - 1, most + 1)
        # Small ones are more often possible.
        return int(self.chance.choice(near) if self.chance.random() < 0.2 else least + step * self.chance.randrange(4))


async def call(core: Core, name: str, role: str, args: dict[str, Any], lasts: bool) -> str:
    """Make a call and, if it lasts, end it; "done", or why not."""
    channel = await core.open(name, role, **args)
    try:
        await channel.send(wire.Kind.END)
        while True:
            async with asyncio.timeout(20):
                kind, payload = await channel.receive()
            if kind is wire.Kind.PROBLEM:
                problem = msgspec.json.decode(payload, type=wire.Problem)
                return f"{problem.status}: {problem.detail}"
            if kind is wire.Kind.RESULT or lasts:
                return "done"
    finally:
        await channel.close()


async def step(core: Core, walk: Walk, names: list[str]) -> tuple[str, str]:
    """Make one call; of which method, and how it ended. Whatever it was, it must be no fault of ours."""
    name = walk.chance.choice(names)
    method = core.methods[name]
    role = walk.chance.choice(("admin",) * 6 + ("auditor", "operator", "user"))
    args = walk.arguments(method)
    try:
        said = await call(core, name, role, args, method.lasts)
    except (UserError, wire.ProtocolError, ConnectionError) as error:
        said = repr(error)
    assert "internal" not in said and (not said.startswith("5") or said.startswith("503")), (name, role, args, said)
    # Whom the walk locked out is let in again, or the rest would prove little.
    core.now += 100_000
    return name, said


def walked(core: Core) -> list[str]:
    """The methods to choose from: most of what can go wrong is in the order in which things are done to machines."""
    names = [name for name in core.methods if name not in ENDS]
    return names + [name for name in names if name.startswith("machine.")] * 3 + ["machine.create"] * 8


@pytest.mark.sfr("FMT_MOF_EXT.1", "FAU_GEN.1")
@pytest.mark.parametrize("seed", range(2))
def test_no_arguments_make_core_fail_and_each_call_is_on_record(tmp_path: Path, seed: int) -> None:
    walk = Walk(seed)
    done: Counter[str] = Counter()

    async def steps() -> None:
        async with running(tmp_path) as core:
            for _ in range(CALLS):
                before = len(core.audit.entries)
                name, said = await step(core, walk, walked(core))
                done[name] += said == "done"
                entries = core.audit.entries[before:]
                assert any(entry.type == name for entry in entries), (name, said)
                assert not any("internal error" in entry.reason for entry in entries), (name, entries)

    asyncio.run(steps())
    missed = REACHED - {name for name, count in done.items() if count}
    assert not missed, done


@pytest.mark.sfr("FMT_MOF_EXT.1", "FAU_GEN.1")
def test_many_at_once_leave_nothing_mixed(tmp_path: Path) -> None:
    """Each change that began has ended on record, and what runs is what core knows, as it knows it."""

    async def all_walk() -> None:
        async with running(tmp_path) as core:
            core.rig.hypervisor.delay = 0.001

            async def steps(seed: int) -> None:
                walk = Walk(seed)
                for _ in range(CALLS // WALKERS):
                    await step(core, walk, walked(core))

            await asyncio.gather(*(steps(seed) for seed in range(WALKERS)))
            await core.dispatcher.close(5)
            phases = Counter((entry.type, entry.phase) for entry in core.audit.entries)
            good = Counter(entry.type for entry in core.audit.entries if (entry.phase, entry.outcome) == ENDED)
            for name, method in core.methods.items():
                begun = phases[name, "intent"]
                assert (good[name] <= begun <= phases[name, "outcome"]) if method.kind == "change" else not begun, name
            assert not any("internal error" in entry.reason for entry in core.audit.entries)
            assert await core.rig.machines.unknown() == []
            for machine in await core.rig.machines.list_all():
                assert machine.held is None or machine.state != "running", machine
                for disk in machine.disks:
                    assert (await core.rig.volumes.show(disk.volume)).machine == machine.name, machine

    asyncio.run(all_walk())
