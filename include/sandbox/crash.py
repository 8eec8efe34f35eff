"""`make crash`: real Airflow tasks are killed while they deliver, and the sandbox's own count is the verdict.

Three stories. `kills`: SIGKILL hits task processes, and at times their supervisors, in the middle of delivering to all
three shipped sources, while sites lose replies and fail. `zombie`: a task is cleared while its process is suspended; it
wakes up when another try has taken over. `scheduler`: the scheduler itself is killed, once alone and once with every
task below it, and started again. Each ends when every run is green, and then bills all days once more.
"""

import argparse
import json
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from random import Random

import requests
from airflow_api import NotSignedIn
from crash_stage import CrashStage, Pace, crash_stage, days_from
from killer import (
    Kill,
    Killer,
    Ledger,
    Send,
    Worker,
    is_task,
    kill,
    parent_of,
    pids_in,
    send_signal,
    suspend,
    wait_until_dead,
)
from programs import Interrupted, Program, ProgramFailed, interruptible, running
from stage import Clock, TookTooLong
from state import State, StateInUse, folder_for
from verdict import SOURCES, DemoSource, owed_by_account

DAYS = days_from(date(2026, 10, 2), 30)
LOOK_EVERY_SECONDS = 0.03
ASK_EVERY_SECONDS = 2.0
TELL_EVERY_SECONDS = 10.0

_FAULTS = ("lost_reply", "server_error", "server_error_after_commit", "throttle", "hang")
# How many unharmed requests stand between two faults: one request carries 1 delivery, up to 1,000 and up to 25.
_BETWEEN_FAULTS = {"api_calls": (10, 40), "platform_events": (1, 4), "voip_minutes": (3, 8)}

LEDGER_TIME = "%Y-%m-%d %H:%M:%S.%f"
"""How the ledger's SQLite file holds a moment, in UTC."""

_HOUR = timedelta(minutes=62)
_DOUBT_STANDS = timedelta(seconds=20)
_SENT_TWICE = "SELECT token, sent_at FROM delivery WHERE source = 'api_calls' AND state = 'in_doubt' AND sends > 1"
_SENT_TWICE += " AND sent_at BETWEEN ? AND ?"
_AGE = "UPDATE delivery SET sent_at = ? WHERE token = ? AND state = 'in_doubt' AND sent_at = ?"


class NothingHappened(Exception):
    """The story did not come to its point, so its verdict would prove nothing; the message says what was missing."""


@dataclass(frozen=True)
class SourceVerdict:
    """One source's line of the closing table.

    `doubts` counts sendings whose outcome nobody knew for a while; `unsettled` the ledger's rows that are still
    reserved, sending or in doubt; `sent_again` the writing requests of one more run of all days. `over` and `under` sum
    what was billed too much and too little, subscription by subscription.
    """

    source: str
    kills: int
    on_their_way: int
    requests: int
    doubts: int
    over: Decimal
    under: Decimal
    unsettled: int
    sent_again: int

    @property
    def good(self) -> bool:
        """Whether everything was billed exactly once, and nothing is left to do."""
        return not (self.over or self.under or self.unsettled or self.sent_again)


@dataclass(frozen=True)
class Haunting:
    """What a process sent after it woke up, and when that was; and what the try sent that had taken over from it."""

    wakes: str
    slept_seconds: float
    sent_as_zombie: int
    sent_by_successor: int


@dataclass(frozen=True)
class CrashVerdict:
    """How a story ended: by source, with what was killed how often, and in how many seconds.

    `waited_out` counts doubts that needed Maxio's 60 minutes to pass, see `_pass_an_hour`.
    """

    story: str
    sources: Sequence[SourceVerdict]
    killed: Mapping[str, int]
    waited_out: int
    seconds: float
    hauntings: Sequence[Haunting] = ()

    @property
    def good(self) -> bool:
        """Whether every source's line is good."""
        return all(source.good for source in self.sources)

    @property
    def kills(self) -> int:
        """How many delivers died at work."""
        return sum(source.kills for source in self.sources)


