"""The ledger: the only place that remembers what was billed. One method, one query or one short transaction.

Every transition names the states it may leave; a row that does not come back was moved by somebody else. Nothing
accepted is ever edited or deleted.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from itertools import pairwise
from typing import Any, Self

import pandas as pd
from sqlalchemy import (
    URL,
    ColumnElement,
    Connection,
    Engine,
    RowMapping,
    Select,
    Table,
    case,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError

from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Stale
from usage_billing.ledger import editions, quarantined, queries
from usage_billing.ledger import engine as engines
from usage_billing.ledger.decisions import ADOPTED, DECIDABLE_AFTER, stale_periods, why_undecidable
from usage_billing.ledger.tables import (
    approval,
    compared_period,
    delivery,
    extraction,
    fed_component,
    lease,
    ledger,
    measured_period,
    placement,
    quarantined_row,
    read_columns,
    source,
    touched_period,
    watermark,
)
from usage_billing.records import (
    EVER,
    MOVED,
    PASSES,
    PASSES_SOON,
    REFUSED_HERE,
    Approval,
    Arrived,
    Choice,
    Decision,
    Delivery,
    Edition,
    Extraction,
    Measured,
    Period,
    Reading,
    Receipt,
    State,
    Window,
    joined,
    overlap,
)
from usage_billing.uniqueness import uniqueness_token

__all__ = ["ADOPTED", "DECIDABLE_AFTER", "Lease", "Ledger", "Reserved", "bases"]

_BATCH = 500
"""How many values go into one IN list: SQLite and PostgreSQL both take more, plans stay readable with this."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to act under `name` until it expires; the fence of a later holder is larger."""

    name: str
    fence: int
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Reserved:
    """What became of proposals: how many were written down, were there already, or had moved since the plan."""

    written: int
    already: int
    moved: int


