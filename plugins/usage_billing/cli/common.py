"""What several commands share: the days that a person names, and whether the ledger knows a source."""

import argparse
from typing import TYPE_CHECKING

from usage_billing.errors import Misconfigured
from usage_billing.periods import local_midnight
from usage_billing.records import Period

if TYPE_CHECKING:
    from usage_billing.ledger import Ledger


def check_known(book: "Ledger", name: str) -> None:
    """Raise `Misconfigured` unless the ledger knows a source; a misspelt one is not one without open items."""
    if (known := book.sources()) and name not in known:
        raise Misconfigured(f"the ledger knows no billing source {name!r}, only {', '.join(known)}")


def days_of(options: argparse.Namespace) -> Period | None:
    """Return the days `--from` and `--to` in the source's billing zone, None where none are given."""
    from usage_billing.installation import billing_source  # noqa: PLC0415

    if not options.first and not options.after:
        return None
    if not (options.first and options.after):
        raise Misconfigured("--from and --to go together: the first day, and the day after the last one")
    zone = billing_source(options.source).settings.timezone
    return Period(local_midnight(options.first, zone), local_midnight(options.after, zone))
