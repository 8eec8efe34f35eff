"""The ledger's life: one that is missing, second, restored or of another version stops the run; adopt mends it.

The verdict is the sandbox's count: what it billed, and how many requests could have changed that.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import pytest
import requests
from airflow.sdk import ObjectStoragePath
from airflow.sdk.io import attach
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy import create_engine, text

from living import LivingHouse
from stories import GENTLE, SITES, WORLDS, Event, a_day, a_house, shipped
from usage_billing.adopt import REVISIONS_AHEAD
from usage_billing.cli import main
from usage_billing.days import periods_of, span_of
from usage_billing.destinations.maxio import MaxioSite
from usage_billing.errors import Misconfigured, NotApplied, Stale
from usage_billing.ledger import ADOPTED, Ledger, marker
from usage_billing.ledger.marker import confirm
from usage_billing.records import NOBODY_CAN_TELL, Comparison, Delivery, Period, State
from usage_billing.sandbox import Sandbox
from usage_billing.sandbox.clock import to_micros
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging
from usage_billing.uniqueness import uniqueness_token

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.

ACCOUNTS = {
    "api_calls": ("acct-0001", "acct-0002", "acct-0003"),
    "platform_events": ("orbit-01", "orbit-02", "orbit-03"),
    "voip_minutes": ("pkg-001", "pkg-002", "pkg-003"),
}
LISTED = ("api_calls", "voip_minutes")
"""Sources whose site lists its records one by one."""


@pytest.fixture
def house(tmp_path: Path) -> Iterator[LivingHouse]:
    """A sandbox, a ledger that can be lost, and staging."""
    with a_house(tmp_path, LivingHouse) as found:
        assert isinstance(found, LivingHouse)
        yield found


@pytest.fixture(params=sorted(ACCOUNTS))
def source(request: pytest.FixtureRequest) -> BillingSource:
    """Each of the shipped sources."""
    return shipped(request.param)


@pytest.fixture(params=LISTED)
def listed(request: pytest.FixtureRequest) -> BillingSource:
    """Each of the shipped sources whose site lists its records."""
    return shipped(request.param)


def event(source: BillingSource, account: int, day: int, quantity: str, hour: int = 8) -> Event:
    """Make one event of one of the source's three accounts."""
    name = ACCOUNTS[source.name][account]
    time = a_day(source, day).start + timedelta(hours=hour)
    return Event(f"{name}-{day}-{hour}", name, quantity, time, ("eu", "premium")[: len(source.settings.dimensions)])


def a_week(source: BillingSource) -> dict[int, list[Event]]:
    """Return three days of usage, by day; whole numbers."""
    return {
        5: [event(source, 0, 5, "3"), event(source, 1, 5, "10")],
        6: [event(source, 0, 6, "4"), event(source, 2, 6, "8")],
        7: [event(source, 1, 7, "2"), event(source, 2, 7, "5")],
    }


def run_all(house: LivingHouse, source: BillingSource, events: dict[int, list[Event]]) -> None:
    """Run every day that has events."""
    for day, some in events.items():
        house.run(source, a_day(source, day), some)


def in_all(events: dict[int, list[Event]]) -> list[Event]:
    """Return the events of all days."""
    return [one for some in events.values() for one in some]


def owed(events: dict[int, list[Event]]) -> dict[str, Decimal]:
    """Return what the events come to, by account."""
    sums: dict[str, Decimal] = {}
    for one in in_all(events):
        sums[str(one.account)] = sums.get(str(one.account), Decimal(0)) + Decimal(one.quantity)
    return sums


def bill_with_a_backup_in_between(house: LivingHouse, source: BillingSource) -> tuple[Path, dict[int, list[Event]]]:
    """Bill two days, copy the ledger, then bill a late row of the first day and a third day."""
    events = a_week(source)
    run_all(house, source, {day: events[day] for day in (5, 6)})
    copy = house.backup()
    events[5].append(event(source, 0, 5, "7", hour=11))
    run_all(house, source, {day: events[day] for day in (5, 7)})
    assert house.billed(source) == owed(events)
    return copy, events


# --- noticed ---------------------------------------------------------------------------------------------------------


def test_a_ledger_from_a_backup_stops_the_next_run_which_names_the_mend(
    house: LivingHouse, source: BillingSource
) -> None:
    """What the copy has forgotten would be billed again: nothing is sent, however often the task is tried."""
    copy, events = bill_with_a_backup_in_between(house, source)
    before = house.writing_requests(source)
    house.restore(copy)
    for _ in range(12):  # More tries than the copy lacks extraction numbers.
        with pytest.raises(Misconfigured, match=r"restored from a backup.*usage-billing ledger adopt"):
            house.run(source, a_day(source, 5), events[5])
    assert house.writing_requests(source) == before


def test_a_new_ledger_beside_the_old_one_is_noticed(house: LivingHouse, source: BillingSource) -> None:
    """An empty ledger would bill everything again; the message names both ledgers."""
    events = a_week(source)
    run_all(house, source, events)
    before, first = house.writing_requests(source), house.ledger.ledger_id
    house.begin_anew()
    with pytest.raises(Misconfigured) as error:
        house.run(source, a_day(source, 5), events[5])
    for word in (first, house.ledger.ledger_id, f"usage-billing ledger adopt {source.name}"):
        assert word in str(error.value)
    assert house.writing_requests(source) == before


def test_a_copy_from_between_the_reading_and_the_sending_is_noticed(house: LivingHouse, listed: BillingSource) -> None:
    """The copy knows the newest extraction, but not that it was delivered: also a cleared deliver task stops."""
    events = a_week(listed)
    comparison, folder = house.totals(listed, a_day(listed, 5), events[5])
    plan = house.plan(listed, comparison, folder)
    copy = house.backup()
    house.deliver(listed, comparison, folder, first=plan)
    before = house.writing_requests(listed)
    house.restore(copy)
    with pytest.raises(Misconfigured, match="restored from a backup"):
        house.deliver(listed, comparison, folder, first=plan)
    with pytest.raises(Misconfigured, match="restored from a backup"):
        house.run(listed, a_day(listed, 5), events[5])
    assert house.writing_requests(listed) == before


def test_other_sources_that_use_a_restored_ledger_do_not_hide_it(house: LivingHouse) -> None:
    """Extraction numbers and leases are of all sources: one that grows past the mark does not make the copy current."""
    calls, minutes = shipped("api_calls"), shipped("voip_minutes")
    copy, events = bill_with_a_backup_in_between(house, calls)
    house.restore(copy)
    run_all(house, minutes, a_week(minutes) | {8: [event(minutes, 0, 8, "1")], 9: [event(minutes, 0, 9, "1")]})
    with pytest.raises(Misconfigured, match="restored from a backup"):
        house.run(calls, a_day(calls, 5), events[5])


