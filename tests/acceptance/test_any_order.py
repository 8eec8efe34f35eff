"""Any order, any kind of run: `include/sandbox/any_order.py` bills in real Airflow, and the sandbox counts."""

import json
import os
import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
STORY_SECONDS = 600

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(STORY_SECONDS + 120)]


def test_days_in_any_order_by_any_run_come_to_what_is_owed(tmp_path: Path):
    """Backfills forwards and backwards, runs by hand beside them, then late, corrected and deleted rows."""
    story = subprocess.Popen(  # noqa: S603 - Our own program.
        [sys.executable, "include/sandbox/any_order.py", "--days", "2", "--state", str(tmp_path)],
        cwd=CHECKOUT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("AIRFLOW", "PYTEST"))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = story.communicate(timeout=STORY_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(story.pid, signal.SIGTERM)
        said, _ = story.communicate(timeout=60)
        pytest.fail(f"the story did not end:\n{said}")
    assert story.returncode == 0, said
    verdict = json.loads((tmp_path / "demo" / "any_order.json").read_text())
    assert verdict["without_interval"] == "failed", said
    assert verdict["runs"]["backfill"] >= 6, said
    assert verdict["runs"]["manual"] >= 3, said
    assert verdict["runs"]["params"] >= 3, said
    for source in verdict["sources"]:
        assert Decimal(source["wrong"]) == 0, said
        assert Decimal(source["billed"]) > 0, said
        assert source["sent_again"] == 0, said
        # Deductions only, where nobody knows that the site would take them: everything that is to be billed is.
        assert Decimal(source["listed"]) <= 0, said
