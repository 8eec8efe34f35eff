"""Opening a ledger: create it on purpose, and never by accident.

A missing ledger would bill everything again, so only `create` makes one; `connect` refuses a database that holds none.
"""

import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, insert, inspect, make_url, select, text
from sqlalchemy.exc import DBAPIError, OperationalError

from usage_billing.errors import Misconfigured, NotApplied
from usage_billing.ledger import tables

_ENGINES = {"sqlite", "postgresql"}
_MEND = "run `usage-billing ledger init` once; a ledger that was moved needs its own file or database back instead"


def connect(url: str | URL) -> Engine:
    """Return an engine on the ledger at `url`.

    Raises:
        Misconfigured: no ledger is there, or its schema is of another version, or the engine is not supported.
        NotApplied: the database cannot be reached.
    """
    engine = _engine(url)
    if (version := _version(engine)) is None:
        engine.dispose()
        raise Misconfigured(f"no usage ledger at {_shown(url)}: {_MEND}")
    if version != tables.SCHEMA_VERSION:
        engine.dispose()
        raise Misconfigured(
            f"the usage ledger at {_shown(url)} has schema {version}, this package needs {tables.SCHEMA_VERSION}: "
            "stop the billing DAGs, then run `usage-billing ledger init`, which upgrades it"
        )
    return engine


def create(url: str | URL) -> bool:
    """Create or upgrade the ledger at `url`; say whether anything had to be done.

    Raises:
        Misconfigured: the database is Airflow's own, or the engine is not supported.
    """
    from alembic import command  # noqa: PLC0415 - only this command needs it, and it takes its time to import.
    from alembic.config import Config  # noqa: PLC0415

    if make_url(url).get_backend_name() == "sqlite":
        Path(str(make_url(url).database)).parent.mkdir(parents=True, exist_ok=True)
    engine = _engine(url, must_exist=False)
    try:
        if _version(engine) == tables.SCHEMA_VERSION:
            return False
        config = Config()
        config.set_main_option("script_location", "usage_billing:ledger/migrations")
        with engine.begin() as connection:
            if inspect(connection).has_table("dag_run"):
                raise Misconfigured(f"{_shown(url)} is Airflow's own database: give the ledger a database of its own")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            if connection.execute(select(tables.ledger)).first() is None:
                row = {"ledger_id": str(uuid.uuid4()), "created_at": datetime.now(UTC)}
                connection.execute(insert(tables.ledger).values(row))
    finally:
        engine.dispose()
    return True


def _engine(url: str | URL, *, must_exist: bool = True) -> Engine:
    backend = make_url(url).get_backend_name()
    if backend not in _ENGINES:
        raise Misconfigured(
            f"the usage ledger lives in SQLite or PostgreSQL, not in {backend}: change the ledger's connection"
        )
    if backend == "postgresql":
        return create_engine(url, pool_pre_ping=True)
    if must_exist and not Path(str(make_url(url).database)).exists():
        raise Misconfigured(f"no usage ledger at {_shown(url)}: {_MEND}")
    engine = create_engine(url, connect_args={"timeout": 60})
    event.listen(engine, "connect", _on_sqlite_connect)
    event.listen(engine, "begin", _on_sqlite_begin)
    return engine


def _on_sqlite_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # The driver would start transactions late, and never for a SELECT.
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # A receipt must survive a power cut, not just a crash.
    connection.execute("PRAGMA foreign_keys = ON")


def _on_sqlite_begin(connection: Connection) -> None:
    reading = connection.get_execution_options().get("reading", False)
    # A writer takes its lock at once: upgrading a read lock later fails when two do it together.
    connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _version(engine: Engine) -> str | None:
    try:
        with engine.connect().execution_options(reading=True) as connection:
            if not inspect(connection).has_table(tables.VERSION_TABLE):
                return None
            found = connection.execute(text(f"SELECT version_num FROM {tables.VERSION_TABLE}")).scalar()  # noqa: S608
            return str(found) if found is not None else None
    except OperationalError as error:
        raise NotApplied(f"the usage ledger at {_shown(engine.url)} cannot be reached: {error.orig}") from error
    except DBAPIError as error:
        raise Misconfigured(f"{_shown(engine.url)} cannot be read as a usage ledger: {error.orig}") from error


def _shown(url: str | URL) -> str:
    return make_url(url).render_as_string(hide_password=True)
