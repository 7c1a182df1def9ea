"""The web server that offers releases to hosts under test: static files over TLS, ranges, and faults on demand."""

from __future__ import annotations

import datetime
import http.server
import ipaddress
import re
import socket
import socketserver
import ssl
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

ADDRESS, PORT = "10.0.2.100", 443
URL = f"https://{ADDRESS}/"
_CHUNK = 1 << 18
_LOOK_S = 0.05
"""How often it looks whether it shall end."""


def server_certificate(folder: Path) -> tuple[Path, Path]:
    """Key and certificate of the server (PEM), its own authority; made once, as the seed of checkpoints names it."""
    key_file, certificate_file = folder / "repository.key", folder / "repository.crt"
    if certificate_file.exists():
        return key_file, certificate_file
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "repository")])
    now = datetime.datetime.now(datetime.UTC)
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
         "decipher_only"), False
    )  # fmt: skip
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=30))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(ADDRESS))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    pem = serialization.Encoding.PEM
    key_file.touch(mode=0o600)
    key_file.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    certificate_file.write_bytes(certificate.public_bytes(pem))
    return key_file, certificate_file


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RepositoryServer

    def do_GET(self) -> None:  # noqa: N802 - http.server's name
        self.server.asked.append(self.path)
        path = self.server.folder / self.path.lstrip("/")
        if ".." in path.parts or not path.is_file():
            self.send_error(404)
            return
        if self.server.endless and path.name.endswith(self.server.endless):
            self._never_end()
            return
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            while data := file.read(_CHUNK):
                data = self.server.allowed(data)
                self.wfile.write(data)
                self.server.sent += len(data)
                if self.server.break_after == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                if self.server.stall_after == 0:
                    self.server.stalled.set()
                    self.server.closed.wait()
                    return

    def _never_end(self) -> None:
        """Data without an announced length, until the other end has enough of it."""
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        while not self.server.closed.is_set():
            self.wfile.write(bytes(_CHUNK))
            self.server.sent += _CHUNK

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def address_string(self) -> str:
        return "host"


class RepositoryServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves a folder on a Unix socket, to which QEMU leads the host (machine.py); a context manager.

    ``asked`` are the paths that were asked for, ``sent`` the bytes of content; ``break_after`` that many more bytes
    connections break, until it is None again; ``stall_after`` that many more bytes nothing more comes, and ``stalled``
    tells that it has happened. A file whose name ends with ``endless`` never ends.
    """

    daemon_threads = True

    def __init__(self, folder: Path, socket_path: Path, credentials: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.sent = 0
        self.break_after: int | None = None
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.endless = ""
        self.closed = threading.Event()
        key, certificate = server_certificate(credentials)
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(certificate, key)
        socket_path.unlink(missing_ok=True)
        super().__init__(str(socket_path), _Handler)

    def allowed(self, data: bytes) -> bytes:
        """So much of ``data`` as may still be sent; counts it."""
        if self.break_after is not None:
            data = data[: self.break_after]
            self.break_after -= len(data)
        if self.stall_after is not None:
            data = data[: self.stall_after]
            self.stall_after -= len(data)
        return data

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept without a handshake: a silent client must hold up nobody else."""
        plain, _ = super().get_request()
        return self._tls.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), ("host", 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A host that goes away, or is killed, is no error here."""

    def __enter__(self) -> Self:
        threading.Thread(target=self.serve_forever, args=(_LOOK_S,), name="repository", daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()
