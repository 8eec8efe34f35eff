"""What is unusual about a plan is told with the key that allows it, and what is usual passes in silence."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stories import Event, House, a_day, a_house, shipped
from usage_billing.guard import owed_by_period, unusual
from usage_billing.ledger import Ledger
from usage_billing.records import Comparison, Period
from usage_billing.sources import BillingSource, FirstRun

NOW = datetime(2026, 11, 1, tzinfo=UTC)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger whose clock stands on the first of November, and staging."""
    with a_house(tmp_path) as found:
        found.ledger.close()
        found.ledger = Ledger.connect(found.ledger_url, clock=lambda: NOW)
        yield found


def guarded(**keys: Any) -> BillingSource:
    """Return the shipped source of calls with some keys of `source.yaml`."""
    source = shipped("api_calls")
    return replace(source, settings=source.settings.model_copy(update=keys))


def usage(day: int, quantity: str) -> list[Event]:
    """Make one call of a day."""
    return [Event(f"e-{day}", "acct-0001", quantity, a_day(shipped("api_calls"), day).start + timedelta(hours=8))]


def told(
    house: House, source: BillingSource, interval: Period, events: list[Event], only: tuple[Period, ...] = ()
) -> list[str]:
    """Plan an interval, or only some periods in it, and return what is unusual about it."""
    comparison, folder = house.totals(source, interval, events, only=only)
    plan = house.plan(source, comparison, folder)
    owed = owed_by_period(comparison, house.destination(source), house.staging)
    found = unusual(plan, comparison, owed, house.destination(source), house.ledger, house.staging)
    if not found:
        _remember(house, source, comparison)
    return found


def _remember(house: House, source: BillingSource, comparison: Comparison) -> None:
    owed = owed_by_period(comparison, house.destination(source), house.staging)
    house.ledger.record_owed(source.name, comparison.reading, owed)


def test_an_ordinary_first_day_passes(house: House) -> None:
    """Whoever starts a source as the README says meets no question."""
    source = guarded()
    assert told(house, source, a_day(source, 5), usage(5, "1000000")) == []


def test_a_first_plan_of_many_days_is_asked_about_until_something_is_billed(house: House) -> None:
    """Eight days at once where seven are allowed; once a day is billed the source is none of the new ones."""
    source = guarded(first_run=FirstRun(max_days=7))
    week = Period(a_day(source, 1).start, a_day(source, 7).end)
    longer = Period(week.start, a_day(source, 8).end)
    assert told(house, source, week, usage(1, "1")) == []
    (line,) = told(house, source, longer, usage(1, "1"))
    assert line.startswith("first_run.max_days = 7: ")
    assert "8 days at once" in line
    house.run(source, a_day(source, 1), usage(1, "1"))
    assert told(house, source, longer, [*usage(1, "1"), *usage(2, "1")]) == []


def test_a_first_plan_of_much_is_asked_about(house: House) -> None:
    """By the sum over all periods of the plan, to the last unit."""
    source = guarded(first_run=FirstRun(max_quantity=Decimal(100)))
    days = Period(a_day(source, 5).start, a_day(source, 6).end)
    assert told(house, source, days, [*usage(5, "60"), *usage(6, "40")]) == []
    (line,) = told(house, source, days, [*usage(5, "60"), *usage(6, "41")])
    assert line.startswith("first_run.max_quantity = 100: ")
    assert line.endswith("would bill 101")


def test_a_jump_is_asked_about_once_there_is_a_usual(house: House) -> None:
    """Three times the median of at least five periods that owed anything, and not a unit less."""
    source = guarded(max_multiple=Decimal(3))
    for day, quantity in enumerate(["10", "1000", "12", "11", "9"], start=1):
        assert told(house, source, a_day(source, day), usage(day, quantity)) == []
        house.run(source, a_day(source, day), usage(day, quantity))
    day = a_day(source, 6)
    assert told(house, source, day, usage(6, "33")) == []
    (line,) = told(house, source, day, usage(6, "34"))
    assert line.startswith("max_multiple = 3: ")
    assert line.endswith("owes 34, and the usual of the last 5 usage periods is 11")
    assert told(house, guarded(), day, usage(6, "34000")) == []


