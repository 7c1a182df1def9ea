"""What the verifier makes of a trail with checkpoints that somebody has been at."""

from __future__ import annotations

import asyncio
import datetime
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_audit_anchor import Managed
from tests.unit.test_audit_checkpoints import checkpoints, put, run, trail
from tests.unit.test_audit_daemon import EVENT, OWN, LocalAnchor, stored
from tests.unit.test_update_floor import needs_tpm, tcti
from vmm.audit import store as store_module
from vmm.audit import verify
from vmm.audit.checkpoint import Checkpoint
from vmm.audit.keeping import Purge
from vmm.audit.records import CHECKPOINT, GENESIS, Entry, canonical, digest, parse
from vmm.audit.span import Span
from vmm.audit.store import Draft, Store
from vmm.errors import UserError

__all__ = ["tcti"]

pytestmark = pytest.mark.sfr("FAU_STG.1")


def rechained(lines: Sequence[bytes], first: int = 1, before: str = GENESIS) -> list[bytes]:
    """The lines numbered and linked anew, as whoever can write the store would do."""
    made: list[bytes] = []
    for number, line in enumerate(lines, first):
        prev = digest(made[-1]) if made else before
        made.append(canonical(msgspec.structs.replace(parse(line), seq=number, prev=prev)))
    return made


def verified(
    lines: Sequence[bytes], folder: Path, known: Checkpoint | None = None, span: Span | None = None
) -> verify.Report:
    file = folder / "export"
    file.write_bytes(b"".join(lines))
    return verify.verify_file(file, known=known, span=span)


def changed(line: bytes) -> bytes:
    other = line.replace(b'"request":"r', b'"request":"x')
    assert other != line
    return other


