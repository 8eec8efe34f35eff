"""The invariants of raw events: each row is an event of its own, billed once or listed by name.

What `invariants` does for usage totals is done here event by event, by what the requests and the site's records say,
and by the rows as the warehouse has them. The ledger and the archive are believed in one thing only: which events a
delivery is the name of.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from sqlalchemy import select

from usage_billing.ledger import Ledger
from usage_billing.ledger.tables import delivery
from usage_billing.records import State
from usage_billing.sandbox import DirectSandbox
from usage_billing.sources import BillingSource
from usage_billing.testing.answers import Answers
from usage_billing.testing.invariants import (
    OPEN,
    Fails,
    Line,
    Watch,
    billed_by_owner,
    open_from,
    tokens_of,
)
from usage_billing.testing.network import Flight
from usage_billing.testing.scenes import Scene
from usage_billing.testing.warehouse import Row

_ZERO = Decimal(0)
_AIR = (State.SENDING, State.IN_DOUBT)
_ADDS_UP = ("sum", "count")

RowsOf = Callable[[str, int], Sequence[Row]]
"""The rows of a source's extraction, as the warehouse had them then."""


@dataclass(frozen=True)
class Event:
    """One event, as a row of the warehouse makes it or as a request says it."""

    token: str
    account: str
    time: datetime
    quantity: str
    region: str

    def __str__(self) -> str:
        return f"{self.token[:8]} {self.quantity} of {self.account} at {self.time:%m-%dT%H:%M:%S}"


@dataclass(frozen=True)
class Chunk:
    """One delivery of raw events as the ledger names it: a chunk, or a list of those that a person decides about."""

    token: str
    name: str
    kind: str
    source: str
    state: State
    extraction: int
    sends: int
    sent_at: datetime | None
    reason: str
    events: tuple[Event, ...]

    def __str__(self) -> str:
        return f"{self.kind} {self.token[:8]} {self.state} of {len(self.events)} events of {self.name}"

    @cached_property
    def tokens(self) -> frozenset[str]:
        """The tokens of its events."""
        return frozenset(event.token for event in self.events)


class Words:
    """How one source's events are told: by its rows, and in the JSON that travels."""

    def __init__(self, scene: Scene, source: BillingSource) -> None:
        destination: Any = source.destination
        self._destination = destination
        self._function = source.settings.meter.function
        self._by_region = bool(source.settings.dimensions)
        self._start = f"{scene.site}\x1f{source.name}\x1f{destination.stream}\x1f"

    def of_sound(self, rows: Iterable[Row]) -> list[Event]:
        """Return the events that rows have to make; those that are not sound make none."""
        return [self._of_row(row) for row in rows if row.sound]

    def _of_row(self, row: Row) -> Event:
        token = sha256(f"{self._start}{row.event_id}".encode()).hexdigest()
        quantity = self._number("1" if self._function == "count" else row.quantity)
        return Event(token, str(row.account), row.time, quantity, row.region if self._by_region else "")

    def of_body(self, body: Mapping[str, Any]) -> Event:
        """Return what a body says."""
        meta, by = body["chargify"], self._destination.subscription_by
        account = meta[by] if by in meta else body[by]
        # Every dimension of a simulated row has the same value.
        named = {"chargify", self._destination.property, by}
        region = next((str(value) for name, value in body.items() if name not in named), "")
        time = datetime.fromisoformat(meta["timestamp"])
        quantity = self._number(body[self._destination.property])
        return Event(meta["uniqueness_token"], str(account), time, quantity, region)

    def _number(self, quantity: object) -> str:
        """Return a quantity in its one form: 1.50 is 1.5."""
        return str(quantity) if self._function == "unique" else f"{Decimal(str(quantity)).normalize():f}"


class Shelf:
    """The ledger's deliveries with the events that their archived chunks hold, each file read once."""

    def __init__(self, scene: Scene, ledger: Ledger, archive: Path) -> None:
        self.words = {source.name: Words(scene, source) for source in scene.sources}
        self._ledger = ledger
        self._archive = archive
        self._read: dict[str, tuple[Event, ...]] = {}

    def chunks(self) -> list[Chunk]:
        """Return all deliveries, by identity and revision."""
        statement = select(delivery).order_by(delivery.c.identity, delivery.c.revision)
        with self._ledger._engine.connect().execution_options(reading=True) as connection:  # noqa: SLF001
            return [self._chunk(row) for row in connection.execute(statement).mappings()]

    def _chunk(self, row: Mapping[Any, Any]) -> Chunk:
        address = json.loads(row["address"])
        return Chunk(
            token=row["token"],
            name=f"{row['source']} {row['period_start']:%m-%dT%H:%M} r{row['revision']}",
            kind=address["kind"],
            source=row["source"],
            state=State(row["state"]),
            extraction=row["extraction"],
            sends=row["sends"],
            sent_at=row["sent_at"],
            reason=row["reason"],
            events=self._events(row["source"], address["archive"]),
        )

    def _events(self, source: str, path: str) -> tuple[Event, ...]:
        if path not in self._read:
            bodies = pq.read_table(self._archive / path, columns=["body"]).column("body").to_pylist()
            said = [json.loads(body, parse_float=Decimal) for body in bodies]
            self._read[path] = tuple(self.words[source].of_body(body) for body in said)
        return self._read[path]


