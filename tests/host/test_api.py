"""Who gets what from the management API, and that all of it is on record."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest

from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.seed import Identity, make_identity
from tests.harness.waiting import poll
from vmm.api.routes import ROUTES
from vmm.audit.records import canonical, parse
from vmm.audit.verify import verify_file


def records(api: Api) -> list[dict[str, Any]]:
    """The whole audit trail."""
    found: list[dict[str, Any]] = []
    after = 0
    while True:
        page = api.call("GET", f"/v1/audit?after={after}&limit=500")
        found += page["records"]
        if page["next"] is None:
            return found
        after = page["next"]


@pytest.mark.sfr("FIA_UIA_EXT.1", "FTA_TAB.1")
def test_without_a_certificate_there_is_the_banner_and_nothing_else(host: Host) -> None:
    """Every route refuses a stranger without telling anything; the banner is served."""
    stranger = host.api()
    assert stranger.call("GET", "/v1/banner") == {"banner": "Authorised use only."}
    for route in ROUTES:
        path = route.path.format(name="x") if "{" in route.path else route.path
        if path == "/v1/banner":
            continue
        answer = stranger.request(route.verb, path)
        assert answer.status == 401, (route, answer)
        assert set(answer.json()) <= {"type", "title", "status", "detail", "hint"}, answer
    assert stranger.request("GET", "/v1/no-such-thing").status == 401


@pytest.mark.sfr("FTP_ITC_EXT.1", "FTP_TRP.1")
def test_nothing_of_a_request_is_readable_on_the_wire(host: Host, admin: Api) -> None:
    """The captured packets of the management network hold TLS, and neither a path, a name nor an answer."""
    admin.call("POST", "/v1/volumes", {"name": "read-me-if-you-can", "size": 1 << 20})
    assert admin.call("GET", "/v1/volumes/read-me-if-you-can")["name"] == "read-me-if-you-can"
    captured = (host.files.directory / "management.pcap").read_bytes()
    assert b"\x16\x03\x01" in captured, "no TLS handshake was captured"
    for text in (b"read-me-if-you-can", b"/v1/", b"HTTP/1.1", b"holdfast"):
        assert text not in captured, text


@pytest.mark.sfr("FIA_UIA_EXT.1", "FIA_UAU.5", "FIA_X509_EXT.1")
def test_a_foreign_certificate_gets_no_answer_and_is_on_record(host: Host, admin: Api, workdir: Path) -> None:
    """A certificate with an administrator's name but another key fails in the handshake; the trail has the origin."""
    forged = make_identity(workdir, "admin")
    with pytest.raises((OSError, http.client.HTTPException)):
        host.api(forged).request("GET", "/v1/health")
    failures = poll(
        lambda: [r for r in records(admin) if r["type"] == "tls.handshake" and r["outcome"] == "failure"],
        10,
        "the refused handshake is on record",
    )
    assert failures[-1]["actor"]["origin"].rpartition(":")[0], failures[-1]
    assert failures[-1]["reason"], failures[-1]


@pytest.mark.sfr("FCS_HTTPS_EXT.1", "FTP_ITC_EXT.1")
def test_only_tls_1_3_with_the_approved_suites_and_groups(host: Host, clients: dict[str, Identity]) -> None:
    """TLS 1.2 and plain HTTP get no answer; the session that stands uses AES-GCM."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", host.port), 10) as raw, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(raw)
    with socket.create_connection(("127.0.0.1", host.port), 30) as raw:
        raw.sendall(b"GET /v1/banner HTTP/1.1\r\nHost: x\r\n\r\n")
        raw.settimeout(60)
        try:
            assert not raw.recv(100).startswith(b"HTTP")
        except OSError:
            pass
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    with socket.create_connection(("127.0.0.1", host.port), 30) as raw, context.wrap_socket(raw) as session:
        assert session.version() == "TLSv1.3"
        assert (session.cipher() or ("",))[0] in ("TLS_AES_256_GCM_SHA384", "TLS_AES_128_GCM_SHA256")
    context.set_ecdh_curve("X25519")
    with socket.create_connection(("127.0.0.1", host.port), 30) as raw, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(raw)


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_roles_may_do_what_the_matrix_says(host: Host, clients: dict[str, Identity]) -> None:
    """A refused call changes nothing, an allowed one works, for each role."""
    matrix = json.loads(Path("vmm/core/permissions.json").read_text())
    calls = {
        "volume.create": ("POST", "/v1/volumes", {"name": "made-by-{role}", "size": 1 << 20}),
        "audit.read": ("GET", "/v1/audit?after=0&limit=1", None),
        "config.read": ("GET", "/v1/configuration", None),
        "machine.list": ("GET", "/v1/machines", None),
        "health.read": ("GET", "/v1/health", None),
    }
    for role, identity in clients.items():
        api = host.api(identity)
        for method, (verb, path, body) in calls.items():
            sent = json.loads(json.dumps(body).replace("{role}", role))
            allowed = role in matrix[method]
            answer = api.request(verb, path, sent)
            assert (answer.status // 100 == 2) == allowed, (role, method, answer)
            if not allowed:
                assert answer.status == 403, (role, method, answer)
    volumes = {volume["name"] for volume in host.api(clients["admin"]).call("GET", "/v1/volumes")}
    assert volumes == {f"made-by-{role}" for role in clients if role in matrix["volume.create"]}


def test_bad_input_is_refused_with_the_name_of_the_field(admin: Api) -> None:
    """Errors say what is wrong; nothing is made."""
    cases = (
        ({"name": "Bad Name", "size": 1 << 20}, "name"),
        ({"name": "v", "size": -1}, "size"),
        ({"name": "v", "size": 1 << 45}, "bytes"),
        ({"name": "v", "size": 1 << 20, "path": "/etc/shadow"}, "path"),
    )
    for body, named in cases:
        answer = admin.request("POST", "/v1/volumes", body)
        assert answer.status // 100 == 4 or answer.status == 503, answer
        assert named in answer.json()["detail"], answer
    assert admin.call("GET", "/v1/volumes") == []


@pytest.mark.sfr("FAU_GEN.1", "FAU_SAR.1", "FAU_STG.1")
def test_every_request_is_on_record_and_the_chain_verifies(
    host: Host, admin: Api, clients: dict[str, Identity], workdir: Path
) -> None:
    """A change leaves an intent and an outcome, a refusal its reason; the trail verifies, an altered copy does not."""
    admin.call("POST", "/v1/volumes", {"name": "v1", "size": 1 << 20})
    host.api(clients["user"]).call("DELETE", "/v1/volumes/v1", expect=403)
    admin.call("DELETE", "/v1/volumes/v1")
    trail = records(admin)
    created = [(r["phase"], r["outcome"]) for r in trail if r["type"] == "volume.create"]
    assert created == [("intent", "pending"), ("outcome", "success")]
    deleted = [
        (r["phase"], r["outcome"], r["actor"]["id"], r["object"]["name"]) for r in trail if r["type"] == "volume.delete"
    ]
    assert ("outcome", "failure", "user", "v1") in deleted
    assert deleted[-2:] == [("intent", "pending", "admin", "v1"), ("outcome", "success", "admin", "v1")]
    assert all(r["actor"]["origin"] for r in trail if r["type"].startswith("volume."))
    assert [r["seq"] for r in trail] == list(range(1, len(trail) + 1))
    # Nothing that the host's own processes wrote was refused as not registered, and the trail says which host it is of.
    assert not [r for r in trail if r["type"] == "audit.refused"]
    about = next(r for r in reversed(trail) if r["type"] == "audit.start")["extra"]
    assert about["host"] and about["root_hash"] == admin.call("GET", "/v1/version")["root_hash"], about
    assert {r["clock"]["source"] for r in trail} <= {"host", "ntp"}

    raw = host.agent.python(
        """
