"""What is unusual about a plan: a first one that bills months at once, a jump, a backfill of long ago.

None of it need be wrong, and none of it can be taken back. So a plan with anything unusual stops and asks; where a
person is asked about each plan anyway, the answer to that counts.
"""

from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from statistics import median_low

import pandas as pd

from usage_billing import quantities
from usage_billing.destinations.base import Destination
from usage_billing.ledger import Ledger
from usage_billing.records import Comparison, Period, Plan, State
from usage_billing.staging import Staging

_USUAL = 31
"""How many usage periods of before tell what is usual."""
_FEWEST = 5
"""With fewer of them nothing is usual yet."""


def unusual(
    plan: Plan,
    comparison: Comparison,
    owed: Mapping[Period, Decimal],
    destination: Destination,
    ledger: Ledger,
    staging: Staging,
) -> list[str]:
    """Return what a person should know before `plan` is sent, each with the key of ``source.yaml`` that allows it.

    `owed` is of `owed_by_period`. A plan that sends nothing is never unusual, but for one
    that withdraws much: a look shows it, where a run would have stopped.
    """
    much = [plan.withdraws_much] if plan.withdraws_much else []
    if not plan.tally.new + plan.tally.corrections:
        return much
    sent = _sent(plan, staging)
    first = not ledger.has(destination.source.name, None, State.ACCEPTED, State.SENDING, State.IN_DOUBT)
    found = _first(comparison, owed, destination) if first else _jump(sent, owed, destination, ledger)
    return [*much, *found, *_long_ago(sent, destination, ledger)]


def _sent(plan: Plan, staging: Staging) -> list[Period]:
    """Return the usage periods for which a plan would send something, in order: whatever run they came in."""
    found: set[Period] = set()
    for part in staging.read(plan.proposals):
        frame = part.select(["state", "period_start", "period_end"]).to_pandas()
        spans = frame.loc[frame["state"] == State.RESERVED, ["period_start", "period_end"]].drop_duplicates()
        found.update(Period(row.period_start, row.period_end) for row in spans.itertuples())
    return sorted(found)


def owed_by_period(comparison: Comparison, destination: Destination, staging: Staging) -> dict[Period, Decimal]:
    """Return what each compared usage period owes in all, by the totals; a period without usage is left out."""
    decimals = destination.source.settings.meter.decimals
    sums: dict[Period, int] = {}
    starts = {pd.Timestamp(period.start): period for period in comparison.periods}
    for part in staging.read(comparison.totals):
        frame = part.select(["period_start"]).to_pandas()
        frame["scaled"] = quantities.to_scaled(part.column("quantity"), decimals)
        summed = quantities.sum_by(frame, ["period_start"], "scaled")
        for start, scaled in zip(summed["period_start"], summed["scaled"].tolist(), strict=True):
            sums[starts[start]] = sums.get(starts[start], 0) + int(scaled)
    return {period: quantities.to_decimal(scaled, decimals) for period, scaled in sums.items()}


def _first(comparison: Comparison, owed: Mapping[Period, Decimal], destination: Destination) -> Iterator[str]:
    limits, window = destination.source.settings.first_run, comparison.window
    days = (window.end - window.start).days
    if days > limits.max_days:
        yield (
            f"first_run.max_days = {limits.max_days}: nothing of this source was ever billed, and the first plan is of "
            f"{days} days at once, {window}"
        )
    total = sum(owed.values(), Decimal(0))
    if limits.max_quantity is not None and total > limits.max_quantity:
        yield (
            f"first_run.max_quantity = {limits.max_quantity:f}: nothing of this source was ever billed, and this first "
            f"plan would bill {total:f}"
        )


def _jump(
    sent: Sequence[Period], owed: Mapping[Period, Decimal], destination: Destination, ledger: Ledger
) -> Iterator[str]:
    multiple = destination.source.settings.max_multiple
    if multiple is None:
        return
    source = destination.source
    jumps: dict[Period, list[Decimal]] = {}
    for period in sent:
        # Of before this very period: a run may compare old ones beside its own.
        before = ledger.usually_owed(source.name, period.start, _USUAL, source.span.start)
        # The lower of the two in the middle: a mean of both could have digits that nobody ever billed.
        if len(before) >= _FEWEST and owed.get(period, Decimal(0)) > multiple * median_low(before):
            jumps[period] = before
    if jumps:
        most = max(jumps, key=lambda period: (owed[period], period))
        yield (
            f"max_multiple = {multiple:f}: {most} owes {owed[most]:f}, and the usual of the last {len(jumps[most])} "
            f"usage periods is {median_low(jumps[most]):f}"
        )


def _long_ago(sent: Sequence[Period], destination: Destination, ledger: Ledger) -> Iterator[str]:
    horizon = destination.source.settings.backfill_horizon_days
    if horizon is None or not sent:
        return
    age = (ledger.now() - sent[0].end).days
    if age >= horizon:
        yield f"backfill_horizon_days = {horizon}: this plan would send usage of {sent[0]}, which ended {age} days ago"
