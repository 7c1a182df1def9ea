"""`python3 -m vmm.console --tty /dev/console`: keep the status screen on a terminal."""

from __future__ import annotations

import argparse
import fcntl
import os
import time
from collections.abc import Callable

from vmm import errors
from vmm.console.facts import gather
from vmm.console.screen import compose
from vmm.errors import UserError

INTERVAL_S = 2.0
_STANDARD_OUTPUT = {"-", "/dev/stdout"}
_KDGKBTYPE = 0x4B33
_CLEAR = "\033[H\033[2J\033[3J"


def main() -> None:
    """Draw whenever the text has changed. Raises: UserError when the terminal cannot be opened or is gone."""
    parser = argparse.ArgumentParser(prog="python3 -m vmm.console", description="Show the status screen.")
    parser.add_argument("--tty", default="-", help="terminal to write to, or - for standard output")
    tty: str = parser.parse_args().tty
    try:
        # Opening /dev/stdout again would need rights on the terminal that only the one who opened it has.
        terminal = 1 if tty in _STANDARD_OUTPUT else os.open(tty, os.O_WRONLY | os.O_NOCTTY)
        keep_drawing(terminal, time.sleep)
    except OSError as error:
        raise UserError(f"{tty}: {error.strerror}") from None


def keep_drawing(terminal: int, sleep: Callable[[float], None]) -> None:
    """Draw for ever on an open terminal. Raises: OSError when it is gone."""
    clears = is_screen(terminal)
    shown = ""
    while True:
        text = compose(gather())
        if text != shown:
            _write(terminal, drawing(text, clears=clears))
            shown = text
        sleep(INTERVAL_S)


def drawing(text: str, *, clears: bool) -> bytes:
    """The bytes that show a text: on a screen in place of the old one, on a serial line below it."""
    # A terminal may be in raw mode, where a line feed does not return to the first column.
    body = text.replace("\n", "\r\n")
    return ((_CLEAR if clears else "\r\n") + body).encode()


def is_screen(terminal: int) -> bool:
    """Whether it is a virtual terminal with a screen (ioctl_console(2)) and not a serial line."""
    try:
        fcntl.ioctl(terminal, _KDGKBTYPE, b"\0")
    except OSError:
        return False
    return True


def _write(terminal: int, content: bytes) -> None:
    while content:
        content = content[os.write(terminal, content) :]


if __name__ == "__main__":
    errors.main(main)
