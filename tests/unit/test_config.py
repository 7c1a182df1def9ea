"""The configuration document: what is accepted, and how what is wrong is named."""

from __future__ import annotations

import hashlib
import json
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.unit.test_config_rig import AUTHORITY, certificate, document, encoded, key_and_certificate
from vmm.audit.rule import Rule
from vmm.config import load
from vmm.config.types import Audit
from vmm.errors import UserError


def admin(**changes: Any) -> dict[str, Any]:
    return {"name": "alice", "role": "admin", "certificate": certificate(), **changes}


def test_a_right_document_is_read_and_written_back() -> None:
    config = load.decode(encoded())
    assert config.hostname == "hf1"
    assert config.operational[0].bridge == "op-lan"
    assert config.administrators[0].fingerprint == hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate())).hexdigest()
    assert load.decode(load.encode(config)) == config


def test_optional_fields_may_be_left_out() -> None:
    minimal = document(management={"interface": "enp0s2", "address": "dhcp"})
    del minimal["operational"], minimal["time_servers"]
    config = load.decode(json.dumps(minimal).encode())
    assert (config.operational, config.time_servers, config.management.gateway) == ((), (), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version: 2 is not known here"),
        ({"hostname": "a" * 65}, "hostname: not a host name"),
        ({"hostname": "-a"}, "hostname: not a host name"),
        ({"hostname": "a\n"}, "hostname: not a host name"),
        ({"hostname": 1}, "hostname: expected str, got int"),
        ({"colour": "red"}, "colour: is not a known field"),
        ({"management__vlan": 5}, "management.vlan: is not a known field"),
        ({"banner": "x" * 4097}, "banner: longer than 4096 characters"),
        ({"banner": "a\x1b[2J"}, "banner: character 2 is not printable"),
        ({"banner": "a\u202eb"}, "banner: character 2 is not printable"),
        ({"management__interface": "enp0s2\nName=x"}, "management.interface: not an interface name"),
        ({"management__interface": "../x"}, "management.interface: not an interface name"),
        ({"management__interface": "op-lan"}, "management.interface: not an interface name"),
        ({"management__interface": "lo"}, "management.interface: not an interface name"),
        ({"management__interface": "01:00:5e:00:00:01"}, "management.interface: not the MAC address of one"),
        ({"management__address": "10.0.0"}, "management.address: not an IPv4 or IPv6 interface address: '10.0.0'"),
        ({"management__address": "10.0.2.15"}, "management.address: not an IPv4 or IPv6 interface address"),
        ({"management__address": "fe80::1%x\n/64"}, "management.address: not an IPv4 or IPv6 interface address"),
        ({"management__address": "10.0.2.0/24"}, "management.address: the address of a network"),
        ({"management__address": "10.0.2.255/24"}, "management.address: the address of a network"),
        ({"management__address": "127.0.0.1/8"}, "management.address: not an address a host can have"),
        ({"management__gateway": "10.0.3.1"}, "management.gateway: 10.0.3.1 is not in the network 10.0.2.0/24"),
        ({"management__gateway": "10.0.2.15"}, "management.gateway: 10.0.2.15 is the host's own address"),
        ({"management__gateway": "router"}, "management.gateway: not an IPv4 or IPv6 address"),
        ({"management__address": "dhcp"}, "management.gateway: must be null"),
        ({"management__dns": ["10.0.2.3", "x"]}, "management.dns[1]: not an IPv4 or IPv6 address: 'x'"),
        ({"operational": [{"name": "LAN", "interface": "a"}]}, "operational[0].name: "),
        ({"operational": [{"name": "abcdefghi", "interface": "a"}]}, "operational[0].name: "),
        ({"operational": [{"name": "a"}]}, "operational[0].interface: is missing"),
        (
            {"operational": [{"name": "a", "interface": "x"}, {"name": "a", "interface": "y"}]},
            "operational[1].name: 'a' is already used by operational[0].name",
        ),
        (
            {"operational": [{"name": "a", "interface": "enp0s2"}]},
            "operational[0].interface: 'enp0s2' is already used by",
        ),
        (
            {"operational": [{"name": f"n{i}", "interface": f"e{i}"} for i in range(33)]},
            "operational: 33 entries are more than the 32 allowed",
        ),
        ({"administrators": []}, "administrators: none of them has the role admin"),
        ({"administrators": [admin(role="user")]}, "administrators: none of them has the role admin"),
        ({"administrators": [admin(role="root")]}, "administrators[0].role: invalid enum value"),
        ({"administrators": [admin(name="Alice")]}, "administrators[0].name: "),
        (
            {"administrators": [admin(), admin(certificate=certificate("bob"))]},
            "administrators[1].name: 'alice' is already used by administrators[0].name",
        ),
        (
            {"administrators": [admin(), admin(name="bob")]},
            "administrators[1].certificate: the same certificate as administrators[0].certificate",
        ),
        ({"time_servers": ["ntp.example.org", "a b"]}, "time_servers[1]: not an address or host name: 'a b'"),
        ({"time_servers": ["a\n[Match]"]}, "time_servers[0]: not an address or host name"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(load.ConfigurationError) as caught:
        load.decode(encoded(**changes))
    assert caught.value.message.startswith(message)


def test_a_mac_address_is_the_same_in_any_case() -> None:
    with pytest.raises(load.ConfigurationError, match=r"operational\[0\].interface: .* is already used"):
        load.decode(
            encoded(
                management__interface="AA:BB:CC:00:00:01".replace("AA", "52"),
                operational=[{"name": "a", "interface": "52:bb:cc:00:00:01"}],
            )
        )


@pytest.mark.parametrize(
    ("pem", "message"),
    [
        ("", "not exactly one certificate"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "not a certificate that can be read"),
        (certificate() * 2, "not exactly one certificate"),
        (certificate("k", "p521"), "curve secp521r1"),
        (certificate("k", "rsa2048"), "2048 bits"),
        (certificate("k", "ed25519"), "neither EC"),
        (certificate("k", "p384", ExtendedKeyUsageOID.SERVER_AUTH), "not for client authentication"),
        (key_and_certificate("k")[0], "contains a private key"),
    ],
)
def test_certificates_that_are_refused(pem: str, message: str) -> None:
    with pytest.raises(load.ConfigurationError) as caught:
        load.decode(encoded(administrators=[admin(certificate=pem)]))
    assert caught.value.message.startswith("administrators[0].certificate: ")
    assert message in caught.value.message


@pytest.mark.parametrize(("kind", "purpose"), [("p256", ExtendedKeyUsageOID.CLIENT_AUTH), ("rsa3072", None)])
def test_other_certificates_that_are_accepted(kind: str, purpose: Any) -> None:
    load.decode(encoded(administrators=[admin(certificate=certificate("x", kind, purpose))]))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 100_000, b'{"hostname":"\xff"}', encoded() + b"x"])
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(load.ConfigurationError):
        load.decode(data)


