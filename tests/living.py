"""A house whose ledger is backed up, lost, restored and begun anew, and where a person adopts what the site holds."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stories import Event, House, a_day
from usage_billing.adopt import Adoption, adopt, reason_of
from usage_billing.aggregate import at_former_places
from usage_billing.deliver import Delivered
from usage_billing.ledger import Ledger, marker
from usage_billing.ledger.marker import confirm, marked
from usage_billing.moves import place
from usage_billing.records import Comparison, Period
from usage_billing.sandbox import Sandbox
from usage_billing.sources import BillingSource


class LivingHouse(House):
    """A house whose ledger leaves its mark in staging as the operators let it, and can be lost and found again."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        super().__init__(sandbox, folder)
        self._folder = folder
        self.at(datetime(2026, 10, 20, 12, tzinfo=UTC))

    def at(self, now: datetime) -> None:
        """Let the ledger's clock show `now`, and tick on from there."""
        self._ahead = now - datetime.now(UTC)
        self._reconnect()

    def backup(self) -> Path:
        """Copy the ledger as a backup does, while it is in use."""
        copy = self._folder / "copy.sqlite"
        copy.unlink(missing_ok=True)
        with closing(sqlite3.connect(self._file)) as live, closing(sqlite3.connect(copy)) as kept:
            live.backup(kept)
        return copy

    def restore(self, copy: Path) -> None:
        """Put an old copy in the place of the ledger."""
        self._lose()
        self._file.write_bytes(copy.read_bytes())
        self._reconnect()

    def begin_anew(self) -> None:
        """Lose the ledger and make an empty one."""
        self._lose()
        Ledger.create(self.ledger_url)
        self._reconnect()

    def totals(
        self, source: BillingSource, interval: Period, events: Any, look: str = "resolve"
    ) -> tuple[Comparison, str]:
        """Read the warehouse as the extract task does: the mark is confirmed under the new number."""
        comparison, folder = super().totals(source, interval, events, look)
        confirm(self.ledger, self.staging, source.name, comparison.reading.extraction)
        return comparison, folder

    def deliver(self, source: BillingSource, comparison: Comparison, folder: str, **more: Any) -> Delivered:
        """Deliver as the task does: between two marks."""
        with marked(self.ledger, self.staging, source.name, comparison.reading.extraction):
            return super().deliver(source, comparison, folder, **more)

    def sweep(self, source: BillingSource) -> Delivered:
        """Sweep as the task does: between two marks."""
        with marked(self.ledger, self.staging, source.name):
            return super().sweep(source)

    def adopt(
        self,
        source: BillingSource,
        days: list[int],
        events: list[Event],
        *,
        dry_run: bool = False,
        leave_unmatched: bool = False,
    ) -> Adoption:
        """Adopt a span of days as the command does."""
        mark = marker.read(self.staging, source.name)
        self.ledger.number_above(mark.extraction if mark else 0)
        span = Period(a_day(source, days[0]).start, a_day(source, days[-1]).end)
        comparison, folder = super().totals(source, span, events, "locate", look_only=True)
        destination = self.destination(source)
        former = at_former_places(comparison, source, destination.site, self.staging, folder)
        reason = reason_of(self.ledger.now())
        found = adopt(comparison, former, destination, self.ledger, self.staging, reason, dry_run=dry_run)
        if not dry_run and (found.complete or (leave_unmatched and not found.different)):
            looked_up_at = self.ledger.validated_at(comparison.reading)
            assert looked_up_at is not None
            place(comparison.targets, source, looked_up_at, self.ledger, self.staging, comparison.window.end)
            marker.hand_over(self.ledger, self.staging, source.name, comparison.reading.extraction)
        return found

    def delivery_rows(self) -> list[tuple[str, int, str, str]]:
        """Return account, revision, state and quantity of every delivery, by account and revision."""
        with closing(sqlite3.connect(self._file)) as connection:
            sql = "SELECT account, revision, state, quantity FROM delivery ORDER BY account, period_start, revision"
            return connection.execute(sql).fetchall()

    @property
    def _file(self) -> Path:
        return Path(self.ledger_url.removeprefix("sqlite:///"))

    def _lose(self) -> None:
        self.ledger.close()
        for file in self._file.parent.glob(f"{self._file.name}*"):
            file.unlink()

    def _reconnect(self) -> None:
        self.ledger.close()
        self.ledger = Ledger.connect(self.ledger_url, clock=lambda: datetime.now(UTC) + self._ahead)
