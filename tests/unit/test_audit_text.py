"""Records as lines for people."""

from __future__ import annotations

from typing import Any

import pytest

from vmm.audit.text import line

RECORD: dict[str, Any] = {
    "seq": 3,
    "time": "2026-11-23T04:05:06.123456Z",
    "type": "machine.start",
    "phase": "event",
    "outcome": "success",
    "actor": {"id": "alice", "role": "admin", "origin": "10.0.2.2:4711"},
    "object": {"kind": "machine", "id": "u-1", "name": "web"},
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"phase": "intent", "outcome": "pending"}, "alice@10.0.2.2:4711 begin start machine web"),
        ({"phase": "outcome", "outcome": "success"}, "alice@10.0.2.2:4711 done start machine web"),
        ({"outcome": "failure", "reason": "no room"}, "alice@10.0.2.2:4711 FAILED start machine web: no room"),
        (
            {"type": "config.applied", "object": {"kind": "configuration", "name": "the stored configuration"}},
            'note apply configuration "the stored configuration"',
        ),
        ({"request": "0123456789"}, "note start machine web #01234567"),
        ({"object": {"kind": "machine", "id": "u-1", "name": ""}}, "note start machine u-1"),
        ({"type": "tls.handshake", "object": {}, "extra": {"suppressed": 6}}, "note TLS handshake [suppressed=6]"),
        ({"type": "future.thing"}, "note future.thing web"),
        ({"extra": {"text": "a b", "none": "", "no": False}}, 'note start machine web [text="a b" no=false]'),
        ({"extra": {"long": "x" * 99}}, f"[long={'x' * 59}…]"),
        ({"extra": {"args": {"name": "web"}}}, '[args={"name":"web"}]'),
        ({"clock": {"source": "ntp", "quality": "synchronised"}}, "06.123456Z alice"),
        ({"clock": {"source": "host", "quality": "unsynchronised"}}, "06.123456Z~ alice"),
        ({"actor": None, "object": 5, "extra": []}, "-@- note start machine"),
    ],
)
def test_a_record_reads_as_a_line(changes: dict[str, Any], says: str) -> None:
    assert says in line(RECORD | changes)
