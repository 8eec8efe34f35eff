"""Sources that go by arrival, against the sandbox: each run compares what was touched, and nothing is passed over."""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from arrivals import MOMENT, ArrivalHouse, Warehouse, an_arrival_house, arriving
from stories import ACCOUNT, SITES, a_day
from usage_billing.deliver import Manners
from usage_billing.errors import NotApplied, Stale
from usage_billing.periods import local_midnight
from usage_billing.reconcile import reconcile
from usage_billing.records import Period
from usage_billing.sources import BillingSource

OTHER = {"api_calls": "acct-0002", "platform_events": "orbit-02", "voip_minutes": "pkg-002"}
ALONE = Manners(threads=1, lease_lasts=timedelta(seconds=3), patience=timedelta(seconds=20))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[ArrivalHouse]:
    """A sandbox, a ledger, a warehouse and staging."""
    with an_arrival_house(tmp_path) as found:
        yield found


@pytest.fixture(params=sorted(ACCOUNT))
def source(request: pytest.FixtureRequest) -> BillingSource:
    """Each of the shipped sources, by arrival."""
    return arriving(request.param)


def noon(source: BillingSource, day: int) -> datetime:
    """Return noon of a day of October 2026 in the billing zone."""
    return a_day(source, day).start + timedelta(hours=12)


def used(house: ArrivalHouse, source: BillingSource, arrived: int | str, event: str, day: int, quantity: int) -> None:
    """Let a row of the source's account arrive."""
    house.warehouse.put(arrived, event, noon(source, day), ACCOUNT[source.name], quantity)


def billed(house: ArrivalHouse, source: BillingSource) -> Decimal:
    """Return what the site billed to the source's account."""
    return house.billed(source).get(ACCOUNT[source.name], Decimal(0))


def test_the_first_run_takes_up_all_that_ever_arrived(house: ArrivalHouse, source: BillingSource) -> None:
    """Nobody has to run the days before the first one: the first run bills each closed day from `bill_from` on."""
    for day in range(1, 8):
        used(house, source, day, f"e{day}", day, day)
    house.warehouse.put(8, "before", source.bill_from - timedelta(seconds=1), ACCOUNT[source.name], 1000)
    done = house.increment(source, a_day(source, 6))
    assert [period.start.day for period in done.taken.periods] == [1, 2, 3, 4, 5, 6]
    assert billed(house, source) == 21
    assert house.ledger.watermark(source.name) == "8"
    assert house.ledger.touched(source.name) == (a_day(source, 7),)


def test_a_late_row_bills_its_own_day_and_reads_no_other(house: ArrivalHouse, source: BillingSource) -> None:
    """The days between the late row's and the run's own are neither read nor compared, and nothing of them vanishes."""
    for number in range(1, 701):
        used(house, source, number, f"e{number}", 1 + number % 7, 1)
    house.increment(source, a_day(source, 7))
    before = house.writing_requests(source)
    used(house, source, 1000, "late", 3, 5)
    used(house, source, 1001, "new", 8, 9)
    rows = house.rows_of(lambda: house.increment(source, a_day(source, 8)))
    assert billed(house, source) == 714
    assert house.ledger.touched(source.name) == ()
    # Two that arrived; a hundred of the late row's day, and itself; the new day's one.
    assert rows == 2 + 101 + 1
    assert house.writing_requests(source) - before <= 2
    before = house.writing_requests(source)
    house.increment(source, a_day(source, 8))
    assert house.writing_requests(source) == before


def test_a_row_that_was_committed_behind_the_watermark_is_seen(house: ArrivalHouse, source: BillingSource) -> None:
    """Ids are given out before the commit: a smaller one that shows up later is looked for within the overlap."""
    source = arriving(source.name, overlap=100)
    used(house, source, 500, "first", 2, 1)
    house.increment(source, a_day(source, 6))
    used(house, source, 401, "slow", 3, 10)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 11
    assert house.ledger.watermark(source.name) == "500"
    used(house, source, 400, "too-slow", 4, 100)
    house.increment(source, a_day(source, 8))
    assert billed(house, source) == 11
    house.increment(source, a_day(source, 9), rescan=True)
    assert billed(house, source) == 111


