"""Usage as a Maxio metered component: one request for each delivery, and a proof of what a deduction took.

Limits and the meaning of replies follow Maxio's public API reference: "Subscription Components" (usages) and "Duplicate
Prevention".
"""

import json
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta
from decimal import ROUND_DOWN, Decimal
from functools import cache, cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import AfterValidator

from usage_billing.destinations.base import Answer, by_value, closed, joined, let_go, negative
from usage_billing.destinations.exact import exact_number
from usage_billing.destinations.maxio.client import MET_WITHIN_THE_HOUR, Json, instant, unwrapped
from usage_billing.destinations.maxio.component import IdOrHandle, MaxioDestination, MaxioDestinationSettings
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError
from usage_billing.records import PASSES, Delivery, Receipt, SiteRecord, Target

_MEMO_LENGTH = 255
_TOKEN = re.compile(r"[0-9a-f]{64}")
_TOKEN_LENGTH = 64
_TOKEN_HONOURED = timedelta(minutes=61)
_DAY = timedelta(days=1)
_OPENED = "current_period_started_at"
_NO_BALANCE = "a deduction waits: the open billing period's balance does not take it, and never falls below 0"


def _memo(template: str) -> str:
    fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    if unknown := fields - {"period"}:
        raise ValueError(f"unknown field {{{min(unknown)}}}; only {{period}} is filled in")
    return template


class MaxioMeteredSettings(MaxioDestinationSettings):
    """The keys of a source that is billed to a metered component.

    `subscription_by` says what the account column holds; `component` and `price_point` are an id or
    ``handle:<handle>``; `memo` is what the site shows for a usage, after the token. `late_usage` says what becomes of
    usage whose billing period is closed: it has no date and lands in the open one, so it is billed there, with a memo
    that names its usage period, or held, or refused.
    """

    free: ClassVar[frozenset[str]] = MaxioDestinationSettings.free | {"memo", "subscription_by"}

    name: Literal["maxio_metered"]
    subscription_by: Literal["id", "reference"]
    component: IdOrHandle
    price_point: IdOrHandle | None = None
    memo: Annotated[str, AfterValidator(_memo)] = "{period}"
    late_usage: Literal["bill_now", "hold", "refuse"] = "bill_now"


