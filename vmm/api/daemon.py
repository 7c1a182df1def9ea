"""The API daemon: reads the applied configuration, listens, follows its changes, ends in order."""

from __future__ import annotations

import asyncio
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
from vmm.audit.client import AuditClient
from vmm.audit.throttle import Throttle
from vmm.config.types import Configuration
from vmm.errors import UserError, die
from vmm.notify import notify
from vmm.paths import API_STATE, APPLIED_CONFIG, AUDIT_SOCKET, CONFIG_ERROR, CORE_SOCKET

PORT = 8443
_STOP_TIME = 5.0
_LOOK_S = 0.05

Check = Callable[[ssl.SSLContext], None]


@dataclass(frozen=True)
class Settings:
    """Where the daemon finds its neighbours and keeps its key; ``port`` 0 takes any free one."""

    config: Path = APPLIED_CONFIG
    config_error: Path = CONFIG_ERROR
    state: Path = API_STATE
    core: Path = CORE_SOCKET
    audit: Path = AUDIT_SOCKET
    port: int = PORT


class Daemon:
    """One running API."""

    def __init__(self, settings: Settings, check: Check, api: Api, runner: web.AppRunner, listener: Listener) -> None:
        self.listener = listener
        self._settings = settings
        self._check = check
        self._api = api
        self._runner = runner

    @classmethod
    async def start(cls, settings: Settings, check: Check = tls.check_policy) -> Daemon:
        """Begin to serve.

        Arguments: ``check`` refuses TLS settings that the process must not serve with.
        Raises: UserError when no usable configuration is applied or the port is taken.
        """
        configuration, context = _load(settings, check)
        audit = AuditClient(settings.audit)
        api = Api(settings.core, Throttle(audit.append, "api"), configuration.banner)
        runner = web.AppRunner(api.application, access_log=None, shutdown_timeout=_STOP_TIME)
        await runner.setup()
        failures = Throttle(audit.append, "api")
        listener = Listener(cast(web.Server, runner.server), audit, failures, context)
        try:
            listener.start(settings.port)
        except OSError as error:
            die(f"cannot listen on port {settings.port}: {error.strerror}")
        return cls(settings, check, api, runner, listener)

    def reload(self) -> None:
        """Follow a changed configuration: new connections meet the new certificates, removed ones lose theirs.

        A configuration that cannot be used is reported and changes nothing.
        """
        try:
            configuration, context = _load(self._settings, self._check)
        except UserError as error:
            print(f"api: not reloaded: {error.message}", file=sys.stderr, flush=True)
            return
        self._api.banner = configuration.banner
        self.listener.context = context
        pinned = {administrator.fingerprint for administrator in configuration.administrators}
        for connection in list(self.listener.connections):
            if connection.identity is not None and connection.identity.fingerprint not in pinned:
                connection.force_close()

    async def stop(self) -> None:
        """Accept nothing more, let requests end for a while, close all connections, record what is to be recorded."""
        await self.listener.stop()
        for console in list(self._api.consoles):
            await console.close(code=WSCloseCode.GOING_AWAY, message=b"the service is stopping")
        for follower in list(self._api.followers):
            follower.force_close()
        await self._runner.cleanup()
        await self.listener.drain(_STOP_TIME)
        await self._api.strangers.close()
        await self.listener.failures.close()


def _load(settings: Settings, check: Check) -> tuple[Configuration, ssl.SSLContext]:
    try:
        configuration = msgspec.json.decode(settings.config.read_bytes(), type=Configuration)
    except FileNotFoundError:
        die("no configuration is applied", hint="the host's console says why")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        die(f"{settings.config}: {error}")
    certificates = [administrator.certificate for administrator in configuration.administrators]
    context = tls.server_context(settings.state, configuration.hostname, configuration.management.address, certificates)
    check(context)
    return configuration, context


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
