"""Quarantine: rows that may not be billed, each by its name; what waits for them, and what a person wrote off.

A row is named by all that it says, so that a decision about it holds for just this row: once the warehouse corrects it,
it is another row, and judged anew.

Quarantine withholds, it never withdraws: where a row that is set aside may have been billed, no negative difference is
sent until the row is mended, gone, or written off by name.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from hashlib import sha256
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing.ledger import Ledger
from usage_billing.moves import PLACE
from usage_billing.periods import locate
from usage_billing.quantities import finite, plain_text
from usage_billing.records import WRITTEN_OFF, Comparison, Period, Staged
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging, array_of

_FIXED = ("event_id", "time", "account", "quantity")
_VERDICT = ("reasons", "duplicate")
_KEY = ["subscription", "component", "period_start"]


def names_of(rows: pa.Table) -> pa.Array:
    """Return the name of each row, 64 hexadecimal characters: the same for rows that say the same."""
    return pa.array([_name(row) for row in _spelt(rows).to_pylist()], pa.string())


def _spelt(rows: pa.Table) -> pa.Table:
    if "quantity" in rows.column_names and not pa.types.is_string(rows.schema.field("quantity").type):
        text = plain_text(array_of(rows, "quantity"))
        rows = rows.set_column(rows.column_names.index("quantity"), "quantity", text)
    return rows.select([name for name in rows.column_names if name not in _VERDICT])


def _name(row: dict[str, object]) -> str:
    time = row["time"]
    told = row | {"time": None if time is None else str(time), "quantity": _number(row.get("quantity"))}
    return sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _number(text: object) -> object:
    """Return a number as it is always spelt; another query may give it as another type."""
    number = finite(text)
    return text if number is None else f"{number.normalize():f}"


@dataclass(frozen=True, slots=True)
class WrittenOff:
    """Rows that a person wrote off, by name; `events` are their ids, empty for a row without one.

    What was written off as a duplicate is never billed as one; should it be the only row of its event some day, it is
    the event.
    """

    events: frozenset[str] = frozenset()
    rows: frozenset[str] = frozenset()
    duplicates: frozenset[str] = frozenset()

    @classmethod
    def of(cls, source: BillingSource, ledger: Ledger) -> Self:
        """Return what was written off of a source."""
        rows = ledger.rows_written_off(source.name)
        twice = rows["as_duplicate"].astype(bool)
        kinds = rows.loc[~twice, "event_id"], rows.loc[~twice, "row_name"], rows.loc[twice, "row_name"]
        return cls(*(frozenset(kind) for kind in kinds))

    def among(self, part: pa.Table) -> np.ndarray:
        """Return the numbers of the rows of a part that may not be billed, whatever else is known of them."""
        if not self.rows:
            return np.array([], dtype="int64")
        # A hash of every row would cost more than all rules together.
        ids = pc.fill_null(array_of(part, "event_id"), "")
        likely = np.flatnonzero(pc.is_in(ids, pa.array(sorted(self.events))).to_numpy(zero_copy_only=False))
        return self._named(part, likely, self.rows)

    def among_duplicates(self, part: pa.Table, twice: np.ndarray) -> np.ndarray:
        """Return which of the rows `twice`, all of them duplicates, a person wrote off as such."""
        return self._named(part, twice, self.duplicates) if self.duplicates else twice[:0]

    @staticmethod
    def _named(part: pa.Table, numbers: np.ndarray, wanted: frozenset[str]) -> np.ndarray:
        names = names_of(part.take(pa.array(numbers, pa.int64())))
        found: np.ndarray = numbers[[name in wanted for name in names.to_pylist()]]
        return found


class Withheld:
    """Where a row that is set aside may have been billed: nothing is taken back there."""

    def __init__(self, periods: Sequence[pd.Timestamp], keys: pd.DataFrame, accounts: pd.DataFrame) -> None:
        self._periods = frozenset(periods)
        self._keys = pd.MultiIndex.from_frame(keys)
        self._accounts = pd.MultiIndex.from_frame(accounts)

    @classmethod
    def of(cls, comparison: Comparison, source: BillingSource, ledger: Ledger, staging: Staging) -> Self:
        """Return where the quarantined rows of a comparison may have been billed.

        A row belongs to its account's usage period, wherever the account leads, or ever led. Without an account it may
        belong to anything of its usage period, and without a usage period to anything of its account that is compared.
        """
        starts = [pd.Timestamp(period.start) for period in comparison.periods]
        rows = _set_aside(comparison, staging)
        if rows is None:
            # A run that was under way when this package was upgraded does not say which they are.
            return cls(starts if comparison.rows_quarantined else [], _NO_KEYS, _NO_ACCOUNTS)
        rows = rows.merge(pd.DataFrame({"number": [-1] * len(starts), "period_start": starts}), on="number", how="left")
        own = rows["number"] >= 0
        rows.loc[own, "period_start"] = [starts[number] for number in rows.loc[own, "number"]]
        nobody = rows["account"].isna()
        named = rows.loc[~nobody, ["account", "period_start"]].drop_duplicates()
        led = _places(named["account"].unique().tolist(), comparison, source, ledger, staging)
        return cls(rows.loc[nobody, "period_start"].tolist(), named.merge(led, on="account")[_KEY], named)

    def covers(self, rows: pd.DataFrame) -> np.ndarray:
        """Say of each row (subscription, component, account, period_start) whether it is one of these."""
        found: np.ndarray = rows["period_start"].isin(self._periods).to_numpy()
        for columns, known in ((_KEY, self._keys), (["account", "period_start"], self._accounts)):
            if len(known):
                found = found | pd.MultiIndex.from_frame(rows[columns]).isin(known)
        return found


_TIMES = pd.DatetimeTZDtype("us", "UTC")
_NO_KEYS = pd.DataFrame({"subscription": [], "component": [], "period_start": pd.Series(dtype=_TIMES)})
_NO_ACCOUNTS = _NO_KEYS[["component", "period_start"]].rename(columns={"component": "account"})


def _set_aside(comparison: Comparison, staging: Staging) -> pd.DataFrame | None:
    """Return account and number of the usage period (-1: none) of the rows that withhold something."""
    aside = _named(comparison, staging)
    if aside is None:
        return None
    parts = [pd.DataFrame({"account": pd.Series(dtype=object), "number": pd.Series(dtype="int64")})]
    for part in staging.read(aside, ["account", "time", *_VERDICT]):
        waits = part.filter(_withholds(part))
        numbers = _numbers(waits, comparison.periods)
        parts.append(pd.DataFrame({"account": waits.column("account").to_pandas(), "number": numbers}))
    return pd.concat(parts, ignore_index=True).drop_duplicates(ignore_index=True)


def _named(comparison: Comparison, staging: Staging) -> Staged | None:
    """Return the rows that were set aside, None for a run that was under way when this package was upgraded.

    Such a one does not say of all that withholding, and a name, hang on.
    """
    aside = comparison.quarantined
    known = aside is not None and {*_VERDICT} <= {*next(staging.read(aside)).column_names}
    return aside if known else None


def _open(quarantined: pa.Table) -> pa.Array:
    """Say of each row whether nobody has written it off."""
    return pa.array([WRITTEN_OFF not in some for some in quarantined.column("reasons").to_pylist()], pa.bool_())


def _withholds(quarantined: pa.Table) -> pa.Array:
    """Say of each row whether it may be owed, once it is mended: a duplicate is not, and what was written off."""
    return pc.and_not(_open(quarantined), array_of(quarantined, "duplicate"))


def _numbers(rows: pa.Table, periods: Sequence[Period]) -> np.ndarray:
    """Return the number of each row's usage period, -1 where it is none of `periods`."""
    return locate(array_of(rows, "time").to_numpy(zero_copy_only=False), periods)


