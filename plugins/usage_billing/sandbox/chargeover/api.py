"""ChargeOver's REST API v3: who may ask, which object answers, and `_bulk` batches of requests.

Envelope, status codes and error texts follow the vendor's documentation and recorded traffic; what they leave open is a
switch of the site.
"""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Match

from usage_billing.sandbox.wire import BadJson, Call, Route, canonical_path, dump_json

from .envelope import INVALID, ChargeOverAccount, Refusal, body_of, error, ok
from .invoices import Invoices
from .packages import Catalogue, Packages
from .query import BadQuery
from .usage import Usage

LARGEST_BATCH = 25
_ROOT = "/api/v3"
_VERBS = {"PUT": "modify", "DELETE": "delete", "GET": "get", "POST": "create"}
_OBJECTS = ("package", "customer", "item", "usage", "invoice")


class ChargeOverApi:
    """Answers the API of one account."""

    def __init__(self, account: ChargeOverAccount) -> None:
        self.account = account
        objects = (Usage(account), Packages(account), Catalogue(account), Invoices(account))
        batch = Route("POST", "/_bulk", "batch", self.batch, writing=True)
        self.routes: Sequence[Route] = [batch, *(route for kind in objects for route in kind.routes)]

    def answer(self, call: Call, route: Route | None) -> Response:
        """Answer one request: credentials first, then the object."""
        if call.basic_auth() != (self.account.world.public_key, self.account.world.private_key):
            return self.unauthorized()
        if route is None:
            return error(400, _unsupported(call))
        try:
            return route.handler(call, **call.params)
        except BadJson:
            return error(400, INVALID)
        except BadQuery as refusal:
            return error(400, str(refusal))
        except Refusal as refusal:
            return error(refusal.code, str(refusal))

    def unauthorized(self) -> Response:
        """Return a 401 envelope."""
        return error(401, "Invalid or incorrect authorization [Missing (basic) authorization header.]")

    def throttled(self) -> Response:
        """Return a 429 envelope, whose text and headers no document tells."""
        reply = error(429, "Rate limit exceeded.")
        if self.account.switches["throttle_retry_after"] == "present":
            reply.headers["Retry-After"] = str(self.account.world.limits.retry_after_seconds)
        return reply

    def server_error(self, status: int) -> Response:
        """Return a fault, which need not be JSON."""
        return HTMLResponse("<html><body>Internal Server Error</body></html>", status)

    def batch(self, call: Call) -> Response:
        """`POST /_bulk`: up to 25 requests in order, each with a result of its own."""
        parts = body_of(call)
        if not isinstance(parts, list) or len(parts) > LARGEST_BATCH:
            raise Refusal(INVALID)
        return ok({"_bulk": [self._part(call, part) for part in parts]})

    def _part(self, call: Call, part: object) -> Any:
        # Each part's answer is an envelope of its own, exactly as the same request would get alone.
        inner = _inner(call, part)
        reply = error(400, INVALID) if inner is None else self.answer(inner, self._routed(inner))
        return json.loads(bytes(reply.body), parse_float=Decimal)

    def _routed(self, call: Call) -> Route | None:
        """Return the route of a part, and let its request know what the path names."""
        for route in self.routes:
            match, found = route.matches(call.request.scope)
            if match is Match.FULL:
                call.request.scope.update(found)
                return route
        return None


def _inner(call: Call, part: object) -> Call | None:
    """Return the request that a part of a batch stands for, or None when it is none that a batch may hold."""
    if not isinstance(part, dict) or not isinstance(part.get("uri"), str):
        return None
    target = urlsplit(part["uri"])
    path = canonical_path(target.path)
    if not f"{path}/".startswith(f"{_ROOT}/") or path == f"{_ROOT}/_bulk":
        return None
    method = str(part.get("request_method", "")).upper()
    scope = {**call.request.scope, "method": method, "path": path, "root_path": _ROOT, "path_params": {}}
    payload = part.get("payload")
    body = b"" if payload is None else dump_json(payload).encode()
    return Call(Request({**scope, "query_string": target.query.encode()}), body)


def _unsupported(call: Call) -> str:
    """Return the message for what the API does not do; an unknown path is 400 here, not 404."""
    path = call.request["path"].removeprefix(call.request["root_path"])
    kind, number = (*map(unquote, path.split("/")[1:]), "", "")[:2]
    method = call.request.method
    verb = "list" if (method, number) == ("GET", "") else _VERBS.get(method, method.lower())
    if kind in _OBJECTS:
        return f"The command requested is not supported: {verb}({kind}, {number})"
    return f"The object type requested is not supported: {verb}({kind}, {number})"
