"""What a site can bear at once, and the count of what it was asked."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from .world import Limits


class Overloaded(Exception):
    """More requests are waiting than the site lets wait: 429."""


@dataclass(frozen=True)
class Rate:
    """A limit of requests in one second, and the second that it is now."""

    limit: int
    second: int


@dataclass
class Tally:
    """The requests of one site since the last reset.

    `most_in_process` counts, for each host of the site, every request that was open at once, waiting ones too, for that
    is what a client decides; `refused` counts replies of 400 and above.
    """

    reading: int = 0
    writing: int = 0
    refused: int = 0
    throttled: int = 0
    by_route: Counter[str] = field(default_factory=Counter)
    most_in_process: Counter[str] = field(default_factory=Counter)

    def reset(self) -> None:
        """Count from zero again; requests that are open now count when they are answered."""
        self.reading = self.writing = self.refused = self.throttled = 0
        self.by_route.clear()
        self.most_in_process.clear()

    def arrived(self, route: str, writing: bool) -> None:
        """Count a request."""
        self.by_route[route] += 1
        if writing:
            self.writing += 1
        else:
            self.reading += 1

    def answered(self, status: int) -> None:
        """Count a reply."""
        self.refused += status >= 400
        self.throttled += status == 429

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as JSON."""
        return {
            "reading": self.reading,
            "writing": self.writing,
            # The limit of four is the main API's; the events host is told apart.
            "most_in_process": max(
                (n for host, n in self.most_in_process.items() if not host.startswith("events")), default=0
            ),
            "most_in_process_events": max(self.most_in_process["events"], self.most_in_process["events-eu"]),
            "refused": self.refused,
            "throttled": self.throttled,
            "by_route": dict(sorted(self.by_route.items())),
        }


class Gate:
    """Lets a limited number of requests in at once; a few more wait, and those beyond are turned away."""

    def __init__(self, limits: Limits, tally: Tally, host: str) -> None:
        self.limits = limits
        self.tally = tally
        self.host = host
        self._open = 0
        self._second = self._in_second = 0
        self._room = asyncio.Semaphore(limits.in_process) if limits.in_process else None

    def _keep(self, rate: Rate) -> None:
        if self._second != rate.second:
            self._second, self._in_second = rate.second, 0
        if self._in_second >= rate.limit:
            raise Overloaded
        self._in_second += 1

    @asynccontextmanager
    async def enter(self, rate: Rate | None = None) -> AsyncIterator[None]:
        """Hold a place while the request is worked on; `Overloaded` when too many wait already, or came already."""
        if rate is not None:
            self._keep(rate)
        self._open += 1
        self.tally.most_in_process[self.host] = max(self.tally.most_in_process[self.host], self._open)
        try:
            if self._room is None:
                yield
                return
            if self._open > (self.limits.in_process or 0) + self.limits.queued:
                raise Overloaded
            async with self._room:
                yield
        finally:
            self._open -= 1
