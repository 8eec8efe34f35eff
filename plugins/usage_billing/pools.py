"""Airflow pools: what a site's pool is called, and a clear word about one that is missing or too small.

A task whose pool does not exist, or has fewer slots than the task takes, stays `scheduled` for ever, and only the
scheduler's log says why. The task itself cannot look: it has no database, and the execution API tells of no pools. So
the scheduler looks, each time when a run begins or was cleared, through a listener ("Listeners" in Airflow's
documentation); it knows also of a pool that somebody deleted since. This is the only file that touches Airflow's own
run and task records, and it imports nothing heavy: every Airflow process loads it.
"""

import logging
from collections.abc import Mapping
from typing import Any

from airflow.listeners import hookimpl

log = logging.getLogger(__name__)

_PREFIX = "usage_billing_"
_SPEAKER = "usage-billing: "
_MEND = "run `usage-billing pools`, then clear this run"
_NOTE_LENGTH = 1000
"""What Airflow stores of a note."""


def pool_name(connection: str) -> str:
    """Return the name of the pool of the site behind a connection; parse time, when none may be read, needs it too."""
    return f"{_PREFIX}{connection}"


def why_waiting(pool: str, slots: int, there: Mapping[str, int]) -> str:
    """Return why a task that takes `slots` of a pool would wait for ever, or an empty text.

    `there` gives the slots of the pools that exist; -1 stands for any number of them.
    """
    if pool not in there:
        return f"pool {pool} does not exist"
    if 0 <= there[pool] < slots:
        return f"pool {pool} has {there[pool]} slots, and {slots} are needed at once"
    return ""


def existing_pools(session: Any) -> dict[str, int]:
    """Return the slots of each of our pools in Airflow's database."""
    from airflow.models.pool import Pool  # noqa: PLC0415 - Not in a task, which has no database.
    from sqlalchemy import select  # noqa: PLC0415

    rows = session.execute(select(Pool.pool, Pool.slots).where(Pool.pool.startswith(_PREFIX, autoescape=True)))
    return {name: slots for name, slots in rows}  # noqa: C416 - A row is no pair to mypy.


class PoolWatch:
    """A listener in the scheduler: it ends a run whose tasks would wait for one of our pools for ever."""

    @hookimpl
    def on_dag_run_running(self, dag_run: Any) -> None:
        """Fail what would wait, with the reason as its note; skip what comes before, whose work would be in vain."""
        if not any(task.pool.startswith(_PREFIX) for task in dag_run.dag.tasks):
            return
        from sqlalchemy.orm import object_session  # noqa: PLC0415

        session = object_session(dag_run)
        pending = dag_run.get_task_instances(state=[None, "scheduled"], session=session)
        for record in (dag_run, *pending):
            _note(record, "")  # What was told of an earlier start is mended by now, or is told again.
        there = existing_pools(session)
        ours = [each for each in pending if each.pool.startswith(_PREFIX)]
        reasons = {each: reason for each in ours if (reason := why_waiting(each.pool, each.pool_slots, there))}
        if reasons:
            _end(dag_run, pending, reasons, session)


def _end(dag_run: Any, pending: list[Any], reasons: Mapping[Any, str], session: Any) -> None:
    from airflow.sdk import TaskInstanceState  # noqa: PLC0415

    before: set[str] = set()
    for waiting, reason in reasons.items():
        before |= dag_run.dag.get_task(waiting.task_id).get_flat_relative_ids(upstream=True)
        _note(waiting, f"{_SPEAKER}{reason}: {_MEND}")
        waiting.set_state(TaskInstanceState.FAILED, session=session)
    for each in pending:
        if each not in reasons and each.task_id in before:
            each.set_state(TaskInstanceState.SKIPPED, session=session)
    told = f"{_SPEAKER}{'; '.join(sorted(set(reasons.values())))}: {_MEND}. It sends nothing until then."
    _note(dag_run, told)
    log.error("%s %s was ended. %s", dag_run.dag_id, dag_run.run_id, told)


def _note(record: Any, text: str) -> None:
    """Put a note of ours on a run or a task instance, or take it off; a person's own note stays before it."""
    now = record.note or ""
    theirs = now.partition(_SPEAKER)[0].rstrip()
    wanted = "\n\n".join(part for part in (theirs, text) if part)[-_NOTE_LENGTH:]
    if wanted != now:
        record.note = wanted
