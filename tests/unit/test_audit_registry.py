"""The registry of types: what it lets through, that producers and requirements fit it, and what is made of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from tests import audit_events, requirements
from tests.audit_events import Pending
from tests.unit.test_core_rig import Core
from vmm.audit import records
from vmm.audit.client import Entry, Object
from vmm.audit.events import EVENTS
from vmm.audit.registry import Event, Field, Registry, Serves, Unit
from vmm.errors import Forbidden, UserError

REPOSITORY = Path(__file__).resolve().parents[2]
PENDING = 10
"""How many events are pending. It may only be lowered."""

AUDIT = ("store", "server", "anchoring", "opening", "retention", "keeping")
SOURCES: dict[Unit, tuple[str, ...]] = {
    "holdfast-api": ("api/*.py",),
    "holdfast-core": ("core/*.py", "machines/*.py"),
    "holdfast-host": ("config/*.py", "update/*.py"),
    "holdfast-audit": tuple(f"audit/{name}.py" for name in AUDIT),
    "holdfast-kernel": ("kernel/*.py",),
    "holdfast-guard": ("guard/*.py",),
    "holdfast-export": ("export/*.py",),
}
"""Where each producer's code lies."""

DYNAMIC = {
    "core/dispatch.py: case.type": "the name of a method, which is registered as below, or one of two constants",
    "core/guests.py: type": "typed as a Literal",
    "update/records.py: type": "typed as a Literal",
    "api/connection.py: type_": "typed as a Literal",
    "audit/opening.py: intent.type": "that of an intent which was accepted",
    "export/link.py: type": "typed as a Literal",
    "kernel/daemon.py: type": "typed as a Literal",
    "kernel/judge.py: type": "typed as a Literal",
    "kernel/libvirt.py: type": "typed as a Literal",
}
"""Where a type is not written where the record is made, and what says that it is registered all the same."""


def entry(type: str = "machine.stop", **fields: Any) -> Entry:
    return Entry(type=type, **fields)


