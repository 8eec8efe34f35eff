"""What a simulated process touches: every effect is a place to lose time, to be suspended, or to be killed at.

A crash strikes before an effect or after it, never inside one: a transaction and a request are atomic where they land.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.exc import OperationalError

from usage_billing.errors import NotApplied
from usage_billing.ledger import Ledger
from usage_billing.ledger.leases import KeptLease
from usage_billing.records import State
from usage_billing.testing.chance import Chance
from usage_billing.testing.clockwork import Clockwork, Process
from usage_billing.testing.faults import Faults
from usage_billing.testing.story import Story
from usage_billing.workers import Means

_READS_ONLY = frozenset(
    {
        "standing", "has", "reserved", "resumable", "released", "doubts", "in_the_air", "may_send", "accepted",
        "accepted_at", "open_items", "outdated", "validated_at", "extractions", "known", "holder_of", "watermark",
        "touched", "editions", "displaced", "placements", "moving",
        "measured_before", "columns_read", "quarantined", "rows_written_off", "replayable", "read_in",
    }
)  # fmt: skip


_OFTENER = {"accept": 4.0, "land": 25.0}
"""How much oftener a process is suspended with an outcome in its hands: what it writes too late must not stand."""
_HEARTBEATS_MISSED = 60.0


@dataclass
class OutsideLimits:
    """What the promise excludes, to be shown all the same; each happens once, to the next writing request.

    `lands_after`: the site carries it out so many seconds after it left, past its cut-off. `held_for`: its process is
    suspended so long between its last look at its claim and the socket.
    """

    lands_after: float = 0.0
    held_for: float = 0.0


class Surroundings:
    """The clock, chance, troubles and story that all processes of a history share."""

    def __init__(self, clockwork: Clockwork, chance: Chance, faults: Faults, story: Story) -> None:
        self.clockwork = clockwork
        self.chance = chance
        self.faults = faults
        self.story = story
        self.ledger_ahead = timedelta(0)
        """How far the ledger's clock goes ahead of the true one."""
        self.claimed: Callable[[Process, frozenset[str]], None] = lambda _process, _tokens: None
        """Told of every claim, right after it was made."""
        self.noted: Callable[[Process, str, Sequence[Any]], None] = lambda _process, _what, _args: None
        """Told of each call of the ledger that came about, right after it was made."""
        self.power_back_at: datetime | None = None
        """When the machines have power again, in a history with a power cut."""
        self.alive: list[Process] = []
        self._sleepers: list[tuple[Process, Callable[[], None]]] = []
        self.longest_pause_before_request = 1.0
        """How many seconds a process may lose between its last look at its claim and the socket; see `network`."""
        self.outside = OutsideLimits()

    def ledger_time(self) -> datetime:
        """Return the time by the ledger's clock."""
        return self.clockwork.now + self.ledger_ahead

    def tell(self, process: Process | str, what: str, outcome: str = "") -> None:
        """Write an effect into the story."""
        who = process if isinstance(process, str) else process.name
        self.story.tell(self.clockwork.now, who, what, outcome)

    def switch(self, process: Process, what: str) -> str:
        """Come to an effect: some time passes, and the process may be held up for long, or killed. Return its name."""
        process.breathe()
        process.effects += 1
        self.story.counts["effects"] += 1
        name = f"{process.name}#{process.effects}"
        if process.checked and self.outside.held_for:
            held, self.outside.held_for = self.outside.held_for, 0.0
            self.tell(process, "is suspended", f"for {held:.1f} s, which is outside the limits, before {what}")
            process.suspended_until = self.clockwork.now + timedelta(seconds=held)
            self.clockwork.pause(held)
        pause = self.chance.seconds(f"pause:{name}", 0.001, 0.2)
        often = self.faults.suspend * process.exposure * _OFTENER.get(what, 1.0)
        if self.chance.strikes(f"suspend:{name}", often):
            longest = self.longest_pause_before_request if process.checked else 7200.0
            pause = longest * self.chance.share(f"suspend/for:{name}") ** (1 if what in _OFTENER else 3)
            process.suspended_until = self.clockwork.now + timedelta(seconds=pause)
            self.tell(process, "is suspended", f"for {pause:.1f} s, before {what}")
            self.story.counts["suspensions"] += 1
            if pause > _HEARTBEATS_MISSED:
                process.lost()
            self._sleep(process, pause, until_a_claim=not process.checked and self.chance.odds(f"wakes:{name}", 0.8))
        else:
            self.clockwork.pause(pause)
        process.breathe()
        process.suspended_until = None
        self.crash(process, f"before:{name}", f"before {what}")
        return name

    def _sleep(self, process: Process, seconds: float, *, until_a_claim: bool) -> None:
        """Suspend a process; perhaps it wakes up just when another one has begun to send: the worst of moments."""
        woken = [False]

        def wake() -> None:
            if not woken[0]:
                woken[0] = True
                turn()

        turn = self.clockwork.turn_of_this()
        self.clockwork.after(seconds, wake)
        if until_a_claim:
            self._sleepers.append((process, wake))
        self.clockwork.rest()

    def claims(self, process: Process, tokens: frozenset[str]) -> None:
        """Note that a process has claimed deliveries; who slept over the same ones wakes up a little later."""
        process.claimed_at, process.claims = self.clockwork.now, tokens
        self.claimed(process, tokens)
        for other, wake in self._sleepers:
            if other is not process and other.claims & tokens:
                self.clockwork.after(self.chance.seconds(f"wakes/after:{other.name}#{other.effects}", 0.0, 1.5), wake)

    def begin(self, process: Process, seconds: float, ended: Callable[[Process], None]) -> None:
        """Start a process in a while."""
        self.alive = [other for other in self.alive if not other.ended]
        self.alive.append(process)
        self.clockwork.start(process, seconds, ended)

    def power_cut(self, name: str) -> None:
        """Kill every process at once, if chance wants it; the machines come back in minutes, or after a month."""
        if self.power_back_at is None and self.chance.strikes(f"power cut:{name}", self.faults.power_cut):
            away = self.chance.pick(
                f"power cut/for:{name}", (timedelta(minutes=1), timedelta(hours=2), timedelta(days=32))
            )
            self.power_back_at = self.clockwork.now + away
            self.tell("power", "fails", f"for {away}")
            for process in self.alive:
                process.dead = True

    def crash(self, process: Process, name: str, where: str) -> None:
        """Kill the process here, if chance wants it."""
        if self.chance.strikes(f"crash:{name}", self.faults.crash * process.exposure):
            self.tell(process, "is killed", where)
            self.story.counts["crashes"] += 1
            process.die()


