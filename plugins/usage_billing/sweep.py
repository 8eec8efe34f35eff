"""Two operators that keep doubts from growing old; `flow.sweep_dag` composes them, and each works alone.

`SweepOperator` settles what is in doubt at the billing sites, and sends again what is not there. `ListDoubtsOperator`
asks the ledger alone what is left, so that no site can keep it from telling, and fails when something is too old: a
failed task is what people already watch, and what Airflow's notifiers hang on, as ``on_failure_callback``.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from airflow.sdk import BaseOperator, Context

from usage_billing.deliver import Delivered, Manners, resume
from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, UsageBillingError
from usage_billing.installation import (
    billing_source,
    destination_in,
    editions,
    ledger,
    ledger_name,
    sources_folder,
    staging,
)
from usage_billing.ledger import DECIDABLE_AFTER, Ledger
from usage_billing.ledger.marker import marked
from usage_billing.records import EVER, NOBODY_CAN_TELL, PERSON_DECIDES, Edition, Period, State
from usage_billing.release import reissue
from usage_billing.settle import Swept, sweep
from usage_billing.sources import BillingSource, source_names
from usage_billing.workers import Means

_FAULTS = "faults"
"""Under which key a sweep leaves its faults, an empty list where it had none."""
_NAMED = 20
"""How many doubts a message names; the ledger has them all."""
# The next sweep comes soon: one that waits long for a site would only keep its pool.
_MANNERS = Manners(threads=1, patience=timedelta(minutes=2))


class SweepOperator(BaseOperator):
    """Settle every doubt of `sources` (None: of all), whatever its usage period, and send again what is not there.

    What a person released goes as well: nobody has to wait for a run of its period.

    It makes one request at a time, so one slot of the site's pool is enough. A source of which nothing is open makes no
    request. No source keeps another from being swept: the faults of all are raised at the end.
    """

    def __init__(self, *, sources: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sources = sources
        self._stop = threading.Event()

    def on_kill(self) -> None:
        """End before the next request."""
        self._stop.set()

    def execute(self, context: Context) -> None:
        """Sweep source by source.

        Raises:
            Misconfigured: a source, its connection or its site is not what it has to be; all others were swept.
            NotApplied: a site could not be reached, or throttled for too long; all others were swept.
            Exception: a fault that is none of these, with its traceback; all others were swept, and their faults are
                its notes.
        """
        book = ledger()
        faults: dict[str, Exception] = {}
        for name in _names(self.sources):
            if self._stop.is_set():
                break
            faults |= self._sweep(book, name)
        if "ti" in context:
            context["ti"].xcom_push(key=_FAULTS, value=[f"{name}: {_words(fault)}" for name, fault in faults.items()])
        _raise(faults)

    def _sweep(self, book: Ledger, name: str) -> dict[str, Exception]:
        """Sweep a source edition by edition, each at its own site; return the fault of each that could not be swept."""
        faults: dict[str, Exception] = {}

        def tried(subject: str, work: Callable[[], None]) -> None:
            try:
                work()
            except UsageBillingError as fault:
                self.log.warning("%s was not swept to its end: %s", subject, fault)
                faults[subject] = fault
            except Exception as fault:  # An archive that cannot be read, a bug: of this source alone.
                self.log.exception("%s was not swept to its end", subject)
                faults[subject] = fault

        def whole() -> None:
            if not _is_anything_open(book, ledger_name(name)):
                return
            source = billing_source(name)
            known = editions(source)
            for edition in known:
                if _is_anything_open(book, source.name, edition.span):
                    subject = name if edition is known[-1] else f"{name} until {edition.span.end:%Y-%m-%d %H:%M} UTC"
                    tried(subject, partial(self._sweep_edition, book, source, edition, known[-1]))

        tried(name, whole)
        return faults

    def _sweep_edition(self, book: Ledger, source: BillingSource, edition: Edition, latest: Edition) -> None:
        destination = destination_in(source, edition, latest)
        with marked(book, staging(), source.name):
            swept = sweep(destination, book, self._stop.is_set)
            fault = self._reissue(destination, book) or swept.fault
            sent = resume(destination, book, _MANNERS, Means(stop=self._stop))
        self._tell(source.title, swept, sent)
        if fault is not None:
            raise fault

    def _reissue(self, destination: Destination, book: Ledger) -> UsageBillingError | None:
        """Write down what was released; return what kept some of it waiting, which keeps nothing else from going."""
        try:
            reissue(destination, book)
        except UsageBillingError as fault:
            self.log.warning("what was released of %s waits: %s", destination.source.title, fault)
            return fault
        return None

    def _tell(self, name: str, swept: Swept, sent: Delivered) -> None:
        self.log.info(
            "swept %s: %d found at the site, %d not there, %d sent, %d still in doubt",
            name,
            swept.settled.found,
            swept.settled.absent,
            sent.accepted,
            len(swept.still_open) + sent.doubted,
        )


class ListDoubtsOperator(BaseOperator):
    """Log what is in doubt of `sources` (None: of all), by the ledger alone; fail if any of it is over `alert_after`.

    "All" are those that the ledger knows: what is in doubt of a source whose folder is gone fails at once, since nobody
    sweeps it. Ages are by the ledger's clock. It also fails where a `SweepOperator` right before it did, with the
    faults of all of them, so give it the trigger rule ``all_done``. A callback finds the message as ``exception`` in
    its context, and as ``doubts`` what is too old: a list of `source`, `site`, `subscription`, `period_start`,
    `quantity`, `age`, `why` and `token`, all of them text.
    """

    def __init__(
        self, *, sources: Sequence[str] | None = None, alert_after: timedelta = timedelta(hours=24), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.sources = sources
        self.alert_after = alert_after

    def execute(self, context: Context) -> list[str]:
        """Log the table, and return its lines.

        Raises:
            InDoubt: something is too old, is of a source that is gone, or could not be swept; with the names of all.
        """
        book = ledger()
        known = [ledger_name(name) for name in _names(self.sources)]
        # What a source left behind whose folder is gone: nobody sweeps it, so nobody else would tell.
        gone = sorted(set(book.sources()) - set(known)) if self.sources is None else []
        doubts = [doubt for name in (*known, *gone) for doubt in _doubts(book, name)]
        lines = list(_table(doubts))
        for line in lines or ["nothing is in doubt"]:
            self.log.info(line)
        too_old = sorted((doubt for doubt in doubts if doubt.age > self.alert_after), key=lambda doubt: -doubt.age)
        context["doubts"] = [doubt.as_text() for doubt in too_old]
        orphans = _orphans(doubts, gone)
        told = [*_alert(too_old, self.alert_after), *orphans, *_faults(context, sorted(self.upstream_task_ids))]
        if told:
            raise InDoubt("\n".join(told))
        return lines


@dataclass(frozen=True)
class Doubt:
    """One delivery in doubt, as a person has to see it: `why` says who ends it, `reason` what is known."""

    source: str
    site: str
    subscription: str
    period_start: datetime
    quantity: str
    token: str
    age: timedelta
    why: str
    reason: str

    def as_text(self) -> dict[str, str]:
        """Return it for a callback's template."""
        return {
            "source": self.source,
            "site": self.site,
            "subscription": self.subscription,
            "period_start": self.period_start.isoformat(),
            "quantity": self.quantity,
            "age": _shown(self.age),
            "why": f"{self.why}; {self.reason}" if self.reason else self.why,
            "token": self.token,
        }


