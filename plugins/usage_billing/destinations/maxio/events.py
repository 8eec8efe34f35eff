"""Usage as events of a Maxio stream: up to a thousand in a request, each with the token that settles a doubt.

Limits and the meaning of replies follow Maxio's public API reference: "Events-Based Billing".
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from usage_billing.archive import Archived
from usage_billing.destinations.base import Answer, by_value, joined
from usage_billing.destinations.maxio.client import Json, MaxioSite
from usage_billing.destinations.maxio.component import IdOrHandle, MaxioDestination
from usage_billing.errors import InDoubt, Refused
from usage_billing.records import Delivery, Period, Receipt, SiteTotal
from usage_billing.sources import BillingSource, DestinationSettings

_CHARGIFY_FIELDS = ("subscription_id", "subscription_reference")
"""Identifiers that stand inside an event's ``chargify`` object; any other is a property of the event."""


class MaxioEventsSettings(DestinationSettings):
    """The keys of a source that is billed as events of a stream.

    `subscription_by` is the stream's Subscription Identifier: ``subscription_id``, ``subscription_reference``, or the
    name of a property whose value is the subscription's reference. `property` holds the quantity. `mode` says what an
    event is: ``totals`` for one usage total, whose correction is a signed difference, or ``events`` for one row of
    ``usage.sql``, as it is. `metric` says what the metric behind `component` computes of the events; totals need a sum.
    No API tells the metric's formula, so nobody but you can check that. `fed_by_others` says that somebody else feeds
    the component too: then it is no fault that the site counts more than was sent from here.
    """

    free: ClassVar[frozenset[str]] = DestinationSettings.free | {"metric", "fed_by_others"}

    name: Literal["maxio_events"]
    stream: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    subscription_by: str = Field(min_length=1)
    component: IdOrHandle
    property: str = Field(min_length=1)
    mode: Literal["totals", "events"] = "totals"
    metric: Literal["sum", "count", "maximum", "minimum", "average", "unique", "percentile"] = "sum"
    fed_by_others: bool = False

    @model_validator(mode="after")
    def _totals_are_sums(self) -> Self:
        if self.mode == "totals" and self.metric != "sum":
            raise ValueError(
                f"metric: is {self.metric}, and mode totals sends signed differences, which only a sum takes in; "
                "set mode: events"
            )
        return self

    def naming(self) -> dict[str, Any]:
        """Return the keys that name what is billed; totals were named without their mode before there was another."""
        named = super().naming()
        return named if self.mode == "events" else {key: value for key, value in named.items() if key != "mode"}


