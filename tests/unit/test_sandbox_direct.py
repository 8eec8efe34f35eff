"""The sandbox behind a function call: its clock, what lands late, and every switch by what is billed."""

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from usage_billing.sandbox import ConnectionBroken, DirectReply, DirectSandbox, ReplyTooLate, SandboxRefused, WorldError
from usage_billing.sandbox.world import ChargeOverWorld, MaxioWorld

SHARED = {
    "now": datetime(2026, 10, 20, 12, tzinfo=UTC),
    "zone": "America/New_York",
    "billing_period": {"start": "2026-10-01", "end": "2026-11-01"},
}
POINT = {"handle": "standard", "name": "Standard", "unit_price": "1", "default": True}


def part(number: int, handle: str, kind: str, **more: Any) -> dict[str, Any]:
    """Return a component with one price point."""
    shape = {"id": number, "handle": handle, "name": handle, "kind": kind, "family": "saas", "unit_name": "unit"}
    return {**shape, "price_points": [{"id": number + 100, **POINT}], **more}


def maxio(region: str = "us", name: str = "acme") -> MaxioWorld:
    """Return a site with a component of each kind, and subscriptions that are active, in trial and cancelled."""
    metric = {"id": 1, "kind": "sum", "property": "units"}
    return MaxioWorld.model_validate(
        {
            **SHARED,
            "site": f"maxio:{region}:{name}",
            "api_key": "key",
            "product_families": [
                {"id": 1, "handle": "saas", "name": "S", "product": {"id": 2, "handle": "team", "name": "Team"}}
            ],
            "streams": [{"handle": "events", "name": "Events", "identifier": "subscription_id"}],
            "components": [
                part(11, "calls", "metered_component"),
                part(12, "storage", "metered_component", allow_fractional_quantities=True),
                part(13, "credits", "prepaid_usage_component"),
                part(14, "units", "event_based_component", stream="events", metric=metric),
            ],
            "subscriptions": [
                {
                    "id": 501,
                    "reference": "a",
                    "family": "saas",
                    "activated": ["units"],
                    "allocations": {"credits": 100},
                },
                {"id": 502, "reference": "t", "family": "saas", "state": "trialing", "activated": ["units"]},
                {"id": 503, "reference": "c", "family": "saas", "state": "canceled"},
            ],
        }
    )


def chargeover() -> ChargeOverWorld:
    """Return an account with two packages, each with one metered line."""
    package = {"customer": "c1", "lines": [{"id": 854, "item": "voip"}]}
    return ChargeOverWorld.model_validate(
        {
            **SHARED,
            "site": "chargeover:telco",
            "public_key": "public",
            "private_key": "private",
            "items": [
                {"item_id": 13, "external_key": "voip", "name": "V", "units": "m", "metered": True, "amount": "1"}
            ],
            "customers": [{"customer_id": 10, "external_key": "c1", "company": "C"}],
            "packages": [{"package_id": 713, "external_key": "p1", **package}],
        }
    )


class Site:
    """One site of a direct sandbox, with what the tests ask of it most."""

    def __init__(self, sandbox: DirectSandbox, site: str, root: str, credentials: str) -> None:
        self.sandbox, self.site, self.root = sandbox, site, root
        self.headers = {"Authorization": f"Basic {base64.b64encode(credentials.encode()).decode()}"}

    def ask(self, method: str, path: str, body: object = None, **options: Any) -> DirectReply:
        """Send a request."""
        content = b"" if body is None else json.dumps(body).encode()
        return self.sandbox.request(method, self.root + path, self.headers, content, **options)

    def switch(self, **switches: object) -> None:
        """Turn switches of this site."""
        self.sandbox.switch(self.site, **switches)

    def fault(self, kind: str, **details: object) -> None:
        """Order a fault for this site."""
        self.sandbox.fault(self.site, kind, **details)

    def billed(self, reference: str, component: str) -> tuple[int, int]:
        """Return what was invoiced, and what is open."""
        for row in self.sandbox.billed(self.site):
            if row.subscription and (row.reference, row.component) == (reference, component):
                assert row.billed == row.invoiced + row.open
                return int(row.invoiced), int(row.open)
        return 0, 0


class Acme(Site):
    """The Maxio site."""

    def use(self, quantity: object, reference: str = "a", component: str = "calls", **more: Any) -> DirectReply:
        """Post a usage; `token`, `memo` and `timeout_seconds` where they matter."""
        options = {"timeout_seconds": more.pop("timeout_seconds")} if "timeout_seconds" in more else {}
        body = {"usage": {"quantity": quantity, "memo": more.get("memo")}}
        if "token" in more:
            body["uniqueness_token"] = more["token"]
        path = f"/subscriptions/{reference}/components/{quote(f'handle:{component}', safe='')}/usages.json"
        return self.ask("POST", path, body, **options)

    def balance(self, component: str = "calls", number: int = 501) -> Any:
        """Return the unit balance."""
        path = f"/subscriptions/{number}/components/handle:{component}.json"
        return json.loads(self.ask("GET", path).body)["component"]["unit_balance"]

    def activity(self, query: str = "") -> list[Any]:
        """Return the site's own events, oldest first."""
        return [row["event"] for row in json.loads(self.ask("GET", f"/events.json?direction=asc{query}").body)]


