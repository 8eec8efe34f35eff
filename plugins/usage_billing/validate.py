"""Validate: which of the extracted rows may be billed, and for each other row every reason why not.

Two kinds of rules judge a row: the package's own, always on, and the source's suite in Great Expectations' vocabulary
(``expectations.yaml``). Others of the suite judge the reading as a whole, first. A rule that could not run stops the
run: it never counts as passed. Nothing is dropped: accepted and quarantined rows add up to the rows read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing import quantities
from usage_billing.data_docs import ValidationResult
from usage_billing.errors import NeedsDecision
from usage_billing.periods import locate
from usage_billing.quarantine import WrittenOff
from usage_billing.records import WRITTEN_OFF, Period, Staged, Target
from usage_billing.sources import BillingSource
from usage_billing.staging import Spill, Staging, array_of
from usage_billing.suite import BEFORE_THE_END, KNOWN_ACCOUNT, QUANTITIES, UNIQUE_ID, Suite
from usage_billing.trailing import History, Measures

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
    as text, ``duplicate`` (whether another row of its event is all that speaks against it) and ``reasons`` (list of
    text). ``targets`` has one row per known account: ``account``, ``subscription``,
    ``component``, ``price_point``, ``address`` (JSON text), ``open_from`` and ``open_until`` (UTC or null). ``reasons``
    counts rows by reason, and ``examples`` names some event ids of each. ``moves`` is what `moves.placed` adds.
    ``measured`` is what `trailing.remember` takes, once the reading goes on.
    """

    accepted: Staged
    quarantined: Staged
    targets: Staged
    reasons: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    measured: Staged
    moves: Staged | None = None

    @property
    def digest(self) -> str:
        """What stands for all of it: the same rows, parted alike, and the same places that accounts lead to, or led."""
        tables = (self.accepted, self.quarantined, self.targets, *([self.moves] if self.moves else []))
        return sha256("".join(table.digest for table in tables).encode()).hexdigest()


class ValidationStopped(NeedsDecision):
    """The rows, once judged, stop the run: too many are quarantined, one that never may be was, or they add up oddly.

    Everything was written, and `validated` refers to it.
    """

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
    history: History,
    written_off: WrittenOff | None = None,
    before: Staged | None = None,
    result: ValidationResult | None = None,
) -> Validated:
    """Split `extracted` into accepted and quarantined rows, and stage both with the accounts' targets below `folder`.

    Rows that a person has `written_off` are never accepted: `WRITTEN_OFF` is one reason more of theirs, and no limit
    counts them. Rows `before` the usage periods only compete for their event ids; they are in neither part.

    `resolve` is `Destination.resolve_accounts`: it is asked once per distinct account. Memory holds one part and what
    is known of each account, plus 8 bytes per duplicate. Of rows with one event id that are sound otherwise, the
    earliest is kept, then the one that sorts first by all its columns: never the one that was read first. `history`,
    the ledger, tells what is usual, and writes nothing. What was found goes into `result` too, as far as it got.

    Raises:
        Misconfigured: a rule of the suite is wrong, or could not run; all such rules at once.
        NeedsDecision: rules about the reading as a whole failed; no row was judged, and nothing was written.
        ValidationStopped: after writing, when ``quarantine.max_rows`` or ``quarantine.max_share`` is passed, a row
            fails a rule that stops the run, or the sums of accepted rows are not as expected.
    """
    began, result = history.now(), result or ValidationResult()
    result.rows = {"read": extracted.rows}
    suite = Suite(source, extracted.rows, result)
    result.own = suite.own_verdicts()
    measures = Measures(extracted, source, periods, history, staging, folder)
    suite.check_whole(next(staging.read(extracted)), measures)
    with Spill() as sound, Spill() as unsound:
        judge = _Judge(source, periods, _Accounts(resolve), suite, began, written_off or WrittenOff())
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
    measures.add_accepted(accepted, staging)
    measured = measures.staged(staging, folder)
    validated = Validated(accepted, quarantined, targets, split.reasons, split.examples, measured)
    over = _over_the_limits(validated, source, extracted.rows)
    stops = [*over, *_stopping_rows(validated, judge.stopping()), *suite.unusual_sums(measures)]
    result.rows |= {"accepted": accepted.rows, "quarantined": quarantined.rows}
    result.own = suite.own_verdicts(split.reasons, judge.unknown())
    result.reasons, result.examples, result.stops = split.reasons, split.examples, stops
    if stops:
        raise ValidationStopped(_why_stopped(validated, source, extracted.rows, stops), validated)
    return validated


def check_nothing_read(
    extracted: Staged,
    source: BillingSource,
    periods: Sequence[Period],
    staging: Staging,
    folder: str,
    history: History,
) -> None:
    """Judge an extraction without rows, which is not validated if there is nothing to take back either.

    Raises:
        NeedsDecision: that there is nothing is not as the source's suite expects.
        Misconfigured: a rule of the suite is wrong, or could not run.
    """
    suite = Suite(source, 0)
    suite.check_nothing_read(Measures(extracted, source, periods, history, staging, folder))


