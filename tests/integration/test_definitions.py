"""Definitions that change under their history: each usage period is billed by the one of its time, and once.

Real operators on a real warehouse file, and the sandbox's own count is the verdict. In each story usage of both sides
of the change comes late, or is run again, after it.
"""

import json
import logging
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest
import requests
import yaml
from airflow.sdk.exceptions import AirflowSkipException

from stories import HASTY, WORLDS
from usage_billing import installation
from usage_billing.cli import main
from usage_billing.destinations.maxio import MaxioSite
from usage_billing.errors import Misconfigured
from usage_billing.hooks import MaxioHook
from usage_billing.installation import billing_source, destination_in, ledger, staging
from usage_billing.ledger import Ledger
from usage_billing.operators import (
    AggregateOperator,
    DeliverOperator,
    ExtractOperator,
    PlanOperator,
    ReconcileOperator,
    StageOperator,
    ValidateOperator,
)
from usage_billing.records import EVER, PERSON_DECIDES, Run, State
from usage_billing.sandbox import Sandbox
from usage_billing.sweep import SweepOperator

pytestmark = pytest.mark.filterwarnings("default")  # Airflow warns about itself in a dozen places.

STAGES: tuple[type[StageOperator], ...] = (
    ExtractOperator,
    ValidateOperator,
    AggregateOperator,
    PlanOperator,
    DeliverOperator,
    ReconcileOperator,
)
ACME, ACME_TOO, ORBIT = "maxio:us:acme", "maxio:us:acme-too", "maxio:us:orbit"
METERED = {
    "name": "maxio_metered",
    "connection": "maxio_acme",
    "subscription_by": "reference",
    "component": "handle:api-calls",
}
EVENTS = {
    "name": "maxio_events",
    "connection": "maxio_orbit",
    "stream": "platform-events",
    "subscription_by": "account_id",
    "component": "handle:platform-units",
    "property": "units",
}
SOURCE = {
    "name": "calls",
    "description": "Calls.",
    "warehouse": "warehouse",
    "schedule": "0 0 * * *",
    "timezone": "UTC",
    "period": "day",
    "bill_from": "2026-09-01",
    "columns": {"event_id": "id", "time": "used_at", "account": "account", "quantity": "quantity"},
    "meter": {"function": "sum", "decimals": 0},
    "max_withdraw_share": 1,
    "quarantine": {"max_share": 1, "max_rows": 1000},
}
USAGE = (
    "SELECT id, used_at, account, number, quantity, region FROM usage "
    "WHERE used_at >= :window_start AND used_at < :window_end"
)
ORBIT_USAGE = USAGE.replace("account,", "replace(account, 'acct-00', 'orbit-') AS account,")
"""The same, of accounts of the events site."""
SECOND_STREAM = """
  - id: 61103
    handle: platform-units-too
    name: Platform units, measured anew
    kind: event_based_component
    family: platform
    unit_name: unit
    allow_fractional_quantities: true
    stream: platform-events-too
    metric: {id: 81103, kind: sum, property: units}
    price_points:
      - {id: 71103, handle: standard, name: Standard, unit_price: "0.01", default: true}
"""


def worlds(folder: Path) -> list[Path]:
    """Return the shipped Maxio worlds, a second stream in the one, and a second site like the other."""
    acme, orbit = (
        next(world for world in WORLDS if f"site: {site}\n" in world.read_text()).read_text() for site in (ACME, ORBIT)
    )
    orbit = orbit.replace(
        "\nstreams:\n", "\nstreams:\n  - {handle: platform-events-too, name: Too, identifier: account}\n"
    )
    orbit = orbit.replace("\nsubscriptions:", f"{SECOND_STREAM}\nsubscriptions:")
    orbit = orbit.replace("activated: [platform-units,", "activated: [platform-units, platform-units-too,")
    texts = {"acme": acme, "acme-too": acme.replace(ACME, ACME_TOO), "orbit": orbit}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text.replace("sandbox-acme-key", f"sandbox-{name}-key"))
    return [folder / f"{name}.yaml" for name in texts]


