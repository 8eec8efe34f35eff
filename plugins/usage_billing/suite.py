"""The source's suite: its expectations, checked before a row is judged, and run by Great Expectations.

A rule that could not run stops the run: it never counts as passed. Great Expectations itself leaves some of these out
in silence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.errors import Misconfigured, NeedsDecision
from usage_billing.sources import BillingSource
from usage_billing.staging import array_of

_RANK = "quantity (rank)"


@dataclass(frozen=True, slots=True)
class _Rule:
    """One expectation of the suite, ready for Great Expectations.

    `columns` are those it needs, none if it may need any; `judges_rows` if it names the rows that fail it; `on_ranks`
    if it compares ranks in place of quantities.
    """

    number: int
    label: str
    reason: str
    expectation: Any
    columns: frozenset[str]
    judges_rows: bool
    on_ranks: bool


# Their verdict on one row hangs on other rows, so they mean nothing for a part of an extraction.
_ACROSS_ROWS = frozenset(
    {
        "expect_column_values_to_be_unique",
        "expect_compound_columns_to_be_unique",
        "expect_column_values_to_be_increasing",
        "expect_column_values_to_be_decreasing",
        "expect_column_value_z_scores_to_be_less_than",
        "expect_column_values_to_not_be_outliers",
    }
)
_ROW_COUNTS = frozenset({"expect_table_row_count_to_be_between", "expect_table_row_count_to_equal"})
_SCHEMA = frozenset(
    {
        "expect_column_to_exist",
        "expect_column_type_to_be",
        "expect_table_column_count_to_be_between",
        "expect_table_column_count_to_equal",
        "expect_table_columns_to_match_ordered_list",
        "expect_table_columns_to_match_set",
    }
)
_COMPARES = frozenset(
    {"expect_column_values_to_be_between", "expect_column_values_to_be_in_set", "expect_column_values_to_not_be_in_set"}
)


class Suite:
    """The source's expectations, built and checked once per run.

    Great Expectations keeps bounds as floats, and compares decimals in a Python loop. So where a rule compares the
    quantity with numbers, both sides are given as ranks among all numbers of the suite (`quantities.ranks`): small
    integers, compared exactly and in bulk.
    """

    def __init__(self, source: BillingSource, rows: int) -> None:
        self._source = source
        self._rows = rows
        self._bounds: list[Decimal] = []
        self._rules: list[_Rule] = []
        if source.expectations:
            self._batches = _great_expectations()
            self._build()

    @property
    def _compares_quantity(self) -> bool:
        return self._source.settings.meter.function in {"sum", "max", "last"}

    def _build(self) -> None:
        faults: list[str] = []
        declared = list(enumerate(self._source.expectations))
        numbers = {number: self._numbers(number, rule, faults) for number, rule in declared}
        self._bounds = sorted({bound for bounds in numbers.values() for bound in bounds or []})
        built = [self._rule(number, rule, faults) for number, rule in declared if numbers[number] is not None]
        self._rules = [rule for rule in built if rule is not None]
        if faults:
            raise Misconfigured.all_at_once(f"{self._source.title}: expectations.yaml", faults)

    def _on_ranks(self, rule: Mapping[str, Any]) -> bool:
        named = rule.get("kwargs", {}).get("column") == "quantity"
        return named and rule["type"] in _COMPARES and self._compares_quantity

    def _numbers(self, number: int, rule: Mapping[str, Any], faults: list[str]) -> list[Decimal] | None:
        """Return the numbers that a rule compares the quantity with, None where they are wrong."""
        if not self._on_ranks(rule):
            return []
        kwargs = rule["kwargs"]
        declared = [kwargs.get("min_value"), kwargs.get("max_value"), *_listed(kwargs.get("value_set"))]
        try:
            return [_exact(value) for value in declared if value is not None]
        except ValueError as error:
            faults.append(f"{_label(number, rule)}: {error}")
            return None

    def _rule(self, number: int, rule: Mapping[str, Any], faults: list[str]) -> _Rule | None:
        from great_expectations import exceptions  # noqa: PLC0415 - See `_great_expectations`.
        from great_expectations.expectations import expectation, registry  # noqa: PLC0415

        label, kwargs = _label(number, rule), dict(rule.get("kwargs", {}))
        try:
            implementation = registry.get_expectation_impl(rule["type"])
        except exceptions.ExpectationNotFoundError:
            known = registry.list_registered_expectation_implementations()
            faults.append(f"{label}: no such expectation{_near(rule['type'], known)}")
            return None
        by_row = (
            expectation.ColumnMapExpectation,
            expectation.ColumnPairMapExpectation,
            expectation.MulticolumnMapExpectation,
        )
        judges_rows = issubclass(implementation, by_row) and rule["type"] not in _ACROSS_ROWS
        found = [*self._column_faults(kwargs, rule["type"]), *_row_faults(kwargs, judges_rows=judges_rows)]
        found.extend(self._reach_faults(rule["type"], judges_rows=judges_rows))
        if self._on_ranks(rule):
            kwargs = self._ranked(kwargs)
        try:
            built = implementation(**kwargs, meta={"rule": number})
        except (ValueError, TypeError) as error:
            found.extend(_argument_faults(error))
        if found:
            faults.extend(f"{label}: {fault}" for fault in found)
            return None
        columns = frozenset(_columns(kwargs)) if judges_rows and not kwargs.get("row_condition") else frozenset[str]()
        return _Rule(number, label, _reason(rule), built, columns, judges_rows, self._on_ranks(rule))

    def _column_faults(self, kwargs: Mapping[str, Any], kind: str) -> Iterator[str]:
        settings = self._source.settings
        present = [
            "event_id",
            "time",
            "account",
            *(["quantity"] if settings.columns.quantity else []),
            *settings.dimensions,
        ]
        for column in [] if kind in _SCHEMA else _columns(kwargs):
            if column not in present:
                yield f"there is no column {column!r}; the rows have {', '.join(present)}"
        if "quantity" in str(kwargs.get("row_condition", "")):
            yield "row_condition cannot compare the quantity exactly; use a rule on the quantity itself"

    def _reach_faults(self, kind: str, *, judges_rows: bool) -> Iterator[str]:
        whole = judges_rows or kind in _ROW_COUNTS or kind in _SCHEMA or self._rows <= self._source.settings.batch_rows
        if not whole:
            yield (
                f"looks at all {self._rows} rows at once, but batch_rows is {self._source.settings.batch_rows}; raise "
                "batch_rows in source.yaml, or remove the rule (duplicate event ids are found without one)"
            )

    def _ranked(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        ranked = kwargs | {"column": _RANK}
        for key in ("min_value", "max_value"):
            if kwargs.get(key) is not None:
                ranked[key] = self._rank(kwargs[key])
        if isinstance(kwargs.get("value_set"), list):
            ranked["value_set"] = [self._rank(value) for value in kwargs["value_set"] if value is not None]
        return ranked

    def _rank(self, value: object) -> int:
        return 2 * self._bounds.index(_exact(value)) + 1

    def check_whole(self, first: pa.Table) -> None:
        """Judge the rules about the extraction as a whole, by its first part and its number of rows.

        Raises:
            NeedsDecision: one of them failed.
            Misconfigured: one of them looks at all rows, which came in several parts.
        """
        counts = [rule for rule in self._rules if rule.expectation.expectation_type in _ROW_COUNTS]
        others = [rule for rule in self._rules if not rule.judges_rows and rule not in counts]
        reaching = [rule for rule in others if rule.expectation.expectation_type not in _SCHEMA]
        if reaching and len(first) != self._rows:
            # Parts are also cut where a driver changes a column's type.
            faults = [f"{rule.label}: looks at all rows at once, but they came in several types" for rule in reaching]
            raise Misconfigured.all_at_once(f"{self._source.title}: usage.sql, cast the quantity to one type", faults)
        self._run(counts, pd.DataFrame(index=pd.RangeIndex(self._rows)))
        self._run(others, self._frame(first, others))

    def findings(self, part: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each row rule's reason with the numbers of the rows that fail it."""
        rules = [rule for rule in self._rules if rule.judges_rows]
        for rule, failed in self._run(rules, self._frame(part, rules)):
            yield rule.reason, failed

    def _frame(self, part: pa.Table, rules: Sequence[_Rule]) -> pd.DataFrame:
        """Return a part as `rules` see it: our column words, a quantity that stays exact, row numbers as labels."""
        # Great Expectations hashes every cell of a frame it is given, so it is given no column in vain.
        needed = set().union(
            *(rule.columns or {*part.column_names, *([_RANK] if rule.on_ranks else [])} for rule in rules)
        )
        others = [name for name in part.column_names if name in needed - {"quantity"}]
        frame: pd.DataFrame = part.select(others).to_pandas()
        frame.index = pd.RangeIndex(len(part))
        if "quantity" in needed and "quantity" in part.column_names:
            frame["quantity"] = pd.Series(pd.arrays.ArrowExtensionArray(part.column("quantity")))
        if _RANK in needed and self._bounds:
            frame[_RANK] = quantities.ranks(array_of(part, "quantity"), self._bounds)
        return frame

    def _run(self, rules: list[_Rule], frame: pd.DataFrame) -> list[tuple[_Rule, np.ndarray]]:
        """Run rules over a frame and return the rows that fail each.

        Raises:
            Misconfigured: a rule raised, or did not run.
            NeedsDecision: a rule failed without saying which rows.
        """
        if not rules:
            return []
        results = self._results(rules, frame)
        broken = [f"{rule.label}: {fault}" for rule in rules if (fault := _complaint(rule, results.get(rule.number)))]
        if broken:
            raise Misconfigured.all_at_once(
                f"{self._source.title}: expectations.yaml, rules that could not run", broken
            )
        failed = [rule for rule in rules if not results[rule.number].success]
        stopped = [rule for rule in failed if not rule.judges_rows or _labels(results[rule.number]) is None]
        if stopped:
            lines = (f"{rule.label}: {rule.reason}; observed {_observed(results[rule.number])}" for rule in stopped)
            raise NeedsDecision(
                "\n".join([f"{self._source.title}: the rows as a whole are not as expected; nothing was sent", *lines])
            )
        return [(rule, self._rows_of(rule, results[rule.number], frame)) for rule in failed]

    def _results(self, rules: list[_Rule], frame: pd.DataFrame) -> dict[int, Any]:
        from great_expectations import ExpectationSuite  # noqa: PLC0415 - See `_great_expectations`.
        from great_expectations.validator.v1_validator import Validator  # noqa: PLC0415

        suite = ExpectationSuite(name=self._source.name, expectations=[rule.expectation for rule in rules])
        # What `Batch.validate` does inside, less a batch made beforehand: making one hashes the whole frame.
        validator = Validator(self._batches, batch_parameters={"dataframe": frame}, result_format="COMPLETE")
        found = validator.validate_expectation_suite(suite)
        return {result.expectation_config.meta["rule"]: result for result in found.results}

    def _rows_of(self, rule: _Rule, result: Any, frame: pd.DataFrame) -> np.ndarray:
        rows = np.asarray(_labels(result), dtype="int64")
        if rule.on_ranks:
            # What is null or no number has no rank; that is told by the package's own rules.
            rows = rows[frame[_RANK].to_numpy()[rows] >= 0]
        return rows


