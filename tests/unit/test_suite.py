"""What a source's suite says of rows and of the reading as a whole, by Great Expectations itself."""

import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from stage_helpers import DAYS, START, Remembered, known, make_source, read, rows, stage
from usage_billing.errors import Misconfigured, NeedsDecision
from usage_billing.extract import extract
from usage_billing.records import EVER, Measured, Period, Target
from usage_billing.sources import meta_faults
from usage_billing.staging import Staging
from usage_billing.suite import DUPLICATE, judges_nothing_read
from usage_billing.validate import ValidationStopped, check_nothing_read, validate

DAY = timedelta(days=1)
TODAY = DAYS[:1]


@pytest.fixture
def staging(tmp_path):
    """Stage below a temporary folder."""
    return Staging(tmp_path)


@pytest.fixture
def judge(staging):
    """Validate parts by a suite and return what came of it."""

    def run(*parts, suite, resolve=known, periods=DAYS, history=None, **source):
        extracted = stage(staging, *parts)
        source = make_source(expectations=suite, **source)
        return validate(extracted, source, periods, resolve, staging, "run", history or Remembered())

    return run


def rule(kind, /, **kwargs):
    """Return an expectation as YAML gives it; `reason` and `severity` go under its meta."""
    meta = {key: kwargs.pop(key) for key in ("reason", "severity") if key in kwargs}
    return {"type": f"expect_{kind}", "kwargs": kwargs, "meta": meta}


def reasons(staging, found):
    """Return the reasons of each quarantined row by its event id."""
    quarantined = read(staging, found.quarantined)
    return dict(zip(quarantined["event_id"].to_pylist(), quarantined["reasons"].to_pylist(), strict=True))


def not_negative(**meta):
    """Return the rule that a quantity is not negative."""
    return rule("column_values_to_be_between", column="quantity", min_value=0, **{"reason": "negative", **meta})


GONE = "the site has no such account"


def unknown_if_gone(names):
    """Resolve accounts; the site says of one that it is gone."""
    return [Target(name, unknown=GONE if name == "gone" else "") for name in names]


# --- severity --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_rows", [1, 2, 9])
def test_a_row_that_stops_the_run_is_written_and_named_first(judge, staging, batch_rows):
    """Every row is judged and staged with its reason; then the run ends, and tells how many and which."""
    parts = [rows(("a", 1, "x", "-1")), rows(("b", 1, "x", "2")), rows(("c", 1, "x", "-3"), ("d", 1, None, "1"))]
    with pytest.raises(ValidationStopped) as error:
        judge(*parts, suite=[not_negative(severity="stop")], batch_rows=batch_rows)
    assert isinstance(error.value, NeedsDecision)
    told = "expectations.0 (expect_column_values_to_be_between on quantity), severity stop: 2 rows: negative"
    assert f"{told} (for example a, c)" in str(error.value)
    assert "no account  (d)" in str(error.value)
    assert reasons(staging, error.value.validated) == {"a": ["negative"], "c": ["negative"], "d": ["no account"]}
    assert error.value.validated.accepted.rows == 1


def test_a_rule_that_stops_and_finds_nothing_stops_nothing(judge):
    """One without a bad row is no reason to stop, nor is a bad row of another rule."""
    suite = [
        not_negative(severity="stop"),
        rule("column_values_to_not_be_null", column="account", severity="quarantine"),
    ]
    assert judge(rows(("a", 1, "x", "1"), ("b", 1, None, "1")), suite=suite).accepted.rows == 1


