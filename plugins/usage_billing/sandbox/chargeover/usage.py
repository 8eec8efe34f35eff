"""ChargeOver's usage records: single, bulk, and queries over them.

Fields follow the documentation pages "Storing usage (metered) data", "Bulk usage" and "Query for usage".
"""

import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from starlette.responses import Response

from usage_billing.sandbox.billing import find_account
from usage_billing.sandbox.clock import from_micros, midnight, parse_instant, to_micros
from usage_billing.sandbox.wire import Call, Route

from .envelope import (
    INVALID,
    ChargeOverAccount,
    Refusal,
    as_id,
    body_of,
    created,
    number_of,
    ok,
    pick,
    unsupported,
    updated,
    uploaded,
)
from .query import Field, Query

LARGEST_BULK = 1000
# The documents also name `pia`, `pas` and `dlt`, and tell nobody what they mean.
_TYPES = ("add", "max", "lat")
_UNDEFINED_TYPES = ("pia", "pas", "dlt")
_DECIMALS = Decimal("0.0001")
_WORD = re.compile(r"[A-Za-z0-9._-]+")
_USAGE_FIELDS = {
    "line_item_id": Field(lambda row: row["line"], "number"),
    "external_key": Field(lambda row: row["external_key"]),
    "from": Field(lambda row: row["from_at"], "time"),
    "to": Field(lambda row: row["to_at"], "time"),
}


@dataclass(frozen=True)
class UsageRecord:
    """One checked usage record; `billable` is false on a line that no invoice will ever show."""

    line: int
    external_key: str | None
    type: str
    value: Decimal
    from_at: int
    to_at: int
    custom: dict[str, str]
    billable: bool


