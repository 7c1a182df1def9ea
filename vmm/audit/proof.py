"""Whether a checkpoint's proof holds, with nothing but the checkpoint; and what a software anchor signs.

Apart from the anchors, as verifying needs no TPM, and anchoring in a TPM no cryptography of ours.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from vmm.audit.anchor import COUNTER_BYTES, INDEX
from vmm.audit.checkpoint import Checkpoint, Proof

# TPM 2.0 part 2: TPM_GENERATED_VALUE (6.2), TPM_ST_ATTEST_NV (6.9), TPM_ALG_SHA256 (6.3), TPMA_NV (13.4).
_GENERATED, _ATTEST_NV, _SHA256 = 0xFF544347, 0x8014, 0x000B
_ATTRIBUTES = 0x22060016
"""Of the index: a counter, as vmm.audit.anchor defines it, that was written."""
_CLOCK_AND_FIRMWARE = 8 + 4 + 4 + 1 + 8
_SOFTWARE = b"holdfast software anchor\n"


def check(checkpoint: Checkpoint) -> None:
    """Whether its anchor signed this statement at this counter. Raises: ValueError saying what does not fit."""
    proof = checkpoint.proof
    try:
        key = load_der_public_key(base64.b64decode(proof.key, validate=True))
        attest = base64.b64decode(proof.attest, validate=True)
        signature = base64.b64decode(proof.signature, validate=True)
    except (binascii.Error, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"its proof cannot be read: {error}") from None
    digest = bytes.fromhex(checkpoint.digest())
    try:
        if proof.anchor == "tpm":
            if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)):
                raise ValueError("its key is not of the kind that a TPM anchors with")
            key.verify(signature, attest, ec.ECDSA(hashes.SHA256()))
            _check_attest(attest, digest, proof.counter)
        else:
            if not isinstance(key, ed25519.Ed25519PublicKey):
                raise ValueError("its key is not of the kind that a software anchor has")
            key.verify(signature, _message(digest, proof.counter))
    except InvalidSignature:
        raise ValueError("its anchor did not sign it") from None


def _check_attest(attest: bytes, digest: bytes, counter: int) -> None:
    """Whether a TPMS_ATTEST (part 2, 10.12.8) is of our counter, at this value, and of this hash.

    The index is named by what it is, so no other kind of index can stand in for a counter.
    """
    public = struct.pack(">IHIHH", INDEX, _SHA256, _ATTRIBUTES, 0, COUNTER_BYTES)
    name = struct.pack(">H", _SHA256) + hashlib.sha256(public).digest()
    rest = _Reader(attest)
    if rest.take(6) != struct.pack(">IH", _GENERATED, _ATTEST_NV):
        raise ValueError("its proof is not a TPM's of an index")
    rest.sized()  # the signer's name, which the signature stands for
    if rest.sized() != digest:
        raise ValueError("its proof is of another statement")
    rest.take(_CLOCK_AND_FIRMWARE)
    if rest.sized() != name or rest.take(2) != b"\0\0":
        raise ValueError("its proof is of another index of the TPM")
    if rest.sized() != counter.to_bytes(COUNTER_BYTES) or rest.left:
        raise ValueError("its proof is of another counter")


class _Reader:
    """Takes a structure apart from the front. Raises: ValueError where it is too short."""

    def __init__(self, data: bytes) -> None:
        self.left = data

    def take(self, count: int) -> bytes:
        taken, self.left = self.left[:count], self.left[count:]
        if len(taken) != count:
            raise ValueError("its proof is cut short")
        return taken

    def sized(self) -> bytes:
        """A TPM2B: two bytes of length, and what they say."""
        return self.take(int.from_bytes(self.take(2)))


def new_key() -> bytes:
    """A software anchor's private key (Ed25519, raw)."""
    return ed25519.Ed25519PrivateKey.generate().private_bytes_raw()


def sign(private: bytes, digest: str, counter: int) -> Proof:
    """A software anchor's proof. Raises: ValueError for what is no key."""
    key = ed25519.Ed25519PrivateKey.from_private_bytes(private)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    signature = key.sign(_message(bytes.fromhex(digest), counter))
    return Proof("software", _base64(public), counter, "", _base64(signature))


def _message(digest: bytes, counter: int) -> bytes:
    return _SOFTWARE + counter.to_bytes(COUNTER_BYTES) + digest


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
