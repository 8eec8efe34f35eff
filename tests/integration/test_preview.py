"""The preview against what its run then sends: item by item, for every destination, and without a trace of its own."""

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from stories import SITES, Event, House, a_day, a_house, shipped, small_batches
from usage_billing.archive import Archive
from usage_billing.chunks import plan_events
from usage_billing.errors import Misconfigured, NeedsDecision
from usage_billing.guard import owed_by_period, unusual
from usage_billing.plan import plan
from usage_billing.preview import ITEM_COLUMNS, NAMED, Preview, preview, write_items
from usage_billing.records import REFUSED_HERE, Period, Reading, State
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging

ACCOUNTS = {
    "api_calls": ("acct-0001", "acct-0002", "acct-0003"),
    "platform_events": ("orbit-01", "orbit-02", "orbit-03"),
    "voip_minutes": ("pkg-001", "pkg-002", "pkg-003"),
}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A sandbox, a ledger and staging."""
    with a_house(tmp_path / "house") as found:
        yield found


@pytest.fixture(params=[*sorted(ACCOUNTS), "raw"])
def source(request: pytest.FixtureRequest) -> BillingSource:
    """Each of the shipped sources, and the events one by raw events."""
    if request.param != "raw":
        return shipped(request.param)
    found = shipped("platform_events")
    destination = found.destination.model_copy(update={"mode": "events", "metric": "sum"})
    return replace(found, destination=destination)


def usage(source: BillingSource, day: int, *quantities: str, last: int = 3) -> list[Event]:
    """Make events of a day, one for each quantity of each of the first `last` accounts; an account's number counts."""
    interval = a_day(source, day)
    return [
        Event(
            f"{account}-{day}-{place}",
            account,
            str(Decimal(quantity) + number),
            interval.start + timedelta(hours=8, minutes=place),
            ("eu", "premium")[: len(source.settings.dimensions)],
        )
        for number, account in enumerate(ACCOUNTS[source.name][:last])
        for place, quantity in enumerate(quantities)
    ]


def look(
    house: House, source: BillingSource, interval: Period, events: list[Event], folder: Path
) -> tuple[Preview, list[dict[str, str]]]:
    """Preview an interval as `usage-billing preview` does: an area of its own, and a reading without a number."""
    ours, theirs = house.staging, house.archive
    house.staging, house.archive = Staging(folder), theirs.aside(folder / "archive")
    try:
        comparison = house.looked(source, interval, events)
        destination = house.destination(source)
        how = plan_events if destination.stream else plan
        found = how(comparison, destination, house.ledger, house.staging, "looked")
        items = io.StringIO()
        write_items(found, destination, house.staging, items)
        told = preview(found, comparison, destination, house.ledger, house.staging)
        return told, list(csv.DictReader(io.StringIO(items.getvalue())))
    finally:
        house.staging, house.archive = ours, theirs


def going(items: list[dict[str, str]]) -> dict[tuple[str, str], Decimal]:
    """Return what the items say is sent, by token and event."""
    return {
        (item["token"], item["event_id"]): Decimal(item["quantity"])
        for item in items
        if item["state"] == State.RESERVED
    }


def sent(house: House, source: BillingSource, interval: Period) -> dict[tuple[str, str], Decimal]:
    """Return what the ledger has accepted of an interval, by token and event."""
    accepted = house.ledger.accepted(source.name, Period.around(source.periods(interval)))
    destination = house.destination(source)
    found: dict[tuple[str, str], Decimal] = {}
    for row in accepted.to_dict("records"):
        if not destination.stream:
            found[row["token"], ""] = Decimal(row["quantity"])
            continue
        events = house.archive.read(_kept(row["address"]))
        for event, quantity in zip(
            events.column("event_id").to_pylist(), events.column("quantity").to_pylist(), strict=True
        ):
            found[row["token"], event] = Decimal(quantity)
    return found


def _kept(address: str) -> Any:
    import json  # noqa: PLC0415

    from usage_billing.archive import Archived  # noqa: PLC0415

    return Archived.at(json.loads(address))