def test_limits_and_rules_that_stop_are_told_in_one_error(judge):
    """A person who mends one of them does not meet the next one afterwards."""
    part = rows(("a", 1, "x", "-1"), ("b", 1, "gone", "1"), ("c", 1, "x", "1"))
    suite = [not_negative(severity="stop"), rule("account_to_be_known", severity="stop")]
    limits = {"max_rows": 1, "max_share": 0.1}
    with pytest.raises(ValidationStopped) as error:
        judge(part, suite=suite, resolve=unknown_if_gone, quarantine=limits)
    first, *lines = str(error.value).splitlines()
    assert first == "calls: validation stops the run; nothing was sent"
    assert [line.strip() for line in lines[:3]] == [
        "- 2 of 3 rows are quarantined, more than quarantine.max_rows = 1 and more than quarantine.max_share = 0.1",
        f"- expectations.0 ({not_negative()['type']} on quantity), severity stop: 1 row: negative (for example a)",
        f"- expectations.1 (expect_account_to_be_known), severity stop: 1 row: {GONE} (for example b)",
    ]


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        (not_negative(severity="warning"), "meta.severity: 'warning' is neither quarantine"),
        (not_negative() | {"meta": {"severitty": "stop"}}, "meta: unknown key severitty; known keys: reason, severity"),
        (not_negative(reason=7), "meta.reason: 7 is no text"),
        (not_negative(reason=" "), "meta.reason: ' ' is no text"),
        (not_negative() | {"meta": "stop"}, "meta: must be a mapping"),
        (rule("table_row_count_to_equal", value=2, severity="quarantine"), "names no rows, so it cannot quarantine"),
        (rule("latest_time_to_be_recent", within="1d", severity="quarantine"), "cannot quarantine"),
        (rule("account_to_be_known", severity="warning"), "meta.severity: 'warning'"),
        (rule("account_to_be_known", column="account"), "takes no arguments"),
        (rule("acount_to_be_known"), "no such expectation; did you mean expect_account_to_be_known?"),
        (not_negative(reason="no time", severity="stop"), "both say 'no time': give it another"),
        (not_negative() | {"kwargs": {"column": "quantity", "min_value": 0, "severity": "critical"}}, "under meta"),
        (not_negative() | {"kwargs": {"column": "quantity", "min_value": 0, "windows": []}}, "windows: Great Expect"),
    ],
)
def test_a_wrong_word_about_a_rule_is_told_with_its_mend(judge, declared, told):
    """Together with whatever else is wrong with the suite, before a row is judged."""
    with pytest.raises(Misconfigured) as error:
        judge(rows(("a", 1, "x", 1)), suite=[declared, rule("nonsense")])
    assert "2 faults" in str(error.value)
    assert "expectations.0" in str(error.value)
    assert told in str(error.value)


def test_nothing_is_wrong_with_a_rule_without_meta():
    """Neither with none nor with an empty one."""
    assert [*meta_faults(None), *meta_faults({}), *meta_faults({"reason": "it is", "severity": "stop"})] == []


def test_a_source_without_a_suite_pays_nothing_for_one(tmp_path):
    """Great Expectations takes seconds to import: whoever has no rule of theirs does not wait for it."""
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])\n"
        "from stage_helpers import *; from usage_billing.validate import validate\n"
        "staging = Staging(Path(sys.argv[2]))\n"
        "validate(stage(staging, rows(('a', 1, 'x', 1))), make_source(), DAYS, known, staging, 'run', Remembered())\n"
        "print('great_expectations' in sys.modules)"
    )
    folder = Path(__file__).parents[1]
    command = [sys.executable, "-c", program, str(folder), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(folder.parent / "plugins")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)  # noqa: S603
    assert done.stdout.splitlines() == ["False"]


# --- the package's own rules -----------------------------------------------------------------------------------------


OWN = {
    "event_id_to_not_be_null": (None, 1, "x", "1"),
    "time_to_not_be_null": ("notime", None, "x", "1"),
    "account_to_not_be_null": ("nobody", 1, None, "1"),
    "quantity_to_not_be_null": ("none", 1, "x", None),
    "quantity_to_be_a_number": ("text", 1, "x", "many"),
    "quantity_to_fit_digits": ("large", 1, "x", "9" * 30),
    "quantity_to_fit_decimals": ("fine", 1, "x", "0.001"),
    "time_inside_usage_periods": ("early", -1, "x", "1"),
    "time_not_in_future": ("future", 71, "x", "1"),
    "account_to_be_known": ("gone", 1, "gone", "1"),
    "event_id_to_be_unique": ("sound", 2, "x", "1"),
}
SOON = Remembered(moment=DAYS[2].end - 2 * timedelta(hours=1))


