"""The client of a ChargeOver account: how to reach it, and the calls that usage needs.

Paths, limits and the meaning of replies follow ChargeOver's public REST documentation: "Storing Usage/Metered Data",
"Query for Usage/Metered Data", "Bulk Usage/Metered Data Upload", "Bulk/Batch Requests", "Querying for Subscriptions",
"Escape Syntax", "External Keys".
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from decimal import Decimal
from typing import Any, ClassVar
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

from usage_billing.destinations.chargeover.signature import SignatureAuth
from usage_billing.destinations.exact import check, exact_text, quantity_faults
from usage_billing.destinations.http import Effect, HttpClient, Transport, record_number, segment
from usage_billing.destinations.settings import SiteSettings, url_faults, whole_number
from usage_billing.errors import InDoubt, Misconfigured, NotApplied

Json = dict[str, Any]

_API = "/api/v3"
_VENDOR_HOST = "chargeover.com"
_TIME = "%Y-%m-%d %H:%M:%S"
IDS = {
    "package": "package_id",
    "customer": "customer_id",
    "item": "item_id",
    "usage": "usage_history_id",
    "invoice": "invoice_id",
}
"""The kinds of objects that usage needs, and what each calls its id."""
LIMIT = 500
"""How many rows a page of a list is asked to hold."""
FEW = 20
"""How many are still few: so many are looked up one by one, and told one by one."""


# --- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChargeOverSettings(SiteSettings):
    """How to reach one ChargeOver account; see `SiteSettings` for what every site shares.

    `timezone` is the account's, in which times without an offset are read. ChargeOver documents no cut-off, so settling
    a request after 15 minutes is an assumption. `negative_usage` says whether negative records are taken, which no
    document settles; `auth` whether requests carry both keys (``basic``) or a ``signature``.

    Raises:
        Misconfigured: with every fault at once.
    """

    shortest_settling: ClassVar[int] = 900
    why_not_shorter: ClassVar[str] = "no document says how long the account may take to apply a request"

    public_key: str
    private_key: str = field(repr=False)
    instance: str = ""
    timezone: str = "America/Chicago"
    negative_usage: str = "hold"
    auth: str = "basic"
    subject: InitVar[str] = "ChargeOver settings"

    @property
    def site(self) -> str:
        return f"chargeover:{self.instance}"

    @property
    def zone(self) -> ZoneInfo:
        """The account's time zone."""
        return ZoneInfo(self.timezone)

    def _normalise(self) -> None:
        self._set("instance", str(self.instance or _instance_of(self.base_url)).strip().lower())

    def _own_address(self) -> str:
        return f"https://{self.instance}.{_VENDOR_HOST}"

    def _faults(self) -> Iterator[str]:
        if not self.public_key:
            yield "login: is empty; put the public key of the REST API there"
        if not self.private_key:
            yield "password: is empty; put the private key of the REST API there"
        yield from self._addressing()
        if self.timezone not in available_timezones():
            yield f"timezone: {self.timezone!r} is no IANA time zone; write it like 'America/Chicago'"
        if self.negative_usage not in ("allowed", "hold"):
            yield f"negative_usage: {self.negative_usage!r} is unknown; it is 'allowed' or 'hold'"
        if self.auth not in ("basic", "signature"):
            yield f"auth: {self.auth!r} is unknown; it is 'basic' or 'signature'"

    def _addressing(self) -> Iterator[str]:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", self.instance):
            yield (
                f"instance: {self.instance!r} is no instance name; it is the first word of the account's address. "
                "Put the name into host, or, with an address in host, into the extra instance"
            )
        if self.base_url:
            yield from url_faults("host", self.base_url)
        if (own := _instance_of(self.base_url)) and own != self.instance:
            yield f"host: it is the address of instance {own!r}, not of {self.instance!r}; leave one of the two out"


def _instance_of(base_url: str) -> str:
    """Return the instance that an address of the vendor's names, or an empty text."""
    host = urlsplit(base_url).hostname or ""
    name, dot, rest = host.partition(".")
    return name if dot and rest == _VENDOR_HOST else ""


# --- client ---------------------------------------------------------------------------------------------------------


