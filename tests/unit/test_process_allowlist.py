"""Rules for the whole repository: who may run programs, who may import whom, how long a module is, what is never
committed."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("vmm", "image", "signing", "tests")
_NOT_COMMITTED = {"build", ".git", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".venv"}

RUNS_PROGRAMS = {
    "vmm/process.py": "the one place",
    "image/finalize": "runs inside mkosi, where vmm cannot be imported",
    "image/builder/host.py": "replaces itself by its own command in a user namespace",
    "image/builder/__main__.py": "replaces itself by the command in the tools tree",
    "tests/harness/guest_agent.py": "runs alone on the host under test, where vmm.process may be what is broken",
    "tests/bench/inside.py": "the same: runs on the host under test, here to measure",
    "tests/harness/workstation.py": "types into our own command line at a terminal (pexpect)",
    "tests/unit/test_cli_console.py": "gives our command line a terminal as its three standard files",
    "tests/unit/test_volumes.py": "gives the converter a socket as standard input, as systemd does",
}
USES_LIBVIRT = {
    "vmm/hypervisor/console.py": "streams",
    "vmm/hypervisor/driver.py": "everything else",
    "tests/bench/inside.py": "the create that core's is compared with",
    "tests/unit/test_hypervisor_driver.py": "its flags and errors, on a pretended connection",
}
_MODULES = {"subprocess", "multiprocessing"}
_CALLS = {
    "os": re.compile(r"system|popen|fork|forkpty|exec[lv]p?e?|spawn[lv]p?e?|posix_spawnp?"),
    "asyncio": re.compile(r"create_subprocess_(exec|shell)"),
    "pty": re.compile(r"spawn|fork"),
    "pexpect": re.compile(r"spawnu?|run|runu"),
}

MOST_LINES = 400
_LEAF = {"errors", "process", "wire", "paths", "notify", "atomic", "clock", "origin", "release", "status", "tls", "tpm"}


def committed() -> Iterator[Path]:
    """Every file that belongs to the repository."""
    folders = [REPOSITORY]
    while folders:
        for entry in sorted(folders.pop().iterdir()):
            if entry.name in _NOT_COMMITTED or entry.name.endswith(".egg-info"):
                continue
            if entry.is_dir() and not entry.is_symlink():
                folders.append(entry)
            elif entry.is_file():
                yield entry


def programs() -> list[Path]:
    """Every Python source, those without a suffix included."""
    found = [path for path in committed() if path.relative_to(REPOSITORY).parts[0] in SOURCES]
    return [path for path in found if path.suffix == ".py" or path.read_bytes().startswith(b"#!/usr/bin/python3")]


def name_of(path: Path) -> str:
    """A file as people write it."""
    return str(path.relative_to(REPOSITORY))


@dataclass(frozen=True)
class Facts:
    """What the rules want to know of a source: a module imported or name taken from one, x.y, f(argument=...)."""

    imports: set[str]
    attributes: set[tuple[str, str]]
    arguments: set[str]

    @property
    def runs_programs(self) -> bool:
        """Whether it could start a program without vmm.process."""
        names = {tuple(name.split(".", 1)) for name in self.imports} | self.attributes
        return any(
            name[0] in _MODULES or (len(name) == 2 and name[0] in _CALLS and _CALLS[name[0]].fullmatch(name[1]))
            for name in names
        )


def facts(source: str | bytes) -> Facts:
    """Look through a source."""
    found = Facts(set(), set(), set())
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                found.imports.update(alias.name for alias in node.names)
            case ast.ImportFrom():
                assert node.level == 0, "imports here are absolute"
                found.imports.update({node.module or ""}, (f"{node.module}.{alias.name}" for alias in node.names))
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                found.attributes.add((name, attribute))
            case ast.keyword(arg=str(name)):
                found.arguments.add(name)
    return found


@functools.cache
def facts_of(path: Path) -> Facts:
    """Look through a file, once for all rules."""
    return facts(path.read_bytes())


def allowed_imports() -> dict[str, set[str]]:
    """The table in docs/architecture.md: package → packages that it may import."""
    text = (REPOSITORY / "docs/architecture.md").read_text()
    table = re.search(r"^```imports\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert table, "docs/architecture.md has no table of imports"
    rows = (line.partition("->") for line in table[1].splitlines())
    return {package.strip(): set(others.split()) for package, _, others in rows}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import subprocess", True),
        ("from subprocess import run", True),
        ("import os\nos.execvp('a', ['a'])", True),
        ("from os import system", True),
        ("import asyncio\nasyncio.create_subprocess_exec('a')", True),
        ("import pexpect\npexpect.spawn('a')", True),
        ("import pty\npty.openpty()", False),
        ("import os\nos.path.join('a', 'b')", False),
        ("from vmm.process import run", False),
    ],
)
def test_the_rule_finds_what_it_is_for(source: str, expected: bool) -> None:
    """The search below is not blind."""
    assert facts(source).runs_programs is expected


def test_only_listed_files_run_programs() -> None:
    """Whoever needs a program calls vmm.process.run or spawn; the exceptions are listed with their reason."""
    assert {name_of(path) for path in programs() if facts_of(path).runs_programs} == set(RUNS_PROGRAMS)


def test_no_shell_strings() -> None:
    """No argument shell=True anywhere: arguments are lists."""
    for path in programs():
        assert "shell" not in facts_of(path).arguments, name_of(path)


def test_only_hypervisor_imports_libvirt() -> None:
    """Everybody else on the host sees vmm.hypervisor.types."""
    assert {name_of(path) for path in programs() if "libvirt" in facts_of(path).imports} == set(USES_LIBVIRT)


def test_only_signing_and_image_see_private_keys() -> None:
    """The host software and the parts that mkosi runs know nothing of the key set."""
    found = {path for path in programs() if any(name.split(".")[0] == "signing" for name in facts_of(path).imports)}
    assert {path.relative_to(REPOSITORY).parts[0] for path in found} <= {"image", "signing", "tests"}


def test_packages_import_one_way() -> None:
    """The packages of vmm import only what docs/architecture.md allows them; that table has no circle."""
    allowed = allowed_imports()
    packages = {path.parent.name for path in (REPOSITORY / "vmm").glob("*/__init__.py")}
    assert set(allowed) == packages
    wrong = []
    for path in programs():
        parts = path.relative_to(REPOSITORY).parts
        if parts[0] != "vmm":
            continue
        package = parts[1] if len(parts) > 2 else ""
        for name in facts_of(path).imports:
            imported = name.split(".")[1] if name.startswith("vmm.") else ""
            if imported in packages - {package} - allowed.get(package, set()):
                wrong.append(f"{name_of(path)} imports {name}")
            if not package and imported in packages:
                wrong.append(f"{name_of(path)} is a leaf and imports {name}")
    assert not wrong
    seen: set[str] = set()
    while ready := {package for package in packages - seen if allowed[package] <= seen}:
        seen |= ready
    assert seen == packages, f"a circle among {packages - seen}"


def test_the_host_software_stands_alone() -> None:
    """vmm imports neither builder nor tests, and the modules directly in it are those that the documents name."""
    for path in programs():
        if path.relative_to(REPOSITORY).parts[0] == "vmm":
            roots = {name.split(".")[0] for name in facts_of(path).imports}
            assert not roots & {"image", "signing", "tests"}, name_of(path)
    assert {path.stem for path in (REPOSITORY / "vmm").glob("*.py")} - {"__init__"} == _LEAF


def test_modules_are_short() -> None:
    """At most 400 lines each."""
    long = {name_of(path): path.read_text().count("\n") for path in programs()}
    assert not {name: lines for name, lines in long.items() if lines > MOST_LINES}


# Written so that this file does not hold what it looks for.
_FORBIDDEN = {
    "the host name of a registry or mirror": re.compile(
        r"\b(?:[a-z0-9-]+\.)*(?:" + r"debian\.(?:org|net)|ubuntu\.com|pypi\.org|pythonhosted\.org|npmjs\.org|docker\.io"
        r"|ghcr\.io|quay\.io|crates\.io" + r")\b"
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE " + r"KEY-----\s+[A-Za-z0-9+/=]{40}"),
    "an absolute path of one machine": re.compile(r"(?<![\w/.])/(?:" + r"work|home/[a-z]|Users/[A-Za-z])[\w/.-]*"),
}


@pytest.mark.parametrize("what", _FORBIDDEN)
def test_nothing_forbidden_is_committed(what: str) -> None:
    """The repository names no machine, no registry, and holds no secret."""
    pattern = _FORBIDDEN[what]
    found = []
    for path in committed():
        text = path.read_bytes().decode(errors="replace")
        found += [f"{name_of(path)}: {match[0]}" for match in pattern.finditer(text) if path != Path(__file__)]
    assert not found
