"""The list of quarantined rows, by name: those of the newest comparison of each usage period, and what was written off.

The caller holds the source's row, so that no other comparison of it begins meanwhile.
"""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import pandas as pd
from sqlalchemy import Connection, Select, and_, case, delete, or_, select, update

from usage_billing.errors import Misconfigured
from usage_billing.ledger.tables import quarantined_row
from usage_billing.records import WRITTEN_OFF, Period, Reading

_row = quarantined_row.c
_OPEN = _row.written_off_at.is_(None)
# The reading that lists it knew of the write-off; before that it has still to act by it.
_JUDGED = _row.reasons.contains(json.dumps(WRITTEN_OFF), autoescape=True)
_NAMES = "row_name copies event_id time account quantity dimensions reasons period_start period_end placed extraction"
_MOVES = ("period_start", "period_end", "placed", "reasons", "dimensions")
"""What changes where a row is listed again."""


def put(
    connection: Connection,
    insert: Any,
    name: str,
    reading: Reading,
    periods: Sequence[Period],
    rows: Iterable[pd.DataFrame],
) -> int:
    """List what a reading set aside of `periods`, in place of what was listed of them; return how many rows that is.

    What a person wrote off stays, also where it is not among the rows any more.
    """
    for period in periods:
        theirs = _of(name, period)
        connection.execute(delete(quarantined_row).where(theirs, _OPEN))
        connection.execute(update(quarantined_row).where(theirs).values(copies=0))
    mine = and_(_row.extraction == reading.extraction, _row.validation == reading.validation)
    changes = {
        word: insert.excluded[word] for word in ("period_start", "period_end", "placed", "reasons", "dimensions")
    }
    changes |= {"extraction": reading.extraction, "validation": reading.validation}
    # As what it was written off, it stays.
    changes["as_duplicate"] = case((_OPEN, insert.excluded.as_duplicate), else_=_row.as_duplicate)
    # A row without a usage period may stand under another one, from where it comes here.
    changes["copies"] = insert.excluded.copies + case((mine, _row.copies), else_=0)
    upsert = insert.on_conflict_do_update(index_elements=["source", "row_name"], set_=changes)
    listed = 0
    for part in rows:
        copies = part.groupby("row_name")["copies"].transform("sum")
        found = part.assign(copies=copies).drop_duplicates("row_name")
        inside = found[found["period_start"].isin([period.start for period in periods])]
        values = inside.assign(source=name, extraction=reading.extraction, validation=reading.validation).astype(object)
        if len(values):
            connection.execute(upsert, values.to_dict("records"))  # type: ignore[arg-type]
        listed += int(inside["copies"].sum())
    return listed


def write_off(
    connection: Connection, name: str, rows: Sequence[str], by: str, note: str, now: datetime, batch: int
) -> None:
    """Write off rows by name: they are not owed; all of them, or none.

    Raises:
        Misconfigured: with every row that does not stand in quarantine.
    """
    wanted = sorted(set(rows))
    there: dict[str, Any] = {}
    for start in range(0, len(wanted), batch):
        some = and_(_row.source == name, _row.row_name.in_(wanted[start : start + batch]))
        there |= {one.row_name: one for one in connection.execute(select(quarantined_row).where(some))}
    faults = [f"{row}: no row of {name!r} in quarantine has this name" for row in wanted if row not in there]
    faults += [
        f"{row}: was written off by {one.written_off_by} on {one.written_off_at:%Y-%m-%d}: {one.note}"
        for row, one in there.items()
        if one.written_off_at is not None
    ]
    if faults:
        raise Misconfigured.all_at_once("nothing was written off", faults)
    decided = {"written_off_by": by, "note": note, "written_off_at": now}
    for row in wanted:
        connection.execute(update(quarantined_row).where(_row.source == name, _row.row_name == row).values(decided))


def listing(name: str, window: Period | None) -> Select[Any]:
    """Select the rows of a source that are in quarantine, and not written off, by usage period and time."""
    found = select(*(_row[word] for word in _NAMES.split())).where(_row.source == name, _OPEN)
    if window is not None:
        found = found.where(_row.period_start < window.end, _row.period_end > window.start)
    return found.order_by(_row.period_start, _row.time.nulls_last(), _row.event_id, _row.row_name)


def decided(name: str) -> Select[Any]:
    """Select what was written off of a source."""
    words = (_row.row_name, _row.event_id, _row.as_duplicate)
    return select(*words).where(_row.source == name, ~_OPEN).order_by(_row.row_name)


def waiting(name: str) -> Select[Any]:
    """Select the usage periods with rows in quarantine, or with rows written off since they were last compared."""
    waits = or_(_OPEN, and_(~_JUDGED, _row.copies > 0))
    spans = select(_row.period_start, _row.period_end).where(_row.source == name, waits)
    return spans.distinct().order_by(_row.period_start)


def _of(name: str, period: Period) -> Any:
    return and_(_row.source == name, _row.period_start == period.start, _row.period_end == period.end)
