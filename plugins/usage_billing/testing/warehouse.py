"""A warehouse that changes: rows come late, are corrected, vanish, go bad and are mended.

Each row says of itself whether it is sound, so that nothing of the package has to judge that for the oracle.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal

import pyarrow as pa

from usage_billing.sources import BillingSource
from usage_billing.testing.chance import Chance


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


class Warehouse:
    """The rows of one source, as they are now; a snapshot is a list of them."""

    def __init__(
        self,
        chance: Chance,
        source: BillingSource,
        units: Sequence[datetime],
        billed: Sequence[str],
        others: Sequence[str],
    ) -> None:
        self.rows: dict[str, Row] = {}
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
        self.rows[row.event_id] = row
        return f"row {row.event_id} comes: {account}, unit {unit}, {row.quantity}"

    def change(self, name: str) -> str:
        """Do to some row what warehouses do; return what happened, in words."""
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
            del self.rows[row.event_id]
        elif kind == "all_gone":
            gone = [one.event_id for one in self.rows.values() if (one.unit, one.account) == (row.unit, row.account)]
            for event_id in gone:
                del self.rows[event_id]
            return f"rows {', '.join(gone)} vanish"
        elif kind == "goes_bad":
            self.rows[row.event_id] = self._bad(name, row)
        else:
            account = row.account if row.account in self._billed else self._billed[0]
            quantity = self._least() if kind == "less" else self._quantity(name)
            self.rows[row.event_id] = replace(row, account=account, quantity=quantity, sound=True)
        now = self.rows.get(row.event_id, row)
        return f"row {row.event_id} {kind.replace('_', ' ')}: {now.quantity}, unit {now.unit}, {now.account}"

    def mend(self) -> None:
        """Mend every row that is not sound."""
        for event_id, row in self.rows.items():
            if not row.sound:
                account = row.account if row.account in self._billed else self._billed[0]
                self.rows[event_id] = replace(row, account=account, quantity=self._quantity(event_id), sound=True)

    def _stranger(self, name: str, unit: int) -> str:
        account = self._chance.pick(f"{name}/who", self._others)
        told = self.add(name, unit, account)
        event_id = next(reversed(self.rows))
        self.rows[event_id] = replace(self.rows[event_id], sound=False)
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

    def snapshot(self, units: Sequence[int]) -> list[Row]:
        """Return the rows of some units."""
        return [row for row in self.rows.values() if row.unit in units]


def as_query(rows: Sequence[Row], source: BillingSource) -> pa.Table:
    """Return rows as the source's query would."""
    columns = source.settings.columns
    table = {
        columns.event_id: pa.array([row.event_id for row in rows], pa.string()),
        columns.time: pa.array([row.time for row in rows], pa.timestamp("us", tz="UTC")),
        columns.account: pa.array([row.account for row in rows], pa.string()),
    }
    if columns.quantity:
        table[columns.quantity] = pa.array([row.quantity for row in rows], pa.string())
    if columns.deleted:
        table[columns.deleted] = pa.array([False for _ in rows], pa.bool_())
    for dimension in source.settings.dimensions:
        table[dimension] = pa.array([row.region for row in rows], pa.string())
    return pa.table(table)
