"""What a person may decide about a delivery, and why not.

A release, a write-off and the end of a doubt overrule the engine, so each is refused where it could bill twice or lose
a unit: where the site still answers, where a later revision or reading speaks of the same usage, where nobody can tell.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import Connection, select

from usage_billing.ledger import editions, queries
from usage_billing.ledger.tables import delivery
from usage_billing.records import MOVED, PERSON_DECIDES, REFUSED_HERE, UNAPPROVED, WITHHELD, Period, Reading, State

_MAY_LEAVE: Mapping[State, tuple[State, ...]] = {
    State.WRITTEN_OFF: (State.HELD, State.REFUSED),
    State.ACCEPTED: (State.IN_DOUBT,),
    State.RESERVED: (State.IN_DOUBT,),
    State.HELD: (State.HELD, State.REFUSED),
}
"""What a person may decide, and of what; `held` stands for a release, which leaves the state as it is."""

ADOPTED = "adopted on "
"""How the reason of each adopted delivery begins. One that is held with it waits for a person, whatever the warehouse
says by then: the site may have it, and nobody can ask."""

DECIDABLE_AFTER = timedelta(days=7)
"""How long after its last request a doubt that the site is still asked about may be decided by a person: the account
may be closed, or answer in a way that nobody can read, for ever."""


def why_undecidable(connection: Connection, row: Any, state: State, counted: Decimal | None, now: datetime) -> str:
    """Return why a person cannot decide this of a delivery, or an empty text."""
    leaves, wrong = _MAY_LEAVE[state], ""
    if row is None:
        wrong = "the ledger has no such delivery"
    elif row.state not in leaves:
        wanted = "release" if state is State.HELD else state
        wrong = f"it is {row.state}; {wanted} can be decided of what is {' or '.join(leaves)}"
    elif row.state == State.IN_DOUBT and (still_asked := _why_still_asked(row, now)):
        wrong = still_asked
    elif (state is State.ACCEPTED) != (counted is not None):
        wrong = "accepted, and nothing else, needs the quantity that the site counts"
    elif state is State.HELD:
        # What the site refused goes with a run of its period, which knows what is owed by then.
        overtaken = _why_overtaken(connection, row) if row.state == State.HELD else _why_refused_here(row)
        wrong = _why_unreleasable(row) or overtaken
    elif state is State.WRITTEN_OFF and _is_followed(connection, row):
        wrong = "a later revision has replaced it, and holds what is owed"
    elif counted is not None:
        of = editions.at(connection, row.source, row.period_start)
        wrong = _why_miscounted(row, counted, of.definition if of else {})
    return wrong


def _why_still_asked(row: Any, now: datetime) -> str:
    """Return why the site, and not a person, has to end a doubt, or an empty text."""
    decidable_at = row.sent_at + DECIDABLE_AFTER
    if row.reason.startswith(PERSON_DECIDES) or now >= decidable_at:
        return ""
    return (
        "the site is still being asked; the sweep ends this doubt, or says that a person has to; should it do neither, "
        f"you may decide from {decidable_at:%Y-%m-%d %H:%M} UTC on"
    )


def _is_followed(connection: Connection, row: Any) -> bool:
    """Say whether a later revision holds what is owed: to write both off would settle the same usage twice."""
    later = select(delivery.c.token).where(delivery.c.identity == row.identity, delivery.c.revision > row.revision)
    return connection.execute(later.limit(1)).first() is not None


def _why_unreleasable(row: Any) -> str:
    if row.reason.startswith(ADOPTED):
        return (
            "nobody can tell how much of it the site has, so sending it could bill it twice: compare the totals, bill "
            "the difference by hand, and write it off"
        )
    if row.reason.startswith(UNAPPROVED):
        return "it was not approved, and its source asks for approvals: clear the plan of its run, which asks again"
    if row.reason.startswith(WITHHELD):
        return f"{WITHHELD}: mend the rows, and the next run of its period judges it anew"
    if row.reason.startswith(MOVED):
        return (
            "it waits for what is decided about its account, and for no release: see `usage-billing ledger moves`; the "
            "next run of its period judges it anew"
        )
    if not row.subscription:
        return (
            "raw events are not released by name: with late_usage: now a run of their periods sends what came late; "
            "no call takes back what is gone or has changed"
        )
    return ""


def _why_refused_here(row: Any) -> str:
    if row.reason.startswith(REFUSED_HERE):
        return "its source refuses it by late_usage: refuse; another policy lets the next run of its period bill it"
    return ""


def _why_overtaken(connection: Connection, row: Any) -> str:
    period = Period(row.period_start, row.period_end)
    if stale_periods(connection, row.source, Reading(row.extraction, row.validation), [period]):
        return "a later reading of its usage period was compared, and may owe something else: run the period"
    return ""


def _why_miscounted(row: Any, counted: Decimal, definition: Mapping[str, Any]) -> str:
    if not row.subscription and counted != Decimal(row.quantity):
        return f"a chunk of raw events counts whole ({row.quantity}) or not at all: which of them count is not known"
    decimals = int(definition.get("meter", {}).get("decimals", 0))
    if not counted.is_finite() or counted != round(counted, decimals):
        return f"{counted} is no quantity of {decimals} decimal places, in which {row.source!r} is measured"
    return ""


def stale_periods(connection: Connection, name: str, reading: Reading, periods: Sequence[Period]) -> frozenset[Period]:
    """Return those of `periods` for which a later one than `reading` was compared."""
    rows = connection.execute(queries.newer_comparisons(name, reading, Period.around(periods)))
    return frozenset(Period(row.period_start, row.period_end) for row in rows) & frozenset(periods)
