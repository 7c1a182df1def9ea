"""`holdfast guard` and `holdfast access`: what they send and print; a dry run needs no host's help."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tests.unit.test_cli_rig import MACHINE, FakeApi, holdfast
from vmm.errors import NotFound, UserError
from vmm.guard.rules import shipped

Capture = pytest.CaptureFixture[str]
RULES = "/v1/guard/rules"
LOCK = {"kind": "source", "value": "192.0.2.7", "since": "x", "until": "2026-11-24T11:00:00Z", "by": "a", "reason": "r"}


def serve_rules(api: FakeApi) -> None:
    api.answers[RULES] = (200, {"rules": [msgspec.to_builtins(rule) for rule in shipped().values()]})


def denials(count: int, machine: str) -> list[bytes]:
    return [
        json.dumps(
            {
                "seq": seq,
                "type": "kernel.open",
                "time": f"2026-11-23T04:05:{seq:02}.000000Z",
                "outcome": "failure",
                "object": {"kind": "machine", "id": machine, "name": ""},
                "actor": {"id": "uid 70000", "role": "", "origin": "local"},
            },
            separators=(",", ":"),
        ).encode()
        for seq in range(1, count + 1)
    ]


def test_rules_are_listed_and_explained(api: FakeApi, capsys: Capture) -> None:
    serve_rules(api)
    holdfast("guard", "rules")
    listed = capsys.readouterr().out
    assert all(name in listed for name in shipped()) and "5 in 60 s" in listed
    holdfast("guard", "show", "login-failures")
    shown = capsys.readouterr().out
    assert "lock out for 300 s" in shown and "tls.handshake, outcome failure, reason certificate refused…" in shown
    with pytest.raises(NotFound, match="there is no rule 'none'"):
        holdfast("guard", "show", "none")


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["--disable"], {"enabled": False}),
        (["--enable", "--count", "3", "--window", "120"], {"enabled": True, "count": 3, "window_s": 120}),
        (["--reset", "--action", "alert"], {"reset": True, "action": "alert"}),
        (["--lock", "9"], {"lock_s": 9}),
    ],
)
def test_what_is_set_is_what_was_named(api: FakeApi, words: list[str], body: dict[str, Any]) -> None:
    rule = shipped()["guest-denied"]
    api.answers[f"{RULES}/guest-denied"] = (200, msgspec.to_builtins(rule))
    holdfast("guard", "set", "guest-denied", *words)
    assert json.loads(api.seen[-1].body) == body


def test_a_dry_run_says_what_a_rule_would_have_found(api: FakeApi, capsys: Capture) -> None:
    serve_rules(api)
    api.records = denials(7, "m1")
    holdfast("guard", "try", "guest-denied", "--json")
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["key"], found["count"], found["first"], found["last"]) == ("m1", 5, 1, 5)
    holdfast("guard", "try", "guest-denied", "--count", "3")
    assert "3: 1 to 3" in (said := capsys.readouterr().out) and "3: 4 to 6" in said
    assert {request.verb for request in api.seen} == {"GET"}


def test_locks_and_holds(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/access/locks"] = (200, {"locks": [LOCK]})
    holdfast("access", "locks")
    assert "192.0.2.7" in capsys.readouterr().out
    api.answers["/v1/access/locks"] = (201, LOCK)
    holdfast("access", "lock", "source", "192.0.2.7", "--reason", "r")
    sent = json.loads(api.seen[-1].body)
    assert sent == {"kind": "source", "value": "192.0.2.7", "seconds": 300, "reason": "r"}
    api.answers["/v1/access/unlock"] = (200, {})
    holdfast("access", "unlock", "source", "192.0.2.7")
    assert json.loads(api.seen[-1].body) == {"kind": "source", "value": "192.0.2.7"}
    held = MACHINE | {"state": "paused", "held": {"since": "2026-11-24T11:00:00Z", "by": "a", "reason": "r"}}
    api.answers["/v1/machines/web/hold"] = (200, held)
    capsys.readouterr()
    holdfast("vm", "hold", "web", "--reason", "r")
    assert "since 2026-11-24T11:00:00Z by a: r" in capsys.readouterr().out
    api.answers["/v1/machines/web/release"] = (409, "the machine 'web' is not held")
    with pytest.raises(UserError, match="is not held"):
        holdfast("vm", "release", "web")
