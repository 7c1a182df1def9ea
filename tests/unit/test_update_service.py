"""The update daemon over its socket: who may call, one job at a time, progress, cancelling, bundles, idle end."""

from __future__ import annotations

import asyncio
import io
import socket
import tarfile
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_update_machine import World
from tests.unit.test_update_rig import flip, plain
from vmm import wire
from vmm.errors import Conflict, Forbidden, NotFound, UserError
from vmm.update import daemon
from vmm.update.service import Service
from vmm.update.types import Status
from vmm.wire import Kind

CALLER = {"caller": {"actor": {"id": "alice", "role": "admin", "origin": "192.0.2.1"}, "request": "r1"}}


class Client:
    """Calls the service as core does."""

    def __init__(self, path: Path, service: Service) -> None:
        self.path = path
        self.service = service

    async def __call__(self, method: str, **params: Any) -> Any:
        if method in ("check", "download", "apply"):
            params.setdefault("wait", True)
        return await wire.call(self.path, method, params)

    async def status(self) -> Status:
        return msgspec.convert(await self("status"), Status)

    async def cancel(self, release: threading.Event) -> Any:
        """Cancel the job, which waits for ``release`` until then."""
        assert (job := self.service._job)
        cancelling = asyncio.create_task(self("cancel"))
        assert await asyncio.to_thread(job._cancelled.wait, 10)
        release.set()
        return await cancelling

    async def upload(self, content: bytes) -> Any:
        async with await wire.open_call(self.path, "import", CALLER) as channel:
            await channel.send_data(content)
            await channel.send(Kind.END)
            return await channel.result()


def serve(world: World, body: Callable[[Client], Awaitable[None]], allowed: frozenset[int] = frozenset()) -> None:
    async def run() -> None:
        service = Service(world.env, world.work, allowed, world.strangers())
        path = world.folder / "update.sock"
        async with await wire.serve(path, service.handle):
            await body(Client(path, service))

    asyncio.run(run())


def test_a_whole_update(world: World) -> None:
    async def body(client: Client) -> None:
        status = await client.status()
        assert (status.running, status.phase, status.floor_source) == ("1.0.0", "idle", "file")
        assert [(slot.name, slot.state) for slot in status.slots] == [("a", "running"), ("b", "empty")]
        await client("check", **CALLER)
        assert (await client.status()).available == "1.1.0"
        staged = msgspec.convert(await client("download", **CALLER), Status)
        assert (staged.phase, staged.staged, staged.version) == ("staged", "1.1.0", "1.1.0")
        assert staged.done == staged.total > 0
        installed = msgspec.convert(await client("apply", **CALLER), Status)
        assert (installed.phase, installed.installed, installed.staged) == ("installed", "1.1.0", "")
        assert [(slot.name, slot.state, slot.tries) for slot in installed.slots] == [
            ("a", "running", None),
            ("b", "trying", 3),
        ]
        with pytest.raises(Conflict, match="waits for its reboot"):
            await client("apply")
        assert "waits for its reboot" in (await client.status()).error
        await client("rollback", **CALLER)
        assert (await client.status()).phase == "idle"
        events = await client("history", limit=2)
        assert [(event["type"], event["version"]) for event in events] == [
            ("update.apply", "1.1.0"),
            ("update.rollback", "1.1.0"),
        ]
        assert set(events[0]) == {"time", "type", "version", "outcome", "reason"}
        assert (await client("settle"))["verdict"]["kind"] == "blessed"

    serve(world, body)
    assert world.records[0].actor.id == "alice" and world.records[0].extra["caller_request"] == "r1"


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("check", {"source": "disk"}),
        ("check", {"other": 1}),
        ("download", {"version": "../1"}),
        ("download", {"version": 7}),
        ("apply", {"version": "1.1.0"}),
        ("status", {"x": 1}),
        ("history", {"limit": 0}),
        ("apply", {"caller": {"actor": {"who": "x"}}}),
    ],
)
def test_wrong_parameters(world: World, method: str, params: dict[str, Any]) -> None:
    async def body(client: Client) -> None:
        with pytest.raises(UserError, match="^update: "):
            await client(method, **params)

    serve(world, body)
    assert world.records == []


