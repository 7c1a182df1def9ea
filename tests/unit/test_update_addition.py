"""Certificates for db that a release brings: what hosts take, and what hostile ones look like."""

from __future__ import annotations

import itertools
import uuid

import msgspec
import pytest

from tests.unit.test_update_keys_rig import GLOBAL, REPLACE, certificate, payload, signature_list
from vmm.update import addition
from vmm.update.errors import Refused
from vmm.update.types import DbAppend

NEW = certificate("db-next")
LIST = signature_list(NEW)
GOOD = payload(LIST)


def test_a_good_one() -> None:
    found = addition.parse(GOOD)
    assert (found.payload, found.list, found.certificate) == (GOOD, LIST, NEW)
    addition.check_signed(found, [b"no certificate", certificate("theirs"), certificate("KEK")])


@pytest.mark.parametrize(
    "wrong",
    [
        payload(LIST, by="theirs"),
        payload(LIST, attributes=REPLACE),
        payload(LIST, variable="dbx"),
        payload(LIST, variable="KEK", vendor=GLOBAL),
        payload(LIST, vendor=uuid.UUID(int=1)),
        GOOD[:2] + b"\2" + GOOD[3:],
        payload(signature_list(certificate("theirs")))[: -len(signature_list(certificate("theirs")))] + LIST,
    ],
    ids=itertools.count(),
)
def test_what_is_signed_for_something_else(wrong: bytes) -> None:
    """By another key, to replace db, for another variable, at another time, of another certificate."""
    with pytest.raises(Refused, match="no key exchange key of this firmware has signed it"):
        addition.check_signed(addition.parse(wrong), [certificate("KEK")])


@pytest.mark.parametrize(
    "wrong",
    [
        b"",
        LIST,
        payload(b""),
        payload(LIST + LIST),
        payload(signature_list(b"no certificate")),
        payload(signature_list(certificate("db-next", "db"))),
        payload(uuid.uuid4().bytes_le + LIST[16:]),
        payload(LIST + b"x"),
        payload(LIST[:-1]),
        GOOD[:16] + b"\xff\xff\xff\xff" + GOOD[20:],
        GOOD[:16] + b"\0\0\0\0" + GOOD[20:],
        GOOD[:20] + b"\0\0" + GOOD[22:],
        GOOD[:24] + bytes(16) + GOOD[40:],
    ],
    ids=itertools.count(),
)
def test_other_forms_are_refused(wrong: bytes) -> None:
    """No header, no certificate, two, one that others vouch for, lists that are none."""
    with pytest.raises(Refused):
        addition.parse(wrong)


def test_a_truncated_one_is_refused() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(Refused):
            addition.parse(GOOD[:length])


def test_the_manifest_bounds_it() -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(msgspec.json.encode(bytes((16 << 10) + 1)), type=DbAppend)
