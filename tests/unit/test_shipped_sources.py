"""The billing sources that ship: each one's sample makes exactly its expected totals, by its own SQL and rules."""

import csv
import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import pytest

from stage_helpers import Remembered, known
from stories import CHECKOUT, SITES, shipped
from usage_billing.aggregate import aggregate
from usage_billing.extract import extract, open_reader
from usage_billing.records import Period
from usage_billing.sources import BillingSource, source_names
from usage_billing.staging import Staging
from usage_billing.validate import validate

FOLDER = CHECKOUT / "include" / "sources"
TYPES = {"quantity": "DECIMAL(18, 6)", "time": "TIMESTAMPTZ"}


class SampleWarehouse:
    """A DuckDB warehouse in memory that holds a source's sample under the table that its SQL reads."""

    placeholder = "?"
    conn_type = "duckdb"

    def __init__(self, source: BillingSource) -> None:
        columns = source.settings.columns.model_dump(exclude_none=True)
        types = {column: TYPES.get(word, "VARCHAR") for word, column in columns.items()}
        (table,) = re.findall(r"^FROM (\w+)$", source.sql, re.MULTILINE)
        sample = str(FOLDER / source.name / "sample.csv")
        self._connection = duckdb.connect()
        self._connection.execute("SET TimeZone = 'UTC'")
        self._connection.execute(
            f"CREATE TABLE {table} AS SELECT * FROM read_csv(?, types = ?)",  # noqa: S608 - a name from our own file.
            [sample, types],
        )

    def get_conn(self) -> duckdb.DuckDBPyConnection:
        """Return the connection, as Airflow's hook does."""
        return self._connection


def expected_totals(source: BillingSource) -> dict[tuple[str, ...], Decimal]:
    """Return the totals that people reckoned by hand, by account, dimensions and start of the usage period."""
    with (FOLDER / source.name / "expected_totals.csv").open(newline="", encoding="utf-8") as file:
        return {
            (
                row["account"],
                *(row[name] for name in source.settings.dimensions),
                datetime.fromisoformat(row["period_start"]).astimezone(UTC).isoformat(),
            ): Decimal(row["quantity"])
            for row in csv.DictReader(file)
        }


def totals(source: BillingSource, interval: Period, folder: Path) -> dict[tuple[str, ...], Decimal]:
    """Return what the stages make of the sample."""
    staging, periods = Staging(folder), source.periods(interval)
    window = Period(periods[0].start, periods[-1].end)
    reader = open_reader(SampleWarehouse(source), source.sql, window, source.settings.batch_rows)
    events = extract(reader, source, staging, "sample")
    found = validate(events, source, periods, known, staging, "sample", Remembered())
    assert found.quarantined.rows, "a sample without a bad row shows half of the source"
    staged = aggregate(found.accepted, found.targets, source, SITES[source.name], periods, staging, "sample")
    rows = [row for part in staging.read(staged) for row in part.to_pylist()]
    return {
        (row["account"], *dimension_values(source, row["dimensions"]), row["period_start"].isoformat()): row["quantity"]
        for row in rows
    }


def dimension_values(source: BillingSource, text: str) -> tuple[str, ...]:
    """Return the dimensions of a total in the source's order."""
    values = json.loads(text)
    return tuple(values[name] for name in source.settings.dimensions)


@pytest.mark.parametrize("name", sorted(SITES))
def test_a_sample_makes_exactly_its_expected_totals(name: str, tmp_path: Path) -> None:
    """Sample rows, through the shipped SQL, expectations and meter, give the totals that were reckoned by hand."""
    source = shipped(name)
    zone = source.settings.timezone
    interval = Period(datetime(2026, 10, 5, tzinfo=zone), datetime(2026, 10, 7, tzinfo=zone))
    assert totals(source, interval, tmp_path) == expected_totals(source)


def test_every_source_folder_ships_all_its_files() -> None:
    """A newcomer who copies a folder has everything: settings, SQL, rules, sample and totals; and each has its DAG."""
    assert source_names(FOLDER) == sorted(SITES)
    wanted = {"source.yaml", "usage.sql", "expectations.yaml", "sample.csv", "expected_totals.csv"}
    for name in SITES:
        assert {path.name for path in (FOLDER / name).iterdir()} == wanted
        assert (CHECKOUT / "dags" / f"{name}.py").is_file()
