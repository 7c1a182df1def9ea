"""Where a repository's bytes come from: a web server, by way of the fetcher, or a folder. None of them is trusted."""

from __future__ import annotations

import os
import re
import select
import socket
import stat
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import msgspec

from vmm.errors import Unavailable, UserError
from vmm.paths import FETCH_SOCKET
from vmm.update.errors import Missing, Refused
from vmm.update.protocol import METHOD, FetchRequest, FetchResult
from vmm.wire import HEADER, MAX_FRAME, Kind, Problem, Request, error_of

_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*){0,3}")
_MOST_PATH = 256
_CHUNK = 1 << 20
# The fetcher gives up on slow servers after 30 s and on silent ones after its timeout; beyond that it is broken.
_SILENCE_S = 120
_TICK_S = 0.5


def checked_path(path: str) -> str:
    """A path inside a repository: names of harmless characters, no dot in front. Raises: Refused."""
    if len(path) > _MOST_PATH or not _PATH.fullmatch(path):
        raise Refused("repository", f"not a path inside a repository: {path[:_MOST_PATH]!r}")
    return path


class Source(Protocol):
    """A repository's files. ``name`` is what audit records call it."""

    @property
    def name(self) -> str: ...

    def read(self, path: str, *, limit: int, offset: int = 0) -> Iterator[bytes]:
        """The file's bytes from ``offset`` on, in pieces of up to 1 MiB.

        Raises: Missing; Refused when more than ``limit`` bytes come; Unavailable when it cannot be read.
        """
        ...


class DirectorySource:
    """A repository in a folder: an unpacked bundle."""

    def __init__(self, folder: Path, name: str = "bundle") -> None:
        self._folder = folder
        self.name = name

    def read(self, path: str, *, limit: int, offset: int = 0) -> Iterator[bytes]:
        """See Source."""
        descriptor = self._open(checked_path(path))
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            size = os.fstat(descriptor).st_size
            if size - offset > limit:
                raise Refused("length", f"{path} has {size - offset} bytes where at most {limit} are expected")
            try:
                file.seek(offset)
                # The size may change while we read; what comes is counted, not what was announced.
                while limit and (piece := file.read(min(_CHUNK, limit))):
                    limit -= len(piece)
                    yield piece
            except OSError as error:
                raise Unavailable(f"{self.name}: {path} cannot be read: {error.strerror}") from None

    def _open(self, path: str) -> int:
        *folders, name = path.split("/")
        here = -1
        try:
            here = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            for folder in folders:
                below = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here)
                os.close(here)
                here = below
            # Non-blocking: the name may be that of a pipe.
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
        except FileNotFoundError:
            raise Missing(f"{self.name} has no file {path}") from None
        except OSError as error:
            raise Refused("repository", f"{self.name}: {path} is no plain file: {error.strerror}") from None
        finally:
            if here >= 0:
                os.close(here)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise Refused("repository", f"{self.name}: {path} is no plain file")
        return descriptor


class HttpSource:
    """A repository on a web server, read by the fetcher, one process of which serves it until close()."""

    def __init__(
        self,
        repository: str,
        *,
        ca: str = "",
        proxy: str = "",
        fetcher: Path = FETCH_SOCKET,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Arguments: ``check`` is called while waiting, and raises what ends the wait."""
        self.name = repository.rstrip("/")
        self._ca = ca
        self._proxy = proxy
        self._fetcher = fetcher
        self._check = check
        self._idle: socket.socket | None = None

    def close(self) -> None:
        """Let the fetcher go."""
        if self._idle:
            self._idle.close()
        self._idle = None

    def read(self, path: str, *, limit: int, offset: int = 0) -> Iterator[bytes]:
        """See Source."""
        request = FetchRequest(f"{self.name}/{checked_path(path)}", offset, limit, self._proxy, self._ca)
        with ExitStack() as broken_off:
            connection = broken_off.enter_context(self._connection())
            self._ask(connection, request)
            result = yield from self._answer(connection, path, limit)
            broken_off.pop_all()
        self.close()
        self._idle = connection
        if result.status in (403, 404, 410):
            raise Missing(f"{self.name} has no file {path} (status {result.status})")
        if result.status not in (200, 206):
            raise Unavailable(f"{self.name} answered {path} with status {result.status}")

    def _connection(self) -> socket.socket:
        idle, self._idle = self._idle, None
        if idle and not select.select([idle], [], [], 0)[0]:
            return idle
        if idle:
            # There is nothing to read but that its fetcher has ended.
            idle.close()
        return self._connect()

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_TICK_S)
            connection.connect(str(self._fetcher))
        except OSError as error:
            connection.close()
            raise _silent(error) from None
        return connection

    def _ask(self, connection: socket.socket, request: FetchRequest) -> None:
        payload = msgspec.json.encode(Request(METHOD, msgspec.to_builtins(request)))
        try:
            connection.sendall(HEADER.pack(Kind.REQUEST.value, len(payload)) + payload)
        except OSError as error:
            raise _silent(error) from None

    def _answer(self, connection: socket.socket, path: str, limit: int) -> Generator[bytes, None, FetchResult]:
        received = 0
        while True:
            kind, payload = self._frame(connection)
            if kind is Kind.DATA:
                received += len(payload)
                if received > limit:
                    raise Refused("length", f"{path} has more than the {limit} bytes expected")
                yield payload
            elif kind in (Kind.RESULT, Kind.PROBLEM):
                try:
                    if kind is Kind.RESULT:
                        return msgspec.json.decode(payload, type=FetchResult)
                    raise _error(msgspec.json.decode(payload, type=Problem))
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    raise Unavailable("the fetcher's answer cannot be read") from None

    def _frame(self, connection: socket.socket) -> tuple[Kind, bytes]:
        raw_kind, length = HEADER.unpack(self._exactly(connection, HEADER.size))
        try:
            kind = Kind(raw_kind)
        except ValueError:
            raise Unavailable("the fetcher's answer cannot be read") from None
        if length > MAX_FRAME:
            raise Unavailable("the fetcher's answer cannot be read")
        return kind, self._exactly(connection, length)

    def _exactly(self, connection: socket.socket, count: int) -> bytes:
        content = bytearray()
        silent = 0.0
        while len(content) < count:
            try:
                piece = connection.recv(count - len(content))
            except TimeoutError:
                self._check()
                silent += _TICK_S
                if silent >= _SILENCE_S:
                    raise Unavailable(f"the fetcher has said nothing for {_SILENCE_S} s") from None
                continue
            except OSError as error:
                raise Unavailable(f"the fetcher went away: {error.strerror}") from None
            if not piece:
                raise Unavailable("the fetcher went away")
            content += piece
            silent = 0.0
        return bytes(content)


def _silent(error: OSError) -> Unavailable:
    return Unavailable(f"the fetcher does not answer: {error.strerror or error}")


def _error(problem: Problem) -> UserError:
    layer, _, message = problem.detail.partition(": ")
    return Refused(layer, message) if problem.code == Refused.code else error_of(problem)


def read_all(source: Source, path: str, *, limit: int) -> bytes:
    """A small file as a whole. Raises: what Source.read does."""
    return b"".join(source.read(path, limit=limit))
