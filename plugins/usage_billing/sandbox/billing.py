"""Billing periods, renewals and invoices, alike for both billing APIs; and what was billed.

A site's own rules (balances, metrics, cycles) stand behind `Biller`. A renewal happens when the clock passes a period's
end: an invoice with what the open period held, then the next period opens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any, Protocol

from .books import LIVE_STATES, Books
from .clock import from_micros, midnight
from .wire import plain
from .world import BillingPeriod, World

ZERO = Decimal(0)
_LIVE = "('" + "', '".join(LIVE_STATES) + "')"


@dataclass(frozen=True)
class Account:
    """A subscription or package with its open period, in microseconds, half-open."""

    id: int
    reference: str | None
    state: str
    period_start: int
    period_end: int
    created_at: int
    ended_at: int | None

    @property
    def live(self) -> bool:
        """Say whether its period advances and charges accrue."""
        return self.state in LIVE_STATES


@dataclass(frozen=True)
class InvoiceLine:
    """One charge.

    `component` is the component's handle or the item's external key, empty for the plan itself; `price_id` is the
    price point (Maxio) or the package's line (ChargeOver).
    """

    kind: str
    component: str
    component_id: int
    price_id: int
    title: str
    quantity: Decimal
    unit_price: Decimal

    @property
    def amount(self) -> Decimal:
        """Return the exact price, unrounded."""
        return self.quantity * self.unit_price


@dataclass(frozen=True)
class StoredTotal:
    """The plain sum and number of the records that a site holds for one account and component.

    `account` is None for events that match no subscription; `reference` then is the identifier they came with.
    """

    account: int | None
    reference: str
    component: str
    quantity: Decimal
    records: int


class Biller(Protocol):
    """The billing rules of one site."""

    @property
    def world(self) -> World:
        """Return the world that is billed."""
        ...

    @property
    def usage_kinds(self) -> tuple[str, ...]:
        """Return the kinds of invoice lines that charge for usage."""
        ...

    @property
    def assessment_delay(self) -> int:
        """Return how long after its end a period is invoiced, in microseconds."""
        ...

    def open_lines(self, account: Account | None = None) -> Mapping[int, list[InvoiceLine]]:
        """Return what the open period would invoice now, by account: of one, or of all that are live."""
        ...

    def ahead(self) -> Iterable[tuple[int, str, Decimal]]:
        """Return account, component and quantity of usage that only the period after the open one will invoice."""
        ...

    def start_period(self, account: Account) -> None:
        """Reset what does not carry over into the account's next period."""
        ...

    def stored(self) -> Iterable[StoredTotal]:
        """Return the totals of the stored records."""
        ...

    def records(self, component: str | None) -> list[dict[str, Any]]:
        """Return the raw stored records in the order they were stored, of one component or of all."""
        ...


def find_account(books: Books, site: str, number: int) -> Account | None:
    """Return the account with the id."""
    row = books.row("SELECT * FROM account WHERE site = ? AND id = ?", site, number)
    return _account(row) if row else None


def find_by_reference(books: Books, site: str, reference: str) -> Account | None:
    """Return the account with the reference."""
    row = books.row("SELECT * FROM account WHERE site = ? AND reference = ?", site, reference)
    return _account(row) if row else None


def all_accounts(books: Books, site: str) -> list[Account]:
    """Return every account of the site, by id."""
    return [_account(row) for row in books.rows("SELECT * FROM account WHERE site = ? ORDER BY id", site)]


def renew_due(books: Books, billers: Mapping[str, Biller]) -> int:
    """Renew every live account whose period is to be assessed by now, oldest end first; return how many renewals."""
    renewals = 0
    due = (
        f"SELECT * FROM account WHERE site = ? AND state IN {_LIVE} AND period_end <= ?"
        " ORDER BY period_end, id LIMIT 500"
    )
    for site, biller in billers.items():
        while rows := books.rows(due, site, books.now() - biller.assessment_delay):
            for row in rows:
                _renew(books, biller, _account(row))
            renewals += len(rows)
    return renewals