def test_the_ledger_that_was_used_all_along_is_never_stopped(house: LivingHouse, source: BillingSource) -> None:
    """Runs side by side, and a backup that is only made, leave the mark in order."""
    events = a_week(source)
    failures: list[BaseException] = []

    def run(day: int) -> None:
        try:
            house.run(source, a_day(source, day), events[day])
        except BaseException as error:  # noqa: BLE001 - whatever a thread meets, the test has to see it.
            failures.append(error)

    threads = [threading.Thread(target=run, args=(day,)) for day in events]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    house.backup()
    run_all(house, source, events)
    assert not failures
    assert house.billed(source) == owed(events)


@pytest.mark.parametrize("where", ["file", "memory"])
def test_a_mark_is_kept_in_a_folder_and_in_a_bucket(tmp_path: Path, where: str) -> None:
    """Airflow's path objects keep the newest mark, whatever is behind them."""
    attach(protocol="memory", fs=MemoryFileSystem())
    staging = Staging(
        ObjectStoragePath({"file": f"file://{tmp_path}/staging", "memory": f"memory://{tmp_path}"}[where])
    )
    url = f"sqlite:///{tmp_path}/ledger.sqlite"
    Ledger.create(url)
    with closing(Ledger.connect(url)) as ledger:
        for number in (1, 3, 2):
            confirm(ledger, staging, "calls", number)
        found = marker.read(staging, "calls")
        assert found is not None
        assert (found.ledger, found.extraction) == (ledger.ledger_id, 3)
        staging.remember("calls/ledger.json", {"some": "thing else"})
        with pytest.raises(Misconfigured, match=r"calls/ledger\.json is no mark"):
            confirm(ledger, staging, "calls", 4)


# --- adopted ---------------------------------------------------------------------------------------------------------


def test_a_restored_ledger_that_adopted_sends_nothing_again(house: LivingHouse, listed: BillingSource) -> None:
    """The late row's revision and the third day come back from the site's records; all days again send nothing."""
    copy, events = bill_with_a_backup_in_between(house, listed)
    before = house.writing_requests(listed)
    house.restore(copy)
    found = house.adopt(listed, [5, 7], in_all(events))
    assert (found.entered, found.known, found.complete) == (3, 4, True)
    run_all(house, listed, events)
    assert house.writing_requests(listed) == before
    assert house.billed(listed) == owed(events)
    assert all(house.reconcile(listed, a_day(listed, day)).ties_out for day in events)


def test_an_empty_ledger_that_adopted_goes_on_where_the_lost_one_was(house: LivingHouse, listed: BillingSource) -> None:
    """Both revisions of the first day are entered; a later late row is billed as the third, and only it."""
    _, events = bill_with_a_backup_in_between(house, listed)
    before = house.writing_requests(listed)
    house.begin_anew()
    assert house.adopt(listed, [5, 7], in_all(events)).entered == 7
    run_all(house, listed, events)
    assert house.writing_requests(listed) == before
    events[5].append(event(listed, 0, 5, "1", hour=13))
    run_all(house, listed, events)
    assert house.writing_requests(listed) == before + 1
    assert house.billed(listed) == owed(events)
    first = [row[1:] for row in house.delivery_rows() if row[0] == ACCOUNTS[listed.name][0]]
    assert first[:3] == [(0, "accepted", "3"), (1, "accepted", "7"), (2, "accepted", "1")]


def test_what_was_billed_to_an_account_that_has_ended_since_is_adopted_too(
    house: LivingHouse, listed: BillingSource
) -> None:
    """Nothing more may be sent to it, and what was sent is on an invoice all the same."""
    events = a_week(listed)
    run_all(house, listed, events)
    house.begin_anew()
    end(house, listed)
    before = house.writing_requests(listed)
    found = house.adopt(listed, [5, 7], in_all(events))
    assert (found.entered, found.complete) == (sum(map(len, events.values())), True)
    assert len(house.ledger.accepted(listed.name, Period.around(listed.periods(a_day(listed, 5))))) > 0
    assert house.writing_requests(listed) == before


def test_adopting_twice_enters_nothing_more_and_a_dry_run_nothing_at_all(
    house: LivingHouse, listed: BillingSource
) -> None:
    """A dry run tells what the real one then does; the second real one finds all of it known."""
    _, events = bill_with_a_backup_in_between(house, listed)
    house.begin_anew()
    told = house.adopt(listed, [5, 7], in_all(events), dry_run=True)
    assert house.delivery_rows() == []
    assert house.adopt(listed, [5, 7], in_all(events)) == told
    again = house.adopt(listed, [5, 7], in_all(events))
    assert (again.entered, again.settled, again.known) == (0, 0, told.entered)
    with closing(sqlite3.connect(house.ledger_url.removeprefix("sqlite:///"))) as connection:
        reasons = connection.execute("SELECT DISTINCT reason FROM delivery").fetchall()
    assert [reason.startswith(f"{ADOPTED}2026-10-20 by ") for (reason,) in reasons] == [True]


def test_a_run_of_before_does_not_meet_the_numbers_of_a_restored_ledger(
    house: LivingHouse, listed: BillingSource
) -> None:
    """New extractions are numbered above all that staging has seen."""
    copy, events = bill_with_a_backup_in_between(house, listed)
    seen = marker.read(house.staging, listed.name)
    house.restore(copy)
    house.adopt(listed, [5, 7], in_all(events))
    comparison, _ = house.totals(listed, a_day(listed, 5), events[5])
    assert seen is not None
    assert comparison.reading.extraction > seen.extraction


def test_a_plan_of_before_the_loss_takes_nothing_back(house: LivingHouse, listed: BillingSource) -> None:
    """Its totals lack the late row that was billed since and adopted: its deliver, cleared, is stale."""
    events = a_week(listed)
    comparison, folder = house.totals(listed, a_day(listed, 5), events[5])
    house.deliver(listed, comparison, folder)
    copy = house.backup()
    events[5].append(event(listed, 1, 5, "1", hour=11))
    house.run(listed, a_day(listed, 5), events[5])
    before = house.writing_requests(listed)
    house.restore(copy)
    house.adopt(listed, [5, 5], events[5])
    with pytest.raises(Stale):
        house.deliver(listed, comparison, folder)
    assert house.writing_requests(listed) == before
    assert {row[2] for row in house.delivery_rows()} == {"accepted"}


