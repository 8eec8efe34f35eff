"""The source's suite: its expectations, checked before a row is judged, and run by Great Expectations.

A rule that could not run stops the run: it never counts as passed. Great Expectations itself leaves some of these out
in silence. The package's own rules are always on; the suite may name them, to give a reason or to stop the run.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.by_value import Verdicts
from usage_billing.data_docs import SHOWN, OwnVerdict, ValidationResult, Verdict
from usage_billing.errors import Misconfigured, NeedsDecision
from usage_billing.sources import BillingSource, meta_faults
from usage_billing.staging import array_of
from usage_billing.trailing import Measures

log = logging.getLogger(__name__)

DUPLICATE = "duplicate event id"
KNOWN_ACCOUNT = "expect_account_to_be_known"
"""The own rule whose reason the billing site gives, in its words."""
BEFORE_THE_END = "expect_time_before_end_of_subscription"
UNIQUE_ID = "expect_event_id_to_be_unique"
QUANTITIES = ("expect_quantity_to_be_a_number", "expect_quantity_to_fit_digits", "expect_quantity_to_fit_decimals")
"""The own rules about a quantity that is added or compared, in the order of `quantities.faults`."""

_OWN = {
    "expect_event_id_to_not_be_null": "no event id",
    "expect_time_to_not_be_null": "no time",
    "expect_time_to_be_readable": "a time that is none, or has no zone (naive_times in source.yaml says which)",
    "expect_account_to_not_be_null": "no account",
    "expect_quantity_to_not_be_null": "no quantity",
    **dict(zip(QUANTITIES, ("not a number", "too large", "more than {} decimal places"), strict=True)),
    "expect_time_inside_usage_periods": "time outside the usage periods",
    "expect_time_not_in_future": "time in the future",
    KNOWN_ACCOUNT: "",
    BEFORE_THE_END: "used after its subscription had ended",
    UNIQUE_ID: DUPLICATE,
}
_RANK = "quantity (rank)"


@dataclass(frozen=True, slots=True)
class _Rule:
    """One expectation of the suite, ready for Great Expectations.

    `columns` are those it needs, none if it may need any; `looks_at` is rows if it names the rows that fail it, else
    first (the first part, which has to be all), count (of the rows), or a table of `Measures`; `on_ranks` if it
    compares ranks in place of quantities; `stops` if rows that fail it stop the run.
    """

    number: int
    label: str
    reason: str
    expectation: Any
    columns: frozenset[str]
    looks_at: str
    on_ranks: bool
    stops: bool

    @property
    def by_value(self) -> bool:
        """Whether its verdict on a row hangs on the value of one column alone, of which there are few."""
        return self.looks_at == "rows" and len(self.columns) == 1 and self.columns.isdisjoint(_MANY_VALUES)


# Each row has another one, as a rule.
_MANY_VALUES = frozenset({"event_id", "time", "quantity"})
_NO_ROWS = np.zeros(0, dtype="int64")

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
_SUMS = "expect_period_quantity_sums_to_be_usual"
_WHOLE_READING = frozenset(
    {
        "expect_period_row_counts_to_be_usual",
        _SUMS,
        "expect_latest_time_to_be_recent",
        "expect_query_columns_to_be_unchanged",
    }
)
# Great Expectations takes these for itself: the first would change what it hands back, the others do nothing here.
_NOT_HERE = frozenset(
    {
        "result_format", "batch_id", "catch_exceptions", "description", "id", "meta", "notes", "rendered_content",
        "severity", "windows",
    }
)  # fmt: skip


def judges_nothing_read(source: BillingSource) -> bool:
    """Say whether the source's suite has a rule that an extraction without rows could fail."""
    return any(rule["type"] in _ROW_COUNTS | _WHOLE_READING for rule in source.expectations)


@dataclass(frozen=True, slots=True)
class _Own:
    """One of the package's own rules, as the suite has it: by its name alone where the suite does not name it."""

    label: str
    reason: str
    stops: bool = False


