"""The permission matrix: which role may call which method. What it does not name, nobody may."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import msgspec

from vmm.config.types import Role
from vmm.errors import Forbidden

Service = Literal["system", "guard"]
"""The roles of the host itself and of its guard, which no administrator can have."""
SYSTEM: Service = "system"

MATRIX = Path(__file__).with_name("permissions.json")


class Permissions:
    """The matrix as read from its file."""

    def __init__(self, path: Path = MATRIX) -> None:
        self._roles = msgspec.json.decode(path.read_bytes(), type=dict[str, frozenset[Role | Service]])

    @property
    def methods(self) -> frozenset[str]:
        """Every method that the matrix names."""
        return frozenset(self._roles)

    @property
    def roles(self) -> list[str]:
        """The roles that callers can have."""
        return sorted(get_args(Role))

    def of(self, role: str) -> tuple[str, ...]:
        """The methods that a role may call, by name."""
        return tuple(sorted(method for method, roles in self._roles.items() if role in roles))

    def check(self, role: str, method: str) -> None:
        """Raises: Forbidden unless the matrix lets the role call the method."""
        if role not in self._roles.get(method, ()):
            raise Forbidden(f"the role {role!r} may not call {method}")
