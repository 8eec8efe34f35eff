"""The shipped DAGs in Airflow itself: parsed by a DagBag, run by `dag.test` and by their operators."""

import csv
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest
from airflow.sdk import BaseNotifier
from airflow.sdk.exceptions import AirflowSkipException

from stories import CHECKOUT, HASTY, SITES, WORLDS
from usage_billing.cli import main
from usage_billing.errors import Misconfigured, NeedsDecision, NotApplied
from usage_billing.hooks import MaxioHook
from usage_billing.installation import ledger
from usage_billing.preview import ITEM_COLUMNS
from usage_billing.records import Period
from usage_billing.sandbox import Sandbox

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.

SOURCES = sorted(SITES)
DAY = (datetime(2026, 10, 5, 4, tzinfo=UTC), datetime(2026, 10, 6, 4, tzinfo=UTC))


@pytest.fixture(scope="module")
def airflow_database() -> None:
    """Airflow's own database, fresh, with the pools of all sites."""
    from airflow.utils import db  # noqa: PLC0415

    db.initdb()


@pytest.fixture
def bag(airflow_database: None) -> Any:  # noqa: ARG001
    """Every DAG of the project as Airflow parses it."""
    from airflow.dag_processing.dagbag import DagBag  # noqa: PLC0415

    return DagBag(dag_folder=CHECKOUT / "dags")


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A sandbox, a ledger, a warehouse with one day of calls, and the connections that lead to them."""
    from usage_billing.installation import ledger_url  # noqa: PLC0415
    from usage_billing.ledger import Ledger  # noqa: PLC0415

    warehouse = tmp_path / "usage.duckdb"
    with duckdb.connect(str(warehouse)) as connection:
        connection.execute(
            "CREATE TABLE api_calls AS SELECT * FROM (VALUES"
            " ('r1', TIMESTAMPTZ '2026-10-05 12:00:00+00', 'acct-0001', 3::DECIMAL(18, 3)),"
            " ('r2', TIMESTAMPTZ '2026-10-05 13:00:00+00', 'acct-0001', 4),"
            " ('r3', TIMESTAMPTZ '2026-10-06 03:59:59+00', 'acct-0002', 10),"
            " ('r4', TIMESTAMPTZ '2026-10-06 04:00:00+00', 'acct-0002', 99)"
            ") AS t(request_id, requested_at, account_ref, calls)"
        )
    with Sandbox(WORLDS) as sandbox:
        connections = {
            "WAREHOUSE": {"conn_type": "duckdb", "host": str(warehouse), "extra": {"read_only": True}},
            "USAGE_LEDGER": {"conn_type": "sqlite", "host": str(tmp_path / "ledger.sqlite")},
            "MAXIO_ACME": maxio(sandbox.maxio_url("acme"), sandbox.events_url),
        }
        for name, connection in connections.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
        # A staging area belongs to one ledger, and each test has its own.
        monkeypatch.setenv("AIRFLOW__USAGE_BILLING__STAGING_PATH", f"file://{tmp_path}/staging")
        Ledger.create(ledger_url())
        yield SimpleNamespace(
            sandbox=sandbox,
            warehouse=warehouse,
            connect=lambda **changes: _reconnect(monkeypatch, connections, changes),
        )
        _forget_the_ledger()


def _forget_the_ledger() -> None:
    """Close the ledger that a process keeps for its whole life; the next test has another one."""
    from usage_billing import installation as ours  # noqa: PLC0415

    ours.ledger().close()
    ours._ledger.cache_clear()


def maxio(url: str, events_url: str, key: str = "sandbox-acme-key") -> dict[str, Any]:
    """Return the connection of site acme."""
    extra = {"subdomain": "acme", "region": "us", "events_url": events_url, "settle_after_seconds": 1}
    return {"conn_type": "maxio", "host": url, "password": key, "extra": extra}


def _reconnect(monkeypatch: pytest.MonkeyPatch, connections: dict[str, Any], changes: dict[str, Any]) -> None:
    connection = {**connections["MAXIO_ACME"], **changes}
    monkeypatch.setenv("AIRFLOW_CONN_MAXIO_ACME", json.dumps(connection))


def run_tasks(
    until: str = "reconcile",
    interval: tuple[datetime, datetime] | tuple[None, None] = DAY,
    source: str = "api_calls",
    first: str = "Extract",
    **params: object,
) -> dict[str, Any]:
    """Run the operators of one source one after the other, as their tasks would; return the last reference."""
    from usage_billing import operators  # noqa: PLC0415

    reference = None
    for name in (first.lower(), "validate", "aggregate", "plan", "deliver", "reconcile"):
        operator = getattr(operators, f"{name.title()}Operator")(task_id=name, source=source)
        operator.reference = json.loads(json.dumps(reference))  # What an XCom does to it.
        reference = operator.execute(
            {"data_interval_start": interval[0], "data_interval_end": interval[1], "params": params}
        )
        if name == until:
            break
    return reference


def test_every_dag_imports_without_an_error(bag: Any) -> None:
    """The DagBag holds one DAG for each source, the sweep, the trial, and no error."""
    assert bag.import_errors == {}
    assert sorted(bag.dag_ids) == [*(f"bill_{source}" for source in SOURCES), "sweep_doubts", "verify_site"]


def test_a_trial_is_for_a_person_who_says_that_the_site_is_for_tests(
    bag: Any, installation: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """As the DAG comes it sends nothing; with a person's word one unit comes and goes, and the log tells each step."""
    from usage_billing.verify import VerifySiteOperator  # noqa: PLC0415

    dag, site = bag.dags["verify_site"], "maxio:us:acme"
    assert dag.params["is_test_site"] is False
    assert dag.params["source"] in SOURCES
    for said in ("False", False, "", None):
        task = VerifySiteOperator(task_id="v", source="api_calls", account="acct-0001", is_test_site=said)
        with pytest.raises(Misconfigured, match="nobody says that this site is for tests"):
            task.execute({})
    assert installation.sandbox.requests(site)["by_route"] == {}

    with caplog.at_level(logging.INFO, logger="usage_billing.verify"):
        run = dag.test(run_conf={"source": "api_calls", "account": "acct-0001", "is_test_site": True})
    assert str(run.state) == "success"
    assert "ok     take back   the site counts as much as before" in caplog.text
    assert [row for row in installation.sandbox.billed(site) if row.billed] == []
    assert installation.sandbox.requests(site)["writing"] == 2

    task = VerifySiteOperator(task_id="v", source="api_calls", account="nobody", is_test_site=True)
    with pytest.raises(Misconfigured, match=r"account: account 'nobody': subscription 'nobody' is unknown"):
        task.execute({})


