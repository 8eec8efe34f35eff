"""Numbers of a column's values, and the verdicts on them: the same as judging each row, in whatever parts."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_helpers import DAYS, Remembered, known, make_source, rows, stage
from usage_billing import by_value
from usage_billing.by_value import Values, Verdicts
from usage_billing.staging import Staging
from usage_billing.suite import Suite
from usage_billing.validate import validate


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.lists(st.sampled_from(["a", "b", "c", "", None]), max_size=6), max_size=5))
def test_each_value_has_one_number_and_is_shown_once(parts):
    """Whatever the parts: equal values have equal numbers, and a row stands for each when it is new."""
    values, numbers, seen = Values(), {}, []
    for part in parts:
        found, new = values.number(pa.array(part, pa.string()))
        seen += [part[row] for row in new]
        for value, number in zip(part, found.tolist(), strict=True):
            assert numbers.setdefault(value, number) == number
    assert sorted(seen, key=str) == sorted(numbers, key=str)
    assert [numbers[value] for value in seen] == list(range(len(seen)))


def test_a_column_of_too_many_values_is_given_up_for_good(monkeypatch):
    """Neither a part in which nearly each row has its own, nor ever more of them in all."""
    monkeypatch.setattr(by_value, "_FEW", 3)
    values = Values()
    assert values.number(pa.array(["a", "b", "c"])) is not None
    assert values.number(pa.array(["a", "b", "c", "d"])) is None
    assert values.number(pa.array(["a"])) is None
    monkeypatch.setattr(by_value, "_MOST", 4)
    values = Values()
    assert values.number(pa.array(["a", "b"])) is not None
    assert values.number(pa.array(["c", "d", "e"])) is None
    # Many rows may have many values.
    monkeypatch.setattr(by_value, "_MOST", 1_000)
    assert Values().number(pa.array([str(number % 4) for number in range(32)])) is not None


def test_a_column_that_changes_its_type_is_given_up():
    """Numbers of another type would be compared by what they look like."""
    values = Values()
    assert values.number(pa.array(["1"])) is not None
    assert values.number(pa.array([1])) is None


def test_a_value_keeps_its_verdict():
    """What is learned of new values is added to what was known."""
    verdicts = Verdicts([0, 1])
    first, new = verdicts.values.number(pa.array(["a", "b", "a"]))
    verdicts.learn(0, len(new), [1])
    verdicts.learn(1, len(new), [])
    assert verdicts.failing(0, first).tolist() == [1]
    second, new = verdicts.values.number(pa.array(["c", "b", "a", "c"]))
    assert [second.tolist(), new.tolist()] == [[2, 1, 0, 2], [0]]
    verdicts.learn(0, len(new), [])
    verdicts.learn(1, len(new), [0])
    assert verdicts.failing(0, second).tolist() == [1]
    assert verdicts.failing(1, second).tolist() == [0, 3]


@pytest.mark.parametrize(("account", "asked"), [(lambda _: "a", 1), (lambda number: f"a{number}", 6)])
def test_great_expectations_judges_no_value_twice(tmp_path, monkeypatch, account, asked):
    """Six parts of which each has the same account, or another one; each part has a negative quantity."""
    frames = []
    judge = Suite._results
    monkeypatch.setattr(Suite, "_results", lambda self, rules, frame: frames.append(frame) or judge(self, rules, frame))
    suite = [
        {"type": "expect_column_values_to_match_regex", "kwargs": {"column": "account", "regex": "^a"}},
        {"type": "expect_column_values_to_be_between", "kwargs": {"column": "quantity", "min_value": 0}},
    ]
    parts = [rows((f"x{part}", 1, account(part), 5), (f"y{part}", 1, account(part), -1)) for part in range(6)]
    staging = Staging(tmp_path)
    source = make_source(expectations=suite)
    found = validate(stage(staging, *parts), source, DAYS, known, staging, "run", Remembered())
    assert (found.accepted.rows, found.quarantined.rows) == (6, 6)
    assert [len(frame) for frame in frames if "account" in frame] == [1] * asked
    # What lies below the bound, and what lies above.
    assert [len(frame) for frame in frames if "quantity (rank)" in frame] == [2]
