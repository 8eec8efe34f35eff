"""ChargeOver's query language, with its documented trap."""

from typing import Any

import pytest

from usage_billing.sandbox.chargeover.query import BadQuery, Condition, parse_where

SITE = "chargeover:telco"


@pytest.mark.parametrize(
    ("text", "conditions"),
    [
        ("a:EQUALS:1", [Condition("a", "EQUALS", "1")]),
        ("a:EQUALS:x\\:y", [Condition("a", "EQUALS", "x:y")]),
        ("a:EQUALS:x\\,y,b:IS:NULL", [Condition("a", "EQUALS", "x,y"), Condition("b", "IS", "NULL")]),
        ("a:GTE:2026-10-05 10:18:49", [Condition("a", "GTE", "2026-10-05 10")]),
        ("", []),
    ],
)
def test_where_is_split_at_unescaped_marks(text: str, conditions: list[Condition]) -> None:
    """Escaped colons and commas belong to the value; an unescaped colon ends it without a word."""
    assert parse_where(text) == conditions


@pytest.mark.parametrize("text", ["a", "a:EQUALS", "a:IN:1", "a:EQUALS:1,", ":"])
def test_malformed_where_is_refused(text: str) -> None:
    """A condition without all its parts, or with an unknown operator, is refused with the documented text."""
    with pytest.raises(BadQuery, match="Malformed WHERE clause"):
        parse_where(text)


def _keys(reply: Any) -> list[str]:
    assert reply.status_code == 200, reply.text
    return [row["external_key"] for row in reply.json()["response"]]


@pytest.fixture
def three(telco: Any) -> Any:
    """Three records of one line at 09:00, 10:30 and 11:00 local time, and one of another line."""
    for key, hour in (("a", "09:00:00"), ("b", "10:30:00"), ("c", "11:00:00")):
        moment = f"2026-10-15 {hour}"
        telco.post("usage", {"line_item_id": 854, "usage_value": 1, "from": moment, "to": moment, "external_key": key})
    telco.use(1, line=855, external_key="d:1,x", day="2026-10-01")
    return telco


@pytest.mark.parametrize(
    ("where", "keys"),
    [
        ("line_item_id:EQUALS:854", ["a", "b", "c"]),
        ("line_item_id:NOTEQUALS:854", ["d:1,x"]),
        ("external_key:EQUALS:b", ["b"]),
        ("external_key:EQUALS:d\\:1\\,x", ["d:1,x"]),
        ("external_key:CONTAINS:D\\:", ["d:1,x"]),
        ("external_key:IS:NULL", []),
        ("line_item_id:EQUALS:854,from:GTE:2026-10-15 10\\:30\\:00", ["b", "c"]),
        ("from:GT:2026-10-15 10\\:30\\:00", ["c"]),
        ("from:GTE:2026-10-15T10\\:30\\:00-05\\:00,from:LT:2026-10-15T16\\:00\\:00+00\\:00", ["b"]),
        ("to:LTE:2026-10-14", ["d:1,x"]),
    ],
)
def test_usage_is_filtered(three: Any, where: str, keys: list[str]) -> None:
    """Filters are joined by AND; naive times are local, offsets are honoured."""
    assert _keys(three.get("usage", where=where)) == keys


def test_unescaped_colons_lose_minutes_in_silence(three: Any) -> None:
    """A time filter without escapes answers 200 with the rows of the whole hour."""
    assert _keys(three.get("usage", where="from:GTE:2026-10-15 10:45:00")) == ["b", "c"]
    assert _keys(three.get("usage", where="from:GTE:2026-10-15 10\\:45\\:00")) == ["c"]


def test_order_and_pages(three: Any) -> None:
    """Rows are ordered by a field, and pages are cut by offset and limit; the default is ten rows."""
    assert _keys(three.get("usage", order="from:DESC", limit=2)) == ["c", "b"]
    assert _keys(three.get("usage", order="from:DESC", limit=2, offset=2)) == ["a", "d:1,x"]
    assert _keys(three.get("usage", order="line_item_id:DESC,from:DESC")) == ["d:1,x", "c", "b", "a"]
    for number in range(12):
        three.use(1, external_key=f"x{number}")
    assert len(_keys(three.get("usage"))) == 10


def test_limit_above_the_maximum_by_switch(three: Any, bench: Any) -> None:
    """More than 500 rows are cut to 500, or refused."""
    assert three.get("usage", limit=501).status_code == 200
    bench.switch(SITE, limit_above_max="refuse")
    assert three.get("usage", limit=501).status_code == 400
    assert three.get("usage", limit=500).status_code == 200


def test_unknown_fields_are_refused(three: Any) -> None:
    """Only the documented fields filter and order; the text names the field."""
    reply = three.get("usage", where="mod_datetime:GTE:2026-10-01")
    assert (reply.status_code, reply.json()["message"]) == (400, "You cannot filter by: mod_datetime.")
    assert three.get("usage", order="custom_1:ASC").status_code == 400
    assert three.get("usage", limit="many").status_code == 400
    assert three.get("usage", where="line_item_id:EQUALS:many").status_code == 400


def test_counts(three: Any) -> None:
    """`_count` answers with a bare number for the same filters."""
    assert three.get("usage/_count", where="line_item_id:EQUALS:854").json()["response"] == 3
    assert three.get("package/_count", where="package_status_state:EQUALS:a").json()["response"] == 8
    assert three.get("invoice/_count").json()["response"] == 0


def test_packages_are_filtered_by_customer_and_line(telco: Any) -> None:
    """Packages are found by customer, key and the item of a line."""
    by_customer = telco.get("package", where="customer_id:EQUALS:10").json()["response"]
    assert [row["external_key"] for row in by_customer] == ["pkg-001"]
    assert telco.get("package", where="external_key:EQUALS:none").json()["response"] == []
    by_item = telco.get("package", where="line_items.item_id:EQUALS:14").json()["response"]
    assert [row["external_key"] for row in by_item] == ["pkg-007", "pkg-008"]