def test_usage_that_is_gone_from_the_warehouse_is_listed_by_name(house: LivingHouse, listed: BillingSource) -> None:
    """The rest is entered, the refusal stays: what the record stands for nobody can say."""
    _, events = bill_with_a_backup_in_between(house, listed)
    house.begin_anew()
    gone = events[7].pop()
    found = house.adopt(listed, [5, 7], in_all(events))
    assert found.entered == 6
    (line,) = found.unmatched
    assert ": 5" in line
    assert "2026-10-07" in line
    with pytest.raises(Misconfigured, match="usage-billing ledger adopt"):
        house.run(listed, a_day(listed, 5), events[5])
    events[7].append(gone)
    assert house.adopt(listed, [5, 7], in_all(events)).complete
    house.run(listed, a_day(listed, 7), events[7])
    assert house.billed(listed) == owed(events)


def test_a_span_that_is_too_short_does_not_pass_for_the_whole(house: LivingHouse) -> None:
    """Maxio lists all usages of a subscription: those of the days that were left out match nothing."""
    source = shipped("api_calls")
    _, events = bill_with_a_backup_in_between(house, source)
    house.begin_anew()
    found = house.adopt(source, [6, 6], events[6])
    assert found.entered == 2
    assert len(found.unmatched) == 3


def sent_after_its_copy(house: LivingHouse, source: BillingSource, events: list[Event]) -> Path:
    """Send the fifth; return a copy of the ledger of just before, which has it as reserved."""
    comparison, folder = house.totals(source, a_day(source, 5), events)
    reserve(house, source, comparison, folder)
    copy = house.backup()
    house.deliver(source, comparison, folder)
    return copy


def in_doubt(copy: Path, **changes: str) -> None:
    """Put what a copy has as reserved in doubt, and change it."""
    columns = {"state": "in_doubt", "reason": f"{NOBODY_CAN_TELL}a story says so", **changes}
    sets = ", ".join(f"{name} = :{name}" for name in columns)
    with closing(sqlite3.connect(copy)) as kept, kept:
        kept.execute(f"UPDATE delivery SET {sets}, sent_at = reserved_at WHERE state = 'reserved'", columns)  # noqa: S608


def test_deliveries_that_were_only_reserved_in_the_copy_are_settled(house: LivingHouse, listed: BillingSource) -> None:
    """The copy was made just before the sending: what it has as reserved the site has by now."""
    events = a_week(listed)
    copy = sent_after_its_copy(house, listed, events[5])
    before = house.writing_requests(listed)
    house.restore(copy)
    found = house.adopt(listed, [5, 7], events[5])
    assert (found.entered, found.settled, found.complete) == (0, 2, True)
    house.run(listed, a_day(listed, 5), events[5])
    assert house.writing_requests(listed) == before
    assert {row[2] for row in house.delivery_rows()} == {"accepted"}


def test_what_was_replaced_after_the_copy_ends_as_superseded(house: LivingHouse, listed: BillingSource) -> None:
    """The copy holds revision 0 as reserved, the site revision 1 alone: the gap is looked over, and the key is free."""
    events = a_week(listed)
    comparison, folder = house.totals(listed, a_day(listed, 5), events[5][:1])
    reserve(house, listed, comparison, folder)
    copy = house.backup()
    more = [*events[5][:1], event(listed, 0, 5, "2", hour=12)]
    house.run(listed, a_day(listed, 5), more)
    before = house.writing_requests(listed)
    house.restore(copy)
    assert house.adopt(listed, [5, 5], more).entered == 1
    assert [row[1:] for row in house.delivery_rows()] == [(0, "superseded", "3"), (1, "accepted", "5")]
    house.run(listed, a_day(listed, 5), more)
    assert house.writing_requests(listed) == before
    house.run(listed, a_day(listed, 5), [*more, event(listed, 0, 5, "4", hour=14)])
    assert house.billed(listed) == {ACCOUNTS[listed.name][0]: Decimal(9)}


def reserve(house: LivingHouse, source: BillingSource, comparison: Comparison, folder: str) -> list[Delivery]:
    """Write a plan down as a deliver does before it sends; return what is ready."""
    for part in house.staging.read(house.plan(source, comparison, folder).proposals):
        house.ledger.reserve(source.name, house.destination(source).site, comparison.reading, part.to_pandas())
    return house.ledger.reserved(source.name, comparison.reading, 1000)


def test_another_quantity_than_the_ledger_has_is_told_and_not_settled(house: LivingHouse) -> None:
    """The site holds 6 under a token that the ledger reserved with 3: a person looks at it."""
    source = shipped("api_calls")
    comparison, folder = house.totals(source, a_day(source, 5), a_week(source)[5][:1])
    (ready,) = reserve(house, source, comparison, folder)
    body = ready.body.replace('"quantity":3', '"quantity":6')
    house.destination(source).client.create_usage(ready.address["subscription_id"], ready.address["component_id"], body)
    found = house.adopt(source, [5, 5], a_week(source)[5][:1])
    assert (found.settled, len(found.different)) == (0, 1)
    assert "3 here" in found.different[0]
    assert {row[2] for row in house.delivery_rows()} == {"reserved"}


def test_nothing_is_adopted_while_deliveries_are_being_sent(house: LivingHouse, listed: BillingSource) -> None:
    """A record that appears at the site right now must not be entered beside the worker that sends it."""
    events = a_week(listed)
    comparison, folder = house.totals(listed, a_day(listed, 5), events[5])
    ready = reserve(house, listed, comparison, folder)
    lease = house.ledger.acquire("deliver:other", "other", timedelta(minutes=1))
    house.ledger.begin_sending([delivery.token for delivery in ready], lease)
    with pytest.raises(NotApplied, match="being sent"):
        house.adopt(listed, [5, 7], in_all(events))
    assert {row[2] for row in house.delivery_rows()} == {"sending"}


def ten_and_twenty(source: BillingSource) -> dict[int, list[Event]]:
    """Return what two accounts used on the fifth."""
    return {5: [event(source, 1, 5, "10"), event(source, 2, 5, "20")]}


def one_less(source: BillingSource, events: dict[int, list[Event]]) -> None:
    """Let the third account owe one less than before."""
    events[5][1] = event(source, 2, 5, "19")


