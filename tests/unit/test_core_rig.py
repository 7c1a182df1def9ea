"""What the tests of core and machines share: a pretended hypervisor and audit daemon, a host, a configuration."""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from tests.unit import test_config_rig
from tests.unit.test_hypervisor_rig import FakeHypervisor
from vmm import wire
from vmm.audit.client import AuditClient, Entry
from vmm.audit.events import EVENTS
from vmm.audit.records import check
from vmm.config.types import Administrator, Configuration, Management, Operational
from vmm.core.configuration import AppliedConfiguration
from vmm.core.db import Database
from vmm.core.dispatch import Dispatcher
from vmm.core.guard_methods import GuardHandlers
from vmm.core.guests import Guests
from vmm.core.health import Health, judge
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
from vmm.machines.changes import Changes
from vmm.machines.holds import Holds
from vmm.machines.host import Host
from vmm.machines.nvram import Nvram
from vmm.machines.power import Power
from vmm.machines.probe import Probe
from vmm.machines.service import Machines
from vmm.machines.states import States
from vmm.update.types import Status
from vmm.volumes.service import Volumes
from vmm.volumes.types import MIB

ROLES = ("admin", "auditor", "operator", "user")


class FakeAudit:
    """An audit daemon that keeps entries in memory; ``refuse_from`` is the number of entries it takes.

    Like the real one it takes only what is registered for core.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.refuse_from = 1 << 30
        self.anchor_failure = self.unprotected = ""
        self.purges: list[dict[str, Any]] = []

    async def handle(self, request: wire.Request, _channel: wire.Channel) -> Any:
        if request.method == "append":
            if len(self.entries) >= self.refuse_from:
                raise Unavailable("the audit store is full")
            entry = msgspec.convert(request.params, Entry)
            check(entry)
            EVENTS.check(entry, "holdfast-core")
            self.entries.append(entry)
            return {"seq": len(self.entries)}
        if request.method == "read":
            number = request.params["after"] + 1
            return {"records": [{"seq": number}], "next": None, "reached": number}
        if request.method == "status":
            return {"records": len(self.entries), "rule": {"when_full": "overwrite"}}
        if request.method == "purge":
            self.purges.append(request.params)
            return {"first": 1, "last": 5, "lost": 2}
        if request.method == "checkpoint":
            return {"covers": len(self.entries)}
        anchor = {"anchored": len(self.entries), "anchor": "tpm", "anchor_failure": self.anchor_failure}
        anchor["unprotected"] = self.unprotected
        return {"ok": True, "seq": len(self.entries), "head": "", **anchor}

    def said(self) -> list[tuple[str, str, str]]:
        """(type, phase, outcome) of every entry."""
        return [(entry.type, entry.phase, entry.outcome) for entry in self.entries]


class FakeUpdater:
    """An updater that remembers calls and answers with ``status``; ``refusals`` are the answers of some methods,
    and ``gates`` what others wait for."""

    def __init__(self) -> None:
        self.status = Status("1.0.0", 1, 1, "tpm", "idle")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.refusals: dict[str, UserError] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.bundle = b""

    async def handle(self, request: wire.Request, channel: wire.Channel) -> Any:
        self.calls.append((request.method, request.params))
        if request.method in self.refusals:
            raise self.refusals[request.method]
        if request.method == "import":
            self.bundle = b"".join([chunk async for chunk in channel.data()])
        if request.method in self.gates:
            await self.gates[request.method].wait()
        return [{"version": "1.0.0"}] if request.method == "history" else self.status


def make_host(root: Path, *, memory: int = 4096 * MIB) -> Host:
    """A host with hardware virtualisation; ``memory`` is MemTotal."""
    for path, text in (
        ("proc/meminfo", f"MemTotal: {memory // 1024} kB\nMemFree: 1 kB\n"),
        ("proc/sys/kernel/random/boot_id", "first\n"),
        ("dev/kvm", ""),
        ("sys/module/kvm_amd/parameters/npt", "Y\n"),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return Host(root)


def certificate(who: str) -> str:
    """The certificate of a role's configured administrator, or of anybody else; one each."""
    return test_config_rig.certificate(who, "p256")


def fingerprint(who: str) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate(who))).hexdigest()


def configuration() -> Configuration:
    return Configuration(
        version=1,
        hostname="hf1",
        banner="",
        management=Management("eth0", "dhcp"),
        operational=(Operational("lan", "eth1"), Operational("dmz", "eth2")),
        administrators=tuple(Administrator(f"{role}-1", role, certificate(role)) for role in ROLES),  # type: ignore[arg-type]
    )


