"""The seed: refused whole when it is wrong, found where our tool puts it, and applied as it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.api import Api
from tests.harness.checkpoint import fresh
from tests.harness.host import Host
from tests.harness.image import Files, Image
from tests.harness.machine import Hardware
from tests.harness.seed import MANAGEMENT_MAC, OPERATIONAL_MAC, Identity, configuration, seed_credential
from vmm.process import run

_NETWORK = """
import fcntl, pathlib, socket, struct
result = {}
ipv6 = [line.split() for line in open("/proc/net/if_inet6")]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
    for _, name in socket.if_nameindex():
        folder = pathlib.Path("/sys/class/net", name)
        try:
            answer = fcntl.ioctl(asking, 0x8915, struct.pack("16s24x", name.encode()))  # SIOCGIFADDR
            addresses = [socket.inet_ntoa(answer[20:24])]
        except OSError:
            addresses = []
        addresses += [fields[0] for fields in ipv6 if fields[5] == name]
        ports = folder / "brif"
        result[name] = {
            "mac": (folder / "address").read_text().strip(),
            "addresses": addresses,
            "ports": [port.name for port in ports.iterdir()] if ports.exists() else None,
        }
"""


def test_a_wrong_seed_is_refused_as_a_whole(fresh_disk: Files, clients: dict[str, Identity], workdir: Path) -> None:
    """One wrong field: the console names it and the API stays away. Nothing was kept: one on a stick then works."""
    management: dict[str, Any] = {"interface": MANAGEMENT_MAC, "address": "10.0.0", "gateway": None, "dns": []}
    wrong = configuration(list(clients.values()), hostname="wrong", management=management)
    with Host(fresh_disk, smbios=[seed_credential(wrong)]) as host:
        host.serial.expect(r"NOT CONFIGURED: management\.address: ", 60)
        assert not host.api().reachable(0.5)
    document, stick = workdir / "seed.json", workdir / "stick.img"
    document.write_text(json.dumps(configuration(list(clients.values()), hostname="by-stick")))
    stick.unlink(missing_ok=True)
    run([sys.executable, "-m", "vmm.cli", "seed", "stick", document, stick])
    with Host(fresh_disk, hardware=Hardware(stick=stick)) as host:
        host.wait_ready(clients["admin"])
        assert host.api(clients["admin"]).call("GET", "/v1/configuration")["hostname"] == "by-stick"


@pytest.mark.long
def test_a_seed_in_the_image_configures_the_host(
    built_image: Image, workdir: Path, clients: dict[str, Identity]
) -> None:
    """`holdfast seed inject` writes into the image what the host then finds, with nothing else to tell it."""
    document, image = workdir / "seed.json", workdir / "seeded.raw"
    wanted = configuration(list(clients.values()), hostname="injected", banner="Only for the injected.")
    document.write_text(json.dumps(wanted))
    run(["cp", "--sparse=always", built_image.disk, image])
    run([sys.executable, "-m", "vmm.cli", "seed", "inject", document, image])
    files = fresh(workdir, image, Hardware().disk)
    try:
        with Host(files) as host:
            host.wait_ready(clients["admin"])
            assert host.api().call("GET", "/v1/banner") == {"banner": "Only for the injected."}
            assert host.api(clients["admin"]).call("GET", "/v1/configuration")["hostname"] == "injected"
    finally:
        files.discard()
        image.unlink()


def test_the_seed_is_applied(host: Host, admin: Api) -> None:
    """Host name, and the management address on its own interface, which alone the packet filter admits."""
    applied = admin.call("GET", "/v1/configuration")
    assert applied["hostname"] == host.agent.python("import socket; result = socket.gethostname()") == "hf1"
    interfaces = host.agent.python(_NETWORK)
    (management,) = (name for name, found in interfaces.items() if found["mac"] == MANAGEMENT_MAC)
    assert interfaces[management]["addresses"] == ["10.0.2.15"]
    listed = json.loads(host.agent.exec(["nft", "--json", "list", "set", "inet", "holdfast", "management"]).out)
    assert [entry["set"]["elem"] for entry in listed["nftables"] if "set" in entry] == [[management]]


@pytest.mark.sfr("FMT_SMO_EXT.1")
def test_operational_networks_have_no_address_of_the_host(host: Host) -> None:
    """The bridge holds the operational card and nothing else; neither has an address, not even a link-local one."""
    interfaces = host.agent.python(_NETWORK)
    bridge = interfaces["op-lan"]
    assert bridge["addresses"] == []
    assert [interfaces[port]["mac"] for port in bridge["ports"]] == [OPERATIONAL_MAC]
    assert all(interfaces[port]["addresses"] == [] for port in bridge["ports"])