class Events(Site):
    """The events host of the Maxio site."""

    def event(self, units: int = 1, subscription: int = 501, **meta: Any) -> dict[str, Any]:
        """Return an event."""
        return {"chargify": {"subscription_id": subscription, **meta}, "units": units}

    def send(self, body: object, path: str = "/events/events") -> int:
        """Send an event, or an array of them, and return the status."""
        return self.ask("POST", f"{path}{'/bulk' if isinstance(body, list) else ''}.json", body).status


class Telco(Site):
    """The ChargeOver account."""

    def use(self, value: object, **more: Any) -> DirectReply:
        """Post a usage of 15 October."""
        times = {"from": "2026-10-15 00:00:00", "to": "2026-10-15 23:59:59"}
        return self.ask("POST", "/usage", {"line_item_id": 854, "usage_value": value, **times, **more})

    def total(self) -> Decimal:
        """Return what is billed, to the last decimal."""
        return sum((row.billed for row in self.sandbox.billed(self.site)), Decimal(0))


@pytest.fixture
def sandbox() -> Iterator[DirectSandbox]:
    """Return a sandbox with both sites, from worlds that stand in no file."""
    with DirectSandbox([maxio(), chargeover()]) as sandbox:
        yield sandbox


@pytest.fixture
def acme(sandbox: DirectSandbox) -> Acme:
    """Return the Maxio site."""
    return Acme(sandbox, "maxio:us:acme", sandbox.maxio_url("acme"), "key:x")


@pytest.fixture
def events(sandbox: DirectSandbox) -> Events:
    """Return the events host of the Maxio site."""
    return Events(sandbox, "maxio:us:acme", f"{sandbox.events_url}/acme", "key:x")


@pytest.fixture
def telco(sandbox: DirectSandbox) -> Telco:
    """Return the ChargeOver account."""
    return Telco(sandbox, "chargeover:telco", f"{sandbox.chargeover_url('telco')}/api/v3", "public:private")


# --- the door, and its clock -----------------------------------------------------------------------------------------


def test_a_request_is_carried_out_before_it_returns(acme: Acme) -> None:
    """A usage is answered, billed, counted, recorded and dated by the sandbox's clock."""
    reply = acme.use(5, memo="m")
    assert (reply.status, reply.seconds) == (200, 0)
    assert reply.headers["date"] == "Tue, 20 Oct 2026 12:00:00 GMT"
    assert acme.billed("a", "calls") == (0, 5)
    assert acme.sandbox.requests(acme.site)["writing"] == 1
    assert [row["memo"] for row in acme.sandbox.records(acme.site)] == ["m"]
    assert json.loads(acme.ask("GET", "/site").body)["site"]["subdomain"] == "acme"


def test_the_clock_moves_forward_and_renews(acme: Acme) -> None:
    """Moving the clock past a period's end invoices it; the clock does not go back, and stands still by itself."""
    acme.use(5)
    assert acme.sandbox.move_clock(datetime(2026, 11, 1, 5, tzinfo=UTC)).isoformat() == "2026-11-01T05:00:00+00:00"
    assert acme.billed("a", "calls") == (5, 0)
    acme.sandbox.move_clock("2026-11-01T05:00:00Z")
    with pytest.raises(SandboxRefused, match="the clock stands at"):
        acme.sandbox.move_clock("2026-11-01T04:59:59Z")
    assert acme.sandbox.move_clock(advance_seconds=0.5).microsecond == 500_000


def test_visibility_depends_on_the_sandboxs_clock_alone(acme: Acme, events: Events, telco: Telco) -> None:
    """However long a test takes, a record stays unseen until the clock has been moved past its delay."""
    acme.switch(events_delay_seconds="0.001", component_list_delay_seconds="0.001")
    telco.switch(usage_read_delay_seconds="0.001")
    acme.use(5)
    events.send(events.event(7))
    telco.use(3)

    def seen() -> tuple[int, int, int, list[int]]:
        lines = json.loads(acme.ask("GET", "/subscriptions_components.json?subscription_ids=501").body)
        balances = [row["unit_balance"] for row in lines["subscriptions_components"]]
        listed = json.loads(telco.ask("GET", "/usage").body)["response"]
        return len(acme.activity()), acme.balance("units"), len(listed), balances

    assert seen() == (0, 0, 0, [0, 0, 0, 0])
    assert acme.balance() == 5
    acme.sandbox.move_clock(advance_seconds=0.001)
    assert seen() == (1, 7, 1, [5, 0, 0, 7])


