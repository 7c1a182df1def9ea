"""Identities that core enrols and revokes, as the API's handshake and connections follow them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.unit.test_api_rig import ALICE, Identity, Rig, configuration, identity, rig
from tests.unit.test_api_tls import AUTHORITY, refusal
from vmm import atomic, wire
from vmm.api import daemon

BOB = identity("bob")


def enroll(api: Rig, *who: Identity | str) -> None:
    """What core writes, always all of it."""
    content = [one if isinstance(one, str) else one.pem for one in who]
    atomic.write(api.directory / "pins.json", json.dumps(content).encode())


async def answers(api: Rig, who: Identity) -> bool:
    """Whether somebody gets through."""
    async with api.client(who) as client:
        try:
            async with client.get("/v1/version") as answer:
                return answer.status == 200
        except (aiohttp.ClientError, OSError):
            return False


async def until(api: Rig, who: Identity, gets_in: bool) -> None:
    async with asyncio.timeout(5):
        while await answers(api, who) != gets_in:
            await asyncio.sleep(0.01)


@pytest.mark.sfr("FIA_UIA_EXT.1", "FIA_X509_EXT.1")
def test_an_enrolled_certificate_gets_in_until_it_is_revoked(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api:
            assert "self-signed" in await refusal(api, BOB)
            enroll(api, BOB)
            await until(api, BOB, True)
            async with api.client(BOB) as client:
                await (await client.get("/v1/version")).read()
                enroll(api)
                # What it has open ends, and its end is on record.
                await api.until(lambda: not api.daemon.listener.connections)
                ended = [e["actor"]["id"] for e in api.recorded("session.end")]
                await api.until(lambda: BOB.fingerprint in ended)
            assert not await answers(api, BOB) and await answers(api, ALICE)

    asyncio.run(check())


def test_an_answer_to_a_change_comes_when_it_is_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "_LOOK_AT_PINS_S", 3600)

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as admin:

            async def core(request: wire.Request, _: wire.Channel) -> Any:
                if request.method == "identity.enroll":
                    enroll(api, BOB)
                elif request.method == "identity.revoke":
                    enroll(api)
                return {}

            api.core = core
            for _ in range(2):
                assert (await admin.post("/v1/identities", json={})).status == 201
                assert await answers(api, BOB)
                _, writer = await api.raw(BOB)
                assert (await admin.delete("/v1/identities/bob")).status == 204
                assert not await answers(api, BOB)
                writer.close()

    asyncio.run(check())


@pytest.mark.sfr("FIA_X509_EXT.1")
def test_what_a_known_certificate_issued_is_not_known(tmp_path: Path) -> None:
    """OpenSSL takes such a chain, as every known certificate is an anchor to it."""
    issued = identity("issued", issuer=AUTHORITY)

    async def check() -> None:
        async with rig(tmp_path, ALICE, AUTHORITY) as api:
            assert await refusal(api, issued) == "certificate refused: not a known one"
            assert not api.calls and not api.recorded("session.start") and not api.daemon.listener.connections

    asyncio.run(check())


def test_nothing_in_the_file_keeps_out_who_is_in_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"

    async def check() -> None:
        async with rig(tmp_path) as api:
            for content in (json.dumps([BOB.pem, broken]), json.dumps(["ä" + BOB.pem]), "{", "[7]", "\x00"):
                (tmp_path / "new").write_text(content)
                (tmp_path / "new").replace(tmp_path / "pins.json")
                async with asyncio.timeout(5):
                    while "without enrolled identities" not in capsys.readouterr().err:
                        await asyncio.sleep(0.01)
                assert await answers(api, ALICE) and not await answers(api, BOB)
            enroll(api, BOB)
            await until(api, BOB, True)
            (tmp_path / "config.json").write_bytes(configuration(ALICE, banner="New."))
            api.daemon.reload()
            assert await answers(api, BOB)

    asyncio.run(check())


def test_a_revocation_is_not_lost_to_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api:
            enroll(api, BOB)
            await until(api, BOB, True)
            good = (tmp_path / "config.json").read_bytes()
            (tmp_path / "config.json").write_bytes(b"{")
            enroll(api)
            assert not api.daemon.reload()
            (tmp_path / "config.json").write_bytes(good)
            await until(api, BOB, False)

    asyncio.run(check())
