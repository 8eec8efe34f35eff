"""Bulks of events that the site refuses, throttles or stores in part: each event is billed once, or listed by name."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests
from sqlalchemy import create_engine, text

from stories import GENTLE, SITES, Event, House, a_day, a_house, shipped
from usage_billing.archive import Archive
from usage_billing.destinations.maxio import MaxioEvents, MaxioSite
from usage_billing.errors import InDoubt, NotApplied
from usage_billing.ledger import Ledger
from usage_billing.records import NOBODY_CAN_TELL, Delivery, Period
from usage_billing.settle import Doubts, sweep
from usage_billing.sources import BillingSource

SITE = SITES["platform_events"]
HASTY = replace(GENTLE, patience=timedelta(milliseconds=300))
ACCOUNTS = tuple(f"orbit-{number:02d}" for number in range(1, 5))
TOTALS = shipped("platform_events")
RAW = replace(TOTALS, destination=TOTALS.destination.model_copy(update={"mode": "events"}))
DAY, LAST_DAY = a_day(TOTALS, 19), a_day(TOTALS, 30)
BOTH = pytest.mark.parametrize("source", [TOTALS, RAW], ids=["totals", "raw"])


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A house with the shipped worlds."""
    with a_house(tmp_path) as opened:
        yield opened


@pytest.fixture
def on_time(house: House, tmp_path: Path) -> House:
    """The same, whose ledger lives on the sandbox's time."""
    house.ledger.close()
    house.ledger = Ledger.connect(f"sqlite:///{tmp_path}/ledger.sqlite", clock=house.sandbox.now)
    return house


def events(quantity: str, interval: Period = DAY, accounts: Sequence[str] = ACCOUNTS) -> list[Event]:
    """Return an event of each account in the same hour."""
    at = interval.start + timedelta(hours=5)
    return [
        Event(f"e-{number}", account, quantity, at + timedelta(seconds=number), ("eu", "premium"))
        for number, account in enumerate(accounts)
    ]


def listed(house: House, source: BillingSource, interval: Period) -> list[tuple[str, str]]:
    """Return the state and the reason of what is open."""
    left = house.ledger.open_items(source.name, Period.around(source.periods(interval)))
    return list(zip(left["state"], left["reason"], strict=True))


def mark(monkeypatch: pytest.MonkeyPatch, account: str) -> None:
    """Let the events of one account name a subscription that there is not."""
    rightly = MaxioEvents._subscriber

    def wrongly(self: MaxioEvents, address: str) -> str:
        return rightly(self, address).replace(f'"{account}"', '"nobody"')

    monkeypatch.setattr(MaxioEvents, "_subscriber", wrongly)


@pytest.mark.parametrize("status", [422, 429])
def test_a_refused_bulk_that_was_stored_in_part_is_not_billed_twice_when_its_totals_change(
    house: House, status: int
) -> None:
    """What half of the bulk brought counts once, though the totals grew before anything could be sent again."""
    house.sandbox.fault(SITE, "partial_bulk", status=status)
    house.sandbox.fault(SITE, "throttle", count=1000)
    # A refusal does not keep the deliver from asking at once; a site that throttles does.
    with pytest.raises(NotApplied) if status == requests.codes.too_many_requests else nullcontext():
        house.run(TOTALS, DAY, events("5"), HASTY)
    assert house.states(TOTALS, DAY) == {"in_doubt": 4}
    assert sum(house.billed(TOTALS).values()) == Decimal(10), "nothing was stored in part, so this proved nothing"

    house.sandbox.clear_faults()
    house.run(TOTALS, DAY, events("7"))

    assert house.billed(TOTALS) == dict.fromkeys(ACCOUNTS, Decimal(7))
    assert house.states(TOTALS, DAY) == {"accepted": 8}
    assert house.reconcile(TOTALS, DAY).ties_out


@pytest.mark.parametrize("status", [422, 429])
def test_rows_that_change_after_a_bulk_was_stored_in_part_are_listed_and_not_sent_again(
    house: House, status: int
) -> None:
    """The chunk is replayed as it was; what differs from it since is for a person to see."""
    source = replace(RAW, settings=RAW.settings.model_copy(update={"max_withdraw_share": 1.0}))
    house.sandbox.fault(SITE, "partial_bulk", status=status)
    house.run(source, DAY, events("5"))
    assert house.states(source, DAY) == {"accepted": 1}
    house.run(source, DAY, events("7"))
    assert house.billed(source) == dict.fromkeys(ACCOUNTS, Decimal(5))
    assert house.states(source, DAY) == {"accepted": 1, "held": 1}


