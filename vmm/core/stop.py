"""`python3 -m vmm.core.stop`: run by holdfast-guests.service when the host stops, before core and libvirt do.

It has core stop the guests. Should core be dead or fail, it presses their power buttons itself, so that they do not
end as if the plug were pulled. Whatever happens, it comes to an end.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path

from vmm import wire
from vmm.errors import NotFound, Unavailable, UserError, main
from vmm.hypervisor.driver import LibvirtHypervisor
from vmm.hypervisor.types import Hypervisor
from vmm.machines.types import MAX_STOP_TIMEOUT
from vmm.paths import CORE_SOCKET

# Together less than TimeoutStopSec= of holdfast-guests.service.
# What could not be saved in its time has the same time again to shut down.
CORE_DEADLINE_S = 2 * MAX_STOP_TIMEOUT + 60.0
CONNECT_DEADLINE_S = 20.0
GUESTS_DEADLINE_S = 120.0
_LOOK_S = 0.5


async def ask_core(socket: Path, deadline: float) -> bool:
    """Have core stop the guests; whether it did."""
    try:
        async with asyncio.timeout(deadline):
            await wire.call(socket, "host.stop-guests")
    except UserError as error:
        _say(f"core: {error.message}")
        return False
    except (TimeoutError, ConnectionError, wire.ProtocolError):
        _say("core does not answer")
        return False
    return True


async def stop_without_core(hypervisor: Hypervisor, deadline: float) -> None:
    """Press every guest's power button, then switch off those that still run after ``deadline`` seconds.

    Raises: Unavailable when libvirt does not answer.
    """
    pressed = await hypervisor.list()
    for id in pressed:
        with suppress(UserError):
            await hypervisor.shutdown(id)
    end = time.monotonic() + deadline
    while (left := await hypervisor.list()) and time.monotonic() < end:
        await asyncio.sleep(_LOOK_S)
    for id, domain in left.items():
        _say(f"{domain.name} is switched off: it did not shut down within {deadline:g} s")
        with suppress(NotFound):
            await hypervisor.destroy(id)


async def stop() -> None:
    """The program."""
    if await ask_core(CORE_SOCKET, CORE_DEADLINE_S):
        return
    hypervisor = LibvirtHypervisor()
    try:
        await hypervisor.connect(CONNECT_DEADLINE_S)
        await stop_without_core(hypervisor, GUESTS_DEADLINE_S)
    except Unavailable as error:
        _say(f"no guest was stopped: {error.message}")
    finally:
        await hypervisor.close()


def _say(text: str) -> None:
    print(f"guests: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(lambda: asyncio.run(stop()))
