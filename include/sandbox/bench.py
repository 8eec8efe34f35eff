"""`make bench`: what each stage costs, and the whole road, against the sandbox billing sites.

Thirty days of the sample warehouse are billed for each shipped source, at several numbers of rows. Every run has a
process, a ledger and staging of its own, and its billing site is yet another process: seconds and memory are those of
the stages alone. A fast road to a wrong bill is worth nothing, so each run ends with what the site billed against what
the warehouse owes, and any difference fails the bench.
"""

import argparse
import gc
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import requests
import yaml
from programs import running
from state import CHECKOUT
from verdict import BILL_FROM, OWED, SOURCES, DemoSource, Sandbox, difference
from warehouse import make_warehouse

from usage_billing.aggregate import aggregate
from usage_billing.deliver import Manners, deliver
from usage_billing.destinations import destination_class, destination_settings
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite, ChargeOverUsage
from usage_billing.destinations.maxio import MaxioEvents, MaxioMetered, MaxioSettings, MaxioSite
from usage_billing.extract import extract, open_reader
from usage_billing.ledger import Ledger
from usage_billing.ledger.leases import kept
from usage_billing.plan import plan
from usage_billing.reconcile import reconcile
from usage_billing.records import Comparison, Period, Plan, Reading, Staged
from usage_billing.sources import BillingSource, load_source
from usage_billing.staging import Staging
from usage_billing.validate import validate
from usage_billing.workers import Means

ROWS, QUICK_ROWS = (100_000, 1_000_000), (10_000,)
BATCHES, QUICK_BATCHES = (50_000, 200_000), (1_000, 5_000)
LEAST_ROWS = 5_000
"""With fewer, the planted bad rows are more than a twentieth, and the run stops and asks, as it should."""

_FIRST_DAY, _LAST_DAY = date(2026, 10, 1), date(2026, 10, 30)
_DAYS, _WAREHOUSE_DAYS = 30, 32
# All days are over, in every zone, and the billing period that they belong to is still open.
_NOW = datetime(2026, 10, 31, 12, tzinfo=UTC)

# How many accounts each account of the sample is split into. The dozen that it has would make a few hundred
# deliveries; of the events, whose usage period is an hour, it makes tens of thousands as it is.
_SPLIT = {"api_calls": 5, "platform_events": 1, "voip_minutes": 10}

_SANDBOX = "import sys; from usage_billing.cli import main; sys.exit(main(['sandbox', *sys.argv[1:]]))"
_TIMEOUT_SECONDS = 60
_MIB = 1024 * 1024


@dataclass(frozen=True)
class Case:
    """One run: a source by name, about how many usage rows, and in batches of how many rows."""

    source: str
    rows: int
    batch_rows: int


@dataclass(frozen=True)
class Cost:
    """What one stage took: rows in, seconds, memory in MiB at its peak, and requests by the site's own count."""

    stage: str
    rows: int
    wall_seconds: float
    cpu_seconds: float
    peak_mib: float
    requests: int


@dataclass(frozen=True)
class Outcome:
    """A run that has ended; `start_mib` is the memory before its first stage, all libraries imported."""

    case: Case
    start_mib: float
    stages: tuple[Cost, ...]
    owed: Decimal
    billed: Decimal
    difference: Decimal

    @property
    def road(self) -> Cost:
        """The whole road: the sums of its stages, and the highest of their peaks."""
        return Cost(
            "whole road",
            self.stages[0].rows,
            sum(cost.wall_seconds for cost in self.stages),
            sum(cost.cpu_seconds for cost in self.stages),
            max(cost.peak_mib for cost in self.stages),
            sum(cost.requests for cost in self.stages),
        )


# --- a run: the stages, measured in a process of their own ------------------------------------------------------------


