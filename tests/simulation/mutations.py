"""Deliberate faults of the engine, each of which the simulator must notice: who cannot fail proves nothing.

A mutation is a context manager that replaces a part of the package in this process, and puts it back.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from itertools import count
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
from sqlalchemy import select, update

from usage_billing import approve, arrivals, chunks, deliver, moves, plan, quantities, settle
from usage_billing import ledger as ledgers
from usage_billing.destinations import maxio
from usage_billing.destinations.chargeover import ChargeOverUsage
from usage_billing.destinations.maxio import events
from usage_billing.errors import InDoubt
from usage_billing.ledger import Ledger, queries
from usage_billing.ledger.tables import approval, delivery
from usage_billing.periods import Calendar
from usage_billing.quarantine import Withheld
from usage_billing.records import EVER, Approval, Decision, Period, Reading, Receipt, State
from usage_billing.sources import BillingSource, DestinationSettings
from usage_billing.testing.scenes import BY_ARRIVAL, RAW

Mutation = Callable[[], AbstractContextManager[object]]

_send_claimed = deliver._Work._send_claimed


def accepted_before_the_send() -> AbstractContextManager[object]:
    """The receipt is written before the request leaves."""

    def mutant(self: Any, ours: Any) -> None:
        self._accept(ours, [Receipt(one.token) for one in ours])
        _send_claimed(self, ours)

    return patch.object(deliver._Work, "_send_claimed", mutant)


def doubts_settled_at_once() -> AbstractContextManager[object]:
    """A doubt is asked about while its request may still land."""

    def mutant(self: Any, doubts: Any) -> int:
        before = self.settled.ended
        for chunk in settle._chunks(doubts, self._destination.chunk_size):
            self._ask(chunk)
        return self.settled.ended - before

    return patch.object(settle.Doubts, "ask", mutant)


def token_of_the_attempt() -> AbstractContextManager[object]:
    """Each try sends under a token of its own."""

    def mutant(self: Any, ours: Any) -> None:
        _send_claimed(self, [replace(one, body=one.body.replace(one.token, _tried(one))) for one in ours])

    def _tried(one: Any) -> str:
        return sha256(f"{one.token}{one.sends}".encode()).hexdigest()

    return patch.object(deliver._Work, "_send_claimed", mutant)


@contextmanager
def lease_forgotten() -> Iterator[None]:
    """A worker that lost its lease writes outcomes all the same."""

    def accept(self: Ledger, receipts: Any, _held: Any) -> int:
        return sum(_move(self, one.token, state=State.ACCEPTED, record_id=one.record_id) for one in receipts)

    def land(self: Ledger, tokens: Any, state: State, reason: str, _held: Any) -> int:
        return sum(_move(self, token, state=state, reason=reason) for token in tokens)

    def _move(self: Ledger, token: str, **values: object) -> int:
        with self._writing() as connection:
            moves = update(delivery).where(delivery.c.token == token, delivery.c.state == State.SENDING)
            return connection.execute(moves.values(values)).rowcount

    with patch.object(Ledger, "accept", accept), patch.object(Ledger, "land", land):
        yield


@contextmanager
def events_sent_again_after_a_month() -> Iterator[None]:
    """A doubt about events is replayed when the stream has forgotten their tokens."""

    def today(_self: object, deliveries: Any) -> Any:
        return events._Today(leave_by={one.token: datetime.max.replace(tzinfo=UTC) for one in deliveries})

    with (
        patch.object(maxio.MaxioEvents, "replay_window", timedelta(days=4000)),
        patch.object(maxio.MaxioEvents, "_today", today),
    ):
        yield


def conflict_taken_for_success() -> AbstractContextManager[object]:
    """A 409 to the 60-minute token is believed to say that the usage is there."""
    send = maxio.MaxioMetered.send

    def mutant(self: Any, chunk: Any) -> list[Receipt]:
        try:
            return send(self, chunk)
        except InDoubt as error:
            if "HTTP 409" in str(error):
                return [Receipt(chunk[0].token)]
            raise

    return patch.object(maxio.MaxioMetered, "send", mutant)


def doubt_taken_for_nothing() -> AbstractContextManager[object]:
    """What is in doubt is sent again at once."""
    land = Ledger.land

    def mutant(self: Ledger, tokens: Any, state: State, reason: str, held: Any) -> int:
        return land(self, tokens, State.RESERVED if state is State.IN_DOUBT else state, reason, held)

    return patch.object(Ledger, "land", mutant)


def abandoned_taken_for_nothing() -> AbstractContextManager[object]:
    """What a dead worker left in the air is sent again at once."""

    def mutant(self: Ledger, name: str) -> int:
        sending = update(delivery).where(delivery.c.source == name, delivery.c.state == State.SENDING)
        with self._writing() as connection:
            alive = queries.fence_alive(delivery.c.fence, self._now(connection))
            return connection.execute(sending.where(~alive).values(state=State.RESERVED)).rowcount

    return patch.object(Ledger, "doubt_abandoned", mutant)


def plan_blind_for_doubts() -> AbstractContextManager[object]:
    """A plan takes a delivery in doubt for one that never was."""
    standing = Ledger.standing

    def mutant(self: Ledger, *args: Any) -> pd.DataFrame:
        found = standing(self, *args)
        return found.assign(state=found["state"].replace(State.IN_DOUBT, State.SUPERSEDED))

    return patch.object(Ledger, "standing", mutant)


def vanished_keys_forgotten() -> AbstractContextManager[object]:
    """The comparison is a loop over today's totals."""
    compare = plan._compare

    def mutant(*args: Any) -> pd.DataFrame:
        both = compare(*args)
        return both[both["events"] > 0].reset_index(drop=True)

    return patch.object(plan, "_compare", mutant)


