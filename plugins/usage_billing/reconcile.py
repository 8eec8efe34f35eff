"""What we believe against what the billing site holds, with zero tolerance.

Where the site lists its records, each of ours is matched by its token; where it only counts (Maxio events), the site's
total of a billing period is compared with the sum of what the ledger has accepted for it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

import pandas as pd

from usage_billing import quantities
from usage_billing.destinations.base import Destination
from usage_billing.ledger import Ledger
from usage_billing.records import Period, SiteRecord, SiteTotal

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


def reconcile(destination: Destination, ledger: Ledger, window: Period) -> Reconciliation:
    """Compare the ledger's accepted deliveries of one source in `window` with the billing site.

    Raises:
        NotApplied: the site could not be asked.
    """
    accepted = ledger.accepted(destination.source.name, window)
    if accepted.empty:
        return Reconciliation(0, 0, 0, 0, Decimal(0), Decimal(0))
    records = destination.records(accepted)
    if records is not None:
        return _by_record(ledger, accepted, records)
    totals = destination.totals(sorted(accepted["subscription"].unique())) or []
    return _by_total(destination, ledger, totals, window)


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
        wanted = expected.pop(record.token, None)
        if wanted is None:
            theirs += record.quantity
            different.append(f"record {record.record_id}: {record.quantity} there a second time under {record.token}")
            continue
        theirs += record.quantity
        matched += record.quantity == wanted
        if record.quantity != wanted:
            different.append(f"record {record.record_id}: {record.quantity} there, {wanted} here")
    missing = [f"token {token}: {quantity} accepted here, absent there" for token, quantity in expected.items()]
    # A site that cannot tell usage periods apart also lists what other runs of ours sent.
    known = ledger.known([record.token for record in others if record.token])
    unknown = [
        f"record {record.record_id}: {record.quantity} there, unknown here"
        for record in others
        if record.token not in known
    ]
    examples = (different + missing + unknown)[:_EXAMPLES]
    return Reconciliation(matched, len(missing), len(unknown), len(different), ours, theirs, tuple(examples))


def _by_total(destination: Destination, ledger: Ledger, totals: list[SiteTotal], window: Period) -> Reconciliation:
    touching = [total for total in totals if total.period.start < window.end and window.start < total.period.end]
    decimals = destination.source.settings.meter.decimals
    matched = missing = unknown = 0
    ours_sum = theirs_sum = Decimal(0)
    examples: list[str] = []
    for (period, component), some in _grouped(touching).items():
        accepted = ledger.accepted_at(destination.site, [total.subscription for total in some], component, period)
        accepted = accepted.assign(scaled=quantities.from_text(accepted["quantity"].astype(object), decimals))
        sums = quantities.sum_by(accepted, ["subscription"], "scaled").set_index("subscription")["scaled"]
        for total in some:
            ours = quantities.to_decimal(int(sums.get(total.subscription, 0)), decimals)
            ours_sum, theirs_sum = ours_sum + ours, theirs_sum + total.quantity
            if ours == total.quantity:
                matched += 1
                continue
            # More there than here: somebody else feeds the component too. Less: something of ours is not counted.
            unknown += total.quantity > ours
            missing += total.quantity < ours
            examples.append(f"subscription {total.subscription}, {period}: {total.quantity} there, {ours} here")
    return Reconciliation(matched, missing, unknown, 0, ours_sum, theirs_sum, tuple(examples[:_EXAMPLES]))


def _grouped(totals: Iterable[SiteTotal]) -> dict[tuple[Period, str], list[SiteTotal]]:
    groups: dict[tuple[Period, str], list[SiteTotal]] = {}
    for total in totals:
        groups.setdefault((total.period, total.component), []).append(total)
    return groups
