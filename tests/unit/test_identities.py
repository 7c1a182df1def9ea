"""Identities at run time: who may be enrolled, changed and revoked, and by whom."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit import test_api_rig
from tests.unit.test_config_rig import certificate as made
from tests.unit.test_config_rig import key_and_certificate
from tests.unit.test_core_rig import Core, certificate, configuration, fingerprint, running
from vmm.core import identities
from vmm.errors import Conflict, Forbidden, NotFound, Unavailable, UserError
from vmm.volumes.types import MIB

OWN = ("show", "start", "stats", "pause", "resume", "reset", "suspend", "stop", "force-off", "console")
"""What a user may do with machines of its own, beside listing them."""


async def enroll(core: Core, who: str, role: str = "operator", **more: Any) -> Any:
    """Enroll a certificate, whose holder then calls as that ``role`` of Core.call()."""
    return await core.call("identity.enroll", name=who, role=role, certificate=certificate(who), **more)


async def machine(core: Core, name: str, *, runs: bool = False) -> str:
    """Make a machine; its id."""
    made = await core.call("machine.create", name=name, cpus=1, memory=64 * MIB)
    if runs:
        await core.call("machine.start", name=name)
    return str(made["uuid"])


def pins(core: Core) -> list[str]:
    """What the API is told."""
    return json.loads((core.directory / "pins.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.sfr("FMT_MOF_EXT.1", "FIA_UIA_EXT.1")
def test_an_enrolled_identity_may_call_until_it_is_revoked(tmp_path: Path) -> None:
    async def life() -> None:
        async with running(tmp_path) as core:
            with pytest.raises(Forbidden, match="no identity has this certificate"):
                await core.call("version.read", "bob")
            shown = await enroll(core, "bob")
            assert (shown["name"], shown["role"], shown["source"]) == ("bob", "operator", "enrolled")
            assert (shown["fingerprint"], shown["enrolled_by"]) == (fingerprint("bob"), "admin-1")
            assert shown["subject"] == "CN=bob" and shown["machines"] is None and shown["valid_until"] > "2026"
            assert pins(core) == [certificate("bob")]
            await core.call("version.read", "bob")
            assert (core.audit.entries[-1].actor.id, core.audit.entries[-1].actor.role) == ("bob", "operator")
            with pytest.raises(Forbidden, match=r"may not call volume\.create"):
                await core.call("volume.create", "bob", name="v", size=MIB)
            assert (await core.call("identity.whoami", "bob"))["name"] == "bob"
            assert (await core.call("identity.change", name="bob", role="admin"))["role"] == "admin"
            await core.call("volume.create", "bob", name="v", size=MIB)
            await core.call("identity.revoke", name="bob")
            assert pins(core) == []
            for method in ("version.read", "identity.whoami"):
                with pytest.raises(Forbidden, match="no identity has this certificate"):
                    await core.call(method, "bob")
            with pytest.raises(NotFound, match="there is no identity 'bob'"):
                await core.call("identity.revoke", name="bob")

            done = [entry for entry in core.audit.entries if entry.type.startswith("identity.e")]
            assert [(entry.phase, entry.object.kind, entry.object.name) for entry in done] == [
                ("intent", "identity", "bob"),
                ("outcome", "identity", "bob"),
            ]
            assert done[0].extra["args"]["role"] == "operator" and done[1].object.id == fingerprint("bob")
            revoked = [entry for entry in core.audit.entries if entry.type == "identity.revoke"]
            assert [(entry.phase, entry.outcome, entry.object.id) for entry in revoked] == [
                ("intent", "pending", fingerprint("bob")),
                ("outcome", "success", fingerprint("bob")),
                ("intent", "pending", ""),
                ("outcome", "failure", ""),
            ]

    asyncio.run(life())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"certificate": "-----BEGIN nothing"}, "certificate: not exactly one certificate in PEM form"),
    ({"certificate": made("one") + made("two")}, "certificate: not exactly one certificate in PEM form"),
    ({"certificate": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"}, "certificate: not a certificate"),
    ({"certificate": key_and_certificate("one")[0] + made("one")}, "certificate: contains a private key"),
    ({"certificate": made("one", "rsa2048")}, "certificate: its RSA key has 2048 bits"),
    ({"certificate": made("one", "p521")}, "certificate: its key is on the curve secp521r1"),
    ({"certificate": made("one", "ed25519")}, "certificate: its key is neither EC"),
    ({"certificate": test_api_rig.identity("late", days=(-2, -1)).pem}, "certificate: it expired at 20"),
    ({"certificate": made("one") + "\x00"}, "certificate: "),
    ({"certificate": "x" * 9000}, "certificate: "),
    ({"certificate": 7}, "certificate: "),
    ({"certificate": certificate("admin")}, "certificate: the identity 'admin-1' has it already"),
    ({"certificate": certificate("bob")}, "certificate: the identity 'bob' has it already"),
    ({"name": "bob"}, "name: there is already an identity 'bob'"),
    ({"name": "admin-1"}, "name: there is already an identity 'admin-1', in the configuration"),
    ({"name": "holdfast"}, "name: 'holdfast' is what the host itself is called"),
    ({"name": "Bob"}, "name: "),
    ({"role": "root"}, "role: "),
    ({"role": "system"}, "role: "),
    ({"machines": ["web"]}, "machines: the role 'operator' is not limited to machines"),
    ({"role": "user", "machines": ["web", "nobody"]}, "machines[1]: there is no machine 'nobody'"),
    ({"role": "user", "machines": ["../x"]}, "machines[0]: "),
    ({"role": "user", "machines": ["web"] * 129}, "machines: "),
    ({"colour": "red"}, "colour: is not a known field"),
]


@pytest.mark.sfr("FIA_X509_EXT.1", "FMT_MOF_EXT.1")
def test_what_cannot_be_enrolled_is_refused_by_field(tmp_path: Path) -> None:
    async def tries() -> None:
        async with running(tmp_path) as core:
            await machine(core, "web")
            await enroll(core, "bob")
            for wrong, says in BAD:
                good = {"name": "carol", "role": "operator", "certificate": made("carol")}
                with pytest.raises(UserError) as refused:
                    await core.call("identity.enroll", **(good | wrong))
                assert refused.value.message.startswith(says), (wrong, refused.value.message)
                assert core.audit.entries[-1].outcome == "failure"
            assert pins(core) == [certificate("bob")]
            assert {one["name"] for one in await core.call("identity.list")} == {
                *("admin-1", "auditor-1", "operator-1", "user-1", "bob")
            }
            for name, strong in (("p256", "p256"), ("p384", "p384"), ("rsa3072", "rsa3072")):
                await core.call("identity.enroll", name=name, role="auditor", certificate=made(name, strong))

    asyncio.run(tries())


def test_there_are_only_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "MOST", 5)

    async def tries() -> None:
        async with running(tmp_path) as core:
            await enroll(core, "bob")
            with pytest.raises(Conflict, match="there are 5 identities, as many as there may be"):
                await enroll(core, "carol")

    asyncio.run(tries())


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_only_administrators_manage_identities_and_all_may_see_themselves(tmp_path: Path) -> None:
    async def calls() -> None:
        async with running(tmp_path) as core:
            await enroll(core, "bob")
            tries = {
                "identity.list": {},
                "identity.show": {"name": "bob"},
                "identity.enroll": {"name": "eve", "role": "admin", "certificate": certificate("eve")},
                "identity.change": {"name": "bob", "role": "admin"},
                "identity.revoke": {"name": "bob"},
            }
            for role in ("auditor", "operator", "user", "bob"):
                for method, args in tries.items():
                    with pytest.raises(Forbidden):
                        await core.call(method, role, **args)
            assert pins(core) == [certificate("bob")]
            for role in ("admin", "auditor", "operator", "user"):
                me = await core.call("identity.whoami", role)
                assert (me["name"], me["role"], me["source"]) == (f"{role}-1", role, "configuration")
                assert me["machines"] == ([] if role == "user" else None)
                assert "identity.whoami" in me["methods"]
            for role in ("operator", "user"):
                with pytest.raises(Forbidden):
                    await core.call("access.query", role)
            access = (await core.call("access.query", "auditor"))["roles"]
            matrix = json.loads(Path("vmm/core/permissions.json").read_text())
            assert set(access) == {"admin", "auditor", "operator", "user"}
            for role, methods in access.items():
                assert methods == sorted(method for method, roles in matrix.items() if role in roles)
            assert (await core.call("identity.show", name="bob"))["methods"] == access["operator"]

    asyncio.run(calls())


def test_what_a_user_may_call_is_about_its_machines(tmp_path: Path) -> None:
    """The dispatcher confines by the object of a call, so nothing else may be a user's."""
    core = Core(tmp_path)
    core.rig.database.close()
    matrix = json.loads(Path("vmm/core/permissions.json").read_text())
    given = {method for method, roles in matrix.items() if "user" in roles}
    assert given == {f"machine.{name}" for name in OWN} | {"machine.list", "identity.whoami"}
    assert {method for method in given if core.methods[method].object_kind != "machine"} == {
        *("machine.list", "identity.whoami")
    }


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_identities_of_the_configuration_stay(tmp_path: Path) -> None:
    async def tries() -> None:
        async with running(tmp_path) as core:
            for name in ("auditor-1", "admin-1"):
                for method, args in (("identity.revoke", {}), ("identity.change", {"role": "user"})):
                    with pytest.raises(Conflict, match=f"'{name}' comes from the configuration") as refused:
                        await core.call(method, name=name, **args)
                    assert refused.value.hint
            # Should a later configuration take a name or certificate, it is the configuration that counts.
            await enroll(core, "bob", "admin")
            taken = msgspec.structs.replace(configuration().administrators[2], name="bob")
            document = msgspec.structs.replace(
                configuration(), administrators=(configuration().administrators[0], taken)
            )
            core.configuration.with_suffix(".new").write_bytes(msgspec.json.encode(document))
            core.configuration.with_suffix(".new").replace(core.configuration)
            with pytest.raises(Forbidden, match="no identity"):
                await core.call("version.read", "bob")
            shown = await core.call("identity.show", name="bob")
            assert (shown["source"], shown["fingerprint"]) == ("configuration", fingerprint("operator"))

    asyncio.run(tries())


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_the_last_administrator_stays(tmp_path: Path) -> None:
    async def tries() -> None:
        async with running(tmp_path) as core:
            await enroll(core, "bob", "admin")
            await enroll(core, "carol", "admin")
            for method, args in (("identity.revoke", {}), ("identity.change", {"role": "operator"})):
                with pytest.raises(Conflict, match="the identity 'bob' is your own"):
                    await core.call(method, "bob", name="bob", **args)
            # That of the configuration has expired, as its certificate lasts for days only.
            lasting = test_api_rig.identity("lasting", days=(-1, 900))
            await core.call("identity.enroll", name="dave", role="admin", certificate=lasting.pem)
            core.identities._clock = (datetime.now(UTC) + timedelta(days=365)).timestamp
            await core.identities.revoke("bob", fingerprint("carol"))
            for change in (
                core.identities.revoke("dave", fingerprint("carol")),
                core.identities.change(identities.Change("dave", role="auditor"), fingerprint("carol")),
            ):
                with pytest.raises(Conflict, match="'dave' is the last administrator with a certificate that is valid"):
                    await change
            assert (await core.identities.show("dave")).role == "admin"
            core.identities._clock = time.time
            await core.identities.revoke("dave", fingerprint("carol"))

    asyncio.run(tries())