@dataclass
class _Play:
    """One story under way: its stage, what it billed so far, and what it saw; the tasks' processes are in `session`."""

    crash: CrashStage
    ledger: Ledger
    sources: Sequence[DemoSource]
    session: int
    days: list[date] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    doubts: set[Send] = field(default_factory=set)
    waited_out: int = 0

    @property
    def clock(self) -> Clock:
        return self.crash.stage.clock

    def order(self, days: Sequence[date]) -> None:
        """Order a run of each of `days`, which follow each other, for each source."""
        self.days = sorted({*self.days, *days})
        dag_ids = [source.dag_id for source in self.sources]
        # An order that meets the scheduler over Airflow's SQLite file is undone by deleting its runs, and a scheduler
        # that was looking at one of them ends; those of a paused DAG it leaves alone.
        self.crash.airflow.pause(dag_ids, paused=True)
        for source in self.sources:
            self.crash.airflow.backfill(source.dag_id, source.midnight(days[0]), source.midnight(days[-1]))
        self.crash.airflow.pause(dag_ids, paused=False)
        self.clock.say(f"Ordered {days[0]} to {days[-1]} of {', '.join(source.name for source in self.sources)}")

    def until_green(self, look: Callable[[], None] = lambda: None) -> None:
        """Wait until every ordered run is green, looking all the time; what failed for good is cleared."""
        self.until("every run to be green", _EverySeconds(ASK_EVERY_SECONDS, self._green), look)

    def until(self, what: str, done: Callable[[], bool], look: Callable[[], None] = lambda: None) -> None:
        """Look, and ask `done`, until it is true; raise `TookTooLong`, or `ProgramFailed` when a program ended."""
        while True:
            look()
            self.doubts |= self.ledger.in_doubt()
            if done():
                return
            for program in self.crash.stage.programs:
                program.must_run()
            if not self.clock.left:
                raise TookTooLong(f"{self.clock.limit_seconds:.0f} s are over, still waiting for {what}")
            time.sleep(LOOK_EVERY_SECONDS)

    def lives(self, worker: Worker) -> bool:
        """Whether its process still runs."""
        return is_task(worker.pid, self.session)

    def _green(self) -> bool:
        self.waited_out += _pass_an_hour(self.crash)
        runs = [run for source in self.sources for run in self.crash.airflow.runs(source.dag_id)]
        for run in runs:
            if run.state == "failed":
                self.clock.say(f"{run.dag_id} {run.run_id} failed: cleared")
                self.crash.airflow.clear_failed(run)
        wanted = {(source.dag_id, source.midnight(day)) for source in self.sources for day in self.days}
        there = {(run.dag_id, run.logical_date) for run in runs}
        return wanted <= there and all(run.state == "success" for run in runs)

    def verdict(self, story: str, killed: Mapping[str, int], hauntings: Sequence[Haunting] = ()) -> CrashVerdict:
        """Bill all days once more, and judge by the sandbox's own count."""
        _clear_faults(self.crash)
        sandbox = self.crash.stage.sandbox
        before = {source.name: sandbox.writing_requests(source) for source in self.sources}
        self.clock.say("All green; billing all days once more")
        self.order(self.days)
        self.until_green()
        return self.standing(story, killed, hauntings, before)

    def standing(
        self,
        story: str,
        killed: Mapping[str, int],
        hauntings: Sequence[Haunting] = (),
        requests_before: Mapping[str, int] | None = None,
    ) -> CrashVerdict:
        """Judge as things stand now; `requests_before` were made before the days were billed once more."""
        before = requests_before or {}
        lines = [self._line(source, before.get(source.name)) for source in self.sources]
        return CrashVerdict(story, lines, killed, self.waited_out, self.clock.elapsed, hauntings)

    def _line(self, source: DemoSource, requests_before: int | None) -> SourceVerdict:
        sandbox = self.crash.stage.sandbox
        requests_now = sandbox.writing_requests(source)
        first = requests_now if requests_before is None else requests_before
        over, under = over_and_under(
            owed_by_account(self.crash.stage.state.warehouse, source.name, self.days), sandbox.billed(source)
        )
        kills = [kill for kill in self.kills if kill.worker.source == source.name]
        return SourceVerdict(
            source=source.name,
            kills=len(kills),
            on_their_way=sum(kill.on_their_way > 0 for kill in kills),
            requests=first,
            doubts=sum(name == source.name for name, _, _ in self.doubts),
            over=over,
            under=under,
            unsettled=self.ledger.unsettled(source.name),
            sent_again=requests_now - first,
        )


