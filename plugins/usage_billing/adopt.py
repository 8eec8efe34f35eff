"""Adopt: enter what a billing site holds under our tokens into a ledger that does not know it.

For a cut-over to a new ledger, and after a restore. A token is a function of the identity and the revision, so whoever
knows the usage totals of a span knows every name under which they may have been billed: these names are looked for
among the site's records. What matches is entered as the site holds it; what matches nothing is listed by name and
nothing is guessed. The command is rare, so it holds the site's records of the span in memory.
"""

import getpass
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from croniter import croniter

from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused
from usage_billing.ledger import ADOPTED, Ledger
from usage_billing.moves import Moves
from usage_billing.periods import local_midnight
from usage_billing.records import (
    NOBODY_CAN_TELL,
    Comparison,
    Delivery,
    Period,
    Receipt,
    SiteRecord,
    SiteTotal,
    Staged,
    State,
)
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging
from usage_billing.sums import sums_here, under_way
from usage_billing.uniqueness import uniqueness_token

REVISIONS_AHEAD = 1024
"""How many revisions are looked for beyond the last one found. One that was superseded or refused never came to the
site, and each run that finds a held difference changed makes another, as each question does that nobody answers: six
weeks of hourly runs leave no wider gap."""

_ATTRIBUTES = "identity account subscription component price_point dimensions period_start period_end address".split()
_EXACT = Context(prec=100)
"""Room for every digit: the ambient context would round after 28 of them."""
_DAY = timedelta(days=1)
"""Clocks and zones are apart by less."""
_OPEN = (State.RESERVED, State.IN_DOUBT, State.HELD)


@dataclass(frozen=True)
class Adoption:
    """What came of an adoption, or would come of it.

    `entered` were unknown here, `settled` were open here and are there, `known` are settled on both sides. `held` are
    totals of which nobody can tell whether the site has them, `replayable` those that an ordinary run sends without
    harm, until `replay_until` even where the site has them. `doubted` of all are deductions that the site has taken and
    does not show how much of them counted: a person ends these doubts. `unmatched` (of the site's records) and
    `different` are told by name, and so are `twins`, records that bear the token of another one: the tie-out goes on
    naming them unless a person has decided. `moved` are the accounts of which a person has to say where their usage
    belongs.
    """

    entered: int = 0
    settled: int = 0
    known: int = 0
    doubted: int = 0
    held: int = 0
    replayable: int = 0
    replay_until: datetime | None = None
    unmatched: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True if each record that carries our token is in the ledger now, with the quantity that the site holds."""
        return not self.unmatched and not self.different


def span_of(source: BillingSource, first: date, after: date, now: datetime) -> Period:
    """Return the time from day `first` until day `after`, which is not part of it, in the billing zone; none to come.

    Raises:
        Misconfigured: there is none.
    """
    zone = source.settings.timezone
    start, end = local_midnight(first, zone), min(local_midnight(after, zone), now)
    if start >= end:
        raise Misconfigured(f"no usage period of {source.name!r} ends between {first} and {after}: {_DAY_AFTER}")
    return Period(start, end)


_DAY_AFTER = "--to is the day after the last one"


def periods_of(source: BillingSource, span: Period) -> tuple[Period, ...]:
    """Return the closed usage periods of a source that end in a span.

    Raises:
        Misconfigured: there is none.
    """
    spans = [span]
    if source.settings.period == "interval":
        spans = [Period(*edges) for edges in pairwise(_ticks(source, span))]
    found = tuple(period for part in spans for period in source.periods(part))
    if not found:
        raise Misconfigured(
            f"no usage period of {source.name!r} on or after {source.settings.bill_from} ends in {span}: {_DAY_AFTER}"
        )
    return found


def _ticks(source: BillingSource, span: Period) -> Iterator[datetime]:
    ticks = croniter(source.settings.schedule, span.start.astimezone(source.settings.timezone) - timedelta(seconds=1))
    while (tick := ticks.get_next(datetime).astimezone(UTC)) <= span.end:
        yield tick


def reason_of(now: datetime) -> str:
    """Return what the ledger keeps as the reason of an adopted delivery: when, and who did it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # A container may run under a number that has no name.
        user = f"user {os.getuid()}"
    return f"{ADOPTED}{now:%Y-%m-%d} by {user}"


