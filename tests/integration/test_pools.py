"""A pool that is missing or too small, in Airflow's own scheduler: the run ends with the reason, instead of waiting."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from stories import CHECKOUT
from usage_billing.cli import main

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.

POOL = "usage_billing_maxio_acme"


class Airflow:
    """Airflow's database with the shipped DAGs, and its scheduler, which loops when it is asked to."""

    def __init__(self, session: Any) -> None:
        from airflow.jobs.job import Job  # noqa: PLC0415
        from airflow.jobs.scheduler_job_runner import SchedulerJobRunner  # noqa: PLC0415

        self.session = session
        self._scheduler = SchedulerJobRunner(Job())
        self._days = iter(range(1000))

    def pool(self, slots: int | None, name: str = POOL) -> None:
        """Give a pool, that of site acme unless told, so many slots, or delete it."""
        from airflow.models.pool import Pool  # noqa: PLC0415

        if slots is None:
            self.session.query(Pool).filter(Pool.pool == name).delete()
        else:
            Pool.create_or_update_pool(name, slots, "", include_deferred=False, session=self.session)
        self.session.commit()

    def start(self, dag_id: str = "bill_api_calls") -> int:
        """Queue a run as a person would, let the scheduler loop once, and return the run's number."""
        from airflow.models.serialized_dag import SerializedDagModel  # noqa: PLC0415
        from airflow.utils.state import DagRunState  # noqa: PLC0415
        from airflow.utils.types import DagRunTriggeredByType, DagRunType  # noqa: PLC0415

        dag = SerializedDagModel.get_dag(dag_id, session=self.session)
        day = datetime(2025, 1, 1, 5, tzinfo=UTC) + timedelta(days=next(self._days))
        run = dag.create_dagrun(
            run_id=f"manual__{day:%Y%m%d}",
            logical_date=day,
            data_interval=(day - timedelta(days=1), day),
            run_after=day,
            run_type=DagRunType.MANUAL,
            triggered_by=DagRunTriggeredByType.TEST,
            state=DagRunState.QUEUED,
            session=self.session,
        )
        self.session.commit()
        number: int = run.id
        self.loop()
        return number

    def run(self, number: int) -> Any:
        """Return a run as the database has it; the scheduler's loop lets go of every object."""
        from airflow.models.dagrun import DagRun  # noqa: PLC0415

        self.session.expire_all()
        return self.session.get(DagRun, number)

    def loop(self) -> None:
        """Let the scheduler start what is queued, and then see what became of it."""
        for _ in range(2):
            self._scheduler._do_scheduling(self.session)
            self.session.commit()

    def clear(self, number: int, *tasks: str) -> None:
        """Clear a run's tasks, all of them or some, as a person does."""
        from airflow.models.taskinstance import clear_task_instances  # noqa: PLC0415

        found = self.run(number).get_task_instances(session=self.session)
        clear_task_instances([each for each in found if not tasks or each.task_id in tasks], self.session)
        self.session.commit()
        self.loop()

    def states(self, number: int) -> dict[str, str]:
        """Return the state of each task of a run, and under an empty name the run's own."""
        run = self.run(number)
        found = {each.task_id: each.state for each in run.get_task_instances(session=self.session)}
        return {name: str(state) for name, state in {**found, "": run.state}.items()}

    def notes(self, number: int) -> dict[str, str]:
        """Return the notes of a run's tasks, and under an empty name the run's own."""
        run = self.run(number)
        found = {each.task_id: each.note for each in run.get_task_instances(session=self.session)}
        return {name: note for name, note in {**found, "": run.note}.items() if note}


@pytest.fixture(scope="module", name="airflow")
def _airflow() -> Iterator[Airflow]:
    """An Airflow whose scheduler has our listener, as the entry point gives it."""
    from airflow.dag_processing.bundles.manager import DagBundlesManager  # noqa: PLC0415
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db  # noqa: PLC0415
    from airflow.listeners.listener import get_listener_manager  # noqa: PLC0415
    from airflow.models.dag import DagModel  # noqa: PLC0415
    from airflow.utils import db  # noqa: PLC0415
    from airflow.utils.session import create_session  # noqa: PLC0415

    from usage_billing.plugin import UsageBillingPlugin  # noqa: PLC0415

    db.initdb()
    DagBundlesManager().sync_bundles_to_db()
    sync_bag_to_db(DagBag(dag_folder=CHECKOUT / "dags"), "dags-folder", None)
    get_listener_manager().add_listener(UsageBillingPlugin.listeners[0])
    with create_session() as session:
        # Only the runs of these tests: nothing of the schedule's own.
        session.query(DagModel).update({"is_paused": False, "next_dagrun_create_after": None})
        session.commit()
        yield Airflow(session)


