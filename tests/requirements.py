"""Reads requirements.yaml: what the product has to hold and what it claims."""

from __future__ import annotations

from pathlib import Path

import msgspec
import msgspec.yaml

from vmm.errors import UserError

REQUIREMENTS = Path(__file__).with_name("requirements.yaml")


class Bullet(msgspec.Struct, frozen=True):
    """A bullet of the ESR."""

    id: str
    kind: str
    text: str


class Claim(msgspec.Struct, frozen=True):
    """What we claim of a requirement: meet, conditional or not-present; and why."""

    decision: str
    reason: str


class AuditEvent(msgspec.Struct, frozen=True):
    """An event that has to be on record, and what its record has to say beside the base fields."""

    event: str
    extra_fields: list[str]


class RecordField(msgspec.Struct, frozen=True):
    """A base field of every record, as the requirements call it."""

    name: str
    meaning: str


class Requirement(msgspec.Struct, frozen=True):
    """A security functional requirement; the file's other fields are for people."""

    id: str
    name: str
    kind: str
    esr: list[str]
    claim: Claim
    audit_events: list[AuditEvent] = []


class Function(msgspec.Struct, frozen=True):
    """A management function of FMT_MOF_EXT.1: whether users may have it, and which roles have it here."""

    n: int
    function: str
    user: str
    provided: bool
    roles: list[str]


class Requirements(msgspec.Struct, frozen=True):
    """The file's parts that reports and tests join with what there is."""

    esr: list[Bullet]
    sfrs: list[Requirement]
    audit_record_fields: list[RecordField] = []
    management_functions: list[Function] = []

    def ids(self) -> frozenset[str]:
        """The names that a test's sfr marker may give."""
        return frozenset(requirement.id for requirement in self.sfrs)


def load(path: Path = REQUIREMENTS) -> Requirements:
    """Read the file. Raises: UserError when it has not the expected form."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Requirements)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {error}") from None
