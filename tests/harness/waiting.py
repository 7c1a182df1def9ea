"""Waiting for things to become true, with a deadline and a name for what did not happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Expired(Exception):
    """Something did not happen in time; the text says what, and what was seen instead."""


class Deadline:
    """A point in time, ``seconds`` from now, by which ``what`` has to have happened."""

    def __init__(self, seconds: float, what: str) -> None:
        self.seconds = seconds
        self.what = what
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds left. Raises: Expired when there are none."""
        left = self._end - time.monotonic()
        if left <= 0:
            raise self.expired()
        return left

    def expired(self, seen: str = "") -> Expired:
        """The error that says that the time is up."""
        return Expired(f"{self.what}: not within {self.seconds:.0f} s" + (f"; {seen}" if seen else ""))


def poll(condition: Callable[[], T | None], seconds: float, what: str, *, interval: float = 0.2) -> T:
    """Ask until the answer is true and return it; for states that nobody announces.

    Raises: Expired after ``seconds``, naming the last false answer.
    """
    deadline = Deadline(seconds, what)
    while True:
        answer = condition()
        if answer:
            return answer
        try:
            time.sleep(min(interval, deadline.left()))
        except Expired:
            raise deadline.expired(f"last answer {answer!r}") from None
