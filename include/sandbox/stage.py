"""The stage on which the demo plays: sandbox and Airflow, started in order, found ready, and surely ended."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from airflow_api import AirflowApi
from programs import Program, ProgramFailed, free_ports, is_free, running, wait_for
from state import CHECKOUT, USER, Ports, State, environment
from verdict import SOURCES, Sandbox
from warehouse import FIRST_DAY, ROWS, make_warehouse

# Leaves time to end everything inside five minutes.
LIMIT_SECONDS = 275

WORLDS = CHECKOUT / "include" / "sandbox" / "worlds"


class TookTooLong(Exception):
    """The demo's time is over; the message says what it was waiting for."""


@dataclass(frozen=True)
class Clock:
    """Seconds since the demo began, and how many are left."""

    began: float
    limit_seconds: float = LIMIT_SECONDS

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds until the limit, never less than none."""
        return max(0.0, self.limit_seconds - self.elapsed)

    def say(self, text: str) -> None:
        """Tell the person what happens, and when."""
        print(f"{self.elapsed:6.1f} s  {text}", flush=True)

    def wait_until(
        self, what: str, done: Callable[[], bool], needed: Sequence[Program], pause_seconds: float = 0.3
    ) -> None:
        """Ask `done` until it is true; raise `TookTooLong`, or `ProgramFailed` when a needed program ends."""
        while not done():
            for program in needed:
                program.must_run()
            if not self.left:
                raise TookTooLong(f"{self.limit_seconds:.0f} s are over, still waiting for {what}")
            time.sleep(pause_seconds)


@dataclass(frozen=True)
class Stage:
    """All that stands while the demo plays: the running programs, and how to reach them."""

    state: State
    clock: Clock
    ports: Ports
    environment: Mapping[str, str]
    sandbox: Sandbox
    airflow: AirflowApi
    programs: Sequence[Program]

    def wait_until(self, what: str, done: Callable[[], bool], pause_seconds: float = 0.3) -> None:
        """Wait while both programs run, see `Clock.wait_until`; what came too late is told with who was missing."""
        try:
            self.clock.wait_until(what, done, self.programs, pause_seconds)
        except TookTooLong as late:
            # `airflow standalone` outlives its scheduler.
            unwell = self.airflow.unwell() if self.airflow.answers() else []
            raise TookTooLong(f"{late}; not healthy: {', '.join(unwell)}" if unwell else str(late)) from None


@contextmanager
def set_stage(
    state: State,
    clock: Clock,
    ports: Ports,
    changes: Mapping[str, str] | None = None,
    worlds: Path = WORLDS,
    first_day: date = FIRST_DAY,
) -> Iterator[Stage]:
    """Make warehouse and ledger, start sandbox and Airflow, wait until the DAGs stand; end the programs on the way out.

    `changes` go into the environment that the programs share, and win; the warehouse has rows from `first_day` on.
    Raises `StateInUse`, `ProgramFailed` or `TookTooLong`.
    """
    with ExitStack() as stack:
        stack.enter_context(state.held())
        made = make_warehouse(state.warehouse, ROWS, first_day)
        clock.say(f"Sample warehouse {'made' if made else 'stands already'}: {shown(state.warehouse)}")
        known = environment(state, ports) | dict(changes or {})
        password = state.password()
        command = _sandbox_command(state, ports, worlds)
        sandbox = stack.enter_context(running("sandbox", command, known, state.log("sandbox")))
        _set_up(state, known, clock)
        started_at = datetime.now(UTC)
        airflow = stack.enter_context(running("airflow", ["airflow", "standalone"], known, state.log("airflow")))
        # Registered last, so it comes first: ending Airflow takes some seconds.
        stack.callback(clock.say, "Ending Airflow and the sandbox")
        api = AirflowApi(ports.api_url, USER, password)
        stage = Stage(state, clock, ports, known, Sandbox(ports.sandbox_url), api, [sandbox, airflow])
        _wait_for_sandbox(stage)
        _wait_for_airflow(stage, started_at)
        yield stage


def choose_ports(ui_port: int | None = None) -> Ports:
    """Free ports for all; Airflow takes `ui_port` if nobody else has it."""
    sandbox, api, worker_logs, trigger_logs = free_ports(4)
    return Ports(sandbox, ui_port if ui_port and is_free(ui_port) else api, worker_logs, trigger_logs)


def _sandbox_command(state: State, ports: Ports, worlds: Path) -> list[str]:
    places = ["--worlds", str(worlds), "--books", str(state.books), "--port-file", str(state.demo / "sandbox.port")]
    return ["usage-billing", "sandbox", "--port", str(ports.sandbox), *places]


def _set_up(state: State, known: Mapping[str, str], clock: Clock) -> None:
    """Airflow's database first; then ledger and pools side by side, since each takes seconds to import Airflow."""
    with running("airflow db migrate", ["airflow", "db", "migrate"], known, state.log("migrate")) as migration:
        wait_for([migration], clock.left)
    clock.say("Airflow's database is current")
    with (
        running("usage-billing ledger init", ["usage-billing", "ledger", "init"], known, state.log("ledger")) as ledger,
        running("usage-billing pools", ["usage-billing", "pools"], known, state.log("pools")) as pools,
    ):
        wait_for([ledger, pools], clock.left)
    clock.say("Ledger and pools stand")


def _wait_for_sandbox(stage: Stage) -> None:
    stage.wait_until("the sandbox", stage.sandbox.answers)
    stage.clock.say(f"Sandbox billing sites run on {stage.ports.sandbox_url}")


def _wait_for_airflow(stage: Stage, started_at: datetime) -> None:
    airflow = stage.airflow
    stage.wait_until("Airflow's API server", airflow.answers)
    airflow.sign_in()
    stage.wait_until("Airflow's scheduler and DAG processor", lambda: not airflow.unwell())
    stage.clock.say(f"Airflow runs on {stage.ports.api_url}")
    stage.wait_until("the three DAGs", lambda: _stand(airflow, started_at))
    stage.clock.say("DAGs stand: " + ", ".join(source.dag_id for source in SOURCES))


def _stand(airflow: AirflowApi, started_at: datetime) -> bool:
    errors = airflow.import_errors()
    if errors:
        raise ProgramFailed("\n".join(f"Airflow cannot import {file}:\n{trace}" for file, trace in errors.items()))
    return {source.dag_id for source in SOURCES} <= airflow.parsed_since(started_at)


def shown(path: Path) -> str:
    """A path as a person in the checkout would type it."""
    return str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else str(path)