class Place:
    """A source whose definition changes, with its warehouse, its ledger and the sites that it is billed to."""

    def __init__(self, sandbox: Sandbox, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.sandbox, self.folder, self.patch = sandbox, folder, patch
        self.settings: dict[str, Any] = {}
        with duckdb.connect(str(folder / "usage.duckdb")) as warehouse:
            warehouse.execute(
                "CREATE TABLE usage (id VARCHAR, used_at TIMESTAMPTZ, account VARCHAR, number BIGINT, "
                "quantity DECIMAL(18, 2), region VARCHAR, arrived BIGINT)"
            )

    def connect(self, name: str, site: str, host: str = "") -> None:
        """Let a connection lead to a site of the sandbox."""
        subdomain = site.rpartition(":")[2]
        extra = {"subdomain": subdomain, "events_url": self.sandbox.events_url, "settle_after_seconds": 1}
        connection = {
            "conn_type": "maxio",
            "host": host or self.sandbox.maxio_url(subdomain),
            "password": f"sandbox-{subdomain}-key",
            "extra": extra,
        }
        self.patch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(connection))

    def define(self, destination: Mapping[str, Any] = METERED, sql: str = USAGE, **changes: Any) -> None:
        """Write the source's files: as they were first, with these changes."""
        folder = self.folder / "sources" / "calls"
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            "source.yaml": yaml.safe_dump({**SOURCE, **changes, "destination": dict(destination)}),
            "usage.sql": sql,
            "expectations.yaml": "name: calls\nexpectations: []\n",
        }
        if changes.get("incremental") == "arrival":
            files["arrivals.sql"] = "SELECT used_at, arrived FROM usage WHERE arrived > :after"
        for name, text in files.items():
            (folder / name).write_text(text)

    def use(self, at: str, quantity: str = "1", account: int = 1, region: str = "eu", arrived: int = 0) -> None:
        """Let an account use something at a moment in UTC."""
        reference = f"acct-{account:04d}"
        with duckdb.connect(str(self.folder / "usage.duckdb")) as warehouse:
            (rows,) = warehouse.execute("SELECT COUNT(*) FROM usage").fetchone()  # type: ignore[misc]
            warehouse.execute(
                "INSERT INTO usage SELECT ?, CAST(? AS TIMESTAMPTZ), ?, ?, CAST(? AS DECIMAL(18, 2)), ?, ?",
                [f"r{rows}", f"{at}+00", reference, 50100000 + account, quantity, region, arrived],
            )

    def run(self, start: str, end: str, until: type[StageOperator] = ReconcileOperator, **params: object) -> Any:
        """Run the tasks of a data interval in UTC, up to one of them; return what it hands over."""
        reference = None
        for stage in STAGES:
            reference = self.task(stage, start, end, reference, **params)
            if stage is until:
                break
        return reference

    def task(self, stage: type[StageOperator], start: str, end: str, reference: Any, **params: object) -> Any:
        """Run one task."""
        task = stage(task_id="one", source="calls", reference=json.loads(json.dumps(reference)))
        interval = {"data_interval_start": moment(start), "data_interval_end": moment(end)}
        return task.execute({**interval, "params": params})

    def billed(self, site: str = ACME, component: str = "api-calls") -> Decimal:
        """Return what a site billed for a component, by its own count."""
        rows = self.sandbox.billed(site)
        return sum((row.billed for row in rows if row.component == component), Decimal(0))

    def writes(self, *sites: str) -> int:
        """Return how many requests that could change their books reached some sites, all if none is named."""
        names = sites or (ACME, ACME_TOO, ORBIT)
        return sum(int(self.sandbox.requests(site)["writing"]) for site in names)

    def leave_in_doubt(self, start: str, end: str, arrived: int) -> None:
        """Let a worker die right after its claim: `arrived` of a run's deliveries reached the site, all are open."""
        run = Run.from_json(self.run(start, end, PlanOperator))
        book, source = ledger(), billing_source("calls")
        edition = next(one for one in book.editions("calls") if one.number == run.edition)
        destination = destination_in(source, edition, book.editions("calls")[-1])
        for part in staging().read(run.tables["proposals"]):
            book.reserve("calls", destination.site, run.reading, part.to_pandas())
        ready = book.reserved("calls", run.reading, 100)
        dead = book.acquire("deliver:dead", "dead", timedelta(milliseconds=50))
        assert dead is not None
        book.begin_sending([each.token for each in ready], dead)
        for delivery in ready[:arrived]:
            destination.send([delivery])
        book.release(dead)


def moment(text: str) -> datetime:
    """Return a moment in UTC, such as ``10-05`` or ``10-05 04``, of 2026."""
    day, _, hour = text.partition(" ")
    return datetime.strptime(f"2026-{day} {hour or '00'}", "%Y-%m-%d %H").replace(tzinfo=UTC)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """An Airflow with one source, `calls`, and the connections that lead to the sandbox."""
    monkeypatch.setenv("AIRFLOW__USAGE_BILLING__SOURCES_FOLDER", str(tmp_path / "sources"))
    for area in ("staging", "archive"):
        monkeypatch.setenv(f"AIRFLOW__USAGE_BILLING__{area.upper()}_PATH", f"file://{tmp_path}/{area}")
    warehouse = {"conn_type": "duckdb", "host": str(tmp_path / "usage.duckdb"), "extra": {"read_only": True}}
    monkeypatch.setenv("AIRFLOW_CONN_WAREHOUSE", json.dumps(warehouse))
    book = {"conn_type": "sqlite", "host": str(tmp_path / "ledger.sqlite")}
    monkeypatch.setenv("AIRFLOW_CONN_USAGE_LEDGER", json.dumps(book))
    monkeypatch.setattr(MaxioHook, "transport", HASTY)
    Ledger.create(installation.ledger_url())
    with Sandbox(worlds(tmp_path)) as sandbox:
        found = Place(sandbox, tmp_path, monkeypatch)
        found.connect("maxio_acme", ACME)
        found.connect("maxio_acme_too", ACME_TOO)
        found.connect("maxio_orbit", ORBIT)
        yield found
    installation.ledger().close()
    installation._ledger.cache_clear()


