"""Maxio's calls, each as somebody makes it from a DAG of their own; the sandbox's count is the verdict."""

import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pytest

from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import (
    MaxioSettings,
    MaxioSite,
    activation_body,
    event_body,
    event_bulks,
    usage_body,
)
from usage_billing.errors import InDoubt, Misconfigured, Refused
from usage_billing.sandbox import Sandbox

WORLDS = Path(__file__).parents[2] / "include" / "sandbox" / "worlds"
ACME, ORBIT = "maxio:us:acme", "maxio:us:orbit"
ACCOUNT, NUMBER, CALLS = "acct-0001", 50100001, "handle:api-calls"
NOON = datetime(2026, 10, 5, 12, tzinfo=UTC)


def site_of(sandbox: Sandbox, name: str, response_format: Literal["json", "xml"] = "json") -> MaxioSite:
    """Return a site's plain client."""
    settings = MaxioSettings(
        subdomain=name,
        api_key=f"sandbox-{name}-key",
        base_url=sandbox.maxio_url(name),
        events_url=sandbox.events_url,
        settle_after_seconds=0,
    )
    return MaxioSite(settings, Transport(patience_seconds=0), response_format=response_format)


@pytest.fixture(params=["json", "xml", "xml of no class"])
def acme(request: pytest.FixtureRequest, sandbox: Sandbox) -> MaxioSite:
    """Return the client of the metered site, in each format."""
    if request.param == "xml of no class":
        sandbox.switch(ACME, xml_empty_list="nil_classes")
    return site_of(sandbox, "acme", "json" if request.param == "json" else "xml")


@pytest.fixture
def orbit(sandbox: Sandbox) -> MaxioSite:
    """Return the client of the site that bills events."""
    return site_of(sandbox, "orbit")


def billed(sandbox: Sandbox, site: str) -> dict[tuple[str, str], Decimal]:
    """Return what the site counted by reference and component, without zeros."""
    return {(row.reference, row.component): row.billed for row in sandbox.billed(site) if row.billed}


# --- usages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subscription", [ACCOUNT, NUMBER])
@pytest.mark.parametrize("component", [CALLS, 61001])
def test_a_usage_is_created_by_whatever_names_it(
    subscription: int | str, component: int | str, acme: MaxioSite, sandbox: Sandbox
) -> None:
    """Subscription by id or reference, component by id or handle: the same line is billed, and its list read."""
    made = acme.create_usage(subscription, component, usage_body(7, memo="October"))
    (listed,) = acme.usages(subscription, component) or ()

    assert (made["subscription_id"], made["component_id"], made["memo"]) == (NUMBER, 61001, "October")
    assert listed["id"] == made["id"]
    assert billed(sandbox, ACME) == {(ACCOUNT, "api-calls"): Decimal(7)}


def test_a_price_point_is_found_by_its_handle(acme: MaxioSite) -> None:
    """Usages name a price point by its number; the handle leads to it, and an unknown one to nothing."""
    component = acme.component_by_handle("api-calls")
    assert component is not None
    partner = acme.price_point(component["id"], "handle:partner")
    assert partner is not None
    made = acme.create_usage(ACCOUNT, CALLS, usage_body(3, price_point_id=partner["id"]))

    assert made["price_point_id"] == 71002
    assert acme.price_point(61001, 71002) == acme.price_point(61001, "71002") == partner
    assert acme.price_point(61001, "handle:standard-2") is None
    assert acme.price_point(61001, "partner") is None
    with pytest.raises(Refused, match="Price point"):
        acme.create_usage(ACCOUNT, CALLS, usage_body(3, price_point_id=5))


def test_a_quantity_arrives_with_every_digit(acme: MaxioSite, sandbox: Sandbox) -> None:
    """Also beyond what a float holds, and below 0."""
    many = Decimal("12345678901234567.890123")
    for quantity in (many, Decimal("-0.000001"), Decimal("1E+2")):
        acme.create_usage(ACCOUNT, "handle:storage-gb", usage_body(quantity))

    assert billed(sandbox, ACME) == {(ACCOUNT, "storage-gb"): many - Decimal("0.000001") + 100}