def _over_the_limits(validated: Validated, source: BillingSource, rows: int) -> list[str]:
    limits = source.settings.quarantine
    count = validated.quarantined.rows - validated.reasons.get(WRITTEN_OFF, 0)
    over = [f"more than quarantine.max_rows = {limits.max_rows}"] if count > limits.max_rows else []
    if Decimal(count) > Decimal(str(limits.max_share)) * rows:
        over.append(f"more than quarantine.max_share = {limits.max_share}")
    return [f"{count} of {rows} rows are quarantined, {' and '.join(over)}"] if over else []


def _stopping_rows(validated: Validated, stopping: Mapping[str, str]) -> Iterator[str]:
    """Yield each rule that a row failed and that stops the run; `stopping` has the rules' labels by reason."""
    told: dict[str, list[tuple[int, str]]] = {}
    for reason, count in sorted(validated.reasons.items()):
        if reason in stopping:
            told.setdefault(stopping[reason], []).append((count, reason))
    for label, counts in told.items():
        rows, (_, reason) = sum(count for count, _ in counts), max(counts)
        examples = ", ".join(validated.examples[reason])
        like = f" (for example {examples})" if examples else ""
        # The site may say something else of each account; all of it stands in the table below.
        more = f", among {len(counts)} reasons" if len(counts) > 1 else ""
        yield f"{label}, severity stop: {rows} {'row' if rows == 1 else 'rows'}: {reason}{like}{more}"


def _why_stopped(validated: Validated, source: BillingSource, rows: int, stops: Sequence[str]) -> str:
    aside = validated.quarantined
    lines = [f"{source.title}: validation stops the run; nothing was sent", *(f"  - {stop}" for stop in stops)]
    if aside.rows:
        lines.extend([f"{aside.rows} of {rows} rows are quarantined:", reasons_table(validated)])
        lines.append(f"The rows are in {aside.manifest}.")
    lines.append(
        "Mend the data and clear the run from extract on; or, if they are right as they are, raise the limit in "
        "source.yaml, or loosen the rule in expectations.yaml for this run, and clear validate."
    )
    return "\n".join(lines)


def reasons_table(validated: Validated) -> str:
    """Return rows by reason as lines of text, the most frequent first, with examples of their event ids."""
    ordered = sorted(validated.reasons.items(), key=lambda entry: (-entry[1], entry[0]))
    return "\n".join(f"{count:>10}  {reason}  ({', '.join(validated.examples[reason])})" for reason, count in ordered)


