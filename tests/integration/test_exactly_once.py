"""Plan, deliver and reconcile against the sandbox: what goes wrong on the way changes nothing in what is billed."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import requests
from sqlalchemy import create_engine, text

from stories import SITES, Event, House, a_day, a_house, shipped, small_batches
from usage_billing.deliver import Manners, deliver, resume
from usage_billing.errors import Misconfigured, NeedsDecision, NotApplied, Stale
from usage_billing.reconcile import reconcile
from usage_billing.records import Comparison, Delivery, Period, Plan, Tally
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource
from usage_billing.workers import Means

ACCOUNTS = {
    "api_calls": ("acct-0001", "acct-0002", "acct-0003"),
    "platform_events": ("orbit-01", "orbit-02", "orbit-03"),
    "voip_minutes": ("pkg-001", "pkg-002", "pkg-003"),
}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


@pytest.fixture(params=sorted(ACCOUNTS))
def source(request: pytest.FixtureRequest) -> BillingSource:
    """Each of the shipped sources."""
    return shipped(request.param)


def usage(source: BillingSource, interval: Period, quantities: dict[str, list[str]]) -> list[Event]:
    """Make events, an hour apart from eight in the morning on, for some accounts."""
    return [
        Event(
            event_id=f"{account}-{interval.start:%d}-{place}",
            account=account,
            quantity=quantity,
            time=interval.start + timedelta(hours=8 + place),
            dimensions=("eu", "premium")[: len(source.settings.dimensions)],
        )
        for account, values in quantities.items()
        for place, quantity in enumerate(values)
    ]


def some_usage(source: BillingSource, interval: Period) -> list[Event]:
    """Make three accounts' usage, whole numbers."""
    first, second, third = ACCOUNTS[source.name]
    return usage(source, interval, {first: ["3", "4"], second: ["10"], third: ["1", "1", "1"]})


def expected(source: BillingSource) -> dict[str, Decimal]:
    """Return what `some_usage` comes to."""
    return {account: Decimal(total) for account, total in zip(ACCOUNTS[source.name], (7, 10, 3), strict=True)}


def test_a_day_is_billed_and_the_same_day_again_sends_nothing(house: House, source: BillingSource) -> None:
    """The second run of an interval finds nothing owed and makes no writing request."""
    day = a_day(source, 5)
    house.run(source, day, some_usage(source, day))
    assert house.billed(source) == expected(source)
    before = house.writing_requests(source)
    again = house.run(source, day, some_usage(source, day))
    assert again.requests == 0
    assert house.writing_requests(source) == before
    assert house.reconcile(source, day).ties_out
    assert house.billed(source) == expected(source)


@pytest.mark.parametrize("fault", ["lost_reply", "server_error", "server_error_after_commit", "throttle"])
def test_whatever_becomes_of_a_reply_each_unit_is_billed_once(house: House, source: BillingSource, fault: str) -> None:
    """Lost replies and 5xx are settled by asking, throttling by waiting; the site's count is what was owed."""
    day = a_day(source, 5)
    # An error without an effect spends no token here: what meets a spent one waits an hour, which is another story.
    if source.name == "api_calls":
        house.sandbox.switch(SITES[source.name], token_spent_by_4xx="no")
    house.sandbox.fault(SITES[source.name], fault, count=2)
    done = house.run(source, day, some_usage(source, day))
    assert house.billed(source) == expected(source)
    assert house.states(source, day).keys() == {"accepted"}
    assert done.not_applied + done.doubted > 0, "the fault was never met, so this proved nothing"
    assert house.reconcile(source, day).ties_out


def test_late_rows_make_a_correction_and_never_a_second_bill(house: House, source: BillingSource) -> None:
    """A row that arrives after its day was billed adds just itself."""
    day = a_day(source, 5)
    account = ACCOUNTS[source.name][0]
    house.run(source, day, some_usage(source, day))
    late = [*some_usage(source, day), *usage(source, day, {account: ["0", "0", "5"]})[2:]]
    house.run(source, day, late)
    assert house.billed(source) == expected(source) | {account: Decimal(12)}
    assert house.reconcile(source, day).ties_out