def test_times_of_arrival_overlap_by_a_span(house: ArrivalHouse) -> None:
    """The same with moments: within the hour nothing is passed over, and an arrival of tomorrow hides nobody."""
    source = arriving("api_calls", timedelta(hours=1))
    start = datetime(2026, 10, 8, 12, tzinfo=UTC)
    used(house, source, start.strftime(MOMENT), "first", 2, 1)
    house.increment(source, a_day(source, 6))
    assert house.ledger.watermark(source.name) == start.isoformat()
    used(house, source, (start - timedelta(minutes=59)).strftime(MOMENT), "slow", 3, 10)
    used(house, source, "2099-01-01 00:00:00", "wrong-clock", 4, 100)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 111
    assert house.ledger.watermark(source.name) < "2026-10-21"
    used(house, source, house.ledger.now().strftime(MOMENT), "after", 5, 1000)
    house.increment(source, a_day(source, 8))
    assert billed(house, source) == 1111


def test_a_wrong_clock_hides_nobody_where_the_warehouse_is_behind(house: ArrivalHouse) -> None:
    """Its clock is three hours behind the ledger's, more than the overlap: an arrival of 2099 sets no watermark."""
    source = arriving("api_calls", timedelta(hours=1))
    behind = house.ledger.now() - timedelta(hours=3)
    used(house, source, "2099-01-01 00:00:00", "wrong-clock", 2, 1)
    used(house, source, behind.strftime(MOMENT), "first", 2, 10)
    house.increment(source, a_day(source, 6))
    used(house, source, (behind + timedelta(minutes=1)).strftime(MOMENT), "next", 3, 100)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 111


def test_a_row_that_was_updated_is_corrected(house: ArrivalHouse, source: BillingSource) -> None:
    """Its arrival moves with the update, so its day is compared again: more is sent, less is taken back."""
    used(house, source, 1, "row", 2, 10)
    used(house, source, 2, "same", 2, 100)
    house.increment(source, a_day(source, 6))
    used(house, source, 1000, "row", 2, 15)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 115
    used(house, source, 2000, "row", 2, 4)
    house.increment(source, a_day(source, 8))
    assert billed(house, source) == 104


def test_a_tombstone_takes_back_what_was_billed(house: ArrivalHouse, source: BillingSource) -> None:
    """A row that is marked as deleted touches its day and bills nothing."""
    used(house, source, 1, "gone", 2, 10)
    used(house, source, 2, "stays", 2, 100)
    house.increment(source, a_day(source, 6))
    house.warehouse.delete("gone", tombstone=1000)
    done = house.increment(source, a_day(source, 7))
    assert done.taken.deleted == 1
    assert billed(house, source) == 100
    assert house.ledger.touched(source.name) == ()


def test_a_tombstone_that_is_all_that_is_left_says_itself_what_is_gone(house: ArrivalHouse) -> None:
    """No row is left of all days that the run compares; nobody has to be asked, since the row is there to say so."""
    source = arriving("api_calls")
    used(house, source, 1, "gone", 2, 10)
    used(house, source, 2, "stays", 3, 100)
    house.increment(source, a_day(source, 6))
    house.warehouse.delete("gone", tombstone=1000)
    done = house.increment(source, a_day(source, 7))
    assert (done.taken.deleted, done.taken.events.rows if done.taken.events else None) == (1, 0)
    assert billed(house, source) == 100
    assert house.ledger.touched(source.name) == ()


