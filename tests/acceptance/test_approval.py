"""Real Airflow asks a person: one yes, one no, one question that nobody answers; the sandbox counts what was sent."""

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

CHECKOUT = Path(__file__).parents[2]
# The demo's own modules lie beside its programs, and are no package.
sys.path.insert(0, str(CHECKOUT / "include" / "sandbox"))

from airflow_api import Run  # noqa: E402
from crash_stage import CrashAirflow  # noqa: E402
from stage import Clock, Stage, choose_ports, set_stage  # noqa: E402
from state import State  # noqa: E402
from verdict import SOURCES, DemoSource, owed_by_account  # noqa: E402

from usage_billing.ledger import Ledger  # noqa: E402
from usage_billing.records import UNAPPROVED, Period  # noqa: E402

LIMIT_SECONDS = 480

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(LIMIT_SECONDS + 120)]

CALLS, EVENTS, VOIP = SOURCES
YES, NO = date(2026, 10, 5), date(2026, 10, 6)
# Long enough that a person in this test answers the calls in time is for ever; the minutes' question ends at once.
CHANGES = {CALLS.name: "approval: true\n", VOIP.name: "approval: true\napproval_timeout_hours: 0.001\n"}


class Desk(CrashAirflow):
    """Airflow's API, and what a person does at the page *Required Actions*."""

    def question(self, run: Run) -> dict[str, Any]:
        """Return what a run's approve task asks."""
        found: dict[str, Any] = self._get(self._hitl(run))
        return found

    def answer(self, run: Run, option: str, note: str) -> None:
        """Answer it."""
        self._ask("PATCH", self._hitl(run), json={"chosen_options": [option], "params_input": {"note": note}})

    @staticmethod
    def _hitl(run: Run) -> str:
        return f"/dags/{run.dag_id}/dagRuns/{quote(run.run_id, safe='')}/taskInstances/approve/-1/hitlDetails"


@dataclass(frozen=True)
class Played:
    """How it ended: the stage as it stands, each run's tasks, and what was asked."""

    stage: Stage
    ledger: Ledger
    states: dict[tuple[str, date], dict[str, str | None]]
    runs: dict[tuple[str, date], str]
    questions: dict[date, dict[str, Any]]


@pytest.fixture(name="played", scope="module")
def _played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    """Both days of calls are asked about, one is approved and one rejected; the minutes' question runs out."""
    state = State.inside(tmp_path_factory.mktemp("approval"))
    clock = Clock(time.monotonic(), LIMIT_SECONDS)
    with set_stage(state, clock, choose_ports(), _changes(state)) as stage:
        desk = Desk(stage.airflow.url, stage.airflow.user, stage.airflow.password, stage.airflow.session)
        # Ordered while the DAGs are paused: an order that fails is undone, and a scheduler that saw its runs would end.
        desk.backfill(CALLS.dag_id, CALLS.midnight(YES), CALLS.midnight(NO))
        desk.backfill(VOIP.dag_id, VOIP.midnight(YES), VOIP.midnight(YES))
        desk.pause([CALLS.dag_id, VOIP.dag_id], paused=False)
        wait = _waiter(stage)
        wait("both questions", lambda: all(_task(desk, CALLS, day, "approve") == "awaiting_input" for day in (YES, NO)))
        questions = {day: desk.question(_run(desk, CALLS, day)) for day in (YES, NO)}
        writing = stage.sandbox.writing_requests(CALLS)
        assert writing == 0
        desk.answer(_run(desk, CALLS, YES), "Approve", "as every month")
        desk.answer(_run(desk, CALLS, NO), "Reject", "too much")
        asked = [(CALLS, YES), (CALLS, NO), (VOIP, YES)]
        wait("all runs", lambda: all(_run(desk, *one).ended for one in asked))
        states = {(source.name, day): _tasks(desk, source, day) for source, day in asked}
        runs = {(source.name, day): _run(desk, source, day).state for source, day in asked}
        with closing(Ledger.connect(f"sqlite:///{state.ledger}")) as ledger:
            yield Played(stage, ledger, states, runs, questions)