class ChargeOverSite:
    """A plain client of the calls that usage needs. Objects come back as dicts, numbers exact.

    Example::

        site = ChargeOverSite(ChargeOverSettings(instance="telco", public_key="...", private_key="..."))
        line = site.package_by_external_key("pkg-001")["line_items"][0]["line_item_id"]
        site.create_usage(site.usage_body(22, since, until, line, external_key="pkg-001 on 1 October"))
        for usage in site.usages({"line_item_id": line}):
            print(usage["from"], usage["usage_value"])

    Every method raises `Misconfigured` or `NotApplied`; those that write also `Refused` or `InDoubt`.
    """

    def __init__(self, settings: ChargeOverSettings, transport: Transport = Transport()) -> None:  # noqa: B008 - frozen.
        """Prepare; `transport` stands for network and time."""
        self.settings = settings
        self._http = HttpClient(
            settings.site,
            settings.base_url,
            (settings.public_key, settings.private_key),
            timeouts=settings.timeouts,
            concurrency=settings.concurrency,
            transport=transport,
            auth=SignatureAuth(settings.public_key, settings.private_key) if settings.auth == "signature" else None,
        )

    def read_account(self) -> None:
        """Ask for one customer: the cheapest proof that address and keys are right."""
        self._list("read a customer", "/customer", {"limit": 1})

    def package(self, package_id: int) -> Json | None:
        """Return one package with its line items, or None."""
        return self.get("package", int(package_id))

    def package_by_external_key(self, key: str) -> Json | None:
        """Return the package with an external key, with its line items, or None."""
        return next(iter(self.packages_by_external_key(key)), None)

    def packages_by_external_key(self, key: str) -> list[Json]:
        """Return the packages with an external key, with their line items: none, one, or a reason to worry."""
        found = self.packages([("external_key", "EQUALS", key)])
        return [package for package in found if self.key_of("package", package) == key]

    def packages_of_customer(self, customer: Json) -> list[Json]:
        """Return all packages of a customer, with their line items."""
        number = record_number(customer.get("customer_id"))
        found = list(self.packages([("customer_id", "EQUALS", str(number))]))
        if any(record_number(package.get("customer_id")) != number for package in found):
            # The filter was not obeyed, and to bill somebody else's package would be worse than to bill none.
            raise NotApplied(f"{self.settings.site}: query package: a row is of another customer than {number}")
        return found

    def packages(self, where: Iterable[tuple[str, str, str]] = ()) -> Iterator[Json]:
        """Yield packages with their line items, ascending by id.

        Each page asks for what follows the last id of the page before, so that none is passed over while the list
        changes: that a package is not among these is definite.
        """
        # Asked for with each page, so it must not be used up by the first.
        conditions = wanted = list(where)
        shape = {"expand": "line_items", "order": "package_id:ASC", "limit": LIMIT}
        last = 0
        while rows := self._list("query package", "/package", {**shape, **_filter(conditions)}):
            for row in rows:
                number = whole_number(row.get("package_id"), 1)
                if number is None or number <= last:
                    told = f"asked for a package with an id above {last}, told {row.get('package_id')!r}"
                    raise NotApplied(f"{self.settings.site}: query package: {told}")
                last = number
                yield row
            conditions = [*wanted, ("package_id", "GT", str(last))]

    def customer_by_external_key(self, key: str) -> Json | None:
        """Return the customer with an external key, or None."""
        found = self.query("customer", [("external_key", "EQUALS", key)])
        return next((customer for customer in found if self.key_of("customer", customer) == key), None)

    def key_of(self, kind: str, row: Json, name: str = "external_key") -> str:
        """Return the external key of a row, which may be a number; empty where it has none."""
        key = row.get(name)
        if key is not None and (isinstance(key, bool) or not isinstance(key, str | int)):
            raise NotApplied(f"{self.settings.site}: query {kind}: a row has an {name} that is no text")
        return "" if key is None else str(key)

    def item_by_external_key(self, key: str) -> Json | None:
        """Return the product with an external key and its `service_data`, or None."""
        return self.get("item", f"external_key:{key}")

    def usage_body(
        self,
        value: Decimal | int,
        since: datetime,
        until: datetime,
        line_item_id: int | None = None,
        *,
        customer_external_key: str = "",
        item_external_key: str = "",
        external_key: str = "",
        **more: object,
    ) -> str:
        """Return the JSON text of a usage record of so many units, from `since` to `until`, both included.

        It goes to a line item by its id or, in an upload (`upload_usage`) only, to the line that the customer has of a
        product, by both keys; where there are two, no document says which. `external_key` tells it apart from all
        others. `more` are further fields of the API: ``type``, ``options``, ``custom_1`` and so on.

        Raises:
            Misconfigured: a number that is not exact, a time without a zone, or no one address; tells all at once.
        """
        keys = {"customer.external_key": customer_external_key, "line_item.item_external_key": item_external_key}
        faults = [f"{name}: has no zone" for name, time in (("since", since), ("until", until)) if time.tzinfo is None]
        if (line_item_id is None) is not all(keys.values()) or any(keys.values()) is not all(keys.values()):
            faults.append("line_item_id: give it, or in its place customer_external_key and item_external_key")
        check("ChargeOver usage", more, [*faults, *quantity_faults("value", value)])
        address = keys if line_item_id is None else {"line_item_id": int(line_item_id)}
        span = {"from": self.local(since), "to": self.local(until)}
        own = {"external_key": external_key} if external_key else {}
        return exact_text({**address, "usage_value": value, **span, **own, **more})

    def create_usage(self, body: str) -> Json:
        """Store one usage record, a JSON text (see `usage_body`); return what the account says of it: its ``id``."""
        return self._created(self._http.write("store usage", f"{_API}/usage", body), "store usage")

    def create_usage_batch(self, bodies: Sequence[str]) -> list[Json]:
        """Store up to 25 usage records in one request and return one envelope for each, in order.

        Whether the batch is one transaction is not documented: unless each record has its own answer, all are in doubt.
        """
        call = f"store {len(bodies)} usage records in a batch"
        requests = (f'{{"request_method":"POST","uri":"{_API}/usage","payload":{body}}}' for body in bodies)
        reply = self._http.write(call, f"{_API}/_bulk", f"[{','.join(requests)}]", Effect.BULK)
        answers = reply.get("response") if isinstance(reply, dict) else None
        answers = answers.get("_bulk") if isinstance(answers, dict) else None
        if (
            not isinstance(answers, list)
            or len(answers) != len(bodies)
            or not all(_is_envelope(answer) for answer in answers)
        ):
            raise InDoubt(f"{self.settings.site}: {call}: the reply has no answer for each record")
        return answers

    def upload_usage(self, bodies: Sequence[str]) -> None:
        """Upload up to 1,000 usage records in one request.

        That it returns proves nothing about any record: what a success says of them, and what one bad record does to
        the others, is not documented. Look for them with `usages`.
        """
        call = f"upload {len(bodies)} usage records"
        reply = self._http.write(call, f"{_API}/usage/_action/bulk", f"[{','.join(bodies)}]", Effect.BULK)
        if isinstance(reply, dict) and reply.get("status") not in (None, "OK"):
            raise InDoubt(f"{self.settings.site}: {call}: success, but an error inside: {self.said(reply)}")

    def said(self, envelope: Json) -> str:
        """Return the message of an envelope as it may be shown."""
        return self._http.shown(envelope.get("message"))

    def usages(
        self, equal: Mapping[str, object], since: datetime | None = None, until: datetime | None = None
    ) -> Iterator[Json]:
        """Yield usage records whose fields equal those given and whose ``from`` lies in [`since`, `until`], each once.

        Fields that may be asked for: ``line_item_id``, ``external_key``.
        """
        where = [(name, "EQUALS", str(value)) for name, value in equal.items()]
        where += [("from", "GTE", self.local(since))] if since else []
        where += [("from", "LTE", self.local(until))] if until else []
        return self.query("usage", where, order="from:ASC")

    def usages_by_external_key(self, key: str) -> list[Json]:
        """Return the usage records with an external key: none, one, or a reason to worry."""
        params = {"where": where_text([("external_key", "EQUALS", key)]), "limit": FEW}
        found = self._list("query usage", "/usage", params)
        if others := [usage for usage in found if usage.get("external_key") != key]:
            # The filter was not obeyed, so that our own record is not among these says nothing.
            other = self._http.shown(others[0].get("external_key"))
            raise NotApplied(f"{self.settings.site}: query usage: asked for {key}, told {other!r}")
        return found

    def local(self, moment: datetime) -> str:
        """Return a moment as the account writes it: in its own zone, without an offset."""
        return moment.astimezone(self.settings.zone).strftime(_TIME)

    def moment(self, local: str) -> datetime:
        """Return the moment that the account writes so; `local` writes it back to the letter."""
        return datetime.strptime(local, _TIME).replace(tzinfo=self.settings.zone)

    def query(self, kind: str, where: Iterable[tuple[str, str, str]] = (), order: str = "") -> Iterator[Json]:
        """Yield the objects of a kind (`IDS`) that fulfil every condition (see `where_text`), each once.

        Only the id tells objects apart, so pages follow until one is empty: the size of a page is the account's to say,
        and a list that grows moves under an offset. Packages come without their line items, invoices too.
        """
        key = IDS[kind]
        params = {**_filter(where), **({"order": order} if order else {}), "limit": LIMIT}
        seen: set[object] = set()
        offset = 0
        while rows := self._list(f"query {kind}", f"/{kind}", {**params, "offset": offset}):
            numbered = [(record_number(row.get(key)), row) for row in rows]
            if any(number is None for number, _ in numbered):
                raise NotApplied(f"{self.settings.site}: query {kind}: a row has no {key}")
            fresh = [row for number, row in numbered if number not in seen]
            if not fresh:
                return
            yield from fresh
            seen.update(number for number, _ in numbered)
            offset += len(rows)

    def count(self, kind: str, where: Iterable[tuple[str, str, str]] = ()) -> int:
        """Return how many objects of a kind (`IDS`) fulfil every condition."""
        call = f"count {kind}"
        found = self._read(call, f"/{kind}/_count", _filter(where))
        if found is None:
            raise self._no_api(call)
        if (number := whole_number(found, 0)) is None:
            raise NotApplied(f"{self.settings.site}: {call}: the answer is no number")
        return number

    def get(self, kind: str, name: int | str) -> Json | None:
        """Return one object of a kind (`IDS`) by its id, by ``external_key:<key>`` or by ``token:<token>``, or None."""
        if isinstance(name, int):
            own, value, path = IDS[kind], str(name), str(name)
        else:
            own, _, value = name.partition(":")
            # The colon is a part of the path as it is documented; only what the key holds is encoded.
            path = f"{own}:{segment(value)}"
        found = self._object(f"read {kind} {name!r}", f"/{kind}/{path}")
        if found is not None and record_number(found.get(own)) != value:
            raise NotApplied(f"{self.settings.site}: read {kind}: asked for {name!r}, told of {found.get(own)!r}")
        return found

    def _list(self, call: str, path: str, params: Mapping[str, Any]) -> list[Json]:
        """Return the rows of one query; only a list, empty or not, says what there is."""
        rows = self._read(call, path, params)
        if rows is None:
            raise self._no_api(call)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise NotApplied(f"{self.settings.site}: {call}: the answer is no list of objects")
        return rows

    def _no_api(self, call: str) -> Misconfigured:
        """Return what a 404 to a query means, which is answered by a list, empty or not: it comes from elsewhere."""
        where = self.settings.base_url
        return Misconfigured(f"{self.settings.site}: {call}: HTTP 404: there is no ChargeOver API at {where}")

    def _object(self, call: str, path: str) -> Json | None:
        found = self._read(call, path)
        if found is not None and not isinstance(found, dict):
            # Only a 404 says that there is none.
            raise NotApplied(f"{self.settings.site}: {call}: the answer is no object")
        return found

    def _read(self, call: str, path: str, params: Mapping[str, Any] | None = None) -> Any:
        reply = self._http.read(call, _API + path, params)
        if reply is None:
            return None
        if not _is_envelope(reply) or not _is_success(reply) or reply.get("response") is None:
            said = self.said(reply) if isinstance(reply, dict) else ""
            raise NotApplied(f"{self.settings.site}: {call}: success, but an error inside: {said!r}")
        return reply["response"]

    def _created(self, reply: object, call: str) -> Json:
        if not isinstance(reply, dict) or (number := record_id(reply)) is None:
            raise InDoubt(f"{self.settings.site}: {call}: success, but no id in the reply")
        return {"id": number}


def _filter(where: Iterable[tuple[str, str, str]]) -> Json:
    """Return the parameter that asks for what fulfils every condition; none where there is no condition."""
    text = where_text(where)
    return {"where": text} if text else {}


def where_text(conditions: Iterable[tuple[str, str, str]]) -> str:
    """Return a ``where`` clause of (field, operator, value).

    A colon or a comma inside a value is escaped: percent-encoding alone would cut the value there, without any error.
    """
    escaped = ((name, operator, re.sub(r"([\\:,])", r"\\\1", value)) for name, operator, value in conditions)
    return ",".join(":".join(parts) for parts in escaped)


def record_id(envelope: Json) -> str | None:
    """Return the id of the record that an envelope says was created, or None if it does not say so."""
    made = envelope.get("response")
    return record_number(made.get("id")) if _is_success(envelope) and isinstance(made, dict) else None


def _is_success(envelope: Json) -> bool:
    return whole_number(envelope.get("code"), 0) in (200, 201, 202) and envelope.get("status") == "OK"


def _is_envelope(reply: object) -> bool:
    return isinstance(reply, dict) and whole_number(reply.get("code"), 0) is not None
