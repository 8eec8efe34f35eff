"""Reserve, send, settle: what a plan proposes goes to the billing site, each delivery once.

The intent is in the ledger before the request leaves, the outcome right after. Whatever happens between the two leaves
a delivery in doubt, and a doubt is settled by asking the site, never by sending again in the hope that nothing arrived.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial

from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError
from usage_billing.ledger import Ledger
from usage_billing.records import (
    NOBODY_CAN_TELL,
    PASSES,
    PASSES_SOON,
    Delivery,
    Plan,
    Reading,
    Receipt,
    State,
    Window,
)
from usage_billing.release import policy_of, reissue
from usage_billing.settle import Doubts, overtaken
from usage_billing.staging import Staging
from usage_billing.workers import Means, Worker

log = logging.getLogger(__name__)

_ROUNDS = 5
"""How often a delivery is planned again because something moved under it, before the rest is left to the next run."""
_SHARE_TO_CLAIM = 10
"""A claim is good for this part of `settle_after`; the rest is the site's cut-off and the time to connect."""
_SHORTEST_CLAIM = timedelta(seconds=1)
_FRESH = timedelta(minutes=10)
"""How long an account leads where it led when it was looked up; after that it is looked up again before the request."""


_ASKS = "; somebody is asked first: clear the run from validate on, or release it by name"
"""What is added to the reason of what would pass, where the source wants an approval."""


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
    held: int = 0
    requests: int = 0
    seconds: float = 0.0


def deliver(
    first: Plan,
    replan: Callable[[], Plan],
    reading: Reading,
    window: Window,
    destination: Destination,
    ledger: Ledger,
    staging: Staging,
    manners: Manners,
    means: Means,
) -> Delivered:
    """Bring a reading's plan to the site: write it down, send it chunk by chunk, settle what is in doubt.

    `replan` compares the same totals with the ledger again; it is asked where a key had moved since the plan was made,
    was blocked by a doubt, could go in part only, or waited for a credit that went. What cannot be settled in time
    stays listed in the ledger by name.

    Raises:
        Stale: a later reading was compared; nothing more was sent.
        Misconfigured: the site turned the credentials or the definition down; deliveries are back in `reserved`. Or it
            turned down the question about some doubts; everything else was settled and sent.
        NotApplied: the site stayed out of reach, or this worker lost its lease; the rest is `reserved`.
    """
    started = time.monotonic()
    source = destination.source.name
    with Worker.at_work(ledger, f"deliver:{source}", manners.lease_lasts, means) as worker:
        work = _Work(partial(ledger.reserved, source, reading), window, destination, ledger, worker, manners)
        work.resolved_at = ledger.validated_at(reading)
        current = first
        for _ in range(_ROUNDS):
            accepted = work.done.accepted
            moved = work.reserve(current, reading, staging)
            work.reissue()
            ended = work.until_settled()
            # A doubt that nothing ended blocks its key as before: planning again would only ask the same.
            freed = ended or (current.tally.blocked if current is first else 0)
            # What waits for a credit may go once that was taken.
            follows = current.tally.follows if work.done.accepted > accepted else 0
            if worker.stopped or not (moved or work.reopened or freed or current.tally.partial or follows):
                break
            log.info(
                "%d deliveries had moved, %d doubts ended, %d could go in part, %d waited for a credit: planning again",
                moved + work.reopened,
                ended,
                current.tally.partial,
                follows,
            )
            current = replan()
        else:
            work.reserve(current, reading, staging)  # What nobody has written down is listed nowhere.
        work.check_questions()
    work.done.seconds = time.monotonic() - started
    return work.done


def resume(destination: Destination, ledger: Ledger, manners: Manners, means: Means) -> Delivered:
    """Send what stands of one edition of a source and needs no run for it, whatever its usage period.

    It was sent before and turned out not to be at the site, or a person released it. Where the source asks for
    approvals, what nobody approved stays as it is: it may have been written down before the source began to ask.

    Raises:
        Misconfigured, NotApplied: as `deliver`.
    """
    source, span, asks = destination.source.name, destination.source.span, destination.source.settings.approval
    with Worker.at_work(ledger, f"deliver:{source}", manners.lease_lasts, means) as worker:
        ready = partial(ledger.resumable, source, span=span, approved=asks)
        work = _Work(ready, span, destination, ledger, worker, manners)
        work.send_ready()
        if work.reopened:
            work.reissue()
            work.send_ready()
    if asks and (left := ledger.unapproved(source, span)):
        log.warning("%d deliveries of %s go once they are approved: run their periods again", left, source)
    return work.done


