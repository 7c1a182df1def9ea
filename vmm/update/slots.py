"""The two places of a system on the disk: what the partition table and the ESP together say of them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vmm.config.gpt import Partition, Table
from vmm.update.errors import Refused
from vmm.update.esp import BootEntry
from vmm.update.types import Slot

# The Discoverable Partitions Specification's types for x86-64.
ROOT_TYPE = uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
VERITY_TYPE = uuid.UUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5")
SIGNATURE_TYPE = uuid.UUID("41092b05-9fc8-4523-994f-2def0408b176")
TYPES = {"root": ROOT_TYPE, "verity": VERITY_TYPE, "signature": SIGNATURE_TYPE}
EMPTY = "_empty"
_PREFIX = "holdfast_"

SlotName = Literal["a", "b"]
State = Literal["running", "good", "trying", "bad", "empty", "incomplete"]


@dataclass(frozen=True)
class System:
    """A version's three partitions."""

    root: Partition
    verity: Partition
    signature: Partition


def label(version: str, part: str) -> str:
    """The name that a version's partition carries."""
    return f"{_PREFIX}{version}" + ("" if part == "root" else f"_{part}")


def uuids(root_hash: str) -> tuple[uuid.UUID, uuid.UUID]:
    """The partition UUIDs of root and hash tree: the halves of the root hash, by which the initrd finds them."""
    return uuid.UUID(root_hash[:32]), uuid.UUID(root_hash[32:])


def find(table: Table, version: str) -> System | None:
    """The partitions labelled with a version; None unless each is there exactly once."""
    found = []
    for part, type_id in TYPES.items():
        named = [p for p in table.partitions if p.type == type_id and p.name == label(version, part)]
        if len(named) != 1:
            return None
        found.append(named[0])
    return System(*found)


def belongs(system: System, root_hash: str) -> bool:
    """Whether partitions are those that a root hash leads to."""
    return (system.root.id, system.verity.id) == uuids(root_hash)


def status(table: Table, entries: Sequence[BootEntry], running: str) -> tuple[Slot, ...]:
    """Both slots, for people. Arguments: ``running`` is the running system's root hash."""
    roots = sorted((p for p in table.partitions if p.type == ROOT_TYPE), key=lambda p: p.number)[:2]
    names: tuple[SlotName, ...] = ("a", "b")
    return tuple(_slot(name, root, table, entries, running) for name, root in zip(names, roots, strict=False))


def _slot(name: SlotName, root: Partition, table: Table, entries: Sequence[BootEntry], running: str) -> Slot:
    version = root.name.removeprefix(_PREFIX)
    if root.name == EMPTY or not root.name.startswith(_PREFIX):
        return Slot(name, "", "", "empty")
    entry = next((e for e in entries if e.version == version), None)
    if len(running) == 64 and root.id == uuids(running)[0]:
        return Slot(name, version, running, "running", entry.left if entry else None)
    system = find(table, version)
    if entry is None or entry.uki is None or system is None or not belongs(system, entry.uki.root_hash):
        return Slot(name, version, "", "incomplete")
    state: State = "good" if entry.blessed else "bad" if entry.bad else "trying"
    return Slot(name, version, entry.uki.root_hash, state, entry.left)


def inactive(table: Table, running: str) -> dict[str, Partition]:
    """The partitions that the next version is written to, by part.

    Arguments: ``running`` is the running system's root hash.
    Raises: Refused when the running system's own are not found, or there are no others.
    """
    own_root, own_verity = uuids(running)
    version = next((p.name.removeprefix(_PREFIX) for p in table.partitions if p.id == own_root), None)
    if version is None:
        raise Refused("slots", "the running system's partition is not in the partition table")
    found = {}
    for part, type_id in TYPES.items():
        others = [
            p
            for p in table.partitions
            if p.type == type_id and p.id not in (own_root, own_verity) and p.name != label(version, part)
        ]
        if not others:
            raise Refused("slots", f"the disk has no second partition for the part {part}")
        found[part] = others[0]
    return found
