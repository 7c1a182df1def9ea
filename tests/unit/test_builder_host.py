"""The way into the tools tree: what is missing is named or installed, a user gets a namespace, mirrors are found."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from image.builder import __main__ as builder
from image.builder import host
from image.builder.layout import Layout
from vmm.errors import UserError
from vmm.process import Argument, CommandFailed

USER, ROOT = 1000, 0


class Replaced(Exception):
    """The program replaced itself; nothing of ours runs on."""


@dataclass
class Machine:
    """A machine of which nothing is used: what is installed on it, and what was run."""

    patch: pytest.MonkeyPatch
    folder: Path
    ran: list[list[str]] = field(default_factory=list)
    answer: Callable[[list[str]], int] = lambda command: 0

    def become(self, uid: int, *, programs: Sequence[str], keyring: bool = True) -> None:
        """Have an account, these programs, and perhaps Debian's keyring."""
        path = self.folder / "keyring.gpg"
        path.touch()
        self.patch.setattr("os.geteuid", lambda: uid)
        self.patch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name in programs else None)
        self.patch.setattr(host, "_KEYRING", path if keyring else self.folder / "nothing")

    def run(self, command: Sequence[Argument], *, check: bool = True, **_: Any) -> Any:
        """In place of vmm.process.run."""
        words = [os.fspath(word) for word in command]
        self.ran.append(words)
        code = self.answer(words)
        if check and code:
            raise CommandFailed(words, code, "it says why")
        return SimpleNamespace(returncode=code)

    def replace(self, program: str, arguments: list[str]) -> None:
        """In place of execvp(3)."""
        self.ran.append(arguments)
        raise Replaced(program)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(monkeypatch, tmp_path)
    monkeypatch.setattr(host, "run", made.run)
    monkeypatch.setattr("os.execvp", made.replace)
    return made


EVERYTHING = ("mmdebstrap", "bwrap", "newuidmap", "apt-get")


# -- what is missing -----------------------------------------------------------------------------------------------


def test_a_user_is_told_the_one_command_that_installs_what_is_missing(machine: Machine) -> None:
    machine.become(USER, programs=("mmdebstrap", "apt-get"), keyring=False)
    with pytest.raises(UserError, match="not installed: bubblewrap uidmap debian-archive-keyring") as refused:
        host.become_root()
    packages = "bubblewrap uidmap debian-archive-keyring"
    assert refused.value.hint == f"sudo apt-get install --no-install-recommends {packages}"
    assert machine.ran == []


def test_root_has_installed_what_is_missing(machine: Machine, layout: Layout) -> None:
    machine.become(ROOT, programs=("newuidmap", "apt-get"))
    host.become_root()
    assert machine.ran == [], "root needs no namespace"
    machine.answer = making(layout)
    host.make_tools(layout)
    assert machine.ran[:2] == [
        ["apt-get", "update"],
        ["apt-get", "install", "--yes", "--no-install-recommends", "mmdebstrap", "bubblewrap"],
    ]


def test_without_apt_root_is_told_what_to_install(machine: Machine, layout: Layout) -> None:
    machine.become(ROOT, programs=("bwrap", "newuidmap"))
    with pytest.raises(UserError, match="not installed: mmdebstrap") as refused:
        host.make_tools(layout)
    assert "this system's package manager" in refused.value.hint
    assert machine.ran == []


# -- the user namespace --------------------------------------------------------------------------------------------


