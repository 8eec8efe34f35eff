"""What the stories about arrivals are told with: a warehouse that takes rows late, and increments of an arrival source.

The warehouse is SQLite, and counts each row that is read from it.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from stories import GENTLE, WORLDS, House, shipped
from usage_billing.aggregate import aggregate
from usage_billing.arrivals import Taken, done, read
from usage_billing.deliver import Delivered, Manners
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSite, ChargeOverUsage
from usage_billing.ledger import Ledger
from usage_billing.moves import placed
from usage_billing.quarantine import WrittenOff
from usage_billing.records import Comparison, Period, Tally
from usage_billing.sandbox import Sandbox
from usage_billing.sources import BillingSource, Columns
from usage_billing.validate import validate

USAGE = (
    "SELECT event_id, time, account, quantity, region, tier, deleted FROM usage "
    "WHERE time >= :window_start AND time < :window_end"
)
ARRIVALS = "SELECT time, arrived FROM usage WHERE arrived > :after"
MOMENT = "%Y-%m-%d %H:%M:%S"


class Warehouse:
    """A table of usage as a hook reaches it. `arrived` is an id that grows, or a moment, whatever a test gives."""

    conn_type = "sqlite"
    placeholder = "?"

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows_read = 0
        self.statements: list[str] = []
        self._table = sqlite3.connect(path, isolation_level=None)
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute(
            "CREATE TABLE usage (event_id TEXT PRIMARY KEY, time TEXT, account TEXT, quantity TEXT, "
            "region TEXT DEFAULT 'eu', tier TEXT DEFAULT 'premium', arrived, deleted INTEGER DEFAULT 0)"
        )
        self._table.execute("CREATE INDEX by_time ON usage (time)")

    def put(self, arrived: int | str, event_id: str, time: datetime, account: str, quantity: int | str) -> None:
        """Write a row, or write it anew."""
        values = (event_id, time.astimezone(UTC).strftime(MOMENT), account, str(quantity), arrived)
        self._table.execute(
            "INSERT INTO usage (event_id, time, account, quantity, arrived) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT (event_id) DO UPDATE SET quantity = excluded.quantity, arrived = excluded.arrived",
            values,
        )

    def put_as_it_is(self, event_id: str, time: str | None, account: str | None, quantity: str | None) -> None:
        """Write a row of whatever text, as a warehouse without types has it."""
        values = (event_id, time, account, quantity)
        self._table.execute("INSERT INTO usage (event_id, time, account, quantity) VALUES (?, ?, ?, ?)", values)

    def delete(self, event_id: str, tombstone: int | str | None = None) -> None:
        """Mark a row as deleted, or let it vanish without a trace."""
        if tombstone is None:
            self._table.execute("DELETE FROM usage WHERE event_id = ?", (event_id,))
        else:
            self._table.execute("UPDATE usage SET deleted = 1, arrived = ? WHERE event_id = ?", (tombstone, event_id))

    def owed(self, zone: Any = UTC) -> dict[tuple[str, str], Decimal]:
        """Return what is owed by account and day of the zone, reckoned row by row."""
        sums: dict[tuple[str, str], Decimal] = {}
        for time, account, quantity in self._table.execute(
            "SELECT time, account, quantity FROM usage WHERE deleted = 0"
        ):
            day = datetime.strptime(time, MOMENT).replace(tzinfo=UTC).astimezone(zone)
            key = (account, f"{day:%Y-%m-%d}")
            sums[key] = sums.get(key, Decimal(0)) + Decimal(quantity)
        return sums

    def rows_in(self, periods: Sequence[Period]) -> int:
        """Return how many rows some usage periods have, marked ones too."""
        query = "SELECT COUNT(*) FROM usage WHERE time >= ? AND time < ?"
        edges = ([edge.strftime(MOMENT) for edge in (period.start, period.end)] for period in periods)
        return sum(self._table.execute(query, values).fetchone()[0] for values in edges)

    def get_conn(self) -> Any:
        """Return a new connection that counts what is fetched."""
        return _Counting(sqlite3.connect(self._path), self)


class _Counting:
    def __init__(self, connection: sqlite3.Connection, warehouse: Warehouse) -> None:
        self._connection, self._warehouse = connection, warehouse

    def cursor(self) -> "_CountingCursor":
        return _CountingCursor(self._connection.cursor(), self._warehouse)

    def close(self) -> None:
        self._connection.close()


class _CountingCursor:
    def __init__(self, cursor: sqlite3.Cursor, warehouse: Warehouse) -> None:
        self._cursor, self._warehouse = cursor, warehouse

    @property
    def description(self) -> Any:
        return self._cursor.description

    def execute(self, statement: str, values: Sequence[Any]) -> None:
        self._warehouse.statements.append(statement)
        self._cursor.execute(statement, values)

    def fetchmany(self, size: int) -> list[Any]:
        rows = self._cursor.fetchmany(size)
        self._warehouse.rows_read += len(rows)
        return rows


def arriving(name: str, overlap: int | timedelta = 0, **changes: Any) -> BillingSource:
    """Return a shipped source as one that goes by arrival, with days in its zone; `changes` replace its settings."""
    source = shipped(name)
    columns = Columns(
        event_id="event_id", time="time", account="account", quantity="quantity", arrival="arrived", deleted="deleted"
    )
    values: dict[str, Any] = {
        "period": "day",
        "columns": columns,
        "incremental": "arrival",
        "arrival_overlap": overlap,
        "naive_times": UTC_ZONE,
        "max_withdraw_share": 1.0,
    }
    settings = source.settings.model_copy(update=values | changes)
    return replace(source, settings=settings, sql=USAGE, arrivals_sql=ARRIVALS, expectations=())


def by_interval(name: str, usage_sql: str, **changes: Any) -> BillingSource:
    """Return such a source that goes by interval all the same, and may set everything aside."""
    found = arriving(name)
    columns = found.settings.columns.model_copy(update={"arrival": None})
    limits = found.settings.quarantine.model_copy(update={"max_share": 1.0})
    values = {"incremental": "interval", "columns": columns, "quarantine": limits} | changes
    return replace(found, settings=found.settings.model_copy(update=values), sql=usage_sql, arrivals_sql="")


UTC_ZONE = shipped("platform_events").settings.timezone


@dataclass(frozen=True)
class Increment:
    """What one run of an arrival source came to."""

    taken: Taken
    delivered: Delivered | None = None
    tally: Tally | None = None
    comparison: Comparison | None = None


class ArrivalHouse(House):
    """A house with a warehouse, whose ledger lives on the sandbox's time, and where ChargeOver takes deductions."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        super().__init__(sandbox, folder)
        self.ledger.close()
        self.ahead = sandbox.now() - datetime.now(UTC)
        self.ledger = Ledger.connect(self.ledger_url, clock=lambda: datetime.now(UTC) + self.ahead)
        self.warehouse = Warehouse(folder / "warehouse.sqlite")
        self.watched: Callable[[Any, str], Any] = lambda found, _name: found
        """Stands between an increment and what it touches: a test kills it there."""

    def destination(self, source: BillingSource) -> Destination:
        """Return the source's destination; deductions are allowed."""
        found = super().destination(source)
        if isinstance(found, ChargeOverUsage):
            settings = replace(found.client.settings, negative_usage="allowed")
            return ChargeOverUsage(source, ChargeOverSite(settings, self.transport))
        return found

    def increment(
        self, source: BillingSource, interval: Period, *, rescan: bool = False, manners: Manners = GENTLE
    ) -> Increment:
        """Run all stages of one increment as the operators do."""
        taken, comparison = self.read(source, interval, rescan=rescan)
        if comparison is None:
            return Increment(taken)
        return self.settle(source, taken, comparison, manners)

    def read(self, source: BillingSource, interval: Period, *, rescan: bool = False) -> tuple[Taken, Comparison | None]:
        """Extract, validate and aggregate."""
        destination, ledger = self.destination(source), self.watched(self.ledger, "ledger")
        ledger.register(source.name, destination.site, source.definition())
        own = source.recent_periods(interval.end) if rescan else source.periods(interval)
        hook, staging = self.watched(self.warehouse, "warehouse"), self.watched(self.staging, "staging")
        taken = read(source, interval, own, hook, ledger, staging)
        if taken.events is None:
            return taken, None
        began = ledger.now()
        decided, resolve = WrittenOff.of(source, ledger), destination.resolve
        found = validate(
            taken.events, source, taken.periods, resolve, self.staging, taken.folder, ledger, decided, taken.before
        )
        moves = placed(found.targets, source, began, ledger, self.staging, taken.folder)
        found, aside = replace(found, moves=moves), found.quarantined
        reading = ledger.record_validation(taken.number, found.digest, aside.rows, found.reasons, aside.manifest, began)
        totals = aggregate(
            found.accepted, found.targets, source, destination.site, taken.periods, self.staging, taken.folder, moves
        )
        rows = (found.accepted.rows, aside.rows, found.accepted, moves, aside)
        return taken, Comparison(reading, taken.periods, totals, found.targets, *rows)

    def settle(
        self, source: BillingSource, taken: Taken, comparison: Comparison, manners: Manners = GENTLE
    ) -> Increment:
        """Plan, deliver, and take what is done off the list of touched periods."""
        kept, self.ledger = self.ledger, self.watched(self.ledger, "ledger")
        try:
            delivered = self.deliver(source, comparison, taken.folder, manners=manners)
            tally = self.plan(source, comparison, taken.folder).tally
            done(source, comparison.reading, comparison.periods, tally, self.ledger)
        finally:
            self.ledger = kept
        return Increment(taken, delivered, tally, comparison)

    def rows_of(self, work: Callable[[], Any]) -> int:
        """Return how many rows the warehouse gave while something was done."""
        before = self.warehouse.rows_read
        work()
        return self.warehouse.rows_read - before

    def accepted_by_day(self, source: BillingSource) -> dict[tuple[str, str], Decimal]:
        """Return what the ledger has as billed, by account and day."""
        rows = self.ledger.accepted(source.name, Period(source.bill_from, source.bill_from + timedelta(days=3650)))
        sums: dict[tuple[str, str], Decimal] = {}
        for row in rows.to_dict("records"):
            start = row["period_start"].astimezone(source.settings.timezone)
            key = (str(row["account"]), f"{start:%Y-%m-%d}")
            sums[key] = sums.get(key, Decimal(0)) + Decimal(row["applied"] or row["quantity"])
        return {key: total for key, total in sums.items() if total}

    def owed_by_account(self, source: BillingSource) -> dict[str, Decimal]:
        """Return what the warehouse owes by account."""
        sums: dict[str, Decimal] = {}
        for (account, _), total in self.warehouse.owed(source.settings.timezone).items():
            sums[account] = sums.get(account, Decimal(0)) + total
        return {account: total for account, total in sums.items() if total}


@contextmanager
def an_arrival_house(folder: Path, now: str = "", until: str = "") -> Iterator[ArrivalHouse]:
    """Open a house with the shipped worlds, at another time and with longer billing periods if a test says so."""
    worlds = []
    for world in WORLDS:
        text = world.read_text(encoding="utf-8")
        text = text.replace("now: 2026-10-20T12:00:00Z", f"now: {now}") if now else text
        text = text.replace("end: 2026-11-01", f"end: {until}") if until else text
        worlds.append(folder / world.name)
        worlds[-1].write_text(text, encoding="utf-8")
    with Sandbox(worlds) as sandbox:
        house = ArrivalHouse(sandbox, folder)
        try:
            yield house
        finally:
            house.ledger.close()
