"""The sweep: doubts that nobody's run touches are settled, sent again where they have to be, and told when they age."""

import json
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG, BaseNotifier
from sqlalchemy import create_engine, select, update

from stories import CHECKOUT, HASTY, SITES, Event, House, a_day, a_house, shipped
from usage_billing.destinations.maxio import MaxioSite
from usage_billing.errors import InDoubt, Misconfigured, NotApplied
from usage_billing.hooks import MaxioHook
from usage_billing.ledger import Ledger, marker
from usage_billing.ledger.tables import delivery
from usage_billing.records import State
from usage_billing.sources import BillingSource
from usage_billing.sweep import ListDoubtsOperator, SweepOperator

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.

ACCOUNTS = {
    "api_calls": ("acct-0001", "acct-0002", "acct-0003"),
    "platform_events": ("orbit-01", "orbit-02", "orbit-03"),
    "voip_minutes": ("pkg-001", "pkg-002", "pkg-003"),
}
QUANTITIES = ("7", "10", "3")


class TaskInstance:
    """The XComs of one run, in memory."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], Any] = {}
        self.task_id = ""

    def xcom_push(self, key: str, value: Any) -> None:
        """Keep a value under the task that is running."""
        self.kept[self.task_id, key] = value

    def xcom_pull(self, task_ids: str, key: str) -> Any:
        """Return what a task has kept, or None."""
        return self.kept.get((task_ids, key))


class SweptHouse(House):
    """A house whose connections Airflow knows, so that operators work on it."""

    def leave_in_doubt(self, source: BillingSource, day: int = 5, arrived: int = 1) -> None:
        """Let a worker die right after its claim: `arrived` of its three deliveries reached the site, all are open."""
        interval = a_day(source, day)
        comparison, folder = self.totals(source, interval, usage(source, day))
        for part in self.staging.read(self.plan(source, comparison, folder).proposals):
            self.ledger.reserve(source.name, SITES[source.name], comparison.reading, part.to_pandas())
        ready = self.ledger.reserved(source.name, comparison.reading, 100)
        dead = self.ledger.acquire(f"deliver:{day}", "dead", timedelta(milliseconds=50))
        assert dead is not None
        self.ledger.begin_sending([each.token for each in ready], dead)
        if arrived:
            self.destination(source).send(ready[:arrived])
        self.ledger.release(dead)
        self.age(source, timedelta(minutes=1))

    def age(self, source: BillingSource, by: timedelta) -> None:
        """Make everything of a source that was sent have been sent so long ago."""
        engine = create_engine(self.ledger_url)
        with engine.begin() as connection:
            ours = delivery.c.source == source.name
            columns = (delivery.c.token, delivery.c.sent_at, delivery.c.reserved_at)
            for token, sent, reserved in connection.execute(select(*columns).where(ours)).all():
                older = {"sent_at": sent - by, "reserved_at": reserved - by}
                connection.execute(update(delivery).where(delivery.c.token == token).values(older))
        engine.dispose()


def usage(source: BillingSource, day: int) -> list[Event]:
    """Three accounts' usage of one day, an event each."""
    start = a_day(source, day).start + timedelta(hours=8)
    dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
    return [
        Event(f"{account}-{day}", account, quantity, start, dimensions)
        for account, quantity in zip(ACCOUNTS[source.name], QUANTITIES, strict=True)
    ]


def expected(source: BillingSource) -> dict[str, Decimal]:
    """What one day's usage comes to."""
    return dict(zip(ACCOUNTS[source.name], map(Decimal, QUANTITIES), strict=True))


