"""Extract: one SELECT against the warehouse, read as a stream, staged under our own words.

Opening and reading are two steps, so that the caller can hold its lock exactly while the snapshot is taken:
`open_reader` executes the statement, the batches are asked for afterwards. One SELECT is one snapshot, so pages cannot
shift.

This module takes any hook with the shape of Airflow's ``DbApiHook`` (``get_conn()``, ``placeholder``, ``conn_type``)
and knows nothing of Airflow itself.
"""

import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Protocol
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import text
from sqlalchemy.engine.default import DefaultDialect

from usage_billing import quantities
from usage_billing.errors import Misconfigured
from usage_billing.records import Period, Staged
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging
from usage_billing.trailing import keep_columns, seen

# The DB-API standard names what these can do, but no type for them.
_Connection = Any
_Cursor = Any

TIME = pa.timestamp("us", "UTC")

_PARAMETER_STYLES = {"?": "qmark", "%s": "format"}
_LITERAL_OR_COMMENT = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)
_ZONE_IN_TEXT = r"(Z|[+-]\d\d(:?\d\d)?)$"


class Hook(Protocol):
    """What extraction needs of an Airflow SQL hook."""

    @property
    def placeholder(self) -> str:
        """``?`` or ``%s``: how the driver marks a bound value."""

    @property
    def conn_type(self) -> str:
        """Airflow's connection type: ``duckdb``, ``postgres``, ``sqlite`` and so on."""

    def get_conn(self) -> Any:
        """Return a new DB-API connection."""


def open_reader(hook: Hook, sql: str, window: Period, batch_rows: int) -> Iterator[pa.Table]:
    """Execute `sql` for `window` and return an iterator over its rows, in tables of about `batch_rows` rows.

    When this returns, the snapshot is taken. ``:window_start`` and ``:window_end`` are bound as instants in UTC;
    SQLite, which has no type for them, gets text ``YYYY-MM-DD HH:MM:SS``, also in UTC, and compares it as text.

    DuckDB and ADBC connections hand Arrow over; PostgreSQL is read through a server-side cursor, because an ordinary
    one fetches the whole result first (psycopg documentation, "Server-side cursors"); all else by DB-API ``fetchmany``.

    Raises:
        Misconfigured: the driver's placeholder is unknown, or the text is no single SELECT.
    """
    return open_query(hook, sql, {"window_start": window.start, "window_end": window.end}, batch_rows)


def open_query(hook: Hook, sql: str, binds: Mapping[str, datetime | int], batch_rows: int) -> Iterator[pa.Table]:
    """Execute a source's query with these values bound, as `open_reader` does; a number is bound as it is.

    Raises:
        Misconfigured: as `open_reader`.
    """
    if hook.conn_type == "sqlite":
        binds = {name: _as_sqlite(value) for name, value in binds.items()}
    statement, values = _bound(sql, hook.placeholder, binds)
    connection = hook.get_conn()
    try:
        batches = _opener(hook.conn_type, connection)(connection, statement, values, batch_rows)
    except BaseException:
        connection.close()
        raise
    return _closing(connection, batches)


def _as_sqlite(value: Any) -> Any:
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if isinstance(value, datetime) else value


