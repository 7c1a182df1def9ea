"""Stores that other releases wrote, older ones and later ones; and what a record says of its time."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from vmm.audit import verify
from vmm.audit.clock import clock
from vmm.audit.opening import interrupted_entry
from vmm.audit.records import Actor, Clock, Entry, Producer, digest, parse
from vmm.audit.store import Draft, Store

OWN = Producer(903, "holdfast-audit")
CORE = Producer(902, "holdfast-core")
ENTRY = Entry(type="machine.unknown")

V1 = (
    b'{"actor":{"id":"alice","origin":"10.0.2.2:5000","role":"admin"},"boot":"b","extra":{"args":{"name":"web"}},'
    b'"object":{"id":"","kind":"machine","name":"web"},"outcome":"pending","phase":"intent","prev":"'
    + b"0"
    * 96
    + b'","producer":{"uid":902,"unit":"holdfast-core"},"reason":"","request":"r1","seq":1,'
    b'"time":"2026-11-23T04:05:06.123456Z","type":"machine.start","v":1}\n'
)
"""A line as releases wrote it before there was a clock in it."""


def test_a_store_of_version_1_is_read_and_continued(tmp_path: Path) -> None:
    (tmp_path / "00000000000000000001.log").write_bytes(V1)
    store = Store(tmp_path, producer=OWN, boot="boot")
    assert [intent.request for intent in store.open_intents()] == ["r1"]
    store.append([Draft(interrupted_entry(intent), OWN) for intent in store.open_intents()])
    store.close()
    assert verify.verify_directory(tmp_path, head=store.end[1]).problem is None
    first, second = (parse(line) for line in verify.lines(verify.segments(tmp_path)[0]))
    assert (first.v, first.clock, first.actor) == (1, msgspec.UNSET, Actor("alice", "admin", "10.0.2.2:5000"))
    assert (second.v, second.prev) == (2, digest(V1)) and second.clock is not msgspec.UNSET


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b'"boot":"b",', b'"boot":"b","clock":{"quality":"holding","source":"ntp"},', "version 1 has neither clock"),
        (b'"id":"alice"', b'"certificate":"' + b"a" * 64 + b'","id":"alice"', "version 1 has neither"),
        (b'"v":1', b'"v":2', "clock is missing"),
        (b'"v":1', b'"v":0', "not a record"),
        (b'"v":1', b'"v":1,"w":1', "not a record"),
    ],
)
def test_each_version_has_its_own_fields(old: bytes, new: bytes, says: str) -> None:
    assert parse(V1).v == 1
    with pytest.raises(ValueError, match=says):
        parse(V1.replace(old, new))


def test_a_later_version_is_followed_by_its_links(tmp_path: Path) -> None:
    """A host that goes back a release still has its trail; what it adds continues the chain."""
    later = V1.replace(b'"id":"alice"', b'"id":"alice","mood":"good"').replace(b'"v":1', b'"v":3,"witness":[0.5]')
    for wrong in (later.replace(b'"v":3', b'"v":2'), later.replace(b":3", b": 3"), later.replace(b'"seq":1,', b"")):
        with pytest.raises(ValueError, match="not a record"):
            parse(wrong)
    (tmp_path / "00000000000000000001.log").write_bytes(later)
    store = Store(tmp_path, producer=OWN, boot="boot")
    (intent,) = store.open_intents()
    assert (intent.v, intent.type, intent.request) == (3, "machine.start", "r1")
    store.append([Draft(ENTRY, CORE)])
    assert store.read(0, 1).records == [later[:-1]]
    store.close()
    assert verify.verify_directory(tmp_path).problem is None
    file = verify.segments(tmp_path)[0]
    file.write_bytes(file.read_bytes().replace(b'"mood":"good"', b'"mood":"grim"'))
    problem = verify.verify_directory(tmp_path).problem
    assert problem is not None and (problem.seq, "link" in problem.why) == (2, True)


def test_a_record_says_what_its_time_is_worth(tmp_path: Path) -> None:
    mark = tmp_path / "synchronized"
    store = Store(tmp_path, producer=OWN, boot="boot", clock=lambda: clock(mark))
    store.append([Draft(ENTRY, CORE)])
    mark.touch()
    now = mark.stat().st_mtime
    for age in (0, 7000, 7300, -100):
        os.utime(mark, (now - age, now - age))
        store.append([Draft(ENTRY, CORE)])
    clocks = [parse(line + b"\n").clock for line in store.read(0, 10).records]
    ntp = ["synchronised", "synchronised", "holding", "holding"]
    assert clocks == [Clock("host", "unsynchronised"), *(Clock("ntp", quality) for quality in ntp)]  # type: ignore[arg-type]
