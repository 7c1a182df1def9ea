"""A kill at any moment of a command: clients find the state before or after, and the command works when run again."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from signing import store
from tests.unit.test_publish_rig import Killed, Rig, killed_at, make_key, noise, rig, rig_template

__all__ = ["rig", "rig_template"]


def every_kill(rig: Rig, monkeypatch: pytest.MonkeyPatch, command: Callable[[], None]) -> Iterator[bool]:
    """Kill a command before its first step that lasts, its second, and so on, each time from the same repository.

    Yields whether the command came to its end: False many times, True at last.
    """
    before = rig.folder / "before"
    shutil.copytree(rig.repository, before)
    done = False
    step = 0
    while not done:
        shutil.rmtree(rig.repository)
        shutil.copytree(before, rig.repository)
        with killed_at(monkeypatch, step):
            try:
                command()
                done = True
            except Killed:
                pass
        step += 1
        yield done
    assert step > 3


def test_publish(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release is offered whole or not at all."""
    rig.publish("1.0.0")
    folder = rig.built("1.1.0", root=noise(0)[:-4096] + noise(1, 4096))
    outcomes = []
    for done in every_kill(rig, monkeypatch, lambda: rig.release("publish", folder)):
        outcomes.append(rig.versions())
        assert outcomes[-1] in (["1.0.0"], ["1.0.0", "1.1.0"])
        if not done and len(outcomes) % 4 == 1:
            rig.release("refresh")
            assert rig.versions() == outcomes[-1]
            if outcomes[-1] == ["1.0.0"]:
                rig.release("publish", folder)
                rig.release("verify")
    assert outcomes[0] == ["1.0.0"]
    assert outcomes[-1] == ["1.0.0", "1.1.0"]


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_rotate(rig: Rig, monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    """A client that knows the first root follows at each step, and the keys' change is all or nothing."""
    rig.publish("1.0.0")
    make_key(rig.keys, "fresh")
    old = "root1" if role == "root" else role
    for _ in every_kill(rig, monkeypatch, lambda: rig.release("rotate", role, old, "fresh")):
        assert rig.versions() == ["1.0.0"]
        if not (rig.repository / "metadata/2.root.json").exists():
            rig.release("rotate", role, old, "fresh")
        rig.release("refresh", "--all")
        assert rig.versions() == ["1.0.0"]


def test_init(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kill leaves is no repository yet, and is made one by the next attempt."""
    shutil.rmtree(rig.repository)
    rig.repository.mkdir()
    for done in every_kill(rig, monkeypatch, lambda: rig.release("init")):
        if not done and not (rig.repository / "metadata/timestamp.json").exists():
            rig.release("init")
        assert rig.seen() == {}


def test_root_of_a_key_set(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """root.json is there whole or not at all, and the first one stays."""
    path = rig.keys / "root.json"
    for step in range(6):
        path.unlink(missing_ok=True)
        with killed_at(monkeypatch, step):
            try:
                rig.release("root")
            except Killed:
                pass
        whole = path.read_bytes() if path.exists() else b""
        rig.release("root")
        assert path.read_bytes().startswith(whole)
    assert whole


def test_create_never_replaces(tmp_path: Path) -> None:
    """Also when the file appears between the look and the write."""
    path = tmp_path / "file"
    assert store.create(path, b"first")
    assert not store.create(path, b"second")
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]
