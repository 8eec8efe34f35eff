"""How a Maxio site bills: metered balances with a floor at zero, and metrics over events by their timestamp."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from usage_billing.sandbox.billing import ZERO, Account, InvoiceLine, StoredTotal, all_accounts
from usage_billing.sandbox.books import LIVE_STATES, Books, Row
from usage_billing.sandbox.clock import from_micros
from usage_billing.sandbox.switches import SwitchBoard
from usage_billing.sandbox.wire import plain
from usage_billing.sandbox.world import Component, MaxioWorld, Metric

_LIVE = "('" + "', '".join(LIVE_STATES) + "')"
# A trial has no usage on its invoice, so usage is told apart by state.
_BILLED = "('" + "', '".join(state for state in LIVE_STATES if state != "trialing") + "')"
_TRIAL = "('trialing')"


PREPAID = "prepaid_usage_component"
DRAWN = "prepaid_allocation"
"""The kind of a line, never shown to clients, that says how much prepaid usage an allocation covered."""


@dataclass(frozen=True)
class Balance:
    """The usage of a period: all of it, and of prepaid usage what no allocation covers."""

    used: Decimal = ZERO
    overage: Decimal = ZERO

    @property
    def drawn(self) -> Decimal:
        """Return what was drawn from the allocation."""
        return self.used - self.overage

    def moved(self, quantity: Decimal, allocation: Decimal | None, *, overage_first: bool) -> "Balance":
        """Return the balance after a usage, with its floor at 0; without an allocation there is no overage."""
        if allocation is None:
            return Balance(max(self.used + quantity, ZERO))
        if quantity >= 0:
            covered = min(quantity, max(allocation - self.drawn, ZERO))
            return Balance(self.used + quantity, self.overage + quantity - covered)
        taken = min(-quantity, self.used)
        from_overage = min(taken, self.overage) if overage_first else max(taken - self.drawn, ZERO)
        return Balance(self.used - taken, self.overage - from_overage)


class MaxioBiller:
    """Bills the subscriptions of one Maxio site."""

    usage_kinds = ("metered_component", "event_based_component", PREPAID, DRAWN)

    def __init__(self, world: MaxioWorld, books: Books, switches: SwitchBoard) -> None:
        self.world = world
        self._site = world.site
        self.books = books
        self.switches = switches
        self.components = {component.id: component for component in world.components}
        self._metrics_by_id = {part.id: part.metric for part in world.components if part.metric}
        self._allocations = {s.id: s.allocations for s in world.subscriptions}
        self._products = {
            s.id: family.product
            for s in world.subscriptions
            for family in world.product_families
            if family.handle == s.family
        }

    @property
    def assessment_delay(self) -> int:
        """Return how long after its end a period is invoiced, in microseconds."""
        return int(self.switches.seconds("assessment_delay_seconds")[1] * 1_000_000)

    def open_lines(self, account: Account | None = None) -> Mapping[int, list[InvoiceLine]]:
        """Return the plan itself, each balance above 0 and each activated metric, by subscription; a trial has none."""
        lines: dict[int, list[InvoiceLine]] = {}
        numbers = [account.id] if account else self._live_subscriptions()
        for number in numbers:
            lines[number] = [self._baseline(number)]
        for number, component, balance, point in self._balances(_BILLED, account):
            lines[number] += _lines(component, balance, point)
        for number, component, quantity, point in self._metrics(_BILLED, account):
            lines[number].append(_line(component, quantity, point))
        return lines

    def supposed_lines(self, account: Account, supposed: Iterable[tuple[Component, int, int]]) -> list[InvoiceLine]:
        """Return the plan itself and these components, each with the quantity and the price point supposed."""
        lines = [_line(part, Decimal(quantity), point) for part, quantity, point in supposed]
        return [self._baseline(account.id), *lines]

    def unused_lines(self, account: Account, shown: Collection[int]) -> list[InvoiceLine]:
        """Return a line of nothing for each activated component that is not among those `shown`."""
        rows = self.books.rows(
            "SELECT component, price_point FROM activation WHERE site = ? AND subscription = ? AND active",
            *(self._site, account.id),
        )
        unused = [(self.components[row["component"]], row["price_point"]) for row in rows]
        return [_line(component, ZERO, point) for component, point in unused if component.id not in shown]

    def ahead(self) -> Iterable[tuple[int, str, Decimal]]:
        """Return usage of trials, unless it is dropped, and what came between a period's end and its assessment."""
        rows = self.books.rows("SELECT subscription, component, quantity FROM next_balance WHERE site = ?", self._site)
        for row in rows:
            yield row["subscription"], self.components[row["component"]].handle, Decimal(row["quantity"])
        if self.switches["trial_usage"] == "dropped":
            return
        for number, component, balance, _ in self._balances(_TRIAL):
            yield number, component.handle, balance.used
        for number, component, quantity, _ in self._metrics(_TRIAL):
            yield number, component.handle, quantity

    def start_period(self, account: Account) -> None:
        """Begin the balances again at 0, or with what came for the new period already; a trial may be carried over."""
        trial = account.state == "trialing"
        carried = trial and self.switches["trial_usage"] == "first_paid_renewal"
        since = self.usage_since(account)
        self.books.write("DELETE FROM carried WHERE site = ? AND account = ?", self._site, account.id)
        if carried:
            self.books.write("INSERT INTO carried VALUES (?, ?, ?)", self._site, account.id, since)
        if trial:
            self.books.write("UPDATE account SET state = 'active' WHERE site = ? AND id = ?", self._site, account.id)
        sql = "SELECT component, quantity, price_point FROM {} WHERE site = ? AND subscription = ?"
        coming = {row["component"]: row for row in self.books.rows(sql.format("next_balance"), self._site, account.id)}
        for row in self.books.rows(sql.format("balance"), self._site, account.id):
            part = self.components[row["component"]]
            before = self._stored_balance(account.id, part) if carried else Balance()
            ahead = coming.get(part.id)
            after = self._moved(before, Decimal(ahead["quantity"]), account, part) if ahead else before
            assessed_at = account.period_end + self.assessment_delay
            self._write_balance(account, part, after, (ahead or row)["price_point"], assessed_at)
        self.books.write("DELETE FROM next_balance WHERE site = ? AND subscription = ?", self._site, account.id)

    def move_balance(
        self, account: Account, part: Component, quantity: Decimal, price_point: int
    ) -> tuple[Balance, Balance]:
        """Add a usage to the balance of the period that it lands in; return that balance before and after."""
        before = self.balance(account, part)
        after = self._moved(before, quantity, account, part)
        if not self._lands_in_next(account):
            self._write_balance(account, part, after, price_point, self.books.now())
            return before, after
        if self._balance_row(account.id, part.id) is None:
            self._write_balance(account, part, Balance(), price_point, self.books.now())
        self.books.write(
            "REPLACE INTO next_balance VALUES (?, ?, ?, ?, ?)",
            *(self._site, account.id, part.id, str(after.used), price_point),
        )
        return before, after

    def balance(self, account: Account, part: Component) -> Balance:
        """Return the balance of the period that usage lands in now."""
        if not self._lands_in_next(account):
            return self._stored_balance(account.id, part)
        row = self.books.row(
            "SELECT quantity FROM next_balance WHERE site = ? AND subscription = ? AND component = ?",
            *(self._site, account.id, part.id),
        )
        return self._moved(Balance(), Decimal(row["quantity"]) if row else ZERO, account, part)

    def balance_seen(self, account: Account, part: Component, delay: tuple[float, float]) -> Decimal:
        """Return the balance as a list that lags behind shows it."""
        seen, args = self.books.visible(delay, "at")
        row = self.books.row(
            f"SELECT quantity FROM balance_history WHERE site = ? AND subscription = ? AND component = ? AND {seen}"
            " ORDER BY id DESC LIMIT 1",
            *(self._site, account.id, part.id, *args),
        )
        return Decimal(row["quantity"]) if row else ZERO

    def usage_since(self, account: Account) -> int:
        """Return the instant from which events count to the open period: its start, or that of a trial before it."""
        row = self.books.row("SELECT since FROM carried WHERE site = ? AND account = ?", self._site, account.id)
        return int(row["since"]) if row else account.period_start

    def stored(self) -> Iterable[StoredTotal]:
        """Return the sums of usages, and of what the events were worth to each component."""
        yield from self._stored_usages()
        yield from self._stored_events()

    def records(self, component: str | None) -> list[dict[str, Any]]:
        """Return usages, then events with what they are worth to each component; times are UTC."""
        names = {part.id: part.handle for part in self.world.components if component in (None, part.handle)}
        usages = self.books.rows("SELECT * FROM usage WHERE site = ? ORDER BY id", self._site)
        events = self.books.rows(
            "SELECT e.*, m.component, m.value, m.counts_at FROM event e LEFT JOIN metering m ON m.event = e.id"
            " WHERE e.site = ? ORDER BY e.id",
            self._site,
        )
        rows = [_usage_record(row, names[row["component"]]) for row in usages if row["component"] in names]
        rows += [
            _event_record(row, names.get(row["component"]))
            for row in events
            if row["component"] in names or (component is None and row["component"] is None)
        ]
        return [{"site": self._site, **row} for row in rows]

    def metric_values(
        self, account: Account | None, delay: tuple[float, float] = (0, 0)
    ) -> dict[tuple[int, int], Decimal]:
        """Return the metric of each (subscription, component) over the open period, activated or not.

        With a delay, only events that reads can see already are counted.
        """
        seen, args = self.books.visible(delay, "m.received_at", "m.wall", "m.event")
        rows = self.books.rows(
            "SELECT m.subscription, m.component, m.value FROM account a"
            " LEFT JOIN carried c ON c.site = a.site AND c.account = a.id"
            " JOIN metering m ON m.site = a.site AND m.subscription = a.id"
            " AND m.counts_at >= coalesce(c.since, a.period_start) AND m.counts_at < a.period_end"
            f" WHERE a.site = ? AND {seen}{_only(account)}",
            *(self._site, *args),
        )
        values: dict[tuple[int, int], list[str]] = {}
        for row in rows:
            values.setdefault((row["subscription"], row["component"]), []).append(row["value"])
        return {key: compute(self._metrics_by_id[key[1]], found) for key, found in values.items()}

    def _baseline(self, number: int) -> InvoiceLine:
        product = self._products[number]
        return InvoiceLine("baseline", "", product.id, product.id, product.name, Decimal(1), product.price)

    def _live_subscriptions(self) -> list[int]:
        rows = self.books.rows(f"SELECT id FROM account WHERE site = ? AND state IN {_LIVE}", self._site)
        return [row["id"] for row in rows]

    def _balances(self, states: str, account: Account | None = None) -> Iterable[tuple[int, Component, Balance, int]]:
        rows = self.books.rows(
            "SELECT b.subscription, b.component, b.quantity, o.quantity AS overage, b.price_point FROM balance b"
            " JOIN account a ON a.site = b.site AND a.id = b.subscription"
            " LEFT JOIN overage o ON o.site = b.site AND o.subscription = b.subscription AND o.component = b.component"
            f" WHERE b.site = ? AND b.quantity != '0' AND a.state IN {states}{_only(account)}",
            self._site,
        )
        for row in rows:
            balance = Balance(Decimal(row["quantity"]), Decimal(row["overage"] or 0))
            if balance.used != 0:
                yield row["subscription"], self.components[row["component"]], balance, row["price_point"]

    def _metrics(self, states: str, account: Account | None = None) -> Iterable[tuple[int, Component, Decimal, int]]:
        values = self.metric_values(account)
        rows = self.books.rows(
            "SELECT v.subscription, v.component, v.price_point FROM activation v"
            " JOIN account a ON a.site = v.site AND a.id = v.subscription"
            f" WHERE v.site = ? AND v.active AND a.state IN {states}{_only(account)}",
            self._site,
        )
        for row in rows:
            quantity = values.get((row["subscription"], row["component"]), ZERO)
            if quantity > 0 or (quantity < 0 and self.switches["metric_below_zero"] == "as_computed"):
                yield row["subscription"], self.components[row["component"]], quantity, row["price_point"]

    def _lands_in_next(self, account: Account) -> bool:
        """Say whether the period has ended, is not assessed yet, and takes no more usage."""
        ended = self.books.now() >= account.period_end and account.live
        return ended and self.switches["usage_before_assessment"] == "new_period"

    def _moved(self, before: Balance, quantity: Decimal, account: Account, part: Component) -> Balance:
        bought = self._allocations[account.id].get(part.handle, ZERO) if part.kind == PREPAID else None
        return before.moved(quantity, bought, overage_first=self.switches["negative_on_prepaid"] == "overage_first")

    def _stored_balance(self, subscription: int, part: Component) -> Balance:
        row = self._balance_row(subscription, part.id)
        return Balance(Decimal(row["quantity"]), Decimal(row["overage"] or 0)) if row else Balance()

    def _balance_row(self, subscription: int, component: int) -> Row | None:
        return self.books.row(
            "SELECT b.quantity, o.quantity AS overage FROM balance b LEFT JOIN overage o"
            " ON o.site = b.site AND o.subscription = b.subscription AND o.component = b.component"
            " WHERE b.site = ? AND b.subscription = ? AND b.component = ?",
            *(self._site, subscription, component),
        )

    def _write_balance(self, account: Account, part: Component, balance: Balance, price_point: int, at: int) -> None:
        key = (self._site, account.id, part.id)
        self.books.write("REPLACE INTO balance VALUES (?, ?, ?, ?, ?, ?)", *key, str(balance.used), price_point, at)
        if part.kind == PREPAID:
            self.books.write("REPLACE INTO overage VALUES (?, ?, ?, ?)", *key, str(balance.overage))
        self.books.write(
            "INSERT INTO balance_history (site, subscription, component, quantity, at, wall) VALUES (?, ?, ?, ?, ?, ?)",
            *(*key, str(balance.used), at, self.books.wall()),
        )

    def _stored_usages(self) -> Iterable[StoredTotal]:
        rows = self.books.rows("SELECT subscription, component, quantity FROM usage WHERE site = ?", self._site)
        yield from self._sum((row["subscription"], "", row["component"], row["quantity"]) for row in rows)

    def _stored_events(self) -> Iterable[StoredTotal]:
        rows = self.books.rows(
            "SELECT subscription, subscriber, component, value FROM metering WHERE site = ?", self._site
        )
        yield from self._sum(
            (row["subscription"], "" if row["subscription"] else row["subscriber"], row["component"], row["value"])
            for row in rows
        )

    def _sum(self, rows: Iterable[tuple[int | None, str, int, str]]) -> Iterable[StoredTotal]:
        # One that was purged is known by its first name still.
        references = {s.id: s.reference or "" for s in self.world.subscriptions}
        references |= {account.id: account.reference or "" for account in all_accounts(self.books, self._site)}
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


def _lines(component: Component, balance: Balance, price_point: int) -> list[InvoiceLine]:
    """Return the charge of a balance; a prepaid one has its overage charged, and what was drawn stands beside it."""
    if component.kind != PREPAID:
        return [_line(component, balance.used, price_point)]
    lines = [_line(component, balance.overage, price_point)] if balance.overage else []
    if balance.drawn:
        free = _line(component, balance.drawn, price_point)
        lines.append(replace(free, kind=DRAWN, unit_price=ZERO))
    return lines


def _line(component: Component, quantity: Decimal, price_point: int) -> InvoiceLine:
    point = component.price_point(price_point)
    return InvoiceLine(
        component.kind, component.handle, component.id, point.id, component.name, quantity, point.unit_price
    )
