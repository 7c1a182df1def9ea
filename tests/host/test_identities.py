"""Identities that are enrolled, changed and revoked while the host runs."""

from __future__ import annotations

import datetime
import http.client
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.seed import Identity, make_identity
from tests.harness.stream import Closed
from tests.harness.waiting import poll
from tests.host.conftest import Guests
from tests.host.test_api import records

OWN = ("start", "pause", "resume", "reset", "suspend", "stop", "force-off")


def enroll(admin: Api, identity: Identity, *machines: str, **changes: Any) -> Any:
    """Enroll what make_identity made."""
    body = {"name": identity.name, "role": identity.role, "certificate": identity.certificate.read_text()}
    return admin.call("POST", "/v1/identities", {**body, "machines": list(machines), **changes})


def is_refused(host: Host, identity: Identity) -> bool:
    """Whether a certificate fails in the handshake."""
    try:
        host.api(identity).request("GET", "/v1/whoami")
    except (OSError, http.client.HTTPException):
        return True
    return False


@pytest.mark.sfr("FMT_MOF_EXT.1", "FIA_UIA_EXT.1", "FIA_UAU.5")
def test_an_operator_is_enrolled_works_and_is_revoked(
    host: Host, admin: Api, clients: dict[str, Identity], guests: Guests, workdir: Path
) -> None:
    """Its certificate fails before and after; revoked, its console and what else it has open end; all is on record."""
    guests.run("vm1")
    olga = make_identity(workdir, "olga", "operator")
    assert is_refused(host, olga)
    shown = enroll(admin, olga)
    assert (shown["role"], shown["source"], shown["enrolled_by"]) == ("operator", "enrolled", "admin")
    operator = host.api(olga)
    me = operator.call("GET", "/v1/whoami")
    assert me["name"] == "olga" and "machine.start" in me["methods"] and "volume.create" not in me["methods"]
    assert operator.call("GET", "/v1/machines/vm1")["state"] == "running"
    operator.call("POST", "/v1/volumes", {"name": "v", "size": 1 << 20}, expect=403)
    for path in ("/v1/identities", "/v1/identities/olga", "/v1/access"):
        operator.call("GET", path, expect=403)
    operator.call("POST", "/v1/identities/olga/change", {"role": "admin"}, expect=403)

    idle = http.client.HTTPSConnection("127.0.0.1", host.port, context=operator.tls, timeout=60)
    idle.request("GET", "/v1/whoami")
    idle.getresponse().read()
    console = operator.console("vm1")
    console.send("echo $((40 + 2))-works\n")
    console.expect("42-works")
    admin.call("DELETE", "/v1/identities/olga")
    with pytest.raises(Closed):
        console.expect("nothing ever says this")
    console.close()
    with pytest.raises((OSError, http.client.HTTPException)):
        idle.request("GET", "/v1/whoami")
        idle.getresponse()
    assert is_refused(host, olga)
    assert [one["name"] for one in admin.call("GET", "/v1/identities")] == sorted(clients)

    def known() -> Any:
        trail = records(admin)
        return trail if any(r["type"] == "session.end" and r["extra"]["subject"] == "CN=olga" for r in trail) else None

    trail: list[dict[str, Any]] = poll(known, 30 * host.acceleration.scale, "the end of her session is on record")
    ends = [r for r in trail if r["type"] == "machine.console" and r["actor"]["id"] == "olga"]
    assert [(r["phase"], r["outcome"]) for r in ends] == [("intent", "pending"), ("outcome", "failure")], ends
    done = [
        (r["type"], r["phase"], r["outcome"], r["actor"]["id"], r["object"])
        for r in trail
        if r["type"] in ("identity.enroll", "identity.revoke")
    ]
    olgas = {"kind": "identity", "name": "olga", "id": shown["fingerprint"]}
    assert done == [
        ("identity.enroll", "intent", "pending", "admin", {**olgas, "id": ""}),
        ("identity.enroll", "outcome", "success", "admin", olgas),
        ("identity.revoke", "intent", "pending", "admin", olgas),
        ("identity.revoke", "outcome", "success", "admin", olgas),
    ], done
    # Nothing that the host's own processes wrote was refused as not registered.
    assert not [r for r in trail if r["type"] == "audit.refused"]


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_a_user_has_one_machine_and_there_are_no_others(
    host: Host, admin: Api, clients: dict[str, Identity], guests: Guests, workdir: Path
) -> None:
    """What is outside of its scope looks as if it did not exist; a later machine of the same name is outside."""
    mine = guests.run("vm1")["uuid"]
    other = guests.create("vm2")["uuid"]
    uma = make_identity(workdir, "uma", "user")
    assert enroll(admin, uma, "vm1")["machines"] == [{"name": "vm1", "uuid": mine}]
    user = host.api(uma)
    assert [machine["uuid"] for machine in user.call("GET", "/v1/machines")] == [mine]
    assert host.api(clients["user"]).call("GET", "/v1/machines") == []
    console = user.console("vm1")
    console.send("\necho $((40 + 2))-mine\n")
    console.expect("42-mine")
    for action, state in (("pause", "paused"), ("resume", "running"), ("suspend", "saved"), ("start", "running")):
        assert user.call("POST", f"/v1/machines/vm1/{action}", seconds=300)["state"] == state
    console.close()
    assert user.call("GET", "/v1/machines/vm1/stats")["cpu_seconds"] > 0
    for verb, path in (("GET", "/v1/volumes"), ("GET", "/v1/audit"), ("GET", "/v1/identities"), ("GET", "/v1/health")):
        user.call(verb, path, expect=403)
    user.call("DELETE", "/v1/machines/vm1", expect=403)

    calls = [("GET", ""), ("GET", "/stats"), *(("POST", f"/{action}") for action in OWN)]
    for verb, rest in calls:
        bodies = []
        for name in ("vm2", "none"):
            answer = user.request(verb, f"/v1/machines/{name}{rest}")
            assert answer.status == 404, (verb, rest, answer)
            bodies.append(answer.body.replace(name.encode(), b"NAME"))
        assert bodies[0] == bodies[1], bodies
    assert admin.call("GET", "/v1/machines/vm2")["state"] == "stopped"
    refused = [r for r in records(admin) if r["actor"]["id"] == "uma" and r["object"].get("id") == other]
    assert len(refused) == len(calls)
    assert {(r["phase"], r["outcome"], r["reason"]) for r in refused} == {
        ("outcome", "failure", "outside of the caller's scope")
    }

    user.call("POST", "/v1/machines/vm1/force-off", seconds=60)
    admin.call("DELETE", "/v1/machines/vm1")
    admin.call("POST", "/v1/machines", {"name": "vm1", "cpus": 1, "memory": 64 << 20})
    assert user.call("GET", "/v1/machines") == []
    user.call("GET", "/v1/machines/vm1", expect=404)
    admin.call("POST", "/v1/identities/uma/change", {"machines": ["vm2"]})
    assert [machine["uuid"] for machine in user.call("GET", "/v1/machines")] == [other]


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_somebody_is_always_left_to_administer_the_host(
    host: Host, admin: Api, clients: dict[str, Identity], workdir: Path
) -> None:
    """Those of the configuration stay, nobody takes the right from itself, and both are said."""
    answer = admin.request("DELETE", "/v1/identities/admin")
    assert answer.status == 409 and "comes from the configuration" in answer.json()["detail"], answer
    assert admin.request("POST", "/v1/identities/admin/change", {"role": "user"}).status == 409
    anna = make_identity(workdir, "anna")
    enroll(admin, anna)
    for path, body in (("/v1/identities/anna", None), ("/v1/identities/anna/change", {"role": "user"})):
        answer = host.api(anna).request("POST" if body else "DELETE", path, body)
        assert answer.status == 409 and "your own" in answer.json()["detail"], answer
    host.api(anna).call("DELETE", "/v1/identities/admin", expect=409)
    admin.call("DELETE", "/v1/identities/anna")
    matrix = host.api(clients["auditor"]).call("GET", "/v1/access")["roles"]
    assert "identity.enroll" in matrix["admin"] and "identity.enroll" not in matrix["auditor"] + matrix["operator"]


