"""ChargeOver: packages, customers, items, usage single and bulk, batches, upgrades."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from usage_billing.sandbox import Sandbox
from usage_billing.sandbox.chargeover.views import Views
from usage_billing.sandbox.switches import SwitchBoard
from usage_billing.sandbox.world import ChargeOverWorld

SITE = "chargeover:telco"
WORLDS = Path(__file__).parents[3] / "include" / "sandbox" / "worlds"


def _voip(bench: Any, package: str = "pkg-001") -> tuple[Decimal, Decimal, Decimal, int]:
    return bench.figures(SITE, package, "voip")


def test_usage_is_created_with_201_and_a_location(telco: Any, bench: Any) -> None:
    """A usage answers 201, the envelope with its id, and the absolute URL of the record."""
    reply = telco.use(22.25, external_key="k1", custom_1="note")
    body = reply.json()
    number = body["response"]["id"]
    assert (reply.status_code, body) == (
        201,
        {"code": 201, "status": "OK", "message": "", "details": {}, "response": {"id": number}},
    )
    assert reply.headers["location"] == f"{telco.base}/usage/{number}"
    stored = telco.get(f"usage/{number}").json()["response"]
    assert (stored["usage_value"], stored["external_key"], stored["custom_1"]) == (22.25, "k1", "note")
    assert (stored["from"], stored["to"]) == ("2026-10-15 00:00:00", "2026-10-15 23:59:59")
    assert _voip(bench) == (0, Decimal("22.25"), Decimal("22.25"), 1)


def test_wrong_keys_are_401_in_an_envelope(telco: Any) -> None:
    """Bad credentials answer with the documented text and `false`."""
    telco.session.auth = ("a", "b")
    reply = telco.get("package/713")
    assert reply.status_code == 401
    assert reply.json()["message"] == "Invalid or incorrect authorization [Missing (basic) authorization header.]"
    assert reply.json()["response"] is False


def test_what_is_not_supported_is_400(telco: Any) -> None:
    """Unknown objects and verbs are 400 with the recorded texts, never 404 or 405."""
    assert telco.get("customers").json()["message"] == "The object type requested is not supported: list(customers, )"
    for verb, word in (("PUT", "modify"), ("DELETE", "delete")):
        reply = telco.session.request(verb, f"{telco.base}/usage/5", json={"usage_value": 1}, timeout=10)
        assert (reply.status_code, reply.json()["message"]) == (
            400,
            f"The command requested is not supported: {word}(usage, 5)",
        )


@pytest.mark.parametrize(
    "path", ["package/1", "customer/1", "item/1", "invoice/1", "usage/1", "package/external_key:none"]
)
def test_unknown_objects_are_404(telco: Any, path: str) -> None:
    """A get by id or key of nothing is 404 with `null`."""
    reply = telco.get(path)
    assert (reply.status_code, reply.json()["response"]) == (404, None)
    assert reply.json()["message"] == f"This {path.split('/', maxsplit=1)[0]} does not exist."


def test_package_has_lines_only_where_documented(telco: Any) -> None:
    """A get shows line items; a query shows them only with `expand`."""
    whole = telco.get("package/719").json()["response"]
    assert telco.get("package/external_key:pkg-007").json()["response"] == whole
    assert [(line["line_item_id"], line["item_external_key"]) for line in whole["line_items"]] == [
        (860, "voip"),
        (862, "sms"),
    ]
    assert (whole["package_status_state"], whole["next_invoice_datetime"]) == ("a", "2026-11-01 00:00:00")
    tierset = whole["line_items"][0]["tierset"]
    assert (tierset["base"], tierset["pricemodel"], tierset["tiers"][0]["amount"]) == (10, "uni", 0.05)
    listed = telco.get("package", where="external_key:EQUALS:pkg-007").json()["response"]
    assert "line_items" not in listed[0]
    expanded = telco.get("package", where="external_key:EQUALS:pkg-007", expand="line_items").json()["response"]
    assert expanded == [whole]


def test_customers_and_items(telco: Any) -> None:
    """Customers and items are read by id or key; only a single item tells whether it is metered."""
    customer = telco.get("customer/external_key:cust-003").json()["response"]
    assert (customer["customer_id"], customer["company"]) == (12, "Customer 3")
    assert telco.get("customer", where="external_key:EQUALS:cust-003").json()["response"] == [customer]
    assert telco.get("customer/_count").json()["response"] == 8
    assert telco.get("item/13").json()["response"]["service_data"]["is_usage"] is True
    listed = telco.get("item", where="external_key:EQUALS:support").json()["response"]
    assert listed[0]["item_id"] == 15
    assert "service_data" not in listed[0]


def test_empty_and_broken_bodies(telco: Any) -> None:
    """An empty object is the recorded 400; a body that is no JSON is one too."""
    reply = telco.post("usage", {})
    assert (reply.status_code, reply.json()["message"]) == (400, "A required parameter was missing: No data.")
    assert telco.session.post(f"{telco.base}/usage", data=b"{", timeout=10).status_code == 400


@pytest.mark.parametrize(
    "fault",
    [
        {"usage_value": None},
        {"usage_value": "many"},
        {"usage_value": True},
        {"line_item_id": None},
        {"type": "dlt"},
        {"from": "soon"},
        {"from": "2026-10-16", "to": "2026-10-15"},
    ],
)
def test_bad_records_are_refused(telco: Any, bench: Any, fault: dict[str, Any]) -> None:
    """A record without value or line, of an undefined type or with impossible times is a 400 and is not stored."""
    reply = telco.use(1, **fault)
    assert reply.status_code == 400
    assert reply.json()["response"] is False
    assert _voip(bench)[3] == 0


def test_numbers_may_come_as_text(telco: Any, bench: Any) -> None:
    """The documents call ids and values strings; both forms are taken, to the last digit."""
    telco.use("0.1000000000000000000001", line="854")
    assert _voip(bench)[1] == Decimal("0.1000000000000000000001")


def test_repeated_usage_is_billed_twice(telco: Any, bench: Any) -> None:
    """Without a key nothing tells a retry from new usage."""
    telco.use(5)
    telco.use(5)
    assert _voip(bench)[1] == 10


def test_duplicate_key_by_switch(telco: Any, bench: Any) -> None:
    """A second record with one key is refused, stored as well, or takes the first one's place."""
    first = telco.use(5, external_key="k").json()["response"]["id"]
    assert telco.use(6, external_key="k").status_code == 400
    assert _voip(bench)[1] == 5
    bench.switch(SITE, duplicate_external_key="overwrite")
    assert telco.use(7, external_key="k").json()["response"]["id"] == first
    assert _voip(bench) == (0, 7, 7, 1)
    bench.switch(SITE, duplicate_external_key="accept")
    assert telco.use(8, external_key="k").json()["response"]["id"] != first
    assert _voip(bench) == (0, 15, 15, 2)


