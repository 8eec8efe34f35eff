"""A trial of a billing site: one marked unit is sent to a test subscription, read back, and taken back where that goes.

Nobody used that unit, and no ledger knows of it: it is for a test site. Maxio's guide "Send Usage to Maxio" asks for
such a test before a site goes live.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from functools import cached_property

import pandas as pd

from usage_billing.aggregate import canonical_json
from usage_billing.destinations.base import Destination
from usage_billing.errors import InDoubt, Misconfigured, NotApplied, Refused, UsageBillingError
from usage_billing.records import Delivery, Receipt, Target
from usage_billing.uniqueness import identity, uniqueness_token

_HOUR = timedelta(hours=1)
_PAUSE_SECONDS = 2.0
_UNIT = Decimal(1)


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a trial: whether it went well (None: it was not tried), and what to tell of it."""

    name: str
    told: str
    ok: bool | None = True


class _NotTried(Exception):
    """A step is left out; the text says why, and what that leaves."""


def try_out(
    destination: Destination,
    account: str,
    now: datetime,
    *,
    wait: Callable[[float], object] = time.sleep,
    patience_seconds: float = 60.0,
) -> list[Step]:
    """Return how each step went, for the source of `destination` and one account of the warehouse.

    What was sent is looked for until it shows, for `patience_seconds`: sites may show it late. After a step that failed
    no other is tried, but that what was sent is taken back.
    """
    trial = _Trial(destination, account, now, wait, patience_seconds)
    found: list[Step] = []
    for name, step in trial.steps:
        if any(one.ok is False for one in found) and not (trial.sent and name == "take back"):
            found.append(Step(name, "not tried", None))
            continue
        try:
            found.append(Step(name, step()))
        except _NotTried as why:
            found.append(Step(name, str(why), None))
        except UsageBillingError as failure:
            found.append(Step(name, str(failure), ok=False))
    return found


def told(steps: Sequence[Step]) -> str:
    """Return the steps as a table for the log."""
    marks = {True: "ok", False: "FAILED", None: "-"}
    return "\n".join(f"{marks[step.ok]:<7}{step.name:<12}{step.told}" for step in steps)