def adopt(
    comparison: Comparison,
    former: Sequence[Staged],
    destination: Destination,
    ledger: Ledger,
    staging: Staging,
    reason: str,
    *,
    dry_run: bool = False,
) -> Adoption:
    """Enter what the site holds of the compared totals into the ledger; again, and nothing is left to enter.

    The caller holds the source's extraction lease, and `comparison.reading` is the newest one. Where an account led
    elsewhere before, as far as the ledger knows, its usage is looked for there as well: `former` are the totals by
    which it may have been billed (`aggregate.at_former_places`). Where the site cannot list its records, its count of
    each subscription's open billing period tells whether it has all of what is not known here, which is entered then,
    or nothing, which is left to the ordinary run; where it tells neither, and of what it does not speak, the totals are
    entered as held. Adopt again, and they are judged again. Raw events, which it ignores one by one, are all left to
    the ordinary run.

    Raises:
        Misconfigured: the source sends raw events, and the span begins before what the site ignores by itself.
        NotApplied: deliveries of the source are on their way, or moved meanwhile, or the site could not be asked.
    """
    name = destination.source.name
    if not dry_run:
        ledger.doubt_abandoned(name)
    if ledger.in_the_air(name):
        raise NotApplied(f"deliveries of {name!r} are being sent: adopt again when the deliver task has ended")
    moves, astray = Moves.staged(name, comparison.moves, staging), _astray(comparison, destination, ledger, staging)
    if destination.records(_places(moves.placements.iloc[:0], comparison.window)) is None:
        parts = _as_billed(comparison.totals, former[:1], moves, staging)
        standing = ledger.standing(name, comparison.periods)
        return _by_total(comparison, parts, moves, astray, destination, ledger, standing, reason, dry_run=dry_run)
    reach = _reach(comparison, destination.source, ledger)
    standing = ledger.standing(name, reach)
    work = _Matching(reach, destination, ledger, standing)
    work.look_at(moves.placements)
    for totals in (comparison.totals, *former):
        for part in staging.read(totals):
            work.match(part.drop_columns(["events"]).to_pandas())
    work.match(_forgotten_by_the_warehouse(standing, work.seen))
    found = work.found()
    if not dry_run and (work.answers or not found.empty):
        _overtake(comparison, ledger, destination.source)
        ledger.adopt(name, destination.site, comparison.reading, found, work.answers, reason)
    proven = sum(isinstance(answer, Receipt) for answer in work.answers.values())
    return Adoption(
        entered=len(found),
        settled=proven,
        known=work.known,
        doubted=int((found["doubt"] != "").sum()) + len(work.answers) - proven,
        unmatched=(*sorted(work.unmatched()), *(f"account {one}: {why}; {_BACK}" for one, why in astray.items())),
        different=tuple(sorted(work.different)),
        twins=tuple(sorted(work.twins)),
        moved=_accounts(moves.undecided),
    )


_BACK = "let it lead there, adopt, and let it go then; or, if nothing of the span was billed there, go on without it"


def _astray(comparison: Comparison, destination: Destination, ledger: Ledger, staging: Staging) -> Mapping[str, str]:
    """Return the accounts of which nobody knows where they led when usage of the span was billed, and why.

    They were never seen under this edition of the source. Under one before it they led to another subscription, and
    when they left it the ledger does not know.
    """
    source = destination.source
    parts: list[pd.DataFrame] = [
        part.select(["account", "subscription"]).to_pandas() for part in staging.read(comparison.targets)
    ]
    today = pd.concat(parts, ignore_index=True)
    before = ledger.led_before(source.name, source.edition, destination.site, today["account"].tolist())
    both = today.merge(before, on="account", suffixes=("", "_was"))
    left = both[both["subscription"] != both["subscription_was"]].sort_values("account")
    return {
        row[
            "account"
        ]: f"the account led to subscription {row['subscription_was']} by the definition before, and leads "
        f"to {row['subscription']} by now"
        for row in _records(left)
    }


def _reach(comparison: Comparison, source: BillingSource, ledger: Ledger) -> Period:
    """Return the span in which records are looked for: what was compared, and whatever is open here.

    What the ledger still has to send, or waits for a person to let go, may have gone since the copy was made.
    """
    left = ledger.open_items(source.name, source.span)
    return Period.around([comparison.window, *map(Period, left["period_start"], left["period_end"])])


def _overtake(comparison: Comparison, ledger: Ledger, source: BillingSource) -> None:
    """Let plans of before send nothing more: their totals are older than what is entered now."""
    ledger.begin_comparison(source.name, comparison.reading, comparison.periods, source.edition)


