"""Which seals of a volume go when a release of a higher epoch is kept."""

from __future__ import annotations

import base64

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.unit.test_update_machine import World, boot, install
from vmm.update import seals
from vmm.update.errors import Refused


def public() -> tuple[bytes, bytes]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    return (
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


def header(*pems: bytes) -> bytes:
    texts = [base64.b64encode(pem).decode() for pem in pems]
    tokens: dict[str, object] = {
        str(number): {"type": "systemd-tpm2", "keyslots": [str(number + 1)], "tpm2_pubkey": text}
        for number, text in enumerate(texts)
    }
    tokens["9"] = {"type": "systemd-recovery", "keyslots": ["0"]}
    return msgspec.json.encode({"keyslots": {}, "tokens": tokens, "config": {"json_size": "12288"}})


def test_what_is_sealed_to_another_key_goes() -> None:
    (old_der, old), (new_der, new) = public(), public()
    found = seals.parse(header(old, new, old))
    assert [seal.token for seal in seals.outdated(found, new_der)] == ["0", "2"]
    assert [seal.keyslots for seal in seals.outdated(found, old_der)] == [("2",)]


def test_the_last_way_in_stays() -> None:
    (_, old), (new_der, _) = public(), public()
    with pytest.raises(Refused, match="not sealed to the present policy key"):
        seals.outdated(seals.parse(header(old)), new_der)
    with pytest.raises(Refused, match="not sealed"):
        seals.outdated(seals.parse(header()), new_der)


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"tokens":{"x":{"type":"systemd-tpm2"}}}', header(b"no key")])
def test_a_header_that_is_not_understood_changes_nothing(text: bytes) -> None:
    with pytest.raises(Refused, match="cannot be understood"):
        seals.parse(text)


def test_only_a_rising_epoch_takes_seals_away(world: World) -> None:
    world.work.settle()
    install(world)
    boot(world, "1.1.0")
    world.work.bless()
    assert (world.machine.seals_renewed, world.env.floor.read()) == (0, 1)
    boot(world, "1.1.0", epoch=2)
    world.env.store.change(blessed=())
    world.work.settle()
    assert (world.machine.seals_renewed, world.env.floor.read()) == (1, 2)
    assert world.records[-1].extra["seals_removed"] == ["data: token 0"]
