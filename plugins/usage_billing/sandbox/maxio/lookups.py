"""What the paths and parameters of Maxio's main API name, and the two ways in which it says no."""

from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from starlette.responses import Response

from usage_billing.sandbox.billing import Account, find_account, find_by_reference
from usage_billing.sandbox.books import Books
from usage_billing.sandbox.switches import SwitchBoard
from usage_billing.sandbox.wire import Call, json_reply
from usage_billing.sandbox.world import Component, MaxioWorld, PricePoint

from .billing import MaxioBiller
from .views import Views

_LONGEST_ID = 18


class NotFound(LookupError):
    """What the path names does not exist: 404, whatever the body says."""


class Unprocessable(ValueError):
    """A request that the site understands and refuses: 422 with these messages."""

    def __init__(self, *messages: str) -> None:
        super().__init__("; ".join(messages))
        self.messages = list(messages)


@dataclass(frozen=True)
class MaxioSite:
    """What every resource of one site works with, and how it finds what a path names."""

    world: MaxioWorld
    books: Books
    switches: SwitchBoard
    biller: MaxioBiller
    views: Views

    @cached_property
    def known(self) -> frozenset[int]:
        """Return the ids of the subscriptions that the world still has."""
        return frozenset(subscription.id for subscription in self.world.subscriptions)

    def account(self, given: str, *, by_reference: bool = False) -> Account:
        """Return the subscription or raise `NotFound`; digits that are both an id and a reference mean the id."""
        account = find_account(self.books, self.world.site, int(given)) if is_id(given) else None
        if account is None and by_reference:
            account = find_by_reference(self.books, self.world.site, given)
        if account is None or account.id not in self.known:
            raise NotFound
        return account

    def component(self, given: str) -> Component:
        """Return the component with the id or `handle:...`, or raise `NotFound`."""
        for part in self.world.components:
            if given in (str(part.id), f"handle:{part.handle}"):
                return part
        raise NotFound

    def component_of(self, account: Account, given: str) -> Component:
        """Return a component of the subscription's family, or raise `NotFound`."""
        part = self.component(given)
        if part.family != self.views.family(account.id).handle:
            raise NotFound
        return part

    def of_family(self, given: str) -> list[Component]:
        """Return the components of the family with the id or `handle:...`, or raise `NotFound`."""
        for family in self.world.product_families:
            if given in (str(family.id), f"handle:{family.handle}"):
                return [part for part in self.world.components if part.family == family.handle]
        raise NotFound

    def lines_of(self, account: Account) -> list[Component]:
        """Return the components of the subscription's family."""
        family = self.views.family(account.id).handle
        return [part for part in self.world.components if part.family == family]

    def locked_point(self, subscription: int, component: int) -> int | None:
        """Return the price point that usage or activation has locked in for the line."""
        for table in ("balance", "activation"):
            row = self.books.row(
                f"SELECT price_point FROM {table} WHERE site = ? AND subscription = ? AND component = ?",
                *(self.world.site, subscription, component),
            )
            if row is not None:
                return int(row["price_point"])
        return None


def named_price_point(given: object, part: Component) -> PricePoint:
    """Return the component's price point with the id, sent as number or text, or raise `Unprocessable`."""
    for point in part.price_points:
        if str(point.id) == str(given) and not point.archived:
            return point
    raise Unprocessable("Price point: could not be found.")


def body_object(call: Call) -> dict[str, Any]:
    """Return the body as an object, or raise `Unprocessable`."""
    body = call.json()
    if not isinstance(body, dict):
        raise Unprocessable("The request body must be an object.")
    return body


def errors(status: int, *messages: str) -> Response:
    """Return the usual error shape, a list of messages."""
    return json_reply({"errors": list(messages)}, status)


def paging(call: Call) -> tuple[int, int]:
    """Return limit and offset: 20 rows a page, silently 200 at most; `Unprocessable` for a page below 1."""
    page, size = call.param("page") or "1", call.param("per_page") or "20"
    if not is_id(page) or int(page) < 1:
        raise Unprocessable(f"invalid page: {page}")
    if not is_id(size) or int(size) < 1:
        raise Unprocessable(f"invalid per_page: {size}")
    limit = min(int(size), 200)
    return limit, (int(page) - 1) * limit


def whole_param(call: Call, name: str) -> int | None:
    """Return a parameter that is a number, or None when it is absent."""
    text = call.param(name)
    if text is None:
        return None
    if not is_id(text):
        raise Unprocessable(f"{name}: is not a number")
    return int(text)


def day_param(call: Call, name: str) -> date | None:
    """Return a parameter that is a date, or None when it is absent."""
    text = call.param(name)
    if text is None:
        return None
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise Unprocessable(f"{name}: is invalid") from error


def is_id(text: str) -> bool:
    """Say whether a path segment is a numeric id."""
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_ID
