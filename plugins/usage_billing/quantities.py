"""Exact quantities in bulk: fixed-point integers inside pandas, decimals in Parquet, text in requests.

A quantity with `decimals` places is kept as the integer ``quantity * 10**decimals`` ("scaled"). Columns are ``int64``
while sums provably fit, and Python integers (``object``) when they might not: slower, never wrong. No float exists
here.
"""

from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, InvalidOperation
from typing import cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing.errors import Misconfigured

PRECISION = 38
MAX_DIGITS = 18
_INT64_MAX = 2**63 - 1
_DECIMAL_TEXT = r"^\s*[+-]?(\d+(\.\d*)?|\.\d+)\s*$"


def is_exact(kind: pa.DataType) -> bool:
    """Say whether values of this Arrow type carry quantities exactly: integers, decimals, and decimal text."""
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_decimal(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_null(kind)
    )


def faults(column: pa.Array, decimals: int) -> dict[str, np.ndarray]:
    """Return, for each thing that can be wrong with a quantity, the mask of rows it is wrong in.

    `column` is an array of integers, decimals or text. The largest quantity is the one whose scaled form fits 18
    digits. Null is not judged here: whether it is allowed is the caller's to say.
    """
    if pa.types.is_integer(column.type):
        column = column.cast(pa.decimal128(20, 0))
    if pa.types.is_decimal(column.type):
        not_a_number = np.zeros(len(column), dtype=bool)
        too_large, too_fine = _too_large(column, decimals), _too_fine(column, decimals)
    else:
        # Text is judged as text: a numeral of any length gets its reason, and none breaks a cast.
        text = column.cast(pa.string())
        not_a_number = _mask(pc.invert(pc.match_substring_regex(text, _DECIMAL_TEXT)))
        whole_digits = rf"^\s*[+-]?0*[1-9]\d{{{MAX_DIGITS - decimals},}}(\.\d*)?\s*$"
        too_large = _mask(pc.match_substring_regex(text, whole_digits))
        too_fine = ~not_a_number & _mask(pc.match_substring_regex(text, rf"\.\d{{{decimals}}}\d*[1-9]"))
    return {"not a number": not_a_number, "too large": too_large, f"more than {decimals} decimal places": too_fine}


def _too_large(column: pa.Array, decimals: int) -> np.ndarray:
    kind = column.type
    if kind.precision - kind.scale <= MAX_DIGITS - decimals:
        return np.zeros(len(column), dtype=bool)
    return _mask(pc.greater_equal(pc.abs(column), pa.scalar(Decimal(10) ** (MAX_DIGITS - decimals), kind)))


def _too_fine(column: pa.Array, decimals: int) -> np.ndarray:
    if column.type.scale <= decimals:
        return np.zeros(len(column), dtype=bool)
    # Towards zero: rounding 999.9 up would not fit the precision of the column's own type.
    return _mask(pc.not_equal(pc.round(column, ndigits=decimals, round_mode="towards_zero"), column))


def _mask(condition: pa.Array) -> np.ndarray:
    return cast("np.ndarray", pc.fill_null(condition, False).to_numpy(zero_copy_only=False))  # noqa: FBT003


def as_decimals(column: pa.Array) -> pa.Array:
    """Return integers, decimals or text as an array of decimals, exactly.

    Null where a text is not a number, or has more than 38 digits on one side of its point.
    """
    if pa.types.is_integer(column.type):
        return column.cast(pa.decimal128(20, 0))
    if pa.types.is_decimal(column.type):
        return column
    text = pc.replace_substring_regex(column.cast(pa.string()), r"^\s*([+-]?)0*(\d)", r"\1\2")
    text = pc.replace_substring_regex(text, r"(\.\d*?)0*\s*$", r"\1")
    text = pc.utf8_trim_whitespace(text)
    numeric = pc.match_substring_regex(
        text, rf"^[+-]?(\d{{1,{PRECISION}}}(\.\d{{0,{PRECISION}}})?|\.\d{{1,{PRECISION}}})$"
    )
    return pc.if_else(numeric, text, pa.scalar(None, pa.string())).cast(pa.decimal256(2 * PRECISION, PRECISION))


def normalised(column: pa.Array, decimals: int) -> pa.Array:
    """Return sound quantities (see `faults`) as ``decimal128(38, decimals)``, exactly."""
    return as_decimals(column).cast(pa.decimal128(PRECISION, decimals))


def ranks(column: pa.Array, bounds: Sequence[Decimal]) -> np.ndarray:
    """Return where each quantity stands among ascending, distinct `bounds`, as a small integer.

    The bound number ``i`` (from 0) has the rank ``2 * i + 1``; what lies below, between and above has the even ranks.
    So comparing ranks with a bound's rank is comparing quantities with the bound, exactly, even by code that turns its
    bounds into floats. Null ranks as -1.
    """
    values = as_decimals(column)
    found = np.zeros(len(values), dtype="int64")
    for bound in bounds:
        found += _mask(_above(values, bound, strict=False))
        found += _mask(_above(values, bound, strict=True))
    return np.where(values.is_null().to_numpy(zero_copy_only=False), -1, found)


def _above(values: pa.Array, bound: Decimal, *, strict: bool) -> pa.Array:
    kind = values.type
    rounding = ROUND_FLOOR if strict else ROUND_CEILING
    # A bound between two values that the column can hold moves to the neighbour that gives the same answer.
    bound = bound.quantize(Decimal(1).scaleb(-kind.scale), rounding, Context(prec=4 * PRECISION))
    if bound.copy_abs() >= Decimal(10) ** (kind.precision - kind.scale):
        return pc.if_else(pc.is_valid(values), bound < 0, None)
    limit = pa.scalar(bound, kind)
    return pc.greater(values, limit) if strict else pc.greater_equal(values, limit)


