"""Which rows are billed, and why the others are not."""

import random
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction

import pyarrow as pa
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stage_helpers import DAYS, START, Remembered, known, make_source, read, rows, stage
from usage_billing.errors import Misconfigured, NeedsDecision, NotApplied
from usage_billing.records import Target
from usage_billing.staging import Staging
from usage_billing.suite import DUPLICATE
from usage_billing.validate import ValidationStopped, reasons_table, validate

# A row_condition in YAML is text, which Great Expectations 1.x takes with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated as of GX Core:DeprecationWarning")


@pytest.fixture
def staging(tmp_path):
    """Stage below a temporary folder."""
    return Staging(tmp_path)


@pytest.fixture
def judge(staging):
    """Validate parts and return what came of it."""

    def run(*parts, resolve=known, periods=DAYS, history=None, **source):
        extracted = stage(staging, *parts)
        return validate(extracted, make_source(**source), periods, resolve, staging, "run", history or Remembered())

    return run


def rule(kind, /, *, reason=None, **kwargs):
    """Return an expectation as YAML gives it."""
    declared = {"type": f"expect_{kind}", "kwargs": kwargs}
    return declared | {"meta": {"reason": reason}} if reason else declared


def reasons(staging, found):
    """Return the reasons of each quarantined row by its event id."""
    quarantined = read(staging, found.quarantined)
    return dict(zip(quarantined["event_id"].to_pylist(), quarantined["reasons"].to_pylist(), strict=True))


def accepted(staging, found):
    """Return the event ids of accepted rows."""
    return read(staging, found.accepted)["event_id"].to_pylist()


NOT_NEGATIVE = rule("column_values_to_be_between", reason="negative", column="quantity", min_value=0)


def test_sound_rows_pass_with_exact_quantities(judge, staging):
    """Rows without a fault come out as they came, their quantities in the meter's own places."""
    found = judge(rows(("a", 1, "x", "1.5"), ("b", 2, "y", "2")), rows(("c", 3, "x", 7)))
    table = read(staging, found.accepted)
    assert table["quantity"].to_pylist() == [Decimal("1.50"), Decimal("2.00"), Decimal("7.00")]
    assert table.schema.field("quantity").type == pa.decimal128(38, 2)
    assert (found.quarantined.rows, found.reasons) == (0, {})
    assert read(staging, found.quarantined).column_names == [
        *("event_id", "time", "account", "quantity", "duplicate", "reasons")
    ]


def test_every_reason_of_a_row_is_told(judge, staging):
    """Fourteen kinds of defects, each row with all its own, and every row accounted for."""
    suite = [
        NOT_NEGATIVE,
        rule("column_values_to_not_be_null", reason="nobody's", column="account"),
        rule("column_values_to_match_regex", column="event_id", regex="^[a-z]+$"),
        rule("column_values_to_be_in_set", reason="unknown tier", column="tier", value_set=["gold", "tin"]),
    ]
    part = rows(
        ("good", 1, "x", "1.25", "gold"),
        (None, 1, "x", "1", "tin"),
        ("notime", None, "x", "1", "tin"),
        ("nobody", 1, None, "-1", "tin"),
        ("noquantity", 1, "x", None, None),
        ("text", 1, "x", "many", "gold"),
        ("nan", 1, "x", "NaN", "gold"),
        ("fine", 1, "x", "-0.005", "gold"),
        ("large", 1, "x", "9" * 40, "gold"),
        ("early", -0.5, "x", "1", "gold"),
        ("future", 72, "x", "1", "gold"),
        ("gone", 1, "gone", "1", "gold"),
        ("twice", 1, "x", "1", "gold"),
        ("twice", 1, "x", "1", "gold"),
        ("B4D", 99, None, "-3", "lead"),
        dimensions=["tier"],
    )
    resolve = lambda names: [Target(name, unknown="no such subscription" if name == "gone" else "") for name in names]  # noqa: E731
    found = judge(part, resolve=resolve, expectations=suite, dimensions=["tier"])
    outside = "time outside the usage periods"
    assert reasons(staging, found) == {
        None: ["no event id"],
        "notime": ["no time"],
        "nobody": ["no account", "negative", "nobody's"],
        "noquantity": ["no quantity"],
        "text": ["quantity: not a number"],
        "nan": ["quantity: not a number"],
        "fine": ["quantity: more than 2 decimal places", "negative"],
        "large": ["quantity: too large"],
        "early": [outside],
        "future": [outside],
        "gone": ["no such subscription"],
        "twice": [DUPLICATE],
        "B4D": [
            "no account",
            outside,
            "negative",
            "nobody's",
            "event_id: values to match regex (regex ^[a-z]+$)",
            "unknown tier",
        ],
    }
    assert accepted(staging, found) == ["good", "twice"]
    assert found.reasons["negative"] == 3
    assert found.examples["no account"] == ("nobody", "B4D")
    assert found.examples["no event id"] == ()
    assert "  negative  (nobody, fine, B4D)" in reasons_table(found)


