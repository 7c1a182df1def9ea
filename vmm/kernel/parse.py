"""The text of the kernel's audit records. All of it may be hostile: names of processes and files are whatever somebody
called them. Nothing here raises; what does not fit is left out, what is too long is cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

MOST_TEXT = 256
"""Characters of a value."""
_MOST_BYTES = 9000
_MOST_FIELDS = 64

_HEAD = re.compile(rb"audit\((\d{1,12})\.(\d{3}):(\d{1,20})\): ?")
_FIELD = re.compile(r"""([A-Za-z][A-Za-z0-9_-]{0,31})=("[^"]*"|[^\s"]*)""")
_MESSAGE = re.compile(r"\bmsg='(.*)'\s*\Z", re.DOTALL)
_HEX = re.compile(r"(?:[0-9A-Fa-f]{2})+")

Fields = Mapping[str, str]


class Line(NamedTuple):
    """One record: when (milliseconds, UTC), which event it is a part of, what it says.

    Values are as they came: hex digits may be what they say or stand for a text, see text(). ``said`` is what a
    program put into a message of its own; the kernel vouches for ``fields`` only.
    """

    time: int
    serial: int
    fields: Fields
    said: Fields


def parse(raw: bytes) -> Line | None:
    """Read a record; None when it is none."""
    raw = raw[:_MOST_BYTES].rstrip(b"\0\n ")
    head = _HEAD.match(raw)
    if head is None:
        return None
    body = raw[head.end() :].decode("utf-8", "backslashreplace")
    said: Fields = {}
    if message := _MESSAGE.search(body):
        said = _fields(message[1])
        body = body[: message.start()]
    serial = int(head[3])
    if serial >= 1 << 63:
        return None
    return Line(int(head[1]) * 1000 + int(head[2]), serial, _fields(body), said)


def _fields(body: str) -> Fields:
    """The first of each name: what comes behind could be somebody's value that looks like a field."""
    found: dict[str, str] = {}
    for match in _FIELD.finditer(body):
        found.setdefault(match[1], match[2])
        if len(found) == _MOST_FIELDS:
            break
    return found


def text(value: str | None) -> str:
    """A value that a stranger may have chosen: quoted, or in hex where it holds quotes, blanks or controls.

    Returns: printable characters only, "" where there is none.
    """
    if value is None or value in ("(null)", "?"):
        return ""
    if value.startswith('"'):
        return plain(value.strip('"'))
    if _HEX.fullmatch(value):
        return plain(bytes.fromhex(value).decode("utf-8", "backslashreplace"))
    return plain(value)


def plain(value: str) -> str:
    """Any text, made printable and short."""
    cut = value[:MOST_TEXT]
    shown = cut if cut.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in cut)
    return shown[:MOST_TEXT] + ("…" if len(value) > MOST_TEXT else "")


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def number(value: str | None, base: int = 10) -> int | None:
    """A number that the kernel wrote, in decimal or hex; None when it is none, or beyond 64 bits."""
    try:
        found = int(value or "", base)
    except ValueError:
        return None
    return found if -(1 << 63) <= found < 1 << 63 else None
