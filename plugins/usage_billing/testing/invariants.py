"""The invariants of a history, judged by what the site billed and holds, against an oracle of what is owed.

While it goes on, `Watch` looks at every request that writes. When all is quiet, `judge` looks at the whole. The ledger
is believed in one thing only: which delivery, of which usage total, a token is the name of.
"""

import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from itertools import combinations, product
from typing import Any

from sqlalchemy import Connection, and_, select

from usage_billing.ledger import Ledger, queries
from usage_billing.ledger.tables import compared_period, delivery
from usage_billing.records import MOVED, PERSON_DECIDES, Reading, State
from usage_billing.sandbox import DirectSandbox
from usage_billing.testing.answers import Answers
from usage_billing.testing.clockwork import Process
from usage_billing.testing.moving import Whereabouts
from usage_billing.testing.network import Flight
from usage_billing.testing.oracle import Key
from usage_billing.testing.scenes import OTHER_POINT, Scene

_TOKEN = re.compile(rb"[0-9a-f]{64}")
_ZERO = Decimal(0)
OPEN = (State.HELD, State.REFUSED, State.IN_DOUBT, State.RESERVED, State.SENDING)

Fails = Callable[[str, str], None]
Extracted = Callable[[str, Reading], tuple[Mapping[Key, Decimal], Callable[[Key], bool]]]
"""What the oracle says that a source's reading makes owed, and of which keys one of its unsound rows may be."""
Moved = Callable[[str, Reading], Whereabouts]
"""By what a source's reading is counted."""


@dataclass(frozen=True)
class Delivered:
    """One delivery as the ledger names it."""

    token: str
    identity: str
    key: Key
    revision: int
    state: State
    quantity: Decimal
    counted: Decimal
    reading: Reading
    sends: int
    sent_at: datetime | None
    reason: str

    def __str__(self) -> str:
        return f"{self.token[:8]} r{self.revision} {self.quantity:f} {self.state} of {key_text(self.key)}"


def key_text(key: Key) -> str:
    """Return a key as a story tells it."""
    region = f" {key.region}" if key.region else ""
    return f"{key.source} {key.owner}{region} {key.start:%m-%dT%H:%M}"


def deliveries(scene: Scene, ledger: Ledger, tokens: Iterable[str] | None = None) -> list[Delivered]:
    """Return all deliveries of a ledger, or those of the identities that some tokens belong to, by revision."""
    statement = select(delivery).order_by(delivery.c.identity, delivery.c.revision)
    if tokens is not None:
        some = select(delivery.c.identity).where(delivery.c.token.in_(list(tokens)))
        statement = statement.where(delivery.c.identity.in_(some))
    with ledger._engine.connect().execution_options(reading=True) as connection:  # noqa: SLF001 - read, and only read.
        return [_delivered(scene, row) for row in connection.execute(statement).mappings()]


def _delivered(scene: Scene, row: Mapping[Any, Any]) -> Delivered:
    # Every dimension of a simulated row has the same value.
    region = next(iter(json.loads(row["dimensions"] or "{}").values()), "")
    key = Key(row["source"], scene.owner(row["subscription"]), row["period_start"], region)
    quantity = Decimal(row["quantity"])
    return Delivered(
        token=row["token"],
        identity=row["identity"],
        key=key,
        revision=row["revision"],
        state=State(row["state"]),
        quantity=quantity,
        counted=Decimal(row["applied"]) if row["applied"] else quantity,
        reading=Reading(row["extraction"], row["validation"]),
        sends=row["sends"],
        sent_at=row["sent_at"],
        reason=row["reason"],
    )


def records(sandbox: DirectSandbox, site: str) -> list[tuple[str, Decimal]]:
    """Return what the site holds, as token (empty where it is not ours) and quantity."""
    found = []
    for record in sandbox.records(site):
        name = record.get("external_key") or record.get("uniqueness_token") or str(record.get("memo") or "")
        first = str(name).partition(" ")[0]
        token = first if _TOKEN.fullmatch(first.encode()) else ""
        found.append((token, Decimal(str(record.get("quantity", record.get("value")) or 0))))
    return found