import pathlib
result = "".join(p.read_text() for p in sorted(pathlib.Path("/var/lib/holdfast-audit").glob("*.log")))
"""
    )
    copy = workdir / "trail.jsonl"
    copy.write_text(raw)
    assert verify_file(copy).problem is None
    lines = raw.splitlines(keepends=True)
    for altered in (
        lines[:5] + lines[6:],
        [*lines[:3], lines[4], lines[3], *lines[5:]],
        [*lines[:-2], lines[-2].replace("a", "b", 1), lines[-1]],
    ):
        copy.write_text("".join(altered))
        assert verify_file(copy).problem is not None
    assert canonical(parse(lines[0].encode())) == lines[0].encode()


@pytest.mark.sfr("FAU_GEN.1")
def test_without_audit_nothing_is_done(host: Host, admin: Api) -> None:
    """When the audit service is gone, a change is refused with that reason; when it is back, it works."""
    host.agent.exec(["systemctl", "stop", "holdfast-audit.service"])
    answer = admin.request("POST", "/v1/volumes", {"name": "v1", "size": 1 << 20})
    assert answer.status == 503
    assert "audit" in answer.json()["detail"]
    files = "import os; result = os.listdir('/var/lib/holdfast/core/volumes')"
    assert host.agent.python(files) == []
    host.agent.exec(["systemctl", "start", "holdfast-audit.service"], seconds=60)
    admin.call("POST", "/v1/volumes", {"name": "v1", "size": 1 << 20})
    assert len(host.agent.python(files)) == 1


@pytest.mark.sfr("FAU_STG.1")
def test_no_other_service_reaches_the_audit_store(host: Host) -> None:
    """The store's folder opens for its own user alone."""
    for user in ("holdfast-api", "holdfast-core", "holdfast-import", "libvirt-qemu"):
        done = host.agent.python(
            """
import os, pwd
child = os.fork()
if child == 0:
    try:
        user = pwd.getpwnam(argument)
        os.setgroups([]); os.setgid(user.pw_gid); os.setuid(user.pw_uid)
        os.listdir("/var/lib/holdfast-audit")
    except PermissionError:
        os._exit(13)
    os._exit(0)
result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
""",
            user,
        )
        assert done == 13, user


def test_recovery_keys_open_the_volumes_and_are_handed_out_once(host: Host, admin: Api) -> None:
    """An administrator fetches the keys; each opens its volume without the TPM; a second fetch is refused."""
    keys = admin.call("POST", "/v1/recovery-keys/fetch")["keys"]
    assert set(keys) == {"data", "audit"}
    for name, key in keys.items():
        device = f"/dev/disk/by-partlabel/holdfast-{name}"
        test = ["cryptsetup", "open", "--test-passphrase", "--key-file=-", device]
        host.agent.exec(test, input=key.encode(), seconds=60)
        assert host.agent.exec(test, input=key[:-1].encode(), check=False, seconds=60).rc != 0
    admin.call("POST", "/v1/recovery-keys/fetch", expect=409)
    assert host.agent.python("import os; result = os.listdir('/var/lib/holdfast/recovery')") == ["fetched"]
