"""What a plan would send, to read before it goes: by case, by subscription, and against the usage period before.

It reads the plan, the totals and the ledger, and writes nothing. Memory holds one part of a table and one range of the
subscriptions, whatever the interval; the text names the largest and counts the rest.
"""

import csv
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from hashlib import sha256
from itertools import pairwise
from typing import Any, TextIO

import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.archive import Archived
from usage_billing.destinations.base import Destination
from usage_billing.errors import NotApplied
from usage_billing.ledger import Ledger
from usage_billing.records import FOLLOWS, Comparison, Period, Plan, Staged, State
from usage_billing.staging import Spill, Staging

NAMED = 10
"""How many subscriptions and reasons are named; the rest is counted."""

_MOST_REASONS = 1000
_MAX_RANGES = 256
_UP, _DOWN = "corrections up", "corrections down"
_GOES = ("new", _UP, _DOWN)
_FOLLOWING = "after a credit"
_ITEM = "token revision state subscription component price_point dimensions period_start period_end quantity event_id"
ITEM_COLUMNS = (*_ITEM.split(), "reason")
"""The columns of the list of items; `event_id` is empty where totals go."""

_PROPOSED, _NOW, _BEFORE = range(3)
"""What a row set aside tells: what would be sent, what the last usage period owes, or what the one before it has."""
_KEY = ["subscription", "component"]


@dataclass(frozen=True)
class Case:
    """What would become of some deliveries (or raw events): how many they are, and the sum of their quantities."""

    label: str
    count: int
    quantity: Decimal


@dataclass(frozen=True)
class Share:
    """What would be sent for one subscription's component."""

    subscription: str
    component: str
    quantity: Decimal
    money: Decimal | None = None
    """By how much the next invoice would grow, in the site's currency; None where the site does not price it."""


@dataclass(frozen=True)
class Mover:
    """One subscription's component: what its last usage period owes, and what was accepted for the one before it."""

    subscription: str
    component: str
    before: Decimal
    now: Decimal

    @property
    def change(self) -> Decimal:
        """By how much it moved, with its sign."""
        return self.now - self.before


@dataclass(frozen=True)
class Rest:
    """What is not named: how many, and the sum of their quantities (or of their changes)."""

    count: int = 0
    quantity: Decimal = Decimal(0)


