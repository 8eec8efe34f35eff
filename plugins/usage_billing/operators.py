"""Six operators, one for each stage: context in, one stage called, a reference out.

Each works alone in anybody's DAG; `flow.billing_dag` composes them. Nothing happens at parse time beyond assignment.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from airflow.sdk import BaseHook, BaseOperator, Context
from airflow.sdk.exceptions import AirflowSkipException

from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Misconfigured, NeedsDecision, Refused, Stale
from usage_billing.installation import billing_source, destination_in, edition_of, editions, ledger, staging
from usage_billing.ledger import Ledger
from usage_billing.ledger.marker import marked
from usage_billing.links import TaskTry, ValidationResultLink
from usage_billing.quantities import to_decimal
from usage_billing.reach import Kind, Reach
from usage_billing.records import Comparison, Period, Plan, Reading, Run, Staged, State, Tally, joined
from usage_billing.sources import BillingSource

TOLD: Mapping[str, Any] = MappingProxyType({"quarantined": {}, "refused": [], "differences": []})
"""What a notifier's templates know of a failed task beside Airflow's own words, empty where it is about something else:
``quarantined`` counts rows by reason, where validation stopped the run; ``refused`` lists deliveries with token,
account, subscription, period_start, quantity and reason; ``differences`` are lines of the tie-out."""


class StageOperator(BaseOperator):
    """The rim around one stage: finds the source, and what the stage before handed over as `reference`."""

    template_fields: Sequence[str] = ("reference",)

    def __init__(self, *, source: str, reference: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.reference = reference

    def execute(self, context: Context) -> dict[str, Any] | None:
        """Run the stage; a stale plan skips, because a newer extraction has the say."""
        # All of them, always: a strict template that meets an unknown word would end the message.
        context.update(deepcopy(dict(TOLD)))
        try:
            run = self.stage(context)
        except Stale as stale:
            raise AirflowSkipException(str(stale)) from stale
        return run.to_json()

    def stage(self, context: Context) -> Run:
        """Do the stage's work and return what the next stage needs."""
        raise NotImplementedError

    def handed_over(self) -> tuple[Run, Destination]:
        """Return what the stage before handed over, and the destination of its source.

        Raises:
            Misconfigured: it handed over nothing, or another source's run.
        """
        if not isinstance(self.reference, Mapping):
            raise Misconfigured(
                f"{type(self).__name__} needs reference=<the task before>.output; it got {self.reference!r}"
            )
        run, source = Run.from_json(self.reference), billing_source(self.source)
        if run.source != source.name:
            raise Misconfigured(f"{type(self).__name__} of source {source.name!r} was handed a run of {run.source!r}")
        # In each task: a setting or a connection that was changed since the last one would bill under other names.
        return run, _destination_of(run, source)

    @staticmethod
    def planned(run: Run, destination: Destination) -> tuple[Plan, Comparison]:
        """Return what a run would send now, its totals against the ledger as that is by now; and what it compared.

        Raises:
            Stale: a later reading has the say.
        """
        return _plan(run, destination), _comparison(run, destination.source)


