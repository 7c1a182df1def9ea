"""Who may call: the configuration's administrators, and the identities that were enrolled while the host runs.

A certificate is known by its fingerprint. The API needs all of them for its handshake: it has those of the
configuration from there, and the others by a file in memory, which is written anew when core begins and with every
change. So it holds nothing that the database does not say, whenever core, the API or the power ended in between.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Annotated, Literal, NamedTuple
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from vmm import atomic
from vmm.clock import rfc3339
from vmm.config.types import Administrator, Role
from vmm.core import identityrows
from vmm.core.configuration import AppliedConfiguration
from vmm.core.db import Database
from vmm.core.identityrows import Row
from vmm.errors import Conflict, Forbidden, NotFound, Unavailable, UserError
from vmm.paths import PINS
from vmm.volumes.types import Name

SCOPED: Role = "user"
"""The role that is limited to machines of its own."""
MOST = 256
"""Identities, those of the configuration included."""
_RESERVED = ("holdfast", "holdfast-guard")
"""What records call the host itself, and its guard."""
_CONFIGURED = "It stands as long as the configuration does, and cannot be changed or revoked by a call."

# Printable, so that it fits into its audit record whatever it is.
Certificate = Annotated[str, msgspec.Meta(max_length=8192, pattern=r"\A[\n\r\x20-\x7e]*\Z")]
Machines = Annotated[tuple[Name, ...], msgspec.Meta(max_length=128)]


class Enroll(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A new identity: its certificate is one PEM text; ``machines`` are the names of those that a user has."""

    name: Name
    role: Role
    certificate: Certificate
    machines: Machines = ()


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an identity is to be; what is not named stays, but machines go with the role user."""

    name: Name
    role: Role | UnsetType = UNSET
    machines: Machines | UnsetType = UNSET


class OwnMachine(msgspec.Struct, frozen=True):
    """A machine that an identity is limited to."""

    name: str
    uuid: str


class Identity(msgspec.Struct, frozen=True):
    """An identity as callers see it. ``machines`` is None where its role is not limited to machines.

    ``enrolled`` and ``enrolled_by`` are empty for those of the configuration.
    """

    name: str
    role: Role
    source: Literal["configuration", "enrolled"]
    fingerprint: str
    subject: str
    valid_from: str
    valid_until: str
    machines: tuple[OwnMachine, ...] | None
    enrolled: str = ""
    enrolled_by: str = ""


class Known(NamedTuple):
    """Whose certificate it is."""

    name: str
    role: Role


class Identities:
    """All identities. Changes are done one after another."""

    def __init__(
        self,
        configuration: AppliedConfiguration,
        database: Database,
        pins: Path = PINS,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Arguments: ``pins`` is the file for the API; ``clock`` gives seconds since 1970."""
        self._configuration = configuration
        self._database = database
        self._pins = pins
        self._clock = clock
        self._changing = asyncio.Lock()
        # Told of each certificate with which from now on less, or other things, may be done.
        self.on_change: Callable[[str], Awaitable[None]] | None = None

    async def find(self, fingerprint: str) -> Known:
        """Whose certificate has this fingerprint. Raises: Forbidden when it is nobody's; Unavailable."""
        configured = self._configuration.administrators()
        if (person := configured.get(fingerprint)) is not None:
            return Known(person.name, person.role)
        row = await self._database.run(partial(identityrows.find, fingerprint=fingerprint))
        # Should a later configuration have somebody of that name, that is who is meant by it.
        if row is None or row.name in _names(configured):
            raise Forbidden("no identity has this certificate")
        return Known(row.name, row.role)

    async def scope(self, fingerprint: str) -> frozenset[UUID]:
        """The machines that the identity with this certificate has, if its role is limited to some."""
        return await self._database.run(partial(identityrows.scope, fingerprint=fingerprint))

    async def list_all(self) -> list[Identity]:
        """Every identity, by name. Raises: Unavailable."""
        configured = self._configuration.administrators()
        taken = _names(configured)
        enrolled = [row for row in await self._database.run(identityrows.rows) if row.name not in taken]
        return await asyncio.to_thread(_shown, configured, enrolled)

    async def show(self, name: str) -> Identity:
        """One identity. Raises: NotFound; Unavailable."""
        for one in await self.list_all():
            if one.name == name:
                return one
        raise NotFound(f"there is no identity {name!r}")

    async def fingerprint(self, name: str) -> str:
        """That of an identity's certificate. Raises: NotFound; Unavailable."""
        for fingerprint, person in self._configuration.administrators().items():
            if person.name == name:
                return fingerprint
        return (await self._database.run(partial(identityrows.row, name=name))).fingerprint

    async def enroll(self, wanted: Enroll, by: str) -> Identity:
        """Let in whoever has the key of a certificate.

        Raises: UserError, Conflict, naming the field; Unavailable.
        """
        certificate = await asyncio.to_thread(_checked, wanted.certificate, self._clock())
        if wanted.name in _RESERVED:
            raise UserError(f"name: {wanted.name!r} is what the host itself is called")
        if wanted.machines and wanted.role != SCOPED:
            raise UserError(f"machines: the role {wanted.role!r} is not limited to machines")
        fingerprint = fingerprint_of(certificate)
        new = Row(fingerprint, wanted.name, wanted.role, certificate, rfc3339(self._clock()), by)
        async with self._changing:
            configured = self._configuration.administrators()
            await self._database.run(partial(_insert, new=new, machines=wanted.machines, configured=configured))
            await self._publish(f"{wanted.name!r} was enrolled")
        return await self.show(wanted.name)

    async def change(self, wanted: Change, by: str) -> Identity:
        """Give an identity another role, or a user other machines; its calls that last end if they need to.

        Arguments: ``by`` is the fingerprint of the caller's certificate. Raises: NotFound; UserError naming the
        field; Conflict when it is of the configuration, the caller's own, or the last administrator; Unavailable.
        """
        if wanted.role is UNSET and wanted.machines is UNSET:
            raise UserError("nothing is to be changed", hint="Name a role or machines.")

        def work(connection: Connection, row: Row) -> None:
            role = row.role if wanted.role is UNSET else wanted.role
            if wanted.machines is not UNSET and wanted.machines and role != SCOPED:
                raise UserError(f"machines: the role {role!r} is not limited to machines")
            identityrows.set_role(connection, row.fingerprint, role)
            if role != SCOPED or wanted.machines is not UNSET:
                machines = () if wanted.machines is UNSET else wanted.machines
                identityrows.set_machines(connection, row.fingerprint, machines)

        await self._change(wanted.name, by, "changed", work)
        return await self.show(wanted.name)

    async def revoke(self, name: str, by: str) -> None:
        """Let an identity in no longer; what it has open ends. Arguments, Raises: as for change()."""
        await self._change(
            name, by, "revoked", lambda connection, row: identityrows.delete(connection, row.fingerprint)
        )

    async def publish(self) -> None:
        """Write the file for the API; call once, first. Raises: Unavailable."""
        async with self._changing:
            await self._publish("core has begun")

    async def _change(self, name: str, by: str, done: str, work: Callable[[Connection, Row], None]) -> None:
        async with self._changing:
            configured = self._configuration.administrators()

            def transaction(connection: Connection) -> Row:
                if name in _names(configured):
                    raise Conflict(f"the identity {name!r} comes from the configuration", hint=_CONFIGURED)
                row = identityrows.row(connection, name)
                if row.fingerprint == by:
                    # So whoever takes the next to last administrator away is one, with a certificate that works.
                    raise Conflict(f"the identity {name!r} is your own", hint="Have another administrator do it.")
                work(connection, row)
                _check_administrated(connection, configured, self._clock(), name)
                return row

            row = await self._database.run(transaction)
            try:
                await self._publish(f"the identity {name!r} was {done}")
            finally:
                if self.on_change is not None:
                    await self.on_change(row.fingerprint)

    async def _publish(self, done: str) -> None:
        certificates = [row.certificate for row in await self._database.run(identityrows.rows)]
        content = msgspec.json.encode(certificates)
        try:
            await asyncio.to_thread(atomic.write, self._pins, content, mode=0o644)
        except OSError as error:
            raise Unavailable(f"{done}, but the API does not know: {self._pins}: {error.strerror}") from None


