"""What becomes of old records: the part of the configuration that the audit daemon goes by."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

MIB = 1 << 20
LEAST_MIB = 32
"""Four segments: below that, what is kept would be gone before anybody reads it."""
MOST_DAYS = 36500


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept, and what happens when there is no room for more.

    ``when_full``: "overwrite" lets the oldest segments go, "refuse" refuses what would have to be recorded.
    ``keep_days``: older records go, by whole segments; they stay for ever unless given. ``keep_mib``: how much the
    store may hold; as much as its volume unless given.
    """

    when_full: Literal["overwrite", "refuse"] = "overwrite"
    keep_days: Annotated[int, msgspec.Meta(ge=1, le=MOST_DAYS)] | None = None
    keep_mib: Annotated[int, msgspec.Meta(ge=LEAST_MIB, le=1 << 20)] | None = None

    def quota(self, most: int) -> int:
        """Bytes that the store may hold on a volume with room for ``most``."""
        return most if self.keep_mib is None else min(most, self.keep_mib * MIB)


class Rule(Kept, frozen=True, forbid_unknown_fields=True):
    """The same as the audit daemon goes by it.

    ``until_exported``: records that some server has yet to get go by their age no sooner than it has them.
    """

    until_exported: bool = False
