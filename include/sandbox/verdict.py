"""What the demo is judged by: owed by the warehouse's own SQL, billed by the sandbox's own count, key by key."""

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import requests

from usage_billing.ledger import Ledger

OWED = Path(__file__).parent / "owed"
BILL_FROM = date(2026, 10, 1)
"""The day on which the shipped sources begin to owe."""
TIMEOUT_SECONDS = 20
DEMO_DAYS = tuple(date(2026, 10, day) for day in range(5, 10))


@dataclass(frozen=True)
class DemoSource:
    """One billing source of the demo: where its usage goes, and the zone its days are cut in."""

    name: str
    site: str
    component: str
    zone: str

    @property
    def dag_id(self) -> str:
        """The DAG that bills it."""
        return f"bill_{self.name}"

    @property
    def zone_info(self) -> ZoneInfo:
        """The billing zone."""
        return ZoneInfo(self.zone)

    def midnight(self, day: date) -> datetime:
        """The start of `day` in the billing zone, with its offset."""
        return datetime(day.year, day.month, day.day, tzinfo=self.zone_info)


SOURCES = (
    DemoSource("api_calls", "maxio:us:acme", "api-calls", "America/New_York"),
    DemoSource("platform_events", "maxio:us:orbit", "platform-units", "UTC"),
    DemoSource("voip_minutes", "chargeover:telco", "voip", "America/Chicago"),
)


@dataclass(frozen=True)
class Verdict:
    """One line of the closing table; `difference` sums the absolute differences of all keys."""

    source: str
    rows_read: int
    rows_quarantined: int
    owed: Decimal
    billed: Decimal
    difference: Decimal
    writing_requests: int


@dataclass(frozen=True)
class Sandbox:
    """The sandbox's own view, by its control API at `url` (without a slash at the end)."""

    url: str

    def answers(self) -> bool:
        """Whether the sandbox takes requests yet."""
        try:
            return requests.get(f"{self.url}/_sandbox/", timeout=TIMEOUT_SECONDS).ok
        except (requests.ConnectionError, requests.Timeout):
            return False

    def billed(self, source: DemoSource) -> dict[str, Decimal]:
        """Account to the quantity that was invoiced or would be invoiced, for the source's component."""
        billed: dict[str, Decimal] = {}
        for row in self._get("billed", source.site)["rows"]:
            if row["component"] == source.component:
                billed[row["reference"]] = billed.get(row["reference"], Decimal()) + Decimal(row["billed"])
        return billed

    def writing_requests(self, source: DemoSource) -> int:
        """Requests to the source's site, since its books were opened, that could change them."""
        return int(self._get("requests", source.site)[source.site]["writing"])

    def _get(self, path: str, site: str) -> Any:
        reply = requests.get(f"{self.url}/_sandbox/{path}", params={"site": site}, timeout=TIMEOUT_SECONDS)
        reply.raise_for_status()
        return reply.json()


def judge(
    source: DemoSource, warehouse: Path, ledger: Path, billed: Mapping[str, Decimal], writing_requests: int
) -> Verdict:
    """Compare for the demo's days, and for every other day that the ledger has read in an earlier demo.

    The demo's days count even where the ledger has not read them: usage that nobody read is owed all the same.
    """
    with closing(Ledger.connect(f"sqlite:///{ledger}")) as book:
        extractions = book.extractions(source.name)
    days = set(DEMO_DAYS)
    for extraction in extractions:
        days.update(days_between(extraction.interval_start, extraction.interval_end, source.zone_info))
    owed = owed_by_account(warehouse, source.name, days)
    return Verdict(
        source=source.name,
        rows_read=sum(extraction.rows_read for extraction in extractions),
        rows_quarantined=sum(extraction.rows_quarantined for extraction in extractions),
        owed=sum(owed.values(), Decimal()),
        billed=sum(billed.values(), Decimal()),
        difference=difference(owed, billed),
        writing_requests=writing_requests,
    )


def owed_by_account(
    warehouse: Path, source: str, days: Iterable[date], bill_from: date = BILL_FROM
) -> dict[str, Decimal]:
    """What each account owes for `days` of the billing zone, none before `bill_from`, by `owed/<source>.sql`."""
    sql = (OWED / f"{source}.sql").read_text()
    owed: dict[str, Decimal] = {}
    with closing(duckdb.connect(str(warehouse), read_only=True)) as connection:
        for day in sorted(days):
            binds = {"first_day": day, "last_day": day, "bill_from": bill_from}
            for account, quantity in connection.execute(sql, binds).fetchall():
                if account is not None:
                    owed[account] = owed.get(account, Decimal()) + quantity
    return owed


def difference(owed: Mapping[str, Decimal], billed: Mapping[str, Decimal]) -> Decimal:
    """The sum of the absolute differences per account: too much here never makes up for too little there."""
    accounts = owed.keys() | billed.keys()
    return sum((abs(owed.get(each, Decimal()) - billed.get(each, Decimal())) for each in accounts), Decimal())


def table(verdicts: Iterable[Verdict]) -> str:
    """The closing table, for people."""
    head = ("source", "rows read", "quarantined", "owed", "billed", "difference", "writing requests")
    rows = [
        (
            verdict.source,
            f"{verdict.rows_read:,}",
            f"{verdict.rows_quarantined:,}",
            _plain(verdict.owed),
            _plain(verdict.billed),
            _plain(verdict.difference),
            f"{verdict.writing_requests:,}",
        )
        for verdict in verdicts
    ]
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return "\n".join("  ".join(_cells(row, widths)) for row in (head, tuple("-" * width for width in widths), *rows))


def _cells(row: tuple[str, ...], widths: list[int]) -> list[str]:
    name, *figures = row
    return [name.ljust(widths[0]), *(figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True))]


def _plain(quantity: Decimal) -> str:
    """Without the zeros that only tell a column's scale, and never as 5E+3."""
    text = f"{quantity:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def days_between(start: datetime, end: datetime, zone: ZoneInfo) -> list[date]:
    """The days of `zone` that the half-open span touches."""
    first = start.astimezone(zone).date()
    last = (end - timedelta(microseconds=1)).astimezone(zone).date()
    return [first + timedelta(days=number) for number in range((last - first).days + 1)]
