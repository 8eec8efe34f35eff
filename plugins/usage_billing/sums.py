"""What the ledger's deliveries add up to in a billing period: what a site that only counts has to count.

Of raw events the ledger has chunks; what is in them tells the archive.
"""

from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import cast

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing import quantities
from usage_billing.archive import Archived
from usage_billing.destinations.base import Destination
from usage_billing.ledger import Ledger
from usage_billing.records import Period, State

ON_ITS_WAY = (State.SENDING, State.IN_DOUBT)


def under_way(
    destination: Destination, ledger: Ledger, subscriptions: Sequence[str], component: str, period: Period
) -> tuple[dict[str, Decimal], dict[str, Decimal]]:
    """Return by subscription what is on its way adds at most, and takes back at most: any of it may have landed."""
    if not subscriptions:
        return {}, {}
    adds, takes = (
        sums_here(destination, ledger, subscriptions, component, period, ON_ITS_WAY, takes_back=takes_back)
        for takes_back in (False, True)
    )
    return adds, takes


def sums_here(
    destination: Destination,
    ledger: Ledger,
    subscriptions: Sequence[str],
    component: str,
    period: Period,
    states: Sequence[State],
    *,
    takes_back: bool | None = None,
) -> dict[str, Decimal]:
    """Return by subscription what deliveries in these states add up to: usage totals, and archived chunks of events.

    With `takes_back`, only those that take something back, or only those that add.
    """
    some = ledger.accepted_at(destination.site, subscriptions, component, period, states)
    if takes_back is not None:
        some = some[some["quantity"].str.startswith("-") == takes_back]
    # The renewal cuts a usage period in two, and each of its events lies on one side.
    cut = some.loc[some["body"] != "", "body"]
    outside = [row for row, body in cut.items() if not period.start <= destination.counted_at(body) < period.end]
    sums = _sums(some.drop(index=outside))
    if destination.archive is None or takes_back:
        return sums  # Events are only ever added.
    for events in chunks(destination, ledger, component, period, states):
        inside = pc.and_(
            pc.greater_equal(events.column("time"), pa.scalar(period.start, events.column("time").type)),
            pc.less(events.column("time"), pa.scalar(period.end, events.column("time").type)),
        )
        some = cast("pd.DataFrame", events.select(["subscription", "quantity"]).filter(inside).to_pandas())
        some["quantity"] = "1" if destination.metric == "count" else some["quantity"]
        for subscription, more in _sums(some).items():
            sums[subscription] = sums.get(subscription, Decimal(0)) + more
    return sums


def chunks(
    destination: Destination,
    ledger: Ledger,
    component: str,
    window: Period,
    states: Sequence[State] = (State.ACCEPTED,),
) -> Iterator[pa.Table]:
    """Yield the accepted chunks of all sources that feed a component and may hold events of `window`, one at a time."""
    for address in ledger.chunks_at(destination.site, component, window, states):
        yield destination.kept().read(Archived.at(address))


def _sums(accepted: pd.DataFrame) -> dict[str, Decimal]:
    """Return the exact sum by subscription; sources that feed one component may have different decimal places."""
    text = accepted["quantity"].astype(object)
    places = text.str.partition(".")[2].str.len().max() if len(text) else 0
    decimals = int(places)
    scaled = accepted.assign(scaled=quantities.from_text(text, decimals))
    sums = quantities.sum_by(scaled, ["subscription"], "scaled")
    return {
        subscription: quantities.to_decimal(int(value), decimals)
        for subscription, value in zip(sums["subscription"], sums["scaled"], strict=True)
    }