def test_a_body_says_all_that_the_site_takes(acme: MaxioSite, sandbox: Sandbox) -> None:
    """Custom prices keep their digits, a schedule is a day, and a token has a second body refused."""
    price = {"pricing_scheme": "per_unit", "prices": [{"starting_quantity": 1, "unit_price": Decimal("0.10")}]}
    day = date(2026, 11, 1)
    body = usage_body(5, custom_price=price, initial_billing_at=day, uniqueness_token="once")

    assert json.loads(body, parse_float=Decimal) == {
        "usage": {"quantity": 5, "custom_price": price, "billing_schedule": {"initial_billing_at": "2026-11-01"}},
        "uniqueness_token": "once",
    }
    assert '"unit_price":0.10' in body
    acme.create_usage(ACCOUNT, CALLS, body)
    with pytest.raises(InDoubt, match="within the hour"):
        acme.create_usage(ACCOUNT, CALLS, usage_body(6, uniqueness_token="once"))
    assert billed(sandbox, ACME) == {(ACCOUNT, "api-calls"): Decimal(5)}


def test_a_body_that_would_bill_wrong_is_never_written() -> None:
    """All faults at once, each with its place: a float has lost its digits before anybody could look."""
    prices = [{"unit_price": 0.1}, {"unit_price": Decimal("NaN")}]
    with pytest.raises(Misconfigured) as told:
        usage_body(1.1, price_point_id=1, custom_price={"prices": prices})  # type: ignore[arg-type]

    assert str(told.value).count("\n") == 4
    assert "quantity: 1.1 is no exact number" in str(told.value)
    assert "custom_price: stands in place of price_point_id" in str(told.value)
    assert "custom_price.prices[0].unit_price: 0.1 is no exact number" in str(told.value)
    assert "custom_price.prices[1].unit_price: Decimal('NaN') is no exact number" in str(told.value)
    for quantity in (Decimal("NaN"), Decimal("Infinity"), True, "5", None):
        with pytest.raises(Misconfigured, match="quantity"):
            usage_body(quantity)  # type: ignore[arg-type]


@pytest.mark.parametrize("reference", ["50100001", "77", "٣", "", ".", ".."])
def test_a_reference_that_a_path_would_take_for_something_else_is_refused(
    reference: str, acme: MaxioSite, sandbox: Sandbox
) -> None:
    """One of digits would be billed to whoever has it as an id; nothing is asked and nothing sent."""
    for ask in (
        lambda: acme.create_usage(reference, CALLS, usage_body(1)),
        lambda: acme.usages(reference, CALLS),
        lambda: acme.usage_page(reference, CALLS),
    ):
        with pytest.raises(Misconfigured, match="look it up"):
            ask()
    assert sandbox.requests(ACME)["by_route"] == {}


def test_an_odd_reference_reaches_its_own_subscription(tmp_path: Path) -> None:
    """Slashes, colons, spaces, and letters of any script are one segment of a path."""
    odd = "a/b:c d?e#f%2Fg.json é"
    world = tmp_path / "acme.yaml"
    world.write_text((WORLDS / "acme.yaml").read_text() + f'  - {{id: 50100099, reference: "{odd}", family: saas}}\n')
    with Sandbox([world]) as sandbox:
        site_of(sandbox, "acme").create_usage(odd, CALLS, usage_body(4))
        assert billed(sandbox, ACME) == {(odd, "api-calls"): Decimal(4)}


@pytest.mark.parametrize("legacy", ["ignored", "day"])
@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_every_filter_of_the_list_narrows_it(legacy: str, order: str, acme: MaxioSite, sandbox: Sandbox) -> None:
    """Ids are included on both ends, days begin at the site's midnight, whatever the site makes of the oldest one."""
    sandbox.switch(ACME, usage_list_created_at=legacy, usage_list_order=order)
    made = []
    for day in (20, 21, 22):
        sandbox.move_clock(f"2026-10-{day}T12:00:00Z")
        made += [acme.create_usage(ACCOUNT, CALLS, usage_body(1))["id"] for _ in range(2)]
    first, second, third, fourth, fifth, sixth = made

    def found(**bounds: Any) -> list[int]:
        return sorted(usage["id"] for usage in acme.usages(ACCOUNT, CALLS, **bounds) or ())

    assert found() == made
    assert found(since_id=second, max_id=fourth) == [second, third, fourth]
    assert found(since_date=date(2026, 10, 22)) == [fifth, sixth]
    assert found(until_date=date(2026, 10, 21)) == [first, second]
    assert found(since_date=date(2026, 10, 21), until_date=date(2026, 10, 22)) == [third, fourth]
    assert found(created_at=date(2026, 10, 21)) == [third, fourth]
    assert found(created_at=date(2026, 10, 21), max_id=third) == [third]
    pages = [acme.usage_page(ACCOUNT, CALLS, page=number, per_page=4) or [] for number in (1, 2, 3)]
    assert [len(page) for page in pages] == [4, 2, 0]
    assert sorted(usage["id"] for page in pages for usage in page) == made
    assert [usage["id"] for usage in acme.usage_page(ACCOUNT, CALLS, until_date=date(2026, 10, 20)) or ()] == []


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_the_list_is_right_while_rows_are_added(order: str, acme: MaxioSite, sandbox: Sandbox) -> None:
    """What was there when the walk began is seen once, however much comes between its pages."""
    sandbox.switch(ACME, usage_list_order=order)
    made = [acme.create_usage(ACCOUNT, CALLS, usage_body(1))["id"] for _ in range(405)]
    seen = []
    for number, usage in enumerate(acme.usages(ACCOUNT, CALLS) or ()):
        seen.append(usage["id"])
        if number % 100 == 0:
            acme.create_usage(ACCOUNT, CALLS, usage_body(1))

    assert len(seen) == len(set(seen))
    assert set(made) <= set(seen)


