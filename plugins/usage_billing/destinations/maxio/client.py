"""The client of a Maxio site: how to reach it, and the calls that usage needs, on its main API and its events host.

Paths, limits and the meaning of replies follow Maxio's public API reference: "Subscription Components" (usages),
"Events-Based Billing", "Duplicate Prevention" and "API Access: Error Handling".
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from usage_billing.destinations.exact import exact_json, exact_number
from usage_billing.destinations.http import (
    JSON,
    Effect,
    Form,
    HttpClient,
    Outcome,
    Transport,
    record_number,
    segment,
)
from usage_billing.destinations.maxio.markup import exact_xml, request_xml
from usage_billing.destinations.settings import SiteSettings, Timeouts, url_faults, whole_number
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused

Json = dict[str, Any]

XML = Form("XML", "application/xml", exact_xml)
_FORMS = {"json": JSON, "xml": XML}
_EVENTS_URL = "https://events.chargify.com"
_VENDOR_HOSTS = {"us": "chargify.com", "eu": "ebilling.maxio.com"}
PER_PAGE = 200
"""How many rows a page of a list is asked to hold."""

MET_WITHIN_THE_HOUR = "the site has met this token within the hour, and does not say what became of it"
"""What a doubt says that came of a 409: by these words it is known again when it is settled."""


class _Sentence(Outcome):
    """A row that speaks of replies whose text begins with its words: amid a text they may tell of one record."""

    def fits(self, status: int, effect: Effect, text: str) -> bool:
        """Say whether this row speaks of the reply."""
        return super().fits(status, effect, text) and text.lower().startswith(self.words.lower())


_CONFLICT = Outcome((409,), InDoubt, (Effect.WRITE,), mend=MET_WITHIN_THE_HOUR)
_SITE_WIDE = tuple(
    _Sentence((422,), Misconfigured, words=words, mend="this concerns the whole site, not this request")
    for words in (
        "Your Chargify account has been canceled.",
        "Your trial has ended, please contact sales",
        "Site data clearing is in progress.",
        "This site has been deleted.",
    )
)
_NO_STREAM = Outcome(
    (404,), Misconfigured, (Effect.WRITE, Effect.BULK), mend="the events host knows no such stream or site"
)
# One subscription's renewal may not be there to be previewed; that is no fault of the site or of the source.
_NO_PREVIEW = Outcome((422,), Refused, (Effect.READ,))
# By its size alone, before anybody looks into it.
_TOO_LARGE = Outcome((413,), Refused, (Effect.BULK,))


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

    A subscription is a number, its id, or where the calls for usages are concerned also a text, its reference. The site
    takes one of digits alone for an id, so it is refused here: look it up. Components are an id or ``handle:<handle>``.

    Example::

        site = MaxioSite(MaxioSettings(subdomain="acme", api_key="..."))
        site.create_usage("acct-0001", "handle:api-calls", usage_body(3, memo="October"))
        for usage in site.usages("acct-0001", "handle:api-calls") or ():
            print(usage["created_at"], usage["quantity"])

    Every method raises `Misconfigured` or `NotApplied`; those that write also `Refused` or `InDoubt`.
    """

    def __init__(
        self,
        settings: MaxioSettings,
        transport: Transport = Transport(),  # noqa: B008 - frozen.
        *,
        response_format: Literal["json", "xml"] = "json",
    ) -> None:
        """Prepare; `transport` stands for network and time.

        With ``response_format="xml"`` usages are created and listed, and components listed, in the site's older format;
        what goes in and comes out here is the same.
        """
        self.settings = settings
        self._form = _FORMS[response_format]
        key = (settings.api_key, "x")
        shared: Json = {"timeouts": settings.timeouts, "concurrency": settings.concurrency, "transport": transport}
        self._main = HttpClient(settings.site, settings.base_url, key, outcomes=(*_SITE_WIDE, _CONFLICT), **shared)
        events_url = f"{settings.events_url}/{settings.subdomain}"
        of_events = (*_SITE_WIDE, _NO_STREAM, _TOO_LARGE)
        self._events = HttpClient(settings.site, events_url, key, outcomes=of_events, **shared)

    def read_site(self) -> Json:
        """Return the site's own settings; the cheapest proof that address and key are right."""
        found = self._main.read("read the site", "/site.json")
        if found is None:
            raise self._no_site("read the site")
        return self._object("read the site", found, "site")

    def _no_site(self, call: str, else_no: str = "") -> Misconfigured:
        where = f"{else_no and f'{else_no}, or no '}Maxio site at {self.settings.base_url}"
        return Misconfigured(f"{self.settings.site}: {call}: HTTP 404: there is no {where}")

    def create_usage(self, subscription: int | str, component: int | str, body: str) -> Json:
        """Record one usage; `body` is the JSON text of the request (see `usage_body`), and the usage comes back.

        The site takes no timestamp: the usage lands in the billing period that is open when it arrives. A top-level
        ``uniqueness_token`` makes it refuse a second body with 409 for 60 minutes, where it is honoured.
        """
        call = f"create usage of component {component} for subscription {subscription}"
        path = self._usages_path(subscription, component)
        if self._form is XML:
            path, body = self._marked_up(call, path, body)
        reply = self._main.write(call, path, body, form=self._form)
        usage = reply.get("usage") if isinstance(reply, dict) else None
        if not isinstance(usage, dict) or record_number(usage.get("id")) is None:
            raise InDoubt(f"{self.settings.site}: {call}: success, but no usage in the reply")
        return usage

    def _marked_up(self, call: str, path: str, body: str) -> tuple[str, str]:
        """Return path and body of a request as XML, whose token stands in the path."""
        try:
            content = exact_json(body)
            token = content.pop("uniqueness_token", None) if isinstance(content, dict) else None
            text = request_xml(content)
        except ValueError as error:
            raise Misconfigured(f"{self.settings.site}: {call}: the body is no JSON of a usage: {error}") from None
        return (path if token is None else f"{path}?uniqueness_token={segment(token)}"), text

    def usages(
        self,
        subscription: int | str,
        component: int | str,
        since_id: int | None = None,
        max_id: int | None = None,
        since_date: date | None = None,
        until_date: date | None = None,
        created_at: date | None = None,
    ) -> Iterator[Json] | None:
        """Yield all usages within the bounds, each once; None if there is no such subscription or component.

        `since_id` and `max_id` are ids of usages, both included. Days are of the site's own zone, and bound by when the
        site stored a usage: from the midnight with which `since_date` begins to that with which `until_date` begins.
        `created_at` is an older filter for one day, which the site may know no more: what it lets through is looked
        through here. Pages are cut by id and not by number, so usage that arrives meanwhile shifts nothing. Neither the
        order of the list nor its size of page is documented: this works with either order and ends at an empty page.
        """
        path = self._usages_path(subscription, component)
        more = _days(since_date=since_date, until_date=until_date, created_at=created_at)
        first = self._usage_page(path, since_id, max_id, more)
        if first is None:
            return None
        found = self._walk(path, since_id, max_id, more, first)
        return found if created_at is None else (usage for usage in found if _is_of(usage, created_at))

    def usage_page(
        self,
        subscription: int | str,
        component: int | str,
        page: int = 1,
        per_page: int = PER_PAGE,
        since_date: date | None = None,
        until_date: date | None = None,
    ) -> list[Json] | None:
        """Return one numbered page of the usages, None if there is no such subscription or component.

        The site gives 200 a page at most. Usage that arrives between two pages shifts them: to see each once, walk
        through `usages`.
        """
        days = _days(since_date=since_date, until_date=until_date)
        params = {"page": page, "per_page": per_page, **days}
        found = self._main.read("list usages", self._usages_path(subscription, component), params, form=self._form)
        return None if found is None else self._numbered("list usages", found, "usage")

    def _usages_path(self, subscription: int | str, component: int | str) -> str:
        """Return the path of usages.

        Raises:
            Misconfigured: a reference that the site would take for an id, or a path for another one.
        """
        if isinstance(subscription, str) and (subscription.isdigit() or subscription in ("", ".", "..")):
            why = f"subscription {subscription!r}: no path can name it by this reference; look it up, and give its id"
            raise Misconfigured(f"{self.settings.site}: {why}")
        return f"/subscriptions/{segment(subscription)}/components/{segment(component)}/usages.{self._suffix}"

    @property
    def _suffix(self) -> str:
        return self._form.name.lower()

    def _walk(
        self, path: str, since_id: int | None, max_id: int | None, more: Json, first: list[Json]
    ) -> Iterator[Json]:
        yield from first
        lowest = min((usage["id"] for usage in first), default=0)
        highest = max((usage["id"] for usage in first), default=0)
        while first:
            page = self._next_page(path, since_id, lowest - 1, more)
            fresh = [usage for usage in page if usage["id"] < lowest]
            if not fresh:
                break
            yield from fresh
            lowest = min(usage["id"] for usage in fresh)
        while first and (max_id is None or highest < max_id):
            page = self._next_page(path, highest + 1, max_id, more)
            fresh = [usage for usage in page if usage["id"] > highest]
            if not fresh:
                break
            yield from fresh
            highest = max(usage["id"] for usage in fresh)

    def _next_page(self, path: str, since_id: int | None, max_id: int | None, more: Json) -> list[Json]:
        page = self._usage_page(path, since_id, max_id, more)
        if page is None:
            # The list was there a moment ago: its end would be a guess, and a guessed end bills twice.
            raise NotApplied(f"{self.settings.site}: list usages: HTTP 404 in the middle of the list")
        return page

    def _usage_page(self, path: str, since_id: int | None, max_id: int | None, more: Json) -> list[Json] | None:
        bounds = {"since_id": since_id, "max_id": max_id}
        params = {"per_page": PER_PAGE} | {name: value for name, value in bounds.items() if value is not None} | more
        found = self._main.read("list usages", path, params, form=self._form)
        return None if found is None else self._numbered("list usages", found, "usage")

    def _rows(self, call: str, found: object, key: str) -> list[Json]:
        """Return the rows of a list; only a list, empty or not, says what there is."""
        rows = found.get(key) if isinstance(found, dict) else found
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise NotApplied(f"{self.settings.site}: {call}: the answer is no list of objects")
        return [unwrapped(row, key) for row in rows]

    def _numbered(self, call: str, found: object, key: str, names: str = "id") -> list[Json]:
        """Return the rows of a list with what `names` each of them as a number: by these a walk knows where it is."""
        numbers = [(whole_number(row.get(names), 0), row) for row in self._rows(call, found, key)]
        if any(number is None for number, _ in numbers):
            raise self._unreadable(call, f"a row has no {names} that is a number")
        return [{**row, names: number} for number, row in numbers]

    def _object(self, call: str, found: object, key: str, names: str = "id", **asked: object) -> Json:
        """Return the single object that an answer holds under `key`, with what `names` it as a number.

        Only a 404 says that there is none. A 200 that holds errors, no such object, or another one than was `asked`
        for, says nothing about the one that was.

        Raises:
            NotApplied: the answer is none.
        """
        inner = found.get(key) if isinstance(found, dict) and not found.get("errors") else None
        number = whole_number(inner.get(names), 0) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or number is None:
            raise self._unreadable(call, f"the answer holds no {key} with an {names} that is a number")
        one = {**inner, names: number}
        if others := [name for name, value in asked.items() if one.get(name) != value]:
            raise self._unreadable(call, f"the answer is about a {key} with another {others[0]}")
        return one

    def _unreadable(self, call: str, why: str) -> NotApplied:
        return NotApplied(f"{self.settings.site}: {call}: {why}")

    def component_by_handle(self, handle: str) -> Json | None:
        """Return the component with a handle, or None."""
        call = f"look up component {handle!r}"
        found = self._main.read(call, "/components/lookup.json", {"handle": handle})
        return None if found is None else self._kind_told(call, self._object(call, found, "component", handle=handle))

    def components(self, family: int | str | None = None) -> Iterator[Json]:
        """Yield the components of the site, or of one product family (an id or ``handle:<handle>``), archived ones too.

        Raises:
            Misconfigured: there is no such family.
        """
        call, path, else_no = "list components", "/components", ""
        if family is not None:
            call, path = f"list components of family {family}", f"/product_families/{segment(family)}/components"
            else_no = "such family"
        path = f"{path}.{self._suffix}"
        rows = self._pages(call, path, "component", {"include_archived": "true"}, else_no, self._form)
        return (self._kind_told(call, row) for row in rows)

    def component(self, family: int | str, component: int | str) -> Json | None:
        """Return one component of a product family, both an id or ``handle:<handle>``, or None."""
        call = f"read component {component} of family {family}"
        found = self._main.read(call, f"/product_families/{segment(family)}/components/{segment(component)}.json")
        if found is None:
            return None
        asked: Json = {"id": component} if isinstance(component, int) else {}
        return self._kind_told(call, self._object(call, found, "component", **asked))

    def _kind_told(self, call: str, component: Json) -> Json:
        """Return a component that says of what kind it is, in a word."""
        if not isinstance(component.get("kind"), str):
            raise self._unreadable(call, f"component {component['id']} has no readable kind")
        return component

    def price_points(self, component_id: int) -> Iterator[Json]:
        """Yield the price points of a component."""
        path = f"/components/{segment(component_id)}/price_points.json"
        return self._pages("list price points", path, "price_points", {})

    def price_point(self, component_id: int, name: int | str) -> Json | None:
        """Return the price point of a component with an id (also as text) or ``handle:<handle>``, or None.

        An archived one is none: the site takes no usage at it.
        """
        live = (point for point in self.price_points(component_id) if not point.get("archived_at"))
        return next((one for one in live if str(name) in (str(one["id"]), f"handle:{one.get('handle')}")), None)

    def subscription(self, subscription_id: int) -> Json | None:
        """Return one subscription, or None."""
        call = f"read subscription {subscription_id}"
        found = self._main.read(call, f"/subscriptions/{int(subscription_id)}.json")
        if found is None:
            return None
        return self._standing(call, self._object(call, found, "subscription", id=int(subscription_id)))

    def subscription_by_reference(self, reference: str) -> Json | None:
        """Return the subscription with a reference, or None.

        A reply about another reference, however alike, is no answer: taking it would bill somebody else, and calling
        the account unknown would be a guess about how the site compares.
        """
        call = f"look up subscription {reference!r}"
        found = self._main.read(call, "/subscriptions/lookup.json", {"reference": reference})
        if found is None:
            return None
        return self._standing(call, self._object(call, found, "subscription", reference=reference))

    def subscriptions(self, **filters: object) -> Iterator[Json]:
        """Yield the subscriptions of the site, oldest first, so that new ones shift no page.

        `filters` are those of the site, such as ``state="active"``.
        """
        call = "list subscriptions"
        rows = self._pages(call, "/subscriptions.json", "subscription", {"direction": "asc", **filters})
        return (self._standing(call, row) for row in rows)

    def _standing(self, call: str, subscription: Json) -> Json:
        """Return a subscription that tells how it stands: its state, its billing period, its family; in what is read.

        A period or a product may be absent, and is never half there or of another type.
        """
        product = subscription.get("product") or {}
        family = product.get("product_family") or {} if isinstance(product, dict) else None
        bounds = [subscription.get(f"current_period_{edge}_at") for edge in ("started", "ends")]
        told = isinstance(subscription.get("state"), str) and isinstance(family, dict)
        if not told or (bounds != [None, None] and not _is_span(*bounds)):
            raise self._unreadable(call, f"subscription {subscription['id']} does not tell how it stands")
        return subscription

    def subscription_components(self, subscription_id: int) -> list[Json] | None:
        """Return a subscription's components with balances and the last ten periods of events, or None."""
        path = f"/subscriptions/{int(subscription_id)}/components.json"
        call = f"list components of subscription {subscription_id}"
        found = self._main.read(call, path, {"include": "historic_usages"})
        if found is None:
            return None
        return [self._counted(call, row) for row in self._numbered(call, found, "component", "component_id")]

    def subscription_component(self, subscription_id: int, component: int | str) -> Json | None:
        """Return one component of a subscription with its `unit_balance`, or None; there also before its first use."""
        path = f"/subscriptions/{int(subscription_id)}/components/{segment(component)}.json"
        call = f"read component {component} of subscription {subscription_id}"
        found = self._main.read(call, path)
        if found is None:
            return None
        asked = {"component_id": component} if isinstance(component, int) else {}
        return self._counted(call, self._object(call, found, "component", "component_id", **asked))

    def _counted(self, call: str, row: Json) -> Json:
        """Return a subscription's component whose figures are figures, as far as its kind has any."""
        balance, past = row.get("unit_balance"), row.get("historic_usages") or []
        sound = balance is None or exact_number(balance) is not None
        if not sound or not isinstance(past, list) or not all(map(_is_past, past)):
            raise self._unreadable(call, f"component {row['component_id']} has a figure that is none")
        return row

    def activate(self, subscription_id: int, component_id: int, body: str = "{}") -> None:
        """Have a subscription's events of one component billed at its renewals; `activation_body` says at what price.

        Raises:
            Refused: there is no such subscription, or no events-based component with this id for it.
        """
        self._activation("activate", subscription_id, component_id, body)

    def deactivate(self, subscription_id: int, component_id: int) -> None:
        """Have a subscription's events of one component ignored at its renewals; the site stores them all the same."""
        self._activation("deactivate", subscription_id, component_id, "{}")

    def _activation(self, verb: str, subscription_id: int, component_id: int, body: str) -> None:
        path = f"/event_based_billing/subscriptions/{int(subscription_id)}/components/{int(component_id)}/{verb}.json"
        self._main.write_blind(f"{verb} component {component_id} of subscription {subscription_id}", path, body)

    def renewal_components(self, subscription_id: int) -> frozenset[str]:
        """Return the ids of the components, as text, for which the preview of the next renewal has a line.

        Raises:
            Refused: the site previews no renewal of this subscription; it may end, or be gone.
        """
        return frozenset(str(row.get("component_id")) for row in self._renewal_lines(subscription_id, "{}"))

    def renewal_cents(
        self, subscription_id: int, component_id: int, quantity: int, price_point: str = ""
    ) -> int | None:
        """Return what the next renewal would charge for one component, in cents, if its quantity were `quantity`.

        Of a metered component that is its balance. The site documents whole numbers only. None where it shows no line
        for the component.

        Raises:
            Refused: as `renewal_components`.
        """
        supposed: Json = {"component_id": int(component_id), "quantity": quantity}
        if price_point:
            supposed["price_point_id"] = int(price_point)
        lines = self._renewal_lines(subscription_id, json.dumps({"components": [supposed]}))
        amounts = [row.get("amount_in_cents") for row in lines if str(row.get("component_id")) == str(component_id)]
        cents = [amount for amount in amounts if isinstance(amount, int) and not isinstance(amount, bool)]
        if len(cents) != len(amounts):
            call = f"preview the renewal of subscription {subscription_id}"
            raise self._unreadable(call, "an amount is no whole number of cents")
        return sum(cents) if cents else None

    def _renewal_lines(self, subscription_id: int, body: str) -> list[Json]:
        call = f"preview the renewal of subscription {subscription_id}"
        path = f"/subscriptions/{int(subscription_id)}/renewals/preview.json"
        found = self._main.read(call, path, body=body, also=(_NO_PREVIEW,))
        if found is None:
            raise Refused(f"{self.settings.site}: {call}: HTTP 404: the subscription is gone")
        preview = found.get("renewal_preview") if isinstance(found, dict) and not found.get("errors") else None
        if not isinstance(preview, dict):
            raise self._unreadable(call, "the answer is no preview")
        return list(self._rows(call, preview, "line_items"))

    def site_events(
        self, subscription_id: int | None = None, kinds: Sequence[str] = ("metered_usage",)
    ) -> Iterator[Json]:
        """Yield what the site noted, about one subscription or all, the newest first; a usage shows with some delay.

        A ``metered_usage`` event tells in its `event_specific_data` the memo of the usage and the balance before and
        after it.
        """
        whose = "" if subscription_id is None else f"/subscriptions/{int(subscription_id)}"
        path = f"{whose}/events.json"
        params: Json = {"filter": ",".join(kinds), "direction": "desc", "per_page": PER_PAGE}
        call = "list site events" + (whose and f" of subscription {subscription_id}")
        lowest: int | None = None
        while (found := self._main.read(call, path, params)) is not None:
            rows = [row for row in self._numbered(call, found, "event") if lowest is None or row["id"] < lowest]
            if not rows:
                return
            yield from rows
            lowest = min(row["id"] for row in rows)
            params["max_id"] = lowest - 1
        if subscription_id is None:
            raise self._no_site(call)

    def count_site_events(self, kinds: Sequence[str] = ("metered_usage",)) -> int:
        """Return how many events of these kinds the site has noted."""
        call = "count site events"
        found = self._main.read(call, "/events/count.json", {"filter": ",".join(kinds)})
        number = whole_number(found.get("count"), 0) if isinstance(found, dict) else None
        if number is None:
            raise self._unreadable(call, "the answer holds no count")
        return number

    def balances(self, subscription_ids: Sequence[int] = ()) -> Iterator[Json]:
        """Yield the components of up to 200 subscriptions, or of all, with balances; they may lag behind."""
        call, path, key = (
            "list components of subscriptions",
            "/subscriptions_components.json",
            "subscriptions_components",
        )
        params = {"subscription_ids": ",".join(map(str, subscription_ids))} if subscription_ids else {}
        return (self._counted(call, row) for row in self._pages(call, path, key, params))

    def invoices(self, subscription_id: int | None = None) -> Iterator[Json]:
        """Yield invoices with their lines, the oldest first, so that new ones shift no page."""
        call = "list invoices"
        whose = {} if subscription_id is None else {"subscription_id": int(subscription_id)}

        def read(found: object) -> list[Json]:
            return [self._invoice(call, row) for row in self._rows(call, found, "invoices")]

        return self._walked(call, "/invoices.json", {"line_items": "true", "direction": "asc", **whose}, read, "uid")

    def invoice(self, uid: str) -> Json | None:
        """Return one invoice with its lines, or None."""
        call = f"read invoice {uid!r}"
        found = self._main.read(call, f"/invoices/{segment(uid)}.json")
        if found is None:
            return None
        one = self._invoice(call, unwrapped(found, "invoice") if isinstance(found, dict) else {})
        if one["uid"] != uid:
            raise self._unreadable(call, f"the answer is about invoice {one['uid']!r}")
        return one

    def _invoice(self, call: str, row: Json) -> Json:
        lines = row.get("line_items")
        if not isinstance(row.get("uid"), str) or not isinstance(lines, list):
            raise self._unreadable(call, "an invoice has no uid, or no list of lines")
        return row

    def time(self) -> datetime | None:
        """Return the site's own time, as its last answers to this thread said; None before the first one."""
        return max(filter(None, (self._main.server_time, self._events.server_time)), default=None)

    def record_event(self, stream: str, body: str) -> None:
        """Record one event, the JSON text of an object, in a stream.

        That it returns proves neither that a subscription matched nor that anything will be billed.
        """
        self._events.write_blind(f"record an event in stream {stream!r}", f"/events/{segment(stream)}.json", body)

    def record_events(self, stream: str, bodies: Sequence[str]) -> None:
        """Record up to 1,000 events, JSON texts of objects, in one request; as `record_event`.

        A refusal of several is `InDoubt`: no document says whether the stream has taken the sound ones among them.
        """
        call = f"record {len(bodies)} events in stream {stream!r}"
        effect = Effect.BULK if len(bodies) > 1 else Effect.WRITE
        self._events.write_blind(call, f"/events/{segment(stream)}/bulk.json", f"[{','.join(bodies)}]", effect)

    def _pages(
        self, call: str, path: str, key: str, params: Mapping[str, Any], else_no: str = "", form: Form = JSON
    ) -> Iterator[Json]:
        """Yield the rows of a numbered list, each id once; `else_no` is what a 404 may lack beside the site."""
        return self._walked(call, path, params, lambda found: self._numbered(call, found, key), "id", else_no, form)

    def _walked(
        self,
        call: str,
        path: str,
        params: Mapping[str, Any],
        read: Callable[[object], list[Json]],
        name: str,
        else_no: str = "",
        form: Form = JSON,
    ) -> Iterator[Json]:
        """Yield what `read` finds on numbered pages, each `name` once, until a page brings nothing new."""
        seen: set[object] = set()
        page = 1
        while True:
            found = self._main.read(call, path, {**params, "page": page, "per_page": PER_PAGE}, form=form)
            if found is None:
                raise self._no_site(call, else_no)
            fresh = [row for row in read(found) if row[name] not in seen]
            if not fresh:
                return
            yield from fresh
            seen.update(row[name] for row in fresh)
            page += 1