def test_changes_need_something_to_change(tmp_path: Path) -> None:
    async def tries() -> None:
        async with running(tmp_path) as core:
            await machine(core, "web")
            await enroll(core, "bob", "user", machines=["web"])
            for args, says in (
                ({}, "nothing is to be changed"),
                ({"role": "operator", "machines": ["web"]}, "machines: the role 'operator' is not limited"),
                ({"machines": ["nobody"]}, r"machines\[0\]: there is no machine 'nobody'"),
                ({"role": "boss"}, "role: "),
            ):
                with pytest.raises(UserError, match=says):
                    await core.call("identity.change", name="bob", **args)
            assert [one["name"] for one in (await core.call("identity.show", name="bob"))["machines"]] == ["web"]
            assert (await core.call("identity.change", name="bob", role="operator"))["machines"] is None
            assert (await core.call("identity.change", name="bob", role="user"))["machines"] == []

    asyncio.run(tries())


def test_the_file_for_the_api_is_made_anew_at_the_start(tmp_path: Path) -> None:
    async def tries() -> None:
        async with running(tmp_path) as core:
            await enroll(core, "bob")
            (tmp_path / "pins.json").write_text(json.dumps([certificate("mallory")]))
            await core.identities.publish()
            assert pins(core) == [certificate("bob")]
            # Where it cannot be written, that is said; core goes by the database all the same.
            (tmp_path / "pins.json").unlink()
            (tmp_path / "pins.json").mkdir()
            with pytest.raises(Unavailable, match="'bob' was revoked, but the API does not know"):
                await core.call("identity.revoke", name="bob")
            with pytest.raises(Forbidden):
                await core.call("version.read", "bob")

    asyncio.run(tries())


def test_identities_survive_a_restart_of_core(tmp_path: Path) -> None:
    async def before() -> None:
        async with running(tmp_path) as core:
            await machine(core, "web")
            await enroll(core, "bob", "user", machines=["web"])
            (tmp_path / "recovery").rmdir()

    async def after() -> None:
        async with running(tmp_path) as core:
            assert [one["name"] for one in await core.call("machine.list", "bob")] == ["web"]

    asyncio.run(before())
    asyncio.run(after())
