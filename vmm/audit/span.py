"""A part of the trail: how people say which, and whether a file has all of it."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING

import msgspec

from vmm.audit.records import Record
from vmm.errors import UserError

if TYPE_CHECKING:
    import argparse

_AGO = re.compile(r"([0-9]{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FORM = "%Y-%m-%dT%H:%M:%S.%fZ"


class Span(msgspec.Struct, frozen=True):
    """Records by number, above ``after`` and up to ``to``, or by time, from ``since`` on and before ``until``.

    None and "" are no bound; moments are in the form that records have.
    """

    after: int | None = None
    to: int | None = None
    since: str = ""
    until: str = ""

    def holds(self, time: str) -> bool:
        """Whether a time lies within."""
        return self.since <= time and (not self.until or time < self.until)

    @property
    def begins(self) -> bool:
        """Whether it has a beginning after that of the trail."""
        return self.after is not None or bool(self.since)

    @property
    def ends(self) -> bool:
        """Whether it has an end before that of the trail."""
        return self.to is not None or bool(self.until)

    def text(self) -> str:
        """For people, behind "all records"."""
        parts = [
            f"above {self.after}" if self.after is not None else "",
            f"up to {self.to}" if self.to is not None else "",
            f"from {self.since}" if self.since else "",
            f"before {self.until}" if self.until else "",
        ]
        return " and ".join(filter(None, parts))


class Whole:
    """Follows records to say in the end whether all of a span is among them, given that none is left out between.

    A span of time is whole if a record stands on either side of it that is not of that time. So it is by the order of
    the trail: a record that the host wrote with another clock elsewhere is not looked for.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self._first: tuple[int, str] | None = None
        self._within = 0

    def follow(self, record: Record) -> None:
        """Take the next record."""
        self._first = self._first or (record.seq, record.time)
        if self._span.holds(record.time):
            self._within = record.seq

    def missing(self, covered: int, *, removed: bool = False) -> str:
        """What is not there, of those that are anchored; "" if nothing is missing.

        Arguments: ``covered`` is the last record that is anchored; ``removed`` says that those before the first one
        were removed by the host, which is anchored, too: then they are missing from no part.
        """
        if self._first is None:
            return "there are no records"
        (first, time), span = self._first, self._span
        if (span.since or span.until) and not self._within:
            return "no record of that time is in it"
        if span.after is not None and first > span.after + 1 and not removed:
            return f"it begins with record {first}, not with {span.after + 1}"
        if span.since and first > 1 and span.holds(time) and not removed:
            return f"it begins with record {first}, of {time}: others of the time asked for may stand before it"
        if span.to is not None and covered < span.to:
            return f"nothing is anchored behind record {covered}, and {span.to} was asked for"
        if span.until and covered <= self._within:
            return f"up to record {self._within} all are before the end of the time asked for: others may follow"
        return ""


def moment(text: str, now: datetime.datetime | None = None) -> str:
    """A time as people write it, in UTC and as records have it: 2026-11-23, "2026-11-23 04:05", or 2h for so long ago.

    Raises: UserError.
    """
    try:
        if ago := _AGO.fullmatch(text):
            now = now or datetime.datetime.now(datetime.UTC)
            found = now - datetime.timedelta(seconds=int(ago[1]) * _SECONDS[ago[2]])
        else:
            found = datetime.datetime.fromisoformat(text)
            if found.tzinfo is None:
                found = found.replace(tzinfo=datetime.UTC)
        return found.astimezone(datetime.UTC).strftime(_FORM)
    except (ValueError, OverflowError):
        hint = "write it as 2026-11-23, '2026-11-23 04:05' (UTC), 2026-11-23T04:05:06+01:00, or 2h for two hours ago"
        raise UserError(f"not a time: {text!r}", hint=hint) from None


def add_span(parser: argparse._ActionsContainer) -> None:
    """Add what asked() takes."""
    parser.add_argument("--after", type=int, metavar="N", help="only records with a number above N")
    parser.add_argument("--to", type=int, metavar="N", help="up to record N")
    add_times(parser)


def add_times(parser: argparse._ActionsContainer) -> None:
    """Add the bounds by time alone."""
    help_text = "of this time (UTC) or later; 2h is two hours ago"
    parser.add_argument("--from", dest="since", metavar="TIME", default="", help=help_text)
    parser.add_argument("--until", metavar="TIME", default="", help="before this time")


def asked(args: argparse.Namespace) -> Span:
    """The span that the arguments ask for. Raises: UserError."""
    since, until = (moment(text) if text else "" for text in (args.since, args.until))
    if since and until and since >= until:
        raise UserError(f"there is no time from {since} until {until}")
    return Span(args.after, args.to, since, until)
