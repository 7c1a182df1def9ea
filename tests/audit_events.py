"""``python3 -m tests.audit_events``: docs/audit-events.md, made of the registry and joined with the requirements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import msgspec
import msgspec.yaml

from tests import requirements
from tests.requirements import Requirements
from vmm.audit.events import EVENTS
from vmm.audit.records import Actor, Clock, Object, Producer, Record
from vmm.audit.registry import Event, Registry, Serves
from vmm.audit.rows import ARGS
from vmm.errors import UserError, main

PENDING = Path(__file__).with_name("audit_pending.yaml")
PAGE = Path(__file__).parents[1] / "docs/audit-events.md"

MEANINGS = {
    "v": "version of the record's form: 2; records of version 1 have neither `clock` nor `actor.certificate`",
    "seq": "number of the record, gapless from 1 on",
    "prev": "SHA-384 of the line before, newline included; 96 zeros in record 1",
    "boot": "the kernel's id of this start; its `audit.start` names the host and the version that runs",
    "time": "when the audit daemon stored it: UTC, RFC 3339, microseconds",
    "clock.source": "who set the clock since the host started: `ntp`, time servers; `host`, its own hardware alone",
    "clock.quality": "`synchronised`: by time servers within two hours; `holding`: longer ago, or set back since; "
    "`unsynchronised`: never",
    "producer.uid": "uid of the process that handed it in, as the kernel says",
    "producer.unit": "its name by that uid; `holdfast-host` is all that runs as root",
    "type": "what happened: one of the types below",
    "phase": "`intent`, before it is done; `outcome`, after it; `event`, where there is nothing to wait for",
    "outcome": "`pending` for intents, else `success` or `failure`",
    "reason": "why, in words; empty for success",
    "request": "name of the operation: the same in the records of one call, and in the answer's `request_id`",
    "actor.id": "who: an identity's name, a certificate's SHA-256 where it is nobody's, `holdfast` for the host "
    "itself, `uid N` or `libvirtd` for a process, `-` where nobody is known",
    "actor.role": "the role under which it was decided",
    "actor.origin": "address and port of the client, or `local`",
    "actor.certificate": "SHA-256 of the certificate that TLS verified; absent where there was none",
    "object.kind": "what was acted on: `machine`, `volume`, `identity`, `release`, `session`, `configuration`, `host`, "
    "`server`, "
    "or nothing",
    "object.id": "its UUID, or what identifies it",
    "object.name": "its name",
    "extra": "the type's own fields",
}
"""What each field of a record means, by its path."""

NAMES = {
    "time": "time",
    "type": "type",
    "subject": "actor.id",
    "object": "object.id",
    "outcome": "outcome",
    "extra": "extra",
    "seq": "seq",
    "prev": "prev",
    "host": "boot",
    "origin": "actor.origin",
    "role": "actor.role",
    "producer": "producer.unit",
    "request_id": "request",
    "actor": "actor.id",
    "user": "actor.id",
    "claimed_identity": "actor.id",
    "remote_address": "actor.origin",
    "remote_endpoint": "actor.origin",
    "reason": "reason",
    "vm": "object.id",
    "network_component": "extra.args",
}
"""What the requirements call a field → where a record has it, if it is no own field of that name."""

_FORM = """\
A record is one line of JSON: keys sorted, no blanks, UTF-8, no floats. `holdfast audit list --json` prints the lines as
they are stored, `holdfast audit list` one line for people, with the titles in quotes below."""
_TYPES = """\
The audit daemon takes a record only if its type is one of these, from a producer that the type names, with its phases,
object and fields; not every record has every field. Intents of calls to core have the call's arguments as the API takes
them in `args` (map). When audit begins anew, the daemon closes what was left open: outcomes of its own, whose field
`intent` is the number of the record that they close."""


class Pending(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An event that nothing serves yet: why, and the issue that will; 0 where none is written yet."""

    sfr: str
    event: str
    issue: int
    reason: str

    @property
    def key(self) -> Serves:
        """What it is about."""
        return Serves(self.sfr, self.event)