def fingerprint_of(pem: str) -> str:
    """SHA-256 of a certificate's DER form, 64 lower-case hexadecimal digits."""
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()


def _insert(
    connection: Connection,
    new: Row,
    machines: Iterable[str],
    configured: Mapping[str, Administrator],
) -> None:
    present = identityrows.rows(connection)
    names = _names(configured)
    if new.name in names:
        raise Conflict(f"name: there is already an identity {new.name!r}, in the configuration")
    if any(row.name == new.name for row in present):
        raise Conflict(f"name: there is already an identity {new.name!r}")
    owners = {print: one.name for print, one in configured.items()} | {row.fingerprint: row.name for row in present}
    if new.fingerprint in owners:
        raise Conflict(f"certificate: the identity {owners[new.fingerprint]!r} has it already")
    if len(owners) >= MOST:
        raise Conflict(f"there are {len(owners)} identities, as many as there may be")
    identityrows.insert(connection, new, tuple(machines))


def _check_administrated(
    connection: Connection, configured: Mapping[str, Administrator], now: float, name: str
) -> None:
    """Raises: Conflict unless somebody is left who can administer the host."""
    left: list[Administrator | Row] = [*configured.values(), *identityrows.rows(connection)]
    if not any(one.role == "admin" and _described(one.certificate).until > now for one in left):
        raise Conflict(
            f"{name!r} is the last administrator with a certificate that is valid", hint="Enroll another one first."
        )


