"""The status screen: what it says, when it is drawn, and that nothing can steer the terminal."""

from __future__ import annotations

import hashlib
import os
import pty
import ssl
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_config_rig import HostTree, certificate, encoded, host_tree
from vmm import paths
from vmm.config.types import Failure
from vmm.console import __main__ as program
from vmm.console.facts import gather
from vmm.console.screen import compose
from vmm.notify import passed_descriptors


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostTree:
    return host_tree(tmp_path, monkeypatch)


def configured(tree: HostTree, document: bytes) -> None:
    tree.write("run/holdfast/config.json", document)
    tree.write("etc/os-release", b"IMAGE_ID=holdfast\nIMAGE_VERSION=1.2.3\n")
    tree.write("proc/cmdline", b"roothash=" + b"ab" * 32)
    tree.write("sys/class/block/vda5/partition", b"5\n")
    tree.write("sys/class/block/dm-0/dm/name", b"root\n")
    tree.write("sys/class/block/dm-0/slaves/vda5", b"")
    tree.write("var/lib/holdfast/api/server.crt", certificate("server").encode())
    tree.write(
        "proc/net/if_inet6",
        b"20010db8000000000000000000000005 02 40 00 80 enp0s2\nfe80" + b"0" * 28 + b" 02 40 20 80 enp0s2\n",
    )


def test_a_configured_host_shows_what_an_operator_needs(tree: HostTree) -> None:
    configured(tree, encoded(banner="Authorised use only.\nAll is recorded."))
    tree.write("run/holdfast/core/health.json", b'{"status":"ok","checks":[{"name":"kvm","ok":true,"detail":"svm"}]}')
    text = compose(gather())
    pairs = hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate("server"))).hexdigest().upper()
    halves = [":".join(pairs[i : i + 2] for i in range(start, start + 32, 2)) for start in (0, 32)]
    for expected in (
        "Authorised use only.\nAll is recorded.\n",
        "Holdfast 1.2.3 (slot B)\n",
        "Host:        hf1\n",
        "2001:db8::5 on enp0s2\n",
        "https://[2001:db8::5]:8443\n",
        *halves,
        "Operational: lan (52:54:00:00:00:02)\n",
        "Health:      ok\n",
        "no login here",
    ):
        assert expected in text
    assert "fe80" not in text
    assert all(len(line) < 80 for line in text.splitlines())


def test_ipv4_addresses_come_from_the_kernel(tree: HostTree) -> None:
    tree.interface("lo", "00:00:00:00:00:00")
    tree.write("run/holdfast/config.json", encoded(management__interface="lo"))
    assert "https://127.0.0.1:8443\n" in compose(gather())


def test_failed_checks_are_named(tree: HostTree) -> None:
    tree.write(
        "run/holdfast/core/health.json",
        b'{"status":"degraded","checks":[{"name":"kvm","ok":true,"detail":""},{"name":"tpm","ok":false,"detail":"none"}]}',
    )
    assert "Health:      degraded\n  tpm: none\n" in compose(gather())


def test_a_refused_seed_is_shown_with_field_and_hint(tree: HostTree) -> None:
    failure = Failure("management.address: not an address: '10.0.0'", "the partition sdb1", "write it so")
    tree.write("run/holdfast/config-error.json", msgspec.json.encode(failure))
    text = compose(gather())
    assert (
        "NOT CONFIGURED: management.address: not an address: '10.0.0' (from the partition sdb1)\n  write it so\n"
        in text
    )


def test_a_failed_update_is_shown(tree: HostTree) -> None:
    configured(tree, encoded())
    assert "UPDATE" not in compose(gather())
    tree.write(
        "run/holdfast/update/notice.json", b'{"version":"1.3.0","reason":"guest: not ready\\u001b[2J","time":""}'
    )
    assert "\nUPDATE FAILED: 1.3.0: guest: not ready[2J\n" in compose(gather())


def test_a_bare_host_has_a_screen_too(tree: HostTree) -> None:
    assert tree.root.exists()
    text = compose(gather())
    assert "(slot ?)" in text and "not applied yet" in text and "Health:      not known yet" in text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[]", b'{"status":1}'])
def test_damaged_files_leave_gaps(tree: HostTree, content: bytes) -> None:
    files = ("run/holdfast/config.json", "run/holdfast/config-error.json", "run/holdfast/core/health.json")
    for path in (*files, "var/lib/holdfast/api/server.crt", "etc/os-release", "proc/cmdline", "proc/net/if_inet6"):
        tree.write(path, content)
    assert "Health:      not known yet" in compose(gather())


def test_nothing_can_steer_the_terminal(tree: HostTree) -> None:
    evil = "\x1b[2J\x9b1m\x07\x00\u202e\r\x08"
    document = msgspec.json.decode(encoded())
    document.update(banner=f"a{evil}b\nc", hostname=f"h{evil}")
    configured(tree, msgspec.json.encode(document))
    tree.write("run/holdfast/config-error.json", msgspec.json.encode(Failure(f"m{evil}\nx", f"s{evil}", f"h{evil}")))
    check = {"name": f"n{evil}", "ok": False, "detail": f"d{evil}\ne"}
    tree.write("run/holdfast/core/health.json", msgspec.json.encode({"status": f"s{evil}", "checks": [check]}))
    text = compose(gather())
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "a[2J1mb\nc\n" in text


class Stop(Exception):
    """Ends the endless drawing of a test."""


def test_it_draws_only_when_something_changed(tree: HostTree) -> None:
    reader, writer = os.pipe()
    steps = iter([None, None, "change", None, "stop"])

    def sleep(seconds: float) -> None:
        assert seconds == program.INTERVAL_S
        match next(steps):
            case "change":
                tree.write("run/holdfast/core/health.json", b'{"status":"ok"}')
            case "stop":
                raise Stop

    with pytest.raises(Stop):
        program.keep_drawing([program.Terminal(writer)], sleep)
    os.close(writer)
    with open(reader, "rb") as drawn:
        text = drawn.read().decode()
    assert text.count("Holdfast ") == 2
    assert text.count("Health:      ok") == 1
    assert "\x1b" not in text and "\n" not in text.replace("\r\n", "")


def test_a_screen_is_cleared_and_a_line_is_not(tree: HostTree) -> None:
    assert program.drawing("x\n", clears=True) == b"\x1b[H\x1b[2J\x1b[3Jx\r\n"
    assert program.drawing("x\n", clears=False) == b"\r\nx\r\n"
    controller, terminal = pty.openpty()
    assert not program.is_screen(terminal)
    os.close(controller)
    with pytest.raises(OSError):
        program.keep_drawing([program.Terminal(terminal)], lambda _: None)
    assert paths.RUN.is_relative_to(tree.root)


def test_a_terminal_that_does_not_read_holds_up_nobody(tree: HostTree) -> None:
    _stuck_reader, stuck = os.pipe()
    reader, writer = os.pipe()
    os.set_blocking(stuck, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(stuck, b"x" * 4096)
    terminals = [program.Terminal(stuck), program.Terminal(writer)]
    with pytest.raises(Stop):
        program.keep_drawing(terminals, stop_at_once)
    assert b"no login here" in os.read(reader, 1 << 16)


def stop_at_once(_seconds: float) -> None:
    raise Stop


def test_terminals_are_those_that_systemd_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "2")
    assert passed_descriptors() == []
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    assert passed_descriptors() == [3, 4]