def _changes(state: State) -> dict[str, str]:
    """Copy the sources, with what the story changes in them, and say where they are."""
    sources = state.demo / "sources"
    shutil.copytree(CHECKOUT / "include" / "sources", sources)
    for name, lines in CHANGES.items():
        with (sources / name / "source.yaml").open("a") as file:
            file.write(lines)
    return {"AIRFLOW__USAGE_BILLING__SOURCES_FOLDER": str(sources)}


def _waiter(stage: Stage) -> Callable[[str, Callable[[], bool]], None]:
    def wait(what: str, done: Callable[[], bool]) -> None:
        stage.wait_until(what, lambda: bool(time.sleep(1)) or done())  # A busy Airflow is not to be asked all the time.

    return wait


def _run(desk: Desk, source: DemoSource, day: date) -> Run:
    (found,) = (run for run in desk.runs(source.dag_id) if run.logical_date == source.midnight(day))
    return found


def _tasks(desk: Desk, source: DemoSource, day: date) -> dict[str, str | None]:
    run_id = _run(desk, source, day).run_id
    return {task.task_id: task.state for task in desk.tasks(source.dag_id) if task.run_id == run_id}


def _task(desk: Desk, source: DemoSource, day: date, task_id: str) -> str | None:
    runs = [run.run_id for run in desk.runs(source.dag_id) if run.logical_date == source.midnight(day)]
    return _tasks(desk, source, day).get(task_id) if runs else None


def _day(source: DemoSource, day: date) -> Period:
    return Period(source.midnight(day), source.midnight(date(day.year, day.month, day.day + 1)))


def _held(played: Played, source: DemoSource, day: date) -> list[str]:
    """Return why the deliveries of a day are held."""
    left = played.ledger.open_items(source.name, _day(source, day))
    assert set(left["state"]) <= {"held"}
    return list(left["reason"])


def test_the_approved_day_is_billed_and_no_other(played: Played) -> None:
    """By the sandbox's count, account by account, against the warehouse's own SQL."""
    assert played.stage.sandbox.billed(CALLS) == owed_by_account(played.stage.state.warehouse, CALLS.name, [YES])
    assert played.runs[CALLS.name, YES] == "success"
    assert set(played.states[CALLS.name, YES].values()) == {"success"}
    assert _held(played, CALLS, YES) == []


def test_the_question_said_what_was_then_billed(played: Played) -> None:
    """The sum in the text that the person read is the sum that the site counts."""
    billed = sum(played.stage.sandbox.billed(CALLS).values())
    assert f"{billed:,f} in all" in played.questions[YES]["body"]


def test_the_question_has_a_field_for_the_note_and_no_other(played: Played) -> None:
    """Airflow's page shows a field for each param of the question."""
    assert list(played.questions[YES]["params"]) == ["note"]


def test_the_rejected_day_ends_green_and_is_listed_with_who_said_no(played: Played) -> None:
    """Nobody is woken; each account's usage is held by name."""
    states = played.states[CALLS.name, NO]
    assert played.runs[CALLS.name, NO] == "success"
    assert [states[name] for name in ("plan", "approve", "deliver", "reconcile")] == ["success", *["skipped"] * 3]
    reasons = _held(played, CALLS, NO)
    assert len(reasons) == len(owed_by_account(played.stage.state.warehouse, CALLS.name, [NO]))
    assert all(reason.startswith(f"{UNAPPROVED}rejected by admin on ") for reason in reasons)
    assert all(reason.endswith(": too much") for reason in reasons)


def test_the_question_that_nobody_answers_ends_as_a_no(played: Played) -> None:
    """Airflow's own timeout, and nothing at the site."""
    states = played.states[VOIP.name, YES]
    assert played.runs[VOIP.name, YES] == "success"
    assert [states[name] for name in ("plan", "approve", "deliver", "reconcile")] == ["success", *["skipped"] * 3]
    assert played.stage.sandbox.billed(VOIP) == {}
    reasons = _held(played, VOIP, YES)
    assert reasons
    assert all(reason.startswith(f"{UNAPPROVED}no answer until ") for reason in reasons)