class Stopwatch:
    """Measures stages that follow each other; what happens between a stage's end and its `lap` belongs to the stage."""

    def __init__(self, requests_so_far: Callable[[], int]) -> None:
        self.costs: list[Cost] = []
        self._requests_so_far = requests_so_far
        self._start()

    def lap(self, stage: str, rows: int) -> None:
        """End a stage that took `rows` rows in; the next one begins when this returns."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        sent = self._requests_so_far() - self._requests
        self.costs.append(Cost(stage, rows, wall, cpu, peak_mib(), sent))
        self._start()

    def _start(self) -> None:
        _forget_peak()
        self._requests = self._requests_so_far()
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def peak_mib() -> float:
    """Return the highest resident memory of this process in MiB, since `_forget_peak` where the system can forget."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _MIB  # macOS counts bytes.


def _forget_peak() -> None:
    # In Airflow each stage has a process of its own: what one leaves behind is not the next one's memory.
    gc.collect()
    pa.default_memory_pool().release_unused()
    # Linux alone can do it ("proc" manual, clear_refs); elsewhere a stage's peak includes those before it.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Warehouse:
    """The sample warehouse as `open_reader` wants a hook, read by one thread as in the demo."""

    placeholder = "?"
    conn_type = "duckdb"

    def __init__(self, path: Path) -> None:
        self._path = path

    def get_conn(self) -> duckdb.DuckDBPyConnection:
        """Open the file for reading."""
        return duckdb.connect(str(self._path), read_only=True, config={"threads": 1})


class Road:
    """The six stages for the billed days, in the order and with the arguments of the operators."""

    def __init__(self, destination: Destination, warehouse: Path, ledger: Ledger, staging: Staging) -> None:
        self._destination = destination
        self._source = destination.source
        self._warehouse = Warehouse(warehouse)
        self._ledger = ledger
        self._staging = staging
        self._folder = self._source.name
        self._interval = interval(self._source)
        self._periods = self._source.periods(self._interval)

    def drive(self, watch: Stopwatch) -> None:
        """Go all the way, with a lap for each stage."""
        number, events = self._extract()
        watch.lap("extract", events.rows)
        self._destination.check()
        resolve = self._destination.resolve
        found = validate(events, self._source, self._periods, resolve, self._staging, self._folder, self._ledger)
        watch.lap("validate", events.rows)
        site = self._destination.site
        totals = aggregate(
            found.accepted, found.targets, self._source, site, self._periods, self._staging, self._folder
        )
        watch.lap("aggregate", found.accepted.rows)
        comparison = Comparison(
            Reading(number), self._periods, totals, found.targets, found.accepted.rows, found.quarantined.rows
        )
        proposed = self._plan(comparison)
        watch.lap("plan", totals.rows)
        self._deliver(proposed, comparison)
        watch.lap("deliver", proposed.proposals.rows)
        reconcile(self._destination, self._ledger, comparison.window)
        watch.lap("reconcile", proposed.proposals.rows)

    def _extract(self) -> tuple[int, Staged]:
        source, window = self._source, Period(self._periods[0].start, self._periods[-1].end)
        self._ledger.register(source.name, self._destination.site, source.definition())
        with kept(self._ledger, f"extract:{source.name}", timedelta(seconds=30)) as held:
            reader = open_reader(self._warehouse, source.sql, window, source.settings.batch_rows)
            number = self._ledger.begin_extraction(held.lease, source.name, self._interval, window)
        events = extract(reader, source, self._staging, self._folder)
        self._ledger.record_read(number, events.rows)
        return number, events

    def _plan(self, comparison: Comparison) -> Plan:
        return plan(comparison, self._destination, self._ledger, self._staging, self._folder)

    def _deliver(self, proposed: Plan, comparison: Comparison) -> None:
        deliver(
            proposed,
            lambda: self._plan(comparison),
            comparison.reading,
            comparison.window,
            self._destination,
            self._ledger,
            self._staging,
            Manners(threads=self._source.destination.threads),
            Means(),
        )


