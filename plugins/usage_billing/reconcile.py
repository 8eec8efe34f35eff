"""What we believe against what the billing site holds, with zero tolerance.

Where the site lists its records, each of ours is matched by its token; where it only counts (Maxio events), the site's
total of a billing period is compared with the sum of what the ledger has accepted for it. Of raw events the ledger has
chunks; what is in them tells the archive.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal

import pandas as pd

from usage_billing.destinations.base import Destination
from usage_billing.ledger import Ledger
from usage_billing.records import DECIDED, Period, SiteRecord, SiteTotal, State, Window, joined
from usage_billing.sums import ON_ITS_WAY, chunks, sums_here, under_way

_EXAMPLES = 10
_BATCH = 500
"""How many records of other runs are looked up at once."""
_ADD_UP = ("sum", "count")
"""What a metric may compute so that the parts of it can be added up here."""


@dataclass(frozen=True)
class Reconciliation:
    """The tie-out of one window.

    `matched`, `missing` (accepted here, not there), `unknown` (there, not ours: somebody else also bills this) and
    `different` count records, or billing periods where the site only counts. `ours` and `theirs` are sums. `moved`
    counts deliveries that were accepted at an address which was replaced since, so that nobody can say whether they are
    billed; `warnings` name them. `note` says why nothing was compared, where nothing can be.
    """

    matched: int
    missing: int
    unknown: int
    different: int
    ours: Decimal
    theirs: Decimal
    examples: tuple[str, ...] = ()
    note: str = ""
    moved: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def ties_out(self) -> bool:
        """True if everything we believe was billed is there, with the same quantity."""
        return self.missing == 0 and self.different == 0


def reconcile(
    destination: Destination,
    ledger: Ledger,
    window: Window,
    wait: Callable[[float], object] = time.sleep,
    pauses: Sequence[float] = (2.0, 4.0, 8.0),
) -> Reconciliation:
    """Compare the ledger's accepted deliveries of one source in `window` with the billing site.

    What does not tie out is looked at again after each of `pauses` (seconds): a site may show late what it has, and
    what other runs send meanwhile is counted there before it is accepted here.

    Raises:
        NotApplied: the site could not be asked.
    """
    found = _look(destination, ledger, window)
    for pause in pauses:
        if found.ties_out:
            break
        wait(pause)
        found = _look(destination, ledger, window)
    accepted = ledger.accepted(destination.source.name, window)
    moved = [] if accepted.empty else list(destination.moved(accepted))
    warnings = tuple(one.text for one in moved[:_EXAMPLES])
    return replace(found, moved=sum(one.deliveries for one in moved), warnings=warnings)


def _look(destination: Destination, ledger: Ledger, window: Window) -> Reconciliation:
    accepted = ledger.accepted(destination.source.name, window)
    if accepted.empty:
        return Reconciliation(0, 0, 0, 0, Decimal(0), Decimal(0))
    if destination.records(accepted.head(1)) is not None:
        records = _Records(ledger)
        for _, some in accepted.groupby("address"):
            records.compare(some, destination.records(some) or ())
        return records.closed()
    if destination.metric not in _ADD_UP:
        why = f"the site computes the {destination.metric} of the events, and no sum of ours can be tied out with that"
        return Reconciliation(0, 0, 0, 0, Decimal(0), Decimal(0), note=why)
    where = _Where(joined(window), frozenset(accepted["open_until"].dropna()))
    if destination.stream:
        component = accepted["component"].iloc[0]
        billed = sorted(
            {
                name
                for span in joined(window)
                for some in chunks(destination, ledger, component, span)
                for name in some.column("subscription").unique().to_pylist()
            }
        )
        return _by_total(destination, ledger, billed, where)
    return _by_total(destination, ledger, sorted(accepted["subscription"].unique()), where)


@dataclass
class _Found:
    """How many records of one kind there are, and the first of them in words."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, text: str) -> None:
        self.count += 1
        if self.count <= _EXAMPLES:
            self.examples.append(text)


