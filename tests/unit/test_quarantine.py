"""Where quarantined rows may have been billed, and how rows are named."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from stage_helpers import DAYS, START, make_source, rows, stage
from usage_billing.ledger import Ledger
from usage_billing.quarantine import Withheld, WrittenOff, concerned, names_of
from usage_billing.records import WRITTEN_OFF, Comparison, Reading, Staged
from usage_billing.staging import Staging

SOURCE = make_source()
PLACE = {"component": "calls", "price_point": "", "address": "{}"}
AT = [("s1", day) for day in DAYS] + [("s2", day) for day in DAYS]


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    """A staging area."""
    return Staging(tmp_path / "staging")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger that knows the source, and of account ``gone`` that it led to s1 and then to s2."""
    url = f"sqlite:///{tmp_path}/ledger.sqlite"
    Ledger.create(url)
    book = Ledger.connect(url)
    book.register(SOURCE.name, "maxio:us:acme", SOURCE.definition())
    for subscription in ("s1", "s2"):
        book.place(
            SOURCE.name, 0, pd.DataFrame([{"account": "gone", "subscription": subscription, **PLACE}]), book.now()
        )
    return book


def comparison(staging: Staging, aside: pa.Table | None) -> Comparison:
    """Compare three days, in which accounts a and b lead to s1, and c leads to s2."""
    led = pa.table({"account": ["a", "b", "c"], "subscription": ["s1", "s1", "s2"], "component": ["calls"] * 3})
    quarantined: Staged | None = None if aside is None else stage(staging, aside, name="quarantined")
    targets = stage(staging, led, name="targets")
    return Comparison(Reading(1), DAYS, targets, targets, 0, 3, quarantined=quarantined)


def withheld(staging: Staging, ledger: Ledger, aside: pa.Table | None) -> set[tuple[str, datetime]]:
    """Return which usage of s1 (known by account a) and s2 (by c) waits, by subscription and first instant."""
    found = Withheld.of(comparison(staging, aside), SOURCE, ledger, staging)
    of = {"s1": "a", "s2": "c"}
    keys = pd.DataFrame(
        {
            "subscription": [name for name, _ in AT],
            "component": "calls",
            "account": [of[name] for name, _ in AT],
            "period_start": pd.to_datetime([day.start for _, day in AT], utc=True).as_unit("us"),
        }
    )
    return {(name, day.start) for (name, day), waits in zip(AT, found.covers(keys), strict=True) if waits}


def set_aside(*values: tuple[object, ...], reasons: Sequence[str] = ("no good",), duplicate: bool = False) -> pa.Table:
    """Return rows as validation sets them aside."""
    table = rows(*values)
    table = table.append_column("duplicate", pa.array([duplicate] * len(table), pa.bool_()))
    return table.append_column("reasons", pa.array([list(reasons)] * len(table), pa.list_(pa.string())))


def test_a_row_withholds_what_it_may_have_been_billed_as(staging: Staging, ledger: Ledger) -> None:
    """By its account, whichever of its subscription's that is, and wherever it ever led; by its own usage period."""
    first, second, third = (day.start for day in DAYS)
    whole, far = {("s1", day.start) for day in DAYS}, START.replace(year=2020)
    cases = [
        (("e", 1, "b", "x"), {("s1", first)}),
        (("e", 30, "c", "x"), {("s2", second)}),
        (("e", 1, None, "x"), {("s1", first), ("s2", first)}),
        (("e", 1, "never seen", "x"), set()),
        (("e", 50, "gone", "x"), {("s1", third), ("s2", third)}),
        (("e", far, "a", "x"), whole),
        (("e", None, "a", "x"), whole),
        (("e", None, None, "x"), whole | {("s2", day.start) for day in DAYS}),
    ]
    for row, waits in cases:
        assert withheld(staging, ledger, set_aside(row)) == waits, row
    together = set_aside(*(row for row, _ in cases[:4]))
    assert withheld(staging, ledger, together) == {("s1", first), ("s2", first), ("s2", second)}


def test_nothing_waits_for_what_is_not_owed_and_all_for_a_run_of_before(staging: Staging, ledger: Ledger) -> None:
    """Where a run does not say which rows they are, they may be any."""
    off = set_aside(("e", 1, "a", "x"), reasons=["no good", WRITTEN_OFF])
    assert withheld(staging, ledger, off) == set()
    assert withheld(staging, ledger, off[:0]) == set()
    twice = set_aside(("e", 1, "a", "x"), duplicate=True)
    assert withheld(staging, ledger, twice) == set(), "its event is on the bill"
    assert len(withheld(staging, ledger, None)) == len(AT)
    assert len(withheld(staging, ledger, off.drop_columns("duplicate"))) == len(AT)
    assert concerned(stage(staging, off, name="quarantined"), staging).empty


def test_a_name_stands_for_all_that_a_row_says() -> None:
    """Also where a part of it is missing; the type of a number says nothing, and the reasons are not the row's."""
    one = rows(("e1", 1, "a", "5"), dimensions=[])
    (name,) = names_of(one).to_pylist()
    for same in (
        rows(("e1", 1, "a", 5)),
        rows(("e1", 1, "a", "5.00")),
        one.append_column("reasons", pa.array([["x"]])),
    ):
        assert names_of(same).to_pylist() == [name]
    others = [
        rows(("e2", 1, "a", "5")),
        rows((None, 1, "a", "5")),
        rows(("e1", 2, "a", "5")),
        rows(("e1", None, "a", "5")),
        rows(("e1", 1, "b", "5")),
        rows(("e1", 1, None, "5")),
        rows(("e1", 1, "a", "5.01")),
        rows(("e1", 1, "a", None), quantity=pa.string()),
        rows(("e1", 1, "a", "NaN")),
        rows(("e1", 1, "a", "5", "eu"), dimensions=["region"]),
    ]
    assert len({name, *(names_of(other)[0].as_py() for other in others)}) == len(others) + 1


def test_written_off_rows_are_found_by_name_among_rows_of_their_event() -> None:
    """A row of the same event that says something else is not one of them."""
    part = rows(("e1", 1, "a", "5"), ("e1", 1, "a", "6"), ("e2", 1, "a", "5"), (None, 1, "a", "5"))
    first, _, _, last = names_of(part).to_pylist()
    off = WrittenOff(frozenset({"e1", ""}), frozenset({first, last}), frozenset({first}))
    assert off.among(part).tolist() == [0, 3]
    assert off.among_duplicates(part, off.among(part)[:1]).tolist() == [0]
    assert WrittenOff().among(part).tolist() == []