def to_scaled(column: pa.Array | pa.ChunkedArray, decimals: int) -> pd.Series:
    """Return ``decimal128(38, decimals)`` values as scaled ``int64``, or as Python integers if one does not fit."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of an empty chunked array may stay chunked.
        array = pa.array([], pa.decimal128(PRECISION, decimals))
    if array.type != pa.decimal128(PRECISION, decimals):
        raise Misconfigured(
            f"staging: a quantity is {array.type}, and source.yaml now says {decimals} decimal places: "
            "put it back, or clear the run from extract on"
        )
    # The bytes of a decimal are its scaled integer: read them again with scale 0, and let Arrow check the range.
    whole = pa.Array.from_buffers(pa.decimal128(PRECISION, 0), len(array), array.buffers(), offset=array.offset)
    try:
        return pd.Series(whole.cast(pa.int64()).to_numpy(zero_copy_only=False), dtype="int64")
    except pa.ArrowInvalid:
        return pd.Series([int(value) for value in whole.to_pylist()], dtype=object)


def from_scaled(scaled: pd.Series, decimals: int) -> pa.Array:
    """Return scaled integers as ``decimal128(38, decimals)``.

    Raises:
        OverflowError: a value has more than 38 digits.
    """
    if scaled.dtype == object:
        limit = 10**PRECISION
        if any(abs(value) >= limit for value in scaled):
            raise OverflowError(f"a quantity has more than {PRECISION} digits")
        whole = pa.array([Decimal(value) for value in scaled], pa.decimal128(PRECISION, 0))
    else:
        whole = pa.array(scaled.to_numpy(dtype="int64")).cast(pa.decimal128(PRECISION, 0))
    return pa.Array.from_buffers(pa.decimal128(PRECISION, decimals), len(whole), whole.buffers(), offset=whole.offset)


def sum_by(frame: pd.DataFrame, keys: list[str], scaled: str) -> pd.DataFrame:
    """Return `frame` grouped by `keys`, in order of appearance, with the exact sum of its `scaled` column."""
    values = safe_to_add(frame[scaled])
    summed = frame.assign(**{scaled: values}).groupby(keys, sort=False, dropna=False, as_index=False)[scaled].sum()
    return cast("pd.DataFrame", summed)


def minus(scaled: pd.Series, other: pd.Series) -> pd.Series:
    """Return the exact differences of two scaled columns, as Python integers where one may leave 64 bits."""
    if object in (scaled.dtype, other.dtype) or scaled.empty:
        return scaled.astype(object) - other.astype(object)
    largest = sum(max(abs(int(column.max())), abs(int(column.min()))) for column in (scaled, other))
    return scaled - other if largest <= _INT64_MAX else scaled.astype(object) - other.astype(object)


def safe_to_add(scaled: pd.Series) -> pd.Series:
    """Return `scaled` as it is if no sum over it can leave 64 bits, else as Python integers."""
    if scaled.dtype == object or scaled.empty:
        return scaled
    largest = max(abs(int(scaled.max())), abs(int(scaled.min())))
    return scaled if largest * len(scaled) <= _INT64_MAX else scaled.astype(object)


def total(scaled: pd.Series) -> int:
    """Return the exact sum of a scaled column."""
    return int(safe_to_add(scaled).sum()) if len(scaled) else 0


def to_text(scaled: pd.Series, decimals: int) -> pd.Series:
    """Return scaled integers as plain decimal text without an exponent or trailing zeros: ``-1.5``, ``1000``, ``0``."""
    if decimals == 0:
        return scaled.astype(str)
    unit = 10**decimals
    # The smallest int64 has no positive twin; `from_scaled` and `faults` never let a value come near it.
    magnitude = scaled.abs()
    sign = pd.Series(np.where(scaled < 0, "-", ""), index=scaled.index)
    fraction = (magnitude % unit).astype(str).str.zfill(decimals).str.rstrip("0")
    point = pd.Series(np.where(fraction == "", "", "."), index=scaled.index)
    text: pd.Series = sign + (magnitude // unit).astype(str) + point + fraction
    return text


def from_text(text: pd.Series, decimals: int) -> pd.Series:
    """Return plain decimal text, such as the ledger keeps, as scaled integers with the same index.

    Raises:
        pyarrow.ArrowInvalid: a text is not a number, or has more than `decimals` places.
    """
    scaled = to_scaled(pa.array(text, pa.string()).cast(pa.decimal128(PRECISION, decimals)), decimals)
    return scaled.set_axis(text.index)


def to_decimal(scaled: int, decimals: int) -> Decimal:
    """Return one scaled integer as a `Decimal` with `decimals` places."""
    # With room for every digit: the ambient context would round after 28 of them.
    return Decimal(scaled).scaleb(-decimals, Context(prec=4 * PRECISION))


def plain_text(column: pa.Array) -> pa.Array:
    """Return quantities as text, the same for the same value: decimals without exponent or trailing zeros."""
    if not pa.types.is_decimal(column.type):
        return column.cast(pa.string())
    distinct = column.dictionary_encode()
    plain = [None if value is None else _plain(value) for value in distinct.dictionary.to_pylist()]
    return pa.array(plain, pa.string()).take(distinct.indices)


def _plain(value: Decimal) -> str:
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def finite(value: object) -> Decimal | None:
    """Return a number as it is written, a float as its own text, and None for what is no finite number."""
    try:
        number = Decimal(str(value))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
