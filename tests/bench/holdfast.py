"""Starts the host image as a server does, with its timeline, and measures its services."""

from __future__ import annotations

import http.client
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import inside
from tests.bench.timeline import MARKERS, Boot, Watch, processor_time, startup
from tests.harness.agent import agent_credentials
from tests.harness.api import Api, tls_context
from tests.harness.checkpoint import fresh
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.machine import Hardware
from tests.harness.seed import Identity, configuration, credential, seed_credential
from tests.harness.waiting import Deadline, poll

SERVICES = ("holdfast-*.service", "libvirtd.service", "virtlogd.service")
_INSIDE = Path(inside.__file__)
# The agent is no part of the product: it starts when nothing is timed any more.
_LATE_AGENT = credential(
    "systemd.unit-dropin.test-agent.service", b"[Unit]\nAfter=holdfast-api.service holdfast-core.service\n"
)
_IDLE_SECONDS = 10
_ASK_SECONDS, _CONNECT_SECONDS, _LOOK_SECONDS = 0.1, 1.0, 0.02


@dataclass(frozen=True)
class Started:
    """One start: its timeline, and the seconds until the API answered an administrator's question to libvirt."""

    boot: Boot
    managed: float


def call_inside(host: Host, function: str, argument: Any, *, seconds: float = 60) -> Any:
    """Call a function of inside.py on the host. Raises: AgentError; Expired."""
    source = f"{_INSIDE.read_text()}\nresult = {function}(argument)\n"
    return host.agent.python(source, argument, seconds=seconds)


class Server:
    """A new machine in ``folder`` with the host image on its disk, to be started again and again.

    Raises: UserError when the image was not built.
    """

    def __init__(self, image: Image, clients: Mapping[str, Identity], folder: Path) -> None:
        base = folder / "base.raw"
        image.write_test_disk(base)
        self.admin = clients["admin"]
        self.files = fresh(folder, base, Hardware().disk)
        self._smbios = [*agent_credentials(), _LATE_AGENT, seed_credential(configuration(list(clients.values())))]

    @contextmanager
    def started(self) -> Iterator[tuple[Host, Started]]:
        """The host is up inside, and shuts down at the end. Raises: Expired; AgentError."""
        with Host(self.files, smbios=self._smbios) as host:
            yield host, self._follow(host)
            host.agent.exec(["systemctl", "poweroff", "--no-block"])
            host.wait_off()

    def _follow(self, host: Host) -> Started:
        start = time.monotonic()
        with Watch(host.files.directory / "serial.log", MARKERS) as watch:
            deadline = Deadline(120 * host.acceleration.scale, "the API answers")
            while not _answers(host):
                time.sleep(min(_ASK_SECONDS, deadline.left()))
            ready = time.monotonic() - start
            processor = processor_time(host)
            api = host.api(self.admin)
            managed = poll(lambda: _machines(api), deadline.left(), "the API answers an administrator") - start
        host.agent.wait()
        host.wait_started()
        phases = startup(host.agent.exec(["systemd-analyze", "time"]).out)
        return Started(Boot(watch.since(start), ready, processor, phases), managed)


def _answers(host: Host) -> bool:
    """Whether the API answers its banner, asked so that neither question nor waiting holds up the host.

    QEMU's user network takes a connection long before the host does, and tries for seconds to reach a host that
    is not up. Such a connection is given up; one that the host took is waited for.
    """
    context = tls_context(None)
    try:
        with socket.create_connection(("127.0.0.1", host.port), timeout=120 * host.acceleration.scale) as plain:
            started = time.monotonic()
            while "TCP[ESTABLISHED]" not in host.qmp.human("info usernet"):
                refused = select.select([plain], [], [], _LOOK_SECONDS)[0]
                if refused or time.monotonic() - started > _CONNECT_SECONDS:
                    return False
            connection = http.client.HTTPSConnection("127.0.0.1", context=context)
            connection.sock = context.wrap_socket(plain)
            connection.request("GET", "/v1/banner")
            return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def _machines(api: Api) -> float | None:
    try:
        return time.monotonic() if api.request("GET", "/v1/machines").status == 200 else None
    except (OSError, http.client.HTTPException):
        return None


def service_memory(host: Host) -> dict[str, int]:
    """Bytes (PSS) of each service of ours and libvirt's on an idle host. Raises: AgentError."""
    time.sleep(_IDLE_SECONDS)
    found: dict[str, int] = call_inside(host, "memory", list(SERVICES))
    return found
