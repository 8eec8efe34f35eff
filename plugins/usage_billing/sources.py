"""A billing source: one folder of YAML and SQL, read into a frozen object, with every fault told at once.

A folder ``include/sources/<name>/`` holds ``source.yaml`` (what is billed, to whom), ``usage.sql`` (the rows) and
``expectations.yaml`` (which rows are sound). YAML says what is billed; it never grows conditions.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar
from zoneinfo import ZoneInfo, available_timezones

import yaml
from croniter import croniter
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from usage_billing.errors import Misconfigured
from usage_billing.periods import Calendar, PeriodKind, begins, local_midnight, usage_periods
from usage_billing.records import EVER, WRITTEN_OFF, Edition, Period

WINDOW_BINDS = frozenset({"window_start", "window_end"})
ARRIVAL_BINDS = frozenset({"after"})
_NAME = r"^[a-z][a-z0-9_]*$"
_BIND = re.compile(r"(?<![:\w\\]):([A-Za-z_]\w*)")


class Settings(BaseModel):
    """The base of all parts of ``source.yaml``: frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


_Model = TypeVar("_Model", bound=Settings)


def _zone(value: object) -> ZoneInfo:
    if isinstance(value, ZoneInfo):
        return value
    if value not in available_timezones():
        close = difflib.get_close_matches(str(value), available_timezones(), n=1)
        raise ValueError(f"{value!r} is no IANA time zone" + (f"; did you mean {close[0]!r}?" if close else ""))
    return ZoneInfo(str(value))


def _cron(value: object) -> object:
    if not isinstance(value, str) or not croniter.is_valid(value):
        raise ValueError(f'{value!r} is no cron expression; daily at midnight is "0 0 * * *"')
    return value


_FURTHEST = 400
"""How many days around `effective_from` are looked at for a better one: more than a year."""
_SPAN = re.compile(r"(\d{1,4})([mhd])")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def time_span(value: object) -> timedelta:
    """Return a span of time as ``source.yaml`` writes it: ``30m``, ``24h`` or ``1d``."""
    if isinstance(value, timedelta):
        return value
    found = _SPAN.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{value!r} is no span of time: write minutes as 30m, hours as 24h, days as 1d")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


@lru_cache(maxsize=65_536)
def _tick_before(schedule: str, zone: ZoneInfo, moment: datetime) -> datetime:
    """Return the last tick before a moment, in UTC."""
    return croniter(schedule, moment.astimezone(zone)).get_prev(datetime).astimezone(UTC)


def _as_written(span: timedelta) -> str:
    """Return a span of time as `time_span` takes it."""
    unit, one = next((unit, one) for unit in "dhm" if span % (one := timedelta(**{_UNITS[unit]: 1})) == timedelta(0))
    return f"{span // one}{unit}"


def _overlap(value: object) -> timedelta | int:
    """Return how far behind the watermark arrivals are looked for again: a span of time, or a number of ids."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    try:
        return time_span(value)
    except ValueError as error:
        raise ValueError(
            f"{value!r} is neither a span of time, like 30m or 1h, nor a number of ids, like 10000: "
            "the first where columns.arrival is a time, the second where it is an id"
        ) from error


class Columns(Settings):
    """Which columns of ``usage.sql`` hold what: our word to the query's; `arrival` is a column of ``arrivals.sql``."""

    event_id: str
    time: str
    account: str
    quantity: str | None = None
    arrival: str | None = None
    deleted: str | None = None


class Meter(Settings):
    """The rule that turns the events of one subscription and usage period into a quantity."""

    function: Literal["sum", "count", "max", "last", "unique"]
    decimals: int = Field(default=0, ge=0, le=9)

    @model_validator(mode="after")
    def _counts_are_whole(self) -> Self:
        if self.function in {"count", "unique"} and self.decimals:
            raise ValueError(f"{self.function} gives whole numbers: decimals must be 0")
        return self


class QuarantineLimits(Settings):
    """How many quarantined rows a run may have before it stops: whichever limit is reached first."""

    max_share: float = Field(default=0.05, ge=0, le=1)
    max_rows: int = Field(default=10_000, ge=0)