# --- each key that names the bill ------------------------------------------------------------------------------------


def test_days_become_months_and_both_are_billed_once(place: Place) -> None:
    """Nothing goes again on either side, and a row that comes late for a day of before is billed by that day."""
    place.define()
    for at in ("2026-09-29 12:00", "2026-09-30 12:00", "2026-10-01 12:00", "2026-10-20 12:00"):
        place.use(at, "5")
    place.run("09-29", "09-30")
    place.run("09-30", "10-01")
    place.define(period="month", effective_from="2026-10-01")
    place.run("10-01", "11-01")
    assert place.billed() == 20
    before = place.writes()
    place.run("09-30", "10-01")
    place.run("10-31", "11-01")
    assert place.writes() == before == 3
    place.use("2026-09-29 13:00", "2")
    place.use("2026-10-02 13:00", "3")
    place.run("09-29", "09-30")
    place.run("10-01", "11-01")
    assert (place.billed(), place.writes()) == (25, 5)


def cut_a_month(place: Place) -> None:
    """Bill a month, and of the next one the days until another definition begins; there is usage behind it."""
    place.define(period="month")
    for at in ("2026-09-15 12:00", "2026-10-03 12:00", "2026-10-10 12:00"):
        place.use(at, "5")
    place.run("09-01", "10-01")
    place.define(effective_from="2026-10-06")
    place.run("10-05", "10-06")


def test_a_month_that_is_changed_in_its_middle_ends_there(place: Place) -> None:
    """No edge of the old definition, but one of the new: the old one's last usage period is short."""
    cut_a_month(place)
    assert place.billed() == 10
    place.run("10-10", "10-11")
    assert place.billed() == 15
    before = place.writes()
    for start, end in (("09-01", "10-01"), ("10-05", "10-06"), ("10-10", "10-11"), ("10-06", "10-07")):
        try:
            place.run(start, end)
        except AirflowSkipException:
            assert start == "10-06"
    assert place.writes() == before == 3


@pytest.mark.parametrize(
    "another",
    [{"period": "month"}, {"effective_from": "2026-10-20"}, {"period": "hour", "effective_from": "2026-10-07"}],
    ids=["put back", "later", "another"],
)
def test_the_day_on_which_a_month_was_cut_and_compared_stays(place: Place, another: dict[str, Any]) -> None:
    """What follows may still be defined otherwise, and when it begins may not; the message says how to go on."""
    cut_a_month(place)
    place.define(**another)
    for start, end in (("10-05", "10-06"), ("10-31", "11-01")):
        with pytest.raises(
            Misconfigured,
            match=r"short usage period was compared: set effective_from: 2026-10-06 again, with timezone: UTC",
        ):
            place.run(start, end)
    place.define(period="hour", effective_from="2026-10-06")
    for start, end in (("10-05", "10-06"), ("10-10", "10-11")):
        place.run(start, end)
    assert (place.billed(), place.writes()) == (15, 3)


def test_a_zone_changes_and_no_hour_is_billed_twice_or_never(place: Place) -> None:
    """Midnight in New York is four in the morning of UTC: the hours between are a usage period of their own."""
    place.define()
    for hour in range(4 * 24):
        place.use(f"2026-10-{4 + hour // 24:02d} {hour % 24:02d}:30")
    place.run("10-04", "10-05")
    place.define(timezone="America/New_York", effective_from="2026-10-06")
    place.run("10-04 04", "10-05 04")
    assert place.billed() == 24
    place.run("10-05 04", "10-06 04")
    assert place.billed() == 24 + 24 + 4
    place.run("10-06 04", "10-07 04")
    place.run("10-07 04", "10-08 04")
    assert place.billed() == 4 * 24
    before = place.writes()
    for start, end in (("10-04 04", "10-06 04"), ("10-05", "10-06"), ("10-06 04", "10-08 04")):
        place.run(start, end)
    assert place.writes() == before == 5