@pytest.mark.parametrize("source", SOURCES)
def test_a_days_run_has_a_days_interval_in_the_billing_zone(bag: Any, source: str) -> None:
    """The trap of a zero-length interval: each DAG's daily interval is a whole day of its own zone."""
    from airflow.sdk import CronDataIntervalTimetable  # noqa: PLC0415

    dag = bag.dags[f"bill_{source}"]
    assert isinstance(dag.timetable, CronDataIntervalTimetable)
    assert (
        str(dag.timetable.timezone)
        == {
            "api_calls": "America/New_York",
            "platform_events": "UTC",
            "voip_minutes": "America/Chicago",
        }[source]
    )


@pytest.mark.parametrize("source", SOURCES)
def test_tasks_that_call_a_site_take_its_pool(bag: Any, source: str) -> None:
    """Whatever asks the site shares its pool; deliver takes a slot for each of its threads."""
    dag = bag.dags[f"bill_{source}"]
    pools = {task.task_id: (task.pool, task.pool_slots) for task in dag.tasks}
    connections = {"api_calls": "maxio_acme", "platform_events": "maxio_orbit", "voip_minutes": "chargeover_telco"}
    pool = f"usage_billing_{connections[source]}"
    assert [task for task, (name, _) in pools.items() if name == pool] == ["validate", "plan", "deliver", "reconcile"]
    assert pools["deliver"] == (pool, 4)


def test_parsing_a_dag_imports_no_great_expectations_and_is_quick() -> None:
    """What a DAG file imports is paid in every task: no Great Expectations, no DuckDB, no Alembic."""
    program = (
        "import sys, airflow.sdk, runpy\n"
        f"runpy.run_path({str(CHECKOUT / 'dags' / 'api_calls.py')!r})\n"
        "print(sorted({'great_expectations', 'duckdb', 'alembic', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)  # noqa: S603
    assert done.stdout.splitlines()[-1] == "[]"


def test_dag_test_bills_the_day_that_ended_by_its_date(bag: Any, installation: SimpleNamespace) -> None:
    """A manual run takes the last interval that ended by its logical date: the 5th, not the 6th."""
    for task in bag.dags["bill_api_calls"].tasks:
        task.retry_delay = timedelta(0)
    run = bag.dags["bill_api_calls"].test(logical_date=datetime(2026, 10, 6, 4, tzinfo=UTC))
    assert str(run.state) == "success"
    assert billed(installation) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}


def validation_page(run: Any) -> str:
    """Return the page behind the button on a run's validate task, as the API server would serve it."""
    from usage_billing.installation import staging  # noqa: PLC0415
    from usage_billing.links import TaskTry  # noqa: PLC0415

    (task,) = (instance for instance in run.get_task_instances() if instance.task_id == "validate")
    this = TaskTry(task.dag_id, task.run_id, task.task_id, task.map_index, task.try_number)
    link = task.xcom_pull(task_ids="validate", key="_link_ValidationResultLink", map_indexes=-1)
    assert link == this.address
    page = staging().kept(this.document)
    assert page is not None
    return page.decode()


def test_the_validate_task_has_a_button_to_its_validation_result(bag: Any, installation: SimpleNamespace) -> None:
    """A run that goes on, and one that validation stops: each says what became of every rule."""
    dag = bag.dags["bill_api_calls"]
    for task in dag.tasks:
        task.retry_delay = timedelta(0)
    page = validation_page(dag.test(logical_date=datetime(2026, 10, 6, 4, tzinfo=UTC)))
    assert "Succeeded" in page
    assert "try 1" in page
    change(installation, "UPDATE api_calls SET account_ref = 'acct-9999' WHERE request_id = 'r3'")
    run = dag.test(logical_date=datetime(2026, 10, 6, 4, tzinfo=UTC))
    assert str(run.state) == "failed"
    page = validation_page(run)
    assert "1 of 3 rows are quarantined, more than quarantine.max_share" in page
    assert "subscription &#x27;acct-9999&#x27; is unknown" in page


