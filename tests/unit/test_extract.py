"""Rows from a warehouse: one snapshot, exact values, our own words."""

import sqlite3
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import duckdb
import pyarrow as pa
import pytest

from stage_helpers import START, make_source, read
from usage_billing.errors import Misconfigured
from usage_billing.extract import extract, normalise, open_reader
from usage_billing.records import Period
from usage_billing.staging import Staging

WINDOW = Period(START, START + timedelta(days=1))
SQL = (
    "SELECT event_id, time, account, quantity FROM calls WHERE time >= :window_start AND time < :window_end ORDER BY 1"
)


class Hook:
    """A SQL hook as Airflow makes them, less Airflow."""

    def __init__(self, connect, conn_type, placeholder="?"):
        self.get_conn = connect
        self.conn_type = conn_type
        self.placeholder = placeholder


class ServerCursors:
    """A connection with server-side cursors and the ``%s`` style, which keeps what it was asked."""

    def __init__(self, names, answer):
        self.description = [(name,) for name in names]
        self.answer = answer
        self.named, self.executed, self.fetched, self.closed = [], [], [], False

    def cursor(self, name=None):
        """Return itself, and keep the name."""
        self.named.append(name)
        return self

    def execute(self, statement, values):
        """Keep the statement and its values."""
        self.executed.append((statement, values))

    def fetchmany(self, size):
        """Hand over the next rows."""
        self.fetched.append(size)
        taken, self.answer = self.answer[:size], self.answer[size:]
        return taken

    def close(self):
        """Keep that it was closed."""
        self.closed = True


@pytest.fixture
def duck(tmp_path):
    """A DuckDB file of 250 calls in the window and two on its edges, with a hook to it."""
    path = str(tmp_path / "warehouse.duckdb")
    with duckdb.connect(path) as warehouse:
        warehouse.execute("SET TimeZone = 'America/New_York'")
        warehouse.execute(
            "CREATE TABLE calls AS SELECT 'e' || lpad(n::VARCHAR, 3, '0') AS event_id, "
            "TIMESTAMPTZ '2026-10-01 00:00:00+00' + to_minutes(n) AS time, n % 7 AS account, "
            "(n * 0.001::DECIMAL(4, 3))::DECIMAL(18, 3) AS quantity FROM range(250) AS made(n)"
        )
        warehouse.execute(
            "INSERT INTO calls VALUES ('late', '2026-10-02 00:00:00+00', 1, 1), "
            "('early', '2026-09-30 23:59:59.999999+00', 1, 1)"
        )
    return Hook(lambda: duckdb.connect(path), "duckdb")


@pytest.fixture
def lite(tmp_path):
    """A SQLite file whose times are text in UTC, with a hook to it."""
    path = tmp_path / "warehouse.sqlite"

    def connect(*values):
        connection = sqlite3.connect(path)
        if values:
            connection.execute("CREATE TABLE calls (event_id, time TEXT, account, quantity)")
            connection.executemany("INSERT INTO calls VALUES (?, ?, ?, ?)", values)
            connection.commit()
            connection.close()
        return connection

    return Hook(connect, "sqlite")


@pytest.fixture
def staging(tmp_path):
    """Stage below a temporary folder."""
    return Staging(tmp_path / "staging")


def table(**columns):
    """Return one sound row; `columns` replace or add to it."""
    names = {"event_id": ["a"], "time": [START], "account": ["x"], "quantity": [1]}
    return pa.table(names | columns)


def faults(rows, **settings):
    """Return what normalising these rows tells."""
    with pytest.raises(Misconfigured) as error:
        normalise(rows, make_source(**settings))
    return str(error.value)


def test_the_window_is_half_open_and_exact(duck, staging):
    """The row on the window's start is read, the row on its end and the one a microsecond early are not."""
    staged = extract(open_reader(duck, SQL, WINDOW, 100), make_source(batch_rows=100), staging, "run")
    rows = read(staging, staged)
    assert staged.rows == 250
    assert rows.schema == pa.schema(
        [
            ("event_id", pa.string()),
            ("time", pa.timestamp("us", "UTC")),
            ("account", pa.string()),
            ("quantity", pa.decimal128(18, 3)),
        ]
    )
    assert rows.slice(249).to_pylist() == [
        {"event_id": "e249", "time": START + timedelta(minutes=249), "account": "4", "quantity": Decimal("0.249")}
    ]


