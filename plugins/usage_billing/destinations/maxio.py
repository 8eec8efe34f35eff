"""Maxio Advanced Billing (formerly Chargify): its client, and usage as metered components or as streamed events.

Paths, limits and the meaning of replies follow Maxio's public API reference: "Subscription Components" (usages),
"Events-Based Billing", "Duplicate Prevention" and "API Access: Error Handling".
"""

import json
import re
import string
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_DOWN, Decimal
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from requests.adapters import BaseAdapter

from usage_billing.archive import Archived
from usage_billing.destinations.base import Answer, Destination, by_value, joined, negative
from usage_billing.destinations.http import (
    Effect,
    HttpClient,
    Outcome,
    exact_number,
    record_number,
    segment,
)
from usage_billing.destinations.settings import SiteSettings, Timeouts, url_faults, whole_number
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError
from usage_billing.records import Delivery, Period, Receipt, SiteRecord, SiteTotal, Target
from usage_billing.sources import BillingSource, DestinationSettings

Json = dict[str, Any]

_EVENTS_URL = "https://events.chargify.com"
_VENDOR_HOSTS = {"us": "chargify.com", "eu": "ebilling.maxio.com"}
_CUT_OFF_SECONDS = 120
_SETTLE_AFTER_SECONDS = 150
_PER_PAGE = 200
_MEMO_LENGTH = 255
_TOKEN = re.compile(r"[0-9a-f]{64}")
_TOKEN_LENGTH = 64
_TOKEN_HONOURED = timedelta(minutes=61)
_FEW = 20
_CHARGIFY_FIELDS = ("subscription_id", "subscription_reference")
"""Identifiers that stand inside an event's ``chargify`` object; any other is a property of the event."""
_NO_BALANCE = "a deduction waits: the open billing period's balance does not take it, and never falls below 0"
_ENDED = frozenset(
    {"canceled", "expired", "failed_to_create", "on_hold", "suspended", "trial_ended", "awaiting_signup"}
)
"""States in which a subscription accrues no charges: what would be sent there is never billed, so it is quarantined."""

_MET_WITHIN_THE_HOUR = "the site has met this token within the hour, and does not say what became of it"
_CONFLICT = Outcome((409,), InDoubt, (Effect.WRITE,), mend=_MET_WITHIN_THE_HOUR)
_SITE_WIDE = tuple(
    Outcome((422,), Misconfigured, words=words, mend="this concerns the whole site, not this request")
    for words in ("account has been canceled", "trial has ended", "Site data clearing", "site has been deleted")
)
_NO_STREAM = Outcome((404,), Misconfigured, (Effect.WRITE,), mend="the events host knows no such stream or site")


# --- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MaxioSettings(SiteSettings):
    """How to reach one Maxio site; see `SiteSettings` for what every site shares.

    `events_url` stands for ``https://events.chargify.com``, where the site's subdomain is a path segment. Maxio's main
    API documents a cut-off of 120 s, so a request is settled 150 s after it was sent.

    Raises:
        Misconfigured: with every fault at once.
    """

    shortest_settling: ClassVar[int] = 150
    why_not_shorter: ClassVar[str] = "the site may still apply a request 120 s after it was sent"

    subdomain: str
    api_key: str = field(repr=False)
    region: str = "us"
    events_url: str = ""
    # A write waits past the site's cut-off of 120 s: giving up sooner would only make doubts.
    timeouts: Timeouts = field(default_factory=lambda: Timeouts(connect=10, read=60, write=125))
    subject: InitVar[str] = "Maxio settings"

    @property
    def site(self) -> str:
        return f"maxio:{self.region}:{self.subdomain}"

    def _normalise(self) -> None:
        self._set("subdomain", str(self.subdomain or "").strip().lower())
        self._set("region", str(self.region or "us").strip().lower())
        self._set("events_url", (self.events_url or _EVENTS_URL).rstrip("/"))

    def _own_address(self) -> str:
        return f"https://{self.subdomain}.{_VENDOR_HOSTS[self.region]}"

    def _faults(self) -> Iterator[str]:
        if not self.api_key:
            yield "password: is empty; put the site's API key there"
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.subdomain):
            yield f"subdomain: {self.subdomain!r} is none; it is the first word of the site's address, such as 'acme'"
        if self.region not in _VENDOR_HOSTS:
            yield f"region: {self.region!r} is unknown; it is 'us' or 'eu'"
        if self.base_url:
            yield from url_faults("host", self.base_url)
            yield from self._another_site()
        yield from url_faults("events_url", self.events_url)

    def _another_site(self) -> Iterator[str]:
        """A vendor's address names its site; another one's usage must never pass for this one's."""
        host = urlsplit(self.base_url).hostname or ""
        for region, vendor in _VENDOR_HOSTS.items():
            if host.endswith(f".{vendor}") and (region, host) != (self.region, f"{self.subdomain}.{vendor}"):
                yield f"host: {host} is not the address of {self.site}; leave it empty, or mend subdomain and region"


