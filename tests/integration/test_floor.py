"""A metered balance never falls below 0: deductions go as far as it takes them, and the rest stays listed by name."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stories import GENTLE, SITES, Event, House, a_day, a_house, shipped
from usage_billing.cli import main
from usage_billing.deliver import resume
from usage_billing.destinations.base import Destination
from usage_billing.destinations.maxio import MaxioSite
from usage_billing.records import Period, State
from usage_billing.release import reissue
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource
from usage_billing.workers import Means

SOURCE = shipped("api_calls")
SITE = SITES["api_calls"]
ACCOUNT = "acct-0001"
DAY = a_day(SOURCE, 5)


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


def calls(quantity: int, day: Period = DAY, account: str = ACCOUNT) -> Event:
    """Make one event of many calls."""
    dimensions = ("eu", "premium")[: len(SOURCE.settings.dimensions)]
    return Event(f"{account}-{day.start:%d}", account, str(quantity), day.start + timedelta(hours=8), dimensions)


def listed(house: House, source: BillingSource = SOURCE, day: Period = DAY) -> dict[str, Decimal]:
    """Return the open differences of a day by the state they stand in."""
    periods = source.periods(day)
    left = house.ledger.open_items(source.name, Period(periods[0].start, periods[-1].end))
    sums: dict[str, Decimal] = {}
    for state, quantity in zip(left["state"], left["quantity"], strict=True):
        sums[state] = sums.get(state, Decimal(0)) + Decimal(quantity)
    return sums


def lenient(source: BillingSource = SOURCE) -> BillingSource:
    """Return the source with leave to withdraw everything, which is not what these stories are about."""
    return replace(source, settings=source.settings.model_copy(update={"max_withdraw_share": 1.0}))


class Meddled(House):
    """A house in which somebody else deducts at the site right before each deduction of ours lands."""

    foreign = "0"
    loses = False
    """Whether the reply to the deduction that comes second is lost."""

    def destination(self, source: BillingSource) -> Destination:
        """Return the destination, with the meddler in its client."""
        found = super().destination(source)
        found.client = _Meddler(found.client.settings, self)
        return found


class _Meddler(MaxioSite):
    def __init__(self, settings: Any, house: Meddled) -> None:
        super().__init__(settings)
        self._house = house

    def create_usage(self, subscription_id: int, component: int | str, body: str) -> dict[str, Any]:
        """Let the other one be first."""
        if '"quantity":-' in body and (foreign := self._house.foreign) != "0":
            self._house.foreign = "0"
            super().create_usage(subscription_id, component, f'{{"usage":{{"quantity":{foreign},"memo":"by hand"}}}}')
            if self._house.loses:
                self._house.sandbox.fault(SITE, "lost_reply", count=1)
        return super().create_usage(subscription_id, component, body)


def test_a_correction_downward_is_taken_off_the_open_balance(house: House) -> None:
    """Ten calls were billed, eight are owed: two are deducted, proven by the site's own event."""
    house.run(SOURCE, DAY, [calls(100)])
    house.run(SOURCE, DAY, [calls(92)])
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(92)}
    assert listed(house) == {}
    assert house.reconcile(SOURCE, DAY).ties_out


def test_what_the_balance_does_not_take_waits_by_name_and_goes_when_there_is_one(house: House) -> None:
    """After a renewal the balance is 0: the deduction waits, and goes step by step as new usage comes in."""
    house.run(SOURCE, DAY, [calls(100)])
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    house.run(lenient(), DAY, [calls(91)])
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(100)}
    assert listed(house) == {"held": Decimal(-9)}
    before = house.writing_requests(SOURCE)
    house.run(lenient(), DAY, [calls(91)])
    assert house.writing_requests(SOURCE) == before

    november = a_day(SOURCE, 6)
    house.run(SOURCE, november, [calls(7, november)])
    house.run(lenient(), DAY, [calls(91)])
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(100)}, "7 came and 7 of the 9 were taken off"
    assert listed(house) == {"held": Decimal(-2)}

    house.run(SOURCE, november, [calls(20, november)])
    house.run(lenient(), DAY, [calls(91)])
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(111)}
    assert listed(house) == {}
    assert house.reconcile(SOURCE, DAY).ties_out


