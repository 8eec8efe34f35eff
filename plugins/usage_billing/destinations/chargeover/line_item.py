"""The line item that takes an account's usage, and the open billing cycle of its package.

What is asked, and what the answers mean, follows ChargeOver's public REST documentation: "Querying for Subscriptions",
"External Keys".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import islice

import pandas as pd

from usage_billing.destinations.chargeover.client import FEW, LIMIT, ChargeOverSite, Json
from usage_billing.destinations.settings import whole_number
from usage_billing.errors import NotApplied
from usage_billing.periods import local_midnight
from usage_billing.records import Target

_STATES = {"c": "cancelled", "e": "expired", "s": "suspended"}
"""Package states that are not billed: usage sent there would be lost, so it is quarantined."""
_DAYS = {"dly": 1, "1wk": 7, "2wk": 14, "4wk": 28, "30d": 30, "8wk": 56, "12w": 84}
_MONTHS = {"mon": 1, "2mn": 2, "qtr": 3, "six": 6, "yrl": 12, "2yr": 24, "3yr": 36, "4yr": 48, "5yr": 60, "10y": 120}
_CYCLES = {name: pd.DateOffset(days=days) for name, days in _DAYS.items()}
_CYCLES |= {name: pd.DateOffset(months=months) for name, months in _MONTHS.items()}
"""How long a billing cycle is, by the API's word for it (``paycycle``)."""
_HOLDERS = {"external_key": "package", "customer_external_key": "customer"}
"""Whose key an account is, by the source's `package_by`; with it an identity names its subscription."""
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class _Held:
    """The packages of a customer, or a package by its key or its id; None where there is definitely no such holder."""

    holder: str
    name: str
    packages: list[Json] | None
    of_what: str = ""

    @property
    def words(self) -> str:
        """What to call it to a person."""
        named = f"package {self.name}" if self.holder == "package_id" else f"{self.holder} {self.name!r}"
        return self.of_what + named