@dataclass(frozen=True)
class Preview:
    """What a plan would send; `digest` names exactly these deliveries with these quantities, and `going` counts them.

    `last` and `before` are the usage periods that the movers compare; `before` is None where nothing is known of one.
    """

    source: str
    site: str
    window: Period
    periods: int
    what: str
    rows_accepted: int
    rows_quarantined: int
    cases: tuple[Case, ...]
    held: tuple[Case, ...]
    held_rest: Rest
    open_before: tuple[Case, ...]
    unchanged: int
    shares: tuple[Share, ...]
    shares_rest: Rest
    money: str
    last: Period
    before: Period | None
    movers: tuple[Mover, ...]
    movers_rest: Rest
    going: int
    digest: str

    @property
    def sends(self) -> Decimal:
        """The sum of all that would be sent."""
        return sum((case.quantity for case in self.cases if case.label in _GOES), Decimal(0))

    def lines(self) -> list[str]:
        """Return the preview as plain lines, for a task log or a terminal."""
        lines = [
            f"preview of {self.source} for {self.site}: {self._span()}",
            f"{self.rows_accepted} rows accepted, {self.rows_quarantined} quarantined",
            f"would send {self.going} deliveries, {_text(self.sends)} in all",
        ]
        lines += [
            f"  {case.label:<20} {case.count:>10} {self.what:<10} {_text(case.quantity):>24}" for case in self.cases
        ]
        lines += [f"  {'unchanged':<20} {self.unchanged:>10} {self.what}"]
        for title, cases in (("held", self.held), ("open from before", self.open_before)):
            lines += [f"{title}: {case.count} {self.what}, {_text(case.quantity)}: {case.label}" for case in cases]
        lines += self._rest(self.held_rest, "held for other reasons")
        lines += [f"largest: {one.subscription}, {one.component}: {_share(one)}" for one in self.shares]
        lines += self._rest(self.shares_rest, "subscriptions")
        lines += [self.money, self._compared()]
        lines += [f"moved: {one.subscription}, {one.component}: {_moved(one)}" for one in self.movers]
        return lines + self._rest(self.movers_rest, "subscriptions that moved")

    def markdown(self) -> str:
        """Return the preview as Markdown, for a page on which a person decides."""
        cases = [(case.label, case.count, _text(case.quantity)) for case in self.cases]
        cases.append(("unchanged", self.unchanged, ""))
        about = (
            f"**{_plain(self.source)}** would send **{self.going} deliveries, {_text(self.sends)} in all**, to "
            f"{_plain(self.site)}: {self._span()}. {self.rows_accepted} rows were "
            f"accepted, {self.rows_quarantined} are in quarantine."
        )
        parts = [about, _table(("", self.what, "quantity"), cases)]
        stays = [("held", *_told(case)) for case in self.held] + [("open", *_told(case)) for case in self.open_before]
        if stays:
            parts += ["What is not sent:", _table(("", self.what, "quantity", "why"), stays)]
        parts += self._rest(self.held_rest, "held for other reasons")
        if self.shares:
            shares = [(one.subscription, one.component, _text(one.quantity), _money(one.money)) for one in self.shares]
            parts += ["The largest:", _table(("subscription", "component", "quantity", "money"), shares)]
        parts += self._rest(self.shares_rest, "subscriptions")
        parts += [self.money, self._compared()]
        if self.movers:
            movers = [
                (one.subscription, one.component, _text(one.before), _text(one.now), f"{_text(one.change, sign=True)}")
                for one in self.movers
            ]
            parts.append(_table(("subscription", "component", "before", "now", "change"), movers))
        parts += self._rest(self.movers_rest, "subscriptions that moved")
        return "\n\n".join(parts)

    @staticmethod
    def _rest(rest: Rest, of: str) -> list[str]:
        return [f"and {rest.count} more {of}, {_text(rest.quantity)} in all"] if rest.count else []

    def _span(self) -> str:
        return f"{self.periods} usage period{'s' if self.periods > 1 else ''}, {self.window}"

    def _compared(self) -> str:
        if self.before is None:
            return f"movers: nothing to compare {self.last} with"
        return f"movers: {self.last} against {self.before}" + ("" if self.movers else ": nothing moved")


