"""What the stories of late usage are told with: a renewal, people who decide, and sources with other policies."""

from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pandas as pd

from stories import Event, House, shipped
from usage_billing.records import Period, State
from usage_billing.sources import BillingSource

ACCOUNTS = {"api_calls": "acct-0001", "platform_events": "orbit-01", "voip_minutes": "pkg-001"}
AFTER_THE_RENEWAL = "2026-11-02T12:00:00Z"


class Held(House):
    """A house in which people decide about what is held."""

    allow_negative = False

    def destination(self, source: BillingSource) -> Any:
        """Return the destination; the account may say that it takes negative usage."""
        found: Any = super().destination(source)
        if self.allow_negative and source.name == "voip_minutes":
            found.client.settings = replace(found.client.settings, negative_usage="allowed")
        return found

    def open_items(self, source: BillingSource, day: Period) -> pd.DataFrame:
        """Return what is listed by name for a day."""
        return self.ledger.open_items(source.name, Period.around(source.periods(day)))

    def listed(self, source: BillingSource, day: Period) -> list[tuple[str, str]]:
        """Return state and quantity of what is listed by name for a day."""
        left = self.open_items(source, day)
        return list(zip(left["state"], left["quantity"], strict=True))

    def release(self, source: BillingSource, day: Period) -> None:
        """Let go whatever is held for a day."""
        held = self.open_items(source, day)
        tokens = held["token"][held["state"] == State.HELD].tolist()
        self.ledger.decide(tokens, State.HELD, "decided on a day by somebody: the customer agreed")


def used(source: BillingSource, day: Period, quantity: str, account: str = "") -> list[Event]:
    """Make one event of a day."""
    dimensions = ("eu", "premium")[: len(source.settings.dimensions)]
    whose = account or ACCOUNTS[source.name]
    return [Event(f"{whose}-{day.start:%m%d}", whose, quantity, day.start + timedelta(hours=9), dimensions)]


def lenient(name: str, **changes: Any) -> BillingSource:
    """Return a shipped source with leave to withdraw everything, and other keys of its destination."""
    source = shipped(name)
    destination = type(source.destination).model_validate(source.destination.model_dump() | changes)
    settings = source.settings.model_copy(update={"max_withdraw_share": 1.0})
    return replace(source, settings=settings, destination=destination)


def billed(house: House, source: BillingSource) -> Decimal:
    """Return what the site billed the account."""
    return house.billed(source).get(ACCOUNTS[source.name], Decimal(0))


def november(source: BillingSource) -> Period:
    """Return the first of November in the source's billing zone."""
    zone = source.settings.timezone
    return Period(datetime(2026, 11, 1, tzinfo=zone), datetime(2026, 11, 2, tzinfo=zone))
