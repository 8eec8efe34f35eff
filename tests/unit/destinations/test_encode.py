"""What stands in a request, to the letter: the bodies that the ledger keeps and the sites receive."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from usage_billing.destinations import destination_class
from usage_billing.destinations.base import Destination, by_value, joined
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite
from usage_billing.destinations.chargeover.client import where_text
from usage_billing.destinations.maxio import MaxioSettings, MaxioSite
from usage_billing.sources import BillingSource, SourceSettings

TOKEN = "0123456789abcdef" * 4
START = datetime(2026, 10, 5, 4, tzinfo=UTC)
METERED = {"name": "maxio_metered", "subscription_by": "reference", "component": "handle:api-calls"}
EVENTS = {
    "name": "maxio_events",
    "stream": "platform-events",
    "subscription_by": "account_id",
    "component": "handle:platform-units",
    "property": "units",
}
USAGE = {"name": "chargeover_usage", "package_by": "external_key", "item": "voip"}


def destination(keys: dict[str, Any], **source: Any) -> Destination:
    """Return a destination that is never connected; encoding asks no site."""
    found: Any = destination_class(keys["name"])
    declared = {
        "name": "calls",
        "description": "calls",
        "warehouse": "warehouse",
        "schedule": "0 0 * * *",
        "timezone": "America/New_York",
        "period": "day",
        "bill_from": "2026-06-01",
        "columns": {"event_id": "id", "time": "at", "account": "who", "quantity": "units"},
        "meter": {"function": "sum", "decimals": 3},
    }
    settings_of = SourceSettings.model_validate({**declared, **source})
    own = found.settings_model.model_validate({**keys, "connection": "c"})
    client: Any = MaxioSite(MaxioSettings(subdomain="acme", api_key="a-key"))
    if keys["name"] == "chargeover_usage":
        client = ChargeOverSite(ChargeOverSettings(instance="telco", public_key="p", private_key="q-key"))
    made: Destination = found(BillingSource(settings=settings_of, destination=own, sql="", expectations=()), client)
    return made


def proposal(**changes: Any) -> dict[str, Any]:
    """Return one row of a plan."""
    row = {
        "token": TOKEN,
        "identity": "i",
        "subscription": "50100001",
        "component": "61001",
        "price_point": "71001",
        "dimensions": "{}",
        "address": '{"component_id":61001,"subscription_id":50100001}',
        "period_start": pd.Timestamp(START),
        "period_end": pd.Timestamp(START + timedelta(days=1)),
        "quantity": "12.5",
        "open_from": pd.Timestamp(START - timedelta(days=4)),
    }
    return {**row, **changes}


def body(made: Destination, **changes: Any) -> str:
    """Return the body of one row."""
    text: str = made.encode(pd.DataFrame([proposal(**changes)])).iloc[0]
    return text


def test_a_metered_usage_to_the_letter() -> None:
    """The token leads the memo and stands on the top level; the quantity is a number with all its digits."""
    made = destination({**METERED, "memo": "API calls of {period}"})

    assert body(made) == (
        f'{{"uniqueness_token":"{TOKEN}","usage":{{"quantity":12.5,"price_point_id":"71001",'
        f'"memo":"{TOKEN} API calls of 2026-10-05"}}}}'
    )
    assert '"price_point_id"' not in body(made, price_point="")


def test_a_memo_is_cut_and_the_token_never_is() -> None:
    """Whatever the user writes, the memo has 255 characters at most and its first word is the token."""
    made = destination({**METERED, "memo": 'quote " and \\ and\nüñ {period} ' + "x" * 300})

    memo = json.loads(body(made))["usage"]["memo"]

    assert len(memo) == 255
    assert memo.split(" ")[0] == TOKEN
    assert 'quote " and \\ and üñ 2026-10-05 xxx' in memo


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("hour", "2026-10-05 00:00-0400"),
        ("day", "2026-10-05"),
        ("month", "2026-10"),
        ("week", "2026-10-05 00:00 to 2026-10-06 00:00"),
        ("interval", "2026-10-05 00:00 to 2026-10-06 00:00"),
    ],
)
def test_the_memo_names_the_usage_period(kind: str, text: str) -> None:
    """The usage lands in whatever billing period is open, so its memo says what it was for, in the billing zone."""
    made = destination(METERED, period=kind)

    assert json.loads(body(made))["usage"]["memo"] == f"{TOKEN} {text}"


def test_an_event_to_the_letter() -> None:
    """The usage period's start decides the billing period; dimensions are properties, and what is null stays null."""
    made = destination(EVENTS, dimensions=["region", "tier"])
    address = '{"account":"orbit \\"01\\"","stream":"platform-events"}'

    assert body(made, address=address, dimensions='{"region":"eu","tier":null}') == (
        f'{{"chargify":{{"timestamp":"2026-10-05T04:00:00Z","uniqueness_token":"{TOKEN}"}},'
        '"account_id":"orbit \\"01\\"","units":12.5,"region":"eu","tier":null}'
    )