@pytest.mark.parametrize(
    ("change", "after"),
    [
        ({"meter": {"function": "max"}}, 4),
        ({"meter": {"function": "count"}}, 2),
        ({"dimensions": ["region"]}, 7),
        ({"destination": METERED | {"price_point": "handle:partner"}}, 7),
    ],
    ids=["maximum", "count", "dimensions", "price point"],
)
def test_a_meter_dimensions_or_a_price_point_change_from_a_day_on(
    place: Place, change: dict[str, Any], after: int
) -> None:
    """Each day is measured as it was then, also when it is run again."""
    place.define()
    for day in (5, 6):
        place.use(f"2026-10-{day:02d} 10:00", "3", region="eu")
        place.use(f"2026-10-{day:02d} 11:00", "4", region="us")
    place.run("10-05", "10-06")
    place.define(**change, effective_from="2026-10-06")
    place.run("10-06", "10-07")
    assert place.billed() == 7 + after
    before = place.writes()
    place.run("10-05", "10-06")
    place.run("10-06", "10-07")
    assert place.writes() == before
    place.use("2026-10-05 12:00", "2")
    place.run("10-05", "10-06")
    assert place.billed() == 9 + after


def test_decimals_come_from_a_day_on_and_a_person_decides_in_those_of_the_day(place: Place) -> None:
    """A fraction of before is no quantity of then, in a row as in what a person says that the site counts."""
    storage = METERED | {"component": "handle:storage-gb"}
    place.define(storage)
    place.use("2026-10-05 10:00", "3")
    place.use("2026-10-05 11:00", "0.25", account=2)
    place.use("2026-10-06 10:00", "1.25")
    place.run("10-05", "10-06")
    place.define(storage, meter={"function": "sum", "decimals": 2}, effective_from="2026-10-06")
    place.run("10-06", "10-07")
    before = place.writes()
    place.run("10-05", "10-06")
    assert (place.billed(component="storage-gb"), place.writes()) == (Decimal("4.25"), before)
    place.use("2026-10-05 12:00", "1", account=3)
    place.use("2026-10-06 12:00", "1.5", account=3)
    for start, end in (("10-05", "10-06"), ("10-06", "10-07")):
        place.leave_in_doubt(start, end, arrived=0)
    book = ledger()
    assert book.doubt_abandoned("calls") == 2
    for doubt in book.doubts("calls"):
        book.settle_doubt(doubt, State.IN_DOUBT, reason=f"{PERSON_DECIDES}it is another")
    whole, fine = sorted(book.doubts("calls"), key=lambda doubt: doubt.quantity)
    with pytest.raises(Misconfigured, match="no quantity of 0 decimal places"):
        book.decide(whole.token, State.ACCEPTED, "decided on a day by somebody", Decimal("0.5"))
    book.decide(fine.token, State.ACCEPTED, "decided on a day by somebody", Decimal("0.5"))


def test_a_stream_changes_and_a_doubt_of_before_is_settled_at_the_old_one(place: Place) -> None:
    """Its events are sent again to where they belong; two streams each bill the days of their time."""
    new = EVENTS | {"stream": "platform-events-too", "subscription_by": "account"}
    new |= {"component": "handle:platform-units-too"}
    place.define(EVENTS, ORBIT_USAGE)
    for account in (1, 2, 3):
        place.use("2026-10-05 10:00", "5", account)
        place.use("2026-10-06 10:00", "7", account)
    place.leave_in_doubt("10-05", "10-06", arrived=1)
    place.define(new, ORBIT_USAGE, effective_from="2026-10-06")
    place.run("10-06", "10-07")
    place.leave_in_doubt("10-06", "10-07", arrived=0)
    SweepOperator(task_id="sweep").execute({})
    assert place.billed(ORBIT, "platform-units") == 15
    assert place.billed(ORBIT, "platform-units-too") == 21
    assert ledger().doubts("calls") == []
    before = place.writes()
    SweepOperator(task_id="sweep").execute({})
    place.run("10-05", "10-06")
    place.run("10-06", "10-07")
    assert place.writes() == before
    place.use("2026-10-05 12:00", "2")
    place.run("10-05", "10-06")
    assert (place.billed(ORBIT, "platform-units"), place.billed(ORBIT, "platform-units-too")) == (17, 21)


# --- the site --------------------------------------------------------------------------------------------------------


def test_another_site_from_a_day_on_and_the_old_one_keeps_its_days(place: Place) -> None:
    """As long as the old connection is there, doubts and late rows of before go where they belong."""
    place.define()
    for day in (4, 5, 6):
        place.use(f"2026-10-{day:02d} 10:00", "5")
    place.run("10-04", "10-05")
    place.leave_in_doubt("10-05", "10-06", arrived=1)
    place.define(METERED | {"connection": "maxio_acme_too"}, effective_from="2026-10-06")
    place.run("10-06", "10-07")
    settle(1)
    SweepOperator(task_id="sweep").execute({})
    place.use("2026-10-04 11:00", "2")
    place.run("10-04", "10-05")
    assert (place.billed(ACME), place.billed(ACME_TOO)) == (12, 5)
    before = place.writes()
    for start, end in (("10-04", "10-05"), ("10-05", "10-06"), ("10-06", "10-07")):
        place.run(start, end)
    assert place.writes() == before == 4