@pytest.mark.parametrize("batch_rows", [1, 7, 100, 250, 1000])
def test_parts_are_never_larger_than_the_batch(duck, staging, batch_rows):
    """Whatever batches a driver likes to hand over, the parts have the size that the source asks for."""
    staged = extract(open_reader(duck, SQL, WINDOW, batch_rows), make_source(batch_rows=batch_rows), staging, "run")
    sizes = [part.num_rows for part in staging.read(staged)]
    assert sum(sizes) == 250
    assert set(sizes[:-1]) <= {batch_rows}
    assert sizes[-1] <= batch_rows


def test_the_snapshot_is_taken_when_the_reader_is_open(duck, staging):
    """Rows that arrive between opening and reading belong to the next extraction."""
    reader = open_reader(duck, SQL, WINDOW, 10)
    with duck.get_conn() as other:
        other.execute("INSERT INTO calls VALUES ('new', '2026-10-01 12:00:00+00', 1, 1)")
        other.execute("DELETE FROM calls WHERE event_id = 'e200'")
    staged = extract(reader, make_source(), staging, "run")
    ids = read(staging, staged)["event_id"].to_pylist()
    assert len(ids) == 250
    assert "e200" in ids


def test_an_empty_window_keeps_the_columns(duck, lite, staging):
    """A day without usage is a table without rows, not an error."""
    lite.get_conn(("a", "2020-01-01 00:00:00", "x", 1))
    empty = Period(START - timedelta(days=50), START - timedelta(days=49))
    for hook in (duck, lite):
        staged = extract(open_reader(hook, SQL, empty, 10), make_source(), staging, "run")
        assert staged.rows == 0
        assert read(staging, staged).column_names == ["event_id", "time", "account", "quantity"]


def test_sqlite_compares_text_in_utc(lite, staging):
    """SQLite has no type for times: the window is bound as UTC text, and naive_times says how to read the answer."""
    lite.get_conn(
        ("a", "2026-10-01 00:00:00", 7, 5), ("b", "2026-10-01 23:59:59", 7, "2.50"), ("c", "2026-10-02 00:00:00", 7, 1)
    )
    staged = extract(open_reader(lite, SQL, WINDOW, 1), make_source(naive_times="UTC"), staging, "run")
    first, second = staging.read(staged)
    assert first.to_pylist() == [{"event_id": "a", "time": START, "unread": None, "account": "7", "quantity": 5}]
    assert second["quantity"].to_pylist() == ["2.50"]


def test_sqlite_float_is_told_even_beside_exact_values(lite, staging):
    """SQLite types every value by itself: one float among integers must not slip through."""
    lite.get_conn(("a", "2026-10-01 00:00:00", 7, 5), ("b", "2026-10-01 00:00:01", 7, 2.5))
    with pytest.raises(Misconfigured, match=r"quantity: double is not exact; cast it to DECIMAL in usage\.sql"):
        extract(open_reader(lite, SQL, WINDOW, 10), make_source(naive_times="UTC"), staging, "run")


def test_postgres_is_read_by_a_server_side_cursor_in_batches(staging):
    """An ordinary cursor would fetch the whole result into memory before the first row is seen."""
    zone = timezone(timedelta(hours=-4))
    answer = [
        (number, START.astimezone(zone), "x", Decimal("0.10") if number else Decimal("1E+2")) for number in range(5)
    ]
    connection = ServerCursors(["event_id", "time", "account", "quantity"], answer)
    reader = open_reader(Hook(lambda: connection, "postgres", "%s"), SQL, WINDOW, 2)
    assert connection.named[0].startswith("usage_billing_")
    assert connection.fetched == []
    rows = read(staging, extract(reader, make_source(), staging, "run"))
    assert connection.fetched == [2, 2, 2, 2]
    assert connection.closed
    assert rows["event_id"].to_pylist() == ["0", "1", "2", "3", "4"]
    assert rows["quantity"].to_pylist() == ["100", "0.10", "0.10", "0.10", "0.10"]
    assert set(rows["time"].to_pylist()) == {START}


def test_binds_follow_the_drivers_style():
    """Values go by position in the order of their marks, a percent sign is doubled, and nothing else is a bind."""
    connection = ServerCursors(["n"], [])
    sql = """SELECT 1 -- from :window_start, 100 % sure
    WHERE ':window_end' <> 'a:b%' AND "odd:name" = 1 AND until::date < :window_end /* :window_start */
    AND at >= :window_start
    AND at < :window_end AND x LIKE 'a%' """
    list(open_reader(Hook(lambda: connection, "postgres", "%s"), sql, WINDOW, 2))
    ((statement, values),) = connection.executed
    assert values == [WINDOW.end, WINDOW.start, WINDOW.end]
    assert " ".join(statement.split()) == (
        "SELECT 1 WHERE ':window_end' <> 'a:b%%' AND \"odd:name\" = 1 AND until::date < %s "
        "AND at >= %s AND at < %s AND x LIKE 'a%%'"
    )