class Watch(ABC):
    """What is looked at while a history goes on: each request that writes, and each claim."""

    def __init__(self, scene: Scene, ledger: Ledger, sandbox: DirectSandbox, answers: Answers, fails: Fails) -> None:
        self._scene = scene
        self._ledger = ledger
        self._sandbox = sandbox
        self._answers = answers
        self._fails = fails

    @abstractmethod
    def request(self, flight: Flight, air: Sequence[Flight]) -> None:
        """Look at one request before it leaves, while others are in the air."""

    def claim(self, process: Process, tokens: frozenset[str]) -> None:
        """Look at a claim: the newest extraction that was compared for a usage period has the say about it.

        Of a source that asks, nothing is claimed for the first time that nobody wanted to go.
        """
        outdated = (
            select(delivery.c.token)
            .join(
                compared_period,
                and_(
                    compared_period.c.source == delivery.c.source,
                    compared_period.c.period_start == delivery.c.period_start,
                    queries.read_as(compared_period) > queries.read_as(delivery),
                ),
            )
            .where(delivery.c.token.in_(sorted(tokens)))
        )
        with self._ledger._engine.connect().execution_options(reading=True) as connection:  # noqa: SLF001
            for token in connection.execute(outdated).scalars():
                self._fails("newest extraction wins", f"{process.name} claims {token[:8]} of an older extraction")
            if self._scene.asks:
                self._look_for_a_yes(process, connection, tokens)

    def _look_for_a_yes(self, process: Process, connection: Connection, tokens: frozenset[str]) -> None:
        columns = delivery.c.token, delivery.c.identity, delivery.c.quantity
        first = select(*columns).where(delivery.c.token.in_(sorted(tokens)), delivery.c.sends == 1)
        for token, identity, quantity in connection.execute(first):
            if not self._answers.cover(token, identity, Decimal(quantity)):
                self._fails("I2 approved", f"{process.name} claims {token[:8]} of {quantity}, to which nobody said yes")


