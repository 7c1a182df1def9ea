"""Child processes that do not outlive the test run, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.harness.waiting import Expired, poll
from vmm.process import Argument, spawn


class ProcessEnded(Exception):
    """A program that should run on has ended; the text holds the end of its log."""


class Guarded:
    """A running program with its output in ``log``; the kernel kills it when we die (even by SIGKILL)."""

    def __init__(self, command: Sequence[Argument], log: Path, *, env: Mapping[str, str] | None = None) -> None:
        self.name = Path(command[0]).name
        self._log = log
        # A session of its own: Ctrl-C is for us, who may want to shut a host down in order.
        guard = ["setsid", "setpriv", "--pdeathsig", "KILL"]
        with log.open("ab") as output:
            self._process = spawn([*guard, *command], output=output.fileno(), env=env)

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id (setsid and setpriv replace themselves by the program)."""
        return self._process.pid

    def wait_ready(self, ready: Callable[[], bool], seconds: float = 30) -> None:
        """Wait until ``ready`` holds. Raises: ProcessEnded when the program ends instead; Expired."""

        def checked() -> bool:
            if not self.running:
                tail = self._log.read_text(errors="replace").splitlines()[-15:]
                raise ProcessEnded(f"{self.name} ended with {self._process.returncode}:\n" + "\n".join(tail))
            return ready()

        poll(checked, seconds, f"{self.name} gets ready", interval=0.02)

    def wait(self, seconds: float) -> None:
        """Wait for its end. Raises: Expired."""
        poll(lambda: not self.running, seconds, f"{self.name} ends", interval=0.02)

    def kill(self) -> None:
        """SIGKILL, and wait; nothing happens when it has ended already."""
        if self.running:
            self._process.kill()
        self._process.wait()

    def stop(self, seconds: float = 10) -> None:
        """SIGTERM, and SIGKILL when that does not help in time."""
        if self.running:
            self._process.terminate()
        try:
            self.wait(seconds)
        except Expired:
            self.kill()
