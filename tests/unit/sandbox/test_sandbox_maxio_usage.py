"""Usages on Maxio's main API: creating, listing, refusing, and the duplicate token."""

import json
from pathlib import Path
from typing import Any

import pytest
import requests

from usage_billing.sandbox import Sandbox

WORLDS = Path(__file__).parents[3] / "include" / "sandbox" / "worlds"


def test_usage_is_created_with_200(acme: Any) -> None:
    """A usage answers 200 with the documented fields, the default price point and the site's offset."""
    reply = acme.use(1000, memo="October")
    assert reply.status_code == 200
    usage = reply.json()["usage"]
    assert usage.pop("id") > 1_000_000
    assert usage == {
        "memo": "October",
        "created_at": "2026-10-20T08:00:00-04:00",
        "price_point_id": 71001,
        "quantity": 1000,
        "component_id": 61001,
        "component_handle": "api-calls",
        "subscription_id": 50100001,
    }


@pytest.mark.parametrize("component", ["61001", "handle:api-calls", "handle%3Aapi-calls"])
@pytest.mark.parametrize("subscription", ["50100001", "acct-0001"])
def test_every_documented_address_bills_the_same_line(acme: Any, subscription: str, component: str) -> None:
    """Id or bare reference, component id or handle with the colon encoded or not: all are one line."""
    assert acme.use(7, subscription, component).status_code == 200
    assert acme.balance() == 7


def test_memo_is_null_when_absent(acme: Any) -> None:
    """A usage without memo says null."""
    assert acme.use(1).json()["usage"]["memo"] is None


def test_named_price_point_is_kept(acme: Any) -> None:
    """A price point may be named by number or text; one of another component is refused with the documented words."""
    assert acme.use(1, price_point_id="71002").json()["usage"]["price_point_id"] == 71002
    assert acme.use(1, price_point_id=71002).json()["usage"]["price_point_id"] == 71002
    refused = acme.use(1, price_point_id=71003)
    assert (refused.status_code, refused.json()) == (422, {"errors": ["Price point: could not be found."]})


def test_omitted_price_point_by_switch(bench: Any, acme: Any) -> None:
    """Documents disagree whether an omitted price point means the default or the one locked in by first use."""
    acme.use(1, price_point_id="71002")
    assert acme.use(1).json()["usage"]["price_point_id"] == 71001
    acme.use(1, price_point_id="71002")
    bench.switch(acme.site, omitted_price_point="locked_in")
    assert acme.use(1).json()["usage"]["price_point_id"] == 71002


def test_custom_price_and_schedule_are_kept(bench: Any, acme: Any) -> None:
    """Fields that the sandbox does not act on are accepted and kept with the record."""
    price = {"pricing_scheme": "per_unit", "prices": [{"starting_quantity": 1, "unit_price": "0.5"}]}
    acme.use(3, custom_price=price, billing_schedule={"initial_billing_at": "2026-10-25"})
    extra = bench.records(acme.site, "api-calls")[0]["extra"]
    assert extra == {"custom_price": price, "billing_schedule": {"initial_billing_at": "2026-10-25"}}


def test_wrong_credentials_are_401_in_plain_text(acme: Any) -> None:
    """A wrong key or password answers with the recorded text, and is found before anything else."""
    for auth in (None, ("sandbox-acme-key", "y"), ("other", "x")):
        acme.session.auth = auth
        reply = acme.post("subscriptions/nobody/components/1/usages.json", {})
        assert (reply.status_code, reply.text) == (401, "HTTP Basic: Access denied.\n")
        assert reply.headers["content-type"].startswith("text/plain")


def test_capital_x_is_a_password_too(acme: Any) -> None:
    """The password is a literal x, in either case."""
    acme.session.auth = ("sandbox-acme-key", "X")
    assert acme.get("site.json").status_code == 200


@pytest.mark.parametrize(
    ("subscription", "component"),
    [("acct-9999", "61001"), ("1", "61001"), ("acct-0001", "1"), ("acct-0001", "handle:no")],
)
def test_unknown_parts_are_404_before_the_body_is_read(acme: Any, subscription: str, component: str) -> None:
    """Look-up comes before validation, so an invalid body still answers 404."""
    assert acme.post(acme.path(subscription, component), {"nonsense": True}).status_code == 404