class TotalsWatch(Watch):
    """I2: no request takes what was accepted and what is in the air above what its plan owed.

    Where accounts move: nothing goes that a person has to choose about, and no bill before its credit.
    """

    def __init__(
        self,
        scene: Scene,
        ledger: Ledger,
        sandbox: DirectSandbox,
        extracted: Extracted,
        moved: Moved,
        answers: Answers,
        fails: Fails,
    ) -> None:
        super().__init__(scene, ledger, sandbox, answers, fails)
        self._extracted = extracted
        self._moved = moved
        self._replays = scene.kind == "maxio_events"

    def request(self, flight: Flight, air: Sequence[Flight]) -> None:
        """Look at one request before it leaves, while others are in the air."""
        tokens = tokens_of(flight)
        held = {token for token, _ in records(self._sandbox, self._scene.site)}
        there = held | {token for other in air for token in tokens_of(other)}
        known = deliveries(self._scene, self._ledger, tokens)
        names = {one.token for one in known}
        for token in tokens:
            if token not in names:
                self._fails("I2 written down first", f"{flight.process} sends {token[:8]}, which the ledger has not")
        for one in known:
            # What the stream holds it ignores, whoever sends it again, and whatever was planned since.
            if one.token in tokens and not (self._replays and one.token in held):
                self._look(flight, one, [other for other in known if other.key == one.key], there)

    def _look(self, flight: Flight, one: Delivered, same: Sequence[Delivered], there: set[str]) -> None:
        if one.token in there and not self._replays:
            self._fails("I2 sent once", f"{flight.process} sends {one}, which is at the site or on its way there")
        others = [other for other in same if other.token != one.token and other.token in there]
        before = sum((other.counted if other.state is State.ACCEPTED else other.quantity for other in others), _ZERO)
        all_owed, may_be_unsound = self._extracted(one.key.source, one.reading)
        owed = all_owed.get(one.key, _ZERO)
        after = before + one.quantity
        if (one.quantity > 0 and after > owed) or (one.quantity < 0 and after < owed):
            told = f"{flight.process} sends {one}; with {before:f} that is there or on its way, {owed:f} is owed"
            self._fails("I2 no more than owed", told)
        if one.quantity < 0 and may_be_unsound(one.key):
            self._fails("I2 quarantine withholds", f"{flight.process} sends {one}, with rows of it in quarantine")
        if self._scene.moves:
            self._look_at_moves(flight, one, all_owed, there)

    def _look_at_moves(self, flight: Flight, one: Delivered, owed: Mapping[Key, Decimal], there: set[str]) -> None:
        source, owner, start = one.key.source, one.key.owner, one.key.start
        whereabouts = self._moved(source, one.reading)
        if whereabouts.waits(source, owner, start):
            self._fails("I2 undecided moves wait", f"{flight.process} sends {one}, about which nobody has chosen")
        former = {replace(one.key, owner=name) for name in whereabouts.former(source, owner, start)}
        if one.quantity < 0 or not former:
            return
        known = deliveries(self._scene, self._ledger)
        for key in sorted(former):
            # What is on its way there may arrive; only a credit that has arrived is one.
            some = [other for other in known if other.key == key and other.token in there]
            some = [other for other in some if other.state is State.ACCEPTED or other.quantity > 0]
            billed = sum((other.counted for other in some), _ZERO)
            if billed > owed.get(key, _ZERO):
                told = f"{flight.process} sends {one}; {key_text(key)} has {billed:f}, owed {owed.get(key, _ZERO):f}"
                self._fails("I2 the credit goes first", told)


def tokens_of(flight: Flight) -> list[str]:
    """Return the tokens in a request, each once."""
    return [token.decode() for token in dict.fromkeys(_TOKEN.findall(flight.body))]


@dataclass(frozen=True)
class Line:
    """The end of a history for one subscription and component: what is owed, billed and listed."""

    owner: str
    owed: Decimal
    billed: Decimal
    others: Decimal
    listed: Decimal
    in_doubt: tuple[Decimal, ...]

    @property
    def adds_up(self) -> bool:
        """Say whether billed and listed make what is owed, with each doubt there or not."""
        some = (some for count in range(len(self.in_doubt) + 1) for some in combinations(self.in_doubt, count))
        return self.owed - (self.billed - self.others) - self.listed in {sum(open_ones, _ZERO) for open_ones in some}

    def __str__(self) -> str:
        doubts = f", in doubt {' '.join(f'{one:f}' for one in self.in_doubt)}" if self.in_doubt else ""
        others = f" (+ {self.others:f} of others)" if self.others else ""
        ours = self.billed - self.others
        return f"{self.owner:12} owed {self.owed:f}, billed {ours:f}{others}, listed {self.listed:f}{doubts}"


def judge(
    scene: Scene,
    ledger: Ledger,
    sandbox: DirectSandbox,
    owed: Mapping[Key, Decimal],
    whereabouts: Whereabouts,
    others: Mapping[str, Decimal],
    now: datetime,
    fails: Fails,
) -> list[Line]:
    """Look at a quiet system; return the closing table."""
    known = deliveries(scene, ledger)
    _nothing_under_way(scene, known, sandbox, now, fails)
    _keys_add_up(known, owed, fails)
    _moves_are_listed(known, whereabouts, fails)
    _records_map(scene, known, sandbox, fails)
    _prices_hold(scene, known, sandbox, fails)
    return _sums(scene, known, sandbox, owed, others, fails)