class _Decided:
    """Deliveries that a person decided about: what the site holds under each, however often, makes what was said."""

    def __init__(self, tokens: Iterable[str], expected: dict[str, tuple[Decimal, Decimal]]) -> None:
        """Take the tokens out of what is `expected`: the quantity sent, and what it counted."""
        self._said = {token: expected.pop(token)[1] for token in tokens}
        self._there = dict.fromkeys(self._said, Decimal(0))

    def __contains__(self, token: str) -> bool:
        return token in self._said

    def add(self, record: SiteRecord) -> None:
        """Count a record of the site."""
        self._there[record.token] += record.quantity

    @property
    def matched(self) -> int:
        """How many add up to what was said."""
        return sum(self._there[token] == said for token, said in self._said.items())

    def different(self) -> Iterator[str]:
        """Yield what does not add up."""
        for token, said in self._said.items():
            if (there := self._there[token]) != said:
                yield f"token {token}: {there} there, {said} by a person's decision"


class _Records:
    """The tie-out of single records, address by address: whatever the history, it keeps counts and some examples."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._matched = 0
        self._ours = self._theirs = Decimal(0)
        self._different, self._missing = _Found(), _Found()
        # Those under a token are the more alarming ones.
        self._unknown_tokens, self._unknown = _Found(), _Found()
        self._others: list[SiteRecord] = []

    def compare(self, accepted: pd.DataFrame, records: Iterable[SiteRecord]) -> None:
        """Compare what was accepted for one address with what the site holds there."""
        # A deduction that met the floor is stored as it was sent, or as it counted: sites differ.
        counted = accepted["applied"].where(accepted["applied"] != "", accepted["quantity"])
        pairs = zip(map(Decimal, accepted["quantity"]), map(Decimal, counted), strict=True)
        expected = dict(zip(accepted["token"], pairs, strict=True))
        ours_by_token = frozenset(expected)
        self._ours += sum(map(Decimal, counted), Decimal(0))
        decided = _Decided(accepted.loc[accepted["reason"].str.startswith(DECIDED), "token"], expected)
        for record in records:
            if record.token in decided:
                self._theirs += record.quantity
                decided.add(record)
            elif record.token in ours_by_token:
                self._one_of_ours(record, expected)
            else:
                self._another(record)
        self._matched += decided.matched
        for text in decided.different():
            self._different.add(text)
        for token, (sent, _) in expected.items():
            self._missing.add(f"token {token}: {sent} accepted here, absent there")

    def closed(self) -> Reconciliation:
        """Return the tie-out of all that was compared."""
        self._judge_others()
        kinds = (self._different, self._missing, self._unknown_tokens, self._unknown)
        examples = [text for kind in kinds for text in kind.examples][:_EXAMPLES]
        unknown = self._unknown_tokens.count + self._unknown.count
        return Reconciliation(
            self._matched,
            self._missing.count,
            unknown,
            self._different.count,
            self._ours,
            self._theirs,
            tuple(examples),
        )

    def _one_of_ours(self, record: SiteRecord, expected: dict[str, tuple[Decimal, Decimal]]) -> None:
        self._theirs += record.quantity
        wanted = expected.pop(record.token, None)
        if wanted is None:
            text = f"record {record.record_id}: {record.quantity} there a second time under {record.token}"
            self._different.add(text)
        elif record.quantity in wanted:
            self._matched += 1
        else:
            self._different.add(f"record {record.record_id}: {record.quantity} there, {wanted[0]} here")

    def _another(self, record: SiteRecord) -> None:
        if not record.token:
            self._unknown.add(f"record {record.record_id}: {record.quantity} there, {_whose(record)}")
            return
        self._others.append(record)
        if len(self._others) == _BATCH:
            self._judge_others()

    def _judge_others(self) -> None:
        """Look up what other runs of ours sent: a site that cannot tell usage periods apart lists that too."""
        known = self._ledger.known([record.token for record in self._others]).set_index("token")
        for record in self._others:
            text = f"record {record.record_id}: {record.quantity} there, "
            if record.token not in known.index:
                self._unknown_tokens.add(text + _whose(record))
                continue
            state, its_record, reason = known.loc[record.token, ["state", "record_id", "reason"]]
            if (
                state == State.ACCEPTED
                and its_record not in ("", record.record_id)
                and not str(reason).startswith(DECIDED)
            ):
                text += f"a second time under {record.token}, which is record {its_record} elsewhere"
                self._different.add(text)
            elif state not in (*ON_ITS_WAY, State.ACCEPTED):
                self._different.add(text + f"{state} here under {record.token}")
        self._others.clear()


def _whose(record: SiteRecord) -> str:
    """Return what an unknown record may be: somebody else's, or ours from a ledger that is not this one."""
    if not record.token:
        return "unknown here"
    return (
        f"under token {record.token}, which this ledger never wrote down: it is a second or a restored ledger "
        "(`usage-billing ledger adopt` enters what is ours), or another installation bills the same account"
    )


