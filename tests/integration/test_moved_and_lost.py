"""Accounts that move while their ledger is lost: adopt looks where they led, and nothing is billed on two bills."""

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest

from late import lenient
from living import LivingHouse
from moving import MovingHouse, named, usage
from stories import Event, a_day, a_house
from usage_billing.ledger import ADOPTED
from usage_billing.records import Choice, State
from usage_billing.sources import BillingSource

LISTED = [lenient("api_calls"), lenient("voip_minutes")]
EVENTS = lenient("platform_events")


class LostHouse(MovingHouse, LivingHouse):
    """A house in which accounts move and the ledger is lost."""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[LostHouse]:
    """A sandbox, a ledger that can be lost, staging, and a mapping that a test changes."""
    with a_house(tmp_path, LostHouse) as found:
        assert isinstance(found, LostHouse)
        yield found


@pytest.fixture(params=LISTED, ids=lambda source: source.name)
def listed(request: pytest.FixtureRequest) -> BillingSource:
    """Each of the shipped sources whose site lists its records."""
    found: BillingSource = request.param
    return found


def bill(house: LostHouse, source: BillingSource, day: int, quantities: dict[int, int]) -> list[Event]:
    """Run a day in which some accounts used something; return what they used."""
    events = usage(source, a_day(source, day), quantities)
    house.run(source, a_day(source, day), events)
    return events


def choose_and_run(
    house: LostHouse, source: BillingSource, choice: Choice, days: dict[int, dict[int, int]]
) -> dict[int, Decimal]:
    """Decide about the first account, run the days, and once more for nothing; return what the site billed then."""
    house.choose(source, 1, choice)
    for day, quantities in days.items():
        bill(house, source, day, quantities)
    before = house.writing_requests(source)
    for day, quantities in days.items():
        bill(house, source, day, quantities)
        found = house.reconcile(source, a_day(source, day))
        assert found.ties_out, found.examples
        assert house.waits(source, a_day(source, day)) == {}
    assert house.writing_requests(source) == before
    return house.sums(source)


@pytest.mark.parametrize(
    ("choice", "sums"), [(Choice.FROM_NOW, {1: 160, 3: 7}), (Choice.MOVE, {2: 160, 3: 7})], ids=str
)
def test_an_account_that_moved_after_the_loss_is_found_where_it_was_billed(
    house: LostHouse, listed: BillingSource, choice: Choice, sums: dict[int, int]
) -> None:
    """The copy does not know the sixth day: it waits on both sides as the fifth does, and goes where a person says."""
    days = {5: {1: 100, 3: 7}, 6: {1: 60}}
    bill(house, listed, 5, days[5])
    copy = house.backup()
    sixth = bill(house, listed, 6, days[6])
    house.restore(copy)
    house.lead(listed, 1, to=2)
    found = house.adopt(listed, [6, 6], sixth)
    assert (found.entered, found.complete, found.moved) == (1, True, (named(listed, 1),))
    before = house.writing_requests(listed)
    for day, quantities in days.items():
        bill(house, listed, day, quantities)
    assert house.writing_requests(listed) == before
    assert house.sums(listed) == {1: 160, 3: 7}
    assert sorted(house.waits(listed, a_day(listed, 6)).values()) == [("held", "-60"), ("held", "60")]
    assert choose_and_run(house, listed, choice, days) == sums


MOVED_ON_THE_SIXTH = {5: {1: 100}, 6: {1: 60}, 7: {1: 30}}
"""What the first account used each day; after the sixth it leads to the second subscription."""


def lose_a_move(house: LostHouse, source: BillingSource) -> tuple[list[Event], list[Event]]:
    """Bill the days, then bring back the ledger as it was after the fifth; return what was used on the two others."""
    bill(house, source, 5, MOVED_ON_THE_SIXTH[5])
    copy = house.backup()
    sixth = bill(house, source, 6, MOVED_ON_THE_SIXTH[6])
    house.lead(source, 1, to=2)
    seventh = bill(house, source, 7, MOVED_ON_THE_SIXTH[7])
    assert house.sums(source) == {1: 160, 2: 30}
    house.restore(copy)
    return sixth, seventh


@pytest.mark.parametrize(("choice", "sums"), [(Choice.FROM_NOW, {1: 190}), (Choice.MOVE, {1: 0, 2: 190})], ids=str)
def test_an_account_that_moved_inside_the_lost_span_is_found_on_both_sides(
    house: LostHouse, listed: BillingSource, choice: Choice, sums: dict[int, int]
) -> None:
    """The sixth day lies at the former subscription and the seventh at the new one; both are entered as they lie."""
    sixth, seventh = lose_a_move(house, listed)
    found = house.adopt(listed, [6, 7], [*sixth, *seventh])
    assert (found.entered, found.complete) == (2, True)
    before = house.writing_requests(listed)
    for day, quantities in MOVED_ON_THE_SIXTH.items():
        bill(house, listed, day, quantities)
    assert house.writing_requests(listed) == before
    wanted = {who: quantity for who, quantity in sums.items() if quantity}
    assert choose_and_run(house, listed, choice, MOVED_ON_THE_SIXTH) == wanted


def test_the_days_before_a_move_can_be_adopted_first_and_the_others_stay_where_they_are(
    house: LostHouse, listed: BillingSource
) -> None:
    """Two spans tell the ledger since when the account leads elsewhere: only what lies before is to decide."""
    sixth, seventh = lose_a_move(house, listed)
    for day, events in ((6, sixth), (7, seventh)):
        # All usages of a Maxio subscription are listed, also of the other day.
        assert house.adopt(listed, [day, day], events, leave_unmatched=True).entered == 1
    before = house.writing_requests(listed)
    assert choose_and_run(house, listed, Choice.FROM_NOW, MOVED_ON_THE_SIXTH) == {1: 160, 2: 30}
    assert house.writing_requests(listed) == before


