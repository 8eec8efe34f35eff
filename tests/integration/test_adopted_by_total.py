"""Totals of events that a ledger has forgotten: the site lists no event, and its count tells whether it has them.

The verdict is the sandbox's count: what it billed, and how many requests could have changed that.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from late import lenient, november
from living import LivingHouse
from stories import SITES, Event, a_day, a_house
from usage_billing.ledger import ADOPTED
from usage_billing.records import Period, State
from usage_billing.sources import BillingSource

pytestmark = pytest.mark.filterwarnings("default")
SOURCE = lenient("platform_events")
OTHER = replace(
    SOURCE,
    settings=SOURCE.settings.model_copy(
        update={"name": "platform_jobs", "shares_component_with": ("platform_events",)}
    ),
)
DAYS = {day: a_day(SOURCE, day) for day in (5, 6, 7)}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[LivingHouse]:
    """A sandbox, a ledger that can be lost, and staging."""
    with a_house(tmp_path, LivingHouse) as found:
        assert isinstance(found, LivingHouse)
        yield found


def rows(day: Period, first: str = "", second: str = "") -> list[Event]:
    """Make what two accounts used on a day."""
    used = {"orbit-01": first, "orbit-02": second}
    at = day.start + timedelta(hours=9)
    return [Event(f"{who}-{at:%m%d}", who, much, at, ("eu", "premium")) for who, much in used.items() if much]


def bill(
    house: LivingHouse, day: Period, first: str = "", second: str = "", source: BillingSource = SOURCE
) -> list[Event]:
    """Run a day; return its rows."""
    events = rows(day, first, second)
    house.run(source, day, events)
    return events


def billed(house: LivingHouse) -> tuple[Decimal, Decimal]:
    """Return what the site billed the two accounts."""
    sums = house.billed(SOURCE)
    return sums.get("orbit-01", Decimal(0)), sums.get("orbit-02", Decimal(0))


def reasons(house: LivingHouse, day: Period) -> list[str]:
    """Return why what is listed by name for a day waits."""
    return [
        str(reason) for reason in house.ledger.open_items(SOURCE.name, Period.around(SOURCE.periods(day)))["reason"]
    ]


def test_a_correction_after_the_adoption_is_billed_though_its_revision_was_used_before(house: LivingHouse) -> None:
    """Two revisions lie in the stream: the next one has a token that the stream has never seen."""
    bill(house, DAYS[5], "3")
    events = bill(house, DAYS[5], "10")
    house.begin_anew()
    assert house.adopt(SOURCE, [5, 5], events).entered == 1
    bill(house, DAYS[5], "11")
    assert billed(house) == (11, 0)
    bill(house, DAYS[5], "4")
    assert billed(house) == (4, 0)
    assert house.reconcile(SOURCE, DAYS[5]).ties_out
    assert {row[2] for row in house.delivery_rows()} == {State.ACCEPTED}


def test_what_the_site_does_not_count_is_left_to_the_ordinary_run(house: LivingHouse) -> None:
    """The copy knows all that the site has; what came after it was never billed, and the next run bills it."""
    bill(house, DAYS[5], "3", "4")
    copy = house.backup()
    house.restore(copy)
    events = rows(DAYS[5], "3", "4") + rows(DAYS[6], "5") + rows(DAYS[7], "6", "7")
    found = house.adopt(SOURCE, [5, 7], events)
    assert (found.entered, found.held, found.replayable) == (0, 0, 3)
    bill(house, DAYS[6], "5")
    bill(house, DAYS[7], "6", "7")
    assert billed(house) == (14, 11)


def test_a_subscription_of_which_the_site_has_a_part_is_held_and_the_others_are_not(house: LivingHouse) -> None:
    """One of its days was never billed, and nobody can tell which: no run sends any, and the reason has the sums."""
    events = bill(house, DAYS[5], "3", "4") + rows(DAYS[6], "5")
    house.begin_anew()
    before = house.writing_requests(SOURCE)
    told = house.adopt(SOURCE, [5, 6], events, dry_run=True)
    assert house.delivery_rows() == []
    found = house.adopt(SOURCE, [5, 6], events)
    assert found == told
    assert (found.entered, found.held, found.replayable, found.complete) == (1, 2, 0, True)
    (reason,) = reasons(house, DAYS[6])
    assert reason.startswith(ADOPTED)
    assert "it counts 3 for 2026-10-01T00:00Z to 2026-11-01T00:00Z, where 0 are accepted here and 8 would be" in reason
    bill(house, DAYS[5], "3", "4")
    bill(house, DAYS[6], "6")
    assert house.writing_requests(SOURCE) == before
    assert billed(house) == (3, 4)


def test_what_was_held_for_too_short_a_span_is_entered_with_the_whole_one(house: LivingHouse) -> None:
    """The count has days that the first adoption did not look at; the second one judges them all."""
    events = [one for day, much in {5: "3", 6: "5", 7: "6"}.items() for one in bill(house, DAYS[day], much)]
    house.begin_anew()
    assert house.adopt(SOURCE, [5, 6], events[:2]).held == 2
    found = house.adopt(SOURCE, [5, 7], events)
    assert (found.entered, found.held) == (3, 0)
    assert sorted(row[2:] for row in house.delivery_rows()) == [
        ("accepted", "3"),
        ("accepted", "5"),
        ("accepted", "6"),
        ("superseded", "3"),
        ("superseded", "5"),
    ]
    bill(house, DAYS[7], "8")
    assert billed(house) == (16, 0)
    assert house.reconcile(SOURCE, DAYS[7]).ties_out


def test_what_was_held_goes_with_the_ordinary_run_once_it_is_told_that_the_site_has_none(house: LivingHouse) -> None:
    """By the source others fed the component, so its count told nothing; they do no more, and it counts nothing."""
    source = lenient("platform_events", fed_by_others=True)
    events = rows(DAYS[5], "3")
    assert house.adopt(source, [5, 5], events).held == 1
    assert "others feed the component too" in reasons(house, DAYS[5])[0]
    bill(house, DAYS[5], "3")
    assert billed(house) == (0, 0)
    found = house.adopt(SOURCE, [5, 5], events)
    assert (found.entered, found.held, found.replayable) == (0, 0, 1)
    bill(house, DAYS[5], "3")
    assert billed(house) == (3, 0)


def test_a_bill_and_its_credit_that_may_both_be_there_are_held(house: LivingHouse) -> None:
    """The count is what it was, since one takes back what the other added: neither is sent again."""
    bill(house, DAYS[5], "7")
    copy = house.backup()
    bill(house, DAYS[5], "0", "1")
    bill(house, DAYS[6], "7")
    house.restore(copy)
    events = rows(DAYS[5], "0", "1") + rows(DAYS[6], "7") + rows(DAYS[7], "9")
    found = house.adopt(SOURCE, [5, 7], events)
    assert (found.entered, found.held) == (1, 3)
    for day in DAYS.values():
        house.run(SOURCE, day, [one for one in events if day.start <= one.time < day.end])
    assert billed(house) == (7, 1)


def test_a_count_of_nothing_may_be_a_floor(house: LivingHouse) -> None:
    """A sum below 0 counts as 0 there: whether the credit was given is not told by it."""
    house.sandbox.switch(SITES[SOURCE.name], metric_below_zero="zero")
    bill(house, DAYS[5], "7")
    copy = house.backup()
    bill(house, DAYS[5], "0", "1")
    house.restore(copy)
    found = house.adopt(SOURCE, [5, 5], rows(DAYS[5], "0", "1"))
    assert (found.entered, found.held) == (1, 1)
    bill(house, DAYS[5], "0", "1")
    assert billed(house) == (0, 1)


def test_two_sources_of_one_component_are_adopted_one_after_the_other(house: LivingHouse) -> None:
    """The first one is held, since the other's usage is counted too; once that is entered it ties."""
    ours, others = bill(house, DAYS[5], "3"), bill(house, DAYS[5], "4", source=OTHER)
    house.begin_anew()
    assert house.adopt(SOURCE, [5, 5], ours).held == 1
    assert house.adopt(OTHER, [5, 5], others).entered == 1
    assert house.adopt(SOURCE, [5, 5], ours).entered == 1
    before = house.writing_requests(SOURCE)
    bill(house, DAYS[5], "3")
    bill(house, DAYS[5], "4", source=OTHER)
    assert house.writing_requests(SOURCE) == before
    assert house.reconcile(SOURCE, DAYS[5]).ties_out


@pytest.mark.parametrize("october", ["10", "11"])
def test_after_the_renewal_the_open_period_is_judged_and_the_closed_one_held(house: LivingHouse, october: str) -> None:
    """October's own count says that all of it is there; if it did not, some of it could lie in November."""
    last, first = a_day(SOURCE, 30), november(SOURCE)
    house.at(datetime(2026, 10, 31, 12, tzinfo=UTC))  # No day is read before it is over.
    bill(house, last, "10")
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    house.at(datetime(2026, 11, 2, 12, tzinfo=UTC))
    bill(house, first, "5")
    house.begin_anew()
    house.at(datetime(2026, 11, 3, 12, tzinfo=UTC))
    found = house.adopt(SOURCE, [30, 32], rows(last, october) + rows(first, "5"))
    assert (found.entered, found.held) == ((1, 1) if october == "10" else (0, 2))
    assert "its billing period is closed" in reasons(house, last)[0]
    bill(house, last, october)
    bill(house, first, "5")
    assert billed(house) == (15, 0)
