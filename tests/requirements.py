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


class Requirement(msgspec.Struct, frozen=True):
    """A security functional requirement; the file's other fields are for people."""

    id: str
    name: str
    kind: str
    esr: list[str]
    claim: Claim


class Requirements(msgspec.Struct, frozen=True):
    """The file's parts that the conformance report joins with results."""

    esr: list[Bullet]
    sfrs: list[Requirement]

    def ids(self) -> frozenset[str]:
        """The names that a test's sfr marker may give."""
        return frozenset(requirement.id for requirement in self.sfrs)


def load(path: Path = REQUIREMENTS) -> Requirements:
    """Read the file. Raises: UserError when it has not the expected form."""
    try:
        return msgspec.yaml.decode(path.read_bytes(), type=Requirements)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise UserError(f"{path}: {error}") from None
