"""How a ChargeOver account bills: each line its base fee and the usage that a cycle was assigned."""

import json
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from usage_billing.sandbox.billing import ZERO, Account, InvoiceLine, StoredTotal
from usage_billing.sandbox.books import LIVE_STATES, Books
from usage_billing.sandbox.clock import from_micros
from usage_billing.sandbox.switches import SwitchBoard
from usage_billing.sandbox.wire import plain
from usage_billing.sandbox.world import ChargeOverWorld

_LIVE = "('" + "', '".join(LIVE_STATES) + "')"


class ChargeOverBiller:
    """Bills the packages of one ChargeOver account."""

    usage_kinds = ("usage",)
    assessment_delay = 0

    def __init__(self, world: ChargeOverWorld, books: Books, switches: SwitchBoard) -> None:
        self.world = world
        self.books = books
        self.switches = switches
        self.items = {item.external_key: item for item in world.items}

    def open_lines(self, account: Account | None = None) -> Mapping[int, list[InvoiceLine]]:
        """Return a base line for each present line with a base fee, and a usage line for each line with usage.

        Usage of a line that an upgrade replaced is charged under its old id, unless the site drops it.
        """
        usage = self._usage(account)
        lines: dict[int, list[InvoiceLine]] = {}
        for row in self._lines(account):
            charges = lines.setdefault(row["package"], [])
            base = Decimal(row["base"])
            if base and not row["replaced"]:
                charges.append(self._charge("base", row, Decimal(1), base))
            if (quantity := usage.get(row["id"], ZERO)) != 0:
                charges.append(self._charge("usage", row, quantity, Decimal(row["amount"])))
        return lines

    def ahead(self) -> Iterable[tuple[int, str, Decimal]]:
        """Return nothing: every record has a cycle of its own, and is charged with it."""
        return ()

    def start_period(self, account: Account) -> None:
        """Do nothing: records belong to cycles by their times, so nothing carries over."""

    def stored(self) -> Iterable[StoredTotal]:
        """Return the plain sums of the stored records, by package and item; those of unknown lines by line id."""
        references = {package.package_id: package.external_key or "" for package in self.world.packages}
        sums: dict[tuple[int | None, str, str], tuple[Decimal, int]] = {}
        rows = self.books.rows(
            "SELECT u.line, u.value, l.package, l.item FROM line_usage u"
            " LEFT JOIN line l ON l.id = u.line AND l.site = u.site WHERE u.site = ?",
            self.world.site,
        )
        for row in rows:
            reference = references.get(row["package"], f"line {row['line']}")
            key = (row["package"], reference, row["item"] or "")
            total, records = sums.get(key, (ZERO, 0))
            sums[key] = (total + Decimal(row["value"]), records + 1)
        for (package, reference, item), (total, records) in sums.items():
            yield StoredTotal(package, reference, item, total, records)

    def records(self, component: str | None) -> list[dict[str, Any]]:
        """Return the usage records with their package and item; times are UTC."""
        rows = self.books.rows(
            "SELECT u.*, l.package, l.item FROM line_usage u LEFT JOIN line l ON l.id = u.line AND l.site = u.site"
            " WHERE u.site = ? AND (? IS NULL OR l.item = ?) ORDER BY u.id",
            *(self.world.site, component, component),
        )
        return [{"site": self.world.site, **_record(row)} for row in rows]

    def _charge(self, kind: str, row: Any, quantity: Decimal, rate: Decimal) -> InvoiceLine:
        item = self.items[row["item"]]
        return InvoiceLine(kind, item.external_key, item.item_id, row["id"], item.name, quantity, rate)

    def _lines(self, account: Account | None) -> list[Any]:
        return self.books.rows(
            "SELECT l.* FROM account a JOIN line l ON l.site = a.site AND l.package = a.id"
            f" WHERE a.site = ? AND a.state IN {_LIVE}{_only(account)} ORDER BY l.id",
            self.world.site,
        )

    def _usage(self, account: Account | None) -> dict[int, Decimal]:
        """Return the usage of each line in its open cycle: the sum of `add`, the greatest `max`, the last `lat`.

        How the types mix on one line is not documented; here each type stands for itself and they are added.
        """
        rows = self.books.rows(
            "SELECT u.line, u.type, u.value FROM account a JOIN line l ON l.site = a.site AND l.package = a.id"
            " JOIN line_usage u ON u.site = l.site AND u.line = l.id"
            " AND u.counts_at >= a.period_start AND u.counts_at < a.period_end"
            f" WHERE a.site = ? AND u.billable AND l.billed AND a.state IN {_LIVE}{_only(account)}"
            " ORDER BY u.counts_at, u.id",
            self.world.site,
        )
        totals: dict[tuple[int, str], Decimal] = {}
        for row in rows:
            key, value = (row["line"], row["type"]), Decimal(row["value"])
            if row["type"] == "add":
                value += totals.get(key, ZERO)
            elif row["type"] == "max":
                value = max(value, totals.get(key, value))
            totals[key] = value
        usage: dict[int, Decimal] = {}
        for (line, _), value in totals.items():
            usage[line] = usage.get(line, ZERO) + value
        return usage


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "subscription": str(row["package"] or ""),
        "component": row["item"],
        "line_item_id": row["line"],
        "quantity": plain(Decimal(row["value"])),
        "type": row["type"],
        "external_key": row["external_key"],
        "from": from_micros(row["from_at"]).isoformat(),
        "to": from_micros(row["to_at"]).isoformat(),
        "written_at": from_micros(row["written_at"]).isoformat(),
        "billable": bool(row["billable"]),
        "custom": json.loads(row["custom"]),
    }


def _only(account: Account | None) -> str:
    return f" AND a.id = {account.id}" if account else ""