_ASKED_AGAIN = "asked again at each sweep"
_MAY_BE_DECIDED = f"{_ASKED_AGAIN}, in vain for so long that a person may decide"
_WAITS_FOR_ITS_RUN = "not at the site; a newer reading or an approval has the say: run its period again"
_PERSON_DECIDES = PERSON_DECIDES.strip(": ")


def _doubts(book: Ledger, name: str) -> Iterator[Doubt]:
    """Yield the doubts of a source; what a dead worker left in the air is one from now on."""
    book.doubt_abandoned(name)
    now = book.now()
    items = book.open_items(name, None)
    left = (items["state"] == State.IN_DOUBT) | ((items["state"] == State.RESERVED) & (items["sends"] > 0))
    for row in items[left].to_dict("records"):
        # From when it was written down: a doubt that ends and comes again grows old all the same.
        age = now - row["reserved_at"]
        why = _PERSON_DECIDES if row["reason"].startswith(PERSON_DECIDES) else _ASKED_AGAIN
        if row["state"] == State.RESERVED:
            why = _WAITS_FOR_ITS_RUN
        elif why == _ASKED_AGAIN and now - row["sent_at"] >= DECIDABLE_AFTER:
            why = _MAY_BE_DECIDED
        texts = {column: row[column] for column in ("site", "subscription", "quantity", "token")}
        reason = row["reason"].removeprefix(NOBODY_CAN_TELL).removeprefix(PERSON_DECIDES)
        yield Doubt(source=name, period_start=row["period_start"], age=age, why=why, reason=reason, **texts)


