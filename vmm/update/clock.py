"""What time it is, as well as this host can know: a wrong clock must not make old metadata fresh."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

import msgspec

from vmm.clock import rfc3339

Origin = Literal["clock", "image", "seen"]


class Moment(msgspec.Struct, frozen=True):
    """``seconds`` since 1970, and what says so: the system's clock, the image's build, or a time seen before."""

    seconds: int
    origin: Origin

    @property
    def time(self) -> datetime:
        """The same with its zone."""
        return datetime.fromtimestamp(self.seconds, UTC)

    @property
    def text(self) -> str:
        """As records and messages write it."""
        return f"{rfc3339(self.seconds)} ({_SAYS[self.origin]})"


_SAYS = {"clock": "the system clock", "image": "when the image was built", "seen": "the last time seen"}


def best(clock: float, built: int, seen: int) -> Moment:
    """The latest of the three: time does not run backwards, a dead battery's clock does."""
    origins: tuple[tuple[int, Origin], ...] = ((int(clock), "clock"), (built, "image"), (seen, "seen"))
    seconds, origin = max(origins, key=lambda known: known[0])
    return Moment(seconds, origin)
