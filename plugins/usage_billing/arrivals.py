"""Read what is due: the run's own usage periods and, of a source that goes by arrival, those that rows arrived for.

The ledger keeps a watermark, up to where arrivals were taken up, and the list of usage periods that they touched. A run
looks for what arrived since, takes the closed periods of the list, and reads just these, whole. The watermark moves in
the transaction that lists what it passes, so nothing is passed that is not listed; a period leaves the list when every
difference of it is written down (`done`). Whatever ends between two of these steps, the next run goes on from the list.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing.errors import Misconfigured
from usage_billing.extract import TIME, Hook, as_times, extract, open_query, open_reader
from usage_billing.ledger import Ledger
from usage_billing.ledger.leases import Hold, kept
from usage_billing.ledger.marker import confirm
from usage_billing.periods import Calendar, local_midnight
from usage_billing.records import EVER, Arrived, Period, Reading, Staged, State, Tally, joined, overlap
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging

log = logging.getLogger(__name__)

_LEASE_LASTS, _LEASE_WAIT = timedelta(seconds=30), timedelta(minutes=15)
_MOST_SPANS = 400
"""How many statements a run makes at most, one for each span of periods without a gap; the rest stays on the list."""
_FIRST_TIME, _FIRST_ID = datetime(1970, 1, 1, tzinfo=UTC), -(2**31)
_LAST_TIME = np.datetime64("9000-01-01", "us")
"""What comes later is no usage, and the calendar ends."""


@dataclass(frozen=True, slots=True)
class Taken:
    """What a run has read: the rows of `periods`, whole; nothing (`events` is None) where no period is due.

    `deleted` counts rows that are marked as deleted: they were read, and are not among the events. `before` are the
    rows of the source's `dedup_window` before them, None where it has none.
    """

    number: int
    periods: tuple[Period, ...]
    folder: str
    events: Staged | None = None
    deleted: int = 0
    arrived: int = 0
    before: Staged | None = None


def read(
    source: BillingSource,
    interval: Period,
    own: Sequence[Period],
    warehouse: Hook,
    ledger: Ledger,
    staging: Staging,
    hold: Hold = kept,
) -> Taken:
    """Read the usage periods `own`, and those that arrivals touched, as one numbered extraction.

    Touched periods are taken that have ended by the end of `interval`, so that a backfill of old days takes up no new
    ones. Arrivals are looked for before any row is read: what arrives in between is read now, and seen again next time.

    Raises:
        Misconfigured: a query does not return what ``source.yaml`` says it does.
        NotApplied: another run kept the source's lease, or this one lost it.
    """
    by_arrival = source.settings.incremental == "arrival"
    # One at a time, so that the later number belongs to the later snapshot.
    with hold(ledger, f"extract:{source.name}", _LEASE_LASTS, _LEASE_WAIT) as held:
        arrived = _look(source, warehouse, ledger) if by_arrival else None
        due = _due(source, interval, own, arrived, ledger) if arrived else tuple(own)
        periods = widened(due, source, ledger)
        spans = joined(periods)
        reader = rows(source, warehouse, spans)
        number = ledger.begin_extraction(held.lease, source.name, interval, periods or interval, arrived)
        confirm(ledger, staging, source.name, number, hold)
        folder = f"{source.name}/{interval.start:%Y%m%dT%H%M%SZ}-{interval.end:%Y%m%dT%H%M%SZ}/{number:08d}"
        taken = Taken(number, periods, folder, arrived=arrived.rows if arrived else 0)
        if len(spans) > 1:
            # Each span is a statement, and a snapshot: all of them before those of the next number.
            taken = _staged(reader, taken, source, ledger, staging)
    if not spans:
        return taken
    if taken.events is None:
        taken = _staged(reader, taken, source, ledger, staging)
    return replace(taken, before=rows_before(periods, source, warehouse, staging, folder))


def done(source: BillingSource, reading: Reading, periods: Sequence[Period], tally: Tally, ledger: Ledger) -> None:
    """Take compared periods off the list of touched ones, once every difference is settled or stands in the ledger.

    One of which something is still on its way stays: what is owed beyond it will have to be compared.
    """
    if source.settings.incremental == "interval" or tally.unsettled > tally.blocked:
        return
    listed = ledger.open_items(source.name, periods)
    on_their_way = listed["state"].isin([State.RESERVED, State.SENDING, State.IN_DOUBT])
    waiting = set(listed.loc[on_their_way, "period_start"])
    ledger.take_off(source.name, reading, [period for period in periods if period.start not in waiting])


# --- what arrived ---------------------------------------------------------------------------------------------------


def _look(source: BillingSource, warehouse: Hook, ledger: Ledger) -> Arrived:
    mark = ledger.watermark(source.name)
    since = {"after": after(source, mark)}
    batches = open_query(warehouse, source.arrivals_sql, since, source.settings.batch_rows)
    arrived = find(batches, source, mark, ledger.now(), [Calendar.of(one) for one in ledger.editions(source.name)])
    log.info("%d rows arrived for %d usage periods, after %s", arrived.rows, len(arrived.periods), since["after"])
    return arrived


def after(source: BillingSource, mark: str) -> datetime | int:
    """Return the value after which arrivals are looked for: the watermark, less the overlap.

    Where there is none yet, or one of another kind since the column was changed, all that ever arrived is taken up.
    """
    overlap = source.settings.arrival_overlap
    known = _parsed(mark, overlap)
    if isinstance(overlap, timedelta):
        return max(known - overlap, _FIRST_TIME) if isinstance(known, datetime) else _FIRST_TIME
    return known - overlap if isinstance(known, int) else _FIRST_ID


def _parsed(mark: str, overlap: timedelta | int) -> datetime | int | None:
    try:
        return datetime.fromisoformat(mark) if isinstance(overlap, timedelta) and ":" in mark else int(mark)
    except ValueError:
        return None


def find(
    batches: Iterable[pa.Table],
    source: BillingSource,
    mark: str,
    now: datetime,
    calendars: Sequence[Calendar] = (),
) -> Arrived:
    """Return what arrived: the usage periods of these rows, and how far the watermark has come.

    `calendars` are those of all editions of the source, where it has others than its own.

    An arrival later than `now` does not move it: one of tomorrow, by a wrong clock, must not hide those of today. Nor
    does it move it up to `now`, by the ledger's clock: the warehouse's may be behind that by more than the overlap.

    Raises:
        Misconfigured: with every fault at once: missing columns, a time without a zone, an arrival of another kind.
    """
    overlap = source.settings.arrival_overlap
    known = _parsed(mark, overlap)
    latest = known if isinstance(known, datetime) == isinstance(overlap, timedelta) else None
    touched: set[Period] = set()
    rows = 0
    for batch in batches:
        times, arrivals = _columns(batch, source)
        rows += batch.num_rows
        for calendar in calendars or [source.calendar]:
            touched.update(_holding(times, calendar, local_midnight(source.first_day, calendar.zone)))
        if isinstance(overlap, timedelta):
            arrivals = arrivals.filter(pc.less_equal(arrivals, pa.scalar(now, TIME)))
        newest = pc.max(arrivals).as_py()
        if newest is not None:
            latest = newest if latest is None else max(latest, newest)
    text = "" if latest is None else latest.isoformat() if isinstance(latest, datetime) else str(latest)
    return Arrived(tuple(sorted(touched)), rows, text)


def _columns(batch: pa.Table, source: BillingSource) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    settings = source.settings
    named = {"time": settings.columns.time, "arrival": str(settings.columns.arrival)}
    faults = [
        f"{word}: the query returns no column, or several, called {name!r}; it returns {', '.join(batch.column_names)}"
        for word, name in named.items()
        if batch.column_names.count(name) != 1
    ]
    if not faults:
        times = as_times(batch.column(named["time"]), named["time"], settings.naive_times, faults)
        arrivals = batch.column(named["arrival"])
        if isinstance(settings.arrival_overlap, timedelta):
            if pa.types.is_integer(arrivals.type):
                faults.append(f"{named['arrival']}: is a number, so say how many ids late: arrival_overlap: 10000")
            else:
                arrivals = as_times(arrivals, named["arrival"], settings.naive_times, faults)
        elif not (pa.types.is_integer(arrivals.type) or pa.types.is_null(arrivals.type)):
            faults.append(f"{named['arrival']}: {arrivals.type} is no id; arrival_overlap of a time is a span: 1h")
    if faults:
        told = [fault.replace("usage.sql", "arrivals.sql") for fault in faults]
        raise Misconfigured.all_at_once(f"arrivals.sql of {source.title}", told)
    return times, arrivals


def _holding(times: pa.ChunkedArray, calendar: Calendar, bill_from: datetime) -> Iterator[Period]:
    """Yield a calendar's usage periods of some instants from `bill_from` on: one step for each period, not each row.

    Where the run's own interval is one, none can be told: then a backfill finds what came late.
    """
    if calendar.kind == "interval":
        return
    moments = np.unique(times.drop_null().to_numpy().astype("datetime64[us]"))
    first, end = (
        np.datetime64(moment.replace(tzinfo=None), "us")
        for moment in (max(bill_from, calendar.within.start), calendar.within.end)
    )
    moments = moments[(moments >= first) & (moments < end) & (moments < _LAST_TIME)]
    place = 0
    while place < len(moments):
        period = calendar.holding(moments[place].astype(object).replace(tzinfo=UTC))
        yield period
        place = int(np.searchsorted(moments, np.datetime64(period.end.replace(tzinfo=None), "us")))


def touched(source: BillingSource, warehouse: Hook, ledger: Ledger) -> list[Period]:
    """Return the closed usage periods of this edition that arrivals touched, by what this ledger knows of them.

    Those that it lists, and those of rows that arrived after its watermark: of a copy, all that was compared since.

    Raises:
        Misconfigured: the query does not return what ``source.yaml`` says it does.
    """
    return _owed(_closed(source, _look(source, warehouse, ledger), ledger, ledger.now()), source)


def _closed(source: BillingSource, arrived: Arrived, ledger: Ledger, moment: datetime) -> list[Period]:
    """Return what is listed, and what arrived now, of which nothing is left to come by then; oldest first."""
    listed = sorted({*ledger.touched(source.name), *arrived.periods})
    return [period for period in listed if period.end <= moment]


def _owed(periods: Iterable[Period], source: BillingSource) -> list[Period]:
    return [each for each in periods if overlap(each, source.span) and each.start >= source.bill_from]


# --- what is due ----------------------------------------------------------------------------------------------------


def _due(
    source: BillingSource, interval: Period, own: Sequence[Period], arrived: Arrived, ledger: Ledger
) -> tuple[Period, ...]:
    """Return the periods to compare now: the run's own, and of the listed ones those that are closed, oldest first.

    Those of another edition stay listed, for a run of its own.
    """
    closed = _closed(source, arrived, ledger, min(interval.end, ledger.now()))
    others = [period for period in closed if overlap(period, source.span) is None]
    closed = _owed(closed, source)
    if others:
        log.warning(
            "%d touched usage periods until %s are billed by another definition of %s, and stay listed: run %s, which "
            "takes them all up (params period_start and period_end)",
            len(others),
            others[-1].end.isoformat(),
            source.name,
            others[-1],
        )
    spans, end = 0, None
    for place, period in enumerate(closed):
        spans += period.start != end
        end = period.end
        if spans > _MOST_SPANS:
            log.warning("%d touched usage periods, with gaps: %d of them now", len(closed), place)
            closed = closed[:place]
            break
    return tuple(sorted({*own, *closed}))


def widened(periods: Sequence[Period], source: BillingSource, ledger: Ledger) -> tuple[Period, ...]:
    """Return usage periods, and those after them that were read before and whose rows may repeat events of theirs.

    Of rows with one event id within `dedup_window` the earliest is kept. So a row that comes late to an old period may
    take a later one off the bill, whose period is compared with it.
    """
    reach, found = source.settings.dedup_window, set(periods)
    for span in joined(periods) if reach else ():
        after = Period(span.end, span.end + reach)
        read = [span for span in ledger.read_in(source.name, after) if overlap(span, source.span)]
        later = (each for part in read for each in source.calendar.touching(part))
        found.update(each for each in later if each.start >= source.bill_from)
    return tuple(sorted(found))


def rows_before(
    periods: Sequence[Period], source: BillingSource, warehouse: Hook, staging: Staging, folder: str
) -> Staged | None:
    """Stage what lies within `dedup_window` before usage periods, and is none of them; None where there is no window.

    Read after them: what arrives there in between is late for its own period, and judged with it.

    Raises:
        Misconfigured: the query does not return what ``source.yaml`` says it does.
    """
    reach = source.settings.dedup_window
    if not reach:
        return None
    edges = [EVER.start, *(span.end for span in joined(periods))]
    spans = zip(edges, joined(periods), strict=False)
    margins = [Period(max(end, span.start - reach), span.start) for end, span in spans]
    return extract(_statements(source, warehouse, margins), source, staging, f"{folder}/before")


def rows(source: BillingSource, warehouse: Hook, spans: Sequence[Period]) -> Iterator[pa.Table]:
    """Return an iterator over the rows of each span in turn; the first statement is executed when this returns.

    Raises:
        Misconfigured: the query does not return what ``source.yaml`` says it does.
    """
    if not spans:
        return iter(())
    window = Period(spans[0].start, spans[-1].end)
    log.info("extracting %s for %d usage periods, %s", source.name, len(source.periods_of(spans)), window)
    return _statements(source, warehouse, spans)


def _statements(source: BillingSource, warehouse: Hook, spans: Sequence[Period]) -> Iterator[pa.Table]:
    size = source.settings.batch_rows
    first = open_reader(warehouse, source.sql, spans[0], size)
    others = (open_reader(warehouse, source.sql, span, size) for span in spans[1:])
    return chain(first, chain.from_iterable(others))


def _staged(reader: Iterator[pa.Table], taken: Taken, source: BillingSource, ledger: Ledger, staging: Staging) -> Taken:
    seen = 0

    def counted() -> Iterator[pa.Table]:
        nonlocal seen
        for table in reader:
            seen += table.num_rows
            yield table

    events = extract(counted(), source, staging, taken.folder)
    ledger.record_read(taken.number, events.rows)
    deleted = seen - events.rows
    log.info("read %d rows as extraction %d", events.rows, taken.number)
    if deleted:
        log.info("and %d that are marked as deleted, which bill nothing", deleted)
    return replace(taken, events=events, deleted=deleted)
