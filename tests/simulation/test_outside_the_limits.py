"""What the promise excludes, shown: two things cannot be fenced from outside, and then usage is billed twice.

The README names both limits. That a tie-out reports each of them is asserted here, so that it says so honestly.
"""

from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest

from usage_billing.destinations import destination_settings
from usage_billing.reconcile import Reconciliation, reconcile
from usage_billing.records import Period
from usage_billing.sources import load_source
from usage_billing.testing.clockwork import Process
from usage_billing.testing.history import History
from usage_billing.testing.ledgers import SqliteLedgers
from usage_billing.testing.runs import Asked, DagRun, sweeping
from usage_billing.testing.scenes import simulated

SOURCES = Path(__file__).parents[2] / "include" / "sources"


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    """A history of metered usage in which nothing goes wrong by chance, and nobody else bills anything."""
    own = simulated(load_source(SOURCES / "api_calls", destination_settings))
    with closing(History(5, SqliteLedgers(tmp_path).fresh(), tmp_path, own)) as found:
        found.faults.stop()
        # Maxio's 60-minute token is a belt that no document promises for usages; without it the limit shows.
        found.sandbox.switch(found.scene.site, uniqueness_token="ignored")
        yield found


def run(history: History, name: str) -> DagRun:
    """Run all usage periods, from the end of the last one on, and return the run once it has ended."""
    source, units = history.scene.sources[0], history.scene.units
    made = DagRun(history, Asked(name, source, 0, len(units) - 2))
    history.runs.append(made)
    made.begin(seconds=max((units[-1] - history.around.clockwork.now).total_seconds(), 0.0))
    history.rest()
    return made


def tied_out(history: History) -> Reconciliation:
    """Tie the ledger out against the site, outside of any process."""
    source = history.scene.sources[0]
    found: list[Reconciliation] = []

    def body(own: Process) -> None:
        destination = history.scene.destination(source, history.sandbox, history.network.transport(own))
        units = history.scene.units
        found.append(reconcile(destination, history.ledger, Period(units[0], units[-1]), pauses=()))

    process = Process("a person", body)
    history.around.begin(process, 0, lambda _process: None)
    history.rest()
    assert process.error is None, process.error
    return found[0]


def checks(history: History) -> set[str]:
    """Return the names of the checks that the history violated so far."""
    return {check for check, _ in history.violations}


def test_within_the_limits_nothing_is_billed_twice(history: History) -> None:
    """A request that lands just before the cut-off is found by the question that follows, and is not sent again."""
    history.around.outside.lands_after = 119.0
    assert run(history, "run").done
    history.quiet()
    history.judged()
    assert not history.violations
    assert tied_out(history).ties_out


def test_a_request_that_lands_after_the_cut_off_is_billed_twice_and_told(history: History) -> None:
    """The site says that it has no such usage, and carries it out minutes later: both are billed, the tie-out tells."""
    history.around.outside.lands_after = 400.0
    run(history, "run")
    history.quiet()
    lines = history.judged()
    assert "I2 sent once" in checks(history)
    assert "I6 one record each" in checks(history)
    assert sum(line.billed for line in lines) > sum(line.owed for line in lines)
    found = tied_out(history)
    assert not found.ties_out
    assert any("a second time" in example for example in found.examples)


def test_the_belt_of_60_minutes_catches_a_late_request_where_the_site_wears_it(history: History) -> None:
    """Where the site honours the token of the request, the one that lands late is turned away."""
    history.sandbox.switch(history.scene.site, uniqueness_token="honoured")
    history.around.outside.lands_after = 400.0
    run(history, "run")
    history.quiet()
    history.judged()
    assert checks(history) == {"I2 sent once"}
    assert tied_out(history).ties_out


def test_a_worker_suspended_before_the_socket_bills_twice_and_is_told(history: History) -> None:
    """A worker sleeps between its last look and the socket while a sweep settles and sends: the tie-out tells."""
    history.around.outside.held_for = 3600.0
    source = history.scene.sources[0]
    units = history.scene.units
    made = DagRun(history, Asked("run", source, 0, len(units) - 2))
    made.begin(seconds=(units[-1] - units[0]).total_seconds())
    for minutes in (5, 20):
        sweep = Process(f"sweep after {minutes} minutes", sweeping(history, source, resumes=True))
        at = units[-1] + timedelta(minutes=minutes) - units[0]
        history.around.begin(sweep, at.total_seconds(), lambda _process: None)
    history.rest()
    history.quiet()
    lines = history.judged()
    assert "I2 sent once" in checks(history)
    assert sum(line.billed for line in lines) > sum(line.owed for line in lines)
    assert any("a second time" in example for example in tied_out(history).examples)