class FirstRun(Settings):
    """What the first plan of a source that has billed nothing yet may come to without a person's yes."""

    max_days: int = Field(default=62, ge=1)
    max_quantity: Decimal | None = Field(default=None, gt=0)


class DestinationSettings(Settings):
    """What every destination asks of ``source.yaml``; each destination adds its own keys.

    Each has its own `late_usage`: what becomes of usage whose billing period is closed. `grace` lets the last usage of
    a billing period pass all the same: what ended so short before the renewal goes into the period that is open.
    """

    free: ClassVar[frozenset[str]] = frozenset({"connection", "threads", "late_usage", "grace"})
    """The keys that name nothing of what is billed, and so may change under history."""
    of_the_component: ClassVar[frozenset[str]] = frozenset()
    """Those of them that tell how the component (or its stream) is made: another one may be made otherwise."""

    name: str
    connection: str
    threads: int = Field(default=4, ge=1, le=32)
    grace: Annotated[timedelta, BeforeValidator(time_span), PlainSerializer(_as_written, when_used="json")] | None = (
        None
    )
    """How long before the end of a billing period usage may have ended, and still passes after it; None for what ended
    in the data interval in which the billing period does, since no run of the schedule could bill it sooner."""

    def why_not(self, settings: "SourceSettings") -> Iterator[str]:  # noqa: ARG002 - Some destinations look.
        """Yield which keys of the source this destination cannot do."""
        return iter(())

    def naming(self) -> dict[str, Any]:
        """Return the keys that name what is billed."""
        return self.model_dump(mode="json", exclude=set(self.free))

    def as_of(self, edition: Edition, connection: str) -> dict[str, Any]:
        """Return the keys of an older edition: it names what it named then, and is treated as this one says."""
        named: Mapping[str, Any] = edition.definition["destination"]
        then = {**edition.settings, **named, "connection": connection}
        if named["name"] != self.name:
            return then
        today, naming = self.model_dump(mode="json", exclude={"connection"}), self.naming()
        free = {key: value for key, value in today.items() if key not in naming}
        keeps = self.of_the_component if naming != named else frozenset()
        # What names something in one mode may be free in another.
        of_today = {key: value for key, value in free.items() if key not in keeps and key not in named}
        return {**free, **then, **of_today}