def test_a_user_starts_again_as_root_of_a_namespace(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.become(USER, programs=EVERYTHING)
    monkeypatch.setattr("sys.argv", ["image.builder", "tools", "true"])
    with pytest.raises(Replaced, match="unshare"):
        host.become_root()
    tried, entered = machine.ran
    assert tried[-1] == "true"
    assert entered == [*tried[:-1], sys.executable, "-m", "image.builder", "tools", "true"]
    # Without a range of ids the tree would have no owners but root.
    assert {"--user", "--map-root-user", "--map-auto", "--mount"} < set(entered)


def test_where_namespaces_are_forbidden_it_is_said_what_allows_them(machine: Machine) -> None:
    machine.become(USER, programs=EVERYTHING)
    machine.answer = lambda command: 1
    with pytest.raises(UserError, match="no user namespace with subordinate user ids") as refused:
        host.become_root()
    for way in ("kernel.apparmor_restrict_unprivileged_userns=0", "/etc/subuid", "be root"):
        assert way in refused.value.hint
    assert len(machine.ran) == 1


def test_a_command_goes_on_inside_the_tools_tree(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.become(ROOT, programs=EVERYTHING)
    made: list[Layout] = []
    monkeypatch.setattr(host, "make_tools", made.append)
    monkeypatch.delenv("HOLDFAST_TOOLS", raising=False)
    monkeypatch.setattr("sys.argv", ["image.builder", "tools", "pytest", "-q"])
    with pytest.raises(Replaced, match="bwrap"):
        builder.entry()
    (entered,) = machine.ran
    assert entered[-4:] == ["env", "HOLDFAST_TOOLS=1", "pytest", "-q"]
    assert entered[1:4] == ["--bind", str(made[0].tools), "/"]


# -- mirrors -------------------------------------------------------------------------------------------------------


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A repository that needs two packages in its tools tree, and a mirror of its own."""
    (tmp_path / "repository/image").mkdir(parents=True)
    (tmp_path / "repository/image/tools.packages").write_text("# why\n\nmkosi\nzstd\n")
    return Layout(repository=tmp_path / "repository", mirror="https://mirror.example/debian")


def uris(sources: str) -> list[str]:
    """Where packages come from, Debian's first and its security updates' second."""
    return [line.removeprefix("URIs: ") for line in sources.splitlines() if line.startswith("URIs: ")]


@pytest.mark.parametrize("written", ["https://mirror.example/debian", "https://mirror.example/debian/"])
def test_mirror_takes_the_place_of_the_machines_own(
    written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sources.list").write_text(
        "deb http://own.example/debian trixie main\ndeb http://own.example/debian-security trixie-security main\n"
    )
    monkeypatch.setenv("MIRROR", written)
    sources = host.apt_sources(Layout.from_environment(), tmp_path)
    assert uris(sources) == ["https://mirror.example/debian", "https://mirror.example/debian-security"]
    assert sources.count("Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n") == 2
    assert "Suites: trixie trixie-updates\n" in sources and "Suites: trixie-security\n" in sources
    monkeypatch.delenv("MIRROR")
    own = host.apt_sources(Layout.from_environment(), tmp_path)
    assert uris(own) == ["http://own.example/debian", "http://own.example/debian-security"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {
                "sources.list": "# deb http://old.example/debian bookworm main\n"
                "deb [arch=amd64] http://one.example/debian/ bookworm main # ours\n",
                "sources.list.d/security.sources": "Types: deb\n#URIs: http://old.example/debian-security\n"
                "URIs: https://two.example/debian-security\nSuites: bookworm-security\n",
                "sources.list.d/notes.txt": "http://not.example/debian http://not.example/debian-security",
            },
            ["http://one.example/debian", "https://two.example/debian-security"],
            id="debian-12-both-forms",
        ),
        pytest.param(
            {"sources.list.d/ubuntu.sources": "URIs: http://one.example/ubuntu/\nSuites: noble\n"},
            [],
            id="ubuntu",
        ),
        pytest.param({"sources.list": "deb http://one.example/debian trixie main\n"}, [], id="no-security-updates"),
        pytest.param({}, [], id="nothing"),
    ],
)
def test_mirrors_are_those_of_the_machine(files: dict[str, str], expected: list[str], tmp_path: Path) -> None:
    """Where it has none of Debian's, mmdebstrap's default holds."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert uris(host.apt_sources(Layout(), tmp_path)) == expected


# -- the tree ------------------------------------------------------------------------------------------------------


def making(layout: Layout) -> Callable[[list[str]], int]:
    """What mmdebstrap does, as far as it matters here."""

    def answer(command: list[str]) -> int:
        if command[0] == "mmdebstrap":
            (layout.build / "tools.new/etc").mkdir(parents=True)
        return 0

    return answer


def test_the_tree_is_made_of_verified_packages_once(machine: Machine, layout: Layout, tmp_path: Path) -> None:
    machine.become(ROOT, programs=EVERYTHING)
    machine.answer = making(layout)
    host.make_tools(layout)
    ((program, *words),) = machine.ran
    assert program == "mmdebstrap" and f"--keyring={tmp_path / 'keyring.gpg'}" in words
    assert "--include=mkosi,zstd" in words
    assert words[-1] == str(layout.build / "trixie.sources")
    assert "URIs: https://mirror.example/debian\n" in (layout.build / "trixie.sources").read_text()
    host.make_tools(layout)
    assert len(machine.ran) == 1
    host.make_tools(Layout(repository=layout.repository, mirror="https://other.example/debian"))
    assert len(machine.ran) == 2, "another mirror, and so perhaps other packages"


def test_a_tree_that_was_not_finished_is_not_used(machine: Machine, layout: Layout) -> None:
    machine.become(ROOT, programs=EVERYTHING)
    made = making(layout)
    machine.answer = lambda command: made(command) or 1
    with pytest.raises(CommandFailed, match="it says why"):
        host.make_tools(layout)
    assert not layout.tools.exists()
    machine.answer = made
    host.make_tools(layout)
    assert (layout.tools / "etc/holdfast-tools").exists()