class Ledger:
    """A connected ledger. Safe to share between threads; each method is a transaction of its own."""

    def __init__(self, engine: Engine, clock: Callable[[], datetime] | None = None) -> None:
        self._engine = engine
        self._clock = clock

    @classmethod
    def connect(cls, url: str | URL, clock: Callable[[], datetime] | None = None) -> Self:
        """Open the ledger at a SQLAlchemy `url`; `clock` replaces the ledger's own clock in simulations.

        Raises:
            Misconfigured: there is none (see `create`), or its schema is of another version.
            NotApplied: the database cannot be reached.
        """
        return cls(engines.connect(url), clock)

    @staticmethod
    def create(url: str | URL) -> bool:
        """Create or upgrade the ledger at `url`; False if it was there and current."""
        return engines.create(url)

    def close(self) -> None:
        """Give back all connections."""
        self._engine.dispose()

    def now(self) -> datetime:
        """Return the time by the ledger's clock, which alone decides about leases and settling."""
        with self._reading() as connection:
            return self._now(connection)

    # --- sources -----------------------------------------------------------------------------------------------------

    def register(
        self,
        name: str,
        site: str,
        definition: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        since: datetime | None = None,
    ) -> tuple[Edition, ...]:
        """Remember what a source bills, or check that it still bills the same; return all its editions, in order.

        `settings` are the whole section `destination`. From `since` on it may bill something else than before, if
        nothing of then was compared: that makes a new edition, which ends the one before. One of which nothing was
        compared yet is replaced by another.

        Raises:
            Misconfigured: an identity-bearing setting differs from the one under which usage was billed.
        """
        wanted = editions.Wanted(name, site, definition, settings or {}, since)
        with self._writing() as connection:
            now = self._now(connection)
            new = self._insert(source).values(name=name, registered_at=now)
            connection.execute(new.on_conflict_do_nothing())
            # While it is judged, and written, nothing may be compared.
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            return editions.write(connection, name, editions.judged(connection, wanted), now)

    def agrees(
        self,
        name: str,
        site: str,
        definition: Mapping[str, Any],
        settings: Mapping[str, Any] | None = None,
        since: datetime | None = None,
    ) -> tuple[Edition, ...]:
        """Judge a source as `register` does, write nothing, and return its editions as they would be.

        Raises:
            Misconfigured: as `register`.
        """
        with self._reading() as connection:
            return editions.judged(connection, editions.Wanted(name, site, definition, settings or {}, since))

    def editions(self, name: str) -> tuple[Edition, ...]:
        """Return the editions of a source as they were registered, in order."""
        with self._reading() as connection:
            return editions.known(connection, name)

    def feed(
        self, name: str, site: str, reading: Reading, components: Iterable[str], shared_with: Sequence[str] = ()
    ) -> None:
        """Write down which components of a site a source feeds. A reading without a number only looks.

        Raises:
            Misconfigured: another source feeds one of them already, and is not among `shared_with`: most likely it is
                the same usage under another name.
        """
        ours = sorted({component for component in components if component})
        with self._reading() as connection:
            fed = connection.execute(queries.feeders(site, ours)).all()
        new = sorted(set(ours) - {row.component for row in fed if row.source == name})
        if not new:
            return
        with self._writing() as connection:
            # All of them in one order: of two that claim a component at once, one has to see the other.
            connection.execute(select(source.c.name).order_by(source.c.name).with_for_update())
            others = connection.execute(queries.feeders(site, new)).all()
            if faults := [_why_not_fed(name, row) for row in others if row.source not in {name, *shared_with}]:
                raise Misconfigured.all_at_once(f"billing source {name!r} would bill what another one bills", faults)
            if reading.extraction:
                rows = [{"site": site, "component": component, "source": name} for component in new]
                connection.execute(self._insert(fed_component).on_conflict_do_nothing(), rows)

    def sources(self) -> list[str]:
        """Return the names of all sources that were ever registered, sorted."""
        with self._reading() as connection:
            return list(connection.execute(select(source.c.name).order_by(source.c.name)).scalars())

    # --- leases ------------------------------------------------------------------------------------------------------

    def acquire(self, name: str, holder: str, lasts: timedelta) -> Lease | None:
        """Take the lease `name`, or return None while somebody else holds it unexpired."""
        try:
            with self._writing() as connection:
                now = self._now(connection)
                connection.execute(
                    update(lease)
                    .where(lease.c.name == name, lease.c.released_at.is_(None), lease.c.expires_at <= now)
                    .values(released_at=now)
                )
                row = {"name": name, "holder": holder, "expires_at": now + lasts}
                fence: int = connection.execute(insert(lease).values(row).returning(lease.c.fence)).scalar_one()
        except IntegrityError:
            return None
        return Lease(name, fence, now + lasts)

    def renew(self, held: Lease, lasts: timedelta) -> Lease | None:
        """Extend a lease; None if it expired first, and then it is lost for good."""
        with self._writing() as connection:
            now = self._now(connection)
            statement = (
                update(lease).where(lease.c.fence == held.fence, queries.alive(now)).values(expires_at=now + lasts)
            )
            kept = connection.execute(statement).rowcount == 1
        return Lease(held.name, held.fence, now + lasts) if kept else None

    def release(self, held: Lease) -> None:
        """Give a lease back."""
        statement = update(lease).where(lease.c.fence == held.fence, lease.c.released_at.is_(None))
        with self._writing() as connection:
            connection.execute(statement.values(released_at=self._now(connection)))

    # --- extractions -------------------------------------------------------------------------------------------------

    def begin_extraction(
        self, held: Lease, name: str, interval: Period, window: Window, arrived: Arrived | None = None
    ) -> int:
        """Number an extraction of `window` whose snapshot is open; the caller holds the source's extraction lease.

        With `arrived`, in the same transaction, its usage periods go on the list of touched ones, and the watermark
        moves: what it has passed stands on the list.

        Raises:
            NotApplied: the lease was lost meanwhile, so a later snapshot may have an earlier number.
        """
        with self._writing() as connection:
            now = self._now(connection)
            # Locked until the number is given: who takes the lease over meanwhile has to come later in number too.
            alive = select(lease.c.fence).where(lease.c.fence == held.fence, queries.alive(now)).with_for_update()
            if connection.execute(alive).first() is None:
                raise NotApplied(f"lost the lease {held.name!r} while the warehouse opened its snapshot; try again")
            spans = joined(window)
            statement = insert(extraction).values(
                source=name,
                interval_start=interval.start,
                interval_end=interval.end,
                window_start=spans[0].start,
                window_end=spans[-1].end,
                spans=json.dumps([[span.start.isoformat(), span.end.isoformat()] for span in spans]),
                opened_at=now,
            )
            number: int = connection.execute(statement.returning(extraction.c.number)).scalar_one()
            if arrived is not None:
                self._take_up(connection, name, number, arrived)
            return number

    def _take_up(self, connection: Connection, name: str, number: int, arrived: Arrived) -> None:
        # A new edition may have begun since they were reckoned; while its row is locked, no other one does.
        connection.execute(select(source).where(source.c.name == name).with_for_update())
        rows = [
            {"source": name, "period_start": period.start, "period_end": period.end, "extraction": number}
            for period in editions.cut(editions.known(connection, name), arrived.periods)
        ]
        if rows:
            touch = self._insert(touched_period)
            key = ["source", "period_start", "period_end"]
            connection.execute(touch.on_conflict_do_update(index_elements=key, set_={"extraction": number}), rows)
        if arrived.watermark:
            moved = {"arrival": arrived.watermark, "extraction": number}
            move = self._insert(watermark).values(source=name, **moved)
            connection.execute(move.on_conflict_do_update(index_elements=["source"], set_=moved))

    def watermark(self, name: str) -> str:
        """Return up to where a source's arrivals were taken up, as `Arrived` says it; empty before the first time."""
        with self._reading() as connection:
            found = connection.execute(select(watermark.c.arrival).where(watermark.c.source == name))
            return found.scalar_one_or_none() or ""

    def touched(self, name: str) -> tuple[Period, ...]:
        """Return the usage periods that arrivals touched and that are still to be compared, in order."""
        statement = select(touched_period).where(touched_period.c.source == name)
        with self._reading() as connection:
            rows = connection.execute(statement.order_by(touched_period.c.period_start))
            return tuple(Period(row.period_start, row.period_end) for row in rows)

    def take_off(self, name: str, reading: Reading, periods: Sequence[Period]) -> int:
        """Take compared periods, of which every difference is written down, off the list of touched ones.

        What a later extraction saw touched stays, and what a later reading was compared for: its own plan may still be
        to come. Return how many were taken off.
        """
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            ours = sorted(set(periods) - stale_periods(connection, name, reading, periods)) if periods else []
            return connection.execute(queries.take_off(name, reading, ours)).rowcount

    def read_in(self, name: str, span: Period) -> tuple[Period, ...]:
        """Return which time within a span extractions of a source have read, whatever became of them, in order."""
        touches = extraction.c.window_start < span.end, extraction.c.window_end > span.start
        columns = extraction.c.spans, extraction.c.window_start, extraction.c.window_end
        statement = select(*columns).where(extraction.c.source == name, *touches).distinct()
        found: set[Period] = set()
        with self._reading() as connection:
            for spans, start, end in connection.execute(statement):
                edges = json.loads(spans) if spans else [[start.isoformat(), end.isoformat()]]
                read = (Period(*map(datetime.fromisoformat, edge)) for edge in edges)
                found.update(part for each in read if (part := overlap(each, span)))
        return joined(sorted(found))

    def record_read(self, number: int, rows: int) -> None:
        """Write down how many rows an extraction read."""
        with self._writing() as connection:
            connection.execute(update(extraction).where(extraction.c.number == number).values(rows_read=rows))

    def record_validation(
        self, number: int, digest: str, rows: int, reasons: Mapping[str, int], manifest: str, looked_up_at: datetime
    ) -> Reading:
        """Write down what a validation came to: how many rows were quarantined, why, and where they are.

        `digest` stands for all that it gave, `looked_up_at` is when it began to look accounts up, by the ledger's time.
        The reading that comes back is the one of before where the digest is the same: a task that runs twice has
        validated once.
        """
        values = {"rows_quarantined": rows, "reasons": json.dumps(reasons, sort_keys=True), "quarantine": manifest}
        another = case((extraction.c.validated == digest, 0), else_=1)
        with self._writing() as connection:
            statement = update(extraction).where(extraction.c.number == number).values(values)
            statement = statement.values(
                validation=extraction.c.validation + another, validated=digest, validated_at=looked_up_at
            )
            outcome: int = connection.execute(statement.returning(extraction.c.validation)).scalar_one()
        return Reading(number, outcome)

    def validated_at(self, reading: Reading) -> datetime | None:
        """Return when the accounts of a reading began to be looked up at the site, None if nobody wrote that down."""
        statement = select(extraction.c.validated_at).where(extraction.c.number == reading.extraction)
        with self._reading() as connection:
            return connection.execute(statement).scalar_one_or_none()

    def extractions(self, name: str) -> list[Extraction]:
        """Return the newest extraction of each data interval of a source, by interval."""
        newest = select(func.max(extraction.c.number)).where(extraction.c.source == name)
        newest = newest.group_by(extraction.c.interval_start, extraction.c.interval_end)
        rows = select(extraction).where(extraction.c.number.in_(newest)).order_by(extraction.c.interval_start)
        with self._reading() as connection:
            return [_extraction(row) for row in connection.execute(rows).mappings()]

    # --- quarantine --------------------------------------------------------------------------------------------------

    def list_quarantine(
        self, name: str, reading: Reading, periods: Sequence[Period], rows: Iterable[pd.DataFrame] = ()
    ) -> int:
        """List the rows that a reading set aside of `periods` (columns of `quarantine.listed`); return how many.

        What was listed of these periods before goes, but for what a person wrote off. Only where `reading` is the last
        one that was compared does it have a say.
        """
        insertion = self._insert(quarantined_row)
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            ours = sorted(set(periods) - stale_periods(connection, name, reading, periods))
            return quarantined.put(connection, insertion, name, reading, ours, rows)

    def quarantined(self, name: str, window: Period | None = None) -> pd.DataFrame:
        """Return the rows of a source that are in quarantine and not written off, by usage period and time.

        Columns: row_name, copies, event_id, time, account, quantity, dimensions, reasons (JSON text),
        period_start, period_end, placed, extraction.
        """
        return self._frame(quarantined.listing(name, window))

    def replayable(self, name: str) -> tuple[Period, ...]:
        """Return the usage periods that wait for a run.

        They have rows in quarantine, or rows that were written off since they were last compared, or a delivery that
        the site refused and a person released.
        """
        with self._reading() as connection:
            found = {Period(*edges) for edges in connection.execute(quarantined.waiting(name))}
            found |= {Period(*edges) for edges in connection.execute(queries.refused_and_released(name))}
        return tuple(sorted(found))

    def write_off_rows(self, name: str, rows: Sequence[str], by: str, note: str) -> None:
        """Write down that quarantined rows, by name, are not owed; all of them, or none.

        Raises:
            Misconfigured: with every one that is not in quarantine.
        """
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            quarantined.write_off(connection, name, rows, by, note, self._now(connection), _BATCH)

    def rows_written_off(self, name: str) -> pd.DataFrame:
        """Return what was written off of a source: row_name, event_id, as_duplicate."""
        return self._frame(quarantined.decided(name))

    # --- comparing ---------------------------------------------------------------------------------------------------

    def begin_comparison(
        self, name: str, reading: Reading, periods: Sequence[Period], edition: int = 0
    ) -> frozenset[Period]:
        """Declare that a reading is being compared for `periods`, by an edition; earlier ones then send none.

        Return the periods for which a later one was compared: this one has no say about them. A reading without a
        number is a look of a dry run: it counts as the newest, and nothing is written down.

        Raises:
            Stale: those are all of them.
            Misconfigured: a period overlaps another that was compared, so rows would be billed under both; or it is
                billed by another edition meanwhile.
        """
        if not reading.extraction:
            with self._reading() as connection:
                _raise_if_overlapping(connection, name, periods)
            return frozenset()
        rows = [{"source": name, "period_start": p.start, "period_end": p.end, **asdict(reading)} for p in periods]
        statement = self._insert(compared_period)
        given = tuple_(statement.excluded.extraction, statement.excluded.validation)
        upsert = statement.on_conflict_do_update(
            index_elements=["source", "period_start", "period_end"],
            set_={name: statement.excluded[name] for name in asdict(reading)},
            where=queries.read_as(compared_period) < given,
        )
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            editions.raise_if_moved(connection, name, edition, periods)
            _raise_if_overlapping(connection, name, periods)
            stale = stale_periods(connection, name, reading, periods)
            if stale == frozenset(periods):
                raise Stale(
                    f"stale: a newer extraction of {name!r}, or a later validation of it, was compared for every usage "
                    f"period of {reading}; this run sends nothing, the newer one has the say"
                )
            connection.execute(upsert, rows)
        return stale

    def record_owed(self, name: str, reading: Reading, owed: Mapping[Period, Decimal]) -> None:
        """Write down what usage periods owe in all, where `reading` is the last one that was compared for them."""
        rows = [
            {"start": period.start, "until": period.end, "sum": f"{quantity:f}", "of": name}
            | {"number": reading.extraction, "outcome": reading.validation}
            for period, quantity in owed.items()
        ]
        with self._writing() as connection:
            for row in rows:
                connection.execute(queries.RECORD_OWED, row)

    def usually_owed(self, name: str, before: datetime, most: int, since: datetime = EVER.start) -> list[Decimal]:
        """Return what the last `most` usage periods from `since` to `before` owed in all, if they owed anything."""
        if before <= since:
            return []
        with self._reading() as connection:
            owed = connection.execute(queries.owed_in(name, Period(since, before), most)).scalars()
            return [Decimal(quantity) for quantity in owed]

    def record_measured(
        self, name: str, reading: Reading, measured: Sequence[Measured], columns: Mapping[str, str]
    ) -> None:
        """Write down what a reading that goes on had of its usage periods, and which columns its query returned.

        What a later reading had stays as it is.
        """
        named = {"source": name, "extraction": reading.extraction, "validation": reading.validation}
        rows = [
            {
                **named,
                "period_start": each.period.start,
                "period_end": each.period.end,
                "rows_read": each.rows,
                "rows_quarantined": each.rows_quarantined,
                "quantity": "" if each.quantity is None else f"{each.quantity:f}",
            }
            for each in measured
        ]
        with self._writing() as connection:
            if rows:
                connection.execute(self._of_the_newest(measured_period, rows[0]), rows)
            if columns:
                row = {**named, "columns": json.dumps(dict(columns), sort_keys=True)}
                connection.execute(self._of_the_newest(read_columns, row), [row])

    def _of_the_newest(self, table: Table, row: Mapping[str, Any]) -> Any:
        """Return the statement that writes such rows, each in the place of what no later reading had."""
        key = [column.name for column in table.primary_key]
        statement = self._insert(table)
        given = tuple_(statement.excluded.extraction, statement.excluded.validation)
        return statement.on_conflict_do_update(
            index_elements=key,
            set_={name: statement.excluded[name] for name in row if name not in key},
            where=queries.read_as(table) <= given,
        )

    def measured_before(self, name: str, before: datetime, most: int, since: datetime = EVER.start) -> list[Measured]:
        """Return what the last `most` usage periods from `since` to `before` had that had any rows, newest first."""
        if before <= since:
            return []
        with self._reading() as connection:
            rows = connection.execute(queries.measured_in(name, Period(since, before), most)).all()
        return [
            Measured(
                Period(row.period_start, row.period_end),
                row.rows_read,
                row.rows_quarantined,
                Decimal(row.quantity) if row.quantity else None,
            )
            for row in rows
        ]

    def columns_read(self, name: str) -> dict[str, str]:
        """Return which columns the query of a source returned in the newest reading that went on: type by name."""
        with self._reading() as connection:
            found = connection.execute(select(read_columns.c.columns).where(read_columns.c.source == name)).scalar()
        return dict(json.loads(found)) if found else {}

    def compared_before(self, name: str, moment: datetime, since: datetime = EVER.start) -> Period | None:
        """Return the last compared usage period of a source from `since` to `moment`, None if there is none."""
        if moment <= since:
            return None
        with self._reading() as connection:
            row = connection.execute(queries.compared_in(name, Period(since, moment))).first()
        return None if row is None else Period(row.period_start, row.period_end)

    def standing(self, name: str, window: Window, low: str = "", high: str = "g") -> pd.DataFrame:
        """Return every revision of a source's identities in ``[low, high)`` whose usage period lies in `window`.

        Columns: identity, revision, state, quantity, applied (both text), extraction, validation, token, reason,
        account, subscription, component, price_point, dimensions, period_start, period_end, address; sorted by identity
        and revision.
        """
        return self._frame(queries.standing(name, window, low, high))

    def has(self, name: str, window: Window | None, *states: State) -> bool:
        """Say whether any delivery for usage periods in `window`, or in all, stands in one of `states`."""
        statement = (
            select(delivery.c.token).where(queries.in_window(name, window), delivery.c.state.in_(states)).limit(1)
        )
        with self._reading() as connection:
            return connection.execute(statement).first() is not None

    # --- placing -----------------------------------------------------------------------------------------------------

    def displaced(
        self, name: str, edition: int, targets: pd.DataFrame, billed_until: datetime = EVER.start
    ) -> pd.DataFrame:
        """Return those of `targets` of which the account last led elsewhere, or was never seen, under an edition.

        Columns as `targets`: account, subscription, component, price_point and address; and ``since``, from which usage
        period on it leads there: after the last one that was compared and not before `billed_until`, or None for an
        account that was never seen.
        """
        with self._reading() as connection:
            return self._displaced(connection, name, edition, targets, billed_until)[[*targets.columns, "since"]]

    def place(
        self,
        name: str,
        edition: int,
        targets: pd.DataFrame,
        looked_up_at: datetime,
        billed_until: datetime = EVER.start,
    ) -> None:
        """Write down where accounts lead by now (columns of `displaced`), each that was never seen or led elsewhere.

        `looked_up_at` is when they began to be looked up, by the ledger's time. Until `billed_until` usage may have
        been billed of which this ledger does not know.

        Raises:
            NotApplied: of some of them a later look-up saw another place; nothing was written down.
        """
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            found = self._displaced(connection, name, edition, targets, billed_until)
            later = found.loc[found["seen_at"] > pd.Timestamp(looked_up_at), "account"]
            if len(later):
                raise NotApplied(
                    f"{len(later)} accounts of {name!r} (such as {later.iloc[0]!r}) were looked up by another run "
                    "meanwhile, and lead elsewhere; validate again"
                )
            if len(found):
                rows = found.assign(source=name, edition=edition, seen_at=looked_up_at).astype(object)
                connection.execute(insert(placement), rows.to_dict("records"))  # type: ignore[arg-type]

    def _displaced(
        self, connection: Connection, name: str, edition: int, targets: pd.DataFrame, billed_until: datetime
    ) -> pd.DataFrame:
        """Return `displaced` and ``seen_at``: when the place was seen that an account led to last."""
        place = ["subscription", "component", "price_point"]
        seen = [
            self._frame_of(
                connection, queries.placements(name, edition, some, " ".join(["account", *place, "seen_at"]))
            )
            for some in _batches(targets["account"].tolist())
        ]
        if not seen:
            return targets.reindex(columns=[*targets.columns, "since", "seen_at"])
        last = pd.concat(seen, ignore_index=True).drop_duplicates("account", keep="last")
        last["seen_at"] = pd.to_datetime(last["seen_at"], utc=True)
        both = targets.merge(last, on="account", how="left", suffixes=("", "_was"))
        elsewhere = pd.concat([both[word] != both[f"{word}_was"] for word in place], axis="columns").any(axis="columns")
        found = both[elsewhere]
        known = found["seen_at"].notna()
        since = connection.execute(queries.last_compared(name)).scalar() if known.any() else None
        moments = [max(since or EVER.start, billed_until) if seen_before else None for seen_before in known]
        return found[[*targets.columns, "seen_at"]].assign(since=pd.Series(moments, found.index, dtype=object))

    def placements(self, name: str, edition: int = 0, also: Sequence[str] = ()) -> pd.DataFrame:
        """Return every place of the accounts that moved under an edition, and of those `also` named, in order.

        Columns: number, account, subscription, component, price_point, address, since, decision, decided_by, note.
        """
        names = "number account subscription component price_point address since decision decided_by note"
        parts = [self._frame(queries.placements(name, edition, queries.moved(name, edition), names))]
        parts += [self._frame(queries.placements(name, edition, some, names)) for some in _batches(also)]
        whole = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
        return whole.drop_duplicates("number").sort_values(["account", "number"], ignore_index=True)

    def led_before(self, name: str, number: int, site: str, accounts: Sequence[str]) -> pd.DataFrame:
        """Return where accounts led last under other editions of a source on the same site: account, subscription.

        Left out are those that were seen under this edition.
        """
        names = "account subscription edition"
        parts = [self._frame(queries.placements(name, None, some, names)) for some in _batches(accounts)]
        found = pd.concat(parts or [pd.DataFrame(columns=names.split())], ignore_index=True)
        found = found[found["edition"].isin([one.number for one in self.editions(name) if one.site == site])]
        seen = found.loc[found["edition"] == number, "account"]
        rest = found[~found["account"].isin(seen)].drop_duplicates("account", keep="last")
        return rest[["account", "subscription"]].reset_index(drop=True)

    def moving(self, name: str) -> list[int]:
        """Return the editions of a source under which any account moved."""
        ours = placement.c.source == name, placement.c.since.is_not(None)
        with self._reading() as connection:
            found = connection.execute(select(placement.c.edition).where(*ours).distinct())
            return sorted(found.scalars())

    def decide_move(self, name: str, account: str, choice: Choice, by: str, note: str) -> bool:
        """Write down what a person chose for what an account used before it moved; False if that stood already.

        Raises:
            Misconfigured: the account has not moved, or something else was chosen before.
        """
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            names = "number subscription since decision decided_by decided_at"
            rows = connection.execute(queries.placements(name, None, [account], names)).all()
            moved = [row for row in rows if row.since is not None]
            if not moved:
                seen = f"only ever led to subscription {rows[-1].subscription}" if rows else "was never seen"
                raise Misconfigured(f"account {account!r} of {name!r} {seen}: there is no move to decide")
            open_ones = [row.number for row in moved if not row.decision]
            last = moved[-1]
            if not open_ones and last.decision != choice:
                raise Misconfigured(
                    f"account {account!r} of {name!r}: {last.decision} was chosen by {last.decided_by} on "
                    f"{last.decided_at:%Y-%m-%d}, and it stands: what was done by it is not undone"
                )
            values = {"decision": choice, "decided_by": by, "note": note, "decided_at": self._now(connection)}
            connection.execute(update(placement).where(placement.c.number.in_(open_ones)).values(values))
            return bool(open_ones)

    # --- approving ---------------------------------------------------------------------------------------------------

    def record_decision(
        self, name: str, reading: Reading, digest: str, decision: Decision, by: str = "", note: str = ""
    ) -> Approval:
        """Write down what was decided about the deliveries of a plan, which `digest` names, and by whom."""
        row = {"source": name, **asdict(reading), "digest": digest, "decision": decision, "note": note}
        with self._writing() as connection:
            row |= {"decided_by": by, "decided_at": self._now(connection)}
            connection.execute(insert(approval).values(row))
        return Approval(name, reading, digest, decision, by, note, row["decided_at"])

    def decision(self, name: str, reading: Reading, digest: str) -> Approval | None:
        """Return the last that was decided about the deliveries that `digest` names, None if nobody was asked."""
        with self._reading() as connection:
            row = connection.execute(queries.approvals(name, reading, digest).limit(1)).first()
        if row is None:
            return None
        return Approval(name, reading, digest, Decision(row.decision), row.decided_by, row.note, row.decided_at)

    def unseen(self, name: str, reading: Reading) -> str:
        """Return the token of a delivery of a reading that is reserved, and that nobody approved or let go; or nothing.

        What was written down before the reading was approved stood in no plan that a person has seen.
        """
        with self._reading() as connection:
            return connection.execute(queries.unapproved(name, reading).limit(1)).scalar() or ""

    # --- delivering --------------------------------------------------------------------------------------------------

    def reserve(self, name: str, site: str, reading: Reading, proposals: pd.DataFrame) -> Reserved:
        """Write proposals down before anything is sent, in one transaction with the check that they are still right.

        `proposals`, sorted by identity, has the columns of `delivery` up to `body`; `state` is ``reserved``, ``held``,
        or ``refused`` by the source itself; or ``superseded`` for a row that only withdraws an open one. A proposal
        whose identity has another last revision than the plan saw is not written: it has moved, and has to be planned
        again. So does one for whose usage period a later reading was compared. One that names itself in ``supersedes``
        stands there already, and stays: this reading confirms it, with its reason of now.

        What a chunk of raw events may hold hangs on all others of its usage period: proposals of chunks, one period in
        one call, have a column ``basis`` (see `bases`), and move where the ledger has another one by now.
        """
        if proposals.empty:
            return Reserved(0, 0, 0)
        periods = _periods(proposals)
        window = Period.around(periods)
        chunks = "basis" in proposals
        low, high = ("", "g") if chunks else (proposals["identity"].iloc[0], proposals["identity"].iloc[-1] + "~")
        with self._writing() as connection:
            # On PostgreSQL this row is the lock under which one source reserves; SQLite has one writer anyway.
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            stale = [period.start for period in stale_periods(connection, name, reading, periods)]
            now = self._now(connection)
            known = self._frame_of(connection, queries.standing(name, window, low, high))
            last = known.groupby("identity")["revision"].max()
            base = proposals["identity"].map(last).fillna(-1).astype(int)
            # An earlier try of the same plan; the same token from another reading means that it has moved.
            ours = (known["extraction"] == reading.extraction) & (known["validation"] == reading.validation)
            ours &= ~(chunks & (known["state"] == State.SUPERSEDED))
            already = proposals["token"].isin(known.loc[ours, "token"])
            stays = proposals["supersedes"] == proposals["token"]
            seen = proposals["revision"] - (~stays).astype(int)
            sound = ~already & (base == seen) & ~proposals["period_start"].isin(stale)
            if chunks:
                found = bases(known)
                sound &= proposals["basis"] == [found.get(start, "") for start in proposals["period_start"]]
            if not (
                self._supersede(connection, proposals.loc[sound & ~stays, "supersedes"], now)
                and self._confirm(connection, proposals[sound & stays], reading)
            ):
                # A worker took one of them between the plan and here: nothing of this batch holds any more.
                connection.rollback()
                return Reserved(0, 0, len(proposals))
            fresh = proposals[sound & ~stays & (proposals["state"] != State.SUPERSEDED)]
            if not fresh.empty:
                connection.execute(insert(delivery), _rows(fresh, name, site, reading, now))
        moved = int((~already & ~sound).sum())
        return Reserved(written=int((sound & ~stays).sum()), already=int((already & ~stays).sum()), moved=moved)

    def reserved(self, name: str, reading: Reading, limit: int, after: str = "") -> list[Delivery]:
        """Return up to `limit` deliveries of one reading that are ready to be sent, by token, above `after`."""
        binds = {"of": name, "number": reading.extraction, "validation": reading.validation}
        binds |= {"after": after, "most": limit}
        with self._reading() as connection:
            return [_delivery(row) for row in connection.execute(queries.RESERVED, binds).mappings()]

    def resumable(
        self, name: str, limit: int, after: str = "", span: Period = EVER, *, approved: bool = False
    ) -> list[Delivery]:
        """Return up to `limit` deliveries of a span, by token, that stand and for which no run is needed.

        They were sent and turned out not to be there, or a person released them. With `approved` only those that a
        person released, or of whose reading a person approved a plan.
        """
        binds = {"of": name, "after": after, "most": limit, "begin": span.start, "until": span.end}
        statement = queries.RESUMABLE_WITH_A_YES if approved else queries.RESUMABLE
        with self._reading() as connection:
            return [_delivery(row) for row in connection.execute(statement, binds).mappings()]

    def unapproved(self, name: str, span: Period = EVER) -> int:
        """Return how many of a span's deliveries for which no run is needed nobody has approved or released."""
        binds = {"of": name, "begin": span.start, "until": span.end}
        with self._reading() as connection:
            return int(connection.execute(queries.RESUMABLE_WITHOUT, binds).scalar_one())

    def hold(self, reasons: Mapping[str, str], let_go: str = "") -> int:
        """Hold reserved deliveries, each token for its reason, and return how many were still reserved.

        `let_go` is what released those of them that pass, now or once the site has renewed; one that the source refuses
        is refused, unless it was released before.
        """
        held = 0
        with self._writing() as connection:
            for token, reason in reasons.items():
                this_one = update(delivery).where(delivery.c.token == token, delivery.c.state == State.RESERVED)
                values: dict[str, Any] = {"state": State.HELD, "reason": reason}
                if reason.startswith(REFUSED_HERE):
                    values["state"] = case((delivery.c.released == "", State.REFUSED), else_=State.HELD)
                elif reason.startswith((PASSES, PASSES_SOON)):
                    values["released"] = case((delivery.c.released == "", let_go), else_=delivery.c.released)
                held += connection.execute(this_one.values(values)).rowcount
        return held

    def released(self, name: str, window: Window | None = None) -> pd.DataFrame:
        """Return what a person released of a source in `window`, or in all, and is held or refused still, by identity.

        Only what the newest reading owes just so, and no more of what waits for quarantined rows. Columns: token,
        identity, revision, quantity (text), account, subscription, component, price_point, dimensions, period_start,
        period_end, address, reason, released.
        """
        found = self._frame(queries.released(name, window))
        return found.assign(**{edge: pd.to_datetime(found[edge], utc=True) for edge in ("period_start", "period_end")})

    def reissue(self, name: str, site: str, revisions: pd.DataFrame) -> int:
        """Write down new revisions of what was released, ready to be sent; return how many were still to be replaced.

        `revisions` has the columns of `delivery` up to `body`, without a state, and in ``supersedes`` the token that is
        held. What has moved since it was read stays as it is by now.
        """
        if revisions.empty:
            return 0
        fresh = revisions.assign(state=State.RESERVED, reason="")
        written = 0
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            now = self._now(connection)
            rows = _rows(fresh, name, site, Reading(0), now)
            for row, held in zip(rows, fresh["supersedes"], strict=True):
                # The reading that has the say about it by now, which may have confirmed it meanwhile.
                taken = connection.execute(queries.TAKE_RELEASED, {"of": held, "now": now}).mappings().one_or_none()
                if taken is not None:
                    connection.execute(insert(delivery), [row | dict(taken)])
                    written += 1
        return written

    def explain_released(self, reasons: Mapping[str, str]) -> None:
        """Write down, by token, why what was released cannot go yet."""
        with self._writing() as connection:
            for token, why in reasons.items():
                connection.execute(queries.EXPLAIN_RELEASED, {"of": token, "why": why})

    def begin_sending(self, tokens: Sequence[str], held: Lease) -> frozenset[str]:
        """Put reserved deliveries in the air under a lease; return those that are now ours to send, and only those.

        A token stays behind if another worker has it, if the lease is lost, or if a later reading was compared.
        """
        with self._writing() as connection:
            binds = {"tokens": tokens, "held": held.fence, "now": self._now(connection)}
            return frozenset(connection.execute(queries.BEGIN_SENDING, binds).scalars())

    def may_send(self, token: str, held: Lease, good_for: timedelta) -> bool:
        """Say whether a claimed delivery may still go out: its claim is younger than `good_for`, its lease alive."""
        with self._reading() as connection:
            now = self._now(connection)
            binds = {"of": token, "held": held.fence, "now": now, "since": now - good_for}
            return bool(connection.execute(queries.MAY_SEND, binds).scalar_one())

    def accept(self, receipts: Iterable[Receipt], held: Lease) -> int:
        """Write the receipts of deliveries that this lease sent; return how many were still its own to write.

        What the site did not count of one is held, as its next revision: no run may come to plan it.
        """
        rows = [{"of": receipt.token, **_proof(receipt)} for receipt in receipts]
        if not rows:
            return 0
        with self._writing() as connection:
            now = self._now(connection)
            same = {"held": held.fence, "now": now}
            accepted = connection.execute(queries.ACCEPT, [row | same for row in rows]).rowcount
            _list_rest(connection, [row["of"] for row in rows if row["counted"]], now)
            return accepted

    def land(self, tokens: Sequence[str], state: State, reason: str, held: Lease) -> int:
        """Move deliveries that this lease sent on to `reserved`, `refused` or `in_doubt`; return how many moved."""
        moved = 0
        with self._writing() as connection:
            now = self._now(connection)
            values: dict[str, Any] = {"state": state, "reason": reason, "settled_at": None}
            if state is State.REFUSED:
                # A person let it go once: a second refusal is for them again.
                values |= {"settled_at": now, "released": ""}
            for some in _batches(tokens):
                statement = update(delivery).where(delivery.c.token.in_(some), queries.sent_under(held.fence, now))
                moved += connection.execute(statement.values(values)).rowcount
        return moved

    def doubt_abandoned(self, name: str) -> int:
        """Put in doubt what a worker left in the air when its lease ran out; return how many."""
        sending = update(delivery).where(delivery.c.source == name, delivery.c.state == State.SENDING)
        with self._writing() as connection:
            alive = queries.fence_alive(delivery.c.fence, self._now(connection))
            values = {"state": State.IN_DOUBT, "reason": "its worker ended before it wrote down an outcome"}
            return connection.execute(sending.where(~alive).values(values)).rowcount

    def doubts(self, name: str, window: Window | None = None) -> list[Delivery]:
        """Return the deliveries in doubt of a source in `window`, or in all, the longest waiting first."""
        statement = select(delivery).where(queries.in_window(name, window), delivery.c.state == State.IN_DOUBT)
        return self._deliveries(statement.order_by(delivery.c.sent_at, delivery.c.token))

    def in_the_air(self, name: str, window: Window | None = None) -> int:
        """Return how many deliveries of `window`, or of all, some worker is sending right now."""
        statement = select(func.count()).where(queries.in_window(name, window), delivery.c.state == State.SENDING)
        with self._reading() as connection:
            return int(connection.execute(statement).scalar_one())

    def settle_doubt(self, doubt: Delivery, state: State, receipt: Receipt | None = None, reason: str = "") -> bool:
        """Settle one doubt as `accepted` (with its receipt), `reserved` or `refused`; False if it no longer is one.

        The number of sends is part of the comparison: an answer about an earlier send must not settle a later one.
        """
        this_one = update(delivery).where(
            delivery.c.token == doubt.token, delivery.c.state == State.IN_DOUBT, delivery.c.sends == doubt.sends
        )
        proof = _proof(receipt or Receipt(doubt.token, note=reason))
        values = {"record_id": proof["record"], "reason": proof["note"], "applied": proof["counted"]}
        values |= {"released": ""} if state is State.REFUSED else {}
        with self._writing() as connection:
            now = self._now(connection)
            settled = now if state in {State.ACCEPTED, State.REFUSED} else None
            ended = connection.execute(this_one.values(state=state, settled_at=settled, **values)).rowcount == 1
            _list_rest(connection, [doubt.token] if ended and values["applied"] else [], now)
            return ended

    def decide(self, tokens: str | Sequence[str], state: State, by: str, counted: Decimal | None = None) -> None:
        """Write down what a person decided about one delivery or several, of all or none, with who and why.

        What is held or refused can be `written_off`: it is settled, and never billed. It can be released (as `held`): a
        new revision goes with the next run of its period or the next sweep. A doubt that no waiting ends can be
        `accepted` (`counted` is how much of it the site counts) or `reserved` (it has none of it: it is sent again).
        Any other doubt is for the site to settle: what a person saw there may have changed since. Only one that has
        been open for `DECIDABLE_AFTER` may be decided all the same.

        Raises:
            Misconfigured: there is no such delivery, or it does not stand where this can be decided; with every fault.
        """
        names = [tokens] if isinstance(tokens, str) else sorted(set(tokens))
        with self._writing() as connection:
            rows, now = {name: self._to_decide(connection, name) for name in names}, self._now(connection)
            faults = [
                f"token {name}: {wrong}"
                for name, row in rows.items()
                if (wrong := why_undecidable(connection, row, state, counted, now))
            ]
            if faults:
                raise Misconfigured(faults[0]) if len(names) == 1 else Misconfigured.all_at_once("not decided", faults)
            values: dict[str, Any] = {"released": by}
            if state is not State.HELD:
                settled = None if state is State.RESERVED else now
                values = {"state": state, "reason": by, "settled_at": settled}
                values["applied"] = "" if counted is None else f"{counted:f}"
            for some in _batches(names):
                connection.execute(update(delivery).where(delivery.c.token.in_(some)).values(values))
            if counted is not None:
                _list_rest(connection, names, now)

    @staticmethod
    def _to_decide(connection: Connection, token: str) -> Any:
        return connection.execute(select(delivery).where(delivery.c.token == token).with_for_update()).one_or_none()

    # --- adopting ----------------------------------------------------------------------------------------------------

    @property
    def ledger_id(self) -> str:
        """The name that no other ledger has; a copy of this one has it too."""
        with self._reading() as connection:
            name: str = connection.execute(select(ledger.c.ledger_id)).scalar_one()
            return name

    def holder_of(self, fence: int) -> str | None:
        """Return who took the lease with this fence, or None if this ledger never gave it out."""
        with self._reading() as connection:
            return connection.execute(select(lease.c.holder).where(lease.c.fence == fence)).scalar_one_or_none()

    def number_above(self, number: int) -> None:
        """Let all later extractions have larger numbers than `number`, which staging has seen and this ledger may not.

        A run of before, whose tasks are cleared now, must not meet the rows of another one under its own number.
        """
        statements = queries.NUMBER_ABOVE[self._engine.dialect.name]
        with self._writing() as connection:
            for statement in statements:
                connection.execute(statement, {"least": number})

    def known(self, tokens: Sequence[str]) -> pd.DataFrame:
        """Return what this ledger has of `tokens`.

        Columns: token, identity, revision, source, state, quantity, record_id and reason.
        """
        names = ["token", "identity", "revision", "source", "state", "quantity", "record_id", "reason"]
        columns = [delivery.c[name] for name in names]
        parts = [self._frame(select(*columns).where(delivery.c.token.in_(some))) for some in _batches(tokens)]
        return pd.concat(parts) if parts else pd.DataFrame(columns=names)

    def adopt(
        self,
        name: str,
        site: str,
        reading: Reading,
        found: pd.DataFrame,
        answers: Mapping[str, Receipt | InDoubt],
        reason: str,
    ) -> None:
        """Enter what the site holds and this ledger had forgotten, in one transaction.

        `found` has the columns of `delivery` up to `body`, ``record_id``, ``applied`` and ``doubt``: it is accepted,
        or in doubt for that reason. `answers` gives, by token, the same of each open delivery that the site turned out
        to hold. Where a later revision is entered, an open one before it ends as superseded: it had come to its end
        before the later one was made.

        Raises:
            NotApplied: a delivery of the source is being sent, or one of these has moved; nothing was entered.
            ValueError: a later revision than one that is in doubt was to be entered.
        """
        with self._writing() as connection:
            connection.execute(select(source).where(source.c.name == name).with_for_update())
            sending = select(delivery.c.token).where(delivery.c.source == name, delivery.c.state == State.SENDING)
            if connection.execute(sending.limit(1)).first() is not None:
                raise NotApplied(f"deliveries of {name!r} are being sent: adopt again when the deliver task has ended")
            now = self._now(connection)
            same = {"note": reason, "now": now}
            # One by one: how many rows of a batch matched is not told by every driver.
            taken = [
                connection.execute(queries.ADOPT_OPEN, {"of": token, **_proof(answer), **same}).rowcount
                if isinstance(answer, Receipt)
                else connection.execute(queries.DOUBT_OPEN, {"of": token, "note": str(answer), "now": now}).rowcount
                for token, answer in answers.items()
            ]
            if sum(taken) != len(answers) or _any_known(connection, found["token"].tolist()):
                raise NotApplied(f"deliveries of {name!r} moved while the site was asked; adopt again")
            if found.empty:
                return
            open_ones = found["doubt"] != ""
            entered = found.assign(state=State.ACCEPTED, reason=reason)
            entered.loc[open_ones, "state"] = State.IN_DOUBT
            entered.loc[open_ones, "reason"] = found["doubt"] + f" ({reason})"
            rows = _rows(entered, name, site, reading, now)
            closed = [{"of": row["identity"], "up_to": row["revision"], **same} for row in rows]
            connection.execute(queries.CLOSE_BELOW, closed)
            doubts = [token for token, answer in answers.items() if isinstance(answer, InDoubt)]
            if _any_known(connection, doubts, delivery.c.state != State.IN_DOUBT):
                raise ValueError("a revision was entered above one that is in doubt")
            for row, record_id, applied in zip(rows, found["record_id"], found["applied"], strict=True):
                settled = row["state"] == State.ACCEPTED
                row.update(record_id=record_id, applied=applied, settled_at=now if settled else None)
                row.update(sent_at=None if settled else now)
            connection.execute(insert(delivery), rows)

    # --- reporting ---------------------------------------------------------------------------------------------------

    def accepted(self, name: str, window: Window) -> pd.DataFrame:
        """Return the accepted deliveries of a source in `window`, with quantity as text, sorted by identity."""
        columns = [c for c in delivery.c if c.name not in {"body", "dimensions", "price_point"}]
        statement = select(*columns).where(queries.in_window(name, window), delivery.c.state == State.ACCEPTED)
        return self._frame(statement.order_by(delivery.c.identity, delivery.c.revision))

    def outdated(self, name: str, reading: Reading, periods: Sequence[Period]) -> frozenset[Period]:
        """Return the periods for which a later one than `reading` was compared."""
        with self._reading() as connection:
            return stale_periods(connection, name, reading, periods)

    def accepted_at(
        self,
        site: str,
        subscriptions: Sequence[str],
        component: str,
        window: Period,
        states: Sequence[State] = (State.ACCEPTED,),
    ) -> pd.DataFrame:
        """Return what all sources had accepted for one component of a site: subscription, period_start, quantity, body.

        A usage period that `window` cuts in two is there with its `body`, which tells where it was billed, and so is
        one that may have come late, into a later billing period; others have an empty one. `states` are those to look
        for instead.
        """
        cut = or_(
            delivery.c.period_start < window.start,
            delivery.c.period_end > window.end,
            delivery.c.open_until > window.end,
        )
        body = case((cut, delivery.c.body), else_="").label("body")
        parts = [
            self._frame(
                select(delivery.c.subscription, delivery.c.period_start, queries.COUNTED.label("quantity"), body).where(
                    delivery.c.site == site,
                    delivery.c.component == component,
                    delivery.c.subscription.in_(some),
                    queries.may_count_in(window),
                    delivery.c.state.in_(states),
                )
            )
            for some in _batches(sorted(set(subscriptions)))
        ]
        return (
            pd.concat(parts, ignore_index=True)
            if parts
            else pd.DataFrame(columns=["subscription", "period_start", "quantity", "body"])
        )

    def chunks_at(
        self, site: str, component: str, window: Period, states: Sequence[State] = (State.ACCEPTED,)
    ) -> list[dict[str, Any]]:
        """Return the address of every chunk of raw events that was accepted for a component and touches `window`.

        `states` are those to look for instead.
        """
        statement = select(delivery.c.address).where(
            delivery.c.site == site,
            delivery.c.component == component,
            delivery.c.subscription == "",
            queries.may_count_in(window),
            delivery.c.state.in_(states),
        )
        with self._reading() as connection:
            found = connection.execute(statement.order_by(delivery.c.token)).scalars()
            return [json.loads(address) for address in found]

    def open_items(self, name: str, window: Window | None) -> pd.DataFrame:
        """Return what is listed by name for `window`, or all: reserved, sending, in doubt, held, refused, and why."""
        states = (State.RESERVED, State.SENDING, State.IN_DOUBT, State.HELD, State.REFUSED)
        statement = select(delivery).where(queries.in_window(name, window), delivery.c.state.in_(states))
        return self._frame(statement.order_by(delivery.c.state, delivery.c.identity))

    def held_for_moves(self, name: str) -> dict[tuple[str, str, str, datetime], Decimal]:
        """Return what is held since its account moved, by subscription, component, price point and period start."""
        names = ("subscription", "component", "price_point", "period_start")
        columns = [*(delivery.c[word] for word in names), delivery.c.quantity]
        ours = delivery.c.source == name, delivery.c.state == State.HELD
        statement = select(*columns).where(*ours, delivery.c.reason.startswith(MOVED, autoescape=True))
        sums: dict[tuple[str, str, str, datetime], Decimal] = {}
        with self._reading() as connection:
            for *key, quantity in connection.execute(statement):
                sums[tuple(key)] = sums.get(tuple(key), Decimal(0)) + Decimal(quantity)
        return sums

    # --- inside ------------------------------------------------------------------------------------------------------

    def _now(self, connection: Connection) -> datetime:
        """Return the ledger's time, read inside a transaction: waiting for a lock must not make it old."""
        if self._clock is not None:
            return self._clock()
        if self._engine.dialect.name == "postgresql":
            moment: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
            return moment.astimezone(UTC)
        return datetime.now(UTC)

    def _writing(self) -> AbstractContextManager[Connection]:
        return self._engine.begin()

    def _reading(self) -> Connection:
        return self._engine.connect().execution_options(reading=True)

    def _insert(self, table: Any) -> Any:
        return (postgresql if self._engine.dialect.name == "postgresql" else sqlite).insert(table)

    def _frame(self, statement: Select[Any]) -> pd.DataFrame:
        with self._reading() as connection:
            return self._frame_of(connection, statement)

    @staticmethod
    def _frame_of(connection: Connection, statement: Select[Any]) -> pd.DataFrame:
        result = connection.execute(statement)
        return pd.DataFrame(result.fetchall(), columns=list(result.keys()))

    def _deliveries(self, statement: Select[Any]) -> list[Delivery]:
        with self._reading() as connection:
            return [_delivery(row) for row in connection.execute(statement).mappings()]

    @staticmethod
    def _confirm(connection: Connection, held: pd.DataFrame, reading: Reading) -> bool:
        """Let a reading have the say about what stays held; False if one of them moved meanwhile."""
        same = {"number": reading.extraction, "outcome": reading.validation}
        binds = [
            {"of": row.token, "last": row.revision, "why": row.reason, **same}
            for row in held[["token", "revision", "reason"]].itertuples()
        ]
        return all(connection.execute(queries.CONFIRM, bind).rowcount == 1 for bind in binds)

    @staticmethod
    def _supersede(connection: Connection, tokens: pd.Series, now: datetime) -> bool:
        """Close the revisions that newer ones replace; False if one of them is on its way to the site."""
        states = (State.RESERVED, State.HELD, State.REFUSED)
        for some in _batches([token for token in tokens if token]):
            statement = update(delivery).where(delivery.c.token.in_(some), delivery.c.state.in_(states))
            moved = connection.execute(statement.values(state=State.SUPERSEDED, settled_at=now)).rowcount
            if moved != len(some):
                return False
        return True