def ends(answer: http.client.HTTPResponse) -> bool:
    """Whether an answer that would go on for ever, with a line now and then, is broken off."""
    try:
        for _ in range(20):
            if not answer.read1():
                return True
    except TimeoutError:
        return False
    except (OSError, http.client.HTTPException):
        return True
    return False


@pytest.mark.sfr("FIA_UIA_EXT.1", "FMT_MOF_EXT.1")
def test_identities_outlive_restarts_and_a_power_cut(
    host: Host, admin: Api, clients: dict[str, Identity], workdir: Path
) -> None:
    """Who was enrolled gets in again, who was revoked does not, whichever part was gone in between."""
    stays, goes = make_identity(workdir, "stays", "auditor"), make_identity(workdir, "goes", "auditor")
    for identity in (stays, goes):
        enroll(admin, identity)
    seconds = 60 * host.acceleration.scale
    follower = http.client.HTTPSConnection("127.0.0.1", host.port, context=host.api(goes).tls, timeout=seconds)
    follower.request("GET", "/v1/audit/follow")
    answer = follower.getresponse()
    assert answer.status == 200
    admin.call("DELETE", "/v1/identities/goes")
    assert ends(answer)

    def settled() -> bool:
        return not is_refused(host, stays) and host.api(stays).request("GET", "/v1/whoami").status == 200

    limit = 120 * host.acceleration.scale
    for unit in ("holdfast-core", "holdfast-api"):
        host.agent.exec(["systemctl", "restart", f"{unit}.service"], seconds=120)
        poll(settled, limit, f"who was enrolled gets in after a restart of {unit}")
        assert is_refused(host, goes)
    # Without the file there is nobody but who is in the configuration, until core begins.
    host.agent.exec(["rm", "/run/holdfast/core/pins.json"])
    poll(lambda: is_refused(host, stays), limit, "nobody is known by a file that is gone")
    assert host.api(clients["admin"]).call("GET", "/v1/whoami")["name"] == "admin"
    host.kill()
    host.power_on()
    host.wait_ready(clients["admin"], 180)
    poll(settled, limit, "who was enrolled gets in after a power cut")
    assert is_refused(host, goes)
    assert host.api(stays).call("GET", "/v1/whoami")["role"] == "auditor"


