"""Verdicts on values: a rule about one column judges each distinct value once, whichever rows of any part have it.

Great Expectations takes as long for a part that it has seen a thousand times as for a new one, and a column of a usage
table has few values: accounts, regions, plans. What it says of a value stands for every row that has it.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_FEW, _SHARE = 1_000, 8
"""Values are remembered while a part has no more than so many, or one for so many rows."""
_MOST = 100_000
"""How many are remembered in all."""


class Values:
    """Numbers for the distinct values of one column, null among them, the same in all parts."""

    def __init__(self) -> None:
        self._known: pa.Array | None = None
        self._too_many = False

    def number(self, column: pa.Array) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the number of each row's value, and a row for each value that is new, in the order of their numbers.

        New numbers follow those that were there. None where the column has too many for that to pay, from then on.
        """
        if self._too_many:
            return None
        encoded = column.dictionary_encode(null_encoding="encode")
        distinct = encoded.dictionary
        known = distinct.slice(0, 0) if self._known is None else self._known
        many = len(distinct) > max(_FEW, len(column) // _SHARE) or len(known) + len(distinct) > _MOST
        if many or known.type != distinct.type:
            self._too_many = True
            return None
        numbers = pc.index_in(distinct, value_set=known)
        new = numbers.is_null().to_numpy(zero_copy_only=False)
        self._known = pa.concat_arrays([known, distinct.filter(pa.array(new))])
        of_value = numbers.fill_null(-1).to_numpy(zero_copy_only=False).astype("int64")
        of_value[new] = len(known) + np.arange(new.sum())
        codes = encoded.indices.to_numpy(zero_copy_only=False)
        first = np.full(len(distinct), -1)
        # The last assignment counts: reversed, that is the first row of each value.
        first[codes[::-1]] = np.arange(len(codes))[::-1]
        return of_value[codes], first[new]


class Verdicts:
    """Which of the values that were judged so far fail each of some rules about one column."""

    def __init__(self, rules: Sequence[int]) -> None:
        self.values = Values()
        self._fails = {rule: np.zeros(0, dtype=bool) for rule in rules}

    def learn(self, rule: int, values: int, failing: np.ndarray) -> None:
        """Take in that of so many new values those in these places fail a rule."""
        new = np.zeros(values, dtype=bool)
        new[failing] = True
        self._fails[rule] = np.concatenate([self._fails[rule], new])

    def failing(self, rule: int, numbers: np.ndarray) -> np.ndarray:
        """Return which rows, given by the numbers of their values, fail a rule."""
        rows: np.ndarray = np.flatnonzero(self._fails[rule][numbers])
        return rows
