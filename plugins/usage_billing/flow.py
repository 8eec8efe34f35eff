"""One billing source as an Airflow DAG, the six stages read as a sentence; and the sweep over all of them."""

import re
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import (
    DAG,
    BaseNotifier,
    BaseOperator,
    CronDataIntervalTimetable,
    ExceptionRetryPolicy,
    Param,
    RetryAction,
    RetryRule,
)

from usage_billing.errors import Misconfigured
from usage_billing.installation import billing_source, sources_folder
from usage_billing.operators import (
    AggregateOperator,
    DeliverOperator,
    ExtractOperator,
    PlanOperator,
    ReconcileOperator,
    ValidateOperator,
)
from usage_billing.pools import pool_name
from usage_billing.sources import BillingSource, source_names
from usage_billing.sweep import ListDoubtsOperator, SweepOperator
from usage_billing.verify import VerifySiteOperator

# Years back: Airflow ends a manual run dated before it green, without a task. `bill_from` says what is owed.
_START = datetime(2020, 1, 1, tzinfo=UTC)

_RETRIES = ExceptionRetryPolicy(
    rules=[
        RetryRule(
            exception=["usage_billing.errors.Misconfigured", "usage_billing.errors.Refused"],
            action=RetryAction.FAIL,
            reason="a person acts first; another try would end the same",
        )
    ]
)


def billing_dag(source: str, notifier: BaseNotifier | None = None) -> DAG:
    """Return the DAG ``bill_<source>``, which bills one source for each data interval of its schedule.

    Tasks that call the billing site take its pool, one slot for each request they make at once. A source that says
    ``approval: true`` has one more, which asks a person between plan and deliver. `notifier`, any of Airflow's, is
    called by the task that ends a run red, once, with what `operators.TOLD` names beside the exception.

    Raises:
        Misconfigured: with every fault of the source's files; Airflow shows it as an import error.
    """
    definition = billing_source(source)
    settings, destination = definition.settings, definition.destination
    with DAG(
        dag_id=f"bill_{source}",
        description=settings.description,
        schedule=CronDataIntervalTimetable(settings.schedule, timezone=settings.timezone.key),
        start_date=_START,
        catchup=False,
        # Each run takes up what waits: beside a question, the next one would make the answer too late for ever.
        max_active_runs=1 if settings.approval else 4,
        default_args={
            "retries": 3,
            "retry_delay": timedelta(seconds=30),
            "retry_policy": _RETRIES,
            "on_failure_callback": notifier,
        },
        params={
            name: Param(None, type=["null", "string"], format="date-time", description=text)
            for name, text in _PARAMS.items()
        }
        | {
            name: Param(None, type=["null", "boolean"], description=text)
            for name, text in {"rescan": _RESCAN, "replay": _REPLAY}.items()
        }
        | {"dry_run": Param(default=False, type="boolean", description=_DRY_RUN)},
        tags=["usage billing", destination.name],
        doc_md=f"{settings.description}\n\nBills to `{destination.name}` by connection `{destination.connection}`.",
    ) as dag:
        site = {"pool": pool_name(destination.connection)}
        extract = ExtractOperator(task_id="extract", source=source)
        validate = ValidateOperator(task_id="validate", source=source, reference=extract.output, **site)
        aggregate = AggregateOperator(task_id="aggregate", source=source, reference=validate.output)
        plan = PlanOperator(task_id="plan", source=source, reference=aggregate.output, **site)
        planned = _approved(definition, plan, site) if settings.approval else plan
        deliver = DeliverOperator(
            task_id="deliver", source=source, reference=planned.output, pool_slots=destination.threads, **site
        )
        ReconcileOperator(task_id="reconcile", source=source, reference=deliver.output, **site)
    return dag


