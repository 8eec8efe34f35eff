"""A mapping of the user's own: what the billing site calls the customer whose usage an account of the warehouse is.

Without one the account itself is looked up at the site. With ``accounts.sql`` the warehouse says it: one row for each
account, with the name that would stand in its place. It is asked once for each task, so that what changed there is
seen by the next run, as a move if usage was billed before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from usage_billing.errors import Misconfigured
from usage_billing.extract import Hook, as_text, open_query, plain
from usage_billing.sources import BillingSource

_COLUMNS = ("account", "target")
_TOLD = 3


@dataclass
class Accounts:
    """The mapping of one source, read from its warehouse when it is first asked."""

    source: BillingSource
    warehouse: Callable[[], Hook]

    def leading(self, accounts: Sequence[str]) -> Mapping[str, tuple[str, str]]:
        """Return, by account, the name at the site, and why there is none: one of the two is empty.

        Raises:
            Misconfigured: ``accounts.sql`` does not return what it has to.
        """
        return {account: self._one(account) for account in accounts}

    def _one(self, account: str) -> tuple[str, str]:
        targets = sorted(self._known.get(account, ()))
        if not targets:
            return "", f"account {account!r} is not in accounts.sql"
        if targets == [""]:
            return "", f"account {account!r} has no target in accounts.sql"
        if len(targets) > 1:
            some = ", ".join(map(repr, targets[:_TOLD]))
            return "", f"account {account!r} has {len(targets)} targets in accounts.sql, such as {some}"
        return targets[0], ""

    @cached_property
    def _known(self) -> dict[str, set[str]]:
        known: dict[str, set[str]] = {}
        for batch in open_query(self.warehouse(), self.source.accounts_sql, {}, self.source.settings.batch_rows):
            for account, target in zip(*self._columns(batch), strict=True):
                if account is not None:
                    known.setdefault(account, set()).add(target or "")
        return known

    def _columns(self, batch: pa.Table) -> list[list[str | None]]:
        told = ", ".join(batch.column_names)
        faults = [
            f"{name}: the query returns no such column, or several; it returns {told}"
            for name in _COLUMNS
            if batch.column_names.count(name) != 1
        ]
        if not faults:
            columns = [as_text(plain(batch.column(name)), name, "accounts.sql", faults) for name in _COLUMNS]
        if faults:
            raise Misconfigured.all_at_once(f"accounts.sql of {self.source.title}", faults)
        return [column.to_pylist() for column in columns]