@pytest.mark.parametrize(
    ("by", "expected"),
    [("subscription_id", 50200001), ("subscription_reference", "50200001")],
)
def test_an_event_names_its_subscription_as_the_stream_wants(by: str, expected: object) -> None:
    """An id travels as a number and a reference as text, both inside the chargify object."""
    made = destination({**EVENTS, "subscription_by": by})
    event = json.loads(body(made, address='{"account":"50200001","stream":"platform-events"}'))

    assert event["chargify"][by] == expected
    assert set(event) == {"chargify", "units"}


def test_a_usage_record_to_the_letter() -> None:
    """Times are the account's own, without an offset, and the last second belongs to the period."""
    made = destination(USAGE)

    assert body(made, address='{"line_item_id":854}', quantity="-0.01") == (
        '{"line_item_id":854,"usage_value":-0.01,"from":"2026-10-04 23:00:00","to":"2026-10-05 22:59:59",'
        f'"external_key":"{TOKEN}"}}'
    )


def test_the_hour_that_autumn_repeats_is_told_by_its_key() -> None:
    """Two periods bear the same local times where the clocks go back; both records are sound."""
    made = destination(USAGE)
    first = datetime(2026, 11, 1, 6, tzinfo=UTC)
    spans = [(first, first + timedelta(hours=1)), (first + timedelta(hours=1), first + timedelta(hours=2))]
    bodies = [
        json.loads(body(made, address='{"line_item_id":1}', period_start=pd.Timestamp(a), period_end=pd.Timestamp(b)))
        for a, b in spans
    ]

    assert bodies[0]["from"] == bodies[1]["from"] == "2026-11-01 01:00:00"
    assert bodies[0]["to"] == bodies[1]["to"] == "2026-11-01 01:59:59"


@pytest.mark.parametrize("keys", [METERED, EVENTS, USAGE], ids=lambda keys: keys["name"])
def test_nothing_proposed_is_nothing_encoded(keys: dict[str, Any]) -> None:
    """A plan without proposals encodes to an empty column."""
    empty = pd.DataFrame([proposal()]).iloc[:0]

    assert list(destination(keys).encode(empty)) == []
    held = destination(keys).hold_reason(empty.assign(open_from=pd.Series(dtype="datetime64[us, UTC]")))
    assert list(held) == []


@pytest.mark.parametrize("keys", [METERED, EVENTS, USAGE], ids=lambda keys: keys["name"])
@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.decimals(allow_nan=False, allow_infinity=False, places=6).map(lambda value: f"{value:f}"),
            st.text(min_size=1, max_size=8),
            st.text(max_size=8),
            st.integers(0, 40),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_every_body_is_json_with_the_exact_quantity(
    keys: dict[str, Any], rows: list[tuple[str, str, str, int]]
) -> None:
    """Whatever accounts and dimensions are called, each row is its own JSON text, in its own place."""
    made = destination(keys, dimensions=["region"])
    frame = pd.DataFrame(
        [
            proposal(
                token=f"{number:064x}",
                quantity=quantity,
                address=json.dumps({"account": account, "stream": "s", "line_item_id": number}),
                dimensions=json.dumps({"region": region}, ensure_ascii=False),
                period_start=pd.Timestamp(START + timedelta(hours=hour)),
                period_end=pd.Timestamp(START + timedelta(hours=hour + 1)),
            )
            for number, (quantity, account, region, hour) in enumerate(rows)
        ]
    ).set_index(pd.Index(range(100, 100 + len(rows))))

    bodies = made.encode(frame)

    assert list(bodies.index) == list(frame.index)
    for number, (text, (quantity, account, region, _)) in enumerate(zip(bodies, rows, strict=True)):
        record = json.loads(text, parse_float=Decimal, parse_int=Decimal)
        inner = record.get("usage", record)
        found = next(inner[name] for name in ("quantity", "units", "usage_value") if name in inner)
        assert found == Decimal(quantity)
        assert f"{number:064x}" in text
        if keys is EVENTS:
            assert (record["account_id"], record["region"]) == (account, region)


def test_columns_are_joined_row_by_row() -> None:
    """Text repeats in every row, and the index stays."""
    column = pd.Series(["a", "b"], index=[7, 9])

    assert joined("<", column, "|", column, ">").to_dict() == {7: "<a|a>", 9: "<b|b>"}


def test_a_value_is_written_once() -> None:
    """However often a value stands in a column, it is written once."""
    written: list[str] = []

    result = by_value(pd.Series(["x", "y", "x"]), lambda value: written.append(value) or value.upper())

    assert list(result) == ["X", "Y", "X"]
    assert written == ["x", "y"]


