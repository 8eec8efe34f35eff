"""Usage as events of a Maxio stream: up to a thousand in a request, each with the token that settles a doubt.

Limits and the meaning of replies follow Maxio's public API reference: "Events-Based Billing".
"""

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from usage_billing.archive import Archived
from usage_billing.destinations.base import Answer, by_value, closed, joined, negative, shuffled
from usage_billing.destinations.maxio.client import Json, MaxioSite
from usage_billing.destinations.maxio.component import IdOrHandle, MaxioDestination, MaxioDestinationSettings
from usage_billing.errors import InDoubt, NotApplied, Refused
from usage_billing.records import PASSES, PASSES_SOON, Delivery, Period, Receipt, SiteTotal, State, Target
from usage_billing.sources import BillingSource, SourceSettings

log = logging.getLogger(__name__)

_CHARGIFY_FIELDS = ("subscription_id", "subscription_reference")
"""Identifiers that stand inside an event's ``chargify`` object; any other is a property of the event."""
_NEVER = datetime.max.replace(tzinfo=UTC)
_SHARE_AFTER_REFUSAL = 10
_MOST_IN_VAIN = 200
"""How many replays in a row may be refused before the stream is taken to want nothing at all."""
_TAKES = (State.RESERVED, State.SENDING, State.IN_DOUBT, State.ACCEPTED)
"""Where a deduction stands that has taken something from a billing period, or may."""
_TOO_LITTLE = "a deduction waits: the open billing period counts too little, and a sum below 0 may be lost"
_NAMED = 20
"""How many refused events of a chunk are named."""


class MaxioEventsSettings(MaxioDestinationSettings):
    """The keys of a source that is billed as events of a stream.

    `subscription_by` is the stream's Subscription Identifier: ``subscription_id``, ``subscription_reference``, or the
    name of a property whose value is the subscription's reference. `property` holds the quantity. `mode` says what an
    event is: ``totals`` for one usage total, whose correction is a signed difference, or ``events`` for one row of
    ``usage.sql``, as it is. `metric` says what the metric behind `component` computes of the events; totals need a sum.
    No API tells the metric's formula, so nobody but you can check that. `fed_by_others` says that somebody else feeds
    the component too: then it is no fault that the site counts more than was sent from here. `activation` says whether
    the preview of each subscription's renewal has to show the component before its usage is sent; ``assumed`` is for a
    site whose preview leaves out what has no usage yet. `late_usage` says what becomes of an event whose
    billing period is closed, and which would never be billed at its own time: it is held, dated in the open one, or
    refused.
    """

    free: ClassVar[frozenset[str]] = MaxioDestinationSettings.free | {"metric", "fed_by_others", "activation"}
    of_the_component: ClassVar[frozenset[str]] = frozenset({"metric", "fed_by_others", "activation", "subscription_by"})

    name: Literal["maxio_events"]
    stream: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    subscription_by: str = Field(min_length=1)
    component: IdOrHandle
    property: str = Field(min_length=1)
    mode: Literal["totals", "events"] = "totals"
    metric: Literal["sum", "count", "maximum", "minimum", "average", "unique", "percentile"] = "sum"
    fed_by_others: bool = False
    activation: Literal["checked", "assumed"] = "checked"
    late_usage: Literal["hold", "now", "refuse"] = "hold"

    @model_validator(mode="after")
    def _totals_are_sums(self) -> Self:
        if self.mode == "totals" and self.metric != "sum":
            raise ValueError(
                f"metric: is {self.metric}, and mode totals sends signed differences, which only a sum takes in; "
                "set mode: events"
            )
        return self

    def why_not(self, settings: SourceSettings) -> Iterator[str]:
        """Yield why raw events do not go with the source's keys: what was sent cannot change its usage period."""
        if self.mode == "events" and settings.dedup_window:
            yield (
                "dedup_window: with destination.mode: events no call takes back an event whose earlier row comes late; "
                "remove it, the stream itself ignores an event id that comes again within 31 days"
            )

    def naming(self) -> dict[str, Any]:
        """Return the keys that name what is billed.

        Totals were named without their mode before there was another. They go by the subscription's number, whatever
        their text calls it; of a raw event the text itself may not change.
        """
        named = super().naming()
        free = set() if self.mode == "events" else {"mode", "subscription_by"}
        return {key: value for key, value in named.items() if key not in free}


