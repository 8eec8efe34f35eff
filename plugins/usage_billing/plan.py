"""Usage totals against the ledger: what is still owed, as proposed deliveries. A plan sends and reserves nothing.

For each identity the ledger says what was accepted, the totals say what is owed, and the signed difference is proposed.
The comparison is a full outer join over the compared periods, so a key that vanished from the warehouse is owed 0.
Both sides are sorted by identity and walked range by range: memory holds one range, whatever the interval.
"""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.destinations.base import Destination
from usage_billing.errors import NeedsDecision
from usage_billing.ledger import Ledger
from usage_billing.records import Comparison, Plan, Staged, State, Tally
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
_COLUMNS = ["token", "identity", "revision", "state", "reason", "supersedes", "quantity", *_ATTRIBUTES, "body"]
_EVERYTHING_ABOVE = "g"
"""Sorts after every identity, which is hexadecimal."""


def plan(comparison: Comparison, destination: Destination, ledger: Ledger, staging: Staging, folder: str) -> Plan:
    """Return the signed differences between `comparison.totals` and the ledger, staged below `folder`.

    Raises:
        Stale: a newer extraction of all of the same periods was compared; what it left alone is still planned.
        NeedsDecision: the plan would withdraw more than the source's `max_withdraw_share` of what was accepted.
    """
    source = destination.source
    stale = ledger.begin_comparison(source.name, comparison.number, comparison.periods)
    tally = Tally()
    targets = _targets(comparison.targets, staging)

    def parts() -> Iterator[pa.Table]:
        nonlocal tally
        for low, high, totals in _ranges(comparison.totals, staging):
            standing = ledger.standing(source.name, comparison.window, low, high)
            compared = _compare(totals, standing, source.settings.meter.decimals)
            fresh = compared[~compared["period_start"].isin([period.start for period in stale])]
            proposals, found = _propose(fresh.reset_index(drop=True), comparison, destination, targets)
            tally += found
            yield pa.Table.from_pandas(proposals, preserve_index=False, schema=_SCHEMA)

    proposals = staging.write(folder, "proposals", parts())
    if not stale and tally.events != comparison.rows_accepted:
        raise AssertionError(f"{comparison.rows_accepted} accepted rows, but {tally.events} in the totals")
    _stop_if_it_withdraws_much(tally, destination)
    return Plan(proposals=proposals, tally=tally)


