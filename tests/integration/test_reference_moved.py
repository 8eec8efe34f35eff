"""A reference is given to another subscription between plan and send: nobody is billed for what somebody else used."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import requests

from late import Held, used
from stories import GENTLE, SITES, House, a_day, a_house, shipped
from usage_billing.errors import NotApplied
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource

SITE = SITES["platform_events"]
TOTALS = shipped("platform_events")
RAW = replace(TOTALS, destination=TOTALS.destination.model_copy(update={"mode": "events"}))
DAY = a_day(TOTALS, 19)
HASTY = replace(GENTLE, threads=1, patience=timedelta(0))
BOTH = pytest.mark.parametrize("source", [TOTALS, RAW], ids=["totals", "raw"])
OURS, OTHER = "50200001", "50200002"


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Held]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path, Held) as opened:
        assert isinstance(opened, Held)
        yield opened


def name(house: House, subscription: str, reference: str) -> None:
    """Give a subscription a reference, by the site's own call."""
    url = f"{house.sandbox.maxio_url('orbit')}/subscriptions/{subscription}.json"
    body = {"subscription": {"reference": reference}}
    assert requests.put(url, json=body, auth=("sandbox-orbit-key", "x"), timeout=10).ok


def move(house: House) -> None:
    """Give the reference of our customer to another one."""
    name(house, OURS, "moved away")
    name(house, OTHER, "orbit-01")


def billed_to(house: House) -> dict[str, Decimal]:
    """Return what the site billed each subscription."""
    return {row.subscription: row.billed for row in house.sandbox.billed(SITE) if row.billed}


@BOTH
def test_what_waits_is_held_by_name_when_its_reference_leads_elsewhere(house: Held, source: BillingSource) -> None:
    """An earlier task wrote it down and ended; the next one looks where it leads before it sends."""
    comparison, folder = house.totals(source, DAY, used(source, DAY, "7"))
    first = house.plan(source, comparison, folder)
    for proposals in house.staging.read(first.proposals):
        house.ledger.reserve(source.name, SITE, comparison.reading, proposals.to_pandas())
    move(house)

    house.deliver(source, comparison, folder, first=first)

    assert billed_to(house) == {}
    ((state, _),) = house.listed(source, DAY)
    assert state == "held"
    (reason,) = house.open_items(source, DAY)["reason"]
    assert f"leads to subscription {OTHER} by now, and this is usage of {OURS}" in reason


@BOTH
@pytest.mark.parametrize("carried_out", [True, False])
def test_a_doubt_is_not_replayed_to_whom_the_reference_leads_by_now(
    house: Held, source: BillingSource, carried_out: bool
) -> None:
    """Its reply was lost: whether ours was billed is for a person to see, and nobody else is."""
    house.sandbox.fault(SITE, "lost_reply", carried_out=carried_out)
    with pytest.raises(NotApplied):
        house.run(source, DAY, used(source, DAY, "7"), HASTY)
    move(house)
    house.sandbox.reset_requests()

    sweep(house.destination(source), house.ledger)

    assert house.writing_requests(source) == 0
    assert billed_to(house) == ({OURS: Decimal(7)} if carried_out else {})
    assert [state for state, _ in house.listed(source, DAY)] == ["in_doubt"]
    (reason,) = house.open_items(source, DAY)["reason"]
    assert f"leads to subscription {OTHER} by now" in reason
