"""Runs as Airflow makes them: tasks one after the other, each tried again when it fails, some of them twice at once.

The tasks do what the operators do, stage by stage, without Airflow around them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal, Protocol, cast

from sqlalchemy.exc import OperationalError

from usage_billing import arrivals
from usage_billing.aggregate import aggregate
from usage_billing.approve import Approved, turn_down
from usage_billing.archive import Archive
from usage_billing.chunks import plan_events
from usage_billing.deliver import Manners, deliver, resume
from usage_billing.destinations import destination_settings
from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Misconfigured, NeedsDecision, Stale, UsageBillingError
from usage_billing.ledger import Ledger
from usage_billing.moves import placed
from usage_billing.plan import plan
from usage_billing.preview import digest_of
from usage_billing.quarantine import WrittenOff, write_down
from usage_billing.reconcile import reconcile
from usage_billing.records import Comparison, Decision, Edition, Period, Plan, Reading, Run, State, Tally, joined
from usage_billing.release import reissue
from usage_billing.settle import sweep
from usage_billing.sources import BillingSource, as_of
from usage_billing.staging import Staging
from usage_billing.testing.answers import Answers
from usage_billing.testing.clockwork import Process
from usage_billing.testing.effects import Surroundings, WatchedLedger, means
from usage_billing.testing.moving import Sightings, put_before
from usage_billing.testing.network import Network
from usage_billing.testing.scenes import Scene, with_batches
from usage_billing.testing.warehouse import Row, Snapshot, Warehouse, WarehouseHook
from usage_billing.validate import validate

EXTRACT, PREPARE, APPROVE, DELIVER, RECONCILE = "extract", "prepare", "approve", "deliver", "reconcile"
_TRIES = 3
Sizes = Literal["drawn", "small", "large"]
"""How batches and chunks are sized: by chance for each task, all small, or all large."""

_BATCHES = {"drawn": (2, 1000, 1000, 1000, 1000, 1000), "small": (2,), "large": (1000,)}
_CHUNKS = {"drawn": (1, 2, 3, 25), "small": (1, 2), "large": (25,)}
_EXPECTED = (UsageBillingError, OperationalError)


class Skipped(Exception):
    """There is nothing for this run to do."""


class Waits(Exception):
    """The task waits for what a person says to a plan, named by its digest; no process runs meanwhile."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"asks about {digest[:8]}")
        self.digest = digest


class House(Protocol):
    """What a run needs of the history that it belongs to."""

    scene: Scene
    sizes: Sizes
    around: Surroundings
    network: Network
    ledger: Ledger
    staging: Staging
    archive: Archive
    warehouses: dict[str, Warehouse]
    snapshots: dict[tuple[str, int], Snapshot]
    led: dict[str, str]
    sightings: Sightings
    answers: Answers
    defined: dict[str, BillingSource]
    """Each source as its file defines it right now."""

    def answer(self, name: str) -> tuple[Decision | None, float]:
        """Return what becomes of a question, and after how many seconds; None where the task is skipped by hand."""
        ...

    def fails(self, check: str, text: str) -> None:
        """Note that something happened that never may."""
        ...


@dataclass
class Asked:
    """A run that somebody asks for: which units of which source, how its tasks are sized, and how it ends.

    A rescan compares the source's last usage periods up to there.
    """

    name: str
    source: BillingSource
    first: int
    last: int
    ended: Callable[["DagRun"], None] = lambda _run: None
    tries: int = _TRIES
    twins: float = 0.0
    rescan: bool = False


