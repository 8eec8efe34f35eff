"""Usage that was billed to one subscription before its account led to another: held, moved or left, as a person chose.

The verdict is the sandbox's count for each subscription, and the order of its books.
"""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import requests

from late import AFTER_THE_RENEWAL, lenient, november
from moving import KEYS, MovingHouse, WorkerDied, named, usage
from stories import SITES, Event, a_day, a_house, shipped, small_batches
from usage_billing.cli import main
from usage_billing.errors import Misconfigured, NeedsDecision
from usage_billing.moves import Moves
from usage_billing.plan import plan
from usage_billing.preview import preview
from usage_billing.records import Choice, Period, State
from usage_billing.sources import BillingSource

SOURCE = shipped("api_calls")
VOIP = shipped("voip_minutes")
EVENTS = shipped("platform_events")
FIRST, SECOND = "50100001", "50100002"
UPGRADE = {"line_items": [{"line_item_id": 854, "tierset": {"tiers": [{"amount": 0.07}]}}]}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[MovingHouse]:
    """A sandbox, a ledger and staging, and a mapping that a test changes."""
    with a_house(tmp_path, MovingHouse) as found:
        assert isinstance(found, MovingHouse)
        yield found


def bill(house: MovingHouse, source: BillingSource, day: int, quantities: dict[int, int]) -> None:
    """Run a day in which some accounts used something."""
    house.run(source, a_day(source, day), usage(source, a_day(source, day), quantities))


def moved(house: MovingHouse, source: BillingSource = SOURCE) -> None:
    """Bill 100 of the first account's fifth day; then let it lead to the second subscription."""
    bill(house, source, 5, {1: 100})
    house.lead(source, 1, to=2)


def nothing_more_is_sent(house: MovingHouse, source: BillingSource, days: dict[int, dict[int, int]]) -> None:
    """Run days once more, and tie out."""
    before, sums = house.writing_requests(source), house.sums(source)
    for day, quantities in days.items():
        bill(house, source, day, quantities)
        found = house.reconcile(source, a_day(source, day))
        assert found.ties_out, found.examples
    assert (house.writing_requests(source), house.sums(source)) == (before, sums)


# --- until a person has chosen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [SOURCE, VOIP], ids=lambda source: source.name)
def test_what_was_billed_before_a_move_is_held_on_both_sides_and_later_usage_goes_on(
    house: MovingHouse, source: BillingSource
) -> None:
    """Nothing is sent for the old day, whatever share it is; the new day is billed where the account leads now."""
    moved(house, source)
    before = house.writing_requests(source)
    bill(house, source, 5, {1: 100})
    assert house.writing_requests(source) == before
    assert sorted(house.waits(source, a_day(source, 5)).values()) == [("held", "-100"), ("held", "100")]
    bill(house, source, 6, {1: 30})
    assert house.sums(source) == {1: 100, 2: 30}
    bill(house, source, 5, {1: 100})
    assert house.waits(source, a_day(source, 6)) == {}
    (reason,) = set(house.open_items(source, a_day(source, 5))["reason"])
    assert f"account '{named(source, 1)}' leads to subscription " in reason
    assert f"`usage-billing ledger move {source.name} {named(source, 1)}` decides" in reason
    nothing_more_is_sent(house, source, {5: {1: 100}, 6: {1: 30}})


def test_the_others_of_a_subscription_wait_with_it_for_old_periods_only(house: MovingHouse) -> None:
    """What two accounts used is one total: nobody can tell which part of a difference is whose."""
    house.lead(SOURCE, 2, to=1)
    bill(house, SOURCE, 5, {1: 100, 2: 50})
    assert house.sums(SOURCE) == {1: 150}
    house.lead(SOURCE, 1, to=3)
    bill(house, SOURCE, 5, {1: 100, 2: 55, 4: 7})
    assert house.waits(SOURCE, a_day(SOURCE, 5)) == {FIRST: ("held", "-95"), "50100003": ("held", "100")}
    assert house.sums(SOURCE) == {1: 150, 4: 7}
    bill(house, SOURCE, 6, {1: 1, 2: 2})
    assert house.sums(SOURCE) == {1: 152, 3: 1, 4: 7}