def _nothing_under_way(
    scene: Scene, known: Sequence[Delivered], sandbox: DirectSandbox, now: datetime, fails: Fails
) -> None:
    """I5: nothing is left on its way, and a doubt that stays has a reason to."""
    there = {token for token, _ in records(sandbox, scene.site)}
    for one in known:
        if one.state in (State.SENDING, State.RESERVED):
            fails("I5 nothing under way", str(one))
        if one.state is State.IN_DOUBT and not _may_stay(scene, one, there, now):
            fails("I5 doubts end", f"{one}, sent {one.sends} times, last at {one.sent_at}: {one.reason}")


def _may_stay(scene: Scene, one: Delivered, there: AbstractSet[str], now: datetime) -> bool:
    """Say whether the rules leave this doubt open: events that nobody may replay any more.

    Also what ChargeOver refused when it went again, after a lost reply, and does not have: a duplicate is refused as
    well, in words that nobody promises, so a person has to look.
    """
    if scene.kind == "chargeover_usage":
        return one.sends > 1 and one.token not in there and one.reason.startswith(PERSON_DECIDES)
    if scene.kind != "maxio_events" or one.sent_at is None:
        return False
    # Its name leads to another subscription by now, which a replay would bill.
    elsewhere = scene.renames and "leads to subscription" in one.reason
    return elsewhere or now - one.sent_at > timedelta(days=30) or one.key.start < open_from(scene, now)


