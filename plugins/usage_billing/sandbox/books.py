"""The sandbox's books: one SQLite database, committed before any reply is sent.

Quantities are stored as text, exactly as they were accepted; instants are microseconds of UTC. In memory when no path
is given. One process holds the file at a time.
"""

import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .clock import Clock, midnight, to_micros
from .world import ChargeOverWorld, MaxioWorld, World

Row = dict[str, Any]

# In these states a billing period advances and charges accrue.
LIVE_STATES = ("active", "trialing", "past_due", "unpaid")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS clock (one INTEGER PRIMARY KEY CHECK (one = 1), anchor INTEGER, wall REAL, rate REAL);
CREATE TABLE IF NOT EXISTS switch (site TEXT, name TEXT, value TEXT, PRIMARY KEY (site, name)) WITHOUT ROWID;

-- A subscription (Maxio) or package (ChargeOver) with its open billing period.
CREATE TABLE IF NOT EXISTS account (
    site TEXT, id INTEGER, reference TEXT, state TEXT, period_start INTEGER, period_end INTEGER,
    created_at INTEGER, ended_at INTEGER, PRIMARY KEY (site, id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS account_due ON account (state, period_end);
CREATE INDEX IF NOT EXISTS account_reference ON account (site, reference);

CREATE TABLE IF NOT EXISTS invoice (
    id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, account INTEGER, period_start INTEGER, period_end INTEGER,
    issued_at INTEGER);
CREATE INDEX IF NOT EXISTS invoice_account ON invoice (site, account);
-- `component` is the component's handle or the item's external key; `kind` says what the line charges for.
CREATE TABLE IF NOT EXISTS invoice_line (
    id INTEGER PRIMARY KEY AUTOINCREMENT, invoice INTEGER, site TEXT, account INTEGER, kind TEXT, component TEXT,
    component_id INTEGER, price_id INTEGER, title TEXT, quantity TEXT, unit_price TEXT, amount TEXT);
CREATE INDEX IF NOT EXISTS invoice_line_invoice ON invoice_line (invoice);
CREATE INDEX IF NOT EXISTS invoice_line_account ON invoice_line (site, account);

CREATE TABLE IF NOT EXISTS usage (
    id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, subscription INTEGER, component INTEGER, price_point INTEGER,
    quantity TEXT, memo TEXT, created_at INTEGER, extra TEXT);
CREATE INDEX IF NOT EXISTS usage_component ON usage (site, subscription, component, id);
CREATE TABLE IF NOT EXISTS balance (
    site TEXT, subscription INTEGER, component INTEGER, quantity TEXT, price_point INTEGER, updated_at INTEGER,
    PRIMARY KEY (site, subscription, component)) WITHOUT ROWID;
-- Of a prepaid balance, what its allocation did not cover.
CREATE TABLE IF NOT EXISTS overage (
    site TEXT, subscription INTEGER, component INTEGER, quantity TEXT,
    PRIMARY KEY (site, subscription, component)) WITHOUT ROWID;
-- Usage that came after a period's end and before its assessment, where it belongs to the period that begins.
CREATE TABLE IF NOT EXISTS next_balance (
    site TEXT, subscription INTEGER, component INTEGER, quantity TEXT, price_point INTEGER,
    PRIMARY KEY (site, subscription, component)) WITHOUT ROWID;
-- What a balance was when; only a list that lags behind reads it.
CREATE TABLE IF NOT EXISTS balance_history (
    id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, subscription INTEGER, component INTEGER, quantity TEXT,
    at INTEGER, wall REAL);
CREATE INDEX IF NOT EXISTS balance_history_component ON balance_history (site, subscription, component, id);
-- An open period that also bills what came since an earlier moment: the first one after a trial.
CREATE TABLE IF NOT EXISTS carried (
    site TEXT, account INTEGER, since INTEGER, PRIMARY KEY (site, account)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS request_token (
    site TEXT, token TEXT, spent_at INTEGER, PRIMARY KEY (site, token)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS site_event (
    id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, subscription INTEGER, key TEXT, message TEXT, data TEXT,
    created_at INTEGER, wall REAL);
CREATE INDEX IF NOT EXISTS site_event_site ON site_event (site, subscription, id);

CREATE TABLE IF NOT EXISTS activation (
    site TEXT, subscription INTEGER, component INTEGER, active INTEGER, price_point INTEGER, extra TEXT,
    PRIMARY KEY (site, subscription, component)) WITHOUT ROWID;
-- `subscriber` is the subscription identifier as it was sent, also when no subscription has it.
CREATE TABLE IF NOT EXISTS event (
    id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, stream TEXT, token TEXT, subscription INTEGER, subscriber TEXT,
    happened_at INTEGER, received_at INTEGER, wall REAL, body TEXT);
CREATE TABLE IF NOT EXISTS event_token (
    site TEXT, stream TEXT, token TEXT, expires_at INTEGER, PRIMARY KEY (site, stream, token)) WITHOUT ROWID;
-- What one event is worth to one component: `counts_at` decides the billing period.
CREATE TABLE IF NOT EXISTS metering (
    event INTEGER, site TEXT, component INTEGER, subscription INTEGER, subscriber TEXT, counts_at INTEGER,
    received_at INTEGER, wall REAL, value TEXT);
CREATE INDEX IF NOT EXISTS metering_subscription ON metering (site, subscription, counts_at);

-- Lines are never deleted: an upgrade marks the old one as replaced, and `billed` says whether its usage still counts.
CREATE TABLE IF NOT EXISTS line (
    id INTEGER, site TEXT, package INTEGER, item TEXT, external_key TEXT, amount TEXT, base TEXT,
    subscribed_at INTEGER, replaced INTEGER NOT NULL DEFAULT 0, billed INTEGER NOT NULL DEFAULT 1,
    PRIMARY KEY (site, id)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS line_package ON line (site, package);
CREATE TABLE IF NOT EXISTS line_usage (
    id INTEGER PRIMARY KEY AUTOINCREMENT, site TEXT, line INTEGER, external_key TEXT, type TEXT, value TEXT,
    from_at INTEGER, to_at INTEGER, custom TEXT, counts_at INTEGER, billable INTEGER, written_at INTEGER, wall REAL);
CREATE INDEX IF NOT EXISTS line_usage_line ON line_usage (site, line, counts_at);
CREATE INDEX IF NOT EXISTS line_usage_key ON line_usage (site, external_key);
"""

# Real sites have ids far above 1; a client that confuses an id with a position should be seen to do so.
_FIRST_IDS = {"usage": 138_500_000, "invoice": 3_000_000, "site_event": 900_000_000, "line_usage": 1_233}


class BooksInUse(OSError):
    """The file of the books cannot be taken into use."""


class Books:
    """Everything a sandbox remembers, and its clock."""

    def __init__(self, path: Path | None, worlds: Sequence[World], *, virtual: bool = False) -> None:
        """Open or create the books; `BooksInUse` when another process holds them.

        A site that they do not know yet begins as its world says. In virtual books no wall clock counts: the sandbox's
        own clock stands still until it is moved, whatever its rate.
        """
        self.virtual = virtual
        self._lock = threading.RLock()
        self.db = sqlite3.connect(path or ":memory:", check_same_thread=False, isolation_level=None, timeout=0)
        self.db.row_factory = _as_dict
        try:
            self._prepare()
            with self.transaction():
                self._seed(worlds)
        except sqlite3.OperationalError as error:
            self.db.close()
            raise BooksInUse(f"{path} is in use by another sandbox, or is no book of one: {error}") from error
        self.clock = self._read_clock()

    def _prepare(self) -> None:
        # The write-ahead log without a sync per commit outlives the process, which is what a sandbox promises.
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL", "temp_store=MEMORY"):
            self.db.execute(f"PRAGMA {pragma}")
        self.db.executescript(_SCHEMA)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the books alone; what was written is committed at the end, or not at all."""
        with self._lock:
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            self.db.execute("COMMIT")

    def rows(self, sql: str, *args: Any) -> list[Row]:
        """Return all rows of a query."""
        return self.db.execute(sql, args).fetchall()

    def row(self, sql: str, *args: Any) -> Row | None:
        """Return the first row of a query, or None."""
        found: Row | None = self.db.execute(sql, args).fetchone()
        return found

    def one(self, sql: str, *args: Any) -> Row:
        """Return the row of a query that always has one; `LookupError` when it has none."""
        found = self.row(sql, *args)
        if found is None:
            raise LookupError(sql)
        return found

    def write(self, sql: str, *args: Any) -> int:
        """Carry out one statement and return the id of the row it inserted."""
        return self.db.execute(sql, args).lastrowid or 0

    def write_many(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Carry out one statement for each row."""
        self.db.executemany(sql, rows)

    def take_id(self, table: str) -> int:
        """Return the next id of a table that numbers its rows by itself; it will give it to no other row."""
        self.write("UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = ?", table)
        return int(self.one("SELECT seq FROM sqlite_sequence WHERE name = ?", table)["seq"])

    def now(self) -> int:
        """Return the sandbox's present, in microseconds."""
        return self.clock.now()

    def visible(
        self, delay: tuple[float, float], at: str = "created_at", wall: str = "wall", row: str = "id"
    ) -> tuple[str, tuple[float, ...]]:
        """Return the condition, with its arguments, under which reads see a record already.

        `at`, `wall` and `row` are columns: the sandbox instant and the wall time of the record, and its number. Between
        the shortest and the longest delay each record has its own, spread by its number, so that order may be lost.
        A delay passes on either clock, so that it ends both for tests that move the clock and for clients that wait;
        in virtual books on the sandbox's clock alone.
        """
        shortest, longest = delay
        if longest == 0:
            return "1", ()
        if self.virtual:
            return f"{at} + ? + {_share(row)} * ? <= ?", (int(shortest * 1e6), (longest - shortest) * 1e6, self.now())
        own = f"(? + {_share(row)} * ?)"
        spread = (shortest, longest - shortest)
        condition = f"({at} + {own} * 1000000 <= ? OR {wall} + {own} <= ?)"
        return condition, (*spread, self.now(), *spread, self.wall())

    def wall(self) -> float:
        """Return the wall time in Unix seconds; in virtual books it is always 0."""
        return 0.0 if self.virtual else time.time()

    def second(self) -> int:
        """Return the number of the present second, by which a site counts requests; of the wall clock if it counts."""
        return self.now() // 1_000_000 if self.virtual else int(self.wall())

    def save_clock(self) -> None:
        """Write the clock down after it was moved."""
        self.write(
            "UPDATE clock SET anchor = ?, wall = ?, rate = ?", self.clock.anchor, self.clock.wall, self.clock.rate
        )

    def save_switches(self, site: str, values: dict[str, str]) -> None:
        """Write down the switches of a site."""
        self.write_many("REPLACE INTO switch VALUES (?, ?, ?)", [(site, name, value) for name, value in values.items()])

    def switches(self, site: str) -> dict[str, str]:
        """Return the switches that were turned since the world began."""
        return {row["name"]: row["value"] for row in self.rows("SELECT name, value FROM switch WHERE site = ?", site)}

    def reset(self, worlds: Sequence[World]) -> None:
        """Forget everything and begin again as the worlds say; call within a transaction."""
        for row in self.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND name != 'sqlite_sequence'"):
            self.write(f"DELETE FROM {row['name']}")
        self.write("DELETE FROM sqlite_sequence")
        self._seed(worlds)
        self.clock = self._read_clock()

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self.db.close()

    def _seed(self, worlds: Sequence[World]) -> None:
        first = worlds[0]
        self.write("INSERT OR IGNORE INTO clock VALUES (1, ?, ?, ?)", to_micros(first.now), time.time(), first.rate)
        if not self.rows("SELECT 1 FROM sqlite_sequence"):
            self.write_many("INSERT INTO sqlite_sequence (name, seq) VALUES (?, ?)", _FIRST_IDS.items())
        known = {row["site"] for row in self.rows("SELECT DISTINCT site FROM account")}
        for world in worlds:
            if world.site in known:
                continue
            if isinstance(world, MaxioWorld):
                self._seed_maxio(world)
            elif isinstance(world, ChargeOverWorld):
                self._seed_chargeover(world)

    def _seed_maxio(self, world: MaxioWorld) -> None:
        self._seed_accounts(world, [(s.id, s.reference, s.state) for s in world.subscriptions])
        components = {component.handle: component for component in world.components}
        self.write_many(
            "INSERT INTO activation VALUES (?, ?, ?, 1, ?, NULL)",
            [
                (world.site, s.id, components[handle].id, components[handle].default_price_point.id)
                for s in world.subscriptions
                for handle in s.activated
            ],
        )

    def _seed_chargeover(self, world: ChargeOverWorld) -> None:
        self._seed_accounts(world, [(p.package_id, p.external_key, p.state) for p in world.packages])
        items = {item.external_key: item for item in world.items}
        start = midnight(world.billing_period.start, world.zone)
        self.write_many(
            "INSERT INTO line (id, site, package, item, external_key, amount, base, subscribed_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    line.id,
                    world.site,
                    package.package_id,
                    line.item,
                    line.external_key,
                    str(items[line.item].amount),
                    str(items[line.item].base),
                    start,
                )
                for package in world.packages
                for line in package.lines
            ],
        )

    def _seed_accounts(self, world: World, accounts: list[tuple[int, str | None, str]]) -> None:
        start = midnight(world.billing_period.start, world.zone)
        end = midnight(world.billing_period.end, world.zone)
        self.write_many(
            "INSERT INTO account VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (world.site, number, reference, state, start, end, start, start if _ended(state) else None)
                for number, reference, state in accounts
            ],
        )

    def _read_clock(self) -> Clock:
        row = self.one("SELECT anchor, wall, rate FROM clock")
        return Clock(row["anchor"], row["wall"], 0.0 if self.virtual else row["rate"])


def _share(row: str) -> str:
    """Return, as SQL, a number from 0 to 1 that neighbouring records have far apart."""
    return f"(({row} * 618033) % 1000000) / 1000000.0"


def _as_dict(cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> Row:
    return {column[0]: value for column, value in zip(cursor.description, values, strict=True)}


def _ended(state: str) -> bool:
    return state not in LIVE_STATES
