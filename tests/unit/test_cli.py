"""The `holdfast` command against a server: pinning, banner, nouns and verbs, errors, JSON."""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli_rig import CONFIGURATION, MACHINE, STATS, UUID, VOLUME, FakeApi, enrolled, fake_api, holdfast
from vmm import process
from vmm.cli import client, output, settings
from vmm.errors import Conflict, NotFound, UserError

Capture = pytest.CaptureFixture[str]


def test_adding_a_remote_pins_it_and_prints_the_banner(api: FakeApi, capsys: Capture) -> None:
    capsys.readouterr()
    holdfast("remote", "add", "two", api.url, "--fingerprint", output.fingerprint_text(api.fingerprint), "--default")
    captured = capsys.readouterr()
    assert captured.out == "added two\n"
    assert captured.err == "Authorised?[2J use only.\n"
    remotes = settings.load()
    assert remotes.default == "two" and remotes.remotes["two"].fingerprint == api.fingerprint
    assert settings.directory().stat().st_mode & 0o777 in {0o700, 0o755}
    holdfast("remote", "default", "hf1")
    holdfast("remote", "remove", "two")
    holdfast("remote", "list")
    assert capsys.readouterr().out.splitlines()[1].split() == ["hf1", api.url, "yes", api.fingerprint]


def test_a_wrong_fingerprint_is_refused_before_any_request(api: FakeApi) -> None:
    with pytest.raises(UserError, match="another fingerprint"):
        holdfast("remote", "add", "two", api.url, "--fingerprint", "00" * 32)
    with pytest.raises(UserError, match="not a SHA-256 fingerprint"):
        holdfast("remote", "add", "two", api.url, "--fingerprint", "abc")
    with pytest.raises(UserError, match="no terminal to ask on"):
        holdfast("remote", "add", "two", api.url)
    assert api.seen == [] and "two" not in settings.load().remotes


def test_a_changed_server_gets_no_request(api: FakeApi, capsys: Capture) -> None:
    remotes = settings.load()
    settings.save(settings.with_remote(remotes, "hf1", settings.Remote(api.url, "ab" * 32, "2026-01-01")))
    assert holdfast("vm", "list") == 3
    captured = capsys.readouterr()
    assert "error: " in captured.err and "shows another certificate than the one pinned for hf1" in captured.err
    assert "hint: " in captured.err
    assert api.seen == []


def test_tls_1_2_is_not_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    enrolled(tmp_path / "user", monkeypatch)
    with fake_api(tmp_path / "server", maximum=ssl.TLSVersion.TLSv1_2) as server:
        assert holdfast("remote", "add", "old", server.url, "--fingerprint", server.fingerprint) == 3
        assert server.seen == []
    assert "cannot be reached" in capsys.readouterr().err


def test_a_host_that_does_not_answer(api: FakeApi, capsys: Capture) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{unused.getsockname()[1]}"
        settings.save(settings.with_remote(settings.load(), "gone", settings.Remote(url, "ab" * 32)))
        assert holdfast("--remote", "gone", "version") == 3
    assert f"error: {url} cannot be reached: Connect" in capsys.readouterr().err