def test_nothing_that_is_held_since_it_moved_is_released_by_name(house: MovingHouse) -> None:
    """Let go one by one, the usage would be on two bills, or on none."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    with pytest.raises(Misconfigured, match="usage-billing ledger moves"):
        house.release(SOURCE, a_day(SOURCE, 5))


def test_what_was_released_before_the_move_does_not_go_by_the_next_sweep(house: MovingHouse) -> None:
    """The person let go what is on the first bill; where it belongs is another question by now."""
    source = lenient("api_calls", late_usage="hold")
    day = a_day(source, 5)
    bill(house, source, 5, {1: 100})
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    bill(house, source, 5, {1: 107})
    house.release(source, day)
    house.lead(source, 1, to=2)
    bill(house, source, 5, {1: 107})
    house.sweep(source)
    assert house.waits(source, day) == {FIRST: ("held", "-100"), SECOND: ("held", "107")}
    assert house.sums(source) == {1: 100}


def test_both_sides_can_be_written_off_and_a_later_choice_bills_nothing_twice(house: MovingHouse) -> None:
    """Then the usage stays where it was billed, whatever is chosen afterwards."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    tokens = house.open_items(SOURCE, a_day(SOURCE, 5))["token"].tolist()
    house.ledger.decide(tokens, State.WRITTEN_OFF, "decided by somebody: it stays")
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}})
    house.choose(SOURCE, 1, Choice.MOVE)
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}})
    bill(house, SOURCE, 5, {1: 103})
    assert house.sums(SOURCE) == {1: 100, 2: 3}


def test_a_look_shows_both_sides_as_held_and_writes_nothing_down(house: MovingHouse) -> None:
    """The preview judges the move as the next run will; the ledger learns of it from that run."""
    moved(house)
    day = a_day(SOURCE, 5)
    looked = house.looked(SOURCE, day, usage(SOURCE, day, {1: 100}))
    destination = house.destination(SOURCE)
    found = plan(looked, destination, house.ledger, house.staging, "looked")
    told = preview(found, looked, destination, house.ledger, house.staging)
    assert (told.going, found.tally.held) == (0, 2)
    assert {case.quantity for case in told.cases if case.label == "held"} == {Decimal(0)}
    assert house.ledger.placements(SOURCE.name).empty
    assert house.waits(SOURCE, day) == {}


def test_back_before_anything_was_billed_elsewhere_leaves_nothing_to_decide(house: MovingHouse) -> None:
    """The mapping was wrong for an hour: what it held ends, and nothing was sent."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    house.lead(SOURCE, 1, to=1)
    bill(house, SOURCE, 5, {1: 104})
    assert house.waits(SOURCE, a_day(SOURCE, 5)) == {}
    assert house.sums(SOURCE) == {1: 104}
    nothing_more_is_sent(house, SOURCE, {5: {1: 104}})


@pytest.mark.parametrize(("choice", "sums"), [(Choice.FROM_NOW, {1: 107, 2: 30}), (Choice.MOVE, {1: 137})], ids=str)
def test_back_after_a_day_was_billed_elsewhere_that_day_is_to_decide(
    house: MovingHouse, choice: Choice, sums: dict[int, int]
) -> None:
    """Day 5 was billed on the first and day 6 on the second; day 7 is the first's again, and day 6 waits."""
    moved(house)
    bill(house, SOURCE, 6, {1: 30})
    house.lead(SOURCE, 1, to=1)
    bill(house, SOURCE, 7, {1: 7})
    bill(house, SOURCE, 6, {1: 30})
    bill(house, SOURCE, 5, {1: 100})
    assert house.waits(SOURCE, a_day(SOURCE, 5)) == {}
    assert house.waits(SOURCE, a_day(SOURCE, 6)) == {FIRST: ("held", "30"), SECOND: ("held", "-30")}
    assert house.sums(SOURCE) == {1: 107, 2: 30}
    house.choose(SOURCE, 1, choice)
    for day, quantity in {5: 100, 6: 30, 7: 7}.items():
        bill(house, SOURCE, day, {1: quantity})
    assert house.sums(SOURCE) == sums
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}, 6: {1: 30}, 7: {1: 7}})


# --- from now on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [SOURCE, VOIP], ids=lambda source: source.name)
def test_from_now_leaves_what_was_used_before_and_bills_late_rows_of_it_there(
    house: MovingHouse, source: BillingSource
) -> None:
    """The first subscription keeps its day, and gets what comes late for it; the second has what came after."""
    moved(house, source)
    bill(house, source, 5, {1: 100})
    bill(house, source, 6, {1: 30})
    assert house.choose(source, 1, Choice.FROM_NOW)
    bill(house, source, 5, {1: 100})
    assert (house.waits(source, a_day(source, 5)), house.sums(source)) == ({}, {1: 100, 2: 30})
    nothing_more_is_sent(house, source, {5: {1: 100}, 6: {1: 30}})
    bill(house, source, 5, {1: 108})
    assert house.sums(source) == {1: 108, 2: 30}
    house.lead(source, 3, to=1)
    bill(house, source, 7, {1: 4, 2: 5})
    bill(house, source, 5, {1: 101, 2: 9, 3: 1})
    assert house.sums(source) == {1: 102, 2: 48}
    nothing_more_is_sent(house, source, {5: {1: 101, 2: 9, 3: 1}, 6: {1: 30}, 7: {1: 4, 2: 5}})


