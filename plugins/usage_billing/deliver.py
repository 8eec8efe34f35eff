"""Reserve, send, settle: what a plan proposes goes to the billing site, each delivery once.

The intent is in the ledger before the request leaves, the outcome right after. Whatever happens between the two leaves
a delivery in doubt, and a doubt is settled by asking the site, never by sending again in the hope that nothing arrived.
"""

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused
from usage_billing.ledger import Ledger
from usage_billing.ledger.leases import KeptLease, holder, kept
from usage_billing.records import Delivery, Period, Plan, Receipt, State
from usage_billing.staging import Staging

log = logging.getLogger(__name__)

_ROUNDS = 5
"""How often a delivery is planned again because something moved under it, before the rest is left to the next run."""


@dataclass(frozen=True)
class Manners:
    """How a deliver behaves toward the site and toward its own death.

    `lease_lasts` is how long another worker waits before it takes over from one that died; `patience` is how long a
    site may throttle or be out of reach before the task gives up and leaves the rest `reserved`.
    """

    threads: int = 4
    lease_lasts: timedelta = timedelta(seconds=30)
    patience: timedelta = timedelta(minutes=10)


@dataclass
class Delivered:
    """What one deliver did: how many deliveries came to which end, and in how many requests."""

    accepted: int = 0
    settled: int = 0
    refused: int = 0
    doubted: int = 0
    not_applied: int = 0
    requests: int = 0
    seconds: float = 0.0


def deliver(
    first: Plan,
    replan: Callable[[], Plan],
    number: int,
    window: Period,
    destination: Destination,
    ledger: Ledger,
    staging: Staging,
    stop: threading.Event,
    manners: Manners,
) -> Delivered:
    """Bring extraction `number`'s plan to the site: write it down, send it chunk by chunk, settle what is in doubt.

    `replan` compares the same totals with the ledger again; it is asked where a key had moved since the plan was made,
    or was blocked by a doubt. `stop` ends the work before the next request. What cannot be settled in time stays listed
    in the ledger by name.

    Raises:
        Stale: a newer extraction was compared; nothing more was sent.
        Misconfigured: the site turned the credentials or the definition down; deliveries are back in `reserved`.
        NotApplied: the site stayed out of reach, or this worker lost its lease; the rest is `reserved`.
    """
    started = time.monotonic()
    # Each worker has a lease of its own: it does not keep others out, it tells whether this one still lives.
    with kept(ledger, f"deliver:{destination.source.name}:{holder()}", manners.lease_lasts) as held:
        worker = _Worker(held, stop)
        work = _Work(number, window, destination, ledger, worker, manners)
        current = first
        for _ in range(_ROUNDS):
            moved = work.reserve(current, staging)
            work.until_settled()
            if worker.stopped or not (moved or current.tally.blocked):
                break
            log.info(
                "%d deliveries had moved, %d were blocked by a doubt: planning again", moved, current.tally.blocked
            )
            current = replan()
    work.done.seconds = time.monotonic() - started
    return work.done


