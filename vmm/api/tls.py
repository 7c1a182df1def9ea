"""The TLS settings of the listener."""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vmm.errors import UserError
from vmm.tls import load_pair


@dataclass(frozen=True)
class Pins:
    """Who is let in: the TLS settings that take their certificates, and the SHA-256 of each."""

    context: ssl.SSLContext
    fingerprints: frozenset[str]


def server_context(directory: Path, hostname: str, address: str, certificates: Iterable[str]) -> ssl.SSLContext:
    """The listener's TLS settings: 1.3 only, and a client certificate that is shown must be a pinned one.

    Arguments: ``directory`` keeps server.key and server.crt, which are made when absent or unusable, for ``hostname``
    and ``address`` (an interface address, or "dhcp"); ``certificates`` are the pinned ones (PEM).
    Raises: UserError when a certificate cannot be read; OSError when the files cannot be written.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Resumption would skip the check of the client's certificate after it was removed.
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_OPTIONAL
    # The pinned certificates are anchors themselves, whether self-signed or issued by somebody.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        context.load_verify_locations(cadata="\n".join(certificates))
    except ssl.SSLError as error:
        raise UserError(f"a pinned certificate cannot be used: {error.reason or error}") from None
    load_pair(context, directory, "server", hostname, address)
    return context