# --- where the site lists its records -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A record of ours as the site holds it, and whose it is."""

    record: SiteRecord
    subscription: str
    address: Mapping[str, Any]

    def named(self) -> str:
        record = self.record
        shown = f" ({record.note})" if record.note else ""
        return f"record {record.record_id} of {self.subscription}: {record.quantity}{shown}, token {record.token}"


@dataclass
class _Entry:
    """A delivery that the site holds: what the ledger keeps of it; a doubt where nothing shows how much of it counted.

    `row` has the columns of totals.
    """

    row: Mapping[str, Any]
    revision: int
    token: str
    quantity: Decimal
    answer: Receipt | InDoubt
    open_until: datetime | None = None

    def kept(self) -> dict[str, Any]:
        """Return the columns in which the ledger keeps it, but for the body, and ``doubt``, empty for what counted."""
        answer = self.answer
        receipt, doubt = (answer, "") if isinstance(answer, Receipt) else (Receipt(self.token, ""), str(answer))
        return {
            **{name: self.row[name] for name in (*_ATTRIBUTES, "open_from")},
            "token": self.token,
            "revision": self.revision,
            "quantity": _plain(self.quantity),
            "record_id": receipt.record_id,
            "applied": "" if receipt.applied is None else _plain(receipt.applied),
            "doubt": doubt,
            "open_until": self.open_until,
        }


