"""Where the demo keeps its state, and the environment that its programs share."""

import fcntl
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]

USER = "admin"


class StateInUse(Exception):
    """Another demo works on the same state: two of them would take each other's runs for their own."""


@dataclass(frozen=True)
class State:
    """The folders of one demo: `airflow` is Airflow's home, `demo` holds warehouse, ledger, books, staging and logs."""

    airflow: Path
    demo: Path

    @classmethod
    def inside(cls, folder: Path | None) -> "State":
        """The state in `folder`; without one, the checkout's own."""
        if folder is None:
            return cls(CHECKOUT / ".airflow", CHECKOUT / ".demo")
        return cls(folder.resolve() / "airflow", folder.resolve() / "demo")

    @property
    def warehouse(self) -> Path:
        """The DuckDB file."""
        return self.demo / "warehouse.duckdb"

    @property
    def ledger(self) -> Path:
        """The SQLite file."""
        return self.demo / "ledger.sqlite"

    @property
    def books(self) -> Path:
        """The sandbox's memory."""
        return self.demo / "books.sqlite"

    @property
    def staging(self) -> Path:
        """Where the tasks hand files to each other."""
        return self.demo / "staging"

    def log(self, program: str) -> Path:
        """Where the output of one of the demo's programs goes."""
        return self.demo / "logs" / f"{program}.log"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folders and keep others out; raise `StateInUse` when somebody is in."""
        self.demo.mkdir(parents=True, exist_ok=True)
        self.airflow.mkdir(parents=True, exist_ok=True)
        with (self.demo / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StateInUse(
                    f"a demo is at work in {self.demo} already; end it, or choose another --state"
                ) from None
            yield

    def password(self) -> str:
        """The password of Airflow's user `admin`, made at the first call and kept where Airflow looks for it."""
        path = self.airflow / "passwords.json"
        if not path.exists():
            path.touch(mode=0o600)
            path.write_text(json.dumps({USER: secrets.token_urlsafe(12)}))
        return str(json.loads(path.read_text())[USER])


@contextmanager
def folder_for(state: Path | None, story: str) -> Iterator[Path]:
    """The given folder, or one that is gone after the story."""
    if state is not None:
        yield state.resolve()
        return
    with tempfile.TemporaryDirectory(prefix=f"{story}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Ports:
    """Where the demo listens: the sandbox, Airflow's API and UI, and the log servers that it insists on."""

    sandbox: int
    api: int
    worker_logs: int
    trigger_logs: int

    @property
    def sandbox_url(self) -> str:
        """The sandbox's address, without a slash at the end."""
        return f"http://127.0.0.1:{self.sandbox}"

    @property
    def api_url(self) -> str:
        """Airflow's address, without a slash at the end."""
        return f"http://127.0.0.1:{self.api}"


def environment(state: State, ports: Ports) -> dict[str, str]:
    """What Airflow and `usage-billing` get to see: nothing of the caller's Airflow, everything of the demo's."""
    return {
        **_inherited(),
        **_airflow_settings(state, ports),
        **_package_settings(state),
        **_connections(state, ports.sandbox_url),
    }


def _inherited() -> dict[str, str]:
    """The caller's environment without what would lead Airflow astray, and with the demo's own programs first."""
    # Without bytecode each process pays a second more for importing Airflow.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("AIRFLOW") and name != "PYTHONDONTWRITEBYTECODE"
    }
    programs = Path(sys.executable).parent
    return {
        **kept,
        "PATH": _first(programs, kept.get("PATH", os.defpath)),
        "PYTHONPATH": _first(CHECKOUT / "include" / "sandbox" / "preload", kept.get("PYTHONPATH", "")),
        "NO_COLOR": "1",
    }


def _first(folder: Path, others: str) -> str:
    """A search path that begins with `folder`."""
    return os.pathsep.join([str(folder), *filter(None, [others])])


def _airflow_settings(state: State, ports: Ports) -> dict[str, str]:
    settings = {
        "core__dags_folder": CHECKOUT / "dags",
        "core__plugins_folder": CHECKOUT / "plugins",
        "core__load_examples": False,
        "core__test_connection": "Enabled",
        # Four tasks at once keep two cores busy; each more forks an idle worker of 100 MB.
        "core__parallelism": 4,
        "core__simple_auth_manager_users": f"{USER}:admin",
        "core__simple_auth_manager_passwords_file": state.airflow / "passwords.json",
        "core__execution_api_server_url": f"{ports.api_url}/execution/",
        "api__host": "127.0.0.1",
        "api__port": ports.api,
        # With the port alone every task would call 8080.
        "api__base_url": ports.api_url,
        "logging__worker_log_server_port": ports.worker_logs,
        "logging__trigger_log_server_port": ports.trigger_logs,
        "logging__namespace_levels": "great_expectations=WARNING py.warnings=ERROR",
        "scheduler__scheduler_idle_sleep_time": 0.1,
        # After a demo that was killed, its orphaned tasks are found in seconds, not in five minutes.
        "scheduler__orphaned_tasks_check_interval": 15,
        "workers__min_heartbeat_interval": 1,
    }
    named = {f"AIRFLOW__{name.upper()}": str(value) for name, value in settings.items()}
    return {"AIRFLOW_HOME": str(state.airflow), **named}


def _package_settings(state: State) -> dict[str, str]:
    return {
        "AIRFLOW__USAGE_BILLING__SOURCES_FOLDER": str(CHECKOUT / "include" / "sources"),
        "AIRFLOW__USAGE_BILLING__STAGING_PATH": str(state.staging),
    }


def _connections(state: State, sandbox_url: str) -> dict[str, str]:
    """The five connections, as anyone would write them; the keys open nothing but the sandbox."""
    connections = {
        "warehouse": {"conn_type": "duckdb", "host": str(state.warehouse), "extra": {"read_only": True, "threads": 1}},
        "usage_ledger": {"conn_type": "sqlite", "host": str(state.ledger)},
        "maxio_acme": _maxio("acme", "sandbox-acme-key", sandbox_url),
        "maxio_orbit": _maxio("orbit", "sandbox-orbit-key", sandbox_url),
        "chargeover_telco": {
            "conn_type": "chargeover",
            "host": f"{sandbox_url}/chargeover/telco",
            "login": "sandboxtelcopublickey00000000000",
            "password": "sandboxtelcoprivatekey0000000000",
            "extra": {"instance": "telco", "timezone": "America/Chicago", "settle_after_seconds": 2},
        },
    }
    return {f"AIRFLOW_CONN_{name.upper()}": json.dumps(connection) for name, connection in connections.items()}


def _maxio(site: str, key: str, sandbox_url: str) -> dict[str, object]:
    return {
        "conn_type": "maxio",
        "host": f"{sandbox_url}/maxio/{site}",
        "password": key,
        "extra": {
            "subdomain": site,
            "region": "us",
            "events_url": f"{sandbox_url}/events",
            "settle_after_seconds": 2,
        },
    }
