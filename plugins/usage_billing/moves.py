"""Moves: accounts that lead to another subscription than they did, and where each usage period of theirs belongs.

The ledger keeps every place that an account was seen to lead to, and since which usage period. Usage of later periods
goes to the new place. What was used before is for a person: until they choose, it is counted at the new place and every
difference on both sides is held; with `move` the former place is credited before the new one is billed; with `from_now`
it is counted where it was.

An account under another edition of the source's definition is another matter: its usage has another identity anyway.

A run takes down the places once, after its look-up, and is counted and planned by that, whatever is decided meanwhile.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from shlex import quote
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing.ledger import Ledger
from usage_billing.records import EVER, FOLLOWS, MOVED, Choice, Period, Staged
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging

PLACE = ["subscription", "component", "price_point"]
"""What of an identity a move changes."""
_KEY = [*PLACE, "dimensions", "period_start"]
"""What stands for an identity within one source and site."""

_UTC = pa.timestamp("us", "UTC")
_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        *((name, pa.string()) for name in ("account", *PLACE, "address")),
        ("since", _UTC),
        ("decision", pa.string()),
    ]
)
_BEGINNING, _END = pd.Timestamp(EVER.start), pd.Timestamp(datetime(2262, 1, 1, tzinfo=UTC))
_NOT_YET = np.iinfo("int64").max


def placed(
    targets: Staged,
    source: BillingSource,
    looked_up_at: datetime,
    ledger: Ledger,
    staging: Staging,
    folder: str,
    *,
    look_only: bool = False,
    billed_until: datetime = EVER.start,
) -> Staged:
    """Write down where the accounts of `source` lead by now; stage the places of those that moved below `folder`.

    `targets` is what validation found from `looked_up_at` on, by the ledger's time. Where one only looks, nothing is
    written down, and the places are those that would be. Until `billed_until` usage may have been billed of which the
    ledger does not know: an account that moved unseen is taken to have used it before.

    Raises:
        NotApplied: a later look-up saw some of them elsewhere.
    """
    frame = led_today(targets, staging)
    new = ledger.displaced(source.name, source.edition, frame, billed_until)
    if len(new) and not look_only:
        ledger.place(source.name, source.edition, new[list(frame)], looked_up_at, billed_until)
    seen = new[new["since"].notna()] if look_only else new.iloc[:0]
    known = ledger.placements(source.name, source.edition, seen["account"].tolist())
    rows = pd.concat([known, seen.assign(number=_NOT_YET, decision="")]) if len(seen) else known
    ordered = rows.sort_values(["account", "number"]).reindex(columns=_SCHEMA.names)
    ordered["since"] = pd.to_datetime(ordered["since"], utc=True)
    return staging.write(folder, "moves", [pa.Table.from_pandas(ordered, schema=_SCHEMA, preserve_index=False)])


def place(
    targets: Staged,
    source: BillingSource,
    looked_up_at: datetime,
    ledger: Ledger,
    staging: Staging,
    billed_until: datetime,
) -> None:
    """Write down what `placed` only looked at, once that is the whole of what it looked for; raises what it raises."""
    ledger.place(source.name, source.edition, led_today(targets, staging), looked_up_at, billed_until)


def led_today(targets: Staged, staging: Staging) -> pd.DataFrame:
    """Return where accounts lead by a look-up: account, the place (`PLACE`) and its address."""
    columns = ["account", *PLACE, "address"]
    parts: list[pd.DataFrame] = [part.select(columns).to_pandas() for part in staging.read(targets)]
    return pd.concat(parts, ignore_index=True)


class Moves:
    """The places of accounts that moved (columns of `Ledger.placements`), and what follows for each usage period."""

    def __init__(self, name: str, placements: pd.DataFrame) -> None:
        self._name = name
        self.placements = placements.sort_values(["account", "number"], ignore_index=True)

    @classmethod
    def staged(cls, name: str, moves: Staged | None, staging: Staging) -> Self:
        """Return what `placed` staged; none for a run that was under way when this package was upgraded."""
        parts = [part.to_pandas() for part in staging.read(moves)] if moves else [_SCHEMA.empty_table().to_pandas()]
        return cls(name, pd.concat(parts, ignore_index=True))

    @cached_property
    def counted(self) -> pd.DataFrame:
        """One row for each account and span of time, with the place at which its usage of then is counted.

        A place is in force from its `since` on; for usage of before that, too, unless a person chose `from_now`.
        Columns: account, step (the number of the place that it led to then), counted (of the place that counts), start,
        end, the place with its address, back (whether that is not the place of today), undecided
        (whether it would be another one if a person chose `from_now`).
        """
        rows = self.placements
        step = rows.groupby("account").cumcount()

        def counted_at(which: pd.Series) -> pd.Series:
            last = step[which].groupby(rows["account"]).max()
            return step.clip(lower=rows["account"].map(last).fillna(0)).astype("int64")

        start = pd.to_datetime(rows["since"], utc=True).fillna(_BEGINNING)
        end = start.groupby(rows["account"]).shift(-1).fillna(_END)
        counted = counted_at(rows["decision"] != Choice.FROM_NOW)
        otherwise = counted_at(rows["decision"] == Choice.MOVE)
        first, places = rows.index - step, rows[PLACE].to_numpy()
        undecided = (places[first + counted] != places[first + otherwise]).any(axis=1)
        spans = rows[["account"]].assign(step=step, counted=counted, start=start, end=end, undecided=undecided)
        at = spans[start < end].merge(self._steps.rename(columns={"step": "counted"}), on=["account", "counted"])
        today = self._steps.drop_duplicates("account", keep="last")
        at = at.merge(today[["account", *PLACE]], on="account", suffixes=("", "_today"))
        back = _places(at, "").ne(_places(at, "_today")).any(axis="columns")
        return at.assign(back=back)

    @cached_property
    def _steps(self) -> pd.DataFrame:
        """The places of each account, numbered."""
        columns = ["account", *PLACE, "address", "decision"]
        return self.placements[columns].assign(step=self.placements.groupby("account").cumcount())

    @cached_property
    def _parted(self) -> pd.DataFrame:
        """One row for each account, span and place that may hold usage which is counted elsewhere by now.

        Columns: account, start, end, the place with ``_from`` and with ``_to``, and `undecided`.
        """
        both = self.counted.merge(self._steps, on="account", suffixes=("_to", "_from"))
        # Billed where the account led then, and where it was moved to since; what waited was billed nowhere else.
        before = (both["step_to"] < both["step_from"]) & (both["decision_from"] == Choice.MOVE)
        between = (before | (both["step_to"] == both["step_from"])) & (both["step_from"] < both["counted"])
        elsewhere = _places(both, "_from").ne(_places(both, "_to")).any(axis="columns")
        places = [f"{name}{end}" for end in ("_from", "_to") for name in PLACE]
        return both.loc[between & elsewhere, ["account", "start", "end", *places, "undecided"]]

    @property
    def undecided(self) -> pd.DataFrame:
        """What is left to decide: account, start, end, the place with ``_from`` and with ``_to``."""
        return self._parted[self._parted["undecided"]].drop(columns="undecided")

    @property
    def any_decided(self) -> bool:
        """Whether any usage is counted elsewhere than where it was billed, as a person chose."""
        return not self.placements.empty and not self._decided.empty

    @property
    def _decided(self) -> pd.DataFrame:
        return self._parted[~self._parted["undecided"]].drop(columns="undecided")

    def stands(self, account: str, place: Sequence[str], moment: datetime, *, credit: bool) -> bool:
        """Say whether usage of an account at a moment is counted at a place, with nothing left to decide about it.

        A credit stands wherever the account ever led: it takes back what was billed there.
        """
        at = self.counted[self.counted["account"] == account]
        at = at[(at["start"] <= moment) & (moment < at["end"])]
        if at["undecided"].any():
            return False
        led = self.placements[self.placements["account"] == account] if credit else at
        return bool((led[PLACE] == list(place)).all(axis="columns").any())

    # --- what a plan may send ----------------------------------------------------------------------------------------

    def why_held(self, rows: pd.DataFrame, later: "Moves") -> pd.Series:
        """Return for each row of a plan why it waits for a decision, or an empty text.

        `later` is what the ledger has by now: what was seen since this was taken down is for the next run to judge.
        """
        if self.placements.empty and later.placements.empty:
            return _nothing(rows)
        sides = [_side(self.undecided, end).assign(why=self._told()) for end in ("_from", "_to")]
        whole = pd.concat([*sides, self._unseen(later)])
        return _spread(rows, _matching(rows, whole)) if len(whole) else _nothing(rows)

    def _told(self) -> pd.Series:
        moves = self.undecided
        until = pd.DatetimeIndex(moves["end"]).strftime("%Y-%m-%dT%H:%MZ")
        who = f"{MOVED}account " + moves["account"].map(repr) + " leads to subscription " + moves["subscription_to"]
        what = " by now, and what it used before " + until + " is its or that of " + moves["subscription_from"]
        decides = f", where it led before: `usage-billing ledger move {self._name} " + moves["account"].map(quote)
        return who + what + decides + "` decides"

    def _unseen(self, later: "Moves") -> pd.DataFrame:
        rows = later.placements
        fresh = rows.loc[~rows["number"].isin(self.placements["number"]), "account"]
        sides = rows.loc[rows["account"].isin(fresh), ["account", *PLACE]].assign(start=_BEGINNING, end=_END)
        why = f"{MOVED}account " + sides["account"].map(repr) + " was seen elsewhere after this run had looked it up"
        return sides.assign(why=why + ": the next run of its period judges it")

    def why_following(self, rows: pd.DataFrame, uncredited: pd.DataFrame) -> pd.Series:
        """Return for each row of a plan, with its `difference`, for which credit it waits, or an empty text."""
        former = [f"{name}_from" for name in PLACE]
        sides = _side(self._decided, "_to").assign(**{name: self._decided[name] for name in former})
        found = _matching(rows[rows["difference"] > 0], sides)
        owed = uncredited.rename(columns=dict(zip(PLACE, former, strict=True))).drop_duplicates()
        waits = found.merge(owed, on=[*former, "dimensions", "period_start"])
        why = FOLLOWS + waits["subscription_from"] + " goes first (account "
        return _spread(rows, waits.assign(why=why + waits["account"].map(repr) + ")"))

    def uncredited(self, rows: pd.DataFrame, owed: np.ndarray) -> pd.DataFrame:
        """Return the keys (`_KEY`) of rows at which a decided move may take something away, where that is `owed`."""
        return _matching(rows[owed], _side(self._decided, "_from"))[_KEY]

    def leaving(self, rows: pd.DataFrame) -> np.ndarray:
        """Say of each row whether a decided move may take something away there."""
        return self._touched(rows, "_from")

    def entering(self, rows: pd.DataFrame) -> np.ndarray:
        """Say of each row whether a decided move may add something there."""
        return self._touched(rows, "_to")

    def waiting(self, rows: pd.DataFrame) -> np.ndarray:
        """Say of each row whether usage is counted there, or was, about which a person has to choose."""
        if self.placements.empty:
            return np.zeros(len(rows), dtype=bool)
        sides = pd.concat([_side(self.undecided, end) for end in ("_from", "_to")])
        return rows.index.isin(_matching(rows, sides)["row"])

    def _touched(self, rows: pd.DataFrame, end: str) -> np.ndarray:
        found = rows.index.isin(_matching(rows, _side(self._decided, end))["row"]) if self.any_decided else False
        return np.full(len(rows), found)

    # --- what may have been billed elsewhere -------------------------------------------------------------------------

    def former(self, targets: pa.Table) -> Iterator[pa.Table]:
        """Yield `targets` as they were before the last move, before the one before that, and so on to the first."""
        rows = self.placements
        back = rows.groupby("account").cumcount(ascending=False)
        today = targets.to_pandas().set_index("account")
        for steps in range(1, int(back.max()) + 1 if len(rows) else 0):
            led = rows[back == steps].set_index("account")[[*PLACE, "address"]]
            frame = today.copy()
            frame.update(led)
            # When the billing period of a former subscription began, nobody has asked.
            frame.loc[frame.index.isin(led.index), "open_from"] = pd.NaT
            yield pa.Table.from_pandas(frame.reset_index()[targets.column_names], targets.schema, preserve_index=False)


class Places:
    """Rows of targets: where each account leads today, and below them the places of before that still count."""

    def __init__(self, targets: pa.Table, periods: Sequence[Period], moves: Moves) -> None:
        # Sorted, so that the smallest account has the smallest number, and what is reached today comes first.
        self.targets = targets.sort_by("account").combine_chunks()
        self._accounts = self.targets.column("account").combine_chunks()
        self._step = len(periods) + 1
        spans = moves.counted
        own = pc.fill_null(pc.index_in(pa.array(spans["account"], pa.string()), value_set=self._accounts), -1)
        spans = spans.assign(own=own.to_numpy().astype("int64")).query("own >= 0").sort_values(["own", "step"])
        starts = pd.DatetimeIndex([period.start for period in periods]).as_unit("us")
        first = np.searchsorted(starts, pd.DatetimeIndex(spans["start"]).as_unit("us"))
        # The spans of an account follow each other, so the last one that begins by a period is the one that holds it.
        self._from = spans["own"].to_numpy() * self._step + first
        back = spans["back"].to_numpy(dtype=bool)
        self._row = np.where(back, len(self.targets) + np.cumsum(back) - 1, spans["own"].to_numpy())
        self._open = spans["undecided"].to_numpy(dtype=bool)
        before = spans.loc[back, ["account", *PLACE, "address"]].to_dict("records")
        former = pa.Table.from_pylist(before, schema=self.targets.schema)
        self.targets = pa.concat_tables([self.targets, former]).combine_chunks()

    def of(self, accounts: pa.ChunkedArray, period: np.ndarray) -> np.ndarray:
        """Return the row of `targets` at which usage of accounts in periods (by number) is counted, -1 for unknown."""
        own, span = self._found(accounts, period)
        return np.where(span >= 0, self._row[span], own) if len(self._row) else own

    def undecided(self, accounts: pa.ChunkedArray, period: np.ndarray) -> np.ndarray:
        """Say of usage of accounts in periods whether a person has to choose where it belongs."""
        _, span = self._found(accounts, period)
        return (span >= 0) & self._open[span] if len(self._row) else np.zeros(len(period), dtype=bool)

    def _found(self, accounts: pa.ChunkedArray, period: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of each account, and of the span of a moved one; -1 where there is none."""
        own = pc.fill_null(pc.index_in(accounts, value_set=self._accounts), -1).to_numpy().astype("int64")
        at = np.searchsorted(self._from, own * self._step + period, side="right") - 1
        same = self._from[at] // self._step == own if len(self._from) else False
        return own, np.where((at >= 0) & same & (own >= 0), at, -1)


