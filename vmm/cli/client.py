"""One connection to one host: pinned server certificate, client certificate, JSON and problems."""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import ssl
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec

from vmm.cli import settings
from vmm.cli.output import Progress, clean
from vmm.errors import UserError
from vmm.wire import Problem, error_of

T = TypeVar("T")

DEFAULT_PORT = 8443
_CONNECT_TIMEOUT_S = 15
# A stop may wait for a guest for minutes, a conversion too.
_ANSWER_TIMEOUT_S = 1800
# Whoever streams lines sends an empty one every ten seconds.
_SILENCE_TIMEOUT_S = 45
_CHUNK = 1 << 20
_MAX_CONSOLE_MESSAGE = 4 << 20


class Unreachable(UserError):
    """The host does not answer, or somebody else answers in its place."""

    code = "unreachable"


class _HttpProblem(msgspec.Struct, frozen=True):
    """The API's error, as RFC 9457 has it."""

    type: str = ""
    title: str = ""
    status: int = 0
    detail: str = ""
    hint: str = ""


class _Banner(msgspec.Struct, frozen=True):
    banner: str = ""


def normal_url(text: str) -> str:
    """A host's base URL from "host", "host:port" or an https URL.

    Raises: UserError for anything else.
    """
    parts = urlsplit(text if "://" in text else f"https://{text}")
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:
        port = 0
    if (
        parts.scheme != "https"
        or not parts.hostname
        or not port
        or parts.path not in {"", "/"}
        or parts.query
        or parts.username
    ):
        raise UserError(f"not the URL of a host: {text!r}", hint="write it as https://192.0.2.10:8443")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"https://{host}:{port}"


def normal_fingerprint(text: str) -> str:
    """64 lower-case hexadecimal digits from any usual spelling. Raises: UserError."""
    digits = text.lower().removeprefix("sha256:").replace(":", "").replace(" ", "")
    if len(digits) != 64 or any(digit not in "0123456789abcdef" for digit in digits):
        raise UserError(
            f"not a SHA-256 fingerprint: {text!r}", hint="it has 64 hexadecimal digits; the host's console shows it"
        )
    return digits


async def server_fingerprint(url: str) -> str:
    """The SHA-256 of the certificate that the server at ``url`` shows now. Raises: Unreachable."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=_tls(identify=False))
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"{url} cannot be reached: {_reason(error)}") from None
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return hashlib.sha256(certificate).hexdigest()


def _tls(*, identify: bool) -> ssl.SSLContext:
    """TLS 1.3 with our certificate if there is one; the server is known by its fingerprint, not by a CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if identify and settings.certificate_path().exists():
        try:
            context.load_cert_chain(settings.certificate_path(), settings.key_path())
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"the identity in {settings.directory()} cannot be used: {_reason(error)}",
                hint="make a new one with `holdfast identity create --force`",
            ) from None
    return context


