"""The command `usage-billing simulate`: a closing line where all held, a story and how to tell it again where not."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mutations import token_of_the_chunk

from usage_billing.cli import main
from usage_billing.testing.command import Order, Violated, run

SOURCES = Path(__file__).parents[2] / "include" / "sources"
SCRIPTS = Path(__file__).parents[2] / "include" / "sandbox"


def test_the_closing_line_counts_what_was_played() -> None:
    """Seeds, histories by destination, effects, requests and violations stand in one line."""
    line = run(Order(first_seed=0, seeds=2), jobs=1)
    assert line.startswith("seeds 0 to 1: ")
    assert "writing requests; 0 violations" in line


def test_processes_share_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes play a source of one's own, and the command ends well."""
    arguments = ["--source", str(SOURCES / "api_calls"), "--seeds", "2", "--jobs", "2"]
    assert main(["simulate", *arguments]) == 0
    assert "seeds 0 to 1: 2 maxio_metered" in capsys.readouterr().out


def test_nothing_plays_on_for_a_command_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes notice that nobody waits for them, and end with their ledgers; it was a script's background job."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    killer = importlib.import_module("killer")
    ignoring = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]
    program = "from usage_billing.cli import main; main()"
    command = [*ignoring, sys.executable, "-c", program, "simulate", "--seeds", "500", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    with (tmp_path / "said").open("wb") as said:
        playing = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)  # noqa: S603

    def players() -> list[int]:
        return list(killer.pids_in(playing.pid, "spawn_main"))

    try:
        deadline = time.monotonic() + 120
        while len(players()) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(players()) == 2, (tmp_path / "said").read_text()
        time.sleep(8)  # Until they play; one that still imports ends as well.
    finally:
        playing.send_signal(signal.SIGKILL)
        playing.wait(10)
    deadline = time.monotonic() + 60
    while players() and time.monotonic() < deadline:
        time.sleep(0.2)
    left = players()
    for player in left:
        os.kill(player, signal.SIGKILL)
    assert left == []


def test_a_long_run_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each share of the seeds is told when it was played; the closing line has all of them."""
    monkeypatch.setattr("usage_billing.testing.command._SHARE", 1)
    said: list[str] = []
    line = run(Order(first_seed=0, seeds=3), jobs=1, say=said.append)
    assert [text.partition(";")[0] for text in said] == [
        "1 of 3 seeds played, 0 violations",
        "2 of 3 seeds played, 0 violations",
    ]
    assert line.startswith("seeds 0 to 2: ")


def test_a_failing_seed_prints_its_shortest_story_and_how_to_tell_it_again() -> None:
    """A fault of the engine ends the command with the failing seeds; the story has the violated check."""
    said: list[str] = []
    with token_of_the_chunk(), pytest.raises(Violated, match="failing seeds: 0"):
        run(Order(first_seed=0, seeds=1), jobs=1, say=said.append)
    (story,) = said
    assert "VIOLATED I6 a token names a revision" in story
    assert "again: usage-billing simulate --first-seed 0 --seeds 1 --ledger sqlite" in story


def test_a_period_that_is_no_calendar_period_is_turned_down(tmp_path: Path) -> None:
    """A source with `period: interval` is told, before anything is played, that no history can be drawn for it."""
    own = tmp_path / "api_calls"
    own.mkdir()
    for name in ("source.yaml", "usage.sql", "expectations.yaml"):
        text = (SOURCES / "api_calls" / name).read_text(encoding="utf-8")
        (own / name).write_text(text.replace("period: day", "period: interval"), encoding="utf-8")
    assert main(["simulate", "--source", str(own), "--jobs", "1"]) == 1