class _Work:
    """The sending and settling of deliveries under one lease; `ready` gives those to send by token, above a token."""

    def __init__(
        self,
        ready: Callable[[int, str], list[Delivery]],
        window: Window | None,
        destination: Destination,
        ledger: Ledger,
        worker: Worker,
        manners: Manners,
    ) -> None:
        self.done = Delivered()
        self.reopened = 0
        self.resolved_at: datetime | None = None
        self._ready = ready
        self._window = window
        self._destination = destination
        destination.book = ledger
        self._source = destination.source.name
        self._ledger = ledger
        self._worker = worker
        self._manners = manners
        self._started = self._judged_at = ledger.now()
        self._good_for = max(destination.settle_after / _SHARE_TO_CLAIM, _SHORTEST_CLAIM)
        self._threads = manners.threads
        self._setback: NotApplied | None = None
        self._counting = threading.Lock()
        self._progress = _Progress()
        self._doubts = Doubts(destination, ledger, window, lambda: worker.stopped)

    def reserve(self, plan: Plan, reading: Reading, staging: Staging) -> int:
        """Write the plan down; return how many of its keys have moved and must be planned again."""
        self.reopened = 0
        written = already = moved = 0
        for proposals in staging.read(plan.proposals):
            outcome = self._ledger.reserve(self._source, self._destination.site, reading, proposals.to_pandas())
            written, already, moved = written + outcome.written, already + outcome.already, moved + outcome.moved
        self._progress.expect(written + already)
        log.info("reserved in the ledger: %d new, %d from an earlier try", written, already)
        return moved

    def reissue(self) -> None:
        """Reserve what a person released, in the form of today; what cannot be asked for now stays held."""
        try:
            reissue(self._destination, self._ledger, self._window)
        except NotApplied as error:
            log.warning("what was released waits: %s", error)

    def until_settled(self) -> int:
        """Send and settle until nothing of the window is on its way, or patience has run out.

        Return how many doubts ended.
        """
        before, seen, in_part = self._doubts.settled.ended, set[str](), self._doubts.settled.in_part
        patience = self._destination.settle_after + self._manners.patience
        give_up_at, taken = self._ledger.now() + patience, -1
        while not self._worker.stopped:
            self.send_ready()
            doubts = self._doubts.open()
            seen.update(doubt.token for doubt in doubts)
            if not doubts and not self._ledger.in_the_air(self._source, self._window):
                break
            if (now_taken := self.done.accepted + self._doubts.settled.found) > taken:
                give_up_at, taken = self._ledger.now() + patience, now_taken
            # A site that fails each request without effect makes doubts that end and come again: that is no progress.
            if self._ledger.now() > give_up_at:
                break
            if self._doubts.ask(doubts):
                continue
            seconds = self._doubts.seconds_until_due(doubts)
            # As with what is sent: a site that wants to be left alone for longer than patience lasts is asked later.
            if self._ledger.now() + timedelta(seconds=seconds) > give_up_at:
                log.warning("%d doubts stay open: the next question would be in %.0f s", len(doubts), seconds)
                break
            self._worker.wait(seconds)
        self.reopened += self._doubts.settled.in_part - in_part
        self.done.settled = self._doubts.settled.found
        # A sweep may have ended some of them, and only a part of what they carried may have counted.
        others = len(seen - {doubt.token for doubt in self._ledger.doubts(self._source, self._window)})
        return max(self._doubts.settled.ended - before, others)

    def check_questions(self) -> None:
        """Make sure that the site took every question.

        Raises:
            Misconfigured: it turned down the question about some doubts; what could be settled and sent, was.
        """
        if self._doubts.fault is not None:
            raise self._doubts.fault

    # --- passes ------------------------------------------------------------------------------------------------------

    def send_ready(self) -> None:
        """Send whatever is reserved, pass by pass, until nothing is left; a pass ends early at a setback.

        Patience begins anew whenever the site has taken something.
        """
        give_up_at = self._ledger.now() + self._manners.patience
        setbacks = 0
        while not self._worker.stopped:
            before = self.done.accepted
            setback = self._one_pass()
            if setback is None:
                return
            setbacks += 1
            if self.done.accepted > before:
                setbacks, give_up_at = 1, self._ledger.now() + self._manners.patience
            seconds = self._seconds_to_wait(setbacks, setback)
            if self._ledger.now() + timedelta(seconds=seconds) > give_up_at:
                raise setback
            self._threads = max(1, self._threads // 2)
            log.warning("%s; going on in %.1f s with %d requests at once", setback, seconds, self._threads)
            self._worker.wait(seconds)

    def _one_pass(self) -> NotApplied | None:
        """Send what is reserved, chunk by chunk; return the setback that ended the pass, if one did.

        What has to go alone goes last: a deduction finds most to take off after everything else was added.
        """
        self._setback = None
        alone: list[tuple[str, Delivery]] = []
        after = ""
        while not self._worker.stopped and self._setback is None:
            page = self._ready(self._destination.chunk_size * self._manners.threads * 8, after)
            if not page:
                break
            after = page[-1].token
            locks = [(self._destination.lock(delivery), delivery) for delivery in page]
            alone += [(lock, delivery) for lock, delivery in locks if lock]
            self._send_page(self._still_right([delivery for lock, delivery in locks if not lock]))
            self._progress.report(self.done)
        for lock, delivery in alone:
            self._send_alone(lock, delivery)
        return self._setback

    def _send_page(self, page: Sequence[Delivery]) -> None:
        chunks = list(self._chunks(page))
        if self._threads == 1:
            for chunk in chunks:
                self._send_chunk(chunk)
        else:
            with ThreadPoolExecutor(self._threads, thread_name_prefix="send") as pool:
                list(pool.map(self._send_chunk, chunks))
        if chunks and self._setback is None:
            self._threads = min(self._threads + 1, self._manners.threads)

    def _chunks(self, page: Sequence[Delivery]) -> Iterator[Sequence[Delivery]]:
        first = [delivery for delivery in page if not delivery.sends]
        again = [delivery for delivery in page if delivery.sends]
        sizes = ((first, self._destination.chunk_size), (again, self._destination.retry_chunk_size))
        return (some[start : start + size] for some, size in sizes for start in range(0, len(some), size))

    def _seconds_to_wait(self, setbacks: int, error: NotApplied) -> float:
        """Return how long the site asked to wait, else longer each time and never in step with others."""
        return error.retry_after_seconds or min(60.0, 0.5 * 2**setbacks) * (1 + self._worker.chance()) / 2

    # --- sending -----------------------------------------------------------------------------------------------------

    def _still_right(self, page: Sequence[Delivery]) -> Sequence[Delivery]:
        """Hold what was right when it was planned and may not be sent any more; return the rest."""
        now = self._judged_at = self._ledger.now()
        doubtful = [delivery for delivery in page if self._may_have_changed(delivery, now)]
        if not doubtful:
            return page
        try:
            reasons = self._destination.recheck(doubtful, now)
        except NotApplied as error:
            self._setback = error
            return []
        self._hold(reasons)
        # From the end of the asking: however long it takes, the first chunks go.
        self._judged_at = self._ledger.now()
        return [delivery for delivery in page if delivery.token not in reasons]

    def _hold(self, reasons: Mapping[str, str]) -> int:
        """Hold deliveries; what the source lets pass is written anew by the next round. Return how many were held."""
        if self._destination.source.settings.approval:
            reasons = {token: _asking(reason) for token, reason in reasons.items()}
        held = self._ledger.hold(reasons, policy_of(self._destination))
        self._count(held=held)
        self.reopened += sum(reason.startswith(PASSES) for reason in reasons.values())
        return held

    def _may_have_changed(self, delivery: Delivery, now: datetime) -> bool:
        """Say whether time has passed over a delivery: an earlier try, a long way here, the end of its period."""
        earlier = delivery.reserved_at is not None and delivery.reserved_at < self._started
        old = self.resolved_at is not None and now - self.resolved_at > _FRESH
        return bool(delivery.sends) or earlier or old or self._is_over(delivery, now)

    def _is_over(self, delivery: Delivery, now: datetime) -> bool:
        """Say whether a request that leaves now could land after the billing period."""
        return delivery.may_land_late(now, self._destination.settle_after)

    def _send_alone(self, lock: str, delivery: Delivery) -> None:
        """Send one delivery while nobody else sends under the same lock, if the site still takes all of it."""
        if self._worker.stopped or self._setback is not None:
            return
        try:
            with self._worker.alone(lock, self._manners.patience):
                reasons = self._destination.recheck([delivery], self._ledger.now())
                self._judged_at = self._ledger.now()
                if delivery.token not in reasons:
                    self._send_chunk([delivery])
                elif held := self._hold(reasons):
                    self.reopened += held  # A part of it may go: planning again tells.
        except NotApplied as error:
            self._setback = error

    def _send_chunk(self, chunk: Sequence[Delivery]) -> None:
        if self._worker.stopped or self._setback is not None:
            return
        self._destination.prepare(chunk)
        if self._was_judged_too_early(chunk):
            why = "a billing period ends: what is left of it is judged once more"
            self._setback = NotApplied(why, retry_after_seconds=0.01)
            return
        tokens = [delivery.token for delivery in chunk]
        claimed = self._ledger.begin_sending(tokens, self._worker.lease)
        ours = [delivery for delivery in chunk if delivery.token in claimed]
        if ours:
            self._send_claimed(ours)

    def _was_judged_too_early(self, chunk: Sequence[Delivery]) -> bool:
        """Say whether a billing period of a chunk may have ended since it was judged."""
        if all(delivery.open_until is None for delivery in chunk):
            return False  # Most usage is not dated, and the ledger need not be asked for the time.
        now = self._ledger.now()
        return now - self._judged_at > self._good_for and any(self._is_over(delivery, now) for delivery in chunk)

    def _send_claimed(self, ours: Sequence[Delivery]) -> None:
        """Make one request and write down its outcome, whatever it is."""
        try:
            self._check_claim(ours)
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
            self._accept(ours, error.receipts)
            left = _without(ours, error.receipts)
            self._land(left, State.IN_DOUBT, error)
            log.warning("in doubt: %d deliveries; %s", len(left), error)
            if not error.taken and not error.refused:
                # The site or the way to it is not well: the next request need not follow at once.
                why = f"{len(left)} deliveries are in doubt: {error}"
                self._setback = NotApplied(why, retry_after_seconds=error.retry_after_seconds)
        except Exception as error:
            # A fault of ours, but the request may have left: the site will be asked.
            self._land(ours, State.IN_DOUBT, error)
            raise
        else:
            self._accept(ours, receipts)
            if left := _without(ours, receipts):
                # It lies behind the pass by now: a setback makes another one.
                self._setback = NotApplied(f"the site took {len(receipts)} of a chunk of {len(ours)}")
                self._land(left, State.RESERVED, self._setback)
        self._count(requests=1)

    def _check_claim(self, ours: Sequence[Delivery]) -> None:
        """Make sure that no time was lost since the claim: others count `settle_after` from there.

        Raises:
            NotApplied: this process was held up, or its lease is gone; nothing was sent.
        """
        if not self._ledger.may_send(ours[0].token, self._worker.lease, self._good_for):
            raise NotApplied("this worker was held up between its claim and the request; nothing was sent")

    def _accept(self, ours: Sequence[Delivery], receipts: Sequence[Receipt]) -> None:
        """Write receipts down; what the site may have taken too late for its billing period is in doubt instead."""
        late = self._taken_late(ours, receipts)
        kept = [receipt for receipt in receipts if receipt.token not in late]
        if kept:
            self._count(accepted=self._ledger.accept(kept, self._worker.lease))
            self.reopened += sum(receipt.applied is not None for receipt in kept)
        for token, doubt in late.items():
            self._land([one for one in ours if one.token == token], State.IN_DOUBT, doubt)
            log.warning("in doubt: %s", doubt)

    def _taken_late(self, ours: Sequence[Delivery], receipts: Sequence[Receipt]) -> dict[str, InDoubt]:
        taken = {receipt.token for receipt in receipts}
        dated = [one for one in ours if one.token in taken and one.open_until is not None]
        if not dated:
            return {}
        now = self._ledger.now()
        near = [one for one in dated if self._is_over(one, now)]
        try:
            late = overtaken(self._destination, near, now)
            return {token: InDoubt(f"{NOBODY_CAN_TELL}{doubt}") for token, doubt in late.items()}
        except UsageBillingError as failure:
            return {one.token: InDoubt(f"{failure}; whether it was taken in time is not known") for one in near}

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
        self._count(**{counter: moved})

    def _count(self, **more: int) -> None:
        with self._counting:
            for name, value in more.items():
                setattr(self.done, name, getattr(self.done, name) + value)


def _without(ours: Sequence[Delivery], receipts: Sequence[Receipt]) -> list[Delivery]:
    taken = {receipt.token for receipt in receipts}
    return [delivery for delivery in ours if delivery.token not in taken]


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


def _asking(reason: str) -> str:
    return reason + _ASKS if reason.startswith((PASSES, PASSES_SOON)) else reason
