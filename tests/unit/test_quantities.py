"""Exact quantities in bulk: nothing here may round."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from usage_billing import quantities

HUGE = 10**37
scaled_integers = st.lists(st.integers(-HUGE, HUGE), max_size=8)


def decimals_array(values, kind=None):
    """Return texts or decimals as an Arrow array."""
    return pa.array([None if value is None else Decimal(value) for value in values], kind)


def faulty(column, decimals):
    """Return the reasons of each row."""
    masks = quantities.faults(column, decimals)
    return [[reason for reason, mask in masks.items() if mask[row]] for row in range(len(column))]


@settings(max_examples=50, deadline=None)
@given(values=scaled_integers, decimals=st.integers(0, 9))
def test_scaled_integers_come_back_unchanged(values, decimals):
    """Whatever its size, a quantity survives the way into Parquet and back."""
    column = quantities.from_scaled(pd.Series(values, dtype=object), decimals)
    assert column.type == pa.decimal128(38, decimals)
    assert [int(value) for value in quantities.to_scaled(column, decimals)] == values


@settings(max_examples=50, deadline=None)
@given(values=scaled_integers, decimals=st.integers(0, 9))
def test_text_is_what_decimal_prints_without_exponent_or_zeros(values, decimals):
    """Plain text goes into requests: the same number, no exponent, no trailing zero, and it can be read again."""
    text = quantities.to_text(pd.Series(values, dtype=object), decimals)
    assert [Decimal(one) for one in text] == [quantities.to_decimal(value, decimals) for value in values]
    assert not any("E" in one or ("." in one and one.endswith(("0", "."))) for one in text)
    assert [int(value) for value in quantities.from_text(text, decimals)] == values


def test_small_values_stay_machine_integers():
    """The quick road is taken where it is safe."""
    assert quantities.to_scaled(decimals_array(["1.50", "-2"], pa.decimal128(38, 2)), 2).dtype == np.int64


def test_a_slice_of_a_column_reads_its_own_rows():
    """Reading a decimal's bytes again must start where the slice starts."""
    column = decimals_array(["1.50", "2.50", "3.50"], pa.decimal128(38, 2)).slice(1)
    assert list(quantities.to_scaled(column, 2)) == [250, 350]
    assert list(quantities.to_scaled(pa.chunked_array([column, column]), 2)) == [250, 350, 250, 350]
    assert list(quantities.to_scaled(pa.chunked_array([], pa.decimal128(38, 2)), 2)) == []


def test_sum_beyond_64_bits_is_exact():
    """Three rows of nine trillion billionths would wrap round; as Python integers they do not."""
    frame = pd.DataFrame({"key": ["a", "b", "a", "a"], "scaled": [9 * 10**18, 1, 9 * 10**18, 9 * 10**18]})
    summed = quantities.sum_by(frame, ["key"], "scaled").set_index("key")["scaled"]
    assert summed["a"] == 27 * 10**18
    assert quantities.total(frame["scaled"]) == 27 * 10**18 + 1


def test_more_than_38_digits_are_refused():
    """A total that Parquet cannot hold stops the run instead of being cut."""
    with pytest.raises(OverflowError, match="38 digits"):
        quantities.from_scaled(pd.Series([10**38], dtype=object), 0)


def test_text_with_too_many_places_is_refused():
    """The ledger's text is read exactly or not at all."""
    with pytest.raises(pa.ArrowInvalid):
        quantities.from_text(pd.Series(["1.005"]), 2)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("12", []),
        ("-12.50", []),
        (" +.5 ", []),
        ("1.000000000000000000000000000000000000000000000", []),
        ("000000000000000000000000000000000000000000000001", []),
        ("1.005", ["more than 2 decimal places"]),
        ("0." + "0" * 60 + "1", ["more than 2 decimal places"]),
        ("9999999999999999.99", []),
        ("10000000000000000", ["too large"]),
        ("-10000000000000000.001", ["too large", "more than 2 decimal places"]),
        ("9" * 60, ["too large"]),
        ("", ["not a number"]),
        ("twelve", ["not a number"]),
        ("1,5", ["not a number"]),
        ("NaN", ["not a number"]),
        ("Infinity", ["not a number"]),
        ("1e3", ["not a number"]),
        ("1.005.1", ["not a number"]),
        (None, []),
    ],
)
def test_text_quantity_is_judged_by_value(text, reasons):
    """A warehouse's text is a number or not, too large or not, too fine or not: trailing zeros change nothing."""
    column = pa.array([text], pa.string())
    assert faulty(column, 2) == [reasons]
    if not reasons and text is not None:
        assert quantities.normalised(column, 2).to_pylist() == [Decimal(text).quantize(Decimal("0.01"))]


