"""Raw events against the sandbox: each row is billed once, or listed by name, whatever happens on the way."""

import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stories import CHECKOUT, SITES, Event, House, a_day, shipped, small_batches
from usage_billing.approve import Approved, turn_down
from usage_billing.deliver import Delivered, Manners
from usage_billing.destinations.maxio import MaxioEvents
from usage_billing.errors import Misconfigured, NeedsDecision, Stale
from usage_billing.ledger import Ledger
from usage_billing.preview import digest_of
from usage_billing.reconcile import reconcile
from usage_billing.records import UNAPPROVED, Comparison, Decision, Period, Plan, State
from usage_billing.sandbox import Sandbox
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource

SITE = SITES["platform_events"]
BRIEF = Manners(threads=4, lease_lasts=timedelta(seconds=3), patience=timedelta(milliseconds=200))
HUNDRED = 100


class RawHouse(House):
    """A house whose billing periods last as long as its world says, and whose ledger lives on the sandbox's time."""

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        super().__init__(sandbox, folder)
        self.folder = folder
        self.ledger.close()
        self._ahead = sandbox.now() - datetime.now(UTC)
        self.ledger = Ledger.connect(self.ledger_url, clock=lambda: datetime.now(UTC) + self._ahead)

    def days_pass(self, days: int) -> None:
        """Move both clocks."""
        self.sandbox.move_clock(advance_seconds=timedelta(days=days).total_seconds())
        self._ahead += timedelta(days=days)

    def archived(self) -> list[Path]:
        """Return the files of the archive."""
        return sorted((self.folder / "archive").rglob("*.parquet"))

    def listed(self, source: BillingSource, interval: Period) -> list[tuple[str, str, str]]:
        """Return the state, quantity and reason of what is open in the ledger."""
        window = Period.around(source.periods(interval))
        left = self.ledger.open_items(source.name, window)
        return list(zip(left["state"], left["quantity"], left["reason"], strict=True))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped events site, billed by the year: what comes late still finds its billing period open."""
    text = (CHECKOUT / "include" / "sandbox" / "worlds" / "orbit.yaml").read_text(encoding="utf-8")
    yearly = text.replace("end: 2026-11-01", "end: 2027-10-01")
    assert yearly != text
    path = tmp_path_factory.mktemp("world") / "orbit.yaml"
    path.write_text(yearly, encoding="utf-8")
    return path


@pytest.fixture
def house(world: Path, tmp_path: Path) -> Iterator[RawHouse]:
    """A sandbox of yearly billing periods, a ledger, staging and an archive."""
    yield from opened([world], tmp_path)


@pytest.fixture
def monthly(tmp_path: Path) -> Iterator[RawHouse]:
    """The same with the shipped world, which bills by the month."""
    yield from opened([CHECKOUT / "include" / "sandbox" / "worlds" / "orbit.yaml"], tmp_path)


def opened(worlds: Sequence[Path], folder: Path) -> Iterator[RawHouse]:
    """Open a house, and close it again."""
    with Sandbox(worlds) as sandbox:
        house = RawHouse(sandbox, folder)
        try:
            yield house
        finally:
            house.ledger.close()


def raw(metric: str = "sum", period: str = "day", **changes: Any) -> BillingSource:
    """Return the shipped source of events, billed by raw events."""
    shipped_one = shipped("platform_events")
    destination = shipped_one.destination.model_copy(update={"mode": "events", "metric": metric})
    return replace(
        shipped_one,
        destination=destination,
        settings=shipped_one.settings.model_copy(update={"period": period, **changes}),
    )


def counted() -> BillingSource:
    """Return a source whose stream counts its events: they have no quantity, and name the subscription's id."""
    source = raw("count")
    destination = source.destination.model_copy(
        update={"stream": "raw-events", "subscription_by": "subscription_id", "component": "handle:raw-count"}
    )
    columns = source.settings.columns.model_copy(update={"quantity": None})
    meter = source.settings.meter.model_copy(update={"function": "count", "decimals": 0})
    own = source.settings.model_copy(update={"columns": columns, "meter": meter, "dimensions": ()})
    return replace(source, destination=destination, settings=own, expectations=())


DAY = a_day(raw(), 5)


def events(number: int, prefix: str = "e", interval: Period = DAY, quantity: str = "1.5") -> list[Event]:
    """Make events of three accounts, seconds apart from eight in the morning on."""
    start = interval.start + timedelta(hours=8)
    return [
        Event(f"{prefix}{n}", f"orbit-0{n % 3 + 1}", quantity, start + timedelta(seconds=n), ("eu", "premium"))
        for n in range(number)
    ]


def owed(rows: Iterable[Event]) -> dict[str, Decimal]:
    """Return what events come to, by account, where the metric is a sum."""
    sums: dict[str, Decimal] = {}
    for row in rows:
        assert row.account is not None
        sums[row.account] = sums.get(row.account, Decimal(0)) + Decimal(row.quantity)
    return sums