def test_a_deduction_is_adopted_with_what_counted(house: LivingHouse) -> None:
    """A correction downward that the balance took is entered with its proof; nothing is owed after it."""
    source = shipped("api_calls")
    events = ten_and_twenty(source)
    run_all(house, source, events)
    one_less(source, events)
    run_all(house, source, events)
    assert house.billed(source) == owed(events)
    before = house.writing_requests(source)
    house.begin_anew()
    found = house.adopt(source, [5, 5], events[5])
    assert (found.entered, found.different) == (3, ())
    run_all(house, source, events)
    assert house.writing_requests(source) == before
    assert house.billed(source) == owed(events)


@contextmanager
def silent_events() -> Iterator[None]:
    """Let the site show no event of any deduction: they lag, or are older than it keeps them."""
    with pytest.MonkeyPatch.context() as site:
        site.setattr(MaxioSite, "site_events", lambda *_: iter(()))
        yield


def decide(house: LivingHouse, doubt: Delivery, counted: str) -> None:
    """End a doubt as a person does who has looked at the site."""
    house.ledger.decide(doubt.token, State.ACCEPTED, "decided on a day by vera: seen there", Decimal(counted))


def test_a_deduction_that_the_site_does_not_prove_is_adopted_in_doubt(house: LivingHouse) -> None:
    """It blocks its key and nothing else; nobody is asked again, and a person says at once how much of it counted."""
    source = shipped("api_calls")
    events = ten_and_twenty(source)
    run_all(house, source, events)
    one_less(source, events)
    run_all(house, source, events)
    before = house.writing_requests(source)
    house.begin_anew()
    with silent_events():
        found = house.adopt(source, [5, 5], events[5])
    assert (found.entered, found.doubted, found.complete) == (3, 1, True)
    run_all(house, source, events)
    house.sweep(source)
    (doubt,) = house.ledger.doubts(source.name)
    assert doubt.reason.startswith(NOBODY_CAN_TELL)
    assert "how much of it counted, the site does not show (adopted on " in doubt.reason
    decide(house, doubt, "-1")
    run_all(house, source, events)
    assert house.writing_requests(source) == before
    assert house.billed(source) == owed(events)
    assert house.reconcile(source, a_day(source, 5)).ties_out


def test_a_deduction_that_the_copy_still_has_to_send_is_in_doubt_where_the_site_has_it(house: LivingHouse) -> None:
    """It is not sent a second time; once the site shows its event, to adopt again settles it."""
    source = shipped("api_calls")
    events = ten_and_twenty(source)
    run_all(house, source, events)
    one_less(source, events)
    copy = sent_after_its_copy(house, source, events[5])
    before = house.writing_requests(source)
    house.restore(copy)
    with silent_events():
        found = house.adopt(source, [5, 5], events[5])
        assert (found.entered, found.settled, found.doubted, found.complete) == (0, 0, 1, True)
        run_all(house, source, events)
        house.sweep(source)
        again = house.adopt(source, [5, 5], events[5])
        assert (again.settled, again.doubted, again.complete) == (0, 0, True)
    assert house.adopt(source, [5, 5], events[5]).settled == 1
    run_all(house, source, events)
    assert house.writing_requests(source) == before
    assert house.billed(source) == owed(events)


def adopt_step_by_step(house: LivingHouse, source: BillingSource, events: dict[int, list[Event]], person: str) -> None:
    """The deduction is in doubt, and what came after it waits by name, until it is proven or a person decided."""
    before = house.writing_requests(source)
    with silent_events():
        found = house.adopt(source, [5, 5], events[5])
        assert not found.complete
        assert all("comes after what is in doubt or differs, and waits for that" in line for line in found.different)
        again = house.adopt(source, [5, 5], events[5])
        assert (again.entered, again.doubted, again.different) == (0, 0, found.different)
        while person and not found.complete:
            (doubt,) = house.ledger.doubts(source.name)
            decide(house, doubt, str(doubt.quantity))
            found = house.adopt(source, [5, 5], events[5])
            assert found.entered == 1
        for doubt in house.ledger.doubts(source.name) if person else []:
            decide(house, doubt, str(doubt.quantity))
    assert house.adopt(source, [5, 5], events[5]).complete
    run_all(house, source, events)
    assert house.writing_requests(source) == before
    assert house.billed(source) == owed(events)
    assert house.reconcile(source, a_day(source, 5)).ties_out


PEOPLE = pytest.mark.parametrize("person", ["", "decides"], ids=["its event comes", "a person decides"])


@PEOPLE
@pytest.mark.parametrize("last", ["22", "17"], ids=["a bill came after", "another one came after"])
def test_what_came_after_an_unproven_deduction_waits_for_it(house: LivingHouse, last: str, person: str) -> None:
    """It is the last of its key until it is settled: nothing stops the others, and nothing is closed unseen."""
    source = shipped("api_calls")
    events = ten_and_twenty(source)
    for quantity in ("20", "19", last):
        events[5][1] = event(source, 2, 5, quantity)
        run_all(house, source, events)
    house.begin_anew()
    adopt_step_by_step(house, source, events, person)


@PEOPLE
@pytest.mark.parametrize("state", [State.RESERVED, State.IN_DOUBT], ids=str)
def test_what_came_after_an_unproven_deduction_of_the_copy_waits_for_it(
    house: LivingHouse, state: State, person: str
) -> None:
    """It is not closed by what came after it, nor sent once more: a person finds it in doubt."""
    source = shipped("api_calls")
    events = ten_and_twenty(source)
    run_all(house, source, events)
    one_less(source, events)
    copy = sent_after_its_copy(house, source, events[5])
    if state is State.IN_DOUBT:
        in_doubt(copy)
    events[5][1] = event(source, 2, 5, "22")
    run_all(house, source, events)
    house.restore(copy)
    adopt_step_by_step(house, source, events, person)


def test_what_came_after_another_quantity_waits_until_a_person_has_decided(house: LivingHouse) -> None:
    """The copy has a doubt of which the site stored another quantity, and a person had decided it since."""
    source = shipped("api_calls")
    events = {5: [event(source, 1, 5, "5")]}
    copy = sent_after_its_copy(house, source, events[5])
    in_doubt(copy, quantity="6")
    events[5].append(event(source, 1, 5, "2", hour=9))
    run_all(house, source, events)
    house.restore(copy)
    for _ in range(2):
        found = house.adopt(source, [5, 5], events[5])
        assert (found.entered, len(found.different)) == (0, 2)
    (doubt,) = house.ledger.doubts(source.name)
    decide(house, doubt, "5")
    assert house.ledger.doubts(source.name) == []


