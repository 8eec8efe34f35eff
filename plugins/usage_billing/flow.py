"""One billing source as an Airflow DAG: the six stages, read as a sentence."""

from datetime import UTC, datetime, timedelta

from airflow.sdk import DAG, CronDataIntervalTimetable, ExceptionRetryPolicy, Param, RetryAction, RetryRule

from usage_billing.installation import billing_source, pool_name
from usage_billing.operators import (
    AggregateOperator,
    DeliverOperator,
    ExtractOperator,
    PlanOperator,
    ReconcileOperator,
    ValidateOperator,
)

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


def billing_dag(source: str) -> DAG:
    """Return the DAG ``bill_<source>``, which bills one source for each data interval of its schedule.

    Tasks that call the billing site take its pool, one slot for each request they make at once.

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
        max_active_runs=4,
        default_args={"retries": 3, "retry_delay": timedelta(seconds=30), "retry_policy": _RETRIES},
        params={
            name: Param(None, type=["null", "string"], format="date-time", description=text)
            for name, text in _PARAMS.items()
        },
        tags=["usage billing", destination.name],
        doc_md=f"{settings.description}\n\nBills to `{destination.name}` by connection `{destination.connection}`.",
    ) as dag:
        site = {"pool": pool_name(destination.connection)}
        extract = ExtractOperator(task_id="extract", source=source)
        validate = ValidateOperator(task_id="validate", source=source, reference=extract.output, **site)
        aggregate = AggregateOperator(task_id="aggregate", source=source, reference=validate.output)
        plan = PlanOperator(task_id="plan", source=source, reference=aggregate.output)
        deliver = DeliverOperator(
            task_id="deliver", source=source, reference=plan.output, pool_slots=destination.threads, **site
        )
        ReconcileOperator(task_id="reconcile", source=source, reference=deliver.output, **site)
    return dag


_PARAMS = {
    "period_start": "Only for a run without a data interval: the first instant to bill, with a zone.",
    "period_end": "Only for a run without a data interval: the instant to stop before, with a zone.",
}