def test_a_span_of_delays_shows_records_one_by_one(acme: Acme) -> None:
    """With a span each record has a delay of its own within it, so that a later one may be seen first."""
    acme.switch(events_delay_seconds="2-10")
    for _ in range(20):
        acme.use(1)
    seen = []
    for _ in range(10):
        acme.sandbox.move_clock(advance_seconds=1)
        seen.append(len(acme.activity("&per_page=200")))
    assert seen[0] == 0
    assert 0 < seen[4] < 20
    assert seen == sorted(seen)
    assert seen[-1] == 20
    with pytest.raises(SandboxRefused, match="does not know"):
        acme.switch(events_delay_seconds="10-2")


def test_sums_are_exact_beyond_the_usual_precision(telco: Telco) -> None:
    """Arithmetic keeps a hundred digits while a request is carried out, whatever the caller's context is."""
    large, small = "123456789012345678901234567890", "0.000000000000000000000000000001"
    telco.use(large)
    telco.use(small)
    (row,) = telco.sandbox.billed(telco.site)
    assert str(row.stored) == f"{large}.000000000000000000000000000001"


def test_reset_begins_again(acme: Acme) -> None:
    """A reset forgets what was stored, switched, ordered, and what was still to land."""
    acme.fault("late_commit", seconds=5)
    with pytest.raises(ConnectionBroken):
        acme.use(3)
    acme.switch(memo_limit="255")
    acme.sandbox.move_clock(advance_seconds=1)
    acme.sandbox.reset()
    assert acme.sandbox.now() == SHARED["now"]
    acme.sandbox.move_clock(advance_seconds=100)
    assert acme.sandbox.billed(acme.site) == []
    assert acme.sandbox.control("GET", "switches")[acme.site]["memo_limit"] == "none"


def test_books_are_kept_in_a_file(tmp_path: Path) -> None:
    """With books in a file, clock and records are there when the same worlds are opened again."""
    for expected in ((0, 4), (0, 8)):
        with DirectSandbox([maxio()], tmp_path / "books.sqlite") as sandbox:
            site = Acme(sandbox, "maxio:us:acme", sandbox.maxio_url("acme"), "key:x")
            site.use(4)
            sandbox.move_clock(advance_seconds=60)
            assert site.billed("a", "calls") == expected
    assert sandbox.now() == SHARED["now"] + timedelta(seconds=120)


def test_loaded_worlds_are_checked_together() -> None:
    """Worlds that disagree are refused, however they were given."""
    with pytest.raises(WorldError, match="given twice"):
        DirectSandbox([maxio(), maxio()])


# --- what takes long -------------------------------------------------------------------------------------------------


def test_a_hang_moves_the_clock(acme: Acme) -> None:
    """A client that waits gets its answer, and as much time has passed as the site took."""
    acme.fault("hang", seconds=30)
    reply = acme.use(5)
    assert (reply.status, reply.seconds) == (200, 30)
    assert acme.sandbox.now() == SHARED["now"] + timedelta(seconds=30)


def test_a_hang_beyond_the_timeout_lands_behind_the_clients_back(acme: Acme) -> None:
    """A client that gave up sees nothing at first; past the hang its usage is there, at that moment."""
    acme.fault("hang", seconds=200)
    with pytest.raises(ReplyTooLate):
        acme.use(5, timeout_seconds=125)
    assert acme.sandbox.now() == SHARED["now"] + timedelta(seconds=125)
    acme.sandbox.move_clock(advance_seconds=74)
    assert acme.billed("a", "calls") == (0, 0)
    acme.sandbox.move_clock(advance_seconds=1000)
    assert acme.billed("a", "calls") == (0, 5)
    assert acme.sandbox.records(acme.site)[0]["created_at"] == "2026-10-20T12:03:20+00:00"


def test_a_hang_over_a_periods_end_is_billed_in_the_next(acme: Acme) -> None:
    """The period of a usage is that of the moment at which it is carried out."""
    acme.sandbox.move_clock("2026-11-01T03:59:00Z")
    acme.fault("hang", seconds=120)
    acme.use(5)
    assert acme.billed("a", "calls") == (0, 5)
    acme.sandbox.move_clock("2026-12-02T00:00:00Z")
    assert acme.billed("a", "calls") == (5, 0)


def test_more_than_four_held_requests_are_too_many(acme: Acme) -> None:
    """Requests that hang hold their places; here nobody can wait for one, so the fifth is turned away."""
    acme.fault("hang", seconds=50, count=4)
    for number in range(4):
        with pytest.raises(ReplyTooLate):
            acme.use(1, timeout_seconds=1, token=f"t{number}")
    assert acme.use(1).status == 429
    acme.sandbox.move_clock(advance_seconds=60)
    assert acme.use(1).status == 200
    assert acme.billed("a", "calls") == (0, 5)