def _places(
    accounts: Sequence[str], comparison: Comparison, source: BillingSource, ledger: Ledger, staging: Staging
) -> pd.DataFrame:
    """Return where accounts lead, and where the ledger ever saw them lead: account, subscription, component."""
    columns = ["account", *PLACE[:2]]
    today = pd.concat([part.select(columns).to_pandas() for part in staging.read(comparison.targets)])
    before = ledger.placements(source.name, source.edition, accounts)[columns] if accounts else today[:0]
    both: pd.DataFrame = pd.concat([today, before], ignore_index=True)
    return both[both["account"].isin(accounts)].drop_duplicates(ignore_index=True)


# --- by name, for the ledger and for a person -----------------------------------------------------------------------


def write_down(comparison: Comparison, source: BillingSource, ledger: Ledger, staging: Staging) -> None:
    """List by name what a reading set aside, as the one that is compared now.

    Raises what `Ledger.begin_comparison` raises; a later reading of a usage period has the say there.
    """
    ledger.begin_comparison(source.name, comparison.reading, comparison.periods, source.edition)
    if (aside := _named(comparison, staging)) is not None:
        rows = listed(aside, comparison.periods, staging)
        ledger.list_quarantine(source.name, comparison.reading, comparison.periods, rows)


def listed(quarantined: Staged, periods: Sequence[Period], staging: Staging) -> Iterator[pd.DataFrame]:
    """Yield the quarantined rows of a reading of `periods` as the ledger lists them, part by part.

    Columns: row_name, event_id, time (UTC or None), account, quantity (text), dimensions (JSON text), reasons
    (JSON text), period_start, period_end, and placed: whether that is its own usage period; a row whose time gives none
    stands under the last one. And as_duplicate: whether another row of its event is all that speaks against it; and
    copies, 1 each: rows may say the same.
    """
    for part in staging.read(quarantined):
        if not part.num_rows:
            continue
        numbers = _numbers(part, periods)
        # What stands for a time and is none is told beside the dimensions, in the part that has such times.
        dimensions = [name for name in part.column_names if name not in {*_FIXED, *_VERDICT}]
        frame = pd.DataFrame(
            {
                "row_name": names_of(part).to_pylist(),
                "time": part.column("time").to_pylist(),
                **{name: _texts(part, name) for name in ("event_id", "account", "quantity")},
                "dimensions": [json.dumps(row, sort_keys=True) for row in part.select(dimensions).to_pylist()]
                if dimensions
                else "{}",
                "reasons": [json.dumps(reasons) for reasons in part.column("reasons").to_pylist()],
                "period_start": [periods[number].start for number in numbers],
                "period_end": [periods[number].end for number in numbers],
                "placed": numbers >= 0,
                "as_duplicate": part.column("duplicate").to_pylist(),
                "copies": 1,
            },
            dtype=object,
        )
        yield frame