class _EverySeconds:
    """A question that costs time, asked now and then; in between the answer is no."""

    def __init__(self, seconds: float, ask: Callable[[], bool]) -> None:
        self._seconds = seconds
        self._ask = ask
        self._asked_at = time.monotonic()

    def __call__(self) -> bool:
        if time.monotonic() - self._asked_at < self._seconds:
            return False
        answer = self._ask()
        self._asked_at = time.monotonic()
        return answer


def _pass_an_hour(crash: CrashStage) -> int:
    """Let the 61 minutes pass that a metered usage is in doubt if its second sending left no trace at the site.

    Its token may be spent for 60 minutes, by Maxio's documentation. No story waits that long: the site's clock moves
    on, and the ledger's rows are made as much older. Returns how many there were, which is 0 nearly always.
    """
    now = datetime.now(UTC)
    # None that has waited out its hour already, and is asked about next; none that the site may still apply.
    span = [(now - wait).strftime(LEDGER_TIME) for wait in (_HOUR, _DOUBT_STANDS)]
    with closing(sqlite3.connect(crash.stage.state.ledger, timeout=30)) as ledger:
        stuck = ledger.execute(_SENT_TWICE, span).fetchall()
        if stuck:
            order = {"advance_seconds": int(_HOUR.total_seconds())}
            requests.post(f"{crash.stage.sandbox.url}/_sandbox/clock", json=order, timeout=20).raise_for_status()
            ledger.executemany(_AGE, [(_an_hour_before(sent_at), token, sent_at) for token, sent_at in stuck])
            ledger.commit()
            crash.stage.clock.say(f"An hour passed for {len(stuck)} deliveries that were sent twice and are not found")
    return len(stuck)


def _an_hour_before(moment: str) -> str:
    return (datetime.strptime(moment, LEDGER_TIME) - _HOUR).strftime(LEDGER_TIME)  # noqa: DTZ007 - The ledger's text.


def over_and_under(owed: Mapping[str, Decimal], billed: Mapping[str, Decimal]) -> tuple[Decimal, Decimal]:
    """What was billed too much and too little, each summed over the accounts: one never makes up for the other."""
    more = [billed.get(each, Decimal()) - owed.get(each, Decimal()) for each in owed.keys() | billed.keys()]
    return sum((m for m in more if m > 0), Decimal()), -sum((m for m in more if m < 0), Decimal())


@contextmanager
def _play(state: State, limit_seconds: float, pace: Pace, sources: Sequence[DemoSource] = SOURCES) -> Iterator[_Play]:
    if state.ledger.exists():
        raise StateInUse(f"{state.demo} holds a ledger already: a story begins with an empty state folder")
    with crash_stage(state, Clock(time.monotonic(), limit_seconds), pace) as crash:
        play = _Play(crash, Ledger(state.ledger), sources, crash.session)
        try:
            yield play
        except TookTooLong:
            print(f"\nNot at its end, but so far:\n{table(play.standing('unfinished', {}))}\n")
            raise


# --- kills -----------------------------------------------------------------------------------------------------------