def test_rows_given_as_mappings_are_read_by_their_columns(staging):
    """A PostgreSQL connection set to dictionaries bills the same."""
    answer = [{"event_id": "a", "time": START, "account": UUID(int=7), "quantity": Decimal("1.5")}]
    connection = ServerCursors(list(answer[0]), answer)
    staged = extract(
        open_reader(Hook(lambda: connection, "postgres", "%s"), SQL, WINDOW, 2), make_source(), staging, "run"
    )
    assert read(staging, staged).to_pylist() == [
        {"event_id": "a", "time": START, "account": "00000000-0000-0000-0000-000000000007", "quantity": "1.5"}
    ]


def test_a_driver_that_offers_arrow_is_asked_for_arrow(staging):
    """An ADBC cursor hands record batches over; no row becomes a Python object."""

    class Adbc(ServerCursors):
        def fetch_record_batch(self):
            """Hand over Arrow."""
            return table(quantity=["1.5"]).to_reader()

    connection = Adbc(["event_id"], [])
    staged = extract(open_reader(Hook(lambda: connection, "generic"), SQL, WINDOW, 2), make_source(), staging, "run")
    assert (staged.rows, connection.fetched, connection.closed) == (1, [], True)


def test_a_statement_that_fails_leaves_no_connection_open():
    """The driver's own error comes through, and the connection is given back."""

    class Broken(ServerCursors):
        def execute(self, statement, values):  # noqa: ARG002
            """Keep the statement and its values."""
            raise RuntimeError("no such table")

    connection = Broken([], [])
    with pytest.raises(RuntimeError, match="no such table"):
        open_reader(Hook(lambda: connection, "mysql", "%s"), SQL, WINDOW, 2)
    assert connection.closed


def test_an_unknown_placeholder_is_told():
    """Rather no statement than one whose values land in the wrong places."""
    with pytest.raises(Misconfigured, match="placeholder ':1'"):
        open_reader(Hook(lambda: None, "oracle", ":1"), SQL, WINDOW, 2)


def test_all_missing_columns_are_told_with_what_came():
    """A person sees at once which names do not match."""
    told = faults(pa.table({"id": ["a"], "time": [START], "quantity": [1]}), dimensions=["region"])
    assert "3 faults" in told
    for line in ("event_id: the query returns no 'event_id'", "account: ", "region: ", "it returns id, time, quantity"):
        assert line in told


def test_a_column_that_comes_twice_is_told():
    """A join that returns two columns of one name leaves open which of them is billed."""
    twice = pa.Table.from_arrays(
        [["a"], [START], ["x"], [1], [2]], names=["event_id", "time", "account", "quantity", "quantity"]
    )
    assert "2 columns called 'quantity'" in faults(twice)


def test_unsuitable_types_are_told_together():
    """A float account, a float quantity and a number for a time are three faults of one query."""
    told = faults(table(account=[1.0], quantity=[0.1], time=[17]))
    assert "3 faults" in told
    assert "quantity: double is not exact; cast it to DECIMAL in usage.sql" in told
    assert "account: double has no one spelling as text" in told
    assert "time: int64 is no time" in told


def test_times_without_a_zone_need_one():
    """Which day a naive time belongs to is for source.yaml to say, not for a guess."""
    naive = table(
        time=pa.array([datetime(2026, 11, 1, 0, 30), None]),  # noqa: DTZ001 - a naive time is the story.
        event_id=["a", "b"],
        account=["x", "x"],
        quantity=[1, 1],
    )
    assert "set naive_times: UTC in source.yaml" in faults(naive)
    zoned = normalise(naive, make_source(naive_times="America/New_York"))
    assert zoned["time"].to_pylist() == [datetime(2026, 11, 1, 4, 30, tzinfo=UTC), None]


@pytest.mark.parametrize(
    ("given", "moment"),
    [
        ("2026-10-01 02:00:00", START),
        ("2026-10-01T02:00:00.000001", START + timedelta(microseconds=1)),
        ("2026-10-01 00:00:00Z", START),
        ("2026-09-30 20:00:00-04:00", START),
        ("2026-10-01 05:30:00+0530", START),
        ("2026-10-01", START - timedelta(hours=2)),
    ],
)
def test_a_time_as_text_is_read_with_its_own_zone_or_the_sources(given, moment):
    """A zone in the text wins; without one, naive_times says which clock it was."""
    assert normalise(table(time=[given]), make_source(naive_times="Europe/Berlin"))["time"].to_pylist() == [moment]


