"""Renewals: what is invoiced, what begins again, and in which zone a period ends."""

from decimal import Decimal
from typing import Any

ACME = "maxio:us:acme"


def test_renewal_invoices_the_balance_and_resets_it(bench: Any, acme: Any) -> None:
    """At the period's end the balance is invoiced and begins again at 0; later usage belongs to the next period."""
    acme.use(1500)
    bench.move_clock("2026-11-01T04:00:00Z")
    assert acme.balance() == 0
    acme.use(30)
    assert bench.figures(ACME, "acct-0001", "api-calls") == (1500, 30, 1530, 2)


def test_period_ends_at_local_midnight(bench: Any, acme: Any) -> None:
    """The site's zone decides when November begins, one second before nothing is invoiced."""
    acme.use(5)
    bench.move_clock("2026-11-01T03:59:59Z")
    assert bench.figures(ACME, "acct-0001", "api-calls")[:2] == (0, 5)
    bench.move_clock("2026-11-01T04:00:00Z")
    assert bench.figures(ACME, "acct-0001", "api-calls")[:2] == (5, 0)


def test_periods_follow_the_calendar_over_a_clock_change(bench: Any, acme: Any) -> None:
    """November ends at local midnight too, which after the autumn clock change is another UTC hour."""
    bench.move_clock("2026-11-15T00:00:00Z")
    read = acme.get("subscriptions/50100001.json").json()["subscription"]
    assert read["current_period_started_at"] == "2026-11-01T00:00:00-04:00"
    assert read["current_period_ends_at"] == "2026-12-01T00:00:00-05:00"


def test_correction_after_renewal_is_lost_at_the_floor(bench: Any, acme: Any) -> None:
    """A deduction for a billed period meets the new period's empty balance and takes nothing back."""
    acme.use(100)
    bench.move_clock("2026-11-02T00:00:00Z")
    acme.use(-40)
    assert bench.figures(ACME, "acct-0001", "api-calls") == (100, 0, 60, 2)


def test_moving_over_several_periods_renews_each(bench: Any, acme: Any) -> None:
    """A clock moved by months makes one invoice for each period."""
    acme.use(5)
    bench.move_clock("2027-02-10T00:00:00Z")
    invoices = acme.get("invoices.json", subscription_id=50100001, line_items="true", direction="asc").json()[
        "invoices"
    ]
    assert [row["issue_date"] for row in invoices] == ["2026-11-01", "2026-12-01", "2027-01-01", "2027-02-01"]
    kinds = [[line["kind"] for line in row["line_items"]] for row in invoices]
    assert kinds == [["baseline", "metered_component"], ["baseline"], ["baseline"], ["baseline"]]


def test_invoice_lines_name_what_was_billed(bench: Any, acme: Any) -> None:
    """A line has the component, its price point, the exact quantity as text and its period; the price is rounded."""
    acme.use(1234, price_point_id=71002)
    bench.move_clock("2026-11-02T00:00:00Z")
    listed = acme.get("invoices.json", subscription_id=50100001).json()["invoices"]
    assert "line_items" not in listed[0]
    whole = acme.get(f"invoices/{listed[0]['uid']}.json").json()
    line = next(row for row in whole["line_items"] if row["component_id"] == 61001)
    assert (line["kind"], line["quantity"], line["price_point_id"]) == ("metered_component", "1234.0", 71002)
    assert (line["period_range_start"], line["period_range_end"]) == ("2026-10-01", "2026-11-01")
    assert (line["unit_price"], whole["total_amount"]) == ("0.0015", "1.85")


def test_historic_usages_keep_ten_periods(bench: Any, orbit: Any, orbit_main: Any) -> None:
    """The component listing tells the metric of the last ten billed periods, those without events as 0."""
    orbit.send(orbit.event(2.5))
    bench.move_clock("2027-10-02T00:00:00Z")
    rows = orbit_main.get("subscriptions/50200001/components.json", include="historic_usages").json()
    history = next(r["component"] for r in rows if r["component"]["component_handle"] == "platform-units")[
        "historic_usages"
    ]
    assert len(history) == 10
    assert history[0]["billing_period_ends_at"] == "2027-10-01T00:00:00+00:00"
    bench.reset()
    orbit.send(orbit.event(2.5))
    bench.move_clock("2026-11-02T00:00:00Z")
    rows = orbit_main.get("subscriptions/50200001/components.json", include="historic_usages").json()
    assert rows[0]["component"]["historic_usages"] == [
        {
            "total_usage_quantity": 2.5,
            "billing_period_starts_at": "2026-10-01T00:00:00+00:00",
            "billing_period_ends_at": "2026-11-01T00:00:00+00:00",
        }
    ]