class Api:
    """An API session, used as an async context manager."""

    def __init__(self, name: str, remote: settings.Remote) -> None:
        self.name = name
        self._remote = remote
        self._tls = _tls(identify=True)
        self._session: aiohttp.ClientSession

    async def __aenter__(self) -> Api:
        # aiohttp compares the fingerprint after the handshake and before it sends a byte of a request.
        connector = aiohttp.TCPConnector(ssl=aiohttp.Fingerprint(bytes.fromhex(self._remote.fingerprint)))
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_ANSWER_TIMEOUT_S)
        self._session = aiohttp.ClientSession(self._remote.url, connector=connector, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def show_banner(self) -> None:
        """Print the host's banner to standard error and remember the day."""
        banner = msgspec.json.decode(await self.request("GET", "/v1/banner"), type=_Banner).banner
        if banner:
            print(clean(banner), file=sys.stderr)
        remotes = settings.load()
        if self.name in remotes.remotes:
            shown = msgspec.structs.replace(self._remote, banner_day=_today())
            settings.save(settings.with_remote(remotes, self.name, shown))

    @property
    def banner_is_due(self) -> bool:
        """Whether the banner was not yet shown today."""
        return self._remote.banner_day != _today()

    async def request(
        self, verb: str, path: str, *, body: Any = None, query: Mapping[str, str | int] | None = None
    ) -> bytes:
        """Make a request and return the answer's body.

        Raises: UserError as the API answered it; Unreachable.
        """
        data = None if body is None else msgspec.json.encode(body)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        return await self._send(verb, path, data=data, headers=headers, query=query)

    async def get(self, path: str, kind: type[T], *, query: Mapping[str, str | int] | None = None) -> tuple[bytes, T]:
        """GET: the body as it came, and decoded. Raises: as request()."""
        raw = await self.request("GET", path, query=query)
        return raw, decoded(raw, kind)

    async def upload(self, path: str, file: BinaryIO, query: Mapping[str, str | int]) -> bytes:
        """PUT a file's content, showing progress on a terminal. Raises: as request()."""
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise UserError(f"{file.name} is empty")
        progress = Progress(f"uploading {file.name}", size)

        async def chunks() -> AsyncIterator[bytes]:
            done = 0
            while chunk := await asyncio.to_thread(file.read, _CHUNK):
                yield chunk
                done += len(chunk)
                progress.update(done)

        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        try:
            return await self._send("PUT", path, data=chunks(), headers=headers, query=query)
        finally:
            progress.end()

    async def lines(self, path: str, query: Mapping[str, str | int]) -> AsyncIterator[bytes]:
        """GET what the host sends line by line, for as long as it does; empty lines are left out.

        Raises: UserError as the API answered it; Unreachable when the host ends it, or is not heard of any more.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_SILENCE_TIMEOUT_S)
        try:
            async with self._session.get(
                path, params=query, ssl=self._tls, allow_redirects=False, timeout=timeout
            ) as answer:
                if answer.status != 200:
                    raise self._problem(answer.status, await answer.read())
                async for line in answer.content:
                    if line := line.strip():
                        yield line
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from None
        raise Unreachable(f"{self._remote.url} sends no more")

    async def websocket(self, path: str) -> aiohttp.ClientWebSocketResponse:
        """Open a WebSocket. Raises: UserError; Unreachable."""
        try:
            return await self._session.ws_connect(path, ssl=self._tls, max_msg_size=_MAX_CONSOLE_MESSAGE)
        except aiohttp.WSServerHandshakeError:
            # The handshake's error has no body; the same GET without the upgrade says what is wrong.
            raise await self._handshake_error(path) from None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from None

    async def _handshake_error(self, path: str) -> UserError:
        try:
            await self.request("GET", path)
        except UserError as error:
            return error
        return UserError("the host refuses the console")

    async def _send(
        self,
        verb: str,
        path: str,
        *,
        data: bytes | AsyncIterator[bytes] | None,
        headers: Mapping[str, str],
        query: Mapping[str, str | int] | None,
    ) -> bytes:
        try:
            async with self._session.request(
                verb, path, data=data, headers=headers, params=query, ssl=self._tls, allow_redirects=False
            ) as answer:
                content = await answer.read()
                if 200 <= answer.status < 300:
                    return content
                raise self._problem(answer.status, content)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._unreachable(error) from None

    def _problem(self, status: int, content: bytes) -> UserError:
        try:
            problem = msgspec.json.decode(content, type=_HttpProblem)
        except (msgspec.DecodeError, UnicodeDecodeError):
            problem = _HttpProblem()
        hint = problem.hint
        if status == 401 and not settings.certificate_path().exists():
            hint = "make an identity with `holdfast identity create` and have it enrolled"
        code = problem.type.rpartition(":")[2] or "http"
        detail = problem.detail or problem.title or f"the host answered with HTTP status {status}"
        return error_of(Problem(code=code, status=status, detail=clean(detail), hint=clean(hint)))

    def _unreachable(self, error: Exception) -> Unreachable:
        if isinstance(error, aiohttp.ServerFingerprintMismatch):
            return Unreachable(
                f"{self._remote.url} shows another certificate than the one pinned for {self.name}",
                hint="if the host was installed anew, look at its console and run `holdfast remote add` again",
            )
        return Unreachable(f"{self._remote.url} cannot be reached: {_reason(error)}")


def decoded(raw: bytes, kind: type[T]) -> T:
    """An answer's body as a type. Raises: UserError when the host answers in another form."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"the host's answer is not understood: {error}", hint="its version may not fit this command's"
        ) from None


def segment(name: str) -> str:
    """A name as one segment of a path: whatever the user typed, it names no other resource."""
    if name in {"", ".", ".."}:
        raise UserError(f"not a name: {name!r}")
    return quote(name, safe="")


def _today() -> str:
    return datetime.date.today().isoformat()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, aiohttp.ClientConnectorError):
        error = error.os_error
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
