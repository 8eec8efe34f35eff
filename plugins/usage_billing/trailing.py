"""What a reading has of each usage period, and which columns its query returned: what later readings are judged by.

A reading that goes on is remembered in the ledger, the newest for each usage period; one that was stopped is not, so it
never becomes what is usual. A usage period is compared with those before it alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.ledger import Ledger
from usage_billing.periods import locate
from usage_billing.records import Measured, Period, Reading, Staged
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging, array_of

UNSEEN = "unseen"
"""The type of a column in which no value was seen; some drivers know a type by its values alone."""

_UTC = pa.timestamp("us", "UTC")


class History(Protocol):
    """What validation asks of the ledger."""

    def now(self) -> datetime:
        """Return the time by the ledger's clock."""

    def measured_before(self, name: str, before: datetime, most: int, since: datetime) -> list[Measured]:
        """Return what the last `most` usage periods from `since` to `before` had that had any rows, newest first."""

    def columns_read(self, name: str) -> dict[str, str]:
        """Return which columns the query of a source returned in the newest reading that went on: type by name."""


# --- columns --------------------------------------------------------------------------------------------------------


def seen(batches: Iterable[pa.Table], columns: dict[str, str]) -> Iterator[pa.Table]:
    """Yield the tables of a query, and note the type of each of their columns: several, where tables differ in it."""
    for batch in batches:
        for field in batch.schema:
            kinds = {*columns.get(field.name, UNSEEN).split(" or "), _kind(field.type)}
            columns[field.name] = " or ".join(sorted(kinds - {UNSEEN})) or UNSEEN
        yield batch


