"""From a call to its answer: identify, authorise, audit, do.

A change is done only once its intent is on record, and answered only once its outcome is; reads and refusals are
answered once they are on record. Without audit nothing is done. Only of processes that may not call at all, so many
calls go on record as the trail can bear.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol
from uuid import UUID, uuid4

import msgspec

from vmm import wire
from vmm.audit.client import Actor, Entry, Object
from vmm.audit.throttle import Throttle
from vmm.core.arguments import Caller, Envelope, HostEnvelope, decode
from vmm.core.identities import SCOPED, Identities
from vmm.core.permissions import SYSTEM, Permissions
from vmm.errors import Forbidden, NotFound, Unavailable, UserError
from vmm.machines.scope import SCOPE, missing

MOST_REASON = 1000
"""Characters of a reason that go on record."""
_UNKNOWN_METHOD = "core.unknown-method"
_ROOT = 0
_END_S = 10.0
HOST = Actor(id="holdfast", role=SYSTEM)
"""Who acts when the host itself does."""
OPERATION: ContextVar[str] = ContextVar("operation", default="")
"""The request of the call that runs: the records of all that is done for it, however deep down, carry it."""


class Audit(Protocol):
    """The part of the audit client that is used here."""

    async def append(self, entry: Entry) -> int:
        """Put a durable record. Raises: Unavailable."""


class Call:
    """One call on its way through a handler: who makes it, and its name in the records.

    ``object_id`` is the identity of what the handler made, for the outcome record, and ``outcome`` that record's own
    fields. ``certificate`` is the caller's fingerprint. ``begun`` says that the handler runs, ``doubtful`` that what
    its caller may do changed before that, ``ended`` why it was ended from outside.
    """

    def __init__(self, channel: wire.Channel | None) -> None:
        """Arguments: ``channel`` is None for calls that core itself makes."""
        self._channel = channel
        self.object_id = ""
        self.outcome: dict[str, Any] = {}
        self.actor = Actor()
        self.certificate = ""
        self.object = Object()
        self.request = ""
        self.begun = self.doubtful = False
        self.ended: UserError | None = None

    @property
    def channel(self) -> wire.Channel:
        """The connection to the caller. Raises: UserError when there is none."""
        if self._channel is None:
            raise UserError("this method needs a caller to talk to")
        return self._channel

    async def content(self) -> AsyncIterator[bytes]:
        """What the caller sends along, as it comes. Raises: UserError when the caller goes away in between."""
        try:
            async for payload in self.channel.data():
                yield payload
        except wire.ProtocolError as error:
            raise UserError(f"the upload was broken off: {error}") from None


@dataclass(frozen=True)
class Method:
    """One row of the table of methods.

    ``kind`` is "read" or "change"; ``object_kind`` says what ``args.name`` names; ``lasts`` says whether the
    call lasts as long as its connection.
    """

    args: type[msgspec.Struct]
    handler: Callable[[Any, Call], Awaitable[Any]]
    kind: Literal["read", "change"]
    object_kind: str
    lasts: bool = False


@dataclass
class _Case:
    """What is known of a call while it is decided."""

    type: str
    actor: Actor
    object: Object
    request: str
    certificate: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


class Dispatcher:
    """The handler of core's socket."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        permissions: Permissions,
        identities: Identities,
        audit: Audit,
        identify: Callable[[str, str], Awaitable[str]],
        peers: frozenset[int],
        *,
        locked: Callable[[str, str], None],
        services: Mapping[int, Actor] | None = None,
    ) -> None:
        """Arguments: ``identify`` finds the id of (object kind, name), or ""; ``peers`` are uids that may call for
        others; ``locked`` raises for an origin or certificate that is locked out; ``services`` are uids that call for
        themselves only, and who they are.
        """
        self._methods = methods
        self._permissions = permissions
        self._identities = identities
        self._audit = audit
        self._identify = identify
        self._peers = peers
        self._locked = locked
        self._services = services or {}
        self._strangers = Throttle(audit.append, "core")
        # With the calls that last as long as their connections.
        self._running: dict[asyncio.Task[Any], tuple[str, Call] | None] = {}

    async def handle(self, request: wire.Request, channel: wire.Channel) -> Any:
        """One call. It is finished, and recorded, even when its caller goes away. Raises: UserError."""
        call = Call(channel)
        return await self._finish(request.method, call, self._handle(request, call))

    async def perform(self, method: str, /, **args: Any) -> Any:
        """A call that core itself makes: authorised, recorded and finished as any other. Raises: UserError."""
        call = Call(None)
        return await self._finish(method, call, self._call(method, HostEnvelope(args), call))

    async def _finish(self, name: str, call: Call, work: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.get_running_loop().create_task(work)
        method = self._methods.get(name)
        self._running[task] = (name, call) if method is not None and method.lasts else None
        task.add_done_callback(self._running.pop)
        return await asyncio.shield(task)

    async def close(self, grace: float) -> None:
        """End consoles, give everything else ``grace`` seconds, then end it; each with its record."""
        for task, lasting in list(self._running.items()):
            if lasting is not None:
                task.cancel()
        tasks = set(self._running)
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._strangers.close()

    async def recheck(self, certificate: str = "") -> None:
        """Who has this certificate ("": anybody) may do less than before: end what lasts and is no longer allowed."""
        ended = set()
        for task, lasting in list(self._running.items()):
            if lasting is None or certificate not in ("", lasting[1].certificate):
                continue
            name, call = lasting
            if not call.begun:
                call.doubtful = True
                continue
            try:
                await self._permit_on(name, call)
            except UserError as error:
                call.ended = error
                task.cancel()
                ended.add(task)
        if ended:
            await asyncio.wait(ended, timeout=_END_S)

    async def _permit_on(self, name: str, call: Call) -> None:
        """Whether a call that was permitted still is. Raises: UserError."""
        if not call.certificate:
            return  # the host itself
        self._locked(call.actor.origin, call.certificate)
        role = (await self._identities.find(call.certificate)).role
        self._permissions.check(role, name)
        scope = await self._scope(role, call.certificate)
        if scope is not None and call.object.kind == "machine" and call.object.id not in map(str, scope):
            raise Forbidden("the machine is no longer yours")

    async def _scope(self, role: str, certificate: str) -> frozenset[UUID] | None:
        """The machines that there are for a caller; None: all."""
        return await self._identities.scope(certificate) if role == SCOPED else None

    async def _handle(self, request: wire.Request, call: Call) -> Any:
        peer = call.channel.peer
        if (service := self._services.get(peer.uid)) is not None:
            return await self._call(request.method, decode(request.params, HostEnvelope), call, service)
        if peer.uid not in self._peers:
            raise self._foreign(peer.uid)
        # Root needs no certificate, and gets no more than the matrix gives the host itself.
        if peer.uid == _ROOT and "caller" not in request.params:
            return await self._call(request.method, decode(request.params, HostEnvelope), call)
        return await self._call(request.method, decode(request.params, Envelope), call)

    def _foreign(self, uid: int) -> Forbidden:
        """The error to raise; it is on record soon after, as far as strangers can be let fill the trail."""
        reason = f"uid {uid} may not call core"
        actor = Actor(id=f"uid {uid}")
        self._strangers.report(
            Entry(type="core.foreign-peer", phase="outcome", actor=actor, outcome="failure", reason=reason)
        )
        return Forbidden(reason)

    async def _call(
        self, name: str, envelope: Envelope | HostEnvelope, call: Call, service: Actor = HOST
    ) -> Any:
        method = self._methods.get(name)
        # What a call causes may inherit its context.
        SCOPE.set(None)
        if isinstance(envelope, Envelope):
            # Before anything is decided: what changes meanwhile must find the call.
            call.certificate = envelope.caller.fingerprint
        case, args = await self._decide(name, method, envelope, service)
        assert method is not None
        call.actor, call.object, call.request = case.actor, case.object, case.request
        # Each call runs in a task, and so in a context, of its own.
        OPERATION.set(case.request)
        if method.kind == "read":
            return await self._read(method, case, args, call)
        return await self._change(name, method, case, args, call)

    async def _decide(
        self, name: str, method: Method | None, envelope: Envelope | HostEnvelope, service: Actor
    ) -> tuple[_Case, Any]:
        """Whether the call may be made. Raises: UserError, once the refusal is on record."""
        type_, thing = name if method else _UNKNOWN_METHOD, _raw_object(method, envelope.args)
        if isinstance(envelope, Envelope):
            caller = envelope.caller
            case = _Case(type_, _unknown(caller), thing, caller.request_id, caller.fingerprint)
        else:
            case = _Case(type_, service, thing, str(uuid4()))
        try:
            if isinstance(envelope, Envelope):
                case.actor = await self._actor(envelope.caller)
                self._locked(envelope.caller.origin, envelope.caller.fingerprint)
            if method is None:
                raise NotFound(f"there is no method {name[:64]!r}")
            self._permissions.check(case.actor.role, name)
            args = decode(envelope.args, method.args)
        except UserError as error:
            raise await self._refuse(case, error) from None
        if method.object_kind and case.object.name:
            id = await self._identify(method.object_kind, case.object.name)
            case.object = msgspec.structs.replace(case.object, id=id)
        await self._confine(method, case)
        if method.kind == "change":
            case.extra = {"args": msgspec.to_builtins(args)}
        return case, args

    async def _actor(self, caller: Caller) -> Actor:
        person = await self._identities.find(caller.fingerprint)
        return msgspec.structs.replace(_unknown(caller), id=person.name, role=person.role)

    async def _confine(self, method: Method, case: _Case) -> None:
        """Let there be only the caller's own machines, if it is limited to those. Raises: NotFound, on record."""
        scope = await self._scope(case.actor.role, case.certificate)
        # Names may come to mean other machines until the handler looks, so it is held to these as well.
        SCOPE.set(scope)
        if scope is None or method.object_kind != "machine":
            return
        if case.object.id not in map(str, scope):
            error = missing(case.object.name)
            await self._record(case, "outside of the caller's scope" if case.object.id else error.message)
            raise error

    async def _read(self, method: Method, case: _Case, args: Any, call: Call) -> Any:
        try:
            result = await method.handler(args, call)
        except UserError as error:
            raise await self._refuse(case, error) from None
        await self._record(case)
        return result

    async def _change(self, name: str, method: Method, case: _Case, args: Any, call: Call) -> Any:
        await self._audit.append(
            Entry(
                type=case.type,
                phase="intent",
                outcome="pending",
                actor=case.actor,
                object=case.object,
                request=case.request,
                extra=case.extra,
            )
        )
        failure: BaseException | None = None
        reason, result = "", None
        try:
            call.begun = True
            if call.doubtful:
                await self._permit_on(name, call)
            result = await method.handler(args, call)
        except asyncio.CancelledError as error:
            reason, failure = "cancelled: the service stopped", error
            if call.ended is not None:
                reason, failure = call.ended.message, call.ended
        except UserError as error:
            reason, failure = error.message, error
        except Exception as error:  # noqa: BLE001 - whatever happened, the outcome goes on record
            reason, failure = f"an internal error: {type(error).__name__}", error
        # From here on nobody ends it: its outcome goes on record.
        call.begun = False
        if call.object_id:
            case.object = msgspec.structs.replace(case.object, id=call.object_id)
        case.extra = call.outcome
        try:
            await self._record(case, reason)
        except Unavailable as error:
            done = "failed" if failure else "was done"
            raise Unavailable(f"{case.type} {done} but could not be recorded: {error.message}") from failure
        if failure is not None:
            raise failure
        return result

    async def _refuse(self, case: _Case, error: UserError) -> UserError:
        """The error to raise, once it is on record. Raises: Unavailable when it could not be recorded."""
        await self._record(case, error.message)
        return error

    async def _record(self, case: _Case, reason: str = "") -> None:
        await self._audit.append(
            Entry(
                type=case.type,
                phase="outcome",
                outcome="failure" if reason else "success",
                reason=reason[:MOST_REASON],
                actor=case.actor,
                object=case.object,
                request=case.request,
                extra=case.extra,
            )
        )


def _unknown(caller: Caller) -> Actor:
    """Who calls, before it is known whose certificate that is."""
    return Actor(id=caller.fingerprint, origin=caller.origin, certificate=caller.fingerprint)


def _raw_object(method: Method | None, args: Mapping[str, Any]) -> Object:
    """What a call is about, before its arguments were checked."""
    kind = method.object_kind if method else ""
    name, id = (given if kind and isinstance(given := args.get(key), str) else "" for key in ("name", "id"))
    return Object(kind=kind, name=name[:63], id=id[:36])
