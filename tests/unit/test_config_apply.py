"""The configure step: what it renders, stores and records, and what it leaves alone when the seed is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.test_config_rig import AUTHORITY, MANAGEMENT_MAC, OPERATIONAL_MAC, HostTree, encoded, host_tree
from vmm import atomic, paths
from vmm.audit.client import Entry, Rule
from vmm.audit.events import EVENTS
from vmm.config import apply, load, render, seed
from vmm.config.types import Export, Failure
from vmm.errors import Unavailable

NETWORK = "run/systemd/network"


class Host:
    """A host's tree, and what the configure step told the audit daemon and the kernel."""

    def __init__(self, tree: HostTree) -> None:
        self.tree = tree
        self.records: list[Entry] = []
        self.stored_at_record: list[bool] = []
        self.hostnames: list[str] = []
        self.rules: list[Rule] = []
        self.audit_works = self.rule_is_taken = True

    def configure(self) -> Failure | None:
        return apply.run(self._record, self.hostnames.append, self._set_rule)

    def seed(self, document: bytes) -> None:
        self.tree.disk("sdb", removable=True, sdb1=(seed.PARTITION_NAME, seed.pack(document)))

    def files(self) -> set[str]:
        """Files outside /sys and /dev."""
        found = (p.relative_to(self.tree.root) for p in self.tree.root.rglob("*") if p.is_file() and not p.is_symlink())
        return {str(path) for path in found if path.parts[0] not in {"sys", "dev"}}

    def text(self, path: str) -> str:
        return (self.tree.root / path).read_text()

    def error(self) -> Any:
        return json.loads(paths.CONFIG_ERROR.read_text())

    def _set_rule(self, rule: Rule) -> None:
        if not self.rule_is_taken:
            raise Unavailable("the audit daemon went away")
        self.rules.append(rule)

    def _record(self, entry: Entry) -> None:
        if not self.audit_works:
            raise Unavailable("the audit daemon went away")
        EVENTS.check(entry, "holdfast-host")
        self.stored_at_record.append(paths.STORED_CONFIG.exists())
        self.records.append(entry)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(host_tree(tmp_path, monkeypatch))


def test_a_seed_is_stored_and_rendered(host: Host) -> None:
    host.seed(encoded(time_servers=["ntp.example.org", "10.0.2.4"]))
    assert host.configure() is None
    assert host.hostnames == ["hf1"]
    assert host.files() == {
        "var/lib/holdfast/config/current.json",
        "run/holdfast/config.json",
        "run/holdfast/management.nft",
        "run/holdfast/resolv.conf",
        "run/systemd/timesyncd.conf.d/holdfast.conf",
        f"{NETWORK}/10-management.network",
        f"{NETWORK}/20-op-lan.netdev",
        f"{NETWORK}/21-op-lan.network",
        f"{NETWORK}/22-op-lan-port.network",
    }
    assert host.text(f"{NETWORK}/10-management.network") == (
        "[Match]\nName=enp0s2\n\n"
        "[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nLinkLocalAddressing=no\nDNS=10.0.2.3\n"
        "IPv6AcceptRA=no\nLLDP=no\nEmitLLDP=no\nLLMNR=no\nMulticastDNS=no\n"
    )
    assert host.text(f"{NETWORK}/20-op-lan.netdev") == (
        "[NetDev]\nName=op-lan\nKind=bridge\n\n[Bridge]\nSTP=no\nMulticastSnooping=no\n"
    )
    assert host.text(f"{NETWORK}/21-op-lan.network") == (
        "[Match]\nName=op-lan\n\n[Link]\nActivationPolicy=up\nARP=no\nRequiredForOnline=no\n\n"
        "[Network]\nLinkLocalAddressing=no\nConfigureWithoutCarrier=yes\n"
        "IPv6AcceptRA=no\nLLDP=no\nEmitLLDP=no\nLLMNR=no\nMulticastDNS=no\n"
    )
    assert host.text(f"{NETWORK}/22-op-lan-port.network") == (
        "[Match]\nName=enp0s3\n\n[Link]\nRequiredForOnline=no\n\n"
        "[Network]\nBridge=op-lan\nLinkLocalAddressing=no\n"
        "IPv6AcceptRA=no\nLLDP=no\nEmitLLDP=no\nLLMNR=no\nMulticastDNS=no\n"
    )
    assert host.text("run/holdfast/management.nft") == (
        'define management = "enp0s2"\n'
        "flush set inet holdfast management\n"
        "add element inet holdfast management { $management }\n"
        "flush set inet holdfast audit_servers4\n"
        "flush set inet holdfast audit_servers6\n"
    )
    assert host.text("run/systemd/timesyncd.conf.d/holdfast.conf") == "[Time]\nNTP=ntp.example.org 10.0.2.4\n"
    assert load.applied() == load.load(paths.STORED_CONFIG)
    assert oct(paths.STORED_CONFIG.stat().st_mode & 0o777) == "0o644"