def _great_expectations() -> Any:
    """Return what makes batches of data frames, in a context of its own without files, telemetry, bars or chatter."""
    # Its import takes seconds, which only the task that validates should pay.
    import logging  # noqa: PLC0415

    import great_expectations  # noqa: PLC0415
    from great_expectations.data_context.types.base import ProgressBarsConfig  # noqa: PLC0415

    # Some of its modules set a level of their own, so silencing the topmost logger is not enough.
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "great_expectations":
            logging.getLogger(name).setLevel(logging.CRITICAL)
    context = great_expectations.get_context(mode="ephemeral")
    context.enable_analytics(enable=False)
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("extraction").add_dataframe_asset("part")
    return asset.add_batch_definition_whole_dataframe("whole")


def _label(number: int, rule: Mapping[str, Any]) -> str:
    columns = rule.get("kwargs", {}).get("column")
    return f"expectations.{number} ({rule['type']}{f' on {columns}' if columns else ''})"


def _reason(rule: Mapping[str, Any]) -> str:
    meta = rule.get("meta")
    if isinstance(meta, Mapping) and meta.get("reason"):
        return str(meta["reason"])
    kwargs = dict(rule.get("kwargs", {}))
    column = kwargs.pop("column", None)
    text = " ".join(rule["type"].removeprefix("expect_").removeprefix("column_").split("_"))
    details = ", ".join(f"{key} {value}" for key, value in kwargs.items())
    return f"{f'{column}: ' if column else ''}{text}{f' ({details})' if details else ''}"


