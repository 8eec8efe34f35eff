"""The sample warehouse: a month of usage for three billing sources in one DuckDB file, the same rows on every machine.

Each table holds October 2026 (or more, see `make_warehouse`) in its source's billing zone, half a day on either side,
and on every day a few rows
that must never be billed: no account, an account nobody knows, a negative quantity, a quantity with more decimal places
than its component takes, and one event recorded twice. Two good rows stand at the edges of each day, on midnight
and one microsecond before it, because half-open windows go wrong there first.
"""

import argparse
import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import duckdb

ROWS = 18_000
"""Regular rows per table unless told otherwise: about 560 a day."""

FIRST_DAY = date(2026, 9, 30)
LAST_DAY = date(2026, 11, 1)

# Multiplication, addition and remainder only: DuckDB's own hash() and random() may change from version to version, and
# the sample's figures are quoted in documents and tests.
_SCATTER = """
CREATE TEMP MACRO scatter_once(x) AS (x * x + 48271 * x + 11) % 2147483647;
CREATE TEMP MACRO scatter(n, salt) AS scatter_once(scatter_once((n * 69621 + salt * 7919 + 1) % 2147483647));
"""

# One row of `made_row` becomes one row of a usage table; `kind` says what is wrong with it, or `good`.
# The two rows of `twice` share their number, so the event is recorded twice.
_MADE_ROW = "CREATE OR REPLACE TEMP TABLE made_row (n BIGINT, at_us BIGINT, kind VARCHAR)"

_REGULAR_ROWS = """
INSERT INTO made_row
SELECT i, $start_us + i * $step_us + scatter(i, 1) % $step_us, 'good'
FROM range($rows) AS regular(i);
"""

_PLANTED_ROWS = """
INSERT INTO made_row
SELECT 900000000 + day_number * 10 + position, midnight_us + offset_us, kind
FROM (SELECT unnest($midnights_us) AS midnight_us, unnest(range(len($midnights_us))) AS day_number) AS day,
     (VALUES (0,           0, 'good'),
             (1,          -1, 'good'),
             (2, 36000000000, 'no_account'),
             (3, 37000000000, 'unknown_account'),
             (4, 38000000000, 'negative'),
             (5, 39000000000, 'too_fine'),
             (6, 40000000000, 'twice'),
             (6, 40000000000, 'twice')) AS planted(position, offset_us, kind)
WHERE midnight_us + offset_us >= $start_us AND midnight_us + offset_us < $end_us;
"""

_API_CALLS = """
CREATE TABLE api_calls (request_id VARCHAR, requested_at TIMESTAMPTZ, account_ref VARCHAR, calls DECIMAL(18, 3));

INSERT INTO api_calls
SELECT 'req-' || lpad(n::VARCHAR, 9, '0'),
       make_timestamptz(at_us),
       CASE kind WHEN 'no_account' THEN NULL
                 WHEN 'unknown_account' THEN 'acct-9999'
                 ELSE 'acct-' || lpad((1 + least(scatter(n, 2) % 12, scatter(n, 3) % 12))::VARCHAR, 4, '0') END,
       CASE kind WHEN 'negative' THEN -5
                 WHEN 'too_fine' THEN 1.5
                 ELSE 1 + scatter(n, 4) % 40 END
FROM made_row ORDER BY at_us, n;
"""

_PLATFORM_EVENTS = """
CREATE TABLE platform_events (
    event_id VARCHAR, occurred_at TIMESTAMPTZ, account_id VARCHAR, region VARCHAR, tier VARCHAR, units DECIMAL(18, 6)
);

INSERT INTO platform_events
SELECT 'evt-' || lpad(n::VARCHAR, 9, '0'),
       make_timestamptz(at_us),
       CASE kind WHEN 'no_account' THEN NULL
                 WHEN 'unknown_account' THEN 'orbit-99'
                 ELSE 'orbit-' || lpad((1 + least(scatter(n, 2) % 10, scatter(n, 3) % 10))::VARCHAR, 2, '0') END,
       ['eu-west', 'us-east', 'ap-south'][1 + scatter(n, 5) % 3],
       ['standard', 'premium'][1 + scatter(n, 6) % 2],
       CASE kind WHEN 'negative' THEN -0.250
                 WHEN 'too_fine' THEN 0.123456
                 ELSE (1 + scatter(n, 4) % 9999)::DECIMAL(18, 6) * 0.001 END
FROM made_row ORDER BY at_us, n;
"""

