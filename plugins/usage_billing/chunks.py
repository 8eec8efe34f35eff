"""Raw events against the ledger: which are still to be sent, as archived chunks. A plan sends and reserves nothing.

Where a stream's metric is no sum, no difference of totals says what is owed, so each accepted row is an event of its
own. What was sent is told by the archived chunks that stand in the ledger: an event that is in one of them is never
sent again, however late it comes up and whatever the site has forgotten; what is left is cut into chunks anew. An event
that vanished from the warehouse or changed there, after it was sent, is listed by name: no call takes one back.

Both sides are set aside by ranges of the token and joined range by range, so memory holds a range, one chunk of each
kind, and the ledger's rows of the compared periods, of which there is one to a chunk.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing import quantities
from usage_billing.archive import EVENTS, Archived
from usage_billing.destinations.base import LARGEST_BULK, Destination
from usage_billing.errors import Misconfigured, NeedsDecision
from usage_billing.ledger import Ledger, bases
from usage_billing.moves import Moves, Places
from usage_billing.periods import locate
from usage_billing.records import MOVED, REFUSED_HERE, UNAPPROVED, Comparison, Period, Plan, Reading, State, Tally
from usage_billing.staging import Spill, Staging
from usage_billing.uniqueness import event_tokens, identity, uniqueness_token

_SHARE_AFTER_REFUSAL = 10
_MAX_RANGES = 256
_EXAMPLES = 3

_GOES, _CLOSED, _UNKNOWN, _REFUSES, _MOVED = range(5)
_WHY_CLOSED = "its billing period is closed: the site would take the events and never bill them"
_WHY_HELD = (
    "",
    _WHY_CLOSED,
    "the open billing period of its accounts is not known",
    f"{REFUSED_HERE}{_WHY_CLOSED}",
    f"{MOVED}its accounts lead elsewhere than when its period was billed: `usage-billing ledger moves` names them",
)
_STATES = (State.RESERVED, State.HELD, State.HELD, State.REFUSED, State.HELD)
"""In which state a chunk is born, by why it may not go."""

_DELIVERED, _IN_THE_AIR, _REFUSED_ALONE, _REFUSED_TOGETHER = range(4)
_STANDS = {
    State.ACCEPTED: _DELIVERED,
    State.WRITTEN_OFF: _DELIVERED,
    State.SENDING: _IN_THE_AIR,
    State.IN_DOUBT: _IN_THE_AIR,
    State.REFUSED: _REFUSED_TOGETHER,
}
"""What the state of a chunk means for its events; those of any other state are cut anew."""
_REPLACEABLE = (State.RESERVED, State.HELD, State.REFUSED)

_UTC = pa.timestamp("us", "UTC")
_ARRIVED = pa.schema(
    [
        *EVENTS,
        ("original", pa.string()),
        ("period", pa.int32()),
        ("why", pa.int32()),
        ("open_until", _UTC),
        ("most", pa.int32()),
    ]
)
_SENT = pa.schema([*EVENTS, ("period", pa.int32()), ("row", pa.int32())])
_TEXTS = "token identity state reason supersedes quantity account subscription component price_point dimensions".split()
_PROPOSALS = pa.schema(
    [
        *((name, pa.string()) for name in _TEXTS),
        ("revision", pa.int64()),
        *((name, _UTC) for name in ("period_start", "period_end", "open_until")),
        *((name, pa.string()) for name in ("address", "body", "basis")),
    ]
)


def plan_events(
    comparison: Comparison, destination: Destination, ledger: Ledger, staging: Staging, folder: str
) -> Plan:
    """Return what is still to be sent of `comparison.events`, as chunks that the archive keeps, staged below `folder`.

    Proposals have the columns that `Ledger.reserve` takes; their address says which archived chunk they are. All
    chunks of a usage period travel in one part, since each hangs on all others.

    Raises:
        Stale: a later reading of all of the same periods was compared; what it left alone is still planned.
        NeedsDecision: more than `max_withdraw_share` of the billed events have vanished from the warehouse. A look,
            whose reading has no number, says so in its plan.
        Misconfigured: a chunk that was sent is missing in the archive, or was altered, so nothing may be sent; or
            another source feeds the same component, and ``source.yaml`` does not say so.
    """
    source = destination.source
    targets = pa.concat_tables(staging.read(comparison.targets))
    components = targets.column("component").to_pylist()
    shared = source.settings.shares_component_with
    ledger.feed(source.name, destination.site, comparison.reading, components, shared)
    stale = ledger.begin_comparison(source.name, comparison.reading, comparison.periods, source.edition)
    book = _Book(ledger.standing(source.name, comparison.periods), comparison, stale)
    with Spill() as left, Spill() as changed, Spill() as vanished:
        join = _Join(book, destination.events_to_chunk, left, changed, vanished)
        places = Places(targets, comparison.periods, Moves.staged(source.name, comparison.moves, staging))
        _compare(comparison, _Arrivals(comparison, destination, places), staging, join)
        writer = _Writer(comparison, destination, book, join, _component(targets, book))
        proposals = staging.write(folder, "proposals", writer.parts())
    join.check(comparison.rows_accepted, writer.cut)
    much = _why_much_vanished(join, destination)
    if much and comparison.reading.extraction:
        raise NeedsDecision(much)
    owed = quantities.total(_column(staging.read(comparison.totals), "quantity", source.settings.meter.decimals))
    tally = replace(writer.tally, owed=owed, settled=_settled(book, destination))
    return Plan(proposals=proposals, tally=tally, withdraws_much=much)


def _column(parts: Iterable[pa.Table], name: str, decimals: int) -> pd.Series:
    """Return the sum of each part's scaled column."""
    return pd.Series(
        [quantities.total(quantities.to_scaled(part.column(name), decimals)) for part in parts], dtype=object
    )