def test_usage_that_shrank_is_held_or_credited_and_never_lost(house: House, source: BillingSource) -> None:
    """Billed plus held is what is owed after a row was corrected downward."""
    day = a_day(source, 5)
    house.run(source, day, some_usage(source, day))
    account = ACCOUNTS[source.name][1]
    shrunk = [
        event if event.account != account else Event(event.event_id, account, "9", event.time, event.dimensions)
        for event in some_usage(source, day)
    ]
    house.run(source, day, shrunk)
    window = source.periods(day)
    left = house.ledger.open_items(source.name, Period(window[0].start, window[-1].end))
    held = sum((Decimal(quantity) for quantity in left["quantity"]), Decimal(0))
    assert sum(house.billed(source).values()) + held == Decimal(19)
    # A metered balance and a sum of events take it; whether ChargeOver does, its connection has not said.
    assert list(left["state"]) == (["held"] if source.name == "voip_minutes" else [])
    assert (left["reason"].str.len() > 10).all()
    # And again: a held difference stays the one that it was.
    house.run(source, day, shrunk)
    again = house.ledger.open_items(source.name, Period(window[0].start, window[-1].end))
    assert list(again["token"]) == list(left["token"])


def test_a_run_that_would_withdraw_much_stops_and_asks(house: House, source: BillingSource) -> None:
    """Most of a day's rows are gone: nothing is withdrawn without a person."""
    day = a_day(source, 5)
    house.run(source, day, some_usage(source, day))
    with pytest.raises(NeedsDecision, match="withdraw"):
        house.run(source, day, some_usage(source, day)[:1])
    assert house.billed(source) == expected(source)


def test_a_key_that_vanished_is_owed_nothing(house: House, source: BillingSource) -> None:
    """A subscription without rows in the newest extraction is not forgotten: its whole total becomes a difference."""
    lenient = source.settings.model_copy(update={"max_withdraw_share": 1.0})
    source = type(source)(lenient, source.destination, source.sql, source.expectations)
    day = a_day(source, 5)
    house.run(source, day, some_usage(source, day))
    gone = ACCOUNTS[source.name][2]
    house.run(source, day, [event for event in some_usage(source, day) if event.account != gone])
    window = source.periods(day)
    left = house.ledger.open_items(source.name, Period(window[0].start, window[-1].end))
    held = sum((Decimal(quantity) for quantity in left["quantity"]), Decimal(0))
    assert house.billed(source).get(gone, Decimal(0)) + held == 0


def test_an_older_plan_sends_nothing(house: House, source: BillingSource) -> None:
    """The plan of an extraction that a newer one overtook is stale, also when its deliver comes late."""
    day = a_day(source, 5)
    old, old_folder = house.totals(source, day, some_usage(source, day)[:2])
    old_plan = house.plan(source, old, old_folder)
    house.run(source, day, some_usage(source, day))
    before = house.writing_requests(source)
    with pytest.raises(Stale):
        house.deliver(source, old, old_folder, first=old_plan)
    assert house.writing_requests(source) == before
    assert house.billed(source) == expected(source)


def test_two_delivers_of_one_plan_at_once_bill_it_once(house: House, source: BillingSource) -> None:
    """A task that runs twice shares the work out with its twin."""
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day))
    plan = house.plan(source, comparison, folder)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            house.deliver(source, comparison, folder, first=plan)
        except BaseException as error:  # noqa: BLE001 - whatever a twin meets, the test has to see it.
            failures.append(error)

    twins = [threading.Thread(target=run) for _ in range(2)]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join()
    assert not failures
    assert house.billed(source) == expected(source)
    assert house.states(source, day) == {"accepted": len(expected(source)) if source.name != "platform_events" else 6}


def test_neither_order_nor_batch_size_changes_what_is_billed(house: House, source: BillingSource) -> None:
    """A day read backwards in batches of one row is the same day: after it nothing is owed."""
    day = a_day(source, 5)
    house.run(small_batches(source, 1), day, reversed(some_usage(source, day)))
    assert house.billed(source) == expected(source)
    before = house.writing_requests(source)
    house.run(source, day, some_usage(source, day))
    assert house.writing_requests(source) == before


