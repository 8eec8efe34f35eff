"""Approval: what a person was shown may be sent, and nothing else.

The ledger keeps the answer beside a digest of what was shown, so that a deliver which is tried again goes on without
asking, wherever it runs; and a delivery that nobody approved is listed by name until a later plan asks again.
"""

from collections.abc import Callable, Iterator
from functools import cached_property

import pandas as pd
import pyarrow as pa

from usage_billing.destinations.base import Destination
from usage_billing.errors import NeedsDecision, NotApplied
from usage_billing.ledger import Ledger
from usage_billing.preview import digest_of, following_of, going_of
from usage_billing.records import UNAPPROVED, Approval, Decision, Plan, Reading, Staged, State
from usage_billing.staging import Staging

_NAMED = 3
_ROUNDS = 5
"""How often a no is written down anew because something moved under it."""


class Approved:
    """The deliveries of one plan, as far as a person has approved them."""

    def __init__(self, source: str, reading: Reading, proposals: Staged, ledger: Ledger, staging: Staging) -> None:
        self._source = source
        self._reading = reading
        self._proposals = proposals
        self._ledger = ledger
        self._staging = staging

    @cached_property
    def _plan(self) -> tuple[str, int]:
        """The digest of what the plan sends, and how many deliveries that is."""
        return digest_of(self._proposals, self._staging)

    def check(self) -> None:
        """Make sure that they were approved; what sends nothing needs no approval.

        Raises:
            NeedsDecision: nobody approved them, or they were rejected; nothing was sent.
        """
        self._check_earlier()
        digest, going = self._plan
        if not going:
            return
        last = self._ledger.decision(self._source, self._reading, digest)
        if last is None or last.decision is not Decision.APPROVED:
            raise NeedsDecision(
                f"{going} deliveries of {self._source!r} wait for an approval, and the ledger has "
                f"{'none' if last is None else told(last)}: nothing was sent; clear the plan, which asks for it"
            )

    def _check_earlier(self) -> None:
        """Make sure that what an earlier try of this reading wrote down was written down after a yes.

        A plan does not propose it again, so nobody was asked about it where the source began to ask only since.
        """
        earlier = self._ledger.unseen(self._source, self._reading)
        if earlier:
            raise NeedsDecision(
                f"deliveries of {self._source!r} were written down before the source asked for approvals (token "
                f"{earlier}): nothing was sent; clear the run from extract on, which asks about them too"
            )

    def within(self, again: Plan) -> Plan:
        """Return a plan that was made anew during the delivery, if it sends nothing that was not approved.

        Raises:
            NeedsDecision: it would; of that, nothing is written down or sent.
        """
        beyond: list[str] = []
        for part in self._staging.read(again.proposals):
            beyond += sorted(self._unknown(part))
        if beyond:
            shown = ", ".join(line.split()[0] for line in beyond[:_NAMED])
            raise NeedsDecision(
                f"{len(beyond)} deliveries of {self._source!r} are not what was approved any more (tokens {shown}"
                f"{', ...' if len(beyond) > _NAMED else ''}), since something moved under them; the others "
                "went, these did not: clear the plan, which asks about them"
            )
        return again

    def _unknown(self, part: pa.Table) -> set[str]:
        unknown, (_, going) = going_of(part), self._plan
        parts: Iterator[pa.Table] = self._staging.read(self._proposals)
        for approved in parts:
            if not unknown:
                break
            # Where nothing was to go nobody was asked, and nobody has seen what follows either.
            shown = {*going_of(approved), *(following_of(approved) if going else ())}
            unknown = {line: waiting for line, waiting in unknown.items() if not shown & {line, waiting}}
        return set(unknown)


def turn_down(
    plan: Plan,
    replan: Callable[[], Plan],
    decided: Approval,
    destination: Destination,
    ledger: Ledger,
    staging: Staging,
) -> int:
    """List by name what a plan would have sent, as held with who said no; return how many deliveries are held so.

    What has moved since the plan is planned anew by `replan`: whoever moved it has the say, and the rest is listed.

    Raises:
        NotApplied: something moved each time; what is listed nowhere yet is for the next try.
        Stale: a later reading has the say, and lists what is owed.
    """
    reason = f"{UNAPPROVED}{told(decided)}"
    listed, held = list[str](), list[str]()
    for _ in range(_ROUNDS):
        moved = 0
        for part in staging.read(plan.proposals):
            frame = _all_held(part.to_pandas(), reason)
            # Chunks of raw events hang on one another, so a period of theirs is written down whole.
            known = frame["supersedes"].isin([] if destination.stream else held)
            listed += frame["token"][(frame["state"] == State.HELD) & ~known].tolist()
            outcome = ledger.reserve(decided.source, destination.site, decided.reading, frame[~known])
            moved += outcome.moved
        now = ledger.known(listed)
        held = now["token"][(now["state"] == State.HELD) & (now["reason"] == reason)].tolist()
        if not moved:
            return len(held)
        plan = replan()
    raise NotApplied(f"{told(decided)}: {len(held)} deliveries are held, {moved} moved meanwhile, each time; try again")


def _all_held(frame: pd.DataFrame, reason: str) -> pd.DataFrame:
    """Return proposals of which none is sent: whole, where only a part could have gone now."""
    sends = frame["state"] == State.RESERVED
    # Whoever let it go before has been overruled.
    for name, text in (("state", State.HELD), ("reason", reason), ("released", "")):
        if name in frame:
            frame[name] = frame[name].mask(sends, text)
    if "wanted" in frame:
        frame["quantity"] = frame["quantity"].mask(sends, frame["wanted"])
    return frame


def told(decided: Approval) -> str:
    """Return a decision in words: what, by whom, when, and why."""
    when = f"{decided.decided_at:%Y-%m-%d %H:%M} UTC"
    if decided.decision is Decision.TIMED_OUT:
        return f"no answer until {when}"
    return f"{decided.decision} by {decided.by} on {when}" + (f": {decided.note}" if decided.note else "")
