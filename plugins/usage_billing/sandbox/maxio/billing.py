"""How a Maxio site bills: metered balances with a floor at zero, and metrics over events by their timestamp."""

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from usage_billing.sandbox.billing import ZERO, Account, InvoiceLine, StoredTotal
from usage_billing.sandbox.books import LIVE_STATES, Books
from usage_billing.sandbox.clock import from_micros
from usage_billing.sandbox.switches import SwitchBoard
from usage_billing.sandbox.wire import plain
from usage_billing.sandbox.world import Component, MaxioWorld, Metric

_LIVE = "('" + "', '".join(LIVE_STATES) + "')"


class MaxioBiller:
    """Bills the subscriptions of one Maxio site."""

    usage_kinds = ("metered_component", "event_based_component")

    def __init__(self, world: MaxioWorld, books: Books, switches: SwitchBoard) -> None:
        self.world = world
        self.books = books
        self.switches = switches
        self.components = {component.id: component for component in world.components}
        self._metrics_by_id = {part.id: part.metric for part in world.components if part.metric}
        self._products = {
            s.id: family.product
            for s in world.subscriptions
            for family in world.product_families
            if family.handle == s.family
        }

    def open_lines(self, account: Account | None = None) -> Mapping[int, list[InvoiceLine]]:
        """Return the plan itself, each metered balance above 0 and each activated metric, by subscription."""
        lines: dict[int, list[InvoiceLine]] = {}
        numbers = [account.id] if account else self._live_subscriptions()
        for number in numbers:
            lines[number] = [self._baseline(number)]
        for number, component, quantity, point in self._balances(account):
            lines[number].append(_line(component, quantity, point))
        for number, component, quantity, point in self._metrics(account):
            lines[number].append(_line(component, quantity, point))
        return lines

    def start_period(self, account: Account) -> None:
        """Reset the metered balances: they are billed in arrears and begin again at 0."""
        self.books.write(
            "UPDATE balance SET quantity = '0' WHERE site = ? AND subscription = ?", self.world.site, account.id
        )

    def stored(self) -> Iterable[StoredTotal]:
        """Return the sums of usages, and of what the events were worth to each component."""
        yield from self._stored_usages()
        yield from self._stored_events()

    def records(self, component: str | None) -> list[dict[str, Any]]:
        """Return usages, then events with what they are worth to each component; times are UTC."""
        names = {part.id: part.handle for part in self.world.components if component in (None, part.handle)}
        usages = self.books.rows("SELECT * FROM usage WHERE site = ? ORDER BY id", self.world.site)
        events = self.books.rows(
            "SELECT e.*, m.component, m.value, m.counts_at FROM event e LEFT JOIN metering m ON m.event = e.id"
            " WHERE e.site = ? ORDER BY e.id",
            self.world.site,
        )
        rows = [_usage_record(row, names[row["component"]]) for row in usages if row["component"] in names]
        rows += [
            _event_record(row, names.get(row["component"]))
            for row in events
            if row["component"] in names or (component is None and row["component"] is None)
        ]
        return [{"site": self.world.site, **row} for row in rows]

    def balance(self, subscription: int, component: int) -> Decimal:
        """Return the metered balance of the open period."""
        row = self.books.row(
            "SELECT quantity FROM balance WHERE site = ? AND subscription = ? AND component = ?",
            *(self.world.site, subscription, component),
        )
        return Decimal(row["quantity"]) if row else ZERO

    def metric_values(self, account: Account | None, delay_seconds: float = 0) -> dict[tuple[int, int], Decimal]:
        """Return the metric of each (subscription, component) over the open period, activated or not.

        With a delay, only events that reads can see already are counted.
        """
        received, wall = self.books.visible_since(delay_seconds)
        rows = self.books.rows(
            "SELECT m.subscription, m.component, m.value FROM account a JOIN metering m"
            " ON m.site = a.site AND m.subscription = a.id"
            " AND m.counts_at >= a.period_start AND m.counts_at < a.period_end"
            f" WHERE a.site = ? AND (m.received_at <= ? OR m.wall <= ?){_only(account)}",
            *(self.world.site, received, wall),
        )
        values: dict[tuple[int, int], list[str]] = {}
        for row in rows:
            values.setdefault((row["subscription"], row["component"]), []).append(row["value"])
        return {key: compute(self._metrics_by_id[key[1]], found) for key, found in values.items()}

    def _baseline(self, number: int) -> InvoiceLine:
        product = self._products[number]
        return InvoiceLine("baseline", "", product.id, product.id, product.name, Decimal(1), product.price)

    def _live_subscriptions(self) -> list[int]:
        rows = self.books.rows(f"SELECT id FROM account WHERE site = ? AND state IN {_LIVE}", self.world.site)
        return [row["id"] for row in rows]

    def _balances(self, account: Account | None) -> Iterable[tuple[int, Component, Decimal, int]]:
        rows = self.books.rows(
            "SELECT b.subscription, b.component, b.quantity, b.price_point FROM balance b"
            " JOIN account a ON a.site = b.site AND a.id = b.subscription"
            f" WHERE b.site = ? AND b.quantity != '0' AND a.state IN {_LIVE}{_only(account)}",
            self.world.site,
        )
        for row in rows:
            if (quantity := Decimal(row["quantity"])) != 0:
                yield row["subscription"], self.components[row["component"]], quantity, row["price_point"]

    def _metrics(self, account: Account | None) -> Iterable[tuple[int, Component, Decimal, int]]:
        values = self.metric_values(account)
        rows = self.books.rows(
            "SELECT v.subscription, v.component, v.price_point FROM activation v"
            " JOIN account a ON a.site = v.site AND a.id = v.subscription"
            f" WHERE v.site = ? AND v.active AND a.state IN {_LIVE}{_only(account)}",
            self.world.site,
        )
        for row in rows:
            quantity = values.get((row["subscription"], row["component"]), ZERO)
            if quantity != 0:
                yield row["subscription"], self.components[row["component"]], quantity, row["price_point"]

    def _stored_usages(self) -> Iterable[StoredTotal]:
        rows = self.books.rows("SELECT subscription, component, quantity FROM usage WHERE site = ?", self.world.site)
        yield from self._sum((row["subscription"], "", row["component"], row["quantity"]) for row in rows)

    def _stored_events(self) -> Iterable[StoredTotal]:
        rows = self.books.rows(
            "SELECT subscription, subscriber, component, value FROM metering WHERE site = ?", self.world.site
        )
        yield from self._sum(
            (row["subscription"], "" if row["subscription"] else row["subscriber"], row["component"], row["value"])
            for row in rows
        )

    def _sum(self, rows: Iterable[tuple[int | None, str, int, str]]) -> Iterable[StoredTotal]:
        references = {s.id: s.reference or "" for s in self.world.subscriptions}
        sums: dict[tuple[int | None, str, int], tuple[Decimal, int]] = {}
        for number, subscriber, component, value in rows:
            key = (number, subscriber, component)
            total, records = sums.get(key, (ZERO, 0))
            sums[key] = (total + (as_number(value) or ZERO), records + 1)
        for (number, subscriber, component), (total, records) in sums.items():
            reference = references.get(number, "") if number else subscriber
            yield StoredTotal(number, reference, self.components[component].handle, total, records)


