"""A record for people: as one line, or with all its fields."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from vmm.audit.events import EVENTS
from vmm.errors import printable

_NONE = "-"
"""Shown in place of what an older or newer host does not say."""
_SYNCHRONISED = "synchronised"
_WIDEST = 60
_WIDEST_NAME = 24
_REQUEST = 8
_MARKS = {("intent", "pending"): "begin", ("outcome", "success"): "done", ("event", "success"): "note"}


def line(record: Mapping[str, Any]) -> str:
    """What a record says: number, time, who, how it stands, what, why, its own fields, and the start of its request.

    The mark is ``begin``, ``done``, ``FAILED`` or, for what merely happened, ``note``. A ``~`` behind the time says
    that no time server set the clock lately. Values of fields are cut; JSON has them whole. Records of types that this
    version does not know are shown by their type. Whatever a record says, it stays one line that prints.
    """
    actor, thing = _map(record, "actor"), _map(record, "object")
    known = EVENTS.get(str(record.get("type", "")))
    mark = _MARKS.get((str(record.get("phase")), str(record.get("outcome"))), "FAILED")
    name = str(thing.get("name") or thing.get("id") or "")
    what = f"{known.title if known else record.get('type', _NONE)} {_value(name)}".rstrip()
    if reason := str(record.get("reason", "")):
        what = f"{what}: {reason}"
    # Version 1 did not say.
    quality = _map(record, "clock").get("quality", _SYNCHRONISED)
    fields = [f"{key}={_value(value)}" for key, value in _map(record, "extra").items() if value not in ("", [], {})]
    parts = [
        str(record.get("seq", _NONE)),
        str(record.get("time", _NONE)) + ("" if quality == _SYNCHRONISED else "~"),
        f"{actor.get('id', _NONE)}@{actor.get('origin', _NONE)}",
        mark,
        what,
        f"[{' '.join(fields)}]" if fields else "",
        f"#{str(record['request'])[:_REQUEST]}" if record.get("request") else "",
    ]
    return _one_line(" ".join(filter(None, parts)))


def whole(record: Mapping[str, Any]) -> str:
    """Every field of a record, those of any version too: what line() says, and a line for each field.

    The parts of a field stand behind dots; nothing is cut.
    """
    fields = list(_fields(record))
    width = min(max((len(name) for name, _ in fields), default=0), _WIDEST_NAME)
    return "\n".join([line(record), *(f"    {name:<{width}}  {value}".rstrip() for name, value in fields)])


def _fields(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        name = f"{path}{key}"
        if isinstance(item, Mapping) and item:
            yield from _fields(item, f"{name}.")
        else:
            text = item if isinstance(item, str) else msgspec.json.encode(item).decode()
            yield _one_line(name), _one_line(text)


def _one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


def _map(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, Mapping) else {}


def _value(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable() and " " not in value
    text = value if plain else msgspec.json.encode(value).decode()
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 1]}…"
