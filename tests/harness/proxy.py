"""An HTTP proxy between a host under test and the server of updates: tunnels (CONNECT), and refuses them on demand."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_MOST = 1 << 16
_LOOK_S = 0.05
"""How often it looks whether it shall end."""


class _Handler(socketserver.StreamRequestHandler):
    server: Proxy
    rbufsize = 0  # what follows the request belongs to the tunnel

    def handle(self) -> None:
        request = self.rfile.readline(_MOST).decode("ascii", "replace").strip()
        while self.rfile.readline(_MOST).strip():
            pass
        self.server.asked.append(request)
        if not self.server.open:
            self.wfile.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.connect(str(self.server.target))
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            ends = {self.connection: server, server: self.connection}
            while True:
                for readable in select.select(list(ends), [], [])[0]:
                    if not (data := readable.recv(_MOST)):
                        return
                    ends[readable].sendall(data)


class Proxy(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Leads every tunnel to the Unix socket ``target``, whatever it was asked for; a context manager.

    ``asked`` are the first lines of its requests; ``open`` is whether it lets anybody through.
    """

    daemon_threads = True

    def __init__(self, target: Path) -> None:
        self.target = target
        self.asked: list[str] = []
        self.open = True
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def port(self) -> int:
        """Where it listens on this machine."""
        return int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A host that goes away is no error here."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(_LOOK_S,), name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.shutdown()
        self.server_close()
