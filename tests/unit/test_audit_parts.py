"""Parts of a trail: what was done to one is named, what was asked for is there, or was removed on record."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from tests.unit.test_audit_checkpoints import checkpoints, trail
from tests.unit.test_audit_daemon import LocalAnchor
from tests.unit.test_audit_tamper import Attack, changed, rechained, shortened, verified
from vmm.audit import verify
from vmm.audit.records import canonical, digest, parse
from vmm.audit.span import Span

SPAN = Span(after=4, to=12)
"""Of a trail of five rounds: records 5 to 13, of which 7, 10 and 13 are checkpoints that cover 6, 9 and 12."""


def relinked(part: list[bytes]) -> list[bytes]:
    """A part that goes on from the record before it, as whoever hands it over would forge it."""
    return rechained(part, 5, parse(part[0]).prev)


PART_ATTACKS: dict[str, tuple[Attack, str, int]] = {
    "edit": (lambda x: [x[0], changed(x[1]), *x[2:]], "edit", 7),
    "edit of the first": (lambda x: [changed(x[0]), *x[1:]], "edit", 6),
    "edit of the first one's link": (
        lambda x: [canonical(msgspec.structs.replace(parse(x[0]), prev="0" * 96)), *x[1:]],
        "edit",
        6,
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


def test_a_part_may_begin_where_older_records_were_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was asked for of them: by the anchored record of the removal, or because the part begins later."""
    store, removal = shortened(tmp_path, monkeypatch)
    lines = [line for file in verify.segments(store) for line in verify.lines(file)]
    first, known = parse(lines[0]).seq, checkpoints(store)[-1]
    assert first > 5
    for asked in (Span(after=0), Span(after=0, to=removal), Span(since="2001-01-01T00:00:00.000000Z")):
        kept = verify.verify_directory(store, known=known, span=asked)
        for report in (verified(lines, tmp_path, known, asked), kept):
            assert report.problem is None and report.vouched == removal, asked
            text = report.text()
            assert f"all records {asked.text()} that were not removed are in here" in text
            assert f"those before record {first} were removed: record {removal} says so" in text
    # Without the removal's record, or with one that nothing anchors, it is a part that lacks its beginning.
    for end in (removal - first, removal - first + 1):
        for asked in (Span(after=0), Span(since="2001-01-01T00:00:00.000000Z")):
            problem = verified(lines[:end], tmp_path, None, asked).problem
            assert problem is not None and problem.kind == "truncation" and f"begins with record {first}" in problem.why
    # It need not tell of a removal where no more was asked for than is there; what is taken away of that is missed.
    files = verify.segments(store)
    behind = int(files[1].stem)
    files[0].unlink()
    for asked in (Span(after=behind - 1), Span(after=behind + 2, to=removal)):
        report = verify.verify_directory(store, known=known, span=asked)
        assert report.problem is None and report.first == behind and not report.vouched
        assert f"what came before record {behind} is not in here" in report.text()
    for wrong in (Span(after=behind - 2), Span(to=removal), Span()):
        problem = verify.verify_directory(store, known=known, span=wrong).problem
        assert problem is not None and problem.kind == "truncation", wrong
