"""What a client reads on Maxio's main API: subscriptions, catalogue, balances, activity, preview."""

from typing import Any


def test_subscription_by_id_and_by_reference(acme: Any) -> None:
    """Read and look-up return the same subscription, with its open period in the site's zone."""
    read = acme.get("subscriptions/50100001.json").json()["subscription"]
    assert acme.get("subscriptions/lookup.json", reference="acct-0001").json()["subscription"] == read
    assert (read["id"], read["state"], read["reference"]) == (50100001, "active", "acct-0001")
    assert read["current_period_started_at"] == "2026-10-01T00:00:00-04:00"
    assert read["current_period_ends_at"] == read["next_assessment_at"] == "2026-11-01T00:00:00-04:00"
    assert read["product"]["product_family"]["handle"] == "saas"
    assert acme.get("subscriptions/lookup.json", reference="nobody").status_code == 404


def test_reference_is_no_id_outside_the_usage_path(acme: Any) -> None:
    """Only the usage path takes a bare reference."""
    assert acme.get("subscriptions/acct-0001.json").status_code == 404


def test_subscriptions_are_listed_by_state_in_pages(acme: Any) -> None:
    """The list is paged, filtered by state, and turned around by `direction`."""
    pages = [acme.get("subscriptions.json", page=n, per_page=5).json() for n in (1, 2, 3, 4)]
    assert [len(page) for page in pages] == [5, 5, 3, 0]
    ended = acme.get("subscriptions.json", state="canceled").json()
    assert [row["subscription"]["reference"] for row in ended] == ["acct-0090"]
    assert ended[0]["subscription"]["canceled_at"]
    last = acme.get("subscriptions.json", state="active", direction="desc", per_page=1).json()
    assert last[0]["subscription"]["id"] == 50100012


def test_catalogue_of_site_and_family(acme: Any) -> None:
    """Archived components show only when asked for; a family is addressed by id or handle."""
    handles = [row["component"]["handle"] for row in acme.get("components.json").json()]
    assert handles == ["api-calls", "storage-gb", "seats"]
    family = acme.get("product_families/41001/components.json", include_archived="true").json()
    assert family == acme.get("product_families/handle:saas/components.json", include_archived="true").json()
    assert [row["component"]["archived"] for row in family] == [False, False, False, True]
    assert acme.get("product_families/1/components.json").status_code == 404


def test_component_by_handle_and_by_id(acme: Any) -> None:
    """Look-up takes a bare handle, the read path an id or `handle:`."""
    found = acme.get("components/lookup.json", handle="api-calls").json()["component"]
    assert (found["id"], found["kind"], found["unit_price"]) == (61001, "metered_component", "0.002")
    assert acme.get("product_families/41001/components/61001.json").json()["component"] == found
    assert acme.get("product_families/41001/components/handle%3Aapi-calls.json").json()["component"] == found
    assert acme.get("components/lookup.json", handle="handle:api-calls").status_code == 404


def test_price_points_of_a_component(acme: Any) -> None:
    """The default price point is marked, and the filter narrows by type."""
    body = acme.get("components/61001/price_points.json").json()
    assert [(p["id"], p["handle"], p["default"]) for p in body["price_points"]] == [
        (71001, "standard", True),
        (71002, "partner", False),
    ]
    assert body["meta"]["total_count"] == 2
    narrowed = acme.get("components/61001/price_points.json", **{"filter[type]": "catalog"}).json()
    assert [p["handle"] for p in narrowed["price_points"]] == ["partner"]


def test_subscription_components_before_and_after_use(acme: Any) -> None:
    """Lines exist with balance 0 before any use, archived ones too; the first use locks a price point in."""
    rows = {
        r["component"]["component_handle"]: r["component"]
        for r in acme.get("subscriptions/50100001/components.json").json()
    }
    assert sorted(rows) == ["api-calls", "legacy-calls", "seats", "storage-gb"]
    assert (rows["api-calls"]["unit_balance"], rows["api-calls"]["price_point_id"]) == (0, None)
    assert (rows["seats"]["unit_balance"], rows["seats"]["allocated_quantity"]) == (None, 0)
    acme.use(12, price_point_id=71002)
    line = acme.get("subscriptions/50100001/components/61001.json").json()["component"]
    assert (line["unit_balance"], line["price_point_id"], line["price_point_handle"]) == (12, 71002, "partner")
    used = acme.get("subscriptions/50100001/components.json", in_use="true").json()
    assert [row["component"]["component_handle"] for row in used] == ["api-calls"]


def test_subscription_components_need_a_numeric_subscription(acme: Any) -> None:
    """References are not taken here."""
    assert acme.get("subscriptions/acct-0001/components/61001.json").status_code == 404


def test_fractional_balance_keeps_its_digits(acme: Any) -> None:
    """A balance that is no whole number is text."""
    acme.use(0.25, component="handle:storage-gb")
    assert acme.balance(component="handle:storage-gb") == "0.25"


