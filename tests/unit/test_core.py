"""Core over its socket: who may do what, and that nothing happens without its records."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_core_rig import ROLES, Core, configuration, fingerprint, running
from vmm import wire
from vmm.audit.throttle import BURST
from vmm.core.permissions import MATRIX, Permissions
from vmm.errors import Conflict, Forbidden, NotFound, Unavailable, UserError
from vmm.volumes.types import MIB


@pytest.fixture
def core(tmp_path: Path) -> Iterator[Core]:
    core = Core(tmp_path)
    yield core
    core.rig.database.close()


def test_matrix_and_methods_name_each_other(core: Core) -> None:
    assert Permissions().methods == set(core.methods)


def test_a_method_that_the_matrix_lacks_is_refused(tmp_path: Path) -> None:
    matrix = tmp_path / "permissions.json"
    matrix.write_text('{"version.read": ["admin"]}')
    Permissions(matrix).check("admin", "version.read")
    for role, method in (("admin", "machine.start"), ("auditor", "version.read"), ("", "version.read")):
        with pytest.raises(Forbidden):
            Permissions(matrix).check(role, method)


@pytest.mark.parametrize("role", ROLES)
def test_every_method_obeys_the_matrix(tmp_path: Path, role: str) -> None:
    """Arguments are wrong on purpose: a caller who may not call hears only that, one who may, what is wrong."""
    allowed = msgspec.json.decode(MATRIX.read_bytes())

    async def call_all() -> None:
        async with running(tmp_path) as core:
            for method in core.methods:
                with pytest.raises(UserError) as refused:
                    await core.call(method, role, nonsense=1)
                if role in allowed[method]:
                    assert refused.value.message == "nonsense: is not a known field"
                else:
                    assert isinstance(refused.value, Forbidden) and f"may not call {method}" in refused.value.message
                entry = core.audit.entries.pop()
                assert (entry.type, entry.phase, entry.outcome) == (method, "outcome", "failure")
                assert (entry.actor.id, entry.actor.role, entry.reason) == (f"{role}-1", role, refused.value.message)
                assert core.audit.entries == []

    asyncio.run(call_all())


def test_strangers_and_unknown_methods_are_refused_on_record(tmp_path: Path) -> None:
    async def calls() -> None:
        async with running(tmp_path) as core:
            with pytest.raises(Forbidden, match="no identity has this certificate"):
                await core.call("machine.delete", "nobody", name="web")
            with pytest.raises(NotFound, match="no method 'machine.format'"):
                await core.call("machine.format")
            stranger, unknown = core.audit.entries
            assert (stranger.actor.id, stranger.object.name) == (fingerprint("nobody"), "web")
            assert (unknown.type, unknown.outcome) == ("core.unknown-method", "failure")

    asyncio.run(calls())


def test_other_peers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def calls() -> None:
        async with running(tmp_path) as core:
            monkeypatch.setattr(wire.Channel, "peer", property(lambda _: wire.Peer(1, 70000, 70000)))
            for _ in range(20):
                with pytest.raises(Forbidden, match="uid 70000 may not call core"):
                    await core.call("version.read")
            monkeypatch.undo()
            # Some of many go on record, and how many were left out; nobody else's calls wait for that.
            await core.call("version.read")
            await core.dispatcher.close(1)
            found = [entry for entry in core.audit.entries if entry.type == "core.foreign-peer"]
            said = {(entry.phase, entry.outcome, entry.actor.id, entry.reason) for entry in found}
            assert said == {("outcome", "failure", "uid 70000", "uid 70000 may not call core")}
            assert [entry.extra for entry in found] == [{}] * BURST + [{"suppressed": 20 - BURST - 1}]

    asyncio.run(calls())


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("volume.create", {"name": "v"}, "size: is missing"),
    ("volume.create", {"name": "V", "size": MIB}, "name: "),
    ("volume.create", {"name": "v\n", "size": MIB}, "name: "),
    ("volume.create", {"name": "../v", "size": MIB}, "name: "),
    ("volume.create", {"name": "v", "size": MIB + 1}, "size: "),
    ("volume.create", {"name": "v", "size": 1 << 60}, "size: "),
    ("volume.create", {"name": "v", "size": "1M"}, "size: "),
    ("machine.create", {"name": "m", "cpus": 0, "memory": 64 * MIB}, "cpus: "),
    ("machine.create", {"name": "m", "cpus": 1, "memory": 63 * MIB}, "memory: "),
    ("machine.create", {"name": "m", "cpus": 1, "memory": 64 * MIB, "xml": ""}, "xml: is not a known field"),
    ("machine.create", {"name": "m", "cpus": 1, "memory": 64 * MIB, "disks": [{}]}, "disks[0].volume: is missing"),
    ("machine.create", {"name": "m", "cpus": 1, "memory": 64 * MIB, "networks": [{"network": "x y"}]}, "networks[0]."),
    ("machine.stop", {"name": "m", "timeout": 0}, "timeout: "),
    ("volume.upload", {"name": "v", "format": "vmdk", "length": 1}, "format: "),
    ("audit.read", {"limit": 1001}, "limit: "),
]


@pytest.mark.parametrize(("method", "args", "text"), WRONG, ids=[f"{m} {t}" for m, _, t in WRONG])
def test_wrong_arguments_are_named(tmp_path: Path, method: str, args: dict[str, Any], text: str) -> None:
    async def call() -> None:
        async with running(tmp_path) as core:
            with pytest.raises(UserError) as refused:
                await core.call(method, **args)
            assert refused.value.status == 400 and refused.value.message.startswith(text)

    asyncio.run(call())


def test_the_records_of_a_machines_life(tmp_path: Path) -> None:
    async def life() -> None:
        async with running(tmp_path) as core:
            await core.call("volume.create", name="v", size=MIB)
            spec: dict[str, Any] = {"name": "web", "cpus": 1, "memory": 64 * MIB, "disks": [{"volume": "v"}]}
            made = await core.call("machine.create", **spec)
            await core.call("machine.start", "operator", name="web")
            assert (await core.call("machine.show", "auditor", name="web"))["state"] == "running"
            with pytest.raises(Conflict):
                await core.call("machine.delete", name="web")
            intent, outcome = [entry for entry in core.audit.entries if entry.type == "machine.create"]
            assert (intent.phase, intent.outcome, intent.object.id) == ("intent", "pending", "")
            assert intent.extra["args"]["disks"] == [{"volume": "v"}]
            assert (outcome.object.id, outcome.object.name, outcome.request) == (made["uuid"], "web", "r1")
            start = [entry for entry in core.audit.entries if entry.type == "machine.start"]
            assert [entry.object.id for entry in start] == [made["uuid"]] * 2
            assert start[0].actor.role == "operator" and start[0].actor.origin == "192.0.2.9:4711"
            assert core.audit.said()[6:] == [
                ("machine.show", "outcome", "success"),
                ("machine.delete", "intent", "pending"),
                ("machine.delete", "outcome", "failure"),
            ]

    asyncio.run(life())


def test_without_audit_nothing_is_done(tmp_path: Path) -> None:
    async def calls() -> None:
        async with running(tmp_path) as core:
            core.audit.refuse_from = 0
            with pytest.raises(Unavailable, match="audit store is full"):
                await core.call("volume.create", name="v", size=MIB)
            with pytest.raises(Unavailable):
                await core.call("volume.list")
            with pytest.raises(Unavailable):
                await core.call("volume.delete", "user", name="v")
            assert await core.rig.volumes.list_all() == []
            core.audit.refuse_from = 1
            with pytest.raises(Unavailable, match="volume.create was done but could not be recorded"):
                await core.call("volume.create", name="v", size=MIB)
            assert [volume.name for volume in await core.rig.volumes.list_all()] == ["v"]
            core.audit.refuse_from = 2
            with pytest.raises(Unavailable, match="volume.create failed but could not be recorded"):
                await core.call("volume.create", name="v", size=MIB)

    asyncio.run(calls())


def test_a_call_is_finished_although_its_caller_went_away(tmp_path: Path) -> None:
    async def go_away() -> None:
        async with running(tmp_path) as core:
            await core.call("machine.create", name="web", cpus=1, memory=64 * MIB)
            core.rig.hypervisor.delay = 0.05
            await (await core.open("machine.start", name="web")).close()
            while core.audit.said()[-1][1] != "outcome" or core.audit.said()[-1][0] != "machine.start":
                await asyncio.sleep(0.01)
            assert (await core.call("machine.show", name="web"))["state"] == "running"

    asyncio.run(go_away())


def test_what_stopping_cuts_short_is_recorded(tmp_path: Path) -> None:
    async def stop() -> None:
        async with running(tmp_path) as core:
            await core.call("machine.create", name="web", cpus=1, memory=64 * MIB)
            core.rig.hypervisor.polite = False
            await core.call("machine.start", name="web")
            call = asyncio.create_task(core.call("machine.stop", name="web"))
            console = await core.open("machine.console", name="web")
            await console.receive()
            await core.rig.hypervisor.pressed.wait()
            await core.dispatcher.close(0.05)
            ended = {entry.type: entry for entry in core.audit.entries if entry.phase == "outcome"}
            for method in ("machine.stop", "machine.console"):
                assert ended[method].outcome == "failure" and "the service stopped" in ended[method].reason
            await console.close()
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)

    asyncio.run(stop())


@pytest.mark.parametrize("end", ["client", "client-lost", "guest"])
def test_console(tmp_path: Path, end: str) -> None:
    async def attach() -> None:
        async with running(tmp_path) as core:
            machine = await core.call("machine.create", name="web", cpus=1, memory=64 * MIB)
            with pytest.raises(Conflict, match="does not run"):
                await core.call("machine.console", name="web")
            await core.call("machine.start", name="web")
            channel = await core.open("machine.console", "operator", name="web")
            kind, greeting = await channel.receive()
            assert kind is wire.Kind.DATA
            assert msgspec.json.decode(greeting) == {"machine": "web", "uuid": machine["uuid"]}
            await channel.send_data(b"hello")
            assert await channel.receive() == (wire.Kind.DATA, b"HELLO")
            assert core.audit.said()[-1] == ("machine.console", "intent", "pending")
            if end == "guest":
                await core.call("machine.force-off", name="web")
            elif end == "client":
                await channel.send(wire.Kind.END)
            if end != "client-lost":
                assert await channel.result() == {}
            await channel.close()
            async with asyncio.timeout(5):
                while ("machine.console", "outcome", "success") not in core.audit.said():
                    await asyncio.sleep(0.01)
            assert core.rig.hypervisor.consoles[-1].closed

    asyncio.run(attach())


def test_an_upload_is_answered_while_its_sender_still_sends(tmp_path: Path) -> None:
    async def upload() -> None:
        async with running(tmp_path) as core:
            for role, error in (("operator", Forbidden), ("admin", Unavailable)):
                channel = await core.open("volume.upload", role, name="v", format="raw", length=1 << 40)
                answer = asyncio.create_task(channel.result())
                with pytest.raises(error):
                    while not answer.done():
                        await channel.send_data(bytes(MIB))
                    await answer
                await channel.close()
            async with await core.open("volume.upload", name="v", format="raw", length=MIB) as channel:
                await channel.send_data(bytes(MIB))
                await channel.send(wire.Kind.END)
                with pytest.raises(Unavailable, match="no image converter here"):
                    await channel.result()
            async with await core.open("volume.upload", name="v", format="raw", length=MIB) as channel:
                await channel.send_data(b"a part")
            while core.audit.said().count(("volume.upload", "outcome", "failure")) < 4:
                await asyncio.sleep(0.01)
            assert "broken off" in core.audit.entries[-1].reason
            assert list((core.directory / "staging").iterdir()) == []

    asyncio.run(upload())


def test_recovery_keys_are_handed_out_once(tmp_path: Path) -> None:
    async def fetch() -> None:
        async with running(tmp_path) as core:
            with pytest.raises(NotFound, match="has no recovery keys"):
                await core.call("recovery.fetch")
            directory = core.directory / "recovery"
            for name in ("data", "audit"):
                (directory / f"{name}.key").write_text(f"secret-{name}\n")
            assert await core.call("recovery.fetch") == {"keys": {"data": "secret-data", "audit": "secret-audit"}}
            assert [path.name for path in directory.iterdir()] == ["fetched"]
            with pytest.raises(Conflict, match="already fetched"):
                await core.call("recovery.fetch")
            assert b"secret" not in msgspec.json.encode(core.audit.entries)

    asyncio.run(fetch())


def test_configuration_is_read_anew_when_it_changes(tmp_path: Path) -> None:
    async def change() -> None:
        async with running(tmp_path) as core:
            assert (await core.call("config.read"))["hostname"] == "hf1"
            fewer = msgspec.structs.replace(configuration(), administrators=configuration().administrators[1:])
            core.configuration.with_suffix(".new").write_bytes(msgspec.json.encode(fewer))
            core.configuration.with_suffix(".new").replace(core.configuration)
            with pytest.raises(Forbidden, match="no identity"):
                await core.call("config.read")
            core.configuration.unlink()
            with pytest.raises(Unavailable, match="no configuration in force"):
                await core.call("version.read", "auditor")

    asyncio.run(change())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"hostname":"\xff"}', b"\xff"])
def test_a_configuration_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    async def call() -> None:
        async with running(tmp_path) as core:
            core.configuration.write_bytes(content)
            with pytest.raises(Unavailable, match=f"{core.configuration.name} cannot be read: ") as refused:
                await core.call("version.read", "auditor")
            assert refused.value.hint
            core.configuration.write_bytes(msgspec.json.encode(configuration()))
            assert await core.call("version.read", "auditor")

    asyncio.run(call())


def test_audit_is_read_through_core(tmp_path: Path) -> None:
    async def read() -> None:
        async with running(tmp_path) as core:
            assert await core.call("audit.read", "auditor", after=41, limit=10) == {
                "records": [{"seq": 42}],
                "next": None,
                "reached": 42,
            }
            intent_and_others = len(core.audit.entries) + 1
            assert await core.call("audit.anchor", "auditor") == {"covers": intent_and_others}
            with pytest.raises(Forbidden):
                await core.call("audit.anchor", "operator")
            assert await core.call("health.read", "operator") == {
                "status": "ok",
                "checks": [{"name": "everything", "ok": True, "detail": "fine"}],
            }

    asyncio.run(read())


@pytest.mark.sfr("FAU_STG.1", "FMT_MOF_EXT.1")
def test_deleting_records_is_an_auditors_function(tmp_path: Path) -> None:
    """Administrators may see how the store stands, and no more; what an auditor had deleted is in the outcome."""

    async def purge() -> None:
        async with running(tmp_path) as core:
            for role in ("admin", "operator", "user"):
                with pytest.raises(Forbidden, match=r"may not call audit\.purge"):
                    await core.call("audit.purge", role, before=7)
            for wrong in ({}, {"before": 0}, {"before": -1}, {"before": 1.5}, {"before": None}, {"before": "x" * 41}):
                with pytest.raises(UserError, match="before"):
                    await core.call("audit.purge", "auditor", **wrong)
            assert core.audit.purges == []
            core.audit.entries.clear()
            for before in (7, "2026-11-23T04:05:06Z"):
                assert await core.call("audit.purge", "auditor", before=before) == {"first": 1, "last": 5, "lost": 2}
            assert [call["before"] for call in core.audit.purges] == [7, "2026-11-23T04:05:06Z"]
            assert {call["request"] for call in core.audit.purges} == {"r1"}
            intent, outcome, *_ = core.audit.entries
            assert (intent.phase, intent.extra, intent.actor.id) == ("intent", {"args": {"before": 7}}, "auditor-1")
            assert (outcome.phase, outcome.outcome) == ("outcome", "success")
            assert outcome.extra == {"first": 1, "last": 5, "lost": 2}
            # Without its intent on record nothing goes.
            core.audit.refuse_from = 0
            with pytest.raises(Unavailable):
                await core.call("audit.purge", "auditor", before=9)
            assert len(core.audit.purges) == 2
            core.audit.refuse_from = 1 << 30
            for role in ("admin", "auditor"):
                assert (await core.call("audit.status", role))["rule"] == {"when_full": "overwrite"}
            with pytest.raises(Forbidden):
                await core.call("audit.status", "operator")

    asyncio.run(purge())