class EventsWatch(Watch):
    """I2: nothing is sent that is there or on its way under another name, or that its plan's rows do not say."""

    def __init__(
        self,
        scene: Scene,
        ledger: Ledger,
        sandbox: DirectSandbox,
        shelf: Shelf,
        rows: RowsOf,
        answers: Answers,
        fails: Fails,
    ) -> None:
        super().__init__(scene, ledger, sandbox, answers, fails)
        self._shelf = shelf
        self._rows = rows

    def request(self, flight: Flight, air: Sequence[Flight]) -> None:
        """Look at one request before it leaves, while others are in the air."""
        known = [chunk for chunk in self._shelf.chunks() if chunk.kind == "chunk"]
        tokens = tokens_of(flight)
        mine = [
            chunk for chunk in known if chunk.tokens == frozenset(tokens) and chunk.state in (*_AIR, State.ACCEPTED)
        ]
        said = json.loads(flight.body, parse_float=Decimal)
        mine = [
            chunk
            for chunk in mine
            if set(chunk.events) == {self._shelf.words[chunk.source].of_body(one) for one in said}
        ]
        if not mine:
            self._fails("I2 written down first", f"{flight.process} sends {len(tokens)} events that no chunk holds")
            return
        one = mine[-1]
        there = {str(record["uniqueness_token"]) for record in self._sandbox.records(self._scene.site)}
        there |= {token for other in air for token in tokens_of(other)}
        others = [chunk for chunk in known if chunk.token != one.token and chunk.state in (*_AIR, State.ACCEPTED)]
        rows = self._rows(one.source, one.extraction)
        owed = {event.token: event for event in self._shelf.words[one.source].of_sound(rows)}
        for event in one.events:
            self._look(flight, one, event, there, others)
            if event.token not in owed:
                self._fails("I2 quarantine withholds", f"{flight.process} sends {event}, which no sound row makes")
            elif owed[event.token] != event:
                told = f"{flight.process} sends {event}, and its row makes {owed[event.token]}"
                self._fails("I2 no more than owed", told)

    def _look(self, flight: Flight, one: Chunk, event: Event, there: set[str], others: Sequence[Chunk]) -> None:
        for other in others:
            if event.token in other.tokens:
                self._fails("I2 sent once", f"{flight.process} sends {event} in {one}; it went in {other}")
        if event.token in there and one.state is State.SENDING and one.sends == 1:
            self._fails("I2 sent once", f"{flight.process} sends {event} for the first time, and it is there")


def judge_events(
    scene: Scene,
    shelf: Shelf,
    sandbox: DirectSandbox,
    rows: Mapping[str, Iterable[Row]],
    others: Mapping[str, Decimal],
    now: datetime,
    fails: Fails,
) -> list[Line]:
    """Look at a quiet system, in which `rows` are all that the warehouse has by source; return the closing table."""
    wanted = {event.token: event for source, some in rows.items() for event in shelf.words[source].of_sound(some)}
    end = _End(scene, wanted, shelf.chunks(), sandbox)
    _nothing_under_way(scene, end, now, fails)
    _each_event(end, fails)
    _records_map(end, fails)
    return _sums(scene, end, sandbox, others, fails)


class _End:
    """What became of every event, by its token."""

    def __init__(
        self, scene: Scene, wanted: Mapping[str, Event], known: Sequence[Chunk], sandbox: DirectSandbox
    ) -> None:
        self.wanted = wanted
        self.known = known
        self.accepted = [chunk for chunk in known if chunk.kind == "chunk" and chunk.state is State.ACCEPTED]
        self.waiting = [chunk for chunk in known if chunk.kind == "chunk" and chunk.state in OPEN]
        self.doubts = [chunk for chunk in self.waiting if chunk.state in _AIR]
        self.delivered = _by_token(self.accepted)
        self.in_doubt = _by_token(self.doubts)
        self.listed = {
            kind: _by_token(chunk for chunk in known if chunk.kind == kind and chunk.state in OPEN)
            for kind in ("changed", "vanished")
        }
        words = {source.name: Words(scene, source) for source in scene.sources}
        (any_words, *_) = words.values()  # All sources of a scene feed one stream, in the same words.
        self.records = [
            any_words.of_body(record["body"]) for record in sandbox.records(scene.site) if record["uniqueness_token"]
        ]


def _by_token(chunks: Iterable[Chunk]) -> dict[str, Event]:
    return {event.token: event for chunk in chunks for event in chunk.events}


