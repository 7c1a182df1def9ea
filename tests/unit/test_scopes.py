"""A user with machines of its own: there are no others for it. And what lasts ends when it is no longer allowed."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest

from tests.unit.test_core_rig import fingerprint, running
from tests.unit.test_identities import OWN, enroll, machine
from vmm import wire
from vmm.errors import Forbidden, NotFound, UserError
from vmm.machines import store


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_a_user_has_its_own_machines_and_there_are_no_others(tmp_path: Path) -> None:
    async def calls() -> None:
        async with running(tmp_path) as core:
            ids = {name: await machine(core, name, runs=True) for name in ("web", "db")}
            shown = await enroll(core, "bob", "user", machines=["web", "web"])
            assert shown["machines"] == [{"name": "web", "uuid": ids["web"]}]
            assert [one["name"] for one in await core.call("machine.list", "bob")] == ["web"]
            assert await core.call("machine.list", "user") == []
            assert (await core.call("machine.show", "bob", name="web"))["uuid"] == ids["web"]
            for action, state in (("pause", "paused"), ("resume", "running"), ("reset", "running")):
                assert (await core.call(f"machine.{action}", "bob", name="web"))["state"] == state
            assert (await core.call("machine.stats", "bob", name="web"))["name"] == "web"
            assert (await core.call("machine.suspend", "bob", name="web"))["state"] == "saved"
            assert (await core.call("machine.start", "bob", name="web"))["state"] == "running"
            assert (await core.call("machine.stop", "bob", name="web"))["state"] == "stopped"
            await core.call("machine.start", "bob", name="web")
            assert (await core.call("machine.force-off", "bob", name="web"))["state"] == "stopped"

            for who in ("bob", "user"):
                for action in OWN:
                    core.audit.entries.clear()
                    problems = []
                    for name in ("db", "nobody"):
                        with pytest.raises(UserError) as refused:
                            await core.call(f"machine.{action}", who, name=name)
                        problem = msgspec.to_builtins(wire.problem_of(refused.value))
                        problems.append(json.loads(json.dumps(problem).replace(name, "NAME")))
                    assert problems[0] == problems[1] and problems[0]["status"] == 404, problems
                    assert [(e.phase, e.outcome, e.object.name, e.object.id, e.reason) for e in core.audit.entries] == [
                        ("outcome", "failure", "db", ids["db"], "outside of the caller's scope"),
                        ("outcome", "failure", "nobody", "", "there is no machine 'nobody'"),
                    ]
            assert core.rig.hypervisor.domains[msgspec.convert(ids["db"], UUID)].state.value == "running"

            # A machine of the same name is another one; one that gets another name is the same.
            await core.call("machine.rename", name="web", to="shop")
            assert [one["name"] for one in await core.call("machine.list", "bob")] == ["shop"]
            await machine(core, "web")
            with pytest.raises(NotFound, match="there is no machine 'web'"):
                await core.call("machine.show", "bob", name="web")
            await core.call("machine.delete", name="shop")
            assert await core.call("machine.list", "bob") == []
            assert (await core.call("identity.show", name="bob"))["machines"] == []
            await machine(core, "shop")
            with pytest.raises(NotFound):
                await core.call("machine.show", "bob", name="shop")
            await core.call("identity.change", name="bob", machines=["shop", "db"])
            assert [one["name"] for one in await core.call("machine.list", "bob")] == ["db", "shop"]

    asyncio.run(calls())


def test_a_name_that_comes_to_mean_another_machine_meanwhile_does_not_widen_a_scope(tmp_path: Path) -> None:
    async def race() -> None:
        async with running(tmp_path) as core:
            ids = {name: await machine(core, name) for name in ("web", "db")}
            await enroll(core, "bob", "user", machines=["web"])
            handler = core.audit.handle

            async def rename_then_append(request: wire.Request, channel: wire.Channel) -> Any:
                if request.params.get("type") == "machine.start" and request.params["phase"] == "intent":
                    for id, name in ((ids["web"], "old"), (ids["db"], "web")):
                        await core.rig.database.run(partial(store.rename, id=UUID(id), name=name))
                return await handler(request, channel)

            server = await wire.serve(tmp_path / "audit.sock", rename_then_append)
            with pytest.raises(NotFound, match="there is no machine 'web'"):
                await core.call("machine.start", "bob", name="web")
            assert core.rig.hypervisor.domains == {}
            server.close()

    asyncio.run(race())


async def ended(channel: wire.Channel) -> UserError:
    """The error that a call ends with, whatever it sends before."""
    async with channel, asyncio.timeout(5):
        while True:
            kind, payload = await channel.receive()
            if kind is wire.Kind.PROBLEM:
                return wire.error_of(msgspec.json.decode(payload, type=wire.Problem))
            assert kind is wire.Kind.DATA


@pytest.mark.sfr("FMT_MOF_EXT.1", "FIA_UIA_EXT.1")
def test_what_an_identity_has_open_ends_with_its_right_to_it(tmp_path: Path) -> None:
    async def life() -> None:
        async with running(tmp_path) as core:
            for name in ("web", "db"):
                await machine(core, name, runs=True)
            await enroll(core, "bob", "user", machines=["web", "db"])
            await enroll(core, "carol", "admin")
            opened = {}
            for who, method, args in (
                ("bob", "machine.console", {"name": "web"}),
                ("bob", "machine.console", {"name": "db"}),
                ("carol", "audit.follow", {}),
                ("operator", "machine.console", {"name": "web"}),
            ):
                channel = opened[who, args.get("name")] = await core.open(method, who, **args)
                assert (await channel.receive())[0] is wire.Kind.DATA
            # What is still allowed goes on.
            await core.call("identity.change", name="bob", machines=["db"])
            assert (await ended(opened["bob", "web"])).message == "the machine is no longer yours"
            assert core.audit.entries[-2].reason == "the machine is no longer yours"
            await core.call("identity.change", name="carol", role="operator")
            assert "may not call audit.follow" in (await ended(opened["carol", None])).message
            for who in ("bob", "operator"):
                channel = opened[who, "db" if who == "bob" else "web"]
                await channel.send_data(b"still here")
                while (await channel.receive())[1] != b"STILL HERE":
                    pass
            await core.call("identity.revoke", name="bob")
            assert isinstance(await ended(opened["bob", "db"]), Forbidden)
            outcomes = [e for e in core.audit.entries if e.type == "machine.console" and e.phase == "outcome"]
            assert [(e.actor.id, e.outcome) for e in outcomes] == [("bob", "failure"), ("bob", "failure")]
            assert [console.closed for console in core.rig.hypervisor.consoles] == [True, True, False]
            await opened["operator", "web"].close()

    asyncio.run(life())


def test_a_console_that_is_being_opened_does_not_outlive_its_right(tmp_path: Path) -> None:
    """It is revoked between the decision and the record of the intent."""

    async def race() -> None:
        async with running(tmp_path) as core:
            await machine(core, "web", runs=True)
            await enroll(core, "bob", "operator")
            handler = core.audit.handle

            async def revoke_then_append(request: wire.Request, channel: wire.Channel) -> Any:
                if request.params.get("type") == "machine.console" and request.params["phase"] == "intent":
                    await core.identities.revoke("bob", fingerprint("admin"))
                return await handler(request, channel)

            server = await wire.serve(tmp_path / "audit.sock", revoke_then_append)
            assert isinstance(await ended(await core.open("machine.console", "bob", name="web")), Forbidden)
            assert core.rig.hypervisor.consoles == []
            assert core.audit.said()[-2:] == [
                ("machine.console", "intent", "pending"),
                ("machine.console", "outcome", "failure"),
            ]
            server.close()

    asyncio.run(race())


def test_a_console_that_has_just_ended_keeps_its_outcome(tmp_path: Path) -> None:
    """Its identity is revoked while the outcome is recorded."""

    async def race() -> None:
        async with running(tmp_path) as core:
            await machine(core, "web", runs=True)
            await enroll(core, "bob", "operator")
            handler = core.audit.handle

            async def revoke_then_append(request: wire.Request, channel: wire.Channel) -> Any:
                if request.params.get("type") == "machine.console" and request.params["phase"] == "outcome":
                    await core.identities.revoke("bob", fingerprint("admin"))
                return await handler(request, channel)

            server = await wire.serve(tmp_path / "audit.sock", revoke_then_append)
            channel = await core.open("machine.console", "bob", name="web")
            await channel.receive()
            core.rig.hypervisor.consoles[0].end()
            assert await channel.result() == {}
            assert core.audit.said()[-1] == ("machine.console", "outcome", "success")
            await channel.close()
            server.close()

    asyncio.run(race())