def _component(targets: pa.Table, book: "_Book") -> str:
    named: list[str] = targets.column("component").to_pylist() or [row.component for row in book.rows]
    return named[0] if named else ""


def _settled(book: "_Book", destination: Destination) -> int:
    sums = [row.address["sum"] for row in book.rows if row.state is State.ACCEPTED and row.kind == "chunk"]
    return quantities.total(
        quantities.from_text(pd.Series(sums, dtype=object), destination.source.settings.meter.decimals)
    )


# --- what the ledger has --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One delivery of the compared periods: a chunk that is to be sent or was, or a list of events to decide about."""

    token: str
    identity: str
    revision: int
    state: State
    reason: str
    reading: Reading
    period: Period
    component: str
    address: dict[str, Any]

    @property
    def kind(self) -> str:
        kind: str = self.address["kind"]
        return kind

    @property
    def kept(self) -> Archived:
        return Archived.at(self.address)

    @property
    def stands(self) -> int | None:
        """What its events are, None where they are cut anew."""
        if self.kind != "chunk" or (self.state is State.REFUSED and self.reason.startswith(REFUSED_HERE)):
            return None
        alone = self.state is State.REFUSED and self.kept.rows == 1
        return _REFUSED_ALONE if alone else _STANDS.get(self.state)


class _Book:
    """What stands in the ledger for the compared usage periods."""

    def __init__(self, standing: pd.DataFrame, comparison: Comparison, stale: frozenset[Period]) -> None:
        self.rows = [_row(values) for values in standing.to_dict("records")]
        self.last = {row.identity: row for row in self.rows}
        self.reading = comparison.reading
        self.periods = comparison.periods
        self.fresh = np.array([period not in stale for period in comparison.periods])
        self._bases = bases(standing)
        self._places = {period: place for place, period in enumerate(comparison.periods)}

    def place(self, period: Period) -> int:
        """Return the number of a compared period, -1 for one that is not compared."""
        return self._places.get(period, -1)

    def basis(self, period: Period) -> str:
        """Return what a plan for a period rests on."""
        return self._bases.get(period.start, "")

    def compared(self) -> list[_Row]:
        """Return the rows of the periods about which this plan has a say."""
        fresh = {period for period, say in zip(self.periods, self.fresh, strict=True) if say}
        return [row for row in self.rows if row.period in fresh]

    def replaceable(self, period: Period) -> list[_Row]:
        """Return the rows of a period that a new plan may replace."""
        return [row for row in self.rows if row.period == period and row.state in _REPLACEABLE]

    def sent(self) -> Iterator[tuple[int, _Row]]:
        """Yield, numbered, the chunks whose events are not simply cut anew."""
        return ((number, row) for number, row in enumerate(self.rows) if row.stands is not None)