@pytest.mark.parametrize("stores", ["refuse_all", "store_valid_and_refuse"])
def test_an_event_that_spoils_its_bulk_is_named_and_the_others_are_billed_once(
    house: House, monkeypatch: pytest.MonkeyPatch, stores: str
) -> None:
    """The bulk is refused, whatever was stored of it: its events go alone, and the bad one waits for a person."""
    mark(monkeypatch, "orbit-02")
    house.sandbox.switch(SITE, bulk_with_bad_event=stores, unknown_subscription_in_event="refuse")

    house.run(TOTALS, DAY, events("5"))

    assert house.billed(TOTALS) == {account: Decimal(5) for account in ACCOUNTS if account != "orbit-02"}
    assert house.states(TOTALS, DAY) == {"accepted": 3, "in_doubt": 1}
    ((_, reason),) = listed(house, TOTALS, DAY)
    assert reason.startswith("a person decides: ")
    assert "names no subscription: 'nobody'" in reason


@pytest.mark.parametrize("stores", ["refuse_all", "store_valid_and_refuse"])
def test_a_chunk_with_a_bad_event_waits_for_a_person_who_is_told_which(
    house: House, monkeypatch: pytest.MonkeyPatch, stores: str
) -> None:
    """Its sound events are billed once; the reason has the event id of the bad one, and how many there are."""
    mark(monkeypatch, "orbit-02")
    house.sandbox.switch(SITE, bulk_with_bad_event=stores, unknown_subscription_in_event="refuse")
    rows = events("5", accounts=[*ACCOUNTS, *["orbit-01"] * 96])

    house.run(RAW, DAY, rows)

    assert house.states(RAW, DAY) == {"in_doubt": 1}
    ((_, reason),) = listed(house, RAW, DAY)
    assert reason.startswith(f"{NOBODY_CAN_TELL}1 of its 100 events are refused alone (e-1): ")
    assert len(house.sandbox.records(SITE)) == 99
    assert house.writing_requests(RAW) <= 25, "the culprit is found by tenths"


