"""The metrics over stored event values."""

from decimal import Decimal

import pytest

from usage_billing.sandbox.maxio.billing import compute, worth
from usage_billing.sandbox.world import Metric

VALUES = [{"n": Decimal("0.1")}, {"n": 5}, {"n": Decimal("0.1")}, {"n": "text"}, {}]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("sum", "5.2"), ("count", "5"), ("maximum", "5"), ("minimum", "0.1"), ("unique", "3")],
)
def test_metric_over_events(kind: str, expected: str) -> None:
    """Each metric passes over what is no number; a count counts events, a unique count its distinct values."""
    metric = Metric(id=1, kind=kind, property="n")
    assert compute(metric, [worth(metric, event) for event in VALUES]) == Decimal(expected)


def test_average_of_the_numbers() -> None:
    """An average divides by the number of numbers."""
    metric = Metric(id=1, kind="average", property="n")
    assert compute(metric, ["1", "2", '"x"']) == Decimal("1.5")


def test_nothing_is_zero() -> None:
    """A period without events bills 0 by every metric."""
    assert {compute(Metric(id=1, kind=kind, property="n"), []) for kind in ("sum", "maximum", "average", "unique")} == {
        0
    }
