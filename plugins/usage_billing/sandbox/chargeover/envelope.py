"""ChargeOver's envelope, its errors, and how paths name objects."""

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any
from urllib.parse import unquote

from starlette.responses import Response

from usage_billing.sandbox.books import Books
from usage_billing.sandbox.switches import SwitchBoard
from usage_billing.sandbox.wire import Call, json_reply
from usage_billing.sandbox.world import ChargeOverWorld

from .billing import ChargeOverBiller
from .query import Field, Query
from .views import Views

INVALID = "Missing or invalid parameter."
_NO_DATA = "A required parameter was missing: No data."
_NOT_FOUND = 404
_LONGEST_ID = 18
_VERBS = {"PUT": "modify", "DELETE": "delete", "GET": "get", "POST": "create"}
_OBJECTS = ("package", "customer", "item", "usage", "invoice")


class Refusal(ValueError):
    """A request that is answered with an error envelope; `generic` says that its text is in no document."""

    def __init__(self, message: str, code: int = 400, *, generic: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.generic = generic


@dataclass(frozen=True)
class ChargeOverAccount:
    """What every kind of object of one account works with."""

    world: ChargeOverWorld
    books: Books
    switches: SwitchBoard
    biller: ChargeOverBiller
    views: Views

    def query(self, call: Call, fields: dict[str, Field]) -> Query:
        """Read a call's `where`, `order` and page; `BadQuery` when it cannot be read."""
        return Query(call, fields, self.world.zone, self.switches["limit_above_max"])


def ok(response: object) -> Response:
    """Answer a get, a query, a count or an action."""
    return _envelope(200, "OK", "", response)


def created(number: int) -> Response:
    """Answer a create with the new object's id."""
    return _envelope(201, "OK", "", {"id": number})


def uploaded() -> Response:
    """Answer a bulk upload without naming anything that it made."""
    return _envelope(201, "OK", "", {"result": True})


def updated(number: int) -> Response:
    """Answer a change with the object's id."""
    return _envelope(202, "OK", "", {"id": number})


def error(code: int, message: str) -> Response:
    """Answer with an error; `response` is null where an object was not found, false elsewhere."""
    return _envelope(code, "Error", message, None if code == _NOT_FOUND else False)


def body_of(call: Call) -> Any:
    """Return the body as JSON; an empty one is refused with the recorded text."""
    content = call.json()
    if not content:
        raise Refusal(_NO_DATA)
    return content


def pick(rows: list[dict[str, Any]], kind: str, id_field: str, key: str) -> dict[str, Any]:
    """Return the row that the path names by id, `external_key:K` or `token:T`, or raise a 404 `Refusal`."""
    field, value = id_field, key
    for prefix in ("external_key", "token"):
        if key.startswith(f"{prefix}:"):
            field, value = prefix, key.removeprefix(f"{prefix}:")
    for row in rows:
        if str(row.get(field)) == value:
            return row
    raise Refusal(f"This {kind} does not exist.", _NOT_FOUND)


def as_id(text: str) -> int | None:
    """Return a numeric id, or None when the text is none."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _LONGEST_ID else None


def number_of(given: object) -> Decimal:
    """Return a number that was sent as number or text, exactly, or raise a `Refusal`."""
    if isinstance(given, bool):
        raise Refusal(INVALID)
    try:
        number = Decimal(str(given))
    except InvalidOperation as fault:
        raise Refusal(INVALID) from fault
    if not number.is_finite():
        raise Refusal(INVALID)
    return number


def unsupported(call: Call) -> str:
    """Return the message for what the API does not do; an unknown path is 400 here, not 404."""
    path = call.request["path"].removeprefix(call.request["root_path"])
    kind, number = (*map(unquote, path.split("/")[1:]), "", "")[:2]
    method = call.request.method
    verb = "list" if (method, number) == ("GET", "") else _VERBS.get(method, method.lower())
    if kind in _OBJECTS:
        return f"The command requested is not supported: {verb}({kind}, {number})"
    return f"The object type requested is not supported: {verb}({kind}, {number})"


def _envelope(code: int, status: str, message: str, response: object) -> Response:
    content = {"code": code, "status": status, "message": message, "details": {}, "response": response}
    return json_reply(content, code)