@dataclass(frozen=True)
class _Where:
    """Where the usage of a window may be counted: in billing periods that touch it, and in those that end so.

    What came late is counted after its time.
    """

    spans: tuple[Period, ...]
    ends: frozenset[datetime]

    def takes(self, period: Period) -> bool:
        """Say whether a billing period may count some of it; the site may have moved its end since."""
        return any(_touch(period, span) for span in self.spans) or any(
            period.start < end <= period.end for end in self.ends
        )


def _by_total(destination: Destination, ledger: Ledger, billed: Sequence[str], where: _Where) -> Reconciliation:
    totals = [total for total in destination.totals(billed) or [] if where.takes(total.period)]
    matched = 0
    ours_sum = theirs_sum = Decimal(0)
    different, missing, unknown = _Found(), _Found(), _Found()
    for subscription in sorted(set(billed) - {total.subscription for total in totals}):
        missing.add(f"subscription {subscription}: the site gives no total for {Period.around(where.spans)}")
    for (period, component), some in _grouped(totals).items():
        names = [total.subscription for total in some]
        sums = sums_here(destination, ledger, names, component, period, (State.ACCEPTED,))
        apart = [total.subscription for total in some if total.quantity != sums.get(total.subscription, Decimal(0))]
        adds, takes = under_way(destination, ledger, apart, component, period)
        for total in some:
            ours = sums.get(total.subscription, Decimal(0))
            ours_sum, theirs_sum = ours_sum + ours, theirs_sum + total.quantity
            text = f"subscription {total.subscription}, {period}: {total.quantity} there, {ours} here"
            excess = total.quantity - ours
            if excess == 0:
                matched += 1
            elif takes.get(total.subscription, Decimal(0)) <= excess <= adds.get(total.subscription, Decimal(0)):
                unknown.add(f"{text}, and what is in doubt or being sent")
            elif excess < 0:
                missing.add(text)  # Something of ours is not counted.
            elif destination.fed_by_others:
                unknown.add(f"{text}: others feed the component too, as the source says")
            else:
                different.add(f"{text}: it was billed twice, or somebody else feeds the component (`fed_by_others`)")
    examples = tuple((different.examples + missing.examples + unknown.examples)[:_EXAMPLES])
    return Reconciliation(matched, missing.count, unknown.count, different.count, ours_sum, theirs_sum, examples)


def _touch(one: Period, other: Period) -> bool:
    return one.start < other.end and other.start < one.end


def _grouped(totals: Iterable[SiteTotal]) -> dict[tuple[Period, str], list[SiteTotal]]:
    groups: dict[tuple[Period, str], list[SiteTotal]] = {}
    for total in totals:
        groups.setdefault((total.period, total.component), []).append(total)
    return groups
