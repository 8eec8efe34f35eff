"""The JSON shapes of ChargeOver's objects, as its documentation and recorded traffic show them."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from usage_billing.sandbox.billing import Account
from usage_billing.sandbox.clock import from_micros
from usage_billing.sandbox.switches import SwitchBoard
from usage_billing.sandbox.wire import plain
from usage_billing.sandbox.world import ChargeOverWorld, Customer, Item

Json = dict[str, Any]

_ELSEWHERE = {"iso_honolulu": ZoneInfo("Pacific/Honolulu")}
"""Zones other than the account's own in which it may be set to show times."""
_PAYCYCLES = {1: "mon", 2: "2mn", 3: "qtr", 6: "six", 12: "yrl"}
_PAYCYCLES_BY_DAY = {1: "dly", 7: "1wk", 14: "2wk", 28: "4wk", 30: "30d", 56: "8wk", 84: "12w"}


class Views:
    """Renders the objects of one account; times naive or with offset, and in which zone, as a switch says."""

    def __init__(self, world: ChargeOverWorld, switches: SwitchBoard) -> None:
        self.world = world
        self.switches = switches
        self.items = {item.external_key: item for item in world.items}
        self.customers = {customer.external_key: customer for customer in world.customers}
        self.customer_of = {package.package_id: self.customers[package.customer] for package in world.packages}

    def time(self, instant: int | None) -> str | None:
        """Return an instant as the account shows times."""
        if instant is None:
            return None
        shown = self.switches["times_out"]
        moment = from_micros(instant, _ELSEWHERE.get(shown, self.world.zone))
        return moment.strftime("%Y-%m-%d %H:%M:%S") if shown == "naive" else moment.isoformat(timespec="seconds")

    def day(self, instant: int) -> str:
        """Return the local date of an instant."""
        return from_micros(instant, self.world.zone).date().isoformat()

    @property
    def paycycle(self) -> str:
        """The API's word for the length of a billing period; a length that it has no word for passes for a month."""
        start, end = self.world.billing_period.start, self.world.billing_period.end
        if start.day == end.day:
            return _PAYCYCLES.get((end.year - start.year) * 12 + end.month - start.month, "mon")
        return _PAYCYCLES_BY_DAY.get((end - start).days, "mon")

    def package(self, account: Account, lines: Sequence[Mapping[str, Any]] | None) -> Json:
        """Render a package; `lines` is None where the API leaves its line items out."""
        cancelled = not account.live
        customer = self.customer_of[account.id]
        shape: Json = {
            "package_id": account.id,
            "customer_id": customer.customer_id,
            "brand_id": 1,
            "external_key": account.reference,
            "token": f"t{account.id:011d}",
            "nickname": "",
            "terms_id": 2,
            "currency_id": 1,
            "currency_symbol": "$",
            "currency_iso4217": "USD",
            "paymethod": "inv",
            "paycycle": self.paycycle,
            "custom_1": None,
            "custom_2": None,
            "custom_3": None,
            "write_datetime": self.time(account.created_at),
            "mod_datetime": self.time(account.ended_at or account.created_at),
            "suspendfrom_datetime": None,
            "suspendto_datetime": None,
            "cancel_datetime": self.time(account.ended_at),
            "holduntil_datetime": None,
            "amount_collected": 0,
            "amount_invoiced": 0,
            "amount_due": 0,
            # Recorded traffic shows an empty string here once a package is cancelled, not null.
            "next_invoice_datetime": "" if cancelled else self.time(account.period_end),
            "package_status_id": 3 if cancelled else 2,
            "package_status_name": "Cancelled" if cancelled else "Current",
            "package_status_str": "canceled-manual" if cancelled else "active-current",
            "package_status_state": "c" if cancelled else "a",
        }
        if lines is not None:
            shape["line_items"] = [self.line(line) for line in lines]
        return shape

    def customer(self, customer: Customer) -> Json:
        """Render a customer."""
        written = self.time(self._beginning())
        return {
            "customer_id": customer.customer_id,
            "external_key": customer.external_key,
            "token": f"c{customer.customer_id:011d}",
            "company": customer.company,
            "currency_id": 1,
            "currency_iso4217": "USD",
            "balance": 0,
            "paid": 0,
            "total": 0,
            "write_datetime": written,
            "mod_datetime": written,
            "custom_1": None,
            "custom_2": None,
            "custom_3": None,
        }

    def item(self, item: Item, *, whole: bool) -> Json:
        """Render a product; whether it is metered shows only when it is read singly."""
        written = self.time(self._beginning())
        shape: Json = {
            "item_id": item.item_id,
            "item_type": "service",
            "tierset_id": item.item_id + 69,
            "name": item.name,
            "description": "",
            "units": item.units,
            "external_key": item.external_key,
            "token": f"i{item.item_id:011d}",
            "enabled": True,
            "write_datetime": written,
            "mod_datetime": written,
        }
        if whole:
            shape["tierset"] = self._tierset(item.item_id, item.base, item.amount)
            shape["service_data"] = {"is_usage": item.metered, "trial_days": 0, "trial_units": 0}
        return shape

    def usage(self, row: Mapping[str, Any]) -> Json:
        """Render one stored usage record."""
        return {
            "usage_history_id": row["id"],
            "external_key": row["external_key"],
            "usage_value": Decimal(row["value"]),
            "type": row["type"],
            **{f"custom_{n}": row["custom"].get(f"custom_{n}") for n in range(1, 21)},
            "line_item_id": row["line"],
            "from": self.time(row["from_at"]),
            "to": self.time(row["to_at"]),
        }

    def invoice(self, row: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], *, whole: bool) -> Json:
        """Render an invoice; its line items only when it is read singly."""
        base = _sum(lines, "base")
        usage = _sum(lines, "usage")
        shape: Json = {
            "invoice_id": row["id"],
            "refnumber": str(row["id"]),
            "customer_id": self.customer_of[row["account"]].customer_id,
            "package_id": row["account"],
            "token": f"v{row['id']:011d}",
            "currency_id": 1,
            "currency_iso4217": "USD",
            "date": self.day(row["issued_at"]),
            "write_datetime": self.time(row["issued_at"]),
            "mod_datetime": self.time(row["issued_at"]),
            "void_datetime": None,
            "invoice_status_id": 1,
            "invoice_status_str": "open-unpaid",
            "invoice_status_state": "o",
            "sum_base": base,
            "sum_usage": usage,
            "sum_onetime": 0,
            "subtotal": base + usage,
            "taxes": 0,
            "total": base + usage,
            "cycle_pre_from_date": self.day(row["period_end"]),
            "cycle_pre_to_date": None,
            "cycle_this_date": self.day(row["period_end"]),
            # Usage is billed in arrears over the `post` pair, whose last day is included.
            "cycle_post_from_date": self.day(row["period_start"]),
            "cycle_post_to_date": self.day(row["period_end"] - 1),
        }
        if whole:
            shape["line_items"] = [self._invoice_line(row, line) for line in lines]
        return shape

    def line(self, row: Mapping[str, Any]) -> Json:
        """Render a line item of a package."""
        item = self.items[row["item"]]
        return {
            "line_item_id": row["id"],
            "item_id": item.item_id,
            "tierset_id": row["id"] - 772,
            "external_key": row["external_key"],
            "nickname": "",
            "descrip": None,
            "trial_days": 0,
            "trial_units": 0,
            "custom_1": None,
            "custom_2": None,
            "custom_3": None,
            "subscribe_datetime": self.time(row["subscribed_at"]),
            "cancel_datetime": None,
            "expire_datetime": None,
            "expire_recurs": None,
            "license": "",
            "item_name": item.name,
            "item_external_key": item.external_key,
            "item_accounting_sku": None,
            "item_token": f"i{item.item_id:011d}",
            "item_units": item.units,
            "item_type": "service",
            "item_is_usage": item.metered,
            "tierset": self._tierset(row["id"] - 841, Decimal(row["base"]), Decimal(row["amount"])),
        }

    def _tierset(self, number: int, base: Decimal, amount: Decimal) -> Json:
        written = self.time(self._beginning())
        return {
            "tierset_id": number + 69,
            "currency_id": 1,
            "setup": 0,
            "base": base,
            "minimum": 0,
            "percent": "0.000000",
            "paycycle": self.paycycle,
            "pricemodel": "uni",
            "write_datetime": written,
            "mod_datetime": written,
            "setup_formatted": "$ 0.00",
            "base_formatted": f"$ {base:.2f}",
            "percent_formatted": "0 %",
            "pricemodel_desc": f"${plain(amount)} each",
            "tiers": [{"tier_id": number, "unit_from": 1, "unit_to": 9999, "amount": amount}],
        }

    def _invoice_line(self, invoice: Mapping[str, Any], line: Mapping[str, Any]) -> Json:
        quantity, amount = Decimal(line["quantity"]), Decimal(line["amount"])
        used = line["kind"] == "usage"
        return {
            "line_item_id": line["id"],
            "package_line_id": line["price_id"],
            "invoice_id": invoice["id"],
            "item_id": line["component_id"],
            "item_name": line["title"],
            "item_external_key": line["component"],
            "descrip": line["title"],
            "line_rate": Decimal(line["unit_price"]),
            "line_quantity": quantity,
            "line_usage": quantity if used else 0,
            "line_prorate": 1,
            "line_total": amount,
            "is_usage": used,
            "is_base": not used,
            "is_setup": False,
            "is_free": False,
            "is_recurring": True,
        }

    def _beginning(self) -> int:
        # Customers and products are older than the packages sold.
        return 1_735_722_000_000_000


def _sum(lines: Sequence[Mapping[str, Any]], kind: str) -> Decimal:
    return sum((Decimal(line["amount"]) for line in lines if line["kind"] == kind), Decimal(0))
