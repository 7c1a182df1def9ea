"""A host that has downloaded a release and only has to write it: where every cut begins."""

from __future__ import annotations

from pathlib import Path

from tests.harness import releases
from tests.harness.agent import agent_credentials
from tests.harness.checkpoint import Checkpoint, checkpoint, ready_with_agent
from tests.harness.host import Host
from tests.harness.image import Image
from tests.harness.publishing import Publisher
from tests.harness.repository import RepositoryServer
from tests.harness.seed import REPOSITORY, Identity, configuration, seed_credential
from tests.harness.updates import Updates

RUNNING = Path("build/image/release")
_STORE = Path("build/test/checkpoints-staged")


def offer(release: releases.Built) -> Publisher:
    """A repository with the running release and another one."""
    made = Publisher(releases.FOLDER / f"offered-{release.version}")
    made.publish(RUNNING)
    made.publish(release.folder)
    return made


def staged(image: Image, clients: dict[str, Identity], release: releases.Built) -> Checkpoint:
    """The checkpoint of the booted host with the release in its staging folder."""
    publisher = offer(release)

    def ready(host: Host) -> None:
        ready_with_agent(host)
        updates = Updates(host, clients["admin"])
        updates.settled()
        with RepositoryServer(publisher.folder, host.repository_socket, REPOSITORY):
            updates.do("check")
            updates.do("download")

    smbios = [*agent_credentials(), seed_credential(configuration(list(clients.values())))]
    identity = f"{image.identity()} staged {(release.folder / 'manifest.json').read_text()}"
    return checkpoint(_STORE, identity, image.write_test_disk, ready, smbios=smbios)
