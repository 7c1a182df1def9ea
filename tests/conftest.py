"""Fixtures for tests that boot the image, the sfr marker, and the record of results."""

from __future__ import annotations

import re
import shutil
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import pytest

from tests import requirements, results
from tests.harness.checkpoint import Checkpoint, fresh, host_checkpoint
from tests.harness.diagnosis import describe
from tests.harness.host import Host
from tests.harness.image import Files, Image
from tests.harness.machine import Hardware
from tests.harness.seed import Identity, configuration, identities, seed_credential
from tests.results import NOT_RUN, Result, Results
from vmm.errors import UserError

_TEST_FOLDER = Path("build/test")


# -- markers and results -------------------------------------------------------------------------------------------


class Recorder:
    """Collects how each test ended and writes it down at the end of the run."""

    def __init__(self) -> None:
        self._properties: dict[str, dict[str, list[str]]] = {}
        self._outcomes: dict[str, str] = {}
        self._durations: dict[str, float] = {}
        self._left_out: list[Result] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Refuse markers that name no requirement, so that a misspelt one cannot go unnoticed."""
        known = requirements.load().ids()
        for item in items:
            ids = requirement_ids(item)
            if unknown := [name for name in ids if name not in known]:
                raise pytest.UsageError(f"{item.nodeid}: sfr marker names no requirement: {', '.join(unknown)}")
            # Reports carry these from the processes that run the tests to the one that records them.
            item.user_properties.append(("sfr", ids))
            item.user_properties.append(("markers", marker_names(item)))

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Remember what is left out of this run."""
        self._left_out += [
            Result(item.nodeid, NOT_RUN, 0.0, requirement_ids(item), marker_names(item)) for item in items
        ]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Join set-up, call and tear-down of a test: a failure in any of them is the test's."""
        self._properties[report.nodeid] = {name: list(names) for name, names in report.user_properties}  # type: ignore[call-overload]
        self._durations[report.nodeid] = self._durations.get(report.nodeid, 0.0) + report.duration
        decisive = report.when == "call" or report.outcome != "passed"
        if decisive and self._outcomes.get(report.nodeid) != "failed":
            self._outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Write the results over those of earlier runs against the same image."""
        if hasattr(session.config, "workerinput"):
            return  # the process that started this one collects everything
        found = [
            Result(
                nodeid=name,
                outcome=outcome,
                duration=round(self._durations[name], 3),
                # A test whose process crashed has none.
                sfr=self._properties[name].get("sfr", []),
                markers=self._properties[name].get("markers", []),
            )
            for name, outcome in self._outcomes.items()
        ]
        try:
            image = Image.built().root_hash
        except UserError:
            image = ""
        if found:
            results.save(results.merge(results.load(), Results(image, found + self._left_out)))


def marker_names(item: pytest.Item) -> list[str]:
    """The names of a test's markers."""
    return sorted({marker.name for marker in item.iter_markers()})


def requirement_ids(item: pytest.Item) -> list[str]:
    """The requirements that a test's sfr markers name."""
    return sorted({str(name) for marker in item.iter_markers("sfr") for name in marker.args})


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker and the recorder."""
    config.addinivalue_line("markers", "sfr(id, ...): the requirements (requirements.yaml) that the test checks")
    config.addinivalue_line("markers", "long: for `make test-all`; `make test` leaves it out")
    config.pluginmanager.register(Recorder(), "holdfast-recorder")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With a failure comes what its hosts look like; on a machine of somebody else's there is no second look."""
    report = yield
    if report.failed and report.when == "call":
        hosts = [value for value in getattr(item, "funcargs", {}).values() if isinstance(value, Host) and value.running]
        report.sections += [("the host under test", describe(host)) for host in hosts]
    return report


# -- the image under test ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def built_image() -> Image:
    """The image that `make image` left; a test that needs it fails when it is missing."""
    try:
        return Image.built()
    except UserError as error:
        pytest.fail(f"{error.message}: {error.hint}", pytrace=False)


@pytest.fixture(scope="session")
def clients() -> dict[str, Identity]:
    """The administrators of the seeded host by role: admin, auditor, operator, user."""
    return identities(_TEST_FOLDER / "identities")


@pytest.fixture(scope="session")
def seed(clients: dict[str, Identity]) -> str:
    """The SMBIOS string with the usual configuration."""
    return seed_credential(configuration(list(clients.values())))


@pytest.fixture(scope="session")
def booted(built_image: Image, seed: str) -> Checkpoint:
    """The checkpoint of the booted host, made by the first test that needs it."""
    return host_checkpoint(built_image, seed)


@pytest.fixture
def workdir(request: pytest.FixtureRequest) -> Path:
    """An empty folder for a test's machine; it stays for its logs until the test runs again."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", request.node.nodeid.removeprefix("tests/"))
    directory = _TEST_FOLDER / "run" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def host(booted: Checkpoint, workdir: Path) -> Iterator[Host]:
    """A booted, seeded host with API and test agent up, its clock set; changes end with the test."""
    machine = booted.host(workdir)
    with machine:
        machine.agent.set_clock()
        yield machine
    machine.files.discard()


@pytest.fixture
def faulty_host(booted: Checkpoint, workdir: Path) -> Iterator[Host]:
    """As host, on a disk whose power can be cut and that can be made to fail."""
    machine = booted.host(workdir, faulty_disk=True)
    with machine:
        machine.agent.set_clock()
        yield machine
    machine.files.discard()


@pytest.fixture
def fresh_disk(built_image: Image, workdir: Path) -> Iterator[Files]:
    """The release image, never booted, on a new machine: pass it to Host with a seed and switch it on."""
    files = fresh(workdir, built_image.disk, Hardware().disk)
    yield files
    files.discard()