def test_a_wrong_key_gives_every_row_back(house: House, source: BillingSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is revoked between plan and deliver leaves everything reserved and nothing sent."""
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day))
    plan = house.plan(source, comparison, folder)
    monkeypatch.setattr("stories.KEY_SUFFIX", "-revoked")
    with pytest.raises(Misconfigured, match="401"):
        house.deliver(source, comparison, folder, first=plan)
    assert house.billed(source) == {}
    assert house.states(source, day).keys() == {"reserved"}


def test_a_site_out_of_reach_ends_with_everything_reserved_and_the_next_try_bills(
    house: House, source: BillingSource
) -> None:
    """Connections that are refused never left: patience ends, a later try sends each delivery once."""
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day))
    plan = house.plan(source, comparison, folder)
    house.sandbox.__exit__(None, None, None)
    try:
        with pytest.raises(NotApplied, match="cannot be reached"):
            house.deliver(
                source, comparison, folder, first=plan, manners=Manners(2, timedelta(seconds=5), timedelta(seconds=1))
            )
    finally:
        house.sandbox.__enter__()
    assert house.states(source, day).keys() == {"reserved"}


def test_what_a_dead_worker_left_in_the_air_is_asked_about(house: House, source: BillingSource) -> None:
    """Deliveries that a killed worker had just sent, or had not, are settled by the next try, to the unit."""
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day))
    house.ledger.reserve(
        source.name,
        house.destination(source).site,
        comparison.reading,
        next(iter(house.staging.read(house.plan(source, comparison, folder).proposals))).to_pandas(),
    )
    dead = house.ledger.acquire("deliver:dead", "dead", timedelta(milliseconds=200))
    ready = house.ledger.reserved(source.name, comparison.reading, 100)
    house.ledger.begin_sending([delivery.token for delivery in ready], dead)
    house.destination(source).send(ready[:1])  # Its receipt was never written; the others never left.
    house.deliver(source, comparison, folder)
    assert house.billed(source) == expected(source)
    assert house.states(source, day).keys() == {"accepted"}


def test_usage_before_bill_from_is_not_owed(source: BillingSource) -> None:
    """A backfill to before the beginning compares no period."""
    start = datetime(2026, 9, 29, tzinfo=source.settings.timezone)
    assert source.periods(Period(start, start + timedelta(days=1))) == ()


def test_what_somebody_else_entered_is_told_and_our_other_days_are_not(house: House) -> None:
    """A usage typed in by hand is unknown here; the day before, which the same list holds, is not."""
    source = shipped("api_calls")
    for number in (5, 6):
        day = a_day(source, number)
        house.run(source, day, some_usage(source, day))
    client = house.destination(source).client
    subscription = client.subscription_by_reference(ACCOUNTS["api_calls"][0])
    client.create_usage(subscription["id"], "handle:api-calls", '{"usage": {"quantity": 50, "memo": "by hand"}}')
    found = house.reconcile(source, a_day(source, 5))
    assert (found.matched, found.missing, found.different, found.unknown) == (3, 0, 0, 1)
    assert found.ties_out
    assert "50 there, unknown here" in found.examples[0]


def test_a_record_that_is_gone_or_changed_at_the_site_breaks_the_tie_out(house: House) -> None:
    """What the ledger has as accepted and the site does not hold is missing; another quantity is different."""
    source = shipped("api_calls")
    day = a_day(source, 5)
    house.run(source, day, some_usage(source, day))
    (first, second, _) = house.ledger.accepted(source.name, Period(*house_window(source, day)))["token"]
    engine = create_engine(house.ledger_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE delivery SET quantity = '8' WHERE token = :t"), {"t": first})
        connection.execute(text("UPDATE delivery SET token = :n WHERE token = :t"), {"n": "f" * 64, "t": second})
    engine.dispose()
    found = house.reconcile(source, day)
    assert (found.matched, found.missing, found.different, found.unknown) == (1, 1, 1, 1)
    assert not found.ties_out


def house_window(source: BillingSource, interval: Period) -> tuple[datetime, datetime]:
    """Return the compared span of an interval."""
    periods = source.periods(interval)
    return periods[0].start, periods[-1].end


@pytest.mark.parametrize("name", ["platform_events", "voip_minutes"])
def test_usage_of_a_closed_billing_period_is_held_by_name_where_it_would_never_be_billed(
    house: House, name: str
) -> None:
    """The site would store the 30th of October after its renewal and never bill it: it waits, with the reason."""
    source = shipped(name)
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    day = a_day(source, 30)
    house.run(source, day, some_usage(source, day))
    assert house.billed(source) == {}
    left = house.ledger.open_items(source.name, Period(*house_window(source, day)))
    assert set(left["state"]) == {"held"}
    assert sum(Decimal(quantity) for quantity in left["quantity"]) == sum(expected(source).values())
    assert left["reason"].str.contains("closed|invoiced").all()


def test_a_delivery_that_the_site_holds_twice_breaks_the_tie_out(house: House) -> None:
    """Should our token ever be billed twice, the run is red: a second record is a difference, not somebody else's."""
    source = shipped("api_calls")
    day = a_day(source, 5)
    house.run(source, day, some_usage(source, day))
    record = house.ledger.accepted(source.name, Period(*house_window(source, day))).iloc[0]
    body = f'{{"usage": {{"quantity": {record["quantity"]}, "memo": "{record["token"]} again"}}}}'
    house.destination(source).client.create_usage(int(record["subscription"]), int(record["component"]), body)
    found = house.reconcile(source, day)
    assert (found.matched, found.different, found.unknown) == (3, 1, 0)
    assert not found.ties_out
    assert "a second time" in found.examples[0]


def test_rows_that_a_second_validation_quarantined_are_not_sent(house: House, source: BillingSource) -> None:
    """A run that was validated anew after it had reserved sends what it owes now, not what it reserved then."""
    day = a_day(source, 5)
    before, folder = house.totals(source, day, some_usage(source, day))
    reserve(house, source, before, folder)
    after, folder = house.validated(source, day, some_usage(source, day)[-3:], before.reading.extraction)
    house.deliver(source, after, folder)
    third = ACCOUNTS[source.name][2]
    assert house.billed(source) == {third: Decimal(3)}


@pytest.mark.parametrize("swept", [False, True])
def test_a_doubt_of_a_first_validation_is_not_sent_once_a_second_one_owes_less(house: House, swept: bool) -> None:
    """The site turns out not to have it; what goes is what the second validation owes, never its quarantined rows."""
    source = all_may_be_withdrawn(shipped("api_calls"))
    day, account = a_day(source, 5), ACCOUNTS[source.name][0]
    rows = usage(source, day, {account: ["90", "10"]})
    before, folder = house.totals(source, day, rows)
    house.sandbox.switch(SITES[source.name], uniqueness_token="ignored")
    house.sandbox.fault(SITES[source.name], "reset", count=1)
    hasty = Manners(threads=1, lease_lasts=timedelta(seconds=3), patience=timedelta(0))
    with pytest.raises(NotApplied):
        house.deliver(source, before, folder, manners=hasty)
    assert house.states(source, day) == {"in_doubt": 1}
    unfit = [rows[0], replace(rows[1], account=None)]
    after, folder = house.validated(source, day, unfit, before.reading.extraction)
    first = house.plan(source, after, folder)
    if swept:
        age(house, source)
        sweep(house.destination(source), house.ledger)
        resume(house.destination(source), house.ledger, hasty, Means())
        assert house.billed(source) == {}
    house.deliver(source, after, folder, first=first)
    assert house.billed(source) == {account: Decimal(90)}
    assert "held" not in house.states(source, day)


def test_a_zombie_of_the_first_validation_sends_nothing_after_the_second(house: House, source: BillingSource) -> None:
    """It plans again as every deliver does, and learns that its rows were parted anew meanwhile."""
    source = all_may_be_withdrawn(source)
    day, account = a_day(source, 5), ACCOUNTS[source.name][0]
    rows = usage(source, day, {account: ["90", "10"]})
    before, folder = house.totals(source, day, rows)
    slow = house.plan(source, before, folder)
    after, folder = house.validated(source, day, [rows[0], replace(rows[1], account=None)], before.reading.extraction)
    house.deliver(source, after, folder)
    with pytest.raises(Stale, match="a later validation of it"):
        house.deliver(source, before, folder, first=Plan(slow.proposals, Tally(blocked=1)))
    assert house.billed(source) == {account: Decimal(90)}
    writing = house.writing_requests(source)
    house.deliver(source, after, folder)
    assert house.writing_requests(source) == writing


def all_may_be_withdrawn(source: BillingSource) -> BillingSource:
    """Return the same source without the limits of what may be withdrawn or quarantined."""
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0, "max_rows": 10_000})
    settings = source.settings.model_copy(update={"max_withdraw_share": 1.0, "quarantine": limits})
    return replace(source, settings=settings)