class Suite:
    """The source's expectations, built and checked once per run.

    Great Expectations keeps bounds as floats, and compares decimals in a Python loop. So where a rule compares the
    quantity with numbers, both sides are given as ranks among all numbers of the suite (`quantities.ranks`): small
    integers, compared exactly and in bulk.
    """

    def __init__(self, source: BillingSource, rows: int, result: ValidationResult | None = None) -> None:
        self._source = source
        self._rows = rows
        self._verdicts: dict[int, Verdict] = (result or ValidationResult()).verdicts
        self._bounds: list[Decimal] = []
        self._rules: list[_Rule] = []
        self._own = {name: _Own(name, text) for name, text in _own_reasons(source).items()}
        if source.expectations:
            self._batches = _great_expectations()
            self._build()
        self._by_value = _by_value(self._of("rows"))

    @property
    def _compares_quantity(self) -> bool:
        return self._source.settings.meter.function in {"sum", "max", "last"}

    def _build(self) -> None:
        faults: list[str] = []
        declared = list(enumerate(self._source.expectations))
        numbers = {number: self._numbers(number, rule, faults) for number, rule in declared}
        self._bounds = sorted({bound for bounds in numbers.values() for bound in bounds or []})
        for number, rule in declared:
            if rule["type"] in _OWN:
                self._name(number, rule, faults)
            elif numbers[number] is not None and (built := self._rule(number, rule, faults)):
                self._rules.append(built)
                stops = built.stops or built.looks_at != "rows"
                kwargs = rule.get("kwargs", {})
                self._verdicts[number] = Verdict(built.label, rule["type"], kwargs, built.reason, stops)
        faults.extend(self._shared_reasons())
        if faults:
            raise Misconfigured.all_at_once(f"{self._source.title}: expectations.yaml", faults)

    def _name(self, number: int, rule: Mapping[str, Any], faults: list[str]) -> None:
        """Take in what the suite says of one of the package's own rules."""
        label, own = _label(number, rule), self._own.get(rule["type"])
        found = list(meta_faults(rule.get("meta")))
        if own is None:
            found.append(f"meter {self._source.settings.meter.function} has no such rule; remove it")
        elif own.label != rule["type"]:
            found.append(f"is there before, as {own.label}; keep one of them")
        if rule.get("kwargs"):
            found.append("takes no arguments: the rule is always on; leave kwargs out")
        if found or own is None:
            faults.extend(f"{label}: {fault}" for fault in found)
            return
        meta = rule.get("meta") or {}
        self._own[rule["type"]] = _Own(label, meta.get("reason", own.reason), meta.get("severity") == "stop")

    def own_verdicts(
        self, reasons: Mapping[str, int] | None = None, unknown: AbstractSet[str] = frozenset()
    ) -> list[OwnVerdict]:
        """Return the package's own rules, each with the rows that failed it, if the rows by reason are known.

        `unknown` are the reasons that stand for `KNOWN_ACCOUNT`.
        """
        told = {name: unknown if name == KNOWN_ACCOUNT else {own.reason} for name, own in self._own.items()}
        return [
            OwnVerdict(own.label, own.reason, own.stops, _rows_told(told[name], reasons))
            for name, own in self._own.items()
        ]

    def _shared_reasons(self) -> Iterator[str]:
        """Yield which rules could not be told from others that do not stop: rows are counted by their reason."""
        told = defaultdict(list)
        for rule in self._about_rows():
            told[rule.reason].append(rule)
        for reason, rules in told.items():
            if reason and len({rule.stops for rule in rules}) > 1:
                stopping = next(rule for rule in rules if rule.stops)
                other = next(rule for rule in rules if not rule.stops)
                yield f"{stopping.label}: stops, and {other.label} does not, and both say {reason!r}: give it another"

    def reason(self, name: str) -> str:
        """Return what a row is told that breaks one of the package's own rules; it is on whatever the suite says."""
        return self._own[name].reason

    def stopping(self) -> dict[str, str]:
        """Return the rules of which one bad row stops the run, but for `KNOWN_ACCOUNT`: label by reason."""
        return {rule.reason: rule.label for rule in self._about_rows() if rule.stops and rule.reason}

    def _about_rows(self) -> list["_Rule | _Own"]:
        return [*self._of("rows"), *self._own.values()]

    def stops_at_unknown_accounts(self) -> str:
        """Return the label of `KNOWN_ACCOUNT` if an unknown account stops the run, else nothing."""
        return self._own[KNOWN_ACCOUNT].label if self._own[KNOWN_ACCOUNT].stops else ""

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
            known = [*registry.list_registered_expectation_implementations(), *_OWN]
            faults.append(f"{label}: no such expectation{_near(rule['type'], known)}")
            return None
        by_row = (
            expectation.ColumnMapExpectation,
            expectation.ColumnPairMapExpectation,
            expectation.MulticolumnMapExpectation,
        )
        looks_at = _looks_at(rule["type"], implementation, by_row)
        meta = rule.get("meta")
        found = [*meta_faults(meta), *self._column_faults(kwargs, rule["type"]), *_kwargs_faults(kwargs, looks_at)]
        found.extend(self._reach_faults(rule["type"], looks_at))
        stops = isinstance(meta, Mapping) and meta.get("severity") == "stop"
        if isinstance(meta, Mapping) and meta.get("severity") == "quarantine" and looks_at != "rows":
            found.append("meta.severity: names no rows, so it cannot quarantine: it stops the run; remove the key")
        if self._on_ranks(rule):
            kwargs = self._ranked(kwargs)
        try:
            accepted = {key: value for key, value in kwargs.items() if key not in _NOT_HERE}
            built = implementation(**accepted, meta={"rule": number})
        except (ValueError, TypeError) as error:
            found.extend(_argument_faults(error))
        if found:
            faults.extend(f"{label}: {fault}" for fault in found)
            return None
        simple = looks_at == "rows" and not kwargs.get("row_condition")
        columns = frozenset(_columns(kwargs)) if simple else frozenset[str]()
        return _Rule(number, label, _reason(rule), built, columns, looks_at, self._on_ranks(rule), stops)

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

    def _reach_faults(self, kind: str, looks_at: str) -> Iterator[str]:
        meter = self._source.settings.meter
        if kind == _SUMS and meter.function != "sum":
            yield f"meter {meter.function} is no sum; remove the rule"
        whole = looks_at != "first" or kind in _SCHEMA or self._rows <= self._source.settings.batch_rows
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

    def check_whole(self, first: pa.Table, measures: Measures) -> None:
        """Judge the rules about the extraction as a whole that need no verdict on its rows.

        Raises:
            NeedsDecision: some of them failed; all of them are told.
            Misconfigured: one of them could not run, or looks at all rows, which came in several parts.
        """
        reaching = [rule for rule in self._of("first") if rule.expectation.expectation_type not in _SCHEMA]
        if reaching and len(first) != self._rows:
            # Parts are also cut where a driver changes a column's type.
            faults = [f"{rule.label}: looks at all rows at once, but they came in several types" for rule in reaching]
            raise Misconfigured.all_at_once(f"{self._source.title}: usage.sql, cast the quantity to one type", faults)
        frame = self._frame(first, self._of("first"))
        self._tell(*self._judged(measures, "count", "periods", "columns"), self._results(self._of("first"), frame))

    def check_nothing_read(self, measures: Measures) -> None:
        """Judge an extraction without rows, by the rules that it could fail; raises as `check_whole` does."""
        self._tell(*self._judged(measures, "count", "periods", "sums", "columns"))

    def unusual_sums(self, measures: Measures) -> list[str]:
        """Return what is unusual about the sums of the accepted rows.

        Raises:
            Misconfigured: a rule about them could not run.
        """
        (verdicts,) = self._judged(measures, "sums")
        self._raise_if_broken(verdicts)
        return [_failure(rule, result) for rule, result in verdicts if not result.success]

    def findings(self, part: pa.Table, *, counts: bool = True) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each row rule's reason with the numbers of the rows that fail it; its verdict `counts` them, or not.

        Raises:
            Misconfigured: a rule could not run.
            NeedsDecision: a rule failed without saying which rows.
        """
        failing = self._failing(part)
        for rule in self._of("rows"):
            rows = failing[rule.number]
            if counts:
                self._verdicts[rule.number].of_rows(len(part), len(rows), _unexpected(rule, part, rows))
            if len(rows):
                yield rule.reason, rows

    def _failing(self, part: pa.Table) -> dict[int, np.ndarray]:
        """Return the rows that fail each rule about rows: values that were judged before are not judged again."""
        looked_up: list[tuple[Verdicts, list[_Rule], np.ndarray, np.ndarray]] = []
        direct = [rule for rule in self._of("rows") if not rule.by_value]
        for column, (rules, known) in self._by_value.items():
            numbered = known.values.number(self._values(part, column))
            if numbered is None:
                direct.extend(rules)
            else:
                looked_up.append((known, rules, *numbered))
        asked = [
            *([(direct, part)] if direct else []),
            *((rules, part.take(pa.array(new))) for _, rules, _, new in looked_up if len(new)),
        ]
        rows = self._judge_rows(asked)
        for known, rules, numbers, new in looked_up:
            for rule in rules:
                known.learn(rule.number, len(new), rows.get(rule.number, _NO_ROWS))
                rows[rule.number] = known.failing(rule.number, numbers)
        return rows

    def _values(self, part: pa.Table, column: str) -> pa.Array:
        if column != _RANK:
            return array_of(part, column)
        return pa.array(quantities.ranks(array_of(part, "quantity"), self._bounds))

    def _judge_rows(self, asked: Sequence[tuple[Sequence[_Rule], pa.Table]]) -> dict[int, np.ndarray]:
        """Run rules, each over the rows that it is asked about, and return which of those fail it."""
        frames = [(rules, self._frame(table, rules)) for rules, table in asked]
        verdicts = [(verdict, frame) for rules, frame in frames for verdict in self._results(rules, frame)]
        self._tell([verdict for verdict, _ in verdicts if _complaint(*verdict) or _names_no_row(verdict[1])])
        return {rule.number: self._rows_of(rule, result, frame) for (rule, result), frame in verdicts}

    def _of(self, looks_at: str) -> list[_Rule]:
        return [rule for rule in self._rules if rule.looks_at == looks_at]

    def _judged(self, measures: Measures, *looking_at: str) -> Iterator[list[tuple[_Rule, Any]]]:
        for looks_at in looking_at:
            if rules := self._of(looks_at):
                if looks_at == "count":
                    frame = pd.DataFrame(index=pd.RangeIndex(self._rows))
                elif looks_at == "columns":
                    frame = measures.by_column()
                else:
                    frame = measures.by_period(max(getattr(rule.expectation, "periods", 0) for rule in rules))
                yield self._results(rules, frame)
            else:
                yield []

    def _tell(self, *verdicts: Sequence[tuple[_Rule, Any]]) -> None:
        """Raise one error that tells all rules that failed, and with them those that could not run."""
        every = [verdict for some in verdicts for verdict in some]
        failed = [
            _failure(rule, result) for rule, result in every if not _complaint(rule, result) and not result.success
        ]
        if not failed:
            self._raise_if_broken(every)
            return
        broken = [
            f"{rule.label}: could not run: {fault}" for rule, result in every if (fault := _complaint(rule, result))
        ]
        lines = [f"{self._source.title}: the rows as a whole are not as expected; nothing was sent"]
        lines.extend(f"  - {line}" for line in (*failed, *broken))
        lines.append(
            "Mend the warehouse and clear the run from extract on. If they are right as they are, loosen the rule in "
            "expectations.yaml for this run before you clear it."
        )
        raise NeedsDecision("\n".join(lines))

    def _raise_if_broken(self, verdicts: Sequence[tuple[_Rule, Any]]) -> None:
        broken = [f"{rule.label}: {fault}" for rule, result in verdicts if (fault := _complaint(rule, result))]
        if broken:
            raise Misconfigured.all_at_once(
                f"{self._source.title}: expectations.yaml, rules that could not run", broken
            )

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

    def _results(self, rules: Sequence[_Rule], frame: pd.DataFrame) -> list[tuple[_Rule, Any]]:
        """Run rules over a frame and return each with its result, None where Great Expectations gave none."""
        if not rules:
            return []
        from great_expectations import ExpectationSuite  # noqa: PLC0415 - See `_great_expectations`.
        from great_expectations.validator.v1_validator import Validator  # noqa: PLC0415

        suite = ExpectationSuite(name=self._source.name, expectations=[rule.expectation for rule in rules])
        # What `Batch.validate` does inside, less a batch made beforehand: making one hashes the whole frame.
        validator = Validator(self._batches, batch_parameters={"dataframe": frame}, result_format="COMPLETE")
        found = {
            result.expectation_config.meta["rule"]: result
            for result in validator.validate_expectation_suite(suite).results
        }
        for rule in rules:
            result = found.get(rule.number)
            unjudged = result.result.get("unjudged") if result else None
            if unjudged:
                log.info("%s, %s: passes for want of history: %s", self._source.title, rule.label, unjudged)
            verdict = self._verdicts[rule.number]
            verdict.fault = _complaint(rule, result)
            if result and not verdict.fault and (rule.looks_at != "rows" or _names_no_row(result)):
                told = f"no history yet: {unjudged}" if unjudged else _observed(result)
                verdict.of_the_whole(success=result.success, observed=told)
        return [(rule, found.get(rule.number)) for rule in rules]

    def _rows_of(self, rule: _Rule, result: Any, frame: pd.DataFrame) -> np.ndarray:
        rows = np.asarray(_labels(result) or [], dtype="int64")
        if rule.on_ranks:
            # What is null or no number has no rank; that is told by the package's own rules.
            rows = rows[frame[_RANK].to_numpy()[rows] >= 0]
        return rows


def _great_expectations() -> Any:
    """Return what makes batches of data frames, in a context of its own without files, telemetry, bars or chatter."""
    # Its import tells dozens of lines of its own, in each task log.
    logging.getLogger("great_expectations").setLevel(logging.CRITICAL)
    # And takes seconds, which only the task that validates should pay.
    import great_expectations  # noqa: PLC0415
    from great_expectations.data_context.types.base import ProgressBarsConfig  # noqa: PLC0415

    import usage_billing.expectations  # noqa: F401, PLC0415 - Registers them.

    # Some of its modules set a level of their own, so silencing the topmost logger is not enough.
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "great_expectations":
            logging.getLogger(name).setLevel(logging.CRITICAL)
    context = great_expectations.get_context(mode="ephemeral")
    context.enable_analytics(enable=False)
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("extraction").add_dataframe_asset("part")
    return asset.add_batch_definition_whole_dataframe("whole")


def _by_value(rules: Sequence[_Rule]) -> dict[str, tuple[list[_Rule], Verdicts]]:
    """Return the rules whose verdict on a row hangs on one column's value alone, by column, with a memory for each."""
    found: dict[str, list[_Rule]] = defaultdict(list)
    for rule in rules:
        if rule.by_value:
            found[next(iter(rule.columns))].append(rule)
    return {column: (some, Verdicts([rule.number for rule in some])) for column, some in found.items()}


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