@pytest.mark.parametrize(
    ("kind", "twin", "statuses", "billed"),
    [
        ("late_commit", "refuse", [409, 409], 5),
        ("late_commit", "accept", [200, 200], 15),
        ("late_arrival", "refuse", [200, 409], 5),
        ("late_arrival", "accept", [200, 409], 5),
    ],
)
def test_twins_of_a_late_request(acme: Acme, kind: str, twin: str, statuses: list[int], billed: int) -> None:
    """What a repeated token does while the first request is on its way: only one that has arrived holds its token."""
    acme.switch(in_flight_twin=twin)
    acme.fault(kind, seconds=60)
    with pytest.raises(ConnectionBroken):
        acme.use(5, token="t")
    assert [acme.use(5, token="t").status for _ in range(2)] == statuses
    acme.sandbox.move_clock(advance_seconds=60)
    assert acme.billed("a", "calls") == (0, billed)
    assert acme.use(5, token="t").status == 409


def test_a_refused_late_request_gives_its_token_back(acme: Acme) -> None:
    """Where a refusal does not use a token up, one that is refused late has held it only meanwhile."""
    acme.switch(token_spent_by_4xx="no")
    acme.fault("late_commit", seconds=60)
    with pytest.raises(ConnectionBroken):
        acme.use("nothing", token="t")
    assert acme.use(5, token="t").status == 409
    acme.sandbox.move_clock(advance_seconds=60)
    assert acme.use(5, token="t").status == 200
    assert acme.billed("a", "calls") == (0, 5)


# --- Maxio: every choice ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scope", "status"), [("site", 409), ("path", 200)])
def test_token_scope(acme: Acme, scope: str, status: int) -> None:
    """A token of one component is spent for another one too, or only for its own path."""
    acme.switch(token_scope=scope)
    acme.use(1, token="t")
    assert acme.use(2, component="storage", token="t").status == status
    assert acme.use(1, token="t").status == 409
    assert acme.billed("a", "storage") == (0, 2 if status == 200 else 0)


@pytest.mark.parametrize(("choice", "status", "kept"), [("refuse", 422, None), ("truncate", 200, 255)])
def test_long_memo(acme: Acme, choice: str, status: int, kept: int | None) -> None:
    """A memo over the limit is refused, or loses its end in silence."""
    acme.switch(memo_limit="255", long_memo=choice)
    reply = acme.use(1, memo="m" * 300)
    assert reply.status == status
    assert acme.billed("a", "calls") == (0, 1 if kept else 0)
    if kept:
        assert json.loads(reply.body)["usage"]["memo"] == "m" * kept


@pytest.mark.parametrize(
    ("choice", "created", "listed"),
    [
        ("as_documented", "20.0", "20.0"),
        ("text_in_lists", 20, "20.0"),
        ("int", 20, 20),
        ("string", "20.0", "20.0"),
    ],
)
def test_quantity_type(acme: Acme, choice: str, created: object, listed: object) -> None:
    """The quantity of a fractional component is shown as text or as a number, alike or not in create and list."""
    acme.switch(quantity_type=choice)
    assert json.loads(acme.use(20, component="storage").body)["usage"]["quantity"] == created
    path = "/subscriptions/a/components/handle:storage/usages.json"
    assert json.loads(acme.ask("GET", path).body)[0]["usage"]["quantity"] == listed


@pytest.mark.parametrize(("lands_in", "renewed"), [("closing_period", (12, 0)), ("new_period", (5, 7))])
def test_usage_between_end_and_assessment(acme: Acme, lands_in: str, renewed: tuple[int, int]) -> None:
    """Up to its assessment a period that has ended may still take usage, or leave it to the next one; none is lost."""
    acme.switch(assessment_delay_seconds=1200, usage_before_assessment=lands_in)
    acme.use(5)
    acme.sandbox.move_clock("2026-11-01T04:10:00Z")
    acme.use(7)
    assert acme.billed("a", "calls") == (0, 12)
    assert acme.balance() == (12 if lands_in == "closing_period" else 7)
    acme.sandbox.move_clock("2026-11-01T04:20:00Z")
    assert acme.billed("a", "calls") == renewed
    assert acme.balance() == renewed[1]
    acme.sandbox.move_clock("2026-12-02T00:00:00Z")
    assert acme.billed("a", "calls") == (12, 0)
    invoices = json.loads(acme.ask("GET", "/invoices.json?subscription_id=501&direction=asc").body)["invoices"]
    assert [row["created_at"] for row in invoices] == ["2026-11-01T00:20:00-04:00", "2026-12-01T00:20:00-05:00"]


def test_a_deduction_after_the_end_meets_the_floor_of_its_period(acme: Acme) -> None:
    """Where usage after a period's end belongs to the next period, a deduction there takes nothing from the closing."""
    acme.switch(assessment_delay_seconds=1200, usage_before_assessment="new_period")
    acme.use(5)
    acme.sandbox.move_clock("2026-11-01T04:10:00Z")
    acme.use(-3)
    acme.sandbox.move_clock("2026-11-02T00:00:00Z")
    assert acme.billed("a", "calls") == (5, 0)


