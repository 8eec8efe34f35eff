"""The vendor's own Python SDK against the sandbox: it must not notice the difference.

The SDK keeps its hosts in a class attribute of its configuration; a subclass with other hosts is all that it takes.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from advancedbilling.advanced_billing_client import AdvancedBillingClient
from advancedbilling.configuration import Configuration, Environment, Server
from advancedbilling.exceptions.api_exception import APIException
from advancedbilling.exceptions.error_list_response_exception import ErrorListResponseException
from advancedbilling.http.auth.basic_auth import BasicAuthCredentials
from advancedbilling.models.chargify_ebb import ChargifyEBB
from advancedbilling.models.create_usage import CreateUsage
from advancedbilling.models.create_usage_request import CreateUsageRequest
from advancedbilling.models.ebb_event import EBBEvent
from advancedbilling.models.event_key import EventKey
from advancedbilling.models.include_not_null import IncludeNotNull
from advancedbilling.models.list_subscription_components_include import ListSubscriptionComponentsInclude
from advancedbilling.models.prepaid_usage_allocation_detail import PrepaidUsageAllocationDetail
from advancedbilling.models.renewal_preview_component import RenewalPreviewComponent
from advancedbilling.models.renewal_preview_request import RenewalPreviewRequest
from advancedbilling.models.sorting_direction import SortingDirection
from advancedbilling.models.subscription_state_filter import SubscriptionStateFilter

from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioSettings, MaxioSite, event_body, usage_body
from usage_billing.sandbox import Sandbox

WORLDS = Path(__file__).parents[2] / "include" / "sandbox" / "worlds"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """Start the shipped worlds once."""
    with Sandbox([WORLDS]) as running:
        yield running


def _client(sandbox: Sandbox, site: str, key: str | None = None) -> Iterator[AdvancedBillingClient]:
    sandbox.reset()

    class SandboxConfiguration(Configuration):
        environments: ClassVar = {
            Environment.US: {
                Server.PRODUCTION: f"{sandbox.url}/maxio/{{site}}",
                Server.EBB: f"{sandbox.events_url}/{{site}}",
            }
        }

    credentials = BasicAuthCredentials(username=key or f"sandbox-{site}-key", password="x")
    config = SandboxConfiguration(site=site, basic_auth_credentials=credentials)
    yield AdvancedBillingClient(config=config)
    config.http_client.session.close()


@pytest.fixture
def acme(sandbox: Sandbox) -> Iterator[AdvancedBillingClient]:
    """Return the SDK for the metered site."""
    yield from _client(sandbox, "acme")


@pytest.fixture
def orbit(sandbox: Sandbox) -> Iterator[AdvancedBillingClient]:
    """Return the SDK for the event-based site."""
    yield from _client(sandbox, "orbit")


@pytest.fixture
def stranger(sandbox: Sandbox) -> Iterator[AdvancedBillingClient]:
    """Return the SDK with a wrong key."""
    yield from _client(sandbox, "acme", "wrong")


def _use(client: AdvancedBillingClient, quantity: float, subscription: Any = "acct-0001", **more: Any) -> Any:
    body = CreateUsageRequest(usage=CreateUsage(quantity=quantity, **more))
    return client.subscription_components.create_usage(subscription, "handle:api-calls", body=body).usage


def _list(client: AdvancedBillingClient, component: Any = "handle:api-calls", **filters: Any) -> list[int]:
    options = {"subscription_id_or_reference": 50100001, "component_id": component, **filters}
    return [row.usage.id for row in client.subscription_components.list_usages(options)]


def test_create_usage(acme: AdvancedBillingClient, sandbox: Sandbox) -> None:
    """A usage by id or reference comes back as the SDK's model, and is billed."""
    usage = _use(acme, 1000, memo="October", price_point_id="71002")
    assert (usage.quantity, usage.memo, usage.price_point_id) == (1000, "October", 71002)
    assert (usage.component_handle, usage.subscription_id) == ("api-calls", 50100001)
    assert usage.created_at.datetime.isoformat() == "2026-10-20T08:00:00-04:00"
    _use(acme, 5, subscription=50100001)
    assert sandbox.billed("maxio:us:acme")[0].billed == 1005


