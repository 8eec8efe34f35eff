"""`make demo` and `make up`: real Airflow bills sample usage to the sandbox billing sites, on this machine alone.

`demo` starts the sandbox and Airflow, lets three DAGs bill five days by `airflow backfill create`, and compares what
the sandbox billed with what the warehouse owes. `up` leaves both running for a person. Everything they start ends
with them; their state stays, so a second `demo` finds nothing left to bill.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import requests
from airflow_api import NotSignedIn, Page
from billing import Runs, bill, tell_unpausing
from programs import Interrupted, ProgramFailed, interruptible
from stage import Clock, Stage, TookTooLong, choose_ports, set_stage, shown
from state import USER, State, StateInUse
from verdict import SOURCES, DemoSource, Verdict, judge, table

UI_PORT = 8080


def demo(state: State, clock: Clock) -> bool:
    """Bill the demo's days and judge; tell the person all of it, and return whether every run and figure is right."""
    with set_stage(state, clock, choose_ports()) as stage:
        written_before = {source.name: stage.sandbox.writing_requests(source) for source in SOURCES}
        runs = bill(stage)
        verdicts = [_judge(stage, source, written_before[source.name]) for source in SOURCES]
        failed = [each.run_id for ended in runs.values() for each in ended if each.state != "success"]
        tell_unpausing(stage, runs)
        print(f"\n{table(verdicts)}\n")
        _keep(state, runs, verdicts, _validation_results(stage))
    good = not failed and not any(verdict.difference for verdict in verdicts)
    print(_summary(verdicts, good=good))
    return good


def up(state: State, clock: Clock) -> None:
    """Keep Airflow and the sandbox running until somebody interrupts.

    The DAGs are unpaused, since a paused DAG's backfill waits in silence.
    """
    with set_stage(state, clock, choose_ports(UI_PORT)) as stage:
        stage.airflow.pause([source.dag_id for source in SOURCES], paused=False)
        print(
            f"\n  Airflow   {stage.ports.api_url}   user {USER}   password {stage.airflow.password}"
            f"\n  Sandbox   {stage.ports.sandbox_url}/_sandbox/"
            f"\n  Logs      {shown(state.log('airflow').parent)}, {shown(state.airflow / 'logs')}"
            "\n\n  To bill a few days: a DAG, Trigger, Backfill, any days of October 2026. Ctrl-C ends everything.\n",
            flush=True,
        )
        while True:
            for program in stage.programs:
                program.must_run()
            time.sleep(1)


def _judge(stage: Stage, source: DemoSource, written_before: int) -> Verdict:
    written = stage.sandbox.writing_requests(source) - written_before
    return judge(source, stage.state.warehouse, stage.state.ledger, stage.sandbox.billed(source), written)


def _validation_results(stage: Stage) -> list[Page]:
    """The page behind the button of each task that validated."""
    tasks = [task for source in SOURCES for task in stage.airflow.tasks(source.dag_id)]
    validated = [task for task in tasks if task.task_id == "validate" and task.state == "success"]
    return [stage.airflow.behind_button(task, "Validation result") for task in validated]


def _keep(state: State, runs: Runs, verdicts: Sequence[Verdict], pages: Sequence[Page]) -> None:
    """Leave the outcome for programs: `result.json`, quantities as strings."""
    result = {
        "validation_results": [asdict(page) for page in pages],
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "runs": [asdict(each) for ended in runs.values() for each in ended],
    }
    (state.demo / "result.json").write_text(json.dumps(result, indent=2, default=str))


def _summary(verdicts: Sequence[Verdict], *, good: bool) -> str:
    if not good:
        return "FAILED: a run failed, or what was billed differs from what is owed."
    if not any(verdict.writing_requests for verdict in verdicts):
        return "Everything owed is billed already: this run sent no writing request."
    return "Everything owed is billed, to the last decimal. Run it again: nothing will be sent."


def main() -> int:
    """Run `demo` or `up`; the exit status is 0 only if all is well."""
    parser = argparse.ArgumentParser(description="Run the demo, or keep Airflow and the sandbox running.")
    parser.add_argument("what", choices=["demo", "up"])
    parser.add_argument("--state", type=Path, help="keep all state in this folder instead of the checkout")
    arguments = parser.parse_args()
    state, clock = State.inside(arguments.state), Clock(time.monotonic())
    try:
        with interruptible():
            if arguments.what == "demo":
                return 0 if demo(state, clock) else 1
            up(state, clock)
    except Interrupted as interrupted:
        print(f"Ended by {interrupted}.")
        return 0 if arguments.what == "up" else 130
    except (NotSignedIn, ProgramFailed, StateInUse, TookTooLong, requests.RequestException) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
