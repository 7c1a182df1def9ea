"""Status files: how a daemon that takes no calls says that it lives, and how it stands. They lie in memory."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from vmm.paths import ROOT

PATIENCE_S = 60.0
"""A file that is older is one of a daemon that hangs: each writes it every 15 seconds at least."""


class Said(Protocol):
    """What each of them holds: when it was written (monotonic seconds), and by which process."""

    @property
    def at(self) -> int: ...  # noqa: D102 - see above

    @property
    def pid(self) -> int: ...  # noqa: D102


T = TypeVar("T", bound=Said)


def write(path: Path, said: Said) -> None:
    """Replace a status file, for everybody who gets as far as its folder. One that cannot be written goes stale."""
    new = path.with_name(f".{path.name}.new")
    with suppress(OSError):
        # In memory, so there is nothing to sync.
        new.write_bytes(msgspec.json.encode(said))
        new.chmod(0o644)
        new.replace(path)


def read(path: Path, type: type[T], root: Path = ROOT) -> T | None:
    """What a daemon that lives says of itself; None if it does not, hangs, or says what is no such status.

    Arguments: ``path`` as vmm.paths has it; ``root`` is where it and /proc lie (tests have their own).
    """
    try:
        said = msgspec.json.decode((root / path.relative_to(ROOT)).read_bytes(), type=type)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    lives = (root / f"proc/{said.pid}").exists() and time.monotonic() - said.at < PATIENCE_S
    return said if lives else None
