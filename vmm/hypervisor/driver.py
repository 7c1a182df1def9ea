"""Holdfast's connection to libvirt.

Calls run in a small pool of threads (libvirt releases the GIL); one native thread runs libvirt's event loop, so
keepalive and streams do not depend on ours. A connection that breaks, or on which a call exceeds its deadline, is
dropped and opened anew; guests do not notice.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID
from xml.etree import ElementTree

import libvirt

from vmm.errors import Conflict, NotFound, Unavailable, UserError
from vmm.hypervisor.console import StreamConsole
from vmm.hypervisor.domain import NAMESPACE
from vmm.hypervisor.types import Domain, Listener, State, Usage
from vmm.hypervisor.usage import usage_of

T = TypeVar("T")

URI = "qemu:///system"
# libvirtd serves this many requests of one connection at a time (max_client_requests); more would only queue there.
_THREADS = 4
_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT = 5, 3
_DEADLINE_S = 30.0
_START_DEADLINE_S = 120.0
_BACKOFF_FIRST_S, _BACKOFF_MOST_S = 0.2, 5.0

_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: State.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: State.RUNNING,
    libvirt.VIR_DOMAIN_PAUSED: State.PAUSED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: State.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: State.STOPPING,
    libvirt.VIR_DOMAIN_CRASHED: State.CRASHED,
}
_EVENT_STATES = {
    libvirt.VIR_DOMAIN_EVENT_STARTED: State.RUNNING,
    libvirt.VIR_DOMAIN_EVENT_RESUMED: State.RUNNING,
    libvirt.VIR_DOMAIN_EVENT_SUSPENDED: State.PAUSED,
    libvirt.VIR_DOMAIN_EVENT_PMSUSPENDED: State.PAUSED,
    libvirt.VIR_DOMAIN_EVENT_SHUTDOWN: State.STOPPING,
    libvirt.VIR_DOMAIN_EVENT_CRASHED: State.CRASHED,
    libvirt.VIR_DOMAIN_EVENT_STOPPED: State.STOPPED,
}
_CRASHES = {
    # Its QEMU went without saying that the guest shut down.
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_FAILED),
    (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED),
    (libvirt.VIR_DOMAIN_EVENT_CRASHED, libvirt.VIR_DOMAIN_EVENT_CRASHED_PANICKED),
}
_BROKEN = {
    libvirt.VIR_ERR_INTERNAL_ERROR,
    libvirt.VIR_ERR_RPC,
    libvirt.VIR_ERR_SYSTEM_ERROR,
    libvirt.VIR_ERR_NO_CONNECT,
    libvirt.VIR_ERR_INVALID_CONN,
}


class LibvirtHypervisor:
    """The Hypervisor of a real host; make one a process, then ``await connect()``."""

    def __init__(self, uri: str = URI) -> None:
        self._uri = uri
        self._loop = asyncio.get_running_loop()
        self._pool = self._new_pool()
        self._listeners: list[Listener] = []
        self._consoles: weakref.WeakSet[StreamConsole] = weakref.WeakSet()
        self._connection: Any = None
        self._connector: asyncio.Task[None] | None = None
        self._closed = False
        _start_event_thread()

    @property
    def connected(self) -> bool:
        """Whether there is a connection that was not found broken."""
        return self._connection is not None

    def subscribe(self, listener: Listener) -> None:
        """Have ``listener`` called, in the event loop, at every change of a domain's state."""
        self._listeners.append(listener)

    async def connect(self, deadline: float = _DEADLINE_S) -> None:
        """Wait for the first connection, up to ``deadline`` seconds; attempts go on afterwards. Raises: Unavailable."""
        self._reconnect()
        assert self._connector is not None
        try:
            await asyncio.wait_for(asyncio.shield(self._connector), deadline)
        except TimeoutError:
            raise Unavailable("libvirt does not answer") from None

    async def close(self) -> None:
        """Drop the connection for good. Guests run on."""
        self._closed = True
        if self._connector is not None:
            self._connector.cancel()
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(libvirt.libvirtError, TimeoutError):
                await asyncio.wait_for(self._loop.run_in_executor(self._pool, connection.close), 5)
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def start(self, xml: str, *, paused: bool = False) -> None:
        """Start a transient domain, its XML checked against libvirt's schema.

        Returns once it runs or, ``paused``, waits for resume().
        """
        flags = libvirt.VIR_DOMAIN_START_VALIDATE | (libvirt.VIR_DOMAIN_START_PAUSED if paused else 0)

        def start(connection: Any) -> None:
            connection.createXML(xml, flags)

        await self._call(start, deadline=_START_DEADLINE_S)

    async def resume(self, uuid: UUID) -> None:
        """Let a paused domain run. Raises: NotFound when it is gone."""
        await self._on_domain(uuid, lambda domain: domain.resume())

    async def pause(self, uuid: UUID) -> None:
        """Let a domain's processors stand still until resume(). Raises: NotFound when it does not run."""
        await self._on_domain(uuid, lambda domain: domain.suspend())

    async def reset(self, uuid: UUID) -> None:
        """Press the reset button. Raises: NotFound when it does not run."""
        await self._on_domain(uuid, lambda domain: domain.reset())

    async def usage(self, uuid: UUID) -> Usage:
        """What a domain uses. Raises: NotFound when it does not run."""
        wanted = (
            libvirt.VIR_DOMAIN_STATS_CPU_TOTAL
            | libvirt.VIR_DOMAIN_STATS_BALLOON
            | libvirt.VIR_DOMAIN_STATS_BLOCK
            | libvirt.VIR_DOMAIN_STATS_INTERFACE
        )

        def ask(connection: Any) -> Usage:
            answers = connection.domainListGetStats([connection.lookupByUUID(uuid.bytes)], wanted)
            if not answers:
                raise NotFound("the machine does not run")
            return usage_of(answers[0][1])

        return await self._call(ask)

    async def shutdown(self, uuid: UUID) -> None:
        """Press the guest's power button. Raises: NotFound when it does not run."""
        await self._on_domain(uuid, lambda domain: domain.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN))

    async def destroy(self, uuid: UUID) -> None:
        """End a domain at once; returns when its QEMU is gone. Raises: NotFound when it does not run."""
        await self._on_domain(uuid, lambda domain: domain.destroy())

    async def save(self, uuid: UUID, path: Path, limit: float) -> None:
        """Write a domain's memory and devices to ``path``, an empty file, and end it.

        When it fails or takes more than ``limit`` seconds, the domain runs on. Raises: NotFound. A save takes a thread
        of ours and a call of libvirtd's until it ends, so not more than two should run at a time.
        """

        def save(connection: Any) -> None:
            # RUNNING: the file says that it ran, whatever becomes of that when it is restored.
            connection.lookupByUUID(uuid.bytes).saveFlags(str(path), None, libvirt.VIR_DOMAIN_SAVE_RUNNING)

        saving = self._loop.create_task(self._call(save, deadline=limit + _DEADLINE_S))
        await asyncio.wait({saving}, timeout=limit)
        late = not saving.done()
        if late:
            with suppress(UserError):  # it ended just now, one way or the other
                await self._on_domain(uuid, lambda domain: domain.abortJob())
        try:
            await saving
        except Unavailable:
            if late:
                raise Unavailable("it was not saved in time") from None
            raise

    async def restore(self, uuid: UUID, path: Path, limit: float) -> None:
        """Start a domain from what save() wrote; it waits for resume(). ``limit`` is in seconds.

        Raises: Conflict when nothing can be made of the file; Unavailable when that is not known.
        """

        def restore(connection: Any) -> None:
            try:
                xml = ElementTree.fromstring(connection.saveImageGetXMLDesc(str(path)))  # noqa: S314
                if xml.findtext("uuid") != str(uuid):
                    raise Conflict("it is the state of another machine")
                connection.restoreFlags(str(path), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
            except libvirt.libvirtError as error:
                if _is_broken(error):
                    raise
                raise Conflict(f"libvirt cannot restore it: {error.get_error_message()}") from error

        await self._call(restore, deadline=limit)

    async def state(self, uuid: UUID) -> State:
        """What a domain does now; STOPPED when libvirt does not know it."""
        try:
            return await self._on_domain(uuid, _state_of)
        except NotFound:
            return State.STOPPED

    async def list(self) -> dict[UUID, Domain]:
        """Every domain that runs, ours or not."""

        def list_domains(connection: Any) -> dict[UUID, Domain]:
            domains = (
                _domain_of(domain) for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            )
            return {domain.uuid: domain for domain in domains if domain is not None}

        return await self._call(list_domains)

    async def open_console(self, uuid: UUID) -> StreamConsole:
        """Attach to the serial console. Raises: NotFound; Conflict while someone else is attached."""

        def open_stream(connection: Any) -> Any:
            domain = connection.lookupByUUID(uuid.bytes)
            stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
            # SAFE takes an exclusive lock on the console.
            domain.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_SAFE)
            return stream

        console = StreamConsole(await self._call(open_stream))
        self._consoles.add(console)
        return console

    async def _on_domain(self, uuid: UUID, action: Callable[[Any], T]) -> T:
        return await self._call(lambda connection: action(connection.lookupByUUID(uuid.bytes)))

    async def _call(self, work: Callable[[Any], T], deadline: float = _DEADLINE_S) -> T:
        """Run ``work(connection)`` in a thread. Raises: NotFound, Conflict, Unavailable."""
        connection = self._connection
        if connection is None:
            raise Unavailable("libvirt does not answer", hint="It is being reconnected; try again in a few seconds.")
        try:
            return await asyncio.wait_for(self._loop.run_in_executor(self._pool, work, connection), deadline)
        except TimeoutError:
            # The thread stays stuck in libvirt: leave it, and whatever it holds, behind.
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()
            self._drop(connection)
            raise Unavailable(f"libvirt did not answer within {deadline:.0f} s") from None
        except libvirt.libvirtError as error:
            if _is_broken(error):
                self._drop(connection)
            raise _user_error(error) from error

    def _drop(self, connection: Any) -> None:
        """Forget a broken connection (once) and open another. Runs in the event loop."""
        if connection is not self._connection or self._closed:
            return
        self._connection = None
        # libvirt tells a stream nothing when its connection breaks.
        for console in list(self._consoles):
            console.end()
        self._loop.run_in_executor(None, _close_quietly, connection)
        self._reconnect()

    def _reconnect(self) -> None:
        if not self._closed and (self._connector is None or self._connector.done()):
            self._connector = self._loop.create_task(self._connect_until_done())

    async def _connect_until_done(self) -> None:
        wait = _BACKOFF_FIRST_S
        while True:
            try:
                self._connection = await asyncio.wait_for(
                    self._loop.run_in_executor(self._pool, self._open), _DEADLINE_S
                )
            except (libvirt.libvirtError, TimeoutError):
                await asyncio.sleep(wait)
                wait = min(wait * 2, _BACKOFF_MOST_S)
                continue
            # Whatever happened in between was missed.
            self._notify(None, State.RUNNING, False)
            return

    def _open(self) -> Any:
        connection = libvirt.open(self._uri)
        connection.setKeepAlive(_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT)
        connection.registerCloseCallback(self._on_close, None)
        connection.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_event, None)
        return connection

    def _on_close(self, connection: Any, _reason: int, _opaque: Any) -> None:
        """Called in libvirt's thread."""
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._drop, connection)

    def _on_event(self, _connection: Any, domain: Any, event: int, detail: int, _opaque: Any) -> None:
        """Called in libvirt's thread."""
        state = _EVENT_STATES.get(event)
        if state is not None:
            uuid = UUID(bytes=domain.UUID())
            with suppress(RuntimeError):  # the loop is closing: nobody listens any more
                self._loop.call_soon_threadsafe(self._notify, uuid, state, (event, detail) in _CRASHES)

    def _notify(self, uuid: UUID | None, state: State, crashed: bool) -> None:
        for listener in self._listeners:
            listener(uuid, state, crashed)

    @staticmethod
    def _new_pool() -> concurrent.futures.ThreadPoolExecutor:
        return concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="libvirt")


