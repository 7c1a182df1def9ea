"""What a checkpoint is: a statement about the trail, and the proof of an anchor that it was made.

A checkpoint is a record of the trail like any other, so whoever has the records has the checkpoints among them. It
says how the chain stood shortly before; what stands between is covered by the next one.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from vmm.audit.records import Digest, Record, canonical

_Text = Annotated[str, msgspec.Meta(max_length=2048)]
Hash = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class Proof(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an anchor answers.

    ``key`` is its public key (SubjectPublicKeyInfo), ``attest`` what the TPM signed (empty with a software anchor,
    which signs what vmm.audit.proof puts together), all in base64. ``counter`` never comes twice.
    """

    anchor: Literal["tpm", "software"]
    key: _Text
    counter: Count
    attest: _Text
    signature: _Text

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the key's text, by which people compare it."""
        return hashlib.sha256(self.key.encode()).hexdigest()


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """That record ``covers`` has the hash ``head``; ``segment`` is the first record in its file."""

    covers: Annotated[int, msgspec.Meta(ge=1)]
    head: Digest
    segment: Annotated[int, msgspec.Meta(ge=1)]

    def digest(self) -> str:
        """The SHA-256 that the anchor attests. Not longer: a TPM takes no more than its own longest hash."""
        said = {"covers": self.covers, "head": self.head, "segment": self.segment}
        return hashlib.sha256(canonical({"holdfast-audit-checkpoint": said})).hexdigest()


class Checkpoint(Statement, frozen=True, forbid_unknown_fields=True):
    """A statement with its proof: the fields of its record, and what ``holdfast audit anchor`` prints."""

    proof: Proof

    @classmethod
    def of(cls, record: Record) -> Checkpoint:
        """That of a record. Raises: ValueError when the record holds none."""
        return msgspec.convert(record.extra, cls)