def test_list_usages_with_every_filter(acme: AdvancedBillingClient, sandbox: Sandbox) -> None:
    """Each filter of the list reaches the sandbox and narrows as documented."""
    first, second, third = (_use(acme, number).id for number in (1, 2, 3))
    sandbox.move_clock("2026-10-22T12:00:00Z")
    later = _use(acme, 4).id
    assert _list(acme) == [later, third, second, first]
    assert _list(acme, since_id=second, max_id=third) == [third, second]
    assert _list(acme, since_date="2026-10-22") == [later]
    assert _list(acme, until_date="2026-10-21") == [third, second, first]
    assert _list(acme, page=2, per_page=3) == [first]
    assert _list(acme, component=61002) == []


def test_refused_usage_is_the_sdks_own_error(acme: AdvancedBillingClient) -> None:
    """A 422 is read as the SDK's list of errors."""
    with pytest.raises(ErrorListResponseException) as caught:
        _use(acme, 1, price_point_id="1")
    assert caught.value.errors == ["Price point: could not be found."]


def test_unknown_parts_and_wrong_keys(acme: AdvancedBillingClient, stranger: AdvancedBillingClient) -> None:
    """A 404 and a 401 arrive as API exceptions with their status."""
    for client, status in ((acme, 404), (stranger, 401)):
        with pytest.raises(APIException) as caught:
            client.subscriptions.read_subscription(1)
        assert caught.value.response_code == status


def test_components(acme: AdvancedBillingClient) -> None:
    """Components are listed, looked up, read, and have price points."""
    assert [row.component.handle for row in acme.components.list_components({})] == ["api-calls", "storage-gb", "seats"]
    of_family = acme.components.list_components_for_product_family(
        {"product_family_id": 41001, "include_archived": True}
    )
    assert len(of_family) == 4
    found = acme.components.find_component("api-calls").component
    assert (found.id, found.kind, found.unit_price) == (61001, "metered_component", "0.002")
    assert acme.components.read_component(41001, "handle:api-calls").component.id == 61001
    points = acme.component_price_points.list_component_price_points({"component_id": 61001}).price_points
    assert [(point.id, point.default) for point in points] == [(71001, True), (71002, False)]


def test_subscriptions(acme: AdvancedBillingClient) -> None:
    """Subscriptions are looked up, read and listed by state."""
    found = acme.subscriptions.find_subscription("acct-0007").subscription
    assert (found.id, found.state, found.reference) == (50100007, "active", "acct-0007")
    read = acme.subscriptions.read_subscription(50100007).subscription
    assert read.current_period_ends_at.datetime.isoformat() == "2026-11-01T00:00:00-04:00"
    ended = acme.subscriptions.list_subscriptions({"state": SubscriptionStateFilter.CANCELED})
    assert [row.subscription.reference for row in ended] == ["acct-0090"]


def test_subscription_components(acme: AdvancedBillingClient) -> None:
    """Lines of one subscription, one line, and lines of the whole site are read with their balances."""
    _use(acme, 12)
    line = acme.subscription_components.read_subscription_component(50100001, "handle:api-calls").component
    assert (line.unit_balance, line.price_point_id, line.component_id) == (12, 71001, 61001)
    options = {"subscription_id": 50100001, "price_point_ids": IncludeNotNull.NOT_NULL}
    assert len(acme.subscription_components.list_subscription_components(options)) >= 1
    rows = acme.subscription_components.list_subscription_components_for_site({"per_page": 200, "page": 1})
    assert len(rows.subscriptions_components) == 52


