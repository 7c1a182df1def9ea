"""The fetcher, ``python3 -m vmm.update.fetch``: the downloads of one job of the updater, then the process ends.

The only part of taking updates that talks to the network, hence without a disk, a device or a secret. It decides
nothing: what it hands on is checked by TUF in the updater. Its unit starts one for each connection, as standard input.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import aiohttp
import msgspec
from yarl import URL

from vmm.errors import NotFound, Unavailable, UserError
from vmm.update.errors import Refused
from vmm.update.protocol import METHOD, FetchRequest, FetchResult
from vmm.wire import MAX_FRAME, Channel, Kind, Request, answer_all

LAYER = "transport"
_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_RANGE = re.compile(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)")


@dataclass(frozen=True)
class Pace:
    """Slower than ``rate`` bytes a second over ``window`` seconds is no download but an attempt to hold us up."""

    rate: int = 1024
    window: float = 30.0


Send = Callable[[bytes], Awaitable[None]]


class Downloads:
    """Downloads over connections that are kept from one to the next; close() ends them."""

    def __init__(self, pace: Pace = Pace()) -> None:  # noqa: B008 - frozen
        self._pace = pace
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def fetch(self, request: FetchRequest, send: Send) -> FetchResult:
        """Download, handing every piece to ``send``.

        Raises: Refused for what is against the rules (scheme, redirect, length, range, pace);
        Unavailable when the server cannot be reached or goes away.
        """
        url = _checked(request.url)
        if request.proxy and URL(request.proxy).scheme not in ("http", "https"):
            raise Refused(LAYER, "the proxy must be an http or https URL")
        session = self._sessions.get(request.ca) or self._open(request.ca)
        try:
            for _ in range(_MOST_REDIRECTS + 1):
                async with await _ask(session, url, request) as response:
                    if response.status not in _REDIRECTS:
                        return await _deliver(response, request, send, self._pace)
                    url = _followed(url, response.headers.get("Location", ""))
        except aiohttp.ClientSSLError as error:
            raise Refused("TLS", f"{url.host}: {error}") from None
        except (aiohttp.ClientError, OSError) as error:
            raise Unavailable(f"the repository at {url.host} cannot be read: {error}") from None
        raise Refused(LAYER, f"{url.host} redirects more than {_MOST_REDIRECTS} times")

    def _open(self, ca: str) -> aiohttp.ClientSession:
        """What trusts these authorities. Raises: UserError."""
        self._sessions[ca] = session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=_context(ca)),
            timeout=aiohttp.ClientTimeout(total=None),
            # Compressed answers would not have the lengths and hashes that TUF signed.
            auto_decompress=False,
            headers={"Accept-Encoding": "identity", "User-Agent": "holdfast"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        return session

    async def close(self) -> None:
        """End the connections."""
        for session in self._sessions.values():
            await session.close()

    async def handle(self, request: Request, channel: Channel) -> FetchResult:
        """The one method that callers know. Raises: UserError."""
        if request.method != METHOD:
            raise NotFound(f"the fetcher has no method {request.method!r}")
        try:
            wanted = msgspec.convert(request.params, FetchRequest)
        except msgspec.ValidationError as error:
            raise UserError(f"fetch: {error}") from None
        result = await self.fetch(wanted, channel.send_data)
        await channel.send(Kind.END)
        return result


async def _ask(session: aiohttp.ClientSession, url: URL, request: FetchRequest) -> aiohttp.ClientResponse:
    headers = {"Range": f"bytes={request.offset}-"} if request.offset else {}
    try:
        async with asyncio.timeout(request.timeout):
            return await session.get(url, allow_redirects=False, proxy=request.proxy or None, headers=headers)
    except TimeoutError:
        raise Unavailable(f"the repository at {url.host} did not answer within {request.timeout:g} s") from None


def _checked(text: str) -> URL:
    try:
        url = URL(text)
    except ValueError:
        raise Refused(LAYER, "the repository's address is not a URL") from None
    if url.scheme != "https" or not url.host or url.user is not None:
        raise Refused(LAYER, f"only https URLs are fetched, not {text!r}")
    return url


def _followed(url: URL, location: str) -> URL:
    try:
        target = url.join(URL(location))
    except ValueError:
        raise Refused(LAYER, f"{url.host} redirects to no URL") from None
    if not location or target.origin() != url.origin():
        raise Refused(LAYER, f"{url.host} redirects to another host: {location[:200]!r}")
    return _checked(str(target))


def _context(ca: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cadata=ca or None)
    except (ssl.SSLError, ValueError) as error:
        raise UserError(f"update.ca cannot be used: {error}") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def _deliver(response: aiohttp.ClientResponse, request: FetchRequest, send: Send, pace: Pace) -> FetchResult:
    if response.status not in (200, 206):
        return FetchResult(response.status)
    total = response.content_length if response.content_length is not None else -1
    skip = 0
    if response.status == 206:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not request.offset or not found or int(found[1]) != request.offset:
            raise Refused(LAYER, "the server sent another range than was asked for")
        expected, total = total, -1 if found[3] == "*" else int(found[3])
    else:
        # A server that knows no ranges starts from zero; what we have already is read past.
        skip = request.offset
        expected = total - skip
    if expected > request.limit:
        raise Refused("length", f"the server announces {expected} bytes where at most {request.limit} are expected")
    await _stream(response.content, skip, request.limit, send, pace)
    return FetchResult(response.status, total)


async def _stream(content: aiohttp.StreamReader, skip: int, limit: int, send: Send, pace: Pace) -> None:
    loop = asyncio.get_running_loop()
    # Only time spent waiting for the server counts: the updater's disk may be slow.
    waited, received, delivered = 0.0, 0, 0
    while True:
        begun = loop.time()
        chunk: bytes | None = None
        try:
            async with asyncio.timeout(max(pace.window - waited, 0.01)):
                chunk = await content.readany()
        except TimeoutError:
            pass
        if chunk == b"":
            return
        waited += loop.time() - begun
        received += len(chunk or b"")
        if waited >= pace.window:
            if received < pace.rate * pace.window:
                raise Refused(LAYER, f"the server sent {received} bytes in {waited:.0f} s, which is too slow")
            waited, received = 0.0, 0
        if chunk and skip:
            skip, chunk = max(skip - len(chunk), 0), chunk[skip:]
        if chunk:
            delivered += len(chunk)
            if delivered > limit:
                raise Refused("length", f"the server sends more than the {limit} bytes expected")
            await send(chunk)


async def serve(connection: socket.socket) -> None:
    """Serve the calls on a connected socket, one after another, until the other end closes it."""
    reader, writer = await asyncio.open_unix_connection(sock=connection, limit=MAX_FRAME)
    downloads = Downloads()
    try:
        await answer_all(Channel(reader, writer), downloads.handle)
    finally:
        await downloads.close()


def main() -> int:
    """Serve the requests on standard input. Returns: the exit code."""
    asyncio.run(serve(socket.socket(fileno=os.dup(0))))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
