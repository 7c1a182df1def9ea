"""Signatures by a key that stays in a hardware token (PKCS #11). securesystemslib's own signer finds keys by a one-byte
id only and takes its module from the environment; a URI (RFC 7512) says which key of which token."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import PyKCS11
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from vmm.errors import die

PIN_VARIABLE = "HOLDFAST_PIN"

_TOKEN_FIELDS = {"token": "label", "serial": "serialNumber", "manufacturer": "manufacturerID", "model": "model"}


@dataclass(frozen=True)
class TokenKey:
    """Where a key lies: the token's fields, the object's label or id, and the library that speaks to the token."""

    token: dict[str, str]
    label: str
    id: bytes
    module: str

    @classmethod
    def parse(cls, uri: str) -> TokenKey:
        """Read a pkcs11: URI.

        Raises: UserError naming the attribute that is missing, unknown, or would put a PIN into a file.
        """
        scheme, _, rest = uri.strip().partition(":")
        if scheme != "pkcs11":
            die(f"{uri!r} is not a PKCS #11 URI", hint="for example pkcs11:token=release;object=root1")
        path, _, query = rest.partition("?")
        attributes = dict(_attribute(text) for text in path.split(";") if text)
        options = dict(_attribute(text) for text in query.split("&") if text)
        if {"pin-value", "pin-source"} & {*attributes, *options}:
            die("a PKCS #11 URI must not hold a PIN", hint=f"give it in the environment, as {PIN_VARIABLE}")
        unknown = {*attributes} - {*_TOKEN_FIELDS, "object", "id", "type"} | {*options} - {"module-path"}
        if unknown:
            die(f"PKCS #11 URI: unknown attribute {', '.join(sorted(unknown))}")
        module = options.get("module-path", b"").decode() or os.environ.get("PYKCS11LIB", "")
        if not module:
            die("PKCS #11 URI: no module", hint="add ?module-path=LIBRARY, or set PYKCS11LIB")
        key = cls(
            token={_TOKEN_FIELDS[name]: value.decode() for name, value in attributes.items() if name in _TOKEN_FIELDS},
            label=attributes.get("object", b"").decode(),
            id=attributes.get("id", b""),
            module=module,
        )
        if not key.label and not key.id:
            die(
                "PKCS #11 URI: neither object nor id says which key",
                hint="for example pkcs11:token=release;object=root1",
            )
        return key

    def sign(self, data: bytes) -> bytes:
        """Sign with ECDSA over SHA-384; the result is DER.

        Raises: UserError when token or key is not there once exactly, the PIN is absent, or the token refuses.
        """
        try:
            with self._session() as session:
                key = self._private_key(session)
                # CKM_ECDSA over our own hash: not every token hashes by itself.
                raw = bytes(session.sign(key, hashlib.sha384(data).digest(), PyKCS11.Mechanism(PyKCS11.CKM_ECDSA)))
        except PyKCS11.PyKCS11Error as error:
            die(f"the token of {self._name()} refuses: {error}", hint=f"{PIN_VARIABLE} holds the token's user PIN")
        half = len(raw) // 2
        return encode_dss_signature(int.from_bytes(raw[:half]), int.from_bytes(raw[half:]))

    def _name(self) -> str:
        return self.label or self.id.hex()

    @contextmanager
    def _session(self) -> Iterator[Any]:
        pin = os.environ.get(PIN_VARIABLE, "")
        if not pin:
            die(f"no PIN for the token of {self._name()}", hint=f"set {PIN_VARIABLE}")
        library = PyKCS11.PyKCS11Lib()
        library.load(self.module)
        slots = [slot for slot in library.getSlotList(tokenPresent=True) if self._is_token(library.getTokenInfo(slot))]
        if len(slots) != 1:
            die(
                f"{len(slots)} tokens match the URI of {self._name()}, not one",
                hint="token= and serial= tell them apart",
            )
        session = library.openSession(slots[0])
        try:
            session.login(pin)
            yield session
            session.logout()
        finally:
            session.closeSession()

    def _is_token(self, info: Any) -> bool:
        return bool(info.flags & PyKCS11.CKF_TOKEN_INITIALIZED) and all(
            str(getattr(info, field)).strip() == value for field, value in self.token.items()
        )

    def _private_key(self, session: Any) -> Any:
        wanted = [(PyKCS11.CKA_CLASS, PyKCS11.CKO_PRIVATE_KEY), (PyKCS11.CKA_KEY_TYPE, PyKCS11.CKK_ECDSA)]
        if self.label:
            wanted.append((PyKCS11.CKA_LABEL, self.label))
        if self.id:
            wanted.append((PyKCS11.CKA_ID, self.id))
        found = session.findObjects(wanted)
        if len(found) != 1:
            die(f"{len(found)} EC keys on the token match {self._name()}, not one")
        return found[0]


def _attribute(text: str) -> tuple[str, bytes]:
    name, _, value = text.partition("=")
    return name, unquote_to_bytes(value)