@pytest.mark.parametrize(
    ("choice", "open_then", "billed"), [("first_paid_renewal", 10, (10, 0)), ("dropped", 3, (3, 0))]
)
def test_usage_of_a_trial(acme: Acme, events: Events, choice: str, open_then: int, billed: tuple[int, int]) -> None:
    """What is used in a trial is billed at the first paid renewal, together with the first paid period, or never."""
    acme.switch(trial_usage=choice)
    assert acme.use(7, "t").status == 200
    events.send(events.event(7, 502))
    acme.sandbox.move_clock("2026-11-02T00:00:00Z")
    assert json.loads(acme.ask("GET", "/subscriptions/502.json").body)["subscription"]["state"] == "active"
    acme.use(3, "t")
    events.send(events.event(3, 502))
    for component in ("calls", "units"):
        assert acme.billed("t", component) == (0, open_then)
    acme.sandbox.move_clock("2026-12-02T00:00:00Z")
    for component in ("calls", "units"):
        assert acme.billed("t", component) == billed
    acme.sandbox.move_clock("2027-01-02T00:00:00Z")
    assert acme.billed("t", "calls") == billed


def test_a_trial_has_no_usage_on_its_invoice(acme: Acme) -> None:
    """At the end of a trial only the plan is invoiced; the subscription tells of its trial while it lasts."""
    acme.use(7, "t")
    read = json.loads(acme.ask("GET", "/subscriptions/502.json").body)["subscription"]
    assert (read["state"], read["trial_ended_at"], read["activated_at"]) == (
        "trialing",
        "2026-11-01T00:00:00-04:00",
        None,
    )
    acme.sandbox.move_clock("2026-11-02T00:00:00Z")
    listed = acme.ask("GET", "/invoices.json?subscription_id=502&line_items=true").body
    assert [[line["kind"] for line in row["line_items"]] for row in json.loads(listed)["invoices"]] == [["baseline"]]


def test_prepaid_usage_draws_from_its_allocation_first(acme: Acme) -> None:
    """Usage up to the allocation costs nothing more, what goes beyond is overage; the next period begins anew."""
    assert json.loads(acme.use(90, component="credits").body)["usage"]["overage_quantity"] == 0
    assert json.loads(acme.use(30, component="credits").body)["usage"]["overage_quantity"] == 20
    assert acme.balance("credits") == 120
    data = acme.activity("&filter=prepaid_usage")[-1]["event_specific_data"]
    assert (data["previous_unit_balance"], data["new_unit_balance"], data["usage_quantity"]) == ("90.0", 120, 30)
    assert (data["previous_overage_unit_balance"], data["new_overage_unit_balance"]) == ("0.0", 20)
    assert data["allocation_details"][0]["usage_quantity"] == 10
    acme.sandbox.move_clock("2026-11-02T00:00:00Z")
    assert acme.billed("a", "credits") == (120, 0)
    invoice = json.loads(acme.ask("GET", "/invoices.json?subscription_id=501&line_items=true").body)["invoices"][0]
    lines = [(line["kind"], line["quantity"]) for line in invoice["line_items"]]
    assert lines == [("baseline", "1.0"), ("prepaid_usage_component", "20.0")]
    assert json.loads(acme.use(90, component="credits").body)["usage"]["overage_quantity"] == 0


@pytest.mark.parametrize(("choice", "overage"), [("overage_first", "0.0"), ("allocation_first", "20.0")])
def test_deduction_from_prepaid_usage(acme: Acme, choice: str, overage: str) -> None:
    """A deduction reduces the overage that is charged, or gives back to the allocation; the usage left is the same."""
    acme.switch(negative_on_prepaid=choice)
    acme.use(120, component="credits")
    acme.use(-50, component="credits")
    assert acme.billed("a", "credits") == (0, 70)
    acme.sandbox.move_clock("2026-11-02T00:00:00Z")
    invoice = json.loads(acme.ask("GET", "/invoices.json?subscription_id=501&line_items=true").body)["invoices"][0]
    charged = [line["quantity"] for line in invoice["line_items"] if line["kind"] == "prepaid_usage_component"]
    assert (charged or ["0.0"]) == [overage]
    acme.use(-500, component="credits")
    assert acme.balance("credits") == 0


def test_prepaid_usage_without_an_allocation_is_all_overage(acme: Acme) -> None:
    """A subscription that bought nothing has every unit as overage, and gives every one back."""
    acme.sandbox.move_clock("2026-11-02T00:00:00Z")
    assert json.loads(acme.use(7, "t", "credits").body)["usage"]["overage_quantity"] == 7
    acme.use(-2, "t", "credits")
    assert acme.billed("t", "credits") == (0, 5)


@pytest.mark.parametrize(("choice", "status"), [("empty", 200), ("404", 404), ("422", 422)])
def test_usage_list_of_an_events_component(acme: Acme, choice: str, status: int) -> None:
    """The usages of an events-based component are an empty list, unknown, or refused; others are listed as ever."""
    acme.switch(usage_list_of_events_component=choice)
    assert acme.ask("GET", "/subscriptions/a/components/handle:units/usages.json").status == status
    assert acme.ask("GET", "/subscriptions/a/components/handle:calls/usages.json").status == 200


