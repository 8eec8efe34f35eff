"""ChargeOver: its client, and metered usage of a package's line item.

Paths, limits and the meaning of replies follow ChargeOver's public REST documentation: "Storing Usage/Metered Data",
"Query for Usage/Metered Data", "Bulk Usage/Metered Data Upload", "Bulk/Batch Requests", "Querying for Subscriptions",
"Escape Syntax", "External Keys".
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Any, ClassVar, Literal, cast
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo, available_timezones

import numpy as np
import pandas as pd
from pydantic import Field

from usage_billing.destinations.base import Answer, Destination, Moved, by_value, joined, negative
from usage_billing.destinations.http import (
    Effect,
    HttpClient,
    Transport,
    exact_number,
    record_number,
    segment,
)
from usage_billing.destinations.settings import SiteSettings, url_faults, whole_number
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError
from usage_billing.periods import local_midnight
from usage_billing.records import ABSENT, DECIDED, PERSON_DECIDES, Delivery, Period, Receipt, SiteRecord, Target
from usage_billing.sources import BillingSource, DestinationSettings

log = logging.getLogger(__name__)

Json = dict[str, Any]

_API = "/api/v3"
_VENDOR_HOST = "chargeover.com"
_SETTLE_AFTER_SECONDS = 900
_LARGEST_BATCH = 25
_LARGEST_BULK = 1000
_LIMIT = 500
_TOKEN = re.compile(r"[0-9a-f]{64}")
_TIME = "%Y-%m-%d %H:%M:%S"
_FEW = 20
_MISSES = 3
"""How many questions in a row may go without an answer before no more are asked."""
_STATES = {"c": "cancelled", "e": "expired", "s": "suspended"}
"""Package states that are not billed: usage sent there would be lost, so it is quarantined."""
_KEPT_DECIMALS = 4
"""How many decimal places an account is trusted to keep: what has more was not stored before it was read back."""
_REFUSED_AGAIN = "refused when it was sent again, perhaps because its first request arrived after all"
_INVOICED = "its billing cycle is invoiced: whether usage that comes later is ever billed is not documented"
_DAYS = {"dly": 1, "1wk": 7, "2wk": 14, "4wk": 28, "30d": 30, "8wk": 56, "12w": 84}
_MONTHS = {"mon": 1, "2mn": 2, "qtr": 3, "six": 6, "yrl": 12, "2yr": 24, "3yr": 36, "4yr": 48, "5yr": 60, "10y": 120}
_CYCLES = {name: pd.DateOffset(days=days) for name, days in _DAYS.items()}
_CYCLES |= {name: pd.DateOffset(months=months) for name, months in _MONTHS.items()}
"""How long a billing cycle is, by the API's word for it (``paycycle``)."""