def selfmade(key: Any, days: int) -> str:
    """A certificate that ends so many days from now."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "weak")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=days))
        .sign(key, hashes.SHA384())
    )
    return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.sfr("FIA_X509_EXT.1", "FMT_MOF_EXT.1")
def test_certificates_that_are_no_good_are_not_enrolled(admin: Api, workdir: Path) -> None:
    """Each is refused by the name of the field, and nobody is enrolled."""
    good = make_identity(workdir, "good").certificate.read_text()
    strong: Callable[[], Any] = lambda: ec.generate_private_key(ec.SECP384R1())  # noqa: E731
    cases = (
        (selfmade(rsa.generate_private_key(65537, 2048), 900), "2048 bits"),
        (selfmade(ec.generate_private_key(ec.SECP521R1()), 900), "secp521r1"),
        (selfmade(strong(), -30), "expired"),
        ("somebody", "PEM"),
        (good + selfmade(strong(), 900), "exactly one certificate"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not a certificate"),
    )
    before = admin.call("GET", "/v1/identities")
    for certificate, says in cases:
        answer = admin.request("POST", "/v1/identities", {"name": "x", "role": "admin", "certificate": certificate})
        detail = answer.json()["detail"]
        assert answer.status == 400 and detail.startswith("certificate: ") and says in detail, detail
    assert admin.call("GET", "/v1/identities") == before
