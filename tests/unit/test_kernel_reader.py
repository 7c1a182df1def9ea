"""The reader between a made-up kernel and a made-up audit daemon: registration, floods, kills, joining."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_kernel_judge import ABOUT, UUID, call, virt
from vmm.audit.client import Entry, Refused
from vmm.audit.events import EVENTS
from vmm.errors import Unavailable
from vmm.kernel import netlink
from vmm.kernel.daemon import Reader, Said
from vmm.kernel.netlink import Message, Status
from vmm.kernel.rules import RULES, comparable


class FakeKernel:
    """What the kernel does: one reader, rules that can be locked, messages that wait."""

    def __init__(self) -> None:
        self.pid = 0
        self.enabled = 1
        self.lost = 0
        self.other = 0
        self.taken: list[bytes] = []
        self.waiting: list[Message] = []
        self.broken = False
        self.ours, self.theirs = socket.socketpair()

    def fileno(self) -> int:
        return self.ours.fileno()

    def status(self) -> Status:
        if self.broken:
            raise Unavailable("the kernel's audit socket failed: broken")
        return Status(self.enabled, self.other or self.pid, self.lost, 0)

    def rules(self) -> list[bytes]:
        return [comparable(rule) for rule in self.taken]

    def add_rule(self, rule: bytes) -> None:
        assert self.enabled != netlink.LOCKED and comparable(rule) not in self.rules()
        self.taken.append(rule)

    def register(self) -> None:
        if self.other:
            raise Unavailable("the kernel's audit does not take us for its reader: File exists")
        self.pid = os.getpid()

    def unregister(self) -> None:
        self.pid = 0

    def lock(self) -> None:
        self.enabled = netlink.LOCKED

    def receive(self, most: int) -> list[Message]:
        found, self.waiting = self.waiting[:most], self.waiting[most:]
        if not self.waiting:
            self.ours.setblocking(False)
            try:
                self.ours.recv(4096)
            except BlockingIOError:
                pass
        return found

    def say(self, serial: int, *records: tuple[int, str], seconds: int = 1700000000) -> None:
        if not self.waiting:
            self.theirs.send(b"x")
        for type_, body in (*records, (1320, "")):
            self.waiting.append(Message(type_, f"audit({seconds}.000:{serial}): {body}".encode()))

    def close(self) -> None:
        self.ours.close()
        self.theirs.close()


class FakeAudit:
    """Takes what is registered; ``operations`` are those under way, ``gone`` whether it answers at all."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.operations: dict[str, str] = {}
        self.gone = False
        self.refuse = False

    async def append(self, entry: Entry) -> int:
        await asyncio.sleep(0)
        if self.gone:
            raise Unavailable("gone")
        if self.refuse:
            raise Refused("no")
        EVENTS.check(msgspec.convert(msgspec.to_builtins(entry), Entry), "holdfast-kernel")
        self.entries.append(entry)
        return len(self.entries)

    async def operation(self, object: str, types: Sequence[str], time: int) -> str:
        await asyncio.sleep(0)
        if self.gone:
            raise Unavailable("gone")
        return next((self.operations[type_] for type_ in types if type_ in self.operations), "")

    def of(self, type: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.type == type]


class World:
    """A reader that runs, and what is around it."""

    def __init__(self, folder: Path) -> None:
        self.kernel = FakeKernel()
        self.audit = FakeAudit()
        self.status = folder / "status.json"
        self.now = 1000.0
        self.reader = self.new_reader()

    def new_reader(self) -> Reader:
        return Reader(self.kernel, self.audit, self.status, clock=lambda: self.now, retry=0.001)

    def said(self) -> Said:
        return msgspec.json.decode(self.status.read_bytes(), type=Said)

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not done():
                await asyncio.sleep(0.001)

    def settled(self, serial: int) -> bool:
        self.reader.tick()
        return self.said().serial == serial


def run(folder: Path, body: Callable[[World], Awaitable[None]], *, stop: bool = True) -> World:
    world = World(folder)

    async def whole() -> None:
        ending = asyncio.Event()
        running = asyncio.create_task(world.reader.run(ending))
        await asyncio.sleep(0)
        try:
            await body(world)
            if stop:
                ending.set()
                await asyncio.wait_for(running, 10)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    asyncio.run(whole())
    world.kernel.close()
    return world


DENIED = call(257, "open", -13)


