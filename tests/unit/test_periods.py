"""Usage periods as a billing zone counts them."""

import itertools
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pendulum
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usage_billing.periods import Calendar, first_day, local_midnight, locate, usage_periods
from usage_billing.records import EVER, Period

NEW_YORK = ZoneInfo("America/New_York")
ZONES = [
    ZoneInfo(name) for name in ("UTC", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/Santiago")
]


def day(year, month, number, zone=NEW_YORK):
    """Return one local day."""
    return Period(
        datetime(year, month, number, tzinfo=zone), datetime(year, month, number, tzinfo=zone) + timedelta(days=1)
    )


def hours(period):
    """Return a period's length in hours."""
    return (period.end - period.start) / timedelta(hours=1)


def test_a_day_is_as_long_as_the_clocks_make_it():
    """The days on which the clocks change in New York have 25 and 23 hours."""
    autumn = usage_periods("day", NEW_YORK, day(2026, 11, 1))
    spring = usage_periods("day", NEW_YORK, day(2026, 3, 8))
    assert [hours(period) for period in (*autumn, *spring)] == [25, 23]
    assert autumn[0].start == datetime(2026, 11, 1, 4, tzinfo=UTC)


def test_the_repeated_hour_is_two_periods():
    """The day with 25 hours has 25 periods of an hour, each 60 minutes, without a gap."""
    found = usage_periods("hour", NEW_YORK, day(2026, 11, 1))
    assert len(found) == 25
    assert {hours(period) for period in found} == {1}
    assert all(left.end == right.start for left, right in itertools.pairwise(found))


def test_a_month_belongs_to_the_run_that_holds_its_end():
    """A daily run in mid-month compares no month; the run of the month's last day compares it whole."""
    assert usage_periods("month", NEW_YORK, day(2026, 10, 15)) == ()
    (october,) = usage_periods("month", NEW_YORK, day(2026, 10, 31))
    assert october == Period(datetime(2026, 10, 1, tzinfo=NEW_YORK), datetime(2026, 11, 1, tzinfo=NEW_YORK))


def test_lookback_adds_whole_earlier_periods():
    """A lookback of two days compares three whole days, the last of them the run's own."""
    found = usage_periods("day", NEW_YORK, day(2026, 11, 2), lookback=2)
    assert [f"{period.start.astimezone(NEW_YORK):%m-%d %H:%M}" for period in found] == [
        "10-31 00:00",
        "11-01 00:00",
        "11-02 00:00",
    ]


def test_a_run_of_the_interval_kind_is_its_own_period():
    """An interval is billed as it is, whatever the zone."""
    assert usage_periods("interval", NEW_YORK, day(2026, 11, 1)) == (day(2026, 11, 1),)


@settings(max_examples=60, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    kind=st.sampled_from(["hour", "day", "week", "month"]),
    start=st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)),  # noqa: DTZ001
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
)
def test_runs_side_by_side_compare_each_period_once(zone, kind, start, cuts):
    """However a stretch of time is cut into runs, they compare the periods of the one long run, each once, in order."""
    edges = [start.replace(minute=0, second=0, microsecond=0, tzinfo=UTC)]
    for cut in cuts:
        edges.append(edges[-1] + timedelta(hours=7 * cut))
    runs = [Period(left, right) for left, right in itertools.pairwise(edges)]
    apart = [period for run in runs for period in usage_periods(kind, zone, run)]
    assert apart == list(usage_periods(kind, zone, Period(edges[0], edges[-1])))
    assert all(left.end == right.start for left, right in itertools.pairwise(apart))


@settings(max_examples=60, deadline=None)
@given(
    zone=st.sampled_from(ZONES),
    kind=st.sampled_from(["hour", "day", "week", "month"]),
    start=st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)),  # noqa: DTZ001
    lookback=st.integers(0, 12),
)
def test_lookback_counts_periods_in_every_zone(zone, kind, start, lookback):
    """A run with `lookback` compares exactly that many periods more than without, right before its own."""
    run = Period(start.replace(tzinfo=UTC), start.replace(tzinfo=UTC) + timedelta(days=32))
    own = usage_periods(kind, zone, run)
    more = usage_periods(kind, zone, run, lookback)
    assert own
    assert more[lookback:] == own
    assert len(more) == len(own) + lookback