def test_where_the_old_site_is_out_of_reach_only_its_days_wait(place: Place) -> None:
    """The connection leads to the new site: days of before say what is missing, newer ones are billed and swept."""
    place.define()
    for day in (4, 5, 6, 7):
        place.use(f"2026-10-{day:02d} 10:00", "5")
    place.run("10-04", "10-05")
    place.leave_in_doubt("10-05", "10-06", arrived=0)
    place.connect("maxio_acme", ACME_TOO)
    place.define(effective_from="2026-10-06")
    place.run("10-06", "10-07")
    place.leave_in_doubt("10-07", "10-08", arrived=0)
    settle(1)
    with pytest.raises(Misconfigured, match=f"is billed to {ACME}, and connection 'maxio_acme' leads to {ACME_TOO}"):
        place.run("10-04", "10-05")
    with pytest.raises(Misconfigured, match=f"until 2026-10-06 00:00 UTC is billed to {ACME}"):
        SweepOperator(task_id="sweep").execute({"ti": Nobody()})
    assert (place.billed(ACME), place.billed(ACME_TOO)) == (5, 10)
    place.connect("maxio_acme", ACME)
    place.define(METERED | {"connection": "maxio_acme_too"}, effective_from="2026-10-06")
    SweepOperator(task_id="sweep").execute({})
    assert (place.billed(ACME), place.billed(ACME_TOO)) == (10, 10)


class Nobody:
    """A task instance that keeps nothing."""

    def xcom_push(self, **_values: Any) -> None:
        """Take it."""


def settle(seconds: float) -> None:
    """Wait until a site can tell what became of a request."""
    import time  # noqa: PLC0415

    time.sleep(seconds + 0.1)


# --- what names nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destination", [METERED, EVENTS], ids=["metered", "events"])
def test_the_subscriptions_number_in_place_of_its_reference_bills_nothing_again(
    place: Place, destination: dict[str, Any]
) -> None:
    """It is the number that names the bill, whatever the account column holds."""
    site = ACME if destination is METERED else ORBIT
    component = str(destination["component"]).removeprefix("handle:")
    by_reference = ORBIT_USAGE
    by_number = USAGE.replace("account,", "number + 100000 AS account,")
    if destination is METERED:
        by_reference, by_number = USAGE, USAGE.replace("account,", "number AS account,")
    place.define(destination, by_reference)
    place.use("2026-10-05 10:00", "5")
    place.run("10-05", "10-06")
    before = place.writes()
    names = {"maxio_metered": "id", "maxio_events": "subscription_id"}
    place.define({**destination, "subscription_by": names[str(destination["name"])]}, by_number)
    place.run("10-05", "10-06")
    assert (place.billed(site, component), place.writes()) == (5, before)
    assert len(ledger().editions("calls")) == 1


def test_a_doubt_that_was_named_by_reference_is_settled_by_number(place: Place) -> None:
    """What stands in the event is what was sent, whatever the account column holds since."""
    place.define(EVENTS, ORBIT_USAGE)
    for account in (1, 2):
        place.use("2026-10-05 10:00", "5", account)
    place.leave_in_doubt("10-05", "10-06", arrived=1)
    by_number = USAGE.replace("account,", "number + 100000 AS account,")
    place.define(EVENTS | {"subscription_by": "subscription_id"}, by_number)
    SweepOperator(task_id="sweep").execute({})
    assert (place.billed(ORBIT, "platform-units"), ledger().doubts("calls")) == (10, [])


def test_another_address_of_the_same_site_bills_nothing_again(place: Place) -> None:
    """A site is its name: behind a proxy it is the same one."""
    place.define()
    place.use("2026-10-05 10:00", "5")
    place.run("10-05", "10-06")
    place.connect("maxio_acme", ACME, place.sandbox.maxio_url("acme").replace("127.0.0.1", "localhost"))
    place.run("10-05", "10-06")
    assert (place.billed(), place.writes()) == (5, 1)
    assert len(ledger().editions("calls")) == 1


# --- what is refused, and what it says -------------------------------------------------------------------------------


def changed(place: Place) -> None:
    """Bill a day, with another one to come."""
    place.define()
    place.use("2026-10-05 10:00", "5")
    place.use("2026-10-06 10:00", "5")
    place.run("10-05", "10-06")


def test_a_change_without_a_date_is_refused_with_the_first_that_works(place: Place) -> None:
    """Nothing is sent, and the preview says the same; the day that it names is then taken."""
    changed(place)
    place.define(meter={"function": "max"})
    with pytest.raises(Misconfigured, match="effective_from: 2026-10-06, or a later one"):
        place.run("10-06", "10-07")
    assert main(["preview", "calls", "--from", "2026-10-06", "--to", "2026-10-07"]) == 1
    assert place.writes() == 1
    place.define(meter={"function": "max"}, effective_from="2026-10-06")
    place.run("10-06", "10-07")
    assert place.billed() == 10