def rows_of(house: House) -> dict[str, list[tuple[Any, ...]]]:
    """Return every row of every table of the ledger."""
    from sqlalchemy import create_engine, inspect, text  # noqa: PLC0415

    engine = create_engine(house.ledger_url)
    with engine.connect() as connection:
        tables = inspect(connection).get_table_names()
        found = {name: [tuple(row) for row in connection.execute(text(f"SELECT * FROM {name}"))] for name in tables}  # noqa: S608
    engine.dispose()
    return found


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def site_of(house: House, source: BillingSource) -> Any:
    """Return what the site billed and how many writing requests it had."""
    return house.sandbox.billed(SITES[source.name]), house.writing_requests(source)


def test_what_is_sent_is_what_the_preview_said_item_by_item(
    house: House, source: BillingSource, tmp_path: Path
) -> None:
    """New usage, and then corrections of it and more: each delivery (or event), with its quantity, and no other."""
    day = a_day(source, 5)
    for number, events in enumerate([usage(source, 5, "3", "4"), usage(source, 5, "3", "4", "11.0")]):
        already = sent(house, source, day)
        billed_before = sum(house.billed(source).values(), Decimal(0))
        told, items = look(house, source, day, events, tmp_path / f"look-{number}")
        house.run(source, day, events)
        now = sent(house, source, day)
        assert going(items) == {key: now[key] for key in now.keys() - already.keys()}
        assert going(items)
        assert told.sends == sum(going(items).values())
        # The site's own count, since a preview may agree with the ledger and both be wrong.
        assert sum(house.billed(source).values(), Decimal(0)) - billed_before == told.sends
    told, items = look(house, source, day, events, tmp_path / "look-again")
    assert (going(items), told.going, told.sends) == ({}, 0, 0)


def test_a_look_leaves_no_trace(house: House, source: BillingSource, tmp_path: Path) -> None:
    """Neither a row of the ledger, nor a file of staging or archive, nor anything at the site is another afterwards."""
    day = a_day(source, 5)
    house.run(source, day, usage(source, 5, "3", "4"))
    before = rows_of(house), files_of(tmp_path / "house" / "staging"), files_of(tmp_path / "house" / "archive")
    at_the_site = site_of(house, source)
    look(
        house,
        source,
        Period(day.start, day.end + timedelta(days=1)),
        usage(source, 5, "3", "4", "5"),
        tmp_path / "look",
    )
    after = rows_of(house), files_of(tmp_path / "house" / "staging"), files_of(tmp_path / "house" / "archive")
    assert after == before
    assert site_of(house, source) == at_the_site


def test_a_look_makes_no_run_stale(house: House, source: BillingSource, tmp_path: Path) -> None:
    """A plan that waits is sent as if nobody had looked in between, with rows that came later or without."""
    day, events = a_day(source, 5), usage(source, 5, "3", "4")
    comparison, folder = house.totals(source, day, events)
    first = house.plan(source, comparison, folder)
    look(house, source, day, usage(source, 5, "3", "4", "5"), tmp_path / "look")
    house.deliver(source, comparison, folder, first=first)
    assert sum(house.billed(source).values()) == sum(Decimal(event.quantity) for event in events)


def test_the_cases_are_told_apart(house: House, tmp_path: Path) -> None:
    """New, up, down and unchanged, each with its exact sum."""
    source = shipped("api_calls")
    day = a_day(source, 5)
    house.run(source, day, usage(source, 5, "100", last=2))  # 100 and 101
    events = [*usage(source, 5, "100", last=1), *usage(source, 5, "102")[1:2], *usage(source, 5, "7")[2:]]
    events = [event if event.account != "acct-0001" else replace(event, quantity="90") for event in events]
    told, _ = look(house, source, day, events, tmp_path / "look")
    cases = {case.label: (case.count, case.quantity) for case in told.cases}
    assert cases["new"] == (1, 9)  # 7 + 2
    assert cases["corrections up"] == (1, 2)  # 103 - 101
    assert cases["corrections down"] == (1, -10)
    assert told.sends == 1
    assert told.unchanged == 0


def test_a_look_shows_what_withdraws_too_much_and_a_run_stops(
    house: House, source: BillingSource, tmp_path: Path
) -> None:
    """All but one unit is gone: the preview says what would go and why a run would not, and nothing is changed."""
    day = a_day(source, 5)
    house.run(source, day, usage(source, 5, "100"))
    billed, events = house.billed(source), usage(source, 5, "1", last=1)
    found = looked(house, source, day, events, tmp_path / "look")
    (line,) = found
    assert "max_withdraw_share = 10%" in line
    with pytest.raises(NeedsDecision, match="max_withdraw_share = 10%"):
        house.run(source, day, events)
    assert house.billed(source) == billed


