"""The simulator can fail: each deliberate fault of the engine is noticed within a few seeds."""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation

from usage_billing.testing import SqliteLedgers, simulate, workshop
from usage_billing.testing.chance import Chance
from usage_billing.testing.scenes import drawn_kind

pytestmark = pytest.mark.timeout(900)

SEEDS = 12
"""How many seeds a fault may go unnoticed; the first one is chosen so that few are needed."""
FIRST = {
    "doubts_settled_at_once": 10,
    "lease_forgotten": 152,
    "events_sent_again_after_a_month": 11,
    "conflict_taken_for_success": 350,
    "abandoned_taken_for_nothing": 13,
    "plan_blind_for_doubts": 3,
    "vanished_keys_forgotten": 1,
    "quarantine_withdraws": 4,
    "claim_without_comparison": 234,
    "float_arithmetic": 3,
    "floor_forgotten": 21,
    "stale_plans_send": 14,
    "external_key_not_looked_up": 10,
    "watermark_without_overlap": 30,
    "watermark_ahead_of_the_clock": 230,
    "taken_off_whatever_is_left": 43,
    "bill_before_its_credit": 6,
    "undecided_move_sent": 6,
    "delivered_unasked": 8,
    "any_yes_counts": 4,
    "planned_again_unasked": 10,
    "turned_down_unlisted": 8,
    "before_billed_as_today": 1,
    "lookback_across_the_change": 24,
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory, for ledgers and staging."""
    with workshop() as found:
        yield found


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_fault_of_the_engine_is_noticed(mutation: Mutation, folder: Path) -> None:
    """A package with this fault breaks an invariant within a few histories."""
    ledgers = SqliteLedgers(folder / mutation.__name__)
    first = FIRST.get(mutation.__name__, 0)
    fitting = (seed for seed in count(first) if drawn_kind(Chance(seed)) in MUTATIONS[mutation])
    with mutation():
        for seed in islice(fitting, SEEDS):
            if simulate(seed, ledgers.fresh(), folder).violations:
                return
    pytest.fail(f"{SEEDS} histories did not notice: {mutation.__doc__}")
