"""Where cuts begin: one host at four points of an update, each a checkpoint made from the one before it."""

from __future__ import annotations

import hashlib
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults import guest
from tests.harness import releases
from tests.harness.checkpoint import Checkpoint
from tests.harness.host import Host
from tests.harness.image import Files
from tests.harness.publishing import Publisher
from tests.harness.repository import RepositoryServer
from tests.harness.seed import Identity
from tests.harness.updates import Updates
from tests.harness.workstation import GUEST

RUNNING = Path("build/image/release")
_STORE = Path("build/test/checkpoints-staged")
_VOLUME = "kept"
_CONTENT = random.Random(1).randbytes(1 << 20)  # noqa: S311 - no secret


@dataclass(frozen=True)
class Update:
    """A host that is to take a release, the running one's successor."""

    booted: Checkpoint
    admin: Identity
    release: releases.Built

    def at(self, stage: str) -> Checkpoint:
        """The host at a stage ("offered", "staged", "installed", "trial"), from the store or made now."""
        before, advance = _STAGES[stage]
        directory = self._store() / stage
        if not directory.exists():
            origin = self.at(before) if before else self.booted
            unfinished = directory.with_suffix(".unfinished")
            with origin.host(unfinished) as host:
                advance(self, host)
                host.suspend(unfinished / "memory")
            unfinished.rename(directory)
        return replace(self.booted, files=Files(directory, memory=directory / "memory"))

    def _store(self) -> Path:
        manifest = (self.release.folder / "manifest.json").read_text()
        inputs = f"{self.booted.files.directory} {manifest} {hashlib.sha256(GUEST.read_bytes()).hexdigest()}"
        folder = _STORE / hashlib.sha256(inputs.encode()).hexdigest()[:16]
        if not folder.exists():
            shutil.rmtree(_STORE, ignore_errors=True)
            publisher = Publisher(releases.FOLDER / "offered-staged")
            publisher.publish(RUNNING)
            publisher.publish(self.release.folder)
            unfinished = folder.with_suffix(".unfinished")
            shutil.copytree(publisher.folder, unfinished / "repository")
            unfinished.rename(folder)
        return folder

    def serve(self, host: Host) -> RepositoryServer:
        """The server that has the release, for a host that is on."""
        return host.serve(self._store() / "repository")

    def damage(self, host: Host, acknowledged: int) -> str:
        """What is missing of what was on the volumes before a cut; "" if nothing is.

        ``acknowledged`` is the last number that the guest was told to be on its disk.
        """
        volume = host.api(self.admin).call("GET", f"/v1/volumes/{_VOLUME}")
        content = host.agent.read(f"/var/lib/holdfast/core/volumes/{volume['uuid']}.raw")
        if content != _CONTENT:
            return "a volume has changed"
        written = guest.found(host, self.admin)
        return "" if written >= acknowledged else f"the guest wrote {acknowledged} numbers, and {written} are there"


def _offer(update: Update, host: Host) -> None:
    host.agent.set_clock()
    updates = Updates(host, update.admin)
    updates.api.call("PUT", f"/v1/volumes/{_VOLUME}/content?format=raw", _CONTENT, seconds=60)
    guest.make(updates.api)
    with update.serve(host):
        updates.do("check")


def _download(update: Update, host: Host) -> None:
    host.agent.set_clock()
    with update.serve(host):
        Updates(host, update.admin).do("download")


def _apply(update: Update, host: Host) -> None:
    host.agent.set_clock()
    Updates(host, update.admin).do("apply")


def _try(update: Update, host: Host) -> None:
    restart(update, host)
    host.wait_api(120)


def restart(update: Update, host: Host) -> None:
    """Have the host restart, and wait until it does."""
    host.agent.set_clock()
    Updates(host, update.admin).restart()


_STAGES: dict[str, tuple[str, Callable[[Update, Host], None]]] = {
    "offered": ("", _offer),
    "staged": ("offered", _download),
    "installed": ("staged", _apply),
    "trial": ("installed", _try),
}
"""Before which other stage a stage comes, and how a host gets from there to it. On trial, the gate still asks."""
