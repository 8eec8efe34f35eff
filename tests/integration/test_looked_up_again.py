"""What a site says of an account holds for one delivery at one moment: each is asked about anew where that may matter.

The verdict is the sandbox's count: what it billed, and what the ledger has accepted or lists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from stories import GENTLE, SITES, Event, House, a_day, a_house, shipped
from usage_billing.deliver import _Work
from usage_billing.destinations.maxio import MaxioEvents, MaxioSite
from usage_billing.errors import NotApplied, Refused
from usage_billing.ledger import Ledger
from usage_billing.records import NOBODY_CAN_TELL, Delivery, Period, State
from usage_billing.sandbox.clock import to_micros
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource

HASTY = replace(GENTLE, patience=timedelta(0))
ACCOUNTS = {"voip_minutes": "pkg-{:03d}", "platform_events": "orbit-{:02d}"}
DAYS = tuple(range(4, 16))
ORBIT = SITES["platform_events"]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A house whose ledger lives on the sandbox's time."""
    with a_house(tmp_path) as opened:
        opened.ledger.close()
        opened.ledger = Ledger.connect(opened.ledger_url, clock=opened.sandbox.now)
        yield opened


def staff(house: House, order: str, *values: object) -> None:
    """Change an account as the site's own staff would: no call of the API does."""
    sites = house.sandbox._server.config.app.sites
    with sites.books.transaction() as books:
        sites.renew()
        books.execute(order, values)


def one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> BillingSource:
    """Return a dated source of which eight deliveries make a page, and of which nothing passes a renewal."""
    source, keys = shipped(name), dict[str, Any](grace=timedelta(0))
    if name == "platform_events":
        monkeypatch.setattr(MaxioEvents, "chunk_size", 1)
    else:
        keys["mode"] = "single"
    return replace(source, destination=source.destination.model_copy(update=keys))


def event(source: BillingSource, account: int, day: int) -> Event:
    """Make one event of 5."""
    name = ACCOUNTS[source.name].format(account + 1)
    dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
    return Event(f"{name}-{day}", name, "5", a_day(source, day).start + timedelta(hours=8), dimensions)


def planned_long_ago(house: House, source: BillingSource) -> tuple[Any, str, Any, Period]:
    """Plan twelve days of three accounts whose look-up is hours old by now."""
    interval = Period(a_day(source, DAYS[0]).start, a_day(source, DAYS[-1]).end)
    rows = [event(source, account, day) for day in DAYS for account in range(3)]
    comparison, folder = house.totals(source, interval, rows)
    plan = house.plan(source, comparison, folder)
    with create_engine(house.ledger_url).begin() as connection:
        connection.execute(text("UPDATE extraction SET validated_at = '2026-01-01 00:00:00.000000'"))
    return comparison, folder, plan, interval


def accepted(house: House, source: BillingSource, interval: Period) -> Decimal:
    """Return what the ledger believes was billed."""
    quantities = house.ledger.accepted(source.name, Period.around(source.periods(interval)))["quantity"]
    return sum(map(Decimal, quantities), Decimal(0))


