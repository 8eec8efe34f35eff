"""`/_sandbox/`: what people, tests and the demo ask of the sandbox itself, and tell it to do."""

from collections.abc import Callable
from dataclasses import asdict
from decimal import Decimal
from typing import Any

from starlette.responses import Response

from .billing import billed
from .clock import ClockMovedBack, from_micros, parse_instant
from .faults import BadFault, Fault
from .sites import Site, Sites
from .switches import CHARGEOVER, MAXIO, UnknownSwitch
from .wire import BadJson, Call, Route, json_reply, plain
from .world import WorldError

VERSION = "1"


class BadOrder(ValueError):
    """A control request that cannot be carried out: 422 with these faults."""

    def __init__(self, *faults: str) -> None:
        super().__init__("; ".join(faults))
        self.faults = list(faults)


class Control:
    """Answers `/_sandbox/`; every call runs in a transaction of its own."""

    def __init__(self, sites: Sites, reset: Callable[[], None]) -> None:
        """`reset` begins again from the world files."""
        self.sites = sites
        self._reset = reset
        self.routes = [
            Route("GET", "/", "summary", self.read_summary),
            Route("GET", "/clock", "clock", self.read_clock),
            Route("POST", "/clock", "clock", self.move_clock),
            Route("GET", "/switches", "switches", self.read_switches),
            Route("POST", "/switches", "switches", self.turn_switches),
            Route("GET", "/switches/known", "switches", self.list_switches),
            Route("GET", "/switches/consulted", "switches", self.read_consulted),
            Route("GET", "/faults", "faults", self.read_faults),
            Route("POST", "/faults", "faults", self.order_fault),
            Route("DELETE", "/faults", "faults", self.clear_faults),
            Route("GET", "/billed", "billed", self.read_billed),
            Route("GET", "/requests", "requests", self.read_requests),
            Route("POST", "/requests/reset", "requests", self.reset_requests),
            Route("GET", "/records", "records", self.read_records),
            Route("POST", "/reset", "reset", self.reset),
        ]

    def answer(self, call: Call, route: Route | None) -> Response:
        """Answer one control request."""
        if route is None:
            known = sorted({known.path.removeprefix("/") for known in self.routes} - {""})
            return json_reply({"errors": ["no such control"], "known": known}, 404)
        try:
            return route.handler(call, **call.params)
        except BadOrder as refusal:
            return json_reply({"errors": refusal.faults}, 422)
        except UnknownSwitch as refusal:
            return json_reply({"errors": refusal.faults, "known": refusal.known}, 422)
        except (BadFault, BadJson, ClockMovedBack) as refusal:
            return json_reply({"errors": [str(refusal)]}, 422)

    def read_summary(self, call: Call) -> Response:
        """`GET /_sandbox/`: sites, clock, version."""
        sites = self.sites.by_name.values()
        shown = [{"site": x.world.site, "zone": x.world.zone.key, "apis": sorted(x.apis)} for x in sites]
        return json_reply({"version": VERSION, "sites": shown, **self._clock()})

    def read_clock(self, call: Call) -> Response:
        """`GET /_sandbox/clock`."""
        return json_reply(self._clock())

    def move_clock(self, call: Call) -> Response:
        """`POST /_sandbox/clock` with `now` or `advance_seconds`: moves forward and renews what is due."""
        order = _object(call, {"now", "advance_seconds"})
        clock = self.sites.books.clock
        if "now" in order:
            site = next(iter(self.sites.by_name.values()))
            clock.move_to(_instant(order["now"], site))
        elif isinstance(seconds := order.get("advance_seconds"), int | Decimal):
            clock.move_to(clock.now() + int(seconds * 1_000_000))
        else:
            raise BadOrder("now (an ISO 8601 time) or advance_seconds (a number) is missing")
        self.sites.books.save_clock()
        return json_reply({**self._clock(), "renewals": self.sites.renew()})

    def read_switches(self, call: Call) -> Response:
        """`GET /_sandbox/switches?site=`: present values, by site."""
        return json_reply({site.world.site: site.switches.as_dict() for site in self._asked(call)})

    def list_switches(self, call: Call) -> Response:
        """`GET /_sandbox/switches/known`: every switch of each API, with its choices and what it decides."""
        known = {"maxio": MAXIO, "chargeover": CHARGEOVER}
        return json_reply({api: {name: s.as_dict() for name, s in switches.items()} for api, switches in known.items()})

    def read_consulted(self, call: Call) -> Response:
        """`GET /_sandbox/switches/consulted?site=`: those that the site looked at since they were last turned."""
        return json_reply({site.world.site: sorted(site.switches.consulted) for site in self._asked(call)})

    def turn_switches(self, call: Call) -> Response:
        """`POST /_sandbox/switches`: all of the named ones, or none; they outlive a restart."""
        order = _object(call, {"site", "switches"})
        site = self._site(order.get("site"))
        wanted = order.get("switches")
        if not isinstance(wanted, dict):
            raise BadOrder("switches must be an object")
        site.switches.update(wanted)
        values = site.switches.as_dict()
        self.sites.books.save_switches(site.world.site, {name: values[name] for name in wanted})
        return json_reply(values)

    def read_faults(self, call: Call) -> Response:
        """`GET /_sandbox/faults`: those still to come."""
        rows = [{**asdict(fault), "seconds": Decimal(str(fault.seconds))} for fault in self.sites.faults.remaining()]
        return json_reply({"faults": rows})

    def order_fault(self, call: Call) -> Response:
        """`POST /_sandbox/faults`: see `faults.Fault`."""
        order = _object(call, None)
        self._site(order.get("site"))
        fault = Fault.from_order(order)
        if fault.count:
            self.sites.faults.add(fault)
        return self.read_faults(call)

    def clear_faults(self, call: Call) -> Response:
        """`DELETE /_sandbox/faults`."""
        self.sites.faults.clear()
        return self.read_faults(call)

    def read_billed(self, call: Call) -> Response:
        """`GET /_sandbox/billed?site=`: see `billing.billed`; with sums by site and component."""
        rows = [row for site in self._asked(call) for row in billed(self.sites.books, site.biller)]
        return json_reply({"rows": rows, "total": _totals(rows)})

    def read_requests(self, call: Call) -> Response:
        """`GET /_sandbox/requests?site=`: counts since the last reset, by site."""
        return json_reply({site.world.site: site.tally.as_dict() for site in self._asked(call)})

    def reset_requests(self, call: Call) -> Response:
        """`POST /_sandbox/requests/reset`: count from zero again."""
        for site in self.sites.by_name.values():
            site.tally.reset()
        return json_reply({})

    def read_records(self, call: Call) -> Response:
        """`GET /_sandbox/records?site=&component=`: the raw stored records, in the order they were stored."""
        component = call.param("component")
        rows = [row for site in self._asked(call) for row in site.biller.records(component)]
        return json_reply({"records": rows})

    def reset(self, call: Call) -> Response:
        """`POST /_sandbox/reset`: begin again from the world files."""
        try:
            self._reset()
        except WorldError as refusal:
            raise BadOrder(*refusal.faults) from refusal
        return self.read_summary(call)

    def _clock(self) -> dict[str, Any]:
        clock = self.sites.books.clock
        return {"now": from_micros(clock.now()).isoformat(), "rate": Decimal(str(clock.rate))}

    def _asked(self, call: Call) -> list[Site]:
        name = call.param("site")
        return list(self.sites.by_name.values()) if name is None else [self._site(name)]

    def _site(self, name: object) -> Site:
        site = self.sites.by_name.get(name) if isinstance(name, str) else None
        if site is None:
            raise BadOrder(f"unknown site {name!r}, only {', '.join(self.sites.by_name)}")
        return site


def _object(call: Call, known: set[str] | None) -> dict[str, Any]:
    order = call.json()
    if not isinstance(order, dict):
        raise BadOrder("the body must be an object")
    if known is not None and (extra := sorted(set(order) - known)):
        raise BadOrder(*(f"unknown field {name!r}, only {', '.join(sorted(known))}" for name in extra))
    return order


def _instant(text: object, site: Site) -> int:
    try:
        return parse_instant(str(text), site.world.zone)
    except ValueError as error:
        raise BadOrder(f"now is not an ISO 8601 time: {text!r}") from error


def _totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    figures = ("invoiced", "open", "billed", "stored")
    sums: dict[tuple[str, str], dict[str, Decimal]] = {}
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        key = (row["site"], row["component"])
        total = sums.setdefault(key, dict.fromkeys(figures, Decimal(0)))
        counts[key] = counts.get(key, 0) + row["records"]
        for figure in figures:
            total[figure] += Decimal(row[figure])
    return [
        {"site": site, "component": component, "records": counts[site, component]}
        | {figure: plain(total[figure]) for figure in figures}
        for (site, component), total in sums.items()
    ]