@pytest.mark.parametrize("batch_rows", [1, 4, 99])
def test_the_packages_own_rules_take_reasons_of_the_suites(judge, staging, batch_rows):
    """Each one's text is the suite's, and the site's own words stay behind it; each finds its row as ever."""
    suite = [rule(name, reason=f"our {name}") for name in OWN]
    parts = [rows(row, quantity=pa.string()) for row in (*OWN.values(), ("sound", 1, "x", "1"))]
    found = judge(*parts, suite=suite, resolve=unknown_if_gone, history=SOON, batch_rows=batch_rows)
    words = {name: f"our {name}" for name in OWN}
    words["account_to_be_known"] += f": {GONE}"
    assert reasons(staging, found) == {row[0]: [words[name]] for name, row in OWN.items()}
    assert read(staging, found.accepted)["event_id"].to_pylist() == ["sound"]


@pytest.mark.parametrize("name", OWN)
def test_any_of_the_packages_own_rules_may_stop_the_run(judge, name):
    """By its default words, and only when a row breaks it."""
    sound = rows(("sound", 1, "x", "1"), ("other", 1, "y", "1"))
    suite = [rule(name, severity="stop")]
    judge(sound, suite=suite, resolve=unknown_if_gone, history=SOON)
    with pytest.raises(ValidationStopped, match=rf"expectations\.0 \(expect_{name}\), severity stop: 1 row"):
        judge(sound, rows(OWN[name], quantity=pa.string()), suite=suite, resolve=unknown_if_gone, history=SOON)


def test_the_packages_own_rules_cannot_be_left_out(judge, staging):
    """They are on without a suite, and what comes after the reading was taken up is no usage yet."""
    parts = [rows(row, quantity=pa.string()) for row in (*OWN.values(), ("sound", 1, "x", "1"))]
    found = judge(*parts, suite=[], resolve=unknown_if_gone, history=SOON)
    told = reasons(staging, found)
    assert len(told) == len(OWN)
    assert (told["future"], told["sound"]) == (["time in the future"], [DUPLICATE])
    moment = SOON.moment
    edge = rows(("now", moment, "x", 1), ("after", moment + timedelta(microseconds=1), "x", 1))
    assert reasons(staging, judge(edge, suite=[], history=SOON)) == {"after": ["time in the future"]}


def test_what_a_site_says_of_many_accounts_is_one_line(judge):
    """Each account may have words of its own; the line counts them, and the table below has them all."""
    resolve = lambda names: [Target(name, unknown=f"no account {name}") for name in names]  # noqa: E731
    part = rows(("a", 1, "x", 1), ("b", 1, "y", 1), ("c", 1, "y", 1))
    with pytest.raises(ValidationStopped) as error:
        judge(part, suite=[rule("account_to_be_known", severity="stop")], resolve=resolve)
    assert "severity stop: 3 rows: no account y (for example b, c), among 2 reasons\n" in str(error.value)
    assert "1  no account x  (a)" in str(error.value)


@pytest.mark.parametrize(
    ("name", "function"), [("quantity_to_fit_decimals", "unique"), ("quantity_to_not_be_null", "count")]
)
def test_a_rule_that_the_meter_has_not_is_refused(judge, name, function):
    """To name it would promise a check that nobody makes."""
    with pytest.raises(Misconfigured, match=f"meter {function} has no such rule"):
        judge(rows(("a", 1, "x", 1)), suite=[rule(name)], meter={"function": function})


