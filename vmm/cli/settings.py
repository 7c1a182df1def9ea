"""What the command keeps for its user: the remotes, each with its pinned certificate, and one identity."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from vmm import atomic
from vmm.errors import NotFound, UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class Remote(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A host: its URL and the SHA-256 of the server certificate (DER, lower-case hexadecimal) it must show.

    ``banner_day`` is the last day (ISO date) on which its banner was shown.
    """

    url: str
    fingerprint: str
    banner_day: str = ""


class Remotes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The content of remotes.json."""

    default: str = ""
    remotes: dict[str, Remote] = {}


def directory() -> Path:
    """Where it all lies: $HOLDFAST_CONFIG_DIR, or holdfast/ in $XDG_CONFIG_HOME or ~/.config."""
    if own := os.environ.get("HOLDFAST_CONFIG_DIR"):
        return Path(own)
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "holdfast"


def key_path() -> Path:
    """The identity's private key (PEM, mode 0600)."""
    return directory() / "client.key"


def certificate_path() -> Path:
    """The identity's certificate (PEM)."""
    return directory() / "client.crt"


def load() -> Remotes:
    """The known remotes; none when nothing was saved yet. Raises: UserError when the file is damaged."""
    path = directory() / "remotes.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=Remotes)
    except FileNotFoundError:
        return Remotes()
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", hint="correct it or remove it, then add the remotes again") from None


def save(remotes: Remotes) -> None:
    """Keep the remotes. Raises: OSError."""
    make_directory()
    atomic.write(
        directory() / "remotes.json", msgspec.json.format(msgspec.json.encode(remotes), indent=2) + b"\n", mode=0o600
    )


def make_directory() -> None:
    """Make the folder, closed to others. Raises: OSError."""
    directory().mkdir(parents=True, exist_ok=True, mode=0o700)


def with_remote(remotes: Remotes, name: str, remote: Remote, *, default: bool = False) -> Remotes:
    """The remotes with one added or replaced; the first one becomes the default. Raises: UserError."""
    if not _NAME.fullmatch(name):
        raise UserError(f"not a name for a remote: {name!r}", hint="use letters, digits, '.', '_' and '-'")
    return Remotes(name if default or not remotes.default else remotes.default, {**remotes.remotes, name: remote})


def without_remote(remotes: Remotes, name: str) -> Remotes:
    """The remotes without one. Raises: NotFound."""
    find(remotes, name)
    left = {key: remote for key, remote in remotes.remotes.items() if key != name}
    return Remotes("" if remotes.default == name else remotes.default, left)


def find(remotes: Remotes, name: str | None) -> tuple[str, Remote]:
    """A remote by name, or the default one. Raises: NotFound."""
    wanted = name or remotes.default
    if not wanted:
        raise NotFound(
            "no remote is chosen", hint="add one with `holdfast remote add NAME URL`, or choose one with --remote"
        )
    if wanted not in remotes.remotes:
        known = ", ".join(sorted(remotes.remotes)) or "none"
        raise NotFound(f"there is no remote {wanted!r}", hint=f"known remotes: {known}")
    return wanted, remotes.remotes[wanted]