def test_site_events(acme: AdvancedBillingClient) -> None:
    """The activity of a usage is read as the SDK's metered usage."""
    _use(acme, 2, memo="m")
    _use(acme, 3, memo="n")
    options = {"filter": [EventKey.METERED_USAGE], "direction": SortingDirection.ASC}
    events = [row.event for row in acme.events.list_subscription_events({"subscription_id": 50100001, **options})]
    data = events[1].event_specific_data
    assert (data.previous_unit_balance, data.new_unit_balance, data.usage_quantity) == ("2.0", 5, 3)
    assert acme.events.read_events_count({}).count == 2


def test_prepaid_usage(tmp_path: Path) -> None:
    """Prepaid usage with its overage, and its activity, are read as the SDK's own models."""
    text = (WORLDS / "acme.yaml").read_text(encoding="utf-8")
    text = text.replace("kind: metered_component", "kind: prepaid_usage_component", 1)
    world = tmp_path / "acme.yaml"
    world.write_text(text.replace("family: saas, state: active}", "family: saas, allocations: {api-calls: 10}}"))
    with Sandbox([world]) as sandbox:
        clients = _client(sandbox, "acme")
        client = next(clients)
        usage = _use(client, 25, memo="m")
        assert (usage.quantity, usage.overage_quantity) == (25, 15)
        event = client.events.list_events({"filter": [EventKey.PREPAID_USAGE]})[0].event.event_specific_data
        # The SDK takes the first model that fits, which is that of metered usage; the rest it keeps beside it.
        told = event.additional_properties
        assert (event.previous_unit_balance, event.new_unit_balance, event.usage_quantity) == ("0.0", 25, 25)
        assert (told["previous_overage_unit_balance"], told["new_overage_unit_balance"]) == ("0.0", 15)
        assert told["overage_usage_quantity"] == 15
        details = [PrepaidUsageAllocationDetail.from_dictionary(detail) for detail in told["allocation_details"]]
        assert [detail.usage_quantity for detail in details] == [10]
        assert all(PrepaidUsageAllocationDetail.validate(detail) for detail in details)
        assert sandbox.billed("maxio:us:acme")[0].billed == 25
        assert next(clients, None) is None


def test_site_and_preview(acme: AdvancedBillingClient) -> None:
    """The site and a renewal preview are read."""
    _use(acme, 1500)
    assert acme.sites.read_site().site.subdomain == "acme"
    preview = acme.subscription_status.preview_renewal(50100001).renewal_preview
    assert preview.total_in_cents == 300
    supposed = RenewalPreviewRequest(components=[RenewalPreviewComponent(component_id=61001, quantity=2500)])
    assert acme.subscription_status.preview_renewal(50100001, supposed).renewal_preview.total_in_cents == 500


def test_invoices(acme: AdvancedBillingClient, sandbox: Sandbox) -> None:
    """Invoices with lines are read as the SDK's models."""
    _use(acme, 1500)
    sandbox.move_clock("2026-11-02T00:00:00Z")
    invoices = acme.invoices.list_invoices({"subscription_id": 50100001, "line_items": True}).invoices
    lines = [line for line in invoices[0].line_items if line.component_id == 61001]
    assert [(line.quantity, line.kind) for line in lines] == [("1500.0", "metered_component")]


def test_events_single_and_bulk(orbit: AdvancedBillingClient, sandbox: Sandbox) -> None:
    """Events are recorded singly and in bulk; a repeated token is ignored."""

    def event(token: str, units: int) -> EBBEvent:
        meta = ChargifyEBB(timestamp="2026-10-05T00:00:00Z", uniqueness_token=token)
        return EBBEvent(chargify=meta, additional_properties={"account_id": "orbit-01", "units": units})

    recorder = orbit.subscription_components
    recorder.record_event("platform-events", body=event("a", 5))
    recorder.bulk_record_events("platform-events", body=[event("a", 5), event("b", 7)])
    row = sandbox.billed("maxio:us:orbit")[0]
    assert (row.reference, row.billed, row.records) == ("orbit-01", 12, 2)