def test_a_quarantined_row_can_be_replayed(judge, staging):
    """All columns are kept as they were read: what was quarantined is accepted once the rule is mended."""
    first = judge(
        rows(("a", 1, "x", Decimal("-1.500")), ("b", None, "y", Decimal("2.000"))), expectations=[NOT_NEGATIVE]
    )
    again = judge(read(staging, first.quarantined).drop_columns(["duplicate", "reasons"]))
    assert read(staging, again.accepted).to_pylist() == [
        {"event_id": "a", "time": START + timedelta(hours=1), "account": "x", "quantity": Decimal("-1.50")}
    ]
    assert reasons(staging, again) == {"b": ["no time"]}


def test_the_earliest_of_duplicates_is_kept_wherever_it_was_read(judge, staging):
    """The keeper is chosen by data: event time, then the rest of the row, in any order of the parts."""
    late, early, other = ("a", 5, "x", "1"), ("a", 2, "x", "2"), ("a", 2, "y", "1")
    for order in ([late, early, other], [other, late, early], [early, other, late]):
        found = judge(*(rows(one) for one in order), batch_rows=1)
        (kept,) = read(staging, found.accepted).to_pylist()
        assert (kept["time"], kept["account"]) == (START + timedelta(hours=2), "x")
        assert found.reasons == {DUPLICATE: 2}


def test_a_bad_row_does_not_make_its_good_namesake_a_duplicate(judge, staging):
    """Only sound rows compete: the earlier row is negative, so the later one is billed."""
    found = judge(
        rows(("a", 1, "x", "-1"), ("a", 2, "x", "1"), ("b", 1, "gone", "1"), ("b", 3, "x", "1")),
        expectations=[NOT_NEGATIVE],
        resolve=lambda names: [Target(name, unknown="gone" if name == "gone" else "") for name in names],
    )
    assert accepted(staging, found) == ["a", "b"]
    assert found.reasons == {"negative": 1, "gone": 1}


def test_each_account_is_asked_for_once_in_a_run(judge, staging):
    """A thousand accounts over many parts are resolved in sorted batches, none of them twice."""
    asked = []

    def resolve(names):
        asked.append(list(names))
        return [
            Target(name, subscription="1", component="2", address={"b": 1, "a": 2}, open_from=START) for name in names
        ]

    names = [f"acct-{number:04}" for number in range(1000)]
    part = rows(*((f"e{number}", 1, name, "1") for number, name in enumerate(reversed(names))))
    again = rows(*((f"f{number}", 1, name, "1") for number, name in enumerate(["new", *names])))
    found = judge(part, again, resolve=resolve)
    assert [len(batch) for batch in asked] == [500, 500, 1]
    assert asked == [sorted(batch) for batch in asked]
    assert sum(asked, []) == [*names, "new"]  # noqa: RUF017
    targets = read(staging, found.targets)
    assert targets["account"].to_pylist() == [*names, "new"]
    assert targets.slice(0, 1).to_pylist() == [
        {
            "account": names[0],
            "subscription": "1",
            "component": "2",
            "price_point": "",
            "address": '{"a": 2, "b": 1}',
            "open_from": START,
            "open_until": None,
        }
    ]


def test_a_look_up_that_fails_stops_the_run(judge):
    """Only a definite answer makes an account unknown; a site that could not be asked quarantines nobody."""

    def resolve(_):
        raise NotApplied("the site did not answer")

    with pytest.raises(NotApplied, match="did not answer"):
        judge(rows(("a", 1, "x", "1")), resolve=resolve)


