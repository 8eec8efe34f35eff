"""How a source was defined, edition by edition: each is in force from its own start to that of the next one.

A definition names what is billed, so it may not change under usage that was compared by it; it may from a moment on
after which nothing was compared. The caller holds the source's row, so that nothing is compared meanwhile.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, delete, insert, select, update

from usage_billing.errors import Misconfigured
from usage_billing.ledger import queries
from usage_billing.ledger.tables import edition, touched_period
from usage_billing.periods import Calendar, first_day
from usage_billing.records import EVER, Edition, Period


@dataclass(frozen=True, slots=True)
class Wanted:
    """A source as ``source.yaml`` defines it: from `since` on, or, where that is None, as it always was."""

    name: str
    site: str
    definition: Mapping[str, Any]
    settings: Mapping[str, Any]
    since: datetime | None = None

    def is_as(self, known: Edition) -> bool:
        """Say whether a known edition is this very one."""
        same = (known.site, known.definition) == (self.site, self.definition)
        return same and self.since in {None, known.span.start}


def known(connection: Connection, name: str) -> tuple[Edition, ...]:
    """Return the editions of a source in order."""
    rows = connection.execute(select(edition).where(edition.c.source == name).order_by(edition.c.effective_from)).all()
    edges = pairwise([*(row.effective_from for row in rows), EVER.end])
    return tuple(
        Edition(row.number, Period(*span), row.site, json.loads(row.definition), json.loads(row.settings))
        for row, span in zip(rows, edges, strict=True)
    )


def at(connection: Connection, name: str, moment: datetime) -> Edition | None:
    """Return the edition in force at a moment, None where there is none."""
    return next((one for one in known(connection, name) if one.span.start <= moment < one.span.end), None)


def judged(connection: Connection, wanted: Wanted) -> tuple[Edition, ...]:
    """Return the editions of a source as they have to be: those that are known, or with another last one, numbered 0.

    Raises:
        Misconfigured: the definition changed under usage that was compared by another one, or nobody can tell how usage
            before it was billed.
    """
    until = connection.execute(queries.last_compared(wanted.name)).scalar()
    return _judged(known(connection, wanted.name), until, wanted)


def _judged(before: tuple[Edition, ...], until: datetime | None, wanted: Wanted) -> tuple[Edition, ...]:
    """Judge where usage was compared `until` then, None where none was."""
    if before and wanted.is_as(before[-1]):
        return (*before[:-1], replace(before[-1], settings=wanted.settings or before[-1].settings))
    # Nothing hangs on it yet, so a person may have changed their mind; but the first one says how it was until then.
    if before and (until is None or until <= before[-1].span.start) and (len(before) > 1 or wanted.since is None):
        if until == before[-1].span.start != wanted.since and len(before) > 1:
            _raise_if_cut(before[-2], before[-1], wanted)
        return _judged(_ending(before[:-1], EVER.end), until, wanted)
    if not before and wanted.since is not None:
        raise Misconfigured(
            f"billing source {wanted.name!r}: effective_from says that it was billed otherwise before, and this ledger "
            "does not know how: if nothing of before is owed here, set bill_from to the same day; else register the "
            "definition of before first, by a run (a dry one is enough) of a source.yaml that still has it"
        )
    if before:
        _raise_if_under_history(before[-1], until, wanted)
    start = wanted.since or EVER.start
    added = Edition(0, Period(start, EVER.end), wanted.site, wanted.definition, wanted.settings)
    return (*_ending(before, start), added)


def _raise_if_cut(last: Edition, after: Edition, wanted: Wanted) -> None:
    """Make sure that an edition ends with one of its own usage periods, and not with a short one, which was compared.

    Raises:
        Misconfigured: it does, so what came after it may be defined anew, and not when that begins.
    """
    end = last.span.end
    calendar = Calendar.of(replace(last, span=EVER))
    if calendar.kind == "interval" or calendar.holding(end).start == end:
        return
    # In a zone in which a day begins there: that of today if it can be, else that of the definition after it.
    zones = [str(one["timezone"]) for one in (wanted.definition, after.definition)]
    zone = next((one for one in zones if not end.astimezone(ZoneInfo(one)).time()), zones[-1])
    day = end.astimezone(ZoneInfo(zone))
    raise Misconfigured(
        f"billing source {wanted.name!r}: its definition of before ended on {day:%Y-%m-%d} in {zone}, within a "
        f"{calendar.kind}, and that short usage period was compared: set effective_from: {day:%Y-%m-%d} again, with "
        f"timezone: {zone}; what is billed from then on may still be defined otherwise"
    )


def _ending(some: tuple[Edition, ...], end: datetime) -> tuple[Edition, ...]:
    """Return editions of which the last one ends then."""
    return (*some[:-1], *(replace(last, span=Period(last.span.start, end)) for last in some[-1:]))


def _raise_if_under_history(last: Edition, until: datetime | None, wanted: Wanted) -> None:
    until = until or EVER.start
    if wanted.since is not None and wanted.since >= until:
        return
    kind, zone = wanted.definition["period"], ZoneInfo(wanted.definition["timezone"])
    earliest = first_day(kind, zone, until)
    was = {"site": last.site, **last.definition}
    now = {"site": wanted.site, **wanted.definition}
    changed = [
        f"{key}: was {json.dumps(was.get(key))}, is now {json.dumps(now.get(key))}"
        for key in sorted(was | now)
        if was.get(key) != now.get(key)
    ]
    subject = f"billing source {wanted.name!r} has history in the ledger, compared until {until:%Y-%m-%d %H:%M} UTC"
    if wanted.since is not None:
        too_early = wanted.since.astimezone(zone).date()
        raise Misconfigured.all_at_once(
            f"{subject}, and its definition changed",
            [f"effective_from: {too_early} is too early; the earliest day is {earliest}", *changed],
        )
    raise Misconfigured.all_at_once(
        f"{subject}, and its definition changed; say from when with effective_from: {earliest}, or a later one, which "
        "leaves what is billed as it is; or bill the change as a new source whose bill_from is the day of the change; "
        "or put it back",
        changed,
    )


def write(connection: Connection, name: str, wanted: Sequence[Edition], now: datetime) -> tuple[Edition, ...]:
    """Make the editions of a source these, of which the last one may be new or have other settings."""
    before = known(connection, name)
    if tuple(wanted) == before:
        return before
    kept = {one.number for one in wanted}
    dropped = [one for one in before if one.number not in kept]
    connection.execute(delete(edition).where(edition.c.number.in_([one.number for one in dropped])))
    last = wanted[-1]
    settings = json.dumps(last.settings, sort_keys=True)
    if last.number:
        connection.execute(update(edition).where(edition.c.number == last.number).values(settings=settings))
    else:
        row = {"source": name, "effective_from": last.span.start, "site": last.site, "registered_at": now}
        row |= {"definition": json.dumps(last.definition, sort_keys=True), "settings": settings}
        connection.execute(insert(edition).values(row))
    after = known(connection, name)
    if [one.span for one in after] != [one.span for one in before] or dropped:
        _list_anew(connection, name, after, min(one.span.start for one in (*dropped, last)))
    return after


def cut(editions: Sequence[Edition], periods: Iterable[Period]) -> frozenset[Period]:
    """Return the usage periods, each of its own edition, that share a moment with some of before."""
    calendars = [Calendar.of(one) for one in editions]
    return frozenset(here for period in periods for calendar in calendars for here in calendar.touching(period))


def raise_if_moved(connection: Connection, name: str, number: int, periods: Sequence[Period]) -> None:
    """Make sure that an edition, 0 for any, is still the one by which all of `periods` are billed.

    Raises:
        Misconfigured: it was replaced, or another one begins among them.
    """
    if not number or not periods:
        return
    span = next((one.span for one in known(connection, name) if one.number == number), None)
    around = Period.around(periods)
    if span is None or around.start < span.start or span.end < around.end:
        raise Misconfigured(
            f"billing source {name!r}: its definition for {around} has changed since the rows were read, and nothing "
            "more is sent: clear the run from extract on"
        )


def _list_anew(connection: Connection, name: str, editions: Sequence[Edition], start: datetime) -> None:
    """Let the list of touched usage periods name, from `start` on, those of the editions of today."""
    ours = touched_period.c.source == name
    rows = connection.execute(select(touched_period).where(ours, touched_period.c.period_end >= start)).all()
    connection.execute(delete(touched_period).where(ours, touched_period.c.period_end >= start))
    again: dict[Period, int] = {}
    for row in rows:
        for period in cut(editions, [Period(row.period_start, row.period_end)]):
            again[period] = max(row.extraction, again.get(period, 0))
    if again:
        same = {"source": name}
        values = [
            {**same, "period_start": period.start, "period_end": period.end, "extraction": number}
            for period, number in again.items()
        ]
        connection.execute(insert(touched_period), values)