class SourceSettings(Settings):
    """The keys of ``source.yaml`` that do not depend on the destination."""

    name: str = Field(pattern=_NAME, max_length=80)
    formerly: str | None = Field(default=None, pattern=_NAME, max_length=80)
    shares_component_with: tuple[str, ...] = ()
    description: str
    warehouse: str
    schedule: Annotated[str, BeforeValidator(_cron)]
    timezone: Annotated[ZoneInfo, BeforeValidator(_zone)]
    period: PeriodKind
    lookback: int = Field(default=0, ge=0)
    incremental: Literal["interval", "arrival"] = "interval"
    arrival_overlap: Annotated[timedelta | int, BeforeValidator(_overlap)] = timedelta(hours=1)
    rescan: int = Field(default=31, ge=1)
    dedup_window: Annotated[timedelta, BeforeValidator(time_span)] = timedelta(0)
    bill_from: date
    effective_from: date | None = None
    columns: Columns
    meter: Meter
    dimensions: tuple[str, ...] = ()
    naive_times: Annotated[ZoneInfo, BeforeValidator(_zone)] | None = None
    batch_rows: int = Field(default=100_000, ge=1)
    max_withdraw_share: float = Field(default=0.10, ge=0, le=1)
    first_run: FirstRun = FirstRun()
    max_multiple: Decimal | None = Field(default=None, gt=1)
    backfill_horizon_days: int | None = Field(default=None, ge=1)
    approval: bool = False
    approval_timeout_hours: float | None = Field(default=None, gt=0)
    approvers: tuple[str, ...] = ()
    quarantine: QuarantineLimits = QuarantineLimits()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if self.meter.function != "count" and self.columns.quantity is None:
            raise ValueError(f"meter {self.meter.function} needs columns.quantity, the column it measures")
        if faults := list(self._whats_wrong_with_its_days()):
            raise ValueError("; ".join(faults))
        if self.period == "interval" and self.lookback:
            raise ValueError(
                f"lookback is {self.lookback}, and with period: interval a run has no earlier usage periods to read: "
                "set it to 0, or choose hour, day, week or month"
            )
        if self.period == "interval" and self.dedup_window:
            raise ValueError(
                f"dedup_window is {_as_written(self.dedup_window)}, and with period: interval a run reads no usage "
                "periods but its own: remove it, or choose hour, day, week or month"
            )
        if not self.approval and (self.approvers or self.approval_timeout_hours is not None):
            raise ValueError("approvers and approval_timeout_hours need approval: true, without which nobody is asked")
        if self.period == "interval" and self.incremental == "arrival":
            raise ValueError(
                "incremental: arrival finds the usage periods that a row touches, and with period: interval only a "
                "run's own interval is one: choose hour, day, week or month"
            )
        if (self.incremental == "arrival") != (self.columns.arrival is not None):
            raise ValueError(
                f"incremental is {self.incremental}, and columns.arrival is {self.columns.arrival or 'missing'}: "
                "set both, incremental: arrival and the column of arrivals.sql by which it grows, or neither"
            )
        reserved = {"event_id", "time", "account", "quantity", "reasons", "duplicate", "unread", "part", "row"} | (
            {"deleted"} if self.columns.deleted else set()
        )
        if clash := reserved.intersection(self.dimensions):
            raise ValueError(f"dimensions may not be called {', '.join(sorted(clash))}: rename the column in usage.sql")
        return self

    def _whats_wrong_with_its_days(self) -> Iterator[str]:
        """Yield why `bill_from` and `effective_from` are no days on which this definition can begin."""
        change = self.effective_from
        # A day before the change belongs to the definition of then, which is judged with it.
        if (change is None or self.bill_from >= change) and not begins(self.period, self.bill_from):
            yield (
                f"bill_from {self.bill_from} is inside a {self.period}, whose rest would never be billed: "
                f"take the first day of a {self.period}"
            )
        if change is None:
            return
        if not begins(self.period, change):
            yield (
                f"effective_from {change} is inside a {self.period}, which neither definition would bill whole: "
                f"take the first day of a {self.period}"
            )
        elif run := self._run_across(change):
            near = [str(day) for step in (-1, 1) if (day := self._no_run_across(change, step))]
            mend = f"take {' or '.join(near)}" if near else "let the schedule tick at midnight"
            yield (
                f"effective_from {change} is inside the run of {run}, which would compare usage periods of both "
                f"definitions: {mend}"
            )

    def _run_across(self, day: date) -> Period | None:
        """Return the run of the schedule that would compare usage periods on both sides of the start of `day`."""
        edge = local_midnight(day, self.timezone)
        ticks = croniter(self.schedule, (edge - timedelta(seconds=1)).astimezone(self.timezone))
        after = ticks.get_next(datetime).astimezone(UTC)
        run = Period(ticks.get_prev(datetime).astimezone(UTC), after)
        if after == edge or not usage_periods(self.period, self.timezone, run, within=Period(edge, EVER.end)):
            return None
        return run

    def _no_run_across(self, day: date, step: int) -> date | None:
        """Return the nearest day, earlier or later by the sign of `step`, at which each run is of one definition."""
        near = (day + timedelta(days=step * further) for further in range(1, _FURTHEST))
        return next((one for one in near if begins(self.period, one) and not self._run_across(one)), None)


