"""What the stories in these tests are told with: a sandbox, a ledger, staging, and all six stages in one process."""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from pathlib import Path

import pyarrow as pa

from usage_billing.aggregate import aggregate
from usage_billing.archive import Archive
from usage_billing.chunks import plan_events
from usage_billing.deliver import Delivered, Manners, deliver, resume
from usage_billing.destinations import destination_class, destination_settings
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite, ChargeOverUsage
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioEvents, MaxioMetered, MaxioSettings, MaxioSite
from usage_billing.ledger import Ledger
from usage_billing.ledger.leases import kept
from usage_billing.moves import placed
from usage_billing.plan import plan
from usage_billing.quarantine import WrittenOff, write_down
from usage_billing.reconcile import Reconciliation, reconcile
from usage_billing.records import EVER, Comparison, Period, Plan, Reading
from usage_billing.release import reissue
from usage_billing.sandbox import Sandbox
from usage_billing.sources import BillingSource, load_source
from usage_billing.staging import Staging
from usage_billing.validate import validate
from usage_billing.workers import Means

CHECKOUT = Path(__file__).parents[1]
WORLDS = sorted((CHECKOUT / "include" / "sandbox" / "worlds").glob("*.yaml"))
SITES = {"api_calls": "maxio:us:acme", "platform_events": "maxio:us:orbit", "voip_minutes": "chargeover:telco"}

ACCOUNT = {"api_calls": "acct-0001", "platform_events": "orbit-01", "voip_minutes": "pkg-001"}
"""An account of each source that its site knows."""

KEY_SUFFIX = ""
"""What is added to every key: a test that revokes the keys sets it."""

HASTY = Transport(patience_seconds=0.2)
"""The network, where a question that is not answered is asked once more."""

GENTLE = Manners(threads=4, lease_lasts=timedelta(seconds=3), patience=timedelta(seconds=20))


def shipped(name: str) -> BillingSource:
    """Return one of the billing sources that ship with the project."""
    return load_source(CHECKOUT / "include" / "sources" / name, destination_settings)


def a_day(source: BillingSource, day: int) -> Period:
    """Return a day of October 2026 in the source's billing zone; the 32nd is the first of November."""
    start = datetime(2026, 10, 1, tzinfo=source.settings.timezone) + timedelta(days=day - 1)
    return Period(start, start + timedelta(days=1))


@dataclass(frozen=True)
class Event:
    """A usage event as the warehouse gives it."""

    event_id: str
    account: str | None
    quantity: str
    time: datetime
    dimensions: tuple[str, ...] = ()


