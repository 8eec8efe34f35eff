"""What the clients make of replies that no sound site gives: nothing is taken for success that does not say so."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from unit.destinations.scripted import Script, reply, server
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite, ChargeOverUsage
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioMetered, MaxioSettings, MaxioSite
from usage_billing.errors import InDoubt, NotApplied, Refused, UsageBillingError
from usage_billing.records import Delivery
from usage_billing.sources import BillingSource

ONCE = Transport(patience_seconds=0)
TOKENS = [letter * 64 for letter in "abc"]
OK = {"code": 201, "status": "OK", "message": "", "response": {"id": 7}}
ERROR = {"code": 400, "status": "Error", "message": "Missing or invalid parameter.", "response": False}


def envelope(response: object, **changes: object) -> Script:
    """Return a script that answers with an envelope."""
    return reply(200, json.dumps({"code": 200, "status": "OK", "message": "", "response": response, **changes}))


def maxio(url: str) -> MaxioSite:
    """Return a client of a scripted Maxio site."""
    return MaxioSite(MaxioSettings(subdomain="acme", api_key="a-key", base_url=url, events_url=url), ONCE)


def chargeover(url: str) -> ChargeOverSite:
    """Return a client of a scripted ChargeOver account."""
    return ChargeOverSite(ChargeOverSettings(instance="telco", public_key="p", private_key="q-key", base_url=url), ONCE)


def deliveries() -> list[Delivery]:
    """Return three deliveries of one unit."""
    return [Delivery(token, "i", 0, Decimal(1), {"line_item_id": 1}, "{}") for token in TOKENS]


def metered(url: str) -> MaxioMetered:
    """Return a destination over a scripted Maxio site."""
    keys = {"name": "maxio_metered", "connection": "c", "subscription_by": "reference", "component": "handle:calls"}
    source: Any = BillingSource(None, MaxioMetered.settings_model.model_validate(keys), "", ())  # type: ignore[arg-type]
    return MaxioMetered(source, maxio(url))


def usage(url: str, mode: str = "batch") -> ChargeOverUsage:
    """Return a destination over a scripted account."""
    keys = {"name": "chargeover_usage", "connection": "c", "package_by": "external_key", "item": "voip", "mode": mode}
    source: Any = BillingSource(None, ChargeOverUsage.settings_model.model_validate(keys), "", ())  # type: ignore[arg-type]
    return ChargeOverUsage(source, chargeover(url))


@pytest.mark.parametrize("body", ["{}", "[]", "null", '"ok"', '{"usage":{}}', '{"usage":[]}'])
def test_a_usage_that_is_not_in_the_reply_is_in_doubt(body: str) -> None:
    """Maxio answers a created usage with the usage; anything else says nothing about it."""
    with server(reply(200, body)) as url, pytest.raises(InDoubt, match="no usage in the reply"):
        maxio(url).create_usage(1, 2, "{}")


@pytest.mark.parametrize(
    "answer", [ERROR, {**OK, "status": "Error"}, {**OK, "response": True}, {**OK, "code": 500}, {}]
)
def test_an_error_inside_a_success_is_in_doubt(answer: dict[str, object]) -> None:
    """ChargeOver says in the envelope what became of a record: HTTP 200 alone is no receipt."""
    with server(reply(200, json.dumps(answer))) as url, pytest.raises(InDoubt, match="no id in the reply"):
        chargeover(url).create_usage("{}")


@pytest.mark.parametrize(
    "response",
    [None, True, {"id": 7}, {"_bulk": []}, {"_bulk": [OK, OK]}, {"_bulk": [OK, OK, None]}, {"_bulk": [OK, OK, {}]}],
)
def test_a_batch_without_an_answer_for_each_record_is_in_doubt(response: object) -> None:
    """Three records were sent: fewer answers, or none, leave all three in doubt."""
    with server(envelope(response)) as url, pytest.raises(InDoubt, match="no answer for each record"):
        usage(url).send(deliveries())


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([OK, {**ERROR, "code": 500}, OK], InDoubt),
        ([OK, {**OK, "response": None}, OK], InDoubt),
        ([{**ERROR, "code": 429}] * 3, NotApplied),
        ([OK, {**ERROR, "code": 429}, OK], [TOKENS[0], TOKENS[2]]),
        ([{**OK, "code": "201", "response": {"id": "7"}}] * 3, TOKENS),
    ],
)
def test_each_record_of_a_batch_has_its_own_outcome(answers: list[dict[str, object]], expected: Any) -> None:
    """A receipt for what was taken, none for what was throttled, and doubt about the whole where one is unclear."""
    with server(envelope({"_bulk": answers})) as url:
        if isinstance(expected, list):
            assert [receipt.token for receipt in usage(url).send(deliveries())] == expected
            return
        with pytest.raises(UsageBillingError) as told:
            usage(url).send(deliveries())
    assert type(told.value) is expected


@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_batch_that_fails_as_a_whole_is_in_doubt(status: int) -> None:
    """No document says that a failed batch stored none of its records, not even a throttled one."""
    failed = reply(status, json.dumps({**ERROR, "code": status}))
    read_back = [envelope([])] if status == 400 else []
    with server(failed, failed, *read_back) as url:
        with pytest.raises(InDoubt, match=f"HTTP {status}"):
            usage(url).send(deliveries())
        with pytest.raises({400: Refused, 429: NotApplied, 500: InDoubt}[status]):
            usage(url, mode="single").send(deliveries()[:1])


@pytest.mark.parametrize("read_back", [reply(500), reply(429), envelope("odd"), reply(401)])
def test_a_refusal_that_cannot_be_read_back_is_in_doubt(read_back: Script) -> None:
    """A refused key may be our own earlier success: as long as the account does not tell, it is no refusal."""
    with (
        server(reply(400, json.dumps(ERROR)), read_back) as url,
        pytest.raises(InDoubt, match="its own earlier success"),
    ):
        usage(url, mode="single").send(deliveries()[:1])


def test_a_refusal_of_a_key_that_is_not_there_is_a_refusal() -> None:
    """The account does not hold the key, so it was not its own earlier success."""
    refused = reply(400, json.dumps(ERROR))
    with server(refused, envelope([])) as url, pytest.raises(Refused, match="Missing or invalid parameter"):
        usage(url, mode="single").send(deliveries()[:1])


def test_a_cancelled_line_is_not_in_the_way() -> None:
    """A package that had the item before, cancelled, has one line of it today."""
    line = {"item_external_key": "voip", "item_is_usage": "1"}
    lines = [{**line, "line_item_id": 1, "cancel_datetime": "2026-01-01 00:00:00"}, {**line, "line_item_id": "2"}]
    package = {"package_id": 9, "external_key": "k", "package_status_state": "a", "line_items": lines}
    with server(envelope([package]), envelope([])) as url:
        (target,) = usage(url).resolve(["k"])

    assert target.address == {"line_item_id": 2}


def test_records_of_another_key_prove_nothing() -> None:
    """An account that does not obey the filter has not said that ours is absent, so nothing is sent again."""
    other = {"usage_history_id": 1, "external_key": "someone-else", "usage_value": 1}
    with server(envelope([other])) as url, pytest.raises(NotApplied, match="told 'someone-else'"):
        usage(url).settle(deliveries()[:1], datetime.now(UTC))


@pytest.mark.parametrize(
    "ask",
    [
        lambda url: list(maxio(url).usages(1, 2) or ()),
        lambda url: list(maxio(url).subscriptions()),
        lambda url: maxio(url).subscription_components(1),
        lambda url: chargeover(url).usages_by_external_key(TOKENS[0]),
        lambda url: list(chargeover(url).packages()),
    ],
)
@pytest.mark.parametrize("body", ["{}", "null", "true", '{"code":200,"status":"OK","response":{}}'])
def test_an_answer_that_is_no_list_is_no_empty_list(ask: Callable[[str], object], body: str) -> None:
    """Only a list says what there is: taking anything else for an empty one would bill twice."""
    with server(reply(200, body)) as url, pytest.raises(NotApplied):
        ask(url)


@pytest.mark.parametrize("reference", ["acct-1", "ACCT-1 ", None])
def test_a_look_up_that_is_not_exact_concludes_nothing(reference: str | None) -> None:
    """A site that compares references loosely would bill somebody else, and has not said that there is no such one."""
    component = reply(200, '{"component":{"id":1,"handle":"calls","kind":"metered_component"}}')
    found = reply(200, json.dumps({"subscription": {"id": 5, "reference": reference, "state": "active"}}))
    with server(component, found) as url, pytest.raises(NotApplied, match="a subscription with another reference"):
        metered(url).resolve(["ACCT-1"])


def test_a_list_that_breaks_off_is_not_at_its_end() -> None:
    """A 404 in the middle of the usages is a failure, and not the end of the list."""
    page = json.dumps([{"usage": {"id": 9, "quantity": 1, "memo": None}}])
    with server(reply(200, page), reply(404)) as url:
        usages = maxio(url).usages(1, 2)
        assert usages is not None
        assert next(usages)["id"] == 9
        with pytest.raises(NotApplied, match="in the middle of the list"):
            next(usages)


def test_a_site_that_ignores_the_bounds_is_not_asked_for_ever() -> None:
    """A page that brings nothing new ends the walk."""
    page = reply(200, json.dumps([{"usage": {"id": 9}}, {"usage": {"id": 8}}]))
    with server(page, page, page) as url:
        assert [row["id"] for row in maxio(url).usages(1, 2) or ()] == [9, 8]