@dataclass(frozen=True)
class BillingSource:
    """One stream of usage that is billed: its settings, its SQL and its expectations.

    As an edition it is so over a span of time, and has usage periods there alone. `edition` is its number in the
    ledger, 0 where it is none yet. `owes_from` is the source's own `bill_from`, where that of the edition may be later.
    """

    settings: SourceSettings
    destination: DestinationSettings
    sql: str
    expectations: tuple[Mapping[str, Any], ...]
    arrivals_sql: str = ""
    accounts_sql: str = ""
    span: Period = EVER
    edition: int = 0
    owes_from: date | None = None

    @property
    def name(self) -> str:
        """The name under which the ledger knows it, for ever: its folder's, or the one that it had `formerly`."""
        return self.settings.formerly or self.settings.name

    @property
    def title(self) -> str:
        """What a person calls it: its folder's name, and the one of before."""
        former = self.settings.formerly
        return f"{self.settings.name} (formerly {former})" if former else self.settings.name

    @property
    def bill_from(self) -> datetime:
        """The instant before which nothing is owed: the start of `bill_from` in the billing zone."""
        return local_midnight(self.settings.bill_from, self.settings.timezone)

    @property
    def first_day(self) -> date:
        """The day before which the source owes nothing, in whichever edition."""
        return self.owes_from or self.settings.bill_from

    @property
    def since(self) -> datetime | None:
        """The instant before which the source was defined otherwise, None where nothing of before is owed."""
        change = self.settings.effective_from
        if change is None or change <= self.settings.bill_from:
            return None
        return local_midnight(change, self.settings.timezone)

    def passes_from(self, renewal: datetime, margin: timedelta) -> datetime | None:
        """Return the instant after which usage has ended that may pass a renewal, by the source's `grace`; None: none.

        Where it says nothing, that is the last tick of the schedule by which a run could still have billed it: none
        sends anything within `margin` of the renewal.
        """
        grace = self.destination.grace
        if grace is None:
            return _tick_before(self.settings.schedule, self.settings.timezone, renewal - margin)
        return renewal - grace if grace else None

    @property
    def calendar(self) -> Calendar:
        """Its usage periods."""
        return Calendar(self.settings.period, self.settings.timezone, self.span)

    def periods(self, interval: Period) -> tuple[Period, ...]:
        """Return the whole, closed usage periods that a run of `interval` compares, none of them before `bill_from`."""
        found = self.calendar.ending_in(interval, self.settings.lookback)
        return tuple(period for period in found if period.start >= self.bill_from)

    def recent_periods(self, until: datetime) -> tuple[Period, ...]:
        """Return what a rescan compares: the last `rescan` usage periods that have ended by `until`, from `bill_from`.

        Raises:
            Misconfigured: only the runs know the source's usage periods.
        """
        if self.settings.period == "interval":
            raise Misconfigured(
                f"{self.name} cannot be rescanned: with period: interval only a run's own interval is a usage period; "
                "run the intervals again by a backfill"
            )
        found = self.calendar.last(until, self.settings.rescan)
        return tuple(period for period in found if period.start >= self.bill_from)

    def periods_of(self, spans: Iterable[Period]) -> tuple[Period, ...]:
        """Return the usage periods that spans from edge to edge are made of (see `records.joined`), in order."""
        return tuple(period for span in spans for period in self.calendar.ending_in(span))

    def definition(self) -> dict[str, Any]:
        """Return the settings that name what is billed; they may not change while history hangs on them."""
        settings = self.settings
        return {
            "name": self.name,
            "destination": self.destination.naming(),
            "period": settings.period,
            "timezone": settings.timezone.key,
            "meter": settings.meter.model_dump(mode="json"),
            "dimensions": list(settings.dimensions),
        }


def as_of(
    source: BillingSource,
    edition: Edition,
    connection: str,
    destination_settings: Callable[[str], type[DestinationSettings] | None],
) -> BillingSource:
    """Return an older edition of `source`: what names the bill is of then, all else, its SQL too, is of today.

    Raises:
        Misconfigured: the settings of today do not go with those of then, with every fault.
    """
    faults: list[str] = []
    then, today = edition.definition, source.settings
    values = today.model_dump() | {key: then[key] for key in ("period", "timezone", "meter", "dimensions")}
    starts = edition.span.start.astimezone(ZoneInfo(then["timezone"])).date()
    # Before its start it owes nothing; the first one has no such day.
    values |= {"bill_from": max(today.bill_from, starts), "effective_from": None}
    if then["period"] == "interval":
        # No run reads another's interval: what of today looks for others has nothing to find there.
        values |= {
            "lookback": 0,
            "incremental": "interval",
            "dedup_window": timedelta(0),
            "columns": {**values["columns"], "arrival": None},
        }
    settings = _checked(SourceSettings, values, "source.yaml", "", faults)
    destination = _destination(source.destination.as_of(edition, connection), destination_settings, faults)
    if settings is None or destination is None:
        told = f"billing source {source.name!r}, as it was defined until {edition.span.end:%Y-%m-%d %H:%M} UTC"
        raise Misconfigured.all_at_once(told, faults)
    found = replace(source, settings=settings, destination=destination, owes_from=source.first_day)
    return replace(found, span=edition.span, edition=edition.number)