class _Worker:
    """One deliver's right to send, and the reasons to stop."""

    def __init__(self, held: KeptLease, stop: threading.Event) -> None:
        self.lease = held.lease
        self._held = held
        self._stop = stop

    @property
    def stopped(self) -> bool:
        return self._held.lost or self._stop.is_set()

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than until somebody asks this task to stop."""
        self._stop.wait(max(seconds, 0.0))


class _Work:
    """The sending and settling of one extraction's deliveries under one lease."""

    def __init__(
        self, number: int, window: Period, destination: Destination, ledger: Ledger, worker: _Worker, manners: Manners
    ) -> None:
        self.done = Delivered()
        self._number = number
        self._window = window
        self._destination = destination
        self._source = destination.source.name
        self._ledger = ledger
        self._worker = worker
        self._manners = manners
        self._threads = manners.threads
        self._setback: NotApplied | None = None
        self._counting = threading.Lock()
        self._progress = _Progress()
        self._conflicts: set[str] = set()

    def reserve(self, plan: Plan, staging: Staging) -> int:
        """Write the plan down; return how many of its keys have moved and must be planned again."""
        written = already = moved = 0
        for proposals in staging.read(plan.proposals):
            outcome = self._ledger.reserve(self._source, self._destination.site, self._number, proposals.to_pandas())
            written, already, moved = written + outcome.written, already + outcome.already, moved + outcome.moved
        self._progress.expect(written + already)
        log.info("reserved in the ledger: %d new, %d from an earlier try", written, already)
        return moved

    def until_settled(self) -> None:
        """Send and settle until nothing of the window is on its way, or patience has run out."""
        give_up_at = self._ledger.now() + self._destination.settle_after + self._manners.patience
        while not self._worker.stopped:
            self._send_reserved()
            self._ledger.doubt_abandoned(self._source)
            doubts = [d for d in self._ledger.doubts(self._source, self._window) if d.token not in self._conflicts]
            if not doubts and not self._ledger.in_the_air(self._source, self._window):
                return
            if self._settle_due(doubts):
                continue
            if self._ledger.now() > give_up_at:
                return
            self._worker.wait(self._until_due(doubts))

    # --- sending -----------------------------------------------------------------------------------------------------

    def _send_reserved(self) -> None:
        """Send whatever is reserved, pass by pass, until nothing is left; a pass ends early at a setback."""
        give_up_at = self._ledger.now() + self._manners.patience
        setbacks = 0
        while not self._worker.stopped:
            before = self.done.accepted
            setback = self._one_pass()
            if setback is None:
                return
            setbacks = 1 if self.done.accepted > before else setbacks + 1
            if self._ledger.now() > give_up_at:
                raise setback
            self._pause(setbacks, setback)

    def _one_pass(self) -> NotApplied | None:
        """Send what is reserved, chunk by chunk; return the setback that ended the pass, if one did."""
        self._setback = None
        after = ""
        size = self._destination.chunk_size
        with ThreadPoolExecutor(self._threads, thread_name_prefix="send") as pool:
            while not self._worker.stopped and self._setback is None:
                ready = self._ledger.reserved(self._source, self._number, size * self._threads * 8, after)
                if not ready:
                    break
                chunks = [ready[start : start + size] for start in range(0, len(ready), size)]
                list(pool.map(self._send_chunk, chunks))
                after = ready[-1].token
                self._progress.report(self.done)
        if self._setback is None:
            self._threads = min(self._threads + 1, self._manners.threads)
        return self._setback

    def _pause(self, setbacks: int, error: NotApplied) -> None:
        """Wait as the site asked, else longer each time and never in step with others; then go on more gently."""
        self._threads = max(1, self._threads // 2)
        seconds = error.retry_after_seconds or min(60.0, 0.5 * 2**setbacks) * random.uniform(0.5, 1.0)  # noqa: S311
        log.warning("%s; going on in %.1f s with %d requests at once", error, seconds, self._threads)
        self._worker.wait(seconds)

    def _send_chunk(self, chunk: Sequence[Delivery]) -> None:
        if self._worker.stopped or self._setback is not None:
            return
        tokens = [delivery.token for delivery in chunk]
        claimed = self._ledger.begin_sending(tokens, self._worker.lease)
        ours = [delivery for delivery in chunk if delivery.token in claimed]
        if ours:
            self._send_claimed(ours)

    def _send_claimed(self, ours: Sequence[Delivery]) -> None:
        """Make one request and write down its outcome, whatever it is."""
        try:
            receipts = self._destination.send(ours)
        except NotApplied as error:
            self._land(ours, State.RESERVED, error)
            self._setback = error
        except Refused as error:
            self._refused(ours, error)
        except Misconfigured as error:
            self._land(ours, State.RESERVED, error)
            self._setback = NotApplied(str(error))  # The threads beside this one need not hear the same.
            raise
        except InDoubt as error:
            self._land(ours, State.IN_DOUBT, error)
            log.warning("in doubt: %d deliveries; %s", len(ours), error)
        except Exception as error:
            # A fault of ours, but the request may have left: the site will be asked.
            self._land(ours, State.IN_DOUBT, error)
            raise
        else:
            self._accept(ours, receipts)

    def _accept(self, ours: Sequence[Delivery], receipts: Sequence[Receipt]) -> None:
        written = self._ledger.accept(receipts, self._worker.lease)
        taken = {receipt.token for receipt in receipts}
        left = [delivery for delivery in ours if delivery.token not in taken]
        if left:
            # It lies behind the pass by now: a setback makes another one.
            self._setback = NotApplied(f"the site took {len(taken)} of a chunk of {len(ours)}")
            self._land(left, State.RESERVED, self._setback)
        self._count(accepted=written, requests=1)

    def _refused(self, ours: Sequence[Delivery], error: Refused) -> None:
        """A refusal of one is its own; a refusal of a chunk names nobody, so its members go singly."""
        if len(ours) == 1:
            self._land(ours, State.REFUSED, error)
            log.error("refused: %s (token %s)", error, ours[0].token)
            return
        self._land(ours, State.RESERVED, error)
        for delivery in ours:
            self._send_chunk([delivery])

    def _land(self, ours: Sequence[Delivery], state: State, error: Exception) -> None:
        moved = self._ledger.land([delivery.token for delivery in ours], state, str(error), self._worker.lease)
        counter = {State.RESERVED: "not_applied", State.REFUSED: "refused", State.IN_DOUBT: "doubted"}[state]
        self._count(**{counter: moved}, requests=1)

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, value in more.items():
                setattr(self.done, name, getattr(self.done, name) + value)

    # --- settling ----------------------------------------------------------------------------------------------------

    def _settle_due(self, doubts: Sequence[Delivery]) -> int:
        """Ask the site about every doubt that is old enough; return how many ended."""
        now = self._ledger.now()
        due = [doubt for doubt in doubts if doubt.sent_at and now - doubt.sent_at >= self._destination.settle_after]
        size = self._destination.chunk_size
        return sum(self._settle(due[start : start + size]) for start in range(0, len(due), size))

    def _settle(self, doubts: Sequence[Delivery]) -> int:
        if self._worker.stopped:
            return 0
        try:
            answers = self._destination.settle(doubts)
        except Refused as error:
            if len(doubts) > 1:
                return sum(self._settle([doubt]) for doubt in doubts)
            # The site has it, with another quantity. As a refusal its next revision would bill the whole once more, so
            # it stays in doubt, which blocks its key, until a person decides.
            self._conflicts.add(doubts[0].token)
            self._ledger.settle_doubt(doubts[0], State.IN_DOUBT, reason=str(error))
            log.warning("in doubt until a person decides: %s", error)
            return 0
        except (NotApplied, InDoubt) as error:
            log.warning("%d doubts stay open: %s", len(doubts), error)
            return 0
        ended = 0
        for doubt in doubts:
            if doubt.token in answers:
                receipt = answers[doubt.token]
                ended += self._end(
                    doubt, State.ACCEPTED if receipt else State.RESERVED, receipt, "the site does not have it"
                )
        return ended

    def _end(self, doubt: Delivery, state: State, receipt: Receipt | None = None, reason: str = "") -> int:
        ended = self._ledger.settle_doubt(doubt, state, receipt, reason)
        if ended:
            self._count(settled=int(state is State.ACCEPTED))
            log.info("doubt settled: %s is %s %s", doubt.token, state, receipt.note if receipt else reason)
        return int(ended)

    def _until_due(self, doubts: Sequence[Delivery]) -> float:
        now, settle_after = self._ledger.now(), self._destination.settle_after
        waits = [(doubt.sent_at + settle_after - now).total_seconds() for doubt in doubts if doubt.sent_at]
        pending = [wait for wait in waits if wait > 0]
        # Nothing newly due: a worker elsewhere is sending, or the site could not tell yet. Look again in a while.
        return min(min(pending, default=2.0), 10.0)


class _Progress:
    """Lines in the task log for whoever watches: how far, how fast, how long still; at most one in five seconds."""

    def __init__(self) -> None:
        self._expected = 0
        self._started = time.monotonic()
        self._spoke = self._started

    def expect(self, more: int) -> None:
        self._expected += more

    def report(self, done: Delivered) -> None:
        now = time.monotonic()
        if now - self._spoke < 5.0:  # noqa: PLR2004
            return
        self._spoke = now
        rate = done.accepted / (now - self._started)
        left = max(self._expected - done.accepted, 0)
        log.info(
            "delivered %d of %d (%.0f %%), %.0f/s, about %.0f s left",
            done.accepted,
            self._expected,
            100 * done.accepted / max(self._expected, 1),
            rate,
            left / rate if rate else float("inf"),
        )