def test_too_many_bad_rows_need_a_decision_after_all_is_kept(judge, staging):
    """Past either limit the run stops, but the rows and their reasons are written and referred to."""
    part = rows(("a", 1, "x", "1"), ("b", 1, "x", "-1"), ("c", 1, None, "1"))
    for limits, told in [
        ({"max_rows": 1, "max_share": 1}, "max_rows = 1"),
        ({"max_rows": 9, "max_share": 0.5}, "max_share = 0.5"),
    ]:
        with pytest.raises(ValidationStopped, match=told) as error:
            judge(part, expectations=[NOT_NEGATIVE], quarantine=limits)
        assert isinstance(error.value, NeedsDecision)
        assert "2 of 3 rows are quarantined, more than quarantine." in str(error.value)
        assert "negative  (b)" in str(error.value)
        assert set(reasons(staging, error.value.validated)) == {"b", "c"}
    judge(part, expectations=[NOT_NEGATIVE], quarantine={"max_rows": 2, "max_share": 0.67})


def test_nothing_read_is_nothing_wrong(judge, staging):
    """An empty extraction gives empty tables with all their columns, and no limit is passed."""
    found = judge(rows(), quarantine={"max_rows": 0, "max_share": 0}, expectations=[NOT_NEGATIVE])
    assert (found.accepted.rows, found.quarantined.rows, found.targets.rows) == (0, 0, 0)
    assert read(staging, found.accepted).column_names == ["event_id", "time", "account", "quantity"]


@pytest.mark.parametrize(("function", "kept"), [("count", None), ("unique", ["1.5", "many", "1.5"])])
def test_a_meter_that_does_not_add_takes_any_quantity(judge, staging, function, kept):
    """Counting events needs no quantity at all, counting distinct values takes text."""
    found = judge(
        rows(("a", 1, "x", "1.5"), ("b", 1, "x", "many"), ("d", 1, "x", "1.5"), ("c", 1, "x", None)),
        meter={"function": function},
    )
    table = read(staging, found.accepted)
    assert (table["quantity"].to_pylist() if kept else table.num_rows) == (kept or 4)


def test_distinct_decimals_are_spelt_alike(judge, staging):
    """1.50 in one part and 1.5 in the next are one value, however the driver typed them."""
    parts = [
        rows(("a", 1, "x", Decimal("1.50"))),
        rows(("b", 1, "x", Decimal("1.5"))),
        rows(("c", 1, "x", Decimal("0.00000001"))),
    ]
    found = judge(*parts, meter={"function": "unique"})
    assert read(staging, found.accepted)["quantity"].to_pylist() == ["1.5", "1.5", "0.00000001"]


@pytest.mark.parametrize("kind", [pa.decimal128(38, 20), pa.string(), pa.decimal128(18, 2)])
@pytest.mark.parametrize(
    ("bounds", "negative"),
    [
        ({"min_value": 0.3}, ["0.29", "-7"]),
        ({"max_value": 0.3, "strict_max": True}, ["0.30", "0.31", "90071992547409.93"]),
        ({"min_value": 0.3, "max_value": "90071992547409.92"}, ["0.29", "90071992547409.93", "-7"]),
        ({"min_value": "0.3000000000000000000000001", "max_value": 10**30}, ["0.30", "0.29", "-7"]),
    ],
)
def test_bounds_compare_exactly(judge, staging, kind, bounds, negative):
    """0.30 is not below 0.3, and a cent above 2**53 cents is above: no float decides who is billed."""
    values = ["0.30", "0.29", "0.31", "90071992547409.93", "-7"]
    given_as = [Decimal(value) for value in values] if kind != pa.string() else values
    part = rows(*((value, 1, "x", quantity) for value, quantity in zip(values, given_as, strict=True)), quantity=kind)
    found = judge(part, expectations=[rule("column_values_to_be_between", column="quantity", **bounds)])
    assert sorted(reasons(staging, found)) == sorted(negative)


def test_sets_compare_exactly(judge, staging):
    """0.1 in a set is the tenth that the warehouse holds."""
    part = rows(*((value, 1, "x", Decimal(value)) for value in ("0.10", "0.20", "0.30")))
    suite = [
        rule("column_values_to_be_in_set", reason="not in", column="quantity", value_set=[0.1, "0.3"]),
        rule("column_values_to_not_be_in_set", reason="in", column="quantity", value_set=[0.3]),
    ]
    assert reasons(staging, judge(part, expectations=suite)) == {"0.20": ["not in"], "0.30": ["in"]}


