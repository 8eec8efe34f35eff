"""The nouns that stages hand to each other: frozen, and checked at birth.

Times are aware, spans are half-open ``[start, end)``, quantities are `Decimal`. Tables too large for objects travel as
Parquet (`staging.py`); the records here describe them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Any, Self


def check_aware(name: str, moment: datetime) -> None:
    """Raise `ValueError` unless `moment` carries a time zone."""
    if moment.tzinfo is None:
        raise ValueError(f"{name} needs a time zone: {moment!r}")


@dataclass(frozen=True, order=True, slots=True)
class Period:
    """A half-open span of time ``[start, end)``, kept in UTC."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            moment = getattr(self, name)
            check_aware(name, moment)
            object.__setattr__(self, name, _plain(moment))
        if self.start >= self.end:
            raise ValueError(f"a period ends after it starts: {self.start} to {self.end}")

    @classmethod
    def around(cls, periods: Iterable["Period"]) -> Self:
        """Return the span from the first start of some periods to the last end; there is at least one."""
        known = list(periods)
        return cls(min(period.start for period in known), max(period.end for period in known))

    def __str__(self) -> str:
        return f"{self.start:%Y-%m-%dT%H:%MZ} to {self.end:%Y-%m-%dT%H:%MZ}"


Window = Period | Sequence[Period]
"""A span of time, or usage periods that may leave gaps: what lies in a gap is not meant."""


def joined(window: Window) -> tuple[Period, ...]:
    """Return the same time as spans in order, periods that touch each other made one."""
    spans: list[Period] = []
    for period in [window] if isinstance(window, Period) else sorted(window):
        if spans and period.start <= spans[-1].end:
            spans[-1] = Period(spans[-1].start, max(spans[-1].end, period.end))
        else:
            spans.append(period)
    return tuple(spans)


def overlap(one: Period, other: Period) -> Period | None:
    """Return the time that two spans share, None where they share none."""
    start, end = max(one.start, other.start), min(one.end, other.end)
    return Period(start, end) if start < end else None


def _plain(moment: datetime) -> datetime:
    """Return a moment in UTC as a plain `datetime`: Airflow hands out pendulum's, which add up differently."""
    utc = moment.astimezone(UTC)
    return datetime(utc.year, utc.month, utc.day, utc.hour, utc.minute, utc.second, utc.microsecond, tzinfo=UTC)


EVER = Period(datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))
"""All time: no usage is older, and the calendar ends."""


PERSON_DECIDES = "a person decides: "
"""How the reason of a doubt begins that no waiting will end."""

NOBODY_CAN_TELL = f"{PERSON_DECIDES}no question tells: "
"""How it begins where the site is not asked again either."""


ABSENT = "the site does not have it"
"""The reason of a delivery that was in doubt, and goes again because the site turned out not to have it."""


REFUSED_WHOLE = "refused as a whole: "
"""How the reason of a doubt begins that the site made by saying no to several at once; that it was one is kept behind
`ABSENT`, since the same no to one of them alone is then its own."""


DECIDED = "decided on "
"""How the reason of a delivery begins that a person has decided about."""


POLICY = "late_usage: "
"""How it begins what let a delivery go where no person did: the source's policy of then."""


REFUSED_HERE = "never sent, as late_usage says: "
"""How the reason of a refusal begins that the source asks for, and no site gave."""


PASSES = "its billing period closed before it was sent; it goes into the open one, as the source says"
"""The reason of a delivery that was right when it was planned, and is written anew for the billing period of today."""


PASSES_SOON = (
    "its billing period ends before it could land; once the next one is open it goes there, as the source says"
)
"""The reason of one that was right when planned, came too near the end, and is written anew after the renewal."""


WITHHELD = "rows are in quarantine, and quarantine withholds, it never withdraws"
"""The reason of a negative difference that waits for its run's quarantined rows, whatever else speaks against it."""


WRITTEN_OFF = "written off"
"""One reason more of a row that a person wrote off: it is not owed, and nothing waits for it."""


MOVED = "moved: "
"""How the reason of a difference begins that waits since its account leads to another subscription than it did: for a
person's choice or, once they chose `move`, for the credit of the former subscription."""


FOLLOWS = f"{MOVED}the credit of subscription "
"""How it begins where it is the credit: the same deliver sends it once that was taken."""


UNAPPROVED = "not approved: "
"""How the reason of a delivery begins that a person was asked about, and did not approve. Each plan asks again."""


@dataclass(frozen=True, slots=True)
class Edition:
    """How a source was defined over a span of time, and to which site it was billed; a later one begins where it ends.

    `definition` is what names the bill, `settings` the whole section `destination` as it was then; empty where that was
    not written down. `number` is 0 as long as the ledger has only looked at it.
    """

    number: int
    span: Period
    site: str
    definition: Mapping[str, Any]
    settings: Mapping[str, Any]


class Decision(StrEnum):
    """How the question about a plan ended."""

    APPROVED = "approved"
    REJECTED = "rejected"
    TIMED_OUT = "timed_out"