@functools.cache
def _start_event_thread() -> None:
    """libvirt's event loop: registered once before the first connection, never stopped."""
    # Errors are raised; libvirt need not also print them.
    libvirt.registerErrorHandler(lambda *_: None, None)
    libvirt.virEventRegisterDefaultImpl()

    def run() -> None:
        while True:
            with suppress(libvirt.libvirtError):
                libvirt.virEventRunDefaultImpl()

    threading.Thread(target=run, name="libvirt-events", daemon=True).start()


def _close_quietly(connection: Any) -> None:
    with suppress(libvirt.libvirtError):
        connection.close()


def _state_of(domain: Any) -> State:
    return _STATES.get(domain.state()[0], State.STOPPED)


def _domain_of(domain: Any) -> Domain | None:
    """What libvirt says of a domain; None when it ended while we asked."""
    try:
        uuid, name, state = UUID(bytes=domain.UUID()), domain.name(), _state_of(domain)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise
    spec_sha256, uid = None, None
    try:
        element = ElementTree.fromstring(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, NAMESPACE, 0))  # noqa: S314
        spec_sha256, uid = element.get("spec-sha256"), int(element.get("uid", ""))
    except (libvirt.libvirtError, ElementTree.ParseError, ValueError):
        pass  # not ours: it carries no such metadata
    return Domain(uuid, name, state, spec_sha256, uid)


def _is_broken(error: libvirt.libvirtError) -> bool:
    return error.get_error_domain() == libvirt.VIR_FROM_RPC or (
        error.get_error_code() in _BROKEN and error.get_error_domain() == libvirt.VIR_FROM_REMOTE
    )


def _user_error(error: libvirt.libvirtError) -> UserError:
    message = error.get_error_message() or "libvirt gave no reason"
    if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
        return NotFound("the machine does not run")
    if _is_broken(error):
        return Unavailable(f"the connection to libvirt broke: {message}")
    if error.get_error_code() in (libvirt.VIR_ERR_OPERATION_FAILED, libvirt.VIR_ERR_OPERATION_INVALID):
        return Conflict(f"libvirt refuses: {message}")
    return Unavailable(f"libvirt failed: {message}")
