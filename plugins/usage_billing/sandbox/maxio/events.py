"""Maxio's events host: single events and bulk requests into streams, deduplicated by token for 31 days.

A 201 says only that the request was stored. Whether a subscription matched, and whether its component is activated,
shows at renewal. Rules follow the reference pages of the two event endpoints and of the `chargify` object.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from starlette.responses import Response

from usage_billing.sandbox.billing import Account, find_account, find_by_reference
from usage_billing.sandbox.clock import parse_instant
from usage_billing.sandbox.spoil import first_half
from usage_billing.sandbox.wire import BadJson, Call, Route, dump_json
from usage_billing.sandbox.world import Component, Stream

from .api import MaxioHost
from .billing import worth
from .lookups import MaxioSite, errors

LARGEST_BULK = 1000
TOKEN_LENGTH = 64
TOKEN_MICROS = timedelta(days=31) // timedelta(microseconds=1)
AGE_MICROS = TOKEN_MICROS
"""How old an event may be where the switch sets a limit; no document names one."""
_SIZE_LIMITS = {"1_mb": 1_000_000, "64_kb": 64_000, "none": float("inf")}


class BadEvent(ValueError):
    """An event that cannot be stored; the text says why."""

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Incoming:
    """One checked event: who it is for, when it happened, and what it said."""

    token: str | None
    account: Account | None
    subscriber: str
    happened_at: int
    body: dict[str, Any]


class MaxioEvents(MaxioHost):
    """Answers the events host of one site: the common one, or the one that only the region eu may have."""

    rate_switch = "events_rate_limit"

    def __init__(self, site: MaxioSite, *, own_host: bool = False) -> None:
        super().__init__(site)
        self._own_host = own_host
        self.world, self.books, self.switches = site.world, site.books, site.switches
        self.streams = {stream.handle: stream for stream in self.world.streams}
        self.routes: Sequence[Route] = (
            Route("POST", "/events/{stream}/bulk", "bulk_events", self.record_many, writing=True, bulk=True),
            Route("POST", "/events/{stream}", "record_event", self.record_one, writing=True),
        )
        self._meters: dict[str, list[Component]] = {}
        for component in self.world.components:
            self._meters.setdefault(component.stream or "", []).append(component)

    def arrive(self, call: Call, route: Route | None) -> Response | None:
        """Look at a request as it comes: whether this is the site's host, credentials, size, and the stream."""
        if self.site.world.site.startswith("maxio:eu:") and self._own_host != (
            self.switches["eu_events_host"] == "separate"
        ):
            return self.not_found()
        if not self.authorized(call):
            return self.unauthorized()
        if len(call.body) > _SIZE_LIMITS[self.switches["events_size_limit"]]:
            return errors(413, "The request body is too large.")
        if route is None:
            return self.not_found()
        if call.params["stream"] not in self.streams and self.switches["unknown_stream"] == "404":
            return self.not_found()
        return None

    def do_half(self, call: Call, route: Route, status: int | None) -> Response:
        """Store the first half of a bulk request, then break."""
        done = self.carry_out(first_half(call), route)
        return self.server_error(status or 500) if done.status_code < 400 else done

    def left(self, call: Call) -> None:
        """Do nothing: this host remembers no request."""

    def carry_out(self, call: Call, route: Route | None) -> Response:
        """Carry out a request that has arrived."""
        if route is None:
            return self.not_found()
        try:
            return route.handler(call, **call.params)
        except BadJson:
            return errors(422, "The request body is not valid JSON.")
        except BadEvent as refusal:
            return errors(refusal.status, str(refusal))

    def record_one(self, call: Call, stream: str) -> Response:
        """`POST /events/{stream}.json`: 201, no body."""
        self._store(stream, [self._check(stream, call.json(), {})])
        return Response(status_code=201)

    def record_many(self, call: Call, stream: str) -> Response:
        """`POST /events/{stream}/bulk.json`: 201, no body; more than 1,000 events are refused."""
        events = call.json()
        if not isinstance(events, list):
            raise BadEvent("The body must be an array of events.", int(self.switches["bulk_without_array"]))
        if not events and self.switches["empty_bulk"] == "422":
            raise BadEvent("There are no events in the body.")
        if len(events) > LARGEST_BULK:
            raise BadEvent(f"A maximum of {LARGEST_BULK} events can be published in a single request.")
        known: dict[str, Account | None] = {}
        checked = []
        refusal: BadEvent | None = None
        for event in events:
            try:
                checked.append(self._check(stream, event, known))
            except BadEvent as fault:
                if self.switches["bulk_with_bad_event"] == "refuse_all":
                    raise
                refusal = fault
        self._store(stream, checked)
        if refusal is not None and self.switches["bulk_with_bad_event"] == "store_valid_and_refuse":
            return errors(refusal.status, str(refusal))
        return Response(status_code=201)

    def _check(self, stream: str, event: object, known: dict[str, Account | None]) -> Incoming:
        if not isinstance(event, dict):
            raise BadEvent("An event must be an object.")
        meta = event.get("chargify", {})
        if not isinstance(meta, dict):
            raise BadEvent("chargify must be an object.")
        subscriber = self._subscriber(self.streams.get(stream), event, meta)
        if subscriber not in known:
            known[subscriber] = self._account(self.streams.get(stream), subscriber)
        account = known[subscriber]
        if account is None and self.switches["unknown_subscription_in_event"] == "refuse":
            raise BadEvent(f"The event names no subscription: {subscriber!r}.")
        happened_at = self._instant(meta)
        if self._too_old(happened_at) and self.switches["event_age_limit"] == "refuse":
            raise BadEvent("The event is too old.")
        return Incoming(self._token(meta), account, subscriber, happened_at, event)

    def _too_old(self, happened_at: int) -> bool:
        return happened_at < self.books.now() - AGE_MICROS

    def _subscriber(self, stream: Stream | None, event: dict[str, Any], meta: dict[str, Any]) -> str:
        if stream is None:
            return ""
        holder = meta if stream.identifier in ("subscription_id", "subscription_reference") else event
        value = holder.get(stream.identifier)
        return "" if value is None else str(value)

    def _account(self, stream: Stream | None, subscriber: str) -> Account | None:
        if stream is None or not subscriber:
            return None
        if stream.identifier != "subscription_id":
            return find_by_reference(self.books, self.world.site, subscriber)
        return find_account(self.books, self.world.site, int(subscriber)) if subscriber.isdecimal() else None

    def _token(self, meta: dict[str, Any]) -> str | None:
        token = meta.get("uniqueness_token")
        if token is None:
            return None
        if not isinstance(token, str) or not token:
            raise BadEvent("uniqueness_token must be text.")
        if len(token) > TOKEN_LENGTH and self.switches["long_event_token"] == "refuse":
            raise BadEvent(f"uniqueness_token is longer than {TOKEN_LENGTH} characters.")
        return token[:TOKEN_LENGTH]

    def _instant(self, meta: dict[str, Any]) -> int:
        given = meta.get("timestamp")
        if given is None:
            return self.books.now()
        try:
            return parse_instant(given, self.world.zone)
        except (TypeError, ValueError) as error:
            raise BadEvent(f"timestamp is not an ISO 8601 time: {given!r}.") from error

    def _store(self, stream: str, events: list[Incoming]) -> None:
        now, wall = self.books.now(), self.books.wall()
        fresh = self._drop_duplicates(stream, events, now)
        ignored = {
            id(e) for e in fresh if self._too_old(e.happened_at) and self.switches["event_age_limit"] == "ignore"
        }
        row = self.books.row("SELECT max(id) AS last FROM event")
        first = ((row["last"] if row else None) or 0) + 1
        site = self.world.site
        numbered = list(enumerate(fresh, first))
        self.books.write_many(
            "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    number,
                    site,
                    stream,
                    e.token,
                    e.account and e.account.id,
                    e.subscriber,
                    e.happened_at,
                    now,
                    wall,
                    dump_json(e.body),
                )
                for number, e in numbered
            ],
        )
        self.books.write_many(
            "INSERT INTO metering VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    number,
                    site,
                    component.id,
                    e.account and e.account.id,
                    e.subscriber,
                    self._counts_at(e, now),
                    now,
                    wall,
                    worth(component.metric, e.body),
                )
                for component in self._meters.get(stream, [])
                if component.metric
                for number, e in numbered
                if id(e) not in ignored
            ],
        )

    def _drop_duplicates(self, stream: str, events: list[Incoming], now: int) -> list[Incoming]:
        """Return the events whose token the stream does not hold; the first one with a token wins, silently."""
        tokens = json.dumps([event.token for event in events if event.token is not None])
        rows = self.books.rows(
            "SELECT token FROM event_token WHERE site = ? AND stream = ? AND expires_at > ?"
            " AND token IN (SELECT value FROM json_each(?))",
            *(self.world.site, stream, now, tokens),
        )
        seen = {row["token"] for row in rows}
        fresh = []
        for event in events:
            if event.token is None or event.token not in seen:
                fresh.append(event)
                seen.add(event.token)
        expires = now + TOKEN_MICROS
        self.books.write_many(
            "REPLACE INTO event_token VALUES (?, ?, ?, ?)",
            [(self.world.site, stream, event.token, expires) for event in fresh if event.token is not None],
        )
        return fresh

    def _counts_at(self, event: Incoming, now: int) -> int:
        late = event.account is not None and event.happened_at < self.site.biller.usage_since(event.account)
        return now if late and self.switches["late_event"] == "next_period" else event.happened_at
