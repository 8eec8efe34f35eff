"""The contract of a destination: one billing API that takes usage.

A destination knows how its API names things, how a delivery is written down, how many travel together and how a
doubt is settled. It keeps no memory: that is the ledger's part. `deliver` and `reconcile` drive every destination
through this class alone, and the contract suite in ``tests/contract`` holds each of them to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from usage_billing.archive import Archive
from usage_billing.errors import InDoubt, Misconfigured, Refused
from usage_billing.records import PASSES, REFUSED_HERE, Delivery, Period, Receipt, SiteRecord, SiteTotal, State, Target
from usage_billing.sources import BillingSource, DestinationSettings

LARGEST_BULK = 900_000
"""Bytes of JSON in a request of many events: no document names a limit, and few hosts have one below 1 MB."""

Answer = Receipt | Refused | InDoubt | None
"""What a site says of one delivery in doubt; see `Destination.settle`."""


@dataclass(frozen=True)
class Moved:
    """Accepted deliveries whose address is no longer today's: how many, and what to tell a person of them."""

    deliveries: int
    text: str


class Mapped(Protocol):
    """What a destination needs of a mapping of accounts."""

    def leading(self, accounts: Sequence[str], /) -> Mapping[str, tuple[str, str]]:
        """Return, by account, the name at the site, and why there is none: one of the two is empty."""


class AcceptedHere(Protocol):
    """What a ledger tells of deliveries that bear on what else may go."""

    def accepted_at(
        self, site: str, subscriptions: Sequence[str], component: str, window: Period, states: Sequence[State]
    ) -> pd.DataFrame:
        """Return subscription, quantity and, where it was dated into another period, body of deliveries in `states`."""


