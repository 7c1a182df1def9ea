"""The TPM policy of a seal, by which a volume's header tells to what it is sealed.

systemd-cryptenroll(1) makes it of a policy key, whose signature of PCR 11 it wants, and a value of PCR 7 (TPM 2.0
Library, part 3: TPM2_PolicyAuthorize, TPM2_PolicyPCR; part 1, "Names").
"""

from __future__ import annotations

import hashlib
import struct

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from vmm.update.errors import Refused

_REGISTER = 7
_SHA256, _RSA, _NONE = 0x000B, 0x0001, 0x0010
_POLICY_AUTHORIZE, _POLICY_PCR = 0x0000016A, 0x0000017F
_DECRYPT_SIGN_WITH_AUTH = 0x00060040
"""The attributes that systemd gives the key; the firmware of a TPM does not care, its name does."""


def of_seal(key: bytes, pcr7: bytes) -> str:
    """The policy's digest, in hex. Arguments: ``key`` is the policy key's PEM; ``pcr7`` what PCR 7 must hold.

    Raises: Refused when the key is not an RSA key.
    """
    authorized = _sha256(_sha256(bytes(32), struct.pack(">I", _POLICY_AUTHORIZE), _name(key)))
    selection = struct.pack(">IHB", 1, _SHA256, 3) + (1 << _REGISTER).to_bytes(3, "little")
    return _sha256(authorized, struct.pack(">I", _POLICY_PCR), selection, _sha256(pcr7)).hex()


def _name(pem: bytes) -> bytes:
    """What a TPM calls the key: the hash of its public area."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Refused("seals", f"the policy key cannot be read: {error}") from None
    if not isinstance(key, RSAPublicKey):
        raise Refused("seals", "the policy key is no RSA key")
    numbers = key.public_numbers()
    modulus = numbers.n.to_bytes(key.key_size // 8)
    area = struct.pack(
        ">HHIHHHHIH",
        *(_RSA, _SHA256, _DECRYPT_SIGN_WITH_AUTH, 0, _NONE, _NONE, key.key_size, numbers.e, len(modulus)),
    )
    return struct.pack(">H", _SHA256) + _sha256(area, modulus)


def _sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()
