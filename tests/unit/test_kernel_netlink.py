"""The kernel's audit socket: what is asked and ordered, what is taken for an answer and what for an event."""

from __future__ import annotations

import os
import struct

import pytest

from vmm.errors import Unavailable
from vmm.kernel import netlink
from vmm.kernel.netlink import Status
from vmm.kernel.rules import RULES


class Answering:
    """The kernel's side of the audit socket, as a socket that answers what is sent to it."""

    def __init__(self, *answers: tuple[int, bytes]) -> None:
        self.sent: list[bytes] = []
        self.answers = answers
        self.queue: list[tuple[bytes, tuple[int, int]]] = []

    def fileno(self) -> int:
        return -1

    def settimeout(self, _seconds: float) -> None:
        pass

    def sendto(self, data: bytes, _address: tuple[int, int]) -> None:
        self.sent.append(data)
        sequence = struct.unpack_from("=IHHII", data)[3]
        for type_, payload in self.answers:
            self.put(type_, payload, sequence)

    def put(self, type_: int, payload: bytes, sequence: int = 0, sender: int = 0) -> None:
        self.queue.append((struct.pack("=IHHII", len(payload), type_, 0, sequence, 0) + payload, (sender, 0)))

    def recvfrom(self, _most: int) -> tuple[bytes, tuple[int, int]]:
        if not self.queue:
            raise BlockingIOError
        return self.queue.pop(0)


def kernel(*answers: tuple[int, bytes]) -> tuple[netlink.Kernel, Answering]:
    there = Answering(*answers)
    ticks = iter(range(1000))
    return netlink.Kernel(there, clock=lambda: float(next(ticks))), there  # type: ignore[arg-type]


OK = (2, struct.pack("=i", 0) + bytes(16))


def test_the_status_is_asked_for_and_read() -> None:
    # As a kernel 6.18 answered: enabled, failure 1, reader 77, backlog limit 8192, 3 lost.
    state = struct.pack("=11I", 0, 1, 1, 77, 0, 8192, 3, 2, 0x7F, 15000, 0)
    link, there = kernel((netlink.GET, state), OK)
    assert link.status() == Status(1, 77, 3, 2)
    assert link.status() == Status(1, 77, 3, 2), "what was left of the first answer is not taken for the second"
    assert there.sent[0] == struct.pack("=IHHII", 16, 1000, 5, 1, 0)


def test_orders_and_refusals() -> None:
    link, there = kernel(OK)
    link.add_rule(RULES[0])
    assert there.sent[-1][16:] == RULES[0]
    link.lock()
    assert struct.unpack("=10I", there.sent[-1][16:])[:2] == (0x1, 2)
    link.unregister()
    assert struct.unpack("=10I", there.sent[-1][16:])[:4] == (0x4, 0, 1, 0)
    link, _ = kernel((2, struct.pack("=i", -1) + bytes(16)))
    with pytest.raises(Unavailable, match="does not lock its rules: Operation not permitted"):
        link.lock()
    link, _ = kernel()
    with pytest.raises(Unavailable, match="did not answer"):
        link.lock()


@pytest.mark.parametrize(("enabled", "mask"), [(1, 0x36), (2, 0x4)])
def test_registering_says_who_reads_and_sets_the_rest_unless_it_is_locked(enabled: int, mask: int) -> None:
    link, there = kernel((netlink.GET, struct.pack("=8I", 0, enabled, 1, 0, 0, 64, 0, 0)), OK)
    link.register()
    fields = struct.unpack("=10I", there.sent[-1][16:])
    assert fields[0] == mask and fields[3] == os.getpid() and fields[5] == 8192 and fields[9] == 250


def test_rules_are_listed_up_to_the_end() -> None:
    link, _ = kernel(OK, (netlink.LIST_RULES, RULES[0]), (netlink.LIST_RULES, RULES[1]), (3, bytes(4)))
    assert link.rules() == list(RULES[:2])


def test_events_are_the_kernels_only_and_wait_while_something_is_asked() -> None:
    link, there = kernel(OK)
    there.put(1400, b"audit(1.000:1): a=1")
    link.lock()
    there.put(1400, b"audit(1.000:2): a=1", sender=4242)
    there.put(1400, b"", sender=0)
    there.put(1400, b"audit(1.000:3): a=1")
    got = [message for _ in range(4) for message in link.receive(10)]
    assert [message.text for message in got] == [b"audit(1.000:1): a=1", b"audit(1.000:3): a=1"]
