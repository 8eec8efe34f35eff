"""Virtual time, and processes that take turns on it: no waiting, no threads, and the same turns in every telling.

A process runs until it pauses; whoever wakes up earliest goes on. Time passes only while everybody sleeps.
"""

import heapq
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import greenlet

Action = Callable[[], None]


class Killed(BaseException):
    """A process was killed: it makes no further effect, not even in the `finally` blocks that this passes through."""


class Process:
    """A simulated process: what `body` does, turn by turn, and how it ended."""

    def __init__(self, name: str, body: Callable[["Process"], Any], exposure: float = 1.0) -> None:
        self.name = name
        self.exposure = exposure
        """How much of a history's trouble it meets: most strikes where something is sent, for there it can do harm."""
        self.dead = False
        self.ended = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.suspended_until: datetime | None = None
        self.lost: Action = lambda: None
        """What whoever watches over the process does when it is not heard of for long."""
        self.effects = 0
        self.claimed_at: datetime | None = None
        """When the deliveries that the process is about to send were claimed."""
        self.claims: frozenset[str] = frozenset()
        """The tokens that it claimed last."""
        self.checked = False
        """Whether the last thing the process did was to ask if it may still send."""
        self._body = body

    def run(self) -> None:
        """Run to the end, whatever that is."""
        try:
            self.result = self._body(self)
        except Killed as killed:
            self.dead, self.error = True, killed
        except Exception as error:  # noqa: BLE001 - a task fails with anything; who started it looks at it.
            self.error = error
        self.ended = True

    def breathe(self) -> None:
        """Raise `Killed` if the process is dead: a dead process has no effect."""
        if self.dead:
            raise Killed

    def die(self) -> None:
        """Kill the process that runs right now."""
        self.dead = True
        raise Killed


class Clockwork:
    """The virtual clock and everything that is to happen on it, in order of time, then of arrangement."""

    def __init__(self, start: datetime) -> None:
        self.now = start
        self._coming: list[tuple[datetime, int, Action]] = []
        self._arranged = 0
        self._hub = greenlet.getcurrent()

    def after(self, seconds: float, action: Action) -> None:
        """Arrange an action."""
        self.at(self.now + timedelta(seconds=max(seconds, 0.0)), action)

    def at(self, moment: datetime, action: Action) -> None:
        """Arrange an action at a moment, or now if that is over."""
        self._arranged += 1
        heapq.heappush(self._coming, (max(moment, self.now), self._arranged, action))

    def start(self, process: Process, seconds: float, ended: Callable[[Process], None]) -> None:
        """Start a process in a while; `ended` is told when it is over."""

        def body() -> None:
            process.run()
            self.after(0, lambda: ended(process))

        own = greenlet.greenlet(body, self._hub)
        self.after(seconds, lambda: self._turn(own))

    def pause(self, seconds: float) -> None:
        """Let time pass for the process that runs; others take their turns."""
        self.after(seconds, self.turn_of_this())
        self.rest()

    def turn_of_this(self) -> Action:
        """Return what lets the process that runs now go on, once it rests."""
        own = greenlet.getcurrent()
        return lambda: self._turn(own)

    def rest(self) -> None:
        """Give the turn away, until somebody gives it back."""
        self._hub.switch()

    def run(self, until: datetime | None = None) -> None:
        """Carry out what is to come, to the end or until a moment, at which the clock then stands."""
        while self._coming and (until is None or self._coming[0][0] <= until):
            self.now, _, action = heapq.heappop(self._coming)
            action()
        if until is not None:
            self.now = max(self.now, until)

    @staticmethod
    def _turn(own: greenlet.greenlet) -> None:
        own.switch()
