"""How a sandbox passes time and carries work out: on a server's loop and threads, or inline on a virtual clock."""

import asyncio
import heapq
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from decimal import Context, getcontext, localcontext
from types import coroutine
from typing import Protocol

from starlette.responses import Response

Task = Callable[[], Response]

# The default of 28 digits would round long sums.
PRECISION = 100
_MICROS = 1_000_000


class Pace(Protocol):
    """What differs between a sandbox that is served and one that is called."""

    virtual: bool
    """Whether time passes on the sandbox's clock alone."""

    def work(self, task: Task) -> Awaitable[Response]:
        """Carry a task out, with exact arithmetic."""
        ...

    def wait(self, seconds: float) -> Awaitable[None]:
        """Let time pass while a request is held."""
        ...

    def later(self, seconds: float, task: Task) -> None:
        """Carry a task out when that much time has passed; nobody hears what came of it."""
        ...

    def close(self) -> None:
        """Let go of threads, and of what was still to be carried out."""
        ...


class ServedPace:
    """A server's: tasks run in threads, time is the wall clock's."""

    virtual = False

    def __init__(self) -> None:
        self._workers = ThreadPoolExecutor(8, "sandbox", _count_exactly)

    async def work(self, task: Task) -> Response:
        """Carry a task out in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, task)

    async def wait(self, seconds: float) -> None:
        """Sleep, while other requests are served."""
        await asyncio.sleep(seconds)

    def later(self, seconds: float, task: Task) -> None:
        """Hand the task to a thread when the time has come; one that is still to come ends with the server."""
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, lambda: loop.run_in_executor(self._workers, task))

    def close(self) -> None:
        """Wait for the tasks that run, and forget the others."""
        self._workers.shutdown(wait=True, cancel_futures=True)


class VirtualPace:
    """A caller's: tasks run inline, and what has to wait comes back when the sandbox's clock is moved past it."""

    virtual = True

    def __init__(self) -> None:
        self._context = Context(prec=PRECISION)
        self._coming: list[tuple[int, int, Callable[[], object]]] = []
        self._numbers = 0
        self._now: Callable[[], int] = lambda: 0

    def follow(self, now: Callable[[], int]) -> None:
        """Tell the time by this clock, in microseconds."""
        self._now = now

    async def work(self, task: Task) -> Response:
        """Carry a task out here and now."""
        return self._exactly(task)

    @coroutine
    def wait(self, seconds: float) -> Generator[float, None, None]:
        """Suspend the request; whoever drives it sees for how long."""
        yield seconds

    def later(self, seconds: float, task: Task) -> None:
        """Keep a task until the clock has moved that far."""
        self.at(self._now() + int(seconds * _MICROS), lambda: self._exactly(task))

    def at(self, instant: int, action: Callable[[], object]) -> None:
        """Keep an action until the clock has reached an instant."""
        self._numbers += 1
        heapq.heappush(self._coming, (instant, self._numbers, action))

    def next_due(self, until: int) -> tuple[int, Callable[[], object]] | None:
        """Take out the earliest action that is due by then."""
        if not self._coming or self._coming[0][0] > until:
            return None
        instant, _, action = heapq.heappop(self._coming)
        return instant, action

    def close(self) -> None:
        """Forget what was still to be carried out."""
        self._coming.clear()

    def _exactly(self, task: Task) -> Response:
        with localcontext(self._context):
            return task()


def _count_exactly() -> None:
    # A context belongs to its thread.
    getcontext().prec = PRECISION