def test_what_vanished_without_a_trace_is_found_by_a_rescan(house: ArrivalHouse, source: BillingSource) -> None:
    """No arrival tells of it; a rescan compares the last days whole, and finds it there."""
    used(house, source, 1, "gone", 2, 10)
    used(house, source, 2, "stays", 2, 100)
    house.increment(source, a_day(source, 6))
    house.warehouse.delete("gone")
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 110
    done = house.increment(source, a_day(source, 8), rescan=True)
    assert len(done.taken.periods) == 8
    assert billed(house, source) == 100


def test_a_rescan_reaches_as_far_back_as_the_source_says(house: ArrivalHouse) -> None:
    """`rescan: 3` compares three days, whatever is older."""
    source = arriving("api_calls", rescan=3)
    assert source.recent_periods(a_day(source, 8).end) == tuple(a_day(source, day) for day in (6, 7, 8))
    assert source.recent_periods(noon(source, 8)) == tuple(a_day(source, day) for day in (5, 6, 7))
    assert len(house.increment(source, a_day(source, 8), rescan=True).taken.periods) == 3


def test_a_day_that_is_not_over_waits_on_the_list(house: ArrivalHouse, source: BillingSource) -> None:
    """What arrives for a day before it ends is billed by a later run, also if the day's own run never takes place."""
    used(house, source, 1, "early", 9, 10)
    done = house.increment(source, a_day(source, 8))
    assert billed(house, source) == 0
    assert house.ledger.touched(source.name) == (a_day(source, 9),)
    assert done.taken.periods == (a_day(source, 8),)
    house.increment(source, a_day(source, 12))
    assert billed(house, source) == 10
    assert house.ledger.touched(source.name) == ()


def test_a_backfill_of_an_old_day_reads_that_day_and_takes_up_no_newer(house: ArrivalHouse) -> None:
    """It compares what its interval holds, as ever; what arrived for newer days waits for their run."""
    source = arriving("api_calls")
    for day in (2, 3, 9):
        used(house, source, day, f"e{day}", day, day)
    house.increment(source, a_day(source, 9))
    house.warehouse.delete("e2")
    used(house, source, 50, "late", 9, 100)
    used(house, source, 51, "more", 2, 1)
    done = house.increment(source, a_day(source, 2))
    assert done.taken.periods == (a_day(source, 2),)
    assert billed(house, source) == 13
    assert house.ledger.touched(source.name) == (a_day(source, 9),)
    house.increment(source, a_day(source, 10))
    assert billed(house, source) == 113
    house.warehouse.delete("e3")
    house.increment(source, a_day(source, 3))
    assert billed(house, source) == 110