class MaxioEvents(MaxioDestination):
    """Usage as events of a stream, a thousand to a request, each with its token.

    In mode ``totals`` a delivery is an event at the start of its usage period. In mode ``events`` a delivery is a chunk
    of rows, each an event at its own time, which the archive keeps: one delivery then makes one request.
    """

    name = "maxio_events"
    settings_model = MaxioEventsSettings
    why_late = "its billing period is closed: the site would take the event and never bill it"
    kind = "event_based_component"
    chunk_size = 1000
    retry_chunk_size = 1000
    events_to_chunk = 1000
    # The documentation says 31 days; a day is left for clocks and for the time that the request took.
    replay_window = timedelta(days=30)

    def __init__(self, source: BillingSource, client: MaxioSite) -> None:
        super().__init__(source, client)
        self.fed_by_others = self.settings.fed_by_others
        # What each thread is about to send, and no more: one chunk.
        self._prepared = threading.local()
        self._no_bill_for: dict[str, str] = {}
        if self.settings.mode == "events":
            self.stream, self.metric = self.settings.stream, self.settings.metric
            self.chunk_size = self.retry_chunk_size = 1

    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Return the subscription of each account; one whose renewal would not bill the component is `unknown`.

        A stream takes events whatever the activation, and nothing tells of it but the preview of the renewal.
        """
        return [self._activated(target) for target in super().resolve(accounts)]

    def standing(self, subscription: str) -> Target:
        """Return the subscription with this number, if the component is activated for it."""
        return self._activated(super().standing(subscription))

    def _activated(self, target: Target) -> Target:
        if target.unknown or self.settings.activation == "assumed":
            return target
        number = target.subscription
        if number not in self._no_bill_for:
            self._no_bill_for[number] = self._why_unbilled(number, target.component)
        return Target(target.account, unknown=self._no_bill_for[number]) if self._no_bill_for[number] else target

    def _why_unbilled(self, number: str, component: str) -> str:
        would = "the site would take the events and perhaps never bill them"
        try:
            if component in self.client.renewal_components(int(number)):
                return ""
        except Refused as refusal:
            return f"the renewal of subscription {number} cannot be previewed, so {would}: {refusal}"
        return (
            f"component {self.settings.component} is not activated for subscription {number}: the preview of its "
            f"renewal has no line for it, and {would}"
        )

    def hold_reason(self, proposals: pd.DataFrame) -> pd.Series:
        """Hold what belongs to a billing period that has closed, or for which nobody knows today whether it has."""
        unknown = proposals["open_from"].isna().to_numpy(dtype=bool)
        why_unknown = "the site does not bill it any more, so its open billing period is not known"
        texts = np.where(unknown, why_unknown, self._why_late(proposals, closed(proposals)))
        return pd.Series(texts, index=proposals.index, dtype=object)

    def judge(self, proposals: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        """Let all go whole, but what takes away from an open billing period what may be counted in a closed one.

        That is what a usage period lost that began before it. No document says that a sum below 0 is billed, so the
        site's own count of the open period has to take it whole. Where one was taken, less is left for deductions of
        the period's own usage too: they are judged by the count.
        """
        why = self.hold_reason(proposals)
        minus = negative(proposals["quantity"]) & (why == "").to_numpy()
        late = minus & (proposals["period_start"] < proposals["open_from"]).to_numpy(dtype=bool)
        lessened = set(proposals.loc[late, "subscription"])
        own = proposals.loc[minus & ~late].drop_duplicates("subscription")
        for number, start in zip(own["subscription"], own["open_from"], strict=True):
            if self._was_lessened(number, start):
                lessened.add(number)
        room: dict[str, Decimal] = {}
        kept: dict[str, Decimal] = {}
        for place in map(int, np.flatnonzero(minus & proposals["subscription"].isin(lessened).to_numpy())):
            number, less = str(proposals["subscription"].iloc[place]), -Decimal(proposals["quantity"].iloc[place])
            start = proposals["open_from"].iloc[place]
            if number not in room:
                room[number] = self._room(number, start)
            if late[place] and number not in kept:
                kept[number] = self._about_to_leave(number, start)
            left = room[number] - (kept[number] if late[place] else 0)
            if less > left:
                why.iloc[place] = f"{_TOO_LITTLE}: it counts {left}"
            else:
                room[number] -= less
        return proposals["quantity"], why

    def _room(self, number: str, moment: datetime) -> Decimal:
        """Return how much may be taken from what a subscription is billed for the billing period of that moment.

        Neither more than the site counts nor more than this ledger has accepted for it: the site's count may lag behind
        a deduction of a moment ago. What takes something back and may have landed is gone from it already.
        """
        component = str(self._component["id"])
        here = [total for total in self.totals([number]) if total.period.start <= moment < total.period.end]
        there = sum((total.quantity for total in here), Decimal(0))
        if self.book is None or not here:
            return there
        period = here[0].period
        ours = self._dated_in(number, component, period, (State.ACCEPTED,))
        leaving = self._dated_in(number, component, period, (State.SENDING, State.IN_DOUBT))
        return min(there, sum(ours, Decimal(0)) + sum((each for each in leaving if each < 0), Decimal(0)))

    def _dated_in(self, number: str, component: str, period: Period, states: Sequence[State]) -> list[Decimal]:
        """Return the quantities of deliveries in these states that count in a billing period."""
        if self.book is None:
            return []
        rows = self.book.accepted_at(self.site, [number], component, period, states)
        return [
            Decimal(quantity)
            for quantity, body in zip(rows["quantity"], rows["body"], strict=True)
            if not body or period.start <= self.counted_at(body) < period.end
        ]

    def _was_lessened(self, number: str, moment: datetime) -> bool:
        """Say whether a late deduction was taken, or is to be, from the billing period of that moment."""
        if self.book is None:
            return False
        at = Period(moment, moment + timedelta(microseconds=1))
        rows = self.book.accepted_at(self.site, [number], str(self._component["id"]), at, _TAKES)
        less = rows[(rows["body"] != "") & rows["quantity"].str.startswith("-")]
        return any(
            start < self.counted_at(body) <= moment
            for start, body in zip(less["period_start"], less["body"], strict=True)
        )

    def lock(self, delivery: Delivery) -> str:
        """Send what takes away from a billing period that it is not of one after the other, from all sources.

        And what takes away from its own, where such a one has taken from it.
        """
        if self.stream or delivery.quantity > 0 or delivery.period is None:
            return ""
        at = self.counted_at(delivery.body)
        if not self._is_from_before(delivery) and not self._was_lessened(delivery.subscription, at):
            return ""
        return f"floor:{self.site}:{delivery.subscription}:{self._component['id']}"

    def _is_from_before(self, delivery: Delivery) -> bool:
        """Say whether its usage period began before the billing period in which it counts."""
        return delivery.period is not None and delivery.period.start < self.counted_at(delivery.body)

    def _too_little(self, deliveries: Sequence[Delivery]) -> dict[str, str]:
        """Return, by token, that the billing period into which a deduction goes does not take it whole."""
        found = {}
        for one in deliveries:
            if self.lock(one):
                at = self.counted_at(one.body)
                room = self._room(one.subscription, at)
                room -= self._about_to_leave(one.subscription, at) if self._is_from_before(one) else 0
                if -one.quantity > room:
                    found[one.token] = f"{_TOO_LITTLE}: it counts {room}"
        return found

    def _about_to_leave(self, number: str, start: datetime) -> Decimal:
        """Return what is ready to be taken back of the usage of the billing period that began then.

        It was judged before a late deduction was, and goes without another look.
        """
        if self.book is None:
            return Decimal(0)
        period = Period(start, _NEVER)
        rows = self.book.accepted_at(self.site, [number], str(self._component["id"]), period, (State.RESERVED,))
        own = rows[(rows["period_start"] >= start) & rows["quantity"].str.startswith("-")]
        return -sum(map(Decimal, own["quantity"]), Decimal(0))

    def encode(self, proposals: pd.DataFrame) -> pd.Series:
        """Return each proposal as one event, its dimensions as properties."""
        # A usage period that the renewal cut in two still bills, in the billing period that is open; and so does one
        # before it, where it goes at all.
        starts = proposals["period_start"].where(
            ~(proposals["period_start"] < proposals["open_from"]), proposals["open_from"]
        )
        when = by_value(starts, lambda start: f"{start.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}")
        return self._written(proposals, when, proposals["quantity"])

    def encode_events(self, events: pd.DataFrame) -> pd.Series:
        """Return each row as one event at its own time, its dimensions as properties."""
        counts_values = self.source.settings.meter.function == "unique"
        quantity = by_value(events["quantity"], json.dumps) if counts_values else events["quantity"]
        return self._written(events, _moments(events["time"]), quantity)

    def _written(self, rows: pd.DataFrame, when: pd.Series, quantity: pd.Series) -> pd.Series:
        named = by_value(rows["address"], self._subscriber)
        key = json.dumps(self.settings.property)
        also = by_value(rows["dimensions"].fillna("{}"), lambda text: f",{text[1:-1]}" if len(text) > len("{}") else "")
        return joined(
            '{"chargify":{"timestamp":"', when, '","uniqueness_token":"', rows["token"], '"', named,
            f",{key}:", quantity, also, "}",
        )  # fmt: skip

    def _subscriber(self, address: str) -> str:
        """Return the end of the ``chargify`` object and, where it stands outside, what names the subscription."""
        account = json.loads(address)["account"]
        by = self.settings.subscription_by
        if by == "subscription_id":
            # Of a delivery that was named by reference before, and whose account has no usage any more, none is sent.
            return f',"subscription_id":{account if account.isdigit() else json.dumps(account)}}}'
        if by == "subscription_reference":
            return f',"subscription_reference":{json.dumps(account)}}}'
        return f"}},{json.dumps(by)}:{json.dumps(account)}"

    @property
    def ask_after(self) -> timedelta:
        """Nothing: a replay under the same tokens is harmless whatever becomes of the first request."""
        return timedelta(0)

    def send(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Record the chunk in one bulk request, whose success tells nothing of its single events."""
        (stream,) = {delivery.address["stream"] for delivery in chunk}
        bodies = self._prepared.__dict__.pop("bodies", {})
        if bodies.keys() != {delivery.token for delivery in chunk}:
            bodies = self._bodies(chunk)
        self.client.record_events(stream, [body for delivery in chunk for body in bodies[delivery.token]])
        return [Receipt(delivery.token) for delivery in chunk]

    def prepare(self, chunk: Sequence[Delivery]) -> None:
        """Read an archived chunk, perhaps from far away, while there is no claim yet that would grow old."""
        if self.stream:
            self._prepared.bodies = self._bodies(chunk)

    def _bodies(self, chunk: Sequence[Delivery]) -> dict[str, list[str]]:
        return {delivery.token: list(self._events(delivery).values()) for delivery in chunk}

    def _events(self, delivery: Delivery) -> dict[str, str]:
        """Return the events of a delivery, each under what a person knows it by: its event id, or its token."""
        if not self.stream:
            return {delivery.token: delivery.body}
        chunk = self._chunk(delivery)
        return dict(zip(chunk.column("event_id").to_pylist(), chunk.column("body").to_pylist(), strict=True))

    def _chunk(self, delivery: Delivery) -> pa.Table:
        return self.kept().read(Archived.at(delivery.address))

    def settle(self, doubts: Sequence[Delivery], now: datetime) -> Mapping[str, Answer]:
        """Send the same events again: the stream ignores a token that it holds, for 31 days.

        What was sent before the replay window stays in doubt, since a replay could bill twice. So does what belongs to
        a billing period that has closed since: if the first request was lost, its replay would be taken and not billed.
        And so does what another subscription would be billed for, since the reference was given to it.
        What could land after the end of its billing period is not replayed either, and is looked at again once that has
        closed. Where several are refused together, ever smaller parts go, at last each event alone: one that is refused
        alone is for a person, since the first request may have brought it all the same.
        """
        fresh = [doubt for doubt in doubts if doubt.sent_at and now - doubt.sent_at <= self.replay_window]
        today = self._today(fresh)
        leave_by = today.leave_by
        clock = _Clock(self.client, now)
        in_time = [doubt for doubt in fresh if doubt.token in leave_by and clock.now() < leave_by[doubt.token]]
        if waiting := len(leave_by) - len(in_time):
            log.info("%d doubts wait: their billing period ends, and a replay could land after it", waiting)
        too_old = f"sent more than {self.replay_window.days} days ago: a replay could bill it twice; compare the totals"
        too_late = "its billing period has closed: a replay would be taken and never billed; compare the totals"
        answers: dict[str, Answer] = {doubt.token: InDoubt(too_old) for doubt in doubts}
        answers |= {doubt.token: InDoubt(too_late) for doubt in fresh}
        answers = {token: answer for token, answer in answers.items() if token not in leave_by | today.resting}
        answers |= {token: InDoubt(f"{why}: a replay could bill it there") for token, why in today.elsewhere.items()}
        for stream in sorted({doubt.address["stream"] for doubt in in_time}):
            of_stream = [doubt for doubt in in_time if doubt.address["stream"] == stream]
            for first in range(0, len(of_stream), self.chunk_size):
                chunk = of_stream[first : first + self.chunk_size]
                replay = _Replay(self.client, stream, clock, min(leave_by[doubt.token] for doubt in chunk))
                answers |= self._replayed(chunk, replay, now)
                if failure := replay.failure:
                    raise InDoubt(
                        str(failure),
                        answers=answers,
                        refused=isinstance(failure, InDoubt) and failure.refused,
                        throttled=failure.throttled,
                        retry_after_seconds=failure.retry_after_seconds,
                    ) from failure
        return answers

    def _replayed(self, chunk: Sequence[Delivery], replay: "_Replay", now: datetime) -> dict[str, Answer]:
        """Send a chunk again; return what became of those deliveries of which every event came to an end."""
        names = {delivery.token: self._events(delivery) for delivery in chunk}
        bodies = {name: body for events in names.values() for name, body in events.items()}
        # Another order each time: many bad ones in a row must not keep the others from their turn for ever.
        replay.send({name: bodies[name] for name in sorted(bodies, key=lambda name: shuffled(name, now))})
        return {token: answer for token, events in names.items() if (answer := replay.answer(token, events))}

    def _today(self, deliveries: Sequence[Delivery]) -> "_Today":
        """Ask the site how deliveries stand with it right now."""
        found = _Today()
        earliest = {delivery.token: self._earliest(delivery) for delivery in deliveries}
        known = sorted({account for moments in earliest.values() for account, _ in moments})
        today = {one.account: self._named_otherwise(one) if one.unknown else one for one in super().resolve(known)}
        for token, moments in earliest.items():
            if whys := [why for account, whose in moments if (why := _why_elsewhere(today[account], whose))]:
                found.elsewhere[token] = whys[0]
                continue
            if whys := [today[account].unknown for account, _ in moments if today[account].unknown]:
                found.resting[token] = whys[0]
                continue
            spans = [
                (moment, today[account].open_from, today[account].open_until)
                for (account, _), moment in moments.items()
            ]
            if all(start is not None and moment >= start for moment, start, _ in spans):
                until = min((end for *_, end in spans if end is not None), default=_NEVER)
                found.leave_by[token] = until - self.settle_after
            elif starts := [start for _, start, _ in spans if start is not None]:
                found.opened[token] = max(starts)
        return found

    def _named_otherwise(self, target: Target) -> Target:
        """Return the target of an account by the other way of naming it, in which it may have been sent before."""
        account = target.account
        by_number = not self._by_id() and account.isascii() and account.isdigit()
        found = self.client.subscription(int(account)) if by_number else None
        if self._by_id():
            found = self.client.subscription_by_reference(account)
        return self._target(account, found, self._component, self._unusable) if found else target

    def _earliest(self, delivery: Delivery) -> dict[tuple[str, str], datetime]:
        """Return the time of the earliest event of each account, and of the subscription that it led to."""
        if not self.stream:
            return {(str(delivery.address["account"]), delivery.subscription): self.counted_at(delivery.body)}
        whose = ["account", "subscription"]
        first = self._chunk(delivery).group_by(whose).aggregate([("time", "min")])
        names = zip(*(first.column(name).to_pylist() for name in whose), strict=True)
        return dict(zip(names, first.column("time_min").to_pylist(), strict=True))

    def counted_at(self, body: str) -> datetime:
        """Return the time of an event."""
        return datetime.fromisoformat(json.loads(body)["chargify"]["timestamp"])

    def recheck(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Hold what belongs to a billing period that has closed since it was planned, or could land after its end."""
        today = self._today(deliveries)
        leave_by, opened = today.leave_by, today.opened
        at = _Clock(self.client, now).now()
        why = "its billing period closed before it was sent: the site would take the event and never bill it"
        if self.stream:
            why = (
                "the billing period of some of its events closed before it was sent, and the site would never bill "
                "those: clear the run from validate on, and the others go"
            )
        ends = "its billing period ends: what is sent now could land after it, and the site would never bill it"
        if self.stream:
            ends += "; clear the run from validate on once the next period is open"
        held = self._too_little([delivery for delivery in deliveries if delivery.token in leave_by])
        held |= {delivery.token: why for delivery in deliveries if delivery.token not in leave_by} | today.resting
        if not self.stream:
            late = [delivery for delivery in deliveries if delivery.token in opened]
            reasons = {one.token: self._why_late_now(one, opened[one.token]) for one in late}
            held |= {token: reason for token, reason in reasons.items() if reason != self.why_late}
        by_token = {one.token: one for one in deliveries}
        too_near = {token: moment for token, moment in leave_by.items() if moment <= at}
        held |= {
            token: PASSES_SOON if self._goes_after(by_token[token], moment + self.settle_after) else ends
            for token, moment in too_near.items()
        }
        return held | today.elsewhere

    def _goes_after(self, delivery: Delivery, renewal: datetime) -> bool:
        """Say whether the source sends a delivery of the period that ends with a renewal into the next one."""
        if self.stream or delivery.period is None:
            return False
        return delivery.period.end > renewal or self._why_late_now(delivery, renewal) == PASSES

    def overtaken(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        today = self._today(deliveries)
        why = "the billing period of its events is closed now"
        closed_now = {delivery.token: why for delivery in deliveries if delivery.token not in today.leave_by}
        return closed_now | today.resting | today.elsewhere

    def records(self, deliveries: pd.DataFrame) -> None:
        """Return None: no endpoint returns recorded events."""

    def totals(self, subscriptions: Sequence[str]) -> list[SiteTotal]:
        """Return the metric's value over the open billing period and up to ten closed ones, of each subscription."""
        return [total for number in subscriptions for total in self._totals_of(int(number))]

    def _totals_of(self, number: int) -> Iterator[SiteTotal]:
        component = self._component["id"]
        subscription = self.client.subscription(number) or {}
        rows = self.client.subscription_components(number) or []
        row: Json = next((row for row in rows if row["component_id"] == component), {})
        spans = {
            (past["billing_period_starts_at"], past["billing_period_ends_at"]): past["total_usage_quantity"]
            for past in row.get("historic_usages") or ()
        }
        bounds = (subscription.get("current_period_started_at"), subscription.get("current_period_ends_at"))
        if all(bounds) and row.get("unit_balance") is not None:
            spans.setdefault(bounds, row["unit_balance"])
        for (start, end), quantity in spans.items():
            period = Period(datetime.fromisoformat(start), datetime.fromisoformat(end))
            yield SiteTotal(str(number), str(component), period, Decimal(str(quantity)))

    def _address(self, account: str, number: str) -> Json:
        return {"stream": self.settings.stream, "account": number if self._by_id() else account}

    def _by_id(self) -> bool:
        return bool(self.settings.subscription_by == "subscription_id")

    def _own_faults(self, component: Json) -> Iterator[str]:
        # Neither the stream and its Subscription Identifier nor the metric's formula can be read through any documented
        # call: a wrong stream shows at the first request, the others when totals are compared.
        if self.stream and self.source.settings.meter.function == "unique" and self.metric not in {"unique", "count"}:
            yield f"metric: the {self.metric} of a property that holds text is nothing; meter unique sends the values"
        names = Counter([self.settings.property, *self.source.settings.dimensions, "chargify"])
        names.update([] if self.settings.subscription_by in _CHARGIFY_FIELDS else [self.settings.subscription_by])
        for name in (name for name, count in names.items() if count > 1):
            where = "dimensions, property, subscription_by"
            yield f"{where}: {name!r} would stand twice in an event; rename one in usage.sql"


@dataclass
class _Today:
    """How deliveries stand with the site, by token; one that has no entry belongs to a closed billing period.

    `leave_by` is until when a request may leave so that it lands before its billing periods end, where these are open
    right now. `resting` says why the site bills an account of it nothing today, where that may change: it is on hold,
    or in its trial. `elsewhere` says which account leads to another subscription by now. `opened` says of those of
    which a billing period is closed when the one that is open began, if that is known.
    """

    leave_by: dict[str, datetime] = field(default_factory=dict)
    resting: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    opened: dict[str, datetime] = field(default_factory=dict)


def _why_elsewhere(today: Target, whose: str) -> str:
    """Return that an account leads to another subscription than `whose` usage it was, or an empty text."""
    if not (today.subscription and whose) or today.subscription == whose:
        return ""
    return f"account {today.account!r} leads to subscription {today.subscription} by now, and this is usage of {whose}"


class _Clock:
    """The site's own clock, for by it the site renews; from the ledger's `now` on where the site tells none."""

    def __init__(self, client: MaxioSite, now: datetime) -> None:
        self._client = client
        self._first = client.time() or now
        self._started = time.monotonic()

    def now(self) -> datetime:
        """Return the time: what the site said last, or what has passed since it first said one."""
        passed = self._first + timedelta(seconds=time.monotonic() - self._started)
        return max(passed, self._client.time() or passed)


class _Replay:
    """Events that are sent again under their own tokens, in smaller parts wherever the stream refuses several."""

    def __init__(self, client: MaxioSite, stream: str, clock: _Clock, leave_by: datetime) -> None:
        """Prepare; no request leaves at `leave_by` or later."""
        self.failure: NotApplied | InDoubt | None = None
        self._client = client
        self._stream = stream
        self._clock = clock
        self._leave_by = leave_by
        self._taken: set[str] = set()
        self._refused: dict[str, str] = {}

    def send(self, events: Mapping[str, str]) -> None:
        """Send events (body by name); a `failure` of the site ends it, and so does the time.

        Every refusal names a part that is a tenth of the one before, so that a thousand events end after 1,111
        requests, if all of them are bad, and after about thirty for each bad one, if few are.
        """
        waiting = [list(events.items())]
        in_vain, refusal = 0, ""
        in_a_row: dict[str, str] = {}
        while waiting and self._clock.now() < self._leave_by:
            some = waiting.pop()
            try:
                refusal = self._refusal([body for _, body in some])
            except (NotApplied, InDoubt) as failure:
                self.failure = failure
                break
            in_vain = in_vain + 1 if refusal else 0
            if not refusal:
                in_a_row.clear()
                self._taken.update(name for name, _ in some)
            elif len(some) == 1:
                in_a_row[some[0][0]] = self._refused[some[0][0]] = refusal
            else:
                share = -(-len(some) // _SHARE_AFTER_REFUSAL)
                waiting += [some[first : first + share] for first in range(0, len(some), share)]
            if in_vain == _MOST_IN_VAIN:
                self.failure = InDoubt(f"{in_vain} replays in a row were refused: {refusal}", refused=True)
                break
        if self.failure:
            # It may lie in none of the single events: the stream wants nothing now, and so it tells of none of these.
            self._refused = {name: why for name, why in self._refused.items() if name not in in_a_row}

    def _refusal(self, bodies: Sequence[str]) -> str:
        """Send some events; return with which words the stream refused them, or an empty text."""
        try:
            self._client.record_events(self._stream, bodies)
        except Refused as refusal:
            return str(refusal)
        except InDoubt as doubt:
            if not doubt.refused:
                raise
            return str(doubt)
        return ""

    def answer(self, token: str, names: Collection[str]) -> Receipt | InDoubt | None:
        """Return what became of the delivery `token`, which has the events `names`; None where that is still open."""
        refused = [name for name in names if name in self._refused]
        open_ones = [name for name in names if name not in self._taken and name not in self._refused]
        if not refused and not open_ones:
            return Receipt(token, note="replayed; the stream ignores what it holds")
        if open_ones:
            return None
        shown = ", ".join(refused[:_NAMED]) + (", ..." if len(refused) > _NAMED else "")
        return InDoubt(
            f"{len(refused)} of its {len(names)} events are refused alone ({shown}): an earlier request may have "
            f"brought them all the same; compare the totals; {self._refused[refused[0]]}"
        )


def _moments(times: pd.Series) -> pd.Series:
    """Return moments in UTC as text, with microseconds where they have any."""
    text = np.datetime_as_string(times.dt.tz_convert(None).to_numpy("datetime64[us]"), unit="us")
    plain = pc.replace_substring_regex(pa.array(text.astype(object), pa.string()), r"\.000000$", "")
    return joined(pd.Series(plain.to_pylist(), index=times.index, dtype=object), "Z")
