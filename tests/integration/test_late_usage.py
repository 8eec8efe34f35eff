"""Usage whose billing period has closed: held by name, released by a person, billed once in the period that is open."""

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import requests

from late import ACCOUNTS, AFTER_THE_RENEWAL, Held, billed, lenient, november, used
from stories import SITES, House, a_day, a_house, shipped
from usage_billing.cli import main
from usage_billing.errors import Misconfigured
from usage_billing.records import Period, State
from usage_billing.sources import BillingSource

DATED = ("platform_events", "voip_minutes")
NOT_BILLED_LATE = {
    "platform_events": ({"late_event": "never_billed"}, {"late_event": "next_period"}),
    "voip_minutes": (
        {"late_usage": "never_billed", "cycle_by": "from"},
        {"late_usage": "never_billed", "cycle_by": "to"},
        {"late_usage": "next_invoice", "cycle_by": "to"},
    ),
}
SITES_OF_DATED = [(name, switches) for name in DATED for switches in NOT_BILLED_LATE[name]]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Held]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path, Held) as found:
        assert isinstance(found, Held)
        yield found


def cancel_subscription(house: House) -> None:
    """Let the customer end the subscription at the site."""
    url = f"{house.sandbox.maxio_url('orbit')}/subscriptions/lookup.json?reference={ACCOUNTS['platform_events']}"
    keys = ("sandbox-orbit-key", "x")
    number = requests.get(url, auth=keys, timeout=5).json()["subscription"]["id"]
    url = f"{house.sandbox.maxio_url('orbit')}/subscriptions/{number}.json"
    assert requests.delete(url, auth=keys, timeout=5).status_code == 200


def cancel_package(house: House) -> None:
    """Let the customer end the package at the site."""
    keys = ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000")
    url = f"{house.sandbox.chargeover_url('telco')}/api/v3/package/713?action=cancel"
    assert requests.post(url, json={}, auth=keys, timeout=5).status_code == 200


ENDS = {"platform_events": cancel_subscription, "voip_minutes": cancel_package}


def nothing_is_sent_again(house: Held, source: BillingSource, day: Period, quantity: str) -> None:
    """Run the day and the sweep once more, and compare with the site."""
    before, sums = house.writing_requests(source), billed(house, source)
    house.run(source, day, used(source, day, quantity))
    house.sweep(source)
    assert house.writing_requests(source) == before
    assert billed(house, source) == sums
    found = house.reconcile(source, day)
    assert found.ties_out, found.examples
    assert found.matched > 0


# --- released ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "switches"), SITES_OF_DATED)
@pytest.mark.parametrize("by", ["sweep", "run"])
def test_what_a_person_released_is_billed_once_in_the_open_period(
    house: Held, name: str, switches: dict[str, str], by: str
) -> None:
    """Whatever the site does with late usage: it is dated where the site bills, and the ledger keeps who and why."""
    source, day = lenient(name), a_day(shipped(name), 30)
    house.sandbox.switch(SITES[name], **switches)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    assert (house.listed(source, day), house.writing_requests(source)) == ([("held", "7")], 0)
    house.release(source, day)
    if by == "sweep":
        assert house.sweep(source).accepted == 1
    else:
        house.run(source, day, used(source, day, "7"))
    assert billed(house, source) == Decimal(7)
    assert house.states(source, day) == {"superseded": 1, "accepted": 1}
    rows = house.ledger.standing(source.name, Period.around(source.periods(day)))
    assert set(rows["released"]) == {"decided on a day by somebody: the customer agreed"}
    nothing_is_sent_again(house, source, day, "7")