def test_late_usage_of_before_that_a_person_releases_goes_to_the_former_subscription(house: MovingHouse) -> None:
    """The account leads elsewhere by now, but its old days do not."""
    source = lenient("api_calls", late_usage="hold")
    day = a_day(source, 5)
    moved(house, source)
    bill(house, source, 6, {1: 30})
    house.choose(source, 1, Choice.FROM_NOW)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    bill(house, source, 5, {1: 107})
    assert house.waits(source, day) == {FIRST: ("held", "7")}
    house.release(source, day)
    assert house.sweep(source).accepted == 1
    assert house.sums(source) == {1: 107, 2: 30}
    nothing_more_is_sent(house, source, {5: {1: 107}})


def ended(house: MovingHouse, source: BillingSource, number: int) -> None:
    """Cancel a subscription, at a site that takes usage of such a one and never bills it."""
    if source.name == "voip_minutes":
        house.sandbox.switch(SITES[source.name], usage_on_bad_line="accept")
        url = f"{house.sandbox.chargeover_url('telco')}/api/v3/package/{712 + number}/_action/cancel"
        assert requests.post(url, auth=KEYS["telco"], timeout=5).status_code in range(200, 300)
        return
    subdomain, first = {"api_calls": ("acme", 50100000), "platform_events": ("orbit", 50200000)}[source.name]
    house.sandbox.switch(SITES[source.name], usage_on_ended_subscription="accept")
    url = f"{house.sandbox.maxio_url(subdomain)}/subscriptions/{first + number}.json"
    assert requests.delete(url, auth=KEYS[subdomain], timeout=5).status_code == 200


@pytest.mark.parametrize("late_usage", ["", "hold"])
@pytest.mark.parametrize("name", ["api_calls", "voip_minutes", "platform_events"])
def test_late_usage_of_a_former_subscription_that_has_ended_is_held_by_name(
    house: MovingHouse, name: str, late_usage: str
) -> None:
    """The site would take it and bill it to nobody; what is said of it tells that, and what to do."""
    source = lenient(name, **({"late_usage": late_usage} if late_usage else {}))
    day = a_day(source, 5)
    bill(house, source, 5, {1: 100})
    if name == "platform_events":
        house.rename((1, "orbit-old"), (2, "orbit-two"), (2, "orbit-01"))
    else:
        house.lead(source, 1, to=2)
    bill(house, source, 6, {1: 60})
    house.choose(source, 1, Choice.FROM_NOW)
    ended(house, source, 1)
    before, sums = house.writing_requests(source), house.sums(source)
    for _ in range(2):
        bill(house, source, 5, {1: 130})
        assert (house.writing_requests(source), house.sums(source)) == (before, sums)
        ((state, quantity),) = house.waits(source, day).values()
        assert (state, quantity) == ("held", "30")
    reason = house.open_items(source, day)["reason"].item()
    assert re.search(r"is cancell?ed: .* would not (bill its usage|be billed)", reason)
    assert reason.endswith("bill it by hand, and write it off")
    assert house.reconcile(source, day).ties_out
    house.release(source, day)
    assert house.sweep(source).accepted == 0
    assert house.writing_requests(source) == before


def test_a_former_subscription_that_is_asked_about_is_asked_about_once_for_each_plan(house: MovingHouse) -> None:
    """However many days and batches it has usage in."""
    source = small_batches(SOURCE, 1)
    days, (last,) = range(5, 10), {10}
    for day in days:
        bill(house, source, day, {1: 100})
    house.lead(source, 1, to=2)
    bill(house, source, last, {1: 1})
    house.choose(source, 1, Choice.FROM_NOW)
    ended(house, source, 1)

    def asked(days: Sequence[int], quantity: int) -> int:
        whole = Period(a_day(source, days[0]).start, a_day(source, days[-1]).end)
        rows = [row for day in days for row in usage(source, a_day(source, day), {1: quantity})]
        comparison, folder = house.totals(source, whole, rows)
        house.sandbox.reset_requests()
        assert house.plan(source, comparison, folder).tally.held == len(days) * (quantity != 100)
        return int(house.sandbox.requests(SITES[source.name])["reading"])

    nothing = asked(days, 100)
    assert asked(days[:1], 130) == asked(days, 130) > nothing