class _Matching:
    """The site's records that this ledger does not know, matched with the names that usage totals can have."""

    def __init__(self, reach: Period, destination: Destination, ledger: Ledger, standing: pd.DataFrame) -> None:
        self.answers: dict[str, Receipt | InDoubt] = {}
        self.different: list[str] = []
        self.twins: list[str] = []
        self.known = 0
        self.seen: set[str] = set()
        self._reach = reach
        self._destination = destination
        self._ledger = ledger
        self._places_seen: set[tuple[str, str]] = set()
        self._last = standing.groupby("identity")["revision"].max().to_dict()
        self._unknown: dict[str, _Held] = {}
        self._entries: list[_Entry] = []
        # What came late is dated after its usage period, at the latest now.
        self._until = max(reach.end, ledger.now()) + _DAY
        records = destination.elsewhere(Period(reach.start, self._until))
        self._elsewhere = {record.token: _Held(record, "", {}) for record in records if record.token}
        self.look_at(standing)
        self._settle_known(ledger.known(list(self._elsewhere)))

    def match(self, totals: pd.DataFrame) -> None:
        """Look for every name of these totals (columns of `aggregate.aggregate`)."""
        self.look_at(totals)
        self.seen.update(totals["identity"])
        for row in _records(totals):
            self._match_one(row)

    def unmatched(self) -> Iterator[str]:
        """Yield what the site holds under our kind of token and nothing here stands for."""
        return (held.named() for held in self._unknown.values())

    def found(self) -> pd.DataFrame:
        """Return what is to be entered, in the columns of the ledger."""
        entries = sorted(self._entries, key=lambda entry: (entry.row["identity"], entry.revision))
        columns = [*_ATTRIBUTES, *"open_from token revision quantity record_id applied doubt open_until".split()]
        frame = pd.DataFrame([entry.kept() for entry in entries], columns=columns)
        times = ("period_start", "period_end", "open_from", "open_until")
        frame = frame.assign(**{name: pd.to_datetime(frame[name], utc=True) for name in times})
        # What was sent is not known here. A doubt may be sent again, if a person says that the site has none of it.
        doubts = frame[frame["doubt"] != ""]
        bodies = self._destination.encode(doubts).reindex(frame.index) if len(doubts) else "{}"
        return frame.assign(body=bodies).fillna({"body": "{}"}).drop(columns="open_from")

    def look_at(self, rows: pd.DataFrame) -> None:
        """Read the site's records of each place that was not read yet, and part those that the ledger knows."""
        fresh = rows[~pd.MultiIndex.from_frame(rows[["subscription", "address"]]).isin(self._places_seen)]
        listed: dict[str, _Held] = {}
        for place in _places(fresh, self._reach).to_dict("records"):
            key = (place["subscription"], place["address"])
            self._places_seen.add(key)
            for record in self._destination.records(pd.DataFrame([place])) or ():
                if not record.token:
                    continue
                held = _Held(record, place["subscription"], Delivery.address_from(place["address"]))
                before = listed.get(record.token) or self._unknown.get(record.token)
                if before is None:
                    listed[record.token] = held
                elif before.record.record_id != record.record_id:
                    self.twins.append(f"{held.named()}: there a second time")
        self._unknown.update(listed)
        self._elsewhere = {token: held for token, held in self._elsewhere.items() if token not in listed}
        self._settle_known(self._ledger.known(list(listed)))

    def _settle_known(self, known: pd.DataFrame) -> None:
        for row in _records(known):
            held = self._take(row["token"])
            if row["source"] != self._destination.source.name or row["state"] == State.ACCEPTED:
                self.known += 1
            elif row["state"] not in _OPEN:
                self.different.append(f"{held.named()}: {row['state']} here")
            else:
                answer = self._proof(held, Decimal(row["quantity"]))
                # The site goes on being asked about what is in doubt already.
                if isinstance(answer, Receipt) or (answer and row["state"] != State.IN_DOUBT):
                    self.answers[row["token"]] = answer

    def _take(self, token: str) -> _Held:
        return self._unknown.pop(token) if token in self._unknown else self._elsewhere.pop(token)

    def _match_one(self, row: Mapping[str, Any]) -> None:
        """Take the site's records of one identity."""
        revision, until = 0, self._last.get(row["identity"], -1) + REVISIONS_AHEAD
        while (self._unknown or self._elsewhere) and revision <= until:
            token = uniqueness_token(row["identity"], revision)
            if token in self._unknown or token in self._elsewhere:
                until = max(until, revision + REVISIONS_AHEAD)
                self._enter(row, revision, self._take(token))
            revision += 1

    def _enter(self, row: Mapping[str, Any], revision: int, held: _Held) -> None:
        quantity, decimals = held.record.quantity, self._destination.source.settings.meter.decimals
        if quantity == 0 or len(_plain(quantity).partition(".")[2]) > decimals:
            self.different.append(f"{held.named()}: no quantity of {decimals} decimal places")
        elif (answer := self._proof(held, quantity)) is not None:
            # Where it lies, not where today's would go: there it is looked for when the span is tied out.
            address = {**Delivery.address_from(row["address"]), **held.record.address}
            row = {**row, "address": json.dumps(address, sort_keys=True)}
            # The end of the billing period into which it came is not known; where to look for it later is.
            until = self._until if held.record.address else None
            self._entries.append(_Entry(row, revision, held.record.token, quantity, answer, until))

    def _proof(self, held: _Held, quantity: Decimal) -> Receipt | InDoubt | None:
        """Return the receipt of a record that the site lists, None if it is another quantity.

        A deduction may have met a floor: how much of it counted the destination has to find out. What it cannot find
        out is a doubt that a person ends.
        """
        record = held.record
        if quantity > 0 and record.quantity == quantity:
            return Receipt(record.token, record.record_id)
        if quantity > 0:
            self.different.append(f"{held.named()}: {quantity} here")
            return None
        asked = Delivery(record.token, "", 0, quantity, held.address, "{}")
        answer = self._destination.settle([asked], self._ledger.now()).get(record.token)
        if isinstance(answer, Refused):
            self.different.append(f"{held.named()}: {answer}")
            return None
        if isinstance(answer, Receipt):
            return answer
        why = answer or "how much of it counted, the site does not show"
        return InDoubt(f"{NOBODY_CAN_TELL}{held.named()}: {why}")


def _places(rows: pd.DataFrame, window: Period) -> pd.DataFrame:
    """Return one line for each place that was billed, in the form of which `Destination.records` wants deliveries.

    Without a record's id and over the whole window, so that the site tells all it has.
    """
    places = rows[["subscription", "component", "address"]].drop_duplicates(["subscription", "address"])
    return places.assign(
        token="", record_id="", period_start=pd.Timestamp(window.start), period_end=pd.Timestamp(window.end)
    )


def _forgotten_by_the_warehouse(standing: pd.DataFrame, seen: set[str]) -> pd.DataFrame:
    """Return the identities that only the ledger knows by now, as totals of nothing."""
    gone = standing[~standing["identity"].isin(seen)].drop_duplicates("identity", keep="last")
    return gone[_ATTRIBUTES].assign(quantity=0, open_from=None)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a frame's rows as plain mappings."""
    return frame.to_dict("records")  # type: ignore[return-value]