def test_ended_subscriptions_do_not_renew(bench: Any, acme: Any) -> None:
    """The period of a cancelled subscription stands still."""
    bench.move_clock("2027-01-10T00:00:00Z")
    assert acme.get("invoices.json", subscription_id=50100090).json() == {"invoices": []}
    read = acme.get("subscriptions/50100090.json").json()["subscription"]
    assert read["current_period_ends_at"] == "2026-11-01T00:00:00-04:00"


def test_totals_add_up_by_component(bench: Any, acme: Any) -> None:
    """The control's totals are the sums of its rows."""
    for number in (1, 2, 3):
        acme.use(number, f"acct-000{number}")
    total = bench.control("GET", f"billed?site={ACME}")["total"]
    assert total == [
        {
            "site": ACME,
            "component": "api-calls",
            "records": 3,
            "invoiced": "0",
            "open": "6",
            "billed": "6",
            "stored": "6",
        }
    ]


def test_chargeover_cycle_is_invoiced_with_base_and_usage(bench: Any, telco: Any) -> None:
    """A cycle's end makes an invoice with a base line and a usage line; `line_usage` is the billed quantity."""
    telco.use(361)
    bench.move_clock("2026-11-01T05:00:00Z")
    invoices = telco.get("invoice", where="package_id:EQUALS:713").json()["response"]
    assert "line_items" not in invoices[0]
    whole = telco.get(f"invoice/{invoices[0]['invoice_id']}").json()["response"]
    base, usage = whole["line_items"]
    assert (base["is_base"], base["line_total"], usage["is_usage"], usage["line_usage"]) == (True, 10, True, 361)
    assert (usage["package_line_id"], usage["line_rate"], usage["line_total"]) == (854, 0.05, 18.05)
    assert (whole["sum_base"], whole["sum_usage"], whole["total"]) == (10, 18.05, 28.05)
    assert (whole["cycle_post_from_date"], whole["cycle_post_to_date"]) == ("2026-10-01", "2026-10-31")
    assert bench.figures(telco.site, "pkg-001", "voip") == (361, 0, 361, 1)


def test_late_chargeover_usage_by_switch(bench: Any, telco: Any) -> None:
    """Usage for an invoiced cycle is stored and never billed, or billed on the next invoice."""
    bench.move_clock("2026-11-10T00:00:00Z")
    telco.use(5, day="2026-10-15")
    assert bench.figures(telco.site, "pkg-001", "voip") == (0, 0, 5, 1)
    bench.switch(telco.site, late_usage="next_invoice")
    telco.use(7, day="2026-10-15")
    assert bench.figures(telco.site, "pkg-001", "voip") == (0, 7, 12, 2)


def test_straddling_usage_by_switch(bench: Any, telco: Any) -> None:
    """A record over the cycle's end belongs to the cycle of its `from`, or of its `to`."""
    straddling = {"from": "2026-10-31 12:00:00", "to": "2026-11-01 12:00:00"}
    telco.post("usage", {"line_item_id": 854, "usage_value": 1, **straddling})
    bench.switch(telco.site, cycle_by="to")
    telco.post("usage", {"line_item_id": 854, "usage_value": 10, **straddling})
    assert bench.figures(telco.site, "pkg-001", "voip")[1] == 1
    bench.move_clock("2026-11-02T00:00:00Z")
    assert bench.figures(telco.site, "pkg-001", "voip")[:2] == (1, 10)


def test_usage_types_of_a_cycle(bench: Any, telco: Any) -> None:
    """`max` bills the greatest value of the cycle, `lat` the latest, whatever order they arrive in."""
    for value, day in ((5, "2026-10-03"), (9, "2026-10-02"), (7, "2026-10-01")):
        telco.use(value, line=854, day=day, type="max")
        telco.use(value, line=855, day=day, type="lat")
    assert bench.figures(telco.site, "pkg-001", "voip")[1] == 9
    assert bench.figures(telco.site, "pkg-002", "voip")[1:3] == (5, Decimal(21))