def test_a_day_that_is_wholly_gone_is_taken_back_or_listed(house: House, source: BillingSource) -> None:
    """With leave to withdraw everything: what the site takes back is not billed any more, the rest is listed whole."""
    source = replace(source, settings=source.settings.model_copy(update={"max_withdraw_share": 1.0}))
    day = a_day(source, 5)
    house.run(source, day, usage(source, 5, "7"))
    billed = house.billed(source)
    house.run(source, day, [])
    left = house.ledger.open_items(source.name, Period.around(source.periods(day)))
    listed = sorted(zip(left["state"], left["quantity"], strict=True))
    if house.destination(source).stream:  # No call takes an event back.
        assert (house.billed(source), listed) == (billed, [("held", "-3")])
    elif source.name == "voip_minutes":  # Nobody said that this account takes negative usage.
        assert (house.billed(source), listed) == (billed, [("held", "-7"), ("held", "-8"), ("held", "-9")])
    else:
        assert (house.billed(source), listed) == ({}, [])


def looked(house: House, source: BillingSource, day: Period, events: list[Event], folder: Path) -> list[str]:
    """Return what `usage-billing preview` calls unusual about a day."""
    ours, theirs = house.staging, house.archive
    house.staging, house.archive = Staging(folder), theirs.aside(folder / "archive")
    try:
        comparison, destination = house.looked(source, day, events), house.destination(source)
        found = (plan_events if destination.stream else plan)(comparison, destination, house.ledger, house.staging, "l")
        assert preview(found, comparison, destination, house.ledger, house.staging).lines()
        owed = owed_by_period(comparison, destination, house.staging)
        return unusual(found, comparison, owed, destination, house.ledger, house.staging)
    finally:
        house.staging, house.archive = ours, theirs


def test_what_the_source_refuses_is_told_as_such_and_not_as_sent(house: House, tmp_path: Path) -> None:
    """Usage of a billing period that has closed, under `late_usage: refuse`: nothing would go, the text says why."""
    source = shipped("api_calls")
    settings = source.destination.model_dump() | {"late_usage": "refuse"}
    source = replace(source, destination=type(source.destination).model_validate(settings))
    day = a_day(source, 5)
    house.sandbox.move_clock("2026-11-20T12:00:00Z")
    told, _ = look(house, source, day, usage(source, 5, "3"), tmp_path / "look")
    cases = {case.label: case.count for case in told.cases}
    assert (cases["new"], cases["refused here"], told.going, told.sends) == (0, 3, 0, 0)
    (reason,) = told.held
    assert reason.label.startswith(REFUSED_HERE)
    assert (reason.count, house.writing_requests(source)) == (3, 0)


def test_what_was_held_or_rejected_before_is_new_as_long_as_nothing_of_it_is_settled(
    house: House, tmp_path: Path
) -> None:
    """A second revision of something that was never billed is no correction to whoever reads the preview."""
    source = shipped("api_calls")
    day, events = a_day(source, 5), usage(source, 5, "3")
    comparison, folder = house.totals(source, day, events)
    planned = house.plan(source, comparison, folder)
    for part in house.staging.read(planned.proposals):
        frame = part.to_pandas().assign(state=State.HELD, reason="some reason of before")
        house.ledger.reserve(source.name, house.destination(source).site, comparison.reading, frame)
    told, items = look(house, source, day, events, tmp_path / "look")
    assert {case.label: case.count for case in told.cases}["new"] == 3
    assert {item["revision"] for item in items} == {"1"}


def test_the_largest_movers_are_against_the_period_before(house: House, tmp_path: Path) -> None:
    """By the ledger's accepted of the day before; who had nothing then, or has nothing now, moved too."""
    source = shipped("api_calls")
    house.run(source, a_day(source, 5), usage(source, 5, "100", last=2))
    told, _ = look(house, source, a_day(source, 6), usage(source, 6, "40")[1:], tmp_path / "look")
    assert told.before == a_day(source, 5)
    assert [(mover.before, mover.now, mover.change) for mover in told.movers] == [
        (100, 0, -100),
        (101, 41, -60),
        (0, 42, 42),
    ]


