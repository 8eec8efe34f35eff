"""Usage totals against the ledger: what is still owed, as proposed deliveries. A plan sends and reserves nothing.

For each identity the ledger says what was accepted, the totals say what is owed, and the signed difference is proposed.
The comparison is a full outer join over the compared periods, so a key that vanished from the warehouse is owed 0.
Both sides are sorted by identity and walked range by range: memory holds one range, whatever the interval.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.destinations.base import Destination
from usage_billing.errors import NeedsDecision
from usage_billing.ledger import ADOPTED, Ledger
from usage_billing.moves import Moves
from usage_billing.quarantine import Withheld
from usage_billing.records import (
    MOVED,
    POLICY,
    REFUSED_HERE,
    UNAPPROVED,
    WITHHELD,
    Comparison,
    Plan,
    Staged,
    State,
    Tally,
    Target,
)
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging
from usage_billing.uniqueness import uniqueness_token

_ATTRIBUTES = [
    "account",
    "subscription",
    "component",
    "price_point",
    "dimensions",
    "period_start",
    "period_end",
    "address",
]
_COLUMNS = [
    "token",
    "identity",
    "revision",
    "state",
    "reason",
    "supersedes",
    "quantity",
    "wanted",
    *_ATTRIBUTES,
    "open_until",
    "released",
    "body",
]
_UNBILLED = "; the next run of its period sends it if that is mended, else bill it by hand, and write it off"
_EVERYTHING_ABOVE = "g"
"""Sorts after every identity, which is hexadecimal."""


def plan(comparison: Comparison, destination: Destination, ledger: Ledger, staging: Staging, folder: str) -> Plan:
    """Return the signed differences between `comparison.totals` and the ledger, staged below `folder`.

    Raises:
        Misconfigured: another source feeds the same component, and ``source.yaml`` does not say so.
        Stale: a later reading of all of the same periods was compared; what it left alone is still planned.
        NeedsDecision: the plan would withdraw more than the source's `max_withdraw_share` of what was accepted. A look,
            whose reading has no number, says so in its plan.
    """
    source = destination.source
    destination.book = ledger
    today = _Today(_targets(comparison.targets, staging), cache(destination.standing))
    components = today.targets.index.get_level_values("component")
    shared = source.settings.shares_component_with
    ledger.feed(source.name, destination.site, comparison.reading, components, shared)
    stale = ledger.begin_comparison(source.name, comparison.reading, comparison.periods, source.edition)
    tally = Tally()

    def compared() -> Iterator[pd.DataFrame]:
        for low, high, totals in _ranges(comparison.totals, staging):
            standing = ledger.standing(source.name, comparison.periods, low, high)
            both = _compare(totals, standing, source.settings.meter.decimals)
            fresh = both[~both["period_start"].isin([period.start for period in stale])].reset_index(drop=True)
            yield fresh.assign(difference=_differences(fresh))

    moving = _Moving(comparison, ledger, source, staging, compared)
    withheld = Withheld.of(comparison, source, ledger, staging)

    def parts() -> Iterator[pa.Table]:
        nonlocal tally
        for fresh in compared():
            proposals, found = _propose(fresh, comparison, destination, today, moving, withheld)
            tally += found
            yield pa.Table.from_pandas(proposals, preserve_index=False, schema=_SCHEMA)

    proposals = staging.write(folder, "proposals", parts())
    if not stale and tally.events != comparison.rows_accepted:
        raise AssertionError(f"{comparison.rows_accepted} accepted rows, but {tally.events} in the totals")
    much = _why_it_withdraws_much(tally, destination)
    if much and comparison.reading.extraction:
        raise NeedsDecision(much)
    return Plan(proposals=proposals, tally=tally, withdraws_much=much)


class _Moving:
    """What moves keep from being sent: until a person has decided about them, and then until a credit went first."""

    def __init__(
        self,
        comparison: Comparison,
        ledger: Ledger,
        source: BillingSource,
        staging: Staging,
        compared: Callable[[], Iterator[pd.DataFrame]],
    ) -> None:
        self.moves = Moves.staged(source.name, comparison.moves, staging)
        self._later = Moves(source.name, ledger.placements(source.name, source.edition))
        # Whether one may go is told by what is owed elsewhere, in another range: a walk of its own, where any moved.
        found = [self._uncredited(rows) for rows in compared()] if self.moves.any_decided else []
        self._credits = pd.concat(found, ignore_index=True) if found else None

    def _uncredited(self, rows: pd.DataFrame) -> pd.DataFrame:
        owed = (rows["difference"] < 0) | rows["state"].isin([State.SENDING, State.IN_DOUBT])
        return self.moves.uncredited(rows, owed.to_numpy(dtype=bool))

    def marked(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return chosen rows with why each of them waits, in `moving`; and whether for a credit, in `follows`."""
        held = self.moves.why_held(rows, self._later).where(rows["difference"] != 0, "")
        after = held if self._credits is None else self.moves.why_following(rows, self._credits)
        follows = (held == "") & (after != "")
        return rows.assign(moving=held.where(~follows, after), follows=follows, leaves=self.moves.leaving(rows))


