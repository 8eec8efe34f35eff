"""`make demo` for real: sandbox, Airflow and all, in the checkout's own environment, with its state elsewhere."""

import json
import os
import re
import signal
import subprocess
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

CHECKOUT = Path(__file__).parents[2]
SOURCES = ["api_calls", "platform_events", "voip_minutes"]
# The demo promises five minutes; ending a demo that hangs takes the rest.
DEMO_SECONDS = 330

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(1200)]


@pytest.fixture(name="state", scope="module")
def _state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name has a space, as people's folders do."""
    return tmp_path_factory.mktemp("demo state")


def _start(state: Path) -> subprocess.Popen[str]:
    """Start `make demo` in a session of its own, free of what pytest and an outer make have set."""
    theirs = ("AIRFLOW", "MAKE", "MFLAGS", "PYTEST", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return subprocess.Popen(  # noqa: S603 - Our own program.
        ["make", "demo", f"STATE={state}"],  # noqa: S607 - Whichever make started the tests.
        cwd=CHECKOUT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _play(state: Path) -> tuple[int, str]:
    """Play the demo to its end: exit status and what it said."""
    demo = _start(state)
    try:
        said, _ = demo.communicate(timeout=DEMO_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(demo.pid, signal.SIGTERM)
        said, _ = demo.communicate(timeout=60)
        pytest.fail(f"the demo did not end:\n{said}")
    return demo.returncode, said


def _result(state: Path) -> dict[str, Any]:
    return json.loads((state / "demo" / "result.json").read_text())


def _processes() -> dict[int, tuple[int, int]]:
    """Every process of the machine that has not ended: its parent and its session."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # It ended meanwhile.
            if fields[0] not in "ZX":
                found[int(entry.name)] = int(fields[1]), int(fields[3])
    return found


def _left_of(sessions: set[int]) -> list[int]:
    """The processes of these sessions; a killed process may take a moment to be gone."""
    left = [0]
    deadline = time.monotonic() + 5
    while left and time.monotonic() < deadline:
        left = [pid for pid, (_, session) in _processes().items() if session in sessions]
        time.sleep(0.1)
    return left


def _sessions_below(pid: int) -> set[int]:
    """The sessions of a process and all that it started; unlike parents, they last when one in between ends."""
    processes = _processes()
    family = {pid}
    while more := {child for child, (parent, _) in processes.items() if parent in family} - family:
        family |= more
    return {processes[member][1] for member in family if member in processes}


@pytest.fixture(name="first", scope="module")
def _first(state: Path) -> tuple[int, str]:
    """The first whole demo in this state."""
    return _play(state)


def test_interrupted_demo_leaves_nothing_running(state: Path):
    """Ctrl-C in the middle of billing ends Airflow and the sandbox with all their processes."""
    demo = _start(state)
    assert demo.stdout is not None
    said = []
    for line in demo.stdout:
        said.append(line)
        if "tasks" in line:
            break
    sessions = _sessions_below(demo.pid)
    os.killpg(demo.pid, signal.SIGINT)
    rest, _ = demo.communicate(timeout=60)
    assert demo.returncode != 0, "".join(said) + rest
    assert "Ended by SIGINT" in rest
    # The demo's own, Airflow's and the sandbox's: with fewer the next line would prove nothing.
    assert len(sessions) >= 3
    assert _left_of(sessions) == []


def test_first_demo_bills_what_is_owed(state: Path, first: tuple[int, str]):
    """Every source read rows, quarantined the planted ones, and was billed what it owes, to the last decimal."""
    status, said = first
    assert status == 0, said
    verdicts = {verdict["source"]: verdict for verdict in _result(state)["verdicts"]}
    assert sorted(verdicts) == SOURCES
    for verdict in verdicts.values():
        assert verdict["rows_read"] > 2500
        assert verdict["rows_quarantined"] == 5 * 5
        assert Decimal(verdict["difference"]) == 0
        assert Decimal(verdict["owed"]) == Decimal(verdict["billed"]) > 0


@pytest.mark.usefixtures("first")
def test_each_validate_task_has_a_page_behind_airflows_login(state: Path):
    """Five days of three sources: the button leads to what became of every rule, and shows it to nobody signed out."""
    pages = _result(state)["validation_results"]
    assert len({page["address"] for page in pages}) == 5 * len(SOURCES)
    assert {(page["status"], page["status_signed_out"]) for page in pages} == {(200, 401)}
    for page in pages:
        rows = re.findall(r">\s*(accepted|quarantined)\s*<.*?>\s*(\d+)\s*<", page["text"], re.DOTALL)
        assert dict(rows)["quarantined"] == "5"
        assert int(dict(rows)["accepted"]) > 500


def test_run_that_unpausing_starts_ends_green_and_skipped(state: Path, first: tuple[int, str]):
    """Its interval is yesterday, for which the warehouse holds nothing: that is no failure."""
    _, said = first
    scheduled = [run for run in _result(state)["runs"] if run["run_type"] == "scheduled"]
    assert sorted(run["dag_id"] for run in scheduled) == [f"bill_{source}" for source in SOURCES]
    assert {run["state"] for run in scheduled} == {"success"}
    assert said.count("ended success, tasks skipped") == len(SOURCES)


@pytest.mark.usefixtures("first")
def test_second_demo_sends_no_writing_request(state: Path):
    """The same five days once more, all six tasks of each: the ledger knows that nothing is left to bill."""
    before = _result(state)["verdicts"]
    status, said = _play(state)
    assert status == 0, said
    after = _result(state)["verdicts"]
    assert [verdict["writing_requests"] for verdict in after] == [0, 0, 0]
    assert [verdict["billed"] for verdict in after] == [verdict["billed"] for verdict in before]
    assert "this run sent no writing request" in said
