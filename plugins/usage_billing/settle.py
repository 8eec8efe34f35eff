"""Settling doubts: what a crash or a lost reply left open is asked at the site, as soon as the site can tell.

A doubt always ends here, in one of four ways: the site has it (accepted), definitely has not (reserved, to be sent
again), has it with another quantity (a person decides), or cannot tell yet (asked again later, and its age is told).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum, auto

from usage_billing.destinations.base import Answer, Destination, shuffled
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused
from usage_billing.ledger import Ledger
from usage_billing.records import (
    ABSENT,
    NOBODY_CAN_TELL,
    PERSON_DECIDES,
    REFUSED_WHOLE,
    Delivery,
    Receipt,
    State,
    Window,
)

log = logging.getLogger(__name__)

_MOST_DOUBLINGS, _LONGEST_PAUSE = 6, 60.0
_MOST_IN_A_ROW = 2
"""How many questions in a row a site may turn down as a whole: then it wants nothing at all now, whatever is asked."""
_NEVER: Callable[[], bool] = bool
"""Nobody asks it to stop: a `bool` of nothing is False."""


class _Went(Enum):
    """How a question went: it was answered or simply failed, was refused as a whole, or wants to be asked later."""

    ON = auto()
    IN_VAIN = auto()
    WAITS = auto()


@dataclass
class Settled:
    """How many doubts were found at the site, how many of those counted in part only, and how many were not there."""

    found: int = 0
    in_part: int = 0
    absent: int = 0

    @property
    def ended(self) -> int:
        """How many ended either way."""
        return self.found + self.absent


class Doubts:
    """The doubts of one source, in one window of usage periods or in all of them."""

    def __init__(
        self,
        destination: Destination,
        ledger: Ledger,
        window: Window | None = None,
        stopped: Callable[[], bool] = _NEVER,
    ) -> None:
        """Take the site and the ledger; once `stopped` says so, no further question is asked."""
        self.settled = Settled()
        self.fault: Misconfigured | None = None
        """What a person has to mend first: the site turned down the question about some of them."""
        self._stopped = stopped
        self._destination = destination
        self._ledger = ledger
        self._source = destination.source.name
        self._window = window
        self._left_to_people: set[str] = set()
        self._asked_in_vain = 0
        self._not_before = ledger.now()

    def open(self) -> list[Delivery]:
        """Return what is in doubt, the longest waiting first, without what a person has to decide.

        What the site may still come to show is asked about once more by the next run or sweep, all the same.
        What a dead worker left in the air is in doubt from now on.
        """
        self._ledger.doubt_abandoned(self._source)
        doubts = self._ledger.doubts(self._source, self._window)
        open_ones = (doubt for doubt in doubts if not doubt.reason.startswith(NOBODY_CAN_TELL))
        return [doubt for doubt in open_ones if doubt.token not in self._left_to_people]

    def ask(self, doubts: Sequence[Delivery]) -> int:
        """Ask the site about those that are old enough for its answer to hold; return how many ended.

        Raises:
            Misconfigured: the site turned the credentials or the question down.
        """
        ask_after, now = self._destination.ask_after, self._ledger.now()
        due = [doubt for doubt in doubts if doubt.sent_at is not None and now - doubt.sent_at >= ask_after]
        before = self.settled.ended
        chunks = list(_chunks(due if now >= self._not_before else [], self._destination.chunk_size))
        in_vain = 0
        while chunks and in_vain < _MOST_IN_A_ROW and not self._stopped():
            went = self._ask(chunks.pop(0))
            in_vain = in_vain + 1 if went is _Went.IN_VAIN else 0
            if went is _Went.WAITS:
                break
            if in_vain:
                # What is refused each time must not stand before the same others each time.
                chunks.sort(key=lambda chunk: shuffled(chunk[0].token, now))
        ended = self.settled.ended - before
        self._asked_in_vain = 0 if ended else self._asked_in_vain + bool(due)
        return ended

    def seconds_until_due(self, doubts: Sequence[Delivery]) -> float:
        """Return how long to wait before asking is worth it again."""
        now, ask_after = self._ledger.now(), self._destination.ask_after
        if now < self._not_before:
            return (self._not_before - now).total_seconds()
        waits = [(doubt.sent_at + ask_after - now).total_seconds() for doubt in doubts if doubt.sent_at]
        pending = [wait for wait in waits if wait > 0]
        # Nothing newly due: a worker elsewhere is sending, or the site could not tell yet. Look again in a while, and
        # not so soon when it could not tell for long.
        again = min(2.0 * 2 ** min(self._asked_in_vain, _MOST_DOUBLINGS), _LONGEST_PAUSE)
        return float(min([again, *pending]))

    def _ask(self, doubts: Sequence[Delivery]) -> _Went:
        """Ask about one chunk."""
        now = self._ledger.now()
        answers: dict[str, Answer] = {}
        failure: NotApplied | InDoubt | None = None
        try:
            answers |= self._destination.settle(doubts, now)
        except NotApplied as error:
            failure = error
        except InDoubt as error:
            answers, failure = error.answers, error
        late = self._found_late(doubts, answers, now)
        try:
            answers |= overtaken(self._destination, late, now)
        except (NotApplied, InDoubt) as error:
            failure = failure or error
            for doubt in late:
                del answers[doubt.token]
        for doubt in doubts:
            if doubt.token in answers:
                self._end(doubt, answers[doubt.token])
        return _Went.ON if failure is None else self._left_open(doubts, answers, failure)

    def _left_open(
        self, doubts: Sequence[Delivery], answers: Mapping[str, Answer], failure: NotApplied | InDoubt
    ) -> _Went:
        """Note why some doubts have no answer."""
        if isinstance(failure, InDoubt) and failure.unaskable:
            self.fault = self.fault or Misconfigured(str(failure))
            self._left_to_people.update(doubt.token for doubt in doubts if doubt.token not in answers)
        log.warning("%d doubts stay open: %s", len(doubts) - len(answers), failure)
        if failure.retry_after_seconds:
            self._not_before = self._ledger.now() + timedelta(seconds=failure.retry_after_seconds)
        if failure.throttled or failure.retry_after_seconds:
            return _Went.WAITS
        return _Went.IN_VAIN if isinstance(failure, InDoubt) and failure.refused else _Went.ON

    def _found_late(self, doubts: Sequence[Delivery], answers: Mapping[str, Answer], now: datetime) -> list[Delivery]:
        """Return what the site has, and may have taken after its billing period: by a replay now, or by the request."""
        replays = self._destination.replay_window > timedelta(0)
        margin = self._destination.settle_after
        found = (doubt for doubt in doubts if isinstance(answers.get(doubt.token), Receipt))
        return [doubt for doubt in found if doubt.may_land_late(now if replays else doubt.sent_at or now, margin)]

    def _end(self, doubt: Delivery, answer: Answer) -> None:
        if isinstance(answer, Refused | InDoubt):
            # The site has it with another quantity, or will never tell. As a refusal its next revision would bill the
            # whole once more, so it stays in doubt, which blocks its key, until a person decides.
            self._left_to_people.add(doubt.token)
            why = NOBODY_CAN_TELL if isinstance(answer, InDoubt) else PERSON_DECIDES
            self._ledger.settle_doubt(doubt, State.IN_DOUBT, reason=f"{why}{answer}")
            log.warning("in doubt until a person decides: %s", answer)
        elif answer is None:
            refused = f"; {doubt.reason}" if doubt.reason.startswith(REFUSED_WHOLE) else ""
            self.settled.absent += self._written(doubt, State.RESERVED, reason=f"{ABSENT}{refused}")
        else:
            found = self._written(doubt, State.ACCEPTED, answer)
            self.settled.found += found
            self.settled.in_part += found and answer.applied is not None

    def _written(self, doubt: Delivery, state: State, receipt: Receipt | None = None, reason: str = "") -> bool:
        """Write an answer down; False if somebody else settled this doubt meanwhile."""
        ended = self._ledger.settle_doubt(doubt, state, receipt, reason)
        if ended:
            log.info("doubt settled: %s is %s %s", doubt.token, state, receipt.note if receipt else reason)
        return ended


def overtaken(destination: Destination, deliveries: Sequence[Delivery], now: datetime) -> dict[str, InDoubt]:
    """Return, by token, the doubt about what was taken near the end of its billing period, if that has ended by now.

    Whether it is billed, no later question will tell; a person looks at the invoice.

    Raises:
        Misconfigured, NotApplied: the site could not be asked.
    """
    if not deliveries:
        return {}
    reasons = destination.overtaken(deliveries, now)
    words = "it was taken while its billing period ended, so it may never be billed: look at the invoice"
    return {token: InDoubt(f"{words} ({why})") for token, why in reasons.items()}


@dataclass(frozen=True)
class Swept:
    """What a sweep of one source found: doubts that ended, and those still open with the age of the oldest.

    `fault` is what a person has to mend before the site answers about some of these.
    """

    settled: Settled
    still_open: tuple[Delivery, ...]
    oldest: timedelta
    fault: Misconfigured | None = None


def sweep(destination: Destination, ledger: Ledger, stopped: Callable[[], bool] = _NEVER) -> Swept:
    """Settle every doubt of one edition of a source that can be settled now, of any usage period; wait for none.

    It ends before the next question once `stopped` says so.

    Raises:
        Misconfigured: the site turned the credentials or the question down.
    """
    doubts = Doubts(destination, ledger, destination.source.span, stopped)
    doubts.ask(doubts.open())
    left = ledger.doubts(destination.source.name, destination.source.span)
    now = ledger.now()
    ages = [now - doubt.sent_at for doubt in left if doubt.sent_at is not None]
    return Swept(doubts.settled, tuple(left), max(ages, default=timedelta(0)), doubts.fault)


def _chunks(deliveries: Sequence[Delivery], size: int) -> Iterator[Sequence[Delivery]]:
    return (deliveries[start : start + size] for start in range(0, len(deliveries), size))