def _bound(sql: str, placeholder: str, binds: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """Return `sql` in the driver's own style, and the values in the order in which their marks stand there."""
    if placeholder not in _PARAMETER_STYLES:
        raise Misconfigured(
            f"warehouse: the driver's placeholder {placeholder!r} is none of {', '.join(_PARAMETER_STYLES)}"
        )
    dialect = DefaultDialect(paramstyle=_PARAMETER_STYLES[placeholder])  # type: ignore[arg-type]
    compiled = text(_LITERAL_OR_COMMENT.sub(_without_binds, sql)).compile(dialect=dialect)
    return str(compiled), [binds[name] for name in compiled.positiontup or ()]


def _without_binds(found: re.Match[str]) -> str:
    # A colon in a literal binds nothing, and a mark in a comment would be counted by some drivers and not by others.
    written = found.group()
    return re.sub(r"(?<!\\):", r"\\:", written) if written[0] in "'\"" else " "


_Opener = Callable[[_Connection, str, list[Any], int], Iterator[pa.Table]]


def _opener(conn_type: str, connection: _Connection) -> _Opener:
    if conn_type == "duckdb":
        return _open_duckdb
    if conn_type == "postgres" and not hasattr(connection, "adbc_get_info"):
        return _open_postgres
    return _open_any


def _open_duckdb(connection: _Connection, statement: str, values: list[Any], batch_rows: int) -> Iterator[pa.Table]:
    relation = connection.sql(statement, params=values)
    if relation is None:
        raise Misconfigured("usage.sql: is no SELECT: nothing comes back from it")
    # DuckDB 2 streams Arrow from a relation; before that, from a cursor.
    if hasattr(relation, "to_arrow_reader"):
        return _tables(relation.to_arrow_reader(batch_rows))
    return _tables(connection.cursor().execute(statement, values).fetch_record_batch(batch_rows))


def _open_postgres(connection: _Connection, statement: str, values: list[Any], batch_rows: int) -> Iterator[pa.Table]:
    cursor = connection.cursor(name=f"usage_billing_{uuid.uuid4().hex}")
    cursor.execute(statement, values)
    return _fetched(cursor, batch_rows)


def _open_any(connection: _Connection, statement: str, values: list[Any], batch_rows: int) -> Iterator[pa.Table]:
    cursor = connection.cursor()
    cursor.execute(statement, values)
    if hasattr(cursor, "fetch_record_batch"):
        return _tables(cursor.fetch_record_batch())
    return _fetched(cursor, batch_rows)


def _closing(connection: _Connection, batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
    try:
        yield from batches
    finally:
        connection.close()


def _tables(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    yield reader.schema.empty_table()
    for batch in reader:
        yield pa.Table.from_batches([batch])


def _fetched(cursor: _Cursor, batch_rows: int) -> Iterator[pa.Table]:
    rows = cursor.fetchmany(batch_rows)
    if cursor.description is None:
        raise Misconfigured("usage.sql: is no SELECT: nothing comes back from it")
    names = [column[0] for column in cursor.description]
    yield _table(names, rows)
    while rows := cursor.fetchmany(batch_rows):
        yield _table(names, rows)


def _table(names: list[str], rows: Sequence[Any]) -> pa.Table:
    # A connection may be set to give rows as mappings (PostgresHook: extra `cursor`).
    if rows and isinstance(rows[0], Mapping):
        rows = [tuple(row.values()) for row in rows]
    columns = list(zip(*rows, strict=True)) or [()] * len(names)
    return pa.Table.from_arrays([_array(column) for column in columns], names=names)


def _array(values: Sequence[Any]) -> pa.Array:
    """Return a driver's Python values as Arrow, exactly: decimals and outsized integers as text, floats as floats."""
    kinds = set(map(type, values)) - {type(None)}
    if kinds == {datetime}:
        return _times_array(values)
    if kinds == {Decimal}:
        return pa.array([None if value is None else format(value, "f") for value in values], pa.string())
    if float in kinds:
        # Whatever stands beside it (SQLite types each value by itself), the float is what must be told.
        return pa.array([value if isinstance(value, float) else None for value in values], pa.float64())
    if len(kinds) < 2 and uuid.UUID not in kinds:  # noqa: PLR2004
        try:
            return pa.array(values)
        except (OverflowError, pa.ArrowException):
            pass  # An integer beyond 64 bits, or a type that Arrow does not know: text says it exactly.
    return pa.array([None if value is None else str(value) for value in values], pa.string())


def _times_array(values: Sequence[datetime | None]) -> pa.Array:
    naive = {value.tzinfo is None for value in values if value is not None}
    if len(naive) > 1:
        raise Misconfigured("usage.sql: one column has times with and without a time zone; cast it to one of the two")
    return pa.array(values, pa.timestamp("us") if naive == {True} else TIME)


def extract(reader: Iterable[pa.Table], source: BillingSource, staging: Staging, folder: str) -> Staged:
    """Stage the rows of `reader` below `folder` under our own words, in parts of at most ``batch_rows`` rows.

    A row that is marked as deleted, a tombstone, is not staged: it is there to be seen arriving. Beside them stands
    which columns the query returned, those that the source does not name too.

    Raises:
        Misconfigured: the query does not return what ``source.yaml`` says it does (see `normalise`).
    """
    columns: dict[str, str] = {}
    batches = (normalise(batch, source) for batch in seen(reader, columns))
    staged = staging.write(folder, "extracted", _parts(batches, source.settings.batch_rows))
    keep_columns(columns, staging, folder)
    return staged


def _parts(batches: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `rows` rows, the last one shorter; a change of type also ends a table."""
    held: pa.Table | None = None
    for batch in batches:
        if held is not None and held.schema != batch.schema:
            yield held
            held = None
        held = batch if held is None else pa.concat_tables([held, batch])
        while held.num_rows > rows:
            yield held.slice(0, rows)
            held = held.slice(rows)
    if held is not None:
        yield held


def normalise(table: pa.Table, source: BillingSource) -> pa.Table:
    """Return what `source` names of a query's result, under our words.

    ``event_id``, ``account`` and each dimension as text, ``time`` as ``timestamp[us, UTC]``, ``quantity`` (where the
    meter has one) as it came: integers, decimals or text. Finer times are cut to the microsecond. A time without a
    zone is read in ``naive_times``; if the clocks make it ambiguous, as the earlier one. Rows whose ``deleted`` is true
    are left out. Where times come as text there is a column ``unread``: the text of each that is none, or has no zone
    that anybody knows; its ``time`` is null.

    Raises:
        Misconfigured: with every fault at once: missing columns, inexact or unsuitable types, times without a zone.
    """
    faults = _missing(table, source)
    if faults:
        raise Misconfigured.all_at_once(f"usage.sql of {source.title}", faults)
    columns: dict[str, pa.ChunkedArray] = {}
    for word, name in _words(source).items():
        column = plain(table.column(name))
        if word == "time":
            columns |= _time(column, name, source.settings.naive_times, faults)
        elif word == "quantity":
            columns[word] = _quantity(column, name, faults)
        elif word == "deleted":
            columns[word] = _flag(column, name, faults)
        else:
            columns[word] = as_text(column, name, "usage.sql", faults)
    if faults:
        raise Misconfigured.all_at_once(f"usage.sql of {source.title}", faults)
    rows = pa.table(columns)
    return rows.filter(pc.invert(rows.column("deleted"))).drop_columns("deleted") if "deleted" in columns else rows


def _words(source: BillingSource) -> dict[str, str]:
    named = source.settings.columns.model_dump(exclude_none=True, exclude={"arrival"})
    return named | {dimension: dimension for dimension in source.settings.dimensions}


def _missing(table: pa.Table, source: BillingSource) -> list[str]:
    returned = ", ".join(table.column_names)
    return [
        f"{word}: the query returns {'no' if not count else f'{count} columns called'} {name!r}; it returns {returned}"
        for word, name in _words(source).items()
        if (count := table.column_names.count(name)) != 1
    ]


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column without the dictionary of its values, where a driver made one."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def as_text(column: pa.ChunkedArray, name: str, query: str, faults: list[str]) -> pa.ChunkedArray:
    """Return what a query names somebody or something with as text, or add to `faults` why it has no one spelling."""
    kind = column.type
    exact = quantities.is_exact(kind) and not (pa.types.is_decimal(kind) and kind.scale)
    if exact or pa.types.is_string_view(kind) or pa.types.is_boolean(kind) or pa.types.is_date(kind):
        return column.cast(pa.string())
    faults.append(f"{name}: {kind} has no one spelling as text; cast it to text in {query}")
    return column


def _quantity(column: pa.ChunkedArray, name: str, faults: list[str]) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.string())
    if not quantities.is_exact(kind):
        faults.append(f"{name}: {kind} is not exact; cast it to DECIMAL in usage.sql")
    return column


def _flag(column: pa.ChunkedArray, name: str, faults: list[str]) -> pa.ChunkedArray:
    """Return truth or falsehood; some databases have 1 and 0 for it. What is null is false."""
    kind = column.type
    if pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return pc.fill_null(column.cast(pa.bool_()), False)  # noqa: FBT003
    faults.append(f"{name}: {kind} is no yes or no; cast it to BOOLEAN in usage.sql")
    return column


def _time(column: pa.ChunkedArray, name: str, naive: ZoneInfo | None, faults: list[str]) -> dict[str, pa.ChunkedArray]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return {"time": as_times(column, name, naive, faults)}
    found: list[str] = []
    times = as_times(column, name, naive, found)
    if not found:
        return {"time": times, "unread": pa.chunked_array([pa.nulls(len(column), pa.string())])}
    # One row that cannot be read is for the quarantine: no more than itself is unknown. Slow, and only then.
    texts = column.cast(pa.string()).combine_chunks().dictionary_encode()
    each = pa.array([_moment(text, naive) for text in texts.dictionary.to_pylist()], TIME)
    times = each.take(texts.indices)
    unread = pc.if_else(pc.is_null(times), column.cast(pa.string()).combine_chunks(), pa.scalar(None, pa.string()))
    return {"time": pa.chunked_array([times]), "unread": pa.chunked_array([unread])}


def _moment(text: str, naive: ZoneInfo | None) -> datetime | None:
    faults: list[str] = []
    (found,) = as_times(pa.chunked_array([[text]], pa.string()), "", naive, faults).to_pylist()
    return None if faults else found


def as_times(column: pa.ChunkedArray, name: str, naive: ZoneInfo | None, faults: list[str]) -> pa.ChunkedArray:
    """Return a column as ``timestamp[us, UTC]``, what a query may give for a time read as `normalise` says."""
    kind = column.type
    if pa.types.is_null(kind) or (pa.types.is_timestamp(kind) and kind.tz):
        return column.cast(TIME, safe=False)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _time_of_text(column.cast(pa.string()), name, naive, faults)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _zoned(column.cast(pa.timestamp("us"), safe=False), name, naive, faults)
    faults.append(f"{name}: {kind} is no time; cast it to a timestamp in usage.sql")
    return column


def _time_of_text(column: pa.ChunkedArray, name: str, naive: ZoneInfo | None, faults: list[str]) -> pa.ChunkedArray:
    column = pc.utf8_trim_whitespace(column)
    zoned = pc.all(pc.match_substring_regex(pc.utf8_slice_codeunits(column, 10), _ZONE_IN_TEXT)).as_py()
    try:
        if zoned is not False:
            return column.cast(TIME)
        return _zoned(column.cast(pa.timestamp("us")), name, naive, faults)
    except pa.ArrowInvalid as invalid:
        faults.append(
            f"{name}: {str(invalid).splitlines()[0]}; give YYYY-MM-DD HH:MM:SS, all with a zone or all without"
        )
        return column


def _zoned(column: pa.ChunkedArray, name: str, naive: ZoneInfo | None, faults: list[str]) -> pa.ChunkedArray:
    if naive is None:
        faults.append(
            f"{name}: its times have no time zone; return a zoned type, or set naive_times: UTC in source.yaml"
        )
        return column
    return pc.assume_timezone(column, naive.key, ambiguous="earliest", nonexistent="earliest").cast(TIME)
