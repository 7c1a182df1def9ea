"""What an audit record is, and the one form of bytes in which it is stored, hashed and exported.

A stored record is one line of canonical JSON: keys sorted, no spaces, UTF-8, no floats. Each line
names the SHA-384 of the line before it, so an edit anywhere breaks every later link.

Version 2 added ``clock`` and ``actor.certificate``; records of version 1 stay as they are. A release that finds records
of a later version than its own (the host went back to it) follows their links and their base fields.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec

from vmm.errors import UserError

VERSION = 2
GENESIS = "0" * 96
MAX_LINE = 32 << 10
"""Bytes of the longest line; large enough for any record, small enough to bound every buffer."""

START, STOP, RECOVERED, FULL, REFUSED = "audit.start", "audit.stop", "audit.recovered", "audit.full", "audit.refused"
CHECKPOINT = "audit.checkpoint"
REMOVED, FILLING, RULE = "audit.removed", "audit.filling", "audit.rule"
"""Types that the audit daemon itself writes; all there are stand in vmm.audit.events."""

Phase = Literal["intent", "outcome", "event"]
Outcome = Literal["success", "failure", "pending"]
TYPE_PATTERN = r"\A[a-z][a-z0-9-]*(\.[a-z0-9-]+)+\Z"
Type = Annotated[str, msgspec.Meta(pattern=TYPE_PATTERN, max_length=64)]
Fingerprint = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{96}\Z")]
Time = Annotated[str, msgspec.Meta(pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z")]


class Actor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who caused the event: an administrator's name or certificate fingerprint, or ``-``.

    ``certificate`` is the SHA-256 of the certificate that TLS verified, absent where there was none.
    """

    id: str = "-"
    role: str = ""
    origin: str = "local"
    certificate: Fingerprint | msgspec.UnsetType = msgspec.UNSET


class Object(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was acted on; all empty where nothing was."""

    kind: str = ""
    id: str = ""
    name: str = ""


class Producer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The process that handed the record in, as the kernel identified it."""

    uid: int
    unit: str


class Clock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a record's time is worth: who set the clock since the host started, and whether lately (vmm.audit.clock)."""

    source: Literal["ntp", "host"]
    quality: Literal["synchronised", "holding", "unsynchronised"]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a producer says about an event; the audit daemon adds the rest.

    An intent is ``pending`` and names the ``request`` by which its outcome will be found.
    """

    type: Type
    phase: Phase = "event"
    actor: Actor = Actor()
    object: Object = Object()
    outcome: Outcome = "success"
    reason: str = ""
    request: str = ""
    extra: dict[str, Any] = {}


class Record(Entry, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry as stored: numbered, timed, attributed and linked to the one before it."""

    v: Annotated[int, msgspec.Meta(ge=1)] = VERSION
    seq: Annotated[int, msgspec.Meta(ge=1)]
    prev: Digest
    boot: str
    time: Time
    clock: Clock | msgspec.UnsetType = msgspec.UNSET
    producer: Producer


class _Later(msgspec.Struct, frozen=True):
    """What every version of a record has; a later one may have more, and other parts in it."""

    v: int
    seq: Annotated[int, msgspec.Meta(ge=1)]
    prev: Digest
    boot: str
    time: Time
    type: Type
    phase: Phase
    outcome: Outcome
    request: str


_FRAME = 1 << 10
"""Bytes kept free in a line for what the daemon adds to an entry."""

_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(Record)
_later_decoder = msgspec.json.Decoder(_Later)


def canonical(value: Any) -> bytes:
    """The canonical line, newline included, of a record or of the JSON object of one (an export's)."""
    return _encoder.encode(value) + b"\n"


def digest(line: bytes) -> str:
    """The SHA-384 by which the next record names this line (newline included)."""
    return hashlib.sha384(line).hexdigest()


def parse(line: bytes) -> Record:
    """Read a stored line strictly; of a later version's record, what every version has.

    Raises: ValueError saying why the line is not the canonical form of a record.
    """
    if len(line) > MAX_LINE:
        raise ValueError(f"the line is longer than {MAX_LINE} bytes")
    if not line.endswith(b"\n"):
        raise ValueError("the line is incomplete")
    try:
        record = _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if (later := _later(line)) is not None:
            return later
        raise ValueError(f"not a record: {error}") from None
    if problem := _problem_of(record) or _misversioned(record):
        raise ValueError(problem)
    if canonical(record) != line:
        raise ValueError("the line is not in canonical form")
    return record


def _later(line: bytes) -> Record | None:
    """A record of a later version, without what only that version knows; None if the line is something else."""
    try:
        found = _later_decoder.decode(line)
        is_canonical = canonical(msgspec.json.decode(line)) == line
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if found.v <= VERSION or not is_canonical:
        return None
    return Record(**msgspec.structs.asdict(found), producer=Producer(0, ""))


def _misversioned(record: Record) -> str | None:
    timed, certified = record.clock is not msgspec.UNSET, record.actor.certificate is not msgspec.UNSET
    if record.v == 1 and (timed or certified):
        return "version 1 has neither clock nor actor.certificate"
    return None if record.v == 1 or timed else "clock is missing"


def check(entry: Entry) -> None:
    """Refuse an entry that could not be stored or, being an intent, could never be closed.

    Raises: UserError naming the field.
    """
    problem = _problem_of(entry)
    if problem is None and len(canonical(entry)) > MAX_LINE - _FRAME:
        problem = f"longer than {MAX_LINE - _FRAME} bytes"
    if problem:
        raise UserError(f"audit record {entry.type}: {problem}")


def _problem_of(entry: Entry) -> str | None:
    if (entry.phase == "intent") != (entry.outcome == "pending"):
        return f"phase {entry.phase} does not go with outcome {entry.outcome}"
    if entry.phase == "intent" and not entry.request:
        return "an intent needs a request"
    return _not_plain(entry.extra)


def _not_plain(value: Any, path: str = "extra", depth: int = 8) -> str | None:
    """Why a value has no canonical form: floats have many spellings, large integers lose digits in other readers."""
    if depth == 0:
        return f"{path} is nested too deeply"
    if isinstance(value, float):
        return f"{path} is a float"
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return f"{path} is not a 64-bit integer"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return next((p for key, item in items if (p := _not_plain(item, f"{path}.{key}", depth - 1))), None)
