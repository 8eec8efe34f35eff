"""The JSON shapes of Maxio's resources, as the API reference shows them; times carry the site's offset."""

import json
from collections.abc import Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from usage_billing.sandbox.billing import Account, InvoiceLine
from usage_billing.sandbox.clock import from_micros
from usage_billing.sandbox.wire import plain
from usage_billing.sandbox.world import Component, MaxioWorld, PricePoint, ProductFamily

Json = dict[str, Any]


class Views:
    """Renders the resources of one site."""

    def __init__(self, world: MaxioWorld) -> None:
        self.world = world
        self.families = {family.handle: family for family in world.product_families}
        self._family_of = {s.id: self.families[s.family] for s in world.subscriptions}

    def time(self, instant: int | None) -> str | None:
        """Return an instant in the site's zone with its numeric offset, to the second."""
        return None if instant is None else from_micros(instant, self.world.zone).isoformat(timespec="seconds")

    def day(self, instant: int) -> str:
        """Return the local date of an instant."""
        return from_micros(instant, self.world.zone).date().isoformat()

    def family(self, number: int) -> ProductFamily:
        """Return the product family of a subscription."""
        return self._family_of[number]

    def site(self) -> Json:
        """Render `GET /site.json`; the real one has no time zone either."""
        return {
            "site": {
                "id": 31_000 + sum(map(ord, self.world.name)),
                "name": self.world.name.title(),
                "subdomain": self.world.name,
                "currency": "USD",
                "seller_id": 21_000,
                "non_primary_currencies": [],
                "relationship_invoicing_enabled": True,
                "customer_hierarchy_enabled": False,
                "whopays_enabled": False,
                "whopays_default_payer": "self",
                "default_payment_collection_method": "automatic",
                "test": True,
            }
        }

    def usage(self, row: Mapping[str, Any], quantity: int | str) -> Json:
        """Render one usage; the quantity's type is the caller's choice."""
        component = self._component(row["component"])
        shape: Json = {
            "id": row["id"],
            "memo": row["memo"],
            "created_at": self.time(row["created_at"]),
            "price_point_id": row["price_point"],
            "quantity": quantity,
            "component_id": component.id,
            "component_handle": component.handle,
            "subscription_id": row["subscription"],
        }
        if component.kind == "prepaid_usage_component":
            shape["overage_quantity"] = number(Decimal(json.loads(row["extra"])["overage_quantity"]))
        return {"usage": shape}

    def subscription(self, account: Account) -> Json:
        """Render one subscription with its customer and product."""
        family = self.family(account.id)
        trial = account.state == "trialing"
        return {
            "subscription": {
                "id": account.id,
                "state": account.state,
                "reference": account.reference,
                "balance_in_cents": 0,
                "total_revenue_in_cents": 0,
                "product_price_in_cents": cents(family.product.price),
                "product_version_number": 1,
                "current_period_started_at": self.time(account.period_start),
                "current_period_ends_at": self.time(account.period_end),
                "next_assessment_at": self.time(account.period_end) if account.live else None,
                "trial_started_at": self.time(account.period_start) if trial else None,
                "trial_ended_at": self.time(account.period_end) if trial else None,
                "activated_at": None if trial else self.time(account.created_at),
                "expires_at": None,
                "created_at": self.time(account.created_at),
                "updated_at": self.time(account.ended_at or account.created_at),
                "cancellation_message": None,
                "cancel_at_end_of_period": False,
                "canceled_at": self.time(account.ended_at),
                "previous_state": "active",
                "coupon_code": None,
                "payment_collection_method": "automatic",
                "currency": "USD",
                "customer": self._customer(account),
                "product": self._product(family, account.created_at),
            }
        }

    def component(self, component: Component) -> Json:
        """Render a component of the catalogue."""
        family = self.families[component.family]
        point = component.default_price_point
        created = self.time(self._beginning())
        shape: Json = {
            "id": component.id,
            "name": component.name,
            "handle": component.handle,
            "pricing_scheme": "per_unit",
            "unit_name": component.unit_name,
            "unit_price": plain(point.unit_price),
            "product_family_id": family.id,
            "product_family_name": family.name,
            "product_family_handle": family.handle,
            "price_per_unit_in_cents": None,
            "kind": component.kind,
            "archived": component.archived,
            "taxable": False,
            "description": None,
            "default_price_point_id": point.id,
            "overage_prices": None,
            "prices": [self._price(component, point)],
            "price_point_count": len(component.price_points),
            "price_points_url": f"/components/{component.id}/price_points",
            "default_price_point_name": point.name,
            "tax_code": None,
            "recurring": component.kind in ("quantity_based_component", "on_off_component"),
            "upgrade_charge": None,
            "downgrade_credit": None,
            "created_at": created,
            "updated_at": created,
            "archived_at": created if component.archived else None,
            "hide_date_range_on_invoice": False,
            "allow_fractional_quantities": component.allow_fractional_quantities,
            "use_site_exchange_rate": True,
            "accounting_code": None,
        }
        if component.metric:
            shape["event_based_billing_metric_id"] = component.metric.id
        return {"component": shape}

    def price_point(self, component: Component, point: PricePoint) -> Json:
        """Render one of a component's price points."""
        created = self.time(self._beginning())
        return {
            "id": point.id,
            "type": "default" if point.default else "catalog",
            "default": point.default,
            "name": point.name,
            "pricing_scheme": "per_unit",
            "component_id": component.id,
            "handle": point.handle,
            "archived_at": created if point.archived else None,
            "created_at": created,
            "updated_at": created,
            "prices": [self._price(component, point)],
            "use_site_exchange_rate": True,
            "tax_included": False,
            "interval": None,
            "interval_unit": None,
        }

    def subscription_component(
        self, account: Account, component: Component, balance: Decimal, point: int | None, updated_at: int
    ) -> Json:
        """Render the line that a subscription has for a component; `point` is None until usage locks one in."""
        family = self.families[component.family]
        counted = component.kind in ("metered_component", "prepaid_usage_component", "event_based_component")
        price_point = component.price_point(point) if point else None
        return {
            # Real ids of this resource equal neither part; a client that mixes them up should find nothing.
            "id": account.id * 10 + component.id % 10,
            "name": component.name,
            "kind": component.kind,
            "unit_name": component.unit_name,
            "enabled": True,
            "unit_balance": number(balance) if counted else None,
            "currency": "USD",
            "allocated_quantity": None if counted else 0,
            "pricing_scheme": "per_unit",
            "component_id": component.id,
            "component_handle": component.handle,
            "subscription_id": account.id,
            "recurring": not counted,
            "upgrade_charge": None,
            "downgrade_credit": None,
            "archived_at": self.time(self._beginning()) if component.archived else None,
            "price_point_id": point,
            "price_point_handle": price_point.handle if price_point else None,
            "price_point_type": ("default" if price_point.default else "catalog") if price_point else None,
            "price_point_name": price_point.name if price_point else None,
            "product_family_id": family.id,
            "product_family_handle": family.handle,
            "created_at": self.time(account.created_at),
            "updated_at": self.time(updated_at),
            "use_site_exchange_rate": True,
            "description": None,
            "allow_fractional_quantities": component.allow_fractional_quantities,
            "display_on_hosted_page": False,
        }

    def site_event(self, row: Mapping[str, Any], data: Json) -> Json:
        """Render one line of the site's activity."""
        return {
            "event": {
                "id": row["id"],
                "key": row["key"],
                "message": row["message"],
                "subscription_id": row["subscription"],
                "customer_id": customer_id(row["subscription"]),
                "created_at": self.time(row["created_at"]),
                "event_specific_data": data,
            }
        }

    def invoice(self, row: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], *, with_lines: bool) -> Json:
        """Render one invoice; its lines only when asked for."""
        family = self.family(row["account"])
        total = sum((money(Decimal(line["amount"])) for line in lines), Decimal(0))
        issued = self.time(row["issued_at"])
        shape: Json = {
            "id": row["id"],
            "uid": f"inv_{row['id']:x}",
            "site_id": self.site()["site"]["id"],
            "customer_id": customer_id(row["account"]),
            "subscription_id": row["account"],
            "number": str(row["id"]),
            "sequence_number": row["id"],
            "transaction_time": issued,
            "created_at": issued,
            "updated_at": issued,
            "issue_date": self.day(row["issued_at"]),
            "due_date": self.day(row["issued_at"]),
            "paid_date": None,
            "status": "open",
            "role": "renewal",
            "collection_method": "automatic",
            "currency": "USD",
            "consolidation_level": "none",
            "product_name": family.product.name,
            "product_family_name": family.name,
            "memo": "",
            "subtotal_amount": f"{total:f}",
            "discount_amount": "0.0",
            "tax_amount": "0.0",
            "total_amount": f"{total:f}",
            "credit_amount": "0.0",
            "refund_amount": "0.0",
            "paid_amount": "0.0",
            "due_amount": f"{total:f}",
        }
        if with_lines:
            shape["line_items"] = [self._invoice_line(row, line) for line in lines]
        return shape

    def preview_line(self, line: InvoiceLine, family: ProductFamily, period: tuple[int, int]) -> Json:
        """Render one line of a renewal preview; the documented shape has no quantity, so the memo tells it."""
        shape: Json = {
            "transaction_type": "charge",
            "kind": line.kind,
            "amount_in_cents": cents(line.amount),
            "memo": f"{line.title} ({self.day(period[0])} - {self.day(period[1])})",
            "discount_amount_in_cents": 0,
            "taxable_amount_in_cents": 0,
            "product_id": family.product.id,
            "product_name": family.product.name,
            "product_handle": family.product.handle,
            "period_range_start": self.day(period[0]),
            "period_range_end": self.day(period[1]),
        }
        if line.kind != "baseline":
            component = self._component(line.component_id)
            shape["memo"] = f"{component.name}: {plain(line.quantity)} {component.unit_name}"
            shape |= {"component_id": component.id, "component_handle": component.handle}
            shape["component_name"] = component.name
        return shape

    def _invoice_line(self, invoice: Mapping[str, Any], line: Mapping[str, Any]) -> Json:
        plan = line["kind"] == "baseline"
        amount = money(Decimal(line["amount"]))
        return {
            "uid": f"li_{line['id']:x}",
            "title": line["title"],
            "description": f"{self.day(invoice['period_start'])} - {self.day(invoice['period_end'])}",
            "quantity": decimal_text(Decimal(line["quantity"])),
            "unit_price": plain(Decimal(line["unit_price"])),
            "subtotal_amount": f"{amount:f}",
            "discount_amount": "0.0",
            "tax_amount": "0.0",
            "total_amount": f"{amount:f}",
            "tiered_unit_price": False,
            "period_range_start": self.day(invoice["period_start"]),
            "period_range_end": self.day(invoice["period_end"]),
            "transaction_id": line["id"],
            "product_id": self.family(invoice["account"]).product.id,
            "product_version": 1,
            "component_id": None if plan else line["component_id"],
            "price_point_id": None if plan else line["price_id"],
            "hide": False,
            "custom_item": False,
            "kind": line["kind"],
        }

    def _price(self, component: Component, point: PricePoint) -> Json:
        return {
            "id": point.id * 10,
            "component_id": component.id,
            "starting_quantity": 1,
            "ending_quantity": None,
            "unit_price": plain(point.unit_price),
            "price_point_id": point.id,
            "formatted_unit_price": f"${plain(point.unit_price)}",
            "segment_id": None,
        }

    def _customer(self, account: Account) -> Json:
        return {
            "id": customer_id(account.id),
            "first_name": "Customer",
            "last_name": str(account.id),
            "email": f"customer-{account.id}@example.com",
            "organization": account.reference,
            "reference": account.reference,
            "created_at": self.time(account.created_at),
            "updated_at": self.time(account.created_at),
        }

    def _product(self, family: ProductFamily, created_at: int) -> Json:
        return {
            "id": family.product.id,
            "name": family.product.name,
            "handle": family.product.handle,
            "description": None,
            "accounting_code": None,
            "created_at": self.time(created_at),
            "updated_at": self.time(created_at),
            "price_in_cents": cents(family.product.price),
            "interval": 1,
            "interval_unit": "month",
            "archived_at": None,
            "require_credit_card": False,
            "taxable": False,
            "version_number": 1,
            "product_family": {
                "id": family.id,
                "name": family.name,
                "handle": family.handle,
                "accounting_code": None,
                "description": None,
                "created_at": self.time(created_at),
                "updated_at": self.time(created_at),
            },
        }

    def _component(self, number: int) -> Component:
        return next(component for component in self.world.components if component.id == number)

    def _beginning(self) -> int:
        # Catalogues are older than what is sold from them.
        return 1_735_722_000_000_000


def customer_id(subscription: int) -> int:
    """Return the customer of a subscription; each has one of its own."""
    return subscription + 40_000_000


def number(value: Decimal) -> int | str:
    """Return whole numbers as such and others as text, which keeps their digits."""
    return int(value) if value == value.to_integral_value() else plain(value)


def decimal_text(value: Decimal) -> str:
    """Return a decimal with at least one place, like `20.0`."""
    text = plain(value)
    return text if "." in text else f"{text}.0"


def money(amount: Decimal) -> Decimal:
    """Return an amount in whole cents."""
    return amount.quantize(Decimal("0.01"), rounding=ROUND_HALF_UP)


def cents(amount: Decimal) -> int:
    """Return an amount as a number of cents."""
    return int(money(amount) * 100)