def test_a_run_without_its_pool_ends_with_the_reason_and_the_mend(airflow: Airflow) -> None:
    """Each task that would wait is red and says why; nothing was read, nothing waits for ever."""
    airflow.pool(None)
    run = airflow.start()
    assert airflow.states(run) == {
        **dict.fromkeys(["extract", "aggregate"], "skipped"),
        **dict.fromkeys(["validate", "plan", "deliver", "reconcile", ""], "failed"),
    }
    notes = airflow.notes(run)
    assert notes.keys() == {"validate", "plan", "deliver", "reconcile", ""}
    for note in notes.values():
        assert f"pool {POOL} does not exist" in note
        assert "run `usage-billing pools`, then clear this run" in note


def test_a_pool_with_fewer_slots_than_a_task_takes_names_both_numbers(airflow: Airflow) -> None:
    """Only deliver, which takes four slots, would wait; a run that cannot deliver does not begin."""
    airflow.pool(2)
    run = airflow.start()
    states = airflow.states(run)
    assert (states["extract"], states["validate"], states["deliver"]) == ("skipped", "skipped", "failed")
    assert (states["reconcile"], states[""]) == ("upstream_failed", "failed")
    assert f"pool {POOL} has 2 slots, and 4 are needed at once" in airflow.notes(run)["deliver"]


def test_a_cleared_run_goes_on_once_the_pool_is_there_and_its_notes_are_gone(airflow: Airflow) -> None:
    """The mend works as the note says; until then clearing tells the same again; a person's own note stays."""
    airflow.pool(None)
    run = airflow.start()
    record = airflow.run(run)
    record.note = f"seen by Ada\n\n{record.note}"
    airflow.session.commit()
    airflow.clear(run)
    assert airflow.states(run)[""] == "failed"
    assert airflow.notes(run)[""].count("does not exist") == 1
    airflow.pool(4)
    airflow.clear(run)
    assert airflow.states(run)[""] == "running"
    assert airflow.states(run)["extract"] == "queued"
    assert airflow.notes(run) == {"": "seen by Ada"}


def test_a_pool_that_was_deleted_later_is_noticed_when_a_single_task_is_cleared(airflow: Airflow) -> None:
    """What is done stays done; the task that would wait is red again."""
    airflow.pool(4)
    run = airflow.start()
    for each in airflow.run(run).get_task_instances(session=airflow.session):
        each.state = "success"
    airflow.pool(None)
    airflow.loop()
    airflow.clear(run, "deliver")
    states = airflow.states(run)
    assert states.pop("deliver") == "failed"
    assert set(states.values()) == {"success"}
    assert "does not exist" in airflow.notes(run)["deliver"]


def test_a_pool_without_end_suits_every_task(airflow: Airflow) -> None:
    """Airflow writes -1 for any number of slots."""
    airflow.pool(-1)
    run = airflow.start()
    assert airflow.states(run)[""] == "running"
    assert airflow.notes(run) == {}


def test_a_sweep_without_one_pool_sweeps_the_other_sites_and_lists_what_is_left(airflow: Airflow) -> None:
    """The site whose pool is missing is red with the reason; no other task is kept from its work."""
    airflow.pool(None)
    for other in ("usage_billing_maxio_orbit", "usage_billing_chargeover_telco"):
        airflow.pool(4, other)
    run = airflow.start("sweep_doubts")
    states = airflow.states(run)
    assert states.pop("sweep_maxio_acme") == "failed"
    assert airflow.notes(run).keys() == {"sweep_maxio_acme", ""}
    assert states == {
        "sweep_maxio_orbit": "queued",
        "sweep_chargeover_telco": "queued",
        "list_doubts": "None",
        "": "running",
    }


def test_check_tells_of_the_pools_as_they_are(airflow: Airflow, capsys: pytest.CaptureFixture[str]) -> None:
    """A pool that is missing or too small is told with its mend, one that suits with its slots."""
    airflow.pool(2)
    airflow.pool(None, "usage_billing_maxio_orbit")
    airflow.pool(6, "usage_billing_chargeover_telco")
    assert main(["check"]) == 0
    said = capsys.readouterr().out
    assert "api_calls: sound" in said
    assert f"pool {POOL} has 2 slots, and 4 are needed at once: run `usage-billing pools`" in said
    assert "pool usage_billing_maxio_orbit does not exist: run `usage-billing pools`" in said
    assert "pool usage_billing_chargeover_telco: 6 slots" in said