def open_from(scene: Scene, now: datetime) -> datetime:
    """Return the start of the open billing period, reckoned from the world: its periods are whole months."""
    zone, period = scene.world.zone, scene.world.billing_period
    first, end = period.start, period.end
    months = (end.year - first.year) * 12 + end.month - first.month
    opened = datetime(first.year, first.month, first.day, tzinfo=zone)
    while True:
        count = opened.year * 12 + opened.month - 1 + months
        following = opened.replace(year=count // 12, month=count % 12 + 1)
        if following > now:
            return opened
        opened = following


def _keys_add_up(known: Sequence[Delivered], owed: Mapping[Key, Decimal], fails: Fails) -> None:
    """I1 and I7 per key, by the ledger: what was accepted and what is listed make what is owed, to the last digit."""
    by_key: dict[Key, list[Delivered]] = {}
    for one in known:
        by_key.setdefault(one.key, []).append(one)
    for key in sorted(by_key.keys() | owed.keys()):
        some = by_key.get(key, [])
        settled = sum((one.counted for one in some if one.state is State.ACCEPTED), _ZERO)
        still = [one for one in some if one.state in OPEN]
        if any(one.state is State.IN_DOUBT for one in still):
            continue  # A doubt blocks its own key: what is owed beyond it is proposed once it is settled.
        listed = sum((one.quantity for one in still), _ZERO)
        if settled + listed != owed.get(key, _ZERO):
            rows = "; ".join(map(str, some)) or "nothing in the ledger"
            told = f"{key_text(key)}: owed {owed.get(key, _ZERO):f}, accepted {settled:f}, listed {listed:f}: {rows}"
            fails("I1 per key", told)


def _moves_are_listed(known: Sequence[Delivered], whereabouts: Whereabouts, fails: Fails) -> None:
    """What a person has to choose about is listed as that, on both sides."""
    for one in known:
        waits = whereabouts.waits(one.key.source, one.key.owner, one.key.start)
        if one.state is State.HELD and waits and not one.reason.startswith(MOVED):
            fails("I1 moves are listed", f"{one} is held for another reason: {one.reason}")


def _records_map(scene: Scene, known: Sequence[Delivered], sandbox: DirectSandbox, fails: Fails) -> None:
    """I6: each record with a token of ours is one accepted delivery with that quantity, and back."""
    by_token = {one.token: one for one in known}
    for one in known:
        if one.token != sha256(f"{one.identity}\x1f{one.revision}".encode()).hexdigest():
            fails("I6 a token names a revision", f"{one}: its token hangs on more than identity and revision")
    held = [(token, quantity) for token, quantity in records(sandbox, scene.site) if token]
    for token, count in Counter(token for token, _ in held).items():
        if count > 1:
            fails("I6 one record each", f"the site holds {by_token.get(token, token)} {count} times")
    for token, quantity in held:
        if token not in by_token:
            fails("I6 records are known", f"the site holds {quantity:f} under {token[:8]}, which no ledger row has")
            continue
        named = by_token[token]
        right = named.state is State.ACCEPTED and quantity in (named.quantity, named.counted)
        if named.state is not State.IN_DOUBT and not right:
            fails("I6 records are accepted", f"the site holds {quantity:f} for {named}")
    there = {token for token, _ in held}
    for one in known:
        if one.state is State.ACCEPTED and one.token not in there:
            fails("I6 accepted is there", f"{one} is not at the site")


def _prices_hold(scene: Scene, known: Sequence[Delivered], sandbox: DirectSandbox, fails: Fails) -> None:
    """I6: each usage has the price point that was defined for its own period.

    Where it names none, no document tells whether the default applies or the one that was named last.
    """
    number, name = OTHER_POINT
    locked_in = scene.switches.get("omitted_price_point") == "locked_in"
    by_token = {one.token: one for one in known}
    for record in sandbox.records(scene.site) if scene.kind == "maxio_metered" and scene.redefined else ():
        one = by_token.get(str(record["memo"]).partition(" ")[0])
        named = scene.price_point_at(one.key.start) if one else None
        if one and (named or not locked_in) and (named == name) != (record["price_point_id"] == number):
            fails("I6 prices", f"{one} is billed at price point {record['price_point_id']}")


def _sums(
    scene: Scene,
    known: Sequence[Delivered],
    sandbox: DirectSandbox,
    owed: Mapping[Key, Decimal],
    others: Mapping[str, Decimal],
    fails: Fails,
) -> list[Line]:
    """I1 and I7 per subscription, by the site: what it billed and what is listed by name make what is owed."""
    lines = []
    for component, owner in product(scene.components, scene.owners):
        billed = billed_by_owner(scene, sandbox, component)

        def is_here(key: Key, component: str = component, owner: str = owner) -> bool:
            return key.owner == owner and scene.component_at(key.start) == component

        mine = [one for one in known if is_here(one.key)]
        blocked = {one.key for one in mine if one.state is State.IN_DOUBT}
        owes = sum((quantity for key, quantity in owed.items() if is_here(key)), _ZERO)
        listed = sum((one.quantity for one in mine if one.state in OPEN and one.key not in blocked), _ZERO)
        # Beyond a doubt, nothing is listed yet: what a blocked key owes on top is told by every plan.
        for key in blocked:
            some = [one for one in mine if one.key == key and one.state in (State.ACCEPTED, State.IN_DOUBT)]
            listed += owed.get(key, _ZERO) - sum((one.counted for one in some), _ZERO)
        doubts = tuple(one.quantity for one in mine if one.state is State.IN_DOUBT)
        of_others = others.get(owner, _ZERO) if component == scene.component else _ZERO
        name = owner if len(scene.components) == 1 else f"{owner} {component}"
        line = Line(name, owes, billed.get(owner, _ZERO), of_others, listed, doubts)
        lines.append(line)
        if not line.adds_up:
            fails("I1 billed and listed make what is owed", str(line))
    return lines


def billed_by_owner(scene: Scene, sandbox: DirectSandbox, component: str = "") -> dict[str, Decimal]:
    """Return what the site billed for a component, or the first one, by its name of the subscription."""
    numbers = scene.owner_of
    found: dict[str, Decimal] = {}
    for row in sandbox.billed(scene.site):
        if row.component == (component or scene.component) and row.subscription in numbers:
            found[numbers[row.subscription]] = row.billed
    return found