def test_a_rule_of_the_package_is_named_once(judge):
    """Two entries could say two things of it."""
    with pytest.raises(Misconfigured, match=r"expectations\.1 .*is there before, as expectations\.0"):
        judge(
            rows(("a", 1, "x", 1)), suite=[rule("event_id_to_be_unique", reason="one"), rule("event_id_to_be_unique")]
        )


# --- against what is usual -------------------------------------------------------------------------------------------


def usually(*values):
    """Return a history of days before START, the newest first; a day had that many rows, and adds up to that much."""
    days = (Period(START - DAY * number, START - DAY * (number - 1)) for number in range(1, len(values) + 1))
    found = [Measured(day, int(Decimal(value)), 0, Decimal(value)) for day, value in zip(days, values, strict=True)]
    return Remembered(measured=found)


def day_of(*quantities):
    """Return rows of the first day, one per quantity."""
    return rows(*((f"e{place}", 1, "x", quantity) for place, quantity in enumerate(quantities)), quantity=pa.string())


COUNTS = rule("period_row_counts_to_be_usual", periods=4, at_least=3, min_share=0.5, max_share=2)
SUMS = rule("period_quantity_sums_to_be_usual", periods=4, at_least=3, min_share=0.5, max_share=2)


@pytest.mark.parametrize("batch_rows", [1, 3, 99])
@pytest.mark.parametrize(("count", "told"), [(1, "has 1 rows"), (2, ""), (8, ""), (9, "has 9 rows")])
def test_a_usage_period_has_about_as_many_rows_as_usual(judge, count, told, batch_rows):
    """Between half and twice the lower middle of the last four; what was before these four does not count."""
    parts = [day_of(*["1"] * count)] if batch_rows == 99 else [day_of("1")] * count
    history = usually("4", "5", "3", "9", "100", "100")
    if not told:
        judge(*parts, suite=[COUNTS], history=history, periods=TODAY, batch_rows=batch_rows)
        return
    with pytest.raises(NeedsDecision, match="as a whole") as error:
        judge(*parts, suite=[COUNTS], history=history, periods=TODAY, batch_rows=batch_rows)
    assert f"2026-10-01T00:00Z to 2026-10-02T00:00Z {told}" in str(error.value)
    assert "and the usual of the last 4 usage periods is 4" in str(error.value)
    assert not isinstance(error.value, ValidationStopped)


@pytest.mark.parametrize("suite", [COUNTS, SUMS])
def test_with_too_little_history_it_passes_and_says_so(judge, suite, caplog):
    """Two days are no habit; the log says that nothing was judged, and why."""
    caplog.set_level(logging.INFO)
    judge(day_of("1"), suite=[suite], history=usually("90", "90"), periods=TODAY)
    assert "passes for want of history: 2026-10-01T00:00Z" in caplog.text
    assert "2 usage periods of history, at_least 3" in caplog.text


@pytest.mark.parametrize(
    ("quantities", "usual", "stops"),
    [
        (["0.05", "0.10"], "0.30", False),
        (["0.05", "0.0999"], "0.30", True),
        (["0.30", "0.30"], "0.30", False),
        (["0.30", "0.3001"], "0.30", True),
        (["999999999999.99"] * 2, "999999999999.99", False),
        (["999999999999.9901", "999999999999.99"], "999999999999.99", True),
        (["-5"], "-10", False),
        (["-4.9999"], "-10", True),
        (["5"], "-10", True),
        ([], "10", True),
    ],
)
def test_what_is_accepted_adds_up_to_about_the_usual_exactly(judge, quantities, usual, stops):
    """Not a ten-thousandth off, and no float in between; a credit is usual where a credit is."""
    meter, history = {"function": "sum", "decimals": 4}, usually(usual, usual, usual)
    extra = rows(("bad", 1, None, "77"), quantity=pa.string())
    if not stops:
        judge(day_of(*quantities), extra, suite=[SUMS], history=history, periods=TODAY, meter=meter)
        return
    with pytest.raises(ValidationStopped, match="in all, and the usual of the last 3 usage periods is") as error:
        judge(day_of(*quantities), extra, suite=[SUMS], history=history, periods=TODAY, meter=meter)
    assert error.value.validated.quarantined.rows == 1


