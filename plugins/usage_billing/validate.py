"""Validate: which of the extracted rows may be billed, and for each other row every reason why not.

Two kinds of rules judge a row: the package's own, always on, and the source's suite in Great Expectations' vocabulary
(``expectations.yaml``). A rule that could not run stops the run: it never counts as passed. Nothing is dropped:
accepted and quarantined rows add up to the rows read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from hashlib import sha256

import numpy as np
import pandas as pd
import pyarrow as pa

from usage_billing import quantities
from usage_billing.errors import NeedsDecision
from usage_billing.periods import locate
from usage_billing.quarantine import WrittenOff
from usage_billing.records import DUPLICATE, WRITTEN_OFF, Period, Staged, Target
from usage_billing.sources import BillingSource
from usage_billing.staging import Spill, Staging, array_of
from usage_billing.suite import Suite

EXAMPLES = 3
"""How many event ids are kept for each reason, for the task log."""

Resolver = Callable[[Sequence[str]], list[Target]]

_RESOLVED_AT_ONCE = 500
_MAX_PARTITIONS = 256
_FINDINGS = pa.schema([("row", pa.int64()), ("reason", pa.string())])
_TARGETS = pa.schema(
    [
        *((name, pa.string()) for name in ("account", "subscription", "component", "price_point", "address")),
        *((name, pa.timestamp("us", "UTC")) for name in ("open_from", "open_until")),
    ]
)


@dataclass(frozen=True, slots=True)
class Validated:
    """What validation made of an extraction.

    ``accepted`` has the extracted columns with exact quantities (``decimal128(38, decimals)``; text for a meter that
    counts distinct values; none for one that counts events). ``quarantined`` has all extracted columns, the quantity
    as text, and ``reasons`` (list of text). ``targets`` has one row per known account: ``account``, ``subscription``,
    ``component``, ``price_point``, ``address`` (JSON text), ``open_from`` and ``open_until`` (UTC or null). ``reasons``
    counts rows by reason, and ``examples`` names some event ids of each. ``moves`` is what `moves.placed` adds.
    """

    accepted: Staged
    quarantined: Staged
    targets: Staged
    reasons: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    moves: Staged | None = None

    @property
    def digest(self) -> str:
        """What stands for all of it: the same rows, parted alike, and the same places that accounts lead to, or led."""
        tables = (self.accepted, self.quarantined, self.targets, *([self.moves] if self.moves else []))
        return sha256("".join(table.digest for table in tables).encode()).hexdigest()


class QuarantineOverLimit(NeedsDecision):
    """More rows were quarantined than the source allows; everything was written, and `validated` refers to it."""

    def __init__(self, message: str, validated: Validated) -> None:
        super().__init__(message)
        self.validated = validated


def validate(
    extracted: Staged,
    source: BillingSource,
    periods: Sequence[Period],
    resolve: Resolver,
    staging: Staging,
    folder: str,
    written_off: WrittenOff | None = None,
    before: Staged | None = None,
) -> Validated:
    """Split `extracted` into accepted and quarantined rows, and stage both with the accounts' targets below `folder`.

    Rows that a person has `written_off` are never accepted: `WRITTEN_OFF` is one reason more of theirs, and no limit
    counts them. Rows `before` the usage periods only compete for their event ids; they are in neither part.

    `resolve` is `Destination.resolve`: it is asked once per distinct account. Memory holds one part and what is known
    of each account, plus 8 bytes per duplicate. Of rows with one event id that are sound otherwise, the earliest is
    kept, then the one that sorts first by all its columns: never the one that was read first.

    Raises:
        Misconfigured: a rule of the suite is wrong, or could not run; all such rules at once.
        NeedsDecision: a rule about all rows failed; nothing was written.
        QuarantineOverLimit: after writing, when ``quarantine.max_rows`` or ``quarantine.max_share`` is passed.
    """
    with Spill() as sound, Spill() as unsound:
        decided = written_off or WrittenOff()
        judge = _Judge(source, periods, _Accounts(resolve), Suite(source, extracted.rows), decided)
        rivals = extracted.rows + (before.rows if before else 0)
        partitions = min(-(-rivals // source.settings.batch_rows), _MAX_PARTITIONS) or 1
        for number, part in enumerate(staging.read(before)) if before else ():
            rows = _rows(judge.findings_before(part))
            _set_sound_aside(sound, judge.sound(part, rows), -1 - number, rows, partitions)
        for number, part in enumerate(staging.read(extracted)):
            findings = judge.findings(part)
            unsound.add(findings, np.full(len(findings), number))
            _set_sound_aside(sound, judge.sound(part, _rows(findings)), number, _rows(findings), partitions)
        split = _Split(extracted, staging, judge, unsound, _duplicates(sound, periods, source.settings.dedup_window))
        accepted = staging.write(folder, "accepted", split.accepted())
        quarantined = staging.write(folder, "quarantined", split.quarantined())
    if accepted.rows + quarantined.rows != extracted.rows:
        raise AssertionError(
            f"{extracted.rows} rows read, but {accepted.rows} accepted + {quarantined.rows} quarantined"
        )
    targets = staging.write(folder, "targets", [judge.accounts.table()])
    validated = Validated(accepted, quarantined, targets, split.reasons, split.examples)
    _check_limits(validated, source, extracted.rows)
    return validated


def _check_limits(validated: Validated, source: BillingSource, rows: int) -> None:
    limits = source.settings.quarantine
    count = validated.quarantined.rows - validated.reasons.get(WRITTEN_OFF, 0)
    over = [f"more than quarantine.max_rows = {limits.max_rows}"] if count > limits.max_rows else []
    if Decimal(count) > Decimal(str(limits.max_share)) * rows:
        over.append(f"more than quarantine.max_share = {limits.max_share}")
    if over:
        raise QuarantineOverLimit(
            f"{source.title}: {count} of {rows} rows are quarantined, {' and '.join(over)}; nothing was sent.\n"
            f"{reasons_table(validated)}\n"
            f"The rows are in {validated.quarantined.manifest}. Mend the data or source.yaml, or raise the limit.",
            validated,
        )


def reasons_table(validated: Validated) -> str:
    """Return rows by reason as lines of text, the most frequent first, with examples of their event ids."""
    ordered = sorted(validated.reasons.items(), key=lambda entry: (-entry[1], entry[0]))
    return "\n".join(f"{count:>10}  {reason}  ({', '.join(validated.examples[reason])})" for reason, count in ordered)


class _Accounts:
    """What the billing site says of each account, asked once per run."""

    def __init__(self, resolve: Resolver) -> None:
        self._resolve = resolve
        self._targets: dict[str, Target] = {}

    def unknown(self, accounts: pa.Array) -> pa.Array:
        """Return for each account why it cannot be billed, null where it can (or is null itself)."""
        distinct = accounts.dictionary_encode()
        names = distinct.dictionary.to_pylist()
        self._ask(sorted(name for name in names if name not in self._targets))
        reasons = pa.array([self._targets[name].unknown or None for name in names], pa.string())
        return reasons.take(distinct.indices)

    def _ask(self, names: list[str]) -> None:
        for start in range(0, len(names), _RESOLVED_AT_ONCE):
            asked = names[start : start + _RESOLVED_AT_ONCE]
            targets = self._resolve(asked)
            if [target.account for target in targets] != asked:
                raise AssertionError("the destination answered for other accounts than it was asked for")
            self._targets.update(zip(asked, targets, strict=True))

    def table(self) -> pa.Table:
        """Return the known accounts' targets, sorted by account."""
        known = [target for _, target in sorted(self._targets.items()) if not target.unknown]
        rows = [
            {
                "account": target.account,
                "subscription": target.subscription,
                "component": target.component,
                "price_point": target.price_point,
                "address": target.address_text,
                "open_from": target.open_from,
                "open_until": target.open_until,
            }
            for target in known
        ]
        return pa.Table.from_pylist(rows, schema=_TARGETS)


