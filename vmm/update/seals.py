"""To which policy keys the encrypted volumes are sealed, and taking away those that no longer count.

Once a host has blessed a release of a higher epoch, a signed system from before must not open its volumes any more,
even if someone puts it back on the ESP: its policy key's seal goes. (LUKS2 on-disk format specification, 5.3; the
token's fields are those of systemd-cryptenroll(1).)
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Annotated

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from vmm.config import devices
from vmm.paths import ROOT
from vmm.process import run
from vmm.update import policy
from vmm.update.errors import Refused

LAYER = "seals"
VOLUMES = ("data", "audit")
POLICY_KEY = "usr/share/holdfast/pcr.pem"
SEALED = "var/lib/holdfast/sealed"
MOST = 5
"""Seals to a volume. Six fit into a header's 12 KiB of JSON, besides a recovery key; one is left for a policy key."""
_TPM = "systemd-tpm2"
_TIMEOUT_S = 120.0


class _Token(msgspec.Struct, frozen=True):
    type: str
    keyslots: list[Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,2}\Z")]] = []
    tpm2_pubkey: str = ""
    policy: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{0,128}\Z")] = msgspec.field(
        default="", name="tpm2-policy-hash"
    )


class _Header(msgspec.Struct, frozen=True):
    tokens: dict[Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,2}\Z")], _Token] = {}


class Seal(msgspec.Struct, frozen=True):
    """One way the TPM opens a volume: the token's number, its key slots, the policy key it wants (DER), and the digest
    of its whole policy (policy.py).
    """

    token: str
    keyslots: tuple[str, ...]
    key: bytes
    policy: str = ""


def parse(metadata: bytes) -> list[Seal]:
    """The TPM seals in a LUKS2 header's JSON. Raises: Refused when it cannot be read."""
    try:
        tokens = msgspec.json.decode(metadata, type=_Header).tokens
        found = [(number, token) for number, token in tokens.items() if token.type == _TPM]
        return [Seal(number, tuple(token.keyslots), _der(token.tpm2_pubkey), token.policy) for number, token in found]
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, binascii.Error, UnsupportedAlgorithm) as error:
        raise Refused(LAYER, f"a volume's header cannot be understood: {error}") from None


def _der(pem: str) -> bytes:
    return _public(base64.b64decode(pem, validate=True)) if pem else b""


def _public(pem: bytes) -> bytes:
    return load_pem_public_key(pem).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def outdated(seals: Sequence[Seal], key: bytes, present: str) -> list[Seal]:
    """The seals to take away, where only those of ``key`` (DER) count.

    Raises: Refused when the policy ``present``, by which the TPM opens a volume in this start, is not among these.
    """
    if not any(seal.key == key and seal.policy == present for seal in seals):
        raise Refused(LAYER, "a volume is not sealed to the present policy key and PCR 7 yet; its old seals stay")
    return [seal for seal in seals if seal.key != key]


def renew(pcr7: bytes, root: Path = ROOT) -> list[str]:
    """Take away from all volumes what is sealed to other policy keys than the running system's.

    Arguments: ``pcr7`` is what PCR 7 holds. Returns: what was taken away, in words. Raises: Refused, and then the next
    start seals what is not sealed; CommandFailed; OSError.
    """
    pem = (root / POLICY_KEY).read_bytes()
    key, present = _public(pem), policy.of_seal(pem, pcr7)
    done = []
    for volume in VOLUMES:
        device = _device(root, volume)
        try:
            gone = outdated(_read(device), key, present)
        except Refused:
            # The mark by which the initrd knows that it has sealed to a policy key says nothing of PCR 7.
            for mark in (root / SEALED).glob(f"*.{volume}"):
                mark.unlink()
            raise
        for seal in gone:
            _remove(device, seal)
            done.append(f"{volume}: token {seal.token}")
    return done


def _remove(device: Path, seal: Seal) -> None:
    for slot in seal.keyslots:
        run(["cryptsetup", "luksKillSlot", "--batch-mode", device, slot], timeout=_TIMEOUT_S)
    # The token went with its last key slot where cryptsetup knows its type; a second removal changes nothing.
    run(["cryptsetup", "token", "remove", "--token-id", seal.token, device], check=False, timeout=_TIMEOUT_S)


def unsealed(pcr7: Iterable[bytes], root: Path = ROOT) -> list[str]:
    """The volumes that the running system's policy key would not open under each of these values of PCR 7.

    Raises: Refused; CommandFailed; OSError.
    """
    pem = (root / POLICY_KEY).read_bytes()
    wanted = {policy.of_seal(pem, value) for value in pcr7}
    return [volume for volume in VOLUMES if not wanted <= {seal.policy for seal in _read(_device(root, volume))}]


def make_room(coming: Iterable[bytes], keep: Iterable[bytes], root: Path = ROOT) -> None:
    """See that each volume's header takes the seals to come.

    systemd-cryptenroll finds out too late, and leaves a key slot behind with each attempt.
    Arguments: ``coming`` are values of PCR 7 that will be sealed to; what the running system's policy key has sealed to
    others than ``keep`` goes, if that is not empty. Raises: Refused; CommandFailed; OSError.
    """
    pem = (root / POLICY_KEY).read_bytes()
    wanted, kept = ({policy.of_seal(pem, value) for value in values} for values in (coming, keep))
    for volume in VOLUMES:
        device = _device(root, volume)
        found = _read(device)
        gone = superseded(found, _public(pem), kept)
        for seal in gone:
            _remove(device, seal)
        count = len(found) - len(gone) + len(wanted - {seal.policy for seal in found})
        if count > MOST:
            raise Refused(
                LAYER, f"the volume {volume} would have {count} seals, more than the {MOST} there is room for"
            )


def superseded(seals: Sequence[Seal], key: bytes, kept: Set[str]) -> list[Seal]:
    """The seals of a policy key (DER) to other policies than those to be kept; none if not one of those is there."""
    own = [seal for seal in seals if seal.key == key]
    return [seal for seal in own if seal.policy not in kept] if kept & {seal.policy for seal in own} else []


def _read(device: Path) -> list[Seal]:
    dump = run(["cryptsetup", "luksDump", "--dump-json-metadata", device], timeout=_TIMEOUT_S).stdout
    return parse(dump.encode())


def _device(root: Path, volume: str) -> Path:
    """The partition under an open volume. Raises: Refused."""
    match devices.below(root, volume):
        case [partition]:
            return root / "dev" / partition
    raise Refused(LAYER, f"the volume {volume} is not open")