_VOIP_CALLS = """
CREATE TABLE voip_calls (call_id VARCHAR, started_at TIMESTAMPTZ, package_key VARCHAR, minutes DECIMAL(18, 4));

INSERT INTO voip_calls
SELECT 'call-' || lpad(n::VARCHAR, 9, '0'),
       make_timestamptz(at_us),
       CASE kind WHEN 'no_account' THEN NULL
                 WHEN 'unknown_account' THEN 'pkg-999'
                 ELSE 'pkg-' || lpad((1 + least(scatter(n, 2) % 8, scatter(n, 3) % 8))::VARCHAR, 3, '0') END,
       CASE kind WHEN 'negative' THEN -1.25
                 WHEN 'too_fine' THEN 0.3333
                 ELSE (1 + scatter(n, 4) % 6000)::DECIMAL(18, 4) * 0.01 END
FROM made_row ORDER BY at_us, n;
"""


@dataclass(frozen=True)
class UsageTable:
    """One table of the warehouse: its name, the billing zone its days are cut in, and the SQL that fills it."""

    name: str
    zone: str
    sql: str


TABLES = (
    UsageTable("api_calls", "America/New_York", _API_CALLS),
    UsageTable("platform_events", "UTC", _PLATFORM_EVENTS),
    UsageTable("voip_calls", "America/Chicago", _VOIP_CALLS),
)


def make_warehouse(path: Path, rows: int = ROWS, first_day: date = FIRST_DAY) -> bool:
    """Make the warehouse at `path` with `rows` regular rows per table; return False if it stands there already.

    Rows begin at noon of `first_day`, and end at noon of `LAST_DAY`. A file made by another version of this module, or
    for other arguments, is replaced as a whole. DuckDB
    lets one process write a file, so nothing may have it open.
    """
    fingerprint = _fingerprint(rows, first_day)
    if _fingerprint_of(path) == fingerprint:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    with closing(duckdb.connect(str(unfinished))) as warehouse:
        _fill(warehouse, rows, first_day, fingerprint)
    # A killed process leaves no half-made warehouse under the real name.
    unfinished.replace(path)
    return True


def _fingerprint(rows: int, first_day: date) -> str:
    """What the file's content depends on: this module, the number of rows, and from when on they are."""
    return hashlib.sha256(Path(__file__).read_bytes() + f"{rows} {first_day}".encode()).hexdigest()


def _fingerprint_of(path: Path) -> str | None:
    """The fingerprint inside the file, None where there is no file or it is not one of ours."""
    if not path.exists():
        return None
    try:
        with closing(duckdb.connect(str(path), read_only=True)) as warehouse:
            found = warehouse.execute("SELECT fingerprint FROM made_by").fetchone()
    except duckdb.Error:
        return None
    return str(found[0]) if found else None


def _fill(warehouse: duckdb.DuckDBPyConnection, rows: int, first_day: date, fingerprint: str) -> None:
    warehouse.execute("SET TimeZone = 'UTC'")
    warehouse.execute(_SCATTER)
    for table in TABLES:
        _fill_table(warehouse, table, rows, first_day)
    warehouse.execute("CREATE TABLE made_by (fingerprint VARCHAR)")
    warehouse.execute("INSERT INTO made_by VALUES (?)", [fingerprint])


def _fill_table(warehouse: duckdb.DuckDBPyConnection, table: UsageTable, rows: int, first_day: date) -> None:
    noon = time(12)
    start_us = _microseconds(first_day, noon, table.zone)
    end_us = _microseconds(LAST_DAY, noon, table.zone)
    warehouse.execute(_MADE_ROW)
    warehouse.execute(_REGULAR_ROWS, {"rows": rows, "start_us": start_us, "step_us": (end_us - start_us) // rows})
    midnights_us = [_microseconds(day, time(), table.zone) for day in _days(first_day)]
    warehouse.execute(_PLANTED_ROWS, {"midnights_us": midnights_us, "start_us": start_us, "end_us": end_us})
    warehouse.execute(table.sql)


def _microseconds(day: date, at: time, zone: str) -> int:
    """The moment as whole microseconds since 1970, computed without a float."""
    moment = datetime.combine(day, at, ZoneInfo(zone))
    return (moment - datetime(1970, 1, 1, tzinfo=ZoneInfo("UTC"))) // timedelta(microseconds=1)


def _days(first_day: date) -> Iterator[date]:
    return (first_day + timedelta(days=number) for number in range((LAST_DAY - first_day).days + 1))


def main() -> None:
    """Make the warehouse from the command line, and say what happened."""
    parser = argparse.ArgumentParser(description="Make the sample warehouse (DuckDB).")
    parser.add_argument("path", type=Path)
    parser.add_argument("--rows", type=int, default=ROWS, help="regular rows per table (default: %(default)s)")
    arguments = parser.parse_args()
    made = make_warehouse(arguments.path, arguments.rows)
    print(f"{arguments.path}: {'made' if made else 'stands already'}")


if __name__ == "__main__":
    main()
