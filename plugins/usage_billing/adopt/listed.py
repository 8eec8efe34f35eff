"""Adopt where the site lists its records: each is matched with the names that the usage totals can have."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pandas as pd

from usage_billing.adopt.search import (
    ATTRIBUTES,
    REVISIONS_AHEAD,
    Adoption,
    Search,
    gone_from_the_warehouse,
    places,
    plain,
    rows_of,
)
from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Refused
from usage_billing.ledger import Ledger
from usage_billing.records import NOBODY_CAN_TELL, Delivery, Period, Receipt, SiteRecord, State
from usage_billing.uniqueness import uniqueness_token

_DAY = timedelta(days=1)
"""Clocks and zones are apart by less."""
_OPEN = (State.RESERVED, State.IN_DOUBT, State.HELD)


def by_records(search: Search) -> Adoption:
    """Enter what the site lists."""
    comparison, destination, ledger = search.comparison, search.destination, search.ledger
    name, reach = destination.source.name, _reach(search)
    standing = ledger.standing(name, reach)
    work = _Matching(reach, destination, ledger, standing)
    work.look_at(search.moves.placements)
    for totals in (comparison.totals, *search.former):
        for part in search.staging.read(totals):
            work.match(part.drop_columns(["events"]).to_pandas())
    work.match(gone_from_the_warehouse(standing, work.seen))
    work.hold_back()
    found = work.found()
    if not search.dry_run and (work.answers or work.different or not found.empty):
        search.overtake()
        ledger.adopt(name, destination.site, comparison.reading, found, work.answers, search.reason)
    proven = sum(isinstance(answer, Receipt) for answer in work.answers.values())
    astray = (f"account {account}: {why}" for account, why in search.told.items())
    return Adoption(
        entered=len(found),
        settled=proven,
        known=work.known,
        doubted=int((found["doubt"] != "").sum()) + len(work.answers) - proven,
        unmatched=(*sorted(work.unmatched()), *astray),
        different=tuple(sorted(work.different)),
        twins=tuple(sorted(work.twins)),
        moved=search.moved,
    )


def _reach(search: Search) -> Period:
    """Return the span in which records are looked for: what was compared, and whatever is open here.

    What the ledger still has to send, or waits for a person to let go, may have gone since the copy was made.
    """
    source = search.destination.source
    left = search.ledger.open_items(source.name, source.span)
    return Period.around([search.comparison.window, *map(Period, left["period_start"], left["period_end"])])


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
            **{name: self.row[name] for name in ATTRIBUTES},
            "token": self.token,
            "revision": self.revision,
            "quantity": plain(self.quantity),
            "body": "{}",  # What was sent is not known here, and nothing is sent with it.
            "record_id": receipt.record_id,
            "applied": "" if receipt.applied is None else plain(receipt.applied),
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
        self._stops: dict[str, int] = {}
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
        for row in rows_of(totals):
            self._match_one(row)

    def unmatched(self) -> Iterator[str]:
        """Yield what the site holds under our kind of token and nothing here stands for."""
        return (held.named() for held in self._unknown.values())

    def found(self) -> pd.DataFrame:
        """Return what is to be entered, in the columns of the ledger."""
        entries = sorted(self._entries, key=lambda entry: (entry.row["identity"], entry.revision))
        columns = [*ATTRIBUTES, *"token revision quantity body record_id applied doubt open_until".split()]
        frame = pd.DataFrame([entry.kept() for entry in entries], columns=columns)
        times = ("period_start", "period_end", "open_until")
        return frame.assign(**{name: pd.to_datetime(frame[name], utc=True) for name in times})

    def hold_back(self) -> None:
        """Enter nothing of a key after what is in doubt or differs: that is its last one until it has been settled.

        Whoever decides about it needs its row, and what came after it says how it was settled then.
        """
        kept = []
        for entry in self._entries:
            identity, doubtful = entry.row["identity"], isinstance(entry.answer, InDoubt)
            if entry.revision > self._stops.get(identity, entry.revision):
                words = "comes after what is in doubt or differs, and waits for that: decide it, and adopt again"
                self.different.append(f"token {entry.token}, {plain(entry.quantity)}: {words}")
            elif doubtful and entry.revision < self._last.get(identity, -1):
                self.different.append(str(entry.answer).removeprefix(NOBODY_CAN_TELL))
            else:
                kept.append(entry)
        self._entries = kept

    def _stop_at(self, identity: str, revision: int) -> None:
        self._stops[identity] = min(revision, self._stops.get(identity, revision))

    def look_at(self, rows: pd.DataFrame) -> None:
        """Read the site's records of each place that was not read yet, and part those that the ledger knows."""
        fresh = rows[~pd.MultiIndex.from_frame(rows[["subscription", "address"]]).isin(self._places_seen)]
        listed: dict[str, _Held] = {}
        for place in places(fresh, self._reach).to_dict("records"):
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
        for row in rows_of(known):
            held = self._take(row["token"])
            if row["source"] != self._destination.source.name or row["state"] == State.ACCEPTED:
                self.known += 1
                continue
            answer = None
            if row["state"] in _OPEN:
                answer = self._proof(held, Decimal(row["quantity"]))
            else:
                self.different.append(f"{held.named()}: {row['state']} here")
            if not isinstance(answer, Receipt):
                self._stop_at(row["identity"], row["revision"])
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
        answer = None
        if quantity == 0 or len(plain(quantity).partition(".")[2]) > decimals:
            self.different.append(f"{held.named()}: no quantity of {decimals} decimal places")
        else:
            answer = self._proof(held, quantity)
        if not isinstance(answer, Receipt):
            self._stop_at(row["identity"], revision)
        if answer is not None:
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
