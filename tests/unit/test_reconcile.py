"""The tie-out where a site only counts: what it does not count is missing, and nothing passes through a float."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from usage_billing.destinations.base import Moved
from usage_billing.reconcile import Reconciliation, reconcile
from usage_billing.records import DECIDED, Period, SiteRecord, SiteTotal, State

MONTH = Period(datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC))
DAY = Period(datetime(2026, 10, 5, tzinfo=UTC), datetime(2026, 10, 6, tzinfo=UTC))


def looked(
    here: dict[str, list[str]],
    there: list[dict[str, str]],
    under_way: Mapping[str, list[str]] | None = None,
    *,
    fed_by_others: bool = False,
) -> tuple[Any, list[float]]:
    """Reconcile what the ledger accepted by subscription with what the site answers at each look."""
    rows, sent = (
        [
            {"subscription": name, "quantity": quantity, "body": "", "open_until": None}
            for name, some in side.items()
            for quantity in some
        ]
        for side in (here, under_way or {})
    )
    answers = iter(there)

    def totals(_: Sequence[str]) -> list[SiteTotal]:
        return [SiteTotal(name, "1", MONTH, Decimal(quantity)) for name, quantity in next(answers).items()]

    site: Any = SimpleNamespace(
        source=SimpleNamespace(name="units"),
        site="maxio:us:orbit",
        records=lambda _: None,
        totals=totals,
        moved=lambda _: (),
        metric="sum",
        stream="",
        archive=None,
        fed_by_others=fed_by_others,
    )

    def accepted_at(_site: str, names: Sequence[str], _component: str, _period: Period, states: Any) -> pd.DataFrame:
        known = [row for row in (rows if State.ACCEPTED in states else sent) if row["subscription"] in names]
        return pd.DataFrame(known, columns=["subscription", "quantity", "body"])

    book: Any = SimpleNamespace(accepted=lambda *_: pd.DataFrame(rows), accepted_at=accepted_at)
    waited: list[float] = []
    return reconcile(site, book, DAY, wait=waited.append), waited


def test_a_subscription_that_the_site_counts_nothing_for_is_missing() -> None:
    """No total is not a total that fits."""
    found, waited = looked({"7": ["3"], "8": ["4"]}, [{"7": "3"}] * 4)
    assert (found.matched, found.missing, found.ties_out) == (1, 1, False)
    assert "8: the site gives no total" in found.examples[0]
    assert waited == [2.0, 4.0, 8.0]


def test_what_the_site_shows_late_is_looked_for_again() -> None:
    """A count that lags ties out once it has caught up, and not a look later."""
    found, waited = looked({"7": ["3", "1"]}, [{"7": "3"}, {"7": "4"}])
    assert (found.matched, found.missing, found.ties_out) == (1, 0, True)
    assert waited == [2.0]


@pytest.mark.parametrize(("there", "different", "missing"), [("7.35", 0, 0), ("7.351", 1, 0), ("7.349", 0, 1)])
def test_sources_of_different_decimal_places_add_up_exactly(there: str, different: int, missing: int) -> None:
    """Two sources feed one component, one in tenths and one in hundredths."""
    found, _ = looked({"7": ["7.1", "0.25"]}, [{"7": there}] * 4)
    assert (found.different, found.missing, found.ours) == (different, missing, Decimal("7.35"))
    assert found.ties_out is (there == "7.35")


def test_more_there_than_here_is_a_difference() -> None:
    """Something was billed that this ledger does not know: red, and the words name the key that says otherwise."""
    found, waited = looked({"7": ["3"], "8": ["1"]}, [{"7": "6", "8": "1"}] * 4)
    assert (found.matched, found.different, found.unknown, found.ties_out) == (1, 1, 0, False)
    assert "7, 2026-10-01T00:00Z to 2026-11-01T00:00Z: 6 there, 3 here" in found.examples[0]
    assert "fed_by_others" in found.examples[0]
    assert waited == [2.0, 4.0, 8.0]


def test_more_there_than_here_is_told_and_green_where_others_feed_the_component() -> None:
    """The source says so; what of ours is not counted is missing all the same."""
    found, _ = looked({"7": ["3"]}, [{"7": "6"}], fed_by_others=True)
    assert (found.different, found.unknown, found.ties_out) == (0, 1, True)
    found, _ = looked({"7": ["3"]}, [{"7": "2"}] * 4, fed_by_others=True)
    assert (found.missing, found.ties_out) == (1, False)


@pytest.mark.parametrize(("sent", "ties_out"), [(["3"], True), (["2.9"], False), (["3", "-1"], True)])
def test_what_is_in_the_air_may_be_counted_there_already(sent: list[str], ties_out: bool) -> None:
    """A delivery of another run is there before its receipt is here, and any of several may be first.

    What exceeds all that adds is a difference.
    """
    found, _ = looked({"7": ["3"]}, [{"7": "6"}] * 4, {"7": sent})
    assert (found.ties_out, found.unknown) == (ties_out, int(ties_out))


@pytest.mark.parametrize(("sent", "ties_out"), [(["-1"], True), (["-0.5"], False), (["-1", "7"], True), (["1"], False)])
def test_what_is_in_the_air_may_be_taken_back_there_already(sent: list[str], ties_out: bool) -> None:
    """A correction downwards whose reply was lost is counted there; what is less than that is missing."""
    found, _ = looked({"7": ["3"]}, [{"7": "2"}] * 4, {"7": sent})
    assert (found.ties_out, found.missing) == (ties_out, int(not ties_out))


def test_what_other_runs_send_meanwhile_is_looked_at_again() -> None:
    """Counted there between two looks: the last one decides."""
    found, waited = looked({"7": ["3"]}, [{"7": "6"}, {"7": "3"}])
    assert (found.ties_out, waited) == (True, [2.0])


def entries(tokens: Sequence[str], state: State | None = None, record_id: str = "") -> pd.DataFrame:
    """Return what a ledger has of tokens: the same of all of them, or nothing."""
    known = [{"token": token, "state": state, "record_id": record_id, "reason": ""} for token in tokens if state]
    return pd.DataFrame(known, columns=["token", "state", "record_id", "reason"])


def tied_out(records: Callable[[pd.DataFrame], Iterator[SiteRecord]], addresses: int, known: Any) -> Reconciliation:
    """Tie out one accepted delivery of each address."""
    accepted = pd.DataFrame(
        {
            "token": [f"{number:064x}" for number in range(addresses)],
            "quantity": "3",
            "applied": "",
            "reason": "",
            "address": [f'{{"line_item_id":{number}}}' for number in range(addresses)],
        }
    )
    name = SimpleNamespace(name="calls")
    site: Any = SimpleNamespace(source=name, records=records, moved=lambda _: [Moved(2, "two are there")])
    book: Any = SimpleNamespace(accepted=lambda *_: accepted, known=known)
    return reconcile(site, book, DAY, wait=lambda _: None)


def test_a_long_history_takes_no_more_memory_than_a_short_one() -> None:
    """Address by address, and record by record: counts, sums and some examples are kept, and no list of records."""
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    most = 0
    looks: list[int] = []

    def records(some: pd.DataFrame) -> Iterator[SiteRecord]:
        nonlocal most
        (token,) = some["token"]
        for number in range(4_000):
            record = Kept(f"{number + 1_000_000:064x}", str(number), Decimal(1))
            alive.add(record)
            most = max(most, len(alive))
            yield record
            del record
        yield SiteRecord("", "by hand", Decimal(5))
        yield SiteRecord(token, "ours", Decimal(3))

    def known(tokens: Sequence[str]) -> pd.DataFrame:
        looks.append(len(tokens))
        return entries(tokens, State.ACCEPTED)

    found = tied_out(records, 5, known)

    assert (found.matched, found.unknown, found.ours, found.theirs) == (5, 5, Decimal(15), Decimal(15))
    assert (sum(looks), max(looks)) == (20_000, 500)
    assert most <= 501
    assert (found.moved, found.warnings, found.ties_out) == (2, ("two are there",), True)


@dataclass(frozen=True)
class Kept(SiteRecord):
    """A record whose end can be seen."""

    __slots__ = ("__weakref__",)

    def __hash__(self) -> int:
        return id(self)


def test_many_differences_are_counted_and_a_few_are_named() -> None:
    """A thousand records that differ are a thousand, and ten examples."""
    found = tied_out(lambda some: (SiteRecord(token, token, Decimal(4)) for token in some["token"]), 30, entries)
    assert (found.different, len(found.examples), found.ties_out) == (30, 10, False)


def test_a_token_that_the_ledger_never_wrote_down_is_the_sign_of_another_ledger() -> None:
    """It is told before what somebody typed in by hand, with the mend; neither breaks the tie-out."""
    ours, theirs = "a" * 64, "b" * 64
    accepted = pd.DataFrame([{"token": ours, "quantity": "3", "applied": "", "reason": "", "address": "{}"}])
    there = [
        SiteRecord("", "1", Decimal(50)), SiteRecord(theirs, "2", Decimal(4)), SiteRecord(ours, "3", Decimal(3)),
    ]  # fmt: skip
    name = SimpleNamespace(name="calls")
    site: Any = SimpleNamespace(source=name, records=lambda _: iter(there), moved=lambda _: ())
    book: Any = SimpleNamespace(accepted=lambda *_: accepted, known=entries)
    found = reconcile(site, book, DAY)
    assert (found.matched, found.unknown, found.ties_out) == (1, 2, True)
    first, second = found.examples
    for words in ("record 2: 4 there", theirs, "a second or a restored ledger", "usage-billing ledger adopt"):
        assert words in first
    assert second == "record 1: 50 there, unknown here"


def test_a_token_that_is_stored_at_two_addresses_was_billed_twice() -> None:
    """The ledger knows one record under each token: another one, at the address of somebody else, is told."""
    ours, another = "a" * 64, "b" * 64
    accepted = pd.DataFrame([{"token": ours, "quantity": "3", "applied": "", "reason": "", "address": "{}"}])
    there = [SiteRecord(ours, "3", Decimal(3)), SiteRecord(another, "9", Decimal(4))]
    name = SimpleNamespace(name="calls")
    site: Any = SimpleNamespace(source=name, records=lambda _: iter(there), moved=lambda _: ())
    for its_record, ties_out in (("9", True), ("", True), ("2", False)):
        known = partial(entries, state=State.ACCEPTED, record_id=its_record)
        book: Any = SimpleNamespace(accepted=lambda *_: accepted, known=known)
        found = reconcile(site, book, DAY, wait=lambda _: None)
        assert (found.matched, found.different, found.ties_out) == (1, int(not ties_out), ties_out)
    assert found.examples == (f"record 9: 4 there, a second time under {another}, which is record 2 elsewhere",)


@pytest.mark.parametrize(("counted", "ties_out"), [("18", True), ("9", False), ("", False)])
def test_a_double_that_a_person_has_decided_about_ties_out_by_its_sum(counted: str, ties_out: bool) -> None:
    """Two records of 9 under one token, and the person wrote down that 18 count: that is settled, and stays so."""
    ours = "a" * 64
    row = {"token": ours, "quantity": "9", "applied": counted, "reason": f"{DECIDED}2026-10-06 by me", "address": "{}"}
    there = [SiteRecord(ours, "3", Decimal(9)), SiteRecord(ours, "4", Decimal(9))]
    name = SimpleNamespace(name="calls")
    site: Any = SimpleNamespace(source=name, records=lambda _: iter(there), moved=lambda _: ())
    book: Any = SimpleNamespace(accepted=lambda *_: pd.DataFrame([row]), known=entries)
    found = reconcile(site, book, DAY, wait=lambda _: None)
    assert (found.matched, found.different, found.ties_out) == (int(ties_out), int(not ties_out), ties_out)
    assert found.theirs == Decimal(18)