def _row(values: dict[Any, Any]) -> _Row:
    return _Row(
        token=values["token"],
        identity=values["identity"],
        revision=int(values["revision"]),
        state=State(values["state"]),
        reason=values["reason"],
        reading=Reading(int(values["extraction"]), int(values["validation"])),
        period=Period(values["period_start"], values["period_end"]),
        component=values["component"],
        address=json.loads(values["address"]),
    )


# --- both sides, set aside by token ---------------------------------------------------------------------------------


def _compare(comparison: Comparison, arrivals: "_Arrivals", staging: Staging, join: "_Join") -> None:
    """Set both sides aside by ranges of the token, and join them range by range."""
    if comparison.events is None:
        raise Misconfigured("raw events: the accepted rows were not handed over; clear the run from validate on")
    sent = list(join.book.sent())
    rows = comparison.events.rows + sum(row.kept.rows for _, row in sent)
    batch_rows = arrivals.destination.source.settings.batch_rows
    ranges = min(-(-rows // batch_rows), _MAX_RANGES) or 1
    with Spill() as arrived, Spill() as before:
        for number, row in sent:
            events = _at_their_own_time(arrivals.destination.kept().read(row.kept))
            for name, value in (("period", join.book.place(row.period)), ("row", number)):
                events = events.append_column(name, pa.repeat(pa.scalar(value, pa.int32()), len(events)))
            before.add(events, _range(events.column("token"), ranges))
        for part in staging.read(comparison.events):
            events = arrivals.events(part)
            join.expect(events)
            arrived.add(events, _range(events.column("token"), ranges))
        join.spread(batch_rows)
        for number in sorted({*arrived.numbers(), *before.numbers()}):
            join.join(_read(arrived, number, _ARRIVED), _read(before, number, _SENT), number, ranges)


def _at_their_own_time(events: pa.Table) -> pa.Table:
    """Return events with the text that each has at its own time: by that one a row is told to be the same.

    Where it went later, the archive has both, and the billing period into which it went changes nothing of what it is.
    """
    if "original" not in events.column_names:
        return events
    own = pc.coalesce(events.column("original"), events.column("body"))
    return events.set_column(events.column_names.index("body"), "body", own).drop_columns("original")


def _range(tokens: pa.ChunkedArray, ranges: int) -> np.ndarray:
    """Return the number of the range of each token, by its first four hexadecimal digits; ranges ascend."""
    return np.array([int(token[:4], 16) for token in tokens.to_pylist()], dtype="int64") * ranges >> 16


def _read(spill: Spill, number: int, schema: pa.Schema) -> pa.Table:
    """Return a partition's rows by token."""
    if number not in set(spill.numbers()):
        return schema.empty_table()
    return spill.read(number).sort_by("token").combine_chunks()


class _Arrivals:
    """Accepted rows in the words of the archive, each with its usage period and whether it may go."""

    def __init__(self, comparison: Comparison, destination: Destination, places: Places) -> None:
        self.destination = destination
        self._periods = comparison.periods
        self._source = destination.source
        self._places = places

    def events(self, part: pa.Table) -> pa.Table:
        """Return a part's rows in the columns of `_ARRIVED`.

        Raises:
            Misconfigured: a row has no target or no period; the stages do not fit together.
        """
        period = locate(part.column("time").to_numpy(), self._periods)
        place = self._places.of(part.column("account"), period)
        if (place < 0).any() or (period < 0).any():
            raise Misconfigured("raw events: an accepted row has no target or no usage period; clear from extract on")
        target = self._places.targets.take(pa.array(place))
        ids = part.column("event_id").to_pylist()
        name = (self.destination.site, self._source.name, self.destination.stream)
        rows = pd.DataFrame(
            {
                "token": pd.Series(event_tokens(*name, ids), dtype=object),
                "time": part.column("time").to_pandas(),
                "quantity": self._quantities(part),
                "address": target.column("address").to_pandas(),
                "dimensions": self._dimensions(part),
            }
        )
        why, moves = self._late(part.column("time"), period, target.column("open_from"))
        why = np.where(self._places.undecided(part.column("account"), period), _MOVED, why)
        body, original = self.destination.encode_events(rows), pd.Series(None, index=rows.index, dtype=object)
        if moves.any():
            original[moves] = body[moves]
            rows.loc[moves, "time"] = target.column("open_from").to_pandas()[moves]
            body[moves] = self.destination.encode_events(rows[moves])
        columns: dict[str, Any] = {
            "token": rows["token"],
            "event_id": part.column("event_id"),
            "account": part.column("account"),
            "subscription": target.column("subscription"),
            "time": rows["time"],
            "quantity": rows["quantity"],
            "body": body,
            "original": original,
            "period": period,
            "why": why,
            "open_until": target.column("open_until"),
            "most": np.full(len(rows), self.destination.events_to_chunk),
        }
        return pa.table({key: _as(column, _ARRIVED.field(key).type) for key, column in columns.items()}, _ARRIVED)

    def _late(
        self, times: pa.ChunkedArray, period: np.ndarray, open_from: pa.ChunkedArray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return for each event why it may not go, by number, and whether it goes into the open billing period.

        A grace in the source is reckoned from an event's own time. Without one it is a matter of the run, which comes
        at the end of the usage period.
        """
        closed = pc.fill_null(pc.less(times, open_from), False).to_numpy()  # noqa: FBT003
        unknown = pc.is_null(open_from).to_numpy()
        policy = self.destination.late_usage
        moves = closed if policy == "now" else np.zeros(len(times), dtype=bool)
        if policy != "now" and closed.any():
            renewals = open_from.filter(pa.array(closed)).to_pylist()
            if self._source.destination.grace is None:
                ends = [self._periods[number].end for number in period[closed]]
                within = [self.destination.passes(*both) for both in zip(ends, renewals, strict=True)]
            else:
                since = [self._source.passes_from(renewal, timedelta(0)) for renewal in renewals]
                own = times.filter(pa.array(closed)).to_pylist()
                within = [first is not None and time >= first for time, first in zip(own, since, strict=True)]
            moves[closed] = within
        stays = _REFUSES if policy == "refuse" else _CLOSED
        return np.select([unknown, closed & ~moves], [_UNKNOWN, stays], _GOES), moves

    def _quantities(self, part: pa.Table) -> pd.Series:
        meter = self._source.settings.meter
        if meter.function == "count":
            return pd.Series(["1"] * part.num_rows, dtype=object)
        if meter.function == "unique":
            return cast("pd.Series", part.column("quantity").to_pandas().astype(object))
        return quantities.to_text(quantities.to_scaled(part.column("quantity"), meter.decimals), meter.decimals)

    def _dimensions(self, part: pa.Table) -> pd.Series:
        names = list(self._source.settings.dimensions)
        if not names or not part.num_rows:
            return pd.Series(["{}"] * part.num_rows, dtype=object)
        frame = part.select(names).to_pandas()
        group = frame.groupby(names, sort=False, dropna=False).ngroup().to_numpy()
        _, first = np.unique(group, return_index=True)
        distinct = part.select(names).take(pa.array(first)).to_pylist()
        texts = [json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False) for row in distinct]
        return pd.Series(np.array(texts, dtype=object)[group], dtype=object)


def _as(column: Any, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    return column.cast(kind) if isinstance(column, pa.ChunkedArray) else pa.array(column, type=kind)


# --- the join -------------------------------------------------------------------------------------------------------


class _Join:
    """Which events were sent as they are, which were not, which differ, and which are gone.

    An event is the same whatever usage period its time puts it into: one whose time was corrected has changed.
    """

    def __init__(self, book: _Book, largest_chunk: int, left: Spill, changed: Spill, vanished: Spill) -> None:
        self.book = book
        self._largest_chunk = largest_chunk
        self.counts = dict.fromkeys(
            ("outdated", "delivered", "in the air", "refused", "left", "changed", "vanished"), 0
        )
        self.left, self.changed, self.vanished = left, changed, vanished
        self.still_refused: set[str] = set()
        self._stands = np.array([-1 if row.stands is None else row.stands for row in book.rows], dtype="int64")
        self._share = np.array([max(row.kept.rows // _SHARE_AFTER_REFUSAL, 1) for row in book.rows], dtype="int64")
        self._rows = np.zeros(len(book.periods), dtype="int64")
        self._first_file = self._files = self._rows

    def expect(self, events: pa.Table) -> None:
        """Count the events of each usage period."""
        self._rows += np.bincount(events.column("period").to_numpy(), minlength=len(self._rows))

    def spread(self, batch_rows: int) -> None:
        """Give each usage period as many files as its events need, in order."""
        self._files = np.maximum(-(-self._rows // batch_rows), 1)
        self._first_file = np.cumsum(self._files) - self._files

    def files(self, place: int) -> range:
        """Return the numbers of the files that hold what is left of a usage period, by token."""
        return range(self._first_file[place], self._first_file[place] + self._files[place])

    def join(self, arrived: pa.Table, sent: pa.Table, number: int, ranges: int) -> None:
        """Join one range of tokens; both sides are sorted by token."""
        at = pc.fill_null(pc.index_in(arrived.column("token"), value_set=_array(sent, "token")), -1)
        at = np.asarray(at.to_numpy(), dtype="int64")
        row = np.append(sent.column("row").to_numpy(), -1)[at]
        stands = np.append(self._stands, -1)[row]
        own = _at_their_own_time(arrived)
        same = (at >= 0) & _equal(own.column("body"), _array(sent, "body"), at)
        fresh = self.book.fresh[arrived.column("period").to_numpy()]
        split = stands == _REFUSED_TOGETHER
        left = fresh & ((at < 0) | split | ((stands == _REFUSED_ALONE) & ~same))
        changed = fresh & ~left & ~same
        self.still_refused.update(self.book.rows[one].token for one in row[(stands == _REFUSED_ALONE) & same])
        kinds = {"delivered": _DELIVERED, "in the air": _IN_THE_AIR, "refused": _REFUSED_ALONE}
        for kind, code in kinds.items():
            self.counts[kind] += int((fresh & same & ~left & (stands == code)).sum())
        self.counts["outdated"] += int((~fresh).sum())
        self._set_aside_left(
            arrived, left, np.where(split, np.append(self._share, 0)[row], self._largest_chunk), number, ranges
        )
        self._set_aside("changed", self.changed, own.select(_SENT.names[:-1]).filter(pa.array(changed)))
        self._set_aside("vanished", self.vanished, self._gone(arrived, sent))

    def _set_aside_left(self, arrived: pa.Table, left: np.ndarray, most: np.ndarray, number: int, ranges: int) -> None:
        limited = arrived.set_column(_ARRIVED.names.index("most"), "most", pa.array(most, pa.int32()))
        some = limited.filter(pa.array(left))
        period = some.column("period").to_numpy()
        self.counts["left"] += len(some)
        self.left.add(some, self._first_file[period] + number * self._files[period] // ranges)

    def _set_aside(self, kind: str, spill: Spill, events: pa.Table) -> None:
        self.counts[kind] += len(events)
        spill.add(events, events.column("period").to_numpy())

    def _gone(self, arrived: pa.Table, sent: pa.Table) -> pa.Table:
        """Return the delivered events of compared periods that are in the warehouse no more."""
        period = sent.column("period").to_numpy()
        compared = (period >= 0) & self.book.fresh[period]
        delivered = self._stands[sent.column("row").to_numpy()] == _DELIVERED
        known = pc.is_in(sent.column("token"), value_set=_array(arrived, "token")).to_numpy()
        return sent.select(_SENT.names[:-1]).filter(pa.array(compared & delivered & ~known))

    def check(self, accepted: int, cut: int) -> None:
        """Make sure that each accepted row came to one end."""
        if cut != self.counts["left"] or sum(self.counts.values()) - self.counts["vanished"] != accepted:
            raise AssertionError(f"{accepted} accepted rows, but {self.counts}, of which {cut} were cut into chunks")


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _equal(one: pa.ChunkedArray, other: pa.Array, at: np.ndarray) -> np.ndarray:
    """Say of each text whether it is the one at its place in `other`; false where it has no place."""
    beside = other.take(pa.array(at, mask=at < 0))
    return cast("np.ndarray", pc.fill_null(pc.equal(one, beside), False).to_numpy())  # noqa: FBT003


# --- what becomes of it ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """A row that the ledger should have: a chunk to send, one that is held, or a list to decide about."""

    kind: str
    state: State
    identity: str
    quantity: int
    reason: str
    address: dict[str, Any]
    open_until: datetime | None


@dataclass
class _Writer:
    """Cuts what is left into archived chunks, and says what the ledger's rows have to become."""

    comparison: Comparison
    destination: Destination
    book: _Book
    join: _Join
    component: str
    cut: int = 0
    tally: Tally = field(default_factory=Tally)

    def parts(self) -> Iterator[pa.Table]:
        """Yield the proposals of each usage period."""
        yield _PROPOSALS.empty_table()
        for place, period in enumerate(self.book.periods):
            if self.book.fresh[place]:
                wanted = [*self._chunks(place, period), *self._lists(place, period)]
                yield self._proposals(period, wanted)
        counts = self.join.counts
        fresh = self.book.compared()
        self.tally += Tally(
            unchanged=counts["delivered"],
            waiting=counts["refused"],
            events=self.comparison.rows_accepted,
            blocked=sum(row.kept.rows for row in fresh if row.stands == _IN_THE_AIR),
            partial=sum(row.stands == _REFUSED_TOGETHER for row in fresh),
        )

    def _chunks(self, place: int, period: Period) -> Iterator[_Wanted]:
        known = set(self.join.left.numbers())
        tables = (self.join.left.read(file) for file in self.join.files(place) if file in known)
        for why, events in _cut(tables):
            self.cut += len(events)
            ends = pc.min(events.column("open_until")).as_py()
            yield self._wanted("chunk", _STATES[why], period, events, _WHY_HELD[why], len(events), ends)

    def _lists(self, place: int, period: Period) -> Iterator[_Wanted]:
        for kind, spill, sign in (("vanished", self.join.vanished, -1), ("changed", self.join.changed, 1)):
            if place in spill.numbers():
                events = spill.read(place).sort_by("token")
                yield self._wanted(kind, State.HELD, period, events, self._told(kind, events), sign * len(events), None)

    def _told(self, kind: str, events: pa.Table) -> str:
        shown = ", ".join(events.column("event_id")[:_EXAMPLES].to_pylist())
        some = f"{len(events)} ({shown}{', ...' if len(events) > _EXAMPLES else ''})"
        if kind == "changed":
            return f"events changed after they were sent, and the stream keeps the first: {some}; a person decides"
        aside = self.comparison.rows_quarantined
        among = f"; {aside} rows of this run are in quarantine, they may be among these" if aside else ""
        return f"events gone from the warehouse after they were sent, which no call takes back: {some}{among}"

    def _wanted(
        self,
        kind: str,
        state: State,
        period: Period,
        events: pa.Table,
        reason: str,
        quantity: int,
        ends: datetime | None,
    ) -> _Wanted:
        source, stream = self.destination.source, self.destination.stream
        kept = self.destination.kept().write(f"{source.name}/{_edges(period, '-', '%Y%m%dT%H%M%SZ')}", events)
        content = sha256("\n".join(events.column("body").to_pylist()).encode()).hexdigest()
        edges = _edges(period, "/", "%Y-%m-%dT%H:%M:%SZ").split("/")
        name = identity((self.destination.site, source.name, stream, kind, *edges, content))
        where = {"archive": kept.path, "digest": kept.digest, "rows": kept.rows, "sum": self._sum(events)}
        return _Wanted(kind, state, name, quantity, reason, {"stream": stream, "kind": kind, **where}, ends)

    def _sum(self, events: pa.Table) -> str:
        meter = self.destination.source.settings.meter
        if meter.function == "unique":
            return "0"
        scaled = quantities.from_text(events.column("quantity").to_pandas().astype(object), meter.decimals)
        return f"{quantities.to_decimal(quantities.total(scaled), meter.decimals):f}"

    # --- against the ledger's rows -----------------------------------------------------------------------------------

    def _proposals(self, period: Period, wanted: Sequence[_Wanted]) -> pa.Table:
        """Return what is new among the wanted rows, and what ends of those that wait in the ledger."""
        ends = {row.identity: row for row in self.book.replaceable(period) if not self._still_refused(row)}
        rows = []
        for one in wanted:
            last = self.book.last.get(one.identity)
            if last is not None and self._stays(last, one):
                ends.pop(one.identity, None)
                self.tally += Tally(waiting=abs(one.quantity))
            else:
                rows.append(self._row(one, period, last, ends.pop(one.identity, None)))
                self.tally += self._counted(one)
        rows += [self._end(row, period) for row in ends.values()]
        self.tally += Tally(withdrawn=len(ends))
        return pa.Table.from_pylist(sorted(rows, key=lambda row: row["identity"]), schema=_PROPOSALS)

    def _still_refused(self, row: _Row) -> bool:
        return row.token in self.join.still_refused

    def _stays(self, last: _Row, wanted: _Wanted) -> bool:
        """Say whether the last row of an identity is what is wanted of it."""
        if wanted.state is not State.RESERVED:
            waits_otherwise = last.reason.startswith(MOVED) and last.reason != wanted.reason
            return last.state in {wanted.state, State.WRITTEN_OFF} and not waits_otherwise
        # What was held right before it was sent would be held again: these are the answers of then, not of now.
        held_since = last.state is State.HELD and last.reason not in _WHY_HELD
        held_since &= not last.reason.startswith(UNAPPROVED)
        return (last.state is State.RESERVED or held_since) and last.reading == self.book.reading

    @staticmethod
    def _counted(wanted: _Wanted) -> Tally:
        counter = {State.HELD: "held", State.REFUSED: "refused"}.get(wanted.state, "new")
        return Tally(**{counter: abs(wanted.quantity)})

    def _row(self, wanted: _Wanted, period: Period, last: _Row | None, replaced: _Row | None) -> dict[str, Any]:
        revision = 0 if last is None else last.revision + 1
        return self._blank(period) | {
            "token": uniqueness_token(wanted.identity, revision),
            "identity": wanted.identity,
            "revision": revision,
            "state": wanted.state,
            "reason": wanted.reason,
            "supersedes": replaced.token if replaced else "",
            "quantity": str(wanted.quantity),
            "open_until": wanted.open_until,
            "address": json.dumps(wanted.address, sort_keys=True),
        }

    def _end(self, row: _Row, period: Period) -> dict[str, Any]:
        """Return the proposal that only ends a row of the ledger."""
        return self._blank(period) | {
            "token": uniqueness_token(row.identity, row.revision + 1),
            "identity": row.identity,
            "revision": row.revision + 1,
            "state": State.SUPERSEDED,
            "reason": "",
            "supersedes": row.token,
            "quantity": "0",
            "open_until": None,
            "address": json.dumps(row.address, sort_keys=True),
        }

    def _blank(self, period: Period) -> dict[str, Any]:
        empty = dict.fromkeys(("account", "subscription", "price_point", "body"), "")
        span = {"period_start": period.start, "period_end": period.end, "basis": self.book.basis(period)}
        return {**empty, "component": self.component, "dimensions": "{}", **span}


def _cut(tables: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Yield the events of a usage period in chunks that fit into a request, each with why it may not go.

    The tables come by token. Where one table ends and the next begins changes no chunk: one is whole only when the
    next event does not fit into it, or none comes any more.
    """
    waiting: dict[tuple[int, int], pa.Table] = {}
    for table in tables:
        kinds = table.select(["why", "most"]).group_by(["why", "most"]).aggregate([]).to_pylist()
        for key in sorted((kind["why"], kind["most"]) for kind in kinds):
            mine = pc.and_(pc.equal(table.column("why"), key[0]), pc.equal(table.column("most"), key[1]))
            events = table.filter(mine)
            held = pa.concat_tables([waiting[key], events]) if key in waiting else events
            *whole, waiting[key] = _pieces(held, key[1])
            yield from ((key[0], chunk) for chunk in whole)
    yield from ((why, rest) for (why, _), rest in sorted(waiting.items(), key=lambda entry: entry[0]))


def _pieces(events: pa.Table, most: int) -> list[pa.Table]:
    """Return events in pieces of up to `most` and of no more bytes than a request takes; more may fit into the last."""
    size = np.append(0, np.cumsum(pc.binary_length(events.column("body")).to_numpy() + 1))
    starts = [0]
    while True:
        start = starts[-1]
        fits = int(np.searchsorted(size, size[start] + LARGEST_BULK, side="right")) - 1
        end = max(min(start + most, fits), start + 1)
        if end >= len(events):
            break
        starts.append(end)
    return [events.slice(start, end - start) for start, end in zip(starts, [*starts[1:], len(events)], strict=True)]


def _edges(period: Period, between: str, style: str) -> str:
    return f"{period.start:{style}}{between}{period.end:{style}}"


def _why_much_vanished(join: _Join, destination: Destination) -> str:
    settings, gone = destination.source.settings, join.counts["vanished"]
    delivered = sum(row.kept.rows for row in join.book.compared() if row.stands == _DELIVERED)
    if gone <= delivered * settings.max_withdraw_share:
        return ""
    return (
        f"{gone} of {delivered} events that were sent for these periods are gone from the warehouse, more than "
        f"max_withdraw_share = {settings.max_withdraw_share:.0%}; if the warehouse is right, raise it in "
        "source.yaml for this run and clear the plan: they are then listed, and nothing is taken back by itself"
    )
