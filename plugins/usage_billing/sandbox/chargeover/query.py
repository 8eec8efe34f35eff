"""ChargeOver's query language: `where`, `order`, `limit`, `offset`, for every kind of object.

`where=FIELD:OP:VALUE,FIELD:OP:VALUE`; inside a value a backslash stands before each colon and comma. An unescaped
colon ends the value without any error, so `from:GTE:2026-10-05 10:18:49` means ten o'clock: the documented trap, kept
on purpose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any
from zoneinfo import ZoneInfo

from usage_billing.sandbox.clock import parse_instant
from usage_billing.sandbox.wire import Call

LARGEST_LIMIT = 500
_DEFAULT_LIMIT = 10
_OPERATORS = ("EQUALS", "NOTEQUALS", "GT", "LT", "GTE", "LTE", "CONTAINS", "IS", "ISNOT")

Record = Mapping[str, Any]
Getter = Callable[[Record], Any]


class BadQuery(ValueError):
    """A query that the API answers with 400; the text is its message."""


@dataclass(frozen=True)
class Field:
    """A field that may be filtered by: how its value is read from a record, and how a filter's text compares to it.

    A tuple stands for several values, as of a package's lines; one that fulfils the condition is enough.
    """

    read: Getter
    kind: str = "text"  # text, number or time; times are microseconds.


@dataclass(frozen=True)
class Condition:
    """One `FIELD:OP:VALUE`."""

    field: str
    operator: str
    value: str


def parse_where(text: str | None) -> list[Condition]:
    """Read a `where`; `BadQuery` when a condition lacks a part or names no operator."""
    if not text:
        return []
    conditions = []
    for clause in _split(text, ","):
        parts = _split(clause, ":")
        if len(parts) < 3 or parts[1] not in _OPERATORS:
            raise BadQuery("Malformed WHERE clause.")
        # What follows a further unescaped colon is lost, as it is on the real API.
        conditions.append(Condition(_unescape(parts[0]), parts[1], _unescape(parts[2])))
    return conditions


class Query:
    """A call's filters, order and page, checked against the fields of its kind of object."""

    def __init__(self, call: Call, fields: Mapping[str, Field], zone: ZoneInfo, over_limit: str = "clamp") -> None:
        self.fields = fields
        self.conditions = parse_where(call.param("where"))
        self._tests = [self._test(condition, zone) for condition in self.conditions]
        self._orders = self._parse_order(call.param("order"))
        self.offset = _count(call.param("offset"), 0)
        self.limit = _limit(_count(call.param("limit"), _DEFAULT_LIMIT), over_limit)

    def equals(self, field: str) -> str | None:
        """Return the value that a field must equal, so that an index can be used before filtering."""
        for condition in self.conditions:
            if condition.field == field and condition.operator == "EQUALS":
                return condition.value
        return None

    def matching(self, records: Sequence[Record]) -> list[Record]:
        """Return the records that fulfil every condition, in order, all pages."""
        chosen = [record for record in records if all(test(record) for test in self._tests)]
        for getter, descending in reversed(self._orders):
            chosen.sort(key=lambda record: _sort_key(getter(record)), reverse=descending)
        return chosen

    def page(self, records: Sequence[Record]) -> list[Record]:
        """Return the asked page of the matching records."""
        return self.matching(records)[self.offset : self.offset + self.limit]

    def _test(self, condition: Condition, zone: ZoneInfo) -> Callable[[Record], bool]:
        field = self.fields.get(condition.field)
        if field is None:
            raise BadQuery(f"You cannot filter by: {condition.field}.")
        fulfils = _predicate(field, condition, zone)

        def test(record: Record) -> bool:
            value = field.read(record)
            return any(map(fulfils, value)) if isinstance(value, tuple) else fulfils(value)

        return test

    def _parse_order(self, text: str | None) -> list[tuple[Getter, bool]]:
        orders = []
        for clause in _split(text, ",") if text else []:
            name, _, direction = clause.partition(":")
            if name not in self.fields or direction not in ("", "ASC", "DESC"):
                raise BadQuery(f"You cannot order by: {clause}.")
            orders.append((self.fields[name].read, direction == "DESC"))
        return orders


def _predicate(field: Field, condition: Condition, zone: ZoneInfo) -> Callable[[Any], bool]:
    if condition.operator in ("IS", "ISNOT"):
        if condition.value != "NULL":
            raise BadQuery("Malformed WHERE clause.")
        return lambda value: (value is None) == (condition.operator == "IS")
    if condition.operator == "CONTAINS":
        return lambda value: condition.value.lower() in str(value or "").lower()
    return _comparison(condition.operator, _typed(field, condition.value, zone))


def _comparison(operator: str, wanted: Any) -> Callable[[Any], bool]:
    def compare(value: Any) -> bool:
        if value is None:
            return operator == "NOTEQUALS"
        if operator in ("EQUALS", "NOTEQUALS"):
            return bool(value == wanted) == (operator == "EQUALS")
        below, above = value < wanted, value > wanted
        return bool({"LT": below, "GT": above, "LTE": not above, "GTE": not below}[operator])

    return compare


def _typed(field: Field, text: str, zone: ZoneInfo) -> Any:
    try:
        if field.kind == "time":
            return parse_instant(text, zone)
        return Decimal(text) if field.kind == "number" else text
    except (ValueError, InvalidOperation) as error:
        raise BadQuery("Malformed WHERE clause.") from error


def _split(text: str, separator: str) -> list[str]:
    """Split at separators that no backslash protects; the escapes stay."""
    parts, current, escaped = [], "", False
    for character in text:
        if character == separator and not escaped:
            parts.append(current)
            current = ""
            continue
        escaped = character == "\\" and not escaped
        current += character
    return [*parts, current]


def _unescape(text: str) -> str:
    return text.replace("\\:", ":").replace("\\,", ",").replace("\\\\", "\\")


def _count(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isdecimal():
        raise BadQuery("Missing or invalid parameter.")
    return int(text)


def _limit(limit: int, over_limit: str) -> int:
    if limit > LARGEST_LIMIT and over_limit == "refuse":
        raise BadQuery("Missing or invalid parameter.")
    return min(limit, LARGEST_LIMIT)


def _sort_key(value: Any) -> tuple[bool, Any]:
    return (value is not None, value if value is not None else 0)
