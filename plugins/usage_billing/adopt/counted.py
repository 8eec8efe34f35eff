"""Adopt where the site only counts: its count of a billing period tells whether it has all that is not known here."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from usage_billing.adopt.search import (
    ATTRIBUTES,
    EXACT,
    REVISIONS_AHEAD,
    Adoption,
    Search,
    accounts,
    gone_from_the_warehouse,
    plain,
    rows_of,
)
from usage_billing.destinations.base import Destination
from usage_billing.errors import Misconfigured, NotApplied
from usage_billing.ledger import ADOPTED, Ledger
from usage_billing.records import SiteTotal, State
from usage_billing.sums import sums_here, under_way
from usage_billing.uniqueness import uniqueness_token

_MOVED = "the account leads elsewhere by now"
_BY_TOTAL = "by total: with it, the site counts just what this ledger knows of that billing period"
"""What the reason of a delivery says that no record of the site was found for."""


def by_total(search: Search) -> Adoption:
    """Enter, leave to the ordinary run or hold what was forgotten, by what the site counts of each subscription."""
    destination, ledger = search.destination, search.ledger
    forgotten = _forgotten(search)
    # No run of today sends anything to these, so none of them would be replayed.
    today = destination.resolve_accounts(accounts(forgotten))
    resting = {target.account: target.unknown for target in today if target.unknown}
    if destination.stream:
        return _by_token(search, forgotten, resting)
    nowhere = pd.Series(pd.NaT, index=forgotten.index, dtype="datetime64[ns, UTC]")
    forgotten = destination.look_up(forgotten.assign(open_until=nowhere)).drop(columns="open_until")
    forgotten = forgotten.assign(late=~(forgotten["period_end"] > forgotten["open_from"]))
    recent = forgotten["period_end"] > ledger.now() - destination.replay_window
    counts = _Counting(destination, ledger, forgotten).judged()
    why = pd.Series(
        [
            _why_held(row, counts.get(row["subscription"]), resting, is_recent=is_recent)
            for row, is_recent in zip(rows_of(forgotten), recent, strict=True)
        ],
        index=forgotten.index,
        dtype=object,
    )
    judged = (forgotten["elsewhere"] == "") & ~forgotten["late"]
    there = judged & forgotten["subscription"].isin({name for name, count in counts.items() if count.there})
    again = ~there & (why == "")
    fresh = ~there & ~again & ~forgotten["held"]
    if not search.dry_run and not forgotten.empty:
        changed = (fresh | (again & forgotten["held"])).to_numpy()
        states = np.where(again, State.SUPERSEDED, State.HELD)
        _write(search, forgotten[there], forgotten.assign(state=states, why=why)[changed])
    ends = forgotten["period_end"][again]
    return Adoption(
        entered=int(there.sum()),
        held=int(fresh.sum()),
        replayable=len(ends),
        replay_until=None if ends.empty else ends.min().to_pydatetime() + destination.replay_window,
        moved=search.moved,
    )


def _forgotten(search: Search) -> pd.DataFrame:
    """Return what this ledger does not know (columns of `_Standing.forgotten`), and why it may lie ``elsewhere``."""
    here = _Standing(search.ledger.standing(search.destination.source.name, search.comparison.periods))
    found = pd.concat([here.forgotten(totals) for totals in here.beside(_as_billed(search))])
    found = found.sort_values("identity", ignore_index=True)
    led = pd.Series([search.astray.get(account, "") for account in found["account"]], found.index, dtype=object)
    return found.assign(elsewhere=led.mask(search.moves.waiting(found), _MOVED))


def _write(search: Search, there: pd.DataFrame, changed: pd.DataFrame) -> None:
    """Enter what the site has; hold what nobody can tell of, and let go what was held and can be sent after all."""
    destination, ledger, reading = search.destination, search.ledger, search.comparison.reading
    where = destination.source.name, destination.site, reading
    search.overtake()
    ledger.adopt(*where, _as_entries(there, destination), {}, f"{search.reason}: {_BY_TOTAL}")
    because = f"{search.reason}: the site lists no events, and " + changed["why"] + ", so a person has to compare"
    proposals = changed.assign(reason=because, body=destination.encode(changed)).reset_index(drop=True)
    if ledger.reserve(*where, proposals).moved:
        raise NotApplied(f"deliveries of {destination.source.name!r} moved meanwhile; adopt again")


def _as_entries(rows: pd.DataFrame, destination: Destination) -> pd.DataFrame:
    """Return totals that the site is told to have, as the ledger enters them.

    Under which revisions it has them nobody knows: what is owed later goes under one that was never used. The body is
    that of an ordinary run, and tells in which billing period the site counts it.
    """
    revisions = rows["revision"] + REVISIONS_AHEAD
    tokens = [uniqueness_token(key, revision) for key, revision in zip(rows["identity"], revisions, strict=True)]
    found = rows.assign(revision=revisions, token=tokens, record_id="", applied="", doubt="")
    return found.assign(body=destination.encode(found))


def _why_held(row: Mapping[str, Any], count: "_Count | None", resting: Mapping[str, str], *, is_recent: bool) -> str:
    """Return why the ordinary run may not send a forgotten total, or an empty text."""
    if row["elsewhere"]:
        return str(row["elsewhere"])
    if not row["late"] and count and count.why:
        return count.why
    if row["account"] in resting:
        return resting[row["account"]]
    if not is_recent:
        return "the site has forgotten tokens of this age"
    # Dated in a later billing period it may lie among other usage, under whatever token.
    return "its billing period is closed, so it may have been billed in the one after it" if row["late"] else ""


def _by_token(search: Search, forgotten: pd.DataFrame, resting: Mapping[str, str]) -> Adoption:
    """Leave raw events to the ordinary run: each has a token of its own, which the stream ignores whatever else is."""
    name, window = search.destination.source.name, search.destination.replay_window
    if not (forgotten["period_end"] > search.ledger.now() - window).all():
        raise Misconfigured(
            f"billing source {name!r} sends raw events, and of usage periods that ended more than {window.days} days "
            "ago nobody can tell which of them the site has: restore a newer backup of the ledger, or adopt later days"
        )
    elsewhere = forgotten["elsewhere"] != ""
    ends = forgotten["period_end"][~forgotten["account"].isin(resting) & ~elsewhere]
    moved = set(forgotten["account"][elsewhere]) - search.astray.keys()
    silent = {account: f"{why}, so nothing of it is replayed" for account, why in resting.items()}
    silent |= dict.fromkeys(moved, f"{_MOVED}, so nothing of it is replayed")
    if not search.dry_run and not forgotten.empty:
        search.overtake()
    return Adoption(
        replayable=len(ends),
        replay_until=None if ends.empty else ends.min().to_pydatetime() + window,
        unmatched=tuple(f"account {account}: {why}" for account, why in sorted({**silent, **search.told}.items())),
        moved=search.moved,
    )


@dataclass(frozen=True)
class _Count:
    """What the site's count of a billing period tells of the totals in it that were forgotten here.

    They are all `there`, or none of them is; or else `why` says that nobody can tell.
    """

    there: bool = False
    why: str = ""


class _Counting:
    """The site's count of each subscription that has forgotten totals, beside what this ledger knows of it."""

    def __init__(self, destination: Destination, ledger: Ledger, forgotten: pd.DataFrame) -> None:
        self._destination = destination
        self._ledger = ledger
        self._forgotten = forgotten
        self._held = self._held_by_adoption(forgotten)

    def judged(self) -> dict[str, _Count]:
        """Return what is told of the open billing period of each subscription that was forgotten in it."""
        rows = self._forgotten
        open_ones = rows[~rows["late"] & (rows["elsewhere"] == "")]
        return {str(name): self._judge(str(name), some) for name, some in open_ones.groupby("subscription")}

    def _judge(self, name: str, mine: pd.DataFrame) -> _Count:
        if self._destination.fed_by_others:
            return _Count(why="others feed the component too, so its count tells nothing")
        totals = {total.period.start: total for total in self._destination.totals([name]) or ()}
        total = totals.get(mine["open_from"].iloc[0].to_pydatetime())
        if total is None:
            return _Count(why="it gives no count of the open billing period")
        same = self._forgotten[self._forgotten["subscription"] == name]
        # What has moved may lie here or there; so may what is late, unless its own billing period has it.
        rest = same[(same["elsewhere"] != "") | same["late"]]
        for past in totals.values():
            inside = (rest["period_start"] >= past.period.start) & (rest["period_end"] <= past.period.end)
            if past is not total and inside.any() and self._beside(past, rest[inside], ()).there:
                rest = rest[~inside]
        return self._beside(total, mine, map(Decimal, rest["quantity"]))

    def _beside(self, total: SiteTotal, mine: pd.DataFrame, others: Iterable[Decimal]) -> _Count:
        name, period, where = total.subscription, total.period, (self._destination, self._ledger)
        ours = sums_here(*where, [name], total.component, period, (State.ACCEPTED,)).get(name, Decimal(0))
        on_their_way = [sums.get(name) for sums in under_way(*where, [name], total.component, period)]
        held = self._held[(self._held["subscription"] == name) & (self._held["component"] == total.component)]
        waiting = [
            Decimal(quantity)
            for quantity, body in zip(held["quantity"], held["body"], strict=True)
            if period.start <= self._destination.counted_at(body) < period.end
        ]
        perhaps = [*others, *waiting, *(sum_of for sum_of in on_their_way if sum_of)]
        return _compared(total, ours, list(map(Decimal, mine["quantity"])), perhaps)

    def _held_by_adoption(self, forgotten: pd.DataFrame) -> pd.DataFrame:
        """Return what an earlier adoption held, of all sources, and is not judged again now."""
        # A look on an empty ledger finds no source in it, not even this one.
        names = {self._destination.source.name, *self._ledger.sources()}
        rows = pd.concat([self._ledger.open_items(name, None) for name in sorted(names)], ignore_index=True)
        rows = rows[(rows["state"] == State.HELD) & rows["reason"].str.startswith(ADOPTED)]
        here = (rows["site"] == self._destination.site) & ~rows["identity"].isin(forgotten["identity"])
        return rows[here]