def interval(source: BillingSource) -> Period:
    """Return the billed days in the source's zone."""
    zone = source.settings.timezone
    end = _LAST_DAY + timedelta(days=1)
    return Period(*(datetime(day.year, day.month, day.day, tzinfo=zone) for day in (_FIRST_DAY, end)))


def measure(case: Case, warehouse: Path, url: str, folder: Path) -> tuple[float, tuple[Cost, ...]]:
    """Drive `case` once against the sandbox at `url`; return the memory at the start in MiB, and what each stage took.

    For a fresh process: what it did before would count as memory of the stages.
    """
    for late in ("great_expectations", "great_expectations.validator.v1_validator"):
        import_module(late)  # `validate` imports them when it needs them, which takes seconds once per process.
    ledger_url = f"sqlite:///{folder}/ledger.sqlite"
    Ledger.create(ledger_url)
    site = _demo_source(case.source).site
    destination = _destination(_source(case), _world(site), url)
    _forget_peak()
    start_mib = peak_mib()
    watch = Stopwatch(lambda: _requests_so_far(url, site))
    with closing(Ledger.connect(ledger_url)) as ledger:
        Road(destination, warehouse, ledger, Staging(folder / "staging")).drive(watch)
    return start_mib, tuple(watch.costs)


def _source(case: Case) -> BillingSource:
    """Return the shipped source with the case's batch size, its accounts split by the last digit of the event id."""
    source = load_source(CHECKOUT / "include" / "sources" / case.source, destination_settings)
    account, event_id = source.settings.columns.account, source.settings.columns.event_id
    part = f"CAST(right({event_id}, 1) AS INTEGER) % {_SPLIT[case.source]}"
    sql = f"SELECT * REPLACE ({account} || '-' || {part} AS {account}) FROM (\n{source.sql})"  # noqa: S608 - Our own words.
    settings = source.settings.model_copy(update={"batch_rows": case.batch_rows})
    return replace(source, settings=settings, sql=sql)


def _destination(source: BillingSource, world: dict[str, Any], url: str) -> Destination:
    """Return the source's destination, with the keys of its world and pointed at the sandbox."""
    kind, name = destination_class(source.destination.name), world["site"].rsplit(":", 1)[-1]
    if kind is ChargeOverUsage:
        settings = ChargeOverSettings(
            instance=name,
            base_url=f"{url}/chargeover/{name}",
            public_key=world["public_key"],
            private_key=world["private_key"],
            timezone=world["zone"],
            settle_after_seconds=1,
        )
        return ChargeOverUsage(source, ChargeOverSite(settings))
    maxio = MaxioSettings(
        subdomain=name,
        api_key=world["api_key"],
        base_url=f"{url}/maxio/{name}",
        events_url=f"{url}/events",
        settle_after_seconds=1,
    )
    return (MaxioMetered if kind is MaxioMetered else MaxioEvents)(source, MaxioSite(maxio))


def _requests_so_far(url: str, site: str) -> int:
    reply = requests.get(f"{url}/_sandbox/requests", params={"site": site}, timeout=_TIMEOUT_SECONDS)
    reply.raise_for_status()
    counts = reply.json()[site]
    return int(counts["reading"] + counts["writing"])


# --- around the runs: warehouse, billing site, verdict ----------------------------------------------------------------