def test_late_usage_reaches_a_former_subscription_that_has_lost_its_reference(house: MovingHouse) -> None:
    """A metered usage goes by the subscription's number, and needs no name of it."""
    url = f"{house.sandbox.maxio_url('acme')}/subscriptions/{FIRST}.json"
    moved(house)
    bill(house, SOURCE, 6, {1: 30})
    house.choose(SOURCE, 1, Choice.FROM_NOW)
    body = {"subscription": {"reference": ""}}
    assert requests.put(url, json=body, auth=KEYS["acme"], timeout=5).status_code == 200
    bill(house, SOURCE, 5, {1: 108})
    assert (house.waits(SOURCE, a_day(SOURCE, 5)), house.sums(SOURCE)) == ({}, {1: 108, 2: 30})


def test_late_usage_of_a_former_subscription_whose_period_has_closed_tells_so_on_its_bill(house: MovingHouse) -> None:
    """No account leads there, so its open period is asked for: the memo names the day that it is for."""
    source = lenient("api_calls", memo="calls")
    moved(house, source)
    bill(house, source, 6, {1: 30})
    house.choose(source, 1, Choice.FROM_NOW)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    bill(house, source, 5, {1: 108})
    assert house.sums(source) == {1: 108, 2: 30}
    assert house.sandbox.records(SITES[source.name])[-1]["memo"].endswith(" 2026-10-05 calls")


@pytest.mark.parametrize(("choice", "sums"), [(Choice.FROM_NOW, {2: 30, 3: 3}), (Choice.MOVE, {2: 90, 3: 3})], ids=str)
def test_what_was_quarantined_while_a_subscription_had_ended_is_listed_or_billed_after_the_choice(
    house: MovingHouse, choice: Choice, sums: dict[int, int]
) -> None:
    """The old contract ended on the fifth and the new one began on the seventh: the sixth was never billed anywhere."""
    source = lenient("api_calls")
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0, "max_rows": 100})
    source = replace(source, settings=source.settings.model_copy(update={"quarantine": limits}))
    bill(house, source, 5, {1: 100, 3: 1})
    ended(house, source, 1)
    bill(house, source, 6, {1: 60, 3: 1})
    house.lead(source, 1, to=2)
    bill(house, source, 7, {1: 30, 3: 1})
    bill(house, source, 6, {1: 60, 3: 1})
    day = a_day(source, 6)
    assert "was billed to" not in house.open_items(source, day)["reason"].item()
    house.choose(source, 1, choice)
    bill(house, source, 6, {1: 60, 3: 1})
    assert house.sums(source) == sums
    held = {FIRST: ("held", "60")} if choice == Choice.FROM_NOW else {}
    assert house.waits(source, day) == held
    nothing_more_is_sent(house, source, {6: {1: 60, 3: 1}, 7: {1: 30, 3: 1}})


# --- moved ------------------------------------------------------------------------------------------------------------


def test_a_move_credits_the_former_subscription_before_the_new_one_is_billed(house: MovingHouse) -> None:
    """In one run, and no share of what was billed stops it: as much is added there as is taken away here."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    assert house.choose(SOURCE, 1, Choice.MOVE)
    bill(house, SOURCE, 5, {1: 100})
    assert house.changes(SOURCE) == [(1, 100), (1, -100), (2, 100)]
    assert house.sums(SOURCE) == {2: 100}
    bill(house, SOURCE, 6, {1: 30})
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}, 6: {1: 30}})
    bill(house, SOURCE, 5, {1: 95})
    assert house.sums(SOURCE) == {2: 125}


def test_a_move_takes_only_what_the_account_used_from_a_shared_subscription(house: MovingHouse) -> None:
    """Of two accounts on it one moves, to a subscription that has usage of its own."""
    house.lead(SOURCE, 2, to=1)
    bill(house, SOURCE, 5, {1: 100, 2: 50, 3: 7})
    house.lead(SOURCE, 1, to=3)
    bill(house, SOURCE, 5, {1: 100, 2: 50, 3: 7})
    house.choose(SOURCE, 1, Choice.MOVE)
    bill(house, SOURCE, 5, {1: 100, 2: 55, 3: 8})
    assert house.sums(SOURCE) == {1: 55, 3: 108}
    assert house.changes(SOURCE)[-2:] == [(1, -95), (3, 101)]
    nothing_more_is_sent(house, SOURCE, {5: {1: 100, 2: 55, 3: 8}})


def test_two_accounts_that_change_places_are_both_moved(house: MovingHouse) -> None:
    """Each waits for the other's credit, and only the one that loses has one: no knot."""
    bill(house, SOURCE, 5, {1: 100, 2: 40})
    house.lead(SOURCE, 1, to=2)
    house.lead(SOURCE, 2, to=1)
    bill(house, SOURCE, 5, {1: 100, 2: 40})
    assert house.waits(SOURCE, a_day(SOURCE, 5)) == {FIRST: ("held", "-60"), SECOND: ("held", "60")}
    house.choose(SOURCE, 1, Choice.MOVE)
    house.choose(SOURCE, 2, Choice.MOVE)
    bill(house, SOURCE, 5, {1: 100, 2: 40})
    assert house.changes(SOURCE)[-2:] == [(1, -60), (2, 60)]
    assert house.sums(SOURCE) == {1: 40, 2: 100}


