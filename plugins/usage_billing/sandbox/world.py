"""Worlds: the YAML files that say what a sandbox site is before anything happens to it.

A world has one site. It is checked when it is loaded, and every fault is told at once, with its key.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar
from zoneinfo import ZoneInfo

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .switches import CHARGEOVER, MAXIO, SwitchBoard, UnknownSwitch


class WorldError(ValueError):
    """World files that cannot be used; `faults` has one line for each mistake."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _zone(name: Any) -> ZoneInfo:
    if isinstance(name, ZoneInfo):
        return name
    try:
        return ZoneInfo(str(name))
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"no such time zone: {name}") from error


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _exact(value: Any) -> Decimal:
    # YAML reads 0.002 as a float; its shortest spelling is what the author wrote.
    try:
        return Decimal(str(value))
    except ArithmeticError as error:
        raise ValueError(f"not a number: {value}") from error


Zone = Annotated[ZoneInfo, BeforeValidator(_zone)]
Instant = Annotated[datetime, AfterValidator(_aware)]
Exact = Annotated[Decimal, BeforeValidator(_exact)]
AnyWorld = TypeVar("AnyWorld", bound="World")


_LAST_DAY_OF_EVERY_MONTH = 28


class Noun(BaseModel):
    """A frozen part of a world; a key that it does not know is a fault."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class BillingPeriod(Noun):
    """The open period at the start: local midnights in the site's zone, half-open."""

    start: date
    end: date

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.end <= self.start:
            raise ValueError("end must be after start")
        if self.start.day > _LAST_DAY_OF_EVERY_MONTH:
            raise ValueError("start must be on day 1 to 28, so that every month has it")
        return self

    def following(self) -> "BillingPeriod":
        """Return the next period: as many calendar months as this one has, or as many days."""
        months = (self.end.year - self.start.year) * 12 + self.end.month - self.start.month
        if months and self.end.day == self.start.day:
            return BillingPeriod(start=self.end, end=_add_months(self.end, months))
        return BillingPeriod(start=self.end, end=self.end + (self.end - self.start))


class Limits(Noun):
    """What the site can bear.

    How many requests it works on at once (none: any number), how many more may wait before it says 429, how long a
    request is held at least, and what Retry-After says where it is sent.
    """

    in_process: int | None = Field(default=4, ge=1)
    queued: int = Field(default=8, ge=0)
    hold_seconds: float = Field(default=0, ge=0)
    retry_after_seconds: int = Field(default=1, ge=0)


class World(Noun):
    """What every site has."""

    site: str
    now: Instant
    rate: float = Field(default=0, ge=0)
    zone: Zone
    billing_period: BillingPeriod
    switches: dict[str, Any] = {}
    limits: Limits = Limits()

    @property
    def name(self) -> str:
        """Return the last part of the site's name, which is its place in URLs."""
        return self.site.rsplit(":", 1)[-1]


class Product(Noun):
    """The plan that subscriptions of a family are on; its price is billed once a period."""

    id: int
    handle: str
    name: str
    price: Exact = Decimal(0)


class ProductFamily(Noun):
    """A Maxio product family with its one product."""

    id: int
    handle: str
    name: str
    product: Product


class PricePoint(Noun):
    """One of a component's prices, per unit."""

    id: int
    handle: str
    name: str
    unit_price: Exact
    default: bool = False
    archived: bool = False


class Metric(Noun):
    """What an events-based component computes over its stream, for each subscription and billing period."""

    id: int
    kind: Literal["sum", "count", "maximum", "minimum", "average", "unique"]
    property: str | None = None

    @model_validator(mode="after")
    def _has_property(self) -> Self:
        if self.kind != "count" and not self.property:
            raise ValueError(f"the metric {self.kind} needs a property")
        return self


class Stream(Noun):
    """A named inbox for events; `identifier` says which property names the subscription."""

    handle: str
    name: str
    identifier: str