def source_names(folder: Path) -> list[str]:
    """Return the names of the sources in a sources folder, sorted.

    Raises:
        Misconfigured: the folder does not exist.
    """
    if not folder.is_dir():
        raise Misconfigured(
            f"sources folder {folder} does not exist: set sources_folder in section [usage_billing] of airflow.cfg "
            "(or AIRFLOW__USAGE_BILLING__SOURCES_FOLDER)"
        )
    return sorted(path.parent.name for path in folder.glob("*/source.yaml"))


def load_source(folder: Path, destination_settings: Callable[[str], type[DestinationSettings] | None]) -> BillingSource:
    """Read the source in `folder`; `destination_settings` gives a destination's own settings by its name.

    Raises:
        Misconfigured: with a line for each fault of its files: file, key, and what would mend it.
    """
    faults: list[str] = []
    values = _read_yaml(folder / "source.yaml", faults)
    destination_values = values.pop("destination", None)
    settings = _checked(SourceSettings, values, "source.yaml", "", faults) if values else None
    destination = _destination(destination_values, destination_settings, faults) if values else None
    if values.get("name") not in {None, folder.name}:
        faults.append(
            f"source.yaml: name: {values['name']!r} is not the folder's name {folder.name!r}; make them equal"
        )
    if settings and destination:
        faults.extend(f"source.yaml: {fault}" for fault in destination.why_not(settings))
    faults.extend(_claims_of_one_history(folder, values.get("formerly")))
    sql = _read_sql(folder / "usage.sql", WINDOW_BINDS, "the usage rows between :window_start and :window_end", faults)
    arrivals_sql = _read_arrivals(folder / "arrivals.sql", values.get("incremental") == "arrival", faults)
    accounts_sql = _read_accounts(folder / "accounts.sql", faults)
    expectations = _read_expectations(folder / "expectations.yaml", faults)
    if faults or settings is None or destination is None:
        raise Misconfigured.all_at_once(f"billing source {folder.name!r} ({folder})", faults)
    return BillingSource(
        settings=settings,
        destination=destination,
        sql=sql,
        expectations=expectations,
        arrivals_sql=arrivals_sql,
        accounts_sql=accounts_sql,
    )


def _claims_of_one_history(folder: Path, formerly: object) -> Iterator[str]:
    """Yield what is wrong if two folders go on with one history: each would take back what the other bills."""
    history = formerly or folder.name
    if formerly and (folder.parent / str(formerly) / "source.yaml").exists():
        yield (
            f"source.yaml: formerly: {formerly!r} is still a source of its own; remove that folder, whose history goes "
            "on here, or drop the key"
        )
    # As text, not as YAML: every parse of every DAG file looks at all folders.
    says_so = re.compile(rf"^formerly:\s*[\"']?{re.escape(str(history))}[\"']?\s*(#.*)?$", re.MULTILINE)
    for path in sorted(folder.parent.glob("*/source.yaml")):
        if path.parent.name != folder.name and says_so.search(path.read_text(encoding="utf-8", errors="replace")):
            yield (
                f"source.yaml: source {path.parent.name!r} says formerly: {history}, and so goes on with the same "
                "history: one of the two needs another name"
            )