def test_more_gaps_than_a_run_makes_statements_for_wait_for_the_next(
    house: ArrivalHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest go first, with the run's own; nothing that waits leaves the list."""
    monkeypatch.setattr("usage_billing.arrivals._MOST_SPANS", 2)
    source = arriving("api_calls")
    for number, day in enumerate((1, 3, 5, 7)):
        used(house, source, number, f"e{day}", day, 10**number)
    first = house.increment(source, a_day(source, 9))
    assert [period.start.day for period in first.taken.periods] == [1, 3, 9]
    assert house.ledger.touched(source.name) == (a_day(source, 5), a_day(source, 7))
    house.increment(source, a_day(source, 10))
    assert billed(house, source) == 1111
    assert house.ledger.touched(source.name) == ()


def test_a_cleared_run_of_before_sends_nothing(house: ArrivalHouse, source: BillingSource) -> None:
    """Of two runs that took up the same day the later extraction has the say; its own entry stays until it is done."""
    used(house, source, 1, "row", 2, 10)
    old, planned = house.read(source, a_day(source, 6))
    used(house, source, 2, "row", 2, 7)
    new, later = house.read(source, a_day(source, 6))
    assert planned is not None
    assert later is not None
    house.plan(source, later, new.folder)
    with pytest.raises(Stale, match="stale"):
        house.settle(source, old, planned)
    assert house.writing_requests(source) == 0
    assert house.ledger.touched(source.name) == (a_day(source, 2),)
    house.settle(source, new, later)
    assert billed(house, source) == 7
    assert house.ledger.touched(source.name) == ()


def test_an_older_run_that_ends_late_leaves_a_newer_arrival_on_the_list(house: ArrivalHouse) -> None:
    """A run that read a day before the late row came may not take the day off the list for it."""
    source = arriving("api_calls")
    used(house, source, 1, "row", 2, 10)
    old, planned = house.read(source, a_day(source, 6))
    used(house, source, 2, "late", 2, 5)
    house.read(source, a_day(source, 1))  # A backfill that sees it arrive, and takes up nothing of the 2nd.
    assert planned is not None
    house.settle(source, old, planned)
    assert billed(house, source) == 10
    assert house.ledger.touched(source.name) == (a_day(source, 2),)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 15


def test_raw_events_that_come_late_send_only_themselves(house: ArrivalHouse) -> None:
    """With `mode: events` a late row is one event more; one that is marked as deleted is listed by name."""
    source = arriving("platform_events", max_withdraw_share=1.0)
    destination = source.destination.model_copy(update={"mode": "events"})
    source = BillingSource(source.settings, destination, source.sql, source.expectations, source.arrivals_sql)
    for day in range(1, 6):
        used(house, source, day, f"e{day}", day, day)
    house.increment(source, a_day(source, 5))
    assert billed(house, source) == 15
    before = len(house.sandbox.records(SITES[source.name]))
    used(house, source, 1000, "late", 2, 100)
    house.warehouse.delete("e4", tombstone=1001)
    house.increment(source, a_day(source, 6))
    assert billed(house, source) == 115
    assert len(house.sandbox.records(SITES[source.name])) == before + 1
    left = house.ledger.open_items(source.name, a_day(source, 4))
    assert [(row.state, "e4" in row.reason) for row in left.itertuples()] == [("held", True)]
    assert house.ledger.touched(source.name) == ()


class Killed(BaseException):
    """The process ended here."""


class Mortal:
    """Counts every call to what it wraps, and ends the process right before or right after one of them."""

    def __init__(self, at: int, *, after: bool) -> None:
        self.calls = 0
        self.struck = ""
        self._at, self._after = at, after

    def watch(self, found: Any, name: str) -> Any:
        """Return `found` with its calls counted."""
        return _Watched(found, name, self)

    def call(self, name: str, body: Callable[[], Any]) -> Any:
        """Carry out a call, or not."""
        if self.struck:
            raise Killed(self.struck)  # A dead process does nothing more.
        self.calls += 1
        if self.calls != self._at:
            return body()
        self.struck = f"{'after' if self._after else 'before'} {name}"
        if self._after:
            body()
        raise Killed(self.struck)


_EFFECTS = {"get_conn", "watermark", "touched", "begin_extraction", "write", "record_read", "record_validation"}
_EFFECTS |= {"begin_comparison", "reserve", "begin_sending", "accept", "take_off"}
"""Where a process may end; leases are not among them, since waiting for one to end would only take time."""


class _Watched:
    def __init__(self, found: Any, name: str, mortal: Mortal) -> None:
        self._found, self._name, self._mortal = found, name, mortal

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._found, name)
        if name not in _EFFECTS:
            return value
        return lambda *args, **kwargs: self._mortal.call(f"{self._name}.{name}", lambda: value(*args, **kwargs))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_run_that_is_killed_anywhere_loses_no_arrival(house: ArrivalHouse, after: bool) -> None:
    """Killed before or after each of its effects, and never tried again: the next day's run bills all it had seen."""
    source = arriving("api_calls")
    struck: list[str] = []
    used(house, source, 1, "e0", 2, 1)
    house.increment(source, a_day(source, 5), manners=ALONE)
    for at in range(1, 200):
        # Two days with a gap, so that two statements are made; one of them is not over yet.
        used(house, source, 3 * at, f"a{at}", 2, 1)
        used(house, source, 3 * at + 1, f"b{at}", 4, 2)
        mortal = Mortal(at, after=after)
        house.watched = mortal.watch
        try:
            house.increment(source, a_day(source, 6), manners=ALONE)
        except Killed as end:
            struck.append(str(end))
        house.watched = lambda found, _name: found
        house.increment(source, a_day(source, 7), manners=ALONE)
        assert house.billed(source) == house.owed_by_account(source), struck[-1:]
        assert house.ledger.touched(source.name) == ()
        if not mortal.struck:
            break
    assert {name.split(".")[1] for name in struck} == _EFFECTS
    assert house.accepted_by_day(source) == house.warehouse.owed(source.settings.timezone)


