"""One history: drawn from a seed, played on virtual time, brought to rest, and judged.

Things happen in three parts. First everything that chance wants: runs, repeats, changes in the warehouse, others' use,
with all the trouble that the history knows. Then the trouble ends, time passes, and what is left undone is
cleared. At last every usage period is run once more over the final rows, until nothing is sent any more.
"""

import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from usage_billing.archive import Archive
from usage_billing.errors import Misconfigured
from usage_billing.ledger import Ledger
from usage_billing.records import DECIDED, Choice, Decision, Reading, State
from usage_billing.sandbox import DirectSandbox
from usage_billing.sources import BillingSource
from usage_billing.staging import Staging
from usage_billing.testing.answers import Answers
from usage_billing.testing.chance import Chance
from usage_billing.testing.clockwork import Clockwork, Process
from usage_billing.testing.effects import Surroundings
from usage_billing.testing.events import EventsWatch, Shelf, judge_events
from usage_billing.testing.faults import Faults
from usage_billing.testing.invariants import Line, TotalsWatch, Watch, billed_by_owner, judge
from usage_billing.testing.moving import Sightings, Whereabouts
from usage_billing.testing.network import Flight, Network
from usage_billing.testing.oracle import Key, owed
from usage_billing.testing.others import rename, use
from usage_billing.testing.runs import DELIVER, EXTRACT, PREPARE, Asked, DagRun, Sizes, registered, sweeping
from usage_billing.testing.scenes import Scene, drawn_scene
from usage_billing.testing.story import Story
from usage_billing.testing.touched import TouchedWatch
from usage_billing.testing.warehouse import Row, Snapshot, Warehouse

_ROUNDS = 5
_SECOND_WAVE = 1200
_MOST_EFFECTS = 20_000
_BELIEVED = timedelta(minutes=11)
"""How long an account is believed to lead where it was found, and a little more."""


class EndlessStory(Exception):
    """The history does not come to rest."""


@dataclass
class Outcome:
    """What one history came to."""

    seed: int
    kind: str
    counts: Counter[str]
    lines: list[Line]
    violations: list[tuple[str, str]]
    struck: tuple[str, ...]
    story: Story

    def __str__(self) -> str:
        """Return the story with its closing table, and what was violated."""
        broken = "\n".join(f"VIOLATED {check}: {text}" for check, text in self.violations)
        table = "\n".join(map(str, self.lines))
        return f"seed {self.seed}, {self.kind}\n{self.story}\n\n{table}\n{broken}"


def simulate(
    seed: int,
    ledger_url: str,
    folder: Path,
    own: BillingSource | None = None,
    muted: Iterable[str] = (),
    *,
    sizes: Sizes = "drawn",
    troubled: bool = True,
) -> Outcome:
    """Play the history of one seed with an empty ledger, and judge it.

    `muted` disturbances are left out; without trouble, nothing goes wrong at all. `sizes` are those of batches and
    chunks, and the order of rows: nothing that is billed may hang on them.
    """
    with closing(History(seed, ledger_url, folder, own, muted, sizes)) as history:
        if not troubled:
            history.faults.stop()
        return history.play()