class _Trial:
    """One trial; each step returns what to tell, and raises what is wrong."""

    def __init__(
        self,
        destination: Destination,
        account: str,
        now: datetime,
        wait: Callable[[float], object],
        patience_seconds: float,
    ) -> None:
        self._destination = destination
        self._account = account
        self._now = now
        self._wait = wait
        self._patience = patience_seconds
        self.sent: list[Delivery] = []
        self._before = Decimal(0)
        self._doubtful = False

    @property
    def steps(self) -> Iterator[tuple[str, Callable[[], str]]]:
        """The steps, in their order."""
        yield "site", self._site
        yield "catalogue", self._catalogue
        yield "account", self._look_up
        yield "send", self._send
        yield "read back", self._read_back
        yield "take back", self._take_back

    def _site(self) -> str:
        kind = self._destination.is_test_site()
        if kind is False:
            raise Misconfigured(f"{self._destination.site} says that it is no test site: nothing is sent there")
        told = "is a test site" if kind else "answers; it does not tell whether it is a test site"
        return f"{self._destination.site} {told}"

    def _catalogue(self) -> str:
        self._destination.check()
        return "what the source names is there, and takes its usage"

    def _look_up(self) -> str:
        target = self._target
        if target.unknown:
            raise Misconfigured(f"account {self._account!r}: {target.unknown}")
        return f"account {self._account!r} is {target.subscription}, {target.component}"

    @cached_property
    def _target(self) -> Target:
        return self._destination.resolve_accounts([self._account])[0]

    def _send(self) -> str:
        if self._destination.stream:
            raise _NotTried("each row goes as an event of its own, and nothing takes one back: none is sent")
        self._before = self._counted()
        receipt = self._sent_now(_UNIT, 0)
        return f"one unit is there: {receipt.record_id or 'no record id'}, token {receipt.token}"

    def _sent_now(self, quantity: Decimal, revision: int) -> Receipt:
        proposals = self._proposals(quantity, revision)
        if why := self._destination.hold_reason(proposals).item():
            raise _NotTried(why) if quantity < 0 else Refused(why)
        row = proposals.assign(body=self._destination.encode(proposals)).iloc[0]
        delivery = Delivery(
            token=row["token"],
            identity=row["identity"],
            revision=revision,
            quantity=quantity,
            address=self._target.address,
            body=row["body"],
            subscription=self._target.subscription,
        )
        self._destination.prepare([delivery])
        self.sent.append(delivery)
        try:
            receipts = self._destination.send([delivery])
        except InDoubt:
            self._doubtful = True
            raise
        except UsageBillingError:
            # The definite word that it is not there.
            self.sent.remove(delivery)
            raise
        if not receipts:
            self.sent.remove(delivery)
            raise Refused(f"{self._destination.site} did not take the unit")
        return receipts[0]

    def _proposals(self, quantity: Decimal, revision: int) -> pd.DataFrame:
        target, source = self._target, self._destination.source
        start = self._hour(target)
        dimensions = canonical_json(dict.fromkeys(source.settings.dimensions, "verification"))
        name = identity([self._destination.site, source.name, "verification", self._now.isoformat()])
        row = {
            "token": uniqueness_token(name, revision),
            "identity": name,
            "subscription": target.subscription,
            "component": target.component,
            "price_point": target.price_point,
            "dimensions": dimensions,
            "address": target.address_text,
            "period_start": pd.Timestamp(start),
            "period_end": pd.Timestamp(start + _HOUR),
            "quantity": f"{quantity:f}",
            "open_from": target.open_from,
        }
        frame = pd.DataFrame([row])
        return frame.assign(open_from=pd.to_datetime(frame["open_from"], utc=True))

    def _hour(self, target: Target) -> datetime:
        """Return an hour of the open billing period, the present one if it is."""
        start = self._now.replace(minute=0, second=0, microsecond=0)
        if target.open_until is not None:
            start = min(start, target.open_until - _HOUR)
        return start if target.open_from is None else max(start, target.open_from)

    def _read_back(self) -> str:
        if not self.sent:
            raise _NotTried("nothing was sent")
        self._await(self._before + _UNIT)
        return "the site counts one unit more than before"

    def _take_back(self) -> str:
        if not self.sent:
            raise _NotTried("nothing was sent")
        if self._doubtful:
            self._see_that_it_is_there()
        try:
            self._sent_now(-_UNIT, 1)
        except _NotTried as why:
            raise _NotTried(f"one unit stays there: {why}") from None
        except InDoubt as doubt:
            # Taken, and only how much of it counts is not shown yet: what the site counts will tell.
            if not doubt.taken:
                raise
        except UsageBillingError as failure:
            raise Refused(f"one unit stays there: {failure}") from failure
        self._await(self._before)
        return "the site counts as much as before"

    def _see_that_it_is_there(self) -> None:
        """Return if the unit shows: to take back what never arrived would leave less there than before."""
        try:
            self._await(self._before + _UNIT)
        except NotApplied as why:
            token = self.sent[0].token
            raise _NotTried(f"whether the unit is there is not known, so look for token {token}: {why}") from None

    def _await(self, wanted: Decimal) -> None:
        """Return once the site counts so much.

        Raises:
            NotApplied: it does not show it in time.
        """
        waited = 0.0
        while (counted := self._counted()) != wanted:
            if waited >= self._patience:
                raise NotApplied(f"{self._destination.site} counts {counted}, and not {wanted}, for {waited:.0f} s")
            self._wait(_PAUSE_SECONDS)
            waited += _PAUSE_SECONDS

    def _counted(self) -> Decimal:
        """Return what the site counts that bears on the trial: our own records, or the open period's total."""
        target, tokens = self._target, {delivery.token for delivery in self.sent}
        records = self._destination.records(self._accepted())
        if records is not None:
            return sum((one.quantity for one in records if one.token in tokens), Decimal(0))
        totals = self._destination.totals([target.subscription]) or []
        return sum((one.quantity for one in totals if one.period.start == target.open_from), Decimal(0))

    def _accepted(self) -> pd.DataFrame:
        """Return what was sent in the columns of accepted deliveries."""
        row = self._proposals(_UNIT, 0).iloc[0]
        columns = ["subscription", "component", "address", "period_start", "period_end"]
        rows = [{**row[columns].to_dict(), "token": one.token, "record_id": ""} for one in self.sent]
        return pd.DataFrame(rows, columns=[*columns, "token", "record_id"])