class Usage:
    """The usage records of one account."""

    def __init__(self, account: ChargeOverAccount) -> None:
        self.account = account
        self.routes = (
            Route("GET", "/usage/_count", "count_usage", self.count_usage),
            Route("POST", "/usage", "create_usage", self.create_usage, writing=True),
            Route("POST", "/usage/_action/bulk", "bulk_usage", self.bulk_usage, writing=True, bulk=True),
            Route("GET", "/usage", "query_usage", self.query_usage),
            Route("GET", "/usage/{key}", "get_usage", self.get_usage),
            Route("PUT", "/usage/{key}", "update_usage", self.update_usage, writing=True),
            Route("DELETE", "/usage/{key}", "delete_usage", self.delete_usage, writing=True),
        )

    def create_usage(self, call: Call) -> Response:
        """`POST /usage`: 201 and the record's id."""
        record = body_of(call)
        number = self._store(self._check(record, in_bulk=False))
        reply = created(number)
        reply.headers["Location"] = f"{call.request.url.replace(query='')}/{number}"
        return reply

    def bulk_usage(self, call: Call) -> Response:
        """`POST /usage/_action/bulk`: up to 1,000 records; what one bad record does to the others is a switch."""
        records = body_of(call)
        if not isinstance(records, list) or len(records) > LARGEST_BULK:
            raise Refusal(INVALID)
        number = 0
        self.account.books.write("SAVEPOINT bulk")
        for record in records:
            try:
                number = self._store(self._check(record, in_bulk=True))
            except Refusal:
                if self.account.switches["bulk_atomicity"] == "atomic":
                    self.account.books.write("ROLLBACK TO bulk")
                if self.account.switches["bulk_atomicity"] != "skip_bad_silently":
                    self.account.books.write("RELEASE bulk")
                    raise
        self.account.books.write("RELEASE bulk")
        return created(number) if self.account.switches["bulk_reply"] == "last_id" else uploaded()

    def get_usage(self, call: Call, key: str) -> Response:
        """`GET /usage/{id}`, by the API's general rule; also `external_key:K`."""
        rows = [self.account.views.usage(row) for row in self._usage_rows(*_key_condition(key))]
        return ok(pick(rows, "usage", "usage_history_id", key))

    def update_usage(self, call: Call, key: str) -> Response:
        """`PUT /usage/{id}`, which no document knows: where it is taken, it changes `usage_value`."""
        number = self._editable(call, key)
        value = self._value(body_of(call))
        self.account.books.write("UPDATE line_usage SET value = ? WHERE id = ?", str(value), number)
        return updated(number)

    def delete_usage(self, call: Call, key: str) -> Response:
        """`DELETE /usage/{id}`, which no document knows."""
        self.account.books.write("DELETE FROM line_usage WHERE id = ?", self._editable(call, key))
        return ok(response=True)

    def query_usage(self, call: Call) -> Response:
        """`GET /usage?where=`: only by line item, external key, `from` and `to`."""
        query = self.account.query(call, _USAGE_FIELDS)
        return ok([self.account.views.usage(row) for row in query.page(self._usage_for(query))])

    def count_usage(self, call: Call) -> Response:
        """`GET /usage/_count?where=`."""
        query = self.account.query(call, _USAGE_FIELDS)
        return ok(len(query.matching(self._usage_for(query))))

    def _check(self, record: object, *, in_bulk: bool) -> UsageRecord:
        if not isinstance(record, dict):
            raise Refusal(INVALID)
        line, billable = self._target(record, in_bulk=in_bulk)
        value = self._value(record)
        kind, counts = self._type(record)
        from_at, to_at = self._times(record)
        key = self._key(record.get("external_key"))
        custom = {
            f"custom_{n}": str(record[f"custom_{n}"]) for n in range(1, 21) if record.get(f"custom_{n}") is not None
        }
        return UsageRecord(line, key, kind, value, from_at, to_at, custom, billable and counts)

    def _editable(self, call: Call, key: str) -> int:
        if self.account.switches["usage_edit"] == "refuse":
            raise Refusal(unsupported(call))
        rows = self._usage_rows(*_key_condition(key))
        if not rows:
            raise Refusal("This usage does not exist.", 404)
        return int(rows[0]["id"])

    def _value(self, record: object) -> Decimal:
        """Return the quantity of a record."""
        if not isinstance(record, dict):
            raise Refusal(INVALID)
        if record.get("usage_value") is None:
            raise Refusal("A required parameter was missing: usage_value.", generic=True)
        value = number_of(record["usage_value"])
        precise = self.account.switches["precise_usage"]
        if precise != "exact" and value != value.quantize(_DECIMALS):
            if precise == "refuse":
                raise Refusal(INVALID)
            value = value.quantize(_DECIMALS, rounding=ROUND_HALF_UP)
        for refused, switch in ((value < 0, "negative_usage"), (value == 0, "zero_usage")):
            if refused and self.account.switches[switch] == "refuse":
                raise Refusal(INVALID)
        return value

    def _type(self, record: dict[str, Any]) -> tuple[str, bool]:
        """Return the type of a record, and whether a record of that type is ever billed."""
        if record.get("options") and self.account.switches["usage_options"] == "refuse":
            raise Refusal(INVALID)
        kind = record.get("type") or "add"
        if kind in _TYPES:
            return kind, True
        taken = self.account.switches["undefined_types"]
        if kind not in _UNDEFINED_TYPES or taken == "refuse":
            raise Refusal(INVALID)
        return ("add", True) if taken == "as_add" else (kind, False)

    def _times(self, record: dict[str, Any]) -> tuple[int, int]:
        """Return `from` and `to`; what is missing is a switch."""
        given = [record.get("from") or None, record.get("to") or None]
        missing = self.account.switches["missing_times"]
        if None in given and missing == "refuse":
            raise Refusal("A required parameter was missing: from, to.", generic=True)
        now = self.account.books.now()
        today = from_micros(now, self.account.world.zone).date()
        first, last = (now, now)
        if missing == "today":
            first = midnight(today, self.account.world.zone)
            last = midnight(today + timedelta(days=1), self.account.world.zone) - 1_000_000
        from_at = first if given[0] is None else self._instant(given[0])
        to_at = last if given[1] is None else self._instant(given[1])
        if to_at < from_at:
            raise Refusal(INVALID)
        return from_at, to_at

    def _key(self, given: object) -> str | None:
        """Return an external key as the account keeps it."""
        if given is None:
            return None
        key, limit = str(given), self.account.switches["external_key_length"]
        if self.account.switches["external_key_characters"] == "word" and not _WORD.fullmatch(key):
            raise Refusal(INVALID)
        if limit == "none" or len(key) <= int(limit):
            return key
        if self.account.switches["long_external_key"] == "refuse":
            raise Refusal(INVALID)
        return key[: int(limit)]

    def _target(self, record: dict[str, Any], *, in_bulk: bool) -> tuple[int, bool]:
        """Return the line and whether it can be billed; a bad one is refused, or taken and never billed."""
        number = record.get("line_item_id")
        if number is None and in_bulk:
            number = self._line_by_keys(record)
        if number is None:
            raise Refusal("A required parameter was missing: line_item_id.", generic=True)
        if as_id(str(number)) is None:
            raise Refusal(INVALID)
        usable = self._usable(int(number))
        if not usable and self.account.switches["usage_on_bad_line"] == "refuse":
            raise Refusal(INVALID)
        return int(number), usable

    def _usable(self, number: int) -> bool:
        row = self.account.books.row(
            "SELECT l.item, l.replaced, l.package FROM line l WHERE l.id = ? AND l.site = ?",
            number,
            self.account.world.site,
        )
        if row is None or row["replaced"] or not self.account.biller.items[row["item"]].metered:
            return False
        account = find_account(self.account.books, self.account.world.site, row["package"])
        return account is not None and account.live

    def _line_by_keys(self, record: dict[str, Any]) -> int | None:
        """Find the line by customer and item keys, dotted or nested; two such lines are ambiguous and refused."""
        spelling = self.account.switches["bulk_keys"]
        customer_key = _dotted(record, "customer", "external_key", spelling)
        item_key = _dotted(record, "line_item", "item_external_key", spelling)
        if customer_key is None or item_key is None:
            return None
        packages = [p.package_id for p in self.account.world.packages if p.customer == customer_key]
        marks = ", ".join("?" * len(packages))
        rows = self.account.books.rows(
            f"SELECT id FROM line WHERE site = ? AND item = ? AND NOT replaced AND package IN ({marks})",
            *(self.account.world.site, item_key, *packages),
        )
        if len(rows) != 1:
            raise Refusal(INVALID)
        return int(rows[0]["id"])

    def _instant(self, given: object) -> int:
        """Read a time: naive means the account's zone, and so may every time, whatever its offset."""
        try:
            instant = parse_instant(str(given), self.account.world.zone)
            if self.account.switches["offset_in_times"] == "honoured":
                return instant
            naive = datetime.fromisoformat(str(given)).replace(tzinfo=None)
        except ValueError as error:
            raise Refusal(INVALID) from error
        return to_micros(naive.replace(tzinfo=self.account.world.zone))

    def _store(self, record: UsageRecord) -> int:
        fields = (
            *(record.type, str(record.value), record.from_at, record.to_at, json.dumps(record.custom)),
            *(self._counts_at(record), int(record.billable), self.account.books.now(), self.account.books.wall()),
        )
        known = self._with_key(record.external_key)
        if known is not None and self.account.switches["duplicate_external_key"] == "refuse":
            raise Refusal(f"An object with this external_key already exists: {record.external_key}", generic=True)
        if known is not None and self.account.switches["duplicate_external_key"] == "overwrite":
            self.account.books.write(
                "UPDATE line_usage SET line = ?, type = ?, value = ?, from_at = ?, to_at = ?, custom = ?,"
                " counts_at = ?, billable = ?, written_at = ?, wall = ? WHERE id = ?",
                *(record.line, *fields, known),
            )
            return known
        return self.account.books.write(
            "INSERT INTO line_usage (site, line, external_key, type, value, from_at, to_at, custom, counts_at,"
            " billable, written_at, wall) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            *(self.account.world.site, record.line, record.external_key, *fields),
        )

    @property
    def _collation(self) -> str:
        return " COLLATE NOCASE" if self.account.switches["external_key_case"] == "insensitive" else ""

    def _with_key(self, key: str | None) -> int | None:
        if key is None:
            return None
        row = self.account.books.row(
            f"SELECT id FROM line_usage WHERE site = ? AND external_key = ?{self._collation}",
            self.account.world.site,
            key,
        )
        return int(row["id"]) if row else None

    def _counts_at(self, record: UsageRecord) -> int:
        """Return the instant that assigns a record to a cycle."""
        instant = record.from_at if self.account.switches["cycle_by"] == "from" else record.to_at
        row = self.account.books.row(
            "SELECT a.period_start FROM line l JOIN account a ON a.site = l.site AND a.id = l.package"
            " WHERE l.id = ? AND l.site = ?",
            *(record.line, self.account.world.site),
        )
        late = row is not None and instant < row["period_start"]
        return self.account.books.now() if late and self.account.switches["late_usage"] == "next_invoice" else instant

    def _usage_for(self, query: Query) -> list[dict[str, Any]]:
        if (key := query.equals("external_key")) is not None:
            return self._usage_rows("external_key = ?", key)
        if (line := query.equals("line_item_id")) is not None and as_id(line) is not None:
            return self._usage_rows("line = ?", int(line))
        return self._usage_rows("1", None)

    def _usage_rows(self, condition: str, value: object) -> list[dict[str, Any]]:
        delay = self.account.switches.seconds("usage_read_delay_seconds")
        seen, args = self.account.books.visible(delay, "written_at")
        rows = self.account.books.rows(
            f"SELECT * FROM line_usage WHERE site = ? AND {seen} AND {condition} ORDER BY id",
            *(self.account.world.site, *args, *([] if value is None else [value])),
        )
        return [{**dict(row), "custom": json.loads(row["custom"])} for row in rows]


def _key_condition(key: str) -> tuple[str, object]:
    if key.startswith("external_key:"):
        return "external_key = ?", key.removeprefix("external_key:")
    return "id = ?", as_id(key) or 0


def _dotted(record: dict[str, Any], parent: str, name: str, spelling: str) -> str | None:
    nested = record.get(parent) if spelling != "dotted" else None
    value = record.get(f"{parent}.{name}") if spelling != "nested" else None
    if isinstance(nested, dict):
        value = nested.get(name)
    return None if value is None else str(value)