def _approved(definition: BillingSource, plan: PlanOperator, site: Mapping[str, Any]) -> BaseOperator:
    """Return the task that asks a person about what `plan` proposes."""
    from usage_billing.asking import ApproveOperator  # noqa: PLC0415 - Most DAGs ask nobody, and each parse would pay.

    settings = definition.settings
    hours = settings.approval_timeout_hours
    return ApproveOperator(
        task_id="approve",
        source=settings.name,
        reference=plan.output,
        timeout=None if hours is None else timedelta(hours=hours),
        approvers=settings.approvers,
        **site,
    )


_PARAMS = {
    "period_start": "Only for a run without a data interval: the first instant to bill, with a zone.",
    "period_end": "Only for a run without a data interval: the instant to stop before, with a zone.",
}
_RESCAN = "Compare the source's last usage periods wholly, whatever arrived: finds rows that vanished without a trace."

_REPLAY = "Compare the usage periods again that have rows in quarantine, once those are mended, or written off by name."
_DRY_RUN = "Only look: the log of plan tells what would be sent, and the run ends there."


def sweep_dag(
    alert_after: timedelta = timedelta(hours=24),
    notifier: BaseNotifier | None = None,
    schedule: str = "*/15 * * * *",
) -> DAG:
    """Return the DAG ``sweep_doubts``, which settles the doubts of every source, and tells of those that grow old.

    Each site has a task in its pool; a source that is added later is found at the next parse. The last task lists what
    is left, and is red when any of it is older than `alert_after` or a site could not be swept: then `notifier`, any of
    Airflow's, is called once for the run, with what `ListDoubtsOperator` gives to its callbacks.

    Raises:
        Misconfigured: there is no folder of sources.
    """
    with DAG(
        dag_id="sweep_doubts",
        description="Settle what is in doubt at every billing site, and tell of what grows old.",
        schedule=schedule,
        start_date=_START,
        catchup=False,
        max_active_runs=1,
        tags=["usage billing"],
        doc_md="What is in doubt and what to do about it: section *In doubt* of the operations guide.",
    ) as dag:
        listing = ListDoubtsOperator(
            task_id="list_doubts", alert_after=alert_after, trigger_rule="all_done", on_failure_callback=notifier
        )
        for connection, names in _by_connection().items():
            sweep = SweepOperator(
                task_id=re.sub(r"[^\w.-]", "_", f"sweep_{connection or 'unreadable'}"),
                sources=names,
                pool=pool_name(connection) if connection else None,
                # Before a long backfill's own tasks: it takes one slot, and not for long.
                priority_weight=10,
            )
            sweep >> listing
    return dag


def verify_dag() -> DAG:
    """Return the DAG ``verify_site``, by which a person tries a source out at a test site before it is billed.

    Raises:
        Misconfigured: there is no folder of sources.
    """
    names = source_names(sources_folder())
    with DAG(
        dag_id="verify_site",
        description="Try a billing source out at a test site.",
        schedule=None,
        start_date=_START,
        catchup=False,
        max_active_runs=1,
        tags=["usage billing"],
        params={
            "source": Param(names[0] if names else "", type="string", enum=names or [""], title="Billing source"),
            "account": Param(
                "", type="string", title="Account", description="One account of the warehouse, of a test."
            ),
            "is_test_site": Param(
                default=False, type="boolean", title="This is a test site", description="One unit is sent there."
            ),
        },
        doc_md="Sends one marked unit to a test subscription, reads it back, and takes it back where that goes.",
    ) as dag:
        VerifySiteOperator(
            task_id="verify",
            source="{{ params.source }}",
            account="{{ params.account }}",
            is_test_site="{{ params.is_test_site }}",
            retries=0,
        )
    return dag


def _by_connection() -> dict[str, list[str]]:
    """Return the names of all sources by their connection, under an empty name those that cannot be read.

    Their own DAGs tell what is wrong with these; the sweep tells if something of theirs is in doubt.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for name in source_names(sources_folder()):
        try:
            found[billing_source(name).destination.connection].append(name)
        except Misconfigured:
            found[""].append(name)
    return dict(sorted(found.items()))
