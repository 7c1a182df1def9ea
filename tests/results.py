"""What the tests found: written by pytest (conftest.py), read by tests.conformance."""

from __future__ import annotations

from pathlib import Path

import msgspec

RESULTS = Path("build/test/results.json")
NOT_RUN = "not run"


class Result(msgspec.Struct, frozen=True):
    """How one test ended. ``duration`` is in seconds; ``sfr`` are the requirements that it claims to check.

    Tests that a run left out are in it as NOT_RUN, so that nobody takes the others for all.
    """

    nodeid: str
    outcome: str
    duration: float
    sfr: list[str] = []
    markers: list[str] = []


class Results(msgspec.Struct, frozen=True):
    """The newest result of each test against one image (its root hash; empty when none was built)."""

    image: str = ""
    results: list[Result] = []


def load(path: Path = RESULTS) -> Results:
    """Read results; no file means none. Raises: msgspec.DecodeError for a file that is something else."""
    return msgspec.json.decode(path.read_bytes(), type=Results) if path.exists() else Results()


def merge(old: Results, new: Results) -> Results:
    """Put a run's results over earlier ones; what was found on another image no longer counts."""
    kept = {r.nodeid: r for r in old.results} if old.image == new.image else {}
    kept.update({r.nodeid: r for r in new.results if r.outcome != NOT_RUN or r.nodeid not in kept})
    return Results(new.image, [kept[name] for name in sorted(kept)])


def save(results: Results, path: Path = RESULTS) -> None:
    """Write results as indented JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=2) + b"\n")