@pytest.mark.parametrize(
    ("switches", "body", "status"),
    [
        ({}, [], 201),
        ({"empty_bulk": "422"}, [], 422),
        ({}, {"events": []}, 422),
        ({"bulk_without_array": "400"}, {"events": []}, 400),
    ],
)
def test_bulk_without_events(events: Events, switches: dict[str, str], body: object, status: int) -> None:
    """A bulk request with nothing in it, or with no array, is answered by choice and bills nothing."""
    events.switch(**switches)
    assert events.ask("POST", "/events/events/bulk.json", body).status == status
    assert events.sandbox.billed(events.site) == []


@pytest.mark.parametrize(("choice", "status"), [("1_mb", 201), ("64_kb", 413), ("none", 201)])
def test_size_of_an_events_request(events: Events, choice: str, status: int) -> None:
    """A body over the limit is refused before anything is stored."""
    events.switch(events_size_limit=choice)
    assert events.send([events.event(1, note="n" * 1000) for _ in range(100)]) == status
    assert events.billed("a", "units") == (0, 100 if status == 201 else 0)


def test_rate_of_the_events_host(events: Events) -> None:
    """Requests beyond the rate are turned away until the next second, and store nothing."""
    events.switch(events_rate_limit="2")
    assert [events.send(events.event(1)) for _ in range(3)] == [201, 201, 429]
    events.sandbox.move_clock(advance_seconds=1)
    assert events.send(events.event(1)) == 201
    assert events.billed("a", "units") == (0, 3)


@pytest.mark.parametrize(("choice", "statuses"), [("shared", [201, 404]), ("separate", [404, 201])])
def test_events_host_of_the_eu(choice: str, statuses: list[int]) -> None:
    """Events of a site in the EU go to the common host or to one of their own; the other one knows nothing of it."""
    with DirectSandbox([maxio("eu", "euro")]) as sandbox:
        sandbox.switch("maxio:eu:euro", eu_events_host=choice)
        hosts = [
            Events(sandbox, "maxio:eu:euro", f"{root}/euro", "key:x")
            for root in (sandbox.events_url, sandbox.eu_events_url)
        ]
        assert [host.send(host.event(4)) for host in hosts] == statuses
        assert hosts[0].billed("a", "units") == (0, 4)


def test_a_site_in_the_us_has_the_common_host_only(sandbox: DirectSandbox) -> None:
    """The host of the EU knows no site of another region."""
    assert sandbox.request("POST", f"{sandbox.eu_events_url}/acme/events/events.json", {}, b"{}").status == 404


# --- Maxio: the site's own events ------------------------------------------------------------------------------------


def test_site_events_prove_what_a_deduction_absorbed(acme: Acme) -> None:
    """At the floor the balances of the event tell what was taken, whatever the usage record says."""
    for choice, recorded in (("as_sent", -8), ("clipped", -5)):
        acme.switch(negative_at_floor=choice)
        acme.use(5)
        acme.use(-8, memo=choice)
        row = acme.activity()[-1]
        data = row["event_specific_data"]
        assert (data["previous_unit_balance"], data["new_unit_balance"]) == ("5.0", 0)
        assert (data["usage_quantity"], data["memo"]) == (recorded, choice)
        assert (data["component_id"], data["component_handle"], row["key"]) == (11, "calls", "metered_usage")


def test_site_events_are_filtered_as_documented(acme: Acme) -> None:
    """Key, ids (inclusive), subscription, direction and pages narrow the list; the count follows."""
    acme.use(1)
    acme.use(2, component="credits")
    acme.use(3, "t")
    first, second, third = (row["id"] for row in acme.activity())
    newest = json.loads(acme.ask("GET", "/events.json").body)
    assert [row["event"]["id"] for row in newest] == [third, second, first]

    def ids(query: str) -> list[int]:
        return [row["id"] for row in acme.activity(query)]

    assert ids("&filter=metered_usage") == [first, third]
    assert ids("&filter=metered_usage,prepaid_usage") == [first, second, third]
    assert ids("&filter[]=prepaid_usage") == [second]
    assert ids("&filter=renewal_success") == []
    assert ids(f"&since_id={second}") == [second, third]
    assert ids(f"&since_id={second}&max_id={second}") == [second]
    assert ids("&per_page=2&page=2") == [third]
    of_one = json.loads(acme.ask("GET", f"/subscriptions/501/events.json?since_id={first}&filter=metered_usage").body)
    assert [row["event"]["id"] for row in of_one] == [first]
    assert json.loads(acme.ask("GET", "/events/count.json?filter=metered_usage").body) == {"count": 2}
    assert acme.ask("GET", "/subscriptions/999/events.json").status == 404