@dataclass
class History:
    """The parts of a history, which runs and checks share."""

    seed: int
    ledger_url: str
    folder: Path
    own: BillingSource | None = None
    muted: Iterable[str] = ()
    sizes: Sizes = "drawn"
    snapshots: dict[tuple[str, int], Snapshot] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chance = Chance(self.seed, self.muted)
        self.scene: Scene = drawn_scene(self.chance, self.own)
        start = self.scene.units[0]
        self.faults = Faults.drawn(self.chance)
        self.story = Story(start)
        self.around = Surroundings(Clockwork(start), self.chance, self.faults, self.story)
        self.ledger = Ledger.connect(self.ledger_url, clock=self.around.ledger_time)
        self.sandbox = DirectSandbox([self.scene.world])
        if self.scene.switches:
            self.sandbox.switch(self.scene.site, **self.scene.switches)
        # Another telling of the seed left the mark of its own ledger there.
        shutil.rmtree(self.folder / "staging" / str(self.seed), ignore_errors=True)
        self.staging = Staging(self.folder / "staging" / str(self.seed))
        archive = self.folder / "archive" / str(self.seed)
        self.archive = Archive(archive)
        self.shelf = Shelf(self.scene, self.ledger, archive) if self.scene.raw else None
        self.led = dict(zip(self.scene.billed_accounts, self.scene.owners, strict=False))
        self.sightings = Sightings(self.scene.owner, self._definition, self.scene.changes_at)
        self.answers = Answers()
        self._looked_up = start
        self.defined = {source.name: source for source in self.scene.sources}
        watch = self._watch()
        self.network = Network(
            self.sandbox,
            self.around,
            self.scene.settle_after,
            self.scene.cut_off,
            lambda flight: self._watched(watch, flight),
        )
        self.around.claimed = watch.claim
        self.network.on_the_way = self._others_deduct
        self.warehouses = {
            source.name: Warehouse(
                self.chance,
                source,
                self.scene.units,
                self.scene.billed_accounts,
                self.scene.other_accounts,
                self.around.clockwork,
            )
            for source in self.scene.sources
        }
        self.around.noted = self._noted
        self.violations: list[tuple[str, str]] = []
        self.others: dict[str, Decimal] = {}
        self.runs: list[DagRun] = []

    @cached_property
    def touched(self) -> TouchedWatch:
        """Who watches over watermarks and lists of touched periods."""
        return TouchedWatch(
            self.scene, self.ledger, self.warehouses, self.snapshots, self.extracted, self.shelf, self.fails
        )

    def _watch(self) -> Watch:
        if self.shelf is not None:
            return EventsWatch(
                self.scene, self.ledger, self.sandbox, self.shelf, self.rows_of, self.answers, self.fails
            )
        return TotalsWatch(
            self.scene, self.ledger, self.sandbox, self.extracted, self.sightings.of, self.answers, self.fails
        )

    def _noted(self, process: Process, what: str, args: Sequence[Any]) -> None:
        self.sightings.note(process, what, args)
        if what == "record_validation":
            self._looked_up = self.around.clockwork.now
        self.answers.note(what, args)
        if self.scene.by_arrival and what in ("begin_extraction", "take_off"):
            self.touched.look(what, args)

    def close(self) -> None:
        """Close ledger and site."""
        self.ledger.close()
        self.sandbox.close()

    def fails(self, check: str, text: str) -> None:
        """Note a violated invariant."""
        self.around.tell("the checker", f"VIOLATED {check}", text)
        self.violations.append((check, text))

    def play(self) -> Outcome:
        """Play, settle down, and judge."""
        lines: list[Line] = []
        try:
            self.busy()
            self.quiet()
            lines = self.judged()
        except EndlessStory as endless:
            self.fails("I5 comes to rest", str(endless))
        struck = tuple(self.chance.struck)
        return Outcome(self.seed, self.scene.told, self.story.counts, lines, self.violations, struck, self.story)

    # --- trouble -----------------------------------------------------------------------------------------------------

    def busy(self) -> None:
        """Let everything happen that chance wants."""
        chance, units = self.chance, self.scene.units
        span = (units[-1] - units[0]).total_seconds()
        unit = span / (len(units) - 1)
        gathering = span + unit * chance.share("gathering")
        for number in self._some("run", 2, 5):
            self._arrange_run(number, gathering)
        for number in self._some("backfill", 0, 4) if self.scene.by_arrival else ():
            self._arrange_backfill(number, gathering)
        for number in self._some("change", 2, 10):
            self._arrange_change(number, gathering, span + 2 * unit)
        for number in self._some("others", 0, 2):
            moment = chance.seconds(f"others/at:{number}", 0, span + 2 * unit)
            self.around.clockwork.after(moment, partial(self._others_use, number))
        for number in self._some("jump", 0, 4, self.faults.clock):
            moment = chance.seconds(f"jump/at:{number}", 0, span + unit)
            self.around.clockwork.after(moment, partial(self._clock_jumps, number))
        for number in self._some("sweep", 0, 2):
            near = chance.odds(f"sweep/near:{number}", 0.5)
            moment = gathering + chance.seconds(f"sweep/soon:{number}", 0, 2000) if near else span + unit
            self._arrange_sweep(number, moment)
        for number in self._some("release", 0, 3):
            moment = chance.seconds(f"release/at:{number}", 0, span + 3 * unit)
            self.around.clockwork.after(moment, partial(self._release, number))
        self._arrange_moves(gathering, span + 2 * unit)
        self._arrange_redefinition(gathering)
        self.rest()
        if chance.strikes("silence", 0.1):
            # Longer than any site remembers a token.
            self._pass(timedelta(days=32))
            self.around.tell("time", "32 days pass")

    def _some(self, what: str, fewest: int, most: int, share: float = 1.0) -> list[int]:
        """Return the numbers of the things of one kind that happen; the first run always does."""
        numbers = range(self.chance.number(f"{what}s", fewest, most))
        return [n for n in numbers if (what, n) == ("run", 0) or self.chance.strikes(f"{what}:{n}", share)]

    def _arrange_run(self, number: int, gathering: float) -> None:
        chance, units = self.chance, self.scene.units
        last = chance.number(f"run/last:{number}", 0, len(units) - 2)
        first = chance.number(f"run/first:{number}", 0, last)
        if chance.odds(f"run/all:{number}", 0.3):
            first, last = 0, len(units) - 2
        source = chance.pick(f"run/source:{number}", self.scene.sources)
        ends = (units[last + 1] - units[0]).total_seconds()
        if chance.odds(f"run/gathers:{number}", 0.6):
            # In two waves: what the first one delivered, the second one finds corrected.
            wave = chance.pick(f"run/wave:{number}", (0, 0, _SECOND_WAVE))
            moment = gathering + wave + chance.seconds(f"run/soon:{number}", 0, 30)
        else:
            moment = ends + chance.seconds(f"run/at:{number}", 1, (gathering - ends) + 3600)
        if self.scene.redefined:
            first, last, moment = self._of_one_definition(number, first, last, moment, gathering)
        clears = [chance.number(f"run/clears:{number}", 0, 1)]

        def ended(run: DagRun) -> None:
            if clears[0] and self.chance.strikes(f"clear:{number}"):
                clears[0] -= 1
                asks = (PREPARE, DELIVER) if source.settings.approval else ()
                task = self.chance.pick(f"clear/from:{number}", (EXTRACT, EXTRACT, DELIVER, *asks))
                task = task if run.reference is not None and "proposals" in run.reference.tables else EXTRACT
                self.around.tell("a person", f"clears {run.asked.name} from {task}")
                run.begin(task, self.chance.seconds(f"clear/at:{number}", 1, 4000))

        rescan = self.scene.by_arrival and chance.odds(f"run/rescan:{number}", 0.1)
        run = DagRun(self, Asked(f"run{number}", source, first, last, ended, twins=0.3, rescan=rescan))
        self.runs.append(run)
        run.begin(seconds=moment)

    def _arrange_backfill(self, number: int, gathering: float) -> None:
        """Let the first period be run while others run: what has arrived for later ones is seen, and not taken up."""
        source = self.chance.pick(f"backfill/source:{number}", self.scene.sources)
        run = DagRun(self, Asked(f"backfill{number}", source, 0, 0))
        self.runs.append(run)
        run.begin(seconds=gathering + self.chance.seconds(f"backfill/at:{number}", 0, 2 * _SECOND_WAVE))

    def _arrange_change(self, number: int, gathering: float, latest: float) -> None:
        near = self.chance.odds(f"change/near:{number}", 0.8)
        soon = gathering + self.chance.seconds(f"change/soon:{number}", 20, _SECOND_WAVE)
        moment = soon if near else self.chance.seconds(f"change/at:{number}", 0, latest)
        source = self.chance.pick(f"change/source:{number}", self.scene.sources)

        tell = partial(self.around.tell, "the warehouse")
        change = partial(self.warehouses[source.name].change, f"change:{number}", tell)
        self.around.clockwork.after(moment, change)

    def _definition(self, source: str, edition: int) -> int:
        """Return the number of a definition by that of its edition; nothing ever replaces the first one."""
        return int(self.ledger.editions(source)[0].number != edition)

    def _redefined_after(self, gathering: float) -> float:
        """Return after how many seconds the sources are defined otherwise: in advance, or long after the day."""
        edge = (self.scene.units[self.scene.edge] - self.scene.units[0]).total_seconds()
        if self.chance.odds("change/in advance", 0.4):
            return self.chance.seconds("change/at", 0, edge)
        return gathering + self.chance.pick("change/wave", (-600, 0, 90, _SECOND_WAVE))

    def _arrange_redefinition(self, gathering: float) -> None:
        if self.scene.redefined:
            self.around.clockwork.after(self._redefined_after(gathering), self._redefine)

    def _of_one_definition(
        self, number: int, first: int, last: int, moment: float, gathering: float
    ) -> tuple[int, int, float]:
        """Return the units of a run as far as one definition bills them, and when it begins.

        As long as the later one is not known, the earlier one has its own edges and no end.
        """
        redefined = self._redefined_after(gathering)
        known = self.scene.last_before_the_change
        if moment < redefined and known >= 0:
            return min(first, known), min(last, known), moment
        later = self.chance.odds(f"run/later:{number}", 0.5)
        return *self.scene.within(first, last, prefers_later=later), max(moment, redefined + 1)

    def _redefine(self) -> None:
        """Let a person change the files of all sources, once a dry run has told the ledger how they were before."""
        for source in self.scene.sources:
            registered(self, source, self.ledger)
        self.defined = {source.name: source for source in self.scene.redefined}
        (*_, source) = self.scene.redefined
        since = self.scene.units[self.scene.edge]
        self.around.tell(
            "a person", f"defines {', '.join(self.defined)} anew", f"from {since} on: {source.definition()}"
        )

    def _arrange_moves(self, gathering: float, latest: float) -> None:
        """Let accounts lead elsewhere, mostly between two waves of runs, and let a person decide about it, or not."""
        chance = self.chance
        if not self.scene.moves:
            return
        for number in self._some("move", 1, 3, self.faults.move):
            near = chance.odds(f"move/near:{number}", 0.7)
            soon = gathering + chance.seconds(f"move/soon:{number}", 20, _SECOND_WAVE)
            moment = soon if near else chance.seconds(f"move/at:{number}", 0, latest)
            self.around.clockwork.after(moment, partial(self._move, number))
        for number in self._some("choice", 0, 3, self.faults.move):
            near = chance.odds(f"choice/near:{number}", 0.6)
            soon = gathering + chance.seconds(f"choice/soon:{number}", 30, 2 * _SECOND_WAVE)
            moment = soon if near else chance.seconds(f"choice/at:{number}", 0, latest)
            self.around.clockwork.after(moment, partial(self._choose, str(number), 0.6))

    def _move(self, number: int) -> None:
        """Let an account lead to another subscription: one of nobody, or that of another account, or back home."""
        if self.scene.renames and not self._may_be_renamed:
            self.around.clockwork.after(700, partial(self._move, number))
            return
        account = self.chance.pick(f"move/account:{number}", self.scene.billed_accounts)
        others = [owner for owner in self.scene.owners if owner != self.led[account]]
        home = self.scene.owners[self.scene.billed_accounts.index(account)]
        likely = [owner for owner in others if owner in (home, self.scene.owners[-1])]
        to = self.chance.pick(f"move/to:{number}", others + 2 * likely)
        if self.scene.renames:
            self._give_name(account, to)
        self.led[account] = to
        self.around.tell("the mapping", f"leads {account} to {to}")

    @property
    def _may_be_renamed(self) -> bool:
        """Say whether nobody is about to use a name that was looked up, for as long as that is believed.

        An event that is under way under a name is for whoever has it when it arrives: that is a limit, not a fault.
        """
        at_work = [process for process in self.around.alive if not (process.ended or process.dead)]
        return not (at_work or self.network.air) and self.around.clockwork.now - self._looked_up > _BELIEVED

    def _give_name(self, account: str, owner: str) -> None:
        """Give the reference of an account to another subscription; two that have one each change places."""
        left = self.led[account]
        self.sandbox.move_clock(max(self.around.clockwork.now, self.sandbox.now()))
        rename(self.scene, self.sandbox, left, f"formerly-{left}")
        for other, its in self.led.items():
            if its == owner:
                rename(self.scene, self.sandbox, owner, f"formerly-{owner}")
                rename(self.scene, self.sandbox, left, other)
                self.led[other] = left
        rename(self.scene, self.sandbox, owner, account)

    def _choose(self, name: str, share: float = 1.0) -> None:
        """Let a person go through the moves that were seen and are undecided, and choose about some."""
        for source in self.scene.sources:
            for account in self.sightings.now.undecided(source.name):
                if not self.chance.odds(f"choice:{name}:{source.name}:{account}", share):
                    continue
                choice = self.chance.pick(f"choice/of:{name}:{source.name}:{account}", tuple(Choice))
                self.ledger.decide_move(source.name, account, choice, "a person", "")
                self.sightings.choose(source.name, account, choice)
                self.around.tell("a person", f"chooses {choice} for {account} of {source.name}")

    def _release(self, number: int) -> None:
        """Let a person go through what is held, and release some of it."""
        for name in sorted(self.warehouses):
            items = self.ledger.open_items(name, None)
            for row in items[items["state"] == State.HELD].to_dict("records"):
                if self.chance.odds(f"release:{number}:{row['token']}", 0.6):
                    self._let_go(row["token"], row["identity"], Decimal(row["quantity"]))

    def _let_go(self, token: str, identity: str, quantity: Decimal) -> None:
        try:
            self.ledger.decide(token, State.HELD, f"{DECIDED}a day by a person")
        except Misconfigured as no:
            self.around.tell("a person", f"may not release {token[:8]}", str(no)[:160])
        else:
            self.answers.releases(identity, quantity)
            self.around.tell("a person", f"releases {token[:8]}")

    @property
    def says_no_at_last(self) -> bool:
        """Say whether every question is answered by no once all is quiet, so that all that is left is listed."""
        return self.scene.asks and self.chance.strikes("no at last", 0.3)

    def answer(self, name: str) -> tuple[Decision | None, float]:
        """Return what becomes of a question, and after how many seconds: soon, or while others run.

        None is no answer at all: somebody skips the task, in the hope that it goes on without. Once all is quiet the
        same is said to every question, at once.
        """
        chance = self.chance
        if self.faults.quiet:
            return (Decision.REJECTED if self.says_no_at_last else Decision.APPROVED), 1.0
        said = chance.pick(f"answer:{name}", (*[Decision.APPROVED] * 4, Decision.REJECTED, Decision.TIMED_OUT, None))
        soon = chance.odds(f"answer/soon:{name}", 0.6)
        return said, chance.seconds(f"answer/after:{name}", 1, 60 if soon else 4000)

    def _others_use(self, number: int) -> None:
        owner = self.chance.pick(f"others/account:{number}", self.scene.owners)
        quantity = self.chance.pick(f"others/quantity:{number}", (7, 3, -2, -30))
        if self.scene.switches.get("metric_below_zero") == "zero":
            quantity = abs(quantity)  # What they take from nothing would be ours that is not billed.
        self._others_bill(owner, quantity)

    def _others_deduct(self, flight: Flight, name: str) -> None:
        """Let somebody else deduct from the same balance while a deduction of ours is on its way there."""
        number = flight.url.partition("/subscriptions/")[2].partition("/")[0]
        if b'"quantity":-' in flight.body and self.chance.strikes(f"rival:{name}", self.faults.rival):
            self._others_bill(self.scene.owner_of[number], self.chance.pick(f"rival/quantity:{name}", (-1, -15, -50)))

    def _others_bill(self, owner: str, quantity: int) -> None:
        """Somebody else bills usage of the same component at the site: whatever it moves there is theirs."""
        self.sandbox.move_clock(max(self.around.clockwork.now, self.sandbox.now()))
        before = billed_by_owner(self.scene, self.sandbox).get(owner, Decimal(0))
        status = use(self.scene, self.sandbox, owner, quantity)
        moved = billed_by_owner(self.scene, self.sandbox).get(owner, Decimal(0)) - before
        if self.scene.kind == "maxio_events":
            # An event of now counts whole; a period that is not assessed yet only hides it from `billed` for a while.
            counts = self.scene.sources[0].destination.metric == "count"  # type: ignore[attr-defined]
            moved = Decimal(1 if counts else quantity)
        self.others[owner] = self.others.get(owner, Decimal(0)) + moved
        self.around.tell("somebody else", f"uses {quantity} of {owner}", f"HTTP {status}, {moved:f} counted")

    def _clock_jumps(self, number: int) -> None:
        """Let the ledger's clock jump by seconds at any time; by hours only while no request is in the air.

        The ledger's clock decides when a request can no longer be carried out. If it jumps by hours over one that is
        still under way, it decides wrongly, and no code could know: that is a limit, not a fault.
        """
        far = self.chance.odds(f"jump/far:{number}", 0.2)
        if far and not self.network.air:
            self.around.ledger_ahead += timedelta(hours=self.chance.number(f"jump/hours:{number}", 1, 5))
        else:
            whole = self.around.ledger_ahead // timedelta(hours=1) * timedelta(hours=1)
            self.around.ledger_ahead = whole + timedelta(seconds=self.chance.seconds(f"jump/by:{number}", 0, 5))
        self.around.tell("the ledger's clock", "jumps", f"{self.around.ledger_ahead.total_seconds():.3f} s ahead")

    def _arrange_sweep(self, number: int, moment: float) -> None:
        source = self.chance.pick(f"sweep/source:{number}", self.scene.sources)
        resumes = self.chance.odds(f"sweep/resumes:{number}", 0.7)
        process = Process(f"sweep{number}", sweeping(self, source, resumes=resumes))
        self.around.begin(process, moment, self._sweep_ended)

    def _sweep_ended(self, process: Process) -> None:
        if process.error is not None and not process.dead:
            self.around.tell(process, "ends", f"{type(process.error).__name__}: {str(process.error)[:160]}")

    # --- quiet -------------------------------------------------------------------------------------------------------

    def quiet(self) -> None:
        """End the trouble, clear what is undone, and run everything once more until nothing is sent."""
        self.faults.stop()
        self.around.tell("time", "the trouble ends")
        self._pass(self.scene.settle_after + timedelta(minutes=62))
        for run in self.runs:
            if not run.done:
                run.begin(run.failed_at)
        self.rest()
        if self.chance.odds("mended", 0.5):
            for warehouse in self.warehouses.values():
                warehouse.mend()
        self._leave_something()
        if self.chance.odds("released at last", 0.3):
            self._release(_ROUNDS)
        decides = self.chance.odds("decided at last", 0.6)
        for number in range(_ROUNDS):
            if decides:
                self._choose(f"round{number}")
            writes = self.network.writes
            self._sweep_and_run(number)
            if number and self.network.writes == writes:
                return
        self.fails("I3 nothing more is sent", f"round {_ROUNDS} of the same runs still sends")

    def _leave_something(self) -> None:
        """Where nothing is left of all that a run reads, a person is asked; and no one answers here."""
        for warehouse in self.warehouses.values():
            for first, last in self._runs_at_last():
                read = [row for row in warehouse.rows.values() if first <= row.unit <= last]
                if not any(row.sound for row in read):
                    warehouse.add(f"the last one:{first}", first)

    def _runs_at_last(self) -> tuple[tuple[int, int], ...]:
        """Return the first and the last unit of each run that compares once more, when all is quiet.

        Where sources go by arrival it is the last unit: all others have to stand on the list.
        """
        last = len(self.scene.units) - 2
        return ((last, last),) if self.scene.by_arrival else self.scene.parts

    def _sweep_and_run(self, number: int) -> None:
        """Sweep, and run every period once more over the final rows.

        Where sources go by arrival, what vanished without a trace is for a rescan to find.
        """
        last = len(self.scene.units) - 2
        for source in self.scene.sources:
            sweep = Process(f"last sweep{number}:{source.name}", sweeping(self, source, resumes=True))
            self.around.begin(sweep, 0, self._sweep_ended)
            self.rest()
            if sweep.error is not None:
                self.fails("a quiet sweep ends well", f"{type(sweep.error).__name__}: {sweep.error}")
            for first, end in self.chance.shuffled(f"parts:{number}", self._runs_at_last()):
                name = f"last{number}:{source.name}" + (f":{first}" if self.scene.redefined else "")
                self._run_at_last(Asked(name, source, first, end, tries=1))
            # Nor does any row arrive when an account moves, or when somebody decides about that.
            if self.scene.by_arrival and (self.scene.moves or self.warehouses[source.name].vanished):
                self._run_at_last(Asked(f"rescan{number}:{source.name}", source, 0, last, tries=1, rescan=True))
            # What nobody wants to go has to be asked about again, so its period stays on the list.
            if self.scene.by_arrival and not self.says_no_at_last:
                self.touched.at_rest(source.name)

    def _run_at_last(self, asked: Asked) -> None:
        run = DagRun(self, asked)
        run.begin()
        self.rest()
        for _ in range(_ROUNDS if asked.source.settings.approval else 0):
            if run.done or not run.errors[-1].startswith("NeedsDecision"):
                break
            # Something became possible that nobody was shown: that is for a new plan.
            run.errors.clear()
            run.begin(PREPARE)
            self.rest()
        if not run.done and not self._doubts_may_stay(run):
            self.fails("a quiet run ends well", f"{asked.name}: {'; '.join(run.errors)}")

    @staticmethod
    def _doubts_may_stay(run: DagRun) -> bool:
        return all(error.startswith("InDoubt") for error in run.errors)

    def _pass(self, span: timedelta) -> None:
        self.around.clockwork.run(self.around.clockwork.now + span)

    def rest(self) -> None:
        """Play until nothing is arranged any more."""
        self.around.clockwork.run()
        if self.story.counts["effects"] > _MOST_EFFECTS:
            raise EndlessStory(f"more than {_MOST_EFFECTS} effects")

    # --- judging -----------------------------------------------------------------------------------------------------

    def rows_of(self, source: str, extraction: int) -> list[Row]:
        """Return the rows of one extraction, as the warehouse had them."""
        return self.snapshots[source, extraction].rows

    def extracted(self, source: str, reading: Reading) -> tuple[Mapping[Key, Decimal], Callable[[Key], bool]]:
        """Return what the oracle says that the rows of a reading make owed, and of which keys an unsound one may be."""
        rows, by = self.rows_of(source, reading.extraction), self.sightings.of(source, reading)
        unsound = [row for row in rows if not row.sound]

        def may_be(key: Key) -> bool:
            accounts = [row.account for row in unsound if self.scene.units[row.unit] == key.start]
            return any(account is None or key.owner in by.been(source, account, key.start) for account in accounts)

        return self._owed(source, rows, by), may_be

    def _owed(self, name: str, rows: Iterable[Row], whereabouts: Whereabouts) -> dict[Key, Decimal]:
        settings = next(source for source in self.scene.sources if source.name == name).settings

        def owner(account: str, start: datetime) -> str:
            return whereabouts.of(name, account, start).owner

        return owed(name, settings.meter.function, rows, self.scene.units, owner, by_region=bool(settings.dimensions))

    def judged(self) -> list[Line]:
        """Look at the whole once all is quiet; return the closing table."""
        self.sandbox.move_clock(max(self.around.clockwork.now, self.sandbox.now()))
        now = max(self.around.ledger_time(), self.around.clockwork.now)
        for name in self.warehouses:
            self._look_at_the_quarantine(name)
        if self.shelf is not None:
            rows = {name: warehouse.rows.values() for name, warehouse in self.warehouses.items()}
            return judge_events(self.scene, self.shelf, self.sandbox, rows, self.others, now, self.fails)
        total: dict[Key, Decimal] = {}
        for name, warehouse in self.warehouses.items():
            total |= self._owed(name, warehouse.rows.values(), self.sightings.now)
            self._look_whether_moves_were_seen(name)
        return judge(self.scene, self.ledger, self.sandbox, total, self.sightings.now, self.others, now, self.fails)

    def _look_at_the_quarantine(self, name: str) -> None:
        """Look whether the ledger lists by name what may not be billed, and nothing else."""
        unsound = sorted(row.event_id for row in self.warehouses[name].rows.values() if not row.sound)
        listed = sorted(self.ledger.quarantined(name)["event_id"])
        if listed != unsound:
            self.fails("I8 quarantine is listed", f"{name}: {unsound} may not be billed, and the ledger lists {listed}")

    def _look_whether_moves_were_seen(self, name: str) -> None:
        """Look whether what usage is billed by is what the mapping says."""
        rows = self.warehouses[name].rows.values()
        used = {(str(row.account), self.scene.units[row.unit]) for row in rows if row.sound}
        for account, start in sorted(used) if self.scene.moves else ():
            leads, seen = self.led[account], self.sightings.now.last(name, account, start)
            if seen != leads:
                self.fails("I1 moves are seen", f"{name}: {account} leads to {leads}, and was last seen at {seen}")

    def _watched(self, watch: Watch, flight: Flight) -> None:
        self.sandbox.move_clock(max(self.around.clockwork.now, self.sandbox.now()))
        watch.request(flight, self.network.air)
        if self.story.counts["effects"] > _MOST_EFFECTS:
            raise EndlessStory(f"more than {_MOST_EFFECTS} effects")