def test_who_may_call(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(client: Client) -> None:
        with pytest.raises(NotFound, match="no method 'flash'"):
            await client("flash")
        monkeypatch.setattr(wire.Channel, "peer", wire.Peer(1, 902, 902))
        await client("status")
        for method in ("settle", "bless", "condemn"):
            with pytest.raises(Forbidden, match="for the host itself"):
                await client(method)
        monkeypatch.setattr(wire.Channel, "peer", wire.Peer(1, 70000, 70000))
        for method in ("status", "check", "apply", "settle", "flash"):
            with pytest.raises(Forbidden, match="uid 70000"):
                await client(method)

    serve(world, body, frozenset({902}))


class Gate:
    """Holds the machine at one of its steps until told to go on."""

    def __init__(self, world: World, at: str) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._at = at
        world.machine.steps = self._step

    def _step(self, step: str) -> None:
        if step == self._at:
            self.reached.set()
            assert self.open.wait(10)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 10)


@pytest.mark.parametrize(("at", "phase"), [("write slot", "writing"), ("verify", "verifying")])
def test_one_job_at_a_time_and_cancelling_it(world: World, at: str, phase: str) -> None:
    async def body(client: Client) -> None:
        await client("download")
        gate = Gate(world, at)
        await client("apply", wait=False)
        await gate.wait()
        assert (await client.status()).phase == phase
        for method in ("check", "download", "apply", "rollback", "settle"):
            with pytest.raises(Conflict, match=f"the updater is busy: {phase}"):
                await client(method)
        after = msgspec.convert(await client.cancel(gate.open), Status)
        assert (after.phase, after.error) == ("staged", "the update was cancelled")
        with pytest.raises(Conflict, match="nothing that could be cancelled"):
            await client("cancel")

    serve(world, body)
    assert [p.name for p in world.machine.linux.iterdir()] == ["holdfast_1.0.0.efi"]


def test_the_last_step_is_not_cancelled(world: World) -> None:
    async def body(client: Client) -> None:
        await client("download")
        gate = Gate(world, "uki copied")
        call = asyncio.create_task(client("apply"))
        await gate.wait()
        assert (await client.status()).phase == "finishing"
        with pytest.raises(Conflict, match="cannot be cancelled"):
            await client("cancel")
        client.service.stop()
        gate.open.set()
        assert (await call)["installed"] == "1.1.0"

    serve(world, body)


def test_a_caller_that_goes_away_does_not_end_the_job(world: World) -> None:
    async def body(client: Client) -> None:
        await client("download")
        gate = Gate(world, "write slot")
        async with await wire.open_call(client.path, "apply"):
            await gate.wait()
        gate.open.set()
        while (await client.status()).phase != "installed":
            await asyncio.sleep(0.01)

    serve(world, body)


def test_a_failed_job_is_told_and_recorded(world: World) -> None:
    flip(world.env.bundle / "metadata/timestamp.json")

    async def body(client: Client) -> None:
        with pytest.raises(UserError, match="TUF timestamp") as told:
            await client("check", **CALLER)
        assert told.value.code == "update-refused" and told.value.status == 409
        assert "TUF timestamp" in (await client.status()).error

    serve(world, body)
    assert world.trail() == [("update.check", "intent", "pending"), ("update.check", "outcome", "failure")]
    assert world.records[1].extra["layer"] == "TUF timestamp"


def bundle(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.add(folder, ".")
    return out.getvalue()


def test_jobs_are_begun_on_record_and_followed_by_their_status(world: World) -> None:
    """How core calls: the answer comes once the intent is recorded, or with what stopped it before."""

    async def body(client: Client) -> None:
        with pytest.raises(Conflict, match="nothing is staged"):
            await client("apply", wait=False)
        await client("check", source="", override_expiry=False, wait=False)
        while (await client.status()).phase == "checking":
            await asyncio.sleep(0.01)
        status = msgspec.convert(await client("download", version=None, retry_failed=False, wait=False), Status)
        assert world.trail()[2] == ("update.download", "intent", "pending")
        while (status := await client.status()).phase in ("checking", "downloading"):
            await asyncio.sleep(0.01)
        assert (status.phase, status.error) == ("staged", "")
        gate = Gate(world, "signer")
        await client("apply", wait=False)
        await gate.wait()
        world.machine.signer = ""
        gate.open.set()
        while not (status := await client.status()).error:
            await asyncio.sleep(0.01)
        assert status.error.startswith("UKI signer: ") and status.phase == "staged"

    serve(world, body)


def test_an_error_of_our_own_is_not_hidden(world: World) -> None:
    """Nobody waits for the job any more; its status, the journal and the trail tell of it."""
    seen: list[str] = []

    async def body(client: Client) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(str(context["exception"])))
        await client("download")
        gate = Gate(world, "signer")
        await client("apply", wait=False)
        await gate.wait()

        def fail(step: str) -> None:
            raise ZeroDivisionError("ours")

        world.machine.steps = fail
        gate.open.set()
        while not (status := await client.status()).error:
            await asyncio.sleep(0.01)
        assert (status.phase, status.error) == ("staged", "an internal error; the journal has its trace")

    serve(world, body)
    assert seen == ["ours"] and world.records[-1].reason == "an internal error: ZeroDivisionError"


