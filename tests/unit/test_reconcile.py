"""The tie-out where a site only counts: what it does not count is missing, and nothing passes through a float."""

from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from usage_billing.reconcile import reconcile
from usage_billing.records import Period, SiteRecord, SiteTotal

MONTH = Period(datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 11, 1, tzinfo=UTC))
DAY = Period(datetime(2026, 10, 5, tzinfo=UTC), datetime(2026, 10, 6, tzinfo=UTC))


def looked(here: dict[str, list[str]], there: list[dict[str, str]]) -> tuple[Any, list[float]]:
    """Reconcile what the ledger accepted by subscription with what the site answers at each look."""
    rows = [{"subscription": name, "quantity": quantity} for name, some in here.items() for quantity in some]
    answers = iter(there)

    def totals(_: Sequence[str]) -> list[SiteTotal]:
        return [SiteTotal(name, "1", MONTH, Decimal(quantity)) for name, quantity in next(answers).items()]

    site: Any = SimpleNamespace(
        source=SimpleNamespace(name="units"),
        site="maxio:us:orbit",
        records=lambda _: None,
        totals=totals,
        metric="sum",
        stream="",
        archive=None,
    )
    book: Any = SimpleNamespace(
        accepted=lambda *_: pd.DataFrame(rows),
        accepted_at=lambda _site, names, *_: pd.DataFrame([row for row in rows if row["subscription"] in names]),
    )
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


@pytest.mark.parametrize(("there", "ties_out", "unknown"), [("7.35", True, 0), ("9", True, 1), ("7.349", False, 0)])
def test_sources_of_different_decimal_places_add_up_exactly(there: str, ties_out: bool, unknown: int) -> None:
    """Two sources feed one component, one in tenths and one in hundredths."""
    found, _ = looked({"7": ["7.1", "0.25"]}, [{"7": there}] * 4)
    assert (found.ties_out, found.unknown, found.ours) == (ties_out, unknown, Decimal("7.35"))


def test_a_token_that_the_ledger_never_wrote_down_is_the_sign_of_another_ledger() -> None:
    """It is told before what somebody typed in by hand, with the mend; neither breaks the tie-out."""
    ours, theirs = "a" * 64, "b" * 64
    accepted = pd.DataFrame([{"token": ours, "quantity": "3", "applied": ""}])
    there = [
        SiteRecord("", "1", Decimal(50)), SiteRecord(theirs, "2", Decimal(4)), SiteRecord(ours, "3", Decimal(3)),
    ]  # fmt: skip
    site: Any = SimpleNamespace(source=SimpleNamespace(name="calls"), records=lambda _: iter(there))
    book: Any = SimpleNamespace(accepted=lambda *_: accepted, states=lambda _: {})
    found = reconcile(site, book, DAY)
    assert (found.matched, found.unknown, found.ties_out) == (1, 2, True)
    first, second = found.examples
    for words in ("record 2: 4 there", theirs, "a second or a restored ledger", "usage-billing ledger adopt"):
        assert words in first
    assert second == "record 1: 50 there, unknown here"
