"""A delivery that a site stored twice breaks the tie-out, wherever in its list the second record stands.

The verdict is the sandbox's count: it billed 14 where 7 were owed, and says so, or the tie-out is wrong.
"""

import json
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from late import Held, used
from stories import SITES, House, a_day, a_house, shipped
from usage_billing.ledger import Ledger
from usage_billing.reconcile import Reconciliation, reconcile

METERED = shipped("api_calls")
SITE = SITES["api_calls"]
DAY = a_day(METERED, 5)
ACCOUNT = "acct-0001"


@pytest.fixture(params=["descending", "ascending"])
def house(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Held]:
    """A house whose site wears no belt: it takes a second request with a token, as it may."""
    with a_house(tmp_path, Held) as opened:
        opened.sandbox.switch(SITE, uniqueness_token="ignored", usage_list_order=request.param)
        assert isinstance(opened, Held)
        yield opened


def by_hand(house: House, quantity: int, memo: str) -> None:
    """Store a usage of the account, as another program with another memory would."""
    body = json.dumps({"usage": {"quantity": quantity, "memo": memo}})
    client = house.destination(METERED).client
    client.create_usage(client.subscription_by_reference(ACCOUNT)["id"], "handle:api-calls", body)


def sent_as(house: House, quantity: str = "7") -> str:
    """Return the token under which the day's usage will go."""
    comparison, folder = house.totals(METERED, DAY, used(METERED, DAY, quantity))
    (part,) = house.staging.read(house.plan(METERED, comparison, folder).proposals)
    return str(part.column("token")[0].as_py())


def tied_out(house: House) -> Reconciliation:
    """Tie the day out, once."""
    return reconcile(house.destination(METERED), house.ledger, DAY, pauses=())


@pytest.mark.parametrize("taken", ["at_commit", "at_arrival"])
def test_a_request_that_lands_after_the_cut_off_is_told_whichever_id_it_took(house: Held, taken: str) -> None:
    """The one that was given up took its id when it came, or when it was stored: both are billed, and both are told."""
    house.sandbox.switch(SITE, usage_id=taken)
    house.sandbox.fault(SITE, "late_commit", seconds=4)
    house.run(METERED, DAY, used(METERED, DAY, "7"))
    assert house.ledger.accepted(METERED.name, DAY)["sends"].tolist() == [2]
    until = time.monotonic() + 30
    while len(house.sandbox.records(SITE)) < 2 and time.monotonic() < until:
        time.sleep(0.1)

    found = tied_out(house)

    assert house.billed(METERED) == {ACCOUNT: Decimal(14)}
    assert (found.ties_out, found.matched, found.different) == (False, 1, 1)
    assert (found.ours, found.theirs) == (Decimal(7), Decimal(14))
    assert "a second time" in found.examples[0]


def test_what_a_ledger_that_is_gone_had_sent_before_is_told(house: Held) -> None:
    """Another memory had billed the same day: its record stands before ours, with more usage of others between."""
    by_hand(house, 7, sent_as(house))
    for number in range(3):
        by_hand(house, 1, f"by hand {number}")
    house.run(METERED, DAY, used(METERED, DAY, "7"))

    found = tied_out(house)

    assert house.billed(METERED) == {ACCOUNT: Decimal(17)}
    assert (found.ties_out, found.matched, found.different) == (False, 1, 1)
    assert found.unknown == 0, "what stands before the day is nobody's matter but for its token"


def test_what_was_stored_before_the_days_usage_could_be_is_not_read(house: Held) -> None:
    """250 usages of a month ago: the walk back ends at the day on which ours could first have been sent."""
    for number in range(250):
        by_hand(house, 1, f"by hand {number}")
    house.sandbox.move_clock("2026-10-29T12:00:00Z")
    timed = Ledger.connect(house.ledger_url, clock=house.sandbox.now)
    house.ledger.close()
    house.ledger = timed
    day = a_day(METERED, 28)
    house.run(METERED, day, used(METERED, day, "7"))
    house.sandbox.reset_requests()

    found = reconcile(house.destination(METERED), house.ledger, day, pauses=())

    assert (found.ties_out, found.matched) == (True, 1)
    assert house.sandbox.requests(SITE)["by_route"]["list_usages"] <= 4
