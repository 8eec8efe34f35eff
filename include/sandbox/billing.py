"""Billing five days: backfills in real Airflow, watched until every run has ended."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from airflow_api import Run, Task
from programs import ProgramFailed, run
from stage import Stage, shown
from state import State
from verdict import DEMO_DAYS, SOURCES, DemoSource

TASKS_PER_RUN = 6
BACKFILL_ATTEMPTS = 5
TELL_EVERY_SECONDS = 2

Runs = dict[str, list[Run]]


def bill(stage: Stage) -> Runs:
    """Unpause the DAGs, backfill the demo's days, and wait for every run, also those that unpausing starts.

    Returns the ended runs by source. Raises `TookTooLong`, or `ProgramFailed` when no backfill can be made.
    """
    dag_ids = [source.dag_id for source in SOURCES]
    # While tasks run, `airflow backfill create` would fight with them over Airflow's SQLite file.
    stage.airflow.pause(dag_ids, paused=True)
    for source in SOURCES:
        _create_backfill(stage, source)
        _try_again(stage, source)
    stage.airflow.pause(dag_ids, paused=False)
    stage.clock.say(f"Backfills created: {DEMO_DAYS[0]} to {DEMO_DAYS[-1]} for each DAG, two runs at once")
    watch = Watch(stage)
    stage.wait_until("the runs to end", watch.ended)
    return watch.runs()


def _create_backfill(stage: Stage, source: DemoSource) -> None:
    # Both ends with their offset: a bare date means UTC, and New York's last midnight would fall outside.
    command = [
        *("airflow", "backfill", "create", "--dag-id", source.dag_id),
        *("--from-date", source.midnight(DEMO_DAYS[0]).isoformat()),
        *("--to-date", source.midnight(DEMO_DAYS[-1]).isoformat()),
        *("--reprocess-behavior", "completed", "--max-active-runs", "2"),
    ]
    name = f"backfill-{source.name}"
    for attempt in range(1, BACKFILL_ATTEMPTS + 1):
        stage.airflow.forget_open_backfills(source.dag_id)
        try:
            run(name, command, stage.environment, stage.state.log(name), stage.clock.left)
        except ProgramFailed as failure:
            # The scheduler writes the same file even when it is idle, and SQLite makes one of two writers lose.
            if attempt == BACKFILL_ATTEMPTS or "database is locked" not in str(failure):
                raise
        else:
            return


def _try_again(stage: Stage, source: DemoSource) -> None:
    """Clear what failed in an earlier demo and is no part of the backfill: it would fail this one, too."""
    for failed in stage.airflow.runs(source.dag_id):
        if failed.state == "failed":
            stage.airflow.clear(failed)


class Watch:
    """How far the runs are: told every two seconds while somebody asks, and each failed task as soon as it is seen."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._told_at = 0.0
        # What an interrupted demo left to be tried again is no news.
        self._told = {task for source in SOURCES for task in stage.airflow.tasks(source.dag_id) if task.went_wrong}

    def ended(self) -> bool:
        """Whether every expected run exists and has ended; tells the person now and then."""
        runs = self.runs()
        ended = all(_complete(source, runs[source.name]) for source in SOURCES)
        if ended or time.monotonic() - self._told_at >= TELL_EVERY_SECONDS:
            self._told_at = time.monotonic()
            self._tell(runs)
        return ended

    def runs(self) -> Runs:
        """All runs by source."""
        return {source.name: self._stage.airflow.runs(source.dag_id) for source in SOURCES}

    def _tell(self, runs: Runs) -> None:
        tasks = {source.name: self._stage.airflow.tasks(source.dag_id) for source in SOURCES}
        lines = [_progress(source, runs[source.name], tasks[source.name]) for source in SOURCES]
        self._stage.clock.say("   ".join(lines))
        wrong = {task for each in tasks.values() for task in each if task.went_wrong}
        for task in sorted(wrong - self._told, key=lambda task: (task.dag_id, task.run_id, task.task_id)):
            self._stage.clock.say(_failure(self._stage.state, task))
        self._told |= wrong


def _progress(source: DemoSource, runs: Sequence[Run], tasks: Sequence[Task]) -> str:
    total = max(len(tasks), TASKS_PER_RUN * len(runs))
    return f"{source.dag_id} {sum(task.ended for task in tasks)}/{total} tasks"


def _complete(source: DemoSource, runs: Sequence[Run]) -> bool:
    """Whether the demo's days and the run that unpausing starts are there, and nothing is under way."""
    days_there = {source.midnight(day) for day in DEMO_DAYS} <= {each.logical_date for each in runs}
    unpausing_there = any(each.run_type == "scheduled" for each in runs)
    return days_there and unpausing_there and all(each.ended for each in runs)


def tell_unpausing(stage: Stage, runs: Runs) -> None:
    """Say how the runs ended that unpausing started: one for the newest interval, in which there is no usage."""
    for source in SOURCES:
        tasks = stage.airflow.tasks(source.dag_id)
        for each in (each for each in runs[source.name] if each.run_type == "scheduled"):
            states = sorted({str(task.state) for task in tasks if task.run_id == each.run_id})
            day = each.logical_date.astimezone(source.zone_info).date()
            stage.clock.say(
                f"{source.dag_id}: the scheduled run of {day} ended {each.state}, tasks {', '.join(states)}"
            )


def _failure(state: State, task: Task) -> str:
    """What failed, where its log is, and how the log ends."""
    outlook = "failed" if task.state == "failed" else "failed and will be tried again"
    log = _log_of(state, task)
    return f"{task.dag_id}.{task.task_id} of {task.run_id} {outlook}; its log: {shown(log)}\n{_last_events(log)}"


def _log_of(state: State, task: Task) -> Path:
    folder = state.airflow / "logs" / f"dag_id={task.dag_id}" / f"run_id={task.run_id}" / f"task_id={task.task_id}"
    return folder / f"attempt={task.try_number}.log"


def _last_events(log: Path, count: int = 15) -> str:
    """The end of a task's log, which holds one JSON object per line, as a person reads it."""
    if not log.exists():
        return "    (no log)"
    events = [_event(line) for line in log.read_text(errors="replace").splitlines()]
    return "\n".join(f"    {event}" for event in [event for event in events if "group::" not in event][-count:])


def _event(line: str) -> str:
    try:
        entry = json.loads(line)
    except ValueError:
        return line
    errors = [f"{error['exc_type']}: {error['exc_value']}" for error in entry.get("error_detail", [])]
    return " ".join([entry.get("level", "").upper(), entry.get("event", ""), *errors])
