"""Request bodies of Maxio's usage calls, for whoever makes one by hand: JSON texts with every digit of a quantity.

Fields follow Maxio's public API reference: "Create Usage", "Activate Event-Based Component", "Record Event" and
"Duplicate Prevention".
"""

from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from usage_billing.destinations.base import LARGEST_BULK
from usage_billing.destinations.exact import check, exact_text, quantity_faults

_LONGEST_EVENT_TOKEN = 64
_RESERVED = "chargify"


def usage_body(
    quantity: Decimal | int,
    *,
    memo: str = "",
    price_point_id: int | None = None,
    custom_price: Mapping[str, Any] | None = None,
    initial_billing_at: date | None = None,
    uniqueness_token: str = "",
) -> str:
    """Return the body of a usage of `quantity` units, below 0 to deduct.

    Without `price_point_id` or a `custom_price` (prices of this subscription alone, in the API's own fields) the
    component's default applies. `initial_billing_at` begins the component's own billing cycle on sites with several; it
    is no time of the usage, for which the site has no field. `uniqueness_token` has a second body refused for an hour.

    Raises:
        Misconfigured: a quantity or price that is no exact number, or two prices; tells all at once.
    """
    terms = _terms(price_point_id, custom_price, initial_billing_at)
    check("Maxio usage", terms, [*_price_faults(price_point_id, custom_price), *quantity_faults("quantity", quantity)])
    usage = {"quantity": quantity, **({"memo": memo} if memo else {}), **terms}
    return exact_text({"usage": usage, **({"uniqueness_token": uniqueness_token} if uniqueness_token else {})})


def activation_body(
    *,
    price_point_id: int | None = None,
    custom_price: Mapping[str, Any] | None = None,
    initial_billing_at: date | None = None,
) -> str:
    """Return the body that activates a component at a price, as `usage_body` has it; raises what that raises."""
    terms = _terms(price_point_id, custom_price, initial_billing_at)
    check("Maxio activation", terms, _price_faults(price_point_id, custom_price))
    return exact_text(terms)


def event_body(
    properties: Mapping[str, Any],
    *,
    time: datetime | None = None,
    subscription_id: int | None = None,
    subscription_reference: str = "",
    uniqueness_token: str = "",
) -> str:
    """Return an event of a stream with `properties` of its own, by which its metrics count and its segments price.

    `time` decides the billing period; without it the site takes the time at which the event arrives. The stream says
    which of `subscription_id`, `subscription_reference` or the properties names the subscription. The stream ignores an
    event whose `uniqueness_token` (64 characters at most) it has taken within 31 days.

    Raises:
        Misconfigured: a number that is not exact, a time without a zone, a token that is too long, a property that is
            the site's own; tells all at once.
    """
    faults = []
    if _RESERVED in properties:
        faults.append(f"{_RESERVED}: is the site's own object; what it holds are arguments here")
    if time is not None and time.tzinfo is None:
        faults.append(f"time: {time.isoformat()} has no zone, so its billing period would be a guess")
    if len(uniqueness_token) > _LONGEST_EVENT_TOKEN:
        faults.append(f"uniqueness_token: has {len(uniqueness_token)} characters, over {_LONGEST_EVENT_TOKEN}")
    own = {
        "timestamp": None if time is None else time.isoformat(),
        "subscription_id": subscription_id,
        "subscription_reference": subscription_reference or None,
        "uniqueness_token": uniqueness_token or None,
    }
    known = {name: value for name, value in own.items() if value is not None}
    check("Maxio event", properties, faults)
    return exact_text({_RESERVED: known, **properties})


def event_bulks(events: Iterable[str], most: int = 1_000, most_bytes: int = LARGEST_BULK) -> Iterator[list[str]]:
    """Yield events, as `event_body` gives them, in bulks that a request takes: of so many, and of so many bytes.

    An event that is larger than that goes alone, for the site to say what it makes of it. Give every event a token: a
    bulk of which the reply was lost can then be sent again.
    """
    bulk: list[str] = []
    size = 2
    for event in events:
        # With its comma, or the brackets around all.
        length = len(event.encode()) + 1
        if bulk and (len(bulk) == most or size + length > most_bytes):
            yield bulk
            bulk, size = [], 2
        bulk.append(event)
        size += length
    if bulk:
        yield bulk


def _terms(
    price_point_id: int | None, custom_price: Mapping[str, Any] | None, initial_billing_at: date | None
) -> dict[str, Any]:
    terms: dict[str, Any] = {}
    if price_point_id is not None:
        terms["price_point_id"] = int(price_point_id)
    if custom_price is not None:
        terms["custom_price"] = custom_price
    if initial_billing_at is not None:
        terms["billing_schedule"] = {"initial_billing_at": f"{initial_billing_at:%Y-%m-%d}"}
    return terms


def _price_faults(price_point_id: int | None, custom_price: Mapping[str, Any] | None) -> list[str]:
    both = price_point_id is not None and custom_price is not None
    return ["custom_price: stands in place of price_point_id; give one of them"] if both else []
