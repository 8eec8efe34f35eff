"""Documents are executed: every command is run or checked, every block is loaded, every table is held to the code."""

import ast
import functools
import importlib
import json
import logging
import os
import re
import runpy
import shlex
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import duckdb
import pytest
import requests
import yaml
from pydantic import BaseModel

import usage_billing
from usage_billing import errors
from usage_billing.arrivals import after, find
from usage_billing.destinations import DESTINATIONS, destination_class, destination_settings
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings
from usage_billing.destinations.maxio import MaxioSettings
from usage_billing.errors import Misconfigured, UsageBillingError
from usage_billing.extract import open_query
from usage_billing.get_provider_info import get_provider_info
from usage_billing.ledger import Ledger
from usage_billing.records import Arrived, Period, State
from usage_billing.sandbox import Sandbox
from usage_billing.sources import BillingSource, DestinationSettings, SourceSettings, load_source
from usage_billing.suite import Suite

CHECKOUT = Path(__file__).parents[1]
README = CHECKOUT / "README.md"
CONTRIBUTING = CHECKOUT / "CONTRIBUTING.md"
CHANGELOG = CHECKOUT / "CHANGELOG.md"
GLOSSARY, OPERATIONS, DESTINATIONS_DOCUMENT, EXPECTATIONS = (
    CHECKOUT / "docs" / f"{name}.md" for name in ("glossary", "operations", "destinations", "expectations")
)
DOCUMENTS = (README, CONTRIBUTING, CHANGELOG, *sorted((CHECKOUT / "docs").rglob("*.md")))
PACKAGE = CHECKOUT / "plugins" / "usage_billing"
WORLDS = sorted((CHECKOUT / "include" / "sandbox" / "worlds").glob("*.yaml"))
STAGES = ("extract", "validate", "aggregate", "plan", "deliver", "reconcile")
DAY = (datetime(2026, 10, 5, 4, tzinfo=UTC), datetime(2026, 10, 6, 4, tzinfo=UTC))

pytestmark = [
    pytest.mark.filterwarnings("default"),  # Airflow warns about itself in a dozen places.
    pytest.mark.xdist_group("documents"),  # The commands run in one checkout, one at a time.
]


# --- reading the documents --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, its text, and the path that the line before it names."""

    document: Path
    line: int
    language: str
    text: str
    path: str = ""

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"


_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_NAMED_PATH = re.compile(r"^`([\w./]+)`")


@functools.cache
def blocks(document: Path) -> tuple[Block, ...]:
    """Return all fenced blocks of a document, in order."""
    text = document.read_text()
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        paragraph = before.rstrip().rpartition("\n\n")[2]
        named = _NAMED_PATH.match(paragraph)
        found.append(
            Block(
                document,
                before.count("\n") + 1,
                match["language"],
                textwrap.dedent(match["text"]),
                named[1] if named else "",
            )
        )
    return tuple(found)


def block(document: Path, beginning: str) -> Block:
    """Return the one block whose text begins with `beginning`."""
    (found,) = (each for each in blocks(document) if each.text.lstrip().startswith(beginning))
    return found


def table(document: Path, first_header: str) -> list[list[str]]:
    """Return the rows of every table of a document whose first column is headed `first_header`."""
    rows: list[list[str]] = []
    inside = False
    for line in document.read_text().splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == first_header:
            inside = True
        elif inside and set(cells[0]) != {"-"}:
            rows.append(cells)
    assert rows, f"{document.name} has no table headed {first_header!r}"
    return rows


def quoted(cell: str) -> list[str]:
    """Return what stands in backticks."""
    return re.findall(r"`([^`]+)`", cell)


@dataclass(frozen=True)
class Command:
    """One command of a shell block, with the settings that the block exports before it."""

    block: Block
    text: str
    exports: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.block.document.name}: {self.text[:60]}"