@pytest.mark.parametrize("name", DATED)
def test_a_run_and_a_sweep_at_once_bill_what_was_released_once(house: Held, name: str) -> None:
    """Both find it released: one writes its next revision, one sends it."""
    source, day = lenient(name), a_day(shipped(name), 30)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    house.release(source, day)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    both = [
        threading.Thread(target=house.deliver, args=(source, comparison, folder)),
        threading.Thread(target=house.sweep, args=(source,)),
        threading.Thread(target=house.sweep, args=(source,)),
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    house.sweep(source)
    assert billed(house, source) == Decimal(7)
    assert house.listed(source, day) == []
    nothing_is_sent_again(house, source, day, "7")


@pytest.mark.parametrize("name", DATED)
def test_another_quantity_than_the_released_one_is_for_the_person_again(house: Held, name: str) -> None:
    """They let 7 go, and 9 are owed by now: neither is sent before they have seen it."""
    source, day = lenient(name), a_day(shipped(name), 30)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    house.release(source, day)
    house.run(source, day, used(source, day, "9"))
    house.sweep(source)
    assert (house.listed(source, day), billed(house, source)) == ([("held", "9")], 0)
    house.release(source, day)
    house.sweep(source)
    assert billed(house, source) == Decimal(9)
    nothing_is_sent_again(house, source, day, "9")


def test_a_released_deduction_from_events_waits_until_the_open_period_takes_it(house: Held) -> None:
    """No document says that a sum below 0 is billed: 3 go once the open period counts 5."""
    source = lenient("platform_events")
    day, later = a_day(source, 30), november(source)
    house.run(source, day, used(source, day, "10"))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    house.release(source, day)
    assert house.sweep(source).accepted == 0
    (why,) = house.open_items(source, day)["reason"]
    assert "counts too little" in why
    house.run(source, later, used(source, later, "5"))
    assert house.sweep(source).accepted == 1
    assert billed(house, source) == Decimal(12)
    nothing_is_sent_again(house, source, day, "7")
    assert house.reconcile(source, later).ties_out


def test_a_release_does_not_say_that_the_account_takes_negative_usage(house: Held) -> None:
    """That the connection says: until then it waits, released, and goes by the next sweep after."""
    source, day = lenient("voip_minutes"), a_day(shipped("voip_minutes"), 30)
    house.run(source, day, used(source, day, "10"))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    house.release(source, day)
    assert house.sweep(source).accepted == 0
    assert house.listed(source, day) == [("held", "-3")]
    assert "negative_usage" in house.open_items(source, day)["reason"].item()
    house.allow_negative = True
    assert house.sweep(source).accepted == 1
    assert billed(house, source) == Decimal(7)
    nothing_is_sent_again(house, source, day, "7")


def test_a_released_deduction_from_a_balance_goes_as_soon_as_that_takes_it_whole(house: Held) -> None:
    """No part of it goes by a sweep, which could list the rest nowhere."""
    source, day = lenient("api_calls"), a_day(shipped("api_calls"), 5)
    house.run(source, day, used(source, day, "100"))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "91"))
    house.release(source, day)
    assert house.sweep(source).accepted == 0
    later = a_day(source, 6)
    house.run(source, later, used(source, later, "4"))
    assert house.sweep(source).accepted == 0
    assert house.listed(source, day) == [("held", "-9")]
    house.run(source, later, used(source, later, "20"))
    assert house.sweep(source).accepted == 1
    assert billed(house, source) == Decimal(111)
    nothing_is_sent_again(house, source, day, "91")


@pytest.mark.parametrize("name", DATED)
def test_what_is_released_of_a_customer_who_left_waits_and_says_so(house: Held, name: str) -> None:
    """Nothing bills it any more: it stays listed, with that reason, until somebody writes it off."""
    source, day = lenient(name), a_day(shipped(name), 30)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    house.release(source, day)
    ENDS[name](house)
    before = house.writing_requests(source)
    assert house.sweep(source).accepted == 0
    (why,) = house.open_items(source, day)["reason"]
    assert "not be billed" in why or "would not bill" in why
    assert house.writing_requests(source) == before
    house.ledger.decide(house.open_items(source, day)["token"].item(), State.WRITTEN_OFF, "somebody: charged by hand")
    house.sweep(source)
    assert (house.listed(source, day), house.writing_requests(source)) == ([], before)


def test_what_quarantine_withholds_is_not_released_and_what_was_released_waits_for_it(house: Held) -> None:
    """A row that is put aside may be the one that seems to be gone: until it is mended nothing is withdrawn."""
    house.allow_negative = True
    source, day = lenient("voip_minutes"), a_day(shipped("voip_minutes"), 30)
    unfit = [replace(event, event_id="unfit", quantity="-1") for event in used(source, day, "1")]
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0})
    source = replace(source, settings=source.settings.model_copy(update={"quarantine": limits}))
    house.run(source, day, used(source, day, "10"))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, [*used(source, day, "7"), *unfit])
    with pytest.raises(Misconfigured, match="quarantine withholds"):
        house.release(source, day)
    house.run(source, day, used(source, day, "7"))
    house.release(source, day)
    house.run(source, day, [*used(source, day, "7"), *unfit])
    assert house.sweep(source).accepted == 0
    assert (house.listed(source, day), billed(house, source)) == ([("held", "-3")], 10)
    house.run(source, day, used(source, day, "7"))
    assert (house.listed(source, day), billed(house, source)) == ([], 7)
    nothing_is_sent_again(house, source, day, "7")


