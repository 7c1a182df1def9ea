"""How the guard stands, as a file in memory tells core."""

from __future__ import annotations

import msgspec


class Status(msgspec.Struct, frozen=True):
    """``at`` is in monotonic seconds, ``seq`` the last record that was dealt with, ``problem`` what is in the way."""

    at: int
    pid: int
    seq: int
    problem: str = ""
