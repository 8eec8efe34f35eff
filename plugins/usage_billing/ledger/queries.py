"""The ledger's named queries: what makes a transition safe stands here, in one place.

The hot ones are written once, with binds: they run twice for each delivery, and putting a statement together takes
SQLAlchemy longer than running it.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Delete,
    Select,
    Tuple,
    and_,
    bindparam,
    case,
    delete,
    exists,
    false,
    func,
    not_,
    or_,
    select,
    text,
    tuple_,
    update,
)

from usage_billing.ledger.tables import (
    UtcDateTime,
    approval,
    compared_period,
    delivery,
    fed_component,
    lease,
    measured_period,
    placement,
    touched_period,
)
from usage_billing.records import MOVED, POLICY, WITHHELD, Decision, Period, Reading, State, Window, joined


def alive(now: Any) -> ColumnElement[bool]:
    """Say of a lease whether it is held and has not expired."""
    return and_(lease.c.released_at.is_(None), lease.c.expires_at > now)


def fence_alive(fence: Any, now: Any) -> ColumnElement[bool]:
    """Say whether the lease with this fence is alive."""
    return exists().where(lease.c.fence == fence, alive(now))


def sent_under(fence: Any, now: Any) -> ColumnElement[bool]:
    """Say of a delivery whether it is in the air under this lease, which must still be alive to write its outcome."""
    return and_(delivery.c.state == State.SENDING, delivery.c.fence == fence, fence_alive(fence, now))


def feeders(site: str, components: Sequence[str]) -> Select[Any]:
    """Select which sources feed some components of a site, sorted."""
    ours = and_(fed_component.c.site == site, fed_component.c.component.in_(components))
    return select(fed_component).where(ours).order_by(fed_component.c.component, fed_component.c.source)


def in_window(source: str, window: Window | None) -> ColumnElement[bool]:
    """Say of a delivery whether it belongs to a source and its usage period lies in `window`, None for any."""
    ours = delivery.c.source == source
    if window is None:
        return ours
    # One term for each span, never for each period: SQLite takes no more than a thousand in a row.
    inside = (and_(delivery.c.period_start >= span.start, delivery.c.period_end <= span.end) for span in joined(window))
    return and_(ours, or_(false(), *inside))


def may_count_in(window: Period) -> ColumnElement[bool]:
    """Say of a delivery whether it may be counted in a billing period: its usage period is there, or it came late."""
    reaches = or_(delivery.c.period_end > window.start, delivery.c.open_until > window.start)
    return and_(delivery.c.period_start < window.end, reaches)


def standing(source: str, window: Window, low: str, high: str) -> Select[Any]:
    """Select every revision of a source's identities in ``[low, high)`` for usage periods in `window`, sorted."""
    names = "identity revision state quantity applied extraction validation token reason account subscription component"
    names += " price_point dimensions period_start period_end address released"
    return (
        select(*(delivery.c[name] for name in names.split()))
        .where(in_window(source, window), delivery.c.identity >= low, delivery.c.identity < high)
        .order_by(delivery.c.identity, delivery.c.revision)
    )


def touching(source: str, span: Period) -> Select[Any]:
    """Select the compared usage periods of a source that share a moment with a span."""
    return select(compared_period).where(
        compared_period.c.source == source,
        compared_period.c.period_start < span.end,
        compared_period.c.period_end > span.start,
    )


def newer_comparisons(source: str, reading: Reading, span: Period) -> Select[Any]:
    """Select the usage periods in a span for which a later one than `reading` was compared."""
    given = tuple_(reading.extraction, reading.validation)
    return touching(source, span).where(read_as(compared_period) > given)


def compared_in(source: str, span: Period) -> Select[Any]:
    """Select the last usage period of a source that was compared and lies in a span."""
    return (
        select(compared_period)
        .where(_lies_in(compared_period, source, span))
        .order_by(compared_period.c.period_end.desc())
        .limit(1)
    )


def owed_in(source: str, span: Period, most: int) -> Select[Any]:
    """Select what the last usage periods of a source that lie in a span owed, where that is known and not nothing."""
    known = and_(compared_period.c.owed != "", compared_period.c.owed != "0")
    owed = select(compared_period.c.owed).where(_lies_in(compared_period, source, span), known)
    return owed.order_by(compared_period.c.period_end.desc()).limit(most)


