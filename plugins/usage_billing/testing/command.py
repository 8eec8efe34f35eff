"""The command ``usage-billing simulate``: many seeds, on several processes, and one line at the end."""

import gc
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from usage_billing.destinations import destination_settings
from usage_billing.errors import UsageBillingError
from usage_billing.sources import BillingSource, load_source
from usage_billing.testing.chance import Chance
from usage_billing.testing.history import simulate
from usage_billing.testing.ledgers import Ledgers, PostgresLedgers, SqliteLedgers, workshop
from usage_billing.testing.scenes import simulated
from usage_billing.testing.shrink import shrunk

_LEDGERS: dict[str, tuple[type[SqliteLedgers] | type[PostgresLedgers], ...]] = {
    "sqlite": (SqliteLedgers,),
    "postgresql": (PostgresLedgers,),
    "both": (SqliteLedgers, PostgresLedgers),
}

_SHARE = 50
"""How many seeds a process plays before it tells what it found."""


class Violated(UsageBillingError):
    """The simulator found histories that break an invariant."""


@dataclass(frozen=True)
class Order:
    """What to simulate: which seeds, on which ledgers, of which source (a folder; None draws sources of its own)."""

    first_seed: int = 0
    seeds: int = 100
    ledger: str = "sqlite"
    source: Path | None = None
    shrink: bool = True


@dataclass
class Found:
    """What some seeds came to."""

    counts: Counter[str]
    histories: Counter[str]
    stories: list[str]
    failed: list[int]

    def add(self, other: "Found") -> None:
        """Take the seeds of another process in."""
        self.counts += other.counts
        self.histories += other.histories
        self.stories += other.stories
        self.failed += other.failed


def run(order: Order, jobs: int = 2, say: Callable[[str], None] = print) -> str:
    """Simulate the seeds of an order and return the closing line; stories of failing seeds are said on the way.

    Raises:
        Violated: some seeds broke an invariant.
    """
    started = time.monotonic()
    total = Found(Counter(), Counter(), [], [])
    for found in _found(order, jobs):
        total.add(found)
        for story in found.stories:
            say(story)
        played = total.histories.total()
        if played < order.seeds:
            seconds = time.monotonic() - started
            say(f"{played} of {order.seeds} seeds played, {len(total.failed)} violations; {seconds:.0f} s")
    line = _closing_line(order, total, time.monotonic() - started)
    if total.failed:
        raise Violated(f"{line}\nfailing seeds: {' '.join(map(str, sorted(total.failed)))}")
    return line


def _found(order: Order, jobs: int) -> Iterator[Found]:
    # Small enough that no process is long done before the others, and large enough that starting a server is nothing.
    size = max(min(_SHARE, -(-order.seeds // jobs)), 1)
    end = order.first_seed + order.seeds
    shares = [range(first, min(first + size, end)) for first in range(order.first_seed, end, size)]
    if jobs == 1:
        yield from (some_seeds(order, share) for share in shares)
        return
    # A fresh interpreter: a forked one would share an open database with its parent.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)) as pool:
        yield from pool.map(some_seeds, [order] * len(shares), shares)


def _end_with(parent: int) -> None:
    """End this process once the one that started it is gone: one that is killed takes nobody with it."""

    def leave(*_: object) -> None:
        # An exception, so that databases and folders go too; a pool's process may take one for a task's own fault.
        raise SystemExit(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        while True:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(1)

    # One that nobody else sends: a script's background job ignores Ctrl-C, and a pool ends its processes by SIGTERM.
    signal.signal(signal.SIGUSR1, leave)
    threading.Thread(target=watch, daemon=True).start()


def some_seeds(order: Order, seeds: Sequence[int]) -> Found:
    """Simulate some seeds in this process, with our own log silent meanwhile."""
    own = simulated(load_source(order.source, destination_settings)) if order.source else None
    found = Found(Counter(), Counter(), [], [])
    log = logging.getLogger("usage_billing")
    level = log.level
    with workshop() as folder:
        opened = [kind(folder) for kind in _LEDGERS[order.ledger]]
        try:
            log.setLevel(logging.CRITICAL)
            gc.collect()
            gc.freeze()  # Nothing that was imported is ever garbage, and looking through it takes half the time.
            for seed in seeds:
                ledgers = Chance(seed).pick("ledger", opened)
                _one_seed(order, seed, ledgers, folder, own, found)
        finally:
            log.setLevel(level)
            for ledgers in opened:
                ledgers.close()
    return found


def _one_seed(order: Order, seed: int, ledgers: Ledgers, folder: Path, own: BillingSource | None, found: Found) -> None:
    outcome = simulate(seed, ledgers.fresh(), folder, own)
    found.counts += outcome.counts
    found.histories[outcome.kind] += 1
    if not outcome.violations:
        return
    found.failed.append(seed)
    shortest = outcome
    if order.shrink:
        shortest = shrunk(outcome, lambda muted: simulate(seed, ledgers.fresh(), folder, own, muted))
    where = f" --source {order.source}" if order.source else ""
    again = f"usage-billing simulate --first-seed {seed} --seeds 1 --ledger {ledgers.name}{where}"
    found.stories.append(f"{shortest}\n{len(shortest.struck)} disturbances are enough; again: {again}")


def _closing_line(order: Order, found: Found, seconds: float) -> str:
    histories = ", ".join(f"{count} {kind}" for kind, count in sorted(found.histories.items()))
    names = ("effects", "crashes", "suspensions", "doubts", "requests", "writing requests")
    counts = ", ".join(f"{found.counts[name]} {name}" for name in names)
    last = order.first_seed + order.seeds - 1
    return f"seeds {order.first_seed} to {last}: {histories}; {counts}; {len(found.failed)} violations; {seconds:.0f} s"
