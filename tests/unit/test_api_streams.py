"""Uploads and consoles through the API: every byte both ways, and every way to end early."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.unit.test_api_rig import rig
from vmm import wire
from vmm.api import connection, streams
from vmm.errors import Conflict, NotFound
from vmm.wire import Kind

CONTENT = os.urandom(3 << 20)
PATH = "/v1/volumes/v1/content"


def test_upload_arrives_whole(tmp_path: Path) -> None:
    async def core(_: wire.Request, channel: wire.Channel) -> Any:
        digest = hashlib.sha256()
        async for chunk in channel.data():
            digest.update(chunk)
        return {"digest": digest.hexdigest()}

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            answer = await client.put(PATH + "?format=qcow2&size=9", data=io.BytesIO(CONTENT))
            assert answer.status == 201
            assert (await answer.json())["digest"] == hashlib.sha256(CONTENT).hexdigest()
            arguments = api.calls[0].params["args"]
            assert arguments == {"name": "v1", "format": "qcow2", "size": 9, "length": len(CONTENT)}
            assert (await client.put(PATH, data=b"")).status == 201

    asyncio.run(check())


def test_upload_without_length_is_refused(tmp_path: Path) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"x"

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            assert (await client.put(PATH, data=body())).status == 411
            assert not api.calls

    asyncio.run(check())


def test_upload_that_ends_early_has_no_end_frame(tmp_path: Path) -> None:
    outcome: list[str] = []

    async def core(_: wire.Request, channel: wire.Channel) -> None:
        try:
            async for _chunk in channel.data():
                pass
            outcome.append("complete")
        except wire.ProtocolError:
            outcome.append("broken off")
            raise

    async def check() -> None:
        async with rig(tmp_path) as api:
            api.core = core
            _, writer = await api.raw()
            writer.write(f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode() + b"x" * 200_000)
            await writer.drain()
            await api.until(lambda: bool(api.calls))
            writer.transport.abort()
            await api.until(lambda: bool(outcome))

    asyncio.run(check())
    assert outcome == ["broken off"]


def test_early_answer_stops_the_upload(tmp_path: Path) -> None:
    sent = 0

    async def core(_: wire.Request, channel: wire.Channel) -> None:
        await channel.receive()
        raise Conflict("the volume v1 exists already")

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += 1
            yield b"x" * 100_000
            await asyncio.sleep(0.01)

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            answer = await client.put(PATH, data=body(), headers={"Content-Length": "1000000000"})
            assert answer.status == 409
            assert (await answer.json())["detail"] == "the volume v1 exists already"

    asyncio.run(check())
    assert sent < 300


def test_core_dying_in_an_upload_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER", 0.1)

    async def core(_: wire.Request, channel: wire.Channel) -> None:
        await channel.receive()
        await channel.close()

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            assert (await client.put(PATH, data=io.BytesIO(CONTENT))).status == 503

    asyncio.run(check())


def test_stalled_upload_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALL", 0.1)
    monkeypatch.setattr(connection, "LINGER", 0.1)

    async def core(_: wire.Request, channel: wire.Channel) -> None:
        async for _chunk in channel.data():
            pass

    async def check() -> None:
        async with rig(tmp_path) as api:
            api.core = core
            reader, writer = await api.raw()
            writer.write(f"PUT {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc".encode())
            assert b" 408 " in await reader.readline()
            writer.close()

    asyncio.run(check())


async def echo(_: wire.Request, channel: wire.Channel) -> None:
    await channel.send_data(b'{"machine":"m1","uuid":"u"}')
    async for chunk in channel.data():
        if chunk == b"exit":
            await channel.send(Kind.END)
            return
        await channel.send_data(chunk.upper())


def test_console_both_ways(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = echo
            async with client.ws_connect("/v1/machines/m1/console") as socket:
                assert socket._response.headers["X-Request-Id"] == api.calls[0].params["caller"]["request_id"]
                assert await socket.receive_json() == {"machine": "m1", "uuid": "u"}
                for text in (b"login", b"\x00\xff", b"x" * 500_000):
                    await socket.send_bytes(text)
                    assert await socket.receive_bytes() == text.upper()
                await socket.send_bytes(b"exit")
                assert (await socket.receive()).type is aiohttp.WSMsgType.CLOSE
                assert socket.close_code == 1000
            assert api.calls[0].params["args"] == {"name": "m1"}

    asyncio.run(check())


def test_console_ends_with_the_client(tmp_path: Path) -> None:
    ended: list[str] = []

    async def core(request: wire.Request, channel: wire.Channel) -> None:
        try:
            await echo(request, channel)
            ended.append("end")
        except (wire.ProtocolError, ConnectionError):
            ended.append("gone")

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            async with client.ws_connect("/v1/machines/m1/console") as socket:
                await socket.receive()
            await api.until(lambda: len(ended) == 1)
            async with client.ws_connect("/v1/machines/m1/console") as socket:
                await socket.receive()
                await socket.send_str("text")
                assert (await socket.receive()).data == 1003
            await api.until(lambda: len(ended) == 2)
            socket = await client.ws_connect("/v1/machines/m1/console")
            await socket.receive()
            transport = socket.get_extra_info("socket")
            assert transport is not None
            transport.shutdown(2)
            await api.until(lambda: len(ended) == 3)

    asyncio.run(check())
    assert ended == ["end", "end", "end"]


def test_console_refused_before_the_upgrade(tmp_path: Path) -> None:
    async def core(*_: Any) -> None:
        raise NotFound("there is no machine m1")

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await client.ws_connect("/v1/machines/m1/console")
            assert caught.value.status == 404
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await client.ws_connect("/v1/machines/m1/console", origin="https://evil.example")
            assert caught.value.status == 403

    asyncio.run(check())


def test_console_tells_why_it_ends(tmp_path: Path) -> None:
    async def core(_: wire.Request, channel: wire.Channel) -> None:
        await channel.send_data(b"{}")
        raise Conflict("machine m1 stopped")

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            async with client.ws_connect("/v1/machines/m1/console") as socket:
                await socket.receive()
                message = await socket.receive()
                assert (message.data, message.extra) == (1011, "machine m1 stopped")
            api.core = lambda _, channel: channel.send(Kind.END)
            answer = await client.get(
                "/v1/machines/m1/console",
                headers={
                    "Connection": "upgrade",
                    "Upgrade": "websocket",
                    "Sec-WebSocket-Version": "13",
                    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
                },
            )
            assert answer.status == 503

    asyncio.run(check())


def test_stopping_closes_consoles_and_ends_sessions(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = echo
            socket = await client.ws_connect("/v1/machines/m1/console")
            await socket.receive()
            stopping = asyncio.create_task(api.daemon.stop())
            assert (await socket.receive()).data == 1001
            await stopping
            assert [entry["type"] for entry in api.entries] == ["session.start", "session.end"]

    asyncio.run(check())


async def one_follower(_: wire.Request, channel: wire.Channel) -> Any:
    """Sends two records and a heartbeat, and waits until the API goes away."""
    for payload in (b"", b'{"seq":1}\n{"seq":2}\n', b"\n"):
        await channel.send(Kind.DATA, payload)
    await channel.gone()
    raise ConnectionError


def test_following_passes_on_what_comes_until_the_client_goes(tmp_path: Path) -> None:
    gone: list[bool] = []

    async def core(request: wire.Request, channel: wire.Channel) -> Any:
        try:
            await one_follower(request, channel)
        finally:
            gone.append(True)

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            for polite in (True, False):
                answer = await client.get("/v1/audit/follow?after=5&type=machine.&from=x")
                assert (answer.status, answer.content_type) == (200, "application/jsonl")
                assert answer.headers["Cache-Control"] == "no-store"
                assert [await answer.content.readline() for _ in range(3)] == [b'{"seq":1}\n', b'{"seq":2}\n', b"\n"]
                assert api.calls[-1].params["args"] == {"after": 5, "type": "machine.", "from": "x"}
                assert not gone and len(api.daemon._api.followers) == 1
                assert answer.connection is not None and answer.connection.transport is not None
                answer.close() if polite else answer.connection.transport.abort()
                await api.until(lambda: gone == [True] and not api.daemon._api.followers)
                gone.clear()

    asyncio.run(check())


def test_a_follower_that_core_ends_sees_no_whole_answer(tmp_path: Path) -> None:
    async def ends(_: wire.Request, channel: wire.Channel) -> Any:
        await channel.send(Kind.DATA, b'{"seq":1}\n')
        return {}

    async def fails(_: wire.Request, channel: wire.Channel) -> Any:
        await channel.send(Kind.DATA, b'{"seq":1}\n')
        raise Conflict("no")

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            for core in (ends, fails):
                api.core = core
                answer = await client.get("/v1/audit/follow")
                with pytest.raises(aiohttp.ClientError):
                    await answer.read()
            assert not api.daemon._api.followers

    asyncio.run(check())


def test_whoever_may_not_follow_is_told_why(tmp_path: Path) -> None:
    async def core(_: wire.Request, __: wire.Channel) -> Any:
        error = Conflict("too many followers")
        error.code, error.status = "too-many-requests", 429
        raise error

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = core
            answer = await client.get("/v1/audit/follow")
            assert (answer.status, (await answer.json())["type"]) == (429, "urn:holdfast:problem:too-many-requests")
            assert (await client.get("/v1/audit/follow?limit=3")).status == 400

    asyncio.run(check())


def test_a_client_that_takes_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "STALL", 0.2)
    ended: list[bool] = []

    async def core(_: wire.Request, channel: wire.Channel) -> Any:
        try:
            while True:
                await channel.send(Kind.DATA, b"x" * 500_000 + b"\n")
        finally:
            ended.append(True)

    async def check() -> None:
        async with rig(tmp_path) as api:
            api.core = core
            reader, writer = await api.raw()
            writer.write(b"GET /v1/audit/follow HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await api.until(lambda: ended == [True])
            writer.transport.abort()
            assert reader

    asyncio.run(check())


def test_followers_do_not_hold_up_the_end_of_the_service(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = one_follower
            answer = await client.get("/v1/audit/follow")
            async with asyncio.timeout(4):
                await api.daemon.stop()
            with pytest.raises(aiohttp.ClientError):
                await answer.read()

    asyncio.run(check())
