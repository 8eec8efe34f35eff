"""`DirectSandbox`: the same sandbox behind a function call, for simulators that live on a clock of their own.

No server, socket, thread or event loop: a request is carried out before `request` returns, or when the clock is moved
past the moment at which it lands.
"""

import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from .app import create_app
from .clock import ClockMovedBack, from_micros, parse_instant, to_micros
from .desk import Desk, SandboxRefused
from .pace import VirtualPace
from .wire import dump_json
from .world import World

_URL = "http://127.0.0.1:1"
_MICROS = 1_000_000


@dataclass(frozen=True)
class DirectReply:
    """A whole reply; header names are in lower case, `seconds` is how long the site took on the sandbox's clock."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float = 0.0


class NoWholeReply(Exception):
    """The client has no whole reply; whether the request was carried out, it cannot know."""


class ConnectionBroken(NoWholeReply):
    """The connection ended without a byte of reply."""


class ReplyCutShort(NoWholeReply):
    """The connection ended in the middle of a reply; `part` is what had come."""

    def __init__(self, part: DirectReply) -> None:
        super().__init__(f"the reply ended after {len(part.body)} bytes")
        self.part = part


class ReplyTooLate(NoWholeReply):
    """No reply came within the client's timeout; the site goes on, and may carry the request out later."""


class DirectSandbox(Desk):
    """Holds worlds (files, folders or loaded ones) in this process, with books in memory or in a file.

    The clock stands still until it is moved; delays of every kind pass on it alone. Requests are carried out one after
    another, whichever threads they come from.

    Example::

        with DirectSandbox([world]) as sandbox:
            reply = sandbox.request("POST", sandbox.maxio_url("acme") + path, {"Authorization": basic}, body)
    """

    def __init__(self, worlds: Sequence[Path | str | World], books: Path | str | None = None) -> None:
        """Open the worlds; `WorldError` tells all their faults."""
        self._pace = VirtualPace()
        self._kept = books is not None
        sources = [Path(world) if isinstance(world, str) else world for world in worlds]
        self._app = create_app(sources, Path(books) if books is not None else None, self._pace)
        self._books = self._app.sites.books
        self._pace.follow(self._books.now)
        self._turn = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the books; what was still to be carried out is not."""
        self._app.close()

    @property
    def url(self) -> str:
        """Return the root of every URL; nothing listens there."""
        return _URL

    def request(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, timeout_seconds: float | None = None
    ) -> DirectReply:
        """Send one request and return its reply; without a timeout, however long it takes.

        Raises:
            ConnectionBroken, ReplyCutShort, ReplyTooLate: as a client would see these.
        """
        with self._turn:
            exchange = _Exchange(method, url, headers, body)
            started = self._books.now()
            self._drive(exchange, self._app(exchange.scope, exchange.receive, exchange.send), started, timeout_seconds)
            return exchange.reply((self._books.now() - started) / _MICROS)

    def control(self, method: str, path: str, body: object = None) -> Any:
        """Send one control request and return its JSON; `SandboxRefused` when it is refused."""
        content = b"" if body is None else dump_json(body).encode()
        reply = self.request(method, f"{_URL}/_sandbox/{path}", {}, content)
        text = reply.body.decode()
        if reply.status >= 400:
            raise SandboxRefused(text)
        return json.loads(text, parse_float=Decimal)

    def move_clock(self, now: datetime | str | None = None, *, advance_seconds: float | None = None) -> datetime:
        """Move the clock forward, to a time or by seconds, carry out what was to land on the way; return the present.

        Renewals on the way are made before the next request or question, as of their own moments.
        """
        with self._turn:
            present = self._books.now()
            if now is not None:
                target = to_micros(now) if isinstance(now, datetime) else parse_instant(now, self._first_zone())
            else:
                target = present + int((advance_seconds or 0) * _MICROS)
            if target < present:
                raise SandboxRefused(str(ClockMovedBack(f"the clock stands at {from_micros(present).isoformat()}")))
            self._pass_time(target)
            return from_micros(target)

    def now(self) -> datetime:
        """Return the sandbox's present."""
        return from_micros(self._books.now())

    def reset(self) -> None:
        """Begin again from the worlds; nothing that was under way lands any more."""
        with self._turn:
            self._pace.close()
            super().reset()

    def _pass_time(self, target: int) -> None:
        while (due := self._pace.next_due(target)) is not None:
            instant, action = due
            self._books.clock.anchor = max(instant, self._books.now())
            action()
        self._books.clock.anchor = max(target, self._books.now())
        if self._kept:
            with self._books.transaction():
                self._books.save_clock()

    def _drive(
        self, exchange: "_Exchange", request: Coroutine[float, None, None], started: int, timeout_seconds: float | None
    ) -> None:
        """Run a request; each time it is held, time passes, until it ends or the client has waited long enough."""
        while (seconds := _step(request)) is not None:
            due = self._books.now() + int(seconds * _MICROS)
            if timeout_seconds is not None and due - started > timeout_seconds * _MICROS:
                self._pace.at(due, lambda: self._drive_alone(request))
                self._pass_time(started + int(timeout_seconds * _MICROS))
                raise ReplyTooLate(f"no reply within {timeout_seconds} seconds")
            self._pass_time(due)

    def _drive_alone(self, request: Coroutine[float, None, None]) -> None:
        """Go on with a request whose client has gone."""
        seconds = _step(request)
        if seconds is not None:
            self._pace.at(self._books.now() + int(seconds * _MICROS), lambda: self._drive_alone(request))

    def _first_zone(self) -> Any:
        return next(iter(self._app.sites.by_name.values())).world.zone


class _Exchange:
    """One request and its reply as an ASGI server would carry them."""

    def __init__(self, method: str, url: str, headers: Mapping[str, str], body: bytes) -> None:
        target = urlsplit(url)
        self._body: bytes | None = body
        self._dropped = False
        self._status = 0
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._whole = False
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": target.scheme,
            "path": target.path,
            "raw_path": target.path.encode("latin-1"),
            "root_path": "",
            "query_string": target.query.encode("latin-1"),
            "headers": [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
            "server": (target.hostname, target.port),
            "client": None,
            "state": {"drop": self._drop},
        }

    async def receive(self) -> dict[str, Any]:
        """Give the body, then say that the client has gone."""
        if self._body is None or self._dropped:
            return {"type": "http.disconnect"}
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Mapping[str, Any]) -> None:
        """Take a part of the reply."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {
                name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]
            }
        else:
            self._parts.append(message.get("body", b""))
            self._whole = not message.get("more_body", False)

    def reply(self, seconds: float) -> DirectReply:
        """Return the reply, or raise what a client sees instead."""
        reply = DirectReply(self._status, self._headers, b"".join(self._parts), seconds)
        if self._whole:
            return reply
        raise ReplyCutShort(reply) if self._status else ConnectionBroken("the connection ended without a reply")

    def _drop(self) -> None:
        self._dropped = True


def _step(request: Coroutine[float, None, None]) -> float | None:
    """Go on with a request until it has to wait, and return for how many seconds; None when it has ended."""
    try:
        return request.send(None)
    except StopIteration:
        return None
