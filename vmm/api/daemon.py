"""The API daemon: reads the configuration and core's pins, listens, follows their changes, ends in order."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import ssl
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
from aiohttp import WSCloseCode, web

from vmm.api import tls
from vmm.api.app import Api
from vmm.api.listener import Listener
from vmm.api.tls import Pins
from vmm.audit.client import AuditClient
from vmm.audit.throttle import Throttle
from vmm.config.types import Configuration
from vmm.errors import UserError, die
from vmm.notify import notify
from vmm.paths import API_STATE, APPLIED_CONFIG, AUDIT_SOCKET, CONFIG_ERROR, CORE_SOCKET, PINS
from vmm.tls import check_policy

PORT = 8443
_STOP_TIME = 5.0
_LOOK_S = 0.05
# Core writes them before it answers who changes them, so this is for its own starts.
_LOOK_AT_PINS_S = 0.2

Check = Callable[[ssl.SSLContext], None]
_Stamp = tuple[int, int] | None


@dataclass(frozen=True)
class Settings:
    """Where the daemon finds its neighbours and keeps its key; ``port`` 0 takes any free one."""

    config: Path = APPLIED_CONFIG
    config_error: Path = CONFIG_ERROR
    state: Path = API_STATE
    core: Path = CORE_SOCKET
    pins: Path = PINS
    audit: Path = AUDIT_SOCKET
    port: int = PORT


class Daemon:
    """One running API."""

    def __init__(
        self, settings: Settings, check: Check, api: Api, runner: web.AppRunner, listener: Listener, stamp: _Stamp
    ) -> None:
        self.listener = listener
        self._settings = settings
        self._check = check
        self._api = api
        self._runner = runner
        self._stamp = stamp
        api.on_identities = self._look
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def start(cls, settings: Settings, check: Check = check_policy) -> Daemon:
        """Begin to serve.

        Arguments: ``check`` refuses TLS settings that the process must not serve with.
        Raises: UserError when no usable configuration is applied or the port is taken.
        """
        # Before it is read, so that no change is missed.
        stamp = _stamp(settings.pins)
        configuration, pins = _load(settings, check)
        audit = AuditClient(settings.audit)
        api = Api(settings.core, Throttle(audit.append, "api"), configuration.banner)
        runner = web.AppRunner(api.application, access_log=None, shutdown_timeout=_STOP_TIME)
        await runner.setup()
        listener = Listener(cast(web.Server, runner.server), audit, lambda: Throttle(audit.append, "api"), pins)
        try:
            listener.start(settings.port)
        except OSError as error:
            die(f"cannot listen on port {settings.port}: {error.strerror}")
        return cls(settings, check, api, runner, listener, stamp)

    def reload(self) -> bool:
        """Follow a changed configuration, or changed pins: who is no longer known loses its connections.

        A configuration that cannot be used is reported and changes nothing. Returns: whether there was none such.
        """
        try:
            configuration, pins = _load(self._settings, self._check)
        except (UserError, OSError) as error:
            print(f"api: not reloaded: {error}", file=sys.stderr, flush=True)
            return False
        self._api.banner = configuration.banner
        self.listener.pin(pins)
        return True

    def _look(self) -> None:
        stamp = _stamp(self._settings.pins)
        if stamp != self._stamp and self.reload():
            self._stamp = stamp

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_AT_PINS_S)
            self._look()

    async def stop(self) -> None:
        """Accept nothing more, let requests end for a while, close all connections, record what is to be recorded."""
        self._watching.cancel()
        await self.listener.stop()
        for console in list(self._api.consoles):
            await console.close(code=WSCloseCode.GOING_AWAY, message=b"the service is stopping")
        for follower in list(self._api.followers):
            follower.force_close()
        await self._runner.cleanup()
        await self.listener.drain(_STOP_TIME)
        await self._api.strangers.close()
        await self.listener.failures.close()
        await self.listener.refusals.close()


def _load(settings: Settings, check: Check) -> tuple[Configuration, Pins]:
    try:
        configuration = msgspec.json.decode(settings.config.read_bytes(), type=Configuration)
    except FileNotFoundError:
        die("no configuration is applied", hint="the host's console says why")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        die(f"{settings.config}: {error}")
    own = [administrator.certificate for administrator in configuration.administrators]

    def pins(certificates: list[str]) -> Pins:
        address = configuration.management.address
        context = tls.server_context(settings.state, configuration.hostname, address, certificates)
        return Pins(context, frozenset(map(_fingerprint, certificates)))

    try:
        made = pins(own + _enrolled(settings.pins))
    except (UserError, ValueError, TypeError) as error:
        # What was enrolled must never keep those out that the configuration names.
        print(f"api: without enrolled identities: {error}", file=sys.stderr, flush=True)
        made = pins(own)
    check(made.context)
    return configuration, made


def _enrolled(path: Path) -> list[str]:
    """What core has written of enrolled identities; without it there are none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[str])
    except FileNotFoundError:
        pass  # core has yet to begin
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        print(f"api: without enrolled identities: {path}: {error}", file=sys.stderr, flush=True)
    return []


def _fingerprint(pem: str) -> str:
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem.strip())).hexdigest()


def _stamp(path: Path) -> _Stamp:
    """What changes when the file is replaced."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


async def serve(settings: Settings) -> None:
    """Run until SIGTERM; SIGHUP reloads. Raises: UserError when it cannot start."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    daemon = await Daemon.start(settings)
    loop.add_signal_handler(signal.SIGHUP, daemon.reload)
    notify()
    await stop.wait()
    await daemon.stop()


def await_configuration(settings: Settings, look: Callable[[float], None] = time.sleep) -> bool:
    """Wait until the configure unit is done; whether it has applied a configuration."""
    while not settings.config.exists():
        if settings.config_error.exists():
            # A stored configuration may be applied in spite of an error; the error is then written after it.
            return settings.config.exists()
        look(_LOOK_S)
    return True


def run() -> None:
    """The program ``python3 -m vmm.api``. Without a configuration it ends, for there is nobody to serve."""
    settings = Settings()
    if await_configuration(settings):
        asyncio.run(serve(settings))
    else:
        print("api: no configuration is applied; the host's console says why", flush=True)
        notify()
