"""How the verifier says what is wrong with a trail."""

from __future__ import annotations

from typing import Literal

Kind = Literal["edit", "deletion", "reordering", "truncation", "substitution", "replay", "unreadable"]
"""What was done to a trail, as far as the trail shows it. An older copy looks like one that was cut short."""


class Wrong(ValueError):
    """Something in a trail that does not belong there."""

    def __init__(self, kind: Kind, why: str) -> None:
        super().__init__(why)
        self.kind: Kind = kind
