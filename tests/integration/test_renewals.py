"""A request that is on its way while its billing period ends: what may have landed too late is never called billed."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stories import Event, House, a_day, a_house, shipped
from usage_billing.deliver import Delivered, Manners, deliver
from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt
from usage_billing.ledger import Ledger
from usage_billing.records import NOBODY_CAN_TELL, Period
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource
from usage_billing.workers import Means

PATIENT = Manners(threads=1, lease_lasts=timedelta(hours=3), patience=timedelta(minutes=30))
CALLS = {"platform_events": "record_events", "voip_minutes": "create_usage"}
ACCOUNTS = {"platform_events": "orbit-01", "voip_minutes": "pkg-001"}


class Renewing(House):
    """A house whose ledger lives on the sandbox's time, near the end of its billing periods."""

    def __init__(self, sandbox: Any, folder: Path) -> None:
        super().__init__(sandbox, folder)
        self.ledger.close()
        self.ledger = Ledger.connect(self.ledger_url, clock=sandbox.now)

    def destination(self, source: BillingSource) -> Destination:
        """Return the source's destination with the settling time of a real site."""
        found = super().destination(source)
        found.client.settings = replace(found.client.settings, settle_after_seconds=150)
        return found

    def last_day(self, source: BillingSource) -> tuple[Period, list[Event]]:
        """Return the last whole day before the renewal, and one event of it."""
        day = a_day(source, 30)
        dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
        return day, [Event("e1", ACCOUNTS[source.name], "7", day.start + timedelta(hours=9), dimensions)]

    def just_before_the_renewal(self, source: BillingSource, seconds: float) -> datetime:
        """Move the clock to some seconds before the account's billing period ends; return when it does."""
        (target,) = self.destination(source).resolve([ACCOUNTS[source.name]])
        assert target.open_until is not None
        self.sandbox.move_clock(target.open_until - timedelta(seconds=seconds))
        return target.open_until

    def states_and_reasons(self, source: BillingSource) -> list[tuple[str, str]]:
        """Return state and reason of every delivery of the day."""
        day, _ = self.last_day(source)
        rows = self.ledger.standing(source.name, Period.around(source.periods(day)))
        return list(zip(rows["state"], rows["reason"], strict=True))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Renewing]:
    """A sandbox, a ledger on its time, and staging."""
    with a_house(tmp_path, Renewing) as found:
        assert isinstance(found, Renewing)
        yield found


@pytest.fixture(params=sorted(CALLS))
def source(request: pytest.FixtureRequest) -> BillingSource:
    """The shipped sources whose usage has a date."""
    return shipped(request.param)


def slow_way(house: House, destination: Destination, seconds: float, *, reply_lost: bool = False) -> None:
    """Let the request that writes be so many seconds on its way to the site; its reply may be lost on the way back."""
    name = CALLS[destination.source.name]
    call = getattr(destination.client, name)

    def slowly(*arguments: Any) -> Any:
        house.sandbox.move_clock(advance_seconds=seconds)
        answer = call(*arguments)
        if reply_lost:
            raise InDoubt("the reply was lost")
        return answer

    setattr(destination.client, name, slowly)


def delivered(house: Renewing, source: BillingSource, destination: Destination, *, waits: bool = True) -> Delivered:
    """Deliver the last day through one destination; without waiting, doubts are left to a later sweep."""
    day, rows = house.last_day(source)
    comparison, folder = house.totals(source, day, rows)
    plan = house.plan(source, comparison, folder)
    return deliver(
        plan,
        lambda: house.plan(source, comparison, folder),
        comparison.reading,
        comparison.window,
        destination,
        house.ledger,
        house.staging,
        PATIENT,
        Means(stop=AtOnce(house, source, waits=waits)),
    )


class AtOnce:
    """Waiting that moves the sandbox's clock instead; without waiting, the worker ends at the first doubt."""

    def __init__(self, house: House, source: BillingSource, *, waits: bool) -> None:
        self._house, self._source, self._waits = house, source, waits

    def is_set(self) -> bool:
        """Nobody asks this worker to stop, unless it would wait for a doubt to end."""
        return not self._waits and bool(self._house.ledger.doubts(self._source.name))

    def wait(self, timeout: float | None = None) -> bool:
        """Let the time pass."""
        self._house.sandbox.move_clock(advance_seconds=timeout or 0.0)
        return False


def test_usage_that_landed_after_the_renewal_is_never_called_billed(house: Renewing, source: BillingSource) -> None:
    """It was stored, and no invoice has it: held before it was sent, or a person's to look at, and not accepted."""
    destination = house.destination(source)
    house.just_before_the_renewal(source, 4)
    slow_way(house, destination, 6)
    delivered(house, source, destination)
    assert house.billed(source) == {}
    ((state, reason),) = house.states_and_reasons(source)
    assert (state, bool(reason)) in {("held", True), ("in_doubt", True)}


def test_chargeover_usage_that_a_renewal_overtook_is_for_a_person(house: Renewing) -> None:
    """The account took the record, and says right after it that the cycle was invoiced: which came first?"""
    source = shipped("voip_minutes")
    destination = house.destination(source)
    house.just_before_the_renewal(source, 4)
    slow_way(house, destination, 6)
    delivered(house, source, destination)
    ((state, reason),) = house.states_and_reasons(source)
    assert state == "in_doubt"
    assert "look at the invoice" in reason
    assert reason.startswith(NOBODY_CAN_TELL)
    before = house.sandbox.requests("chargeover:telco")["reading"]
    sweep(house.destination(source), house.ledger)
    assert house.sandbox.requests("chargeover:telco")["reading"] == before, "no question tells, so none is asked"
    assert house.states_and_reasons(source) == [(state, reason)]


def test_chargeover_usage_that_was_in_time_is_accepted_to_the_last_minute(house: Renewing) -> None:
    """The cycle is still open after the reply, so it was when the record came: no day is held that need not be."""
    source = shipped("voip_minutes")
    destination = house.destination(source)
    house.just_before_the_renewal(source, 60)
    slow_way(house, destination, 2)
    delivered(house, source, destination)
    assert house.states_and_reasons(source) == [("accepted", "")]
    assert house.billed(source) == {ACCOUNTS[source.name]: Decimal(7)}


def test_a_record_that_is_found_later_may_have_missed_its_invoice(house: Renewing) -> None:
    """Its reply was lost seconds before the renewal: that the account has it does not say that it was billed."""
    source = shipped("voip_minutes")
    destination = house.destination(source)
    house.just_before_the_renewal(source, 4)
    slow_way(house, destination, 6, reply_lost=True)
    delivered(house, source, destination)
    house.sandbox.move_clock(advance_seconds=3600)
    sweep(house.destination(source), house.ledger)
    ((state, reason),) = house.states_and_reasons(source)
    assert (state, house.billed(source)) == ("in_doubt", {})
    assert "look at the invoice" in reason


def test_a_record_that_left_long_before_the_renewal_is_found_after_it(house: Renewing) -> None:
    """The site's cut-off lay before the renewal, so the record is on the invoice, whenever we ask."""
    source = shipped("voip_minutes")
    destination = house.destination(source)
    house.just_before_the_renewal(source, 3600)
    slow_way(house, destination, 6, reply_lost=True)
    delivered(house, source, destination, waits=False)
    house.sandbox.move_clock(advance_seconds=7200)
    sweep(house.destination(source), house.ledger)
    assert [state for state, _ in house.states_and_reasons(source)] == ["accepted"]
    assert house.billed(source) == {ACCOUNTS[source.name]: Decimal(7)}
