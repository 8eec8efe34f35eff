"""What an adoption has to go by, what comes of it, and what both ways of it share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal
from typing import Any

import pandas as pd

from usage_billing.destinations.base import Destination
from usage_billing.ledger import Ledger
from usage_billing.moves import Moves
from usage_billing.records import Comparison, Period, Staged
from usage_billing.staging import Staging

REVISIONS_AHEAD = 1024
"""How many revisions are looked for beyond the last one found. One that was superseded or refused never came to the
site, and each run that finds a held difference changed makes another, as each question does that nobody answers: six
weeks of hourly runs leave no wider gap."""
_BACK = "let it lead there, adopt, and let it go then; or, if nothing of the span was billed there, go on without it"
ATTRIBUTES = "identity account subscription component price_point dimensions period_start period_end address".split()
EXACT = Context(prec=100)
"""Room for every digit: the ambient context would round after 28 of them."""


@dataclass(frozen=True)
class Adoption:
    """What came of an adoption, or would come of it.

    `entered` were unknown here, `settled` were open here and are there, `known` are settled on both sides. `held` are
    totals of which nobody can tell whether the site has them, `replayable` those that an ordinary run sends without
    harm, until `replay_until` even where the site has them. `doubted` of all are deductions that the site has taken and
    does not show how much of them counted: a person ends these doubts. `unmatched` (of the site's records) and
    `different` are told by name, and so are `twins`, records that bear the token of another one: the tie-out goes on
    naming them unless a person has decided. `moved` are the accounts of which a person has to say where their usage
    belongs.
    """

    entered: int = 0
    settled: int = 0
    known: int = 0
    doubted: int = 0
    held: int = 0
    replayable: int = 0
    replay_until: datetime | None = None
    unmatched: tuple[str, ...] = ()
    different: tuple[str, ...] = ()
    twins: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """True if each record that carries our token is in the ledger now, with the quantity that the site holds."""
        return not self.unmatched and not self.different


@dataclass(frozen=True)
class Search:
    """What one adoption has to go by.

    `former` are the totals by which usage of accounts that moved may have been billed, the last move first. `astray`
    says of an account why nobody knows where it led when the usage was billed. Nothing is written in a `dry_run`.
    """

    comparison: Comparison
    former: Sequence[Staged]
    destination: Destination
    ledger: Ledger
    staging: Staging
    moves: Moves
    astray: Mapping[str, str]
    reason: str
    dry_run: bool

    def overtake(self) -> None:
        """Let plans of before send nothing more: their totals are older than what is entered now."""
        source, found = self.destination.source, self.comparison
        self.ledger.begin_comparison(source.name, found.reading, found.periods, source.edition)

    @property
    def told(self) -> dict[str, str]:
        """What a person has to do about each account that is astray."""
        return {account: f"{why}; {_BACK}" for account, why in self.astray.items()}

    @property
    def moved(self) -> tuple[str, ...]:
        """The accounts of which a person has to say where their usage belongs."""
        return accounts(self.moves.undecided)


def places(rows: pd.DataFrame, window: Period) -> pd.DataFrame:
    """Return one line for each place that was billed, in the form of which `Destination.records` wants deliveries.

    Without a record's id and over the whole window, so that the site tells all it has.
    """
    places = rows[["subscription", "component", "address"]].drop_duplicates(["subscription", "address"])
    return places.assign(
        token="", record_id="", period_start=pd.Timestamp(window.start), period_end=pd.Timestamp(window.end)
    )


def gone_from_the_warehouse(standing: pd.DataFrame, seen: set[str]) -> pd.DataFrame:
    """Return the identities that only the ledger knows by now, as totals of nothing."""
    gone = standing[~standing["identity"].isin(seen)].drop_duplicates("identity", keep="last")
    return gone[ATTRIBUTES].assign(quantity=0, open_from=None)


def rows_of(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a frame's rows as plain mappings."""
    return frame.to_dict("records")  # type: ignore[return-value]


def plain(quantity: Decimal) -> str:
    """Return a quantity as the ledger writes it: no exponent, no trailing zeros."""
    text = f"{quantity:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def accounts(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return whose rows these are, each once."""
    return tuple(sorted(rows["account"].unique()))
