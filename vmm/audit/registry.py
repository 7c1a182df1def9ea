"""What a type of record is, and whether an entry is one that its producer may write.

The types themselves stand in vmm.audit.events. docs/audit-events.md is made from both (python3 -m tests.audit_events).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

import msgspec

from vmm.audit.records import TYPE_PATTERN, Entry, Phase
from vmm.errors import Forbidden, UserError

Unit = Literal[
    "holdfast-api",
    "holdfast-core",
    "holdfast-host",
    "holdfast-audit",
    "holdfast-kernel",
    "holdfast-guard",
    "holdfast-export",
]
"""A producer, as the audit daemon names it by its uid; holdfast-host is all that runs as root."""

Kind = Literal["text", "integer", "boolean", "texts", "map", "maps"]
"""What a field of one's own holds; "texts" and "maps" are lists, and what a map holds is its producer's affair."""

_MOST_NAME = 64


class Field(msgspec.Struct, frozen=True):
    """A field in ``extra``: what it holds, and what that means. Not every record of its type has it."""

    kind: Kind
    meaning: str


class Serves(NamedTuple):
    """An audit event of tests/requirements.yaml: its requirement's id and its text there."""

    sfr: str
    event: str


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """A type of record.

    ``title`` is what its records say to people, in front of the object's name; ``meaning`` is one sentence; ``object``
    is the kind that its object has, "" where it has none.
    """

    type: str
    title: str
    meaning: str
    producers: tuple[Unit, ...]
    phases: tuple[Phase, ...] = ("event",)
    object: str = ""
    fields: Mapping[str, Field] = {}
    serves: tuple[Serves, ...] = ()

    def __post_init__(self) -> None:
        """Raises: ValueError for a type that no record could be of."""
        if not re.match(TYPE_PATTERN, self.type) or not (self.title and self.meaning):
            raise ValueError(f"{self.type!r}: needs a type as in a.b, a title and a meaning")
        if not self.producers or not self.phases or ("intent" in self.phases and "outcome" not in self.phases):
            raise ValueError(f"{self.type}: needs producers and phases, and an intent its outcome")
        if not set(self.producers) <= set(get_args(Unit)) or not set(self.phases) <= set(get_args(Phase)):
            raise ValueError(f"{self.type}: an unknown producer or phase")
        if not {field.kind for field in self.fields.values()} <= _HOLDS.keys():
            raise ValueError(f"{self.type}: an unknown kind of field")


class Registry:
    """All types of records, by name."""

    def __init__(self, events: Iterable[Event]) -> None:
        """Raises: ValueError when a type is there twice."""
        listed = tuple(events)
        self._events = {event.type: event for event in listed}
        if len(self._events) != len(listed):
            raise ValueError("a type of record is registered twice")

    def __iter__(self) -> Iterator[Event]:
        return iter(self._events.values())

    def get(self, type: str) -> Event | None:
        """The type of that name, if there is one."""
        return self._events.get(type)

    def check(self, entry: Entry, unit: Unit) -> None:
        """Whether an entry is what the registry says of its type, and its producer may write it.

        Raises: Forbidden when it may not; UserError naming the field that is not as registered.
        """
        event = self._events.get(entry.type)
        if event is None:
            raise UserError(f"audit record: type: {_short(entry.type)} is not registered")
        if unit not in event.producers:
            raise Forbidden(f"audit record: type: {unit} does not write {entry.type}")
        if problem := _problem(event, entry):
            raise UserError(f"audit record {entry.type}: {problem}")


def _problem(event: Event, entry: Entry) -> str | None:
    if entry.phase not in event.phases:
        return f"phase: {entry.phase} is not one of {', '.join(event.phases)}"
    if entry.object.kind not in ("", event.object):
        return f"object.kind: {_short(entry.object.kind)} is not {event.object or 'empty'}"
    for name, value in entry.extra.items():
        field = event.fields.get(name)
        if field is None:
            return f"extra.{_short(name)}: not a field of this type"
        if not _HOLDS[field.kind](value):
            return f"extra.{name}: not {_WORDS[field.kind]}"
    return None


def _short(text: str) -> str:
    """A name as a caller gave it, for a message."""
    return text if len(text) <= _MOST_NAME else f"{text[:_MOST_NAME]}…"


def _all(type_: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(isinstance(item, type_) for item in value)


_HOLDS: Mapping[Kind, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    # In Python a bool is an int.
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "texts": _all(str),
    "map": lambda value: isinstance(value, Mapping),
    "maps": _all(Mapping),
}
_WORDS: Mapping[Kind, str] = {
    "text": "a text",
    "integer": "an integer",
    "boolean": "true or false",
    "texts": "a list of texts",
    "map": "a map",
    "maps": "a list of maps",
}
