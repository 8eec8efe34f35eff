"""A warehouse that changes: rows come late, are corrected, vanish, go bad and are mended.

Each row says of itself whether it is sound, so that nothing of the package has to judge that for the oracle.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Self

import pyarrow as pa

from usage_billing.sources import BillingSource
from usage_billing.testing.chance import Chance
from usage_billing.testing.clockwork import Clockwork

USAGE_SQL = "SELECT * FROM usage WHERE time >= :window_start AND time < :window_end"
ARRIVALS_SQL = "SELECT time, arrived FROM usage WHERE arrived > :after"
"""What the simulated warehouse is asked; it reads the values alone."""

_CLOCKS = (timedelta(0), timedelta(0), timedelta(hours=-3), timedelta(hours=3))
"""How far the warehouse's own clock is ahead."""
_WRONG_BY = timedelta(days=3650)
_LONGEST = 1800.0
"""How many seconds a transaction takes at most where only ids say in what order rows arrive."""


@dataclass(frozen=True)
class Row:
    """One usage event as the warehouse has it; `unit` is the number of the usage period that it lies in."""

    event_id: str
    unit: int
    time: datetime
    account: str | None
    quantity: str | None
    region: str
    sound: bool = True


Stamp = datetime | int
"""The arrival of a row: a time by the warehouse's clock, or an id."""


@dataclass(frozen=True)
class Arrived:
    """The last change of a row: how it is stamped, and as which of all commits it became visible."""

    stamp: Stamp
    commit: int


class Transactions:
    """In what order changes are stamped, and in what order they become visible.

    Each is stamped when it begins, and commits in its own time: out of order, but within the overlap that the source
    names. Where it goes by interval nobody looks at the order, and each commits at once.
    """

    def __init__(self, chance: Chance, source: BillingSource, clockwork: Clockwork) -> None:
        self.commits = 0
        self._chance = chance
        self._name = source.name
        self._by_arrival = source.settings.incremental == "arrival"
        self._overlap = source.settings.arrival_overlap
        self._clockwork = clockwork
        self._ahead = chance.pick(f"{source.name}/clock", _CLOCKS)
        self._ids = 0
        self._open: dict[int, tuple[Stamp, Callable[[Stamp], None]]] = {}
        self._begun = 0

    def at_once(self) -> Arrived:
        """Return the arrival of a change that begins and commits now."""
        return self.commit(self._stamp())

    def begin(self, name: str, change: Callable[[Stamp], None]) -> None:
        """Begin a transaction; `change` is carried out when it commits."""
        stamp = self._stamp()
        if not self._by_arrival:
            change(stamp)
            return
        if isinstance(stamp, datetime) and self._chance.strikes(f"wrong clock:{self._name}/{name}", 0.1):
            stamp += _WRONG_BY
        self._begun += 1
        number = self._begun
        self._open[number] = stamp, change
        slow = self._chance.strikes(f"slow:{self._name}/{name}", 0.6)
        longest = self._overlap.total_seconds() * 0.99 if isinstance(self._overlap, timedelta) else _LONGEST
        seconds = self._chance.seconds(f"slow/by:{self._name}/{name}", 0, longest) if slow else 0.0
        self._clockwork.after(seconds, lambda: self._ends(number))

    def commit(self, stamp: Stamp) -> Arrived:
        """Let what is stamped so become visible, after all that has to be before it."""
        if isinstance(stamp, int) and isinstance(self._overlap, int):
            for number, (other, _) in list(self._open.items()):
                if isinstance(other, int) and other <= stamp - self._overlap:
                    self._ends(number)
        self.commits += 1
        return Arrived(stamp, self.commits)

    def _ends(self, number: int) -> None:
        if found := self._open.pop(number, None):
            stamp, change = found
            change(stamp)

    def _stamp(self) -> Stamp:
        if isinstance(self._overlap, timedelta):
            return self._clockwork.now + self._ahead
        self._ids += 1
        return self._ids