def test_a_usage_period_is_compared_with_those_before_it_alone(judge):
    """Of three days in one run the second lacks rows; a day that the ledger has of after it is no help."""
    part = rows(
        *((f"{day}{row}", 24 * day + row, "x", 1) for day, count in ((0, 4), (1, 1), (2, 4)) for row in range(count))
    )
    history = usually("4", "4", "4")
    history.measured = [Measured(DAYS[2], 1), Measured(DAYS[1], 1), *history.measured]
    with pytest.raises(NeedsDecision) as error:
        judge(part, suite=[COUNTS], history=history)
    assert "2026-10-02T00:00Z to 2026-10-03T00:00Z has 1 rows" in str(error.value)
    assert "2026-10-01T00:00Z to" not in str(error.value)
    assert "2026-10-03T00:00Z to" not in str(error.value)


def test_an_older_definition_is_no_habit(staging):
    """What was read before the source was defined as it is now may have been counted otherwise."""
    source, extracted = make_source(expectations=[COUNTS]), stage(staging, day_of("1"))
    history = usually("90", "90", "90")
    since = replace(source, span=Period(START - 2 * DAY, EVER.end))
    validate(extracted, since, TODAY, known, staging, "run", history)
    with pytest.raises(NeedsDecision, match="the usual of the last 3 usage periods is 90"):
        validate(extracted, source, TODAY, known, staging, "run", history)


# --- in time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hours", "stops"), [(23.5, False), (23, False), (22.99, True)])
def test_the_latest_event_is_near_the_end(judge, hours, stops):
    """An hour is allowed; an event outside the periods, or of the future, makes no old reading fresh."""
    part = rows(("a", 1, "x", 1), ("b", hours, None, 1), ("c", 900, "x", 1), ("d", None, "x", 1))
    suite = [rule("latest_time_to_be_recent", within="60m")]
    if not stops:
        judge(part, suite=suite, periods=TODAY)
        return
    with pytest.raises(
        NeedsDecision, match="the latest event is of 2026-10-01T22:59Z, the last usage period ends 2026-"
    ):
        judge(part, suite=suite, periods=TODAY)


def test_without_any_event_there_is_no_latest_one(judge):
    """All rows lie outside."""
    with pytest.raises(NeedsDecision, match="no event at all until 2026-10-02T00:00Z"):
        judge(rows(("a", 99, "x", 1)), suite=[rule("latest_time_to_be_recent", within="1d")], periods=TODAY)


# --- the columns of the query ----------------------------------------------------------------------------------------


def columns(**types):
    """Return one sound row with these columns more, each of a type."""
    more = {name: pa.array([None], kind) for name, kind in types.items()}
    return pa.table({"event_id": ["a"], "time": [START], "account": ["x"], "quantity": [1], **more})


@pytest.fixture
def drifted(staging):
    """Read a query's tables, and validate them after a reading whose columns are known."""

    def run(*tables, before, **kwargs):
        source = make_source(expectations=[rule("query_columns_to_be_unchanged", **kwargs)])
        extracted = extract(tables, source, staging, "run")
        history = Remembered(columns={"event_id": "string", "account": "string", **before})
        return validate(extracted, source, TODAY, known, staging, "run", history)

    return run


KNOWN = {"time": "timestamp[us, zoned]", "quantity": "int64"}


