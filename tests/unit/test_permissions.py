"""The permission matrix against the table of management functions in tests/requirements.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import requirements

MATRIX: dict[str, list[str]] = json.loads(Path("vmm/core/permissions.json").read_text())

SERVED = {
    1: ("update.check", "update.download", "update.apply", "update.cancel", "update.rollback", "update.import"),
    3: tuple(f"machine.{name}" for name in ("create", "delete", "rename", "describe", "change")),
    6: ("audit.read", "audit.follow", "audit.status", "audit.anchor", "audit.purge"),
    12: ("identity.enroll", "identity.change", "identity.revoke"),
    16: ("guard.set", "access.lock", "access.unlock"),
    22: ("machine.start",),
    23: ("machine.stop", "machine.force-off"),
    25: ("machine.suspend", "machine.pause"),
    26: ("machine.resume",),
}
"""The number of a function → the methods that it is carried out by."""
NARROWER = {"audit.purge"}
"""Methods that not all roles of their function have."""
FUNCTIONS = {function.n: function for function in requirements.load().management_functions}
PEOPLE = {"admin", "auditor", "operator", "user"}


@pytest.mark.sfr("FMT_MOF_EXT.1")
@pytest.mark.parametrize("number", SERVED)
def test_a_function_is_carried_out_for_its_roles_and_no_others(number: int) -> None:
    for method in SERVED[number]:
        given = set(MATRIX[method]) & PEOPLE
        assert given <= set(FUNCTIONS[number].roles), method
        assert method in NARROWER or given == set(FUNCTIONS[number].roles), method
    assert FUNCTIONS[number].provided


@pytest.mark.sfr("FMT_MOF_EXT.1")
def test_what_users_must_not_have_no_user_and_no_operator_has() -> None:
    """As the table's mapping of roles says: operator and user are the PP's User."""
    kept = [method for n, methods in SERVED.items() if FUNCTIONS[n].user == "no" for method in methods]
    assert "identity.enroll" in kept
    for method in kept:
        assert not set(MATRIX[method]) & {"operator", "user"}, method


def test_roles_are_the_known_ones() -> None:
    assert {role for roles in MATRIX.values() for role in roles} == PEOPLE | {"system", "guard"}