def quarantine_withdraws() -> AbstractContextManager[object]:
    """What is in quarantine is withdrawn."""
    return patch.object(Withheld, "covers", lambda _self, rows: np.zeros(len(rows), dtype=bool))


def quarantine_is_not_listed() -> AbstractContextManager[object]:
    """Nobody writes down which rows are in quarantine by now: the list of before stands."""
    return patch.object(Ledger, "list_quarantine", lambda *_args: 0)


def claim_without_comparison() -> AbstractContextManager[object]:
    """A delivery is put in the air whatever its state."""

    def mutant(self: Ledger, tokens: Any, held: Any) -> frozenset[str]:
        with self._writing() as connection:
            claims = update(delivery).where(delivery.c.token.in_(tokens))
            values = {"state": State.SENDING, "fence": held.fence, "sent_at": self._now(connection)}
            connection.execute(claims.values(values | {"sends": delivery.c.sends + 1}))
        return frozenset(tokens)

    return patch.object(Ledger, "begin_sending", mutant)


def float_arithmetic() -> AbstractContextManager[object]:
    """Quantities are scaled by way of floats."""
    to_scaled = quantities.to_scaled

    def mutant(column: Any, decimals: int) -> Any:
        exact = to_scaled(column, decimals)
        if not decimals:
            return exact
        return exact.map(lambda scaled: int(float(Decimal(int(scaled)).scaleb(-decimals)) * 10**decimals)).astype(
            "int64"
        )

    return patch.object(quantities, "to_scaled", mutant)