def test_columns_that_changed_are_named_and_how_to_accept_them(drifted):
    """New, missing and of another type, also such as the source does not name; the line to paste works."""
    table = columns(region=pa.string(), price=pa.decimal128(9, 2), note=pa.int64())
    before = {**KNOWN, "note": "string", "legacy": "int64"}
    with pytest.raises(NeedsDecision) as error:
        drifted(table, before=before)
    for told in (
        "column legacy (int64) is missing",
        "column note was string, and is int64",
        "column price (decimal128(9, 2)) is new",
        'accepted: {legacy: missing, note: int64, price: "decimal128(9, 2)", region: string}',
    ):
        assert told in str(error.value)
    accepted = {"legacy": "missing", "note": "int64", "price": "decimal128(9, 2)", "region": "string"}
    drifted(table, before=before, accepted=accepted)
    with pytest.raises(NeedsDecision) as error:
        drifted(columns(no=pa.timestamp("us")), before=KNOWN)
    (line,) = re.findall(r"accepted: ({.*})", str(error.value))
    drifted(columns(no=pa.timestamp("us")), before=KNOWN, accepted=yaml.safe_load(line))
    with pytest.raises(NeedsDecision, match="column note was string, and is double"):
        drifted(columns(note=pa.float64(), region=pa.string()), before={**KNOWN, "note": "string"}, accepted=accepted)


def test_what_is_the_same_in_other_words_is_no_drift(drifted):
    """A session's zone, a wider text, a dictionary, a part of only nulls: the column is what it was."""
    table = columns(a=pa.large_string(), b=pa.dictionary(pa.int8(), pa.string()), c=pa.timestamp("us", "Asia/Tokyo"))
    nulls = columns(a=pa.null(), b=pa.null(), c=pa.null())
    before = {**KNOWN, "a": "string", "b": "string", "c": "timestamp[us, zoned]"}
    drifted(table, nulls, before=before)
    drifted(nulls, before=before)
    drifted(table, before={**before, "a": "unseen"})


def test_a_column_of_two_types_is_told_as_such(drifted):
    """Some drivers type each batch by its values."""
    with pytest.raises(NeedsDecision, match="column note was string, and is int64 or string"):
        drifted(columns(note=pa.string()), columns(note=pa.int64()), before={**KNOWN, "note": "string"})


def test_the_first_reading_has_nothing_to_differ_from(staging, caplog):
    """It passes, and says so; one of which nobody noted the columns stops, since it could not be judged."""
    caplog.set_level(logging.INFO)
    source = make_source(expectations=[rule("query_columns_to_be_unchanged")])
    extracted = extract([columns()], source, staging, "run")
    validate(extracted, source, TODAY, known, staging, "run", Remembered())
    assert "no reading went on yet whose columns are known" in caplog.text
    with pytest.raises(Misconfigured, match="was not noted: clear the run from extract on"):
        validate(extracted, source, TODAY, known, staging, "another", Remembered())


# --- all of them -----------------------------------------------------------------------------------------------------


def test_all_that_is_wrong_with_a_reading_is_told_before_a_row_is_judged(judge):
    """Rows, time and a plain row count at once; the site was asked for no account."""

    def nobody(_):
        raise AssertionError("no account is looked up")

    suite = [
        COUNTS,
        rule("latest_time_to_be_recent", within="1h"),
        rule("table_row_count_to_be_between", min_value=3),
        rule("column_to_exist", column="region"),
        SUMS,
    ]
    with pytest.raises(NeedsDecision) as error:
        judge(day_of("1"), suite=suite, history=usually("4", "4", "4"), periods=TODAY, resolve=nobody)
    told = [line.strip() for line in str(error.value).splitlines() if line.startswith("  - ")]
    assert [line.split(" ")[1] for line in told] == [f"expectations.{place}" for place in (2, 0, 1, 3)]
    assert "Mend the warehouse and clear the run from extract on" in str(error.value)