def measured_in(source: str, span: Period, most: int) -> Select[Any]:
    """Select what the last usage periods of a source that lie in a span had, where they had any rows."""
    had_any = and_(_lies_in(measured_period, source, span), measured_period.c.rows_read > 0)
    return select(measured_period).where(had_any).order_by(measured_period.c.period_end.desc()).limit(most)


def _lies_in(table: Any, source: str, span: Period) -> ColumnElement[bool]:
    return and_(table.c.source == source, table.c.period_start >= span.start, table.c.period_end <= span.end)


def last_compared(source: str) -> Select[Any]:
    """Select when the last usage period of a source ends that was compared."""
    return select(func.max(compared_period.c.period_end)).where(compared_period.c.source == source)


def placements(source: str, edition: int | None, accounts: Any, names: str) -> Select[Any]:
    """Select columns of all places of some accounts, a list or a query of them, each account's in their order.

    Those under one edition of the source, None for any.
    """
    columns = (placement.c[name] for name in names.split())
    ours = select(*columns).where(_placed(source, edition), placement.c.account.in_(accounts))
    return ours.order_by(placement.c.account, placement.c.number)


def moved(source: str, edition: int) -> Select[Any]:
    """Select the accounts that were seen to lead elsewhere than before."""
    return select(placement.c.account).where(_placed(source, edition), placement.c.since.is_not(None))


def _placed(source: str, edition: int | None) -> ColumnElement[bool]:
    ours = placement.c.source == source
    return ours if edition is None else and_(ours, placement.c.edition == edition)


def take_off(source: str, reading: Reading, periods: Sequence[Period]) -> Delete:
    """Take compared usage periods off the list of touched ones, but for what a later extraction saw touched."""
    inside = (
        and_(touched_period.c.period_start >= span.start, touched_period.c.period_end <= span.end)
        for span in joined(periods)
    )
    return delete(touched_period).where(
        touched_period.c.source == source,
        touched_period.c.extraction <= reading.extraction,
        or_(false(), *inside),
    )


def read_as(table: Any) -> Tuple:
    """Return the columns by which readings are ordered."""
    return tuple_(table.c.extraction, table.c.validation)


def approvals(source: str, reading: Reading, digest: str) -> Select[Any]:
    """Select what was decided about one plan, the last word first."""
    this_one = and_(decided(source, reading), approval.c.digest == digest)
    return select(approval).where(this_one).order_by(approval.c.number.desc())


def unapproved(source: str, reading: Reading) -> Select[Any]:
    """Select the tokens of a reading's reserved deliveries that no person has seen or let go."""
    this_one = and_(delivery.c.source == source, read_as(delivery) == tuple_(reading.extraction, reading.validation))
    return select(delivery.c.token).where(this_one, delivery.c.state == State.RESERVED, ~_HAS_A_YES)


def decided(source: str, reading: Reading) -> ColumnElement[bool]:
    """Say of a decision whether it is about a plan of this reading."""
    given = tuple_(reading.extraction, reading.validation)
    return and_(approval.c.source == source, read_as(approval) == given)


_TO_SEND = "token identity revision quantity address body sent_at sends reserved_at open_until reason"
_TO_SEND += " period_start period_end subscription"
TO_SEND = [delivery.c[name] for name in _TO_SEND.split()]
"""The columns that a `Delivery` is made of."""

_NOW = bindparam("now", type_=UtcDateTime())
_FENCE: BindParameter[int] = bindparam("held")
_OUTDATED = exists().where(
    compared_period.c.source == delivery.c.source,
    compared_period.c.period_start == delivery.c.period_start,
    compared_period.c.period_end == delivery.c.period_end,
    read_as(compared_period) > read_as(delivery),
)

COUNTED = case((delivery.c.applied != "", delivery.c.applied), else_=delivery.c.quantity)
"""What an accepted delivery settles: its quantity, or as much of it as the site is proven to have counted."""


