"""ChargeOver's REST API v3: who may ask, which object answers, and `_bulk` batches of requests.

Envelope, status codes and error texts follow the vendor's documentation and recorded traffic; what they leave open is a
switch of the site.
"""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

from usage_billing.sandbox.wire import BadJson, Call, Reply, Route, find_route, json_reply, split_target, text_reply

from .envelope import INVALID, ChargeOverAccount, Refusal, body_of, error, ok
from .invoices import Invoices
from .packages import Catalogue, Packages
from .query import BadQuery
from .usage import Usage

LARGEST_BATCH = 25
_VERBS = {"PUT": "modify", "DELETE": "delete", "GET": "get", "POST": "create"}
_OBJECTS = ("package", "customer", "item", "usage", "invoice")


class ChargeOverApi:
    """Answers the API of one account."""

    def __init__(self, account: ChargeOverAccount) -> None:
        self.account = account
        objects = (Usage(account), Packages(account), Catalogue(account), Invoices(account))
        batch = Route("POST", "_bulk", "batch", self.batch, writing=True)
        self.routes: Sequence[Route] = [batch, *(route for kind in objects for route in kind.routes)]

    def find(self, call: Call) -> tuple[Route, dict[str, str]] | None:
        """Return the route of a call below `/api/v3`."""
        return find_route(self.routes, call)

    def answer(self, call: Call) -> Reply:
        """Answer one request: credentials first, then the object."""
        if call.basic_auth() != (self.account.world.public_key, self.account.world.private_key):
            return self.unauthorized()
        found = self.find(call)
        if found is None:
            return error(400, _unsupported(call))
        route, params = found
        try:
            return route.handler(call, **params)
        except BadJson:
            return error(400, INVALID)
        except BadQuery as refusal:
            return error(400, str(refusal))
        except Refusal as refusal:
            return error(refusal.code, str(refusal))

    def unauthorized(self) -> Reply:
        """Return a 401 envelope."""
        return error(401, "Invalid or incorrect authorization [Missing (basic) authorization header.]")

    def throttled(self) -> Reply:
        """Return a 429 envelope, whose text and headers no document tells."""
        reply = error(429, "Rate limit exceeded.")
        if self.account.switches["throttle_retry_after"] == "absent":
            return reply
        wait = str(self.account.world.limits.retry_after_seconds)
        return Reply(reply.status, reply.body, headers=(("Retry-After", wait),))

    def server_error(self, status: int) -> Reply:
        """Return a fault, which need not be JSON."""
        return text_reply("<html><body>Internal Server Error</body></html>", status, "text/html")

    def batch(self, call: Call) -> Reply:
        """`POST /_bulk`: up to 25 requests in order, each with a result of its own."""
        parts = body_of(call)
        if not isinstance(parts, list) or len(parts) > LARGEST_BATCH:
            raise Refusal(INVALID)
        return ok({"_bulk": [self._part(call, part) for part in parts]})

    def _part(self, call: Call, part: object) -> Any:
        # Each part's answer is an envelope of its own, exactly as the same request would get alone.
        if not isinstance(part, dict) or not isinstance(part.get("uri"), str):
            return json.loads(error(400, INVALID).body)
        target = urlsplit(part["uri"])
        segments, query = split_target(target.path.encode(), target.query.encode())
        if segments[:2] != ("api", "v3") or segments[2:] == ("_bulk",):
            return json.loads(error(400, INVALID).body)
        payload = part.get("payload")
        body = b"" if payload is None else json_reply(payload).body
        method = str(part.get("request_method", "")).upper()
        reply = self.answer(Call(method, segments[2:], query, call.headers, body))
        return json.loads(reply.body, parse_float=Decimal)


def _unsupported(call: Call) -> str:
    """Return the message for what the API does not do; an unknown path is 400 here, not 404."""
    kind, number = (*call.segments, "", "")[:2]
    verb = _VERBS.get(call.method, call.method.lower())
    if call.method == "GET" and not number:
        verb = "list"
    if kind in _OBJECTS:
        return f"The command requested is not supported: {verb}({kind}, {number})"
    return f"The object type requested is not supported: {verb}({kind}, {number})"
