"""What `make faults` decides before any host is on: which cuts there are."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.faults.cuts import KINDS, Kind, spread


def _kinds(count: int, wanted: tuple[Kind, ...] = KINDS) -> Counter[str]:
    return Counter(cut.kind.name for cut in spread(count, random.Random(1), wanted))


def test_cuts_of_all_kinds_come_by_their_shares() -> None:
    assert _kinds(200) == {kind.name: 2 * kind.share for kind in KINDS}


@pytest.mark.parametrize("wanted", [KINDS[-1:], KINDS[::3], KINDS[1:]])
@pytest.mark.parametrize("count", [1, 10, 47])
def test_cuts_are_as_many_as_wanted_and_of_the_wanted_kinds_only(count: int, wanted: tuple[Kind, ...]) -> None:
    found = _kinds(count, wanted)
    assert found.total() == count
    assert set(found) <= {kind.name for kind in wanted}


def test_one_seed_makes_the_same_cuts_again() -> None:
    assert spread(20, random.Random(7)) == spread(20, random.Random(7))
    for cut in spread(20, random.Random(7)):
        assert 0 <= cut.seconds <= cut.kind.longest