class MaxioEvents(MaxioDestination):
    """Usage as events of a stream, a thousand to a request, each with its token.

    In mode ``totals`` a delivery is an event at the start of its usage period. In mode ``events`` a delivery is a chunk
    of rows, each an event at its own time, which the archive keeps: one delivery then makes one request.
    """

    name = "maxio_events"
    settings_model = MaxioEventsSettings
    kind = "event_based_component"
    chunk_size = 1000
    retry_chunk_size = 1000
    events_to_chunk = 1000
    # The documentation says 31 days; a day is left for clocks and for the time that the request took.
    replay_window = timedelta(days=30)

    def __init__(self, source: BillingSource, client: MaxioSite) -> None:
        super().__init__(source, client)
        self.fed_by_others = self.settings.fed_by_others
        if self.settings.mode == "events":
            self.stream, self.metric = self.settings.stream, self.settings.metric
            self.chunk_size = self.retry_chunk_size = 1

    def hold_reason(self, proposals: pd.DataFrame) -> pd.Series:
        """Hold what belongs to a billing period that has closed, or for which nobody knows today whether it has."""
        unknown = proposals["open_from"].isna().to_numpy(dtype=bool)
        closed = (proposals["period_end"] <= proposals["open_from"]).to_numpy(dtype=bool)
        why_unknown = "its account has no usage in this run, so its open billing period is not known"
        why_closed = "its billing period is closed: the site would take the event and never bill it"
        texts = np.select([unknown, closed], [why_unknown, why_closed], "")
        return pd.Series(texts, index=proposals.index, dtype=object)

    def encode(self, proposals: pd.DataFrame) -> pd.Series:
        """Return each proposal as one event, its dimensions as properties."""
        # A usage period that the renewal cut in two still bills, in the billing period that is open.
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
            return f',"subscription_id":{int(account)}}}'
        if by == "subscription_reference":
            return f',"subscription_reference":{json.dumps(account)}}}'
        return f"}},{json.dumps(by)}:{json.dumps(account)}"

    def send(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Record the chunk in one bulk request, whose success tells nothing of its single events."""
        self._record(chunk)
        return [Receipt(delivery.token) for delivery in chunk]

    def _record(self, chunk: Sequence[Delivery]) -> None:
        (stream,) = {delivery.address["stream"] for delivery in chunk}
        self.client.record_events(stream, [body for delivery in chunk for body in self._bodies(delivery)])

    def _bodies(self, delivery: Delivery) -> list[str]:
        if not self.stream:
            return [delivery.body]
        bodies: list[str] = self._chunk(delivery).column("body").to_pylist()
        return bodies

    def _chunk(self, delivery: Delivery) -> pa.Table:
        return self.kept().read(Archived.at(delivery.address))

    def settle(self, doubts: Sequence[Delivery], now: datetime) -> Mapping[str, Answer]:
        """Send the same events again: the stream ignores a token that it holds, for 31 days.

        What was sent before the replay window stays in doubt, since a replay could bill twice. So does what belongs to
        a billing period that has closed since: if the first request was lost, its replay would be taken and not billed.
        """
        fresh = [doubt for doubt in doubts if doubt.sent_at and now - doubt.sent_at <= self.replay_window]
        still = self._still_open(fresh)
        replayable = [doubt for doubt in fresh if doubt.token in still]
        for stream in sorted({doubt.address["stream"] for doubt in replayable}):
            of_stream = [doubt for doubt in replayable if doubt.address["stream"] == stream]
            for first in range(0, len(of_stream), self.chunk_size):
                self._replay(of_stream[first : first + self.chunk_size])
        too_old = f"sent more than {self.replay_window.days} days ago: a replay could bill it twice; compare the totals"
        closed = "its billing period has closed: a replay would be taken and never billed; compare the totals"
        answers: dict[str, Answer] = {doubt.token: InDoubt(too_old) for doubt in doubts}
        answers |= {doubt.token: InDoubt(closed) for doubt in fresh}
        note = "replayed; the stream ignores what it holds"
        return answers | {doubt.token: Receipt(doubt.token, note=note) for doubt in replayable}

    def _still_open(self, deliveries: Sequence[Delivery]) -> set[str]:
        """Return the tokens of those all of whose billing periods are open on the site right now."""
        earliest = {delivery.token: self._earliest(delivery) for delivery in deliveries}
        targets = self.resolve(sorted({account for moments in earliest.values() for account in moments}))
        opened = {target.account: target.open_from for target in targets if target.open_from is not None}
        return {
            token
            for token, moments in earliest.items()
            if all(account in opened and moment >= opened[account] for account, moment in moments.items())
        }

    def _earliest(self, delivery: Delivery) -> dict[str, datetime]:
        """Return the time of each account's earliest event."""
        if not self.stream:
            return {str(delivery.address["account"]): self.counted_at(delivery.body)}
        first = self._chunk(delivery).group_by("account").aggregate([("time", "min")])
        return dict(zip(first.column("account").to_pylist(), first.column("time_min").to_pylist(), strict=True))

    def counted_at(self, body: str) -> datetime:
        """Return the time of an event."""
        return datetime.fromisoformat(json.loads(body)["chargify"]["timestamp"])

    def recheck(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Hold what belongs to a billing period that has closed since it was planned."""
        still = self._still_open(deliveries)
        why = "its billing period closed before it was sent: the site would take the event and never bill it"
        if self.stream:
            why = (
                "the billing period of some of its events closed before it was sent, and the site would never bill "
                "those: clear the run from validate on, and the others go"
            )
        return {delivery.token: why for delivery in deliveries if delivery.token not in still}

    def overtaken(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        still = self._still_open(deliveries)
        return {one.token: "the period of its events is closed now" for one in deliveries if one.token not in still}

    def _replay(self, chunk: Sequence[Delivery]) -> None:
        try:
            self._record(chunk)
        except Refused as refusal:
            # Refused now says nothing about then: the same request may have been taken while its reply was lost.
            raise InDoubt(
                f"{refusal}; a replay was refused, so what became of the first request stays open"
            ) from refusal

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
        # Neither the stream and its Subscription Identifier, nor the metric's formula, nor whether the component is
        # activated for a subscription can be read through any documented call: a wrong stream shows at the first
        # request, the others when totals are compared.
        if self.stream and self.source.settings.meter.function == "unique" and self.metric not in {"unique", "count"}:
            yield f"metric: the {self.metric} of a property that holds text is nothing; meter unique sends the values"
        names = Counter([self.settings.property, *self.source.settings.dimensions, "chargify"])
        names.update([] if self.settings.subscription_by in _CHARGIFY_FIELDS else [self.settings.subscription_by])
        for name in (name for name, count in names.items() if count > 1):
            where = "dimensions, property, subscription_by"
            yield f"{where}: {name!r} would stand twice in an event; rename one in usage.sql"


def _moments(times: pd.Series) -> pd.Series:
    """Return moments in UTC as text, with microseconds where they have any."""
    text = np.datetime_as_string(times.dt.tz_convert(None).to_numpy("datetime64[us]"), unit="us")
    plain = pc.replace_substring_regex(pa.array(text.astype(object), pa.string()), r"\.000000$", "")
    return joined(pd.Series(plain.to_pylist(), index=times.index, dtype=object), "Z")
