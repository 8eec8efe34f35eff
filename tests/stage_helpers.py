"""What the tests of the stages share: a billing source, tables of usage rows, and staging in a temporary folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa

from usage_billing.records import Measured, Period, Staged, Target
from usage_billing.sources import BillingSource, DestinationSettings, SourceSettings
from usage_billing.staging import Staging

START = datetime(2026, 10, 1, tzinfo=UTC)
DAYS = tuple(Period(START + timedelta(days=day), START + timedelta(days=day + 1)) for day in range(3))
_TIME = pa.timestamp("us", "UTC")


def make_source(*, expectations: Sequence[dict[str, Any]] = (), **settings: Any) -> BillingSource:
    """Return a source that counts calls per account and day; `settings` replace keys of its ``source.yaml``."""
    values = {
        "name": "calls",
        "description": "Calls.",
        "warehouse": "warehouse",
        "schedule": "0 0 * * *",
        "timezone": "UTC",
        "period": "day",
        "bill_from": date(2026, 1, 1),
        "columns": {"event_id": "event_id", "time": "time", "account": "account", "quantity": "quantity"},
        "meter": {"function": "sum", "decimals": 2},
        "quarantine": {"max_share": 1, "max_rows": 1_000_000},
    }
    return BillingSource(
        settings=SourceSettings.model_validate(values | settings),
        destination=DestinationSettings(name="maxio_metered", connection="maxio_acme"),
        sql="SELECT * FROM calls WHERE time >= :window_start AND time < :window_end",
        expectations=tuple(expectations),
    )


def rows(*values: tuple[Any, ...], quantity: pa.DataType | None = None, dimensions: Sequence[str] = ()) -> pa.Table:
    """Return a table of (event id, hours after START or a time, account, quantity, dimensions...)."""
    columns = list(zip(*values, strict=True)) or [()] * (4 + len(dimensions))
    times = [START + timedelta(hours=time) if isinstance(time, int | float) else time for time in columns[1]]
    kind = quantity or (pa.string() if any(isinstance(value, str) for value in columns[3]) else None)
    table = {
        "event_id": pa.array(columns[0], pa.string()),
        "time": pa.array(times, _TIME),
        "account": pa.array(columns[2], pa.string()),
        "quantity": pa.array(columns[3], kind),
    }
    return pa.table(table | {name: pa.array(columns[4 + at], pa.string()) for at, name in enumerate(dimensions)})


@dataclass
class Remembered:
    """What a ledger would tell validation: the time, what usage periods had (the newest first), and their columns."""

    moment: datetime = START + timedelta(days=30)
    measured: Sequence[Measured] = ()
    columns: dict[str, str] = field(default_factory=dict)

    def now(self) -> datetime:
        """Return the time at which a reading is taken up."""
        return self.moment

    def measured_before(self, _name: str, before: datetime, most: int, since: datetime) -> list[Measured]:
        """Return the last `most` usage periods between two moments."""
        found = [each for each in self.measured if since <= each.period.start and each.period.end <= before]
        return found[:most]

    def columns_read(self, _name: str) -> dict[str, str]:
        """Return the columns of the reading before."""
        return self.columns


def stage(staging: Staging, *parts: pa.Table, name: str = "extracted") -> Staged:
    """Stage `parts` as they are."""
    return staging.write("test", name, parts)


def read(staging: Staging, staged: Staged) -> pa.Table:
    """Return a staged table as a whole."""
    return pa.concat_tables(staging.read(staged))


def known(accounts: Sequence[str]) -> list[Target]:
    """Resolve every account to a subscription of its own name."""
    return [Target(account, subscription=f"sub-{account}", component="calls") for account in accounts]