def stored(house: House) -> int:
    """Return how many events the site holds."""
    return len(house.sandbox.records(SITE))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut chunks of a hundred events, so that a test needs few of them."""
    monkeypatch.setattr(MaxioEvents, "events_to_chunk", HUNDRED)


def reserved(house: House, source: BillingSource, comparison: Comparison, folder: str) -> int:
    """Write a plan down as a deliver does before it dies; return how many chunks it has."""
    written = 0
    for part in house.staging.read(house.plan(source, comparison, folder).proposals):
        written += house.ledger.reserve(source.name, SITE, comparison.reading, part.to_pandas()).written
    return written


def left_in_the_air(house: House, source: BillingSource, comparison: Comparison, arrive: int) -> None:
    """Claim all reserved chunks as a worker that then dies; the first `arrive` of them reach the site."""
    dead = house.ledger.acquire("deliver:dead", "dead", timedelta(milliseconds=50))
    assert dead is not None
    ready = house.ledger.reserved(source.name, comparison.reading, 100)
    house.ledger.begin_sending([delivery.token for delivery in ready], dead)
    for delivery in ready[:arrive]:
        house.destination(source).send([delivery])
    house.ledger.release(dead)


def test_each_row_is_billed_at_its_own_time_and_the_same_day_again_sends_nothing(house: RawHouse) -> None:
    """A day of 2,500 events makes three requests; a second run finds each of them in the archive."""
    source, rows = raw(), events(2500)
    rows[7] = replace(rows[7], time=rows[7].time + timedelta(microseconds=125))
    done = house.run(source, DAY, rows)
    assert (done.accepted, done.requests) == (3, 3)
    assert house.billed(source) == owed(rows)
    assert {record["timestamp"] for record in house.sandbox.records(SITE)} == {row.time.isoformat() for row in rows}
    assert house.reconcile(source, DAY).matched == 3
    before = house.writing_requests(source)
    again = house.run(source, DAY, reversed(rows))
    assert (again.accepted, house.writing_requests(source)) == (0, before)
    assert house.states(source, DAY) == {"accepted": 3}
    assert house.reconcile(source, DAY).ties_out


@pytest.mark.usefixtures("small_chunks")
def test_a_late_event_sends_only_itself_also_when_the_site_has_forgotten_the_others(house: RawHouse) -> None:
    """The archive tells what was sent: forty days later a token of the site's would protect nothing any more."""
    source, rows = raw(), events(250)
    house.run(source, DAY, rows)
    rows += events(1, "late")
    house.run(source, DAY, rows)
    assert stored(house) == 251
    house.days_pass(40)
    rows += events(2, "very-late")
    done = house.run(source, DAY, rows)
    assert (done.requests, stored(house)) == (1, 253)
    assert house.billed(source) == owed(rows)
    assert house.reconcile(source, DAY).ties_out


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    "fault",
    [
        "lost_reply", "reset", "server_error", "server_error_after_commit", "throttle", "partial_bulk",
        "truncated_body",
    ],
)  # fmt: skip
def test_whatever_becomes_of_a_reply_each_event_is_billed_once(house: RawHouse, fault: str) -> None:
    """What may have arrived is sent again in the same words, and the stream ignores what it holds."""
    source, rows = raw(), events(450)
    house.sandbox.fault(SITE, fault, count=3)
    done = house.run(source, DAY, rows)
    assert house.billed(source) == owed(rows)
    assert stored(house) == len(rows)
    assert house.states(source, DAY) == {"accepted": 5}
    if fault != "truncated_body":  # A 201 has no body that could be cut short.
        assert done.not_applied + done.doubted > 0, "the fault was never met, so this proved nothing"
    assert house.reconcile(source, DAY).ties_out


@pytest.mark.usefixtures("small_chunks")
def test_what_a_dead_worker_sent_without_a_receipt_is_replayed_and_billed_once(house: RawHouse) -> None:
    """Two of three chunks had reached the site when the worker died: all three are settled by the same words."""
    source, rows = raw(), events(250)
    comparison, folder = house.totals(source, DAY, rows)
    assert reserved(house, source, comparison, folder) == 3
    left_in_the_air(house, source, comparison, arrive=2)
    house.deliver(source, comparison, folder)
    assert house.billed(source) == owed(rows)
    assert house.states(source, DAY) == {"accepted": 3}


