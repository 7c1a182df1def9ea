"""A record as a syslog message (RFC 5424), and messages as a stream (RFC 5425)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vmm.audit.records import canonical, digest
from vmm.errors import printable

SD_ID = "holdfast@32473"
"""Of our structured data. The number is the one reserved for documentation (RFC 5612): we have none of our own."""
_LOG_AUDIT = 13
_WARNING, _INFORMATIONAL = 4, 6
_NIL = "-"
_BOM = b"\xef\xbb\xbf"
_UNPRINTED = re.compile(r"[^!-~]")


def message(record: Mapping[str, Any], hostname: str) -> bytes:
    """One record of the trail as a message of ``hostname``.

    What comes from strangers stands in the message's text alone, which is the record's canonical JSON, without its
    newline: with that, its SHA-384 is ``hash``, by which the next record names it.
    """
    line = canonical(record)
    priority = _LOG_AUDIT * 8 + (_WARNING if record["outcome"] == "failure" else _INFORMATIONAL)
    unit = record.get("producer", {}).get("unit", "")
    header = (
        f"<{priority}>1",
        _field(str(record["time"]), 32),
        _field(hostname, 255),
        _field(unit, 48),
        _NIL,
        _field(str(record["type"]), 32),
    )
    parameters = {name: str(record[name]) for name in ("seq", "boot", "type", "outcome")} | {"hash": digest(line)}
    element = " ".join((SD_ID, *(f'{name}="{_value(value)}"' for name, value in parameters.items())))
    return f"{' '.join(header)} [{element}] ".encode() + _BOM + line[:-1]


def framed(text: bytes) -> bytes:
    """A message as it goes into the stream: behind its length in bytes."""
    return b"%d %b" % (len(text), text)


def _field(text: str, most: int) -> str:
    """A field of the header: printing ASCII without blanks, so long at most; "-" if nothing is left."""
    return _UNPRINTED.sub("?", text)[:most] or _NIL


def _value(text: str) -> str:
    """A parameter's value: what does not print is escaped as in JSON, and what would end the value by a backslash."""
    return re.sub(r'(["\\\]])', r"\\\1", printable(text).replace("\n", "\\u000a"))