class Bench:
    """Runs cases one after the other in a folder, and keeps the warehouses between them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0

    def run(self, case: Case) -> Outcome:
        """Bill the days once; raise whatever a stage raises."""
        self._runs += 1
        folder = self._folder / f"run-{self._runs}"
        folder.mkdir()
        billed_source, warehouse = _demo_source(case.source), self._warehouse(case.rows)
        with _sandbox(billed_source.site, _SPLIT[case.source], folder) as url:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                start_mib, stages = process.submit(measure, case, warehouse, url, folder).result()
            billed = _unsplit(Sandbox(url).billed(billed_source))
        owed = _owed(warehouse, case.source)
        return Outcome(case, start_mib, stages, _sum(owed), _sum(billed), difference(owed, billed))

    def _warehouse(self, rows: int) -> Path:
        path = self._folder / f"warehouse-{rows}.duckdb"
        make_warehouse(path, rows * _WAREHOUSE_DAYS // _DAYS)
        return path


@contextmanager
def _sandbox(site: str, split: int, folder: Path) -> Iterator[str]:
    """Run one billing site in a process of its own, and give its address."""
    world, port_file = folder / "world.yaml", folder / "sandbox.port"
    world.write_text(yaml.safe_dump(_prepared(_world(site), split)), encoding="utf-8")
    command = [sys.executable, "-c", _SANDBOX, "--worlds", str(world), "--port-file", str(port_file)]
    with running("sandbox", command, os.environ, folder / "sandbox.log") as program:
        while not port_file.exists():
            program.must_run()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port_file.read_text().strip()}"


def _world(site: str) -> dict[str, Any]:
    worlds = (CHECKOUT / "include" / "sandbox" / "worlds").glob("*.yaml")
    loaded: Iterable[dict[str, Any]] = (yaml.safe_load(world.read_text(encoding="utf-8")) for world in worlds)
    return next(world for world in loaded if world["site"] == site)


def _prepared(world: dict[str, Any], split: int) -> dict[str, Any]:
    """Return a world at the time of the bill, with every account split."""
    prepared = world | {"now": _NOW}
    for entries, number, key in (("subscriptions", "id", "reference"), ("packages", "package_id", "external_key")):
        if entries in world:
            prepared[entries] = [_part(row, number, key, part) for row in world[entries] for part in range(split)]
    return prepared


def _part(entry: dict[str, Any], number: str, key: str, part: int) -> dict[str, Any]:
    shifted = entry | {number: entry[number] + 1000 * part, key: f"{entry[key]}-{part}"}
    if "lines" in entry:
        shifted["lines"] = [line | {"id": line["id"] + 1000 * part} for line in entry["lines"]]
    return shifted


def _unsplit(billed: dict[str, Decimal]) -> dict[str, Decimal]:
    """Return what was billed by the sample's own accounts, which is how the warehouse tells what is owed."""
    whole: dict[str, Decimal] = {}
    for account, quantity in billed.items():
        name = account.rpartition("-")[0]
        whole[name] = whole.get(name, Decimal()) + quantity
    return whole


def _owed(warehouse: Path, source: str) -> dict[str, Decimal]:
    sql = (OWED / f"{source}.sql").read_text(encoding="utf-8")
    with closing(duckdb.connect(str(warehouse), read_only=True)) as connection:
        binds = {"first_day": _FIRST_DAY, "last_day": _LAST_DAY, "bill_from": BILL_FROM}
        rows = connection.execute(sql, binds).fetchall()
    return {account: quantity for account, quantity in rows if account is not None}


def _sum(quantities: dict[str, Decimal]) -> Decimal:
    return sum(quantities.values(), Decimal())


def _demo_source(name: str) -> DemoSource:
    return next(source for source in SOURCES if source.name == name)


# --- what a person reads ----------------------------------------------------------------------------------------------


def machine() -> str:
    """Return what the figures hang on besides the code."""
    return (
        f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"pandas {pd.__version__}, pyarrow {pa.__version__}, duckdb {duckdb.__version__}\n"
        "Timings are noisy: only the ratios within one run count. CPU is user and system time of the measured process\n"
        "alone (all its threads, not the billing site); imports are made beforehand; peak is resident memory."
    )


def report(outcome: Outcome) -> str:
    """Return the stages of a run as a table, and the verdict."""
    case = outcome.case
    head = ("stage", "rows in", "rows/s", "CPU s", "wall s", "peak MB", "requests")
    rows = [_line(cost) for cost in (*outcome.stages, outcome.road)]
    return (
        f"\n{case.source}: {outcome.road.rows:,} rows in batches of {case.batch_rows:,}; "
        f"{outcome.start_mib:.0f} MB before the first stage\n{_table([head, *rows])}\n"
        f"billed {_plain(outcome.billed)}, owed {_plain(outcome.owed)}, difference {_plain(outcome.difference)}"
    )


