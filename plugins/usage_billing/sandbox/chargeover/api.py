"""ChargeOver's REST API v3: who may ask, which object answers, and `_bulk` batches of requests.

Envelope, status codes and error texts follow the vendor's documentation and recorded traffic; what they leave open is a
switch of the site.
"""

import json
from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from http import HTTPStatus
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Match

from usage_billing.sandbox.spoil import first_half
from usage_billing.sandbox.wire import BadJson, Call, Route, canonical_path, dump_json, json_reply

from .envelope import INVALID, ChargeOverAccount, Refusal, body_of, error, ok, unsupported
from .invoices import Invoices
from .packages import Catalogue, Packages
from .query import BadQuery
from .signature import Signatures
from .usage import Usage

LARGEST_BATCH = 25
# What the parts of a batch that are left out are told, in turn.
_PART_CODES = [429, 400, 500]
_ROOT = "/api/v3"


class ChargeOverApi:
    """Answers the API of one account."""

    rate_switch = "rate_limit"

    def __init__(self, account: ChargeOverAccount) -> None:
        self.account = account
        self._signatures = Signatures(account)
        objects = (Usage(account), Packages(account), Catalogue(account), Invoices(account))
        batch = Route("POST", "/_bulk", "batch", self.batch, writing=True, bulk=True)
        self.routes: Sequence[Route] = [batch, *(route for kind in objects for route in kind.routes)]

    def arrive(self, call: Call, route: Route | None) -> Response | None:
        """Look at a request as it comes: only its credentials count."""
        keys = (self.account.world.public_key, self.account.world.private_key)
        return None if call.basic_auth() == keys or self._signatures.accepts(call) else self.unauthorized()

    def error_inside(self) -> Response:
        """Return an error envelope in the body of a 200."""
        reply = error(500, "Internal error.")
        reply.status_code = 200
        return reply

    def do_half(self, call: Call, route: Route, status: int | None) -> Response:
        """Carry out every other part of a batch and answer for each; or half of an upload, and break."""
        if route.name == "batch":
            return self.carry_out(call, Route("POST", route.path, "batch", partial(self._half_a_batch, status)))
        done = self.carry_out(first_half(call), route)
        return self.server_error(status or 500) if done.status_code < 400 else done

    def left(self, call: Call) -> None:
        """Do nothing: the account remembers no request."""

    def carry_out(self, call: Call, route: Route | None) -> Response:
        """Carry out a request that has arrived."""
        if route is None:
            return self._shown(error(400, unsupported(call)))
        try:
            return self._shown(route.handler(call, **call.params))
        except BadJson:
            return self._shown(error(400, INVALID))
        except BadQuery as refusal:
            return self._shown(error(400, str(refusal)))
        except Refusal as refusal:
            return self._shown(error(refusal.code, self._told(refusal)))

    def unauthorized(self) -> Response:
        """Return a 401 envelope."""
        return self._shown(error(401, "Invalid or incorrect authorization [Missing (basic) authorization header.]"))

    def throttled(self) -> Response:
        """Return a 429, whose form, text and headers no document tells."""
        body = self.account.switches["throttle_body"]
        reply: Response = PlainTextResponse("Too Many Requests\n" if body == "text" else "", 429)
        if body == "envelope":
            reply = self._shown(error(429, self._told(Refusal("Rate limit exceeded.", 429, generic=True))))
        if self.account.switches["throttle_retry_after"] == "present":
            reply.headers["Retry-After"] = str(self.account.world.limits.retry_after_seconds)
        return reply

    def server_error(self, status: int) -> Response:
        """Return a fault, which need not be JSON."""
        return HTMLResponse("<html><body>Internal Server Error</body></html>", status)

    def batch(self, call: Call) -> Response:
        """`POST /_bulk`: up to 25 requests in order, each with a result of its own; or all are refused for one."""
        parts = _parts(call)
        self.account.books.write("SAVEPOINT batch")
        answers = [self._part(call, part) for part in parts]
        bad = next((answer for answer in answers if answer["code"] >= HTTPStatus.BAD_REQUEST), None)
        if bad is not None and self.account.switches["batch_atomicity"] == "atomic":
            self.account.books.write("ROLLBACK TO batch")
            self.account.books.write("RELEASE batch")
            raise Refusal(bad["message"], bad["code"])
        self.account.books.write("RELEASE batch")
        return ok({"_bulk": answers})

    def _half_a_batch(self, status: int | None, call: Call) -> Response:
        codes = [status] if status else _PART_CODES
        answers = [
            _as_json(self._shown(error(codes[at // 2 % len(codes)], INVALID))) if at % 2 else self._part(call, part)
            for at, part in enumerate(_parts(call))
        ]
        return ok({"_bulk": answers})

    def _told(self, refusal: Refusal) -> str:
        """Return the text of an error; some texts are in no document, so a site may as well say something general."""
        generic = refusal.generic and self.account.switches["error_texts"] == "generic"
        return INVALID if generic else str(refusal)

    def _shown(self, reply: Response) -> Response:
        """Return a reply whose envelope has its `details` as the site shows them."""
        shown = self.account.switches["details"]
        if shown == "empty_object":
            return reply
        content = _as_json(reply)
        del content["details"]
        if shown == "null":
            content["details"] = None
        plainly = json_reply(content, reply.status_code)
        if "location" in reply.headers:
            plainly.headers["Location"] = reply.headers["location"]
        return plainly

    def _part(self, call: Call, part: object) -> Any:
        # Each part's answer is an envelope of its own, exactly as the same request would get alone.
        inner = _inner(call, part)
        reply = error(400, INVALID) if inner is None else self.carry_out(inner, self._routed(inner))
        return _as_json(reply)

    def _routed(self, call: Call) -> Route | None:
        """Return the route of a part, and let its request know what the path names."""
        for route in self.routes:
            match, found = route.matches(call.request.scope)
            if match is Match.FULL:
                call.request.scope.update(found)
                return route
        return None


def _parts(call: Call) -> list[Any]:
    parts = body_of(call)
    if not isinstance(parts, list) or len(parts) > LARGEST_BATCH:
        raise Refusal(INVALID)
    return parts


def _as_json(reply: Response) -> Any:
    return json.loads(bytes(reply.body), parse_float=Decimal)


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
