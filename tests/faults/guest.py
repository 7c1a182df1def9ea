"""A guest that writes while the power is cut: what it was told to be on its disk must be there afterwards."""

from __future__ import annotations

from tests.guest.linux import GUEST_PROMPT, GUEST_READY
from tests.harness.api import Api
from tests.harness.host import Host
from tests.harness.seed import Identity
from tests.harness.stream import Closed, Console
from tests.harness.waiting import Expired
from tests.harness.workstation import GUEST

ALREADY = 20
"""So many numbers are on its disk before any cut."""
_NAME, _SYSTEM, _NUMBERS = "writer", "writer-system", "writer-numbers"
_SIZE = 8 << 20
_SAID = r"HOLDFAST-GUEST WROTE (\d+)\r?\n"
# See tests/guest/number.sh.
_COUNT = """
result = 0
with open(argument, "rb") as file:
    while file.read(4096).rstrip(b"\\0") == b"%d\\n" % (result + 1):
        result += 1
"""


def make(api: Api) -> None:
    """Make the machine, have it write its first numbers, and stop it. Raises: ApiError; Expired; Closed."""
    api.call("PUT", f"/v1/volumes/{_SYSTEM}/content?format=raw", GUEST.read_bytes(), seconds=60)
    api.call("POST", "/v1/volumes", {"name": _NUMBERS, "size": _SIZE})
    spec = {
        "name": _NAME,
        "cpus": 1,
        "memory": 256 << 20,
        "disks": [{"volume": _SYSTEM}, {"volume": _NUMBERS}],
        # Hosts are told to restart while it boots, too, when it does not hear its power button yet.
        "stop_timeout": 10,
    }
    api.call("POST", "/v1/machines", spec)
    console = _boot(api)
    console.run(f"number /dev/vdb {ALREADY}", GUEST_PROMPT, 60)
    console.close()
    api.call("POST", f"/v1/machines/{_NAME}/stop", seconds=90)


class Writer:
    """The guest, started and writing; what it says is read all the time. Raises: as make()."""

    def __init__(self, api: Api) -> None:
        self._console = _boot(api)
        self._console.send("number /dev/vdb\n")
        self._last = int(self._console.expect(_SAID)[1])

    def last(self) -> int:
        """The last number that left the host as written. For when the power is off."""
        try:
            while True:
                self._last = int(self._console.expect(_SAID, 2)[1])
        except (Closed, Expired):
            self._console.close()
        return self._last


def _boot(api: Api) -> Console:
    api.call("POST", f"/v1/machines/{_NAME}/start", seconds=60)
    console = api.console(_NAME)
    console.expect(GUEST_READY, 60)
    console.expect(GUEST_PROMPT)
    return console


def found(host: Host, admin: Identity) -> int:
    """How many numbers, from the first on, are on the guest's disk. Raises: ApiError; AgentError; Expired."""
    volume = host.api(admin).call("GET", f"/v1/volumes/{_NUMBERS}")
    count: int = host.agent.python(_COUNT, f"/var/lib/holdfast/core/volumes/{volume['uuid']}.raw")
    return count