def test_a_worker_that_dies_between_credit_and_bill_leaves_the_bill_to_the_next(house: MovingHouse) -> None:
    """The credit is kept, and the new subscription is billed once."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    house.choose(SOURCE, 1, Choice.MOVE)
    house.fails_at = SECOND
    with pytest.raises(WorkerDied):
        bill(house, SOURCE, 5, {1: 100})
    assert house.sums(SOURCE) == {}
    house.fails_at = ""
    bill(house, SOURCE, 5, {1: 100})
    assert house.changes(SOURCE) == [(1, 100), (1, -100), (2, 100)]
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}})


@pytest.mark.parametrize("fault", ["lost_reply", "server_error", "server_error_after_commit"])
def test_whatever_becomes_of_a_request_a_move_bills_once_and_in_its_order(house: MovingHouse, fault: str) -> None:
    """A credit in doubt is no credit: the bill waits until the site has said."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    house.choose(SOURCE, 1, Choice.MOVE)
    house.sandbox.fault(SITES[SOURCE.name], fault, count=2)
    bill(house, SOURCE, 5, {1: 100})
    bill(house, SOURCE, 5, {1: 100})
    assert house.changes(SOURCE) == [(1, 100), (1, -100), (2, 100)]
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}})


def test_a_floor_that_takes_a_part_of_the_credit_keeps_the_bill_waiting(house: MovingHouse) -> None:
    """The renewal has invoiced the hundred, and the new balance is 60: the rest of the credit comes first."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    house.choose(SOURCE, 1, Choice.MOVE)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.lead(SOURCE, 3, to=1)
    bill(house, SOURCE, 6, {3: 60})
    bill(house, SOURCE, 5, {1: 100})
    assert house.waits(SOURCE, a_day(SOURCE, 5)) == {FIRST: ("held", "-40"), SECOND: ("held", "100")}
    assert house.sums(SOURCE) == {1: 100}
    reason = house.open_items(SOURCE, a_day(SOURCE, 5)).set_index("subscription")["reason"]
    assert reason[SECOND].startswith(f"moved: the credit of subscription {FIRST} goes first")
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}})
    bill(house, SOURCE, 7, {3: 45})
    bill(house, SOURCE, 5, {1: 100})
    assert house.sums(SOURCE) == {1: 105, 2: 100}
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}, 7: {3: 45}})


def test_what_a_person_writes_off_of_the_credit_lets_the_bill_go(house: MovingHouse) -> None:
    """They credit it on the invoice by hand."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    house.choose(SOURCE, 1, Choice.MOVE)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    bill(house, SOURCE, 5, {1: 100})
    left = house.open_items(SOURCE, a_day(SOURCE, 5)).set_index("subscription")["token"]
    house.ledger.decide(left[FIRST], State.WRITTEN_OFF, "decided by somebody: credited by hand")
    bill(house, SOURCE, 5, {1: 100})
    assert house.sums(SOURCE) == {1: 100, 2: 100}
    nothing_more_is_sent(house, SOURCE, {5: {1: 100}})


def test_quarantine_withholds_the_credit_and_the_bill_waits(house: MovingHouse) -> None:
    """A row that is put aside may be one of those that its account used before: nothing is taken away while it is."""
    limits = SOURCE.settings.quarantine.model_copy(update={"max_share": 1.0})
    source = replace(SOURCE, settings=SOURCE.settings.model_copy(update={"quarantine": limits}))
    day = a_day(source, 5)
    moved(house, source)
    bill(house, source, 5, {1: 100})
    house.choose(source, 1, Choice.MOVE)
    unfit = [Event("unfit", named(source, 1), "-1", day.start)]
    before = house.writing_requests(source)
    house.run(source, day, [*usage(source, day, {1: 100}), *unfit])
    assert house.writing_requests(source) == before
    assert house.waits(source, day) == {FIRST: ("held", "-100"), SECOND: ("held", "100")}
    bill(house, source, 5, {1: 100})
    assert house.sums(source) == {2: 100}


