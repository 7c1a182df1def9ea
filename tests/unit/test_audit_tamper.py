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
from tests.unit.test_audit_checkpoints import checkpoints, trail
from tests.unit.test_audit_daemon import EVENT, OWN, LocalAnchor
from tests.unit.test_update_floor import needs_tpm, tcti
from vmm.audit import verify
from vmm.audit.checkpoint import Checkpoint
from vmm.audit.records import GENESIS, Entry, canonical, digest, parse
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


# -- a part of a trail -------------------------------------------------------------------------------------------------

SPAN = Span(after=4, to=12)
"""Of a trail of five rounds: records 5 to 13, of which 7, 10 and 13 are checkpoints that cover 6, 9 and 12."""


def relinked(part: list[bytes]) -> list[bytes]:
    """A part that goes on from the record before it, as whoever hands it over would forge it."""
    return rechained(part, 5, parse(part[0]).prev)


PART_ATTACKS: dict[str, tuple[Attack, str, int]] = {
    "edit": (lambda x: [x[0], changed(x[1]), *x[2:]], "edit", 7),
    "edit of the first": (lambda x: [changed(x[0]), *x[1:]], "edit", 6),
    "edit of the first one's link": (
        lambda x: [canonical(msgspec.structs.replace(parse(x[0]), prev="0" * 96)), *x[1:]], "edit", 6,
    ),
    "edit, linked anew": (lambda x: relinked([x[0], changed(x[1]), *x[2:]]), "edit", 7),
    "edit of the first, linked anew": (lambda x: relinked([changed(x[0]), *x[1:]]), "edit", 7),
    "edit of the last that is covered, linked anew": (lambda x: relinked([*x[:7], changed(x[7]), x[8]]), "edit", 13),
    "edit of the checkpoint at the end": (lambda x: [*x[:8], x[8].replace(b'"counter":4', b'"counter":5')], "edit", 13),
    "deletion": (lambda x: [x[0], *x[2:]], "deletion", 6),
    "deletion, linked anew": (lambda x: relinked([x[0], *x[2:]]), "edit", 6),
    "deletion of a checkpoint, linked anew": (lambda x: relinked([*x[:2], *x[3:]]), "edit", 9),
    "deletion at the beginning": (lambda x: x[1:], "truncation", 14),
    "deletion at the beginning, linked anew": (lambda x: rechained(x[1:], 5, parse(x[0]).prev), "edit", 6),
    "addition at the beginning": (lambda x: [x[0], *x], "reordering", 6),
    "reordering": (lambda x: [x[1], x[0], *x[2:]], "reordering", 7),
    "reordering, linked anew": (lambda x: relinked([x[1], x[0], *x[2:]]), "edit", 7),
    "truncation": (lambda x: x[:7], "truncation", 12),
    "truncation at a checkpoint": (lambda x: x[:6], "truncation", 11),
    "truncation to nothing": (lambda _: [], "truncation", 1),
    "a line that is cut off": (lambda x: [*x[:8], x[8][:-5]], "edit", 13),
}