def _compared(total: SiteTotal, ours: Decimal, mine: Sequence[Decimal], perhaps: Sequence[Decimal]) -> _Count:
    """Judge a count by what is accepted here, what was forgotten, and what else it may have or not.

    If it is the sum of all, the bill is right, however it came about. If it is what is accepted, nothing else is there,
    unless something and its opposite are.
    """
    there, signs = total.quantity, {each > 0 for each in (*mine, *perhaps)}
    everything = ours
    for each in (*mine, *perhaps):
        everything = EXACT.add(everything, each)
    one_way = len(signs) == 1
    perhaps_floored = there <= 0 and (False in signs or ours < 0)
    if there == everything and not perhaps_floored and (one_way or not perhaps):
        return _Count(there=True)
    if there == ours and not perhaps_floored and one_way:
        return _Count()
    return _Count(
        why=f"it counts {plain(there)} for {total.period}, where {plain(ours)} are accepted here and "
        f"{plain(everything)} would be with all that was forgotten"
    )


def _as_billed(search: Search) -> Iterator[pd.DataFrame]:
    """Yield the totals part by part; where a person has to choose, as they were before the last move."""
    seen: set[str] = set()
    for before in search.former[:1]:
        for part in search.staging.read(before):
            frame = part.to_pandas()
            waiting = frame[search.moves.waiting(frame)]
            seen.update(waiting["identity"])
            yield waiting
    for part in search.staging.read(search.comparison.totals):
        frame = part.to_pandas()
        yield frame[~frame["identity"].isin(seen)]


