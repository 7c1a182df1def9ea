"""`python3 -m vmm.console`: keep the status screen on the terminals that systemd opened, or on standard output."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence

from vmm import errors
from vmm.console.facts import gather
from vmm.console.screen import compose
from vmm.errors import UserError
from vmm.notify import passed_descriptors

INTERVAL_S = 2.0
_KDGKBTYPE = 0x4B33
_CLEAR = "\033[H\033[2J\033[3J"


class Terminal:
    """An open terminal that is drawn on; one whose other end stops reading holds nobody up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._clears = is_screen(descriptor)
        self._pending = b""
        self._next = b""
        os.set_blocking(descriptor, False)

    def show(self, text: str) -> None:
        """Draw a text once what is still on its way has gone out. Raises: OSError when the terminal is gone."""
        # Of several changes that could not be shown, the last one is enough.
        self._next = drawing(text, clears=self._clears)
        self.flush()

    def flush(self) -> None:
        """Go on with what the terminal did not take yet. Raises: OSError."""
        if not self._pending:
            self._pending, self._next = self._next, b""
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        except BlockingIOError:
            pass


def main() -> None:
    """Draw whenever the text has changed. Raises: UserError when a terminal is gone."""
    try:
        keep_drawing([Terminal(descriptor) for descriptor in passed_descriptors() or [1]], time.sleep)
    except OSError as error:
        raise UserError(f"a terminal is gone: {error.strerror}") from None


def keep_drawing(terminals: Sequence[Terminal], sleep: Callable[[float], None]) -> None:
    """Draw for ever on open terminals. Raises: OSError when one is gone."""
    shown = ""
    while True:
        text = compose(gather())
        for terminal in terminals:
            if text != shown:
                terminal.show(text)
            else:
                terminal.flush()
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


if __name__ == "__main__":
    errors.main(main)