def test_a_page_that_cannot_be_written_stops_no_bill(
    installation: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The page is for people; the task says that it is missing, and has no button."""
    from usage_billing import data_docs, operators  # noqa: PLC0415

    def broken(*_: object) -> str:
        raise RuntimeError("no template")

    monkeypatch.setattr(data_docs.ValidationResult, "page", broken)
    reference = run_tasks("extract")
    validate = operators.ValidateOperator(task_id="validate", source="api_calls", reference=reference)
    this = SimpleNamespace(dag_id="d", run_id="r", task_id="validate", map_index=-1, try_number=1)
    assert validate.execute({"ti": this, "params": {}})
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == 0
    assert "the page with the validation result could not be written" in capsys.readouterr().out + caplog.text
    assert validate.operator_extra_links[0].get_link(validate, ti_key=this) == ""


def test_an_empty_interval_ends_green_and_skipped(bag: Any, installation: SimpleNamespace) -> None:
    """Where nothing was used nothing is billed, and nobody is woken."""
    run = bag.dags["bill_api_calls"].test(logical_date=datetime(2026, 11, 20, 5, tzinfo=UTC))
    assert str(run.state) == "success"
    assert {str(instance.state) for instance in run.get_task_instances()} == {"skipped"}
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == 0


def billed(installation: SimpleNamespace) -> dict[str, Decimal]:
    """Return what acme billed for calls, by reference."""
    rows = installation.sandbox.billed("maxio:us:acme")
    return {row.reference: row.billed for row in rows if row.component == "api-calls" and row.billed}


def test_operators_hand_over_plain_json_and_bill(installation: SimpleNamespace) -> None:
    """Each operator works alone on what the one before returned, after a trip through JSON."""
    reference = run_tasks()
    tables = {"events", "accepted", "quarantined", "measured", "targets", "moves", "totals", "proposals"}
    assert set(reference["tables"]) == tables
    assert billed(installation) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}
    run_tasks()
    assert billed(installation) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == 2


def test_the_preview_command_says_what_the_run_then_sends(
    installation: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It needs no run before it, leaves neither reading nor file, and lists each delivery on demand."""
    span = ["preview", "api_calls", "--from", "2026-10-05", "--to", "2026-10-06"]
    assert main([*span, "--items", str(tmp_path / "items.csv")]) == 0
    told = capsys.readouterr().out
    assert "would send 2 deliveries, 17 in all" in told
    items = list(csv.DictReader((tmp_path / "items.csv").read_text().splitlines()))
    assert sorted(item["quantity"] for item in items) == ["10", "7"]
    assert ledger().sources() == []
    assert not (tmp_path / "staging").exists()
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == 0
    run_tasks()
    accepted = ledger().accepted("api_calls", Period(*DAY))
    assert sorted(accepted["token"]) == sorted(item["token"] for item in items)
    assert main([*span, "--items", str(tmp_path / "items.csv")]) == 0
    assert (tmp_path / "items.csv").read_text().splitlines() == [",".join(ITEM_COLUMNS)]
    assert "would send 0 deliveries, 0 in all" in capsys.readouterr().out


def test_a_dry_run_tells_what_would_be_sent_and_ends_at_the_plan(
    installation: SimpleNamespace, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By the DAG's param: no delivery, no comparison that would make a plan stale, and nothing at the site."""
    caplog.set_level(logging.INFO)
    planned = run_tasks("plan")
    with pytest.raises(AirflowSkipException, match="a dry run ends here"):
        run_tasks(dry_run=True)
    assert "would send 2 deliveries, 17 in all" in capsys.readouterr().out + caplog.text
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == 0
    nowhere = (datetime(2026, 10, 20, 4, tzinfo=UTC), datetime(2026, 10, 21, 4, tzinfo=UTC))
    with pytest.raises(AirflowSkipException, match="a dry run ends here: no usage"):
        run_tasks(interval=nowhere, dry_run=True)
    assert ledger().compared_before("api_calls", nowhere[1]) == Period(*DAY)
    deliver_again(planned)
    assert billed(installation) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}


@pytest.mark.usefixtures("installation")
def test_only_a_run_that_may_send_takes_down_where_accounts_lead() -> None:
    """What a dry run or a preview saw is no history: what was used before it was billed nowhere."""
    whose = ["acct-0001", "acct-0002"]
    assert main(["preview", "api_calls", "--from", "2026-10-05", "--to", "2026-10-06"]) == 0
    run_tasks("aggregate", dry_run=True)
    assert all(ledger().placements("api_calls", edition, whose).empty for edition in (0, 1))
    reference = run_tasks("validate")
    assert ledger().placements("api_calls", 1, whose)["account"].tolist() == whose
    assert reference["tables"]["moves"]["rows"] == 0


def test_the_preview_command_tells_what_would_stop_the_run(
    installation: SimpleNamespace,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run that stops and asks sends its reader here, so what is unusual stands here too, and stops nothing."""
    folder = tmp_path / "sources" / "api_calls"
    folder.mkdir(parents=True)
    for file in (CHECKOUT / "include" / "sources" / "api_calls").iterdir():
        (folder / file.name).write_text(file.read_text())
    with (folder / "source.yaml").open("a") as file:
        file.write("first_run: {max_quantity: 16}\n")
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(folder.parent))
    with pytest.raises(NeedsDecision, match=r"first_run\.max_quantity = 16"):
        run_tasks("plan")
    capsys.readouterr()
    assert main(["preview", "api_calls", "--from", "2026-10-05", "--to", "2026-10-06"]) == 0
    assert "unusual, as one run: first_run.max_quantity = 16: " in capsys.readouterr().out


def test_the_preview_command_of_days_without_rows_says_so(
    installation: SimpleNamespace,  # noqa: ARG001
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing read, nothing sent; and a day that is not over yet is refused."""
    assert main(["preview", "api_calls", "--from", "2026-10-20", "--to", "2026-10-21"]) == 0
    assert "0 rows accepted" in capsys.readouterr().out
    assert main(["preview", "api_calls", "--from", "2096-10-20", "--to", "2096-10-21"]) == 1
    assert "no usage period" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"password": "wrong-key-altogether"}, ("maxio:us:acme", "401", "mend the connection")),
        ({"host": "http://127.0.0.1:9"}, ("maxio:us:acme", "cannot be reached", "nothing was sent")),
    ],
)
def test_a_site_that_cannot_be_used_gives_one_clear_error_and_nothing_is_sent(
    installation: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], words: tuple[str, ...]
) -> None:
    """A wrong key and an unreachable site stop before anything is sent, and the key is in no text."""
    monkeypatch.setattr(MaxioHook, "transport", HASTY)
    installation.connect(**change)
    with pytest.raises((Misconfigured, NotApplied)) as error:
        run_tasks()
    for word in words:
        assert word in str(error.value)
    assert change.get("password", "sandbox-acme-key") not in str(error.value)
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == 0