class WatchedLedger:
    """A ledger as one process sees it: each of its methods is an effect, and the database may be away."""

    def __init__(self, ledger: Ledger, process: Process, around: Surroundings) -> None:
        self._ledger = ledger
        self._process = process
        self._around = around

    # Nothing can go wrong with these that the next effect would not show too.

    def now(self) -> datetime:
        """Return the time by the ledger's clock."""
        self._process.breathe()
        return self._ledger.now()

    def holder_of(self, fence: int) -> str | None:
        """Return who was given a lease."""
        return self._ledger.holder_of(fence)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)
        return self._effect(name, method) if callable(method) else method

    def _effect(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def effect(*args: Any, **kwargs: Any) -> Any:
            process, around = self._process, self._around
            where = around.switch(process, name)
            if around.chance.strikes(f"ledger away:{where}", around.faults.ledger_away):
                around.tell(process, name, "the ledger is away")
                raise OperationalError(name, {}, Exception("the ledger is away"))
            try:
                result = method(*args, **kwargs)
            except Exception as error:
                around.tell(process, name, f"{type(error).__name__}")
                raise
            around.tell(process, name, _short(result))
            self._remember(name, args, result)
            if name not in _READS_ONLY:
                if around.chance.strikes(f"ledger reply lost:{where}", around.faults.ledger_reply_lost):
                    around.tell(process, name, "committed, but its reply is lost")
                    raise OperationalError(name, {}, Exception("the connection to the ledger broke"))
                around.crash(process, f"after:{where}", f"after {name}")
            return result

        return effect

    def _remember(self, name: str, args: Sequence[Any], result: Any) -> None:
        if name == "begin_sending" and result:
            self._around.claims(self._process, result)
        self._around.noted(self._process, name, args)
        if name == "doubt_abandoned" or (name == "land" and State.IN_DOUBT in args):
            self._around.story.counts["doubts"] += result
        self._process.checked = name == "may_send" and bool(result)


def _short(result: Any) -> str:
    if result is None or isinstance(result, int | str):
        return str(result)
    if hasattr(result, "__len__"):
        return f"{len(result)}"
    if hasattr(result, "fence"):
        return f"fence {result.fence}"
    return str(result)


class VirtualStop:
    """Waiting on virtual time; a process may also be asked to stop, as Airflow does when somebody presses Clear."""

    def __init__(self, process: Process, around: Surroundings) -> None:
        self.asked = False
        self._process = process
        self._around = around

    def is_set(self) -> bool:
        """Say whether the process was asked to stop."""
        self._process.breathe()
        return self.asked

    def wait(self, timeout: float | None = None) -> bool:
        """Let virtual time pass."""
        self._around.switch(self._process, f"waiting {timeout:.1f} s")
        self._around.clockwork.pause(timeout or 0.0)
        self._process.breathe()
        return self.asked


class VirtualLeases:
    """Leases that are kept alive on virtual time: as `ledger.leases.kept`, with events in the place of a thread."""

    def __init__(self, ledger: Ledger, process: Process, around: Surroundings) -> None:
        self._ledger = ledger
        self._process = process
        self._around = around
        self._taken = 0

    @contextmanager
    def hold(self, ledger: Ledger, name: str, lasts: timedelta, wait: timedelta = timedelta(0)) -> Iterator[KeptLease]:
        """Hold a lease during the block; errors as `kept`."""
        if name.startswith("mark:"):
            # In one breath: the mark finds a ledger that was put back from a backup, and no history has one.
            held = self._acquire(self._ledger, name, lasts, wait)
            yield KeptLease(held)
            self._ledger.release(held)
            return
        self._taken += 1
        held = KeptLease(self._acquire(ledger, name, lasts, wait))
        ended = [False]
        self._around.clockwork.after(lasts.total_seconds() / 3, lambda: self._keep(held, lasts, ended))
        try:
            yield held
        finally:
            ended[0] = True
            ledger.release(held.lease)
        if held.lost:
            raise NotApplied(f"the lease {name!r} was lost on the way; another worker goes on from here")

    def _acquire(self, ledger: Ledger, name: str, lasts: timedelta, wait: timedelta) -> Any:
        give_up_at = self._around.clockwork.now + wait
        pause = 0.2
        holder = f"{self._process.name}:{self._taken}"
        while (lease := ledger.acquire(name, holder, lasts)) is None:
            if self._around.clockwork.now >= give_up_at:
                raise NotApplied(f"somebody else holds the lease {name!r}; try again")
            self._around.clockwork.pause(pause)
            pause = min(2 * pause, 20.0)
        return lease

    def _keep(self, held: KeptLease, lasts: timedelta, ended: list[bool]) -> None:
        """Renew, unless the process is gone; while it is suspended its keeper stands still too."""
        process, around = self._process, self._around
        if ended[0] or process.dead or process.ended:
            return
        again = lasts.total_seconds() / 3
        if process.suspended_until is not None and process.suspended_until > around.clockwork.now:
            again = (process.suspended_until - around.clockwork.now).total_seconds()
        elif around.chance.strikes(f"no renewal:{process.name}:{around.clockwork.now}", around.faults.ledger_away):
            around.tell(process, "renew", "the ledger is away")
        else:
            held.lost = self._ledger.renew(held.lease, lasts) is None
            if held.lost:
                around.tell(process, "renew", f"the lease {held.lease.name} is lost")
                return
        around.clockwork.after(again, lambda: self._keep(held, lasts, ended))


def means(ledger: Ledger, process: Process, around: Surroundings) -> Means:
    """Return what a worker in this process takes from its surroundings."""
    leases = VirtualLeases(ledger, process, around)
    chance = around.chance.stream(f"chance:{process.name}")
    return Means(stop=VirtualStop(process, around), hold=leases.hold, chance=chance)
