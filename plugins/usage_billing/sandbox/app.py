"""The sandbox as one ASGI application: sites, faults, limits, renewals, and the way of a request through them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import getcontext
from pathlib import Path
from typing import Any, Protocol

from .billing import Biller, renew_due
from .books import Books
from .chargeover.api import ChargeOverApi
from .chargeover.billing import ChargeOverBiller
from .chargeover.envelope import ChargeOverAccount
from .chargeover.views import Views as ChargeOverViews
from .control import Control
from .faults import Fault, FaultBox
from .maxio.api import MaxioApi
from .maxio.billing import MaxioBiller
from .maxio.events import MaxioEvents
from .maxio.lookups import MaxioSite
from .maxio.views import Views as MaxioViews
from .switches import CHARGEOVER, MAXIO, SwitchBoard
from .traffic import Gate, Overloaded, Tally
from .wire import Call, Reply, Route, split_target, text_reply
from .world import AnySite, ChargeOverWorld, Limits, MaxioWorld, World, load_worlds

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_log = logging.getLogger(__name__)


class Api(Protocol):
    """One API of one site."""

    def find(self, call: Call) -> tuple[Route, dict[str, str]] | None:
        """Return the call's route with the path's parameters, or None."""
        ...

    def answer(self, call: Call) -> Reply:
        """Answer the call, credentials and errors included."""
        ...

    def unauthorized(self) -> Reply:
        """Return what wrong credentials get."""
        ...

    def throttled(self) -> Reply:
        """Return what a request too many gets."""
        ...

    def server_error(self, status: int) -> Reply:
        """Return what a request gets when the site breaks."""
        ...


@dataclass
class Site:
    """A billing site: its world, switches, billing rules, APIs by URL prefix, and what it was asked."""

    world: World
    switches: SwitchBoard
    biller: Biller
    apis: dict[str, Api]
    tally: Tally = field(default_factory=Tally)
    gates: dict[str, Gate] = field(default_factory=dict)


class SandboxApp:
    """The ASGI application. Every handler runs in one transaction, committed before its reply is sent."""

    def __init__(self, paths: Sequence[Path], books: Path | None) -> None:
        self.paths = list(paths)
        worlds = load_worlds(self.paths)
        self.books = Books(books, worlds)
        self.faults = FaultBox()
        self.sites = {world.site: self._open_site(world) for world in worlds}
        self.control = Control(self)
        self._workers = ThreadPoolExecutor(8, "sandbox", _count_exactly)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request, or the server's start and stop."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    def renew(self) -> int:
        """Renew what is due; call within a transaction."""
        return renew_due(self.books, {name: site.biller for name, site in self.sites.items()})

    def reset(self) -> None:
        """Begin again from the world files: books, clock, switches, faults and counts."""
        worlds = load_worlds(self.paths)
        self.faults.clear()
        self.books.reset(worlds)
        self.sites.clear()
        self.sites.update({world.site: self._open_site(world) for world in worlds})

    def close(self) -> None:
        """Close the books."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self.books.close()

    def _open_site(self, world: AnySite) -> Site:
        site = _maxio(world, self.books) if isinstance(world, MaxioWorld) else _chargeover(world, self.books)
        site.switches.update(self.books.switches(world.site))
        return site

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        segments, query = split_target(scope.get("raw_path") or scope["path"].encode(), scope["query_string"])
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        call = Call(scope["method"], segments, query, headers, body)
        reply = await self._dispatch(call)
        if reply is None:
            await _drop(scope, receive)
        else:
            await _send(send, reply)

    async def _dispatch(self, call: Call) -> Reply | None:
        """Return the reply, or None when the connection is to be dropped without one."""
        host, name = (*call.segments, "", "")[:2]
        inner = Call(call.method, call.segments[2:], call.query, call.headers, call.body)
        if host == "_sandbox":
            control = Call(call.method, call.segments[1:], call.query, call.headers, call.body)
            return await self._work(lambda: self.control.answer(control))
        if host == "chargeover":
            if inner.segments[:2] != ("api", "v3"):
                return text_reply("Not found\n", 404)
            inner = Call(call.method, inner.segments[2:], call.query, call.headers, call.body)
        for site in list(self.sites.values()):
            if site.world.name == name and host in site.apis:
                return await self._visit(site, host, inner)
        return text_reply("No such site\n", 404)

    async def _visit(self, site: Site, host: str, call: Call) -> Reply | None:
        """Take a request through the site's limits and the faults that wait for it."""
        api = site.apis[host]
        found = api.find(call)
        route = found[0].name if found else "unknown"
        writing = found[0].writing if found else call.method != "GET"
        site.tally.arrived(route, writing)
        fault = self.faults.take(site.world.site, route, writing)
        try:
            async with self._gate(site, host).enter():
                reply = await self._suffer(fault, api, call)
                if site.world.limits.hold_seconds:
                    await asyncio.sleep(site.world.limits.hold_seconds)
        except Overloaded:
            reply = api.throttled()
        if reply is not None:
            site.tally.answered(reply.status)
        return reply

    async def _suffer(self, fault: Fault | None, api: Api, call: Call) -> Reply | None:
        kind = fault.fault if fault else None
        if kind == "throttle":
            return api.throttled()
        if kind == "unauthorized":
            return api.unauthorized()
        if fault and kind == "server_error":
            return api.server_error(fault.status)
        if fault and kind == "hang":
            # The request is carried out after all: a client that gave up meanwhile has a late commit to find.
            await asyncio.sleep(fault.seconds)
        reply = await self._work(lambda: api.answer(call))
        if kind == "lost_reply":
            return None
        return api.server_error(fault.status) if fault and kind == "server_error_after_commit" else reply

    async def _work(self, handler: Callable[[], Reply]) -> Reply:
        return await asyncio.get_running_loop().run_in_executor(self._workers, self._commit, handler)

    def _commit(self, handler: Callable[[], Reply]) -> Reply:
        try:
            with self.books.transaction():
                self.renew()
                return handler()
        except Exception:  # noqa: BLE001 - a fault of the sandbox is told in its log and never ends the server.
            _log.exception("The sandbox itself failed; nothing was written.")
            return text_reply("The sandbox itself failed; see its log.\n", 500)

    def _gate(self, site: Site, host: str) -> Gate:
        # Made inside the running loop. Only the main API has limits; the events host documents none.
        if host not in site.gates:
            limits = Limits(in_process=None) if host == "events" else site.world.limits
            site.gates[host] = Gate(limits, site.tally, host)
        return site.gates[host]

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self.close()
        await send({"type": "lifespan.shutdown.complete"})