def billed(books: Books, biller: Biller) -> list[dict[str, str | int]]:
    """Return one row for each account and component that was invoiced, would be, or has records.

    `billed` is what was invoiced plus what the open period would invoice, with what is known to be carried into the
    next one; `stored` sums the records as they came.
    """
    invoiced = _invoiced(books, biller)
    still_open: dict[tuple[str, str], Decimal] = {}
    for account, lines in biller.open_lines().items():
        for line in lines:
            if line.kind in biller.usage_kinds:
                pair = (str(account), line.component)
                still_open[pair] = still_open.get(pair, ZERO) + line.quantity
    for carrier, component, quantity in biller.ahead():
        pair = (str(carrier), component)
        still_open[pair] = still_open.get(pair, ZERO) + quantity
    stored = {(str(total.account or ""), total.component, total.reference): total for total in biller.stored()}
    references = {str(account.id): account.reference or "" for account in all_accounts(books, biller.world.site)}
    keys = {
        (n, component, references.get(n, "")) for n, component in invoiced.keys() | still_open.keys()
    } | stored.keys()
    rows: list[dict[str, str | int]] = []
    for key in sorted(keys):
        number, component, reference = key
        was, will = invoiced.get((number, component), ZERO), still_open.get((number, component), ZERO)
        total = stored.get(key)
        rows.append(
            {
                "site": biller.world.site,
                "subscription": number,
                "reference": reference,
                "component": component,
                "invoiced": plain(was),
                "open": plain(will),
                "billed": plain(was + will),
                "stored": plain(total.quantity) if total else "0",
                "records": total.records if total else 0,
            }
        )
    return rows


def _invoiced(books: Books, biller: Biller) -> dict[tuple[str, str], Decimal]:
    sums: dict[tuple[str, str], Decimal] = {}
    marks = ", ".join("?" * len(biller.usage_kinds))
    sql = f"SELECT account, component, quantity FROM invoice_line WHERE site = ? AND kind IN ({marks})"
    for row in books.rows(sql, biller.world.site, *biller.usage_kinds):
        key = (str(row["account"]), row["component"])
        sums[key] = sums.get(key, ZERO) + Decimal(row["quantity"])
    return sums


def _renew(books: Books, biller: Biller, account: Account) -> None:
    site = biller.world.site
    invoice = books.write(
        "INSERT INTO invoice (site, account, period_start, period_end, issued_at) VALUES (?, ?, ?, ?, ?)",
        *(site, account.id, account.period_start, account.period_end, account.period_end + biller.assessment_delay),
    )
    for line in biller.open_lines(account).get(account.id, []):
        books.write(
            "INSERT INTO invoice_line (invoice, site, account, kind, component, component_id, price_id, title,"
            " quantity, unit_price, amount) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(invoice, site, account.id, line.kind, line.component, line.component_id, line.price_id, line.title),
            *(str(line.quantity), str(line.unit_price), str(line.amount)),
        )
    biller.start_period(account)
    start, end = next_period(biller.world, account)
    books.write(
        "UPDATE account SET period_start = ?, period_end = ? WHERE site = ? AND id = ?", start, end, site, account.id
    )


def next_period(world: World, account: Account) -> tuple[int, int]:
    """Return the period after the account's open one: local midnights of the site's zone, in microseconds."""
    zone = world.zone
    period = BillingPeriod(start=_local_day(account.period_start, world), end=_local_day(account.period_end, world))
    following = period.following()
    return midnight(following.start, zone), midnight(following.end, zone)


def _local_day(instant: int, world: World) -> date:
    return from_micros(instant, world.zone).date()


def _account(row: Mapping[str, object]) -> Account:
    values = {name: row[name] for name in Account.__dataclass_fields__}
    return Account(**values)  # type: ignore[arg-type]
