"""The operator that tries a source out at a test site; `flow.verify_dag` has it in a DAG that a person triggers."""

import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from airflow.sdk import BaseOperator, Context

from usage_billing.errors import Misconfigured
from usage_billing.installation import billing_source, destination_of

log = logging.getLogger(__name__)


class VerifySiteOperator(BaseOperator):
    """Try out whether `source` can be billed: its connection, what it names at the site, and one unit of usage.

    The unit goes to the subscription of `account`, an account of the warehouse, marked by its token; it is read back,
    and taken back where the site takes negative usage. A person says with `is_test_site` that the site is for tests: a
    Maxio site that says otherwise gets nothing.
    """

    template_fields: Sequence[str] = ("source", "account", "is_test_site")

    def __init__(self, *, source: str, account: str, is_test_site: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.account = account
        self.is_test_site = is_test_site

    def execute(self, context: Context) -> list[dict[str, Any]]:  # noqa: ARG002 - what it needs are fields.
        """Log each step with its outcome, and return them.

        Raises:
            Misconfigured: the site is for no tests, or a step failed.
        """
        from usage_billing.trial import told, try_out  # noqa: PLC0415 - pandas, not at every parse.

        if str(self.is_test_site) != "True":
            raise Misconfigured("is_test_site: nobody says that this site is for tests, and usage would be sent there")
        steps = try_out(destination_of(billing_source(self.source)), self.account, datetime.now(UTC))
        log.info("trial of source %s:\n%s", self.source, told(steps))
        if failed := [f"{step.name}: {step.told}" for step in steps if step.ok is False]:
            raise Misconfigured.all_at_once(f"trial of source {self.source!r}", failed)
        return [{"name": step.name, "ok": step.ok, "told": step.told} for step in steps]