def test_a_drift_is_told_even_where_another_rule_cannot_run_for_it(staging):
    """The type that changed is the reason; the rule that choked on it is told with it."""
    suite = [rule("query_columns_to_be_unchanged"), rule("column_max_to_be_between", column="account", max_value=1)]
    source = make_source(expectations=suite)
    extracted = extract([columns(region=pa.string())], source, staging, "run")
    history = Remembered(columns={"event_id": "string", "account": "string", **KNOWN})
    with pytest.raises(NeedsDecision, match="column region") as error:
        validate(extracted, source, TODAY, known, staging, "run", history)
    assert "expectations.1 (expect_column_max_to_be_between on account): could not run" in str(error.value)


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        (rule("period_row_counts_to_be_usual"), "needs min_share, max_share or both"),
        (rule("period_row_counts_to_be_usual", min_share=0.5, share=1), "share: extra fields not permitted"),
        (rule("period_row_counts_to_be_usual", min_share=2, max_share=1), "min_share 2 is more than max_share 1"),
        (rule("period_row_counts_to_be_usual", min_share="half"), "min_share: 'half' is no share"),
        (rule("period_row_counts_to_be_usual", min_share=-1), "min_share: -1 is no share"),
        (rule("period_row_counts_to_be_usual", max_share=float("nan")), "max_share: nan is no share"),
        (rule("period_row_counts_to_be_usual", min_share=1, periods=2.5), "periods: 2.5 is no number of usage periods"),
        (rule("period_row_counts_to_be_usual", min_share=1, at_least=0), "at_least: 0 is no number of usage periods"),
        (rule("period_row_counts_to_be_usual", min_share=1, periods=3), "at_least 7 is more than periods 3"),
        (rule("period_row_counts_to_be_usual", min_share=1, row_condition="x"), "row_condition: extra fields"),
        (rule("latest_time_to_be_recent"), "within: field required"),
        (rule("latest_time_to_be_recent", within="a day"), "within: 'a day' is no span of time"),
        (rule("latest_time_to_be_recent", within=24), "within: 24 is no span of time"),
        (rule("query_columns_to_be_unchanged", accepted=["region"]), "must give the new type of each column"),
        (rule("query_columns_to_be_unchanged", accepted={"region": None}), "must give the new type of each column"),
        (rule("period_row_count_to_be_usual"), "did you mean expect_period_row_counts_to_be_usual?"),
    ],
)
def test_a_rule_about_the_reading_with_wrong_arguments_is_told(judge, declared, told):
    """With what is wrong, and the place of the rule."""
    with pytest.raises(Misconfigured, match=r"expectations\.0") as error:
        judge(day_of("1"), suite=[declared], periods=TODAY)
    assert told in str(error.value)


def test_a_sum_of_what_is_no_sum_is_refused(judge):
    """Peaks do not add up to anything that is usual."""
    with pytest.raises(Misconfigured, match="meter max is no sum"):
        judge(day_of("1"), suite=[SUMS], meter={"function": "max"})


def test_nothing_read_is_judged_too(staging):
    """No rows are fewer than half of the usual, add up to nothing, and are not recent; without history they pass."""
    within = rule("latest_time_to_be_recent", within="1d")
    extracted = extract([columns().slice(0, 0)], make_source(), staging, "run")
    assert not judges_nothing_read(make_source(expectations=[not_negative(), rule("event_id_to_be_unique")]))
    for suite, told in (
        ([COUNTS], "has 0 rows"),
        ([SUMS], "has 0 in all"),
        ([within], "no event at all"),
        ([rule("table_row_count_to_be_between", min_value=1)], "observed 0"),
    ):
        source = make_source(expectations=suite)
        assert judges_nothing_read(source)
        with pytest.raises(NeedsDecision, match=told):
            check_nothing_read(extracted, source, TODAY, staging, "run", usually("4", "4", "4"))
    source = make_source(expectations=[COUNTS, SUMS, not_negative(), rule("query_columns_to_be_unchanged")])
    check_nothing_read(extracted, source, TODAY, staging, "run", usually("4"))