def shown(component: dict[str, Any]) -> tuple[object, ...]:
    """Return what a component says, its price as a number: XML has it typed, and JSON as text."""
    names = ("id", "handle", "name", "kind", "archived", "default_price_point_id", "accounting_code")
    prices = [Decimal(price["unit_price"]) for price in component["prices"]]
    return (Decimal(component["unit_price"]), prices, *(component[name] for name in names))


def test_both_formats_say_the_same(sandbox: Sandbox) -> None:
    """What was sent in one is read in the other, to the last digit, whatever the site makes of a quantity."""
    told = {}
    in_json, in_xml = site_of(sandbox, "acme"), site_of(sandbox, "acme", "xml")
    for style in ("as_documented", "text_in_lists", "int", "string"):
        sandbox.switch(ACME, quantity_type=style)
        made = [
            client.create_usage(ACCOUNT, "handle:storage-gb", usage_body(Decimal("0.1000001"), memo=memo))
            for client, memo in ((in_json, "a & b <c> é"), (in_xml, 'a & b <c> "é"'), (in_xml, ""))
        ]
        for client in (in_json, in_xml):
            rows = list(client.usages(ACCOUNT, "handle:storage-gb", since_id=made[0]["id"]) or ())
            told[style, client] = [
                (row["id"], Decimal(row["quantity"]), row["memo"], int(row["price_point_id"]), row["created_at"])
                for row in rows
            ]
        assert told[style, in_json] == told[style, in_xml]
        assert [row[1:3] for row in told[style, in_json]] == [
            (Decimal("0.1000001"), memo) for memo in (None, 'a & b <c> "é"', "a & b <c> é")
        ]
    assert [shown(row) for row in in_xml.components()] == [shown(row) for row in in_json.components()]
    assert billed(sandbox, ACME) == {(ACCOUNT, "storage-gb"): 12 * Decimal("0.1000001")}


def test_what_is_not_there_is_none(acme: MaxioSite) -> None:
    """A definite 404 is no error of a read, and refuses a write."""
    assert acme.usages("nobody", CALLS) is None
    assert acme.usage_page("nobody", CALLS) is None
    assert acme.component(41001, 5) is None
    assert acme.component("handle:nothing", CALLS) is None
    with pytest.raises(Refused):
        acme.create_usage("nobody", CALLS, usage_body(1))


# --- components and subscriptions -----------------------------------------------------------------------------------


def test_components_are_listed_by_site_and_by_family(acme: MaxioSite) -> None:
    """Archived ones too; a family that is not there is a fault of the question."""
    handles = ["api-calls", "storage-gb", "seats", "legacy-calls"]
    assert [row["handle"] for row in acme.components()] == handles
    assert [row["handle"] for row in acme.components(41001)] == handles
    assert [row["handle"] for row in acme.components("handle:saas")] == handles
    one = acme.component(41001, "handle:storage-gb")
    assert one is not None
    assert one == acme.component("handle:saas", 61002) == acme.component_by_handle("storage-gb")
    with pytest.raises(Misconfigured, match="such family"):
        list(acme.components(5))