def test_site_events_have_bounds_in_time(acme: Acme) -> None:
    """Dates are days of the site's zone, both included; exact times are compared to the second that is shown."""
    acme.sandbox.move_clock("2026-10-20T23:59:59.500000-04:00")
    acme.use(1)
    acme.sandbox.move_clock("2026-10-21T00:00:00-04:00")
    acme.use(2)

    def used(query: str) -> list[int]:
        return [row["event_specific_data"]["usage_quantity"] for row in acme.activity(f"&date_field=created_at{query}")]

    assert used("&start_date=2026-10-21") == [2]
    assert used("&end_date=2026-10-20") == [1]
    assert used("&start_date=2026-10-20&end_date=2026-10-21") == [1, 2]
    assert used("&end_datetime=2026-10-20T23:59:59") == [1]
    assert used("&start_datetime=2026-10-21T04:00:00Z") == [2]
    of_one = json.loads(acme.ask("GET", "/subscriptions/501/events.json?start_date=2026-10-21").body)
    assert len(of_one) == 2
    assert acme.ask("GET", "/events.json?start_date=soon").status == 422


# --- ChargeOver: every choice ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "value", "status", "billed"),
    [
        ({}, "0.123456789", 201, "0.123456789"),
        ({"precise_usage": "round"}, "0.123456789", 201, "0.1235"),
        ({"precise_usage": "refuse"}, "0.123456789", 400, "0"),
        ({"precise_usage": "refuse"}, "0.1234", 201, "0.1234"),
        ({}, 0, 201, "0"),
        ({"zero_usage": "refuse"}, 0, 400, "0"),
        ({"negative_usage": "refuse"}, -1, 400, "0"),
    ],
)
def test_value_of_a_usage(telco: Telco, switches: dict[str, str], value: object, status: int, billed: str) -> None:
    """Very precise values, zero and negative ones are kept, changed or refused."""
    telco.switch(**switches)
    assert telco.use(value).status == status
    assert telco.total() == Decimal(billed)


@pytest.mark.parametrize(
    ("choice", "dotted", "nested"), [("both", 201, 201), ("dotted", 201, 400), ("nested", 400, 201)]
)
def test_keys_in_an_upload(telco: Telco, choice: str, dotted: int, nested: int) -> None:
    """An upload names its line by keys that are dotted, nested, or either."""
    telco.switch(bulk_keys=choice)
    flat = {"customer.external_key": "c1", "line_item.item_external_key": "voip", "usage_value": 2}
    deep = {"customer": {"external_key": "c1"}, "line_item": {"item_external_key": "voip"}, "usage_value": 3}
    assert telco.ask("POST", "/usage/_action/bulk", [flat]).status == dotted
    assert telco.ask("POST", "/usage/_action/bulk", [deep]).status == nested
    assert telco.total() == 2 * (dotted == 201) + 3 * (nested == 201)


def test_reply_to_an_upload(telco: Telco) -> None:
    """An upload answers with its last record's id, or with nothing to hold on to."""
    upload = [{"line_item_id": 854, "usage_value": 1}]
    assert json.loads(telco.ask("POST", "/usage/_action/bulk", upload).body)["response"] == {"id": 1234}
    telco.switch(bulk_reply="result_true")
    assert json.loads(telco.ask("POST", "/usage/_action/bulk", upload).body)["response"] == {"result": True}
    assert telco.total() == 2


@pytest.mark.parametrize(
    ("choice", "shown"),
    [
        ("now", ("2026-10-20 08:00:00", "2026-10-20 08:00:00")),
        ("today", ("2026-10-20 00:00:00", "2026-10-20 23:59:59")),
        ("refuse", None),
    ],
)
def test_missing_times(telco: Telco, choice: str, shown: tuple[str, str] | None) -> None:
    """Usage without times is of now, of the account's day, or refused."""
    telco.switch(missing_times=choice)
    assert telco.use(4, **{"from": None, "to": ""}).status == (201 if shown else 400)
    rows = json.loads(telco.ask("GET", "/usage").body)["response"]
    assert [(row["from"], row["to"]) for row in rows] == ([shown] if shown else [])
    assert telco.total() == (4 if shown else 0)


@pytest.mark.parametrize(("choice", "billed"), [("honoured", (0, 4)), ("ignored", (4, 0))])
def test_offset_in_times(telco: Telco, choice: str, billed: tuple[int, int]) -> None:
    """An offset that is overlooked can put usage into another cycle."""
    telco.switch(offset_in_times=choice)
    telco.use(4, **{"from": "2026-10-31T23:00:00-10:00", "to": "2026-10-31T23:30:00-10:00"})
    telco.sandbox.move_clock("2026-11-02T00:00:00Z")
    assert telco.billed("p1", "voip") == billed


