"""The audit store: chaining, recovery of a torn tail, full and failing disks, paging; and its verifier."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from vmm.audit import store as store_module
from vmm.audit import verify
from vmm.audit.opening import interrupted_entry
from vmm.audit.records import Actor, Entry, Object, Producer, canonical, check, digest, parse
from vmm.audit.search import Page
from vmm.audit.store import MAX_BATCH, Draft, Store
from vmm.errors import Unavailable, UserError

OWN = Producer(903, "holdfast-audit")
CORE = Producer(902, "holdfast-core")


def entry(number: int = 0, **fields: Any) -> Entry:
    plain = Entry(
        type="machine.start",
        actor=Actor("alice", "admin", "10.0.2.2:5000"),
        object=Object("machine", "id", f"m{number}"),
        extra={"n": number, "text": "é\n"},
    )
    return msgspec.structs.replace(plain, **fields)


def open_store(directory: Path) -> Store:
    return Store(directory, producer=OWN, boot="boot")


def filled(directory: Path, count: int) -> tuple[Path, tuple[int, str]]:
    """A store of single-record appends; returns its newest segment and its end."""
    directory.mkdir(exist_ok=True)
    store = open_store(directory)
    for number in range(count):
        store.append([Draft(entry(number), CORE)])
    store.close()
    return verify.segments(directory)[-1], store.end


def test_records_are_chained_and_attributed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    assert store.append([Draft(entry(i), CORE) for i in range(3)]) == range(1, 4)
    assert store.append([Draft(entry(9), OWN)]) == range(4, 5)
    records = [parse(line + b"\n") for line in store.read(0, 10).records]
    assert [r.seq for r in records] == [1, 2, 3, 4]
    assert records[0].prev == "0" * 96
    assert records[3].prev == digest(store.read(2, 1).records[0] + b"\n")
    assert (records[0].producer, records[3].producer) == (CORE, OWN)
    assert store.end == (4, digest(store.read(3, 1).records[0] + b"\n"))
    # What travels as JSON objects comes back to the same bytes: an export can be verified.
    assert canonical(msgspec.json.decode(store.read(0, 1).records[0])) == store.read(0, 1).records[0] + b"\n"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"extra": {"a": [{"b": 1.5}]}}, "extra.a.0.b is a float"),
        ({"extra": {"a": 1 << 63}}, "64-bit"),
        ({"extra": {"a": "x" * 40_000}}, "longer than"),
        ({"phase": "intent", "outcome": "pending"}, "needs a request"),
        ({"phase": "intent", "request": "r"}, "does not go with"),
        ({"outcome": "pending"}, "does not go with"),
        ({"extra": {"a": [[[[[[[[[]]]]]]]]]}}, "nested too deeply"),
    ],
)
def test_an_entry_without_canonical_form_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(entry(**fields))


def test_a_line_has_one_form_only(tmp_path: Path) -> None:
    line = filled(tmp_path, 1)[0].read_bytes()
    other = (
        (line.replace(b'"v":2', b'"v": 2'), "canonical"),
        (line.replace(b'"n":0', b'"n":-0'), "canonical"),
        (line.replace(b'"n":0', b'"n":1,"n":0'), "canonical"),
        (line.replace("é".encode(), rb"\u00e9"), "canonical"),
        (b"{" + line[1:-2].split(b",", 1)[1] + b"," + line[1:].split(b",", 1)[0] + b"}\n", "not a record"),
        (line.replace(b'"n":0', b'"n":0.5'), "float"),
        (line.replace(b'"v":2', b'"v":2,"w":1'), "unknown field"),
        (line.replace(b'"phase":"event"', b'"phase":"intent"'), "does not go with"),
        (line.replace(b'"reason":""', b'"reason":"%s"' % (b"x" * 40_000)), "longer"),
    )
    for changed, says in other:
        assert changed != line
        with pytest.raises(ValueError, match=says):
            parse(changed)


def test_readers_see_only_what_is_durable(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append([Draft(entry(), CORE)])
    segment = verify.segments(tmp_path)[0]
    with segment.open("ab") as file:
        file.write(segment.read_bytes())
    assert (len(store.read(0, 10).records), store.read(0, 10).next) == (1, None)


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    file, (_, head) = filled(tmp_path / "store", 4)
    good = file.read_bytes()
    copy = tmp_path / "copy.jsonl"
    assert verify.verify_file(file, head=head).problem is None
    for position in range(len(good)):
        for mask in (0x01, 0x20, 0x80):
            copy.write_bytes(good[:position] + bytes([good[position] ^ mask]) + good[position + 1 :])
            report = verify.verify_file(copy, head=head)
            assert report.problem is not None, (position, mask)
            flipped = good[:position].count(b"\n") + 1
            # A change that leaves a valid record shows in the record after it.
            assert report.problem.seq in (flipped, flipped + 1)


def test_every_deleted_swapped_doubled_or_spliced_record_is_detected(tmp_path: Path) -> None:
    file, (_, head) = filled(tmp_path / "store", 6)
    other, _ = filled(tmp_path / "other", 6)
    lines = file.read_bytes().splitlines(keepends=True)
    foreign = other.read_bytes().splitlines(keepends=True)
    wrong = []
    for i in range(len(lines)):
        wrong.append(lines[:i] + lines[i + 1 :])
        wrong.append(lines[: i + 1] + lines[i:])
        wrong.append([*lines[:i], foreign[i], *lines[i + 1 :]])
        wrong.append([*lines[:i], lines[i][:-20], *lines[i + 1 :]])
        wrong.append([*lines[:i], lines[i].replace(b'"v":2', b'"v":2,"w":2'), *lines[i + 1 :]])
        wrong.append([*lines[:i], lines[i].replace(b'"v":2', b'"v": 2'), *lines[i + 1 :]])
        for j in range(i):
            wrong.append([*lines[:j], lines[i], *lines[j + 1 : i], lines[j], *lines[i + 1 :]])
    for changed in wrong:
        file.chmod(0o600)
        file.write_bytes(b"".join(changed))
        report = verify.verify_directory(tmp_path / "store", head=head)
        assert report.problem is not None, changed


def test_verifier_names_record_and_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, (_, head) = filled(tmp_path / "store", 5)
    lines = file.read_bytes().splitlines(keepends=True)
    export = tmp_path / "export.jsonl"
    export.write_bytes(b"".join(lines[2:]))
    verify.command([str(export), "--prev", digest(lines[1]), "--head", head])
    assert "3 records, 3 to 5" in capsys.readouterr().out
    assert verify.verify_file(export).problem is None
    wrong = verify.verify_file(export, prev=digest(lines[0])).problem
    assert wrong is not None and "link" in wrong.why
    export.write_bytes(b"".join(lines[2:4]))
    with pytest.raises(UserError, match="record 5: truncation: the trail does not end"):
        verify.command([str(export), "--head", head])
    export.write_bytes(lines[1] + lines[3])
    with pytest.raises(UserError, match="record 3: deletion: record 4 stands where 3 was expected"):
        verify.command([str(export)])
    with pytest.raises(UserError, match="no audit segments"):
        verify.command([str(tmp_path)])
    with pytest.raises(UserError, match="No such file"):
        verify.command([str(tmp_path / "absent")])


def test_segments_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 3000)
    filled(tmp_path, 20)
    files = verify.segments(tmp_path)
    assert len(files) > 2 and all(file.stat().st_size <= 3000 for file in files)
    store = open_store(tmp_path)
    store.append([Draft(entry(20), CORE)])
    for after in range(21):
        page = store.read(after, 4)
        assert [parse(line + b"\n").seq for line in page.records] == list(range(after + 1, min(after + 5, 22)))
        assert page.next == (after + 4 if after + 4 < 21 else None)
    assert store.read(21, 4) == Page([], None, 21)
    report = verify.verify_directory(tmp_path, head=store.end[1])
    assert (report.records, report.first, report.last, report.problem) == (21, 1, 21, None)
    store.close()
    for missing in files[1:-1]:
        kept = missing.read_bytes()
        missing.unlink()
        problem = verify.verify_directory(tmp_path).problem
        assert problem is not None and problem.seq == int(missing.stem)
        missing.write_bytes(kept)
    files[0].unlink()
    assert verify.verify_directory(tmp_path).problem is not None


def test_pages_fit_into_a_frame(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append([Draft(entry(extra={"text": "x" * 30_000}), CORE) for _ in range(40)])
    seen, after = 0, 0
    while True:
        page = store.read(after, 1000)
        assert sum(map(len, page.records)) <= 512 << 10
        seen += len(page.records)
        if page.next is None:
            break
        after = page.next
    assert seen == 40


def test_the_largest_batch_fits_into_a_segment(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.append([Draft(entry(extra={"text": "x" * 30_000}), CORE)] * MAX_BATCH)
    store.append([Draft(entry(extra={"text": "x" * 30_000}), CORE)] * MAX_BATCH)
    assert all(file.stat().st_size <= 8 << 20 for file in verify.segments(tmp_path))


def test_torn_tail_is_cut_at_every_byte(tmp_path: Path) -> None:
    file, _ = filled(tmp_path, 3)
    good = file.read_bytes()
    start = good.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(good)):
        file.write_bytes(good[:end])
        store = open_store(tmp_path)
        assert (store.recovered, store.end[0]) == (end - start, 2)
        store.close()
        assert file.read_bytes() == good[:start]
    store = open_store(tmp_path)
    store.append([Draft(entry(), CORE)])
    store.close()
    assert verify.verify_directory(tmp_path).problem is None


def test_torn_first_line_of_a_new_segment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 1000)
    file, _ = filled(tmp_path, 3)
    for content in (b"", file.read_bytes()[:100]):
        file.write_bytes(content)
        store = open_store(tmp_path)
        assert (store.recovered, store.end[0]) == (len(content), 2)
        store.close()


def test_damage_before_the_tail_keeps_the_store_closed(tmp_path: Path) -> None:
    file, _ = filled(tmp_path, 3)
    file.write_bytes(file.read_bytes().replace(b'"name":"m1"', b'"name":"m7"'))
    with pytest.raises(Unavailable, match="record 3 in 00000000000000000001.log"):
        open_store(tmp_path)


def test_newest_segment_must_continue_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 1500)
    filled(tmp_path / "a", 6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    middle = verify.segments(tmp_path / "a")[-2]
    middle.chmod(0o600)
    middle.write_bytes(middle.read_bytes().replace(b'"role":"admin"', b'"role":"audit"'))
    with pytest.raises(Unavailable, match="link"):
        open_store(tmp_path / "a")
    verify.segments(tmp_path / "b")[-2].unlink()
    with pytest.raises(Unavailable, match="damaged"):
        open_store(tmp_path / "b")


def test_a_store_has_one_writer(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    with pytest.raises(Unavailable, match="another process"):
        open_store(tmp_path)
    first.close()
    open_store(tmp_path).close()


class Disk:
    """Stands in for os.write: holds so many more bytes, writes what fits, then fails."""

    def __init__(self, room: int, number: int = errno.ENOSPC) -> None:
        self.room = room
        self.number = number

    def write(self, descriptor: int, data: memoryview) -> int:
        fits = min(self.room, len(data))
        if not fits:
            raise OSError(self.number, os.strerror(self.number))
        self.room -= fits
        return os.write(descriptor, data[:fits])


def test_full_disk_leaves_a_valid_store_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.append([Draft(entry(), CORE)])
    disk = Disk(700)
    monkeypatch.setattr(store_module, "_write", disk.write)
    release = store._release_reserve

    def released() -> None:
        release()
        disk.room = 4096

    monkeypatch.setattr(store, "_release_reserve", released)
    with pytest.raises(Unavailable, match="full"):
        store.append([Draft(entry(i), CORE) for i in range(3)])
    page = store.read(0, 10)
    assert [parse(line + b"\n").type for line in page.records] == ["machine.start", "audit.full"]
    assert parse(page.records[1] + b"\n").extra == {"refused": 3}
    assert not (tmp_path / "reserve").exists()
    # Room is only what the reserve can be made of again; its own space is not spent on ordinary records.
    monkeypatch.setattr(store, "_take_reserve", lambda: False)
    with pytest.raises(Unavailable, match="full"):
        store.append([Draft(entry(), CORE)])
    assert store.full and store.end[0] == 2
    monkeypatch.undo()
    assert store.append([Draft(entry(), CORE)]) == range(3, 4)
    assert not store.full and (tmp_path / "reserve").stat().st_size == store_module.RESERVE_BYTES
    assert verify.verify_directory(tmp_path, head=store.end[1]).problem is None


def test_full_disk_without_any_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    monkeypatch.setattr(store_module, "_write", Disk(100).write)
    with pytest.raises(Unavailable, match="full"):
        store.append([Draft(entry(), CORE)])
    assert store.end[0] == 0 and verify.segments(tmp_path)[0].read_bytes() == b""


def test_a_failing_disk_stops_the_store_until_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    store.append([Draft(entry(), CORE)])
    monkeypatch.setattr(store_module, "_write", Disk(50, errno.EIO).write)
    with pytest.raises(Unavailable, match="Input/output"):
        store.append([Draft(entry(), CORE)])
    monkeypatch.undo()
    with pytest.raises(Unavailable, match="Input/output"):
        store.append([Draft(entry(), CORE)])
    store.close()
    again = open_store(tmp_path)
    assert again.end[0] == 1 and again.append([Draft(entry(), CORE)]) == range(2, 3)


def test_only_intents_since_the_last_start_can_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SEGMENT_BYTES", 2000)
    store = open_store(tmp_path)

    def put(type_: str, phase: str, request: str = "", **extra: object) -> None:
        outcome = "pending" if phase == "intent" else "success"
        store.append([Draft(entry(type=type_, phase=phase, outcome=outcome, request=request, extra=extra), CORE)])

    put("machine.start", "intent", "before")
    put("audit.start", "event")
    put("machine.start", "intent", "done")
    put("machine.start", "intent", "open")
    put("machine.stop", "outcome", "open")
    put("audit.read", "outcome", "x", type="audit.start", text='"type":"audit.start"')
    for number in range(8):
        put("volume.list", "outcome", f"r{number}")
    put("machine.start", "outcome", "done")
    put("volume.create", "intent", "late")
    found = list(store.open_intents())
    assert [(r.type, r.request) for r in found] == [("machine.start", "open"), ("volume.create", "late")]
    closing = interrupted_entry(found[0])
    assert (closing.phase, closing.outcome, closing.reason) == ("outcome", "failure", "interrupted")
    assert (closing.actor.id, closing.request, closing.extra) == ("alice", "open", {"intent": found[0].seq})
