"""One TLS connection to a server: who it must be, and how much of what was sent it has."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import socket
import ssl
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from vmm.config.types import AuditServer
from vmm.tls import check_policy, load_pair

CONNECT_S = 15.0
"""For the connection and its handshake together."""
_MOST = 1 << 16
_SIOCOUTQ = 0x5411
_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH = 62, 64  # X509_V_ERR_…, x509_vfy.h
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6))

Kind = Literal["network", "tls", "certificate", "identity"]


class End(NamedTuple):
    """How a connection ended; ``orderly`` is whether the server said so within TLS."""

    reason: str
    orderly: bool = False


class Failure(Exception):
    """No connection came about. ``presented`` is what the server calls itself, where that is what was wrong."""

    def __init__(self, kind: Kind, reason: str, presented: str = "") -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason
        self.presented = presented


def client_context(
    directory: Path, hostname: str, address: str, ca: str, check: Callable[[ssl.SSLContext], None] = check_policy
) -> ssl.SSLContext:
    """TLS settings towards one server: 1.3 only, our certificate, and its own must lead to an authority of ``ca``.

    Arguments: ``directory`` keeps client.key and client.crt, made for ``hostname`` and ``address`` as vmm.tls has it.
    Raises: UserError when OpenSSL has other settings than ours; OSError when the files cannot be written.
    """
    # This kind checks the certificate's chain and whom it names.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    # Names count where certificates have their place for them.
    context.hostname_checks_common_name = False
    context.load_verify_locations(cadata=ca)
    load_pair(context, directory, "client", hostname, address)
    check(context)
    return context


class Channel:
    """A connection whose server has proven who it is. One task may send while another waits for its end.

    ``written`` counts the bytes that went out, TLS and all; ``certificate`` is the SHA-256 of the server's.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, context: ssl.SSLContext, name: str
    ) -> None:
        self.written = 0
        self.certificate = ""
        self._reader = reader
        self._writer = writer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=name)

    @classmethod
    async def open(cls, server: AuditServer, context: ssl.SSLContext, seconds: float = CONNECT_S) -> Channel:
        """Connect to a server. Raises: Failure."""
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_connection(server.address, server.port)
                channel = cls(reader, writer, context, server.identity)
                try:
                    await channel._handshake()
                except BaseException:
                    writer.transport.abort()
                    raise
                return channel
        except TimeoutError:
            raise Failure("network", f"no connection within {seconds:g} s") from None
        except OSError as error:
            raise Failure("network", words(error)) from None

    @property
    def acknowledged(self) -> int:
        """How many of the bytes written the server's TCP has."""
        waiting = self._writer.transport.get_write_buffer_size()
        connection: socket.socket = self._writer.get_extra_info("socket")
        try:
            (unsent,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), _SIOCOUTQ, b"\0\0\0\0"))
        except (OSError, ValueError):
            return 0  # it is gone, and with it what it knew
        return self.written - waiting - int(unsent)

    def write(self, data: bytes) -> None:
        """Have bytes sent; they are kept in memory until the server takes them, so drain() comes before the next.

        Raises: ssl.SSLError when TLS is over.
        """
        self._tls.write(data)
        self._flush()

    async def drain(self) -> None:
        """Return once the server keeps up. Raises: OSError when the connection is gone."""
        await self._writer.drain()

    async def ended(self) -> End:
        """Wait until the connection ends; why. A server has nothing else to say."""
        while True:
            try:
                if data := await self._reader.read(_MOST):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
                while self._tls.read(_MOST):
                    pass
            except ssl.SSLWantReadError:
                # It may have asked for other keys.
                self._flush()
            except ssl.SSLZeroReturnError:
                return End("the server ended the session", orderly=True)
            except ssl.SSLEOFError:
                return End("the server closed the connection")
            except ssl.SSLError as error:
                return End(error.reason or "TLS error")
            except OSError as error:
                return End(words(error))

    async def close(self, seconds: float) -> bool:
        """End the session; whether the server took all that was sent, and then ended it, too.

        Its TCP would answer by a reset if it closed without having read all. Nobody may wait in ended().
        """
        with contextlib.suppress(ssl.SSLError):
            self._tls.unwrap()
        try:
            self._flush()
            self._writer.write_eof()
            async with asyncio.timeout(seconds):
                await self._writer.drain()
                while await self._reader.read(_MOST):
                    pass
            return self.acknowledged >= self.written
        except (OSError, TimeoutError):
            return False
        finally:
            self._writer.transport.abort()

    def abort(self) -> None:
        """Let go of a connection that is of no use any more."""
        self._writer.transport.abort()

    async def _handshake(self) -> None:
        for option, value in _KEEPALIVE:
            self._writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, value)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            while not await self._shook():
                if not (data := await self._reader.read(_MOST)):
                    raise Failure("tls", "the server closed the connection during the handshake")
                self._incoming.write(data)
        except ssl.SSLCertVerificationError as error:
            raise self._refused(error) from None
        except ssl.SSLError as error:
            raise Failure("tls", error.reason or "TLS error") from None
        finally:
            # The alert that says why, if it failed.
            with contextlib.suppress(OSError):
                self._flush()
        self.certificate = hashlib.sha256(self._tls.getpeercert(binary_form=True) or b"").hexdigest()

    async def _shook(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            await self._writer.drain()
            return False
        return True

    def _refused(self, error: ssl.SSLCertVerificationError) -> Failure:
        reason = f"certificate refused: {error.verify_message}"
        if error.verify_code not in (_HOSTNAME_MISMATCH, _ADDRESS_MISMATCH):
            return Failure("certificate", reason)
        chain = self._tls.get_unverified_chain()  # type: ignore[attr-defined] # since Python 3.13
        return Failure("identity", reason, _names(chain[0]) if chain else "")

    def _flush(self) -> None:
        if data := self._outgoing.read():
            self._writer.write(data)
            self.written += len(data)


def _names(certificate: bytes) -> str:
    """Whom a certificate (DER) names, for people: at most 1000 characters of what a stranger wrote."""
    # Dear to import, and needed for strangers only.
    from cryptography import x509  # noqa: PLC0415

    try:
        parsed = x509.load_der_x509_certificate(certificate)
        names = [parsed.subject.rfc4514_string()]
        alternative = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [f"DNS:{name}" for name in alternative.get_values_for_type(x509.DNSName)]
        names += [f"IP:{address}" for address in alternative.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        pass
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        return "a certificate that cannot be read"
    return ", ".join(names)[:1000]


def words(error: OSError) -> str:
    """Why a connection failed; asyncio's own text would name the address once more."""
    return os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
