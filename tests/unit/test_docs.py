"""The documentation is tested: its commands exist, its paths and links lead somewhere, its figures are the code's."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from signing import cli as release_cli
from signing.keys import open_keys
from tests.harness.ceremony import make_release_keys
from vmm.cli.main import build_parser

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

_FENCE = re.compile(r"^[ >]*```(\w*)\n(.*?)^[ >]*```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_MADE = "build/"


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def page(request: pytest.FixtureRequest) -> Path:
    """Each page in turn."""
    path: Path = request.param
    return path


def spans(page: Path) -> list[str]:
    """What stands in backticks within the text."""
    return _CODE.findall(_FENCE.sub("", page.read_text()))


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of the page's shell blocks and of its backticks, as words, without what a shell does itself."""
    blocks = [block for language, block in _FENCE.findall(page.read_text()) if language == "sh"]
    for line in [*"\n".join(blocks).replace("\\\n", " ").splitlines(), *spans(page)]:
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else []
        for stop in (">", "|"):
            words = words[: words.index(stop)] if stop in words else words
        if words:
            yield words


def targets() -> set[str]:
    """The Makefile's targets."""
    return set(re.findall(r"^([a-z][a-z-]*):(?!=)", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_make_commands_exist(page: Path) -> None:
    """Every `make X` is a target."""
    named = {
        word
        for words in commands(page)
        if words[0] == "make"
        for word in words[1:]
        if re.fullmatch(r"[a-z][a-z-]*", word)
    }
    assert named <= targets()


def test_readme_names_the_two_commands() -> None:
    """A reader finds how to run and how to test, and the second is what CI runs."""
    named = [words for words in commands(REPOSITORY / "README.md") if words[0] == "make"]
    assert ["make", "run"] in named
    assert ["make", "test"] in named
    assert "make test" in (REPOSITORY / ".ci/run").read_text()


@pytest.mark.parametrize("program", ["holdfast", "holdfast-release"])
def test_holdfast_commands_parse(page: Path, program: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `holdfast …` is accepted by the command line's own parser; a mere name of a command must be one."""
    parser = {"holdfast": build_parser, "holdfast-release": release_cli.build_parser}[program]()
    for words in commands(page):
        if words[0] != program or not words[1:]:
            continue
        try:
            parser.parse_args(words[1:])
        except SystemExit as ended:
            # "`holdfast seed`" within a sentence names the command without its arguments.
            is_name = known_prefix(parser, words[1:]) and " ".join(words) in spans(page)
            assert ended.code == 0 or is_name, f"{' '.join(words)}: {capsys.readouterr().err}"


def known_prefix(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    """Whether all words are commands and options, one below the other."""
    for word in words:
        if word.startswith("-"):
            if word not in parser._option_string_actions:
                return False
            continue
        choices = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not choices or word not in choices[0]:
            return False
        parser = choices[0][word]
    return True


def test_paths_exist(page: Path) -> None:
    """Every path of the repository in backticks is there; what a build makes is not in the repository."""
    top = {entry.name for entry in REPOSITORY.iterdir()}
    for span in spans(page):
        if re.fullmatch(r"[\w.@/-]+", span) and span.split("/")[0] in top and not span.startswith(_MADE):
            assert (REPOSITORY / span).exists(), f"{span} does not exist"


def test_relative_links_resolve(page: Path) -> None:
    """Every link to a file or heading leads there; there are no links to elsewhere that could rot."""
    for link in _LINK.findall(page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in headings(target), f"{link}: no such heading"


def test_every_page_is_linked_from_the_readme() -> None:
    """Nobody has to search for documentation."""
    linked = {Path(link.partition("#")[0]).name for link in _LINK.findall((REPOSITORY / "README.md").read_text())}
    assert {page.name for page in PAGES if page.name != "README.md"} <= linked


def test_limits_are_those_of_the_build() -> None:
    """The table of limits in docs/architecture.md is image/limits.json."""
    limits = json.loads((REPOSITORY / "image/limits.json").read_text())
    text = (REPOSITORY / "docs/architecture.md").read_text()
    rows = dict(re.findall(r"^ *\| `(\w+)` \| (\d+) \|", text, re.MULTILINE))
    assert {name: int(value) for name, value in rows.items()} == limits
    guide = (REPOSITORY / "docs/operators-guide.md").read_text()
    assert f"at most {limits['root_slot_fill_percent']} % of {limits['root_slot_bytes']} bytes" in guide


def test_health_table_names_every_check() -> None:
    """The operator's guide explains each check of vmm/core, and no other."""
    guide = (REPOSITORY / "docs/operators-guide.md").read_text()
    section = guide.partition("## Health")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE))
    platform = re.findall(r'^            "([a-z-]+)": ', (REPOSITORY / "vmm/core/health.py").read_text(), re.MULTILINE)
    daemon = re.findall(r'verdicts\["([a-z-]+)"\](?:,| = )', (REPOSITORY / "vmm/core/daemon.py").read_text())
    assert platform and daemon
    assert explained == {*platform, *daemon}


def test_key_ceremony_makes_a_release_set(tmp_path: Path) -> None:
    """The commands of docs/key-ceremony.md, run as they stand, make a key set that a release build takes."""
    keys = open_keys(make_release_keys(tmp_path), release=True)
    assert keys.owner
    assert not keys.key("test").exists()