def test_a_whole_trail_says_how_far_it_is_anchored(tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    report = verified(lines, tmp_path)
    assert (report.problem, report.covered, report.last) == (None, 9, 12)
    text = report.text()
    assert "NOT anchored: records 10 to 12" in text and "SOFTWARE" in text
    assert report.newest is not None and report.newest.proof.fingerprint in text
    assert "NOT compared" in text
    # A part proves itself as well, from any record up to the checkpoint that covers it.
    part = verified(lines[4:10], tmp_path)
    assert (part.problem, part.first, part.covered, part.last) == (None, 5, 9, 10)
    assert "NOT anchored: records 5 to 6" in verified(lines[4:6], tmp_path).text()
    # A checkpoint known from elsewhere covers what the trail's own do not.
    known = checkpoints(tmp_path / "store")[-1]
    report = verified(lines[:9], tmp_path, known)
    assert report.covered == 9 and "NOT" not in report.text()


Attack = Callable[[list[bytes]], list[bytes]]
ATTACKS: dict[str, tuple[Attack, str, int]] = {
    "edit": (lambda x: [*x[:1], changed(x[1]), *x[2:]], "edit", 3),
    "edit, linked anew": (lambda x: rechained([*x[:1], changed(x[1]), *x[2:]]), "edit", 4),
    "deletion": (lambda x: x[:1] + x[2:], "deletion", 2),
    "deletion, linked anew": (lambda x: rechained(x[:1] + x[2:]), "edit", 3),
    "deletion of a checkpoint, linked anew": (lambda x: rechained(x[:3] + x[4:]), "edit", 6),
    "reordering": (lambda x: [x[0], x[2], x[1], *x[3:]], "reordering", 2),
    "doubling": (lambda x: [*x[:2], *x[1:]], "reordering", 3),
    "reordering, linked anew": (lambda x: rechained([x[0], x[2], x[1], *x[3:]]), "edit", 4),
    "truncation": (lambda x: x[:5], "truncation", 6),
    "truncation at a checkpoint": (lambda x: x[:7], "truncation", 8),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_was_done_to_a_trail_is_named(attack: str, tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    known = checkpoints(tmp_path / "store")[-1]
    assert verified(lines, tmp_path, known).problem is None
    do, kind, seq = ATTACKS[attack]
    problem = verified(do(lines), tmp_path, known).problem
    assert problem is not None and (problem.kind, problem.seq) == (kind, seq), problem


def test_another_store_is_no_substitute(tmp_path: Path) -> None:
    anchor = LocalAnchor(tmp_path / "anchor")
    trail(tmp_path / "store", anchor)
    known = checkpoints(tmp_path / "store")[0]
    # One of another host: the key says so, to who knows it.
    foreign = trail(tmp_path / "foreign", LocalAnchor(tmp_path / "other"))
    assert verified(foreign, tmp_path).problem is None
    problem = verified(foreign, tmp_path, known).problem
    assert problem is not None and problem.kind == "substitution" and "another" in problem.why
    # One that was begun anew on the same host: the known record says so.
    anew = trail(tmp_path / "anew", anchor)
    problem = verified(anew, tmp_path, known).problem
    assert problem is not None and (problem.kind, problem.seq) == ("substitution", known.covers)
    # Half a trail of each.
    mixed = rechained([*trail(tmp_path / "mixed", anchor), *foreign])
    problem = verified(mixed, tmp_path).problem
    assert problem is not None and problem.kind == "substitution"


def test_an_older_store_put_back_shows_once_it_goes_on(tmp_path: Path) -> None:
    anchor, store, old = LocalAnchor(tmp_path / "anchor"), tmp_path / "store", tmp_path / "old"
    trail(store, anchor, rounds=2)
    shutil.copytree(store, old)
    trail(store, anchor, rounds=2)
    assert verify.verify_directory(store).problem is None
    trail(old, anchor, rounds=1)
    problem = verify.verify_directory(old).problem
    assert problem is not None and problem.kind == "replay" and "checkpoints between 2 and 5" in problem.why


@needs_tpm
def test_a_tpm_does_not_go_back_with_the_store(tcti: str, tmp_path: Path) -> None:
    anchor, store, old = LocalAnchor(Managed(tcti)), tmp_path / "store", tmp_path / "old"
    trail(store, anchor, rounds=1)
    shutil.copytree(store, old)
    trail(store, anchor, rounds=2)
    (known, *_) = checkpoints(store)
    report = verify.verify_directory(store, known=known)
    assert report.problem is None and "by the TPM" in report.text() and "NOT compared" not in report.text()
    trail(old, anchor, rounds=1)
    problem = verify.verify_directory(old, known=known).problem
    assert problem is not None and problem.kind == "replay"


def test_not_even_the_last_checkpoint_can_be_taken_back(tmp_path: Path) -> None:
    """Its number was taken as soon as it was stored."""
    anchor, store = LocalAnchor(tmp_path / "anchor"), tmp_path / "store"
    trail(store, anchor, rounds=2)
    file = verify.segments(store)[-1]
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: checkpoints(store)[-1].covers]))
    trail(store, anchor, rounds=1)
    problem = verify.verify_directory(store).problem
    assert problem is not None and problem.kind == "replay" and "checkpoints between 1 and 3" in problem.why


def test_a_clock_that_was_set_back_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, producer=OWN, boot="boot")

    class Clock(datetime.datetime):
        hour_back = False

        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
            return cls(2026, 11, 23, 4 if cls.hour_back else 5, tzinfo=tz)

    monkeypatch.setattr(datetime, "datetime", Clock)
    for back in (False, False, True, True, False):
        Clock.hour_back = back
        store.append([Draft(Entry(type=EVENT), OWN)])
    store.close()
    report = verify.verify_directory(tmp_path)
    assert report.problem is None
    (note,) = report.notes
    assert note == "record 3: the clock was set back from 2026-11-23T05:00:00.000000Z to 2026-11-23T04:00:00.000000Z"
    assert note in report.text()