def _places(rows: pd.DataFrame, ending: str) -> pd.DataFrame:
    return rows[[f"{name}{ending}" for name in PLACE]].set_axis(PLACE, axis="columns")


def _side(parted: pd.DataFrame, end: str) -> pd.DataFrame:
    """Return one side of moves: where, which account, and from when until when."""
    return _places(parted, end).assign(**{name: parted[name] for name in ("account", "start", "end")})


def _matching(rows: pd.DataFrame, sides: pd.DataFrame) -> pd.DataFrame:
    """Return rows, by their index in `row`, beside each of `sides` of whose place and time they are."""
    keys = rows[_KEY].assign(row=rows.index, period_start=pd.to_datetime(rows["period_start"], utc=True))
    found = keys.merge(sides, on=PLACE)
    return found[(found["start"] <= found["period_start"]) & (found["period_start"] < found["end"])]


def _spread(rows: pd.DataFrame, found: pd.DataFrame) -> pd.Series:
    """Return for each row the reason `why` of its first account, and how many more there are; or an empty text."""
    texts = _nothing(rows)
    groups = (
        found.sort_values("account").drop_duplicates(["row", "account"]).groupby("row")["why"].agg(["first", "size"])
    )
    more = np.where(groups["size"] > 1, " (and " + (groups["size"] - 1).astype(str) + " more accounts)", "")
    texts[groups.index] = (groups["first"] + more).to_numpy(dtype=object)
    return texts


def _nothing(rows: pd.DataFrame) -> pd.Series:
    return pd.Series("", index=rows.index, dtype=object)
