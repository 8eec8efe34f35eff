"""What the stories of moved accounts are told with: sites that answer otherwise than before, and people who choose."""

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import requests

from late import Held, used
from stories import SITES, Event
from usage_billing.destinations.chargeover import ChargeOverUsage
from usage_billing.destinations.maxio import MaxioSite
from usage_billing.records import Choice, Period, Target
from usage_billing.sources import BillingSource

WHOSE = {"api_calls": "acct-{:04d}", "platform_events": "orbit-{:02d}", "voip_minutes": "tel-{:03d}"}
KEYS = {
    "acme": ("sandbox-acme-key", "x"),
    "orbit": ("sandbox-orbit-key", "x"),
    "telco": ("sandboxtelcopublickey00000000000", "sandboxtelcoprivatekey0000000000"),
}


class MovingHouse(Held):
    """A house in which accounts lead where `led` says, as a mapping beside the site would; else to their own number."""

    allow_negative = True
    fails_at = ""
    """The subscription at which nothing is sent: the worker dies right before the request."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.led: dict[str, str] = {}

    def destination(self, source: BillingSource) -> Any:
        """Return the destination, behind the mapping."""
        found = super().destination(source)
        if isinstance(found, ChargeOverUsage):
            mapped: Any = _Mapped(source, found.client)
            mapped.house = self
            return mapped
        if source.name == "api_calls":
            found.client = _MappedSite(found.client.settings, self)
        return found

    def lead(self, source: BillingSource, account: int, to: int) -> None:
        """Let an account lead to the subscription of another one's name."""
        self.led[named(source, account)] = named(source, to).replace("tel", "pkg")

    def rename(self, *references: tuple[int, str]) -> None:
        """Give subscriptions of the events site another reference, in this order."""
        for number, reference in references:
            url = f"{self.sandbox.maxio_url('orbit')}/subscriptions/{50200000 + number}.json"
            body = {"subscription": {"reference": reference}}
            assert requests.put(url, json=body, auth=KEYS["orbit"], timeout=5).status_code == 200

    def choose(self, source: BillingSource, account: int, choice: Choice) -> bool:
        """Decide about an account."""
        return self.ledger.decide_move(source.name, named(source, account), choice, "vera", "the contract says so")

    def sums(self, source: BillingSource) -> dict[int, Decimal]:
        """Return what the site billed by the number in the subscription's first name, without zeros."""
        first = {"api_calls": 50100000, "platform_events": 50200000, "voip_minutes": 712}[source.name]
        component = getattr(source.destination, "component", None) or source.destination.item
        return {
            int(row.subscription) - first: row.billed
            for row in self.sandbox.billed(SITES[source.name])
            if row.billed and row.component == component.removeprefix("handle:")
        }

    def waits(self, source: BillingSource, day: Period) -> dict[str, tuple[str, str]]:
        """Return state and quantity of what is listed for a day, by subscription."""
        left = self.open_items(source, day)
        return {
            row["subscription"]: (row["state"], str(Decimal(row["quantity"]).normalize() + 0))
            for row in left.to_dict("records")
        }

    def changes(self, source: BillingSource) -> list[tuple[int, Decimal]]:
        """Return what the metered site was told, in the order of its books: whose, and how much."""
        records = self.sandbox.records(SITES[source.name])
        return [(int(row["subscription"]) - 50100000, Decimal(row["quantity"])) for row in records]


class _MappedSite(MaxioSite):
    def __init__(self, settings: Any, house: MovingHouse) -> None:
        super().__init__(settings)
        self._house = house

    def subscription_by_reference(self, reference: str) -> dict[str, Any] | None:
        """Look up what the account leads to."""
        return super().subscription_by_reference(self._house.led.get(reference, reference))

    def create_usage(self, subscription_id: int, component: int | str, body: str) -> dict[str, Any]:
        """Die before the request to one subscription, if the story says so."""
        if self._house.fails_at and str(subscription_id) == self._house.fails_at:
            raise WorkerDied
        return super().create_usage(subscription_id, component, body)


class WorkerDied(BaseException):
    """The process ends here."""


class _Mapped(ChargeOverUsage):
    house: MovingHouse

    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Resolve what the accounts lead to."""
        return self._called(accounts, super().resolve(self._moved_names(accounts)))

    def locate(self, accounts: Sequence[str]) -> list[Target]:
        """Locate what the accounts lead to."""
        return self._called(accounts, super().locate(self._moved_names(accounts)))

    def _moved_names(self, accounts: Sequence[str]) -> list[str]:
        led = self.house.led
        return [led.get(account, account.replace("tel", "pkg")) for account in accounts]

    @staticmethod
    def _called(accounts: Sequence[str], found: Sequence[Target]) -> list[Target]:
        return [replace(target, account=account) for target, account in zip(found, accounts, strict=True)]


def named(source: BillingSource, number: int) -> str:
    """Return the account, and first name of the subscription, with a number."""
    return WHOSE[source.name].format(number)


def usage(source: BillingSource, day: Period, quantities: dict[int, int | str]) -> list[Event]:
    """Make one event of a day for each of some accounts."""
    return [
        event
        for number, quantity in quantities.items()
        for event in used(source, day, str(quantity), named(source, number))
    ]