def test_records_on_a_line_that_an_upgrade_replaced_are_found_by_their_key(house: LivingHouse) -> None:
    """Today's line item lists nothing of the day before the upgrade; the external key still finds it."""
    source = shipped("voip_minutes")
    events = {5: [event(source, 0, 5, "3")], 6: [event(source, 0, 6, "4")]}
    house.run(source, a_day(source, 5), events[5])
    upgrade(house, source)
    house.run(source, a_day(source, 6), events[6])
    before = house.writing_requests(source)
    house.begin_anew()
    assert house.adopt(source, [5, 6], in_all(events)).entered == 2
    run_all(house, source, events)
    assert house.writing_requests(source) == before
    assert house.billed(source) == owed(events)


def test_what_was_adopted_on_a_replaced_line_ties_out_there(house: LivingHouse) -> None:
    """The ledger keeps the line on which the record lies, so that it is found again, and told as one that moved."""
    source = shipped("voip_minutes")
    events = {5: [event(source, 0, 5, "3")], 6: [event(source, 0, 6, "4")]}
    house.run(source, a_day(source, 5), events[5])
    upgrade(house, source)
    house.run(source, a_day(source, 6), events[6])
    before = [house.reconcile(source, a_day(source, day)) for day in (5, 6)]
    house.begin_anew()
    assert house.adopt(source, [5, 6], in_all(events)).complete
    run_all(house, source, events)
    assert [house.reconcile(source, a_day(source, day)) for day in (5, 6)] == before
    assert all(found.ties_out for found in before)
    assert [found.moved for found in before] == [1, 0]


def test_a_line_of_a_package_that_ended_is_found_beside_one_that_lives(tmp_path: Path) -> None:
    """The customer has another package by now, without the item: what was billed on the old one is adopted."""
    worlds = tmp_path / "worlds"
    worlds.mkdir()
    added = (
        "\npackages:\n  - {package_id: 790, external_key: other, customer: cust-001, lines: [{id: 990, item: sms}]}\n"
    )
    for world in WORLDS:
        text = world.read_text()
        (worlds / world.name).write_text(text.replace("\npackages:\n", added) if world.stem == "telco" else text)
    source = shipped("voip_minutes")
    by_customer = source.destination.model_copy(update={"package_by": "customer_external_key"})
    source = replace(source, destination=by_customer)
    rows = [replace(event(source, 0, 5, "3"), account="cust-001")]
    with Sandbox(sorted(worlds.glob("*.yaml"))) as sandbox:
        house = LivingHouse(sandbox, tmp_path)
        house.run(source, a_day(source, 5), rows)
        assert house.states(source, a_day(source, 5)) == {"accepted": 1}
        settings = house.destination(source).client.settings
        url = f"{settings.base_url}/api/v3/package/713/_action/cancel"
        assert requests.post(url, json={}, auth=(settings.public_key, settings.private_key), timeout=30).ok
        house.begin_anew()
        found = house.adopt(source, [5, 5], rows)
        house.ledger.close()
    assert (found.entered, found.complete) == (1, True)


@pytest.mark.parametrize("mode", ["totals", "events"])
def test_events_of_an_account_that_rests_are_not_left_to_a_replay_that_no_run_makes(
    house: LivingHouse, mode: str
) -> None:
    """Billed by the year, on hold while the ledger is adopted, active again when the stream has forgotten tokens."""
    source = shipped("platform_events")
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0})
    settings = source.settings.model_copy(update={"quarantine": limits})
    source = replace(source, settings=settings, destination=source.destination.model_copy(update={"mode": mode}))
    rows, day = [event(source, 0, 15, "5")], a_day(source, 15)
    sites = house.sandbox._server.config.app.sites

    def becomes(state: str) -> None:
        with sites.books.transaction() as books:
            change = "UPDATE account SET state = ?, period_end = ? WHERE site = 'maxio:us:orbit' AND id = 50200001"
            books.execute(change, (state, to_micros(datetime(2027, 10, 1, tzinfo=UTC))))

    becomes("active")
    house.run(source, day, rows)
    house.begin_anew()
    becomes("on_hold")
    found = house.adopt(source, [15, 15], rows)
    if mode == "events":
        assert "account orbit-01: subscription 'orbit-01' is on_hold" in found.unmatched[0]
        assert not found.complete
        return
    assert (found.entered, found.held, found.replayable) == (1, 0, 0)
    house.run(source, day, rows)
    becomes("active")
    house.sandbox.move_clock("2026-11-25T12:00:00Z")
    house.at(datetime(2026, 11, 25, 12, tzinfo=UTC))
    house.run(source, day, rows)
    assert house.billed(source) == {"orbit-01": Decimal(5)}
    assert house.states(source, day)["accepted"] == 1
    assert house.ledger.open_items(source.name, None).empty


def test_a_correction_after_an_upgrade_hides_no_revision_before_it(house: LivingHouse) -> None:
    """Revision 0 lies on the replaced line and revision 1 on today's: both are entered, nothing is billed again."""
    source = shipped("voip_minutes")
    first, late = event(source, 0, 5, "3"), event(source, 0, 5, "7", hour=11)
    house.run(source, a_day(source, 5), [first])
    upgrade(house, source)
    house.run(source, a_day(source, 5), [first, late])
    house.begin_anew()
    found = house.adopt(source, [5, 5], [first, late])
    assert (found.entered, found.complete) == (2, True)
    house.run(source, a_day(source, 5), [first, late])
    assert house.billed(source) == {"pkg-001": Decimal(10)}


def test_a_first_revision_that_was_never_sent_hides_no_later_one(house: LivingHouse) -> None:
    """A killed run left revision 0 behind, revision 1 was billed, then the line was replaced."""
    source = shipped("voip_minutes")
    first, late = event(source, 0, 5, "3"), event(source, 0, 5, "7", hour=11)
    comparison, folder = house.totals(source, a_day(source, 5), [first])
    reserve(house, source, comparison, folder)
    house.run(source, a_day(source, 5), [first, late])
    upgrade(house, source)
    house.begin_anew()
    found = house.adopt(source, [5, 5], [first, late])
    assert (found.entered, found.complete) == (1, True)
    house.run(source, a_day(source, 5), [first, late])
    assert house.billed(source) == {"pkg-001": Decimal(10)}