def connections(house: House) -> dict[str, dict[str, Any]]:
    """Return the connections that lead to a house, by name."""

    def maxio(subdomain: str) -> dict[str, Any]:
        extra = {"subdomain": subdomain, "events_url": house.sandbox.events_url, "settle_after_seconds": 1}
        url = house.sandbox.maxio_url(subdomain)
        return {"conn_type": "maxio", "host": url, "password": f"sandbox-{subdomain}-key", "extra": extra}

    return {
        "USAGE_LEDGER": {"conn_type": "sqlite", "host": house.ledger_url.removeprefix("sqlite:///")},
        "MAXIO_ACME": maxio("acme"),
        "MAXIO_ORBIT": maxio("orbit"),
        "CHARGEOVER_TELCO": {
            "conn_type": "chargeover",
            "host": house.sandbox.chargeover_url("telco"),
            "login": "sandboxtelcopublickey00000000000",
            "password": "sandboxtelcoprivatekey0000000000",
            "extra": {"instance": "telco", "timezone": "America/Chicago", "settle_after_seconds": 1},
        },
    }


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SweptHouse]:
    """A sandbox, a ledger and staging, and the connections that lead to them."""
    from usage_billing import installation  # noqa: PLC0415

    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__STAGING_PATH", f"file://{tmp_path}/staging")
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__ARCHIVE_PATH", f"file://{tmp_path}/archive")
    with a_house(tmp_path, SweptHouse) as found:
        assert isinstance(found, SweptHouse)
        for name, connection in connections(found).items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
        yield found
        installation.ledger().close()
        installation._ledger.cache_clear()


def break_connection(house: House, monkeypatch: pytest.MonkeyPatch, name: str, **changes: Any) -> None:
    """Change a connection."""
    monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connections(house)[name] | changes))


def sweep(*sources: str) -> TaskInstance:
    """Run a sweep of these sources, or of all, as a task would."""
    ti = TaskInstance()
    SweepOperator(task_id="sweep", sources=sources or None).execute({"ti": ti})
    return ti


def listed(**arguments: Any) -> list[str]:
    """Return the lines of the table."""
    lines: list[str] = ListDoubtsOperator(task_id="list_doubts", **arguments).execute({})
    return lines


def test_one_sweep_ends_the_doubts_of_every_source_and_bills_each_unit_once(house: SweptHouse) -> None:
    """What arrived is found, what did not is sent again; a second sweep asks nobody anything."""
    for name in SITES:
        house.leave_in_doubt(shipped(name))
    sweep()
    for name in SITES:
        source = shipped(name)
        assert house.billed(source) == expected(source)
        assert house.states(source, a_day(source, 5)).keys() == {"accepted"}
    house.sandbox.reset_requests()
    sweep()
    for site in SITES.values():
        counts = house.sandbox.requests(site)
        assert (counts["reading"], counts["writing"]) == (0, 0)
    assert listed() == []


def test_a_sweep_bills_what_a_person_released(house: SweptHouse) -> None:
    """Nobody has to run its period again; another sweep asks nobody anything."""
    source = shipped("platform_events")
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    house.run(source, a_day(source, 30), usage(source, 30))
    sweep("platform_events")
    assert house.billed(source) == {}
    tokens = house.ledger.open_items(source.name, None)["token"].tolist()
    house.ledger.decide(tokens, State.HELD, "decided by somebody: bill it")
    sweep("platform_events")
    assert house.billed(source) == expected(source)
    house.sandbox.reset_requests()
    sweep("platform_events")
    counts = house.sandbox.requests(SITES[source.name])
    assert (counts["reading"], counts["writing"]) == (0, 0)


