"""What a site would take and not bill is not sent: usage of a subscription that has ended, is gone, or is in its trial.

The verdict is the sandbox's count: what it billed, and how many requests could have changed that.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import requests

from stories import GENTLE, SITES, WORLDS, Event, House, a_day, a_house, shipped
from usage_billing.errors import Misconfigured, NotApplied
from usage_billing.records import Period, State
from usage_billing.sandbox import Sandbox
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource

SOURCE = shipped("api_calls")
SITE = SITES["api_calls"]
ACCOUNT, NUMBER, CUSTOMER = "acct-0001", 50100001, 90100001
KEY = ("sandbox-acme-key", "x")
HASTY = replace(GENTLE, patience=timedelta(milliseconds=100))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


def usage(source: BillingSource, quantity: str, account: str = ACCOUNT) -> Event:
    """Make one event of the fifth of October."""
    dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
    return Event(f"{account}-{quantity}", account, quantity, a_day(source, 5).start + timedelta(hours=8), dimensions)


def lenient(source: BillingSource, **destination: object) -> BillingSource:
    """Return the source with leave to quarantine and withdraw everything, and other keys of its destination."""
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0})
    settings = source.settings.model_copy(update={"quarantine": limits, "max_withdraw_share": 1.0})
    return replace(source, settings=settings, destination=source.destination.model_copy(update=destination))


def cancel(house: House) -> None:
    """Let the site's owner end the subscription."""
    url = f"{house.sandbox.maxio_url('acme')}/subscriptions/{NUMBER}.json"
    assert requests.delete(url, auth=KEY, timeout=5).status_code == 200


def purge(house: House) -> None:
    """Let the site's owner remove the subscription, so that the site knows nothing of it any more."""
    url = f"{house.sandbox.maxio_url('acme')}/subscriptions/{NUMBER}/purge.json"
    assert requests.post(url, params={"ack": CUSTOMER}, auth=KEY, timeout=5).status_code == 200


def listed(house: House, source: BillingSource, day: Period) -> dict[str, str]:
    """Return the reasons of a day's open items by the state they stand in."""
    left = house.ledger.open_items(source.name, Period.around(source.periods(day)))
    return dict(zip(left["state"], left["reason"], strict=True))


@pytest.mark.parametrize("trouble", ["throttle", "unauthorized"])
@pytest.mark.parametrize(("end", "words"), [(cancel, "is canceled"), (purge, "is gone")])
def test_what_a_later_try_would_send_to_an_ended_subscription_is_held(
    house: House, end: Callable[[House], None], words: str, trouble: str
) -> None:
    """Written down while it was active, tried in vain, ended meanwhile: the site would take it and never bill it."""
    day = a_day(SOURCE, 5)
    house.sandbox.switch(SITE, usage_on_ended_subscription="accept")
    comparison, folder = house.totals(SOURCE, day, [usage(SOURCE, "90")])
    house.sandbox.fault(SITE, trouble, count=1000)
    with pytest.raises((NotApplied, Misconfigured)):
        house.deliver(SOURCE, comparison, folder, manners=HASTY)
    house.sandbox.clear_faults()
    end(house)
    before = house.writing_requests(SOURCE)

    done = house.deliver(SOURCE, comparison, folder)

    assert (done.held, done.accepted) == (1, 0)
    assert house.writing_requests(SOURCE) == before
    assert house.billed(SOURCE) == {}
    assert words in listed(house, SOURCE, day)["held"]


def test_a_subscription_is_read_once_for_all_that_waits_for_it(house: House) -> None:
    """Ten deliveries of one subscription that come again make one question, and go."""
    days = [a_day(SOURCE, day) for day in range(2, 12)]
    interval = Period(days[0].start, days[-1].end)
    events = [replace(usage(SOURCE, "3"), event_id=f"e{n}", time=day.start) for n, day in enumerate(days)]
    comparison, folder = house.totals(SOURCE, interval, events)
    house.sandbox.fault(SITE, "throttle", count=1000)
    with pytest.raises(NotApplied):
        house.deliver(SOURCE, comparison, folder, manners=HASTY)
    house.sandbox.clear_faults()
    plan = house.plan(SOURCE, comparison, folder)
    house.sandbox.reset_requests()

    house.deliver(SOURCE, comparison, folder, first=plan)

    assert house.sandbox.requests(SITE)["by_route"].get("read_subscription") == 1
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(30)}


# --- trials ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["api_calls", "platform_events"])
def trial(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[House, BillingSource, str]]:
    """A house, a source, and an account that is in its trial, which ends with the open period."""
    worlds = tmp_path / "worlds"
    worlds.mkdir()
    added = {
        "acme": "  - {id: 50100070, reference: trying, family: saas, state: trialing}\n",
        "orbit": "  - {id: 50200070, reference: trying, family: platform, state: trialing, activated: [raw-count, "
        "platform-units]}\n",
    }
    for world in WORLDS:
        text = world.read_text()
        if world.stem in added:
            text = text.replace("\nsubscriptions:\n", f"\nsubscriptions:\n{added[world.stem]}")
        (worlds / world.name).write_text(text)
    with Sandbox(sorted(worlds.glob("*.yaml"))) as sandbox:
        house = House(sandbox, tmp_path)
        yield house, lenient(shipped(request.param)), "trying"
        house.ledger.close()