def end(house: LivingHouse, source: BillingSource) -> None:
    """Let the site's owner end the first account's subscription or package."""
    client = house.destination(source).client
    settings, key = client.settings, ACCOUNTS[source.name][0]
    if source.name == "api_calls":
        number = client.subscription_by_reference(key)["id"]
        auth = (settings.api_key, "x")
        answer = requests.delete(f"{settings.base_url}/subscriptions/{number}.json", auth=auth, timeout=30)
    else:
        number = client.package_by_external_key(key)["package_id"]
        url = f"{settings.base_url}/api/v3/package/{number}/_action/cancel"
        answer = requests.post(url, json={}, auth=(settings.public_key, settings.private_key), timeout=30)
    assert answer.ok, answer.text
    (target,) = house.destination(source).resolve([key])
    assert "cancel" in target.unknown


def upgrade(house: LivingHouse, source: BillingSource) -> None:
    """Raise the price of the first package's line, as the account's staff would: the line gets another id."""
    client = house.destination(source).client
    package = client.package_by_external_key(ACCOUNTS[source.name][0])
    line = package["line_items"][0]["line_item_id"]
    settings = client.settings
    answer = requests.post(
        f"{settings.base_url}/api/v3/package/{package['package_id']}/_action/upgrade",
        json={"line_items": [{"line_item_id": line, "tierset": {"pricemodel": "uni", "tiers": [{"amount": "0.06"}]}}]},
        auth=(settings.public_key, settings.private_key),
        timeout=30,
    )
    assert answer.ok, answer.text
    assert client.package_by_external_key(ACCOUNTS[source.name][0])["line_items"][0]["line_item_id"] != line


def test_a_long_gap_of_revisions_is_looked_over(house: LivingHouse) -> None:
    """A record whose revision is as far off as is looked for is found; one beyond is told by name, never dropped."""
    source = shipped("api_calls")
    day = a_week(source)[5][:1]
    comparison, folder = house.totals(source, a_day(source, 5), day)
    (ready,) = reserve(house, source, comparison, folder)
    client, where = house.destination(source).client, ready.address
    for revision in (REVISIONS_AHEAD - 1, 2 * REVISIONS_AHEAD - 1, 3 * REVISIONS_AHEAD):
        body = ready.body.replace(ready.token, uniqueness_token(ready.identity, revision))
        client.create_usage(where["subscription_id"], where["component_id"], body)
    house.begin_anew()
    found = house.adopt(source, [5, 5], day)
    assert (found.entered, len(found.unmatched)) == (2, 1)
    assert [row[1] for row in house.delivery_rows()] == [REVISIONS_AHEAD - 1, 2 * REVISIONS_AHEAD - 1]


def test_what_the_copy_still_had_to_send_of_an_older_day_is_not_sent_again(house: LivingHouse) -> None:
    """Throttled when the copy was made, and sent by a sweep since: the adopted span does not hold its day."""
    source = shipped("api_calls")
    comparison, folder = house.totals(source, a_day(source, 5), a_week(source)[5][:1])
    house.sandbox.fault(SITES[source.name], "throttle", count=100)
    with pytest.raises(NotApplied):
        house.deliver(source, comparison, folder, manners=replace(GENTLE, patience=timedelta(0)))
    house.sandbox.clear_faults()
    copy = house.backup()
    house.sweep(source)
    house.run(source, a_day(source, 19), [event(source, 1, 19, "3")])
    before = house.billed(source)
    house.restore(copy)
    found = house.adopt(source, [18, 19], [event(source, 1, 19, "3")])
    assert (found.entered, found.settled, found.complete) == (1, 1, True)
    house.sandbox.move_clock(advance_seconds=7200)  # The site's own token is forgotten by then.
    house.sweep(source)
    assert house.billed(source) == before


def test_what_was_released_since_the_copy_is_not_released_again(house: LivingHouse) -> None:
    """Held in the copy, let go and billed since, in another revision: it is found by its name."""
    source = shipped("api_calls")
    late = type(source.destination).model_validate(source.destination.model_dump() | {"late_usage": "hold"})
    source = replace(source, destination=late)
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    house.at(datetime(2026, 11, 2, 12, tzinfo=UTC))
    house.run(source, a_day(source, 5), a_week(source)[5][:1])
    copy = house.backup()
    (token,) = house.ledger.open_items(source.name, a_day(source, 5))["token"]
    house.ledger.decide(token, State.HELD, "decided on a day by vera: the customer agreed")
    house.sweep(source)
    house.run(source, a_day(source, 19), [event(source, 1, 19, "4")])
    before = house.billed(source)
    house.restore(copy)
    assert house.adopt(source, [18, 19], [event(source, 1, 19, "4")]).complete
    rows = [row[1:] for row in house.delivery_rows()]
    assert rows == [(0, "superseded", "3"), (1, "accepted", "3"), (0, "held", "4"), (1, "accepted", "4")][: len(rows)]
    house.run(source, a_day(source, 5), a_week(source)[5][:1])
    house.sweep(source)
    assert house.billed(source) == before


def test_a_record_that_is_there_twice_is_told_and_ends_no_adoption(house: LivingHouse) -> None:
    """A zombie stored it a second time, which no call undoes: the tie-out goes on naming it."""
    source = shipped("api_calls")
    house.sandbox.switch(SITES[source.name], uniqueness_token="ignored")
    day = a_week(source)[5][:1]
    comparison, folder = house.totals(source, a_day(source, 5), day)
    (ready,) = reserve(house, source, comparison, folder)
    for _ in range(2):
        site = house.destination(source).client
        site.create_usage(ready.address["subscription_id"], ready.address["component_id"], ready.body)
    house.begin_anew()
    found = house.adopt(source, [5, 5], day)
    assert (found.entered, found.complete) == (1, True)
    (twin,) = found.twins
    assert twin.endswith("there a second time")
    before = house.writing_requests(source)
    house.run(source, a_day(source, 5), day)
    assert house.writing_requests(source) == before
    assert not house.reconcile(source, a_day(source, 5)).ties_out


# --- events ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("age", ["inside the replay window", "beyond it"])
@pytest.mark.parametrize("loss", ["restored", "anew"])
def test_events_that_the_site_counts_are_entered_by_its_total(house: LivingHouse, loss: str, age: str) -> None:
    """Whatever their revisions were, and however old they are: every day again sends nothing."""
    source = shipped("platform_events")
    copy, events = bill_with_a_backup_in_between(house, source)
    before = house.writing_requests(source)
    if loss == "anew":
        house.begin_anew()
    else:
        house.restore(copy)
    if age == "beyond it":
        house.at(datetime(2026, 11, 6, 0, tzinfo=UTC))
    found = house.adopt(source, [5, 7], in_all(events))
    assert (found.held, found.replayable, found.complete) == (0, 0, True)
    assert found.entered == {"anew": 7, "restored": 3}[loss]
    run_all(house, source, events)
    assert house.billed(source) == owed(events)
    assert house.writing_requests(source) == before
    assert all(house.reconcile(source, a_day(source, day)).ties_out for day in events)