class ExtractOperator(StageOperator):
    """Read the usage rows of the run's whole usage periods from the warehouse, in one snapshot, into staging.

    Skips when nothing was used, or no usage period ends inside the data interval. A run without a data interval takes
    the params ``period_start`` and ``period_end``. The param ``rescan`` compares the source's last usage periods
    instead, the param ``replay`` those with rows in quarantine or a refusal that was released; both need no interval.
    """

    replays = False

    def stage(self, context: Context) -> Run:
        """Open a numbered snapshot, stage its rows, and say how many they are."""
        from usage_billing.arrivals import read  # noqa: PLC0415 - pandas and pyarrow, not at every parse.

        reach = Reach.of(context, billing_source(self.source), replays=self.replays)
        source, interval, own = reach.source, reach.interval, reach.periods(self.log)
        if not own and reach.kind is Kind.REPLAY:
            raise AirflowSkipException(f"no usage period that waits for a replay has ended by {interval.end}")
        if not own and source.settings.incremental == "interval":
            raise AirflowSkipException(
                f"no whole {source.settings.period} of {source.settings.timezone.key} on or after "
                f"{source.settings.bill_from} ends inside the data interval {interval}: nothing is owed"
            )
        book = ledger()
        taken = read(source, interval, own, BaseHook.get_hook(source.settings.warehouse), book, staging())
        if taken.events is None:
            raise AirflowSkipException(
                f"{taken.arrived} rows of {source.name} arrived, and none for a usage period that has ended by "
                f"{interval.end}: a later run takes up what they touch"
            )
        number, periods = taken.number, taken.periods
        if not taken.events.rows:
            dry = _is_dry(context)
            if not taken.deleted:
                _judge_nothing_read(source, taken, book)
            if not dry:
                # What an older extraction reserved is not owed now, and what it set aside is gone.
                book.begin_comparison(source.name, Reading(number), periods, source.edition)
                book.list_quarantine(source.name, Reading(number), periods)
            # Rows that are there, marked as deleted, say themselves what is gone.
            if not taken.deleted:
                _skip_or_ask(book, source, Reading(number), periods, dry=dry)
        tables, spans = {"events": taken.events}, joined(periods)
        if taken.before is not None:
            tables["before"] = taken.before
        return Run(source.name, number, interval, taken.folder, tables, spans=spans, edition=source.edition)


class ReplayOperator(ExtractOperator):
    """Read the usage periods again that have rows in quarantine, once the mapping, the suite or the source is mended.

    Those of what a site refused and a person released, too. Stands where `ExtractOperator` stands, and does what the
    param ``replay`` does there. What is sound by now is billed by the plan's signed difference: once, in its own usage
    period or as ``late_usage`` says. Skips where nothing waits.
    """

    replays = True


class ValidateOperator(StageOperator):
    """Part sound rows from rows that may not be billed, each with every reason; look each account up at the site."""

    operator_extra_links = (ValidationResultLink(),)
    page = ""
    """Where this try's validation result is shown, once it is written."""

    def stage(self, context: Context) -> Run:
        """Check the destination, validate all rows, and log the quarantine by reason; take down where accounts lead."""
        from usage_billing.data_docs import ValidationResult  # noqa: PLC0415
        from usage_billing.moves import placed  # noqa: PLC0415
        from usage_billing.quarantine import WrittenOff  # noqa: PLC0415
        from usage_billing.validate import ValidationStopped, validate  # noqa: PLC0415

        run, destination = self.handed_over()
        source = destination.source
        began = ledger().now()
        destination.check()
        periods, result = _compared(run, source), ValidationResult()
        try:
            decided, book = WrittenOff.of(source, ledger()), ledger()
            events, before = run.tables["events"], run.tables.get("before")
            resolve = destination.resolve_accounts
            found = validate(events, source, periods, resolve, staging(), run.folder, book, decided, before, result)
        except ValidationStopped as stopped:
            self._tell(run, stopped.validated, began)
            context["quarantined"] = dict(stopped.validated.reasons)
            raise
        except (NeedsDecision, Misconfigured) as stopped:
            result.stops = str(stopped).splitlines()
            raise
        finally:
            self._show(context, result, source, began)
        area, dry = staging(), _is_dry(context)
        moves = placed(found.targets, source, began, ledger(), area, run.folder, look_only=dry)
        reading = self._tell(run, replace(found, moves=moves), began)
        run = run.with_table("accepted", found.accepted).with_table("targets", found.targets).with_table("moves", moves)
        run, aside = run.with_table("measured", found.measured), found.quarantined
        return run.with_table("quarantined", aside, rows_quarantined=aside.rows, validation=reading.validation)

    def _show(self, context: Context, result: Any, source: BillingSource, began: datetime) -> None:
        """Write what was found as a page for this try of the task, if it got as far as the suite."""
        task = context.get("ti")
        if task is None or not result.own:
            return
        this = TaskTry(task.dag_id, task.run_id, task.task_id, task.map_index, task.try_number)
        try:
            page = result.page(source.title, f"{this.run_id}, try {this.try_number}", began)
            staging().keep(this.document, page.encode())
        except Exception:
            # Nothing is billed by it; and where the run stops, it has to stop for its own reason.
            self.log.exception("the page with the validation result could not be written")
        else:
            self.page = this.address

    def _tell(self, run: Run, found: Any, began: datetime) -> Reading:
        aside = found.quarantined
        reading = ledger().record_validation(run.number, found.digest, aside.rows, found.reasons, aside.manifest, began)
        self.log.info("accepted %d rows, quarantined %d", found.accepted.rows, found.quarantined.rows)
        for reason, rows in found.reasons.items():
            self.log.warning(
                "quarantined %d rows: %s (for example %s)", rows, reason, ", ".join(found.examples[reason])
            )
        self._tell_whom(found.quarantined)
        return reading

    def _tell_whom(self, aside: Staged) -> None:
        """Log which accounts have rows in quarantine, and how much usage."""
        from usage_billing.quarantine import concerned  # noqa: PLC0415

        shown, accounts = 20, concerned(aside, staging())
        for one in accounts.head(shown).itertuples():
            self.log.warning(
                "account %r: %d rows, together %s: %s", one.account, one.rows, f"{one.usage:f}", one.reason
            )
        if len(accounts) > shown:
            self.log.warning(
                "and %d more; `usage-billing quarantine list %s` tells them all", len(accounts) - shown, self.source
            )