class _Judge:
    """All row rules together: the package's own, the suite's, and what the site knows of the accounts."""

    def __init__(
        self,
        source: BillingSource,
        periods: Sequence[Period],
        accounts: _Accounts,
        suite: Suite,
        written_off: WrittenOff,
    ) -> None:
        self.accounts = accounts
        self.written_off = written_off
        self._meter = source.settings.meter
        self._periods = periods
        self._suite = suite
        self._checked_whole = False

    def findings(self, part: pa.Table) -> pa.Table:
        """Return ``row`` and ``reason`` for all that is wrong with the rows of a part, sorted by row."""
        if not self._checked_whole:
            self._suite.check_whole(part)
            self._checked_whole = True
        return self._found(part, [*self._own(part), self._outside(part)])

    def findings_before(self, part: pa.Table) -> pa.Table:
        """Return the same of rows that lie before the usage periods, as they should."""
        return self._found(part, self._own(part))

    def _found(self, part: pa.Table, own: Iterable[tuple[str, np.ndarray]]) -> pa.Table:
        found = [_finding(reason, np.flatnonzero(mask)) for reason, mask in own]
        found.extend(_finding(reason, rows) for reason, rows in self._suite.findings(part))
        unknown = self.accounts.unknown(array_of(part, "account"))
        rows = np.flatnonzero(unknown.is_valid().to_numpy(zero_copy_only=False))
        found.append(pa.table([pa.array(rows), unknown.take(pa.array(rows))], schema=_FINDINGS))
        found.append(_finding(WRITTEN_OFF, self.written_off.among(part)))
        table = pa.concat_tables(found)
        # Two rules may give one reason; a row has it once. The stable sort keeps the order of the rules.
        return _distinct(table.take(pa.array(np.argsort(table["row"].to_numpy(), kind="stable"))))

    def _own(self, part: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
        for word, reason in (("event_id", "no event id"), ("time", "no time"), ("account", "no account")):
            yield reason, _is_null(part, word)
        if self._meter.function != "count":
            yield "no quantity", _is_null(part, "quantity")
        if self._meter.function in {"sum", "max", "last"}:
            for reason, mask in quantities.faults(array_of(part, "quantity"), self._meter.decimals).items():
                yield f"quantity: {reason}", mask

    def _outside(self, part: pa.Table) -> tuple[str, np.ndarray]:
        times = array_of(part, "time")
        outside = locate(times.to_numpy(zero_copy_only=False), self._periods) < 0
        return "time outside the usage periods", outside & times.is_valid().to_numpy(zero_copy_only=False)

    def sound(self, part: pa.Table, unsound: np.ndarray) -> pa.Table:
        """Return the rows of a part that are not `unsound`, with the quantity as it is handed on."""
        keep = np.ones(part.num_rows, dtype=bool)
        keep[unsound] = False
        rows = part.filter(pa.array(keep))
        if "quantity" not in rows.column_names:
            return rows
        if self._meter.function == "count":
            return rows.drop_columns("quantity")
        column = array_of(rows, "quantity")
        exact = (
            quantities.plain_text(column)
            if self._meter.function == "unique"
            else quantities.normalised(column, self._meter.decimals)
        )
        return rows.set_column(rows.column_names.index("quantity"), "quantity", exact)


def _is_null(part: pa.Table, name: str) -> np.ndarray:
    mask: np.ndarray = part.column(name).is_null().to_numpy()
    return mask


def _finding(reason: str, rows: np.ndarray) -> pa.Table:
    return pa.table([pa.array(rows, pa.int64()), pa.repeat(reason, len(rows))], schema=_FINDINGS)


def _distinct(findings: pa.Table) -> pa.Table:
    if not findings.num_rows:
        return findings
    repeated = findings.to_pandas().duplicated().to_numpy()
    return findings.filter(pa.array(~repeated))


def _rows(findings: pa.Table) -> np.ndarray:
    return np.unique(findings["row"].to_numpy())


def _set_sound_aside(spill: Spill, sound: pa.Table, number: int, unsound: np.ndarray, partitions: int) -> None:
    """Set the rows that compete for their event ids aside, with where each came from, by a hash of the id."""
    rows = np.setdiff1d(np.arange(len(sound) + len(unsound)), unsound, assume_unique=True)
    located = sound.append_column("part", pa.repeat(pa.scalar(number, pa.int64()), len(rows)))
    located = located.append_column("row", pa.array(rows, pa.int64()))
    if partitions == 1:
        spill.add(located, np.zeros(len(rows), dtype="int64"))
    else:
        hashed = pd.util.hash_array(sound.column("event_id").to_pandas().array, categorize=False)
        spill.add(located, (hashed % np.uint64(partitions)).astype("int64"))


def _duplicates(sound: Spill, periods: Sequence[Period], window: timedelta) -> pd.DataFrame:
    """Return ``part`` and ``row`` of every row whose event id another row keeps, sorted.

    An earlier row keeps it within one usage period, or if it is no more than `window` earlier: so that which rows are
    billed hangs on the rows alone, and not on which usage periods a run compares beside theirs.
    """
    losers = [pd.DataFrame({"part": [], "row": []}, dtype="int64")]
    losers.extend(_losers(sound.read(number), periods, window) for number in sound.numbers())
    found = pd.concat(losers).sort_values(["part", "row"], ignore_index=True)
    # What lies before the usage periods keeps an event id, or does not; whether it is billed is for its own run.
    return found[found["part"] >= 0].reset_index(drop=True)


def _losers(rows: pa.Table, periods: Sequence[Period], window: timedelta) -> pd.DataFrame:
    codes = array_of(rows, "event_id").dictionary_encode().indices.to_numpy()
    rivals = rows.filter(pa.array(np.bincount(codes)[codes] > 1))
    # The earliest is kept, then the first by all that the row says; only identical rows fall back on where they stood.
    others = sorted(set(rivals.column_names) - {"event_id", "time", "part", "row"})
    order = [(name, "ascending") for name in ("event_id", "time", *others, "part", "row")]
    frame: pd.DataFrame = rivals.sort_by(order).select(["event_id", "time", "part", "row"]).to_pandas()
    period = pd.Series(locate(frame["time"].dt.tz_convert(None).to_numpy(), periods), frame.index)
    one_period = (period == period.shift()) & (period >= 0)
    near = frame["time"].diff() <= window
    return frame.loc[(frame["event_id"] == frame["event_id"].shift()) & (one_period | near), ["part", "row"]]


class _Split:
    """The extraction read once more, each row to its side; `reasons` and `examples` grow as `quarantined` is read."""

    def __init__(
        self, extracted: Staged, staging: Staging, judge: _Judge, unsound: Spill, duplicates: pd.DataFrame
    ) -> None:
        self.reasons: dict[str, int] = {}
        self.examples: dict[str, tuple[str, ...]] = {}
        self._extracted = extracted
        self._staging = staging
        self._judge = judge
        self._unsound = unsound
        self._with_findings = set(unsound.numbers())
        self._duplicates = duplicates

    def accepted(self) -> Iterator[pa.Table]:
        """Yield the sound rows of each part."""
        for number, part in enumerate(self._staging.read(self._extracted)):
            yield self._judge.sound(part, _rows(self._findings(number, part)))

    def quarantined(self) -> Iterator[pa.Table]:
        """Yield the other rows of each part, with their reasons."""
        for number, part in enumerate(self._staging.read(self._extracted)):
            findings = self._findings(number, part)
            rows = part.take(pa.array(_rows(findings)))
            if "quantity" in rows.column_names:
                text = quantities.plain_text(array_of(rows, "quantity"))
                rows = rows.set_column(rows.column_names.index("quantity"), "quantity", text)
            self._count(findings, part)
            yield rows.append_column("reasons", _lists(findings))

    def _findings(self, number: int, part: pa.Table) -> pa.Table:
        found = self._unsound.read(number) if number in self._with_findings else _FINDINGS.empty_table()
        start, end = np.searchsorted(self._duplicates["part"].to_numpy(), [number, number + 1])
        twice = self._duplicates["row"].to_numpy()[start:end]
        if not len(twice):
            return found
        decided = self._judge.written_off.among_duplicates(part, twice)
        # No row is in both tables: only sound rows compete for an event id.
        both = pa.concat_tables([found, _finding(DUPLICATE, twice), _finding(WRITTEN_OFF, decided)])
        return both.take(pa.array(np.argsort(both["row"].to_numpy(), kind="stable")))

    def _count(self, findings: pa.Table, part: pa.Table) -> None:
        ids = part.column("event_id").take(findings["row"])
        frame = pd.DataFrame({"reason": findings["reason"].to_pandas(), "event_id": ids.to_pandas()})
        for key, group in frame.groupby("reason", sort=False)["event_id"]:
            reason = str(key)
            self.reasons[reason] = self.reasons.get(reason, 0) + len(group)
            seen = self.examples.get(reason, ())
            self.examples[reason] = (*seen, *group.dropna().head(EXAMPLES - len(seen)))


def _lists(findings: pa.Table) -> pa.Array:
    """Return one list of reasons per row of `findings`, which is sorted by row."""
    rows = findings["row"].to_numpy()
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    return pa.ListArray.from_arrays(pa.array([*starts, len(rows)], pa.int32()), array_of(findings, "reason"))