@pytest.mark.usefixtures("small_chunks")
def test_another_batch_size_and_other_chunks_between_tries_bill_each_event_once(
    house: RawHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A try that died half-way is gone on with by a package that reads and cuts otherwise."""
    source, rows = raw(), events(450)
    comparison, folder = house.totals(source, DAY, rows)
    reserved(house, source, comparison, folder)
    living = house.ledger.acquire("deliver:first", "first", timedelta(seconds=30))
    assert living is not None
    for delivery in house.ledger.reserved(source.name, comparison.reading, 2):
        house.ledger.begin_sending([delivery.token], living)
        house.ledger.accept(house.destination(source).send([delivery]), living)
    monkeypatch.setattr(MaxioEvents, "events_to_chunk", 70)
    other = small_batches(source, 30)
    house.deliver(other, comparison, folder)
    assert house.billed(source) == owed(rows)
    assert stored(house) == len(rows)
    assert house.states(source, DAY)["superseded"] == 3
    assert house.states(source, DAY)["accepted"] > 5
    before = house.writing_requests(source)
    house.run(small_batches(source, 1), DAY, rows[:200] + rows[:199:-1])
    assert house.writing_requests(source) == before


@pytest.mark.usefixtures("small_chunks")
def test_twins_that_cut_different_chunks_bill_each_event_once(house: RawHouse, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that rests on chunks which another has written down since is made again, before anything is sent."""
    source, rows = raw(), events(450)
    comparison, folder = house.totals(source, DAY, rows)
    first = house.plan(source, comparison, folder)
    monkeypatch.setattr(MaxioEvents, "events_to_chunk", 70)
    house.deliver(source, comparison, folder)
    before = house.writing_requests(source)
    house.deliver(source, comparison, folder, first=first)
    assert house.writing_requests(source) == before
    assert house.billed(source) == owed(rows)
    assert house.states(source, DAY) == {"accepted": 7}


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("seed", range(4))
def test_twins_at_once_bill_each_event_once(house: RawHouse, seed: int) -> None:
    """Four tasks plan and deliver one extraction at the same time, from plans made at different moments."""
    source, rows = raw(), events(450)
    house.run(source, DAY, rows[: 100 * seed])
    comparison, folder = house.totals(source, DAY, rows)
    failures: list[BaseException] = []

    def run(first: bool) -> None:
        try:
            plan = house.plan(source, comparison, folder) if first else None
            house.deliver(source, comparison, folder, first=plan)
        except BaseException as error:  # noqa: BLE001 - whatever a twin meets, the test has to see it.
            failures.append(error)

    twins = [threading.Thread(target=run, args=(number % 2 == 0,)) for number in range(4)]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join()
    assert not failures
    assert house.billed(source) == owed(rows)
    assert stored(house) == len(rows)
    assert house.states(source, DAY).keys() <= {"accepted", "superseded"}


@pytest.mark.usefixtures("small_chunks")
def test_an_older_extraction_sends_nothing_and_its_chunks_are_replaced(house: RawHouse) -> None:
    """What an overtaken extraction had reserved is cut anew by the newer one; its late deliver finds itself stale."""
    source, rows = raw(), events(250)
    old, old_folder = house.totals(source, DAY, rows[:150])
    old_plan = house.plan(source, old, old_folder)
    assert reserved(house, source, old, old_folder) == 2
    house.run(source, DAY, rows)
    with pytest.raises(Stale):
        house.deliver(source, old, old_folder, first=old_plan)
    assert house.billed(source) == owed(rows)
    assert house.states(source, DAY) == {"accepted": 3, "superseded": 2}


@pytest.mark.usefixtures("small_chunks")
def test_the_same_chunks_of_a_newer_extraction_get_a_new_revision_and_go(house: RawHouse) -> None:
    """A run that was reserved and never delivered is run again: the content is the same, the extraction is not."""
    source, rows = raw(), events(150)
    old, folder = house.totals(source, DAY, rows)
    reserved(house, source, old, folder)
    house.run(source, DAY, rows)
    assert house.states(source, DAY) == {"accepted": 2, "superseded": 2}
    assert house.billed(source) == owed(rows)


@pytest.mark.usefixtures("small_chunks")
def test_a_doubt_of_last_month_stays_listed_and_blocks_nothing_else(house: RawHouse) -> None:
    """Beyond the replay window a chunk is neither sent again nor taken for sent; a late event beside it goes."""
    source, rows = raw(), events(100)
    comparison, folder = house.totals(source, DAY, rows)
    reserved(house, source, comparison, folder)
    left_in_the_air(house, source, comparison, arrive=1)
    house.ledger.doubt_abandoned(source.name)
    house.days_pass(31)
    late = events(1, "late")
    before = house.writing_requests(source)
    house.run(source, DAY, rows + late, manners=BRIEF)
    assert house.writing_requests(source) == before + 1
    assert [state for state, *_ in house.listed(source, DAY)] == ["in_doubt"]
    assert house.billed(source) == owed(rows + late)


@pytest.mark.usefixtures("small_chunks")
def test_a_sweep_replays_a_chunk_in_doubt(house: RawHouse) -> None:
    """What a dead worker left is settled without a run of its own."""
    source, rows = raw(), events(250)
    comparison, folder = house.totals(source, DAY, rows)
    reserved(house, source, comparison, folder)
    left_in_the_air(house, source, comparison, arrive=1)
    house.ledger.doubt_abandoned(source.name)
    house.days_pass(1)
    swept = sweep(house.destination(source), house.ledger)
    assert (swept.settled.found, swept.still_open) == (3, ())
    assert house.billed(source) == owed(rows)
    assert stored(house) == len(rows)


def test_events_of_a_closed_billing_period_are_held_by_name(monthly: RawHouse) -> None:
    """October is invoiced: its late event is held as a chunk of its own, and stays that one."""
    source, rows = raw(), events(10)
    monthly.run(source, DAY, rows)
    monthly.days_pass(13)
    before = monthly.writing_requests(source)
    for _ in range(2):
        monthly.run(source, DAY, rows + events(2, "late"))
        ((state, quantity, reason),) = monthly.listed(source, DAY)
        assert (state, quantity) == ("held", "2")
        assert "never bill" in reason
    assert monthly.writing_requests(source) == before
    assert monthly.states(source, DAY) == {"accepted": 1, "held": 1}
    monthly.run(source, DAY, rows + events(3, "late"))
    assert [quantity for _, quantity, _ in monthly.listed(source, DAY)] == ["3"]
    assert monthly.billed(source) == owed(rows)


def late(policy: str, grace: str | None = "0h") -> BillingSource:
    """Return the source of raw events with a policy for late ones."""
    source = raw()
    keys = source.destination.model_dump() | {"late_usage": policy, "grace": grace}
    return replace(source, destination=type(source.destination).model_validate(keys))


@pytest.mark.parametrize("late_event", ["never_billed", "next_period"])
def test_late_events_are_billed_in_the_open_period_where_the_source_says_so(monthly: RawHouse, late_event: str) -> None:
    """Dated where the site bills them, they stay the rows that they are: sent once, months later, too."""
    monthly.sandbox.switch(SITE, late_event=late_event)
    rows, more = events(10), events(4, "late")
    monthly.run(raw(), DAY, rows)
    monthly.days_pass(13)
    monthly.run(raw(), DAY, rows + more)
    assert [state for state, _, _ in monthly.listed(raw(), DAY)] == ["held"]
    source = late("now")
    monthly.run(source, DAY, rows + more)
    assert monthly.billed(source) == owed(rows + more)
    assert (monthly.listed(source, DAY), stored(monthly)) == ([], 14)
    found = monthly.reconcile(source, DAY)
    assert found.ties_out, found.examples
    assert (found.matched, found.ours) == (6, Decimal(21)), "October and November of three subscriptions"
    before = monthly.writing_requests(source)
    for policy in (source, raw()):
        monthly.run(policy, DAY, rows + more)
        monthly.days_pass(31)
        monthly.run(policy, DAY, more + rows)
    assert (monthly.writing_requests(source), monthly.listed(source, DAY)) == (before, [])


def test_a_late_event_that_was_sent_is_told_to_have_changed_or_gone_as_any_other(monthly: RawHouse) -> None:
    """By what it is at its own time: another quantity has changed it, another billing period has not."""
    source, rows = late("now"), events(10)
    monthly.days_pass(13)
    monthly.run(source, DAY, rows)
    assert monthly.billed(source) == owed(rows)
    lenient = replace(source, settings=source.settings.model_copy(update={"max_withdraw_share": 1.0}))
    monthly.run(lenient, DAY, [replace(rows[0], quantity="7"), *rows[2:]])
    assert sorted(quantity for _, quantity, _ in monthly.listed(source, DAY)) == ["-1", "1"]
    told = " ".join(reason for _, _, reason in monthly.listed(source, DAY))
    assert "(e0)" in told
    assert "(e1)" in told
    monthly.run(lenient, DAY, rows)
    assert (monthly.listed(source, DAY), stored(monthly)) == ([], 10)


def test_late_events_are_refused_where_the_source_says_so_until_it_says_otherwise(monthly: RawHouse) -> None:
    """One row names them, run after run; a person writes it off, or another policy sends them."""
    source, rows = late("refuse"), events(10)
    monthly.run(source, DAY, rows)
    monthly.days_pass(13)
    before = monthly.writing_requests(source)
    for _ in range(2):
        monthly.run(source, DAY, rows + events(2, "late"))
        ((state, quantity, reason),) = monthly.listed(source, DAY)
        assert (state, quantity) == ("refused", "2")
        assert reason.startswith("never sent, as late_usage says: ")
    assert (monthly.states(source, DAY), monthly.writing_requests(source)) == ({"accepted": 1, "refused": 1}, before)
    monthly.run(late("now"), DAY, rows + events(2, "late"))
    assert monthly.billed(source) == owed(rows + events(2, "late"))
    monthly.run(source, DAY, rows + events(3, "late"))
    items = monthly.ledger.open_items(source.name, DAY)
    monthly.ledger.decide(items["token"].item(), State.WRITTEN_OFF, "somebody: never mind")
    monthly.run(late("now"), DAY, rows + events(3, "late"))
    assert (monthly.listed(source, DAY), stored(monthly)) == ([], 12)


@pytest.mark.parametrize(("grace", "held"), [("12h", ["3"]), (None, [])])
def test_the_grace_of_raw_events_is_reckoned_from_each_one(
    monthly: RawHouse, grace: str | None, held: list[str]
) -> None:
    """The last hours of October pass into November, or its whole last day; what is older is held as ever."""
    source, last = late("hold", grace), a_day(raw(), 31)
    evening = [replace(event, time=event.time + timedelta(hours=8)) for event in events(3, "evening", last)]
    morning = events(3, "morning", last)
    monthly.days_pass(13)
    monthly.run(source, last, evening + morning)
    assert monthly.billed(source) == owed(evening if held else evening + morning)
    assert [(state, quantity) for state, quantity, _ in monthly.listed(source, last)] == [("held", one) for one in held]
    before = monthly.writing_requests(source)
    monthly.run(source, last, morning + evening)
    assert monthly.writing_requests(source) == before
    assert monthly.reconcile(source, last).ties_out


@pytest.mark.parametrize(("period", "schedule"), [("day", "0 * * * *"), ("month", "0 0 * * *"), ("month", "0 0 1 * *")])
def test_the_last_raw_events_pass_whole_however_often_the_schedule_ticks(
    monthly: RawHouse, period: str, schedule: str
) -> None:
    """An event goes with the run at the end of its usage period, and not with one of its own hour."""
    source, last = late("hold", None), a_day(raw(), 31)
    source = replace(source, settings=source.settings.model_copy(update={"period": period, "schedule": schedule}))
    rows = events(3, "morning", last)
    monthly.days_pass(13)
    monthly.run(source, last, rows)
    assert monthly.billed(source) == owed(rows)
    assert monthly.listed(source, last) == []


def test_a_renewal_between_reserving_and_sending_holds_the_chunk(monthly: RawHouse) -> None:
    """The key was revoked for a while, and the site renewed: what would never be billed stays one row, unsent."""
    source, rows = raw(), events(10)
    comparison, folder = monthly.totals(source, DAY, rows)
    monthly.sandbox.fault(SITE, "unauthorized", count=4)
    with pytest.raises(Misconfigured):
        monthly.deliver(source, comparison, folder)
    monthly.sandbox.clear_faults()
    monthly.days_pass(13)
    before = monthly.writing_requests(source)
    for _ in range(2):
        monthly.deliver(source, comparison, folder)
        assert monthly.states(source, DAY) == {"held": 1}
    assert (monthly.writing_requests(source), monthly.billed(source)) == (before, {})
    ((_, quantity, reason),) = monthly.listed(source, DAY)
    assert quantity == "10"
    assert "clear the run from validate" in reason


def test_a_doubt_whose_billing_period_closed_is_not_replayed(monthly: RawHouse) -> None:
    """If the first request was lost, a replay now would be taken and never billed: it stays in doubt by name."""
    source, rows = raw(), events(10)
    comparison, folder = monthly.totals(source, DAY, rows)
    reserved(monthly, source, comparison, folder)
    left_in_the_air(monthly, source, comparison, arrive=0)
    monthly.days_pass(13)
    before = monthly.writing_requests(source)
    monthly.deliver(source, comparison, folder, manners=BRIEF)
    assert monthly.writing_requests(source) == before
    assert [state for state, *_ in monthly.listed(source, DAY)] == ["in_doubt"]


@pytest.mark.usefixtures("small_chunks")
def test_events_that_vanished_or_changed_are_listed_by_name_and_never_sent(house: RawHouse) -> None:
    """No call takes an event back or changes it: one row for each kind, the same one until the list changes."""
    source, rows = raw(), events(250)
    house.run(source, DAY, rows)
    before, billed = house.writing_requests(source), house.billed(source)
    now = [replace(row, quantity="9") if row.event_id in {"e5", "e6"} else row for row in rows[:247]]
    house.run(source, DAY, now)
    (gone, changed) = sorted(house.listed(source, DAY), key=lambda row: row[1])
    assert (gone[:2], changed[:2]) == (("held", "-3"), ("held", "2"))
    assert all(f"e{n}" in gone[2] for n in (247, 248, 249))
    assert "e5" in changed[2]
    assert "e6" in changed[2]
    tokens = set(house.ledger.open_items(source.name, DAY)["token"])
    house.run(source, DAY, now)
    assert set(house.ledger.open_items(source.name, DAY)["token"]) == tokens
    assert house.writing_requests(source) == before
    assert house.billed(source) == billed
    assert house.reconcile(source, DAY).ties_out, "the site counts what it was sent, and so does the archive"
    house.run(source, DAY, rows)
    assert house.listed(source, DAY) == []
    assert house.states(source, DAY) == {"accepted": 3, "superseded": 2}
    # And once more: a list that was there before is a new revision, not a clash of names.
    house.run(source, DAY, now)
    assert len(house.listed(source, DAY)) == 2


def test_a_run_from_which_much_has_vanished_stops_and_asks(house: RawHouse) -> None:
    """A warehouse that lost half a day is rather broken than right."""
    source, rows = raw(), events(100)
    house.run(source, DAY, rows)
    with pytest.raises(NeedsDecision, match="50 of 100 events"):
        house.run(source, DAY, rows[:50])
    assert house.states(source, DAY) == {"accepted": 1}


def test_rows_in_quarantine_are_named_beside_what_vanished(house: RawHouse) -> None:
    """An event that is sound no more is not taken for gone without a word."""
    source, rows = raw(quarantine=raw().settings.quarantine.model_copy(update={"max_share": 1.0})), events(100)
    house.run(source, DAY, rows)
    house.run(source, DAY, [replace(rows[0], quantity="-1"), *rows[1:]])
    ((_, quantity, reason),) = house.listed(source, DAY)
    assert quantity == "-1"
    assert "1 rows of this run are in quarantine" in reason


def test_a_run_whose_rows_are_all_in_quarantine_lists_what_it_had_billed(house: RawHouse) -> None:
    """No row is sound any more, and a person has said that this may be: every event is listed, none is sent."""
    quarantine = raw().settings.quarantine.model_copy(update={"max_share": 1.0})
    source, rows = raw(quarantine=quarantine, max_withdraw_share=1.0), events(30)
    house.run(source, DAY, rows)
    house.run(source, DAY, [replace(row, quantity="-1") for row in rows])
    ((_, quantity, _),) = house.listed(source, DAY)
    assert quantity == "-30"
    assert stored(house) == 30


def test_an_event_whose_time_moved_to_another_period_has_changed(house: RawHouse) -> None:
    """By its id it was sent: it neither vanishes from the one hour nor goes again for the other."""
    source, rows = raw(period="hour"), events(20)
    house.run(source, DAY, rows)
    before = house.writing_requests(source)
    house.run(source, DAY, [replace(rows[0], time=rows[0].time + timedelta(hours=3)), *rows[1:]])
    ((_, quantity, reason),) = house.listed(source, DAY)
    assert (quantity, house.writing_requests(source)) == ("1", before)
    assert "changed" in reason


def test_one_event_id_on_two_days_is_billed_once_and_told(house: RawHouse) -> None:
    """Two runs that do not see each other send it twice; the stream takes the first, the tie-out tells of the other."""
    source, rows = raw(), events(10)
    next_day = a_day(source, 6)
    house.run(source, DAY, rows)
    house.run(source, next_day, [*events(5, "f", next_day), replace(rows[0], time=rows[0].time + timedelta(days=1))])
    assert house.billed(source) == owed(rows + events(5, "f", next_day))
    window = Period.around(source.periods(next_day))
    found = reconcile(house.destination(source), house.ledger, window, pauses=())
    assert not found.ties_out
    assert found.missing == 1


def test_one_event_id_twice_in_a_run_is_sent_once(house: RawHouse) -> None:
    """Validation quarantines the later one of two rows with one id."""
    source, rows = raw(quarantine=raw().settings.quarantine.model_copy(update={"max_share": 1.0})), events(10)
    house.run(source, DAY, [*rows, replace(rows[0], time=rows[0].time + timedelta(hours=1))])
    assert house.billed(source) == owed(rows)
    assert stored(house) == 10


@pytest.mark.parametrize("damage", ["missing", "altered"])
@pytest.mark.usefixtures("small_chunks")
def test_a_damaged_archive_stops_the_run_before_anything_is_sent(house: RawHouse, damage: str) -> None:
    """Without what was sent nobody can tell what was not: the file is named, and put back it is as before."""
    source, rows = raw(), events(250)
    house.run(source, DAY, rows)
    victim = house.archived()[1]
    content = victim.read_bytes()
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(content[:-20] + bytes(20))
    before = house.writing_requests(source)
    with pytest.raises(Misconfigured, match=rf"{victim.name} .*restore it from a backup"):
        house.run(source, DAY, rows + events(1, "late"))
    assert house.writing_requests(source) == before
    victim.write_bytes(content)
    house.run(source, DAY, rows + events(1, "late"))
    assert house.billed(source) == owed(rows + events(1, "late"))


@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_a_chunk_that_is_damaged_before_it_is_sent_is_not_sent(house: RawHouse, damage: str) -> None:
    """Its row goes back to reserved, and no request leaves."""
    source, rows = raw(), events(50)
    comparison, folder = house.totals(source, DAY, rows)
    plan = house.plan(source, comparison, folder)
    (victim,) = house.archived()
    victim.unlink() if damage == "missing" else victim.write_bytes(b"PAR1")
    with pytest.raises(Misconfigured, match=victim.name):
        house.deliver(source, comparison, folder, first=plan)
    assert (house.states(source, DAY), house.writing_requests(source)) == ({"reserved": 1}, 0)


def test_a_stream_that_counts_is_billed_by_the_event(house: RawHouse) -> None:
    """Events without a quantity, in a stream whose metric counts them: by id, and tied out by their number."""
    source = counted()
    rows = [replace(row, account=f"5020000{row.account[-1]}", dimensions=()) for row in events(1100) if row.account]
    house.run(source, DAY, rows)
    assert house.billed(source) == {f"orbit-0{n}": Decimal(count) for n, count in ((1, 367), (2, 367), (3, 366))}
    assert house.reconcile(source, DAY).matched == 3
    before = house.writing_requests(source)
    house.run(source, DAY, rows)
    assert house.writing_requests(source) == before
    rows += [replace(rows[0], event_id="late")]
    house.run(source, DAY, rows)
    assert house.billed(source)["orbit-01"] == 368
    assert house.reconcile(source, DAY).ties_out


def test_a_metric_that_cannot_be_added_up_says_that_it_is_not_tied_out(house: RawHouse) -> None:
    """An average over many events is no sum of ours; that is told, and not taken for a match."""
    source = raw("average")
    house.run(source, DAY, events(10))
    found = house.reconcile(source, DAY)
    assert (found.matched, found.ties_out) == (0, True)
    assert "average" in found.note


@pytest.mark.usefixtures("small_chunks")
def test_a_chunk_that_the_site_refuses_goes_again_in_smaller_ones(
    house: RawHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refusal of many names nobody: the next plan sends its events by tenths, at last each alone."""
    monkeypatch.setattr(MaxioEvents, "events_to_chunk", 400)
    source, rows = raw(), events(400)
    house.sandbox.switch(SITE, events_size_limit="64_kb")
    done = house.run(source, DAY, rows)
    assert (done.refused, house.billed(source)) == (1, {})
    house.run(source, DAY, rows)
    assert house.billed(source) == owed(rows)
    assert house.states(source, DAY) == {"superseded": 1, "accepted": 10}


def test_an_event_that_the_site_refuses_alone_stays_refused_until_it_changes(
    house: RawHouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be refused again, so it is not sent again; mended, it goes under the same token."""
    monkeypatch.setattr(MaxioEvents, "events_to_chunk", 10)
    source, rows = raw(), events(9)
    too_large = replace(rows[0], dimensions=("x" * 70_000, "premium"))
    house.sandbox.switch(SITE, events_size_limit="64_kb")
    for _ in range(3):
        house.run(source, DAY, [too_large, *rows[1:]])
    assert [state for state, *_ in house.listed(source, DAY)] == ["refused"]
    assert house.billed(source) == owed(rows[1:])
    before = house.writing_requests(source)
    house.run(source, DAY, [too_large, *rows[1:]])
    assert house.writing_requests(source) == before
    house.run(source, DAY, rows)
    assert house.listed(source, DAY) == []
    assert house.billed(source) == owed(rows)


def test_totals_and_events_are_not_changed_into_each_other_under_history(house: RawHouse) -> None:
    """Events beside totals of the same days would bill them twice; what the metric computes may be corrected."""
    source = raw()
    house.run(source, DAY, events(3))
    with pytest.raises(Misconfigured, match="destination"):
        house.run(shipped("platform_events"), DAY, events(3))
    house.run(raw("average"), DAY, events(3))


def test_old_totals_keep_their_definition(house: RawHouse) -> None:
    """A source of totals that was registered before there were modes is still the same one."""
    assert "mode" not in shipped("platform_events").definition()["destination"]
    assert raw().definition()["destination"]["mode"] == "events"
    house.run(shipped("platform_events"), DAY, events(3))


@pytest.fixture
def installed(house: RawHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BillingSource]:
    """An Airflow installation whose one source sends the shipped sample's rows as raw events."""
    from usage_billing import installation  # noqa: PLC0415

    folder = tmp_path / "sources" / "platform_events"
    shutil.copytree(CHECKOUT / "include" / "sources" / "platform_events", folder)
    definition = (folder / "source.yaml").read_text(encoding="utf-8")
    (folder / "source.yaml").write_text(definition.replace("  property: units", "  property: units\n  mode: events"))
    with duckdb.connect(str(tmp_path / "usage.duckdb")) as connection:
        types = {"units": "DECIMAL(18, 4)", "occurred_at": "TIMESTAMPTZ"}
        connection.read_csv(f"{folder}/sample.csv", dtype=types).to_table("platform_events")
    extra = {"subdomain": "orbit", "events_url": house.sandbox.events_url, "settle_after_seconds": 1}
    connections = {
        "WAREHOUSE": {"conn_type": "duckdb", "host": f"{tmp_path}/usage.duckdb", "extra": {"read_only": True}},
        "USAGE_LEDGER": {"conn_type": "sqlite", "host": house.ledger_url.removeprefix("sqlite:///")},
        "MAXIO_ORBIT": {
            "conn_type": "maxio",
            "host": house.sandbox.maxio_url("orbit"),
            "password": "sandbox-orbit-key",
            "extra": extra,
        },
    }
    for name, values in connections.items():
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(values))
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(tmp_path / "sources"))
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__STAGING_PATH", f"file://{tmp_path}/staging")
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__ARCHIVE_PATH", f"file://{tmp_path}/archive")
    yield installation.billing_source("platform_events")
    installation.ledger().close()
    installation._ledger.cache_clear()