def load_pending(path: Path = PENDING) -> list[Pending]:
    """Read the list. Raises: UserError when it has not the expected form."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=list[Pending])
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {error}") from None


def record_fields() -> set[str]:
    """The paths of all fields that a record may have."""
    parts: Mapping[str, type[msgspec.Struct]] = {"actor": Actor, "object": Object, "producer": Producer, "clock": Clock}
    return {
        f"{name}.{inner}" if inner else name
        for name in Record.__struct_fields__
        for inner in (parts[name].__struct_fields__ if name in parts else ("",))
    }


def problems(required: Requirements, registry: Registry, pending: list[Pending]) -> Iterator[str]:
    """Where registry, requirements and the list of pending events do not fit together, one line each."""
    wanted, claimed = {}, set()
    for sfr in required.sfrs:
        for event in sfr.audit_events:
            wanted[Serves(sfr.id, event.event)] = event.extra_fields
            if sfr.claim.decision != "not-present":
                claimed.add(Serves(sfr.id, event.event))
    served: defaultdict[Serves, list[Event]] = defaultdict(list)
    for type_ in registry:
        for serves in type_.serves:
            served[serves].append(type_)
    listed = {one.key for one in pending}
    for key in sorted(claimed - served.keys() - listed):
        yield f"{key.sfr}: {key.event}: no registered type serves it, and it is not pending"
    for key in sorted(listed & served.keys()):
        yield f"{key.sfr}: {key.event}: is served, and need not be pending any more"
    for key in sorted(listed - claimed):
        yield f"{key.sfr}: {key.event}: is pending, but no claimed requirement has it"
    for key in sorted(served.keys() - wanted.keys()):
        yield f"{key.sfr}: {key.event}: {served[key][0].type} serves it, but no requirement has it"
    for key in sorted(served.keys() & wanted.keys()):
        for name in wanted[key]:
            paths = (NAMES.get(name, f"extra.{name}"), f"extra.{name}")
            if not any(_has(type_, path) for type_ in served[key] for path in paths):
                yield f"{key.sfr}: {key.event}: no type that serves it says {name}"


def _has(type_: Event, path: str) -> bool:
    base, _, own = path.partition(".")
    return own in type_.fields if base == "extra" and own else path in MEANINGS


def page(required: Requirements, registry: Registry, pending: list[Pending]) -> str:
    """The documentation of all types of records, as Markdown."""
    text = [
        "# Audit records",
        "",
        "Made by `python3 -m tests.audit_events` from `vmm/audit/events.py`; a test fails when it is not up to date.",
        "",
        _FORM,
        "",
        "## Fields of every record",
        "",
        "| field | meaning |",
        "|---|---|",
        *(f"| `{name}` | {meaning} |" for name, meaning in MEANINGS.items()),
        "",
        "## Types",
        "",
        _TYPES,
    ]
    ordered = sorted(registry, key=lambda type_: type_.type)
    for family, types in groupby(ordered, lambda type_: type_.type.partition(".")[0]):
        text += ["", f"### {family}"]
        for type_ in types:
            about = [", ".join(type_.phases), f"by {' and '.join(type_.producers)}"]
            about += [f"object: {type_.object}"] if type_.object else []
            text += ["", f'`{type_.type}` "{type_.title}": {type_.meaning} ({"; ".join(about)})']
            own = {name: field for name, field in type_.fields.items() if name not in ARGS}
            text += [""] if own else []
            text += [f"- `{name}` ({field.kind}): {field.meaning}" for name, field in own.items()]
    text += ["", "## Requirements", "", "What each audit event of a claimed requirement is recorded as.", ""]
    text += ["| requirement | event | types |", "|---|---|---|"]
    reasons = {one.key: one.reason for one in pending}
    for sfr in required.sfrs:
        for event in sfr.audit_events if sfr.claim.decision != "not-present" else []:
            key = Serves(sfr.id, event.event)
            served = ", ".join(f"`{type_.type}`" for type_ in registry if key in type_.serves)
            text.append(f"| {sfr.id} | {event.event} | {served or 'not yet: ' + reasons.get(key, '')} |")
    return "\n".join(text) + "\n"


def entry() -> None:
    """Write the page. Raises: UserError naming the first thing that does not fit."""
    required, pending = requirements.load(), load_pending()
    for problem in problems(required, EVENTS, pending):
        raise UserError(problem)
    PAGE.write_text(page(required, EVENTS, pending))


if __name__ == "__main__":
    main(entry)