_TIME = pa.timestamp("us", tz="UTC")
_SCHEMA = pa.schema(
    [
        (name, {"revision": pa.int64(), "period_start": _TIME, "period_end": _TIME}.get(name, pa.string()))
        for name in _COLUMNS
    ]
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
    """Return today's address and open billing period by (subscription, component)."""
    key = ["subscription", "component"]
    frame = pd.concat([part.to_pandas() for part in staging.read(targets)], ignore_index=True)
    known: pd.DataFrame = frame.drop_duplicates(key).set_index(key)[["address", "open_from"]]
    return known


def _compare(totals: pa.Table, standing: pd.DataFrame, decimals: int) -> pd.DataFrame:
    """Return one row per identity of either side: what is owed, what is settled, and which revision is last."""
    owed = totals.drop_columns(["quantity", "open_from"]).to_pandas()
    owed["owed"] = quantities.to_scaled(totals.column("quantity"), decimals)
    sides = [_nullable(owed), _nullable(_by_identity(standing, decimals))]
    both = sides[0].merge(sides[1], on="identity", how="outer", suffixes=("", "_was"), sort=True)
    for name in _ATTRIBUTES:
        both[name] = both[name].where(both[name].notna(), both[f"{name}_was"])
    numbers = {name: _filled(both[name]) for name in ("owed", "settled", "waiting", "events", "extraction")}
    revision = both["revision"].fillna(-1).astype("int64")
    return both.assign(**numbers, revision=revision, state=both["state"].fillna(""), token=both["token"].fillna(""))


def _nullable(frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` with integers that can be missing: an outer join would turn plain ones into floats."""
    return frame.astype({name: "Int64" for name, kind in frame.dtypes.items() if kind == "int64"})


def _by_identity(standing: pd.DataFrame, decimals: int) -> pd.DataFrame:
    """Return, per identity, the settled sum and the last revision with its state."""
    scaled = quantities.from_text(standing["quantity"].astype(object), decimals)
    settles = standing["state"].isin([State.ACCEPTED, State.WRITTEN_OFF])
    rows = standing.assign(settled=scaled.where(settles, 0), waiting=scaled)
    sums = quantities.sum_by(rows[["identity", "settled"]], ["identity"], "settled")
    last = rows.drop(columns=["settled", "quantity", "reason"]).drop_duplicates("identity", keep="last")
    return last.merge(sums, on="identity")


def _filled(scaled: pd.Series) -> pd.Series:
    """Return a column of the join with 0 for what one side lacks."""
    return scaled.where(scaled.notna(), 0).astype(object if scaled.dtype == object else "int64")


def _propose(
    compared: pd.DataFrame, comparison: Comparison, destination: Destination, targets: pd.DataFrame
) -> tuple[pd.DataFrame, Tally]:
    difference = compared["owed"] - compared["settled"]
    state = compared["state"]
    blocked = state.isin([State.SENDING, State.IN_DOUBT])
    # The same extraction may have been validated anew since: what it owes no more is replaced, not sent.
    ours = (state == State.RESERVED) & (compared["extraction"] == comparison.number)
    ours &= difference == compared["waiting"]
    parked = state.isin([State.HELD, State.REFUSED])
    stays = parked & (difference == compared["waiting"])
    replaceable = (parked & ~stays) | ((state == State.RESERVED) & ~ours)
    proposed = ~blocked & ~ours & ~stays & ((difference != 0) | replaceable)
    chosen = compared.assign(difference=difference, replaceable=replaceable)[proposed]
    proposals = _written_out(chosen.reset_index(drop=True), comparison, destination, targets)
    sending = proposals["state"] == State.RESERVED
    tally = Tally(
        new=int((sending & (proposals["revision"] == 0)).sum()),
        corrections=int((sending & (proposals["revision"] > 0)).sum()),
        unchanged=int((~blocked & ~stays & ~proposed & ~ours).sum()),
        held=int((proposals["state"] == State.HELD).sum()),
        blocked=int(blocked.sum()),
        waiting=int((stays | ours).sum()),
        withdrawn=int((proposals["state"] == State.SUPERSEDED).sum()),
        owed=quantities.total(compared["owed"]),
        settled=quantities.total(compared["settled"]),
        negative=quantities.total(difference[proposed & (difference < 0)]),
        events=int(compared["events"].sum()),
    )
    return proposals, tally


def _written_out(
    chosen: pd.DataFrame, comparison: Comparison, destination: Destination, targets: pd.DataFrame
) -> pd.DataFrame:
    """Return chosen identities as the ledger will keep them: token, state, reason and the exact request."""
    today = targets.reindex(pd.MultiIndex.from_frame(chosen[["subscription", "component"]]))
    revisions = chosen["revision"] + 1
    rows = chosen.assign(
        revision=revisions,
        # One hash per usage total, after all grouping: the only per-row work in the road, and C does it.
        token=[uniqueness_token(key, revision) for key, revision in zip(chosen["identity"], revisions, strict=True)],
        supersedes=chosen["token"].where(chosen["replaceable"], ""),
        quantity=quantities.to_text(chosen["difference"], destination.source.settings.meter.decimals),
        # Where the account was resolved today, today's address; a vanished key keeps the one that it was sent to.
        address=pd.Series(today["address"].to_numpy(), index=chosen.index).fillna(chosen["address"]),
        open_from=pd.to_datetime(pd.Series(today["open_from"].array, index=chosen.index), utc=True),
    )
    reason = destination.hold_reason(rows).astype(object)
    withheld = (chosen["difference"] < 0) & bool(comparison.rows_quarantined) & (reason == "")
    reason = reason.mask(withheld, "rows are in quarantine, and quarantine withholds, it never withdraws")
    state = np.select([chosen["difference"] == 0, reason != ""], [State.SUPERSEDED, State.HELD], State.RESERVED)
    rows = rows.assign(state=state, reason=reason, body=destination.encode(rows))
    return rows[_COLUMNS]


def _stop_if_it_withdraws_much(tally: Tally, destination: Destination) -> None:
    settings = destination.source.settings
    if -tally.negative > tally.settled * settings.max_withdraw_share:
        decimals = settings.meter.decimals
        raise NeedsDecision(
            f"this run would withdraw {quantities.to_decimal(-tally.negative, decimals)} of "
            f"{quantities.to_decimal(tally.settled, decimals)} already billed, more than max_withdraw_share = "
            f"{settings.max_withdraw_share:.0%}; if the warehouse is right, raise it in source.yaml for this run "
            "and clear the plan"
        )