_TIME = pa.timestamp("us", tz="UTC")
_MOMENTS = ("period_start", "period_end", "open_until")
_SCHEMA = pa.schema(
    [(name, {"revision": pa.int64(), **dict.fromkeys(_MOMENTS, _TIME)}.get(name, pa.string())) for name in _COLUMNS]
)


def _ranges(totals: Staged, staging: Staging) -> Iterator[tuple[str, str, pa.Table]]:
    """Yield each part of the totals with the range of identities it speaks for; the ranges leave no gap."""
    low, held_back = "", None
    for part in staging.read(totals):
        if held_back is not None and part.num_rows:
            cut = part.column("identity")[0].as_py()
            yield low, cut, held_back
            low, held_back = cut, part
        elif held_back is None:
            held_back = part
    if held_back is not None:
        yield low, _EVERYTHING_ABOVE, held_back


def _targets(targets: Staged, staging: Staging) -> pd.DataFrame:
    """Return today's address and the ends of the open billing period by (subscription, component)."""
    key = ["subscription", "component"]
    frame = pd.concat([part.to_pandas() for part in staging.read(targets)], ignore_index=True)
    known: pd.DataFrame = frame.drop_duplicates(key).set_index(key)[["address", "open_from", "open_until"]]
    return known


@dataclass(frozen=True)
class _Today:
    """Where the accounts of a run lead today, and how any other subscription stands, which is asked for once."""

    targets: pd.DataFrame
    standing: Callable[[str], Target]


def _compare(totals: pa.Table, standing: pd.DataFrame, decimals: int) -> pd.DataFrame:
    """Return one row per identity of either side: what is owed, what is settled, and which revision is last."""
    owed = totals.drop_columns(["quantity", "open_from"]).to_pandas()
    owed["owed"] = quantities.to_scaled(totals.column("quantity"), decimals)
    sides = [_nullable(owed), _nullable(_by_identity(standing, decimals))]
    both = sides[0].merge(sides[1], on="identity", how="outer", suffixes=("", "_was"), sort=True)
    for name in _ATTRIBUTES:
        both[name] = both[name].where(both[name].notna(), both[f"{name}_was"])
    numbers = {
        name: _filled(both[name])
        for name in ("owed", "settled", "billed", "waiting", "events", "extraction", "validation")
    }
    revision = both["revision"].fillna(-1).astype("int64")
    texts = {name: both[name].fillna("") for name in ("state", "token", "reason", "released")}
    return both.assign(**numbers, **texts, revision=revision)


