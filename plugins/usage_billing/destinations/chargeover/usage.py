"""Metered usage of a line item: in batches, singly, or in a bulk that is read back; doubts settled by external key.

Limits and the meaning of replies follow ChargeOver's public REST documentation: "Storing Usage/Metered Data", "Query
for Usage/Metered Data", "Bulk Usage/Metered Data Upload", "Bulk/Batch Requests", "External Keys".
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import ClassVar, Literal, cast

import numpy as np
import pandas as pd
from pydantic import Field

from usage_billing.destinations.base import Answer, Destination, Moved, by_value, joined, negative
from usage_billing.destinations.chargeover.client import FEW, LIMIT, ChargeOverSite, Json, record_id
from usage_billing.destinations.chargeover.line_item import LineItems
from usage_billing.destinations.exact import exact_number
from usage_billing.destinations.http import record_number
from usage_billing.destinations.settings import whole_number
from usage_billing.errors import InDoubt, NotApplied, Refused, UsageBillingError
from usage_billing.records import (
    ABSENT,
    DECIDED,
    PERSON_DECIDES,
    REFUSED_WHOLE,
    Delivery,
    Period,
    Receipt,
    SiteRecord,
    Target,
)
from usage_billing.sources import BillingSource, DestinationSettings

log = logging.getLogger(__name__)

_LARGEST_BATCH = 25
_LARGEST_BULK = 1000
_CHUNK_SIZES = {"single": 1, "batch": _LARGEST_BATCH, "bulk": _LARGEST_BULK}
_REFUSALS = (400, 404, 422)
_THROTTLED = 429
_TOKEN = re.compile(r"[0-9a-f]{64}")
_MISSES = 3
"""How many questions in a row may go without an answer before no more are asked."""
_KEPT_DECIMALS = 4
"""How many decimal places an account is trusted to keep: what has more was not stored before it was read back."""
_REFUSED_AGAIN = "refused when it was sent again, perhaps because its first request arrived after all"
_NOT_SHOWN = "; the account has not shown it since"
_FIRST_HOUR = timedelta(hours=1)


class ChargeOverUsageSettings(DestinationSettings):
    """The keys of a source that is billed to ChargeOver.

    `package_by` says what the account column holds: the package's external key, the customer's, or the id of a line
    item; the package, or the customer, must have one line of the item. `item` is the product's external key. `mode`
    says how records travel: in batches of 25, each with its own answer; singly; or in a bulk of up to 1,000, which no
    answer accepts and which is therefore read back. `late_usage` says what becomes of usage whose cycle is invoiced: it
    is held, dated in the open cycle, sent with its own time (for an account of which you know that it bills that), or
    refused.
    """

    free: ClassVar[frozenset[str]] = DestinationSettings.free | {"mode"}

    name: Literal["chargeover_usage"]
    package_by: Literal["external_key", "customer_external_key", "line_item_id"]
    item: str = Field(min_length=1)
    mode: Literal["batch", "single", "bulk"] = "batch"
    late_usage: Literal["hold", "now", "original_time", "refuse"] = "hold"


class ChargeOverUsage(Destination):
    """Metered usage of the line item that a package has of one product.

    An upgrade replaces a line item's id, even a change of price, so the identity is the pair of package and item, and
    the id is looked up afresh each time. The uniqueness token travels as the record's external key.
    """

    name = "chargeover_usage"
    why_late = "its billing cycle is invoiced: whether usage that comes later is ever billed is not documented"
    connection_type = "chargeover"
    settings_model = ChargeOverUsageSettings
    chunk_size = _LARGEST_BATCH
    # External keys are said to be unique for all objects; that usage is among them is said nowhere.
    replay_window = timedelta(0)

    client: ChargeOverSite

    def __init__(self, source: BillingSource, client: ChargeOverSite) -> None:
        super().__init__(source, client)
        self.settings = cast("ChargeOverUsageSettings", source.destination)
        self.chunk_size = _CHUNK_SIZES[self.settings.mode]
        self._line_items = LineItems(client, self.settings.package_by, self.settings.item)

    def is_test_site(self) -> bool | None:
        self.client.read_account()
        return None

    def _faults(self) -> Iterator[str]:
        yield from self._line_items.faults()

    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Return today's line item of each account; one that is not one billed line of the item is `unknown`."""
        return self._line_items.resolve(accounts)

    def locate(self, accounts: Sequence[str]) -> list[Target]:
        """Return the line item of each account, its last one where nothing of it is billed any more."""
        return self._line_items.locate(accounts)

    def hold_reason(self, proposals: pd.DataFrame) -> pd.Series:
        """Hold negative differences unless the connection allows them, and what belongs to an invoiced cycle."""
        below = negative(proposals["quantity"])
        # What vanished whole has no account in this run, and a credit to an invoiced cycle might never be made.
        unknown = below & proposals["open_from"].isna().to_numpy(dtype=bool)
        why_minus = (
            "a negative difference waits: the connection does not say that this account takes one (negative_usage)"
        )
        minus = below & (self.client.settings.negative_usage == "hold")
        why_unknown = "the site does not bill it any more, so its open billing cycle is not known"
        late = self._why_late(proposals, self._late(proposals))
        texts = np.select([minus, unknown], [why_minus, why_unknown], late)
        return pd.Series(texts, index=proposals.index, dtype=object)

    def standing(self, subscription: str) -> Target:
        """Return the line of the package or customer that an identity names."""
        return self._line_items.standing([subscription])[subscription]

    def recheck(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Hold what belongs to a cycle that was invoiced since, and what would go to a line that is no more."""
        return self._looked_up(deliveries, self._why_not)

    def overtaken(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        return self._looked_up(deliveries, self._why_too_late)

    def _looked_up(self, deliveries: Sequence[Delivery], judge: Callable[[Delivery, Target], str]) -> Mapping[str, str]:
        """Return, by token, what `judge` says against a delivery and how its subscription stands today."""
        today = self._line_items.standing([delivery.subscription for delivery in deliveries])
        found = {one.token: judge(one, today[one.subscription]) for one in deliveries}
        return {token: why for token, why in found.items() if why}

    def _why_not(self, delivery: Delivery, target: Target) -> str:
        if target.unknown:
            return target.unknown
        if target.address["line_item_id"] != delivery.address["line_item_id"]:
            return "its line item was replaced since it was planned: the next run of its period addresses the new one"
        if self._why_too_late(delivery, target) and target.open_from is not None:
            return self._why_late_now(delivery, target.open_from)
        return ""

    def _why_too_late(self, delivery: Delivery, target: Target) -> str:
        """Say why no open cycle has the usage; a line that was replaced is another matter (see `moved`)."""
        if target.unknown:
            return target.unknown
        start = datetime.fromisoformat(json.loads(delivery.body)["from"]).replace(tzinfo=self.client.settings.zone)
        late = target.open_from is not None and start < target.open_from and self.late_usage != "original_time"
        return self.why_late if late else ""

    def encode(self, proposals: pd.DataFrame) -> pd.Series:
        """Return each proposal as one usage record, the token as its external key.

        One whose cycle is invoiced, where it goes at all, is dated in the first hour of the open cycle, with both ends,
        so that it is billed whichever of them decides; ``custom_1`` then names its usage period.
        """
        late = pd.Series(self._late(proposals), index=proposals.index)
        # The last second of a period belongs to it: the account reads `to` as included. In the hour that autumn
        # repeats, two periods bear the same times; the external key tells them apart.
        start, end = self._times(proposals["period_start"], proposals["period_end"])
        note = joined(',"custom_1":"usage of ', start, " to ", end, '"').where(late, "")
        if late.any():
            opened = proposals["open_from"]
            first, last = self._times(opened[late], opened[late] + _FIRST_HOUR)
            start, end = (first.reindex(start.index).fillna(start), last.reindex(end.index).fillna(end))
        line = by_value(proposals["address"], lambda address: str(int(json.loads(address)["line_item_id"])))
        return joined(
            '{"line_item_id":', line, ',"usage_value":', proposals["quantity"], ',"from":"', start, '","to":"', end,
            '","external_key":"', proposals["token"], '"', note, "}",
        )  # fmt: skip

    def _late(self, proposals: pd.DataFrame) -> np.ndarray:
        """Say of each proposal whether its own time would put it into an invoiced cycle that bills nothing more."""
        begun = (proposals["period_start"] < proposals["open_from"]).to_numpy(dtype=bool)
        return begun & (self.late_usage != "original_time")

    def _times(self, starts: pd.Series, ends: pd.Series) -> tuple[pd.Series, pd.Series]:
        """Return `from` and `to` of spans as the account reads them."""
        return by_value(starts, self.client.local), by_value(ends - timedelta(seconds=1), self.client.local)

    def send(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Store the chunk: singly, as a batch whose records are each answered, or as a bulk that is read back."""
        if len(chunk) == 1:
            # In whatever mode: only to a record alone is a refusal its own.
            return self._as_sent(chunk, [self._send_one(chunk[0])])
        if self.settings.mode == "bulk":
            return self._send_bulk(chunk)
        return self._as_sent(chunk, self._send_batch(chunk))

    def _as_sent(self, chunk: Sequence[Delivery], receipts: list[Receipt]) -> list[Receipt]:
        """Return the receipts, once those of very precise quantities are proven: an account may round what it stores.

        Raises:
            InDoubt: one of them cannot be read back as it was sent; it holds the receipts of the others.
        """
        taken = {receipt.token for receipt in receipts}
        precise = [one for one in chunk if one.token in taken and _places(one.quantity) > _KEPT_DECIMALS]
        if not precise:
            return receipts
        found = self._read_back(precise)
        unproven = {one.token for one in precise if not isinstance(found.get(one.token), Receipt)}
        if not unproven:
            return receipts
        different = [str(answer) for answer in found.values() if isinstance(answer, Refused)]
        words = f"{self.site}: {len(unproven)} of more than {_KEPT_DECIMALS} decimals cannot be read back as sent"
        proven = [receipt for receipt in receipts if receipt.token not in unproven]
        raise InDoubt("; ".join([words, *different[:FEW]]), receipts=proven, taken=True)

    def _send_one(self, delivery: Delivery) -> Receipt:
        try:
            made = self.client.create_usage(delivery.body)
        except Refused as refusal:
            if (found := self._already_there(delivery)) is not None:
                return found
            if _may_be_there(delivery):
                raise InDoubt(f"{refusal}; {_REFUSED_AGAIN}") from refusal
            raise
        return Receipt(delivery.token, made["id"])

    def _send_batch(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Store the chunk as a batch; where all of it is refused at once, that is told apart from a lost reply."""
        try:
            answers = self.client.create_usage_batch([delivery.body for delivery in chunk])
        except InDoubt as doubt:
            if not doubt.refused:
                raise
            raise InDoubt(f"{REFUSED_WHOLE}{doubt}", refused=True) from doubt
        return self._read_answers(chunk, answers)

    def _send_bulk(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Upload the chunk and accept what can be read back; the rest is in doubt, whatever the reply was.

        What cannot be seen may become visible later, or have been skipped without a word.
        """
        said = "the account says that it took it"
        try:
            self.client.upload_usage([delivery.body for delivery in chunk])
        except InDoubt as doubt:
            said = str(doubt)
        answers = self._read_back(chunk)
        receipts = [found for one in chunk if isinstance(found := answers.get(one.token), Receipt)]
        if len(receipts) == len(chunk):
            return receipts
        different = [str(answer) for answer in answers.values() if isinstance(answer, Refused)]
        words = f"{self.site}: {len(receipts)} of a bulk of {len(chunk)} can be read back; {said}"
        raise InDoubt("; ".join([words, *different[:FEW]]), receipts=receipts)

    def _read_back(self, chunk: Sequence[Delivery]) -> dict[str, Receipt | Refused]:
        """Return what of the chunk the account lists, by token; nothing follows for what is absent, or unreadable."""
        wanted = {delivery.token: delivery for delivery in chunk}
        held: dict[str, list[Json]] = {}
        try:
            for usage in self._usages_of(chunk):
                if (key := str(usage.get("external_key"))) in wanted:
                    held.setdefault(key, []).append(usage)
        except UsageBillingError as failure:
            log.warning("what the account holds of a bulk could not be read to its end: %s", failure)
        return {token: self._judged(wanted[token], usages) for token, usages in held.items()}

    def _usages_of(self, chunk: Sequence[Delivery]) -> Iterator[Json]:
        """Yield the usage of the chunk's lines and times, and perhaps more; one may come twice.

        Many lines are first looked for in the account's list of that time, as long as that takes fewer requests than
        asking for one line after the other.
        """
        starts = [self.client.moment(json.loads(delivery.body)["from"]) for delivery in chunk]
        since, until = min(starts), max(starts)
        lines = sorted({int(delivery.address["line_item_id"]) for delivery in chunk})
        if len(lines) > FEW:
            listed = self.client.usages({}, since, until)
            yield from islice(listed, LIMIT * (len(lines) // 4))
            if next(listed, None) is None:
                return
        for line in lines:
            yield from self.client.usages({"line_item_id": line}, since, until)

    def _read_answers(self, chunk: Sequence[Delivery], answers: Sequence[Json]) -> list[Receipt]:
        """Return the receipts of a batch, whose records were each answered singly.

        A record that was throttled or refused goes without a receipt: it was not applied, and comes again in a later
        chunk. Only a chunk of which nothing was taken is `Refused`, so that it is split until the culprit stands alone.

        Raises:
            NotApplied, Refused: nothing was taken.
            InDoubt: the answer to one of them is unclear; it holds the receipts of the others.
        """
        outcomes = [self._outcome(delivery, answer) for delivery, answer in zip(chunk, answers, strict=True)]
        receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
        if unclear := [str(outcome) for outcome in outcomes if isinstance(outcome, InDoubt)]:
            raise InDoubt(f"{self.site}: records of the batch: {_some(unclear)}", receipts=receipts)
        refused = [str(outcome) for outcome in outcomes if isinstance(outcome, Refused)]
        if not receipts and refused:
            raise Refused(f"{self.site}: {_some(refused)}")
        if not receipts:
            raise NotApplied(f"{self.site}: the batch was throttled", throttled=True)
        return receipts

    def _outcome(self, delivery: Delivery, answer: Json) -> Receipt | NotApplied | Refused | InDoubt:
        """Return what the answer to one record of a batch means."""
        code = whole_number(answer.get("code"), 0) or 0
        words = f"HTTP {code}: {self.client.said(answer)}"
        if (number := record_id(answer)) is not None:
            return Receipt(delivery.token, number)
        if code == _THROTTLED:
            return NotApplied(words)
        if code not in _REFUSALS:
            return InDoubt(words)
        try:
            found = self._already_there(delivery)
        except InDoubt as doubt:
            return doubt
        return found or (InDoubt(f"{words}; {_REFUSED_AGAIN}") if _may_be_there(delivery) else Refused(words))

    def _already_there(self, delivery: Delivery) -> Receipt | None:
        """Return the receipt of a record that was refused because an earlier try had succeeded, or None.

        Raises:
            InDoubt: the account could not be asked, or holds the key with another quantity.
        """
        try:
            found = self._found(delivery)
        except UsageBillingError as failure:
            raise InDoubt(
                f"{failure}; a record was refused, and whether for its own earlier success is not known"
            ) from failure
        if isinstance(found, Refused):
            raise InDoubt(str(found))
        return found

    def _found(self, delivery: Delivery) -> Receipt | Refused | None:
        held = self.client.usages_by_external_key(delivery.token)
        return self._judged(delivery, held) if held else None

    def _judged(self, delivery: Delivery, held: Sequence[Json]) -> Receipt | Refused:
        """Say whether what the account holds under a delivery's key is this delivery, once and with its quantity."""
        numbers = {record_number(usage.get("usage_history_id")): usage for usage in held}
        values = [exact_number(usage.get("usage_value")) for usage in numbers.values()]
        if values != [delivery.quantity] or None in numbers:
            shown = ", ".join("no readable value" if value is None else str(value) for value in values)
            return Refused(
                f"{self.site}: external key {delivery.token} is held with {shown}, and {delivery.quantity} was sent"
            )
        return Receipt(delivery.token, str(*numbers), "found by its external key")

    def settle(self, doubts: Sequence[Delivery], now: datetime) -> Mapping[str, Answer]:
        """Ask for each token as an external key; what is not there after `settle_after` was not applied.

        Of many, most are found in the list of usage, with fewer questions; only the single one tells of an absence. One
        that was refused when it came again, and is still not there, would be refused for ever: a person decides.
        """
        answers = self._settled(doubts)
        for doubt in doubts:
            if _REFUSED_AGAIN in doubt.reason and answers.get(doubt.token, doubt) is None:
                why = doubt.reason.removeprefix(PERSON_DECIDES).removesuffix(_NOT_SHOWN)
                answers[doubt.token] = Refused(why + _NOT_SHOWN)
        return answers

    def _settled(self, doubts: Sequence[Delivery]) -> dict[str, Answer]:
        answers: dict[str, Answer] = {}
        if len(doubts) > FEW:
            answers.update(self._read_back(doubts))
        misses = 0
        for doubt in (doubt for doubt in doubts if doubt.token not in answers):
            try:
                answers[doubt.token] = self._found(doubt)
                misses = 0
            except NotApplied:
                # One odd answer leaves one in doubt; but an account that does not answer is not asked a thousand times.
                misses += 1
                if misses == min(_MISSES, len(doubts)) and not answers:
                    raise
                if misses == _MISSES:
                    break
        return answers

    def records(self, deliveries: pd.DataFrame) -> Iterator[SiteRecord]:
        """Yield the records of the line items that `deliveries` went to, over the span of their periods.

        What came late is dated later: whatever of `deliveries` is not there is looked for until its cycle ends, where
        ``open_until`` tells.
        """
        for address, some in deliveries.groupby("address"):
            line = json.loads(str(address))["line_item_id"]
            since, until = some["period_start"].min().to_pydatetime(), some["period_end"].max().to_pydatetime()
            wanted = set(some["token"])
            for record in self._records({"line_item_id": line}, Period(since, until)):
                wanted.discard(record.token)
                yield record
            unseen = some[some["token"].isin(wanted)]
            ends = max(unseen["open_until"].dropna(), default=until) if "open_until" in some else until
            if ends > until:
                later = self._records({"line_item_id": line}, Period(until, ends))
                yield from (record for record in later if record.token in wanted)

    def elsewhere(self, span: Period) -> Iterator[SiteRecord]:
        """Yield every record of the account over a span: an upgrade leaves those of before on a line that is gone."""
        return self._records({}, span)

    def _records(self, equal: Mapping[str, object], span: Period) -> Iterator[SiteRecord]:
        for usage in self.client.usages(equal, span.start, span.end - timedelta(seconds=1)):
            key = self.client.key_of("usage", usage)
            token = key if _TOKEN.fullmatch(key) else ""
            if (value := exact_number(usage.get("usage_value"))) is None:
                raise NotApplied(f"{self.site}: query usage: usage {usage['usage_history_id']} has no readable value")
            shown = f"{usage.get('from')} to {usage.get('to')}"
            line = whole_number(usage.get("line_item_id"), 1)
            where = {} if line is None else {"line_item_id": line}
            yield SiteRecord(token, str(usage["usage_history_id"]), value, shown, where)

    def moved(self, accepted: pd.DataFrame) -> Iterator[Moved]:
        """Yield what is stored on a line that an upgrade has replaced since, in a cycle that is not invoiced yet."""
        today = self._line_items.standing(accepted["subscription"].unique().tolist())
        for (subscription, text), some in accepted.groupby(["subscription", "address"]):
            target, address = today[str(subscription)], json.loads(str(text))
            if target.unknown or target.address["line_item_id"] == address["line_item_id"]:
                continue
            # What came late lies where the cycle was open when it was sent.
            lies = some["open_until"].fillna(some["period_end"])
            is_open = lies > target.open_from if target.open_from else lies.notna()
            if count := int(is_open.sum()):
                yield Moved(
                    count,
                    f"{subscription}: {count} deliveries are stored on line {address['line_item_id']}, which "
                    f"was replaced by {target.address['line_item_id']}; no document says that they are billed",
                )


def _some(words: Iterable[str]) -> str:
    return "; ".join(sorted(set(words)))[:LIMIT]


def _places(quantity: Decimal) -> int:
    """Return how many decimal places a quantity needs."""
    return len(f"{quantity:f}".partition(".")[2].rstrip("0"))


def _may_be_there(delivery: Delivery) -> bool:
    """Say of a delivery that is refused now whether an earlier request of it may have been carried out unseen.

    One earlier request that the account did not carry out, or refused with others and does not have, is no reason to
    think so; of several only the last is known. Where a person has looked there and said no, the refusal is the last
    word.
    """
    return delivery.reason == ABSENT or (delivery.sends > 1 and not delivery.reason.startswith(DECIDED))
