"""The sample warehouse, and the figures that the demo is judged by."""

import hashlib
import importlib
from collections import Counter
from contextlib import closing
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from zoneinfo import ZoneInfo

import duckdb
import pytest

from usage_billing.ledger import Ledger

SCRIPTS = Path(__file__).parents[2] / "include" / "sandbox"
FIFTH = date(2026, 10, 5)

# What a good row looks like: table and columns, number of accounts, decimal places, zone.
SHAPES = {
    "api_calls": (("api_calls", "request_id", "requested_at", "account_ref", "calls"), 12, 0, "America/New_York"),
    "platform_events": (("platform_events", "event_id", "occurred_at", "account_id", "units"), 10, 3, "UTC"),
    "voip_minutes": (("voip_calls", "call_id", "started_at", "package_key", "minutes"), 8, 2, "America/Chicago"),
}
DIGESTS = {
    "api_calls": "26defbd83c94580fcb6dc66722b24206",
    "platform_events": "4d9d7004fa439c759fdae6b23cc795c7",
    "voip_minutes": "e5d1051a8aa2c5b55791bb3824a2100c",
}
STRANGERS = {"acct-9999", "orbit-99", "pkg-999"}


@pytest.fixture(name="warehouse")
def _warehouse(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("warehouse")


@pytest.fixture(name="verdict")
def _verdict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("verdict")


@pytest.fixture(name="sample")
def _sample(warehouse: ModuleType, tmp_path: Path) -> Path:
    path = tmp_path / "warehouse.duckdb"
    warehouse.make_warehouse(path)
    return path


def _query(path: Path, sql: str) -> list[tuple]:
    with closing(duckdb.connect(str(path), read_only=True)) as connection:
        connection.execute("SET TimeZone = 'UTC'")
        return connection.execute(sql).fetchall()


def _rows(path: Path, source: str) -> list[tuple]:
    (table, *columns), *_ = SHAPES[source]
    return _query(path, f"SELECT {', '.join(columns)} FROM {table}")  # noqa: S608 - Names of this file.


def _text(rows: list[tuple]) -> str:
    """The rows as text that no version of DuckDB or Python formats otherwise."""
    plain = ((event_id, at.isoformat(), account, format(quantity, "f")) for event_id, at, account, quantity in rows)
    return "\n".join(sorted(";".join(map(str, row)) for row in plain))


def _is_good(source: str, account: str | None, quantity: Decimal) -> bool:
    _, _, places, _ = SHAPES[source]
    return account is not None and account not in STRANGERS and quantity >= 0 and quantity == round(quantity, places)


def test_same_rows_on_every_machine(sample: Path):
    """The rows depend on nothing but the module: their digest is written down here."""
    digests = {
        source: hashlib.md5(_text(_rows(sample, source)).encode()).hexdigest()  # noqa: S324
        for source in SHAPES
    }
    assert digests == DIGESTS


def test_standing_warehouse_is_not_written_again(warehouse: ModuleType, sample: Path):
    """The second making leaves the file alone, so a demo that runs again starts at once."""
    before = sample.stat()
    assert warehouse.make_warehouse(sample) is False
    assert (sample.stat().st_ino, sample.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_other_or_broken_warehouse_is_replaced(warehouse: ModuleType, sample: Path):
    """Another number of rows, and a file that is no warehouse at all, both give way to a whole new one."""
    assert warehouse.make_warehouse(sample, rows=1000) is True
    assert len(_rows(sample, "api_calls")) < 2000
    sample.write_bytes(b"not a database")
    assert warehouse.make_warehouse(sample) is True
    assert len(_rows(sample, "api_calls")) > 18_000


@pytest.mark.parametrize("source", SHAPES)
def test_each_day_holds_every_kind_of_bad_row(sample: Path, source: str):
    """Every day of October has one row of each kind that must not be billed."""
    _, _, places, zone = SHAPES[source]
    found: dict[date, Counter] = {}
    ids = Counter(event_id for event_id, *_ in _rows(sample, source))
    for event_id, at, account, quantity in _rows(sample, source):
        kinds = found.setdefault(at.astimezone(ZoneInfo(zone)).date(), Counter())
        kinds["no account"] += account is None
        kinds["stranger"] += account in STRANGERS
        kinds["negative"] += quantity < 0
        kinds["too fine"] += quantity >= 0 and quantity != round(quantity, places)
        kinds["recorded twice"] += ids[event_id] == 2
    october = [date(2026, 10, 1) + timedelta(days=number) for number in range(31)]
    each_once = {"no account": 1, "stranger": 1, "negative": 1, "too fine": 1, "recorded twice": 2}
    assert {day: dict(found[day]) for day in october} == dict.fromkeys(october, each_once)


@pytest.mark.parametrize("source", SHAPES)
def test_each_day_has_good_rows_on_both_of_its_edges(sample: Path, source: str):
    """Midnight itself belongs to the day that begins, the microsecond before it to the day that ends."""
    _, _, _, zone = SHAPES[source]
    midnight = datetime(2026, 10, 5, tzinfo=ZoneInfo(zone))
    good = {at for _, at, account, quantity in _rows(sample, source) if _is_good(source, account, quantity)}
    assert {midnight, midnight - timedelta(microseconds=1)} <= good


@pytest.mark.parametrize("source", SHAPES)
def test_owed_is_what_the_good_rows_add_up_to(verdict: ModuleType, sample: Path, source: str):
    """Added up by hand, row by row, a day owes what the SQL says, to the last decimal and for every account."""
    _, accounts, _, zone = SHAPES[source]
    by_hand: dict[str, Decimal] = {}
    seen = set()
    for event_id, at, account, quantity in _rows(sample, source):
        if (
            at.astimezone(ZoneInfo(zone)).date() == FIFTH
            and event_id not in seen
            and _is_good(source, account, quantity)
        ):
            seen.add(event_id)
            by_hand[account] = by_hand.get(account, Decimal()) + quantity
    owed = verdict.owed_by_account(sample, source, [FIFTH])
    assert owed == by_hand
    assert len(owed) == accounts


def test_nothing_is_owed_before_october(verdict: ModuleType, sample: Path):
    """September's last hours are in the warehouse, and before `bill_from`."""
    assert verdict.owed_by_account(sample, "platform_events", [date(2026, 9, 30)]) == {}


def test_too_much_here_does_not_make_up_for_too_little_there(verdict: ModuleType):
    """The difference sums absolute values, and an account that only one side knows counts whole."""
    owed = {"a": Decimal("1.5"), "b": Decimal(2)}
    assert verdict.difference(owed, dict(owed)) == 0
    assert verdict.difference(owed, {"a": Decimal(2), "b": Decimal("1.5")}) == 1
    assert verdict.difference(owed, {"a": Decimal("1.5"), "c": Decimal(2)}) == 4


def test_usage_that_nobody_read_is_owed_all_the_same(verdict: ModuleType, sample: Path, tmp_path: Path):
    """A ledger without extractions and a site that billed nothing differ by all that the demo's days owe."""
    ledger = tmp_path / "ledger.sqlite"
    Ledger.create(f"sqlite:///{ledger}")
    judged = verdict.judge(verdict.SOURCES[0], sample, ledger, billed={}, writing_requests=0)
    assert judged.rows_read == 0
    assert (
        judged.difference
        == judged.owed
        == sum(verdict.owed_by_account(sample, "api_calls", verdict.DEMO_DAYS).values())
    )


def test_closing_table_shows_plain_figures(verdict: ModuleType):
    """Thousands are grouped, a column's scale and exponents are not shown."""
    line = verdict.Verdict("api_calls", 2850, 25, Decimal("57190.000"), Decimal("5.719E+4"), Decimal("0E+1"), 0)
    assert verdict.table([line]).splitlines()[-1].split() == ["api_calls", "2,850", "25", "57,190", "57,190", "0", "0"]


def test_days_of_an_interval_are_those_of_the_billing_zone(verdict: ModuleType):
    """A New York day ends at four in the morning of the next UTC day, and is still one day."""
    start = datetime(2026, 10, 5, 4, tzinfo=UTC)
    days = verdict.days_between(start, start + timedelta(days=1), ZoneInfo("America/New_York"))
    assert days == [FIFTH]