def test_negative_usage_by_switch(telco: Any, bench: Any) -> None:
    """A negative record lowers what is billed, or is refused."""
    telco.use(5)
    assert telco.use(-2).status_code == 201
    assert _voip(bench)[1] == 3
    bench.switch(SITE, negative_usage="refuse")
    assert telco.use(-2).status_code == 400


@pytest.mark.parametrize("line", [99999, 0])
def test_unknown_line_by_switch(telco: Any, bench: Any, line: int) -> None:
    """Usage of a line that does not exist is refused, or taken and billed to nobody."""
    assert telco.use(5, line=line).status_code == 400
    bench.switch(SITE, usage_on_bad_line="accept")
    assert telco.use(5, line=line).status_code == 201
    row = bench.billed(SITE)[0]
    assert (row.subscription, row.reference, row.billed, row.stored) == ("", f"line {line}", 0, 5)


def test_cancelled_package_by_switch(telco: Any, bench: Any) -> None:
    """A cancelled package shows the recorded form, and its usage is refused or never billed."""
    assert telco.post("package/713/_action/cancel").json()["response"] is True
    shown = telco.get("package/713").json()["response"]
    assert (shown["package_status_state"], shown["next_invoice_datetime"]) == ("c", "")
    assert telco.use(5).status_code == 400
    bench.switch(SITE, usage_on_bad_line="accept")
    assert telco.use(5).status_code == 201
    assert _voip(bench) == (0, 0, 5, 1)


def test_times_default_to_now_and_honour_offsets(telco: Any) -> None:
    """Missing times mean now; an offset is converted to the account's zone; a bare date is its midnight."""
    numbers = [
        telco.post("usage", {"line_item_id": 854, "usage_value": 1, **times}).json()["response"]["id"]
        for times in ({}, {"from": "2026-10-15T00:00:00+00:00", "to": "2026-10-16"})
    ]
    now, given = (telco.get(f"usage/{number}").json()["response"] for number in numbers)
    assert now["from"] == now["to"] == "2026-10-20 07:00:00"
    assert (given["from"], given["to"]) == ("2026-10-14 19:00:00", "2026-10-16 00:00:00")