def test_bad_events_in_every_bulk_keep_no_good_one_from_being_billed_in_one_run(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty bulks are refused, each for one event: the same deliver asks about all, and patience is not used up."""
    mark(monkeypatch, "orbit-02")
    house.sandbox.switch(SITE, unknown_subscription_in_event="refuse")
    monkeypatch.setattr(MaxioEvents, "events_to_chunk", 5)
    accounts = ["orbit-01", "orbit-02", "orbit-03", "orbit-04", "orbit-01"] * 20
    comparison, folder = house.totals(RAW, DAY, events("1", accounts=accounts))

    house.deliver(RAW, comparison, folder, manners=replace(HASTY, threads=1))

    assert len(house.sandbox.records(SITE)) == 80
    assert "reserved" not in house.states(RAW, DAY)
    assert all("refused alone" in reason for _, reason in listed(house, RAW, DAY))


def test_a_stream_that_refuses_everything_is_not_asked_for_every_event(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing at all is taken the fault is no event's: the doubt stays open, after a bounded number of tries."""
    monkeypatch.setattr("usage_billing.destinations.maxio.events._MOST_IN_VAIN", 20)
    mark(monkeypatch, "orbit-02")
    house.sandbox.switch(SITE, unknown_subscription_in_event="refuse")
    comparison, folder = house.totals(RAW, DAY, events("1", accounts=["orbit-02"] * 500))
    destination = house.destination(RAW)
    house.sandbox.fault(SITE, "lost_reply", carried_out=False)
    with pytest.raises(NotApplied):
        house.deliver(RAW, comparison, folder, manners=replace(HASTY, patience=timedelta(0)))
    house.sandbox.reset_requests()

    doubts = Doubts(destination, house.ledger)
    assert doubts.ask(doubts.open()) == 0

    assert house.writing_requests(RAW) == 20
    assert len(doubts.open()) == 1


@pytest.mark.parametrize("bad", [1, 3])
def test_chunks_that_a_stream_refuses_starve_no_other_and_make_no_storm(
    house: House, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    """The oldest doubts are of events that are never taken: the young one is billed all the same, some sweeps later."""
    monkeypatch.setattr("usage_billing.destinations.maxio.events._MOST_IN_VAIN", 20)
    mark(monkeypatch, "orbit-02")
    house.sandbox.switch(SITE, unknown_subscription_in_event="refuse")
    for hour in range(bad + 1):
        hourly = Period(DAY.start + timedelta(hours=hour), DAY.start + timedelta(hours=hour + 1))
        accounts = ["orbit-01"] * 3 if hour == bad else ["orbit-02"] * 30
        rows = [
            Event(f"{hour}-{number}", account, "1", hourly.start + timedelta(seconds=number), ("eu", "premium"))
            for number, account in enumerate(accounts)
        ]
        house.sandbox.fault(SITE, "lost_reply", carried_out=False)
        comparison, folder = house.totals(RAW, hourly, rows)
        # Right after one failure: no question is asked by the deliver itself.
        with pytest.raises(NotApplied):
            house.deliver(RAW, comparison, folder, manners=replace(HASTY, threads=1, patience=timedelta(0)))
        house.sandbox.clear_faults()
    assert len(house.ledger.doubts(RAW.name)) == bad + 1

    for _ in range(1 if bad == 1 else 30):
        house.sandbox.reset_requests()
        sweep(house.destination(RAW), house.ledger)
        assert house.writing_requests(RAW) <= (2 + len(house.billed(RAW))) * 20 + 1
        if house.billed(RAW):
            break

    assert house.billed(RAW) == {"orbit-01": Decimal(3)}
    assert len(house.ledger.doubts(RAW.name)) == bad


def test_bad_totals_in_a_row_starve_no_good_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than the stream may refuse in vain: the good ones beside them are billed all the same."""
    monkeypatch.setattr("usage_billing.destinations.maxio.events._MOST_IN_VAIN", 20)
    mark(monkeypatch, "orbit-02")
    house.sandbox.switch(SITE, unknown_subscription_in_event="refuse")
    rows = [
        Event(f"{account}-{hour}", account, "1", DAY.start + timedelta(hours=hour), ("eu", "premium"))
        for account in ("orbit-01", "orbit-02")
        for hour in range(24)
    ]
    order = {"orbit-01": 0, "orbit-02": 1}  # The last ones go first.
    real = Ledger.doubts

    def bad_ones_together(self: Ledger, *args: Any) -> list[Delivery]:
        return sorted(real(self, *args), key=lambda doubt: order[str(doubt.address["account"])])

    monkeypatch.setattr(Ledger, "doubts", bad_ones_together)
    comparison, folder = house.totals(TOTALS, DAY, rows)
    house.sandbox.fault(SITE, "lost_reply", carried_out=False)
    with pytest.raises(NotApplied):
        house.deliver(TOTALS, comparison, folder, manners=replace(HASTY, patience=timedelta(0)))
    house.sandbox.clear_faults()

    for _ in range(5):
        sweep(house.destination(TOTALS), house.ledger)

    assert house.billed(TOTALS) == {"orbit-01": Decimal(24)}


def test_a_chunk_is_read_before_it_is_claimed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive may lie far away: nothing is read from it between the claim and the request."""
    comparison, folder = house.totals(RAW, DAY, events("5"))
    first = house.plan(RAW, comparison, folder)
    told: list[str] = []

    def noted(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def call(*args: Any, **keys: Any) -> Any:
            told.append(name)
            return real(*args, **keys)

        monkeypatch.setattr(kind, name, call)

    for kind, name in (
        (Archive, "read"),
        (Ledger, "begin_sending"),
        (Ledger, "may_send"),
        (MaxioSite, "record_events"),
    ):
        noted(kind, name)
    house.deliver(RAW, comparison, folder, first=first)

    assert told.count("begin_sending") == 1
    claimed = told.index("begin_sending")
    assert told[claimed - 1 : claimed + 3] == ["read", "begin_sending", "may_send", "record_events"]
    assert house.billed(RAW) == dict.fromkeys(ACCOUNTS, Decimal(5))


@BOTH
def test_a_replay_that_could_land_after_the_renewal_is_not_sent(on_time: House, source: BillingSource) -> None:
    """Seconds before its billing period ends a doubt waits; after the renewal it is a person's, and nothing is lost."""
    on_time.sandbox.move_clock(LAST_DAY.end)  # No day is read before it is over.
    comparison, folder = on_time.totals(source, LAST_DAY, events("7", LAST_DAY, ["orbit-01"]))
    (target,) = on_time.destination(source).resolve(["orbit-01"])
    assert target.open_until is not None
    on_time.sandbox.fault(SITE, "reset")
    with pytest.raises(NotApplied):
        on_time.deliver(source, comparison, folder, manners=replace(HASTY, patience=timedelta(0)))
    doubts = Doubts(on_time.destination(source), on_time.ledger)
    on_time.sandbox.move_clock(target.open_until - timedelta(milliseconds=900))
    on_time.sandbox.reset_requests()

    assert doubts.ask(doubts.open()) == 0
    assert on_time.writing_requests(source) == 0
    assert [state for state, _ in listed(on_time, source, LAST_DAY)] == ["in_doubt"]

    on_time.sandbox.move_clock(target.open_until + timedelta(hours=1))
    doubts.ask(doubts.open())
    ((state, reason),) = listed(on_time, source, LAST_DAY)
    assert state == "in_doubt"
    assert "its billing period has closed" in reason
    assert on_time.writing_requests(source) == 0


@BOTH
def test_what_could_land_after_the_renewal_is_held_when_it_is_looked_at_again(
    on_time: House, source: BillingSource
) -> None:
    """It was right when it was planned; a second before the end nothing of it may leave any more."""
    on_time.sandbox.move_clock(LAST_DAY.end)  # No day is read before it is over.
    comparison, folder = on_time.totals(source, LAST_DAY, events("7", LAST_DAY, ["orbit-01"]))
    (target,) = on_time.destination(source).resolve(["orbit-01"])
    assert target.open_until is not None
    on_time.sandbox.move_clock(target.open_until - timedelta(milliseconds=900))
    on_time.sandbox.reset_requests()
    on_time.deliver(source, comparison, folder)
    ((state, reason),) = listed(on_time, source, LAST_DAY)
    assert state == "held"
    assert "its billing period ends" in reason
    assert on_time.writing_requests(source) == 0


def test_a_throttled_replay_is_not_repeated_before_the_site_wants_it(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk is told to wait: the next one does not try its luck, and nothing is asked until the time is over."""
    comparison, folder = house.totals(TOTALS, DAY, events("5"))
    house.sandbox.fault(SITE, "reset")
    with pytest.raises(NotApplied):
        house.deliver(TOTALS, comparison, folder, manners=replace(HASTY, patience=timedelta(0)))
    destination = house.destination(TOTALS)
    destination.chunk_size = 2
    asked: list[int] = []

    def throttled(doubts: Sequence[Delivery], _now: datetime) -> dict[str, None]:
        asked.append(len(doubts))
        raise InDoubt("HTTP 429", throttled=True, retry_after_seconds=40.0)

    monkeypatch.setattr(destination, "settle", throttled)
    doubts = Doubts(destination, house.ledger)
    for _ in range(3):
        assert doubts.ask(doubts.open()) == 0
    assert asked == [2]
    assert 30 < doubts.seconds_until_due(doubts.open()) <= 40


def test_what_a_site_told_before_it_failed_is_kept(house: House) -> None:
    """One stream answers and the next throttles: the doubt that is too old to be asked about is a person's by then."""
    comparison, folder = house.totals(TOTALS, DAY, events("5"))
    house.sandbox.fault(SITE, "reset")
    with pytest.raises(NotApplied):
        house.deliver(TOTALS, comparison, folder, manners=replace(HASTY, patience=timedelta(0)))
    old, *others = house.ledger.doubts(TOTALS.name)
    with create_engine(house.ledger_url).begin() as connection:
        change = text("UPDATE delivery SET sent_at = '2026-01-01 00:00:00.000000' WHERE token = :token")
        connection.execute(change, {"token": old.token})
    house.sandbox.fault(SITE, "throttle", count=1000)

    doubts = Doubts(house.destination(TOTALS), house.ledger)
    assert doubts.ask(doubts.open()) == 0

    assert sorted(doubt.token for doubt in doubts.open()) == sorted(doubt.token for doubt in others)
    assert [reason for _, reason in listed(house, TOTALS, DAY) if reason.startswith(NOBODY_CAN_TELL)] == [
        f"{NOBODY_CAN_TELL}sent more than 30 days ago: a replay could bill it twice; compare the totals"
    ]


def test_a_sweep_that_is_told_to_stop_asks_nothing_more(house: House) -> None:
    """It ends between two questions, so that a task which is killed is gone before its time is up."""
    comparison, folder = house.totals(TOTALS, DAY, events("5"))
    house.sandbox.fault(SITE, "reset")
    with pytest.raises(NotApplied):
        house.deliver(TOTALS, comparison, folder, manners=replace(HASTY, patience=timedelta(0)))
    destination = house.destination(TOTALS)
    destination.chunk_size = 1
    stops = iter([False, True, True, True])

    swept = sweep(destination, house.ledger, lambda: next(stops))

    assert (swept.settled.found, len(swept.still_open)) == (1, 3)


def test_a_throttled_bulk_slows_the_deliver_down_as_the_site_asks(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    """The chunk is in doubt, and the next request waits for as long as the site said."""
    house.sandbox.switch(SITE, throttle_reply="json_retry_after")
    house.sandbox.fault(SITE, "throttle")
    started = datetime.now(UTC)
    done = house.run(TOTALS, DAY, events("5"))
    assert (done.doubted, done.settled) == (4, 4)
    assert datetime.now(UTC) - started >= timedelta(seconds=1)
    assert "in doubt: 4 deliveries" in caplog.text
    assert house.billed(TOTALS) == dict.fromkeys(ACCOUNTS, Decimal(5))


def lenient(source: BillingSource, **keys: str) -> BillingSource:
    """Return the source, with a quarantine that stops nothing and other keys of the destination."""
    quarantine = source.settings.quarantine.model_copy(update={"max_share": 1.0})
    settings = source.settings.model_copy(update={"quarantine": quarantine})
    return replace(source, settings=settings, destination=source.destination.model_copy(update=keys))


def turn(house: House, what: str) -> None:
    """Activate or deactivate the component of the first account."""
    path = f"/event_based_billing/subscriptions/50200001/components/61101/{what}.json"
    reply = requests.post(house.sandbox.maxio_url("orbit") + path, auth=("sandbox-orbit-key", "x"), timeout=10)
    assert reply.ok


@BOTH
def test_events_of_a_component_that_is_not_activated_are_quarantined_by_name(
    house: House, source: BillingSource
) -> None:
    """The stream would take them and the renewal never bill them; once it is activated the same day bills."""
    source = lenient(source)
    turn(house, "deactivate")
    comparison, folder = house.totals(source, DAY, events("5"))
    assert (comparison.rows_accepted, comparison.rows_quarantined) == (3, 1)
    house.deliver(source, comparison, folder)
    assert house.billed(source) == {account: Decimal(5) for account in ACCOUNTS[1:]}
    assert len(house.sandbox.records(SITE)) == 3
    (target,) = house.destination(source).resolve(["orbit-01"])
    assert "not activated for subscription 50200001" in target.unknown

    turn(house, "activate")
    house.run(source, DAY, events("5"))
    assert house.billed(source) == dict.fromkeys(ACCOUNTS, Decimal(5))


@BOTH
def test_a_preview_that_hides_what_is_unused_sends_nothing_until_a_person_assumes_activation(
    house: House, source: BillingSource
) -> None:
    """Absent for want of usage or of activation cannot be told apart: nothing is lost, and a key turns it off."""
    house.sandbox.switch(SITE, preview_shows_unused="no")
    comparison, _ = house.totals(lenient(source), DAY, events("5"))
    assert (comparison.rows_accepted, comparison.rows_quarantined) == (0, 4)
    house.run(lenient(source, activation="assumed"), DAY, events("5"))
    assert house.billed(source) == dict.fromkeys(ACCOUNTS, Decimal(5))
    comparison, _ = house.totals(lenient(source), DAY, events("6"))
    assert comparison.rows_quarantined == 0, "what has usage shows"


@pytest.mark.parametrize("status", [422, 404])
def test_a_renewal_that_is_not_previewed_is_one_accounts_matter(house: House, status: int) -> None:
    """A subscription that ends has no renewal: its rows are quarantined with the site's word, all others are billed."""
    house.sandbox.fault(SITE, "server_error", status=status, route="preview_renewal", reads=True)
    comparison, folder = house.totals(lenient(TOTALS), DAY, events("5"))
    assert (comparison.rows_accepted, comparison.rows_quarantined) == (3, 1)
    house.deliver(lenient(TOTALS), comparison, folder)
    assert sum(house.billed(TOTALS).values()) == Decimal(15)


def test_a_preview_that_cannot_be_read_concludes_nothing(house: House) -> None:
    """No account becomes unknown, and none is taken for activated: the run ends and is tried again."""
    house.sandbox.fault(SITE, "server_error", count=100, route="preview_renewal", reads=True)
    with pytest.raises(NotApplied, match="preview the renewal"):
        house.totals(TOTALS, DAY, events("5"))


def test_a_subscription_is_asked_about_once(house: House) -> None:
    """The preview is one call for each subscription, however often its account comes up; a doubt asks for none."""
    destination = house.destination(TOTALS)
    destination.resolve(["orbit-01"])
    house.sandbox.fault(SITE, "server_error", count=100, route="preview_renewal", reads=True)
    (again,) = destination.resolve(["orbit-01"])
    assert again.subscription == "50200001"
