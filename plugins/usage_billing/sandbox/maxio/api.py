"""Maxio's main API: who may ask, what is blocked, which token was spent, and which resource answers.

Paths, parameters and shapes follow the Advanced Billing API reference; what it leaves open is a switch of the site.
"""

from collections.abc import Sequence

from starlette.responses import HTMLResponse, PlainTextResponse, Response

from usage_billing.sandbox.wire import BadJson, Call, Route

from .activity import Activity
from .catalogue import Catalogue
from .lookups import MaxioSite, NotFound, Unprocessable, errors
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

    def unauthorized(self) -> Response:
        """Return a 401 as plain text."""
        return PlainTextResponse("HTTP Basic: Access denied.\n", 401)


class MaxioApi(MaxioHost):
    """Answers the main API of one site."""

    def __init__(self, site: MaxioSite) -> None:
        super().__init__(site)
        resources = (Usages(site), Subscriptions(site), Catalogue(site), Activity(site))
        self.routes: Sequence[Route] = [route for resource in resources for route in resource.routes]

    def answer(self, call: Call, route: Route | None) -> Response:
        """Answer one request: credentials, then site-wide blocks, then the duplicate token, then the resource."""
        if not self.authorized(call):
            return self.unauthorized()
        if (blocked := self.site.switches["access"]) != "open":
            return errors(422, _BLOCKED[blocked])
        if route is None:
            return self.not_found()
        token = self._token(call) if call.request.method in ("POST", "PUT") else None
        if token is not None and self._spent(token):
            return errors(409, "DuplicatePrevention::DuplicateSubmissionError")
        reply = self._carry_out(route, call)
        if token is not None and (reply.status_code < 400 or self.site.switches["token_spent_by_4xx"] == "yes"):
            self.site.books.write(
                "REPLACE INTO request_token VALUES (?, ?, ?)", self.site.world.site, token, self.site.books.now()
            )
        return reply

    def _carry_out(self, route: Route, call: Call) -> Response:
        try:
            return route.handler(call, **call.params)
        except NotFound:
            return self.not_found()
        except Unprocessable as refusal:
            return errors(422, *refusal.messages)
        except BadJson:
            return errors(400, "The request body is not valid JSON.")

    def _token(self, call: Call) -> str | None:
        """Return the token beside the resource or in the query string; inside the resource it has no effect."""
        if self.site.switches["uniqueness_token"] == "ignored":
            return None
        try:
            body = call.json() if call.body.strip() else None
        except BadJson:
            body = None
        token = body.get("uniqueness_token") if isinstance(body, dict) else None
        return str(token) if token else call.param("uniqueness_token")

    def _spent(self, token: str) -> bool:
        sql = "SELECT 1 FROM request_token WHERE site = ? AND token = ? AND spent_at > ?"
        return self.site.books.row(sql, self.site.world.site, token, self.site.books.now() - TOKEN_MICROS) is not None
