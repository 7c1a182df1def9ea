"""The wire protocol's two ends, where they disagree about when a call is over."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from vmm import wire
from vmm.errors import Conflict


def test_an_early_answer_arrives_although_the_caller_still_sends(tmp_path: Path) -> None:
    answered = asyncio.Event()

    async def refuse(_request: wire.Request, channel: wire.Channel) -> None:
        await channel.receive()
        asyncio.get_running_loop().call_later(0.05, answered.set)
        raise Conflict("no")

    async def call() -> None:
        server = await wire.serve(tmp_path / "socket", refuse)
        async with server, await wire.open_call(tmp_path / "socket", "upload") as channel:
            await channel.send_data(b"x")
            await answered.wait()
            for _ in range(20):
                await channel.send_data(bytes(wire.MAX_FRAME))
            with pytest.raises(Conflict, match="no"):
                await channel.result()

    asyncio.run(call())


def test_a_caller_that_never_closes_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_LINGER_S", 0.05)

    async def nothing(_request: wire.Request, _channel: wire.Channel) -> None:
        pass

    async def call() -> None:
        server = await wire.serve(tmp_path / "socket", nothing)
        async with server, await wire.open_call(tmp_path / "socket", "stay") as channel:
            assert await channel.result() is None
            with pytest.raises(wire.ProtocolError, match="closed the connection"):
                await channel.receive()

    asyncio.run(call())