def test_events_of_which_the_site_counts_none_are_left_to_the_ordinary_run(house: LivingHouse) -> None:
    """What the restored ledger knows is all that is there: the other days are billed as if they were new."""
    source = shipped("platform_events")
    events = a_week(source)
    run_all(house, source, {5: events[5]})
    house.restore(house.backup())
    found = house.adopt(source, [5, 7], in_all(events))
    assert (found.entered, found.held, found.replayable, found.complete) == (0, 0, 4, True)
    assert found.replay_until == datetime(2026, 11, 5, 9, tzinfo=UTC)
    run_all(house, source, events)
    assert house.billed(source) == owed(events)


def test_events_beyond_the_replay_window_are_held_and_never_sent_blindly(house: LivingHouse) -> None:
    """They are listed with the reason; neither the same totals nor changed ones are sent while nobody has decided."""
    source = shipped("platform_events")
    events = a_week(source)
    events[5].append(event(source, 0, 5, "7", hour=11))
    house.at(datetime(2026, 11, 6, 0, tzinfo=UTC))
    found = house.adopt(source, [5, 7], in_all(events))
    assert (found.held, found.replayable) == (5, 2)
    left = house.ledger.open_items(source.name, Period(a_day(source, 5).start, a_day(source, 7).end))
    assert set(left["state"]) == {State.HELD}
    assert left["reason"].str.startswith(ADOPTED).all()
    assert left["reason"].str.contains("the site has forgotten tokens of this age").all()
    events[5][0] = event(source, 0, 5, "4")
    house.run(source, a_day(source, 5), events[5])
    assert house.writing_requests(source) == 0
    assert house.adopt(source, [5, 7], in_all(events)).held == 0
    assert len([row for row in house.delivery_rows() if row[2] == "held"]) == 5


def test_raw_events_are_left_to_the_ordinary_run_and_older_ones_refused(house: LivingHouse) -> None:
    """Each event has its own token, which the stream ignores for 31 days; of older ones no total can stand for them."""
    source = shipped("platform_events")
    settings = source.destination.model_copy(update={"mode": "events"})
    source = type(source)(source.settings, settings, source.sql, source.expectations)
    events = a_week(source)
    run_all(house, source, events)
    house.begin_anew()
    house.at(datetime(2026, 11, 6, 0, tzinfo=UTC))
    with pytest.raises(Misconfigured, match="sends raw events"):
        house.adopt(source, [5, 7], in_all(events))
    house.at(datetime(2026, 10, 20, 12, tzinfo=UTC))
    found = house.adopt(source, [5, 7], in_all(events))
    assert (found.entered, found.held, found.replayable, found.complete) == (0, 0, 6, True)
    run_all(house, source, events)
    assert house.billed(source) == owed(events)


# --- the span --------------------------------------------------------------------------------------------------------


def test_a_span_has_whole_closed_periods_and_must_have_one() -> None:
    """The last day is not part of it, nor is what has not ended; an empty span says how it is meant."""
    source, now = shipped("api_calls"), datetime(2026, 10, 8, 12, tzinfo=UTC)
    found = periods_of(source, span_of(source, date(2026, 10, 5), date(2026, 11, 1), now))
    assert found == tuple(period for day in (5, 6, 7) for period in source.periods(a_day(source, day)))
    with pytest.raises(Misconfigured, match="--to is the day after the last one"):
        span_of(source, date(2026, 10, 5), date(2026, 10, 5), now)


def test_a_source_billed_by_interval_is_cut_by_its_schedule() -> None:
    """Its usage periods are the data intervals of its runs: noon to noon in the billing zone, also in autumn."""
    source = shipped("api_calls")
    settings = source.settings.model_copy(update={"period": "interval", "schedule": "0 12 * * *"})
    source = type(source)(settings, source.destination, source.sql, source.expectations)
    span = span_of(source, date(2026, 10, 31), date(2026, 11, 3), datetime(2026, 12, 1, tzinfo=UTC))
    found = periods_of(source, span)
    noons = [datetime(2026, 10, 31, 16, tzinfo=UTC), datetime(2026, 11, 1, 17, tzinfo=UTC)]
    noons.append(datetime(2026, 11, 2, 17, tzinfo=UTC))
    assert found == (Period(noons[0], noons[1]), Period(noons[1], noons[2]))


# --- by the operators and the command --------------------------------------------------------------------------------


DAY = (datetime(2026, 10, 5, 4, tzinfo=UTC), datetime(2026, 10, 6, 4, tzinfo=UTC))
STAGES = ("extract", "validate", "aggregate", "plan", "deliver", "reconcile")


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """An Airflow installation with a sandbox, a warehouse with one day of calls, and no ledger yet."""
    from usage_billing import installation as ours  # noqa: PLC0415

    ours._ledger.cache_clear()  # Another test's is not ours to close.
    warehouse, ledger = tmp_path / "usage.duckdb", tmp_path / "ledger.sqlite"
    with duckdb.connect(str(warehouse)) as connection:
        connection.execute(
            "CREATE TABLE api_calls AS SELECT * FROM (VALUES"
            " ('r1', TIMESTAMPTZ '2026-10-05 12:00:00+00', 'acct-0001', 3::DECIMAL(18, 3)),"
            " ('r2', TIMESTAMPTZ '2026-10-05 13:00:00+00', 'acct-0002', 10)"
            ") AS t(request_id, requested_at, account_ref, calls)"
        )
    with Sandbox(WORLDS) as sandbox:
        extra = {"subdomain": "acme", "events_url": sandbox.events_url, "settle_after_seconds": 1}
        maxio = {
            "conn_type": "maxio",
            "host": sandbox.maxio_url("acme"),
            "password": "sandbox-acme-key",
            "extra": extra,
        }
        connections = {
            "WAREHOUSE": {"conn_type": "duckdb", "host": str(warehouse), "extra": {"read_only": True}},
            "USAGE_LEDGER": {"conn_type": "sqlite", "host": str(ledger)},
            "MAXIO_ACME": maxio,
        }
        for name, connection in connections.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
        monkeypatch.setenv("AIRFLOW__USAGE_BILLING__STAGING_PATH", f"file://{tmp_path}/staging")

        def forget() -> None:
            if ours._ledger.cache_info().currsize:
                ours.ledger().close()
            ours._ledger.cache_clear()

        def lose() -> None:
            forget()
            for file in tmp_path.glob("ledger.sqlite*"):
                file.unlink()

        yield SimpleNamespace(sandbox=sandbox, warehouse=warehouse, ledger=ledger, lose=lose, forget=forget)
        forget()


