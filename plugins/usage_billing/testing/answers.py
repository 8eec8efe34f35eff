"""What people were shown of a plan and what they said to it: of a source that asks, nothing else may go.

A yes covers what was shown with the question, delivery by delivery, once the ledger has taken it; a no about the same
takes it back, unless it is about an older reading: the newest has the say, also about what was asked of others before.
What a person releases by name needs no question.
"""

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from usage_billing.records import FOLLOWS, Decision, Reading, State

Question = tuple[str, Reading, str]
"""A source, the reading that was planned, and the digest under which its plan was shown."""


class Answers:
    """All questions of a history, and how they were answered."""

    def __init__(self) -> None:
        self._shown: dict[Question, dict[str, Decimal]] = {}
        self._said: dict[Question, Decision] = {}
        self._approved: dict[str, tuple[Decimal, Reading]] = {}
        self._released: set[tuple[str, Decimal]] = set()

    def shows(self, question: Question, proposals: Iterable[pa.Table]) -> None:
        """Note what would go of a plan that a person is asked about, and what goes once a credit was taken.

        That one has no token of its own yet, and is known by its identity.
        """
        names = ["token", "identity", "state", "quantity", "reason"]
        rows = [row for part in proposals for row in part.select(names).to_pylist()]
        going = {row["token"]: row for row in rows if row["state"] == State.RESERVED}
        going |= {row["identity"]: row for row in rows if row["reason"].startswith(FOLLOWS)}
        self._shown[question] = {name: Decimal(row["quantity"]) for name, row in going.items()}

    def says(self, question: Question, decision: Decision) -> None:
        """Note what a person said, or that nobody said anything in time."""
        self._said[question] = decision

    def note(self, what: str, args: Sequence[Any]) -> None:
        """Note one call of the ledger that came about."""
        if what != "record_decision":
            return
        name, reading, digest, decision = args[:4]
        shown = self._shown.get((name, reading, digest), {})
        newer = {one for one in shown if one in self._approved and self._approved[one][1] > reading}
        for one in shown.keys() - newer:
            self._approved.pop(one, None)
        if decision is Decision.APPROVED and self._said.get((name, reading, digest)) is Decision.APPROVED:
            self._approved |= {one: (quantity, reading) for one, quantity in shown.items() if one not in newer}

    def releases(self, identity: str, quantity: Decimal) -> None:
        """Note that a person let a held delivery go."""
        self._released.add((identity, quantity))

    def cover(self, token: str, identity: str, quantity: Decimal) -> bool:
        """Say whether a person wants a delivery to go as it is."""
        known = (self._approved[name] for name in (token, identity) if name in self._approved)
        return any(shown == quantity for shown, _ in known) or (identity, quantity) in self._released