def test_a_late_credit_waits_as_the_source_says_and_goes_when_a_person_lets_it(house: MovingHouse) -> None:
    """Both days lie in a closed billing period; the credit is released by name, and then the bill."""
    source = lenient("api_calls", late_usage="hold")
    day = a_day(source, 5)
    moved(house, source)
    bill(house, source, 5, {1: 100})
    house.choose(source, 1, Choice.MOVE)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.lead(source, 3, to=1)
    house.run(source, day, usage(source, day, {1: 100}))
    assert house.waits(source, day) == {FIRST: ("held", "-100"), SECOND: ("held", "100")}
    house.run(source, november(source), usage(source, november(source), {3: 500}))
    token = house.open_items(source, day).set_index("subscription")["token"]
    house.ledger.decide(token[FIRST], State.HELD, "decided by somebody: agreed")
    assert house.sweep(source).accepted == 1
    assert house.sums(source) == {1: 500}
    house.run(source, day, usage(source, day, {1: 100}))
    assert house.waits(source, day) == {SECOND: ("held", "100")}
    house.release(source, day)
    house.sweep(source)
    assert house.sums(source) == {1: 500, 2: 100}


def test_late_usage_that_is_released_after_the_move_was_chosen_does_not_go_to_the_former_one(
    house: MovingHouse,
) -> None:
    """It was held at the first subscription; by the choice it is the second one's, and the next run says so."""
    source = lenient("api_calls", late_usage="hold")
    day = a_day(source, 5)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, usage(source, day, {1: 100}))
    house.lead(source, 1, to=2)
    house.run(source, november(source), usage(source, november(source), {1: 30}))
    house.choose(source, 1, Choice.MOVE)
    house.release(source, day)
    assert house.sweep(source).accepted == 0
    assert house.sums(source) == {2: 30}
    house.run(source, day, usage(source, day, {1: 100}))
    house.release(source, day)
    house.sweep(source)
    assert house.sums(source) == {2: 130}


def test_what_vanishes_while_it_moves_is_withdrawn_and_that_stops_and_asks(house: MovingHouse) -> None:
    """Only what the new subscription gets is taken from the old one without a question."""
    moved(house)
    bill(house, SOURCE, 5, {1: 100})
    house.choose(SOURCE, 1, Choice.MOVE)
    with pytest.raises(NeedsDecision, match="would withdraw 60 of 100"):
        bill(house, SOURCE, 5, {1: 40})
    assert house.sums(SOURCE) == {1: 100}


def test_chargeover_moves_where_the_account_takes_negative_usage_and_waits_where_not(house: MovingHouse) -> None:
    """Without leave the credit is held, and so is the bill; with it both go, since the former cycle is open."""
    moved(house, VOIP)
    bill(house, VOIP, 5, {1: 100})
    house.choose(VOIP, 1, Choice.MOVE)
    house.lead(VOIP, 3, to=1)
    house.allow_negative = False
    bill(house, VOIP, 5, {1: 100, 3: 5})
    held = {"package:pkg-001": ("held", "-95"), "package:pkg-002": ("held", "100")}
    assert (house.waits(VOIP, a_day(VOIP, 5)), house.sums(VOIP)) == (held, {1: 100})
    house.allow_negative = True
    bill(house, VOIP, 5, {1: 100, 3: 5})
    assert (house.waits(VOIP, a_day(VOIP, 5)), house.sums(VOIP)) == ({}, {1: 5, 2: 100})
    nothing_more_is_sent(house, VOIP, {5: {1: 100, 3: 5}})


def test_a_line_that_an_upgrade_replaces_is_no_move(house: MovingHouse) -> None:
    """The same package has another line by now: nothing is held, and a correction goes there."""
    bill(house, VOIP, 5, {1: 100})
    url = f"{house.sandbox.chargeover_url('telco')}/api/v3/package/713/_action/upgrade"
    assert requests.post(url, json=UPGRADE, auth=KEYS["telco"], timeout=5).status_code == 200
    bill(house, VOIP, 5, {1: 104})
    assert (house.waits(VOIP, a_day(VOIP, 5)), house.ledger.placements(VOIP.name).empty) == ({}, True)
    assert house.ledger.accepted(VOIP.name, a_day(VOIP, 5))["quantity"].tolist() == ["100", "4"]


# --- events -----------------------------------------------------------------------------------------------------------