class AggregateOperator(StageOperator):
    """Turn accepted rows into exact usage totals, one per subscription, component, dimensions and usage period."""

    def stage(self, context: Context) -> Run:  # noqa: ARG002
        """Group by identity and stage the totals, sorted."""
        from usage_billing.aggregate import aggregate  # noqa: PLC0415

        run, destination = self.handed_over()
        source, site = destination.source, destination.site
        periods, tables = _compared(run, source), run.tables
        accepted, targets, moves = tables["accepted"], tables["targets"], tables.get("moves")
        totals = aggregate(accepted, targets, source, site, periods, staging(), run.folder, moves)
        self.log.info("%d rows make %d usage totals", accepted.rows, totals.rows)
        return run.with_table("totals", totals)


class PlanOperator(StageOperator):
    """Compare what is owed with what the ledger holds, and say what would be sent; sends and reserves nothing."""

    def stage(self, context: Context) -> Run:
        """List what is in quarantine, stage the proposals, log the tally; a dry run logs the preview, and ends there.

        Raises:
            NeedsDecision: the plan is unusual, and nobody is asked about it before it is delivered.
        """
        from usage_billing.guard import owed_by_period, unusual  # noqa: PLC0415
        from usage_billing.quarantine import write_down  # noqa: PLC0415

        run, destination = self.handed_over()
        if _is_dry(context):
            _log_preview(self.log, run, destination)
            raise AirflowSkipException("a dry run ends here: nothing was sent, and nothing is planned")
        # First: the plan may stop and ask, and what is set aside is known already.
        write_down(_comparison(run, destination.source), destination.source, ledger(), staging())
        found, compared = self.planned(run, destination)
        _log_tally(self.log, found.tally, destination)
        owed = owed_by_period(compared, destination, staging())
        _stop_or_warn(self.log, unusual(found, compared, owed, destination, ledger(), staging()), destination)
        return run.with_table("proposals", found.proposals)