def age(house: House, source: BillingSource) -> None:
    """Make everything that was sent have been sent a minute ago."""
    with create_engine(house.ledger_url).begin() as connection:
        minute = {"older": "-60 seconds", "source": source.name}
        connection.execute(
            text(
                "UPDATE delivery SET sent_at = strftime('%Y-%m-%d %H:%M:%f000', sent_at, :older) WHERE source = :source"
            ),
            minute,
        )


def test_what_quarantine_withholds_does_not_stop_the_bill_of_others(house: House) -> None:
    """A fifth of a delivered day is unfit now: it is held by name, and a late row of somebody else is billed."""
    source = shipped("api_calls")
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0})
    source = replace(source, settings=source.settings.model_copy(update={"quarantine": limits}))
    day, (first, second, third) = a_day(source, 5), ACCOUNTS[source.name]
    rows = usage(source, day, {first: ["20"], second: ["80"]})
    house.run(source, day, rows)
    late = usage(source, day, {third: ["7"]})
    house.run(source, day, [replace(rows[0], account=None), rows[1], *late])
    assert house.billed(source) == {first: Decimal(20), second: Decimal(80), third: Decimal(7)}
    assert house.states(source, day) == {"accepted": 3, "held": 1}


@pytest.mark.parametrize("setting", ["accept", "refuse"])
def test_an_upgrade_between_validation_and_delivery_is_noticed_before_the_first_request(
    house: House, setting: str
) -> None:
    """The line was resolved hours ago and replaced since: nothing goes to the old one, the next run bills the new."""
    source = shipped("voip_minutes")
    account = ACCOUNTS[source.name][0]
    house.sandbox.move_clock("2026-11-20T12:00:00Z")
    house.sandbox.switch(SITES[source.name], usage_on_bad_line=setting)
    day = Period(*(datetime(2026, 11, day, tzinfo=source.settings.timezone) for day in (18, 19)))
    rows = usage(source, day, {account: ["100"]})
    comparison, folder = house.totals(source, day, rows)
    first = house.plan(source, comparison, folder)
    with create_engine(house.ledger_url).begin() as connection:
        connection.execute(text("UPDATE extraction SET validated_at = '2026-01-01 00:00:00.000000'"))
    upgrade(house)
    house.deliver(source, comparison, folder, first=first)
    assert house.billed(source) == {}
    assert house.states(source, day) == {"held": 1}
    house.run(source, day, rows)
    assert house.billed(source) == {account: Decimal(100)}