def test_several_days_compare_the_last_two_of_them(house: House, tmp_path: Path) -> None:
    """A dry run of a span of which nothing was ever compared finds the day before in its own totals."""
    source = shipped("api_calls")
    days = Period(a_day(source, 5).start, a_day(source, 6).end)
    events = usage(source, 5, "10", last=1) + usage(source, 6, "25", last=1)
    told, _ = look(house, source, days, events, tmp_path / "look")
    assert [(mover.before, mover.now) for mover in told.movers] == [(10, 25)]


def test_a_first_period_has_nothing_to_be_compared_with(house: House, tmp_path: Path) -> None:
    """It says so."""
    source = shipped("api_calls")
    told, _ = look(house, source, a_day(source, 5), usage(source, 5, "10"), tmp_path / "look")
    assert (told.before, told.movers) == (None, ())
    assert "nothing to compare" in "\n".join(told.lines())


@pytest.mark.parametrize("rows", [3, 100_000])
def test_the_text_names_the_largest_and_counts_the_rest(house: House, tmp_path: Path, rows: int) -> None:
    """Whatever the number of subscriptions, and of parts: the top are named, and named and rest come to the whole."""
    source = small_batches(shipped("api_calls"), rows)
    day = a_day(source, 5)
    events = [
        Event(f"e-{number}", f"acct-{number:04}", str(1000 - number), day.start + timedelta(hours=8))
        for number in range(1, 13)
    ]
    told, _ = look(house, source, day, events, tmp_path / "look")
    assert [share.quantity for share in told.shares] == [1000 - number for number in range(1, NAMED + 1)]
    assert told.shares_rest.count == 12 - NAMED
    assert sum(share.quantity for share in told.shares) + told.shares_rest.quantity == told.sends == 12 * 1000 - 78
    for text in ("\n".join(told.lines()), told.markdown()):
        assert "and 2 more subscriptions, 1,977 in all" in text
        assert "11,922" in text


def test_the_markdown_takes_no_name_for_a_link(house: House, tmp_path: Path) -> None:
    """What the warehouse or the site calls somebody is text, and nothing else, on the page where one approves."""
    source = shipped("api_calls")
    told, _ = look(house, source, a_day(source, 5), usage(source, 5, "10", last=1), tmp_path / "look")
    named = replace(told, shares=(replace(told.shares[0], subscription="[pay](http://x) | # <b>"),))
    assert r"\[pay\](http://x) \| \# \<b\>" in named.markdown()


def test_a_number_that_only_looks_writes_no_delivery(house: House) -> None:
    """The ledger itself takes nothing of a reading without a number: no run can mistake a look for a plan."""
    source = shipped("api_calls")
    day, events = a_day(source, 5), usage(source, 5, "3")
    comparison, folder = house.totals(source, day, events)
    planned = house.plan(source, comparison, folder)
    for part in house.staging.read(planned.proposals):
        outcome = house.ledger.reserve(source.name, house.destination(source).site, Reading(0), part.to_pandas())
        assert (outcome.written, outcome.moved) == (0, 3)
    assert house.states(source, day) == {}


def test_a_look_at_a_definition_that_changed_says_so(house: House) -> None:
    """As the run would, and a source that nobody has run yet is no reason to stop."""
    source = shipped("api_calls")
    site = house.destination(source).site
    house.ledger.agrees(source.name, site, source.definition())
    assert house.ledger.sources() == []
    house.ledger.register(source.name, site, source.definition())
    house.ledger.agrees(source.name, site, source.definition())
    house.run(source, a_day(source, 5), usage(source, 5, "3"))
    with pytest.raises(Misconfigured, match="period: was"):
        house.ledger.agrees(source.name, site, {**source.definition(), "period": "hour"})


