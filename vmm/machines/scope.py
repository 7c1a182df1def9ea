"""Callers that may know of some machines only."""

from __future__ import annotations

from contextvars import ContextVar
from uuid import UUID

from vmm.errors import NotFound

SCOPE: ContextVar[frozenset[UUID] | None] = ContextVar("scope", default=None)
"""The machines that there are for the call that runs; None: all."""


def is_within(id: UUID) -> bool:
    """Whether there is a machine of this id for the call that runs."""
    scope = SCOPE.get()
    return scope is None or id in scope


def missing(name: str) -> NotFound:
    """What is raised for a name that no machine has, and for that of a machine which the caller may not know of."""
    return NotFound(f"there is no machine {name!r}")