def counted_in_part(tokens: Sequence[str]) -> Select[Any]:
    """Select those of some accepted deliveries of which is known how much counted, and that no revision follows."""
    later = delivery.alias()
    followed = exists().where(later.c.identity == delivery.c.identity, later.c.revision > delivery.c.revision)
    ours = delivery.c.token.in_(tokens), delivery.c.state == State.ACCEPTED, delivery.c.applied != ""
    return select(delivery).where(*ours, ~followed)


RESERVED = (
    select(*TO_SEND)
    .where(
        delivery.c.source == bindparam("of"),
        delivery.c.state == State.RESERVED,
        delivery.c.extraction == bindparam("number"),
        delivery.c.validation == bindparam("validation"),
        delivery.c.token > bindparam("after"),
    )
    .order_by(delivery.c.token)
    .limit(bindparam("most"))
)

RECORD_OWED = (
    update(compared_period)
    .where(
        compared_period.c.source == bindparam("of"),
        compared_period.c.period_start == bindparam("start", type_=UtcDateTime()),
        compared_period.c.period_end == bindparam("until", type_=UtcDateTime()),
        compared_period.c.extraction == bindparam("number"),
        compared_period.c.validation == bindparam("outcome"),
    )
    .values(owed=bindparam("sum"))
)

# What was sent, turned out not to be at the site, and still stands: a sweep sends it again. It also sends what a person
# let go: no run has to come for that.
_RESUMABLE = and_(
    delivery.c.source == bindparam("of"),
    delivery.c.state == State.RESERVED,
    or_(delivery.c.sends > 0, delivery.c.released != ""),
    ~_OUTDATED,
    delivery.c.period_start >= bindparam("begin", type_=UtcDateTime()),
    delivery.c.period_end <= bindparam("until", type_=UtcDateTime()),
)

RESUMABLE = (
    select(*TO_SEND)
    .where(_RESUMABLE, delivery.c.token > bindparam("after"))
    .order_by(delivery.c.token)
    .limit(bindparam("most"))
)

# A person let it go, where the source's policy of then is nobody; or it was written down after a person had approved a
# plan of its reading: a yes is none to what no plan proposes, since it stood in the ledger before the source asked.
_LET_GO = and_(delivery.c.released != "", not_(delivery.c.released.startswith(POLICY, autoescape=True)))
_HAS_A_YES = or_(
    _LET_GO,
    exists().where(
        approval.c.source == delivery.c.source,
        read_as(approval) == read_as(delivery),
        approval.c.decision == Decision.APPROVED,
        approval.c.decided_at <= delivery.c.reserved_at,
    ),
)

RESUMABLE_WITH_A_YES = RESUMABLE.where(_HAS_A_YES)

RESUMABLE_WITHOUT = select(func.count()).select_from(delivery).where(_RESUMABLE, ~_HAS_A_YES)

# Held, or refused by the site, and let go by a person: the newest reading still owes just this. What quarantine
# withholds waits for it, and what moved for its own decision.
_RELEASED = and_(
    or_(delivery.c.state == State.HELD, delivery.c.state == State.REFUSED),
    delivery.c.released != "",
    not_(delivery.c.reason.startswith(WITHHELD, autoescape=True)),
    not_(delivery.c.reason.startswith(MOVED, autoescape=True)),
    ~_OUTDATED,
)

TAKE_RELEASED = (
    update(delivery)
    .where(delivery.c.token == bindparam("of"), _RELEASED)
    .values(state=State.SUPERSEDED, settled_at=_NOW)
    .returning(delivery.c.extraction, delivery.c.validation, delivery.c.released)
)

EXPLAIN_RELEASED = (
    update(delivery)
    .where(delivery.c.token == bindparam("of"), _RELEASED, delivery.c.reason != bindparam("why"))
    # The site's own words about what it refused are not ours to replace.
    .where(delivery.c.state == State.HELD)
    .values(reason=bindparam("why"))
)

# A later reading owes just what an earlier one listed: it has the say about it from now on.
CONFIRM = (
    update(delivery)
    .where(
        delivery.c.token == bindparam("of"),
        delivery.c.revision == bindparam("last"),
        or_(delivery.c.state == State.HELD, delivery.c.state == State.REFUSED),
    )
    .values(extraction=bindparam("number"), validation=bindparam("outcome"), reason=bindparam("why"))
)


