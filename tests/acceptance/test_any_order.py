"""Any order, any kind of run: `include/sandbox/any_order.py` bills in real Airflow, and the sandbox counts."""

from decimal import Decimal
from pathlib import Path

import pytest

from acted import play

STORY_SECONDS = 600

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(STORY_SECONDS + 120)]


def test_days_in_any_order_by_any_run_come_to_what_is_owed(tmp_path: Path):
    """Backfills forwards and backwards, runs by hand beside them, then late, corrected and deleted rows."""
    verdict, said = play("any_order", tmp_path, STORY_SECONDS, "--days", "2")
    assert verdict["without_interval"] == "failed", said
    assert verdict["runs"]["backfill"] >= 6, said
    assert verdict["runs"]["manual"] >= 3, said
    assert verdict["runs"]["params"] >= 3, said
    for source in verdict["sources"]:
        assert Decimal(source["wrong"]) == 0, said
        assert Decimal(source["billed"]) > 0, said
        assert source["sent_again"] == 0, said
        assert source["open"] == 0, said