def test_the_record_comes_before_the_change(host: Host) -> None:
    host.seed(encoded())
    host.configure()
    (record,) = host.records
    assert (record.type, record.phase, record.outcome, record.object.name) == (
        "config.applied",
        "event",
        "success",
        "the partition sdb1",
    )
    assert host.stored_at_record == [False]


def test_a_seed_that_cannot_be_recorded_is_not_adopted(host: Host) -> None:
    host.seed(encoded())
    host.audit_works = False
    assert host.configure() is not None
    assert host.files() == {"run/holdfast/config-error.json"}
    assert "the audit trail does not take records" in host.error()["message"]


def test_the_stored_configuration_wins_over_a_seed(host: Host) -> None:
    host.seed(encoded())
    host.configure()
    host.tree.smbios(b"io.systemd.credential:holdfast.seed=" + encoded(hostname="evil"))
    assert host.configure() is None
    assert host.hostnames == ["hf1", "hf1"]
    assert host.records[-1].object.name == apply.STORED


def test_a_damaged_stored_configuration_does_not_open_the_door_to_a_seed(host: Host) -> None:
    host.tree.write("var/lib/holdfast/config/current.json", b"{")
    host.seed(encoded())
    failure = host.configure()
    assert failure is not None and failure.source == apply.STORED
    assert host.text("var/lib/holdfast/config/current.json") == "{"
    assert not paths.APPLIED_CONFIG.exists()


def test_the_stored_configuration_is_applied_even_unrecorded(host: Host) -> None:
    host.seed(encoded())
    host.configure()
    host.audit_works = False
    failure = host.configure()
    assert failure is not None and "audit trail" in failure.message
    assert paths.APPLIED_CONFIG.exists() and host.hostnames == ["hf1", "hf1"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (encoded(management__address="10.0.0"), "management.address: not an IPv4 or IPv6 interface address: '10.0.0'"),
        (encoded(management__interface="enp9s9"), "management.interface: this host has no interface enp9s9"),
        (
            encoded(operational=[{"name": "lan", "interface": "52:54:00:00:00:09"}]),
            "operational[0].interface: this host has no interface 52:54:00:00:00:09",
        ),
        (
            encoded(operational=[{"name": "lan", "interface": MANAGEMENT_MAC}]),
            f"operational[0].interface: {MANAGEMENT_MAC} is the interface already used by management.interface",
        ),
        (b"nonsense", "not a JSON document"),
    ],
)
def test_a_wrong_seed_leaves_nothing_but_the_reason(host: Host, document: bytes, message: str) -> None:
    host.seed(document)
    failure = host.configure()
    assert failure is not None and failure.message.startswith(message)
    assert host.files() == {"run/holdfast/config-error.json"}
    error = host.error()
    assert error["message"].startswith(message) and error["source"] == "the partition sdb1"
    assert host.hostnames == []
    (record,) = host.records
    assert (record.type, record.outcome) == ("config.refused", "failure")
    assert record.reason.startswith(message)


def test_a_missing_interface_is_answered_with_those_there_are(host: Host) -> None:
    host.seed(encoded(management__interface="enp9s9"))
    failure = host.configure()
    assert failure is not None
    assert failure.hint == f"it has: enp0s2 ({MANAGEMENT_MAC}), enp0s3 ({OPERATIONAL_MAC})"


def test_a_damaged_container_is_reported_with_its_place(host: Host) -> None:
    host.tree.disk("sdb", sdb1=(seed.PARTITION_NAME, seed.pack(encoded())[:-1]))
    host.configure()
    assert host.error()["source"] == "the partition sdb1"
    assert "cut off" in host.error()["message"]


def test_no_seed_at_all_is_said(host: Host) -> None:
    assert host.configure() is not None
    assert host.error()["message"] == "no configuration was found"
    assert host.records[0].type == "config.refused"


def test_the_error_goes_away_once_all_is_well(host: Host) -> None:
    host.configure()
    host.seed(encoded())
    assert host.configure() is None
    assert not paths.CONFIG_ERROR.exists()