def _why_not_fed(name: str, other: Any) -> str:
    return (
        f"component {other.component} of {other.site} is fed by source {other.source!r}: if {name!r} is its new name, "
        f"say `formerly: {other.source}`; if it bills other usage, say `shares_component_with: [{other.source}]`"
    )


def bases(standing: pd.DataFrame) -> dict[datetime, str]:
    """Return what a plan of chunks rests on, by the start of the usage period: a digest of which rows stand there.

    Two sets are the same if the same rows wait (a plan may replace them) and the same rows do not (the events in them
    are sent, on their way, or refused): how far one has come on its way changes no plan.
    """
    rows = standing[standing["state"] != State.SUPERSEDED]
    waits = rows["state"].isin([State.RESERVED, State.HELD]).map({True: "waits", False: "stands"})
    lines = (rows["token"] + " " + waits).groupby(rows["period_start"])
    return {start: sha256("\n".join(sorted(some)).encode()).hexdigest() for start, some in lines}


def _raise_if_overlapping(connection: Connection, name: str, periods: Sequence[Period]) -> None:
    touching = connection.execute(queries.touching(name, Period.around(periods)))
    before = {Period(row.period_start, row.period_end) for row in touching}
    for one, other in pairwise(sorted(before | set(periods))):
        if other.start < one.end:
            raise Misconfigured(
                f"billing source {name!r}: the usage periods {one} and {other} overlap, and the rows of both would be "
                "billed twice: run the intervals that were run before, or bill the new ones as a source of their own"
            )


