"""What we believe against what the billing site holds, with zero tolerance.

Where the site lists its records, each of ours is matched by its token; where it only counts (Maxio events), the site's
total of a billing period is compared with the sum of what the ledger has accepted for it. Of raw events the ledger has
chunks; what is in them tells the archive.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import cast

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing import quantities
from usage_billing.archive import Archived
from usage_billing.destinations.base import Destination
from usage_billing.ledger import Ledger
from usage_billing.records import Period, SiteRecord, SiteTotal, State

_EXAMPLES = 10
_ADD_UP = ("sum", "count")
"""What a metric may compute so that the parts of it can be added up here."""


@dataclass(frozen=True)
class Reconciliation:
    """The tie-out of one window.

    `matched`, `missing` (accepted here, not there), `unknown` (there, not ours: somebody else also bills this) and
    `different` count records, or billing periods where the site only counts. `ours` and `theirs` are sums. `note` says
    why nothing was compared, where nothing can be.
    """

    matched: int
    missing: int
    unknown: int
    different: int
    ours: Decimal
    theirs: Decimal
    examples: tuple[str, ...] = ()
    note: str = ""

    @property
    def ties_out(self) -> bool:
        """True if everything we believe was billed is there, with the same quantity."""
        return self.missing == 0 and self.different == 0


def reconcile(
    destination: Destination,
    ledger: Ledger,
    window: Period,
    wait: Callable[[float], object] = time.sleep,
    pauses: Sequence[float] = (2.0, 4.0, 8.0),
) -> Reconciliation:
    """Compare the ledger's accepted deliveries of one source in `window` with the billing site.

    What is missing there is looked for again after each of `pauses` (seconds): a site may show late what it has.

    Raises:
        NotApplied: the site could not be asked.
    """
    found = _look(destination, ledger, window)
    for pause in pauses:
        if not found.missing:
            break
        wait(pause)
        found = _look(destination, ledger, window)
    return found


def _look(destination: Destination, ledger: Ledger, window: Period) -> Reconciliation:
    accepted = ledger.accepted(destination.source.name, window)
    if accepted.empty:
        return Reconciliation(0, 0, 0, 0, Decimal(0), Decimal(0))
    records = destination.records(accepted)
    if records is not None:
        return _by_record(ledger, accepted, records)
    if destination.metric not in _ADD_UP:
        why = f"the site computes the {destination.metric} of the events, and no sum of ours can be tied out with that"
        return Reconciliation(0, 0, 0, 0, Decimal(0), Decimal(0), note=why)
    if destination.stream:
        chunks = _chunks(destination, ledger, accepted["component"].iloc[0], window)
        billed = sorted({name for some in chunks for name in some.column("subscription").unique().to_pylist()})
        return _by_total(destination, ledger, billed, window)
    return _by_total(destination, ledger, sorted(accepted["subscription"].unique()), window)


def _by_record(ledger: Ledger, accepted: pd.DataFrame, records: Iterable[SiteRecord]) -> Reconciliation:
    # A deduction that met the floor is stored as it was sent, or as it counted: sites differ.
    counted = accepted["applied"].where(accepted["applied"] != "", accepted["quantity"])
    pairs = zip(map(Decimal, accepted["quantity"]), map(Decimal, counted), strict=True)
    expected = dict(zip(accepted["token"], pairs, strict=True))
    ours = sum(map(Decimal, counted), Decimal(0))
    theirs, matched = Decimal(0), 0
    different: list[str] = []
    others: list[SiteRecord] = []
    ours_by_token = frozenset(expected)
    for record in records:
        if record.token not in ours_by_token:
            others.append(record)
            continue
        theirs += record.quantity
        wanted = expected.pop(record.token, None)
        if wanted is None:
            different.append(f"record {record.record_id}: {record.quantity} there a second time under {record.token}")
            continue
        matched += record.quantity in wanted
        if record.quantity not in wanted:
            different.append(f"record {record.record_id}: {record.quantity} there, {wanted[0]} here")
    missing = [f"token {token}: {sent} accepted here, absent there" for token, (sent, _) in expected.items()]
    # A site that cannot tell usage periods apart also lists what other runs of ours sent.
    states = ledger.states([record.token for record in others if record.token])
    unknown = []
    # Those under a token first: they are the more alarming ones.
    for record in sorted(others, key=lambda record: not record.token):
        state = states.get(record.token)
        if state is None:
            unknown.append(f"record {record.record_id}: {record.quantity} there, {_whose(record)}")
        elif state not in {State.ACCEPTED, State.SENDING, State.IN_DOUBT}:
            different.append(f"record {record.record_id}: {record.quantity} there, {state} here under {record.token}")
    examples = (different + missing + unknown)[:_EXAMPLES]
    return Reconciliation(matched, len(missing), len(unknown), len(different), ours, theirs, tuple(examples))


def _whose(record: SiteRecord) -> str:
    """Return what an unknown record may be: somebody else's, or ours from a ledger that is not this one."""
    if not record.token:
        return "unknown here"
    return (
        f"under token {record.token}, which this ledger never wrote down: it is a second or a restored ledger "
        "(`usage-billing ledger adopt` enters what is ours), or another installation bills the same account"
    )