# --- as the source says -----------------------------------------------------------------------------------------------

SWITCHES = {"api_calls": ({},), **NOT_BILLED_LATE}
GOES = {"api_calls": "bill_now", "platform_events": "now", "voip_minutes": "now"}
ALL = [(name, switches) for name in GOES for switches in SWITCHES[name]]


@pytest.mark.parametrize(("name", "switches"), ALL)
def test_late_usage_is_billed_now_where_the_source_says_so(house: Held, name: str, switches: dict[str, str]) -> None:
    """First, more, and less: each lands in the open period, whatever the site does with what is dated before it."""
    house.allow_negative = True
    source = lenient(name, late_usage=GOES[name])
    day, other = a_day(source, 29), november(source)
    house.sandbox.switch(SITES[name], **switches)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, other, used(source, other, "50"))
    for quantity in ("7", "9", "4"):
        house.run(source, day, used(source, day, quantity))
        assert (house.listed(source, day), billed(house, source)) == ([], 50 + Decimal(quantity))
    assert house.states(source, day) == {"accepted": 3}
    nothing_is_sent_again(house, source, day, "4")
    nothing_is_sent_again(house, source, other, "50")


@pytest.mark.parametrize(("name", "switches"), ALL)
@pytest.mark.parametrize("policy", ["hold", "refuse"])
@pytest.mark.parametrize("quantity", ["12", "7"])
def test_late_corrections_are_held_or_refused_where_the_source_says_so(
    house: Held, name: str, switches: dict[str, str], policy: str, quantity: str
) -> None:
    """What was billed in its time stays; the difference is listed by name, not sent, and can be written off."""
    house.allow_negative = True
    source = lenient(name, late_usage=policy)
    day, other = a_day(source, 30), november(source)
    house.sandbox.switch(SITES[name], **switches)
    house.run(source, day, used(source, day, "10"))
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, other, used(source, other, "50"))
    house.run(source, day, used(source, day, quantity))
    state = {"hold": "held", "refuse": "refused"}[policy]
    difference = f"{Decimal(quantity) - 10}"
    assert (house.listed(source, day), billed(house, source)) == ([(state, difference)], 60)
    nothing_is_sent_again(house, source, day, quantity)
    assert house.states(source, day) == {"accepted": 1, state: 1}, "running again made no other revision"
    house.ledger.decide(house.open_items(source, day)["token"].item(), State.WRITTEN_OFF, "somebody: so be it")
    nothing_is_sent_again(house, source, day, quantity)
    assert house.listed(source, day) == []


@pytest.mark.parametrize("name", GOES)
def test_what_the_source_refuses_no_person_releases_but_another_policy_bills(house: Held, name: str) -> None:
    """A refusal is the source's word, so the source takes it back: held again, or billed."""
    source, day = lenient(name, late_usage="refuse"), a_day(shipped(name), 30)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    assert house.listed(source, day) == [("refused", "7")]
    token, reason = house.open_items(source, day)[["token", "reason"]].iloc[0]
    assert reason.startswith("never sent, as late_usage says: ")
    with pytest.raises(Misconfigured, match="its source refuses it by late_usage: refuse"):
        house.ledger.decide(token, State.HELD, "somebody: no, send it")
    held = lenient(name, late_usage="hold")
    house.run(held, day, used(held, day, "7"))
    assert house.listed(held, day) == [("held", "7")]
    goes = lenient(name, late_usage=GOES[name])
    house.run(goes, day, used(goes, day, "7"))
    assert (house.listed(goes, day), billed(house, goes)) == ([], 7)
    nothing_is_sent_again(house, goes, day, "7")


