"""Methods by which the guard acts, and by which administrators set its rules and undo what it did."""

from __future__ import annotations

import sqlite3
from functools import partial
from typing import Any

import msgspec

from vmm.core import arguments
from vmm.core.db import Database
from vmm.core.dispatch import Call, Method
from vmm.core.locks import Locking, Locks, Unlocking
from vmm.errors import UserError
from vmm.guard import rules
from vmm.guard.rules import Action, Count, Rule, RuleName, Seconds, Settings
from vmm.machines.holds import Holding, Holds


class Setting(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is to be changed of a rule; what is not named stays. With ``reset`` the rest is as shipped again."""

    name: RuleName
    enabled: bool | None = None
    count: Count | None = None
    window_s: Seconds | None = None
    action: Action | None = None
    lock_s: Seconds | None = None
    reset: bool = False


class RuleNamed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The name of a rule."""

    name: RuleName


class GuardHandlers:
    """One method a row of the table; see vmm.core.methods."""

    def __init__(self, database: Database, holds: Holds, locks: Locks) -> None:
        self._database = database
        self._holds = holds
        self._locks = locks
        self._shipped = rules.shipped()

    def table(self) -> dict[str, Method]:
        """Name → method. A name that permissions.json does not have can be called by nobody."""
        return {
            "machine.hold": Method(Holding, self._hold, "change", "machine"),
            "machine.release": Method(arguments.Named, self._release, "change", "machine"),
            "guard.rules": Method(arguments.Nothing, self._rules, "read", ""),
            "guard.set": Method(Setting, self._set, "change", "rule"),
            "guard.test": Method(RuleNamed, self._test, "change", "rule"),
            "access.locks": Method(arguments.Nothing, self._list_locks, "read", ""),
            "access.lock": Method(Locking, self._lock, "change", ""),
            "access.unlock": Method(Unlocking, self._unlock, "change", ""),
        }

    async def _hold(self, args: Holding, call: Call) -> Any:
        return await self._holds.hold(args, call.actor.id)

    async def _release(self, args: arguments.Named, _call: Call) -> Any:
        return await self._holds.release(args.name)

    async def _rules(self, _args: arguments.Nothing, _call: Call) -> Any:
        return {"rules": await self._effective()}

    async def _set(self, args: Setting, _call: Call) -> Any:
        rule = rules.find(self._shipped, args.name)
        before = (await self._database.run(_settings)).get(args.name, Settings())
        named = {name: getattr(args, name) for name in Settings.__struct_fields__ if getattr(args, name) is not None}
        if not named and not args.reset:
            raise UserError("nothing is to be changed", hint="Name at least one field.")
        settings = msgspec.structs.replace(Settings() if args.reset else before, **named)
        changed = rules.adapted(rule, settings)
        await self._database.run(partial(_store, name=args.name, settings=settings))
        return changed

    async def _test(self, args: RuleNamed, _call: Call) -> Any:
        # The guard sees the record of this call.
        return rules.find(self._shipped, args.name)

    async def _effective(self) -> list[Rule]:
        changed = await self._database.run(_settings)
        found = []
        for rule in self._shipped.values():
            try:
                found.append(rules.adapted(rule, changed.get(rule.name, Settings())))
            except UserError:
                # Another release knew another action for it.
                found.append(rule)
        return found

    async def _list_locks(self, _args: arguments.Nothing, _call: Call) -> Any:
        return {"locks": await self._locks.list_all()}

    async def _lock(self, args: Locking, call: Call) -> Any:
        lock = await self._locks.lock(args, call.actor.id)
        call.outcome = {"origin": lock.value, "until": lock.until}
        return lock

    async def _unlock(self, args: Unlocking, _call: Call) -> Any:
        await self._locks.unlock(args)
        return {}


class _Stored(Settings, frozen=True, forbid_unknown_fields=False):
    """Settings that a newer release, from which the host fell back, may have written."""


def _settings(connection: sqlite3.Connection) -> dict[str, Settings]:
    found = connection.execute("SELECT name, settings FROM guard_rules").fetchall()
    return {name: msgspec.json.decode(text, type=_Stored) for name, text in found}


def _store(connection: sqlite3.Connection, name: str, settings: Settings) -> None:
    text = msgspec.json.encode(settings).decode()
    connection.execute("INSERT OR REPLACE INTO guard_rules VALUES (?, ?)", (name, text))
