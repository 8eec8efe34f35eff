"""Whole histories, drawn from seeds: whatever goes wrong, what was billed and what is listed make what is owed."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from usage_billing.destinations import destination_settings
from usage_billing.sources import load_source
from usage_billing.testing import Outcome, PostgresLedgers, SqliteLedgers, simulate, workshop
from usage_billing.testing.chance import Chance
from usage_billing.testing.command import Order, Violated, run
from usage_billing.testing.scenes import BY_ARRIVAL, KINDS, RAW, drawn_kind, simulated
from usage_billing.testing.shrink import shrunk
from usage_billing.testing.story import Story

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "include" / "sources"
SEEDS = 40
"""How many seeds every test run plays; `make simulate` plays thousands, and others."""
ON_POSTGRES = 6


def once_failing() -> list[int]:
    """Return the seeds that found something once: each line of seeds.txt is a seed and what it found."""
    lines = (HERE / "seeds.txt").read_text(encoding="utf-8").splitlines()
    return [int(line.partition("#")[0]) for line in lines if line.partition("#")[0].strip()]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory, for ledgers and staging."""
    with workshop() as found:
        yield found


@pytest.fixture(scope="module")
def sqlite(folder: Path) -> SqliteLedgers:
    """Empty SQLite ledgers."""
    return SqliteLedgers(folder)


@pytest.fixture(scope="module")
def postgres(folder: Path) -> Iterator[PostgresLedgers]:
    """Empty PostgreSQL ledgers, on a server of their own."""
    ledgers = PostgresLedgers(folder)
    yield ledgers
    ledgers.close()


def assert_kept(outcome: Outcome) -> None:
    """Assert that a history kept every invariant, and tell its story if it did not."""
    assert not outcome.violations, f"\n{outcome}"


@pytest.mark.timeout(1500)  # A machine with other things to do plays them slowly, and no less rightly.
def test_billed_and_listed_make_what_is_owed() -> None:
    """Drawn histories keep every invariant on a SQLite ledger; a story is told of each that does not."""
    stories: list[str] = []
    try:
        run(Order(first_seed=0, seeds=SEEDS, shrink=False), jobs=2, say=stories.append)
    except Violated as violated:
        pytest.fail("\n\n".join([*stories, str(violated)]))


@pytest.mark.parametrize("seed", once_failing())
def test_what_failed_once_holds(seed: int, sqlite: SqliteLedgers, folder: Path) -> None:
    """A seed that found a fault of the package finds it no more."""
    assert_kept(simulate(seed, sqlite.fresh(), folder))


@pytest.mark.parametrize("seed", range(1000, 1000 + ON_POSTGRES))
def test_histories_hold_on_postgresql(seed: int, postgres: PostgresLedgers, folder: Path) -> None:
    """A drawn history keeps every invariant on a PostgreSQL ledger."""
    assert_kept(simulate(seed, postgres.fresh(), folder))


@pytest.mark.parametrize("name", ["api_calls", "platform_events", "voip_minutes"])
def test_shipped_sources_hold(name: str, sqlite: SqliteLedgers, folder: Path) -> None:
    """A history of one's own source is drawn from its source.yaml, and holds."""
    own = simulated(load_source(SOURCES / name, destination_settings))
    outcome = simulate(7, sqlite.fresh(), folder, own)
    assert outcome.kind == own.destination.name
    assert_kept(outcome)


def test_one_seed_tells_one_story(sqlite: SqliteLedgers, folder: Path) -> None:
    """The same seed tells the same story to the last byte, so a failure can be told again."""
    first, second = (simulate(11, sqlite.fresh(), folder) for _ in range(2))
    assert str(first) == str(second)
    assert first.counts["effects"] > 100


def test_sizes_and_order_never_change_what_is_billed(sqlite: SqliteLedgers, folder: Path) -> None:
    """I4: other batches, chunks and an other order of rows end with the same bill, key by key, in quiet histories."""
    for kind in (*KINDS, RAW, *(kind + BY_ARRIVAL for kind in (*KINDS, RAW))):
        seed = next(seed for seed in count(2000) if drawn_kind(Chance(seed)) == kind)
        tables = [
            simulate(seed, sqlite.fresh(), folder, sizes=sizes, troubled=False).lines for sizes in ("small", "large")
        ]
        assert tables[0] == tables[1]


def test_a_failing_story_is_shrunk_to_what_matters() -> None:
    """Of thirty disturbances, the two that it takes are left, and each telling strikes where it struck before."""
    told: list[frozenset[str]] = []

    def tell(muted: frozenset[str]) -> Outcome:
        told.append(muted)
        return _outcome(frozenset(map(str, range(30))) - muted)

    shortest = shrunk(tell(frozenset()), tell)
    assert shortest.struck == ("17", "4")
    assert len(told) < 60


def _outcome(struck: frozenset[str]) -> Outcome:
    found = [("I1", "too much")] if {"4", "17"} <= struck else []
    return Outcome(0, "", Counter(), [], found, tuple(sorted(struck)), Story(datetime(2026, 10, 1, tzinfo=UTC)))
