"""ChargeOver alone: values that are rounded, keys that are refused, lines that are replaced, cycles that end."""

from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import requests

from stories import GENTLE, SITES, Event, House, a_day, a_house, shipped
from usage_billing.records import DECIDED, PERSON_DECIDES, Period, State
from usage_billing.sources import BillingSource

SITE = SITES["voip_minutes"]
SHORTLY = replace(GENTLE, patience=timedelta(seconds=3))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path) as found:
        yield found


def minutes(mode: str = "batch", decimals: int = 2, **keys: object) -> BillingSource:
    """Return the shipped source, with records that travel so and have so many decimal places, and other keys."""
    source = shipped("voip_minutes")
    meter = source.settings.meter.model_copy(update={"decimals": decimals})
    settings = source.settings.model_copy(update={"meter": meter})
    return replace(source, settings=settings, destination=source.destination.model_copy(update={"mode": mode, **keys}))


def used(source: BillingSource, day: Period, quantities: dict[str, str]) -> list[Event]:
    """Make one event at noon for each account."""
    dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
    return [
        Event(f"{account}-{day.start:%d}", account, quantity, day.start + timedelta(hours=12), dimensions)
        for account, quantity in quantities.items()
    ]


def left(house: House, source: BillingSource, day: Period) -> Any:
    """Return what is listed by name for a day."""
    return house.ledger.open_items(source.name, Period.around(source.periods(day)))


@pytest.mark.parametrize("mode", ["single", "batch", "bulk"])
def test_a_value_that_the_account_rounds_is_never_accepted_as_sent(house: House, mode: str) -> None:
    """Rounded without a word: what was billed otherwise is listed by name, and what was stored exactly is accepted."""
    house.sandbox.switch(SITE, precise_usage="round")
    source, day = minutes(mode, decimals=6), a_day(minutes(), 5)
    house.run(source, day, used(source, day, {"pkg-001": "1.00005", "pkg-002": "2.5", "pkg-003": "0.0625"}), SHORTLY)
    assert house.billed(source) == {
        "pkg-001": Decimal("1.0001"),
        "pkg-002": Decimal("2.5"),
        "pkg-003": Decimal("0.0625"),
    }
    assert house.states(source, day) == {"accepted": 2, "in_doubt": 1}
    (told,) = left(house, source, day)["reason"]
    assert told.startswith(PERSON_DECIDES)
    assert "held with 1.0001, and 1.00005" in told


@pytest.mark.parametrize("mode", ["single", "batch", "bulk"])
def test_a_value_that_the_account_keeps_is_accepted_to_its_last_place(house: House, mode: str) -> None:
    """Read back as sent: nothing is left open."""
    source, day = minutes(mode, decimals=9), a_day(minutes(), 5)
    house.run(source, day, used(source, day, {"pkg-001": "1.000050001", "pkg-002": "2.5"}), SHORTLY)
    assert house.billed(source) == {"pkg-001": Decimal("1.000050001"), "pkg-002": Decimal("2.5")}
    assert house.states(source, day) == {"accepted": 2}
    assert house.reconcile(source, day).ties_out


@pytest.mark.parametrize("mode", ["single", "batch"])
def test_a_key_that_is_refused_while_reads_lag_is_billed_once_and_ends_accepted(house: House, mode: str) -> None:
    """The first reply is lost, nothing is to be read, the second one is a refusal: that is no dead letter."""
    house.sandbox.switch(SITE, usage_read_delay_seconds=600, error_texts="generic")
    house.sandbox.fault(SITE, "lost_reply")
    source, day = minutes(mode), a_day(minutes(), 5)
    events = used(source, day, {"pkg-001": "7"})
    house.run(source, day, events, SHORTLY)
    assert house.billed(source) == {"pkg-001": Decimal(7)}
    assert house.states(source, day) == {"in_doubt": 1}
    assert left(house, source, day)["sends"].tolist() == [2], "it was asked for, and not sent round and round"
    assert "perhaps because its first request arrived after all" in left(house, source, day)["reason"].item()

    house.sandbox.move_clock(advance_seconds=601)
    house.run(source, day, events, SHORTLY)
    assert house.billed(source) == {"pkg-001": Decimal(7)}
    assert house.states(source, day) == {"accepted": 1}
    assert house.reconcile(source, day).ties_out