def _plain(quantity: Decimal) -> str:
    """Return a quantity as the ledger writes it: no exponent, no trailing zeros."""
    text = f"{quantity:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


# --- where it only counts -------------------------------------------------------------------------------------------


def _by_total(
    comparison: Comparison,
    parts: Iterator[pd.DataFrame],
    moves: Moves,
    astray: Mapping[str, str],
    destination: Destination,
    ledger: Ledger,
    standing: pd.DataFrame,
    reason: str,
    *,
    dry_run: bool,
) -> Adoption:
    """Enter, leave to the ordinary run or hold what was forgotten, by what the site counts of each subscription."""
    name = destination.source.name
    here = _Standing(standing)
    forgotten = pd.concat([here.forgotten(totals) for totals in here.beside(parts)])
    forgotten = forgotten.sort_values("identity", ignore_index=True)
    led = pd.Series([astray.get(account, "") for account in forgotten["account"]], forgotten.index, dtype=object)
    forgotten = forgotten.assign(elsewhere=led.mask(moves.waiting(forgotten), _MOVED))
    # No run of today sends anything to these, so none of them would be replayed.
    resting = {target.account: target.unknown for target in destination.resolve(_accounts(forgotten)) if target.unknown}
    if destination.stream:
        return _by_token(comparison, forgotten, resting, moves, destination, ledger, dry_run=dry_run)
    nowhere = pd.Series(pd.NaT, index=forgotten.index, dtype="datetime64[ns, UTC]")
    forgotten = destination.look_up(forgotten.assign(open_until=nowhere)).drop(columns="open_until")
    forgotten = forgotten.assign(late=~(forgotten["period_end"] > forgotten["open_from"]))
    recent = forgotten["period_end"] > ledger.now() - destination.replay_window
    counts = _Counting(destination, ledger, forgotten).judged()
    why = pd.Series(
        [
            _why_held(row, counts.get(row["subscription"]), resting, is_recent=is_recent)
            for row, is_recent in zip(_records(forgotten), recent, strict=True)
        ],
        index=forgotten.index,
        dtype=object,
    )
    judged = (forgotten["elsewhere"] == "") & ~forgotten["late"]
    there = judged & forgotten["subscription"].isin({name for name, count in counts.items() if count.there})
    again = ~there & (why == "")
    fresh = ~there & ~again & ~forgotten["held"]
    if not dry_run and not forgotten.empty:
        _overtake(comparison, ledger, destination.source)
        found = _as_entries(forgotten[there], destination)
        ledger.adopt(name, destination.site, comparison.reading, found, {}, f"{reason}: {_BY_TOTAL}")
        because = f"{reason}: the site lists no events, and " + why + ", so a person has to compare"
        proposals = forgotten.assign(
            state=np.where(again, State.SUPERSEDED, State.HELD), reason=because, body=destination.encode(forgotten)
        )[fresh | (again & forgotten["held"])].reset_index(drop=True)
        if ledger.reserve(name, destination.site, comparison.reading, proposals).moved:
            raise NotApplied(f"deliveries of {name!r} moved meanwhile; adopt again")
    ends = forgotten["period_end"][again]
    return Adoption(
        entered=int(there.sum()),
        held=int(fresh.sum()),
        replayable=len(ends),
        replay_until=None if ends.empty else ends.min().to_pydatetime() + destination.replay_window,
        moved=_accounts(moves.undecided),
    )


_MOVED = "the account leads elsewhere by now"
_BY_TOTAL = "by total: with it, the site counts just what this ledger knows of that billing period"
"""What the reason of a delivery says that no record of the site was found for."""


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