def test_a_where_clause_hides_no_colon() -> None:
    """An unescaped colon would end the value there, without any error: colons, commas and backslashes are escaped."""
    clause = where_text([("from", "GTE", "2026-10-05 10:18:49"), ("external_key", "EQUALS", "a,b\\c")])

    assert clause == r"from:GTE:2026-10-05 10\:18\:49,external_key:EQUALS:a\,b\\c"


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({**METERED, "component": "api-calls"}, "component"),
        ({**METERED, "subscription_by": "name"}, "subscription_by"),
        ({**METERED, "memo": "{quantity}"}, "unknown field {quantity}"),
        ({**METERED, "stream": "s"}, "stream"),
        ({**EVENTS, "stream": "../other"}, "stream"),
        ({**USAGE, "mode": "spreadsheet"}, "mode"),
        ({**USAGE, "item": ""}, "item"),
    ],
)
def test_a_wrong_key_of_a_source_is_told(keys: dict[str, Any], fault: str) -> None:
    """Each destination checks its own keys before anything is asked."""
    found = destination_class(keys["name"])
    assert found is not None
    with pytest.raises(ValidationError, match=fault.replace("{", r"\{")):
        found.settings_model.model_validate({**keys, "connection": "c"})


def test_an_id_may_be_written_as_a_number() -> None:
    """YAML reads 61001 as a number: it is the component's id all the same."""
    found = destination_class("maxio_metered")
    assert found is not None
    assert found.settings_model.model_validate({**METERED, "connection": "c", "component": 61001}).component == "61001"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("following", "cycle", "began"),
    [
        ("2026-11-01 00:00:00", "mon", "2026-10-01"),
        ("2026-11-15T00:00:01-06:00", "mon", "2026-10-15"),
        ("2027-02-28 00:00:00", "mon", "2027-01-31"),  # Anchored on a 31st: the earlier 28th would lose three days.
        ("2026-11-16 00:00:00", "116", "2026-11-01"),
        ("2026-11-01 00:00:00", "116", "2026-10-16"),
        ("2026-11-05 00:00:00", "2wk", "2026-10-22"),
    ],
)
def test_the_open_cycle_of_a_package_begins_one_cycle_before_its_next_invoice(
    following: str, cycle: str, began: str
) -> None:
    """The account tells the next invoice and the cycle; the start lies in the account's own zone."""
    made: Any = destination(USAGE)
    found = made._line_items._open_from({"next_invoice_datetime": following, "paycycle": cycle})
    assert found.astimezone(ZoneInfo("America/Chicago")).isoformat()[:19] == f"{began}T00:00:00"


@pytest.mark.parametrize("package", [{}, {"next_invoice_datetime": "", "paycycle": "mon"}, {"paycycle": "evy"}])
def test_a_package_without_a_known_cycle_has_no_known_beginning(package: dict[str, Any]) -> None:
    """Nothing is guessed where the account does not tell."""
    made: Any = destination(USAGE)
    assert made._line_items._open_from(package) is None


NOVEMBER = pd.Timestamp(datetime(2026, 11, 1, 5, tzinfo=UTC))


def test_late_usage_is_dated_in_the_open_billing_period() -> None:
    """An event at its start, a ChargeOver record in its first hour with both ends; what it is for stands beside it."""
    assert '"timestamp":"2026-11-01T05:00:00Z"' in body(
        destination(EVENTS), open_from=NOVEMBER, address='{"account":"a","stream":"s"}'
    )
    usage = destination(USAGE)
    line = {"address": '{"account":"a","line_item_id":854}', "open_from": NOVEMBER}
    assert body(usage, **line) == (
        '{"line_item_id":854,"usage_value":12.5,"from":"2026-11-01 00:00:00","to":"2026-11-01 00:59:59",'
        f'"external_key":"{TOKEN}","custom_1":"usage of 2026-10-04 23:00:00 to 2026-10-05 22:59:59"}}'
    )
    own_time = body(destination({**USAGE, "late_usage": "original_time"}), **line)
    assert '"from":"2026-10-04 23:00:00"' in own_time
    assert "custom_1" not in own_time


def test_the_memo_of_late_usage_names_its_period_whatever_the_template() -> None:
    """On the invoice of another billing period nobody would know what it is for."""
    made = destination({**METERED, "memo": "API calls"})
    assert body(made).endswith(f'"{TOKEN} API calls"}}}}')
    assert body(made, open_from=NOVEMBER).endswith(f'"{TOKEN} 2026-10-05 API calls"}}}}')
    made = destination({**METERED, "memo": "of {period}"})
    assert body(made, open_from=NOVEMBER).endswith(f'"{TOKEN} of 2026-10-05"}}}}')


@pytest.mark.parametrize("grace", ["1 day", "24", "h", "-1d", "1w", "10000d"])
def test_a_grace_that_is_no_time_is_refused(grace: str) -> None:
    """Minutes, hours or days, told with the mend."""
    with pytest.raises(ValidationError, match="minutes as 30m, hours as 24h, days as 1d"):
        destination({**METERED, "grace": grace})