def test_times_out_by_switch(telco: Any, bench: Any) -> None:
    """Times in replies are naive, or ISO with the account's offset."""
    telco.use(1, external_key="k")
    bench.switch(SITE, times_out="iso")
    assert telco.get("usage/external_key:k").json()["response"]["from"] == "2026-10-15T00:00:00-05:00"
    assert telco.get("package/713").json()["response"]["next_invoice_datetime"] == "2026-11-01T00:00:00-05:00"


def test_read_delay_by_switch(telco: Any, bench: Any) -> None:
    """A stored record may be invisible to queries for a while, and is billed all the same."""
    bench.switch(SITE, usage_read_delay_seconds=20)
    telco.use(1, external_key="k")
    assert telco.get("usage", where="external_key:EQUALS:k").json()["response"] == []
    assert _voip(bench)[1] == 1
    bench.move_clock(advance_seconds=20)
    assert len(telco.get("usage", where="external_key:EQUALS:k").json()["response"]) == 1


def _bulk(*values: Any) -> list[dict[str, Any]]:
    return [
        {"line_item_id": 854, "usage_value": value, "from": "2026-10-15", "to": "2026-10-15", "external_key": f"b{n}"}
        for n, value in enumerate(values)
    ]


def test_bulk_stores_all_and_names_the_last(telco: Any, bench: Any) -> None:
    """A bulk upload answers 201 with one id, the last, and has no result for each record."""
    reply = telco.post("usage/_action/bulk", _bulk(1, 2, 3))
    last = telco.get("usage/external_key:b2").json()["response"]["usage_history_id"]
    assert (reply.status_code, reply.json()["response"]) == (201, {"id": last})
    assert _voip(bench) == (0, 6, 6, 3)


@pytest.mark.parametrize(
    ("atomicity", "status", "records"),
    [("atomic", 400, 0), ("stop_at_first_error", 400, 2), ("skip_bad_silently", 201, 3)],
)
def test_bulk_with_a_bad_record_by_switch(telco: Any, bench: Any, atomicity: str, status: int, records: int) -> None:
    """One bad record undoes all, ends the upload where it stands, or is left out without a word."""
    bench.switch(SITE, bulk_atomicity=atomicity)
    assert telco.post("usage/_action/bulk", _bulk(1, 2, "bad", 4)).status_code == status
    assert _voip(bench)[3] == records


def test_bulk_takes_a_thousand_records(telco: Any, bench: Any) -> None:
    """1,000 records are taken, 1,001 and anything that is no array are refused."""
    assert telco.post("usage/_action/bulk", _bulk(*[1] * 1001)).status_code == 400
    assert telco.post("usage/_action/bulk", {"line_item_id": 854, "usage_value": 1}).status_code == 400
    assert telco.post("usage/_action/bulk", _bulk(*[1] * 1000)).status_code == 201
    assert _voip(bench)[1] == 1000


def test_bulk_addresses_lines_by_keys(telco: Any, bench: Any) -> None:
    """In bulk a line may be named by customer and item keys, dotted or nested; single usage may not."""
    dotted = {"customer.external_key": "cust-007", "line_item.item_external_key": "sms", "usage_value": 2}
    nested = {"customer": {"external_key": "cust-007"}, "line_item": {"item_external_key": "sms"}, "usage_value": 3}
    assert telco.post("usage/_action/bulk", [dotted, nested]).status_code == 201
    assert bench.figures(SITE, "pkg-007", "sms")[1] == 5
    assert telco.post("usage", dotted).status_code == 400
    unknown = {**dotted, "customer.external_key": "nobody"}
    assert telco.post("usage/_action/bulk", [unknown]).status_code == 400


def test_a_batch_with_a_bad_record_by_switch(telco: Any, bench: Any) -> None:
    """Where a batch is one transaction, one bad record undoes all, and its words are the reply to the whole."""
    bench.switch(SITE, batch_atomicity="atomic")
    sound, bad = ({"request_method": "POST", "uri": "/api/v3/usage", "payload": one} for one in _bulk(1, "bad"))
    reply = telco.post("_bulk", [sound, bad])
    assert (reply.status_code, reply.json()["response"]) == (400, False)
    assert _voip(bench)[3] == 0
    assert telco.post("_bulk", [sound]).status_code == 200
    assert _voip(bench)[3] == 1