def test_it_registers_sets_the_rules_locks_them_and_ends_in_order(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        assert world.kernel.pid == os.getpid() and world.kernel.enabled == netlink.LOCKED
        assert world.kernel.taken == list(RULES)
        world.kernel.say(7, DENIED, (1302, 'name="/etc/shadow"'))
        await world.until(lambda: bool(world.audit.of("kernel.open")))
        # What comes while it ends is read, too.
        world.kernel.say(8, call(105, "identity", -1))

    world = run(tmp_path, body)
    assert world.kernel.pid == 0
    assert [entry.type for entry in world.audit.entries] == [
        *("kernel.start", "kernel.open", "kernel.identity", "kernel.stop"),
    ]
    assert world.audit.entries[0].extra == {"rules": len(RULES), "again": False}
    assert world.said().serial == 8


def test_rules_that_are_there_are_not_set_again(tmp_path: Path) -> None:
    async def first(world: World) -> None:
        world.kernel.enabled = 1
        del world.kernel.taken[3:]
        world.kernel.pid = 0
        world.reader.look()
        assert world.kernel.taken == list(RULES) and world.kernel.enabled == netlink.LOCKED
        world.kernel.pid = 0
        world.reader.look()
        assert world.said().problem == ""
        del world.kernel.taken[-1]
        world.kernel.pid = 0
        world.reader.look()
        assert "1 rules are missing" in world.said().problem

    world = run(tmp_path, first)
    assert [entry.outcome for entry in world.audit.of("kernel.start")] == ["success"] * 3 + ["failure"]


def test_another_reader_is_told_once_and_succeeded(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.kernel.other = 666
        for _ in range(5):
            world.reader.look()
        assert "File exists" in world.said().problem
        world.kernel.other = world.kernel.pid = 0
        world.reader.look()
        assert world.said().problem == ""
        world.kernel.waiting.append(Message(netlink.REPLACE, struct.pack("=I", 667)))
        world.kernel.waiting.append(Message(netlink.REPLACE, struct.pack("=I", os.getpid())))
        world.reader.read()

    world = run(tmp_path, body)
    assert [entry.outcome for entry in world.audit.of("kernel.start")] == ["success", "failure", "success"]
    assert [entry.outcome for entry in world.audit.of("kernel.config")] == ["failure"]


def test_what_came_among_the_kernels_answers_is_read(tmp_path: Path) -> None:
    """What the kernel kept for a reader comes while that one still registers; the socket stays silent behind it."""

    async def body(world: World) -> None:
        world.kernel.say(7, DENIED, (1302, 'name="/etc/shadow"'))
        world.kernel.ours.recv(4096)
        world.reader.look()
        assert world.kernel.waiting == []

    world = run(tmp_path, body)
    assert [entry.extra["path"] for entry in world.audit.of("kernel.open")] == ["/etc/shadow"]


def test_what_the_kernel_lost_is_a_record(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.kernel.lost = 5
        world.reader.look()
        world.reader.look()
        world.kernel.lost = 7
        world.reader.look()
        assert world.said().lost == 7

    world = run(tmp_path, body)
    assert [entry.extra for entry in world.audit.of("kernel.lost")] == [
        {"where": "kernel", "count": 5},
        {"where": "kernel", "count": 2},
    ]
    assert all(entry.outcome == "failure" for entry in world.audit.of("kernel.lost"))


def test_a_flood_becomes_few_records_with_its_count_and_hides_no_other(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        for serial in range(1, 2001):
            world.kernel.say(serial, DENIED, (1302, f'name="/etc/{serial}"'))
        world.kernel.say(2001, call(257, "open", -13, "pid=5 uid=902 subj=unconfined"))
        await world.until(lambda: any(entry.actor.id == "uid 902" for entry in world.audit.entries))

    world = run(tmp_path, body)
    flood = [entry for entry in world.audit.of("kernel.open") if entry.object.id == UUID]
    assert len(flood) == 6 and flood[-1].extra["suppressed"] == 2000 - 6
    assert flood[-1].extra["path"] == "/etc/2000"
    assert sum(1 + entry.extra.get("suppressed", 0) for entry in flood) == 2000


def test_nothing_is_given_up_while_the_audit_daemon_is_gone(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.audit.gone = True
        world.kernel.say(3, DENIED)
        world.kernel.say(4, virt(2500, f"op=stop reason=destroyed {ABOUT} vm-pid=0"))
        await asyncio.sleep(0.05)
        assert not world.audit.of("kernel.open") and not world.settled(4)
        world.audit.gone = False
        await world.until(lambda: world.settled(4))

    world = run(tmp_path, body)
    assert {entry.type for entry in world.audit.entries} >= {"kernel.open", "libvirt.unasked"}


def test_more_than_can_wait_is_counted(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.audit.gone = True
        for serial in range(1, 1502):
            process = f"pid=5 uid={serial} subj=unconfined"
            world.kernel.say(serial, call(257, "open", -13, process))
        await world.until(lambda: not world.kernel.waiting)
        await asyncio.sleep(0.05)
        world.audit.gone = False
        await world.until(lambda: bool(world.audit.of("kernel.open")))
        world.reader.tick()

    world = run(tmp_path, body)
    lost = sum(entry.extra["count"] for entry in world.audit.of("kernel.lost"))
    written = sum(1 + entry.extra.get("suppressed", 0) for entry in world.audit.of("kernel.open"))
    assert lost + written == 1501 and lost < 600


def test_a_refused_record_is_not_tried_for_ever(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def body(world: World) -> None:
        await world.until(lambda: bool(world.audit.entries))
        world.audit.refuse = True
        world.kernel.say(3, DENIED)
        await world.until(lambda: world.settled(3))
        world.audit.refuse = False

    run(tmp_path, body)
    assert "kernel.open of local not recorded: no" in capsys.readouterr().err


def test_a_kill_loses_nothing_that_was_written_and_counts_what_was_not(tmp_path: Path) -> None:
    async def killed_at_rest(world: World) -> None:
        world.kernel.say(7, DENIED)
        await world.until(lambda: world.settled(7))

    async def killed_at_work(world: World) -> None:
        assert world.said().serial == 7
        world.kernel.say(8, DENIED)
        await world.until(lambda: world.settled(8))
        world.audit.gone = True
        world.kernel.say(9, DENIED)
        world.kernel.say(10, DENIED)
        await world.until(lambda: not world.kernel.waiting)

    async def after(world: World) -> None:
        assert world.said().serial == 8
        world.kernel.say(11, DENIED)
        await world.until(lambda: bool(world.audit.of("kernel.open")))
        world.now += 5
        world.reader.tick()

    run(tmp_path, killed_at_rest, stop=False)
    world = run(tmp_path, killed_at_work, stop=False)
    assert not world.audit.of("kernel.lost")
    world = run(tmp_path, after)
    assert [entry.extra for entry in world.audit.of("kernel.lost")] == [{"where": "reader", "count": 2}]
    assert [entry.extra["again"] for entry in world.audit.of("kernel.start")] == [True]


def test_a_socket_that_breaks_ends_it(tmp_path: Path) -> None:
    async def body(world: World) -> None:
        world.kernel.broken = True
        with pytest.raises(Unavailable, match="broken"):
            world.reader.look()

    run(tmp_path, body)


def test_what_libvirt_does_is_joined_with_who_asked(tmp_path: Path) -> None:
    def stop(reason: str) -> tuple[int, str]:
        return virt(2500, f"op=stop reason={reason} {ABOUT} vm-pid=0")

    async def body(world: World) -> None:
        world.audit.operations = {"machine.force-off": "r1", "host.stop-guests": "r2"}
        world.kernel.say(1, stop("destroyed"))
        world.kernel.say(2, stop("saved"))
        world.kernel.say(3, stop("shutdown"))
        await world.until(lambda: len(world.audit.of("libvirt.control")) == 3)
        world.audit.operations = {"machine.suspend": "r4"}
        named = ABOUT.replace('vm="vm1"', f'vm="vm1_{UUID}"')
        world.kernel.say(7, virt(2500, f"op=stop reason=saved {named} vm-pid=0"))
        await world.until(lambda: len(world.audit.of("libvirt.control")) == 4)
        world.audit.operations = {"machine.console": "r3"}
        world.kernel.say(4, stop("destroyed"))
        world.kernel.say(5, virt(2501, f'resrc=disk reason=attach {ABOUT} old-disk="?" new-disk="/etc/shadow"'))
        world.kernel.say(6, virt(2500, f"op=start reason=booted {ABOUT} vm-pid=1", subj="unconfined"))
        await world.until(lambda: len(world.audit.of("libvirt.unasked")) == 3)

    world = run(tmp_path, body)
    assert [entry.request for entry in world.audit.of("libvirt.control")] == ["r1", "r2", "", "r4"]
    assert {entry.object.name for entry in world.audit.of("libvirt.control")} == {"vm1"}
    unasked = world.audit.of("libvirt.unasked")
    assert [(entry.extra["serial"], entry.object.id, entry.outcome) for entry in unasked] == [
        *((serial, UUID, "failure") for serial in (4, 5, 6)),
    ]
    assert [entry.reason for entry in unasked] == [
        *["nobody asked the service for it"] * 2,
        "another process spoke in libvirt's name",
    ]
    assert not world.audit.of("libvirt.resource")