def test_a_date_inside_what_was_compared_is_refused(place: Place) -> None:
    """A month would begin before days that are billed: the earliest is the next month."""
    changed(place)
    place.define(period="month", effective_from="2026-10-01")
    with pytest.raises(Misconfigured, match="2026-10-01 is too early; the earliest day is 2026-11-01"):
        place.run("10-01", "11-01")
    assert (place.billed(), place.writes()) == (5, 1)


def test_a_run_across_the_change_is_refused_with_the_two_to_run(place: Place) -> None:
    """So is a look; each of the two that it names works."""
    changed(place)
    place.define(meter={"function": "max"}, effective_from="2026-10-06")
    with pytest.raises(Misconfigured, match="2026-10-05T00:00Z to 2026-10-06T00:00Z; 2026-10-06T00:00Z to 2026-10-07"):
        place.run("10-05", "10-07")
    assert main(["preview", "calls", "--from", "2026-10-05", "--to", "2026-10-07"]) == 1
    assert place.writes() == 1
    place.run("10-05", "10-06")
    place.run("10-06", "10-07")
    assert place.billed() == 10


def test_a_preview_of_each_side_plans_by_its_own_definition(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """It registers nothing: the next definition may be another one."""
    changed(place)
    place.define(meter={"function": "count"}, effective_from="2026-10-06")
    assert main(["preview", "calls", "--from", "2026-10-05", "--to", "2026-10-06"]) == 0
    assert "would send 0 deliveries" in capsys.readouterr().out
    assert main(["preview", "calls", "--from", "2026-10-06", "--to", "2026-10-07"]) == 0
    assert "would send 1 deliveries, 1 in all" in capsys.readouterr().out
    assert len(ledger().editions("calls")) == 1


def test_a_definition_that_is_replaced_while_its_run_is_under_way_sends_nothing(place: Place) -> None:
    """The rows were totalled by a definition that is no more: they are read anew."""
    changed(place)
    place.define(meter={"function": "max"}, effective_from="2026-10-06")
    place.use("2026-10-06 11:00", "3")
    totals = place.run("10-06", "10-07", AggregateOperator)
    place.define(meter={"function": "count"}, effective_from="2026-10-06")
    with pytest.raises(Misconfigured, match="clear the run from extract on"):
        place.task(PlanOperator, "10-06", "10-07", totals)
    assert place.writes() == 1
    place.run("10-06", "10-07")
    assert place.billed() == 5 + 2


def test_looking_back_ends_where_the_definition_begins(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so, and a backfill of the days before bills what came late there."""
    changed(place)
    place.define(meter={"function": "count"}, effective_from="2026-10-06", lookback=3)
    place.use("2026-10-05 11:00", "2")
    with caplog.at_level(logging.INFO):
        place.run("10-06", "10-07")
    assert place.billed() == 5 + 1
    place.run("10-05", "10-06")
    assert place.billed() == 5 + 2 + 1


# --- a ledger that was lost ------------------------------------------------------------------------------------------


def backup(place: Place) -> Path:
    """Copy the ledger while it is in use."""
    copy = place.folder / "copy.sqlite"
    with closing(sqlite3.connect(place.folder / "ledger.sqlite")) as live, closing(sqlite3.connect(copy)) as kept:
        live.backup(kept)
    return copy


def lose(place: Place) -> None:
    """Remove the ledger."""
    installation.ledger().close()
    installation._ledger.cache_clear()
    for file in place.folder.glob("ledger.sqlite*"):
        file.unlink()


def lose_since(place: Place, copy: Path) -> None:
    """Put a copy of the ledger in its place."""
    lose(place)
    (place.folder / "ledger.sqlite").write_bytes(copy.read_bytes())


def refer(place: Place, site: str, *references: tuple[int, str]) -> None:
    """Give subscriptions of a site other references, in this order."""
    subdomain = site.rpartition(":")[2]
    for number, reference in references:
        url = f"{place.sandbox.maxio_url(subdomain)}/subscriptions/{number}.json"
        body = {"subscription": {"reference": reference}}
        assert requests.put(url, json=body, auth=(f"sandbox-{subdomain}-key", "x"), timeout=5).ok


def test_what_arrived_since_the_copy_is_adopted_whatever_its_day(place: Place) -> None:
    """A late row of a fortnight ago was billed in the lost time: the copy's watermark would take it up once more."""
    columns = {**SOURCE["columns"], "arrival": "arrived"}  # type: ignore[dict-item]
    place.define(incremental="arrival", arrival_overlap=0, columns=columns)
    place.use("2026-10-05 10:00", "10", arrived=1)
    place.run("10-05", "10-06")
    copy = backup(place)
    place.use("2026-10-05 11:00", "5", arrived=2)
    place.use("2026-10-19 10:00", "3", account=2, arrived=3)
    place.run("10-19", "10-20")
    before = place.writes(ACME)
    assert place.billed() == 18
    lose_since(place, copy)
    assert main(["ledger", "adopt", "calls", "--from", "2026-10-18", "--to", "2026-10-20"]) == 0
    place.run("10-19", "10-20")
    assert (place.billed(), place.writes(ACME)) == (18, before)


def test_a_ledger_that_was_lost_adopts_each_side_by_its_own_definition(place: Place) -> None:
    """With the new one alone nobody knows how it was before, and nothing is adopted or sent under a wrong name."""
    changed(place)
    place.define(dimensions=["region"], effective_from="2026-10-06")
    place.run("10-06", "10-07")
    lose(place)
    Ledger.create(installation.ledger_url())
    adopt = ["ledger", "adopt", "calls", "--from"]
    assert main([*adopt, "2026-10-05", "--to", "2026-10-06"]) == 1
    place.define()
    assert main([*adopt, "2026-10-05", "--to", "2026-10-06", "--leave-unmatched"]) == 0
    place.define(dimensions=["region"], effective_from="2026-10-06")
    assert main([*adopt, "2026-10-05", "--to", "2026-10-07"]) == 1
    assert main([*adopt, "2026-10-06", "--to", "2026-10-07"]) == 0
    for start, end in (("10-05", "10-06"), ("10-06", "10-07")):
        place.run(start, end)
    assert (place.billed(), place.writes()) == (10, 2)


def test_an_account_that_moved_and_was_redefined_in_the_lost_time_is_told_and_found(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the new definition the copy knows no place of it: nothing is taken for unbilled until a person has looked."""
    changed(place)
    copy = backup(place)
    place.define(dimensions=["region"], effective_from="2026-10-06")
    place.run("10-06", "10-07")
    lose_since(place, copy)
    refer(place, ACME, (50100001, "left"), (50100002, "acct-0001"))
    adopt = ["ledger", "adopt", "calls", "--from", "2026-10-06", "--to", "2026-10-07"]
    assert main(adopt) == 1
    told = capsys.readouterr().err
    assert "account acct-0001: the account led to subscription 50100001 by another definition" in told
    with pytest.raises(Misconfigured, match="adopt"):
        place.run("10-06", "10-07")
    # As it says: back, adopt, and away again.
    refer(place, ACME, (50100002, "right"), (50100001, "acct-0001"))
    assert main(adopt) == 0
    refer(place, ACME, (50100001, "left"), (50100002, "acct-0001"))
    before = place.writes(ACME)
    place.run("10-06", "10-07")
    assert (place.billed(), place.writes(ACME)) == (10, before)
    assert main(["ledger", "move", "calls", "acct-0001", "--choose", "from_now", "--because", "it says so"]) == 0
    place.run("10-06", "10-07")
    assert (place.billed(), place.writes(ACME)) == (10, before)


def test_an_unproven_deduction_of_before_is_met_while_later_days_are_adopted(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The site lists all usages of a subscription, also those of days that another definition billed."""
    place.define()
    place.use("2026-10-05 10:00", "10")
    place.run("10-05", "10-06")
    with duckdb.connect(str(place.folder / "usage.duckdb")) as warehouse:
        warehouse.execute("UPDATE usage SET quantity = 9")
    place.run("10-05", "10-06")
    (deduction,) = ledger().accepted("calls", EVER).query("quantity == '-1'")["token"]
    with closing(sqlite3.connect(place.folder / "ledger.sqlite")) as book, book:
        book.execute("UPDATE delivery SET state = 'held' WHERE token = ?", [deduction])
    place.define(dimensions=["region"], effective_from="2026-10-06")
    place.use("2026-10-06 10:00", "5")
    monkeypatch.setattr(MaxioSite, "site_events", lambda *_: iter(()))
    assert main(["ledger", "adopt", "calls", "--from", "2026-10-06", "--to", "2026-10-07"]) == 0
    assert [doubt.token for doubt in ledger().doubts("calls")] == [deduction]


def test_events_of_an_account_that_moved_and_was_redefined_in_the_lost_time_are_held(place: Place) -> None:
    """What the site counts of today's subscription tells nothing of what another one was billed."""
    place.define(EVENTS, ORBIT_USAGE)
    place.use("2026-10-05 10:00", "5")
    place.use("2026-10-06 10:00", "5")
    place.use("2026-10-06 11:00", "7", account=3)
    place.run("10-05", "10-06")
    copy = backup(place)
    place.define(EVENTS, ORBIT_USAGE, dimensions=["region"], effective_from="2026-10-06")
    place.run("10-06", "10-07")
    lose_since(place, copy)
    refer(place, ORBIT, (50200001, "left"), (50200002, "orbit-01"))
    settle(1.5)
    before = place.writes(ORBIT)
    assert main(["ledger", "adopt", "calls", "--from", "2026-10-06", "--to", "2026-10-07"]) == 0
    place.run("10-06", "10-07")
    assert (place.billed(ORBIT, "platform-units"), place.writes(ORBIT)) == (17, before)
    (reason,) = ledger().open_items("calls", None)["reason"]
    assert "the account led to subscription 50200001 by another definition, and leads to 50200002 by now" in reason


def test_raw_events_of_an_account_that_moved_and_was_redefined_in_the_lost_time_are_told(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each bears the token that the stream knows; where they were billed a person has to say first."""
    raw = EVENTS | {"mode": "events"}
    place.sandbox.move_clock("2026-11-29T12:00:00Z")
    place.define(raw, ORBIT_USAGE)
    for day in (20, 21):
        place.use(f"2026-11-{day} 10:00", "5")
    place.run("11-20", "11-21")
    copy = backup(place)
    place.define(raw, ORBIT_USAGE, dimensions=["region"], effective_from="2026-11-21")
    place.run("11-21", "11-22")
    lose_since(place, copy)
    refer(place, ORBIT, (50200001, "left"), (50200002, "orbit-01"))
    assert main(["ledger", "adopt", "calls", "--from", "2026-11-21", "--to", "2026-11-22"]) == 1
    told = capsys.readouterr().err
    assert "account orbit-01: the account led to subscription 50200001 by another definition" in told
    assert "let it lead there, adopt, and let it go then" in told


# --- arrivals --------------------------------------------------------------------------------------------------------


def test_what_arrives_for_a_definition_of_before_waits_on_the_list_for_a_run_of_then(place: Place) -> None:
    """A run of the new one takes up its own, and says what to run for the rest; the hours between two zones too."""
    columns = {**SOURCE["columns"], "arrival": "arrived"}  # type: ignore[dict-item]
    by_arrival = {"incremental": "arrival", "arrival_overlap": 0, "columns": columns}
    place.define(**by_arrival)
    place.use("2026-10-05 10:00", "5", arrived=1)
    place.run("10-05", "10-06")
    place.define(**by_arrival, timezone="America/New_York", effective_from="2026-10-06")
    place.use("2026-10-05 11:00", "2", arrived=2)
    place.use("2026-10-06 02:00", "3", arrived=3)
    place.use("2026-10-06 10:00", "7", arrived=4)
    place.use("2026-10-07 10:00", "11", arrived=5)
    place.run("10-07 04", "10-08 04")
    assert place.billed() == 5 + 7 + 11
    listed = ledger().touched("calls")
    assert [period.end for period in listed] == [moment("10-06"), moment("10-06 04")]
    place.run("10-06", "10-06 04")
    assert place.billed() == 5 + 2 + 3 + 7 + 11
    assert ledger().touched("calls") == ()
    before = place.writes()
    place.run("10-07 04", "10-08 04")
    assert place.writes() == before


def test_what_arrives_for_the_first_definition_is_listed_by_a_run_of_the_second_of_three(place: Place) -> None:
    """A run of the middle one moves the watermark past the row, so it has to be on the list by then."""
    columns = {**SOURCE["columns"], "arrival": "arrived"}  # type: ignore[dict-item]
    by_arrival = {"incremental": "arrival", "arrival_overlap": 0, "columns": columns}
    place.define(**by_arrival)
    place.use("2026-10-05 10:00", "5", arrived=1)
    place.run("10-05", "10-06")
    for function, day in (("max", "10-07"), ("sum", "10-09")):
        place.define(**by_arrival, meter={"function": function, "decimals": 0}, effective_from=f"2026-{day}")
        place.use(f"2026-{day} 10:00", "7", arrived=int(day[-1]))
        place.run(day, f"10-{int(day[-2:]) + 1:02d}")
    assert place.billed() == 5 + 7 + 7
    place.use("2026-10-05 11:00", "2", arrived=100)
    place.run("10-07", "10-08")
    assert [period.start for period in ledger().touched("calls")] == [moment("10-05")]
    place.run("10-05", "10-06")
    assert place.billed() == 5 + 7 + 7 + 2


def test_raw_events_become_totals_and_those_of_before_stay_what_they_were(place: Place) -> None:
    """A run of before sends its late row as an event, and nothing of it as a total; a doubt of then is replayed."""
    place.define(EVENTS | {"mode": "events"}, ORBIT_USAGE)
    place.use("2026-10-05 10:00", "5")
    place.run("10-05", "10-06")
    place.define(EVENTS, ORBIT_USAGE, effective_from="2026-10-07")
    place.use("2026-10-07 10:00", "7")
    place.run("10-07", "10-08")
    place.use("2026-10-05 11:00", "2", account=1)
    place.leave_in_doubt("10-05", "10-06", arrived=0)
    SweepOperator(task_id="sweep").execute({})
    place.run("10-05", "10-06")
    assert place.billed(ORBIT, "platform-units") == 5 + 7 + 2
    before = place.writes()
    place.run("10-05", "10-06")
    place.run("10-07", "10-08")
    assert place.writes() == before