@pytest.mark.parametrize(("name", "switches"), ALL)
@pytest.mark.parametrize(("policy", "grace"), [("hold", {}), ("hold", {"grace": "24h"}), ("refuse", {"grace": "24h"})])
def test_grace_lets_the_last_day_of_a_billing_period_pass(
    house: Held, name: str, switches: dict[str, str], policy: str, grace: dict[str, str]
) -> None:
    """Its run comes after the renewal: it goes into the open period; the day before it is late, as ever."""
    source = lenient(name, late_usage=policy, **grace)
    last, before, other = a_day(source, 31), a_day(source, 30), november(source)
    house.sandbox.switch(SITES[name], **switches)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, last, used(source, last, "7"))
    house.run(source, before, used(source, before, "5"))
    assert billed(house, source) == Decimal(7)
    assert house.listed(source, last) == []
    assert house.listed(source, before) == [({"hold": "held", "refuse": "refused"}[policy], "5")]
    nothing_is_sent_again(house, source, last, "7")
    house.run(source, other, used(source, other, "50"))
    assert billed(house, source) == Decimal(57)
    assert house.reconcile(source, other).ties_out


@pytest.mark.parametrize("policy", ["hold", "refuse"])
@pytest.mark.parametrize(("grace", "bills"), [({}, 7), ({"grace": "0h"}, 0)])
def test_a_week_that_the_renewal_cuts_in_two_passes_it_if_its_grace_lets_it(
    house: Held, policy: str, grace: dict[str, str], bills: int
) -> None:
    """It begins in the invoiced cycle and ends in the open one."""
    source = lenient("voip_minutes", late_usage=policy, **grace)
    source = replace(source, settings=source.settings.model_copy(update={"period": "week"}))
    day = a_day(source, 31)
    week = Period(day.start - timedelta(days=5), day.end + timedelta(days=2))
    house.sandbox.move_clock("2026-11-04T12:00:00Z")
    house.run(source, week, used(source, day, "7"))
    assert billed(house, source) == bills
    assert len(house.listed(source, week)) == (0 if bills else 1)


@pytest.mark.parametrize("late_usage", ["never_billed", "next_invoice"])
def test_chargeover_usage_goes_with_its_own_time_where_the_source_says_so(house: Held, late_usage: str) -> None:
    """It is for accounts of which a person knows that they bill it: of another one nothing would be billed."""
    source, day = lenient("voip_minutes", late_usage="original_time"), a_day(shipped("voip_minutes"), 30)
    house.sandbox.switch(SITES["voip_minutes"], late_usage=late_usage)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, day, used(source, day, "7"))
    assert house.states(source, day) == {"accepted": 1}
    assert billed(house, source) == (7 if late_usage == "next_invoice" else 0)
    nothing_is_sent_again(house, source, day, "7")


ENDS_AS = {"hold": ("held", 0), "refuse": ("refused", 0), "now": ("accepted", 7), "bill_now": ("accepted", 7)}


@pytest.mark.parametrize(
    ("name", "policy", "grace"),
    [
        *((name, policy, "0h") for name, goes in GOES.items() for policy in ("hold", "refuse", goes)),
        *((name, "refuse", "2d") for name in GOES),
    ],
)
def test_what_a_renewal_overtakes_ends_as_the_source_says(house: Held, name: str, policy: str, grace: str) -> None:
    """Right when it was planned, late when its turn comes: no body of before goes under its token."""
    source = lenient(name, late_usage=policy, grace=grace)
    day = a_day(source, 30)
    comparison, folder = house.totals(source, day, used(source, day, "7"))
    first = house.plan(source, comparison, folder)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.deliver(source, comparison, folder, first=first)
    state, quantity = ENDS_AS[policy if grace == "0h" else GOES[name]]
    rows = house.ledger.standing(source.name, Period.around(source.periods(day)))
    assert rows["state"].iloc[-1] == state
    assert billed(house, source) == Decimal(quantity)
    if quantity:
        nothing_is_sent_again(house, source, day, "7")
        return
    before = house.writing_requests(source)
    house.run(source, day, used(source, day, "7"))
    house.sweep(source)
    assert (house.writing_requests(source), billed(house, source)) == (before, 0)
    assert [each for each, _ in house.listed(source, day)] == [state]


OTHERS = {"api_calls": "acct-0002", "platform_events": "orbit-02", "voip_minutes": "pkg-002"}


@pytest.mark.parametrize("name", sorted(SITES))
def test_usage_of_an_account_that_is_gone_is_taken_back_while_its_billing_period_is_open(
    house: Held, name: str
) -> None:
    """No row of the run names the account: the site is asked for its billing period, and takes the credit; once."""
    house.allow_negative = True
    source = lenient(name)
    day = a_day(source, 5)
    house.run(source, day, used(source, day, "7"))
    others = used(source, day, "3", OTHERS[name])
    house.run(source, day, others)
    assert house.billed(source) == {OTHERS[name]: Decimal(3)}
    assert house.listed(source, day) == []
    before = house.writing_requests(source)
    house.run(source, day, others)
    assert house.writing_requests(source) == before