def renamed(house: MovingHouse) -> None:
    """Bill 100 of orbit-01; then give its name to the second subscription, and the first an old one's."""
    bill(house, EVENTS, 5, {1: 100})
    house.rename((1, "orbit-old"), (2, "orbit-two"), (2, "orbit-01"))


def test_events_of_before_are_held_on_both_sides_and_later_ones_reach_the_new_subscription(house: MovingHouse) -> None:
    """The stream asks whose name it is when an event comes."""
    renamed(house)
    bill(house, EVENTS, 5, {1: 100})
    bill(house, EVENTS, 6, {1: 30})
    assert house.sums(EVENTS) == {1: 100, 2: 30}
    assert len(house.waits(EVENTS, a_day(EVENTS, 5))) == 2
    house.choose(EVENTS, 1, Choice.FROM_NOW)
    bill(house, EVENTS, 5, {1: 100})
    assert house.waits(EVENTS, a_day(EVENTS, 5)) == {}
    nothing_more_is_sent(house, EVENTS, {5: {1: 100}, 6: {1: 30}})


def test_events_move_by_the_name_that_the_former_subscription_has_by_now(house: MovingHouse) -> None:
    """No name of the warehouse reaches it any more; a credit under its old name would be another customer's."""
    renamed(house)
    bill(house, EVENTS, 5, {1: 100})
    house.choose(EVENTS, 1, Choice.MOVE)
    bill(house, EVENTS, 5, {1: 100})
    assert house.sums(EVENTS) == {2: 100}
    nothing_more_is_sent(house, EVENTS, {5: {1: 100}})


# --- raw events -------------------------------------------------------------------------------------------------------


def raw() -> BillingSource:
    """Return the shipped source of events, billed by raw events."""
    destination = EVENTS.destination.model_copy(update={"mode": "events"})
    return replace(EVENTS, destination=destination)


def test_raw_events_stay_where_they_were_counted_and_new_ones_reach_the_new_subscription(house: MovingHouse) -> None:
    """What was sent is not told as changed; what comes late for the old day is held, before the choice and after it."""
    source = raw()
    day = a_day(source, 5)
    bill(house, source, 5, {1: 100})
    house.rename((1, "orbit-old"), (2, "orbit-two"), (2, "orbit-01"))
    bill(house, source, 6, {1: 30})
    late = [*usage(source, day, {1: 100}), Event("late", "orbit-01", "8", day.start, ("eu", "premium"))]
    for why, choice in (("`usage-billing ledger moves`", Choice.FROM_NOW), ("is not known", None)):
        house.run(source, day, late)
        left = house.open_items(source, day)
        assert left[["state", "quantity"]].to_numpy().tolist() == [["held", "1"]]
        assert why in left["reason"].item()
        if choice:
            house.choose(source, 1, choice)
    assert house.sums(source) == {1: 100, 2: 30}


def test_raw_events_of_an_account_that_was_led_back_before_anything_was_billed_elsewhere_are_sent(
    house: MovingHouse,
) -> None:
    """The name was another's for an hour: it belongs where it did with either choice, and nobody is asked for one."""
    source = raw()
    day, another = a_day(source, 5), a_day(source, 6)
    bill(house, source, 5, {1: 100})
    house.rename((1, "orbit-old"), (2, "orbit-01"))
    house.totals(source, another, usage(source, another, {1: 60}))
    house.rename((2, "orbit-02"), (1, "orbit-01"))
    late = Event("late", "orbit-01", "5", day.start, ("eu", "premium"))
    house.run(source, day, [*usage(source, day, {1: 100}), late])
    assert Moves(source.name, house.ledger.placements(source.name)).undecided.empty
    assert (house.listed(source, day), house.sums(source)) == ([], {1: 105})
    bill(house, source, 6, {1: 60})
    assert house.sums(source) == {1: 165}


# --- by hand, and side by side ----------------------------------------------------------------------------------------


