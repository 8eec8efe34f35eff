"""The ledger's named queries: what makes a transition safe stands here, in one place.

The hot ones are written once, with binds: they run twice for each delivery, and putting a statement together takes
SQLAlchemy longer than running it.
"""

from typing import Any

from sqlalchemy import BindParameter, ColumnElement, Select, and_, bindparam, exists, select, update

from usage_billing.ledger.tables import UtcDateTime, compared_period, delivery, lease
from usage_billing.records import Period, State


def alive(now: Any) -> ColumnElement[bool]:
    """Say of a lease whether it is held and has not expired."""
    return and_(lease.c.released_at.is_(None), lease.c.expires_at > now)


def fence_alive(fence: Any, now: Any) -> ColumnElement[bool]:
    """Say whether the lease with this fence is alive."""
    return exists().where(lease.c.fence == fence, alive(now))


def sent_under(fence: Any, now: Any) -> ColumnElement[bool]:
    """Say of a delivery whether it is in the air under this lease, which must still be alive to write its outcome."""
    return and_(delivery.c.state == State.SENDING, delivery.c.fence == fence, fence_alive(fence, now))


def in_window(source: str, window: Period) -> ColumnElement[bool]:
    """Say of a delivery whether it belongs to a source and its usage period lies in `window`."""
    return and_(
        delivery.c.source == source, delivery.c.period_start >= window.start, delivery.c.period_end <= window.end
    )


def standing(source: str, window: Period, low: str, high: str) -> Select[Any]:
    """Select every revision of a source's identities in ``[low, high)`` for usage periods in `window`, sorted."""
    names = "identity revision state quantity extraction token reason account subscription component price_point"
    names += " dimensions period_start period_end address"
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


def newer_comparisons(source: str, number: int, span: Period) -> Select[Any]:
    """Select the usage periods in a span for which a later extraction than `number` was compared."""
    return touching(source, span).where(compared_period.c.extraction > number)


TO_SEND = [delivery.c[name] for name in "token identity revision quantity address body sent_at sends".split()]
"""The columns that a `Delivery` is made of."""

_NOW = bindparam("now", type_=UtcDateTime())
_FENCE: BindParameter[int] = bindparam("held")
_OUTDATED = exists().where(
    compared_period.c.source == delivery.c.source,
    compared_period.c.period_start == delivery.c.period_start,
    compared_period.c.period_end == delivery.c.period_end,
    compared_period.c.extraction > delivery.c.extraction,
)

RESERVED = (
    select(*TO_SEND)
    .where(
        delivery.c.source == bindparam("of"),
        delivery.c.state == State.RESERVED,
        delivery.c.extraction == bindparam("number"),
        delivery.c.token > bindparam("after"),
    )
    .order_by(delivery.c.token)
    .limit(bindparam("most"))
)

# Only one worker may have a delivery in the air, only under a living lease, and only for the newest extraction.
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

# A worker that lost its lease writes no receipt: others may have asked the site, and decided, meanwhile.
ACCEPT = (
    update(delivery)
    .where(delivery.c.token == bindparam("of"), sent_under(_FENCE, _NOW))
    .values(state=State.ACCEPTED, settled_at=_NOW, record_id=bindparam("record"), reason=bindparam("note"))
)
