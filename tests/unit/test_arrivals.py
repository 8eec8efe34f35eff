"""What arrived: which usage periods it touches, and how far the watermark comes."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest

from stage_helpers import make_source
from usage_billing.arrivals import after, find
from usage_billing.errors import Misconfigured
from usage_billing.periods import usage_periods
from usage_billing.records import Period

NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)
COLUMNS = {"event_id": "id", "time": "at", "account": "who", "quantity": "n", "arrival": "seen"}
HOUR = timedelta(hours=1)


def by_arrival(**settings):
    """Return a source that goes by arrival; an overlap of ids unless `settings` say otherwise."""
    values = {"columns": COLUMNS, "incremental": "arrival", "arrival_overlap": 10, "bill_from": date(2026, 10, 1)}
    return make_source(**values | settings)


def batch(*rows):
    """Return rows of (time, arrival) as `arrivals.sql` would."""
    times, arrivals = zip(*rows, strict=True)
    return pa.table({"at": pa.array(times, pa.timestamp("us", "UTC")), "seen": pa.array(arrivals)})


def faults(table, **settings):
    """Return what these rows tell."""
    with pytest.raises(Misconfigured) as error:
        find([table], by_arrival(**settings), "", NOW)
    return str(error.value)


@pytest.mark.parametrize("kind", ["hour", "day", "week", "month"])
@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"])
def test_each_instant_touches_the_period_that_holds_it(kind, zone):
    """Over a change of the clocks too, and on both sides of every edge: what the ordinary run would compare."""
    span = Period(datetime(2026, 9, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC))
    there = usage_periods(kind, ZoneInfo(zone), span)[2:][:60]
    first = {"week": date(2026, 8, 31), "month": date(2026, 8, 1)}.get(kind, date(2026, 8, 1))
    source = by_arrival(period=kind, timezone=zone, bill_from=first)
    tick = timedelta(microseconds=1)
    rows = [(moment, 1) for period in there for moment in (period.end - tick, period.start)]
    assert find([batch(*rows)], source, "", NOW).periods == there


def test_what_is_not_owed_or_no_usage_touches_nothing():
    """A time before `bill_from`, none at all, and one that no calendar has are passed over, and move the watermark."""
    rows = batch((datetime(2026, 9, 30, 23, tzinfo=UTC), 1), (None, 2), (datetime(9999, 12, 31, 23, tzinfo=UTC), 3))
    found = find([rows], by_arrival(), "", NOW)
    assert (found.periods, found.rows, found.watermark) == ((), 3, "3")


def test_the_watermark_is_the_latest_arrival_and_never_goes_back():
    """Over batches that come in any order, beside rows without an arrival, and where nothing new arrived."""
    at = datetime(2026, 10, 5, 3, tzinfo=UTC)
    assert find([batch((at, 5), (at, 9)), batch((at, None), (at, 7))], by_arrival(), "", NOW).watermark == "9"
    assert find([batch((at, 5))], by_arrival(), "8", NOW).watermark == "8"
    assert find([batch((at, 5)).slice(1)], by_arrival(), "8", NOW).watermark == "8"
    assert find([], by_arrival(), "", NOW).watermark == ""


def test_an_arrival_of_tomorrow_does_not_hide_those_of_today():
    """The watermark of times goes by the latest one that is over, and not up to the ledger's present."""
    source = by_arrival(arrival_overlap="1h")
    rows = batch((NOW, NOW + 24 * HOUR), (NOW, NOW - 2 * HOUR))
    found = find([rows], source, "2026-11-20T08:00:00+00:00", NOW)
    assert found.watermark == (NOW - 2 * HOUR).isoformat()
    assert after(source, found.watermark) == NOW - 3 * HOUR
    assert find([rows.slice(0, 1)], source, "2026-11-20T08:00:00+00:00", NOW).watermark == "2026-11-20T08:00:00+00:00"


def test_what_was_asked_last_time_decides_after_what_is_asked_now():
    """The watermark less the overlap; all that ever arrived where there is none, or one of another kind."""
    ids, times = by_arrival(), by_arrival(arrival_overlap="2h")
    assert after(ids, "100") == 90
    assert after(times, "2026-11-20T08:00:00.000001+00:00") == datetime(2026, 11, 20, 6, 0, 0, 1, tzinfo=UTC)
    for mark in ("", "2026-11-20T08:00:00+00:00"):
        assert after(ids, mark) == -(2**31)
    for mark in ("", "100"):
        assert after(times, mark) == datetime(1970, 1, 1, tzinfo=UTC)
    at = datetime(2026, 10, 5, 3, tzinfo=UTC)
    assert find([batch((at, 5))], ids, "2026-11-20T08:00:00+00:00", NOW).watermark == "5"


def test_arrivals_of_the_wrong_kind_tell_how_to_mend_it():
    """Ids with an overlap of time, times with an overlap of ids, times without a zone: each names its key."""
    at = datetime(2026, 10, 5, 3, tzinfo=UTC)
    assert "arrival_overlap: 10000" in faults(batch((at, 5)), arrival_overlap="1h")
    assert "arrival_overlap of a time is a span: 1h" in faults(batch((at, at)))
    naive = pa.table({"at": pa.array([at], pa.timestamp("us", "UTC")), "seen": pa.array([at.replace(tzinfo=None)])})
    told = faults(naive, arrival_overlap="1h")
    assert "seen: its times have no time zone" in told
    assert "usage.sql" not in told
    told = faults(pa.table({"at": [1], "arrived": [1]}))
    assert "arrivals.sql of calls" in told
    assert "called 'seen'; it returns at, arrived" in told