def test_size_and_messages_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(load.ConfigurationError, match="longer than 65536 bytes"):
        load.decode(encoded(banner="x" * load.MAX_DOCUMENT))
    with pytest.raises(load.ConfigurationError) as caught:
        load.decode(encoded(hostname="x" * 60_000))
    assert len(caught.value.message) < 600
    with pytest.raises(UserError, match="missing.json"):
        load.load(tmp_path / "missing.json")


def test_ipv6_with_a_link_local_gateway_is_accepted() -> None:
    config = load.decode(
        encoded(management__address="2001:db8::5/64", management__gateway="fe80::1", management__dns=[])
    )
    assert config.management.gateway == "fe80::1"


UPDATE = {"repository": "https://updates.example.org/holdfast"}


def test_updates_are_optional_and_have_defaults() -> None:
    assert load.decode(encoded()).update is None
    assert load.decode(encoded(update=None)).update is None
    update = load.decode(encoded(update=UPDATE)).update
    assert update is not None
    assert (update.channel, update.automatic, update.interval_hours, update.minutes) == ("stable", False, 6, None)
    whole = {
        "repository": "https://[2001:db8::1]:8443/r/",
        "channel": "early-1",
        "ca": certificate("ca") + certificate("other"),
        "proxy": "http://192.0.2.5:3128",
        "automatic": True,
        "interval_hours": 168,
        "window": "23:30-04:00",
    }
    config = load.decode(encoded(update=whole))
    assert config.update is not None and config.update.minutes == (1410, 240)
    assert load.decode(load.encode(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repository": 1}, "update.repository: expected str"),
        ({"url": "x"}, "update.url: is not a known field"),
        ({"repository": "http://example.org"}, "update.repository: not an https URL: 'http://example.org'"),
        ({"repository": "https://"}, "update.repository: not an https URL"),
        ({"repository": "https://a b/"}, "update.repository: not an https URL"),
        ({"repository": "https://a\n"}, "update.repository: not an https URL"),
        ({"repository": "https://a:99999/"}, "update.repository: not an https URL"),
        ({"repository": "https://[::1/"}, "update.repository: not an https URL"),
        ({"repository": "https://-a-/"}, "update.repository: not an https URL"),
        ({"repository": "https://a/" + "x" * 1024}, "update.repository: not an https URL"),
        ({"repository": "https://u:p@a/"}, "update.repository: holds a user or password"),
        ({"repository": "https://a/?x"}, "update.repository: ends in a query or fragment"),
        ({"channel": "Stable"}, "update.channel: "),
        ({"channel": ""}, "update.channel: "),
        ({"ca": ""}, "update.ca: not certificates in PEM form"),
        ({"ca": key_and_certificate("k")[0]}, "update.ca: contains a private key"),
        ({"proxy": "https://p:1"}, "update.proxy: not an http URL"),
        ({"proxy": "http://p:1/x"}, "update.proxy: more than scheme, host and port"),
        ({"proxy": "http://u@p"}, "update.proxy: holds a user or password"),
        ({"automatic": 1}, "update.automatic: expected bool"),
        ({"interval_hours": 0}, "update.interval_hours: 0 is not between 1 and 168"),
        ({"interval_hours": 169}, "update.interval_hours: 169 is not"),
        ({"window": "1:00-2:00"}, "update.window: not two times of a day"),
        ({"window": "24:00-01:00"}, "update.window: not two times of a day"),
        ({"window": "01:00-02:00\n"}, "update.window: not two times of a day"),
        ({"window": "01:00-01:00"}, "update.window: begins and ends at 01:00"),
    ],
)
def test_what_is_wrong_with_updates_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(load.ConfigurationError) as caught:
        load.decode(encoded(update=UPDATE | changes))
    assert caught.value.message.startswith(message)


