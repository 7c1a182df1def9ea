"""root.json: which keys sign for which role of the update repository. Its first version is built into the image."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from tuf.api.metadata import Key, Metadata, Role, Root, Snapshot, Targets, Timestamp

from signing import store
from signing.roles import KeyRing
from vmm.errors import die

KEYS_OF_ROLE = {
    "root": ("root1", "root2", "root3"),
    "targets": ("targets",),
    "snapshot": ("snapshot",),
    "timestamp": ("timestamp",),
}
"""The keys that a new repository begins with."""

THRESHOLDS = {"root": 2, "targets": 1, "snapshot": 1, "timestamp": 1}

LIFETIMES = {
    "root": datetime.timedelta(days=365),
    "targets": datetime.timedelta(days=14),
    "snapshot": datetime.timedelta(days=14),
    "timestamp": datetime.timedelta(days=7),
}

T = TypeVar("T", Root, Timestamp, Snapshot, Targets)

ELSEWHERE = "--keys names the key set; what keys on another machine sign goes through prepare, sign and adopt"


def now() -> datetime.datetime:
    """The present, in UTC, as metadata can say it: whole seconds."""
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def successor(old: Metadata[T], time: datetime.datetime) -> Metadata[T]:
    """The next version of a role's metadata, as old but for version and expiry, and not signed."""
    signed = copy.deepcopy(old.signed)
    signed.version += 1
    signed.expires = time + LIFETIMES[signed.type]
    return Metadata(signed)


def sign(metadata: Metadata[T], roots: Sequence[Root], ring: KeyRing, *, hint: str = ELSEWHERE) -> Metadata[T]:
    """Sign with every key at hand that one of ``roots`` gives the role, and return the same object.

    Raises: UserError with ``hint`` when a root's threshold is not met, naming the keys that could help.
    """
    keyids = {keyid for root in roots for keyid in root.roles[metadata.signed.type].keyids}
    for signer in ring.signers(keyids):
        metadata.signatures[signer.public_key.keyid] = signer.sign(metadata.signed_bytes)
    demand(metadata, roots, ring, hint=hint)
    return metadata


def is_signed(metadata: Metadata[T], roots: Sequence[Root]) -> bool:
    """Whether each of ``roots`` accepts the signatures."""
    return all(
        root.get_verification_result(metadata.signed.type, metadata.signed_bytes, metadata.signatures) for root in roots
    )


def require_keys(root: Root, role: str, ring: KeyRing) -> None:
    """Insist that enough private keys of a role are at hand. Raises: UserError naming the role and its keys."""
    keys = root.roles[role]
    if len(ring.signers(keys.keyids)) < keys.threshold:
        die(
            f"{ring.folder} lacks the private keys of the role {role}: "
            f"it takes {keys.threshold} of {', '.join(map(ring.name, keys.keyids))}",
            hint=ELSEWHERE,
        )


def demand(metadata: Metadata[T], roots: Sequence[Root], ring: KeyRing, *, hint: str = ELSEWHERE) -> None:
    """Insist that each of ``roots`` accepts the signatures. Raises: UserError naming role, version and keys."""
    role = metadata.signed.type
    for root in roots:
        result = root.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
        if not result:
            absent = ", ".join(ring.name(keyid) for keyid in sorted(result.unsigned)) or "no key"
            die(
                f"{role}.json version {metadata.signed.version} has {len(result.signed)} of the {result.threshold} "
                f"signatures that root.json version {root.version} wants; not signed by: {absent}",
                hint=hint,
            )


def first_root(ring: KeyRing, time: datetime.datetime) -> bytes:
    """A new repository's root.json, signed. Raises: UserError when keys are missing or fewer than two can sign."""
    keys: dict[str, Key] = {}
    roles = {}
    for role, names in KEYS_OF_ROLE.items():
        publics = [ring.public(name) for name in names]
        keys |= {key.keyid: key for key in publics}
        roles[role] = Role([key.keyid for key in publics], THRESHOLDS[role])
    if len(keys) != sum(map(len, KEYS_OF_ROLE.values())):
        die(f"{ring.folder}: two role keys are the same key", hint="every role key is made on its own")
    root = Metadata(Root(version=1, expires=time + LIFETIMES["root"], keys=keys, roles=roles, consistent_snapshot=True))
    return sign(root, [root.signed], ring).to_bytes()


def provide_root(folder: Path, time: datetime.datetime | None = None) -> Path:
    """The key set's root.json, made if there is none, never overwritten. Raises: UserError as ``first_root`` does."""
    path = folder / "root.json"
    if not path.exists():
        store.create(path, first_root(KeyRing(folder), time or now()))
    return path