@pytest.fixture
def commands(house: MovingHouse, monkeypatch: pytest.MonkeyPatch) -> Iterator[MovingHouse]:
    """A house whose ledger and sites the command finds."""
    from usage_billing import installation  # noqa: PLC0415

    ledger = {"conn_type": "sqlite", "host": house.ledger_url.removeprefix("sqlite:///")}
    extra = {"subdomain": "acme", "region": "us", "settle_after_seconds": 1}
    site = {"conn_type": "maxio", "host": house.sandbox.maxio_url("acme"), "password": "k", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_USAGE_LEDGER", json.dumps(ledger))
    monkeypatch.setenv("AIRFLOW_CONN_MAXIO_ACME", json.dumps(site))
    yield house
    installation.ledger().close()
    installation._ledger.cache_clear()


def test_what_is_to_decide_is_listed_and_decided_by_name(
    commands: MovingHouse, capsys: pytest.CaptureFixture[str]
) -> None:
    """The list names account, both subscriptions, since when and how much; the choice stands, with who and why."""
    house, source = commands, SOURCE
    moved(house)
    bill(house, source, 5, {1: 100})
    assert main(["ledger", "moves", "--source", "api_calls"]) == 0
    used = "account 'acct-0001', used before 2026-10-06T04:00Z"
    line = f"api_calls: {used}: from 50100001 (held -100) to 50100002 (held 100)"
    assert capsys.readouterr().out == f"{line}\n1 moves to decide\n"
    because = ["--because", "the contract changed on the 6th"]
    chosen = ["ledger", "move", "api_calls", "acct-0001", "--choose"]
    assert main([*chosen, "from_now", *because]) == 0
    assert "the next run of the usage periods acts by it" in capsys.readouterr().out
    assert main([*chosen, "from_now", *because]) == 0
    assert "stood already" in capsys.readouterr().out
    assert main([*chosen, "move", *because]) == 1
    assert "from_now was chosen by" in capsys.readouterr().err
    assert house.ledger.placements("api_calls")["note"].iloc[-1] == because[1]
    assert main(["ledger", "moves"]) == 0
    assert capsys.readouterr().out == "0 moves to decide\n"
    assert main(["ledger", "moves", "--source", "api_cals"]) == 1
    assert "knows no billing source" in capsys.readouterr().err
    bill(house, source, 5, {1: 100})
    assert house.waits(source, a_day(source, 5)) == {}


def test_a_move_of_raw_events_is_refused_with_what_to_do(
    commands: MovingHouse, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No call takes an event back."""
    from usage_billing import installation  # noqa: PLC0415

    source = raw()
    monkeypatch.setattr(installation, "billing_source", lambda _name: source)
    monkeypatch.setattr(installation, "destination_of", commands.destination)
    bill(commands, source, 5, {1: 100})
    assert main(["ledger", "move", source.name, "orbit-01", "--choose", "move", "--because", "so"]) == 1
    assert "no call takes one back: choose from_now" in capsys.readouterr().err


def test_a_run_that_looked_before_the_move_and_plans_after_it_is_held(house: MovingHouse) -> None:
    """It still counts the new day at the first subscription: the next run of that day bills it at the second."""
    bill(house, SOURCE, 5, {1: 100})
    day = a_day(SOURCE, 6)
    comparison, folder = house.totals(SOURCE, day, usage(SOURCE, day, {1: 30}))
    house.lead(SOURCE, 1, to=2)
    bill(house, SOURCE, 5, {1: 100})
    house.deliver(SOURCE, comparison, folder)
    assert house.waits(SOURCE, day) == {FIRST: ("held", "30")}
    assert "was seen elsewhere after this run had looked it up" in house.open_items(SOURCE, day)["reason"].item()
    bill(house, SOURCE, 6, {1: 30})
    assert (house.waits(SOURCE, day), house.sums(SOURCE)) == ({}, {1: 100, 2: 30})


def test_what_is_decided_while_a_run_delivers_is_for_the_next_one(house: MovingHouse) -> None:
    """A run is held by what it was counted by, however often it plans again."""
    moved(house)
    day = a_day(SOURCE, 5)
    comparison, folder = house.totals(SOURCE, day, usage(SOURCE, day, {1: 100}))
    house.choose(SOURCE, 1, Choice.FROM_NOW)
    house.deliver(SOURCE, comparison, folder)
    assert house.waits(SOURCE, day) == {FIRST: ("held", "-100"), SECOND: ("held", "100")}
    again, _ = house.validated(SOURCE, day, usage(SOURCE, day, {1: 100}), comparison.reading.extraction)
    assert again.reading.validation == comparison.reading.validation + 1
    house.deliver(SOURCE, again, folder)
    assert (house.waits(SOURCE, day), house.sums(SOURCE)) == ({}, {1: 100})


def test_two_deliver_tasks_at_once_move_it_once(house: MovingHouse) -> None:
    """Each plans for itself, and one of them sends."""
    moved(house)
    day = a_day(SOURCE, 5)
    bill(house, SOURCE, 5, {1: 100})
    house.choose(SOURCE, 1, Choice.MOVE)
    comparison, folder = house.totals(SOURCE, day, usage(SOURCE, day, {1: 100}))
    both = [threading.Thread(target=house.deliver, args=(SOURCE, comparison, folder)) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    bill(house, SOURCE, 5, {1: 100})
    assert house.changes(SOURCE) == [(1, 100), (1, -100), (2, 100)]
