"""Requests as the sandbox's handlers see them, the routes to the handlers, and exact JSON; Starlette does the rest.

Handlers are plain functions from a `Call` to a response; threads, transactions and faults stay outside, in `app`.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

from starlette import routing
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Handler = Callable[..., Response]

_NUMBER_MARK = re.compile(r'"\\u0000([-+0-9.E]+)\\u0000"')


class BadJson(ValueError):
    """The body is not JSON."""


@dataclass(frozen=True)
class Call:
    """One request, read whole: Starlette's request, and its body as sent."""

    request: Request
    body: bytes = b""

    @property
    def params(self) -> dict[str, str]:
        """Return what the path names; only here its segments are decoded, so that a slash may be in them."""
        return {name: unquote(value) for name, value in self.request.path_params.items()}

    def param(self, name: str) -> str | None:
        """Return the last value of a query parameter, or None."""
        value: str | None = self.request.query_params.get(name)
        return value

    def csv(self, name: str) -> list[str]:
        """Return a list parameter, sent as `a,b` or as repeated `name[]`."""
        values = [value for key, value in self.request.query_params.multi_items() if key in (name, f"{name}[]")]
        return [part for value in values for part in value.split(",") if part]

    def json(self) -> Any:
        """Return the body with exact numbers; `BadJson` when it is none."""
        try:
            return json.loads(self.body, parse_float=Decimal, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise BadJson(str(error)) from error

    def basic_auth(self) -> tuple[str, str] | None:
        """Return user name and password of HTTP Basic, or None."""
        scheme, _, encoded = self.request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic":
            return None
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        return user, password


class Route(routing.Route):
    """A documented endpoint: `path` has `{names}` for the call's `params`, which its handler is given beside the call.

    Tallies and faults know it by `name`; `writing` says whether it could change the books,
    `bulk` whether its body is a list of which a part may be carried out.
    """

    def __init__(
        self, method: str, path: str, name: str, handler: Handler, *, writing: bool = False, bulk: bool = False
    ) -> None:
        super().__init__(path, self._arrive, methods=[method], name=name)
        self.methods = {method}  # Without the HEAD that comes with a GET: the sites document none.
        self.handler = handler
        self.writing = writing
        self.bulk = bulk

    async def _arrive(self, request: Request) -> Response:
        app: RoutedApp = request.app
        return await app.visit(Call(request, await request.body()), self)


class RoutedApp(Starlette):
    """An application whose every request goes through `visit`, also one that no route is for."""

    def __init__(self, **options: Any) -> None:
        # Routing itself says 404 and 405; what a site says to either is its own.
        super().__init__(exception_handlers={HTTPException: self._unknown}, **options)
        # Paths are routed without a slash at their end, so there is none to redirect to.
        self.router.redirect_slashes = False

    async def visit(self, call: Call, route: Route | None) -> Response:
        """Answer a call; `route` is None when there is none for it."""
        raise NotImplementedError

    async def _unknown(self, request: Request, _error: Exception) -> Response:
        return await self.visit(Call(request, await request.body()), None)


class NoReply(Response):
    """Closes the connection without a byte of reply; `server.DroppableHttp` puts the means into the scope."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Drop the connection, and wait until it is gone."""
        scope["state"]["drop"]()
        while (await receive())["type"] != "http.disconnect":
            pass


class CutShort(Response):
    """Promises a whole reply, sends the first half of its body, and closes the connection."""

    def __init__(self, reply: Response) -> None:
        super().__init__(reply.body, reply.status_code, dict(reply.headers))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the half, drop the connection, and wait until it is gone."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body[: len(self.body) // 2], "more_body": True})
        await NoReply()(scope, receive, send)


def canonical_path(path: str) -> str:
    """Return a path with every segment in its one encoded spelling, without empty segments."""
    return "/" + "/".join(quote(unquote(part), safe="") for part in path.split("/") if part)


def json_reply(value: object, status: int = 200) -> Response:
    """Answer with JSON; a `Decimal` becomes a number literal with every digit it has."""
    return Response(dump_json(value), status, media_type="application/json; charset=utf-8")


def dump_json(value: object) -> str:
    """Write JSON with exact numbers."""
    text = _ENCODER.encode(value)
    return _NUMBER_MARK.sub(r"\1", text) if "\\u0000" in text else text


def plain(number: Decimal) -> str:
    """Return a decimal as people write it: no exponent, no trailing zeros, no negative zero."""
    text = format(number, "f")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _mark_number(value: object) -> str:
    # The standard encoder would write a Decimal as a float and lose digits, so it is marked here and bared after.
    if isinstance(value, Decimal):
        return f"\x00{plain(value)}\x00"
    raise TypeError(f"{type(value).__name__} has no JSON form")


_ENCODER = json.JSONEncoder(default=_mark_number, separators=(",", ":"))


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not JSON")
