"""Methods that concern identities, and what their roles let them do."""

from __future__ import annotations

from typing import Any

import msgspec

from vmm.core import arguments
from vmm.core.dispatch import Call, Method
from vmm.core.identities import Change, Enroll, Identities, Identity
from vmm.core.permissions import Permissions


class Described(Identity, frozen=True):
    """One identity, with the methods that its role may call; those of machines for its own only, if it has such."""

    methods: tuple[str, ...] = ()


class IdentityHandlers:
    """One method a row of the table; see vmm.core.methods."""

    def __init__(self, identities: Identities, permissions: Permissions) -> None:
        self._identities = identities
        self._permissions = permissions

    def table(self) -> dict[str, Method]:
        """Name → method. A name that permissions.json does not have can be called by nobody."""
        a = arguments
        return {
            "identity.list": Method(a.Nothing, self._list, "read", ""),
            "identity.show": Method(a.Named, self._show, "read", "identity"),
            "identity.whoami": Method(a.Nothing, self._whoami, "read", ""),
            "identity.enroll": Method(Enroll, self._enroll, "change", "identity"),
            "identity.change": Method(Change, self._change, "change", "identity"),
            "identity.revoke": Method(a.Named, self._revoke, "change", "identity"),
            "access.query": Method(a.Nothing, self._access, "read", ""),
        }

    async def _list(self, _args: arguments.Nothing, _call: Call) -> Any:
        return await self._identities.list_all()

    async def _show(self, args: arguments.Named, _call: Call) -> Any:
        return self._described(await self._identities.show(args.name))

    async def _whoami(self, _args: arguments.Nothing, call: Call) -> Any:
        return self._described(await self._identities.show(call.actor.id))

    async def _enroll(self, args: Enroll, call: Call) -> Any:
        identity = await self._identities.enroll(args, call.actor.id)
        call.object_id = identity.fingerprint
        return self._described(identity)

    async def _change(self, args: Change, call: Call) -> Any:
        return self._described(await self._identities.change(args, call.certificate))

    async def _revoke(self, args: arguments.Named, call: Call) -> Any:
        await self._identities.revoke(args.name, call.certificate)
        return {}

    async def _access(self, _args: arguments.Nothing, _call: Call) -> Any:
        return {"roles": {role: self._permissions.of(role) for role in self._permissions.roles}}

    def _described(self, identity: Identity) -> Described:
        return Described(**msgspec.structs.asdict(identity), methods=self._permissions.of(identity.role))