def test_an_unknown_component_gives_one_clear_error_and_nothing_is_sent(
    installation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A component that the site does not have is named, with the key of source.yaml that names it."""
    folder = tmp_path / "sources" / "api_calls"
    folder.mkdir(parents=True)
    for file in (CHECKOUT / "include" / "sources" / "api_calls").iterdir():
        (folder / file.name).write_text(file.read_text().replace("handle:api-calls", "handle:no-such"))
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(folder.parent))
    with pytest.raises(Misconfigured) as error:
        run_tasks()
    assert "no-such" in str(error.value)
    assert "destination.component" in str(error.value)
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == 0


def test_five_mistakes_give_five_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All faults of a source are told at once, each with its file, its key and a mend."""
    from usage_billing.installation import billing_source  # noqa: PLC0415

    folder = tmp_path / "api_calls"
    folder.mkdir()
    shipped = CHECKOUT / "include" / "sources" / "api_calls"
    text = (shipped / "source.yaml").read_text()
    for good, bad in (
        ("period: day", "period: fortnight"),
        ("timezone: America/New_York", "timezone: America/NewYork"),
        ("bill_from: 2026-10-01\n", ""),
        ("  connection: maxio_acme", "  conection: maxio_acme"),
    ):
        assert good in text
        text = text.replace(good, bad)
    (folder / "source.yaml").write_text(text)
    (folder / "usage.sql").write_text((shipped / "usage.sql").read_text().replace(":window_end", ":end"))
    (folder / "expectations.yaml").write_text((shipped / "expectations.yaml").read_text())
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(tmp_path))
    with pytest.raises(Misconfigured) as error:
        billing_source("api_calls")
    said = str(error.value)
    for word in (
        "source.yaml: period:",
        "did you mean 'America/New_York'",
        "source.yaml: bill_from: is required",
        "did you mean 'connection'",
        "usage.sql: does not use :window_end",
        "usage.sql: unknown bind :end",
    ):
        assert word in said


def test_a_run_without_an_interval_says_what_it_needs(installation: SimpleNamespace) -> None:  # noqa: ARG001
    """A trigger without a logical date gets our message, and the two params stand in for the interval."""
    from usage_billing.operators import ExtractOperator  # noqa: PLC0415

    operator = ExtractOperator(task_id="extract", source="api_calls")
    with pytest.raises(Misconfigured, match="period_start and period_end"):
        operator.execute({"params": {"period_start": None, "period_end": None}})
    params = {"period_start": DAY[0].isoformat(), "period_end": DAY[1].isoformat()}
    assert operator.execute({"params": params})["tables"]["events"]["rows"] == 3


def test_an_empty_reading_of_what_was_billed_stops_and_asks(installation: SimpleNamespace) -> None:
    """A warehouse that lost a billed day withdraws nothing by itself."""
    run_tasks()
    with duckdb.connect(str(installation.warehouse)) as connection:
        connection.execute("DELETE FROM api_calls")
    with pytest.raises(NeedsDecision, match=r"\(2 deliveries, 17 in all\), and nothing was withdrawn: .* max_withdraw"):
        run_tasks()
    assert billed(installation) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}


