"""What the demo asks of Airflow over its REST API: health, DAGs, runs, tasks."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from urllib.parse import quote

import requests

TIMEOUT_SECONDS = 20
ATTEMPTS = 4
PAUSE_SECONDS = 2
ORDER_PAUSES = (2, 5, 10, 20, 30)
"""Seconds until an order that met an open backfill, or a lock, is tried again."""
_NOT_OPEN = frozenset({requests.codes.not_found, requests.codes.conflict})
_NOT_ORDERED = frozenset({requests.codes.conflict, requests.codes.service_unavailable})
ENDED = frozenset({"success", "failed"})


class NotSignedIn(Exception):
    """Airflow did not take the demo's password."""


@dataclass(frozen=True)
class Run:
    """One run of a DAG. `logical_date` is an aware datetime: the start of its data interval."""

    dag_id: str
    run_id: str
    run_type: str
    state: str
    logical_date: datetime

    @property
    def ended(self) -> bool:
        """Whether it will change no more by itself."""
        return self.state in ENDED


@dataclass(frozen=True)
class Task:
    """One task of one run; `state` is None until the scheduler has looked at it."""

    dag_id: str
    run_id: str
    task_id: str
    state: str | None
    try_number: int

    @property
    def ended(self) -> bool:
        """Whether it will change no more by itself."""
        return self.state in {"success", "failed", "skipped", "upstream_failed", "removed"}

    @property
    def went_wrong(self) -> bool:
        """Whether its last try failed, for good or not."""
        return self.state in {"failed", "up_for_retry"}


@dataclass(frozen=True)
class Page:
    """What is behind the button of a task: what somebody signed in gets, and what somebody signed out."""

    address: str
    status: int
    status_signed_out: int
    text: str = field(repr=False)