def commands() -> list[Command]:
    """Return every command of every shell block."""
    found = []
    for document in DOCUMENTS:
        for each in (each for each in blocks(document) if each.language == "sh"):
            lines = [line for line in each.text.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
            exports = tuple(line for line in lines if line.startswith("export AIRFLOW__"))
            found += [Command(each, line, exports) for line in lines if line not in exports]
    return found


def demo_module(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    """Import one of the demo's scripts."""
    monkeypatch.syspath_prepend(str(CHECKOUT / "include" / "sandbox"))
    return importlib.import_module(name)


# --- a place where commands may run -----------------------------------------------------------------------------------


def connections(sandbox: Sandbox, ledger: Path, warehouse: Path) -> dict[str, str]:
    """Return the connections of the shipped sources, all of them leading to the sandbox."""
    maxio = {"events_url": sandbox.events_url, "region": "us", "settle_after_seconds": 1}
    values: dict[str, dict[str, Any]] = {
        "WAREHOUSE": {"conn_type": "duckdb", "host": str(warehouse), "extra": {"read_only": True}},
        "USAGE_LEDGER": {"conn_type": "sqlite", "host": str(ledger)},
        "CHARGEOVER_TELCO": {
            "conn_type": "chargeover",
            "host": sandbox.chargeover_url("telco"),
            "login": "sandboxtelcopublickey00000000000",
            "password": "sandboxtelcoprivatekey0000000000",
            "extra": {"instance": "telco", "settle_after_seconds": 1},
        },
    }
    for site in ("acme", "orbit"):
        values[f"MAXIO_{site.upper()}"] = {
            "conn_type": "maxio",
            "host": sandbox.maxio_url(site),
            "password": f"sandbox-{site}-key",
            "extra": {"subdomain": site, **maxio},
        }
    return {f"AIRFLOW_CONN_{name}": json.dumps(value) for name, value in values.items()}


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    """All shipped billing sites."""
    with Sandbox(WORLDS) as running:
        yield running


@pytest.fixture(scope="module")
def scratch(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """An Airflow of its own, with its database and the shipped DAGs; give it a command and get what it said."""
    home = tmp_path_factory.mktemp("airflow home")
    programs = str(Path(sys.executable).parent)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        **connections(sandbox, home / "ledger.sqlite", home / "warehouse.duckdb"),
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(CHECKOUT / "plugins"),
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db",
        "AIRFLOW__USAGE_BILLING__STAGING_PATH": f"file://{home}/staging",
    }

    def run(script: str) -> str:
        done = subprocess.run(  # noqa: S603 - our own documents.
            ["bash", "-euo", "pipefail", "-c", script],  # noqa: S607
            cwd=CHECKOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    run("airflow db migrate")
    run("airflow dags reserialize")
    return run


# --- commands ---------------------------------------------------------------------------------------------------------

# What each command that runs here has to say.
SAID = {
    "airflow connections test maxio_acme": "Connection success",
    "airflow dags trigger bill_api_calls --conf '{\"rescan\": true}'": "bill_api_calls",
    "airflow dags trigger bill_api_calls --conf '{\"replay\": true}'": "bill_api_calls",
    "airflow dags unpause bill_api_calls": "bill_api_calls",
    "usage-billing check": "api_calls: sound\nplatform_events: sound\nvoip_minutes: sound",
    "usage-billing ledger init": "the usage ledger is",
    "usage-billing simulate --first-seed 0 --seeds 3": "seeds 0 to 2: ",
    "usage-billing simulate --source include/sources/api_calls --seeds 3 --ledger both": "3 maxio_metered",
    "usage-billing pools": "pool usage_billing_maxio_acme: 4 slots",
}

# What takes minutes, or Airflow itself, has a test of its own.
ELSEWHERE = {
    "usage-billing ledger adopt api_calls --from 2026-10-01 --to 2026-11-01 --dry-run": (
        "tests/integration/test_ledger_life.py",
        "test_the_command_mends_what_the_task_refused",
    ),
    "usage-billing ledger decide 0000000000000000000000000000000000000000000000000000000000000000 write-off "
    '--because "credited on invoice 1234"': (
        "tests/integration/test_floor.py",
        "test_a_deduction_that_a_person_wrote_off_is_never_made",
    ),
    "usage-billing preview api_calls --from 2026-10-05 --to 2026-10-06": (
        "tests/integration/test_flow.py",
        "test_the_preview_command_says_what_the_run_then_sends",
    ),
    "usage-billing ledger decide 0000000000000000000000000000000000000000000000000000000000000000 release "
    '--because "the customer agreed"': (
        "tests/integration/test_late_usage.py",
        "test_what_is_held_is_listed_and_released_by_name",
    ),
    "usage-billing ledger moves --source api_calls": (
        "tests/integration/test_moved_accounts.py",
        "test_what_is_to_decide_is_listed_and_decided_by_name",
    ),
    'usage-billing ledger move api_calls acct-0001 --choose from_now --because "the contract changed on the 6th"': (
        "tests/integration/test_moved_accounts.py",
        "test_what_is_to_decide_is_listed_and_decided_by_name",
    ),
    "usage-billing ledger list api_calls --state held": (
        "tests/integration/test_late_usage.py",
        "test_what_is_held_is_listed_and_released_by_name",
    ),
    "usage-billing quarantine list api_calls": (
        "tests/integration/test_flow.py",
        "test_a_person_lists_the_quarantine_and_writes_off_what_is_not_owed",
    ),
    'usage-billing quarantine write-off api_calls --event req-900000053 --because "a test call"': (
        "tests/integration/test_flow.py",
        "test_a_person_lists_the_quarantine_and_writes_off_what_is_not_owed",
    ),
    "make demo": ("tests/acceptance/test_demo.py", "test_first_demo_bills_what_is_owed"),
    "make up": ("tests/test_docs.py", "test_up_prints_address_and_login_and_ends_on_ctrl_c"),
}

# For the other targets: the program that they must come down to.
TARGETS = {
    "make test": "-m pytest",
    "make lint": "ruff check",
    "make types": "mypy",
    "make contracts": "lint-imports",
    "make bench": "include/sandbox/bench.py",
    "make bench-suite": "include/sandbox/bench_suite.py",
    "make build": "wheel",
    "make constraints": "uv pip compile",
    "make setup": "pip install",
    "make sandbox": "usage-billing sandbox",
    "make simulate SEEDS=20 FIRST_SEED=0": "usage-billing simulate --first-seed 0 --seeds 20",
    "make crash KILLS=200": "include/sandbox/crash.py --kills 200",
    "make backfills DAYS=90": "include/sandbox/any_order.py --days 90",
}


@pytest.mark.parametrize("command", commands(), ids=str)
def test_every_command_runs_or_is_checked(command: Command, request: pytest.FixtureRequest) -> None:
    """No command stands in a document that does not do what the document says."""
    text = command.text
    if text in ELSEWHERE:
        _has_test(*ELSEWHERE[text])
    elif text in TARGETS:
        _comes_down_to(text, TARGETS[text])
    elif text.startswith(".venv/bin/python -m pytest"):
        _collects(text)
    elif text.startswith("pip install"):
        _could_be_installed(text)
    elif text.startswith("curl "):
        _asks_the_sandbox(text, request.getfixturevalue("sandbox"))
    elif text.startswith("export AIRFLOW_CONN_"):
        _gives_settings(text, request)
    else:
        said = request.getfixturevalue("scratch")("\n".join([*command.exports, text]))
        assert (_backfilled(text) if text.startswith("airflow backfill create") else SAID[text]) in said


def _backfilled(text: str) -> str:
    """Return what a backfill says: a dry one names its last day, a real one that it made a run."""
    words = shlex.split(text)
    last_day = words[words.index("--to-date") + 1].partition("T")[0]
    return last_day if "--dry-run" in words else "Created backfill Dag run"


def _has_test(file: str, name: str) -> None:
    tree = ast.parse((CHECKOUT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def _comes_down_to(target: str, program: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(  # noqa: S603
        [*shlex.split(target), "--dry-run", "--always-make"],
        cwd=CHECKOUT,
        env=plain,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert program in done.stdout
    if program.endswith(".py"):
        assert (CHECKOUT / program).is_file()


def _collects(text: str) -> None:
    """Let pytest select, without running anything."""
    arguments = shlex.split(text)[1:]
    done = subprocess.run(  # noqa: S603
        [sys.executable, *arguments, "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"\d+(/\d+)? tests? collected", done.stdout)


def _could_be_installed(text: str) -> None:
    """Hold the wheel's name and its extras to what the project builds; building it needs the network."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wheel, _, extras = shlex.split(text)[-1].rstrip("]").partition("[")
    assert wheel == f"dist/{project['name'].replace('-', '_')}-{usage_billing.__version__}-py3-none-any.whl"
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()
    assert (CHECKOUT / shlex.split(text)[3]).is_file()


def _asks_the_sandbox(text: str, sandbox: Sandbox) -> None:
    words = shlex.split(text)
    url = words[-1].replace("http://127.0.0.1:8400", sandbox.url)
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    body = words[words.index("-d") + 1] if "-d" in words else None
    reply = requests.request(method, url, data=body, timeout=20)
    assert reply.status_code == 200, reply.text
    assert "/_sandbox/" in url
    assert reply.json()
    sandbox.reset()
    sandbox.clear_faults()


def _gives_settings(text: str, request: pytest.FixtureRequest) -> None:
    """Let the hooks (for the ledger: the installation) read a documented connection."""
    from airflow.models.connection import Connection  # noqa: PLC0415

    from usage_billing import hooks  # noqa: PLC0415
    from usage_billing.installation import ledger_url  # noqa: PLC0415

    name, _, value = shlex.split(text)[1].partition("=")
    request.getfixturevalue("monkeypatch").setenv(name, value)
    conn_id = name.removeprefix("AIRFLOW_CONN_").lower()
    conn_type = json.loads(value)["conn_type"]
    if conn_type in hooks.HOOKS:
        assert hooks.HOOKS[conn_type](conn_id).settings().site.startswith(conn_type)
    elif conn_id == "usage_ledger":
        assert str(ledger_url()).startswith(("postgresql+psycopg://", "sqlite:///"))
    else:
        assert Connection.from_json(value, conn_id=conn_id).get_hook().placeholder in {"?", "%s"}


def test_the_ledger_on_one_machine_is_reached_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection that the README shows in its prose leads to the file it names."""
    from usage_billing.installation import ledger_url  # noqa: PLC0415

    (documented,) = re.findall(r"`(\{.conn_type.:.sqlite.*?\})`", README.read_text())
    monkeypatch.setenv("AIRFLOW_CONN_USAGE_LEDGER", documented)
    assert ledger_url() == f"sqlite:///{json.loads(documented)['host']}"


@pytest.mark.acceptance
@pytest.mark.timeout(240)
def test_up_prints_address_and_login_and_ends_on_ctrl_c(tmp_path: Path) -> None:
    """`make up` gives a person a working address and login, a sandbox beside it, and a clean end."""
    theirs = ("AIRFLOW", "MAKE", "MFLAGS", "PYTEST", "PYTHONPATH")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    up = subprocess.Popen(  # noqa: S603
        ["make", "up", f"STATE={tmp_path}"],  # noqa: S607
        cwd=CHECKOUT,
        env=plain,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert up.stdout is not None
    said = []
    try:
        for line in up.stdout:
            said.append(line)
            if "Ctrl-C ends" in line:
                break
        told = "".join(said)
        login = re.search(r"Airflow +(\S+) +user (\S+) +password (\S+)", told)
        assert login is not None, told
        token = requests.post(
            f"{login[1]}/auth/token", json={"username": login[2], "password": login[3]}, timeout=20
        ).json()["access_token"]
        dags = requests.get(f"{login[1]}/api/v2/dags", headers={"Authorization": f"Bearer {token}"}, timeout=20).json()
        assert {"bill_api_calls", "bill_platform_events", "bill_voip_minutes"} <= {
            dag["dag_id"] for dag in dags["dags"]
        }
        sandbox = re.search(r"Sandbox +(http\S+)", told)
        assert sandbox is not None
        assert requests.get(sandbox[1], timeout=20).json()["sites"]
    finally:
        os.killpg(up.pid, signal.SIGINT)
        rest, _ = up.communicate(timeout=60)
    time.sleep(0.2)
    assert "Ended by SIGINT" in rest
    with pytest.raises(requests.ConnectionError):
        requests.get(login[1], timeout=5)


# --- blocks -----------------------------------------------------------------------------------------------------------

# Who checks a block of plain text: its first word, and the test.
TEXTS = {
    ("README.md", "source"): "test_the_demos_output_is_what_the_demo_prints",
    ("README.md", "warehouse"): "test_the_diagram_shows_the_tasks_in_their_order",
    ("README.md", "INFO"): "test_the_log_excerpt_is_what_a_run_logs",
    ("README.md", "billing"): "test_the_documented_faults_are_what_is_told",
    ("README.md", "dags/"): "test_the_list_of_files_is_whole",
}


@pytest.mark.parametrize("each", [each for document in DOCUMENTS for each in blocks(document)], ids=str)
def test_every_block_has_its_check(each: Block) -> None:
    """A block in a language that nobody checks would grow old unseen."""
    if each.language == "text":
        first = "source" if "difference" in each.text and "billed" in each.text else each.text.split()[0]
        _has_test("tests/test_docs.py", TEXTS[each.document.name, first])
    elif each.language in {"yaml", "sql"}:
        assert each.path or each.document == OPERATIONS
    else:
        assert each.language in {"sh", "python"}


def documented_connections() -> dict[str, str]:
    """Return the connections that the README exports, by variable."""
    return dict(re.findall(r"^export (AIRFLOW_CONN_\w+)='(.+)'$", README.read_text(encoding="utf-8"), re.MULTILINE))


PYTHON = [each for document in DOCUMENTS for each in blocks(document) if each.language == "python" and not each.path]


@pytest.mark.parametrize("each", PYTHON, ids=str)
def test_python_examples_run(each: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each example runs as it stands, and shows a thing that holds."""
    names: dict[str, Any] = {"__name__": "example"}
    for variable, connection in documented_connections().items():
        monkeypatch.setenv(variable, connection)
    exec(compile(each.text, str(each), "exec"), names)  # noqa: S102 - our own documents.
    if "Reading" in names:
        with pytest.raises(ValueError, match="read_at needs a time zone"):
            names["Reading"]("acct-0001", datetime(2026, 10, 5))  # noqa: DTZ001 - that is the point.
    elif "unauthorized" in names:
        assert names["unauthorized"].status == 401
    elif "dag" in names:
        assert [task.task_id for task in names["dag"].topological_sort()] == list(STAGES)
    elif "telco" in names:
        sites = [names[name].settings.site for name in ("acme", "orbit", "telco")]
        assert sites == ["maxio:us:acme", "maxio:eu:orbit", "chargeover:telco"]
    elif "error" in names:
        assert str(names["error"]).splitlines()[0] == "billing source 'calls': 2 faults"
    else:
        assert issubclass(names["AcmeUsageSettings"], DestinationSettings)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """The README's example, written where the README says; returns the checkout-like folder."""
    for each in blocks(README):
        if each.path:
            file = tmp_path / each.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(each.text)
    return tmp_path


def storage(example: Path) -> BillingSource:
    """Load the example's source."""
    return load_source(example / "include" / "sources" / "storage", destination_settings)


def test_the_example_source_loads(example: Path) -> None:
    """The documented files are one sound source of the package."""
    source = storage(example)
    assert (source.name, source.settings.meter.function, source.destination.name) == ("storage", "max", "maxio_metered")
    assert [rule["meta"]["reason"] for rule in source.expectations] == [
        "a reading is negative, or larger than any disk we have"
    ]


def test_the_documented_expectations_are_sound(example: Path) -> None:
    """The example of all kinds of rules is one that the package takes, and none of its rules is left out."""
    (documented,) = (each for each in blocks(EXPECTATIONS) if each.path)
    (example / documented.path).write_text(documented.text)
    source = storage(example)
    suite = Suite(source, 1)
    assert len(suite._rules) + 1 == len(source.expectations)
    assert list(suite.stopping().values()) == ["expectations.0 (expect_column_values_to_be_between on quantity)"]
    assert suite.reason("expect_account_to_be_known") == "nobody at the site pays for it"


def test_the_tables_of_rules_are_the_packages(example: Path) -> None:
    """Each of the package's rules is in a table, with the meters that have it, or its arguments and their defaults."""
    source = storage(example)
    documented = {quoted(name)[0]: meters for name, _, meters in table(EXPECTATIONS, "Rule of the package")}
    functions = {"sum", "count", "max", "last", "unique"}
    for function in functions:
        meter = source.settings.meter.model_copy(update={"function": function, "decimals": 0})
        having = replace(source, settings=source.settings.model_copy(update={"meter": meter}), expectations=())
        named = {
            name
            for name, meters in documented.items()
            if function in (functions - set(quoted(meters)) if meters.startswith("all") else set(quoted(meters)))
        }
        assert set(Suite(having, 0)._own) == named
    told: dict[str, dict[str, Any]] = {}
    for name, arguments, defaults, _ in table(EXPECTATIONS, "Rule about the reading"):
        same = told["expect_period_row_counts_to_be_usual"] if arguments == "the same" else None
        told.setdefault(quoted(name)[0], {}).update(same or _documented(arguments, defaults))
    from usage_billing import expectations  # noqa: PLC0415 - Great Expectations takes seconds.

    base = expectations.BatchExpectation.__fields__
    classes = [expectations.ExpectPeriodRowCountsToBeUsual, expectations.ExpectPeriodQuantitySumsToBeUsual]
    classes += [expectations.ExpectLatestTimeToBeRecent, expectations.ExpectQueryColumnsToBeUnchanged]
    assert told == {
        kind.expectation_type: {
            key: ... if field.required else field.get_default() or None
            for key, field in kind.__fields__.items()
            if key not in base
        }
        for kind in classes
    }


def test_the_example_dag_has_the_six_tasks(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Airflow would look into the documented file, and find the six stages in it."""
    from airflow.utils.file import might_contain_dag  # noqa: PLC0415

    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(example / "include" / "sources"))
    file = example / "dags" / "storage.py"
    assert might_contain_dag(str(file), safe_mode=True)
    dag = runpy.run_path(str(file))["bill_storage"]
    assert dag.dag_id == "bill_storage"
    assert tuple(task.task_id for task in dag.topological_sort()) == STAGES


@pytest.fixture
def installed(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An installation of its own: a fresh ledger, an empty warehouse, and the sandbox as it was at the start."""
    sandbox.reset()
    ledger, warehouse = tmp_path / "ledger.sqlite", tmp_path / "warehouse.duckdb"
    for name, value in connections(sandbox, ledger, warehouse).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__STAGING_PATH", f"file://{tmp_path}/staging")
    Ledger.create(f"sqlite:///{ledger}")
    return SimpleNamespace(sandbox=sandbox, ledger=ledger, warehouse=warehouse)


def run_stages(source: str) -> Iterator[str]:
    """Run the six operators of one source for a day of New York; yields the name of each when it has run."""
    from usage_billing import operators  # noqa: PLC0415

    reference = None
    for name in STAGES:
        operator = getattr(operators, f"{name.title()}Operator")(task_id=name, source=source)
        operator.reference = reference
        reference = operator.execute({"data_interval_start": DAY[0], "data_interval_end": DAY[1], "params": {}})
        yield name


def test_the_example_source_bills(example: Path, installed: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documented source bills each day's peak, quarantines by its own rule, and the documented SQL finds both."""
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(example / "include" / "sources"))
    with duckdb.connect(str(installed.warehouse)) as connection:
        connection.execute(
            "CREATE TABLE storage_readings AS SELECT 'r' || i AS reading_id,"
            " TIMESTAMPTZ '2026-10-05 05:00:00+00' + to_minutes(i) AS measured_at,"
            " CASE WHEN i % 2 = 0 THEN 'acct-0001' ELSE 'acct-0002' END AS account_ref,"
            " CASE WHEN i = 7 THEN -1.00 ELSE (10 + i / 4)::DECIMAL(10, 2) END AS gigabytes FROM range(40) AS t(i)"
        )
    assert tuple(run_stages("storage")) == STAGES
    billed = {
        row.reference: row.billed
        for row in installed.sandbox.billed("maxio:us:acme")
        if row.component == "storage-gb" and row.billed
    }
    assert billed == {"acct-0001": Decimal("19.50"), "acct-0002": Decimal("19.75")}
    by_state, open_items, by_token, extractions, measured, approvals, editions = _documented_sql(installed.ledger)
    assert by_state == [("storage", "accepted", 2)]
    assert (open_items, by_token, approvals) == ([], [], [])
    (row,) = extractions
    assert row[3:5] == (40, 1)
    assert "a reading is negative" in row[5]
    assert [row[2:5] for row in measured] == [(40, 1, "")]
    assert [row[0] for row in editions] == ["storage"]


def test_the_documented_arrivals_are_found(example: Path, tmp_path: Path) -> None:
    """The two keys and the query that the README names make the example go by arrival, and find a late reading."""
    folder = example / "include" / "sources" / "storage"
    (query,) = re.findall(r"`(SELECT measured_at, updated_at [^`]+)`", README.read_text())
    (folder / "arrivals.sql").write_text(query)
    file = folder / "source.yaml"
    by_arrival = file.read_text().replace("columns:\n", "incremental: arrival\ncolumns:\n  arrival: updated_at\n")
    file.write_text(by_arrival)
    source = storage(example)
    path = str(tmp_path / "readings.duckdb")
    with duckdb.connect(path) as connection:
        connection.execute(
            "CREATE TABLE storage_readings AS SELECT TIMESTAMPTZ '2026-10-05 12:00:00+00' AS measured_at,"
            " TIMESTAMPTZ '2026-10-09 08:00:00+00' AS updated_at"
        )
    hook = SimpleNamespace(conn_type="duckdb", placeholder="?", get_conn=lambda: duckdb.connect(path))
    mark = "2026-10-09T08:30:00+00:00"
    rows = open_query(hook, source.arrivals_sql, {"after": after(source, mark)}, 100)
    found = find(rows, source, mark, datetime(2026, 10, 9, 9, tzinfo=UTC))
    assert found == Arrived(
        (Period(datetime(2026, 10, 5, 4, tzinfo=UTC), datetime(2026, 10, 6, 4, tzinfo=UTC)),), 1, mark
    )


def test_the_documented_change_of_a_definition_is_one(example: Path) -> None:
    """The keys that operations shows make the example another definition, from the first of a month on."""
    before, file = storage(example), example / "include" / "sources" / "storage" / "source.yaml"
    change = yaml.safe_load(block(OPERATIONS, "period: month").text)
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | change))
    after = storage(example)
    assert after.definition() == before.definition() | {"period": "month"}
    assert after.since == datetime(2026, 11, 1, 4, tzinfo=UTC)


def _documented_sql(ledger: Path) -> list[list[tuple[Any, ...]]]:
    """Run every SELECT of the operations document on a ledger."""
    with closing(sqlite3.connect(ledger)) as connection:
        return [connection.execute(each.text).fetchall() for each in blocks(OPERATIONS) if each.language == "sql"]


def test_the_documented_faults_are_what_is_told(example: Path) -> None:
    """The README shows the very lines that two slips give."""
    documented = block(README, "billing source").text.strip()
    file = example / "include" / "sources" / "storage" / "source.yaml"
    slips = {"America/New_York": "America/NewYork", "  connection: maxio_acme": "  conection: maxio_acme"}
    text = file.read_text()
    for right, wrong in slips.items():
        assert right in text
        text = text.replace(right, wrong)
    file.write_text(text)
    with pytest.raises(Misconfigured) as error:
        storage(example)
    assert str(error.value).replace(f"{example}/", "") == documented


def test_the_example_destinations_settings_are_read(example: Path) -> None:
    """The documented settings class takes a source of its own, and tells a slip."""
    names: dict[str, Any] = {}
    exec(block(DESTINATIONS_DOCUMENT, "from typing").text, names)  # noqa: S102
    folder = example / "include" / "sources" / "storage"
    settings = yaml.safe_load((folder / "source.yaml").read_text())
    settings["destination"] = {"name": "acme_usage", "connection": "acme", "meter_code": "gb"}
    (folder / "source.yaml").write_text(yaml.safe_dump(settings))
    known = {"acme_usage": names["AcmeUsageSettings"]}
    assert load_source(folder, known.get).destination.model_dump()["meter_code"] == "gb"
    settings["destination"]["metre_code"] = settings["destination"].pop("meter_code")
    (folder / "source.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(Misconfigured, match="did you mean 'meter_code'"):
        load_source(folder, known.get)


# --- output -----------------------------------------------------------------------------------------------------------


def _without_seconds(text: str) -> str:
    return re.sub(r"\d+\.\d+ s\b", "N s", text)


def test_the_log_excerpt_is_what_a_run_logs(
    installed: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A day of the demo's own warehouse logs every documented line, in the documented order and at its level."""
    demo_module(monkeypatch, "warehouse").make_warehouse(installed.warehouse)
    caplog.set_level(logging.INFO)
    documented = [_without_seconds(line).split(maxsplit=1) for line in block(README, "INFO").text.splitlines()]
    for _ in run_stages("api_calls"):
        # Airflow sends logs to standard output, or through `logging`, as the process was set up.
        logged = (f"{record.levelname} {record.getMessage()}" for record in caplog.records)
        told = _without_seconds("\n".join([capsys.readouterr().out, *logged])).lower().splitlines()
        caplog.clear()
        while documented and any(all(words.lower() in line for words in documented[0]) for line in told):
            del documented[0]
    assert documented == []


def test_the_demos_output_is_what_the_demo_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The documented table is the one that the demo would print for these figures, and the warehouse owes them."""
    verdict, warehouse, demo = (demo_module(monkeypatch, name) for name in ("verdict", "warehouse", "demo"))
    (documented,) = (each.text for each in blocks(README) if "difference" in each.text and "billed" in each.text)
    lines = [line.strip() for line in documented.splitlines() if line.strip()]
    head = next(at for at, line in enumerate(lines) if line.startswith("source "))
    verdicts = [_verdict(verdict, line) for line in lines[head + 2 : head + 2 + len(verdict.SOURCES)]]
    printed = verdict.table(verdicts).splitlines()
    assert lines[head : head + len(printed)] == [line.strip() for line in printed]
    assert lines[-1] == demo._summary(verdicts, good=True)
    warehouse.make_warehouse(tmp_path / "warehouse.duckdb")
    for each in verdicts:
        owed = verdict.owed_by_account(tmp_path / "warehouse.duckdb", each.source, verdict.DEMO_DAYS)
        assert each.owed == each.billed == sum(owed.values())
        assert each.difference == 0


def _verdict(module: ModuleType, line: str) -> Any:
    source, *figures = line.split()
    read, quarantined, owed, billed, difference, writing = (Decimal(figure.replace(",", "")) for figure in figures)
    return module.Verdict(source, int(read), int(quarantined), owed, billed, difference, int(writing))


def test_the_diagram_shows_the_tasks_in_their_order() -> None:
    """The six stages stand in the diagram as they run, and so does the ledger's connection."""
    from usage_billing.installation import LEDGER_CONNECTION  # noqa: PLC0415

    text = block(README, "warehouse").text
    (line,) = (line for line in text.splitlines() if STAGES[0] in line)
    assert tuple(re.findall(r"[a-z]+", line)) == STAGES
    assert LEDGER_CONNECTION in text


# --- tables -----------------------------------------------------------------------------------------------------------


def _fields(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the default of every key of a model by its dotted name; `...` where it is required."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _fields(field.annotation, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = ... if field.is_required() else field.default
    return found


def _documented(keys: str, defaults: str) -> dict[str, Any]:
    """Return the keys of a table's row with their documented defaults."""
    named = quoted(keys)
    values = [yaml.safe_load(text) if "{" not in text else text for text in quoted(defaults)]
    if not values:
        values = [None if defaults == "none" else ...]
    if len(values) == 1:
        values *= len(named)
    return dict(zip(named, values, strict=True))


def test_the_table_of_keys_is_the_models() -> None:
    """Every key that a source.yaml may have is in the README with its default, and no other key is."""
    documented: dict[str, Any] = {}
    for keys, default, _ in table(README, "Key of `source.yaml`"):
        documented |= _documented(keys, default)
    known = _fields(SourceSettings) | _fields(DestinationSettings, "destination.")
    known |= {key: f"{value // timedelta(hours=1)}h" for key, value in known.items() if isinstance(value, timedelta)}
    assert documented == {key: None if value == () else value for key, value in known.items()}


def test_the_table_of_destination_keys_is_the_models() -> None:
    """Every destination's own keys are in the README with their defaults, and no other key is."""
    documented: dict[str, dict[str, Any]] = {}
    rows = [row for row in table(README, "Destination") if len(row) == 4]
    for destination, keys, default, _ in rows:
        documented.setdefault(quoted(destination)[0], {}).update(_documented(keys, default))
    shared = DestinationSettings.model_fields.keys()
    models = {name: destination_settings(name) for name in DESTINATIONS}
    assert documented == {
        name: {key: value for key, value in _fields(model).items() if key not in shared}
        for name, model in models.items()
        if model is not None
    }


def test_the_destinations_are_all_there() -> None:
    """The README's first table names every destination."""
    named = [quoted(row[0])[0] for row in table(README, "Destination") if len(row) == 2]
    assert named == list(DESTINATIONS)


def test_the_table_of_connections_is_the_hooks() -> None:
    """Every extra of both connection types is in the operations document, with the default that the settings take."""
    from usage_billing.hooks import HOOKS  # noqa: PLC0415

    bare = {
        "maxio": MaxioSettings(subdomain="acme", api_key="key"),
        "chargeover": ChargeOverSettings(instance="acme", public_key="public", private_key="private"),
    }
    documented: dict[str, set[str]] = {name: set() for name in bare}
    for kind, field, default, _ in table(OPERATIONS, "Type"):
        kinds = ["maxio", "chargeover"] if kind == "both" else quoted(kind)
        for position, name in enumerate(kinds):
            for key in quoted(field) if field.startswith("extra") else []:
                documented[name].add(key)
                if values := quoted(default):
                    assert str(getattr(bare[name], key)) == values[min(position, len(values) - 1)]
    assert documented == {name: set(HOOKS[name].extras) for name in bare}


def test_the_settings_of_the_config_section_are_there() -> None:
    """Every option of section [usage_billing] is in the README."""
    options = get_provider_info()["config"]["usage_billing"]["options"]
    assert options
    for name in options:
        assert f"`{name}`" in README.read_text()


def test_every_state_and_every_error_has_its_advice() -> None:
    """Whoever is on call finds each state of a delivery and each error in the operations document."""
    assert [quoted(row[0])[0] for row in table(OPERATIONS, "State")] == [*State]
    known = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, UsageBillingError) and value is not UsageBillingError
    }
    assert {quoted(row[0])[0] for row in table(OPERATIONS, "Error")} == known


def test_the_faults_of_the_sandbox_are_all_there() -> None:
    """Whoever wants trouble finds every kind of it in the operations document."""
    from usage_billing.sandbox.faults import KINDS  # noqa: PLC0415

    (sentence,) = re.findall(r"Faults are ([^.]+)\.", OPERATIONS.read_text())
    assert set(quoted(sentence)) == set(KINDS)


def test_the_contract_of_a_destination_is_whole() -> None:
    """The document lists every attribute and every method that a destination has to have, and no other."""
    attributes = set(Destination.__annotations__)
    assert {quoted(row[0])[0] for row in table(DESTINATIONS_DOCUMENT, "Attribute")} == attributes
    assert {quoted(row[0])[0] for row in table(DESTINATIONS_DOCUMENT, "Method")} == Destination.__abstractmethods__
    for name in DESTINATIONS:
        found = destination_class(name)
        assert found is not None
        assert all(hasattr(found, attribute) for attribute in attributes - {"client"})


# --- words, files, links ----------------------------------------------------------------------------------------------


def _resolved(name: str) -> object:
    """Return what a dotted name of the package stands for: a module's attribute, a class's, or a field."""
    parts = name.split(".")
    for split in range(len(parts) - 1, 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["usage_billing", *parts[:split]]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            declared = [getattr(found, kind, {}) for kind in ("model_fields", "__annotations__")]
            fields = declared[0] | declared[1]
            found = fields[part] if part in fields else getattr(found, part)
        return found
    raise AssertionError(f"{name} is no name of the package")


@functools.cache
def _package_words() -> str:
    texts = [file.read_text() for file in sorted(PACKAGE.rglob("*.py"))]
    return re.sub(r"[\s_]+", " ", " ".join(texts)).lower()


@pytest.mark.parametrize("row", table(GLOSSARY, "Word"), ids=lambda row: row[0])
def test_every_word_of_the_glossary_lives_in_the_code(row: list[str]) -> None:
    """A word names something that the package has, and the package uses the word."""
    words, meaning, names = row
    assert meaning
    for name in quoted(names):
        assert _resolved(name) is not None
    for word in words.split(", "):
        assert re.sub(r"[\s_]+", " ", word).lower() in _package_words()


def test_no_word_stands_twice_in_the_glossary() -> None:
    """One word has one meaning."""
    words = [row[0] for row in table(GLOSSARY, "Word")]
    assert len(words) == len(set(words))


def test_the_list_of_files_is_whole() -> None:
    """Each listed path exists, and the package has no module that the README does not list."""
    listed, parent = set(), ""
    for line in block(README, "dags/").text.splitlines():
        name = line.split()[0]
        parent = "" if not line.startswith(" ") else parent
        path = f"{parent}{name}"
        assert (CHECKOUT / path).exists(), path
        listed.add(path)
        parent = parent if line.startswith(" ") else name
    prefix = "plugins/usage_billing/"
    there = {f"{prefix}{file.name}" for file in PACKAGE.glob("*.py") if file.name != "__init__.py"}
    there |= {f"{prefix}{file.parent.name}/" for file in PACKAGE.glob("*/__init__.py")}
    assert {path for path in listed if path.startswith(prefix) and path != prefix} == there


def test_the_list_of_files_is_in_the_order_of_the_layers() -> None:
    """What stands lower in the README's list is imported by what stands higher, as the import contract says."""
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    height = {name: at for at, layer in enumerate(layers) for name in layer.split(" | ")}
    lines = block(README, "dags/").text.splitlines()
    listed = [line.split()[0].removesuffix(".py").removesuffix("/") for line in lines if line.startswith("  ")]
    heights = [height[name] for name in listed if name != "sandbox"]
    assert len(heights) == len(height)
    assert heights == sorted(heights)


def test_the_folders_of_tests_are_there() -> None:
    """CONTRIBUTING lists the folders of tests as they are."""
    listed = {quoted(row[0])[0] for row in table(CONTRIBUTING, "Folder")}
    there = {
        f"tests/{file.parent.relative_to(CHECKOUT / 'tests').parts[0]}"
        for file in CHECKOUT.glob("tests/*/**/test_*.py")
    }
    assert listed == there | {"tests/test_docs.py"}


def _anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_lead_somewhere(document: Path) -> None:
    """Each link inside the project leads to a file, and to a heading of it where it names one."""
    prose = _FENCE.sub("", document.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        assert file.is_file(), target
        assert not anchor or anchor in _anchors(file), target
    assert prose.startswith("# ")


def test_the_changelog_begins_with_this_version() -> None:
    """The newest entry is the version at hand, in sections that Keep a Changelog knows."""
    text = CHANGELOG.read_text()
    versions = re.findall(r"^## \[([^]]+)\]", text, re.MULTILINE)
    assert versions[0] == usage_billing.__version__
    sections = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert sections <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_promised_numbers_are_the_codes() -> None:
    """The seconds that the promise speaks of are the defaults of the settings."""
    text = README.read_text()
    maxio = MaxioSettings(subdomain="acme", api_key="key").settle_after_seconds
    chargeover = ChargeOverSettings(instance="acme", public_key="public", private_key="private").settle_after_seconds
    assert f"the default is {maxio} s" in text
    assert f"for ChargeOver we assume {chargeover // 60} minutes" in text
