"""One cut: let a step of an update begin, take the power away after some time, look, and perhaps start again."""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.faults import guest
from tests.faults.inspect import Found, inspect, version
from tests.faults.stages import RUNNING, Update, restart
from tests.harness.agent import AgentError
from tests.harness.api import ApiError
from tests.harness.host import Host
from tests.harness.qmp import Happened, QmpError
from tests.harness.updates import Updates, slot
from tests.harness.waiting import Expired
from vmm.errors import UserError


@dataclass(frozen=True)
class Kind:
    """``begin`` sets a host going that stands at ``stage``.

    ``longest`` is a little more than the step takes, in seconds of a machine with KVM. ``share`` of all cuts is of this
    kind, in percent.
    """

    name: str
    stage: str
    begin: Callable[[Update, Host], None]
    longest: float
    share: int


def _ordered(job: str) -> Callable[[Update, Host], None]:
    """What has the updater begin a job."""

    def begin(update: Update, host: Host) -> None:
        host.agent.set_clock()
        Updates(host, update.admin).begin(job)

    return begin


def _go_on(update: Update, host: Host) -> None:
    """On trial it is on its way already."""


WRITING = Kind("writing", "staged", _ordered("apply"), 1.75, 60)
KINDS = (
    Kind("download", "offered", _ordered("download"), 1.75, 16),
    WRITING,
    Kind("first start", "installed", restart, 7.5, 12),
    Kind("gate and keeping", "trial", _go_on, 6.0, 12),
)


@dataclass(frozen=True)
class Cut:
    """``seconds`` (of a machine with KVM) after the beginning of a step of the kind, the power goes."""

    kind: Kind
    seconds: float

    @classmethod
    def any(cls, kind: Kind, moments: random.Random) -> Cut:
        """At a random moment."""
        return cls(kind, moments.uniform(0, kind.longest))

    def __str__(self) -> str:
        return f"{self.kind.name}, {self.seconds:.2f} s"


def spread(count: int, moments: random.Random, wanted: Sequence[Kind] = KINDS) -> list[Cut]:
    """So many cuts of the wanted kinds by their shares, mixed, so that those who end early have some of each."""
    whole = sum(kind.share for kind in wanted)
    kinds = [kind for kind in wanted for _ in range(round(count * kind.share / whole))]
    kinds += [max(wanted, key=lambda kind: kind.share)] * (count - len(kinds))
    moments.shuffle(kinds)
    return [Cut.any(kind, moments) for kind in kinds[:count]]


@contextmanager
def cut(update: Update, one: Cut, workdir: Path, *, writing: bool = False) -> Iterator[tuple[Host, Found]]:
    """Cut the power. Inside, the host is off, what is on its disk is known, and its console's log is of this cut.

    With ``writing`` a guest writes until then, and complete() looks for what it wrote. It is started here and does not
    run in the checkpoints, where it would slow down all cuts. On a trial the moment would be over before it has booted:
    there only its first numbers are looked for.
    """
    (workdir / "serial.log").unlink(missing_ok=True)
    host = update.at(one.kind.stage).host(workdir, faulty_disk=True)
    try:
        with host:
            writer = _writer(update, host) if writing and one.kind.stage != "trial" else None
            with update.serve(host):
                one.kind.begin(update, host)
                time.sleep(one.seconds * host.acceleration.scale)
                host.power_cut()
            acknowledged = writer.last() if writer else guest.ALREADY
            try:
                found = inspect(host.files.flat_disk, RUNNING, update.release.folder, workdir)
            except UserError as error:
                found = Found("", f"the disk cannot be read: {error.message}")
            yield host, replace(found, acknowledged=acknowledged)
    finally:
        host.files.discard()


def _writer(update: Update, host: Host) -> guest.Writer:
    host.agent.set_clock()
    return guest.Writer(host.api(update.admin))


def complete(update: Update, host: Host, found: Found) -> str:
    """Start a host after a cut, complete what was begun, and see that it is kept; "" or what went wrong."""
    try:
        return _completed(update, host) or update.damage(host, found.acknowledged)
    except (Expired, Happened, ApiError, AgentError, QmpError, OSError, http.client.HTTPException) as error:
        return f"after its start: {error}"


def _completed(update: Update, host: Host) -> str:
    host.power_on()
    updates = Updates(host, update.admin)
    host.wait_ready(update.admin, 120)
    status = updates.settled()
    if status["running"] == version(RUNNING):
        host.agent.set_clock()
        if not status["installed"]:
            if not status["staged"]:
                with update.serve(host):
                    updates.do("check")
                    updates.do("download")
            updates.do("apply")
        updates.reboot()
        status = updates.settled()
    kept = status["running"] == update.release.version and slot(status, "b")["tries"] is None
    return "" if kept else f"it runs {status['running']}: {status}"
