"""Adopt: enter what a billing site holds under our tokens into a ledger that does not know it.

For a cut-over to a new ledger, and after a restore. A token is a function of the identity and the revision, so whoever
knows the usage totals of a span knows every name under which they may have been billed: these names are looked for
among the site's records. What matches is entered as the site holds it; what matches nothing is listed by name and
nothing is guessed. The command is rare, so it holds the site's records of the span in memory.
"""

import getpass
import os
from collections.abc import Mapping, Sequence
from datetime import datetime

from usage_billing.adopt.counted import by_total
from usage_billing.adopt.listed import by_records
from usage_billing.adopt.search import REVISIONS_AHEAD, Adoption, Search, places, rows_of
from usage_billing.destinations.base import Destination
from usage_billing.errors import NotApplied
from usage_billing.ledger import ADOPTED, Ledger
from usage_billing.moves import Moves, led_today
from usage_billing.records import Comparison, Staged
from usage_billing.staging import Staging

__all__ = ["REVISIONS_AHEAD", "Adoption", "adopt", "reason_of"]


def reason_of(now: datetime) -> str:
    """Return what the ledger keeps as the reason of an adopted delivery: when, and who did it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # A container may run under a number that has no name.
        user = f"user {os.getuid()}"
    return f"{ADOPTED}{now:%Y-%m-%d} by {user}"


def adopt(
    comparison: Comparison,
    former: Sequence[Staged],
    destination: Destination,
    ledger: Ledger,
    staging: Staging,
    reason: str,
    *,
    dry_run: bool = False,
) -> Adoption:
    """Enter what the site holds of the compared totals into the ledger; again, and nothing is left to enter.

    The caller holds the source's extraction lease, and `comparison.reading` is the newest one. Where an account led
    elsewhere before, as far as the ledger knows, its usage is looked for there as well: `former` are the totals by
    which it may have been billed (`aggregate.at_former_places`). Where the site cannot list its records, its count of
    each subscription's open billing period tells whether it has all of what is not known here, which is entered then,
    or nothing, which is left to the ordinary run; where it tells neither, and of what it does not speak, the totals are
    entered as held. Adopt again, and they are judged again. Raw events, which it ignores one by one, are all left to
    the ordinary run.

    Raises:
        Misconfigured: the source sends raw events, and the span begins before what the site ignores by itself.
        NotApplied: deliveries of the source are on their way, or moved meanwhile, or the site could not be asked.
    """
    name = destination.source.name
    if not dry_run:
        ledger.doubt_abandoned(name)
    if ledger.in_the_air(name):
        raise NotApplied(f"deliveries of {name!r} are being sent: adopt again when the deliver task has ended")
    moves, astray = Moves.staged(name, comparison.moves, staging), _astray(comparison, destination, ledger, staging)
    search = Search(comparison, former, destination, ledger, staging, moves, astray, reason, dry_run)
    lists = destination.records(places(moves.placements.iloc[:0], comparison.window)) is not None
    return by_records(search) if lists else by_total(search)


def _astray(comparison: Comparison, destination: Destination, ledger: Ledger, staging: Staging) -> Mapping[str, str]:
    """Return the accounts of which nobody knows where they led when usage of the span was billed, and why.

    They were never seen under this edition of the source. Under another one they led last to another subscription, and
    when they left it the ledger does not know.
    """
    source = destination.source
    today = led_today(comparison.targets, staging)
    before = ledger.led_before(source.name, source.edition, destination.site, today["account"].tolist())
    both = today.merge(before, on="account", suffixes=("", "_was"))
    left = both[both["subscription"] != both["subscription_was"]].sort_values("account")
    why = "the account led to subscription {} by another definition, and leads to {} by now"
    return {row["account"]: why.format(row["subscription_was"], row["subscription"]) for row in rows_of(left)}