@pytest.mark.parametrize("late", [1, 2, 3], ids=["before the arrivals", "before the rows", "between two statements"])
def test_what_arrives_while_a_run_reads_is_billed_once(house: ArrivalHouse, late: int) -> None:
    """Arrivals are looked for before any row is read: one that comes in between is read too, and is seen again."""
    source = arriving("api_calls")
    used(house, source, 1, "e2", 2, 1)
    used(house, source, 2, "e4", 4, 2)
    used(house, source, 3, "e6", 6, 4)
    busy = BusyWarehouse(house.warehouse, late, lambda: arrive_on_three_days(house, source))
    house.watched = lambda found, name: busy if name == "warehouse" else found
    house.increment(source, a_day(source, 6))
    assert busy.connections == 4  # The arrivals, and the three days with a gap between each two.
    house.watched = lambda found, _name: found
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 777
    assert house.accepted_by_day(source) == house.warehouse.owed(source.settings.timezone)
    before = house.writing_requests(source)
    house.increment(source, a_day(source, 8))
    assert house.writing_requests(source) == before


def arrive_on_three_days(house: ArrivalHouse, source: BillingSource) -> None:
    """Let a late row come for each day."""
    for number, (day, quantity) in enumerate(((2, 110), (4, 220), (6, 440)), 10):
        used(house, source, number, f"late{day}", day, quantity)


class BusyWarehouse:
    """A warehouse in which something happens right before one of its connections is opened."""

    conn_type = "sqlite"
    placeholder = "?"

    def __init__(self, warehouse: Warehouse, at: int, happens: Callable[[], None]) -> None:
        self.connections = 0
        self._warehouse, self._at, self._happens = warehouse, at, happens

    def get_conn(self) -> Any:
        """Return a connection, after what happens."""
        self.connections += 1
        if self.connections == self._at:
            self._happens()
        return self._warehouse.get_conn()