@contextmanager
def floor_forgotten() -> Iterator[None]:
    """Deductions go whatever the balance, and what the site stored is believed to count."""

    def judge(self: Any, proposals: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        return proposals["quantity"], self.hold_reason(proposals)

    def recheck(_self: object, _deliveries: object, _now: object) -> dict[str, str]:
        return {}

    def counted(_self: object, one: Any, _usage: object) -> Decimal:
        quantity: Decimal = one.quantity
        return quantity

    metered = maxio.MaxioMetered
    with (
        patch.object(metered, "judge", judge),
        patch.object(metered, "recheck", recheck),
        patch.object(metered, "lock", lambda _self, _one: ""),
        patch.object(metered, "_counted", counted),
    ):
        yield


@contextmanager
def stale_plans_send() -> Iterator[None]:
    """A plan of an older extraction sends, although a newer one was compared."""
    claims = (
        update(delivery)
        .where(
            delivery.c.token.in_(queries.bindparam("tokens", expanding=True)),
            delivery.c.state == State.RESERVED,
            queries.fence_alive(queries._FENCE, queries._NOW),
        )
        .values(state=State.SENDING, fence=queries._FENCE, sent_at=queries._NOW, sends=delivery.c.sends + 1)
        .returning(delivery.c.token)
    )
    with (
        patch.object(ledgers, "stale_periods", lambda *_args: frozenset()),
        patch.object(queries, "BEGIN_SENDING", claims),
    ):
        yield


def token_of_the_chunk() -> AbstractContextManager[object]:
    """A token hangs on the place of its delivery in the plan."""
    places = count()

    def mutant(identity: str, revision: int) -> str:
        return sha256(f"{identity}\x1f{revision}\x1f{next(places)}".encode()).hexdigest()

    return patch.object(plan, "uniqueness_token", mutant)


def external_key_not_looked_up() -> AbstractContextManager[object]:
    """A ChargeOver record that may be there is taken for absent."""
    return patch.object(ChargeOverUsage, "_found", lambda _self, _one: None)


def sent_events_not_looked_up() -> AbstractContextManager[object]:
    """What lies in delivered chunks is not looked up: every event of a run is cut into chunks again."""
    return patch.object(chunks._Book, "sent", lambda _self: iter(()))


def late_events_forgotten() -> AbstractContextManager[object]:
    """A usage period of which something was delivered takes no event that comes later."""
    cut = chunks._Writer._chunks

    def mutant(self: Any, place: int, period: Any) -> Any:
        delivered = any(row.stands == chunks._DELIVERED for row in self.book.rows if row.period == period)
        for one in cut(self, place, period):
            if not delivered:
                yield one

    return patch.object(chunks._Writer, "_chunks", mutant)


def gone_events_not_listed() -> AbstractContextManager[object]:
    """Events that vanished or changed after they were sent stand on no list."""
    return patch.object(chunks._Writer, "_lists", lambda *_args: iter(()))


def event_token_of_the_run() -> AbstractContextManager[object]:
    """The token of an event hangs on how often it was planned."""
    tokens, runs = chunks.event_tokens, count()

    def mutant(site: str, source: str, stream: str, ids: Any) -> list[str]:
        return tokens(site, source, f"{stream}{next(runs)}", ids)

    return patch.object(chunks, "event_tokens", mutant)


def watermark_without_overlap() -> AbstractContextManager[object]:
    """Arrivals are looked for right after the watermark: what committed out of order is passed over."""
    after = arrivals.after

    def mutant(source: Any, mark: str) -> Any:
        none = 0 if isinstance(source.settings.arrival_overlap, int) else timedelta(0)
        settings = source.settings.model_copy(update={"arrival_overlap": none})
        return after(replace(source, settings=settings), mark)

    return patch.object(arrivals, "after", mutant)


def watermark_ahead_of_the_clock() -> AbstractContextManager[object]:
    """The watermark goes wherever an arrival says, also by a clock that is wrong."""
    find = arrivals.find

    def mutant(batches: Any, source: Any, mark: str, _now: datetime) -> Any:
        return find(batches, source, mark, datetime.max.replace(tzinfo=UTC))

    return patch.object(arrivals, "find", mutant)


@contextmanager
def watermark_before_the_list() -> Iterator[None]:
    """The watermark moves in one transaction, and what it has passed is listed in the next."""
    begin, record = Ledger.begin_extraction, Ledger.record_read
    later: dict[int, tuple[str, Any]] = {}

    def begins(self: Ledger, held: Any, name: str, interval: Any, window: Any, arrived: Any = None) -> int:
        number = begin(self, held, name, interval, window, arrived and replace(arrived, periods=()))
        later[number] = name, arrived
        return number

    def records(self: Ledger, number: int, rows: int) -> None:
        name, arrived = later[number]
        if arrived is not None:
            with self._writing() as connection:
                self._take_up(connection, name, number, arrived)
        record(self, number, rows)

    with patch.object(Ledger, "begin_extraction", begins), patch.object(Ledger, "record_read", records):
        yield


def taken_off_when_read() -> AbstractContextManager[object]:
    """A period leaves the list when it was read, before anything of it is planned."""
    read = arrivals.read

    def mutant(source: Any, interval: Any, own: Any, warehouse: Any, ledger: Any, *rest: Any) -> Any:
        taken = read(source, interval, own, warehouse, ledger, *rest)
        ledger.take_off(source.name, Reading(taken.number), taken.periods)
        return taken

    return patch.object(arrivals, "read", mutant)


def taken_off_whatever_is_left() -> AbstractContextManager[object]:
    """A run takes what it compared off the list, whether or not it is settled."""

    def mutant(source: Any, reading: Any, periods: Any, _tally: Any, ledger: Any) -> None:
        ledger.take_off(source.name, reading, periods)

    return patch.object(arrivals, "done", mutant)


def bill_before_its_credit() -> AbstractContextManager[object]:
    """What a move adds goes at once, whatever is still to be taken away where it was billed."""

    def mutant(_self: object, rows: pd.DataFrame, _uncredited: object) -> pd.Series:
        return moves._nothing(rows)

    return patch.object(moves.Moves, "why_following", mutant)


def undecided_move_sent() -> AbstractContextManager[object]:
    """Nobody is asked about a move: one side is credited and the other one billed as soon as it is seen."""

    def mutant(_self: object, rows: pd.DataFrame, _later: object) -> pd.Series:
        return moves._nothing(rows)

    return patch.object(moves.Moves, "why_held", mutant)


def delivered_unasked() -> AbstractContextManager[object]:
    """A deliver goes whatever was said to its plan, also where that was rejected."""
    return patch.object(approve.Approved, "check", lambda _self: None)


def any_yes_counts() -> AbstractContextManager[object]:
    """A yes to an older plan counts for every later one."""

    def mutant(self: Ledger, name: str, *_which: object) -> Approval | None:
        said = select(approval).where(approval.c.source == name, approval.c.decision == Decision.APPROVED)
        with self._reading() as connection:
            row = connection.execute(said.limit(1)).first()
        if row is None:
            return None
        reading = Reading(row.extraction, row.validation)
        return Approval(name, reading, row.digest, Decision(row.decision), row.decided_by, row.note, row.decided_at)

    return patch.object(Ledger, "decision", mutant)


def planned_again_unasked() -> AbstractContextManager[object]:
    """What becomes possible in the middle of a delivery goes as well, though nobody was shown it."""
    return patch.object(approve.Approved, "within", lambda _self, again: again)


def turned_down_unlisted() -> AbstractContextManager[object]:
    """What a person turned down is listed nowhere."""
    return patch.object(approve, "_all_held", lambda frame, _reason: frame.iloc[:0])


def before_billed_as_today() -> AbstractContextManager[object]:
    """Usage of before a change of the definition goes where the definition of today says."""

    def mutant(self: DestinationSettings, _edition: object, _connection: str) -> dict[str, Any]:
        return self.model_dump(mode="json")

    return patch.object(DestinationSettings, "as_of", mutant)


def lookback_across_the_change() -> AbstractContextManager[object]:
    """A run looks back over the day on which the definition changed, by the periods of today."""

    def mutant(self: BillingSource) -> Calendar:
        return Calendar(self.settings.period, self.settings.timezone, Period(EVER.start, self.span.end))

    return patch.object(BillingSource, "calendar", property(mutant))


METERED, EVENTS, CHARGEOVER = "maxio_metered", "maxio_events", "chargeover_usage"
ARRIVING = tuple(kind + BY_ARRIVAL for kind in (METERED, EVENTS, RAW, CHARGEOVER))
EVERY = (METERED, EVENTS, RAW, CHARGEOVER, *ARRIVING)
MOVING = tuple(kind + how for kind in (METERED, EVENTS, CHARGEOVER) for how in ("", BY_ARRIVAL))

MUTATIONS: dict[Mutation, tuple[str, ...]] = {
    accepted_before_the_send: (METERED, EVENTS, RAW, CHARGEOVER),
    doubts_settled_at_once: (METERED, CHARGEOVER),
    token_of_the_attempt: (METERED, EVENTS, CHARGEOVER),
    lease_forgotten: (METERED, EVENTS, CHARGEOVER),
    events_sent_again_after_a_month: (EVENTS, RAW),
    conflict_taken_for_success: (METERED,),
    doubt_taken_for_nothing: (METERED, CHARGEOVER),
    abandoned_taken_for_nothing: (METERED, CHARGEOVER),
    plan_blind_for_doubts: (METERED, EVENTS, CHARGEOVER),
    vanished_keys_forgotten: (METERED, EVENTS, CHARGEOVER),
    quarantine_withdraws: (METERED, EVENTS),
    quarantine_is_not_listed: EVERY,
    claim_without_comparison: (METERED, EVENTS, CHARGEOVER),
    float_arithmetic: (METERED, EVENTS, CHARGEOVER),
    floor_forgotten: (METERED,),
    stale_plans_send: (METERED, EVENTS, CHARGEOVER),
    token_of_the_chunk: (METERED, EVENTS, CHARGEOVER),
    external_key_not_looked_up: (CHARGEOVER,),
    sent_events_not_looked_up: (RAW,),
    late_events_forgotten: (RAW,),
    gone_events_not_listed: (RAW,),
    event_token_of_the_run: (RAW,),
    watermark_without_overlap: ARRIVING,
    watermark_ahead_of_the_clock: ARRIVING,
    watermark_before_the_list: ARRIVING,
    taken_off_when_read: ARRIVING,
    taken_off_whatever_is_left: ARRIVING,
    bill_before_its_credit: MOVING,
    undecided_move_sent: MOVING,
    delivered_unasked: EVERY,
    any_yes_counts: EVERY,
    planned_again_unasked: EVERY,
    turned_down_unlisted: EVERY,
    before_billed_as_today: (METERED, EVENTS, CHARGEOVER),
    lookback_across_the_change: (METERED, EVENTS, CHARGEOVER),
}
"""Each mutation, with the kinds of histories that can show it."""