def test_an_archive_aside_reads_what_is_kept_and_writes_elsewhere(tmp_path: Path) -> None:
    """Both come back, and the real one has no more files than before."""
    import pyarrow as pa  # noqa: PLC0415

    from usage_billing.archive import EVENTS  # noqa: PLC0415

    one, two = (
        pa.table({name: pa.array([None if name == "time" else text], EVENTS.field(name).type) for name in EVENTS.names})
        for text in ("one", "two")
    )
    kept = Archive(tmp_path / "kept")
    there = kept.write("a", one)
    before = files_of(tmp_path / "kept")
    aside = kept.aside(tmp_path / "aside")
    new = aside.write("a", two)
    assert (aside.read(there), aside.read(new)) == (one, two)
    assert files_of(tmp_path / "kept") == before


def test_items_have_their_documented_columns(house: House, source: BillingSource, tmp_path: Path) -> None:
    """Every line is whole: a person looks for one customer in it."""
    _, items = look(house, source, a_day(source, 5), usage(source, 5, "3"), tmp_path / "look")
    assert tuple(items[0]) == ITEM_COLUMNS
    assert {item["period_start"][-1] for item in items} == {"Z"}
    assert all(item["subscription"] and item["component"] for item in items)
    assert all(bool(item["event_id"]) == bool(house.destination(source).stream) for item in items)


def test_the_site_itself_prices_a_metered_component(house: House, tmp_path: Path) -> None:
    """What the preview says the next invoices grow by, to the cent, they have grown by after the run."""
    source = shipped("api_calls")
    house.run(source, a_day(source, 5), usage(source, 5, "1000"))
    before, writing = invoices(house, source), house.writing_requests(source)
    day, events = a_day(source, 6), usage(source, 6, "50000")
    told, _ = look(house, source, day, events, tmp_path / "look")
    assert house.writing_requests(source) == writing
    assert [share.money for share in told.shares] == [Decimal(cents) / 100 for cents in (10001, 10000, 10000)]
    assert "money: 300.01 more on the next renewals of 3 of the 3 named" in told.money
    assert "| 50,002 | 100.01 |" in told.markdown()
    house.run(source, day, events)
    assert invoices(house, source) - before == Decimal("300.01")


def invoices(house: House, source: BillingSource) -> Decimal:
    """Return what the next renewals of the three accounts come to, by the site's plain preview."""
    destination = house.destination(source)
    numbers = [int(target.subscription) for target in destination.resolve(ACCOUNTS[source.name])]
    component = int(destination.resolve(ACCOUNTS[source.name][:1])[0].component)
    lines = [row for number in numbers for row in destination.client._renewal_lines(number, "{}")]
    return sum(
        (Decimal(row["amount_in_cents"]) / 100 for row in lines if row.get("component_id") == component), Decimal(0)
    )


def test_a_balance_with_decimals_is_not_priced(house: House) -> None:
    """The call takes whole numbers only: no answer is better than one to another question."""
    destination = house.destination(shipped("api_calls"))
    (target,) = destination.resolve(["acct-0001"])
    assert destination.priced({target.subscription: Decimal("0.5")}) == {}
    assert destination.priced({target.subscription: Decimal(500)}) == {target.subscription: Decimal(1)}
    assert destination.priced({target.subscription: Decimal(-500)}) == {target.subscription: Decimal(0)}


@pytest.mark.parametrize("name", ["platform_events", "voip_minutes"])
def test_where_the_site_prices_nothing_the_preview_says_so(house: House, tmp_path: Path, name: str) -> None:
    """A line, and no number."""
    source = shipped(name)
    told, _ = look(house, source, a_day(source, 5), usage(source, 5, "3"), tmp_path / "look")
    assert told.money.startswith("money: no documented call of ")
    assert {share.money for share in told.shares} == {None}


def test_what_is_held_is_told_with_its_reason_and_is_not_among_what_goes(house: House, tmp_path: Path) -> None:
    """A deduction that ChargeOver may not get: nobody who approves the plan sends it, and nobody overlooks it."""
    source = shipped("voip_minutes")
    day = a_day(source, 5)
    house.run(source, day, usage(source, 5, "100"))
    events = [
        replace(event, quantity="94") if event.account == "pkg-001" else event for event in usage(source, 5, "100")
    ]
    told, items = look(house, source, day, events, tmp_path / "look")
    assert (told.going, told.sends, going(items)) == (0, 0, {})
    (held,) = told.held
    assert (held.count, held.quantity) == (1, -6)
    assert "negative" in held.label
    assert "| held | 1 | -6 |" in told.markdown()
    assert [item["state"] for item in items] == ["held"]