class Choice(StrEnum):
    """What a person chose for the usage that was billed before its account led to another subscription."""

    MOVE = "move"
    """It goes to the new one: the former one is credited first."""
    FROM_NOW = "from_now"
    """It stays with the former one, and later usage goes to the new one."""


class State(StrEnum):
    """Where a delivery stands; the ledger alone moves it."""

    RESERVED = "reserved"
    SENDING = "sending"
    IN_DOUBT = "in_doubt"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    HELD = "held"
    WRITTEN_OFF = "written_off"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Staged:
    """A reference to a staged table: where its manifest lies, how many rows it holds, and the digest of its parts.

    Small enough for an XCom, and JSON all the way.
    """

    manifest: str
    rows: int
    digest: str

    def to_json(self) -> dict[str, Any]:
        """Return the reference as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the reference that `to_json` gave."""
        return cls(manifest=value["manifest"], rows=value["rows"], digest=value["digest"])


@dataclass(frozen=True, order=True, slots=True)
class Reading:
    """What is compared: an extraction, as it was validated; the one that orders later has the say.

    An extraction that is validated anew, by other expectations or another mapping, may owe something else: each outcome
    of its validation has a number of its own, from 1; 0 stands for no validation at all.
    """

    extraction: int
    validation: int = 0

    def __str__(self) -> str:
        again = f", validated for the {self.validation}. time" if self.validation > 1 else ""
        return f"extraction {self.extraction}{again}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What a reading had of one usage period: its rows, those of them in quarantine, and the sum of the accepted ones.

    `quantity` is None where the meter is no sum.
    """

    period: Period
    rows: int
    rows_quarantined: int = 0
    quantity: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Approval:
    """What was decided about the deliveries that a plan of one reading would send, which `digest` names; who, and when.

    `by` is empty where nobody answered in time.
    """

    source: str
    reading: Reading
    digest: str
    decision: Decision
    by: str
    note: str
    decided_at: datetime


@dataclass(frozen=True, slots=True)
class Run:
    """What one task hands to the next: which reading of which data interval, and the tables made so far, by stage.

    JSON all the way, and small whatever the interval: quantities stay in the tables, where they are exact. `spans` are
    the compared usage periods, those that touch each other made one: a period in a gap between them was not read.
    `edition` is the number of the one under which they were read.
    """

    source: str
    number: int
    interval: Period
    folder: str
    tables: Mapping[str, Staged]
    rows_quarantined: int = 0
    validation: int = 0
    spans: tuple[Period, ...] = ()
    edition: int = 0

    @property
    def reading(self) -> Reading:
        """What the run compares, and how it was validated."""
        return Reading(self.number, self.validation)

    def with_table(self, stage: str, table: Staged, **changes: Any) -> Self:
        """Return the run with one more table."""
        return replace(self, tables={**self.tables, stage: table}, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the run as plain JSON values."""
        return {
            "source": self.source,
            "number": self.number,
            "interval": [self.interval.start.isoformat(), self.interval.end.isoformat()],
            "folder": self.folder,
            "tables": {stage: table.to_json() for stage, table in self.tables.items()},
            "rows_quarantined": self.rows_quarantined,
            "validation": self.validation,
            "spans": [[span.start.isoformat(), span.end.isoformat()] for span in self.spans],
            "edition": self.edition,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the run that `to_json` gave."""
        interval, *spans = (
            Period(*map(datetime.fromisoformat, edges)) for edges in (value["interval"], *value.get("spans", ()))
        )
        tables = {stage: Staged.from_json(table) for stage, table in value["tables"].items()}
        return cls(
            value["source"],
            value["number"],
            interval,
            value["folder"],
            tables,
            value["rows_quarantined"],
            value.get("validation", 0),  # A run that was under way when this package was upgraded has none of these.
            tuple(spans),
            value.get("edition", 0),
        )


@dataclass(frozen=True, slots=True)
class Extraction:
    """One reading of a source's warehouse; the larger number was read later and wins."""

    number: int
    source: str
    interval_start: datetime
    interval_end: datetime
    window_start: datetime
    window_end: datetime
    rows_read: int
    rows_quarantined: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """What the warehouse got since the watermark: which usage periods it touches, and up to where it was taken up.

    `watermark` is a moment in UTC or an id, as text; empty where nothing has ever arrived.
    """

    periods: tuple[Period, ...]
    rows: int
    watermark: str


@dataclass(frozen=True, slots=True)
class Target:
    """Where the usage of one warehouse account is billed, as the site answered today.

    `subscription` and `component` are canonical and never change for the same customer; `address` holds what today's
    request needs, which may change (ChargeOver replaces a line item's id at every upgrade). A target with `unknown` set
    could not be found: its rows are quarantined with that reason. `open_from` and `open_until` are the ends of the
    billing period that is open on the site, where the site tells; `ended_at` is since when it bills no usage of an
    unknown one, which is owed no less if it was used before.
    """

    account: str
    subscription: str = ""
    component: str = ""
    price_point: str = ""
    address: Mapping[str, Any] = field(default_factory=dict)
    unknown: str = ""
    open_from: datetime | None = None
    open_until: datetime | None = None
    ended_at: datetime | None = None

    @property
    def address_text(self) -> str:
        """The address as tables keep it: canonical JSON text."""
        return json.dumps(dict(self.address), sort_keys=True)


@dataclass(frozen=True, slots=True)
class Delivery:
    """One revision of one usage total on its way to a billing site, as the ledger stored it before sending.

    `body` is the exact JSON text of the record and `address` where it goes: a doubt is settled with these, never with
    what today's settings would give. `open_until` is when the billing period ends in which it was found right to send,
    `reason` what was last said of it; `period` is its usage period, and `subscription` to whom it was found to belong;
    empty of a chunk of raw events.
    """

    token: str
    identity: str
    revision: int
    quantity: Decimal
    address: Mapping[str, Any]
    body: str
    sent_at: datetime | None = None
    sends: int = 0
    reserved_at: datetime | None = None
    open_until: datetime | None = None
    reason: str = ""
    period: Period | None = None
    subscription: str = ""

    def __post_init__(self) -> None:
        if not self.quantity.is_finite() or self.quantity == 0:
            raise ValueError(f"a delivery has a finite quantity other than 0, not {self.quantity}")
        for name in ("sent_at", "reserved_at", "open_until"):
            if (moment := getattr(self, name)) is not None:
                check_aware(name, moment)

    def may_land_late(self, leaves_at: datetime, settle_after: timedelta) -> bool:
        """Say whether a request that leaves then may land after the billing period for which it was judged."""
        return self.open_until is not None and self.open_until - settle_after <= leaves_at

    @staticmethod
    def address_from(text: str) -> Mapping[str, Any]:
        """Return the address that the ledger keeps as JSON text."""
        address: Mapping[str, Any] = json.loads(text)
        return address


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the site gave back for one delivery: its own record id (empty where it gives none) and what it said.

    `applied` is how much of the quantity the site is proven to have counted, where that may be less than it stored: a
    deduction that met Maxio's floor at 0. None stands for all of it.
    """

    token: str
    record_id: str = ""
    note: str = ""
    applied: Decimal | None = None


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """One usage record as the billing site holds it; `token` is empty where the record is not ours.

    `note` is what the site shows a person beside it, such as the period that it is for; `address` is what it tells of
    where the record lies, which may be another place than its account leads to today.
    """

    token: str
    record_id: str
    quantity: Decimal
    note: str = field(default="", compare=False)
    address: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class SiteTotal:
    """What the site counts for one subscription's component over one of its billing periods."""

    subscription: str
    component: str
    period: Period
    quantity: Decimal


@dataclass(frozen=True)
class Comparison:
    """What a plan compares: the totals of one reading, for whole usage periods of one source, which may leave gaps.

    `events` are the accepted rows themselves; only a source that is billed by raw events needs them. `moves` are the
    accounts that lead elsewhere than they did, as the totals were counted by them (see `moves.placed`). `quarantined`
    are the rows that were set aside, each with its reasons.
    """

    reading: Reading
    periods: tuple[Period, ...]
    totals: Staged
    targets: Staged
    rows_accepted: int
    rows_quarantined: int
    events: Staged | None = None
    moves: Staged | None = None
    quarantined: Staged | None = None

    @property
    def window(self) -> Period:
        """The span from the first of the compared usage periods to the last: it also holds what was not read."""
        return Period.around(self.periods)


@dataclass(frozen=True)
class Tally:
    """How many identities the plan found in each case, and the scaled sums behind them.

    `partial` counts those of which only a part may go now: what is left is planned again once that part has landed.
    `released` counts those that the ledger lists as held or refused, and that may go by now; `refused` those that the
    source itself refuses. `follows` counts those that wait for a credit elsewhere, and `moved` is what decided moves
    take away and add in all: what one subscription loses and another gets is not withdrawn.
    """

    new: int = 0
    corrections: int = 0
    unchanged: int = 0
    held: int = 0
    blocked: int = 0
    waiting: int = 0
    withdrawn: int = 0
    partial: int = 0
    released: int = 0
    refused: int = 0
    owed: int = 0
    settled: int = 0
    negative: int = 0
    events: int = 0
    follows: int = 0
    moved: int = 0

    @property
    def unsettled(self) -> int:
        """How many identities owe a difference that nobody has written down yet, or that a doubt blocks."""
        listed = self.held + self.refused
        return self.new + self.corrections + listed + self.withdrawn + self.blocked - self.released

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Plan:
    """Proposed deliveries, sorted by identity, and the tally to read before they go.

    `withdraws_much` is why a run would not make such a plan: only a look does, to show it.
    """

    proposals: Staged
    tally: Tally
    withdraws_much: str = ""