def _list_rest(connection: Connection, tokens: Sequence[str], now: datetime) -> None:
    """Hold what the site did not count of accepted deliveries, unless a later revision speaks of it already."""
    for row in connection.execute(queries.counted_in_part(tokens)).mappings().all() if tokens else ():
        revision, rest = row["revision"] + 1, Decimal(row["quantity"]) - Decimal(row["applied"])
        if not rest:
            continue
        token = uniqueness_token(row["identity"], revision)
        why = f"left of {row['quantity']}, of which the site counted {row['applied']}"
        values = {"token": token, "revision": revision, "quantity": f"{rest:f}", "state": State.HELD, "reason": why}
        connection.execute(insert(delivery).values({**row, **values, **_UNSENT, "reserved_at": now}))


_UNSENT: Mapping[str, Any] = {
    "body": "", "fence": None, "sends": 0, "sent_at": None, "settled_at": None, "record_id": "", "applied": "",
    "released": "",
}  # fmt: skip
"""The columns of a delivery that was never on its way."""


def _any_known(connection: Connection, tokens: Sequence[str], *which: ColumnElement[bool]) -> bool:
    """Say whether one of `tokens` is written down already, as `which` says."""
    looks = (select(delivery.c.token).where(delivery.c.token.in_(some), *which).limit(1) for some in _batches(tokens))
    return any(connection.execute(look).first() is not None for look in looks)


