"""The days on which the clocks change: 23 or 25 hours long, and each hour is billed once, the repeated ones too.

The verdict is the sandbox's count: what it billed, and how many requests could have changed that.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from stories import ACCOUNT, SITES, Event, House, a_house, shipped
from usage_billing.ledger import Ledger
from usage_billing.periods import PeriodKind, local_midnight
from usage_billing.records import Period
from usage_billing.sources import BillingSource

DAYS = {"autumn": (date(2026, 11, 1), 25), "spring": (date(2027, 3, 14), 23)}
"""When America's clocks change, and how many hours the day has then."""
ZONES = {"api_calls": "America/New_York", "platform_events": "America/New_York", "voip_minutes": "America/Chicago"}
"""ChargeOver's is the account's own: its records bear local times without an offset."""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A house with the shipped worlds, whose ledger lives on the sandbox's time."""
    with a_house(tmp_path) as opened:
        opened.ledger.close()
        opened.ledger = Ledger.connect(opened.ledger_url, clock=opened.sandbox.now)
        yield opened


def counting(name: str, kind: PeriodKind, zone: str = "") -> BillingSource:
    """Return a shipped source that bills by other usage periods, in another zone."""
    source = shipped(name)
    settings = source.settings.model_copy(update={"period": kind, "timezone": ZoneInfo(zone or ZONES[name])})
    return replace(source, settings=settings)


def the_day(source: BillingSource, season: str) -> Period:
    """Return the day on which the clocks change, from one local midnight to the next."""
    day, zone = DAYS[season][0], source.settings.timezone
    return Period(local_midnight(day, zone), local_midnight(day + timedelta(days=1), zone))


def every_half_hour(source: BillingSource, day: Period, quantity: str = "3") -> list[Event]:
    """Return an event at each half hour of the day, on the clock that never changes."""
    dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
    count = (day.end - day.start) // timedelta(minutes=30)
    account = ACCOUNT[source.name]
    return [
        Event(f"e-{number}", account, quantity, day.start + number * timedelta(minutes=30), dimensions)
        for number in range(count)
    ]


@pytest.mark.parametrize("season", sorted(DAYS))
@pytest.mark.parametrize("kind", ["hour", "day"])
@pytest.mark.parametrize("name", sorted(ACCOUNT))
def test_every_hour_of_the_day_is_billed_once(house: House, name: str, kind: PeriodKind, season: str) -> None:
    """Two events of 3 in each of 23 or 25 hours; as many records as there are periods; again, and nothing is sent."""
    source, hours = counting(name, kind), DAYS[season][1]
    day = the_day(source, season)
    assert day.end - day.start == timedelta(hours=hours)
    house.sandbox.move_clock(day.end + timedelta(hours=6))
    events = every_half_hour(source, day)

    house.run(source, day, events)

    periods = hours if kind == "hour" else 1
    assert house.billed(source) == {ACCOUNT[name]: Decimal(6 * hours)}
    assert house.states(source, day) == {"accepted": periods}
    assert len(house.sandbox.records(SITES[name])) == periods
    assert house.reconcile(source, day).ties_out
    before = house.writing_requests(source)
    house.run(source, day, events)
    assert house.writing_requests(source) == before


@pytest.mark.parametrize("name", sorted(ACCOUNT))
def test_a_correction_of_one_of_the_two_repeated_hours_is_that_hours_alone(house: House, name: str) -> None:
    """A late row of the second 01:00 adds to it, and the first one is left as it is: the key tells them apart."""
    source = counting(name, "hour")
    day = the_day(source, "autumn")
    house.sandbox.move_clock(day.end + timedelta(hours=6))
    events = every_half_hour(source, day)
    house.run(source, day, events)
    second = Period(day.start + timedelta(hours=2), day.start + timedelta(hours=3))
    late = replace(events[4], event_id="late", quantity="5")
    assert [moment.astimezone(source.settings.timezone).hour for moment in (events[2].time, late.time)] == [1, 1]

    house.run(source, day, [*events, late])

    assert house.billed(source) == {ACCOUNT[name]: Decimal(6 * 25 + 5)}
    revisions = Counter(house.ledger.accepted(source.name, day)["period_start"])
    assert [start.to_pydatetime() for start, count in revisions.items() if count == 2] == [second.start]
    assert house.reconcile(source, day).ties_out