def test_not_found_body_by_switch(bench: Any, acme: Any) -> None:
    """The body of a 404 is unsettled: JSON, empty or HTML."""
    assert acme.get("subscriptions/1.json").json() == {"errors": ["Not found"]}
    bench.switch(acme.site, not_found_body="empty")
    assert acme.get("subscriptions/1.json").content == b""
    bench.switch(acme.site, not_found_body="html")
    assert "<html>" in acme.get("subscriptions/1.json").text


def test_wrong_kind_and_archived_are_refused_in_words(acme: Any) -> None:
    """Quantity-based components take no usage, archived ones neither; the words are the recorded ones."""
    assert acme.use(1, component="handle:seats").json() == {
        "errors": ["Usages can only be added to metered or prepaid usage components."]
    }
    refused = acme.use(1, component="handle:legacy-calls")
    assert (refused.status_code, refused.json()["errors"]) == (422, ["Usages cannot be added to archived components."])


@pytest.mark.parametrize("quantity", [0, None, "5", "many", True, [1]])
def test_bad_quantity_by_switch(bench: Any, acme: Any, quantity: Any) -> None:
    """A quantity that is no number, or zero, is refused, or taken for 0."""
    refused = acme.use(quantity)
    assert refused.status_code == 422
    assert refused.json()["errors"]
    bench.switch(acme.site, bad_quantity="zero")
    assert acme.use(quantity).json()["usage"]["quantity"] == 0
    assert bench.figures(acme.site, "acct-0001", "api-calls")[2:] == (0, 1)


def test_missing_usage_object(bench: Any, acme: Any) -> None:
    """A body without `usage` is refused, or a usage of 0; a body that is no JSON is a 400."""
    assert acme.post(acme.path(), {}).status_code == 422
    broken = acme.session.post(f"{acme.base}/{acme.path()}", data=b"{", timeout=10)
    assert broken.status_code == 400
    bench.switch(acme.site, bad_quantity="zero")
    assert acme.post(acme.path(), {}).json()["usage"]["quantity"] == 0


def test_fraction_on_whole_component_by_switch(bench: Any, acme: Any) -> None:
    """A fraction on a whole-number component is cut toward zero, or refused."""
    assert acme.use(5.9).json()["usage"]["quantity"] == 5
    assert acme.use(-1.9).json()["usage"]["quantity"] == -1
    bench.switch(acme.site, fraction_not_allowed="refuse")
    assert acme.use(5.9).status_code == 422
    assert acme.balance() == 4


def test_fractions_are_exact(bench: Any, acme: Any) -> None:
    """Decimal places that a float would lose are billed to the last one."""
    for _ in range(3):
        body = '{"usage": {"quantity": 0.1000000000000000000000000000000001}}'
        path = f"{acme.base}/{acme.path(component='handle:storage-gb')}"
        assert acme.session.post(path, data=body, timeout=10).status_code == 200
    _, still_open, stored, records = bench.figures(acme.site, "acct-0001", "storage-gb")
    assert str(still_open) == str(stored) == "0.3000000000000000000000000000000003"
    assert records == 3


def test_quantity_type_by_switch(bench: Any, acme: Any) -> None:
    """Whole-number components answer with numbers and others with decimal text, or either everywhere."""

    def shown() -> list[Any]:
        rows = [acme.use(20, component=f"handle:{handle}").json()["usage"] for handle in ("api-calls", "storage-gb")]
        listed = acme.get(acme.path(component="handle:storage-gb"), per_page=1).json()[0]["usage"]
        return [row["quantity"] for row in (*rows, listed)]

    assert shown() == [20, "20.0", "20.0"]
    bench.switch(acme.site, quantity_type="int")
    assert shown() == [20, 20, 20]
    assert acme.use(1.5, component="handle:storage-gb").json()["usage"]["quantity"] == "1.5"
    bench.switch(acme.site, quantity_type="string")
    assert shown() == ["20.0", "20.0", "20.0"]


