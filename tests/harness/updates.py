"""What an operator does with updates of a host under test."""

from __future__ import annotations

import re
from typing import Any

from tests.harness import esp
from tests.harness.api import Api, ApiError
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.waiting import poll

UNIT = "holdfast-host"
"""What audit records call the producers that run as root, the updater among them."""


class Updates:
    """The update commands of one host, as one administrator."""

    def __init__(self, host: Host, admin: Identity) -> None:
        self.host = host
        self.admin = admin

    @property
    def api(self) -> Api:
        """The API of the host, whichever start of it this is."""
        return self.host.api(self.admin)

    def status(self) -> Any:
        """What the updater says of itself and the slots."""
        return self.api.call("GET", "/v1/update", seconds=60)

    def settled(self) -> Any:
        """The status once this start has been judged. Raises: as Host.wait_started, e.g. when it went back."""
        self.host.wait_started()
        return self.status()

    def begin(self, job: str, **arguments: Any) -> None:
        """Start a job. Raises: ApiError when it is refused at once."""
        body = arguments if job in ("check", "download") else None
        self.api.call("POST", f"/v1/update/{job}", body, seconds=120)

    def do(self, job: str, **arguments: Any) -> Any:
        """Start a job and wait for its end; the status then. Raises: ApiError when the job is refused or fails."""
        self.begin(job, **arguments)
        status = self.ended(job)
        if status["error"]:
            raise ApiError(f"{job}: {status['error']}")
        return status

    def ended(self, job: str) -> Any:
        """The status once the job that was begun has ended, one way or the other. Raises: Expired."""
        return poll(self._rest, 240 * self.host.acceleration.scale, f"{job} ends")

    def _rest(self) -> Any:
        status = self.status()
        return status if status["phase"] in ("idle", "staged", "installed") else None

    def restart(self) -> None:
        """Have the host restart, and wait until it does."""
        self.api.call("POST", "/v1/host/reboot", seconds=120)
        self.host.wait_reset()

    def reboot(self) -> None:
        """Restart the host and wait until its API answers again."""
        self.restart()
        self.host.wait_ready(self.admin, 120)

    def take(self) -> None:
        """Install what is offered, and restart."""
        self.do("check")
        self.do("download")
        self.do("apply")
        self.reboot()

    def refused(self, job: str, says: str, **arguments: Any) -> None:
        """Start a job that must not succeed, with an error that has ``says`` (a regular expression) in it."""
        try:
            self.do(job, **arguments)
        except ApiError as error:
            assert re.search(says, str(error)), f"{job} was to be refused with {says!r}: {error}"
        else:
            raise AssertionError(f"{job} was to be refused with {says!r}, and was not")

    def refusals(self) -> list[tuple[str, str, str]]:
        """What the updater itself put on record of its jobs that failed, oldest first: type, layer, reason."""
        found = [r for r in self.outcomes("update.") if r["outcome"] == "failure"]
        return [(r["type"], r["extra"].get("layer", ""), r["reason"]) for r in found]

    def outcomes(self, kind: str) -> list[Any]:
        """What the updater itself put on record of how its jobs ended, oldest first; ``kind`` as for records()."""
        return [r for r in self.records(kind) if r["producer"]["unit"] == UNIT and r["phase"] == "outcome"]

    def written(self) -> Any:
        """All that an update changes on the disk: both slots, and the boot entries with their sizes."""
        return self.status()["slots"], esp.entries(self.host.agent)

    def records(self, kind: str) -> list[Any]:
        """The audit trail's records of one type, or of all types that begin so if it ends in a dot."""
        found: list[Any] = []
        after: int | None = 0
        while after is not None:
            page = self.api.call("GET", f"/v1/audit?after={after}&limit=1000", seconds=60)
            found += [record for record in page["records"] if _is(record["type"], kind)]
            after = page["next"]
        return found


def _is(type: str, kind: str) -> bool:
    return type.startswith(kind) if kind.endswith(".") else type == kind


def slot(status: Any, name: str) -> Any:
    """One of the two slots."""
    return next(slot for slot in status["slots"] if slot["name"] == name)
