"""The tie-out of an events-based component, which the site only counts: neither more nor less than was sent."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest

from stories import WORLDS, Event, House, a_day, a_house, shipped
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioSettings, MaxioSite
from usage_billing.errors import Misconfigured
from usage_billing.records import Period
from usage_billing.sandbox import Sandbox
from usage_billing.sources import BillingSource


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


def units(name: str = "platform_events", zone: str = "UTC", **destination: Any) -> BillingSource:
    """Return the shipped source of event totals under a name of its own, by the day."""
    source = shipped("platform_events")
    changes = {"name": name, "period": "day", "timezone": ZoneInfo(zone), "shares_component_with": (source.name,)}
    settings = source.settings.model_copy(update=changes)
    return replace(source, settings=settings, destination=source.destination.model_copy(update=destination))


def used(day: Period, quantities: dict[str, str]) -> list[Event]:
    """Make one event at noon for each account."""
    noon = day.start + timedelta(hours=12)
    return [
        Event(f"{who}-{day.start:%d}", who, quantity, noon, ("eu", "premium")) for who, quantity in quantities.items()
    ]


def by_hand(house: House, source: BillingSource, account: str, quantity: str) -> None:
    """Enter an event that this ledger knows nothing of."""
    event = {"chargify": {"timestamp": "2026-10-06T12:00:00Z"}, "account_id": account, "units": float(quantity)}
    house.destination(source).client.record_event("platform-events", json.dumps(event))


@pytest.mark.parametrize("fed_by_others", [False, True])
def test_more_than_was_sent_is_red_unless_others_feed_the_component(house: House, fed_by_others: bool) -> None:
    """The site bills 15 where 10 were owed: only the source's own word makes that somebody else's."""
    source = units(fed_by_others=fed_by_others)
    day = a_day(source, 5)
    house.run(source, day, used(day, {"orbit-01": "10", "orbit-02": "3"}))
    assert house.reconcile(source, day).ties_out
    by_hand(house, source, "orbit-01", "5")

    found = house.reconcile(source, day)

    assert house.billed(source) == {"orbit-01": Decimal(15), "orbit-02": Decimal(3)}
    assert (found.matched, found.different, found.unknown) == ((1, 0, 1) if fed_by_others else (1, 1, 0))
    assert found.ties_out is fed_by_others
    assert "15 there, 10 here" in found.examples[0]


def test_two_sources_of_ours_that_feed_one_component_tie_out_together(house: House) -> None:
    """What the other one sent is no excess: both are in this ledger."""
    one, other = units(), units("platform_jobs")
    day = a_day(one, 5)
    house.run(one, day, used(day, {"orbit-01": "10"}))
    house.run(other, day, used(day, {"orbit-01": "4", "orbit-02": "2"}))
    assert house.billed(one) == {"orbit-01": Decimal(14), "orbit-02": Decimal(2)}
    for source in (one, other):
        assert house.reconcile(source, day).ties_out


def test_a_declaration_that_others_feed_the_component_may_come_and_go(house: House) -> None:
    """It names nothing of what is billed."""
    day = a_day(units(), 5)
    house.run(units(), day, used(day, {"orbit-01": "10"}))
    done = house.run(units(fed_by_others=True), day, used(day, {"orbit-01": "10"}))
    assert done.requests == 0


def test_a_usage_period_that_the_renewal_cuts_in_two_is_counted_where_its_event_lies(house: House) -> None:
    """A day of New York ends after the renewal in UTC: its event lies in the new billing period, there and here."""
    source = units(zone="America/New_York")
    before, cut = a_day(source, 30), a_day(source, 31)
    after = Period(cut.end, cut.end + timedelta(days=1, hours=1))  # The night in which the clocks go back.
    house.run(source, before, used(before, {"orbit-01": "10"}))
    house.sandbox.move_clock("2026-11-03T12:00:00Z")
    house.run(source, cut, used(cut, {"orbit-01": "4"}))
    house.run(source, after, used(after, {"orbit-01": "2"}))
    assert house.billed(source) == {"orbit-01": Decimal(16)}
    for day in (before, cut, after):
        assert house.reconcile(source, day).ties_out


@pytest.mark.parametrize("setting", ["404", "accept"])
def test_a_stream_that_does_not_exist_is_never_silent(house: House, setting: str) -> None:
    """A mistyped stream: where the site says so nothing is sent, where it takes the events the tie-out is red."""
    source = units(stream="platform-event")
    house.sandbox.switch("maxio:us:orbit", unknown_stream=setting)
    day = a_day(source, 5)
    if setting == "404":
        with pytest.raises(Misconfigured, match="knows no such stream"):
            house.run(source, day, used(day, {"orbit-01": "10"}))
        assert house.states(source, day) == {"reserved": 1}
        return
    house.run(source, day, used(day, {"orbit-01": "10"}))
    found = house.reconcile(source, day)
    assert house.billed(source) == {}
    assert (found.ties_out, found.missing) == (False, 1)


@pytest.mark.parametrize("setting", ["shared", "separate"])
def test_events_of_a_european_site_go_where_its_connection_says(tmp_path: Path, setting: str) -> None:
    """Which host takes them is documented oddly: a wrong one takes nothing, and the right one bills."""
    world = tmp_path / "orbit.yaml"
    world.write_text((WORLDS[1]).read_text(encoding="utf-8").replace("maxio:us:", "maxio:eu:"), encoding="utf-8")
    site = "maxio:eu:orbit"
    with Sandbox([world]) as sandbox:
        sandbox.switch(site, eu_events_host=setting)
        keys: dict[str, Any] = {"subdomain": "orbit", "region": "eu", "api_key": "sandbox-orbit-key"}
        hosts = {"shared": sandbox.events_url, "separate": sandbox.eu_events_url}
        for host, url in hosts.items():
            settings = MaxioSettings(
                base_url=sandbox.maxio_url("orbit"), events_url=url, settle_after_seconds=1, **keys
            )
            client = MaxioSite(settings, Transport(patience_seconds=0))
            event = json.dumps(
                {"chargify": {"timestamp": "2026-10-06T12:00:00Z"}, "account_id": "orbit-01", "units": 5}
            )
            if host == setting:
                client.record_event("platform-events", event)
            else:
                with pytest.raises(Misconfigured, match="knows no such stream or site"):
                    client.record_event("platform-events", event)
        billed = [row.billed for row in sandbox.billed(site) if row.reference == "orbit-01" and row.billed]
        assert billed == [Decimal(5)]