def test_a_checkpoint_that_is_not_genuine_is_not_taken_as_known(tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"))
    good = checkpoints(tmp_path / "store")[0]
    file = tmp_path / "known.json"
    for content, says in (
        (msgspec.json.encode(msgspec.structs.replace(good, covers=4)), "not genuine"),
        (b"{}", "holds no checkpoint"),
        (b"\xff", "holds no checkpoint"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=says):
            verify.command([str(tmp_path / "store"), "--known", str(file)])
    file.write_bytes(msgspec.json.encode(good))
    verify.command([str(tmp_path / "store"), "--known", str(file)])
    assert len(lines) == 12


def test_a_number_that_comes_twice_is_no_other_checkpoint(tmp_path: Path) -> None:
    anchor, store = LocalAnchor(tmp_path / "anchor"), tmp_path / "store"
    trail(store, anchor, rounds=2)
    (tmp_path / "anchor/counter").write_bytes(b"1\n")
    trail(store, anchor, rounds=1)
    problem = verify.verify_directory(store).problem
    assert problem is not None and problem.kind == "replay" and "1, had been used before" in problem.why


def test_a_part_from_before_what_is_known_is_told(tmp_path: Path) -> None:
    """The known checkpoint covers none of it, but its number is too high for a part of the same trail."""
    anchor = LocalAnchor(tmp_path / "anchor")
    old = trail(tmp_path / "old", anchor)
    assert trail(tmp_path / "anew", anchor, rounds=1)
    (known,) = checkpoints(tmp_path / "anew")
    problem = verified(old[known.covers + 1 :], tmp_path, known).problem
    assert problem is not None and problem.kind == "replay" and f"{known.proof.counter} is known" in problem.why


def test_a_checkpoint_covers_what_stands_before_it(tmp_path: Path) -> None:
    anchor, store = LocalAnchor(tmp_path / "anchor"), tmp_path / "store"
    lines = trail(store, anchor, rounds=1, tail=0)
    good = checkpoints(store)[0]
    for covers in (4, 5, 1000):
        early = msgspec.structs.replace(good, covers=covers)
        made = msgspec.structs.replace(early, proof=asyncio.run(anchor.certify(early.digest(), 0)))
        record = msgspec.structs.replace(parse(lines[-1]), extra=msgspec.to_builtins(made))
        problem = verified([*lines[:-1], canonical(record)], tmp_path).problem
        assert problem is not None and (problem.kind, problem.seq) == ("edit", 4)
        assert f"it covers record {covers}, which does not stand shortly before it" in problem.why


def test_a_checkpoint_of_a_later_release_is_not_passed_over(tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"), tail=0)
    later = lines[-1].replace(b'"v":2', b'"v":3')
    problem = verified([*lines[:-1], later], tmp_path).problem
    assert problem is not None and problem.kind == "unreadable"


def shortened(folder: Path, monkeypatch: pytest.MonkeyPatch, rounds: int = 8) -> tuple[Path, int]:
    """A store of many segments whose oldest an auditor had removed, anchored behind that; and the removal's number."""
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 3000)
    anchor, store = LocalAnchor(folder / "anchor"), folder / "store"

    async def fill() -> None:
        async with run(store, anchor) as service:
            for _ in range(rounds):
                await put(service, 4)
                await service.checkpoints.make()
            await service.keeping.purge(Purge(int(verify.segments(store)[3].stem)))
            await service.checkpoints.make()

    asyncio.run(fill())
    (removal,) = (record.seq for record in stored(store) if record.type == "audit.removed")
    return store, removal


def test_a_trail_whose_begin_was_removed_on_record_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, removal = shortened(tmp_path, monkeypatch)
    files = verify.segments(store)
    report = verify.verify_directory(store, known=checkpoints(store)[-1])
    assert report.problem is None and report.vouched == removal <= report.covered
    text = report.text()
    assert f"those before record {report.first} were removed: record {removal} says so" in text
    assert "which is NOT anchored" not in text
    # A checkpoint from before vouches for the rest as well, although what it covers is gone.
    early = Checkpoint.of(stored(store)[next(i for i, r in enumerate(stored(store)) if r.type == CHECKPOINT)])
    assert verify.verify_directory(store, known=early).problem is None
    # Whoever has the hash needs nobody to vouch; and an export may begin anywhere.
    lines = [line for file in files for line in verify.lines(file)]
    assert verify.verify_directory(store, prev=parse(lines[0]).prev).problem is None
    assert verified(lines[5:], tmp_path).problem is None


def removed_says(field: str, value: object) -> Callable[[list[bytes]], list[bytes]]:
    """The trail with another word in the record of the removal, and linked anew from there."""

    def change(lines: list[bytes]) -> list[bytes]:
        made: list[bytes] = []
        for line in lines:
            record = parse(line)
            if made:
                record = msgspec.structs.replace(record, prev=digest(made[-1]))
            if record.type == "audit.removed":
                record = msgspec.structs.replace(record, extra=record.extra | {field: value})
            made.append(canonical(record))
        return made

    return change


BEGINNINGS: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "one segment more": (lambda x: x[0].unlink(), "truncation"),
    "all segments but the newest": (lambda x: list(map(Path.unlink, x[:-1])), "truncation"),
    "one in between": (lambda x: x[1].unlink(), "deletion"),
    "the end of the oldest": (lambda x: x[0].write_bytes(x[0].read_bytes()[:-400]), "edit"),
    "the begin of the oldest": (
        lambda x: x[0].write_bytes(x[0].read_bytes().split(b"\n", 1)[1]),
        "deletion",
    ),
    "another name for the oldest": (lambda x: x[0].rename(x[0].with_name(f"{1:020d}.log")), "deletion"),
}


@pytest.mark.parametrize("attack", BEGINNINGS)
def test_what_goes_beyond_a_removal_is_named(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = shortened(tmp_path, monkeypatch)
    do, kind = BEGINNINGS[attack]
    for file in verify.segments(store):
        file.chmod(0o600)
    do(verify.segments(store))
    problem = verify.verify_directory(store).problem
    assert problem is not None and problem.kind == kind, problem


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (removed_says("head", "0" * 96), "edit"),
        (removed_says("last", 3), "truncation"),
        (removed_says("first", 4000), "truncation"),
        (removed_says("head", "nothing"), "truncation"),
        (lambda x: [line for line in x if b'"audit.removed"' not in line], "deletion"),
    ],
)
def test_a_removal_that_says_something_else_vouches_for_nothing(
    change: Attack, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where no checkpoint covers it and all links fit."""
    store, removal = shortened(tmp_path, monkeypatch)
    lines = [line for file in verify.segments(store) for line in verify.lines(file)]
    first = parse(lines[0]).seq
    rest = [line for line in change(lines) if parse(line).seq <= removal + (kind == "deletion")]
    shutil.rmtree(store)
    store.mkdir()
    (store / f"{first:020d}.log").write_bytes(b"".join(rest))
    problem = verify.verify_directory(store).problem
    assert problem is not None and problem.kind == kind, problem


def test_a_removal_by_a_later_release_asks_for_its_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, removal = shortened(tmp_path, monkeypatch)
    lines = [line for file in verify.segments(store) for line in verify.lines(file)]
    rest = [line for line in lines if parse(line).seq <= removal]
    rest[-1] = rest[-1].replace(b'"v":2}', b'"v":3,"w":1}')
    first = parse(lines[0]).seq
    shutil.rmtree(store)
    store.mkdir()
    (store / f"{first:020d}.log").write_bytes(b"".join(rest))
    problem = verify.verify_directory(store).problem
    assert problem is not None and (problem.kind, problem.seq) == ("unreadable", 1)


def test_a_segment_that_the_disk_does_not_give_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So looks what was changed under fs-verity, from outside of the host."""
    store, _ = shortened(tmp_path, monkeypatch)
    file = verify.segments(store)[0]
    file.unlink()
    file.mkdir()
    with pytest.raises(UserError, match=file.name):
        verify.command([str(store)])