def test_a_run_of_long_ago_is_asked_about_if_it_would_send_anything(house: House) -> None:
    """Rows that nobody sends again are not asked about, however old."""
    source = guarded()
    day = a_day(source, 5)  # It ended 25 days and some hours before the ledger's now.
    house.run(source, day, usage(5, "10"))
    strict, lenient = guarded(backfill_horizon_days=25), guarded(backfill_horizon_days=26)
    assert told(house, strict, day, usage(5, "10")) == []
    assert told(house, lenient, day, usage(5, "11")) == []
    (line,) = told(house, strict, day, usage(5, "11"))
    assert line.startswith("backfill_horizon_days = 25: ")
    assert line.endswith("ended 25 days ago")


def test_old_usage_in_a_run_of_today_is_asked_about(house: House) -> None:
    """Touched by a late row, or in the lookback: what counts is the oldest period that would be sent, not the run's."""
    source = guarded(backfill_horizon_days=20)
    old, recent = a_day(source, 5), a_day(source, 30)
    house.run(source, old, usage(5, "10"))
    span = Period(old.start, recent.end)
    assert told(house, source, span, [*usage(5, "10"), *usage(30, "9")], (old, recent)) == []
    (line,) = told(house, source, span, [*usage(5, "11"), *usage(30, "9")], (old, recent))
    assert line.startswith("backfill_horizon_days = 20: this plan would send usage of 2026-10-05")
    assert line.endswith("ended 25 days ago")


def test_a_jump_is_seen_in_a_run_that_compares_what_was_before_it_too(house: House) -> None:
    """A lookback over all days that tell what is usual; a jump that was billed is not asked about again."""
    source = guarded(max_multiple=Decimal(3))
    events = [
        event for day, quantity in enumerate(["10", "12", "11", "9", "10"], start=1) for event in usage(day, quantity)
    ]
    week = Period(a_day(source, 1).start, a_day(source, 6).end)
    before = Period(week.start, a_day(source, 5).end)
    assert told(house, source, before, events) == []
    house.run(source, before, events)
    (line,) = told(house, source, week, [*events, *usage(6, "34")])
    assert line.endswith("owes 34, and the usual of the last 5 usage periods is 10")
    house.run(source, week, [*events, *usage(6, "34")])
    assert (
        told(house, source, Period(week.start, a_day(source, 7).end), [*events, *usage(6, "34"), *usage(7, "9")]) == []
    )


def test_all_that_is_unusual_is_told_at_once(house: House) -> None:
    """A person decides once."""
    source = guarded(first_run=FirstRun(max_days=1, max_quantity=Decimal(1)), backfill_horizon_days=1)
    days = Period(a_day(source, 5).start, a_day(source, 6).end)
    lines = told(house, source, days, [*usage(5, "60"), *usage(6, "41")])
    assert [line.partition(" = ")[0] for line in lines] == [
        "first_run.max_days",
        "first_run.max_quantity",
        "backfill_horizon_days",
    ]


def test_what_an_older_reading_owed_is_not_written_down_over_a_newer_one(house: House) -> None:
    """The usual is what was compared last."""
    source = guarded()
    day = a_day(source, 5)
    first, _ = house.totals(source, day, usage(5, "10"))
    second, _ = house.totals(source, day, usage(5, "20"))
    for comparison in (first, second):
        house.ledger.begin_comparison(source.name, comparison.reading, [day])
        _remember(house, source, comparison)
    _remember(house, source, first)
    assert house.ledger.usually_owed(source.name, day.end, 31) == [20]
    assert house.ledger.usually_owed(source.name, day.start, 31) == []
