"""ChargeOver's packages (its subscriptions) with their lines, its customers and items."""

from collections.abc import Callable, Mapping
from typing import Any

from starlette.responses import Response

from usage_billing.sandbox.billing import Account, all_accounts, find_account, find_by_reference
from usage_billing.sandbox.wire import Call, Route

from .envelope import INVALID, ChargeOverAccount, Refusal, as_id, body_of, number_of, ok, pick
from .query import Field, Query

_CUSTOMER_FIELDS = {
    "customer_id": Field(lambda row: row["customer_id"], "number"),
    "external_key": Field(lambda row: row["external_key"]),
    "token": Field(lambda row: row["token"]),
    "company": Field(lambda row: row["company"]),
}
_ITEM_FIELDS = {
    "item_id": Field(lambda row: row["item_id"], "number"),
    "external_key": Field(lambda row: row["external_key"]),
    "name": Field(lambda row: row["name"]),
}


class Packages:
    """The packages of one account."""

    def __init__(self, account: ChargeOverAccount) -> None:
        self.account = account
        self.routes = (
            Route("GET", "/package/_count", "count_packages", self.count_packages),
            Route("GET", "/package", "query_packages", self.query_packages),
            Route("GET", "/package/{key}", "get_package", self.get_package),
            Route("POST", "/package/{key}/_action/{action}", "package_action", self.package_action, writing=True),
            Route("POST", "/package/{key}", "package_action", self.act_on_package, writing=True),
        )

    def get_package(self, call: Call, key: str) -> Response:
        """`GET /package/{id}`, also `external_key:K` and `token:T`; with its line items."""
        account = self._package(key)
        return ok(self.account.views.package(account, self._lines(account.id)))

    def query_packages(self, call: Call) -> Response:
        """`GET /package?where=`; line items only with `expand=line_items`."""
        query = self.account.query(call, self._package_fields())
        chosen = query.page(self._packages(query))
        expand = "line_items" in call.csv("expand")
        return ok([self.account.views.package(row["account"], row["lines"] if expand else None) for row in chosen])

    def count_packages(self, call: Call) -> Response:
        """`GET /package/_count?where=`."""
        query = self.account.query(call, self._package_fields())
        return ok(len(query.matching(self._packages(query))))

    def act_on_package(self, call: Call, key: str) -> Response:
        """`POST /package/{id}?action=...`, the older form of `_action`."""
        return self.package_action(call, key, call.param("action") or "")

    def package_action(self, call: Call, key: str, action: str) -> Response:
        """`POST /package/{id}/_action/{upgrade or cancel}`: 200, `true`."""
        account = self._package(key)
        if action == "upgrade":
            self._upgrade(account, call)
        elif action == "cancel":
            self.account.books.write(
                "UPDATE account SET state = 'cancelled', ended_at = ? WHERE site = ? AND id = ?",
                *(self.account.books.now(), self.account.world.site, account.id),
            )
        else:
            raise Refusal(f"The command requested is not supported: {action}(package, {account.id})")
        return ok(response=True)

    def _package(self, key: str) -> Account:
        account = None
        kind, _, value = key.partition(":")
        if kind == "external_key":
            account = find_by_reference(self.account.books, self.account.world.site, value)
        elif (number := as_id(value.removeprefix("t") if kind == "token" else key)) is not None:
            account = find_account(self.account.books, self.account.world.site, number)
        if account is None:
            raise Refusal("This package does not exist.", 404)
        return account

    def _packages(self, query: Query) -> list[dict[str, Any]]:
        accounts = all_accounts(self.account.books, self.account.world.site)
        if (key := query.equals("external_key")) is not None:
            account = find_by_reference(self.account.books, self.account.world.site, key)
            accounts = [account] if account else []
        lines: dict[int, list[Any]] = {}
        rows = self.account.books.rows(
            "SELECT * FROM line WHERE site = ? AND NOT replaced ORDER BY id", self.account.world.site
        )
        for row in rows:
            lines.setdefault(row["package"], []).append(row)
        return [{"account": account, "lines": lines.get(account.id, [])} for account in accounts]

    def _package_fields(self) -> dict[str, Field]:
        def shown(name: str) -> Callable[[Any], Any]:
            return lambda record: self.account.views.package(record["account"], None)[name]

        def of_lines(name: str) -> Callable[[Any], Any]:
            return lambda record: tuple(self.account.views.line(line)[name] for line in record["lines"])

        texts = ("token", "external_key", "paymethod", "paycycle", "nickname", "package_status_str")
        fields = {name: Field(shown(name)) for name in (*texts, "package_status_state")}
        fields |= {name: Field(shown(name), "number") for name in ("package_id", "customer_id", "brand_id")}
        fields["line_items.item_id"] = Field(of_lines("item_id"), "number")
        fields["line_items.external_key"] = Field(of_lines("external_key"))
        fields["write_datetime"] = Field(lambda record: record["account"].created_at, "time")
        fields["cancel_datetime"] = Field(lambda record: record["account"].ended_at, "time")
        return fields

    def _lines(self, package: int) -> list[Any]:
        sql = "SELECT * FROM line WHERE site = ? AND package = ? AND NOT replaced ORDER BY id"
        return self.account.books.rows(sql, self.account.world.site, package)

    def _upgrade(self, account: Account, call: Call) -> None:
        """Replace lines by new ones with new ids, even when only a price changes; the old ids vanish."""
        order = body_of(call)
        changes = order.get("line_items") if isinstance(order, dict) else None
        if not isinstance(changes, list) or not changes:
            raise Refusal(INVALID)
        present = {row["id"]: row for row in self._lines(account.id)}
        keeps_usage = self.account.switches["usage_of_replaced_line"] == "billed"
        for change in changes:
            old = present.get(change.get("line_item_id")) if isinstance(change, dict) else None
            if old is None:
                raise Refusal(INVALID)
            item, amount, base = self._terms(change, old)
            self.account.books.write(
                "UPDATE line SET replaced = 1, billed = ? WHERE site = ? AND id = ?",
                *(int(keeps_usage), self.account.world.site, old["id"]),
            )
            self.account.books.write(
                "INSERT INTO line (id, site, package, item, external_key, amount, base, subscribed_at)"
                " VALUES ((SELECT max(id) + 1 FROM line), ?, ?, ?, ?, ?, ?, ?)",
                *(
                    self.account.world.site,
                    account.id,
                    item,
                    old["external_key"],
                    amount,
                    base,
                    self.account.books.now(),
                ),
            )

    def _terms(self, change: dict[str, Any], old: Mapping[str, Any]) -> tuple[str, str, str]:
        """Return item, price of a unit and base fee of an upgraded line; what is not named stays."""
        item, amount, base = old["item"], old["amount"], old["base"]
        if "item_id" in change:
            chosen = next((x for x in self.account.world.items if str(x.item_id) == str(change["item_id"])), None)
            if chosen is None:
                raise Refusal(INVALID)
            if chosen.external_key != item:
                item, amount, base = chosen.external_key, str(chosen.amount), str(chosen.base)
        tierset = change.get("tierset") or {}
        if "base" in tierset:
            base = str(number_of(tierset["base"]))
        if tierset.get("tiers"):
            amount = str(number_of(tierset["tiers"][0].get("amount")))
        return item, amount, base