@dataclass
class DagRun:
    """One run: where its tasks stand, and what they handed over."""

    house: House
    asked: Asked
    reference: Any = None
    states: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    attempts: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the run's tasks in their order."""
        asks = self.asked.source.settings.approval
        return (EXTRACT, PREPARE, APPROVE, DELIVER, RECONCILE) if asks else (EXTRACT, PREPARE, DELIVER, RECONCILE)

    @property
    def done(self) -> bool:
        """Say whether every task has ended well, or there was nothing to do."""
        return all(self.states.get(task) in ("success", "skipped") for task in self.tasks)

    @property
    def failed_at(self) -> str:
        """Return the task that failed, or the first one."""
        return next((task for task in self.tasks if self.states.get(task) == "failed"), EXTRACT)

    def begin(self, task: str = EXTRACT, seconds: float = 0.0) -> None:
        """Run a task and all after it, as if somebody had pressed Clear there."""
        for later in self.tasks[self.tasks.index(task) :]:
            self.states.pop(later, None)
        self._try(task, 1, seconds)

    def _try(self, task: str, number: int, seconds: float) -> None:
        self.attempts += 1
        name = f"{self.asked.name}.{task}.{self.attempts}"
        house, handed = self.house, self.reference
        body = getattr(self, f"_{task}")
        exposure = 1.0 if task == DELIVER else 0.3
        process = Process(name, lambda process: body(process, handed), exposure)
        lost = [False]

        def ended(process: Process) -> None:
            if lost[0]:
                self._judge(process)
            else:
                self._ended(task, number, process)

        def is_lost() -> None:
            # A zombie: the scheduler gave it up and starts the next try, and it wakes up later all the same.
            if not lost[0] and number < self.asked.tries and house.around.chance.odds(f"zombie:{name}", 0.7):
                lost[0] = True
                self._try(task, number + 1, house.around.chance.seconds(f"zombie/after:{name}", 10, 300))

        process.lost = is_lost
        house.around.begin(process, seconds, ended)
        if house.around.chance.strikes(f"twin:{name}", min(self.asked.twins, house.around.faults.twins) * exposure):
            # The same try runs twice at once, and what the twin returns counts for nothing.
            later = house.around.chance.seconds(f"twin/after:{name}", 0, 60) ** 2 / 30
            twin = Process(f"{name}b", lambda process: body(process, handed), exposure)
            house.around.begin(twin, seconds + later, self._ended_aside)

    def _ended_aside(self, process: Process) -> None:
        self._judge(process)

    def _ended(self, task: str, number: int, process: Process) -> None:
        state = self._judge(process)
        chance, name = self.house.around.chance, process.name
        if state == "success":
            self.reference = process.result or self.reference
            self.states[task] = state
            if task != self.tasks[-1]:
                self._try(self.tasks[self.tasks.index(task) + 1], 1, chance.seconds(f"next:{name}", 0.5, 5))
                return
        elif state == "waits":
            self._wait_for_a_person(number, process)
            return
        elif state == "skipped":
            self.states.update(dict.fromkeys(self.tasks, "skipped"))
        elif number < self.asked.tries:
            # A killed worker is noticed late, by its missing heartbeat; a failure at once.
            longest = 400.0 if process.dead else 60.0
            self._try(task, number + 1, chance.seconds(f"retry:{name}", 1, longest) + self._without_power())
            return
        else:
            self.states[task] = "failed"
        self.asked.ended(self)

    def _wait_for_a_person(self, number: int, asked: Process) -> None:
        """Let the task go on once somebody has answered, or nobody has for too long, in a process of its own."""
        house, run, digest = self.house, self.reference, cast("Waits", asked.error).digest
        decision, seconds = house.answer(asked.name)
        if decision is None:
            house.around.tell("a person", f"skips {asked.name} by hand")
            self.states[APPROVE] = "success"
            self._try(DELIVER, 1, seconds)
            return

        def answered(process: Process) -> Run:
            house.answers.says((run.source, run.reading, digest), decision)
            house.around.tell("a person", f"answers {asked.name}: {decision}")
            return self._answered(process, run, digest, decision)

        process = Process(f"{asked.name}.answer", answered, 0.3)
        house.around.begin(process, seconds, lambda process: self._ended(APPROVE, number, process))

    def _without_power(self) -> float:
        back = self.house.around.power_back_at
        return 0.0 if back is None else max((back - self.house.around.clockwork.now).total_seconds(), 0.0)

    def _judge(self, process: Process) -> str:
        """Return how a task ended; what no task may end with is told."""
        error = process.error
        if error is None:
            self.house.around.tell(process, "ends", "success")
            return "success"
        if isinstance(error, Waits):
            self.house.around.tell(process, "waits", str(error))
            return "waits"
        if isinstance(error, Stale | Skipped):
            self.house.around.tell(process, "ends", f"skipped: {error}")
            return "skipped"
        if process.dead:
            self.errors.append("killed")
            return "killed"
        self.house.around.tell(process, "ends", f"{type(error).__name__}: {str(error)[:160]}")
        self.errors.append(f"{type(error).__name__}: {error}")
        if not isinstance(error, _EXPECTED):
            self.house.fails("no task fails in an unknown way", f"{process.name}: {type(error).__name__}: {error}")
        return "failed"

    # --- tasks -------------------------------------------------------------------------------------------------------

    def _extract(self, process: Process, _handed: object) -> Run:
        house = self.house
        destination, ledger = self._registered(process)
        source = destination.source
        interval = Period(house.scene.units[self.asked.first], house.scene.units[self.asked.last + 1])
        own = source.recent_periods(interval.end) if self.asked.rescan else source.periods(interval)
        self._check_own(own)
        hook, hold = self._hook(process, source), means(house.ledger, process, house.around).hold
        taken = arrivals.read(source, interval, own, hook, ledger, house.staging, hold)
        house.snapshots[source.name, taken.number] = hook.snapshot
        self._check_taken(taken, hook.snapshot)
        if taken.events is None:
            raise Skipped("no usage period is due")
        periods = taken.periods
        if not taken.events.rows:
            ledger.begin_comparison(source.name, Reading(taken.number), periods, source.edition)
            ledger.list_quarantine(source.name, Reading(taken.number), periods)
            if not taken.deleted:
                _skip_or_ask(ledger, source, Reading(taken.number), periods)
        tables = {"events": taken.events} | ({"before": taken.before} if taken.before else {})
        spans, edition = joined(periods), source.edition
        return Run(source.name, taken.number, interval, taken.folder, tables, spans=spans, edition=edition)

    def _prepare(self, process: Process, run: Run) -> Run:
        """Validate, aggregate and plan; the stages between write nothing but staging."""
        house = self.house
        destination, ledger = self._registered(process, run)
        source = destination.source
        periods = source.periods_of(run.spans)
        events, began = run.tables["events"], ledger.now()
        decided = WrittenOff.of(source, ledger)
        before, folder = run.tables.get("before"), run.folder
        found = validate(
            events, source, periods, destination.resolve_accounts, house.staging, folder, ledger, decided, before
        )
        moves = placed(found.targets, source, began, ledger, house.staging, run.folder)
        known = house.sightings.known_to(process)
        found, aside = replace(found, moves=moves), found.quarantined
        reading = ledger.record_validation(run.number, found.digest, aside.rows, found.reasons, aside.manifest, began)
        house.sightings.counts(source.name, reading, known)
        self._check_rows(run, events.rows, found.accepted.rows, found.quarantined.rows)
        site = destination.site
        totals = aggregate(found.accepted, found.targets, source, site, periods, house.staging, run.folder, moves)
        run = run.with_table("accepted", found.accepted).with_table("targets", found.targets).with_table("moves", moves)
        run = run.with_table("quarantined", aside)
        run = run.with_table("totals", totals, rows_quarantined=aside.rows, validation=reading.validation)
        write_down(_comparison(run, source), source, ledger, house.staging)
        planned = self._plan(run, destination, ledger)
        return run.with_table("proposals", planned.proposals)

    def _approve(self, process: Process, run: Run) -> Run:
        destination, ledger = self._registered(process, run)
        return self._go_on_or_ask(run, self._plan(run, destination, ledger), ledger)

    def _go_on_or_ask(self, run: Run, planned: Plan, ledger: Ledger) -> Run:
        digest, going = digest_of(planned.proposals, self.house.staging)
        decided = ledger.decision(run.source, run.reading, digest) if going else None
        if going and (decided is None or decided.decision is not Decision.APPROVED):
            shown = self.house.staging.read(planned.proposals)
            self.house.answers.shows((run.source, run.reading, digest), shown)
            raise Waits(digest)
        return run.with_table("proposals", planned.proposals)

    def _answered(self, process: Process, run: Run, shown: str, decision: Decision) -> Run:
        """Take an answer to what `shown`, a digest, stands for."""
        destination, ledger = self._registered(process, run)
        staging = self.house.staging
        if decision is not Decision.APPROVED:
            decided = ledger.record_decision(run.source, run.reading, shown, decision, "a person")
            planned = self._plan(run, destination, ledger)
            turn_down(planned, lambda: self._plan(run, destination, ledger), decided, destination, ledger, staging)
            raise Skipped(str(decision))
        planned = self._plan(run, destination, ledger)
        if digest_of(planned.proposals, staging)[0] == shown:
            ledger.record_decision(run.source, run.reading, shown, decision, "a person")
        return self._go_on_or_ask(run, planned, ledger)

    def _deliver(self, process: Process, run: Run) -> Run:
        house = self.house
        destination, ledger = self._registered(process, run)
        source = destination.source
        periods = source.periods_of(run.spans)
        approved = Approved(source.name, run.reading, run.tables["proposals"], ledger, house.staging)
        if source.settings.approval:
            approved.check()

        def again() -> Plan:
            planned = self._plan(run, destination, ledger)
            return approved.within(planned) if source.settings.approval else planned

        deliver(
            Plan(proposals=run.tables["proposals"], tally=Tally(blocked=1)),
            again,
            run.reading,
            periods,
            destination,
            ledger,
            house.staging,
            Manners(threads=1),
            means(house.ledger, process, house.around),
        )
        left = ledger.open_items(source.name, periods)
        outdated = [period.start for period in ledger.outdated(source.name, run.reading, periods)]
        unsettled = left[left["state"].isin([State.RESERVED, State.SENDING, State.IN_DOUBT])]
        unsettled = unsettled[~unsettled["period_start"].isin(outdated)]
        if source.settings.incremental == "arrival" and len(outdated) < len(periods):
            arrivals.done(source, run.reading, periods, self._plan(run, destination, ledger).tally, ledger)
        if not unsettled.empty:
            raise InDoubt(f"{len(unsettled)} deliveries are not settled yet; the next try goes on with them")
        return run

    def _reconcile(self, process: Process, run: Run) -> Run:
        if not self.house.around.chance.odds(f"reconciles:{process.name}", 0.2):
            return run
        destination, ledger = self._registered(process, run)
        wait = means(self.house.ledger, process, self.house.around).stop.wait
        found = reconcile(destination, ledger, destination.source.periods_of(run.spans), wait=wait)
        if not found.ties_out:
            self.house.around.tell(process, "ties out", f"not: {'; '.join(found.examples)}")
        return run

    # --- what tasks share --------------------------------------------------------------------------------------------

    def _registered(self, process: Process, run: Run | None = None) -> tuple[Destination, Ledger]:
        """Return the destination of the definition by which this run's units are billed, as of today, and the ledger.

        Raises:
            Misconfigured: it has changed since the run read its rows.
        """
        house, today = self.house, self._sized(process)
        ledger = cast("Ledger", WatchedLedger(house.ledger, process, house.around))
        known = registered(house, today, ledger)
        start = house.scene.units[self.asked.first]
        edition = next(one for one in known if one.span.start <= start < one.span.end)
        if run is not None and run.edition != edition.number:
            raise Misconfigured("the definition was changed since the rows were read: clear the run from extract on")
        destination = _destination(house, defined_by(today, edition, known[-1]), process)
        chunk = house.around.chance.pick(f"chunk:{process.name}", _CHUNKS[house.sizes])
        if destination.chunk_size > 1:
            destination.chunk_size = chunk
        destination.events_to_chunk = chunk
        return destination, ledger

    def _sized(self, process: Process) -> BillingSource:
        return with_batches(
            self.house.defined[self.asked.source.name],
            self.house.around.chance.pick(f"rows:{process.name}", (2, 1000, 1000, 1000, 1000, 1000)),
        )

    def _plan(self, run: Run, destination: Destination, ledger: Ledger) -> Plan:
        how = plan_events if destination.stream else plan
        return how(_comparison(run, destination.source), destination, ledger, self.house.staging, run.folder)

    def _hook(self, process: Process, source: BillingSource) -> WarehouseHook:
        around, orders = self.house.around, count()

        def shuffled(rows: list[Row]) -> list[Row]:
            number = next(orders)
            name = f"order/{self.house.sizes}:{process.name}"
            return around.chance.shuffled(f"{name}/statement{number}" if number else name, rows)

        warehouse = self.house.warehouses[source.name]
        return WarehouseHook(warehouse, source, lambda: around.switch(process, "the next statement"), shuffled)

    def _check_own(self, periods: Sequence[Period]) -> None:
        edges, asked = self.house.scene.units, self.asked
        (edge,) = (start for start, end in self.house.scene.parts if start <= asked.first <= end)
        first = edge if asked.rescan else max(asked.first - asked.source.settings.lookback, edge)
        units = range(first, asked.last + 1)
        ours = [(edges[unit], edges[unit + 1]) for unit in units]
        theirs = [(period.start, period.end) for period in periods if period.start >= edges[0]]
        if ours != theirs:
            self.house.fails("I1 whole periods", f"a run of units {list(units)} compares {theirs}, not {ours}")

    def _check_taken(self, taken: arrivals.Taken, snapshot: Snapshot) -> None:
        """Look whether a run has read just what it says, and nothing that ends after its interval."""
        edges = self.house.scene.units
        read = [(edges[unit], edges[unit + 1]) for unit in sorted(snapshot.commits)]
        theirs = [(period.start, period.end) for period in taken.periods if period.start >= edges[0]]
        if read != theirs or any(end > edges[self.asked.last + 1] for _, end in read):
            self.house.fails("I1 whole periods", f"a run that read {read} compares {theirs}")
        if taken.deleted != len(snapshot.marked):
            told = f"{taken.deleted} rows are told to be marked as deleted, the warehouse had {len(snapshot.marked)}"
            self.house.fails("I8 rows", told)

    def _check_rows(self, run: Run, read: int, accepted: int, quarantined: int) -> None:
        rows = self.house.snapshots[run.source, run.number].rows
        sound = sum(row.sound for row in rows)
        if (read, accepted, quarantined) != (len(rows), sound, len(rows) - sound):
            told = f"{read} read, {accepted} accepted, {quarantined} quarantined"
            self.house.fails("I8 rows", f"{told}; the warehouse had {len(rows)}, {sound} of them sound")


