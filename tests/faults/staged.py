"""A host that has downloaded a release and only has to write it: where every cut begins."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

from tests.harness import releases
from tests.harness.checkpoint import Checkpoint
from tests.harness.image import Files
from tests.harness.publishing import Publisher
from tests.harness.seed import Identity
from tests.harness.updates import Updates

RUNNING = Path("build/image/release")
_STORE = Path("build/test/checkpoints-staged")


def staged(booted: Checkpoint, admin: Identity, release: releases.Built) -> Checkpoint:
    """The checkpoint of the booted host with the release in its staging folder, made from that of the booted host."""
    manifest = (release.folder / "manifest.json").read_text()
    name = hashlib.sha256(f"{booted.files.directory} {manifest}".encode()).hexdigest()[:16]
    directory = _STORE / name
    files = Files(directory, memory=directory / "memory")
    if not directory.exists():
        shutil.rmtree(_STORE, ignore_errors=True)
        publisher = Publisher(releases.FOLDER / "offered-staged")
        publisher.publish(RUNNING)
        publisher.publish(release.folder)
        unfinished = directory.with_suffix(".unfinished")
        with booted.host(unfinished) as host:
            host.agent.set_clock()
            updates = Updates(host, admin)
            with host.serve(publisher.folder):
                updates.do("check")
                updates.do("download")
            host.suspend(unfinished / "memory")
        unfinished.rename(directory)
    return replace(booted, files=files)