class MaxioMetered(MaxioDestination):
    """Usage of a metered component: one request per delivery, the token in front of the memo.

    The site knows no timestamp, no edit and no delete, and its balance never falls below 0.
    """

    name = "maxio_metered"
    why_late = "its billing period is closed: it has no date, and would land on the invoice of the open one"
    settings_model = MaxioMeteredSettings
    kind = "metered_component"
    reached_by_number = True
    chunk_size = 1
    # The 60-minute token is a belt only: whether usages honour it is not documented, and its 409 tells no outcome.
    replay_window = timedelta(0)

    def _found(self, accounts: Sequence[str], why_not: Callable[[str, Json, Json], str]) -> list[Target]:
        # A usage has no date: it lands in whatever period is open, so the end of one closes nothing, unless the source
        # wants it to.
        return [self._dated(target) for target in super()._found(accounts, why_not)]

    def standing(self, subscription: str) -> Target:
        """Return the subscription with this number, which is all that a usage needs of it."""
        return self._dated(super().standing(subscription))

    def _dated(self, target: Target) -> Target:
        return replace(target, open_until=None) if self._bills_late else target

    @property
    def _bills_late(self) -> bool:
        return self.late_usage == "bill_now"

    def hold_reason(self, proposals: pd.DataFrame) -> pd.Series:
        """Hold what is late, if the source says so; how much of a deduction the balance takes is for `judge` to ask."""
        texts = self._why_late(proposals, closed(proposals))
        return pd.Series(texts, index=proposals.index, dtype=object)

    def judge(self, proposals: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        """Let a deduction go only as far as the balance takes it: the site keeps 0 and forgets the rest.

        What the same plan adds to a subscription is sent first, so it counts as balance already. What a person let go
        although it is late goes whole or not at all: what is left of it would be late once more.
        """
        goes = proposals["quantity"].to_numpy(dtype=object, copy=True)
        why = self.hold_reason(proposals).to_numpy(copy=True)
        whole = let_go(proposals) & (not self._bills_late)
        subscriptions, components = proposals["subscription"].to_numpy(), proposals["component"].to_numpy()
        minus = negative(proposals["quantity"])
        room: dict[tuple[str, str], Decimal] = {}
        unfit: dict[tuple[str, str], str] = {}
        for place in np.flatnonzero(minus & (why == "")):
            key = (subscriptions[place], components[place])
            if key not in room:
                added = goes[~minus & (why == "") & (subscriptions == key[0]) & (components == key[1])]
                room[key] = self._balance(*map(int, key)) + sum(map(Decimal, added), Decimal(0))
                unfit[key] = self._unfit_for_deductions(self._subscription(int(key[0])))
            part = self._measured(min(-Decimal(goes[place]), room[key]))
            takes = part == -Decimal(goes[place]) if whole[place] else part > 0
            why[place] = unfit[key] or ("" if takes else _NO_BALANCE)
            if not why[place]:
                room[key] -= part
                goes[place] = f"{-part:f}"
        return pd.Series(goes, proposals.index, object), pd.Series(why, proposals.index, object)

    def _untold(self, proposals: pd.DataFrame) -> np.ndarray:
        # Of a deduction that may land in any billing period `judge` asks all there is to ask.
        unknown = super()._untold(proposals)
        return unknown & ~negative(proposals["quantity"]) if self._bills_late else unknown

    def lock(self, delivery: Delivery) -> str:
        """Send the deductions of one balance one after the other, whichever source they come from."""
        if delivery.quantity > 0:
            return ""
        where = delivery.address
        return f"floor:{self.site}:{where['subscription_id']}:{where['component_id']}"

    def recheck(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Hold what the site would take and not bill: usage of a subscription that has ended or is gone meanwhile.

        Also a deduction that the balance does not take whole, or that a renewal could overtake. Each subscription is
        read once.
        """
        read = cache(self._subscription)
        found = {one.token: self._why_not(one, read(one.address["subscription_id"])) for one in deliveries}
        return {token: why for token, why in found.items() if why}

    def _why_not(self, delivery: Delivery, subscription: Json | None) -> str:
        """Return why a delivery may not be sent any more, or an empty text."""
        where = delivery.address
        if why := self._why_overtaken(delivery, instant((subscription or {}).get(_OPENED))):
            return why
        if delivery.quantity > 0:
            if subscription is None:
                return f"subscription {where['subscription_id']} is gone from the site since this was planned"
            reason = self._unbilled(subscription["state"])
            return f"subscription {where['subscription_id']} {reason}" if reason else ""
        if why := self._unfit_for_deductions(subscription):
            return why
        balance = self._balance(where["subscription_id"], where["component_id"])
        return "" if balance >= -delivery.quantity else f"{_NO_BALANCE} (it is {balance})"

    def _why_overtaken(self, delivery: Delivery, opened: datetime | None) -> str:
        """Return what speaks against a delivery for which a renewal has come since it was found right."""
        until, period = delivery.open_until, delivery.period
        if opened is None or until is None or period is None or until > opened or period.end > opened:
            return ""
        why = self._why_late_now(delivery, opened)
        return "" if why == PASSES else why  # It is the same request, whatever billing period it lands in.

    def _unfit_for_deductions(self, subscription: Json | None) -> str:
        reason = "is gone" if subscription is None else self._unbilled(subscription["state"])
        if subscription is None or reason:
            return f"a deduction waits: its subscription {reason}; there is no balance to take it from"
        # A balance is reset when the site renews, and it is the site's clock that decides about that.
        ends, now = instant(subscription.get("current_period_ends_at")), self.client.time()
        if ends is None or now is None or now >= ends - self.settle_after:
            return f"a deduction waits for the renewal: the billing period ends at {ends}"
        return ""

    def _balance(self, subscription_id: int, component_id: int) -> Decimal:
        found = self.client.subscription_component(subscription_id, component_id) or {}
        return exact_number(found.get("unit_balance")) or Decimal(0)

    def priced(self, more: Mapping[str, Decimal]) -> Mapping[str, Decimal] | None:
        """Let the site preview the next renewal with the balance of now, and with so much more.

        It takes whole numbers only, so a balance with decimals is not priced.
        """
        component, found = int(self._component["id"]), {}
        for subscription, quantity in more.items():
            now = self._balance(int(subscription), component)
            then = max(now + quantity, Decimal(0))
            if now != int(now) or then != int(then):
                continue
            try:
                before, after = (
                    self.client.renewal_cents(int(subscription), component, int(balance), self._price_point)
                    for balance in (now, then)
                )
            except Refused:
                continue  # Its renewal cannot be previewed; that keeps nobody from sending usage.
            # Of no usage there may be no line; of some there has to be one.
            if (before is not None or not now) and (after is not None or not then):
                found[subscription] = Decimal((after or 0) - (before or 0)).scaleb(-2)
        return found

    def encode(self, proposals: pd.DataFrame) -> pd.Series:
        """Return the body of a create-usage request: the token is the first word of the memo, and on the top level."""
        point = by_value(
            proposals["price_point"].fillna(""), lambda number: f',"price_point_id":"{number}"' if number else ""
        )
        token = proposals["token"]
        quantity = proposals["quantity"]
        memo = self._memos(proposals)
        return joined(
            '{"uniqueness_token":"', token, '","usage":{"quantity":', quantity, point, ',"memo":"', token, memo, '"}}'
        )

    def _memos(self, proposals: pd.DataFrame) -> pd.Series:
        """Return what follows the token, as the inside of a JSON text, cut so that the token never is."""
        columns = ["period_start", "period_end", "late"]
        # On the invoice of another billing period nobody would know what it is for.
        rows = proposals[columns[:2]].assign(late=closed(proposals) & ("{period}" not in self.settings.memo))
        texts = [self._memo_text(*span) for span in rows.drop_duplicates().itertuples(index=False, name=None)]
        which = rows.groupby(columns, sort=False).ngroup().to_numpy()
        return pd.Series(np.array(texts, dtype=object)[which], index=proposals.index, dtype=object)

    def _memo_text(self, start: datetime, end: datetime, late: object) -> str:
        period = self._period_text(start, end)
        text = self.settings.memo.format(period=period)
        text = f"{period} {text}" if late else text
        rest = f" {' '.join(text.split())}".rstrip()[: _MEMO_LENGTH - _TOKEN_LENGTH]
        return json.dumps(rest)[1:-1]

    def _period_text(self, start: datetime, end: datetime) -> str:
        zone, kind = self.source.settings.timezone, self.source.settings.period
        first, after = start.astimezone(zone), end.astimezone(zone)
        # The offset tells the two hours apart that autumn gives the same name.
        names = {"hour": f"{first:%Y-%m-%d %H:%M%z}", "day": f"{first:%Y-%m-%d}", "month": f"{first:%Y-%m}"}
        return names.get(kind, f"{first:%Y-%m-%d %H:%M} to {after:%Y-%m-%d %H:%M}")

    def send(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Create one usage; one that comes back with another quantity is in doubt, and so is an unproven deduction."""
        (delivery,) = chunk
        address = delivery.address
        usage = self.client.create_usage(address["subscription_id"], address["component_id"], delivery.body)
        try:
            found = self._receipt(delivery, usage)
        except UsageBillingError as failure:
            raise InDoubt(f"{failure}; a deduction was taken, how much of it counted could not be asked") from failure
        if not isinstance(found, Receipt):
            # It was applied. Settling will find it, with its proof, or with another quantity and report that.
            words = found or "the site does not show yet how much of the deduction counted"
            raise InDoubt(f"{self.site}: {words}", taken=True)
        return [found]

    def settle(self, doubts: Sequence[Delivery], now: datetime) -> Mapping[str, Answer]:
        """Look for each token in the usages of its stored address.

        The whole list is walked, never a window of dates: with two clocks apart, a window could hide what was billed.
        Only the search for a second usage with a token that was found ends early; see `_with_token`.

        A usage that is not there was not applied, so None, and it may be sent again. Not so soon if the last answer was
        a 409 to the site's 60-minute token, since no document tells whether each try renews the 60 minutes: then it
        stays in doubt for 61 minutes after the last send.

        A person decides where the list is gone, where a token stands twice, and where the site does not show within a
        day how much of a deduction counted.
        """
        found: dict[str, Answer] = {}
        turned_down: list[str] = []
        for (subscription_id, component_id), some in _by_address(doubts).items():
            try:
                usages = self.client.usages(subscription_id, component_id)
            except Misconfigured as fault:
                self.client.read_site()  # Credentials and address are everybody's; the list is one subscription's.
                turned_down.append(f"usages of subscription {subscription_id}: {fault}")
                continue
            if usages is None:
                self.client.read_site()  # At a wrong address everything is a 404.
                gone = f"subscription {subscription_id} or its component is gone, and nothing tells what it was billed"
                found |= {token: InDoubt(f"{self.site}: {gone}") for token in some}
                continue
            held = _with_token(usages, some, self.settle_after)
            for token, doubt in some.items():
                if token in held:
                    found |= self._judged(doubt, held[token], now)
                elif not _would_meet_its_token(doubt, now):
                    found[token] = None
        if turned_down:
            raise InDoubt("; ".join(turned_down), answers=found, unaskable=True)
        return found

    def _judged(self, doubt: Delivery, usages: Sequence[Json], now: datetime) -> dict[str, Answer]:
        """Return the answer for a doubt whose token these usages bear; nothing while another try may tell more."""
        if len(usages) > 1:
            which = " and ".join(f"usage {usage['id']} ({_quantity(usage)})" for usage in usages)
            return {doubt.token: Refused(f"stored more than once: {which} (token {doubt.token})")}
        answer: Answer = self._receipt(doubt, usages[0], "found in the list of usages")
        if answer is None and doubt.sent_at is not None and now >= doubt.sent_at + _DAY:
            what = f"usage {usages[0]['id']} is stored, and no site event tells how much of the deduction counted"
            answer = InDoubt(f"{self.site}: {what} (token {doubt.token})")
        return {} if answer is None else {doubt.token: answer}

    def _receipt(self, delivery: Delivery, usage: Json, note: str = "") -> Receipt | Refused | None:
        """Return the receipt of a usage that the site holds, or what is wrong with it; None while it is not proven.

        A site may store a deduction as sent or clipped at the floor; what counted, its site event tells.
        """
        number, stored = str(usage["id"]), _quantity(usage)
        if delivery.quantity > 0:
            return Receipt(delivery.token, number, note) if stored == delivery.quantity else _another(delivery, usage)
        counted = self._counted(delivery, usage)
        if counted is None:
            return None
        if not delivery.quantity <= counted <= 0 or counted != self._measured(counted):
            words = f"usage {number}: a deduction of {delivery.quantity} moved the balance by {counted}"
            return Refused(f"stored with another quantity: {words} (token {delivery.token})")
        if stored not in (delivery.quantity, counted):
            return _another(delivery, usage)
        return Receipt(delivery.token, number, note, None if counted == delivery.quantity else counted)

    def _measured(self, quantity: Decimal) -> Decimal:
        """Return a quantity cut to the decimal places of the meter: nothing finer can be billed or taken back."""
        return quantity.quantize(Decimal(1).scaleb(-self.source.settings.meter.decimals), ROUND_DOWN)

    def _counted(self, delivery: Delivery, usage: Json) -> Decimal | None:
        """Return by how much a deduction moved the balance, 0 or less; None while the site does not show it."""
        for event in self.client.site_events(delivery.address["subscription_id"]):
            data = unwrapped(event, "event_specific_data")
            if _token_of(data) == delivery.token:
                after = exact_number(data.get("new_unit_balance"))
                before = exact_number(data.get("previous_unit_balance"))
                return None if after is None or before is None else after - before
            # What was noted long before the usage was stored cannot be about it, nor can what is older still.
            noted, stored = instant(event.get("created_at")), instant(usage.get("created_at"))
            if noted is not None and stored is not None and noted < stored - _DAY:
                break
        return None

    def records(self, deliveries: pd.DataFrame) -> Iterator[SiteRecord]:
        """Yield the usages from the oldest of `deliveries` on: a usage does not know its usage period.

        Of those before it, only such as bear a token of `deliveries`: an earlier request may have been stored too, and
        taken its id long before it was.
        """
        known = deliveries.assign(number=pd.to_numeric(deliveries["record_id"].replace("", None)).astype("Int64"))
        for address, some in known.groupby("address"):
            where = json.loads(str(address))
            place = (where["subscription_id"], where["component_id"])
            since = None if some["number"].isna().any() else int(some["number"].min())
            reach = _Reach(some, self.settle_after)
            for usage in self.client.usages(*place, since) or ():
                reach.note(usage)
                yield self._record(usage)
            if since is not None:
                tokens = frozenset(some["token"])
                before = self.client.usages(*place, max_id=since - 1, since_date=reach.day) or ()
                yield from (self._record(usage) for usage in before if _token_of(usage) in tokens)

    def _record(self, usage: Json) -> SiteRecord:
        memo = str(usage.get("memo") or "")
        shown = memo.partition(" ")[2] if (token := _token_of(usage)) else memo
        if (quantity := _quantity(usage)) is None:
            raise NotApplied(f"{self.site}: list usages: usage {usage['id']} has no readable quantity")
        return SiteRecord(token, str(usage["id"]), quantity, shown)

    def _address(self, account: str, number: str) -> Json:
        return {"subscription_id": int(number), "component_id": self._component["id"]}

    def _by_id(self) -> bool:
        return bool(self.settings.subscription_by == "id")

    @cached_property
    def _price_point(self) -> str:
        if self.settings.price_point is None:
            return ""
        found = self.client.price_point(self._component["id"], self.settings.price_point)
        if found is None:
            raise Misconfigured(f"billing source {self.source.title!r}: {self._no_price_point()}")
        return str(found["id"])

    def _no_price_point(self) -> str:
        component, wanted = self.settings.component, self.settings.price_point
        return f"destination.price_point: component {component!r} has no price point {wanted!r}"

    def _own_faults(self, component: Json) -> Iterator[str]:
        decimals = self.source.settings.meter.decimals
        if decimals and not component.get("allow_fractional_quantities"):
            # The site truncates 5.5 to 5 without a word, or refuses it; which of the two is not documented for the API.
            yield (
                f"meter.decimals: is {decimals}, and component {self.settings.component!r} takes whole numbers only; "
                "allow fractional quantities on the component, or measure in smaller units"
            )
        point = self.settings.price_point
        if point is not None and self.client.price_point(component["id"], point) is None:
            yield self._no_price_point()


def _quantity(usage: Json) -> Decimal | None:
    """Return a usage's quantity, which comes as a number or as text; None if it is neither."""
    return exact_number(usage.get("quantity"))


def _token_of(usage: Json) -> str:
    first = str(usage.get("memo") or "").partition(" ")[0]
    return first if _TOKEN.fullmatch(first) else ""


def _with_token(
    usages: Iterator[Json], doubts: Mapping[str, Delivery], settle_after: timedelta
) -> dict[str, list[Json]]:
    """Return the usages that bear each token, as far as any do.

    The walk ends once all are found and what follows was stored too long before or after them to be of the same sends.
    How long that is, the ledger's clock tells, and how far two usages are apart, the site's: so it is no matter if the
    two clocks are apart.
    """
    held: dict[str, dict[int, Json]] = {}
    for usage in usages:
        if (token := _token_of(usage)) in doubts:
            held.setdefault(token, {})[usage["id"]] = usage
        elif len(held) == len(doubts) and all(
            _apart(usage, next(iter(found.values())), _sending(doubts[token], settle_after))
            for token, found in held.items()
        ):
            break
    return {token: list(found.values()) for token, found in held.items()}


def _sending(delivery: Delivery, settle_after: timedelta) -> timedelta:
    """Return how long there can be between two usages of one delivery, with a day for a clock that was set."""
    if delivery.sent_at is None or delivery.reserved_at is None:
        return timedelta.max
    return delivery.sent_at - delivery.reserved_at + settle_after + _DAY


def _apart(usage: Json, other: Json, longest: timedelta) -> bool:
    """Say whether the site stored two usages longer apart than `longest`, by its own clock."""
    here, there = instant(usage.get("created_at")), instant(other.get("created_at"))
    return here is not None and there is not None and abs(here - there) > longest


class _Reach:
    """How far back, by the site's own clock, a second usage under the token of an accepted one may have been stored.

    Nobody sends usage before its period is over, whatever ledger it was, one that is lost by now too. How long before
    the accepted request that was, the ledger's clock tells; from where to count, the site's: it is no matter if the two
    are apart.
    """

    def __init__(self, accepted: pd.DataFrame, settle_after: timedelta) -> None:
        self._settle_after = settle_after
        # Only the tie-out walks back, and it knows when each was sent; what was adopted was sent before it was entered.
        names = [name for name in ("period_end", "reserved_at", "sent_at") if name in accepted]
        self._rows = {row["record_id"]: row for row in accepted[["record_id", *names]].to_dict("records")}
        self._earliest: datetime | None = None
        self._endless = False

    def note(self, usage: Json) -> None:
        """Take in when the site stored one of the accepted usages."""
        row = self._rows.get(str(usage["id"]))
        if row is None:
            return
        stored, sent = instant(usage.get("created_at")), row.get("sent_at")
        if stored is None:
            self._endless = True
            return
        begin = min(moment for name in ("period_end", "reserved_at") if not pd.isna(moment := row.get(name)))
        longest = timedelta(0) if pd.isna(sent) else max(sent - begin, timedelta(0))
        first = (min(stored, begin) if pd.isna(sent) else stored) - longest - self._settle_after - _DAY
        self._earliest = first if self._earliest is None else min(first, self._earliest)

    @property
    def day(self) -> date | None:
        """The day from which on such a usage may have been stored, whatever the site's zone; None for any day."""
        return None if self._earliest is None or self._endless else (self._earliest - _DAY).date()


def _by_address(doubts: Sequence[Delivery]) -> dict[tuple[int, int], dict[str, Delivery]]:
    groups: dict[tuple[int, int], dict[str, Delivery]] = {}
    for doubt in doubts:
        key = (doubt.address["subscription_id"], doubt.address["component_id"])
        groups.setdefault(key, {})[doubt.token] = doubt
    return groups


def _would_meet_its_token(doubt: Delivery, now: datetime) -> bool:
    """Say whether the site met the token within the hour; a lost 409 is no harm, the next one is told."""
    return MET_WITHIN_THE_HOUR in doubt.reason and doubt.sent_at is not None and now < doubt.sent_at + _TOKEN_HONOURED


def _another(delivery: Delivery, usage: Json) -> Refused:
    stored = _quantity(usage)
    held = "no readable quantity" if stored is None else stored
    return Refused(
        f"stored with another quantity: usage {usage['id']} holds {held}, "
        f"not {delivery.quantity} (token {delivery.token})"
    )