def _by_token(
    comparison: Comparison,
    forgotten: pd.DataFrame,
    resting: Mapping[str, str],
    moves: Moves,
    destination: Destination,
    ledger: Ledger,
    *,
    dry_run: bool,
) -> Adoption:
    """Leave raw events to the ordinary run: each has a token of its own, which the stream ignores whatever else is."""
    name, window = destination.source.name, destination.replay_window
    if not (forgotten["period_end"] > ledger.now() - window).all():
        raise Misconfigured(
            f"billing source {name!r} sends raw events, and of usage periods that ended more than {window.days} days "
            "ago nobody can tell which of them the site has: restore a newer backup of the ledger, or adopt later days"
        )
    elsewhere = forgotten["elsewhere"] != ""
    ends = forgotten["period_end"][~forgotten["account"].isin(resting) & ~elsewhere]
    silent = {**resting, **{row["account"]: row["elsewhere"] for row in _records(forgotten[elsewhere])}}
    if not dry_run and not forgotten.empty:
        _overtake(comparison, ledger, destination.source)
    return Adoption(
        replayable=len(ends),
        replay_until=None if ends.empty else ends.min().to_pydatetime() + window,
        unmatched=tuple(f"account {account}: {why}, so nothing of it is replayed" for account, why in silent.items()),
        moved=_accounts(moves.undecided),
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
        everything = _EXACT.add(everything, each)
    one_way = len(signs) == 1
    perhaps_floored = there <= 0 and (False in signs or ours < 0)
    if there == everything and not perhaps_floored and (one_way or not perhaps):
        return _Count(there=True)
    if there == ours and not perhaps_floored and one_way:
        return _Count()
    return _Count(
        why=f"it counts {_plain(there)} for {total.period}, where {_plain(ours)} are accepted here and "
        f"{_plain(everything)} would be with all that was forgotten"
    )


def _as_billed(totals: Staged, former: Sequence[Staged], moves: Moves, staging: Staging) -> Iterator[pd.DataFrame]:
    """Yield the totals part by part; where a person has to choose, as they were before the move."""
    seen: set[str] = set()
    for before in former:
        for part in staging.read(before):
            frame = part.to_pandas()
            waiting = frame[moves.waiting(frame)]
            seen.update(waiting["identity"])
            yield waiting
    for part in staging.read(totals):
        frame = part.to_pandas()
        yield frame[~frame["identity"].isin(seen)]


def _accounts(rows: pd.DataFrame) -> tuple[str, ...]:
    return tuple(sorted(rows["account"].unique()))


class _Standing:
    """What the ledger has of each identity: what is settled, and the last revision."""

    def __init__(self, standing: pd.DataFrame) -> None:
        self._standing = standing
        self._settled: dict[str, Decimal] = defaultdict(Decimal)
        self._billed: dict[str, Decimal] = defaultdict(Decimal)
        self._last: dict[str, Mapping[str, Any]] = {}
        for row in _records(standing):
            self._last[row["identity"]] = row
            counted = Decimal(row["applied"] or row["quantity"])
            if row["state"] in {State.ACCEPTED, State.WRITTEN_OFF}:
                self._settled[row["identity"]] = _EXACT.add(self._settled[row["identity"]], counted)
            if row["state"] == State.ACCEPTED:
                self._billed[row["identity"]] = _EXACT.add(self._billed[row["identity"]], counted)

    def beside(self, parts: Iterable[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        """Yield the totals part by part, and in the end a 0 for each identity that only the ledger knows by now."""
        seen: set[str] = set()
        for part in parts:
            seen.update(part["identity"])
            yield part
        yield _forgotten_by_the_warehouse(self._standing, seen)

    def forgotten(self, totals: pd.DataFrame) -> pd.DataFrame:
        """Return the totals that do not come to what is settled here, as proposals without state and body.

        `held` are those that an earlier adoption left to a person.
        """
        rows = []
        for row in _records(totals):
            last = self._last.get(row["identity"])
            # As a plan does it: what was written off is neither billed nor taken back.
            least, most = sorted((self._settled[row["identity"]], self._billed[row["identity"]]))
            difference = _EXACT.subtract(row["quantity"], min(max(row["quantity"], least), most))
            if difference == 0 or (last and last["state"] in {State.IN_DOUBT, State.REFUSED}):
                continue  # A person has it already, or asking will settle it.
            revision = last["revision"] + 1 if last else 0
            superseded = last["token"] if last and last["state"] in {State.RESERVED, State.HELD} else ""
            held = bool(last and last["state"] == State.HELD and last["reason"].startswith(ADOPTED))
            changes = {"quantity": _plain(difference), "revision": revision, "supersedes": superseded, "held": held}
            rows.append({**row, **changes, "token": uniqueness_token(row["identity"], revision)})
        columns = [*_ATTRIBUTES, "open_from", "quantity", "revision", "supersedes", "token", "held"]
        frame = pd.DataFrame(rows, columns=columns)
        times = ("period_start", "period_end", "open_from")
        dated = {name: pd.to_datetime(frame[name], utc=True) for name in times}
        return frame.assign(held=frame["held"].astype(bool), **dated)