# --- client ---------------------------------------------------------------------------------------------------------


class MaxioSite:
    """A plain client of the calls that usage needs. JSON objects come back as dicts, numbers exact.

    Subscriptions are addressed by numeric id alone: in a path, a reference made of digits would be taken for an id, and
    the id wins. Look a reference up first. Components are an id or ``handle:<handle>``.

    Example::

        site = MaxioSite(MaxioSettings(subdomain="acme", api_key="..."))
        subscription = site.subscription_by_reference("acct-0001")
        site.create_usage(subscription["id"], "handle:api-calls", '{"usage": {"quantity": 3, "memo": "October"}}')
        for usage in site.usages(subscription["id"], "handle:api-calls") or ():
            print(usage["created_at"], usage["quantity"])

    Every method raises `Misconfigured` or `NotApplied`; those that write also `Refused` or `InDoubt`.
    """

    def __init__(self, settings: MaxioSettings, adapter: Callable[[], BaseAdapter] | None = None) -> None:
        """Prepare; `adapter` takes the place of the network, see `HttpClient`."""
        self.settings = settings
        key = (settings.api_key, "x")
        shared: Json = {"timeouts": settings.timeouts, "concurrency": settings.concurrency, "adapter": adapter}
        self._main = HttpClient(settings.site, settings.base_url, key, outcomes=(*_SITE_WIDE, _CONFLICT), **shared)
        events_url = f"{settings.events_url}/{settings.subdomain}"
        self._events = HttpClient(settings.site, events_url, key, outcomes=(*_SITE_WIDE, _NO_STREAM), **shared)

    def read_site(self) -> Json:
        """Return the site's own settings; the cheapest proof that address and key are right."""
        found = self._main.read("read the site", "/site.json")
        if found is None:
            raise self._no_site("read the site")
        return _unwrapped(found, "site")

    def _no_site(self, call: str) -> Misconfigured:
        where = self.settings.base_url
        return Misconfigured(f"{self.settings.site}: {call}: HTTP 404: there is no Maxio site at {where}")

    def create_usage(self, subscription_id: int, component: int | str, body: str) -> Json:
        """Record one usage; `body` is the JSON text of the request, and the created usage comes back.

        The site takes no timestamp: the usage lands in the billing period that is open when it arrives. A top-level
        ``uniqueness_token`` makes it refuse a second body with 409 for 60 minutes, where it is honoured.
        """
        call = f"create usage of component {component} for subscription {subscription_id}"
        reply = self._main.write(call, _usages_path(subscription_id, component), body)
        usage = reply.get("usage") if isinstance(reply, dict) else None
        if not isinstance(usage, dict) or record_number(usage.get("id")) is None:
            raise InDoubt(f"{self.settings.site}: {call}: success, but no usage in the reply")
        return usage

    def usages(self, subscription_id: int, component: int | str, since_id: int | None = None) -> Iterator[Json] | None:
        """Yield all usages from id `since_id` on, each once; None if there is no such subscription or component.

        Pages are cut by id and not by number, so usage that arrives meanwhile shifts nothing. Neither the order of the
        list nor its size of page is documented: this works with either order and ends at an empty page.
        """
        path = _usages_path(subscription_id, component)
        first = self._usage_page(path, since_id, None)
        return None if first is None else self._walk(path, since_id, first)

    def _walk(self, path: str, since_id: int | None, first: list[Json]) -> Iterator[Json]:
        yield from first
        lowest = min((usage["id"] for usage in first), default=0)
        highest = max((usage["id"] for usage in first), default=0)
        while first:
            fresh = [usage for usage in self._next_page(path, since_id, lowest - 1) if usage["id"] < lowest]
            if not fresh:
                break
            yield from fresh
            lowest = min(usage["id"] for usage in fresh)
        while first:
            fresh = [usage for usage in self._next_page(path, highest + 1, None) if usage["id"] > highest]
            if not fresh:
                break
            yield from fresh
            highest = max(usage["id"] for usage in fresh)

    def _next_page(self, path: str, since_id: int | None, max_id: int | None) -> list[Json]:
        page = self._usage_page(path, since_id, max_id)
        if page is None:
            # The list was there a moment ago: its end would be a guess, and a guessed end bills twice.
            raise NotApplied(f"{self.settings.site}: list usages: HTTP 404 in the middle of the list")
        return page

    def _usage_page(self, path: str, since_id: int | None, max_id: int | None) -> list[Json] | None:
        bounds = {"since_id": since_id, "max_id": max_id}
        params = {"per_page": _PER_PAGE} | {name: value for name, value in bounds.items() if value is not None}
        found = self._main.read("list usages", path, params)
        return None if found is None else self._numbered("list usages", found, "usage")

    def _rows(self, call: str, found: object, key: str) -> list[Json]:
        """Return the rows of a list; only a list, empty or not, says what there is."""
        rows = found.get(key) if isinstance(found, dict) else found
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise NotApplied(f"{self.settings.site}: {call}: the answer is no list of objects")
        return [_unwrapped(row, key) for row in rows]

    def _numbered(self, call: str, found: object, key: str) -> list[Json]:
        """Return the rows of a list with their ids as numbers: by these a walk knows where it is."""
        numbers = [(whole_number(row.get("id"), 0), row) for row in self._rows(call, found, key)]
        if any(number is None for number, _ in numbers):
            raise NotApplied(f"{self.settings.site}: {call}: a row has no id that is a number")
        return [{**row, "id": number} for number, row in numbers]

    def component_by_handle(self, handle: str) -> Json | None:
        """Return the component with a handle, or None."""
        found = self._main.read(f"look up component {handle!r}", "/components/lookup.json", {"handle": handle})
        return None if found is None else _unwrapped(found, "component")

    def components(self) -> Iterator[Json]:
        """Yield the components of the site, archived ones too."""
        return self._pages("list components", "/components.json", "component", {"include_archived": "true"})

    def price_points(self, component_id: int) -> Iterator[Json]:
        """Yield the price points of a component."""
        path = f"/components/{segment(component_id)}/price_points.json"
        return self._pages("list price points", path, "price_points", {})

    def subscription(self, subscription_id: int) -> Json | None:
        """Return one subscription, or None."""
        found = self._main.read(f"read subscription {subscription_id}", f"/subscriptions/{int(subscription_id)}.json")
        return None if found is None else _unwrapped(found, "subscription")

    def subscription_by_reference(self, reference: str) -> Json | None:
        """Return the subscription with a reference, or None."""
        call = f"look up subscription {reference!r}"
        found = self._main.read(call, "/subscriptions/lookup.json", {"reference": reference})
        return None if found is None else _unwrapped(found, "subscription")

    def subscriptions(self) -> Iterator[Json]:
        """Yield the subscriptions of the site, oldest first, so that new ones shift no page."""
        return self._pages("list subscriptions", "/subscriptions.json", "subscription", {"direction": "asc"})

    def subscription_components(self, subscription_id: int) -> list[Json] | None:
        """Return a subscription's components with balances and the last ten periods of events, or None."""
        path = f"/subscriptions/{int(subscription_id)}/components.json"
        found = self._main.read(
            f"list components of subscription {subscription_id}", path, {"include": "historic_usages"}
        )
        return None if found is None else self._rows("list components", found, "component")

    def subscription_component(self, subscription_id: int, component: int | str) -> Json | None:
        """Return one component of a subscription with its `unit_balance`, or None; there also before its first use."""
        path = f"/subscriptions/{int(subscription_id)}/components/{segment(component)}.json"
        found = self._main.read(f"read component {component} of subscription {subscription_id}", path)
        return None if found is None else _unwrapped(found, "component")

    def site_events(self, subscription_id: int, kinds: Sequence[str] = ("metered_usage",)) -> Iterator[Json]:
        """Yield what the site noted about a subscription, the newest first; a usage shows here with some delay.

        A ``metered_usage`` event tells in its `event_specific_data` the memo of the usage and the balance before and
        after it.
        """
        path = f"/subscriptions/{int(subscription_id)}/events.json"
        params: Json = {"filter": ",".join(kinds), "direction": "desc", "per_page": _PER_PAGE}
        call = f"list site events of subscription {subscription_id}"
        while rows := self._numbered(call, self._main.read(call, path, params) or [], "event"):
            yield from rows
            params["max_id"] = min(row["id"] for row in rows) - 1

    def time(self) -> datetime | None:
        """Return the site's own time, as its last answer to this thread said; None before the first one."""
        return self._main.server_time

    def record_event(self, stream: str, body: str) -> None:
        """Record one event, the JSON text of an object, in a stream.

        That it returns proves neither that a subscription matched nor that anything will be billed.
        """
        self._events.write_blind(f"record an event in stream {stream!r}", f"/events/{segment(stream)}.json", body)

    def record_events(self, stream: str, bodies: Sequence[str]) -> None:
        """Record up to 1,000 events, JSON texts of objects, in one request; as `record_event`."""
        call = f"record {len(bodies)} events in stream {stream!r}"
        self._events.write_blind(call, f"/events/{segment(stream)}/bulk.json", f"[{','.join(bodies)}]")

    def _pages(self, call: str, path: str, key: str, params: Mapping[str, Any]) -> Iterator[Json]:
        """Yield the rows of a numbered list, each id once, until a page brings nothing new."""
        seen: set[int] = set()
        page = 1
        while True:
            found = self._main.read(call, path, {**params, "page": page, "per_page": _PER_PAGE})
            if found is None:
                raise self._no_site(call)
            fresh = [row for row in self._numbered(call, found, key) if row["id"] not in seen]
            if not fresh:
                return
            yield from fresh
            seen.update(row["id"] for row in fresh)
            page += 1


