"""The guard's rules: what a rule is, those that are shipped (rules.json), and what administrators change of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from vmm.errors import NotFound, UserError

SHIPPED = Path(__file__).with_name("rules.json")

Key = Literal["machine", "source", "certificate", "host"]
"""Who is counted, and acted on: the record's machine, where its actor calls from, whose certificate that is, or all."""
Action = Literal["alert", "hold", "lock"]
RuleName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z][a-z0-9-]{0,31}\Z")]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]
Seconds = Annotated[int, msgspec.Meta(ge=1, le=86400)]

ACTIONS: Mapping[Key, tuple[Action, ...]] = {
    "machine": ("alert", "hold"),
    "source": ("alert", "lock"),
    "certificate": ("alert", "lock"),
    "host": ("alert",),
}
"""What can be done to whom. Nothing is ever done to anybody but the key."""


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Records that a rule counts: of a type ("" is any), with an outcome, and with a reason that begins so."""

    type: str = ""
    outcome: str = ""
    reason: str = ""


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``count`` records that match, of one key and within ``window_s`` seconds, point out a violation.

    ``lock_s`` is for how many seconds "lock" locks out. ``meaning`` says what it points out, ``why`` why that matters.
    """

    name: RuleName
    meaning: str
    why: str
    matches: tuple[Match, ...]
    key: Key
    count: Count
    window_s: Seconds
    action: Action
    lock_s: Seconds = 300
    enabled: bool = True


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an administrator changed of a rule; None is as shipped."""

    enabled: bool | None = None
    count: Count | None = None
    window_s: Seconds | None = None
    action: Action | None = None
    lock_s: Seconds | None = None


def shipped() -> dict[str, Rule]:
    """The rules of this release, by name. Raises: UserError when they are not as they must be."""
    rules = {rule.name: rule for rule in msgspec.json.decode(SHIPPED.read_bytes(), type=tuple[Rule, ...])}
    for rule in rules.values():
        _check(rule)
    return rules


def adapted(rule: Rule, settings: Settings) -> Rule:
    """A rule as an administrator changed it. Raises: UserError naming the field that does not go with the rule."""
    changes: dict[str, Any] = {k: v for k, v in msgspec.structs.asdict(settings).items() if v is not None}
    changed = msgspec.structs.replace(rule, **changes)
    _check(changed)
    return changed


def find(rules: Mapping[str, Rule], name: str) -> Rule:
    """Raises: NotFound."""
    rule = rules.get(name)
    if rule is None:
        raise NotFound(f"there is no rule {name!r}", hint=f"There are: {', '.join(rules)}.")
    return rule


def _check(rule: Rule) -> None:
    if rule.action not in ACTIONS[rule.key]:
        possible = " or ".join(ACTIONS[rule.key])
        raise UserError(f"action: the rule {rule.name!r} is about a {rule.key}, and can {possible}, not {rule.action}")
