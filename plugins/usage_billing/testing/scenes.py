"""The scene of a history: one billing site with its switches, and the billing sources that feed it, all drawn.

A user's own source makes a scene of its own: its component, stream or item stands on a site that was made for it.
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from typing import Any
from zoneinfo import ZoneInfo

from usage_billing.destinations import destination_class, destination_settings
from usage_billing.destinations.base import Destination
from usage_billing.destinations.chargeover import ChargeOverSettings, ChargeOverSite
from usage_billing.destinations.http import Transport
from usage_billing.destinations.maxio import MaxioSettings, MaxioSite
from usage_billing.errors import Misconfigured
from usage_billing.sandbox import DirectSandbox
from usage_billing.sandbox.switches import CHARGEOVER, MAXIO
from usage_billing.sandbox.world import ChargeOverWorld, MaxioWorld
from usage_billing.sources import BillingSource, SourceSettings
from usage_billing.testing.chance import Chance
from usage_billing.testing.warehouse import ARRIVALS_SQL, USAGE_SQL

Json = dict[str, Any]

KINDS = ("maxio_metered", "maxio_events", "chargeover_usage")
RAW = "maxio_events (raw)"
"""The kind of a history in which every row is an event of its own."""
BY_ARRIVAL = " by arrival"
"""How the kind of a history ends whose sources go by arrival."""

_METRICS = {"sum": "sum", "count": "count", "max": "maximum", "last": "average", "unique": "unique"}
"""What a stream computes of raw events, by what the source's meter does; a meter's last value is no metric."""
_KEYS = ("simulated-public-key", "simulated-private-key")
_FIRST_DAYS = (date(2026, 10, 1), date(2026, 10, 23), date(2026, 3, 26), date(2026, 11, 1))
_ZONES = ("UTC", "Europe/Berlin", "America/New_York")
_LONGEST_UNITS = 4
OTHER_POINT = 719, "handle:other"
"""The price point that a changed definition names; nothing of before is billed at it."""
_ANOTHER: dict[str, Json] = {
    "maxio_metered": {"component": "handle:another", "price_point": None},
    "maxio_events": {"component": "handle:another", "stream": "another"},
    "chargeover_usage": {"item": "another"},
}
"""What is billed to another component or item."""
_LAST_FIRST = 28
_AFTERWARDS = timedelta(days=45)
"""No history goes on for longer after its last usage period."""

UNDRAWN = frozenset(
    {
        # What they change makes the source misconfigured as a whole, or concerns calls that nobody makes here.
        "access", "events_size_limit", "eu_events_host", "negative_on_prepaid", "usage_list_created_at",
        "xml_empty_list", "signature_skew_seconds", "signature_nonce",
        "component_list_delay_seconds", "limit_above_max", "undefined_types", "usage_options", "unknown_stream",
        # What the site takes and forgets, only the tie-out tells.
        "event_age_limit",
    }
)  # fmt: skip
_DELAYS: dict[str, tuple[object, ...]] = {
    "events_delay_seconds": ("0", "0", "20", "0-100"),
    "assessment_delay_seconds": ("0", "0", "600"),
    "usage_read_delay_seconds": ("0", "0", "30", "0-400"),
}


@dataclass(frozen=True)
class Scene:
    """One site and the sources that are billed there.

    `units` are the edges of the usage periods that the history is about, `accounts` what the warehouse knows of: those
    that the site bills, and those that it does not. `owners` are the site's own names of the subscriptions that it
    bills. They are the same, unless accounts move: then a mapping leads from the ones to the others. `redefined` are
    the sources as a person defines them for units from number `edge` on; none where nobody changes a definition.
    """

    kind: str
    world: MaxioWorld | ChargeOverWorld
    sources: tuple[BillingSource, ...]
    units: tuple[datetime, ...]
    billed_accounts: tuple[str, ...]
    other_accounts: tuple[str, ...]
    owners: tuple[str, ...]
    component: str
    settings: Json
    switches: Json
    redefined: tuple[BillingSource, ...] = ()
    edge: int = 0
    renames: bool = False
    _born: Json = field(default_factory=dict, compare=False)

    @property
    def raw(self) -> bool:
        """Say whether every row is an event of its own."""
        return _is_raw(self.sources[0])

    @property
    def by_arrival(self) -> bool:
        """Say whether runs also compare what arrivals touched."""
        return self.sources[0].settings.incremental == "arrival"

    @property
    def asks(self) -> bool:
        """Say whether a person is asked before anything goes."""
        return self.sources[0].settings.approval

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Return the first and the last unit of each definition: a run compares units of one."""
        last = len(self.units) - 2
        return ((0, self.edge - 1), (self.edge, last)) if self.redefined else ((0, last),)

    @property
    def last_before_the_change(self) -> int:
        """Return the last unit that the earlier definition has while nobody knows of the later one; -1 for none."""
        zones = {source.settings.timezone for source in (*self.sources, *self.redefined)}
        return self.edge - len(zones)  # Another zone cuts the last one off.

    def within(self, first: int, last: int, *, prefers_later: bool) -> tuple[int, int]:
        """Return the units of a run as far as they are of one definition."""
        parts = [(max(first, start), min(last, end)) for start, end in self.parts]
        return [part for part in parts if part[0] <= part[1]][-1 if prefers_later else 0]

    @property
    def changes_at(self) -> datetime | None:
        """Return from when on usage is billed by another definition, None for never."""
        return self.units[self.edge] if self.redefined else None

    def component_at(self, start: datetime) -> str:
        """Return the component or item to which usage of the unit that begins at `start` is billed."""
        return _component(self.redefined[0]) if self._is_later(start) else self.component

    def price_point_at(self, start: datetime) -> str | None:
        """Return the price point that usage of the unit that begins at `start` names, None for none."""
        (source, *_) = self.redefined if self._is_later(start) else self.sources
        named: str | None = getattr(source.destination, "price_point", None)
        return named

    def _is_later(self, start: datetime) -> bool:
        return bool(self.redefined) and start >= self.units[self.edge]

    @property
    def components(self) -> tuple[str, ...]:
        """Return all components or items that anything is billed to."""
        return tuple(dict.fromkeys(self.component_at(start) for start in self.units[:-1]))

    @property
    def told(self) -> str:
        """The kind of the history, as the closing line counts it."""
        kind = RAW if self.raw else self.kind
        return kind + BY_ARRIVAL if self.by_arrival else kind

    @property
    def site(self) -> str:
        """The canonical name of the site."""
        return self.world.site

    @property
    def moves(self) -> bool:
        """Say whether accounts may be led to other subscriptions: by a mapping, or because the site renames them."""
        return self.owners != self.billed_accounts

    @cached_property
    def owner_of(self) -> dict[str, str]:
        """Return the site's name of a subscription by the number that it has for it, or for its package."""
        first = 501 if isinstance(self.world, MaxioWorld) else 700
        return {str(first + place): owner for place, owner in enumerate(self.owners)}

    def owner(self, subscription: str) -> str:
        """Return the site's name of a subscription as the ledger names it: by number, or by the kind of name and it."""
        return subscription.partition(":")[2] or self.owner_of.get(subscription, subscription)

    @property
    def settle_after(self) -> timedelta:
        """How long after a request was sent the site may still carry it out."""
        return timedelta(seconds=900 if self.kind == "chargeover_usage" else 150)

    @property
    def cut_off(self) -> timedelta:
        """How long the site itself takes at most.

        ChargeOver documents nothing, so the settling time is the limit for landing and for being seen, together.
        """
        return timedelta(seconds=300 if self.kind == "chargeover_usage" else 120)

    def destination(self, source: BillingSource, sandbox: DirectSandbox, transport: Transport) -> Destination:
        """Return a source's destination, all of whose requests go through `transport`."""
        found = destination_class(source.destination.name)
        if found is None:
            raise Misconfigured(f"{source.destination.name!r} is no destination of this package")
        if isinstance(self.world, MaxioWorld):
            return found(source, MaxioSite(self._maxio_settings(sandbox), transport))
        return found(source, ChargeOverSite(self._chargeover_settings(sandbox), transport))

    # Settings are checked at each birth, which takes longer than most simulated tasks; so they are born once.

    def _maxio_settings(self, sandbox: DirectSandbox) -> MaxioSettings:
        if "maxio" not in self._born:
            self._born["maxio"] = MaxioSettings(
                subdomain=self.world.name,
                api_key=_KEYS[1],
                base_url=sandbox.maxio_url(self.world.name),
                events_url=sandbox.events_url,
            )
        settings: MaxioSettings = self._born["maxio"]
        return settings

    def _chargeover_settings(self, sandbox: DirectSandbox) -> ChargeOverSettings:
        if "chargeover" not in self._born:
            self._born["chargeover"] = ChargeOverSettings(
                instance=self.world.name,
                base_url=sandbox.chargeover_url(self.world.name),
                public_key=_KEYS[0],
                private_key=_KEYS[1],
                timezone=self.world.zone.key,
                **self.settings,
            )
        settings: ChargeOverSettings = self._born["chargeover"]
        return settings