def test_a_stored_configuration_survives_a_lost_card(host: Host, tmp_path: Path) -> None:
    host.seed(encoded(management__interface=MANAGEMENT_MAC.upper()))
    host.configure()
    assert host.text("run/holdfast/management.nft").startswith('define management = "enp0s2"\n')
    (tmp_path / "sys/class/net/enp0s2/device").rmdir()
    failure = host.configure()
    assert failure is not None and failure.message.startswith("management.interface: this host has no interface")
    assert host.text("run/holdfast/management.nft").startswith(f'define management = "{render.NO_INTERFACE}"\n')
    assert f"PermanentMACAddress={MANAGEMENT_MAC}\n" in host.text(f"{NETWORK}/10-management.network")


def test_bridges_do_not_count_as_interfaces(host: Host) -> None:
    host.tree.interface("br0", "52:54:00:00:00:08", physical=False)
    host.seed(encoded(operational=[{"name": "lan", "interface": "br0"}]))
    assert host.configure() is not None


def test_files_of_an_earlier_run_go_away_and_others_stay(host: Host) -> None:
    host.seed(encoded())
    host.configure()
    stale = host.tree.write(f"{NETWORK}/20-op-old.netdev", b"")
    other = host.tree.write(f"{NETWORK}/50-other.network", b"")
    host.configure()
    assert not stale.exists() and other.exists()


def test_dhcp_takes_neither_name_nor_time(host: Host) -> None:
    host.seed(encoded(management={"interface": "enp0s2", "address": "dhcp", "dns": ["10.0.2.3"]}))
    host.configure()
    text = host.text(f"{NETWORK}/10-management.network")
    assert "DHCP=yes\n" in text and "IPv6AcceptRA=no\n" in text
    assert "[DHCPv4]\nUseHostname=no\nUseNTP=no\nUseDNS=no\n" in text


def test_a_failing_disk_is_reported(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.seed(encoded())
    write: Callable[..., None] = atomic.write

    def full(path: Path, content: bytes, **options: Any) -> None:
        if path == paths.STORED_CONFIG:
            raise OSError(28, "No space left on device", str(path))
        write(path, content, **options)

    monkeypatch.setattr(atomic, "write", full)
    assert host.configure() is not None
    assert "No space left on device" in host.error()["message"]
    assert [record.type for record in host.records] == ["config.applied", "config.refused"]


@pytest.mark.parametrize("value", ["a\nb", "a\0", 'a"', "%n", "$x", "a\u2028"])
def test_nothing_unsafe_is_ever_rendered(value: str) -> None:
    with pytest.raises(ValueError, match="unsafe"):
        render._plain(value)


def test_atomic_write_replaces_and_leaves_no_rest(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    atomic.write(target, b"one", mode=0o600)
    (target.parent / ".file.new").symlink_to(tmp_path / "elsewhere")
    atomic.write(target, b"two", mode=0o640)
    assert target.read_bytes() == b"two" and target.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in target.parent.iterdir()] == ["file"]
    assert not (tmp_path / "elsewhere").exists()


def test_the_audit_service_is_told_what_is_kept(host: Host) -> None:
    """At each start, as it may have been given another store; a configuration that is refused changes nothing."""
    host.seed(encoded(audit={"when_full": "refuse", "keep_days": 30}))
    for _ in range(2):
        assert host.configure() is None
    assert host.rules == [Rule("refuse", keep_days=30)] * 2
    host.rule_is_taken = False
    failure = host.configure()
    assert failure is not None and "the audit service does not take its rule" in failure.message
    # All else is in force.
    assert host.hostnames == ["hf1"] * 3
    host.rule_is_taken = True
    paths.STORED_CONFIG.write_bytes(b"{}")
    assert host.configure() is not None and len(host.rules) == 2


def test_servers_of_the_trail_are_rendered_and_go_away_again(host: Host) -> None:
    servers = [{"address": "192.0.2.9", "ca": AUTHORITY}, {"address": "2001:db8::9", "port": 7, "ca": AUTHORITY}]
    host.seed(encoded(audit={"export": servers}))
    assert host.configure() is None
    assert host.text("run/holdfast/management.nft").endswith(
        "flush set inet holdfast audit_servers4\n"
        "flush set inet holdfast audit_servers6\n"
        "add element inet holdfast audit_servers4 { 192.0.2.9 . 6514 }\n"
        "add element inet holdfast audit_servers6 { 2001:db8::9 . 7 }\n"
    )
    export = msgspec.json.decode(paths.EXPORT_SETTINGS.read_bytes(), type=Export)
    assert (export.hostname, export.address) == ("hf1", "10.0.2.15/24")
    assert export.servers == load.applied().audit.export
    assert host.rules == [Rule(until_exported=True)]
    paths.STORED_CONFIG.write_bytes(encoded())
    assert host.configure() is None
    assert not paths.EXPORT_SETTINGS.exists()
