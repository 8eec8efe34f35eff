"""A worker: one process that may write to a billing site, the lease that says so, and its reasons to stop.

What it takes from its surroundings (waiting, leases, chance) comes as `Means`, so that the same code runs in a task on
real time and in a simulation on a virtual clock.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol, Self

from usage_billing.ledger import Ledger
from usage_billing.ledger.leases import Hold, KeptLease, holder, kept


class Stop(Protocol):
    """What asks a worker to end before its next request; a `threading.Event` is one."""

    def is_set(self) -> bool:
        """Say whether it was asked to."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait, for `timeout` seconds or until it is asked to."""
        ...


@dataclass(frozen=True)
class Means:
    """What a worker takes from the process it runs in.

    `stop` also does the waiting; `hold` keeps a lease alive during a block; `chance` gives numbers in ``[0, 1)`` that
    keep workers out of step.
    """

    stop: Stop = field(default_factory=threading.Event)
    hold: Hold = kept
    chance: Callable[[], float] = random.random  # noqa: S311


class Worker:
    """One process's right to send, for the length of a `with` block of `at_work`."""

    def __init__(self, ledger: Ledger, held: KeptLease, lease_lasts: timedelta, means: Means) -> None:
        self.lease = held.lease
        self.chance = means.chance
        self._ledger = ledger
        self._held = held
        self._lease_lasts = lease_lasts
        self._means = means

    @classmethod
    @contextmanager
    def at_work(cls, ledger: Ledger, what: str, lease_lasts: timedelta, means: Means) -> Iterator[Self]:
        """Hold a lease of this worker's own: it keeps nobody out, it tells whether this worker still lives.

        Raises:
            NotApplied: the lease was lost on the way.
        """
        with means.hold(ledger, f"{what}:{holder()}", lease_lasts, timedelta(0)) as held:
            yield cls(ledger, held, lease_lasts, means)

    @property
    def stopped(self) -> bool:
        """Say whether to make no further request."""
        return self._held.lost or self._means.stop.is_set()

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than until somebody asks this worker to stop."""
        self._means.stop.wait(max(seconds, 0.0))

    def alone(self, lock: str, patience: timedelta) -> AbstractContextManager[KeptLease]:
        """Hold the lock of that name during a block, against every other worker on this ledger.

        Raises:
            NotApplied: somebody else kept it for all of `patience`.
        """
        return self._means.hold(self._ledger, lock, self._lease_lasts, patience)