class Component(Noun):
    """A priced part of a subscription."""

    id: int
    handle: str = Field(pattern=r"^[a-z0-9][a-z0-9\-_:.]*$")
    name: str
    kind: Literal[
        "metered_component",
        "prepaid_usage_component",
        "quantity_based_component",
        "on_off_component",
        "event_based_component",
    ]
    family: str
    unit_name: str
    allow_fractional_quantities: bool = False
    archived: bool = False
    stream: str | None = None
    metric: Metric | None = None
    price_points: tuple[PricePoint, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if sum(point.default for point in self.price_points) != 1:
            raise ValueError("exactly one price point must be the default")
        if (self.kind == "event_based_component") != (self.stream is not None and self.metric is not None):
            raise ValueError("stream and metric belong to an event_based_component, and to no other")
        return self

    @property
    def default_price_point(self) -> PricePoint:
        """Return the price point that is used when none is named."""
        return next(point for point in self.price_points if point.default)

    def price_point(self, point_id: int | None) -> PricePoint:
        """Return the price point with the id, or the default one."""
        return next((point for point in self.price_points if point.id == point_id), self.default_price_point)


class Subscription(Noun):
    """A Maxio subscription; in a world, `count` makes several with consecutive ids and `{n}` in the reference.

    While it is `trialing`, its open period is the trial. `allocations` has the units of each prepaid component that it
    has bought for every period.
    """

    id: int
    reference: str | None = None
    family: str
    state: Literal["active", "trialing", "past_due", "unpaid", "canceled", "expired", "on_hold", "suspended"] = "active"
    activated: tuple[str, ...] = ()
    allocations: dict[str, Annotated[Exact, Field(ge=0)]] = {}


class MaxioWorld(World):
    """A Maxio site: `site` is `maxio:<region>:<subdomain>`."""

    site: str = Field(pattern=r"^maxio:[a-z]+:[a-z0-9-]+$")
    api_key: str
    product_families: tuple[ProductFamily, ...]
    streams: tuple[Stream, ...] = ()
    components: tuple[Component, ...]
    subscriptions: tuple[Subscription, ...]

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, raw: Any) -> Any:
        return _unfold_lists(raw, {"subscriptions": "id"})

    @model_validator(mode="after")
    def _joined(self) -> Self:
        families = {family.handle for family in self.product_families}
        streams = {stream.handle for stream in self.streams}
        handles = {component.handle for component in self.components}
        faults = [f"component {c.handle}: no family {c.family}" for c in self.components if c.family not in families]
        faults += [
            f"component {c.handle}: no stream {c.stream}"
            for c in self.components
            if c.stream and c.stream not in streams
        ]
        faults += [f"subscription {s.id}: no family {s.family}" for s in self.subscriptions if s.family not in families]
        faults += [
            f"subscription {s.id}: no component {handle}"
            for s in self.subscriptions
            for handle in s.activated
            if handle not in handles
        ]
        prepaid = {c.handle for c in self.components if c.kind == "prepaid_usage_component"}
        faults += [
            f"subscription {s.id}: no prepaid component {handle}"
            for s in self.subscriptions
            for handle in s.allocations
            if handle not in prepaid
        ]
        faults += _twice("component id", [c.id for c in self.components])
        faults += _twice("component handle", [c.handle for c in self.components])
        faults += _twice("price point id", [p.id for c in self.components for p in c.price_points])
        faults += _twice("subscription id", [s.id for s in self.subscriptions])
        faults += _twice("subscription reference", [s.reference for s in self.subscriptions if s.reference])
        faults += _switch_faults(MAXIO, self.switches)
        return _checked(self, faults)


class Item(Noun):
    """A ChargeOver product: `base` is billed once a cycle, `amount` for each unit of usage when it is metered."""

    item_id: int
    external_key: str
    name: str
    units: str
    metered: bool
    base: Exact = Decimal(0)
    amount: Exact = Decimal(0)


class Customer(Noun):
    """A ChargeOver customer."""

    customer_id: int
    external_key: str
    company: str


class Line(Noun):
    """A line of a package: an item, under an id of its own."""

    id: int
    item: str
    external_key: str | None = None


class Package(Noun):
    """A ChargeOver package, which is its word for a subscription."""

    package_id: int
    external_key: str | None = None
    customer: str
    state: Literal["active", "cancelled"] = "active"
    lines: tuple[Line, ...]


class ChargeOverWorld(World):
    """A ChargeOver account: `site` is `chargeover:<instance>`."""

    site: str = Field(pattern=r"^chargeover:[a-z0-9-]+$")
    limits: Limits = Limits(in_process=None, queued=0)
    public_key: str
    private_key: str
    items: tuple[Item, ...]
    customers: tuple[Customer, ...]
    packages: tuple[Package, ...]

    @model_validator(mode="before")
    @classmethod
    def _unfold(cls, raw: Any) -> Any:
        return _unfold_lists(raw, {"customers": "customer_id", "packages": "package_id"})

    @model_validator(mode="after")
    def _joined(self) -> Self:
        items = {item.external_key for item in self.items}
        customers = {customer.external_key for customer in self.customers}
        lines = [(package, line) for package in self.packages for line in package.lines]
        faults = [
            f"package {p.package_id}: no customer {p.customer}" for p in self.packages if p.customer not in customers
        ]
        faults += [f"package {p.package_id}: no item {line.item}" for p, line in lines if line.item not in items]
        faults += _twice("item id", [item.item_id for item in self.items])
        faults += _twice("item external key", [item.external_key for item in self.items])
        faults += _twice("customer id", [c.customer_id for c in self.customers])
        faults += _twice("customer external key", [c.external_key for c in self.customers])
        faults += _twice("package id", [p.package_id for p in self.packages])
        faults += _twice("package external key", [p.external_key for p in self.packages if p.external_key])
        faults += _twice("line id", [line.id for _, line in lines])
        faults += _switch_faults(CHARGEOVER, self.switches)
        return _checked(self, faults)