def run_tasks(until: str = "reconcile") -> dict[str, Any]:
    """Run the operators one after the other, as their tasks would; return the last reference."""
    from usage_billing import operators  # noqa: PLC0415

    reference = None
    for name in STAGES:
        operator = getattr(operators, f"{name.title()}Operator")(task_id=name, source="api_calls")
        operator.reference = json.loads(json.dumps(reference))
        reference = operator.execute({"data_interval_start": DAY[0], "data_interval_end": DAY[1], "params": {}})
        if name == until:
            break
    return reference


def writing(installation: SimpleNamespace) -> int:
    """Return how many requests could have changed acme's books."""
    return int(installation.sandbox.requests(SITES["api_calls"])["writing"])


def test_a_task_that_finds_no_ledger_stops_and_makes_none(installation: SimpleNamespace) -> None:
    """A missing ledger would bill everything again: only `ledger init` makes one."""
    with pytest.raises(Misconfigured, match="usage-billing ledger init"):
        run_tasks("extract")
    assert not installation.ledger.exists()


@pytest.mark.parametrize("version", ["0000", "9999"])
def test_a_task_that_finds_a_ledger_of_another_schema_stops(installation: SimpleNamespace, version: str) -> None:
    """Neither an older nor a newer schema is written to."""
    assert main(["ledger", "init"]) == 0
    engine = create_engine(f"sqlite:///{installation.ledger}")
    with engine.begin() as connection:
        connection.execute(text("UPDATE usage_ledger_version SET version_num = :v"), {"v": version})
    engine.dispose()
    with pytest.raises(Misconfigured, match=f"has schema {version}"):
        run_tasks("extract")
    assert writing(installation) == 0


def test_the_command_mends_what_the_task_refused(
    installation: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second ledger stops the extract task; after adopt the day sends nothing, and ties out; then it is usual."""
    from usage_billing import installation as ours  # noqa: PLC0415

    main(["ledger", "init"])
    run_tasks()
    before = writing(installation)
    assert before == 2
    installation.lose()
    main(["ledger", "init"])
    with pytest.raises(Misconfigured, match="ledger adopt api_calls"):
        run_tasks()
    span = ["ledger", "adopt", "api_calls", "--from", "2026-10-05", "--to", "2026-10-06"]
    capsys.readouterr()
    assert main([*span, "--dry-run"]) == 0
    assert "2 entered, 0 settled, 0 known before" in capsys.readouterr().out
    with pytest.raises(Misconfigured, match="ledger adopt api_calls"):
        run_tasks()
    assert main(span) == 0
    assert "2 entered, 0 settled, 0 known before" in capsys.readouterr().out
    assert ours.ledger().measured_before("api_calls", DAY[1], 9) == []
    run_tasks()
    assert writing(installation) == before
    assert [each.rows for each in ours.ledger().measured_before("api_calls", DAY[1], 9)] == [2]


def test_the_command_ends_with_1_and_the_name_of_what_matches_nothing(
    installation: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The refusal stays until a person has looked at the record and said so."""
    main(["ledger", "init"])
    run_tasks()
    installation.lose()
    main(["ledger", "init"])
    with duckdb.connect(str(installation.warehouse)) as connection:
        connection.execute("UPDATE api_calls SET requested_at = requested_at + INTERVAL 1 DAY WHERE request_id = 'r2'")
    span = ["ledger", "adopt", "api_calls", "--from", "2026-10-05", "--to", "2026-10-07"]
    capsys.readouterr()
    assert main(span) == 1
    told = capsys.readouterr().err
    for words in ("1 entered", "matches nothing: record", ": 10 (API calls of 2026-10-05)", "--leave-unmatched"):
        assert words in told
    with pytest.raises(Misconfigured, match="ledger adopt api_calls"):
        run_tasks()
    assert main([*span, "--leave-unmatched"]) == 0
    run_tasks()
    assert writing(installation) == 2


def test_a_deliver_task_that_is_cleared_over_a_restored_ledger_sends_nothing(installation: SimpleNamespace) -> None:
    """The run of before is still in Airflow: its deliver finds a ledger that forgot it, and stops."""
    from usage_billing.operators import DeliverOperator  # noqa: PLC0415

    main(["ledger", "init"])
    planned = run_tasks("plan")
    with (
        closing(sqlite3.connect(installation.ledger)) as live,
        closing(sqlite3.connect(installation.ledger.with_name("copy"))) as kept,
    ):
        live.backup(kept)
    run_tasks()
    installation.lose()
    installation.ledger.write_bytes(installation.ledger.with_name("copy").read_bytes())
    with pytest.raises(Misconfigured, match="restored from a backup"):
        DeliverOperator(task_id="deliver", source="api_calls", reference=planned).execute({})
    assert writing(installation) == 2


def test_the_command_finds_an_account_that_moved_where_it_was_billed(
    installation: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The copy saw where both accounts led and nothing that was sent; one leads elsewhere by now."""
    main(["ledger", "init"])
    run_tasks("validate")
    copy = installation.ledger.with_name("copy")
    with closing(sqlite3.connect(installation.ledger)) as live, closing(sqlite3.connect(copy)) as kept:
        live.backup(kept)
    run_tasks()
    installation.lose()
    installation.ledger.write_bytes(copy.read_bytes())
    for number, reference in ((50100001, "acct-old"), (50100003, "acct-0001")):
        url = f"{installation.sandbox.maxio_url('acme')}/subscriptions/{number}.json"
        body = {"subscription": {"reference": reference}}
        assert requests.put(url, json=body, auth=("sandbox-acme-key", "x"), timeout=5).status_code == 200
    capsys.readouterr()
    assert main(["ledger", "adopt", "api_calls", "--from", "2026-10-05", "--to", "2026-10-06"]) == 0
    told = capsys.readouterr().out
    for words in ("2 entered", "account 'acct-0001' leads elsewhere by now", "`usage-billing ledger moves`"):
        assert words in told
    before = writing(installation)
    run_tasks()
    assert writing(installation) == before
    assert {row.reference: row.billed for row in installation.sandbox.billed(SITES["api_calls"]) if row.billed} == {
        "acct-old": 3,
        "acct-0002": 10,
    }