def _read_yaml(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        faults.append(f"{path.name}: is missing; create it in {path.parent}")
        return {}
    except yaml.YAMLError as error:
        faults.append(f"{path.name}: is not YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(values, dict) or not values:
        faults.append(f"{path.name}: must be a mapping of keys to values")
        return {}
    return values


def _destination(
    values: object, destination_settings: Callable[[str], type[DestinationSettings] | None], faults: list[str]
) -> DestinationSettings | None:
    if not isinstance(values, dict) or not isinstance(values.get("name"), str):
        faults.append("source.yaml: destination: must be a mapping with at least `name` and `connection`")
        return None
    model = destination_settings(values["name"])
    if model is None:
        faults.append(f"source.yaml: destination.name: {values['name']!r} is no destination of this package")
        return None
    return _checked(model, values, "source.yaml", "destination.", faults)


def _checked(
    model: type[_Model], values: Mapping[str, Any], file: str, prefix: str, faults: list[str]
) -> _Model | None:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults.extend(f"{file}: {prefix}{line}" for line in _lines(error, model))
        return None


def _lines(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    for fault in error.errors(include_url=False):
        key = ".".join(str(step) for step in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_near(str(fault['loc'][-1]), fault['loc'], model)}"
        elif fault["type"] == "missing":
            yield f"{key}: is required; add it"
        else:
            message = fault["msg"].removeprefix("Value error, ")
            yield f"{key}: {message}" if key else message


def _near(key: str, location: tuple[int | str, ...], model: type[BaseModel]) -> str:
    for step in location[:-1]:
        inner = model.model_fields[str(step)].annotation if str(step) in model.model_fields else None
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else model
    close = difflib.get_close_matches(key, model.model_fields, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(model.model_fields)}"


def _read_arrivals(path: Path, needed: bool, faults: list[str]) -> str:  # noqa: FBT001
    if needed:
        return _read_sql(path, ARRIVAL_BINDS, "time and arrival of the rows that arrived after :after", faults)
    if path.exists():
        faults.append(f"{path.name}: is there, but source.yaml does not say incremental: arrival; add it, or remove it")
    return ""


def _read_accounts(path: Path, faults: list[str]) -> str:
    if path.exists():
        return _read_sql(path, frozenset(), "account and target: what the site calls its customer", faults)
    return ""


def _read_sql(path: Path, binds: frozenset[str], selects: str, faults: list[str]) -> str:
    try:
        sql = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        faults.append(f"{path.name}: is missing; it selects {selects}")
        return ""
    found = set(_BIND.findall(re.sub(r"--[^\n]*", "", sql)))
    if missing := binds - found:
        faults.append(f"{path.name}: does not use {_binds(missing)}; without it other rows would be read")
    if unknown := found - binds:
        faults.append(f"{path.name}: unknown bind {_binds(unknown)}; write \\: for a plain colon")
    return sql


def meta_faults(meta: object) -> Iterator[str]:
    """Yield what is wrong with the ``meta`` of a rule in ``expectations.yaml``."""
    if meta is None:
        return
    if not isinstance(meta, dict):
        yield 'meta: must be a mapping, as in {reason: "the quantity is negative", severity: stop}'
        return
    for key in meta:
        if key not in {"reason", "severity"}:
            yield f"meta: unknown key {key}; known keys: reason, severity"
    reason, severity = meta.get("reason"), meta.get("severity")
    if "reason" in meta and not (isinstance(reason, str) and reason.strip()):
        yield f"meta.reason: {reason!r} is no text; write why in quotes, or leave it out"
    elif reason == WRITTEN_OFF:
        yield f"meta.reason: {reason!r} is what is said of rows that a person wrote off; word it otherwise"
    if "severity" in meta and severity not in {"quarantine", "stop"}:
        yield f"meta.severity: {severity!r} is neither quarantine (the rows that fail) nor stop (the run)"


def _binds(names: Iterable[str]) -> str:
    return ", ".join(sorted(f":{name}" for name in names))


def _read_expectations(path: Path, faults: list[str]) -> tuple[Mapping[str, Any], ...]:
    values = _read_yaml(path, faults)
    declared = values.get("expectations") if values else []
    if not isinstance(declared, list):
        faults.append(f"{path.name}: expectations: must be a list")
        return ()
    for index, rule in enumerate(declared):
        if (
            not isinstance(rule, dict)
            or not isinstance(rule.get("type"), str)
            or not isinstance(rule.get("kwargs", {}), dict)
        ):
            faults.append(f"{path.name}: expectations.{index}: must have a `type` (text) and `kwargs` (a mapping)")
        elif unknown := set(rule) - {"type", "kwargs", "meta"}:
            faults.append(
                f"{path.name}: expectations.{index}: unknown key {', '.join(sorted(unknown))}; "
                "known keys: type, kwargs, meta"
            )
        else:
            faults.extend(f"{path.name}: expectations.{index}: {fault}" for fault in meta_faults(rule.get("meta")))
    return tuple(declared)
