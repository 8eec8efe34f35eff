"""The days that a person names, as usage periods of a source."""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

from croniter import croniter

from usage_billing.errors import Misconfigured
from usage_billing.periods import local_midnight
from usage_billing.records import Period
from usage_billing.sources import BillingSource

_DAY_AFTER = "--to is the day after the last one"


def span_of(source: BillingSource, first: date, after: date, now: datetime) -> Period:
    """Return the time from day `first` until day `after`, which is not part of it, in the billing zone; none to come.

    Raises:
        Misconfigured: there is none.
    """
    zone = source.settings.timezone
    start, end = local_midnight(first, zone), min(local_midnight(after, zone), now)
    if start >= end:
        raise Misconfigured(f"no usage period of {source.name!r} ends between {first} and {after}: {_DAY_AFTER}")
    return Period(start, end)


def periods_of(source: BillingSource, span: Period) -> tuple[Period, ...]:
    """Return the closed usage periods of a source that end in a span.

    Raises:
        Misconfigured: there is none.
    """
    spans = [span]
    if source.settings.period == "interval":
        spans = [Period(*edges) for edges in pairwise(_ticks(source, span))]
    found = tuple(period for part in spans for period in source.periods(part))
    if not found:
        raise Misconfigured(
            f"no usage period of {source.name!r} on or after {source.settings.bill_from} ends in {span}: {_DAY_AFTER}"
        )
    return found


def _ticks(source: BillingSource, span: Period) -> Iterator[datetime]:
    ticks = croniter(source.settings.schedule, span.start.astimezone(source.settings.timezone) - timedelta(seconds=1))
    while (tick := ticks.get_next(datetime).astimezone(UTC)) <= span.end:
        yield tick
