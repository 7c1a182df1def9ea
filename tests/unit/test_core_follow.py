"""Following the trail through core, with a real audit daemon behind it: what comes, to whom, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_audit_daemon import CORE, EVENT, ME, serve, stored
from tests.unit.test_core_rig import ROLES, Core
from vmm import wire
from vmm.audit.client import AuditClient, Entry
from vmm.audit.server import Service
from vmm.core import follow
from vmm.errors import Forbidden, Unavailable, UserError

pytestmark = pytest.mark.sfr("FAU_SAR.1")


class Rig:
    """Core and the audit daemon. ``waiting`` counts the reads that wait in the daemon."""

    def __init__(self, core: Core, service: Service, store: Path, server: asyncio.Server) -> None:
        self.core = core
        self.service = service
        self.store = store
        self.server = server
        self.audit = AuditClient(core.directory / "audit.sock")
        self.waiting = 0

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    async def begin(self, role: str = "auditor", **args: Any) -> wire.Channel:
        """A follower that was let in."""
        channel = await self.core.open("audit.follow", role, **args)
        kind, payload = await channel.receive()
        if kind is wire.Kind.PROBLEM:
            await channel.close()
            raise wire.error_of(msgspec.json.decode(payload, type=wire.Problem))
        assert (kind, payload) == (wire.Kind.DATA, b"")
        return channel

    def ended(self) -> list[tuple[str, str]]:
        """How the followers ended."""
        return [(r.outcome, r.reason) for r in stored(self.store) if (r.type, r.phase) == ("audit.follow", "outcome")]


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Rig]:
    store = directory / "store"
    store.mkdir()
    core = Core(directory)
    journal, service = serve(store, {ME: CORE}, {ME})
    committing = asyncio.create_task(journal.run())
    await service.open()
    real = journal.wait_beyond

    async def counted(seq: int, seconds: float) -> None:
        rig.waiting += 1
        try:
            await real(seq, seconds)
        finally:
            rig.waiting -= 1

    journal.wait_beyond = counted  # type: ignore[method-assign]
    async with (
        await wire.serve(directory / "audit.sock", service.handle) as server,
        await wire.serve(core.socket, core.dispatcher.handle),
    ):
        rig = Rig(core, service, store, server)
        yield rig
        await core.dispatcher.close(1)
    committing.cancel()
    journal.store.close()
    core.rig.database.close()


async def heard(channel: wire.Channel, count: int) -> list[dict[str, Any]]:
    """The next records; heartbeats are passed over."""
    found: list[dict[str, Any]] = []
    async with asyncio.timeout(10):
        while len(found) < count:
            kind, payload = await channel.receive()
            assert kind is wire.Kind.DATA
            found += [msgspec.json.decode(line) for line in payload.splitlines() if line]
    return found


def test_a_follower_hears_of_what_comes_and_of_what_he_asks_for(tmp_path: Path) -> None:
    async def check() -> None:
        async with running(tmp_path) as rig:
            await rig.audit.append(Entry(type=EVENT, request="before"))
            everything, failures = await rig.begin(), await rig.begin("admin", outcome="failure")
            earlier = await rig.begin("admin", after=1, type="machine.")
            for outcome in ("success", "failure"):
                await rig.audit.append(Entry(type=EVENT, request=outcome, outcome=outcome))
            assert [r["request"] for r in await heard(earlier, 3)] == ["before", "success", "failure"]
            assert [r["request"] for r in await heard(failures, 1)] == ["failure"]
            got = await heard(everything, 4)
            # The other two began meanwhile, which is on record; that he reads is not, again and again.
            assert [r["type"] for r in got] == ["audit.follow", "audit.follow", EVENT, EVENT]
            assert [r["seq"] for r in got] == list(range(got[0]["seq"], got[0]["seq"] + 4))
            size = len(stored(rig.store))
            await rig.until(lambda: rig.waiting == 3)
            assert len(stored(rig.store)) == size
            for channel in (everything, failures, earlier):
                await channel.close()

    asyncio.run(check())


@pytest.mark.parametrize("role", ROLES)
def test_only_admin_and_auditor_follow(role: str, tmp_path: Path) -> None:
    async def check() -> None:
        async with running(tmp_path) as rig:
            if role in ("admin", "auditor"):
                await (await rig.begin(role)).close()
            else:
                with pytest.raises(Forbidden):
                    await rig.begin(role)

    asyncio.run(check())
    (last,) = [r for r in stored(tmp_path / "store") if (r.type, r.phase) == ("audit.follow", "outcome")]
    assert last.actor.role == role


def test_it_ends_at_once_when_the_client_goes(tmp_path: Path) -> None:
    """In core and in the audit daemon, on record, and its place is free."""

    async def check() -> None:
        async with running(tmp_path) as rig:
            for _ in range(2 * follow.MOST_EACH):
                channel = await rig.begin()
                await rig.until(lambda: rig.waiting == 1)
                ended = len(rig.ended())
                await channel.close()
                await rig.until(lambda: rig.waiting == 0 and len(rig.ended()) > ended)  # noqa: B023
            assert set(rig.ended()) == {("success", "")}

    asyncio.run(check())


def test_followers_are_limited_for_each_person_and_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with running(tmp_path) as rig:
            channels = [await rig.begin() for _ in range(follow.MOST_EACH)]
            with pytest.raises(UserError, match="too many followers") as refused:
                await rig.begin()
            assert refused.value.status == 429
            # Others may, and it is read page by page.
            channels.append(await rig.begin("admin"))
            assert (await rig.core.call("audit.read", "auditor", limit=1))["records"]
            monkeypatch.setattr(follow, "MOST", len(channels))
            with pytest.raises(UserError, match="too many followers"):
                await rig.begin("admin")
            await channels.pop().close()
            await rig.until(lambda: len(rig.ended()) == 3)
            channels.append(await rig.begin("admin"))
            for channel in channels:
                await channel.close()

    asyncio.run(check())


def test_a_quiet_trail_has_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "HEARTBEAT_S", 0.05)

    async def check() -> None:
        async with running(tmp_path) as rig, await rig.begin(actor="nobody") as channel:
            async with asyncio.timeout(10):
                for _ in range(3):
                    assert await channel.receive() == (wire.Kind.DATA, b"\n")

    asyncio.run(check())


def test_it_ends_with_core_and_without_audit_and_says_so(tmp_path: Path) -> None:
    async def check() -> None:
        async with running(tmp_path) as rig:
            channel = await rig.begin()
            await rig.core.dispatcher.close(5)
            with pytest.raises(wire.ProtocolError):
                await channel.receive()
            assert rig.ended() == [("failure", "cancelled: the service stopped")]
            await channel.close()
            channel = await rig.begin()
            await rig.until(lambda: rig.waiting == 1)
            rig.server.close()
            (rig.core.directory / "audit.sock").unlink(missing_ok=True)
            await rig.service._journal.append(Entry(type=EVENT), rig.service._own)
            async with asyncio.timeout(10):
                while (frame := await channel.receive())[0] is wire.Kind.DATA:
                    pass
            error = wire.error_of(msgspec.json.decode(frame[1], type=wire.Problem))
            assert isinstance(error, Unavailable) and "could not be recorded" in error.message
            await channel.close()

    asyncio.run(check())


@pytest.mark.parametrize("args", [{"after": -1}, {"type": "A"}, {"wait": 3}, {"limit": 3}, {"from": "x"}])
def test_what_cannot_be_followed_is_refused(args: dict[str, Any], tmp_path: Path) -> None:
    async def check() -> None:
        async with running(tmp_path) as rig:
            with pytest.raises(UserError, match=next(iter(args))):
                await rig.begin(**args)

    asyncio.run(check())