@pytest.mark.parametrize("name", ["platform_events", "voip_minutes"])
def test_nobody_takes_back_from_an_account_that_the_site_does_not_bill_any_more(house: Held, name: str) -> None:
    """Its customer has left: no open billing period is known, so the credit is a person's, by name."""
    house.allow_negative = True
    source = lenient(name)
    day = a_day(source, 5)
    house.run(source, day, used(source, day, "7"))
    ENDS[name](house)
    house.run(source, day, used(source, day, "3", OTHERS[name]))
    assert house.listed(source, day) == [("held", "-7")]
    assert "the site does not bill it any more" in house.open_items(source, day)["reason"].iloc[0]


@pytest.mark.parametrize(("policy", "state", "quantity"), [("hold", "held", 57), ("refuse", "refused", 57)])
def test_a_deduction_of_usage_that_is_gone_is_overtaken_like_any_other(
    house: Held, policy: str, state: str, quantity: int
) -> None:
    """No row of the run tells the account's billing period: it is no deduction from the next one all the same."""
    source = lenient("api_calls", late_usage=policy)
    day = a_day(source, 30)
    house.run(source, day, used(source, day, "7"))
    comparison, folder = house.totals(source, day, used(source, day, "1", "acct-0002"))
    first = house.plan(source, comparison, folder)
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    house.run(source, november(source), used(source, november(source), "50"))
    house.deliver(source, comparison, folder, first=first)
    assert (state, "-7") in house.listed(source, day)
    assert billed(house, source) == quantity


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def commands(house: Held, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    """A house whose ledger the command finds."""
    from usage_billing import installation  # noqa: PLC0415

    connection = {"conn_type": "sqlite", "host": house.ledger_url.removeprefix("sqlite:///")}
    monkeypatch.setenv("AIRFLOW_CONN_USAGE_LEDGER", json.dumps(connection))
    yield house
    installation.ledger().close()
    installation._ledger.cache_clear()


def test_what_is_held_is_listed_and_released_by_name(commands: Held, capsys: pytest.CaptureFixture[str]) -> None:
    """The list names token, customer, period, quantity, reason and age; several are let go in one command, or none."""
    house, source = commands, lenient("voip_minutes", grace="0h")
    days = [a_day(source, 30), a_day(source, 31)]
    house.sandbox.move_clock(AFTER_THE_RENEWAL)
    for number, day in enumerate(days):
        house.run(source, day, used(source, day, f"{7 + number}"))
    assert main(["ledger", "list", source.name, "--state", "held"]) == 0
    told = capsys.readouterr().out
    tokens = [line for line in told.splitlines() if len(line) == 64]
    assert "held 7 of pkg-001 (subscription package:pkg-001), 2026-10-30T05:00Z to 2026-10-31T05:00Z, since " in told
    assert told.endswith("2 open of voip_minutes\n")
    because = ["--because", "agreed by mail"]
    assert main(["ledger", "decide", *tokens, "f" * 64, "release", *because]) == 1
    assert "no such delivery" in capsys.readouterr().err
    assert house.ledger.released(source.name).empty
    assert main(["ledger", "decide", *tokens, "release", *because]) == 0
    assert main(["ledger", "list", source.name, "--from", "2026-10-31", "--to", "2026-11-01"]) == 0
    told = capsys.readouterr().out
    assert "released: decided on " in told
    assert "agreed by mail" in told
    assert told.endswith("1 open of voip_minutes\n")
    house.sweep(source)
    assert billed(house, source) == Decimal(15)
    assert main(["ledger", "list", source.name]) == 0
    assert capsys.readouterr().out == "0 open of voip_minutes\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["voip_minuts"], "knows no billing source 'voip_minuts'"),
        (["voip_minutes", "--from", "2026-10-01"], "together"),
    ],
)
def test_a_list_that_nobody_can_make_says_why(
    commands: Held, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    """A misspelt source is not one without open items."""
    source = shipped("voip_minutes")
    commands.ledger.register(source.name, SITES[source.name], source.definition())
    assert main(["ledger", "list", *arguments]) == 1
    assert told in capsys.readouterr().err