def _own_reasons(source: BillingSource) -> dict[str, str]:
    """Return the package's own rules that a source's rows are judged by, each with its reason."""
    meter = source.settings.meter
    left_out: set[str] = set()
    if meter.function not in {"sum", "max", "last"}:
        left_out.update(QUANTITIES)
    if meter.function == "count":
        left_out.add("expect_quantity_to_not_be_null")
    told = {
        name: f"quantity: {text}".format(meter.decimals) if name in QUANTITIES else text for name, text in _OWN.items()
    }
    return {name: text for name, text in told.items() if name not in left_out}


def _looks_at(kind: str, implementation: Any, by_row: tuple[Any, ...]) -> str:
    if kind in _WHOLE_READING:
        return str(implementation.looks_at)
    if issubclass(implementation, by_row) and kind not in _ACROSS_ROWS:
        return "rows"
    return "count" if kind in _ROW_COUNTS else "first"


def _kwargs_faults(kwargs: Mapping[str, Any], looks_at: str) -> Iterator[str]:
    for key in sorted(_NOT_HERE.intersection(kwargs)):
        where = "it belongs under meta, as quarantine or stop" if key == "severity" else "remove it"
        yield f"{key}: Great Expectations would take it, and it would change nothing here: {where}"
    if looks_at == "rows" and kwargs.get("mostly", 1) != 1:
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
    return "gave no result; check its arguments" if rule.looks_at == "rows" and not result.result else ""


