"""Metadata on its way to keys that no network reaches: prepared here, signed there, adopted here."""

from __future__ import annotations

import copy
import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONDeserializer

from signing import store
from signing.repository import Repository, State
from signing.roles import KeyRing
from signing.root import demand
from vmm.errors import Conflict, die


class Prepared(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file that travels. ``keyids`` may sign; that is a help, what counts is checked when it is adopted."""

    format: Literal[1]
    role: Literal["root", "targets"]
    keyids: tuple[str, ...]
    metadata: dict[str, Any]


def write_prepared(path: Path, state: State, metadata: Metadata[Root] | Metadata[Targets]) -> None:
    """Write unsigned metadata for others to sign. Raises: UserError when the file exists; OSError."""
    role: Literal["root", "targets"] = "root" if isinstance(metadata.signed, Root) else "targets"
    roots = [state.root.signed, *([metadata.signed] if isinstance(metadata.signed, Root) else [])]
    keyids = sorted({keyid for root in roots for keyid in root.roles[role].keyids})
    prepared = Prepared(1, role, tuple(keyids), metadata.to_dict())
    if not store.create(path, _encode(prepared)):
        die(f"{path} exists", hint="adopt it or remove it first")


def read_prepared(path: Path) -> tuple[Prepared, Metadata[Root] | Metadata[Targets]]:
    """Read such a file. Raises: UserError naming what is wrong with it."""
    try:
        prepared = msgspec.json.decode(path.read_bytes(), type=Prepared)
        metadata: Metadata[Any] = JSONDeserializer().deserialize(msgspec.json.encode(prepared.metadata))
    except FileNotFoundError:
        die(f"there is no file {path}")
    except (msgspec.DecodeError, UnicodeDecodeError, DeserializationError) as error:
        die(f"{path} is not what holdfast-release prepare writes: {error}")
    if metadata.signed.type != prepared.role:
        die(f"{path} says role {prepared.role} and holds {metadata.signed.type} metadata")
    return prepared, metadata


def add_signature(path: Path, ring: KeyRing, name: str) -> int:
    """Sign such a file with one key, and tell how many signatures it has now.

    Raises: UserError when the key is not one that counts for it, or cannot be used.
    """
    prepared, metadata = read_prepared(path)
    signer = ring.signer(name)
    keyid = signer.public_key.keyid
    if keyid not in prepared.keyids:
        die(
            f"{name} is not a key of the role {prepared.role}",
            hint=f"it is signed by: {', '.join(map(ring.name, prepared.keyids))}",
        )
    metadata.signatures[keyid] = signer.sign(metadata.signed_bytes)
    store.write(path, _encode(msgspec.structs.replace(prepared, metadata=metadata.to_dict())))
    return len(metadata.signatures)


def describe(metadata: Metadata[Root] | Metadata[Targets], ring: KeyRing) -> list[str]:
    """What a signature on it would say, as lines for whoever is about to give it."""
    signed = metadata.signed
    lines = [f"{signed.type}.json version {signed.version}, expires {signed.expires:%Y-%m-%d %H:%M} UTC"]
    if isinstance(signed, Root):
        for name, role in signed.roles.items():
            lines.append(f"  {name}: {role.threshold} of {', '.join(map(ring.name, role.keyids))}")
        return lines
    for path, target in sorted(signed.targets.items()):
        if path.endswith("/release.json"):
            lines.append(f"  {path} {target.custom} SHA-384 {target.hashes['sha384']}")
    return lines


def adopt(repository: Repository, path: Path, ring: KeyRing, time: datetime.datetime) -> State:
    """Put signed metadata in place, with new snapshot and timestamp.

    Raises: UserError when signatures are missing, a target's file is missing or damaged, or the snapshot's or
    timestamp's key; Conflict when the repository has changed since the file was prepared.
    """
    _, metadata = read_prepared(path)
    state = repository.load()
    signed = metadata.signed
    current = state.root.signed.version if isinstance(signed, Root) else state.targets.signed.version
    if signed.version != current + 1:
        raise Conflict(
            f"{path} is {signed.type}.json version {signed.version}, and the repository is at version {current}",
            hint="the repository has changed since; prepare it again",
        )
    if signed.is_expired(time):
        die(f"{path} expired on {signed.expires}", hint="prepare it again")
    if isinstance(signed, Root):
        return repository.commit(state, ring, time, root=Metadata(signed, copy.copy(metadata.signatures)))
    targets = Metadata(signed, copy.copy(metadata.signatures))
    demand(targets, [state.root.signed], ring)
    for name, target in signed.targets.items():
        if state.targets.signed.targets.get(name) != target:
            repository.check_target(target)
    return repository.commit(state, ring, time, targets=targets)


def _encode(prepared: Prepared) -> bytes:
    return msgspec.json.format(msgspec.json.encode(prepared), indent=1) + b"\n"