def _usage_record(row: Mapping[str, Any], component: str) -> dict[str, Any]:
    return {
        "id": row["id"],
        "subscription": str(row["subscription"]),
        "component": component,
        "quantity": plain(Decimal(row["quantity"])),
        "memo": row["memo"],
        "price_point_id": row["price_point"],
        "created_at": from_micros(row["created_at"]).isoformat(),
        "extra": json.loads(row["extra"]) if row["extra"] else {},
    }


def _event_record(row: Mapping[str, Any], component: str | None) -> dict[str, Any]:
    return {
        "id": row["id"],
        "stream": row["stream"],
        "subscription": str(row["subscription"] or ""),
        "subscriber": row["subscriber"],
        "component": component,
        "value": row["value"],
        "uniqueness_token": row["token"],
        "timestamp": from_micros(row["happened_at"]).isoformat(),
        "received_at": from_micros(row["received_at"]).isoformat(),
        "body": json.loads(row["body"], parse_float=Decimal),
    }


def compute(metric: Metric, values: list[str]) -> Decimal:
    """Return the metric over the stored values of some events; 0 where there is nothing to compute."""
    if metric.kind == "count":
        return Decimal(len(values))
    if metric.kind == "unique":
        return Decimal(len({value for value in values if value != "null"}))
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if not numbers:
        return ZERO
    if metric.kind == "sum":
        return sum(numbers, ZERO)
    if metric.kind == "average":
        return sum(numbers, ZERO) / len(numbers)
    return max(numbers) if metric.kind == "maximum" else min(numbers)


def as_number(value: str) -> Decimal | None:
    """Return a stored value as a number; None when the event had none there."""
    if value in ("null", "true", "false") or value[:1] in ('"', "[", "{"):
        return None
    return Decimal(value)


def worth(metric: Metric, event: Mapping[str, object]) -> str:
    """Return what an event is worth to a metric, as JSON text: its property, or 1 where events are counted."""
    if metric.kind == "count":
        return "1"
    value = event.get(metric.property or "")
    if isinstance(value, Decimal | int) and not isinstance(value, bool):
        return str(value)
    return json.dumps(value, default=str)


def _only(account: Account | None) -> str:
    return f" AND a.id = {account.id}" if account else ""


def _line(component: Component, quantity: Decimal, price_point: int) -> InvoiceLine:
    point = component.price_point(price_point)
    return InvoiceLine(
        component.kind, component.handle, component.id, point.id, component.name, quantity, point.unit_price
    )