@pytest.mark.parametrize("stored", ["as_sent", "clipped"])
def test_what_somebody_else_took_first_reopens_by_name(tmp_path: Path, stored: str) -> None:
    """A deduction by hand lands between our look at the balance and ours: the site's event proves what counted."""
    with a_house(tmp_path, Meddled) as house:
        assert isinstance(house, Meddled)
        house.sandbox.switch(SITE, negative_at_floor=stored)
        house.run(SOURCE, DAY, [calls(100)])
        house.foreign = "-97"
        house.run(lenient(), DAY, [calls(92)])
        assert house.billed(SOURCE) == {}, "97 by hand and 3 of ours made 0"
        assert listed(house) == {"held": Decimal(-5)}
        assert house.reconcile(SOURCE, DAY).ties_out
        house.run(lenient(), DAY, [calls(95)])
        assert listed(house) == {"held": Decimal(-2)}


@pytest.mark.parametrize("lost", [False, True])
def test_what_the_site_did_not_count_of_a_released_deduction_is_listed_with_no_run_at_all(
    tmp_path: Path, lost: bool
) -> None:
    """A sweep sends it, and somebody else is first: no plan is near, and the rest stands there by name all the same."""
    with a_house(tmp_path, Meddled) as house:
        assert isinstance(house, Meddled)
        house.run(SOURCE, DAY, [calls(100)])
        house.sandbox.move_clock("2026-11-02T12:00:00Z")
        house.run(lenient(), DAY, [calls(91)])
        november = a_day(SOURCE, 6)
        house.run(SOURCE, november, [calls(20, november)])
        held = house.ledger.open_items(SOURCE.name, None)["token"].tolist()
        house.ledger.decide(held, State.HELD, "decided by somebody: they were told")
        house.foreign, house.loses = "-15", lost
        swept_until_quiet(house)
        assert house.billed(SOURCE) == {ACCOUNT: Decimal(100)}, "of 20, 15 went by hand and 5 of our 9"
        assert listed(house) == {"held": Decimal(-4)}
        house.run(SOURCE, november, [calls(30, november)])
        house.run(lenient(), DAY, [calls(91)])
        assert house.billed(SOURCE) == {ACCOUNT: Decimal(106)}
        assert listed(house) == {}


def swept_until_quiet(house: House) -> None:
    """Sweep as the DAG does, until nothing is in doubt or ready any more."""
    destination = house.destination(SOURCE)
    for _ in range(5):
        sweep(destination, house.ledger)
        reissue(destination, house.ledger)
        resume(destination, house.ledger, GENTLE, Means(stop=threading.Event()))
        time.sleep(1.1)  # Then a question may be asked.


@pytest.mark.parametrize("fault", ["lost_reply", "server_error_after_commit"])
@pytest.mark.parametrize("stored", ["as_sent", "clipped"])
def test_a_lost_reply_to_a_deduction_is_settled_by_what_it_moved(house: House, fault: str, stored: str) -> None:
    """The deduction is found in the list, and its event says how much of it counted."""
    house.sandbox.switch(SITE, negative_at_floor=stored)
    house.run(SOURCE, DAY, [calls(100)])
    house.sandbox.fault(SITE, fault, count=1)
    done = house.run(lenient(), DAY, [calls(92)])
    assert done.doubted == 1
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(92)}
    assert listed(house) == {}
    assert house.reconcile(SOURCE, DAY).ties_out


def test_near_a_renewal_a_deduction_waits(house: House) -> None:
    """Seconds before the period ends nothing is deducted: it would meet the new period's empty balance."""
    house.run(SOURCE, DAY, [calls(100)])
    zone = SOURCE.settings.timezone
    ends = (a_day(SOURCE, 31).end).astimezone(zone)
    house.sandbox.move_clock(ends - timedelta(seconds=1))
    house.run(lenient(), DAY, [calls(92)])
    assert listed(house) == {"held": Decimal(-8)}
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(100)}


