"""`make bench-suite`: what ten expectations cost, beside the same ten rules written by hand.

Both judge the same rows in the same parts, in turns, in one process; both have to name the same rows by rule, else the
bench fails. By hand means what one would write in place of a suite: pandas for text, Arrow for exact quantities, one
line for each rule. Only the ratio counts, of CPU seconds: others that use the machine cannot tilt it.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from bench import machine
from state import CHECKOUT

from usage_billing.destinations import destination_settings
from usage_billing.sources import BillingSource, load_source
from usage_billing.suite import Suite

ROWS, BATCH_ROWS, ACCOUNTS, ROUNDS = 1_000_000, 100_000, 5_000, 5
START = datetime(2026, 10, 1, tzinfo=UTC)
REGIONS, PLANS = ["eu", "us", "ap"], ["free", "team", "firm"]
_LENGTH = len("acct-0000000")
_BAD = 1_000
"""One row in so many fails each rule."""

Findings = dict[str, np.ndarray]
"""The numbers of the rows that fail, by reason."""


def suite() -> list[dict[str, Any]]:
    """Return ten expectations about rows, with the number of each as its reason."""
    rules: list[tuple[str, dict[str, Any]]] = [
        ("column_values_to_not_be_null", {"column": "account"}),
        ("column_values_to_be_between", {"column": "quantity", "min_value": 0, "max_value": 1000}),
        ("column_values_to_not_be_in_set", {"column": "quantity", "value_set": [13]}),
        ("column_values_to_not_be_null", {"column": "region"}),
        ("column_values_to_be_in_set", {"column": "region", "value_set": REGIONS}),
        ("column_values_to_be_in_set", {"column": "plan", "value_set": PLANS}),
        ("column_values_to_match_regex", {"column": "event_id", "regex": r"^req-\d{9}$"}),
        ("column_values_to_match_regex", {"column": "account", "regex": "^acct-"}),
        ("column_value_lengths_to_be_between", {"column": "account", "min_value": _LENGTH, "max_value": _LENGTH}),
        ("column_values_to_not_match_regex", {"column": "plan", "regex": "test"}),
    ]
    return [
        {"type": f"expect_{kind}", "kwargs": kwargs, "meta": {"reason": str(number)}}
        for number, (kind, kwargs) in enumerate(rules)
    ]


def by_hand(part: pa.Table) -> Findings:
    """Judge a part by the same ten rules; like Great Expectations, nulls fail only the rules about nulls."""
    frame = part.select(["event_id", "account", "region", "plan"]).to_pandas()
    event_id, account, region, plan = (frame[name] for name in frame.columns)
    quantity = part.column("quantity")
    negative = pc.less(quantity, pa.scalar(Decimal(0)))
    large = pc.greater(quantity, pa.scalar(Decimal(1000)))
    masks = [
        account.isna(),
        pc.or_(negative, large).to_numpy(),
        pc.equal(quantity, pa.scalar(Decimal(13))).to_numpy(),
        region.isna(),
        ~region.isin(REGIONS) & region.notna(),
        ~plan.isin(PLANS) & plan.notna(),
        ~event_id.str.contains(r"^req-\d{9}$"),
        ~account.str.contains("^acct-", na=True),
        (account.str.len() != _LENGTH) & account.notna(),
        plan.str.contains("test", na=False),
    ]
    return {str(number): np.flatnonzero(mask) for number, mask in enumerate(masks)}


def by_suite(judge: Suite) -> Callable[[pa.Table], Findings]:
    """Judge a part by the suite."""
    return lambda part: dict(judge.findings(part))


def parts(rows: int, batch_rows: int, accounts: int) -> Iterator[pa.Table]:
    """Yield made rows of so many accounts, of which some fail each rule."""
    for first in range(0, rows, batch_rows):
        yield _part(np.arange(first, min(first + batch_rows, rows)), accounts)


def _part(numbers: np.ndarray, accounts: int) -> pa.Table:
    def spoiled(values: Sequence[Any], bad: object, at: int) -> list[Any]:
        return [bad if number % _BAD == at else value for number, value in zip(numbers, values, strict=True)]

    account = [f"acct-{number % accounts:07d}" for number in numbers]
    account = spoiled(spoiled(spoiled(account, None, 0), "cust-0000001", 1), "acct-1", 2)
    region = spoiled(spoiled([REGIONS[number % 3] for number in numbers], None, 3), "moon", 4)
    plan = spoiled(spoiled([PLANS[number % 3] for number in numbers], "gold", 5), "test-plan", 6)
    cents = [Decimal(int(number) % 12_00) / 100 for number in numbers]
    quantity = spoiled(spoiled(spoiled(cents, Decimal(-5), 7), Decimal("1000.01"), 8), Decimal(13), 9)
    return pa.table(
        {
            "event_id": spoiled([f"req-{number:09d}" for number in numbers], "req-x", 10),
            "time": pa.array([START + timedelta(seconds=int(number)) for number in numbers], pa.timestamp("us", "UTC")),
            "account": account,
            "quantity": pa.array(quantity, pa.decimal128(18, 2)),
            "region": region,
            "plan": plan,
        }
    )


def source() -> BillingSource:
    """Return a shipped source with the ten rules, and the dimensions that they name."""
    found = load_source(CHECKOUT / "include" / "sources" / "api_calls", destination_settings)
    dimensions = {"region": "region", "plan": "plan"}
    settings = found.settings.model_copy(update={"dimensions": dimensions})
    return replace(found, settings=settings, expectations=tuple(suite()))


def compare(tables: Sequence[pa.Table], rounds: int) -> Mapping[str, list[float]]:
    """Return the CPU seconds of each round, both ways in turns.

    Raises:
        AssertionError: the two name different rows for a rule, or some rule has none to name.
    """
    ways = {"suite": by_suite(Suite(source(), sum(map(len, tables)))), "by hand": by_hand}
    found = {name: [judge(table) for table in tables] for name, judge in ways.items()}  # And both are warm.
    for named, by_name in zip(*found.values(), strict=True):
        for reason, rows in by_name.items():
            if not len(rows) or not np.array_equal(np.sort(named.get(reason, [])), rows):
                raise AssertionError(f"rule {reason}: the suite names {named.get(reason)}, by hand {rows}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, judge in ways.items():
            began = time.process_time()
            for table in tables:
                judge(table)
            seconds[name].append(time.process_time() - began)
    return seconds


def report(seconds: Mapping[str, list[float]], rows: int) -> str:
    """Return the medians, and the ratio of each round."""
    lines = [f"{name:<8} {statistics.median(found):7.2f} s of CPU" for name, found in seconds.items()]
    ratios = sorted(ours / theirs for ours, theirs in zip(*seconds.values(), strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return "\n".join(
        [f"ten expectations, {rows:,} rows", *lines, f"ratio    {statistics.median(ratios):7.2f}   ({spread})"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Compare ten expectations with the same rules written by hand.")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--batch-rows", type=int, default=BATCH_ROWS)
    parser.add_argument("--accounts", type=int, default=ACCOUNTS, help="how many accounts the rows are of")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    print(machine(), flush=True)
    tables = list(parts(options.rows, options.batch_rows, options.accounts))
    print(report(compare(tables, options.rounds), options.rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
