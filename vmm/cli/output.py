"""How results look: tables, sizes, progress; and how the user's own figures are read."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence

from vmm.errors import UserError, printable

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,15})(?:([KMGT])(?:i?B)?)?", re.IGNORECASE)
_PROGRESS_INTERVAL_S = 0.2


def parse_size(text: str) -> int:
    """Bytes from "512M", "1G", "1GiB" (powers of 1024) or a plain number of bytes. Raises: UserError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match[1]) == 0:
        raise UserError(f"not a size: {text!r}", hint="write it as 512M, 20G or a number of bytes")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def human_size(size: int) -> str:
    """A size for people, as 512 MiB or 1.5 GiB."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"


def fingerprint_text(fingerprint: str) -> str:
    """A fingerprint as other tools show it, in upper-case pairs joined by colons."""
    return ":".join(fingerprint[i : i + 2] for i in range(0, len(fingerprint), 2)).upper()


def clean(text: str) -> str:
    """Text from elsewhere without control characters, so that it cannot steer the terminal; line ends stay."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under titles in aligned columns."""
    lines = [list(titles), *([clean(cell).replace("\n", " ") for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_fields(fields: Sequence[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        print(f"{name + ':':<{width + 1}} {clean(value).replace(chr(10), ' ')}".rstrip())


def print_json(raw: bytes) -> None:
    """Print the API's JSON exactly as it came; on a terminal, which it must not steer, what does not print escaped."""
    text = raw.decode()
    shown = printable(text) if sys.stdout.isatty() else text
    print(shown, end="" if raw.endswith(b"\n") else "\n", flush=True)


def confirm(question: str) -> bool:
    """Ask on the terminal; anything but yes is no."""
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


class Progress:
    """One line on a terminal that shows how far a transfer is; silent elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._started = self._shown = time.monotonic()
        self._on = sys.stderr.isatty()

    def update(self, done: int) -> None:
        """Show that ``done`` bytes have gone."""
        now = time.monotonic()
        if not self._on or (now - self._shown < _PROGRESS_INTERVAL_S and done < self._total):
            return
        self._shown = now
        percent = 100 * done // self._total if self._total else 100
        rate = human_size(int(done / max(now - self._started, 0.001)))
        print(
            f"\r{self._what}: {percent} % of {human_size(self._total)}, {rate}/s\033[K",
            end="",
            file=sys.stderr,
            flush=True,
        )

    def end(self) -> None:
        """Leave the line."""
        if self._on:
            print(file=sys.stderr)