@pytest.mark.parametrize("name", sorted(ACCOUNTS))
def test_what_holds_for_one_usage_period_of_an_account_holds_for_no_other(
    house: House, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accounts are invoiced ahead of time, after the plan: every day before is held, whatever page it stands on."""
    source = one_by_one(name, monkeypatch)
    comparison, folder, plan, interval = planned_long_ago(house, source)
    zone = UTC if name == "platform_events" else house.destination(source).client.settings.zone
    at, ends = datetime(2026, 10, 10, tzinfo=zone), datetime(2026, 11, 10, tzinfo=zone)
    staff(house, "UPDATE account SET period_end = ? WHERE site = ?", to_micros(at), SITES[name])
    change = "UPDATE account SET period_start = ?, period_end = ? WHERE site = ?"
    staff(house, change, to_micros(at), to_micros(ends), SITES[name])

    house.deliver(source, comparison, folder, first=plan, manners=replace(GENTLE, threads=1))

    standing = house.ledger.standing(name, Period.around(source.periods(interval)))
    assert set(standing[standing["period_start"] < at]["state"]) == {State.HELD}
    assert set(standing[standing["period_start"] >= at]["state"]) == {State.ACCEPTED}
    assert sum(house.billed(source).values()) == accepted(house, source, interval)


def test_an_end_that_one_look_up_told_is_asked_for_again_by_the_next_page(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The billing period ends at 12:08 of a sudden; the first page leaves at 12:00, the next one at 12:09."""
    source = one_by_one("platform_events", monkeypatch)
    comparison, folder, plan, interval = planned_long_ago(house, source)
    house.sandbox.move_clock("2026-10-20T12:00:00Z")
    ends = to_micros(datetime(2026, 10, 20, 12, 8, tzinfo=UTC))
    staff(house, "UPDATE account SET period_end = ? WHERE site = ?", ends, ORBIT)
    real, pages = _Work._send_page, []

    def slow(self: _Work, page: Sequence[Delivery]) -> None:
        real(self, page)
        pages.append(len(page))
        if len(pages) == 1:
            house.sandbox.move_clock("2026-10-20T12:09:00Z")

    monkeypatch.setattr(_Work, "_send_page", slow)
    manners = replace(GENTLE, threads=1, lease_lasts=timedelta(hours=1))
    house.deliver(source, comparison, folder, first=plan, manners=manners)

    assert house.states(source, interval).keys() == {"accepted", "held"}
    assert sum(house.billed(source).values()) == accepted(house, source, interval) > 0


def test_a_stream_that_refuses_everything_for_a_while_makes_no_event_a_persons(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """240 doubts, and none of 200 replays is taken: nothing is told of single events, and all are billed later."""
    source = shipped("platform_events")
    day = a_day(source, 19)
    rows = [
        replace(event(source, account, 19), event_id=f"{account}-{hour}", time=day.start + timedelta(hours=hour))
        for account in range(10)
        for hour in range(24)
    ]
    comparison, folder = house.totals(source, day, rows)
    house.sandbox.fault(ORBIT, "lost_reply", carried_out=False)
    with pytest.raises(NotApplied):
        house.deliver(source, comparison, folder, manners=HASTY)
    assert len(house.ledger.doubts(source.name)) == 240

    def refuses(_self: MaxioSite, _stream: str, _bodies: Sequence[str]) -> None:
        raise Refused("HTTP 422: the stream is being changed")

    with monkeypatch.context() as trouble:
        trouble.setattr(MaxioSite, "record_events", refuses)
        sweep(house.destination(source), house.ledger)
    assert not [doubt for doubt in house.ledger.doubts(source.name) if doubt.reason.startswith(NOBODY_CAN_TELL)]
    sweep(house.destination(source), house.ledger)

    assert house.states(source, day) == {"accepted": 240}
    assert sum(house.billed(source).values()) == Decimal(1200)


def test_a_doubt_of_a_subscription_that_rests_for_an_hour_is_asked_about_again(house: House) -> None:
    """On hold is not closed: nothing is concluded, and once it is active again the doubt ends by a replay."""
    source = shipped("platform_events")
    day = a_day(source, 19)
    comparison, folder = house.totals(source, day, [event(source, 0, 19)])
    house.sandbox.fault(ORBIT, "lost_reply", carried_out=False)
    with pytest.raises(NotApplied):
        house.deliver(source, comparison, folder, manners=HASTY)
    state = "UPDATE account SET state = ? WHERE site = ? AND id = 50200001"
    staff(house, state, "on_hold", ORBIT)
    house.sandbox.reset_requests()
    sweep(house.destination(source), house.ledger)
    assert house.writing_requests(source) == 0
    assert house.states(source, day) == {"in_doubt": 1}

    staff(house, state, "active", ORBIT)
    sweep(house.destination(source), house.ledger)

    assert house.billed(source) == {"orbit-01": Decimal(5)}
    assert house.states(source, day) == {"accepted": 1}