def test_activation_and_historic_usages(orbit: AdvancedBillingClient, sandbox: Sandbox) -> None:
    """An event-based component is switched off and on, and shows the usage of past periods."""
    parts = orbit.subscription_components
    parts.deactivate_event_based_component(50200001, 61101)
    parts.activate_event_based_component(50200001, 61101)
    meta = ChargifyEBB(subscription_id=50200001)
    parts.record_event("platform-events", body=EBBEvent(meta, {"account_id": "orbit-01", "units": 3}))
    sandbox.move_clock("2026-11-02T00:00:00Z")
    options = {"subscription_id": 50200001, "include": [ListSubscriptionComponentsInclude.HISTORIC_USAGES]}
    lines = [row.component for row in parts.list_subscription_components(options)]
    history = next(line for line in lines if line.component_id == 61101).historic_usages
    assert [entry.total_usage_quantity for entry in history] == [3]


@pytest.mark.parametrize("response_format", ["json", "xml"])
def test_the_sdk_and_our_client_read_each_others_usages(
    acme: AdvancedBillingClient, sandbox: Sandbox, response_format: Any
) -> None:
    """What one of them sends the other reads, and both read the same of it; the site counted all."""
    ours = MaxioSite(
        MaxioSettings(subdomain="acme", api_key="sandbox-acme-key", base_url=sandbox.maxio_url("acme")),
        Transport(patience_seconds=0),
        response_format=response_format,
    )
    theirs = _use(acme, 12, memo="theirs", price_point_id="71002")
    made = ours.create_usage("acct-0001", "handle:api-calls", usage_body(30, memo="ours", price_point_id=71002))
    options = {"subscription_id_or_reference": "acct-0001", "component_id": "handle:api-calls"}
    in_sdk = [
        (row.usage.id, int(row.usage.quantity), row.usage.memo, row.usage.price_point_id)
        for row in acme.subscription_components.list_usages(options)
    ]
    in_client = [
        (usage["id"], int(usage["quantity"]), usage["memo"], int(usage["price_point_id"]))
        for usage in ours.usages("acct-0001", "handle:api-calls") or ()
    ]

    assert in_client == in_sdk == [(int(made["id"]), 30, "ours", 71002), (theirs.id, 12, "theirs", 71002)]
    assert sandbox.billed("maxio:us:acme")[0].billed == 42
    sandbox.move_clock("2026-11-02T00:00:00Z")
    lines = [line for invoice in ours.invoices(50100001) for line in invoice["line_items"]]
    assert [Decimal(line["quantity"]) for line in lines if line["component_id"] == 61001] == [42]


def test_the_sdk_and_our_client_feed_one_metric(orbit: AdvancedBillingClient, sandbox: Sandbox) -> None:
    """Events of both add up, and a token that one has used is the other's as well."""
    settings = {"base_url": sandbox.maxio_url("orbit"), "events_url": sandbox.events_url}
    ours = MaxioSite(MaxioSettings(subdomain="orbit", api_key="sandbox-orbit-key", **settings))
    meta = ChargifyEBB(timestamp="2026-10-05T00:00:00Z", uniqueness_token="one")
    event = EBBEvent(chargify=meta, additional_properties={"account_id": "orbit-01", "units": 5})
    orbit.subscription_components.record_event("platform-events", body=event)
    noon = datetime(2026, 10, 5, 12, tzinfo=UTC)
    for token in ("one", "two"):
        body = event_body({"account_id": "orbit-01", "units": 7}, time=noon, uniqueness_token=token)
        ours.record_event("platform-events", body)

    (line,) = [row for row in ours.balances([50200001]) if row["component_id"] == 61101]
    rows = orbit.subscription_components.list_subscription_components({"subscription_id": 50200001})
    assert Decimal(line["unit_balance"]) == 12
    assert [row.component.unit_balance for row in rows if row.component.component_id == 61101] == [12]
    assert sandbox.billed("maxio:us:orbit")[0].billed == 12