def test_an_empty_reading_is_withdrawn_once_a_person_says_so(
    installation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key that the message names: the day is planned, taken off whole, and ties out; a dry run shows it before."""
    run_tasks()
    change(installation, "DELETE FROM api_calls")
    own = tmp_path / "sources" / "api_calls"
    shutil.copytree(CHECKOUT / "include" / "sources" / "api_calls", own)
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(own.parent))
    with pytest.raises(AirflowSkipException, match="a dry run ends here: nothing was sent"):
        run_tasks(dry_run=True)
    assert "unusual: this run would withdraw 17 of 17" in capsys.readouterr().out
    with (own / "source.yaml").open("a") as file:
        file.write("max_withdraw_share: 1.0\n")
    run_tasks()
    assert billed(installation) == {}
    before = installation.sandbox.requests("maxio:us:acme")["writing"]
    run_tasks()
    assert installation.sandbox.requests("maxio:us:acme")["writing"] == before


def test_an_empty_reading_takes_back_what_was_only_reserved(installation: SimpleNamespace) -> None:
    """A day whose delivery failed and whose rows are gone since is not billed by the older deliver's next try."""
    planned = run_tasks("plan")
    installation.connect(password="wrong-key-altogether")
    with pytest.raises(Misconfigured):
        deliver_again(planned)
    installation.connect()
    with duckdb.connect(str(installation.warehouse)) as connection:
        connection.execute("DELETE FROM api_calls")
    run_tasks()
    with pytest.raises(AirflowSkipException, match="stale"):
        deliver_again(planned)
    assert billed(installation) == {}


def deliver_again(planned: dict[str, Any]) -> None:
    """Run the deliver of an earlier plan."""
    from usage_billing.operators import DeliverOperator  # noqa: PLC0415

    DeliverOperator(task_id="deliver", source="api_calls", reference=planned).execute({})


def test_a_connection_that_leads_to_another_site_now_stops_the_next_task(installation: SimpleNamespace) -> None:
    """What was planned for acme is never sent to another site under the same connection."""
    planned = run_tasks("plan")
    extra = {"subdomain": "orbit", "region": "us", "events_url": installation.sandbox.events_url}
    installation.connect(host=installation.sandbox.maxio_url("orbit"), password="sandbox-orbit-key", extra=extra)
    with pytest.raises(Misconfigured, match='site: was "maxio:us:acme", is now "maxio:us:orbit"'):
        deliver_again(planned)


def test_the_log_tells_the_story_to_whoever_is_on_call(
    installation: SimpleNamespace, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What was read, owed, sent and counted there can be read in the task logs, and so can a stop; no key can."""
    caplog.set_level(logging.INFO)
    run_tasks()
    told = capsys.readouterr().out + caplog.text
    for line in (
        "read 3 rows as extraction 1",
        "accepted 3 rows, quarantined 0",
        "3 rows make 2 usage totals",
        "owed 17, settled before 0",
        "to send: 2 new, 0 corrections",
        "delivered: 2 accepted",
        "closing table of api_calls",
    ):
        assert line in told
    with duckdb.connect(str(installation.warehouse)) as connection:
        connection.execute("UPDATE api_calls SET account_ref = 'acct-9999' WHERE request_id = 'r3'")
    with pytest.raises(NeedsDecision, match="max_share"):
        run_tasks()
    told += capsys.readouterr().out + caplog.text
    assert "quarantined 1 rows: subscription 'acct-9999' is unknown to maxio:us:acme (for example r3)" in told
    assert "sandbox-acme-key" not in told


@pytest.fixture
def lenient(installation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same installation, where half of the rows may be set aside, and all that was billed may be taken back."""
    folder = tmp_path / "sources" / "api_calls"
    shutil.copytree(CHECKOUT / "include" / "sources" / "api_calls", folder)
    text = (folder / "source.yaml").read_text().replace("max_share: 0.05", "max_share: 0.5")
    (folder / "source.yaml").write_text(f"{text}max_withdraw_share: 1\n")
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(folder.parent))
    return installation


@pytest.mark.parametrize("how", ["param", "operator"])
def test_a_replay_bills_what_was_mended_and_then_there_is_nothing_to_replay(
    lenient: SimpleNamespace, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """It needs no interval: it reads the usage periods again that have rows in quarantine, and the difference goes."""
    replay: dict[str, Any] = {"param": {"replay": True}, "operator": {"first": "Replay"}}[how]
    none = (None, None)
    caplog.set_level(logging.INFO)
    with pytest.raises(AirflowSkipException, match="there is nothing to replay"):
        run_tasks(interval=none, **replay)
    change(lenient, "UPDATE api_calls SET account_ref = 'acct-9999' WHERE request_id = 'r3'")
    run_tasks()
    told = capsys.readouterr().out + caplog.text
    assert "account 'acct-9999': 1 rows, together 10: subscription 'acct-9999' is unknown to maxio:us:acme" in told
    assert billed(lenient) == {"acct-0001": Decimal(7)}
    change(lenient, "UPDATE api_calls SET account_ref = 'acct-0002' WHERE request_id = 'r3'")

    run_tasks(interval=none, **replay)

    assert billed(lenient) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}
    before = lenient.sandbox.requests("maxio:us:acme")["writing"]
    with pytest.raises(AirflowSkipException, match="there is nothing to replay"):
        run_tasks(interval=none, **replay)
    assert lenient.sandbox.requests("maxio:us:acme")["writing"] == before


class Postcard(BaseNotifier):
    """A notifier such as any provider's: its text is a template."""

    template_fields = ("text",)

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.text = (
            "{{ ti.task_id }}: {{ exception }}{% for reason, rows in quarantined.items() %}\n{{ rows }} {{ reason }}"
            "{% endfor %}{% for one in refused %}\n{{ one.account }} {{ one.quantity }}{% endfor %}"
            "{% for one in differences %}\n{{ one }}{% endfor %}"
        )

    def notify(self, context: Any) -> None:  # noqa: ARG002
        """Write it down."""
        with self.path.open("a") as file:
            file.write(f"{self.text}\n--\n")


def test_whoever_is_to_act_is_told_once_and_why(
    airflow_database: None,  # noqa: ARG001
    installation: SimpleNamespace,
    tmp_path: Path,
) -> None:
    """Stopped by validation, refused by the site, different there: one message of the task that ended the run red."""
    from usage_billing.flow import billing_dag  # noqa: PLC0415

    cards = tmp_path / "cards.txt"

    def ends(state: str) -> str:
        cards.write_text("")
        # Parsed anew, as for each task: a notifier keeps what its template became.
        dag = billing_dag("api_calls", notifier=Postcard(cards))
        for task in dag.tasks:
            task.retry_delay = timedelta(0)
        assert str(bagged(dag).test(logical_date=datetime(2026, 10, 6, 4, tzinfo=UTC)).state) == state
        *told, rest = cards.read_text().split("\n--\n")
        assert rest == ""
        return "\n".join(told)

    change(installation, "UPDATE api_calls SET account_ref = 'acct-9999' WHERE request_id = 'r3'")
    told = ends("failed")
    assert told.startswith(
        "validate: api_calls: validation stops the run; nothing was sent\n  - 1 of 3 rows are quarant"
    )
    assert told.endswith("\n1 subscription 'acct-9999' is unknown to maxio:us:acme")
    change(installation, "UPDATE api_calls SET account_ref = 'acct-0002' WHERE request_id = 'r3'")
    installation.sandbox.fault("maxio:us:acme", "server_error", status=422)
    told = ends("failed")
    assert told.startswith("reconcile: 0 missing there, 0 different, 1 refused")
    assert told.endswith(("\nacct-0001 7", "\nacct-0002 10"))
    change(installation, "UPDATE api_calls SET calls = calls + 1 WHERE request_id IN ('r1', 'r3')")
    assert ends("success") == ""
    assert billed(installation) == {"acct-0001": Decimal(8), "acct-0002": Decimal(11)}


def bagged(dag: Any) -> Any:
    """Return a DAG of this file as Airflow runs it."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager  # noqa: PLC0415
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db  # noqa: PLC0415

    bag = DagBag(collect_dags=False)
    dag.fileloc = __file__
    bag.bag_dag(dag)
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(bag, "dags-folder", None)
    return dag


def test_a_replay_goes_no_further_than_its_own_interval(lenient: SimpleNamespace) -> None:
    """A run of an earlier day leaves what is in quarantine of later ones alone, and says so."""
    change(lenient, "UPDATE api_calls SET account_ref = 'acct-9999' WHERE request_id = 'r3'")
    run_tasks()
    with pytest.raises(AirflowSkipException, match="no usage period that waits for a replay has ended by"):
        run_tasks(interval=(DAY[0] - timedelta(days=1), DAY[0]), replay=True)


def test_a_person_lists_the_quarantine_and_writes_off_what_is_not_owed(
    lenient: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command names each row, its reasons and whom it concerns; what is written off is on no later list."""
    change(lenient, "UPDATE api_calls SET account_ref = 'acct-9999' WHERE request_id = 'r3'")
    run_tasks()
    capsys.readouterr()
    assert main(["quarantine", "list", "api_calls"]) == 0
    name, told, whom, count = capsys.readouterr().out.splitlines()
    row = "event r3 of account acct-9999 at 2026-10-06T03:59:59Z, quantity 10; usage period 2026-10-05T04:00Z to"
    assert told == f"  {row} 2026-10-06T04:00Z: subscription 'acct-9999' is unknown to maxio:us:acme"
    assert whom == "account 'acct-9999': 1 rows, together 10: subscription 'acct-9999' is unknown to maxio:us:acme"
    assert count == "1 rows of api_calls in quarantine"
    for filters in (
        ["--account", "acct-0001"],
        ["--event", "r1"],
        ["--reason", "no account"],
        ["--from", "2026-10-06"],
    ):
        days = ["--to", "2026-10-07"] if "--from" in filters else []
        assert main(["quarantine", "list", "api_calls", *filters, *days]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "0 rows of api_calls in quarantine"

    for which, fault in (([], "which rows?"), ([name, "--event", "r3"], "not both"), (["--event", "r1"], "like that")):
        assert main(["quarantine", "write-off", "api_calls", *which, "--because", "a test"]) == 1
        assert fault in capsys.readouterr().err
    assert main(["quarantine", "write-off", "api_calls", "--account", "acct-9999", "--because", "a test call"]) == 0
    assert f"{name}: written off" in capsys.readouterr().out
    run_tasks(interval=(None, None), replay=True)
    capsys.readouterr()
    assert main(["quarantine", "list", "api_calls"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 rows of api_calls in quarantine"
    assert billed(lenient) == {"acct-0001": Decimal(7)}


@pytest.fixture
def mapped(lenient: SimpleNamespace) -> SimpleNamespace:
    """The same installation, where the warehouse knows its customers by names of its own, and a table says whose."""
    folder = Path(os.environ["AIRFLOW__USAGE_BILLING__SOURCES_FOLDER"]) / "api_calls"
    (folder / "accounts.sql").write_text("SELECT number AS account, reference AS target FROM customers")
    change(lenient, "CREATE TABLE customers (number INTEGER, reference VARCHAR)")
    change(lenient, "INSERT INTO customers VALUES (1, 'acct-0001'), (2, 'acct-0002')")
    change(lenient, "UPDATE api_calls SET account_ref = right(account_ref, 1)")
    return lenient


def test_accounts_lead_where_a_table_of_the_users_says(
    mapped: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is not in it, or leads to two or none, is set aside by name; once that is mended a replay bills it."""
    change(mapped, "DELETE FROM customers WHERE number = 2")
    run_tasks()
    assert billed(mapped) == {"acct-0001": Decimal(7)}
    for mend, words in (
        ("INSERT INTO customers VALUES (2, 'acct-0002'), (2, 'acct-0003')", "has 2 targets in accounts.sql"),
        ("DELETE FROM customers WHERE number = 2", "is not in accounts.sql"),
        ("INSERT INTO customers VALUES (2, NULL)", "has no target in accounts.sql"),
        ("UPDATE customers SET reference = 'acct-9999' WHERE number = 2", "subscription 'acct-9999' is unknown to"),
    ):
        change(mapped, mend)
        run_tasks(interval=(None, None), replay=True)
        capsys.readouterr()
        assert main(["quarantine", "list", "api_calls"]) == 0
        assert words in capsys.readouterr().out
        assert billed(mapped) == {"acct-0001": Decimal(7)}
    change(mapped, "UPDATE customers SET reference = 'acct-0002' WHERE number = 2")
    run_tasks(interval=(None, None), replay=True)
    assert billed(mapped) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}


def test_a_changed_mapping_is_a_move_that_a_person_decides(mapped: SimpleNamespace) -> None:
    """What was billed stays where it is until they say so; then the credit goes first."""
    run_tasks()
    change(mapped, "UPDATE customers SET reference = 'acct-0003' WHERE number = 2")
    run_tasks()
    assert billed(mapped) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}
    assert main(["ledger", "move", "api_calls", "2", "--choose", "move", "--because", "sold"]) == 0
    run_tasks()
    assert billed(mapped) == {"acct-0001": Decimal(7), "acct-0003": Decimal(10)}
    before = mapped.sandbox.requests("maxio:us:acme")["writing"]
    run_tasks()
    assert mapped.sandbox.requests("maxio:us:acme")["writing"] == before


def test_a_mapping_of_another_shape_stops_the_run(mapped: SimpleNamespace) -> None:
    """It says which column is missing, or of what type."""
    path = Path(os.environ["AIRFLOW__USAGE_BILLING__SOURCES_FOLDER"]) / "api_calls" / "accounts.sql"
    path.write_text("SELECT number AS account, reference FROM customers")
    with pytest.raises(Misconfigured, match="target: the query returns no such column, or several; it returns account"):
        run_tasks()
    path.write_text("SELECT 1.5::DOUBLE AS account, reference AS target FROM customers")
    with pytest.raises(Misconfigured, match="account: double has no one spelling as text; cast it to text"):
        run_tasks()
    path.write_text("SELECT account, target FROM customers WHERE since < :window_start")
    with pytest.raises(Misconfigured, match=r"accounts\.sql: unknown bind :window_start"):
        run_tasks()
    assert billed(mapped) == {}


@pytest.fixture
def by_arrival(installation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same installation, where the calls go by arrival, and the rows so far arrived as numbers 1 to 4."""
    folder = tmp_path / "sources" / "api_calls"
    shutil.copytree(CHECKOUT / "include" / "sources" / "api_calls", folder)
    text = (folder / "source.yaml").read_text()
    columns = "incremental: arrival\narrival_overlap: 0\ncolumns:\n  arrival: arrived\n  deleted: gone\n"
    (folder / "source.yaml").write_text(text.replace("columns:\n", columns))
    (folder / "usage.sql").write_text((folder / "usage.sql").read_text().replace("calls\n", "calls, gone\n", 1))
    (folder / "arrivals.sql").write_text("SELECT requested_at, arrived FROM api_calls WHERE arrived > :after")
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(folder.parent))
    with duckdb.connect(str(installation.warehouse)) as warehouse:
        warehouse.execute("ALTER TABLE api_calls ADD COLUMN arrived BIGINT")
        warehouse.execute("ALTER TABLE api_calls ADD COLUMN gone BOOLEAN DEFAULT FALSE")
        warehouse.execute("UPDATE api_calls SET arrived = CAST(substr(request_id, 2) AS BIGINT)")
    return installation


def change(installation: SimpleNamespace, statement: str) -> None:
    """Change the warehouse."""
    with duckdb.connect(str(installation.warehouse)) as warehouse:
        warehouse.execute(statement)


def test_the_operators_take_up_what_arrived(by_arrival: SimpleNamespace) -> None:
    """A late row, an update and a tombstone of the 5th are billed by the run of the 9th; then nothing is left to do."""
    run_tasks()
    assert billed(by_arrival) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}
    change(
        by_arrival,
        "INSERT INTO api_calls VALUES ('late', TIMESTAMPTZ '2026-10-05 20:00:00+00', 'acct-0002', 100, 5, FALSE)",
    )
    change(by_arrival, "UPDATE api_calls SET calls = 5, arrived = 6 WHERE request_id = 'r1'")
    change(by_arrival, "UPDATE api_calls SET gone = TRUE, arrived = 7 WHERE request_id = 'r2'")
    ninth = (DAY[0] + timedelta(days=4), DAY[1] + timedelta(days=4))
    with pytest.raises(NeedsDecision, match="max_withdraw_share"):
        run_tasks(interval=ninth)
    allowed = Path(os.environ["AIRFLOW__USAGE_BILLING__SOURCES_FOLDER"]) / "api_calls" / "source.yaml"
    allowed.write_text(allowed.read_text() + "max_withdraw_share: 1\n")
    reference = run_tasks(interval=ninth)
    days = [(DAY[0] + timedelta(days=n), DAY[1] + timedelta(days=n)) for n in (0, 1, 4)]
    spans = [[days[0][0].isoformat(), days[1][1].isoformat()], [edge.isoformat() for edge in days[2]]]
    assert reference["spans"] == spans
    assert billed(by_arrival) == {"acct-0001": Decimal(5), "acct-0002": Decimal(209)}
    before = by_arrival.sandbox.requests("maxio:us:acme")["writing"]
    with pytest.raises(AirflowSkipException, match="nothing to bill"):
        run_tasks(interval=ninth)
    assert by_arrival.sandbox.requests("maxio:us:acme")["writing"] == before


def test_arrivals_of_a_day_that_is_not_over_skip_the_run_and_stay_listed(by_arrival: SimpleNamespace) -> None:
    """A run that ends inside a usage period takes up what arrived all the same, and the next one bills it."""
    from usage_billing import installation as ours  # noqa: PLC0415

    with pytest.raises(AirflowSkipException, match="4 rows of api_calls arrived"):
        run_tasks(interval=(DAY[0], DAY[0] + timedelta(hours=6)))
    assert (ours.ledger().watermark("api_calls"), len(ours.ledger().touched("api_calls"))) == ("4", 2)
    run_tasks(interval=(DAY[1] + timedelta(days=1), DAY[1] + timedelta(days=2)))
    assert billed(by_arrival) == {"acct-0001": Decimal(7), "acct-0002": Decimal(109)}
    assert ours.ledger().touched("api_calls") == ()


def test_a_rescan_needs_no_interval_and_finds_what_vanished(
    installation: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triggered with the param alone, it compares the last days before the ledger's present, for any source."""
    from usage_billing import installation as ours  # noqa: PLC0415

    run_tasks()
    change(installation, "DELETE FROM api_calls WHERE request_id = 'r4'")
    change(installation, "UPDATE api_calls SET calls = 9 WHERE request_id = 'r3'")
    monkeypatch.setattr(type(ours.ledger()), "now", lambda _ledger: datetime(2026, 10, 8, 12, tzinfo=UTC))
    reference = run_tasks("plan", interval=(None, None), rescan=True)
    assert reference["spans"] == [["2026-10-01T04:00:00+00:00", "2026-10-08T04:00:00+00:00"]]
    run_tasks(interval=(None, None), rescan=True)
    assert billed(installation) == {"acct-0001": Decimal(7), "acct-0002": Decimal(9)}


def a_later_day(after: int) -> tuple[datetime, datetime]:
    """Return the interval of a day so many days after the first one."""
    return (DAY[0] + timedelta(days=after), DAY[1] + timedelta(days=after))


def calls_of(installation: SimpleNamespace, after: int, count: int) -> None:
    """Put so many calls of one unit into the warehouse, for a day so many days after the first one."""
    change(
        installation,
        f"INSERT INTO api_calls SELECT 'd{after}-' || i, TIMESTAMPTZ '2026-10-05 12:00:00+00' + to_days({after}),"  # noqa: S608
        f" 'acct-0001', 1 FROM range({count}) AS t(i)",
    )


@pytest.fixture
def usual(installation: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The same installation, whose source expects of each day about what the three before it had; they were billed."""
    folder = tmp_path / "sources" / "api_calls"
    shutil.copytree(CHECKOUT / "include" / "sources" / "api_calls", folder)
    installation.rules = folder / "expectations.yaml"
    share = "periods: 5, at_least: 3, min_share: 0.6, max_share: 2"
    with installation.rules.open("a") as file:
        file.write(f"  - type: expect_period_row_counts_to_be_usual\n    kwargs: {{{share}}}\n")
        file.write(f"  - type: expect_period_quantity_sums_to_be_usual\n    kwargs: {{{share}}}\n")
        file.write("  - type: expect_query_columns_to_be_unchanged\n")
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(folder.parent))
    change(installation, "DELETE FROM api_calls")
    for after in range(3):
        calls_of(installation, after, 10)
        run_tasks(interval=a_later_day(after))
    assert billed(installation) == {"acct-0001": Decimal(30)}
    return installation


def test_half_the_usual_rows_stop_the_run_and_the_whole_day_goes_through(usual: SimpleNamespace) -> None:
    """Nothing is sent, by the sandbox's count; the half day is not what is usual from then on; mended, it is billed."""
    before = usual.sandbox.requests("maxio:us:acme")["writing"]
    calls_of(usual, 3, 5)
    for _ in range(3):
        with pytest.raises(NeedsDecision, match="has 5 rows, and the usual of the last 3 usage periods is 10"):
            run_tasks(interval=a_later_day(3))
    with pytest.raises(NeedsDecision, match="has 5 rows"):
        run_tasks(interval=a_later_day(3), dry_run=True)
    assert usual.sandbox.requests("maxio:us:acme")["writing"] == before
    measured = ledger().measured_before("api_calls", a_later_day(9)[1], 9)
    assert [each.rows for each in measured] == [10, 10, 10]
    change(usual, "DELETE FROM api_calls WHERE request_id LIKE 'd3-%'")
    calls_of(usual, 3, 12)
    run_tasks(interval=a_later_day(3))
    assert billed(usual) == {"acct-0001": Decimal(42)}
    assert ledger().measured_before("api_calls", a_later_day(9)[1], 1)[0].quantity == Decimal(12)


def test_a_day_without_rows_stops_where_there_usually_are_some(usual: SimpleNamespace) -> None:
    """It is no day without usage to skip in silence; loosened for this run, it is."""
    with pytest.raises(NeedsDecision, match="has 0 rows, and the usual") as error:
        run_tasks("extract", interval=a_later_day(3))
    assert "has 0 in all, and the usual" in str(error.value)
    usual.rules.write_text(usual.rules.read_text().replace("min_share: 0.6, ", ""))
    with pytest.raises(AirflowSkipException, match="nothing to bill"):
        run_tasks("extract", interval=a_later_day(3))


def test_sums_that_are_unusual_stop_the_run_once_the_rows_are_judged(usual: SimpleNamespace) -> None:
    """As many rows as ever, of which each says a hundred times as much."""
    calls_of(usual, 3, 10)
    change(usual, "UPDATE api_calls SET calls = 100 WHERE request_id LIKE 'd3-%'")
    before = usual.sandbox.requests("maxio:us:acme")["writing"]
    with pytest.raises(
        NeedsDecision, match="has 1000 in all, and the usual of the last 3 usage periods is 10"
    ) as error:
        run_tasks(interval=a_later_day(3))
    assert "validation stops the run; nothing was sent" in str(error.value)
    assert usual.sandbox.requests("maxio:us:acme")["writing"] == before


def test_neither_a_look_nor_a_run_that_ends_before_it_delivers_becomes_the_usual(usual: SimpleNamespace) -> None:
    """A dry run, a preview and a run whose plan was stopped leave nothing that later runs are judged by."""
    calls_of(usual, 3, 12)
    fourth = a_later_day(3)
    with pytest.raises(AirflowSkipException, match="a dry run ends here"):
        run_tasks(interval=fourth, dry_run=True)
    assert main(["preview", "api_calls", "--from", "2026-10-08", "--to", "2026-10-09"]) == 0
    run_tasks("plan", interval=fourth)
    assert len(ledger().measured_before("api_calls", fourth[1], 9)) == 3
    run_tasks(interval=fourth)
    assert [each.rows for each in ledger().measured_before("api_calls", fourth[1], 9)] == [12, 10, 10, 10]


def test_another_type_in_the_warehouse_stops_the_run_until_it_is_accepted(usual: SimpleNamespace) -> None:
    """The query's own column turns from a whole number into text: told by name, accepted in the suite, then usual."""
    calls_of(usual, 3, 10)
    change(usual, "ALTER TABLE api_calls ALTER calls TYPE VARCHAR")
    with pytest.raises(NeedsDecision, match=r"column calls was decimal128\(18, 3\), and is string"):
        run_tasks(interval=a_later_day(3))
    text = usual.rules.read_text()
    usual.rules.write_text(f"{text}    kwargs: {{accepted: {{calls: string}}}}\n")
    run_tasks(interval=a_later_day(3))
    usual.rules.write_text(text)
    calls_of(usual, 4, 10)
    run_tasks(interval=a_later_day(4))
    assert billed(usual) == {"acct-0001": Decimal(50)}


OPERATORS = CHECKOUT / "docs" / "operators.md"


def test_the_documented_dag_of_ones_own_bills_its_span(
    airflow_database: None,  # noqa: ARG001
    installation: SimpleNamespace,
) -> None:
    """As it stands in the document: the span of its params, once, also when it is run again."""
    (example,) = re.findall(r"(?s)```python\n(.*?)```", OPERATORS.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "after_the_load"}
    exec(compile(example, str(OPERATORS), "exec"), names)  # noqa: S102 - our own document.
    dag = bagged(names["dag"])
    span = {"period_start": DAY[0].isoformat(), "period_end": DAY[1].isoformat()}
    for _ in range(2):
        run = dag.test(run_conf=span)
        assert str(run.state) == "success"
        assert billed(installation) == {"acct-0001": Decimal(7), "acct-0002": Decimal(10)}


def test_the_table_of_operators_is_the_packages() -> None:
    """Each operator has a row, with arguments that it takes."""
    told = dict(
        re.findall(r"^\| `(\w+\.\w+Operator)` \|.*\| (.*) \|$", OPERATORS.read_text(encoding="utf-8"), re.MULTILINE)
    )
    package = CHECKOUT / "plugins" / "usage_billing"
    made = {
        f"{path.stem}.{name}"
        for path in package.glob("*.py")
        for name in re.findall(r"^class (\w+Operator)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert told.keys() == made - {"operators.StageOperator"}
    for name, takes in told.items():
        module, _, kind = name.partition(".")
        parameters = inspect.signature(getattr(import_module(f"usage_billing.{module}"), kind)).parameters
        parents = set(inspect.signature(import_module("usage_billing.operators").StageOperator).parameters)
        arguments = set(re.findall(r"`(\w+)`", takes.partition("params ")[0].partition("param ")[0]))
        assert arguments
        assert arguments <= set(parameters) | parents, name
