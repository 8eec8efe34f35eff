"""Usage periods: hours, days, weeks and months as a billing zone counts them.

A day is from one local midnight to the next, so 23 or 25 hours where the clocks change. An hour is 60 minutes counted
from local midnight, so the repeated hour of autumn is two periods and the skipped hour of spring is none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import TYPE_CHECKING, Literal, Self
from zoneinfo import ZoneInfo

from usage_billing.records import EVER, Edition, Period, overlap

if TYPE_CHECKING:
    import numpy as np

PeriodKind = Literal["hour", "day", "week", "month", "interval"]
_LONGER = {"hour": timedelta(hours=2), "day": timedelta(2), "week": timedelta(14), "month": timedelta(62)}
"""Longer than any usage period of the kind, so that an edge lies within."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SHORTEST = timedelta(microseconds=1)


def usage_periods(
    kind: PeriodKind, zone: ZoneInfo, interval: Period, lookback: int = 0, within: Period = EVER
) -> tuple[Period, ...]:
    """Return the whole usage periods that a run of `interval` compares, in order; there may be none.

    A period belongs to the run whose interval holds its end (an end equal to the interval's own counts: the period is
    closed by then), so runs side by side compare each period once. `lookback` adds that many earlier periods. None
    reaches beyond `within`: its start is an edge, and so is its end, which may cut the last period off.
    """
    if kind == "interval":
        span = overlap(interval, within)
        return (span,) if span else ()
    edges = [edge for edge in _edges(kind, zone, interval, lookback) if within.start <= edge < within.end]
    if within.end <= interval.end:
        edges.append(within.end)
    own = [index for index, edge in enumerate(edges) if index > 0 and interval.start < edge <= interval.end]
    if not own:
        return ()
    first = max(own[0] - lookback, 1)
    return tuple(Period(edges[index - 1], edges[index]) for index in range(first, own[-1] + 1))


@dataclass(frozen=True, slots=True)
class Calendar:
    """The usage periods of one kind and zone within a span of time; see `usage_periods` for its edges."""

    kind: PeriodKind
    zone: ZoneInfo
    within: Period = EVER

    @classmethod
    def of(cls, edition: Edition) -> Self:
        """Return the calendar by which an edition of a source counts."""
        return cls(edition.definition["period"], ZoneInfo(edition.definition["timezone"]), edition.span)

    def ending_in(self, interval: Period, lookback: int = 0) -> tuple[Period, ...]:
        """Return the usage periods that a run of `interval` compares."""
        return usage_periods(self.kind, self.zone, interval, lookback, self.within)

    def last(self, until: datetime, number: int) -> tuple[Period, ...]:
        """Return the last `number` (at least 1) usage periods that have ended by `until`."""
        until = min(until, self.within.end)
        return self.ending_in(Period(until - _LONGER[self.kind], until), number)[-number:]

    def holding(self, moment: datetime) -> Period:
        """Return the usage period in which `moment` lies."""
        return self.ending_in(Period(moment, moment + _LONGER[self.kind]))[0]

    def touching(self, span: Period) -> tuple[Period, ...]:
        """Return the usage periods that share a moment with `span`, in order."""
        inside = overlap(span, self.within)
        if inside is None or self.kind == "interval":
            return (inside,) if inside else ()
        last = self.holding(inside.end - _SHORTEST)
        return self.ending_in(Period(inside.start, last.end))


def first_day(kind: PeriodKind, zone: ZoneInfo, moment: datetime) -> date:
    """Return the first day that begins at or after `moment`, and with which a usage period begins."""
    day = _first_day(kind, moment.astimezone(zone).date())
    while local_midnight(day, zone) < moment:
        day = _next_day(kind, day)
    return day


def begins(kind: PeriodKind, day: date) -> bool:
    """Say whether a usage period begins with `day`."""
    return _first_day(kind, day) == day


def locate(times: "np.ndarray", periods: Sequence[Period]) -> "np.ndarray":
    """Return for each instant the index of the period that holds it, -1 where none does.

    `times` are ``datetime64[us]`` in UTC; `periods` are in order and do not overlap, but may leave gaps.
    """
    import numpy as np  # noqa: PLC0415 - A DAG file that is only parsed needs periods, not NumPy.

    starts, ends = (
        np.array([(edge - _EPOCH) // timedelta(microseconds=1) for edge in edges], dtype="datetime64[us]")
        for edges in ([period.start for period in periods], [period.end for period in periods])
    )
    if not len(starts):
        return np.full(len(times), -1)
    found = np.searchsorted(starts, times, side="right") - 1
    return np.where((found >= 0) & (times < ends[found]), found, -1)


def local_midnight(day: date, zone: ZoneInfo) -> datetime:
    """Return the instant at which `day` begins in `zone`, in UTC; a skipped midnight gives the first one after it."""
    return datetime.combine(day, time.min, tzinfo=zone).astimezone(UTC)


def _edges(kind: PeriodKind, zone: ZoneInfo, interval: Period, lookback: int) -> Iterator[datetime]:
    """Yield period edges in UTC from at least `lookback` + 1 periods before the interval to its end or just past it."""
    if kind == "hour":
        margin = timedelta(hours=lookback + 2)
    else:
        margin = {"day": timedelta(days=2), "week": timedelta(days=14), "month": timedelta(days=62)}[kind]
        margin += lookback * {"day": timedelta(days=1), "week": timedelta(days=7), "month": timedelta(days=31)}[kind]
    day = _first_day(kind, (interval.start - margin).astimezone(zone).date())
    while True:
        edge, following = local_midnight(day, zone), _next_day(kind, day)
        if edge > interval.end:
            return
        yield edge
        if kind == "hour":
            yield from _hours(edge, min(local_midnight(following, zone), interval.end + timedelta(microseconds=1)))
        day = following


def _hours(midnight: datetime, until: datetime) -> Iterator[datetime]:
    edge = midnight + timedelta(hours=1)
    while edge < until:
        yield edge
        edge += timedelta(hours=1)


def _first_day(kind: PeriodKind, day: date) -> date:
    if kind == "month":
        return day.replace(day=1)
    return day - timedelta(days=day.weekday()) if kind == "week" else day


def _next_day(kind: PeriodKind, day: date) -> date:
    if kind == "month":
        return (day.replace(day=28) + timedelta(days=4)).replace(day=1)
    return day + timedelta(days=7 if kind == "week" else 1)