def _line(cost: Cost) -> tuple[str, ...]:
    return (
        cost.stage,
        f"{cost.rows:,}",
        f"{cost.rows / cost.wall_seconds:,.0f}",
        f"{cost.cpu_seconds:.2f}",
        f"{cost.wall_seconds:.2f}",
        f"{cost.peak_mib:.0f}",
        f"{cost.requests:,}",
    )


def memory_report(outcomes: Sequence[Outcome]) -> str:
    """Return the peaks of the same rows at several batch sizes, side by side."""
    first = outcomes[0]
    head = ("peak MB of the stage", *(f"batches of {outcome.case.batch_rows:,}" for outcome in outcomes))
    start = ("before the first", *(f"{outcome.start_mib:.0f}" for outcome in outcomes))
    stages = zip(*((*outcome.stages, outcome.road) for outcome in outcomes), strict=True)
    rows = [(costs[0].stage, *(f"{cost.peak_mib:.0f}" for cost in costs)) for costs in stages]
    grown = ("road above start", *(f"{outcome.road.peak_mib - outcome.start_mib:.0f}" for outcome in outcomes))
    return (
        f"\nMemory is set by the batch, not by the interval: {first.case.source}, {first.road.rows:,} rows\n"
        f"{_table([head, start, *rows, grown])}"
    )


def _plain(quantity: Decimal) -> str:
    """Return a quantity without the zeros that only tell a column's scale."""
    return f"{quantity.normalize():,f}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; 0 if every site billed exactly what was owed, else 1."""
    options = _options(arguments)
    print(machine(), flush=True)
    with TemporaryDirectory(prefix="usage-billing-bench-") as folder:
        bench = Bench(Path(folder))
        outcomes = []
        for case in _cases(options):
            outcomes.append(bench.run(case))
            print(report(outcomes[-1]), flush=True)
        compared = [bench.run(case) for case in _compared(options)]
        print(memory_report(compared))
    return exit_code([*outcomes, *compared])


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """Return 1 if any site billed something else than what was owed, and say so."""
    wrong = [outcome for outcome in outcomes if outcome.difference]
    for outcome in wrong:
        print(f"{outcome.case}: the bill differs by {outcome.difference:f}", file=sys.stderr)
    return 1 if wrong else 0


def _cases(options: argparse.Namespace) -> Iterator[Case]:
    for rows in options.rows:
        for name in options.sources:
            source = load_source(CHECKOUT / "include" / "sources" / name, destination_settings)
            yield Case(name, rows, source.settings.batch_rows)


def _compared(options: argparse.Namespace) -> list[Case]:
    """Return the cases of the memory comparison; the last source has the fewest requests, so it takes least time."""
    return [Case(options.sources[-1], max(options.rows), batch_rows) for batch_rows in options.batch_rows]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [source.name for source in SOURCES]
    parser = argparse.ArgumentParser(description="Measure each stage and the whole road against the sandbox.")
    parser.add_argument("--rows", type=_row_count, nargs="+", help=f"usage rows per run (default: {ROWS})")
    parser.add_argument("--sources", nargs="+", choices=names, default=names)
    parser.add_argument("--batch-rows", type=int, nargs="+", help="batch sizes whose memory is compared")
    parser.add_argument("--quick", action="store_true", help="few rows: to see that it runs, not how fast")
    options = parser.parse_args(arguments)
    options.rows = options.rows or (QUICK_ROWS if options.quick else ROWS)
    options.batch_rows = options.batch_rows or (QUICK_BATCHES if options.quick else BATCHES)
    return options


def _row_count(text: str) -> int:
    rows = int(text)
    if rows < LEAST_ROWS:
        raise argparse.ArgumentTypeError(f"{rows} is too few: at least {LEAST_ROWS}")
    return rows


if __name__ == "__main__":
    sys.exit(main())
