"""What the tests of the API share: certificates, a fake core, a fake audit daemon and a real listener."""

from __future__ import annotations

import asyncio
import datetime
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from vmm import wire
from vmm.api.daemon import Daemon, Settings
from vmm.audit.client import Entry
from vmm.audit.events import EVENTS
from vmm.errors import Unavailable

Handler = Callable[[wire.Request, wire.Channel], Awaitable[Any]]
PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Identity:
    """A key with its certificate."""

    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(PEM).decode()

    @property
    def fingerprint(self) -> str:
        return self.certificate.fingerprint(hashes.SHA256()).hex()

    def write(self, directory: Path) -> Path:
        """One file for load_cert_chain."""
        path = directory / f"{self.fingerprint}.pem"
        key = self.key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        path.write_bytes(key + self.pem.encode())
        return path


@cache
def identity(
    name: str,
    *,
    days: tuple[int, int] = (-2, 2),
    issuer: Identity | None = None,
    use: ObjectIdentifier | None = ExtendedKeyUsageOID.CLIENT_AUTH,
    bits: int = 0,
) -> Identity:
    """Make one, valid between so many days from now; without a ``use`` it is an authority's."""
    key = rsa.generate_private_key(65537, bits) if bits else ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + days[0] * day)
        .not_valid_after(now + days[1] * day)
        .add_extension(x509.BasicConstraints(ca=use is None, path_length=None), critical=True)
    )
    if use is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
    return Identity(key, builder.sign(issuer.key if issuer else key, hashes.SHA256()))


ALICE = identity("alice")


@dataclass
class Rig:
    """A running API between a client that the tests play and neighbours that record what they hear."""

    directory: Path
    daemon: Daemon
    entries: list[dict[str, Any]] = field(default_factory=list)
    calls: list[wire.Request] = field(default_factory=list)
    core: Handler | None = None
    audit_down: bool = False

    @property
    def port(self) -> int:
        return self.daemon.listener.port

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    def tls(self, who: Identity | None) -> ssl.SSLContext:
        # Verifies the server by its own certificate, for the address and as strictly as Python can.
        context = ssl.create_default_context(cafile=self.directory / "api/server.crt")
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if who is not None:
            context.load_cert_chain(who.write(self.directory))
        return context

    def client(self, who: Identity | None = ALICE) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(self.url, connector=aiohttp.TCPConnector(ssl=self.tls(who)))

    async def raw(self, who: Identity | None = ALICE) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, ssl=self.tls(who))

    def recorded(self, type_: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["type"] == type_]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                await asyncio.sleep(0.005)


def configuration(*administrators: Identity, banner: str = "Authorised use only.") -> bytes:
    certificates = [{"name": f"a{i}", "role": "admin", "certificate": who.pem} for i, who in enumerate(administrators)]
    management = {"interface": "lo", "address": "127.0.0.1/8"}
    document: dict[str, Any] = {"version": 1, "hostname": "hf1", "banner": banner, "management": management}
    return json.dumps(document | {"administrators": certificates}).encode()


@asynccontextmanager
async def rig(directory: Path, *administrators: Identity) -> AsyncIterator[Rig]:
    """Start the API, its neighbours and stop them."""
    (directory / "api").mkdir(exist_ok=True)
    (directory / "config.json").write_bytes(configuration(*(administrators or (ALICE,))))
    running: list[Rig] = []

    async def audit(request: wire.Request, _: wire.Channel) -> dict[str, int]:
        if running[0].audit_down:
            raise Unavailable("the audit store is full")
        EVENTS.check(msgspec.convert(request.params, Entry), "holdfast-api")
        running[0].entries.append(request.params)
        return {"seq": len(running[0].entries)}

    async def core(request: wire.Request, channel: wire.Channel) -> Any:
        running[0].calls.append(request)
        handler = running[0].core
        return await handler(request, channel) if handler else {"method": request.method}

    settings = Settings(
        config=directory / "config.json",
        config_error=directory / "config-error.json",
        state=directory / "api",
        core=directory / "core.sock",
        pins=directory / "pins.json",
        audit=directory / "audit.sock",
        port=0,
    )
    servers = [await wire.serve(settings.audit, audit), await wire.serve(settings.core, core)]
    daemon = await Daemon.start(settings, check=lambda _: None)
    running.append(Rig(directory, daemon))
    try:
        yield running[0]
    finally:
        await daemon.stop()
        for server in servers:
            server.close()
