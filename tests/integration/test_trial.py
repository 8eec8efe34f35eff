"""A trial of a billing site: what it tells, and what the site counts when it is over."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stories import SITES, House, a_house, shipped
from usage_billing.destinations.base import Destination
from usage_billing.sources import BillingSource
from usage_billing.trial import Step, told, try_out

NOW = datetime(2026, 10, 20, 12, 34, tzinfo=UTC)
ACCOUNTS = {"api_calls": "acct-0001", "platform_events": "orbit-01", "voip_minutes": "pkg-001"}
NAMES = ["site", "catalogue", "account", "send", "read back", "take back"]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


def tried(
    house: House, source: BillingSource, account: str, destination: Destination | None = None, **more: Any
) -> list[Step]:
    """Try a source out, without waiting for real."""
    waits: dict[str, Any] = {"wait": lambda seconds: house.sandbox.move_clock(advance_seconds=seconds)}
    return try_out(destination or house.destination(source), account, NOW, **{**waits, **more})


def outcomes(steps: list[Step]) -> list[bool | None]:
    """Return how each step went, and check that they are all there."""
    assert [step.name for step in steps] == NAMES
    return [step.ok for step in steps]


@pytest.mark.parametrize("name", ["api_calls", "platform_events"])
def test_one_unit_comes_and_goes(house: House, name: str) -> None:
    """The site counts it while it is there, and nothing when the trial is over; the records stay, and are named."""
    source = shipped(name)
    steps = tried(house, source, ACCOUNTS[name])

    assert outcomes(steps) == [True] * 6, told(steps)
    assert house.billed(source) == {}
    assert house.writing_requests(source) == 2
    assert "is a test site" in steps[0].told
    assert ACCOUNTS[name] in steps[2].told
    assert "token " in steps[3].told


@pytest.mark.parametrize("allowed", [True, False])
def test_a_unit_stays_where_an_account_takes_no_negative_one(house: House, allowed: bool) -> None:
    """Then it is told, with the reason, for a person to take away."""
    source = shipped("voip_minutes")
    destination = house.destination(source)
    if allowed:
        destination.client.settings = replace(destination.client.settings, negative_usage="allowed")
    steps = tried(house, source, "pkg-001", destination)

    assert outcomes(steps) == [True, True, True, True, True, True if allowed else None], told(steps)
    assert house.billed(source) == ({} if allowed else {"pkg-001": Decimal(1)})
    assert "does not tell whether" in steps[0].told
    assert allowed or "one unit stays there: a negative difference waits" in steps[5].told


def test_usage_of_others_is_not_in_the_way(house: House) -> None:
    """What was billed before is there afterwards, neither more nor less."""
    source = shipped("platform_events")
    client = house.destination(source).client
    client.record_event(
        "platform-events", '{"account_id":"orbit-01","units":7.25,"chargify":{"timestamp":"2026-10-05T00:00:00Z"}}'
    )
    assert outcomes(tried(house, source, "orbit-01")) == [True] * 6
    assert house.billed(source) == {"orbit-01": Decimal("7.25")}


def test_a_site_that_shows_late_is_waited_for_and_one_that_never_shows_is_told(house: House) -> None:
    """Whatever failed to show is taken back all the same."""
    source = shipped("platform_events")
    house.sandbox.switch(SITES[source.name], events_delay_seconds=20)
    assert outcomes(tried(house, source, "orbit-01")) == [True] * 6
    house.sandbox.switch(SITES[source.name], events_delay_seconds=100_000)
    later = try_out(house.destination(source), "orbit-02", NOW, wait=lambda _: None, patience_seconds=4)

    assert outcomes(later) == [True, True, True, True, False, True], told(later)
    assert "counts 0, and not 1, for 4 s" in later[4].told
    house.sandbox.move_clock(advance_seconds=200_000)
    assert house.billed(source) == {}


def test_a_deduction_that_the_site_shows_late_is_no_failure(house: House) -> None:
    """How much of it counts is told by what the site counts."""
    source = shipped("api_calls")
    house.sandbox.switch(SITES[source.name], events_delay_seconds=5)
    steps = tried(house, source, "acct-0001")
    assert outcomes(steps) == [True] * 6, told(steps)
    assert house.billed(source) == {}


def test_a_site_for_real_customers_gets_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site's own word counts more than a person's."""
    source = shipped("api_calls")
    destination = house.destination(source)
    monkeypatch.setattr(destination.client, "read_site", lambda: {"id": 1, "test": False})
    steps = tried(house, source, "acct-0001", destination)

    assert outcomes(steps) == [False, None, None, None, None, None]
    assert "no test site" in steps[0].told
    assert house.writing_requests(source) == 0


@pytest.mark.parametrize(
    ("account", "component", "failing", "words"),
    [
        ("nobody", "handle:api-calls", 2, "unknown to maxio:us:acme"),
        ("acct-0090", "handle:api-calls", 2, "is canceled"),
        ("acct-0001", "handle:seats", 1, "maxio_metered needs metered_component"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_sent(
    house: House, account: str, component: str, failing: int, words: str
) -> None:
    """The first step that fails says why; none after it is tried."""
    source = shipped("api_calls")
    changes = {"component": component, "price_point": None}
    source = replace(source, destination=source.destination.model_copy(update=changes))
    steps = tried(house, source, account)

    assert outcomes(steps) == [True] * failing + [False] + [None] * (5 - failing)
    assert words in steps[failing].told
    assert house.writing_requests(source) == 0


def test_a_refused_unit_ends_the_trial(house: House) -> None:
    """With the site's own words."""
    source = shipped("voip_minutes")
    house.sandbox.fault(SITES[source.name], "server_error", status=400, count=9)
    steps = tried(house, source, "pkg-001")

    assert outcomes(steps) == [True, True, True, False, None, None], told(steps)
    assert "HTTP 400" in steps[3].told
    assert steps[5].told == "not tried"
    assert house.billed(source) == {}


@pytest.mark.parametrize("name", ["api_calls", "platform_events"])
@pytest.mark.parametrize("carried_out", [True, False])
def test_a_lost_reply_is_told_and_only_what_arrived_is_taken_back(house: House, name: str, carried_out: bool) -> None:
    """To take back what never arrived would leave less than before; what nobody knows is told by its token."""
    source = shipped(name)
    house.sandbox.fault(SITES[name], "lost_reply", carried_out=carried_out)
    steps = tried(house, source, ACCOUNTS[name])

    assert outcomes(steps) == [True, True, True, False, None, True if carried_out else None], told(steps)
    assert carried_out or "look for token" in steps[5].told
    assert house.billed(source) == {}
    assert house.writing_requests(source) == (2 if carried_out else 1)


def test_raw_events_are_not_sent(house: House) -> None:
    """Nothing takes one back."""
    source = shipped("platform_events")
    source = replace(source, destination=source.destination.model_copy(update={"mode": "events"}))
    steps = tried(house, source, "orbit-01")

    assert outcomes(steps) == [True, True, True, None, None, None]
    assert "nothing takes one back" in steps[3].told
    assert house.writing_requests(source) == 0