class _Standing:
    """What the ledger has of each identity: what is settled, and the last revision."""

    def __init__(self, standing: pd.DataFrame) -> None:
        self._standing = standing
        self._settled: dict[str, Decimal] = defaultdict(Decimal)
        self._billed: dict[str, Decimal] = defaultdict(Decimal)
        self._last: dict[str, Mapping[str, Any]] = {}
        for row in rows_of(standing):
            self._last[row["identity"]] = row
            counted = Decimal(row["applied"] or row["quantity"])
            if row["state"] in {State.ACCEPTED, State.WRITTEN_OFF}:
                self._settled[row["identity"]] = EXACT.add(self._settled[row["identity"]], counted)
            if row["state"] == State.ACCEPTED:
                self._billed[row["identity"]] = EXACT.add(self._billed[row["identity"]], counted)

    def beside(self, parts: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        """Yield the totals part by part, and in the end a 0 for each identity that only the ledger knows by now."""
        seen: set[str] = set()
        for part in parts:
            seen.update(part["identity"])
            yield part
        yield gone_from_the_warehouse(self._standing, seen)

    def forgotten(self, totals: pd.DataFrame) -> pd.DataFrame:
        """Return the totals that do not come to what is settled here, as proposals without state and body.

        `held` are those that an earlier adoption left to a person.
        """
        rows = []
        for row in rows_of(totals):
            last = self._last.get(row["identity"])
            # As a plan does it: what was written off is neither billed nor taken back.
            least, most = sorted((self._settled[row["identity"]], self._billed[row["identity"]]))
            difference = EXACT.subtract(row["quantity"], min(max(row["quantity"], least), most))
            if difference == 0 or (last and last["state"] in {State.IN_DOUBT, State.REFUSED}):
                continue  # A person has it already, or asking will settle it.
            revision = last["revision"] + 1 if last else 0
            superseded = last["token"] if last and last["state"] in {State.RESERVED, State.HELD} else ""
            held = bool(last and last["state"] == State.HELD and last["reason"].startswith(ADOPTED))
            changes = {"quantity": plain(difference), "revision": revision, "supersedes": superseded, "held": held}
            rows.append({**row, **changes, "token": uniqueness_token(row["identity"], revision)})
        columns = [*ATTRIBUTES, "open_from", "quantity", "revision", "supersedes", "token", "held"]
        frame = pd.DataFrame(rows, columns=columns)
        times = ("period_start", "period_end", "open_from")
        dated = {name: pd.to_datetime(frame[name], utc=True) for name in times}
        return frame.assign(held=frame["held"].astype(bool), **dated)
