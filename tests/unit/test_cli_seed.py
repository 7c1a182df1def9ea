"""`holdfast seed`: from options to an image that a host accepts."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from tests.unit.test_cli_rig import holdfast
from tests.unit.test_config_rig import AUTHORITY, certificate, encoded, key_and_certificate
from vmm.config import gpt, load, seed
from vmm.config.types import Audit, AuditServer
from vmm.errors import NotFound, UserError

MIB = 1 << 20
LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "hf1.json"
    path.write_bytes(encoded())
    return path


def seed_in(image: Path) -> bytes | None:
    with image.open("rb") as disk:
        partition = gpt.read(disk).find(seed.PARTITION_NAME)
        assert partition is not None and str(partition.type) == seed.PARTITION_TYPE
        disk.seek(partition.offset)
        return seed.read(disk)


def test_create_writes_what_the_host_accepts(tmp_path: Path) -> None:
    for name in ("alice", "bob"):
        (tmp_path / f"{name}.pem").write_text(certificate(name))
    out = tmp_path / "out.json"
    holdfast(
        *("seed", "create", "--hostname", "hf1", "--management", "enp0s2=10.0.2.15/24,10.0.2.2", "--dns", "10.0.2.3"),
        *("--operational", "lan=52:54:00:00:00:02", "--admin", f"alice={tmp_path}/alice.pem"),
        *("--auditor", f"bob={tmp_path}/bob.pem", "--time-server", "ntp.example.org", "--banner", "One.\\nTwo."),
        *("--out", str(out)),
    )
    config = load.load(out)
    assert (config.management.address, config.management.gateway) == ("10.0.2.15/24", "10.0.2.2")
    assert [(person.name, person.role) for person in config.administrators] == [("alice", "admin"), ("bob", "auditor")]
    assert config.banner == "One.\nTwo."
    assert config.operational[0].interface == "52:54:00:00:00:02"


def test_create_refuses_what_the_host_would_refuse(tmp_path: Path) -> None:
    pem = tmp_path / "alice.pem"
    pem.write_text(certificate("alice"))
    good = ["seed", "create", "--hostname", "hf1", "--management", "enp0s2=dhcp", "--out", str(tmp_path / "out.json")]
    with pytest.raises(UserError, match="administrators: none of them has the role admin"):
        holdfast(*good)
    with pytest.raises(UserError, match=r"management\.address: "):
        holdfast(*good, "--management", "enp0s2=10.0.0", "--admin", f"a={pem}")
    with pytest.raises(UserError, match="--operational: not of the form"):
        holdfast(*good, "--operational", "lan", "--admin", f"a={pem}")
    with pytest.raises(UserError, match=r"missing\.pem: No such file"):
        holdfast(*good, "--admin", f"a={tmp_path}/missing.pem")
    pem.write_text(key_and_certificate("alice")[0])
    with pytest.raises(UserError, match="contains a private key"):
        holdfast(*good, "--admin", f"a={pem}")
    assert not (tmp_path / "out.json").exists()


def test_check_names_file_and_field(document: Path, capsys: Capture) -> None:
    holdfast("seed", "check", str(document))
    assert "a configuration for hf1" in capsys.readouterr().out
    document.write_bytes(encoded(hostname="-"))
    with pytest.raises(UserError, match=r"hf1\.json: hostname: not a host name"):
        holdfast("seed", "check", str(document))


def test_inject_appends_a_partition_then_reuses_it(document: Path, tmp_path: Path, capsys: Capture) -> None:
    image = tmp_path / "host.raw"
    gpt.create(image, MIB, LINUX, "root")
    holdfast("seed", "inject", str(document), str(image))
    assert seed_in(image) == document.read_bytes()
    size = image.stat().st_size
    long = encoded(banner="x" * 4000)
    document.write_bytes(long)
    holdfast("seed", "inject", str(document), str(image))
    document.write_bytes(encoded(hostname="hf2"))
    holdfast("seed", "inject", str(document), str(image))
    assert seed_in(image) == document.read_bytes() and image.stat().st_size == size
    # Nothing of the longer document is left behind the shorter one.
    assert b"xxxx" not in image.read_bytes()
    capsys.readouterr()
    holdfast("seed", "show", str(image))
    assert json.loads(capsys.readouterr().out)["hostname"] == "hf2"


def test_a_wrong_document_never_reaches_an_image(document: Path, tmp_path: Path) -> None:
    image = tmp_path / "host.raw"
    gpt.create(image, MIB, LINUX, "root")
    before = image.read_bytes()
    document.write_bytes(encoded(hostname="-"))
    with pytest.raises(UserError):
        holdfast("seed", "inject", str(document), str(image))
    assert image.read_bytes() == before
    with pytest.raises(UserError):
        holdfast("seed", "stick", str(document), str(tmp_path / "stick"))
    assert not (tmp_path / "stick").exists()


def test_a_stick_is_a_small_image_with_the_seed(document: Path, tmp_path: Path, capsys: Capture) -> None:
    stick = tmp_path / "stick.img"
    holdfast("seed", "stick", str(document), str(stick))
    assert seed_in(stick) == document.read_bytes() and stick.stat().st_size <= 4 * MIB
    capsys.readouterr()
    holdfast("seed", "show", str(stick))
    assert capsys.readouterr().out.encode().rstrip() == document.read_bytes()


def test_show_explains_what_is_not_there(tmp_path: Path) -> None:
    image = tmp_path / "image"
    gpt.create(image, MIB, LINUX, "root")
    with pytest.raises(NotFound, match="has no partition named HOLDFAST-SEED"):
        holdfast("seed", "show", str(image))
    gpt.append(image, MIB, uuid.UUID(seed.PARTITION_TYPE), seed.PARTITION_NAME)
    with pytest.raises(NotFound, match="the seed partition is empty"):
        holdfast("seed", "show", str(image))
    image.write_bytes(b"nothing")
    with pytest.raises(UserError, match="no usable partition table"):
        holdfast("seed", "show", str(image))


def test_create_takes_where_updates_come_from(tmp_path: Path) -> None:
    pem, ca, out = tmp_path / "alice.pem", tmp_path / "ca.pem", tmp_path / "out.json"
    pem.write_text(certificate("alice"))
    ca.write_text(certificate("ca"))
    good = ["seed", "create", "--hostname", "hf1", "--management", "enp0s2=dhcp", "--admin", f"a={pem}"]
    good += ["--out", str(out)]
    holdfast(*good)
    assert load.load(out).update is None
    with pytest.raises(UserError, match="--update-repository is missing"):
        holdfast(*good, "--update-automatic")
    good += ["--update-repository", "https://updates.example.org/"]
    holdfast(*good)
    update = load.load(out).update
    assert update is not None and (update.channel, update.automatic, update.ca) == ("stable", False, None)
    holdfast(
        *(*good, "--update-channel", "early", "--update-ca", str(ca), "--update-proxy", "http://192.0.2.5:3128"),
        *("--update-automatic", "--update-interval", "12", "--update-window", "01:00-05:00"),
    )
    update = load.load(out).update
    assert update is not None and update.ca == certificate("ca") and update.proxy == "http://192.0.2.5:3128"
    assert (update.channel, update.automatic) == ("early", True)
    assert (update.interval_hours, update.window) == (12, "01:00-05:00")
    with pytest.raises(UserError, match=r"update\.window: "):
        holdfast(*good, "--update-window", "soon")
    with pytest.raises(UserError, match=r"nothing\.pem: No such file"):
        holdfast(*good, "--update-ca", str(tmp_path / "nothing.pem"))


def test_create_takes_what_is_kept_of_the_trail(tmp_path: Path, capsys: Capture) -> None:
    pem, out = tmp_path / "alice.pem", tmp_path / "out.json"
    pem.write_text(certificate("alice"))
    good = ["seed", "create", "--hostname", "hf1", "--management", "enp0s2=dhcp", "--admin", f"a={pem}"]
    good += ["--out", str(out)]
    holdfast(*good)
    assert load.load(out).audit == Audit()
    holdfast(*good, "--audit-when-full", "refuse", "--audit-keep-days", "90", "--audit-keep-mib", "4096")
    assert load.load(out).audit == Audit("refuse", keep_days=90, keep_mib=4096)
    with pytest.raises(UserError, match=r"audit\.keep_mib: "):
        holdfast(*good, "--audit-keep-mib", "31")
    with pytest.raises(SystemExit):
        holdfast(*good, "--audit-when-full", "burn")


def test_create_takes_the_servers_of_the_trail(tmp_path: Path) -> None:
    pem, ca, out = tmp_path / "alice.pem", tmp_path / "ca.pem", tmp_path / "out.json"
    pem.write_text(certificate("alice"))
    ca.write_text(AUTHORITY)
    good = ["seed", "create", "--hostname", "hf1", "--management", "enp0s2=dhcp", "--admin", f"a={pem}"]
    good += ["--out", str(out)]
    servers = {
        "192.0.2.9": AuditServer("192.0.2.9", AUTHORITY),
        "192.0.2.9:7000,logs.example.org": AuditServer("192.0.2.9", AUTHORITY, 7000, "logs.example.org"),
        "2001:db8::9,logs": AuditServer("2001:db8::9", AUTHORITY, name="logs"),
        "[2001:db8::9]:7000": AuditServer("2001:db8::9", AUTHORITY, 7000),
    }
    holdfast(*good, *(word for where in servers for word in ("--audit-server", f"{where}={ca}")))
    assert load.load(out).audit == Audit(export=tuple(servers.values()))
    for wrong, field in (("logs.example.org", "address"), ("192.0.2.9:0", "port"), ("192.0.2.9,a b", "name")):
        with pytest.raises(UserError, match=rf"audit\.export\[0\]\.{field}: "):
            holdfast(*good, "--audit-server", f"{wrong}={ca}")