def _near(kind: str, known: Sequence[str]) -> str:
    import difflib  # noqa: PLC0415

    close = difflib.get_close_matches(kind, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _columns(kwargs: Mapping[str, Any]) -> list[str]:
    named = [kwargs.get(key) for key in ("column", "column_A", "column_B")] + _listed(kwargs.get("column_list"))
    return [str(column) for column in named if column is not None]


def _listed(value: object) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _row_faults(kwargs: Mapping[str, Any], *, judges_rows: bool) -> Iterator[str]:
    if judges_rows and kwargs.get("mostly", 1) != 1:
        yield "every row is judged by itself: remove mostly; quarantine.max_share in source.yaml limits the bad ones"


def _argument_faults(error: Exception) -> list[str]:
    described = getattr(error, "errors", None)
    if not callable(described):
        return [str(error)]
    return [
        f"{'.'.join(str(step) for step in fault['loc'] if step != '__root__')}: {fault['msg']}".removeprefix(": ")
        for fault in described()
    ]


def _exact(value: object) -> Decimal:
    """Return a number of the suite as it was written.

    Raises:
        ValueError: it is no number, or it is a float with more digits than a float can be trusted with.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError(f"{value!r} is no number")  # noqa: TRY004 - Told with the other faults of the file.
    try:
        number = Decimal(repr(value) if isinstance(value, float) else value)
    except InvalidOperation:
        raise ValueError(f"{value!r} is no number") from None
    if not number.is_finite():
        raise ValueError(f"{value!r} is no finite number")
    if isinstance(value, float) and len(number.normalize().as_tuple().digits) > 15:  # noqa: PLR2004
        raise ValueError(f"{value!r} has more than 15 digits; write it in quotes, so that it is read exactly")
    return number


def _complaint(rule: _Rule, result: Any) -> str:
    """Return why a rule did not run, empty if it did."""
    if result is None:
        return "Great Expectations left it out; check its type and arguments"
    information = result.exception_info or {}
    raised = [information] if "raised_exception" in information else list(information.values())
    messages = {str(entry.get("exception_message")) for entry in raised if entry.get("raised_exception", True)}
    if messages:
        return f"raised: {'; '.join(sorted(messages))}; mend its arguments, or the column's type in usage.sql"
    return "gave no result; check its arguments" if rule.judges_rows and not result.result else ""


def _labels(result: Any) -> list[int] | None:
    labels: list[int] | None = result.result.get("unexpected_index_list")
    return labels


def _observed(result: Any) -> str:
    found = {key: result.result[key] for key in ("observed_value", "unexpected_count") if key in result.result}
    return str(found.get("observed_value", found.get("unexpected_count", "no value")))