@pytest.mark.parametrize("given", ["yesterday", "01.10.2026", "2026-10-01 25:00:00", ""])
def test_a_text_that_is_no_time_is_kept_as_it_is_and_no_time_is_guessed(given):
    """Only its own row is unknown; all others are read."""
    rows = table(time=["2026-10-01 00:00:00", given, None], event_id=["a", "b", "c"], account="xyz", quantity=[1, 2, 3])
    found = normalise(rows, make_source(naive_times="UTC"))
    assert found["time"].to_pylist() == [START, None, None]
    assert found["unread"].to_pylist() == [None, given, None]


@pytest.mark.parametrize(("naive", "read"), [(None, [START, None]), ("Europe/Berlin", [START, START])])
def test_a_text_without_a_zone_among_others_is_read_only_if_the_source_says_how(naive, read):
    """Whichever rows come in one batch: each is read by itself."""
    texts = ["2026-10-01 00:00:00Z", "2026-10-01 02:00:00"]
    whole = table(time=texts, event_id=["a", "b"], account=["x", "x"], quantity=[1, 1])
    for parts in ([whole], [whole[:1], whole[1:]]):
        found = [normalise(part, make_source(naive_times=naive)) for part in parts]
        assert [time for part in found for time in part["time"].to_pylist()] == read
        unread = [text for part in found for text in part["unread"].to_pylist()]
        assert unread == [None, texts[1] if naive is None else None]


def test_times_with_and_without_zone_in_one_column_are_told():
    """Arrow would read the naive one as UTC without a word."""
    answer = [("a", START, "x", 1), ("b", datetime(2026, 10, 1), "x", 1)]  # noqa: DTZ001
    reader = open_reader(Hook(lambda: ServerCursors("abcd", answer), "mysql", "%s"), SQL, WINDOW, 5)
    with pytest.raises(Misconfigured, match="with and without a time zone"):
        list(reader)


def test_finer_times_stay_in_their_period():
    """A nanosecond before midnight is still the day before: times are cut, never rounded up."""
    last = pa.array([1790899199999999999], pa.timestamp("ns", "America/New_York"))
    (moment,) = normalise(table(time=last), make_source())["time"].to_pylist()
    assert moment == datetime(2026, 10, 1, 23, 59, 59, 999999, tzinfo=UTC)


def test_keys_become_text_whatever_type_they_had():
    """Integers, huge integers, enums, dates and truth have one spelling each; null stays null."""
    rows = table(event_id=pa.array([Decimal(2**70)], pa.decimal128(38, 0)), account=pa.array(["x"]).dictionary_encode())
    rows = rows.append_column("on", pa.array([date(2026, 10, 1)])).append_column("paid", pa.array([True]))
    rows = rows.append_column("none", pa.nulls(1))
    found = normalise(rows, make_source(dimensions=["on", "paid", "none"])).to_pylist()[0]
    assert [found[name] for name in ("event_id", "account", "on", "paid", "none")] == [
        str(2**70),
        "x",
        "2026-10-01",
        "true",
        None,
    ]


def test_a_source_that_counts_events_needs_no_quantity():
    """Without a measured column the parts have none."""
    source = make_source(
        columns={"event_id": "event_id", "time": "time", "account": "account"}, meter={"function": "count"}
    )
    assert normalise(table(), source).column_names == ["event_id", "time", "account"]


def test_integers_beyond_64_bits_stay_exact(staging):
    """A driver's big integer is carried as text and judged there, not cut to a float."""
    answer = [("a", START, "x", 2**80)]
    reader = open_reader(
        Hook(lambda: ServerCursors(["event_id", "time", "account", "quantity"], answer), "mysql", "%s"), SQL, WINDOW, 5
    )
    assert read(staging, extract(reader, make_source(), staging, "run"))["quantity"].to_pylist() == [str(2**80)]


@pytest.mark.parametrize("flags", [[True, False, None], [1, 0, None]], ids=["booleans", "numbers"])
def test_rows_that_are_marked_as_deleted_are_left_out(flags):
    """A tombstone is there to be seen arriving; what is not marked, or marked by nothing, is usage."""
    columns = {"event_id": "event_id", "time": "time", "account": "account", "quantity": "quantity", "deleted": "gone"}
    rows = pa.table(
        {"event_id": ["a", "b", "c"], "time": [START] * 3, "account": ["x"] * 3, "quantity": [1] * 3, "gone": flags}
    )
    source = make_source(columns=columns)
    assert normalise(rows, source).column("event_id").to_pylist() == ["b", "c"]
    assert "gone" not in normalise(rows, source).column_names
    assert "gone: string is no yes or no" in faults(
        rows.set_column(4, "gone", pa.array(["no", "no", "yes"])), columns=columns
    )