def test_a_released_customer_who_cannot_be_looked_up_keeps_no_other_waiting(
    house: SweptHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site answers for two of three: these are billed, the third stays held, and the task ends with its fault."""
    source = shipped("platform_events")
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    house.run(source, a_day(source, 30), usage(source, 30))
    tokens = house.ledger.open_items(source.name, None)["token"].tolist()
    house.ledger.decide(tokens, State.HELD, "decided by somebody: bill it")
    look = MaxioSite.subscription_by_reference

    def odd(site: MaxioSite, reference: str) -> dict[str, Any] | None:
        if reference == "orbit-02":
            raise NotApplied("HTTP 500: for this one")
        return look(site, reference)

    with monkeypatch.context() as trouble:
        trouble.setattr(MaxioSite, "subscription_by_reference", odd)
        with pytest.raises(NotApplied, match="for this one"):
            sweep("platform_events")
    assert house.billed(source) == {"orbit-01": Decimal(7), "orbit-03": Decimal(3)}
    assert house.ledger.open_items(source.name, None)["state"].tolist() == ["held"]
    sweep("platform_events")
    assert house.billed(source) == expected(source)


def test_a_doubt_of_any_period_is_swept_and_what_a_newer_reading_replaced_is_not_sent(house: SweptHouse) -> None:
    """Two days, months of runs ago or not; of the second a newer reading was compared, which has the say."""
    source = shipped("api_calls")
    house.leave_in_doubt(source, day=5, arrived=0)
    house.leave_in_doubt(source, day=6, arrived=0)
    newer, _ = house.totals(source, a_day(source, 6), usage(source, 6))
    house.ledger.begin_comparison(source.name, newer.reading, newer.periods)
    sweep("api_calls")
    assert house.billed(source) == expected(source)
    assert house.states(source, a_day(source, 6)).keys() == {"reserved"}


def test_the_doubts_of_a_renamed_source_are_swept_under_its_new_name(
    house: SweptHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has another name, the history its old one: nothing is orphaned, nothing billed twice."""
    source = shipped("api_calls")
    house.leave_in_doubt(source)
    folder = tmp_path / "sources" / "calls_per_day"
    shutil.copytree(CHECKOUT / "include" / "sources" / "api_calls", folder)
    text = (
        (folder / "source.yaml").read_text().replace("name: api_calls", "name: calls_per_day\nformerly: api_calls", 1)
    )
    (folder / "source.yaml").write_text(text)
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(folder.parent))
    (line,) = listed()
    assert line.startswith("api_calls at maxio:us:acme: 3 deliveries in doubt")
    sweep()
    assert house.billed(source) == expected(source)
    assert listed() == []
    assert house.ledger.sources() == ["api_calls"]