def test_a_condition_leaves_the_numbers_of_the_rows_alone(judge, staging):
    """A rule for some rows only quarantines the right ones."""
    condition = {"row_condition": 'tier == "gold"', "condition_parser": "pandas"}
    suite = [rule("column_values_to_match_regex", reason="short", column="event_id", regex="..", **condition)]
    part = rows(
        ("a", 1, "x", 1, "tin"),
        ("b", 1, "x", 1, "gold"),
        ("cc", 1, "x", 1, "gold"),
        ("d", 1, "x", 1, "gold"),
        dimensions=["tier"],
    )
    assert reasons(staging, judge(part, expectations=suite, dimensions=["tier"])) == {"b": ["short"], "d": ["short"]}


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        (
            rule("column_values_to_be_betwen", column="quantity", min_value=0),
            "no such expectation; did you mean expect_column_values_to_be_between?",
        ),
        (rule("column_values_to_be_between", column="quantity", minimum=0), "minimum: extra fields not permitted"),
        (rule("column_values_to_be_between", column="quantity"), "min_value and max_value cannot both be None"),
        (rule("column_values_to_not_be_null"), "column: field required"),
        (
            rule("column_values_to_not_be_null", column="acount"),
            "there is no column 'acount'; the rows have event_id, time, account, quantity",
        ),
        (rule("column_values_to_not_be_null", column="account", mostly=0.9), "remove mostly"),
        (rule("column_values_to_be_between", column="quantity", min_value="none"), "'none' is no number"),
        (rule("column_values_to_be_between", column="quantity", min_value=float("nan")), "nan is no finite number"),
        (rule("column_values_to_be_between", column="quantity", min_value=0.12345678901234567), "write it in quotes"),
        (rule("column_values_to_not_be_null", column="account", row_condition="quantity > 1"), "row_condition"),
        (rule("column_values_to_be_unique", column="event_id"), "looks at all 3 rows at once, but batch_rows is 2"),
        (rule("column_sum_to_be_between", column="quantity", max_value=9), "raise batch_rows"),
    ],
)
def test_a_rule_that_is_wrong_stops_the_run_by_name(judge, declared, told):
    """Great Expectations drops or hides some of these; here each is told with its place and its mend."""
    parts = rows(("a", 1, "x", 1), ("b", 1, "x", 1)), rows(("c", 1, "x", 1))
    with pytest.raises(Misconfigured) as error:
        judge(*parts, expectations=[NOT_NEGATIVE, declared], batch_rows=2)
    assert "expectations.0" not in str(error.value)
    assert "expectations.1" in str(error.value)
    assert told in str(error.value)


def test_all_wrong_rules_are_told_at_once(judge):
    """Three mistakes take one round of mending."""
    suite = [rule("nonsense"), NOT_NEGATIVE, rule("column_values_to_not_be_null", column="x", extra=1)]
    with pytest.raises(Misconfigured) as error:
        judge(rows(("a", 1, "x", 1)), expectations=suite)
    assert "3 faults" in str(error.value)


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        (rule("column_values_to_match_regex", column="account", regex="("), "regular expression"),
        (rule("column_values_to_be_between", column="account", min_value=0), "could not run"),
        (rule("column_values_to_be_between", column="time", min_value="2026-10-01"), "could not run"),
    ],
)
def test_a_rule_that_raises_never_counts_as_passed(judge, declared, told):
    """A rule that could not judge the rows stops the run, with the place of the rule."""
    with pytest.raises(Misconfigured, match=r"expectations\.1") as error:
        judge(rows(("a", 1, "x", 1)), expectations=[NOT_NEGATIVE, declared])
    assert told in str(error.value)
    assert not isinstance(error.value, NeedsDecision)


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        (rule("table_row_count_to_be_between", reason="a thin day", min_value=10), "a thin day; observed 3"),
        (rule("table_column_count_to_equal", value=3), "observed 4"),
        (rule("column_to_exist", column="region"), "expectations.1"),
        (rule("column_values_to_be_of_type", column="account", type_="int64"), "observed str"),
    ],
)
def test_rows_that_are_wrong_as_a_whole_need_a_decision(judge, declared, told):
    """A rule about all rows stops the run before anything is sent, and tells what it saw, in parts of any size."""
    for batch_rows, parts in (
        (2, [rows(("a", 1, "x", 1), ("b", 1, "x", 1)), rows(("c", 1, "x", 1))]),
        (9, [rows(("a", 1, "x", 1), ("b", 1, "x", 1), ("c", 1, "x", 1))]),
    ):
        with pytest.raises(NeedsDecision, match="as a whole") as error:
            judge(*parts, expectations=[NOT_NEGATIVE, declared], batch_rows=batch_rows)
        assert told in str(error.value)


