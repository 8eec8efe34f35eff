"""What we believe against what the billing site holds, with zero tolerance.

Where the site lists its records, each of ours is matched by its token; where it only counts (Maxio events), the site's
total of a billing period is compared with the sum of what the ledger has accepted for it.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import pandas as pd

from usage_billing import quantities
from usage_billing.destinations.base import Destination
from usage_billing.ledger import Ledger
from usage_billing.records import Period, SiteRecord, SiteTotal, State

_EXAMPLES = 10


@dataclass(frozen=True)
class Reconciliation:
    """The tie-out of one window.

    `matched`, `missing` (accepted here, not there), `unknown` (there, not ours: somebody else also bills this) and
    `different` count records, or billing periods where the site only counts. `ours` and `theirs` are sums.
    """

    matched: int
    missing: int
    unknown: int
    different: int
    ours: Decimal
    theirs: Decimal
    examples: tuple[str, ...] = ()

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
    return _by_total(destination, ledger, accepted, window)


def _by_record(ledger: Ledger, accepted: pd.DataFrame, records: Iterable[SiteRecord]) -> Reconciliation:
    quantities_here = (Decimal(quantity) for quantity in accepted["quantity"])
    expected = dict(zip(accepted["token"], quantities_here, strict=True))
    ours = sum(expected.values(), Decimal(0))
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
        matched += record.quantity == wanted
        if record.quantity != wanted:
            different.append(f"record {record.record_id}: {record.quantity} there, {wanted} here")
    missing = [f"token {token}: {quantity} accepted here, absent there" for token, quantity in expected.items()]
    # A site that cannot tell usage periods apart also lists what other runs of ours sent.
    states = ledger.states([record.token for record in others if record.token])
    unknown = []
    for record in others:
        state = states.get(record.token)
        if state is None:
            unknown.append(f"record {record.record_id}: {record.quantity} there, unknown here")
        elif state not in {State.ACCEPTED, State.SENDING, State.IN_DOUBT}:
            different.append(f"record {record.record_id}: {record.quantity} there, {state} here under {record.token}")
    examples = (different + missing + unknown)[:_EXAMPLES]
    return Reconciliation(matched, len(missing), len(unknown), len(different), ours, theirs, tuple(examples))


def _by_total(destination: Destination, ledger: Ledger, accepted: pd.DataFrame, window: Period) -> Reconciliation:
    billed = sorted(accepted["subscription"].unique())
    totals = [total for total in destination.totals(billed) or [] if _touch(total.period, window)]
    matched = unknown = 0
    ours_sum = theirs_sum = Decimal(0)
    missing = [
        f"subscription {subscription}: the site gives no total for {window}"
        for subscription in sorted(set(billed) - {total.subscription for total in totals})
    ]
    more: list[str] = []
    for (period, component), some in _grouped(totals).items():
        here = ledger.accepted_at(destination.site, [total.subscription for total in some], component, period)
        sums = _sums(here)
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