def test_what_is_refused_in_earnest_after_a_lost_reply_ends_as_a_person_says(house: House) -> None:
    """A person who finds nothing there sends it again; a refusal of that is the last word."""
    source, day = minutes("single"), a_day(minutes(), 5)
    events = used(source, day, {"pkg-001": "7.12345"})
    source = replace(source, settings=minutes("single", decimals=5).settings)
    house.sandbox.switch(SITE, precise_usage="refuse")
    house.sandbox.fault(SITE, "server_error")
    house.run(source, day, events, SHORTLY)
    assert house.states(source, day) == {"in_doubt": 1}

    token = left(house, source, day)["token"].item()
    house.ledger.decide(token, State.RESERVED, f"{DECIDED}2026-10-20 by somebody: it is not there")
    house.run(source, day, events, SHORTLY)
    assert house.states(source, day) == {"superseded": 1, "refused": 1}
    assert house.billed(source) == {}


def test_one_bad_record_of_a_batch_that_is_refused_whole_is_refused_alone(house: House) -> None:
    """One transaction at the site: each goes singly next, two are billed, the culprit ends with the site's words."""
    house.sandbox.switch(SITE, batch_atomicity="atomic", precise_usage="refuse")
    source, day = minutes("batch", decimals=5), a_day(minutes(), 5)
    events = used(source, day, {"pkg-001": "7", "pkg-002": "1.12345", "pkg-003": "2.5"})
    house.run(source, day, events, SHORTLY)
    assert house.billed(source) == {"pkg-001": Decimal(7), "pkg-003": Decimal("2.5")}
    assert house.states(source, day) == {"accepted": 2, "refused": 1}
    told = left(house, source, day)
    assert told["account"].tolist() == ["pkg-002"]
    assert "HTTP 400" in told["reason"].item()
    assert "perhaps" not in told["reason"].item()

    sent = house.writing_requests(source)
    house.run(source, day, events, SHORTLY)
    assert house.writing_requests(source) == sent == 4


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_an_account_that_takes_no_batch_is_billed_singly(house: House, status: int) -> None:
    """Whatever it says no with: asked for, not there, and sent alone, it is billed once and not round and round."""
    house.sandbox.fault(SITE, "server_error", status=status, count=1000, route="batch")
    source, day = minutes(), a_day(minutes(), 5)
    house.run(source, day, used(source, day, {"pkg-001": "7", "pkg-002": "3"}), SHORTLY)
    assert house.billed(source) == {"pkg-001": Decimal(7), "pkg-002": Decimal(3)}
    assert house.states(source, day) == {"accepted": 2}
    assert house.writing_requests(source) == 3


@pytest.mark.parametrize("carried_out", [True, False])
def test_a_refusal_after_a_lost_single_reply_is_still_a_doubt(house: House, carried_out: bool) -> None:
    """Refused with others, sent alone, lost, and refused again: by then its own request may have arrived."""
    house.sandbox.switch(SITE, usage_read_delay_seconds=600, error_texts="generic")
    house.sandbox.fault(SITE, "server_error", status=400, route="batch")
    house.sandbox.fault(SITE, "lost_reply", route="create_usage", carried_out=carried_out)
    source, day = minutes(), a_day(minutes(), 5)
    events = used(source, day, {"pkg-001": "7", "pkg-002": "3"})
    house.run(source, day, events, SHORTLY)
    assert house.billed(source) == {"pkg-001": Decimal(7), "pkg-002": Decimal(3)}
    assert house.states(source, day) == ({"accepted": 1, "in_doubt": 1} if carried_out else {"accepted": 2})
    house.sandbox.move_clock(advance_seconds=601)
    house.run(source, day, events, SHORTLY)
    assert house.states(source, day) == {"accepted": 2}
    assert house.reconcile(source, day).ties_out