def test_what_is_kept_of_the_trail_is_optional_and_has_defaults() -> None:
    assert load.decode(encoded()).audit == load.decode(encoded(audit={})).audit == Audit()
    config = load.decode(encoded(audit={"when_full": "refuse", "keep_days": 90, "keep_mib": 32}))
    assert config.audit == Audit("refuse", 90, 32) and load.decode(load.encode(config)) == config


@pytest.mark.parametrize(
    ("audit", "message"),
    [
        (None, "audit: expected object"),
        ({"when_full": "burn"}, "audit.when_full: invalid enum value 'burn'"),
        ({"keep_days": 0}, "audit.keep_days: expected int >= 1"),
        ({"keep_days": 36501}, "audit.keep_days: expected int <= 36500"),
        ({"keep_days": 1.5}, "audit.keep_days: expected int"),
        ({"keep_mib": 31}, "audit.keep_mib: expected int >= 32"),
        ({"keep_mib": (1 << 20) + 1}, "audit.keep_mib: expected int <= 1048576"),
        ({"keep": 1}, "audit.keep: is not a known field"),
    ],
)
def test_what_is_wrong_with_what_is_kept_is_named(audit: Any, message: str) -> None:
    with pytest.raises(load.ConfigurationError) as caught:
        load.decode(encoded(audit=audit))
    assert caught.value.message.startswith(message)


SERVER = {"address": "192.0.2.9", "ca": AUTHORITY}


def test_servers_of_the_trail_are_optional_and_change_what_is_kept() -> None:
    assert not load.decode(encoded()).audit.rule.until_exported
    config = load.decode(encoded(audit={"keep_days": 9, "export": [SERVER, SERVER | {"port": 1, "name": "logs"}]}))
    assert config.audit.rule == Rule(keep_days=9, until_exported=True)
    one, other = config.audit.export
    assert (one.endpoint, one.identity, other.endpoint, other.identity) == (
        *("192.0.2.9:6514", "192.0.2.9"),
        *("192.0.2.9:1", "logs"),
    )
    assert load.decode(load.encode(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"address": "logs.example.org"}, "audit.export[0].address: not an IPv4 or IPv6 address"),
        ({"address": "fe80::1%lo"}, "audit.export[0].address: not an IPv4"),
        ({"address": "127.0.0.1"}, "audit.export[0].address: not an address that servers can have"),
        ({"address": "::ffff:192.0.2.9"}, "audit.export[0].address: not an address that servers can have"),
        ({"address": "224.0.0.1"}, "audit.export[0].address: not an address that servers can have"),
        ({"port": 0}, "audit.export[0].port: 0 is not between"),
        ({"port": 65536}, "audit.export[0].port: 65536 is not between"),
        ({"name": "a\nb"}, "audit.export[0].name: not an address or host name"),
        ({"name": "*.example.org"}, "audit.export[0].name: not an address or host name"),
        ({"ca": "x"}, "audit.export[0].ca: not certificates in PEM form"),
        ({"ca": certificate()}, "audit.export[0].ca: not the certificate of an authority: CN=alice"),
        ({"ca": key_and_certificate("alice")[0]}, "audit.export[0].ca: contains a private key"),
        ({"key": "x"}, "audit.export[0].key: is not a known field"),
    ],
)
def test_what_is_wrong_with_servers_of_the_trail_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(load.ConfigurationError) as caught:
        load.decode(encoded(audit={"export": [SERVER | changes]}))
    assert caught.value.message.startswith(message)


def test_there_are_few_servers_of_the_trail_each_once() -> None:
    with pytest.raises(load.ConfigurationError, match="5 entries are more than the 4"):
        load.decode(encoded(audit={"export": [SERVER | {"port": port} for port in range(1, 6)]}))
    with pytest.raises(load.ConfigurationError, match=r"audit\.export\[1\]: .* already used"):
        load.decode(encoded(audit={"export": [SERVER, SERVER | {"name": "logs"}]}))
