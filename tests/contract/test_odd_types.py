"""Replies of ChargeOver whose values have another type than is documented, one value at a time, in every read.

Whatever stands there, a read ends in an answer or in one of our errors; and no odd value ever makes an account unknown
or a record absent, for the one would take its usage off the bill, and the other would send it again.
"""

import copy
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
import requests
import urllib3
from requests.adapters import BaseAdapter, HTTPAdapter

from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite, ChargeOverUsage
from usage_billing.destinations.http import Transport
from usage_billing.errors import Misconfigured, UsageBillingError
from usage_billing.records import Delivery
from usage_billing.sources import BillingSource

TOKEN = "a" * 64
NOW = datetime(2026, 10, 6, tzinfo=UTC)
LINE = {"line_item_id": 854, "item_external_key": "voip", "item_is_usage": True, "cancel_datetime": None}
PACKAGE = {
    "package_id": 713,
    "customer_id": 10,
    "external_key": "acct",
    "paycycle": "mon",
    "next_invoice_datetime": "2026-11-01 00:00:00",
    "package_status_state": "a",
    "line_items": [LINE],
}
USAGE = {
    "usage_history_id": 5,
    "external_key": TOKEN,
    "usage_value": 1,
    "line_item_id": 854,
    "from": "2026-10-05 00:00:00",
    "to": "2026-10-05 23:59:59",
}
SOUND: Mapping[str, Any] = {
    "item": {"item_id": 13, "external_key": "voip", "service_data": {"is_usage": True}},
    "customer": [{"customer_id": 10, "external_key": "acct"}],
    "package": [PACKAGE],
    "usage": [USAGE],
}
ADDRESS = {"line_item_id": 854}
BODY = {"line_item_id": 854, "usage_value": 1, "from": USAGE["from"], "to": USAGE["to"], "external_key": TOKEN}
DELIVERY = Delivery(TOKEN, "i", 0, Decimal(1), ADDRESS, json.dumps(BODY), NOW - timedelta(hours=1), 1)
DELIVERY = replace(DELIVERY, subscription="package:acct")
ACCEPTED = pd.DataFrame(
    {
        "token": [TOKEN],
        "subscription": ["package:acct"],
        "address": [json.dumps(ADDRESS)],
        "period_start": [pd.Timestamp(NOW - timedelta(days=1))],
        "period_end": [pd.Timestamp(NOW)],
    }
)


@dataclass
class Account(BaseAdapter):
    """An account that answers each question with the objects of that kind, and an empty page after the first."""

    objects: dict[str, Any] = field(default_factory=dict)

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        """Answer by the kind that the path names."""
        parts = urlsplit(str(request.url))
        kind = parts.path.split("/")[3]
        is_later = "package_id%3AGT" in parts.query or ("offset=" in parts.query and "offset=0" not in parts.query)
        shown = [] if is_later else self.objects[kind]
        body = json.dumps({"code": 200, "status": "OK", "message": "", "response": shown}).encode()
        raw = urllib3.HTTPResponse(io.BytesIO(body), {}, 200, preload_content=False)
        return HTTPAdapter().build_response(request, raw)

    def close(self) -> None:
        """Close nothing."""


def usage_of(objects: dict[str, Any], package_by: str = "external_key") -> ChargeOverUsage:
    """Return a destination whose account answers so."""
    keys = {"name": "chargeover_usage", "connection": "c", "package_by": package_by, "item": "voip"}
    source: Any = BillingSource(None, ChargeOverUsage.settings_model.model_validate(keys), "", ())  # type: ignore[arg-type]
    account, client = wired()
    account.objects = objects
    return ChargeOverUsage(source, client)


@cache
def wired() -> tuple[Account, ChargeOverSite]:
    """Return an account, and a client that is connected to it."""
    account = Account()
    settings = ChargeOverSettings(instance="telco", public_key="p", private_key="q-key")
    return account, ChargeOverSite(settings, Transport(adapter=lambda: account, patience_seconds=0))


def resolved(objects: dict[str, Any], package_by: str) -> object:
    """Resolve an account alone, and among so many that the list is read; it has to be known."""
    destination = usage_of(objects, package_by)
    account = "854" if package_by == "line_item_id" else "acct"
    for others in (0, 20) if package_by == "external_key" else (0,):
        first, *_ = destination.resolve([account, *(f"other-{number}" for number in range(others))])
        assert not first.unknown, first.unknown
    return None


def checked(objects: dict[str, Any]) -> object:
    """Ask whether the source can be billed, which no odd value may deny."""
    faults = list(usage_of(objects)._faults())
    assert faults == []
    return None