def _names_no_row(result: Any) -> bool:
    return not result.success and _labels(result) is None


def _failure(rule: _Rule, result: Any) -> str:
    return f"{rule.label}: {rule.reason}; observed {_observed(result)}"


def _labels(result: Any) -> list[int] | None:
    labels: list[int] | None = result.result.get("unexpected_index_list")
    return labels


def _unexpected(rule: _Rule, part: pa.Table, rows: np.ndarray) -> Sequence[object]:
    """Return some values that a rule did not expect: quantities as they were read, never their ranks."""
    rows = rows[:SHOWN]
    if rule.on_ranks:
        found: list[object] = quantities.plain_text(array_of(part, "quantity").take(pa.array(rows))).to_pylist()
        return found
    columns = sorted(rule.columns) or part.column_names
    named: list[dict[str, object]] = part.select(columns).take(pa.array(rows)).to_pylist()
    return [row[columns[0]] if len(columns) == 1 else row for row in named]


def _rows_told(words: AbstractSet[str], reasons: Mapping[str, int] | None) -> int | None:
    return None if reasons is None else sum(reasons.get(word, 0) for word in words)


def _observed(result: Any) -> str:
    found = {key: result.result[key] for key in ("observed_value", "unexpected_count") if key in result.result}
    return str(found.get("observed_value", found.get("unexpected_count", "no value")))
