"""What a Maxio site tells about itself: site events, invoices, and the preview of a renewal."""

import json
from datetime import timedelta
from typing import Any

from starlette.responses import Response

from usage_billing.sandbox.billing import Account, next_period
from usage_billing.sandbox.books import Row
from usage_billing.sandbox.clock import midnight, parse_instant
from usage_billing.sandbox.wire import Call, Route, json_reply
from usage_billing.sandbox.world import Component

from .billing import DRAWN
from .lookups import (
    MaxioSite,
    NotFound,
    Unprocessable,
    body_object,
    day_param,
    named_price_point,
    paging,
    whole_param,
)

# Rows are shown to the second, so they are compared to the second.
_SECOND = "created_at / 1000000 * 1000000"


class Activity:
    """Site events, invoices and renewal previews of one site."""

    def __init__(self, site: MaxioSite) -> None:
        self.site = site
        one = "/subscriptions/{subscription}"
        self.routes = (
            Route("POST", f"{one}/renewals/preview", "preview_renewal", self.preview_renewal),
            Route("GET", "/events/count", "count_site_events", self.count_site_events),
            Route("GET", "/events", "list_site_events", self.list_site_events),
            Route("GET", f"{one}/events", "list_subscription_events", self.list_subscription_events),
            Route("GET", "/invoices/{uid}", "read_invoice", self.read_invoice),
            Route("GET", "/invoices", "list_invoices", self.list_invoices),
        )

    def preview_renewal(self, call: Call, subscription: str) -> Response:
        """`POST /subscriptions/{id}/renewals/preview.json`: what the open period would invoice; changes nothing.

        With `components` in the body, what it would invoice if these, and no others, had the quantities given there.
        """
        account = self.site.account(subscription)
        if not account.live:
            raise Unprocessable("The subscription is not active.")
        family = self.site.views.family(account.id)
        supposed = (body_object(call) if call.body else {}).get("components")
        if supposed:
            lines = self.site.biller.supposed_lines(account, self._supposed(account, supposed))
        else:
            lines = [*self.site.biller.open_lines(account)[account.id]]
        if not supposed and self.site.switches["preview_shows_unused"] == "yes":
            lines += self.site.biller.unused_lines(account, {line.component_id for line in lines})
        ahead = next_period(self.site.world, account)
        past = (account.period_start, account.period_end)
        rows = [
            self.site.views.preview_line(line, family, ahead if line.kind == "baseline" else past)
            for line in lines
            if line.kind != DRAWN
        ]
        total = sum(row["amount_in_cents"] for row in rows)
        preview = {
            "next_assessment_at": self.site.views.time(account.period_end),
            "subtotal_in_cents": total,
            "total_tax_in_cents": 0,
            "total_discount_in_cents": 0,
            "total_in_cents": total,
            "existing_balance_in_cents": 0,
            "total_amount_due_in_cents": total,
            "uncalculated_taxes": False,
            "line_items": rows,
        }
        return json_reply({"renewal_preview": preview})

    def _supposed(self, account: Account, rows: object) -> list[tuple[Component, int, int]]:
        """Return components with the quantity and the price point to suppose; quantities are whole numbers."""
        found = []
        for row in rows if isinstance(rows, list) else [rows]:
            if not isinstance(row, dict):
                raise Unprocessable("Components: is invalid.")
            part = self.site.component_of(account, str(row.get("component_id")))
            quantity, given = row.get("quantity", 0), row.get("price_point_id")
            if not isinstance(quantity, int) or isinstance(quantity, bool) or quantity < 0:
                raise Unprocessable("Quantity: must be a whole number, and not negative.")
            if given is None:
                point = self.site.locked_point(account.id, part.id) or part.default_price_point.id
            else:
                point = named_price_point(given, part).id
            found.append((part, quantity, point))
        return found

    def list_site_events(self, call: Call) -> Response:
        """`GET /events.json`."""
        return json_reply(self._site_events(call, None))

    def list_subscription_events(self, call: Call, subscription: str) -> Response:
        """`GET /subscriptions/{id}/events.json`."""
        return json_reply(self._site_events(call, self.site.account(subscription)))

    def count_site_events(self, call: Call) -> Response:
        """`GET /events/count.json`."""
        where, args = self._site_event_filter(call, None)
        row = self.site.books.row(f"SELECT count(*) AS n FROM site_event WHERE {where}", *args)
        return json_reply({"count": row["n"] if row else 0})

    def list_invoices(self, call: Call) -> Response:
        """`GET /invoices.json`: newest first; lines with `line_items=true`."""
        limit, offset = paging(call)
        where, args = ["site = ?"], [self.site.world.site]
        if (number := call.param("subscription_id")) is not None:
            where.append("account = ?")
            args.append(number)
        order = "ASC" if call.param("direction") == "asc" else "DESC"
        rows = self.site.books.rows(
            f"SELECT * FROM invoice WHERE {' AND '.join(where)} ORDER BY id {order} LIMIT ? OFFSET ?",
            *args,
            limit,
            offset,
        )
        with_lines = call.param("line_items") == "true"
        return json_reply(
            {"invoices": [self.site.views.invoice(row, self._lines(row["id"]), with_lines=with_lines) for row in rows]}
        )

    def read_invoice(self, call: Call, uid: str) -> Response:
        """`GET /invoices/{uid}.json`, with lines."""
        try:
            number = int(uid.removeprefix("inv_"), 16)
        except ValueError as error:
            raise NotFound from error
        row = self.site.books.row("SELECT * FROM invoice WHERE site = ? AND id = ?", self.site.world.site, number)
        if row is None:
            raise NotFound
        return json_reply(self.site.views.invoice(row, self._lines(row["id"]), with_lines=True))

    def _site_events(self, call: Call, account: Account | None) -> list[dict[str, Any]]:
        limit, offset = paging(call)
        where, args = self._site_event_filter(call, account)
        order = "ASC" if call.param("direction") == "asc" else "DESC"
        rows = self.site.books.rows(
            f"SELECT * FROM site_event WHERE {where} ORDER BY id {order} LIMIT ? OFFSET ?", *args, limit, offset
        )
        return [self.site.views.site_event(row, json.loads(row["data"])) for row in rows]

    def _site_event_filter(self, call: Call, account: Account | None) -> tuple[str, list[Any]]:
        seen, seen_args = self.site.books.visible(self.site.switches.seconds("events_delay_seconds"))
        where, args = ["site = ?", seen], [self.site.world.site, *seen_args]
        if account is not None:
            where.append("subscription = ?")
            args.append(account.id)
        if keys := call.csv("filter"):
            where.append(f"key IN ({', '.join('?' * len(keys))})")
            args += keys
        for name, condition in (("since_id", "id >= ?"), ("max_id", "id <= ?")):
            if (value := whole_param(call, name)) is not None:
                where.append(condition)
                args.append(value)
        # Only the site's own list has bounds in time.
        for condition, instant in self._time_bounds(call) if account is None else ():
            where.append(condition)
            args.append(instant)
        return " AND ".join(where), args

    def _time_bounds(self, call: Call) -> list[tuple[str, int]]:
        """Return the bounds on `created_at`; exact times win over dates, and an end date includes its whole day."""
        zone, bounds = self.site.world.zone, []
        for end, condition in (("start", f"{_SECOND} >= ?"), ("end", f"{_SECOND} <= ?")):
            if (text := call.param(f"{end}_datetime")) is not None:
                try:
                    bounds.append((condition, parse_instant(text, zone)))
                except ValueError as error:
                    raise Unprocessable(f"{end}_datetime: is invalid") from error
            elif (day := day_param(call, f"{end}_date")) is not None:
                last = midnight(day + timedelta(days=1), zone) - 1
                bounds.append((condition, midnight(day, zone) if end == "start" else last))
        return bounds

    def _lines(self, invoice: int) -> list[Row]:
        return self.site.books.rows(
            "SELECT * FROM invoice_line WHERE invoice = ? AND kind != ? ORDER BY id", invoice, DRAWN
        )
