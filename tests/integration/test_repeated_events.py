"""Events that come twice, in usage periods of their own: each is billed once, by data, whatever is run when.

The verdict is the sandbox's count, against a plain reckoning of which row keeps its event.
"""

import random
from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from arrivals import ArrivalHouse, an_arrival_house, by_interval
from stories import ACCOUNT, GENTLE, a_day
from usage_billing.destinations.maxio.events import MaxioEventsSettings
from usage_billing.errors import Stale
from usage_billing.records import Period
from usage_billing.sources import BillingSource, SourceSettings
from usage_billing.suite import DUPLICATE

# The table has one row for each key: what stands before the sign is the event's id.
USAGE = (
    "SELECT substr(event_id, 1, instr(event_id || '#', '#') - 1) AS event_id, time, account, quantity, region, tier, "
    "deleted FROM usage WHERE time >= :window_start AND time < :window_end"
)
TWO_DAYS = timedelta(days=2)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[ArrivalHouse]:
    """A sandbox, a ledger, and a warehouse."""
    with an_arrival_house(tmp_path) as found:
        yield found


@pytest.fixture(params=sorted(ACCOUNT))
def source(request: pytest.FixtureRequest) -> BillingSource:
    """Each of the sources, with days, where an event may come again within two of them."""
    return repeating(request.param)


def repeating(name: str, **changes: Any) -> BillingSource:
    """Return a source that goes by interval, and looks two days back for events that come again."""
    return by_interval(name, USAGE, **{"dedup_window": TWO_DAYS} | changes)


def put(house: ArrivalHouse, source: BillingSource, row: str, day: int, quantity: int, hour: int = 12) -> datetime:
    """Write a row of the source's account; `row` is the event's id and, after a sign, which of its rows it is."""
    time = a_day(source, day).start + timedelta(hours=hour)
    house.warehouse.put(1, row, time, ACCOUNT[source.name], quantity)
    return time


def billed(house: ArrivalHouse, source: BillingSource) -> Decimal:
    """Return what the site billed the account."""
    return house.billed(source).get(ACCOUNT[source.name], Decimal(0))


def aside(house: ArrivalHouse, source: BillingSource) -> list[tuple[str, str]]:
    """Return the event ids and days of the rows that are set aside as duplicates."""
    rows = house.ledger.quarantined(source.name)
    assert all(DUPLICATE in reasons for reasons in rows["reasons"])
    zone = source.settings.timezone
    return [(row.event_id, f"{row.period_start.astimezone(zone):%d}") for row in rows.itertuples()]


def test_an_event_that_comes_again_on_a_later_day_is_billed_once(house: ArrivalHouse, source: BillingSource) -> None:
    """The run of the later day reads the days before it, and sets its row aside; those are no rows of its own."""
    put(house, source, "e1", 5, 3)
    put(house, source, "e1#again", 7, 3)
    put(house, source, "e2", 7, 4)
    for day in (5, 7):
        done = house.increment(source, a_day(source, day))
    assert done.comparison is not None
    assert (done.comparison.rows_accepted, done.comparison.rows_quarantined) == (1, 1)
    assert done.comparison.periods == (a_day(source, 7),)
    assert billed(house, source) == 7
    assert aside(house, source) == [("e1", "07")]


def test_the_later_day_is_taken_back_when_the_earlier_row_comes_late(
    house: ArrivalHouse, source: BillingSource
) -> None:
    """It was billed on the 7th; then the 5th, which has the earlier row, is run: both days are compared."""
    put(house, source, "e1#again", 7, 5)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 5
    put(house, source, "e1", 5, 3)
    put(house, source, "e3", 5, 10)

    done = house.increment(source, a_day(source, 5))

    assert done.comparison is not None
    assert done.comparison.periods == (a_day(source, 5), a_day(source, 7))
    assert billed(house, source) == 13
    assert aside(house, source) == [("e1", "07")]
    assert house.ledger.open_items(source.name, None).empty, "a duplicate is no reason to hold what it was billed as"
    before = house.writing_requests(source)
    for day in (7, 5):
        house.increment(source, a_day(source, day))
    assert house.writing_requests(source) == before


def test_a_row_that_vanishes_gives_its_event_back_to_the_later_one(house: ArrivalHouse, source: BillingSource) -> None:
    """The 5th is run again without it: the later row is all that is left of the event, and is owed."""
    put(house, source, "e1", 5, 3)
    put(house, source, "e2", 5, 1)
    put(house, source, "e1#again", 7, 5)
    for day in (5, 7):
        house.increment(source, a_day(source, day))
    assert billed(house, source) == 4
    house.warehouse.delete("e1")
    house.increment(source, a_day(source, 5))
    assert billed(house, source) == 6
    assert aside(house, source) == []


