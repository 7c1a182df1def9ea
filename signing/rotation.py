"""The next root.json (not signed yet): other keys for a role, or the same ones for longer."""

from __future__ import annotations

import datetime

from tuf.api.metadata import Metadata, Root

from signing.repository import State
from signing.roles import KeyRing
from signing.root import successor
from vmm.errors import NotFound, die


def renew(state: State, time: datetime.datetime) -> Metadata[Root]:
    """The same keys with a new expiry."""
    return successor(state.root, time)


def add_key(state: State, ring: KeyRing, role: str, new: str, time: datetime.datetime) -> Metadata[Root]:
    """A role gets one more key; its threshold stays. Raises: UserError when it has the key, or NEW.pub is missing."""
    following = successor(state.root, time)
    _add(following.signed, ring, role, new)
    return following


def remove_key(state: State, ring: KeyRing, role: str, old: str, time: datetime.datetime) -> Metadata[Root]:
    """A role loses a key. Raises: UserError when it has not got it, or would be left with fewer than its threshold."""
    following = successor(state.root, time)
    _remove(following.signed, ring, role, old)
    if len(following.signed.roles[role].keyids) < following.signed.roles[role].threshold:
        die(f"{role} would have fewer keys than its threshold", hint="add-key first, or rotate")
    return following


def rotate(state: State, ring: KeyRing, role: str, old: str, new: str, time: datetime.datetime) -> Metadata[Root]:
    """A role gets ``new`` in place of ``old``. Raises: UserError when it has ``new`` already or has not got ``old``."""
    following = successor(state.root, time)
    _remove(following.signed, ring, role, old)
    _add(following.signed, ring, role, new)
    return following


def _add(root: Root, ring: KeyRing, role: str, name: str) -> None:
    key = ring.public(name)
    for other, keys in root.roles.items():
        if key.keyid in keys.keyids:
            die(f"{name} is a key of {other} already", hint="every role key is made on its own")
    root.add_key(key, role)


def _remove(root: Root, ring: KeyRing, role: str, name: str) -> None:
    found = [keyid for keyid in root.roles[role].keyids if ring.name(keyid) == name or keyid == name]
    if not found:
        known = ", ".join(map(ring.name, root.roles[role].keyids))
        raise NotFound(f"{role} has no key {name}; it has: {known}", hint="give the key's name or its whole id")
    root.revoke_key(found[0], role)