def run_tasks() -> None:
    """Run the six operators of the source for its day, as their tasks would."""
    from usage_billing import operators  # noqa: PLC0415

    reference = None
    for name in ("extract", "validate", "aggregate", "plan", "deliver", "reconcile"):
        operator = getattr(operators, f"{name.title()}Operator")(task_id=name, source="platform_events")
        operator.reference = json.loads(json.dumps(reference))
        interval = {"data_interval_start": DAY.start, "data_interval_end": DAY.end}
        reference = operator.execute({**interval, "params": {}})


@pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.
def test_the_operators_bill_the_sample_by_raw_events(house: RawHouse, installed: BillingSource) -> None:
    """Out of a warehouse, into an archive behind Airflow's own paths: as many events as there are sound rows."""
    run_tasks()
    assert house.billed(installed) == {"orbit-01": Decimal("50.670"), "orbit-02": Decimal("41.661")}
    assert stored(house) == 57
    assert len(house.archived()) == 3, "one chunk for each hour with usage"
    before = house.writing_requests(installed)
    run_tasks()
    assert house.writing_requests(installed) == before


@pytest.mark.parametrize("setting", ["refuse", "ignore"])
def test_events_that_are_too_old_for_the_site_are_told_either_way(house: RawHouse, setting: str) -> None:
    """No document limits their age: refused, they are a person's by name; taken and forgotten, the tie-out is red."""
    source = raw()
    house.sandbox.switch(SITE, event_age_limit=setting)
    house.days_pass(40)
    house.run(source, DAY, events(3))
    assert house.billed(source) == {}
    if setting == "ignore":
        found = house.reconcile(source, DAY)
        assert (found.ties_out, found.missing) == (False, 3)
        return
    ((state, quantity, reason),) = house.listed(source, DAY)
    assert (state, quantity) == ("in_doubt", "3")
    assert "too old" in reason
    assert all(event.event_id in reason for event in events(3))