def released(source: str, window: Window | None) -> Select[Any]:
    """Select what a person let go of a source in `window`, None for any, as it is held; by identity."""
    names = "token identity revision quantity account subscription component price_point dimensions period_start"
    names += " period_end address reason released"
    columns = [delivery.c[name] for name in names.split()]
    return select(*columns).where(in_window(source, window), _RELEASED).order_by(delivery.c.identity)


def refused_and_released(source: str) -> Select[Any]:
    """Select the usage periods of what a site refused and a person released: a run knows what is owed by now."""
    ours = delivery.c.source == source, delivery.c.state == State.REFUSED, delivery.c.released != ""
    return select(delivery.c.period_start, delivery.c.period_end).where(*ours).distinct()


# The last look before a request: the claim is fresh and its lease alive, both by the ledger's clock.
MAY_SEND = select(
    exists().where(
        delivery.c.token == bindparam("of"),
        sent_under(_FENCE, _NOW),
        delivery.c.sent_at > bindparam("since", type_=UtcDateTime()),
    )
)

# Only one worker may have a delivery in the air, only under a living lease, and only of the newest reading.
BEGIN_SENDING = (
    update(delivery)
    .where(
        delivery.c.token.in_(bindparam("tokens", expanding=True)),
        delivery.c.state == State.RESERVED,
        ~_OUTDATED,
        fence_alive(_FENCE, _NOW),
    )
    .values(state=State.SENDING, fence=_FENCE, sent_at=_NOW, sends=delivery.c.sends + 1)
    .returning(delivery.c.token)
)

_ACCEPTED = {
    "state": State.ACCEPTED,
    "settled_at": _NOW,
    "record_id": bindparam("record"),
    "reason": bindparam("note"),
    "applied": bindparam("counted"),
}

# A worker that lost its lease writes no receipt: others may have asked the site, and decided, meanwhile.
ACCEPT = update(delivery).where(delivery.c.token == bindparam("of"), sent_under(_FENCE, _NOW)).values(_ACCEPTED)

# Spelled out, since an IN list cannot be run for many rows at once.
_WAITING = or_(*(delivery.c.state == state for state in (State.RESERVED, State.HELD, State.IN_DOUBT)))

# What the site turned out to hold of the deliveries that were still open here.
ADOPT_OPEN = (
    update(delivery)
    .where(
        delivery.c.token == bindparam("of"),
        _WAITING,
    )
    .values(_ACCEPTED)
)

# The same, where it shows that it took one, and not how much of it counted.
DOUBT_OPEN = (
    update(delivery)
    .where(delivery.c.token == bindparam("of"), _WAITING)
    .values(state=State.IN_DOUBT, reason=bindparam("note"), sent_at=_NOW)
)

# An identity has one open revision at a time, so one before a revision that was sent had come to its end. What was
# refused had too: the later revision holds what it asked for, and nobody may write it off any more.
CLOSE_BELOW = (
    update(delivery)
    .where(
        delivery.c.identity == bindparam("of"),
        delivery.c.revision < bindparam("up_to"),
        or_(_WAITING, delivery.c.state == State.REFUSED),
    )
    .values(state=State.SUPERSEDED, settled_at=_NOW, reason=bindparam("note"))
)

# Both engines number by a counter of their own, which has to be moved in its own words.
NUMBER_ABOVE = {
    "sqlite": (
        text(
            "INSERT INTO sqlite_sequence (name, seq) SELECT 'extraction', 0 WHERE NOT EXISTS"
            " (SELECT 1 FROM sqlite_sequence WHERE name = 'extraction')"
        ),
        text("UPDATE sqlite_sequence SET seq = MAX(seq, :least) WHERE name = 'extraction'"),
    ),
    "postgresql": (
        text(
            "SELECT setval(counter, GREATEST(:least, nextval(counter)))"
            " FROM (SELECT pg_get_serial_sequence('extraction', 'number')::regclass AS counter) AS one"
        ),
    ),
}