class Warehouse:
    """The rows of one source, as they are now, and those that are marked as deleted."""

    def __init__(
        self,
        chance: Chance,
        source: BillingSource,
        units: Sequence[datetime],
        billed: Sequence[str],
        others: Sequence[str],
        clockwork: Clockwork,
    ) -> None:
        self.rows: dict[str, Row] = {}
        self.tombstones: dict[str, Row] = {}
        self.arrived: dict[str, Arrived] = {}
        """The last change of each row that is there, and of each tombstone."""
        self.vanished = False
        """Whether rows vanished without a trace."""
        self._transactions = Transactions(chance, source, clockwork)
        self._arrival: Arrived | None = None
        self._chance = chance
        self._source = source
        self._units = units
        self._billed = billed
        self._others = others
        self._made = 0
        for unit in range(len(units) - 1):
            for account in billed:
                for _ in range(chance.number(f"{source.name}/rows:{unit}:{account}", 0, 2)):
                    self.add(f"first:{self._made}", unit, account)

    def add(self, name: str, unit: int, account: str | None = None) -> str:
        """Add a sound row; return what happened, in words."""
        name = f"{self._source.name}/{name}"
        self._made += 1
        account = account or self._chance.pick(f"{name}/account", self._billed)
        span = (self._units[unit + 1] - self._units[unit]) / timedelta(microseconds=1)
        # The edges themselves come often: half-open periods are where a microsecond may be billed twice.
        place = self._chance.pick(f"{name}/place", (0.0, 1.0, *([self._chance.share(f"{name}/time")] * 4)))
        time = self._units[unit] + timedelta(microseconds=min(int(span * place), int(span) - 1))
        region = self._chance.pick(f"{name}/region", ("east", "west"))
        row = Row(f"e{self._made:03}", unit, time, account, self._quantity(name), region)
        self._put(row)
        return f"row {row.event_id} comes: {account}, unit {unit}, {row.quantity}"

    def change(self, name: str, tell: Callable[[str, str], None]) -> None:
        """Begin to do to some row what warehouses do; `tell` hears of it, and how it is stamped, when it commits."""

        def commit(stamp: Stamp) -> None:
            self._arrival = self._transactions.commit(stamp)
            told = self._change(name)
            self._arrival = None
            tell(told, f"arrival {stamp}" if self._source.settings.incremental == "arrival" else "")

        self._transactions.begin(name, commit)

    def _put(self, row: Row) -> None:
        self.rows[row.event_id] = row
        self.arrived[row.event_id] = self._arrival or self._transactions.at_once()

    def _remove(self, event_id: str) -> None:
        """Let a row vanish: mostly it stays marked as deleted, where the source has a column for that."""
        row = self.rows.pop(event_id)
        if self._source.settings.columns.deleted and self._chance.odds(f"{self._source.name}/marked:{event_id}", 0.9):
            self.tombstones[event_id] = row
            self.arrived[event_id] = self._arrival or self._transactions.at_once()
        else:
            self.vanished = True
            del self.arrived[event_id]

    def _change(self, name: str) -> str:
        name = f"{self._source.name}/{name}"
        units = len(self._units) - 1
        kinds = "late late corrected corrected less vanishes goes_bad is_mended of_a_stranger all_gone".split()
        kind = self._chance.pick(f"{name}/kind", kinds)
        if kind == "late" or not self.rows:
            return self.add(name, self._chance.number(f"{name}/unit", 0, units - 1))
        if kind == "of_a_stranger":
            return self._stranger(name, self._chance.number(f"{name}/unit", 0, units - 1))
        row = self._chance.pick(f"{name}/row", list(self.rows.values()))
        if kind == "vanishes":
            self._remove(row.event_id)
        elif kind == "all_gone":
            gone = [one.event_id for one in self.rows.values() if (one.unit, one.account) == (row.unit, row.account)]
            for event_id in gone:
                self._remove(event_id)
            return f"rows {', '.join(gone)} vanish"
        elif kind == "goes_bad":
            self._put(self._bad(name, row))
        else:
            account = row.account if row.account in self._billed else self._billed[0]
            quantity = self._least() if kind == "less" else self._quantity(name)
            self._put(replace(row, account=account, quantity=quantity, sound=True))
        now = self.rows.get(row.event_id, row)
        return f"row {row.event_id} {kind.replace('_', ' ')}: {now.quantity}, unit {now.unit}, {now.account}"

    def mend(self) -> None:
        """Mend every row that is not sound."""
        for event_id, row in self.rows.items():
            if not row.sound:
                account = row.account if row.account in self._billed else self._billed[0]
                self._put(replace(row, account=account, quantity=self._quantity(event_id), sound=True))

    def _stranger(self, name: str, unit: int) -> str:
        account = self._chance.pick(f"{name}/who", self._others)
        told = self.add(name, unit, account)
        event_id = next(reversed(self.rows))
        self._put(replace(self.rows[event_id], sound=False))
        return told

    def _bad(self, name: str, row: Row) -> Row:
        measured = self._source.settings.meter.function in ("sum", "max", "last")
        ways = ("account", "account", "nothing", "text") if measured else ("account",)
        way = self._chance.pick(f"{name}/way", ways)
        if way == "account":
            return replace(row, account=None, sound=False)
        return replace(row, quantity=None if way == "nothing" else "lots", sound=False)

    def _quantity(self, name: str) -> str | None:
        meter = self._source.settings.meter
        if meter.function == "count":
            return None
        if meter.function == "unique":
            return self._chance.pick(f"{name}/value", ("a", "b", "c"))
        number = self._chance.number(f"{name}/number", 1, 40 * 10**meter.decimals)
        return f"{Decimal(number).scaleb(-meter.decimals):f}"

    def _least(self) -> str | None:
        """Return the smallest quantity that is still usage: what was billed for the row is almost all too much."""
        measured = self._source.settings.meter.function in ("sum", "max", "last")
        return "1" if measured else self._quantity("least")

    def read(self, start: datetime, end: datetime) -> "Snapshot":
        """Return what stands in a span of time, now."""
        rows, marked = (
            [row for row in some.values() if start <= row.time < end] for some in (self.rows, self.tombstones)
        )
        whole = [unit for unit in range(len(self._units) - 1) if start <= self._units[unit] < end]
        return Snapshot(rows, marked, dict.fromkeys(whole, self._transactions.commits))

    def after(self, stamp: Stamp) -> list[tuple[Row, Stamp]]:
        """Return what arrived after `stamp`, with its arrival."""
        everything = self.rows | self.tombstones
        found = ((row, self.arrived[event_id].stamp) for event_id, row in everything.items())
        return [(row, arrived) for row, arrived in found if arrived > stamp]  # type: ignore[operator]


