"""What both Maxio destinations share: the component that is billed, and the subscription that each account names.

What is asked, and what the answers mean, follows Maxio's public API reference: "Subscription Components".
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from usage_billing.destinations.base import Destination
from usage_billing.destinations.maxio.client import PER_PAGE, Json, MaxioSite, instant
from usage_billing.errors import Misconfigured
from usage_billing.records import Target
from usage_billing.sources import BillingSource, DestinationSettings

_FEW = 20
_TRIAL = "trialing"
_CANCELED = "canceled"
ENDED = frozenset({"canceled", "expired", "failed_to_create", "on_hold", "suspended", "trial_ended", "awaiting_signup"})
"""States in which a subscription accrues no charges: what would be sent there is never billed, so it is quarantined."""


def _text(value: object) -> object:
    """YAML reads an id as a number; it is a name all the same."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


IdOrHandle = Annotated[str, BeforeValidator(_text), Field(pattern=r"^(\d+|handle:[a-z0-9][a-z0-9\-_:.]*)$")]


class MaxioDestinationSettings(DestinationSettings):
    """The keys that both Maxio destinations have.

    `bill_trials` says that the site bills what a trial used, at the first paid renewal. No document tells, and no call:
    so nothing is sent to a subscription in its trial unless a person knows.
    """

    free: ClassVar[frozenset[str]] = DestinationSettings.free | {"bill_trials"}

    bill_trials: bool = False


