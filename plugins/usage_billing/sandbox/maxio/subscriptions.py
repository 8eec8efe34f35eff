"""Subscriptions of a Maxio site, and the lines that they have for components."""

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from starlette.responses import Response

from usage_billing.sandbox.billing import Account, all_accounts, find_by_reference
from usage_billing.sandbox.wire import Call, Route, json_reply
from usage_billing.sandbox.world import Component

from .billing import PREPAID
from .lookups import MaxioSite, NotFound, Unprocessable, body_object, is_id, named_price_point, paging
from .views import customer_id


class Subscriptions:
    """The subscriptions of one site."""

    def __init__(self, site: MaxioSite) -> None:
        self.site = site
        one = "/subscriptions/{subscription}"
        lines = f"{one}/components"
        line = f"{lines}/{{component}}"
        events = f"/event_based_billing{line}"
        self.routes = (
            Route("GET", "/subscriptions/lookup", "lookup_subscription", self.lookup_subscription),
            Route("GET", one, "read_subscription", self.read_subscription),
            Route("PUT", one, "update_subscription", self.update_subscription, writing=True),
            Route("DELETE", one, "cancel_subscription", self.cancel_subscription, writing=True),
            Route("POST", f"{one}/purge", "purge_subscription", self.purge_subscription, writing=True),
            Route("GET", "/subscriptions", "list_subscriptions", self.list_subscriptions),
            Route("GET", lines, "list_subscription_components", self.list_components),
            Route("GET", line, "read_subscription_component", self.read_component),
            Route("GET", "/subscriptions_components", "list_all_subscription_components", self.list_all_components),
            Route("POST", f"{events}/activate", "activate_component", self.activate, writing=True),
            Route("POST", f"{events}/deactivate", "deactivate_component", self.deactivate, writing=True),
        )

    def read_subscription(self, call: Call, subscription: str) -> Response:
        """`GET /subscriptions/{id}.json`."""
        return json_reply(self.site.views.subscription(self.site.account(subscription)))

    def lookup_subscription(self, call: Call) -> Response:
        """`GET /subscriptions/lookup.json?reference=`."""
        account = find_by_reference(self.site.books, self.site.world.site, call.param("reference") or "")
        if account is None:
            raise NotFound
        return json_reply(self.site.views.subscription(account))

    def update_subscription(self, call: Call, subscription: str) -> Response:
        """`PUT /subscriptions/{id}.json`: of all that a subscription has, its reference alone is changed."""
        account = self.site.account(subscription)
        given = body_object(call).get("subscription")
        if not isinstance(given, dict) or given.keys() != {"reference"}:
            raise Unprocessable("Subscription: only its reference can be changed here.")
        reference = None if given["reference"] is None else str(given["reference"])
        other = find_by_reference(self.site.books, self.site.world.site, reference) if reference else None
        if other is not None and other.id != account.id:
            raise Unprocessable("Reference: must be unique - that value has been taken.")
        self.site.books.write(
            "UPDATE account SET reference = ? WHERE site = ? AND id = ?", reference, self.site.world.site, account.id
        )
        return json_reply(self.site.views.subscription(self.site.account(subscription)))

    def cancel_subscription(self, call: Call, subscription: str) -> Response:
        """`DELETE /subscriptions/{id}.json`: ends it at once; what was used and not billed yet is billed no more."""
        account = self.site.account(subscription)
        if not account.live:
            raise Unprocessable("The subscription is already canceled.")
        self.site.books.write(
            "UPDATE account SET state = 'canceled', ended_at = ? WHERE site = ? AND id = ?",
            *(self.site.books.now(), self.site.world.site, account.id),
        )
        return json_reply(self.site.views.subscription(self.site.account(subscription)))

    def purge_subscription(self, call: Call, subscription: str) -> Response:
        """`POST /subscriptions/{id}/purge.json?ack=`, the customer's id: forgets it, as only test sites do."""
        account = self.site.account(subscription)
        if call.param("ack") != str(customer_id(account.id)):
            raise Unprocessable("ack: must be the id of the customer.")
        self.site.books.write("DELETE FROM account WHERE site = ? AND id = ?", self.site.world.site, account.id)
        return json_reply(self.site.views.subscription(account))

    def list_subscriptions(self, call: Call) -> Response:
        """`GET /subscriptions.json`: paged, by state; sorted by id, which here is the order of signup."""
        limit, offset = paging(call)
        state = call.param("state")
        accounts = [a for a in all_accounts(self.site.books, self.site.world.site) if state in (None, a.state)]
        accounts.sort(key=_subscription_order(call.param("sort")), reverse=call.param("direction") == "desc")
        return json_reply([self.site.views.subscription(account) for account in accounts[offset : offset + limit]])

    def list_components(self, call: Call, subscription: str) -> Response:
        """`GET /subscriptions/{id}/components.json`: of the subscription's family, archived ones too."""
        account = self.site.account(subscription)
        rows = self._lines(account, call, self.site.lines_of(account))
        if (in_use := call.param("in_use")) is not None:
            wanted = in_use == "true"
            rows = [row for row in rows if (row["price_point_id"] is not None) == wanted]
        return json_reply([{"component": row} for row in rows])

    def read_component(self, call: Call, subscription: str, component: str) -> Response:
        """`GET /subscriptions/{id}/components/{id or handle:...}.json`."""
        account = self.site.account(subscription)
        part = self.site.component_of(account, component)
        rows = self._lines(account, call, [part])
        return json_reply({"component": rows[0]})

    def list_all_components(self, call: Call) -> Response:
        """`GET /subscriptions_components.json`: rows of many subscriptions, not wrapped."""
        limit, offset = paging(call)
        wanted = call.csv("subscription_ids")
        accounts = all_accounts(self.site.books, self.site.world.site)
        chosen = [account for account in accounts if not wanted or str(account.id) in wanted]
        pairs = [(account, part) for account in chosen for part in self.site.lines_of(account)][offset : offset + limit]
        lag = self.site.switches.seconds("component_list_delay_seconds")
        rows = [row for account, part in pairs for row in self._lines(account, call, [part], lag)]
        return json_reply({"subscriptions_components": rows})

    def activate(self, call: Call, subscription: str, component: str) -> Response:
        """`POST /event_based_billing/subscriptions/{id}/components/{id}/activate.json`: 200, no body."""
        account, part = self._events_component(subscription, component)
        body = body_object(call) if call.body.strip() else {}
        point = named_price_point(body["price_point_id"], part) if "price_point_id" in body else None
        extra = {name: body[name] for name in ("custom_price", "billing_schedule") if name in body}
        self.site.books.write(
            "REPLACE INTO activation VALUES (?, ?, ?, 1, ?, ?)",
            *(self.site.world.site, account.id, part.id, (point or part.default_price_point).id),
            json.dumps(extra, default=str) if extra else None,
        )
        return Response(status_code=200)

    def deactivate(self, call: Call, subscription: str, component: str) -> Response:
        """`POST .../deactivate.json`: 200, no body; events go on being stored, and are ignored at renewal."""
        account, part = self._events_component(subscription, component)
        self.site.books.write(
            "UPDATE activation SET active = 0 WHERE site = ? AND subscription = ? AND component = ?",
            *(self.site.world.site, account.id, part.id),
        )
        return Response(status_code=200)

    def _events_component(self, subscription: str, component: str) -> tuple[Account, Component]:
        if not is_id(component):
            raise NotFound
        account = self.site.account(subscription)
        part = self.site.component_of(account, component)
        if part.kind != "event_based_component":
            raise Unprocessable("Component: is not an event based component.")
        return account, part

    def _lines(
        self, account: Account, call: Call, parts: list[Component], lag: tuple[float, float] = (0, 0)
    ) -> list[dict[str, Any]]:
        """Render lines; `lag` is how far their balances are behind."""
        events_lag = self.site.switches.seconds("events_delay_seconds")
        values = self.site.biller.metric_values(account, max(lag, events_lag))
        historic = "historic_usages" in call.csv("include")
        rows = []
        for part in parts:
            if part.kind not in ("metered_component", PREPAID):
                balance = values.get((account.id, part.id), Decimal(0))
            elif lag[1]:
                balance = self.site.biller.balance_seen(account, part, lag)
            else:
                balance = self.site.biller.balance(account, part).used
            point = self.site.locked_point(account.id, part.id)
            row = self.site.views.subscription_component(account, part, balance, point, self._touched(account, part))
            if "subscription" in call.csv("include"):
                row["subscription"] = {"state": account.state, "updated_at": row["updated_at"]}
            if historic and part.kind == "event_based_component":
                row["historic_usages"] = self._historic_usages(account, part)
            rows.append(row)
        return rows

    def _touched(self, account: Account, part: Component) -> int:
        row = self.site.books.row(
            "SELECT updated_at FROM balance WHERE site = ? AND subscription = ? AND component = ?",
            *(self.site.world.site, account.id, part.id),
        )
        return int(row["updated_at"]) if row else account.created_at

    def _historic_usages(self, account: Account, part: Component) -> list[dict[str, Any]]:
        rows = self.site.books.rows(
            "SELECT i.period_start, i.period_end, l.quantity FROM invoice i LEFT JOIN invoice_line l"
            " ON l.invoice = i.id AND l.component_id = ? AND l.kind = 'event_based_component'"
            " WHERE i.site = ? AND i.account = ? ORDER BY i.id DESC LIMIT 10",
            *(part.id, self.site.world.site, account.id),
        )
        return [
            {
                "total_usage_quantity": Decimal(row["quantity"] or 0),
                "billing_period_starts_at": self.site.views.time(row["period_start"]),
                "billing_period_ends_at": self.site.views.time(row["period_end"]),
            }
            for row in rows
        ]


def _subscription_order(sort: str | None) -> Callable[[Account], tuple[int, int]]:
    if sort in ("period_start", "period_end"):
        return lambda account: (getattr(account, sort), account.id)
    return lambda account: (account.created_at, account.id)
