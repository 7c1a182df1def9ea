"""The test agent: both ends joined by a socket pair in this process."""

from __future__ import annotations

import base64
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import guest_agent
from tests.harness.agent import Agent, AgentError, agent_credentials
from tests.harness.qmp import Happened, Qmp, Unless
from tests.harness.waiting import Expired
from tests.unit.test_harness_stream import qemu, serve


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    """An agent whose port carries junk first, as after a connection that died."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent"))
    listener.listen(1)

    def serve() -> None:
        port, _ = listener.accept()
        with port, listener:
            port.sendall(b'the end of an old answer"}\n{"id": "old", "rc": 0, "out": "", "err": ""}\n')
            # The real loop never ends; a socket's end of file would only leave it waiting.
            for line in port.makefile("rb"):
                if line.strip():
                    guest_agent.send(port.fileno(), guest_agent.answer(line))

    threading.Thread(target=serve, daemon=True).start()
    client = Agent(tmp_path / "agent")
    yield client
    client.close()


def test_exec_returns_code_and_both_outputs(agent: Agent) -> None:
    done = agent.exec(["sh", "-c", "cat; echo problem >&2; exit 3"], check=False, input=b"in")
    assert (done.rc, done.out, done.err) == (3, "in", "problem\n")
    with pytest.raises(AgentError, match="false ended with 1"):
        agent.exec(["false"])


def test_exec_stops_a_program_that_takes_too_long(agent: Agent) -> None:
    assert agent.exec(["sleep", "60"], check=False, seconds=0.1).rc == -1


def test_files_travel_unchanged(agent: Agent, tmp_path: Path) -> None:
    data, path = os.urandom(300_000), tmp_path / "file"
    agent.write(str(path), data, mode=0o600)
    assert agent.read(str(path)) == data
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(AgentError, match="FileNotFoundError"):
        agent.read(str(tmp_path / "nothing"))


def test_python_gets_an_argument_and_returns_a_result(agent: Agent) -> None:
    assert agent.python("import math; result = [math.floor(argument), argument]", 2.5) == [2, 2.5]
    with pytest.raises(AgentError, match="ZeroDivisionError"):
        agent.python("1 / 0")


def test_unknown_operations_and_broken_requests_are_answered() -> None:
    assert b'"rc": -2' in guest_agent.answer(b'{"id": "1", "op": "fly"}')
    assert b'"id": null' in guest_agent.answer(b"not json")


def test_a_silent_agent_is_a_deadline(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent"))
    listener.listen(1)
    client = Agent(tmp_path / "agent")
    with pytest.raises(Expired, match="the agent's answer"):
        client.wait(0.05)
    client.close()
    listener.close()


def test_a_restart_ends_the_wait_for_an_answer_and_stays_to_be_waited_for(tmp_path: Path) -> None:
    """Only one that comes meanwhile."""
    asked = threading.Event()

    def silent(connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while not stream.readline().strip():
            pass
        asked.set()
        connection.recv(1)

    def restarts(connection: socket.socket) -> None:
        connection.sendall(b'{"QMP": {}}\n')
        connection.recv(1000)
        connection.sendall(b'{"return": {}}\n{"event": "RESET", "data": {"which": 1}}\n')
        asked.wait(10)
        connection.sendall(b'{"event": "NOISE"}\n{"event": "RESET", "data": {"which": 2}}\n')
        connection.recv(1)

    serve(tmp_path / "agent", silent)
    serve(tmp_path / "qmp", restarts)
    client, monitor = Agent(tmp_path / "agent"), Qmp(tmp_path / "qmp")
    unless = Unless(monitor, "RESET", "the host restarted")
    with pytest.raises(Happened, match="the host restarted"):
        client.exec(["true"], seconds=60, unless=unless)
    assert [monitor.wait_event("RESET", 1)["data"]["which"] for _ in range(2)] == [1, 2]
    client.close()
    monitor.close()


def test_an_answer_comes_through_beside_other_events(agent: Agent, tmp_path: Path) -> None:
    serve(tmp_path / "qmp", qemu)
    monitor = Qmp(tmp_path / "qmp")
    unless = Unless(monitor, "RESET", "the host restarted")
    monitor.execute("stop")
    assert agent.exec(["echo", "here"], unless=unless).out == "here\n"
    monitor.close()


def test_the_real_loop_serves_and_survives_a_broken_line() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    threading.Thread(target=guest_agent.serve, args=(theirs.fileno(),), daemon=True).start()
    ours.sendall(b'{"id": "half\n\n{"id": "1", "op": "python", "source": "result = 5", "argument": null}\n')
    answers = ours.makefile("rb")
    assert b'"rc": -2' in answers.readline()
    assert base64.b64encode(b"5") in answers.readline()
    # The loop never ends: its socket stays open, or its number might become another test's file.
    theirs.detach()


def test_credentials_define_the_unit_and_carry_the_agent() -> None:
    strings = dict(text.split("=", 1) for text in agent_credentials())
    prefix = "io.systemd.credential.binary:"
    unit = base64.b64decode(strings[prefix + "systemd.extra-unit.test-agent.service"]).decode()
    assert "LoadCredential=agent.py:holdfast-test-agent.py" in unit
    assert "%d/agent.py" in unit
    agent_source = base64.b64decode(strings[prefix + "holdfast-test-agent.py"])
    compile(agent_source, "agent.py", "exec")
    assert guest_agent.PORT.endswith("/holdfast.test")
    assert "dev-virtio\\x2dports-holdfast.test.device" in unit
