"""The table of methods: what core does for its callers. permissions.json says for whom.

Those of machines stand in vmm.core.machine_methods, of identities in vmm.core.identity_methods, those that concern the
host as a whole in vmm.core.host_methods.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from vmm.audit.client import AuditClient
from vmm.audit.search import Query
from vmm.core import arguments, version
from vmm.core.configuration import AppliedConfiguration
from vmm.core.dispatch import Call, Method
from vmm.core.export import Exports
from vmm.core.follow import Follow, Followers
from vmm.core.health import Health
from vmm.core.identities import Identities
from vmm.core.recovery import Recovery
from vmm.errors import NotFound
from vmm.machines.service import Machines
from vmm.volumes.service import Volumes


class Handlers:
    """One method a row of the table; each takes its decoded arguments and the call."""

    def __init__(
        self,
        configuration: AppliedConfiguration,
        volumes: Volumes,
        machines: Machines,
        audit: AuditClient,
        health: Callable[[], Awaitable[Health]],
        recovery: Recovery,
        identities: Identities,
    ) -> None:
        self._configuration = configuration
        self._volumes = volumes
        self._machines = machines
        self._audit = audit
        self._health = health
        self._recovery = recovery
        self._identities = identities
        self._followers = Followers(audit)
        self._exports = Exports(audit)

    def table(self) -> dict[str, Method]:
        """Name → method. A name that permissions.json does not have can be called by nobody."""
        a = arguments
        return {
            "version.read": Method(a.Nothing, self._version, "read", ""),
            "health.read": Method(a.Nothing, self._read_health, "read", ""),
            "config.read": Method(a.Nothing, self._config, "read", ""),
            "volume.list": Method(a.Nothing, self._list_volumes, "read", ""),
            "volume.show": Method(a.Named, self._show_volume, "read", "volume"),
            "volume.create": Method(a.CreateVolume, self._create_volume, "change", "volume"),
            "volume.upload": Method(a.UploadVolume, self._upload_volume, "change", "volume"),
            "volume.delete": Method(a.Named, self._delete_volume, "change", "volume"),
            "audit.read": Method(Query, self._read_audit, "read", ""),
            "audit.follow": Method(Follow, self._followers.follow, "change", "", lasts=True),
            "audit.status": Method(a.Nothing, self._audit_status, "read", ""),
            "audit.export": Method(a.Nothing, self._audit_export, "read", ""),
            "audit.purge": Method(a.PurgeAudit, self._purge_audit, "change", ""),
            "audit.anchor": Method(a.Nothing, self._anchor_audit, "change", ""),
            "recovery.fetch": Method(a.Nothing, self._fetch_recovery, "change", ""),
        }

    async def identify(self, kind: str, name: str) -> str:
        """The id of a volume, machine or identity, or "" when there is none of that name, or it is something else."""
        if kind not in ("volume", "machine", "identity"):
            return ""
        try:
            if kind == "identity":
                return await self._identities.fingerprint(name)
            return await (self._volumes.uuid if kind == "volume" else self._machines.uuid)(name)
        except NotFound:
            return ""

    async def _version(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await asyncio.to_thread(version.read)

    async def _read_health(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._health()

    async def _config(self, _args: arguments.Nothing, _call: Call) -> Any:
        return self._configuration.document()

    async def _list_volumes(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._volumes.list_all()

    async def _show_volume(self, args: arguments.Named, _call: Call) -> Any:
        return await self._volumes.show(args.name)

    async def _create_volume(self, args: arguments.CreateVolume, call: Call) -> Any:
        volume = await self._volumes.create(args.name, args.size)
        call.object_id = volume.uuid
        return volume

    async def _upload_volume(self, args: arguments.UploadVolume, call: Call) -> Any:
        volume = await self._volumes.upload(args.name, args.format, args.length, args.size, call.content())
        call.object_id = volume.uuid
        return volume

    async def _delete_volume(self, args: arguments.Named, _call: Call) -> Any:
        await self._volumes.delete(args.name)
        return {}

    async def _read_audit(self, query: Query, _call: Call) -> Any:
        return await self._audit.search(query)

    async def _audit_status(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._audit.status()

    async def _audit_export(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._exports.show()

    async def _purge_audit(self, args: arguments.PurgeAudit, call: Call) -> Any:
        gone = await self._audit.purge(args.before, call.request)
        call.outcome = dict(gone)
        return gone

    async def _anchor_audit(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._audit.checkpoint()

    async def _fetch_recovery(self, _args: arguments.Nothing, _call: Call) -> Any:
        return {"keys": await asyncio.to_thread(self._recovery.fetch)}