class MaxioDestination(Destination):
    """A component of one site, and the subscriptions that use it."""

    connection_type = "maxio"
    kind: str
    """Maxio's name for the kind of component that takes this usage."""
    reached_by_number: ClassVar[bool] = False
    """Whether requests name a subscription by its number, whatever accounts are."""

    client: MaxioSite
    settings: Any
    """The settings of the destination at hand: `MaxioMeteredSettings` or `MaxioEventsSettings`."""

    def __init__(self, source: BillingSource, client: MaxioSite) -> None:
        super().__init__(source, client)
        self.settings = source.destination

    def is_test_site(self) -> bool | None:
        found = self.client.read_site().get("test")
        return found if isinstance(found, bool) else None

    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Return the subscription of each account; one that has ended, or lacks the component, is `unknown`."""
        return self._found(accounts, self._unusable)

    def locate(self, accounts: Sequence[str]) -> list[Target]:
        """Return the subscription of each account, whatever its state and its product of today."""
        return self._found(accounts, lambda *_: "")

    def standing(self, subscription: str) -> Target:
        """Return the subscription with this number; where requests name references, by the one that it has today."""
        component, found = self._component, self._subscription(int(subscription))
        by_number = self._by_id() or self.reached_by_number
        account = subscription if by_number else str((found or {}).get("reference") or "")
        if found is not None and not account:
            return Target(account, unknown=f"subscription {subscription} has no reference, and nothing else reaches it")
        return self._target(account or subscription, found, component, self._unusable)

    def _subscription(self, number: int) -> Json | None:
        found = self.client.subscription(number)
        if found is None:
            self.client.read_site()  # At a wrong address everything is a 404.
        return found

    def _found(self, accounts: Sequence[str], why_not: Callable[[str, Json, Json], str]) -> list[Target]:
        # The component first: at a wrong address everything is a 404, and that makes no account unknown.
        component = self._component
        found = self._subscriptions(accounts)
        return [self._target(account, found[account], component, why_not) for account in accounts]

    def _target(
        self, account: str, subscription: Json | None, component: Json, why_not: Callable[[str, Json, Json], str]
    ) -> Target:
        if subscription is None:
            return Target(account, unknown=f"subscription {account!r} is unknown to {self.site}")
        if reason := why_not(account, subscription, component):
            ended = subscription["state"] == _CANCELED
            return Target(account, unknown=reason, ended_at=instant(subscription.get("canceled_at")) if ended else None)
        number = str(subscription["id"])
        return Target(
            account=account,
            subscription=number,
            component=str(component["id"]),
            price_point=self._price_point,
            address=self._address(account, number),
            open_from=instant(subscription.get("current_period_started_at")),
            open_until=instant(subscription.get("current_period_ends_at")),
        )

    def _unusable(self, account: str, subscription: Json, component: Json) -> str:
        """Return why usage of this subscription would not be billed, or an empty text."""
        if reason := self._unbilled(subscription["state"]):
            return f"subscription {account!r} {reason}"
        family = ((subscription.get("product") or {}).get("product_family") or {}).get("id")
        if family is not None and family != component.get("product_family_id", family):
            return f"subscription {account!r} belongs to a product family without component {self.settings.component}"
        return ""

    def _unbilled(self, state: str) -> str:
        """Return why the site bills, or may bill, no usage of a subscription in this state, or an empty text."""
        if state in ENDED:
            return f"is {state}: the site would not bill its usage"
        if state == _TRIAL and not self.settings.bill_trials:
            return "is in its trial: the site may drop its usage; if it bills it, say so with destination.bill_trials"
        return ""

    @abstractmethod
    def _address(self, account: str, number: str) -> Json:
        """Return what a request needs to reach the subscription `number`, which `account` named."""

    @abstractmethod
    def _by_id(self) -> bool:
        """Say whether accounts are subscription ids; otherwise they are references."""

    @abstractmethod
    def _own_faults(self, component: Json) -> Iterator[str]:
        """Yield what `check` finds wrong beyond the component itself."""

    @property
    def _price_point(self) -> str:
        """The numeric id of the price point that usage names, as text; empty where it names none."""
        return ""

    @cached_property
    def _component(self) -> Json:
        found = self._read_component()
        if found is None:
            raise Misconfigured(f"billing source {self.source.title!r}: {self._no_component()}")
        return found

    def _read_component(self) -> Json | None:
        kind, _, handle = self.settings.component.partition(":")
        if kind == "handle":
            return self.client.component_by_handle(handle)
        return next((row for row in self.client.components() if str(row["id"]) == self.settings.component), None)

    def _no_component(self) -> str:
        return f"destination.component: {self.site} has no component {self.settings.component!r}"

    def _faults(self) -> Iterator[str]:
        component = self._read_component()
        if component is None:
            yield self._no_component()
            return
        if component["kind"] != self.kind:
            found = f"destination.component: {self.settings.component!r} is of kind {component['kind']}"
            yield f"{found}; {self.name} needs {self.kind}"
        if component.get("archived") or component.get("archived_at"):
            yield f"destination.component: {self.settings.component!r} is archived: the site refuses its usage"
        yield from self._own_faults(component)

    def _subscriptions(self, accounts: Sequence[str]) -> dict[str, Json | None]:
        """Return the subscription of each account, None where the site definitely has none.

        Many accounts are first looked for in the list, as long as that takes fewer requests than asking one by one. The
        list can miss one that was made meanwhile, so only the single look-up says that there is none.
        """
        found: dict[str, Json | None] = {}
        wanted = set(accounts)
        if len(wanted) > _FEW:
            found.update(self._listed(wanted))
        return found | {account: self._single(account) for account in sorted(wanted - found.keys())}

    def _listed(self, wanted: set[str]) -> dict[str, Json]:
        found: dict[str, Json] = {}
        twice: set[str] = set()
        for row in islice(self.client.subscriptions(), PER_PAGE * (len(wanted) // 4)):
            account = str(row["id"]) if self._by_id() else str(row.get("reference") or "")
            if account not in wanted:
                continue
            if account in found:
                twice.add(account)
            found[account] = row
            if len(found) == len(wanted) and self._by_id():
                break
        return {account: row for account, row in found.items() if account not in twice}

    def _single(self, account: str) -> Json | None:
        if self._by_id():
            return self.client.subscription(int(account)) if account.isascii() and account.isdigit() else None
        return self.client.subscription_by_reference(account) if account else None
