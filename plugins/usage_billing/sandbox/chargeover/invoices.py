"""ChargeOver's invoices: what was billed, line by line."""

from starlette.responses import Response

from usage_billing.sandbox.books import Row
from usage_billing.sandbox.wire import Call, Route

from .envelope import ChargeOverAccount, Refusal, as_id, ok
from .query import Field, Query


class Invoices:
    """The invoices of one account."""

    def __init__(self, account: ChargeOverAccount) -> None:
        self.account = account
        self.routes = (
            Route("GET", "/invoice/_count", "count_invoices", self.count_invoices),
            Route("GET", "/invoice", "query_invoices", self.query_invoices),
            Route("GET", "/invoice/{key}", "get_invoice", self.get_invoice),
        )

    def get_invoice(self, call: Call, key: str) -> Response:
        """`GET /invoice/{id}`, with its line items."""
        rows = self.account.books.rows(
            "SELECT * FROM invoice WHERE site = ? AND id = ?", self.account.world.site, as_id(key)
        )
        if not rows:
            raise Refusal("This invoice does not exist.", 404)
        return ok(self.account.views.invoice(rows[0], self._invoice_lines(rows[0]["id"]), whole=True))

    def query_invoices(self, call: Call) -> Response:
        """`GET /invoice?where=`, without line items."""
        query = self.account.query(call, self._invoice_fields())
        rows = query.page(self._invoices(query))
        return ok([self.account.views.invoice(row, self._invoice_lines(row["id"]), whole=False) for row in rows])

    def count_invoices(self, call: Call) -> Response:
        """`GET /invoice/_count?where=`."""
        query = self.account.query(call, self._invoice_fields())
        return ok(len(query.matching(self._invoices(query))))

    def _invoices(self, query: Query) -> list[Row]:
        sql = "SELECT * FROM invoice WHERE site = ?"
        if (package := query.equals("package_id")) is not None:
            return self.account.books.rows(f"{sql} AND account = ? ORDER BY id", self.account.world.site, package)
        return self.account.books.rows(f"{sql} ORDER BY id", self.account.world.site)

    def _invoice_fields(self) -> dict[str, Field]:
        customer_of = self.account.views.customer_of
        return {
            "invoice_id": Field(lambda row: row["id"], "number"),
            "refnumber": Field(lambda row: str(row["id"])),
            "customer_id": Field(lambda row: customer_of[row["account"]].customer_id, "number"),
            "package_id": Field(lambda row: row["account"], "number"),
            "date": Field(lambda row: self.account.views.day(row["issued_at"])),
            "invoice_status_str": Field(lambda _row: "open-unpaid"),
            "invoice_status_state": Field(lambda _row: "o"),
            "write_datetime": Field(lambda row: row["issued_at"], "time"),
            "mod_datetime": Field(lambda row: row["issued_at"], "time"),
        }

    def _invoice_lines(self, invoice: int) -> list[Row]:
        return self.account.books.rows("SELECT * FROM invoice_line WHERE invoice = ? ORDER BY id", invoice)