def test_rules_about_all_rows_that_hold_stop_nothing(judge):
    """The row count of all parts together is what is judged."""
    suite = [rule("table_row_count_to_equal", value=3), rule("column_to_exist", column="account"), NOT_NEGATIVE]
    found = judge(rows(("a", 1, "x", 1), ("b", 1, "x", 1)), rows(("c", 1, "x", 1)), expectations=suite, batch_rows=2)
    assert found.accepted.rows == 3


def test_a_rule_about_all_rows_does_not_pass_by_seeing_some(judge):
    """A column that changes its type cuts the extraction in parts: the run stops instead of judging the first."""
    unique = rule("column_values_to_be_unique", column="event_id")
    with pytest.raises(Misconfigured, match="in several types"):
        judge(rows(("a", 1, "x", 1)), rows(("a", 1, "x", "1")), expectations=[unique])


def test_a_part_without_any_quantity_is_judged(judge, staging):
    """A driver gives a column of nulls no type at all; its rows lack a quantity, and rules still run."""
    suite = [NOT_NEGATIVE, rule("column_values_to_not_be_null", reason="empty", column="quantity")]
    found = judge(rows(("a", 1, "x", None), ("b", 2, "x", None)), rows(("c", 1, "x", "1")), expectations=suite)
    assert reasons(staging, found) == {"a": ["no quantity", "empty"], "b": ["no quantity", "empty"]}
    assert accepted(staging, found) == ["c"]


def test_validation_is_silent(judge, capfd, caplog):
    """No progress bar and no chatter of a library ends up in a task log."""
    caplog.set_level("DEBUG")
    judge(rows(("a", 1, "x", 1)), expectations=[NOT_NEGATIVE, rule("column_values_to_not_be_null", column="account")])
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_usage_after_the_end_of_its_subscription_is_told_from_usage_before(judge, staging):
    """Neither can be billed there; what was used before the end is owed all the same."""

    def resolve(names):
        return [
            Target(name, unknown="it ended", ended_at=START + timedelta(hours=24)) if name == "left" else Target(name)
            for name in names
        ]

    table = [
        ("a", 10, "left", 1),
        ("b", 24, "left", 1),
        ("c", 30, "left", 1),
        ("d", 30, "x", 1),
        ("e", None, "left", 1),
    ]
    found = judge(rows(*table), resolve=resolve)
    after = "used after its subscription had ended"
    assert reasons(staging, found) == {
        "a": ["it ended"],
        "b": ["it ended", after],
        "c": ["it ended", after],
        "e": ["no time", "it ended"],
    }
    assert accepted(staging, found) == ["d"]


ROW = st.tuples(
    st.sampled_from(["a", "b", "c", "d", "e", None]),
    st.sampled_from([0, 1, 1, 2, 71, 72, -1, None]),
    st.sampled_from(["x", "y", "gone", None]),
    st.sampled_from(["0", "0.1", "0.10", "-0.1", "0.001", "7", "9" * 30, "?", None]),
)
SUITE = [
    NOT_NEGATIVE,
    rule("column_values_to_be_in_set", reason="odd", column="quantity", value_set=[0.1, 7, -0.1]),
    rule("column_values_to_not_match_regex", reason="e", column="event_id", regex="e"),
    rule("column_values_to_not_match_regex", reason="of y", column="account", regex="y"),
    rule("column_values_to_not_be_null", reason="whose", column="account"),
    rule("time_not_in_future", reason="not yet"),
    rule("quantity_to_be_a_number", reason="what is this"),
    rule("account_to_be_known", reason="nobody"),
    rule("event_id_to_be_unique", reason="again"),
]
NOW = START + timedelta(hours=70, minutes=30)