@pytest.mark.parametrize(("zone", "hour"), [("America/Santiago", 4), ("UTC", 0)])
def test_a_skipped_midnight_is_the_first_instant_after(zone, hour):
    """In Santiago the clocks of 6 September 2026 jump over midnight; that day still starts at an instant."""
    assert local_midnight(datetime(2026, 9, 6).date(), ZoneInfo(zone)) == datetime(2026, 9, 6, hour, tzinfo=UTC)  # noqa: DTZ001


def test_an_instant_is_located_in_its_half_open_period():
    """The start belongs to a period, the end does not, and a gap belongs to none."""
    periods = [day(2026, 10, 1, UTC), day(2026, 10, 3, UTC)]
    texts = [
        "2026-09-30T23:59:59.999999",
        "2026-10-01",
        "2026-10-01T23:59:59.999999",
        "2026-10-02",
        "2026-10-03",
        "2026-10-04",
        "NaT",
    ]
    assert locate(np.array(texts, dtype="datetime64[us]"), periods).tolist() == [-1, 0, 0, -1, 1, -1, -1]
    assert locate(np.array(texts, dtype="datetime64[us]"), []).tolist() == [-1] * 7


@pytest.mark.parametrize("kind", ["hour", "day", "week", "month", "interval"])
def test_an_interval_of_airflows_own_kind_gives_the_same_periods(kind):
    """Airflow's data intervals hold pendulum's moments, which add up differently; the periods are the same."""
    start, end = datetime(2026, 10, 31, 4, tzinfo=UTC), datetime(2026, 11, 2, 5, tzinfo=UTC)
    zone = ZoneInfo("America/New_York")
    foreign = Period(pendulum.instance(start), pendulum.instance(end))
    assert usage_periods(kind, zone, foreign, 1) == usage_periods(kind, zone, Period(start, end), 1)
    assert type(foreign.end) is datetime


KINDS = ["hour", "day", "week", "month"]


@settings(max_examples=80, deadline=None)
@given(
    old=st.tuples(st.sampled_from(KINDS), st.sampled_from(ZONES)),
    new=st.tuples(st.sampled_from(KINDS), st.sampled_from(ZONES)),
    about=st.datetimes(datetime(2026, 3, 1), datetime(2026, 12, 1)),  # noqa: DTZ001
)
def test_where_one_calendar_follows_another_no_moment_is_in_two_periods_or_in_none(old, new, about):
    """Whatever kind and zone end and begin: the old one's last period is cut off, and the new one's is whole."""
    edge = local_midnight(first_day(*new, about.replace(tzinfo=UTC)), new[1])
    span = Period(edge - timedelta(days=70), edge + timedelta(days=70))
    before = Calendar(*old, Period(EVER.start, edge)).ending_in(span)
    after = Calendar(*new, Period(edge, EVER.end)).ending_in(span)
    assert before[-1].end == edge == after[0].start
    assert all(one.end == other.start for one, other in itertools.pairwise((*before, *after)))
    assert after == tuple(period for period in usage_periods(*new, span) if period.start >= edge)


@pytest.mark.parametrize("kind", KINDS)
def test_a_calendar_finds_the_period_of_each_moment_and_the_last_ones(kind):
    """Also where it ends: the cut period holds its moments, is the last one, and nothing comes after it."""
    edge = datetime(2026, 10, 14, 15, 30, tzinfo=UTC)
    calendar = Calendar(kind, NEW_YORK, Period(EVER.start, edge))
    last = calendar.holding(edge - timedelta(minutes=1))
    assert last.end == edge
    assert calendar.last(edge + timedelta(days=99), 2)[-1] == last
    assert calendar.last(edge, 2) == calendar.last(edge + timedelta(days=99), 2)
    around = Period(last.start - timedelta(minutes=1), edge + timedelta(days=9))
    assert calendar.touching(around) == calendar.last(edge, 2)
    assert calendar.touching(Period(edge, edge + timedelta(days=9))) == ()