def _unwrapped(row: Json, key: str) -> Json:
    inner = row.get(key, row)
    return inner if isinstance(inner, dict) else row


def _usages_path(subscription_id: int, component: int | str) -> str:
    return f"/subscriptions/{int(subscription_id)}/components/{segment(component)}/usages.json"


# --- what both destinations share -----------------------------------------------------------------------------------


def _text(value: object) -> object:
    """YAML reads an id as a number; it is a name all the same."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


_IdOrHandle = Annotated[str, BeforeValidator(_text), Field(pattern=r"^(\d+|handle:[a-z0-9][a-z0-9\-_:.]*)$")]


class _MaxioDestination(Destination):
    """A component of one site, and the subscriptions that use it."""

    connection_type = "maxio"
    kind: str
    """Maxio's name for the kind of component that takes this usage."""

    client: MaxioSite
    settings: Any
    """The settings of the destination at hand: `MaxioMeteredSettings` or `MaxioEventsSettings`."""

    def __init__(self, source: BillingSource, client: MaxioSite) -> None:
        super().__init__(source, client)
        self.settings = source.destination

    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Return the subscription of each account; one that has ended, or lacks the component, is `unknown`."""
        # The component first: at a wrong address everything is a 404, and that makes no account unknown.
        component = self._component
        found = self._subscriptions(accounts)
        return [self._target(account, found[account], component) for account in accounts]

    def _target(self, account: str, subscription: Json | None, component: Json) -> Target:
        if subscription is None:
            return Target(account, unknown=f"subscription {account!r} is unknown to {self.site}")
        if reason := self._unusable(account, subscription, component):
            return Target(account, unknown=reason)
        number = str(subscription["id"])
        return Target(
            account=account,
            subscription=number,
            component=str(component["id"]),
            price_point=self._price_point,
            address=self._address(account, number),
            open_from=_instant(subscription.get("current_period_started_at")),
            open_until=_instant(subscription.get("current_period_ends_at")),
        )

    def _unusable(self, account: str, subscription: Json, component: Json) -> str:
        """Return why usage of this subscription would not be billed, or an empty text."""
        if subscription.get("state") in _ENDED:
            return f"subscription {account!r} is {subscription['state']}: the site would not bill its usage"
        family = ((subscription.get("product") or {}).get("product_family") or {}).get("id")
        if family is not None and family != component.get("product_family_id", family):
            return f"subscription {account!r} belongs to a product family without component {self.settings.component}"
        return ""

    @abstractmethod
    def _address(self, account: str, number: str) -> Json:
        """Return what a request needs to reach the subscription `number`, which `account` named."""

    @abstractmethod
    def _by_id(self) -> bool:
        """Say whether accounts are subscription ids; otherwise they are references."""

    @abstractmethod
    def _own_faults(self, component: Json) -> Iterator[str]:
        """Yield what `check` finds wrong beyond the component itself."""

    @property
    def _price_point(self) -> str:
        """The numeric id of the price point that usage names, as text; empty where it names none."""
        return ""

    @cached_property
    def _component(self) -> Json:
        found = self._read_component()
        if found is None:
            raise Misconfigured(f"billing source {self.source.name!r}: {self._no_component()}")
        return found

    def _read_component(self) -> Json | None:
        kind, _, handle = self.settings.component.partition(":")
        if kind == "handle":
            return self.client.component_by_handle(handle)
        return next((row for row in self.client.components() if str(row["id"]) == self.settings.component), None)

    def _no_component(self) -> str:
        return f"destination.component: {self.site} has no component {self.settings.component!r}"

    def _faults(self) -> Iterator[str]:
        component = self._read_component()
        if component is None:
            yield self._no_component()
            return
        if component["kind"] != self.kind:
            found = f"destination.component: {self.settings.component!r} is of kind {component['kind']}"
            yield f"{found}; {self.name} needs {self.kind}"
        if component.get("archived") or component.get("archived_at"):
            yield f"destination.component: {self.settings.component!r} is archived: the site refuses its usage"
        yield from self._own_faults(component)

    def _subscriptions(self, accounts: Sequence[str]) -> dict[str, Json | None]:
        """Return the subscription of each account, None where the site definitely has none.

        Many accounts are first looked for in the list, as long as that takes fewer requests than asking one by one. The
        list can miss one that was made meanwhile, so only the single look-up says that there is none.
        """
        found: dict[str, Json | None] = {}
        wanted = set(accounts)
        if len(wanted) > _FEW:
            found.update(self._listed(wanted))
        return found | {account: self._single(account) for account in sorted(wanted - found.keys())}

    def _listed(self, wanted: set[str]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        twice: set[str] = set()
        for row in islice(self.client.subscriptions(), _PER_PAGE * (len(wanted) // 4)):
            account = str(row["id"]) if self._by_id() else str(row.get("reference") or "")
            if account not in wanted:
                continue
            if account in found:
                twice.add(account)
            found[account] = row
            if len(found) == len(wanted) and self._by_id():
                break
        return {account: row for account, row in found.items() if account not in twice}

    def _single(self, account: str) -> Json | None:
        if self._by_id():
            return self.client.subscription(int(account)) if account.isascii() and account.isdigit() else None
        found = self.client.subscription_by_reference(account) if account else None
        # A look-up that is not exact would bill somebody else.
        return found if found is not None and found.get("reference") == account else None


def _instant(text: object) -> datetime | None:
    """Return a moment that the site tells, or None if it tells none that can be read."""
    try:
        return datetime.fromisoformat(str(text)).astimezone(UTC)
    except ValueError:
        return None


# --- metered components ---------------------------------------------------------------------------------------------


def _memo(template: str) -> str:
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if unknown := fields - {"period"}:
        raise ValueError(f"unknown field {{{min(unknown)}}}; only {{period}} is filled in")
    return template


class MaxioMeteredSettings(DestinationSettings):
    """The keys of a source that is billed to a metered component.

    `subscription_by` says what the account column holds; `component` and `price_point` are an id or
    ``handle:<handle>``; `memo` is what the site shows for a usage, after the token.
    """

    free: ClassVar[frozenset[str]] = DestinationSettings.free | {"memo"}

    name: Literal["maxio_metered"]
    subscription_by: Literal["id", "reference"]
    component: _IdOrHandle
    price_point: _IdOrHandle | None = None
    memo: Annotated[str, AfterValidator(_memo)] = "{period}"


class MaxioMetered(_MaxioDestination):
    """Usage of a metered component: one request per delivery, the token in front of the memo.

    The site knows no timestamp, no edit and no delete, and its balance never falls below 0.
    """

    name = "maxio_metered"
    settings_model = MaxioMeteredSettings
    kind = "metered_component"
    chunk_size = 1
    # The 60-minute token is a belt only: whether usages honour it is not documented, and its 409 tells no outcome.
    replay_window = timedelta(0)

    def _target(self, account: str, subscription: Json | None, component: Json) -> Target:
        # A usage has no date: it lands in whatever period is open, so the end of one closes nothing.
        return replace(super()._target(account, subscription, component), open_until=None)

    def hold_reason(self, proposals: pd.DataFrame) -> pd.Series:
        """Hold nothing by itself: how much of a deduction the balance takes is for `judge` to ask."""
        return pd.Series("", index=proposals.index, dtype=object)

    def judge(self, proposals: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        """Let a deduction go only as far as the balance takes it: the site keeps 0 and forgets the rest.

        What the same plan adds to a subscription is sent first, so it counts as balance already.
        """
        goes = proposals["quantity"].to_numpy(dtype=object, copy=True)
        why = self.hold_reason(proposals).to_numpy(copy=True)
        subscriptions, components = proposals["subscription"].to_numpy(), proposals["component"].to_numpy()
        minus = negative(proposals["quantity"])
        room: dict[tuple[str, str], Decimal] = {}
        unfit: dict[tuple[str, str], str] = {}
        for place in np.flatnonzero(minus):
            key = (subscriptions[place], components[place])
            if key not in room:
                added = goes[~minus & (subscriptions == key[0]) & (components == key[1])]
                room[key] = self._balance(*map(int, key)) + sum(map(Decimal, added), Decimal(0))
                unfit[key] = self._unfit_for_deductions(int(key[0]))
            part = self._measured(min(-Decimal(goes[place]), room[key]))
            why[place] = unfit[key] or ("" if part > 0 else _NO_BALANCE)
            if not why[place]:
                room[key] -= part
                goes[place] = f"{-part:f}"
        return pd.Series(goes, proposals.index, object), pd.Series(why, proposals.index, object)

    def lock(self, delivery: Delivery) -> str:
        """Send the deductions of one balance one after the other, whichever source they come from."""
        if delivery.quantity > 0:
            return ""
        where = delivery.address
        return f"floor:{self.site}:{where['subscription_id']}:{where['component_id']}"

    def recheck(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Hold a deduction that the balance does not take whole, or that a renewal could overtake."""
        found = {one.token: self._why_no_deduction(one) for one in deliveries if one.quantity < 0}
        return {token: why for token, why in found.items() if why}

    def _why_no_deduction(self, delivery: Delivery) -> str:
        where = delivery.address
        if why := self._unfit_for_deductions(where["subscription_id"]):
            return why
        balance = self._balance(where["subscription_id"], where["component_id"])
        return "" if balance >= -delivery.quantity else f"{_NO_BALANCE} (it is {balance})"

    def _unfit_for_deductions(self, subscription_id: int) -> str:
        subscription = self.client.subscription(subscription_id)
        if subscription is None or subscription.get("state") in _ENDED:
            return "a deduction waits: its subscription has ended, so there is no balance to take it from"
        # A balance is reset when the site renews, and it is the site's clock that decides about that.
        ends, now = _instant(subscription.get("current_period_ends_at")), self.client.time()
        if ends is None or now is None or now >= ends - self.settle_after:
            return f"a deduction waits for the renewal: the billing period ends at {ends}"
        return ""

    def _balance(self, subscription_id: int, component_id: int) -> Decimal:
        found = self.client.subscription_component(subscription_id, component_id) or {}
        return exact_number(found.get("unit_balance")) or Decimal(0)

    def encode(self, proposals: pd.DataFrame) -> pd.Series:
        """Return the body of a create-usage request: the token is the first word of the memo, and on the top level."""
        point = by_value(
            proposals["price_point"].fillna(""), lambda number: f',"price_point_id":"{number}"' if number else ""
        )
        token = proposals["token"]
        quantity = proposals["quantity"]
        memo = self._memos(proposals)
        return joined(
            '{"uniqueness_token":"', token, '","usage":{"quantity":', quantity, point, ',"memo":"', token, memo, '"}}'
        )

    def _memos(self, proposals: pd.DataFrame) -> pd.Series:
        """Return what follows the token, as the inside of a JSON text, cut so that the token never is."""
        columns = ["period_start", "period_end"]
        spans = proposals[columns].drop_duplicates()
        texts = [
            self._memo_text(start, end) for start, end in zip(spans["period_start"], spans["period_end"], strict=True)
        ]
        which = proposals.groupby(columns, sort=False).ngroup().to_numpy()
        return pd.Series(np.array(texts, dtype=object)[which], index=proposals.index, dtype=object)

    def _memo_text(self, start: datetime, end: datetime) -> str:
        text = self.settings.memo.format(period=self._period_text(start, end))
        rest = f" {' '.join(text.split())}".rstrip()[: _MEMO_LENGTH - _TOKEN_LENGTH]
        return json.dumps(rest)[1:-1]

    def _period_text(self, start: datetime, end: datetime) -> str:
        zone, kind = self.source.settings.timezone, self.source.settings.period
        first, after = start.astimezone(zone), end.astimezone(zone)
        # The offset tells the two hours apart that autumn gives the same name.
        names = {"hour": f"{first:%Y-%m-%d %H:%M%z}", "day": f"{first:%Y-%m-%d}", "month": f"{first:%Y-%m}"}
        return names.get(kind, f"{first:%Y-%m-%d %H:%M} to {after:%Y-%m-%d %H:%M}")

    def send(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Create one usage; one that comes back with another quantity is in doubt, and so is an unproven deduction."""
        (delivery,) = chunk
        address = delivery.address
        usage = self.client.create_usage(address["subscription_id"], address["component_id"], delivery.body)
        try:
            found = self._receipt(delivery, usage)
        except UsageBillingError as failure:
            raise InDoubt(f"{failure}; a deduction was taken, how much of it counted could not be asked") from failure
        if not isinstance(found, Receipt):
            # It was applied. Settling will find it, with its proof, or with another quantity and report that.
            words = found or "the site does not show yet how much of the deduction counted"
            raise InDoubt(f"{self.site}: {words}", taken=True)
        return [found]

    def settle(self, doubts: Sequence[Delivery], now: datetime) -> Mapping[str, Answer]:
        """Look for each token in the usages of its stored address.

        The whole list is walked, never a window of dates: with two clocks apart, a window could hide what was billed.

        A usage that is not there was not applied, so None, and it may be sent again. Not so soon if the last answer was
        a 409 to the site's 60-minute token, since no document tells whether each try renews the 60 minutes: then it
        stays in doubt for 61 minutes after the last send.
        """
        found: dict[str, Answer] = {}
        for (subscription_id, component_id), some in _by_address(doubts).items():
            usages = self.client.usages(subscription_id, component_id)
            if usages is None:
                continue  # A subscription that is gone answers nothing about what it was billed.
            held = _first_with_token(usages, set(some))
            for token, doubt in some.items():
                if token in held:
                    answer = self._receipt(doubt, held[token], "found in the list of usages")
                    if answer is not None:
                        found[token] = answer
                elif not _would_meet_its_token(doubt, now):
                    found[token] = None
        return found

    def _receipt(self, delivery: Delivery, usage: Json, note: str = "") -> Receipt | Refused | None:
        """Return the receipt of a usage that the site holds, or what is wrong with it; None while it is not proven.

        A site may store a deduction as sent or clipped at the floor; what counted, its site event tells.
        """
        number, stored = str(usage["id"]), _quantity(usage)
        if delivery.quantity > 0:
            return Receipt(delivery.token, number, note) if stored == delivery.quantity else _another(delivery, usage)
        counted = self._counted(delivery)
        if counted is None:
            return None
        if not delivery.quantity <= counted <= 0 or counted != self._measured(counted):
            words = f"usage {number}: a deduction of {delivery.quantity} moved the balance by {counted}"
            return Refused(f"stored with another quantity: {words} (token {delivery.token})")
        if stored not in (delivery.quantity, counted):
            return _another(delivery, usage)
        return Receipt(delivery.token, number, note, None if counted == delivery.quantity else counted)

    def _measured(self, quantity: Decimal) -> Decimal:
        """Return a quantity cut to the decimal places of the meter: nothing finer can be billed or taken back."""
        return quantity.quantize(Decimal(1).scaleb(-self.source.settings.meter.decimals), ROUND_DOWN)

    def _counted(self, delivery: Delivery) -> Decimal | None:
        """Return by how much a deduction moved the balance, 0 or less; None while the site does not show it."""
        for event in self.client.site_events(delivery.address["subscription_id"]):
            data = _unwrapped(event, "event_specific_data")
            if _token_of(data) == delivery.token:
                after = exact_number(data.get("new_unit_balance"))
                before = exact_number(data.get("previous_unit_balance"))
                return None if after is None or before is None else after - before
            if _long_before(event, delivery):
                break
        return None

    def records(self, deliveries: pd.DataFrame) -> Iterator[SiteRecord]:
        """Yield the usages from the oldest of `deliveries` on: a usage does not know its usage period."""
        known = deliveries.assign(number=pd.to_numeric(deliveries["record_id"].replace("", None)).astype("Int64"))
        for address, some in known.groupby("address"):
            where = json.loads(str(address))
            since = None if some["number"].isna().any() else int(some["number"].min())
            for usage in self.client.usages(where["subscription_id"], where["component_id"], since) or ():
                memo = str(usage.get("memo") or "")
                shown = memo.partition(" ")[2] if (token := _token_of(usage)) else memo
                if (quantity := _quantity(usage)) is None:
                    raise NotApplied(f"{self.site}: list usages: usage {usage['id']} has no readable quantity")
                yield SiteRecord(token, str(usage["id"]), quantity, shown)

    def _address(self, account: str, number: str) -> Json:
        return {"subscription_id": int(number), "component_id": self._component["id"]}

    def _by_id(self) -> bool:
        return bool(self.settings.subscription_by == "id")

    def _read_price_point(self, component: Json) -> Json | None:
        live = (point for point in self.client.price_points(component["id"]) if not point.get("archived_at"))
        wanted = self.settings.price_point
        return next((point for point in live if wanted in (str(point["id"]), f"handle:{point.get('handle')}")), None)

    @cached_property
    def _price_point(self) -> str:
        if self.settings.price_point is None:
            return ""
        found = self._read_price_point(self._component)
        if found is None:
            raise Misconfigured(f"billing source {self.source.name!r}: {self._no_price_point()}")
        return str(found["id"])

    def _no_price_point(self) -> str:
        component, wanted = self.settings.component, self.settings.price_point
        return f"destination.price_point: component {component!r} has no price point {wanted!r}"

    def _own_faults(self, component: Json) -> Iterator[str]:
        decimals = self.source.settings.meter.decimals
        if decimals and not component.get("allow_fractional_quantities"):
            # The site truncates 5.5 to 5 without a word, or refuses it; which of the two is not documented for the API.
            yield (
                f"meter.decimals: is {decimals}, and component {self.settings.component!r} takes whole numbers only; "
                "allow fractional quantities on the component, or measure in smaller units"
            )
        if self.settings.price_point is not None and self._read_price_point(component) is None:
            yield self._no_price_point()


def _quantity(usage: Json) -> Decimal | None:
    """Return a usage's quantity, which comes as a number or as text; None if it is neither."""
    return exact_number(usage.get("quantity"))


def _token_of(usage: Json) -> str:
    first = str(usage.get("memo") or "").partition(" ")[0]
    return first if _TOKEN.fullmatch(first) else ""


def _first_with_token(usages: Iterator[Json], tokens: set[str]) -> dict[str, Json]:
    """Return the first usage of each token; the walk ends when all are found."""
    held: dict[str, Json] = {}
    for usage in usages:
        if (token := _token_of(usage)) in tokens:
            held.setdefault(token, usage)
            if len(held) == len(tokens):
                break
    return held


def _by_address(doubts: Sequence[Delivery]) -> dict[tuple[int, int], dict[str, Delivery]]:
    groups: dict[tuple[int, int], dict[str, Delivery]] = {}
    for doubt in doubts:
        key = (doubt.address["subscription_id"], doubt.address["component_id"])
        groups.setdefault(key, {})[doubt.token] = doubt
    return groups


def _would_meet_its_token(doubt: Delivery, now: datetime) -> bool:
    """Say whether the site met the token within the hour; a lost 409 is no harm, the next one is told."""
    return _MET_WITHIN_THE_HOUR in doubt.reason and doubt.sent_at is not None and now < doubt.sent_at + _TOKEN_HONOURED


def _another(delivery: Delivery, usage: Json) -> Refused:
    stored = _quantity(usage)
    held = "no readable quantity" if stored is None else stored
    return Refused(
        f"stored with another quantity: usage {usage['id']} holds {held}, "
        f"not {delivery.quantity} (token {delivery.token})"
    )


def _long_before(event: Json, delivery: Delivery) -> bool:
    """Say whether an event is so old that those before it cannot be of this delivery, even with clocks apart."""
    noted, sent = _instant(event.get("created_at")), delivery.sent_at
    return noted is not None and sent is not None and noted < sent - timedelta(days=1)


# --- events ---------------------------------------------------------------------------------------------------------


class MaxioEventsSettings(DestinationSettings):
    """The keys of a source that is billed as events of a stream.

    `subscription_by` is the stream's Subscription Identifier: ``subscription_id``, ``subscription_reference``, or the
    name of a property whose value is the subscription's reference. `property` holds the quantity. `mode` says what an
    event is: ``totals`` for one usage total, whose correction is a signed difference, or ``events`` for one row of
    ``usage.sql``, as it is. `metric` says what the metric behind `component` computes of the events; totals need a sum.
    No API tells the metric's formula, so nobody but you can check that.
    """

    free: ClassVar[frozenset[str]] = DestinationSettings.free | {"metric"}

    name: Literal["maxio_events"]
    stream: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    subscription_by: str = Field(min_length=1)
    component: _IdOrHandle
    property: str = Field(min_length=1)
    mode: Literal["totals", "events"] = "totals"
    metric: Literal["sum", "count", "maximum", "minimum", "average", "unique", "percentile"] = "sum"

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


class MaxioEvents(_MaxioDestination):
    """Usage as events of a stream, a thousand to a request, each with its token.

    In mode ``totals`` a delivery is an event at the start of its usage period. In mode ``events`` a delivery is a chunk
    of rows, each an event at its own time, which the archive keeps: one delivery then makes one request.
    """

    name = "maxio_events"
    settings_model = MaxioEventsSettings
    kind = "event_based_component"
    chunk_size = 1000
    retry_chunk_size = 1000
    # The documentation says 31 days; a day is left for clocks and for the time that the request took.
    replay_window = timedelta(days=30)

    def __init__(self, source: BillingSource, client: MaxioSite) -> None:
        super().__init__(source, client)
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
            event = json.loads(delivery.body)["chargify"]
            return {str(delivery.address["account"]): datetime.fromisoformat(event["timestamp"])}
        first = self._chunk(delivery).group_by("account").aggregate([("time", "min")])
        return dict(zip(first.column("account").to_pylist(), first.column("time_min").to_pylist(), strict=True))

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
