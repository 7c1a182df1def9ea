"""The attacks that hosts under test are put to, here against the updater's own code, over its fetcher and a proxy."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import pytest

from signing.repository import Repository
from signing.roles import KeyRing
from signing.root import now, provide_root
from tests.harness.attacks import ATTACKS, BOMB, OFFERED, honest
from tests.harness.forging import Forgery
from tests.harness.proxy import Proxy
from tests.harness.repository import URL, RepositoryServer, server_certificate
from tests.harness.waiting import poll
from tests.unit.test_publish_rig import NAMES, make_key
from tests.unit.test_update_fetch import Fetcher
from tests.unit.test_update_machine import check, download, make_world
from tests.unit.test_update_rig import plain
from vmm.config.types import Update
from vmm.errors import Unavailable
from vmm.update import staging, work
from vmm.update.errors import Cancelled, NoRoom, Refused
from vmm.update.job import Job
from vmm.update.source import HttpSource


class Site:
    """A host with its updater, and where its server of updates listens, behind a proxy."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        self.folder = folder
        self.proxy = proxy
        self.keys = folder / "keys"
        self.keys.mkdir()
        for name in NAMES:
            make_key(self.keys, name)
        root = provide_root(self.keys).read_bytes()
        Repository(folder / "origin").init(root, KeyRing(self.keys), now())
        self.world = make_world(folder / "world", version="0.1.0")
        update = Update(URL, ca=server_certificate(folder)[1].read_text(), proxy=f"http://127.0.0.1:{proxy.port}")
        self.world.clock[0] = time.time()
        running = self.world.env.running
        self.world.env = replace(
            self.world.env,
            root_metadata=lambda: root,
            configuration=lambda: update,
            running=msgspec.structs.replace(running, built=0),
        )

    def serving(self, repository: Path) -> RepositoryServer:
        return RepositoryServer(repository, self.proxy.target, self.folder)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    fetcher = Fetcher(tmp_path / "fetch.sock")
    monkeypatch.setattr(work, "HttpSource", partial(HttpSource, fetcher=fetcher.path))
    monkeypatch.setattr(staging, "_PAUSE_S", 0.0)
    with Proxy(tmp_path / "repository.sock") as proxy:
        yield Site(tmp_path, proxy)
    fetcher.close()


def test_every_attack_is_refused_by_its_layer(site: Site) -> None:
    world, (older, good) = site.world, honest(site.folder / "origin", site.folder, site.keys)
    with site.serving(good.folder):
        check(world)
    with site.serving(older), pytest.raises(Refused, match="TUF timestamp: rolled back"):
        check(world)
    for attack in ATTACKS:
        print(attack.name)
        forged = Forgery(good.folder, site.folder / "forged", site.keys)
        attack.change(forged)
        with site.serving(forged.folder) as server:
            server.endless = attack.endless
            with pytest.raises(Refused, match=f"{attack.layer}: .*({attack.says})"):
                check(world) if attack.job == "check" else download(world, attack.arguments.get("version", ""))
        assert world.records[-1].extra["layer"] == attack.layer
        assert world.env.staging.staged() is None
    with site.serving(good.folder):
        check(world)
        download(world)
    assert world.env.staging.staged() is not None


def test_what_an_attack_spoils_is_its_own(site: Site) -> None:
    _, good = honest(site.folder / "origin", site.folder, site.keys)
    before = {path: path.read_bytes() for path in good.folder.rglob("*") if path.is_file()}
    for attack in ATTACKS:
        attack.change(Forgery(good.folder, site.folder / "forged", site.keys))
    assert before == {path: path.read_bytes() for path in good.folder.rglob("*") if path.is_file()}
    assert any(BOMB in str(path) for path in before)


@pytest.mark.parametrize("fault", ["break", "stall"])
def test_faults_on_demand(site: Site, fault: str) -> None:
    """A server that breaks off or says no more after so many bytes; what has come is not asked for again."""
    good = Forgery(site.folder / "origin", site.folder / "present", site.keys)
    good.release(OFFERED, root_size=1 << 20)
    good.publish()
    world = site.world
    done = [0]
    with site.serving(good.folder) as server:
        check(world)
        if fault == "break":
            server.break_after = 800_000
            with pytest.raises(Unavailable, match="cannot be read"):
                download(world)
            server.break_after = None
        else:
            server.stall_after = 800_000
            job = Job(lambda count, total: done.append(count))
            threading.Thread(target=stop, args=(server, job, done), daemon=True).start()
            with pytest.raises(Cancelled):
                download(world, job=job)
            server.stall_after = None
        sent = server.sent
        download(world)
        assert 0 < server.sent - sent < 400_000
    assert world.env.staging.staged() is not None


def stop(server: RepositoryServer, job: Job, done: list[int]) -> None:
    """End a job once the server has stalled and what it had sent has arrived."""
    if server.stalled.wait(30):
        poll(lambda: done[-1] > 790_000, 30, "what was sent has arrived", interval=0.01)
        job.cancel()


def test_a_proxy_that_refuses(site: Site) -> None:
    _, good = honest(site.folder / "origin", site.folder, site.keys)
    with site.serving(good.folder) as server:
        check(site.world)
        assert set(site.proxy.asked) == {"CONNECT 10.0.2.100:443 HTTP/1.1"} and server.asked
        site.proxy.open = False
        with pytest.raises(Unavailable, match="cannot be read: 403"):
            check(site.world)


def test_a_root_that_its_release_does_not_fit(site: Site) -> None:
    """Signed all the same, so it is downloaded, by a delta; only the read-back can tell."""
    base, altered = site.folder / "base", site.folder / "altered"
    base.write_bytes(plain("0.1.0").root)
    altered.write_bytes(plain("0.1.0").root[:-1] + b"x")
    _, good = honest(site.folder / "origin", site.folder, site.keys)
    forged = Forgery(good.folder, site.folder / "forged", site.keys)
    forged.other_root(OFFERED, altered, base, "0.1.0")
    forged.publish()
    with site.serving(forged.folder):
        check(site.world)
        download(site.world)
    release = site.world.env.staging.staged()
    assert release is not None
    assert site.world.env.staging.path(release, "root").read_bytes() == altered.read_bytes()
    assert {part["part"]: part["base"] for part in site.world.records[-1].extra["parts"]}["root"] == "0.1.0"


def test_sizes_that_do_not_fit(site: Site) -> None:
    good = Forgery(site.folder / "origin", site.folder / "present", site.keys)
    good.release(OFFERED, stated={"root": 1 << 31})
    good.publish()
    with site.serving(good.folder) as server:
        check(site.world)
        with pytest.raises(NoRoom, match="the partition root of the other slot: 2147483648 bytes are needed"):
            download(site.world)
        assert not any(path.endswith(".zst") for path in server.asked)