@dataclass(frozen=True)
class AirflowApi:
    """Airflow's API at `url` (without a slash at the end), as user `user`."""

    url: str
    user: str
    password: str = field(repr=False)
    session: requests.Session = field(default_factory=requests.Session, repr=False)

    def answers(self) -> bool:
        """Whether the API server takes requests yet."""
        try:
            return self.session.get(f"{self.url}/api/v2/version", timeout=TIMEOUT_SECONDS).ok
        except (requests.ConnectionError, requests.Timeout):
            return False

    def sign_in(self) -> None:
        """Get a token for all further calls; raise `NotSignedIn` if the password does not fit."""
        body = {"username": self.user, "password": self.password}
        reply = self.session.post(f"{self.url}/auth/token", json=body, timeout=TIMEOUT_SECONDS)
        if not reply.ok:
            raise NotSignedIn(f"Airflow at {self.url} does not take the password of {self.user}: {reply.status_code}")
        self.session.headers["Authorization"] = f"Bearer {reply.json()['access_token']}"

    def unwell(self) -> list[str]:
        """The components that run tasks and are not healthy (yet)."""
        health = self._get("/monitor/health")
        return [name for name in ("scheduler", "dag_processor") if health[name]["status"] != "healthy"]

    def parsed_since(self, moment: datetime) -> set[str]:
        """The DAGs whose file was parsed after `moment`: what an earlier Airflow had left behind does not count."""
        dags = self._get("/dags", limit=100)["dags"]
        return {dag["dag_id"] for dag in dags if dag["last_parsed_time"] and _moment(dag["last_parsed_time"]) > moment}

    def import_errors(self) -> dict[str, str]:
        """DAG file to traceback."""
        errors = self._get("/importErrors", limit=100)["import_errors"]
        return {error["filename"]: error["stack_trace"] for error in errors}

    def pause(self, dag_ids: Iterable[str], *, paused: bool) -> None:
        """Stop the scheduler from running these DAGs, or let it."""
        for dag_id in dag_ids:
            self._ask("PATCH", f"/dags/{dag_id}", json={"is_paused": paused})

    def forget_open_backfills(self, dag_id: str) -> None:
        """Close backfills of an earlier demo: Airflow takes one open backfill per DAG, and notices its end late."""
        for backfill in self._get("/backfills", dag_id=dag_id, limit=100)["backfills"]:
            if backfill["completed_at"] is None:
                try:
                    self._ask("PUT", f"/backfills/{backfill['id']}/cancel")
                except requests.HTTPError as refused:
                    # It ended meanwhile, or was an order that Airflow undid: it stands in nobody's way.
                    if refused.response.status_code not in _NOT_OPEN:
                        raise

    def backfill(
        self,
        dag_id: str,
        first: datetime,
        last: datetime,
        *,
        reprocess: str = "completed",
        backwards: bool = False,
        max_active_runs: int = 4,
    ) -> None:
        """Order a backfill as the form in Airflow's UI does: runs with a logical date from `first` to `last`, included.

        Airflow takes one open backfill per DAG and notices late that one has ended, and it undoes an order that met a
        lock of its database: after a 409 and a 503 the same is ordered again.
        """
        order = {
            "dag_id": dag_id,
            # With their offset: a bare date means UTC, and New York's last midnight would fall outside.
            "from_date": first.isoformat(),
            "to_date": last.isoformat(),
            "reprocess_behavior": reprocess,
            "run_backwards": backwards,
            "max_active_runs": max_active_runs,
        }
        for pause in (*ORDER_PAUSES, None):
            self.forget_open_backfills(dag_id)
            try:
                self._ask("POST", "/backfills", json=order)
            except requests.HTTPError as refused:
                if pause is None or refused.response.status_code not in _NOT_ORDERED:
                    raise
                time.sleep(pause)
            else:
                return

    def trigger(self, dag_id: str, **order: Any) -> str:
        """Order one run as the trigger form does; `order` is the request's body. Return its run id."""
        return str(
            self._ask("POST", f"/dags/{dag_id}/dagRuns", json={"logical_date": None, **order}).json()["dag_run_id"]
        )

    def state_of(self, dag_id: str, run_id: str) -> str:
        """The state of one run, with or without a logical date."""
        return str(self._get(f"/dags/{dag_id}/dagRuns/{quote(run_id, safe='')}")["state"])

    def clear(self, run: Run) -> None:
        """Run all its tasks again."""
        self._ask("POST", f"/dags/{run.dag_id}/dagRuns/{quote(run.run_id, safe='')}/clear", json={"dry_run": False})

    def runs(self, dag_id: str) -> list[Run]:
        """All runs that have a logical date, by that date."""
        runs = self._pages(f"/dags/{dag_id}/dagRuns", "dag_runs", order_by="logical_date")
        return [
            Run(dag_id, run["dag_run_id"], run["run_type"], run["state"], _moment(run["logical_date"]))
            for run in runs
            if run["logical_date"] is not None
        ]

    def tasks(self, dag_id: str) -> list[Task]:
        """The tasks of all runs, in no particular order."""
        return [
            _task(instance) for instance in self._pages(f"/dags/{dag_id}/dagRuns/~/taskInstances", "task_instances")
        ]

    def behind_button(self, task: Task, button: str) -> Page:
        """Follow the button of one task as a person does."""
        run_id = quote(task.run_id, safe="")
        links = self._get(f"/dags/{task.dag_id}/dagRuns/{run_id}/taskInstances/{task.task_id}/links")["extra_links"]
        address = f"{self.url}/{links[button]}"
        shown = self.session.get(address, timeout=TIMEOUT_SECONDS)
        signed_out = requests.get(address, timeout=TIMEOUT_SECONDS)
        return Page(address, shown.status_code, signed_out.status_code, shown.text)

    def _pages(self, path: str, key: str, **query: str) -> list[Any]:
        """All entries of a listing, which hands out a hundred at a time."""
        entries: list[Any] = []
        while True:
            page = self._get(path, **query, limit=100, offset=len(entries))
            entries += page[key]
            if len(entries) >= page["total_entries"] or not page[key]:
                return entries

    def _get(self, path: str, **query: str | int) -> Any:
        return self._ask("GET", path, params=query).json()

    def _ask(self, method: str, path: str, **parts: Any) -> requests.Response:
        """Send what may be sent twice, up to four times, with a pause after a 500.

        Airflow's API server writes each changing request into its own log, from its event loop. On SQLite that can
        wait for a lock whose holder waits for the loop; after five seconds one of them gets a 500, and all goes on.
        A machine with other things to do may also leave a request without any answer for a while.
        """
        for _ in range(ATTEMPTS - 1):
            try:
                reply = self._ask_once(method, path, **parts)
            except requests.Timeout:
                continue
            if reply.status_code < requests.codes.internal_server_error:
                break
            time.sleep(PAUSE_SECONDS)
        else:
            reply = self._ask_once(method, path, **parts)
        reply.raise_for_status()
        return reply

    def _ask_once(self, method: str, path: str, **parts: Any) -> requests.Response:
        return self.session.request(method, f"{self.url}/api/v2{path}", timeout=TIMEOUT_SECONDS, **parts)


def _task(instance: Mapping[str, Any]) -> Task:
    return Task(
        instance["dag_id"], instance["dag_run_id"], instance["task_id"], instance["state"], instance["try_number"]
    )


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)