@pytest.mark.parametrize(("hour", "owed"), [(12, 3), (13, 8)])
def test_the_window_is_reckoned_from_event_to_event(house: ArrivalHouse, hour: int, owed: int) -> None:
    """Two days later to the minute is a repetition, an hour more is another event; also where one run reads it all."""
    source = repeating("api_calls")
    put(house, source, "e1", 5, 3)
    put(house, source, "e1#again", 7, 5, hour)
    house.increment(source, Period(a_day(source, 4).start, a_day(source, 9).end))
    assert billed(house, source) == owed


def test_without_a_window_days_do_not_look_at_each_other(house: ArrivalHouse) -> None:
    """Also not where one run compares both: what is owed must not hang on how the days are run."""
    source = repeating("api_calls", dedup_window=timedelta(0))
    put(house, source, "e1", 5, 3)
    put(house, source, "e1#same day", 5, 30, hour=13)
    put(house, source, "e1#again", 6, 5)
    house.increment(source, Period(a_day(source, 5).start, a_day(source, 6).end))
    assert billed(house, source) == 8
    before = house.writing_requests(source)
    for day in (5, 6):
        house.increment(source, a_day(source, day))
    assert house.writing_requests(source) == before


def test_an_older_run_of_the_later_day_that_ends_late_sends_nothing(house: ArrivalHouse, source: BillingSource) -> None:
    """It read before the earlier row came; the run of the earlier day, which took both, has the say."""
    put(house, source, "e1#again", 7, 5)
    taken, comparison = house.read(source, a_day(source, 7))
    assert comparison is not None
    put(house, source, "e1", 5, 3)
    done = house.increment(source, a_day(source, 5))
    assert done.comparison is not None
    assert done.comparison.periods == (a_day(source, 5), a_day(source, 7)), "it was read, though nothing was compared"
    with pytest.raises(Stale, match="stale"):
        house.settle(source, taken, comparison, GENTLE)
    assert billed(house, source) == 3


@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_runs_bills_what_is_owed(house: ArrivalHouse, seed: int) -> None:
    """Rows come, repeat and vanish between runs of days in any order and number; at last each event counts once."""
    chance = random.Random(seed)  # noqa: S311 - a draw, no secret.
    source = repeating("api_calls")
    rows: dict[str, tuple[str, datetime, int]] = {}
    days = list(range(3, 9))
    for turn in range(12):
        for number in range(chance.randint(0, 3)):
            event, day, quantity = f"e{chance.randint(0, 4)}", chance.choice(days), chance.randint(1, 9)
            name = f"{event}#{turn}-{number}"
            rows[name] = event, put(house, source, name, day, quantity, chance.randint(0, 22)), quantity
        if rows and chance.random() < 0.3:
            gone = chance.choice(sorted(rows))
            del rows[gone]
            house.warehouse.delete(gone)
        first = chance.choice(days)
        run_days(house, source, first, min(first + chance.randint(0, 2), days[-1]))
    chance.shuffle(days)
    for day in days:
        run_days(house, source, day, day)
    assert billed(house, source) == kept(rows)
    before = house.writing_requests(source)
    for day in sorted(days):
        run_days(house, source, day, day)
    assert house.writing_requests(source) == before


def run_days(house: ArrivalHouse, source: BillingSource, first: int, last: int) -> None:
    """Run some days as one interval, if any of them has a row."""
    interval = Period(a_day(source, first).start, a_day(source, last).end)
    if house.warehouse.rows_in(source.periods(interval)):
        house.increment(source, interval)


def kept(rows: dict[str, tuple[str, datetime, int]]) -> Decimal:
    """Return what is owed: each row counts, unless an earlier one of its event lies in its day or two days before."""
    total = 0
    ordered = sorted((event, time, str(quantity), quantity) for event, time, quantity in rows.values())
    for place, (event, time, _, quantity) in enumerate(ordered):
        earlier = [other for name, other, *_ in ordered[:place] if name == event]
        total += 0 if any(time - other <= TWO_DAYS for other in earlier) else quantity
    return Decimal(total)


def test_a_window_needs_usage_periods_of_the_calendar_and_events_that_can_be_taken_back() -> None:
    """Each fault names the key and what to do instead."""
    source = repeating("platform_events")
    values = source.settings.model_dump() | {"period": "interval", "dedup_window": "1d"}
    with pytest.raises(ValueError, match="dedup_window is 1d, and with period: interval"):
        SourceSettings.model_validate(values)
    raw = MaxioEventsSettings.model_validate(source.destination.model_dump() | {"mode": "events"})
    (fault,) = raw.why_not(source.settings)
    assert fault.startswith("dedup_window: with destination.mode: events no call takes back")
    assert list(source.destination.why_not(source.settings)) == []
