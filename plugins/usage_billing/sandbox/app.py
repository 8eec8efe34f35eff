"""The sandbox as one Starlette application: control, every API of every site, and the way of a request to them."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from decimal import getcontext
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

from .control import Control
from .faults import Fault
from .sites import Site, Sites
from .traffic import Gate, Overloaded
from .wire import Call, NoReply, Route, RoutedApp, canonical_path
from .world import Limits

Work = Callable[[Callable[[], Response]], Awaitable[Response]]

_ROOTS = {"maxio": "/maxio/{}", "events": "/events/{}", "chargeover": "/chargeover/{}/api/v3"}
# Both hosts of Maxio let the format be chosen by header instead.
_WITH_SUFFIX = ("/maxio/", "/events/")
_log = logging.getLogger(__name__)


class SandboxApp(RoutedApp):
    """The ASGI application. Every handler runs in one transaction, committed before its reply is sent."""

    def __init__(self, paths: Sequence[Path], books: Path | None) -> None:
        super().__init__(lifespan=self._live)
        self.sites = Sites(paths, books)
        self.control = Control(self.sites, self.reset)
        self._workers = ThreadPoolExecutor(8, "sandbox", _count_exactly)
        self._route()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route by the path as it was sent: in the server's reading of it, an encoded slash would part two segments."""
        if scope["type"] == "http":
            path = canonical_path(scope["raw_path"].decode("latin-1"))
            path = path.removesuffix(".json") if path.startswith(_WITH_SUFFIX) else path
            # A mount takes its own path with a slash only.
            scope["path"] = f"{path}/" if path in self._mounted else path
        await super().__call__(scope, receive, send)

    def reset(self) -> None:
        """Begin again from the world files; requests that are under way end at the sites where they began."""
        self.sites.reset()
        self._route()

    async def visit(self, call: Call, route: Route | None) -> Response:
        """Answer a control request, or one that nothing here is for."""
        if not call.request["path"].startswith("/_sandbox/"):
            return PlainTextResponse("No such site or API.\n", 404)
        return await self._work(lambda: self.control.answer(call, route))

    @asynccontextmanager
    async def _live(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self._workers.shutdown(wait=True, cancel_futures=True)
        self.sites.books.close()

    def _route(self) -> None:
        mounts = [
            Mount(_ROOTS[host].format(site.world.name), SiteApp(site, host, self.sites, self._work))
            for site in self.sites.by_name.values()
            for host in site.apis
        ]
        self.router.routes = [Mount("/_sandbox", routes=self.control.routes), *mounts]
        self._mounted = {"/_sandbox", *(mount.path for mount in mounts)}

    async def _work(self, handler: Callable[[], Response]) -> Response:
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._commit, handler)

    def _commit(self, handler: Callable[[], Response]) -> Response:
        try:
            with self.sites.books.transaction():
                self.sites.renew()
                return handler()
        except Exception:  # noqa: BLE001 - a fault of the sandbox is told in its log and never ends the server.
            _log.exception("The sandbox itself failed; nothing was written.")
            return PlainTextResponse("The sandbox itself failed; see its log.\n", 500)


class SiteApp(RoutedApp):
    """One API of one site: requests pass the site's limits and the faults that wait for them."""

    def __init__(self, site: Site, host: str, sites: Sites, work: Work) -> None:
        self.site, self.api, self.faults, self._work = site, site.apis[host], sites.faults, work
        # Only the main APIs have limits; the events host documents none.
        self.gate = Gate(Limits(in_process=None) if host == "events" else site.world.limits, site.tally, host)
        super().__init__(routes=self.api.routes)

    async def visit(self, call: Call, route: Route | None) -> Response:
        """Take a request through the site's limits and the faults that wait for it."""
        name, writing = (route.name, route.writing) if route else ("unknown", call.request.method != "GET")
        self.site.tally.arrived(name, writing)
        fault = self.faults.take(self.site.world.site, name, writing)
        try:
            async with self.gate.enter():
                reply = await self._suffer(fault, call, route)
                if self.site.world.limits.hold_seconds:
                    await asyncio.sleep(self.site.world.limits.hold_seconds)
        except Overloaded:
            reply = self.api.throttled()
        self.site.tally.answered(reply.status_code)
        return reply

    async def _suffer(self, fault: Fault | None, call: Call, route: Route | None) -> Response:
        kind = fault.fault if fault else None
        if kind == "throttle":
            return self.api.throttled()
        if kind == "unauthorized":
            return self.api.unauthorized()
        if fault and kind == "server_error":
            return self.api.server_error(fault.status)
        if fault and kind == "hang":
            # The request is carried out after all: a client that gave up meanwhile has a late commit to find.
            await asyncio.sleep(fault.seconds)
        reply = await self._work(lambda: self.api.answer(call, route))
        if kind == "lost_reply":
            return NoReply()
        return self.api.server_error(fault.status) if fault and kind == "server_error_after_commit" else reply


def create_app(worlds: Sequence[Path], books: Path | None = None) -> SandboxApp:
    """Return the sandbox for the worlds (files or folders); `WorldError` tells all their faults.

    Without `books` everything is in memory and gone with the process.
    """
    return SandboxApp(worlds, books)


def _count_exactly() -> None:
    # The default of 28 digits would round long sums; a context belongs to its thread.
    getcontext().prec = 100