class Rig:
    """Machines and volumes over a pretended hypervisor."""

    def __init__(self, directory: Path, *, memory: int = 4096 * MIB) -> None:
        self.directory = directory
        self.recorded: list[tuple[str, str, str]] = []
        """(type, machine, reason) of every record of a saved state."""
        self.database = Database(directory / "core.db")
        self.hypervisor = FakeHypervisor()
        self.host = make_host(directory / "root", memory=memory)
        (directory / "template.fd").write_bytes(b"variables")
        self.nvram = Nvram(directory / "nvram", directory / "template.fd")
        self.volumes = Volumes(self.database, directory, _no_importer)
        self.networks = {"lan": "op-lan"}
        self.machines = self.new_machines()

    def new_machines(self) -> Machines:
        """The service as it is after a restart."""
        states = States(
            self.database, self.hypervisor, self.directory / "saved", self.volumes.path, self.nvram, self.record
        )
        return Machines(
            self.database,
            self.hypervisor,
            self.host,
            self.nvram,
            self.volumes.path,
            lambda: self.networks,
            states,
        )

    async def record(self, type: str, id: str, name: str, reason: str) -> None:
        self.recorded.append((type, name, reason))

    async def recover(self) -> None:
        await self.volumes.recover()
        await self.machines.recover()


async def _no_importer(source: int, target: int, format: Any, size: int) -> int:
    raise Unavailable("no image converter here")


class Core:
    """A running core, called as the API calls it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.rig = Rig(directory)
        self.audit = FakeAudit()
        self.socket = directory / "core.sock"
        self.configuration = directory / "config.json"
        self.configuration.write_bytes(msgspec.json.encode(configuration()))
        (directory / "recovery").mkdir()
        applied = AppliedConfiguration(self.configuration)
        audit = AuditClient(directory / "audit.sock")
        self.identities = Identities(applied, self.rig.database, directory / "pins.json")
        recovery = Recovery(directory / "recovery")
        self.handlers = Handlers(
            applied, self.rig.volumes, self.rig.machines, audit, self._health, recovery, self.identities
        )
        self.updater = FakeUpdater()
        updater = UpdateClient(directory / "update.sock", prompt=0.1)
        self.guests = Guests(self.rig.machines, self.rig.hypervisor, audit, waits=(0, 0.01, 0.01), look=0.01)
        (directory / "probe.raw").write_bytes(b"the probe")
        probe = Probe(
            *(self.rig.database, self.rig.hypervisor, self.rig.host, self.rig.nvram, self.rig.machines),
            *(directory / "probe", directory / "probe.raw"),
        )
        rig = self.rig
        machines = MachineHandlers(
            rig.machines, Power(rig.machines, rig.hypervisor), Changes(rig.machines, rig.database)
        )
        self.methods = self.handlers.table() | machines.table() | HostHandlers(updater, self.guests, probe).table()
        self.holds = Holds(rig.machines, rig.hypervisor, rig.database)
        self.now = 1_000_000.0
        self.locks = Locks(rig.database, lambda: self.now)
        self.methods |= GuardHandlers(rig.database, self.holds, self.locks).table()
        permissions = Permissions()
        self.methods |= IdentityHandlers(self.identities, permissions).table()
        self.dispatcher = Dispatcher(
            *(self.methods, permissions, self.identities, audit, self.handlers.identify, frozenset({0, os.geteuid()})),
            locked=self.locks.check,
        )
        self.identities.on_change = self.locks.on_lock = self.dispatcher.recheck

    async def call(self, method: str, role: str = "admin", /, **args: Any) -> Any:
        return await wire.call(self.socket, method, self.params(role, args))

    async def open(self, method: str, role: str = "admin", /, **args: Any) -> wire.Channel:
        return await wire.open_call(self.socket, method, self.params(role, args))

    def params(self, role: str, args: dict[str, Any]) -> dict[str, Any]:
        caller = {"fingerprint": fingerprint(role), "subject": "CN=x", "origin": "192.0.2.9:4711", "request_id": "r1"}
        return {"caller": caller, "args": args}

    async def _health(self) -> Health:
        return judge({"everything": (True, "fine")})


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Core]:
    core = Core(directory)
    await core.rig.recover()
    servers = [
        await wire.serve(directory / "audit.sock", core.audit.handle),
        await wire.serve(core.socket, core.dispatcher.handle),
        await wire.serve(directory / "update.sock", core.updater.handle),
    ]
    try:
        yield core
    finally:
        for server in servers:
            server.close()
        await core.guests.close()
        await core.rig.machines.close()
        core.rig.database.close()