class DeliverOperator(StageOperator):
    """Reserve, send and settle the plan's proposals; a retry goes on with what is unsettled, and with nothing else."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._stop = threading.Event()

    def on_kill(self) -> None:
        """End before the next request: Airflow lets the body run on for seconds after a person pressed Clear."""
        self._stop.set()

    def stage(self, context: Context) -> Run:  # noqa: ARG002
        """Deliver, then list whatever could not be settled.

        Raises:
            InDoubt: deliveries are still in doubt after the wait; the retry asks again.
            NeedsDecision: the source wants an approval, and the ledger has none for what would be sent.
        """
        from usage_billing import arrivals  # noqa: PLC0415
        from usage_billing.approve import Approved  # noqa: PLC0415
        from usage_billing.deliver import Manners, deliver  # noqa: PLC0415
        from usage_billing.guard import owed_by_period  # noqa: PLC0415
        from usage_billing.trailing import remember  # noqa: PLC0415
        from usage_billing.workers import Means  # noqa: PLC0415

        run, destination = self.handed_over()
        source, book = destination.source, ledger()
        periods = _compared(run, source)
        # The tally of the plan did not travel, so it is taken to be blocked: one comparison more tells.
        first = Plan(proposals=run.tables["proposals"], tally=Tally(blocked=1))
        within: Callable[[Plan], Plan] = _as_it_is
        if source.settings.approval:
            approved = Approved(source.name, run.reading, first.proposals, book, staging())
            approved.check()
            within = approved.within
        # Only what was neither stopped nor turned down tells later plans what is usual.
        owed = owed_by_period(_comparison(run, source), destination, staging())
        book.record_owed(run.source, run.reading, owed)
        # A run that was under way when this package was upgraded has none.
        if measured := run.tables.get("measured"):
            remember(run.source, run.reading, measured, staging(), run.folder, book)
        manners = Manners(threads=min(source.destination.threads, destination.client.settings.concurrency))
        with marked(book, staging(), source.name, run.number):
            done = deliver(
                first,
                lambda: within(_plan(run, destination)),
                run.reading,
                periods,
                destination,
                book,
                staging(),
                manners,
                Means(stop=self._stop),
            )
        self.log.info(
            "delivered: %d accepted, %d accepted after asking, %d refused; %d requests in %.1f s",
            done.accepted,
            done.settled,
            done.refused,
            done.requests,
            done.seconds,
        )
        left = book.open_items(source.name, periods)
        _log_open_items(self.log, left)
        outdated = [period.start for period in book.outdated(source.name, run.reading, periods)]
        unsettled = left[left["state"].isin([State.RESERVED, State.SENDING, State.IN_DOUBT])]
        unsettled = unsettled[~unsettled["period_start"].isin(outdated)]  # A newer extraction has the say there.
        if source.settings.incremental == "arrival" and len(outdated) < len(periods):
            arrivals.done(source, run.reading, periods, _plan(run, destination).tally, book)
        if not unsettled.empty:
            raise InDoubt(f"{len(unsettled)} deliveries are not settled yet; the next try goes on with them")
        return run


class ReconcileOperator(StageOperator):
    """Tie the ledger out against the billing site with zero tolerance; red if anything was refused or differs."""

    def stage(self, context: Context) -> Run:
        """Log the closing table.

        Raises:
            Refused: deliveries of these periods were refused by the site, or the tie-out found a difference.
        """
        from usage_billing.reconcile import reconcile  # noqa: PLC0415

        run, destination = self.handed_over()
        source, book = destination.source, ledger()
        periods = _compared(run, source)
        # The same comparison as before the delivery: by now every key must be settled, or listed with its state.
        unsettled = _plan(run, destination).tally.unsettled
        found = reconcile(destination, book, periods)
        left = book.open_items(source.name, periods)
        states = left["state"].value_counts()
        refused = states.get(State.REFUSED, 0)
        lines = {
            "rows read": run.tables["events"].rows,
            "rows quarantined": run.rows_quarantined,
            "rows in totals": run.tables["accepted"].rows,
            "usage totals": run.tables["totals"].rows,
            "accepted here": found.ours,
            "counted there": found.theirs,
            "matched": found.matched,
            "missing there": found.missing,
            "different": found.different,
            "unknown here": found.unknown,
            "on replaced lines": found.moved,
            "held": states.get(State.HELD, 0),
            "refused": refused,
            "owed and unlisted": unsettled,
        }
        self.log.info("closing table of %s, %s", source.title, Period.around(periods))
        for label, value in lines.items():
            self.log.info("  %-17s %20s", label, value)
        if found.note:
            self.log.warning("not tied out: %s", found.note)
        for warning in found.warnings:
            self.log.warning("to look at: %s", warning)
        for example in found.examples:
            self.log.warning("difference: %s", example)
        if not found.ties_out or unsettled or refused:
            names = ["token", "account", "subscription", "period_start", "quantity", "reason"]
            dead = left.loc[left["state"] == State.REFUSED, names]
            context["refused"] = dead.astype(str).to_dict("records")
            context["differences"] = list(found.examples)
            raise Refused(
                f"{found.missing} missing there, {found.different} different, {refused} refused, "
                f"{unsettled} owed and unlisted: see above; nothing was lost, the ledger has each by its token"
            )
        return run


def _compared(run: Run, source: BillingSource) -> tuple[Period, ...]:
    """Return the usage periods that the run has read whole; nothing may be said of any other."""
    # A run that was under way when this package was upgraded does not name them.
    return source.periods_of(run.spans) if run.spans else source.periods(run.interval)


def _comparison(run: Run, source: BillingSource) -> Comparison:
    periods = _compared(run, source)
    tables = run.tables
    accepted = tables["accepted"]
    totals, targets = tables["totals"], tables["targets"]
    # A run that was under way when this package was upgraded lacks some of these.
    others = tables.get("moves"), tables.get("quarantined")
    return Comparison(run.reading, periods, totals, targets, accepted.rows, run.rows_quarantined, accepted, *others)


def _destination_of(run: Run, source: BillingSource) -> Destination:
    """Return the destination of the edition of a source by which a run was read, once the ledger has found it there.

    Raises:
        Misconfigured: it was replaced meanwhile, or cannot be billed any more.
    """
    known = editions(source)
    span = Period.around(run.spans) if run.spans else run.interval
    edition = edition_of(source, known, span)
    # A run that was under way when this package was upgraded names none: there was but the first.
    if (run.edition or known[0].number) != edition.number:
        raise Misconfigured(
            f"billing source {source.name!r}: its definition for {span} was changed since the rows were read, and "
            "nothing more is sent: clear the run from extract on"
        )
    return destination_in(source, edition, known[-1])


def _plan(run: Run, destination: Destination) -> Plan:
    from usage_billing.chunks import plan_events  # noqa: PLC0415
    from usage_billing.plan import plan  # noqa: PLC0415

    how = plan_events if destination.stream else plan
    return how(_comparison(run, destination.source), destination, ledger(), staging(), run.folder)


def _is_dry(context: Context) -> bool:
    """Say whether the run is one that only looks."""
    return bool((context.get("params") or {}).get("dry_run"))


def _log_preview(log: Any, run: Run, destination: Destination) -> None:
    """Log what a run would send, planned as `usage-billing preview` does: nothing is declared in the ledger."""
    from usage_billing.chunks import plan_events  # noqa: PLC0415
    from usage_billing.guard import owed_by_period, unusual  # noqa: PLC0415
    from usage_billing.plan import plan  # noqa: PLC0415
    from usage_billing.preview import preview  # noqa: PLC0415

    looked = replace(_comparison(run, destination.source), reading=Reading(0))
    with TemporaryDirectory(prefix="usage-billing-") as folder:
        if destination.stream:
            destination.archive = destination.kept().aside(Path(folder))
        how = plan_events if destination.stream else plan
        found = how(looked, destination, ledger(), staging(), run.folder)
        for line in preview(found, looked, destination, ledger(), staging()).lines():
            log.info(line)
        owed = owed_by_period(looked, destination, staging())
        for line in unusual(found, looked, owed, destination, ledger(), staging()):
            log.warning("unusual: %s", line)


def _as_it_is(plan: Plan) -> Plan:
    return plan


def _judge_nothing_read(source: BillingSource, taken: Any, book: Ledger) -> None:
    """Judge an interval without rows by the source's suite, before it counts as one without usage.

    Raises:
        NeedsDecision: the suite expects rows.
    """
    from usage_billing.suite import judges_nothing_read  # noqa: PLC0415
    from usage_billing.validate import check_nothing_read  # noqa: PLC0415

    if judges_nothing_read(source):
        check_nothing_read(taken.events, source, taken.periods, staging(), taken.folder, book)


def _skip_or_ask(
    book: Ledger, source: BillingSource, reading: Reading, periods: Sequence[Period], *, dry: bool
) -> None:
    """Decide about an interval without rows: nothing to bill, something to take back, or a question for a person.

    A look goes on where anything was billed, and shows what would become of it; so does a run whose source may
    withdraw all of it.
    """
    window = Period.around(periods)
    if book.has(source.name, periods, State.ACCEPTED, State.SENDING, State.IN_DOUBT):
        if dry or source.settings.max_withdraw_share >= 1:
            return
        raise NeedsDecision(
            f"the warehouse has no rows of {source.name} for {window}, but the ledger has billed some "
            f"({_billed(book, source, periods)}), and nothing was withdrawn: if they are really gone, say "
            "max_withdraw_share: 1.0 in source.yaml for this run and clear extract; its plan then withdraws what was "
            "billed, or lists by name what cannot be taken back"
        )
    if dry:
        raise AirflowSkipException(f"a dry run ends here: no usage of {source.name} in {window}")
    if not book.has(source.name, periods, State.RESERVED, State.HELD, State.REFUSED):
        book.take_off(source.name, reading, periods)
        raise AirflowSkipException(f"no usage of {source.name} in {window}: nothing to bill")


def _billed(book: Ledger, source: BillingSource, periods: Sequence[Period]) -> str:
    """Return in words what was accepted for some usage periods."""
    accepted = book.accepted(source.name, periods)
    counted = accepted["applied"].where(accepted["applied"] != "", accepted["quantity"])
    what = "events" if accepted["subscription"].eq("").any() else "in all"
    count = "1 delivery" if len(accepted) == 1 else f"{len(accepted)} deliveries"
    return f"{count}, {sum(map(Decimal, counted), Decimal(0)):f} {what}"


def _stop_or_warn(log: Any, unusual: Sequence[str], destination: Destination) -> None:
    """Stop a plan that is unusual; where a person is asked about it before it is delivered, only say so."""
    if unusual and not destination.source.settings.approval:
        raise NeedsDecision.all_at_once(
            f"this plan of {destination.source.title!r} is unusual, and nothing of it was sent; look at what it would "
            "send with `usage-billing preview`; if it is right, raise the key in source.yaml and clear the plan",
            unusual,
        )
    for line in unusual:
        log.warning("unusual: %s", line)


def _log_tally(log: Any, tally: Tally, destination: Destination) -> None:
    meter = destination.source.settings.meter
    if destination.stream:
        log.info("%d events accepted, %d of them sent before", tally.events, tally.unchanged)
    if not destination.stream or meter.function in {"sum", "count"}:
        owed, settled = (to_decimal(scaled, meter.decimals) for scaled in (tally.owed, tally.settled))
        log.info("owed %s, settled before %s", owed, settled)
    log.info(
        "to send: %d new, %d corrections; unchanged %d, held %d, refused here %d, waiting %d, withdrawn %d, "
        "blocked by a doubt %d",
        tally.new,
        tally.corrections,
        tally.unchanged,
        tally.held,
        tally.refused,
        tally.waiting,
        tally.withdrawn,
        tally.blocked,
    )


def _log_open_items(log: Any, left: Any) -> None:
    shown = 20
    for row in left.head(shown).itertuples():
        log.warning(
            "%s: %s of %s, subscription %s: %s", row.state, row.quantity, row.period_start, row.subscription, row.reason
        )
    if len(left) > shown:
        log.warning("and %d more; the ledger lists them all", len(left) - shown)
