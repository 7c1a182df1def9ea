"""The conformance report: joining requirements with results, and what the recorder writes down."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests import conformance, requirements, results
from tests.conformance import State
from tests.results import Result, Results
from vmm.errors import UserError

pytest_plugins = ["pytester"]

REQUIREMENTS = """
esr:
  - {id: E1, kind: mandatory, text: "Separate."}
  - {id: E2, kind: mandatory, text: "Whole."}
sfrs:
  - {id: FDP_A.1, name: A, kind: mandatory, esr: [E1], claim: {decision: meet, reason: r}, test: ignored}
  - {id: FDP_B.1, name: B, kind: mandatory, esr: [E1], claim: {decision: meet, reason: r}}
  - {id: FDP_C.1, name: C, kind: optional, esr: [E2], claim: {decision: not-present, reason: r}}
  - {id: FDP_D.1/X, name: D, kind: mandatory, esr: [E1, E2], claim: {decision: conditional, reason: r}}
"""


def result(nodeid: str, outcome: str, *sfr: str) -> Result:
    return Result(nodeid=nodeid, outcome=outcome, duration=1.0, sfr=list(sfr))


@pytest.fixture
def required(tmp_path: Path) -> Path:
    path = tmp_path / "requirements.yaml"
    path.write_text(REQUIREMENTS)
    return path


@pytest.mark.parametrize(
    ("outcomes", "state"),
    [
        ([], State.NO_TEST),
        (["passed"], State.PASSED),
        (["passed", "skipped"], State.PARTLY),
        (["skipped"], State.NOT_RUN),
        (["passed", "failed", "skipped"], State.FAILED),
    ],
)
def test_outcomes_join_to_a_state(outcomes: list[str], state: State) -> None:
    assert conformance.state_of(outcomes) is state


def test_the_report_joins_requirements_and_results(required: Path) -> None:
    found = Results("hash", [result("t::a", "passed", "FDP_A.1", "FDP_D.1/X"), result("t::d", "failed", "FDP_D.1/X")])
    report = conformance.report_of(requirements.load(required), found)
    assert {line.id: line.state for line in report.sfrs} == {
        "FDP_A.1": State.PASSED,
        "FDP_B.1": State.NO_TEST,
        "FDP_C.1": State.NO_TEST,
        "FDP_D.1/X": State.FAILED,
    }
    assert report.sfrs[3].tests == {"t::a": "passed", "t::d": "failed"}
    # A function that is not in the product is not held against its bullet.
    assert [bullet.states for bullet in report.esr] == [{"passed": 1, "no test": 1, "failed": 1}, {"failed": 1}]


def run(tmp_path: Path, required: Path, found: Results) -> int:
    results.save(found, tmp_path / "results.json")
    return conformance.entry(
        ["--results", str(tmp_path / "results.json"), "--requirements", str(required),
         "--output", str(tmp_path / "out/conformance.json")]
    )  # fmt: skip


def test_only_a_failed_test_makes_it_fail(tmp_path: Path, required: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, required, Results()) == 0
    assert "not built" in capsys.readouterr().out
    assert run(tmp_path, required, Results("hash", [result("t::a", "failed", "FDP_A.1")])) == 1
    text = capsys.readouterr().out
    assert "- t::a: failed (FDP_A.1)" in text
    assert "- E1 (1 failed, 2 no test): Separate." in text
    assert "- E2 (1 no test): Whole." in text
    written = msgspec.json.decode((tmp_path / "out/conformance.json").read_bytes())
    assert written["image"] == "hash"
    assert written["sfrs"][0]["state"] == "failed"


def test_an_unmarked_failure_is_not_its_business(tmp_path: Path, required: Path) -> None:
    assert run(tmp_path, required, Results("hash", [result("t::a", "failed")])) == 0


def test_a_new_image_drops_what_was_found_on_the_old_one() -> None:
    old = Results("one", [result("t::a", "passed"), result("t::b", "failed")])
    again = results.merge(old, Results("one", [result("t::b", "passed")]))
    assert {r.nodeid: r.outcome for r in again.results} == {"t::a": "passed", "t::b": "passed"}
    assert results.merge(old, Results("two", [result("t::b", "passed")])).results == [result("t::b", "passed")]


def test_results_survive_the_file(tmp_path: Path) -> None:
    assert results.load(tmp_path / "none.json") == Results()
    found = Results("hash", [result("t::a", "passed", "FDP_A.1")])
    results.save(found, tmp_path / "new/results.json")
    assert results.load(tmp_path / "new/results.json") == found


def test_the_real_requirements_load() -> None:
    loaded = requirements.load()
    assert len(loaded.sfrs) == 50
    assert len(loaded.ids()) == 50
    assert {name for line in loaded.sfrs for name in line.esr} <= {bullet.id for bullet in loaded.esr}


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("esr: 5\nsfrs: []\n")
    with pytest.raises(UserError, match=r"bad.yaml: .*\$.esr"):
        requirements.load(tmp_path / "bad.yaml")


PROJECT = """
    import pytest

    @pytest.mark.sfr("FAU_GEN.1", "FCS_COP.1/Hash")
    def test_good():
        pass

    @pytest.fixture
    def broken():
        yield
        raise ValueError

    @pytest.mark.sfr("FAU_GEN.1")
    def test_breaks_afterwards(broken):
        pass

    def test_skips():
        pytest.skip("why")
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest("from tests.conftest import *\nfrom tests.conftest import pytest_configure\n")
    return pytester


def test_the_recorder_writes_every_outcome(project: pytest.Pytester) -> None:
    project.makepyfile(PROJECT)
    project.runpytest()
    found = {r.nodeid.split("::")[1]: r for r in results.load(project.path / results.RESULTS).results}
    assert {name: r.outcome for name, r in found.items()} == {
        "test_good": "passed",
        "test_breaks_afterwards": "failed",
        "test_skips": "skipped",
    }
    assert found["test_good"].sfr == ["FAU_GEN.1", "FCS_COP.1/Hash"]
    assert found["test_good"].markers == ["sfr"]


def test_what_a_run_leaves_out_is_on_record_but_replaces_nothing(project: pytest.Pytester) -> None:
    def outcomes() -> dict[str, str]:
        return {r.nodeid.split("::")[1]: r.outcome for r in results.load(project.path / results.RESULTS).results}

    project.makepyfile(PROJECT)
    project.runpytest("-k", "good")
    assert outcomes() == {"test_good": "passed", "test_breaks_afterwards": "not run", "test_skips": "not run"}
    project.runpytest("-k", "skips")
    assert outcomes() == {"test_good": "passed", "test_breaks_afterwards": "not run", "test_skips": "skipped"}


def test_an_unknown_requirement_stops_the_run(project: pytest.Pytester) -> None:
    project.makepyfile("import pytest\n@pytest.mark.sfr('FAU_GNE.1')\ndef test_x():\n    pass\n")
    outcome = project.runpytest()
    assert outcome.ret == pytest.ExitCode.USAGE_ERROR
    outcome.stderr.fnmatch_lines(["*test_x: sfr marker names no requirement: FAU_GNE.1*"])


def test_a_missing_image_fails_clearly(project: pytest.Pytester) -> None:
    project.makepyfile("def test_x(built_image):\n    pass\n")
    outcome = project.runpytest()
    outcome.assert_outcomes(errors=1)
    outcome.stdout.fnmatch_lines(["*build/image/holdfast.raw is missing: run make image*"])
