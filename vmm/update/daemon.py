"""The process ``python3 -m vmm.update``: puts the parts together, serves systemd's socket, ends when idle."""

from __future__ import annotations

import asyncio
import pwd
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from vmm import wire
from vmm.audit.client import AuditClient
from vmm.audit.throttle import Throttle
from vmm.errors import Unavailable
from vmm.notify import notify, passed_descriptors
from vmm.paths import APPLIED_CONFIG, UPDATE_STATE
from vmm.process import run as run_program
from vmm.update import bundle, host
from vmm.update.environment import Environment, How
from vmm.update.floor import open_floor
from vmm.update.records import Recorder
from vmm.update.service import IDLE_S, Service
from vmm.update.state import Store
from vmm.update.system import HostSystem
from vmm.update.work import Work

CORE_USER = "holdfast-core"
_LAST_CALL_S = 10.0


def environment(folder: Path) -> Environment:
    """This host. Raises: Unavailable when it is no image of ours; OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    running = host.running()
    store = Store(folder)
    if store.damaged:
        print(f"update: {store.damaged}", file=sys.stderr, flush=True)
    system = HostSystem(running.version)
    system.mount_esp()
    made = Environment(
        folder=folder,
        running=running,
        system=system,
        floor=open_floor(folder),
        store=store,
        recorder=Recorder(AuditClient().append_sync, store, time.time),
        configuration=lambda: host.configuration(APPLIED_CONFIG),
        root_metadata=host.root_metadata,
        now=time.time,
        leave=_leave,
    )
    bundle.recover(made.bundle)
    return made


def _leave(how: How) -> None:
    run_program(["systemctl", "--no-block", how], timeout=60)


def listening() -> socket.socket:
    """The socket that systemd hands over (sd_listen_fds(3)). Raises: Unavailable when there is none."""
    match passed_descriptors():
        case [descriptor]:
            return socket.socket(fileno=descriptor)
    raise Unavailable("the updater is started by its socket, holdfast-update.socket")


async def serve(server_socket: socket.socket, service: Service, idle: float = IDLE_S) -> None:
    """Serve until SIGTERM, or until nothing was asked for ``idle`` seconds."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server_socket.setblocking(False)
    server = await wire.serve_on(server_socket, service.handle)
    notify()
    watching = asyncio.create_task(_idle(service, idle))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
    server.close()
    for task in (watching, stopping):
        task.cancel()
    service.stop()
    await service.quiet.wait()
    # A call that came at the last moment is answered.
    with suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), _LAST_CALL_S)


async def _idle(service: Service, seconds: float) -> None:
    while True:
        await service.quiet.wait()
        calls = service.served
        await asyncio.sleep(seconds)
        if service.quiet.is_set() and service.served == calls:
            return


def run() -> None:
    """The program. Raises: UserError when this is no host of ours."""
    try:
        core = frozenset({pwd.getpwnam(CORE_USER).pw_uid})
    except KeyError:
        core = frozenset()
    here = environment(UPDATE_STATE)

    async def main() -> None:
        strangers = Throttle(AuditClient().append, "update")
        await serve(listening(), Service(here, Work(here), core, strangers))
        await strangers.close()

    asyncio.run(main())