AnySite = MaxioWorld | ChargeOverWorld


def load_worlds(sources: Sequence[Path | World]) -> list[AnySite]:
    """Read world files (a folder stands for the YAML files in it), and take worlds that are loaded already as they are.

    `WorldError` tells the faults of all of them.
    """
    worlds = [source for source in sources if isinstance(source, MaxioWorld | ChargeOverWorld)]
    faults: list[str] = []
    for path in _files([source for source in sources if not isinstance(source, World)]):
        try:
            worlds.append(_load(path))
        except WorldError as error:
            faults += [f"{path.name}: {fault}" for fault in error.faults]
    if not faults:
        faults = _disagreements(worlds)
    if faults:
        raise WorldError(faults)
    return worlds


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if path.is_dir():
            yield from sorted(path.glob("*.yaml"))
        else:
            yield path


def _load(path: Path) -> AnySite:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise WorldError([f"cannot be read: {error}"]) from error
    site = raw.get("site") if isinstance(raw, dict) else None
    if not isinstance(site, str) or not site.startswith(("maxio:", "chargeover:")):
        raise WorldError(["site: must be maxio:<region>:<subdomain> or chargeover:<instance>"])
    model: type[MaxioWorld | ChargeOverWorld] = MaxioWorld if site.startswith("maxio:") else ChargeOverWorld
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise WorldError(_lines_of(error)) from error


def _lines_of(error: ValidationError) -> list[str]:
    lines: list[str] = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "world"
        message = fault["msg"].removeprefix("Value error, ")
        lines += [f"{key}: {line}" for line in message.splitlines()]
    return lines


def _disagreements(worlds: Sequence[World]) -> list[str]:
    if not worlds:
        return ["no world was given"]
    faults = _twice("site", [world.site for world in worlds])
    # URLs carry the subdomain alone, so one sandbox cannot hold the same subdomain of two regions.
    faults += _twice("name in URLs", [f"{world.site.split(':')[0]}/{world.name}" for world in worlds])
    if len({(world.now, world.rate) for world in worlds}) > 1:
        faults.append("now and rate: one sandbox has one clock, and these worlds disagree about it")
    return faults


def _unfold_lists(raw: Any, counted: dict[str, str]) -> Any:
    if not isinstance(raw, dict):
        return raw
    unfolded = dict(raw)
    for key, id_field in counted.items():
        if isinstance(raw.get(key), list):
            unfolded[key] = [row for entry in raw[key] for row in _unfold_entry(entry, id_field)]
    return unfolded


def _unfold_entry(entry: Any, id_field: str) -> Iterator[Any]:
    if not isinstance(entry, dict) or "count" not in entry or not isinstance(entry.get(id_field), int):
        yield entry
        return
    shared = {key: value for key, value in entry.items() if key not in ("count", "first")}
    first = int(entry.get("first", 1))
    for step in range(int(entry["count"])):
        row = {key: value.format(n=first + step) if isinstance(value, str) else value for key, value in shared.items()}
        row[id_field] = entry[id_field] + step
        if isinstance(row.get("lines"), list):
            row["lines"] = [_shifted(line, step) for line in row["lines"]]
        yield row


def _shifted(line: Any, step: int) -> Any:
    counted = isinstance(line, dict) and isinstance(line.get("id"), int)
    return {**line, "id": line["id"] + step} if counted else line


def _twice(what: str, values: list[Any]) -> list[str]:
    seen: set[Any] = set()
    repeated: list[Any] = []
    for value in values:
        if value in seen and value not in repeated:
            repeated.append(value)
        seen.add(value)
    return [f"{what} {value} is given twice" for value in repeated]


def _switch_faults(known: Any, wanted: dict[str, Any]) -> list[str]:
    try:
        SwitchBoard(known, wanted)
    except UnknownSwitch as error:
        return error.faults
    return []


def _checked(world: AnyWorld, faults: list[str]) -> AnyWorld:
    if faults:
        raise ValueError("\n".join(faults))
    return world


def _add_months(day: date, months: int) -> date:
    month = day.month - 1 + months
    return day.replace(year=day.year + month // 12, month=month % 12 + 1)
