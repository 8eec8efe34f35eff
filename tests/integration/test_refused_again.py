"""What a site refused: listed with its words and the request, and sent again once a person says so.

The verdict is the sandbox's count: what it billed, and how many requests could have changed that.
"""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from stories import ACCOUNT, SITES, Event, House, a_day, a_house, shipped
from usage_billing.records import DECIDED, State
from usage_billing.sources import BillingSource

BY = f"{DECIDED}2026-10-20 by ann: the site's owner has mended it"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


@pytest.fixture(params=["api_calls", "voip_minutes"])
def source(request: pytest.FixtureRequest) -> BillingSource:
    """The sources whose site says of each record whether it takes it."""
    found = shipped(request.param)
    if found.name == "voip_minutes":
        return replace(found, destination=found.destination.model_copy(update={"mode": "single"}))
    return found


def event(source: BillingSource, quantity: str = "7") -> list[Event]:
    """Make one event of the fifth of October."""
    return [Event("e1", ACCOUNT[source.name], quantity, a_day(source, 5).start + timedelta(hours=8))]


def refused(house: House, source: BillingSource, times: int = 1) -> str:
    """Let the site refuse the day's one delivery, and return its token."""
    house.sandbox.fault(SITES[source.name], "server_error", status=422, count=times)
    house.run(source, a_day(source, 5), event(source))
    assert house.states(source, a_day(source, 5)) == {"refused": 1}
    assert house.billed(source) == {}
    (token,) = house.ledger.open_items(source.name, None)["token"]
    return str(token)


@pytest.mark.parametrize("how", ["run", "sweep"])
def test_what_is_released_goes_once_as_a_new_revision(house: House, source: BillingSource, how: str) -> None:
    """Until a person says so no run sends it again; then the next run or sweep does, under another token."""
    day, token = a_day(source, 5), refused(house, source)
    sent = house.writing_requests(source)
    house.sweep(source)
    if how == "run":
        house.run(source, day, event(source))
    assert house.writing_requests(source) == sent
    assert house.ledger.replayable(source.name) == ()

    house.ledger.decide(token, State.HELD, BY)
    assert house.ledger.replayable(source.name) == source.periods(day)
    for _ in range(2):
        if how == "run":
            house.run(source, day, event(source))
        else:
            house.sweep(source)

    assert house.billed(source) == {ACCOUNT[source.name]: Decimal(7)}
    assert house.writing_requests(source) == sent + 1
    assert house.states(source, day) == {"superseded": 1, "accepted": 1}
    assert house.reconcile(source, day).ties_out
    assert house.ledger.replayable(source.name) == ()


@pytest.mark.parametrize("how", ["run", "sweep"])
def test_a_second_refusal_is_for_a_person_again(house: House, source: BillingSource, how: str) -> None:
    """One release is one try, however often runs and sweeps come: a refusal is no reason to go on asking."""
    day, token = a_day(source, 5), refused(house, source, times=100)
    house.ledger.decide(token, State.HELD, BY)
    sent = house.writing_requests(source)
    for _ in range(3):
        if how == "run":
            house.run(source, day, event(source))
        else:
            house.sweep(source)
    assert house.writing_requests(source) == sent + 1
    assert house.states(source, day) == {"superseded": 1, "refused": 1}
    assert house.ledger.open_items(source.name, None)["released"].tolist() == [""]
    assert house.billed(source) == {}


def test_another_quantity_is_not_what_was_released(house: House, source: BillingSource) -> None:
    """The rows change first: what is owed by then is a new revision anyway, and nothing is billed twice."""
    day, token = a_day(source, 5), refused(house, source)
    house.ledger.decide(token, State.HELD, BY)
    house.run(source, day, event(source, "9"))
    house.sweep(source)
    assert house.billed(source) == {ACCOUNT[source.name]: Decimal(9)}
    assert house.states(source, day) == {"superseded": 1, "accepted": 1}


def test_what_is_released_and_cannot_go_keeps_the_sites_words(house: House) -> None:
    """Why it waits is told of what is held; of what was refused the reason is the site's."""
    source = shipped("api_calls")
    token = refused(house, source)
    (reason,) = house.ledger.open_items(source.name, None)["reason"]
    house.ledger.decide(token, State.HELD, BY)
    house.ledger.explain_released({token: "gone"})
    assert house.ledger.open_items(source.name, None)["reason"].tolist() == [reason]
    assert "422" in reason