def upgrade(house: House) -> None:
    """Give the first package another price, which replaces its line item by a new one."""
    keys = ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000")
    lines = {"line_items": [{"line_item_id": 854, "tierset": {"tiers": [{"amount": 0.07}]}}]}
    url = f"{house.sandbox.chargeover_url('telco')}/api/v3/package/713/_action/upgrade"
    assert requests.post(url, json=lines, auth=keys, timeout=10).ok


def reserve(house: House, source: BillingSource, comparison: Comparison, folder: str) -> list[Delivery]:
    """Write a plan down as a deliver does that dies right after; return what is ready to be sent."""
    for part in house.staging.read(house.plan(source, comparison, folder).proposals):
        house.ledger.reserve(source.name, house.destination(source).site, comparison.reading, part.to_pandas())
    return house.ledger.reserved(source.name, comparison.reading, 1000)


def test_what_the_site_holds_with_another_quantity_blocks_its_key_until_a_person_decides(house: House) -> None:
    """A stored 6 for a sent 7 is neither sent again nor corrected by a guess: a later row waits behind it."""
    source = shipped("api_calls")
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day)[:2])
    (ready,) = reserve(house, source, comparison, folder)
    dead = house.ledger.acquire("deliver:dead", "dead", timedelta(milliseconds=100))
    house.ledger.begin_sending([ready.token], dead)
    address = ready.address
    body = ready.body.replace('"quantity":7', '"quantity":6')
    assert body != ready.body
    house.destination(source).client.create_usage(address["subscription_id"], address["component_id"], body)
    house.deliver(source, comparison, folder)
    house.run(
        source, day, some_usage(source, day)[:2] + usage(source, day, {ACCOUNTS["api_calls"][0]: ["0", "0", "2"]})[2:]
    )
    assert house.billed(source) == {ACCOUNTS["api_calls"][0]: Decimal(6)}
    assert house.states(source, day) == {"in_doubt": 1}


