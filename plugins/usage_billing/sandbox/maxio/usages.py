"""Usages of metered and prepaid components: creating and listing them.

The rules are those of the reference pages "Create Usage" and "List Usages"; what they leave open is a switch.
"""

import json
from datetime import timedelta
from decimal import ROUND_DOWN, Decimal
from typing import Any

from starlette.responses import Response

from usage_billing.sandbox.billing import Account
from usage_billing.sandbox.clock import midnight
from usage_billing.sandbox.wire import Call, Route, json_reply
from usage_billing.sandbox.world import Component, PricePoint

from .billing import PREPAID, Balance
from .lookups import MaxioSite, NotFound, Unprocessable, body_object, day_param, named_price_point, paging, whole_param
from .views import decimal_text, number

_USAGES = "/subscriptions/{subscription}/components/{component}/usages"


class Usages:
    """The usages of one site."""

    def __init__(self, site: MaxioSite) -> None:
        self.site = site
        self.routes = (
            Route("POST", _USAGES, "create_usage", self.create_usage, writing=True),
            Route("GET", _USAGES, "list_usages", self.list_usages),
        )

    def create_usage(self, call: Call, subscription: str, component: str) -> Response:
        """`POST /subscriptions/{id or reference}/components/{id or handle:...}/usages.json`, 200 and the usage."""
        account = self.site.account(subscription, by_reference=True)
        part = self.site.component_of(account, component)
        self._check_usable(account, part)
        usage = self._usage_body(call)
        quantity = self._quantity(usage.get("quantity"), part)
        point = self._price_point(usage, account, part)
        memo = self._memo(usage.get("memo"))
        extra: dict[str, Any] = {name: usage[name] for name in ("custom_price", "billing_schedule") if name in usage}
        quantity, overage = self._settle(account, part, quantity, point, memo)
        if part.kind == PREPAID:
            extra["overage_quantity"] = str(overage)
        usage_id = self.site.books.write(
            "INSERT INTO usage (id, site, subscription, component, price_point, quantity, memo, created_at, extra)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            call.request.scope.get("usage_id"),
            *(self.site.world.site, account.id, part.id, point.id, str(quantity), memo, self._receipt_time()),
            json.dumps(extra, default=str) if extra else None,
        )
        row = self.site.books.one("SELECT * FROM usage WHERE id = ?", usage_id)
        return json_reply(self.site.views.usage(row, self._shown(quantity, part, in_list=False)))

    def list_usages(self, call: Call, subscription: str, component: str) -> Response:
        """`GET` of the same path: bounds inclusive, dates at midnight of the site's zone."""
        account = self.site.account(subscription, by_reference=True)
        part = self.site.component_of(account, component)
        if part.kind == "event_based_component":
            self._check_listable()
        limit, offset = paging(call)
        where, args = ["site = ? AND subscription = ? AND component = ?"], [self.site.world.site, account.id, part.id]
        for name, condition in (("since_id", "id >= ?"), ("max_id", "id <= ?")):
            if (value := whole_param(call, name)) is not None:
                where.append(condition)
                args.append(value)
        for name, condition in (("since_date", "created_at >= ?"), ("until_date", "created_at <= ?")):
            if (day := day_param(call, name)) is not None:
                where.append(condition)
                args.append(midnight(day, self.site.world.zone))
        if self.site.switches["usage_list_created_at"] == "day" and (day := day_param(call, "created_at")) is not None:
            where.append("created_at >= ? AND created_at < ?")
            args += [midnight(one, self.site.world.zone) for one in (day, day + timedelta(days=1))]
        order = "DESC" if self.site.switches["usage_list_order"] == "descending" else "ASC"
        rows = self.site.books.rows(
            f"SELECT * FROM usage WHERE {' AND '.join(where)} ORDER BY id {order} LIMIT ? OFFSET ?",
            *args,
            limit,
            offset,
        )
        return json_reply(
            [self.site.views.usage(row, self._shown(Decimal(row["quantity"]), part, in_list=True)) for row in rows]
        )

    def _check_listable(self) -> None:
        if (said := self.site.switches["usage_list_of_events_component"]) == "404":
            raise NotFound
        if said == "422":
            raise Unprocessable("Usages can only be listed for metered or prepaid usage components.")

    def _check_usable(self, account: Account, part: Component) -> None:
        refusals = []
        if part.kind not in ("metered_component", PREPAID):
            refusals.append("Usages can only be added to metered or prepaid usage components.")
        if part.archived:
            refusals.append("Usages cannot be added to archived components.")
        if not account.live and self.site.switches["usage_on_ended_subscription"] == "refuse":
            refusals.append(f"Usages cannot be added to a subscription that is {account.state}.")
        if refusals:
            raise Unprocessable(*refusals)

    def _usage_body(self, call: Call) -> dict[str, Any]:
        usage = body_object(call).get("usage")
        if isinstance(usage, dict):
            return usage
        if usage is None and self.site.switches["bad_quantity"] == "zero":
            return {}
        raise Unprocessable("Usage: cannot be blank.")

    def _quantity(self, given: object, part: Component) -> Decimal:
        if isinstance(given, bool) or not isinstance(given, int | Decimal) or given == 0:
            if self.site.switches["bad_quantity"] == "refuse":
                raise Unprocessable("Quantity: is not a number." if given != 0 else "Quantity: cannot be zero.")
            return Decimal(0)
        quantity = Decimal(given)
        if part.allow_fractional_quantities or quantity == quantity.to_integral_value():
            return quantity
        if self.site.switches["fraction_not_allowed"] == "refuse":
            raise Unprocessable("Quantity: must be a whole number.")
        return quantity.to_integral_value(rounding=ROUND_DOWN)

    def _memo(self, given: object) -> str | None:
        if given is None:
            return None
        memo = str(given)
        limit = self.site.switches["memo_limit"]
        if limit == "none" or len(memo) <= int(limit):
            return memo
        if self.site.switches["long_memo"] == "refuse":
            raise Unprocessable(f"Memo: is too long (maximum is {limit} characters).")
        return memo[: int(limit)]

    def _price_point(self, usage: dict[str, Any], account: Account, part: Component) -> PricePoint:
        if usage.get("price_point_id") is not None:
            return named_price_point(usage["price_point_id"], part)
        if self.site.switches["omitted_price_point"] == "locked_in":
            return part.price_point(self.site.locked_point(account.id, part.id))
        return part.default_price_point

    def _settle(
        self, account: Account, part: Component, quantity: Decimal, point: PricePoint, memo: str | None
    ) -> tuple[Decimal, Decimal]:
        """Move the balance, which has a floor at 0; return the quantity that the record keeps, and its overage."""
        before, after = self.site.biller.move_balance(account, part, quantity, point.id)
        if self.site.switches["negative_at_floor"] == "clipped":
            quantity = after.used - before.used
        data = {
            "previous_unit_balance": decimal_text(before.used),
            "new_unit_balance": number(after.used),
            "usage_quantity": number(quantity),
            "component_id": part.id,
            "component_handle": part.handle,
            "memo": memo,
        }
        if part.kind == PREPAID:
            data |= self._prepaid_data(account, part, before, after)
        message = (
            f"Recorded {number(quantity)} {part.unit_name}s of usage (total: {number(after.used)}) "
            f"for Customer {account.id}'s subscription"
        )
        self.site.books.write(
            "INSERT INTO site_event (site, subscription, key, message, data, created_at, wall)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            *(self.site.world.site, account.id, "prepaid_usage" if part.kind == PREPAID else "metered_usage", message),
            *(json.dumps(data), self.site.books.now(), self.site.books.wall()),
        )
        return quantity, after.overage - before.overage

    def _prepaid_data(self, account: Account, part: Component, before: Balance, after: Balance) -> dict[str, Any]:
        drawn = after.drawn - before.drawn
        # Subscriptions have one allocation of each prepaid component, so its id can be made of theirs.
        allocation = account.id * 100 + part.id % 100
        detail = {"allocation_id": allocation, "charge_id": allocation, "usage_quantity": number(drawn)}
        return {
            "previous_overage_unit_balance": decimal_text(before.overage),
            "new_overage_unit_balance": number(after.overage),
            "overage_usage_quantity": number(after.overage - before.overage),
            "allocation_details": [detail] if drawn else [],
        }

    def _receipt_time(self) -> int:
        # Replies show whole seconds; storing more would make the inclusive date bounds differ from what is shown.
        return self.site.books.now() // 1_000_000 * 1_000_000

    def _shown(self, quantity: Decimal, part: Component, *, in_list: bool) -> int | str:
        style = self.site.switches["quantity_type"]
        textual = style == "as_documented" or (style == "text_in_lists" and in_list)
        if style == "string" or (textual and part.allow_fractional_quantities):
            return decimal_text(quantity)
        return number(quantity)