def test_a_run_that_loses_its_lease_between_two_statements_hands_nothing_on(
    house: ArrivalHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may have read since, under a later number: this one is tried again, and the list has its days."""
    source = arriving("api_calls")
    used(house, source, 1, "e2", 2, 10)

    def lose() -> None:
        house.ahead += timedelta(minutes=5)
        taken = house.ledger.acquire(f"extract:{source.name}", "another", timedelta(milliseconds=1))
        assert taken is not None
        time.sleep(1.0)  # Until the lease should have been renewed.

    monkeypatch.setattr("usage_billing.arrivals._LEASE_LASTS", timedelta(seconds=1))
    busy = BusyWarehouse(house.warehouse, 3, lose)
    house.watched = lambda found, name: busy if name == "warehouse" else found
    with pytest.raises(NotApplied, match="lost on the way"):
        house.increment(source, a_day(source, 6))
    house.watched = lambda found, _name: found
    assert house.ledger.touched(source.name) == (a_day(source, 2),)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 10


def test_a_day_of_which_something_is_on_its_way_stays_on_the_list_and_no_other(house: ArrivalHouse) -> None:
    """What is owed beyond a doubt is not known yet: its day is compared again, once the doubt has ended."""
    source = arriving("api_calls")
    used(house, source, 1, "e2", 2, 10)
    used(house, source, 2, "e4", 4, 20)
    _, before = house.read(source, a_day(source, 3))
    assert before is not None
    (part,) = house.staging.read(house.plan(source, before, "before").proposals)
    house.ledger.reserve(source.name, SITES[source.name], before.reading, part.to_pandas())
    dead = house.ledger.acquire("deliver:dead", "dead", timedelta(seconds=6))
    assert dead is not None
    (ready,) = house.ledger.reserved(source.name, before.reading, 10)
    house.ledger.begin_sending([ready.token], dead)
    used(house, source, 3, "late", 2, 100)
    house.increment(source, a_day(source, 6), manners=Manners(patience=timedelta(milliseconds=100)))
    assert billed(house, source) == 20
    assert house.ledger.touched(source.name) == (a_day(source, 2),)
    house.ledger.release(dead)
    house.increment(source, a_day(source, 7))
    assert billed(house, source) == 130
    assert house.ledger.touched(source.name) == ()


def test_two_runs_at_once_bill_what_arrived_once(house: ArrivalHouse) -> None:
    """Both take up the same late row; the later reading has the say, and the earlier one's other days go their way."""
    source = arriving("api_calls")
    used(house, source, 1, "late", 2, 10)
    used(house, source, 2, "own", 6, 5)
    first, one = house.read(source, a_day(source, 6))
    second, other = house.read(source, a_day(source, 7))
    assert one is not None
    assert other is not None
    house.settle(source, second, other)
    with pytest.raises(Stale):
        house.settle(source, first, one)
    assert billed(house, source) == 15
    assert house.ledger.touched(source.name) == ()


def test_what_an_account_that_is_unknown_used_leaves_the_list_by_name(house: ArrivalHouse) -> None:
    """A quarantined row is on a list of its own: its day need not be read by every run from then on."""
    source = arriving(
        "api_calls", quarantine=arriving("api_calls").settings.quarantine.model_copy(update={"max_share": 1})
    )
    house.warehouse.put(1, "stranger", noon(source, 2), "acct-9999", 5)
    used(house, source, 2, "known", 2, 7)
    done = house.increment(source, a_day(source, 6))
    assert done.comparison is not None
    assert done.comparison.rows_quarantined == 1
    assert billed(house, source) == 7
    assert house.ledger.touched(source.name) == ()


DAYS, INCREMENTS, OVERLAP, SLOWEST = 90, 50, 20, 15


@dataclass(frozen=True)
class Change:
    """Something that happens to a row: it arrives, is corrected, marked as deleted, or vanishes, on some day."""

    day: float
    event: str
    used_on: int
    account: str
    quantity: int
    kind: str = "put"


def history(source: BillingSource, seed: int) -> list[list[tuple[int, Change]]]:
    """Return 90 days of changes with their arrivals, by increment, in the order in which they become visible.

    A third of the rows arrives late, by up to two months; a twentieth is corrected; some are marked as deleted, and
    some vanish. Ids are given out in order, and a row may become visible after up to `SLOWEST` later ones.
    """
    chance = random.Random(f"{source.name}/{seed}")  # noqa: S311 - a history, no secret.
    changes = []
    for day in range(DAYS):
        for number in range(4):
            account = (ACCOUNT, OTHER)[number % 2][source.name]
            event = f"e{day}-{number}"
            seen = day + chance.random() + (chance.uniform(1, 60) if chance.random() < 1 / 3 else 0)
            first = Change(min(seen, DAYS - 0.01), event, day, account, chance.randint(1, 50))
            changes.append(first)
            kind = chance.choices(["", "put", "mark", "vanish"], [0.89, 0.05, 0.04, 0.02])[0]
            if kind:
                later = min(first.day + chance.uniform(0.001, 40), DAYS - 0.001)
                changes.append(replace(first, day=later, kind=kind, quantity=chance.randint(1, 50)))
    changes.sort(key=lambda change: change.day)
    arriving = [(number + chance.randint(0, SLOWEST), number, change) for number, change in enumerate(changes, 1)]
    # What happens to one row happens in order, however slow its first transaction was.
    last: dict[str, int] = {}
    for place, (visible, number, change) in enumerate(arriving):
        last[change.event] = max(visible, last.get(change.event, 0))
        arriving[place] = (last[change.event], number, change)
    visible = [(number, change) for _, number, change in sorted(arriving, key=lambda each: each[:2])]
    # As many are visible at the end of an increment as had begun: the slow ones come to the next.
    begun = [sum(change.day < place * DAYS / INCREMENTS for change in changes) for place in range(INCREMENTS + 1)]
    return [visible[start:end] for start, end in pairwise(begun)]


def happen(house: ArrivalHouse, source: BillingSource, changes: list[tuple[int, Change]]) -> set[tuple[str, str]]:
    """Carry changes out in the warehouse; return the accounts and days of which a row vanished without a trace."""
    vanished = set()
    for number, change in changes:
        day = source.settings.bill_from + timedelta(days=change.used_on)
        if change.kind == "put":
            noon = local_midnight(day, source.settings.timezone) + timedelta(hours=12)
            house.warehouse.put(number, change.event, noon, change.account, change.quantity)
        elif change.kind == "mark":
            house.warehouse.delete(change.event, number)
        else:
            house.warehouse.delete(change.event)
            vanished.add((change.account, day.isoformat()))
    return vanished


@pytest.mark.parametrize("name", sorted(ACCOUNT))
def test_ninety_days_in_fifty_increments_and_a_rescan_bill_what_is_owed(tmp_path: Path, name: str) -> None:
    """Whatever came late, was corrected or is gone, each account and day is billed, and little is read."""
    source = arriving(name, OVERLAP, rescan=DAYS)
    first, zone = source.settings.bill_from, source.settings.timezone
    days = [timedelta(days=round(place * DAYS / INCREMENTS)) for place in range(INCREMENTS + 1)]
    intervals = [Period(*edges) for edges in pairwise(local_midnight(first + day, zone) for day in days)]
    with an_arrival_house(tmp_path, now="2027-01-05T12:00:00Z", until="2027-10-01") as house:
        vanished: set[tuple[str, str]] = set()
        for changes, interval in zip(history(source, 1), intervals, strict=True):
            vanished |= happen(house, source, changes)
            before = house.warehouse.rows_read
            taken = house.increment(source, interval).taken
            # Each row that arrived, or lies in the overlap, makes one day be read; and so do the run's own days.
            assert taken.arrived <= len(changes) + OVERLAP
            assert len(taken.periods) <= taken.arrived + 2
            assert house.warehouse.rows_read - before == taken.arrived + house.warehouse.rows_in(taken.periods)
        assert set() != differing(house, source) <= vanished
        house.increment(source, interval, rescan=True)
        assert differing(house, source) == set()
        assert house.billed(source) == house.owed_by_account(source)
        assert reconcile(house.destination(source), house.ledger, source.recent_periods(interval.end)).ties_out
        assert house.ledger.touched(source.name) == ()
        before = house.writing_requests(source)
        house.increment(source, interval, rescan=True)
        house.increment(source, interval)
        assert house.writing_requests(source) == before


def differing(house: ArrivalHouse, source: BillingSource) -> set[tuple[str, str]]:
    """Return the accounts and days of which the ledger has not billed what the warehouse owes."""
    owed = {key: total for key, total in house.warehouse.owed(source.settings.timezone).items() if total}
    ours = house.accepted_by_day(source)
    return {key for key in owed.keys() | ours.keys() if owed.get(key) != ours.get(key)}