def _skip_or_ask(ledger: Ledger, source: BillingSource, reading: Reading, periods: Sequence[Period]) -> None:
    if ledger.has(source.name, periods, State.ACCEPTED, State.SENDING, State.IN_DOUBT):
        raise NeedsDecision("no rows at all, and the ledger has billed some: a person has to say so")
    if not ledger.has(source.name, periods, State.RESERVED, State.HELD, State.REFUSED):
        if source.settings.incremental == "arrival":
            ledger.take_off(source.name, reading, periods)
        raise Skipped("nothing to bill")


def _comparison(run: Run, source: BillingSource) -> Comparison:
    tables = run.tables
    accepted, periods = tables["accepted"], source.periods_of(run.spans)
    totals, targets, aside = tables["totals"], tables["targets"], run.rows_quarantined
    others = tables["moves"], tables["quarantined"]
    return Comparison(run.reading, periods, totals, targets, accepted.rows, aside, accepted, *others)


def registered(house: House, today: BillingSource, ledger: Ledger) -> tuple[Edition, ...]:
    """Return the editions of a source, once the ledger has taken in how it is defined today."""
    whole = today.destination.model_dump(mode="json")
    return ledger.register(today.name, house.scene.site, today.definition(), whole, today.since)


def defined_by(today: BillingSource, edition: Edition, latest: Edition) -> BillingSource:
    """Return a source as one of its editions, of which the `latest` is how it is defined today."""
    if edition == latest:
        return replace(today, span=edition.span, edition=edition.number)
    return as_of(today, edition, today.destination.connection, destination_settings)


def _destination(house: House, source: BillingSource, process: Process) -> Destination:
    found = house.scene.destination(source, house.network.sandbox, house.network.transport(process))
    found.archive = house.archive
    return put_before(found, house.led) if house.scene.moves and not house.scene.renames else found


def sweeping(house: House, source: BillingSource, *, resumes: bool) -> Callable[[Process], None]:
    """Return what a sweep's process does: settle every doubt that can be settled, and perhaps send what stands."""

    def body(process: Process) -> None:
        ledger = cast("Ledger", WatchedLedger(house.ledger, process, house.around))
        today = house.defined[source.name]
        known = registered(house, today, ledger)
        for edition in known:
            destination = _destination(house, defined_by(today, edition, known[-1]), process)
            sweep(destination, ledger)
            if resumes:
                reissue(destination, ledger)
                resume(destination, ledger, Manners(threads=1), means(house.ledger, process, house.around))

    return body