@pytest.mark.parametrize(
    ("choice", "status", "billed", "records"),
    [
        ("refuse", 400, 0, 0),
        ("as_add", 201, 5, 1),
        ("never_billed", 201, 0, 1),
    ],
)
def test_types_that_nothing_explains(telco: Telco, choice: str, status: int, billed: int, records: int) -> None:
    """`pia`, `pas` and `dlt` are refused, added up, or stored for nothing; other words are never taken."""
    telco.switch(undefined_types=choice)
    assert telco.use(5, type="dlt").status == status
    assert telco.use(5, type="del").status == 400
    assert telco.total() == billed
    assert len(telco.sandbox.records(telco.site)) == records


def test_options_of_a_usage(telco: Telco) -> None:
    """Options are overlooked, or make a usage a bad one."""
    assert telco.use(1, options=["o"]).status == 201
    telco.switch(usage_options="refuse")
    assert telco.use(1, options=["o"]).status == 400
    assert telco.total() == 1


def test_usage_may_be_editable(telco: Telco) -> None:
    """By default a record can neither be changed nor deleted; where it can, the bill follows."""
    number = json.loads(telco.use(5).body)["response"]["id"]
    refused = telco.ask("PUT", f"/usage/{number}", {"usage_value": 8})
    assert (refused.status, json.loads(refused.body)["message"]) == (
        400,
        f"The command requested is not supported: modify(usage, {number})",
    )
    assert telco.ask("DELETE", f"/usage/{number}").status == 400
    telco.switch(usage_edit="accept")
    assert telco.ask("PUT", f"/usage/{number}", {"usage_value": 8}).status == 202
    assert telco.total() == 8
    assert telco.ask("DELETE", f"/usage/{number}").status == 200
    assert telco.ask("DELETE", f"/usage/{number}").status == 404
    assert telco.total() == 0


@pytest.mark.parametrize(
    ("body", "retry", "expected"),
    [
        ("envelope", "absent", ("Rate limit exceeded.", None)),
        ("text", "present", ("Too Many Requests\n", "1")),
        ("empty", "absent", ("", None)),
    ],
)
def test_throttling_of_the_account(telco: Telco, body: str, retry: str, expected: tuple[str, str | None]) -> None:
    """Beyond the rate a request is turned away, in one of several forms, and stores nothing."""
    telco.switch(rate_limit="2", throttle_body=body, throttle_retry_after=retry)
    assert [telco.use(1).status for _ in range(2)] == [201, 201]
    reply = telco.use(1)
    told = json.loads(reply.body)["message"] if body == "envelope" else reply.body.decode()
    assert (reply.status, told, reply.headers.get("retry-after")) == (429, *expected)
    assert telco.total() == 2


def test_texts_and_details_of_errors(telco: Telco) -> None:
    """Errors that no document quotes may say something general, and the details may be null or missing."""
    telco.use(1, external_key="k")
    assert "already exists" in json.loads(telco.use(1, external_key="k").body)["message"]
    telco.switch(error_texts="generic", details="null")
    general = json.loads(telco.use(1, external_key="k").body)
    assert (general["message"], general["details"]) == ("Missing or invalid parameter.", None)
    telco.switch(details="absent")
    reply = telco.use(1)
    assert (reply.status, reply.headers["location"][-5:]) == (201, "/1235")
    assert "details" not in json.loads(reply.body)
    assert telco.total() == 2


@pytest.mark.parametrize(
    ("switches", "keys", "billed"),
    [
        ({}, ["k" * 255, "k" * 256, "ü:,", "K", "k"], 4),
        ({"external_key_length": "64"}, ["k" * 64, "k" * 65], 1),
        ({"external_key_length": "none"}, ["k" * 300], 1),
        # Two keys that differ behind the limit become one.
        ({"external_key_length": "64", "long_external_key": "truncate"}, ["k" * 64 + "a", "k" * 64 + "b"], 1),
        ({"external_key_characters": "word"}, ["a.b-c_9", "a:b", "ü"], 1),
        ({"external_key_case": "insensitive"}, ["K", "k"], 1),
    ],
)
def test_external_keys(telco: Telco, switches: dict[str, str], keys: list[str], billed: int) -> None:
    """Length, characters and case of external keys are as the account has it."""
    telco.switch(**switches)
    for key in keys:
        telco.use(1, external_key=key)
    assert telco.total() == billed


def test_a_subscription_takes_another_reference_and_another_one_its_old_one(acme: Acme) -> None:
    """From then on the name leads elsewhere; what was used stays with the subscription. No two bear one name."""

    def rename(number: int, reference: str) -> int:
        return acme.ask("PUT", f"/subscriptions/{number}.json", {"subscription": {"reference": reference}}).status

    acme.use(5, "a")
    assert rename(502, "a") == 422
    assert rename(501, "old") == 200
    assert rename(502, "a") == 200
    assert acme.ask("PUT", "/subscriptions/501.json", {"subscription": {"state": "canceled"}}).status == 422
    acme.use(7, "a")
    found = {row.subscription: (row.reference, row.stored) for row in acme.sandbox.billed(acme.site)}
    assert found == {"501": ("old", 5), "502": ("a", 7)}
