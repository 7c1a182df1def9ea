"""Fixtures shared by the tests on the booted image."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.guest.linux import GUEST_PROMPT, GUEST_READY
from tests.harness import releases
from tests.harness.api import Api
from tests.harness.checkpoint import Checkpoint
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.publishing import Publisher
from tests.harness.seed import Identity
from tests.harness.stream import Console
from tests.harness.updates import Updates
from tests.harness.waiting import Expired, poll
from tests.harness.workstation import GUEST

RUNNING = Path("build/image/release")
"""The release that hosts under test run."""
MEMORY = 256 << 20


@dataclass
class Guests:
    """Makes real Linux guests on a host through its API."""

    host: Host
    api: Api

    def create(self, name: str, *, networks: list[str] | None = None, **more: Any) -> Any:
        """A stopped machine on a volume of its own, with ``more`` in its specification; the API's view of it."""
        self.api.call("PUT", f"/v1/volumes/{name}-disk/content?format=raw", GUEST.read_bytes(), seconds=60)
        spec = {
            "name": name,
            "cpus": 1,
            "memory": MEMORY,
            "disks": [{"volume": f"{name}-disk"}],
            "networks": [{"network": network} for network in networks or []],
            **more,
        }
        return self.api.call("POST", "/v1/machines", spec)

    def run(self, name: str, *, networks: list[str] | None = None, **more: Any) -> Any:
        """A machine whose guest has booted."""
        self.create(name, networks=networks, **more)
        view = self.api.call("POST", f"/v1/machines/{name}/start", seconds=60)
        console = self.api.console(name)
        console.expect(GUEST_READY, 60)
        console.close()
        return view

    def shell(self, name: str) -> Console:
        """The console of a booted guest, at its prompt."""
        console = self.api.console(name)
        console.send("\necho in-$((40 + 2))-step\n")
        console.expect("in-42-step")
        console.expect(GUEST_PROMPT)
        return console

    def wait(self, name: str, seconds: float = 60) -> None:
        """Wait until a guest that somebody else started answers on its console. Raises: Expired."""
        console = self.api.console(name)

        def answers() -> bool:
            console.send("\n")
            try:
                console.expect(GUEST_PROMPT, 1)
            except Expired:
                return False
            return True

        poll(answers, seconds * self.host.acceleration.scale, f"{name} answers on its console")
        console.close()

    def process(self, uuid: str) -> int:
        """The process id of a machine's QEMU on the host."""
        found = self.host.agent.python(
            """
import pathlib
result = [int(p.parent.name) for p in pathlib.Path("/proc").glob("[0-9]*/cmdline")
          if b"qemu-system" in p.read_bytes() and argument.encode() in p.read_bytes()]
""",
            uuid,
        )
        assert len(found) == 1, found
        return int(found[0])


@pytest.fixture
def admin(host: Host, clients: dict[str, Identity]) -> Api:
    """The API as an administrator."""
    return host.api(clients["admin"])


@pytest.fixture
def guests(host: Host, admin: Api) -> Guests:
    """A maker of guests on the booted host."""
    return Guests(host, admin)


@pytest.fixture
def booted_serial(booted: Checkpoint) -> str:
    """What the host wrote on its serial console until its checkpoint."""
    return (booted.files.directory / "serial.log").read_text(errors="replace")


@pytest.fixture(scope="session")
def next_release(built_image: Image) -> releases.Built:
    """The same host software as the next version."""
    return releases.build("next", "0.1.1")


@pytest.fixture(scope="session")
def offered(next_release: releases.Built) -> Publisher:
    """A repository with the running release and the next one."""
    made = Publisher(releases.FOLDER / "offered")
    made.publish(RUNNING)
    made.publish(next_release.folder)
    return made


@pytest.fixture
def updates(host: Host, clients: dict[str, Identity]) -> Updates:
    """An administrator who updates the host, which is done with judging its own start."""
    made = Updates(host, clients["admin"])
    made.settled()
    return made


@pytest.fixture
def repositories(built_image: Image, workdir: Path) -> Iterator[Path]:
    """A folder for repositories; "origin" in it is one without releases."""
    folder = workdir / "repositories"
    Publisher(folder / "origin")
    yield folder
    shutil.rmtree(folder)
