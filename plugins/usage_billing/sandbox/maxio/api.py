"""Maxio's main API: who may ask, what is blocked, which token was spent, and which resource answers.

Paths, parameters and shapes follow the Advanced Billing API reference; what it leaves open is a switch of the site.
"""

from collections import Counter
from collections.abc import Sequence
from threading import Lock

from starlette.responses import HTMLResponse, PlainTextResponse, Response

from usage_billing.sandbox.wire import BadJson, Call, Route

from .activity import Activity
from .catalogue import Catalogue
from .lookups import MaxioSite, NotFound, Unprocessable, errors
from .markup import marked_up, understood, wanted
from .subscriptions import Subscriptions
from .usages import Usages

TOKEN_MICROS = 60 * 60 * 1_000_000
_BLOCKED = {
    "account_canceled": "Your Chargify account has been canceled. Please contact support@chargify.com to reactivate.",
    "trial_ended": "Your trial has ended, please contact sales.",
    "data_clearing": "Site data clearing is in progress. Please try later.",
    "site_deleted": "This site has been deleted.",
}
THROTTLED = (
    "Your request was denied due to a usage violation. "
    "You can track this request with support by referencing sandbox-{name}"
)


class MaxioHost:
    """What both hosts of one site have in common: who may ask, and how they say no."""

    def __init__(self, site: MaxioSite) -> None:
        self.site = site

    def authorized(self, call: Call) -> bool:
        """Check HTTP Basic with the API key and the password `x`."""
        return call.basic_auth() in ((self.site.world.api_key, "x"), (self.site.world.api_key, "X"))

    def not_found(self) -> Response:
        """Return a 404, whose body no document settles."""
        body = self.site.switches["not_found_body"]
        if body == "json":
            return errors(404, "Not found")
        if body == "empty":
            return Response(status_code=404)
        return HTMLResponse("<!DOCTYPE html><html><body><h1>Not Found</h1></body></html>", 404)

    def throttled(self) -> Response:
        """Return a 429, whose body and headers no document settles."""
        text = THROTTLED.format(name=self.site.world.name)
        if self.site.switches["throttle_reply"] == "text":
            return PlainTextResponse(text, 429)
        reply = errors(429, text)
        reply.headers["Retry-After"] = str(self.site.world.limits.retry_after_seconds)
        return reply

    def server_error(self, status: int) -> Response:
        """Return what a gateway says when something behind it broke."""
        return HTMLResponse("<html><body><h1>We're sorry, but something went wrong.</h1></body></html>", status)

    def error_inside(self) -> Response:
        """Return an error in the body of a 200."""
        return errors(200, "Something went wrong.")

    def unauthorized(self) -> Response:
        """Return a 401 as plain text."""
        return PlainTextResponse("HTTP Basic: Access denied.\n", 401)


class MaxioApi(MaxioHost):
    """Answers the main API of one site."""

    rate_switch = None

    def __init__(self, site: MaxioSite) -> None:
        super().__init__(site)
        resources = (Usages(site), Subscriptions(site), Catalogue(site), Activity(site))
        self.routes: Sequence[Route] = [route for resource in resources for route in resource.routes]
        self._in_flight: Counter[str] = Counter()
        self._lock = Lock()

    def arrive(self, call: Call, route: Route | None) -> Response | None:
        """Look at a request as it comes: credentials, site-wide blocks, then the token, which is taken from now on."""
        reply = self._look_at(call, route)
        return None if reply is None else self._written(call, route, reply)

    def _look_at(self, call: Call, route: Route | None) -> Response | None:
        if not self.authorized(call):
            return self.unauthorized()
        if (blocked := self.site.switches["access"]) != "open":
            return errors(422, _BLOCKED[blocked])
        if route is None:
            return self.not_found()
        if route.name == "create_usage" and self.site.switches["usage_id"] == "at_arrival":
            call.request.scope["usage_id"] = self.site.books.take_id("usage")
        token = self._token(call)
        if token is None:
            return None
        twin = self._in_flight[token] > 0
        if self._spent(token) and not (twin and self.site.switches["in_flight_twin"] == "accept"):
            return errors(409, "DuplicatePrevention::DuplicateSubmissionError")
        self._spend(token)
        with self._lock:
            self._in_flight[token] += 1
        call.request.scope["token"] = token
        return None

    def carry_out(self, call: Call, route: Route | None) -> Response:
        """Carry out a request that has arrived; one that is refused may give its token back."""
        return self._written(call, route, self._do(call, route))

    def _written(self, call: Call, route: Route | None, reply: Response) -> Response:
        """Return a reply in the format that its request wants."""
        if not wanted(call):
            return reply
        bare = self.site.switches["xml_empty_list"] == "nil_classes"
        return marked_up(reply, route.name if route else "", bare_when_empty=bare)

    def _do(self, call: Call, route: Route | None) -> Response:
        if route is None:
            return self.not_found()
        try:
            reply = route.handler(understood(call) if wanted(call) else call, **call.params)
        except NotFound:
            reply = self.not_found()
        except Unprocessable as refusal:
            reply = errors(422, *refusal.messages)
        except BadJson:
            reply = errors(400, "The request body cannot be read.")
        token = call.request.scope.get("token")
        if token is not None and reply.status_code >= 400 and self.site.switches["token_spent_by_4xx"] == "no":
            sql = "DELETE FROM request_token WHERE site = ? AND token = ?"
            self.site.books.write(sql, self.site.world.site, token)
        return reply

    def do_half(self, call: Call, route: Route, status: int | None) -> Response:
        """Carry out the whole: nothing here is a bulk request."""
        return self.carry_out(call, route)

    def left(self, call: Call) -> None:
        """Forget a request that has been answered."""
        token = call.request.scope.pop("token", None)
        with self._lock:
            if token is not None:
                self._in_flight[token] -= 1
                # Tokens are many, so none is kept at 0.
                self._in_flight = +self._in_flight

    def _token(self, call: Call) -> str | None:
        """Return the token beside the resource or in the query string; inside the resource it has no effect."""
        if call.request.method not in ("POST", "PUT") or self.site.switches["uniqueness_token"] == "ignored":
            return None
        try:
            body = None if not call.body.strip() or wanted(call) else call.json()
        except BadJson:
            body = None
        token = body.get("uniqueness_token") if isinstance(body, dict) else None
        given = str(token) if token else call.param("uniqueness_token")
        if given is None or self.site.switches["token_scope"] == "site":
            return given
        return f"{call.request['path']} {given}"

    def _spent(self, token: str) -> bool:
        sql = "SELECT 1 FROM request_token WHERE site = ? AND token = ? AND spent_at > ?"
        return self.site.books.row(sql, self.site.world.site, token, self.site.books.now() - TOKEN_MICROS) is not None

    def _spend(self, token: str) -> None:
        sql = "REPLACE INTO request_token VALUES (?, ?, ?)"
        self.site.books.write(sql, self.site.world.site, token, self.site.books.now())
