"""The billing sites of a sandbox, and what they share: books, clock, and the faults that wait."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from starlette.responses import Response

from .billing import Biller, renew_due
from .books import Books
from .chargeover.api import ChargeOverApi
from .chargeover.billing import ChargeOverBiller
from .chargeover.envelope import ChargeOverAccount
from .chargeover.views import Views as ChargeOverViews
from .faults import FaultBox
from .maxio.api import MaxioApi
from .maxio.billing import MaxioBiller
from .maxio.events import MaxioEvents
from .maxio.lookups import MaxioSite
from .maxio.views import Views as MaxioViews
from .switches import CHARGEOVER, MAXIO, SwitchBoard
from .traffic import Tally
from .wire import Call, Route
from .world import AnySite, ChargeOverWorld, MaxioWorld, World, load_worlds


class Api(Protocol):
    """One API of one site."""

    routes: Sequence[Route]

    @property
    def rate_switch(self) -> str | None:
        """Return the switch that limits requests in a second, if there is one."""
        ...

    def arrive(self, call: Call, route: Route | None) -> Response | None:
        """Look at a request as it comes in, and answer the one that needs no more; `route` is None if there is none."""
        ...

    def carry_out(self, call: Call, route: Route | None) -> Response:
        """Carry out a request that has arrived, and answer it, errors included."""
        ...

    def left(self, call: Call) -> None:
        """Take note that a request has been answered."""
        ...

    def unauthorized(self) -> Response:
        """Return what wrong credentials get."""
        ...

    def throttled(self) -> Response:
        """Return what a request too many gets."""
        ...

    def server_error(self, status: int) -> Response:
        """Return what a request gets when the site breaks."""
        ...

    def error_inside(self) -> Response:
        """Return an error in the body of a 200."""
        ...

    def do_half(self, call: Call, route: Route, status: int | None) -> Response:
        """Carry out a part of a bulk request, and answer as the API does then."""
        ...


@dataclass
class Site:
    """A billing site: its world, switches, billing rules, APIs by host, and what it was asked."""

    world: World
    switches: SwitchBoard
    biller: Biller
    apis: dict[str, Api]
    tally: Tally = field(default_factory=Tally)


class Sites:
    """The sites by name, their common books and the faults that are still to come."""

    def __init__(self, worlds: Sequence[Path | World], books: Path | None, *, virtual: bool = False) -> None:
        """Open the worlds (files, folders or loaded ones); `WorldError` tells all their faults."""
        self._sources = list(worlds)
        loaded = load_worlds(self._sources)
        self.books = Books(books, loaded, virtual=virtual)
        self.faults = FaultBox()
        self.by_name = self._open(loaded)

    def renew(self) -> int:
        """Renew what is due; call within a transaction."""
        return renew_due(self.books, {name: site.biller for name, site in self.by_name.items()})

    def reset(self) -> None:
        """Begin again from the worlds: books, clock, switches, faults and counts; call within a transaction."""
        worlds = load_worlds(self._sources)
        self.faults.clear()
        self.books.reset(worlds)
        self.by_name = self._open(worlds)

    def _open(self, worlds: Sequence[AnySite]) -> dict[str, Site]:
        sites = {}
        for world in worlds:
            site = _maxio(world, self.books) if isinstance(world, MaxioWorld) else _chargeover(world, self.books)
            site.switches.update(self.books.switches(world.site))
            sites[world.site] = site
        return sites


def _maxio(world: MaxioWorld, books: Books) -> Site:
    switches = SwitchBoard(MAXIO, world.switches)
    biller = MaxioBiller(world, books, switches)
    site = MaxioSite(world, books, switches, biller, MaxioViews(world))
    apis: dict[str, Api] = {"maxio": MaxioApi(site), "events": MaxioEvents(site)}
    if world.site.startswith("maxio:eu:"):
        apis["events-eu"] = MaxioEvents(site, own_host=True)
    return Site(world, switches, biller, apis)


def _chargeover(world: ChargeOverWorld, books: Books) -> Site:
    switches = SwitchBoard(CHARGEOVER, world.switches)
    biller = ChargeOverBiller(world, books, switches)
    account = ChargeOverAccount(world, books, switches, biller, ChargeOverViews(world, switches))
    return Site(world, switches, biller, {"chargeover": ChargeOverApi(account)})
