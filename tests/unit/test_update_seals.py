"""Which seals of a volume go when a release of a higher epoch is kept."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.unit.test_update_machine import Killed, Power, World, boot, install
from vmm.update import gate, policy, seals
from vmm.update.errors import Refused


def public() -> tuple[bytes, bytes]:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    return (
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
    )


NOW, LATER = b"1" * 32, b"2" * 32
"""Values of PCR 7."""


def header(*pems: bytes, pcr7: bytes = NOW) -> bytes:
    tokens: dict[str, object] = {
        str(number): {
            "type": "systemd-tpm2",
            "keyslots": [str(number + 1)],
            "tpm2_pubkey": base64.b64encode(pem).decode(),
            "tpm2-policy-hash": policy.of_seal(pem, pcr7) if pem.startswith(b"---") else "",
        }
        for number, pem in enumerate(pems)
    }
    tokens["9"] = {"type": "systemd-recovery", "keyslots": ["0"]}
    return msgspec.json.encode({"keyslots": {}, "tokens": tokens, "config": {"json_size": "12288"}})


def test_what_is_sealed_to_another_key_goes() -> None:
    (old_der, old), (new_der, new) = public(), public()
    found = seals.parse(header(old, new, old))
    assert [seal.token for seal in seals.outdated(found, new_der, policy.of_seal(new, NOW))] == ["0", "2"]
    assert [seal.keyslots for seal in seals.outdated(found, old_der, policy.of_seal(old, NOW))] == [("2",)]


def test_the_last_way_in_stays() -> None:
    """A seal to the present policy key is not one if it wants what PCR 7 does not hold (after a change of db)."""
    (_, old), (new_der, new) = public(), public()
    present = policy.of_seal(new, NOW)
    for found in (header(old), header(), header(old, new, pcr7=LATER)):
        with pytest.raises(Refused, match="not sealed to the present policy key and PCR 7"):
            seals.outdated(seals.parse(found), new_der, present)


def test_what_is_not_sealed_is_sealed_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The initrd's marks go, so that it seals again; nothing is taken away before."""
    (_, old), (_, new) = public(), public()
    (tmp_path / seals.POLICY_KEY).parent.mkdir(parents=True)
    (tmp_path / seals.POLICY_KEY).write_bytes(new)
    (tmp_path / seals.SEALED).mkdir(parents=True)
    marks = [tmp_path / seals.SEALED / f"0123.{volume}" for volume in seals.VOLUMES]
    for mark in marks:
        mark.touch()
    ran: list[list[str]] = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        ran.append([str(word) for word in command])
        return SimpleNamespace(stdout=header(old, new, pcr7=LATER).decode(), returncode=0)

    monkeypatch.setattr(seals, "run", run)
    monkeypatch.setattr(seals, "_device", lambda root, volume: Path("/dev", volume))
    with pytest.raises(Refused, match="not sealed"):
        seals.renew(NOW, tmp_path)
    assert [mark.exists() for mark in marks] == [False, True]
    assert all("luksDump" in command for command in ran)


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


REASON = "a volume is not sealed to the present policy key yet; its old seals stay"


def bless_with_seals_kept(world: World) -> None:
    """1.1.0 raised the floor to 2, and its old seals could not be taken away."""
    install(world)
    boot(world, "1.1.0", epoch=2)
    world.env.floor.raise_to(1)
    world.machine.seals_error = REASON
    assert world.work.bless().kind == "blessed"
    assert world.env.floor.read() == 2 and world.machine.seals_renewed == 0
    assert world.records[-1].type == "update.bless"
    assert world.records[-1].extra["seals_kept"] == f"seals: {REASON}"


def again(world: World) -> list[tuple[str, str, Any]]:
    """What another start puts on record."""
    before = len(world.records)
    world.restarted()
    assert world.work.settle().kind == "nothing"
    return [(entry.type, entry.outcome, entry.extra["seals_removed"]) for entry in world.records[before:]]