def _table(doubts: Sequence[Doubt]) -> Iterator[str]:
    """Yield a line for each source and reason, the longest waiting first."""
    groups: dict[tuple[str, str, str], list[Doubt]] = defaultdict(list)
    for doubt in sorted(doubts, key=lambda doubt: -doubt.age):
        groups[doubt.source, doubt.site, doubt.why].append(doubt)
    for (source, site, why), some in groups.items():
        line = f"{source} at {site}: {_count(some)} in doubt, oldest {_shown(some[0].age)}; {why}"
        yield f"{line} ({some[0].reason})" if some[0].reason else line


def _alert(too_old: Sequence[Doubt], alert_after: timedelta) -> Iterator[str]:
    if not too_old:
        return
    yield f"{_count(too_old)} in doubt for more than {_shown(alert_after)}:"
    for doubt in too_old[:_NAMED]:
        yield (
            f"  - {doubt.source} at {doubt.site}, subscription {doubt.subscription}, "
            f"{doubt.period_start:%Y-%m-%d %H:%M} UTC: {doubt.quantity}, for {_shown(doubt.age)}; {doubt.why} "
            f"(token {doubt.token})"
        )
    if len(too_old) > _NAMED:
        yield f"  - and {len(too_old) - _NAMED} more; the ledger lists them all"


def _orphans(doubts: Sequence[Doubt], gone: Sequence[str]) -> Iterator[str]:
    for name in gone:
        if some := [doubt for doubt in doubts if doubt.source == name]:
            yield (
                f"{name} at {some[0].site}: {_count(some)} in doubt, and the source's folder is gone, so nobody asks "
                "about them: put it back until they are settled"
            )


def _faults(context: Context, sweeps: Sequence[str]) -> Iterator[str]:
    """Yield what the sweeps right before could not do; one that was killed left no word at all."""
    for task_id in sweeps:
        said = context["ti"].xcom_pull(task_ids=task_id, key=_FAULTS)
        yield from [f"{task_id} ended before it could say why; see its log or its note"] if said is None else said


def _names(sources: Sequence[str] | None) -> Sequence[str]:
    return source_names(sources_folder()) if sources is None else sources


def _is_anything_open(book: Ledger, name: str, span: Period = EVER) -> bool:
    open_ones = book.in_the_air(name, span) or book.doubts(name, span) or book.resumable(name, limit=1, span=span)
    return bool(open_ones) or not book.released(name, span).empty


def _words(fault: Exception) -> str:
    return str(fault) if isinstance(fault, UsageBillingError) else f"{type(fault).__name__}: {fault}"


def _raise(faults: Mapping[str, Exception]) -> None:
    if len(faults) == 1:
        raise next(iter(faults.values()))
    # What is no error of ours goes up as it is, so that its traceback tells; the others are its notes.
    for odd in (fault for fault in faults.values() if not isinstance(fault, UsageBillingError)):
        for name, fault in faults.items():
            odd.add_note(f"{name} was not swept to its end: {_words(fault)}")
        raise odd
    if faults:
        told = Misconfigured.all_at_once("sweep", (f"{name}: {fault}" for name, fault in faults.items()))
        raise told if any(isinstance(fault, Misconfigured) for fault in faults.values()) else NotApplied(str(told))


def _count(some: Sequence[Doubt]) -> str:
    return "1 delivery" if len(some) == 1 else f"{len(some)} deliveries"


def _shown(span: timedelta) -> str:
    hours, minutes = divmod(int(span.total_seconds()) // 60, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