def test_a_run_of_three_days_that_was_overtaken_on_one_bills_the_other_two(house: House, source: BillingSource) -> None:
    """A newer extraction has the say for its own day, and for no other."""
    days = [a_day(source, number) for number in (5, 6, 7)]
    whole = Period(days[0].start, days[-1].end)
    events = [event for day in days for event in some_usage(source, day)]
    comparison, folder = house.totals(source, whole, events)
    house.run(source, days[1], some_usage(source, days[1]))
    house.deliver(source, comparison, folder)
    assert house.billed(source) == {account: 3 * total for account, total in expected(source).items()}


def test_a_key_that_a_doubt_of_an_older_run_blocked_is_billed_by_the_same_deliver(house: House) -> None:
    """The doubt is settled as `not there`; what it would have billed is planned again with today's total, and sent."""
    source = shipped("api_calls")
    day = a_day(source, 5)
    old, folder = house.totals(source, day, some_usage(source, day)[:2])
    (ready,) = reserve(house, source, old, folder)
    house.ledger.begin_sending([ready.token], house.ledger.acquire("deliver:dead", "dead", timedelta(milliseconds=100)))
    late = usage(source, day, {ACCOUNTS["api_calls"][0]: ["3", "4", "5"]})
    new, folder = house.totals(source, day, late)
    plan = house.plan(source, new, folder)
    assert plan.tally.blocked == 1
    house.deliver(source, new, folder, first=plan)
    assert house.billed(source) == {ACCOUNTS["api_calls"][0]: Decimal(12)}


def test_totals_of_other_decimal_places_than_source_yaml_says_stop_the_run(house: House) -> None:
    """Settings that were edited between two tasks never multiply a bill by ten."""
    source = shipped("voip_minutes")
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day))
    meter = source.settings.meter.model_copy(update={"decimals": 1})
    edited = type(source)(
        source.settings.model_copy(update={"meter": meter}), source.destination, source.sql, source.expectations
    )
    with pytest.raises(Misconfigured, match="decimal places"):
        house.plan(edited, comparison, folder)


@pytest.mark.parametrize("name", ["platform_events", "voip_minutes"])
def test_a_renewal_between_reserving_and_sending_holds_what_it_closed(house: House, name: str) -> None:
    """The site turned the first try down, and renewed before the second: what would never be billed is not sent."""
    source = shipped(name)
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day))
    house.sandbox.fault(SITES[name], "unauthorized", count=4)
    with pytest.raises(Misconfigured):
        house.deliver(source, comparison, folder)
    house.sandbox.clear_faults()
    assert house.states(source, day).keys() == {"reserved"}
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    before = house.writing_requests(source)
    house.deliver(source, comparison, folder)
    assert house.states(source, day).keys() == {"held"}
    assert house.billed(source) == {}
    assert house.writing_requests(source) == before


def test_a_worker_held_up_after_its_claim_sends_nothing(house: House, source: BillingSource) -> None:
    """Others count the site's cut-off from the claim, so a request that would leave late does not leave at all."""
    day = a_day(source, 5)
    comparison, folder = house.totals(source, day, some_usage(source, day))
    proposals = next(iter(house.staging.read(house.plan(source, comparison, folder).proposals))).to_pandas()
    house.ledger.reserve(source.name, SITES[source.name], comparison.reading, proposals)
    lease = house.ledger.acquire("deliver:slow", "slow", timedelta(seconds=30))
    assert lease is not None
    (first, *_) = house.ledger.reserved(source.name, comparison.reading, 1)
    house.ledger.begin_sending([first.token], lease)
    assert house.ledger.may_send(first.token, lease, timedelta(seconds=10))
    assert not house.ledger.may_send(first.token, lease, timedelta(0)), "too long ago"
    house.ledger.release(lease)
    assert not house.ledger.may_send(first.token, lease, timedelta(seconds=10)), "its lease is gone"


