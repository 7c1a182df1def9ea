"""Records as syslog messages: what any receiver makes of them, whatever strangers had recorded."""

from __future__ import annotations

import re

import pytest

from tests.harness.collector import parsed
from tests.unit.test_cli_audit import records
from vmm.audit.records import canonical, digest
from vmm.export.message import framed, message

pytestmark = pytest.mark.sfr("FAU_STG_EXT.1")

HOSTILE = 'a"]\\ <13>1 - \n\r\0\x1b[2J\x7f\x9b\u2028\U0001f600'


def record(**fields: object) -> dict[str, object]:
    import json  # noqa: PLC0415

    return {**json.loads(records(1)[0]), **fields}


def test_a_record_is_a_message_of_rfc_5424() -> None:
    text = message(record(), "hf1.example.org")
    assert text.startswith(
        b"<110>1 2026-11-23T04:05:06.123456Z hf1.example.org holdfast-core - machine.start "
        b'[holdfast@32473 seq="1" boot="b" type="machine.start" outcome="success" hash="'
    )
    got = parsed(text)
    line = canonical(record())
    assert got.text + b"\n" == line and got.data["hash"] == digest(line)
    assert got.record == record() and got.seq == 1


@pytest.mark.parametrize(("outcome", "priority"), [("success", 110), ("pending", 110), ("failure", 108)])
def test_the_severity_follows_the_outcome(outcome: str, priority: int) -> None:
    assert parsed(message(record(outcome=outcome), "h")).priority == priority


def test_what_strangers_had_recorded_ends_nothing() -> None:
    """Wherever it stands, the message is one line and its parts are what they were."""
    named = record(actor={"id": HOSTILE}, object={"name": HOSTILE}, boot=HOSTILE, type=HOSTILE, outcome=HOSTILE)
    named["producer"] = {"unit": HOSTILE}
    text = message(named, HOSTILE)
    assert b"\n" not in text and not re.search(rb"[\0-\x1f]", text)
    got = parsed(text)
    assert got.record == named
    escaped = 'a\\"\\]\\\\ <13>1 - \\\\u000a\\\\u000d\\\\u0000\\\\u001b[2J\\\\u007f\\\\u009b\\\\u2028\U0001f600'
    assert got.data["boot"] == got.data["outcome"] == escaped
    assert all(re.fullmatch(r"[!-~]+", part) for part in (got.hostname, got.app, got.type))


def test_fields_of_the_header_are_as_long_as_they_may_be_and_never_empty() -> None:
    got = parsed(message(record(type="a." + "b" * 62, producer={"unit": "u" * 99}), "h" * 300))
    assert (len(got.type), len(got.app), len(got.hostname)) == (32, 48, 255)
    assert got.data["type"] == "a." + "b" * 62
    # One of a later version may lack what this one knows.
    later = record()
    del later["producer"]
    assert parsed(message(later, "")).app == parsed(message(later, "")).hostname == "-"


def test_messages_follow_one_another_behind_their_length_in_bytes() -> None:
    text = message(record(reason="ümläut"), "h")
    stream = framed(text) * 2
    length, _, rest = stream.partition(b" ")
    assert int(length) == len(text) and rest[: len(text)] == text and rest[len(text) :] == framed(text)