def unwrapped(row: Json, key: str) -> Json:
    """Return what a row holds under `key`, or the row itself where the site sends it bare."""
    inner = row.get(key, row)
    return inner if isinstance(inner, dict) else row


def instant(text: object) -> datetime | None:
    """Return a moment that the site tells, or None if it tells none that can be read; one without a zone is none."""
    try:
        moment = datetime.fromisoformat(str(text))
        return moment.astimezone(UTC) if moment.tzinfo else None
    except (ValueError, OverflowError):
        return None


def _days(**days: date | None) -> Json:
    """Return parameters that are days, those that are given."""
    return {name: day.isoformat() for name, day in days.items() if day is not None}


def _is_of(usage: Json, day: date) -> bool:
    """Say whether a usage was stored on a day; the site tells it in its own zone, in which the day is meant."""
    return str(usage.get("created_at")).startswith(day.isoformat())


def _is_past(usage: object) -> bool:
    """Say whether a row tells what was used in a billing period."""
    if not isinstance(usage, dict) or exact_number(usage.get("total_usage_quantity")) is None:
        return False
    return _is_span(usage.get("billing_period_starts_at"), usage.get("billing_period_ends_at"))


def _is_span(start: object, end: object) -> bool:
    """Say whether two texts are the bounds of a period."""
    first, after = instant(start), instant(end)
    return first is not None and after is not None and first < after
