"""A site that takes no question about one subscription: all others are settled and billed; then it is told."""

import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stories import GENTLE, Event, House, a_day, a_house, shipped
from usage_billing.destinations.http import HttpClient
from usage_billing.errors import Misconfigured, NotApplied
from usage_billing.settle import sweep

METERED = shipped("api_calls")
DAY = a_day(METERED, 5)
SITE = "maxio:us:acme"
HASTY = replace(GENTLE, threads=1, patience=timedelta(0))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as opened:
        yield opened


def turned_down(monkeypatch: pytest.MonkeyPatch, subscription: str, status: int) -> None:
    """Let the site answer the list of one subscription's usages with an error of the client."""
    real = HttpClient.read

    def read(self: HttpClient, call: str, path: str, *arguments: Any, **more: Any) -> Any:
        if call == "list usages" and f"/subscriptions/{subscription}/" in path:
            raise Misconfigured(f"{SITE}: {call}: HTTP {status}; the site does not take this question as it stands")
        return real(self, call, path, *arguments, **more)

    monkeypatch.setattr(HttpClient, "read", read)


@pytest.mark.parametrize("status", [410, 422])
def test_one_subscription_that_cannot_be_asked_about_stops_no_other(
    house: House, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """Four lost requests, the oldest of the one whose list is refused: three are billed, the fourth is told by name."""
    accounts = [f"acct-{number:04d}" for number in range(1, 5)]
    rows = [Event(account, account, "7", DAY.start + timedelta(hours=9)) for account in accounts]
    for last in range(1, 5):
        house.sandbox.fault(SITE, "lost_reply", carried_out=False)
        with pytest.raises(NotApplied):
            house.run(METERED, DAY, rows[:last], HASTY)
        house.sandbox.clear_faults()
    oldest, *_ = house.ledger.doubts(METERED.name)
    turned_down(monkeypatch, str(oldest.address["subscription_id"]), status)

    with pytest.raises(Misconfigured, match=f"usages of subscription {oldest.address['subscription_id']}"):
        house.run(METERED, DAY, rows, replace(GENTLE, threads=1))

    assert sorted(house.billed(METERED).values()) == [Decimal(7)] * 3
    swept = sweep(house.destination(METERED), house.ledger)
    assert [doubt.token for doubt in swept.still_open] == [oldest.token]
    assert swept.fault is not None
    monkeypatch.undo()
    house.run(METERED, DAY, rows)
    assert house.billed(METERED) == dict.fromkeys(accounts, Decimal(7))


def test_credentials_that_are_turned_down_are_asked_with_once(house: House) -> None:
    """A 401 is about the whole site: no doubt is asked about after it."""
    rows = [Event(account, account, "7", DAY.start + timedelta(hours=9)) for account in ("acct-0001", "acct-0002")]
    for last in (1, 2):
        house.sandbox.fault(SITE, "lost_reply", carried_out=False)
        with pytest.raises(NotApplied):
            house.run(METERED, DAY, rows[:last], HASTY)
        house.sandbox.clear_faults()
    assert len(house.ledger.doubts(METERED.name)) == 2
    time.sleep(1.2)  # Until they are old enough to be asked about.
    house.sandbox.fault(SITE, "unauthorized", count=100, reads=True)
    house.sandbox.reset_requests()
    with pytest.raises(Misconfigured):
        sweep(house.destination(METERED), house.ledger)
    assert house.sandbox.requests(SITE)["reading"] <= 3