@dataclass
class Snapshot:
    """What an extraction read: rows, those marked as deleted, and of each unit how many commits came before."""

    rows: list[Row] = field(default_factory=list)
    marked: list[Row] = field(default_factory=list)
    commits: dict[int, int] = field(default_factory=dict)

    def __iadd__(self, other: "Snapshot") -> Self:
        self.rows += other.rows
        self.marked += other.marked
        self.commits |= other.commits
        return self


class WarehouseHook:
    """A warehouse as one process reaches it; `snapshot` is what it has read of it.

    `between` is called before each statement but the first: there rows arrive, and the process may end.
    """

    conn_type = "simulated"
    placeholder = "?"

    def __init__(
        self,
        warehouse: Warehouse,
        source: BillingSource,
        between: Callable[[], object],
        shuffled: Callable[[list[Row]], list[Row]],
    ) -> None:
        self.snapshot = Snapshot()
        self._warehouse = warehouse
        self._source = source
        self._between = between
        self._shuffled = shuffled
        self._statements = 0
        self._found = pa.table({})

    def get_conn(self) -> Self:
        """Return a connection, which is its own cursor."""
        return self

    cursor = get_conn

    def close(self) -> None:
        """Nothing is open."""

    def execute(self, _statement: str, values: Sequence[Any]) -> None:
        """Carry out one of the source's two queries, whichever takes these values."""
        if self._statements:
            self._between()
        self._statements += 1
        if len(values) == 1:
            self._found = as_arrivals(self._warehouse.after(values[0]), self._source)
            return
        found = self._warehouse.read(*values)
        self.snapshot += found
        marked = {row.event_id for row in found.marked}
        self._found = as_query(self._shuffled(found.rows + found.marked), self._source, marked)

    def fetch_record_batch(self) -> pa.RecordBatchReader:
        """Return what the last statement found."""
        return self._found.to_reader()


def as_arrivals(found: Sequence[tuple[Row, Stamp]], source: BillingSource) -> pa.Table:
    """Return rows and their arrivals as the source's query for arrivals would."""
    time = pa.timestamp("us", tz="UTC")
    kind = time if isinstance(source.settings.arrival_overlap, timedelta) else pa.int64()
    return pa.table(
        {
            source.settings.columns.time: pa.array([row.time for row, _ in found], time),
            str(source.settings.columns.arrival): pa.array([stamp for _, stamp in found], kind),
        }
    )


def as_query(rows: Sequence[Row], source: BillingSource, marked: Collection[str] = ()) -> pa.Table:
    """Return rows as the source's query would; those `marked` are deleted."""
    columns = source.settings.columns
    table = {
        columns.event_id: pa.array([row.event_id for row in rows], pa.string()),
        columns.time: pa.array([row.time for row in rows], pa.timestamp("us", tz="UTC")),
        columns.account: pa.array([row.account for row in rows], pa.string()),
    }
    if columns.quantity:
        table[columns.quantity] = pa.array([row.quantity for row in rows], pa.string())
    if columns.deleted:
        table[columns.deleted] = pa.array([row.event_id in marked for row in rows], pa.bool_())
    for dimension in source.settings.dimensions:
        table[dimension] = pa.array([row.region for row in rows], pa.string())
    return pa.table(table)