class House:
    """A sandbox, a ledger and staging, and everything that happens between them."""

    transport = HASTY

    def __init__(self, sandbox: Sandbox, folder: Path) -> None:
        self.sandbox = sandbox
        self.ledger_url = f"sqlite:///{folder}/ledger.sqlite"
        Ledger.create(self.ledger_url)
        self.ledger = Ledger.connect(self.ledger_url)
        self.staging = Staging(folder / "staging")
        self.archive = Archive(folder / "archive")

    def destination(self, source: BillingSource) -> Destination:
        """Return the source's destination, pointed at the sandbox."""
        kind = destination_class(source.destination.name)
        if kind is ChargeOverUsage:
            return ChargeOverUsage(
                source,
                ChargeOverSite(
                    ChargeOverSettings(
                        instance="telco",
                        base_url=self.sandbox.chargeover_url("telco"),
                        public_key="sandboxtelcopublickey00000000000",
                        private_key=f"sandboxtelcoprivatekey0000000000{KEY_SUFFIX}",
                        timezone="America/Chicago",
                        settle_after_seconds=1,
                    ),
                    self.transport,
                ),
            )
        subdomain = "acme" if kind is MaxioMetered else "orbit"
        assert kind in (MaxioMetered, MaxioEvents)
        settings = MaxioSettings(
            subdomain=subdomain,
            api_key=f"sandbox-{subdomain}-key{KEY_SUFFIX}",
            base_url=self.sandbox.maxio_url(subdomain),
            events_url=self.sandbox.events_url,
            settle_after_seconds=1,
        )
        found = kind(source, MaxioSite(settings, self.transport))
        found.archive = self.archive
        return found

    def totals(
        self,
        source: BillingSource,
        interval: Period,
        events: Iterable[Event],
        look: str = "resolve",
        only: Sequence[Period] = (),
        *,
        look_only: bool = False,
    ) -> tuple[Comparison, str]:
        """Extract (the given rows), validate and aggregate; return what a plan compares, and the run's folder.

        `look` names the destination's method by which accounts are looked up; `only` those usage periods are compared.
        """
        destination, periods = self.destination(source), only or source.periods(interval)
        window = Period(periods[0].start, periods[-1].end)
        self.ledger.register(source.name, destination.site, source.definition())
        with kept(self.ledger, f"extract:{source.name}", timedelta(seconds=30), wait=timedelta(seconds=30)) as held:
            number = self.ledger.begin_extraction(held.lease, source.name, interval, window)
        return self.validated(source, interval, events, number, look, only, look_only=look_only)

    def validated(
        self,
        source: BillingSource,
        interval: Period,
        events: Iterable[Event],
        number: int,
        look: str = "resolve",
        only: Sequence[Period] = (),
        *,
        look_only: bool = False,
    ) -> tuple[Comparison, str]:
        """Validate and aggregate an extraction; again with other rows, as another suite would part them."""
        destination, periods = self.destination(source), tuple(only) or source.periods(interval)
        folder = f"{source.name}/{number:08d}"
        table = as_table(source, list(events))
        extracted = self.staging.write(folder, "events", [table])
        self.ledger.record_read(number, extracted.rows)
        began = self.ledger.now()
        decided, look_up = WrittenOff.of(source, self.ledger), getattr(destination, look)
        found = validate(extracted, source, periods, look_up, self.staging, folder, self.ledger, decided)
        billed_until = interval.end if look == "locate" else EVER.start
        looked_up = (found.targets, source, began, self.ledger, self.staging, folder)
        moves = placed(*looked_up, look_only=look_only, billed_until=billed_until)
        found = replace(found, moves=moves)
        accepted, targets, aside = found.accepted, found.targets, found.quarantined
        totals = aggregate(accepted, targets, source, destination.site, periods, self.staging, folder, moves)
        reading = self.ledger.record_validation(number, found.digest, aside.rows, found.reasons, aside.manifest, began)
        return Comparison(reading, periods, totals, targets, accepted.rows, aside.rows, accepted, moves, aside), folder

    def looked(self, source: BillingSource, interval: Period, events: Iterable[Event]) -> Comparison:
        """Validate and aggregate for a look: without a number, and without a word to the ledger."""
        destination, periods = self.destination(source), source.periods(interval)
        extracted = self.staging.write("looked", "events", [as_table(source, list(events))])
        found = validate(extracted, source, periods, destination.resolve, self.staging, "looked", self.ledger)
        accepted, targets, aside = found.accepted, found.targets, found.quarantined
        looked_up_at = self.ledger.now()
        looked = (targets, source, looked_up_at, self.ledger, self.staging, "looked")
        moves = placed(*looked, look_only=True)
        totals = aggregate(accepted, targets, source, destination.site, periods, self.staging, "looked", moves)
        return Comparison(Reading(0), periods, totals, targets, accepted.rows, aside.rows, accepted, moves, aside)

    def plan(self, source: BillingSource, comparison: Comparison, folder: str) -> Plan:
        """Plan what was compared, once what was set aside is listed."""
        destination = self.destination(source)
        if comparison.reading.extraction:
            write_down(comparison, source, self.ledger, self.staging)
        how = plan_events if destination.stream else plan
        return how(comparison, destination, self.ledger, self.staging, folder)

    def deliver(
        self,
        source: BillingSource,
        comparison: Comparison,
        folder: str,
        *,
        first: Plan | None = None,
        manners: Manners = GENTLE,
        stop: threading.Event | None = None,
    ) -> Delivered:
        """Deliver a plan, or the one that the comparison gives now."""
        return deliver(
            first or self.plan(source, comparison, folder),
            lambda: self.plan(source, comparison, folder),
            comparison.reading,
            comparison.periods,
            self.destination(source),
            self.ledger,
            self.staging,
            manners,
            Means(stop=stop or threading.Event()),
        )

    def run(
        self, source: BillingSource, interval: Period, events: Iterable[Event], manners: Manners = GENTLE
    ) -> Delivered:
        """Run all stages but the last for one interval."""
        comparison, folder = self.totals(source, interval, events)
        return self.deliver(source, comparison, folder, manners=manners)

    def sweep(self, source: BillingSource) -> Delivered:
        """Send what was released, as a sweep does."""
        destination = self.destination(source)
        reissue(destination, self.ledger)
        return resume(destination, self.ledger, GENTLE, Means(stop=threading.Event()))

    def reconcile(self, source: BillingSource, interval: Period) -> Reconciliation:
        """Tie out one interval."""
        periods = source.periods(interval)
        return reconcile(self.destination(source), self.ledger, Period(periods[0].start, periods[-1].end))

    def billed(self, source: BillingSource) -> dict[str, Decimal]:
        """Return what the billing site billed by the warehouse's account, by the site's own count, without zeros."""
        component = getattr(source.destination, "component", None) or source.destination.item
        rows = self.sandbox.billed(SITES[source.name])
        return {
            row.reference: row.billed
            for row in rows
            if row.component == component.removeprefix("handle:") and row.billed
        }

    def writing_requests(self, source: BillingSource) -> int:
        """Return how many requests that could change the books reached the site."""
        return int(self.sandbox.requests(SITES[source.name])["writing"])

    def states(self, source: BillingSource, interval: Period) -> dict[str, int]:
        """Return how many deliveries of an interval stand in each state."""
        periods = source.periods(interval)
        standing = self.ledger.standing(source.name, Period(periods[0].start, periods[-1].end))
        return {str(state): int(count) for state, count in standing["state"].value_counts().items()}


@contextmanager
def a_house(folder: Path, kind: type[House] = House) -> Iterator[House]:
    """Open a house with all shipped worlds, and close it again."""
    with Sandbox(WORLDS) as sandbox:
        house = kind(sandbox, folder)
        try:
            yield house
        finally:
            house.ledger.close()


def as_table(source: BillingSource, events: list[Event]) -> pa.Table:
    """Return events as the extract stage writes them."""
    columns = {
        "event_id": pa.array([event.event_id for event in events], pa.string()),
        "time": pa.array([event.time.astimezone(UTC) for event in events], pa.timestamp("us", tz="UTC")),
        "account": pa.array([event.account for event in events], pa.string()),
        "quantity": _quantities([event.quantity for event in events]),
    }
    for place, name in enumerate(source.settings.dimensions):
        columns[name] = pa.array([event.dimensions[place] for event in events], pa.string())
    return pa.table(columns)


def small_batches(source: BillingSource, rows: int) -> BillingSource:
    """Return the same source with another batch size."""
    return replace(source, settings=source.settings.model_copy(update={"batch_rows": rows}))


def _quantities(texts: list[str]) -> pa.Array:
    """Return quantities as a warehouse's decimals, or as it gives a column in which text stands beside them."""
    try:
        return pa.array([Decimal(text) for text in texts], pa.decimal128(38, 9))
    except InvalidOperation:
        return pa.array(texts, pa.string())