def test_a_span_that_is_made_longer_takes_the_move_behind_its_end(house: LostHouse) -> None:
    """The first try told of a day beyond it: until all was found, nothing says since when the account left."""
    source = LISTED[0]
    days = {6: {1: 60}, 7: {1: 30}}
    bill(house, source, 5, {1: 100})
    copy = house.backup()
    events = {day: bill(house, source, day, quantities) for day, quantities in days.items()}
    house.restore(copy)
    house.lead(source, 1, to=2)
    assert not house.adopt(source, [6, 6], events[6]).complete
    assert house.adopt(source, [6, 7], [*events[6], *events[7]]).complete
    before = house.writing_requests(source)
    for day, quantities in days.items():
        bill(house, source, day, quantities)
        assert len(house.waits(source, a_day(source, day))) == 2
    assert house.writing_requests(source) == before


@pytest.mark.parametrize("choice", [Choice.FROM_NOW, Choice.MOVE], ids=str)
def test_each_place_of_an_account_that_moved_twice_is_looked_at(
    house: LostHouse, listed: BillingSource, choice: Choice
) -> None:
    """The copy knows the first move and what was chosen for it; the second came after the loss."""
    days = {5: {1: 100}, 6: {1: 60}, 7: {1: 30}}
    bill(house, listed, 5, days[5])
    house.lead(listed, 1, to=2)
    bill(house, listed, 6, days[6])
    house.choose(listed, 1, Choice.MOVE)
    copy = house.backup()
    events = bill(house, listed, 5, days[5])
    events += bill(house, listed, 7, days[7])
    assert house.sums(listed) == {2: 190}
    house.restore(copy)
    house.lead(listed, 1, to=3)
    events += usage(listed, a_day(listed, 6), days[6])
    found = house.adopt(listed, [5, 7], events)
    # The credit and the bill of the fifth day, and the seventh.
    assert (found.entered + found.settled, found.complete) == (3, True)
    before = house.writing_requests(listed)
    for day, quantities in days.items():
        bill(house, listed, day, quantities)
    assert house.writing_requests(listed) == before
    sums = choose_and_run(house, listed, choice, days)
    assert sum(sums.values()) == 190
    assert sums == ({3: 190} if choice is Choice.MOVE else {2: 190})


def test_a_look_at_the_lost_span_enters_nothing_and_places_nobody(house: LostHouse, listed: BillingSource) -> None:
    """It finds what the adoption will find."""
    days = {5: {1: 100}, 6: {1: 60}}
    bill(house, listed, 5, days[5])
    copy = house.backup()
    sixth = bill(house, listed, 6, days[6])
    house.restore(copy)
    house.lead(listed, 1, to=2)
    found = house.adopt(listed, [6, 6], sixth, dry_run=True)
    assert (found.entered, found.complete, found.moved) == (1, True, (named(listed, 1),))
    assert house.ledger.placements(listed.name).empty
    assert house.adopt(listed, [6, 6], sixth) == found


def test_events_of_an_account_that_moved_after_the_loss_are_held_on_both_sides(house: LostHouse) -> None:
    """Nobody can tell where the stream has them, and neither a run nor a choice sends any of them."""
    days = {5: {1: 100}, 6: {1: 60, 3: 5}}
    house.run(EVENTS, a_day(EVENTS, 5), usage(EVENTS, a_day(EVENTS, 5), days[5]))
    copy = house.backup()
    sixth = bill(house, EVENTS, 6, days[6])
    house.restore(copy)
    house.rename((1, "orbit-old"), (2, "orbit-01"))
    found = house.adopt(EVENTS, [6, 6], sixth)
    assert (found.entered, found.held, found.replayable, found.moved) == (1, 2, 0, ("orbit-01",))
    left = house.open_items(EVENTS, a_day(EVENTS, 6))
    assert left["reason"].str.startswith(ADOPTED).all()
    assert left["reason"].str.contains("leads elsewhere by now").all()
    for choice in (None, Choice.FROM_NOW):
        if choice:
            house.choose(EVENTS, 1, choice)
        for day, quantities in days.items():
            bill(house, EVENTS, day, quantities)
        assert house.sums(EVENTS) == {1: 160, 3: 5}
    both = house.open_items(EVENTS, a_day(EVENTS, 6))["token"].tolist()
    house.ledger.decide(both, State.WRITTEN_OFF, "decided on a day by somebody: the site has it")
    before = house.writing_requests(EVENTS)
    for day, quantities in days.items():
        bill(house, EVENTS, day, quantities)
    assert house.writing_requests(EVENTS) == before
    assert house.sums(EVENTS) == {1: 160, 3: 5}
    # What was written off is not ours by the ledger: the tie-out goes on naming what the site has of it.
    (told,) = house.reconcile(EVENTS, a_day(EVENTS, 5)).examples
    assert "160 there, 100 here" in told


def test_raw_events_of_an_account_that_moved_after_the_loss_are_told_and_not_replayed(house: LostHouse) -> None:
    """Under its new subscription they would be counted a second time."""
    source = lenient("platform_events", mode="events")
    house.at(datetime(2026, 10, 20, 12, tzinfo=UTC))
    days = {5: {1: 100}, 6: {1: 60, 3: 5}}
    bill(house, source, 5, days[5])
    copy = house.backup()
    sixth = bill(house, source, 6, days[6])
    house.restore(copy)
    house.rename((1, "orbit-old"), (2, "orbit-01"))
    found = house.adopt(source, [6, 6], sixth)
    (told,) = found.unmatched
    assert told == "account orbit-01: the account leads elsewhere by now, so nothing of it is replayed"
