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


def test_a_crowd_that_comes_at_once_is_served(tmp_path: Path) -> None:
    async def echo(request: wire.Request, _channel: wire.Channel) -> int:
        return int(request.params["n"])

    async def call() -> None:
        async with await wire.serve(tmp_path / "socket", echo):
            calls = (wire.call(tmp_path / "socket", "echo", {"n": n}) for n in range(300))
            assert await asyncio.gather(*calls) == list(range(300))

    asyncio.run(call())


def test_what_is_done_for_somebody_ends_when_he_goes(tmp_path: Path) -> None:
    ended: list[str] = []

    async def work(request: wire.Request, channel: wire.Channel) -> str:
        async def long() -> str:
            try:
                await asyncio.sleep(3600 if request.method == "long" else 0)
            finally:
                ended.append(request.method)
            if request.method == "fails":
                raise Conflict("no")
            return "done"

        return await wire.while_there(channel, long())

    async def call() -> None:
        async with await wire.serve(tmp_path / "socket", work):
            assert await wire.call(tmp_path / "socket", "short") == "done"
            with pytest.raises(Conflict):
                await wire.call(tmp_path / "socket", "fails")
            async with await wire.open_call(tmp_path / "socket", "long"):
                pass
            async with asyncio.timeout(5):
                while "long" not in ended:
                    await asyncio.sleep(0.005)

    asyncio.run(call())


@pytest.mark.parametrize(
    "request_",
    [b"", b"[]", b"\xff", b'{"method": "\xff"}', b'{"method": "m", "params": {"a": %s' % (b"[" * 100_000)],
)
def test_a_request_that_cannot_be_read_ends_its_connection_and_is_no_fault(tmp_path: Path, request_: bytes) -> None:
    async def nothing(_request: wire.Request, _channel: wire.Channel) -> None:
        pass

    async def call() -> None:
        faults: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
        async with await wire.serve(tmp_path / "socket", nothing):
            reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
            writer.write(wire.HEADER.pack(wire.Kind.REQUEST.value, len(request_)) + request_)
            assert await reader.read() == b""
            writer.close()
            assert await wire.call(tmp_path / "socket", "next") is None
        assert faults == []

    asyncio.run(call())