def test_a_chunk_that_a_power_cut_left_torn_is_written_again(house: RawHouse) -> None:
    """Its row waits in the ledger, its file is empty: the run that cuts the same chunk mends it, and bills it once."""
    source = raw()
    rows = events(9)
    comparison, folder = house.totals(source, DAY, rows)
    assert reserved(house, source, comparison, folder) == 1
    (file,) = house.archived()
    os.truncate(file, 0)
    house.deliver(source, comparison, folder)
    assert house.billed(source) == owed(rows)
    assert house.run(source, DAY, rows).requests == 0


@pytest.mark.filterwarnings("default")
def test_a_refused_chunk_is_split_within_one_deliver_task(
    house: RawHouse, installed: BillingSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site takes less than a chunk at once: the same task sends it by tenths, and the run ends green."""
    house.sandbox.switch(SITE, events_size_limit="64_kb")
    monkeypatch.setattr("usage_billing.destinations.maxio.MaxioEvents._subscriber", wordy(MaxioEvents._subscriber))
    run_tasks()
    assert house.billed(installed) == {"orbit-01": Decimal("50.670"), "orbit-02": Decimal("41.661")}
    assert house.states(installed, DAY)["superseded"] >= 1


def wordy(write: Callable[[MaxioEvents, str], str]) -> Callable[[MaxioEvents, str], str]:
    """Return what names the subscription with 8 kB of padding beside it."""
    return lambda self, address: f'{write(self, address)},"padding":"{"x" * 8000}"'


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_extractions_end_with_every_event_billed_once(
    data: st.DataObject, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Parts of a day in any order, batch and chunk size, with faults on the way: at last each event was billed once."""
    rows = events(60)
    chance = random.Random(data.draw(st.integers(0, 10**6)))  # noqa: S311
    faults = ("lost_reply", "server_error", "server_error_after_commit", "throttle", "partial_bulk")
    with pytest.MonkeyPatch.context() as patch:
        for house in opened([world], tmp_path_factory.mktemp("house")):
            for _ in range(data.draw(st.integers(1, 5))):
                patch.setattr(MaxioEvents, "events_to_chunk", chance.choice((1, 7, 25, 1000)))
                source = small_batches(raw(max_withdraw_share=1.0), chance.choice((1, 9, 1000)))
                house.sandbox.fault(SITE, chance.choice(faults), count=chance.randint(1, 2), after=chance.randint(0, 3))
                house.run(source, DAY, chance.sample(rows, chance.randint(1, 60)))
            house.sandbox.clear_faults()
            done: Delivered = house.run(raw(), DAY, rows)
            assert done.doubted == 0
            assert house.billed(raw()) == owed(rows)
            assert stored(house) == len(rows)
            assert house.listed(raw(), DAY) == []


def test_a_day_between_two_that_are_compared_has_lost_no_event(house: RawHouse) -> None:
    """A day that was not read is in the ledger all the same: none of its events has vanished, the late one goes."""
    source = raw()
    days = [a_day(source, number) for number in (5, 6, 7)]
    whole = Period(days[0].start, days[2].end)
    rows = [event for number, day in enumerate(days) for event in events(30, prefix=f"d{number}-", interval=day)]
    house.run(source, whole, rows)
    late = events(1, prefix="late", interval=days[2])
    outer = [event for event in rows if not event.event_id.startswith("d1-")]
    periods = [period for day in (days[0], days[2]) for period in source.periods(day)]
    comparison, folder = house.totals(source, whole, outer + late, only=periods)
    plan = house.plan(source, comparison, folder)
    assert (plan.tally.new, plan.tally.held, plan.tally.withdrawn) == (1, 0, 0)
    house.deliver(source, comparison, folder, first=plan)
    assert house.listed(source, whole) == []
    assert house.billed(source) == owed(rows + late)


def decided(house: RawHouse, source: BillingSource, comparison: Comparison, plan: Plan, decision: Decision) -> Approved:
    """Answer the question about a plan; return what a deliver may send."""
    digest, _ = digest_of(plan.proposals, house.staging)
    written = house.ledger.record_decision(source.name, comparison.reading, digest, decision, "vera")
    if decision is not Decision.APPROVED:
        turn_down(plan, lambda: plan, written, house.destination(source), house.ledger, house.staging)
    return Approved(source.name, comparison.reading, plan.proposals, house.ledger, house.staging)


@pytest.mark.parametrize("again", ["the same reading", "a later one"])
def test_chunks_that_were_rejected_are_held_and_proposed_again(house: RawHouse, again: str) -> None:
    """Each chunk is listed by name with who said no, and a yes to a later plan bills each event once."""
    source, rows = raw(), events(250)
    comparison, folder = house.totals(source, DAY, rows)
    plan = house.plan(source, comparison, folder)
    approved = decided(house, source, comparison, plan, Decision.REJECTED)
    with pytest.raises(NeedsDecision, match="rejected by vera"):
        approved.check()
    listed = house.listed(source, DAY)
    assert sum(int(quantity) for _, quantity, _ in listed) == 250
    assert {(state, reason.startswith(UNAPPROVED)) for state, _, reason in listed} == {("held", True)}
    if again == "a later one":
        comparison, folder = house.totals(source, DAY, rows)
    plan = house.plan(source, comparison, folder)
    approved = decided(house, source, comparison, plan, Decision.APPROVED)
    approved.check()
    house.deliver(source, comparison, folder, first=plan)
    assert house.billed(source) == owed(rows)
    assert house.listed(source, DAY) == []