def test_a_broken_source_keeps_no_other_from_being_swept_and_all_faults_come_at_once(
    house: SweptHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong key and a site out of reach are told together, after the third source was swept."""
    for name in SITES:
        house.leave_in_doubt(shipped(name))
    break_connection(house, monkeypatch, "CHARGEOVER_TELCO", password="x" * 32)
    monkeypatch.delenv("AIRFLOW_CONN_MAXIO_ACME")
    with pytest.raises(Misconfigured) as told:
        sweep()
    assert "api_calls: connection 'maxio_acme' cannot be read" in str(told.value)
    assert "voip_minutes: chargeover:telco" in str(told.value)
    assert house.billed(shipped("platform_events")) == expected(shipped("platform_events"))
    lines = listed()
    assert {line.partition(" ")[0] for line in lines} == {"api_calls", "voip_minutes"}
    assert all("3 deliveries in doubt" in line for line in lines)


@pytest.mark.parametrize("fault", [OSError("the disk is gone"), ValueError("no such thing")])
def test_a_fault_that_nobody_foresaw_keeps_no_other_source_from_being_swept(
    house: SweptHouse, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    """A source's archive that cannot be read, or a bug: those behind it are swept, and its own traceback is told."""
    for name in SITES:
        house.leave_in_doubt(shipped(name))

    def settle(*_: Any) -> None:
        raise fault

    monkeypatch.setattr("usage_billing.destinations.maxio.MaxioMetered.settle", settle)
    break_connection(house, monkeypatch, "MAXIO_ORBIT", password="wrong-key-altogether")
    ti = TaskInstance()
    with pytest.raises(type(fault)) as told:
        SweepOperator(task_id="sweep").execute({"ti": ti})
    assert told.traceback[-1].name == "settle"
    assert any("platform_events was not swept" in note for note in told.value.__notes__)
    assert house.billed(shipped("voip_minutes")) == expected(shipped("voip_minutes"))
    assert any(words.startswith(f"api_calls: {type(fault).__name__}: ") for words in ti.kept["", "faults"])


def test_doubts_of_a_source_whose_folder_is_gone_are_listed_at_once(
    house: SweptHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its definition became a new source and the old folder went: nobody sweeps what it left, so the list is red."""
    house.leave_in_doubt(shipped("api_calls"))
    others = tmp_path / "sources"
    shutil.copytree(CHECKOUT / "include" / "sources" / "voip_minutes", others / "voip_minutes")
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(others))
    sweep()
    with pytest.raises(InDoubt, match=r"api_calls at maxio:us:acme: 3 deliveries in doubt, .* put it back"):
        listed()
    assert listed(sources=("voip_minutes",)) == []


def test_a_source_that_cannot_be_read_is_told_of_only_where_something_of_it_is_open(
    house: SweptHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own DAG says that its YAML is broken; the sweep says that its doubts cannot be asked about, and ages them."""
    for name in SITES:
        folder = tmp_path / "sources" / name
        folder.mkdir(parents=True)
        for file in (CHECKOUT / "include" / "sources" / name).iterdir():
            (folder / file.name).write_text(file.read_text())
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(tmp_path / "sources"))
    broken = tmp_path / "sources" / "api_calls" / "source.yaml"
    broken.write_text(broken.read_text().replace("period: day", "period: fortnight"))
    sweep()
    house.leave_in_doubt(shipped("api_calls"))
    with pytest.raises(Misconfigured, match=r"source\.yaml: period"):
        sweep()
    assert "api_calls at maxio:us:acme: 3 deliveries in doubt" in listed()[0]


def test_a_site_out_of_reach_leaves_its_doubts_listed(house: SweptHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could not be asked stays in doubt, is no fault of the source, and is asked again."""
    monkeypatch.setattr(MaxioHook, "transport", HASTY)
    source = shipped("api_calls")
    house.leave_in_doubt(source)
    break_connection(house, monkeypatch, "MAXIO_ACME", host="http://127.0.0.1:9")
    sweep("api_calls")
    (line,) = listed()
    assert "asked again at each sweep" in line
    break_connection(house, monkeypatch, "MAXIO_ACME")
    sweep("api_calls")
    assert house.billed(source) == expected(source)


def test_what_only_a_person_can_decide_is_told_apart_by_its_reason(house: SweptHouse) -> None:
    """Another quantity at the site, and events past their replay window, are asked about no more in the table."""
    metered, events = shipped("api_calls"), shipped("platform_events")
    house.leave_in_doubt(metered, arrived=0)
    (first, *_) = house.ledger.doubts("api_calls") or abandoned(house, metered)
    body = first.body.replace(f'"quantity":{first.quantity}', '"quantity":1')
    assert body != first.body
    house.destination(metered).client.create_usage(
        first.address["subscription_id"], first.address["component_id"], body
    )
    house.leave_in_doubt(events)
    house.age(events, timedelta(days=31))
    sweep()
    found = {line.partition(" ")[0]: line for line in listed(alert_after=timedelta(days=365))}
    assert "1 delivery in doubt" in found["api_calls"]
    assert "a person decides (stored with another quantity" in found["api_calls"]
    assert f"holds 1, not {first.quantity}" in found["api_calls"]
    assert "oldest 744 h" in found["platform_events"]
    assert "a person decides (sent more than 30 days ago" in found["platform_events"]


def abandoned(house: House, source: BillingSource) -> list[Any]:
    """Return what a dead worker left behind."""
    house.ledger.doubt_abandoned(source.name)
    return house.ledger.doubts(source.name)


def test_a_doubt_whose_question_fails_for_ever_is_a_persons_after_a_week(house: SweptHouse) -> None:
    """The account is closed: before, the ledger says from when on; after, what a person saw counts, and bills once."""
    source = shipped("api_calls")
    house.leave_in_doubt(source)
    house.sandbox.switch(SITES[source.name], access="account_canceled")
    with pytest.raises(Misconfigured):
        sweep("api_calls")
    arrived, *others = (doubt.token for doubt in sorted(abandoned(house, source), key=lambda one: one.token))
    house.age(source, timedelta(days=6))
    with pytest.raises(Misconfigured, match=r"still being asked; .* you may decide from \d{4}-\d\d-\d\d .* on"):
        house.ledger.decide(arrived, State.ACCEPTED, "decided on a day by somebody: on the invoice", Decimal(7))
    house.age(source, timedelta(days=1))
    assert "a person may decide" in listed(alert_after=timedelta(days=30))[0]
    counted = next(doubt.quantity for doubt in abandoned(house, source) if doubt.token == arrived)
    house.ledger.decide(arrived, State.ACCEPTED, "decided on a day by somebody: on the invoice", counted)
    house.ledger.decide(others, State.RESERVED, "decided on a day by somebody: not on the invoice")
    house.sandbox.switch(SITES[source.name], access="open")
    sweep("api_calls")
    assert house.billed(source) == expected(source)
    assert house.states(source, a_day(source, 5)) == {"accepted": 3}


def test_a_doubt_over_its_age_fails_with_its_name_and_a_younger_one_does_not(house: SweptHouse) -> None:
    """A day and an hour by the ledger's clock are too old, an hour is not; the message says which and why."""
    source = shipped("api_calls")
    house.leave_in_doubt(source)
    house.age(source, timedelta(hours=1))
    assert "oldest 1 h 01 min" in listed()[0]
    house.age(source, timedelta(hours=24))
    context: dict[str, Any] = {}
    with pytest.raises(InDoubt) as told:
        ListDoubtsOperator(task_id="list_doubts").execute(context)
    assert "3 deliveries in doubt for more than 24 h 00 min:" in str(told.value)
    for doubt in abandoned(house, source):
        assert f"(token {doubt.token})" in str(told.value)
    assert len(context["doubts"]) == 3
    assert context["doubts"][0]["site"] == "maxio:us:acme"
    assert {doubt["quantity"] for doubt in context["doubts"]} == set(QUANTITIES)
    assert "its worker ended" in context["doubts"][0]["why"]


def test_a_ledger_that_is_not_the_one_used_last_sends_nothing_again(house: SweptHouse, tmp_path: Path) -> None:
    """A sweep sends, so it looks for the mark of another ledger first, as a deliver does."""
    source = shipped("api_calls")
    house.leave_in_doubt(source, arrived=0)
    Ledger.create(f"sqlite:///{tmp_path}/another.sqlite")
    other = Ledger.connect(f"sqlite:///{tmp_path}/another.sqlite")
    marker.hand_over(other, house.staging, source.name, 7)
    other.close()
    with pytest.raises(Misconfigured, match="this staging area was used with ledger"):
        sweep("api_calls")
    assert house.billed(source) == {}


def test_several_sites_that_could_not_send_again_are_no_settings_to_mend(house: SweptHouse) -> None:
    """Where every fault would pass by itself, the error says that it may be tried again."""
    for name in ("api_calls", "voip_minutes"):
        house.leave_in_doubt(shipped(name), arrived=0)
    lock = {name: house.ledger.acquire(f"mark:{name}", "somebody", timedelta(minutes=10)) for name in SITES}
    assert all(lock.values())
    with pytest.raises(NotApplied, match="2 faults") as told:
        sweep_impatiently()
    assert "api_calls: somebody else holds the lease" in str(told.value)


def sweep_impatiently() -> None:
    """Sweep two sources without waiting two minutes for a mark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("usage_billing.ledger.marker._WAIT", timedelta(0))
        sweep("api_calls", "voip_minutes")


# --- the DAG ----------------------------------------------------------------------------------------------------------


def test_each_site_is_swept_in_its_pool_and_new_sources_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One task for each connection, one slot each; a source that cannot be read hides none."""
    from usage_billing.flow import sweep_dag  # noqa: PLC0415

    shipped_dag = sweep_dag()
    pools = {task.task_id: (task.pool, task.pool_slots) for task in shipped_dag.tasks}
    assert pools == {
        "sweep_chargeover_telco": ("usage_billing_chargeover_telco", 1),
        "sweep_maxio_acme": ("usage_billing_maxio_acme", 1),
        "sweep_maxio_orbit": ("usage_billing_maxio_orbit", 1),
        "list_doubts": ("default_pool", 1),
    }
    assert (shipped_dag.max_active_runs, shipped_dag.catchup) == (1, False)
    for name, change in (("api_calls", "unit: x"), ("calls_too", "period: day")):
        folder = tmp_path / name
        folder.mkdir()
        for file in (CHECKOUT / "include" / "sources" / "api_calls").iterdir():
            text = file.read_text().replace("name: api_calls", f"name: {name}").replace("period: day", change)
            (folder / file.name).write_text(text)
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(tmp_path))
    swept = {task.task_id: getattr(task, "sources", None) for task in sweep_dag().tasks}
    assert swept == {"sweep_maxio_acme": ["calls_too"], "sweep_unreadable": ["api_calls"], "list_doubts": None}


class Postcard(BaseNotifier):
    """A notifier such as any provider's: its text is a template."""

    template_fields = ("text",)

    def __init__(self, path: str, text: str) -> None:
        super().__init__()
        self.path = path
        self.text = text

    def notify(self, context: Any) -> None:
        """Write it down."""
        with Path(self.path).open("a") as file:
            file.write(json.dumps({"text": self.text, "doubts": context["doubts"]}) + "\n")


def run(dag: DAG, logical_date: datetime) -> dict[str, str]:
    """Run a DAG of this file in Airflow; return the state of each task, and under an empty name the run's."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager  # noqa: PLC0415
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db  # noqa: PLC0415
    from airflow.utils import db  # noqa: PLC0415

    db.initdb()
    bag = DagBag(collect_dags=False)
    dag.fileloc = __file__
    bag.bag_dag(dag)
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(bag, "dags-folder", None)
    done = dag.test(logical_date=logical_date)
    return {each.task_id: str(each.state) for each in done.get_task_instances()} | {"": str(done.state)}


def test_the_notifier_of_the_dag_is_called_once_with_the_list(
    house: SweptHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites cannot be swept and have old doubts: one message that names all of them; then a green run without."""
    from usage_billing.flow import sweep_dag  # noqa: PLC0415

    said = tmp_path / "said.jsonl"
    for name in ("api_calls", "voip_minutes"):
        house.leave_in_doubt(shipped(name))
        house.age(shipped(name), timedelta(days=2))
    break_connection(house, monkeypatch, "MAXIO_ACME", password="wrong-key-altogether")
    break_connection(house, monkeypatch, "CHARGEOVER_TELCO", password="x" * 32)
    dag = sweep_dag(notifier=Postcard(str(said), "{{ doubts | length }} too old: {{ exception }}"))
    states = run(dag, datetime(2026, 3, 1, tzinfo=UTC))
    assert states == {
        "sweep_maxio_acme": "failed",
        "sweep_chargeover_telco": "failed",
        "sweep_maxio_orbit": "success",
        "list_doubts": "failed",
        "": "failed",
    }
    (card,) = [json.loads(line) for line in said.read_text().splitlines()]
    assert card["text"].startswith("6 too old: 6 deliveries in doubt for more than 24 h")
    assert "api_calls: maxio:us:acme" in card["text"]
    assert "voip_minutes: chargeover:telco" in card["text"]
    assert {doubt["source"] for doubt in card["doubts"]} == {"api_calls", "voip_minutes"}
    for name in ("MAXIO_ACME", "CHARGEOVER_TELCO"):
        break_connection(house, monkeypatch, name)
    assert set(run(dag, datetime(2026, 3, 2, tzinfo=UTC)).values()) == {"success"}
    assert len(said.read_text().splitlines()) == 1
    assert house.billed(shipped("api_calls")) == expected(shipped("api_calls"))


def test_a_sweep_that_left_no_word_is_told_of_all_the_same(house: SweptHouse) -> None:  # noqa: ARG001 - Its ledger.
    """A task that was killed, or whose pool is missing, has said nothing; the listing says so."""
    from usage_billing.flow import sweep_dag  # noqa: PLC0415

    listing = sweep_dag().get_task("list_doubts")
    ti = TaskInstance()
    ti.kept = {(task_id, "faults"): [] for task_id in listing.upstream_task_ids - {"sweep_maxio_acme"}}
    with pytest.raises(InDoubt, match="sweep_maxio_acme ended before it could say why") as told:
        listing.execute({"ti": ti})
    assert "orbit" not in str(told.value)


def test_the_documented_dag_with_a_mail_is_one_that_airflow_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example of the operations guide stands as it is written: its listing mails, after six hours."""
    text = (CHECKOUT / "docs" / "operations.md").read_text()
    (example,) = re.findall(r"(?s)`dags/sweep_doubts\.py`.*?```python\n(.*?)```", text)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(example, "operations.md", "exec"), names)  # noqa: S102 - Our own document.
    listing = names["sweep_doubts"].get_task("list_doubts")
    assert listing.alert_after == timedelta(hours=6)
    sent: dict[str, Any] = {}
    (mail,) = listing.on_failure_callback
    monkeypatch.setattr(type(mail), "notify", lambda self, _: sent.update(subject=self.subject, body=self.html_content))
    mail({"doubts": [{"token": "t"}], "exception": InDoubt("1 delivery in doubt")})
    assert sent == {"subject": "1 deliveries in doubt", "body": "<pre>1 delivery in doubt</pre>"}