def drawn_kind(chance: Chance) -> str:
    """Return what kind of history a seed draws: one of `KINDS`, or `RAW`; and whether its sources go by arrival."""
    kind = chance.pick("scene/kind", KINDS)
    kind = kind if kind != "maxio_events" or chance.odds("scene/summed", 0.6) else RAW
    return kind + BY_ARRIVAL if chance.odds("scene/incremental", 0.2) else kind


def _is_raw(source: BillingSource) -> bool:
    return getattr(source.destination, "mode", "") == "events"


def _destination_of(drawn: str) -> str:
    """Return the name of the destination that a kind of history bills to."""
    return drawn.removesuffix(BY_ARRIVAL).removesuffix(RAW.removeprefix("maxio_events"))


def drawn_scene(chance: Chance, own: BillingSource | None = None) -> Scene:
    """Draw a scene; with a source of one's own, one that fits it."""
    drawn = own.destination.name if own else drawn_kind(chance)
    kind = _destination_of(drawn)
    if kind not in KINDS:
        raise Misconfigured(f"the simulator knows no site for destination {kind!r}; it knows {', '.join(KINDS)}")
    first_day = own.settings.bill_from if own else chance.pick("scene/day", _FIRST_DAYS)
    sources = (own,) if own else _sources(chance, drawn, first_day)
    settings = sources[0].settings
    # Raw events and sources that go by arrival keep theirs.
    changes = not own and drawn == kind and chance.odds("scene/changes", 0.3)
    if changes:
        sources, redefined, units, edge = _with_a_change(chance, sources, first_day)
    else:
        redefined, units, edge = (), _units(chance, settings.period, settings.timezone, first_day), 0
    count = chance.number("scene/accounts", 2, 6)
    # What a raw event says can be taken back by no call, so nothing of it moves.
    moves = not _is_raw(sources[0]) and chance.odds("scene/moves", 0.25)
    draw = _maxio if kind.startswith("maxio") else _chargeover
    world, owners, others, component = draw(chance, (*sources, *redefined), units, count + moves)
    renames = moves and kind == "maxio_events" and not owners[0].isdigit() and chance.odds("scene/renames", 0.6)
    billed = tuple(f"at-{number}" for number in range(count)) if moves else owners
    if renames:
        # An account is a reference, which is given to another subscription: so these have names of their own.
        billed, owners = owners[:count], tuple(f"own-{number}" for number in range(count + 1))
    shared: Json = {}
    if kind == "chargeover_usage":
        shared["negative_usage"] = chance.pick("scene/negative", ("allowed", "hold"))
    switches = _switches(chance, CHARGEOVER if kind == "chargeover_usage" else MAXIO)
    if kind == "maxio_events" and switches.get("preview_shows_unused") == "no":
        # There nothing is sent unless somebody vouches for it, which is what the site's people would do.
        sources, redefined = (
            tuple(_with_keys(source, activation="assumed") for source in some) for some in (sources, redefined)
        )
    return Scene(
        kind, world, sources, units, billed, others, owners, component, shared, switches, redefined, edge, renames
    )


