"""What a long piece of work and those who wait for it say to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable

from vmm.update.errors import Cancelled


class Job:
    """One job's progress and the wish to end it; shared between its thread and the event loop."""

    def __init__(
        self, report: Callable[[int, int], None] = lambda done, total: None, begun: Callable[[], object] = lambda: None
    ) -> None:
        """Arguments: ``report`` is called with bytes done and bytes in all, ``begun`` once the job is on record;
        both from the job's thread.
        """
        self._report = report
        self.begun = begun
        self._cancelled = threading.Event()
        self._total = 0
        self._done = 0

    def cancel(self) -> None:
        """Ask the job to stop at its next chance."""
        self._cancelled.set()

    def check(self) -> None:
        """Called by the job between any two steps. Raises: Cancelled."""
        if self._cancelled.is_set():
            raise Cancelled()

    def expect(self, total: int) -> None:
        """Start counting anew, towards ``total`` bytes."""
        self._done, self._total = 0, total
        self._report(0, total)

    def advance(self, count: int) -> None:
        """Count bytes done. Raises: Cancelled."""
        self._done += count
        self._report(min(self._done, self._total), self._total)
        self.check()

    def wait(self, seconds: float) -> None:
        """Pause. Raises: Cancelled."""
        self._cancelled.wait(seconds)
        self.check()
