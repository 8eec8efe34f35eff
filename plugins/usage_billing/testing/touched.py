"""What is special about sources that go by arrival: nothing is passed that is not listed, and nothing leaves unsettled.

Looked at after each transaction that moves a watermark or shortens a list, by what the simulated warehouse knows of
its own rows: which arrived how, and which of them a reading had before it.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any

from usage_billing import arrivals
from usage_billing.ledger import Ledger
from usage_billing.records import Period, Reading, State
from usage_billing.testing.events import Shelf
from usage_billing.testing.invariants import OPEN, Extracted, Fails, deliveries, key_text
from usage_billing.testing.scenes import Scene
from usage_billing.testing.warehouse import Snapshot, Warehouse

_ZERO = Decimal(0)
_ON_ITS_WAY = (State.RESERVED, State.SENDING, State.IN_DOUBT)


class TouchedWatch:
    """Follows the watermarks and the lists of touched periods of all sources."""

    def __init__(
        self,
        scene: Scene,
        ledger: Ledger,
        warehouses: Mapping[str, Warehouse],
        snapshots: Mapping[tuple[str, int], Snapshot],
        extracted: Extracted,
        shelf: Shelf | None,
        fails: Fails,
    ) -> None:
        self._scene = scene
        self._sources = {source.name: source for source in scene.sources}
        self._starts = scene.units[:-1]
        self._ledger = ledger
        self._warehouses = warehouses
        self._snapshots = snapshots
        self._extracted = extracted
        self._shelf = shelf
        self._fails = fails
        self._listed: dict[str, frozenset[datetime]] = dict.fromkeys(self._sources, frozenset())
        self._settled: dict[tuple[str, int], int] = {}
        """Up to which commit a unit's rows are settled for good, by source and unit."""

    def look(self, what: str, args: Sequence[Any]) -> None:
        """Look at the ledger after one of its transactions."""
        if what == "begin_extraction":
            self._nothing_is_passed(args[1])
        else:
            name, reading, periods = args
            self._nothing_leaves_unsettled(name, reading, periods)
            self._nothing_is_passed(name)

    def at_rest(self, name: str) -> None:
        """Look at the list once all is quiet: what is still on it waits for a doubt."""
        items = self._ledger.open_items(name, None)
        waiting = set(items["period_start"][items["state"].isin(_ON_ITS_WAY)])
        for period in self._ledger.touched(name):
            if period.start in self._starts and period.start not in waiting:
                self._fails("arrivals: the list empties", f"{name} {period} is still listed, and nothing of it waits")

    def _nothing_is_passed(self, name: str) -> None:
        """What the next run does not see any more is listed, or was read by the run that took its period off."""
        listed = frozenset(period.start for period in self._ledger.touched(name))
        self._listed[name] = listed
        warehouse = self._warehouses[name]
        after = arrivals.after(self._sources[name], self._ledger.watermark(name))
        ahead = {row.event_id for row, _ in warehouse.after(after)}
        for event_id, row in (warehouse.rows | warehouse.tombstones).items():
            done = warehouse.arrived[event_id].commit <= self._settled.get((name, row.unit), 0)
            if event_id not in ahead and self._starts[row.unit] not in listed and not done:
                told = f"{name}: {event_id} of unit {row.unit}, arrival {warehouse.arrived[event_id].stamp}"
                self._fails("arrivals: none is passed over", f"{told}; the next run looks after {after}")

    def _nothing_leaves_unsettled(self, name: str, reading: Reading, periods: Sequence[Period]) -> None:
        """A period that left was read by this run; what it owed is accepted or listed, and none of it on its way."""
        still = {period.start for period in self._ledger.touched(name)}
        snapshot = self._snapshots.get((name, reading.extraction), Snapshot())
        for start in sorted(self._listed[name] - still):
            if start not in self._starts:
                continue
            unit = self._starts.index(start)
            if unit not in snapshot.commits or start not in {period.start for period in periods}:
                self._fails("arrivals: compared before it leaves", f"{name} {start} was not read by {reading}")
                continue
            self._settled[name, unit] = max(snapshot.commits[unit], self._settled.get((name, unit), 0))
            for left in self._events(name, unit, snapshot) if self._shelf else self._totals(name, start, reading):
                self._fails("arrivals: settled before it leaves", f"{name} {start}, taken off by {reading}: {left}")

    def _totals(self, name: str, start: datetime, reading: Reading) -> list[str]:
        owed, _ = self._extracted(name, reading)
        everything = deliveries(self._scene, self._ledger)
        some = [one for one in everything if (one.key.source, one.key.start) == (name, start)]
        told = [f"{one} is on its way" for one in some if one.state in _ON_ITS_WAY]
        for key in sorted({one.key for one in some} | {key for key in owed if key.start == start}):
            mine = [one for one in some if one.key == key]
            known = sum((one.counted for one in mine if one.state is State.ACCEPTED), _ZERO)
            known += sum((one.quantity for one in mine if one.state in OPEN), _ZERO)
            if known != owed.get(key, _ZERO):
                told.append(f"{key_text(key)}: owed {owed.get(key, _ZERO):f}, accepted and listed {known:f}")
        return told

    def _events(self, name: str, unit: int, snapshot: Snapshot) -> list[str]:
        assert self._shelf is not None  # noqa: S101
        chunks = [one for one in self._shelf.chunks() if one.kind == "chunk" and one.state in (State.ACCEPTED, *OPEN)]
        known = {token for one in chunks for token in one.tokens}
        rows = [row for row in snapshot.rows if row.unit == unit]
        events = self._shelf.words[name].of_sound(rows)
        return [f"{event} is in no chunk" for event in events if event.token not in known]
