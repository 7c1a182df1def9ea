"""The audit trail of updates: an intent before each job and its outcome after, with all that was seen on the way."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from vmm.audit.client import Actor, Entry, Object
from vmm.clock import rfc3339
from vmm.errors import UserError
from vmm.update.errors import Refused
from vmm.update.state import Event, Store

Type = Literal[
    "update.check",
    "update.download",
    "update.apply",
    "update.rollback",
    "update.failed",
    "update.bless",
    "update.seals",
    "update.keys",
    "update.import",
]
Append = Callable[[Entry], int]


class Caller(msgspec.Struct, frozen=True):
    """Who asked, and the call's name in core's own records."""

    actor: Actor = Actor()
    request: str = ""


class Recorder:
    """Writes audit records, and the same in short to the history. Used from jobs' threads."""

    def __init__(self, append: Append, store: Store, now: Callable[[], float]) -> None:
        """Arguments: ``append`` returns once a record is durable and raises Unavailable when it cannot be."""
        self._append = append
        self._store = store
        self._now = now

    def intent(self, type: Type, caller: Caller, extra: dict[str, Any]) -> str:
        """Say what is about to be done. Returns: the name for outcome(). Raises: Unavailable; nothing is done then."""
        request = str(uuid.uuid4())
        self._append(
            Entry(
                type=type,
                phase="intent",
                outcome="pending",
                request=request,
                actor=caller.actor,
                extra=_with(extra, caller),
            )
        )
        return request

    def outcome(
        self, type: Type, request: str, caller: Caller, version: str, error: UserError | None, extra: dict[str, Any]
    ) -> None:
        """Say how it ended. Raises: Unavailable."""
        layer = {"layer": error.layer} if isinstance(error, Refused) else {}
        reason = error.message[:2000] if error else ""
        self._append(
            Entry(
                type=type,
                phase="outcome",
                request=request,
                actor=caller.actor,
                object=_version(version),
                outcome="failure" if error else "success",
                reason=reason,
                extra={**_with(extra, caller), **layer},
            )
        )
        self._remember(type, version, "failure" if error else "success", reason, extra)

    def event(self, type: Type, version: str, *, failed: bool = False, reason: str = "", extra: dict[str, Any]) -> None:
        """Say what was found to have happened. Raises: Unavailable."""
        outcome: Literal["success", "failure"] = "failure" if failed else "success"
        self._append(Entry(type=type, object=_version(version), outcome=outcome, reason=reason, extra=extra))
        self._remember(type, version, outcome, reason, extra)

    def _remember(self, type: str, version: str, outcome: str, reason: str, extra: dict[str, Any]) -> None:
        self._store.remember(Event(rfc3339(self._now()), type, outcome, version, reason, extra))


def _version(version: str) -> Object:
    return Object(kind="release", id=version, name=version) if version else Object()


def _with(extra: dict[str, Any], caller: Caller) -> dict[str, Any]:
    return {**extra, "caller_request": caller.request} if caller.request else extra
