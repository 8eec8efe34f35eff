"""Rules about a whole reading, in Great Expectations' vocabulary: against what is usual, in time, in the same columns.

Each is an expectation of Great Expectations about one row per usage period, or per column of the query
(`trailing.Measures`), and is found by its name in ``expectations.yaml`` like those that it ships. Great Expectations
checks the arguments and runs it; it compares integers and decimals itself, so that no float decides.

Import this where a suite is built, and nowhere else: Great Expectations takes seconds to import.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from decimal import Context, Decimal
from statistics import median_low
from typing import Any, ClassVar

import pandas as pd
import yaml
from great_expectations.compatibility import pydantic
from great_expectations.expectations.expectation import BatchExpectation

from usage_billing import quantities
from usage_billing.sources import time_span
from usage_billing.trailing import UNSEEN

_TOLD = 3
"""How many usage periods are told by name."""
_EXACT = Context(prec=200)
"""With room for every digit: the ambient context would round after 28 of them."""
MISSING = "missing"
"""What stands for the type of a column that is gone."""


class WholeReading(BatchExpectation):
    """The base of the rules about a whole reading: says whether one holds, and what there is to tell."""

    # Something has to be reckoned by Great Expectations for the rule to be run at all.
    metric_dependencies: ClassVar[tuple[str, ...]] = ("table.row_count",)
    looks_at: ClassVar[str]
    """Which of the tables of `Measures` it judges: periods, sums (the same, once the rows were judged) or columns."""

    def _validate(
        self,
        metrics: dict[str, Any],  # noqa: ARG002
        runtime_configuration: dict[str, Any] | None = None,  # noqa: ARG002
        execution_engine: Any = None,
    ) -> dict[str, Any]:
        frame: pd.DataFrame = execution_engine.get_domain_records({})
        faults, unjudged = self._found(frame)
        return {"success": not faults, "result": {"observed_value": "; ".join(faults), "unjudged": "; ".join(unjudged)}}

    def _found(self, frame: pd.DataFrame) -> tuple[list[str], list[str]]:
        """Return what is not as expected, and what could not be judged for want of history."""
        raise NotImplementedError


class _ToBeUsual(WholeReading):
    """What each usage period has is a share of the median of those before it, between `min_share` and `max_share`."""

    what: ClassVar[str]
    unit: ClassVar[str]
    periods: int = 28
    at_least: int = 7
    min_share: Decimal | None = None
    max_share: Decimal | None = None

    @pydantic.validator("periods", "at_least", pre=True)
    def _is_a_count(cls, value: object) -> object:  # noqa: N805 - pydantic's own way.
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{value!r} is no number of usage periods: write a whole number from 1 on")
        return value

    @pydantic.validator("min_share", "max_share", pre=True)
    def _is_a_share(cls, value: object) -> object:  # noqa: N805
        # As it was written: a float's own text, never the number behind it.
        share = None if isinstance(value, bool) else quantities.finite(value)
        if value is not None and (share is None or share < 0):
            raise ValueError(f"{value!r} is no share: half of the usual is 0.5, twice as much is 2")
        return share

    @pydantic.root_validator(skip_on_failure=True)
    def _fits_together(cls, values: dict[str, Any]) -> dict[str, Any]:  # noqa: N805
        low, high = values["min_share"], values["max_share"]
        if low is None and high is None:
            raise ValueError("needs min_share, max_share or both: without them it says nothing")
        if low is not None and high is not None and low > high:
            raise ValueError(f"min_share {low} is more than max_share {high}")
        if values["at_least"] > values["periods"]:
            raise ValueError(f"at_least {values['at_least']} is more than periods {values['periods']}: it never judges")
        return values

    def _found(self, frame: pd.DataFrame) -> tuple[list[str], list[str]]:
        faults, unjudged = [], []
        for row in frame.to_dict("records"):
            before = [Decimal(each) for each in row[f"{self.what}_before"][: self.periods]]
            if len(before) < self.at_least:
                unjudged.append(f"{row['period']}: {len(before)} usage periods of history, at_least {self.at_least}")
                continue
            found, usual = Decimal(row[self.what]), median_low(before)
            if not self._holds(found, usual):
                faults.append(
                    f"{row['period']} has {found:f} {self.unit}, and the usual of the last {len(before)} usage periods "
                    f"is {usual:f}"
                )
        return _shortened(faults), _shortened(unjudged)

    def _holds(self, found: Decimal, usual: Decimal) -> bool:
        # Where what is usual is a credit, half of it is half as far from nothing.
        if usual < 0:
            found, usual = found.copy_negate(), usual.copy_negate()
        enough = self.min_share is None or found >= _EXACT.multiply(self.min_share, usual)
        return enough and (self.max_share is None or found <= _EXACT.multiply(self.max_share, usual))


class ExpectPeriodRowCountsToBeUsual(_ToBeUsual):
    """Each usage period has about as many rows as the usage periods before it."""

    looks_at = "periods"
    what = "rows"
    unit = "rows"


class ExpectPeriodQuantitySumsToBeUsual(_ToBeUsual):
    """The accepted quantities of each usage period add up to about as much as those of the usage periods before it."""

    looks_at = "sums"
    what = "quantity"
    unit = "in all"


class ExpectLatestTimeToBeRecent(WholeReading):
    """The latest event came no more than `within` before the end of the last usage period."""

    looks_at = "periods"
    within: timedelta

    @pydantic.validator("within", pre=True)
    def _is_a_span(cls, value: object) -> timedelta:  # noqa: N805
        return time_span(value)

    def _found(self, frame: pd.DataFrame) -> tuple[list[str], list[str]]:
        end, times = max(frame["end"]), [moment for moment in frame["latest"] if moment is not None]
        if not times:
            return [f"no event at all until {end:%Y-%m-%dT%H:%MZ}"], []
        latest = max(times)
        if end - latest <= self.within:
            return [], []
        return [
            f"the latest event is of {latest:%Y-%m-%dT%H:%MZ}, the last usage period ends {end:%Y-%m-%dT%H:%MZ}"
        ], []


class ExpectQueryColumnsToBeUnchanged(WholeReading):
    """The query returns the columns that it returned in the last reading that went on, of the same types.

    `accepted` names those that somebody has looked at, each with its new type or as `missing`; so it may stay.
    """

    looks_at = "columns"
    accepted: dict[str, str] = pydantic.Field(default_factory=dict)

    @pydantic.validator("accepted", pre=True)
    def _names_types(cls, value: object) -> object:  # noqa: N805
        if not isinstance(value, Mapping) or not all(isinstance(text, str) for each in value.items() for text in each):
            raise ValueError("must give the new type of each column by its name, as in {region: string, old: missing}")
        return value

    def _found(self, frame: pd.DataFrame) -> tuple[list[str], list[str]]:
        if frame.empty:
            raise ValueError("which columns the query returned was not noted: clear the run from extract on")
        if not frame["before"].notna().any():
            return [], ["no reading went on yet whose columns are known"]
        drifted = dict(self._drifted(frame))
        if not drifted:
            return [], []
        accepts = ", ".join([f"{_yaml(name)}: {_yaml(kind)}" for name, kind in {**self.accepted, **drifted}.items()])
        told = [self._told(row, drifted) for row in frame.to_dict("records") if row["column"] in drifted]
        return [*told, f"if that is right, say so under its kwargs, accepted: {{{accepts}}}"], []

    def _drifted(self, frame: pd.DataFrame) -> Iterator[tuple[str, str]]:
        """Yield the name of each column that is not as before, and what it is now."""
        for row in frame.to_dict("records"):
            now, before = row["now"] or MISSING, row["before"] or MISSING
            known = UNSEEN not in (now, before)
            if now != before and (known or MISSING in (now, before)) and self.accepted.get(row["column"]) != now:
                yield row["column"], now

    @staticmethod
    def _told(row: Mapping[Any, Any], drifted: Mapping[str, str]) -> str:
        name, now, before = row["column"], drifted[row["column"]], row["before"]
        if before is None:
            return f"column {name} ({now}) is new"
        return f"column {name} ({before}) is missing" if now == MISSING else f"column {name} was {before}, and is {now}"


def _yaml(text: str) -> str:
    """Return a text as YAML takes it for one: a column may be called `no`, and a type has brackets."""
    return text if text.isidentifier() and yaml.safe_load(text) == text else json.dumps(text)


def _shortened(lines: Sequence[str]) -> list[str]:
    more = len(lines) - _TOLD
    return [*lines[:_TOLD], *([f"and {more} more"] if more > 0 else [])]
