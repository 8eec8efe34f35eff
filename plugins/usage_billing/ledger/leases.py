"""Holding a lease for as long as the work takes: a thread renews it, and the work is told when it is lost."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta

from usage_billing.errors import NotApplied
from usage_billing.ledger import Lease, Ledger

log = logging.getLogger(__name__)


class KeptLease:
    """A lease that is being renewed; `lost` turns true when it could not be kept."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease
        self.lost = False


Hold = Callable[[Ledger, str, timedelta, timedelta], AbstractContextManager[KeptLease]]
"""What holds a lease as `kept` does: by a thread on real time, or on a simulation's virtual clock."""


def holder() -> str:
    """Return a name for this process and thread that no other has, readable for people."""
    return f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}:{time.monotonic_ns()}"


@contextmanager
def kept(ledger: Ledger, name: str, lasts: timedelta, wait: timedelta = timedelta(0)) -> Iterator[KeptLease]:
    """Hold the lease `name` during the block, waiting up to `wait` for whoever has it.

    Raises:
        NotApplied: somebody else kept it for all of `wait`, or it was lost during the block.
    """
    held = KeptLease(_acquire(ledger, name, lasts, wait))
    ended = threading.Event()
    keeper = threading.Thread(target=_keep, args=(ledger, held, lasts, ended), name=f"lease {name}", daemon=True)
    keeper.start()
    try:
        yield held
    finally:
        ended.set()
        keeper.join()
        ledger.release(held.lease)
    if held.lost:
        raise NotApplied(f"the lease {name!r} was lost on the way; another worker goes on from here")


def _acquire(ledger: Ledger, name: str, lasts: timedelta, wait: timedelta) -> Lease:
    give_up_at = time.monotonic() + wait.total_seconds()
    while (lease := ledger.acquire(name, holder(), lasts)) is None:
        if time.monotonic() >= give_up_at:
            raise NotApplied(f"somebody else holds the lease {name!r}; try again")
        time.sleep(0.2)
    return lease


def _keep(ledger: Ledger, held: KeptLease, lasts: timedelta, ended: threading.Event) -> None:
    while not ended.wait(lasts.total_seconds() / 3):
        try:
            held.lost = ledger.renew(held.lease, lasts) is None
        except Exception:  # Whatever it was, the database will say whether the lease still lives.
            log.warning("could not renew the lease %s; trying again", held.lease.name, exc_info=True)
        if held.lost:
            log.warning("lost the lease %s: this worker sends nothing more", held.lease.name)
            return