def _texts(part: pa.Table, name: str) -> list[str]:
    if name not in part.column_names:
        return [""] * part.num_rows
    return [value or "" for value in part.column(name).to_pylist()]


def concerned(quarantined: Staged, staging: Staging) -> pd.DataFrame:
    """Return whom the quarantined rows of a reading concern, as `by_account` does, but for those written off."""
    parts = []
    for part in staging.read(quarantined):
        waits = part.filter(_open(part))
        reasons = [some[0] for some in waits.column("reasons").to_pylist()]
        parts.append(_usage(_texts(waits, "account"), reasons, [1] * len(reasons), _texts(waits, "quantity")))
    return _together(pd.concat(parts, ignore_index=True))


def by_account(rows: pd.DataFrame) -> pd.DataFrame:
    """Return how much each account has among rows (columns of `Ledger.quarantined`).

    Columns: account, reason (each row's first), rows, and usage: what is a number, added (`Decimal`),
    whatever the meter makes of it. Most rows first.
    """
    reasons = [json.loads(text)[0] for text in rows["reasons"]]
    columns = (rows[name].tolist() for name in ("copies", "quantity"))
    return _together(_usage(rows["account"].tolist(), reasons, *columns))


def _usage(accounts: list[str], reasons: list[str], copies: list[int], quantities: list[str]) -> pd.DataFrame:
    usage = [(finite(text) or Decimal(0)) * count for text, count in zip(quantities, copies, strict=True)]
    counts = pd.Series(copies, dtype="int64")
    return pd.DataFrame(
        {"account": accounts, "reason": reasons, "rows": counts, "usage": pd.Series(usage, dtype=object)}
    )


def _together(frame: pd.DataFrame) -> pd.DataFrame:
    groups = frame.groupby(["account", "reason"], sort=True)
    found = groups.agg(rows=("rows", "sum"), usage=("usage", lambda values: sum(values, Decimal(0)))).reset_index()
    return found.sort_values(["rows", "account"], ascending=[False, True], ignore_index=True)
