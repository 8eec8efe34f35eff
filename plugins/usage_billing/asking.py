"""The operator that asks a person before anything is sent, by Airflow's human-in-the-loop step.

`flow.billing_dag` puts it between plan and deliver where a source says ``approval: true``; it works alone as well.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context, Param
from airflow.sdk.exceptions import AirflowSkipException, TaskAwaitingInput

from usage_billing.approve import told, turn_down
from usage_billing.destinations.base import Destination
from usage_billing.errors import Stale
from usage_billing.guard import owed_by_period, unusual
from usage_billing.installation import ledger, staging
from usage_billing.operators import StageOperator
from usage_billing.preview import digest_of, preview
from usage_billing.records import Comparison, Decision, Plan, Run

_NOBODY = "somebody without a name"


class ApproveOperator(StageOperator, ApprovalOperator):
    """Show a person what the plan would send, and let only that go on to deliver.

    While it waits it takes no worker and no slot of the pool. A plan that sends nothing is not asked about. What is
    approved is planned once more; if that is not what was shown, it is shown again. A no, or no answer in time, ends
    the run green, with deliver skipped: it is written into the ledger, with each delivery held by name, and a later
    plan asks again. An answer that the ledger has already is not asked for a second time.
    """

    template_fields: Sequence[str] = ("reference",)

    def __init__(
        self, *, source: str, timeout: timedelta | None = None, approvers: Sequence[str] = (), **kwargs: Any
    ) -> None:
        note = Param("", type=["null", "string"], description="Why; kept in the ledger")
        # In place of the DAG's params, which Airflow has put here already: beside a question it shows none of them.
        kwargs["params"] = {"note": note}
        super().__init__(
            source=source,
            subject=f"Bill {source}?",
            response_timeout=timeout,
            assigned_users=[{"id": name, "name": name} for name in approvers] or None,
            **kwargs,
        )

    def stage(self, context: Context) -> Run:
        """Plan, and ask unless there is nothing to ask."""
        run, destination = self.handed_over()
        found, compared = self.planned(run, destination)
        return self._go_on_or_ask(run, destination, found, compared, context)

    def execute_complete(self, context: Context, event: dict[str, Any], shown: str = "") -> dict[str, Any]:
        """Take the answer to what `shown`, a digest, stands for; a no skips what comes after."""
        try:
            return self._answered(context, event, shown).to_json()
        except Stale as stale:
            raise AirflowSkipException(str(stale)) from stale

    def _answered(self, context: Context, event: Mapping[str, Any], shown: str) -> Run:
        run, destination = self.handed_over()
        decision, by, note = self._answer(event)
        if decision is not Decision.APPROVED:
            # Written down before anything else can fail: that somebody said no must not be lost.
            decided = ledger().record_decision(run.source, run.reading, shown, decision, by, note)
            listed = turn_down(
                self.planned(run, destination)[0],
                lambda: self.planned(run, destination)[0],
                decided,
                destination,
                ledger(),
                staging(),
            )
            raise AirflowSkipException(
                f"{told(decided)}: nothing is sent; {listed} deliveries are held, and a later plan asks again"
            )
        found, compared = self.planned(run, destination)
        digest, going = digest_of(found.proposals, staging())
        if digest == shown:
            ledger().record_decision(run.source, run.reading, digest, decision, by, note)
        elif going:
            self.log.warning("approved by %s, but since then something moved: this is what would be sent now", by)
        return self._go_on_or_ask(run, destination, found, compared, context)

    def _go_on_or_ask(
        self, run: Run, destination: Destination, found: Plan, compared: Comparison, context: Context
    ) -> Run:
        book, area = ledger(), staging()
        looked = preview(found, compared, destination, book, area)
        decided = book.decision(run.source, run.reading, looked.digest) if looked.going else None
        if looked.going and (decided is None or decided.decision is not Decision.APPROVED):
            strange = unusual(found, compared, owed_by_period(compared, destination, area), destination, book, area)
            for line in [*looked.lines(), *(f"unusual: {line}" for line in strange)]:
                self.log.info(line)
            body = "\n\n".join([*(f"**Unusual:** {line}" for line in strange), looked.markdown()])
            self._ask(looked.digest, body, context)
        self.log.info("%s", told(decided) if decided else "nothing to send, so nobody is asked")
        return run.with_table("proposals", found.proposals)

    def _ask(self, digest: str, body: str, context: Context) -> None:
        """Put the question up, and leave; Airflow calls `execute_complete` with the answer."""
        self.body = body
        try:
            ApprovalOperator.execute(self, context)
        except TaskAwaitingInput as waiting:
            raise TaskAwaitingInput(
                method_name=waiting.method_name, kwargs={"shown": digest}, timeout=waiting.timeout
            ) from None

    def _answer(self, event: Mapping[str, Any]) -> tuple[Decision, str, str]:
        """Return what was answered, by whom, and why."""
        if "error" in event:
            if event["error_type"] != "timeout":
                self.process_trigger_event_error(event)
            return Decision.TIMED_OUT, "", ""
        self.validate_chosen_options(event["chosen_options"])
        user = event.get("responded_by_user") or {}
        note = (event.get("params_input") or {}).get("note") or ""
        yes = event["chosen_options"] == [self.APPROVE]
        return Decision.APPROVED if yes else Decision.REJECTED, user.get("name") or user.get("id") or _NOBODY, str(note)