def _by_total(destination: Destination, ledger: Ledger, billed: Sequence[str], window: Period) -> Reconciliation:
    totals = [total for total in destination.totals(billed) or [] if _touch(total.period, window)]
    matched = unknown = 0
    ours_sum = theirs_sum = Decimal(0)
    missing = [
        f"subscription {subscription}: the site gives no total for {window}"
        for subscription in sorted(set(billed) - {total.subscription for total in totals})
    ]
    more: list[str] = []
    for (period, component), some in _grouped(totals).items():
        sums = _accepted_here(destination, ledger, [total.subscription for total in some], component, period)
        for total in some:
            ours = sums.get(total.subscription, Decimal(0))
            ours_sum, theirs_sum = ours_sum + ours, theirs_sum + total.quantity
            text = f"subscription {total.subscription}, {period}: {total.quantity} there, {ours} here"
            matched += ours == total.quantity
            # More there than here: somebody else feeds the component too. Less: something of ours is not counted.
            unknown += total.quantity > ours
            (missing if total.quantity < ours else more).extend([text] if ours != total.quantity else [])
    examples = (missing + more)[:_EXAMPLES]
    return Reconciliation(matched, len(missing), unknown, 0, ours_sum, theirs_sum, tuple(examples))


def _accepted_here(
    destination: Destination, ledger: Ledger, subscriptions: Sequence[str], component: str, period: Period
) -> dict[str, Decimal]:
    """Return by subscription what should be counted there: from usage totals, and from archived chunks of events."""
    sums = _sums(ledger.accepted_at(destination.site, subscriptions, component, period))
    if destination.archive is None:
        return sums
    for events in _chunks(destination, ledger, component, period):
        inside = pc.and_(
            pc.greater_equal(events.column("time"), pa.scalar(period.start, events.column("time").type)),
            pc.less(events.column("time"), pa.scalar(period.end, events.column("time").type)),
        )
        some = cast("pd.DataFrame", events.select(["subscription", "quantity"]).filter(inside).to_pandas())
        some["quantity"] = "1" if destination.metric == "count" else some["quantity"]
        for subscription, more in _sums(some).items():
            sums[subscription] = sums.get(subscription, Decimal(0)) + more
    return sums


def _chunks(destination: Destination, ledger: Ledger, component: str, window: Period) -> Iterator[pa.Table]:
    """Yield the accepted chunks of all sources that feed a component and may hold events of `window`, one at a time."""
    for address in ledger.chunks_at(destination.site, component, window):
        yield destination.kept().read(Archived.at(address))


def _touch(one: Period, other: Period) -> bool:
    return one.start < other.end and other.start < one.end


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


def _grouped(totals: Iterable[SiteTotal]) -> dict[tuple[Period, str], list[SiteTotal]]:
    groups: dict[tuple[Period, str], list[SiteTotal]] = {}
    for total in totals:
        groups.setdefault((total.period, total.component), []).append(total)
    return groups
