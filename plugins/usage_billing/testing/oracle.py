"""What is owed, reckoned slowly and alone: plain Python over the rows, with none of the package's stages.

It knows rows, units and `Decimal`; neither pandas, nor the ledger, nor the periods of the package.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from usage_billing.testing.warehouse import Row


@dataclass(frozen=True, order=True)
class Key:
    """What usage is owed for: a source's subscription, in one usage period, with one value of its dimensions."""

    source: str
    owner: str
    start: datetime
    region: str = ""


def owed(
    source: str,
    function: str,
    rows: Iterable[Row],
    units: Sequence[datetime],
    owner: Callable[[str, datetime], str],
    *,
    by_region: bool,
) -> dict[Key, Decimal]:
    """Return what sound rows make owed, by key; keys that are owed nothing may be absent.

    `owner` says of an account and a usage period whose bill it is on.
    """
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        if row.sound and row.account is not None:
            start = units[row.unit]
            key = Key(source, owner(row.account, start), start, row.region if by_region else "")
            groups.setdefault(key, []).append(row)
    return {key: _measured(function, some) for key, some in groups.items()}


def _measured(function: str, rows: list[Row]) -> Decimal:
    if function == "count":
        return Decimal(len(rows))
    if function == "unique":
        return Decimal(len({row.quantity for row in rows}))
    if function == "sum":
        return sum((Decimal(row.quantity or "0") for row in rows), Decimal(0))
    if function == "max":
        return max(Decimal(row.quantity or "0") for row in rows)
    return Decimal(max(rows, key=lambda row: (row.time, row.event_id)).quantity or "0")
