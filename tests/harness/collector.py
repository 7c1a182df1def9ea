"""A server of the audit trail: Debian's rsyslogd, with an authority and certificates, right ones and wrong ones."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tests.harness.guarded import Guarded

_PEM = serialization.Encoding.PEM
_CONFIGURATION = """\
global(
    workDirectory="{folder}" maxMessageSize="64k" parser.escapeControlCharactersOnReceive="off"
    defaultNetstreamDriverCAFile="{folder}/server.crt"
    defaultNetstreamDriverCertFile="{folder}/server.crt" defaultNetstreamDriverKeyFile="{folder}/server.key"
)
module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="x509/fingerprint"
    permittedPeer=["{peer}"])
template(name="raw" type="string" string="%rawmsg%\\n")
ruleset(name="keep") {{ action(type="omfile" file="{kept}" template="raw" asyncWriting="off" flushOnTXEnd="on") }}
input(type="imtcp" address="127.0.0.1" port="{port}" ruleset="keep")
"""
_MESSAGE = re.compile(
    rb"<(\d+)>1 (\S+) (\S+) (\S+) - (\S+) \[holdfast@32473 ((?:[a-z]+=\"(?:[^\"\\\]]|\\.)*\" ?)+)\] \xef\xbb\xbf(.*)"
)
_PARAMETER = re.compile(rb'([a-z]+)="((?:[^"\\\]]|\\.)*)"')


Strong = Literal["EC", "RSA"]
_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Authority:
    """Who certifies servers."""

    key: _Key
    certificate: x509.Certificate

    @classmethod
    def make(cls, name: str, strong: Strong = "EC") -> Authority:
        """A new one, its certificate signed by itself."""
        key = _key(strong)
        return cls(key, _certificate(name, key, key, name, x509.BasicConstraints(True, 0)))

    @property
    def pem(self) -> str:
        """Its certificate."""
        return self.certificate.public_bytes(_PEM).decode()

    def issue(self, folder: Path, name: str, *, days: tuple[int, int] = (-30, 3650), strong: Strong = "EC") -> None:
        """Put server.key and server.crt into a folder, for a host name or address; valid between these days from now.

        The days before are many, as a restored host's clock is late.
        """
        key = _key(strong)
        issuer = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        made = _certificate(name, key, self.key, str(issuer), x509.BasicConstraints(False, None), days)
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "server.key").write_bytes(key.private_bytes(_PEM, form, none))
        (folder / "server.crt").write_bytes(made.public_bytes(_PEM))


def _key(strong: Strong) -> _Key:
    return ec.generate_private_key(ec.SECP384R1()) if strong == "EC" else rsa.generate_private_key(65537, 3072)


def _certificate(
    name: str,
    key: _Key,
    signer: _Key,
    issuer: str,
    constraints: x509.BasicConstraints,
    days: tuple[int, int] = (-30, 3650),
) -> x509.Certificate:
    now = datetime.datetime.now(datetime.UTC)
    others = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
              "decipher_only")  # fmt: skip
    usage = dict.fromkeys(others, False) | dict.fromkeys(("key_cert_sign", "crl_sign"), constraints.ca)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days=days[0]))
        .not_valid_after(now + datetime.timedelta(days=days[1]))
        .add_extension(constraints, critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if not constraints.ca:
        try:
            named: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(name))
        except ValueError:
            named = x509.DNSName(name)
        builder = builder.add_extension(x509.SubjectAlternativeName([named]), critical=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    return builder.sign(signer, hashes.SHA384())


@dataclass(frozen=True)
class Received:
    """One message as it came: its header, structured data, and the text that it carries, as bytes and as a record."""

    priority: int
    time: str
    hostname: str
    app: str
    type: str
    data: dict[str, str]
    text: bytes

    @property
    def seq(self) -> int:
        """The record's number, as the structured data have it."""
        return int(self.data["seq"])

    @property
    def record(self) -> Any:
        """The record."""
        return json.loads(self.text)


def parsed(line: bytes) -> Received:
    """Read a message strictly. Raises: AssertionError."""
    found = _MESSAGE.fullmatch(line)
    assert found, line
    data = {name.decode(): value.decode() for name, value in _PARAMETER.findall(found[6])}
    time, hostname, app, type_ = (part.decode("ascii") for part in found.groups()[1:5])
    return Received(int(found[1]), time, hostname, app, type_, data, found[7])


class Collector:
    """rsyslogd on 127.0.0.1 with the server.key and server.crt that lie in ``folder``.

    Its port stays the same from one start to the next; each start keeps what it receives in a file of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.peer = ""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = int(free.getsockname()[1])
        self._starts = 0
        self._process: Guarded | None = None

    @property
    def log(self) -> Path:
        """What rsyslogd says."""
        return self.folder / "rsyslogd.log"

    def start(self, peer: str, configuration: str = "") -> None:
        """Begin to receive from whoever has the certificate with this SHA-256 (hexadecimal digits).

        Arguments: ``configuration`` is one of rsyslog's in place of our own, which received() understands.
        Raises: ProcessEnded; Expired.
        """
        self._starts += 1
        pairs = ":".join(peer[i : i + 2] for i in range(0, len(peer), 2)).upper()
        text = _CONFIGURATION.format(folder=self.folder, peer=f"SHA256:{pairs}", kept=self._kept, port=self.port)
        path = self.folder / "rsyslog.conf"
        path.write_text(configuration or text)
        identifier = self.folder / "rsyslogd.pid"
        identifier.unlink(missing_ok=True)
        self._process = Guarded(["rsyslogd", "-n", "-f", path, "-i", identifier], self.log)
        self._process.wait_ready(self._listens)

    def stop(self) -> None:
        """End in order."""
        assert self._process
        self._process.stop()

    def kill(self) -> None:
        """End at once."""
        assert self._process
        self._process.kill()

    def received(self) -> list[Received]:
        """What came since the last start. Raises: AssertionError for what is no message of ours."""
        content = self._kept.read_bytes() if self._kept.exists() else b""
        # The last line may still be written.
        return [parsed(line) for line in content.split(b"\n")[:-1]]

    @property
    def _kept(self) -> Path:
        return self.folder / f"received-{self._starts}"

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process:
            self._process.kill()