def oracle(table, suite):
    """Judge rows one by one, slowly; return accepted rows and (row, reasons) of the others."""
    judged = []
    reasons = {declared["meta"]["reason"] for declared in suite}
    renamed = {default: ours for default, ours in RENAMED.items() if ours.partition(":")[0] in reasons}
    duplicate = renamed.get(DUPLICATE, DUPLICATE)
    for identifier, hours, account, quantity in table:
        number = None if quantity in {None, "?"} else Decimal(quantity)
        told = {
            "no event id": identifier is None,
            "no time": hours is None,
            "no account": account is None,
            "no quantity": quantity is None,
            "quantity: not a number": quantity == "?",
            "quantity: too large": number is not None and abs(number) >= 10**16,
            "quantity: more than 2 decimal places": number is not None and (Fraction(number) * 100).denominator != 1,
            "time outside the usage periods": hours is not None and not 0 <= hours < 72,
            "time in the future": hours is not None and hours > 70.5,
            "negative": "negative" in reasons and number is not None and number < 0,
            "odd": "odd" in reasons
            and number is not None
            and number not in {Decimal("0.1"), Decimal(7), Decimal("-0.1")},
            "e": "e" in reasons and identifier == "e",
            "of y": "of y" in reasons and account == "y",
            "whose": "whose" in reasons and account is None,
            "unknown": account == "gone",
        }
        judged.append(
            (
                (identifier, hours, account, quantity),
                [renamed.get(reason, reason) for reason, holds in told.items() if holds],
            )
        )
    kept = {}
    for row, told in judged:
        key = (row[1], row[2], row[3] and Decimal(row[3]) if not told else None)
        if not told and (row[0] not in kept or key < kept[row[0]]):
            kept[row[0]] = key
    sound, bad = [], []
    for row, told in judged:
        if told:
            bad.append((row, told))
        elif kept.get(row[0]) == (row[1], row[2], Decimal(row[3])):
            sound.append((row[0], row[1], row[2], Decimal(row[3])))
            kept[row[0]] = None
        else:
            bad.append((row, [duplicate]))
    return sound, bad


RENAMED = {
    "time in the future": "not yet",
    "quantity: not a number": "what is this",
    "unknown": "nobody: unknown",
    DUPLICATE: "again",
}


def comparable(row, told):
    """Return a row and its reasons, in any order; of two equal rows with one event id, either may be the duplicate."""
    *words, quantity = row
    twice = told in ([DUPLICATE], [RENAMED[DUPLICATE]])
    return repr((words, Decimal(quantity).normalize() if twice else quantity, sorted(told)))


def plain(row):
    """Return a row as the slow judge has it, and its reasons."""
    hours = None if row["time"] is None else (row["time"] - START) // timedelta(hours=1)
    return (row["event_id"], hours, row["account"], row["quantity"]), row.get("reasons")


@settings(max_examples=25, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    table=st.lists(ROW, max_size=12),
    batch_rows=st.integers(1, 12),
    seed=st.integers(0, 9),
    suite=st.lists(st.sampled_from(SUITE), unique_by=lambda declared: declared["meta"]["reason"]),
)
def test_any_rows_in_any_parts_are_judged_by_any_suite_as_one_by_one(tmp_path_factory, table, batch_rows, seed, suite):
    """Accepted rows, quarantined rows and all reasons equal those of a slow judge, whatever the order and the parts."""
    random.Random(seed).shuffle(table)  # noqa: S311 - An order, not a secret.
    staging = Staging(tmp_path_factory.mktemp("staging"))
    parts = [rows(*table[at : at + batch_rows], quantity=pa.string()) for at in range(0, len(table), batch_rows)]
    resolve = lambda names: [Target(name, unknown="unknown" if name == "gone" else "") for name in names]  # noqa: E731
    source = make_source(expectations=suite, batch_rows=batch_rows)
    found = validate(stage(staging, *(parts or [rows()])), source, DAYS, resolve, staging, "run", Remembered(NOW))
    tables = (read(staging, staged).to_pylist() for staged in (found.accepted, found.quarantined))
    sound, bad = ([plain(row) for row in listed] for listed in tables)
    expected_sound, expected_bad = oracle(table, suite)
    assert sorted(row for row, _ in sound) == sorted(expected_sound)
    assert sorted(comparable(*row) for row in bad) == sorted(comparable(*row) for row in expected_bad)
    assert sum(found.reasons.values()) == sum(len(told) for _, told in expected_bad)
