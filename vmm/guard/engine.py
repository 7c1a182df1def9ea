"""Applies rules to records, one after another: a function of the trail and the rules, and of nothing else."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import msgspec

from vmm.audit.records import Actor, Object
from vmm.errors import UserError
from vmm.guard.rules import Rule
from vmm.origin import source

GUARD = Actor(id="holdfast-guard", role="guard")
"""Who acts when the guard does. What it caused itself is never counted."""

_MOST_KEYS = 1024
"""Of one rule; of more, those that were heard of last are known."""


class Seen(msgspec.Struct, frozen=True):
    """What the guard looks at of a record."""

    seq: int
    time: str
    type: str
    outcome: str
    reason: str = ""
    actor: Actor = Actor()
    object: Object = Object()
    extra: dict[str, Any] = {}

    @property
    def at(self) -> float:
        """When it was written, in seconds since 1970."""
        return datetime.fromisoformat(self.time).timestamp()


class Violation(msgspec.Struct, frozen=True):
    """A rule's count was reached for a key, from record ``first`` to ``last``; ``object`` is the key, if a machine."""

    rule: Rule
    key: str
    object: Object
    count: int
    first: int
    last: int


class Engine:
    """The rules that are enabled, and what was counted of late."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules: list[Rule] = []
        self._counts: dict[str, OrderedDict[str, deque[tuple[int, float]]]] = {}
        self.set_rules(rules)

    def set_rules(self, rules: Iterable[Rule]) -> None:
        """Go by other rules from here on. What was counted for one that changes does not count any more."""
        wanted = [rule for rule in rules if rule.enabled]
        kept = {rule.name for rule in wanted if rule in self._rules}
        self._rules = wanted
        self._counts = {rule.name: self._counts[rule.name] if rule.name in kept else OrderedDict() for rule in wanted}

    def take(self, record: Seen) -> list[Violation]:
        """Count a record; what that points out. A violation begins the count anew."""
        if record.actor.role == GUARD.role or record.type.startswith("guard."):
            return []
        found = []
        for rule in self._rules:
            if _matches(rule, record) and (key := _key(rule, record)):
                found += self._count(rule, key, record)
        return found

    def oldest(self, now: float) -> int | None:
        """The number of the oldest record that may still count at a time (seconds since 1970); None without one."""
        oldest: int | None = None
        for rule in self._rules:
            counts = self._counts[rule.name]
            for key in [key for key, times in counts.items() if now - times[-1][1] > rule.window_s]:
                del counts[key]
            for times in counts.values():
                oldest = times[0][0] if oldest is None else min(oldest, times[0][0])
        return oldest

    def _count(self, rule: Rule, key: str, record: Seen) -> list[Violation]:
        counts, now = self._counts[rule.name], record.at
        times = counts.setdefault(key, deque())
        counts.move_to_end(key)
        # Of a clock that was set back, what is later than now was just before.
        while times and now - times[0][1] > rule.window_s:
            times.popleft()
        times.append((record.seq, now))
        if len(times) < rule.count:
            if len(counts) > _MOST_KEYS:
                counts.popitem(last=False)
            return []
        del counts[key]
        thing = record.object if rule.key == "machine" else Object()
        return [Violation(rule, key, thing, len(times), times[0][0], record.seq)]


def seen(record: Any) -> Seen:
    """A record as the audit daemon hands it out. Raises: UserError."""
    try:
        return msgspec.convert(record, Seen)
    except msgspec.ValidationError as error:
        raise UserError(f"not a record: {error}") from None


def _matches(rule: Rule, record: Seen) -> bool:
    return any(
        match.type in ("", record.type)
        and match.outcome in ("", record.outcome)
        and record.reason.startswith(match.reason)
        for match in rule.matches
    )


def _key(rule: Rule, record: Seen) -> str:
    """Who of a record is counted; "" when nobody is."""
    match rule.key:
        case "machine":
            return record.object.id if record.object.kind == "machine" else ""
        case "source":
            return source(record.actor.origin)
        case "certificate":
            certificate = record.actor.certificate
            return "" if isinstance(certificate, msgspec.UnsetType) else certificate
    return "host"