def _nullable(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with integers that can be missing: an outer join would turn plain ones into floats."""
    return frame.astype({name: "Int64" for name, kind in frame.dtypes.items() if kind == "int64"})


def _by_identity(standing: pd.DataFrame, decimals: int) -> pd.DataFrame:
    """Return, per identity, the settled sum and the last revision with its state."""
    text = standing["quantity"].astype(object)
    scaled = quantities.from_text(text, decimals)
    counted = quantities.from_text(standing["applied"].astype(object).where(standing["applied"] != "", text), decimals)
    accepted = standing["state"] == State.ACCEPTED
    settles = accepted | (standing["state"] == State.WRITTEN_OFF)
    rows = standing.assign(settled=counted.where(settles, 0), billed=counted.where(accepted, 0), waiting=scaled)
    found = rows.drop(columns=["settled", "billed", "quantity", "applied"]).drop_duplicates("identity", keep="last")
    for name in ("settled", "billed"):
        found = found.merge(quantities.sum_by(rows[["identity", name]], ["identity"], name), on="identity")
    return found


def _differences(compared: pd.DataFrame) -> pd.Series:
    """Return what is owed beyond what is settled: billed, or written off.

    What was written off was never billed, so it is never taken back; and a credit that was written off is not billed.
    """
    owed, settled, billed = compared["owed"], compared["settled"], compared["billed"]
    most = settled.where(settled >= billed, billed)
    least = settled.where(settled <= billed, billed)
    nearest = owed.where(owed <= most, most)
    return quantities.minus(owed, nearest.where(nearest >= least, least))


def _filled(scaled: pd.Series) -> pd.Series:
    """Return a column of the join with 0 for what one side lacks."""
    return scaled.where(scaled.notna(), 0).astype(object if scaled.dtype == object else "int64")


def _propose(
    compared: pd.DataFrame,
    comparison: Comparison,
    destination: Destination,
    today: _Today,
    moving: _Moving,
    withheld: Withheld,
) -> tuple[pd.DataFrame, Tally]:
    difference, state, reason = compared["difference"], compared["state"], compared["reason"].astype(str)
    reading = comparison.reading
    this_one = (compared["extraction"] == reading.extraction) & (compared["validation"] == reading.validation)
    blocked = state.isin([State.SENDING, State.IN_DOUBT])
    same = difference == compared["waiting"]
    # What an earlier reading reserved may not be sent any more: it is written down anew, as this one's.
    ours = (state == State.RESERVED) & this_one & same
    # What a site refused it would refuse again; what was held, or refused by the source itself, is judged anew.
    by_us = reason.str.startswith(REFUSED_HERE)
    waits = (state == State.HELD) | ((state == State.REFUSED) & by_us)
    stays = (state == State.REFUSED) & same & ~waits
    # Of what was adopted as held the site may have any part: no difference is known, whatever the totals say now.
    stays |= (state == State.HELD) & reason.str.startswith(ADOPTED)
    # It is judged with what this extraction knows of the site, unless its own delivery knew better; what a balance
    # takes is asked each time.
    judged_again = waits & same & ~stays
    judged_again &= ~this_one | (difference < 0) | reason.str.startswith((UNAPPROVED, MOVED))
    # What a person let go, they let go as it was: another quantity is for them to look at again. A policy of then has
    # no say, the one of today judges.
    by_person = ~compared["released"].astype(str).str.startswith(POLICY)
    let_go = compared["released"].where(same & by_person & state.isin([State.HELD, State.REFUSED, State.RESERVED]), "")
    stays |= waits & same & ~judged_again
    # What the site refused goes again once a person says that the cause is mended.
    stays &= (state != State.REFUSED) | (let_go == "")
    replaceable = state.isin([State.RESERVED, State.HELD, State.REFUSED]) & ~ours & ~stays
    proposed = ~blocked & ~ours & ~stays & ((difference != 0) | replaceable)
    chosen = compared.assign(replaceable=replaceable, judged_again=judged_again, released=let_go)
    chosen = moving.marked(chosen[proposed].reset_index(drop=True))
    follows = int(chosen["follows"].sum())
    chosen["withheld"] = (chosen["difference"] < 0) & withheld.covers(chosen)
    written = _written_out(chosen, destination, today)
    still_held = chosen["judged_again"] & (written["state"] == chosen["state"])
    confirmed = written.assign(**chosen[["token", "revision"]], supersedes=chosen["token"])[still_held]
    chosen, written = chosen[~still_held], written[~still_held]
    sending = written["state"] == State.RESERVED
    # What quarantine withholds is not withdrawn, and must not stop the others' bill; a person knows what they released,
    # and decides what moved.
    withdraws = (chosen["difference"] < 0) & (sending | ~chosen["withheld"]) & (chosen["released"] == "")
    withdraws &= chosen["moving"] == ""
    entering = (difference > 0) & moving.moves.entering(compared)
    tally = Tally(
        new=int((sending & (written["revision"] == 0)).sum()),
        corrections=int((sending & (written["revision"] > 0)).sum()),
        unchanged=int((~blocked & ~stays & ~proposed & ~ours).sum()),
        held=int((written["state"] == State.HELD).sum()),
        refused=int((written["state"] == State.REFUSED).sum()),
        blocked=int(blocked.sum()),
        waiting=int((stays | ours).sum() + still_held.sum()),
        withdrawn=int((written["state"] == State.SUPERSEDED).sum()),
        partial=int(written["partial"].sum()),
        released=int((chosen["judged_again"] & sending).sum()),
        owed=quantities.total(compared["owed"]),
        settled=quantities.total(compared["settled"]),
        negative=quantities.total(chosen["difference"][withdraws & ~chosen["leaves"]]),
        events=int(compared["events"].sum()),
        follows=follows,
        moved=quantities.total(chosen["difference"][withdraws & chosen["leaves"]])
        + quantities.total(difference[entering]),
    )
    proposals = pd.concat([written, confirmed])[_COLUMNS].sort_values("identity", kind="stable", ignore_index=True)
    return proposals, tally


def _written_out(chosen: pd.DataFrame, destination: Destination, today: _Today) -> pd.DataFrame:
    """Return chosen identities as the ledger will keep them: token, state, reason and the exact request.

    Column `partial` says of which only a part goes now.
    """
    led = today.targets.reindex(pd.MultiIndex.from_frame(chosen[["subscription", "component"]]))
    revisions = chosen["revision"] + 1
    rows = chosen.assign(
        revision=revisions,
        # One hash per usage total, after all grouping: the only per-row work in the road, and C does it.
        token=[uniqueness_token(key, revision) for key, revision in zip(chosen["identity"], revisions, strict=True)],
        supersedes=chosen["token"].where(chosen["replaceable"], ""),
        quantity=quantities.to_text(chosen["difference"], destination.source.settings.meter.decimals),
        # Where the account was resolved today, today's address; a vanished key keeps the one that it was sent to.
        address=pd.Series(led["address"].to_numpy(), index=chosen.index).fillna(chosen["address"]),
        **{
            name: pd.to_datetime(pd.Series(led[name].array, index=chosen.index), utc=True)
            for name in ("open_from", "open_until")
        },
    )
    rows = destination.look_up(rows, today.standing)
    unbilled = (rows["unbilled"] + _UNBILLED).where((rows["unbilled"] != "") & (chosen["difference"] > 0), "")
    waits = rows["moving"].where(rows["moving"] != "", unbilled)
    # What waits for something else is no balance that a deduction may count on, and takes none from others.
    judged = waits == ""
    parts, why = destination.judge(rows[judged])
    goes, reason = (column.astype(object).reindex(rows.index) for column in (parts, why))
    goes, reason = goes.where(judged, rows["quantity"]), reason.where(judged, waits)
    # Whatever else speaks against it: a person may overrule the rest.
    reason = reason.mask(rows["withheld"] & judged, WITHHELD)
    state = np.select(
        [chosen["difference"] == 0, reason.str.startswith(REFUSED_HERE), reason != ""],
        [State.SUPERSEDED, State.REFUSED, State.HELD],
        State.RESERVED,
    )
    goes = goes.where(state == State.RESERVED, rows["quantity"])
    rows = rows.assign(state=state, reason=reason, partial=goes != rows["quantity"], wanted=rows["quantity"])
    rows = rows.assign(quantity=goes)
    return rows.assign(body=destination.encode(rows))


def _why_it_withdraws_much(tally: Tally, destination: Destination) -> str:
    settings = destination.source.settings
    # What moves takes as much from one subscription as it gives to another; only what is missing there is gone.
    withdrawn = -(tally.negative + min(tally.moved, 0))
    if withdrawn <= tally.settled * settings.max_withdraw_share:
        return ""
    decimals = settings.meter.decimals
    return (
        f"this run would withdraw {quantities.to_decimal(withdrawn, decimals)} of "
        f"{quantities.to_decimal(tally.settled, decimals)} already billed, more than max_withdraw_share = "
        f"{settings.max_withdraw_share:.0%}; if the warehouse is right, raise it in source.yaml for this run "
        "and clear the plan"
    )