def _with_a_change(
    chance: Chance, sources: tuple[BillingSource, ...], first_day: date
) -> tuple[tuple[BillingSource, ...], tuple[BillingSource, ...], tuple[datetime, ...], int]:
    """Draw a change of the definition: the sources before it and after it, and the units of both with their edge.

    The later definition begins at a midnight of its own zone, where the earlier one ends, wherever its own edges are.
    """
    what = chance.pick("change/what", ("period", "zone", "component", "price point"))
    day = first_day + timedelta(days=3)
    before, after = sources[0].settings, sources[0].settings
    keys: Json = {}
    if what == "period":
        kinds = ("day", "hour") if before.period == "hour" else ("hour", "day")
        after = before.model_copy(update={"period": kinds[0]})
    elif what == "zone":
        zones = [zone for zone in _ZONES if zone != before.timezone.key]
        sources = tuple(_with_settings(source, period="day") for source in sources)
        before = sources[0].settings
        after = before.model_copy(update={"timezone": ZoneInfo(chance.pick("change/zone", zones))})
    elif what == "price point" and sources[0].destination.name == "maxio_metered":
        keys = {"price_point": OTHER_POINT[1]}
    else:
        keys = _ANOTHER[sources[0].destination.name]
    edge = _midnight(day, after.timezone)
    starts = _starts(chance.number("change/units before", 1, 3), before.period, before.timezone, day, edge)
    ends = _ends(chance.number("change/units after", 1, 2), after.period, after.timezone, day, edge)
    named = {"period": after.period, "timezone": after.timezone, "effective_from": day}
    redefined = tuple(_with_keys(_with_settings(source, **named), **keys) for source in sources)
    return sources, redefined, (*starts, edge, *ends), len(starts)


