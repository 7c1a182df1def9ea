"""From wanting a guest to a running one: the API, libvirt given the same XML, and QEMU given the same devices."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench.figures import Figure, median, ratio
from tests.bench.holdfast import call_inside
from tests.harness.api import ApiError, tls_context
from tests.harness.host import Host
from tests.harness.seed import Identity

_MODEL, _OTHER = "bench-model", "bench-other"
_SIZE = {"cpus": 1, "memory": 256 << 20, "networks": [{"network": "lan"}]}
_SETTLE_SECONDS = 2
_KINDS = ("api", "libvirt", "qemu")


_GROUP = "guest, create to running"
_GOAL = 1.1
_LIBRARY = (
    "libvirt's createXML of the XML that core makes. The image has no virsh: `virsh create` would take longer, by its "
    "own start and connection."
)
_PLAIN = (
    "QEMU with libvirt's command line, as root: no uid of its own, AppArmor profile, cgroup or mount namespace; its "
    "tap is on no bridge."
)


class _Client:
    """Requests over one connection, as a tool would make them."""

    def __init__(self, host: Host, identity: Identity) -> None:
        self._connection = http.client.HTTPSConnection(
            "127.0.0.1", host.port, timeout=120 * host.acceleration.scale, context=tls_context(identity)
        )
        self._connection.connect()

    def call(self, method: str, path: str, body: Any = None, *, content: bytes | None = None) -> Any:
        """A request and its JSON answer. Raises: ApiError when it is refused."""
        data = content if content is not None else json.dumps(body).encode() if body is not None else None
        headers = {"Content-Type": "application/json"} if body is not None else {}
        self._connection.request(method, path, body=data, headers=headers)
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status // 100 != 2:
            raise ApiError(f"{method} {path}: {answer.status}: {text.decode(errors='replace')}")
        return json.loads(text) if text else None

    def close(self) -> None:
        self._connection.close()


def measure(host: Host, admin: Identity, disk: Path, repetitions: int) -> list[Figure]:
    """Start a guest in each way, in turn, after one start of each that does not count.

    ``disk`` is the guest's, raw. Raises: ApiError; AgentError; Expired.
    """
    samples: dict[str, list[float]] = {kind: [] for kind in _KINDS}
    client = _Client(host, admin)
    for name in (_MODEL, _OTHER):
        client.call("PUT", f"/v1/volumes/{name}/content?format=raw", content=disk.read_bytes())
    client.call("POST", "/v1/machines", _spec(_MODEL))
    client.call("POST", f"/v1/machines/{_MODEL}/start")
    xml = call_inside(host, "definition", _MODEL)
    client.call("POST", f"/v1/machines/{_MODEL}/force-off")
    client.close()
    created = call_inside(host, "create", xml)
    arguments = plain_arguments(created["arguments"])
    call_inside(host, "plain", arguments)
    for repetition in range(repetitions):
        for kind in order(repetition):
            time.sleep(_SETTLE_SECONDS)
            if kind == "api":
                taken = _by_api(_Client(host, admin), _OTHER)
            elif kind == "libvirt":
                taken = call_inside(host, "create", xml)["seconds"]
            else:
                taken = call_inside(host, "plain", arguments)
            samples[kind].append(taken)
    return _figures(samples)


def _figures(samples: Mapping[str, Sequence[float]]) -> list[Figure]:
    api = median(_GROUP, "API: create and start", samples["api"])
    libvirt = median(_GROUP, "libvirt, the same XML", samples["libvirt"], note=_LIBRARY)
    qemu = median(_GROUP, "QEMU, the same devices", samples["qemu"], note=_PLAIN)
    shares = [ratio(_GROUP, "API : libvirt", api, libvirt, goal=_GOAL), ratio(_GROUP, "API : QEMU", api, qemu)]
    return [api, libvirt, qemu, *shares]


def _spec(name: str) -> dict[str, Any]:
    """A machine with the volume of the same name: a volume belongs to one machine only."""
    return {"name": name, "disks": [{"volume": name}], **_SIZE}


def order(repetition: int) -> tuple[str, ...]:
    """The ways of starting, each one first in turn, so that what drifts meets all alike."""
    turn = repetition % len(_KINDS)
    return _KINDS[turn:] + _KINDS[:turn]


def _by_api(client: _Client, name: str) -> float:
    """Seconds over a connection that is open already, as `createXML` has one too; the machine is gone afterwards."""
    start = time.monotonic()
    client.call("POST", "/v1/machines", _spec(name))
    view = client.call("POST", f"/v1/machines/{name}/start")
    taken = time.monotonic() - start
    assert view["state"] == "running", view
    client.call("POST", f"/v1/machines/{name}/force-off")
    client.call("DELETE", f"/v1/machines/{name}")
    client.close()
    return taken


def plain_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of libvirt's QEMU for one that is started without libvirt, with the same devices.

    What libvirt hands over as open files QEMU opens itself: the monitor is a socket at "{monitor}", the network
    card has a tap of its own that is on no bridge. libvirt's file of a master key is gone, so is its object.
    """
    result: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "-add-fd":
            next(words)
        elif word == "-object" or word == "-netdev" or word == "-chardev":
            value = _opened_by_qemu(word, next(words))
            result += [word, value] if value else []
        else:
            result.append(word)
    return result


def _opened_by_qemu(option: str, value: str) -> str | None:
    if option == "-chardev":
        return "socket,id=charmonitor,path={monitor},server=on,wait=off" if "id=charmonitor," in value else value
    described = json.loads(value) if value.startswith("{") else {}
    if described.get("qom-type") == "secret":
        return None
    if described.get("type") == "tap":
        kept = {key: item for key, item in described.items() if key not in ("fd", "fds", "vhostfd", "vhostfds")}
        return json.dumps({**kept, "ifname": f"bench-{described['id']}"[:15], "script": "no", "downscript": "no"})
    return value
