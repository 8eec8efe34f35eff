"""The sandbox as one Starlette application: control, every API of every site, and the way of a request to them."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from email.utils import format_datetime
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from .clock import from_micros
from .control import Control
from .faults import Fault
from .pace import Pace, ServedPace
from .sites import Site, Sites
from .spoil import spoilt
from .traffic import Gate, Overloaded, Rate
from .wire import Call, NoReply, Route, RoutedApp, canonical_path
from .world import Limits, World

Work = Callable[[Callable[[], Response]], Awaitable[Response]]
Commit = Callable[[Callable[[], Response]], Response]

_ROOTS = {
    "maxio": "/maxio/{}",
    "events": "/events/{}",
    "events-eu": "/events-eu/{}",
    "chargeover": "/chargeover/{}/api/v3",
}
# All hosts of Maxio let the format be chosen by header instead.
_WITH_SUFFIX = ("/maxio/", "/events/", "/events-eu/")
_log = logging.getLogger(__name__)


class SandboxApp(RoutedApp):
    """The ASGI application. Every handler runs in one transaction, committed before its reply is sent."""

    def __init__(self, worlds: Sequence[Path | World], books: Path | None, pace: Pace | None = None) -> None:
        super().__init__(lifespan=self._live)
        self.pace = pace or ServedPace()
        self.sites = Sites(worlds, books, virtual=self.pace.virtual)
        self.control = Control(self.sites, self.reset)
        self._route()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route by the path as it was sent: in the server's reading of it, an encoded slash would part two segments."""
        if scope["type"] == "http":
            path = canonical_path(scope["raw_path"].decode("latin-1"))
            scope["xml"] = path.startswith("/maxio/") and path.endswith(".xml")
            suffix = ".xml" if scope["xml"] else ".json"
            path = path.removesuffix(suffix) if path.startswith(_WITH_SUFFIX) else path
            # A mount takes its own path with a slash only.
            scope["path"] = f"{path}/" if path in self._mounted else path
        await super().__call__(scope, receive, send)

    def reset(self) -> None:
        """Begin again from the worlds; requests that are under way end at the sites where they began."""
        self.sites.reset()
        self._route()

    async def visit(self, call: Call, route: Route | None) -> Response:
        """Answer a control request, or one that nothing here is for."""
        if not call.request["path"].startswith("/_sandbox/"):
            return PlainTextResponse("No such site or API.\n", 404)
        return await self._work(lambda: self.control.answer(call, route))

    def close(self) -> None:
        """End the work that is under way, and close the books."""
        self.pace.close()
        self.sites.books.close()

    @asynccontextmanager
    async def _live(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self.close()

    def _route(self) -> None:
        mounts = [
            Mount(
                _ROOTS[host].format(site.world.name),
                SiteApp(site, host, self.sites, self.pace, self._work, self.commit),
            )
            for site in self.sites.by_name.values()
            for host in site.apis
        ]
        self.router.routes = [Mount("/_sandbox", routes=self.control.routes), *mounts]
        self._mounted = {"/_sandbox", *(mount.path for mount in mounts)}

    async def _work(self, handler: Callable[[], Response]) -> Response:
        return await self.pace.work(lambda: self.commit(handler))

    def commit(self, handler: Callable[[], Response]) -> Response:
        """Run a handler in a transaction of its own, with the renewals that are due before it."""
        try:
            with self.sites.books.transaction():
                self.sites.renew()
                return handler()
        except Exception:  # noqa: BLE001 - a fault of the sandbox is told in its log and never ends the server.
            _log.exception("The sandbox itself failed; nothing was written.")
            return PlainTextResponse("The sandbox itself failed; see its log.\n", 500)


class SiteApp(RoutedApp):
    """One API of one site: requests pass the site's limits and the faults that wait for them."""

    def __init__(self, site: Site, host: str, sites: Sites, pace: Pace, work: Work, commit: Commit) -> None:
        self.site, self.api, self.faults = site, site.apis[host], sites.faults
        self._sites, self._pace, self._work, self._commit = sites, pace, work, commit
        # Only the main APIs have limits; the events host documents none.
        limits = Limits(in_process=None) if host.startswith("events") else site.world.limits
        # Where requests come one by one, nobody could ever leave the place that another one waits for.
        self.gate = Gate(limits.model_copy(update={"queued": 0}) if pace.virtual else limits, site.tally, host)
        super().__init__(routes=self.api.routes)

    async def visit(self, call: Call, route: Route | None) -> Response:
        """Take a request through the site's limits and the faults that wait for it."""
        name, writing = (route.name, route.writing) if route else ("unknown", call.request.method != "GET")
        self.site.tally.arrived(name, writing)
        bulk = route is not None and route.bulk
        fault = self.faults.take(self.site.world.site, name, writing=writing, bulk=bulk)
        try:
            async with self.gate.enter(self._rate()):
                reply = await self._suffer(fault, call, route)
                if self.site.world.limits.hold_seconds:
                    await self._pace.wait(self.site.world.limits.hold_seconds)
        except Overloaded:
            reply = self.api.throttled()
        finally:
            # A late one has not been answered by the site, whatever its client was told.
            if fault is None or fault.fault != "late_commit":
                self.api.left(call)
        self.site.tally.answered(reply.status_code)
        # Sites say what time it is for them, to the second.
        reply.headers["Date"] = format_datetime(from_micros(self._sites.books.now()), usegmt=True)
        return reply

    async def _suffer(self, fault: Fault | None, call: Call, route: Route | None) -> Response:
        """Answer a request, or do to it what was ordered."""
        if fault is None:
            return await self._work(lambda: self._answer(call, route))
        match fault.fault:
            case "hang":
                return await self._hang(fault, call, route)
            case "late_commit" | "late_arrival":
                return await self._come_late(fault, call, route)
            case "partial_bulk":
                return await self._work(lambda: self._do_part(fault, call, route))
        reply = Response()
        if fault.takes_effect:
            reply = await self._work(lambda: self._answer(call, route))
        own: dict[str, Callable[[], Response]] = {
            "throttle": self.api.throttled,
            "unauthorized": self.api.unauthorized,
            "error_inside": self.api.error_inside,
            "server_error": lambda: self.api.server_error(fault.code),
            "server_error_after_commit": lambda: self.api.server_error(fault.code),
        }
        return own[fault.fault]() if fault.fault in own else spoilt(reply, fault)

    async def _hang(self, fault: Fault, call: Call, route: Route | None) -> Response:
        """Hold a request that has arrived, then carry it out: a client that gave up meanwhile has it to find."""
        early = await self._work(lambda: self.api.arrive(call, route) or Response())
        if early.status_code >= 400:
            return early
        await self._pace.wait(fault.seconds)
        return await self._work(lambda: self._carry_out_if_here(call, route))

    async def _come_late(self, fault: Fault, call: Call, route: Route | None) -> Response:
        """Tell the client at once that it failed, and carry the request out later."""
        arrived = fault.fault == "late_commit"
        if not arrived or (await self._work(lambda: self.api.arrive(call, route) or Response())).status_code < 400:
            task = self._carry_out_if_here if arrived else self._answer_if_here

            def land() -> Response:
                try:
                    return self._commit(lambda: task(call, route))
                finally:
                    self.api.left(call)

            self._pace.later(fault.seconds, land)
        return NoReply() if fault.status is None else self.api.server_error(fault.status)

    def _answer(self, call: Call, route: Route | None) -> Response:
        return self.api.arrive(call, route) or self.api.carry_out(call, route)

    def _do_part(self, fault: Fault, call: Call, route: Route | None) -> Response:
        if route is None:
            return self._answer(call, route)
        return self.api.arrive(call, route) or self.api.do_half(call, route, fault.status)

    def _answer_if_here(self, call: Call, route: Route | None) -> Response:
        return self._answer(call, route) if self._here() else Response()

    def _carry_out_if_here(self, call: Call, route: Route | None) -> Response:
        return self.api.carry_out(call, route) if self._here() else Response()

    def _here(self) -> bool:
        """Say whether the site is still there: after a reset nothing lands that was sent before it."""
        return self._sites.by_name.get(self.site.world.site) is self.site

    def _rate(self) -> Rate | None:
        """Return how many requests a second the site takes, and the second it is."""
        limit = self.site.switches[self.api.rate_switch] if self.api.rate_switch else "none"
        return None if limit == "none" else Rate(int(limit), self._sites.books.second())


def create_app(worlds: Sequence[Path | World], books: Path | None = None, pace: Pace | None = None) -> SandboxApp:
    """Return the sandbox for the worlds (files, folders or loaded ones); `WorldError` tells all their faults.

    Without `books` everything is in memory and gone with the process; without a `pace` it is to be served.
    """
    return SandboxApp(worlds, books, pace)