class Destination(ABC):
    """One billing API as one source uses it.

    Class attributes declare what the API documents; a subclass is mostly these and five short methods.
    """

    name: ClassVar[str]
    connection_type: ClassVar[str]
    """The type of Airflow connection that leads to the site."""
    settings_model: ClassVar[type[DestinationSettings]]
    chunk_size: int
    """How many deliveries travel in one request at most; a class attribute, unless the source's settings lower it."""
    retry_chunk_size: int = 1
    """How many of those that were sent before and came back travel in one request: a chunk must not hide its culprit
    twice."""
    replay_window: ClassVar[timedelta]
    """How long the API itself ignores a repeated token; zero where it promises nothing."""

    stream: str = ""
    """The stream that takes each accepted row as an event of its own, in archived chunks; empty where totals go."""
    events_to_chunk: int = 1
    """How many events a chunk of the `stream` holds at most: as many as the API takes in a request."""
    metric: str = "sum"
    """What the site computes of what it was sent; only a sum or a count can be tied out."""
    fed_by_others: bool = False
    """Whether others feed what `totals` counts, as the source says: then more there than here is no difference."""
    archive: Archive | None = None
    """Where chunks of events are kept; whoever makes a destination with a `stream` hands one in."""

    mapping: Mapped | None = None
    """What the site calls the customer of each account, where the user has a mapping of their own."""

    book: AcceptedHere | None = None
    """The ledger, where a site's count lags behind what was accepted; whoever plans or sends hands it in."""

    why_late: ClassVar[str] = "its billing period is closed"
    """What speaks against sending usage whose billing period is closed."""

    client: Any
    """The plain client of the site; its `settings` tell the site's name and how many requests it takes at once."""

    def __init__(self, source: BillingSource, client: Any) -> None:
        self.source = source
        self.client = client

    @property
    def site(self) -> str:
        """The canonical name of the billing site: ``maxio:<region>:<subdomain>`` or ``chargeover:<instance>``."""
        name: str = self.client.settings.site
        return name

    @property
    def settle_after(self) -> timedelta:
        """How long after a request was sent the site may still apply it, as the connection says."""
        wait: timedelta = self.client.settings.settle_after
        return wait

    @property
    def ask_after(self) -> timedelta:
        """How long after a request was sent `settle` may be asked about it: no sooner than its answer holds."""
        return self.settle_after

    @property
    def late_usage(self) -> str:
        """What becomes of usage whose billing period is closed, as the source says."""
        policy: str = getattr(self.source.destination, "late_usage", "hold")
        return policy

    @property
    def _against_late(self) -> str:
        """What speaks against late usage that nothing lets pass, by the source's policy; empty where it goes anyway."""
        return {"hold": self.why_late, "refuse": f"{REFUSED_HERE}{self.why_late}"}.get(self.late_usage, "")

    def _why_late(self, proposals: pd.DataFrame, late: np.ndarray) -> np.ndarray:
        """Return, per proposal, what speaks against it if it is `late`; nothing if its grace or a person lets it go."""
        texts = np.full(len(proposals), "", dtype=object)
        if not self._against_late:
            return texts
        late = late & ~let_go(proposals)
        spans = proposals.loc[late, ["period_end", "open_from"]].itertuples(index=False, name=None)
        texts[late] = ["" if self.passes(end, renewal) else self._against_late for end, renewal in spans]
        return texts

    def passes(self, end: datetime, renewal: datetime) -> bool:
        """Say whether usage that ended then passes a renewal, by the source's grace."""
        since = self.source.passes_from(renewal, self.settle_after)
        return since is not None and end > since

    def _why_late_now(self, delivery: Delivery, open_from: datetime) -> str:
        """Return what speaks against a delivery of which the billing period closed since it was planned."""
        within = delivery.period is not None and self.passes(delivery.period.end, open_from)
        return (PASSES if within else self._against_late) or PASSES

    def check(self) -> None:
        """Ask the site whether this source can be billed at all: credentials, component, kind, decimals.

        Raises:
            Misconfigured: it cannot, with every reason at once.
            NotApplied: the site could not be asked.
        """
        if faults := list(self._faults()):
            raise Misconfigured.all_at_once(f"billing source {self.source.title!r} on {self.site}", faults)

    def is_test_site(self) -> bool | None:
        """Ask the site whether it is for tests; None where it does not tell.

        Raises:
            Misconfigured, NotApplied: the site could not be asked.
        """
        return None

    @abstractmethod
    def _faults(self) -> Iterator[str]:
        """Yield what the site's catalogue shows to be wrong with the source's definition."""

    @abstractmethod
    def resolve(self, accounts: Sequence[str]) -> list[Target]:
        """Return where each warehouse account is billed, in the order given; asks the site, writes nothing.

        An account that the site definitely does not know (or that is ambiguous there) comes back with `unknown` set.

        Raises:
            Misconfigured: the credentials or the definition are wrong.
            NotApplied: the site could not be asked; nothing may be concluded about any account.
        """

    def locate(self, accounts: Sequence[str]) -> list[Target]:
        """Return where each account is or was billed: as `resolve`, also where the site would bill nothing any more.

        For looking at what was billed; nothing is sent to such a target.
        """
        return self.resolve(accounts)

    def resolve_accounts(self, accounts: Sequence[str]) -> list[Target]:
        """Return where each account of the warehouse is billed, in the order given: `resolve` by the user's mapping.

        Raises what `resolve` raises, and `Misconfigured` where the mapping cannot be read.
        """
        return self._led(accounts, self.resolve)

    def locate_accounts(self, accounts: Sequence[str]) -> list[Target]:
        """Return where each account of the warehouse is or was billed: as `locate`, by the user's mapping."""
        return self._led(accounts, self.locate)

    def _led(self, accounts: Sequence[str], ask: Callable[[Sequence[str]], list[Target]]) -> list[Target]:
        if self.mapping is None:
            return ask(accounts)
        led = self.mapping.leading(accounts)
        names = sorted({name for name, _ in led.values() if name})
        found = dict(zip(names, ask(names) if names else [], strict=True))
        return [
            Target(account, unknown=why) if why else replace(found[name], account=account)
            for account in accounts
            for name, why in [led[account]]
        ]

    @abstractmethod
    def hold_reason(self, proposals: pd.DataFrame) -> pd.Series:
        """Return, per proposal, why it may not be sent now (text), or an empty text.

        `proposals` has the columns of `encode`, and perhaps ``released``: who let it go, though its billing period is
        closed. Such a one is held for nothing but what the site cannot do.
        """

    @abstractmethod
    def standing(self, subscription: str) -> Target:
        """Return where a subscription, as identities name it, is billed today, whichever account leads to it.

        One that the site would not bill, or cannot be told how to reach, comes back with `unknown` set.

        Raises:
            Misconfigured, NotApplied: as `resolve`.
        """

    def look_up(self, proposals: pd.DataFrame, standing: Callable[[str], Target] | None = None) -> pd.DataFrame:
        """Return proposals with today's address and open billing period also where no usage of the run told them.

        Where a key vanished, or its account leads elsewhere by now, nobody named its subscription. If the site bills
        that no more, ``open_from`` stays NaT, and ``unbilled`` says why, empty for all others. Whoever looks up in
        parts hands in what remembers `standing`: each subscription is then asked about once.

        Raises:
            Misconfigured, NotApplied: the site could not be asked.
        """
        proposals = proposals.assign(unbilled=pd.Series("", index=proposals.index, dtype=object))
        unknown = self._untold(proposals)
        if not unknown.any():
            return proposals
        names = proposals.loc[unknown, "subscription"]
        today = {name: (standing or self.standing)(name) for name in sorted(set(names))}
        proposals.loc[unknown, "unbilled"] = [today[name].unknown for name in names]
        found = [None if today[name].unknown else today[name] for name in names]
        columns = {
            "address": [None if one is None else one.address_text for one in found],
            "open_from": [None if one is None else one.open_from for one in found],
            "open_until": [None if one is None else one.open_until for one in found],
        }
        looked_up = pd.DataFrame(columns, index=names.index, dtype=object).reindex(proposals.index)
        for edge in ("open_from", "open_until"):
            looked_up[edge] = pd.to_datetime(looked_up[edge], utc=True)
        return proposals.assign(**{name: looked_up[name].fillna(proposals[name]) for name in columns})

    def _untold(self, proposals: pd.DataFrame) -> np.ndarray:
        """Say of each proposal whether the site has to be asked how its subscription stands."""
        return (proposals["open_from"].isna() & (proposals["quantity"] != "0")).to_numpy(dtype=bool)

    def judge(self, proposals: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
        """Return how much of each proposal may go now (plain decimal text), and why it is held, or an empty text.

        All of it, unless the site is known to take a part only. It may ask the site, and it writes nothing.

        Raises:
            Misconfigured, NotApplied: the site could not be asked.
        """
        return proposals["quantity"], self.hold_reason(proposals)

    def lock(self, delivery: Delivery) -> str:
        """Return the name of the lock under which a delivery goes alone, after all others; empty for most."""
        return ""

    def recheck(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Return, by token, why what was right when it was planned may not be sent any more.

        `PASSES` is the reason of one that is only dated wrong by now: it goes as a new revision. `PASSES_SOON` is that
        of one for which this will be so after a renewal that is due. Asked right before a request that waited: for a
        lock, or since an earlier try. `now` is the ledger's time.

        Raises:
            Misconfigured, NotApplied: the site could not be asked; nothing may be sent.
        """
        return {}

    def overtaken(self, deliveries: Sequence[Delivery], now: datetime) -> Mapping[str, str]:
        """Return, by token, why what the site has taken may lie in a billing period that had closed by then.

        Asked after the reply, of what was sent so near the end of its period that it may have landed after it. What is
        still open `now`, by the ledger's time, was open then.

        Raises:
            Misconfigured, NotApplied: the site could not be asked.
        """
        return {}

    def priced(self, more: Mapping[str, Decimal]) -> Mapping[str, Decimal] | None:
        """Return by how much each subscription's next invoice would grow, in the site's currency, with so much more.

        It is the site's own reckoning, asked without writing anything. A subscription that it does not price is left
        out; None where no documented call prices usage that is not there yet.

        Raises:
            Misconfigured, NotApplied: the site could not be asked.
        """
        return None

    @abstractmethod
    def encode(self, proposals: pd.DataFrame) -> pd.Series:
        """Return the exact JSON text of each proposal's record, without a loop over rows.

        Columns: ``token``, ``identity``, ``subscription``, ``component``, ``price_point``, ``dimensions`` (JSON text),
        ``address`` (JSON text), ``period_start``, ``period_end`` (UTC timestamps), ``quantity`` (plain decimal text),
        ``open_from`` (start of the open billing period, UTC, or NaT).
        """

    def encode_events(self, events: pd.DataFrame) -> pd.Series:
        """Return the exact JSON text of each row as an event at its `time`, without a loop over rows.

        Columns: ``token``, ``time`` (UTC), ``quantity`` (plain decimal text, or the value that a meter counts),
        ``address``, ``dimensions`` (both JSON text). The text of an event may never change: by it a later run tells
        whether the row is still what was sent. (Where it was sent with a later time, the archive keeps both texts.)
        """
        raise NotImplementedError(f"{self.name} sends no events of single rows")

    def kept(self) -> Archive:
        """Return the archive.

        Raises:
            Misconfigured: none was handed in, so nothing can be sent or compared.
        """
        if self.archive is None:
            raise Misconfigured(f"billing source {self.source.title!r}: sends raw events, and was given no archive")
        return self.archive

    def prepare(self, chunk: Sequence[Delivery]) -> None:  # noqa: B027 - most need nothing.
        """Fetch what `send` will need of this chunk, in this thread; asked before the claim, which then ages no more.

        Raises:
            Misconfigured: it cannot be had; nothing was claimed.
        """

    @abstractmethod
    def send(self, chunk: Sequence[Delivery]) -> list[Receipt]:
        """Send one chunk in one request and return a receipt for each delivery that the site took.

        A delivery without a receipt was definitely not applied and may be sent again.

        Raises:
            Misconfigured: nothing was applied and nothing will be, until a person acts.
            NotApplied: nothing of the chunk was applied.
            Refused: nothing of the chunk was applied and the reason lies in it (a chunk of several is then split).
            InDoubt: some of it may have been applied; its `receipts` are of those that are proven to have been.
        """

    @abstractmethod
    def settle(self, doubts: Sequence[Delivery], now: datetime) -> Mapping[str, Answer]:
        """Settle deliveries in doubt, all of them sent longer than `ask_after` before `now`, the ledger's time.

        By token: a receipt says that the site has it with the same quantity; ``None`` that it definitely has it not; a
        `Refused` that it has it with another one, and an `InDoubt` that no waiting will tell: with these a person
        decides. A token that is absent from the answer is still in doubt, and worth asking about again.

        Raises:
            Misconfigured, NotApplied: the site could not be asked; all stay in doubt.
            InDoubt: all stay in doubt, but those of its `answers`.
        """

    @abstractmethod
    def records(self, deliveries: pd.DataFrame) -> Iterable[SiteRecord] | None:
        """Yield what the site holds for the same subscriptions and usage periods as `deliveries`, ours and others'.

        `deliveries` has ``token``, ``subscription``, ``component``, ``address`` (JSON text), ``record_id``,
        ``period_start``, ``period_end`` of accepted deliveries. None where the API cannot list records singly.
        """

    def counted_at(self, body: str) -> datetime:
        """Return the moment by which the site assigns a record, the text of a delivery, to a billing period."""
        raise NotImplementedError(f"{self.name} is tied out record by record")

    def moved(self, accepted: pd.DataFrame) -> Iterable[Moved]:
        """Yield what was accepted in a billing period that is still open, at an address that was replaced since.

        `accepted` has the columns of `records`. Asks the site once for each account; nothing where addresses stay.

        Raises:
            Misconfigured, NotApplied: the site could not be asked.
        """
        return ()

    def elsewhere(self, span: Period) -> Iterable[SiteRecord]:
        """Yield what the site holds over a span at addresses that lead there no more; nothing where none is replaced.

        It may hold what `records` yields too, and what belongs to other sources.
        """
        return ()

    def totals(self, subscriptions: Sequence[str]) -> list[SiteTotal] | None:
        """Return what the site counts for each subscription over its billing periods; None where `records` lists."""
        return None


def let_go(proposals: pd.DataFrame) -> np.ndarray:
    """Say of each proposal whether a person released it."""
    if "released" not in proposals:
        return np.zeros(len(proposals), dtype=bool)
    return (proposals["released"] != "").to_numpy(dtype=bool)


def shuffled(name: str, now: datetime) -> str:
    """Return by what to sort names into an order that hangs on the time, and on nothing else."""
    return sha256(f"{now.isoformat()} {name}".encode()).hexdigest()


def closed(proposals: pd.DataFrame) -> np.ndarray:
    """Say of each proposal whether its usage period lies in a billing period that is closed, where that is known."""
    return (proposals["period_end"] <= proposals["open_from"]).to_numpy(dtype=bool)


def joined(*parts: str | pd.Series) -> pd.Series:
    """Return the parts written one after the other, row by row, without a loop over rows; texts repeat in every row.

    At least one part is a column; the result has the index of the first one.
    """
    index = next(part.index for part in parts if isinstance(part, pd.Series))
    columns = [part if isinstance(part, str) else _strings(part) for part in parts]
    # A column may be empty of rows: then a scalar alone would still give one.
    arrays = [pa.scalar(part, pa.large_string()) if isinstance(part, str) else part for part in columns]
    text = pc.binary_join_element_wise(*arrays, pa.scalar("", pa.large_string()))
    return pd.Series(text.to_pandas().to_numpy(dtype=object), index=index, dtype=object)


def by_value(column: pd.Series, write: Callable[[Any], str]) -> pd.Series:
    """Return `write` of each value, called once per distinct value."""
    codes, values = pd.factorize(column)
    written = np.array([write(cast("Hashable", value)) for value in values], dtype=object)
    return pd.Series(written[codes], index=column.index, dtype=object)


def negative(quantity: pd.Series) -> np.ndarray:
    """Say of each plain decimal text whether it is below 0."""
    return cast("np.ndarray", pc.starts_with(_strings(quantity), "-").to_numpy(zero_copy_only=False))


def _strings(column: pd.Series) -> pa.Array:
    # By way of objects: a text column that pandas has put together may hold pieces of two Arrow types.
    found = pa.array(column.astype(object), type=pa.large_string(), from_pandas=True)
    return found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