@pytest.mark.parametrize(
    ("made", "unit", "says"),
    [
        (entry("machine.vanish"), "holdfast-core", "type: machine.vanish is not registered"),
        (entry("machine.start", phase="outcome"), "holdfast-api", "holdfast-api does not write machine.start"),
        (entry("machine.start", phase="outcome"), "holdfast-host", "holdfast-host does not write machine.start"),
        (entry("session.start"), "holdfast-core", "holdfast-core does not write session.start"),
        (entry("audit.stop"), "holdfast-host", "holdfast-host does not write audit.stop"),
        (entry("machine.start"), "holdfast-core", "phase: event is not one of intent, outcome"),
        (entry(object=Object("volume", "id", "v")), "holdfast-core", "object.kind: volume is not machine"),
        (entry("tls.handshake", object=Object("x")), "holdfast-api", "object.kind: x is not empty"),
        (entry(extra={"colour": "red"}), "holdfast-core", "extra.colour: not a field of this type"),
        (entry(extra={"x" * 99: 1}), "holdfast-core", f"extra.{'x' * 64}…: not a field"),
        (entry(extra={"args": "web"}), "holdfast-core", "extra.args: not a map"),
        (entry("tls.handshake", extra={"suppressed": "6"}), "holdfast-api", "extra.suppressed: not an integer"),
        (entry("tls.handshake", extra={"suppressed": True}), "holdfast-api", "extra.suppressed: not an integer"),
        (entry("session.start", extra={"subject": 1}), "holdfast-api", "extra.subject: not a text"),
        (entry("update.bless", extra={"seals_removed": ["a", 1]}), "holdfast-host", "not a list of texts"),
        (entry("update.keys", extra={"pcr7": "a"}), "holdfast-host", "extra.pcr7: not a list of texts"),
        (
            entry("update.download", phase="outcome", extra={"parts": [{}, 1]}),
            "holdfast-host",
            "extra.parts: not a list of maps",
        ),
        (
            entry("update.download", phase="outcome", extra={"retry_failed": 1}),
            "holdfast-host",
            "extra.retry_failed: not true or false",
        ),
    ],
)
def test_what_is_not_registered_is_refused_by_name(made: Entry, unit: Unit, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as refused:
        EVENTS.check(made, unit)
    assert made.type in refused.value.message
    assert isinstance(refused.value, Forbidden) == ("does not write" in says)


def test_a_type_that_no_record_could_be_of_cannot_be_registered() -> None:
    good = EVENTS.get("machine.stop")
    assert good is not None
    for wrong in ({"type": "Machine"}, {"title": ""}, {"producers": ()}, {"producers": ("x",)}, {"phases": ("intent",)},
                  {"phases": ("x",)}, {"fields": {"a": Field("float", "x")}}):  # type: ignore[arg-type] # fmt: skip
        with pytest.raises(ValueError, match=r"machine\.stop|Machine"):
            Event(**(msgspec.structs.asdict(good) | wrong))
    with pytest.raises(ValueError, match="twice"):
        Registry((good, good))


def test_a_captured_api_writes_what_it_sees_itself_and_nothing_else() -> None:
    assert {event.type for event in EVENTS if "holdfast-api" in event.producers} == {
        *("session.start", "session.end", "tls.handshake", "api.unauthenticated"),
    }


def test_every_method_of_core_has_its_type(tmp_path: Path) -> None:
    """What the dispatcher writes: type, phases and object of each follow from the table of methods."""
    for name, method in Core(tmp_path).methods.items():
        event = EVENTS.get(name)
        assert event is not None and "holdfast-core" in event.producers, name
        phases = {"outcome"} | ({"intent"} if method.kind == "change" else set())
        assert phases == set(event.phases) - {"event"} and method.object_kind in ("", event.object), name
        assert ("args" in event.fields) == (method.kind == "change"), name


def trees(unit: Unit) -> Iterator[tuple[str, ast.Module]]:
    """The producer's modules by their path in vmm."""
    for pattern in SOURCES[unit]:
        for path in sorted((REPOSITORY / "vmm").glob(pattern)):
            yield str(path.relative_to(REPOSITORY / "vmm")), ast.parse(path.read_text())


def texts(tree: ast.AST) -> set[str]:
    """All strings in a tree, those behind the names of vmm.audit.records included."""
    named = [getattr(records, node.id, None) for node in ast.walk(tree) if isinstance(node, ast.Name)]
    plain = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {text for text in [*plain, *named] if isinstance(text, str)}


def written(tree: ast.AST) -> Iterator[ast.expr]:
    """What stands behind type= wherever an entry is made, and in every Literal."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Entry"):
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "type")
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            yield node.slice


@pytest.mark.parametrize("unit", get_args(Unit))
def test_every_registered_type_is_written_by_its_producers(unit: Unit) -> None:
    found = {text for _, tree in trees(unit) for text in texts(tree)}
    assert not {event.type for event in EVENTS if unit in event.producers} - found


@pytest.mark.parametrize("unit", get_args(Unit))
def test_producers_write_registered_types_only(unit: Unit) -> None:
    dynamic = set()
    for path, tree in trees(unit):
        for value in written(tree):
            types = {text for text in texts(value) if re.fullmatch(r"[a-z][a-z0-9-]*(\.[a-z0-9-]+)+", text)}
            for type_ in types:
                event = EVENTS.get(type_)
                assert event is not None and unit in event.producers, f"{path}: {type_}"
            if not types and isinstance(value, ast.Name | ast.Attribute):
                dynamic.add(f"{path}: {ast.unparse(value)}")
    assert dynamic == {site for site in DYNAMIC if any(site.startswith(path) for path, _ in trees(unit))}


def test_nobody_else_makes_entries() -> None:
    """So that the two tests above see all producers there are."""
    seen = {path for unit in get_args(Unit) for path, _ in trees(unit)}
    for path in sorted((REPOSITORY / "vmm").rglob("*.py")):
        name = str(path.relative_to(REPOSITORY / "vmm"))
        if name not in seen and not name.startswith("audit/"):
            assert "audit.client" not in path.read_text(), name


def test_every_claimed_audit_event_is_served_or_pending() -> None:
    assert list(audit_events.problems(requirements.load(), EVENTS, audit_events.load_pending())) == []


def test_the_list_of_pending_events_only_shrinks() -> None:
    pending = audit_events.load_pending()
    assert len(pending) == len({one.key for one in pending}) == PENDING
    assert all(one.reason for one in pending)


_TAKEN_OUT = ("audit.start", "kernel.start", "session.end", "export.disconnect")


def test_the_join_finds_what_does_not_fit() -> None:
    required = requirements.load()
    pending = audit_events.load_pending()
    start = EVENTS.get("audit.start")
    assert start is not None
    invented = msgspec.structs.replace(start, type="audit.x", serves=(Serves("FAU_GEN.1", "Nothing"),))
    without = [event for event in EVENTS if event.type not in _TAKEN_OUT]
    served = Pending("FAU_GEN.1", "Audit functions stopped", 4, "r")
    unclaimed = Pending("FCS_IPSEC_EXT.1", "IPsec SA established or terminated", 4, "r")
    dropped = next(one for one in pending if one.sfr == "FPT_ML_EXT.1")
    listed = [*(one for one in pending if one is not dropped), served, unclaimed]
    found = list(audit_events.problems(required, Registry([*without, invented]), listed))
    assert found == [
        "FAU_GEN.1: Audit functions started: no registered type serves it, and it is not pending",
        f"FPT_ML_EXT.1: {dropped.event}: no registered type serves it, and it is not pending",
        "FTP_ITC_EXT.1: Trusted channel terminated: no registered type serves it, and it is not pending",
        "FTP_TRP.1: Trusted channel terminated: no registered type serves it, and it is not pending",
        "FAU_GEN.1: Audit functions stopped: is served, and need not be pending any more",
        "FCS_IPSEC_EXT.1: IPsec SA established or terminated: is pending, but no claimed requirement has it",
        "FAU_GEN.1: Nothing: audit.x serves it, but no requirement has it",
        "FIA_UIA_EXT.1: Administrator session started or ended: no type that serves it says end_time",
    ]


def test_every_field_of_a_record_is_explained_and_every_required_one_is_there() -> None:
    assert set(audit_events.MEANINGS) == audit_events.record_fields()
    required = requirements.load().audit_record_fields
    assert required and all(audit_events.NAMES[field.name] in audit_events.MEANINGS for field in required)


def test_the_documentation_is_up_to_date() -> None:
    made = audit_events.page(requirements.load(), EVENTS, audit_events.load_pending())
    assert audit_events.PAGE.read_text() == made, "run python3 -m tests.audit_events"
