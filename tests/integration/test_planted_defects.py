"""A month with every kind of defect planted: each row is billed, or named with every reason, and all of them add up.

The verdict is the sandbox's count.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from arrivals import ArrivalHouse, an_arrival_house, by_interval
from stories import a_day, small_batches
from usage_billing.errors import Misconfigured
from usage_billing.records import Period
from usage_billing.sources import BillingSource
from usage_billing.suite import DUPLICATE

# All is text here, so that anything may stand anywhere; rows without a time that can be compared come with each run.
USAGE = (
    "SELECT NULLIF(substr(event_id, 1, instr(event_id || '#', '#') - 1), '') AS event_id, time, account, quantity, "
    "deleted FROM usage WHERE time >= :window_start AND time < :window_end OR time IS NULL OR time NOT LIKE '2026-10%'"
)
UNREADABLE = "a time that is none, or has no zone (naive_times in source.yaml says which)"
NOT_A_NUMBER = "quantity: not a number"
AFTER_ITS_END = "used after its subscription had ended"
NOON = "2026-10-05 16:00:00Z"

# Event (and which of its rows), time, account, quantity; and each reason why it may not be billed: none of the sound.
PLANTED: list[tuple[str, str | None, str | None, str | None, list[str]]] = [
    ("sound", NOON, "acct-0001", "10", []),
    ("another", "2026-10-08 16:00:00Z", "acct-0002", "5", []),
    ("with a zone", "2026-10-09 12:00:00-04:00", "acct-0002", "2.0", []),
    ("#no id", NOON, "acct-0001", "1", ["no event id"]),
    ("no account", NOON, None, "1", ["no account"]),
    ("no quantity", NOON, "acct-0001", None, ["no quantity"]),
    ("no time", None, "acct-0001", "1", ["no time"]),
    ("negative", NOON, "acct-0001", "-3", ["it takes back"]),
    ("not a number", NOON, "acct-0001", "NaN", [NOT_A_NUMBER]),
    ("infinite", NOON, "acct-0001", "Infinity", [NOT_A_NUMBER]),
    ("a word", NOON, "acct-0001", "lots", [NOT_A_NUMBER]),
    ("too fine", NOON, "acct-0001", "1.5", ["quantity: more than 0 decimal places"]),
    ("too large", NOON, "acct-0001", "9" * 19, ["quantity: too large"]),
    ("twice", NOON, "acct-0001", "7", []),
    ("twice#in one part", NOON, "acct-0001", "7", [DUPLICATE]),
    ("twice#in another part", "2026-10-05 17:00:00Z", "acct-0001", "70", [DUPLICATE]),
    ("twice#on another day", "2026-10-06 16:00:00Z", "acct-0001", "700", [DUPLICATE]),
    ("twice#long after", "2026-10-12 16:00:00Z", "acct-0001", "100", []),
    ("of nobody", NOON, "acct-9999", "1", ["subscription 'acct-9999' is unknown to maxio:us:acme"]),
    ("of one who left", NOON, "acct-0090", "1", ["subscription 'acct-0090' is canceled", AFTER_ITS_END]),
    ("too early", "2026-09-30 16:00:00Z", "acct-0001", "1", ["time outside the usage periods"]),
    ("too late", "2031-01-01 00:00:00Z", "acct-0001", "1", ["time outside the usage periods", "time in the future"]),
    ("without a zone", "2026-10-05 16:00:00", "acct-0001", "1", [UNREADABLE]),
    ("no time at all", "soon", "acct-0001", "1", [UNREADABLE]),
    ("all wrong", "never", None, "lots", [UNREADABLE, "no account", NOT_A_NUMBER]),
]
BILLED = {"acct-0001": Decimal(117), "acct-0002": Decimal(7)}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[ArrivalHouse]:
    """A sandbox, a ledger, and a warehouse with what is planted."""
    with an_arrival_house(tmp_path) as found:
        for event, time, account, quantity, _ in PLANTED:
            found.warehouse.put_as_it_is(event, time, account, quantity)
        yield found


@pytest.fixture
def source() -> BillingSource:
    """Calls by day, which may all be set aside."""
    negative = {
        "type": "expect_column_values_to_be_between",
        "kwargs": {"column": "quantity", "min_value": 0},
        "meta": {"reason": "it takes back"},
    }
    found = by_interval("api_calls", USAGE, dedup_window=timedelta(days=2), naive_times=None)
    return replace(found, expectations=(negative,))


def the_month(source: BillingSource) -> Period:
    """Return what of October is over."""
    return Period(a_day(source, 1).start, a_day(source, 18).end)


def as_planted(reason: str) -> str:
    """Return a reason without what the site says further about an account."""
    return reason.partition(": ")[0] if reason.startswith("subscription") else reason


@pytest.mark.parametrize("rows", [2, 7, 1000])
def test_each_planted_row_is_billed_or_named_with_its_reasons(
    house: ArrivalHouse, source: BillingSource, rows: int
) -> None:
    """Whatever the parts in which they are read; rows read are rows billed and rows named."""
    done = house.increment(small_batches(source, rows), the_month(source))

    assert done.comparison is not None
    assert house.billed(source) == BILLED
    listed = house.ledger.quarantined(source.name)
    found = {(row.event_id, row.quantity): json.loads(row.reasons) for row in listed.itertuples()}
    wanted = {(event.partition("#")[0], number or ""): reasons for event, _, _, number, reasons in PLANTED if reasons}
    assert {key: [as_planted(words) for words in reasons] for key, reasons in found.items()} == wanted
    aside = int(listed["copies"].sum())
    assert (aside, done.comparison.rows_quarantined) == (len([row for row in PLANTED if row[4]]),) * 2
    assert done.comparison.rows_accepted + aside == len(PLANTED)
    assert house.reconcile(source, the_month(source)).ties_out


def test_what_is_mended_is_billed_once_and_a_replay_of_it_sends_nothing(
    house: ArrivalHouse, source: BillingSource
) -> None:
    """Every defect is mended in the warehouse; the usage periods that had one are run again, and once more."""
    house.increment(source, the_month(source))
    for event, _, _, _, reasons in PLANTED:
        if reasons and DUPLICATE not in reasons:
            house.warehouse.delete(event)
            house.warehouse.put_as_it_is(f"mended {event.strip('#')}", NOON, "acct-0002", "1000")
    mended = len([row for row in PLANTED if row[4] and DUPLICATE not in row[4]])
    for _ in range(2):
        replayed = house.ledger.replayable(source.name)
        assert replayed
        house.increment(source, Period.around(replayed))
        assert house.billed(source) == BILLED | {"acct-0002": BILLED["acct-0002"] + 1000 * mended}
    assert set(house.ledger.quarantined(source.name)["event_id"]) == {"twice"}


def test_a_query_of_another_shape_stops_before_anything_is_sent(house: ArrivalHouse, source: BillingSource) -> None:
    """A column that is gone, and a float: both are told at once."""
    wrong = (
        "SELECT event_id, time, 1.5 AS quantity, deleted FROM usage WHERE time >= :window_start AND time < :window_end"
    )
    with pytest.raises(Misconfigured, match="account: the query returns no 'account'"):
        house.increment(replace(source, sql=wrong), the_month(source))
    assert house.writing_requests(source) == 0