def preview(plan: Plan, comparison: Comparison, destination: Destination, ledger: Ledger, staging: Staging) -> Preview:
    """Return what `plan`, which was made of `comparison`, would send.

    Raises:
        Misconfigured: a staged table or an archived chunk is missing, or is not what was written.
    """
    tallied = _Cases(destination.source.settings.meter.decimals)
    last, before = _last_and_before(comparison, ledger, destination)
    rows = plan.proposals.rows + comparison.totals.rows
    with Spill() as spill:
        aside = _Aside(spill, min(-(-rows // destination.source.settings.batch_rows), _MAX_RANGES) or 1)
        for frame in _proposed(plan.proposals, destination, staging):
            tallied.add(frame, _settled_before(frame, comparison, destination, ledger))
            aside.add(frame[frame["state"] == State.RESERVED], _PROPOSED)
        if before is not None:
            for frame in _owed(comparison.totals, staging, destination):
                aside.add(frame[frame["period_start"] == last.start], _NOW)
                aside.add(frame[frame["period_start"] == before.start], _BEFORE)
            if before not in comparison.periods:
                for frame in _accepted(before, destination, ledger):
                    aside.add(frame, _BEFORE)
        largest = _largest(aside, destination.source.settings.meter.decimals)
    largest["shares"], money = _priced(largest["shares"], destination)
    held, held_rest = tallied.held()
    digest, going = digest_of(plan.proposals, staging)
    return Preview(
        source=destination.source.name,
        site=destination.site,
        window=comparison.window,
        periods=len(comparison.periods),
        what="events" if destination.stream else "totals",
        rows_accepted=comparison.rows_accepted,
        rows_quarantined=comparison.rows_quarantined,
        cases=tallied.cases(),
        held=held,
        held_rest=held_rest,
        open_before=tuple(_open_before(comparison.periods, destination, ledger, tallied.superseded)),
        unchanged=plan.tally.unchanged,
        last=last,
        before=before,
        going=going,
        digest=digest,
        money=money,
        **largest,
    )


def digest_of(proposals: Staged, staging: Staging) -> tuple[str, int]:
    """Return what names exactly the deliveries that `proposals` would send, with their quantities, and their number.

    What goes once a credit was taken is named as well, and not counted.
    """
    names, going = sha256(), 0
    for part in staging.read(proposals):
        lines = going_of(part)
        going += len(lines)
        names.update("".join([*lines, *(f"{line}\n" for line in following_of(part))]).encode())
    return names.hexdigest(), going


def going_of(part: pa.Table) -> dict[str, str]:
    """Return a line for each proposal of a part that would be sent: token, quantity, and the request itself.

    The token names neither the quantity nor the billing period into which the request is dated. Behind it stands the
    line that `following_of` has for it while it waits for a credit.
    """
    columns = (part.column(name).to_pylist() for name in ("state", "body"))
    rows = zip(_lines(part, "token"), _lines(part, "identity"), *columns, strict=True)
    return {f"{line} {body}\n": waiting for line, waiting, state, body in rows if state == State.RESERVED}


def following_of(part: pa.Table) -> list[str]:
    """Return a line for each proposal that waits for a credit: it goes by another token, which is not known yet."""
    reasons = part.column("reason").to_pylist()
    return [line for line, why in zip(_lines(part, "identity"), reasons, strict=True) if why.startswith(FOLLOWS)]


def _lines(part: pa.Table, name: str) -> list[str]:
    columns = (part.column(column).to_pylist() for column in (name, "quantity"))
    return [f"{named} {quantity}" for named, quantity in zip(*columns, strict=True)]


def write_items(plan: Plan, destination: Destination, staging: Staging, file: TextIO) -> int:
    """Write every proposed delivery as CSV, each raw event on a line of its own; return how many lines.

    Columns are `ITEM_COLUMNS`. What has state ``reserved`` would be sent, ``held`` would be listed, and ``superseded``
    only ends an open delivery of before. What waits for a credit is ``held`` and says so.
    """
    lines, writer = 0, csv.writer(file, lineterminator="\n")
    writer.writerow(ITEM_COLUMNS)
    for frame in _proposed(plan.proposals, destination, staging):
        shown = frame[list(ITEM_COLUMNS)].assign(
            **{name: [_moment(value) for value in frame[name]] for name in ("period_start", "period_end")}
        )
        writer.writerows(shown.itertuples(index=False))
        lines += len(shown)
    return lines


# --- what is proposed -----------------------------------------------------------------------------------------------


def _proposed(proposals: Staged, destination: Destination, staging: Staging) -> Iterator[pd.DataFrame]:
    """Yield proposals with `ITEM_COLUMNS`, `identity` and `supersedes`; of a chunk of raw events, its events."""
    for part in staging.read(proposals):
        frame = part.to_pandas()
        if not destination.stream:
            yield frame.assign(event_id="")
            continue
        for row in frame.to_dict("records"):
            yield _events_of(row, destination)


def _events_of(row: dict[Any, Any], destination: Destination) -> pd.DataFrame:
    """Return the archived events of one row of the ledger, or of a plan, each as a row like it."""
    address = json.loads(row["address"])
    if row["state"] == State.SUPERSEDED:
        return pd.DataFrame([row | {"event_id": ""}])
    events = destination.kept().read(Archived.at(address))
    frame = pd.DataFrame([row] * len(events))
    quantity = events.column("quantity").to_pandas().astype(object)
    if destination.source.settings.meter.function == "unique":  # What is counted is no quantity.
        quantity = pd.Series(["1"] * len(events), dtype=object)
    if address["kind"] == "vanished":
        quantity = "-" + quantity
    return frame.assign(
        subscription=events.column("subscription").to_pandas().astype(object),
        event_id=events.column("event_id").to_pandas().astype(object),
        quantity=quantity,
    )


def _settled_before(
    frame: pd.DataFrame, comparison: Comparison, destination: Destination, ledger: Ledger
) -> frozenset[str]:
    """Return the identities among those of `frame` of which something is settled: what is sent corrects that."""
    if destination.stream or frame.empty:
        return frozenset()
    low, high = frame["identity"].iloc[0], frame["identity"].iloc[-1] + "~"
    known = ledger.standing(destination.source.name, comparison.periods, low, high)
    settled = known["state"].isin([State.ACCEPTED, State.WRITTEN_OFF])
    return frozenset(known.loc[settled, "identity"])


@dataclass
class _Cases:
    """Counts and scaled sums by case, and by reason of what is held."""

    decimals: int
    superseded: set[str] = field(default_factory=set)
    _sums: dict[str, list[int]] = field(default_factory=dict)
    _reasons: dict[str, list[int]] = field(default_factory=dict)

    def add(self, frame: pd.DataFrame, settled: frozenset[str]) -> None:
        self.superseded.update(token for token in frame["supersedes"] if token)
        scaled = quantities.from_text(frame["quantity"].astype(object), self.decimals)
        label = pd.Series("new", index=frame.index, dtype=object)
        label = label.mask(frame["identity"].isin(settled), _UP)
        label = label.mask((label == _UP) & (scaled < 0), _DOWN)
        follows = frame["reason"].str.startswith(FOLLOWS)
        for state, name in _NOT_SENT.items():
            label = label.mask((frame["state"] == state) & ~follows, name)
        label = label.mask(follows, _FOLLOWING)
        for name in label.unique():
            self._count(self._sums, name, scaled[label == name])
        held = frame["state"].isin([State.HELD, State.REFUSED]) & ~follows
        for reason in frame.loc[held, "reason"].unique():
            known = reason in self._reasons or len(self._reasons) < _MOST_REASONS
            self._count(self._reasons, reason if known else "", scaled[held & (frame["reason"] == reason)])

    @staticmethod
    def _count(sums: dict[str, list[int]], name: str, scaled: pd.Series) -> None:
        entry = sums.setdefault(name, [0, 0])
        entry[0] += len(scaled)
        entry[1] += quantities.total(scaled)

    def cases(self) -> tuple[Case, ...]:
        """Return what the proposals are, those that would be sent always."""
        found = {name: self._sums.get(name, [0, 0]) for name in (*_GOES, "held", "withdrawn")} | self._sums
        return tuple(Case(name, count, self._decimal(scaled)) for name, (count, scaled) in found.items())

    def held(self) -> tuple[tuple[Case, ...], Rest]:
        """Return what is held by its most frequent reasons, and the rest."""
        some = sorted(self._reasons.items(), key=lambda entry: (not entry[0], -entry[1][0], entry[0]))
        named = [(reason, sums) for reason, sums in some if reason][:NAMED]
        rest = [sums for reason, sums in some if reason not in dict(named)]
        left = Rest(sum(count for count, _ in rest), self._decimal(sum(scaled for _, scaled in rest)))
        return tuple(Case(reason, count, self._decimal(scaled)) for reason, (count, scaled) in named), left

    def _decimal(self, scaled: int) -> Decimal:
        return quantities.to_decimal(scaled, self.decimals)


_NOT_SENT = {State.HELD: "held", State.REFUSED: "refused here", State.SUPERSEDED: "withdrawn"}
_STAYS = {
    State.RESERVED: "written down by an earlier try, and sent with it",
    State.SENDING: "on its way now, which blocks its key",
    State.IN_DOUBT: "in doubt, which blocks its key",
    State.HELD: "held before, and still",
    State.REFUSED: "refused by the site",
}


def _open_before(
    periods: Sequence[Period], destination: Destination, ledger: Ledger, superseded: set[str]
) -> Iterator[Case]:
    """Yield what is listed in the ledger and stays as it is."""
    items = ledger.open_items(destination.source.name, periods)
    items = items[~items["token"].isin(superseded)]
    decimals = destination.source.settings.meter.decimals
    for state, words in _STAYS.items():
        some = items[items["state"] == state]
        if some.empty:
            continue
        count, quantity = len(some), some["quantity"].astype(object)
        if destination.stream:
            addresses = [json.loads(address) for address in some["address"]]
            count = sum(address["rows"] for address in addresses)
            quantity = pd.Series([address["sum"] for address in addresses], dtype=object)
        yield Case(
            words, count, quantities.to_decimal(quantities.total(quantities.from_text(quantity, decimals)), decimals)
        )


# --- by subscription --------------------------------------------------------------------------------------------------


class _Aside:
    """Quantities set aside by subscription, each partition small enough for memory."""

    def __init__(self, spill: Spill, ranges: int) -> None:
        self._spill = spill
        self._ranges = ranges

    def add(self, frame: pd.DataFrame, side: int) -> None:
        if frame.empty:
            return
        rows = frame[[*_KEY, "quantity"]].astype(object).assign(side=side)
        hashed = pd.util.hash_array(rows["subscription"].to_numpy(dtype=object), categorize=True)
        schema = pa.schema([*((name, pa.string()) for name in (*_KEY, "quantity")), ("side", pa.int64())])
        table = pa.Table.from_pandas(rows, schema=schema, preserve_index=False)
        self._spill.add(table, (hashed % self._ranges).astype("int64"))

    def sums(self, decimals: int) -> Iterator[tuple[int, dict[tuple[str, str], int]]]:
        """Yield, for each side of each partition, the scaled sum by subscription and component."""
        for number in self._spill.numbers():
            frame = self._spill.read(number).to_pandas()
            frame["scaled"] = quantities.from_text(frame["quantity"].astype(object), decimals)
            for side in (_PROPOSED, _NOW, _BEFORE):
                summed = quantities.sum_by(frame.loc[frame["side"] == side, [*_KEY, "scaled"]], _KEY, "scaled")
                columns = (summed[name].tolist() for name in (*_KEY, "scaled"))
                yield side, {(one, component): int(scaled) for one, component, scaled in zip(*columns, strict=True)}


def _largest(aside: _Aside, decimals: int) -> dict[str, Any]:
    """Return the largest shares and movers, and what the rest of each comes to, as fields of a `Preview`."""
    shares, movers = _Top(), _Top()
    now: dict[tuple[str, str], int] = {}
    for side, sums in aside.sums(decimals):
        if side == _PROPOSED:
            shares.add((abs(scaled), scaled, key, ()) for key, scaled in sums.items())
        elif side == _NOW:
            now = sums
        else:
            both = ((key, sums.get(key, 0), now.get(key, 0)) for key in sorted({*sums, *now}))
            movers.add(
                (abs(after - before), after - before, key, (before, after))
                for key, before, after in both
                if after != before
            )
    as_decimal = [*(quantities.to_decimal(one.left, decimals) for one in (shares, movers))]
    return {
        "shares": tuple(Share(*key, quantities.to_decimal(scaled, decimals)) for _, scaled, key, _ in shares.named()),
        "shares_rest": Rest(shares.more, as_decimal[0]),
        "movers": tuple(
            Mover(*key, *(quantities.to_decimal(scaled, decimals) for scaled in sides))
            for _, _, key, sides in movers.named()
        ),
        "movers_rest": Rest(movers.more, as_decimal[1]),
    }


_Entry = tuple[int, int, tuple[str, str], tuple[int, ...]]
"""How large, the signed sum, whose it is, and what it is made of."""


class _Top:
    """The largest of many entries; of the others, how many and their sum."""

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._count = self._sum = 0

    def add(self, entries: Iterable[_Entry]) -> None:
        some = list(entries)
        self._count += len(some)
        self._sum += sum(entry[1] for entry in some)
        self._entries = heapq.nsmallest(NAMED, [*self._entries, *some], key=lambda entry: (-entry[0], entry[2]))

    def named(self) -> Sequence[_Entry]:
        return self._entries

    @property
    def more(self) -> int:
        return self._count - len(self._entries)

    @property
    def left(self) -> int:
        return self._sum - sum(entry[1] for entry in self._entries)


def _priced(shares: Sequence[Share], destination: Destination) -> tuple[tuple[Share, ...], str]:
    """Return the named shares with what they are worth, as far as the site says it, and a line about that."""
    more = {share.subscription: share.quantity for share in shares}
    if len(more) != len(shares):  # Which of a subscription's components is asked about, the answer does not say.
        return tuple(shares), "money: not asked, since subscriptions have several components"
    try:
        worth = destination.priced(more)
    except NotApplied as failure:
        return tuple(shares), f"money: the site could not be asked ({failure})"
    if worth is None:
        return tuple(shares), f"money: no documented call of {destination.name} prices usage that is not there yet"
    total = _money(sum(worth.values(), Decimal(0)))
    told = f"money: {total} more on the next renewals of {len(worth)} of the {len(shares)} named, by the site's preview"
    return tuple(replace(share, money=worth.get(share.subscription)) for share in shares), told


# --- the usage period before ------------------------------------------------------------------------------------------


def _last_and_before(comparison: Comparison, ledger: Ledger, destination: Destination) -> tuple[Period, Period | None]:
    """Return the last compared usage period and the one to compare it with; None where sums say nothing."""
    periods = sorted(comparison.periods)
    summed = destination.source.settings.meter.function in {"sum", "count"}
    if destination.stream and not summed:
        return periods[-1], None
    if len(periods) > 1:
        return periods[-1], periods[-2]
    source = destination.source
    return periods[-1], ledger.compared_before(source.name, periods[-1].start, source.span.start)


def _owed(totals: Staged, staging: Staging, destination: Destination) -> Iterator[pd.DataFrame]:
    """Yield what is owed, a part at a time."""
    decimals = destination.source.settings.meter.decimals
    for part in staging.read(totals):
        scaled = quantities.to_scaled(part.column("quantity"), decimals)
        frame = part.select([*_KEY, "period_start"]).to_pandas()
        yield frame.assign(quantity=quantities.to_text(scaled, decimals))


def _accepted(period: Period, destination: Destination, ledger: Ledger) -> Iterator[pd.DataFrame]:
    """Yield what was accepted for a usage period, as it counted, a sixteenth of the identities at a time."""
    edges = ["", *"123456789abcdef", "g"]
    for low, high in pairwise(edges):
        known = ledger.standing(destination.source.name, period, low, high)
        known = known[known["state"] == State.ACCEPTED]
        if not destination.stream:
            counted = known["applied"].astype(object)
            yield known.assign(quantity=counted.where(counted != "", known["quantity"].astype(object)))
            continue
        for row in known.to_dict("records"):
            yield _events_of(row, destination)


# --- words ------------------------------------------------------------------------------------------------------------


def _text(quantity: Decimal, *, sign: bool = False) -> str:
    """Return a quantity in plain digits, thousands apart, without zeros at its end."""
    text = f"{quantity:+,f}" if sign else f"{quantity:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _share(one: Share) -> str:
    return _text(one.quantity) + ("" if one.money is None else f", which is {_money(one.money)} more")


def _money(amount: Decimal | None) -> str:
    return "" if amount is None else f"{amount:,.2f}"


def _moved(one: Mover) -> str:
    return f"{_text(one.before)} before, {_text(one.now)} now, {_text(one.change, sign=True)}"


def _told(case: Case) -> tuple[int, str, str]:
    return case.count, _text(case.quantity), case.label


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_plain(str(cell)) for cell in line) + " |" for line in lines)


def _plain(text: str) -> str:
    """Return text that Markdown takes for nothing but text: an account's name must not become a link or a heading."""
    flat = " ".join(text.split())
    return flat if set(flat) == {"-"} else "".join(f"\\{one}" if one in "\\`*_[]<>|#!~&" else one for one in flat)


def _moment(value: Any) -> str:
    moment: datetime = pd.Timestamp(value).to_pydatetime()
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
