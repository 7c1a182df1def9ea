"""`holdfast identity`, as far as it is about those whom a host knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli_rig import UUID, FakeApi, holdfast
from tests.unit.test_config_rig import certificate, key_and_certificate
from vmm.errors import UserError

Capture = pytest.CaptureFixture[str]

BOB: dict[str, Any] = {
    "name": "bob",
    "role": "user",
    "source": "enrolled",
    "fingerprint": "ab" * 32,
    "subject": "CN=bob\x1b[2J",
    "valid_from": "2026-01-01T00:00:00Z",
    "valid_until": "2031-01-01T00:00:00Z",
    "machines": [{"name": "web", "uuid": UUID}],
    "enrolled": "2026-11-23T04:05:06Z",
    "enrolled_by": "alice",
    "methods": ["machine.list", "machine.start"],
}
ALICE = BOB | {"name": "alice", "role": "admin", "source": "configuration", "machines": None, "enrolled": ""}


def test_identities_are_listed_and_shown(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/identities"] = (200, [ALICE, BOB])
    holdfast("identity", "list")
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0] == ["NAME", "ROLE", "SOURCE", "VALID", "UNTIL", "MACHINES"]
    assert shown[1] == ["alice", "admin", "configuration", "2031-01-01T00:00:00Z", "all"]
    assert shown[2][-1] == "web"
    api.answers |= {"/v1/identities/bob": (200, BOB), "/v1/whoami": (200, ALICE)}
    for words in (("show", "bob"), ("whoami",)):
        holdfast("identity", *words)
        text = capsys.readouterr().out
        assert "machine.list, machine.start" in text and "AB:AB:" in text and "\x1b" not in text
    assert api.paths() == ["GET /v1/identities", "GET /v1/identities/bob", "GET /v1/whoami"]
    holdfast("identity", "list", "--json")
    assert json.loads(capsys.readouterr().out)[1] == BOB


def test_identities_are_enrolled_changed_and_revoked(api: FakeApi, tmp_path: Path, capsys: Capture) -> None:
    api.answers |= {
        "/v1/identities": (201, BOB),
        "/v1/identities/bob/change": (200, BOB),
        "/v1/identities/bob": (204, None),
    }
    file = tmp_path / "bob.crt"
    file.write_text(certificate("bob"))
    holdfast("identity", "enroll", "bob", str(file), "--role", "user", "--machine", "web", "--machine", "db")
    holdfast("identity", "change", "bob", "--role", "operator")
    holdfast("identity", "change", "bob", "--no-machines")
    holdfast("identity", "change", "bob", "--machine", "db")
    holdfast("identity", "revoke", "bob")
    assert capsys.readouterr().out.endswith("revoked bob\n")
    assert [json.loads(request.body) for request in api.seen[:4]] == [
        {"name": "bob", "role": "user", "certificate": certificate("bob").strip(), "machines": ["web", "db"]},
        {"role": "operator"},
        {"machines": []},
        {"machines": ["db"]},
    ]
    assert api.paths()[1:] == ["POST /v1/identities/bob/change"] * 3 + ["DELETE /v1/identities/bob"]


def test_a_key_that_is_named_by_mistake_is_not_sent(api: FakeApi, tmp_path: Path) -> None:
    key, own = key_and_certificate("bob")
    for content, says in ((key + own, "contains a private key"), (own + own, "not exactly one"), ("ä", "not exactly")):
        (tmp_path / "bob.crt").write_text(content)
        with pytest.raises(UserError, match=f"bob.crt: {says}"):
            holdfast("identity", "enroll", "bob", str(tmp_path / "bob.crt"), "--role", "admin")
    assert api.seen == []


def test_the_matrix_is_shown(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/access"] = (200, {"roles": {"admin": ["a.b", "c.d"], "user": ["c.d"]}})
    holdfast("identity", "access")
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["METHOD", "ADMIN", "USER"],
        ["a.b", "yes", "-"],
        ["c.d", "yes", "yes"],
    ]