def crash_run(kills: int, state: Path, seed: int) -> CrashVerdict:
    """Kill delivers at random moments until `kills` of them died at work; then let Airflow bring every run to its end.

    Raises:
        NothingHappened: the month's usage was billed before that many had died.
        ProgramFailed, StateInUse, TookTooLong: as `stage.set_stage`.
    """
    with _play(State.inside(state), 360 + 15 * kills, Pace()) as play:
        killer = Killer(play.ledger, play.session, kills, [source.name for source in SOURCES], seed)
        play.kills = killer.kills
        _order_faults(play.crash, kills, seed)
        progress = _EverySeconds(TELL_EVERY_SECONDS, lambda: _tell(play, killer))

        def look() -> None:
            killer.look()
            progress()

        at_once = min(2 + kills // 12, 6)
        for first in range(0, len(DAYS), at_once):
            play.order(DAYS[first : first + at_once])
            play.until_green(look)
            if killer.satisfied:
                break
        else:
            raise NothingHappened(f"only {len(killer.kills)} of {kills} delivers died at work: no usage is left")
        play.doubts |= killer.doubts
        killed = dict(Counter(kill.how for kill in killer.kills), **{"supervisor alone": len(killer.orphaned)})
        return play.verdict("kills", killed)


def _tell(play: _Play, killer: Killer) -> bool:
    by_source = Counter(kill.worker.source for kill in killer.kills)
    counts = ", ".join(f"{source.name} {by_source[source.name]}" for source in play.sources)
    unsettled = ", ".join(f"{source.name} {play.ledger.unsettled(source.name)}" for source in play.sources)
    play.clock.say(f"died at work: {counts}; orphaned: {len(killer.orphaned)}; unsettled: {unsettled}")
    return True


def _order_faults(crash: CrashStage, kills: int, seed: int) -> None:
    """Mix lost replies, server errors, throttling and late commits into the writing requests of every site."""
    with requests.Session() as control:
        for source in SOURCES:
            chance = Random(f"{seed} {source.name}")  # noqa: S311 - Chance that can be repeated.
            for _ in range(20 + kills):
                order = {
                    "site": source.site,
                    "fault": chance.choice(_FAULTS),
                    "after": chance.randint(*_BETWEEN_FAULTS[source.name]),
                    "seconds": 0.5,
                }
                control.post(f"{crash.stage.sandbox.url}/_sandbox/faults", json=order, timeout=20).raise_for_status()


def _clear_faults(crash: CrashStage) -> None:
    requests.delete(f"{crash.stage.sandbox.url}/_sandbox/faults", timeout=20).raise_for_status()


# --- zombie ----------------------------------------------------------------------------------------------------------

# A process may sleep between its last look at the ledger and the socket for as long as the site is given to settle:
# so long the promise holds, and so long the story must stay below.
_ZOMBIE_PACE = Pace(settle_after_seconds=30, missed_after_seconds=4)
_LONGEST_SLEEP_SECONDS = 24
_HAUNTING_SECONDS = 2.0
_MEANWHILE, _AFTERWARDS = "while the next try sends", "when the next try has sent all"

_SENT_UNDER = "SELECT count(*) FROM delivery WHERE fence = ?"
_SENT_SINCE = "SELECT count(*) FROM delivery WHERE fence = ? AND sent_at > ?"
_SCHEDULER = "airflow scheduler"
_RESERVED = "SELECT count(*) FROM delivery WHERE source = ? AND state = 'reserved'"


def zombie_run(state: Path) -> CrashVerdict:
    """Clear a deliver while its process is suspended, and wake it when another try sends, and when that has sent all.

    Raises:
        NothingHappened: nothing was left for the other try, or the process had to sleep longer than the promise holds.
        ProgramFailed, StateInUse, TookTooLong: as `stage.set_stage`.
    """
    source = SOURCES[0]
    with _play(State.inside(state), 480, _ZOMBIE_PACE, [source]) as play:
        hauntings = []
        for day, wakes in zip(DAYS[:2], (_MEANWHILE, _AFTERWARDS), strict=True):
            play.order([day])
            hauntings.append(_haunt(play, source, day, wakes))
            play.until_green()
        return play.verdict("zombie", {"suspended and cleared": 2}, hauntings)


def _suspend(play: _Play, supervisor: int, task: int) -> None:
    """Suspend a task outside of a transaction: asleep in one, it would keep everybody else from the SQLite file."""
    # The supervisor first: it would kill a task that was cleared.
    suspend(supervisor, play.session)
    suspend(task, play.session)
    while play.ledger.is_locked():
        send_signal(task, play.session, signal.SIGCONT)
        time.sleep(LOOK_EVERY_SECONDS)
        suspend(task, play.session)


def _haunt(play: _Play, source: DemoSource, day: date, wakes: str) -> Haunting:
    """Suspend, clear, and wake a deliver of `day`."""
    session = play.session
    zombie = _at_work(play, least_sent=10)
    supervisor = parent_of(zombie.pid)
    _suspend(play, supervisor, zombie.pid)
    fell_asleep_at = time.monotonic()
    waiting = play.ledger.count(_RESERVED, source.name)
    [run] = [run for run in play.crash.airflow.runs(source.dag_id) if run.logical_date == source.midnight(day)]
    play.crash.airflow.clear_task(run, "deliver")
    play.clock.say(f"Suspended and cleared the deliver of {day}, with {waiting} deliveries waiting")
    successor = _at_work(play, least_sent=5, above=zombie.fence)
    if wakes == _AFTERWARDS:
        play.until("the next try to send all", lambda: not play.ledger.count(_RESERVED, source.name))
    slept = time.monotonic() - fell_asleep_at
    woke_at = datetime.now(UTC).strftime(LEDGER_TIME)
    send_signal(zombie.pid, session, signal.SIGCONT)
    time.sleep(_HAUNTING_SECONDS)
    send_signal(supervisor, session, signal.SIGCONT)
    own = play.ledger.count(_SENT_SINCE, zombie.fence, woke_at)
    found = Haunting(wakes, slept, own, play.ledger.count(_SENT_UNDER, successor.fence))
    play.clock.say(_told(found))
    if slept > _LONGEST_SLEEP_SECONDS:
        raise NothingHappened(f"the process slept {slept:.1f} s, longer than the promise holds; is the machine busy?")
    if wakes == _MEANWHILE and not own:
        raise NothingHappened("the process that woke up sent nothing, though deliveries were waiting")
    return found


def _told(found: Haunting) -> str:
    return (
        f"woke {found.wakes}, after {found.slept_seconds:.1f} s; "
        f"sent {found.sent_as_zombie} as a zombie, the next try {found.sent_by_successor}"
    )


def _at_work(play: _Play, least_sent: int = 1, above: int = 0) -> Worker:
    """Wait for a living deliver with a fence above `above` that has sent some and is sending more."""
    found: list[Worker] = []

    def look() -> bool:
        for worker in play.ledger.workers():
            sent = play.ledger.count(_SENT_UNDER, worker.fence)
            if worker.fence > above and sent >= least_sent and play.ledger.sending(worker) and play.lives(worker):
                found.append(worker)
        return bool(found)

    play.until("a deliver at work", look)
    return found[0]


# --- scheduler -------------------------------------------------------------------------------------------------------


def scheduler_run(state: Path) -> CrashVerdict:
    """Kill the scheduler while tasks deliver, first alone, then with every task below it; start it again each time.

    Raises:
        NothingHappened: no deliver died with the scheduler.
        ProgramFailed, StateInUse, TookTooLong: as `stage.set_stage`.
    """
    with _play(State.inside(state), 480, Pace()) as play, ExitStack() as schedulers:
        play.order(DAYS[:1])
        _at_work(play)
        # Its workers are forks of it, with its command line; `airflow standalone` is the parent of the scheduler alone.
        standalone = play.session
        [scheduler] = [pid for pid in pids_in(standalone, _SCHEDULER) if parent_of(pid) == standalone]
        kill(scheduler, standalone)
        play.clock.say("Killed the scheduler alone; its tasks go on without it")
        second = schedulers.enter_context(_scheduler(play, "second"))
        play.session = second.process.pid
        play.until_green()
        play.order(DAYS[1:3])
        _at_work(play)
        _kill_with_tasks(play)
        schedulers.enter_context(_scheduler(play, "third"))
        play.until_green()
        return play.verdict("scheduler", {"scheduler alone": 1, "scheduler with its tasks": 1})


def _scheduler(play: _Play, which: str) -> AbstractContextManager[Program]:
    stage = play.crash.stage
    return running(
        f"{which} scheduler", ["airflow", "scheduler"], stage.environment, stage.state.log(f"{which}-scheduler")
    )


def _kill_with_tasks(play: _Play) -> None:
    """Kill a scheduler that has a session of its own, and all that it started."""
    delivering = [worker for worker in play.ledger.workers() if play.lives(worker)]
    for pid in [play.session, *pids_in(play.session)]:
        kill(pid, play.session)
    for worker in delivering:
        wait_until_dead(worker.pid)
        play.doubts |= play.ledger.sending(worker)
    died = [Kill.of(play.ledger, worker, "with the scheduler") for worker in delivering]
    play.kills += [each for each in died if each]
    if not play.kills:
        raise NothingHappened("no deliver died with the scheduler")
    play.clock.say(f"Killed the scheduler and its tasks, {len(play.kills)} delivers among them")


# --- command line ----------------------------------------------------------------------------------------------------


def table(verdict: CrashVerdict) -> str:
    """The closing table, for people."""
    head = (
        "source",
        "kills",
        "with a request under way",
        "requests",
        "doubts",
        "over",
        "under",
        "unsettled",
        "sent again",
    )
    rows = [
        (
            line.source,
            *(f"{figure:,}" for figure in (line.kills, line.on_their_way, line.requests, line.doubts)),
            *(f"{figure:f}" for figure in (line.over, line.under)),
            *(f"{figure:,}" for figure in (line.unsettled, line.sent_again)),
        )
        for line in verdict.sources
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    killed = ", ".join(f"{how} {number}" for how, number in verdict.killed.items())
    lines += [_told(found) for found in verdict.hauntings]
    lines.append(f"killed: {killed}; {verdict.kills} delivers died at work; {verdict.seconds:.0f} s")
    return "\n".join(lines)


def main() -> int:
    """Play one story; the exit status is 0 only if everything was billed exactly once."""
    parser = argparse.ArgumentParser(
        description="Kill real Airflow tasks while they deliver, and count what was billed."
    )
    parser.add_argument("--story", choices=["kills", "zombie", "scheduler"], default="kills")
    parser.add_argument("--kills", type=int, default=200, help="delivers that die at work (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the chance that chooses victims and faults")
    parser.add_argument("--state", type=Path, help="keep all state in this folder, which must hold none yet")
    arguments = parser.parse_args()
    if not Path("/proc/self").exists():
        parser.error("it finds the processes to kill in /proc, as Linux has it")
    try:
        with interruptible(), folder_for(arguments.state, "crash") as state:
            verdict = _tell_story(arguments.story, state, arguments.kills, arguments.seed)
            print(f"\n{table(verdict)}\n")
            (state / "demo" / "crash.json").write_text(json.dumps(asdict(verdict), indent=2, default=str))
    except Interrupted as interrupted:
        print(f"Ended by {interrupted}.")
        return 130
    except (NothingHappened, NotSignedIn, ProgramFailed, StateInUse, TookTooLong, requests.RequestException) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print("Everything owed is billed exactly once." if verdict.good else "FAILED: see the table.")
    return 0 if verdict.good else 1


def _tell_story(story: str, state: Path, kills: int, seed: int) -> CrashVerdict:
    if story == "kills":
        return crash_run(kills, state, seed)
    return zombie_run(state) if story == "zombie" else scheduler_run(state)


if __name__ == "__main__":
    sys.exit(main())
