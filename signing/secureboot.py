"""Secure Boot: signed variables for enrolment, and signatures on what firmware starts (UEFI 2.10, chapter 32)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from signing.keys import NEXT_DB, KeySet
from vmm.process import run
from vmm.update.addition import check_signed, parse

_TIME = "2026-01-01 00:00:00"
"""Time stamp of the authenticated variables. Firmware wants it to rise with each change of a variable."""


def write_variables(keys: KeySet, folder: Path, *, db: Sequence[str]) -> None:
    """Write PK.auth, KEK.auth and db.auth, as systemd-boot enrols them from /loader/keys/auto.

    PK signs itself and KEK; KEK signs db. ``db`` names the certificates that may sign boot code: those of
    ``keys.enrolled``, and in the tests' firmware one more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _variable(keys, "PK", ["PK"], "PK", folder)
    _variable(keys, "KEK", ["KEK"], "PK", folder)
    _variable(keys, "db", db, "KEK", folder)


def db_append(keys: KeySet) -> bytes:
    """What adds the certificate of the db key to come to the db of hosts; empty if the key set announces none.

    It goes behind what is there, certificates of others included, so the time stamp need not rise.
    """
    if NEXT_DB not in keys.enrolled:
        return b""
    with tempfile.TemporaryDirectory() as scratch:
        _variable(keys, "db", [NEXT_DB], "KEK", Path(scratch), "-a")
        payload = Path(scratch, "db.auth").read_bytes()
    # What hosts would refuse is not published.
    check_signed(parse(payload), [_der(keys.certificate("KEK"))])
    return payload


def _der(certificate: Path) -> bytes:
    return x509.load_pem_x509_certificate(certificate.read_bytes()).public_bytes(Encoding.DER)


def _variable(
    keys: KeySet, variable: str, certificates: Sequence[str], signer: str, folder: Path, *options: str
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        lists = b""
        for name in certificates:
            part = Path(scratch, name)
            run(["cert-to-efi-sig-list", "-g", keys.owner, keys.certificate(name), part])
            lists += part.read_bytes()
        whole = Path(scratch, "whole")
        whole.write_bytes(lists)
        run(
            [
                *("sign-efi-sig-list", *options, "-t", _TIME, "-g", keys.owner),
                *("-k", keys.key(signer), "-c", keys.certificate(signer)),
                *(variable, whole, folder / f"{variable}.auth"),
            ]
        )


def sign(keys: KeySet, unsigned: Path, signed: Path, *, name: str = "db") -> None:
    """Put an Authenticode signature on a PE file."""
    run(["sbsign", "--key", keys.key(name), "--cert", keys.certificate(name), "--output", signed, unsigned])
