"""What a run compares: which usage periods, by which data interval, and under which edition of the source."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import Any, Self

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowSkipException

from usage_billing.errors import Misconfigured
from usage_billing.installation import destination_in, edition_of, editions, ledger
from usage_billing.periods import Calendar
from usage_billing.records import EVER, Edition, Period
from usage_billing.sources import BillingSource

_MOST_REPLAYED = 400
"""How many usage periods one replay compares at most: each may be a statement of its own."""


class Kind(StrEnum):
    """Which usage periods a run compares."""

    INTERVAL = "those that end in its data interval, and the lookback before them"
    RESCAN = "the last ones of the source"
    REPLAY = "those with rows in quarantine, or with a refusal that was released"


@dataclass(frozen=True)
class Reach:
    """What one run of a source compares; `waiting` are the usage periods that wait for a replay, where it is one."""

    today: BillingSource
    known: Sequence[Edition]
    kind: Kind
    waiting: Sequence[Period]
    interval: Period

    @classmethod
    def of(cls, context: Context, today: BillingSource, *, replays: bool) -> Self:
        """Return the reach of the run that `context` tells of, for a source as it is defined today.

        A run without a data interval takes the span of the params ``period_start`` and ``period_end``; a rescan with
        neither that of the last usage periods, a replay that of all which wait.

        Raises:
            AirflowSkipException: it is a replay, and nothing waits.
            Misconfigured: the definition changed under its history; the run has no interval; a replay of a source of
                which only the runs know the usage periods.
        """
        known = editions(today)
        params = context.get("params") or {}
        kind = Kind.RESCAN if params.get("rescan") else Kind.INTERVAL
        if replays or params.get("replay"):
            kind = Kind.REPLAY
        waiting = _waiting(today) if kind is Kind.REPLAY else ()
        start, end = _span(context)
        if not (start and end) and kind is Kind.REPLAY:
            interval = Period.around(waiting)
        elif not (start and end) and kind is Kind.RESCAN:
            interval = _last(today, known)
        else:
            interval = _as_period(start, end)
        return cls(today, known, kind, waiting, interval)

    @cached_property
    def source(self) -> BillingSource:
        """The source under the edition by which the run is counted; that of a rescan or a replay is the last one."""
        edition = (
            edition_of(self.today, self.known, self.interval) if self.kind is Kind.INTERVAL else self._last_edition
        )
        return destination_in(self.today, edition, self.known[-1]).source

    @property
    def _last_edition(self) -> Edition:
        due = [period.end for period in self.waiting if period.end <= self.interval.end]
        return _in_force(self.known, due[-1] if due else self.interval.end)

    def periods(self, log: Any) -> tuple[Period, ...]:
        """Return the run's own usage periods, and those before that it reads again, as far as its edition goes.

        What is left out is told in the `log`.
        """
        if self.kind is Kind.REPLAY:
            return self._replayed(log)
        wider = self._those_of(replace(self.source, span=Period(EVER.start, self.source.span.end)))
        if wider and wider[0].start < self.source.span.start:
            log.info(
                "looking back ends at %s, where the definition of %s begins: rows of before that come late are billed "
                "by a backfill of their intervals",
                self.source.span.start.isoformat(),
                self.source.name,
            )
        return self._those_of(self.source)

    def _those_of(self, source: BillingSource) -> tuple[Period, ...]:
        if self.kind is Kind.RESCAN:
            return source.recent_periods(self.interval.end)
        return source.periods(self.interval)

    def _replayed(self, log: Any) -> tuple[Period, ...]:
        """Return which of the usage periods that wait this run compares, and tell of the others."""
        source, end = self.source, self.interval.end
        due = [period for period in self.waiting if source.bill_from <= period.start and period.end <= end]
        own = [period for period in due if period.start >= source.span.start][-_MOST_REPLAYED:]
        if rest := [period for period in due if period not in own]:
            log.warning(
                "%d usage periods of %s that wait for a replay are left out, from %s to %s: they are of an earlier "
                "definition, or too many for one run; replay again, or backfill their intervals",
                len(rest),
                source.name,
                rest[0].start.isoformat(),
                rest[-1].end.isoformat(),
            )
        return tuple(own)


def _waiting(source: BillingSource) -> tuple[Period, ...]:
    """Return the usage periods that a replay compares; raises where there is none, or only the runs know them."""
    waiting = ledger().replayable(source.name)
    if not waiting:
        raise AirflowSkipException(
            f"nothing of {source.name} is in quarantine, nor refused and released since: there is nothing to replay"
        )
    if source.settings.period == "interval":
        spans = ", ".join(str(period) for period in waiting)
        raise Misconfigured(
            f"{source.name} cannot be replayed: with period: interval only a run's own interval is a usage period; run "
            f"these intervals again by a backfill: {spans}"
        )
    return waiting


def _span(context: Context) -> tuple[Any, Any]:
    """Return the ends of the run's data interval, or of its params where it has none; each may be missing."""
    start, end = context.get("data_interval_start"), context.get("data_interval_end")
    params = context.get("params") or {}
    if start is None or end is None or start == end:
        start, end = params.get("period_start"), params.get("period_end")
    return start, end


def _as_period(start: Any, end: Any) -> Period:
    if not start or not end:
        raise Misconfigured(
            "this run has no data interval: trigger it with a logical date, or give both params period_start and "
            "period_end (ISO 8601 with a zone, for example 2026-10-01T00:00:00+00:00)"
        )
    try:
        edges = (datetime.fromisoformat(moment) if isinstance(moment, str) else moment for moment in (start, end))
        return Period(*edges)
    except ValueError as error:
        raise Misconfigured(f"params period_start and period_end: {error}") from error


def _last(source: BillingSource, known: Sequence[Edition]) -> Period:
    """Return the span of the usage periods that a rescan compares, of those that have ended by now."""
    now = ledger().now()
    calendar = Calendar.of(_in_force(known, now))
    recent = () if calendar.kind == "interval" else calendar.last(now, source.settings.rescan)
    owed = [period for period in recent if period.start >= source.bill_from]
    return Period.around(owed or [Period(source.bill_from, now)])


def _in_force(known: Sequence[Edition], moment: datetime) -> Edition:
    """Return the edition of the usage periods that end by a moment."""
    return next(one for one in known if one.span.start < moment <= one.span.end)
