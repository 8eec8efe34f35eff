"""What can go wrong, drawn by what to do next.

UsageBillingError
├── Misconfigured    a person acts first; nothing was sent, or nothing more will be
│   └── NeedsDecision    the settings are sound, but what they would do wants a person's yes
├── NotApplied       the site did nothing: the same request may be sent again
├── Refused          the site said no to these deliveries: they become dead letters
├── InDoubt          the request left, its outcome is unknown: ask the site, never resend blindly
└── Stale            a newer extraction was compared: this plan sends nothing

No message ever holds a credential.
"""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any


class UsageBillingError(Exception):
    """The base of every error of this package; a class without a message speaks with its docstring."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])


class Misconfigured(UsageBillingError):
    """A setting, credential or definition is wrong; a person has to mend it before anything is sent."""

    @classmethod
    def all_at_once(cls, subject: str, faults: Iterable[str]) -> "Misconfigured":
        """Return one error that lists every fault of `subject`, a line each."""
        lines = list(faults)
        count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        return cls("\n".join([f"{subject}: {count}", *(f"  - {line}" for line in lines)]))


class NeedsDecision(Misconfigured):
    """The run would do something so unusual that a person has to look at it first."""


class NotApplied(UsageBillingError):
    """The site did nothing with the request; it may be sent again."""

    def __init__(self, message: str = "", *, retry_after_seconds: float | None = None, throttled: bool = False) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds
        self.throttled = throttled


class Refused(UsageBillingError):
    """The site refused these deliveries for a reason that lies in them."""


class InDoubt(UsageBillingError):
    """A request left and its outcome is unknown; only the site can tell.

    `receipts` (of `records.Receipt`) are for those deliveries of the chunk that the site has all the same, as it was
    seen to; the others are in doubt. `answers` (by token) are what was learned of some doubts before the site failed.
    `taken` says that the site took them, and that only the proof of how much counted is not there yet. `refused` says
    that the site said no to several at once, and that only what became of each is unknown; `throttled` and
    `retry_after_seconds` that it wants to be asked later, as with `NotApplied`; `unaskable` that it turns the question
    about these down, and answers others: a person has to look.
    """

    def __init__(
        self,
        message: str = "",
        *,
        receipts: Sequence[Any] = (),
        answers: Mapping[str, Any] = MappingProxyType({}),
        taken: bool = False,
        refused: bool = False,
        throttled: bool = False,
        retry_after_seconds: float | None = None,
        unaskable: bool = False,
    ) -> None:
        super().__init__(message)
        self.unaskable = unaskable
        self.receipts = tuple(receipts)
        self.answers = dict(answers)
        self.taken = taken
        self.refused = refused
        self.throttled = throttled
        self.retry_after_seconds = retry_after_seconds


class Stale(UsageBillingError):
    """A newer extraction of the same usage periods was compared; this plan sends nothing."""
