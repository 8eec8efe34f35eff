"""Aggregate: accepted rows into usage totals, one per identity, exactly.

Each part is reduced by itself, and the partial results are reduced again: in memory while they are few, by ranges of
the identity on disk when they are many. Neither the order of the parts, nor their size, nor the number of ranges
changes a total. Sums are of fixed-point integers (`quantities`), which leave 64 bits rather than overflow.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import cast

import numpy as np
import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.errors import Misconfigured
from usage_billing.moves import Moves, Places
from usage_billing.periods import locate
from usage_billing.records import Comparison, Period, Staged
from usage_billing.sources import BillingSource, Meter
from usage_billing.staging import Spill, Staging
from usage_billing.uniqueness import identity

_UTC = pa.timestamp("us", "UTC")
_MAX_RANGES = 256


def aggregate(
    accepted: Staged,
    targets: Staged,
    source: BillingSource,
    site: str,
    periods: Sequence[Period],
    staging: Staging,
    folder: str,
    moves: Staged | None = None,
) -> Staged:
    """Stage the usage totals of `accepted` below `folder`, sorted by identity throughout all parts.

    What an account used before it moved counts as `moves` say (see `moves.placed`).

    Columns: ``identity`` (64 hexadecimal characters), ``account`` (the smallest that adds to it, one that leads there
    today before one that did), ``subscription``, ``component``, ``price_point``, ``address`` and ``open_from`` (that
    account's), ``dimensions`` (canonical JSON text), ``period_start``, ``period_end`` (UTC), ``events``, ``quantity``
    (``decimal128(38, decimals)``). Parts hold at most ``batch_rows`` rows; a part's first and last rows are its lowest
    and highest identities.

    Memory holds the targets and about ``batch_rows`` rows of partial results.

    Raises:
        Misconfigured: an accepted row has no target or no period; the stages do not fit together.
        OverflowError: a total has more than 38 digits.
    """
    settings = source.settings
    places = Places(pa.concat_tables(staging.read(targets)), periods, Moves.staged(source.name, moves, staging))
    grouping = _Grouping(source, site, periods, places)
    reduction = _Reduction(settings.meter)
    partial = (grouping.identified(reduction, part) for part in staging.read(accepted))
    ranges = min(-(-accepted.rows // settings.batch_rows), _MAX_RANGES) or 1
    with Spill() as spill:
        reduced = _combined(partial, reduction, settings.batch_rows, ranges, spill)
        totals = (grouping.totals(reduction.finish(frame)) for frame in reduced)
        return staging.write(folder, "totals", _parts(totals, settings.batch_rows))


def at_former_places(
    comparison: Comparison, source: BillingSource, site: str, staging: Staging, folder: str
) -> list[Staged]:
    """Stage totals as if no account had moved the last time, nor the time before that, and so on to the first.

    Each has the columns of `aggregate`: every identity under which an account's usage may have been billed is in one of
    them, or in the totals of the comparison. Raises what `aggregate` raises.
    """
    if comparison.events is None:
        raise ValueError("only a comparison that holds its accepted rows can be counted anew")
    accepted, periods = comparison.events, comparison.periods
    moves = Moves.staged(source.name, comparison.moves, staging)
    former = moves.former(pa.concat_tables(staging.read(comparison.targets)))
    found = []
    for steps, before in enumerate(former, 1):
        place = f"{folder}/former-{steps}"
        led = staging.write(place, "targets", [before])
        found.append(aggregate(accepted, led, source, site, periods, staging, place))
    return found


def canonical_json(values: Mapping[str, str | None]) -> str:
    """Return dimensions as the JSON text that stands in identities: sorted keys, no spaces; a missing value is null."""
    return json.dumps(dict(values), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


class _Reduction:
    """What the meter measures: rows that share their keys become one, any number of times, in any order.

    A frame has its keys, ``account`` (the smaller number stands), ``events`` (added) and, by the meter's function:
    ``scaled`` (sum, max), ``scaled`` with ``time`` and ``event_id`` (last), or ``value`` (unique), which is one more
    key until `finish`.
    """

    def __init__(self, meter: Meter) -> None:
        self._function = meter.function
        self._decimals = meter.decimals

    def measured(self, part: pa.Table) -> dict[str, pd.Series]:
        """Return what the meter needs of a part's rows, by column."""
        if self._function == "count":
            return {}
        if self._function == "unique":
            return {"value": part.column("quantity").to_pandas()}
        columns = {"scaled": quantities.to_scaled(part.column("quantity"), self._decimals)}
        if self._function == "last":
            columns |= {
                "time": part.column("time").cast(pa.int64()).to_pandas(),
                "event_id": part.column("event_id").to_pandas(),
            }
        return columns

    def reduce(self, frame: pd.DataFrame, by: str) -> pd.DataFrame:
        """Return one row per value of `by` (and per distinct measured value, where those are counted)."""
        keys = [by, "value"] if self._function == "unique" else [by]
        groups = frame.groupby(keys, sort=False, as_index=False)
        reduced: pd.DataFrame = groups.agg(account=("account", "min"), events=("events", "sum"))
        if self._function == "sum":
            reduced["scaled"] = quantities.sum_by(frame[[by, "scaled"]], [by], "scaled")["scaled"]
        elif self._function == "max":
            reduced["scaled"] = groups["scaled"].max()["scaled"]
        elif self._function == "last":
            latest = frame.sort_values(["time", "event_id"], kind="stable").drop_duplicates(by, keep="last")
            reduced = reduced.merge(latest[[by, "scaled", "time", "event_id"]], on=by, validate="1:1")
        return reduced

    def finish(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Return a wholly reduced frame, one row per identity, with its quantity in ``scaled``."""
        if self._function == "unique":
            groups = frame.groupby("identity", sort=False, as_index=False)
            named = {"account": ("account", "min"), "events": ("events", "sum"), "scaled": ("value", "size")}
            first = ("period", "first"), ("dimensions", "first")
            return groups.agg(**named, **{name: (name, how) for name, how in first})
        return frame.assign(scaled=frame["events"]) if self._function == "count" else frame

    def to_table(self, frame: pd.DataFrame) -> pa.Table:
        """Return a frame in a form that keeps every integer exact on disk."""
        table = pa.Table.from_pandas(frame.drop(columns="scaled", errors="ignore"), preserve_index=False)
        return table.append_column("scaled", quantities.from_scaled(frame["scaled"], 0)) if "scaled" in frame else table

    def from_table(self, table: pa.Table) -> pd.DataFrame:
        """Return the frame that `to_table` was given."""
        if "scaled" not in table.column_names:
            return cast("pd.DataFrame", table.to_pandas())
        frame = cast("pd.DataFrame", table.drop_columns("scaled").to_pandas())
        return frame.assign(scaled=quantities.to_scaled(table.column("scaled"), 0))


class _Grouping:
    """The words of a usage total: what its identity is made of, where it is billed, which period it covers."""

    def __init__(self, source: BillingSource, site: str, periods: Sequence[Period], places: Places) -> None:
        self._source = source
        self._site = site
        self._periods = periods
        self._places = places
        self._targets = places.targets
        names = self._targets.select(["subscription", "component", "price_point"]).to_pandas()
        self._key = names.groupby(list(names), sort=False).ngroup().to_numpy()
        self._words = list(names.drop_duplicates().itertuples(index=False, name=None))
        self._edges = [(_iso(period.start), _iso(period.end)) for period in periods]

    def identified(self, reduction: _Reduction, part: pa.Table) -> pd.DataFrame:
        """Return a part reduced to one row per identity, with its words.

        These are ``identity``, ``period`` (index) and ``dimensions`` (text).

        Raises:
            Misconfigured: a row has no target or no period.
        """
        period = locate(part.column("time").to_numpy(), self._periods)
        account = self._places.of(part.column("account"), period)
        if (account < 0).any() or (period < 0).any():
            raise Misconfigured(
                "aggregate: an accepted row has no target or no usage period; clear the run from extract on"
            )
        key, dimensions, texts = self._key[account], *self._dimensions(part)
        group = _folded(_folded(key, period), dimensions)
        # One row of each group stands for it: rows are looked at one by one by nothing but compiled code.
        first = _first(group)
        words = pd.DataFrame(
            {"period": period[first], "dimensions": pd.Series(texts, dtype="str").take(dimensions[first]).array}
        )
        words["identity"] = pd.Series(self._identities(key[first], words), dtype="str")
        rows = pd.DataFrame({"group": group, "account": account, "events": 1, **reduction.measured(part)})
        reduced = reduction.reduce(rows, "group")
        group_words = words.iloc[reduced["group"].to_numpy()].reset_index(drop=True)
        return pd.concat([reduced.drop(columns="group"), group_words], axis="columns")

    def _dimensions(self, part: pa.Table) -> tuple[np.ndarray, list[str]]:
        """Return for each row the number of its dimensions' text, and the texts."""
        names = list(self._source.settings.dimensions)
        number = np.zeros(part.num_rows, dtype="int64")
        for name in names:
            number = _folded(number, _codes(part.column(name)))
        if not names:
            return number, ["{}"]
        distinct = part.select(names).take(pa.array(_first(number)))
        return number, [canonical_json(row) for row in distinct.to_pylist()]

    def _identities(self, key: np.ndarray, words: pd.DataFrame) -> list[str]:
        fixed = (self._site, self._source.name)
        rows = zip(key.tolist(), words["period"].tolist(), words["dimensions"].tolist(), strict=True)
        return [identity((*fixed, *self._words[k], dimensions, *self._edges[period])) for k, period, dimensions in rows]

    def totals(self, frame: pd.DataFrame) -> pa.Table:
        """Return finished totals in the columns of `aggregate`."""
        decimals = self._source.settings.meter.decimals
        address = self._targets.take(pa.array(frame["account"], pa.int64()))
        period = frame["period"].to_numpy(dtype="int64")
        starts, ends = (
            pa.array(edges, _UTC) for edges in ([p.start for p in self._periods], [p.end for p in self._periods])
        )
        whole = quantities.from_scaled(frame["scaled"], decimals)
        return pa.table(
            {
                "identity": pa.array(frame["identity"], pa.string()),
                **{name: address.column(name) for name in ("account", "subscription", "component", "price_point")},
                **{name: address.column(name) for name in ("address", "open_from")},
                "dimensions": pa.array(frame["dimensions"], pa.string()),
                "period_start": starts.take(pa.array(period)),
                "period_end": ends.take(pa.array(period)),
                "events": pa.array(frame["events"], pa.int64()),
                "quantity": whole,
            }
        )


def _iso(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    """Return a small integer per row that stands for its value; null is a value, too."""
    encoded = column.combine_chunks().dictionary_encode(null_encoding="encode")
    if isinstance(encoded, pa.ChunkedArray):
        return np.zeros(0, dtype="int64")
    codes: np.ndarray = encoded.indices.to_numpy().astype("int64")
    return codes


def _folded(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return one number per distinct pair, in order of appearance; numbers stay below the number of rows."""
    if not len(left):
        return left
    codes: np.ndarray = pd.factorize(left * (int(right.max()) + 1) + right)[0]
    return codes


def _first(numbers: np.ndarray) -> np.ndarray:
    """Return the position at which each number appears first."""
    return np.flatnonzero(~pd.Series(numbers).duplicated().to_numpy())


def _combined(
    partial: Iterable[pd.DataFrame], reduction: _Reduction, batch_rows: int, ranges: int, spill: Spill
) -> Iterator[pd.DataFrame]:
    """Yield the partial results reduced to one row per identity, ascending by identity."""
    held: list[pd.DataFrame] = []
    for frame in partial:
        held.append(frame)
        if sum(map(len, held)) > batch_rows:
            held = [_reduced(held, reduction)]
            # Reducing did not help much, so there are many identities: the rest of the work is done range by range.
            if len(held[0]) > batch_rows // 2:
                spill.add(reduction.to_table(held[0]), _range(held[0]["identity"], ranges))
                held = []
    if not spill.numbers():
        yield _reduced(held, reduction)
        return
    if held:
        last = _reduced(held, reduction)
        spill.add(reduction.to_table(last), _range(last["identity"], ranges))
    for number in spill.numbers():
        yield _reduced([reduction.from_table(spill.read(number))], reduction)


def _reduced(frames: list[pd.DataFrame], reduction: _Reduction) -> pd.DataFrame:
    frame = pd.concat(frames, ignore_index=True)
    words = frame[["identity", "period", "dimensions"]].drop_duplicates("identity")
    reduced = reduction.reduce(frame, "identity").merge(words, on="identity", validate="m:1")
    keys = ["identity", "value"] if "value" in reduced else ["identity"]
    return reduced.sort_values(keys, ignore_index=True)


def _range(identities: pd.Series, ranges: int) -> np.ndarray:
    """Return the number of the range of each identity, by its first four hexadecimal digits; ranges ascend."""
    digits = np.array(identities.to_list(), dtype="S64").view("u1").reshape(-1, 64)[:, :4].astype("int64")
    values = np.where(digits < ord("a"), digits - ord("0"), digits - ord("a") + 10)
    number: np.ndarray = values @ np.array([4096, 256, 16, 1]) * ranges >> 16
    return number


def _parts(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `rows` rows, the last one shorter, so that parts do not show the ranges."""
    held: pa.Table | None = None
    for table in tables:
        held = table if held is None else pa.concat_tables([held, table])
        while held.num_rows > rows:
            yield held.slice(0, rows).combine_chunks()
            held = held.slice(rows)
    if held is not None:
        yield held.combine_chunks()