def test_balance_has_a_floor_of_zero(bench: Any, acme: Any) -> None:
    """A deduction beyond the balance leaves 0; the stored record keeps what was sent."""
    acme.use(100)
    assert acme.use(-200).json()["usage"]["quantity"] == -200
    acme.use(30)
    assert bench.figures(acme.site, "acct-0001", "api-calls") == (0, 30, -70, 3)


def test_clipped_deduction_by_switch(bench: Any, acme: Any) -> None:
    """Or the stored record is cut to what the balance could bear."""
    bench.switch(acme.site, negative_at_floor="clipped")
    acme.use(100)
    assert acme.use(-200).json()["usage"]["quantity"] == -100
    assert bench.figures(acme.site, "acct-0001", "api-calls") == (0, 0, 0, 2)


def test_ended_subscription_by_switch(bench: Any, acme: Any) -> None:
    """Usage on a cancelled subscription is refused, or stored and never billed."""
    assert acme.use(5, "acct-0090").status_code == 422
    bench.switch(acme.site, usage_on_ended_subscription="accept")
    assert acme.use(5, "acct-0090").status_code == 200
    bench.move_clock("2026-12-05T00:00:00Z")
    assert bench.figures(acme.site, "acct-0090", "api-calls") == (0, 0, 5, 1)


def test_memo_limit_by_switch(bench: Any, acme: Any) -> None:
    """No limit of the memo is published; the switch sets one."""
    assert acme.use(1, memo="m" * 300).json()["usage"]["memo"] == "m" * 300
    bench.switch(acme.site, memo_limit=255)
    assert acme.use(1, memo="m" * 256).status_code == 422
    assert acme.use(1, memo="m" * 255).status_code == 200


def _with_token(acme: Any, token: str, quantity: Any = 1, **query: str) -> int:
    body = {"usage": {"quantity": quantity}} | ({} if query else {"uniqueness_token": token})
    return acme.session.post(f"{acme.base}/{acme.path()}", json=body, params=query, timeout=10).status_code


def test_repeated_token_is_409_for_an_hour(bench: Any, acme: Any) -> None:
    """The token refuses a second request, whatever its body, until 60 minutes have passed on the sandbox clock."""
    assert [_with_token(acme, "t"), _with_token(acme, "t", 9)] == [200, 409]
    bench.move_clock(advance_seconds=3599)
    assert _with_token(acme, "t") == 409
    bench.move_clock(advance_seconds=1)
    assert _with_token(acme, "t") == 200
    assert acme.balance() == 2


def test_token_conflict_has_the_documented_words(acme: Any) -> None:
    """The 409 names the duplicate error and does not replay the first answer."""
    _with_token(acme, "t")
    reply = acme.post(acme.path(), {"usage": {"quantity": 1}, "uniqueness_token": "t"})
    assert reply.json() == {"errors": ["DuplicatePrevention::DuplicateSubmissionError"]}


def test_token_works_in_the_query_and_not_inside_the_resource(acme: Any) -> None:
    """The token counts beside the resource or in the query string; inside the resource it has no effect."""
    assert _with_token(acme, "q", uniqueness_token="q") == 200
    assert _with_token(acme, "q", uniqueness_token="q") == 409
    assert [acme.use(1, uniqueness_token="inner").status_code for _ in range(2)] == [200, 200]


def test_token_and_refusals_by_switch(bench: Any, acme: Any) -> None:
    """A refused request uses its token up, or leaves it."""
    assert [_with_token(acme, "a", "bad"), _with_token(acme, "a", 1)] == [422, 409]
    bench.switch(acme.site, token_spent_by_4xx="no")
    assert [_with_token(acme, "b", "bad"), _with_token(acme, "b", 1), _with_token(acme, "b", 1)] == [422, 200, 409]


def test_token_ignored_by_switch(bench: Any, acme: Any) -> None:
    """Or the usage endpoint knows no token at all."""
    bench.switch(acme.site, uniqueness_token="ignored")
    assert [_with_token(acme, "t"), _with_token(acme, "t")] == [200, 200]


def _ids(reply: Any) -> list[int]:
    assert reply.status_code == 200
    return [row["usage"]["id"] for row in reply.json()]