def test_a_renewal_in_the_middle_of_a_page_holds_what_is_left_of_it(house: House) -> None:
    """Each request takes 45 seconds and the billing period has 200 left: what would land after it is not sent."""
    source = shipped("platform_events")
    day, accounts = a_day(source, 30), [f"orbit-0{number}" for number in range(1, 7)]
    destination = house.destination(source)
    (target,) = destination.resolve(["orbit-01"])
    assert target.open_until is not None
    house.sandbox.move_clock(target.open_until - timedelta(seconds=200))
    house.ledger._clock = house.sandbox.now
    destination.client.settings = replace(destination.client.settings, settle_after_seconds=150)
    destination.chunk_size = 1
    record = destination.client.record_events

    def slowly(stream: str, bodies: list[str]) -> None:
        record(stream, bodies)
        house.sandbox.move_clock(advance_seconds=45)

    destination.client.record_events = slowly
    comparison, folder = house.totals(source, day, usage(source, day, {account: ["7"] for account in accounts}))
    alone = Manners(threads=1, lease_lasts=timedelta(hours=3))
    plan = house.plan(source, comparison, folder)
    same = (comparison.reading, comparison.window, destination, house.ledger, house.staging, alone, Means())
    deliver(plan, lambda: house.plan(source, comparison, folder), *same)
    states = house.states(source, day)
    assert states["held"] > 0, "the renewal was never met, so this proved nothing"
    assert sum(house.billed(source).values()) == 7 * states["accepted"]


def two_of_three(source: BillingSource) -> tuple[list[Period], list[Event]]:
    """Return three days, and the usage of the first and the last."""
    days = [a_day(source, number) for number in (5, 6, 7)]
    return days, some_usage(source, days[0]) + some_usage(source, days[2])


def only(source: BillingSource, *days: Period) -> list[Period]:
    """Return the usage periods of some days."""
    return [period for day in days for period in source.periods(day)]


def test_a_day_between_two_that_are_compared_is_left_alone(house: House, source: BillingSource) -> None:
    """Usage periods that were not read are in the ledger all the same; nothing of theirs has vanished."""
    days, outer = two_of_three(source)
    whole = Period(days[0].start, days[2].end)
    house.run(source, whole, outer + some_usage(source, days[1]))
    before = house.writing_requests(source)
    late = usage(source, days[2], {ACCOUNTS[source.name][0]: ["0", "0", "0", "5"]})[3:]
    comparison, folder = house.totals(source, whole, [*outer, *late], only=only(source, days[0], days[2]))
    plan = house.plan(source, comparison, folder)
    assert (plan.tally.new + plan.tally.corrections, plan.tally.held, plan.tally.negative) == (1, 0, 0)
    house.deliver(source, comparison, folder, first=plan)
    billed = {account: 3 * total for account, total in expected(source).items()}
    billed[ACCOUNTS[source.name][0]] += 5
    assert house.billed(source) == billed
    assert house.writing_requests(source) == before + 1
    assert reconcile(house.destination(source), house.ledger, comparison.periods).ties_out


def test_a_doubt_of_a_day_that_is_not_compared_keeps_nobody_waiting(house: House) -> None:
    """What is in the air of a day in the gap is for its own run, and for the sweep."""
    source = shipped("api_calls")
    days, outer = two_of_three(source)
    between, folder = house.totals(source, days[1], some_usage(source, days[1]))
    reserve(house, source, between, folder)
    dead = house.ledger.acquire("deliver:dead", "dead", timedelta(hours=1))
    assert dead is not None
    ready = house.ledger.reserved(source.name, between.reading, 10)
    assert len(house.ledger.begin_sending([delivery.token for delivery in ready], dead)) == 3
    whole = Period(days[0].start, days[2].end)
    comparison, folder = house.totals(source, whole, outer, only=only(source, days[0], days[2]))
    done = house.deliver(source, comparison, folder, manners=Manners(patience=timedelta(seconds=2)))
    assert done.accepted == 6
    assert done.seconds < 1.0
    assert house.ledger.open_items(source.name, comparison.periods).empty
