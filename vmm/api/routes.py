"""The one table of routes. A route's permission is its core method; vmm/core/permissions.json says who has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BANNER = "/v1/banner"
"""Answered by the API itself, and the only thing anybody gets without a certificate."""


IDENTITY_CHANGES = frozenset({"identity.enroll", "identity.change", "identity.revoke"})
"""The methods by which it may change who is let in."""


@dataclass(frozen=True)
class Route:
    """One call of the API.

    ``query`` names the query parameters it takes; a ``body`` is a JSON object. Both, and the names in the path,
    become the core method's arguments. ``upload`` streams the body, ``follow`` the answer, ``console`` becomes a
    WebSocket.
    """

    verb: str
    path: str
    method: str
    status: int = 200
    query: Mapping[str, type[int] | type[str]] = field(default_factory=dict)
    body: bool = False
    kind: Literal["call", "upload", "console", "follow"] = "call"


_WANTED = dict.fromkeys(("from", "until", "type", "actor", "machine", "outcome", "phase", "request"), str)
"""What a record of the trail may be chosen by: the fields of vmm.audit.search.Filter."""

ROUTES = (
    Route("GET", "/v1/version", "version.read"),
    Route("GET", "/v1/health", "health.read"),
    Route("GET", "/v1/configuration", "config.read"),
    Route("GET", "/v1/whoami", "identity.whoami"),
    Route("GET", "/v1/access", "access.query"),
    Route("GET", "/v1/identities", "identity.list"),
    Route("POST", "/v1/identities", "identity.enroll", 201, body=True),
    Route("GET", "/v1/identities/{name}", "identity.show"),
    Route("POST", "/v1/identities/{name}/change", "identity.change", body=True),
    Route("DELETE", "/v1/identities/{name}", "identity.revoke", 204),
    Route("GET", "/v1/volumes", "volume.list"),
    Route("POST", "/v1/volumes", "volume.create", 201, body=True),
    Route("GET", "/v1/volumes/{name}", "volume.show"),
    Route("DELETE", "/v1/volumes/{name}", "volume.delete", 204),
    Route("PUT", "/v1/volumes/{name}/content", "volume.upload", 201, {"format": str, "size": int}, kind="upload"),
    Route("GET", "/v1/machines", "machine.list"),
    Route("POST", "/v1/machines", "machine.create", 201, body=True),
    Route("GET", "/v1/machines/{name}", "machine.show"),
    Route("DELETE", "/v1/machines/{name}", "machine.delete", 204),
    Route("POST", "/v1/machines/{name}/start", "machine.start"),
    Route("POST", "/v1/machines/{name}/stop", "machine.stop", query={"timeout": int}),
    Route("POST", "/v1/machines/{name}/force-off", "machine.force-off"),
    Route("POST", "/v1/machines/{name}/pause", "machine.pause"),
    Route("POST", "/v1/machines/{name}/resume", "machine.resume"),
    Route("POST", "/v1/machines/{name}/reset", "machine.reset"),
    Route("POST", "/v1/machines/{name}/suspend", "machine.suspend"),
    Route("POST", "/v1/machines/{name}/rename", "machine.rename", body=True),
    Route("POST", "/v1/machines/{name}/describe", "machine.describe", body=True),
    Route("POST", "/v1/machines/{name}/change", "machine.change", body=True),
    Route("GET", "/v1/machines/{name}/stats", "machine.stats"),
    Route("POST", "/v1/machines/{name}/hold", "machine.hold", body=True),
    Route("POST", "/v1/machines/{name}/release", "machine.release"),
    Route("GET", "/v1/machines/{name}/console", "machine.console", 101, kind="console"),
    Route("GET", "/v1/guard/rules", "guard.rules"),
    Route("POST", "/v1/guard/rules/{name}", "guard.set", body=True),
    Route("POST", "/v1/guard/rules/{name}/test", "guard.test"),
    Route("GET", "/v1/access/locks", "access.locks"),
    Route("POST", "/v1/access/locks", "access.lock", 201, body=True),
    Route("POST", "/v1/access/unlock", "access.unlock", body=True),
    Route(
        *("GET", "/v1/audit", "audit.read"),
        query=_WANTED | {"after": int, "before": int, "limit": int, "order": str},
    ),
    Route("GET", "/v1/audit/follow", "audit.follow", query=_WANTED | {"after": int}, kind="follow"),
    Route("GET", "/v1/audit/status", "audit.status"),
    Route("GET", "/v1/audit/export", "audit.export"),
    Route("POST", "/v1/audit/purge", "audit.purge", body=True),
    Route("POST", "/v1/audit/anchor", "audit.anchor"),
    Route("POST", "/v1/recovery-keys/fetch", "recovery.fetch"),
    # 202: the answer comes while the job runs; GET /v1/update tells how far it is.
    Route("GET", "/v1/update", "update.status"),
    Route("GET", "/v1/update/history", "update.history"),
    Route("POST", "/v1/update/check", "update.check", 202, body=True),
    Route("POST", "/v1/update/download", "update.download", 202, body=True),
    Route("POST", "/v1/update/apply", "update.apply", 202),
    Route("POST", "/v1/update/cancel", "update.cancel"),
    Route("POST", "/v1/update/rollback", "update.rollback", 202),
    Route("PUT", "/v1/update/bundle", "update.import", kind="upload"),
    # 202: the guests have stopped, the host is about to.
    Route("POST", "/v1/host/reboot", "host.reboot", 202),
    Route("POST", "/v1/host/shutdown", "host.shutdown", 202),
)