def _kind(kind: pa.DataType) -> str:
    """Return the name of a type, the same wherever the query runs: text is text, and a zone is the session's."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_null(kind):
        return UNSEEN
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return "string"
    return f"timestamp[{kind.unit}, zoned]" if pa.types.is_timestamp(kind) and kind.tz else str(kind)


def keep_columns(columns: Mapping[str, str], staging: Staging, folder: str) -> None:
    """Write down, beside the rows of a reading, which columns its query returned."""
    staging.remember(_columns_file(folder), columns)


def _columns(staging: Staging, folder: str) -> dict[str, str] | None:
    return staging.recall(_columns_file(folder))


def _columns_file(folder: str) -> str:
    return f"{folder}/columns.json"


# --- usage periods --------------------------------------------------------------------------------------------------


class Measures:
    """What a reading has of each of its usage periods, and what its source had before them.

    Rows count for the usage period that their time lies in, whatever else is wrong with them; those without a time, or
    with one outside, count for none.
    """

    def __init__(
        self,
        extracted: Staged,
        source: BillingSource,
        periods: Sequence[Period],
        history: History,
        staging: Staging,
        folder: str,
    ) -> None:
        self.columns = _columns(staging, folder)
        self._source = source
        self._periods = periods
        self._history = history
        self._rows = np.zeros(len(periods), dtype="int64")
        self._latest = np.full(len(periods), np.iinfo("int64").min)
        for part in staging.read(extracted, ["time"]):
            moments, places = self._placed(part)
            self._rows += np.bincount(places, minlength=len(periods))
            np.maximum.at(self._latest, places, moments.astype("int64"))
        self._accepted = self._rows
        # Nothing adds up to nothing; what rows add up to is known once they are judged.
        nothing = Decimal(0) if source.settings.meter.function == "sum" and not extracted.rows else None
        self._sums: list[Decimal | None] = [nothing] * len(periods)

    def _placed(self, part: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Return the times of a part that lie in usage periods, and the places of these."""
        moments = array_of(part, "time").to_numpy(zero_copy_only=False).astype("datetime64[us]")
        places = locate(moments, self._periods)
        return moments[places >= 0], places[places >= 0]

    def add_accepted(self, accepted: Staged, staging: Staging) -> None:
        """Take in what of the rows was accepted, and what that adds up to where the meter is a sum."""
        self._accepted = np.zeros(len(self._periods), dtype="int64")
        meter = self._source.settings.meter
        sums = [0] * len(self._periods)
        for part in staging.read(accepted, ["time", "quantity"] if meter.function == "sum" else ["time"]):
            _, places = self._placed(part)
            self._accepted += np.bincount(places, minlength=len(self._periods))
            if meter.function == "sum":
                frame = pd.DataFrame(
                    {"place": places, "scaled": quantities.to_scaled(part["quantity"], meter.decimals)}
                )
                summed = quantities.sum_by(frame, ["place"], "scaled")
                for place, scaled in zip(summed["place"].tolist(), summed["scaled"].tolist(), strict=True):
                    sums[place] += int(scaled)
        if meter.function == "sum":
            self._sums = [quantities.to_decimal(scaled, meter.decimals) for scaled in sums]

    def by_period(self, most: int) -> pd.DataFrame:
        """Return a row per usage period, in order, with what the up to `most` before it had, newest first.

        Columns: period (as text), start, end, latest (the last time in it, or none), rows, quantity; and rows_before
        and quantity_before, tuples.
        """
        since = self._source.span.start
        before = [
            self._history.measured_before(self._source.name, period.start, most, since) if most else []
            for period in self._periods
        ]
        none = np.iinfo("int64").min
        latest = [None if moment == none else pd.Timestamp(moment, unit="us", tz="UTC") for moment in self._latest]
        columns: dict[str, list[Any]] = {
            "period": [str(period) for period in self._periods],
            "start": [period.start for period in self._periods],
            "end": [period.end for period in self._periods],
            "latest": latest,
            "rows": self._rows.tolist(),
            "quantity": list(self._sums),
            "rows_before": [tuple(each.rows for each in found) for found in before],
            "quantity_before": [tuple(each.quantity for each in found if each.quantity) for found in before],
        }
        # Python's own objects: pandas would make floats of what is sometimes missing.
        return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})

    def by_column(self) -> pd.DataFrame:
        """Return a row per column of the query: its name, its type now and in the reading before, None where it lacks.

        No rows where nobody noted the columns of this reading.
        """
        now, before = self.columns or {}, self._history.columns_read(self._source.name) if self.columns else {}
        names = sorted({*now, *before})
        columns = {"column": names, "now": map(now.get, names), "before": map(before.get, names)}
        return pd.DataFrame({name: pd.Series(list(values), dtype=object) for name, values in columns.items()})

    def staged(self, staging: Staging, folder: str) -> Staged:
        """Stage what is to be remembered of the reading once it goes on; see `remember`."""
        sums = [None if quantity is None else f"{quantity:f}" for quantity in self._sums]
        columns = {
            "period_start": pa.array([period.start for period in self._periods], _UTC),
            "period_end": pa.array([period.end for period in self._periods], _UTC),
            "rows": pa.array(self._rows, pa.int64()),
            "rows_quarantined": pa.array(self._rows - self._accepted, pa.int64()),
            "quantity": pa.array(sums, pa.string()),
        }
        return staging.write(folder, "measured", [pa.table(columns)])


def remember(name: str, reading: Reading, measured: Staged, staging: Staging, folder: str, ledger: Ledger) -> None:
    """Write down in the ledger what a reading that goes on had, so that it counts for what is usual."""
    rows = [row for part in staging.read(measured) for row in part.to_pylist()]
    found = [
        Measured(
            Period(row["period_start"], row["period_end"]),
            row["rows"],
            row["rows_quarantined"],
            None if row["quantity"] is None else Decimal(row["quantity"]),
        )
        for row in rows
    ]
    before = ledger.columns_read(name)
    # A column without any value today is still of the type that it was.
    columns = {
        column: before.get(column, kind) if kind == UNSEEN else kind
        for column, kind in (_columns(staging, folder) or {}).items()
    }
    ledger.record_measured(name, reading, found, columns)