@pytest.mark.parametrize("season", sorted(DAYS))
def test_chargeover_reads_the_local_times_of_the_account(house: House, season: str) -> None:
    """In autumn two records say 01:00 to 01:59:59, each under its own key; in spring none says 02:00."""
    source = counting("voip_minutes", "hour")
    day = the_day(source, season)
    house.sandbox.move_clock(day.end + timedelta(hours=6))

    house.run(source, day, every_half_hour(source, day))

    stored = [datetime.fromisoformat(record["from"]) for record in house.sandbox.records(SITES[source.name])]
    hours = Counter(moment.astimezone(source.settings.timezone).hour for moment in stored)
    assert hours[1] == (2 if season == "autumn" else 1)
    assert hours[2] == (1 if season == "autumn" else 0)
    assert len(set(stored)) == hours.total() - (season == "autumn"), "the account cannot tell the two hours apart"


@pytest.mark.parametrize("season", sorted(DAYS))
def test_runs_of_an_hour_each_bill_the_whole_day(house: House, season: str) -> None:
    """A DAG that runs by the hour cuts the day as the periods do: nothing is left between two runs, nothing twice."""
    source = counting("api_calls", "hour")
    day = the_day(source, season)
    house.sandbox.move_clock(day.end + timedelta(hours=6))
    events = every_half_hour(source, day)
    start = day.start
    while start < day.end:
        interval = Period(start, start + timedelta(hours=1))
        house.run(source, interval, [one for one in events if interval.start <= one.time < interval.end])
        start = interval.end

    assert house.billed(source) == {ACCOUNT["api_calls"]: Decimal(6 * DAYS[season][1])}
    assert start.astimezone(UTC) == day.end


@pytest.mark.parametrize(
    ("kind", "first", "after", "quantity"),
    [
        ("week", date(2026, 10, 26), date(2026, 11, 2), 169),
        ("month", date(2026, 11, 1), date(2026, 12, 1), 721),
        ("week", date(2027, 3, 8), date(2027, 3, 15), 167),
        ("month", date(2027, 3, 1), date(2027, 4, 1), 743),
    ],
)
def test_weeks_and_months_are_an_hour_longer_or_shorter(
    house: House, kind: PeriodKind, first: date, after: date, quantity: int
) -> None:
    """One event of 1 in each hour of the clock that never changes: as many as the week or month has of them."""
    source = counting("api_calls", kind)
    zone = source.settings.timezone
    span = Period(local_midnight(first, zone), local_midnight(after, zone))
    house.sandbox.move_clock(span.end + timedelta(hours=6))
    events = [replace(one, quantity="1") for one in every_half_hour(source, span)[::2]]

    house.run(source, span, events)

    assert house.billed(source) == {ACCOUNT["api_calls"]: Decimal(quantity)}
    assert house.states(source, span) == {"accepted": 1}


def test_a_zone_that_changes_by_half_an_hour_has_a_short_last_hour(house: House) -> None:
    """Lord Howe's day of 24.5 hours: 24 hours and a half one, each billed once."""
    source = counting("api_calls", "hour", "Australia/Lord_Howe")
    start = datetime(2027, 4, 4, tzinfo=source.settings.timezone)
    day = Period(start, start + timedelta(days=1))
    house.sandbox.move_clock(day.end + timedelta(hours=6))

    house.run(source, day, every_half_hour(source, day))

    assert house.billed(source) == {ACCOUNT["api_calls"]: Decimal(3 * 49)}
    assert house.states(source, day) == {"accepted": 25}