def test_a_column_with_gaps_keeps_its_rows_apart():
    """Rows that were left out shift nobody's quantity to somebody else."""
    text = pd.Series(["1", "2", "3"], dtype=object).drop(index=[1])
    assert quantities.from_text(text, 1).to_dict() == {0: 10, 2: 30}


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**20), max_value=10**20)
    ),
    decimals=st.integers(0, 9),
)
def test_text_and_decimal_are_judged_alike(values, decimals):
    """Whether a driver hands over text or decimals must not change which rows are billed."""
    column = decimals_array(values, pa.decimal128(38, 6))
    assert faulty(column, decimals) == faulty(pa.array([format(value, "f") for value in values], pa.string()), decimals)


def test_a_decimal_at_the_edge_of_its_type_is_judged():
    """999.9 cannot be rounded up inside its own type, and a wide type leaves no room for the limit's scale."""
    assert faulty(decimals_array(["999.9"], pa.decimal128(4, 1)), 0) == [["more than 0 decimal places"]]
    assert faulty(decimals_array(["1.5", "100000000"], pa.decimal128(38, 10)), 9) == [[], []]
    assert faulty(decimals_array(["1000000000"], pa.decimal128(38, 10)), 9) == [["too large"]]
    assert faulty(decimals_array(["0.5"], pa.decimal256(76, 38)), 0) == [["more than 0 decimal places"]]


def test_integers_of_every_width_are_exact():
    """The largest unsigned integer is too large to bill, and says so instead of wrapping."""
    assert faulty(pa.array([2**64 - 1, 7, None], pa.uint64()), 0) == [["too large"], [], []]
    assert quantities.normalised(pa.array([7, None], pa.int8()), 2).to_pylist() == [Decimal("7.00"), None]


def test_an_empty_or_null_column_has_no_faults():
    """A part without a single quantity is for other rules to judge."""
    assert faulty(pa.nulls(2), 2) == [[], []]
    assert faulty(pa.array([], pa.string()), 2) == []


def test_only_exact_types_carry_quantities():
    """A float is never a quantity."""
    assert not quantities.is_exact(pa.float64())
    assert not quantities.is_exact(pa.bool_())
    assert all(map(quantities.is_exact, [pa.int8(), pa.uint64(), pa.decimal128(9, 2), pa.string(), pa.null()]))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.decimals(places=3, min_value=-(10**9), max_value=10**9), min_size=1),
    bounds=st.lists(st.decimals(places=5, min_value=-(10**25), max_value=10**25), min_size=1, max_size=4, unique=True),
    near=st.booleans(),
)
def test_ranks_compare_as_the_numbers_do(values, bounds, near):
    """A rank stands on the same side of a bound's rank as the quantity of the bound."""
    bounds = sorted({*bounds, *(values[:2] if near else [])})
    column = decimals_array(values, pa.decimal128(18, 3))
    for given_as in (column, pa.array([format(value, "f") for value in values])):
        ranks = quantities.ranks(given_as, bounds)
        for at, bound in enumerate(bounds):
            assert [rank < 2 * at + 1 for rank in ranks] == [value < bound for value in values]
            assert [rank == 2 * at + 1 for rank in ranks] == [value == bound for value in values]


def test_what_is_no_number_has_no_rank():
    """Null and text that is no number are told apart from the smallest quantity."""
    assert list(quantities.ranks(pa.array(["-5", None, "x", "9" * 50]), [Decimal(0)])) == [0, -1, -1, -1]


def test_differences_are_exact_where_they_leave_64_bits() -> None:
    """Two columns that each fit may be further apart than 64 bits reach: nothing wraps around."""
    large = pd.Series([9 * 10**18, 5], dtype="int64")
    found = quantities.minus(large, -large)
    assert found.tolist() == [18 * 10**18, 10]
    small = pd.Series([3, 4], dtype="int64")
    assert quantities.minus(small, pd.Series([5, 1], dtype="int64")).tolist() == [-2, 3]
    assert quantities.minus(small, small).dtype == "int64"
    assert quantities.minus(small.iloc[:0], small.iloc[:0]).tolist() == []