def test_list_order_by_switch(bench: Any, acme: Any) -> None:
    """The list shows the newest first, or the oldest."""
    made = [acme.use(n).json()["usage"]["id"] for n in (1, 2, 3)]
    assert _ids(acme.get(acme.path())) == made[::-1]
    bench.switch(acme.site, usage_list_order="ascending")
    assert _ids(acme.get(acme.path())) == made


def test_id_bounds_are_inclusive(acme: Any) -> None:
    """`since_id` and `max_id` include the row that they name."""
    made = [acme.use(n).json()["usage"]["id"] for n in (1, 2, 3, 4)]
    assert _ids(acme.get(acme.path(), since_id=made[1], max_id=made[2])) == [made[2], made[1]]


def test_paging_walks_everything_once(acme: Any) -> None:
    """Pages of 20 by default; the page after the last is empty; a page below 1 is refused."""
    made = [acme.use(1).json()["usage"]["id"] for _ in range(23)]
    assert len(_ids(acme.get(acme.path()))) == 20
    walked = [number for page in (1, 2, 3, 4) for number in _ids(acme.get(acme.path(), page=page, per_page=7))]
    assert walked == made[::-1]
    assert _ids(acme.get(acme.path(), page=9)) == []
    refused = acme.get(acme.path(), page=0)
    assert (refused.status_code, refused.json()) == (422, {"errors": ["invalid page: 0"]})


def test_page_size_is_lowered_silently(acme: Any) -> None:
    """Asking for more than 200 rows gives 200."""
    for _ in range(205):
        acme.use(1)
    assert len(_ids(acme.get(acme.path(), per_page=500))) == 200


def test_dates_are_midnights_of_the_site_zone(bench: Any, acme: Any) -> None:
    """Both date bounds are local midnights and include that instant; the day of `until_date` itself is outside."""
    evening = acme.use(1).json()["usage"]["id"]
    bench.move_clock("2026-10-21T04:00:00Z")
    at_midnight = acme.use(1).json()["usage"]["id"]
    bench.move_clock("2026-10-21T04:00:01Z")
    after = acme.use(1).json()["usage"]["id"]
    assert _ids(acme.get(acme.path(), since_date="2026-10-21")) == [after, at_midnight]
    assert _ids(acme.get(acme.path(), since_date="2026-10-20", until_date="2026-10-21")) == [at_midnight, evening]
    assert acme.get(acme.path(), since_date="soon").status_code == 422


def test_list_is_per_component_and_subscription(acme: Any) -> None:
    """A list shows its own line only."""
    acme.use(1)
    acme.use(1, "acct-0002")
    assert len(_ids(acme.get(acme.path()))) == 1
    assert _ids(acme.get(acme.path(component="handle:storage-gb"))) == []


@pytest.mark.parametrize("blocked", ["account_canceled", "trial_ended", "data_clearing", "site_deleted"])
def test_blocked_site_refuses_everything(bench: Any, acme: Any, blocked: str) -> None:
    """A blocked site answers every request with one of the documented 422s, however good the data."""
    bench.switch(acme.site, access=blocked)
    replies = [acme.use(1), acme.get("site.json")]
    assert [reply.status_code for reply in replies] == [422, 422]
    assert replies[0].json() == replies[1].json()


def test_unicode_memo_comes_back_unchanged(acme: Any) -> None:
    """Text is returned as it was sent."""
    memo = 'größe \\u0000 "☂"'
    assert json.loads(acme.use(1, memo=memo).text)["usage"]["memo"] == memo


def test_digits_mean_the_id_before_the_reference(tmp_path: Path) -> None:
    """An all-digit reference that is another subscription's id bills that other one: the documented hazard."""
    text = (WORLDS / "acme.yaml").read_text(encoding="utf-8")
    world = tmp_path / "acme.yaml"
    world.write_text(text.replace("reference: acct-0090", 'reference: "50100001"'), encoding="utf-8")
    with Sandbox([world]) as sandbox:
        url = f"{sandbox.maxio_url('acme')}/subscriptions/50100001/components/61001/usages.json"
        reply = requests.post(url, json={"usage": {"quantity": 5}}, auth=("sandbox-acme-key", "x"), timeout=10)
        assert reply.json()["usage"]["subscription_id"] == 50100001
        assert sandbox.billed("maxio:us:acme")[0].reference == "acct-0001"