def rechecked(objects: dict[str, Any]) -> object:
    """Ask whether a delivery may still go; nothing may hold it."""
    assert usage_of(objects).recheck([DELIVERY], NOW) == {}
    return None


def settled(objects: dict[str, Any]) -> object:
    """Settle a doubt; it may not turn out absent."""
    answers = usage_of(objects).settle([DELIVERY], NOW)
    assert TOKEN not in answers or answers[TOKEN] is not None
    return None


def listed(objects: dict[str, Any]) -> object:
    """List the records of a line; ours is among them."""
    assert [record.token for record in usage_of(objects).records(ACCEPTED)] == [TOKEN]
    return None


def looked_over(objects: dict[str, Any]) -> object:
    """Look for accepted usage on lines that are gone; none is."""
    assert list(usage_of(objects).moved(ACCEPTED)) == []
    return None


READS: dict[str, Callable[[dict[str, Any]], object]] = {
    "check": checked,
    "resolve by package": lambda objects: resolved(objects, "external_key"),
    "resolve by customer": lambda objects: resolved(objects, "customer_external_key"),
    "resolve by line": lambda objects: resolved(objects, "line_item_id"),
    "recheck": rechecked,
    "settle": settled,
    "records": listed,
    "moved": looked_over,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a reply."""
    if path:
        yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from places(inner, (*path, step))


def odd(value: object) -> tuple[object, ...]:
    """Return values of another type: a list or an object is never a scalar, and a scalar is neither."""
    if isinstance(value, list | dict):
        return ("x", "", 7, True, [7], [None], [[]], None)
    return ({}, {"a": 1}, [], [7], [[]])


def replies() -> Iterator[tuple[tuple[Any, ...], object, dict[str, Any]]]:
    """Yield every reply with one odd value: where it stands, the value, and all objects."""
    for path in places(dict(SOUND)):
        *way, last = path
        inner: Any = SOUND
        for step in path:
            inner = inner[step]
        for value in odd(inner):
            objects: Any = copy.deepcopy(dict(SOUND))
            holder = objects
            for step in way:
                holder = holder[step]
            holder[last] = value
            yield path, value, objects


@pytest.mark.parametrize("read", READS)
def test_an_odd_value_makes_nothing_unknown_and_nothing_absent(read: str) -> None:
    """Each value of each object, of each wrong type: an answer that still fits, or an error of ours."""
    READS[read](dict(SOUND))
    tried = [ends(read, path, value, objects) for path, value, objects in replies()]

    assert len(tried) > 100
    assert any(tried), "no odd value was noticed, so this proved nothing"


def ends(read: str, path: tuple[Any, ...], value: object, objects: dict[str, Any]) -> bool:  # noqa: ARG001
    """Say whether a read of these objects ends in an error of ours; a failure shows where the odd value stands."""
    try:
        READS[read](objects)
    except UsageBillingError:
        return True
    return False


@pytest.mark.parametrize(
    ("field_name", "value"),
    [("external_key", None), ("package_status_state", "c"), ("line_items", [])],
)
def test_a_definite_no_is_still_one(field_name: str, value: object) -> None:
    """An empty list of lines, a cancelled package, another key: sound answers, and the account is unknown."""
    objects = {**SOUND, "package": [{**PACKAGE, field_name: value}]}
    (target,) = usage_of(objects).resolve(["acct"])
    assert target.unknown


@pytest.mark.parametrize(
    ("text", "opened"),
    [
        ("2026-11-01 00:00:01", "2026-10-01"),
        ("2026-11-01", "2026-10-01"),
        ("2026-11-01T00:00:01-05:00", "2026-10-01"),
        ("2026-10-31T19:00:01-10:00", "2026-10-01"),
        ("2026-11-01T05:00:01Z", "2026-10-01"),
        ("2026-10-31T21:00:01-08:00", "2026-10-01"),
        ("2026-10-31T21:00:01-05:00", "2026-09-30"),
    ],
)
def test_the_next_invoice_is_read_in_the_accounts_zone(text: str, opened: str) -> None:
    """An offset says where the text was written; without one it is the connection's zone."""
    destination = usage_of({**SOUND, "package": [{**PACKAGE, "next_invoice_datetime": text}]})
    (target,) = destination.resolve(["acct"])
    assert target.open_from is not None
    assert target.open_from.astimezone(destination.client.settings.zone).date().isoformat() == opened


@pytest.mark.parametrize(
    ("cancelled", "unknown", "ended_at"),
    [
        (
            "2026-10-20 12:00:00",
            "line item 854 is cancelled: its usage would not be billed",
            "2026-10-20T12:00:00-05:00",
        ),
        ("", "", None),
    ],
)
def test_a_line_that_was_cancelled_alone_is_named(cancelled: str, unknown: str, ended_at: str | None) -> None:
    """Its package goes on, and its usage is not billed; when it ended is told in the account's zone."""
    lines = [{**LINE, "cancel_datetime": cancelled}]
    destination = usage_of({**SOUND, "package": [{**PACKAGE, "line_items": lines}]}, "line_item_id")
    (target,), (looked_at,) = destination.resolve(["854"]), destination.locate(["854"])

    assert target.unknown == unknown
    assert (target.ended_at and target.ended_at.isoformat()) == ended_at
    assert (looked_at.subscription, looked_at.address) == ("package_id:713", {"line_item_id": 854})


@pytest.mark.parametrize("second", [713, 712, None, "x"])
def test_packages_that_come_in_no_order_prove_no_absence(second: object) -> None:
    """A page that does not follow the ids may have passed a package over: nothing is concluded from it."""
    destination = usage_of({**SOUND, "package": [PACKAGE, {**PACKAGE, "package_id": second}]}, "line_item_id")
    with pytest.raises(UsageBillingError, match="id above 713"):
        destination.resolve(["77"])


def test_a_package_that_was_not_asked_for_is_no_answer() -> None:
    """Of many subscriptions the rest are asked for by their number; another package says nothing of them."""
    destination = usage_of({**SOUND, "package": {**PACKAGE, "package_id": 5}}, "line_item_id")
    with pytest.raises(UsageBillingError, match="asked for 713, told of 5"):
        destination.standing("package_id:713")


def test_a_line_that_is_told_twice_leads_nowhere() -> None:
    """Which package it is would hang on how far the list was read."""
    objects = {**SOUND, "package": [PACKAGE, {**PACKAGE, "package_id": 714}]}
    with pytest.raises(UsageBillingError, match="line item 854 is told twice"):
        usage_of(objects, "line_item_id").resolve(["854", "77"])


def test_a_404_of_a_wrong_address_makes_no_package_unknown() -> None:
    """Where everything is a 404, nothing is known of any package, however it is named."""

    def nothing(request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        raw = urllib3.HTTPResponse(io.BytesIO(b"<html></html>"), {}, 404, preload_content=False)
        return HTTPAdapter().build_response(request, raw)

    destination = usage_of(dict(SOUND), "line_item_id")
    with patch.object(Account, "send", lambda _self, request, *_, **__: nothing(request)):
        for ask in (
            lambda: destination.standing("package_id:713"),
            lambda: destination.standing("package:acct"),
            lambda: destination.resolve(["854"]),
        ):
            with pytest.raises(Misconfigured, match="no ChargeOver API"):
                ask()


def test_a_filter_that_is_used_up_is_asked_for_with_every_page() -> None:
    """A generator of conditions would hold for the first page alone, and the second would be of anybody."""
    account, client = wired()
    asked: list[str] = []

    def seen(self: Account, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        asked.append(unquote(str(request.url)))
        return sent(self, request)

    sent, account.objects = Account.send, dict(SOUND)
    with patch.object(Account, "send", seen):
        list(client.packages(one for one in [("customer_id", "EQUALS", "10")]))
    assert all("customer_id:EQUALS:10" in url for url in asked[:2])
    assert "package_id:GT:713" in asked[1]


def test_a_key_in_a_path_keeps_its_colon() -> None:
    """As it is documented; only what the key holds is encoded."""
    account, client = wired()
    account.objects = {"item": {"item_id": 13, "external_key": "a/b:c"}}
    asked: list[str] = []
    sent = Account.send
    with patch.object(
        Account, "send", lambda self, request, *_, **__: asked.append(request.url) or sent(self, request)
    ):
        assert client.item_by_external_key("a/b:c") is not None
    assert asked[0].endswith("/item/external_key:a%2Fb%3Ac")


def test_a_subscription_of_another_kind_of_site_is_unknown_here() -> None:
    """A source that was moved from another vendor left identities that no package stands for."""
    assert usage_of(dict(SOUND)).standing("50100001").unknown


def test_a_filter_that_is_not_obeyed_bills_nobody_else() -> None:
    """Packages of another customer than was asked for say nothing of this one."""
    objects = {**SOUND, "package": [{**PACKAGE, "customer_id": 11}]}
    with pytest.raises(UsageBillingError, match="another customer than 10"):
        usage_of(objects, "customer_external_key").resolve(["acct"])
