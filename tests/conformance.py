"""``python3 -m tests.conformance``: which requirement is claimed, which tests check it, and how they ended."""

from __future__ import annotations

import argparse
import enum
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from tests import requirements, results
from tests.requirements import Bullet, Requirement
from tests.results import Result
from vmm.errors import main

OUTPUT = Path("build/conformance.json")


class State(enum.Enum):
    """What the tests say about a requirement."""

    PASSED = "passed"
    FAILED = "failed"
    PARTLY = "partly"
    NOT_RUN = "not run"
    NO_TEST = "no test"


class Line(msgspec.Struct, frozen=True):
    """One requirement with the tests that name it."""

    id: str
    name: str
    esr: list[str]
    claim: str
    reason: str
    state: State
    tests: dict[str, str]


class BulletLine(msgspec.Struct, frozen=True):
    """One bullet of the ESR: how many of the requirements behind it, as claimed, are in each state."""

    id: str
    text: str
    states: dict[str, int]


class Report(msgspec.Struct, frozen=True):
    """The whole report; ``image`` is the root hash of the image that was tested."""

    image: str
    esr: list[BulletLine]
    sfrs: list[Line]


def state_of(outcomes: Sequence[str]) -> State:
    """Join the outcomes of a requirement's tests: one failure outweighs all."""
    if not outcomes:
        return State.NO_TEST
    if "failed" in outcomes:
        return State.FAILED
    passed = outcomes.count("passed")
    return State.PASSED if passed == len(outcomes) else State.PARTLY if passed else State.NOT_RUN


def line_of(requirement: Requirement, found: Sequence[Result]) -> Line:
    """Join a requirement with the results of the tests that carry its id."""
    tests = {result.nodeid: result.outcome for result in found if requirement.id in result.sfr}
    return Line(
        id=requirement.id,
        name=requirement.name,
        esr=requirement.esr,
        claim=requirement.claim.decision,
        reason=requirement.claim.reason,
        state=state_of(list(tests.values())),
        tests=tests,
    )


def bullet_line(bullet: Bullet, lines: Sequence[Line]) -> BulletLine:
    """Count the states of the claimed requirements that serve a bullet."""
    served = [line.state.value for line in lines if bullet.id in line.esr and line.claim != "not-present"]
    return BulletLine(bullet.id, bullet.text, dict(Counter(served)))


def report_of(required: requirements.Requirements, found: results.Results) -> Report:
    """Join requirements and results."""
    lines = [line_of(requirement, found.results) for requirement in required.sfrs]
    return Report(found.image, [bullet_line(bullet, lines) for bullet in required.esr], lines)


def markdown(report: Report) -> str:
    """The report as Markdown that reads well in a terminal, too."""
    width = max(len(line.id) for line in report.sfrs)
    text = [
        "# Conformance",
        "",
        f"Image {report.image or 'not built: only tests without it can have run'}",
        "",
        "## Requirements",
        "",
        f"| {'requirement':{width}} | {'claim':11} | {'result':7} | tests | name |",
        f"|{'-' * (width + 2)}|{'-' * 13}|{'-' * 9}|{'-' * 7}|------|",
    ]
    for line in report.sfrs:
        passed = sum(outcome == "passed" for outcome in line.tests.values())
        tests = f"{passed}/{len(line.tests)}" if line.tests else "-"
        text.append(f"| {line.id:{width}} | {line.claim:11} | {line.state.value:7} | {tests:5} | {line.name} |")
    text += ["", "## ESR", "", 'Requirements claimed, by result; only "passed" proves anything.', ""]
    for bullet in report.esr:
        counted = ", ".join(f"{bullet.states[s.value]} {s.value}" for s in State if s.value in bullet.states)
        text.append(f"- {bullet.id} ({counted or 'nothing claimed'}): {bullet.text}")
    not_passed = [(line.id, name, outcome) for line in report.sfrs for name, outcome in line.tests.items()
                  if outcome != "passed"]  # fmt: skip
    if not_passed:
        text += ["", "## Tests that did not pass", ""]
        text += [f"- {name}: {outcome} ({identifier})" for identifier, name, outcome in not_passed]
    return "\n".join(text) + "\n"


def entry(arguments: Sequence[str] | None = None) -> int:
    """Write the report and print it; the result is 1 when a marked test failed. Raises: UserError."""
    parser = argparse.ArgumentParser(prog="python3 -m tests.conformance", description=__doc__)
    parser.add_argument("--results", type=Path, default=results.RESULTS, help="default: %(default)s")
    parser.add_argument("--requirements", type=Path, default=requirements.REQUIREMENTS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    options = parser.parse_args(arguments)
    report = report_of(requirements.load(options.requirements), results.load(options.results))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    print(markdown(report), end="")
    return 1 if any(line.state is State.FAILED for line in report.sfrs) else 0


if __name__ == "__main__":
    main(entry)