class _Accounts:
    """What the billing site says of each account, asked once per run."""

    def __init__(self, resolve: Resolver) -> None:
        self._resolve = resolve
        self._targets: dict[str, Target] = {}

    def told(self, accounts: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Return for each account why it cannot be billed, and since when it is billed no more.

        The first is null where it can (or is null itself), the second where nobody tells.
        """
        distinct = accounts.dictionary_encode()
        names = distinct.dictionary.to_pylist()
        self._ask(sorted(name for name in names if name not in self._targets))
        targets = [self._targets[name] for name in names]
        reasons = pa.array([target.unknown or None for target in targets], pa.string())
        ends = pa.array([target.ended_at for target in targets], pa.timestamp("us", "UTC"))
        return reasons.take(distinct.indices), ends.take(distinct.indices)

    def _ask(self, names: list[str]) -> None:
        for start in range(0, len(names), _RESOLVED_AT_ONCE):
            asked = names[start : start + _RESOLVED_AT_ONCE]
            targets = self._resolve(asked)
            if [target.account for target in targets] != asked:
                raise AssertionError("the destination answered for other accounts than it was asked for")
            self._targets.update(zip(asked, targets, strict=True))

    def why_unknown(self) -> set[str]:
        """Return what the site said of the accounts that cannot be billed."""
        return {target.unknown for target in self._targets.values() if target.unknown}

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
        began: datetime,
        written_off: WrittenOff,
    ) -> None:
        self.accounts = accounts
        self.written_off = written_off
        self.duplicate = suite.reason(UNIQUE_ID)
        self._began = np.datetime64(began.astimezone(UTC).replace(tzinfo=None), "us")
        self._meter = source.settings.meter
        self._periods = periods
        self._suite = suite
        # What the suite says of an unknown account stands before the words of the site.
        said = suite.reason(KNOWN_ACCOUNT)
        self._unknown = f"{said}: " if said else ""

    def findings(self, part: pa.Table) -> pa.Table:
        """Return ``row`` and ``reason`` for all that is wrong with the rows of a part, sorted by row."""
        return self._found(part, [*self._own(part), *self._misplaced(part)])

    def findings_before(self, part: pa.Table) -> pa.Table:
        """Return the same of rows that lie before the usage periods, as they should."""
        return self._found(part, self._own(part), counts=False)

    def _found(self, part: pa.Table, own: Iterable[tuple[str, np.ndarray]], *, counts: bool = True) -> pa.Table:
        found = [_finding(self._suite.reason(name), np.flatnonzero(mask)) for name, mask in own]
        found.extend(_finding(reason, rows) for reason, rows in self._suite.findings(part, counts=counts))
        unknown, ended = self.accounts.told(array_of(part, "account"))
        rows = np.flatnonzero(unknown.is_valid().to_numpy(zero_copy_only=False))
        words = pc.binary_join_element_wise(self._unknown, unknown.take(pa.array(rows)), "")
        found.append(pa.table([pa.array(rows), words], schema=_FINDINGS))
        late = pc.greater_equal(array_of(part, "time"), ended).fill_null(pa.scalar(value=False))
        found.append(_finding(self._suite.reason(BEFORE_THE_END), np.flatnonzero(late)))
        found.append(_finding(WRITTEN_OFF, self.written_off.among(part)))
        table = pa.concat_tables(found)
        # Two rules may give one reason; a row has it once. The stable sort keeps the order of the rules.
        return _distinct(table.take(pa.array(np.argsort(table["row"].to_numpy(), kind="stable"))))

    def _own(self, part: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
        unread = ~_is_null(part, "unread") if "unread" in part.column_names else np.zeros(len(part), dtype=bool)
        yield "expect_event_id_to_not_be_null", _is_null(part, "event_id")
        yield "expect_time_to_not_be_null", _is_null(part, "time") & ~unread
        yield "expect_time_to_be_readable", unread
        for word in ("account", *(["quantity"] if self._meter.function != "count" else [])):
            yield f"expect_{word}_to_not_be_null", _is_null(part, word)
        if self._meter.function in {"sum", "max", "last"}:
            masks = quantities.faults(array_of(part, "quantity"), self._meter.decimals).values()
            yield from zip(QUANTITIES, masks, strict=True)

    def _misplaced(self, part: pa.Table) -> Iterator[tuple[str, np.ndarray]]:
        times = array_of(part, "time")
        moments, given = times.to_numpy(zero_copy_only=False), times.is_valid().to_numpy(zero_copy_only=False)
        yield "expect_time_inside_usage_periods", given & (locate(moments, self._periods) < 0)
        yield "expect_time_not_in_future", given & (moments > self._began)

    def stopping(self) -> dict[str, str]:
        """Return what stops the run where a row is told so: the labels of rules by their reasons."""
        label = self._suite.stops_at_unknown_accounts()
        return {**dict.fromkeys(self.unknown() if label else (), label), **self._suite.stopping()}

    def unknown(self) -> set[str]:
        """Return what rows are told whose accounts cannot be billed."""
        return {self._unknown + words for words in self.accounts.why_unknown()}

    def sound(self, part: pa.Table, unsound: np.ndarray) -> pa.Table:
        """Return the rows of a part that are not `unsound`, with the quantity as it is handed on."""
        keep = np.ones(part.num_rows, dtype=bool)
        keep[unsound] = False
        rows = part.select([name for name in part.column_names if name != "unread"]).filter(pa.array(keep))
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
            numbers = _rows(findings)
            rows = part.take(pa.array(numbers))
            if "quantity" in rows.column_names:
                text = quantities.plain_text(array_of(rows, "quantity"))
                rows = rows.set_column(rows.column_names.index("quantity"), "quantity", text)
            self._count(findings, part)
            rows = rows.append_column("duplicate", pa.array(np.isin(numbers, self._twice(number)), pa.bool_()))
            yield rows.append_column("reasons", _lists(findings))

    def _findings(self, number: int, part: pa.Table) -> pa.Table:
        found = self._unsound.read(number) if number in self._with_findings else _FINDINGS.empty_table()
        twice = self._twice(number)
        if not len(twice):
            return found
        decided = self._judge.written_off.among_duplicates(part, twice)
        # No row is in both tables: only sound rows compete for an event id.
        both = pa.concat_tables([found, _finding(self._judge.duplicate, twice), _finding(WRITTEN_OFF, decided)])
        return both.take(pa.array(np.argsort(both["row"].to_numpy(), kind="stable")))

    def _twice(self, number: int) -> np.ndarray:
        """Return which rows of a part are set aside for another row of their event, and for nothing else."""
        start, end = np.searchsorted(self._duplicates["part"].to_numpy(), [number, number + 1])
        return self._duplicates["row"].to_numpy()[start:end]

    def _count(self, findings: pa.Table, part: pa.Table) -> None:
        frame = findings.to_pandas().assign(event_id=part.column("event_id").take(findings["row"]).to_pandas())
        # What else is wrong with a row that was written off is nobody's concern any more.
        off = frame.loc[frame["reason"] == WRITTEN_OFF, "row"]
        frame = frame[(frame["reason"] == WRITTEN_OFF) | ~frame["row"].isin(off)]
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