def test_the_banner_comes_first_and_once_a_day(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/machines"] = (200, [])
    holdfast("vm", "list")
    assert api.paths() == ["GET /v1/machines"]
    old = settings.load()
    settings.save(settings.with_remote(old, "hf1", settings.Remote(api.url, api.fingerprint, "2020-01-01")))
    api.seen.clear()
    capsys.readouterr()
    holdfast("vm", "list")
    assert "Authorised" in capsys.readouterr().err
    holdfast("vm", "list")
    holdfast("--banner", "vm", "list")
    assert api.paths() == [
        "GET /v1/banner",
        "GET /v1/machines",
        "GET /v1/machines",
        "GET /v1/banner",
        "GET /v1/machines",
    ]


def test_machines_in_a_table_and_as_json(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/machines"] = (200, [MACHINE, {**MACHINE, "name": "a-longer-name", "networks": [], "new": "field"}])
    capsys.readouterr()
    holdfast("vm", "list")
    assert capsys.readouterr().out.splitlines() == [
        "NAME           STATE    CPUS  MEMORY   NETWORKS  UUID",
        f"web            running  2     1.5 GiB  lan       {UUID}",
        f"a-longer-name  running  2     1.5 GiB  -         {UUID}",
    ]
    for arguments in (("--json", "vm", "list"), ("vm", "list", "--json")):
        holdfast(*arguments)
        assert capsys.readouterr().out == json.dumps(api.answers["/v1/machines"][1]) + "\n"
    assert all(request.identified for request in api.seen)


def test_a_hostile_answer_cannot_steer_the_terminal(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/machines"] = (200, [{**MACHINE, "name": "a\x1b]0;x\x07\nb"}])
    holdfast("vm", "list")
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and len(out.splitlines()) == 2


def test_what_create_sends(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/machines"] = (201, MACHINE)
    holdfast(
        *("vm", "create", "web", "--cpus", "2", "--memory", "1536M", "--disk", "v1", "--disk", "v2", "--network", "lan")
    )
    assert json.loads(api.seen[0].body) == {
        "name": "web",
        "cpus": 2,
        "memory": 1536 << 20,
        "disks": [{"volume": "v1"}, {"volume": "v2"}],
        "networks": [{"network": "lan"}],
        "description": "",
    }
    assert f"UUID:        {UUID}" in capsys.readouterr().out


CHANGES: list[tuple[tuple[str, ...], str, dict[str, Any]]] = [
    (("change", "web", "--cpus", "2", "--memory", "1G"), "change", {"cpus": 2, "memory": 1 << 30}),
    (("change", "web", "--autostart", "0", "--on-crash", "restart"), "change", {"autostart": 0, "on_crash": "restart"}),
    (("change", "web", "--no-autostart"), "change", {"autostart": None}),
    (("change", "web", "--network", "lan"), "change", {"networks": [{"network": "lan"}]}),
    (("change", "web", "--no-networks"), "change", {"networks": []}),
    (
        ("describe", "web", "--description", "", "--tag", "a", "--tag", "b"),
        "describe",
        {"description": "", "tags": [*"ab"]},
    ),
    (("describe", "web", "--no-tags"), "describe", {"tags": []}),
    (("rename", "web", "shop"), "rename", {"to": "shop"}),
]


@pytest.mark.parametrize(("arguments", "verb", "body"), CHANGES)
def test_changes_name_only_what_changes(
    api: FakeApi, arguments: tuple[str, ...], verb: str, body: dict[str, Any]
) -> None:
    api.answers[f"/v1/machines/web/{verb}"] = (200, MACHINE)
    assert holdfast("vm", *arguments) == 0
    assert json.loads(api.seen[-1].body) == body


def test_machines_of_a_tag_and_what_is_pending(api: FakeApi, capsys: Capture) -> None:
    blue = {**MACHINE, "name": "blue", "tags": ["blue"], "pending": {"cpus": 4, "networks": []}, "new": "field"}
    api.answers["/v1/machines"] = (200, [MACHINE, blue])
    api.answers["/v1/machines/blue"] = (200, blue)
    capsys.readouterr()
    holdfast("vm", "list", "--tag", "blue")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["NAME", "blue"]
    holdfast("vm", "list", "--tag", "blue", "--json")
    assert json.loads(capsys.readouterr().out) == [blue]
    holdfast("vm", "show", "blue")
    out = capsys.readouterr().out
    assert "Pending:     4 processors, networks none" in out and "Tags:        blue" in out


@pytest.mark.parametrize(
    ("arguments", "request_line", "answer"),
    [
        (("vm", "show", "web"), "GET /v1/machines/web", (200, MACHINE)),
        (("vm", "start", "web"), "POST /v1/machines/web/start", (200, MACHINE)),
        (("vm", "stop", "web"), "POST /v1/machines/web/stop?timeout=60", (200, MACHINE)),
        (("vm", "stop", "web", "--timeout", "5"), "POST /v1/machines/web/stop?timeout=5", (200, MACHINE)),
        (("vm", "stop", "web", "--force"), "POST /v1/machines/web/force-off", (200, MACHINE)),
        (("vm", "pause", "web"), "POST /v1/machines/web/pause", (200, MACHINE)),
        (("vm", "resume", "web"), "POST /v1/machines/web/resume", (200, MACHINE)),
        (("vm", "reset", "web"), "POST /v1/machines/web/reset", (200, MACHINE)),
        (("vm", "suspend", "web"), "POST /v1/machines/web/suspend", (200, MACHINE)),
        (("vm", "rename", "web", "shop"), "POST /v1/machines/web/rename", (200, MACHINE)),
        (("vm", "stats", "web"), "GET /v1/machines/web/stats", (200, STATS)),
        (("vm", "delete", "web"), "DELETE /v1/machines/web", (204, None)),
        (("volume", "create", "v1", "--size", "1G"), "POST /v1/volumes", (201, VOLUME)),
        (("volume", "list"), "GET /v1/volumes", (200, [VOLUME])),
        (("volume", "show", "v1"), "GET /v1/volumes/v1", (200, VOLUME)),
        (("volume", "delete", "v1"), "DELETE /v1/volumes/v1", (204, None)),
        (
            ("version",),
            "GET /v1/version",
            (200, {"product": "holdfast", "version": "1.0.0", "slot": "a", "root_hash": "x"}),
        ),
        (("config", "show"), "GET /v1/configuration", (200, CONFIGURATION)),
        (("recovery-key", "fetch"), "POST /v1/recovery-keys/fetch", (200, {"keys": {"data": "d", "audit": "a"}})),
    ],
)
def test_every_verb_makes_its_request(
    api: FakeApi, capsys: Capture, arguments: tuple[str, ...], request_line: str, answer: tuple[int, Any]
) -> None:
    path = request_line.split()[1].split("?", maxsplit=1)[0]
    api.answers[path] = answer
    capsys.readouterr()
    assert holdfast(*arguments) == 0
    assert api.paths() == [request_line]
    assert capsys.readouterr().out
    assert holdfast("--json", *arguments) == 0
    out = capsys.readouterr().out
    assert out == ("" if answer[0] == 204 else json.dumps(answer[1]) + "\n")


def test_a_name_cannot_leave_its_place_in_the_path(api: FakeApi) -> None:
    for name in ("..", ".", ""):
        with pytest.raises(UserError, match="not a name"):
            holdfast("vm", "show", name)
    with pytest.raises(UserError, match="no such thing"):
        holdfast("vm", "show", "../volumes/v1?x=y#z")
    assert api.paths() == ["GET /v1/machines/..%2Fvolumes%2Fv1%3Fx=y%23z"]


def test_health_decides_the_exit_code(api: FakeApi, capsys: Capture) -> None:
    api.answers["/v1/health"] = (200, {"status": "ok", "checks": [{"name": "kvm", "ok": True, "detail": ""}]})
    assert holdfast("health") == 0
    api.answers["/v1/health"] = (
        200,
        {"status": "degraded", "checks": [{"name": "kvm", "ok": False, "detail": "gone"}]},
    )
    assert holdfast("health") == 1
    assert "kvm    NO  gone" in capsys.readouterr().out


def test_problems_become_errors_with_hints(api: FakeApi) -> None:
    api.answers["/v1/machines/web/start"] = (409, "web has\x1b no disk")
    with pytest.raises(UserError) as caught:
        holdfast("vm", "start", "web")
    assert (caught.value.message, caught.value.hint, caught.value.status) == (
        "web has? no disk",
        "try something else",
        409,
    )


def test_an_answer_in_another_form_is_an_error(api: FakeApi) -> None:
    api.answers["/v1/machines"] = (200, {"machines": []})
    with pytest.raises(UserError, match="the host's answer is not understood"):
        holdfast("vm", "list")


def test_without_an_identity_the_hint_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CONFIG_DIR", str(tmp_path / "nobody"))
    with fake_api(tmp_path / "server") as server:
        holdfast("remote", "add", "hf1", server.url, "--fingerprint", server.fingerprint)
        with pytest.raises(UserError) as caught:
            holdfast("vm", "list")
    assert "holdfast identity create" in caught.value.hint


def test_an_upload_sends_the_file_with_its_length(api: FakeApi, tmp_path: Path) -> None:
    api.answers["/v1/volumes/v1/content"] = (201, VOLUME)
    image = tmp_path / "disk.img"
    image.write_bytes(b"QFI\xfb" + bytes(3 << 20))
    holdfast("volume", "upload", str(image), "v1", "--size", "2G")
    assert api.paths() == [f"PUT /v1/volumes/v1/content?format=qcow2&size={2 << 30}"]
    assert api.seen[0].body == image.read_bytes()
    holdfast("volume", "upload", str(image), "v1", "--format", "raw")
    assert api.paths()[1] == "PUT /v1/volumes/v1/content?format=raw"
    image.write_bytes(b"")
    with pytest.raises(UserError, match="is empty"):
        holdfast("volume", "upload", str(image), "v1")
    with pytest.raises(UserError, match="missing: No such file"):
        holdfast("volume", "upload", str(tmp_path / "missing"), "v1")


def test_an_upload_that_is_refused_at_once_says_why(api: FakeApi, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    with image.open("wb") as file:
        file.truncate(1 << 30)
    path = "/v1/volumes/v1/content"
    api.early.add(path)
    api.answers[path] = (409, "there is a volume v1 already")
    with pytest.raises(UserError, match="there is a volume v1 already"):
        holdfast("volume", "upload", str(image), "v1")


def test_unknown_and_missing_remotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_CONFIG_DIR", str(tmp_path))
    with pytest.raises(NotFound, match="no remote is chosen"):
        holdfast("version")
    with pytest.raises(NotFound, match="there is no remote 'x'"):
        holdfast("--remote", "x", "version")
    (tmp_path / "remotes.json").write_text("{")
    with pytest.raises(UserError, match=r"remotes\.json"):
        holdfast("remote", "list")


def test_an_identity_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.delenv("HOLDFAST_CONFIG_DIR", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with pytest.raises(NotFound, match="no identity yet"):
        holdfast("identity", "show")
    holdfast("identity", "create", "--name", "alice")
    assert (tmp_path / "holdfast/client.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "holdfast").stat().st_mode & 0o777 == 0o700
    capsys.readouterr()
    holdfast("identity", "show", "--pem")
    pem = capsys.readouterr().out
    assert pem == (tmp_path / "holdfast/client.crt").read_text()
    with pytest.raises(Conflict):
        holdfast("identity", "create")
    text = process.run(["openssl", "x509", "-noout", "-text", "-purpose"], input=pem).stdout
    for expected in (
        "secp384r1",
        "ecdsa-with-SHA384",
        "TLS Web Client Authentication",
        "CA:FALSE",
        "Digital Signature",
        "X509v3 Subject Key Identifier",
        "SSL client : Yes",
        "SSL server : No",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("10.0.2.15", "https://10.0.2.15:8443"),
        ("https://hf1.example.org:9000/", "https://hf1.example.org:9000"),
        ("https://[2001:db8::1]", "https://[2001:db8::1]:8443"),
    ],
)
def test_urls(text: str, url: str) -> None:
    assert client.normal_url(text) == url


@pytest.mark.parametrize(
    "text", ["http://x", "https://", "https://x/path", "https://u@x", "https://x:99999", "ftp://x"]
)
def test_wrong_urls(text: str) -> None:
    with pytest.raises(UserError, match="not the URL of a host"):
        client.normal_url(text)


def test_sizes() -> None:
    assert [output.parse_size(text) for text in ("1", "512M", "1G", "2GiB", "1t")] == [
        1,
        512 << 20,
        1 << 30,
        2 << 30,
        1 << 40,
    ]
    for text in ("", "0", "-1", "1.5G", "G", "1X", "1iB"):
        with pytest.raises(UserError, match="not a size"):
            output.parse_size(text)
    assert [output.human_size(size) for size in (0, 1023, 1536 << 20, 5 << 40)] == ["0 B", "1023 B", "1.5 GiB", "5 TiB"]


def test_completion_knows_the_commands(capsys: Capture) -> None:
    holdfast("completion", "bash")
    script = capsys.readouterr().out
    for words, expected in (
        ("holdfast vm cre", "create"),
        ("holdfast vm list --js", "--json"),
        ("holdfast comp", "completion"),
    ):
        line = words.split()
        check = f"COMP_WORDS=({' '.join(line)}); COMP_CWORD={len(line) - 1}; _holdfast; echo ${{COMPREPLY[*]}}"
        shown = process.run(["bash", "-c", f"{script}\n{check}"]).stdout
        assert shown.split() == [expected]
    holdfast("completion", "zsh")
    assert capsys.readouterr().out.startswith("#compdef holdfast\n")


def test_help_and_wrong_usage_end_as_argparse_does(capsys: Capture) -> None:
    for arguments, code in ((["--help"], 0), (["--version"], 0), ([], 2), (["vm"], 2), (["nonsense"], 2)):
        with pytest.raises(SystemExit) as caught:
            holdfast(*arguments)
        assert caught.value.code == code
    assert "holdfast identity create" in capsys.readouterr().out