def test_batch_gives_each_part_its_result(telco: Any, bench: Any) -> None:
    """`_bulk` carries out up to 25 requests in order, each with an envelope of its own."""
    parts = [
        {"request_method": "POST", "uri": "/api/v3/usage", "payload": _bulk(1.5)[0]},
        {"request_method": "POST", "uri": "/api/v3/usage", "payload": {"usage_value": 1}},
        {"request_method": "GET", "uri": "/api/v3/usage?where=external_key:EQUALS:b0", "payload": None},
        {"request_method": "GET", "uri": "/elsewhere"},
    ]
    results = telco.post("_bulk", parts).json()["response"]["_bulk"]
    assert [result["code"] for result in results] == [201, 400, 200, 400]
    assert results[2]["response"][0]["usage_value"] == 1.5
    assert telco.post("_bulk", parts[:1] * 26).status_code == 400
    assert _voip(bench)[3] == 1


UPGRADE = {"line_items": [{"line_item_id": 854, "item_id": 13, "tierset": {"base": 12, "tiers": [{"amount": 0.07}]}}]}


@pytest.mark.parametrize("path", ["package/713/_action/upgrade", "package/713?action=upgrade"])
def test_upgrade_replaces_the_line(telco: Any, bench: Any, path: str) -> None:
    """Even a price change gives the line a new id; the old id vanishes and takes no more usage."""
    telco.use(5)
    assert telco.post(path, UPGRADE).json()["response"] is True
    lines = telco.get("package/713").json()["response"]["line_items"]
    assert len(lines) == 1
    assert lines[0]["line_item_id"] != 854
    assert (lines[0]["tierset"]["base"], lines[0]["tierset"]["tiers"][0]["amount"]) == (12, 0.07)
    assert telco.use(1).status_code == 400
    assert telco.use(2, line=lines[0]["line_item_id"]).status_code == 201
    assert _voip(bench) == (0, 7, 7, 2)


def test_usage_of_a_replaced_line_by_switch(telco: Any, bench: Any) -> None:
    """What was stored before an upgrade is billed under the old id, or dropped."""
    telco.use(5)
    bench.switch(SITE, usage_of_replaced_line="dropped")
    telco.post("package/713/_action/upgrade", UPGRADE)
    assert _voip(bench) == (0, 0, 5, 1)


def test_upgrade_must_name_a_present_line(telco: Any) -> None:
    """An upgrade of a line that the package does not have is refused, and so is an unknown action."""
    assert telco.post("package/714/_action/upgrade", UPGRADE).status_code == 400
    assert telco.post("package/713/_action/dance").status_code == 400


def test_two_accounts_may_use_the_same_ids(tmp_path: Path) -> None:
    """Ids are an account's own: a second account with equal line ids keeps its usage apart, also over an upgrade."""
    text = (WORLDS / "telco.yaml").read_text(encoding="utf-8")
    (tmp_path / "telco.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "other.yaml").write_text(text.replace("chargeover:telco", "chargeover:other"), encoding="utf-8")
    keys = ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000")
    with Sandbox([tmp_path]) as sandbox:
        for name, value in (("telco", 1), ("other", 2)):
            base = f"{sandbox.chargeover_url(name)}/api/v3"
            body = {"line_item_id": 854, "usage_value": value}
            assert requests.post(f"{base}/usage", json=body, auth=keys, timeout=10).status_code == 201
        upgraded = requests.post(f"{base}/package/713/_action/upgrade", json=UPGRADE, auth=keys, timeout=10)
        assert upgraded.status_code == 200
        assert [sandbox.billed(site)[0].billed for site in (SITE, "chargeover:other")] == [1, 2]
        again = requests.post(f"{sandbox.chargeover_url('telco')}/api/v3/usage", json=body, auth=keys, timeout=10)
        assert again.status_code == 201


@pytest.mark.parametrize(
    ("end", "word"),
    [("2026-11-01", "mon"), ("2027-10-01", "yrl"), ("2027-01-01", "qtr"), ("2026-10-15", "2wk"), ("2026-10-04", "mon")],
)
def test_a_package_names_its_billing_period(end: str, word: str) -> None:
    """Who reckons when the open cycle began, from the next invoice and the cycle's word, comes to its start."""
    text = (WORLDS / "telco.yaml").read_text().replace("end: 2026-11-01", f"end: {end}")
    world = ChargeOverWorld.model_validate(yaml.safe_load(text))
    assert Views(world, SwitchBoard({}, {})).paycycle == word