def _nothing_under_way(scene: Scene, end: _End, now: datetime, fails: Fails) -> None:
    """I5: nothing is left on its way, and a doubt that stays may not be replayed any more."""
    for one in end.known:
        if one.state in (State.SENDING, State.RESERVED):
            fails("I5 nothing under way", str(one))
        if one.state is State.IN_DOUBT and not _may_stay(scene, one, now):
            fails("I5 doubts end", f"{one}, sent {one.sends} times, last at {one.sent_at}: {one.reason}")


def _may_stay(scene: Scene, one: Chunk, now: datetime) -> bool:
    opened = open_from(scene, now)
    closed = any(event.time < opened for event in one.events)
    return one.sent_at is not None and (closed or now - one.sent_at > timedelta(days=30))


def _each_event(end: _End, fails: Fails) -> None:
    """I1 and I8 event by event: delivered, or waiting, and under one name; or listed as changed or vanished."""
    places = Counter(event.token for chunk in (*end.accepted, *end.waiting) for event in chunk.events)
    for token, count in places.items():
        if count > 1:
            names = "; ".join(str(chunk) for chunk in (*end.accepted, *end.waiting) if token in chunk.tokens)
            fails("I6 one chunk each", f"{token[:8]} is in {count} of them: {names}")
    for event in end.wanted.values():
        if event.token not in places:
            fails("I1 each event", f"{event} is neither billed nor listed")
    for token, event in _by_token(chunk for chunk in end.waiting if chunk not in end.doubts).items():
        if end.wanted.get(token) != event:
            fails("I1 waiting events", f"{event} waits; the warehouse says {end.wanted.get(token)}")
    _lists_hold(end, fails)


def _lists_hold(end: _End, fails: Fails) -> None:
    """I1: what was delivered and is otherwise now, or gone, is listed as that, and nothing else is."""
    changed = {token for token, sent in end.delivered.items() if end.wanted.get(token, sent) != sent}
    vanished = end.delivered.keys() - end.wanted.keys()
    for kind, right in (("changed", changed), ("vanished", vanished)):
        # An event in doubt that has changed since may be listed before the doubt has ended.
        listed = end.listed[kind].keys() - end.in_doubt.keys()
        for token in sorted(right ^ listed):
            told = "is not listed" if token in right else "is listed"
            fails(f"I1 {kind} events", f"{end.delivered.get(token, token[:8])} {told}; now: {end.wanted.get(token)}")


def _records_map(end: _End, fails: Fails) -> None:
    """I6: each event at the site is in one accepted chunk as it is, or in doubt; each accepted one is there, once."""
    for token, count in Counter(event.token for event in end.records).items():
        if count > 1:
            fails("I6 one record each", f"the site holds {token[:8]} {count} times")
    known = end.delivered | end.in_doubt
    for event in end.records:
        if known.get(event.token) != event:
            fails("I6 records are accepted", f"the site holds {event}; the ledger {known.get(event.token)}")
    for token in end.delivered.keys() - {event.token for event in end.records}:
        fails("I6 accepted is there", f"{end.delivered[token]} is not at the site")


def _sums(scene: Scene, end: _End, sandbox: DirectSandbox, others: Mapping[str, Decimal], fails: Fails) -> list[Line]:
    """I1 and I7 per subscription: what the site billed and what is listed make what is owed.

    Where the metric adds nothing up, events are counted, by the records that the site has.
    """
    destination: Any = scene.sources[0].destination
    adds_up = destination.metric in _ADDS_UP
    billed = billed_by_owner(scene, sandbox) if adds_up else _counted(end.records)
    lines = []
    for account in scene.billed_accounts:

        def worth(events: Iterable[Event], account: str = account) -> Decimal:
            mine = [event for event in events if event.account == account]
            summed = destination.metric == "sum"
            return sum((Decimal(event.quantity) for event in mine), _ZERO) if summed else Decimal(len(mine))

        waiting = [event for chunk in end.waiting if chunk not in end.doubts for event in chunk.events]
        sent = end.delivered | end.in_doubt
        # What was sent otherwise than it is now, or is gone, is listed with the difference; beyond a doubt nothing is
        # listed yet, so what is in doubt counts as sent here.
        now = [event for token, event in end.wanted.items() if token in sent and sent[token] != event]
        then = [event for token, event in sent.items() if end.wanted.get(token) != event]
        listed = worth(waiting) + worth(now) - worth(then)
        doubts = tuple(value for chunk in end.doubts if (value := worth(chunk.events)))
        of_others = others.get(account, _ZERO) if adds_up else _ZERO
        line = Line(account, worth(end.wanted.values()), billed.get(account, _ZERO), of_others, listed, doubts)
        lines.append(line)
        if not line.adds_up:
            fails("I1 billed and listed make what is owed", str(line))
    return lines


def _counted(records: Iterable[Event]) -> dict[str, Decimal]:
    return {account: Decimal(count) for account, count in Counter(event.account for event in records).items()}