def _batches(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[start : start + _BATCH] for start in range(0, len(values), _BATCH))


def _periods(proposals: pd.DataFrame) -> list[Period]:
    spans = proposals[["period_start", "period_end"]].drop_duplicates()
    return [
        Period(start.to_pydatetime(), end.to_pydatetime())
        for start, end in zip(spans["period_start"], spans["period_end"], strict=True)
    ]


def _rows(fresh: pd.DataFrame, name: str, site: str, reading: Reading, now: datetime) -> list[dict[str, Any]]:
    columns = "token identity revision account subscription component price_point dimensions".split()
    columns += "quantity state reason address body".split()
    columns += ["released"] if "released" in fresh else []
    rows = fresh[columns].astype({"revision": object})
    rows = rows.assign(source=name, site=site, reserved_at=now, **asdict(reading))
    for column in ("period_start", "period_end"):
        rows[column] = pd.Series(fresh[column].dt.to_pydatetime(), index=fresh.index, dtype=object)
    if "open_until" in fresh:
        moments = [None if pd.isna(moment) else moment.to_pydatetime() for moment in fresh["open_until"]]
        rows["open_until"] = pd.Series(moments, index=fresh.index, dtype=object)
    return rows.to_dict("records")  # type: ignore[return-value]


def _proof(receipt: Receipt) -> dict[str, str]:
    counted = "" if receipt.applied is None else f"{receipt.applied:f}"
    return {"record": receipt.record_id, "note": receipt.note, "counted": counted}


def _extraction(row: RowMapping) -> Extraction:
    names = "number source interval_start interval_end window_start window_end rows_read rows_quarantined".split()
    return Extraction(**{column: row[column] for column in names})


def _delivery(row: RowMapping) -> Delivery:
    return Delivery(
        token=row["token"],
        identity=row["identity"],
        revision=row["revision"],
        quantity=Decimal(row["quantity"]),
        address=Delivery.address_from(row["address"]),
        body=row["body"],
        sent_at=row["sent_at"],
        sends=row["sends"],
        reserved_at=row["reserved_at"],
        open_until=row["open_until"],
        reason=row["reason"],
        period=Period(row["period_start"], row["period_end"]),
        subscription=row["subscription"],
    )