@pytest.mark.parametrize("attack", PART_ATTACKS)
def test_what_was_done_to_a_part_is_named(attack: str, tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"), rounds=5)
    part = lines[4:13]
    # Whichever checkpoint the auditor has, also one from before or behind the part; and if he has none.
    do, kind, seq = PART_ATTACKS[attack]
    for known in (*checkpoints(tmp_path / "store"), None):
        report = verified(part, tmp_path, known, SPAN)
        assert (report.problem, report.first, report.last, report.covered) == (None, 5, 13, 12), known
        problem = verified(do(part), tmp_path, known, SPAN).problem
        assert problem is not None and problem.kind in (kind, "substitution"), problem
        # To who knows a record in the part, that one may be wrong before what the checkpoints show.
        assert problem.seq == seq if problem.kind == kind else known is not None and problem.seq == known.covers


def test_a_part_says_what_it_proves_and_what_not(tmp_path: Path) -> None:
    lines = trail(tmp_path / "store", LocalAnchor(tmp_path / "anchor"), rounds=5)
    known = checkpoints(tmp_path / "store")[-1]
    text = verified(lines[4:13], tmp_path, known, SPAN).text()
    assert "9 records, 5 to 13, unbroken" in text and "nothing left out in between" in text
    assert "all records above 4 and up to 12 are in here" in text
    assert f"what came before record 5 is not in here; hash of the last of it: {digest(lines[3])}" in text
    assert "NOT anchored: record 13, which may have been changed, or have gone on" in text
    assert "whose key this is, and no more" in text
    assert "no more" not in verified(lines[4:13], tmp_path, checkpoints(tmp_path / "store")[1], SPAN).text()
    assert "NOT compared" not in text and "NOT compared" in verified(lines[4:13], tmp_path).text()
    # What was not asked for is not said to be there, and a part that is whole by itself may be less than was asked.
    assert "all records" not in verified(lines[4:13], tmp_path).text()
    for asked, says in (
        (Span(after=3, to=12), "it begins with record 5, not with 4"),
        (Span(after=4, to=13), "nothing is anchored behind record 12, and 13 was asked for"),
        (Span(after=4), "record 15 is known to have been there"),
        (Span(since="2001-01-01T00:00:00.000000Z"), "record 15 is known to have been there"),
        (Span(since="2001", until="9999"), "it begins with record 5, of 2"),
        (Span(until="9999"), "others may follow"),
        (Span(since="9998", until="9999"), "no record of that time is in it"),
    ):
        problem = verified(lines[4:13], tmp_path, known, asked).problem
        assert problem is not None and problem.kind == "truncation" and says in problem.why, asked
    # Two parts that meet are one: the link of the second is the hash that the first ends with.
    assert verified(lines[7:13], tmp_path).prev == verified(lines[4:7], tmp_path).head


def test_no_part_of_another_trail_is_a_substitute(tmp_path: Path) -> None:
    anchor = LocalAnchor(tmp_path / "anchor")
    part = trail(tmp_path / "store", anchor, rounds=5)[4:13]
    foreign = trail(tmp_path / "foreign", LocalAnchor(tmp_path / "other"), rounds=5)[4:13]
    anew = trail(tmp_path / "anew", anchor, rounds=5)[4:13]
    assert verified(foreign, tmp_path, None, SPAN).problem is None
    for known in checkpoints(tmp_path / "store"):
        for other, kinds in ((foreign, {"substitution"}), (anew, {"substitution", "replay"})):
            report = verified(other, tmp_path, known, SPAN)
            if other is anew and known.covers == 3:
                # The host did have both trails, and a part does not show what came between.
                assert report.problem is None and "that shows whose key this is, and no more" in report.text()
            else:
                assert report.problem is not None and report.problem.kind in kinds, known.covers
    # Spliced in, as it is and linked anew, at the beginning, in the middle and at the end.
    for other in (foreign, anew):
        for start, end in ((0, 3), (3, 6), (6, 9), (3, 9)):
            spliced = [*part[:start], *other[start:end], *part[end:]]
            for made in (spliced, relinked(spliced)):
                for given in (None, checkpoints(tmp_path / "store")[-1]):
                    problem = verified(made, tmp_path, given, SPAN).problem
                    assert problem is not None and problem.kind in ("edit", "substitution", "replay"), (start, end)


def test_a_part_of_a_trail_that_was_put_back_shows(tmp_path: Path) -> None:
    """The older store went on: by a gap in the part, or by a number that is too high for what it covers."""
    anchor, store, old = LocalAnchor(tmp_path / "anchor"), tmp_path / "store", tmp_path / "old"
    trail(store, anchor, rounds=2)
    shutil.copytree(store, old)
    trail(store, anchor, rounds=4)
    known = checkpoints(store)[-1]
    lines = trail(old, anchor, rounds=2)
    # Two rounds, two records behind them, how the run ended, and two rounds more.
    first = next(n for n, line in enumerate(lines) if b'"counter":7' in line)
    assert known.covers > first + 1
    problem = verified(lines[4:], tmp_path, known, Span(after=4, to=first)).problem
    assert problem is not None and problem.kind == "replay" and "between 2 and 7" in problem.why
    problem = verified(lines[first - 2 : first + 1], tmp_path, known, Span(after=first - 2, to=first)).problem
    assert problem is not None and problem.kind == "replay" and f"{known.proof.counter} is known" in problem.why