def test_two_sources_of_one_component_never_deduct_more_than_there_is(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both want to take back 60 of a balance of 100, at once: 100 go, 20 stay listed."""
    changes = {"name": "api_calls_two", "shares_component_with": (SOURCE.name,)}
    other = replace(SOURCE, settings=SOURCE.settings.model_copy(update=changes))
    monkeypatch.setitem(SITES, other.name, SITE)
    house.run(SOURCE, DAY, [calls(60)])
    house.run(other, DAY, [calls(60)])
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    later = a_day(SOURCE, 7)
    house.run(SOURCE, later, [calls(100, later)])
    both = [threading.Thread(target=house.run, args=(lenient(source), DAY, [calls(0)])) for source in (SOURCE, other)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(120)}, "120 invoiced, and of the open 100 nothing is left"
    held = listed(house, SOURCE).get("held", Decimal(0)) + listed(house, other).get("held", Decimal(0))
    assert held == Decimal(-20)


def test_a_deduction_that_a_person_wrote_off_is_never_made(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was credited by hand, and the ledger told: no later balance takes it a second time."""
    connection = {"conn_type": "sqlite", "host": house.ledger_url.removeprefix("sqlite:///")}
    monkeypatch.setenv("AIRFLOW_CONN_USAGE_LEDGER", json.dumps(connection))
    house.run(SOURCE, DAY, [calls(100)])
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    house.run(lenient(), DAY, [calls(91)])
    periods = SOURCE.periods(DAY)
    (token,) = house.ledger.open_items(SOURCE.name, Period(periods[0].start, periods[-1].end))["token"]
    assert main(["ledger", "decide", token, "accepted", "--because", "no"]) == 1
    assert "it is held" in capsys.readouterr().err
    assert main(["ledger", "decide", token, "write-off", "--because", "credited on invoice 1234"]) == 0
    assert "credited on invoice 1234" in capsys.readouterr().out
    later = a_day(SOURCE, 6)
    house.run(SOURCE, later, [calls(50, later)])
    house.run(lenient(), DAY, [calls(91)])
    assert house.billed(SOURCE) == {ACCOUNT: Decimal(150)}
    assert listed(house) == {}


def test_a_balance_finer_than_the_meter_is_taken_off_in_whole_units(house: House) -> None:
    """Another source left 8.5 on the balance: a meter of whole numbers deducts 8, and goes on working."""
    settings = SOURCE.settings.model_copy(update={"max_withdraw_share": 1.0})
    source = replace(
        SOURCE,
        settings=settings,
        destination=SOURCE.destination.model_copy(update={"component": "handle:storage-gb"}),
    )
    house.run(source, DAY, [calls(100)])
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    client = house.destination(source).client
    client.create_usage(50_100_001, "handle:storage-gb", '{"usage":{"quantity":8.5,"memo":"by hand"}}')
    house.run(source, DAY, [calls(80)])
    house.run(source, DAY, [calls(80)])
    assert listed(house, source) == {"held": Decimal(-12)}
    assert house.billed(source) == {ACCOUNT: Decimal("100.5")}


def test_what_a_sweep_found_out_about_a_deduction_is_planned_for_by_the_run(tmp_path: Path) -> None:
    """The proof comes late, and a sweep sees it first: the rest is listed all the same, and the run says so."""
    with a_house(tmp_path, Meddled) as house:
        assert isinstance(house, Meddled)
        house.run(SOURCE, DAY, [calls(100)])
        house.sandbox.switch(SITE, events_delay_seconds=1)
        house.foreign = "-97"
        comparison, folder = house.totals(lenient(), DAY, [calls(92)])
        swept = _SweptWhileWaiting(house)
        house.deliver(lenient(), comparison, folder, stop=swept)  # type: ignore[arg-type]
        assert swept.found > 0, "the sweep was not first, so this proved nothing"
        assert listed(house) == {"held": Decimal(-5)}
        assert house.plan(lenient(), comparison, folder).tally.unsettled == 0


class _SweptWhileWaiting:
    """Instead of waiting, lets a sweep be first."""

    def __init__(self, house: House) -> None:
        self.found = 0
        self._house = house

    def is_set(self) -> bool:
        return False

    def wait(self, timeout: float | None = None) -> bool:  # noqa: ARG002
        time.sleep(1.1)
        self.found += sweep(House.destination(self._house, SOURCE), self._house.ledger).settled.found
        return False