# --- settings -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ChargeOverSettings(SiteSettings):
    """How to reach one ChargeOver account; see `SiteSettings` for what every site shares.

    `timezone` is the account's, in which times without an offset are read. ChargeOver documents no cut-off, so settling
    a request after 15 minutes is an assumption. `negative_usage` says whether negative records are taken, which no
    document settles.

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
        day = {"from": "2026-10-01 00:00:00", "to": "2026-10-01 23:59:59"}
        site.create_usage(json.dumps({"line_item_id": line, "usage_value": 22, **day}))
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
        )

    def read_account(self) -> None:
        """Ask for one customer: the cheapest proof that address and keys are right."""
        self._list("read a customer", "/customer", {"limit": 1})

    def package(self, package_id: int) -> Json | None:
        """Return one package with its line items, or None."""
        return self._object(f"read package {package_id}", f"/package/{int(package_id)}")

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
        """Yield packages with their line items, by id."""
        return self._query("package", "package_id", where, order="package_id:ASC", expand="line_items")

    def customer_by_external_key(self, key: str) -> Json | None:
        """Return the customer with an external key, or None."""
        found = self._query("customer", "customer_id", [("external_key", "EQUALS", key)])
        return next((customer for customer in found if self.key_of("customer", customer) == key), None)

    def key_of(self, kind: str, row: Json, name: str = "external_key") -> str:
        """Return the external key of a row, which may be a number; empty where it has none."""
        key = row.get(name)
        if key is not None and (isinstance(key, bool) or not isinstance(key, str | int)):
            raise NotApplied(f"{self.settings.site}: query {kind}: a row has an {name} that is no text")
        return "" if key is None else str(key)

    def item_by_external_key(self, key: str) -> Json | None:
        """Return the product with an external key and its `service_data`, or None."""
        return self._object(f"read item {key!r}", f"/item/external_key:{segment(key)}")

    def create_usage(self, body: str) -> Json:
        """Store one usage record, the JSON text of an object; return what the account says of it: its ``id``."""
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
        return self._query("usage", "usage_history_id", where, order="from:ASC")

    def usages_by_external_key(self, key: str) -> list[Json]:
        """Return the usage records with an external key: none, one, or a reason to worry."""
        params = {"where": where_text([("external_key", "EQUALS", key)]), "limit": _FEW}
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

    def _query(
        self, kind: str, key: str, where: Iterable[tuple[str, str, str]] = (), order: str = "", expand: str = ""
    ) -> Iterator[Json]:
        """Yield the objects that match, each once, until a page is empty.

        The size of a page is the account's to say, and a list that grows moves under an offset: so pages follow what
        came, and the key tells what came before.
        """
        asked = {"where": where_text(where), "order": order, "expand": expand, "limit": _LIMIT}
        params = {name: value for name, value in asked.items() if value}
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

    def _list(self, call: str, path: str, params: Mapping[str, Any]) -> list[Json]:
        """Return the rows of one query; only a list, empty or not, says what there is."""
        rows = self._read(call, path, params)
        if rows is None:
            # A query is answered by a list, empty or not: 404 comes from somewhere else.
            where = self.settings.base_url
            raise Misconfigured(f"{self.settings.site}: {call}: HTTP 404: there is no ChargeOver API at {where}")
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise NotApplied(f"{self.settings.site}: {call}: the answer is no list of objects")
        return rows

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


# --- destination ----------------------------------------------------------------------------------------------------


class ChargeOverUsageSettings(DestinationSettings):
    """The keys of a source that is billed to ChargeOver.

    `package_by` says what the account column holds: the package's external key, or the customer's, who then must have
    one line of the item. `item` is the product's external key. `mode` says how records travel: in batches of 25, each
    with its own answer; singly; or in a bulk of up to 1,000, which no answer accepts and which is therefore read back.
    """

    free: ClassVar[frozenset[str]] = DestinationSettings.free | {"mode"}

    name: Literal["chargeover_usage"]
    package_by: Literal["external_key", "customer_external_key"]
    item: str = Field(min_length=1)
    mode: Literal["batch", "single", "bulk"] = "batch"


class ChargeOverUsage(Destination):
    """Metered usage of the line item that a package has of one product.

    An upgrade replaces a line item's id, even a change of price, so the identity is the pair of package and item, and
    the id is looked up afresh each time. The uniqueness token travels as the record's external key.
    """

    name = "chargeover_usage"
    connection_type = "chargeover"
    settings_model = ChargeOverUsageSettings
    chunk_size = _LARGEST_BATCH
    # External keys are said to be unique for all objects; that usage is among them is said nowhere.
    replay_window = timedelta(0)

    client: ChargeOverSite

    def __init__(self, source: BillingSource, client: ChargeOverSite) -> None:
        super().__init__(source, client)
        self.settings = cast("ChargeOverUsageSettings", source.destination)
        self.chunk_size = _CHUNK_SIZES[self.settings.mode]

    def _faults(self) -> Iterator[str]:
        item = self.client.item_by_external_key(self.settings.item)
        if item is None:
            yield f"destination.item: {self.site} has no item with external key {self.settings.item!r}"
        elif not self._is_metered(item):
            mend = "say in ChargeOver that you upload metered data for it"
            yield f"destination.item: {self.settings.item!r} is not metered; {mend}"

    def _is_metered(self, item: Json) -> bool:
        details = item.get("service_data") or {}
        if not isinstance(details, dict):
            raise NotApplied(f"{self.site}: read item {self.settings.item!r}: its service_data is no object")
        return self._flag(details, "is_usage")

    def _flag(self, row: Json, name: str) -> bool:
        """Return a flag that comes as a boolean, a number or text; true where the site leaves it out."""
        text = str(row.get(name, True)).lower()
        if text not in _FLAGS:
            raise NotApplied(f"{self.site}: {name} is neither true nor false")
        return _FLAGS[text]

    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Return today's line item of each account; one that is not one billed line of the item is `unknown`."""
        find = self._packages_by_key if self.settings.package_by == "external_key" else self._packages_by_customer
        packages = find(accounts)
        return [self._target(account, packages[account]) for account in accounts]

    def _packages_by_key(self, accounts: Sequence[str]) -> dict[str, list[Json] | None]:
        """Return the packages of each external key, None where there is definitely none.

        Many keys are first looked for in the list, as long as that takes fewer requests than asking one by one.
        """
        wanted = set(accounts)
        found: dict[str, list[Json] | None] = {}
        if len(wanted) > _FEW:
            for package in islice(self.client.packages(), _LIMIT * (len(wanted) // 4)):
                if (key := self.client.key_of("package", package)) in wanted:
                    found.setdefault(key, []).append(package)  # type: ignore[union-attr]
        return found | {key: self._packages_of(key) for key in sorted(wanted - found.keys())}

    def _packages_of(self, key: str) -> list[Json] | None:
        return (self.client.packages_by_external_key(key) or None) if key else None

    def _packages_by_customer(self, accounts: Sequence[str]) -> dict[str, list[Json] | None]:
        return {key: self._packages_of_customer(key) for key in sorted(set(accounts))}

    def _packages_of_customer(self, key: str) -> list[Json] | None:
        customer = self.client.customer_by_external_key(key) if key else None
        return None if customer is None else self.client.packages_of_customer(customer)

    def _target(self, account: str, packages: list[Json] | None) -> Target:
        holder = "package" if self.settings.package_by == "external_key" else "customer"
        if packages is None:
            return Target(account, unknown=f"{holder} {account!r} is unknown to {self.site}")
        billed = [package for package in packages if self._state(package) not in _STATES]
        if not billed:
            states = {_STATES[self._state(package)] for package in packages}
            said = f"is {', '.join(sorted(states))}" if holder == "package" else "has no active package"
            return Target(account, unknown=f"{holder} {account!r} {said}: its usage would not be billed")
        lines = [line for package in billed for line in self._lines(package) if self._is_ours(line)]
        if len(lines) != 1:
            count = "no line" if not lines else f"{len(lines)} lines, so it is ambiguous which one to bill,"
            return Target(account, unknown=f"{holder} {account!r} has {count} of item {self.settings.item!r}")
        if not self._flag(lines[0], "item_is_usage"):
            return Target(
                account, unknown=f"{holder} {account!r}: its line of item {self.settings.item!r} is not metered"
            )
        if (line := whole_number(lines[0].get("line_item_id"), 1)) is None:
            raise NotApplied(f"{self.site}: query package: the line of {holder} {account!r} has no line_item_id")
        package = next(package for package in billed if lines[0] in self._lines(package))
        return Target(
            account=account,
            subscription=f"{holder}:{account}",
            component=f"item:{self.settings.item}",
            address={"line_item_id": line, "account": account},
            open_from=self._open_from(package),
            open_until=self._next_invoice(package),
        )

    def _state(self, package: Json) -> str:
        if not isinstance(state := package.get("package_status_state"), str):
            raise NotApplied(f"{self.site}: query package: package {package['package_id']} has no readable state")
        return state

    def _lines(self, package: Json) -> list[Json]:
        """Return the lines of a package; what is no list of objects says nothing, least of all that it has none."""
        lines = package.get("line_items")
        if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
            raise NotApplied(f"{self.site}: query package: package {package['package_id']} has no list of line items")
        return lines

    def _open_from(self, package: Json) -> datetime | None:
        """Return when the package's open billing cycle began: one cycle before its next invoice, where that is known.

        The API names the next invoice's day and the cycle, and says of neither end which usage it takes in.
        """
        day, cycle = self._invoice_day(package), str(package.get("paycycle") or "")
        if day is None:
            return None
        if cycle == "116":  # The 1st and the 16th of each month.
            start = day.replace(day=1) if day.day > 1 else (day - timedelta(days=1)).replace(day=16)
        elif cycle in _CYCLES:
            start = (pd.Timestamp(day) - _CYCLES[cycle]).date()
            if cycle in _MONTHS and (day + timedelta(days=1)).day == 1:
                # The last of a month may stand for a 31st that it lacks: the later start holds rather than loses.
                start = (pd.Timestamp(start) + pd.offsets.MonthEnd(0)).date()
        else:
            return None
        return local_midnight(start, self.client.settings.zone)

    def _next_invoice(self, package: Json) -> datetime | None:
        """Return when the day of the package's next invoice begins, where it has one."""
        day = self._invoice_day(package)
        return None if day is None else local_midnight(day, self.client.settings.zone)

    def _invoice_day(self, package: Json) -> date | None:
        """Return the day of the package's next invoice, in the account's zone; a text without an offset is in it."""
        text = package.get("next_invoice_datetime")
        if text is None or text == "":  # So it is on a cancelled package.
            return None
        try:
            moment = datetime.fromisoformat(str(text))
            return (moment if moment.tzinfo is None else moment.astimezone(self.client.settings.zone)).date()
        except (ValueError, OverflowError):
            words = f"package {package['package_id']} has no readable next_invoice_datetime"
            raise NotApplied(f"{self.site}: query package: {words}") from None

    def _is_ours(self, line: Json) -> bool:
        cancelled = line.get("cancel_datetime")
        if cancelled is not None and not isinstance(cancelled, str):
            raise NotApplied(f"{self.site}: query package: a line has a cancel_datetime that is no time")
        return self.client.key_of("package", line, "item_external_key") == self.settings.item and not cancelled

    def hold_reason(self, proposals: pd.DataFrame) -> pd.Series:
        """Hold negative differences unless the connection allows them, and what belongs to an invoiced cycle."""
        below = negative(proposals["quantity"])
        late = (proposals["period_start"] < proposals["open_from"]).to_numpy(dtype=bool)
        # What vanished whole has no account in this run, and a credit to an invoiced cycle might never be made.
        unknown = below & proposals["open_from"].isna().to_numpy(dtype=bool)
        why_minus = (
            "a negative difference waits: the connection does not say that this account takes one (negative_usage)"
        )
        minus = below & (self.client.settings.negative_usage == "hold")
        why_unknown = "its account has no usage in this run, so its open billing cycle is not known"
        texts = np.select([minus, unknown, late], [why_minus, why_unknown, _INVOICED], "")
        return pd.Series(texts, index=proposals.index, dtype=object)

    def recheck(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Hold what belongs to a cycle that was invoiced since, and what would go to a line that is no more."""
        return self._looked_up(deliveries, self._why_not)

    def overtaken(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        return self._looked_up(deliveries, self._why_too_late)

    def _looked_up(self, deliveries: Sequence[Delivery], judge: Callable[[Delivery, Target], str]) -> Mapping[str, str]:
        """Return, by token, what `judge` says against a delivery and where its account leads today."""
        targets = self.resolve(sorted({str(delivery.address["account"]) for delivery in deliveries}))
        today = {target.account: target for target in targets}
        found = {one.token: judge(one, today[str(one.address["account"])]) for one in deliveries}
        return {token: why for token, why in found.items() if why}

    def _why_not(self, delivery: Delivery, target: Target) -> str:
        if target.unknown:
            return target.unknown
        if target.address["line_item_id"] != delivery.address["line_item_id"]:
            return "its line item was replaced since it was planned: the next run of its period addresses the new one"
        return self._why_too_late(delivery, target)

    def _why_too_late(self, delivery: Delivery, target: Target) -> str:
        """Say why no open cycle has the usage; a line that was replaced is another matter (see `moved`)."""
        if target.unknown:
            return target.unknown
        start = datetime.fromisoformat(json.loads(delivery.body)["from"]).replace(tzinfo=self.client.settings.zone)
        return _INVOICED if target.open_from is not None and start < target.open_from else ""

    def encode(self, proposals: pd.DataFrame) -> pd.Series:
        """Return each proposal as one usage record, the token as its external key."""
        # The last second of a period belongs to it: the account reads `to` as included. In the hour that autumn
        # repeats, two periods bear the same times; the external key tells them apart.
        start = by_value(proposals["period_start"], self.client.local)
        end = by_value(proposals["period_end"], lambda end: self.client.local(end - timedelta(seconds=1)))
        line = by_value(proposals["address"], lambda address: str(int(json.loads(address)["line_item_id"])))
        return joined(
            '{"line_item_id":', line, ',"usage_value":', proposals["quantity"], ',"from":"', start, '","to":"', end,
            '","external_key":"', proposals["token"], '"}',
        )  # fmt: skip

    def send(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Store the chunk: singly, as a batch whose records are each answered, or as a bulk that is read back."""
        if self.settings.mode == "single" or (self.settings.mode == "bulk" and len(chunk) == 1):
            (delivery,) = chunk
            return self._as_sent(chunk, [self._send_one(delivery)])
        if self.settings.mode == "bulk":
            return self._send_bulk(chunk)
        answers = self.client.create_usage_batch([delivery.body for delivery in chunk])
        return self._as_sent(chunk, self._read_answers(chunk, answers))

    def _as_sent(self, chunk: Sequence[Delivery], receipts: list[Receipt]) -> list[Receipt]:
        """Return the receipts, once those of very precise quantities are proven: an account may round what it stores.

        Raises:
            InDoubt: one of them cannot be read back as it was sent; it holds the receipts of the others.
        """
        taken = {receipt.token for receipt in receipts}
        precise = [one for one in chunk if one.token in taken and _places(one.quantity) > _KEPT_DECIMALS]
        if not precise:
            return receipts
        found = self._read_back(precise)
        unproven = {one.token for one in precise if not isinstance(found.get(one.token), Receipt)}
        if not unproven:
            return receipts
        different = [str(answer) for answer in found.values() if isinstance(answer, Refused)]
        words = f"{self.site}: {len(unproven)} of more than {_KEPT_DECIMALS} decimals cannot be read back as sent"
        proven = [receipt for receipt in receipts if receipt.token not in unproven]
        raise InDoubt("; ".join([words, *different[:_FEW]]), receipts=proven, taken=True)

    def _send_one(self, delivery: Delivery) -> Receipt:
        try:
            made = self.client.create_usage(delivery.body)
        except Refused as refusal:
            if (found := self._already_there(delivery)) is not None:
                return found
            if _may_be_there(delivery):
                raise InDoubt(f"{refusal}; {_REFUSED_AGAIN}") from refusal
            raise
        return Receipt(delivery.token, made["id"])

    def _send_bulk(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Upload the chunk and accept what can be read back; the rest is in doubt, whatever the reply was.

        What cannot be seen may become visible later, or have been skipped without a word.
        """
        said = "the account says that it took it"
        try:
            self.client.upload_usage([delivery.body for delivery in chunk])
        except InDoubt as doubt:
            said = str(doubt)
        answers = self._read_back(chunk)
        receipts = [found for one in chunk if isinstance(found := answers.get(one.token), Receipt)]
        if len(receipts) == len(chunk):
            return receipts
        different = [str(answer) for answer in answers.values() if isinstance(answer, Refused)]
        words = f"{self.site}: {len(receipts)} of a bulk of {len(chunk)} can be read back; {said}"
        raise InDoubt("; ".join([words, *different[:_FEW]]), receipts=receipts)

    def _read_back(self, chunk: Sequence[Delivery]) -> dict[str, Receipt | Refused]:
        """Return what of the chunk the account lists, by token; nothing follows for what is absent, or unreadable."""
        wanted = {delivery.token: delivery for delivery in chunk}
        held: dict[str, list[Json]] = {}
        try:
            for usage in self._usages_of(chunk):
                if (key := str(usage.get("external_key"))) in wanted:
                    held.setdefault(key, []).append(usage)
        except UsageBillingError as failure:
            log.warning("what the account holds of a bulk could not be read to its end: %s", failure)
        return {token: self._judged(wanted[token], usages) for token, usages in held.items()}

    def _usages_of(self, chunk: Sequence[Delivery]) -> Iterator[Json]:
        """Yield the usage of the chunk's lines and times, and perhaps more; one may come twice.

        Many lines are first looked for in the account's list of that time, as long as that takes fewer requests than
        asking for one line after the other.
        """
        starts = [self.client.moment(json.loads(delivery.body)["from"]) for delivery in chunk]
        since, until = min(starts), max(starts)
        lines = sorted({int(delivery.address["line_item_id"]) for delivery in chunk})
        if len(lines) > _FEW:
            listed = self.client.usages({}, since, until)
            yield from islice(listed, _LIMIT * (len(lines) // 4))
            if next(listed, None) is None:
                return
        for line in lines:
            yield from self.client.usages({"line_item_id": line}, since, until)

    def _read_answers(self, chunk: Sequence[Delivery], answers: Sequence[Json]) -> list[Receipt]:
        """Return the receipts of a batch, whose records were each answered singly.

        A record that was throttled or refused goes without a receipt: it was not applied, and comes again in a later
        chunk. Only a chunk of which nothing was taken is `Refused`, so that it is split until the culprit stands alone.

        Raises:
            NotApplied, Refused: nothing was taken.
            InDoubt: the answer to one of them is unclear; it holds the receipts of the others.
        """
        outcomes = [self._outcome(delivery, answer) for delivery, answer in zip(chunk, answers, strict=True)]
        receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
        if unclear := [str(outcome) for outcome in outcomes if isinstance(outcome, InDoubt)]:
            raise InDoubt(f"{self.site}: records of the batch: {_some(unclear)}", receipts=receipts)
        refused = [str(outcome) for outcome in outcomes if isinstance(outcome, Refused)]
        if not receipts and refused:
            raise Refused(f"{self.site}: {_some(refused)}")
        if not receipts:
            raise NotApplied(f"{self.site}: the batch was throttled", throttled=True)
        return receipts

    def _outcome(self, delivery: Delivery, answer: Json) -> Receipt | NotApplied | Refused | InDoubt:
        """Return what the answer to one record of a batch means."""
        code = whole_number(answer.get("code"), 0) or 0
        words = f"HTTP {code}: {self.client.said(answer)}"
        if (number := record_id(answer)) is not None:
            return Receipt(delivery.token, number)
        if code == _THROTTLED:
            return NotApplied(words)
        if code not in _REFUSALS:
            return InDoubt(words)
        try:
            found = self._already_there(delivery)
        except InDoubt as doubt:
            return doubt
        return found or (InDoubt(f"{words}; {_REFUSED_AGAIN}") if _may_be_there(delivery) else Refused(words))

    def _already_there(self, delivery: Delivery) -> Receipt | None:
        """Return the receipt of a record that was refused because an earlier try had succeeded, or None.

        Raises:
            InDoubt: the account could not be asked, or holds the key with another quantity.
        """
        try:
            found = self._found(delivery)
        except UsageBillingError as failure:
            raise InDoubt(
                f"{failure}; a record was refused, and whether for its own earlier success is not known"
            ) from failure
        if isinstance(found, Refused):
            raise InDoubt(str(found))
        return found

    def _found(self, delivery: Delivery) -> Receipt | Refused | None:
        held = self.client.usages_by_external_key(delivery.token)
        return self._judged(delivery, held) if held else None

    def _judged(self, delivery: Delivery, held: Sequence[Json]) -> Receipt | Refused:
        """Say whether what the account holds under a delivery's key is this delivery, once and with its quantity."""
        numbers = {record_number(usage.get("usage_history_id")): usage for usage in held}
        values = [exact_number(usage.get("usage_value")) for usage in numbers.values()]
        if values != [delivery.quantity] or None in numbers:
            shown = ", ".join("no readable value" if value is None else str(value) for value in values)
            return Refused(
                f"{self.site}: external key {delivery.token} is held with {shown}, and {delivery.quantity} was sent"
            )
        return Receipt(delivery.token, str(*numbers), "found by its external key")

    def settle(self, doubts: Sequence[Delivery], now: datetime) -> Mapping[str, Answer]:
        """Ask for each token as an external key; what is not there after `settle_after` was not applied.

        Of many, most are found in the list of usage, with fewer questions; only the single one tells of an absence. One
        that was refused when it came again, and is still not there, would be refused for ever: a person decides.
        """
        answers = self._settled(doubts)
        for doubt in doubts:
            if _REFUSED_AGAIN in doubt.reason and answers.get(doubt.token, doubt) is None:
                why = doubt.reason.removeprefix(PERSON_DECIDES).removesuffix(_NOT_SHOWN)
                answers[doubt.token] = Refused(why + _NOT_SHOWN)
        return answers

    def _settled(self, doubts: Sequence[Delivery]) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        if len(doubts) > _FEW:
            answers.update(self._read_back(doubts))
        misses = 0
        for doubt in (doubt for doubt in doubts if doubt.token not in answers):
            try:
                answers[doubt.token] = self._found(doubt)
                misses = 0
            except NotApplied:
                # One odd answer leaves one in doubt; but an account that does not answer is not asked a thousand times.
                misses += 1
                if misses == min(_MISSES, len(doubts)) and not answers:
                    raise
                if misses == _MISSES:
                    break
        return answers

    def records(self, deliveries: pd.DataFrame) -> Iterator[SiteRecord]:
        """Yield the records of the line items that `deliveries` went to, over the span of their periods."""
        for address, some in deliveries.groupby("address"):
            line = json.loads(str(address))["line_item_id"]
            since, until = some["period_start"].min().to_pydatetime(), some["period_end"].max().to_pydatetime()
            yield from self._records({"line_item_id": line}, Period(since, until))

    def elsewhere(self, span: Period) -> Iterator[SiteRecord]:
        """Yield every record of the account over a span: an upgrade leaves those of before on a line that is gone."""
        return self._records({}, span)

    def _records(self, equal: Mapping[str, object], span: Period) -> Iterator[SiteRecord]:
        for usage in self.client.usages(equal, span.start, span.end - timedelta(seconds=1)):
            key = self.client.key_of("usage", usage)
            token = key if _TOKEN.fullmatch(key) else ""
            if (value := exact_number(usage.get("usage_value"))) is None:
                raise NotApplied(f"{self.site}: query usage: usage {usage['usage_history_id']} has no readable value")
            shown = f"{usage.get('from')} to {usage.get('to')}"
            yield SiteRecord(token, str(usage["usage_history_id"]), value, shown)

    def moved(self, accepted: pd.DataFrame) -> Iterator[Moved]:
        """Yield what is stored on a line that an upgrade has replaced since, in a cycle that is not invoiced yet."""
        stored = {address: json.loads(address) for address in accepted["address"].unique()}
        accounts = sorted({str(address["account"]) for address in stored.values()})
        today = {target.account: target for target in self.resolve(accounts) if not target.unknown}
        for text, some in accepted.groupby("address"):
            address = stored[str(text)]
            target = today.get(str(address["account"]))
            if target is None or target.address["line_item_id"] == address["line_item_id"]:
                continue
            is_open = some["period_start"] >= target.open_from if target.open_from else some["period_start"].notna()
            if count := int(is_open.sum()):
                yield Moved(
                    count,
                    f"account {target.account}: {count} deliveries are stored on line {address['line_item_id']}, which "
                    f"was replaced by {target.address['line_item_id']}; no document says that they are billed",
                )


_CHUNK_SIZES = {"single": 1, "batch": _LARGEST_BATCH, "bulk": _LARGEST_BULK}
_REFUSALS = (400, 404, 422)
_THROTTLED = 429


def _some(words: Iterable[str]) -> str:
    return "; ".join(sorted(set(words)))[:_LIMIT]


_FLAGS = {"true": True, "1": True, "false": False, "0": False}
_NOT_SHOWN = "; the account has not shown it since"


def _places(quantity: Decimal) -> int:
    """Return how many decimal places a quantity needs."""
    return len(f"{quantity:f}".partition(".")[2].rstrip("0"))


def _may_be_there(delivery: Delivery) -> bool:
    """Say of a delivery that is refused now whether an earlier request of it may have been carried out unseen.

    One earlier request that the account did not carry out is no reason to think so; of several only the last is known.
    Where a person has looked there and said no, the refusal is the last word.
    """
    return delivery.reason == ABSENT or (delivery.sends > 1 and not delivery.reason.startswith(DECIDED))
