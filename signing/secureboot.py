"""Secure Boot: signed variables for enrolment, and signatures on what firmware starts (UEFI 2.10, chapter 32)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from signing.keys import KeySet
from vmm.process import run

_TIME = "2026-01-01 00:00:00"
"""Time stamp of the authenticated variables. Firmware wants it to rise with each change of a variable."""


def write_variables(keys: KeySet, folder: Path, *, db: Sequence[str] = ("db",)) -> None:
    """Write PK.auth, KEK.auth and db.auth, as systemd-boot enrols them from /loader/keys/auto.

    PK signs itself and KEK; KEK signs db. ``db`` names the certificates that may sign boot code: a
    release has one, the tests' firmware one more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _variable(keys, "PK", ["PK"], "PK", folder)
    _variable(keys, "KEK", ["KEK"], "PK", folder)
    _variable(keys, "db", db, "KEK", folder)


def _variable(keys: KeySet, variable: str, certificates: Sequence[str], signer: str, folder: Path) -> None:
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
                *("sign-efi-sig-list", "-t", _TIME, "-g", keys.owner),
                *("-k", keys.key(signer), "-c", keys.certificate(signer)),
                *(variable, whole, folder / f"{variable}.auth"),
            ]
        )


def sign(keys: KeySet, unsigned: Path, signed: Path, *, name: str = "db") -> None:
    """Put an Authenticode signature on a PE file."""
    run(["sbsign", "--key", keys.key(name), "--cert", keys.certificate(name), "--output", signed, unsigned])
