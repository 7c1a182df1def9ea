"""The kernel's audit socket: being its reader, giving it rules, asking how it stands (linux/audit.h, netlink(7))."""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from vmm.errors import Unavailable

_PROTOCOL = 9  # NETLINK_AUDIT
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST, _ACK, _DUMP_DONE = 0x1, 0x4, 3
_ERROR = 2
GET, SET, ADD_RULE, LIST_RULES = 1000, 1001, 1011, 1013
REPLACE = 1329
"""What the kernel tells its reader when another process wants to become it."""
_FIRST_EVENT = 1100
"""Types below are control messages and answers to them."""
LOCKED = 2
"""``enabled`` from which nothing about audit but its reader can be changed until the host starts again."""

_STATUS = struct.Struct("=10I")
_ENABLED, _FAILURE, _PID, _BACKLOG_LIMIT, _WAIT_TIME = 0x1, 0x2, 0x4, 0x10, 0x20
_SAY = 1
"""What the kernel does when it loses a record: it says so in its log. (2 would be a panic.)"""
BACKLOG_LIMIT = 8192
WAIT_TIME = 250
"""Ticks (4 ms each) for which a process waits with its event while the backlog is full. The kernel's 60 s would let a
reader that hangs stop the host; a reader that works makes room in milliseconds."""

_MOST = 16 << 10
"""Bytes of a message; the kernel's are at most 8970."""
_ANSWER_S = 5.0
_BUFFER = 4 << 20
"""Bytes asked for; the kernel gives what net.core.rmem_max allows, and keeps the rest itself."""


class Status(NamedTuple):
    """How the kernel's audit stands: its reader's process id, and what was lost since it started."""

    enabled: int
    pid: int
    lost: int
    backlog: int


class Message(NamedTuple):
    """An event's record as it comes: its type and its text."""

    type: int
    text: bytes


class Link(Protocol):
    """The kernel, or what tests put in its place."""

    def fileno(self) -> int:
        """What becomes readable when there are messages."""

    def status(self) -> Status:
        """Ask how audit stands. Raises: Unavailable."""

    def rules(self) -> list[bytes]:
        """The rules in force. Raises: Unavailable."""

    def add_rule(self, rule: bytes) -> None:
        """Add a rule. Raises: Unavailable."""

    def register(self) -> None:
        """Become the reader. Raises: Unavailable when another process is."""

    def unregister(self) -> None:
        """Be it no more; the kernel keeps what comes until the next one. Raises: Unavailable."""

    def lock(self) -> None:
        """Keep everybody, root included, from changing rules until the host starts again. Raises: Unavailable."""

    def receive(self, most: int) -> list[Message]:
        """Up to ``most`` messages that are there, without waiting, and all that came among answers."""


def open_audit() -> socket.socket:
    """The kernel's audit socket. Raises: Unavailable when the kernel has none."""
    try:
        opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _PROTOCOL)
    except OSError as error:
        raise Unavailable(f"the kernel has no audit: {error.strerror}") from None
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return opened


class Kernel:
    """The socket itself. Answers to requests are waited for; events that come meanwhile are kept for receive()."""

    def __init__(self, opened: socket.socket, clock: Callable[[], float] = time.monotonic) -> None:
        """Arguments: a socket as open_audit() makes it."""
        self._socket = opened
        self._clock = clock
        self._sequence = 0
        self._early: list[Message] = []

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._socket.fileno()

    def status(self) -> Status:
        """See Link."""
        for type_, payload in self._ask(GET, b""):
            if type_ == GET and len(payload) >= 32:
                _, enabled, _, pid, _, _, lost, backlog = struct.unpack_from("=8I", payload)
                return Status(enabled, pid, lost, backlog)
        raise Unavailable("the kernel's audit did not say how it stands")

    def rules(self) -> list[bytes]:
        """See Link."""
        return [payload for type_, payload in self._ask(LIST_RULES, b"", until=_DUMP_DONE) if type_ == LIST_RULES]

    def add_rule(self, rule: bytes) -> None:
        """See Link."""
        self._order(ADD_RULE, rule, "take a rule")

    def register(self) -> None:
        """See Link."""
        mask = _PID | _FAILURE | _BACKLOG_LIMIT | _WAIT_TIME
        if self.status().enabled == LOCKED:
            mask = _PID  # the rest was set before it was locked, by an earlier run
        self._set(mask, pid=os.getpid(), what="take us for its reader")

    def unregister(self) -> None:
        """See Link."""
        self._set(_PID, pid=0, what="let us go")

    def lock(self) -> None:
        """See Link."""
        self._set(_ENABLED, enabled=LOCKED, what="lock its rules")

    def receive(self, most: int) -> list[Message]:
        """See Link."""
        found, self._early = self._early, []
        while len(found) < most and (got := self._take()) is not None:
            type_, _, payload = got
            if type_ >= _FIRST_EVENT:
                found.append(Message(type_, payload))
        return found

    def close(self) -> None:
        """Close the socket; the kernel finds out with the next event and keeps it."""
        self._socket.close()

    def _set(self, mask: int, *, enabled: int = 0, pid: int = 0, what: str) -> None:
        fields = (mask, enabled, _SAY, pid, 0, BACKLOG_LIMIT, 0, 0, 0, WAIT_TIME)
        self._order(SET, _STATUS.pack(*fields), what)

    def _order(self, type_: int, payload: bytes, what: str) -> None:
        for answer, told in self._ask(type_, payload):
            if answer == _ERROR and len(told) >= 4:
                (number,) = struct.unpack_from("=i", told)
                if number:
                    raise Unavailable(f"the kernel's audit does not {what}: {os.strerror(-number)}")
                return
        raise Unavailable(f"the kernel's audit did not answer whether it does {what}")

    def _ask(self, type_: int, payload: bytes, until: int | None = None) -> Iterator[tuple[int, bytes]]:
        """Send a request; yield the answers to it as they come, up to the one of type ``until``, for some seconds."""
        self._sequence += 1
        head = _HEADER.pack(_HEADER.size + len(payload), type_, _REQUEST | _ACK, self._sequence, 0)
        try:
            self._socket.sendto(head + payload, (0, 0))
        except OSError as error:
            raise Unavailable(f"the kernel's audit takes no request: {error.strerror}") from None
        end = self._clock() + _ANSWER_S
        while (left := end - self._clock()) > 0:
            got = self._take(wait=left)
            if got is None:
                continue
            answer, sequence, told = got
            if answer >= _FIRST_EVENT:
                self._early.append(Message(answer, told))
            elif sequence == self._sequence:
                if answer == until:
                    return
                yield answer, told

    def _take(self, wait: float = 0.0) -> tuple[int, int, bytes] | None:
        """A message of the kernel's: type, the request that it answers, content; None when none came.

        Raises: Unavailable.
        """
        self._socket.settimeout(wait)
        try:
            data, sender = self._socket.recvfrom(_MOST)
        except (BlockingIOError, InterruptedError, TimeoutError):
            return None
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return None  # the kernel keeps what did not fit
            raise Unavailable(f"the kernel's audit socket failed: {error.strerror}") from None
        # Whoever may send over netlink could send to us: only the kernel has port 0.
        if sender[0] != 0 or len(data) < _HEADER.size + 4:
            return None
        # The length in an event's header leaves out the header (audit_log_end), so the datagram's own counts.
        _, type_, _, sequence, _ = _HEADER.unpack_from(data)
        return type_, sequence, data[_HEADER.size :]
