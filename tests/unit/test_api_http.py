"""What the API makes of requests: routing, checks of form, errors, and doing nothing without audit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_api_rig import ALICE, rig
from vmm import wire
from vmm.api.app import MAX_BODY
from vmm.api.routes import ROUTES, Route
from vmm.errors import Conflict

WANTED = {name: name[0] for name in ("from", "until", "type", "actor", "machine", "outcome", "phase", "request")}
CHOSEN = "&".join(f"{name}={value}" for name, value in WANTED.items())
CALLS: list[tuple[str, str, Any, str, dict[str, Any], int]] = [
    ("GET", "/v1/version", None, "version.read", {}, 200),
    ("GET", "/v1/health", None, "health.read", {}, 200),
    ("GET", "/v1/configuration", None, "config.read", {}, 200),
    ("GET", "/v1/volumes", None, "volume.list", {}, 200),
    ("POST", "/v1/volumes", {"name": "v", "size": 9}, "volume.create", {"name": "v", "size": 9}, 201),
    ("GET", "/v1/volumes/v1", None, "volume.show", {"name": "v1"}, 200),
    ("DELETE", "/v1/volumes/v1", None, "volume.delete", {"name": "v1"}, 204),
    ("GET", "/v1/machines", None, "machine.list", {}, 200),
    ("POST", "/v1/machines", {"a": [1, {"b": None}]}, "machine.create", {"a": [1, {"b": None}]}, 201),
    ("GET", "/v1/machines/m1", None, "machine.show", {"name": "m1"}, 200),
    ("DELETE", "/v1/machines/m1", None, "machine.delete", {"name": "m1"}, 204),
    ("POST", "/v1/machines/m1/start", None, "machine.start", {"name": "m1"}, 200),
    ("POST", "/v1/machines/m1/stop?timeout=9", None, "machine.stop", {"name": "m1", "timeout": 9}, 200),
    ("POST", "/v1/machines/m1/force-off", None, "machine.force-off", {"name": "m1"}, 200),
    ("POST", "/v1/machines/m1/pause", None, "machine.pause", {"name": "m1"}, 200),
    ("POST", "/v1/machines/m1/resume", None, "machine.resume", {"name": "m1"}, 200),
    ("POST", "/v1/machines/m1/reset", None, "machine.reset", {"name": "m1"}, 200),
    ("POST", "/v1/machines/m1/suspend", None, "machine.suspend", {"name": "m1"}, 200),
    ("POST", "/v1/machines/m1/rename", {"to": "m2"}, "machine.rename", {"name": "m1", "to": "m2"}, 200),
    ("POST", "/v1/machines/m1/describe", {"tags": ["a"]}, "machine.describe", {"name": "m1", "tags": ["a"]}, 200),
    ("POST", "/v1/machines/m1/change", {"cpus": 2}, "machine.change", {"name": "m1", "cpus": 2}, 200),
    ("GET", "/v1/machines/m1/stats", None, "machine.stats", {"name": "m1"}, 200),
    ("POST", "/v1/machines/m1/hold", {"reason": "r"}, "machine.hold", {"name": "m1", "reason": "r"}, 200),
    ("POST", "/v1/machines/m1/release", None, "machine.release", {"name": "m1"}, 200),
    ("GET", "/v1/guard/rules", None, "guard.rules", {}, 200),
    ("POST", "/v1/guard/rules/r1", {"count": 2}, "guard.set", {"name": "r1", "count": 2}, 200),
    ("POST", "/v1/guard/rules/r1/test", None, "guard.test", {"name": "r1"}, 200),
    ("GET", "/v1/access/locks", None, "access.locks", {}, 200),
    ("POST", "/v1/access/locks", {"value": "v"}, "access.lock", {"value": "v"}, 201),
    ("POST", "/v1/access/unlock", {"value": "v"}, "access.unlock", {"value": "v"}, 200),
    ("GET", "/v1/audit?after=5&limit=10", None, "audit.read", {"after": 5, "limit": 10}, 200),
    ("GET", f"/v1/audit?{CHOSEN}&before=9&order=g", None, "audit.read", WANTED | {"before": 9, "order": "g"}, 200),
    ("GET", "/v1/audit/status", None, "audit.status", {}, 200),
    ("GET", "/v1/audit/export", None, "audit.export", {}, 200),
    ("POST", "/v1/audit/purge", {"before": 7}, "audit.purge", {"before": 7}, 200),
    ("POST", "/v1/audit/anchor", None, "audit.anchor", {}, 200),
    ("POST", "/v1/recovery-keys/fetch", None, "recovery.fetch", {}, 200),
    ("GET", "/v1/update", None, "update.status", {}, 200),
    ("GET", "/v1/whoami", None, "identity.whoami", {}, 200),
    ("GET", "/v1/access", None, "access.query", {}, 200),
    ("GET", "/v1/identities", None, "identity.list", {}, 200),
    ("POST", "/v1/identities", {"name": "bob"}, "identity.enroll", {"name": "bob"}, 201),
    ("GET", "/v1/identities/bob", None, "identity.show", {"name": "bob"}, 200),
    ("POST", "/v1/identities/bob/change", {"role": "x"}, "identity.change", {"name": "bob", "role": "x"}, 200),
    ("DELETE", "/v1/identities/bob", None, "identity.revoke", {"name": "bob"}, 204),
    ("GET", "/v1/update/history", None, "update.history", {}, 200),
    ("POST", "/v1/update/check", {"source": "bundle"}, "update.check", {"source": "bundle"}, 202),
    ("POST", "/v1/update/check", {"source": "stick"}, "update.check", {"source": "stick"}, 202),
    ("POST", "/v1/update/download", {"version": "1.2.0"}, "update.download", {"version": "1.2.0"}, 202),
    ("POST", "/v1/update/apply", None, "update.apply", {}, 202),
    ("POST", "/v1/update/cancel", None, "update.cancel", {}, 200),
    ("POST", "/v1/update/rollback", None, "update.rollback", {}, 202),
    ("POST", "/v1/host/reboot", None, "host.reboot", {}, 202),
    ("POST", "/v1/host/shutdown", None, "host.shutdown", {}, 202),
]


def test_every_route_reaches_its_core_method(tmp_path: Path) -> None:
    assert {call[3] for call in CALLS} == {route.method for route in ROUTES if route.kind == "call"}

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            for verb, path, body, method, arguments, status in CALLS:
                answer = await client.request(verb, path, json=body)
                assert answer.status == status, path
                assert await answer.read() == (b"" if status == 204 else b'{"method":"%s"}' % method.encode())
                assert api.calls[-1].method == method
                assert api.calls[-1].params["args"] == arguments
                assert api.calls[-1].params["caller"]["fingerprint"] == ALICE.fingerprint
                assert answer.headers["Server"] == "holdfast"
                assert answer.headers["Cache-Control"] == "no-store"

    asyncio.run(check())


def test_without_certificate_there_is_only_the_banner(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api, api.client(None) as client:
            answer = await client.get("/v1/banner")
            assert (answer.status, await answer.json()) == (200, {"banner": "Authorised use only."})
            requests = [(route.verb, route.path) for route in ROUTES]
            requests += [("GET", "/"), ("GET", "/v2/x"), ("HEAD", "/v1/banner"), ("POST", "/v1/banner")]
            answers = set()
            for verb, path in requests:
                answer = await client.request(verb, path.replace("{name}", "x"))
                assert (answer.status, answer.content_type) == (401, "application/problem+json")
                answers.add(await answer.text())
            answers.discard("")
            assert len(answers) == 1
            assert not api.calls
            await api.until(lambda: len(api.recorded("api.unauthenticated")) == 5)
            first = api.recorded("api.unauthenticated")[0]
            assert (first["outcome"], first["extra"]) == ("failure", {"verb": "GET", "path": "/v1/version"})
            assert not api.recorded("session.start")

    asyncio.run(check())


JSON = {"Content-Type": "application/json"}
BAD: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("GET", "/v1/machines?nmae=x", {}, 400, "unknown query parameter 'nmae'"),
    ("GET", "/v1/audit?after=1&after=2", {}, 400, "'after' is given twice"),
    ("GET", "/v1/audit?after=-1", {}, 400, "'after' is not a whole number: '-1'"),
    ("GET", "/v1/audit?limit=%D9%A1", {}, 400, "'limit' is not a whole number"),
    ("GET", "/v1/audit?limit=9999999999999999999", {}, 400, "not a whole number"),
    ("GET", "/v1/version", {"data": b"x"}, 400, "takes no body"),
    ("GET", "/v1/nothing", {}, 404, "there is no /v1/nothing"),
    ("PATCH", "/v1/machines", {}, 405, "does not answer to PATCH"),
    ("HEAD", "/v1/machines", {}, 405, ""),
    ("GET", "/v1/machines", {"headers": {"Origin": "https://evil.example"}}, 403, "Origin"),
    ("POST", "/v1/machines", {"data": b"{}"}, 415, "application/json"),
    ("POST", "/v1/machines", {"json": [1]}, 400, "not a JSON object"),
    ("POST", "/v1/machines", {"data": b"{", "headers": JSON}, 400, "JSON"),
    ("POST", "/v1/machines", {"data": b'"\xff"', "headers": JSON}, 400, "JSON"),
    ("POST", "/v1/machines", {"data": b'{"a":' * 200_000, "headers": JSON}, 400, "deep"),
    ("POST", "/v1/machines", {"json": {}, "headers": {"Content-Encoding": "gzip"}}, 415, "compressed"),
    ("POST", "/v1/machines", {"json": {"x": "x" * MAX_BODY}}, 413, f"longer than {MAX_BODY} bytes"),
    ("GET", "/v1/machines/m/console", {}, 426, "WebSocket"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: f"{case[0]}{case[3]}")
def test_malformed_requests_never_reach_core(tmp_path: Path, case: tuple[str, str, dict[str, Any], int, str]) -> None:
    verb, path, more, status, says = case

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            answer = await client.request(verb, path, **more)
            assert (answer.status, answer.content_type) == (status, "application/problem+json")
            if verb != "HEAD":
                problem = await answer.json()
                assert says in problem["detail"]
                assert problem["status"] == status and problem["type"].startswith("urn:holdfast:problem:")
            assert not api.calls

    asyncio.run(check())


def test_what_is_not_http_gets_a_bare_problem(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api:
            for request in (
                b"\x00\x01\r\n\r\n",
                b"GET / HTTP/1.1\r\nA" + b"x" * 9000,
                b"GET / HTTP/9.9\r\n: x\r\n\r\n",
            ):
                reader, writer = await api.raw(None)
                writer.write(request)
                answer = await reader.read()
                assert answer.startswith(b"HTTP/1.") and b" 400 " in answer
                assert b"aiohttp" not in answer and b"Python" not in answer
                assert b'"detail":"not a valid HTTP request"' in answer
                writer.close()

    asyncio.run(check())


def test_errors_of_core_become_problems(tmp_path: Path) -> None:
    async def conflict(*_: Any) -> None:
        raise Conflict("machine m1 is running", hint="stop it first")

    async def broken(*_: Any) -> Any:
        return {1, 2}.pop() / 0

    async def gone(_: wire.Request, channel: wire.Channel) -> None:
        await channel.close()

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.core = conflict
            answer = await client.delete("/v1/machines/m1")
            assert answer.status == 409
            assert await answer.json() == {
                "type": "urn:holdfast:problem:conflict",
                "title": "Conflict",
                "status": 409,
                "detail": "machine m1 is running",
                "hint": "stop it first",
            }
            api.core = gone
            assert (await client.get("/v1/version")).status == 503
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            api.core = broken
            answer = await client.get("/v1/version")
            assert answer.status == 500 and "division" not in await answer.text()
            (tmp_path / "core.sock").unlink()
            answer = await client.get("/v1/version")
            assert answer.status == 503 and "core.sock" in await answer.text()

    asyncio.run(check())


def test_a_fault_of_ours_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            monkeypatch.setattr("vmm.api.app._query", fails)
            answer = await client.get("/v1/version")
            assert answer.status == 500 and "secret" not in await answer.text()

    asyncio.run(check())
    assert "secret detail" in capfd.readouterr().err


def test_nothing_is_done_without_audit(tmp_path: Path) -> None:
    async def check() -> None:
        async with rig(tmp_path) as api, api.client() as client:
            api.audit_down = True
            for path, status in (("/v1/banner", 200), ("/v1/version", 503), ("/v1/machines", 503)):
                answer = await client.get(path)
                assert answer.status == status
            assert "audit store is full" in (await answer.json())["detail"]
            assert not api.calls
            api.audit_down = False
            assert (await client.get("/v1/version")).status == 200
            assert (await client.get("/v1/version")).status == 200
            assert len(api.recorded("session.start")) == 1

    asyncio.run(check())


def test_routes_are_told_apart() -> None:
    assert len({(route.verb, route.path) for route in ROUTES}) == len(ROUTES)
    assert len({route.method for route in ROUTES}) == len(ROUTES)
    assert all(isinstance(route, Route) and route.path.startswith("/v1/") for route in ROUTES)
