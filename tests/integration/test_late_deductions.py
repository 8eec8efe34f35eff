"""Deductions of usage that was invoiced go into the open billing period together only as far as it counts enough.

A site may bill a sum below 0 as it is, or nothing for it: what was billed has to be right either way.
"""

from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from late import AFTER_THE_RENEWAL, Held, billed, lenient, november
from stories import SITES, Event, a_day, a_house, small_batches
from usage_billing.records import Period
from usage_billing.sources import BillingSource

SITE = SITES["platform_events"]
ONE = lenient("platform_events", late_usage="now")
OTHER = replace(
    ONE,
    settings=ONE.settings.model_copy(update={"name": "platform_jobs", "shares_component_with": ("platform_events",)}),
)
DAY, LATER, NEXT = a_day(ONE, 30), november(ONE), a_day(ONE, 33)


@pytest.fixture(params=[("as_computed", 0), ("zero", 0), ("as_computed", 3600), ("zero", 3600)])
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Held]:
    """A house whose site shows events at once or an hour later, and bills a metric below 0 in either way."""
    below, delay = request.param
    with a_house(tmp_path, Held) as opened:
        opened.sandbox.switch(SITE, metric_below_zero=below, events_delay_seconds=delay)
        assert isinstance(opened, Held)
        yield opened


def rows(day: Period, *quantities: str) -> list[Event]:
    """Make an event of each quantity, each under a name of its own; and one of another account that stays."""
    at = day.start.replace(hour=9)
    some = [Event(f"{n}", "orbit-01", quantity, at, ("eu", "premium")) for n, quantity in enumerate(quantities[:1])]
    some += [
        Event(f"{n + 1}", "orbit-01", quantity, at, ("us", "premium")) for n, quantity in enumerate(quantities[1:])
    ]
    return [*some, Event("z", "orbit-02", "1000", at, ("us", "premium"))]


def renewed(house: Held) -> None:
    """Let the site invoice October, and use 12 in November."""
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(ONE, LATER, rows(LATER, "12"))
    house.sandbox.move_clock(advance_seconds=7200)


def listed(house: Held, source: BillingSource) -> list[tuple[str, str]]:
    """Return what is open of a source's day."""
    return house.listed(source, DAY)


def test_two_ranges_of_one_plan_take_no_more_than_there_is(house: Held) -> None:
    """Each is judged alone, and both would fit alone: the second one to go is held by name."""
    source = small_batches(ONE, 1)
    house.run(source, DAY, rows(DAY, "10", "10"))
    renewed(house)
    assert billed(house, source) == Decimal(32)

    house.run(source, DAY, rows(DAY, "0", "0"))

    assert billed(house, source) == Decimal(22)
    assert listed(house, source) == [("held", "-10")]
    (reason,) = house.open_items(source, DAY)["reason"]
    assert "a deduction waits: the open billing period counts too little" in reason


def test_two_sources_of_one_component_take_no_more_than_there_is(house: Held) -> None:
    """The second one was planned before the first one sent: it looks again, right before its own request."""
    house.run(ONE, DAY, rows(DAY, "10"))
    house.run(OTHER, DAY, rows(DAY, "10"))
    renewed(house)
    comparison, folder = house.totals(OTHER, DAY, rows(DAY, "0"))
    first = house.plan(OTHER, comparison, folder)
    house.run(ONE, DAY, rows(DAY, "0"))
    assert billed(house, ONE) == Decimal(22)

    house.deliver(OTHER, comparison, folder, first=first)

    assert billed(house, ONE) == Decimal(22)
    assert (listed(house, ONE), listed(house, OTHER)) == ([], [("held", "-10")])


def test_a_correction_of_the_open_period_takes_no_more_than_a_late_deduction_left(house: Held) -> None:
    """October's ten are gone and were taken from November's; then November's are gone too, and wait by name."""
    house.run(ONE, DAY, rows(DAY, "10"))
    renewed(house)
    house.run(ONE, DAY, rows(DAY, "0"))
    assert billed(house, ONE) == Decimal(12)

    house.run(ONE, LATER, rows(LATER, "0"))

    assert house.listed(ONE, LATER) == [("held", "-12")]
    assert "a deduction waits: the open billing period counts too little" in house.open_items(ONE, LATER)["reason"][0]
    house.run(ONE, NEXT, rows(NEXT, "11"))
    house.sandbox.move_clock(advance_seconds=7200)
    assert billed(house, ONE) == Decimal(23)
    house.run(ONE, LATER, rows(LATER, "0"))
    assert billed(house, ONE) == Decimal(11)
    assert house.listed(ONE, LATER) == []
    house.sandbox.move_clock(advance_seconds=7200)
    assert house.reconcile(ONE, LATER).ties_out


def test_a_correction_that_was_planned_before_a_late_deduction_went_is_judged_by_what_that_left(house: Held) -> None:
    """It would have found room when it was planned; another run took that since."""
    house.run(ONE, DAY, rows(DAY, "10"))
    renewed(house)
    comparison, folder = house.totals(ONE, LATER, rows(LATER, "0"))
    first = house.plan(ONE, comparison, folder)
    house.run(ONE, DAY, rows(DAY, "0"))
    assert billed(house, ONE) == Decimal(12)

    house.deliver(ONE, comparison, folder, first=first)

    assert billed(house, ONE) == Decimal(12)
    assert house.listed(ONE, LATER) == [("held", "-12")]


def test_a_late_deduction_leaves_what_the_open_period_is_about_to_take_back_itself(house: Held) -> None:
    """The correction is written down, and its worker sends it without another look: the late one waits."""
    house.run(ONE, DAY, rows(DAY, "10"))
    renewed(house)
    comparison, folder = house.totals(ONE, LATER, rows(LATER, "0"))
    plan = house.plan(ONE, comparison, folder)
    site = house.destination(ONE).site
    for part in house.staging.read(plan.proposals):
        house.ledger.reserve(ONE.name, site, comparison.reading, part.to_pandas())
    house.run(ONE, DAY, rows(DAY, "0"))
    assert (billed(house, ONE), listed(house, ONE)) == (Decimal(22), [("held", "-10")])
    house.deliver(ONE, comparison, folder, first=plan)
    assert (billed(house, ONE), house.listed(ONE, LATER)) == (Decimal(10), [])


@pytest.mark.parametrize("again", [1, 2])
def test_corrections_of_a_period_that_nothing_late_was_taken_from_ask_nothing_more(house: Held, again: int) -> None:
    """They go in one request, as ever: what was billed of a usage period is there to be taken back."""
    renewed(house)
    before = house.writing_requests(ONE)
    house.run(ONE, LATER, rows(LATER, "5" if again == 1 else "0"))
    assert house.writing_requests(ONE) == before + 1
    assert billed(house, ONE) == Decimal(5 if again == 1 else 0)
