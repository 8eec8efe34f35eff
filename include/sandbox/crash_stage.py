"""The stage on which deliveries are killed: the demo's own, with slow billing sites and tasks that soon run again.

Everything that differs from the demo is written into the state folder: a DAG for each shipped source with other
retries, the sources with shorter usage periods, so that a delivery has many requests to be killed in, and worlds that
take their time over each request.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import yaml
from airflow_api import AirflowApi, Run
from stage import WORLDS, Clock, Stage, choose_ports, set_stage
from state import CHECKOUT, Ports, State, environment
from verdict import SOURCES

RETRIES = 200

_DAG = '''"""Airflow DAG: bill {source}, with tasks that are tried again {retries} times, a second after they died."""

from datetime import timedelta

from usage_billing.flow import billing_dag

dag = billing_dag("{source}")
for task in dag.tasks:
    task.retries, task.retry_delay = {retries}, timedelta(seconds=1)
'''

# Hours instead of days make some 200 deliveries of a day; two request threads leave each site's pool room for a second
# delivery beside the first.
_SOURCE_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "api_calls": {"period": "hour"},
    "platform_events": {},
    "voip_minutes": {"period": "hour"},
}
_THREADS = 2

# In seconds. One request carries 1 delivery, up to 1,000 and up to 25: all three are to be under way for a while.
_HOLD_SECONDS = {"acme": 0.06, "orbit": 1.0, "telco": 0.4}

_AIRFLOW_CHANGES = {
    "core__parallelism": 8,
    # A task whose supervisor was killed is missed after seconds, not after five minutes.
    "scheduler__task_instance_heartbeat_timeout_detection_interval": 1,
    "scheduler__orphaned_tasks_check_interval": 5,
    # So is a scheduler, whose tasks the next one then takes over.
    "scheduler__scheduler_health_check_threshold": 12,
}


@dataclass(frozen=True)
class Pace:
    """How long things last: `settle_after_seconds` of each site, and after how many silent seconds a task is missed."""

    settle_after_seconds: int = 2
    missed_after_seconds: int = 8


class CrashAirflow(AirflowApi):
    """Airflow's API, with the orders that only the crash stories give."""

    def clear_failed(self, run: Run) -> None:
        """Run the failed tasks of a run again, and what waits for them."""
        order = {"dag_run_id": run.run_id, "only_failed": True, "dry_run": False}
        self._ask("POST", f"/dags/{run.dag_id}/clearTaskInstances", json=order)

    def clear_task(self, run: Run, task_id: str) -> None:
        """Clear one task as a person would, whatever it is doing."""
        order = {"dag_run_id": run.run_id, "task_ids": [task_id], "only_failed": False, "dry_run": False}
        self._ask("POST", f"/dags/{run.dag_id}/clearTaskInstances", json=order)


@dataclass(frozen=True)
class CrashStage:
    """The running programs, and Airflow's API with the orders of the crash stories."""

    stage: Stage
    airflow: CrashAirflow

    @property
    def session(self) -> int:
        """The session that `airflow standalone` and all that it started belong to."""
        return self.stage.programs[-1].process.pid


@contextmanager
def crash_stage(state: State, clock: Clock, pace: Pace) -> Iterator[CrashStage]:
    """Set the stage in `state`, as `stage.set_stage` does and with its errors; the DAGs are paused."""
    ports = choose_ports()
    places = _written(state)
    changes = _changes(state, ports, pace, places)
    with set_stage(state, clock, ports, changes, places["worlds"]) as stage:
        api = stage.airflow
        airflow = CrashAirflow(api.url, api.user, api.password, api.session)
        airflow.pause([source.dag_id for source in SOURCES], paused=True)
        yield CrashStage(stage, airflow)


def _written(state: State) -> dict[str, Path]:
    """Write DAGs, sources and worlds; return their folders."""
    places = {name: state.demo / name for name in ("dags", "sources", "worlds")}
    for folder in places.values():
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CHECKOUT / "include" / "sources", places["sources"])
    for folder in (places["dags"], places["worlds"]):
        folder.mkdir(parents=True)
    for source in SOURCES:
        dag = _DAG.format(source=source.name, retries=RETRIES)
        (places["dags"] / f"{source.name}.py").write_text(dag)
        _change_source(places["sources"] / source.name / "source.yaml", _SOURCE_CHANGES[source.name])
    for world in WORLDS.glob("*.yaml"):
        _change_world(world, places["worlds"] / world.name)
    return places


def _change_source(path: Path, changes: Mapping[str, Any]) -> None:
    settings = yaml.safe_load(path.read_text())
    settings["destination"]["threads"] = _THREADS
    path.write_text(yaml.safe_dump(settings | changes, sort_keys=False))


def _change_world(path: Path, copy: Path) -> None:
    # As text: the loader of worlds insists on numbers as they were written.
    before, after = "hold_seconds: 0}", f"hold_seconds: {_HOLD_SECONDS[path.stem]}}}"
    text = path.read_text()
    if before not in text:
        raise ValueError(f"{path} has no `{before}` that could be made slower")
    copy.write_text(text.replace(before, after))


def _changes(state: State, ports: Ports, pace: Pace, places: Mapping[str, Path]) -> dict[str, str]:
    """What differs from the demo's environment."""
    known = environment(state, ports)
    airflow = _AIRFLOW_CHANGES | {
        "core__dags_folder": places["dags"],
        "scheduler__task_instance_heartbeat_timeout": pace.missed_after_seconds,
        "usage_billing__sources_folder": places["sources"],
    }
    changes = {f"AIRFLOW__{name.upper()}": str(value) for name, value in airflow.items()}
    for name in ("AIRFLOW_CONN_MAXIO_ACME", "AIRFLOW_CONN_MAXIO_ORBIT", "AIRFLOW_CONN_CHARGEOVER_TELCO"):
        connection = json.loads(known[name])
        connection["extra"]["settle_after_seconds"] = pace.settle_after_seconds
        changes[name] = json.dumps(connection)
    return changes


def days_from(first: date, count: int) -> list[date]:
    """`count` days on end."""
    return [first + timedelta(days=number) for number in range(count)]