@dataclass(frozen=True)
class LineItems:
    """The line item of one product that each warehouse account leads to, looked up afresh each time.

    `package_by` and `item` are the keys of the source: what an account names, and the product's external key. An
    identity names the customer or package, which an upgrade leaves as they are, and never the line.
    """

    client: ChargeOverSite
    package_by: str
    item: str

    @property
    def site(self) -> str:
        """The canonical name of the billing site, as in `Destination.site`."""
        return self.client.settings.site

    def faults(self) -> Iterator[str]:
        """Yield why the site would bill no usage of the product."""
        item = self.client.item_by_external_key(self.item)
        if item is None:
            yield f"destination.item: {self.site} has no item with external key {self.item!r}"
        elif not self._is_metered(item):
            mend = "say in ChargeOver that you upload metered data for it"
            yield f"destination.item: {self.item!r} is not metered; {mend}"

    def _is_metered(self, item: Json) -> bool:
        details = item.get("service_data") or {}
        if not isinstance(details, dict):
            raise NotApplied(f"{self.site}: read item {self.item!r}: its service_data is no object")
        return self._flag(details, "is_usage")

    def _flag(self, row: Json, name: str) -> bool:
        """Return a flag that comes as a boolean, a number or text; true where the site leaves it out."""
        text = str(row.get(name, True)).lower()
        if text not in _FLAGS:
            raise NotApplied(f"{self.site}: {name} is neither true nor false")
        return _FLAGS[text]

    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Return today's line item of each account; one that is not one billed line of the item is `unknown`."""
        return self._led(accounts)

    def locate(self, accounts: Sequence[str]) -> list[Target]:
        """Return the line item of each account, its last one where nothing of it is billed any more."""
        return self._led(accounts, ended=True)

    def standing(self, subscriptions: Sequence[str]) -> dict[str, Target]:
        """Return today's line item of each subscription, as identities name them, whichever account leads to it."""
        named = {subscription: subscription.partition(":")[::2] for subscription in sorted(set(subscriptions))}
        found = {}
        for holder in sorted({holder for holder, _ in named.values()}):
            of_it = {subscription: name for subscription, (whose, name) in named.items() if whose == holder}
            packages = self._packages(holder, list(of_it.values()))
            for subscription, name in of_it.items():
                found[subscription] = self._target(subscription, _Held(holder, name, packages[name]))
        return found

    def _led(self, accounts: Sequence[str], *, ended: bool = False) -> list[Target]:
        if self.package_by == "line_item_id":
            return self._led_by_line(accounts, ended=ended)
        holder = _HOLDERS[self.package_by]
        packages = self._packages(holder, accounts)
        return [self._target(name, _Held(holder, name, packages[name]), ended=ended) for name in accounts]

    def _led_by_line(self, accounts: Sequence[str], *, ended: bool) -> list[Target]:
        """Return what `resolve` or `locate` does, of accounts that are ids of line items.

        The package is the identity: an upgrade gives the line another id, and leaves the package.
        """
        numbers = [whole_number(account, 1) for account in accounts]
        lines = self._lines_by_id({number for number in numbers if number is not None})
        return [
            Target(account, unknown=f"{account!r} is no id of a line item, which is a whole number")
            if number is None
            else self._on_line(account, number, *lines.get(number, (None, None)), ended=ended)
            for account, number in zip(accounts, numbers, strict=True)
        ]

    def _on_line(self, account: str, number: int, package: Json | None, line: Json | None, *, ended: bool) -> Target:
        words = f"line item {number}"
        if package is None or line is None:
            mend = "an upgrade gives a line another id: lead the account to today's"
            return Target(account, unknown=f"{words} is on no package of {self.site}; {mend}")
        if not self._is_ours(line):
            other = self.client.key_of("package", line, "item_external_key")
            return Target(account, unknown=f"{words} is of item {other!r}, not of {self.item!r}")
        if line.get("cancel_datetime") and not ended:
            unknown = f"{words} is cancelled: its usage would not be billed"
            return Target(account, unknown=unknown, ended_at=self._moment(line["cancel_datetime"]))
        held = _Held("package_id", str(package["package_id"]), [package], f"{words}: ")
        return self._target(account, held, ended=ended)

    def _lines_by_id(self, wanted: set[int]) -> dict[int, tuple[Json, Json]]:
        """Return package and line of each id; no query asks for a line by its id, so the packages are walked through.

        An id that is not among these is definitely on no package.
        """
        found: dict[int, tuple[Json, Json]] = {}
        for package in self.client.packages() if wanted else ():
            for line in self._lines(package):
                if (number := self._number(package, line)) not in wanted:
                    continue
                if number in found:
                    raise NotApplied(f"{self.site}: query package: line item {number} is told twice")
                found[number] = package, line
            if len(found) == len(wanted):
                break
        return found

    def _number(self, package: Json, line: Json) -> int:
        if (number := whole_number(line.get("line_item_id"), 1)) is None:
            words = f"a line of package {package['package_id']} has no line_item_id"
            raise NotApplied(f"{self.site}: query package: {words}")
        return number

    def _packages(self, holder: str, names: Sequence[str]) -> Mapping[str, list[Json] | None]:
        """Return the packages that each name of a holder stands for, None where there is definitely no such holder."""
        if holder == "package":
            return self._looked_up(names, lambda one: self.client.key_of("package", one), self._packages_of)
        if holder == "package_id":
            return self._looked_up(names, lambda one: str(one["package_id"]), self._package_numbered)
        if holder == "customer":
            return {name: self._packages_of_customer(name) for name in sorted(set(names))}
        return dict.fromkeys(names)

    def _looked_up(
        self, names: Sequence[str], name_of: Callable[[Json], str], ask: Callable[[str], list[Json] | None]
    ) -> dict[str, list[Json] | None]:
        """Return the packages of each name, None where there is definitely none.

        Many names are first looked for in the list, as long as that takes fewer requests than asking one by one.
        """
        wanted = set(names)
        found: dict[str, list[Json] | None] = {}
        if len(wanted) > FEW:
            for package in islice(self.client.packages(), LIMIT * (len(wanted) // 4)):
                if (name := name_of(package)) in wanted:
                    found.setdefault(name, []).append(package)  # type: ignore[union-attr]
        return found | {name: ask(name) for name in sorted(wanted - found.keys())}

    def _packages_of(self, key: str) -> list[Json] | None:
        return (self.client.packages_by_external_key(key) or None) if key else None

    def _package_numbered(self, name: str) -> list[Json] | None:
        number = whole_number(name, 1)
        package = None if number is None else self.client.package(number)
        if number is not None and package is None:
            self.client.read_account()  # At a wrong address everything is a 404.
        return None if package is None else [package]

    def _packages_of_customer(self, key: str) -> list[Json] | None:
        customer = self.client.customer_by_external_key(key) if key else None
        return None if customer is None else self.client.packages_of_customer(customer)

    def _target(self, account: str, held: _Held, *, ended: bool = False) -> Target:
        packages, words = held.packages, held.words
        if packages is None:
            return Target(account, unknown=f"{words} is unknown to {self.site}")
        billed = [package for package in packages if self._state(package) not in _STATES]
        if not billed and not ended:
            states = {_STATES[self._state(package)] for package in packages}
            said = "has no active package" if held.holder == "customer" else f"is {', '.join(sorted(states))}"
            unknown = f"{words} {said}: its usage would not be billed"
            return Target(account, unknown=unknown, ended_at=self._ended_at(packages))
        lines = [line for line in self._ours(billed) if not line.get("cancel_datetime")]
        if ended and not lines:
            billed, lines = packages, self._ours(packages)[-1:]
        if len(lines) != 1:
            count = "no line" if not lines else f"{len(lines)} lines"
            why = ", so it is ambiguous which one to bill" if lines else ""
            return Target(account, unknown=f"{words} has {count} of item {self.item!r}{why}")
        if not self._flag(lines[0], "item_is_usage"):
            return Target(account, unknown=f"{words}: its line of item {self.item!r} is not metered")
        package = next(package for package in billed if lines[0] in self._lines(package))
        return Target(
            account=account,
            subscription=f"{held.holder}:{held.name}",
            component=f"item:{self.item}",
            address={"line_item_id": self._number(package, lines[0])},
            open_from=self._open_from(package),
            open_until=self._next_invoice(package),
        )

    def _ours(self, packages: Sequence[Json]) -> list[Json]:
        return [line for package in packages for line in self._lines(package) if self._is_ours(line)]

    def _state(self, package: Json) -> str:
        if not isinstance(state := package.get("package_status_state"), str):
            raise NotApplied(f"{self.site}: query package: package {package['package_id']} has no readable state")
        return state

    def _ended_at(self, packages: Sequence[Json]) -> datetime | None:
        """Return when the last of some packages was cancelled, None unless all of them were, at times that are told."""
        moments = [self._moment(package.get("cancel_datetime")) for package in packages]
        told = [moment for moment in moments if moment is not None]
        return max(told) if told and len(told) == len(packages) else None

    def _moment(self, text: object) -> datetime | None:
        """Return a moment that the site tells, in the account's zone; None if it tells none that can be read."""
        zone = self.client.settings.zone
        try:
            moment = datetime.fromisoformat(str(text))
            return moment.astimezone(zone) if moment.tzinfo else moment.replace(tzinfo=zone)
        except (ValueError, OverflowError):
            return None

    def _lines(self, package: Json) -> list[Json]:
        """Return the lines of a package; what is no list of objects says nothing, least of all that it has none."""
        lines = package.get("line_items")
        if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
            raise NotApplied(f"{self.site}: query package: package {package['package_id']} has no list of line items")
        return lines

    def _open_from(self, package: Json) -> datetime | None:
        """Return when the package's open billing cycle began: one cycle before its next invoice, where that is known.

        The API names the next invoice's day and the cycle, and says of neither end which usage it takes in.
        """
        day, cycle = self._invoice_day(package), str(package.get("paycycle") or "")
        if day is None:
            return None
        if cycle == "116":  # The 1st and the 16th of each month.
            start = day.replace(day=1) if day.day > 1 else (day - timedelta(days=1)).replace(day=16)
        elif cycle in _CYCLES:
            start = (pd.Timestamp(day) - _CYCLES[cycle]).date()
            if cycle in _MONTHS and (day + timedelta(days=1)).day == 1:
                # The last of a month may stand for a 31st that it lacks: the later start holds rather than loses.
                start = (pd.Timestamp(start) + pd.offsets.MonthEnd(0)).date()
        else:
            return None
        return local_midnight(start, self.client.settings.zone)

    def _next_invoice(self, package: Json) -> datetime | None:
        """Return when the day of the package's next invoice begins, where it has one."""
        day = self._invoice_day(package)
        return None if day is None else local_midnight(day, self.client.settings.zone)

    def _invoice_day(self, package: Json) -> date | None:
        """Return the day of the package's next invoice, in the account's zone; a text without an offset is in it."""
        text = package.get("next_invoice_datetime")
        if text is None or text == "":  # So it is on a cancelled package.
            return None
        if (moment := self._moment(text)) is None:
            words = f"package {package['package_id']} has no readable next_invoice_datetime"
            raise NotApplied(f"{self.site}: query package: {words}")
        return moment.date()

    def _is_ours(self, line: Json) -> bool:
        cancelled = line.get("cancel_datetime")
        if cancelled is not None and not isinstance(cancelled, str):
            raise NotApplied(f"{self.site}: query package: a line has a cancel_datetime that is no time")
        return self.client.key_of("package", line, "item_external_key") == self.item
