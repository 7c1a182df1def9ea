"""The harness' waiting, consoles, monitor client and link, against sockets in this process."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.link import Link
from tests.harness.qmp import Qmp, QmpError
from tests.harness.stream import Closed, Console
from tests.harness.waiting import Expired, poll


@pytest.fixture
def pair() -> Iterator[tuple[Console, socket.socket]]:
    ours, theirs = socket.socketpair()
    console = Console(ours, name="serial")
    yield console, theirs
    console.close()
    theirs.close()


def serve(path: Path, conversation: Callable[[socket.socket], None]) -> threading.Thread:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(1)

    def run() -> None:
        connection, _ = listener.accept()
        with connection, listener:
            conversation(connection)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_poll_returns_the_first_true_answer() -> None:
    answers = iter([0, 0, 7])
    assert poll(lambda: next(answers), 5, "a number", interval=0.001) == 7


def test_poll_names_what_did_not_happen_and_the_last_answer() -> None:
    with pytest.raises(Expired, match="the moon: not within 0 s; last answer ''"):
        poll(lambda: "", 0.02, "the moon", interval=0.005)


def test_expect_joins_chunks_and_consumes_up_to_the_match(pair: tuple[Console, socket.socket]) -> None:
    console, far = pair
    far.sendall(b"boot HOLD")
    far.sendall(b"FAST-GUEST READY\r\nmore")
    assert console.expect(r"HOLDFAST-(\w+) READY", 5)[1] == "GUEST"
    assert console.expect(r"mo", 5)
    with pytest.raises(Expired, match="the last text was 're'"):
        console.expect("boot", 0.05)


def test_expect_keeps_characters_that_arrive_in_halves(pair: tuple[Console, socket.socket]) -> None:
    console, far = pair
    for byte in "ä|".encode():
        far.sendall(bytes([byte]))
    assert console.expect(r"(.)\|", 5)[1] == "ä"


def test_expect_says_what_was_there_instead(pair: tuple[Console, socket.socket]) -> None:
    console, far = pair
    far.sendall(b"panic")
    console.expect("pan", 5)
    with pytest.raises(Expired, match=r"serial: 'login': not within 0 s; the last text was 'ic'"):
        console.expect("login", 0.05)


def test_expect_ends_with_the_stream(pair: tuple[Console, socket.socket]) -> None:
    console, far = pair
    far.sendall(b"bye")
    far.close()
    with pytest.raises(Closed, match="ended before 'login'; the last text was 'bye'"):
        console.expect("login", 5)
    with pytest.raises(Closed):
        console.expect("login", 5)


def test_a_dot_does_not_match_the_end_of_a_line(pair: tuple[Console, socket.socket]) -> None:
    console, far = pair
    far.sendall(b"version 1\nready\n")
    assert console.expect("version (.*)", 5)[1] == "1"


def test_a_writer_never_waits_and_single_bytes_are_found_quickly(pair: tuple[Console, socket.socket]) -> None:
    console, far = pair
    far.settimeout(10)
    # More than a socket holds, while nobody expects anything; then as a serial port sends it.
    far.sendall(b"x" * 10_000_000 + b"\n")
    for byte in b"quiet\n" * 2000 + b"login: ":
        far.sendall(bytes([byte]))
    assert console.expect(r"login: ", 10)


def test_run_returns_output_and_checks_the_exit_code(pair: tuple[Console, socket.socket]) -> None:
    console, far = pair
    prompt = r"guest\[(\d+)\]# "
    far.sendall(b"a\nb\nguest[0]# ")
    assert console.run("ls", prompt) == "a\nb\n"
    assert far.recv(100) == b"ls\n"
    far.sendall(b"no such file\nguest[2]# ")
    with pytest.raises(AssertionError, match="'ls x' ended with 2: no such file"):
        console.run("ls x", prompt)


def qemu(connection: socket.socket) -> None:
    """A monitor that sends an event before each answer, and refuses "bad"."""
    stream = connection.makefile("rw")

    def say(**message: object) -> None:
        stream.write(json.dumps(message) + "\r\n")
        stream.flush()

    say(QMP={})
    for line in stream:
        command = json.loads(line)["execute"]
        if command == "bad":
            say(error={"class": "GenericError", "desc": "no such thing"})
        else:
            say(event="NOISE", data={"of": command})
            say(**{"return": {"ran": command}})


def test_qmp_runs_commands_and_keeps_events(tmp_path: Path) -> None:
    serve(tmp_path / "qmp", qemu)
    client = Qmp(tmp_path / "qmp")
    assert client.execute("stop") == {"ran": "stop"}
    assert client.wait_event("NOISE", 5, matches=lambda e: bool(e["data"]["of"] == "stop"))
    assert client.wait_event("NOISE", 5)["data"]["of"] == "qmp_capabilities"
    with pytest.raises(Expired, match="QEMU's event NOISE"):
        client.wait_event("NOISE", 0.05)
    with pytest.raises(QmpError, match="bad: no such thing"):
        client.execute("bad")
    client.close()


def test_qmp_notices_that_qemu_went_away(tmp_path: Path) -> None:
    def ends(connection: socket.socket) -> None:
        connection.sendall(b'{"QMP": {}}\n')
        connection.recv(1000)

    serve(tmp_path / "qmp", ends)
    with pytest.raises(QmpError, match="QEMU closed the connection"):
        Qmp(tmp_path / "qmp")


def test_link_carries_frames_whole(tmp_path: Path) -> None:
    received: list[bytes] = []

    def conversation(connection: socket.socket) -> None:
        received.append(connection.recv(100))
        data = b"".join(struct.pack(">I", len(f)) + f for f in (b"one", b"two"))
        for byte in data:
            connection.sendall(bytes([byte]))

    thread = serve(tmp_path / "link", conversation)
    link = Link(tmp_path / "link")
    link.send(b"frame")
    assert link.receive(5, matches=lambda frame: frame == b"two") == b"two"
    thread.join(5)
    assert received == [b"\0\0\0\x05frame"]
    with pytest.raises(ConnectionError):
        link.receive(5)
    link.close()
