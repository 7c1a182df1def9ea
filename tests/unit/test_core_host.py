"""Updates, restarts and the gate's probe through core's socket."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import msgspec
import pytest

from tests.unit.test_core_rig import Core, fingerprint, running
from vmm import wire
from vmm.audit.client import Entry
from vmm.core.db import VERSION, Database
from vmm.core.permissions import MATRIX
from vmm.core.updates import UpdateClient
from vmm.errors import Conflict, Forbidden, NotFound, Unavailable, UserError
from vmm.hypervisor.types import State
from vmm.machines.types import MachineSpec
from vmm.update.types import Status
from vmm.volumes.types import MIB

IDLE = Status("1.0.0", 1, 1, "tpm", "idle")


def as_root(monkeypatch: pytest.MonkeyPatch, uid: int = 0) -> None:
    monkeypatch.setattr(wire.Channel, "peer", property(lambda _: wire.Peer(1, uid, uid)))


@pytest.mark.parametrize(
    ("method", "args", "sent"),
    [
        ("check", {}, {"override_expiry": False, "source": ""}),
        ("check", {"source": "bundle", "override_expiry": True}, {"override_expiry": True, "source": "bundle"}),
        ("download", {}, {"version": None, "retry_failed": False}),
        ("download", {"version": "1.2.0", "retry_failed": True}, {"version": "1.2.0", "retry_failed": True}),
        ("apply", {}, {}),
        ("cancel", {}, {}),
        ("rollback", {}, {}),
        ("status", {}, {}),
    ],
)
def test_what_the_updater_hears(tmp_path: Path, method: str, args: dict[str, Any], sent: dict[str, Any]) -> None:
    async def call() -> None:
        async with running(tmp_path) as core:
            result = await core.call(f"update.{method}", **args)
            if method not in ("status", "cancel"):
                who = {"id": "admin-1", "role": "admin", "certificate": fingerprint("admin")}
                actor = who | {"origin": "192.0.2.9:4711"}
                sent.update(caller={"actor": actor, "request": "r1"}, wait=True)
            assert core.updater.calls == [(method, sent)]
            assert msgspec.convert(result, Status) == core.updater.status
            phases = [entry.phase for entry in core.audit.entries]
            assert phases == (["outcome"] if method == "status" else ["intent", "outcome"])

    asyncio.run(call())


def test_refusals_of_the_updater_reach_the_caller_and_the_trail(tmp_path: Path) -> None:
    async def call() -> None:
        async with running(tmp_path) as core:
            core.updater.refusals["apply"] = Conflict("nothing is downloaded", hint="download first")
            with pytest.raises(Conflict, match="nothing is downloaded") as refused:
                await core.call("update.apply")
            assert refused.value.hint == "download first"
            assert core.audit.entries[-1].reason == "nothing is downloaded"
            assert await core.call("update.history", "auditor") == [{"version": "1.0.0"}]
            (tmp_path / "update.sock").unlink()
            with pytest.raises(Unavailable, match=r"behind update\.sock does not answer"):
                await core.call("update.status")
            for args, text in (({"version": "1.2"}, "version: "), ({"source": "x"}, "source: ")):
                method = "update.download" if "version" in args else "update.check"
                with pytest.raises(UserError) as wrong:
                    await core.call(method, **args)
                assert wrong.value.message.startswith(text)

    asyncio.run(call())


def test_a_bundle_is_handed_on(tmp_path: Path) -> None:
    async def upload() -> None:
        async with running(tmp_path) as core:
            content = bytes(range(256)) * 16 * 1024
            async with await core.open("update.import", length=len(content)) as channel:
                await channel.send_data(content)
                await channel.send(wire.Kind.END)
                assert msgspec.convert(await channel.result(), Status) == IDLE
            assert core.updater.bundle == content
            assert [method for method, _ in core.updater.calls] == ["import"]
            core.updater.bundle = b""
            async with await core.open("update.import", length=len(content) + 1) as channel:
                await channel.send_data(content)
                await channel.send(wire.Kind.END)
                with pytest.raises(UserError, match="^length: the bundle is longer or shorter"):
                    await channel.result()
            assert core.updater.bundle == b""
            # One that is broken off never ends for the updater.
            async with await core.open("update.import", length=9) as channel:
                await channel.send_data(b"a part")
            while core.audit.said().count(("update.import", "outcome", "failure")) < 2:
                await asyncio.sleep(0.01)
            assert core.updater.bundle == b"" and "broken off" in core.audit.entries[-1].reason
            # One that is refused need not be sent to its end.
            core.updater.refusals["import"] = Unavailable("no space is left")
            channel = await core.open("update.import", length=1 << 30)
            answer = asyncio.create_task(channel.result())
            with pytest.raises(Unavailable, match="no space is left"):
                while not answer.done():
                    await channel.send_data(bytes(MIB))
                await answer
            await channel.close()

    asyncio.run(upload())


def test_a_job_is_told_to_run_until_it_has_ended(tmp_path: Path) -> None:
    """Also while the updater is between two phases. A job that ends at once is told with its end."""

    async def begin() -> None:
        async with running(tmp_path) as core:
            end = core.updater.gates["apply"] = asyncio.Event()
            assert (await core.call("update.apply"))["phase"] == "writing"
            assert (await core.call("update.status"))["phase"] == "writing"
            core.updater.status = msgspec.structs.replace(IDLE, phase="verifying")
            assert (await core.call("update.status"))["phase"] == "verifying"
            with pytest.raises(Conflict, match="the updater is writing"):
                await core.call("host.reboot")
            core.updater.status = msgspec.structs.replace(IDLE, phase="installed", installed="1.1.0")
            end.set()
            async with asyncio.timeout(5):
                while (await core.call("update.status"))["phase"] != "installed":
                    await asyncio.sleep(0.01)

    asyncio.run(begin())


def test_a_silent_updater_is_not_waited_for(tmp_path: Path) -> None:
    async def call() -> None:
        async def sleep(_request: wire.Request, _channel: wire.Channel) -> None:
            await asyncio.sleep(60)

        async def nonsense(_request: wire.Request, _channel: wire.Channel) -> Any:
            return {"running": 1}

        socket = tmp_path / "update.sock"
        for handler, text in ((sleep, "did not answer within 0.05 s"), (nonsense, "is not understood: ")):
            server = await wire.serve(socket, handler)
            with pytest.raises(Unavailable, match=text):
                await UpdateClient(socket, timeout=0.05).status()
            server.close()

    asyncio.run(call())


async def make(core: Core, *names: str, **more: Any) -> None:
    for name in names:
        await core.call("machine.create", name=name, cpus=1, memory=64 * MIB, **more)
        await core.call("machine.start", name=name)


def test_a_restart_stops_guests_first(tmp_path: Path) -> None:
    async def restart() -> None:
        async with running(tmp_path) as core:
            await make(core, "a", "b")
            await core.call("machine.create", name="c", cpus=1, memory=64 * MIB)
            core.audit.entries.clear()
            result = await core.call("host.reboot")
            assert [(m["name"], m["how"]) for m in result["machines"]] == [("a", "shut-down"), ("b", "shut-down")]
            assert core.updater.calls == [("status", {}), ("reboot", {"how": "reboot"})]
            assert core.rig.hypervisor.domains == {}
            assert core.audit.said() == [
                ("host.reboot", "intent", "pending"),
                ("machine.stop", "event", "success"),
                ("machine.stop", "event", "success"),
                ("host.reboot", "outcome", "success"),
            ]
            assert core.audit.entries[1].actor.id == "holdfast" and core.audit.entries[1].object.name == "a"
            # What was done for the call carries its request.
            assert {entry.request for entry in core.audit.entries} == {"r1"}
            for name in ("a", "c"):
                with pytest.raises(Unavailable, match="the host is about to restart"):
                    await core.call("machine.start", name=name)
            await core.call("host.shutdown")
            assert core.updater.calls[-1] == ("reboot", {"how": "poweroff"})

    asyncio.run(restart())


def test_no_guest_stops_when_the_host_cannot(tmp_path: Path) -> None:
    async def restart() -> None:
        async with running(tmp_path) as core:
            await make(core, "a")
            core.updater.status = msgspec.structs.replace(IDLE, phase="writing", version="1.2.0")
            with pytest.raises(Conflict, match=r"is writing release 1\.2\.0"):
                await core.call("host.reboot")
            core.updater.refusals["status"] = Unavailable("gone")
            with pytest.raises(Unavailable, match="gone"):
                await core.call("host.reboot")
            assert len(core.rig.hypervisor.domains) == 1

    asyncio.run(restart())


def test_guests_start_again_when_the_restart_fails(tmp_path: Path) -> None:
    async def restart() -> None:
        async with running(tmp_path) as core:
            await make(core, "a")
            core.guests.begin(core.dispatcher.perform)
            core.updater.refusals["reboot"] = Unavailable("no way")
            with pytest.raises(Unavailable, match="no way"):
                await core.call("host.reboot")

            def started() -> list[Entry]:
                return [entry for entry in core.audit.entries if entry.type == "machine.start"][2:]

            async with asyncio.timeout(5):
                # The outcome is recorded last, when the domain runs already.
                while len(started()) < 2:
                    await asyncio.sleep(0.01)
            assert core.rig.hypervisor.domains and not await core.rig.machines.to_resume()
            assert [(entry.actor.id, entry.actor.role) for entry in started()] == [("holdfast", "system")] * 2

    asyncio.run(restart())


def test_only_root_may_speak_for_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = {method for method, roles in msgspec.json.decode(MATRIX.read_bytes()).items() if "system" in roles}
    assert {"host.stop-guests", "gate.probe"} <= allowed
    assert not {"volume.delete", "recovery.fetch", "audit.read", "update.rollback", "update.import"} & allowed

    async def calls() -> None:
        async with running(tmp_path) as core:
            await make(core, "a")
            for method in ("host.stop-guests", "gate.probe"):
                with pytest.raises(Forbidden, match=f"the role 'admin' may not call {method}"):
                    await core.call(method)
            as_root(monkeypatch)
            with pytest.raises(Forbidden, match="the role 'system' may not call volume.list"):
                await wire.call(core.socket, "volume.list")
            with pytest.raises(NotFound, match="no method"):
                await wire.call(core.socket, "host.format")
            with pytest.raises(UserError, match="uid: is not a known field"):
                await wire.call(core.socket, "host.stop-guests", {"uid": 0})
            (stopped,) = await wire.call(core.socket, "host.stop-guests")
            assert stopped["how"] == "shut-down" and core.rig.hypervisor.domains == {}
            assert core.audit.entries[-1].actor.role == "system" and core.audit.entries[-1].request
            core.dispatcher._peers = frozenset({901})
            as_root(monkeypatch, 901)
            with pytest.raises(UserError, match="caller: is missing"):
                await wire.call(core.socket, "host.stop-guests")

    asyncio.run(calls())


def test_the_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_root(monkeypatch)

    async def probe() -> None:
        async with running(tmp_path) as core:
            hypervisor, machines = core.rig.hypervisor, core.rig.machines
            hypervisor.output = [b"BdsDxe: starting\r\nHOLDFAST-", b"PROBE READY\r\n"]
            seen: list[tuple[State, list[object], list[object]]] = []
            resume = hypervisor.resume

            async def watched(uuid: UUID) -> None:
                assert len(hypervisor.consoles) == 1
                state = hypervisor.domains[uuid].state
                seen.append((state, list(await machines.unknown()), list(await machines.list_all())))
                await resume(uuid)

            monkeypatch.setattr(hypervisor, "resume", watched)
            result = await wire.call(core.socket, "gate.probe")
            assert result["ok"] is True and 0 <= result["seconds"] < 5
            assert seen == [(State.PAUSED, [], [])]
            assert hypervisor.domains == {} and hypervisor.consoles[0].closed
            (xml,) = hypervisor.documents
            root = ElementTree.fromstring(xml)
            assert root.findtext("seclabel[@type='static'][@model='dac']/label") == "+70000:kvm"
            assert root.find("devices/interface") is None
            assert not machines.own_domains
            for directory in ("probe", "nvram"):
                assert list((tmp_path / directory).iterdir()) == []
            assert core.audit.said() == [("gate.probe", "intent", "pending"), ("gate.probe", "outcome", "success")]
            # A machine gets the next uid, as after any other machine.
            await machines.create(MachineSpec("web", 1, 64 * MIB))
            assert (await machines.show("web")).uid == 70001

    asyncio.run(probe())


@pytest.mark.parametrize(
    ("output", "text", "hint"),
    [
        ([b"No bootable\x1b[2J device\r\n"], "was not ready within 1 s", "ended with: No bootable [2J device"),
        ([], "was not ready within 1 s", "said nothing"),
        ([b"HOLDFAST", b""], "ended before it was ready", "ended with: HOLDFAST"),
    ],
)
def test_a_probe_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: list[bytes], text: str, hint: str
) -> None:
    as_root(monkeypatch)

    async def probe() -> None:
        async with running(tmp_path) as core:
            core.rig.hypervisor.output = output
            with pytest.raises(Unavailable, match=text) as failed:
                await wire.call(core.socket, "gate.probe", {"args": {"timeout": 1}})
            assert hint in failed.value.hint
            assert core.rig.hypervisor.domains == {} and list((tmp_path / "probe").iterdir()) == []

    asyncio.run(probe())


def test_a_probe_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_root(monkeypatch)

    async def probe() -> None:
        async with running(tmp_path) as core:
            (tmp_path / "probe.raw").unlink()
            with pytest.raises(Unavailable, match="the probe's disk cannot be made: No such file"):
                await wire.call(core.socket, "gate.probe")
            core.rig.hypervisor.connected = False
            (tmp_path / "probe.raw").write_bytes(b"x")
            with pytest.raises(Unavailable, match="libvirt does not answer"):
                await wire.call(core.socket, "gate.probe")

    asyncio.run(probe())


def test_an_older_database_is_brought_up_and_a_newer_one_used_if_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "core.db"
    schema = Path(__file__).parents[2] / "vmm/core/schema-1.sql"
    with sqlite3.connect(path) as old:
        old.executescript(schema.read_text() + "PRAGMA user_version = 1;")
        old.execute("INSERT INTO machines VALUES ('1', 'web', '{}', 70000, 'now')")
    Database(path).close()
    with sqlite3.connect(path) as newer:
        assert newer.execute("SELECT power, tries FROM machines").fetchall() == [("off", 0)]
        assert newer.execute("PRAGMA user_version").fetchone() == (VERSION,)
        # A host may fall back to a release of version 2, which looks at no table that came later.
        assert newer.execute("SELECT oldest FROM host").fetchone() == (2,)
        newer.execute(f"PRAGMA user_version = {VERSION + 7}")
    Database(path).close()
    with sqlite3.connect(path) as newer:
        newer.execute("UPDATE host SET oldest = ?", (VERSION + 1,))
    with pytest.raises(UserError, match=f"this release knows {VERSION}"):
        Database(path)