def create_app(worlds: Sequence[Path], books: Path | None = None) -> SandboxApp:
    """Return the sandbox for the worlds (files or folders); `WorldError` tells all their faults.

    Without `books` everything is in memory and gone with the process.
    """
    return SandboxApp(worlds, books)


def _maxio(world: MaxioWorld, books: Books) -> Site:
    switches = SwitchBoard(MAXIO, world.switches)
    biller = MaxioBiller(world, books, switches)
    main = MaxioApi(MaxioSite(world, books, switches, biller, MaxioViews(world)))
    return Site(world, switches, biller, {"maxio": main, "events": MaxioEvents(main)})


def _chargeover(world: ChargeOverWorld, books: Books) -> Site:
    switches = SwitchBoard(CHARGEOVER, world.switches)
    biller = ChargeOverBiller(world, books, switches)
    account = ChargeOverAccount(world, books, switches, biller, ChargeOverViews(world, switches))
    return Site(world, switches, biller, {"chargeover": ChargeOverApi(account)})


def _count_exactly() -> None:
    # The default of 28 digits would round long sums; a context belongs to its thread.
    getcontext().prec = 100


async def _read(receive: Receive) -> bytes:
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            break
    return b"".join(chunks)


async def _send(send: Send, reply: Reply) -> None:
    headers = [(b"content-length", str(len(reply.body)).encode())]
    if reply.body:
        headers.append((b"content-type", reply.media_type.encode()))
    headers += [(name.lower().encode(), value.encode()) for name, value in reply.headers]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


async def _drop(scope: Scope, receive: Receive) -> None:
    """Close the connection without a byte of reply; `server.DroppableHttp` puts the means into the scope."""
    scope["state"]["drop"]()
    while (await receive())["type"] != "http.disconnect":
        pass