def test_components_of_all_subscriptions(acme: Any) -> None:
    """The site-wide list has bare rows, and narrows by subscription ids."""
    rows = acme.get("subscriptions_components.json", subscription_ids="50100001,50100002").json()
    assert {row["subscription_id"] for row in rows["subscriptions_components"]} == {50100001, 50100002}
    assert len(acme.get("subscriptions_components.json", per_page=200).json()["subscriptions_components"]) == 52


def test_site_has_no_time_zone(acme: Any) -> None:
    """The site resource names subdomain and currency, and no zone."""
    site = acme.get("site.json").json()["site"]
    assert site["subdomain"] == "acme"
    assert not [name for name in site if "zone" in name]


def test_site_events_tell_balances(acme: Any) -> None:
    """Each usage leaves an activity row with old and new balance, which shows what a floor absorbed."""
    acme.use(2, memo="first")
    acme.use(-5)
    acme.use(9, "acct-0002")
    rows = [row["event"] for row in acme.get("subscriptions/50100001/events.json", filter="metered_usage").json()]
    assert [row["event_specific_data"]["usage_quantity"] for row in rows] == [-5, 2]
    assert rows[1]["event_specific_data"] == {
        "previous_unit_balance": "0.0",
        "new_unit_balance": 2,
        "usage_quantity": 2,
        "component_id": 61001,
        "component_handle": "api-calls",
        "memo": "first",
    }
    assert rows[0]["event_specific_data"]["new_unit_balance"] == 0
    assert rows[1]["message"].startswith("Recorded 2 calls of usage (total: 2) for ")


def test_site_events_are_filtered_and_counted(acme: Any) -> None:
    """Site activity is bounded by id and date, turned around, filtered by key, and counted."""
    for quantity in (1, 2, 3):
        acme.use(quantity)
    ids = [row["event"]["id"] for row in acme.get("events.json").json()]
    assert ids == sorted(ids, reverse=True)
    bounded = acme.get("events.json", since_id=ids[1], max_id=ids[0], direction="asc").json()
    assert [row["event"]["id"] for row in bounded] == [ids[1], ids[0]]
    assert acme.get("events/count.json").json() == {"count": 3}
    assert acme.get("events/count.json", filter="prepaid_usage").json() == {"count": 0}
    assert len(acme.get("events.json", start_date="2026-10-20", end_date="2026-10-20").json()) == 3
    assert acme.get("events.json", start_datetime="2026-10-20 08:00:01").json() == []


def test_site_events_lag_by_switch(bench: Any, acme: Any) -> None:
    """Activity may become visible late; the delay ends when the sandbox clock has passed it."""
    bench.switch(acme.site, events_delay_seconds=60)
    acme.use(1)
    assert acme.get("events.json").json() == []
    bench.move_clock(advance_seconds=60)
    assert len(acme.get("events.json").json()) == 1


def test_renewal_preview_changes_nothing(bench: Any, acme: Any) -> None:
    """The preview prices the present balance, names the exact quantity, and neither counts as a write nor bills."""
    acme.use(1500)
    bench.reset_requests()
    preview = acme.post("subscriptions/50100001/renewals/preview.json").json()["renewal_preview"]
    line = next(row for row in preview["line_items"] if row["kind"] == "metered_component")
    assert (line["amount_in_cents"], line["component_handle"], line["memo"]) == (
        300,
        "api-calls",
        "API calls: 1500 call",
    )
    assert preview["total_in_cents"] == 300
    assert acme.balance() == 1500
    assert bench.requests(acme.site)["writing"] == 0
    assert acme.post("subscriptions/50100090/renewals/preview.json").status_code == 422


def test_renewal_preview_prices_what_it_is_told_to_suppose(bench: Any, acme: Any) -> None:
    """Only the components that are named, with their own quantities and price points, beside the plan; no write."""
    acme.use(1500)
    bench.reset_requests()
    path = "subscriptions/50100001/renewals/preview.json"

    def suppose(*components: dict[str, Any]) -> list[tuple[Any, int]]:
        lines = acme.post(path, {"components": list(components)}).json()["renewal_preview"]["line_items"]
        return [(row["component_handle"], row["amount_in_cents"]) for row in lines if row["kind"] != "baseline"]

    assert suppose({"component_id": 61001, "quantity": 2500}) == [("api-calls", 500)]
    assert suppose({"component_id": "handle:api-calls", "quantity": 2000, "price_point_id": 71002}) == [
        ("api-calls", 300)
    ]
    assert suppose() == [("api-calls", 300)]
    for odd in (1.5, -1, "7", None):
        assert acme.post(path, {"components": [{"component_id": 61001, "quantity": odd}]}).status_code == 422
    assert acme.post(path, {"components": [{"component_id": 99, "quantity": 1}]}).status_code == 404
    assert acme.balance() == 1500
    assert bench.requests(acme.site)["writing"] == 0


def test_unknown_paths_are_404(acme: Any, bench: Any) -> None:
    """Paths outside the documents, deletes of usages and unknown sites are 404."""
    assert acme.get("nothing.json").status_code == 404
    assert acme.session.delete(f"{acme.base}/{acme.path()}", timeout=10).status_code == 404
    assert acme.session.get(f"{bench.maxio_url('nobody')}/site.json", timeout=10).status_code == 404
