"""Core's process: puts the parts together, serves its socket, and keeps watch over the host's health."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import sys
from contextlib import suppress
from uuid import UUID

import msgspec

from vmm import atomic, wire
from vmm.audit.client import AuditClient, Entry, Object
from vmm.core.autoupdate import AutoUpdate
from vmm.core.configuration import AppliedConfiguration
from vmm.core.db import Database
from vmm.core.dispatch import Audit, Dispatcher
from vmm.core.guard_methods import GuardHandlers
from vmm.core.guests import Guests, recorder
from vmm.core.health import Health, Platform, Verdict, judge
from vmm.core.host_methods import HostHandlers
from vmm.core.identities import Identities
from vmm.core.identity_methods import IdentityHandlers
from vmm.core.locks import Locks
from vmm.core.machine_methods import MachineHandlers
from vmm.core.methods import Handlers
from vmm.core.permissions import Permissions
from vmm.core.recovery import Recovery
from vmm.core.updates import UpdateClient
from vmm.errors import Unavailable, UserError
from vmm.guard.engine import GUARD
from vmm.hypervisor.driver import LibvirtHypervisor
from vmm.hypervisor.types import Domain, Hypervisor
from vmm.machines.changes import Changes
from vmm.machines.holds import Holds
from vmm.machines.host import Host
from vmm.machines.nvram import Nvram
from vmm.machines.power import Power
from vmm.machines.probe import Probe
from vmm.machines.service import Machines
from vmm.machines.states import States
from vmm.notify import notify
from vmm.paths import CORE_SOCKET, CORE_STATE
from vmm.volumes import files
from vmm.volumes.importer import ConfinedImporter
from vmm.volumes.service import Volumes

API_USER = "holdfast-api"
GUARD_USER = "holdfast-guard"
HEALTH_FILE = CORE_SOCKET.with_name("health.json")
_HEALTH_INTERVAL_S = 30.0
# Shorter than systemd's patience; uploads and conversions that take longer are undone.
_STOP_GRACE_S = 20.0


class Watch:
    """The health of the host: computed when asked and now and then, kept in a file for the console."""

    def __init__(self, platform: Platform, hypervisor: Hypervisor, machines: Machines, audit: AuditClient) -> None:
        self._platform = platform
        self._hypervisor = hypervisor
        self._machines = machines
        self._audit = audit
        self._reported: set[UUID] = set()

    async def health(self) -> Health:
        """Run all checks. An unknown domain seen for the first time is put on record."""
        verdicts = await asyncio.to_thread(self._platform.verdicts)
        verdicts["audit"], verdicts["audit-anchor"] = await self._audit_verdicts()
        verdicts["libvirt"] = (True, "connected") if self._hypervisor.connected else (False, "does not answer")
        verdicts["unknown-domains"] = await self._unknown_verdict()
        return judge(verdicts)

    async def keep(self) -> None:
        """Write the health file for ever."""
        while True:
            content = msgspec.json.encode(await self.health())
            with suppress(OSError):
                await asyncio.to_thread(atomic.write, HEALTH_FILE, content, mode=0o644)
            await asyncio.sleep(_HEALTH_INTERVAL_S)

    async def _audit_verdicts(self) -> tuple[Verdict, Verdict]:
        try:
            answer = await self._audit.health()
        except Unavailable as error:
            return (False, error.message), (False, error.message)
        anchored, failure = answer["anchored"], answer["anchor_failure"]
        said = f"by {answer['anchor']} up to record {anchored}" if anchored else "soon after the start"
        # Hosts that were installed before there was fs-verity have a volume without it.
        unprotected = f"; sealed segments are not under fs-verity: {why}" if (why := answer["unprotected"]) else ""
        return (bool(answer["ok"]), f"{answer['seq']} records{unprotected}"), (not failure, failure or said)

    async def _unknown_verdict(self) -> Verdict:
        try:
            unknown = await self._machines.unknown()
        except UserError as error:
            return False, error.message
        for domain in unknown:
            if domain.uuid not in self._reported and await report_unknown(self._audit, domain):
                self._reported.add(domain.uuid)
        names = ", ".join(f"{domain.name} ({domain.uuid})" for domain in unknown)
        return not unknown, f"running without being a machine here: {names}" if unknown else "none"


async def report_unknown(audit: Audit, domain: Domain) -> bool:
    """Put on record that something runs which is no machine of ours; whether that worked."""
    entry = Entry(
        type="machine.unknown",
        outcome="failure",
        reason="a domain runs that is not, or not as it is, in core's database",
        object=Object(kind="machine", id=str(domain.uuid), name=domain.name),
    )
    try:
        await audit.append(entry)
    except Unavailable as error:
        print(f"core: unknown domain {domain.uuid}; not recorded: {error.message}", file=sys.stderr, flush=True)
        return False
    return True


async def serve() -> None:
    """Run core until SIGTERM. Guests run on. Raises: UserError when its state cannot be opened."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    files.make_directory(CORE_STATE)
    database = Database(CORE_STATE / "core.db")
    hypervisor = LibvirtHypervisor()
    configuration = AppliedConfiguration()
    audit = AuditClient()
    volumes = Volumes(database, CORE_STATE, ConfinedImporter())
    host, nvram = Host(), Nvram(CORE_STATE / "nvram")
    states = States(database, hypervisor, CORE_STATE / "saved", volumes.path, nvram, recorder(audit))
    machines = Machines(database, hypervisor, host, nvram, volumes.path, configuration.networks, states)
    holds, locks = Holds(machines, hypervisor, database), Locks(database)
    await locks.load()
    await volumes.recover()
    await machines.recover()
    identities = Identities(configuration, database)
    await identities.publish()
    try:
        await hypervisor.connect()
    except Unavailable as error:
        print(f"core: {error.message}; trying on", file=sys.stderr, flush=True)
    await holds.enforce()
    watch = Watch(Platform(), hypervisor, machines, audit)
    handlers = Handlers(configuration, volumes, machines, audit, watch.health, Recovery(), identities)
    updater = UpdateClient()
    guests = Guests(machines, hypervisor, audit)
    probe = Probe(database, hypervisor, host, nvram, machines, CORE_STATE / "probe")
    machine_handlers = MachineHandlers(machines, Power(machines, hypervisor), Changes(machines, database))
    permissions = Permissions()
    methods = handlers.table() | machine_handlers.table() | HostHandlers(updater, guests, probe).table()
    methods |= GuardHandlers(database, holds, locks).table() | IdentityHandlers(identities, permissions).table()
    dispatcher = Dispatcher(
        *(methods, permissions, identities, audit, handlers.identify),
        peers=frozenset({0, os.geteuid(), *_uid(API_USER)}),
        locked=locks.check,
        services=dict.fromkeys(_uid(GUARD_USER), GUARD),
    )
    identities.on_change = locks.on_lock = dispatcher.recheck
    server = await wire.serve(CORE_SOCKET, dispatcher.handle, mode=0o666)
    automatic = AutoUpdate(configuration, updater, dispatcher.perform)
    keeping = [asyncio.create_task(work) for work in (watch.keep(), automatic.keep())]
    guests.begin(dispatcher.perform)
    notify()
    await stop.wait()
    server.close()
    for task in keeping:
        task.cancel()
    await guests.close()
    await dispatcher.close(_STOP_GRACE_S)
    await machines.close()
    await hypervisor.close()
    database.close()


def _uid(user: str) -> list[int]:
    """The uid of a service's user, if there is one."""
    try:
        return [pwd.getpwnam(user).pw_uid]
    except KeyError:
        return []