def test_subscriptions_are_listed_by_the_sites_filters(acme: MaxioSite) -> None:
    """By state, and all of them without."""
    assert [row["reference"] for row in acme.subscriptions(state="canceled")] == ["acct-0090"]
    assert len(list(acme.subscriptions())) == 13


# --- events ---------------------------------------------------------------------------------------------------------


def test_events_are_recorded_with_all_that_the_site_knows_of_them(orbit: MaxioSite, sandbox: Sandbox) -> None:
    """One by one and many at once; a token that the stream has taken is ignored; the time decides the period."""
    one = event_body({"account_id": "orbit-01", "units": Decimal("1.10")}, time=NOON, uniqueness_token="a")
    two = event_body({"account_id": "orbit-01", "units": 2, "region": {"name": "eu", "zones": [1, None, True]}})
    raw = event_body({"kind": "call"}, subscription_id=50200002)
    orbit.record_event("platform-events", one)
    orbit.record_events("platform-events", [one, two])
    orbit.record_event("raw-events", raw)

    assert json.loads(one)["chargify"] == {"timestamp": "2026-10-05T12:00:00+00:00", "uniqueness_token": "a"}
    assert json.loads(raw) == {"chargify": {"subscription_id": 50200002}, "kind": "call"}
    assert json.loads(event_body({}, subscription_reference="x"))["chargify"] == {"subscription_reference": "x"}
    assert billed(sandbox, ORBIT) == {
        ("orbit-01", "platform-units"): Decimal("3.1"),
        ("orbit-02", "raw-count"): Decimal(1),
    }


@pytest.mark.parametrize(("most", "most_bytes"), [(1_000, 900_000), (7, 900_000), (1_000, 400), (1, 1)])
def test_events_are_parted_into_bulks_that_a_request_takes(
    most: int, most_bytes: int, orbit: MaxioSite, sandbox: Sandbox
) -> None:
    """By number and by bytes, as they are on the way; every event is in one bulk, in order."""
    units = [Decimal(number) / 10 for number in range(1, 51)]
    events = [
        event_body(
            {"account_id": "orbit-01", "units": one, "note": "é" * (number % 5)},
            time=NOON,
            uniqueness_token=str(number),
        )
        for number, one in enumerate(units)
    ]
    bulks = list(event_bulks(events, most, most_bytes))
    for bulk in bulks:
        orbit.record_events("platform-events", bulk)

    assert [event for bulk in bulks for event in bulk] == events
    sizes = [len(f"[{','.join(bulk)}]".encode()) for bulk in bulks]
    assert all(
        len(bulk) <= most and (size <= most_bytes or len(bulk) == 1) for bulk, size in zip(bulks, sizes, strict=True)
    )
    assert billed(sandbox, ORBIT) == {("orbit-01", "platform-units"): sum(units)}
    assert list(event_bulks([])) == []


def test_an_event_that_would_bill_wrong_is_never_written() -> None:
    """All faults at once: a time without a zone, a token that is cut, the site's own object, a float."""
    with pytest.raises(Misconfigured) as told:
        event_body({"chargify": {}, "units": 0.1}, time=datetime(2026, 10, 5), uniqueness_token="x" * 65)  # noqa: DTZ001

    for words in ("chargify: is the site's own", "has no zone", "65 characters", "units: 0.1 is no exact number"):
        assert words in str(told.value)


def test_a_component_is_activated_at_a_price_and_deactivated(orbit: MaxioSite, sandbox: Sandbox) -> None:
    """Only what is active at the renewal is billed, and at the price that was said."""
    orbit.deactivate(50200001, 61101)
    orbit.deactivate(50200002, 61101)
    orbit.activate(50200002, 61101, activation_body(price_point_id=71101, initial_billing_at=date(2026, 11, 1)))
    for account in ("orbit-01", "orbit-02"):
        orbit.record_event("platform-events", event_body({"account_id": account, "units": 3}, time=NOON))
    sandbox.move_clock("2026-11-02T00:00:00Z")

    lines = {number: orbit.subscription_components(number) or [] for number in (50200001, 50200002)}
    history = {
        number: [past["total_usage_quantity"] for one in rows for past in one.get("historic_usages", ())]
        for number, rows in lines.items()
    }
    assert sorted(history[50200001]) == [0, 0]
    assert sorted(history[50200002]) == [0, 3]
    with pytest.raises(Refused):
        orbit.activate(5, 61101)
    with pytest.raises(Misconfigured, match="give one of them"):
        activation_body(price_point_id=1, custom_price={})
