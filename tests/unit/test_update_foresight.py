"""What PCR 7 will hold, foreseen from the log of a start: real logs, hostile ones, and every order of programs."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import pytest

from tests.unit.test_update_keys_rig import certificate, entry, log, pcr7, signature_list, start, variable
from vmm.update import eventlog, firmware, foresight, policy
from vmm.update.errors import Refused
from vmm.update.foresight import AUTHORITY, Measured

GOLDEN = Path(__file__).with_name("golden")
OLD, NEW, TEST, ROM = (certificate(name) for name in ("db", "db-next", "test", "option ROM"))
DB = signature_list(OLD, TEST)
GROWN = DB + signature_list(NEW)


def measured(*vouched: bytes, db: bytes = DB) -> Measured:
    steps = start(db, *map(entry, vouched))
    return foresight.understand(eventlog.parse(log(steps)), pcr7(steps))


def test_a_real_start_of_ovmf() -> None:
    """Its log adds up to the very policy to which that host's volumes were sealed."""
    events = eventlog.read(GOLDEN / "ovmf.tcglog")
    value = eventlog.replay(events, 7)
    assert value.hex() == "2b43a960b12da302aada0947058e20a059f984fdf36568022143afba2895effd"
    sealed = policy.of_seal((GOLDEN / "ovmf.pem").read_bytes(), value)
    assert sealed == "7c434bef103496874517f8c9505f44d5f84113b589b4cba2484129125a5e7723"
    found = foresight.understand(events, value)
    # Loader and UKI were signed by one key, the tests' addon by another.
    own = [event.data[36:] for event in events if event.register == 7 and event.data[32:36] == b"d\0b\0"]
    db, (loader, addon) = own[0], (each[firmware.OWNER_BYTES :] for each in own[-2:])
    assert [each[firmware.OWNER_BYTES :] for _, each in firmware.entries("db", db)] == [loader, addon]
    assert found.foresee(db, entry(loader), loader=loader, uki=loader) == value
    assert found.foresee(db, own[-1], loader=loader, uki=loader) == value


def test_the_policy_of_systemd_257() -> None:
    """As systemd-cryptenroll wrote it for --tpm2-pcrs=7:sha256=VALUE, on a TPM."""
    key = (GOLDEN / "sealed.pem").read_bytes()
    values = [hashlib.sha256(bytes(32) + bytes([byte]) * 32).digest() for byte in (0x11, 0x22, 0x33)]
    assert [policy.of_seal(key, value) for value in values] == (GOLDEN / "sealed.txt").read_text().split()
    with pytest.raises(Refused, match="policy key cannot be read"):
        policy.of_seal(b"no key", bytes(32))


@pytest.mark.parametrize(
    ("before", "uki", "then", "after"),
    [
        ((OLD,), OLD, OLD, (OLD,)),
        ((OLD,), OLD, NEW, (OLD, NEW)),
        ((OLD, TEST), OLD, NEW, (OLD, NEW, TEST)),
        ((ROM, OLD, TEST), OLD, NEW, (ROM, OLD, NEW, TEST)),
        ((OLD, TEST), OLD, TEST, (OLD, TEST)),
        ((OLD, NEW, TEST), NEW, NEW, (OLD, NEW, TEST)),
        ((OLD, NEW, TEST), NEW, OLD, (OLD, TEST)),
        ((OLD, NEW, TEST), NEW, ROM, (OLD, ROM, TEST)),
    ],
)
def test_who_vouches_in_which_order(
    before: tuple[bytes, ...], uki: bytes, then: bytes, after: tuple[bytes, ...]
) -> None:
    """The loader stays as it was signed by the old key; certificates are named once, when they are first needed."""
    value = measured(*before).foresee(GROWN, entry(then), loader=OLD, uki=uki)
    assert value == pcr7(start(GROWN, *map(entry, after)))


def test_a_log_that_does_not_explain_pcr_7() -> None:
    steps = start(DB, entry(OLD))
    events = eventlog.parse(log(steps))
    with pytest.raises(Refused, match="does not explain"):
        foresight.understand(events, pcr7(steps[:-1]))
    other = [eventlog.Event(e.register, e.type, e.digest, e.data[:-1] + b"x") for e in events]
    with pytest.raises(Refused, match="does not hold what was measured"):
        foresight.understand(other, pcr7(steps))
    twice = [*steps, steps[3]]
    with pytest.raises(Refused, match="db 2 times"):
        foresight.understand(eventlog.parse(log(twice)), pcr7(twice))
    never = [step for step in steps if step != steps[3]]
    with pytest.raises(Refused, match="db 0 times"):
        foresight.understand(eventlog.parse(log(never)), pcr7(never))


def test_who_vouched_must_be_in_the_log() -> None:
    for loader, uki in ((ROM, OLD), (OLD, ROM)):
        with pytest.raises(Refused, match="does not name"):
            measured(OLD).foresee(GROWN, entry(NEW), loader=loader, uki=uki)


def test_what_others_measured_stays_where_it_is() -> None:
    """Shim has lists of its own, and firmware may put anything into PCR 7."""
    steps = [*start(DB, entry(OLD)), (7, AUTHORITY, variable("MokList", b"x")), (7, AUTHORITY, b"?"), (7, 0x0D, b"")]
    found = foresight.understand(eventlog.parse(log(steps)), pcr7(steps))
    wanted = start(GROWN, entry(OLD), entry(NEW)) + steps[-3:]
    assert found.foresee(GROWN, entry(NEW), loader=OLD, uki=OLD) == pcr7(wanted)


def test_hostile_logs() -> None:
    whole = log(start(DB, entry(OLD)))
    ends = {length for length in range(len(whole)) if not _refuses(whole[:length])}
    # A log may end behind every event, and then it does not explain the register.
    assert 0 < len(ends) <= len(start(DB, entry(OLD))) + 2
    assert _refuses(log([], algorithms=((4, 20),)))
    assert _refuses(log([], algorithms=((11, 31),)))
    assert _refuses(log([], algorithms=((11, 32),) * 17))
    assert _refuses(log([], algorithms=()))
    assert _refuses(whole.replace(b"Event03", b"Event02", 1))
    assert _refuses(whole + struct.pack("<IIIH", 7, 1, 1, 99) + bytes(200))
    assert _refuses(whole + struct.pack("<III", 7, 1, 0xFFFFFFFF) + bytes(200))
    assert _refuses(whole + struct.pack("<III", 7, 1, 2) + bytes.fromhex("0400") + bytes(20) + bytes.fromhex("0400"))
    chance = random.Random(1)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        _refuses(bytes(damaged))


def _refuses(content: bytes) -> bool:
    try:
        foresight.understand(eventlog.parse(content), bytes(32))
    except Refused as error:
        return error.layer == eventlog.LAYER
    return False


def test_files_of_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(bytes((4 << 20) + 1))
    with pytest.raises(Refused, match="more than"):
        eventlog.read(tmp_path / "log")
    with pytest.raises(Refused, match="cannot be read"):
        eventlog.read(tmp_path / "none")
    (tmp_path / "7").write_text("AB" * 32 + "\n")
    assert eventlog.register(7, tmp_path) == b"\xab" * 32
    for text in ("", "x", "AB" * 20):
        (tmp_path / "7").write_text(text)
        with pytest.raises(Refused, match="register 7"):
            eventlog.register(7, tmp_path)
