"""Real crashes: `include/sandbox/crash.py` kills real Airflow tasks while they deliver, and the sandbox counts."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from acted import play

SOURCES = {"api_calls", "platform_events", "voip_minutes"}
# The longest limit that a story sets itself; ending one that hangs takes the rest.
STORY_SECONDS = 560

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.timeout(STORY_SECONDS + 120),
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="the killer finds its victims in /proc"),
]


def _play(state: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    return play("crash", state, STORY_SECONDS, *arguments)


def _assert_billed_once(verdict: dict[str, Any], said: str) -> None:
    """By the sandbox's count nothing is over or under, nothing is open, and the same days again send nothing."""
    for source in verdict["sources"]:
        assert source["requests"] > 0, said
        assert (Decimal(source["over"]), Decimal(source["under"])) == (0, 0), said
        assert (source["unsettled"], source["sent_again"]) == (0, 0), said


def test_killed_delivers_bill_once(tmp_path: Path):
    """Twelve tasks of all three sources die of SIGKILL in mid-delivery, while the sites fail now and then."""
    verdict, said = _play(tmp_path, "--story", "kills", "--kills", "12", "--seed", "1")
    killed = {source["source"]: source["kills"] for source in verdict["sources"]}
    assert killed.keys() == SOURCES
    assert sum(killed.values()) >= 12, said
    assert min(killed.values()) >= 1, said
    # Some of them died with a request on its way: without one, nothing was in doubt and the story proves little.
    assert sum(source["on_their_way"] for source in verdict["sources"]) >= 6, said
    assert sum(source["doubts"] for source in verdict["sources"]) > 0, said
    _assert_billed_once(verdict, said)


def test_zombie_that_wakes_up_bills_nothing_twice(tmp_path: Path):
    """A deliver is cleared while it is suspended, and goes on sending beside its successor, or after it."""
    verdict, said = _play(tmp_path, "--story", "zombie")
    meanwhile, afterwards = verdict["hauntings"]
    assert meanwhile["sent_as_zombie"] > 0, said
    assert afterwards["sent_by_successor"] > 0, said
    _assert_billed_once(verdict, said)


def test_killed_scheduler_bills_once(tmp_path: Path):
    """The scheduler dies of SIGKILL, once alone and once with its tasks, and a new one goes on from there."""
    verdict, said = _play(tmp_path, "--story", "scheduler")
    assert verdict["killed"] == {"scheduler alone": 1, "scheduler with its tasks": 1}
    assert sum(source["kills"] for source in verdict["sources"]) >= 1, said
    _assert_billed_once(verdict, said)