def upgrade(house: House, package: int, line: int) -> None:
    """Change a line's price on the site, as its owner would."""
    keys = ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000")
    body = {"line_items": [{"line_item_id": line, "tierset": {"tiers": [{"amount": 0.07}]}}]}
    url = f"{house.sandbox.chargeover_url('telco')}/api/v3/package/{package}/_action/upgrade"
    assert requests.post(url, json=body, auth=keys, timeout=5).status_code == 200


@pytest.mark.parametrize("dropped", [True, False])
def test_usage_on_a_line_that_an_upgrade_replaced_is_told_by_name(house: House, dropped: bool) -> None:
    """Accepted, stored, and perhaps never billed: no document says, so the tie-out names it in the open cycle."""
    house.sandbox.switch(SITE, usage_of_replaced_line="dropped" if dropped else "billed")
    source, day, next_day = minutes(), a_day(minutes(), 18), a_day(minutes(), 19)
    house.run(source, day, used(source, day, {"pkg-001": "100", "pkg-002": "5"}))
    assert house.reconcile(source, day).moved == 0
    upgrade(house, 713, 854)
    house.run(source, next_day, used(source, next_day, {"pkg-001": "3"}))

    found = house.reconcile(source, day)
    assert (found.matched, found.moved, found.ties_out) == (2, 1, True)
    (told,) = found.warnings
    assert "pkg-001" in told
    assert "stored on line 854, which was replaced by " in told
    assert house.reconcile(source, next_day).moved == 0
    billed = {"pkg-001": Decimal(3 if dropped else 103), "pkg-002": Decimal(5)}
    assert house.billed(source) == billed

    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    assert house.reconcile(source, day).moved == 0, "its cycle is invoiced: nothing is left to look at"


def test_a_warehouse_that_names_lines_bills_once_through_an_upgrade(house: House) -> None:
    """The old id leads nowhere, so its rows wait, and withdraw nothing; once mended, only what is new is billed."""
    source, day = minutes(package_by="line_item_id"), a_day(minutes(), 18)
    limits = source.settings.quarantine.model_copy(update={"max_share": 1.0})
    source = replace(source, settings=source.settings.model_copy(update={"quarantine": limits}))
    before = used(source, day, {"854": "100", "855": "5"})
    house.run(source, day, before)
    upgrade(house, 713, 854)
    new = str(house.destination(source).client.package(713)["line_items"][0]["line_item_id"])
    late = used(source, day, {new: "4"})

    house.run(source, day, before + late)
    assert house.billed(source) == {"pkg-001": Decimal(100), "pkg-002": Decimal(5)}
    (told,) = house.ledger.quarantined(source.name)["reasons"]
    assert "line item 854 is on no package of chargeover:telco" in told
    (held,) = left(house, source, day)["reason"]
    assert "quarantine" in held

    mended = [replace(event, account=new) if event.account == "854" else event for event in before + late]
    house.run(source, day, mended)
    assert house.billed(source) == {"pkg-001": Decimal(104), "pkg-002": Decimal(5)}
    assert house.ledger.quarantined(source.name).empty
    assert left(house, source, day).empty
    house.run(source, day, mended)
    assert house.billed(source) == {"pkg-001": Decimal(104), "pkg-002": Decimal(5)}
    assert house.reconcile(source, day).ties_out


@pytest.mark.parametrize("shown", ["naive", "iso", "iso_honolulu"])
def test_usage_of_an_invoiced_cycle_is_held_however_the_account_shows_times(house: House, shown: str) -> None:
    """In Honolulu the next invoice is still on the last of the month: read there, the 31st would pass for open."""
    house.sandbox.switch(SITE, times_out=shown)
    house.sandbox.move_clock("2026-11-02T12:00:00Z")
    source, day = minutes(grace=timedelta(0)), a_day(minutes(), 31)
    house.run(source, day, used(source, day, {"pkg-001": "7"}))
    assert house.billed(source) == {}
    assert house.states(source, day) == {"held": 1}