@pytest.mark.parametrize("becomes", ["dropped", "first_paid_renewal"])
def test_usage_of_a_trial_is_quarantined_by_name(trial: tuple[House, BillingSource, str], becomes: str) -> None:
    """Whether the site would bill it, nobody knows: nothing is sent, and the reason says what to do."""
    house, source, account = trial
    day, site = a_day(source, 5), SITES[source.name]
    house.sandbox.switch(site, trial_usage=becomes)

    comparison, folder = house.totals(source, day, [usage(source, "90", account)])
    house.deliver(source, comparison, folder)

    (target,) = house.destination(source).resolve([account])
    assert "in its trial" in target.unknown
    assert "destination.bill_trials" in target.unknown
    assert (comparison.rows_accepted, comparison.rows_quarantined) == (0, 1)
    assert house.writing_requests(source) == 0
    house.sandbox.move_clock("2026-11-03T12:00:00Z")
    assert house.billed(source) == {}


def test_usage_of_a_trial_is_billed_where_a_person_says_that_the_site_does(
    trial: tuple[House, BillingSource, str],
) -> None:
    """With bill_trials it goes at once, and stands on the first paid invoice."""
    house, source, account = trial
    source, day = lenient(source, bill_trials=True), a_day(source, 5)

    house.run(source, day, [usage(source, "90", account)])

    assert house.billed(source) == {account: Decimal(90)}
    assert house.reconcile(source, day).ties_out
    house.sandbox.move_clock("2026-12-03T12:00:00Z")
    assert house.billed(source) == {account: Decimal(90)}


def test_what_was_quarantined_in_a_trial_is_billed_once_by_a_run_after_it(
    trial: tuple[House, BillingSource, str],
) -> None:
    """A metered component takes it in the open period; a stream would not bill an event of the trial, so it is held."""
    house, source, account = trial
    day = a_day(source, 5)
    house.run(source, day, [usage(source, "90", account)])
    house.sandbox.move_clock("2026-11-03T12:00:00Z")

    for _ in range(2):
        house.run(source, day, [usage(source, "90", account)])

    metered = source.name == "api_calls"
    assert house.billed(source) == ({account: Decimal(90)} if metered else {})
    assert house.states(source, day) == ({"accepted": 1} if metered else {"held": 1})


# --- answers that are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error_inside", "wrong_type", "empty_body", "truncated_body"])
def test_a_look_up_that_failed_makes_nobody_unknown(house: House, fault: str) -> None:
    """Four accounts, broken answers: the run stops, however much may be quarantined, and the next one bills all."""
    source, day = lenient(SOURCE), a_day(SOURCE, 5)
    accounts = [f"acct-{number:04d}" for number in range(1, 5)]
    rows = [usage(source, "10", account) for account in accounts]
    house.sandbox.fault(SITE, fault, route="lookup_subscription", reads=True, after=1, count=100)

    with pytest.raises(NotApplied):
        house.run(source, day, rows)
    assert house.billed(source) == {}
    house.sandbox.clear_faults()
    house.run(source, day, rows)

    assert house.billed(source) == dict.fromkeys(accounts, Decimal(10))


# --- doubts that no waiting ends ------------------------------------------------------------------------------------


def test_a_doubt_about_a_subscription_that_is_gone_is_for_a_person(house: House) -> None:
    """Nothing tells what was billed before it was removed: the sweep says so, and then it can be decided."""
    day = a_day(SOURCE, 5)
    comparison, folder = house.totals(SOURCE, day, [usage(SOURCE, "90")])
    house.sandbox.fault(SITE, "lost_reply", count=1)
    with pytest.raises(NotApplied):
        house.deliver(SOURCE, comparison, folder, manners=replace(HASTY, patience=timedelta(milliseconds=1)))
    (doubt,) = house.ledger.doubts(SOURCE.name)
    purge(house)
    with pytest.raises(Misconfigured, match="asked"):
        house.ledger.decide(doubt.token, State.ACCEPTED, "me: seen on the invoice", Decimal(90))
    wait_until_due(house)

    swept = sweep(house.destination(SOURCE), house.ledger)

    assert swept.settled.ended == 0
    assert "is gone" in swept.still_open[0].reason
    house.ledger.decide(doubt.token, State.ACCEPTED, "me: seen on the invoice", Decimal(90))
    assert house.states(SOURCE, day) == {"accepted": 1}


def wait_until_due(house: House) -> None:
    """Wait until the site may be asked about what was sent."""
    time.sleep(house.destination(SOURCE).settle_after.total_seconds() + 0.1)