def test_restarting_the_host(world: World) -> None:
    async def body(client: Client) -> None:
        await client("reboot", how="poweroff")
        with pytest.raises(UserError, match="^update: "):
            await client("reboot", how="halt")
        await client("download")
        gate = Gate(world, "write slot")
        await client("apply", wait=False)
        await gate.wait()
        with pytest.raises(Conflict, match="busy: writing"):
            await client("reboot", how="reboot")
        gate.open.set()

    serve(world, body)
    assert world.left == ["poweroff"]


def test_import(world: World) -> None:
    world.repository.add("1.2.0")
    world.repository.publish()
    content = bundle(world.repository.folder)

    async def body(client: Client) -> None:
        with pytest.raises(UserError, match="bundle: it is no tar"):
            await client.upload(b"x" * 5000)
        with pytest.raises(UserError, match="bundle: it is incomplete"):
            await client.upload(content[:100_000])
        async with await wire.open_call(client.path, "import", {"length": len(content) + 1}) as channel:
            await channel.send_data(content)
            await channel.send(Kind.END)
            with pytest.raises(UserError, match="were announced"):
                await channel.result()
        # An upload that breaks off leaves what was there.
        async with await wire.open_call(client.path, "import", CALLER) as channel:
            await channel.send_data(content[:100_000])
        while (await client.status()).phase != "idle":
            await asyncio.sleep(0.01)
        await client("check")
        assert (await client.status()).available == "1.1.0"
        await client.upload(content)
        await client("check", source="bundle")
        assert (await client.status()).available == "1.2.0"
        # For the time after the reboot that the host is waiting for, one may already be brought.
        await client("download")
        await client("apply")
        await client.upload(content)
        assert (await client.status()).phase == "installed"

    serve(world, body)
    imports = [(entry.phase, entry.outcome) for entry in world.records if entry.type == "update.import"]
    assert imports == [
        *[("intent", "pending"), ("outcome", "failure")] * 4,
        ("intent", "pending"),
        ("outcome", "success"),
        ("intent", "pending"),
        ("outcome", "success"),
    ]


def test_expired_bundles_need_a_word_from_an_administrator(world: World) -> None:
    world.clock[0] += 30 * 86400

    async def body(client: Client) -> None:
        with pytest.raises(UserError, match="TUF timestamp: expired"):
            await client("check")
        await client("check", override_expiry=True, **CALLER)
        # What was said for the check holds for the download of what it found, and is in both records.
        await client("download", **CALLER)
        world.env.store.change(overridden=False)
        with pytest.raises(UserError, match="TUF timestamp: expired"):
            await client("download")
        await client("download", override_expiry=True)

    serve(world, body)
    overridden = [entry for entry in world.records if entry.extra.get("override_expiry")]
    assert len(overridden) == 6
    assert world.records[3].extra["expired"] == ["timestamp", "snapshot", "targets"]
    assert world.env.store.state.seen == 0


def test_settling_over_the_socket(world: World) -> None:
    async def before(client: Client) -> None:
        await client("download")
        await client("apply")

    async def after(client: Client) -> None:
        assert (await client("settle"))["verdict"]["kind"] == "trial"
        assert (await client.status()).phase == "installed"
        assert (await client("bless"))["verdict"] == {
            "kind": "blessed",
            "version": "1.1.0",
            "reason": "",
            "tries": 0,
        }
        status = await client.status()
        assert (status.running, status.phase, status.floor) == ("1.1.0", "idle", 1)

    serve(world, before)
    world.restarted(version="1.1.0", root_hash=plain("1.1.0").root_hash)
    serve(world, after)


def test_the_daemon_ends_when_nobody_needs_it(world: World) -> None:
    async def run() -> None:
        path = world.folder / "update.sock"
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind(str(path))
        listening.listen()
        service = Service(world.env, world.work, frozenset(), world.strangers())
        serving = asyncio.create_task(daemon.serve(listening, service, idle=0.3))
        gate = Gate(world, "signer")
        await wire.call(path, "download", {"wait": True})
        await wire.call(path, "apply", {"wait": False})
        await gate.wait()
        await asyncio.sleep(0.5)
        assert not serving.done()
        gate.open.set()
        await asyncio.wait_for(serving, 5)
        assert world.env.store.state.installed is not None
        assert path.is_socket(), "systemd listens on it, and starts the next one by it"

    asyncio.run(run())