def _checked(pem: str, now: float) -> str:
    """A certificate as it is stored. Raises: UserError saying what is wrong with it."""
    # Dear to import, and seldom needed.
    from vmm.config.certificates import check_certificate  # noqa: PLC0415

    text = pem.strip() + "\n"
    try:
        check_certificate(text)
        # It is OpenSSL that has to take it, in the API.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=text)
        # Whatever stands around it is not kept.
        text = ssl.DER_cert_to_PEM_cert(ssl.PEM_cert_to_DER_cert(text.strip()))
    except UserError as error:
        raise UserError(f"certificate: {error.message}", hint=error.hint) from None
    except (ssl.SSLError, ValueError):
        raise UserError("certificate: not a certificate that can be read") from None
    until = _described(text).until
    if until <= now:
        raise UserError(f"certificate: it expired at {rfc3339(until)}", hint="Make a new one.")
    return text


class _Description(NamedTuple):
    """What a certificate says; times in seconds since 1970."""

    subject: str
    begin: float
    until: float


@functools.lru_cache(2 * MOST)
def _described(pem: str) -> _Description:
    from cryptography import x509  # noqa: PLC0415

    certificate = x509.load_pem_x509_certificate(pem.strip().encode())
    begin, until = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return _Description(certificate.subject.rfc4514_string()[:1024], begin.timestamp(), until.timestamp())


def _names(configured: Mapping[str, Administrator]) -> set[str]:
    return {person.name for person in configured.values()}


def _shown(configured: Mapping[str, Administrator], enrolled: Iterable[Row]) -> list[Identity]:
    found = []
    own: tuple[OwnMachine, ...] | None
    for fingerprint, person in configured.items():
        own = () if person.role == SCOPED else None
        found.append(Identity(person.name, person.role, "configuration", fingerprint, *_said(person), own))
    for row in enrolled:
        own = tuple(OwnMachine(name, id) for id, name in row.machines) if row.role == SCOPED else None
        said = (row.fingerprint, *_said(row), own, row.enrolled, row.enrolled_by)
        found.append(Identity(row.name, row.role, "enrolled", *said))
    return sorted(found, key=lambda one: one.name)


def _said(one: Administrator | Row) -> tuple[str, str, str]:
    subject, begin, until = _described(one.certificate)
    return subject, rfc3339(begin), rfc3339(until)