def shortcut(world: World, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the gate of the running version leaves the updater alone."""
    (world.folder / "etc").mkdir(exist_ok=True)
    (world.folder / "etc/os-release").write_text(f"IMAGE_VERSION={world.env.running.version}\n")
    monkeypatch.setattr("vmm.paths.ROOT", world.folder)
    monkeypatch.setattr("vmm.paths.UPDATE_STATE", world.env.folder)
    return gate._nothing_to_judge()


def test_seals_that_stayed_are_tried_again_until_they_are_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    bless_with_seals_kept(world)
    for _ in range(3):
        assert not shortcut(world, monkeypatch)
        assert again(world) == []
    world.machine.seals_error = "a volume's header cannot be understood"
    assert again(world) == [("update.seals", "failure", [])]
    assert world.records[-1].reason == "seals: a volume's header cannot be understood"
    assert again(world) == []
    world.machine.seals_error = ""
    assert again(world) == [("update.seals", "success", ["data: token 0"])]
    assert world.records[-1].object.id == "1.1.0" and world.machine.seals_renewed == 1
    assert shortcut(world, monkeypatch)
    assert again(world) == [] and world.machine.seals_renewed == 1


def test_errors_of_the_disk_are_tried_again_too(world: World) -> None:
    bless_with_seals_kept(world)

    def fail() -> list[str]:
        return [Path("/nonexistent/pcr.pem").read_text()]

    world.machine.renew_seals = fail  # type: ignore[method-assign]
    assert again(world) == [("update.seals", "failure", [])]
    assert world.records[-1].reason == "/nonexistent/pcr.pem: No such file or directory"
    assert again(world) == []


def test_an_older_system_put_back_does_not_take_the_newer_ones_seals(world: World) -> None:
    bless_with_seals_kept(world)
    world.machine.seals_error = ""
    boot(world, "1.0.0", epoch=1)
    world.env.store.change(blessed=("1.0.0",))
    assert world.work.settle().kind == "nothing"
    world.env.store.change(blessed=())
    assert world.work.settle().kind == "blessed"
    assert world.machine.seals_renewed == 0 and world.env.floor.read() == 2
    boot(world, "1.1.0", epoch=2)
    world.work.settle()
    assert world.machine.seals_renewed == 1


def test_a_version_on_trial_takes_no_seals(world: World) -> None:
    bless_with_seals_kept(world)
    world.machine.seals_error = ""
    world.repository.add("1.2.0", epoch=2)
    world.offer()
    install(world)
    boot(world, "1.2.0", epoch=2)
    assert world.work.settle().kind == "trial" and world.machine.seals_renewed == 0
    assert world.work.bless().kind == "blessed" and world.machine.seals_renewed == 1
    assert world.records[-1].extra["seals_removed"] == ["data: token 0"]


def test_a_kill_while_the_seals_are_renewed(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it comes, the next starts take the seals away, and the floor is up."""
    install(world)
    boot(world, "1.1.0", epoch=2)
    world.env.floor.raise_to(1)
    for after in range(40):
        with monkeypatch.context() as patch:
            Power(after, patch, ("fsync", "replace", "rename"))
            try:
                world.work.bless()
            except Killed:
                pass
            else:
                break
        world.restarted()
        assert world.env.floor.read() < 2 or world.env.store.state.seals_kept or world.machine.seals_renewed
    assert after > 3 and world.machine.seals_renewed >= 1
    assert world.env.floor.read() == 2 and not world.env.store.state.seals_kept


def test_what_a_former_change_of_keys_left_goes() -> None:
    """Of the same policy key only, and only where what is to be kept is there."""
    seals_ = [seals.Seal(str(n), (str(n),), key, text) for n, (key, text) in enumerate(SEALED)]
    assert [seal.token for seal in seals.superseded(seals_, b"key", {"then", "next"})] == ["1"]
    assert seals.superseded(seals_, b"key", {"never"}) == []
    assert seals.superseded(seals_, b"key", set()) == []


SEALED = ((b"old key", "before"), (b"key", "before"), (b"key", "then"), (b"key", "next"))


def volumes(folder: Path, monkeypatch: pytest.MonkeyPatch, *policies: str) -> list[list[str]]:
    """Two volumes with seals to these policies, and what cryptsetup is told of them from now on."""
    told: list[list[str]] = []
    pem = public()[1]
    (folder / "usr/share/holdfast").mkdir(parents=True)
    (folder / seals.POLICY_KEY).write_bytes(pem)
    tokens = {
        str(number): {
            "type": "systemd-tpm2",
            "keyslots": [str(number)],
            "tpm2_pubkey": base64.b64encode(pem).decode(),
            "tpm2-policy-hash": text or policy.of_seal(pem, bytes([number]) * 32),
        }
        for number, text in enumerate(policies)
    }

    def run(command: list[Any], **_: Any) -> Any:
        if "luksDump" not in command:
            told.append([str(word) for word in command])
        return SimpleNamespace(stdout=json.dumps({"tokens": tokens}))

    monkeypatch.setattr(seals, "run", run)
    monkeypatch.setattr(seals, "_device", lambda root, volume: Path(volume))
    return told


def test_volumes_that_would_stay_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes(tmp_path, monkeypatch, "", "ab" * 32, "")
    assert seals.unsealed([bytes(32), b"\2" * 32], tmp_path) == []
    assert seals.unsealed([bytes(32), b"\1" * 32], tmp_path) == ["data", "audit"]


def test_a_header_has_no_room_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are sealed to already need none; what is left over of a former change makes some."""
    told = volumes(tmp_path, monkeypatch, *("" for _ in range(4)))
    new = [b"x" * 32, b"y" * 32]
    seals.make_room([bytes(32), new[0]], [], tmp_path)
    with pytest.raises(Refused, match=r"the volume data would have 6 seals, more than the 5"):
        seals.make_room(new, [], tmp_path)
    assert told == []
    seals.make_room(new, [*new, b"\2" * 32, b"\3" * 32], tmp_path)
    assert [(words[1], words[-2:]) for words in told if words[1] == "luksKillSlot"] == [
        ("luksKillSlot", [volume, slot]) for volume in ("data", "audit") for slot in ("0", "1")
    ]