class Catalogue:
    """The customers and items of one account."""

    def __init__(self, account: ChargeOverAccount) -> None:
        self.account = account
        self.routes = (
            Route("GET", "/customer/_count", "count_customers", self.count_customers),
            Route("GET", "/customer", "query_customers", self.query_customers),
            Route("GET", "/customer/{key}", "get_customer", self.get_customer),
            Route("GET", "/item", "query_items", self.query_items),
            Route("GET", "/item/{key}", "get_item", self.get_item),
        )

    def get_customer(self, call: Call, key: str) -> Response:
        """`GET /customer/{id}`, also `external_key:K` and `token:T`."""
        rows = [self.account.views.customer(customer) for customer in self.account.world.customers]
        return ok(pick(rows, "customer", "customer_id", key))

    def query_customers(self, call: Call) -> Response:
        """`GET /customer?where=`."""
        return ok(self.account.query(call, _CUSTOMER_FIELDS).page(self._customers()))

    def count_customers(self, call: Call) -> Response:
        """`GET /customer/_count?where=`."""
        return ok(len(self.account.query(call, _CUSTOMER_FIELDS).matching(self._customers())))

    def get_item(self, call: Call, key: str) -> Response:
        """`GET /item/{id}`, with `service_data.is_usage`."""
        rows = [self.account.views.item(item, whole=True) for item in self.account.world.items]
        return ok(pick(rows, "item", "item_id", key))

    def query_items(self, call: Call) -> Response:
        """`GET /item?where=`."""
        return ok(
            self.account.query(call, _ITEM_FIELDS).page(
                [self.account.views.item(i, whole=False) for i in self.account.world.items]
            )
        )

    def _customers(self) -> list[dict[str, Any]]:
        return [self.account.views.customer(customer) for customer in self.account.world.customers]