def _starts(count: int, period: str, zone: ZoneInfo, day: date, edge: datetime) -> list[datetime]:
    """Return when the last `count` units before `edge` begin; the last of them may be short."""
    if period == "hour":
        return [edge - timedelta(hours=step) for step in range(count, 0, -1)]
    midnights = [_midnight(day - timedelta(days=step), zone) for step in range(3, -2, -1)]
    return [moment for moment in midnights if moment < edge][-count:]


def _ends(count: int, period: str, zone: ZoneInfo, day: date, edge: datetime) -> list[datetime]:
    """Return when the first `count` units after `edge`, the start of `day`, end."""
    if period == "hour":
        return [edge + timedelta(hours=step) for step in range(1, count + 1)]
    return [_midnight(day + timedelta(days=step), zone) for step in range(1, count + 1)]


def _midnight(day: date, zone: ZoneInfo) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)


def _units(chance: Chance, period: str, zone: ZoneInfo, first: date) -> tuple[datetime, ...]:
    """Return the edges of a few usage periods from `first` on, reckoned without the package's own arithmetic."""
    count = chance.number("scene/units", 2, _LONGEST_UNITS)
    if period == "hour":
        start = _midnight(first, zone) + timedelta(hours=chance.number("scene/hour", 0, 23))
        return tuple(start + timedelta(hours=step) for step in range(count + 1))
    if period == "month":
        months = [first.year * 12 + first.month - 1 + step for step in range(count + 1)]
        return tuple(_midnight(date(month // 12, month % 12 + 1, 1), zone) for month in months)
    step = 7 if period == "week" else 1
    return tuple(_midnight(first + timedelta(days=step * number), zone) for number in range(count + 1))


def _sources(chance: Chance, drawn: str, first_day: date) -> tuple[BillingSource, ...]:
    function = chance.pick("source/function", ("sum", "sum", "sum", "sum", "sum", "count", "max", "last", "unique"))
    whole = function in ("count", "unique")
    decimals = 0 if whole else chance.pick("source/decimals", (0, 0, 2, 4))
    meter = {"function": function, "decimals": decimals}
    columns = {name: name for name in ("event_id", "time", "account")}
    columns |= {} if function == "count" else {"quantity": "quantity"}
    values: Json = {
        "description": "simulated",
        "warehouse": "simulated",
        "schedule": "0 0 * * *",
        "timezone": chance.pick("source/zone", _ZONES),
        "period": chance.pick("source/period", ("day", "day", "hour")),
        "lookback": chance.pick("source/lookback", (0, 0, 1, 2)),
        "bill_from": first_day,
        "columns": columns,
        "meter": meter,
        "dimensions": chance.pick("source/dimensions", ((), (), ("region",))),
        "max_withdraw_share": 1.0,
        "quarantine": {"max_share": 1.0},
        "approval": chance.odds("source/approval", 0.25),
    }
    if drawn.endswith(BY_ARRIVAL):
        values |= _by_arrival(chance, columns)
    names = ["simulated"] + (["simulated_too"] if chance.odds("source/two", 0.2) else [])
    kind = _destination_of(drawn)
    model = destination_settings(kind)
    if model is None:
        raise Misconfigured(f"{kind!r} is no destination of this package")
    is_raw = drawn.removesuffix(BY_ARRIVAL) == RAW
    # The checker of raw events knows them by their own time, so nothing of theirs passes a renewal.
    raw = {"mode": "events", "metric": _METRICS[function], "grace": "0h"} if is_raw else _late(chance, kind)
    destination = model.model_validate({"name": kind, "connection": "simulated", **_address(chance, kind), **raw})
    settings = (SourceSettings.model_validate(values | {"name": n, "shares_component_with": names}) for n in names)
    return tuple(BillingSource(each, destination, USAGE_SQL, (), ARRIVALS_SQL) for each in settings)


def _by_arrival(chance: Chance, columns: Json) -> Json:
    """Return the keys of sources that go by arrival, without a lookback: nothing else finds what is older."""
    marked = {"deleted": "deleted"} if chance.odds("source/marked", 0.8) else {}
    return {
        "incremental": "arrival",
        "arrival_overlap": chance.pick("source/overlap", ("10m", "30m", "2h", 0, 3, 1000)),
        "columns": columns | {"arrival": "arrived"} | marked,
        "lookback": 0,
    }


def _late(chance: Chance, kind: str) -> Json:
    """Return the keys of a destination that say what becomes of late usage; all but what hopes for the site."""
    goes = "bill_now" if kind == "maxio_metered" else "now"
    policy = chance.pick("source/late", (None, None, goes, "hold", "refuse"))
    grace = chance.pick("source/grace", ("0h", None, "2h", "1d", "40d"))
    return {key: value for key, value in (("grace", grace), ("late_usage", policy)) if value}


def _address(chance: Chance, kind: str) -> Json:
    """Return the keys of a destination that say where usage goes."""
    if kind == "maxio_metered":
        by = chance.pick("source/by", ("reference", "id"))
        point = chance.pick("source/point", (None, "handle:standard"))
        return {"subscription_by": by, "component": "handle:metered", "price_point": point}
    if kind == "maxio_events":
        by = chance.pick("source/by", ("subscription_id", "subscription_reference", "account_id"))
        return {"stream": "usage", "subscription_by": by, "component": "handle:evented", "property": "units"}
    mode = chance.pick("source/mode", ("batch", "batch", "single"))
    by = chance.pick("source/by", ("external_key", "customer_external_key"))
    return {"package_by": by, "item": "voip", "mode": mode}


def _billing(chance: Chance, units: tuple[datetime, ...], months: int) -> Json:
    """Return the open billing period: so many months that cover the whole history, or a month that ends on the way."""
    zone = ZoneInfo(chance.pick("site/zone", _ZONES))
    first = units[0].astimezone(zone).date()
    span = max((units[-1] - units[0]).days, 1)
    # No month of a site begins after the 28th.
    ends = [day for day in (first + timedelta(days=step) for step in range(1, span + 3)) if day.day <= _LAST_FIRST]
    if chance.odds("site/renews", 0.3) and ends:
        end = chance.pick("site/end", ends)
        start = _months_before(end, 1)
    else:
        start = min(first, first.replace(day=_LAST_FIRST))
        end = _months_before(start, -months)
    return {"now": units[0], "zone": zone.key, "billing_period": {"start": start, "end": end}}


def _months_before(day: date, months: int) -> date:
    count = day.year * 12 + day.month - 1 - months
    return day.replace(year=count // 12, month=count % 12 + 1)


def _maxio(
    chance: Chance, sources: tuple[BillingSource, ...], units: tuple[datetime, ...], count: int
) -> tuple[MaxioWorld, tuple[str, ...], tuple[str, ...], str]:
    destination: Any = sources[0].destination
    number, _, handle = destination.component.rpartition(":")
    component: Json = {
        "id": 610 if number else int(handle),
        "handle": handle if number else "own",
        "name": "Usage",
        "family": "plan",
        "unit_name": "unit",
        "allow_fractional_quantities": sources[0].settings.meter.decimals > 0,
        "kind": "metered_component",
        "price_points": [{"id": 710, "handle": "standard", "name": "Standard", "unit_price": "0.5", "default": True}],
    }
    by = destination.subscription_by
    streams: list[Json] = []
    if sources[0].destination.name == "maxio_events":
        streams = [{"handle": destination.stream, "name": "Usage", "identifier": by}]
        metric = {"id": 810, "kind": destination.metric, "property": destination.property}
        component |= {"kind": "event_based_component", "stream": destination.stream, "metric": metric}
    elif destination.price_point:
        kind, _, point = destination.price_point.rpartition(":")
        component["price_points"][0] |= {"handle": point} if kind else {"id": int(point)}
    components = [component]
    if _component(sources[-1]) == "another":
        components.append(_another_component(component))
        streams += [stream | {"handle": "another"} for stream in streams]
    elif getattr(sources[-1].destination, "price_point", None) == OTHER_POINT[1]:
        other_point = {"id": OTHER_POINT[0], "handle": "other", "name": "Other", "unit_price": "0.25"}
        component["price_points"].append(other_point)
    activated = [each["handle"] for each in components] if streams else []
    live = [{"id": 501 + n, "reference": f"acct-{n}", "family": "plan", "activated": activated} for n in range(count)]
    billing = _billing(chance, units, 4)
    # A trial becomes a paid subscription when its period ends, and nobody else in a history begins to be billed.
    lasting = billing["billing_period"]["end"] - units[-1].date() > _AFTERWARDS
    trial = lasting and chance.odds("scene/trial", 0.5)
    other = {"id": 599, "reference": "trying" if trial else "ended", "family": "plan", "activated": activated}
    other["state"] = "trialing" if trial else "canceled"
    product = {"id": 420, "handle": "team", "name": "Team", "price": "0"}
    world = MaxioWorld.model_validate(
        {
            "site": "maxio:us:simulated",
            "api_key": _KEYS[1],
            "limits": {"in_process": None},
            "product_families": [{"id": 410, "handle": "plan", "name": "Plan", "product": product}],
            "streams": streams,
            "components": components,
            "subscriptions": [*live, other],
            **billing,
        }
    )
    by_id = by in ("id", "subscription_id")
    billed = tuple(str(one["id"]) if by_id else str(one["reference"]) for one in live)
    others = ("599", "77") if by_id else (str(other["reference"]), "nobody")
    return world, billed, others, str(component["handle"])


def _another_component(component: Json) -> Json:
    """Return a second component like the one, which takes the events of a second stream, if it takes any."""
    points = [point | {"id": point["id"] + 10} for point in component["price_points"]]
    found = component | {"id": component["id"] + 10, "handle": "another", "name": "Another", "price_points": points}
    if "stream" in component:
        found |= {"stream": "another", "metric": component["metric"] | {"id": component["metric"]["id"] + 10}}
    return found


def _chargeover(
    chance: Chance, sources: tuple[BillingSource, ...], units: tuple[datetime, ...], count: int
) -> tuple[ChargeOverWorld, tuple[str, ...], tuple[str, ...], str]:
    destination: Any = sources[0].destination
    keys = list(dict.fromkeys(map(_component, sources)))
    items = [
        {"item_id": 13 + n, "external_key": key, "name": "Usage", "units": "unit", "metered": True}
        for n, key in enumerate(keys)
    ]
    customers = [{"customer_id": 10 + n, "external_key": f"cust-{n}", "company": f"C {n}"} for n in range(count + 1)]
    packages = [
        {
            "package_id": 700 + n,
            "external_key": f"pkg-{n}",
            "customer": f"cust-{n}",
            "state": "active" if n < count else "cancelled",
            "lines": [{"id": 850 + 100 * place + n, "item": key} for place, key in enumerate(keys)],
        }
        for n in range(count + 1)
    ]
    world = ChargeOverWorld.model_validate(
        {
            "site": "chargeover:simulated",
            "public_key": _KEYS[0],
            "private_key": _KEYS[1],
            "items": items,
            "customers": customers,
            "packages": packages,
            # The sandbox's account bills by the month, and says so.
            **_billing(chance, units, 1),
        }
    )
    word = "pkg" if destination.package_by == "external_key" else "cust"
    billed = tuple(f"{word}-{n}" for n in range(count))
    return world, billed, (f"{word}-{count}", f"{word}-nobody"), str(destination.item)


def _switches(chance: Chance, known: Json) -> Json:
    """Turn each switch of a site that no document settles, or leave it."""
    turned: Json = {}
    for name, switch in known.items():
        choices = _DELAYS.get(name, switch.choices)
        if name in UNDRAWN or not choices or not chance.strikes(f"switch:{name}", 0.4):
            continue
        turned[name] = chance.pick(f"switch/to:{name}", [choice for choice in choices if choice not in ("2", "20")])
    return turned


def simulated(own: BillingSource) -> BillingSource:
    """Return a user's own source as a history runs it: without its limits, which are for a person to answer.

    Its expectations stay out too: the rows here are sound or not by the package's own rules, and Great Expectations
    would take most of the time.

    Raises:
        Misconfigured: no history can be drawn for such a source.
    """
    if getattr(own.destination, "metric", "") == "percentile":
        raise Misconfigured(f"{own.name}: the sandbox computes no percentile, so no history can be drawn")
    if own.settings.period == "interval":
        raise Misconfigured(f"{own.name}: the simulator knows hours, days, weeks and months, no period: interval")
    limits = own.settings.quarantine.model_copy(update={"max_share": 1.0, "max_rows": 10_000})
    settings = own.settings.model_copy(update={"max_withdraw_share": 1.0, "quarantine": limits})
    return replace(own, settings=settings, sql=USAGE_SQL, arrivals_sql=ARRIVALS_SQL, expectations=())


def _component(source: BillingSource) -> str:
    destination: Any = source.destination
    named: str = getattr(destination, "component", "") or destination.item
    return named.removeprefix("handle:")


def _with_settings(source: BillingSource, **keys: object) -> BillingSource:
    return replace(source, settings=source.settings.model_copy(update=keys))


def _with_keys(source: BillingSource, **keys: object) -> BillingSource:
    return replace(source, destination=source.destination.model_copy(update=keys))


def with_batches(source: BillingSource, rows: int) -> BillingSource:
    """Return the same source with another batch size: nothing that is billed may hang on it."""
    return replace(source, settings=source.settings.model_copy(update={"batch_rows": rows}))
